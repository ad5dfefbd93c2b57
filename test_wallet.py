"""The promises of wallet.py, each as a test that can fail.

Every test that touches data runs on each database there is, through the `dsn` fixture, and after it
the books are checked: each balance is the sum of its transactions. A safety test carries its
negative control: a careless variant that the same check catches.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import logging
import re
import sqlite3
import threading
import time
import traceback
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from functools import partial
from types import SimpleNamespace
from urllib.parse import quote

import psycopg
import pytest
from hypothesis import strategies as st

import wallet as wallet_module
import wallet_books
import wallet_postgres
import wallet_server
import wallet_statements
from tests.support import (
    ANY_BODY,
    ANY_TEXT,
    BODIES,
    ISSUER_TOKEN,
    OPEN_ROUTES,
    PARSERS,
    README,
    ROUTES,
    WRONG_TOKEN,
    Client,
    check_books,
    check_parser,
    command,
    end_expired,
    fill_with_topups,
    find_secrets,
    like,
    opened_by_several,
    path_of,
    raw_exchange,
    routes_of,
    schema_of,
    send,
    served,
    standby_missing,
    together,
    torture,
    wait_for_lock,
    watch_statements,
)
from wallet import (
    AMOUNT_MAX,
    BODY_BYTES_MAX,
    AccountFrozen,
    AccountNotFound,
    BalanceLimitExceeded,
    ConfigurationError,
    CursorBeyondEnd,
    Forbidden,
    HoldNotActive,
    IdempotencyKeyReused,
    InsufficientFunds,
    MalformedRequest,
    NotFound,
    NotRefundable,
    RefundExceedsCharge,
    Unauthorized,
    Unavailable,
    ValidationFailed,
    Wallet,
    WalletError,
    create_app,
    running,
)

# Promise 1: a balance is never negative, never above the cap, and the sum of its transactions ####


def test_topup_and_charge_move_the_balance_and_are_written_down(wallet, ada):
    topup = wallet.topup(ada.id, 1250, "Order 17")
    charge = wallet.charge(ada.id, 250)
    assert (topup.type, topup.amount, topup.balance, topup.description) == (
        "topup",
        1250,
        1250,
        "Order 17",
    )
    assert (charge.type, charge.amount, charge.balance, charge.description) == (
        "charge",
        250,
        1000,
        None,
    )
    assert wallet.account(ada.id).balance == 1000
    assert wallet.transactions(ada.id).transactions == [charge, topup]
    assert wallet.transaction(ada.id, topup.id) == topup
    assert ada.created_at <= topup.created_at <= charge.created_at <= datetime.now(timezone.utc)


def test_charge_of_the_whole_balance_leaves_zero(wallet, ada):
    wallet.topup(ada.id, 7)
    assert wallet.charge(ada.id, 7).balance == 0


def test_charge_beyond_balance_is_refused_and_changes_nothing(wallet, ada):
    topup = wallet.topup(ada.id, 7)
    with pytest.raises(InsufficientFunds, match=r"The balance is 7, and this needs 8\.") as refusal:
        wallet.charge(ada.id, 8)
    assert (refusal.value.balance, refusal.value.required) == (7, 8)
    assert wallet.transactions(ada.id).transactions == [topup]
    assert wallet.account(ada.id).balance == 7


def test_refused_charge_answers_402_with_balance_and_required(api):
    api.send("POST", "/api/transactions/topup", {"amount": 7})
    answer = api.send("POST", "/api/transactions/charge", {"amount": 8}, status=402)
    assert answer.json == {
        "title": "The balance is too low.",
        "status": 402,
        "detail": "The balance is 7, and this needs 8.",
        "code": "insufficient_funds",
        "balance": 7,
        "available": 7,
        "required": 8,
    }


def test_topup_reaches_the_cap_and_not_above(wallet, ada):
    assert wallet.topup(ada.id, AMOUNT_MAX).balance == AMOUNT_MAX
    with pytest.raises(BalanceLimitExceeded) as refusal:
        wallet.topup(ada.id, 1)
    assert refusal.value.balance == AMOUNT_MAX
    assert wallet.charge(ada.id, AMOUNT_MAX).balance == 0


@pytest.mark.parametrize(
    "careless",
    [
        "UPDATE accounts SET balance = -1",
        "UPDATE accounts SET balance = 9007199254740992",
        "UPDATE transactions SET amount = 0",
        "UPDATE transactions SET balance = -1",
        "UPDATE transactions SET type = 'gift'",
        "UPDATE transactions SET idempotency_key = 'same'",
        "UPDATE transactions SET account_id = 'acc_nobody'",
        "INSERT INTO transactions SELECT * FROM transactions",
        "INSERT INTO wallet VALUES (2, 1, 'EUR', 2)",
        "UPDATE wallet SET currency_digits = -1",
        "UPDATE wallet SET currency_digits = 10",
    ],
)
def test_the_tables_refuse_what_would_break_a_promise(wallet, ada, careless):
    wallet.topup(ada.id, 5)
    wallet.topup(ada.id, 5)
    with pytest.raises((sqlite3.IntegrityError, psycopg.IntegrityError)):
        wallet.database.write(lambda tx: tx(careless))
    assert wallet.account(ada.id).balance == 10


class CarelessWallet(Wallet):
    """Reads the balance, and writes what it makes of it: how money is made and lost elsewhere."""

    everyone_has_read = threading.Barrier(64)

    def charge(self, account_id, amount, description=None, *, metadata=None, key=None):
        balance = self.account(account_id).balance
        self.everyone_has_read.wait(timeout=30)
        if balance < amount:
            raise InsufficientFunds(balance=balance, required=amount)
        self.database.write(
            lambda tx: tx(
                "UPDATE accounts SET balance = ? WHERE id = ?", balance - amount, account_id
            )
        )


@pytest.mark.parametrize("kind", [Wallet, CarelessWallet])
def test_64_threads_charging_1_from_32_succeed_exactly_32_times(concurrent_dsn, kind):
    with opened_by_several(concurrent_dsn, kind) as wallets:
        wallet, (ada, _) = wallets[0], wallets[0].register("Ada")
        wallet.topup(ada.id, 32)
        calls = [partial(one.charge, ada.id, 1) for one in wallets]
        outcomes = together(*calls * (64 // len(calls)))
        refused = [outcome for outcome in outcomes if isinstance(outcome, InsufficientFunds)]
        if kind is CarelessWallet:
            assert len(refused) == 0
            with pytest.raises(AssertionError):
                check_books(wallet)
            return
        assert len(refused) == 32
        assert sorted(outcome.balance for outcome in outcomes if outcome not in refused) == list(
            range(32)
        )
        check_books(wallet)


@pytest.mark.slow_on("postgres")
def test_64_clients_charging_1_from_32_over_http_succeed_exactly_32_times(wallet):
    ada, token = wallet.register("Ada")
    wallet.topup(ada.id, 32)
    with running(wallet) as url:
        answers = together(
            *[lambda: send(url, "POST", "/api/transactions/charge", {"amount": 1}, token)] * 64
        )
    statuses = [status for status, _, _ in answers]
    assert (statuses.count(201), statuses.count(402)) == (32, 32)
    assert wallet.account(ada.id).balance == 0


@pytest.mark.slow_on("postgres")
def test_accounts_do_not_disturb_each_other_under_load(wallet):
    accounts = [wallet.register(f"No. {number}")[0] for number in range(8)]

    def work(account):
        for amount in range(1, 41):
            wallet.topup(account.id, amount)
            wallet.charge(account.id, amount // 2 or 1)

    assert together(*[lambda account=account: work(account) for account in accounts]) == [None] * 8
    balances = {wallet.account(account.id).balance for account in accounts}
    assert balances == {sum(range(1, 41)) - sum(amount // 2 or 1 for amount in range(1, 41))}


# Promise 3: one idempotency key has at most one effect ############################################


def test_same_key_and_request_gets_the_first_answer_again(api):
    request = {"amount": 5, "description": "Order 17"}
    first = api.send("POST", "/api/transactions/topup", request, Idempotency_Key="k", status=201)
    api.send("POST", "/api/transactions/topup", {"amount": 1}, status=201)
    again = api.send("POST", "/api/transactions/topup", request, Idempotency_Key="k", status=201)
    assert again.body == first.body
    assert again.headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in first.headers
    assert api.send("GET", "/api/account").json["balance"] == 6


@pytest.mark.parametrize(
    ("path", "request_"),
    [
        ("topup", {"amount": 6}),
        ("topup", {"amount": 5, "description": "x"}),
        ("topup", {"amount": 5, "description": ""}),
        ("charge", {"amount": 5}),
    ],
)
def test_same_key_with_another_request_is_refused(api, path, request_):
    api.send("POST", "/api/transactions/topup", {"amount": 5}, Idempotency_Key="k", status=201)
    answer = api.send(
        "POST", f"/api/transactions/{path}", request_, Idempotency_Key="k", status=422
    )
    assert answer.json["code"] == "idempotency_key_reused"
    assert api.send("GET", "/api/account").json["balance"] == 5


def test_refused_charge_leaves_its_key_free(wallet, ada):
    with pytest.raises(InsufficientFunds):
        wallet.charge(ada.id, 5, key="k")
    wallet.topup(ada.id, 5)
    assert wallet.charge(ada.id, 5, key="k").balance == 0
    assert wallet.charge(ada.id, 5, key="k").replayed


def test_keys_of_two_accounts_have_nothing_to_do_with_each_other(wallet, ada):
    grace, _ = wallet.register("Grace")
    wallet.topup(ada.id, 5, key="k")
    assert not wallet.topup(grace.id, 6, key="k").replayed


class ForgetfulWallet(Wallet):
    """Looks the key up in one transaction and has the effect in another:

    how money is paid out twice elsewhere.
    """

    everyone_has_looked = threading.Barrier(32)

    def topup(self, account_id, amount, description=None, *, key=None):
        seen = [one for one in self.transactions(account_id).transactions if one.description == key]
        self.everyone_has_looked.wait(timeout=30)
        return seen[0] if seen else super().topup(account_id, amount, key)


@pytest.mark.parametrize("kind", [Wallet, ForgetfulWallet])
def test_32_concurrent_sends_of_one_key_have_one_effect_and_equal_answers(concurrent_dsn, kind):
    with opened_by_several(concurrent_dsn, kind) as wallets:
        wallet, (ada, _) = wallets[0], wallets[0].register("Ada")
        calls = [partial(one.topup, ada.id, 5, key="order-17") for one in wallets]
        answers = together(*calls * (32 // len(calls)))
        effects = len(wallet.transactions(ada.id).transactions)
        check_books(wallet)
    if kind is ForgetfulWallet:
        assert effects == 32
        return
    assert effects == 1
    assert len(set(answers)) == 1
    assert sum(answer.replayed for answer in answers) == 31


def test_key_means_nothing_where_nothing_is_remembered(api, wallet):
    for method, path, body in (
        ("GET", "/api/account", None),
        ("POST", "/api/register", {"name": "Bob"}),
        ("POST", "/api/account/token", None),
    ):
        answer = api.send(method, path, body, Idempotency_Key="k")
        assert answer.status_int in (200, 201)
        assert "Idempotent-Replayed" not in answer.headers


def test_key_may_be_1_to_255_printable_characters(api, wallet, ada):
    for key in ("!", "k" * 255, 'a "quoted" key, with: ~'):
        api.send("POST", "/api/transactions/topup", {"amount": 5}, Idempotency_Key=key, status=201)
    for key in ("", "k" * 256, "ké", "tab\there"):
        answer = api.send(
            "POST", "/api/transactions/topup", {"amount": 5}, Idempotency_Key=key, status=400
        )
        assert "Idempotency-Key must be" in answer.json["detail"]
    # A header has no spaces at its ends, so that no key has, however it is sent.
    for key in ("", "line\n", "\ud800", 5, b"k", True, " ", " k", "k "):
        with pytest.raises(MalformedRequest, match="Idempotency-Key must be"):
            wallet.topup(ada.id, 5, key=key)
    assert wallet.account(ada.id).balance == 0
    assert api.send("GET", "/api/account").json["balance"] == 15


# Refunds, transfers, holds and batches ############################################################


def test_refund_gives_a_charge_back_in_parts_and_never_more_than_it(wallet, ada):
    wallet.topup(ada.id, 100)
    charge = wallet.charge(ada.id, 60, "Order 17")
    part = wallet.refund(ada.id, charge.id, 25, "one of two", metadata={"order": "17"}, key="r1")
    assert (part.type, part.amount, part.balance, part.reference) == ("refund", 25, 65, charge.id)
    assert (part.description, part.metadata) == ("one of two", {"order": "17"})
    for too_much in (36, 61, AMOUNT_MAX):
        with pytest.raises(RefundExceedsCharge) as refused:
            wallet.refund(ada.id, charge.id, too_much)
        assert (refused.value.refundable, str(refused.value)) == (
            35,
            "Of this charge, 35 can still be refunded.",
        )
    rest = wallet.refund(ada.id, charge.id, key="r2")
    assert (rest.amount, rest.balance) == (35, 100)
    for amount in (None, 1):
        with pytest.raises(RefundExceedsCharge) as refused:
            wallet.refund(ada.id, charge.id, amount)
        assert refused.value.refundable == 0
    # Sent again, all that was left is still what was left then.
    assert wallet.refund(ada.id, charge.id, key="r2") == rest
    assert wallet.refund(ada.id, charge.id, key="r2").replayed
    with pytest.raises(IdempotencyKeyReused):
        wallet.refund(ada.id, charge.id, 35, key="r2")
    assert wallet.account(ada.id).balance == 100


def test_only_a_charge_of_this_account_can_be_refunded(wallet, ada):
    topup = wallet.topup(ada.id, 100)
    bob, _ = wallet.register("Bob")
    sent = wallet.transfer(ada.id, bob.id, 40)
    received = wallet.transactions(bob.id).transactions[0]
    refund = wallet.refund(ada.id, wallet.charge(ada.id, 10).id)
    for account, one in ((ada, topup), (ada, sent), (bob, received), (ada, refund)):
        with pytest.raises(
            NotRefundable, match=f"This is a {one.type}, and only a charge can be refunded"
        ):
            wallet.refund(account.id, one.id)
    hold = wallet.hold(ada.id, 5)
    for unknown in (received.id, refund.id + "0", hold.id, hold.id.replace("hld", "txn"), "", None):
        with pytest.raises(NotFound, match="no such transaction"):
            wallet.refund(ada.id, unknown)
    assert wallet.account(bob.id).balance == 40


def test_refund_that_the_balance_has_no_room_for_is_refused_and_can_be_done_later(wallet, ada):
    wallet.topup(ada.id, AMOUNT_MAX)
    charge = wallet.charge(ada.id, 10)
    wallet.topup(ada.id, 5)
    with pytest.raises(BalanceLimitExceeded) as refused:
        wallet.refund(ada.id, charge.id, key="r")
    assert refused.value.balance == AMOUNT_MAX - 5
    wallet.charge(ada.id, 5)
    assert wallet.refund(ada.id, charge.id, key="r").amount == 10


class HastyBooks:
    """Locks an account only to write what it saw fit before:

    how a charge is paid back twice elsewhere, or a hold is captured twice.
    """

    everyone_has_read = threading.Barrier(8)

    def __init__(self, tx, *stamps):
        self.tx, self.stamps = tx, stamps

    def begin(self, account_id, stamp):
        return None

    def post(self, entry, stamp):
        self.everyone_has_read.wait(timeout=30)
        self.books = RealBooks(self.tx, *self.stamps)
        return self.books.post(entry, stamp)

    def write(self):
        self.books.write()


RealBooks = wallet_module._Books


def test_control_refunds_that_are_added_up_too_early_give_back_more_than_the_charge(
    postgres_dsn, monkeypatch
):
    with Wallet(postgres_dsn, connections=8) as wallet:
        ada, _ = wallet.register("Ada")
        wallet.topup(ada.id, 100)
        charge = wallet.charge(ada.id, 100)
        monkeypatch.setattr(wallet_module, "_Books", HastyBooks)
        together(*[lambda: wallet.refund(ada.id, charge.id)] * 8)
        assert wallet.account(ada.id).balance == 800
        with pytest.raises(AssertionError):
            check_books(wallet)


def test_64_refunds_at_once_give_back_exactly_the_charge(concurrent_dsn):
    with Wallet(concurrent_dsn) as wallet:
        ada, _ = wallet.register("Ada")
        wallet.topup(ada.id, 100)
        charge = wallet.charge(ada.id, 100)
        calls = [
            lambda amount=amount: wallet.refund(ada.id, charge.id, amount)
            for amount in (3, 5, 7, None)
        ] * 16
        outcomes = together(*calls)
        assert {type(outcome).__name__ for outcome in outcomes} == {
            "Transaction",
            "RefundExceedsCharge",
        }
        assert (
            sum(outcome.amount for outcome in outcomes if not isinstance(outcome, Exception)) == 100
        )
        assert wallet.account(ada.id).balance == 100
        check_books(wallet)


def test_refund_over_http(api, wallet):
    api.send("POST", "/api/transactions/topup", {"amount": 100})
    charge = api.send("POST", "/api/transactions/charge", {"amount": 60}).json["id"]
    first = api.send(
        "POST",
        f"/api/transactions/{charge}/refund",
        {"amount": 10},
        Idempotency_Key="r",
        status=201,
    )
    again = api.send(
        "POST",
        f"/api/transactions/{charge}/refund",
        {"amount": 10},
        Idempotency_Key="r",
        status=201,
    )
    assert (first.body, "Idempotent-Replayed" in first.headers) == (again.body, False)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert (first.json["type"], first.json["reference"]) == ("refund", charge)
    refused = api.send(
        "POST", f"/api/transactions/{charge}/refund", {"amount": 51}, status=422
    ).json
    assert (refused["code"], refused["refundable"]) == ("refund_exceeds_charge", 50)
    assert (
        api.send("POST", f"/api/transactions/{charge}/refund", status=201).json["amount"] == 50
    )  # Without a body.
    assert (
        api.send("POST", f"/api/transactions/{first.json['id']}/refund", status=422).json["code"]
        == "not_refundable"
    )
    api.send("POST", f"/api/transactions/{charge}/refund", raw=b'{"amount": 1', status=400)
    api.send(
        "POST",
        f"/api/transactions/{charge}/refund",
        raw=b"{}",
        Content_Type="text/plain",
        status=415,
    )
    grace, _ = wallet.register("Grace")
    hers = wallet.charge(grace.id, wallet.topup(grace.id, 5).amount)
    assert (
        api.send("POST", f"/api/transactions/{hers.id}/refund", status=404).json["code"]
        == "not_found"
    )


def test_body_that_is_announced_is_never_taken_for_none(wallet):
    """Else a part that is to be refunded, of which a server does not tell the length, would be all
    of it.
    """
    ada, token = wallet.register("Ada")
    wallet.topup(ada.id, 50)
    charge, answers = wallet.charge(ada.id, 50), []
    environ = {
        "REQUEST_METHOD": "POST",
        "PATH_INFO": f"/api/transactions/{charge.id}/refund",
        "CONTENT_TYPE": "application/json",
        "HTTP_AUTHORIZATION": f"Bearer {token}",
        "HTTP_TRANSFER_ENCODING": "chunked",
        "wsgi.input": io.BytesIO(b'{"amount": 5}'),
        "wsgi.input_terminated": True,
    }
    create_app(wallet)(environ, lambda line, headers: answers.append(line))
    assert answers == ["201 Created"]
    assert wallet.account(ada.id).balance == 5


def test_transfer_moves_money_between_two_accounts_and_each_names_the_other(wallet, ada):
    bob, _ = wallet.register("Bob")
    wallet.topup(ada.id, 100)
    sent = wallet.transfer(ada.id, bob.id, 30, "lunch", metadata={"a": "b"}, key="t")
    assert (sent.type, sent.amount, sent.balance, sent.reference) == (
        "transfer_out",
        30,
        70,
        bob.id,
    )
    (received,) = wallet.transactions(bob.id).transactions
    assert (received.type, received.amount, received.balance, received.reference) == (
        "transfer_in",
        30,
        30,
        ada.id,
    )
    assert [(one.description, one.metadata) for one in (sent, received)] == [
        ("lunch", {"a": "b"})
    ] * 2
    again = wallet.transfer(ada.id, bob.id, 30, "lunch", metadata={"a": "b"}, key="t")
    assert (again, again.replayed) == (sent, True)
    assert wallet.topup(bob.id, 1, key="t").balance == 31  # It is a key of Ada's, and free for Bob.
    assert (wallet.account(ada.id).balance, wallet.account(bob.id).balance) == (70, 31)


def test_two_senders_may_use_one_key_and_no_client_can_take_what_it_becomes_elsewhere(wallet, ada):
    (bob, _), (cem, token) = wallet.register("Bob"), wallet.register("Cem")
    for sender in (ada, bob):
        wallet.topup(sender.id, 10)
        wallet.transfer(sender.id, cem.id, 10, key="t")
    assert wallet.account(cem.id).balance == 20
    api = Client(create_app(wallet), token)
    for (key,) in wallet.database.read(
        lambda tx: tx("SELECT idempotency_key FROM transactions WHERE type = 'transfer_in'")
    ):
        api.send("POST", "/api/transactions/topup", {"amount": 10}, Idempotency_Key=key, status=400)


def test_transfer_that_cannot_be_is_refused_and_changes_nothing_on_either_side(wallet):
    (ada, token), (bob, _) = wallet.register("Ada"), wallet.register("Bob")
    api = Client(create_app(wallet), token)
    wallet.topup(ada.id, 100)
    wallet.topup(bob.id, AMOUNT_MAX - 10)

    def refused(status, to, amount=20):
        return api.send(
            "POST", "/api/transactions/transfer", {"to": to, "amount": amount}, status=status
        ).json

    assert refused(402, bob.id, 101)["code"] == "insufficient_funds"
    full = refused(422, bob.id)
    assert full["code"] == "balance_limit_exceeded"
    assert "balance" not in full
    assert str(AMOUNT_MAX - 10) not in json.dumps(full)  # It is Bob's, and not for Ada to know.
    assert refused(422, ada.id)["errors"] == [
        {"pointer": "#/to", "detail": "must be another account"}
    ]
    for nobody in ("acc_0000000000000000", "acc_1", "", "Bob", bob.id + "\n"):
        assert refused(404, nobody)["code"] == "account_not_found"
    for wrong in (None, 5, [bob.id]):
        assert refused(422, wrong)["errors"][0]["pointer"] == "#/to"
    assert (wallet.account(ada.id).balance, wallet.account(bob.id).balance) == (
        100,
        AMOUNT_MAX - 10,
    )
    assert (
        len(wallet.transactions(ada.id).transactions)
        == len(wallet.transactions(bob.id).transactions)
        == 1
    )


class UnorderedBooks(wallet_module._Books):
    """Locks the sender first, whoever that is."""

    def __init__(self, tx, *stamps):
        for one in stamps:
            super().__init__(tx, one)
        super().__init__(tx, *stamps)


@pytest.mark.slow_on("control")
@pytest.mark.parametrize("is_unordered", [False, True], ids=["wallet", "control"])
def test_opposing_transfers_never_deadlock_and_conserve_the_total(
    new_schema, postgres_server, is_unordered, monkeypatch
):
    if is_unordered:
        monkeypatch.setattr(wallet_module, "_Books", UnorderedBooks)

    def deadlocks():
        sql = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        return int(postgres_server.query(sql)[0][0])

    with (
        postgres_server.configured(deadlock_timeout="20ms"),
        Wallet(new_schema(on=postgres_server), connections=16) as wallet,
    ):
        accounts = [wallet.register(name)[0].id for name in ("Ada", "Bob", "Cem")]
        for account in accounts:
            wallet.topup(account, 1000)

        def work(sender, to):
            for amount in range(1, 9 if is_unordered else 16):
                with contextlib.suppress(InsufficientFunds):
                    wallet.transfer(sender, to, amount)

        before = deadlocks()
        pairs = [(one, other) for one in accounts for other in accounts if one != other] * 2
        outcomes = together(*[lambda pair=pair: work(*pair) for pair in pairs])
        assert outcomes == [None] * 12 or is_unordered
        assert sum(wallet.account(account).balance for account in accounts) == 3000
        check_books(wallet)
        wallet.close()  # A session tells its statistics when it ends.
        deadline = time.monotonic() + 10
        while is_unordered and deadlocks() == before and time.monotonic() < deadline:
            time.sleep(0.1)
        assert (deadlocks() > before) == is_unordered


def test_hold_sets_money_aside_and_all_spending_is_checked_against_what_is_available(wallet, ada):
    bob, _ = wallet.register("Bob")
    wallet.topup(ada.id, 100)
    hold = wallet.hold(ada.id, 70, "Room 5", metadata={"stay": "9"}, key="h")
    assert (hold.amount, hold.status, hold.captured, hold.description) == (
        70,
        "active",
        0,
        "Room 5",
    )
    assert hold.expires_at - hold.created_at == timedelta(days=7)
    account = wallet.account(ada.id)
    assert (account.balance, account.available) == (100, 30)
    for spend in (
        wallet.charge,
        wallet.hold,
        lambda id, amount: wallet.transfer(id, bob.id, amount),
    ):
        with pytest.raises(InsufficientFunds) as refused:
            spend(ada.id, 31)
        assert refused.value.members == {"balance": 100, "available": 30, "required": 31}
        assert str(refused.value) == "The balance is 100, 30 of it available, and this needs 31."
    assert wallet.charge(ada.id, 10).balance == 90
    assert wallet.transfer(ada.id, bob.id, 10).balance == 80
    assert wallet.hold(ada.id, 10).amount == 10
    assert wallet.account(ada.id).available == 0
    assert wallet.hold(ada.id, 70, "Room 5", metadata={"stay": "9"}, key="h") == hold
    with pytest.raises(IdempotencyKeyReused):
        wallet.charge(ada.id, 70, "Room 5", key="h")
    assert [one.type for one in wallet.transactions(ada.id).transactions] == [
        "transfer_out",
        "charge",
        "topup",
    ]


def test_capture_charges_a_hold_or_a_part_of_it_and_releases_the_rest(wallet, ada):
    wallet.topup(ada.id, 100)
    part, whole = wallet.hold(ada.id, 40, "Room 5", metadata={"stay": "9"}), wallet.hold(ada.id, 60)
    with pytest.raises(
        ValidationFailed, match="#/amount must be at most 40, which is what is held"
    ):
        wallet.capture(ada.id, part.id, 41)
    charge = wallet.capture(ada.id, part.id, 25, key="c")
    assert (charge.type, charge.amount, charge.balance, charge.reference) == (
        "charge",
        25,
        75,
        part.id,
    )
    assert (charge.description, charge.metadata) == ("Room 5", {"stay": "9"})  # The hold's.
    assert (wallet.capture(ada.id, part.id, 25, key="c"), wallet.account(ada.id).available) == (
        charge,
        15,
    )
    said = wallet.capture(ada.id, whole.id, description="Bar", metadata={"x": "y"})
    assert (said.amount, said.balance, said.description, said.metadata) == (
        60,
        15,
        "Bar",
        {"x": "y"},
    )
    wallet.topup(ada.id, 10)
    other = wallet.hold(ada.id, 10, "Room 6", metadata={"a": "b"})
    nothing = wallet.capture(ada.id, other.id, description="", metadata={})
    assert (nothing.description, nothing.metadata) == ("", {"a": "b"})
    assert [(one.id, one.status, one.captured) for one in wallet.holds(ada.id).holds[1:]] == [
        (whole.id, "captured", 60),
        (part.id, "captured", 25),
    ]
    assert wallet.refund(ada.id, charge.id).amount == 25  # It is a charge like any other.
    for end in (wallet.capture, wallet.release):
        with pytest.raises(HoldNotActive, match="This hold is captured") as refused:
            end(ada.id, part.id)
        assert refused.value.hold_status == "captured"


def test_release_makes_what_is_held_available_again(wallet, ada):
    wallet.topup(ada.id, 100)
    hold = wallet.hold(ada.id, 100)
    released = wallet.release(ada.id, hold.id, key="r")
    assert released == dataclasses.replace(hold, status="released")
    again = wallet.release(ada.id, hold.id, key="r")
    assert (again, again.replayed) == (released, True)
    for end in (wallet.capture, wallet.release):
        with pytest.raises(HoldNotActive, match="This hold is released"):
            end(ada.id, hold.id)
    assert wallet.charge(ada.id, 100).balance == 0


def test_hold_of_another_account_is_not_found(wallet, ada):
    bob, _ = wallet.register("Bob")
    wallet.topup(bob.id, 5)
    topup, hold = wallet.topup(ada.id, 5), wallet.hold(ada.id, 5)
    for account, unknown in (
        (bob, hold.id),
        (ada, hold.id + "0"),
        (ada, "hld" + topup.id[3:]),
        (ada, topup.id),
        (ada, "txn" + hold.id[3:]),
        (ada, None),
    ):
        for call in (wallet.get_hold, wallet.capture, wallet.release):
            with pytest.raises(NotFound, match=r"no such (transaction or )?hold"):
                call(account.id, unknown)
    assert wallet.get_hold(ada.id, hold.id) == hold


def test_expired_hold_stops_counting_by_itself(dsn, monkeypatch):
    now_us = 10**15
    monkeypatch.setattr(time, "time_ns", lambda: now_us * 1000)
    with Wallet(dsn) as wallet:
        ada, _ = wallet.register("Ada")
        wallet.topup(ada.id, 100)
        hold, later = (
            wallet.hold(ada.id, 60, expires_in_s=10),
            wallet.hold(ada.id, 30, expires_in_s=11),
        )
        now_us += 10_000_000 - 1
        with pytest.raises(InsufficientFunds):
            wallet.charge(ada.id, 11)
        assert wallet.get_hold(ada.id, hold.id).status == "active"
        now_us += 1  # At that very moment it is over, and no write has happened.
        assert wallet.account(ada.id).available == 70
        assert [one.status for one in wallet.holds(ada.id).holds] == ["active", "expired"]
        for end in (wallet.capture, wallet.release):
            with pytest.raises(HoldNotActive, match="This hold is expired") as refused:
                end(ada.id, hold.id)
            assert refused.value.hold_status == "expired"
        with pytest.raises(InsufficientFunds) as refused:
            wallet.charge(ada.id, 71)
        assert refused.value.available == 70
        assert wallet.charge(ada.id, 70).balance == 30
        assert (
            wallet.hold(
                ada.id, 60, expires_in_s=10, key=None if wallet.topup(ada.id, 60) else ""
            ).amount
            == 60
        )
        check_books(wallet)
        assert wallet.capture(ada.id, later.id).balance == 60
        # Set back, the clock brings nothing to life again, and the times in the history never go
        # back.
        now_us -= 3_600_000_000
        assert [one.status for one in wallet.holds(ada.id).holds] == [
            "active",
            "captured",
            "expired",
        ]
        with pytest.raises(HoldNotActive):
            wallet.release(ada.id, hold.id)
        assert (
            wallet.topup(ada.id, 1).created_at
            == wallet.transactions(ada.id).transactions[1].created_at
        )
        check_books(wallet)


def test_hold_sent_again_after_its_end_is_answered_as_at_first(wallet, ada):
    wallet.topup(ada.id, 100)
    captured, released = (wallet.hold(ada.id, 10, key=key) for key in "cr")
    wallet.capture(ada.id, captured.id, 5)
    wallet.release(ada.id, released.id)
    for key, first in (("c", captured), ("r", released)):
        again = wallet.hold(ada.id, 10, key=key)
        assert (again, again.replayed) == (first, True)


def test_holds_that_are_over_do_not_pile_up(dsn, monkeypatch):
    """Else each look at the account would add up all that ever expired in it."""
    now_us = 10**15
    monkeypatch.setattr(time, "time_ns", lambda: now_us * 1000)
    with Wallet(dsn) as wallet:
        ada, _ = wallet.register("Ada")
        wallet.topup(ada.id, 100)
        for _ in range(5):
            wallet.hold(ada.id, 1, expires_in_s=1)
            now_us += 10**6
        assert wallet.database.read(
            lambda tx: tx("SELECT count(*) FROM holds WHERE status = 'active'")
        ) == [(1,)]


def test_clock_that_was_wrong_for_a_while_holds_no_money_for_as_long(dsn, monkeypatch):
    now_us = 10**15
    monkeypatch.setattr(time, "time_ns", lambda: now_us * 1000)
    with Wallet(dsn) as wallet:
        ada, _ = wallet.register("Ada")
        wallet.topup(ada.id, 100)
        now_us += 3650 * 24 * 3600 * 10**6
        wallet.charge(ada.id, 1)
        now_us = 10**15
        hold = wallet.hold(ada.id, 50, expires_in_s=10)
        assert (wallet_module._as_us(hold.expires_at), wallet.account(ada.id).available) == (
            now_us + 10**7,
            49,
        )
        now_us += 10**7
        assert (wallet.get_hold(ada.id, hold.id).status, wallet.account(ada.id).available) == (
            "expired",
            99,
        )
        assert wallet.charge(ada.id, 99).balance == 0
        assert wallet.get_hold(ada.id, hold.id).status == "expired"
        check_books(wallet)


@pytest.mark.parametrize("operation", ["charge", "transfer", "hold", "batch"])
def test_hold_that_expires_in_the_middle_of_a_request_is_one_or_the_other(
    dsn, monkeypatch, operation
):
    """The clock passes its end after the request has looked at it once, twice, and so on:

    never is there a fault.
    """
    monkeypatch.setattr(time, "time_ns", lambda: 10**18)
    with Wallet(dsn) as wallet:
        bob = wallet.register("Bob")[0].id
        outcomes = set()
        for looks in range(8):
            ada = wallet.register("Ada")[0].id
            wallet.topup(ada, 100)
            hold = wallet.hold(ada, 100, expires_in_s=1)
            batch = [{"type": "charge", "amount": 1}]
            call, *arguments = {
                "charge": (wallet.charge, ada, 1),
                "transfer": (wallet.transfer, ada, bob, 1),
                "hold": (wallet.hold, ada, 1),
                "batch": (wallet.batch, batch),
            }[operation]
            end_us, times = wallet_module._as_us(hold.expires_at), []

            def passing(end_us=end_us, times=times, looks=looks):
                times.append(1)
                return (end_us - (len(times) <= looks)) * 1000

            monkeypatch.setattr(time, "time_ns", passing)
            try:
                call(*arguments, **({"account_id": ada} if operation == "batch" else {}))
                outcomes.add("done")
            except InsufficientFunds:
                outcomes.add("refused")
            monkeypatch.setattr(
                time, "time_ns", lambda looks=looks: (10**15 + looks * 10**7) * 1000
            )
        assert outcomes == {"done", "refused"}
        check_books(wallet)


def test_refusal_writes_nothing_not_even_which_holds_have_expired(wallet, ada, monkeypatch):
    """Else a clock that is set back would tell of holds that have expired too early."""
    wallet.topup(ada.id, 100)
    wallet.hold(ada.id, 60, expires_in_s=1)
    sql = "SELECT status, held, updated_at FROM holds JOIN accounts ON id = account_id"
    before = wallet.database.read(lambda tx: tx(sql))
    monkeypatch.setattr(wallet_module, "_now_us", lambda: time.time_ns() // 1000 + 2_000_000)
    for call in (wallet.charge, wallet.hold):
        with pytest.raises(InsufficientFunds) as refused:
            call(ada.id, 101)
        assert refused.value.members == {"balance": 100, "available": 100, "required": 101}
        assert wallet.database.read(lambda tx: tx(sql)) == before
    assert wallet.charge(ada.id, 100).balance == 0
    assert wallet.database.read(lambda tx: tx(sql))[0][:2] == ("expired", 0)


BAD_DURATIONS = [0, -1, 30 * 24 * 3600 + 1, 1.0, "5", True, [], AMOUNT_MAX + 1]


def test_hold_lasts_a_second_to_30_days(api):
    for seconds in BAD_DURATIONS:
        api.send("POST", "/api/transactions/topup", {"amount": 5})
        refused = api.send(
            "POST", "/api/holds", {"amount": 1, "expires_in_s": seconds}, status=422
        ).json
        rule = "must be an integer from 1 to 2592000, in seconds"
        assert refused["errors"] == [{"pointer": "#/expires_in_s", "detail": rule}]
        for good in (None, 1, 30 * 24 * 3600):
            api.send("POST", "/api/holds", {"amount": 1, "expires_in_s": good}, status=201)


def test_capture_and_release_race_64_ways_and_exactly_one_wins(concurrent_dsn):
    with Wallet(concurrent_dsn) as wallet:
        ada, _ = wallet.register("Ada")
        wallet.topup(ada.id, 100)
        hold = wallet.hold(ada.id, 100)
        calls = [
            lambda: wallet.capture(ada.id, hold.id, 40),
            lambda: wallet.release(ada.id, hold.id),
        ] * 32
        outcomes = together(*calls)
        won = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
        assert len(won) == 1
        status = "captured" if won[0] in outcomes[::2] else "released"
        assert {
            (type(one), getattr(one, "hold_status", None)) for one in outcomes if one not in won
        } == {(HoldNotActive, status)}
        account = wallet.account(ada.id)
        assert (account.balance, account.available) == (
            (60, 60) if status == "captured" else (100, 100)
        )
        check_books(wallet)


def test_control_hold_that_is_looked_at_too_early_is_captured_more_than_once(
    postgres_dsn, monkeypatch
):
    """With other holds in the account, not even its bounds would notice."""
    with Wallet(postgres_dsn, connections=8) as wallet:
        ada, _ = wallet.register("Ada")
        wallet.topup(ada.id, 100)
        hold, *_ = [wallet.hold(ada.id, 10) for _ in range(8)]
        monkeypatch.setattr(wallet_module, "_Books", HastyBooks)
        captured = together(*[lambda: wallet.capture(ada.id, hold.id)] * 8)
        assert [one.amount for one in captured] == [10] * 8
        with pytest.raises(AssertionError):
            check_books(wallet)


def test_holds_never_take_together_more_than_there_is(concurrent_dsn):
    with opened_by_several(concurrent_dsn) as wallets:
        wallet, (ada, _) = wallets[0], wallets[0].register("Ada")
        wallet.topup(ada.id, 20)
        calls = [partial(call, ada.id, 1) for one in wallets for call in (one.hold, one.charge)]
        outcomes = together(*calls * (64 // len(calls)))
        assert sum(isinstance(outcome, InsufficientFunds) for outcome in outcomes) == 44
        account = wallet.account(ada.id)
        assert account.available == 0
        check_books(wallet)


def test_holds_over_http(api):
    api.send("POST", "/api/transactions/topup", {"amount": 100})
    first = api.send(
        "POST",
        "/api/holds",
        {"amount": 60, "description": "Room 5"},
        Idempotency_Key="h",
        status=201,
    )
    again = api.send(
        "POST",
        "/api/holds",
        {"amount": 60, "description": "Room 5"},
        Idempotency_Key="h",
        status=201,
    )
    assert (again.body, again.headers["Idempotent-Replayed"]) == (first.body, "true")
    hold = first.json["id"]
    assert re.fullmatch("hld_[0-9A-Za-z]{16}_2", hold)
    assert api.send("GET", f"/api/holds/{hold}", status=200).json == first.json
    assert api.send("GET", "/api/account").json["available"] == 40
    assert api.send("POST", "/api/holds", {"amount": 41}, status=402).json["available"] == 40
    other = api.send("POST", "/api/holds", {"amount": 40}, status=201).json["id"]
    page = api.send("GET", "/api/holds?limit=1", status=200)
    assert ([one["id"] for one in page.json["holds"]], page.json["next_cursor"]) == ([other], other)
    assert page.headers["Link"] == f'<?limit=1&cursor={other}>; rel="next"'
    rest = api.send("GET", f"/api/holds?limit=1&cursor={other}", status=200).json
    assert ([one["id"] for one in rest["holds"]], rest["next_cursor"]) == ([hold], None)
    captured = api.send(
        "POST", f"/api/holds/{hold}/capture", {"amount": 10}, Idempotency_Key="c", status=201
    )
    assert (captured.json["type"], captured.json["reference"], captured.json["balance"]) == (
        "charge",
        hold,
        90,
    )
    released = api.send("POST", f"/api/holds/{other}/release", Idempotency_Key="r", status=201)
    assert released.json["status"] == "released"
    assert (
        api.send("POST", f"/api/holds/{other}/release", {}, Idempotency_Key="r", status=201).body
        == released.body
    )
    late = api.send("POST", f"/api/holds/{other}/capture", status=409).json
    assert (late["code"], late["hold_status"]) == ("hold_not_active", "released")
    api.send("POST", f"/api/holds/{other}/release", {"amount": 5}, status=422)
    for bad in ("?cursor=x", f"?cursor={captured.json['id']}", "?limit=0", "?type=topup"):
        api.send("GET", f"/api/holds{bad}", status=400)
    api.send("GET", "/api/holds/hld_0000000000000000_1", status=404)
    api.send("GET", f"/api/transactions/{hold.replace('hld', 'txn')}", status=404)


WRONG_TYPES = [None, 5, 10**5000, True, b"acc_0000000000000000", ["x"], {}, object(), "\ud800", ""]


@pytest.mark.slow_on("postgres")
@pytest.mark.parametrize("wrong", WRONG_TYPES, ids=lambda wrong: type(wrong).__name__)
def test_wrong_types_in_process_are_refused_as_such_and_fail_nobody_elses_write(wallet, ada, wrong):
    wallet.topup(ada.id, 5)
    hold, charge = wallet.hold(ada.id, 1), wallet.charge(ada.id, 1)
    calls = [
        lambda: wallet.refund(wrong, charge.id),
        lambda: wallet.refund(ada.id, wrong),
        lambda: wallet.capture(wrong, hold.id),
        lambda: wallet.capture(ada.id, wrong),
        lambda: wallet.release(wrong, hold.id),
        lambda: wallet.release(ada.id, wrong),
        lambda: wallet.transfer(wrong, ada.id, 1),
        lambda: wallet.transfer(ada.id, wrong, 1),
        lambda: wallet.hold(wrong, 1),
        lambda: wallet.get_hold(wrong, hold.id),
        lambda: wallet.transaction(wrong, charge.id),
        lambda: wallet.freeze(wrong),
        lambda: wallet.holds(wrong),
        lambda: wallet.statement(wrong),
        lambda: wallet.authenticate(wrong),
        lambda: wallet.replace_token(wrong),
        lambda: wallet.transactions(ada.id, type=wrong or "x"),
        lambda: wallet.batch([wrong], account_id=ada.id),
        lambda: wallet.transactions(ada.id, limit=0 if wrong == 5 else wrong),
        lambda: wallet.batch(wrong),
        lambda: wallet.charge(ada.id, 1, metadata=wrong or {"": ""}),
        lambda: wallet.charge(ada.id, 1, key=wrong or ""),
    ]
    for call in calls:
        with pytest.raises(WalletError):
            call()
    assert (wallet.account(ada.id).balance, wallet.account(ada.id).available) == (4, 3)


@pytest.mark.slow_on("postgres")
@pytest.mark.parametrize("amount", [0, -1, 1.0, "5", True, AMOUNT_MAX + 1])
def test_every_amount_is_checked_everywhere(wallet, ada, amount):
    bob, _ = wallet.register("Bob")
    wallet.topup(ada.id, 100)
    charge, hold = wallet.charge(ada.id, 50), wallet.hold(ada.id, 50)
    for call in (
        lambda: wallet.refund(ada.id, charge.id, amount),
        lambda: wallet.capture(ada.id, hold.id, amount),
        lambda: wallet.transfer(ada.id, bob.id, amount),
        lambda: wallet.hold(ada.id, amount),
        lambda: wallet.batch([{"type": "topup", "amount": amount}], account_id=ada.id),
    ):
        with pytest.raises(ValidationFailed, match="amount must be an integer"):
            call()
    assert (wallet.account(ada.id).balance, wallet.account(ada.id).available) == (50, 0)


def test_batch_makes_all_its_movements_in_order_and_is_remembered_by_one_key(wallet, ada):
    movements = [
        {"type": "topup", "amount": 10, "description": "a"},
        {"type": "charge", "amount": 3},
        {"type": "charge", "amount": 7, "metadata": {"b": "c"}},
        {"type": "topup", "amount": 1},
    ]
    made = wallet.batch(movements, account_id=ada.id, key="b")
    assert [(one.type, one.amount, one.balance, one.description, one.metadata) for one in made] == [
        ("topup", 10, 10, "a", {}),
        ("charge", 3, 7, None, {}),
        ("charge", 7, 0, None, {"b": "c"}),
        ("topup", 1, 1, None, {}),
    ]
    again = wallet.batch(movements, account_id=ada.id, key="b")
    assert (again, {one.replayed for one in again}) == (made, {True})
    for changed in (movements[:1], movements[::-1], [*movements, {"type": "topup", "amount": 1}]):
        with pytest.raises(IdempotencyKeyReused):
            wallet.batch(changed, account_id=ada.id, key="b")
    with pytest.raises(IdempotencyKeyReused):
        wallet.topup(ada.id, 10, "a", key="b")
    assert wallet.transactions(ada.id).transactions == made[::-1]


def test_batch_that_is_refused_names_the_index_and_changes_nothing(wallet, ada):
    wallet.topup(ada.id, 5, key="used")
    for movements, error, index in (
        ([{"type": "topup", "amount": 1}, {"type": "charge", "amount": 7}], InsufficientFunds, 1),
        ([{"type": "charge", "amount": 6}, {"type": "topup", "amount": 1}], InsufficientFunds, 0),
        (
            [{"type": "topup", "amount": 1}, {"type": "topup", "amount": AMOUNT_MAX}],
            BalanceLimitExceeded,
            1,
        ),
    ):
        with pytest.raises(error) as refused:
            wallet.batch(movements, account_id=ada.id, key="b")
        assert refused.value.index == refused.value.members["index"] == index
    with pytest.raises(IdempotencyKeyReused):
        wallet.batch([{"type": "topup", "amount": 5}], account_id=ada.id, key="used")
    bob, _ = wallet.register("Bob")
    for order in ((ada, bob), (bob, ada)):
        with pytest.raises(IdempotencyKeyReused) as refused:
            wallet.batch(
                [{"account": one.id, "type": "topup", "amount": 5} for one in order], key="used"
            )
        assert refused.value.index == order.index(ada)
    assert wallet.account(ada.id).balance == 5
    (done,) = wallet.batch(
        [{"type": "topup", "amount": 1}], account_id=ada.id, key="b"
    )  # The key was left free.
    assert done.balance == 6


class CountingTx:
    """Notes how often the database is asked."""

    def __init__(self, tx, counted):
        self.tx, self.counted = tx, counted

    def __call__(self, *statement):
        self.counted.append(statement)
        return self.tx(*statement)

    def many(self, sql, rows):
        self.counted.append(sql)
        self.tx.many(sql, rows)

    def __getattr__(self, name):
        return getattr(self.tx, name)


def test_batch_asks_the_database_few_times_however_many_movements_it_has(wallet, ada):
    counted, write = [], wallet.database.write

    def counting(function, **options):
        def run(tx):
            return function(CountingTx(tx, counted))

        return write(run, **options)

    wallet.database.write = counting
    movements = [{"type": "topup", "amount": 1}] * 200
    assert len(wallet.batch(movements, account_id=ada.id)) == 200
    assert len(counted) <= 5


def test_batch_over_several_accounts_is_one_transaction_and_its_key_is_taken_in_each(wallet, ada):
    bob, _ = wallet.register("Bob")
    movements = [
        {"account": one.id, "type": type, "amount": amount}
        for one, type, amount in (
            (bob, "topup", 10),
            (ada, "topup", 5),
            (bob, "charge", 4),
            (ada, "charge", 5),
            (bob, "topup", 1),
        )
    ]
    made = wallet.batch(movements, key="b")
    assert [(one.id[4:20] == bob.id[4:], one.balance) for one in made] == [
        (True, 10),
        (False, 5),
        (True, 6),
        (False, 0),
        (True, 7),
    ]
    assert wallet.batch(movements, key="b") == made
    for changed in (movements[1:], movements[3:], movements[2:3]):
        with pytest.raises(IdempotencyKeyReused):
            wallet.batch(changed, key="b")
    with pytest.raises(AccountNotFound) as refused:
        wallet.batch(
            [*movements, {"account": "acc_0000000000000000", "type": "topup", "amount": 1}], key="c"
        )
    assert refused.value.index == 5
    with pytest.raises(AccountNotFound) as refused:
        wallet.batch([movements[0], {"account": "Bob", "type": "topup", "amount": 1}])
    assert refused.value.index == 1
    assert (wallet.account(bob.id).balance, wallet.account(ada.id).balance) == (7, 0)


def test_batch_tells_all_wrong_fields_at_once_with_pointers(api):
    def errors(transactions):
        answer = api.send(
            "POST", "/api/transactions/batch", {"transactions": transactions}, status=422
        ).json
        return [(error["pointer"], error["detail"].split(",")[0]) for error in answer["errors"]]

    amount = f"must be an integer from 1 to {AMOUNT_MAX}"
    assert errors(
        [
            {"type": "topup", "amount": 0},
            {"type": "gift", "amount": 5, "x/y": 1},
            7,
            {"type": "charge", "amount": 5, "account": "acc_0000000000000000"},
        ]
    ) == [
        ("#/transactions/0/amount", amount),
        ("#/transactions/1/type", "must be topup or charge"),
        ("#/transactions/1/x~1y", "is not known; known are: type"),
        ("#/transactions/2/type", "is missing; it must be topup or charge"),
        ("#/transactions/2/amount", f"is missing; it {amount}"),
        ("#/transactions/3/account", "is not known; known are: type"),
    ]
    whole = [("#/transactions", "must be a list of 1 to 1000 movements")]
    for wrong in ([], {}, None, "x", [{"type": "topup", "amount": 1}] * 1001):
        assert errors(wrong) == whole
    assert api.send("GET", "/api/account").json["balance"] == 0


@pytest.mark.slow_on("postgres")
def test_batch_of_1000_fits_and_bodies_of_a_mebibyte_are_for_batches_only(wallet):
    _, token = wallet.register("Ada")
    batch = {
        "transactions": [
            {"type": "topup", "amount": 1, "description": "x" * 500, "metadata": {"n": str(number)}}
            for number in range(1000)
        ]
    }
    with running(wallet) as url:
        status, _, made = send(
            url, "POST", "/api/transactions/batch", batch, token, Idempotency_Key="b"
        )
        assert (status, len(made["transactions"]), made["transactions"][-1]["balance"]) == (
            201,
            1000,
            1000,
        )
        status, headers, again = send(
            url, "POST", "/api/transactions/batch", batch, token, Idempotency_Key="b"
        )
        assert (status, again, headers["Idempotent-Replayed"]) == (201, made, "true")
        for path, length, expected in (
            ("batch", 2**20 + 1, b"413"),
            ("topup", 2**17, b"413"),
            ("batch", 2**20, b"422"),
        ):
            request = (
                f"POST /api/transactions/{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
                "Connection: close\r\nContent-Type: application/json\r\n"
                f"Content-Length: {length}\r\n\r\n"
            ).encode()
            assert (
                raw_exchange(url, request + b"{}".ljust(length if expected == b"422" else 0))[9:12]
                == expected
            )
    assert len(wallet.transactions(wallet.authenticate(token).id, limit=100).transactions) == 100


def test_concurrent_sends_of_one_batch_have_one_effect(concurrent_dsn):
    with Wallet(concurrent_dsn) as wallet:
        accounts = [wallet.register(str(number))[0].id for number in range(3)]
        movements = [{"account": account, "type": "topup", "amount": 5} for account in accounts * 3]
        outcomes = together(
            *[lambda: wallet.batch(movements, key="b"), lambda: wallet.batch(movements[::-1])] * 8
        )
        assert all(isinstance(outcome, list) for outcome in outcomes), outcomes
        assert [one for one in outcomes[::2] if one != outcomes[0]] == []
        assert [wallet.account(account).balance for account in accounts] == [15 * 9] * 3
        check_books(wallet)


@pytest.mark.parametrize("operation", ["refund", "transfer", "hold", "capture", "release", "batch"])
def test_commit_of_every_operation_that_was_cut_off_but_happened_is_answered_with_the_truth(
    new_schema, postgres_server, operation
):
    with Wallet(new_schema(on=postgres_server)) as wallet, ThreadPoolExecutor(1) as thread:
        ada, bob = (wallet.register(name)[0].id for name in ("Ada", "Bob"))
        wallet.topup(ada, 100)
        charge, hold = wallet.charge(ada, 20), wallet.hold(ada, 30)
        call = {
            "refund": lambda: wallet.refund(ada, charge.id),
            "transfer": lambda: wallet.transfer(ada, bob, 10),
            "hold": lambda: wallet.hold(ada, 10),
            "capture": lambda: wallet.capture(ada, hold.id, 10),
            "release": lambda: wallet.release(ada, hold.id),
            "batch": lambda: wallet.batch(
                [{"account": one, "type": "topup", "amount": 10} for one in (ada, bob, ada)]
            ),
        }[operation]
        with standby_missing(postgres_server) as waiting:
            future = thread.submit(call)
            (backend,) = waiting()
            postgres_server.query("SELECT pg_terminate_backend(%s)", backend)
            done = future.result(timeout=30)
        assert (done[0] if operation == "batch" else done).replayed
        account = wallet.account(ada)
        assert (account.balance, account.available, wallet.account(bob).balance) == {
            "refund": (100, 70, 0),
            "transfer": (70, 40, 10),
            "hold": (80, 40, 0),
            "capture": (70, 70, 0),
            "release": (80, 80, 0),
            "batch": (100, 70, 10),
        }[operation]
        check_books(wallet)


@pytest.mark.parametrize(
    "operation", ["charge", "refund", "transfer", "hold", "capture", "release", "batch"]
)
def test_concurrent_sends_of_one_key_get_equal_answers_whatever_they_do(concurrent_dsn, operation):
    """Those that looked for the key before the first had committed look again, once they have the
    account.
    """
    with opened_by_several(concurrent_dsn) as wallets:
        wallet = wallets[0]
        ada, bob = (wallet.register(name)[0].id for name in ("Ada", "Bob"))
        wallet.topup(ada, 100)
        charge, hold = wallet.charge(ada, 20), wallet.hold(ada, 30)
        call = {
            "charge": lambda wallet: wallet.charge(ada, 50, key="k"),
            "refund": lambda wallet: wallet.refund(ada, charge.id, key="k"),
            "transfer": lambda wallet: wallet.transfer(ada, bob, 50, key="k"),
            "hold": lambda wallet: wallet.hold(ada, 50, key="k"),
            "capture": lambda wallet: wallet.capture(ada, hold.id, key="k"),
            "release": lambda wallet: wallet.release(ada, hold.id, key="k"),
            "batch": lambda wallet: wallet.batch(
                [
                    {"account": one, "type": "charge" if one == ada else "topup", "amount": 50}
                    for one in (ada, bob)
                ],
                key="k",
            ),
        }[operation]
        outcomes = together(*[partial(call, one) for one in wallets] * (16 // len(wallets)))
        assert [one for one in outcomes if one != outcomes[0]] == [], outcomes
        made = [one[0] if operation == "batch" else one for one in outcomes]
        assert sum(not one.replayed for one in made) == 1
        check_books(wallet)


def test_hold_that_has_ended_is_no_more_counted_as_expired_when_its_time_comes(dsn, monkeypatch):
    """Else whoever captures or releases a hold has its money twice from then on."""
    now_us = 10**15
    monkeypatch.setattr(time, "time_ns", lambda: now_us * 1000)
    with Wallet(dsn) as wallet:
        ada, _ = wallet.register("Ada")
        wallet.topup(ada.id, 100)
        captured, released, _ = (
            wallet.hold(ada.id, amount, expires_in_s=10) for amount in (10, 20, 30)
        )
        wallet.capture(ada.id, captured.id, 5)
        wallet.release(ada.id, released.id)
        assert wallet.account(ada.id).available == 65
        now_us += 10**7
        assert (wallet.account(ada.id).balance, wallet.account(ada.id).available) == (95, 95)
        wallet.hold(ada.id, 1)  # From now on the third is written down as expired.
        assert [one.status for one in wallet.holds(ada.id).holds] == [
            "active",
            "expired",
            "released",
            "captured",
        ]
        assert wallet.account(ada.id).available == 94
        with pytest.raises(InsufficientFunds) as refused:
            wallet.charge(ada.id, 95)
        assert refused.value.members == {"balance": 95, "available": 94, "required": 95}
        check_books(wallet)


def test_key_stands_for_the_charge_or_the_hold_it_came_with(wallet, ada):
    """Else a key sent again for another one would be answered as done, and nothing would have been."""
    wallet.topup(ada.id, 100)
    calls = (
        (wallet.refund, [wallet.charge(ada.id, 10) for _ in range(2)]),
        (wallet.capture, [wallet.hold(ada.id, 10) for _ in range(2)]),
        (wallet.release, [wallet.hold(ada.id, 10) for _ in range(2)]),
    )
    for call, (one, other) in calls:
        call(ada.id, one.id, key=call.__name__)
        with pytest.raises(IdempotencyKeyReused):
            call(ada.id, other.id, key=call.__name__)
    bob, cem = (wallet.register(name)[0].id for name in ("Bob", "Cem"))
    wallet.transfer(ada.id, bob, 1, key="t")
    with pytest.raises(IdempotencyKeyReused):
        wallet.transfer(ada.id, cem, 1, key="t")


def test_full_account_that_holds_all_it_has_is_refused_for_what_is_available(wallet, ada):
    wallet.topup(ada.id, AMOUNT_MAX)
    wallet.hold(ada.id, AMOUNT_MAX)
    with pytest.raises(InsufficientFunds) as refused:
        wallet.hold(ada.id, 1)
    assert refused.value.members == {"balance": AMOUNT_MAX, "available": 0, "required": 1}


OTHER_TYPES = ["refund", "transfer_in", "transfer_out", "hold", "release", "", None, 5, [], {}]


def test_batch_makes_topups_and_charges_only(api):
    """No refund without its charge, no transfer out of nowhere, and no fault for what is no string."""
    for type_ in OTHER_TYPES:
        body = {"transactions": [{"type": "topup", "amount": 5}, {"type": type_, "amount": 5}]}
        refused = api.send("POST", "/api/transactions/batch", body, status=422).json
        assert refused["errors"] == [
            {"pointer": "#/transactions/1/type", "detail": "must be topup or charge"}
        ]
        assert api.send("GET", "/api/account").json["balance"] == 0


@pytest.mark.slow_on("control")
@pytest.mark.parametrize("after_looks", [1, 2])
@pytest.mark.parametrize("careless", [False, True], ids=["wallet", "control"])
def test_nothing_comes_between_the_last_look_at_an_account_and_what_is_written(
    new_schema, postgres_server, monkeypatch, after_looks, careless
):
    """A charge that finds no money looks again, and at last with the account to itself."""
    dsn = new_schema(on=postgres_server)
    if careless:
        monkeypatch.setattr(wallet_postgres.PostgresTx, "row_lock", "/* none */")
    with Wallet(dsn) as wallet, Wallet(dsn) as other, ThreadPoolExecutor(2) as threads:
        ada, taken, looks = wallet.register("Ada")[0], [], []
        mine = threading.get_ident()

        def interfere(sql, rows):
            if threading.get_ident() != mine or "accounts" not in sql:
                return
            looks.append(sql)
            if len(looks) == after_looks:
                threads.submit(other.topup, ada.id, 5).result(timeout=30)
            if len(looks) == 3:
                taken.append(threads.submit(other.charge, ada.id, 5))
                if careless:
                    assert taken[0].result(timeout=30).balance == 0
                else:  # It waits until this is done.
                    wait_for_lock(postgres_server)

        watch_statements(monkeypatch, interfere)
        if careless:
            with pytest.raises(InsufficientFunds):
                wallet.charge(ada.id, 3)
            return
        assert wallet.charge(ada.id, 3).balance == 2
        assert isinstance(taken[0].exception(timeout=30), InsufficientFunds)
        assert len(looks) == 3
        check_books(wallet)


# Metadata and history #############################################################################

GOOD_METADATA = [
    {},
    {"a": ""},
    {"x" * 40: "y" * 500},
    {str(number): "z" * 500 for number in range(20)},
    {"ключ": "día \u2028 👩‍🚀"},
    {"b": "1", "a": "2"},
    {"=1+1": "@x"},
]


def test_metadata_comes_back_as_it_was_given(api):
    for metadata in GOOD_METADATA:
        shown = api.send(
            "POST", "/api/transactions/topup", {"amount": 5, "metadata": metadata}, status=201
        ).json
        assert list(shown["metadata"].items()) == list(metadata.items())
        assert api.send("GET", f"/api/transactions/{shown['id']}").json == shown
        assert api.send("GET", "/api/transactions").json["transactions"][0] == shown


BAD_METADATA = [
    [],
    "x",
    5,
    True,
    {"a": 1},
    {"a": None},
    {"a": {}},
    {"": "x"},
    {"x" * 41: ""},
    {"a": "y" * 501},
    {"a": "b\n"},
    {"a\t": "b"},
    {"a": "\ud800"},
    {"\x00": ""},
    {str(number): "" for number in range(21)},
]


def test_bad_metadata_is_refused_and_changes_nothing(api):
    for metadata in BAD_METADATA:
        answer = api.send(
            "POST", "/api/transactions/topup", {"amount": 5, "metadata": metadata}, status=422
        ).json
        assert [error["pointer"] for error in answer["errors"]] == ["#/metadata"]
        assert api.send("GET", "/api/account").json["balance"] == 0


def test_metadata_is_part_of_the_request_that_a_key_stands_for_in_any_order(wallet, ada):
    first = wallet.topup(ada.id, 5, metadata={"a": "1", "b": "2"}, key="k")
    assert wallet.topup(ada.id, 5, metadata={"b": "2", "a": "1"}, key="k") == first
    for other in ({"a": "1"}, {"a": "1", "b": "3"}, {}, None):
        with pytest.raises(IdempotencyKeyReused):
            wallet.topup(ada.id, 5, metadata=other, key="k")
    assert (
        wallet.topup(ada.id, 5, key="l", metadata={}).metadata
        == wallet.topup(ada.id, 5, key="l").metadata
        == {}
    )


@pytest.fixture
def dated(dsn, monkeypatch):
    """A wallet whose account has a topup of 1 at each of ten seconds from 2001-09-09T01:46:40Z on."""
    now_ns = 10**18
    monkeypatch.setattr(time, "time_ns", lambda: now_ns)
    with Wallet(dsn) as wallet:
        ada, token = wallet.register("Ada")
        for _ in range(10):
            wallet.topup(ada.id, 1)
            now_ns += 10**9
        yield SimpleNamespace(wallet=wallet, id=ada.id, api=Client(create_app(wallet), token))
        check_books(wallet)


HISTORY_OF_A_TIME = [
    ("since=2001-09-09T01:46:43Z", [4, 5, 6, 7, 8, 9, 10]),
    ("until=2001-09-09T01:46:43Z", [1, 2, 3]),
    ("since=2001-09-09T01:46:43Z&until=2001-09-09T01:46:45Z", [4, 5]),
    ("since=2001-09-09T01:46:42.0000001Z", [*range(3, 11)]),
    ("since=2001-09-09T01:46:42.000001Z", [*range(4, 11)]),
    ("since=2001-09-09%2001:46:43Z", [*range(4, 11)]),
    ("since=2001-09-09t03:46:43%2B02:00", [*range(4, 11)]),
    ("since=2001-09-09T03:46:43+02:00", [*range(4, 11)]),
    ("until=2001-09-08T20:16:43-05:30", [1, 2, 3]),
    ("since=0001-01-01T00:00:00Z&until=9999-12-31T23:59:59.999999Z", [*range(1, 11)]),
    ("since=2002-01-01T00:00:00Z", []),
    ("until=2001-01-01T00:00:00Z", []),
    ("type=charge&since=2001-09-09T01:46:43Z", []),
    ("since=2001-09-09T01:46:45Z&until=2001-09-09T01:46:43Z", []),
]


def test_history_of_a_time_is_half_open_and_honours_offsets(dated):
    for query, expected in HISTORY_OF_A_TIME:
        pages, path = [], f"?limit=3&{query}"
        while path:
            page = dated.api.send("GET", f"/api/transactions{path}", status=200)
            pages += page.json["transactions"]
            path = page.headers["Link"].split(">")[0][1:] if "Link" in page.headers else None
        assert [one["balance"] for one in pages] == expected[::-1]
        statement = dated.api.send("GET", f"/api/transactions.csv?{query}", status=200).text
        assert [int(line["balance"]) for line in lines_of(statement)] == expected
        feed = dated.api.send(
            "GET", f"/api/transactions?limit=100&after=0&{query}", status=200
        ).json
        assert [one["balance"] for one in feed["transactions"]] == expected


# What RFC 3339 allows, and what the wallet takes it for.
TIMES = {
    "2001-09-09T01:46:43Z": "2001-09-09T01:46:43.000000Z",
    "2001-09-09t01:46:43z": "2001-09-09T01:46:43.000000Z",
    "2001-09-09 01:46:43Z": "2001-09-09T01:46:43.000000Z",
    "2001-09-09T01:46:43.5Z": "2001-09-09T01:46:43.500000Z",
    "2001-09-09T01:46:43.123456789123Z": "2001-09-09T01:46:43.123456Z",
    "2001-09-09T01:46:43-00:00": "2001-09-09T01:46:43.000000Z",
    "2001-09-09T03:46:43+02:00": "2001-09-09T01:46:43.000000Z",
    "2001-09-08T20:16:43-05:30": "2001-09-09T01:46:43.000000Z",
    "2001-09-09T01:46:43+23:59": "2001-09-08T01:47:43.000000Z",
    "2000-02-29T00:00:00Z": "2000-02-29T00:00:00.000000Z",
    "1582-10-10T00:00:00Z": "1582-10-10T00:00:00.000000Z",
    "2016-12-31T23:59:60Z": "2017-01-01T00:00:00.000000Z",
    "2016-12-31T15:59:60.25-08:00": "2017-01-01T00:00:00.250000Z",
    "2012-07-01T05:29:60+05:30": "2012-07-01T00:00:00.000000Z",
    "0000-02-29T00:00:00Z": "0001-01-01T00:00:00.000000Z",
    "0001-01-01T00:00:00+23:59": "0001-01-01T00:00:00.000000Z",
    "9999-12-31T23:59:59.9999999-23:59": "9999-12-31T23:59:59.999999Z",
}
BAD_TIMES = [
    "",
    "now",
    "1000000000",
    "2001-09-09",
    "2001-09-09T01:46:43",
    "2001-09-09T01:46Z",
    "2001-9-9T1:46:43Z",
    "20010909T014643Z",
    "2001-W36-7T01:46:43Z",
    "2001-13-09T01:46:43Z",
    "2001-02-29T01:46:43Z",
    "0000-02-30T00:00:00Z",
    "2001-09-09T24:00:00Z",
    "2001-09-09T01:60:43Z",
    "2001-09-09T01:46:60Z",
    "2001-09-09T23:59:60Z",
    "2016-12-31T22:59:60Z",
    "2016-12-31T23:59:60-08:00",
    "2016-12-31T23:59:61Z",
    "2001-09-09T01:46:43.Z",
    "2001-09-09T01:46:43,5Z",
    "2001-09-09T01:46:43+24:00",
    "2001-09-09T01:46:43+14:60",
    "2001-09-09T01:46:43+2",
    "2001-09-09T01:46:43+0200",
    "2001-09-09T01:46:43+02:00:30",
    "2001-09-09T01:46:43Z\n",
    "\u06622001-09-09T01:46:43Z",
    "+002001-09-09T01:46:43Z",
    "-001-09-09T01:46:43Z",
]


def test_time_of_rfc_3339_is_taken_and_told_in_utc(dated):
    for sent, taken in TIMES.items():
        for query in {quote(sent), sent.replace(" ", "%20")}:  # A bare plus is one too.
            assert dated.api.send("GET", f"/api/account/balance?at={query}", status=200).json["at"] == taken
        counted = len(dated.wallet.transactions(dated.id, since=taken).transactions)
        assert len(dated.wallet.transactions(dated.id, since=sent).transactions) == counted


def test_time_that_is_not_of_rfc_3339_is_refused(dated):
    for time_ in BAD_TIMES:
        for path in ("transactions?since", "transactions.csv?until", "account/balance?at"):
            answer = dated.api.send("GET", f"/api/{path}={quote(time_)}", status=400).json
            assert answer["code"] == "malformed_request"
            assert "RFC 3339" in answer["detail"]


def test_times_in_process_are_aware_or_text(dated):
    moment = datetime(2001, 9, 9, 1, 46, 43, tzinfo=timezone.utc)
    for since in (moment, moment.isoformat(), moment.astimezone(timezone(timedelta(hours=-5)))):
        assert len(dated.wallet.transactions(dated.id, since=since).transactions) == 7
        assert dated.wallet.balance_at(dated.id, since) == 4
    for wrong in (moment.replace(tzinfo=None), 10**9, b"2001-09-09T01:46:43Z"):
        with pytest.raises(MalformedRequest, match="RFC 3339"):
            dated.wallet.transactions(dated.id, since=wrong)
    for call in (
        dated.wallet.transactions,
        dated.wallet.statement,
        dated.wallet.holds,
        lambda account_id: dated.wallet.balance_at(account_id, moment),
    ):
        with pytest.raises(AccountNotFound):
            call("acc_0000000000000000")


def test_balance_at_a_time_is_that_after_the_last_entry_until_then(dated):
    for at, utc, balance in (
        ("2001-09-09T01:46:39.999999Z", "2001-09-09T01:46:39.999999Z", 0),
        ("2001-09-09T01:46:40Z", "2001-09-09T01:46:40.000000Z", 1),
        ("2001-09-09T01:46:42.9z", "2001-09-09T01:46:42.900000Z", 3),
        ("2001-09-09T03:46:49+02:00", "2001-09-09T01:46:49.000000Z", 10),
        ("9999-12-31T23:59:59.9999999Z", "9999-12-31T23:59:59.999999Z", 10),
        ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000000Z", 0),
    ):
        past = dated.api.send("GET", f"/api/account/balance?at={at}", status=200).json
        assert past == {
            "id": dated.id,
            "name": "Ada",
            "currency": "USD",
            "currency_digits": 2,
            "balance": balance,
            "at": utc,
        }


def test_cursor_that_the_account_has_never_reached_is_refused(wallet, api):
    for amount in (1, 2):
        api.send("POST", "/api/transactions/topup", {"amount": amount}, status=201)
    api.send("POST", "/api/holds", {"amount": 1}, status=201)
    account = api.send("GET", "/api/account").json["id"].removeprefix("acc_")
    for path in (
        "transactions?after=txn",
        "transactions?cursor=txn",
        "transactions?type=charge&after=txn",
        "transactions?until=2001-01-01T00:00:00Z&after=txn",
        "holds?cursor=hld",
    ):
        api.send("GET", f"/api/{path}_{account}_3", status=200)
        for beyond in (4, 10**18 - 1):
            refused = api.send("GET", f"/api/{path}_{account}_{beyond}", status=409).json
            assert refused["code"] == "cursor_beyond_end"
            assert "restored from a backup" in refused["detail"]
    with pytest.raises(CursorBeyondEnd):
        wallet.transactions(f"acc_{account}", after=f"txn_{account}_4")
    with pytest.raises(CursorBeyondEnd):
        wallet.holds(f"acc_{account}", cursor=f"hld_{account}_4")


def test_feed_past_a_restored_backup_is_told_so_and_not_kept_waiting(file_dsn, tmp_path):
    with Wallet(file_dsn) as wallet:
        ada, _ = wallet.register("Ada")
        wallet.topup(ada.id, 1)
        wallet_books.back_up(wallet, f"{tmp_path}/backup.db")
        last = wallet.topup(ada.id, 2).id
        assert wallet.transactions(ada.id, after=last).transactions == []
    with Wallet(f"sqlite:///{tmp_path}/backup.db") as restored:
        with pytest.raises(CursorBeyondEnd):
            restored.transactions(ada.id, after=last)
        page = restored.transactions(ada.id, after="0")
        assert [one.amount for one in page.transactions] == [1]


def test_feed_gives_every_entry_once_however_it_is_polled_under_load(concurrent_dsn):
    """Three threads write while one polls; the control asks by time, as many do, and misses some."""
    with opened_by_several(concurrent_dsn) as wallets:
        wallet, (ada, _) = wallets[0], wallets[0].register("Ada")
        done = threading.Event()

        def poll():
            seen, after = [], "0"
            while True:
                last_round = done.is_set()
                page = wallet.transactions(ada.id, after=after, limit=7)
                seen += page.transactions
                after = page.transactions[-1].id if page.transactions else after
                if last_round and not page.transactions:
                    return seen

        def write(wallet):
            made = []
            for number in range(40):
                made.append(wallet.topup(ada.id, 1))
                if number % 4 == 0:
                    wallet.release(ada.id, wallet.hold(ada.id, 1).id)
            return made

        with ThreadPoolExecutor(4) as threads:
            polled = threads.submit(poll)
            written = [threads.submit(write, one) for one in (wallets * 3)[:3]]
            made = [one for thread in written for one in thread.result(timeout=60)]
            done.set()
            seen = polled.result(timeout=60)
        assert [one.balance for one in seen] == list(range(1, 121))
        assert sorted(seen, key=lambda one: one.balance) == sorted(
            made, key=lambda one: one.balance
        )


def test_feed_leads_on_by_link_and_takes_no_cursor_beside_it(api):
    ids = [api.send("POST", "/api/transactions/topup", {"amount": 5}).json["id"] for _ in range(3)]
    page = api.send("GET", "/api/transactions?after=0&limit=2", status=200)
    assert ([one["id"] for one in page.json["transactions"]], page.json["next_cursor"]) == (
        ids[:2],
        ids[1],
    )
    assert page.headers["Link"] == f'<?after={ids[1]}&limit=2>; rel="next"'
    page = api.send("GET", f"/api/transactions?after={ids[1]}&limit=2&type=topup", status=200)
    assert ([one["id"] for one in page.json["transactions"]], page.json["next_cursor"]) == (
        ids[2:],
        None,
    )
    assert api.send("GET", f"/api/transactions?after={ids[2]}").json == {
        "transactions": [],
        "next_cursor": None,
    }
    for bad in (
        f"after={ids[0]}&cursor={ids[1]}",
        "after=",
        "after=1",
        "after=txn_0000000000000000_1",
    ):
        api.send("GET", f"/api/transactions?{bad}", status=400)


def test_history_of_every_kind_is_found_without_passing_over_holds(file_wallet):
    """Else whoever holds and releases often makes each page slow."""
    accounts = [file_wallet.register(name)[0] for name in ("few", "many")]

    def fill(tx):
        row = "INSERT INTO transactions VALUES (?, ?, ?, 1, 0, NULL, NULL, 'x', ?, ?, 0)"
        for account, count in zip(accounts, (200, 30_000), strict=True):
            tx("UPDATE accounts SET last_sequence = ? WHERE id = ?", count, account.id)
            for number in range(1, count + 1):
                tx(
                    row,
                    account.id,
                    number,
                    "topup" if number < 3 or number > count - 2 else "hold",
                    f"k{number}",
                    "f" * 64,
                )

    file_wallet.database.write(fill)
    steps = {}
    for account in accounts:
        for filters in ({}, {"after": "0"}, {"type": "topup"}):
            file_wallet.transactions(
                account.id, **filters
            )  # Prepares the statements, which counts too.
            counted = []
            file_wallet.database._idle_readers[0].set_progress_handler(lambda: counted.append(1), 1)  # noqa: B023
            assert len(file_wallet.transactions(account.id, **filters).transactions) == 4
            file_wallet.database._idle_readers[0].set_progress_handler(None, 1)
            steps.setdefault(str(filters), []).append(len(counted))
    assert all(few > 0 and abs(many - few) < 20 for few, many in steps.values()), steps
    file_wallet.database.write(lambda tx: tx("DELETE FROM transactions"))
    file_wallet.database.write(lambda tx: tx("UPDATE accounts SET last_sequence = 0"))


FORMULAS = [
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    " =1",
    "\u3000=1",
    "x;=1+1",
    "x; =1",
    "\uff1d1",
    "\uff0d1",
    "\uff0b1",
    "\uff201",
    '";=1;"',
    ';"=1;"',
    '=HYPERLINK("http://x","y")',
    "-2+3+cmd|' /C calc'!A0",
]


def lines_of(statement):
    """Return the lines of a statement, as a client reads it that wants to know if it is whole."""
    *lines, last = csv.DictReader(io.StringIO(statement))
    assert last.pop("id") == f"transactions in this statement: {len(lines)}"
    assert set(last.values()) == {""}
    return lines


def cells(text, delimiter):
    """Return every cell as a spreadsheet of some country would have it."""
    return [cell for line in csv.reader(io.StringIO(text), delimiter=delimiter) for cell in line]


def test_statement_has_no_cell_that_a_spreadsheet_takes_for_a_formula(wallet):
    for formula in FORMULAS:
        ada, token = wallet.register(formula)
        wallet.topup(ada.id, 5, formula, metadata={formula[:40]: formula})
        text = (
            Client(create_app(wallet), token).send("GET", "/api/transactions.csv", status=200).text
        )
        for delimiter in (",", ";"):
            found = [
                cell
                for cell in cells(text, delimiter)
                if re.match(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]", cell)
            ]
            assert found == []
        (line,) = lines_of(text)
        assert line["description"].replace("'", "") == formula.replace("'", "")


def test_statement_is_the_whole_history_as_csv(wallet):
    (ada, token), (bob, _) = wallet.register("Ada"), wallet.register("Bob")
    wallet.topup(ada.id, 100, 'say "hi", día', metadata={"b": "ü", "a": "2"})
    wallet.refund(ada.id, wallet.charge(ada.id, 20).id, 5)
    wallet.transfer(ada.id, bob.id, 10)
    wallet.capture(ada.id, wallet.hold(ada.id, 30).id, 7)
    api = Client(create_app(wallet), token)
    answer = api.send("GET", "/api/transactions.csv", status=200)
    assert answer.headers["Content-Type"] == "text/csv; charset=utf-8"
    assert answer.headers["Content-Disposition"] == 'attachment; filename="transactions.csv"'
    assert answer.text.startswith(
        "id,created_at,type,amount,balance,description,reference,metadata,currency,currency_digits\r\n"
    )
    shown = api.send("GET", "/api/transactions?after=0").json["transactions"]
    lines = lines_of(answer.text)
    assert {(line.pop("currency"), line.pop("currency_digits")) for line in lines} == {("USD", "2")}
    assert (
        lines
        == [
            {
                name: json.dumps(value, ensure_ascii=False)
                if value and name == "metadata"
                else str(value or "")
                for name, value in one.items()
            }
            for one in shown
        ]
        != []
    )
    head = api.send("HEAD", "/api/transactions.csv", status=200)
    assert (head.body, "Content-Length" in head.headers) == (b"", False)
    only = api.send("GET", "/api/transactions.csv?type=refund", status=200).text
    assert [line["type"] for line in lines_of(only)] == ["refund"]
    assert lines_of(api.send("GET", "/api/transactions.csv?since=9999-01-01T00:00:00Z").text) == []
    for _ in range(wallet_module.STATEMENTS_MAX + 1):  # Each has given its place back.
        api.send("GET", "/api/transactions.csv", status=200)
        api.send("HEAD", "/api/transactions.csv", status=200)


@pytest.mark.slow
@pytest.mark.parametrize("wallet", ["file", "postgres"], indirect=True)
def test_statement_of_any_length_takes_little_memory(wallet, ada):
    fill_with_topups(wallet, ada.id, 5500)
    tracemalloc.start()
    try:
        length = sum(map(len, wallet_statements.to_csv(wallet, ada.id)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        assert len(b"".join(wallet_statements.to_csv(wallet, ada.id))) == length
        control = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2_500_000 < 3_000_000 < length < control


def test_statement_is_the_history_of_the_moment_it_was_asked_for(wallet, ada, monkeypatch):
    monkeypatch.setattr(wallet_module, "STATEMENT_ROWS", 2)
    for amount in range(1, 6):
        wallet.topup(ada.id, amount)
    entries = wallet.statement(ada.id)
    seen = [next(entries)]
    wallet.topup(ada.id, 6)
    assert [one.amount for one in [*seen, *entries]] == [1, 2, 3, 4, 5]


def test_history_among_holds_has_each_entry_once_and_in_order_whatever_the_page(
    wallet, ada, monkeypatch
):
    """Where holds fill what is read at once, the rest is read by type, and put together again."""
    bob, _ = wallet.register("Bob")
    made = [wallet.topup(ada.id, 100), wallet.topup(bob.id, 100)][:1]
    for number in range(1, 5):
        for _ in range(number):
            wallet.release(ada.id, wallet.hold(ada.id, 1).id)
        made += [wallet.topup(ada.id, 5), wallet.charge(ada.id, 3)]
        made += [wallet.refund(ada.id, made[-1].id, 1), wallet.transfer(ada.id, bob.id, 2)]
        wallet.transfer(bob.id, ada.id, 1)
        made += wallet.transactions(ada.id, limit=1).transactions
        made += [wallet.capture(ada.id, wallet.hold(ada.id, 1).id)]
    for limit in range(1, 12):
        for name, start, expected in (("after", "0", made), ("cursor", None, made[::-1])):
            seen, position = [], start
            while position is not None or not seen:
                page = wallet.transactions(ada.id, limit=limit, **{name: position})
                assert 0 < len(page.transactions) <= limit
                seen, position = seen + page.transactions, page.next_cursor
            assert seen == expected
        monkeypatch.setattr(wallet_module, "STATEMENT_ROWS", limit)
        assert list(wallet.statement(ada.id)) == made
        for type in wallet_module.SIGN_BY_TYPE:
            assert list(wallet.statement(ada.id, type=type)) == [
                one for one in made if one.type == type
            ]


def test_cursor_that_is_outside_of_the_time_asked_for_widens_nothing(dated):
    entries = dated.wallet.transactions(dated.id, after="0").transactions
    until, since = "2001-09-09T01:46:43Z", "2001-09-09T01:46:47Z"

    def balances(**filters):
        return [one.balance for one in dated.wallet.transactions(dated.id, **filters).transactions]

    assert balances(cursor=entries[8].id, until=until) == [3, 2, 1]
    assert balances(cursor=entries[2].id, until=until) == [2, 1]
    assert balances(after=entries[2].id, since=since) == [8, 9, 10]
    assert balances(after=entries[8].id, since=since) == [10]
    assert (
        balances(cursor=entries[2].id, since=since)
        == balances(after=entries[8].id, until=until)
        == []
    )


# Tokens, the issuer and freezing ##################################################################


def test_replaced_token_is_dead_at_once_in_every_process(durable_dsn):
    with Wallet(durable_dsn) as wallet, Wallet(durable_dsn) as other:
        ada, old = wallet.register("Ada")
        api, elsewhere = Client(create_app(wallet), old), Client(create_app(other), old)
        elsewhere.send("GET", "/api/account", status=200)
        answer = api.send("POST", "/api/account/token", status=201).json
        new = answer.pop("token")
        assert answer == api_json(wallet.account(ada.id))
        assert re.fullmatch("wlt_[0-9A-Za-z]{54}", new)
        for client in (api, elsewhere):
            client.send("GET", "/api/account", status=401)
            client.send("POST", "/api/account/token", status=401)
            client.token = new
            client.send("GET", "/api/account", status=200)
            client.token = old
        stored = wallet.database.read(lambda tx: tx("SELECT * FROM accounts"))
        assert new not in repr(stored)


def api_json(record):
    return json.loads(json.dumps(wallet_module._to_json(record)))


def test_token_that_is_replaced_while_a_request_runs_moves_nothing_and_tells_nothing(wallet, ada):
    old = wallet.replace_token(ada.id)
    charge = wallet.topup(ada.id, 100) and wallet.charge(ada.id, 50, key="charge")
    hold, bob = wallet.hold(ada.id, 10), wallet.register("Bob")[0]
    requests = [
        partial(wallet.topup, ada.id, 5),
        partial(wallet.charge, ada.id, 5),
        partial(wallet.charge, ada.id, 1000),
        partial(wallet.charge, ada.id, 50, key="charge"),
        partial(wallet.refund, ada.id, charge.id, 1),
        partial(wallet.transfer, ada.id, bob.id, 1),
        partial(wallet.hold, ada.id, 1),
        partial(wallet.capture, ada.id, hold.id, 1),
        partial(wallet.release, ada.id, hold.id),
        partial(wallet.batch, [{"type": "topup", "amount": 1}] * 2, account_id=ada.id),
    ]
    new = wallet.replace_token(ada.id)
    before = wallet.account(ada.id), wallet.transactions(ada.id), wallet.holds(ada.id)
    for request in requests:
        with pytest.raises(Unauthorized):
            request(token=old)
    assert (wallet.account(ada.id), wallet.transactions(ada.id), wallet.holds(ada.id)) == before
    with pytest.raises(Unauthorized):
        wallet.topup("acc_" + "x" * 16, 5, token=new)
    assert wallet.topup(ada.id, 5, token=new).balance == 55


def test_of_many_who_replace_one_token_at_once_one_succeeds(concurrent_dsn):
    with Wallet(concurrent_dsn) as wallet:
        ada, old = wallet.register("Ada")
        outcomes = together(*[lambda: wallet.replace_token(ada.id, old)] * 16)
        (new,) = (outcome for outcome in outcomes if isinstance(outcome, str))
        assert sum(isinstance(outcome, Unauthorized) for outcome in outcomes) == 15
        assert wallet.authenticate(new) == ada
        issued = wallet.replace_token(ada.id)  # Whoever embeds it need not know the old one.
        assert wallet.authenticate(issued) == ada
        with pytest.raises(Unauthorized):
            wallet.authenticate(new)
        with pytest.raises(AccountNotFound):
            wallet.replace_token("acc_0000000000000000")
        other, others = wallet.register("Bob")
        for wrong in ("", others, new, 5):
            with pytest.raises(Unauthorized):
                wallet.replace_token(ada.id, wrong)
        assert (wallet.authenticate(issued), wallet.authenticate(others)) == (ada, other)


def test_token_whose_replacing_was_cut_off_at_commit_is_the_one_that_is_shown(
    new_schema, postgres_server
):
    with Wallet(new_schema(on=postgres_server)) as wallet, ThreadPoolExecutor(1) as thread:
        ada, old = wallet.register("Ada")
        with standby_missing(postgres_server) as waiting:
            future = thread.submit(wallet.replace_token, ada.id, old)
            (backend,) = waiting()
            postgres_server.query("SELECT pg_terminate_backend(%s)", backend)
            waiting()  # It is being done again.
        assert wallet.authenticate(future.result(timeout=30)) == ada


def test_with_an_issuer_only_its_token_makes_and_fills_accounts(shop):
    anyone = Client(shop.app)
    assert anyone.send("POST", "/api/register", {"name": "Eve"}, status=401).headers[
        "WWW-Authenticate"
    ]
    charge = shop.ada.send("POST", "/api/transactions/charge", {"amount": 30}, status=201).json[
        "id"
    ]
    for path, body in (
        ("/api/register", {"name": "Eve"}),
        ("/api/transactions/topup", {"amount": 5}),
        (f"/api/transactions/{charge}/refund", {}),
    ):
        refused = shop.ada.send("POST", path, body, status=403).json
        assert refused["detail"] == "This wallet has an issuer, and this route needs its token."
    batch = {"transactions": [{"type": "charge", "amount": 5}, {"type": "topup", "amount": 5}]}
    refused = shop.ada.send("POST", "/api/transactions/batch", batch, status=403).json
    assert (refused["code"], refused["index"]) == ("forbidden", 1)
    del batch["transactions"][1]
    shop.ada.send("POST", "/api/transactions/batch", batch, status=201)
    assert shop.ada.send("GET", "/api/account").json["balance"] == 65


def test_issuer_does_for_an_account_all_that_the_account_does_for_itself(shop):
    """What it makes is what the account sees, and the other way round."""

    def send(method, tail, body=None, status=200, **headers):
        return shop.issuer.send(method, shop.path + tail, body, status=status, **headers)

    bob = shop.issuer.send("POST", "/api/register", {"name": "Bob"}, status=201).json["id"]
    charge = send("POST", "/transactions/charge", {"amount": 30}, 201, Idempotency_Key="c")
    again = send("POST", "/transactions/charge", {"amount": 30}, 201, Idempotency_Key="c")
    assert again.json == charge.json
    assert again.headers["Idempotent-Replayed"] == "true"
    charge = charge.json["id"]
    refund = send("POST", f"/transactions/{charge}/refund", {"amount": 10}, 201).json
    assert (refund["balance"], refund["reference"]) == (80, charge)
    assert send("POST", f"/transactions/{charge}/refund", None, 201).json["amount"] == 20
    sent = send("POST", "/transactions/transfer", {"to": bob, "amount": 40}, 201).json
    assert (sent["type"], sent["reference"], sent["balance"]) == ("transfer_out", bob, 60)
    held, other = (
        send("POST", "/holds", {"amount": amount}, 201).json["id"] for amount in (20, 15)
    )
    assert send("GET", "").json == shop.ada.send("GET", "/api/account").json
    assert [send("GET", "").json[name] for name in ("available", "holds_active")] == [25, 2]
    assert send("POST", f"/holds/{held}/capture", {"amount": 5}, 201).json["reference"] == held
    assert send("POST", f"/holds/{other}/release", None, 201).json["status"] == "released"
    for tail in (f"/transactions/{charge}", "/transactions?limit=2", f"/holds/{held}", "/holds"):
        near, far = send("GET", tail), shop.ada.send("GET", f"/api{tail}", status=200)
        assert (near.json, near.headers.get("Link")) == (far.json, far.headers.get("Link"))
    assert send("GET", "/transactions.csv").body == shop.ada.send("GET", "/api/transactions.csv").body
    at = refund["created_at"]
    past = send("GET", f"/balance?at={at}").json
    assert past == shop.ada.send("GET", f"/api/account/balance?at={at}").json
    assert (past["balance"], past["at"]) == (80, at)
    assert send("POST", "/freeze").json["frozen"] is True
    refused = send("POST", "/transactions/topup", {"amount": 5}, 403).json
    assert refused["code"] == "account_frozen"
    assert send("POST", "/unfreeze", {}).json == shop.ada.send("GET", "/api/account").json
    assert send("GET", "").json["frozen"] is False
    replaced = send("POST", "/token", status=201).json
    shop.ada.send("GET", "/api/account", status=401)
    shop.ada.token = replaced.pop("token")
    assert shop.ada.send("GET", "/api/account", status=200).json == replaced


def test_issuer_that_asks_about_nothing_is_told_so(shop):
    for path in ("/api/accounts/acc_0000000000000000", "/api/accounts/acc_1", "/api/accounts/"):
        shop.issuer.send("GET", path, status=404)
    nobody = "/api/accounts/acc_0000000000000000"
    for method, tail, body in (
        ("GET", "/transactions", None),
        ("GET", "/transactions.csv", None),
        ("GET", "/holds", None),
        ("GET", "/balance?at=2026-11-22T09:30:30Z", None),
        ("POST", "/transactions/topup", {"amount": 5}),
        ("POST", "/holds", {"amount": 5}),
        ("POST", "/freeze", None),
        ("POST", "/unfreeze", None),
        ("POST", "/token", None),
    ):
        refused = shop.issuer.send(method, nobody + tail, body, status=404).json
        assert refused["code"] == "account_not_found"
    assert shop.wallet.database.read(lambda tx: tx("SELECT * FROM issuer_keys")) == []
    bob = shop.wallet.register("Bob")[0].id
    topup = shop.wallet.topup(bob, 5).id
    refused = shop.issuer.send("GET", f"{shop.path}/transactions/{topup}", status=404).json
    assert refused["code"] == "not_found"


def test_issuer_makes_a_batch_over_many_accounts(shop):
    bob = shop.issuer.send("POST", "/api/register", {"name": "Bob"}, status=201).json["id"]
    movements = [
        {"account": account, "type": type, "amount": 5}
        for account in (shop.id, bob)
        for type in ("topup", "charge")
    ]

    def batch(status, *accounts):
        body = {"transactions": [one for one in movements if one["account"] in accounts]}
        path = "/api/transactions/batch"
        return shop.issuer.send("POST", path, body, Idempotency_Key="b", status=status)

    made = batch(201, shop.id, bob)
    assert [one["balance"] for one in made.json["transactions"]] == [105, 100, 5, 0]
    assert batch(201, shop.id, bob).headers["Idempotent-Replayed"] == "true"
    assert batch(422, bob).json["code"] == "idempotency_key_reused"
    movements[2]["amount"] = 1
    refused = shop.issuer.send(
        "POST", "/api/transactions/batch", {"transactions": movements}, status=402
    ).json
    assert refused["index"] == 3
    assert shop.wallet.account(bob).balance == 0


def test_key_of_the_issuer_has_its_effect_in_one_account_however_it_is_sent(shop):
    """Also at once: both would be done where each account only looked at its own keys."""
    bob = shop.issuer.send("POST", "/api/register", {"name": "Bob"}, status=201).json["id"]

    def topup(account, key, amount=5, client=shop.issuer):
        path = f"/api/accounts/{account}/transactions/topup"
        return client.send("POST", path, {"amount": amount}, Idempotency_Key=key)

    assert topup(shop.id, "k").status_int == 201
    refused = topup(bob, "k")
    assert (refused.status_int, refused.json["code"]) == (422, "idempotency_key_reused")
    path = f"/api/accounts/{bob}/holds"
    shop.issuer.send("POST", path, {"amount": 1}, Idempotency_Key="k", status=422)
    assert topup(shop.id, "k").headers["Idempotent-Replayed"] == "true"
    assert topup(shop.id, "k", 6).json["code"] == "idempotency_key_reused"
    # What had no effect leaves the key free.
    shop.wallet.freeze(shop.id)
    assert topup(shop.id, "free").status_int == 403
    assert topup(bob, "free").status_int == 201
    shop.wallet.freeze(shop.id, False)
    # An account's own keys are none of the issuer's, and none of another account's.
    for client in (shop.ada, Client(shop.app, shop.wallet.replace_token(bob))):
        body = {"amount": 1}
        client.send("POST", "/api/transactions/charge", body, Idempotency_Key="k", status=201)
    before = shop.wallet.account(shop.id).balance, shop.wallet.account(bob).balance
    for round in range(10):
        accounts = [shop.id, bob] * 4
        clients = [Client(shop.app, ISSUER_TOKEN) for _ in accounts]
        answers = together(
            *[
                partial(topup, account, f"race {round}", client=client)
                for account, client in zip(accounts, clients, strict=True)
            ]
        )
        done = {one.json["id"] for one in answers if one.status_int == 201}
        assert (len(done), {one.status_int for one in answers}) == (1, {201, 422})
    after = shop.wallet.account(shop.id).balance, shop.wallet.account(bob).balance
    assert sum(after) - sum(before) == 10 * 5
    check_books(shop.wallet)


def test_key_of_the_issuer_that_had_its_effect_has_none_elsewhere_whatever_is_asked_with_it(shop):
    bob, cleo = (shop.wallet.register(name)[0].id for name in ("Bob", "Cleo"))
    shop.wallet.topup(bob, 1000)
    own, topup = f"/api/accounts/{bob}", f"{shop.path}/transactions/topup"
    charge = shop.wallet.charge(bob, 10).id
    held, other = (shop.wallet.hold(bob, 5).id for _ in range(2))
    batch = [{"account": one, "type": "topup", "amount": 1} for one in (bob, cleo)]
    for path, body in {
        f"{own}/transactions/topup": {"amount": 1}, f"{own}/transactions/charge": {"amount": 1},
        f"{own}/transactions/transfer": {"to": shop.id, "amount": 1},
        f"{own}/transactions/{charge}/refund": {"amount": 1}, f"{own}/holds": {"amount": 1},
        f"{own}/holds/{held}/capture": {"amount": 1}, f"{own}/holds/{other}/release": None,
        "/api/transactions/batch": {"transactions": batch},
    }.items():
        shop.issuer.send("POST", topup, {"amount": 1}, Idempotency_Key=f"1 {path}", status=201)
        before = shop.wallet.account(bob), shop.wallet.account(shop.id)
        refused = shop.issuer.send("POST", path, body, Idempotency_Key=f"1 {path}", status=422).json
        assert refused["code"] == "idempotency_key_reused", path
        assert (shop.wallet.account(bob), shop.wallet.account(shop.id)) == before
        shop.issuer.send("POST", path, body, Idempotency_Key=f"2 {path}", status=201)
        before = shop.wallet.account(shop.id)
        refused = shop.issuer.send("POST", topup, {"amount": 2}, Idempotency_Key=f"2 {path}", status=422).json
        assert refused["code"] == "idempotency_key_reused", path
        assert shop.wallet.account(shop.id) == before
    check_books(shop.wallet)


def test_account_cannot_take_the_issuers_keys_before_it(shop):
    reserved = wallet_module._reserve_key("issuer k")
    for key in ("k", "issuer k", reserved, reserved.encode().decode("latin-1"), reserved[1:]):
        status = 201 if key.isascii() else 400
        shop.ada.send(
            "POST", "/api/transactions/charge", {"amount": 1}, Idempotency_Key=key, status=status
        )
    path = f"{shop.path}/transactions/topup"
    done = shop.issuer.send("POST", path, {"amount": 5}, Idempotency_Key="k")
    assert (done.status_int, done.json["amount"]) == (201, 5)


def test_issuer_lists_accounts_by_page_name_and_time(shop):
    names = ["Bob", "Bobby", "bob", "Ümit", "Bo_b", "Bo%b"]
    made = [shop.wallet.register(name)[0] for name in names]
    newest_first = [api_json(one) for one in (*made[::-1], shop.wallet.account(shop.id))]

    def ask(query=""):
        return shop.issuer.send("GET", f"/api/accounts{query}", status=200)

    assert ask().json == {"accounts": newest_first, "next_cursor": None}
    found, answer = [], ask("?limit=3")
    while True:
        found += answer.json["accounts"]
        if not (cursor := answer.json["next_cursor"]):
            break
        assert answer.headers["Link"] == f'<?limit=3&cursor={cursor}>; rel="next"'
        shop.wallet.register("Later")  # It shifts nothing.
        answer = ask(f"?limit=3&cursor={cursor}")
    assert found == newest_first
    for part, expected in (
        ("Bob", ["bob", "Bobby", "Bob"]),
        ("BBY", ["Bobby"]),
        ("o_", ["Bo_b"]),
        ("o%25", ["Bo%b"]),
        ("!", []),
        ("%C3%9C", ["Ümit"]),
        ("%C3%BC", []),
        ("MIT", ["Ümit"]),
        ("Bobby+", []),
    ):
        page = ask(f"?name={part}").json["accounts"]
        assert [one["name"] for one in page] == expected
    first, last = (quote(made[index].created_at.isoformat()) for index in (1, 4))
    between = ask(f"?since={first}&until={last}").json["accounts"]
    assert [one["name"] for one in between] == ["Ümit", "bob", "Bobby"]
    cursor = made[2].id
    rest = ask(f"?since={first}&until={last}&cursor={cursor}&name=B").json["accounts"]
    assert [one["name"] for one in rest] == ["Bobby"]
    assert ask(f"?since={first}&until={first}").json["accounts"] == []
    for query in (
        "limit=0", "limit=101", "cursor=", "cursor=acc_0000000000000000", "cursor=x%00", "since=x",
        "until=", "name=%00", "name=" + "x" * 101, "x=1", "limit=1&limit=2",
    ):  # fmt: skip
        refused = shop.issuer.send("GET", f"/api/accounts?{query}", status=400).json
        assert refused["code"] == "malformed_request"


def test_accounts_that_were_made_in_one_microsecond_are_all_listed(wallet):
    made = {wallet.register(f"Account {number}")[0].id for number in range(7)}
    wallet.database.write(lambda tx: tx("UPDATE accounts SET created_at = 1"))
    listed, cursor = [], None
    while True:
        page = wallet.account_page(limit=2, cursor=cursor)
        listed += [one.id for one in page.accounts]
        if not (cursor := page.next_cursor):
            break
    assert listed == sorted(made, reverse=True)


def test_a_cursor_widens_no_filter(wallet):
    old, middle, new = (wallet.register(name)[0] for name in ("A", "B", "C"))
    assert [one.id for one in wallet.account_page(cursor=new.id, until=middle.created_at).accounts] == [old.id]


def test_accounts_of_one_microsecond_are_all_yielded(wallet, monkeypatch):
    monkeypatch.setattr(wallet_module, "ACCOUNTS_ROWS", 2)
    made = {wallet.register(f"Account {number}")[0].id for number in range(7)}
    wallet.database.write(lambda tx: tx("UPDATE accounts SET created_at = 1"))
    assert [one.id for one in wallet.accounts()] == sorted(made, reverse=True)


def test_feed_of_an_empty_account_is_in_order():
    with Wallet() as wallet:
        ada = wallet.register("Ada")[0].id
        feed = wallet.follow(ada, poll_s=0.01)
        made = [wallet.topup(ada, 1).id for _ in range(3)]
        assert [next(feed).id for _ in range(3)] == made


def test_holds_are_listed_by_status(wallet, ada, monkeypatch):
    wallet.topup(ada.id, 1000)
    active, captured, released, expiring = (
        wallet.hold(ada.id, amount, expires_in_s=60 if amount == 4 else None).id
        for amount in (1, 2, 3, 4)
    )
    wallet.capture(ada.id, captured)
    wallet.release(ada.id, released)
    assert wallet.account(ada.id).holds_active == 2
    monkeypatch.setattr(wallet_module, "_now_us", lambda: time.time_ns() // 1000 + 120_000_000)
    api = Client(create_app(wallet), wallet.replace_token(ada.id))
    for _ in range(2):  # Before the tables know that one has expired, and after.
        assert wallet.account(ada.id).holds_active == 1
        for status, expected in (
            ("active", active), ("captured", captured), ("released", released),
            ("expired", expiring),
        ):  # fmt: skip
            page = api.send("GET", f"/api/holds?status={status}", status=200).json
            assert [(one["id"], one["status"]) for one in page["holds"]] == [(expected, status)]
        end_expired(wallet, ada.id)
    for _ in range(4):
        wallet.release(ada.id, wallet.hold(ada.id, 1).id)
    second = wallet.hold(ada.id, 1).id
    page = api.send("GET", "/api/holds?limit=1&status=active", status=200)
    assert (page.json["holds"][0]["id"], page.json["next_cursor"]) == (second, second)
    assert page.headers["Link"] == f'<?limit=1&status=active&cursor={second}>; rel="next"'
    page = api.send("GET", f"/api/holds?status=active&cursor={second}", status=200).json
    assert ([one["id"] for one in page["holds"]], page["next_cursor"]) == ([active], None)
    for status in ("", "Active", "all", "a%25"):
        api.send("GET", f"/api/holds?status={status}", status=400)


def test_active_holds_are_found_without_those_that_are_over():
    """The plan of SQLite says it, for time would not be the same everywhere."""
    with Wallet() as wallet:
        for sql, index in (
            (wallet_module.ACTIVE_HOLDS, "active_holds"),
            (wallet_module.HOLDS, "sqlite_autoindex_holds_1"),
        ):
            asked = f"EXPLAIN QUERY PLAN {sql}", *[5] * sql.count("?")
            plan = wallet.database.read(lambda tx, asked=asked: tx(*asked))
            found = [row[3] for row in plan if "INDEX" in row[3] and "transactions" not in row[3]]
            assert any(index in one for one in found), plan
            assert any("sequence>" in one for one in found) != (index == "active_holds"), plan


def test_wallet_says_in_what_it_keeps_money_and_whether_it_has_an_issuer(wallet):
    for issuer in (None, ISSUER_TOKEN):
        told = Client(create_app(wallet, issuer)).send("GET", "/api/wallet", status=200).json
        assert told == {"currency": "USD", "currency_digits": 2, "has_issuer": bool(issuer)}


@pytest.mark.parametrize(
    "token",
    [
        *sorted(set(ISSUER_TOKEN)),
        ISSUER_TOKEN[:-1],
        ISSUER_TOKEN + "x",
        ISSUER_TOKEN.upper(),
        "x",
    ],
)
def test_what_is_only_like_the_issuers_token_is_refused(token):
    with Wallet() as wallet:
        app = create_app(wallet, ISSUER_TOKEN)
        Client(app, token).send("POST", "/api/register", {"name": "Eve"}, status=401)
        Client(app, token).send("GET", "/api/accounts", status=401)


def test_without_an_issuer_its_token_and_an_account_in_the_body_mean_nothing(api, wallet):
    Client(create_app(wallet), ISSUER_TOKEN).send("GET", "/api/account", status=401)
    body = {"account": "acc_0000000000000000", "amount": 5}
    assert (
        api.send("POST", "/api/transactions/topup", body, status=422).json["errors"][0]["pointer"]
        == "#/account"
    )


@pytest.mark.slow_on("spaced", "ended")
@pytest.mark.parametrize(
    "issuer_token",
    ["x" * 31, "x" * 31 + " ", "ü" * 40, "x" * 40 + "\n", "wlt_" + "x" * 40],
    ids=["short", "spaced", "foreign", "ended", "an account's"],
)
def test_issuer_token_that_is_weak_or_no_bearer_can_send_is_refused_and_not_shown(
    tmp_path, issuer_token
):
    with pytest.raises(ConfigurationError, match="at least 32 characters") as refused:
        create_app(Wallet(), issuer_token)
    assert issuer_token not in str(refused.value)
    done = command("--port", "0", cwd=tmp_path, WALLET_ISSUER_TOKEN=issuer_token)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert re.fullmatch(
        r"wallet: WALLET_ISSUER_TOKEN must have at least 32 characters[^\n]*\n"
        r"|wallet: --issuer-token or WALLET_ISSUER_TOKEN has a control character[^\n]*\n",
        done.stderr,
    )
    assert issuer_token.strip() not in done.stderr


def test_issuer_is_taken_from_the_environment_and_by_a_throwaway_wallet_too(monkeypatch):
    monkeypatch.setenv("WALLET_DSN", "sqlite://")
    monkeypatch.setenv("WALLET_ISSUER_TOKEN", ISSUER_TOKEN)
    app = create_app()
    Client(app).send("POST", "/api/register", {"name": "Eve"}, status=401)
    Client(app, ISSUER_TOKEN).send("POST", "/api/register", {"name": "Ada"}, status=201)
    app.wallet.close()
    monkeypatch.delenv("WALLET_ISSUER_TOKEN")
    app = create_app(issuer_token=ISSUER_TOKEN)
    Client(app).send("POST", "/api/register", {"name": "Eve"}, status=401)
    app.wallet.close()
    with running(issuer_token=ISSUER_TOKEN) as url:
        assert send(url, "POST", "/api/register", {"name": "Eve"})[0] == 401
        assert send(url, "POST", "/api/register", {"name": "Ada"}, ISSUER_TOKEN)[0] == 201


def test_frozen_account_can_be_read_and_receives_nothing_and_spends_nothing(wallet):
    (ada, token), (bob, _) = wallet.register("Ada"), wallet.register("Bob")
    api = Client(create_app(wallet), token)
    before = wallet.topup(ada.id, 100, key="before")
    wallet.topup(bob.id, 100)
    charge, hold = wallet.charge(ada.id, 10), wallet.hold(ada.id, 20)
    wallet.freeze(ada.id)
    wallet.freeze(ada.id)
    for path, body in (
        ("transactions/topup", {"amount": 1}),
        ("transactions/charge", {"amount": 1}),
        ("transactions/transfer", {"to": bob.id, "amount": 1}),
        (f"transactions/{charge.id}/refund", {}),
        ("holds", {"amount": 1}),
        (f"holds/{hold.id}/capture", {}),
        (f"holds/{hold.id}/release", {}),
        ("transactions/batch", {"transactions": [{"type": "topup", "amount": 1}]}),
        ("transactions/charge", {"amount": 10**6}),
    ):
        assert api.send("POST", f"/api/{path}", body, status=403).json["code"] == "account_frozen"
    with pytest.raises(AccountFrozen):
        wallet.transfer(bob.id, ada.id, 5)
    assert wallet.topup(ada.id, 100, key="before") == before  # It was done, and is no new effect.
    shown = api.send("GET", "/api/account", status=200).json
    assert (shown["frozen"], shown["balance"], shown["available"]) == (True, 90, 70)
    for path in (
        "transactions",
        "transactions.csv",
        f"transactions/{charge.id}",
        "holds",
        f"holds/{hold.id}",
    ):
        api.send("GET", f"/api/{path}", status=200)
    wallet.freeze(ada.id, False)
    assert wallet.release(ada.id, hold.id).status == "released"
    assert wallet.transfer(bob.id, ada.id, 5).balance == 95
    with pytest.raises(AccountNotFound):
        wallet.freeze("acc_0000000000000000")


@pytest.mark.slow_on("postgres")
def test_commands_freeze_and_unfreeze_an_account_of_a_wallet_that_runs(durable_dsn, tmp_path):
    with served("--dsn", durable_dsn) as server:
        url = server.url
        _, _, made = send(url, "POST", "/api/register", {"name": "Ada"})
        for name, status in (("freeze", 403), ("unfreeze", 201)):
            done = command(name, made["id"], WALLET_DSN=durable_dsn)
            assert (done.returncode, done.stderr) == (0, "")
            assert (
                done.stdout == f"{made['id']} is {'frozen' if name == 'freeze' else 'not frozen'}\n"
            )
            assert (
                send(url, "POST", "/api/transactions/topup", {"amount": 5}, made["token"])[0]
                == status
            )
    unknown = command("freeze", "acc_0000000000000000", WALLET_DSN=durable_dsn)
    assert (unknown.returncode, unknown.stderr) == (2, "wallet: There is no such account.\n")
    (tmp_path / "empty").mkdir()
    missing = command("freeze", made["id"], cwd=tmp_path / "empty")
    assert missing.returncode == 2
    assert "cannot open" in missing.stderr
    assert list((tmp_path / "empty").iterdir()) == []
    assert "Example: python wallet.py freeze" in command("freeze", "--help").stdout


def test_token_that_another_replaced_between_the_look_and_the_write_replaces_nothing(
    wallet, ada, monkeypatch
):
    look, winner = wallet.authenticate, []

    def overtaken(token):
        account = look(token)
        monkeypatch.setattr(wallet, "authenticate", look)
        winner.append(wallet.replace_token(account.id, token))
        return account

    old = wallet.replace_token(ada.id)
    monkeypatch.setattr(wallet, "authenticate", overtaken)
    with pytest.raises(Unauthorized) as refused:
        wallet.replace_token(ada.id, old)
    assert "invalid_token" in refused.value.headers["WWW-Authenticate"]
    assert wallet.authenticate(winner[0]) == ada


SENSELESS_BATCHES = [None, 5, "x", {}, [], [7], [None], ["topup"], [[]], [{"type": []}]]


def test_batch_that_makes_no_sense_is_refused_alike_where_there_is_an_issuer(shop):
    for transactions in SENSELESS_BATCHES:
        for client in (shop.ada, shop.issuer):
            refused = client.send(
                "POST", "/api/transactions/batch", {"transactions": transactions}, status=422
            ).json
            assert refused["code"] == "validation_failed"


def test_keys_of_the_issuer_are_none_that_a_transfer_becomes_elsewhere(shop):
    bob = shop.issuer.send("POST", "/api/register", {"name": "Bob"}, status=201).json["id"]
    body = {"to": bob, "amount": 5}
    shop.ada.send("POST", "/api/transactions/transfer", body, Idempotency_Key="t", status=201)
    path = f"/api/accounts/{bob}/transactions/topup"
    done = shop.issuer.send(
        "POST", path, {"amount": 5}, Idempotency_Key=f"{shop.id} 1 t", status=201
    )
    assert done.json["balance"] == 10


def test_of_a_body_that_is_too_large_no_more_is_read_than_shows_it(wallet):
    _, token = wallet.register("Ada")
    for path, bytes_max in (
        ("topup", BODY_BYTES_MAX),
        ("batch", wallet_module.BATCH_BODY_BYTES_MAX),
    ):
        body, answers = io.BytesIO(b" " * 2**22), []
        environ = {
            "REQUEST_METHOD": "POST",
            "PATH_INFO": f"/api/transactions/{path}",
            "CONTENT_LENGTH": str(2**22),
            "CONTENT_TYPE": "application/json",
            "HTTP_AUTHORIZATION": f"Bearer {token}",
            "wsgi.input": body,
        }
        create_app(wallet)(environ, lambda line, headers, answers=answers: answers.append(line))
        assert (answers[0][:3], body.tell()) == ("413", bytes_max + 1)


def test_token_that_was_replaced_while_a_request_to_replace_it_ran_replaces_nothing(
    wallet, ada, monkeypatch
):
    look, winner = wallet.authenticate, []

    def overtaken(token):
        account = look(token)
        monkeypatch.setattr(wallet, "authenticate", look)
        winner.append(wallet.replace_token(account.id))
        return account

    api = Client(create_app(wallet), wallet.replace_token(ada.id))
    monkeypatch.setattr(wallet, "authenticate", overtaken)
    answer = api.send("POST", "/api/account/token", status=401)
    assert "invalid_token" in answer.headers["WWW-Authenticate"]
    assert wallet.authenticate(winner[0]) == ada


@pytest.mark.slow_on("postgres")
@pytest.mark.parametrize("length", [None, "", "0"])
def test_no_body_is_none_however_a_server_says_so(wallet, ada, length):
    token, answers = wallet.replace_token(ada.id), []
    environ = {
        "REQUEST_METHOD": "POST",
        "PATH_INFO": "/api/account/token",
        "HTTP_AUTHORIZATION": f"Bearer {token}",
        "wsgi.input": io.BytesIO(),
        **({} if length is None else {"CONTENT_LENGTH": length}),
    }
    create_app(wallet)(environ, lambda line, headers: answers.append(line))
    assert answers == ["201 Created"]


def test_database_of_the_first_version_gets_every_index_and_its_times_go_on(durable_dsn):
    """What is made anew has all indexes, and each account goes on from its own latest time, even
    one to come.
    """
    ids, digest = [f"acc_{letter * 16}" for letter in "AB"], "0" * 64
    database = wallet_module.open_database(durable_dsn, 1, True)
    for statement in schema_of(1):
        database.write(lambda tx, sql=statement: tx(sql))
    for account_id in ids:
        database.write(
            lambda tx, one=account_id: tx(
                "INSERT INTO accounts VALUES (?, 'x', ?, 2, 2, 1000)", one, digest
            )
        )
    times = {ids[0]: (4 * 10**15, 3 * 10**15), ids[1]: (1500, 1200)}
    for account_id, both in times.items():
        for sequence, time_us in enumerate(both, 1):
            database.write(
                lambda tx, row=(account_id, sequence, sequence, f"k{sequence}", digest, time_us): (
                    tx("INSERT INTO transactions VALUES (?, ?, 'topup', 1, ?, NULL, ?, ?, ?)", *row)
                )
            )
    database.close()
    with Wallet(durable_dsn) as wallet:
        for account_id, (latest_us, _) in times.items():
            kept = [
                wallet_module._as_us(one.created_at)
                for one in wallet.transactions(account_id).transactions
            ]
            assert kept == [latest_us, latest_us]
            assert wallet_module._as_us(wallet.topup(account_id, 1).created_at) >= latest_us
        sql = (
            "SELECT name, tbl_name FROM sqlite_master WHERE type = 'index'"
            if durable_dsn.startswith("sqlite")
            else "SELECT indexname, tablename FROM pg_indexes WHERE schemaname = current_schema()"
        )
        assert {
            ("transactions_by_type", "transactions"),
            ("refunds_by_charge", "transactions"),
            ("active_holds", "holds"),
        } <= set(wallet.database.read(lambda tx: tx(sql)))
        check_books(wallet)


def test_detail_names_three_errors_and_errors_has_twenty(api):
    body = {"amount": 5, **{f"x{number}": 1 for number in range(30)}}
    refused = api.send("POST", "/api/transactions/topup", body, status=422).json
    assert len(refused["errors"]) == 20
    assert refused["detail"].count("#/x") == 3


def test_issuer_token_that_is_given_comes_before_the_environments(monkeypatch):
    monkeypatch.setenv("WALLET_DSN", "sqlite://")
    monkeypatch.setenv("WALLET_ISSUER_TOKEN", ISSUER_TOKEN[::-1])
    app = create_app(issuer_token=ISSUER_TOKEN)
    for token, status in ((ISSUER_TOKEN, 201), (ISSUER_TOKEN[::-1], 401)):
        Client(app, token).send("POST", "/api/register", {"name": "Ada"}, status=status)
    app.wallet.close()


# Promise 4: no input crashes it ###################################################################

BAD_AMOUNTS = [
    "0",
    "-1",
    "1.0",
    "1.5",
    "5e0",
    "1e999",
    '"5"',
    "true",
    "false",
    "null",
    "[]",
    "{}",
    "[5]",
    str(AMOUNT_MAX + 1),
    str(2**63),
    str(2**64),
    "9" * 20,
    "-" + "9" * 30,
    "1" * 5000,
]


@pytest.mark.slow_on("postgres")
@pytest.mark.parametrize("path", ["topup", "charge"])
@pytest.mark.parametrize("amount", BAD_AMOUNTS, ids=lambda amount: amount[:20])
def test_bad_amount_is_refused_and_changes_nothing(api, path, amount):
    api.send("POST", "/api/transactions/topup", {"amount": 100})
    raw = f'{{"amount": {amount}}}'.encode()
    answer = api.send("POST", f"/api/transactions/{path}", raw=raw, status=422)
    assert answer.json["code"] == "validation_failed"
    assert [error["pointer"] for error in answer.json["errors"]] == ["#/amount"]
    assert f"integer from 1 to {AMOUNT_MAX}" in answer.json["detail"]
    assert len(api.send("GET", "/api/transactions").json["transactions"]) == 1


@pytest.mark.slow_on("postgres")
@pytest.mark.parametrize(
    "amount", [0, -1, 1.0, "5", True, None, AMOUNT_MAX + 1, 2**63, float("nan"), b"5"]
)
def test_bad_amount_in_process_is_refused_alike(wallet, ada, amount):
    with pytest.raises(ValidationFailed) as refusal:
        wallet.topup(ada.id, amount)
    assert [error["pointer"] for error in refusal.value.errors] == ["#/amount"]


BAD_TEXTS = [
    5,
    True,
    [],
    {},
    "line\nbreak",
    "tab\t",
    "nul\x00",
    "\x1b[31m",
    "\x7f",
    "\x85",
    "\ud800",
    "a\udfff",
]


@pytest.mark.slow_on("postgres")
@pytest.mark.parametrize("name", [*BAD_TEXTS, None, "", " ", "\u2003", "x" * 101, " \nAda"])
def test_bad_name_is_refused(api, wallet, name):
    answer = api.send("POST", "/api/register", {"name": name}, status=422)
    assert [error["pointer"] for error in answer.json["errors"]] == ["#/name"]
    with pytest.raises(ValidationFailed):
        wallet.register(name)


@pytest.mark.slow_on("postgres")
@pytest.mark.parametrize("description", [*BAD_TEXTS, "x" * 501])
def test_bad_description_is_refused_and_changes_nothing(api, description):
    body = {"amount": 5, "description": description}
    answer = api.send("POST", "/api/transactions/topup", body, status=422)
    assert [error["pointer"] for error in answer.json["errors"]] == ["#/description"]
    assert api.send("GET", "/api/account").json["balance"] == 0


@pytest.mark.parametrize(
    "text", ["x", "Ada Łovelace", "李", "👩‍🚀" * 20, "x" * 100, "<b>&amp;'\"\\", "=1+1"]
)
def test_good_text_comes_back_as_it_was_given(api, text):
    account = api.send("POST", "/api/register", {"name": f"  {text}\u2003"}, status=201).json
    assert account["name"] == text
    done = api.send(
        "POST", "/api/transactions/topup", {"amount": 5, "description": text * 5}, status=201
    )
    assert done.json["description"] == text * 5
    listed = api.send("GET", "/api/transactions").json["transactions"]
    assert listed == [done.json]


def test_description_is_null_where_it_is_null_or_missing(api):
    for body in ({"amount": 5}, {"amount": 5, "description": None}):
        assert (
            api.send("POST", "/api/transactions/topup", body, status=201).json["description"]
            is None
        )


def test_all_field_errors_come_at_once_with_pointers(api):
    body = {"amonut": 5, "a/b~c d": 1, "\ud800": 2, "description": 7}
    answer = api.send("POST", "/api/transactions/topup", body, status=422)
    amount = f"must be an integer from 1 to {AMOUNT_MAX}, in minor units (1250 for 12.50 dollars)"
    unknown = "is not known; known are: amount, description, metadata"
    assert [tuple(error.values()) for error in answer.json["errors"]] == [
        ("#/amount", f"is missing; it {amount}"),
        ("#/description", "must be a string"),
        ("#/amonut", unknown),
        ("#/a~1b~0c%20d", unknown),
        ("#/%3F", unknown),
    ]
    many = api.send("POST", "/api/register", {str(number): 1 for number in range(5000)}, status=422)
    assert [error["pointer"] for error in many.json["errors"]] == [
        "#/name",
        *[f"#/{number}" for number in range(19)],
    ]


MALFORMED = {
    "empty": b"",
    "space": b" ",
    "cut": b'{"amount": 5',
    "twice": b'{"amount": 5} {"amount": 5}',
    "text": b"amount=5",
    "array": b"[]",
    "string": b'"x"',
    "number": b"5",
    "null": b"null",
    "byte order mark": b"\xef\xbb\xbf{}",
    "same key twice": b'{"amount": 5, "amount": 500}',
    "deep same key twice": b'{"amount": {"a": 1, "a": 2}}',
    "NaN": b'{"amount": NaN}',
    "Infinity": b'{"amount": -Infinity}',
    "comment": b'{"amount": 5} //',
    "trailing comma": b'{"amount": 5,}',
    "single quotes": b"{'amount': 5}",
    "leading zero": b'{"amount": 05}',
    "bad UTF-8": b'{"amount": 5, "description": "\xff"}',
    "UTF-16": '{"amount": 5}'.encode("utf-16"),
    "raw control": b'{"amount": 5, "description": "\n"}',
    "deep array": b"[" * 50_000,
    "nul": b"\x00",
    "deep object": b'{"amount":' * 6_000,
    "deep and closed": b'{"amount":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
}


@pytest.mark.slow_on("postgres")
@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_body_is_refused_and_changes_nothing(api, raw):
    answer = api.send("POST", "/api/transactions/topup", raw=raw, status=400)
    assert answer.json["code"] == "malformed_request"
    assert api.send("GET", "/api/account").json["balance"] == 0


def test_body_may_be_nested_10_deep_and_no_deeper_whatever_the_interpreter_allows(api):
    for depth, status in ((10, 422), (11, 400), (500, 400)):
        amount = 5
        for number in range(depth - 1):
            amount = {'"[': 0, "x": amount} if number % 2 else [[], amount] if number else [amount]
        answer = api.send("POST", "/api/transactions/topup", {"amount": amount}, status=status)
        assert ("nested too deeply" in answer.json["detail"]) == (status == 400)
    api.send(
        "POST", "/api/transactions/topup", {"amount": 5, "description": '\\"[{' * 50}, status=201
    )
    for raw in (b'"' + b"[" * 50 + b'"', b'"' + b"[{" * 50 + b"\\", b"]" * 50 + b"[" * 50_000):
        api.send("POST", "/api/transactions/topup", raw=raw, status=400)


@pytest.mark.slow_on("postgres")
@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 201),
        ("application/json; charset=utf-8", 201),
        ("Application/JSON ;x=y", 201),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("application/jsonp", 415),
        ("", 415),
    ],
)
def test_body_must_be_declared_as_json(api, content_type, status):
    api.send(
        "POST", "/api/transactions/topup", {"amount": 5}, Content_Type=content_type, status=status
    )


def test_body_may_have_64_kib_and_no_more(api):
    fitting = b'{"amount": 5}'.ljust(BODY_BYTES_MAX)
    api.send("POST", "/api/transactions/topup", raw=fitting, status=201)
    answer = api.send("POST", "/api/transactions/topup", raw=fitting + b" ", status=413)
    assert answer.json["code"] == "body_too_large"
    assert api.send("GET", "/api/account").json["balance"] == 5


@pytest.mark.slow_on("postgres")
@pytest.mark.parametrize(
    ("length", "terminated", "status"),
    [
        ("13", False, 201),
        ("", True, 201),
        ("", False, 400),
        ("x", False, 400),
        ("-1", False, 400),
        ("5", False, 400),
    ],
)
def test_other_servers_may_tell_the_length_of_a_body_otherwise(wallet, length, terminated, status):
    _, token = wallet.register("Ada")
    environ = {
        "REQUEST_METHOD": "POST",
        "PATH_INFO": "/api/transactions/topup",
        "CONTENT_TYPE": "application/json",
        "HTTP_AUTHORIZATION": f"Bearer {token}",
        "CONTENT_LENGTH": length,
        "wsgi.input": io.BytesIO(b'{"amount": 5}'),
        "wsgi.input_terminated": terminated,
    }
    answers = []
    create_app(wallet)(environ, lambda line, headers: answers.append(line))
    assert answers[0].startswith(str(status))


@pytest.mark.slow_on("postgres")
@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=101",
        "limit=-1",
        "limit=1.0",
        "limit=",
        "limit=x",
        "limit=%D9%A1",
        "limit=1e1",
        "limit=+1",
        "limit=1&limit=2",
        "cursor=",
        "cursor=x",
        "cursor=txn_0000000000000000_1",
        "type=",
        "type=gift",
        "type=TOPUP",
        "typ=topup",
        "limit",
        "&",
        "limit=%FF",
        "limit=5;type=topup",
        "limit=" + "9" * 5000,
    ],
)
def test_bad_query_parameter_is_refused(api, query):
    assert (
        api.send("GET", f"/api/transactions?{query}", status=400).json["code"]
        == "malformed_request"
    )


@pytest.mark.slow_on("postgres")
@pytest.mark.parametrize("path", ["/api/transactions/topup", "/livez", "/", "/api/register"])
def test_query_parameter_of_no_meaning_is_refused_everywhere(api, path):
    method, body = (
        ("POST", {"amount": 5}) if "register" in path or "topup" in path else ("GET", None)
    )
    answer = api.send(method, f"{path}?dry_run=true", body, status=400)
    assert "takes no parameters" in answer.json["detail"]


@pytest.mark.slow_on("postgres")
@pytest.mark.parametrize(
    "path",
    [
        "/api",
        "/api/",
        "/api/account/",
        "/ap%C4%B1/account",
        "/api/acc%FFount",
        "/x<script>",
        "/api/transactions/",
        "/api/transactions/5",
        "/api/transactions/%0d%0aX:1",
        "//api/account",
        "/api/../wallet.py",
        "/wallet.py",
        "/schema.sql",
    ],
)
def test_unknown_route_is_404(api, path):
    assert api.send("GET", path, status=404).json["code"] == "not_found"


@pytest.mark.slow_on("postgres")
@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/api/register", "POST"),
        ("DELETE", "/api/account", "GET, HEAD"),
        ("PUT", "/api/account", "GET, HEAD"),
        ("GET", "/api/transactions/topup", "POST"),
        ("HEAD", "/api/transactions/charge", "POST"),
        ("OPTIONS", "/api/transactions", "GET, HEAD"),
        ("DELETE", "/api/holds", "GET, HEAD, POST"),
        ("POST", "/livez", "GET, HEAD"),
        ("PATCH", "/", "GET, HEAD"),
        ("DELETE", "/api/transactions/txn_0000000000000000_1", "GET, HEAD"),
    ],
)
def test_wrong_method_is_405_and_names_the_right_ones(api, method, path, allow):
    assert api.send(method, path, status=405).headers["Allow"] == allow


def test_head_answers_as_get_does_without_a_body(api):
    got, head = (
        api.send("GET", "/api/account", status=200),
        api.send("HEAD", "/api/account", status=200),
    )
    assert head.body == b""
    assert head.headers["Content-Length"] == got.headers["Content-Length"] == str(len(got.body))


def test_bug_answers_500_as_json_and_only_the_log_has_the_traceback(wallet, caplog):
    class Broken(Wallet):
        def register(self, name):
            raise RuntimeError("secret detail")

    with Broken() as broken:
        api = Client(create_app(broken))
        answer = api.send(
            "POST", "/api/register", {"name": "Ada"}, X_Request_Id="req-7", status=500
        )
    assert answer.json["code"] == "internal_error"
    assert "secret" not in answer.text
    assert "RuntimeError: secret detail" in caplog.text
    assert "request req-7 failed" in caplog.text


@pytest.mark.slow_on("postgres")
@pytest.mark.parametrize(
    ("sent", "echoed"),
    [
        ("req-7", True),
        ("A.b_c-9" * 10, True),
        ("x" * 100, True),
        ("x" * 101, False),
        ("a b", False),
        ("é", False),
        ("<script>", False),
        ("", False),
        (WRONG_TOKEN, False),
    ],
)
def test_request_id_is_echoed_if_it_is_sane(api, sent, echoed):
    answer = api.send("GET", "/livez", X_Request_Id=sent)
    assert (answer.headers["X-Request-Id"] == sent) == echoed


ANY_REQUEST = st.tuples(
    st.sampled_from(["GET", "POST", "HEAD", "PUT"]) | ANY_TEXT,
    st.deferred(lambda: st.sampled_from([path_of(rule.partition(" ")[2]) for rule in ROUTES]))
    | like("/api/transactions/txn_0_1", "/"),
    st.just("") | like("limit=5", "at=2026-11-22T09:30:00Z"),
    ANY_BODY,
    st.none() | like("13"),
    like("order-17"),
)


@pytest.mark.parametrize("examples", [30, torture(20_000)])
@pytest.mark.parametrize("name", PARSERS)
def test_whatever_comes_a_parser_returns_what_is_within_its_rules_or_refuses_it(
    name, examples, report
):
    check_parser(*PARSERS[name], examples)
    report(f"{examples:,} examples, no fault, and none was taken that is out of the rules")


@pytest.mark.parametrize("examples", [100, torture(20_000)])
def test_whatever_request_comes_to_the_application_is_no_fault(examples, report):
    def ask(request):
        method, path, query, body, length, key = request
        environ = {
            "REQUEST_METHOD": method,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "HTTP_IDEMPOTENCY_KEY": key,
            "CONTENT_TYPE": "application/json",
            "CONTENT_LENGTH": length or str(len(body)),
            "HTTP_AUTHORIZATION": f"Bearer {token}",
            "HTTP_X_REQUEST_ID": path,
            "wsgi.input": io.BytesIO(body),
        }
        b"".join(app(environ, lambda line, headers: statuses.update([int(line[:3])])))
        return max(statuses)

    statuses = Counter()
    with Wallet() as wallet:
        app, token = create_app(wallet), wallet.register("Ada")[1]
        check_parser(ANY_REQUEST, ask, lambda highest, sent: highest < 500, examples)
        check_books(wallet)
    report(f"{examples:,} examples: {dict(statuses)}")


# Promise 5: nobody sees or moves another account's money ##########################################


def test_only_these_routes_are_open():
    """The router itself says what there is."""
    known = {name: route.config.get("access") for name, route in ROUTES.items()}
    without_issuer = routes_of(create_app(Wallet(), metrics=True))
    open_routes = {
        name for name in without_issuer if known[name] in ("public", "issuer")
    }
    assert open_routes == OPEN_ROUTES
    assert {name for name in known if known[name] == "public"} == OPEN_ROUTES - {"POST /api/register"}
    assert known.keys() - without_issuer.keys() == {
        name for name in known if re.search("/api/(accounts|overview)", name)
    }
    assert {known[name] for name in known.keys() - without_issuer.keys()} == {"issuer"}


MALFORMED = ["", "Basic QWRhOng=", "Bearer", "Bearer ", WRONG_TOKEN, f"Bearer: {WRONG_TOKEN}"]

INVALID = [
    "Bearer x",
    f"Bearer {WRONG_TOKEN}",
    f"Bearer {WRONG_TOKEN}, Bearer {WRONG_TOKEN}",
    f"Bearer {WRONG_TOKEN} x",
    "Bearer wlt_é",
]

# What is asked where there is an issuer: by whom, as the paths have it.
ISSUERS = re.compile("^/api/(accounts|overview|register)")
MONEY = re.compile("^/api/transactions/(topup|<.*>/refund)$")  # It comes in by the issuer alone.


class Matrix:
    """Every route of the router, asked by everyone: what is not as specified is a violation."""

    def __init__(self, wallet, app):
        self.wallet, self.app, self.api, self.violations = wallet, app, Client(app), []
        (self.ada, self.revoked), (self.eve, self.foreign) = (
            wallet.register("Ada L."),
            wallet.register("Eve"),
        )
        self.issuer = ISSUER_TOKEN if app.has_issuer else None
        self.bob = wallet.register("Bob")[0]
        for account in (self.ada, self.eve):
            wallet.topup(account.id, 1000, key="topup")
        self.charge = wallet.charge(self.ada.id, 500, key="of Ada's")
        self.right = wallet.replace_token(self.ada.id)

    def run(self):
        """Ask all that there is.

        Return how many requests were sent, and which route gave which wrong answer.
        """
        self.sent = 0
        for name in ROUTES:
            self.route, (self.method, rule) = name, name.split()
            self.try_route(rule)
        return self.sent, self.violations

    def ask(self, path, authorization, body=None, **headers):
        """Send a request.

        Return its status, its headers without what is made for each request, and its body.
        """
        if authorization is not None:
            headers["Authorization"] = authorization
        self.sent += 1
        answer = self.api.send(self.method, path, body, **headers)
        kept = sorted(
            (name, value) for name, value in answer.headers.items() if name != "X-Request-Id"
        )
        return answer.status_int, kept, answer.body

    def expect(self, is_so, *seen):
        if not is_so:
            self.violations.append((self.route, *seen))

    def refused(self, status, path, authorization, body, challenge=None):
        """Ask for what is to be refused.

        Return the answer, having seen that all tables are what they were.
        """
        before = self.tables()
        headers = {"Idempotency_Key": "of Ada's"} if self.method == "POST" else {}
        answer = self.ask(path, authorization, body, **headers)
        self.expect(
            answer[0] == status and dict(answer[1]).get("WWW-Authenticate") == challenge,
            authorization,
            answer,
        )
        self.expect(self.tables() == before, authorization, "something was changed")
        self.expect(not self.shows_ada(answer), authorization, answer)
        return answer

    def shows_ada(self, answer):
        return any(
            hers.encode() in answer[2] for hers in (self.ada.id[4:], self.ada.name, self.right)
        )

    def tables(self):
        return [
            sorted(
                self.wallet.database.read(lambda tx, table=table: tx(f"SELECT * FROM {table}")),
                key=repr,
            )
            for table in ("wallet", "accounts", "transactions", "holds", "issuer_keys")
        ]

    def try_route(self, rule):
        hold = self.wallet.hold(self.ada.id, 2)
        path = path_of(rule, self.charge.id, hold.id, self.ada.id)
        last = rule.split("/")[-1]
        body = BODIES.get(last, {"to": self.bob.id, "amount": 1}) if self.method == "POST" else None
        # Without an issuer, all that is its own is not there.
        if not self.issuer and rule.startswith(("/api/accounts", "/api/overview")):
            for authorization in (None, f"Bearer {self.right}", f"Bearer {ISSUER_TOKEN}"):
                self.refused(404, path, authorization, body)
            return
        by_issuer = self.issuer and ISSUERS.search(rule)
        if self.route in OPEN_ROUTES and not by_issuer:
            for authorization in (None, *MALFORMED, *INVALID, f"Bearer {self.right}"):
                answer = self.ask(path, authorization, body)
                self.expect(answer[0] in (200, 201), authorization, answer)
            return
        realm = 'Bearer realm="wallet"'
        for authorization in (None, *MALFORMED):
            self.refused(401, path, authorization, body, realm)
        others = [f"Bearer {ISSUER_TOKEN[:-1]}{'x' if self.issuer else ISSUER_TOKEN[-1]}"]
        for authorization in (*INVALID, *others, f"Bearer {self.revoked}"):
            self.refused(401, path, authorization, body, f'{realm}, error="invalid_token"')
        if by_issuer:
            for token in (self.right, self.foreign):
                self.refused(403, path, f"Bearer {token}", body)
            self.try_issuer(rule, path, hold, body)
            return
        if self.issuer and MONEY.search(rule):
            for token in (self.right, self.foreign, self.issuer):
                self.refused(403, path, f"Bearer {token}", body)
            return
        self.try_foreign(rule, path, hold, body)
        if self.issuer and last == "batch":
            movement = {"account": self.ada.id, "type": "topup", "amount": 1}
            self.succeed(path, self.issuer, {"transactions": [movement]})
        elif self.issuer:
            self.refused(403, path, f"Bearer {self.issuer}", body)
        answer = self.succeed(path, self.right, body)
        if rule == "/api/account/token":
            self.right = json.loads(answer[2])["token"]

    def succeed(self, path, token, body):
        answer = self.ask(path, f"Bearer {token}", body)
        made = self.method == "POST" and not path.endswith("freeze")
        self.expect(answer[0] == (201 if made else 200), answer)
        return answer

    def try_issuer(self, rule, path, hold, body):
        """See that the issuer does this for the account that it names, and for that alone."""
        others = self.eve.id, "acc_0000000000000000"
        if "_id:" in rule.partition("<account")[2].partition(">")[2]:
            for account_id in others:  # Ada's transaction or hold is none of theirs.
                wrong = path_of(rule, self.charge.id, hold.id, account_id)
                self.refused(404, wrong, f"Bearer {self.issuer}", body)
        elif "<" in rule:
            nobodys = path_of(rule, account_id=others[1])
            self.refused(404, nobodys, f"Bearer {self.issuer}", body)
        answer = self.succeed(path, self.issuer, body)
        if rule.endswith("/token"):
            self.right = json.loads(answer[2])["token"]
        self.wallet.freeze(self.ada.id, False)

    def try_foreign(self, rule, path, hold, body):
        """See that Eve, whose token is valid, finds of Ada's exactly what she finds of nobody's."""
        eve = f"Bearer {self.foreign}"
        pairs = [(path, path_of(rule), 404)] if "<" in rule else []
        if self.route in ("GET /api/transactions", "GET /api/holds"):
            own = self.charge.id if "transactions" in rule else hold.id
            nobodys = own[:4] + "0" * 16 + own[20:]
            pairs += [
                (f"{rule}?{name}={own}", f"{rule}?{name}={nobodys}", 400)
                for name in ("cursor", "after")
            ]
        for foreign, unknown, status in pairs:
            answers = [self.refused(status, one, eve, body) for one in (foreign, unknown)]
            self.expect(answers[0] == answers[1], answers)
        if rule.endswith("/transfer"):
            self.refused(404, path, eve, {"to": "acc_0000000000000000", "amount": 1})
        if "<" not in rule and self.method == "GET":
            answer = self.ask(path, eve)
            self.expect(answer[0] == 200 and not self.shows_ada(answer), "foreign", answer)


class ForgetfulApp(wallet_module.App):
    """Forgets on one route to look at the secret of a token."""

    def _authenticate(self, environ, takes, arguments):
        token = environ.get("HTTP_AUTHORIZATION", "")[7:]
        if (
            environ["PATH_INFO"] == "/api/holds"
            and environ["REQUEST_METHOD"] == "GET"
            and WRONG_TOKEN not in token
        ):
            return self.wallet.account(wallet_module._parse_token(token))
        return super()._authenticate(environ, takes, arguments)


class CarelessApp(wallet_module.App):
    """Lets an account's token in where the account is named in the path."""

    def _authenticate(self, environ, takes, arguments):
        try:
            return super()._authenticate(environ, takes, arguments)
        except Forbidden:
            if not re.search("accounts/.*csv", environ["PATH_INFO"]):
                raise
            return None


class TrustingApp(wallet_module.App):
    """Takes whose transaction it is from its id, and not from the token."""

    def _authenticate(self, environ, takes, arguments):
        caller = super()._authenticate(environ, takes, arguments)
        if "transaction_id" in arguments and environ["REQUEST_METHOD"] == "GET":
            with contextlib.suppress(AccountNotFound):
                return self.wallet.account(f"acc_{arguments['transaction_id'][4:20]}")
        return caller


@pytest.mark.slow_on("postgres")
@pytest.mark.parametrize("issuer_token", [None, ISSUER_TOKEN], ids=["open", "issuer"])
def test_every_route_answers_only_who_has_the_right_token(wallet, issuer_token):
    sent, violations = Matrix(wallet, create_app(wallet, issuer_token, metrics=True)).run()
    assert violations == []
    assert re.search(rf"\b{sent} (requests|with an issuer)", README)


@pytest.mark.parametrize(
    ("kind", "issuer_token", "wrong"),
    [
        (ForgetfulApp, None, "GET /api/holds"),
        (TrustingApp, None, "GET /api/transactions/<transaction_id:re:txn_[0-9A-Za-z]{16}_[0-9]+>"),
        (
            CarelessApp,
            ISSUER_TOKEN,
            "GET /api/accounts/<account_id:re:acc_[0-9A-Za-z]{16}>/transactions.csv",
        ),
    ],
)
def test_control_a_route_that_forgets_a_check_is_found(kind, issuer_token, wrong):
    with Wallet() as wallet:
        app = kind(wallet, issuer_token, metrics=True)
        assert {route for route, *_ in Matrix(wallet, app).run()[1]} == {wrong}


def test_scheme_is_matched_in_any_case(wallet):
    _, token = wallet.register("Ada")
    api = Client(create_app(wallet))
    for scheme in ("Bearer", "bearer", "BEARER", "Bearer "):
        api.send("GET", "/api/account", Authorization=f"{scheme} {token}", status=200)


def test_every_token_but_the_right_one_is_refused_alike(wallet):
    _, token = wallet.register("Ada")
    other_secret = wallet_module._make_token("acc_" + token[4:20])
    typo = token[:30] + ("x" if token[30] != "x" else "y") + token[31:]
    api, answers = Client(create_app(wallet)), set()
    for wrong in (
        WRONG_TOKEN,
        other_secret,
        typo,
        token[:-1],
        token + "0",
        token.swapcase(),
        token[4:],
        None,
        5,
    ):
        with pytest.raises(Unauthorized):
            wallet.authenticate(wrong)
        answers.add(
            api.send("GET", "/api/account", Authorization=f"Bearer {wrong}", status=401).body
        )
    assert len(answers) == 1


def test_typo_in_a_token_is_refused_without_the_database():
    with Wallet() as wallet:
        _, token = wallet.register("Ada")
    with pytest.raises(Unavailable, match="closed"):
        wallet.authenticate(token)
    with pytest.raises(Unauthorized):
        wallet.authenticate(token[:-1] + ("x" if token[-1] != "x" else "y"))


def test_two_authorization_headers_are_refused_even_if_both_are_right(wallet):
    _, token = wallet.register("Ada")
    header = f"Authorization: Bearer {token}\r\n".encode()
    for count, status in ((1, b"200"), (2, b"401")):
        with running(wallet) as url:
            request = (
                b"GET /api/account HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + header * count + b"\r\n"
            )
            assert raw_exchange(url, request)[9:12] == status


@pytest.mark.slow_on("postgres")
@pytest.mark.parametrize(
    "nobody", ["acc_0000000000000000", "acc_", "", "Ada", None, 5, "acc_000000000000000\ud800"]
)
def test_unknown_account_is_not_found_in_process(wallet, nobody):
    for call in (
        wallet.account,
        wallet.transactions,
        lambda id: wallet.topup(id, 5),
        lambda id: wallet.charge(id, 5),
    ):
        with pytest.raises(NotFound, match="There is no such account"):
            call(nobody)


def test_unknown_transaction_is_not_found_in_process(wallet, ada):
    mine = wallet.topup(ada.id, 5)
    for unknown in (
        mine.id + "0",
        mine.id[:-1] + "2",
        mine.id[:-1] + "01",
        mine.id[:-2],
        "",
        None,
        1,
    ):
        with pytest.raises(NotFound, match="no such transaction"):
            wallet.transaction(ada.id, unknown)


def test_id_with_a_line_break_behind_it_is_another_route(api):
    mine = api.send("POST", "/api/transactions/topup", {"amount": 5}, status=201).json["id"]
    api.send("GET", f"/api/transactions/{mine}", status=200)
    api.send("GET", f"/api/transactions/{mine}%0A", status=404)


def test_token_has_the_form_that_scanners_find_and_a_checksum(wallet):
    account, token = wallet.register("Ada")
    assert re.fullmatch("acc_[0-9A-Za-z]{16}", account.id)
    assert re.fullmatch("wlt_[0-9A-Za-z]{54}", token)
    assert token[4:20] == account.id[4:]
    assert wallet_module._checksum(token[:-6]) == token[-6:]
    digits = [wallet_module.BASE62.index(digit) for digit in wallet_module._checksum("123456789")]
    assert (
        sum(digit * 62**place for place, digit in enumerate(reversed(digits))) == 0xCBF43926
    )  # CRC-32's check value.


def test_errors_in_process_carry_no_token(file_dsn):
    with Wallet(file_dsn) as wallet:
        ada, token = wallet.register("Ada")
        new = wallet.replace_token(ada.id, token)
        calls = [
            partial(wallet.authenticate, token),
            partial(wallet.replace_token, ada.id, token),
            partial(wallet.charge, ada.id, 5, token=token),
            partial(wallet.charge, ada.id, 5, token=new),
            partial(wallet.account, token),
            partial(wallet.transactions, ada.id, cursor=token),
            partial(wallet.transaction, ada.id, token),
            partial(wallet.topup, ada.id, token),
            partial(wallet.statement, ada.id, type=token),
            partial(wallet.topup, ada.id, 5, metadata=token),
        ]
        errors = together(*calls)
    errors += together(
        partial(wallet.authenticate, new), partial(wallet.charge, ada.id, 5, token=new)
    )
    assert all(isinstance(error, WalletError) for error in errors)
    told = "".join(
        repr((error, vars(error))) + "".join(traceback.format_exception(error)) for error in errors
    )
    assert (
        find_secrets({"errors": told.encode()}, {"replaced": token[20:52], "token": new[20:52]})
        == set()
    )


def test_files_are_nobody_elses_to_read(file_wallet, tmp_path):
    file_wallet.register("Ada")
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("wallet.db", "wallet.db-wal", "wallet.db-shm"), "0o600")


def test_log_has_a_line_a_request_and_never_a_token(wallet, caplog):
    ada, token = wallet.register("Ada")
    api = Client(create_app(wallet), token)
    with caplog.at_level(logging.DEBUG):
        api.send("GET", f"/api/account?token={token}", X_Request_Id="one")
        api.send("GET", f"/api/{token}/x%0Afake", X_Request_Id="two")
        api.send("GET", f"/api/WLT_{token[4:]}/{token[20:]}/wlt%80{token[4:]}", X_Request_Id="four")
        api.send(
            "POST",
            "/api/transactions/topup",
            {"amount": 5, "description": token},
            X_Request_Id="three",
        )
    lines = [record.getMessage() for record in caplog.records if record.name == "wallet.access"]
    assert [re.sub(r"\d+\.\d ms", "1.0 ms", line) for line in lines] == [
        f"GET /api/account 400 1.0 ms one {ada.id} -",
        "GET /api/***/x?fake 404 1.0 ms two - -",
        "GET /api/***/***/wlt?*** 404 1.0 ms four - -",
        f"POST /api/transactions/topup 201 1.0 ms three {ada.id} -",
    ]
    assert token[20:52] not in caplog.text
    caplog.clear()
    wallet_server._Channel.logger.error(
        f"Client disconnected while serving /{token}\n2026 INFO fake"
    )
    assert caplog.messages == ["Client disconnected while serving /***?2026 INFO fake"]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        api.send("GET", "/livez")
    assert caplog.text == ""


# History ##########################################################################################


def test_history_comes_in_pages_newest_first_and_the_link_leads_on(api):
    ids = [api.send("POST", "/api/transactions/topup", {"amount": 5}).json["id"] for _ in range(5)]
    path, seen = "/api/transactions?limit=2", []
    while path:
        answer = api.send("GET", path, status=200)
        page = answer.json
        seen.append([one["id"] for one in page["transactions"]])
        link = re.fullmatch(r'<(\?[^>]+)>; rel="next"', answer.headers.get("Link", ""))
        assert bool(link) == (page["next_cursor"] is not None)
        path = link and "/api/transactions" + link[1]
    assert seen == [ids[4:2:-1], ids[2:0:-1], ids[:1]]


def test_page_that_ends_exactly_with_the_history_has_no_next(wallet, ada):
    for _ in range(4):
        wallet.topup(ada.id, 1)
    page = wallet.transactions(ada.id, limit=2)
    assert wallet.transactions(ada.id, limit=2, cursor=page.next_cursor).next_cursor is None
    assert wallet.transactions(ada.id).next_cursor is None


def test_history_can_be_of_one_type(api):
    for path in ("topup", "charge", "topup", "charge"):
        api.send("POST", f"/api/transactions/{path}", {"amount": 5}, status=201)
    first = api.send("GET", "/api/transactions?type=charge&limit=1", status=200)
    assert "type=charge" in first.headers["Link"]
    rest = api.send(
        "GET", "/api/transactions" + first.headers["Link"][1:].partition(">")[0], status=200
    )
    charges = first.json["transactions"] + rest.json["transactions"]
    assert [(one["type"], one["balance"]) for one in charges] == [("charge", 0), ("charge", 0)]
    assert rest.json["next_cursor"] is None


def test_what_is_written_between_two_pages_neither_repeats_nor_hides_anything(wallet, ada):
    written = [wallet.topup(ada.id, 1).id for _ in range(6)]
    seen, cursor = [], None
    while True:
        page = wallet.transactions(ada.id, limit=2, cursor=cursor)
        seen += [one.id for one in page.transactions]
        wallet.topup(ada.id, 1)
        wallet.charge(ada.id, 1)
        cursor = page.next_cursor
        if cursor is None:
            break
    assert seen == written[::-1]


def test_first_page_costs_the_same_however_long_the_history_is(file_wallet):
    short, long = (file_wallet.register(name)[0] for name in ("short", "long"))
    row = "INSERT INTO transactions VALUES (?, ?, ?, 1, 1, NULL, NULL, NULL, ?, ?, 0)"

    def fill(tx):
        for account, count in ((short, 100), (long, 30_000)):
            tx("UPDATE accounts SET last_sequence = ? WHERE id = ?", count, account.id)
            for number in range(1, count + 1):
                tx(
                    row,
                    account.id,
                    number,
                    "charge" if number <= 20 else "topup",
                    f"k{number}",
                    "f" * 64,
                )

    steps = {}
    file_wallet.database.write(fill)
    for account in (short, long):
        for filters in ({}, {"type": "charge"}, {"cursor": f"txn_{account.id[4:]}_40"}):
            file_wallet.transactions(
                account.id, **filters
            )  # Prepares the statement, which counts too.
            counted = []
            file_wallet.database._idle_readers[0].set_progress_handler(lambda: counted.append(1), 1)  # noqa: B023
            file_wallet.transactions(account.id, **filters)
            file_wallet.database._idle_readers[0].set_progress_handler(None, 1)
            steps.setdefault(str(filters.keys()), []).append(len(counted))
    assert all(0 < first < 4000 and abs(first - second) <= 2 for first, second in steps.values()), (
        steps
    )
    file_wallet.database.write(lambda tx: tx("DELETE FROM transactions"))
    file_wallet.database.write(lambda tx: tx("UPDATE accounts SET last_sequence = 0"))


def test_limit_and_type_are_checked_in_process_too(wallet, ada):
    for filters in (
        {"limit": 0},
        {"limit": 101},
        {"limit": True},
        {"limit": "x"},
        {"type": "gift"},
        {"cursor": 5},
    ):
        with pytest.raises(MalformedRequest):
            wallet.transactions(ada.id, **filters)


def test_times_are_utc_to_the_microsecond(api, wallet):
    shown = api.send("POST", "/api/transactions/topup", {"amount": 5}).json
    account = wallet.account("acc_" + shown["id"][4:20])
    stored = wallet.transactions(account.id).transactions[0].created_at
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", shown["created_at"])
    assert datetime.fromisoformat(shown["created_at"].replace("Z", "+00:00")) == stored
    assert abs(datetime.now(timezone.utc) - stored).total_seconds() < 60
