"""Databases of older versions are brought to this one, and nothing is lost."""

from __future__ import annotations

import hashlib
import json
import re
from functools import partial

import pytest

import wallet as wallet_module
import wallet_tables
from tests.support import HERE, check_books, command, contents, schema_of, together
from wallet import IdempotencyKeyReused, Wallet

# Opening a database ###############################################################################


def test_newer_schema_is_refused_and_left_as_it_is(durable_dsn):
    with Wallet(durable_dsn) as wallet:
        wallet.database.write(lambda tx: tx("UPDATE wallet SET schema_version = 99"))
    before = contents(durable_dsn)
    done = command("--dsn", durable_dsn, "--port", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "wallet: the database has schema version 99, and this wallet has 4: use a newer wallet\n"
    )
    assert contents(durable_dsn) == before


@pytest.mark.slow_on("postgres-4", "file-4")
@pytest.mark.parametrize("processes", [1, 4])
def test_database_of_the_first_version_is_brought_to_this_one_and_keeps_all(durable_dsn, processes):
    """As the first version made it, but for CHECKs; its keys are known, and its tokens work."""
    token = wallet_module._make_token("acc_" + "A" * 16)
    digest = hashlib.sha256(json.dumps(["topup", 12, "día"]).encode()).hexdigest()
    database = wallet_module.open_database(durable_dsn, 1, True)
    for statement in schema_of(1):
        database.write(lambda tx, sql=statement: tx(sql))
    hashed = wallet_module._hash_token(token)
    database.write(
        lambda tx: (
            tx("INSERT INTO accounts VALUES (?, 'Ada', ?, 7, 2, 1000)", "acc_" + "A" * 16, hashed),
            tx("INSERT INTO accounts VALUES (?, 'Bob', ?, 0, 0, 1000)", "acc_" + "B" * 16, hashed),
            tx(
                "INSERT INTO transactions VALUES (?, 1, 'topup', 12, 12, 'día', 'k1', ?, 2000)",
                "acc_" + "A" * 16,
                digest,
            ),
            tx(
                "INSERT INTO transactions VALUES (?, 2, 'charge', 5, 7, NULL, 'k2', ?, 1500)",
                "acc_" + "A" * 16,
                digest,
            ),
        )
    )
    database.close()
    opened = together(
        *[lambda: command("freeze", "acc_" + "A" * 16, WALLET_DSN=durable_dsn)] * processes
    )
    assert [done.returncode for done in opened] == [0] * processes, opened
    with Wallet(durable_dsn) as wallet:
        assert (wallet.currency, wallet.currency_digits) == ("JPY", 0)
        wallet.freeze("acc_" + "A" * 16, False)
        ada = wallet.authenticate(token)
        assert (ada.name, ada.balance, ada.available, ada.frozen) == ("Ada", 7, 7, False)
        again = wallet.topup(ada.id, 12, "día", key="k1")
        assert (again.replayed, again.balance, again.metadata, again.reference) == (
            True,
            12,
            {},
            None,
        )
        assert (
            wallet.database.write(partial(wallet_tables.make_step, wallet.database.adapt)) == 4
        )  # As for a process that comes too late.
        assert wallet.refund(ada.id, f"txn_{'A' * 16}_2").balance == 12
        assert wallet.transfer(ada.id, "acc_" + "B" * 16, 2).balance == 10
        wallet.hold(ada.id, 10)
        history = wallet.transactions(ada.id, after="0").transactions
        assert [one.id[-1] for one in history] == ["1", "2", "3", "4"]
        assert (
            history[0].created_at == history[1].created_at
        )  # The clock had gone back, and times do not.
        check_books(wallet)
        tables = {
            "file": "SELECT name FROM sqlite_master WHERE type = 'table'",
            "postgres": "SELECT table_name FROM information_schema.tables WHERE table_schema = current_schema()",
        }
        sql = tables["file" if durable_dsn.startswith("sqlite") else "postgres"]
        assert {row[0] for row in wallet.database.read(lambda tx: tx(sql))} == {
            "wallet",
            "accounts",
            "transactions",
            "holds",
            "issuer_keys",
        }


def shape(database):
    """Return the tables as the engine has them: columns, CHECKs, keys and indexes."""
    if database.location.startswith("postgresql"):
        statements = [
            """SELECT table_name, ordinal_position, column_name, data_type, collation_name, is_nullable
               FROM information_schema.columns WHERE table_schema = current_schema()""",
            """SELECT conrelid::regclass::text, pg_get_constraintdef(oid) FROM pg_constraint
               WHERE connamespace = current_schema()::regnamespace""",
            r"""SELECT tablename, regexp_replace(indexdef, '^.* USING ', '') FROM pg_indexes
                WHERE schemaname = current_schema()""",
        ]
    else:
        statements = ["SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"]
    return [
        sorted(tuple(plain(value) for value in row) for row in database.read(lambda tx, one=one: tx(one)))
        for one in statements
    ]


def plain(sql):
    """Return SQL without its comments, and without what makes no difference."""
    if isinstance(sql, str):
        sql = re.sub("--.*| IF NOT EXISTS", "", sql)
        sql = re.sub(r" ?([()]) ?", r"\1", re.sub(r"\s+", " ", sql))
    return sql


def test_schema_of_a_version_is_frozen():
    """Whoever changes schema.sql makes a new version, and keeps its tables in tests/schemas."""
    kept = (HERE / "tests" / "schemas" / f"{wallet_module.SCHEMA_VERSION}.sql").read_text()
    now = (HERE / "schema.sql").read_text()
    assert plain(kept).strip() == plain(now).strip()


ACCOUNT_IDS = [f"acc_{letter * 16}" for letter in "AB"]
ROWS = {  # Of each version: what its tables hold before the step to the next.
    1: [
        *[f"INSERT INTO accounts VALUES ('{one}', 'Ada', '{'f' * 64}', 7, 2, 1000)"
          for one in ACCOUNT_IDS],
        *[f"INSERT INTO transactions VALUES ('{one}', 1, 'topup', 12, 12, 'x', 'k1', '{'0' * 64}', 1)"
          for one in ACCOUNT_IDS],
        *[f"INSERT INTO transactions VALUES ('{one}', 2, 'charge', 5, 7, NULL, 'k2', '{'0' * 64}', 2)"
          for one in ACCOUNT_IDS],
    ],
    2: [
        *[f"INSERT INTO accounts VALUES ('{one}', 'Ada', '{'f' * 64}', 7, 2, 3, 0, 1000, 2000)"
          for one in ACCOUNT_IDS],
        *[f"INSERT INTO transactions VALUES ('{one}', 1, 'topup', 12, 12, 'x', NULL, NULL, 'k1', '{'0' * 64}', 1)"
          for one in ACCOUNT_IDS],
        *[f"INSERT INTO transactions VALUES ('{one}', 2, 'charge', 5, 7, NULL, NULL, NULL, 'k2', '{'0' * 64}', 2)"
          for one in ACCOUNT_IDS],
        *[f"INSERT INTO transactions VALUES ('{one}', 3, 'hold', 2, 7, NULL, NULL, NULL, 'k3', '{'0' * 64}', 3)"
          for one in ACCOUNT_IDS],
        *[f"INSERT INTO holds VALUES ('{one}', 3, 2, {4 * 10**15}, 'active', 0)" for one in ACCOUNT_IDS],
    ],
}
KEY, SHARED = ("§" + letter * 64 for letter in "ab")
ROWS[3] = [  # And what the issuer sent, of which a batch over both accounts has one key in each.
    *ROWS[2],
    f"UPDATE transactions SET idempotency_key = '{SHARED}' WHERE sequence = 2",
    f"UPDATE transactions SET idempotency_key = '{KEY}' WHERE sequence = 1 AND account_id = '{ACCOUNT_IDS[0]}'",
]


@pytest.mark.parametrize("version", wallet_module.MIGRATIONS)
def test_tables_of_each_version_become_those_of_a_new_wallet_and_keep_their_rows(
    durable_dsn, version, request
):
    database = wallet_module.open_database(durable_dsn, 1, True)
    for statement in schema_of(version) + ROWS[version]:
        adapted = database.adapt(statement)
        database.write(lambda tx, sql=adapted: tx(sql))
    database.close()
    new = "new_schema" if durable_dsn.startswith("postgresql") else "tmp_path"
    made = request.getfixturevalue(new)
    new_dsn = made() if callable(made) else f"sqlite:///{made}/new.db"
    with Wallet(durable_dsn) as migrated, Wallet(new_dsn) as fresh:
        assert shape(migrated.database) == shape(fresh.database)
        assert (migrated.currency, migrated.currency_digits) == ("JPY", 0)
        check_books(migrated)
        for account in migrated.accounts():
            assert (account.name, account.balance) == ("Ada", 7)
            history = migrated.transactions(account.id, after="0").transactions
            assert [(one.type, one.amount, one.balance, one.description) for one in history] == [
                ("topup", 12, 12, "x"),
                ("charge", 5, 7, None),
            ]
        assert [one.id for one in migrated.accounts()] == ACCOUNT_IDS[::-1]
        used = migrated.database.read(lambda tx: tx("SELECT * FROM issuer_keys"))
        assert used == ([(KEY, ACCOUNT_IDS[0])] if version == 3 else [])
        if version == 3:
            with pytest.raises(IdempotencyKeyReused):
                migrated.topup(ACCOUNT_IDS[1], 12, "x", key=KEY)
