"""How a program embeds a wallet."""

from wsgiref.types import WSGIApplication

from wallet import (
    AMOUNT_MAX,
    Account,
    Hold,
    HoldPage,
    HoldStatus,
    InsufficientFunds,
    Page,
    Transaction,
    TransactionType,
    Wallet,
    WalletError,
    create_app,
    running,
)


def buy(wallet: Wallet, account: Account, price: int) -> Transaction | None:
    try:
        return wallet.charge(account.id, price, "a book", key="order-17", metadata={"order": "17"})
    except InsufficientFunds as error:
        print(error.balance, error.available, error.required, error.code, error.status)
    except WalletError as error:
        print(error, error.members)
    return None


def main() -> None:
    with Wallet() as wallet:
        account, token = wallet.register("Ada")
        wallet.topup(account.id, min(1250, AMOUNT_MAX), token=token)
        bought = buy(wallet, account, 250)
        assert bought is not None
        kind: TransactionType = bought.type
        wallet.refund(account.id, bought.id, 50, key="refund-17")
        held: Hold = wallet.hold(account.id, 100, expires_in_s=60)
        status: HoldStatus = held.status
        wallet.capture(account.id, held.id, 40)
        wallet.release(account.id, wallet.hold(account.id, 5).id)
        other, _ = wallet.register("Bob")
        wallet.transfer(account.id, other.id, 10)
        wallet.batch([{"type": "topup", "amount": 5}], account_id=account.id)
        page: Page = wallet.transactions(account.id, limit=10, type="charge")
        holds: HoldPage = wallet.holds(account.id)
        for transaction in wallet.statement(account.id, since="2026-01-01T00:00:00Z"):
            print(transaction.amount, kind, status, len(page.transactions), len(holds.holds))
        print(wallet.verify(), wallet.balance_at(account.id, bought.created_at))
        app: WSGIApplication = create_app(wallet)
        print(app)
        with running(wallet) as url:
            print(url)


if __name__ == "__main__":
    main()
