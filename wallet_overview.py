"""What an issuer needs besides: a fit token, topups that are its own, all accounts, their overview.

wallet.py loads this for the first of these.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from urllib.parse import unquote
from weakref import WeakKeyDictionary

import wallet
from wallet import (
    ACCOUNT,
    NAME_CHARACTERS_MAX,
    SEQUENCE_MAX,
    Account,
    AccountNotFound,
    AccountTransaction,
    ConfigurationError,
    Forbidden,
    Hour,
    MalformedRequest,
    Overview,
    Unavailable,
    Wallet,
    _as_time,
    _as_transaction,
    _as_us,
    _Execute,
    _hidden,
    _now_us,
    _parse_time,
    _Row,
    _text,
    _waiting,
)

ISSUER_TOKEN_CHARACTERS_MIN = 32  # Nobody guesses as many.
HIDDEN_CHARACTERS_MIN = 8  # A part of a token with fewer tells little, and may be any word.
HOURS, HOUR_US = 24, 3_600_000_000
NEWEST = 20  # A screen.
OVERVIEWS_MAX = 3  # Calls at once, of which one reads: most threads of a server stay free.
# After each, nothing is read for three times as long as it took, or for DATABASE_TIMEOUT_S. So
# whoever asks without end takes a quarter of the time of one connection, and leaves SQLite the
# moments without a reader in which its log begins anew: without them, that grew to a gigabyte.
REST = 3
REST_WAIT_MAX_S = 1.0  # Who would have to wait longer for its end is sent away.

# All of it is one statement, since that sees one moment. Of a number that is to be added up, the
# upper and the lower bits are added up by themselves: SQLite's sum fails above 2^63. What is
# held has the holds that are past their time taken off, as `available` of an account has.
LOW_BITS = 26
SUM = (f"CAST(coalesce(sum({{0}} >> {LOW_BITS}), 0) AS BIGINT),"
       f" CAST(coalesce(sum({{0}} & {2**LOW_BITS - 1}), 0) AS BIGINT)")
BALANCES, ALL_HELD, AMOUNTS = (SUM.format(column) for column in ("balance", "held", "amount"))
BEGINS = ", ".join(["(?)"] * HOURS)
IS_MOVEMENT = "type NOT IN ('hold', 'release')"  # The index by time is found by these very words.
OVERVIEW = f"""
    WITH hours (since) AS (VALUES {BEGINS})
    SELECT * FROM (
        SELECT 'newest' AS part, t.created_at, sequence, account_id, amount, t.balance, 0, 0,
            name, type, description, metadata, reference
        FROM transactions t JOIN accounts ON id = account_id WHERE {IS_MOVEMENT}
        ORDER BY t.created_at DESC, sequence DESC, account_id DESC LIMIT {NEWEST}) AS newest
    UNION ALL
    SELECT 'hour', since, (
        SELECT count(*) FROM transactions
        WHERE created_at >= since AND created_at < since + {HOUR_US} AND {IS_MOVEMENT}),
        NULL, 0, 0, 0, 0, NULL, NULL, NULL, NULL, NULL FROM hours
    UNION ALL
    SELECT 'sums', count(*), coalesce(sum(frozen), 0), NULL, {BALANCES}, {ALL_HELD},
        NULL, NULL, NULL, NULL, NULL FROM accounts
    UNION ALL
    SELECT 'expired', 0, 0, NULL, 0, 0, {AMOUNTS}, NULL, NULL, NULL, NULL, NULL
    FROM holds WHERE status = 'active' AND expires_at <= ?"""


ACCOUNTS = f"""
    {ACCOUNT} WHERE created_at >= ? AND (created_at, id) < (?, ?)
        AND length(replace(lower(name COLLATE "C"), ?, '')) <= length(name) - ?
    ORDER BY created_at DESC, id DESC LIMIT ?"""


def refuse_topups(transactions: object) -> None:
    """Raise Forbidden, with its index, for a topup in a batch that is not the issuer's."""
    for index, one in enumerate(transactions if isinstance(transactions, list) else ()):
        if isinstance(one, dict) and one.get("type") == "topup":
            raise Forbidden("This wallet has an issuer, and a topup needs its token.", index=index)


def list_accounts(
        asked: Wallet, rows_max: int, cursor: str | None, *, name: str | None = None,
        since: str | datetime | None = None, until: str | datetime | None = None,
        ) -> Iterator[Account]:
    """Return the accounts within all filters, read `rows_max` at a time."""
    try:
        part = _text(NAME_CHARACTERS_MAX)(name or "").encode().lower().decode()  # A to Z.
    except ValueError as error:
        raise MalformedRequest(f"name {error}.") from None
    since_us = -SEQUENCE_MAX if since is None else _parse_time(since)
    below = (SEQUENCE_MAX if until is None else _parse_time(until), "")
    if cursor is not None:
        try:
            last = asked.account(cursor)
        except AccountNotFound:
            raise MalformedRequest("cursor must be one of an earlier page.") from None
        below = min(below, (_as_us(last.created_at), last.id))

    sql = asked.database.adapt(ACCOUNTS)

    def accounts(below: tuple[int, str]) -> Iterator[Account]:
        while True:
            now_us = _now_us()
            rows = asked._read(
                sql, now_us, now_us, since_us, *below, part, len(part), rows_max)
            yield from (asked._as_account(*row) for _, *row in rows)
            if len(rows) < rows_max:
                return
            below = rows[-1][-1], rows[-1][1]

    return accounts(below)


class _Line:
    """Those who ask at once. One reads at a time, and who waits meanwhile shares the next answer.

    That one is begun after all who share it have asked, so that nobody misses what was done before.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.asking = 0
        self.is_reading, self.rests_until = False, 0.0
        self.begun = self.answered = 0  # Each that is read has a number.
        self.answer: Overview | None = None

    @_waiting()
    def ask(self, asked: Wallet) -> Overview:
        """Return an overview that is begun from now on. Raises Unavailable."""
        with self.changed:
            if self.asking >= OVERVIEWS_MAX:
                raise _busy(1)
            self.asking += 1
        try:
            with self.changed:
                earlier = self.begun
                self.changed.wait_for(lambda: self._answer_after(earlier) or not self.is_reading,
                                      wallet.DATABASE_TIMEOUT_S)
                if answer := self._answer_after(earlier):
                    return answer
                rest_s = self.rests_until - time.monotonic()
                if self.is_reading or rest_s > REST_WAIT_MAX_S:
                    raise _busy(max(1, rest_s))
                self.is_reading = True
            return self._take_turn(asked, rest_s)
        finally:
            with self.changed:
                self.asking -= 1

    def _answer_after(self, earlier: int) -> Overview | None:
        return self.answer if self.answered > earlier else None

    def _take_turn(self, asked: Wallet, rest_s: float) -> Overview:
        started, answer = time.monotonic(), None
        try:
            time.sleep(max(0, rest_s))
            started, self.begun = time.monotonic(), self.begun + 1
            answer = asked.database.read(lambda tx: _read(asked, tx))
            return answer
        finally:
            with self.changed:
                if answer:
                    self.answer, self.answered = answer, self.begun
                now = time.monotonic()
                self.rests_until = now + min(REST * (now - started), wallet.DATABASE_TIMEOUT_S)
                self.is_reading = False
                self.changed.notify_all()


_lines: WeakKeyDictionary[Wallet, _Line] = WeakKeyDictionary()


def read(asked: Wallet) -> Overview:
    """Return the overview of a wallet. Raises Unavailable, also while too many others ask."""
    return _lines.setdefault(asked, _Line()).ask(asked)


def _busy(wait_s: float) -> Unavailable:
    return Unavailable("Enough overviews are being made already, so try again.",
                       reason="overviews", headers={"Retry-After": str(math.ceil(wait_s))})


def _read(asked: Wallet, tx: _Execute) -> Overview:
    now_us = _now_us()
    last_us = now_us - now_us % HOUR_US
    begins = range(last_us - (HOURS - 1) * HOUR_US, last_us + 1, HOUR_US)
    parts: dict[str, list[_Row]] = {"newest": []}
    for part, *row in sorted(tx(OVERVIEW, *begins, now_us)):  # They come in any order.
        parts.setdefault(part, []).append(tuple(row))
    ((accounts, frozen, _, high, low, held_high, held_low, *_),) = parts["sums"]
    ((*_, over_high, over_low, _, _, _, _, _),) = parts["expired"]
    return Overview(
        asked.currency, asked.currency_digits, accounts, frozen,
        balance=_join(high, low), held=_join(held_high - over_high, held_low - over_low),
        hours=tuple(Hour(_as_time(since_us), count) for since_us, count, *_ in parts["hour"]),
        newest=tuple(_as_movement(*row) for row in reversed(parts["newest"])))


def _join(high: int, low: int) -> int:
    """Return a sum of which SUM has made two."""
    return (high << LOW_BITS) + low


def _as_movement(created_at_us: int, sequence: int, account_id: str, amount: int, balance: int,
                 _: int, __: int, name: str, type: str, *texts: str | None) -> AccountTransaction:
    row = (sequence, type, amount, balance, *texts, created_at_us)
    return AccountTransaction(
        **vars(_as_transaction(account_id, row)), account_id=account_id, account_name=name)


def check_issuer_token(token: str | None) -> None:
    """Raise ConfigurationError, without showing it, for a token that is too short or unsendable."""
    inner = f"[ -~]{{{ISSUER_TOKEN_CHARACTERS_MIN - 2},}}"
    if token is not None and not re.fullmatch(f"(?!wlt_)[!-~]{inner}[!-~]", token):
        raise ConfigurationError(
            f"WALLET_ISSUER_TOKEN must have at least {ISSUER_TOKEN_CHARACTERS_MIN} characters,"
            " printable ASCII with no space at its ends, and not begin with wlt_, as an account's"
            " does. Make one with: openssl rand -hex 32")


def keep_out_of_logs(token: str) -> None:
    """Hide a token as it is sent, and as a path and a traceback have it."""
    forms = {token, unquote(token, "latin-1"), repr(token)[1:-1]}
    path = re.split("[?#]", token)[0]  # Where a query begins, a path ends.
    if len(path) >= HIDDEN_CHARACTERS_MIN:
        forms |= {path, unquote(path, "latin-1")}
    _hidden.extend(forms.difference(_hidden))
