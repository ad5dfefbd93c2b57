"""The issuer's overview: exact sums, of one moment, and no burden to a wallet that is busy."""

from __future__ import annotations

import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

import pytest

import wallet as wallet_module
import wallet_overview
from tests.support import (
    ISSUER_TOKEN,
    Client,
    fill_to_the_brim,
    schema_of,
    send,
)
from wallet import AMOUNT_MAX, Unavailable, Wallet, create_app, running

HOUR_US = wallet_overview.HOUR_US
NOON_US = 1_795_953_600_000_000  # 2026-11-29T12:00:00Z


class Clock:
    """What the wallet takes for the time."""

    def __init__(self, monkeypatch):
        self.now_us = NOON_US
        for module in (wallet_module, wallet_overview):
            monkeypatch.setattr(module, "_now_us", lambda: self.now_us)

    def at(self, now_us):
        self.now_us = now_us
        return self


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture(autouse=True)
def unhurried(monkeypatch):
    """On a slow machine no test is to be refused for what another one took."""
    monkeypatch.setattr(wallet_overview, "REST", 0)


def line_of(wallet):
    return wallet_overview._lines.setdefault(wallet, wallet_overview._Line())


def wait_until(is_so):
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Held:
    """Lets each overview read what there is, and then wait until it is let go."""

    def __init__(self, monkeypatch):
        self.count, self.reading, self.gate = 0, threading.Semaphore(0), threading.Semaphore(0)
        self.read = wallet_overview._read
        monkeypatch.setattr(wallet_overview, "_read", self)

    def __call__(self, wallet, tx):
        found = self.read(wallet, tx)
        self.count += 1
        self.reading.release()
        assert self.gate.acquire(timeout=30)
        return found


# What it has ######################################################################################


def test_overview_has_the_sums_of_all_accounts_and_what_was_done_last(wallet, clock):
    """As JSON, whole: a front page needs nothing else."""
    issuer = Client(create_app(wallet, ISSUER_TOKEN), ISSUER_TOKEN)
    hours = [
        {"since": f"2026-11-{28 if hour > 12 else 29}T{hour:02}:00:00.000000Z", "transactions": 0}
        for hour in (*range(13, 24), *range(13))
    ]
    empty = {
        "currency": "USD", "currency_digits": 2, "accounts": 0, "accounts_frozen": 0, "balance": 0,
        "held": 0, "hours": hours, "newest": [],
    }  # fmt: skip
    assert issuer.send("GET", "/api/overview", status=200).json == empty
    clock.at(NOON_US - HOUR_US)
    ada, bob = (wallet.register(name)[0].id for name in ("Ada", "Bob"))
    wallet.topup(ada, 1000, "gift", metadata={"order": "17"})
    clock.at(NOON_US + 1)
    wallet.hold(ada, 300)
    wallet.transfer(ada, bob, 100)
    wallet.freeze(bob)
    found = issuer.send("GET", "/api/overview", status=200).json
    newest = found.pop("newest")
    hours[-2]["transactions"], hours[-1]["transactions"] = 1, 2
    assert found == {
        "currency": "USD", "currency_digits": 2, "accounts": 2, "accounts_frozen": 1,
        "balance": 1000, "held": 300, "hours": hours,
    }  # fmt: skip
    topup = {
        "id": f"txn_{ada[4:]}_1", "type": "topup", "amount": 1000, "balance": 1000,
        "description": "gift", "metadata": {"order": "17"}, "reference": None,
        "created_at": "2026-11-29T11:00:00.000000Z", "account_id": ada, "account_name": "Ada",
    }  # fmt: skip
    assert newest[2] == topup
    moved = {(one["type"], one["account_name"], one["account_id"]) for one in newest[:2]}
    assert moved == {("transfer_out", "Ada", ada), ("transfer_in", "Bob", bob)}


def test_sums_above_what_64_bits_hold_are_exact(wallet):
    """The control is what SQL itself has for it."""
    total = fill_to_the_brim(wallet)
    assert total > 2**63
    issuer = Client(create_app(wallet, ISSUER_TOKEN), ISSUER_TOKEN)
    text = issuer.send("GET", "/api/overview", status=200).text
    assert f'"balance": {total}, "held": {total},' in text
    assert (json.loads(text)["accounts"], total % AMOUNT_MAX) == (1030, 0)
    assert wallet.overview().held == total
    for control in ("sum(balance)", "sum(held)"):
        with pytest.raises(Unavailable, match=r"overflow|out of range"):
            wallet._read(f"SELECT CAST({control} AS BIGINT) FROM accounts")


def test_hold_that_is_past_its_time_is_not_held(wallet, clock):
    """As `available` of its account has it, before the tables know and after."""
    ada, bob = (wallet.register(name)[0].id for name in ("Ada", "Bob"))
    for account in (ada, bob):
        wallet.topup(account, 1000)
    for account, amount, expires_in_s in ((ada, 1, 60), (ada, 2, 3600), (bob, 4, 60), (bob, 8, 60)):
        wallet.hold(account, amount, expires_in_s=expires_in_s)
    wallet.release(bob, wallet.hold(bob, 16, expires_in_s=60).id)
    held = []
    for later_us in (0, 59_999_999, 60_000_000, 3600_000_000):
        clock.at(NOON_US + later_us)
        held.append(wallet.overview().held)
        assert held[-1] == sum(one.balance - one.available for one in wallet.accounts())
        kept = wallet._read("SELECT CAST(sum(held) AS BIGINT) FROM accounts")
        assert kept == [(15,)]  # Of which the tables still count what has expired.
    assert held == [15, 15, 2, 0]
    wallet.hold(ada, 1000)  # It needs what was held.
    assert wallet.overview().held == 1000


def test_holds_and_releases_are_no_movements_however_many_came_last(wallet):
    ada = wallet.register("Ada")[0].id
    made = [wallet.topup(ada, 1).id for _ in range(2)]
    for _ in range(30):
        wallet.release(ada, wallet.hold(ada, 1).id)
    made.append(wallet.capture(ada, wallet.hold(ada, 1).id).id)
    found = wallet.overview()
    assert [one.id for one in found.newest] == made[::-1]
    assert sum(one.transactions for one in found.hours) == 3


def test_an_hour_has_what_came_from_its_first_microsecond_on_to_its_last(wallet, clock):
    first_us = NOON_US - 23 * HOUR_US
    clock.at(first_us - HOUR_US)
    ada = wallet.register("Ada")[0].id
    for created_at_us in (
        first_us - 1, first_us, first_us + HOUR_US - 1, first_us + HOUR_US, NOON_US - 1, NOON_US,
        NOON_US, NOON_US + HOUR_US - 1, NOON_US + HOUR_US,
    ):  # fmt: skip
        wallet.topup(clock.at(created_at_us) and ada, 1)
    for now_us in (NOON_US, NOON_US + 1, NOON_US + HOUR_US - 1):
        clock.at(now_us)
        found = wallet.overview()
        assert [one.transactions for one in found.hours] == [2, 1, *[0] * 20, 1, 3]
        since_us = [wallet_module._as_us(one.since) for one in found.hours]
        assert since_us == [first_us + hour * HOUR_US for hour in range(24)]
        # A time that is still to come is in no hour yet, and what has it is new all the same.
        assert len(found.newest) == 9


def test_newest_are_the_newest_of_all_accounts_though_their_times_are_equal(wallet, clock):
    """A clock that was ahead and has gone back gives an account one time for all that follows."""
    ids = [wallet.register(f"Account {number}")[0].id for number in range(3)]
    for turn in range(4):
        for account in ids:
            wallet.topup(clock.at(NOON_US + turn // 2) and account, 1)
    wallet.topup(clock.at(NOON_US + 10 * HOUR_US) and ids[1], 1)
    clock.at(NOON_US + HOUR_US)
    for account in (*[ids[1]] * 12, *ids):
        wallet.topup(account, 1)
    found = wallet.overview().newest
    every = [
        (one.created_at, int(one.id.split("_")[2]), account, one.id)
        for account in ids
        for one in wallet.statement(account)
    ]
    assert [one.id for one in found] == [id for *_, id in sorted(every, reverse=True)[:20]]
    assert {one.account_id: one.account_name for one in found} == {
        account: f"Account {number}" for number, account in enumerate(ids)
    }
    for account in ids:  # By itself each account's are in order.
        sequences = [int(one.id.split("_")[2]) for one in found if one.account_id == account]
        assert sequences == sorted(sequences, reverse=True)


def test_overview_is_of_one_moment_while_money_moves(concurrent_dsn):
    """The control, which reads one part after the other, has a sum that its newest does not have."""
    with Wallet(concurrent_dsn) as wallet:
        ada = wallet.register("Ada")[0].id
        stopping = threading.Event()

        def topup():
            while not stopping.is_set():
                wallet.topup(ada, 1)

        wallet.topup(ada, 1)
        with ThreadPoolExecutor(2) as threads:
            movers = [threads.submit(topup) for _ in range(2)]
            try:
                found = [wallet.overview() for _ in range(100)]
            finally:
                stopping.set()
        assert [mover.result() for mover in movers] == [None, None]
        for one in found:
            assert one.balance == one.newest[0].balance
            numbers = [entry.balance for entry in one.newest]
            assert numbers == list(range(one.balance, one.balance - len(numbers), -1))
        assert found[-1].balance > found[0].balance

        ((balance,),) = wallet._read("SELECT balance FROM accounts")
        wallet.topup(ada, 1)
        newest = wallet._read("SELECT balance FROM transactions ORDER BY sequence DESC LIMIT 1")
        assert newest != [(balance,)]


def test_newest_and_hours_are_found_by_an_index_and_without_the_rest():
    """The plan of SQLite says it, for time would not be the same everywhere."""
    with Wallet() as wallet:
        plan = wallet._read(
            f"EXPLAIN QUERY PLAN {wallet_overview.OVERVIEW}", *[5] * wallet_overview.OVERVIEW.count("?")
        )
    found = [row[3] for row in plan]
    assert "SCAN t USING INDEX transactions_by_time" in found
    ranges = "SEARCH transactions USING INDEX transactions_by_time (created_at>? AND created_at<?)"
    covering = ranges.replace("USING INDEX", "USING COVERING INDEX")
    assert {ranges, covering} & set(found), found
    assert "SCAN holds USING INDEX active_holds" in found


@pytest.mark.parametrize("version", wallet_module.MIGRATIONS)
def test_tables_of_each_version_get_the_index_by_time(durable_dsn, version):
    database = wallet_module.open_database(durable_dsn, 1, True)
    for statement in schema_of(version):
        adapted = database.adapt(statement)
        database.write(lambda tx, sql=adapted: tx(sql))
    catalog = {"sqlite": "SELECT sql FROM sqlite_master WHERE name = ?",
               "postgresql": "SELECT indexdef FROM pg_indexes WHERE indexname = ?"
                             " AND schemaname = current_schema()"}  # fmt: skip
    sql = catalog[durable_dsn.partition(":")[0]]
    assert database.read(lambda tx: tx(sql, "transactions_by_time")) == []
    database.close()
    with Wallet(durable_dsn) as wallet:
        (found,) = wallet._read(sql, "transactions_by_time")
        assert "(created_at, sequence)" in found[0]
        assert wallet.overview().accounts == 0


# Who may ask ######################################################################################


def test_only_the_issuer_sees_the_overview(wallet):
    _, token = wallet.register("Ada")
    app = create_app(wallet, ISSUER_TOKEN)
    refused = Client(app, token).send("GET", "/api/overview", status=403).json
    assert refused["code"] == "forbidden"
    Client(app).send("GET", "/api/overview", status=401)
    issuer = Client(app, ISSUER_TOKEN)
    issuer.send("GET", "/api/overview?limit=5", status=400)
    issuer.send("POST", "/api/overview", {}, status=405)
    issuer.send("HEAD", "/api/overview", status=200)
    for one in (None, token, ISSUER_TOKEN):
        Client(create_app(wallet), one).send("GET", "/api/overview", status=404)


# Many at once #####################################################################################


def test_those_who_ask_at_once_share_one_answer_that_has_what_was_done_before_they_asked(
    durable_dsn, monkeypatch
):
    with Wallet(durable_dsn) as wallet:
        ada, line, held = wallet.register("Ada")[0].id, line_of(wallet), Held(monkeypatch)
        with ThreadPoolExecutor(3) as threads:
            first = threads.submit(wallet.overview)
            assert held.reading.acquire(timeout=30)
            wallet.topup(ada, 5)  # Which the first has not read any more.
            later = [threads.submit(wallet.overview) for _ in range(2)]
            wait_until(lambda: line.asking == 3)
            with pytest.raises(Unavailable) as refused:
                wallet.overview()
            assert (refused.value.reason, refused.value.headers) == ("overviews", {"Retry-After": "1"})
            held.gate.release(2)
            answers = [one.result(timeout=30) for one in (first, *later)]
        assert [one.balance for one in answers] == [0, 5, 5]
        assert (answers[1] is answers[2], held.count, line.asking) == (True, 2, 0)
        held.gate.release()
        wallet.topup(ada, 5)
        assert wallet.overview().balance == 10  # Nobody is given what was read before.


def test_control_an_answer_that_was_begun_before_is_too_old(durable_dsn, monkeypatch):
    """A line that shares whatever is read at the moment would be the simpler one."""
    with Wallet(durable_dsn) as wallet:
        ada, line, held = wallet.register("Ada")[0].id, line_of(wallet), Held(monkeypatch)
        monkeypatch.setattr(line, "_answer_after", lambda earlier: line.answer)
        with ThreadPoolExecutor(2) as threads:
            first = threads.submit(wallet.overview)
            assert held.reading.acquire(timeout=30)
            wallet.topup(ada, 5)
            later = threads.submit(wallet.overview)
            wait_until(lambda: line.asking == 2)
            held.gate.release()
            assert [first.result(timeout=30).balance, later.result(timeout=30).balance] == [0, 0]


def test_who_waits_for_long_is_sent_away(durable_dsn, monkeypatch):
    with Wallet(durable_dsn) as wallet:
        wallet.register("Ada")
        held = Held(monkeypatch)
        with ThreadPoolExecutor(1) as threads:
            first = threads.submit(wallet.overview)
            assert held.reading.acquire(timeout=30)
            with monkeypatch.context() as patience:
                patience.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0.01)
                with pytest.raises(Unavailable, match="Enough overviews"):
                    wallet.overview()
            held.gate.release()
            assert first.result(timeout=30).accounts == 1


def test_overview_that_failed_is_nobodys_answer(wallet):
    ada = wallet.register("Ada")[0].id
    assert wallet.overview().accounts == 1
    wallet.database.write(lambda tx: tx("ALTER TABLE holds RENAME TO hidden"))
    try:
        with pytest.raises(Unavailable):
            wallet.overview()
    finally:
        wallet.database.write(lambda tx: tx("ALTER TABLE hidden RENAME TO holds"))
    wallet.topup(ada, 5)
    assert wallet.overview().balance == 5


def test_nothing_is_read_for_three_times_as_long_as_an_overview_took(durable_dsn, monkeypatch):
    begun, read = [], wallet_overview._read

    def noting(wallet, tx):
        begun.append(time.monotonic())
        time.sleep(0.02)
        return read(wallet, tx)

    monkeypatch.setattr(wallet_overview, "_read", noting)
    monkeypatch.setattr(wallet_overview, "REST", 3)
    with Wallet(durable_dsn) as wallet:
        for _ in range(3):
            wallet.overview()
    pauses = [later - earlier for earlier, later in itertools.pairwise(begun)]
    assert min(pauses) >= 4 * 0.02


def test_who_would_have_to_wait_for_long_is_told_when_to_ask_again(wallet, monkeypatch):
    monkeypatch.setattr(wallet_overview, "REST", 10**9)
    issuer = Client(create_app(wallet, ISSUER_TOKEN, metrics=True), ISSUER_TOKEN)
    issuer.send("GET", "/api/overview", status=200)
    refused = issuer.send("GET", "/api/overview", status=503)
    assert (refused.headers["Retry-After"], refused.json["code"]) == ("5", "unavailable")
    counted = 'wallet_refusals_total{reason="overviews",route="/api/overview"} 1.0'
    assert counted in issuer.send("GET", "/metrics").text


@pytest.mark.parametrize("most", [wallet_overview.OVERVIEWS_MAX, 8], ids=["as it is", "control"])
def test_many_who_ask_for_the_overview_leave_threads_to_those_who_pay(file_wallet, monkeypatch, most):
    """The control lets in as many as there are threads, and then nobody is served."""
    monkeypatch.setattr(wallet_overview, "OVERVIEWS_MAX", most)
    (ada, token), line = file_wallet.register("Ada"), line_of(file_wallet)
    file_wallet.topup(ada.id, 100)
    held = Held(monkeypatch)
    with running(file_wallet, ISSUER_TOKEN) as url, ThreadPoolExecutor(13) as threads:
        ask = partial(send, url, "GET", "/api/overview", None, ISSUER_TOKEN)
        try:
            asked = [threads.submit(ask) for _ in range(12)]
            wait_until(lambda: line.asking == min(most, 4))
            charge = threads.submit(
                send, url, "POST", "/api/transactions/charge", {"amount": 1}, token
            )
            if most == 8:
                assert not wait([charge], timeout=0.5).done
            else:
                assert charge.result(timeout=30)[0] == 201
                wait_until(lambda: sum(one.done() for one in asked) == 12 - most)
                assert {one.result()[0] for one in asked if one.done()} == {503}
        finally:
            held.gate.release(100)
        answers = [one.result(timeout=30)[0] for one in asked]
        assert answers.count(200) >= min(most, 4)
