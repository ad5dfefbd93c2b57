"""pytest fixtures of an installed wallet: `wallet`, in memory, and `wallet_url`, served over HTTP.

This file is installed as the module `_wallet_pytest`, outside the package `wallet`. pytest imports
its plugins before anything else. If this one were in the package, each run of pytest would import
the wallet, even where no test uses it. And where a project has a wallet.py of its own, pytest would
not start, or its tests would get the installed wallet. So `wallet` is imported when a test asks for
a fixture: the same module that the test itself would import.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from wallet import Wallet


@pytest.fixture
def wallet() -> Iterator[Wallet]:
    """A new wallet in memory. It is closed after the test."""
    from wallet import Wallet

    with Wallet() as opened:
        yield opened


@pytest.fixture
def wallet_url(wallet: Wallet) -> Iterator[str]:
    """The URL of a server on a free port of this machine. It serves the fixture `wallet`."""
    from wallet import running

    with running(wallet) as url:
        yield url
