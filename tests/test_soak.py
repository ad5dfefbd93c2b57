"""A day at the limits, in ten minutes: all connections taken, all threads busy, long answers."""

from __future__ import annotations

import contextlib
import http.client
import random
import re
import resource
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle
from statistics import median
from urllib.parse import urlsplit

import pytest

import wallet_books
import wallet_server
from tests.support import (
    fill_with_topups,
    read_status,
    send,
    served,
    torture,
)
from wallet import BATCH_MAX, Wallet

LEAKING = """
import sys, wallet, wallet_cli
kept, render = [], wallet._render
wallet._render = lambda *given: kept.append(b"x" * 150_000) or render(*given)
sys.exit(wallet_cli.main())
"""
CLIENTS = 16  # Twice as many as there are threads.
LINGERERS = 4  # Threads that keep the other connections from being idle for too long.


class Crowd:
    """Clients of every kind, until they are told to stop. `odd` has what they did not expect."""

    def __init__(self, url, tokens, historian, connections):
        self.url, self.tokens, self.historian = url, tokens, historian
        self.counts, self.odd, self.stopped = Counter(), Counter(), threading.Event()
        self.netloc, self.used_at = urlsplit(url).netloc, {}
        self.idle = [self.connection() for _ in range(connections)]
        self.threads = ThreadPoolExecutor(CLIENTS + LINGERERS + 2)
        list(self.threads.map(self.look, self.idle))
        jobs = [self.read_statements, self.read_statements, *[self.work] * CLIENTS]
        jobs += [partial(self.linger, self.idle[start::LINGERERS]) for start in range(LINGERERS)]
        self.futures = [self.threads.submit(job) for job in jobs]

    def connection(self):
        return http.client.HTTPConnection(self.netloc, timeout=30)

    def ask(self, expected, *request, connection=None, **headers):
        status, _, document = send(self.url, *request, connection=connection, **headers)
        self.counts[status] += 1
        if status != expected:
            self.odd[request[0], request[1], status, str(document)[:200]] += 1
        return document

    def look(self, connection):
        """Ask on a connection, which is made anew before the server takes it for idle."""
        if time.monotonic() - self.used_at.get(connection, 0) > wallet_server.IDLE_TIMEOUT_S - 15:
            connection.close()
        self.ask(200, "GET", "/api/account", None, self.tokens[0], connection=connection)
        self.used_at[connection] = time.monotonic()

    def linger(self, connections):
        """Keep connections open, and ask now and then on each, as a pool of a proxy does."""
        for connection in cycle(connections):
            self.look(connection)
            if self.stopped.wait(10 / len(connections)):
                return

    def read_statements(self):
        while not self.stopped.is_set():
            text = self.ask(200, "GET", "/api/transactions.csv", None, self.historian)
            assert b"transactions in this statement" in text[-100:]

    def work(self):
        connection, mine = self.connection(), random.Random()
        with contextlib.closing(connection):
            while not self.stopped.is_set():
                kind = mine.random()
                # A batch has its accounts for a while, and others would wait for them.
                token = mine.choice(self.tokens[:20] if kind < 0.002 else self.tokens[20:])
                ask = lambda *given, token=token: self.ask(*given, token, connection=connection)  # noqa: E731
                if kind < 0.002:
                    one = {"type": "topup", "amount": 1}
                    body = {"transactions": [one] * BATCH_MAX}
                    ask(201, "POST", "/api/transactions/batch", body)
                elif kind < 0.01:
                    body = {"amount": 1, "description": "x" * 70_000}
                    self.ask(413, "POST", "/api/transactions/topup", body, token)
                elif kind < 0.1:
                    made = ask(201, "POST", "/api/holds", {"amount": 1})
                    ask(201, "POST", f"/api/holds/{made['id']}/release", {})
                elif kind < 0.2:
                    ask(402, "POST", "/api/transactions/charge", {"amount": 10**12})
                elif kind < 0.4:
                    ask(200, "GET", "/api/transactions?limit=100", None)
                else:
                    path = mine.choice(["topup", "topup", "charge"])
                    ask(201, "POST", f"/api/transactions/{path}", {"amount": 1})

    def stop(self):
        self.stopped.set()
        for future in self.futures:
            future.result(timeout=60)
        self.threads.shutdown()
        for connection in self.idle:
            connection.close()


def resident_kb(server):
    return int(re.search(r"VmRSS:\s+(\d+) kB", read_status(server.pid))[1])


@contextlib.contextmanager
def many_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = wallet_server.CONNECTIONS_MAX + 500
    wanted = wanted if hard < 0 else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield wanted - 500
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def soak(dsn, seconds, program=("-m", "wallet")):
    """Keep a wallet busy for so long. Return its memory early and late, and what was found."""
    with Wallet(dsn) as wallet:
        accounts = [wallet.register(f"Ada {number}") for number in range(100)]
        for account, _ in accounts:
            wallet.topup(account.id, 10**9)
        historian, historians_token = wallet.register("A long history")
        fill_with_topups(wallet, historian.id, 5_000)
    settings = {"WALLET_DSN": dsn, "WALLET_LOG_LEVEL": "warning", "WALLET_METRICS": "1"}
    with many_files() as limit, served(program=program, **settings) as server:
        # The server counts as two, and the others here have some.
        taken = min(limit, wallet_server.CONNECTIONS_MAX) - CLIENTS - 2 - 10
        tokens = [token for _, token in accounts]
        crowd, sizes_kb = Crowd(server.url, tokens, historians_token, taken), []
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(seconds / 200)
            sizes_kb.append(resident_kb(server))
            assert not any(future.done() for future in crowd.futures)
        scrape = send(server.url, "GET", "/metrics")[2].decode()
        crowd.stop()
        server.terminate()
        log = server.communicate(timeout=30)[1]
    assert crowd.odd == {}
    assert log == ""
    with Wallet(dsn) as wallet:
        wallet_books.verify(wallet)
    early_kb, late_kb = median(sizes_kb[60:100]), median(sizes_kb[-20:])
    connections = int(re.search(r"(?m)^wallet_connections (\d+)", scrape)[1])
    return early_kb, late_kb, (
        f"{sum(crowd.counts.values()):,} requests in {seconds} s with {connections:,} connections:"
        f" {dict(crowd.counts)}; resident memory {early_kb / 1000:.1f} MB after 40 % of the time,"
        f" {late_kb / 1000:.1f} MB at the end, {max(sizes_kb) / 1000:.1f} MB at most"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    # At first the caches fill: of SQLite, and of Python's memory. In ten minutes that is nearly
    # over: what is added after the fourth is less than a tenth.
    ("seconds", "growth_kb_max"),
    [(5, 40_000), torture(600, 10_000)],
)
def test_memory_stays_flat_and_the_log_empty_at_the_limits(
    durable_dsn, report, seconds, growth_kb_max
):
    early_kb, late_kb, figures = soak(durable_dsn, seconds)
    report(figures)
    assert late_kb - early_kb < growth_kb_max


def test_control_memory_that_leaks_is_found(file_dsn):
    early_kb, late_kb, _ = soak(file_dsn, 5, ("-c", LEAKING))
    assert late_kb - early_kb > 40_000
