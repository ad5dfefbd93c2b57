"""Postgres in languages whose order is not that of bytes, and whose order changes."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from glob import glob
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest

import wallet as wallet_module
import wallet_books
import wallet_cli
import wallet_postgres
from tests.support import (
    MEMORY_FOLDER,
    PAGES,
    TABLES,
    check_books,
    command,
    contents,
    free_port,
    schema_of,
)
from wallet import Wallet, WalletError, WrongBooks

KEYS = ["a", "B", "A", "b", "_", "-a", "a-", "aB", "Ab", "1", "Z", "z", "A b", "a b", "!", "~"]
LANGUAGES = Path("/usr/share/i18n/locales/en_US")
pytestmark = pytest.mark.slow
needs_languages = pytest.mark.skipif(
    not LANGUAGES.exists(), reason="needs the sources of languages: apt install locales"
)


def make_language(folder, order):
    """Make en_US in a folder where the C library looks for it, with the order of some language."""
    shutil.rmtree(folder / "en_US.UTF-8", ignore_errors=True)
    subprocess.run(
        ["localedef", "-c", "-i", order, "-f", "UTF-8", "--no-archive", folder / "en_US.UTF-8"],
        check=True,
        capture_output=True,
        timeout=60,
    )
    for made in [folder, *folder.rglob("*")]:  # Postgres is another user.
        made.chmod(0o755)


@pytest.fixture
def english(postgres_server, monkeypatch):
    """A database in which "a" comes before "B", and the folder with what says so."""
    with tempfile.TemporaryDirectory(prefix="wallet-", dir=MEMORY_FOLDER) as folder:
        make_language(Path(folder), "en_US")
        with monkeypatch.context() as changed:
            changed.setenv("LOCPATH", folder)
            postgres_server.restart()
            postgres_server.query(
                "CREATE DATABASE english TEMPLATE template0 ENCODING 'UTF8' LOCALE_PROVIDER libc"
                " LC_COLLATE 'en_US.UTF-8' LC_CTYPE 'C'"
            )
            try:
                yield f"{postgres_server.dsn.rpartition('/')[0]}/english", Path(folder)
            finally:
                postgres_server.query("DROP DATABASE english WITH (FORCE)")
        postgres_server.restart()


def ask(dsn, sql):
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(sql)
        return cursor.fetchall() if cursor.description else []


def use(dsn, monkeypatch):
    """Do things whose outcome would depend on an order. Return all that was answered."""
    letters = itertools.cycle("aBAbZz")
    monkeypatch.setattr(
        wallet_module, "_random_base62", lambda length: (next(letters) if length == 16 else "x") * length
    )
    monkeypatch.setattr(wallet_module, "ACCOUNTS_ROWS", 2)
    with Wallet(dsn) as wallet:
        ids = [wallet.register(f"{number}")[0].id for number in range(6)]
        for _ in range(2):
            for key in KEYS:
                wallet.topup(ids[0], 1, key=key)
        charge = wallet.charge(ids[0], 3)
        wallet.refund(ids[0], charge.id, 1)
        wallet.transfer(ids[0], ids[1], 2)
        hold = wallet.hold(ids[0], 1)
        wallet.capture(ids[0], hold.id)
        told, cursor = [], None
        while len(told) == 0 or cursor:
            page = wallet.transactions(ids[0], limit=2, cursor=cursor, type="topup")
            told, cursor = told + [one.id for one in page.transactions], page.next_cursor
        wallet.database.write(lambda tx: tx("UPDATE accounts SET created_at = 1"))
        listed = [account.id for account in wallet.accounts()]
        check_books(wallet)
        return ids, listed, told, wallet.account(ids[0]).balance


@needs_languages
def test_order_of_a_language_changes_nothing(english, file_dsn, postgres_dsn, monkeypatch):
    dsn, _ = english
    assert ask(dsn, "SELECT 'a' < 'B', 'a' < 'B' COLLATE \"C\"") == [(True, False)]
    outcomes = [use(one, monkeypatch) for one in (dsn, file_dsn, postgres_dsn)]
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert outcomes[0][1] == sorted(outcomes[0][0], reverse=True)


def repeat_after_the_order_changed(english, server):
    """Send keys, change the order as a new C library may, and send them again.

    Return how many had a second effect or failed.
    """
    dsn, folder = english
    with Wallet(dsn) as wallet:
        accounts = [wallet.register("Ada") for _ in range(40)]
        for account, _ in accounts:
            for key in KEYS:
                wallet.topup(account.id, 1, key=key)
    make_language(folder, "C")
    server.restart()
    assert ask(dsn, "SELECT 'a' < 'B'") == [(False,)]
    wrong = 0
    with Wallet(dsn) as wallet:
        for account, token in accounts:
            for key in KEYS:
                try:
                    wrong += not wallet.topup(account.id, 1, key=key, token=token).replayed
                except WalletError:
                    wrong += 1
        if not wrong:
            check_books(wallet)
    return wrong


@needs_languages
def test_order_that_changes_under_the_data_doubles_nothing(english, postgres_server):
    assert repeat_after_the_order_changed(english, postgres_server) == 0


@needs_languages
def test_control_order_of_the_database_itself_doubles_keys_when_it_changes(
    english, postgres_server, monkeypatch
):
    monkeypatch.setattr(
        wallet_postgres.PostgresDatabase,
        "adapt",
        lambda self, sql: sql.replace(' COLLATE "C"', ""),
    )
    wrong = repeat_after_the_order_changed(english, postgres_server)
    assert wrong > 0
    print(f"{wrong} of {40 * len(KEYS)} keys had a second effect or failed")


@needs_languages
def test_key_that_a_changed_order_has_doubled_stops_the_migration_with_one_line(
    english, postgres_server, capsys
):
    dsn, folder = english
    entry = "INSERT INTO transactions VALUES ('acc_%s', %d, 'topup', 1, %d, NULL, NULL, NULL, '%s', '%s', 1)"
    for sql in schema_of(2):
        ask(dsn, sql)
    ask(dsn, f"INSERT INTO accounts VALUES ('acc_{'A' * 16}', 'Ada', '{'f' * 64}', 0, 0, 0, 0, 1, 1)")
    keys = [f"{one}|{two}" for one in KEYS for two in KEYS]
    for number, key in enumerate(keys, 1):
        ask(dsn, entry % ("A" * 16, number, number, key, "0" * 64))
    make_language(folder, "C")
    postgres_server.restart()
    doubled = 0
    for key in keys:  # As the first version did: where a key is not found, it has its effect.
        number = len(keys) + doubled + 1
        with contextlib.suppress(psycopg.IntegrityError):
            ask(dsn, entry % ("A" * 16, number, number, key, "0" * 64))
            doubled += 1
    assert doubled > 0
    before = contents(dsn, TABLES[:4])
    assert wallet_cli.main(["freeze", "acc_" + "A" * 16, "--dsn", dsn]) == 2
    told = capsys.readouterr().err
    assert re.fullmatch(r"wallet: cannot use \S+: could not create unique index [^\n]*\n", told)
    assert "is duplicated" in told
    assert contents(dsn, TABLES[:4]) == before


def test_version_of_a_collation_that_the_system_no_longer_has_is_told_with_the_remedy(
    postgres_server, caplog
):
    postgres_server.query(
        "CREATE DATABASE \"Old one\" TEMPLATE template0 LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8'"
    )
    dsn = f"{postgres_server.dsn.rpartition('/')[0]}/Old%20one"
    Wallet(dsn).close()
    assert caplog.messages == []
    postgres_server.query("UPDATE pg_database SET datcollversion = '0' WHERE datname = 'Old one'")
    Wallet(dsn).close()
    (told,) = caplog.messages
    assert told.startswith(f"postgresql://127.0.0.1:{postgres_server.port}/Old one was made with")
    *_, remedy = told.partition("version 0 of its collation, and the system has 1: run ")
    for statement in remedy.split("; "):
        postgres_server.dsn, before = dsn, postgres_server.dsn
        try:
            postgres_server.query(statement)
        finally:
            postgres_server.dsn = before
    caplog.clear()
    Wallet(dsn).close()
    assert caplog.messages == []
    postgres_server.query("DROP DATABASE \"Old one\" WITH (FORCE)")


@pytest.fixture
def debian_server(postgres_server):
    """A PostgreSQL of Debian, which has the extension amcheck, as the one of the tests has not."""
    (binaries, *_) = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    user = {"user": "pgserver"} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="wallet-", dir=MEMORY_FOLDER) as folder:
        os.chmod(folder, 0o777)
        port = free_port()

        def run(*command):
            subprocess.run(
                command, check=True, stdout=subprocess.DEVNULL, cwd="/", timeout=60, **user
            )

        data = f"{folder}/data"
        run(binaries / "initdb", "--auth=trust", "--username=postgres", "--no-sync", data)
        start = f"-h 127.0.0.1 -p {port} -k {data}"
        run(binaries / "pg_ctl", "-w", "-D", data, "-o", start, "-l", f"{data}/log", "start")
        yield SimpleNamespace(
            binaries=binaries,
            dsn=f"postgresql://postgres@127.0.0.1:{port}/postgres",
            data=Path(data),
            control=lambda *arguments: run(
                binaries / "pg_ctl", "-w", "-D", data, "-o", start, "-l", f"{data}/log", *arguments
            ),
        )
        run(binaries / "pg_ctl", "-w", "-D", data, "-m", "immediate", "stop")


needs_amcheck = pytest.mark.skipif(
    not glob("/usr/share/postgresql/*/extension/amcheck.control"),
    reason="needs a PostgreSQL with amcheck: apt install postgresql",
)


@needs_amcheck
def test_wallet_of_a_role_that_is_no_superuser_is_verified_backed_up_and_restored(
    debian_server, tmp_path, capsys
):
    ask(debian_server.dsn, "CREATE ROLE wallet LOGIN")
    for name in ("shop", "restored"):
        ask(debian_server.dsn, f"CREATE DATABASE {name} OWNER wallet")
    server = debian_server.dsn.removesuffix("/postgres")
    shop, restored = (
        f"{server.replace('postgres@', 'wallet@')}/{name}" for name in ("shop", "restored")
    )
    told = re.search(r"(?s)`(CREATE EXTENSION\s+amcheck; GRANT [^`]*)`", PAGES["operating.md"])[1]
    with Wallet(shop) as wallet:
        ada, token = wallet.register("Ada")
        wallet.topup(ada.id, 5)
    for statement in told.split("; "):
        ask(f"{server}/shop", statement)
    done = command("verify", "--dsn", shop)
    assert (done.returncode, done.stderr) == (0, "")
    assert wallet_cli.main(["backup", str(tmp_path / "dump"), "--dsn", shop]) == 2
    _, dump, *_, restore = capsys.readouterr().err.splitlines()
    path = f"PATH={debian_server.binaries}:$PATH; "
    for step in (dump, restore.replace("dbname=shop", "dbname=restored")):
        subprocess.run(["bash", "-c", path + step], check=True, timeout=60)
    with Wallet(restored, create=False) as wallet:
        assert wallet.authenticate(token).balance == 5
        assert contents(restored) == contents(shop)


@needs_amcheck
def test_verify_looks_into_the_indexes_of_postgres_where_it_may(debian_server, caplog):
    dsn = debian_server.dsn
    with Wallet(dsn) as wallet:
        for _ in range(50):
            wallet.topup(wallet.register("Ada")[0].id, 1)
        wallet_books.verify(wallet)
        assert caplog.messages == [
            f"the indexes of {wallet.database.location} were not checked: function"
            " bt_index_check(regclass, boolean) does not exist. That needs CREATE EXTENSION"
            " amcheck, and the right to use it"
        ]
        caplog.clear()
        ask(dsn, "CREATE EXTENSION amcheck")
        assert wallet_books.verify(wallet) == (50, 50)
        assert caplog.messages == []
        with (
            psycopg.connect(dsn) as other,
            Wallet(f"{dsn}?options=-clock_timeout%3D50", read_only=True) as hindered,
        ):
            other.execute("LOCK TABLE accounts IN ACCESS EXCLUSIVE MODE")
            hindered.database.check()
        assert caplog.messages == [
            f"the indexes of {wallet.database.location} were not checked: canceling statement due"
            " to lock timeout"
        ]
        caplog.clear()
        (file,) = ask(dsn, "SELECT pg_relation_filepath('accounts_pkey')")[0]
        first = min(account.id for account in wallet.accounts()).encode()
    debian_server.control("-m", "fast", "stop")
    index = debian_server.data / file
    content = index.read_bytes()
    assert content.count(first) == 1
    index.write_bytes(content.replace(first, b"acc_zzzzzzzzzzzzzzzz"))
    debian_server.control("start")
    with Wallet(dsn, read_only=True) as wallet:
        with pytest.raises(WrongBooks, match=r"is damaged: .*accounts_pkey"):
            wallet_books.verify(wallet)
        caplog.clear()
        ask(dsn, "REINDEX INDEX accounts_pkey")
        assert wallet_books.verify(wallet) == (50, 50)
        assert caplog.messages == []
