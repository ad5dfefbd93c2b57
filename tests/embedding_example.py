"""A program that embeds a wallet and uses every public name of it.

test_packaging.py runs it against an installed wallet, and asks mypy --strict what it thinks of it.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING
from wsgiref.util import setup_testing_defaults

import wallet as wallet_module
from wallet import (
    AMOUNT_MAX,
    Account,
    AccountFrozen,
    AccountNotFound,
    AccountPage,
    AccountTransaction,
    App,
    BalanceLimitExceeded,
    BodyTooLarge,
    ConfigurationError,
    CursorBeyondEnd,
    Forbidden,
    HeadersTooLarge,
    Hold,
    HoldNotActive,
    HoldPage,
    HoldStatus,
    Hour,
    IdempotencyKeyReused,
    InsufficientFunds,
    InternalError,
    MalformedRequest,
    MethodNotAllowed,
    NotFound,
    NotReady,
    NotRefundable,
    OutcomeUnknown,
    Overview,
    Page,
    RefundExceedsCharge,
    Transaction,
    TransactionType,
    Unauthorized,
    Unavailable,
    UnsupportedMediaType,
    ValidationFailed,
    Wallet,
    WalletError,
    WrongBooks,
    __version__,
    connect,
    create_app,
    running,
)

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

WORDS: dict[TransactionType, str] = {
    "topup": "paid in", "charge": "spent", "refund": "got back", "transfer_in": "received",
    "transfer_out": "sent",
}
COLOURS: dict[HoldStatus, str] = {
    "active": "blue", "captured": "green", "released": "grey", "expired": "red"}
NEVER_HERE: tuple[type[WalletError], ...] = (
    BodyTooLarge, Forbidden, HeadersTooLarge, InternalError, MethodNotAllowed,
    UnsupportedMediaType)


def explain(error: WalletError) -> str:
    """Return what to tell a customer."""
    if isinstance(error, InsufficientFunds):
        missing: int = error.required - error.available
        return f"{missing} is missing of a balance of {error.balance}"
    if isinstance(error, BalanceLimitExceeded):
        room: int | None = None if error.balance is None else AMOUNT_MAX - error.balance
        return f"there is room for {room}"
    if isinstance(error, RefundExceedsCharge):
        return f"{error.refundable} can be refunded"
    if isinstance(error, CursorBeyondEnd):
        return "a backup was restored: begin again"
    if isinstance(error, HoldNotActive):
        return f"the hold is {error.hold_status}"
    if isinstance(error, ValidationFailed):
        return ", ".join(f"{one['pointer']} {one['detail']}" for one in error.errors)
    if isinstance(error, OutcomeUnknown):
        return "send it again"
    if isinstance(error, Unavailable):
        return f"later, please: {dict(error.headers)}"
    if isinstance(error, NEVER_HERE):
        return "only over HTTP"
    status: int = error.status
    return f"{status} {error.code}: {error.title} {error} {sorted(error.members)}"


def spend(wallet: Wallet) -> tuple[Account, str]:
    """Use every method that moves or holds money."""
    account, token = wallet.register("Ada")
    other, _ = wallet.register("Bob")
    paid: Transaction = wallet.topup(account.id, 1250, "gift", key="order-17")
    again = wallet.topup(account.id, 1250, "gift", key="order-17")
    assert (again, again.replayed, paid.replayed) == (paid, True, False)
    charge = wallet.charge(account.id, 500, metadata={"order": "17"}, token=token)
    refund = wallet.refund(account.id, charge.id, 100)
    sent = wallet.transfer(account.id, other.id, 50, "lunch")
    assert (refund.reference, sent.reference, sent.balance) == (charge.id, other.id, 800)
    hold: Hold = wallet.hold(account.id, 300, expires_in_s=60)
    captured: Transaction = wallet.capture(account.id, hold.id, 200)
    ended: Hold = wallet.release(account.id, wallet.hold(account.id, 10).id)
    made: list[Transaction] = wallet.batch(
        [{"account": account.id, "type": "topup", "amount": 1},
         {"account": other.id, "type": "charge", "amount": 1, "description": "tea"}])
    assert [one.amount for one in (*made, captured)] == [1, 1, 200]
    assert COLOURS[ended.status] == "grey"
    assert COLOURS[wallet.get_hold(account.id, hold.id).status] == "green"
    return wallet.account(account.id), token


def read(wallet: Wallet, account: Account, token: str) -> str:
    """Use every method that reads, and those that keep accounts."""
    assert wallet.authenticate(token) == account
    page: Page = wallet.transactions(account.id, limit=2)
    older: Page = wallet.transactions(account.id, limit=2, cursor=page.next_cursor)
    charges = wallet.transactions(account.id, after="0", type="charge").transactions
    kinds = [WORDS[one.type] for one in (*page.transactions, *older.transactions)]
    assert kinds == ["paid in", "spent", "sent", "got back"]
    assert [one.amount for one in charges] == [500, 200]
    assert wallet.transaction(account.id, charges[0].id) == charges[0]
    an_hour_ago: datetime = account.created_at - timedelta(hours=1)
    lines: Iterator[Transaction] = wallet.statement(account.id, since=an_hour_ago)
    assert sum(1 for _ in lines) == 6
    assert wallet.balance_at(account.id, datetime.now(timezone.utc)) == account.balance == 601
    feed: Iterator[Transaction] = wallet.follow(account.id, "0", poll_s=0.1)
    assert [next(feed).amount for _ in range(2)] == [1250, 500]
    holds: HoldPage = wallet.holds(account.id)
    assert [one.captured for one in holds.holds] == [0, 200]
    assert [one.captured for one in wallet.holds(account.id, status="captured").holds] == [200]
    assert {one.name for one in wallet.accounts()} == {"Ada", "Bob"}
    named: AccountPage = wallet.account_page(limit=1, name="A", since=an_hour_ago)
    assert (named.accounts, named.next_cursor, account.holds_active) == ([account], None, 0)
    overview: Overview = wallet.overview()
    hour: Hour = overview.hours[-1]
    newest: AccountTransaction = overview.newest[0]
    assert (overview.accounts, overview.balance, overview.held) == (2, 650, 0)
    assert hour.transactions > 0
    assert (newest.account_name, newest.balance) == ("Bob", 49)
    assert wallet.freeze(account.id).frozen
    assert not wallet.freeze(account.id, False).frozen
    assert wallet.currency == "USD"
    return wallet.replace_token(account.id, token)


def refusals(wallet: Wallet, account: Account) -> Iterator[str]:
    """Yield what is said when something is refused."""
    try:
        wallet.charge(account.id, 5000)
    except InsufficientFunds as error:
        yield explain(error)
    try:
        wallet.topup(account.id, AMOUNT_MAX)
    except BalanceLimitExceeded as error:
        yield explain(error)
    try:
        wallet.topup(account.id, 1, key="order-17")
    except IdempotencyKeyReused as error:
        yield explain(error)
    try:
        wallet.topup("acc_" + "0" * 16, 1)
    except AccountNotFound as error:
        yield explain(error)
    try:
        wallet.refund(account.id, wallet.topup(account.id, 1).id)
    except NotRefundable as error:
        yield explain(error)
    try:
        wallet.holds(account.id, limit=0)
    except MalformedRequest as error:
        yield explain(error)
    try:
        wallet.authenticate("wlt_")
    except Unauthorized as error:
        yield explain(error)
    try:
        Wallet("sqlite:////nowhere/wallet.db")
    except WrongBooks:
        raise
    except NotReady as error:  # Its disk may be mounted later.
        yield explain(error)
    except ConfigurationError as error:
        yield explain(error)
    try:
        wallet.freeze(account.id)
        wallet.charge(account.id, 1)
    except (AccountFrozen, NotFound) as error:
        yield explain(error)


class Prefixed:
    """A WSGI application that lends the wallet a folder."""

    def __init__(self, app: WSGIApplication) -> None:
        self.app = app

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        environ["PATH_INFO"] = environ["PATH_INFO"].removeprefix("/money")
        return list(self.app(environ, start_response))


def mount(wallet: Wallet) -> None:
    """Use the wallet as a WSGI application, and over HTTP."""
    app: App = create_app(wallet, issuer_token=None, metrics=False, trusted_proxy=None,
                          cors_origins=["https://shop.example"])  # fmt: skip
    application: WSGIApplication = app
    statuses: list[str] = []

    def start_response(status: str, headers: list[tuple[str, str]],
                       exc_info: object = None, /) -> Callable[[bytes], object]:
        statuses.append(status)
        return len

    environ: WSGIEnvironment = {"PATH_INFO": "/money/readyz"}
    setup_testing_defaults(environ)
    body = Prefixed(application)(environ, start_response)
    assert (statuses, json.loads(b"".join(body))) == (["200 OK"], {"status": "ok"})
    assert app.wallet is wallet
    with running(wallet) as url, urllib.request.urlopen(url + "/livez") as answer:
        assert json.load(answer) == {"status": "ok"}


def demonstrate_from_afar() -> None:
    """Do the same with a wallet that is served elsewhere, as its issuer."""
    issuer_token = "issuer-token-0123456789-abcdefghij"
    with running(issuer_token=issuer_token) as url, connect(url, issuer_token) as wallet:
        account, token = spend(wallet)
        read(wallet, account, token)
        print(*refusals(wallet, account), sep="\n")
    with running() as url, connect(url, timeout_s=5.0) as wallet:
        someone: Account = wallet.register("Ada")[0]
        assert wallet.topup(someone.id, 1).balance == 1


def demonstrate() -> None:
    """Do all of it once."""
    with Wallet(currency="USD", connections=1) as wallet:
        account, token = spend(wallet)
        assert wallet_module.__version__ == __version__
        print(read(wallet, account, token)[:4], __version__)
        mount(wallet)
        print(*refusals(wallet, account), sep="\n")
    demonstrate_from_afar()


if __name__ == "__main__":
    demonstrate()
