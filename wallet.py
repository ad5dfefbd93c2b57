#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["bottle==0.13.4", "iso4217==1.16.20260101", "prometheus-client==0.26.0",
#                 "psycopg[binary]==3.3.9", "psycopg-pool==3.3.3", "shtab==1.13.0",
#                 "typing_extensions==4.16.0", "waitress==3.0.2", "wcwidth==0.9.4"]
# ///
"""Wallet: a small service that keeps money balances and is trusted with them.

Run it, and a wallet answers on port 4000, with its data in wallet.db:

    python wallet.py

Embed it, with or without HTTP:

    from wallet import Wallet, create_app, running

    wallet = Wallet("sqlite:///wallet.db")      # or Wallet() in memory, or "postgresql://..."
    account, token = wallet.register("Ada")
    wallet.topup(account.id, 1250, key="order-17")
    app = create_app(wallet)                    # a WSGI application
    with running() as url:                      # a real HTTP wallet, gone afterwards
        ...

It makes five promises:

1. A balance is never negative, never above the cap, and always equals the sum of its transactions.
2. A success that was answered is kept: through a crash, a kill, a power cut, a full disk, a
   database restart.
3. One idempotency key has at most one effect, however often and however concurrently it is sent.
4. No input crashes it: every wrong request gets a clear 4xx, and nothing is half done.
5. Nobody sees or moves another account's money, and no token is ever stored, logged or shown twice.

The sections, in the order in which a reader needs them:

    Limits      every number with its reason
    Errors      everything that can go wrong, as one tree
    Values      accounts, transactions, holds and tokens, and how input is parsed
    Wallet      the money rules, and all SQL about money
    Databases   where the money is kept, and how a write is committed
    HTTP        the routes, and the one place where answers are made

The server is in wallet_server.py, and the settings and the command line are in wallet_cli.py. What
`__all__` names is public, and nothing else is.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import math
import os
import random
import re
import secrets
import sqlite3
import string
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from functools import lru_cache, partial
from http.client import responses as REASONS
from importlib import import_module
from itertools import accumulate, islice
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    Literal,
    NamedTuple,
    Protocol,
    TypedDict,
    TypeVar,
    get_args,
)
from urllib.parse import parse_qsl, quote, urlencode

# Bottle has no types. These lines say so to mypy in a project that has this file.
# mypy: disable-error-code="import-untyped,import-not-found"
# mypy: allow-subclassing-any, allow-untyped-decorators
from bottle import Bottle, HTTPError

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from typing_extensions import Unpack

__version__ = "0.2.0"
__all__ = [
    "AMOUNT_MAX", "Account", "AccountFrozen", "AccountNotFound", "AccountPage",
    "AccountTransaction", "App", "BalanceLimitExceeded", "BodyTooLarge", "ConfigurationError",
    "CursorBeyondEnd", "Forbidden", "HeadersTooLarge", "Hold", "HoldNotActive", "HoldPage",
    "HoldStatus", "Hour", "IdempotencyKeyReused", "InsufficientFunds", "InternalError",
    "MalformedRequest", "MethodNotAllowed", "NotFound", "NotReady", "NotRefundable",
    "OutcomeUnknown", "Overview", "Page", "RefundExceedsCharge", "Transaction", "TransactionType",
    "Unauthorized", "Unavailable", "UnsupportedMediaType", "ValidationFailed", "Wallet",
    "WalletError", "WrongBooks", "__version__", "connect", "create_app", "running",
]
T = TypeVar("T")
logger = logging.getLogger("wallet")
access_logger = logging.getLogger("wallet.access")


# Limits ###########################################################################################

# Money and what is said about it.
AMOUNT_MAX = 2**53 - 1  # Minor units: the largest integer that every JSON client reads exactly.
SEQUENCE_MAX = 2**63 - 1  # What a BIGINT holds. No account gets there.
NAME_CHARACTERS_MAX = 100  # A line on a screen.
DESCRIPTION_CHARACTERS_MAX = 500  # A few lines on a statement.
METADATA_ENTRIES_MAX = 20  # Enough for ids of your own.
METADATA_NAME_CHARACTERS_MAX, METADATA_VALUE_CHARACTERS_MAX = 40, 500
KEY_CHARACTERS_MAX = 255  # As clients of other payment services expect.
PAGE_LIMIT_DEFAULT, PAGE_LIMIT_MAX = 50, 100  # A page stays under 100 KiB, metadata aside.
BATCH_MAX = 1000  # Movements: some hundredths of a second.
HOLD_DEFAULT_S, HOLD_MAX_S = 7 * 24 * 3600, 30 * 24 * 3600  # As with card networks.
STATEMENTS_MAX = 2  # Long answers at once: each takes a thread while it is made, then disk space.
STATEMENT_ROWS = 500  # Read at once: 20 MB, where each has all the metadata it may.
# In no line of text: control characters, and the lone surrogates that UTF-8 cannot have.
UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
FIELD_ERRORS_MAX = 20  # More than a request has fields. Keeps the answer to a hostile body short.

# Requests.
HEADER_BYTES_MAX = 16 * 1024  # Twice what common proxies pass on.
BODY_BYTES_MAX = 64 * 1024  # More than any valid body, unless most of it is escaped.
BATCH_BODY_BYTES_MAX = 1024 * 1024  # A kilobyte for each movement of a batch.
JSON_DEPTH_MAX = 10  # Nested arrays and objects. A batch has four; a parser recurses as deep.

# Databases.
DATABASE_TIMEOUT_S = 5  # For SQLite's lock, which another process may hold, and for all that a call
# asks of Postgres, with repeats and a restart of the server: longer than either should take.
RETRY_PAUSE_MAX_S = 0.1  # Before something that another process was in the way of is tried again.
LONG_TIMEOUT_S = 24 * 3600  # To migrate or copy all of a wallet, in one transaction.
ACCOUNTS_ROWS = 500  # Read at once, when all accounts are listed.
SQLITE_CHECKPOINT_PAGES = 4000  # 16 MB of log. Moving it into the database takes syncs too.
SQLITE_CACHE_KB = 8_000  # For the writer: the pages that hundreds of busy accounts write to.
SQLITE_READER_CACHE_KB = 500  # For each reader. The system keeps the file in memory anyway.
SQLITE_VERIFY_CACHE_KB = 64_000  # For `verify`, which reads in another order than the file's.
SQLITE_WAL_RESET_FIXES = {44: 6, 50: 7, 51: 3}  # Minor version of 3.x: first patch with the fix.
SQLITE_WARNING_PAUSE_S = 3600  # Between two warnings that others write.
SQLITE_APPLICATION_ID = 0x57414C54  # "WALT" in the file's header says that it is a wallet.
SCHEMA_VERSION = 4
MIGRATIONS = range(1, SCHEMA_VERSION)  # From each of these, migrations/N.sql leads to the next.

SECURITY_HEADERS = {  # On every answer: no browser keeps it, runs it, or shows it to another site.
    "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none';"
                               " frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin", "Referrer-Policy": "no-referrer",
}


# Errors ###########################################################################################


class WalletError(Exception):
    """Everything that can go wrong, with its HTTP status and a stable code for programs.

    `str(error)` tells people what to do. What else is known are attributes. They are listed in
    `members`, and are members of the HTTP answer too (RFC 9457).
    """

    status, code, title, advice = 500, "wallet_error", "The wallet cannot do this.", ""
    headers: Mapping[str, str] = {}

    def __init_subclass__(cls, status: int, title: str) -> None:
        cls.status, cls.title = status, title
        cls.code = re.sub("(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    def __init__(self, detail: str = "", *, headers: Mapping[str, str] | None = None,
                 reason: str = "", **members: Any) -> None:
        super().__init__(detail or self.advice or self.title)
        self.reason = reason or self.code  # For the metrics: it may say more than the code.
        self.headers = self.headers if headers is None else headers
        self.members: dict[str, Any] = {}
        self.add(**members)

    def add(self, **members: Any) -> WalletError:
        """Add to what is known, and return the error."""
        self.members |= members
        self.__dict__ |= members
        return self


class MalformedRequest(WalletError, status=400, title="The request is malformed."):
    """It is not HTTP or JSON as the contract has it, or a header or parameter is bad."""


class Unauthorized(WalletError, status=401, title="A valid bearer token is needed."):
    """No valid token was sent (RFC 6750). Unknown account and wrong secret answer alike."""

    advice = ("Send the header 'Authorization: Bearer ...', with the token of the account, or of"
              " the issuer.")
    headers = {"WWW-Authenticate": 'Bearer realm="wallet"'}


INVALID_TOKEN = {"WWW-Authenticate": 'Bearer realm="wallet", error="invalid_token"'}


class InsufficientFunds(WalletError, status=402, title="The balance is too low."):
    """Less is available than this needs, and nothing changed. All amounts are in minor units."""

    balance: int
    available: int
    required: int


class Forbidden(WalletError, status=403, title="This token does not allow that."):
    """Where there is an issuer, its token is needed here, or it is no account's."""


class AccountFrozen(WalletError, status=403, title="The account is frozen."):
    """It can be read, and receives nothing and spends nothing."""

    advice = "The account is frozen. Whoever runs the wallet can unfreeze it."


class NotFound(WalletError, status=404, title="There is nothing here."):
    """There is no such route, transaction or hold, or it is not this account's."""


class AccountNotFound(NotFound, status=404, title="There is no such account."):
    """No account has this id."""


class MethodNotAllowed(WalletError, status=405, title="Another method is needed."):
    """The route exists, for the methods that `Allow` names."""


class HoldNotActive(WalletError, status=409, title="The hold is not active."):
    """It was captured or released, or it has expired. `hold_status` says which."""

    hold_status: HoldStatus


class CursorBeyondEnd(WalletError, status=409, title="The cursor is beyond the end."):
    """The account has never had so many entries, or not since a backup was restored."""

    advice = ("This account has no entry so late. If the wallet was restored from a backup, what"
              " came after that is gone: read the history again from its beginning.")


class BodyTooLarge(WalletError, status=413, title="The body is too large."):
    """It has more than BODY_BYTES_MAX bytes, or BATCH_BODY_BYTES_MAX for a batch."""

    advice = (f"A body may have at most {BODY_BYTES_MAX} bytes, and that of a batch"
              f" {BATCH_BODY_BYTES_MAX}.")


class UnsupportedMediaType(WalletError, status=415, title="The body must be JSON."):
    """The body does not come with `Content-Type: application/json`."""

    advice = "Send the header 'Content-Type: application/json', and a JSON object."


class ValidationFailed(WalletError, status=422, title="A field is out of its rules."):
    """`errors` has every wrong field, each with a JSON pointer and what it must be."""

    errors: list[dict[str, str]]


class BalanceLimitExceeded(WalletError, status=422, title="The balance is too high."):
    """It would be above AMOUNT_MAX. `balance` is None where it is another account's."""

    balance: int | None = None


class NotRefundable(WalletError, status=422, title="This cannot be refunded."):
    """Only a charge can be refunded."""


class RefundExceedsCharge(WalletError, status=422, title="The refund is too high."):
    """All refunds of a charge would exceed it. `refundable` is what is left, in minor units."""

    refundable: int


class IdempotencyKeyReused(WalletError, status=422, title="The key was used before."):
    """It was sent with another request."""

    advice = ("This Idempotency-Key came with another request before. A new request needs a new"
              " key.")


class HeadersTooLarge(WalletError, status=431, title="The headers are too large."):
    """The request line and the headers have more than HEADER_BYTES_MAX bytes."""

    advice = f"The request line and the headers may have at most {HEADER_BYTES_MAX} bytes."


class InternalError(WalletError, status=500, title="The wallet has a fault."):
    """A bug. The log has its traceback, under the request id."""

    advice = "The wallet's log says why, under this answer's X-Request-Id."


class Unavailable(WalletError, status=503, title="The wallet cannot do this now."):
    """It is busy, full, broken or away. Nothing was changed, so the same can be tried again."""

    headers = {"Retry-After": "1"}


class OutcomeUnknown(Unavailable, status=503, title="It is not known whether this was done."):
    """The commit failed in a way that does not tell whether it is kept.

    `key` is that of the call, if it had one and came from `connect`.
    """

    key: str | None = None
    advice = ("Send the same request again, with the same Idempotency-Key: it has its effect"
              " once.")


class ConfigurationError(WalletError, status=500, title="This cannot be done like this."):
    """It cannot be opened, started or copied as it was asked to. No request raises it."""


class NotReady(ConfigurationError, status=503, title="The wallet cannot start yet."):
    """What it needs is not there, or not free. That may pass. No request raises it."""


class WrongBooks(ConfigurationError, status=500, title="The books are wrong."):
    """What is kept contradicts itself, or is damaged. No request raises it."""


# Values ###########################################################################################

TransactionType = Literal["topup", "charge", "refund", "transfer_in", "transfer_out"]
HoldStatus = Literal["active", "captured", "released", "expired"]
# What each type of transaction does to the balance.
SIGN_BY_TYPE: dict[TransactionType, int] = {
    "topup": +1, "charge": -1, "refund": +1, "transfer_in": +1, "transfer_out": -1}
BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
UNKEYED = "0" * 64  # The fingerprint of a request without a key: it cannot come again.
PAIRS = [high + low for high in BASE62 for low in BASE62]  # Of digits, by their number.
_is_token = re.compile("wlt_[0-9A-Za-z]{54}").fullmatch
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


@dataclass(frozen=True)
class Account:
    """An account as it stands. `available` is the balance without what `holds_active` holds hold.

    Amounts are in minor units of `currency`: with 2 for `currency_digits`, 1250 is 12.50.
    """

    id: str
    name: str
    currency: str
    currency_digits: int
    balance: int
    available: int
    holds_active: int
    frozen: bool
    created_at: datetime


@dataclass(frozen=True)
class Transaction:
    """One movement of money. `amount` is positive, and `balance` is the account's after it.

    `reference` is the id of the charge that a refund gives back, of the hold that a charge
    captures, or of the other account of a transfer. `replayed` is True when the idempotency key
    had its effect before: then this is that answer again.
    """

    id: str
    type: TransactionType
    amount: int
    balance: int
    description: str | None
    metadata: dict[str, str] = field(hash=False)
    reference: str | None
    created_at: datetime
    replayed: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Hold:
    """Money set aside. `captured` is how much of it was charged."""

    id: str
    amount: int
    status: HoldStatus
    captured: int
    expires_at: datetime
    description: str | None
    metadata: dict[str, str] = field(hash=False)
    created_at: datetime
    replayed: bool = field(default=False, compare=False)


class Page(NamedTuple):
    """A part of an account's history, and the cursor of the next part, if any."""

    transactions: list[Transaction]
    next_cursor: str | None


class HoldPage(NamedTuple):
    """The same of an account's holds, newest first."""

    holds: list[Hold]
    next_cursor: str | None


class AccountPage(NamedTuple):
    """The same of all accounts, newest first."""

    accounts: list[Account]
    next_cursor: str | None


@dataclass(frozen=True, kw_only=True)
class AccountTransaction(Transaction):
    """A transaction, and whose it is."""

    account_id: str
    account_name: str


@dataclass(frozen=True)
class Hour:
    """How many transactions an hour had, from `since` on."""

    since: datetime
    transactions: int


@dataclass(frozen=True)
class Overview:
    """All accounts at one moment. The sums are exact, also above 64 bits.

    `hours` are the last 24; the last one still runs. `newest` is newest first.
    """

    currency: str
    currency_digits: int
    accounts: int
    accounts_frozen: int
    balance: int
    held: int
    hours: tuple[Hour, ...]
    newest: tuple[AccountTransaction, ...]


class _Options(TypedDict, total=False):
    """What every method that moves or holds money takes by name.

    If a `token` is given, it must be the account's.
    """

    metadata: dict[str, str] | None
    key: str | None
    token: str | None


class _Times(TypedDict, total=False):
    """What is asked for: from `since` on, before `until` (RFC 3339 or aware)."""

    since: str | datetime | None
    until: str | datetime | None


class _Filters(_Times, total=False):
    type: TransactionType | None


class _AccountFilters(_Times, total=False):
    name: str | None  # A part of it, in any case.


class _Stamp(NamedTuple):
    """What gives a request its effect only once: its key, and a digest of all that it asks for.

    With `token_hash` it has no effect unless that is the hash of the account's token.
    """

    key: str
    fingerprint: str
    token_hash: str | None = None

    @property
    def is_issuers(self) -> bool:
        return self.key.startswith("§")  # No account can send such a key.

    def derive(self, account_id: str, index: int) -> _Stamp:
        """Return the stamp of another entry of the same request, maybe in another account.

        The keys of a batch follow each other, so that an index takes them side by side.
        """
        reserved = _reserve_key(f"{account_id} {self.key}")[:-4]
        return _Stamp(f"{reserved}{index:04x}", self.fingerprint)


class _Entry(NamedTuple):
    """What is to be written into an account's history. `held` is the change of what is held."""

    account_id: str
    type: str
    amount: int
    description: str | None = None
    metadata: Mapping[str, str] = {}
    reference: str | None = None
    held: int = 0

    @property
    def metadata_json(self) -> str | None:
        return json.dumps(self.metadata, ensure_ascii=False) if self.metadata else None


def _random_base62(length: int) -> str:
    """Return random letters and digits that nobody can guess, 5.95 bits each."""
    return "".join(secrets.choice(BASE62) for _ in range(length))


def _make_token(account_id: str) -> str:
    """Return a new token: wlt_, the account's 16 characters, 32 of a secret, 6 of a checksum."""
    token = "wlt_" + account_id.removeprefix("acc_") + _random_base62(32)
    return token + _checksum(token)


def _checksum(text: str) -> str:
    """Return the CRC-32 of `text` in six base62 digits: a typo is refused without the database."""
    high, low = divmod(zlib.crc32(text.encode()), 62**4)
    return PAIRS[high] + PAIRS[low // 62**2] + PAIRS[low % 62**2]


def _parse_token(token: object) -> str:
    """Return the id of the account that a token is for. Raises Unauthorized."""
    if isinstance(token, str) and _is_token(token) and _checksum(token[:-6]) == token[-6:]:
        return "acc_" + token[4:20]
    raise Unauthorized(headers=INVALID_TOKEN)


def _hash_token(token: str) -> str:
    """Return a token's SHA-256: all that is ever stored of it."""
    return hashlib.sha256(token.encode()).hexdigest()


def _make_entry_id(kind: str, account_id: str, sequence: int) -> str:
    """Return the id of an account's n-th entry: the primary key finds it."""
    return f"{kind}_{account_id.removeprefix('acc_')}_{sequence}"


def _now_us() -> int:
    return time.time_ns() // 1000


def _as_us(moment: datetime) -> int:
    """Return a time as the tables have it, in microseconds since 1970."""
    return (moment - EPOCH) // timedelta(microseconds=1)


def _as_time(time_us: int) -> datetime:
    return EPOCH + timedelta(microseconds=time_us)


def _as_transaction(account_id: str, row: _Row, replayed: bool = False) -> Transaction:
    sequence, type, amount, balance, description, metadata, reference, created_at_us = row
    return Transaction(
        _make_entry_id("txn", account_id, sequence), type, amount, balance, description,
        json.loads(metadata) if metadata else {}, reference, _as_time(created_at_us), replayed)


def _as_page(kind: Callable[[list[Any], str | None], T], found: Iterable[Any], limit: int) -> T:
    """Return a page of what is found. One more tells if there is another."""
    found = list(islice(found, limit + 1))
    return kind(found[:limit], found[limit - 1].id if len(found) > limit else None)


def _parse_account_id(value: object) -> str:
    if isinstance(value, str) and re.fullmatch("acc_[0-9A-Za-z]{16}", value):
        return value
    raise AccountNotFound()


def _parse_entry_id(kind: str, account_id: str, value: object) -> int:
    """Return the sequence number in the id of an account's entry. Raises NotFound."""
    pattern = "([a-z]{3}_[0-9A-Za-z]{16}_)([1-9][0-9]{0,17})"
    match = re.fullmatch(pattern, value) if isinstance(value, str) else None
    if match and match[1] == _make_entry_id(kind, _parse_account_id(account_id), 0)[:-1]:
        return int(match[2])
    raise NotFound(f"This account has no such {'hold' if kind == 'hld' else 'transaction'}.")


def _parse_cursor(kind: str, account_id: str, value: str) -> int:
    try:
        return _parse_entry_id(kind, account_id, value)
    except NotFound:
        advice = "cursor and after must be ids that an earlier page of this account had."
        raise MalformedRequest(advice) from None


def _parse_time(value: str | datetime) -> int:
    """Return a time, of RFC 3339 or aware, in microseconds since 1970. Raises MalformedRequest."""
    time_us: int = _import_part("times").parse_time(value)
    return time_us


def _parse_key(value: object) -> str:
    """Return an idempotency key, sent or reserved. Raises MalformedRequest."""
    pattern = f"(?! )[ -~]{{1,{KEY_CHARACTERS_MAX}}}(?<! )|§[0-9a-f]{{64}}"
    if isinstance(value, str) and re.fullmatch(pattern, value):
        return value
    raise MalformedRequest(
        f"Idempotency-Key must be 1 to {KEY_CHARACTERS_MAX} printable ASCII characters, with no"
        " space at its ends.")


def _make_key() -> str:
    """Return a new idempotency key. Keys rise with time, so that an index takes them in order."""
    return f"{time.time_ns():016x}-{secrets.token_urlsafe(12)}"


@lru_cache(BATCH_MAX)
def _reserve_key(text: str) -> str:
    """Return a key that no client can send: it is not ASCII, and no header with it is let in."""
    return "§" + hashlib.sha256(text.encode()).hexdigest()


def _parse_limit(value: int | str) -> int:
    if isinstance(value, str) and re.fullmatch("[0-9]{1,3}", value):
        value = int(value)
    if type(value) is int and 1 <= value <= PAGE_LIMIT_MAX:
        return value
    raise MalformedRequest(f"limit must be an integer from 1 to {PAGE_LIMIT_MAX}.")


# A rule takes the value of a field, None where it is missing, and returns it parsed or raises
# ValueError with what it must be.
_Rule = Callable[[Any], Any]
_Rules = Mapping[str, _Rule]


def _optional(rule: _Rule, default: object = None) -> _Rule:
    return lambda value: default if value is None else rule(value)


def _integer(maximum: int, unit: str) -> _Rule:
    """Return the rule for an integer from 1. True, 1.0 and "5" are none."""

    def parse(value: object) -> int:
        if type(value) is int and 1 <= value <= maximum:
            return value
        raise ValueError(f"must be an integer from 1 to {maximum}, in {unit}")

    return parse


def _text(maximum: int, minimum: int = 0, *, trimmed: bool = False) -> _Rule:
    """Return the rule for one line of text, without what databases disagree on, such as NUL."""

    def parse(value: object) -> str:
        if not isinstance(value, str):
            raise ValueError("must be a string")
        if UNFIT.search(value):
            raise ValueError(
                "must not have control characters, such as line breaks, or lone surrogates")
        value = value.strip() if trimmed else value
        if not minimum <= len(value) <= maximum:
            least = f"{minimum} to" if minimum else "at most"
            raise ValueError(f"must have {least} {maximum} characters")
        return value

    return parse


def _parse_metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > METADATA_ENTRIES_MAX:
        raise ValueError(f"must be an object of at most {METADATA_ENTRIES_MAX} strings")
    parse_name = _text(METADATA_NAME_CHARACTERS_MAX, 1)
    parse_value = _text(METADATA_VALUE_CHARACTERS_MAX)
    try:
        return {parse_name(name): parse_value(one) for name, one in value.items()}
    except ValueError as error:
        raise ValueError(f"has a name or a value that {error}") from None


def _parse_account(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be the id of an account")
    return _parse_account_id(value)


def _parse_batch_type(value: object) -> object:
    if value not in ("topup", "charge"):
        raise ValueError("must be topup or charge")
    return value


_parse_amount = _integer(AMOUNT_MAX, "minor units (1250 for 12.50 dollars)")
NAME: _Rules = {"name": _text(NAME_CHARACTERS_MAX, 1, trimmed=True)}
TEXTS: _Rules = {"description": _optional(_text(DESCRIPTION_CHARACTERS_MAX)),
                 "metadata": _optional(_parse_metadata, {})}
MOVEMENT: _Rules = {"amount": _parse_amount, **TEXTS}
PART: _Rules = {"amount": _optional(_parse_amount), **TEXTS}  # Without an amount, all there is.
TRANSFER: _Rules = {"to": _parse_account, **MOVEMENT}
HOLD: _Rules = {
    **MOVEMENT, "expires_in_s": _optional(_integer(HOLD_MAX_S, "seconds"), HOLD_DEFAULT_S)}
TRANSACTIONS: _Rules = {"transactions": lambda values: values}  # See _parse_batch.
BATCH_OF_ONE_ACCOUNT: _Rules = {"type": _parse_batch_type, **MOVEMENT}
BATCH: _Rules = {"account": _parse_account, **BATCH_OF_ONE_ACCOUNT}


def _parse_fields(rules: _Rules, values: Mapping[str, object]) -> dict[str, Any]:
    """Return each field of `rules`, parsed. Raises ValidationFailed, with all errors at once."""
    fields, errors = {}, []
    for name, rule in rules.items():
        try:
            fields[name] = rule(values.get(name))
        except ValueError as error:
            detail = str(error) if name in values else f"is missing; it {error}"
            errors.append((_json_pointer(name), detail))
    errors += [(_json_pointer(name), f"is not known; known are: {', '.join(rules) or 'none'}")
               for name in values if name not in rules]
    _refuse_fields(errors)
    return fields


def _parse_request(rules: _Rules, account_id: str, *request: object, key: str | None = None,
                   token: str | None = None, **values: object) -> tuple[dict[str, Any], _Stamp]:
    """Return a request's fields, parsed, and its stamp.

    Raises AccountNotFound, ValidationFailed, and MalformedRequest for the key.
    """
    _parse_account_id(account_id)
    fields = _parse_fields(rules, values)
    return fields, _make_stamp(key, token, *request, *fields.values())


def _make_stamp(key: str | None, token: str | None, *request: object) -> _Stamp:
    """Return the stamp of a request, with a new key if it has none. Raises MalformedRequest."""
    token_hash = None if token is None else _hash_token(token)
    if key is None:
        return _Stamp(_make_key(), UNKEYED, token_hash)
    parts = [dict(sorted(part.items())) if isinstance(part, dict) else part
             for part in request if part != {}]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return _Stamp(_parse_key(key), digest, token_hash)


def _parse_batch(values: object, account_id: str | None) -> list[_Entry]:
    """Return the movements of a batch, of one account or each of its own.

    Raises ValidationFailed, and AccountNotFound with its index.
    """
    entries, errors = [], []
    if not isinstance(values, (list, tuple)) or not 1 <= len(values) <= BATCH_MAX:
        errors.append(("#/transactions", f"must be a list of 1 to {BATCH_MAX} movements"))
        values = []
    rules = BATCH_OF_ONE_ACCOUNT if account_id else BATCH
    for index, value in enumerate(values):
        try:
            fields = _parse_fields(rules, value if isinstance(value, Mapping) else {})
            entries.append(_Entry(fields.pop("account", account_id), **fields))
        except ValidationFailed as error:
            errors += [(f"#/transactions/{index}{one['pointer'][1:]}", one["detail"])
                       for one in error.errors]
        except AccountNotFound as error:
            raise error.add(index=index) from None
    _refuse_fields(errors)
    return entries


def _refuse_fields(errors: Sequence[tuple[str, str]]) -> None:
    """Raise ValidationFailed if there are errors: the pointer of a field, and what it must be."""
    if errors:
        listed = [{"pointer": pointer, "detail": detail}
                  for pointer, detail in errors[:FIELD_ERRORS_MAX]]
        first = "; ".join(" ".join(one.values()) for one in listed[:3])
        raise ValidationFailed(f"{first}.", errors=listed)


def _json_pointer(name: object) -> str:
    """Return the pointer to a field, as a URI fragment (RFC 6901, section 6)."""
    escaped = _hide_tokens(str(name)[:100]).replace("~", "~0").replace("/", "~1")
    return "#/" + quote(escaped, "/*", errors="replace")


# Wallet ###########################################################################################

TRANSACTION_COLUMNS = (
    "sequence, type, amount, balance, description, metadata, reference, created_at")
ENTRY_COLUMNS = f"account_id, idempotency_key, fingerprint, {TRANSACTION_COLUMNS}"
INSERT_ENTRY = f"""
    INSERT INTO transactions ({ENTRY_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
UPDATE_ACCOUNT = """
    UPDATE accounts SET balance = ?, held = ?, last_sequence = ?, updated_at = ? WHERE id = ?"""
LOCK = "SELECT 1 FROM accounts WHERE id IN (%s) ORDER BY id"
# Accounts, and what a key did in each before, if anything.
FIND = f"""
    SELECT id, token_hash, frozen, accounts.balance, held, last_sequence, updated_at,
        t.{ENTRY_COLUMNS.replace(", ", ", t.")} FROM"""
FIND_ONE = f"""{FIND} accounts LEFT JOIN transactions t
    ON t.account_id = id AND t.idempotency_key = ? WHERE id = ?"""
FIND_MANY = f"""WITH sent (sent_key, account) AS (VALUES %s) {FIND} sent
    JOIN accounts ON id = account
    LEFT JOIN transactions t ON t.account_id = id AND t.idempotency_key = sent_key"""
# A topup or a charge in one statement, on Postgres: it waits for no lock, and does all or nothing.
POST_AT_ONCE = f"""
    WITH free AS (SELECT id FROM accounts WHERE id = ? FOR UPDATE SKIP LOCKED), posted AS (
        UPDATE accounts SET balance = balance + ?, last_sequence = last_sequence + 1,
            updated_at = greatest(updated_at, ?)
        WHERE id IN (SELECT id FROM free) AND frozen = 0 AND balance + ? BETWEEN held AND ?
            AND token_hash = coalesce(?, token_hash) AND NOT EXISTS (
                SELECT 1 FROM transactions WHERE account_id = id AND idempotency_key = ?)
        RETURNING id, last_sequence, balance, updated_at)
    INSERT INTO transactions ({ENTRY_COLUMNS})
    SELECT id, ?, ?, last_sequence, ?, ?, balance, ?, ?, NULL, updated_at FROM posted
    RETURNING {TRANSACTION_COLUMNS}"""
ACTIVE = "FROM holds WHERE account_id = accounts.id AND status = 'active' AND expires_at"
ACCOUNT = f"""
    SELECT token_hash, id, name, balance,
        balance - held + (SELECT CAST(coalesce(sum(amount), 0) AS BIGINT) {ACTIVE} <= ?),
        (SELECT count(*) {ACTIVE} > ?), frozen, created_at
    FROM accounts"""
ACCOUNT_BY_ID = f"{ACCOUNT} WHERE id = ?"
EXPIRED = """
    SELECT CAST(coalesce(sum(amount), 0) AS BIGINT) FROM holds
    WHERE account_id = ? AND status = 'active' AND expires_at <= ?"""
# Times never go back within an account: few entries are looked at.
COUNT_BEFORE = """
    WITH RECURSIVE halves (low, high) AS (
        SELECT CAST(0 AS BIGINT), CAST(? AS BIGINT) UNION ALL
        SELECT CASE WHEN created_at < ? THEN sequence ELSE low END,
            CASE WHEN created_at < ? THEN high ELSE sequence - 1 END
        FROM halves JOIN transactions ON account_id = ? AND sequence = ((low + high) >> 1) + 1
        WHERE low < high)
    SELECT low FROM halves WHERE low >= high"""
HOLD_STATUS = "CASE WHEN status = 'active' AND expires_at <= ? THEN 'expired' ELSE status END"
HOLDS_OF = f"""
    SELECT h.sequence, h.amount, {HOLD_STATUS}, captured, expires_at, description, metadata,
        created_at
    FROM holds h JOIN transactions t ON t.account_id = h.account_id AND t.sequence = h.sequence
    WHERE h.account_id = ? AND {HOLD_STATUS} LIKE ?"""
HOLDS = f"{HOLDS_OF} AND h.sequence BETWEEN ? AND ? ORDER BY h.sequence DESC LIMIT ?"
# The plus lets SQLite begin with what is active, which is little of all.
ACTIVE_HOLDS = f"""
    {HOLDS_OF} AND +h.sequence BETWEEN ? AND ?
        AND h.sequence IN (SELECT sequence FROM holds WHERE account_id = ? AND status = 'active')
    ORDER BY h.sequence DESC LIMIT ?"""
# Of two that send one key of the issuer, the second waits here, and learns which account was first.
CLAIM_KEY = """
    INSERT INTO issuer_keys VALUES (?, ?) ON CONFLICT (idempotency_key)
    DO UPDATE SET idempotency_key = excluded.idempotency_key RETURNING account_id"""


@dataclass
class _Locked:
    """An account that is locked, as it will be."""

    id: str
    token_hash: str
    frozen: int
    balance: int
    held: int
    last_sequence: int
    updated_at_us: int


class _Books:
    """Accounts that a transaction has locked, and what it is about to write into them.

    Until it ends, nobody else can change them. So the rules are applied here, to one entry after
    the other, and `write` writes what comes of it.
    """

    def __init__(self, tx: _Tx, *stamps: tuple[str, _Stamp]) -> None:
        self.tx = tx
        self._locked: dict[str, _Locked] = {}
        self._changed: dict[str, _Locked] = {}
        self._rows: list[_Row] = []
        self._earlier: dict[tuple[str, str], _Row] = {}
        keys = [(stamp.key, account_id) for account_id, stamp in stamps]
        if tx.waits:
            self._find(keys, "")
        # What was done before needs no lock, which is a write too.
        if tx.row_lock and not all((one, key) in self._earlier for key, one in keys):
            ids = sorted({account_id for _, account_id in keys})  # So that none deadlock.
            parts = [(one,) for one in ids] if tx.is_sharded else [tuple(ids)]
            tx.many(LOCK % ", ".join("?" * len(parts[0])) + tx.row_lock, parts)
            # Only a statement that begins now sees all that was committed before.
            self._find(keys, "" if tx.waits else tx.row_lock)

    def _find(self, keys: list[tuple[str, str]], lock: str) -> None:
        if len(keys) == 1 or self.tx.is_sharded:
            rows = [row for key in keys for row in self.tx(FIND_ONE + lock, *key)]
        else:
            rows = self.tx(FIND_MANY % ", ".join(["(?, ?)"] * len(keys)) + lock,
                           *(value for key in keys for value in key))
        for row in rows:
            self._locked[row[0]] = _Locked(*row[:7])
            if row[7]:
                self._earlier[row[7:9]] = row[9:]

    def begin(self, account_id: str, stamp: _Stamp) -> Transaction | None:
        """Return what the key did before.

        Raises Unauthorized, AccountNotFound, IdempotencyKeyReused.
        """
        account = self._locked.get(account_id)
        if stamp.token_hash and not (
                account and secrets.compare_digest(stamp.token_hash, account.token_hash)):
            raise Unauthorized(headers=INVALID_TOKEN)
        self._account(account_id)
        row = self._earlier.get((account_id, stamp.key))
        if row and row[0] != stamp.fingerprint:
            raise IdempotencyKeyReused()
        return _as_transaction(account_id, row[1:], replayed=True) if row else None

    def post(self, entry: _Entry, stamp: _Stamp) -> Transaction:
        """Change the balance and what is held, and note why.

        Raises AccountNotFound, AccountFrozen, BalanceLimitExceeded, InsufficientFunds.
        """
        account, now_us = self._account(entry.account_id), _now_us()
        change = SIGN_BY_TYPE.get(entry.type, 0) * entry.amount  # type: ignore[call-overload]
        if account.frozen:
            raise AccountFrozen()
        balance = account.balance + change
        if balance > AMOUNT_MAX:
            if entry.type == "transfer_in":  # Nobody else is to learn this account's balance.
                raise BalanceLimitExceeded("The balance of the other account would be too high.")
            detail = f"The balance is {account.balance}, and may be {AMOUNT_MAX} at most."
            raise BalanceLimitExceeded(detail, balance=account.balance)
        held = account.held
        if 0 < held > balance - entry.held:
            held -= self.tx(EXPIRED, account.id, now_us)[0][0]
        if held > balance - entry.held:
            available, needed = account.balance - held, entry.held - change
            free = f", {available} of it available" if held else ""
            raise InsufficientFunds(
                f"The balance is {account.balance}{free}, and this needs {needed}.",
                balance=account.balance, available=available, required=needed)
        if held < account.held:
            self.end_expired(account.id, now_us)
        account.balance, account.held = balance, account.held + entry.held
        account.last_sequence += 1
        account.updated_at_us = max(account.updated_at_us, now_us)  # It never goes back.
        row = (account.last_sequence, entry.type, entry.amount, balance, entry.description,
               entry.metadata_json, entry.reference, account.updated_at_us)
        self._changed[account.id] = account
        self._rows.append((account.id, stamp.key, stamp.fingerprint, *row))
        self._earlier[account.id, stamp.key] = (stamp.fingerprint, *row)
        return _as_transaction(account.id, row)

    def end_expired(self, account_id: str, now_us: int) -> None:
        """Stop counting the holds that have expired."""
        account = self._account(account_id)
        ended = self.tx("""UPDATE holds SET status = 'expired'
                           WHERE account_id = ? AND status = 'active' AND expires_at <= ?
                           RETURNING amount""", account_id, now_us)
        account.held -= sum(amount for amount, in ended)
        self._changed[account_id] = account

    def write(self) -> None:
        """Write what has come of it so far."""
        self.tx.many(UPDATE_ACCOUNT, [
            (account.balance, account.held, account.last_sequence, account.updated_at_us, id)
            for id, account in self._changed.items()])
        self.tx.many(INSERT_ENTRY, self._rows)
        self._changed, self._rows = {}, []

    def _account(self, account_id: str) -> _Locked:
        if account_id not in self._locked:
            raise AccountNotFound()
        return self._locked[account_id]


class Wallet:
    """Accounts and their money, in the database that `dsn` names (see `open_database`).

    Amounts are integers in minor units. Many threads may call every method, and each raises
    Unavailable when the database cannot do it now. `currency` is a code of ISO 4217, or a unit of
    your own with its number of decimals, such as CRD/0. It is fixed when the database is made, and
    USD if not given then. At most `connections` are kept to Postgres. With `read_only` nothing is
    ever written. With `alone`, unless it is `read_only`, it is refused where another wallet has the
    database open. Raises ConfigurationError when it cannot be opened so, or when it is not there
    and `create` is False.
    """

    def __init__(self, dsn: str = "sqlite://", *, currency: str | None = None, connections: int = 8,
                 create: bool = True, read_only: bool = False, alone: bool = False) -> None:
        unit = None if currency is None else _import_part("tables").parse_currency(currency)
        create = create and not read_only
        self.created, self.opened_version = False, 0  # Of the tables, as they were found.
        self.database = open_database(dsn, connections, create, read_only=read_only, alone=alone)
        try:
            self.currency, self.currency_digits = self._prepare(
                unit, create, range(0) if read_only else MIGRATIONS)
        except BaseException as error:
            self.database.close()
            is_fault = isinstance(error, (OSError, NotFound, Unavailable, sqlite3.Error))
            if is_fault or hasattr(error, "sqlstate"):  # psycopg's. A step may find wrong data.
                kind = NotReady if isinstance(error, Unavailable) else ConfigurationError
                raise kind(f"cannot use {self.database.location}:"
                           f" {' '.join(str(error).split())}") from error
            raise

    def __enter__(self) -> Wallet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish the write that runs, and let go of the database."""
        self.database.close()

    def register(self, name: str) -> tuple[Account, str]:
        """Make an account with a balance of 0. Return it and its token, which is shown only now.

        Raises ValidationFailed.
        """
        name = _parse_fields(NAME, {"name": name})["name"]
        account_id = "acc_" + _random_base62(16)
        token, now_us = _make_token(account_id), _now_us()
        # The account may be there already, if an earlier COMMIT was not answered.
        sql = """INSERT INTO accounts VALUES (?, ?, ?, 0, 0, 0, 0, ?, ?)
                 ON CONFLICT (id) DO NOTHING"""
        self._change(sql, account_id, name, _hash_token(token), now_us, now_us)
        return self._as_account(account_id, name, 0, 0, 0, 0, now_us), token

    def authenticate(self, token: str) -> Account:
        """Return the account that a token opens. Raises Unauthorized."""
        try:
            token_hash, account = self.database.read(partial(
                self._account, account_id=_parse_token(token)))
        except AccountNotFound:
            token_hash = ""
        if secrets.compare_digest(token_hash, _hash_token(token)):
            return account
        raise Unauthorized(headers=INVALID_TOKEN)

    def replace_token(self, account_id: str, token: str | None = None) -> str:
        """Return a new token of an account. The old one is dead from then on.

        With `token`, the account's must still be that one: of two who replace it at once, one
        succeeds. Raises Unauthorized, AccountNotFound.
        """
        new_token = _make_token(_parse_account_id(account_id))
        if token is not None and self.authenticate(token).id != account_id:
            raise Unauthorized(headers=INVALID_TOKEN)
        new_hash, old_hash = _hash_token(new_token), _hash_token(token) if token else None
        # The new one may be there already, if an earlier COMMIT was not answered.
        sql = """UPDATE accounts SET token_hash = ?
                 WHERE id = ? AND token_hash IN (coalesce(?, token_hash), ?) RETURNING id"""
        if not self._change(sql, new_hash, account_id, old_hash, new_hash):
            raise Unauthorized(headers=INVALID_TOKEN) if token else AccountNotFound()
        return new_token

    def account(self, account_id: str) -> Account:
        """Return an account as it stands. Raises AccountNotFound."""
        return self.database.read(lambda tx: self._account(tx, _parse_account_id(account_id)))[1]

    def accounts(self, **filters: Unpack[_AccountFilters]) -> Iterator[Account]:
        """Yield all accounts within the filters, newest first, few in memory at a time.

        Raises MalformedRequest.
        """
        found: Iterator[Account] = _import_part("overview").list_accounts(
            self, ACCOUNTS_ROWS, None, **filters)
        return found

    def account_page(self, *, limit: int = PAGE_LIMIT_DEFAULT, cursor: str | None = None,
                     **filters: Unpack[_AccountFilters]) -> AccountPage:
        """Return a page of accounts, newest first. Raises MalformedRequest."""
        limit = _parse_limit(limit)
        found = _import_part("overview").list_accounts(self, limit + 1, cursor, **filters)
        return _as_page(AccountPage, found, limit)

    def overview(self) -> Overview:
        """Return what there is in all accounts, and what was done last."""
        overview: Overview = _import_part("overview").read(self)
        return overview

    def freeze(self, account_id: str, frozen: bool = True) -> Account:
        """Let an account receive and spend nothing, or with False let it again. Return it.

        Raises AccountNotFound.
        """
        sql = "UPDATE accounts SET frozen = ? WHERE id = ?"
        self._change(sql, int(bool(frozen)), _parse_account_id(account_id))
        return self.account(account_id)

    def topup(self, account_id: str, amount: int, description: str | None = None,
              **options: Unpack[_Options]) -> Transaction:
        """Add to the balance, at most once per key.

        Raises AccountNotFound, AccountFrozen, BalanceLimitExceeded, IdempotencyKeyReused,
        MalformedRequest, Unauthorized, ValidationFailed.
        """
        return self._move("topup", account_id, amount, description, **options)

    def charge(self, account_id: str, amount: int, description: str | None = None,
               **options: Unpack[_Options]) -> Transaction:
        """Take from what is available, at most once per key.

        Raises InsufficientFunds, and what `topup` does.
        """
        return self._move("charge", account_id, amount, description, **options)

    def _move(self, type: TransactionType, account_id: str, amount: int, description: str | None,
              **options: Unpack[_Options]) -> Transaction:
        fields, stamp = _parse_request(
            MOVEMENT, account_id, type, amount=amount, description=description, **options)
        entry = _Entry(account_id, type, **fields)
        if stamp.is_issuers:  # It touches more than the account.
            return self._write(account_id, stamp, lambda books: (
                books.begin(account_id, stamp) or books.post(entry, stamp)))
        made: Transaction = self.database.gather(_post_each, (entry, stamp), account_id)
        return made

    def batch(self, transactions: Sequence[Mapping[str, object]], *,
              account_id: str | None = None, key: str | None = None,
              token: str | None = None) -> list[Transaction]:
        """Make up to BATCH_MAX topups and charges, in order, all or none, at most once per key.

        Each is a dict with the `type`, `amount`, `description` and `metadata` of a movement, and
        with the id of its `account`, unless `account_id` is given for all. An error that one of
        them raises has its `index`.
        """
        entries = _parse_batch(transactions, account_id)
        stamp = _make_stamp(key, token, "batch", *entries)
        firsts: dict[str, int] = {}  # An account's first movement has the key itself.
        for index, entry in enumerate(entries):
            firsts.setdefault(entry.account_id, index)

        def batch(books: _Books) -> list[Transaction]:
            made: list[Transaction] = []
            try:
                for index, entry in enumerate(entries):
                    is_first = index == firsts[entry.account_id]
                    if is_first and books.begin(entry.account_id, stamp):
                        return self._replay(books, entries, firsts, stamp)
                    own_stamp = stamp if is_first else stamp.derive(entry.account_id, index)
                    made.append(books.post(entry, own_stamp))
            except WalletError as error:
                raise error.add(index=len(made)) from None
            return made

        others = [(account_id, stamp) for account_id in firsts]
        return self._write(entries[0].account_id, stamp, batch, *others[1:], size=len(entries))

    def _replay(self, books: _Books, entries: Sequence[_Entry], firsts: Iterable[str],
                stamp: _Stamp) -> list[Transaction]:
        """Return again what a batch made. In each account that is one entry after the other."""
        sql = f"""SELECT {TRANSACTION_COLUMNS} FROM transactions
                  WHERE account_id = ? AND sequence >= ? ORDER BY sequence LIMIT ?"""
        rows = {
            account_id: iter(books.tx(sql, account_id, _parse_entry_id("txn", account_id, first.id),
                                      len(entries)))
            for account_id in firsts if (first := books.begin(account_id, stamp))}
        return [_as_transaction(entry.account_id, next(rows[entry.account_id]), replayed=True)
                for entry in entries]

    def refund(self, account_id: str, transaction_id: str, amount: int | None = None,
               description: str | None = None, **options: Unpack[_Options]) -> Transaction:
        """Give back a charge, or all that is left of it, at most once per key.

        Raises NotFound, NotRefundable, RefundExceedsCharge, and what `topup` does.
        """
        sequence = _parse_entry_id("txn", account_id, transaction_id)
        fields, stamp = _parse_request(PART, account_id, "refund", sequence, amount=amount,
                                       description=description, **options)
        refunded = """SELECT CAST(coalesce(sum(amount), 0) AS BIGINT) FROM transactions
                      WHERE account_id = ? AND type = 'refund' AND reference = ?"""

        def refund(books: _Books) -> Transaction:
            if earlier := books.begin(account_id, stamp):
                return earlier
            charge = self._transaction(books.tx, account_id, transaction_id)
            if charge.type != "charge":
                raise NotRefundable(f"This is a {charge.type}, and only a charge can be refunded.")
            refundable = charge.amount - books.tx(refunded, account_id, transaction_id)[0][0]
            fields["amount"] = amount or refundable
            if not 0 < fields["amount"] <= refundable:
                detail = f"Of this charge, {refundable} can still be refunded."
                raise RefundExceedsCharge(detail, refundable=refundable)
            return books.post(
                _Entry(account_id, "refund", **fields, reference=transaction_id), stamp)

        return self._write(account_id, stamp, refund)

    def transfer(self, account_id: str, to: str, amount: int, description: str | None = None,
                 **options: Unpack[_Options]) -> Transaction:
        """Move money to another account, at most once per key. Return this account's transaction.

        Raises what `charge` does, for either account.
        """
        fields, stamp = _parse_request(TRANSFER, account_id, "transfer", to=to, amount=amount,
                                       description=description, **options)
        if fields.pop("to") == account_id:
            _refuse_fields([("#/to", "must be another account")])
        spent = _Entry(account_id, "transfer_out", **fields, reference=to)
        received = _Entry(to, "transfer_in", **fields, reference=account_id)
        other_stamp = stamp.derive(account_id, 1)

        def transfer(books: _Books) -> Transaction:
            if earlier := books.begin(account_id, stamp):
                return earlier
            made = books.post(spent, stamp)
            books.post(received, other_stamp)
            return made

        return self._write(account_id, stamp, transfer, (to, other_stamp))

    def hold(self, account_id: str, amount: int, description: str | None = None, *,
             expires_in_s: int | None = None, **options: Unpack[_Options]) -> Hold:
        """Set money aside until it is captured or released, or expires. Raises what `charge` does.
        """
        fields, stamp = _parse_request(
            HOLD, account_id, "hold", amount=amount, description=description,
            expires_in_s=expires_in_s, **options)
        duration_us = fields.pop("expires_in_s") * 1_000_000

        def hold(books: _Books) -> Hold:
            made = books.begin(account_id, stamp)
            if not made:
                books.end_expired(account_id, _now_us())
                made = books.post(_Entry(account_id, "hold", **fields, held=amount), stamp)
                books.write()
                begun_us = min(_as_us(made.created_at), _now_us())  # The account's may be ahead.
                sequence = _parse_entry_id("txn", account_id, made.id)
                books.tx.many("INSERT INTO holds VALUES (?, ?, ?, ?, 'active', 0)",
                              [(account_id, sequence, amount, begun_us + duration_us)])
            # If the hold has ended since, this is the first answer all the same.
            kept = self._hold(books.tx, account_id, "hld" + made.id.removeprefix("txn"))
            return replace(kept, status="active", captured=0, replayed=made.replayed)

        return self._write(account_id, stamp, hold)

    def capture(self, account_id: str, hold_id: str, amount: int | None = None,
                description: str | None = None, **options: Unpack[_Options]) -> Transaction:
        """Charge a hold, or a part of it, and release the rest, at most once per key.

        Where no description or metadata is given, the hold's is taken. Raises NotFound,
        HoldNotActive, ValidationFailed, and what `topup` does.
        """
        sequence = _parse_entry_id("hld", account_id, hold_id)
        fields, stamp = _parse_request(PART, account_id, "capture", sequence, amount=amount,
                                       description=description, **options)

        def capture(books: _Books) -> Transaction:
            if earlier := books.begin(account_id, stamp):
                return earlier
            hold = self._end_hold(books.tx, account_id, hold_id, "captured", amount)
            given = {name: getattr(hold, name) if value in (None, {}) else value
                     for name, value in fields.items()}
            return books.post(
                _Entry(account_id, "charge", **given, reference=hold_id, held=-hold.amount), stamp)

        return self._write(account_id, stamp, capture)

    def release(self, account_id: str, hold_id: str, *, key: str | None = None,
                token: str | None = None) -> Hold:
        """Make what is held available again, at most once per key.

        Raises NotFound, HoldNotActive, and what `topup` does.
        """
        sequence = _parse_entry_id("hld", account_id, hold_id)
        stamp = _make_stamp(key, token, "release", sequence)

        def release(books: _Books) -> Hold:
            earlier = books.begin(account_id, stamp)
            if not earlier:
                held = self._end_hold(books.tx, account_id, hold_id, "released", 0).amount
                books.post(
                    _Entry(account_id, "release", held, reference=hold_id, held=-held), stamp)
            return replace(self._hold(books.tx, account_id, hold_id), replayed=bool(earlier))

        return self._write(account_id, stamp, release)

    def get_hold(self, account_id: str, hold_id: str) -> Hold:
        """Return one hold of this account. Raises NotFound."""
        return self.database.read(lambda tx: self._hold(tx, account_id, hold_id))

    def holds(self, account_id: str, *, limit: int = PAGE_LIMIT_DEFAULT,
              cursor: str | None = None, status: HoldStatus | None = None) -> HoldPage:
        """Return a page of holds, newest first: all, or those of one status.

        Raises AccountNotFound, CursorBeyondEnd, MalformedRequest.
        """
        limit = _parse_limit(limit)
        if status not in (None, *(statuses := get_args(HoldStatus))):
            raise MalformedRequest(f"status must be one of: {', '.join(statuses)}.")
        below = SEQUENCE_MAX if cursor is None else _parse_cursor("hld", account_id, cursor)

        def read(tx: _Execute) -> list[Hold]:
            self._last_sequence(tx, account_id, below)
            return self._read_holds(tx, account_id, 1, below - 1, limit + 1, status)

        return _as_page(HoldPage, self.database.read(read), limit)

    def transaction(self, account_id: str, transaction_id: str) -> Transaction:
        """Return one transaction of this account. Raises NotFound."""
        return self.database.read(lambda tx: self._transaction(tx, account_id, transaction_id))

    def transactions(self, account_id: str, *, limit: int = PAGE_LIMIT_DEFAULT,
                     cursor: str | None = None, after: str | None = None,
                     **filters: Unpack[_Filters]) -> Page:
        """Return a page of history: newest first, or with `after` oldest first, behind that id.

        An `after` of "0" begins at the oldest. A page begins at a sequence number, so each costs
        the same, and new transactions shift nothing. The numbers become visible in order: whoever
        asks on with the last id as `after` misses nothing and gets nothing twice.
        Raises AccountNotFound, CursorBeyondEnd, MalformedRequest.
        """
        limit, newest_first = _parse_limit(limit), after is None
        if cursor is not None and after is not None:
            raise MalformedRequest("Send cursor or after, but not both.")
        below = SEQUENCE_MAX if cursor is None else _parse_cursor("txn", account_id, cursor)
        above = 0 if after in (None, "0") else _parse_cursor("txn", account_id, str(after))
        found = self._entries(account_id, limit + 1, above=above, below=below,
                              newest_first=newest_first, **filters)
        entries = (_as_transaction(account_id, row) for rows in found for row in rows)
        return _as_page(Page, entries, limit)

    def statement(self, account_id: str, **filters: Unpack[_Filters]) -> Iterator[Transaction]:
        """Return the history as it is now, oldest first, little of it in memory at a time."""
        found = self._entries(account_id, STATEMENT_ROWS, **filters)
        return (_as_transaction(account_id, row) for rows in found for row in rows)

    def balance_at(self, account_id: str, at: str | datetime) -> int:
        """Return what the balance was at a time (RFC 3339, or an aware datetime).

        Raises AccountNotFound, MalformedRequest.
        """
        at_us = _parse_time(at)
        sql = "SELECT balance FROM transactions WHERE account_id = ? AND sequence = ?"
        rows = self.database.read(
            lambda tx: tx(sql, account_id, self._count_before(tx, account_id, at_us + 1)))
        return int(rows[0][0]) if rows else 0

    def follow(self, account_id: str, after: str | None = None, *,
               poll_s: float = 1.0) -> Iterator[Transaction]:
        """Yield for ever what comes from now on, or behind `after`. Unavailable only delays it.

        It asks each `poll_s` seconds. Raises AccountNotFound, CursorBeyondEnd, MalformedRequest.
        """
        if after is None:
            newest = self.transactions(account_id, limit=1).transactions
            after = newest[0].id if newest else "0"
        feed: Iterator[Transaction] = _import_part("statements").feed(
            self, account_id, after, poll_s)
        return feed

    def _end_hold(self, tx: _Tx, account_id: str, hold_id: str, status: HoldStatus,
                  captured: int | None) -> Hold:
        """Give an active hold its last status. None captures all. The account is locked."""
        hold = self._hold(tx, account_id, hold_id)
        if hold.status != "active":
            raise HoldNotActive(f"This hold is {hold.status}.", hold_status=hold.status)
        if captured is None:
            captured = hold.amount
        if captured > hold.amount:
            _refuse_fields([("#/amount", f"must be at most {hold.amount}, which is what is held")])
        tx.many("UPDATE holds SET status = ?, captured = ? WHERE account_id = ? AND sequence = ?",
                [(status, captured, account_id, _parse_entry_id("hld", account_id, hold_id))])
        return hold

    def _write(self, account_id: str, stamp: _Stamp, function: Callable[[_Books], T],
               *others: tuple[str, _Stamp], size: int = 1) -> T:
        """Run a write of accounts. A key of the issuer has its effect in no other one.

        Raises IdempotencyKeyReused.
        """

        def write(tx: _Tx) -> T:
            if stamp.is_issuers and tx(CLAIM_KEY, stamp.key, account_id)[0][0] != account_id:
                raise IdempotencyKeyReused()
            books = _Books(tx, (account_id, stamp), *others)
            result = function(books)
            books.write()
            return result

        return self.database.write(write, size=size)

    def _read(self, sql: str, *parameters: str | int | None) -> list[_Row]:
        return self.database.read(lambda tx: tx(sql, *parameters))

    def _change(self, sql: str, *parameters: str | int | None) -> list[_Row]:
        return self.database.write(lambda tx: tx(sql, *parameters))

    def _account(self, tx: _Execute, account_id: str,
                 now_us: int | None = None) -> tuple[str, Account]:
        """Return an account and its token's hash. Raises AccountNotFound."""
        now_us = now_us or _now_us()
        for token_hash, *row in tx(ACCOUNT_BY_ID, now_us, now_us, account_id):
            return token_hash, self._as_account(*row)
        raise AccountNotFound()

    def _as_account(self, id: str, name: str, balance: int, available: int, holds_active: int,
                    frozen: int, created_at_us: int) -> Account:
        return Account(id, name, self.currency, self.currency_digits, balance, available,
                       holds_active, bool(frozen), _as_time(created_at_us))

    def _transaction(self, tx: _Execute, account_id: str, transaction_id: str) -> Transaction:
        sequence = _parse_entry_id("txn", account_id, transaction_id)
        rows = tx(f"""SELECT {TRANSACTION_COLUMNS} FROM transactions
                      WHERE account_id = ? AND sequence = ?""", account_id, sequence)
        if not rows or rows[0][1] not in SIGN_BY_TYPE:
            raise NotFound("This account has no such transaction.")
        return _as_transaction(account_id, rows[0])

    def _hold(self, tx: _Execute, account_id: str, hold_id: str) -> Hold:
        sequence = _parse_entry_id("hld", account_id, hold_id)
        for found in self._read_holds(tx, account_id, sequence, sequence, 1):
            return found
        raise NotFound("This account has no such hold.")

    def _read_holds(self, tx: _Execute, account_id: str, first: int, last: int,
                    limit: int, status: HoldStatus | None = None) -> list[Hold]:
        now_us = _now_us()
        holds, ids = (ACTIVE_HOLDS, [account_id]) if status == "active" else (HOLDS, [])
        rows = tx(holds, now_us, account_id, now_us, status or "%", first, last, *ids, limit)
        return [Hold(_make_entry_id("hld", account_id, sequence), amount, status, captured,
                     _as_time(expires_at_us), description, json.loads(metadata or "{}"),
                     _as_time(created_at_us))
                for sequence, amount, status, captured, expires_at_us, description, metadata,
                created_at_us in rows]

    def _entries(self, account_id: str, rows_max: int, *, above: int = 0,
                 below: int = SEQUENCE_MAX, newest_first: bool = False,
                 type: TransactionType | None = None, since: str | datetime | None = None,
                 until: str | datetime | None = None) -> Iterator[list[_Row]]:
        """Return what is within all filters, in lists of at most `rows_max`."""
        if type not in (None, *SIGN_BY_TYPE):
            raise MalformedRequest(f"type must be one of: {', '.join(SIGN_BY_TYPE)}.")
        order = "DESC" if newest_first else "ASC"
        since_us = None if since is None else _parse_time(since)
        until_us = None if until is None else _parse_time(until)

        def bounds(tx: _Execute) -> tuple[int, int]:
            last = self._last_sequence(tx, account_id, above, below)
            return (0 if since_us is None else self._count_before(tx, account_id, since_us),
                    last if until_us is None else self._count_before(tx, account_id, until_us))

        first, last = self.database.read(bounds)
        start_sql = f"SELECT {TRANSACTION_COLUMNS} FROM transactions WHERE account_id = ?"
        # So BETWEEN finds the index by type, which > and < would not from SQLite 3.53 on.
        end_sql = f"AND sequence BETWEEN ? + 1 AND ? - 1 ORDER BY sequence {order} LIMIT ?"
        types = [type] if type else [*SIGN_BY_TYPE]
        of_each = " UNION ALL ".join(
            f"SELECT * FROM ({start_sql} AND type = ? {end_sql}) AS {one}" for one in types)

        def entries(above: int, below: int) -> Iterator[list[_Row]]:
            by_type = bool(type)
            while True:
                rest = above, below, rows_max
                each = [value for one in types for value in (account_id, one, *rest)]
                rows = (self._read(f"{of_each} ORDER BY sequence {order} LIMIT ?", *each, rows_max)
                        if by_type else self._read(f"{start_sql} {end_sql}", account_id, *rest))
                yield (found := [row for row in rows if row[1] in SIGN_BY_TYPE])
                if len(rows) < rows_max:
                    return
                above, below = (above, rows[-1][0]) if newest_first else (rows[-1][0], below)
                # By their types, no number of holds is passed over.
                by_type = bool(type) or 2 * len(found) < rows_max

        return entries(max(above, first), min(below, last + 1))

    def _last_sequence(self, tx: _Execute, account_id: str, *cursors: int) -> int:
        """Return how many entries an account has. SEQUENCE_MAX is no cursor.

        Raises AccountNotFound, and CursorBeyondEnd if one of `cursors` is none of them.
        """
        rows = tx("SELECT last_sequence FROM accounts WHERE id = ?", _parse_account_id(account_id))
        if not rows:
            raise AccountNotFound()
        if any(rows[0][0] < cursor < SEQUENCE_MAX for cursor in cursors):
            raise CursorBeyondEnd()
        return int(rows[0][0])

    def _count_before(self, tx: _Execute, account_id: str, time_us: int) -> int:
        """Return how many entries an account had before a time. Raises AccountNotFound."""
        return int(tx(COUNT_BEFORE, self._last_sequence(tx, account_id), time_us, time_us,
                      account_id)[0][0])

    def _prepare(self, unit: tuple[str, int | None] | None, create: bool,
                 migrations: range) -> tuple[str, int]:
        """Make the tables, or bring those of an older version to this one. Return the currency.

        The row of `wallet` comes last: where it is, all is. So where it is, nothing is made.
        """
        rows = self._try_read("schema_version, currency", "wallet")
        if not rows:
            self._read("SELECT 1")  # Raises Unavailable where something else is wrong.
            if not create:
                raise NotReady(f"there is no wallet in {self.database.location}{MISSING}")
            self._make_tables(*unit or ("USD", 2))
            self.created = True
            rows = self._read("SELECT schema_version FROM wallet")
        ((self.opened_version, *_),) = rows
        if self.opened_version != SCHEMA_VERSION:
            _import_part("tables").migrate(self, migrations)
        ((code, digits),) = self._read("SELECT currency, currency_digits FROM wallet")
        if unit and unit not in ((code, digits), (code, None)):
            raise ConfigurationError(f"the database's currency is {code}/{digits}, and cannot be"
                                     f" changed to {unit[0]}/{unit[1]}")
        return code, digits

    def _make_tables(self, code: str, digits: int | None) -> None:
        for table, column in (("wallet", "currency"), ("accounts", "token_hash"),
                              ("transactions", "fingerprint")):
            if (self._try_read("1", table) is not None
                    and self._try_read(column, table) is None):
                raise ConfigurationError(
                    f"the table {table} in {self.database.location} is another program's:"
                    " name another database, or another schema as the search_path")
        if digits is None:
            raise ConfigurationError(
                f"{code} is not in ISO 4217: say how many decimals it has, as with {code}/0")
        for statement in _read_sql("schema.sql"):
            self._change(self.database.adapt(statement))
        self._change("INSERT INTO wallet VALUES (1, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
                     SCHEMA_VERSION, code, digits)

    def _try_read(self, columns: str, table: str) -> list[_Row] | None:
        """Return a row of a table, or None if there is no such table or column."""
        try:
            return self._read(f"SELECT {columns} FROM {table} LIMIT 1")
        except Unavailable as error:
            if "malformed" in str(error):
                raise
            return None


def _post_each(tx: _Tx, moves: Sequence[tuple[_Entry, _Stamp]],
               ) -> list[Transaction | WalletError | None]:
    """Post movements. Return for each what came of it, or None where it is to be tried again."""
    if len(moves) == 1 and not tx.waits:
        return [_post_at_once(tx, *moves[0])]
    books = _Books(tx, *((entry.account_id, stamp) for entry, stamp in moves))
    outcomes: list[Transaction | WalletError | None] = []
    for entry, stamp in moves:
        try:
            outcomes.append(books.begin(entry.account_id, stamp) or books.post(entry, stamp))
        except WalletError as error:  # Unless it waits, it may not see all that its key did.
            outcomes.append(error if tx.waits else None)
    books.write()
    return outcomes


def _post_at_once(tx: _Tx, entry: _Entry, stamp: _Stamp) -> Transaction | None:
    """Post a movement in one statement. Return None if that cannot do it, whatever the reason."""
    change = entry.amount if entry.type == "topup" else -entry.amount
    rows = tx(POST_AT_ONCE, entry.account_id, change, _now_us(), change, AMOUNT_MAX,
              stamp.token_hash, stamp.key, stamp.key, stamp.fingerprint, entry.type, entry.amount,
              entry.description, entry.metadata_json)
    return _as_transaction(entry.account_id, rows[0]) if rows else None


def _read_sql(name: str) -> list[str]:
    """Return the statements of a file. No semicolon stands anywhere but at their ends."""
    return _read_file(name).decode().rstrip("; \n").split(";")


# Databases ########################################################################################

_Row = tuple[Any, ...]


class _Execute(Protocol):
    """Runs one statement of a transaction, `?` for each parameter, and returns all its rows."""

    def __call__(self, sql: str, *parameters: str | int | None) -> list[_Row]: ...


class _Tx(_Execute, Protocol):
    """The same, where it may write. A SELECT that ends with `row_lock` locks what it finds.

    What another has locked it waits for or, unless it `waits`, does not find. One that
    `is_sharded`, with accounts on several nodes, has statements that are about one of them.
    """

    row_lock: str = ""
    waits: bool = True
    is_sharded: bool = False

    def many(self, sql: str, rows: Sequence[_Row]) -> None:
        """Run one statement with each of `rows`, before the next one at the latest."""


_Each = Callable[[_Tx, Sequence[Any]], Sequence[Any]]
# By this, a thread tells its server that it waits for a database, -1, or goes on, +1.
count_running = ContextVar[Callable[[int], None]]("count_running", default=lambda change: None)


@contextmanager
def _waiting() -> Iterator[None]:
    count = count_running.get()
    outer = count_running.set(lambda change: None)  # What waits within this counts once.
    count(-1)
    try:
        yield
    finally:
        count_running.reset(outer)
        count(+1)


class Database(Protocol):
    """What an engine supplies. It knows nothing about money.

    `engine` says what it is, with its version, and `location` where.

    `observe` is told what became of the writes of each commit, None or an error, and of other
    calls that failed.
    """

    engine: str
    location: str
    observe: Callable[[Sequence[Exception | None]], None] = staticmethod(lambda outcomes: None)

    def write(self, function: Callable[[_Tx], T], timeout_s: float | None = None,
              size: int = 1) -> T:
        """Run `function` in one transaction. Return its result once that is committed.

        It may be run more than once and grouped with others, so it touches nothing outside its
        transaction. An error that it raises undoes what it did, and nothing else. Raises
        Unavailable where nothing was changed, and OutcomeUnknown where that cannot be told. On
        Postgres it may take `timeout_s`, by default DATABASE_TIMEOUT_S. `size` is how many entries
        it makes.
        """

    def gather(self, function: _Each, item: Any, account_id: str) -> Any:
        """Do so with an item. `function` is given all that wait, and returns a result or an error
        for each.
        """

    def read(self, function: Callable[[_Execute], T], timeout_s: float | None = None) -> T:
        """Run `function`. Each statement sees what is committed by then. Raises Unavailable."""

    def adapt(self, statement: str) -> str:
        """Return a statement of schema.sql or of a migration as this engine has it."""
        return statement

    def lock(self, tx: _Execute) -> None:
        """Let no other transaction write until this one ends. On SQLite none can."""
        return

    def ping(self) -> None:
        """Read the one row that every wallet has. Raises Unavailable."""
        self.read(lambda tx: tx("SELECT currency FROM wallet"))

    def usage(self) -> dict[str, int]:
        """Return how many connections are `idle` and `in_use`, and how many calls `waiting`."""

    def failed(self, error: Unavailable) -> Unavailable:
        """Tell `observe` of a call that has failed, and return its error."""
        self.observe([error])
        return error

    def close(self) -> None:
        """Let the write that runs finish, and let go of everything."""


MISSING = ": is its disk mounted? Name another DSN, or let the command init make a new one"
# What a part that is loaded only where it is needed needs besides.
NEEDED = {"postgres": "'psycopg[binary]' psycopg-pool", "metrics": "prometheus-client",
          "server": "waitress", "client": "urllib3"}


def _import_part(name: str) -> Any:
    """Return a module that lies beside this one. Raises ConfigurationError."""
    is_package = "__path__" in globals()  # Installed, where the files have other names.
    try:
        return import_module(f"wallet.{name}" if is_package else f"wallet_{name}")
    except ImportError as error:
        has_file = error.name not in (f"wallet.{name}", f"wallet_{name}")
        way = (f"pip install {NEEDED.get(name)}" if has_file
               else f"put wallet_{name}.py beside wallet.py")
        raise ConfigurationError(f"{error.name or error} is not installed: {way}") from error


def open_database(dsn: str, connections: int, create: bool, **options: bool) -> Database:
    """Return the database that a DSN names. Raises ConfigurationError.

    sqlite:///wallet.db is a file in this folder, sqlite:////var/lib/wallet.db one with an absolute
    path, and sqlite:// is in memory, gone when it is closed. postgresql:// takes all that libpq
    does (https://www.postgresql.org/docs/current/libpq-connect.html).
    """
    scheme, separator, path = dsn.partition("://")
    if UNFIT.search(dsn):
        raise ConfigurationError("the DSN has a control character, such as a carriage return")
    if not separator:
        raise ConfigurationError("a DSN looks like sqlite:///wallet.db, or with an absolute path"
                                 " sqlite:////srv/wallet.db")
    if scheme in ("postgresql", "postgres"):
        database: Database = _import_part("postgres").PostgresDatabase(dsn, connections, **options)
        return database
    if scheme != "sqlite":
        scheme = scheme if scheme.isalnum() else "..."  # It may be anything, such as a password.
        raise ConfigurationError(f"unknown kind of DSN, {scheme}://; known are sqlite:///FILE,"
                                 " sqlite:// and postgresql://")
    if path in ("", "/:memory:"):
        return SQLiteDatabase(None, create, **options)
    if not path.startswith("/") or path == "/" or "?" in path:
        raise ConfigurationError("a DSN of SQLite has three slashes and a path, without parameters")
    return SQLiteDatabase(path[1:], create, **options)


class SQLiteDatabase(Database):
    """SQLite, with one connection that writes, and others that read.

    Writes stand in line here, since those who wait for SQLite's own lock poll and overtake each
    other. Many share one COMMIT and the price of its sync, and none returns before that has. With
    `alone`, as in memory, there is this one connection, and readers take turns with it.
    """

    def __init__(self, path: str | None, create: bool, read_only: bool = False,
                 alone: bool = False) -> None:
        if sqlite3.sqlite_version_info < (3, 35):  # The first with RETURNING.
            raise ConfigurationError(
                f"SQLite 3.35 or newer is needed; this Python has {sqlite3.sqlite_version}")
        self.path = os.path.abspath(path) if path else None  # Wherever the process moves.
        self.engine = f"SQLite {sqlite3.sqlite_version}"
        self.location = self.path or "memory, gone when it stops"
        self._read_only, self._alone = read_only, path is None or (alone and not read_only)
        self._data_version: int | None = None  # None: not watched. 0: not known.
        self._warned_until = 0.0
        self._line = _Line(self._commit)
        self._file: tuple[int, ...] = ()  # What _identify said when it was opened.
        self._idle_readers: list[sqlite3.Connection] = []
        self._reading = 0  # How many readers are in use.
        try:
            self._writer = self._open_writer(create)
        except (OSError, ValueError, sqlite3.Error) as error:
            reason = getattr(error, "strerror", None) or self._explain(str(error))
            # Even rights may come: those of a folder are other ones once its disk is mounted.
            may_pass = isinstance(error, (OSError, sqlite3.OperationalError))
            kind = NotReady if may_pass else ConfigurationError
            raise kind(f"cannot open {self.location}: {reason}") from error

    def write(self, function: Callable[[_Tx], T], timeout_s: float | None = None,
              size: int = 1) -> T:
        result: T = self._line.stand(_Write(lambda tx, _: [function(tx)], size=size))
        return result

    def gather(self, function: _Each, item: Any, account_id: str) -> Any:
        return self._line.stand(_Write(function, item))

    def read(self, function: Callable[[_Execute], T], timeout_s: float | None = None) -> T:
        """Run `function` beside the writer, or in turn with it."""
        if self._alone:
            return self.write(function)
        with self._line.lock:
            self._line.check_usable()
            reader = self._idle_readers.pop() if self._idle_readers else None
            self._reading += 1
        try:
            if not reader:
                reader = self.connect()
                reader.execute("PRAGMA query_only = ON")
                cache_kb = SQLITE_VERIFY_CACHE_KB if self._read_only else SQLITE_READER_CACHE_KB
                reader.execute(f"PRAGMA cache_size = -{cache_kb}")
            return function(_SQLiteTx(reader))
        except sqlite3.DatabaseError as error:
            raise self.failed(_unavailable(error)) from error
        finally:
            with self._line.lock:
                self._reading -= 1
                if reader and self._line.is_closed:
                    reader.close()
                elif reader:
                    self._idle_readers.append(reader)
            if self._immutable and not self._is_immutable():
                raise self.failed(Unavailable(f"{self.path} was written to: open it again."))

    def adapt(self, statement: str) -> str:
        """Take collations out: SQLite compares bytes, unless told otherwise, and has no "C"."""
        return "" if "ALTER COLUMN" in statement else statement.replace(' COLLATE "C"', "")

    def ping(self) -> None:
        """See too that the file is the one that was opened."""
        super().ping()
        if self.path and self._file:
            with suppress(FileNotFoundError):
                if _identify(self.path)[:2] == self._file[:2]:
                    return
            raise self.failed(Unavailable(f"{self.location} was removed or replaced. Stop this"
                                          " wallet before you do that."))

    def usage(self) -> dict[str, int]:
        return {"idle": len(self._idle_readers), "in_use": self._reading,
                "waiting": len(self._line.waiting)}

    def close(self) -> None:
        """Wait DATABASE_TIMEOUT_S for the writes that are begun; then close what is not in use."""
        with self._line.close():
            while self._idle_readers:
                self._idle_readers.pop().close()
            self._writer.close()

    def _commit(self, batch: list[_Write]) -> None:
        """Run every write of `batch` in one transaction, and note what became of each.

        A COMMIT that failed may be on the disk all the same. Running the batch again decides it:
        for this connection the log still ends where it did, so a COMMIT that succeeds overwrites
        the first one (mxFrame in https://www.sqlite.org/walformat.html).
        """
        failure = self._try_commit(batch)
        if isinstance(failure, OutcomeUnknown):
            succeeded = [write for write in batch if not write.error]
            if self._try_commit(batch) is None and not any(write.error for write in succeeded):
                failure = None
        for write in batch:
            write.outcome = type(failure)(str(failure)) if failure else write.outcome
            write.done = True
        self.observe([write.error for write in batch])

    def _try_commit(self, batch: list[_Write], one_by_one: bool = False) -> Unavailable | None:
        """Commit the batch. Return why that failed as a whole, or may have.

        A write that failed by itself has its own error, and is not committed.
        """
        committing = False
        execute = self._writer.execute
        try:
            execute("BEGIN IMMEDIATE")
            self._look_for_others()
            groups: dict[object, list[_Write]] = {}
            for write in batch:
                groups.setdefault(write if one_by_one else write.function, []).append(write)
            # Many together come first, as a savepoint that grows is a file.
            for writes in sorted(groups.values(), key=len, reverse=True):
                if len(writes) == 1 < len(batch):
                    execute("SAVEPOINT one_write")
                    if not self._run(writes):  # What it did is undone, and nothing else.
                        execute("ROLLBACK TO one_write")
                    execute("RELEASE one_write")
                elif not self._run(writes):  # Maybe by the fault of one of them.
                    execute("ROLLBACK")
                    return self._try_commit(batch, one_by_one=True) if len(batch) > 1 else None
            committing = True
            execute("COMMIT")
            return None
        except sqlite3.DatabaseError as error:
            if self._data_version and "locked" not in str(error):
                self._data_version = 0  # It may change with the error too.
            # A full disk shows before the log's last frame is written: that is a clear no.
            if committing and "disk is full" not in str(error):
                return OutcomeUnknown(f"{OutcomeUnknown.advice} ({error})")
            return _unavailable(error)
        finally:
            if self._writer.in_transaction:  # Some errors roll back by themselves.
                with suppress(sqlite3.Error):  # The next BEGIN would fail too, and be told.
                    execute("ROLLBACK")

    def _run(self, writes: list[_Write]) -> bool:
        """Run writes of one function. Did it succeed? A fault of the database fails all that is
        committed with it.
        """
        try:
            tx, items = _SQLiteTx(self._writer), [write.item for write in writes]
            for write, outcome in zip(writes, writes[0].function(tx, items), strict=True):
                write.outcome = outcome
        except Exception as error:
            is_fault = isinstance(error, sqlite3.DatabaseError)
            if is_fault and not isinstance(error, sqlite3.IntegrityError):
                raise
            for write in writes:
                write.outcome = error
            return False
        return True

    def _look_for_others(self) -> None:
        """Warn, now and then, of others that write, if this SQLite has a bug then."""
        if self._data_version is not None:
            ((version,),) = self._writer.execute("PRAGMA data_version").fetchall()
            is_other = self._data_version not in (0, version)
            if is_other and time.monotonic() > self._warned_until:
                self._warned_until = time.monotonic() + SQLITE_WARNING_PAUSE_S
                logger.warning(
                    "%s was written to from outside this wallet, and SQLite %s has a rare bug that"
                    " can damage a file with two writers: let only one write for long, or install"
                    " SQLite 3.51.3 or newer (sqlite.org/wal.html#walresetbug)",
                    self.path, sqlite3.sqlite_version)
            self._data_version = version

    def _explain(self, reason: str) -> str:
        """Return why the file cannot be opened."""
        if self.path and not os.path.exists(self.path):
            return f"there is no such file{MISSING}"
        if not os.access(str(self.path), os.R_OK if self._read_only else os.R_OK | os.W_OK):
            return "this user may not read it, or may not write to it, or its disk is read-only"
        if "locked" in reason:
            return "another process has it open: stop that first, or wait until it is done"
        if re.search("unable to open|readonly", reason):
            reason += ": this user must be allowed to write to its folder too"
            reason += ", or copy it and its -wal to another one" if self._read_only else ""
        return reason

    def _is_immutable(self) -> bool:
        """Is the file unchanged, on a read-only mount, and without a log, which it needs there?

        Only then does SQLite read it without one. A file mounted alone has its log on another disk.
        """
        with suppress(OSError, AttributeError):  # Windows has no statvfs.
            folder, name = os.path.split(os.path.realpath(str(self.path)))
            return (bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
                    and _identify(f"{folder}/{name}") == self._file
                    and os.stat(folder).st_dev == self._file[0]
                    and not {f"{name}-wal", f"{name}-journal"} & {*os.listdir(folder)})
        return False

    def _open_writer(self, create: bool) -> sqlite3.Connection:
        if self.path is not None and create:
            # The -wal and -shm get this mode too: money is nobody else's to read. A file that is
            # there is not opened here: closing it would end the locks that another connection of
            # this process holds.
            with suppress(FileExistsError):
                Path(self.path).touch(0o600, exist_ok=False)
        with suppress(FileNotFoundError):  # SQLite finds that too.
            self._file = _identify(self.path) if self.path else ()
        self._immutable = self._read_only and self._is_immutable()
        connection = self.connect()
        try:
            # In this order: who makes a wallet marks the file first, and may be at it now.
            ((tables,),) = connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
            ((owner,),) = connection.execute("PRAGMA application_id").fetchall()
            if owner != SQLITE_APPLICATION_ID and (owner or tables):
                raise ConfigurationError(
                    f"{self.path} is the database of another program: name another file")
            if not tables and not create:
                raise NotReady(f"there is no wallet in {self.location}{MISSING}")
            if self._read_only:
                return connection
            self._use_wal(connection)
            connection.execute("PRAGMA synchronous = FULL")  # A power cut loses no COMMIT.
            connection.execute("PRAGMA fullfsync = ON")  # On macOS, fsync stops short of the disk.
            connection.execute(f"PRAGMA cache_size = -{SQLITE_CACHE_KB}")
            connection.execute(f"PRAGMA wal_autocheckpoint = {SQLITE_CHECKPOINT_PAGES}")
            # This write syncs what a killed process left in the log without a sync. From now on
            # that can be read, and be answered to whoever sends its key again.
            connection.execute(f"PRAGMA application_id = {SQLITE_APPLICATION_ID}")
            _, minor, patch = sqlite3.sqlite_version_info
            fixed = SQLITE_WAL_RESET_FIXES.get(minor, 0 if minor > 51 else math.inf)
            if self.path and patch < fixed:
                ((self._data_version,),) = connection.execute("PRAGMA data_version").fetchall()
        except BaseException:
            connection.close()
            raise
        return connection

    def _use_wal(self, connection: sqlite3.Connection) -> None:
        """Turn the write-ahead log on. SQLite does not wait here for another process itself."""
        deadline = time.monotonic() + DATABASE_TIMEOUT_S
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(random.uniform(0, RETRY_PAUSE_MAX_S))

    def connect(self) -> sqlite3.Connection:
        """Return a new connection to the file."""
        # Only `_open_writer` makes the file: one that was removed must not come back empty.
        mode = f"ro&immutable={self._immutable:d}" if self._read_only else "rw"
        database = f"{Path(self.path).as_uri()}?mode={mode}" if self.path else ":memory:"
        connection = sqlite3.connect(database, uri=True, timeout=DATABASE_TIMEOUT_S,
                                     isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA foreign_keys = ON")
        if self._alone:  # From its first read on, this connection alone has the file.
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        return connection


class _SQLiteTx(_Tx):
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __call__(self, sql: str, *parameters: str | int | None) -> list[_Row]:
        # All rows are fetched at once: a RETURNING that is not read to its end blocks COMMIT.
        return self._connection.execute(sql, parameters).fetchall()

    def many(self, sql: str, rows: Sequence[_Row]) -> None:
        self._connection.executemany(sql, rows)


@dataclass(eq=False)
class _Write:
    """A write that stands in line, and what became of it."""

    function: _Each
    item: Any = None
    size: int = 1
    outcome: Any = None
    done: bool = False
    thread_id: int = field(default_factory=threading.get_ident)
    turn: threading.Lock = field(default_factory=threading.Lock)  # Free once its thread may go on.

    def __post_init__(self) -> None:
        self.turn.acquire()

    @property
    def error(self) -> Exception | None:
        return self.outcome if isinstance(self.outcome, Exception) else None


W = TypeVar("W", bound=_Write)


class _Line(Generic[W]):
    """Writes that stand in line. Whoever finds nobody at work leads, and works for others too.

    Those that make one entry go together, and larger ones, up to BATCH_MAX entries, and these two
    take turns: so none waits for more than one that is large.
    """

    def __init__(self, work: Callable[[list[W]], None]) -> None:
        self._work, self._process_id = work, os.getpid()
        self.lock = threading.Lock()
        self._quiet = threading.Condition(self.lock)  # Told when nobody leads.
        self.waiting: list[W] = []
        self._taken: list[W] = []
        self.leader: W | None = None  # Whose thread works at the moment.
        self._was_large = self.is_closed = False

    @_waiting()
    def stand(self, write: W) -> Any:
        """Wait until the write is done. Return its outcome, or raise it if it is an error."""
        try:
            with self.lock:
                self.check_usable()
                if self.leader and self.leader.thread_id == write.thread_id:
                    raise RuntimeError(
                        "a write, or in memory a read, inside a write would wait for itself")
                self.waiting.append(write)
                if self.leader is None:
                    self._appoint_leader()
            write.turn.acquire()  # Until another has done it, or leaves it to this one.
            if self.leader is write:
                with self.lock:
                    self.check_usable()
                    self._take(write)
                self._work(self._taken)
        except BaseException:  # Closed, or interrupted: a write that nobody has begun is dropped.
            with self.lock:
                self.waiting = [other for other in self.waiting if other is not write]
            raise
        finally:
            try:
                self._hand_over(write)
            finally:  # That may have been interrupted too.
                self._hand_over(write)
        if write.error or not write.done:  # The leader may have been interrupted.
            raise write.error or OutcomeUnknown()
        return write.outcome

    def close(self) -> threading.Lock:
        """Begin nothing more. Wait DATABASE_TIMEOUT_S for what is begun. Return the lock."""
        with self.lock:
            self.is_closed = True
            self._quiet.wait_for(lambda: self.leader is None, timeout=DATABASE_TIMEOUT_S)
        return self.lock

    def check_usable(self) -> None:
        if self.is_closed or os.getpid() != self._process_id:
            crossed = "No connection can cross a fork: open the wallet after it."
            raise Unavailable("This wallet is closed." if self.is_closed else crossed,
                              reason="closed")

    def _take(self, leader: W) -> None:
        """Take what is like the leader's write out of the line. The lock is held."""
        self._was_large, entries, taken, left = leader.size > 1, 0, list[W](), list[W]()
        for write in self.waiting:
            if (write.size > 1) is self._was_large and entries + write.size <= BATCH_MAX:
                taken.append(write)
                entries += write.size
            else:
                left.append(write)
        self._taken, self.waiting = taken, left

    def _hand_over(self, write: W) -> None:
        """If this write led, let those whose writes are done go on, and another one lead."""
        if self.leader is write:
            with self.lock:
                for other in self._taken:
                    if other is not write and other.turn.locked():
                        other.turn.release()
                self._taken = []
                self._appoint_leader()

    def _appoint_leader(self) -> None:
        """Let the first in line work next, of those whose turn it is. The lock is held."""
        turns = [write for write in self.waiting if (write.size > 1) is not self._was_large]
        self.leader = next(iter(turns or self.waiting), None)
        if self.leader:
            self.leader.turn.release()
        else:
            self._quiet.notify_all()


def _identify(path: str) -> tuple[int, ...]:
    """Return a file's device and inode, and what changes when it is written to."""
    found = os.stat(path)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _unavailable(reason: object) -> Unavailable:
    return Unavailable(f"Nothing was changed, so try again. ({reason})")


# HTTP #############################################################################################

# Of Bottle only the router is used: App makes every answer, in one place. A handler gets the
# wallet, the account that calls (None for the issuer), and by name what the route takes.
#
# Who may do what: an account calls `_routes`, with its token. Where there is an issuer, its token
# calls `_issuer_routes`, which have the account in their path. `access` names the exceptions:
# "public" needs no token, "issuer" the issuer's, if there is one, "both" takes either, and "money",
# by which money comes in, is an account's only without an issuer.
_routes, _issuer_routes = Bottle(), Bottle()
BATCH_PATH, STATEMENT_END = "/api/transactions/batch", "/transactions.csv"
TRANSACTION_PATH = "/api/transactions/<transaction_id:re:txn_[0-9A-Za-z]{16}_[0-9]+>"
HOLD_PATH = "/api/holds/<hold_id:re:hld_[0-9A-Za-z]{16}_[0-9]+>"
ACCOUNT_PATH = "/api/accounts/<account_id:re:acc_[0-9A-Za-z]{16}>"


class _Response(NamedTuple):
    """What a route returns. All but bytes, and an iterator of them, is sent as JSON."""

    status: int
    body: object
    headers: Mapping[str, str] = {}
    reason: str = ""  # For which it was refused.


_Handler = Callable[..., _Response]


def _route(path: str, method: str = "GET", **takes: Any) -> Callable[[_Handler], _Handler]:
    """Route a request twice: of an account for itself, and of the issuer for any account."""

    def route(handle: _Handler) -> _Handler:
        _routes.route(path, method, **takes)(handle)
        tail = path.removeprefix("/api").removeprefix("/account")
        _issuer_routes.route(ACCOUNT_PATH + tail, method, **takes | {"access": "issuer"})(handle)
        return handle

    return route


@_routes.post("/api/register", body=partial(_parse_fields, NAME), access="issuer")
def _post_register(wallet: Wallet, caller: None, name: str) -> _Response:
    """Make an account. No other answer ever shows its token."""
    account, token = wallet.register(name)
    return _Response(201, {**_to_json(account), "token": token})


@_route("/api/account")
def _get_account(wallet: Wallet, caller: Account | None, account_id: str) -> _Response:
    return _Response(200, caller or wallet.account(account_id))


@_route("/api/account/balance", query=("at",))
def _get_balance(wallet: Wallet, caller: Account | None, account_id: str,
                 at: str = "") -> _Response:
    return _Response(200, _to_balance(wallet, caller or wallet.account(account_id), at))


@_route("/api/account/token", "POST", body=partial(_parse_fields, {}), body_optional=True,
        token=True)
def _post_token(wallet: Wallet, caller: Account | None, account_id: str,
                token: str | None = None) -> _Response:
    """Replace the token. No other answer ever shows the new one."""
    new_token = wallet.replace_token(account_id, token)
    return _Response(201, {**_to_json(caller or wallet.account(account_id)), "token": new_token})


def _call(method: str, status: int = 200, **more: Any) -> _Handler:
    """Return what answers with a method of the wallet. A page links to the next (RFC 8288)."""

    def handle(wallet: Wallet, caller: object, **arguments: Any) -> _Response:
        found = getattr(wallet, method)(**arguments, **more)
        if isinstance(found, (Page, HoldPage, AccountPage)):
            name = "after" if "after" in arguments else "cursor"
            following = {**arguments, name: found.next_cursor}
            following.pop("account_id", None)
            link = {"Link": f'<?{urlencode(following)}>; rel="next"'} if found.next_cursor else {}
            return _Response(200, found._asdict(), link)
        is_batch = isinstance(found, list)
        replayed = getattr(found[0] if is_batch else found, "replayed", False)
        return _Response(status, {"transactions": found} if is_batch else found,
                         {"Idempotent-Replayed": "true"} if replayed else {})

    return handle


def _route_post(path: str, method: str, rules: _Rules, **takes: Any) -> None:
    _route(path, "POST", body=partial(_parse_fields, rules), key=True, **takes)(_call(method, 201))


def _route_get(path: str, method: str, *query: str) -> None:
    _route(path, query=query)(_call(method))


_route_post("/api/transactions/topup", "topup", MOVEMENT, access="money")
_route_post("/api/transactions/charge", "charge", MOVEMENT)
_route_post("/api/transactions/transfer", "transfer", TRANSFER)
_route_post(f"{TRANSACTION_PATH}/refund", "refund", PART, body_optional=True, access="money")
_route_post("/api/holds", "hold", HOLD)
_route_post(f"{HOLD_PATH}/capture", "capture", PART, body_optional=True)
_route_post(f"{HOLD_PATH}/release", "release", {}, body_optional=True)
_route_get("/api/transactions", "transactions",
           "limit", "cursor", "after", "type", "since", "until")
_route_get(TRANSACTION_PATH, "transaction")
_route_get("/api/holds", "holds", "limit", "cursor", "status")
_route_get(HOLD_PATH, "get_hold")
_routes.post(BATCH_PATH, body=partial(_parse_fields, TRANSACTIONS), key=True, access="both",
             body_bytes_max=BATCH_BODY_BYTES_MAX)(_call("batch", 201))
_issuer_routes.get("/api/accounts", access="issuer",
                   query=("limit", "cursor", "name", "since", "until"))(_call("account_page"))
_issuer_routes.get("/api/overview", access="issuer")(_call("overview"))
for _path, _frozen in (("/freeze", True), ("/unfreeze", False)):
    _issuer_routes.post(ACCOUNT_PATH + _path, access="issuer", body=partial(_parse_fields, {}),
                        body_optional=True)(_call("freeze", frozen=_frozen))


@_route(f"/api{STATEMENT_END}", query=("type", "since", "until"))
def _get_statement(wallet: Wallet, caller: object, **arguments: Any) -> _Response:
    part = _import_part("statements")
    chunks = part.take_turn(part.to_csv(wallet, **arguments))
    next(chunks)
    return _Response(200, chunks, part.HEADERS)


@_routes.get("/livez", access="public")
def _get_livez(wallet: Wallet, caller: None) -> _Response:
    return _Response(200, {"status": "ok"})


@_routes.get("/readyz", access="public")
def _get_readyz(wallet: Wallet, caller: None) -> _Response:
    wallet.database.ping()
    return _Response(200, {"status": "ok"})


def _route_file(path: str, name: str, media_type: str = "") -> None:
    @_routes.get(path, access="public")
    def serve(wallet: Wallet, caller: None) -> _Response:
        content = _read_file(name)
        if media_type:
            return _Response(200, content, {"Content-Type": media_type})
        page: _Response = _import_part("cors").make_page(content)
        return page


# As text, browsers show it. What is application/yaml they save.
_route_file("/openapi.yaml", "openapi.yaml", "text/plain; charset=utf-8")
_route_file("/openapi.json", "openapi.json", "application/json")
_route_file("/docs", "docs.html")
_route_file("/", "wallet.html")


def _to_json(record: object) -> dict[str, Any]:
    return {name: _format_time(value) if isinstance(value, datetime) else value
            for name, value in vars(record).items() if name != "replayed"}


def _to_balance(wallet: Wallet, account: Account, at: str) -> dict[str, Any]:
    names = "id", "name", "currency", "currency_digits"
    return {name: getattr(account, name) for name in names} | {
        "balance": wallet.balance_at(account.id, at), "at": _format_time(_as_time(_parse_time(at)))}


def _format_time(moment: datetime) -> str:
    """Return a time in UTC, ending in Z (RFC 3339)."""
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _error_response(error: WalletError) -> _Response:
    """Return a problem document (RFC 9457)."""
    body = {"title": error.title, "status": error.status, "detail": str(error), "code": error.code,
            **error.members}
    headers = {"Content-Type": "application/problem+json", **error.headers}
    return _Response(error.status, body, headers, error.reason)


def _read_file(name: str) -> bytes:
    """Return a file that lies beside this module. Raises NotFound if it is not installed."""
    try:
        return (Path(__file__).parent / name).read_bytes()
    except FileNotFoundError:
        raise NotFound(f"{name} is not installed beside wallet.py.") from None


def _check_files(*names: str) -> None:
    """Warn of files that are not installed beside this module: something will not work."""
    for name in names:
        if not Path(__file__).with_name(name).exists():
            logger.warning("%s is not installed beside wallet.py, and something needs it", name)


def _parse_authorization(header: str) -> str:
    """Return what is sent as a bearer token (RFC 6750, section 2.1). Raises Unauthorized."""
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthorized()
    return token.lstrip(" ")


def _parse_query(text: str, names: Sequence[str]) -> dict[str, str]:
    """Return the parameters. Raises MalformedRequest, also if one is unknown or comes twice."""
    try:
        pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=True, errors="strict")
    except ValueError:
        raise MalformedRequest("The query string is malformed.") from None
    query = dict(pairs)
    if len(query) < len(pairs) or query.keys() - set(names):
        known = f"takes, once each: {', '.join(names)}" if names else "takes no parameters"
        raise MalformedRequest(
            f"The query has an unknown parameter, or one twice; this route {known}.")
    return query


def _parse_body(environ: WSGIEnvironment, takes: Mapping[str, Any]) -> dict[str, object]:
    """Return the body, a JSON object, or an empty one where it may be left out.

    Raises UnsupportedMediaType, BodyTooLarge, MalformedRequest.
    """
    bytes_max = takes.get("body_bytes_max", BODY_BYTES_MAX)
    length = environ.get("CONTENT_LENGTH") or ""
    is_missing = length in ("", "0") and "HTTP_TRANSFER_ENCODING" not in environ
    if is_missing and takes.get("body_optional"):
        return {}
    coding = environ.get("HTTP_CONTENT_ENCODING", "identity").strip().lower()
    if coding != "identity":
        raise UnsupportedMediaType("The body must not be compressed: send it without"
                                   " Content-Encoding.", headers={"Accept-Encoding": "identity"})
    media_type = environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType()
    # Without a length, only some servers mark where the body ends. From others, to read is to wait
    # for ever.
    unknown_length = bytes_max + 1 if environ.get("wsgi.input_terminated") else 0
    try:
        wanted = min(int(length or unknown_length), bytes_max + 1)
        body = environ["wsgi.input"].read(max(0, wanted))
        if len(body) > bytes_max:
            raise BodyTooLarge()
        if body.startswith(codecs.BOM_UTF8):  # Which JSON must not have (RFC 8259, section 8.1).
            raise MalformedRequest("The body begins with a byte order mark: send it without.")
        text = body.decode()
        brackets = text.count("[") + text.count("{")
        if brackets > JSON_DEPTH_MAX and _json_depth(text) > JSON_DEPTH_MAX:
            raise MalformedRequest(f"The body is nested too deeply: more than {JSON_DEPTH_MAX}"
                                   " arrays and objects.")
        document = _JSON.decode(text)
    except ValueError as error:
        raise MalformedRequest(f"The body is not valid JSON: {error}.") from None
    if not isinstance(document, dict):
        raise MalformedRequest("The body must be a JSON object.")
    return document


def _json_depth(text: str) -> int:
    """Return how deep arrays and objects are nested in JSON, up to where it is none."""
    strings = r'"[^"\\]*(?:\\.[^"\\]*)*"?'
    brackets = re.sub(strings + r'|[^]["{}]+', "", text, flags=re.DOTALL)
    steps = map({"[": 1, "{": 1, "]": -1, "}": -1}.__getitem__, brackets)
    return max(accumulate(steps), default=0)


def _refuse_duplicate_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(fields := dict(pairs)) < len(pairs):
        raise ValueError("an object has the same key twice")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


# An integer of more than 20 digits is out of every rule, and stays so when it is cut. To read all
# of it is slow, and from 4,300 digits on an error.
_JSON = json.JSONDecoder(object_pairs_hook=_refuse_duplicate_keys, parse_constant=_refuse_constant,
                         parse_int=lambda digits: int(digits[:20]))


# In the environ: the error with which the server refuses the request, and when that was complete;
# and what App notes for the log and the metrics.
REFUSAL, RECEIVED = "wallet.refusal", "wallet.received"
ROUTE, CALLER = "wallet.route", "wallet.caller"
_is_host = re.compile(r"[\w.~!$&'()*+;=%:[\]-]+", re.ASCII).fullmatch  # Two have a comma.
_is_request_id = re.compile("[A-Za-z0-9._-]{1,100}").fullmatch
NO_ROUTE = ("There is no such route. /openapi.yaml lists all, and without an issuer there are none"
            " below /api/accounts.")
# Routes that are asked all day, and the ends of an open page's.
QUIET = "/livez", "/readyz", "/metrics"
POLLED = "/account", "/accounts", ACCOUNT_PATH, "/transactions", "/holds", "/overview"


class App:
    """The WSGI application. Every answer is made here, whatever happens."""

    def __init__(self, wallet: Wallet, issuer_token: str | None = None, metrics: bool = False,
                 trusted_proxy: str | None = None, cors_origins: Sequence[str] = ()) -> None:
        _check_files("docs.html", "openapi.json", "openapi.yaml", "wallet.html")
        self.wallet, self.routes = wallet, Bottle()
        self.stopping = False  # Whoever serves it sets this, and then /readyz says so.
        self.has_issuer = issuer_token is not None
        self.routes.merge(_routes)
        if issuer_token is not None:
            _import_part("overview").check_issuer_token(issuer_token)
            _import_part("overview").keep_out_of_logs(issuer_token)
            self._issuer_token_hash = _hash_token(issuer_token)
            self.routes.merge(_issuer_routes)
        self._proxy = (None if trusted_proxy is None
                       else _import_part("proxies").Proxy(trusted_proxy))
        self._cors = _import_part("cors").Cors(cors_origins) if cors_origins else None
        self.metrics = _import_part("metrics").Metrics(wallet.database) if metrics else None
        if self.metrics:
            self.routes.get("/metrics", access="public")(self.metrics.get)
        self.routes.get("/api/wallet", access="public")(self._get_wallet)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        started = environ.get(RECEIVED) or time.monotonic()
        method, path = environ["REQUEST_METHOD"], environ.setdefault("PATH_INFO", "")
        request_id = _make_request_id(environ.get("HTTP_X_REQUEST_ID", ""))
        try:
            answer = self._dispatch(environ)
        except WalletError as error:
            if error.status >= 500:
                logger.error("request %s: %s", request_id, error)
            answer = _error_response(error)
        except Exception:
            _log_fault(request_id)
            answer = _error_response(InternalError())
        cors = self._cors.headers(environ) if self._cors else {}
        status, headers, body = _render(answer, request_id, cors)
        duration_s, route = time.monotonic() - started, environ.get(ROUTE, "")
        is_poll = "HTTP_X_POLLING" in environ and method != "POST"
        is_quiet = route in QUIET or (is_poll and route.endswith(POLLED))
        level = logging.DEBUG if is_quiet and answer.status < 400 else logging.INFO
        if access_logger.isEnabledFor(level):
            caller, client = environ.get(CALLER), environ.get("REMOTE_ADDR", "")
            if not isinstance(caller, Account) and answer.status in (401, 500, 503):
                caller = None  # It is only what the token says, and maybe nobody has looked it up.
            # Where IPv6 is listened to, an address of IPv4 looks like one, and others have a zone.
            client = client.removeprefix("::ffff:").partition("%")[0]
            if self._proxy:
                client = self._proxy.find_client(client, environ.get("HTTP_X_FORWARDED_FOR", ""))
            # Never a query or a body, nor a token that somebody put into the path.
            fields = (_loggable(method)[:20], _loggable(path)[:200], answer.status,
                      round(duration_s * 1000, 1), request_id, getattr(caller, "id", caller),
                      client)
            shown = ["-" if value in (None, "") else value for value in fields]
            access_logger.log(level, "%s %s %s %s ms %s %s %s", *shown,
                              extra=dict(zip(REQUEST_FIELDS, fields, strict=True)))
        if self.metrics:
            self.metrics.count(route, method, answer, duration_s)
        start_response(status, headers)
        return [] if method == "HEAD" else body

    def _get_wallet(self, wallet: Wallet, caller: None) -> _Response:
        return _Response(200, {"currency": wallet.currency, "has_issuer": self.has_issuer,
                               "currency_digits": wallet.currency_digits})

    def count_refusal(self, reason: str) -> None:
        """Count what was refused before it was a request."""
        if self.metrics:
            self.metrics.count_refusal(None, reason)

    def _dispatch(self, environ: WSGIEnvironment) -> _Response:
        if refusal := environ.get(REFUSAL):
            raise refusal
        host = environ.get("HTTP_HOST", "")
        if not host and environ.get("SERVER_PROTOCOL") == "HTTP/1.1":  # RFC 9112, section 3.2
            raise MalformedRequest("HTTP/1.1 needs the header Host.")
        if host and not _is_host(host):
            raise MalformedRequest("The header Host must be one name or address, and may have a"
                                   " port.")
        if "\n" in environ["PATH_INFO"]:  # Which a pattern's end would match.
            raise NotFound(NO_ROUTE)
        try:
            route, arguments = self.routes.match(environ)
        except HTTPError as error:
            if error.status_code != 405:
                raise NotFound(NO_ROUTE) from None
            allow = error.headers["Allow"].replace(",", ", ").replace("GET", "GET, HEAD")
            answer: _Response | None = self._cors and self._cors.preflight(environ, allow)
            if answer:
                return answer
            raise MethodNotAllowed(f"This route takes {allow}.", headers={"Allow": allow}) from None
        takes, environ[ROUTE] = route.config, route.rule
        if self.stopping and route.rule == "/readyz":  # No error, so it is not logged as one.
            return _error_response(Unavailable("The wallet is about to stop: ask another one."))
        caller = environ[CALLER] = self._authenticate(environ, takes, arguments)
        arguments["caller"] = caller
        if caller:
            arguments["account_id"] = getattr(caller, "id", caller)
        try:
            arguments |= self._parse(environ, takes, caller)
            response: _Response = route.callback(self.wallet, **arguments)
        except WalletError as error:
            if caller and takes.get("key") and error.status < 500:
                # Who has no valid token is told this, and nothing else.
                self.wallet.authenticate(arguments["token"])
            raise
        return response

    def _parse(self, environ: WSGIEnvironment, takes: Mapping[str, Any],
               caller: Account | str | None) -> dict[str, Any]:
        """Return what the route takes from the query, the key's header and the body."""
        query = environ.get("QUERY_STRING", "")
        arguments = _parse_query(query, takes.get("query", ())) if query else {}
        if takes.get("key") and "HTTP_IDEMPOTENCY_KEY" in environ:
            key = _parse_key(environ["HTTP_IDEMPOTENCY_KEY"].replace("§", "\0"))
            # The issuer's keys are its own: no account can take them before it.
            arguments["key"] = key if caller else _reserve_key(f"issuer {key}")
        if "body" in takes:
            arguments |= takes["body"](_parse_body(environ, takes))
            if takes.get("access") == "both" and caller and self.has_issuer:
                _import_part("overview").refuse_topups(arguments["transactions"])
        return arguments

    def _authenticate(self, environ: WSGIEnvironment, takes: Mapping[str, Any],
                      arguments: dict[str, Any]) -> Account | str | None:
        """Return whose token was sent: None if it is the issuer's, or none is needed.

        Else that is an account. Where money moves it is only its id, and the token goes into the
        arguments: it is checked in the transaction that moves the money.
        """
        access = takes.get("access")
        if access == "public" or (access == "issuer" and not self.has_issuer):
            return None
        token = _parse_authorization(environ.get("HTTP_AUTHORIZATION", ""))
        if self.has_issuer:
            if secrets.compare_digest(_hash_token(token), self._issuer_token_hash):
                if access in ("issuer", "both"):
                    return None
                raise Forbidden("This route needs the token of an account, and this is the"
                                " issuer's, whose routes are /api/accounts/{id} and below.")
            if access in ("issuer", "money"):
                self.wallet.authenticate(token)
                raise Forbidden("This wallet has an issuer, and this route needs its token.")
        if takes.get("key") or takes.get("token"):
            arguments["token"] = token
        return _parse_token(token) if takes.get("key") else self.wallet.authenticate(token)


def _make_request_id(sent: str) -> str:
    """Return the client's request id if it is fit for a header and a log, and has no token."""
    if (_is_request_id(sent) and "wlt_" not in sent
            and not any(token in sent for token in _hidden)):
        return sent
    return f"{random.getrandbits(64):016x}"


def _render(answer: _Response, request_id: str, cors: Mapping[str, str],
            ) -> tuple[str, list[tuple[str, str]], Iterable[bytes]]:
    """Return the status line, the headers and the body, with all that every answer carries."""
    headers = {"Content-Type": "application/json", "X-Request-Id": request_id, **SECURITY_HEADERS,
               **answer.headers, **cors}
    body: Any = answer.body
    if isinstance(body, dict) and "transactions" in body:
        # For each record of many, the encoder would be slow to ask what it is.
        body = {**body, "transactions": [*map(_to_json, body["transactions"])]}
    if not isinstance(body, Iterator):
        document = body if isinstance(body, bytes) else _encode(body).encode() + b"\n"
        headers["Content-Length"], body = str(len(document)), [document]
    return f"{answer.status} {REASONS[answer.status]}", list(headers.items()), body


_encode = json.JSONEncoder(ensure_ascii=False, check_circular=False, default=_to_json).encode


# A record of a request has these as attributes, for formatters of your own.
REQUEST_FIELDS = (
    "method", "path", "status", "duration_ms", "request_id", "account_id", "client")


def _log_fault(request_id: str) -> None:
    """Log the exception that is handled, without tokens, whoever formats it."""
    record = logger.makeRecord(logger.name, logging.ERROR, __file__, 0, "request %s failed",
                               (request_id,), sys.exc_info())
    record.exc_text = _hide_tokens(traceback.format_exc().rstrip())
    logger.handle(record)


def _loggable(text: str) -> str:
    """Return text without tokens, and without what could look like another line."""
    return re.sub("[^ -~]", "?", _hide_tokens(text))


_hidden: list[str] = []  # The issuers' tokens of this process: they may hold anything.


def _hide_tokens(text: str) -> str:
    """Return text without what is or could be most of a token."""
    for token in _hidden:
        text = text.replace(token, "***")
    return re.sub("wlt_[0-9A-Za-z]+|[0-9A-Za-z._~+-]{32,}", "***", text)


def create_app(wallet: Wallet | None = None, issuer_token: str | None = None,
               metrics: bool = False, trusted_proxy: str | None = None,
               cors_origins: Sequence[str] | None = None) -> App:
    """Return the WSGI application of a wallet, or of what the environment's WALLET_... name.

    With `issuer_token`, only who sends that makes and fills accounts. With `metrics`, it answers
    GET /metrics. `trusted_proxy` is the IP address whose X-Forwarded-For tells the log where
    requests come from. Pages of `cors_origins` may use it from a browser. Raises
    ConfigurationError.
    """
    if wallet is None:
        command_line = _import_part("cli")
        settings = command_line.load_settings()
        wallet, metrics = command_line.open_served(settings), metrics or settings["metrics"]
        issuer_token = settings["issuer-token"] if issuer_token is None else issuer_token
        trusted_proxy = settings["trusted-proxy"] if trusted_proxy is None else trusted_proxy
        cors_origins = settings["cors-origin"] if cors_origins is None else cors_origins
    return App(wallet, issuer_token, metrics, trusted_proxy, cors_origins or ())


def connect(url: str, token: str | None = None, *, timeout_s: float = 30.0) -> Wallet:
    """Return a wallet that is served elsewhere, for the account, or the issuer, of a token.

    Each call ends within `timeout_s`. Raises ConfigurationError, Unauthorized.
    """
    wallet: Wallet = _import_part("client").RemoteWallet(url, token, timeout_s)
    return wallet


@contextmanager
def running(wallet: Wallet | None = None, issuer_token: str | None = None) -> Iterator[str]:
    """Serve a wallet, a new one in memory if none is given, on a free port. Yield its URL."""
    with ExitStack() as opened:
        wallet = wallet or opened.enter_context(Wallet())
        app = create_app(wallet, issuer_token)
        yield opened.enter_context(_import_part("server").serving(app))


if __name__ == "__main__":  # As a script this module has no other name, and it is loaded once.
    sys.modules["wallet"] = sys.modules[__name__]
    from wallet_cli import main

    sys.exit(main())
