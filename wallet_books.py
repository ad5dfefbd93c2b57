"""What is done with all of a wallet's books at once: verify, back up, restore and copy them.

The commands of these names do it for people. Programs call the functions that have no underscore.
"""

from __future__ import annotations

import os
import re
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path

from wallet import (
    LONG_TIMEOUT_S,
    SCHEMA_VERSION,
    ConfigurationError,
    SQLiteDatabase,
    Unavailable,
    Wallet,
    WrongBooks,
    _as_time,
    _Execute,
    _format_time,
    _now_us,
    _parse_time,
    _read_sql,
    _Row,
    _Tx,
    logger,
)

CLOCK_AHEAD_MAX_S = 60  # More than clocks that are set by a network differ by.
BACKUP_PAGES = 5000  # At a time, 20 MB. Ctrl-C is heard in between.
COPY_ROWS = 500  # To a statement: SQLite takes 32,766 parameters, Postgres 65,535.
VERIFY_ACCOUNTS = 100  # To a statement, which is one step of the progress bar.
# Each table's key, which its first columns are.
KEY_COLUMNS = {"accounts": ("id",), "transactions": ("account_id", "sequence"),
               "holds": ("account_id", "sequence"), "issuer_keys": ("idempotency_key",)}
Report = Callable[[int, int], None]  # It is told now and then how much is done of how much.


def _ignore(done: int, total: int) -> None:
    return


# Verify ###########################################################################################


def verify(wallet: Wallet, report: Report = _ignore) -> tuple[int, int]:
    """Recompute every balance, sequence, hold, refund and transfer.

    Return how many accounts and entries there are. This writes nothing, and others may write
    meanwhile. Raises WrongBooks, which names the first row that is wrong.
    """
    wallet.database.check()
    return _verify_books(partial(_read, wallet), report)


def _read(wallet: Wallet, sql: str, *parameters: str | int | None) -> list[_Row]:
    return wallet.database.read(lambda tx: tx(sql, *parameters), LONG_TIMEOUT_S)


def _verify_books(tx: _Execute, report: Report) -> tuple[int, int]:
    """Return how many accounts and entries there are, all as they should be. Raises WrongBooks."""
    checks = _read_sql("checks.sql")
    ((total, end),) = tx("""
        SELECT CAST(count(*) + coalesce(sum(last_sequence), 0) AS BIGINT), (
            SELECT coalesce(max(id), '') FROM (
                SELECT max(id) AS id FROM accounts UNION ALL
                SELECT max(account_id) FROM transactions UNION ALL
                SELECT max(account_id) FROM holds) AS ends) FROM accounts""")
    low, accounts, entries = "", 0, 0
    while low != end:
        page = tx(f"""SELECT id, last_sequence FROM accounts WHERE id > ? AND id <= ?
                      ORDER BY id LIMIT {VERIFY_ACCOUNTS}""", low, end)
        # The last part has what belongs to no account too.
        high = page[-1][0] if len(page) == VERIFY_ACCOUNTS else end
        for check in checks:
            pairs = check.count("?") // 2  # A check without any looks at all accounts, once.
            found = tx(f"{check} LIMIT 1", *(low, high) * pairs) if pairs or high == end else []
            for table, account_id, sequence, wrong in found:
                row = account_id if sequence is None else f"{account_id}, {sequence}"
                raise WrongBooks(f"{table} ({row}): {wrong}")
        low, accounts = high, accounts + len(page)
        entries += sum(row[1] for row in page)
        report(accounts + entries, total)
    return accounts, entries


def warn_of_clock(wallet: Wallet) -> None:
    """Warn if the books have times that are still to come: a clock was wrong, or is now."""
    now_us = _now_us()
    # What no clock can say is damage, which is for verify.
    sql = "SELECT count(*), max(updated_at) FROM accounts WHERE updated_at BETWEEN ? AND ?"
    soon_us, last_us = now_us + CLOCK_AHEAD_MAX_S * 1_000_000, _parse_time("9999-12-31T23:59:59Z")
    count = 0
    with suppress(Unavailable):  # Nothing depends on it.
        ((count, latest_us),) = wallet.database.read(lambda tx: tx(sql, soon_us, last_us))
    if count:
        now, latest = (_format_time(_as_time(time_us)) for time_us in (now_us, latest_us))
        logger.warning(
            "it is %s by this machine's clock, and %s has accounts with later times: %d of them, up"
            ' to %s. See "A clock that was ahead" in docs/operating.md',
            now, wallet.database.location, count, latest)


# Backups of SQLite ################################################################################


def back_up(wallet: Wallet, path: str, report: Report = _ignore) -> tuple[int, int]:
    """Copy a wallet on SQLite to a new file, as of one moment. Return what `verify` does.

    Others may write meanwhile. The file appears whole, verified and synced, or not at all, but that
    without hard links a kill may leave it empty. Raises WrongBooks, and ConfigurationError, also
    where there is a file of that name.
    """
    return _copy_file(wallet, path, report, "back up", "name a new file")


def restore(backup: str, dsn: str, report: Report = _ignore) -> tuple[int, int]:
    """Put a backup of SQLite to where a DSN says, as `back_up` makes one. Return what that does.

    Where there is a wallet, this changes nothing. Raises WrongBooks, and ConfigurationError.
    """
    match = re.fullmatch("sqlite:///([^?]*[^?/])", dsn)
    if not match or match[1] == ":memory:":
        raise ConfigurationError(
            "a backup is restored to a file of SQLite: name it as sqlite:///FILE")
    if not os.path.isfile(backup):
        raise ConfigurationError(f"there is no file {backup}: name a backup")
    with Wallet(f"sqlite:///{backup}", read_only=True) as wallet:
        return _copy_file(wallet, match[1], report, "restore",
                          "stop its wallet and move it away, or name another DSN")


def _copy_file(wallet: Wallet, path: str, report: Report, verb: str,
               advice: str) -> tuple[int, int]:
    database, path = wallet.database, os.path.abspath(path)
    if not isinstance(database, SQLiteDatabase):
        raise ConfigurationError(f"{database.location} is backed up by pg_dump")
    if database.path is None:
        raise ConfigurationError(
            "a wallet in memory is gone when it stops: there is nothing to back up")
    for taken in (path, f"{path}-wal", f"{path}-journal"):  # A log is read into it.
        if os.path.lexists(taken):
            raise ConfigurationError(f"{taken} is there already: {advice}")
    try:
        with tempfile.TemporaryDirectory(
                prefix=".wallet-backup-", dir=os.path.dirname(path)) as folder:
            temporary = os.path.join(folder, "wallet.db")
            Path(temporary).touch(0o600)
            with (closing(database.connect()) as source,
                  closing(sqlite3.connect(temporary)) as target):
                source.execute("BEGIN")
                source.execute("SELECT currency FROM wallet")  # From here on nothing new shows.
                source.backup(target, pages=BACKUP_PAGES,
                              progress=lambda _, left, total: report(total - left, total))
                target.execute("PRAGMA journal_mode = DELETE")  # One file, without a log.
            database.ping()  # It was still that file.
            with Wallet(f"sqlite:///{temporary}", read_only=True) as copy:
                copy.database.location = database.location  # What is wrong there is wrong here.
                verified = verify(copy, report)
            _sync(temporary)
            _give_name(temporary, path)
            _sync(os.path.dirname(path))
            return verified
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", error)
        raise ConfigurationError(f"cannot {verb} to {path}: {reason}") from error


def _give_name(temporary: str, path: str) -> None:
    """Move a file to a name that no other has. Raises OSError, also where another has it."""
    try:
        os.link(temporary, path)  # Unlike a rename, this never replaces a file.
    except FileExistsError:
        raise
    except OSError:  # There are no hard links, as on exFAT, or the next line says what is wrong.
        Path(path).touch(0o600, exist_ok=False)  # This replaces none either: the name is ours now.
        try:
            os.replace(temporary, path)
        except BaseException:
            os.unlink(path)
            raise


def _sync(path: str) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


# Copies to another database #######################################################################


def copy_wallet(source: Wallet, target: Wallet, report: Report = _ignore) -> dict[str, int]:
    """Copy everything to an empty wallet in one transaction, and compare it all at the end.

    Return how many rows each table has. Meanwhile nobody can write to the source. Raises
    ConfigurationError where the target holds data, which changes nothing, and WrongBooks where the
    source is wrong. After a copy that broke off, the target has no wallet, and its currency is
    forgotten.
    """
    def copy(read: _Execute, tx: _Tx) -> None:
        target.database.lock(tx)
        steps = _count_steps(2 * sum(counts.values()), report)  # Each row is read back too.
        # All may be there already, if an earlier COMMIT was not answered.
        for table in KEY_COLUMNS if not tx(first) else ():
            for rows in _read_table(read, table):
                marks = ", ".join("?" * len(rows[0]))
                tx.many(f"INSERT INTO {table} VALUES ({marks})", rows)
                steps(rows)
        if any(_digest_table(tx, table, steps) != _digest_table(read, table, len)
               for table in KEY_COLUMNS):
            raise ConfigurationError("the copy is not what was copied: stop both wallets first")
        _verify_books(tx, report)
        if tx("SELECT currency, currency_digits FROM wallet") != [unit]:
            tx("DELETE FROM wallet")
            tx("INSERT INTO wallet VALUES (1, ?, ?, ?)", SCHEMA_VERSION, *unit)

    def hold_still(read: _Execute) -> None:
        source.database.lock(read)
        counts.update((table, read(f"SELECT count(*) FROM {table}")[0][0]) for table in KEY_COLUMNS)
        # Until it is all there, it is no wallet, which --must-exist would take it for.
        target.database.write(
            lambda tx: tx("DELETE FROM wallet WHERE NOT EXISTS (SELECT 1 FROM accounts)"))
        target.database.write(partial(copy, read), LONG_TIMEOUT_S)

    first, unit = "SELECT id FROM accounts LIMIT 1", (source.currency, source.currency_digits)
    counts: dict[str, int] = {}
    if _read(target, first):
        raise ConfigurationError(
            f"{target.database.location} already holds accounts: name an empty database")
    source.database.write(hold_still, LONG_TIMEOUT_S)
    target.currency, target.currency_digits = unit
    return counts


def _count_steps(total: int, report: Report) -> Callable[[list[_Row]], None]:
    """Return what is told of the rows that are done, and reports how many those are by then."""
    done = 0

    def step(rows: list[_Row]) -> None:
        nonlocal done
        done += len(rows)
        report(done, total)

    return step


def _read_table(tx: _Execute, table: str) -> Iterator[list[_Row]]:
    """Yield all rows that are there now, some at a time, in the order of the key."""
    columns = KEY_COLUMNS[table]
    key, marks = ", ".join(columns), ", ".join("?" * len(columns))
    end = tx(f"SELECT {key} FROM {table} ORDER BY {' DESC, '.join(columns)} DESC LIMIT 1")
    sql = (f"SELECT * FROM {table} WHERE ({key}) > ({marks}) AND ({key}) <= ({marks})"
           f" ORDER BY {key} LIMIT {COPY_ROWS}")
    last: _Row = ("", 0)[: len(columns)]
    while end and (rows := tx(sql, *last, *end[0])):
        yield rows
        last = rows[-1][: len(columns)]


def _digest_table(tx: _Execute, table: str, step: Callable[[list[_Row]], object]) -> int:
    """Return a number that is the same for the same rows, whatever order an engine has."""
    digest = 0
    for rows in _read_table(tx, table):
        digest += sum(int.from_bytes(sha256(repr(row).encode()).digest(), "big") for row in rows)
        step(rows)
    return digest
