"""Makes a wallet's tables, or brings those of an older version to this one.

wallet.py loads this for the first wallet that is opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from wallet import (
    LONG_TIMEOUT_S,
    MIGRATIONS,
    MISSING,
    SCHEMA_VERSION,
    ConfigurationError,
    NotReady,
    Unavailable,
    Wallet,
    _Execute,
    _read_file,
    _Row,
)


def parse_currency(text: str) -> tuple[str, int | None]:
    """Return a currency's code and how many decimals it has, None where nobody says so.

    Raises ConfigurationError.
    """
    from iso4217 import Currency  # Slow to import, and seldom needed.

    match = re.fullmatch("([A-Z]{3})(?:/([0-9]))?", text)
    if not match:
        raise ConfigurationError("the currency must be three capital letters, such as USD, or a"
                                 " unit of your own with its number of decimals, such as CRD/0")
    code, said, known = match[1], int(match[2]) if match[2] else None, None
    with suppress(ValueError):
        known = Currency(code).exponent  # Gold has none.
    if None not in (said, known) and said != known:
        raise ConfigurationError(
            f"{code} has {known} decimals in ISO 4217: a unit of your own needs another code")
    return code, known if said is None else said


def prepare(wallet: Wallet, unit: tuple[str, int | None] | None, create: bool,
            migrations: range) -> tuple[str, int]:
    """Make the tables, or bring those of an older version to this one. Return the currency.

    The row of `wallet` comes last: where it is, all is. So where it is, nothing is made.
    """
    rows = _try_read(wallet, "schema_version, currency", "wallet")
    if not rows:
        wallet._read("SELECT 1")  # Raises Unavailable where something else is wrong.
        if not create:
            raise NotReady(f"there is no wallet in {wallet.database.location}{MISSING}")
        _make_tables(wallet, *unit or ("USD", 2))
        wallet.created = True
        rows = wallet._read("SELECT schema_version FROM wallet")
    ((version, *_),) = rows
    wallet.opened_version = version
    while version in migrations:
        version = wallet.database.write(
            partial(migrate, wallet.database.adapt), LONG_TIMEOUT_S)
    if version != SCHEMA_VERSION:
        advice = ("use a newer wallet" if version > SCHEMA_VERSION
                  else "bring it there by the command migrate, or use an older one")
        raise ConfigurationError(f"the database has schema version {version}, and this wallet"
                                 f" has {SCHEMA_VERSION}: {advice}")
    ((code, digits),) = wallet._read("SELECT currency, currency_digits FROM wallet")
    if unit and unit not in ((code, digits), (code, None)):
        raise ConfigurationError(f"the database's currency is {code}/{digits}, and cannot be"
                                 f" changed to {unit[0]}/{unit[1]}")
    return code, digits


def _make_tables(wallet: Wallet, code: str, digits: int | None) -> None:
    for table, column in (("wallet", "currency"), ("accounts", "token_hash"),
                          ("transactions", "fingerprint")):
        if (_try_read(wallet, "1", table) is not None
                and _try_read(wallet, column, table) is None):
            raise ConfigurationError(
                f"the table {table} in {wallet.database.location} is another program's:"
                " name another database, or another schema as the search_path")
    if digits is None:
        raise ConfigurationError(
            f"{code} is not in ISO 4217: say how many decimals it has, as with {code}/0")
    for statement in read_sql("schema.sql"):
        wallet._change(wallet.database.adapt(statement))
    wallet._change("INSERT INTO wallet VALUES (1, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
                SCHEMA_VERSION, code, digits)


def _try_read(wallet: Wallet, columns: str, table: str) -> list[_Row] | None:
    """Return a row of a table, or None if there is no such table or column."""
    try:
        return wallet._read(f"SELECT {columns} FROM {table} LIMIT 1")
    except Unavailable as error:
        if "malformed" in str(error):
            raise
        return None


def migrate(adapt: Callable[[str], str], tx: _Execute) -> int:
    """Make the tables those of the next version, unless another process has. Return the version."""
    ((version,),) = tx(
        "UPDATE wallet SET schema_version = schema_version RETURNING schema_version")
    if version not in MIGRATIONS:
        return int(version)
    for statement in read_sql(f"migrations/{version}.sql"):
        tx(adapt(statement))
    tx("UPDATE wallet SET schema_version = ?", version + 1)
    return int(version) + 1


def read_sql(name: str) -> list[str]:
    """Return the statements of a file. No semicolon stands anywhere but at their ends."""
    return _read_file(name).decode().rstrip("; \n").split(";")
