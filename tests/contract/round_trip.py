"""A round trip with the client that openapi-python-client makes of the contract.

It is run with the address of a wallet, and of one of a later version: see tests/test_contract.py.
"""

import sys
from datetime import timedelta

from wallet_client.api.accounts import get_account, get_balance, register
from wallet_client.api.holds import capture, hold, list_holds
from wallet_client.api.service import get_contract_as_json
from wallet_client.api.transactions import charge, list_transactions, topup
from wallet_client.models import (
    Account,
    HoldStatus,
    Movement,
    NewHold,
    NewMetadata,
    Part,
    Problem,
    RegisteredAccount,
    Registration,
    Transaction,
    TransactionType,
)

from wallet_client import AuthenticatedClient, Client


def go_round(url: str) -> None:
    made = register.sync(client=Client(url), body=Registration(name="Ada"))
    assert isinstance(made, RegisteredAccount)
    client = AuthenticatedClient(url, token=made.token)

    order = Movement(amount=1250, description="Order 17")
    first, again = (
        topup.sync_detailed(client=client, body=order, idempotency_key="order-17") for _ in "12")
    assert isinstance(first.parsed, Transaction)
    assert first.parsed == again.parsed
    assert ("Idempotent-Replayed" in first.headers, again.headers["Idempotent-Replayed"]) == (
        False, "true")

    shop = NewMetadata.from_dict({"shop": "12"})
    spent = charge.sync(client=client, body=Movement(amount=250, metadata=shop))
    assert isinstance(spent, Transaction)
    assert (spent.type_, spent.balance, spent.description) == ("charge", 1000, None)
    assert spent.metadata.to_dict() == {"shop": "12"}

    refused = charge.sync_detailed(client=client, body=Movement(amount=2000))
    assert isinstance(refused.parsed, Problem)
    assert (refused.status_code, refused.parsed.code) == (402, "insufficient_funds")
    assert (refused.parsed.available, refused.parsed.required) == (1000, 2000)

    seen, cursor = [], {}
    while page := list_transactions.sync(client=client, limit=1, **cursor):
        seen += page.transactions
        if page.next_cursor is None:
            break
        cursor = {"cursor": page.next_cursor}
    assert [one.id for one in seen] == [spent.id, first.parsed.id]
    topups = list_transactions.sync(client=client, type_=TransactionType.TOPUP)
    assert [one.id for one in topups.transactions] == [first.parsed.id]
    since = list_transactions.sync(client=client, since=seen[0].created_at)
    assert spent.id in [one.id for one in since.transactions]

    held = hold.sync(client=client, body=NewHold(amount=400, expires_in_s=60))
    active = list_holds.sync(client=client, status=HoldStatus.ACTIVE)
    assert [one.id for one in active.holds] == [held.id]
    assert get_account.sync(client=client).holds_active == 1
    captured = capture.sync(held.id, client=client, body=Part(amount=300))
    assert (captured.type_, captured.reference, captured.balance) == ("charge", held.id, 700)

    account = get_account.sync(client=client)
    assert isinstance(account, Account)
    assert (account.balance, account.available, account.holds_active) == (700, 700, 0)
    then = get_balance.sync(client=client, at=spent.created_at - timedelta(days=1))
    assert then.balance == 0
    assert get_contract_as_json.sync(client=client).openapi.startswith("3.")


def read_later_version(url: str) -> None:
    """Read members, values and a code that came after this client was made."""
    made = register.sync(client=Client(url), body=Registration(name="Ada"))
    client = AuthenticatedClient(url, token=made.token)
    new = topup.sync(client=client, body=Movement(amount=5, description="of a later version"))
    assert (new.type_, new.additional_properties["since_then"]) == ("interest", {"a": [1]})
    held = hold.sync(client=client, body=NewHold(amount=1, description="of a later version"))
    assert held.status == "pending"
    page = list_transactions.sync(client=client)
    assert [one.type_ for one in page.transactions] == ["interest"]
    refused = charge.sync_detailed(client=client, body=Movement(amount=10**9))
    assert (refused.status_code, refused.parsed.code) == (402, "spending_limit_exceeded")


go_round(sys.argv[1])
go_round(sys.argv[2])
read_later_version(sys.argv[2])
print("went round")
