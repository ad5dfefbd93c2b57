"""A round trip with the client that openapi-generator makes of the contract: see round_trip.py."""

import sys
from datetime import timedelta

from openapi_client import (
    AccountsApi,
    ApiClient,
    ApiException,
    Configuration,
    HoldsApi,
    Movement,
    NewHold,
    Part,
    Registration,
    TransactionsApi,
)


def connect(url: str) -> ApiClient:
    configuration = Configuration(host=url)
    made = AccountsApi(ApiClient(configuration)).register(Registration(name="Ada"))
    configuration.access_token = made.token
    return ApiClient(configuration)


def refusal(transactions: TransactionsApi, movement: Movement) -> ApiException:
    try:
        transactions.charge(movement)
    except ApiException as error:
        return error
    raise AssertionError


def go_round(url: str) -> None:
    client = connect(url)
    transactions, holds = TransactionsApi(client), HoldsApi(client)
    order = Movement(amount=1250, description="Order 17")
    first, again = (transactions.topup(order, idempotency_key="order-17") for _ in "12")
    assert first == again
    spent = transactions.charge(Movement(amount=250, metadata={"shop": "12"}))
    assert (spent.type, spent.balance, spent.metadata) == ("charge", 1000, {"shop": "12"})
    refused = refusal(transactions, Movement(amount=2000))
    assert (refused.status, refused.data.code) == (402, "insufficient_funds")
    assert (refused.data.available, refused.data.required) == (1000, 2000)
    page = transactions.list_transactions(limit=1)
    page = transactions.list_transactions(limit=1, cursor=page.next_cursor)
    assert ([one.id for one in page.transactions], page.next_cursor) == ([first.id], None)
    held = holds.hold(NewHold(amount=400, expires_in_s=60))
    assert [one.id for one in holds.list_holds(status="active").holds] == [held.id]
    captured = holds.capture(held.id, part=Part(amount=300))
    assert (captured.reference, captured.balance) == (held.id, 700)
    accounts = AccountsApi(client)
    assert accounts.get_account().available == 700
    # It writes an offset without a colon, unless it is told how.
    client.configuration.datetime_format = "%Y-%m-%dT%H:%M:%S.%fZ"
    assert accounts.get_balance(spent.created_at - timedelta(days=1)).balance == 0


def read_later_version(url: str) -> None:
    client = connect(url)
    made = TransactionsApi(client).topup(Movement(amount=5, description="of a later version"))
    assert made.type == "interest"
    held = HoldsApi(client).hold(NewHold(amount=1, description="of a later version"))
    assert held.status == "pending"
    refused = refusal(TransactionsApi(client), Movement(amount=10**9))
    assert (refused.status, refused.data.code) == (402, "spending_limit_exceeded")


go_round(sys.argv[1])
go_round(sys.argv[2])
read_later_version(sys.argv[2])
print("went round")
