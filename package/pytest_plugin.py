"""Fixtures for tests of programs that use a wallet. Installing the package is all that it takes.

`wallet` is a new wallet in memory, and `wallet_url` the URL of that wallet, served over HTTP. The
wallet is imported when a test first asks for one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from wallet import Wallet


@pytest.fixture
def wallet() -> Iterator[Wallet]:
    """A new wallet in memory, which is gone after the test."""
    from wallet import Wallet

    with Wallet() as made:
        yield made


@pytest.fixture
def wallet_url(wallet: Wallet) -> Iterator[str]:
    """The URL of the wallet of this test, on a free port of this machine."""
    from wallet import running

    with running(wallet) as url:
        yield url
