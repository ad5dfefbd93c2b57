"""The commands of the wallet: what each of them does, and how it is shown.

COMMANDS is the one table of them. wallet_cli.py makes the parser, the help and the completion of
it. A command gets the wallet, opened, what was given, and an Output. That shows records as tables
for people, or with --json as one JSON object a line, with the members that HTTP answers.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from itertools import chain, islice
from typing import Any, NamedTuple, NoReturn, TextIO, get_args

from wallet import (
    AMOUNT_MAX,
    HOLD_DEFAULT_S,
    PAGE_LIMIT_DEFAULT,
    PAGE_LIMIT_MAX,
    SCHEMA_VERSION,
    SIGN_BY_TYPE,
    Account,
    BalanceLimitExceeded,
    ConfigurationError,
    Hold,
    HoldStatus,
    InsufficientFunds,
    MalformedRequest,
    NotFound,
    RefundExceedsCharge,
    SQLiteDatabase,
    Transaction,
    ValidationFailed,
    Wallet,
    WalletError,
    _error_response,
    _format_time,
    _hide_tokens,
    _import_part,
    _parse_time,
    _to_balance,
    _to_json,
)

books = _import_part("books")

AMOUNTS = "balance", "available", "amount", "captured"  # Members that are amounts.
ACCOUNT_COLUMNS = "id", "balance", "available", "name", "frozen", "created_at"
TRANSACTION_COLUMNS = (
    "id", "type", "amount", "balance", "created_at", "description", "reference")
HOLD_COLUMNS = "id", "status", "amount", "captured", "expires_at", "description", "created_at"
COLUMNS = {Account: ACCOUNT_COLUMNS, Transaction: TRANSACTION_COLUMNS, Hold: HOLD_COLUMNS}
ROWS_MEASURED = 1000  # Of a table, before its first line is printed: the columns fit all of these.
LEFT_CHARACTERS = len(", 99 min 59 s left")
SHOWN_CHARACTERS_MAX = 40  # Of a value that is refused.
_Record = Account | Transaction | Hold
_Arguments = dict[str, dict[str, Any]]  # What argparse's add_argument takes, by its name.
_Given = Mapping[str, Any]  # Settings and arguments, by their names.


# Output ###########################################################################################


class Output:
    """What a command says: to people or, with `as_json`, to programs."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.currency, self.digits = "", 2
        self._width = shutil.get_terminal_size().columns if is_terminal(sys.stdout) else 0
        self._is_drawing = False
        self._began_at, self._began_with, self._done = 0.0, 0, 0

    def tell(self, sentence: str, **members: Any) -> None:
        """Print a sentence, or what it says."""
        print(json.dumps(members) if self.as_json else sentence)

    def note(self, sentence: str) -> None:
        """Say something besides on stderr, so that it is no part of the data."""
        if sys.stderr is None:  # Closed before the start: print would take stdout instead.
            return
        shown = "wallet: " + _make_printable(sentence, kept="\n")
        print(json.dumps({"detail": sentence}) if self.as_json else shown, file=sys.stderr)

    def show(self, members: Mapping[str, Any], *names: str) -> None:
        """Print all members of one record, for people a line each, or only these."""
        if self.as_json:
            print(json.dumps(members))
            return
        names = names or tuple(members)
        for name in names:
            unit = f" {self.currency}" if name in AMOUNTS else ""
            text = self._text(name, members[name])
            print(f"{name:{max(map(len, names))}}  {text}{unit}".rstrip())

    def list(self, records: Iterable[_Record], columns: Sequence[str]) -> None:
        """Print records, for people as a table with these columns, as they come."""
        if self.as_json:
            for record in records:
                print(json.dumps(_to_json(record)))
            return
        header = [f"{name} ({self.currency})" if name in AMOUNTS else name for name in columns]
        rows = ([self._text(name, vars(record)[name], brief=True) for name in columns]
                for record in records)
        measured = [header, *islice(rows, ROWS_MEASURED)]
        width = import_library("wcwidth").width
        widths = [max(map(width, cells)) for cells in zip(*measured, strict=True)]
        columns = columns[: self._count_columns(columns, widths)]
        for row in chain(measured, rows):
            print(self._line(columns, row, widths))

    def _count_columns(self, columns: Sequence[str], widths: Sequence[int]) -> int:
        """Return how many columns there is room for. Text is cut, but no amount and no time."""
        end = -2
        for number, (name, width) in enumerate(zip(columns, widths, strict=True)):
            end += 2 + width
            if 0 < self._width < end and (name in AMOUNTS or name.endswith("_at")):
                return number
        return len(columns)

    def report(self, done: int, total: int) -> None:
        """Draw how much is done on stderr, if that is a terminal, and how long the rest takes."""
        if is_terminal(sys.stderr):
            now = time.monotonic()
            if not self._is_drawing or done < self._done:  # As where a copy is made, then verified.
                self._began_at, self._began_with = now, done
            self._done = done
            percent = 100 * done // max(done, total, 1)
            speed = (done - self._began_with) / max(now - self._began_at, 0.001)
            left = format_time_left((total - done) / speed) if speed else ""
            print(f"[{'#' * (percent // 5):20}] {percent:3} %{left:{LEFT_CHARACTERS}}", end="\r",
                  file=sys.stderr, flush=True)
            self._is_drawing = True

    def end_report(self) -> None:
        """Wipe out what `report` has drawn."""
        if self._is_drawing:
            print(" " * (len("[####################] 100 %") + LEFT_CHARACTERS), end="\r",
                  file=sys.stderr, flush=True)
            self._is_drawing = False

    def fail(self, error: WalletError | str) -> None:
        """Print on stderr why it was not done: a line, or the members of a problem document."""
        self.end_report()
        if isinstance(error, str):
            self.note(error)
        elif self.as_json and sys.stderr is not None:
            print(json.dumps(_error_response(error).body), file=sys.stderr)
        else:
            self.note(self._explain(error))

    def _explain(self, error: WalletError) -> str:
        """Return what an error says, with amounts as people write them."""
        text = str(error)
        has_amounts = isinstance(
            error, (BalanceLimitExceeded, InsufficientFunds, RefundExceedsCharge))
        if isinstance(error, ValidationFailed):
            text = text.replace("#/", "")
            has_amounts = "which is what is held" in text
        if has_amounts:
            text = re.sub("[0-9]+", lambda one: format_amount(int(one[0]), self.digits), text)
        return text

    def _text(self, name: str, value: Any, brief: bool = False) -> str:
        """Return a member as people read it."""
        if name in AMOUNTS:
            return format_amount(value, self.digits)
        if name.endswith("_at"):
            value = value if isinstance(value, str) else _format_time(value)
            return re.sub(r"\.\d+", "", value) if brief else str(value)
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, dict):
            value = ", ".join(f"{one}={value[one]}" for one in value)
        return _make_printable("" if value is None else str(value))

    def _line(self, columns: Sequence[str], row: Sequence[str], widths: Sequence[int]) -> str:
        """Return a line of a table, which a terminal shows as one line."""
        wcwidth = import_library("wcwidth")
        cells = [wcwidth.rjust(text, width) if name in AMOUNTS else wcwidth.ljust(text, width)
                 for name, text, width in zip(columns, row, widths, strict=False)]
        line = "  ".join(cells).rstrip()
        if 0 < self._width < wcwidth.width(line):
            line = wcwidth.clip(line, 0, self._width - 1) + "…"
        return str(line)


def format_time_left(seconds: float) -> str:
    """Return how long something still takes, as a progress bar shows it."""
    minutes, rest = divmod(min(max(0, round(seconds)), 5999), 60)
    return f", {minutes} min {rest:2} s left" if minutes else f", {rest} s left"


def is_terminal(stream: TextIO | None) -> bool:
    """Is this a terminal? (It is None when it was closed before the start.)"""
    return stream is not None and stream.isatty()


def _make_printable(text: str, kept: str = "") -> str:
    """Return a text without what could move a cursor or turn a line around, unless it is `kept`."""
    return "".join(one if one.isprintable() or one in kept else ascii(one)[1:-1] for one in text)


def import_library(name: str) -> Any:
    """Return a library that only some commands need. Raises ConfigurationError."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigurationError(f"{name} is not installed: pip install {name}") from error


def format_amount(amount: int, digits: int) -> str:
    """Return an amount as people write it: 1250 with 2 digits is 12.50."""
    whole, part = divmod(amount, 10**digits)
    return f"{whole}.{part:0{digits}}" if digits else str(whole)


# Input ############################################################################################


def parse_amount(text: str, currency: str, digits: int) -> int:
    """Return an amount as people write it in minor units: 12.5 with 2 digits is 1250.

    Raises ValidationFailed.
    """
    match = re.fullmatch(r"([0-9]{1,20})(?:\.([0-9]{1,9}))?", text)
    whole, part = match.groups("") if match else ("", "")
    amount = int(f"{whole}{part:0<{digits}}" or 0) if len(part) <= digits else 0
    if not 1 <= amount <= AMOUNT_MAX:
        least, most = format_amount(1, digits), format_amount(AMOUNT_MAX, digits)
        form = f"digits, a point and at most {digits} decimals" if digits else "digits only"
        example = format_amount(125 * 10 ** max(0, digits - 1), digits)
        _refuse("amount", f"must be from {least} to {most} {currency}, written with {form}, such as"
                f" {example}", text)
    return amount


def _refuse(name: str, rule: str, given: str) -> NoReturn:
    detail = f"{rule}, and not {_hide_tokens(given[:SHOWN_CHARACTERS_MAX])!r}"
    raise ValidationFailed(f"#/{name} {detail}.", errors=[
        {"pointer": f"#/{name}", "detail": detail}])


def _parse_amount(given: _Given, wallet: Wallet) -> int | None:
    text, digits = given["amount"], 0 if given["minor"] else wallet.currency_digits
    unit = f"minor units of {wallet.currency}" if given["minor"] else wallet.currency
    return None if text is None else parse_amount(text, unit, digits)


def _parse_metadata(pairs: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or name in found:
            _refuse("metadata", "must be NAME=VALUE, with each name once", pair)
        found[name] = value
    return found


def _parse_count(name: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or not int(text):
        _refuse(name, "must be an integer from 1 to 999999999", text)
    return int(text)


def _parse_filters(given: _Given, other: str = "type") -> dict[str, Any]:
    times = {name: _parse_moment(name, given[name]) for name in ("since", "until")}
    return {other: given[other], **times}


def _parse_moment(name: str, text: str | None) -> str | None:
    """Return a time. A day alone begins at midnight, in UTC. Raises ValidationFailed."""
    if text is None:
        return None
    is_day = re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", text, re.ASCII)
    time = f"{text}T00:00:00Z" if is_day else text
    try:
        _parse_time(time)
    except MalformedRequest:
        _refuse(name, "must be a day such as 2026-11-22, or a time such as 2026-11-22T09:30:00Z",
                text)
    return time


# Accounts and money ###############################################################################


def _run_register(wallet: Wallet, given: _Given, output: Output) -> None:
    account, token = wallet.register(given["name"])
    output.show({**_to_json(account), "token": token}, "id", "name", "token")
    if not output.as_json:
        output.note("keep the token: nothing can show it again")


def _run_money(wallet: Wallet, given: _Given, output: Output) -> None:
    """Call the method of the wallet that has the command's name."""
    if not output.as_json:
        import_library("wcwidth")  # What is missing is said before anything is done.
    ids = [given[name] for name in ("account", "to", "transaction", "hold") if name in given]
    if "account" not in given:
        ids.insert(0, f"acc_{ids[0][4:20]}")
    options = {"key": given["key"]}
    if "amount" in given:
        options |= {"amount": _parse_amount(given, wallet), "description": given["description"],
                    "metadata": _parse_metadata(given["metadata"] or ())}
    if given.get("expires_in_s") is not None:
        options["expires_in_s"] = _parse_count("expires_in_s", given["expires_in_s"])
    made = getattr(wallet, given["command"])(*ids, **options)
    output.list([made], COLUMNS[type(made)])
    if made.replayed:
        output.note("this key had its effect before, and this is that answer again")


def _run_freeze(wallet: Wallet, given: _Given, output: Output) -> None:
    account = wallet.freeze(given["account"], given["command"] == "freeze")
    output.tell(f"{account.id} is {'frozen' if account.frozen else 'not frozen'}",
                **_to_json(account))


def _run_token(wallet: Wallet, given: _Given, output: Output) -> None:
    token = wallet.replace_token(given["account"])
    output.tell(token, **_to_json(wallet.account(given["account"])), token=token)
    sys.stdout.flush()
    if not output.as_json:
        output.note(f"this is the token of {given['account']} from now on, and the old one is dead")


# Looking at them ##################################################################################


def _run_show(wallet: Wallet, given: _Given, output: Output) -> None:
    at = _parse_moment("at", given["at"])
    if at is None:
        output.show(_to_json(_look_up(wallet, given["id"])))
        return
    if not given["id"].startswith("acc_"):
        _refuse("at", "must come with the id of an account", given["id"])
    output.show(_to_balance(wallet, wallet.account(given["id"]), at))


def _look_up(wallet: Wallet, id: str) -> _Record:
    """Return what has this id. Raises NotFound."""
    account_id = f"acc_{id[4:20]}"
    if id.startswith("txn_"):
        return wallet.transaction(account_id, id)
    if id.startswith("hld_"):
        return wallet.get_hold(account_id, id)
    if id.startswith("acc_"):
        return wallet.account(id)
    raise NotFound("This is no id: those of accounts begin with acc_, those of transactions with"
                   " txn_, and those of holds with hld_.")


def _run_accounts(wallet: Wallet, given: _Given, output: Output) -> None:
    output.list(wallet.accounts(**_parse_filters(given, "name")), ACCOUNT_COLUMNS)


def _run_find(wallet: Wallet, given: _Given, output: Output) -> None:
    text = given["text"]
    if re.fullmatch("(txn|hld)_[0-9A-Za-z]{16}_[0-9]+", text):
        record = _look_up(wallet, text)
        output.list([record], COLUMNS[type(record)])
        return
    wanted = _fold(text)
    output.list((one for one in wallet.accounts() if wanted in _fold(one.name) or text in one.id),
                ACCOUNT_COLUMNS)


def _fold(text: str) -> str:
    """Return what is the same for texts that look the same but for their case."""
    return unicodedata.normalize("NFC", text.casefold())


def _run_history(wallet: Wallet, given: _Given, output: Output) -> None:
    if given["csv"] and output.as_json:
        raise MalformedRequest("Take --csv or --json, but not both.")
    read = partial(wallet.transactions, given["account"], **_parse_filters(given))
    statements = _import_part("statements")

    def write_csv(found: Iterator[Transaction]) -> None:
        rows = ([statements.as_row(one)] for one in found)
        _write(statements.write(wallet, given["account"], rows))

    _show_newest(read, given, output, write_csv if given["csv"] else
                 partial(output.list, columns=TRANSACTION_COLUMNS))


def _run_statement(wallet: Wallet, given: _Given, output: Output) -> None:
    filters = _parse_filters(given)
    if output.as_json:
        output.list(wallet.statement(given["account"], **filters), TRANSACTION_COLUMNS)
    else:
        _write(_import_part("statements").to_csv(wallet, given["account"], **filters))


def _run_holds(wallet: Wallet, given: _Given, output: Output) -> None:
    read = partial(wallet.holds, given["account"], status=given["status"])
    _show_newest(read, given, output, partial(output.list, columns=HOLD_COLUMNS))


def _show_newest(read: Callable[..., Any], given: _Given, output: Output,
                 show: Callable[[Iterator[Any]], None]) -> None:
    """Show the newest entries, and say if there are older ones."""
    left, cursor = _parse_count("limit", given["limit"]), None

    def entries() -> Iterator[Any]:
        nonlocal left, cursor
        while left:
            found, cursor = read(limit=min(left, PAGE_LIMIT_MAX), cursor=cursor)
            yield from found
            left -= len(found)
            if not cursor:
                return

    show(entries())
    if cursor:
        sys.stdout.flush()
        output.note("there are older ones, which a higher --limit shows")


def _write(chunks: Iterable[bytes]) -> None:
    for chunk in chunks:
        sys.stdout.buffer.write(chunk)


# All of it ########################################################################################


def _run_init(wallet: Wallet, given: _Given, output: Output) -> None:
    output.tell(f"{wallet.database.location} {'is now' if wallet.created else 'was already'} a"
                f" wallet in {wallet.currency} with {wallet.currency_digits} decimals",
                database=wallet.database.location, created=wallet.created,
                currency=wallet.currency, currency_digits=wallet.currency_digits)


def _run_migrate(wallet: Wallet, given: _Given, output: Output) -> None:
    before, location = wallet.opened_version, wallet.database.location
    done = (f"was brought from version {before} of the tables to version {SCHEMA_VERSION}"
            if before != SCHEMA_VERSION else
            f"has version {before} of the tables already, and nothing was to do")
    versions = {"from": before, "to": SCHEMA_VERSION}
    output.tell(f"{location} {done}", database=location, **versions)


def _run_verify(wallet: Wallet, given: _Given, output: Output) -> None:
    books.warn_of_clock(wallet)
    location = wallet.database.location
    accounts, entries = books.verify(wallet, output.report)
    output.end_report()
    output.tell(f"verified: {location} has {_count_rows(accounts, entries)} that agree",
                database=location, accounts=accounts, entries=entries)


def _run_backup(wallet: Wallet, given: _Given, output: Output) -> None:
    if not isinstance(wallet.database, SQLiteDatabase):
        raise ConfigurationError(_advise_pg_dump(given["dsn"], given["file"]))
    _tell_of_file(output, given["file"], *books.back_up(wallet, given["file"], output.report))


def _run_restore(wallet: None, given: _Given, output: Output) -> None:
    dsn = given["dsn"]
    if re.match("postgres(ql)?://", dsn):
        _refuse_backup_of_sqlite(given["file"])
        raise ConfigurationError(_advise_pg_dump(dsn, given["file"]))
    _tell_of_file(output, dsn.removeprefix("sqlite:///"),
                  *books.restore(given["file"], dsn, output.report))


def _refuse_backup_of_sqlite(path: str) -> None:
    with suppress(OSError), open(path, "rb") as file:
        if file.read(6) == b"SQLite":
            source = shlex.quote(f"sqlite:///{os.path.abspath(path)}")
            raise ConfigurationError(f"{path} is a backup of SQLite: copy --from {source} --to ..."
                                     " puts it into Postgres")


def _tell_of_file(output: Output, file: str, accounts: int, entries: int) -> None:
    output.end_report()
    size = os.path.getsize(file)
    output.tell(f"verified: {file} has {size:,} bytes, with {_count_rows(accounts, entries)}",
                file=os.path.abspath(file), bytes=size, accounts=accounts, entries=entries)


def _count_rows(accounts: int, entries: int) -> str:
    return (f"{accounts:,} account{'s' * (accounts != 1)} and"
            f" {entries:,} {'entry' if entries == 1 else 'entries'}")


def _advise_pg_dump(dsn: str, path: str) -> str:
    """Return the commands that back up and restore Postgres, without the password."""
    _import_part("postgres")  # Says what is not installed.
    from psycopg import Error
    from psycopg.conninfo import conninfo_to_dict, make_conninfo

    try:
        given = conninfo_to_dict(dsn)
    except (Error, UnicodeError):  # Its message may quote the password.
        raise ConfigurationError("the DSN is malformed") from None
    database = shlex.quote(make_conninfo(
        **{name: str(given[name]) for name in given if "password" not in name}))
    file = shlex.quote(os.path.abspath(path))
    # By name: to restore an extension, such as amcheck, takes a superuser.
    tables = " ".join(f"--table={name}" for name in ("wallet", *books.KEY_COLUMNS))
    return ("Postgres is backed up while it serves by\n"
            f"(umask 077; pg_dump --format=custom {tables} --file={file} --dbname={database})\n"
            "and restored with all wallets stopped, to a database that is empty, but for the\n"
            "wallet's schema if that is not public, by\n"
            f"pg_restore --exit-on-error --single-transaction --dbname={database} {file}")


def _run_copy(wallet: None, given: _Given, output: Output) -> None:
    if given["source"] == given["target"]:
        raise ConfigurationError("a wallet cannot be copied to itself: name another database")
    with (Wallet(given["source"], create=False, alone=True) as source,
          Wallet(given["target"], alone=True) as target):
        counts = books.copy_wallet(source, target, output.report)
        output.end_report()
        rows = _count_rows(counts["accounts"], counts["transactions"])
        output.tell(f"verified: {target.database.location} has every row of"
                    f" {source.database.location}, in {source.currency}: {rows}",
                    source=source.database.location, database=target.database.location,
                    currency=source.currency, **counts)


# The table ########################################################################################


class Command(NamedTuple):
    """What the command line does.

    `opens` are the options with which its wallet is opened, None if it opens what it needs itself.
    One without `run` is a matter of the command line.
    """

    name: str
    meaning: str
    example: str
    run: Callable[[Any, _Given, Output], None] | None
    opens: Mapping[str, bool] | None = None
    arguments: _Arguments = {}


READ = {"create": False, "read_only": True}
WRITE = {"create": False}
ACCOUNT: _Arguments = {"account": {"metavar": "ACCOUNT", "help": "the id of the account"}}
HOLD: _Arguments = {"hold": {"metavar": "HOLD", "help": "the id of the hold"}}
AMOUNT_HELP = "such as 12.50, with the decimals that the currency has"
AMOUNT: _Arguments = {"amount": {"metavar": "AMOUNT", "help": AMOUNT_HELP}}
PART: _Arguments = {
    "amount": {"metavar": "AMOUNT", "nargs": "?", "help": f"{AMOUNT_HELP}; all, if left out"}}
KEY: _Arguments = {
    "--key": {"metavar": "KEY", "help": "the idempotency key, with which it has its effect once; a"
              " new one, if left out"}}
MONEY: _Arguments = {
    "--minor": {"action": "store_true", "help": "take the amount as an integer in minor units"},
    "--description": {"metavar": "TEXT", "help": "what it is for"},
    "--metadata": {"metavar": "NAME=VALUE", "action": "append",
                   "help": "something to keep with it; may be given several times"},
    **KEY}
TIMES: _Arguments = {
    "--since": {"metavar": "TIME", "help": "from this time on, such as 2026-11-22 or"
                " 2026-11-22T09:30:00Z"},
    "--until": {"metavar": "TIME", "help": "before this time"}}
FILTERS: _Arguments = {
    "--type": {"metavar": "TYPE", "choices": list(SIGN_BY_TYPE),
               "help": f"only these: {', '.join(SIGN_BY_TYPE)}"}, **TIMES}
LIMIT: _Arguments = {"--limit": {"metavar": "NUMBER", "default": str(PAGE_LIMIT_DEFAULT),
                     "help": f"at most so many; {PAGE_LIMIT_DEFAULT}, if left out"}}
COMMANDS = (
    Command("serve", "answer over HTTP, as without a command", "serve --port 8080", None),
    Command("init", "make the database, if it is not there, and exit", "init --currency EUR",
            _run_init, {}),
    Command("register", "make an account, and show its token", "register Ada", _run_register,
            WRITE, {"name": {"metavar": "NAME", "help": "whose account it is"}}),
    Command("topup", "add to the balance", "topup acc_4fKq0ZbT9xWm2Lr7 12.50", _run_money, WRITE,
            ACCOUNT | AMOUNT | MONEY),
    Command("charge", "take from what is available",
            "charge acc_4fKq0ZbT9xWm2Lr7 2.50 --description 'Order 17'", _run_money, WRITE,
            ACCOUNT | AMOUNT | MONEY),
    Command("transfer", "move money to another account",
            "transfer acc_4fKq0ZbT9xWm2Lr7 acc_9sXv3HdP1cRy6Nw2 1", _run_money, WRITE, {
                "account": {"metavar": "FROM", "help": "the id of the account that pays"},
                "to": {"metavar": "TO", "help": "the id of the account that gets it"},
                **AMOUNT, **MONEY}),
    Command("refund", "give back a charge, or a part of it", "refund txn_4fKq0ZbT9xWm2Lr7_2 0.50",
            _run_money, WRITE, {
                "transaction": {"metavar": "TRANSACTION", "help": "the id of the charge"},
                **PART, **MONEY}),
    Command("hold", "set money aside, to be captured or released",
            "hold acc_4fKq0ZbT9xWm2Lr7 5 --expires-in-s 3600", _run_money, WRITE, {
                **ACCOUNT, **AMOUNT, **MONEY,
                "--expires-in-s": {"metavar": "NUMBER", "dest": "expires_in_s",
                                   "help": f"for how many seconds; {HOLD_DEFAULT_S} if not said"}}),
    Command("capture", "charge a hold, or a part of it, and release the rest",
            "capture hld_4fKq0ZbT9xWm2Lr7_3", _run_money, WRITE, HOLD | PART | MONEY),
    Command("release", "make what is held available again", "release hld_4fKq0ZbT9xWm2Lr7_3",
            _run_money, WRITE, HOLD | KEY),
    Command("show", "show an account, a transaction or a hold", "show acc_4fKq0ZbT9xWm2Lr7",
            _run_show, READ, {
                "id": {"metavar": "ID", "help": "the id of any of them"},
                "--at": {"metavar": "TIME", "help": "the balance that the account had then"}}),
    Command("accounts", "list all accounts, newest first", "accounts --name A --json",
            _run_accounts, READ, {
                "--name": {"metavar": "TEXT", "help": "only those whose name begins so"}, **TIMES}),
    Command("find", "list the accounts with this in their name, in any case, or in their id, or the"
            " transaction or hold with this id", "find ada", _run_find, READ,
            {"text": {"metavar": "TEXT", "help": "a part of a name or id"}}),
    Command("history", "list the transactions of an account, newest first",
            "history acc_4fKq0ZbT9xWm2Lr7 --type charge", _run_history, READ, {
                **ACCOUNT, **FILTERS, **LIMIT,
                "--csv": {"action": "store_true", "help": "print them as CSV"}}),
    Command("statement", "print the whole history of an account as CSV, oldest first, as of one"
            " moment", "statement acc_4fKq0ZbT9xWm2Lr7 --since 2026-11-01", _run_statement, READ,
            ACCOUNT | FILTERS),
    Command("holds", "list the holds of an account, newest first",
            "holds acc_4fKq0ZbT9xWm2Lr7 --status active", _run_holds, READ, {
                **ACCOUNT, **LIMIT,
                "--status": {"metavar": "STATUS", "choices": list(get_args(HoldStatus)),
                             "help": f"only these: {', '.join(get_args(HoldStatus))}"}}),
    Command("token", "print a new token of an account, whose old one is dead from then on",
            "token acc_4fKq0ZbT9xWm2Lr7", _run_token, WRITE, ACCOUNT),
    Command("freeze", "let an account receive nothing and spend nothing",
            "freeze acc_4fKq0ZbT9xWm2Lr7", _run_freeze, WRITE, ACCOUNT),
    Command("unfreeze", "undo freeze", "unfreeze acc_4fKq0ZbT9xWm2Lr7", _run_freeze, WRITE,
            ACCOUNT),
    Command("verify", "recompute every balance, sequence, hold, refund and transfer, and name the"
            " first wrong row", "verify", _run_verify, READ),
    Command("backup", "copy a wallet on SQLite to a new file while it serves, and verify the copy",
            "backup backup.db", _run_backup, READ,
            {"file": {"metavar": "FILE", "help": "the file, which must not be there"}}),
    Command("restore", "put a backup to where the DSN says, if no wallet is there, and verify it",
            "restore backup.db --dsn sqlite:///restored.db", _run_restore, None,
            {"file": {"metavar": "FILE", "help": "the file that backup made"}}),
    Command("copy", "copy a stopped wallet to another database, and verify the copy",
            "copy --from sqlite:///wallet.db --to postgresql://db/wallet", _run_copy, None,
            {"--from": {"dest": "source", "metavar": "DSN", "required": True,
                        "help": "the wallet, which must be stopped"},
             "--to": {"dest": "target", "metavar": "DSN", "required": True,
                      "help": "the database, which must be empty"}}),
    Command("migrate", "bring a database of an older wallet to this version", "migrate",
            _run_migrate, WRITE),
    Command("completion", "print what lets a shell complete these commands", "completion bash",
            None, None, {"shell": {"metavar": "SHELL", "choices": ["bash", "zsh", "tcsh"],
                                   "help": "bash, zsh or tcsh"}}),
)
JSON: _Arguments = {
    "--json": {"action": "store_true",
               "help": "print one JSON object a line, with amounts in minor units"}}
