"""The operator's commands: verify, backup, accounts, token and copy, and what all have in common."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

import wallet as wallet_module
import wallet_books
import wallet_cli
import wallet_commands
import wallet_postgres
from tests.support import (
    MODULE,
    Intent,
    account,
    changed,
    check_books,
    command,
    contents,
    count_lost_and_surplus,
    entry,
    environment,
    files_cannot_grow,
    fill_books,
    send,
    served,
    standby_missing,
    torture,
)
from wallet import (
    AMOUNT_MAX,
    ConfigurationError,
    Unauthorized,
    Unavailable,
    Wallet,
    WalletError,
    WrongBooks,
)

# Moving to another database #######################################################################


@pytest.fixture(scope="module")
def full_file(tmp_path_factory):
    """A file with 40 accounts, some without any transaction, and one with more than a few pages of
    them.
    """
    path = tmp_path_factory.mktemp("full") / "wallet.db"
    with Wallet(f"sqlite:///{path}", currency="JPY") as wallet:
        for number in range(40):
            account, _ = wallet.register(f"Ä{number} 'quoted' %s ? {{}}")
            for amount in range(1, number % 7):
                wallet.topup(
                    account.id,
                    amount * 10,
                    "día %" if amount % 2 else None,
                    key=f"key {amount} ?%s",
                )
                wallet.charge(account.id, amount)
            if number % 7 == 3:
                for end in (wallet.capture, wallet.release, lambda *ids: None):
                    end(account.id, wallet.hold(account.id, 1, metadata={"ü %s": "?"}).id)
        wallet.database.write(
            lambda tx: tx("DELETE FROM transactions WHERE account_id = ?", account.id)
        )
        row = "INSERT INTO transactions VALUES (?, ?, 'topup', 1, ?, NULL, NULL, NULL, ?, ?, 0)"
        wallet.database.write(
            lambda tx: [tx(row, account.id, n, n, f"k{n}", "f" * 64) for n in range(1, 1300)]
        )
        wallet.database.write(
            lambda tx: tx(
                "UPDATE accounts SET balance = 1299, last_sequence = 1299 WHERE id = ?", account.id
            )
        )
        check_books(wallet)
    return path


@pytest.fixture
def full_dsn(full_file, durable_dsn):
    """A database with what is in `full_file`."""
    if durable_dsn.startswith("sqlite:"):
        shutil.copy(full_file, durable_dsn.removeprefix("sqlite:///"))
    else:
        with Wallet(f"sqlite:///{full_file}") as source, Wallet(durable_dsn) as target:
            wallet_books.copy_wallet(source, target)
    return durable_dsn


@pytest.mark.slow_on("postgres-postgres", "postgres-file", "file-file")
@pytest.mark.parametrize("kind", ["file", "postgres"])
def test_copy_moves_all_to_another_database_and_tokens_keep_working(
    full_dsn, kind, new_schema, tmp_path
):
    target = new_schema() if kind == "postgres" else f"sqlite:///{tmp_path}/target.db"
    with Wallet(full_dsn) as wallet:
        ada, token = wallet.register("Ada")
        topup = wallet.topup(ada.id, 5, key="k")
        wallet.topup(ada.id, 1, key=wallet_module._reserve_key("issuer k"))
        wallet.charge(ada.id, 1)
    done = command("copy", "--from", full_dsn, "--to", target)
    assert done.returncode == 0, done.stderr
    accounts, transactions, _, keys = (len(rows) for rows in contents(full_dsn)[1:])
    assert keys == 1
    assert accounts == 41
    rows = f"{accounts:,} accounts and {transactions:,} entries"
    said = rf"verified: \S+ has every row of \S+, in JPY: {rows}\n"
    assert (done.stderr, bool(re.fullmatch(said, done.stdout))) == ("", True), done.stdout
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
    assert re.fullmatch(
        r"wallet: \S+ already holds accounts: name an empty database\n", again.stderr
    )


def test_copy_into_memory_is_refused(refusal):
    assert (
        refusal("copy", "--from", "sqlite:///wallet.db", "--to", "sqlite://")
        == refusal("init", "--dsn", "sqlite:///:memory:")
        == "wallet: what is in memory would be gone at once: name a file\n"
    )
    assert (
        refusal("copy", "--from", "sqlite:///wallet.db", "--to", "sqlite:///wallet.db")
        == "wallet: a wallet cannot be copied to itself: name another database\n"
    )


def test_copy_of_no_wallet_is_refused_and_makes_none(tmp_path, postgres_dsn, file_dsn):
    done = command("copy", "--from", f"sqlite:///{tmp_path}/typo.db", "--to", file_dsn)
    assert done.returncode == 2
    assert re.fullmatch(
        r"wallet: cannot open [^\n]*typo\.db: there is no such file: is its disk [^\n]*\n",
        done.stderr,
    )
    assert list(tmp_path.iterdir()) == []
    done = command("copy", "--from", postgres_dsn, "--to", file_dsn)
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
    assert done.stderr.startswith("wallet: there is no wallet in postgresql://")


@pytest.mark.slow
def test_wallet_that_cannot_be_read_now_is_not_said_to_be_missing(
    new_schema, postgres_server, monkeypatch
):
    dsn = new_schema(on=postgres_server)
    Wallet(dsn).close()
    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0.5)
    with contextlib.ExitStack() as stack:
        check = wallet_postgres.PostgresDatabase._check_server

        def freeze(*arguments):
            check(*arguments)
            stack.enter_context(postgres_server.frozen())

        monkeypatch.setattr(wallet_postgres.PostgresDatabase, "_check_server", freeze)
        with pytest.raises(
            ConfigurationError,
            match=r"cannot use .*stopped answering|cannot use .*get a connection",
        ):
            Wallet(dsn, create=False)


@pytest.mark.slow_on("postgres")
def test_copy_brings_the_currency_to_an_empty_database(full_dsn, postgres_dsn):
    with Wallet(full_dsn) as source, Wallet(postgres_dsn, currency="EUR") as target:
        wallet_books.copy_wallet(source, target)
        assert target.currency == "JPY"
        assert {target.account(row[0]).currency for row in contents(postgres_dsn)[1]} == {"JPY"}
    with Wallet(postgres_dsn) as wallet:
        assert wallet.currency == "JPY"


INTERRUPTED = """
import os, signal, sys, wallet, wallet_books, wallet_cli
copy_wallet = wallet_books.copy_wallet
interrupt = lambda *done: os.kill(os.getpid(), signal.SIGINT)
wallet_books.copy_wallet = lambda source, target, report: copy_wallet(source, target, interrupt)
sys.exit(wallet_cli.main())
"""


@pytest.mark.parametrize("durable_dsn", ["file"], indirect=True)
@pytest.mark.parametrize("kind", ["file", "postgres"])
def test_target_of_a_copy_that_was_killed_is_no_wallet(full_dsn, kind, new_schema, tmp_path):
    """Else --must-exist would take it for one, in which nobody has anything."""
    target = new_schema() if kind == "postgres" else f"sqlite:///{tmp_path}/target.db"
    assert command("init", "--dsn", target).returncode == 0
    killed = INTERRUPTED.replace("SIGINT", "SIGKILL")
    done = subprocess.run(
        [sys.executable, "-c", killed, "copy", "--from", full_dsn, "--to", target],
        env=environment(),
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL
    refused = command("--port", "0", "--dsn", target, "--must-exist", "1")
    assert (refused.returncode, "there is no wallet in" in refused.stderr) == (75, True)
    assert command("copy", "--from", full_dsn, "--to", target).returncode == 0
    assert contents(target) == contents(full_dsn)
    with served("--dsn", target, "--must-exist", "1") as server:
        assert send(server.url, "GET", "/readyz")[0] == 200


@pytest.mark.slow
@pytest.mark.parametrize("durable_dsn", ["postgres"], indirect=True)
def test_copy_to_the_same_database_by_another_name_leaves_it_a_wallet(durable_dsn):
    assert command("init", "--currency", "EUR", "--dsn", durable_dsn).returncode == 0
    before = contents(durable_dsn)
    other_name = durable_dsn.replace("postgresql://", "postgres://")
    done = command("copy", "--from", durable_dsn, "--to", other_name)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert contents(durable_dsn) == before


@pytest.mark.slow_on("postgres")
def test_interrupted_copy_says_so_and_leaves_the_target_empty(full_dsn, postgres_dsn):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "copy", "--from", full_dsn, "--to", postgres_dsn],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (130, "wallet: interrupted\n")
    assert contents(postgres_dsn)[1:] == [[], [], [], []]


def test_copy_whose_commit_was_cut_off_but_happened_is_no_failure(
    file_dsn, new_schema, postgres_server
):
    with (
        Wallet(file_dsn) as source,
        Wallet(new_schema(on=postgres_server)) as target,
        ThreadPoolExecutor(1) as thread,
    ):
        ada, token = source.register("Ada")
        source.topup(ada.id, 5)
        with standby_missing(postgres_server) as waiting:
            future = thread.submit(wallet_books.copy_wallet, source, target)
            (first,) = (second,) = waiting()
            postgres_server.query("SELECT pg_terminate_backend(%s)", first)
            while second == first:  # The first commit is that of the target which is no wallet yet.
                (second,) = waiting()
            postgres_server.query("SELECT pg_terminate_backend(%s)", second)
            assert future.result(timeout=30) == {"accounts": 1, "transactions": 1, "holds": 0, "issuer_keys": 0}
        assert target.authenticate(token).balance == 5
        check_books(target)


def test_copy_to_a_server_that_went_away_ends(file_dsn, new_schema, postgres_server, monkeypatch):
    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0.5)
    with Wallet(file_dsn) as source, Wallet(new_schema(on=postgres_server)) as target:
        source.register("Ada")
        try:
            with pytest.raises(Unavailable, match="couldn't get a connection"):
                wallet_books.copy_wallet(
                    source, target, lambda *done: postgres_server.control("stop", "-m", "immediate")
                )
        finally:
            postgres_server.restart()


def copy_while_another_writes(source_dsn, target_dsn, monkeypatch):
    """Copy a wallet while another process has it open. Return what its topup came to."""
    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0.5)
    outcomes = []
    with (
        Wallet(source_dsn) as source,
        Wallet(source_dsn) as other,
        Wallet(target_dsn) as target,
        ThreadPoolExecutor(1) as thread,
    ):
        # What is written to the last account of all is always still ahead of the copy.
        (*_, last) = source.accounts()

        def topup():
            try:
                return other.topup(last.id, 1).balance
            except WalletError as error:
                return type(error)

        def report(*done):
            if not outcomes:
                assert other.account(last.id) == last  # To read is no harm.
                outcomes.append(thread.submit(topup).result(timeout=30))

        wallet_books.copy_wallet(source, target, report)
    return outcomes


@pytest.mark.slow_on("postgres")
def test_nobody_writes_to_a_wallet_while_it_is_copied(full_dsn, postgres_dsn, monkeypatch):
    assert copy_while_another_writes(full_dsn, postgres_dsn, monkeypatch) == [Unavailable]
    assert contents(postgres_dsn) == contents(full_dsn)
    with Wallet(full_dsn) as source:
        (*_, last) = source.accounts()
        assert source.topup(last.id, 1).amount == 1


@pytest.mark.parametrize("durable_dsn", ["postgres"], indirect=True)
@pytest.mark.parametrize("lock", ["SELECT 1", "LOCK TABLES OF ANOTHER ENGINE"])
def test_copy_of_an_engine_without_that_lock_is_undone_where_it_was_changed_under_it(
    full_dsn, new_schema, monkeypatch, lock
):
    """The control too: without the lock, what is written meanwhile is missing in the copy."""
    monkeypatch.setattr(wallet_postgres, "LOCK", lock)
    target = new_schema()
    with pytest.raises(ConfigurationError, match="the copy is not what was copied: stop both"):
        copy_while_another_writes(full_dsn, target, monkeypatch)
    assert contents(target)[1:] == [[], [], [], []]
    with Wallet(full_dsn) as source, Wallet(target) as copy:
        wallet_books.copy_wallet(source, copy)
    assert contents(target) == contents(full_dsn)


@pytest.mark.slow
def test_copy_may_take_longer_than_a_call(full_dsn, postgres_dsn, monkeypatch):
    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 1)
    with Wallet(full_dsn) as source, Wallet(postgres_dsn) as target:
        pauses = iter([1.5])
        wallet_books.copy_wallet(source, target, lambda *done: time.sleep(next(pauses, 0)))
    assert contents(postgres_dsn) == contents(full_dsn)


@pytest.mark.slow_on("postgres")
@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE accounts SET balance = balance + 1 WHERE id = (SELECT min(id) FROM accounts)",
        pytest.param(
            "UPDATE accounts SET last_sequence = last_sequence + 1 WHERE id = (SELECT max(id) FROM accounts)",
            marks=pytest.mark.slow,
        ),
        "DELETE FROM transactions WHERE sequence = 2",
        "UPDATE accounts SET held = held - 1 WHERE held > 0",
        pytest.param(
            "UPDATE accounts SET balance = balance - 1 WHERE balance > held",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "DELETE FROM holds WHERE status = 'active'",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_copy_of_books_that_are_wrong_is_refused_and_names_the_row(full_dsn, postgres_dsn, damage):
    with Wallet(full_dsn) as source, Wallet(postgres_dsn) as target:
        source.database.write(lambda tx: tx(damage))
        with pytest.raises(
            WrongBooks, match=r"^(accounts|transactions|holds) \(acc_\w{16}(, \d+)?\): "
        ):
            wallet_books.copy_wallet(source, target)
        assert contents(postgres_dsn)[1:] == [[], [], [], []]


# The operator's commands ##########################################################################

A, B, C, D = ("acc_" + letter * 16 for letter in "ABCD")

CHECKS = wallet_module._read_sql("checks.sql")
FOLLOWS, OWNED, KEPT, HELD, REFUNDED, TRANSFERRED, CLAIMED = CHECKS

changed_entry, changed_hold = partial(changed, "transactions"), partial(changed, "holds")

# The check that finds it, the wrong row and what is wrong with it, and how it came about.
DAMAGES = [
    (
        FOLLOWS,
        f"transactions ({A}, 2): the balance is 71, and should be 70",
        changed_entry(A, 2, balance=71),
    ),
    (
        FOLLOWS,
        f"transactions ({A}, 2): the balance is 70, and should be 69",
        changed_entry(A, 2, amount=31),
    ),
    (
        FOLLOWS,
        f"transactions ({A}, 4): the balance is 75, and should be 85",
        changed_entry(A, 4, type="'topup'"),
    ),
    (
        FOLLOWS,
        f"transactions ({A}, 1): the balance is 101, and should be 100",
        changed_entry(A, 1, balance=101),
    ),
    (
        FOLLOWS,
        f"transactions ({A}, 5): the entry before it is missing",
        f"DELETE FROM transactions WHERE account_id = '{A}' AND sequence = 4",
    ),
    (
        FOLLOWS,
        f"transactions ({A}, 4): its time is before that of the entry before it",
        changed_entry(A, 4, created_at="created_at - 3600000000"),
    ),
    (
        FOLLOWS,
        f"transactions ({C}, 1): a number is out of its bounds",
        entry(C, 1, "topup", -5, -5),
        entry(C, 2, "topup", 5, 0),
        account(C, last_sequence=2),
    ),
    (
        FOLLOWS,
        f"transactions ({C}, 1): a number is out of its bounds",
        entry(C, 1, "topup", 0, 0),
        account(C, last_sequence=1),
    ),
    (
        FOLLOWS,
        f"transactions ({C}, 1): a number is out of its bounds",
        entry(C, 1, "topup", 2**53, 2**53),
        account(C, balance=2**53, last_sequence=1),
    ),
    (
        FOLLOWS,
        f"transactions ({C}, 0): a number is out of its bounds",
        entry(C, 0, "topup", 5, 5),
        account(C, balance=5),
    ),
    (
        OWNED,
        f"transactions ({D}, 1): its account is missing",
        f"DELETE FROM accounts WHERE id = '{D}'",
    ),
    *[
        (OWNED, f"transactions ({id}, 1): its account is missing", entry(id, 1, "topup", 5, 5))
        for id in ("acc_" + 16 * "0", "acc_" + 16 * "z")
    ],
    (KEPT, f"accounts ({A}): the balance is 57, and should be 56", account(A, balance=57)),
    (KEPT, f"accounts ({C}): the balance is 1, and should be 0", account(C, balance=1)),
    (KEPT, f"accounts ({D}): last_sequence is 3, and should be 2", account(D, last_sequence=3)),
    (
        KEPT,
        f"accounts ({D}): last_sequence is 2, and should be 1",
        f"DELETE FROM transactions WHERE account_id = '{D}' AND sequence = 2",
    ),
    (KEPT, f"accounts ({A}): held is 6, and should be 7", account(A, held=6)),
    (KEPT, f"accounts ({A}): held is 7, and should be 0", changed_hold(A, 10, status="'expired'")),
    (
        KEPT,
        f"accounts ({D}): more is held than there is",
        entry(D, 3, "hold", 200, 100),
        f"INSERT INTO holds VALUES ('{D}', 3, 200, 0, 'active', 0)",
        account(D, last_sequence=3, held=200),
    ),
    (
        HELD,
        f"transactions ({A}, 6): its row in holds is missing",
        f"DELETE FROM holds WHERE account_id = '{A}' AND sequence = 6",
    ),
    (
        HELD,
        f"holds ({A}, 2): the entry that made it is missing",
        f"INSERT INTO holds VALUES ('{A}', 2, 5, 0, 'expired', 0)",
    ),
    *[
        (
            HELD,
            f"holds ({id}, 1): the entry that made it is missing",
            f"INSERT INTO holds VALUES ('{id}', 1, 5, 0, 'active', 0)",
        )
        for id in ("acc_" + 16 * "0", "acc_" + 16 * "z")
    ],
    (HELD, f"holds ({A}, 5): the amount is 4, and should be 3", changed_hold(A, 5, amount=4)),
    (HELD, f"holds ({A}, 6): captured is 14, and should be 15", changed_hold(A, 6, captured=14)),
    (
        HELD,
        f"holds ({A}, 6): captured is 0, and should be 15",
        changed_hold(A, 6, captured=0, status="'released'"),
    ),
    (
        HELD,
        f"holds ({A}, 6): the status is expired, and should be captured",
        changed_hold(A, 6, status="'expired'"),
    ),
    (
        HELD,
        f"holds ({A}, 8): the status is expired, and should be released",
        changed_hold(A, 8, status="'expired'"),
    ),
    (
        HELD,
        f"holds ({A}, 5): the status is released, and should be active",
        changed_hold(A, 5, status="'released'"),
    ),
    (
        HELD,
        f"holds ({A}, 10): the status is released, and should be active",
        changed_hold(A, 10, status="'released'"),
        account(A, held=0),
    ),
    (
        HELD,
        f"holds ({A}, 6): it has ended 2 times",
        changed_entry(A, 2, reference=f"'hld_{A[4:]}_6'"),
    ),
    (
        HELD,
        f"holds ({A}, 8): the amount is 5, and that of its release 6",
        changed_entry(A, 9, amount=6),
    ),
    (
        HELD,
        f"holds ({A}, 6): more is captured than was held",
        changed_hold(A, 6, amount=14),
        changed_entry(A, 6, amount=14),
    ),
    (
        HELD,
        f"transactions ({A}, 2): the hold that it ends is missing",
        changed_entry(A, 2, reference="'hld_'"),
    ),
    (
        HELD,
        f"transactions ({A}, 2): the hold that it ends is missing",
        changed_entry(A, 2, reference=f"'hld_{B[4:]}_6'"),
    ),
    (
        HELD,
        f"holds ({A}, 8): the status is released, and should be active",
        changed_entry(A, 9, reference="NULL"),
    ),
    *[
        (
            REFUNDED,
            f"transactions ({A}, 3): the charge that it refunds is missing",
            changed_entry(A, 3, reference=wrong),
        )
        for wrong in (
            "NULL",
            "''",
            "'txn_'",
            f"'txn_{A[4:]}_1'",
            f"'txn_{A[4:]}_02'",
            f"'txn_{A[4:]}_99'",
            f"'txn_{B[4:]}_2'",
            f"'hld_{A[4:]}_2'",
            f"'txn_{A[4:]}_{'9' * 30}'",
            f"'txn_{A[4:]}_2x'",
        )
    ],
    (
        REFUNDED,
        f"transactions ({A}, 3): with it, 10 is refunded of a charge of 5",
        changed_entry(A, 3, reference=f"'txn_{A[4:]}_4'"),
    ),
    (
        TRANSFERRED,
        f"transactions ({A}, 11): no transfer_in of this amount is in the other account for it",
        changed_entry(A, 11, reference=f"'{C}'"),
    ),
    (
        TRANSFERRED,
        f"transactions ({A}, 11): no transfer_in of this amount is in the other account for it",
        changed_entry(B, 1, type="'topup'"),
    ),
    (
        TRANSFERRED,
        f"transactions ({B}, 1): no transfer_out of this amount is in the other account for it",
        changed_entry(A, 11, type="'charge'", reference="NULL"),
    ),
    (
        TRANSFERRED,
        f"transactions ({A}, 11): no transfer_in of this amount is in the other account for it",
        changed_entry(B, 1, amount=3, balance=3),
        account(B, balance=3),
    ),
    *[
        (CLAIMED, f"issuer_keys ({id}): no entry of this account has its key", damage)
        for id, damage in (
            (C, f"UPDATE issuer_keys SET account_id = '{C}'"),
            (D, changed_entry(D, 1, idempotency_key="'k'")),
        )
    ],
]


@pytest.mark.slow_on("postgres")
@pytest.mark.parametrize(
    ("check", "wrong", "damage"),
    [(check, wrong, damage) for check, wrong, *damage in DAMAGES],
    ids=range(len(DAMAGES)),
)
def test_verify_names_the_damaged_row_and_would_pass_without_the_check_that_finds_it(
    books, monkeypatch, check, wrong, damage
):
    assert wallet_books._verify_books(books, lambda *done: None) == (4, 14)
    for statement in damage:
        books(statement)
    with pytest.raises(WrongBooks) as found:
        wallet_books._verify_books(books, lambda *done: None)
    assert str(found.value) == wrong
    monkeypatch.setattr(
        wallet_books, "_read_sql", lambda name: [other for other in CHECKS if other != check]
    )
    wallet_books._verify_books(books, lambda *done: None)


@pytest.mark.parametrize("is_large", [False, True])
def test_verify_looks_at_every_part_of_the_accounts(books, monkeypatch, is_large):
    """And of an account that has many entries, each check is told of as it is done."""
    if is_large:
        monkeypatch.setattr(wallet_books, "VERIFY_LARGE", 1)
    for number in (1, 2, 3, 4):
        monkeypatch.setattr(wallet_books, "VERIFY_ACCOUNTS", number)
        told = []
        assert wallet_books._verify_books(books, lambda *done, told=told: told.append(done)) == (
            4,
            14,
        )
        assert told == sorted(told)
        assert told[-1] == (18, 18)
        assert is_large or len(told) in (4 // number, 4 // number + 1)
        if number == 4:
            assert (len(told) > 2) is is_large
        for id in (A, B, C, D):
            books("SAVEPOINT whole")
            books(account(id, balance="balance + 1"))
            with pytest.raises(WrongBooks, match=f"accounts .{id}.: the balance is"):
                wallet_books._verify_books(books, lambda *done: None)
            books("ROLLBACK TO whole")


@pytest.mark.slow_on("postgres")
def test_verify_of_many_parts_at_once_names_the_first_row_that_is_wrong(durable_dsn, monkeypatch):
    with Wallet(durable_dsn) as wallet:
        ids = sorted(wallet.register("Ada")[0].id for _ in range(20))
        for id in ids * 2:
            wallet.topup(id, 1)
        for name, number in (("VERIFY_ACCOUNTS", 1), ("VERIFY_ENTRIES", 3)):
            with monkeypatch.context() as patched:
                patched.setattr(wallet_books, name, number)
                told = []
                found = wallet_books.verify(wallet, lambda *done, told=told: told.append(done))
                assert found == (20, 40)
                assert told == sorted(told)
                assert len(told) >= 10
                assert told[-1] == (60, 60)
        monkeypatch.setattr(wallet_books, "VERIFY_ACCOUNTS", 1)
        for id in (ids[-1], ids[10], ids[3]):
            wallet.database.write(lambda tx, id=id: tx(account(id, balance=7)))
            for _ in range(10):
                with pytest.raises(WrongBooks, match=f"accounts .{id}.: the balance is 7"):
                    wallet_books.verify(wallet)
        for id in ids:
            wallet.database.write(lambda tx, id=id: tx(account(id, balance=2)))


INDEXES = (
    "sqlite_autoindex_transactions_1",
    "sqlite_autoindex_transactions_2",
    "transactions_by_type",
    "transactions_by_time",
    "refunds_by_charge",
)
# By which an index of a file is damaged that was opened with writable_schema. It is swapped for
# another one, which was made for it, lacks one row, and is sound afterwards.
SWAP = """
    UPDATE sqlite_master SET rootpage = (
        SELECT sum(rootpage) FROM sqlite_master WHERE name IN ('{name}', 'other')) - rootpage
    WHERE name IN ('{name}', 'other')"""


def damage_index(path, name, *, lacks, rows=()):
    """Let an index lack a row, or have it though `rows` takes it from the table."""
    columns, condition = {
        INDEXES[0]: ("account_id, sequence", "1"),
        INDEXES[1]: ("account_id, idempotency_key", "1"),
        INDEXES[2]: ("account_id, type, sequence", "1"),
        INDEXES[3]: ("created_at, sequence", "type NOT IN ('hold', 'release')"),
        INDEXES[4]: ("account_id, reference", "type = 'refund'"),
    }[name]
    whole = f"CREATE INDEX other ON transactions ({columns}) WHERE {condition}"

    def run(*statements):
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as damaged:
            damaged.execute("PRAGMA writable_schema = ON")
            for statement in statements:
                damaged.execute(statement)

    if lacks:
        run(f"{whole} AND rowid <> 6")
        run(SWAP.format(name=name), f"UPDATE sqlite_master SET sql = \"{whole}\" WHERE name = 'other'")
    else:
        run(whole)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            ((row,),) = connection.execute(
                "SELECT type || ',' || tbl_name || ',' || rootpage FROM sqlite_master WHERE name = 'other'"
            ).fetchall()
        root = row.split(",")[2]
        run("DELETE FROM sqlite_master WHERE name = 'other'")
        run(*rows)
        run(
            f"INSERT INTO sqlite_master VALUES ('index', 'other', 'transactions', {root}, \"{whole}\")",
            SWAP.format(name=name),
        )


@pytest.mark.parametrize("name", INDEXES)
@pytest.mark.parametrize("lacks", [True, False], ids=["lacks", "has too much"])
def test_verify_finds_what_an_index_of_the_transactions_lacks_or_has_too_much(
    file_dsn, tmp_path, monkeypatch, name, lacks
):
    with Wallet(file_dsn) as wallet:
        id = wallet.register("Ada")[0].id
        charges = [wallet.topup(id, 9), wallet.charge(id, 2), wallet.charge(id, 2)]
        for charge in charges[1:]:
            wallet.refund(id, charge.id, 1)
        wallet.refund(id, charges[1].id, 1)  # The sixth row, which is the last.
        assert wallet_books.verify(wallet) == (1, 6)
    damage_index(
        tmp_path / "wallet.db", name, lacks=lacks,
        rows=("DELETE FROM transactions WHERE sequence = 6",
              "UPDATE accounts SET balance = 7, last_sequence = 5"))
    with Wallet(file_dsn, read_only=True) as wallet:
        ((found,),) = wallet.database.read(lambda tx: tx("PRAGMA integrity_check(1)"))
        assert found != "ok"  # What SQLite itself says of it.
        with pytest.raises(WrongBooks) as wrong:
            wallet_books.verify(wallet)
        is_first = name == INDEXES[0]
        assert name in str(wrong.value) or (is_first and str(wrong.value).startswith("accounts "))
        if not is_first:  # Without the check that finds it, nothing would.
            found_by = "check_rows" if lacks else "check_index"
            monkeypatch.setattr(
                wallet_books._FileChecks, found_by, lambda *given: [])
            if lacks:
                monkeypatch.setattr(wallet_books._FileChecks, "check_index", lambda *given: [])
            wallet_books.verify(wallet)


def test_verify_finds_an_entry_in_a_wrong_place_that_hides_those_behind_it(
    file_dsn, tmp_path, monkeypatch
):
    path = tmp_path / "wallet.db"
    with Wallet(file_dsn) as wallet:
        id = wallet.register("Ada")[0].id
        for _ in range(6):
            wallet.topup(id, 1)
        ((page,),) = wallet.database.read(
            lambda tx: tx("SELECT rootpage FROM sqlite_master WHERE name = ?", INDEXES[0])
        )
    content = bytearray(path.read_bytes())
    places, start = [], 4096 * (page - 1)
    while (place := content.find(id.encode(), start, 4096 * page)) > 0:
        places, start = [place, *places], place + 1  # The first entry is at the end of the page.
    assert len(places) == 6
    content[places[3] : places[3] + len(id)] = b"acc_zzzzzzzzzzzzzzzz"
    path.write_bytes(content)
    with Wallet(file_dsn, read_only=True) as wallet:
        with pytest.raises(WrongBooks, match=f"is damaged: .* index {INDEXES[0]}"):
            wallet_books.verify(wallet)
        monkeypatch.setattr(wallet_books._FileChecks, "check_counts", lambda *given: None)
        wallet_books.verify(wallet)


def test_verify_finds_a_key_that_has_two_entries(file_dsn, tmp_path):
    path = tmp_path / "wallet.db"
    with Wallet(file_dsn) as wallet:
        id = wallet.register("Ada")[0].id
        for key in ("key-one-1", "key-one-2"):
            wallet.topup(id, 1, key=key)
        wallet_books.verify(wallet)
    path.write_bytes(path.read_bytes().replace(b"key-one-2", b"key-one-1"))
    with (
        Wallet(file_dsn, read_only=True) as wallet,
        pytest.raises(WrongBooks, match="twice in it"),
    ):
        wallet_books.verify(wallet)


@pytest.mark.parametrize(
    ("unique", "columns", "other"),
    [
        ("", "lower(type)", "lower(description)"),
        ("", "account_id COLLATE NOCASE", "description COLLATE NOCASE"),
        ("UNIQUE", "account_id, sequence, type", "account_id, sequence, description"),
    ],
)
def test_verify_leaves_an_index_of_somebody_else_to_sqlite(
    file_dsn, tmp_path, unique, columns, other
):
    with Wallet(file_dsn) as wallet:
        id = wallet.register("Ada")[0].id
        wallet.topup(id, 1)
    with contextlib.closing(sqlite3.connect(tmp_path / "wallet.db")) as connection:
        connection.execute(f"CREATE {unique} INDEX other ON transactions ({columns})")
        with Wallet(file_dsn, read_only=True) as wallet:
            assert wallet_books.verify(wallet) == (1, 1)
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(
            f"UPDATE sqlite_master SET sql = 'CREATE {unique} INDEX other ON transactions ({other})'"
            " WHERE name = 'other'"
        )
        connection.commit()
    with (
        Wallet(file_dsn, read_only=True) as wallet,
        pytest.raises(WrongBooks, match="row 1 missing from index other"),
    ):
        wallet_books.verify(wallet)


def test_verify_of_a_wallet_without_accounts_has_nothing_to_say(dsn):
    with Wallet(dsn) as wallet:
        assert wallet_books.verify(wallet) == (0, 0)


def spend_in_every_way(wallet, ids, number, stopped):
    """Do all that there is with some accounts until told to stop.

    Return how many operations there were.
    """
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


@pytest.mark.slow_on("postgres")
@pytest.mark.parametrize("times", [20, torture(300)])
def test_verify_raises_no_false_alarm_while_others_write(durable_dsn, times, monkeypatch, report):
    monkeypatch.setattr(wallet_books, "VERIFY_ACCOUNTS", 3)
    stopped = threading.Event()
    with (
        Wallet(durable_dsn) as wallet,
        Wallet(durable_dsn, read_only=True) as looking,
        ThreadPoolExecutor(4) as threads,
    ):
        ids = [wallet.register("Ada")[0].id for _ in range(6)]
        spending = [
            threads.submit(spend_in_every_way, wallet, ids, number, stopped) for number in range(4)
        ]
        try:
            counts = [wallet_books.verify(looking)]
            while len(counts) < times or counts[-1][1] < counts[0][1] + 300:
                counts.append(wallet_books.verify(looking))
        finally:
            stopped.set()
        operations = sum(one.result(timeout=30) for one in spending)
        check_books(wallet)
    assert counts == sorted(counts)
    report(
        f"0 false alarms in {len(counts)} looks, during {operations:,} rounds of all operations, which made"
        f" {counts[-1][1]:,} entries"
    )


def test_verify_writes_nothing_and_exits_0_or_1_with_the_row(
    durable_dsn, tmp_path, monkeypatch, capsys
):
    fill_books(durable_dsn, monkeypatch)
    is_file = durable_dsn.startswith("sqlite:")
    with Wallet(durable_dsn) as wallet:
        location = wallet.database.location
    content = (tmp_path / "wallet.db").read_bytes() if is_file else contents(durable_dsn)
    assert wallet_cli.main(["verify", "--dsn", durable_dsn]) == 0
    assert capsys.readouterr() == (
        f"verified: {location} has 4 accounts and 14 entries that agree\n",
        "",
    )
    assert content == ((tmp_path / "wallet.db").read_bytes() if is_file else contents(durable_dsn))
    with Wallet(durable_dsn) as wallet:
        wallet.database.write(lambda tx: tx(account(A, balance=57)))
    assert wallet_cli.main(["--dsn", durable_dsn, "verify"]) == 1
    assert capsys.readouterr() == (
        "",
        f"wallet: accounts ({A}): the balance is 57, and should be 56\n",
    )


def test_verify_names_the_first_fault_that_sqlite_finds(file_dsn, tmp_path, monkeypatch, capsys):
    fill_books(file_dsn, monkeypatch)
    whole = (tmp_path / "wallet.db").read_bytes()
    for damage, wrong in (
        (
            "UPDATE sqlite_master SET sql = 'CREATE INDEX active_holds ON holds (account_id, amount)' WHERE name = "
            "'active_holds'",
            f"{tmp_path}/wallet.db is damaged: row 1 missing from index active_holds",
        ),
        (account(A, balance=-1), f"accounts ({A}): the balance is -1, and should be 56"),
    ):
        (tmp_path / "wallet.db").write_bytes(whole)
        with contextlib.closing(
            sqlite3.connect(tmp_path / "wallet.db", isolation_level=None)
        ) as damaged:
            for pragma in ("ignore_check_constraints = ON", "writable_schema = ON"):
                damaged.execute(f"PRAGMA {pragma}")
            damaged.execute(damage)
        assert wallet_cli.main(["verify", "--dsn", file_dsn]) == 1
        out, err = capsys.readouterr()
        assert (out, err.startswith(f"wallet: {wrong}"), err.count("\n")) == ("", True, 1), err


def test_verify_of_a_file_with_any_damaged_page_is_one_line_and_exit_code_1(
    file_dsn, tmp_path, monkeypatch, capsys
):
    fill_books(file_dsn, monkeypatch)
    whole = (tmp_path / "wallet.db").read_bytes()
    codes = Counter()
    for start in range(0, len(whole), 4096):
        for junk in (b"\xff" * 4096, bytes(4096), os.urandom(4096)):
            (tmp_path / "wallet.db").write_bytes(whole[:start] + junk + whole[start + 4096 :])
            code = wallet_cli.main(["verify", "--dsn", file_dsn])
            out, err = capsys.readouterr()
            assert (out, err.startswith("wallet: "), err.count("\n")) == ("", True, 1), (
                start,
                out,
                err,
            )
            codes[start == 0, code] += 1
    (tmp_path / "wallet.db").write_bytes(whole[: 4096 * 3])
    assert wallet_cli.main(["verify", "--dsn", file_dsn]) == 1
    assert codes == {
        (True, 2): 3,
        (False, 1): len(whole) // 4096 * 3 - 3,
    }  # Without its first page it is any file.


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
            process = subprocess.Popen(
                [sys.executable, *MODULE, *arguments, "--dsn", file_dsn],
                stdout=subprocess.PIPE,
                stderr=theirs,
                env=environment(),
            )
            os.close(theirs)
            out, _ = process.communicate(timeout=60)
            shown = os.read(ours, 65536).decode()
        assert process.returncode == 0
        assert out.startswith(b"verified: ")
        assert {one.rstrip() for one in shown.split("\r")} == {"[####################] 100 %", ""}


# Which leaves out what is still in the log, and may take a page before a change and another one
# after it.
COPIES = {
    "backup": wallet_books.back_up,
    "careless": lambda wallet, path: shutil.copyfile(wallet.database.location, path),
}


def back_up_under_load(folder, times, back_up):
    """Back a wallet up while a server takes topups.

    Return how many answers there were before, and were lost.
    """
    dsn, known, acknowledged, lost = f"sqlite:///{folder}/wallet.db", [], 0, 0
    with served("--dsn", dsn, "--log-level", "error") as server:
        tokens = [
            send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"] for _ in range(4)
        ]

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
                        assert not any(one.done() for one in running), [
                            one.result() for one in running
                        ]
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
def test_backup_under_load_restores_all_that_was_answered_before_it(
    tmp_path, wallets, times, report
):
    found = []
    for number in range(wallets):
        (tmp_path / str(number)).mkdir()
        found.append(back_up_under_load(tmp_path / str(number), times, COPIES["backup"]))
    acknowledged, lost = map(sum, zip(*found, strict=True))
    assert (acknowledged >= 20 * times * wallets, lost) == (True, 0)
    report(
        f"{times * wallets} backups, each restored, with books that agree: of {acknowledged:,} answers from before"
        f" them, {lost} lost"
    )


def test_control_a_plain_copy_of_the_file_loses_what_is_still_in_the_log(tmp_path):
    assert back_up_under_load(tmp_path, 1, COPIES["careless"])[1] > 0


def test_backup_is_one_file_for_its_owner_only_and_is_a_wallet_by_itself(
    file_dsn, tmp_path, capsys
):
    folder = tmp_path / "a folder"
    folder.mkdir()
    with Wallet(file_dsn) as wallet:
        ada, token = wallet.register("Ada")
        wallet.topup(ada.id, 5)
        before = {path.name: path.read_bytes() for path in tmp_path.glob("wallet.db*")}
        assert wallet_cli.main(["backup", str(folder / "backup.db"), "--dsn", file_dsn]) == 0
        assert {
            path.name: path.read_bytes()
            for path in tmp_path.glob("wallet.db*")
            if path.suffix != ".db-shm"
        } == {name: content for name, content in before.items() if not name.endswith("-shm")}
        wallet.topup(ada.id, 6)
    (backup,) = folder.iterdir()
    assert (backup.name, oct(backup.stat().st_mode & 0o777), backup.stat().st_nlink) == (
        "backup.db",
        "0o600",
        1,
    )
    size = f"{backup.stat().st_size:,}"
    assert (
        capsys.readouterr().out
        == f"verified: {backup} has {size} bytes, with 1 account and 1 entry\n"
    )
    assert wallet_cli.main(["verify", "--dsn", f"sqlite:///{backup}"]) == 0
    assert list(folder.iterdir()) == [backup]
    with Wallet(f"sqlite:///{backup}") as restored:
        assert restored.authenticate(token).balance == 5
        assert restored.topup(ada.id, 1).balance == 6


def test_backup_never_takes_the_place_of_a_file_and_leaves_nothing_where_it_fails(
    file_dsn, tmp_path, monkeypatch, capsys
):
    with Wallet(file_dsn) as wallet:
        wallet.register("Ada")
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("mine")
    Path("dangling").symlink_to("nowhere")
    before = {path.name for path in tmp_path.iterdir()} | {"wallet.db-shm", "wallet.db-wal"}

    def told(code, *arguments):
        assert wallet_cli.main(["backup", *arguments, "--dsn", file_dsn]) == code
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert {path.name for path in tmp_path.iterdir()} <= before
        assert not list(tmp_path.glob("no*"))
        return err

    assert told(2, "taken") == f"wallet: {tmp_path}/taken is there already: name a new file\n"
    assert told(2, "dangling") == f"wallet: {tmp_path}/dangling is there already: name a new file\n"
    assert (
        told(2, "no/backup")
        == f"wallet: cannot back up to {tmp_path}/no/backup: No such file or directory\n"
    )
    assert (
        told(2, "n" * 256)
        == f"wallet: cannot back up to {tmp_path}/{'n' * 256}: File name too long\n"
    )
    verify = wallet_books.verify

    def lose_a_race(copy, report):
        Path("raced").write_text("mine")
        before.add("raced")
        return verify(copy, report)

    monkeypatch.setattr(wallet_books, "verify", lose_a_race)
    assert told(2, "raced") == f"wallet: cannot back up to {tmp_path}/raced: File exists\n"
    for number in (signal.SIGINT, signal.SIGTERM):
        monkeypatch.setattr(
            wallet_books, "verify", lambda *arguments, number=number: signal.raise_signal(number)
        )
        assert told(130, "interrupted") == "wallet: interrupted\n"
    monkeypatch.setattr(wallet_books, "verify", verify)
    with Wallet(file_dsn) as wallet:
        wallet.database.write(lambda tx: tx("UPDATE accounts SET balance = 1"))
    assert re.fullmatch(
        r"wallet: accounts \(acc_\w+\): the balance is 1, and should be 0\n", told(2, "wrong")
    )
    assert Path("taken").read_text() == Path("raced").read_text() == "mine"


def test_only_wrong_books_end_a_command_with_1(file_dsn, monkeypatch, caplog):
    """Else a fault, or an output that is not there, would wake somebody at night."""
    with Wallet(file_dsn) as wallet:
        ada, token = wallet.register("Ada")
    closed = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", sys.executable, *MODULE, "token", ada.id, "--dsn", file_dsn],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        timeout=60,
    )
    assert (closed.returncode, closed.stderr) == (
        2,
        "wallet: stdout is closed, and a command writes to it\n",
    )
    with Wallet(file_dsn) as wallet:
        assert wallet.authenticate(token).id == ada.id
    silent = subprocess.run(
        ["sh", "-c", '"$@" 2>&-', "sh", sys.executable, *MODULE, "verify", "--dsn", file_dsn],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        timeout=60,
    )
    assert (silent.returncode, silent.stdout.partition(":")[0]) == (0, "verified")
    # Nor does what is for stderr, where that is closed, get into the data.
    for arguments, lines in (["token", ada.id], 1), (["charge", ada.id, "5", "--json"], 0):
        program = [*MODULE, *arguments, "--dsn", file_dsn]
        silent = subprocess.run(
            ["sh", "-c", '"$@" 2>&-', "sh", sys.executable, *program],
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
            timeout=60,
        )
        assert silent.stdout.count("\n") == lines, silent.stdout
    monkeypatch.setattr(wallet_books, "verify", lambda *arguments: 1 / 0)
    assert wallet_cli.main(["verify", "--dsn", file_dsn]) == 2
    assert "ZeroDivisionError" in caplog.text


def test_backup_to_a_disk_that_is_full_is_one_line_and_leaves_nothing(file_dsn, tmp_path, capsys):
    with Wallet(file_dsn) as wallet:
        wallet.register("Ada")
        wallet.database.write(lambda tx: tx("SELECT 1"))
        before = {path.name for path in tmp_path.iterdir()}
        with files_cannot_grow():
            assert (
                wallet_cli.main(["backup", str(tmp_path / "backup.db"), "--dsn", file_dsn]) == 2
            )
        out, err = capsys.readouterr()
        assert (out, {path.name for path in tmp_path.iterdir()}) == ("", before)
        assert re.fullmatch(rf"wallet: cannot back up to {tmp_path}/backup\.db: [^\n]+\n", err)


def test_backup_by_a_program_is_for_sqlite_and_says_so(postgres_wallet, tmp_path):
    with pytest.raises(ConfigurationError, match=r"^postgresql://\S+ is backed up by pg_dump$"):
        wallet_books.back_up(postgres_wallet, str(tmp_path / "backup.db"))
    assert list(tmp_path.iterdir()) == []


def test_backup_of_what_is_in_memory_is_refused(capsys):
    with (
        Wallet() as wallet,
        pytest.raises(ConfigurationError, match=r"in memory .* there is nothing to back up"),
    ):
        wallet_books.back_up(wallet, "backup.db")
    assert wallet_cli.main(["backup", "backup.db", "--dsn", "sqlite://"]) == 2
    assert capsys.readouterr().err == (
        "wallet: what is in memory would be gone at once: name a file\n"
    )
    assert not Path("backup.db").exists()


def test_backup_over_postgres_names_the_commands_that_do_it_and_they_do(
    new_schema, postgres_server, tmp_path, monkeypatch, capsys
):
    dsn, password = new_schema(on=postgres_server), "pass%20word"
    fill_books(dsn, monkeypatch)
    before = contents(dsn)
    with_password = dsn.replace("postgres@", f"postgres:{password}@")
    file = tmp_path / "a backup"
    assert wallet_cli.main(["backup", str(file), "--dsn", with_password]) == 2
    out, err = capsys.readouterr()
    assert (out, "pass word" in err, password in err) == ("", False, False)
    first, dump, *_, restore = err.splitlines()
    assert first == "wallet: Postgres is backed up while it serves by"
    schema = dsn.partition("%3D")[2]
    for run in (dump, None, restore):
        if run:
            subprocess.run(
                [
                    "bash",
                    "-c",
                    f"PATH={postgres_server.server.bin_path}:$PATH; {run}",
                ],
                check=True,
                timeout=60,
            )
        else:
            postgres_server.query(f"DROP SCHEMA {schema} CASCADE")
            postgres_server.query(f"CREATE SCHEMA {schema}")
            assert file.stat().st_mode & 0o777 == 0o600
    assert contents(dsn) == before
    assert wallet_cli.main(["verify", "--dsn", dsn]) == 0


@pytest.mark.parametrize(
    ("code", "nothing", "amounts"),
    [
        ("JPY", "0", ("9007199254740991", "9007199254740990")),
        ("HUF", "0.00", ("90071992547409.91", "90071992547409.90")),
        ("KWD", "0.000", ("9007199254740.991", "9007199254740.990")),
    ],
)
def test_accounts_are_listed_as_a_table_and_as_json_however_odd_their_names(
    durable_dsn, monkeypatch, capsys, code, nothing, amounts
):
    monkeypatch.setattr(wallet_books, "COPY_ROWS", 2)
    names = ["Ada", "日本 😀", "\u202egnol", "a\u2028b", "Ä" * 100]
    with Wallet(durable_dsn, currency=code) as wallet:
        made = sorted((wallet.register(name)[0] for name in names), key=lambda account: account.id)
        rich = made[2].id
        wallet.topup(rich, AMOUNT_MAX)
        wallet.hold(rich, 1)
        wallet.freeze(rich)
        shown = sorted(wallet.accounts(), key=lambda account: account.id)
        assert shown == [wallet.account(account.id) for account in made]
    assert wallet_cli.main(["accounts", "--dsn", durable_dsn, "--json"]) == 0
    lines = sorted(
        map(json.loads, capsys.readouterr().out.splitlines()), key=lambda account: account["id"]
    )
    assert lines == json.loads(json.dumps([wallet_module._to_json(account) for account in shown]))
    assert wallet_cli.main(["accounts", "--dsn", durable_dsn]) == 0
    header, *rows = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    assert header == [
        *("id", f"balance ({code})", f"available ({code})", "name", "frozen", "created_at")
    ]
    assert {row[3] for row in rows} == {"Ada", "日本 😀", "\\u202egnol", "a\\u2028b", "Ä" * 100}
    assert {(*row[:3], row[4]) for row in rows} == {
        (id, *((*amounts, "yes") if id == rich else (nothing, nothing, "no")))
        for id in (account.id for account in made)
    }
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row[5]) for row in rows)


@pytest.mark.slow
def test_accounts_take_little_memory_and_a_reader_may_stop_reading(file_dsn):
    with Wallet(file_dsn) as wallet:
        row = "(?, 'Ada', ?, 0, 0, 0, 0, 0, 0)"
        for first in range(0, 20_000, 5000):
            values = [
                value
                for number in range(first, first + 5000)
                for value in (f"acc_{number:016}", "f" * 64)
            ]
            wallet.database.write(
                lambda tx, values=values: tx(
                    f"INSERT INTO accounts VALUES {', '.join([row] * 5000)}", *values
                )
            )
        tracemalloc.start()
        assert sum(1 for _ in wallet.accounts()) == 20_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1_000_000
    program = [sys.executable, *MODULE, "accounts", "--dsn", file_dsn]
    listing = subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert listing.stdout.readline().startswith("id ")
    listing.stdout.close()
    assert (listing.wait(timeout=60), listing.stderr.read()) == (141, "")
    listing.stderr.close()
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            program, stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), timeout=60
        )
    assert (done.returncode, done.stderr) == (2, "wallet: [Errno 28] No space left on device\n")


def test_accounts_can_be_shown_where_only_ascii_can(file_dsn):
    with Wallet(file_dsn) as wallet:
        wallet.register("Ä日")
    done = command("accounts", WALLET_DSN=file_dsn, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert " \\xc4\\u65e5   no  " in done.stdout


def test_command_token_prints_a_new_one_alone_and_the_old_one_is_dead(durable_dsn, capsys):
    with Wallet(durable_dsn) as wallet:
        ada, lost = wallet.register("Ada")
        assert wallet_cli.main(["token", ada.id, "--dsn", durable_dsn]) == 0
        out, err = capsys.readouterr()
        assert wallet.authenticate(out.removesuffix("\n")) == ada
        assert out.strip() not in err
        assert (
            err == f"wallet: this is the token of {ada.id} from now on, and the old one is dead\n"
        )
        with pytest.raises(Unauthorized):
            wallet.authenticate(lost)
        assert wallet_cli.main(["token", "acc_0000000000000000", "--dsn", durable_dsn]) == 2
        assert capsys.readouterr() == ("", "wallet: There is no such account.\n")


WITH_WALLET = [one for one in wallet_commands.COMMANDS if one.name not in ("serve", "completion")]


@pytest.mark.parametrize("one", wallet_commands.COMMANDS, ids=lambda one: one.name)
def test_every_command_helps_with_an_example_of_itself(one, capsys):
    with pytest.raises(SystemExit, match="0"):
        wallet_cli.main([one.name, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Example: python wallet.py {one.example}" in shown
    arguments = one.arguments | (wallet_commands.JSON if one.run else {})
    assert all(options["help"] in shown for options in arguments.values())
    assert one.example.startswith(one.name)
    with pytest.raises(SystemExit, match="0"):
        wallet_cli.main(["--help"])
    assert re.search(rf"(?m)^ +{one.name} +{one.meaning[:20]}", capsys.readouterr().out)


@pytest.mark.parametrize("one", WITH_WALLET, ids=lambda one: one.name)
def test_example_of_every_command_works_and_only_init_makes_a_database(
    one, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    example = one.example.replace("postgresql://db/wallet", "sqlite:///copy.db")
    arguments = shlex.split(example.replace("--json", ""))
    if one.name == "init":
        assert wallet_cli.main(arguments) == 0
        return
    assert wallet_cli.main(arguments) == 2
    advice = (
        r"cannot open /\S*/wallet\.db: there is no such file: is its disk mounted\?"
        r" Name another DSN, or let the command init make a new one"
    )
    missing = "there is no file backup.db: name a backup" if one.name == "restore" else advice
    assert re.fullmatch(rf"wallet: {missing}\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
    ids = iter(["4fKq0ZbT9xWm2Lr7", "9sXv3HdP1cRy6Nw2", "c" * 16])
    monkeypatch.setattr(
        wallet_module, "_random_base62", lambda length: next(ids) if length == 16 else "s" * 32
    )
    with Wallet("sqlite:///wallet.db") as wallet:
        ada, _ = wallet.register("Ada")
        wallet.register("Bob")
        wallet.topup(ada.id, 2000)
        wallet.charge(ada.id, 100)
        wallet.hold(ada.id, 100)
        if one.name == "restore":
            wallet_books.back_up(wallet, "backup.db")
    assert wallet_cli.main(arguments) == 0
    assert wallet_cli.main([one.name, "--port", "x", *arguments[1:]]) == 2
    assert "--port or WALLET_PORT must be an integer" in capsys.readouterr().err


def test_options_may_come_before_a_command_and_behind_it(file_dsn, monkeypatch):
    monkeypatch.setenv("WALLET_THREADS", "3")
    monkeypatch.setenv("WALLET_LOG_LEVEL", "error")
    settings = wallet_cli._parse_arguments(
        ["--dsn", file_dsn, "--port", "1", "verify", "--threads", "5", "--port", "2"]
    )
    assert (settings["dsn"], settings["port"], settings["threads"]) == (file_dsn, 2, 5)
    assert (settings["log-level"], settings["command"]) == ("error", "verify")
