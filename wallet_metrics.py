"""Counts what a wallet does, for Prometheus, by its client library.

wallet.py loads this module where metrics are on, and else not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from threading import Lock

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from wallet import (
    SIGN_BY_TYPE,
    Database,
    OutcomeUnknown,
    Transaction,
    Unavailable,
    Wallet,
    __version__,
    _Response,
)

DURATION_BUCKETS_S = .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10
WRITES_BUCKETS = 1, 2, 4, 8, 16, 32, 64  # Writes to a commit: up to one for each thread.
OTHER = "other"  # The label for an unknown route or method.
SERVER_GAUGES = {"wallet_requests_waiting": "requests that wait for a thread",
                 "wallet_requests_running": "requests that threads work on",
                 "wallet_connections": "connections of clients that are open"}


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
            "wallet_requests",
            "answers; other has no route or method, or was refused before that was known",
            ["route", "method", "status"])
        self.durations = histogram(
            "wallet_request_duration_seconds",
            "seconds from when a request was complete until its answer was made", ["route"],
            buckets=DURATION_BUCKETS_S)
        self.movements = counter(
            "wallet_movements", "transactions that were made, by requests", ["type"])
        self.refusals = counter(
            "wallet_refusals", "requests that were refused; reason is the code of the answer, or"
            " queue: it waited too long, statements or overviews: too many at once, slow: its"
            " client was",
            ["route", "reason"])
        self.commits = histogram(
            "wallet_commit_writes",
            "how many writes one commit kept: those that wait go together",
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
        self.log_lines_dropped = counter(
            "wallet_log_lines_dropped", "lines of the log for which there was no room")
        build = Info("wallet_build", "always 1", registry=self.registry)
        build.info({"version": __version__, "engine": database.engine})
        for type in SIGN_BY_TYPE:  # A series that begins at 0 shows its first one too.
            self.movements.labels(type)
        self.amounts: dict[str, int] = dict.fromkeys(SIGN_BY_TYPE, 0)
        self.lock = Lock()
        self.errors.labels(Unavailable.code), self.errors.labels(OutcomeUnknown.code)
        database.observe = self.observe

    def get(self, wallet: Wallet, caller: None) -> _Response:
        """Show it all, but for when each series began, which would be as many again."""
        created = rb"(?m)^(# \w+ )?\w+_created\b.*\n"
        lines = re.sub(created, b"", generate_latest(self.registry))
        # The library has floats only, which round what is above 2**53.
        name, meaning = "wallet_movement_amount_total", "the amounts of movements, in minor units"
        lines += f"# HELP {name} {meaning}\n# TYPE {name} counter\n".encode()
        for type, amount in self.amounts.items():
            lines += f'{name}{{type="{type}"}} {amount}\n'.encode()
        return _Response(200, lines, {"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    def observe(self, outcomes: Sequence[Exception | None]) -> None:
        """Count a commit, and what the database could not do (see Database)."""
        if written := outcomes.count(None):
            self.commits.observe(written)
        for error in outcomes:
            if isinstance(error, Unavailable):
                self.errors.labels(error.code).inc()

    def watch(self, usage: Callable[[], Mapping[str, int]]) -> None:
        """Show what a server is busy with: what waits, what runs, and its connections."""
        for name, meaning in SERVER_GAUGES.items():
            gauge = Gauge(name, meaning, registry=self.registry)
            gauge.set_function(partial(lambda key: usage()[key], name.rpartition("_")[2]))

    def count_refusal(self, rule: str | None, reason: str) -> None:
        """Count what was refused, and why."""
        self.refusals.labels(_route(rule), reason).inc()

    def count(self, rule: str | None, method: str, answer: _Response, duration_s: float) -> None:
        """Count an answer. An earlier one that is repeated has moved nothing."""
        route = _route(rule)
        method = method if method in ("GET", "HEAD", "POST") else OTHER
        self.requests.labels(route, method, answer.status).inc()
        self.durations.labels(route).observe(duration_s)
        if answer.reason:
            self.count_refusal(rule, answer.reason)
        body = answer.body if isinstance(answer.body, dict) else {"transactions": [answer.body]}
        if answer.status == 201:
            for made in body.get("transactions", ()):
                if isinstance(made, Transaction) and not made.replayed:
                    # A transfer has both.
                    for type in {made.type, made.type.replace("_out", "_in")}:
                        self.movements.labels(type).inc()
                        with self.lock:
                            self.amounts[type] += made.amount


def _route(rule: str | None) -> str:
    return re.sub("<.*?>", "{id}", rule) if rule else OTHER
