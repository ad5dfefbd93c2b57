"""DOC tests/test_migrations"""

from __future__ import annotations

import hashlib
import json

import pytest

import wallet as wallet_module
from tests.support import SCHEMA_1, check_books, command, contents, together
from wallet import Wallet

# Opening a database ################################################################################


def test_newer_schema_is_refused_and_left_as_it_is(durable_dsn):
    with Wallet(durable_dsn) as wallet:
        wallet.database.write(lambda tx: tx("UPDATE wallet SET schema_version = 3"))
    before = contents(durable_dsn)
    done = command("--dsn", durable_dsn, "--port", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "wallet: the database has schema version 3, and this wallet has 2: use a newer wallet\n"
    assert contents(durable_dsn) == before


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
