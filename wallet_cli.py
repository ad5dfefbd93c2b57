"""The command line of the wallet: `python wallet.py`, or `wallet` where it is installed.

Here is what belongs to a process of its own, and never to a program that embeds the wallet: the
settings from arguments and the environment, the logs, the signals, serving until one comes, and the
commands for who runs it. All about money is in wallet.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import queue
import re
import select
import shlex
import signal
import sqlite3
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from datetime import datetime, timezone
from difflib import get_close_matches
from functools import partial
from hashlib import sha256
from ipaddress import ip_address
from logging.handlers import QueueHandler
from pathlib import Path
from socket import socket
from typing import Any, NamedTuple, NoReturn, TextIO

from wallet import (
    LONG_TIMEOUT_S,
    REQUEST_FIELDS,
    SCHEMA_VERSION,
    UNFIT,
    Account,
    App,
    ConfigurationError,
    NotReady,
    SQLiteDatabase,
    Unavailable,
    Wallet,
    WalletError,
    WrongBooks,
    __version__,
    _as_time,
    _check_files,
    _check_issuer_token,
    _Execute,
    _format_time,
    _hide_tokens,
    _import_part,
    _insert_rows,
    _now_us,
    _parse_proxy,
    _parse_time,
    _read_sql,
    _Row,
    _to_json,
    access_logger,
    create_app,
    logger,
)

PROGRAM = "wallet" if __package__ else "python wallet.py"  # As a package it is installed.
# What Kubernetes tells its pods of a Service named wallet (or wallet-NAME), as Docker's links did.
SERVICE_PORT = r"tcp://[0-9A-Fa-f.:\[\]]+:[0-9]+"
OF_SERVICE = r"WALLET_(\w+?_)??(SERVICE_(HOST|PORT(_\w+)?)|PORT(_[0-9]+_[A-Z]+(_[A-Z]+)?)?)"
START_AGAIN = 75  # EX_TEMPFAIL of sysexits.h. After a 2, only a person can help.
CLOCK_AHEAD_MAX_S = 60  # More than clocks that are set by a network differ by.
BACKUP_PAGES = 5000  # At a time, 20 MB. Ctrl-C is heard in between.
COPY_ROWS = 500  # To a statement: SQLite takes 32,766 parameters, Postgres 65,535.
LOG_LINES_MAX = 10_000  # That wait to be written: some seconds of a busy wallet, and 4 MB.
LOG_FLUSH_S = 1  # For them to be written at the end.
VERIFY_ACCOUNTS = 100  # To a statement, which is one step of the progress bar.
AMOUNTS = "balance", "available"  # Of an account.
_Report = Callable[[int, int], None]  # It is told how much is done of how much.
TRY = """\
Open the address in a browser, or try it from another terminal:

TOKEN=$(curl -s {url}/api/register -H Content-Type:application/json -d '{{"name": "Ada"}}' \
| tee /dev/stderr | grep -o 'wlt_[0-9A-Za-z]*')
curl -s {url}/api/transactions/topup -H "Authorization: Bearer $TOKEN" \
-H Content-Type:application/json -d '{{"amount": 1250}}'
curl -s {url}/api/transactions/charge -H "Authorization: Bearer $TOKEN" \
-H Content-Type:application/json -d '{{"amount": 2000}}'
"""


# Settings #########################################################################################


class _Setting(NamedTuple):
    """One setting: `--name` on the command line, or WALLET_NAME in the environment."""

    name: str
    default: str
    meaning: str
    allowed: range | tuple[str, ...] = ()
    action: str = "store"  # Of argparse: "append" where several may be given.

    @property
    def variable(self) -> str:
        """The name of its environment variable."""
        return "WALLET_" + self.name.upper().replace("-", "_")

    def parse(self, given: str | Sequence[str] | None) -> Any:
        """Return what a text stands for, or without one the default. Raises ConfigurationError."""
        given = given if given is None or isinstance(given, str) else " ".join(given)
        text, named = self.default if given is None else given, f"--{self.name} or {self.variable}"
        if given == "":  # Read as the default, a secret that is lost would open the wallet to all.
            raise ConfigurationError(f"{named} is empty: give it a value, or leave it out")
        if re.search(UNFIT, text):
            raise ConfigurationError(
                f"{named} has a control character, such as a carriage return")
        if self.action == "append":
            return re.split("[ ,]+", text) if text else []
        if isinstance(self.allowed, range):
            if re.fullmatch("[0-9]{1,9}", text) and int(text) in self.allowed:
                return int(text)
            rule = f"an integer from {self.allowed[0]} to {self.allowed[-1]}"
        else:
            if not self.allowed or text in self.allowed:
                return text or None
            rule = f"one of {', '.join(self.allowed)}"
        raise ConfigurationError(f"{named} must be {rule}, not {text!r}")


SETTINGS = (
    _Setting("dsn", "sqlite:///wallet.db", "where the money is kept: sqlite:///FILE, sqlite:// in"
             " memory, or postgresql://USER:PASSWORD@HOST/DATABASE"),
    _Setting("must-exist", "0", "1 to start only where the command init has made the database",
             range(2)),
    _Setting("host", "127.0.0.1",
             "the address to listen on; 0.0.0.0 means all of this machine's, and :: those of IPv6"
             " too"),
    _Setting("port", "4000", "the TCP port to listen on; 0 means any free one", range(65536)),
    _Setting("threads", "8", "how many connections to Postgres are kept, and how many requests"
             " waitress works on at once", range(1, 65)),
    _Setting("drain-s", "0", "how many seconds it serves on after SIGTERM or Ctrl-C, while /readyz"
             " answers 503, so that a balancer can look away first", range(301)),
    _Setting("currency", "", "a code of ISO 4217 such as USD, or a unit of your own with its number"
             " of decimals such as CRD/0, fixed when the database is made; USD if not given then"),
    _Setting("issuer-token", "", "at least 32 characters; with it, only who sends it makes accounts"
             " and tops them up, and without it everyone does"),
    _Setting("trusted-proxy", "", "the IP address of the proxy in front, which may tell the log"
             " where a request comes from"),
    _Setting("cors-origin", "", "an origin such as https://shop.example whose pages may use the"
             " wallet from a browser, or * for all; give it again for each, or in the variable all"
             " of them, with spaces or commas between", action="append"),
    _Setting("metrics", "0", "1 to answer /metrics, in Prometheus's text format, to everyone who"
             " reaches the wallet", range(2)),
    _Setting("log-level", "info", "how much to log; info is a line per request",
             ("debug", "info", "warning", "error")),
)


def load_settings(given: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Return every setting: given, else the environment's, else its default.

    Raises ConfigurationError.
    """
    found = {one.name: os.environ.get(one.variable) for one in SETTINGS}
    if _is_of_service():
        found["port"] = None
    settings = {one.name: one.parse(given.get(one.name, found[one.name])) for one in SETTINGS}
    _check_issuer_token(settings["issuer-token"])
    _parse_proxy(settings["trusted-proxy"])
    if settings["cors-origin"]:
        _import_part("cors").Cors(settings["cors-origin"])
    return settings


def _is_of_service() -> bool:
    """Is WALLET_PORT no setting, but where Kubernetes has a Service named wallet?"""
    return bool(re.fullmatch(SERVICE_PORT, os.environ.get("WALLET_PORT", "")))


def open_wallet(settings: Mapping[str, Any], **options: bool) -> Wallet:
    """Return the wallet that the settings name, opened with these options of `Wallet`."""
    _warn_of_variables()
    return Wallet(settings["dsn"], currency=settings["currency"],
                  connections=settings["threads"], **options)


def open_served(settings: Mapping[str, Any]) -> Wallet:
    """Return the wallet that the settings name, to be served."""
    try:
        tempfile.gettempdir()
    except OSError as error:  # Without one, SQLite fails in each batch, and long answers break off.
        raise ConfigurationError(f"{error.strerror}: make /tmp writable, or name a folder in TMPDIR"
                                 ) from error
    wallet = open_wallet(settings, create=not settings["must-exist"])
    _warn_of_clock(wallet)
    return wallet


def _warn_of_variables() -> None:
    """Warn of what is in the environment and is no setting."""
    if _is_of_service():
        logger.warning("WALLET_PORT is %s, where Kubernetes has a Service named wallet: it is no"
                       " setting, and is ignored (enableServiceLinks: false leaves it out)",
                       os.environ["WALLET_PORT"])
    known = [one.variable.removeprefix("WALLET_") for one in SETTINGS]
    unknown = []
    for name in sorted(os.environ):
        # Near is told without the prefix, which would make all alike.
        rest = name.removeprefix("WALLET_")
        of_service = re.fullmatch(OF_SERVICE, name)
        if of_service and f"WALLET_{of_service[1] or ''}SERVICE_HOST" in os.environ:
            continue
        if rest not in (name, *known):
            near = get_close_matches(rest, known, 1)
            unknown.append(name + "".join(f" (is it WALLET_{one}?)" for one in near))
    if unknown:
        logger.warning("these variables are unknown, and do nothing: %s",
                       re.sub(UNFIT, "?", ", ".join(unknown)))


def _warn_of_clock(wallet: Wallet) -> None:
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


# Serving ##########################################################################################


def _run_server(settings: Mapping[str, Any]) -> None:
    """Serve until it is told to stop."""
    part = _import_part("server")  # What is missing is said before anything is made.
    if settings["metrics"]:
        _import_part("metrics")
    with part.bind(settings["host"], settings["port"]) as bound, open_served(settings) as wallet:
        app = create_app(wallet, settings["issuer-token"], settings["metrics"],
                         settings["trusted-proxy"], settings["cors-origin"])
        _warn_if_open(app, bound)
        _serve(app, bound, settings["threads"], settings["drain-s"])


def _warn_if_open(app: App, bound: socket) -> None:
    """Warn if more than this machine reaches the wallet, and there is no issuer."""
    host = bound.getsockname()[0].partition("%")[0]
    if not app.has_issuer and not ip_address(host).is_loopback:
        logger.warning(
            "it listens on %s, and there is no issuer: whoever reaches it can make accounts and"
            " fill them with any amount. Set WALLET_ISSUER_TOKEN, or let a proxy admit only your"
            " own services", host)


def _serve(app: App, bound: socket, threads: int, drain_s: int) -> None:
    """Serve until SIGTERM or Ctrl-C, and finish what runs. A second signal ends it at once."""
    part = _import_part("server")
    _pin_process()
    part.raise_file_limit(threads)
    server = part.Server(app, bound, threads)
    if app.metrics:
        app.metrics.watch(partial(part.usage, server))
        for handler in logging.getLogger().handlers:
            if isinstance(handler, _LogHandler):
                handler.count_dropped = app.metrics.log_lines_dropped.inc
    _stop_by_signals(partial(server.stop, drain_s))
    database = app.wallet.database
    logger.info("started: wallet %s on %s, with %s at %s", __version__, server.url,
                database.engine, database.location)
    if _is_terminal(sys.stdout):
        print(_make_banner(app, server.url), flush=True)
    server.run()


def _stop_by_signals(stop: Callable[[], None]) -> None:
    """Call `stop` for SIGTERM and Ctrl-C. A second signal ends the process at once."""
    signals = signal.SIGTERM, signal.SIGINT

    def handle(*_: object) -> None:
        for number in signals:
            signal.signal(number, signal.SIG_DFL)
        stop()

    for number in signals:
        signal.signal(number, handle)


def _pin_process() -> None:
    """Stay on one processor. Python's threads run one at a time anyway, and take turns cheaper."""
    with suppress(AttributeError, OSError):  # Only Linux has it, and a sandbox may forbid it.
        processors = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {processors[os.getpid() % len(processors)]})


def _make_banner(app: App, address: str) -> str:
    """Return what is printed at the start."""
    url = address.replace("//0.0.0.0", "//127.0.0.1").replace("[::]", "[::1]")
    issued = "Only the issuer's token makes and fills accounts."
    wallet = app.wallet
    return (f"wallet {__version__} listens on {address}, with its data in"
            f" {wallet.database.location}, in {wallet.currency}: an amount of 1250 is"
            f" {_format_amount(1250, wallet.currency_digits)}."
            f" {issued if app.has_issuer else TRY.format(url=url)}")


# Logs #############################################################################################


class _LineFormatter(logging.Formatter):
    """A line for people."""

    def formatException(self, ei: Any) -> str:
        return _hide_tokens(super().formatException(ei))


class _JSONFormatter(_LineFormatter):
    """A JSON object in a line, for programs. It has what the wallet knows of a request."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        document = {"time": _format_time(moment), "level": record.levelname, "logger": record.name,
                    "message": record.getMessage()}
        if record.name == access_logger.name:
            document |= {name: vars(record)[name] for name in REQUEST_FIELDS}
        if record.exc_info:
            document["exception"] = record.exc_text or self.formatException(record.exc_info)
        return json.dumps(document)


class _LogHandler(QueueHandler):
    """Keeps no request waiting for whoever reads the log. A line that finds no room is dropped.

    A thread of its own writes. It is a daemon, so that nobody has to read for the wallet to stop.
    """

    lines: queue.Queue[str]

    def __init__(self, stream: TextIO) -> None:
        self.lines = queue.Queue(LOG_LINES_MAX)
        super().__init__(self.lines)
        self.dropped, self._counting = 0, threading.Lock()
        self.count_dropped: Callable[[], None] = lambda: None
        self._file = stream.fileno()
        threading.Thread(target=self._write, name="wallet-log", daemon=True).start()

    def prepare(self, record: logging.LogRecord) -> Any:
        """Return the whole line: what it is about may change."""
        return self.format(record)

    def enqueue(self, record: Any) -> None:
        """Put a line in the queue, unless that is full."""
        try:
            self.lines.put_nowait(record)
        except queue.Full:
            self._drop()

    def _drop(self) -> None:
        with self._counting:
            self.dropped += 1
        self.count_dropped()

    def flush(self) -> None:
        """Wait until all is written, for LOG_FLUSH_S at most."""
        with self.lines.all_tasks_done:
            self.lines.all_tasks_done.wait_for(
                lambda: not self.lines.unfinished_tasks, timeout=LOG_FLUSH_S)

    def _write(self) -> None:
        told = 0
        while True:
            if not self._write_line(self.lines.get()):
                self._drop()
            elif told < (dropped := self.dropped) and self.lines.qsize() < LOG_LINES_MAX // 2:
                known = {"name": logger.name, "levelno": logging.WARNING, "levelname": "WARNING",
                         "msg": f"{dropped - told} lines of this log were dropped: nobody read it,"
                                " or its disk was full"}
                is_told = self._write_line(self.format(logging.makeLogRecord(known)))
                told = dropped if is_told else told
            self.lines.task_done()

    def _write_line(self, line: str) -> bool:
        """Write a line, however long that takes. Return False where it cannot be done."""
        left = f"{line}\n".encode(errors="backslashreplace")
        while left:  # Not by sys.stderr, whose lock this thread may hold when Python ends.
            try:
                left = left[os.write(self._file, left):]
            except BlockingIOError:
                select.select((), (self._file,), ())
            except OSError:
                return False
        return True


def _configure_logging(level: str, is_served: bool) -> None:
    """Log to stderr: lines for people on a terminal, elsewhere JSON."""
    if sys.stderr is None or logging.getLogger().handlers:  # Closed, or set up by the program.
        return
    handler: logging.Handler = logging.StreamHandler()
    if is_served:
        with suppress(OSError):  # It is no file, as in a notebook.
            handler = _LogHandler(sys.stderr)
    line = _LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S%z")
    handler.setFormatter(line if _is_terminal(sys.stderr) else _JSONFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("psycopg").setLevel(logging.ERROR)  # Else, in an outage, many lines a second.


def _is_terminal(stream: TextIO | None) -> bool:
    """Is this a terminal? (It is None when it was closed before the start.)"""
    return stream is not None and stream.isatty()


def _show_progress(done: int, total: int) -> None:
    """Draw a bar on stderr, if that is a terminal. What is printed next takes its place."""
    if _is_terminal(sys.stderr):
        bar = "#" * (20 * done // max(done, total, 1))
        print(f"[{bar:20}]", end="\r", file=sys.stderr, flush=True)


# Commands #########################################################################################


def _run_init(settings: Mapping[str, Any]) -> None:
    _refuse_memory(settings["dsn"])
    with open_wallet(settings) as wallet:
        print(f"{wallet.database.location} {'is now' if wallet.created else 'was already'} a wallet"
              f" in {wallet.currency} with {wallet.currency_digits} decimals")


def _run_verify(settings: Mapping[str, Any]) -> None:
    with open_wallet(settings, read_only=True) as wallet:
        _warn_of_clock(wallet)
        accounts, entries = verify(wallet, _show_progress)
        print(f"verified: {wallet.database.location} has {accounts:,} accounts and {entries:,}"
              " entries that agree")


def verify(wallet: Wallet, report: _Report = lambda done, total: None) -> tuple[int, int]:
    """Recompute every balance, sequence, hold, refund and transfer.

    Return how many accounts and entries there are. This writes nothing, and others may write
    meanwhile. `report` is told now and then how much of how much is done. Raises WrongBooks,
    which names the first row that is wrong.
    """
    wallet.database.check()
    return _verify_books(partial(_read, wallet), report)


def _read(wallet: Wallet, sql: str, *parameters: str | int | None) -> list[_Row]:
    return wallet.database.read(lambda tx: tx(sql, *parameters), LONG_TIMEOUT_S)


def _verify_books(tx: _Execute, report: _Report) -> tuple[int, int]:
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


def _run_accounts(settings: Mapping[str, Any]) -> None:
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    line = "{id:20} {balance:>17} {available:>17} {frozen:6} {created_at:27} {name}".format_map
    with open_wallet(settings, create=False, read_only=True) as wallet:
        if not settings["json"]:
            names = {name: name for name in Account.__annotations__}
            print(line(names | {name: f"{name} ({wallet.currency})" for name in AMOUNTS}))
        for account in wallet.accounts():
            shown = _to_json(account)
            if settings["json"]:
                print(json.dumps(shown))
            else:  # The name comes last: nobody knows how wide a terminal shows it.
                name = "".join(
                    one if one.isprintable() else ascii(one)[1:-1] for one in account.name)
                shown |= {"name": name, "frozen": "frozen" if account.frozen else ""}
                print(line(shown | {name: _format_amount(shown[name], wallet.currency_digits)
                                    for name in AMOUNTS}))


def _format_amount(amount: int, digits: int) -> str:
    """Return an amount as people write it: 1250 with 2 digits is 12.50."""
    whole, part = divmod(amount, 10**digits)
    return f"{whole}.{part:0{digits}}" if digits else str(whole)


def _run_token(settings: Mapping[str, Any]) -> None:
    with open_wallet(settings, create=False) as wallet:
        print(wallet.replace_token(settings["account"]), flush=True)
    print(f"wallet: this is the token of {settings['account']} from now on, and the old one is"
          " dead", file=sys.stderr)


def _run_freeze(settings: Mapping[str, Any]) -> None:
    frozen = settings["command"] == "freeze"
    with open_wallet(settings, create=False) as wallet:
        wallet.freeze(settings["account"], frozen)
    print(settings["account"], "is frozen" if frozen else "is not frozen")


def _run_backup(settings: Mapping[str, Any]) -> None:
    file = settings["file"]
    with open_wallet(settings, read_only=True) as wallet:
        if not isinstance(wallet.database, SQLiteDatabase):
            raise ConfigurationError(_advise_pg_dump(settings["dsn"], file))
        accounts, entries = back_up(wallet, file, _show_progress)
    print(f"verified: {file} has {os.path.getsize(file):,} bytes, {accounts:,} accounts and"
          f" {entries:,} entries")


def _advise_pg_dump(dsn: str, path: str) -> str:
    """Return the commands that back up and restore Postgres, without the password."""
    from psycopg.conninfo import conninfo_to_dict, make_conninfo

    given = conninfo_to_dict(dsn)
    database = shlex.quote(make_conninfo(
        **{name: str(given[name]) for name in given if "password" not in name}))
    file = shlex.quote(os.path.abspath(path))
    # By name: to restore an extension, such as amcheck, takes a superuser.
    tables = " ".join(f"--table={name}" for name in ("wallet", *KEY_COLUMNS))
    return ("Postgres is backed up while it serves by\n"
            f"(umask 077; pg_dump --format=custom {tables} --file={file} --dbname={database})\n"
            "and restored with all wallets stopped, to a database that is empty, but for the\n"
            "wallet's schema if that is not public, by\n"
            f"pg_restore --exit-on-error --single-transaction --dbname={database} {file}")


def back_up(wallet: Wallet, path: str,
            report: _Report = lambda done, total: None) -> tuple[int, int]:
    """Copy a wallet on SQLite to a new file, as of one moment. Return what `Wallet.verify` does.

    Others may write meanwhile. The file appears whole, verified and synced, or not at all, but that
    without hard links a kill may leave it empty. Raises WrongBooks, and ConfigurationError, also
    where there is a file of that name.
    """
    database, path = wallet.database, os.path.abspath(path)
    if not isinstance(database, SQLiteDatabase):
        raise ConfigurationError(f"{database.location} is backed up by pg_dump")
    if database.path is None:
        raise ConfigurationError(
            "a wallet in memory is gone when it stops: there is nothing to back up")
    if os.path.lexists(path):
        raise ConfigurationError(f"{path} is there already: name a new file")
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
        raise ConfigurationError(f"cannot back up to {path}: {reason}") from error


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


def _run_copy(settings: Mapping[str, Any]) -> None:
    def report(copied: dict[str, int]) -> None:
        rows = " and ".join(f"{count:,} {table}" for table, count in copied.items())
        print(f"copied {rows}", end="\r", file=sys.stderr, flush=True)

    _refuse_memory(settings["target"])
    if settings["source"] == settings["target"]:
        raise ConfigurationError("a wallet cannot be copied to itself: name another database")
    with (Wallet(settings["source"], create=False, alone=True) as source,
          Wallet(settings["target"], alone=True) as target):
        copy_wallet(source, target, report)
        print(f"\nverified: {target.database.location} has every row of"
              f" {source.database.location}, in {source.currency}", file=sys.stderr)


def _refuse_memory(dsn: str) -> None:
    if dsn in ("sqlite://", "sqlite:///:memory:"):
        raise ConfigurationError("what is in memory would be gone at once: name a file")


# Each table's key, which its first columns are.
KEY_COLUMNS = {"accounts": ("id",), "transactions": ("account_id", "sequence"),
               "holds": ("account_id", "sequence"), "issuer_keys": ("idempotency_key",)}


def copy_wallet(source: Wallet, target: Wallet,
                report: Callable[[dict[str, int]], None] = lambda copied: None) -> None:
    """Copy everything to an empty wallet in one transaction, and compare it all at the end.

    Meanwhile nobody can write to the source. `report` is told now and then how many rows of each
    table are copied. Raises ConfigurationError where the target holds data, which changes nothing,
    and WrongBooks where the source is wrong. After a copy that broke off, the target has no wallet,
    and its currency is forgotten.
    """
    def copy(read: _Execute, tx: _Execute) -> None:
        target.database.lock(tx)
        copied = dict.fromkeys(KEY_COLUMNS, 0)
        # All may be there already, if an earlier COMMIT was not answered.
        for table in KEY_COLUMNS if not tx(first) else ():
            for rows in _read_table(read, table):
                _insert_rows(tx, table, rows)
                copied[table] += len(rows)
                report(copied)
        if any(_digest_table(tx, table) != _digest_table(read, table) for table in KEY_COLUMNS):
            raise ConfigurationError("the copy is not what was copied: stop both wallets first")
        _verify_books(tx, lambda done, total: None)
        if tx("SELECT currency, currency_digits FROM wallet") != [unit]:
            tx("DELETE FROM wallet")
            tx("INSERT INTO wallet VALUES (1, ?, ?, ?)", SCHEMA_VERSION, *unit)

    def hold_still(read: _Execute) -> None:
        source.database.lock(read)
        # Until it is all there, it is no wallet, which --must-exist would take it for.
        target.database.write(
            lambda tx: tx("DELETE FROM wallet WHERE NOT EXISTS (SELECT 1 FROM accounts)"))
        target.database.write(partial(copy, read), LONG_TIMEOUT_S)

    first, unit = "SELECT id FROM accounts LIMIT 1", (source.currency, source.currency_digits)
    if _read(target, first):
        raise ConfigurationError(
            f"{target.database.location} already holds accounts: name an empty database")
    source.database.write(hold_still, LONG_TIMEOUT_S)
    target.currency, target.currency_digits = unit


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


def _digest_table(tx: _Execute, table: str) -> int:
    """Return a number that is the same for the same rows, whatever order an engine has."""
    return sum(int.from_bytes(sha256(repr(row).encode()).digest(), "big")
               for rows in _read_table(tx, table) for row in rows)


class _Command(NamedTuple):
    """What the command line does instead of serving. The arguments are those of argparse."""

    name: str
    meaning: str
    example: str
    run: Callable[[Mapping[str, Any]], None]
    arguments: Mapping[str, Mapping[str, Any]]


ACCOUNT_ID = {"account": {"metavar": "ACCOUNT", "help": "the id of the account"}}
COMMANDS = (
    _Command("init", "make the database, if it is not there, and exit", "init --currency EUR",
             _run_init, {}),
    _Command("verify", "recompute every balance, sequence, hold, refund and transfer, and name the"
             " first wrong row", "verify", _run_verify, {}),
    _Command("backup", "copy a wallet on SQLite to a new file while it serves, and verify the copy",
             "backup backup.db", _run_backup,
             {"file": {"metavar": "FILE", "help": "the file, which must not be there"}}),
    _Command("accounts", "list all accounts", "accounts --json", _run_accounts,
             {"--json": {"action": "store_true",
                         "help": "print one JSON object a line, with amounts in minor units"}}),
    _Command("token", "print a new token of an account, whose old one is dead from then on",
             "token acc_4fKq0ZbT9xWm2Lr7", _run_token, ACCOUNT_ID),
    _Command("freeze", "let an account receive nothing and spend nothing",
             "freeze acc_4fKq0ZbT9xWm2Lr7", _run_freeze, ACCOUNT_ID),
    _Command("unfreeze", "undo freeze", "unfreeze acc_4fKq0ZbT9xWm2Lr7", _run_freeze, ACCOUNT_ID),
    _Command("copy", "copy a stopped wallet to another database, and verify the copy",
             "copy --from sqlite:///wallet.db --to postgresql://db/wallet", _run_copy,
             {"--from": {"dest": "source", "metavar": "DSN", "required": True,
                         "help": "the wallet, which must be stopped"},
              "--to": {"dest": "target", "metavar": "DSN", "required": True,
                       "help": "the database, which must be empty"}}),
)


# Arguments ########################################################################################


class _ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = message.replace("argument COMMAND: invalid choice:", "there is no command")
        message = re.sub("^argument (--[a-z-]+):", r"\1", message)
        raise ConfigurationError(f"{_hide_tokens(message)}; see --help")


def _parse_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """Return every setting, and the command that is given, None for none.

    Raises ConfigurationError for an unknown option or a bad value.
    """
    parser = _ArgumentParser(
        PROGRAM, description="Keep money balances, and answer about them over HTTP.",
        epilog=f"Example: {PROGRAM} --port 8080 --dsn sqlite:////var/lib/wallet/wallet.db",
        allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"wallet {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands, instead of serving")
    parsers = {parser: ""}
    for command in COMMANDS:
        taken = commands.add_parser(
            command.name, help=command.meaning, description=command.meaning, allow_abbrev=False,
            epilog=f"The options of `{PROGRAM} --help`, such as --dsn, may come here too."
                   f" Example: {PROGRAM} {command.example}")
        for name, options in command.arguments.items():
            taken.add_argument(name, **options)
        parsers[taken] = argparse.SUPPRESS
    for taken, hidden in parsers.items():
        for one in SETTINGS:
            taken.add_argument(
                f"--{one.name}", dest=one.name, metavar="VALUE", action=one.action,
                default=argparse.SUPPRESS,
                help=hidden or f"{one.meaning} [{one.variable}={one.default}]")
    _refuse_unknown_options(arguments)
    given = vars(parser.parse_args(arguments))
    return given | load_settings(given)


def _refuse_unknown_options(arguments: Sequence[str]) -> None:
    """Raise ConfigurationError, which names the option that may have been meant."""
    known = {"--help", "--version", *(f"--{one.name}" for one in SETTINGS),
             *(name for command in COMMANDS for name in command.arguments)}
    for option in (one.partition("=")[0] for one in arguments if one.startswith("--")):
        if option not in known:
            near = "".join(f" (is it {one}?)" for one in get_close_matches(option, known, 1))
            raise ConfigurationError(f"there is no option {_hide_tokens(option)}{near}; see --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit code: see docs/operating.md."""
    settings: dict[str, Any] = {}
    try:
        settings = _parse_arguments(sys.argv[1:] if arguments is None else arguments)
        _configure_logging(settings["log-level"], not settings["command"])
        _check_files("checks.sql")
        runs = {command.name: command.run for command in COMMANDS}
        if settings["command"]:
            if sys.stdout is None:
                raise ConfigurationError("stdout is closed, and a command writes to it")
            # So that a backup leaves nothing behind then either.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        runs.get(settings["command"], _run_server)(settings)
        print(end="", flush=True)
        return 0
    except WalletError as error:
        for handler in logging.getLogger().handlers:
            handler.flush()  # What led to it comes first.
        print(f"wallet: {error}", file=sys.stderr)
        damage = re.search("image is malformed|malformed database", str(error))
        is_wrong = isinstance(error, WrongBooks) or damage
        if is_wrong and settings["command"] == "verify":
            return 1
        may_pass = isinstance(error, (NotReady, Unavailable)) and not damage
        return _choose_code(settings) if may_pass else 2
    except KeyboardInterrupt:
        print("wallet: interrupted", file=sys.stderr)
        return 130  # As a shell has it: 128 and the number of SIGINT.
    except OSError as error:  # Of the output, which Python would try to write again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # The reader has had enough, as `head` has.
            return 141  # 128 and the number of SIGPIPE.
        print(f"wallet: {error}", file=sys.stderr)
        return _choose_code(settings)
    except Exception:  # Python would exit with 1, as if the books were wrong.
        logger.exception("a fault of the wallet")
        return _choose_code(settings)


def _choose_code(settings: Mapping[str, Any]) -> int:
    """Return the exit code after what may pass. Supervisors start again what serves."""
    return 2 if settings.get("command") else START_AGAIN
