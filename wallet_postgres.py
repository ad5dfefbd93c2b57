"""Keeps a wallet in Postgres, or in an engine that speaks its protocol, by psycopg and its pool.

wallet.py loads this module for a DSN that begins with postgresql://, and for no other.
"""

from __future__ import annotations

import logging
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any

from psycopg import (
    Connection,
    Cursor,
    Error,
    IntegrityError,
    OperationalError,
    Pipeline,
    errors,
)
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import ConnectionPool, PoolTimeout

import wallet
from wallet import (
    ConfigurationError,
    Database,
    NotReady,
    OutcomeUnknown,
    T,
    Unavailable,
    WrongBooks,
    _Each,
    _Execute,
    _Line,
    _Row,
    _Tx,
    _waiting,
    _Write,
)

logger = logging.getLogger("wallet")

RETRY_PAUSE_S, RETRY_PAUSE_MAX_S = 0.002, 0.1  # Before a transaction is run again. It doubles each
# time, and a random part of it is taken, so that those who met once do not meet again.
MENDINGS_MAX = 3  # How often a call is run again for an error that may be its own fault.
POSTGRES_WAITING_MAX = 100  # Calls that wait for a connection. One more fails at once.
POSTGRES_DIAL_S = 0.5  # Between two tries to connect, and for a healthy server to answer.
POSTGRES_AWAY_S = 1  # After Postgres missed a deadline, calls fail at once for so long.
POSTGRES_DEFAULTS: dict[str, Any] = {  # libpq's options, where the DSN has none.
    "fallback_application_name": "wallet",
    "connect_timeout": os.environ.get("PGCONNECT_TIMEOUT", "3"),
    "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}  # Dead in a minute.

# SQLSTATEs after which a transaction is run again
# (https://www.postgresql.org/docs/current/errcodes-appendix.html).
LOST_A_RACE = "40001", "40P01"  # serialization_failure, deadlock_detected: rolled back, always.
READ_ONLY = "25006"  # read_only_sql_transaction
CORRUPTED = "XX001", "XX002"  # data_corrupted, index_corrupted
NO_AMCHECK = "42883", "42501"  # undefined_function, insufficient_privilege
# unique_violation, duplicate_table, duplicate_object
CHANGED_MEANWHILE = READ_ONLY, "23505", "42P07", "42710"

COLLATION_VERSIONS = """
    SELECT quote_ident(datname), datcollversion, pg_database_collation_actual_version(oid)
    FROM pg_database WHERE datname = current_database()"""

# The server gives up before the client has to cut the connection, and frees the locks of a client
# that has vanished. This is set for one transaction, else a pooler would hand the settings on.
LIMITS = """
    SELECT set_config('statement_timeout', %s, true),
        set_config('idle_in_transaction_session_timeout', %s, true)"""
SHARDING = "citus.", "crdb_", "yb_"  # How the settings of such engines begin.

ALONE = "wallet alone"  # The application_name of a copy's sessions, which ignore each other.
LOCK = """
    LOCK TABLE wallet, accounts, transactions, holds, issuer_keys IN SHARE ROW EXCLUSIVE MODE"""
OTHER_SESSIONS = """
    SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = ?"""


class TimedConnection(Connection[_Row]):
    """A connection that waits until its `deadline` only: a server that hangs says nothing.

    `answered_at` of the class is when it last answered any.
    """

    deadline = answered_at = 0.0

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """Run a step of psycopg. Raises psycopg.Error, also at the deadline."""
        left_s = max(POSTGRES_DIAL_S, self.deadline - time.monotonic())
        try:
            result = super().wait(gen, interval, left_s)
        except Error as error:
            if error.sqlstate is None and self.deadline < time.monotonic():
                try:  # Nobody waits for the statement any more.
                    self.cancel_safe(timeout=POSTGRES_DIAL_S)
                    super().wait(gen, interval, POSTGRES_DIAL_S)
                except errors.QueryCanceled:  # So nothing of it is kept. Else that is not known.
                    raise
                except Error:
                    pass
                self.close()
            raise
        TimedConnection.answered_at = time.monotonic()
        return result


class PostgresDatabase(Database):
    """A database of Postgres, of which at most `connections` are kept.

    A transaction that lost a race or its connection is run again from its beginning. So is one
    whose COMMIT was not answered: its key tells what became of it, and the locks that it may still
    hold make the next run wait until that is decided. The statements are right at every isolation
    level. With `read_only` it may be a standby, and with `alone` no other wallet may be connected.
    Raises ConfigurationError.
    """

    def __init__(self, dsn: str, connections: int, read_only: bool = False,
                 alone: bool = False) -> None:
        given: dict[str, Any] = {"port": "malformed"}
        with suppress(Error, UnicodeError):  # Their messages may quote the password.
            given = conninfo_to_dict(dsn)
        host, port, database = (str(given.get(name, "")) for name in ("host", "port", "dbname"))
        if (dsn.count("@") > 1 or re.search("[^!-~]", dsn) or "@" in host + database
                or re.search("[^0-9,]", port)):
            raise ConfigurationError(
                "the DSN is malformed: it looks like postgresql://USER:PASSWORD@HOST:PORT/DATABASE,"
                " with %40 for an @ in the password, and other special characters likewise")
        self.location = f"postgresql://{host}{port and f':{port}'}/{database}"
        self._away_until = 0.0
        self._line: _Line[_Together] = _Line(partial(self._gather, False))
        # Where another process is at an account: those that wait for it here.
        self._busy: dict[object, _Line[_Together]] = {}
        self._read_only, self._begin = read_only, "BEGIN READ ONLY" if read_only else "BEGIN"
        # A prepared statement belongs to a session, and a pooler such as PgBouncer changes those.
        options: dict[str, Any] = POSTGRES_DEFAULTS | given | {
            "client_encoding": "UTF8", "prepare_threshold": None, "autocommit": True}
        try:
            with TimedConnection.connect(**options) as connection:
                connection.deadline = time.monotonic() + wallet.DATABASE_TIMEOUT_S
                self._check_server(PostgresTx(connection=connection), read_only)
                if alone and not read_only:
                    self._wait_until_alone(PostgresTx(connection=connection))
                    options["application_name"] = ALONE
        except (Error, UnicodeError) as error:
            reason = " ".join(str(error).split())
            # While it is away or starts; a wrong password cannot be told from that.
            kind = NotReady if isinstance(error, OperationalError) else ConfigurationError
            raise kind(f"cannot open {self.location}: {reason}") from error
        # The pool would wait ever longer between two tries. So it gives up soon, and begins anew.
        self._pool = ConnectionPool(
            kwargs=options, connection_class=TimedConnection, min_size=1, max_size=connections,
            open=True, max_waiting=POSTGRES_WAITING_MAX, name="wallet",
            reconnect_timeout=POSTGRES_DIAL_S, reconnect_failed=ConnectionPool.check)

    def write(self, function: Callable[[_Tx], T], timeout_s: float | None = None,
              size: int = 1) -> T:
        """Run `function` in a transaction of its own (see Database)."""
        return self._call(function, True, timeout_s)

    def gather(self, function: _Each, item: Any, account_id: str) -> Any:
        """Run `function` once for all that wait. Items that another transaction is in the way of
        wait for it together, those of one account. What that does not do either is run alone.
        """
        write = _Together(function, item)
        if not (self._is_sharded or self._read_only):
            if account_id not in self._busy:
                with suppress(_NotTogether):
                    return self._line.stand(write)
            if not write.is_unknown:
                write.done, write.outcome = False, None
                line = self._busy.setdefault(account_id, _Line(partial(self._gather, True)))
                try:
                    with suppress(_NotTogether):
                        return line.stand(write)
                finally:
                    if line.leader is None and self._busy.get(account_id) is line:
                        self._busy.pop(account_id, None)
        return self._call(partial(_run_one, function, item), True, None, write)

    def read(self, function: Callable[[_Execute], T], timeout_s: float | None = None) -> T:
        """Run `function`, each statement in a transaction of its own."""
        return self._call(function, False, timeout_s)

    def usage(self) -> dict[str, int]:
        """Tell it of the pool."""
        pool = self._pool.get_stats()
        idle = pool["pool_available"]
        return {"idle": idle, "in_use": pool["pool_size"] - idle,
                "waiting": pool["requests_waiting"]}

    def lock(self, tx: _Execute) -> None:
        """Let no other transaction write until this one ends, where the engine can do that."""
        tx("SAVEPOINT before_lock")
        try:
            tx(LOCK)
        except (errors.FeatureNotSupported, errors.SyntaxError):  # CockroachDB has no such lock.
            tx("ROLLBACK TO SAVEPOINT before_lock")

    def check(self) -> None:
        """See that each index has what its table has, with the extension amcheck."""
        sql = """
            SELECT bt_index_check(indexrelid::regclass, true) FROM pg_index WHERE indrelid IN (
                'wallet'::regclass, 'accounts'::regclass, 'transactions'::regclass,
                'holds'::regclass, 'issuer_keys'::regclass)"""
        try:
            self.read(lambda tx: tx(sql), wallet.LONG_TIMEOUT_S)
        except Unavailable as error:
            state = getattr(error.__cause__, "sqlstate", None)
            diagnosis = getattr(error.__cause__, "diag", None)
            reason = str((diagnosis and diagnosis.message_primary) or error)
            if state in CORRUPTED:
                raise WrongBooks(f"{self.location} is damaged: {reason}") from error
            if state in NO_AMCHECK:
                reason += ". That needs CREATE EXTENSION amcheck, and the right to use it"
            logger.warning("the indexes of %s were not checked: %s", self.location, reason)

    def close(self) -> None:
        """Close what is not in use. What is in use is closed when its call has ended."""
        self._line.is_closed = True
        self._pool.close()

    def _gather(self, waits: bool, writes: list[_Together]) -> None:
        """Try to run writes of one function together. Those of several accounts wait for no lock,
        so that no row that is locked for long delays the others.
        """
        tx = PostgresTx(is_one_statement=not waits and len(writes) == 1, waits=waits)
        outcomes: Sequence[Any] = ()
        deadline = writes[0].since + wallet.DATABASE_TIMEOUT_S
        try:
            if time.monotonic() > self._away_until:
                items = [write.item for write in writes]
                outcomes = self._attempt(tx, lambda tx: writes[0].function(tx, items), deadline)
        except Exception as error:  # Also one of ours: whose it is, a run alone tells.
            logger.debug("%d writes are run one by one: %s", len(writes), error)
            for write in writes:
                write.is_unknown = tx.may_be_kept(error)
            if tx.connection and tx.connection.closed:
                self._pool.drain()  # The others may be as dead.
        for write, outcome in zip_longest(writes, outcomes):
            write.outcome, write.done = _NotTogether() if outcome is None else outcome, True
        self.observe([None for write in writes if not write.error])

    @_waiting()
    def _call(self, function: Callable[[_Tx], T], is_write: bool, timeout_s: float | None,
              earlier: _Together | None = None) -> T:
        """Run `function` until it succeeds, while running it again may help and there is time."""
        unknown, now = earlier.is_unknown if earlier else False, time.monotonic()
        if not unknown:
            self._line.check_usable()
        started = earlier.since if earlier else now
        deadline = started + (timeout_s or wallet.DATABASE_TIMEOUT_S)
        mendings, pause_s = 0, RETRY_PAUSE_S
        if now < self._away_until:
            away = wallet._unavailable("the database has stopped answering")
            raise self.failed(OutcomeUnknown() if unknown else away)
        while True:
            tx = PostgresTx(is_read=not is_write, is_sharded=self._is_sharded)
            try:
                result = self._attempt(tx, function, deadline)
                if is_write:
                    self.observe([None])
                return result
            except Error as error:
                state, connection, committing = error.sqlstate, tx.connection, tx.may_be_kept(error)
                unknown |= committing
                lost = connection.closed if connection else isinstance(error, PoolTimeout)
                mendable = committing or state in CHANGED_MEANWHILE
                mendings += mendable
                again = lost or state in LOST_A_RACE or (mendable and mendings <= MENDINGS_MAX)
                if state == READ_ONLY:  # A standby now: find the primary.
                    self._pool.drain()
                if isinstance(error, IntegrityError) and not again and not unknown:
                    raise
                if not again or not connection or time.monotonic() + pause_s > deadline:
                    if lost and TimedConnection.answered_at < started:
                        logger.error("%s does not answer: %s", self.location, error)
                        self._away_until = time.monotonic() + POSTGRES_AWAY_S
                        self._pool.drain()  # The others may be as dead.
                    reason = error.diag.message_primary or error
                    failure = OutcomeUnknown() if unknown else wallet._unavailable(reason)
                    raise self.failed(failure) from error
            time.sleep(random.uniform(0, pause_s))
            pause_s = min(2 * pause_s, RETRY_PAUSE_MAX_S)

    def _attempt(self, tx: PostgresTx, function: Callable[[_Tx], T], deadline: float) -> T:
        """Run `function` in a transaction, unless it is one statement, or only reads."""
        patience_s = min(wallet.DATABASE_TIMEOUT_S, deadline - time.monotonic())
        with self._pool.connection(patience_s) as connection:
            tx.connection = connection
            connection.deadline = deadline - POSTGRES_DIAL_S  # Leaves time to cancel.
            if tx.is_read or tx.is_one_statement:
                tx.is_committing = tx.is_one_statement
                return function(tx)
            timeout_ms = str(max(1, int((deadline - time.monotonic()) * 800)))
            # What needs no answer goes with what follows, in one round trip.
            with connection.pipeline() as tx.pipeline:
                connection.execute(self._begin)
                connection.execute(LIMITS, (timeout_ms, timeout_ms))
                result = function(tx)
                tx.is_committing = True
                connection.execute("COMMIT")
            return result

    def _wait_until_alone(self, tx: _Execute) -> None:
        """Refuse a database to which another session of our name is connected.

        One whose client has just ended may take a moment to end too.
        """
        ((name,),) = tx("SHOW application_name")
        tx(f"SET application_name = '{ALONE}'")
        deadline = time.monotonic() + wallet.DATABASE_TIMEOUT_S - POSTGRES_DIAL_S
        while tx(OTHER_SESSIONS, name):
            if time.monotonic() > deadline:
                raise NotReady(f"cannot open {self.location}: another process has it open: stop"
                               " that first, or wait until it is done")
            time.sleep(RETRY_PAUSE_MAX_S)

    def _check_server(self, tx: _Execute, read_only: bool) -> None:
        """Refuse a server that can keep no wallet. Warn of one that may lose what it commits."""
        settings: dict[str, str] = dict(tx("SELECT name, setting FROM pg_settings"))
        self._is_sharded = any(name.startswith(SHARDING) for name in settings)
        self.engine = f"Postgres {settings.get('server_version', 'unknown').partition(' ')[0]}"
        if settings.get("transaction_read_only") == "on" and not read_only:
            raise NotReady(f"{self.location} is read-only: name the primary server")
        if (encoding := settings.get("server_encoding", "UTF8")) != "UTF8":
            raise ConfigurationError(
                f"{self.location} is in {encoding}: make a database with ENCODING 'UTF8'")
        for name in ("fsync", "full_page_writes", "synchronous_commit"):
            if settings.get(name) == "off":
                logger.warning("%s has %s off: in a crash it may lose what was answered",
                               self.location, name)
        with suppress(Error):  # Before version 15, and in other engines, there is no such column.
            ((name, kept, now),) = tx(COLLATION_VERSIONS)
            if kept != now:
                logger.warning(
                    "%s was made with version %s of its collation, and the system has %s: run"
                    " REINDEX DATABASE %s; ALTER DATABASE %s REFRESH COLLATION VERSION",
                    self.location, kept, now, name, name)


@dataclass(eq=False)
class _Together(_Write):
    since: float = field(default_factory=time.monotonic)
    is_unknown: bool = False  # It may be kept, though it failed.


class _NotTogether(Exception):
    """It is to be run alone."""


@dataclass(eq=False)
class PostgresTx(_Tx):
    """Runs the statements of a transaction, in a pipeline or each by itself."""

    waits: bool = True
    is_read: bool = False
    is_one_statement: bool = False
    is_sharded: bool = False
    is_committing: bool = False
    connection: TimedConnection | None = None
    pipeline: Pipeline | None = None
    # The last of `many` that may not have been answered yet, and how many rows it writes.
    sent: tuple[Cursor[_Row], int] | None = None

    @property
    def row_lock(self) -> str:  # type: ignore[override]
        return " FOR UPDATE OF accounts" + ("" if self.waits else " SKIP LOCKED")

    def may_be_kept(self, error: Exception) -> bool:
        """May the transaction be kept, though it failed?

        Behind a statement that failed in a pipeline, the server runs no COMMIT.
        """
        is_unwritten = self.sent and self.sent[0].rowcount < self.sent[1]
        is_answer = self.connection and not self.connection.closed  # Not a pooler's.
        state = getattr(error, "sqlstate", None)
        is_undone = state and is_answer and (is_unwritten or self.is_one_statement)
        return self.is_committing and state not in LOST_A_RACE and not is_undone

    def __call__(self, sql: str, *parameters: str | int | None) -> list[_Row]:
        assert self.connection
        # Only without parameters may there be several statements, and in no pipeline.
        cursor = self.connection.execute(sql.replace("?", "%s"), parameters or None)
        if self.pipeline:
            self.pipeline.sync()
            self.sent = None
        return cursor.fetchall() if cursor.description else []

    def many(self, sql: str, rows: Sequence[_Row]) -> None:
        assert self.connection
        cursor = self.connection.cursor()
        self.sent = cursor, len(rows)
        cursor.executemany(sql.replace("?", "%s"), rows)


def _run_one(function: _Each, item: Any, tx: _Tx) -> Any:
    """Return, or raise, what comes of one item."""
    (outcome,) = function(tx, [item])
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
