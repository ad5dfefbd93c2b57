"""A wallet that another process serves, with the methods of Wallet: `wallet.connect` returns one.

Every call that moves money has a key, the caller's or one made here, and is sent under it again
and again until the wallet has answered it or the time is up. So nothing is done twice, and what is
not known at the end is said to be unknown.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http.client import HTTPResponse
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar
from urllib.parse import urlencode

from urllib3 import BaseHTTPResponse, HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError
from urllib3.util import Timeout, parse_url

from wallet import (
    HOLD,
    INVALID_TOKEN,
    MOVEMENT,
    NAME,
    NAME_CHARACTERS_MAX,
    PAGE_LIMIT_DEFAULT,
    PAGE_LIMIT_MAX,
    PART,
    TRANSFER,
    Account,
    AccountPage,
    AccountTransaction,
    ConfigurationError,
    CursorBeyondEnd,
    Forbidden,
    Hold,
    HoldPage,
    Hour,
    InternalError,
    MalformedRequest,
    NotFound,
    OutcomeUnknown,
    Overview,
    Page,
    Transaction,
    TransactionType,
    Unauthorized,
    Unavailable,
    Wallet,
    WalletError,
    __version__,
    _as_time,
    _format_time,
    _hide_tokens,
    _import_part,
    _make_stamp,
    _parse_account_id,
    _parse_batch,
    _parse_cursor,
    _parse_entry_id,
    _parse_fields,
    _parse_limit,
    _parse_request,
    _parse_time,
    _parse_token,
    _text,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from wallet import HoldStatus, _AccountFilters, _Filters, _Options, _Rules

T = TypeVar("T")

TRIES_MIN = 3  # Within a call's time, however slow each is: by default 10 s, in which a wallet has
# answered or refused whatever waited in its queue.
LAST_TRY_SHARE = 0.1  # Of a call's time, which no pause takes, so that the last one has some.
TIMEOUT_MAX_S = 24 * 3600  # A call that takes longer is a mistake.
PAUSE_S, PAUSE_MAX_S = 0.1, 5.0  # Before the second try, and before any: at random up to these.
CONNECTIONS_KEPT = 1000  # For as many threads at once: half of what one server takes.
PIECE_BYTES = 64 * 1024  # Read at once of an answer.
ANSWER_BYTES_MAX = 16 * 1024 * 1024  # Three times what a page of the longest transactions has.

# The errors that stand for a status, for codes that came after this version.
BY_STATUS: Mapping[int, type[WalletError]] = {
    400: MalformedRequest, 401: Unauthorized, 403: Forbidden, 404: NotFound, 500: InternalError,
    503: Unavailable}
REPEATED = (429, 502, 503, 504)  # That the wallet answers, or a proxy in its form.
SENDER = "wallet-client-"  # What the id of each request begins with.
OWN_TAILS = "", "/balance", "/token"  # Behind /api/account. All others are behind /api.


# What is raised where an answer is none of the wallet's: not JSON, or without what it must have.
NO_ANSWER = (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, RecursionError,
             MalformedRequest)


# One try ##########################################################################################


class _Mark(threading.local):
    """What a thread knows about its request: may a part of it have reached anybody?"""

    is_sent = False


_mark = _Mark()


class _TimedReader(io.RawIOBase):
    """Reads an answer within the socket's timeout as a whole. Python has that for each piece."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase) -> None:
        self._sock, self._raw = sock, raw
        self._until = time.monotonic() + (sock.gettimeout() or 0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if (left_s := self._until - time.monotonic()) <= 0:
            raise TimeoutError("the answer came too slowly")
        self._sock.settimeout(left_s)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _TimedResponse(HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp = io.BufferedReader(_TimedReader(sock, self.fp.detach()))


class _Connection(HTTPConnection):
    """A connection that notes when something is sent. Before that, certainly nothing was done."""

    response_class = _TimedResponse

    def send(self, data: Any) -> None:
        if self.sock is None:
            self.connect()
        _mark.is_sent = True
        super().send(data)


class _SecureConnection(_Connection, HTTPSConnection):
    """The same with TLS, whose handshake comes before anything is sent."""


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


class _Failed(Exception):
    """A try without an answer of the wallet, or with one that says to try again."""

    def __init__(self, reason: str, *, harmless: bool = False, final: bool = False,
                 retry_after: str = "") -> None:
        super().__init__(_hide_tokens(reason))
        self.harmless = harmless  # It is certain that this try had no effect.
        self.final = final  # The next one would end alike.
        self.wait_s = _parse_retry_after(retry_after)


@dataclass(frozen=True)
class _Request(Generic[T]):
    """What is sent, and how a value is made of the answer and of whether it is a repeated one.

    One with a `key` can be repeated, and so can one that `is_repeatable` without it.
    """

    method: str
    path: str
    token: str | None
    make: Callable[[Any, bool], T]
    body: Mapping[str, object] | None = None
    key: str | None = None
    is_repeatable: bool = True

    @property
    def headers(self) -> dict[str, str]:
        headers = {"User-Agent": f"wallet/{__version__}", "Accept": "application/json"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        if self.body is not None:
            headers["Content-Type"] = "application/json"
        if self.key is not None:
            headers["Idempotency-Key"] = self.key
        return headers

    @property
    def content(self) -> bytes | None:
        return None if self.body is None else json.dumps(self.body, ensure_ascii=False).encode()


def _exchange(pool: HTTPConnectionPool, request: _Request[T], limit_s: float) -> T:
    """Send a request once. Return the value of its answer, or raise the error that it tells.

    Raises _Failed where the wallet has not answered it.
    """
    _mark.is_sent = False
    request_id = f"{SENDER}{secrets.token_hex(8)}"
    try:
        answer = pool.urlopen(  # Half of the time to connect, since a name may have two addresses.
            request.method, request.path, request.content,
            {**request.headers, "X-Request-Id": request_id}, retries=False, redirect=False,
            timeout=Timeout(limit_s, limit_s / 2), preload_content=False,
            decode_content=False)  # None was asked for, and one could be a bomb.
        content = _read(answer, request_id)
    except (HTTPError, OSError, ValueError) as error:
        is_final = isinstance(error.args[-1] if error.args else None, ssl.SSLCertVerificationError)
        raise _Failed(f"{error}", harmless=not _mark.is_sent, final=is_final) from error
    if answer.status in (200, 201):
        with suppress(*NO_ANSWER):
            replayed = answer.headers.get("Idempotent-Replayed") == "true"
            return request.make(json.loads(content), replayed)
    if 300 <= answer.status < 400:
        raise _Failed(f"the answer is a redirect ({answer.status}), which no token follows:"
                      " connect to where it leads", final=True)
    raise _as_error(answer, content)


def _read(answer: BaseHTTPResponse, request_id: str) -> bytes:
    """Return the body of an answer, unless that is to another request of such a client.

    Something on the way may send an answer twice, and then each that follows is one too late, or
    mix up two clients. An id of another form is a proxy's, which has put it in the place of ours.
    """
    content = bytearray()
    try:
        answered_id = answer.headers.get("X-Request-Id", "")
        if answered_id.startswith(SENDER) and answered_id != request_id:
            raise HTTPError("the answer is to another request")
        while piece := answer.read(PIECE_BYTES):
            content += piece
            if len(content) > ANSWER_BYTES_MAX:
                raise HTTPError(f"the answer has more than {ANSWER_BYTES_MAX} bytes")
        return bytes(content)
    finally:
        answer.close()  # Where it was read to its end, its connection is another's by now,
        answer.release_conn()  # and else it is closed.


def _as_error(answer: BaseHTTPResponse, content: bytes) -> WalletError | _Failed:
    """Return what a problem document tells (RFC 9457), or _Failed if that is to try again."""
    retry_after = answer.headers.get("Retry-After", "")
    try:
        error = _rebuild(json.loads(content), answer.status)
    except NO_ANSWER:
        return _Failed(f"the answer is not a wallet's: {answer.status} {answer.reason}",
                       retry_after=retry_after)
    if answer.status in REPEATED:
        harmless = answer.status == 429 or (answer.status, error.code) == (503, "unavailable")
        return _Failed(str(error), harmless=harmless, retry_after=retry_after)
    return error


def _rebuild(problem: Any, status: int) -> WalletError:
    """Return the error that a problem document is of. Raises one of NO_ANSWER if it is none."""
    code = str(problem["code"])
    if problem["status"] != status or status < 400:
        raise ValueError("the status is another one")
    known = {kind.code: kind for kind in _all_errors(WalletError)}
    kind = known.get(code) or BY_STATUS.get(status, WalletError)
    error = kind(_hide_tokens(problem["detail"]))
    error.code, error.status, error.title = code, status, str(problem["title"])
    told = {"reason", "self", "members", "key", "title", "status", "detail", "code"}
    # No member takes the place of what every error has.
    return error.add(**{name: value for name, value in problem.items()
                        if name not in told and not hasattr(WalletError, name)})


def _all_errors(kind: type[WalletError]) -> Iterator[type[WalletError]]:
    for one in kind.__subclasses__():
        yield one
        yield from _all_errors(one)


def _parse_retry_after(text: str) -> float:
    """Return how many seconds a Retry-After asks for (RFC 9110, section 10.2.3), 0 if none."""
    if re.fullmatch("[0-9]{1,9}", text, re.ASCII):
        return float(text)
    with suppress(TypeError, ValueError, OverflowError):
        asked = parsedate_to_datetime(text) - datetime.now(timezone.utc)
        return max(0.0, asked.total_seconds())
    return 0.0


# Values ###########################################################################################


def _as_record(kind: type[T], document: Mapping[str, Any], **more: Any) -> T:
    """Return an Account, Transaction or Hold. Members that it does not know are left out."""
    values = {one.name: document[one.name] for one in fields(kind)  # type: ignore[arg-type]
              if one.name in document}
    for name in {"created_at", "expires_at"} & values.keys():
        values[name] = _as_time(_parse_time(values[name]))
    return kind(**values, **more)


def _as_account(document: Any, replayed: bool) -> Account:
    return _as_record(Account, document)


def _as_transaction(document: Any, replayed: bool) -> Transaction:
    return _as_record(Transaction, document, replayed=replayed)


def _as_transactions(document: Any, replayed: bool) -> list[Transaction]:
    return [_as_transaction(one, replayed) for one in document["transactions"]]


def _as_hold(document: Any, replayed: bool) -> Hold:
    return _as_record(Hold, document, replayed=replayed)


def _as_page(document: Any, replayed: bool) -> Page:
    return Page(_as_transactions(document, replayed), document["next_cursor"])


def _as_hold_page(document: Any, replayed: bool) -> HoldPage:
    holds = [_as_hold(one, replayed) for one in document["holds"]]
    return HoldPage(holds, document["next_cursor"])


def _as_account_page(document: Any, replayed: bool) -> AccountPage:
    accounts = [_as_account(one, replayed) for one in document["accounts"]]
    return AccountPage(accounts, document["next_cursor"])


def _as_overview(document: Any, replayed: bool) -> Overview:
    return replace(
        _as_record(Overview, document),
        hours=tuple(Hour(_as_time(_parse_time(one["since"])), int(one["transactions"]))
                    for one in document["hours"]),
        newest=tuple(_as_record(AccountTransaction, one) for one in document["newest"]))


class _Unit(NamedTuple):
    currency: str
    currency_digits: int


def _as_unit(document: Any, replayed: bool) -> _Unit:
    return _Unit(str(document["currency"]), int(document["currency_digits"]))


def _query_time(value: str | datetime | None) -> str | None:
    """Return a time as a query has it. Raises MalformedRequest."""
    if value is None:
        return None
    times = _import_part("times")
    return _format_time(_as_time(min(max(_parse_time(value), times.FIRST_US), times.LAST_US)))


# The wallet #######################################################################################


class RemoteWallet(Wallet):
    """A wallet that is served at `url`. Many threads may call every method.

    Bad arguments are refused here, by the rules of the wallet itself, and nothing is sent then.
    """

    def __init__(self, url: str, token: str | None, timeout_s: float) -> None:
        try:
            parts = parse_url(url)
        except ValueError:
            parts = parse_url("")
        if (parts.scheme not in ("http", "https") or not parts.host or parts.auth or parts.query
                or parts.fragment):
            raise ConfigurationError("the URL of a wallet begins with http:// or https://, names a"
                                     " host, and has no password, query or fragment")
        if not 0 < timeout_s <= TIMEOUT_MAX_S:
            raise ConfigurationError(f"timeout_s must be above 0, and {TIMEOUT_MAX_S} at most")
        self._secure, self._host, self._port = parts.scheme == "https", parts.host, parts.port
        self._prefix, self._timeout_s = (parts.path or "").rstrip("/"), timeout_s
        self._tokens: dict[str, str] = {}  # By the ids of their accounts.
        self._issuer_token: str | None = None
        if token is not None:
            self._take_token(token)
        self._is_closed, self._process_id, self._kept = False, os.getpid(), self._make_pool()

    def _take_token(self, token: str) -> None:
        """Keep a token: one that cannot be an account's is the issuer's. Raises Unauthorized."""
        if isinstance(token, str) and not token.startswith("wlt_"):
            with suppress(ConfigurationError):
                _import_part("overview").check_issuer_token(token)
                _import_part("overview").keep_out_of_logs(token)
                self._issuer_token = token
                return
        self._tokens[_parse_token(token)] = token

    def _remember(self, account_id: str, token: str) -> None:
        if not self._issuer_token:  # Whose own token is sent for every account.
            self._tokens[account_id] = token

    def _make_pool(self) -> HTTPConnectionPool:
        kind = _SecurePool if self._secure else _Pool
        return kind(self._host, self._port, maxsize=CONNECTIONS_KEPT)

    def _pool(self) -> HTTPConnectionPool:
        """Return the connections of this process. Those of its parent must not be shared."""
        if self._process_id != os.getpid():
            self._process_id, self._kept = os.getpid(), self._make_pool()
        return self._kept

    def __getattr__(self, name: str) -> Any:
        """Ask for the currency when it is needed first: to connect needs no server yet."""
        if name not in _Unit._fields:
            raise AttributeError(f"a wallet that is served elsewhere has no {name}")
        unit = self._ask(_Request("GET", "/api/wallet", None, _as_unit))
        self.currency, self.currency_digits = unit
        return getattr(unit, name)

    def close(self) -> None:
        """Close the connections. What runs is finished."""
        self._is_closed = True
        self._pool().close()

    # What is asked, and by whom ###################################################################

    def _route(self, account_id: str, tail: str, token: str | None = None) -> tuple[str, str]:
        """Return the path of what is an account's, and the token to send. Nothing else decides it.

        Raises AccountNotFound, Unauthorized.
        """
        _parse_account_id(account_id)
        if token is not None and _parse_token(token) != account_id:
            raise Unauthorized(headers=INVALID_TOKEN)
        if token is None and self._issuer_token:
            return f"/api/accounts/{account_id}{tail}", self._issuer_token
        token = token or self._tokens.get(account_id)
        if token is None:
            raise Unauthorized(f"The token of {account_id} is not known here: connect with it, give"
                               " it to authenticate, or connect with the issuer's.")
        return ("/api/account" if tail in OWN_TAILS else "/api") + tail, token

    def _need_issuer(self) -> str:
        if not self._issuer_token:
            raise Unauthorized("This needs the token of the issuer: connect with it.")
        return self._issuer_token

    def _get(self, account_id: str, tail: str, make: Callable[[Any, bool], T],
             **query: object) -> T:
        path, token = self._route(account_id, tail)
        return self._ask_page(path, token, make, **query)

    def _ask_page(self, path: str, token: str, make: Callable[[Any, bool], T],
                  **query: object) -> T:
        given = {name: str(value) for name, value in query.items() if value is not None}
        # What is no Unicode is sent all the same, and refused there as it is in process.
        text = urlencode(given, errors="surrogatepass")
        return self._ask(_Request("GET", f"{path}?{text}" if text else path, token, make))

    def _post(self, account_id: str, tail: str, make: Callable[[Any, bool], T],
              body: Mapping[str, object], *, key: str, is_made: bool, token: str | None) -> T:
        path, token = self._route(account_id, tail, token)
        # A key that was made here is new: what it says to be repeated is a try of this very call.
        return self._ask(_Request("POST", path, token, lambda document, replayed:
                                  make(document, replayed and not is_made), body, key))

    def _move_money(self, rules: _Rules, account_id: str, tail: str,
                    make: Callable[[Any, bool], T], *, key: str | None = None,
                    token: str | None = None, **values: Any) -> T:
        body, stamp = _parse_request(rules, account_id, key=key, **values)
        return self._post(account_id, tail, make, body, key=stamp.key, is_made=key is None,
                          token=token)

    def _ask(self, request: _Request[T]) -> T:
        """Send a request until it is answered, or the time is up. Return the value of the answer.

        Raises the error that the answer tells; Unavailable where nothing was done for certain; and
        else OutcomeUnknown.
        """
        if self._is_closed:
            raise Unavailable("This wallet is closed.", reason="closed")
        until = time.monotonic() + self._timeout_s
        in_doubt, tries = False, 0
        while True:
            try:
                return self._try(request, until)
            except _Failed as failed:
                tries, in_doubt = tries + 1, in_doubt or not failed.harmless
                pause_s = random.uniform(0, min(PAUSE_MAX_S, PAUSE_S * 2**min(tries, 9)))
                spare_s = until - time.monotonic() - self._timeout_s * LAST_TRY_SHARE
                pause_s = min(pause_s + failed.wait_s, spare_s)
                is_over = failed.final or self._is_closed or pause_s <= 0
                if is_over or (in_doubt and not request.is_repeatable):
                    raise _give_up(request, failed, in_doubt) from None  # It may have a token.
            except WalletError as error:
                if in_doubt and request.key and isinstance(error, (Forbidden, Unauthorized)):
                    # The key was not even looked up, as where the token was replaced meanwhile.
                    raise _give_up(request, _Failed(str(error)), in_doubt) from error
                if error.status >= 500 and request.key:  # Who knows what was done until then?
                    error.add(key=request.key)
                raise
            time.sleep(pause_s)

    def _try(self, request: _Request[T], until: float) -> T:
        limit_s = min(until - time.monotonic(), self._timeout_s / TRIES_MIN)
        path = replace(request, path=self._prefix + request.path)
        if request.is_repeatable:
            return _exchange(self._pool(), path, limit_s)
        with self._make_pool() as fresh:  # One that was idle may be closed just now, unseen.
            return _exchange(fresh, path, limit_s)

    # Accounts #####################################################################################

    def register(self, name: str) -> tuple[Account, str]:
        """Make an account. It is not tried again once the request may have arrived.

        After an OutcomeUnknown there may be an account without money, whose token nobody has.
        """
        body = _parse_fields(NAME, {"name": name})
        account, token = self._ask(_Request(
            "POST", "/api/register", self._issuer_token, lambda document, _:
            (_as_account(document, False), str(document["token"])), body, is_repeatable=False))
        self._remember(account.id, token)
        return account, token

    def authenticate(self, token: str) -> Account:
        """Return the account that a token opens, and know the token from then on."""
        account_id = _parse_token(token)
        path, token = self._route(account_id, "", token)
        account = self._ask(_Request("GET", path, token, _as_account))
        self._remember(account_id, token)
        return account

    def replace_token(self, account_id: str, token: str | None = None) -> str:
        """Return a new token. It is not tried again once the request may have arrived.

        After an OutcomeUnknown the old token may be dead, and only the issuer can give a new one.
        """
        path, known = self._route(account_id, "/token", token)
        new = self._ask(_Request("POST", path, known, lambda document, _:
                                 str(document["token"]), {}, is_repeatable=False))
        self._remember(account_id, new)
        return new

    def account(self, account_id: str) -> Account:
        return self._get(account_id, "", _as_account)

    def freeze(self, account_id: str, frozen: bool = True) -> Account:
        _parse_account_id(account_id)
        path = f"/api/accounts/{account_id}/{'freeze' if frozen else 'unfreeze'}"
        return self._ask(_Request("POST", path, self._need_issuer(), _as_account, {}))

    def account_page(self, *, limit: int = PAGE_LIMIT_DEFAULT, cursor: str | None = None,
                     **filters: Unpack[_AccountFilters]) -> AccountPage:
        return self._ask_page("/api/accounts", self._need_issuer(), _as_account_page,
                              limit=_parse_limit(limit), cursor=cursor,
                              **_query_accounts(**filters))

    def accounts(self, **filters: Unpack[_AccountFilters]) -> Iterator[Account]:
        """Yield all accounts within the filters, newest first, a page in memory at a time."""
        first = self.account_page(limit=PAGE_LIMIT_MAX, **filters)

        def read(page: AccountPage) -> Iterator[Account]:
            yield from page.accounts
            while cursor := page.next_cursor:
                page = self.account_page(limit=PAGE_LIMIT_MAX, cursor=cursor, **filters)
                yield from page.accounts

        return read(first)

    def overview(self) -> Overview:
        return self._ask(_Request("GET", "/api/overview", self._need_issuer(), _as_overview))

    def balance_at(self, account_id: str, at: str | datetime) -> int:
        return self._get(account_id, "/balance", lambda document, _: int(document["balance"]),
                         at=_query_time(at))

    # Money ########################################################################################

    def topup(self, account_id: str, amount: int, description: str | None = None,
              **options: Unpack[_Options]) -> Transaction:
        return self._move_money(MOVEMENT, account_id, "/transactions/topup", _as_transaction,
                                amount=amount, description=description, **options)

    def charge(self, account_id: str, amount: int, description: str | None = None,
               **options: Unpack[_Options]) -> Transaction:
        return self._move_money(MOVEMENT, account_id, "/transactions/charge", _as_transaction,
                                amount=amount, description=description, **options)

    def transfer(self, account_id: str, to: str, amount: int, description: str | None = None,
                 **options: Unpack[_Options]) -> Transaction:
        return self._move_money(TRANSFER, account_id, "/transactions/transfer", _as_transaction,
                                to=to, amount=amount, description=description, **options)

    def refund(self, account_id: str, transaction_id: str, amount: int | None = None,
               description: str | None = None, **options: Unpack[_Options]) -> Transaction:
        _parse_entry_id("txn", account_id, transaction_id)
        return self._move_money(PART, account_id, f"/transactions/{transaction_id}/refund",
                                _as_transaction, amount=amount, description=description, **options)

    def hold(self, account_id: str, amount: int, description: str | None = None, *,
             expires_in_s: int | None = None, **options: Unpack[_Options]) -> Hold:
        return self._move_money(HOLD, account_id, "/holds", _as_hold, amount=amount,
                                description=description, expires_in_s=expires_in_s, **options)

    def capture(self, account_id: str, hold_id: str, amount: int | None = None,
                description: str | None = None, **options: Unpack[_Options]) -> Transaction:
        _parse_entry_id("hld", account_id, hold_id)
        return self._move_money(PART, account_id, f"/holds/{hold_id}/capture", _as_transaction,
                                amount=amount, description=description, **options)

    def release(self, account_id: str, hold_id: str, *, key: str | None = None,
                token: str | None = None) -> Hold:
        _parse_entry_id("hld", account_id, hold_id)
        return self._move_money({}, account_id, f"/holds/{hold_id}/release", _as_hold, key=key,
                                token=token)

    def batch(self, transactions: Sequence[Mapping[str, object]], *,
              account_id: str | None = None, key: str | None = None,
              token: str | None = None) -> list[Transaction]:
        """Make up to BATCH_MAX topups and charges. Those of several accounts need the issuer."""
        entries = _parse_batch(transactions, account_id)
        stamp, ids = _make_stamp(key, None), {entry.account_id for entry in entries}
        if len(ids) > 1 and not self._issuer_token:
            raise Forbidden("A batch of several accounts needs the token of the issuer.")
        (first, *_) = ids
        _, sent = self._route(first, "/transactions/batch", token)
        movements = [{"type": entry.type, "amount": entry.amount, "metadata": entry.metadata,
                      "description": entry.description} for entry in entries]
        if sent == self._issuer_token:
            movements = [{"account": entry.account_id, **movement}
                         for entry, movement in zip(entries, movements, strict=True)]
        return self._ask(_Request(
            "POST", "/api/transactions/batch", sent, lambda document, replayed:
            _as_transactions(document, replayed and key is not None),
            {"transactions": movements}, stamp.key))

    # History ######################################################################################

    def get_hold(self, account_id: str, hold_id: str) -> Hold:
        _parse_entry_id("hld", account_id, hold_id)
        return self._get(account_id, f"/holds/{hold_id}", _as_hold)

    def holds(self, account_id: str, *, limit: int = PAGE_LIMIT_DEFAULT,
              cursor: str | None = None, status: HoldStatus | None = None) -> HoldPage:
        if cursor is not None:
            _parse_cursor("hld", account_id, cursor)
        return self._get(account_id, "/holds", _as_hold_page, limit=_parse_limit(limit),
                         cursor=cursor, status=status)

    def transaction(self, account_id: str, transaction_id: str) -> Transaction:
        _parse_entry_id("txn", account_id, transaction_id)
        return self._get(account_id, f"/transactions/{transaction_id}", _as_transaction)

    def transactions(self, account_id: str, *, limit: int = PAGE_LIMIT_DEFAULT,
                     cursor: str | None = None, after: str | None = None,
                     **filters: Unpack[_Filters]) -> Page:
        if cursor is not None:
            _parse_cursor("txn", account_id, cursor)
        if after not in (None, "0"):
            _parse_cursor("txn", account_id, str(after))
        return self._get(account_id, "/transactions", _as_page, limit=_parse_limit(limit),
                         cursor=cursor, after=after, **_query_filters(**filters))

    def statement(self, account_id: str, **filters: Unpack[_Filters]) -> Iterator[Transaction]:
        """Return the history as it is now, oldest first, a page of it in memory at a time.

        The newest transaction is looked up now, and where that is read the statement ends.
        """
        newest = self.transactions(account_id, limit=1, **filters).transactions

        def read() -> Iterator[Transaction]:
            after: str | None = "0"
            while after:
                page = self.transactions(account_id, limit=PAGE_LIMIT_MAX, after=after, **filters)
                for one in page.transactions:
                    yield one
                    if one.id == newest[0].id:
                        return
                after = page.next_cursor
            raise CursorBeyondEnd()  # The newest is gone.

        return read() if newest else iter(())


def _query_accounts(name: str | None = None, since: str | datetime | None = None,
                    until: str | datetime | None = None) -> dict[str, str | None]:
    try:
        part = _text(NAME_CHARACTERS_MAX)(name or "")
    except ValueError as error:
        raise MalformedRequest(f"name {error}.") from None
    return {"name": part or None, "since": _query_time(since), "until": _query_time(until)}


def _query_filters(type: TransactionType | None = None, since: str | datetime | None = None,
                   until: str | datetime | None = None) -> dict[str, str | None]:
    return {"type": type, "since": _query_time(since), "until": _query_time(until)}


def _give_up(request: _Request[T], failed: _Failed, in_doubt: bool) -> WalletError:
    """Return the error of a call whose time is up."""
    if request.method == "GET":
        return Unavailable(f"The wallet could not be asked: {failed}")
    if not in_doubt:
        return Unavailable(f"Nothing was done: {failed}")
    if request.key:
        advice = f"Send the same call again with the key {request.key}: it has its effect once."
        return OutcomeUnknown(f"This has an outcome unknown: {failed}. {advice}", key=request.key)
    advice = "Send" if request.is_repeatable else "Look whether it was done before you send"
    return OutcomeUnknown(f"This has an outcome unknown: {failed}. {advice} it again.")
