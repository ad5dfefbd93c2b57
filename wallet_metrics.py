"""Counts what a wallet does, for Prometheus, by its client library.

wallet.py loads this module where metrics are on, and else not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from wallet import (
    SIGN_BY_TYPE,
    Database,
    OutcomeUnknown,
    Transaction,
    Unavailable,
    Wallet,
    _Response,
)

DURATION_BUCKETS_S = .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10
WRITES_BUCKETS = 1, 2, 4, 8, 16, 32, 64  # Writes to a commit: up to one for each thread.
OTHER = "other"  # The label for an unknown route or method.


class Metrics:
    """What an App and its database do, for Prometheus (https://prometheus.io/docs/practices).

    No label has a value that a client can make up: there would be ever more, and one could tell of
    an account.
    """

    def __init__(self, database: Database) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.requests = counter(
            "wallet_requests", "answers; other is what no route takes, or what was refused before",
            ["route", "method", "status"])
        self.durations = histogram(
            "wallet_request_duration_seconds", "seconds until an answer was made", ["route"],
            buckets=DURATION_BUCKETS_S)
        self.movements = counter(
            "wallet_movements", "transactions that were made, by requests", ["type"])
        self.amounts = counter("wallet_movement_amount", "their amounts, in minor units", ["type"])
        self.refused = counter(
            "wallet_charges_refused", "charges and captures that got a 4xx", ["code"])
        self.commits = histogram(
            "wallet_commit_writes", "writes to a commit, of which SQLite's have several",
            buckets=WRITES_BUCKETS)
        self.errors = counter(
            "wallet_database_errors", "reads and writes that failed in the database", ["code"])
        connections = gauge("wallet_pool_connections",
                            "connections to Postgres, or those that read SQLite", ["state"])
        connections.labels("idle").set_function(lambda: database.usage()["idle"])
        connections.labels("in_use").set_function(lambda: database.usage()["in_use"])
        gauge("wallet_pool_waiting",
              "calls that wait for a connection to Postgres, or to write to SQLite",
              ).set_function(lambda: database.usage()["waiting"])
        for type in SIGN_BY_TYPE:  # A series that begins at 0 shows its first one too.
            self.movements.labels(type), self.amounts.labels(type)
        self.errors.labels(Unavailable.code), self.errors.labels(OutcomeUnknown.code)
        database.observe = self.observe

    def get(self, wallet: Wallet, caller: None) -> _Response:
        """Show it all, but for when each series began, which would be as many again."""
        created = rb"(?m)^(# \w+ )?\w+_created\b.*\n"
        lines = re.sub(created, b"", generate_latest(self.registry))
        return _Response(200, lines, {"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    def observe(self, outcomes: Sequence[Exception | None]) -> None:
        """Count a commit, and what the database could not do (see Database)."""
        if written := outcomes.count(None):
            self.commits.observe(written)
        for error in outcomes:
            if isinstance(error, Unavailable):
                self.errors.labels(error.code).inc()

    def count(self, rule: str | None, method: str, answer: _Response, duration_s: float) -> None:
        """Count an answer. An earlier one that is repeated has moved nothing."""
        route = re.sub("<.*>", "{id}", rule) if rule else OTHER
        method = method if method in ("GET", "HEAD", "POST") else OTHER
        self.requests.labels(route, method, answer.status).inc()
        self.durations.labels(route).observe(duration_s)
        body = answer.body if isinstance(answer.body, dict) else {"transactions": [answer.body]}
        if answer.status == 201:
            for made in body.get("transactions", ()):
                if isinstance(made, Transaction) and not made.replayed:
                    # A transfer has both.
                    for type in {made.type, made.type.replace("_out", "_in")}:
                        self.movements.labels(type).inc()
                        self.amounts.labels(type).inc(made.amount)
        elif route.endswith(("/charge", "/capture")) and answer.status < 500:
            self.refused.labels(body["code"]).inc()
