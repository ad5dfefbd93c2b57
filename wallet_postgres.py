"""Keeps a wallet in Postgres, or in an engine that speaks its protocol, by psycopg and its pool.

wallet.py loads this module for a DSN that begins with postgresql://, and for no other.
"""

from __future__ import annotations

import logging
import os
import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from psycopg import Connection, Error, IntegrityError, OperationalError, errors
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
    _check_usable,
    _Execute,
    _Row,
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
                with suppress(Error):  # Nobody waits for the statement any more.
                    self.cancel_safe(timeout=POSTGRES_DIAL_S)
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
        self._process_id, self._away_until = os.getpid(), 0.0
        self._begin = "BEGIN READ ONLY" if read_only else "BEGIN"
        # A prepared statement belongs to a session, and a pooler such as PgBouncer changes those.
        options: dict[str, Any] = POSTGRES_DEFAULTS | given | {
            "client_encoding": "UTF8", "prepare_threshold": None, "autocommit": True}
        try:
            with TimedConnection.connect(**options) as connection:
                connection.deadline = time.monotonic() + wallet.DATABASE_TIMEOUT_S
                self._check_server(partial(_execute_on, connection), read_only)
                if alone and not read_only:
                    self._wait_until_alone(partial(_execute_on, connection))
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

    def write(self, function: Callable[[_Execute], T], timeout_s: float | None = None) -> T:
        """Run `function` in a transaction of its own (see Database)."""
        return self._call(function, True, timeout_s)

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
        self._pool.close()

    def _call(self, function: Callable[[_Execute], T], is_write: bool,
              timeout_s: float | None) -> T:
        """Run `function` until it succeeds, while running it again may help and there is time."""
        _check_usable(self._process_id, self._pool.closed)
        started = time.monotonic()
        deadline = started + (timeout_s or wallet.DATABASE_TIMEOUT_S)
        if started < self._away_until:
            raise self.failed(wallet._unavailable("the database has stopped answering"))
        unknown, mendings, pause_s = False, 0, RETRY_PAUSE_S
        while True:
            connection, committing = None, False
            patience_s = min(wallet.DATABASE_TIMEOUT_S, deadline - time.monotonic())
            try:
                with self._pool.connection(patience_s) as connection:
                    connection.deadline = deadline - POSTGRES_DIAL_S  # Leaves time to cancel.
                    tx = partial(_execute_on, connection)
                    if not is_write:
                        return function(tx)
                    # The server gives up before the client has to cut the connection, and frees
                    # the locks of a client that has vanished. This is set for this transaction
                    # alone, else a pooler would hand the settings on.
                    timeout_ms = max(1, int((deadline - time.monotonic()) * 800))
                    tx(f"{self._begin}; SET LOCAL statement_timeout = {timeout_ms};"
                       f" SET LOCAL idle_in_transaction_session_timeout = {timeout_ms}")
                    result = function(tx)
                    committing = True
                    tx("COMMIT")
                    self.observe([None])
                    return result
            except Error as error:
                state = error.sqlstate
                lost_a_race = state in LOST_A_RACE
                unknown |= committing and not lost_a_race
                lost = connection.closed if connection else isinstance(error, PoolTimeout)
                mendable = committing or state in CHANGED_MEANWHILE
                mendings += mendable
                again = lost or lost_a_race or (mendable and mendings <= MENDINGS_MAX)
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


def _execute_on(connection: TimedConnection, sql: str, *parameters: str | int | None) -> list[_Row]:
    # Only without parameters may there be several statements.
    cursor = connection.execute(sql.replace("?", "%s"), parameters or None)
    return cursor.fetchall() if cursor.description else []
