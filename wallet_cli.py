"""The command line of the wallet: `python wallet.py`, or `wallet` where it is installed.

Here is what belongs to a process of its own, and never to a program that embeds the wallet: the
settings from arguments and the environment, the logs, the signals, and serving until one comes. The
commands are in wallet_commands.py. All about money is in wallet.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import queue
import re
import select
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from difflib import get_close_matches
from functools import partial
from ipaddress import ip_address
from itertools import takewhile
from logging.handlers import QueueHandler
from socket import socket
from typing import Any, NamedTuple, NoReturn, TextIO

from wallet import (
    REQUEST_FIELDS,
    UNFIT,
    App,
    ConfigurationError,
    NotReady,
    OutcomeUnknown,
    Unavailable,
    Wallet,
    WalletError,
    WrongBooks,
    __version__,
    _check_files,
    _format_time,
    _hide_tokens,
    _import_part,
    _make_key,
    access_logger,
    create_app,
    logger,
)

books, commands = _import_part("books"), _import_part("commands")

PROGRAM = "wallet" if __package__ else "python wallet.py"  # As a package it is installed.
# What Kubernetes tells its pods of a Service named wallet (or wallet-NAME), as Docker's links did.
SERVICE_PORT = r"tcp://[0-9A-Fa-f.:\[\]]+:[0-9]+"
OF_SERVICE = r"WALLET_(\w+?_)??(SERVICE_(HOST|PORT(_\w+)?)|PORT(_[0-9]+_[A-Z]+(_[A-Z]+)?)?)"
START_AGAIN = 75  # EX_TEMPFAIL of sysexits.h. After a 2, only a person can help.
THREADS_CONNECTION = 4  # Most threads wait for a turn, and movements that wait share a transaction.
LOG_LINES_MAX = 10_000  # That wait to be written: some seconds of a busy wallet, and 4 MB.
LOG_FLUSH_S = 1  # For them to be written at the end.
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
    def is_flag(self) -> bool:
        """Is it on or off, so that it may stand on the command line without a value?"""
        return self.allowed == range(2)

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
        if UNFIT.search(text):
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
    _Setting("threads", "32", "how many requests waitress works on at once; for each four, one"
             " connection to Postgres is kept", range(1, 65)),
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
    if settings["issuer-token"] is not None:
        _import_part("overview").check_issuer_token(settings["issuer-token"])
    if settings["trusted-proxy"] is not None:
        _import_part("proxies").Proxy(settings["trusted-proxy"])
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
                  connections=math.ceil(settings["threads"] / THREADS_CONNECTION), **options)


def open_served(settings: Mapping[str, Any]) -> Wallet:
    """Return the wallet that the settings name, to be served."""
    try:
        tempfile.gettempdir()
    except OSError as error:  # Without one, SQLite fails in each batch, and long answers break off.
        raise ConfigurationError(f"{error.strerror}: make /tmp writable, or name a folder in TMPDIR"
                                 ) from error
    wallet = open_wallet(settings, create=not settings["must-exist"])
    books.warn_of_clock(wallet)
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
                       UNFIT.sub("?", ", ".join(unknown)))


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
    if commands.is_terminal(sys.stdout):
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
            f" {commands.format_amount(1250, wallet.currency_digits)}."
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
    handler.setFormatter(line if commands.is_terminal(sys.stderr) else _JSONFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("psycopg").setLevel(logging.ERROR)  # Else, in an outage, many lines a second.


# Arguments ########################################################################################


class _ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if wrong := re.match("argument COMMAND: invalid choice: '([^']*)'", message):
            names = [command.name for command in commands.COMMANDS]
            message = f"there is no command {wrong[1]!r}{_suggest(wrong[1], names)}"
        message = re.sub("^argument (--[a-z-]+):", r"\1", message)
        raise ConfigurationError(f"{_hide_tokens(message)}; see --help")


def _make_parser(program: str, file: Mapping[str, str] | None = None) -> _ArgumentParser:
    """Return what parses the command line, and with `file` what shtab completes it by.

    That says how a shell completes the name of a file.
    """
    parser = _ArgumentParser(
        program, description="Keep money balances, and answer about them over HTTP.",
        epilog=f"Example: {program} --port 8080 --dsn sqlite:////var/lib/wallet/wallet.db",
        allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"wallet {__version__}")
    added = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    parsers = {parser: ""}
    for command in commands.COMMANDS:
        taken = added.add_parser(
            command.name, help=command.meaning, description=command.meaning, allow_abbrev=False,
            epilog=f"The options of `{program} --help`, such as --dsn, may come here too."
                   f" Example: {program} {command.example}")
        for name, options in _arguments_of(command).items():
            argument = taken.add_argument(name, **options)
            if file and argument.metavar == "FILE":
                argument.complete = file  # type: ignore[attr-defined]
        parsers[taken] = "" if file else argparse.SUPPRESS
    for taken, hidden in parsers.items():
        for one in SETTINGS:
            optional: dict[str, Any] = {"nargs": "?", "const": "1"} if one.is_flag else {}
            taken.add_argument(
                f"--{one.name}", dest=one.name, metavar="VALUE", action=one.action,
                default=argparse.SUPPRESS, **optional,
                help=hidden or f"{one.meaning} [{one.variable}={one.default}]")
    return parser


def _arguments_of(command: Any) -> dict[str, Any]:
    return {**command.arguments, **(commands.JSON if command.run else {})}


def _parse_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """Return every setting, the command, and what it is given.

    Raises ConfigurationError for an unknown option or a bad value.
    """
    _refuse_unknown_options(arguments)
    # A flag has no value where a command follows.
    names = {command.name for command in commands.COMMANDS}
    flags = {f"--{one.name}" for one in SETTINGS if one.is_flag}
    arguments = [f"{one}=1" if one in flags and after in names else one
                 for one, after in zip(arguments, [*arguments, ""][1:], strict=True)]
    parser = _make_parser(PROGRAM)
    parsed, extra = parser.parse_known_args(arguments)
    given = vars(parsed) | {"command": parsed.command or "serve"}
    # Before 3.12.7, argparse takes no [AMOUNT] behind an option.
    if len(extra) == 1 and "amount" in given and given["amount"] is None:
        given["amount"] = extra.pop()
    if extra:
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if "key" in given and given["key"] is None:
        given["key"] = _make_key()
    return given | load_settings(given)


def _refuse_unknown_options(arguments: Sequence[str]) -> None:
    """Raise ConfigurationError, which names the option that may have been meant."""
    given = [one for one in commands.COMMANDS if one.name in arguments] or commands.COMMANDS
    known = {"--help", "--version", *(f"--{one.name}" for one in SETTINGS),
             *(name for one in given for name in _arguments_of(one) if name.startswith("--"))}
    options = [one for one in takewhile("--".__ne__, arguments) if one.startswith("--")]
    for option in (one.partition("=")[0] for one in options):
        if option not in known:
            near = _suggest(option, known)
            raise ConfigurationError(f"there is no option {_hide_tokens(option)}{near}; see --help")


def _suggest(wrong: str, names: Iterable[str]) -> str:
    return "".join(f" (is it {one}?)" for one in get_close_matches(wrong, names, 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit code: see docs/operating.md."""
    arguments = sys.argv[1:] if arguments is None else arguments
    settings: dict[str, Any] = {}
    output = commands.Output("--json" in arguments)
    try:
        settings = _parse_arguments(arguments)
        is_served = settings["command"] == "serve"
        _configure_logging(settings["log-level"], is_served)
        _check_files("checks.sql")
        if is_served:
            _run_server(settings)
        else:
            _run_command(settings, output)
        print(end="", flush=True)
        return 0
    except WalletError as error:
        for handler in logging.getLogger().handlers:
            handler.flush()  # What led to it comes first.
        is_unknown = isinstance(error, OutcomeUnknown) and "key" in settings
        output.fail(_tell_key(settings) if is_unknown else error)
        damage = re.search("image is malformed|malformed database", str(error))
        is_wrong = isinstance(error, WrongBooks) or damage
        if is_wrong and settings["command"] == "verify":
            return 1
        may_pass = isinstance(error, (NotReady, Unavailable)) and not damage
        return _choose_code(settings) if may_pass else 2
    except KeyboardInterrupt:
        interrupted = f"interrupted{_tell_lost(settings)}"
        output.fail(_tell_key(settings) if "key" in settings else interrupted)
        return 130  # As a shell has it: 128 and the number of SIGINT.
    except OSError as error:  # Of the output, which Python would try to write again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        is_enough = isinstance(error, BrokenPipeError)  # For the reader, as for `head`.
        if "key" in settings:
            output.fail(_tell_key(settings))
        elif not is_enough:
            output.fail(f"{error}{_tell_lost(settings)}")
        return 141 if is_enough else _choose_code(settings)  # 128 and the number of SIGPIPE.
    except Exception:  # Python would exit with 1, as if the books were wrong.
        logger.exception("a fault of the wallet")
        if "key" in settings:
            output.fail(_tell_key(settings))
        return _choose_code(settings)


def _run_command(settings: Mapping[str, Any], output: Any) -> None:
    """Run a command, with its wallet."""
    if sys.stdout is None:
        raise ConfigurationError("stdout is closed, and a command writes to it")
    with suppress(AttributeError):  # A program that calls main may have put another one there.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    # So that a backup leaves nothing behind then either.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    command = next(one for one in commands.COMMANDS if one.name == settings["command"])
    if not command.run:
        shtab = commands.import_library("shtab")
        print(shtab.complete(_make_parser("wallet", shtab.FILE), settings["shell"]))
        return
    if settings.get("target", settings["dsn"]) in ("sqlite://", "sqlite:///:memory:"):
        raise ConfigurationError("what is in memory would be gone at once: name a file")
    if command.opens is None:
        command.run(None, settings, output)
        return
    with open_wallet(settings, **command.opens) as wallet:
        output.currency, output.digits = wallet.currency, wallet.currency_digits
        command.run(wallet, settings, output)


def _tell_key(settings: Mapping[str, Any]) -> OutcomeUnknown:
    """Return what is told where money may have moved, and nobody knows."""
    key = settings["key"]
    return OutcomeUnknown("It is not known whether this was done. Run the same command again with"
                          f" --key {shlex.quote(key)}: it has its effect once.", key=key)


def _tell_lost(settings: Mapping[str, Any]) -> str:
    """Return what a command may have done whose output is lost."""
    return {"token": ": the old token may be dead, so run this again",
            "register": ": there may be an account whose token nobody has",
            }.get(settings.get("command", ""), "")


def _choose_code(settings: Mapping[str, Any]) -> int:
    """Return the exit code after what may pass. Supervisors start again what serves."""
    return START_AGAIN if settings.get("command") == "serve" else 2
