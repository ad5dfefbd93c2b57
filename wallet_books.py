"""What is done with all of a wallet's books at once: verify, back up, restore and copy them.

The commands of these names do it for people. Programs call the functions that have no underscore.
"""

from __future__ import annotations

import os
import re
import sqlite3
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

from wallet import (
    LONG_TIMEOUT_S,
    SCHEMA_VERSION,
    ConfigurationError,
    SQLiteDatabase,
    T,
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
# To a statement too, unless one account has more: what one check has read is in SQLite's cache then
# for the next one.
VERIFY_ENTRIES = 10_000
VERIFY_LARGE = 500_000  # Entries of one account of which each check is a step of its own.
VERIFY_THREADS = 4  # Each of them keeps one processor busy, or one connection of Postgres.
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
    database: Any = wallet.database
    # A pool that serves others too keeps half of its connections for them.
    pool = getattr(database, "_pool", None)
    threads = max(1, min(VERIFY_THREADS, pool.max_size // 2 if pool else os.cpu_count() or 1))
    look = partial(_read, wallet)
    if isinstance(database, SQLiteDatabase):
        file = _FileChecks(look, database.location)
        return _verify_books(look, report, threads, file if file.check_all_but_rows() else None)
    database.check()
    return _verify_books(look, report, threads)


def _read(wallet: Wallet, sql: str, *parameters: str | int | None) -> list[_Row]:
    return wallet.database.read(lambda tx: tx(sql, *parameters), LONG_TIMEOUT_S)


def _verify_books(tx: _Execute, report: Report, threads: int = 0,
                  file: _FileChecks | None = None) -> tuple[int, int]:
    """Return how many accounts and entries there are, all as they should be. Raises WrongBooks.

    With `threads`, several statements run at once: each sees one moment, and asks for nothing that
    another has seen.
    """
    checks = _read_sql("checks.sql")
    ((total, end),) = tx("""
        SELECT CAST(count(*) + coalesce(sum(last_sequence), 0) AS BIGINT), (
            SELECT coalesce(max(id), '') FROM (
                SELECT max(id) AS id FROM accounts UNION ALL
                SELECT max(account_id) FROM transactions UNION ALL
                SELECT max(account_id) FROM holds) AS ends) FROM accounts""")

    def steps(low: str, high: str) -> Iterator[Callable[[], None]]:
        if file:
            yield partial(file.check_rows, low, high)
        for check in checks:
            # A check without any question mark looks at all accounts, once.
            if (pairs := check.count("?") // 2) or high == end:
                yield partial(_refuse_any, tx, check, *(low, high) * pairs)
        if file:
            yield partial(file.check_counts, low, high)

    def parts() -> Iterator[Callable[[], tuple[int, int]]]:
        low = ""
        while low != end:
            page = tx(f"""SELECT id, last_sequence FROM accounts WHERE id > ? AND id <= ?
                          ORDER BY id LIMIT {VERIFY_ACCOUNTS}""", low, end)
            before = accumulate((row[1] for row in page), initial=0)
            part = [row for row, count in zip(page, before, strict=False)
                    if count < VERIFY_ENTRIES]
            # The last part has what belongs to no account too.
            high = part[-1][0] if len(part) == VERIFY_ACCOUNTS or part != page else end
            entries, pieces = sum(row[1] for row in part), [[*steps(low, high)]]
            if entries > VERIFY_LARGE:  # So that several threads look at it, and the bar moves.
                pieces = [[step] for step in pieces[0]]
            for piece in pieces[:-1]:
                yield partial(_take, piece, (0, entries // len(pieces)))
            rest = entries - (len(pieces) - 1) * (entries // len(pieces))
            yield partial(_take, pieces[-1], (len(part), rest))
            low = high
        if file:
            yield from (partial(_take, [partial(file.check_index, name)], (0, 0))
                        for name in file.indexes)

    accounts = entries = 0
    for done in _run_in_order(parts(), threads):
        accounts, entries = accounts + done[0], entries + done[1]
        if any(done):
            report(accounts + entries, total)
    return accounts, entries


def _take(steps: Iterable[Callable[[], None]], done: tuple[int, int]) -> tuple[int, int]:
    """Take steps, and return how many accounts and entries are done then."""
    for step in steps:
        step()
    return done


def _refuse_any(tx: _Execute, check: str, *parameters: str) -> None:
    """Raise WrongBooks for the first row that a check finds, if any."""
    for table, account_id, sequence, wrong in tx(f"{check} LIMIT 1", *parameters):
        row = account_id if sequence is None else f"{account_id}, {sequence}"
        raise WrongBooks(f"{table} ({row}): {wrong}")


def _run_in_order(parts: Iterator[Callable[[], T]], threads: int) -> Iterator[T]:
    """Yield what the parts return, in their order, so that the first error is always the same."""
    if not threads:
        yield from (part() for part in parts)
        return
    pool = ThreadPoolExecutor(threads)
    try:
        running: deque[Future[T]] = deque()
        for part in parts:
            running.append(pool.submit(part))
            if len(running) > 2 * threads:  # Few of them wait: they may be millions.
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C waits for no statement.


class _FileChecks:
    """Sees that a file of SQLite is whole, and that each index has what its table has.

    PRAGMA integrity_check does that too, but takes twice as long as all else for `transactions`: it
    looks up each row in the order of the file, where neighbours are of many accounts and so far
    apart in each index, and in one thread. Here the rows are looked up account by account. What an
    index lacks is found so, and what it has too much is found by counting.
    """

    def __init__(self, tx: _Execute, location: str) -> None:
        self._tx, self._location = tx, location
        self._primary = self._rows = self._missing = ""
        self.indexes: dict[str, str] = {}  # How many entries more or less than rows each has.

    def check_all_but_rows(self) -> bool:
        """Look at every page, at every row by itself, and at the indexes of the other tables.

        Return whether the rows of `transactions` are still to be looked up in its indexes.
        """
        rest = self._prepare()
        found = self._tx("SELECT name FROM sqlite_master WHERE type = 'table' AND name <> ?",
                         "transactions" if rest else "")
        for check in ("quick_check(1)", *(f"integrity_check('{name}')" for (name,) in found)):
            wrong = self._tx(f"PRAGMA {check}")[0][0]
            if wrong != "ok":
                self._refuse(wrong)
        return rest

    def _prepare(self) -> bool:
        """Make the statements. Return whether they can look at all indexes.

        They cannot at one that somebody has added with an expression, an order or a rule of its
        own. Then integrity_check does it all.
        """
        cases = primary = ""
        for _, index, unique, origin, _ in self._tx("PRAGMA index_list(transactions)"):
            keys = self._tx("SELECT cid, name, coll FROM pragma_index_xinfo(?) WHERE key", index)
            if (origin == "c" and unique) or not re.fullmatch(r"\w+", index) or any(
                    number < 0 or order != "BINARY" for number, _, order in keys):
                return False
            ((sql,),) = self._tx("SELECT coalesce(sql, '') FROM sqlite_master WHERE name = ?",
                                 index)
            condition = f"({sql.partition(' WHERE ')[2] or 1})"
            self.indexes[index] = f"""
                SELECT (SELECT count(*) FROM transactions NOT INDEXED WHERE {condition}) -
                       (SELECT count(*) FROM transactions INDEXED BY {index} WHERE {condition})"""
            if origin == "pk":
                primary = index
                continue
            same = " AND ".join(f"transactions.{key} IS t.{key}" for _, key, _ in keys)
            other = "" if unique else "AND transactions.rowid = t.rowid"
            # An entry of another row, which a unique index has not, makes the sum more than 1.
            cases = f"""{cases}
                WHEN {condition} AND (
                    SELECT sum(1 + (transactions.rowid <> t.rowid))
                    FROM transactions INDEXED BY {index} WHERE {condition} AND {same} {other}
                ) IS NOT 1 THEN '{index}'"""
        self._primary, self._rows = primary, f"""
            SELECT place, CASE
                WHEN t.account_id IS NOT owner OR t.sequence IS NOT number THEN '{primary}' {cases}
                END AS lacking
            FROM (SELECT rowid AS place, account_id AS owner, sequence AS number
                  FROM transactions INDEXED BY {primary} WHERE account_id > ? AND account_id <= ?
                 ) AS entries LEFT JOIN transactions AS t NOT INDEXED ON t.rowid = place
            WHERE lacking IS NOT NULL LIMIT 1"""
        self._missing = f"""
            SELECT (SELECT coalesce(sum(last_sequence), 0) FROM accounts WHERE id > ? AND id <= ?) -
                   (SELECT count(*) FROM transactions INDEXED BY {primary}
                    WHERE account_id > ? AND account_id <= ?)"""
        return True

    def check_rows(self, low: str, high: str) -> None:
        """See that each index has the entries of these accounts, once if it is unique."""
        for place, name in self._tx(self._rows, low, high):
            self._refuse(f"row {place} missing from index {name}, or twice in it")

    def check_counts(self, low: str, high: str) -> None:
        """See that the rows of these accounts were all found, as many as the accounts say."""
        ((missing,),) = self._tx(self._missing, low, high, low, high)
        if missing:
            self._refuse(f"wrong # of entries in index {self._primary}")

    def check_index(self, name: str) -> None:
        """See that an index has no entry too many."""
        if self._tx(self.indexes[name]) != [(0,)]:
            self._refuse(f"wrong # of entries in index {name}")

    def _refuse(self, found: str) -> NoReturn:
        raise WrongBooks(f"{self._location} is damaged: {' '.join(found.split())}")


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
                # Nobody knows of this file until it is synced below.
                target.execute("PRAGMA journal_mode = OFF")
                target.execute("PRAGMA synchronous = OFF")
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
