"""What is kept through kills, power cuts, full disks and calls that fail."""

from __future__ import annotations

import contextlib
import dis
import http.client
import itertools
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from iso4217 import Currency

import wallet as wallet_module
import wallet_cli
from tests.support import (
    MODULE,
    SERIALIZABLE,
    Client,
    Intent,
    Load,
    check_books,
    command,
    count_lost_and_surplus,
    environment,
    files_cannot_grow,
    hold_the_line,
    hold_the_writer,
    kill_service,
    limited,
    record,
    send,
    served,
    strace,
    together,
    torture,
    wait_for_queue,
)
from wallet import (
    ConfigurationError,
    InsufficientFunds,
    NotFound,
    OutcomeUnknown,
    Unavailable,
    Wallet,
    create_app,
)

# Promise 2: a success that was answered is kept ###################################################

LATE = """
import sys, wallet, wallet_cli
class Late(wallet.SQLiteDatabase):
    # Answers first, and would commit some time later: the mistake that the kill must find.
    def _try_commit(self, batch):
        self.count = getattr(self, "count", 0) + 1
        if not self._writer.in_transaction: self._writer.execute("BEGIN IMMEDIATE")
        for write in batch: self._run([write])
        if self.count < 20: self._writer.execute("COMMIT")
wallet.SQLiteDatabase = Late
sys.exit(wallet_cli.main())
"""


class Crashes:
    """A service that is killed again and again under the load of 8 clients, which journal what
    becomes of it.
    """

    def __init__(self, dsn, program=MODULE, database=None):
        self.arguments = "--dsn", dsn, "--log-level", "error"
        self.dsn, self.program, self.database = dsn, program, database
        self.draw = random.Random(6)
        self.tokens = []
        self.journals = [
            [] for _ in range(8)
        ]  # Each client sends its last intent until that is answered.
        self.acknowledged, self.count, self.lost = (
            [],
            0,
            0,
        )  # Since the last start, in all, and of these.
        self.killed, self.killed_at, self.sound = "service", None, 0
        self.ready_s, self.recovered_s = (
            [],
            [],
        )  # After a kill of the service only, and of its database too.

    @contextmanager
    def started(self):
        """Start the service, see how long that takes, and that it has all it had acknowledged."""
        began = self.killed_at or time.monotonic()
        with served(*self.arguments, program=self.program) as server:
            assert send(server.url, "GET", "/readyz")[0] == 200
            (self.ready_s if self.killed == "service" else self.recovered_s).append(
                time.monotonic() - began
            )
            with Wallet(self.dsn) as wallet:
                if self.database is None:
                    assert wallet.database.read(lambda tx: tx("PRAGMA integrity_check")) == [
                        ("ok",)
                    ]
                    self.sound += 1
                self.lost += wallet.database.read(
                    lambda tx: sum(not one.is_kept(tx) for one in self.acknowledged)
                )
            self.count += len(self.acknowledged)
            self.acknowledged = []
            yield server

    def crash(self, killed="service"):
        """Start the service, and kill it under load at a random moment, and before it the database
        or a session.
        """
        goal, enough = self.draw.randrange(250), threading.Event()

        def work(client):
            journal, connection = (
                self.journals[client],
                http.client.HTTPConnection(urlsplit(server.url).netloc),
            )
            with (
                contextlib.closing(connection),
                contextlib.suppress(OSError, http.client.HTTPException),
            ):
                while True:
                    if not journal or journal[-1].answers:
                        journal.append(
                            Intent.numbered(
                                len(journal), self.tokens[client], self.tokens[client - 1]
                            )
                        )
                    if journal[-1].send(server.url, connection):
                        self.acknowledged.append(journal[-1])
                        if len(self.acknowledged) >= goal:
                            enough.set()

        with self.started() as server:
            self.tokens = self.tokens or [
                send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"]
                for _ in self.journals
            ]
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
        """Start it for the last time, have all answered, and return how many effects are lost and
        how many doubled.
        """
        with self.started() as server:
            assert all(
                intent.answers or intent.send(server.url)
                for journal in self.journals
                for intent in journal
            )
        with Wallet(self.dsn) as wallet:
            return count_lost_and_surplus(
                wallet, [intent for journal in self.journals for intent in journal]
            )


@pytest.mark.slow_on("postgres", "serializable")
@pytest.mark.parametrize(
    ("durable_dsn", "kills"),
    [
        ("file", 2),
        torture("file", 500),
        ("postgres", 2),
        torture("postgres", 50),
        ("serializable", 2),
        torture("serializable", 50),
    ],
    indirect=["durable_dsn"],
)
def test_kill_under_load_loses_nothing_that_was_answered(durable_dsn, kills, request, report):
    # The tests' own Postgres, since it is killed too.
    database = (
        request.getfixturevalue("postgres_server") if durable_dsn.startswith("postgres") else None
    )
    isolation = SERIALIZABLE if durable_dsn.endswith(SERIALIZABLE) else ""
    dsn = request.getfixturevalue("new_schema")(isolation, on=database) if database else durable_dsn
    crashes = Crashes(dsn, database=database)
    for number in range(kills):
        crashes.crash(("database", "session", "service")[number % 3] if database else "service")
    lost, doubled = crashes.finish()
    assert (crashes.lost, lost, doubled) == (0, 0, 0)
    after = {"the service": crashes.ready_s, "the database too": crashes.recovered_s}
    report(
        f"{kills} kills, {crashes.count} acknowledged, {crashes.lost + lost} lost, {doubled} doubled"
        + f", {crashes.sound} integrity checks ok" * (database is None)
        + "".join(
            f"; after a kill of {what} ready in {max(times):.2f} s at most, {statistics.median(times):.2f} s"
            f" at the median of {len(times)}"
            for what, times in after.items()
            if times
        )
    )
    if kills >= 50:
        assert crashes.count >= 100 * kills
        assert max(crashes.ready_s) <= 1


def test_control_a_service_that_answers_before_it_commits_loses_by_a_kill_what_it_answered(
    file_dsn,
):
    crashes = Crashes(file_dsn, program=("-c", LATE))
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
    pragmas = {
        name: file_wallet.database._writer.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("synchronous", "journal_mode", "fullfsync", "foreign_keys")
    }
    assert pragmas == {"synchronous": 2, "journal_mode": "wal", "fullfsync": 1, "foreign_keys": 1}


SYNCHRONOUS = """
import sys, wallet, wallet_cli
class Database(wallet.SQLiteDatabase):
    def _open_writer(self, create):
        connection = super()._open_writer(create)
        connection.execute("PRAGMA synchronous = {}")
        return connection
wallet.SQLiteDatabase, wallet.SQLITE_CHECKPOINT_PAGES = Database, 20
sys.exit(wallet_cli.main())
"""


class CutDisk:
    """What of the files in a trace is on the disk for sure, and what else a power cut may leave
    there.

    Of each write since a file's last sync it leaves all, nothing, or any sectors of 512 bytes. A
    file that was made or removed since the folder's last sync is there or not, whether its content
    was synced or not. No -shm is left.
    """

    def __init__(self):
        # What each has stood for since the folder's last sync: a file, or None where it was
        # removed.
        self.names = {}

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
                content[start:end] = data[start - offset : end - offset]
            start = end

    def leave(self, folder, chance, kept, torn):
        """Make the files that a power cut may leave, where such a share of what is not synced is
        kept, or torn.
        """
        for old in folder.iterdir():
            old.unlink()
        for name, versions in self.names.items():
            _, file = (
                versions[0] if not kept else versions[-1] if kept == 1 else chance.choice(versions)
            )
            if file is None:
                continue
            content = bytearray(file.synced)
            for _, *written in file.since:
                if chance.random() < kept:
                    self.change(content, *written)
                elif chance.random() < torn:
                    share = chance.random()
                    self.change(
                        content, *written, sectors=lambda share=share: chance.random() < share
                    )
            (folder / name).write_bytes(content)


def examine(folder, answered):
    """Open what a power cut left, as a restart does.

    Return how much of what was answered is missing.
    """
    with Wallet(f"sqlite:///{folder}/wallet.db") as wallet:
        check_books(wallet)
        accounts = wallet.database.read(lambda tx: tx("SELECT id FROM accounts"))
        rows = wallet.database.read(
            lambda tx: tx(
                "SELECT account_id, sequence, amount, balance, description FROM transactions"
            )
        )
    assert all(
        count == int(description.split()[0])
        for description, count in Counter(row[4] for row in rows).items()
    )
    found = {
        f"txn_{id[4:]}_{sequence}": (amount, balance) for id, sequence, amount, balance, _ in rows
    }
    found |= {id: (None, 0) for (id,) in accounts}
    return sum(found.get(id) != kept for id, kept in answered.items())


def replay(events, images, folder, chance):
    """Cut the power at so many moments, and right after each answer.

    Return how many, what was lost and what broke.
    """
    disk, answered, lost, broken = CutDisk(), {}, 0, []
    moments = Counter(chance.randrange(len(events)) for _ in range(images))
    for number, (position, kind, *arguments) in enumerate(events):
        cuts = [
            chance.choice([(0, 0), (1, 0), (chance.random(), chance.random())])
            for _ in range(moments[number])
        ]
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
@pytest.mark.parametrize(
    ("synchronous", "recordings", "images"),
    [
        ("FULL", 1, 60),
        pytest.param("NORMAL", 1, 30, marks=pytest.mark.slow),  # The control.
        pytest.param("FULL", 40, 500, marks=pytest.mark.torture),
        pytest.param("NORMAL", 4, 500, marks=pytest.mark.torture),
    ],
)
def test_power_cut_at_any_moment_loses_nothing_that_was_answered(
    tmp_path, synchronous, recordings, images, report
):
    program = (
        ("-c", SYNCHRONOUS.format(synchronous))
        if synchronous != "FULL"
        else limited(SQLITE_CHECKPOINT_PAGES=20)
    )
    left = tmp_path / "left"
    left.mkdir()
    counts, broken = Counter(), []
    for number in range(recordings):
        folder, chance = tmp_path / str(number), random.Random(number)
        (folder / "data").mkdir(parents=True)
        dsn = f"sqlite:///{folder}/data/wallet.db"
        events = record(
            dsn, folder, program, kills=[33 + number % 20] if synchronous == "FULL" else []
        )
        shutil.rmtree(folder)
        found, errors = replay(events, images, left, chance)
        counts, broken = counts + found + Counter(event[1] for event in events), broken + errors
        # A disk that says that it has synced the database, and has not, would lose some.
        unsynced = [event for event in events if event[1:3] != ("sync", "wallet.db")][
            : len(events) // 3
        ]
        lying, errors = replay(unsynced, 0, left, chance)
        assert lying["lost"] or errors
    report(
        f"{synchronous}: {counts['images']:,} power cuts among {counts['write']:,} writes, {counts['sync']:,} syncs"
        f" and {counts['answer']:,} answers: {counts['lost']:,} answers lost, {len(broken)} wallets broken"
    )
    assert (counts["lost"] > 0) == (synchronous != "FULL")
    assert broken == []


def test_write_that_waited_for_a_batch_that_failed_is_never_told_that_it_was_done(
    file_dsn, monkeypatch
):
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
        return subprocess.run(
            [sys.executable, "-c", WATCHER, str(tmp_path / "wallet.db")],
            check=True,
            timeout=60,
            capture_output=True,
            text=True,
            env=environment(),
        ).stdout

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
    assert (
        statements.count("COMMIT") == 2
    )  # The first is that of the write which kept the others waiting.
    assert wallet.account(ada.id).balance == 5


def test_commit_that_keeps_failing_is_answered_as_unknown_and_its_key_decides(file_wallet, caplog):
    ada, token = file_wallet.register("Ada")
    api = Client(create_app(file_wallet), token)
    with files_cannot_grow():
        answer = api.send(
            "POST", "/api/transactions/topup", {"amount": 5}, Idempotency_Key="k", status=503
        )
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
def small_disk(folder, careless=False):
    """Serve clients from a disk of 4 MB.

    Yield them, and a function that fills it for as long as its block runs.
    """
    mount = f'mount -t tmpfs -o size=4m wallet {folder} && exec "$@"'
    mounted = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    tried = subprocess.run([*mounted, "true"], capture_output=True, text=True, timeout=60)
    if tried.returncode:
        pytest.skip(f"this machine lets nobody mount: {tried.stderr.strip()}")
    # The log must not fill the disk by itself, as it would in service with a disk of less than some
    # 20 MB.
    program = f"import logging, sys, wallet, wallet_cli\nlogging.disable()\nwallet.SQLITE_CHECKPOINT_PAGES = 100{CARELESS}"
    program += f"{'wallet.SQLiteDatabase = Careless' if careless else ''}\nsys.exit(wallet_cli.main())"
    with served(
        "--dsn",
        f"sqlite:///{folder}/wallet.db",
        "--log-level",
        "error",
        program=("-c", program),
        under=mounted,
    ) as server:
        # SQLite would follow this link to the folder without the disk.
        inside = Path(f"/proc/{server.pid}/root{folder}")
        tokens = [
            send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"] for _ in range(4)
        ]
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


@pytest.mark.skipif(
    not shutil.which("unshare"), reason="a small disk of its own needs Linux and unshare"
)
@pytest.mark.parametrize("times", [1, torture(50)])
def test_full_disk_refuses_clearly_loses_nothing_and_is_got_over(tmp_path, times, report):
    reads, waits = 0, []
    with small_disk(tmp_path) as (load, filled):
        for _ in range(times):
            refused = len(load.open) + 20
            with filled():
                while len(load.open) < refused:
                    assert (
                        send(load.url, "GET", "/api/account", token=load.tokens[reads % 4])[0]
                        == 200
                    )
                    reads += 1
            waits.append(load.wait_for_more(count=1))
    assert load.check(f"sqlite:///{tmp_path}/copy-of-wallet.db") == 0
    report(
        f"full {times} times, {len(load.kept):,} answered, {len(load.open):,} refused {load.statuses}, {reads:,}"
        f" reads meanwhile, writing again after {max(waits):.2f} s at most"
    )
    assert max(waits) < (1 if times > 1 else 10)


@pytest.mark.skipif(
    not shutil.which("unshare"), reason="a small disk of its own needs Linux and unshare"
)
def test_control_a_wallet_that_takes_every_commit_for_done_loses_some_on_a_full_disk(tmp_path):
    with small_disk(tmp_path, careless=True) as (load, filled), filled():
        load.wait_for_more(150)
    assert load.check(f"sqlite:///{tmp_path}/copy-of-wallet.db") > 0


# Faults one at a time: each run of this makes one call of the system fail, and says what became of
# it.
FAULTY = (
    """
import contextlib, io, json, logging, mmap, os, sys, wallet, wallet_cli, wallet_server
from pathlib import Path
from wsgiref.util import setup_testing_defaults
"""
    + CARELESS
    + """
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

    wallet_cli._serve = work
    for _ in range(failing[call] - number):
        CALLS[call]()
    for name in "killed", "new":
        while len(starts) < 4 and (not starts or starts[-1][0] != name or starts[-1][1]):
            with contextlib.redirect_stderr(io.StringIO()) as told:
                code = wallet_cli.main(["--dsn", f"sqlite:///{folder}/{name}.db", "--port", "0"])
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
)

# The calls of the system by which SQLite uses a file, each with a number that is more than a run
# makes.
FAULTS = {
    "pwrite64": 360,
    "fdatasync": 100,
    "fsync": 100,
    "ftruncate": 25,
    "pread64": 250,
    "openat": 30,
    "mmap": 10,
    "unlink": 15,
}


@contextmanager
def faulty_disk(folder, error, calls, *careless):
    """Yield a function that uses wallets in a folder while the so-manieth call of a kind fails, and
    tells what came.
    """
    names = [
        f"{name}.db{end}" for name in ("killed", "new") for end in ("", "-wal", "-shm", "-journal")
    ]
    options = [
        option for name in ["", "burnt", "missing", *names] for option in ("-P", str(folder / name))
    ]
    options += [
        option
        for call in calls
        for option in ("-e", f"inject={call}:error={error}:when={FAULTS[call]}")
    ]
    command = strace("--seccomp-bpf", "-o", "/dev/null", "-e", f"trace={','.join(calls)}", *options)
    with subprocess.Popen(
        [*command, sys.executable, "-c", FAULTY, str(folder), json.dumps(FAULTS), *careless],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    ) as process:

        def run(call, number):
            print(call, number, file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield run


def judge(folder, outcome):
    """Assert that one fault did no harm, and that all went on at once.

    Return how many starts and requests failed.
    """
    failed_starts = [start for start in outcome["starts"] if start[1] != 0]
    assert all(
        code in (2, 75) and re.fullmatch("wallet: .+\n", told) for _, code, told in failed_starts
    ), failed_starts
    failed = [answer for answer in outcome["answers"] if answer[2] >= 300]
    assert all(status == 503 for _, _, status, _ in failed), failed
    assert len(failed_starts) + len(failed) <= outcome["faulted"], (failed_starts, failed)
    answered, lost = 0, 0
    for name, before in ("killed", 3), ("new", 0):
        done = [
            answer
            for start, method, status, answer in outcome["answers"]
            if method == "POST" and status == 201 and outcome["starts"][start][0] == name
        ]
        movements = [
            one
            for answer in done
            for one in answer.get("transactions", [answer])
            if "amount" in one
        ]
        with Wallet(f"sqlite:///{folder}/{name}.db") as wallet:
            check_books(wallet)
            rows = wallet.database.read(
                lambda tx: tx("SELECT account_id, sequence, amount, balance FROM transactions")
            )
        found = {
            f"txn_{id[4:]}_{sequence}": (amount, balance) for id, sequence, amount, balance in rows
        }
        lost += sum(found.get(one["id"]) != (one["amount"], one["balance"]) for one in movements)
        answered += len(movements)
        assert len(found) == before + len(movements) + sum(
            one["type"] == "transfer_out" for one in movements
        )
    assert (answered, lost) == (20, 0)
    return Counter(
        faults=outcome["faulted"],
        starts=len(failed_starts),
        requests=len(failed),
        answered=answered,
        lost=lost,
    )


def sweep(folder, error, numbers, *careless):
    """Let each of these calls fail, of a kind as many as there are.

    Return how many faults, starts and requests did.
    """
    counts = Counter()
    with faulty_disk(folder, error, numbers, *careless) as run:
        for call in numbers:
            for number in numbers[call]:
                outcome = run(call, number)
                counts += judge(folder, outcome)
                if not outcome["faulted"]:
                    break
    return counts


SOME_FAULTS = {
    "pwrite64": (60, 150, 250),
    "fdatasync": (20, 45),
    "ftruncate": (10,),
    "pread64": (50, 120),
}


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace: apt install strace")
def test_any_one_call_that_fails_is_503_at_most_and_all_goes_on_at_once(tmp_path):
    assert sweep(tmp_path, "EIO", SOME_FAULTS)["faults"] == sum(map(len, SOME_FAULTS.values()))


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace: apt install strace")
def test_control_a_wallet_that_takes_every_commit_for_done_loses_some_at_a_fault(tmp_path):
    with pytest.raises(AssertionError):
        sweep(tmp_path, "EIO", {"fdatasync": range(20, 40)}, "careless")


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace: apt install strace")
@pytest.mark.parametrize("error", [torture("EIO"), torture("ENOSPC")])
@pytest.mark.parametrize("call", FAULTS)
def test_every_call_that_may_fail_does_so_once_and_no_harm_is_done(tmp_path, call, error, report):
    counts = sweep(tmp_path, error, {call: range(1, FAULTS[call])})
    assert counts["faults"] < FAULTS[call] - 1  # There were no more.
    report(
        f"{counts['faults']:,} faults, one at a time: {counts['starts']} starts and {counts['requests']} requests"
        f" refused as they should be, {counts['answered']:,} movements answered, {counts['lost']} lost"
    )


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
        while not wallet.database._line.is_closed:
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


def test_file_that_was_removed_or_replaced_is_noticed_and_does_not_come_back_empty(
    file_dsn, tmp_path
):
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
        assert (
            wallet.database.read(lambda _: wallet.account(ada.id)) == ada
        )  # The second reader is opened now.
        wallet.database.ping()


@pytest.mark.parametrize(
    "name", ["a b.db", "a#b.db", "a%20b.db", "ä.db", "a&mode=memory.db", "file:x.db"]
)
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
import os, sys, wallet, wallet_cli
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
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], check=True, env=environment(), timeout=60
    )


def test_interrupted_write_that_waits_is_never_done(sqlite_wallet):
    wallet, (ada, _) = sqlite_wallet, sqlite_wallet.register("Ada")
    release, interrupted = hold_the_writer(wallet), threading.Event()

    def interrupt():
        wait_for_queue(wallet, 1)
        # Python does not hear a signal that comes as it begins to wait for a lock.
        while not interrupted.wait(0.05):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def once(*_):
        if not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    before = signal.signal(signal.SIGINT, once)
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


@pytest.mark.parametrize("moment", ["_appoint_leader", "_take", "_work"])
def test_interrupt_before_anything_is_done_leaves_nobody_waiting(wallet, monkeypatch, moment):
    ada, _ = wallet.register("Ada")
    plain, calls = getattr(wallet.database._line, moment), itertools.count()

    def interrupted(*arguments):
        if next(calls) == 0:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(wallet.database._line, moment, interrupted)
    with pytest.raises(KeyboardInterrupt):
        wallet.topup(ada.id, 100)
    assert wallet.topup(ada.id, 1).balance == 1


def test_interrupt_at_any_step_of_who_leads_wedges_nothing(wallet):
    """Each place at which Python looks for Ctrl-C is tried, while another write waits."""
    ada, _ = wallet.register("Ada")
    places = ("CALL", "JUMP_BACKWARD", "JUMP_ABSOLUTE", "RESUME")
    functions = ("stand", "_hand_over", "_appoint_leader", "_take", "_commit", "_gather")
    for number in itertools.count():
        steps, opcodes = itertools.count(), {}

        def trace(frame, event, _, number=number, steps=steps, opcodes=opcodes):
            frame.f_trace_opcodes = True
            if frame.f_code.co_name in functions and event == "opcode":
                before = opcodes.get(frame, "")
                opcodes[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
                if before.startswith(places) and next(steps) == number:
                    raise KeyboardInterrupt
            return trace

        def interrupted(trace=trace):
            sys.settrace(trace)
            try:
                return wallet.topup(ada.id, 1)
            finally:
                sys.settrace(None)

        release = hold_the_line(wallet)
        with ThreadPoolExecutor(2) as threads:
            first = threads.submit(interrupted)
            while not wallet.database._line.waiting and not first.done():
                time.sleep(0.001)
            other = threads.submit(wallet.topup, ada.id, 1)
            wait_for_queue(wallet, 1 if first.done() else 2)
            release()
            assert isinstance(other.exception(timeout=30), (OutcomeUnknown, type(None)))
        if next(steps) <= number:  # There are no more.
            assert first.result().amount == 1
            assert number > 20
            break
        assert isinstance(first.exception(), KeyboardInterrupt)


def test_interrupt_of_who_commits_for_others_leaves_none_of_them_waiting(wallet, monkeypatch):
    ada, _ = wallet.register("Ada")

    def interrupted(batch):
        raise KeyboardInterrupt

    release = hold_the_line(wallet)
    with ThreadPoolExecutor(2) as threads:
        waiting = []
        for _ in range(2):
            waiting.append(threads.submit(wallet.topup, ada.id, 5))
            wait_for_queue(wallet, len(waiting))
        monkeypatch.setattr(wallet.database._line, "_work", interrupted)
        release()
        assert {type(one.exception(timeout=30)) for one in waiting} == {
            KeyboardInterrupt,
            OutcomeUnknown,
        }
    monkeypatch.undo()
    assert wallet.topup(ada.id, 1).balance == 1


# Opening a database ###############################################################################


@pytest.mark.parametrize(
    ("bad_dsn", "message"),
    [
        ("wallet.db", "a DSN looks like sqlite:///wallet.db"),
        ("", "a DSN looks"),
        ("sqlite:wallet.db", "a DSN looks"),
        ("mysql://u:secret@host/db", "unknown kind of DSN, mysql://; known are"),
        ("sqlite://wallet.db", "three slashes"),
        ("sqlite:///", "three slashes"),
        ("sqlite:///x?mode=ro", "without parameters"),
        ("sqlite:////no/such/x", "No such"),
        ("sqlite:////dev", "unable to open"),
        ("sqlite:////proc/wallet.db", "cannot open"),
        ("sqlite:///\0", "the DSN has a control character"),
    ],
)
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
    for name, content in (
        ("notes.db", b"These are notes, and no database.\n" * 100),
        ("other.db", None),
    ):
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
        wallet.database.write(lambda tx: tx("UPDATE wallet SET schema_version = 99"))
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
        (tmp_path / "wallet.db").write_bytes(
            content[: page * number] + b"\xff" * page + content[page * (number + 1) :]
        )
        with contextlib.suppress(ConfigurationError), Wallet(file_dsn) as wallet:
            for call in (
                lambda wallet: wallet.topup(ada.id, 1),
                lambda wallet: wallet.account(ada.id),
            ):
                with contextlib.suppress(Unavailable):
                    call(wallet)
    (tmp_path / "wallet.db").write_bytes(content[:page] + b"\xff" * (len(content) - page))
    done = command("--dsn", file_dsn, "--port", "0")
    assert done.returncode == 2
    assert re.fullmatch(r"wallet: cannot [^\n]+malformed[^\n]*\n", done.stderr)


def test_missing_schema_is_refused(monkeypatch, tmp_path, file_dsn, capsys):
    Wallet(file_dsn).close()
    monkeypatch.setattr(wallet_module, "__file__", str(tmp_path / "wallet.py"))
    assert wallet_cli.main(["verify", "--dsn", file_dsn]) == 2
    assert capsys.readouterr().err == "wallet: checks.sql is not installed beside wallet.py.\n"
    with pytest.raises(ConfigurationError, match=r"cannot use memory.*schema\.sql"):
        Wallet()


def test_currency_is_fixed_when_the_database_is_made(durable_dsn):
    with Wallet(durable_dsn, currency="JPY") as wallet:
        assert wallet.register("Ada")[0].currency == "JPY"
    with Wallet(durable_dsn) as wallet:
        assert wallet.currency == "JPY"
    with pytest.raises(ConfigurationError, match="currency is JPY/0"):
        Wallet(durable_dsn, currency="USD")
    for wrong in ("", "usd", "USD\n", "US", "USDT", "USD/", "USD/10", "USD/-1", "/2"):
        with pytest.raises(ConfigurationError, match="three capital letters"):
            Wallet(currency=wrong)


def test_currency_has_the_decimals_of_iso_4217():
    assert len(Currency) > 170
    for currency in Currency:
        code, digits = currency.code, currency.exponent
        if digits is None:  # As of gold.
            with pytest.raises(ConfigurationError, match=f"how many decimals it has, as.* {code}/0"):
                Wallet(currency=code)
            digits = 6
        else:
            with Wallet(currency=code) as wallet:
                assert (wallet.currency, wallet.currency_digits) == (code, digits)
            with pytest.raises(ConfigurationError, match=f"{code} has {digits} decimals in ISO 4217"):
                Wallet(currency=f"{code}/{digits + 1}")
        with Wallet(currency=f"{code}/{digits}") as wallet:
            assert (wallet.currency, wallet.currency_digits) == (code, digits)
    assert {code: Currency(code).exponent for code in ("HUF", "JPY", "KWD", "CLF")} == {
        "HUF": 2,
        "JPY": 0,
        "KWD": 3,
        "CLF": 4,
    }


def test_unit_of_ones_own_says_its_decimals_once(durable_dsn):
    with pytest.raises(ConfigurationError, match="CRD is not in ISO 4217: say how many decimals"):
        Wallet(durable_dsn, currency="CRD")
    with Wallet(durable_dsn, currency="CRD/0") as wallet:
        account, _ = wallet.register("Ada")
        assert (account.currency, account.currency_digits) == ("CRD", 0)
    for same in (None, "CRD", "CRD/0"):
        with Wallet(durable_dsn, currency=same) as wallet:
            assert wallet.account(account.id) == account
    for other in ("CRD/2", "CRE/0", "USD"):
        with pytest.raises(ConfigurationError, match="currency is CRD/0, and cannot be changed"):
            Wallet(durable_dsn, currency=other)


def test_sqlite_too_old_is_refused(monkeypatch):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    with pytest.raises(ConfigurationError, match=r"SQLite 3\.35 or newer is needed"):
        Wallet()


def test_new_file_that_another_process_is_opening_is_waited_for(file_dsn, monkeypatch):
    with contextlib.closing(
        sqlite3.connect(file_dsn[10:], check_same_thread=False, isolation_level=None)
    ) as other:
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
        with pytest.raises(ConfigurationError, match="another process has it open"):
            Wallet(file_dsn)


@pytest.mark.slow_on("postgres")
def test_four_processes_may_open_a_new_database_at_once_and_all_write(durable_dsn):
    program = f"""
import sys, wallet, wallet_cli
sys.stdin.readline()
with wallet.Wallet({durable_dsn!r}) as w:
    ada, _ = w.register("Ada")
    for _ in range(50): w.topup(ada.id, 1)
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
        )
        for _ in range(4)
    ]
    for process in processes:
        process.stdin.write(b"go\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=60)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors
    with Wallet(durable_dsn) as wallet:
        check_books(wallet)
        assert wallet.database.read(lambda tx: tx("SELECT balance FROM accounts")) == [(50,)] * 4


def open_while_another_makes_it(dsn, step, monkeypatch):
    """Open a new wallet, which another opener makes just before `step`, a statement of the first.

    Return how many statements the first one ran.
    """
    steps, connect = [], wallet_module.SQLiteDatabase.connect

    def see(statement):
        steps.append(statement)
        if len(steps) == step:
            changed.undo()
            with contextlib.suppress(ConfigurationError):  # The first one may hold the lock.
                Wallet(dsn).close()

    def connect_and_see(database):
        connection = connect(database)
        connection.set_trace_callback(see)
        return connection

    with monkeypatch.context() as changed:
        changed.setattr(wallet_module.SQLiteDatabase, "connect", connect_and_see)
        with Wallet(dsn) as wallet:
            wallet.register("Ada")
            check_books(wallet)
            return len(steps)


def test_another_process_may_make_the_wallet_at_any_step_of_an_opening(tmp_path, monkeypatch):
    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0.05)
    dsn, steps, made = "sqlite:///{}/{}.db", 1, 0
    while made < steps:
        made += 1
        steps = open_while_another_makes_it(dsn.format(tmp_path, made), made, monkeypatch)
    assert steps > 20
