"""Movements that wait stand in line, and share a transaction. What befalls one is its own."""

from __future__ import annotations

import contextlib
import re
import socket
import sqlite3
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psycopg
import pytest

import wallet as wallet_module
import wallet_postgres
from tests.support import (
    SERIALIZABLE,
    WRONG_TOKEN,
    Waiting,
    check_books,
    standby_missing,
    together,
    wait_for_lock,
    wait_for_queue,
)
from wallet import (
    AMOUNT_MAX,
    AccountFrozen,
    AccountNotFound,
    BalanceLimitExceeded,
    IdempotencyKeyReused,
    InsufficientFunds,
    OutcomeUnknown,
    Transaction,
    Unauthorized,
    Unavailable,
    Wallet,
)


def transactions_that_wrote(wallet, made):
    """Return how many transactions of Postgres wrote these entries: each row tells its own."""
    sql = "SELECT CAST(xmin AS TEXT) FROM transactions WHERE account_id = ? AND sequence = ?"

    def read(tx):
        ids = [one.id.split("_") for one in made]
        return {tx(sql, f"acc_{account}", int(sequence))[0] for _, account, sequence in ids}

    return len(wallet.database.read(read))


# What others do is no business of theirs ##########################################################


@pytest.mark.slow_on("serializable", "control")
@pytest.mark.parametrize(
    ("engine", "is_alone"),
    [("file", False), ("postgres", False), ("serializable", False), ("postgres", True)],
    ids=["file", "postgres", "serializable", "control"],
)
def test_movements_that_wait_share_a_transaction_and_who_is_refused_leaves_the_others_alone(
    engine, is_alone, request, new_schema, monkeypatch
):
    if engine == "file":
        dsn = request.getfixturevalue("file_dsn")
    else:
        dsn = new_schema(SERIALIZABLE if engine == "serializable" else "")
    with Wallet(dsn, connections=16) as wallet:
        ids = [wallet.register(f"No. {number}")[0].id for number in range(6)]
        full, frozen = (wallet.register(name)[0].id for name in ("Full", "Frozen"))
        for one in ids[3:]:
            wallet.topup(one, 10, key="first")
        wallet.topup(full, AMOUNT_MAX)
        wallet.freeze(frozen)
        commits, observe = [], wallet.database.observe
        wallet.database.observe = lambda outcomes: (observe(outcomes), commits.append(outcomes))
        if is_alone:
            monkeypatch.setattr(wallet_postgres, "_Together", AloneInLine)
        waiting = Waiting(
            wallet,
            partial(wallet.topup, ids[0], 5),
            partial(wallet.charge, ids[1], 5),
            partial(wallet.topup, full, 1),
            partial(wallet.topup, ids[2], 5, key="k"),
            partial(wallet.topup, frozen, 5),
            partial(wallet.charge, ids[3], 10, token=WRONG_TOKEN),
            partial(wallet.charge, ids[3], 10),
            partial(wallet.topup, ids[4], 11, key="first"),
            partial(wallet.topup, "acc_0000000000000000", 5),
            partial(wallet.topup, ids[5], 10, key="first"),
            partial(wallet.charge, ids[5], 3),
            partial(wallet.charge, ids[5], 8),
            partial(wallet.charge, ids[5], 7),
        )
        outcomes = waiting.outcomes()
        assert [
            one.balance if isinstance(one, Transaction) else type(one) for one in outcomes
        ] == [
            5, InsufficientFunds, BalanceLimitExceeded, 5, AccountFrozen, Unauthorized, 0,
            IdempotencyKeyReused, AccountNotFound, 10, 7, InsufficientFunds, 0,
        ]  # fmt: skip
        assert outcomes[9].replayed
        check_books(wallet)
        made = [one for one in outcomes if isinstance(one, Transaction) and not one.replayed]
        assert len(made) == 5
        if engine == "file":
            assert [len(outcomes) for outcomes in commits] == [1, 13]
        else:
            assert (transactions_that_wrote(wallet, made) == 1) != is_alone


class AloneInLine(wallet_postgres._Together):
    """Takes as much of a commit as there is, so that none is done with another."""

    @property
    def size(self):
        return wallet_module.BATCH_MAX

    @size.setter
    def size(self, _):
        pass


def test_key_that_waits_twice_in_one_line_has_one_effect_and_both_get_its_answer(wallet):
    ada, bob = (wallet.register(name)[0].id for name in ("Ada", "Bob"))
    calls = [partial(wallet.topup, one, 5, "gift", key="k") for one in (ada, bob)] * 2
    outcomes = Waiting(wallet, *calls, partial(wallet.topup, ada, 6, key="k")).outcomes()
    assert outcomes[:2] == outcomes[2:4]
    assert [one.replayed for one in outcomes[:4]] == [False, False, True, True]
    assert isinstance(outcomes[4], IdempotencyKeyReused)
    assert [wallet.account(one).balance for one in (ada, bob)] == [5, 5]


def test_times_of_an_account_do_not_go_back_with_the_clock_of_whoever_moves_its_money(
    wallet, monkeypatch
):
    ids = [wallet.register(name)[0].id for name in ("Ada", "Bob")]
    first = [wallet.topup(one, 5).created_at for one in ids]
    an_hour_ago = wallet_module._now_us() - 3600 * 10**6
    monkeypatch.setattr(wallet_module, "_now_us", lambda: an_hour_ago)
    assert [wallet.charge(one, 1).created_at for one in ids] == first
    waiting = Waiting(wallet, *[partial(wallet.charge, one, 1) for one in ids])
    assert [one.created_at for one in waiting.outcomes()] == first
    check_books(wallet)


def post_unfinished(connection, type, account_id, **request):
    """Post a movement as another process does, but for its COMMIT."""
    fields, stamp = wallet_module._parse_request(
        wallet_module.MOVEMENT, account_id, type, description=None, **request
    )
    tx = wallet_postgres.PostgresTx(connection=connection)
    entry = wallet_module._Entry(account_id, type, **fields)
    (made,) = wallet_module._post_each(tx, [(entry, stamp)])
    return made


@pytest.fixture
def gated(monkeypatch):
    """Between the moment of which the look at all accounts tells, and the locks, it goes through a
    gate, which the test opens.
    """
    for before, after in (
        ("(VALUES %s)", "(VALUES %s), gate AS MATERIALIZED (SELECT CAST("
         "pg_advisory_xact_lock_shared(7) AS TEXT) AS is_open)"),
        (" FROM sent\n", " FROM gate CROSS JOIN sent\n"),
    ):  # fmt: skip
        changed = wallet_module.FIND_MANY.replace(before, after)
        assert changed != wallet_module.FIND_MANY
        monkeypatch.setattr(wallet_module, "FIND_MANY", changed)


def use_key_meanwhile(wallet, server, dsn, type, ids):
    """Let each account send a movement, and one of them another too, with the same key, to another
    process. Return what came of these, and of that one.
    """
    with psycopg.connect(dsn) as other, psycopg.connect(dsn, autocommit=True) as gate:
        gate.execute("SELECT pg_advisory_lock(7)")
        move = getattr(wallet, type)
        waiting = Waiting(wallet, *[partial(move, one, 5, key="k") for one in ids])
        theirs = post_unfinished(other, type, ids[1], amount=5, key="k")
        release = threading.Thread(target=waiting.release)
        release.start()
        wait_for_lock(server)
        other.commit()
        gate.execute("SELECT pg_advisory_unlock(7)")
        release.join()
        return waiting.outcomes(), theirs


@pytest.mark.slow_on("control")
@pytest.mark.parametrize("careless", [False, True], ids=["wallet", "control"])
def test_key_that_another_process_uses_meanwhile_is_told_its_answer_and_nobody_else_notices(
    new_schema, postgres_server, monkeypatch, gated, careless
):
    dsn = new_schema(on=postgres_server)
    if careless:  # Without a way back, each is told of what befell one.

        def gather(self, function, item, account_id):
            return self._line.stand(wallet_postgres._Together(function, item))

        monkeypatch.setattr(wallet_postgres.PostgresDatabase, "gather", gather)
    with Wallet(dsn) as wallet:
        ids = [wallet.register(name)[0].id for name in ("Ada", "Bob", "Cem")]
        outcomes, theirs = use_key_meanwhile(wallet, postgres_server, dsn, "topup", ids)
        if careless:
            assert {type(one) for one in outcomes} == {wallet_postgres._NotTogether}
            return
        assert [one.balance for one in outcomes] == [5, 5, 5]
        assert [one.replayed for one in outcomes] == [False, True, False]
        assert outcomes[1] == theirs
        assert transactions_that_wrote(wallet, outcomes) == 3  # One by one.
        check_books(wallet)


def test_charge_whose_key_another_process_uses_meanwhile_is_not_refused_for_want_of_what_it_took(
    new_schema, postgres_server, gated
):
    """Who locks an account sees its balance, and maybe not yet the entry that it comes from."""
    dsn = new_schema(on=postgres_server)
    with Wallet(dsn) as wallet:
        ids = [wallet.register(name)[0].id for name in ("Ada", "Bob", "Cem")]
        for one in ids:
            wallet.topup(one, 5)
        outcomes, theirs = use_key_meanwhile(wallet, postgres_server, dsn, "charge", ids)
        assert outcomes[1] == theirs
        assert outcomes[1].replayed
        assert transactions_that_wrote(wallet, outcomes) == 2
        assert [wallet.account(one).balance for one in ids] == [0, 0, 0]
        check_books(wallet)


@pytest.mark.slow_on("control")
@pytest.mark.parametrize("careless", [False, True], ids=["wallet", "control"])
@pytest.mark.parametrize("count", [1, 3], ids=["alone", "together"])
def test_account_that_another_session_has_locked_delays_no_other_and_its_own_movement_waits(
    new_schema, postgres_server, monkeypatch, count, careless
):
    dsn = new_schema(on=postgres_server)
    if careless:
        sql = wallet_module.POST_AT_ONCE.replace(" SKIP LOCKED", "")
        monkeypatch.setattr(wallet_module, "POST_AT_ONCE", sql)
        monkeypatch.setattr(
            wallet_postgres.PostgresTx, "row_lock", " FOR UPDATE OF accounts"
        )
    with (
        Wallet(dsn) as wallet,
        psycopg.connect(dsn) as other,
        ThreadPoolExecutor(1) as thread,
    ):
        ada, *others = (wallet.register(f"No. {number}")[0].id for number in range(4))
        other.execute("SELECT 1 FROM accounts WHERE id = %s FOR UPDATE", [ada])
        waiting = Waiting(wallet, *[partial(wallet.topup, one, 5) for one in [ada, *others][:count]])
        waiting.release()
        wait_for_lock(postgres_server)
        behind = thread.submit(wallet.topup, others[2], 5)
        if careless:
            wait_for_queue(wallet, 1)
            assert not any(one.done() for one in (*waiting.futures, behind))
            other.rollback()
            return
        assert [one.result(30).balance for one in (*waiting.futures[1:], behind)] == [5] * count
        assert not waiting.futures[0].done()
        other.rollback()
        assert [one.balance for one in waiting.outcomes()] == [5] * count
        check_books(wallet)


@pytest.mark.parametrize("dsn", ["file", "postgres"], indirect=True)
def test_books_that_are_damaged_fail_the_movement_that_meets_them_and_no_other(dsn, request):
    with Wallet(dsn) as wallet:
        ids = [wallet.register(f"No. {number}")[0].id for number in range(4)]
        damage = f"UPDATE accounts SET last_sequence = -7 WHERE id = '{ids[1]}'"
        if dsn.startswith("sqlite"):
            with contextlib.closing(sqlite3.connect(dsn[10:], isolation_level=None)) as other:
                other.execute("PRAGMA ignore_check_constraints = ON")
                other.execute(damage)
        else:
            with psycopg.connect(dsn, autocommit=True) as other:
                other.execute("ALTER TABLE accounts DROP CONSTRAINT accounts_last_sequence_check")
                other.execute(damage)
                other.execute("ALTER TABLE accounts ADD CHECK (last_sequence >= 0) NOT VALID")
        waiting = Waiting(wallet, *[partial(wallet.topup, one, 5) for one in [*ids, ids[1]]])
        outcomes = waiting.outcomes()
        assert [one.balance for one in outcomes[::2][:2] + outcomes[3:4]] == [5] * 3
        for failed in (outcomes[1], outcomes[4]):
            assert isinstance(failed, (sqlite3.IntegrityError, psycopg.IntegrityError))
            assert "last_sequence" in str(failed)
        assert [wallet.account(one).balance for one in ids] == [5, 0, 5, 5]
        assert [wallet.topup(one, 1).balance for one in ids[2:]] == [6, 6]


def test_fault_of_the_wallet_that_one_movement_meets_is_told_to_no_other(wallet, monkeypatch):
    ids = [wallet.register(f"No. {number}")[0].id for number in range(3)]

    class FaultyBooks(wallet_module._Books):
        def post(self, entry, stamp):
            assert entry.account_id != ids[1], "a bug"
            return super().post(entry, stamp)

    monkeypatch.setattr(wallet_module, "_Books", FaultyBooks)
    outcomes = Waiting(wallet, *[partial(wallet.topup, one, 5) for one in ids]).outcomes()
    assert [type(one) for one in outcomes] == [Transaction, AssertionError, Transaction]
    assert [wallet.account(one).balance for one in ids] == [5, 0, 5]


# The line #########################################################################################


class Greedy(wallet_module._Line):
    """Takes all that wait, first come, first served."""

    def _take(self, leader):
        self._taken, self.waiting = self.waiting, []


@pytest.mark.slow_on("control")
@pytest.mark.parametrize("kind", [wallet_module._Line, Greedy], ids=["wallet", "control"])
def test_commit_has_a_bounded_number_of_entries_and_one_movement_waits_for_one_batch_at_most(
    sqlite_wallet, monkeypatch, kind
):
    monkeypatch.setattr(wallet_module, "BATCH_MAX", 10)
    wallet, commits = sqlite_wallet, []
    line = wallet.database._line = kind(wallet.database._commit)
    ids = [wallet.register(f"No. {number}")[0].id for number in range(5)]
    commit = line._work

    def noting(writes):
        commits.append([write.size for write in writes])
        commit(writes)

    line._work = noting
    batches = [
        partial(wallet.batch, [{"type": "topup", "amount": 1}] * 10, account_id=one)
        for one in ids[:4]
    ]
    movements = [partial(wallet.topup, ids[4], 1, key=f"k{number}") for number in range(13)]
    outcomes = Waiting(wallet, *batches, *movements).outcomes()
    line._work = commit
    assert [one for one in outcomes if isinstance(one, Exception)] == []
    assert [wallet.account(one).balance for one in ids] == [10, 10, 10, 10, 13]
    assert commits.pop(0) == [1]  # Which kept the others waiting.
    if kind is Greedy:
        assert commits == [[10] * 4 + [1] * 13]
        return
    assert commits == [[10], [1] * 10, [10], [1] * 3, [10], [10]]


def test_batches_that_are_small_share_a_commit_as_far_as_there_is_room(sqlite_wallet, monkeypatch):
    monkeypatch.setattr(wallet_module, "BATCH_MAX", 10)
    wallet, ada = sqlite_wallet, sqlite_wallet.register("Ada")[0].id
    commits, commit = [], wallet.database._line._work

    def noting(writes):
        commits.append([write.size for write in writes])
        commit(writes)

    wallet.database._line._work = noting
    batches = [
        partial(wallet.batch, [{"type": "topup", "amount": 1}] * size, account_id=ada)
        for size in (4, 7, 5, 2, 10)
    ]
    assert [len(made) for made in Waiting(wallet, *batches).outcomes()] == [4, 7, 5, 2, 10]
    assert commits == [[1], [4, 5], [7, 2], [10]]


# On the wire ######################################################################################


class Relay:
    """Stands between a wallet and Postgres. Counts how often the client asks for an answer, and
    cuts the next movement off `cut` ("before" or "after") it is committed, if that is given. With
    `stays_away` there is no server from then on.
    """

    ASKING = b"S", b"H", b"Q"  # Sync, Flush and Query: behind these only does a client wait.
    LAST = b"COMMIT\0", b"WITH free AS"  # In what commits.

    def __init__(self, dsn):
        self.upstream = ("127.0.0.1", int(re.search(r"127\.0\.0\.1:(\d+)", dsn)[1]))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.dsn = re.sub(r"127\.0\.0\.1:\d+", f"127.0.0.1:{self.listener.getsockname()[1]}", dsn)
        self.dsn += "&sslmode=disable&gssencmode=disable"
        self.asked, self.cut, self.stays_away, self.is_away = 0, "", False, False
        self.parting = b""  # What the client is told before it is cut off.
        self.open, self.threads, self.doomed = [], [], set()
        self.start(self.accept)

    def start(self, function, *arguments):
        self.threads.append(threading.Thread(target=function, args=arguments))
        self.threads[-1].start()

    def accept(self):
        with contextlib.suppress(OSError):  # Closed.
            while True:
                client, _ = self.listener.accept()
                if self.is_away:
                    client.close()
                    continue
                try:
                    server = socket.create_connection(self.upstream)
                except OSError:  # It is down.
                    client.close()
                    continue
                self.open += client, server
                self.start(self.ask, client, server)
                self.start(self.answer, client, server)

    def ask(self, client, server):
        """Pass on what the client sends, message by message.

        https://www.postgresql.org/docs/current/protocol-message-formats.html
        """
        with client.makefile("rb") as stream, contextlib.suppress(OSError, struct.error):
            kind = before = b""  # The first message has none.
            while True:
                length = stream.read(4)
                body = stream.read(struct.unpack("!I", length)[0] - 4)
                # The Flush with which a pipeline ends follows a Sync, and only then it waits.
                self.asked += kind in self.ASKING and (before, kind) != (b"S", b"H")
                before = kind
                if self.cut and any(part in body for part in self.LAST):
                    cut, self.cut = self.cut, ""
                    if cut == "before":
                        self.break_off(client, server)
                        return
                    self.doomed.add(server)
                server.sendall(kind + length + body)
                kind = stream.read(1)
        self.close_all([server])

    def answer(self, client, server):
        with contextlib.suppress(OSError):
            while chunk := server.recv(65536):
                # Ready for a query, and in no transaction: it is committed.
                if server in self.doomed and chunk.endswith(b"Z\0\0\0\5I"):
                    client.sendall(self.parting)
                    self.break_off(client, server)
                    return
                client.sendall(chunk)
        self.close_all([client])

    def break_off(self, *connections):
        self.is_away = self.stays_away
        self.close_all(self.open if self.is_away else connections)

    def close_all(self, connections):
        for connection in connections:
            with contextlib.suppress(OSError):  # It is closed already.
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close_all([self.listener, *self.open])
        for thread in self.threads:
            thread.join(timeout=30)
            assert not thread.is_alive()
        for connection in (self.listener, *self.open):
            connection.close()


@pytest.fixture
def relay(new_schema, postgres_server):
    with Relay(new_schema(on=postgres_server)) as relay:
        yield relay


@pytest.mark.slow_on("control")
@pytest.mark.parametrize("careless", [False, True], ids=["wallet", "control"])
def test_movement_is_one_round_trip_and_others_are_few_however_much_they_write(
    relay, monkeypatch, careless
):
    if careless:  # Each statement by itself, as usual.
        plain = contextlib.nullcontext
        monkeypatch.setattr(wallet_postgres.TimedConnection, "pipeline", lambda self: plain())
    with Wallet(relay.dsn, connections=1) as wallet:
        ada, bob = (wallet.register(name)[0].id for name in ("Ada", "Bob"))
        round_trips = {}

        def count(name, call):
            before = relay.asked
            made = call()
            round_trips[name] = relay.asked - before
            return made

        count("topup", partial(wallet.topup, ada, 5000))
        charge = count("charge", partial(wallet.charge, ada, 1000, "Order 17", key="k"))
        count("charge again", partial(wallet.charge, ada, 1000, "Order 17", key="k"))
        count("refund", partial(wallet.refund, ada, charge.id, 10))
        count("transfer", partial(wallet.transfer, ada, bob, 1))
        hold, other = (count("hold", partial(wallet.hold, ada, 1)) for _ in range(2))
        count("capture", partial(wallet.capture, ada, hold.id))
        count("release", partial(wallet.release, ada, other.id))
        batch = [{"type": "charge", "amount": 1}] * 1000
        count("batch", partial(wallet.batch, batch, account_id=ada))
        waiting = Waiting(wallet, *[partial(wallet.topup, one, 1) for one in (ada, bob)])
        assert len(count("together", waiting.outcomes)) == 2
        check_books(wallet)
    expected = {  # With one more for what is looked up before there is anything to lock.
        "topup": 1, "charge": 1, "charge again": 3, "transfer": 3, "batch": 3, "together": 2,
        "capture": 4, "refund": 5, "hold": 5, "release": 5,
    }  # fmt: skip
    if careless:
        more = {name: count - expected[name] for name, count in round_trips.items()}
        assert {name for name in more if more[name] < 2} == {"topup", "charge"}
        return
    assert round_trips == expected


# It is not known whether it is kept ###############################################################


@pytest.mark.slow_on("session ended", "server killed")
@pytest.mark.parametrize("count", [1, 3], ids=["alone", "together"])
@pytest.mark.parametrize("fate", ["cut before", "cut after", "session ended", "server killed"])
def test_movements_whose_commit_is_not_answered_are_told_the_truth_and_none_is_doubled(
    new_schema, postgres_server, count, fate
):
    with contextlib.ExitStack() as stack:
        dsn = new_schema(on=postgres_server)
        relay = stack.enter_context(Relay(dsn))
        wallet = stack.enter_context(Wallet(relay.dsn))
        without_standby = stack.enter_context(contextlib.ExitStack())
        ids = [wallet.register(f"No. {number}")[0].id for number in range(3)]
        calls = [partial(wallet.topup, one, 5, key="k") for one in ids[:count]]
        calls.append(partial(wallet.charge, ids[2], 100))  # Refused, whatever becomes of the others.
        waiting = Waiting(wallet, *calls[: count if count == 1 else None])
        if fate.startswith("cut"):
            relay.cut = fate.split()[1]
            waiting.release()
        else:
            missing = without_standby.enter_context(standby_missing(postgres_server))
            waiting.release()
            (backend,) = missing()
            if fate == "session ended":
                postgres_server.query("SELECT pg_terminate_backend(%s)", backend)
            else:
                postgres_server.kill()
                postgres_server.restart()
        made = waiting.outcomes()
        assert [one.balance for one in made[:count]] == [5] * count
        assert [type(one) for one in made[count:]] == [InsufficientFunds] * (count > 1)
        without_standby.close()
        again = together(*calls[:count])
        assert again == made[:count]
        assert all(one.replayed for one in again)
        assert [wallet.account(one).balance for one in ids[:count]] == [5] * count
        assert not relay.cut
        check_books(wallet)


# What PgBouncer says where the server has ended, whatever that has done before.
LOST_SERVER = b"SFATAL\0VFATAL\0C08P01\0Mserver conn crashed?\0\0"
LOST_SERVER = b"E" + struct.pack("!I", len(LOST_SERVER) + 4) + LOST_SERVER


@pytest.mark.slow_on("control")
@pytest.mark.parametrize("careless", [False, True], ids=["wallet", "control"])
@pytest.mark.parametrize("parting", [b"", LOST_SERVER], ids=["cut off", "told by a pooler"])
@pytest.mark.parametrize("count", [1, 3], ids=["alone", "together"])
def test_movements_whose_commit_is_not_answered_stay_unknown_while_the_database_is_away(
    relay, monkeypatch, count, parting, careless
):
    if careless:  # Takes what was not answered for not done.
        monkeypatch.setattr(wallet_postgres.PostgresTx, "may_be_kept", lambda self, error: False)
    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 1)
    with Wallet(relay.dsn) as wallet:
        ids = [wallet.register(f"No. {number}")[0].id for number in range(count)]
        waiting = Waiting(wallet, *[partial(wallet.topup, one, 5, key="k") for one in ids])
        relay.cut, relay.stays_away, relay.parting = "after", True, parting
        refused = waiting.outcomes()
        assert {type(one) for one in refused} == {Unavailable if careless else OutcomeUnknown}
        relay.is_away = False
        monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 5)
        wallet.database._away_until = 0
        wallet.database._pool.drain()
        assert all(wallet.topup(one, 5, key="k").replayed for one in ids)
        check_books(wallet)


@pytest.mark.parametrize("count", [1, 3], ids=["alone", "together"])
def test_movements_whose_commit_is_not_answered_stay_unknown_when_the_wallet_is_closed_meanwhile(
    relay, monkeypatch, count
):
    with Wallet(relay.dsn) as wallet:
        ids = [wallet.register(f"No. {number}")[0].id for number in range(count)]
        waiting = Waiting(wallet, *[partial(wallet.topup, one, 5, key="k") for one in ids])
        break_off = relay.break_off

        def close_first(*connections):
            wallet.close()
            break_off(*connections)

        monkeypatch.setattr(relay, "break_off", close_first)
        relay.cut = "after"
        assert {type(one) for one in waiting.outcomes()} == {OutcomeUnknown}
    with Wallet(relay.dsn) as wallet:
        assert all(wallet.topup(one, 5, key="k").replayed for one in ids)


def test_movement_that_has_no_time_left_after_the_line_does_not_make_the_database_be_taken_for_away(
    new_schema, postgres_server, monkeypatch
):
    with Wallet(new_schema(on=postgres_server)) as wallet:
        ada, bob = (wallet.register(name)[0].id for name in ("Ada", "Bob"))
        waiting = Waiting(wallet, partial(wallet.topup, ada, 5, key="k"))
        monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0)
        assert {type(one) for one in waiting.outcomes()} == {Unavailable}
        monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 5)
        assert wallet.topup(bob, 5).balance == 5
        assert wallet.topup(ada, 5, key="k").balance == 5


@pytest.mark.slow_on("control")
@pytest.mark.parametrize(
    ("count", "careless"), [(1, False), (3, False), (1, True)], ids=["alone", "together", "control"]
)
def test_movements_that_a_lock_holds_up_for_too_long_are_not_unknown(
    new_schema, postgres_server, monkeypatch, count, careless
):
    """The server says that it has given up, also where it had to be told to."""
    if careless:

        def cancel(self, **options):
            raise psycopg.OperationalError("nobody hears")

        monkeypatch.setattr(wallet_postgres.TimedConnection, "cancel_safe", cancel)
    dsn = new_schema(on=postgres_server)
    with Wallet(dsn) as wallet, psycopg.connect(dsn) as other:
        ids = [wallet.register(f"No. {number}")[0].id for number in range(count)]
        monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 1)
        waiting = Waiting(wallet, *[partial(wallet.topup, one, 5, key="k") for one in ids])
        other.execute("LOCK TABLE accounts IN SHARE ROW EXCLUSIVE MODE")
        refused = {type(one) for one in waiting.outcomes()}
        assert refused == {OutcomeUnknown if careless else Unavailable}
        other.rollback()
        monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 5)
        assert [wallet.topup(one, 5, key="k").balance for one in ids] == [5] * count
        check_books(wallet)


def test_movements_that_were_not_begun_are_not_unknown_while_the_database_is_away(
    relay, monkeypatch
):
    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 1)
    with Wallet(relay.dsn) as wallet:
        ids = [wallet.register(f"No. {number}")[0].id for number in range(3)]
        waiting = Waiting(wallet, *[partial(wallet.topup, one, 5, key="k") for one in ids])
        relay.stays_away = True
        relay.break_off()
        assert {type(one) for one in waiting.outcomes()} == {Unavailable}


def test_while_the_database_is_taken_for_away_movements_do_not_wait_to_learn_it_again(relay):
    with Wallet(relay.dsn, connections=1) as wallet:
        ids = [wallet.register(f"No. {number}")[0].id for number in range(3)]
        waiting = Waiting(wallet, *[partial(wallet.topup, one, 5) for one in ids])
        wallet.database._away_until = float("inf")
        assert {type(one) for one in waiting.outcomes()} == {Unavailable}
        asked = relay.asked
        with pytest.raises(Unavailable):
            wallet.topup(ids[0], 5)
        assert relay.asked == asked
        wallet.database._away_until = 0
        assert [wallet.topup(one, 5).balance for one in ids] == [5, 5, 5]


# Where accounts are on several nodes ##############################################################


@pytest.fixture
def sent(monkeypatch):
    """Every statement that is sent to Postgres from now on, each with its parameters."""
    sent, execute, many = [], psycopg.Cursor.execute, psycopg.Cursor.executemany

    def noting(self, sql, parameters=None, **options):
        sent.append((sql, tuple(parameters or ())))
        return execute(self, sql, parameters, **options)

    def noting_many(self, sql, rows, **options):
        sent.extend((sql, tuple(row)) for row in rows)
        return many(self, sql, rows, **options)

    monkeypatch.setattr(psycopg.Cursor, "execute", noting)
    monkeypatch.setattr(psycopg.Cursor, "executemany", noting_many)
    return sent


def accounts_named(sql, parameters):
    """Return the accounts that a statement is about."""
    if sql.lstrip().startswith("INSERT INTO transactions"):
        parameters = parameters[:9]  # What follows is only told: with whom money was exchanged.
    return {one for one in parameters if re.fullmatch("acc_[0-9A-Za-z]{16}", str(one))}


@pytest.mark.slow_on("control")
@pytest.mark.parametrize("is_sharded", [True, False], ids=["wallet", "control"])
def test_where_accounts_are_on_several_nodes_each_statement_is_about_one_and_none_is_skipped(
    request, sent, is_sharded
):
    dsn = request.getfixturevalue("sharded_dsn" if is_sharded else "postgres_dsn")
    with Wallet(dsn, connections=8) as wallet:
        ids = [wallet.register(f"No. {number}")[0].id for number in range(4)]
        ada, bob = ids[:2]
        made = together(*[partial(wallet.topup, one, 100, key="k") for one in ids])
        assert transactions_that_wrote(wallet, made) == 4 or not is_sharded
        assert together(*[partial(wallet.topup, one, 100, key="k") for one in ids]) == made
        charge = wallet.charge(ada, 40)
        wallet.refund(ada, charge.id, 10)
        before = len(sent)
        wallet.transfer(bob, ada, 50)
        wallet.transfer(ada, bob, 5, key="t")
        locked = [one for sql, ids in sent[before:] if sql.startswith("SELECT 1 ") for one in ids]
        assert locked == sorted([ada, bob]) * 2  # So that no two wait for each other.
        assert wallet.transfer(ada, bob, 5, key="t").replayed
        wallet.capture(ada, wallet.hold(ada, 20).id, 10)
        wallet.release(ada, wallet.hold(ada, 20).id)
        batch = [{"type": "charge", "amount": 1, "account": one} for one in ids * 2]
        first = wallet.batch(batch, key="b")
        assert wallet.batch(batch, key="b") == first
        with pytest.raises(InsufficientFunds):
            wallet.charge(bob, 1000)
        with pytest.raises(AccountNotFound):
            wallet.topup("acc_0000000000000000", 1)
        with pytest.raises(Unauthorized):
            wallet.charge(ada, 1, token=WRONG_TOKEN)
        wallet.topup(ada, 1, key=wallet_module._reserve_key("issuer gift"))
        wallet.freeze(bob)
        check_books(wallet)
    assert max(len(accounts_named(*one)) for one in sent) == (1 if is_sharded else 4)
    assert any("SKIP LOCKED" in sql for sql, _ in sent) != is_sharded
    locks = [parameters for sql, parameters in sent if "FOR UPDATE" in sql]
    assert len(locks) > 20 or not is_sharded
