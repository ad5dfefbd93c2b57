"""Runs that are long in full: snapshots, keys across restarts, clocks, secrets, the model."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import itertools
import os
import random
import re
import signal
import sqlite3
import subprocess
import threading
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

import wallet as wallet_module
from tests.support import (
    BODIES,
    BUGGY,
    DAY_S,
    FAKETIME,
    MODULE,
    POST,
    ROUTES,
    SERIALIZABLE,
    STRICT,
    Intent,
    check_books,
    connect,
    count_lost_and_surplus,
    find_secrets,
    forms_of,
    kill_service,
    path_of,
    raw_exchange,
    send,
    served,
    together,
    torture,
    workers_of,
)
from wallet import InsufficientFunds, OutcomeUnknown, Unavailable, Wallet

# Promise 3: one idempotency key has at most one effect ############################################

FORGETFUL = """
import os, sys, wallet, wallet_cli
# Knows a key only where it came first, as who keeps keys in memory does.
parse_key = wallet._parse_key
wallet._parse_key = lambda key: f"{parse_key(key)}-{os.getpid()}"
sys.exit(wallet_cli.main())
"""


class Pair:
    """Two processes that serve one database, one by each server, of which either may be restarted."""

    def __init__(self, dsn, program=MODULE):
        self.dsn, self.program = dsn, program
        self.stacks = [contextlib.ExitStack() for _ in range(2)]
        self.services = [self.start(number) for number in range(2)]
        self.unanswered = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for stack in self.stacks:
            stack.close()

    def start(self, number):
        arguments = "--dsn", self.dsn, "--log-level", "error"
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
        """Send it to one of the two, then to the other and so on, until it is answered.

        Return by whom it was.
        """
        for attempt in range(first, first + 10_000):
            url = self.services[attempt % 2].url
            connection = connections.setdefault(
                url, http.client.HTTPConnection(urlsplit(url).netloc, timeout=100)
            )
            try:
                if intent.send(url, connection):
                    return url
            except (OSError, http.client.HTTPException):
                connection.close()
            self.unanswered.append(intent)
        raise AssertionError("neither of them answers")

    def send_32_times_at_once(self, intents, restarts=0):
        """Send each from 32 clients at once, and restart the two by turns, so often in all, each
        time in its midst.
        """
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
        """Send each once more, and once with another amount.

        Return how many of the latter were refused.
        """
        refused, connections = 0, {}
        for number, intent in enumerate(intents):
            url = self.send(intent, number, connections)
            status, _, document = send(
                url,
                "POST",
                intent.path,
                {**intent.body, "amount": 5},
                intent.token,
                connections[url],
                Idempotency_Key=intent.key,
            )
            refused += (status, document["code"]) == (422, "idempotency_key_reused")
        for connection in connections.values():
            connection.close()
        return refused


def make_intents(url, count):
    """Return intents of 4 new accounts."""
    tokens = [send(url, "POST", "/api/register", {"name": "Ada"})[2]["token"] for _ in range(4)]
    return [
        Intent.numbered(number, tokens[number // 4 % 4], tokens[number // 4 % 4 - 1])
        for number in range(count)
    ]


@pytest.mark.slow_on("postgres")
@pytest.mark.parametrize("durable_dsn", ["file", "postgres", STRICT], indirect=True)
@pytest.mark.parametrize(("keys", "restarts"), [(4, 1), torture(1000, 40)])
def test_32_sends_of_each_key_to_two_processes_across_restarts_have_one_effect_and_equal_answers(
    durable_dsn, keys, restarts, report
):
    with Pair(durable_dsn) as pair:
        intents = make_intents(pair.services[0].url, keys)
        pair.send_32_times_at_once(intents, restarts)
        refused = pair.send_again_and_changed(intents)
    with Wallet(durable_dsn) as wallet:
        lost, doubled = count_lost_and_surplus(wallet, intents)
    unequal = sum(len({document for document, _ in intent.answers}) > 1 for intent in intents)
    report(
        f"{keys} keys, {sum(len(intent.answers) for intent in intents)} answers, {len(pair.unanswered)} sends with"
        f" none, {restarts} restarts: {keys - lost + doubled} effects, {unequal} keys with unequal answers,"
        f" {refused} changed requests refused"
    )
    assert (lost, doubled, unequal, refused) == (0, 0, 0, keys)
    assert {len(intent.answers) for intent in intents} == {33}
    assert max(sum(not repeated for _, repeated in intent.answers) for intent in intents) == 1


def test_control_a_service_that_keeps_keys_to_itself_has_two_effects_of_one(file_dsn):
    with Pair(file_dsn, program=("-c", FORGETFUL)) as pair:
        intents = make_intents(pair.services[0].url, 1)
        pair.send_32_times_at_once(intents)
        refused = pair.send_again_and_changed(intents)
    with Wallet(file_dsn) as wallet:
        assert (
            count_lost_and_surplus(wallet, intents)[1] == 2
        )  # Neither is under the key that was sent.
    assert len({document for document, _ in intents[0].answers}) == 2
    assert refused == 1


# Refunds, transfers, holds and batches ############################################################


class FaultyConnection:
    """A connection of which every tenth COMMIT or so fails before it happens, and as many after it
    did.
    """

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
    """Reads both balances, and writes what it makes of them:

    how money is made and lost elsewhere.
    """

    def transfer(self, account_id, to, amount, *, key):
        changes = [
            (account_id, "transfer_out", to, -amount),
            (to, "transfer_in", account_id, amount),
        ]
        balances = {one: self.account(one).balance for one in (account_id, to)}
        if balances[account_id] < amount:
            raise InsufficientFunds()

        def write(tx):
            if tx(
                "SELECT 1 FROM transactions WHERE account_id = ? AND idempotency_key = ?",
                account_id,
                key,
            ):
                return
            for one, type, other, change in sorted(changes):
                ((sequence,),) = tx(
                    "UPDATE accounts SET balance = ?, last_sequence = last_sequence + 1 WHERE id = ?"
                    " RETURNING last_sequence",
                    balances[one] + change,
                    one,
                )
                tx(
                    "INSERT INTO transactions VALUES (?, ?, ?, ?, ?, NULL, NULL, ?, ?, ?, 0)",
                    one,
                    sequence,
                    type,
                    amount,
                    balances[one] + change,
                    other,
                    key,
                    "f" * 64,
                )

        self.database.write(write)


class Bank:
    """Jepsen's bank test: threads that move money between a few accounts, and look at all of them
    at once.

    https://github.com/jepsen-io/jepsen/blob/main/jepsen/src/jepsen/tests/bank.clj
    """

    SNAPSHOT = """SELECT a.id, a.balance, a.last_sequence, t.balance FROM accounts a
                  JOIN transactions t ON t.account_id = a.id AND t.sequence = a.last_sequence
                  WHERE a.name LIKE 'No.%' ORDER BY 1"""

    def __init__(self, wallet, *others):
        self.wallet, self.wallets = wallet, [wallet, *others]
        self.accounts = [wallet.register(f"No. {number}")[0].id for number in range(8)]
        for account in self.accounts:
            wallet.topup(account, 100)
        # Those who wait for the same till share a transaction, where they can.
        self.tills = [wallet.register(f"Till {number}")[0].id for number in range(3)]
        self.done, self.taken, self.unavailable = [], [], threading.Event()
        self.counts, self.anomalies, self.lock = Counter(), Counter(), threading.Lock()

    def run(self, snapshots, fault):
        """Work with 16 threads, for so many snapshots.

        `fault` is called now and then, by any of them.
        """
        self.fault = fault
        assert (
            together(*[partial(self.work, number, snapshots // 16) for number in range(16)])
            == [None] * 16
        )

    def work(self, number, snapshots):
        """Transfer, look at all accounts four times, and so on."""
        wallet = self.wallets[number % len(self.wallets)]
        rng, counts, last_seen, readers = (
            random.Random(number),
            Counter(),
            {},
            [wallet.database.read],
        )
        with contextlib.ExitStack() as stack:
            if path := vars(wallet.database).get("path"):
                # The second way to look: a connection that knows nothing of the wallet.
                plain = stack.enter_context(
                    contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True))
                )
                readers.append(lambda function: function(lambda sql: plain.execute(sql).fetchall()))
            while counts["snapshots"] < snapshots:
                if counts["snapshots"] % 256 == 16 * number % 256:
                    self.fault()
                self.transfer(wallet, rng, counts, f"{number} {counts['transfers']}")
                for kind in ("topup", "charge"):
                    self.take(wallet, kind, rng, counts, f"{number} {counts['taken']} {kind}")
                for read in readers * (4 // len(readers)):
                    with contextlib.suppress(Unavailable):
                        self.look(read(lambda tx: tx(self.SNAPSHOT)), last_seen)
                        counts["snapshots"] += 1
        with self.lock:
            self.counts += counts

    def transfer(self, wallet, rng, counts, key):
        sender, receiver = rng.sample(self.accounts, 2)
        amount, counts["transfers"] = rng.randint(1, 150), counts["transfers"] + 1
        self.insist(
            counts,
            lambda: wallet.transfer(sender, receiver, amount, key=key),
            lambda: self.done.append((sender, key, amount)),
        )

    def take(self, wallet, kind, rng, counts, key):
        till, amount, counts["taken"] = rng.choice(self.tills), rng.randint(1, 9), counts["taken"] + 1
        self.insist(
            counts,
            lambda: getattr(wallet, kind)(till, amount, key=key),
            lambda: self.taken.append((till, key, amount)),
        )

    def insist(self, counts, call, note):
        """Ask until it is done or refused."""
        while True:
            try:
                call()
                note()
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
        sql = """SELECT account_id, idempotency_key, amount FROM transactions
                 WHERE type IN ('topup', 'charge') AND idempotency_key LIKE '% % %'"""
        assert sorted(self.wallet.database.read(lambda tx: tx(sql))) == sorted(self.taken)
        check_books(self.wallet)


@pytest.mark.slow_on("CarelessBank", "serializable")
@pytest.mark.parametrize("snapshots", [480, torture(100_000)])
@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        ("file", Wallet),
        ("postgres", Wallet),
        ("serializable", Wallet),
        ("file", CarelessBank),
        ("postgres", CarelessBank),
    ],
)
def test_transfers_conserve_the_total_in_every_snapshot_whatever_fails(
    request, engine, kind, snapshots, report, monkeypatch
):
    faults, fault_runs = Counter(), threading.Lock()
    if engine == "file":
        server, dsn = None, request.getfixturevalue("file_dsn")
        monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0.05)
    else:
        server = request.getfixturevalue("postgres_server")
        dsn = request.getfixturevalue("new_schema")(
            SERIALIZABLE if engine == "serializable" else "", on=server
        )
        name = re.search(r"application_name=(\w+)", dsn)[1]

    def terminate():
        sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s"
        faults["sessions terminated"] += len(server.query(sql, name))
        if faults["restarts"] < faults["sessions terminated"] // 100:
            faults["restarts"] += 1
            server.restart("immediate")

    def lock():
        with contextlib.closing(
            sqlite3.connect(bank.wallet.database.path, isolation_level=None)
        ) as other:
            bank.unavailable.clear()
            with contextlib.suppress(
                sqlite3.OperationalError
            ):  # The wallet's threads may have it all the time.
                other.execute("BEGIN IMMEDIATE")
                faults["locks"] += 1
                bank.unavailable.wait(timeout=1)

    def fault():
        if fault_runs.acquire(blocking=False):
            try:
                (terminate if server else lock)()
            finally:
                fault_runs.release()

    with contextlib.ExitStack() as stack:
        # Two processes, as it were, where there may be several.
        wallet, *others = (
            stack.enter_context(kind(dsn, connections=8)) for _ in range(2 if server else 1)
        )
        bank = Bank(wallet, *others)
        if not server:
            wallet.database._writer = FaultyConnection(wallet.database._writer)
        bank.run(snapshots if kind is Wallet else 480, fault)
        if not server:
            faults["failed commits"] = wallet.database._writer.failed
        if kind is CarelessBank:
            assert bank.anomalies["total"] > 0
            return
        bank.check()
        if server:
            sql = """SELECT count(*), count(DISTINCT CAST(t.xmin AS TEXT)) FROM transactions t
                     JOIN accounts ON id = account_id WHERE name LIKE 'Till %'"""
            ((entries, commits),) = wallet.database.read(lambda tx: tx(sql))
            faults["movements that shared a transaction"] = entries - commits
            assert faults["sessions terminated"] > 0
            assert entries > commits
    counts = bank.counts
    assert counts["snapshots"] >= snapshots
    assert counts["refused"] >= 0.2 * counts["transfers"]
    report(
        f"0 anomalies in {counts['snapshots']:,} snapshots, {counts['transfers']:,} transfers, {counts['refused']:,}"
        f" of them refused for funds; faults: {dict(faults)}; told unavailable {counts['unavailable']:,} times and"
        f" unknown {counts['unknown']:,} times"
    )


# While it leaves the monotonic clock alone, as who sets the clock does, libfaketime lets Python's
# sleep fail.
AWAKE = "import select, sys, time; time.sleep = lambda seconds: select.select((), (), (), seconds); import wallet, wallet_cli\n"

RAW_CLOCK = """
class RawBooks(wallet._Books):
    # Stamps with what the clock says, whatever it said before.
    def post(self, entry, stamp):
        self._account(entry.account_id).updated_at_us = 0
        return super().post(entry, stamp)
wallet._Books = RawBooks
"""


class JumpingClock:
    """The system clock of one server, which it lets jump, and what must hold of its holds at every
    moment.
    """

    def __init__(self, folder):
        self.file = folder / "offset"
        # The last of them lets threads wait for each other by the clock that is left alone too.
        self.settings = {
            "LD_PRELOAD": str(FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
        }
        self.set(0)

    def set(self, offset_s):
        new = self.file.with_suffix(".new")
        new.write_text(f"{offset_s:+d}")
        new.replace(self.file)
        self.offset_s = offset_s

    def check(self, url, account, hold):
        """Assert that the server has this time, and that it says of a hold what its stored time
        says.
        """
        shown = send(url, "POST", "/api/register", {"name": "What time is it?"})[2]["created_at"]
        told = datetime.fromisoformat(shown.replace("Z", "+00:00"))  # Python 3.10 takes no Z.
        behind = datetime.now(timezone.utc) + timedelta(seconds=self.offset_s) - told
        assert abs(behind) < timedelta(hours=1)
        expired = shown >= hold["expires_at"]  # Hours lie between them.
        found = send(url, "GET", f"/api/holds/{hold['id']}", token=account["token"])[2]
        assert (found["status"], found["expires_at"]) == (
            "expired" if expired else "active",
            hold["expires_at"],
        )
        available = send(url, "GET", "/api/account", token=account["token"])[2]["available"]
        assert available == (100 if expired else 40)
        status, _, refused = send(
            url, "POST", "/api/transactions/charge", {"amount": available + 1}, account["token"]
        )
        assert (status, refused["available"]) == (402, available)
        for type in ("topup", "charge"):  # At every time there is an entry.
            assert (
                send(url, "POST", f"/api/transactions/{type}", {"amount": 1}, account["token"])[0]
                == 201
            )
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
        holds = [
            post("holds", amount=rng.randint(1, 30), expires_in_s=hours * 3600)
            for hours in (1, 12, 36)
        ]
        post("transactions/charge", amount=rng.randint(1, 60))
        post("transactions/transfer", to=tokens[number - 1][0], amount=rng.randint(1, 30))
        for hold, end in zip(holds, rng.sample(("capture", "release", None), 3), strict=True):
            if end and "id" in hold:
                post(f"holds/{hold['id']}/{end}")
    connection.close()
    return answers


def check_pages(wallet, rng):
    """Assert that a history from and until a time is what the times in it say."""
    for (account,) in wallet.database.read(
        lambda tx: tx("SELECT id FROM accounts WHERE balance > 0")
    ):
        history = list(wallet.statement(account))
        for _ in range(5):
            time = rng.choice(history).created_at
            assert list(wallet.statement(account, since=time)) == [
                one for one in history if one.created_at >= time
            ]
            assert list(wallet.statement(account, until=time)) == [
                one for one in history if one.created_at < time
            ]


@pytest.mark.slow
@pytest.mark.skipif(not FAKETIME, reason="needs faketime: apt install faketime")
@pytest.mark.parametrize("jumps", [4, torture(1000)])
@pytest.mark.parametrize(
    ("durable_dsn", "change"),
    [
        ("file", ""),
        ("postgres", ""),
        ("file", RAW_CLOCK),
    ],
    ids=["file", "postgres", "control"],
    indirect=["durable_dsn"],
)
def test_clock_that_jumps_by_a_day_under_load_breaks_nothing(
    durable_dsn, change, jumps, tmp_path, report
):
    clock, rng, stopped = JumpingClock(tmp_path), random.Random(17), threading.Event()
    program = "-c", f"{AWAKE}{change}\nsys.exit(wallet_cli.main())"
    with (
        served(
            "--dsn", durable_dsn, "--log-level", "error", program=program, **clock.settings
        ) as server,
        ThreadPoolExecutor(4) as threads,
        contextlib.ExitStack() as stack,
    ):
        url = server.url
        made = [send(url, "POST", "/api/register", {"name": "Ada"})[2] for _ in range(5)]
        token = made[4]["token"]
        send(url, "POST", "/api/transactions/topup", {"amount": 100}, token)
        held = {"amount": 60, "expires_in_s": 12 * 3600}
        hold = send(url, "POST", "/api/holds", held, token)[2]
        # Neither an idle connection nor one that is about to send its body has waited for a day.
        idle = stack.enter_context(
            contextlib.closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=30))
        )
        send(url, "GET", "/livez", connection=idle)
        idle.auto_open = False
        tokens = [(one["id"], one["token"]) for one in made[:4]]
        futures = [
            threads.submit(spend_and_hold, url, tokens, number, stopped) for number in range(4)
        ]
        try:
            expired = []
            for jump in range(jumps):
                with connect(url) as half:
                    half.sendall(POST + b"Connection: close\r\nContent-Length: 15\r\n\r\n")
                    assert send(url, "GET", "/livez", connection=idle)[0] == 200
                    clock.set(
                        rng.choice(
                            [offset for offset in (-DAY_S, 0, DAY_S) if offset != clock.offset_s]
                        )
                        if jump > 1
                        else (DAY_S, -DAY_S)[jump]
                    )
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
    report(
        f"0 violations in {entries:,} entries, {jumps} jumps of a day or two, {sum(answers.values()):,} answers"
        f" {dict(answers)}, a hold was expired after {sum(expired)} jumps and active after the others"
    )


# Promise 5: nobody sees or moves another account's money ##########################################


def mistreated(secret, authorization):
    """Return requests of someone who puts a secret wherever it does not belong, but not into what
    is kept.
    """
    encoded, name = "".join(f"%{byte:02X}" for byte in secret.encode()), secret.encode()
    end = f"Connection: close\r\nAuthorization: Bearer {authorization}\r\n".encode()
    post = (
        b"POST /api/transactions/charge HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        + end
    )
    for path in (
        secret,
        f"{secret}/x",
        f"api/{secret}",
        f"api/transactions/{secret}",
        f"api/account?token={secret}",
        f"api/account?{secret}",
        f"api/transactions?cursor={secret}",
        encoded,
        f"api?{encoded}",
        f"%ff{secret}",
        f"a/{secret.upper()}/{secret.lower()}",
        "x" * 190 + secret,
    ):
        yield b"GET /" + path.encode() + b" HTTP/1.1\r\nHost: x\r\n" + end + b"\r\n"
    for line in (
        name + b": x",
        b"X: " + name,
        b"Cookie: token=" + name,
        b"Host: " + name,
        b"Upgrade: " + name,
        name,
        b"Referer: http://x/" + name,
        b"X-Request-Id: " + name,
        b"Content-Length: " + name,
        b"Idempotency-Key: \xff" + name,
        b"Transfer-Encoding: " + name,
        b"X: " + name + b"x" * 20_000,
        b"Authorization: Basic " + name,
    ):
        yield b"GET /api/account HTTP/1.1\r\nHost: x\r\n" + line + b"\r\n" + end + b"\r\n"
    for body in (
        name,
        b'{"amount": ' + name,
        b'{"amount": "' + name + b'"}',
        b'{"' + name + b'": 1}',
        b'{"amount": 1, "metadata": {"a": {"' + name + b'": 1}}}',
        b'["' + name + b'"]',
        b'"' + name,
        b'{"' + name + b'": 1, "' + name + b'": 1}',
        b"\xff" + name,
        b'{"amount": ' + name + b"}",
    ):
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


LEAKY = """
wallet._hash_token = lambda token: token[:64].ljust(64, ".")
wallet._hide_tokens = str
"""


@pytest.mark.slow_on("postgres", "control")
@pytest.mark.parametrize(
    ("durable_dsn", "change"),
    [("file", ""), ("postgres", ""), ("file", LEAKY)],
    ids=["file", "postgres", "control"],
    indirect=["durable_dsn"],
)
def test_secrets_are_found_nowhere_but_in_the_answer_that_shows_one(
    durable_dsn, change, request, tmp_path, report
):
    issuer, password, answers = os.urandom(32).hex(), uuid.uuid4().hex, []
    settings = {"WALLET_ISSUER_TOKEN": issuer, "WALLET_LOG_LEVEL": "debug", "WALLET_METRICS": "1"}
    if durable_dsn.startswith("postgres"):
        postgres_server = request.getfixturevalue("postgres_server")
        durable_dsn, role = (
            request.getfixturevalue("new_schema")(on=postgres_server),
            f"wallet_{uuid.uuid4().hex}",
        )
        schema = durable_dsn.partition("%3D")[2]
        postgres_server.query(f"CREATE ROLE {role} LOGIN PASSWORD '{password}'")
        postgres_server.query(f"GRANT ALL ON SCHEMA {schema} TO {role}")
        durable_dsn = durable_dsn.replace("postgres@", f"{role}:{password}@")
    arguments = (
        ["--issuer-token", issuer] if change else []
    )  # Where all processes of the machine can see it.
    program = "-c", f"{BUGGY}{change}\nsys.exit(wallet_cli.main())"
    with (
        open(tmp_path / "log", "wb") as log,
        served(  # A pipe would be full before it is read.
            *arguments, program=program, stderr=log, WALLET_DSN=durable_dsn, **settings
        ) as server,
    ):
        assert server.banner.endswith("Only the issuer's token makes and fills accounts.\n")
        made = send(server.url, "POST", "/api/register", {"name": "Ada in the file"}, issuer)[2]
        replaced, id = made["token"], made["id"]
        topup = f"/api/accounts/{id}/transactions/topup"
        assert send(server.url, "POST", topup, {"amount": 100}, issuer)[0] == 201
        token = send(server.url, "POST", "/api/account/token", {}, replaced)[2]["token"]
        for name, who in itertools.product(ROUTES, (token, replaced, issuer)):
            method, rule = name.split()
            if name not in ("POST /api/register", "POST /api/account/token") or who == replaced:
                body = BODIES.get(rule.split("/")[-1], {}) if method == "POST" else None
                answers.append(send(server.url, method, path_of(rule), body, who))
        answers.append(send(server.url, "GET", f"/api/account/balance?at={token}", token=token))
        assert answers[-1][0] == 500
        with contextlib.ExitStack() as locked:
            if durable_dsn.startswith("sqlite"):
                other = locked.enter_context(
                    contextlib.closing(sqlite3.connect(tmp_path / "wallet.db"))
                )
                other.execute("BEGIN IMMEDIATE")
            else:
                other = locked.enter_context(psycopg.connect(postgres_server.dsn))
                other.execute(f"LOCK TABLE {schema}.accounts")
            answers.append(
                send(server.url, "POST", "/api/transactions/charge", {"amount": 1}, token)
            )
            assert answers[-1][0] == 503
        secrets = {
            "token": token[20:52],
            "replaced token": replaced[20:52],
            "issuer": issuer,
            "password": password,
        }
        raw = [
            raw_exchange(server.url, one)
            for secret in (token, replaced, issuer)
            for one in mistreated(secret, token)
        ]
        assert {answer[9:12] for answer in raw} <= {
            b"200",
            b"400",
            b"401",
            b"404",
            b"405",
            b"415",
            b"422",
            b"431",
        }
        places = {
            "answers": repr(answers).encode() + b"\n".join(raw),
            "process list": process_list(),
            "banner": server.banner.encode(),
        }
        for process in workers_of(server):
            os.kill(process, signal.SIGKILL)
        server.communicate(timeout=30)
        places["log"] = (tmp_path / "log").read_bytes()
    if durable_dsn.startswith("sqlite"):
        places["database"] = b"".join(path.read_bytes() for path in tmp_path.glob("wallet.db*"))
        assert {path.name for path in tmp_path.iterdir()} == {
            "log",
            "wallet.db",
            "wallet.db-wal",
            "wallet.db-shm",
        }
        with contextlib.closing(sqlite3.connect(tmp_path / "wallet.db")) as database:
            with contextlib.closing(sqlite3.connect(tmp_path / "backup.db")) as backup:
                database.backup(backup)
            database.execute("VACUUM INTO ?", [str(tmp_path / "vacuumed.db")])
        places["backup"] = (tmp_path / "backup.db").read_bytes() + (
            tmp_path / "vacuumed.db"
        ).read_bytes()
    else:
        assert f"postgresql://127.0.0.1:{postgres_server.port}/postgres, in" in server.banner
        dump = [
            postgres_server.server.bin_path / "pg_dump",
            "--schema",
            schema,
            "--dbname",
            postgres_server.dsn,
        ]
        places["database"] = places["backup"] = subprocess.run(
            dump, capture_output=True, check=True
        ).stdout
        places["server log"] = (postgres_server.server.pgdata / "log").read_bytes()
    assert b"Ada in the file" in places["database"]
    assert b"Ada in the file" in places["backup"]
    assert places["log"].count(b'"logger": "wallet.access"') > len(raw) / 2
    assert b"RuntimeError: ('a bug', ('acc_" in places["log"]
    found = find_secrets(places, secrets)
    if change:
        assert found >= {
            ("issuer", "process list"),
            *itertools.product(["token"], places.keys() - {"process list", "banner"}),
        }
        return
    assert found == set()
    report(
        f"0 hits of {len(secrets)} secrets, {sum(len(forms_of(one)) for one in secrets.values())} forms of them, in"
        f" {sum(map(len, places.values())):,} bytes of {', '.join(places)} after {len(answers) + len(raw)} requests"
    )
    assert hashlib.sha256(token.encode()).hexdigest().encode() in places["database"]
