"""Writes statements, as CSV (RFC 4180), and feeds. wallet.py loads this for the first of them."""

from __future__ import annotations

import csv
import io
import json
import re
import threading
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from wallet import (
    STATEMENT_ROWS,
    STATEMENTS_MAX,
    Transaction,
    Unavailable,
    Wallet,
    _as_time,
    _as_us,
    _Filters,
    _format_time,
    _make_entry_id,
    _Row,
    _waiting,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

COLUMNS = ("id", "created_at", "type", "amount", "balance", "description", "reference", "metadata",
           "currency", "currency_digits")
HEADERS = {"Content-Type": "text/csv; charset=utf-8",
           "Content-Disposition": 'attachment; filename="transactions.csv"'}
MINUTE_US = 60_000_000
_find_formulas = re.compile(r"(^|;)(?=[\s\"]*[-=+@\uff0d\uff1d\uff0b\uff20])").sub
statements = threading.BoundedSemaphore(STATEMENTS_MAX)
_turn = threading.Lock()  # Whose statement goes on.


def too_many_statements() -> Unavailable:
    """Return the error of who asks for one statement more than STATEMENTS_MAX."""
    return Unavailable("Enough statements are being sent already, so try again.",
                       reason="statements")


def take_turn(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield nothing once there is room for one more long answer, and then its chunks.

    One statement at a time makes a chunk, and rests after it for as long as that took of a
    processor. Python runs one thread at a time, and SQLite lets go of it for each row: a thread
    that has only just asked for it loses it again to the next row, and where two statements never
    rest, another client's request comes to its turn by chance, and waits for a second.
    """
    if not statements.acquire(blocking=False):
        raise too_many_statements()
    try:
        yield b""
        while chunk := _make_next(chunks):
            yield chunk
    finally:
        statements.release()


@_waiting()
def _make_next(chunks: Iterator[bytes]) -> bytes:
    with _turn:
        began, began_cpu = time.monotonic(), time.thread_time()
        chunk = next(chunks, b"")
        worked_s = time.thread_time() - began_cpu
        waited_s = time.monotonic() - began - worked_s  # For the database: that is rest too.
        time.sleep(max(0, worked_s - waited_s))
        return chunk


def to_csv(wallet: Wallet, account_id: str, **filters: Unpack[_Filters]) -> Iterator[bytes]:
    """Return a statement as CSV, some lines at a time.

    The last line counts them: without that, it was broken off.
    """
    return write(wallet, account_id, wallet._entries(account_id, STATEMENT_ROWS, **filters))


def write(wallet: Wallet, account_id: str, entries: Iterable[list[_Row]]) -> Iterator[bytes]:
    """Yield entries of an account as CSV, as `_entries` of a wallet has them."""
    unit, count = tuple(getattr(wallet, name) for name in COLUMNS[-2:]), 0
    prefix = _make_entry_id("txn", account_id, 0)[:-1]
    yield _to_lines([COLUMNS])
    for rows in entries:
        if rows:
            count += len(rows)
            # A tuple each, and nothing else, is what makes this fast.
            yield _to_lines(
                (f"{prefix}{sequence}", _to_time(time_us), type, amount, balance,
                 _to_cell(description), _to_cell(reference), _to_cell(_to_text(metadata)), *unit)
                for sequence, type, amount, balance, description, metadata, reference, time_us
                in rows)
    yield _to_lines([[f"transactions in this statement: {count}", *[""] * (len(COLUMNS) - 1)]])


def as_row(one: Transaction) -> _Row:
    """Return a transaction as an entry."""
    return (int(one.id.rpartition("_")[2]), one.type, one.amount, one.balance, one.description,
            json.dumps(one.metadata), one.reference, _as_us(one.created_at))


def _to_lines(rows: Iterable[Iterable[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def _to_time(time_us: int) -> str:
    """Return what _format_time does, with little to do for each of many in a minute."""
    minute, rest_us = divmod(time_us, MINUTE_US)
    seconds = f"{rest_us:08}Z"
    return f"{_to_minute(minute)}{seconds[:2]}.{seconds[2:]}"


@lru_cache(maxsize=1)
def _to_minute(minute: int) -> str:
    return _format_time(_as_time(minute * MINUTE_US))[:-10]


def _to_text(metadata: str | None) -> str | None:
    pairs = json.loads(metadata) if metadata else None
    return json.dumps(pairs, ensure_ascii=False) if pairs else None


def _to_cell(text: str | None) -> str | None:
    """Return a text of which no spreadsheet makes a formula.

    An apostrophe goes before what a formula begins with, where a cell begins: also behind a
    semicolon, which separates cells in countries that have a decimal comma.
    See https://owasp.org/www-community/attacks/CSV_Injection.
    """
    return text and _find_formulas(r"\1'", text)


def feed(wallet: Wallet, account_id: str, after: str, poll_s: float) -> Iterator[Transaction]:
    """Yield for ever what comes behind `after`. Unavailable only delays it."""
    while True:
        found: list[Transaction] = []
        try:
            found = wallet.transactions(account_id, after=after).transactions
        except Unavailable as error:
            if error.reason == "closed":
                raise
        yield from found
        if found:
            after = found[-1].id
        else:
            time.sleep(poll_s)
