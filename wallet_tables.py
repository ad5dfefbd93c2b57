"""Brings the tables of an older version to this one, and knows the currencies of new ones.

wallet.py loads this where one of these is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from wallet import (
    LONG_TIMEOUT_S,
    MIGRATIONS,
    SCHEMA_VERSION,
    ConfigurationError,
    Wallet,
    _Execute,
    _read_sql,
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


def migrate(wallet: Wallet, versions: range) -> None:
    """Bring the tables to this version, one transaction a step. Raises ConfigurationError."""
    version = wallet.opened_version
    while version in versions:
        version = wallet.database.write(partial(make_step, wallet.database.adapt), LONG_TIMEOUT_S)
    if version != SCHEMA_VERSION:
        advice = ("use a newer wallet" if version > SCHEMA_VERSION
                  else "bring it there by the command migrate, or use an older one")
        raise ConfigurationError(f"the database has schema version {version}, and this wallet"
                                 f" has {SCHEMA_VERSION}: {advice}")


def make_step(adapt: Callable[[str], str], tx: _Execute) -> int:
    """Make the tables those of the next version, unless another process has. Return the version."""
    ((version,),) = tx(
        "UPDATE wallet SET schema_version = schema_version RETURNING schema_version")
    if version not in MIGRATIONS:
        return int(version)
    for statement in _read_sql(f"migrations/{version}.sql"):
        tx(adapt(statement))
    tx("UPDATE wallet SET schema_version = ?", version + 1)
    return int(version) + 1
