"""Writes statements for spreadsheets, as CSV (RFC 4180). wallet.py loads this for the first one."""

from __future__ import annotations

import csv
import io
import json
import re
import threading
from collections.abc import Iterable, Iterator
from itertools import islice

from wallet import STATEMENT_ROWS, STATEMENTS_MAX, Transaction, Unavailable, Wallet, _to_json

COLUMNS = ("id", "created_at", "type", "amount", "balance", "description", "reference", "metadata",
           "currency", "currency_digits")
HEADERS = {"Content-Type": "text/csv; charset=utf-8",
           "Content-Disposition": 'attachment; filename="transactions.csv"'}
statements = threading.BoundedSemaphore(STATEMENTS_MAX)


def too_many_statements() -> Unavailable:
    """Return the error of who asks for one statement more than STATEMENTS_MAX."""
    return Unavailable("Enough statements are being sent already, so try again.",
                       reason="statements")


def take_turn(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield nothing once there is room for one more long answer, and then its chunks."""
    if not statements.acquire(blocking=False):
        raise too_many_statements()
    try:
        yield b""
        yield from chunks
    finally:
        statements.release()


def to_csv(wallet: Wallet, transactions: Iterator[Transaction]) -> Iterator[bytes]:
    """Yield transactions as CSV, some lines at a time.

    The last line counts them: without that, it was broken off.
    """
    unit, count = {name: getattr(wallet, name) for name in COLUMNS[-2:]}, 0
    yield _to_lines([COLUMNS])
    while found := list(islice(transactions, STATEMENT_ROWS)):
        count += len(found)
        rows = (_to_json(one) | unit for one in found)
        yield _to_lines([row[column] for column in COLUMNS] for row in rows)
    yield _to_lines([[f"transactions in this statement: {count}", *[""] * (len(COLUMNS) - 1)]])


def _to_lines(rows: Iterable[Iterable[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(map(_as_cell, row) for row in rows)
    return text.getvalue().encode()


def _as_cell(value: object) -> object:
    """Return a value of which no spreadsheet makes a formula.

    An apostrophe goes before what a formula begins with, where a cell begins: also behind a
    semicolon, which separates cells in countries that have a decimal comma.
    See https://owasp.org/www-community/attacks/CSV_Injection.
    """
    if isinstance(value, dict):
        value = json.dumps(value, ensure_ascii=False) if value else None
    formula = r"(^|;)(?=[\s\"]*[-=+@\uff0d\uff1d\uff0b\uff20])"
    return re.sub(formula, r"\1'", value) if isinstance(value, str) else value
