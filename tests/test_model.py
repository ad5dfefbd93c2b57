"""All of it together: a model of the wallet, and random calls to both."""

from __future__ import annotations

import dataclasses
import time
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import pytest
from hypothesis import Phase
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from tests.support import (
    SIGNS,
    check_books,
    torture,
)
from wallet import (
    AMOUNT_MAX,
    AccountFrozen,
    BalanceLimitExceeded,
    HoldNotActive,
    IdempotencyKeyReused,
    InsufficientFunds,
    RefundExceedsCharge,
    Unauthorized,
    ValidationFailed,
    Wallet,
)

# Promise 1: a balance is never negative, never above the cap, and the sum of its transactions


class Refused(Exception):
    """Carries the kind of error that the model expects."""


class Model(RuleBasedStateMachine):
    """Random sequences of everything, against a wallet of a few lines of plain Python, on a clock
    of its own.
    """

    kind, dsn = Wallet, "sqlite://"
    now_us = 0
    accounts, charges, held = Bundle("accounts"), Bundle("charges"), Bundle("held")
    keys = st.sampled_from(
        [None] * 8 + ["a", "b", "c", "d"]
    )  # Most requests get through to the money.
    amounts = st.integers(1, 52).map(lambda n: n if n <= 50 else AMOUNT_MAX - n + 51)
    parts = st.none() | st.integers(1, 60)
    texts = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=5)
    said = st.fixed_dictionaries(
        {},
        optional={
            "description": texts,
            "metadata": st.dictionaries(texts.filter(bool), texts, min_size=1, max_size=2),
        },
    )
    times = st.integers(0, 40)

    @initialize(target=accounts, balance=st.integers(1, 200))
    def start(self, balance):
        Model.now_us = 10**15
        self.wallet = self.kind(self.dsn)
        self.books, self.holds, self.frozen, self.remembered, self.refunded = {}, {}, set(), {}, {}
        self.tokens = {}
        self.register("Bob")
        ada = self.register("Ada")
        self.topup(ada, balance, {}, None)
        return multiple(*self.books)

    def teardown(self):
        if hasattr(self, "wallet"):
            check_books(self.wallet)
            self.wallet.close()
            Model.now_us = 0

    def now(self):
        return datetime.fromtimestamp(0, timezone.utc) + timedelta(microseconds=Model.now_us)

    def balance(self, account):
        return self.books[account][-1].balance if self.books[account] else 0

    def status(self, hold):
        return (
            "expired" if hold.status == "active" and hold.expires_at <= self.now() else hold.status
        )

    def available(self, account):
        mine = (hold for hold in self.holds.values() if hold.id[4:20] == account[4:])
        return self.balance(account) - sum(
            hold.amount for hold in mine if self.status(hold) == "active"
        )

    def check(self, account, change, held=0):
        """Raise what the wallet must, for a change of the balance, or what would be held."""
        if account in self.frozen:
            raise Refused(AccountFrozen)
        if self.balance(account) + change > AMOUNT_MAX:
            raise Refused(BalanceLimitExceeded)
        if self.available(account) < held - change:
            raise Refused(InsufficientFunds)

    def once(self, account, key, request, call, expect):
        """Call, and compare with what is expected of it; return what was done anew, None for a
        refusal or a replay.
        """
        earlier, expected = self.remembered.get((account, key)), None
        if earlier and earlier[0] != request:
            expected = IdempotencyKeyReused
        elif not earlier:
            try:
                expect()
            except Refused as refused:
                expected = refused.args[0]
        if expected:
            with pytest.raises(expected):
                call()
            return None
        done = call()
        first = done[0] if isinstance(done, list) else done
        assert first.replayed == bool(earlier)
        if earlier:
            assert done == earlier[1]
            return None
        assert first.created_at == self.now()
        if key is not None:
            self.remembered[account, key] = (request, done)
        return done

    def write_down(self, done, account, type, amount, said, change, reference=None):
        balance = self.balance(account) + change
        assert done == dataclasses.replace(
            done,
            type=type,
            amount=amount,
            balance=balance,
            description=said.get("description"),
            metadata=said.get("metadata", {}),
            reference=reference,
        )
        self.books[account].append(done)

    @rule(
        target=accounts, name=st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=103)
    )
    def register(self, name):
        if not 1 <= len(name.strip()) <= 100:
            with pytest.raises(ValidationFailed):
                self.wallet.register(name)
            name = "Ada"
        account, token = self.wallet.register(name)
        assert self.wallet.authenticate(token) == account
        assert account.name == name.strip()
        self.books[account.id], self.tokens[account.id] = [], token
        return account.id

    @rule(account=accounts)
    def replace_token(self, account):
        old, new = self.tokens[account], self.wallet.replace_token(account, self.tokens[account])
        with pytest.raises(Unauthorized):
            self.wallet.authenticate(old)
        assert self.wallet.authenticate(new) == self.wallet.account(account)
        self.tokens[account] = new

    @rule(seconds=st.integers(0, 40))
    def wait(self, seconds):
        Model.now_us += seconds * 1_000_000

    @rule(account=accounts, frozen=st.sampled_from([True, False, False]))
    def freeze(self, account, frozen):
        self.wallet.freeze(account, frozen)
        (self.frozen.add if frozen else self.frozen.discard)(account)

    @rule(account=accounts, amount=amounts, said=said, key=keys)
    def topup(self, account, amount, said, key):
        done = self.once(
            account,
            key,
            ("topup", amount, said),
            lambda: self.wallet.topup(account, amount, **said, key=key),
            lambda: self.check(account, amount),
        )
        if done:
            self.write_down(done, account, "topup", amount, said, amount)

    @rule(target=charges, account=accounts, amount=amounts, said=said, key=keys)
    def charge(self, account, amount, said, key):
        done = self.once(
            account,
            key,
            ("charge", amount, said),
            lambda: self.wallet.charge(account, amount, **said, key=key),
            lambda: self.check(account, -amount),
        )
        if not done:
            return multiple()
        self.write_down(done, account, "charge", amount, said, -amount)
        return done

    @rule(charge=charges, part=parts, said=said, key=keys)
    def refund(self, charge, part, said, key):
        account = "acc_" + charge.id[4:20]
        left = charge.amount - self.refunded.get(charge.id, 0)

        def expect():
            if not 0 < (part or left) <= left:
                raise Refused(RefundExceedsCharge)
            self.check(account, part or left)

        done = self.once(
            account,
            key,
            ("refund", charge.id, part, said),
            lambda: self.wallet.refund(account, charge.id, part, **said, key=key),
            expect,
        )
        if done:
            self.refunded[charge.id] = self.refunded.get(charge.id, 0) + done.amount
            self.write_down(done, account, "refund", part or left, said, part or left, charge.id)

    @rule(sender=accounts, to=accounts, amount=amounts, said=said, key=keys)
    def transfer(self, sender, to, amount, said, key):
        if sender == to:
            with pytest.raises(ValidationFailed, match="another account"):
                self.wallet.transfer(sender, to, amount, **said, key=key)
            return
        done = self.once(
            sender,
            key,
            ("transfer", to, amount, said),
            lambda: self.wallet.transfer(sender, to, amount, **said, key=key),
            lambda: (self.check(sender, -amount), self.check(to, amount)),
        )
        if done:
            self.write_down(done, sender, "transfer_out", amount, said, -amount, to)
            received = self.wallet.transactions(to, limit=1).transactions[0]
            self.write_down(received, to, "transfer_in", amount, said, amount, sender)

    @rule(
        target=held,
        account=accounts,
        amount=amounts,
        seconds=st.none() | st.integers(1, 60),
        said=said,
        key=keys,
    )
    def hold(self, account, amount, seconds, said, key):
        done = self.once(
            account,
            key,
            ("hold", amount, seconds, said),
            lambda: self.wallet.hold(account, amount, expires_in_s=seconds, **said, key=key),
            lambda: self.check(account, 0, amount),
        )
        if not done:
            return multiple()
        assert (done.amount, done.status, done.captured) == (amount, "active", 0)
        assert done.expires_at == self.now() + timedelta(seconds=seconds or 7 * 24 * 3600)
        assert (done.description, done.metadata) == (
            said.get("description"),
            said.get("metadata", {}),
        )
        self.holds[done.id] = done
        return done.id

    def end(self, hold, part=None):
        if self.status(hold) != "active":
            raise Refused(HoldNotActive)
        if (part or 0) > hold.amount:
            raise Refused(ValidationFailed)
        if "acc_" + hold.id[4:20] in self.frozen:
            raise Refused(AccountFrozen)

    @rule(target=charges, hold=held, part=parts, said=said, key=keys)
    def capture(self, hold, part, said, key):
        account, hold = "acc_" + hold[4:20], self.holds[hold]
        done = self.once(
            account,
            key,
            ("capture", hold.id, part, said),
            lambda: self.wallet.capture(account, hold.id, part, **said, key=key),
            lambda: self.end(hold, part),
        )
        if not done:
            return multiple()
        self.holds[hold.id] = dataclasses.replace(
            hold, status="captured", captured=part or hold.amount
        )
        given = {
            "description": said.get("description", hold.description),
            "metadata": said.get("metadata") or hold.metadata,
        }
        self.write_down(
            done, account, "charge", part or hold.amount, given, -(part or hold.amount), hold.id
        )
        return done

    @rule(hold=held, key=keys)
    def release(self, hold, key):
        account, hold = "acc_" + hold[4:20], self.holds[hold]
        released = dataclasses.replace(hold, status="released")
        earlier = self.remembered.get((account, key))
        expected = None
        if earlier and earlier[0] != ("release", hold.id):
            expected = IdempotencyKeyReused
        elif not earlier:
            try:
                self.end(hold)
            except Refused as refused:
                expected = refused.args[0]
        if expected:
            with pytest.raises(expected):
                self.wallet.release(account, hold.id, key=key)
            return
        assert self.wallet.release(account, hold.id, key=key) == released
        self.holds[hold.id] = released
        if key is not None:
            self.remembered[account, key] = (("release", hold.id), released)

    @rule(
        movements=st.lists(
            st.tuples(accounts, st.sampled_from(["topup", "charge"]), amounts, said),
            min_size=1,
            max_size=5,
        ),
        key=keys,
    )
    def batch(self, movements, key):
        """All or none: what the model writes down for a batch that is refused, it takes back."""
        request = [
            {"account": account, "type": type, "amount": amount, **said}
            for account, type, amount, said in movements
        ]
        before = {account: list(book) for account, book in self.books.items()}
        known = {account: self.remembered.get((account, key)) for account, *_ in movements}
        if any(known.values()) and not all(
            one and one[0] == ("batch", request) for one in known.values()
        ):
            return  # Of several keys that are known, which one is refused is not the point here.

        def expect():
            try:
                for account, type, amount, _ in movements:
                    change = amount if type == "topup" else -amount
                    self.check(account, change)
                    self.books[account].append(
                        SimpleNamespace(balance=self.balance(account) + change)
                    )
            finally:
                self.books = before

        done = self.once(
            movements[0][0],
            key,
            ("batch", request),
            lambda: self.wallet.batch(request, key=key),
            expect,
        )
        if done:
            for one, (account, type, amount, said) in zip(done, movements, strict=True):
                self.write_down(
                    one, account, type, amount, said, amount if type == "topup" else -amount
                )
                if key is not None:
                    self.remembered[account, key] = (("batch", request), done)

    @rule(
        account=accounts,
        limit=st.integers(1, 5),
        type=st.none() | st.sampled_from([*SIGNS][:5]),
        since=st.none() | times,
        until=st.none() | times,
        oldest_first=st.booleans(),
    )
    def read_history(self, account, limit, type, since, until, oldest_first):
        start = datetime.fromtimestamp(10**9, timezone.utc)
        filters = {"type": type} if type else {}
        if since is not None:
            filters["since"] = start + timedelta(seconds=since)
        if until is not None:
            filters["until"] = (start + timedelta(seconds=until)).isoformat()
        seen, position = [], "0" if oldest_first else None
        while True:
            page = self.wallet.transactions(
                account, limit=limit, **{"after" if oldest_first else "cursor": position}, **filters
            )
            assert len(page.transactions) <= limit
            seen, position = seen + page.transactions, page.next_cursor
            if position is None:
                break
        expected = [
            one
            for one in self.books[account]
            if type in (None, one.type)
            and (since is None or one.created_at >= start + timedelta(seconds=since))
            and (until is None or one.created_at < start + timedelta(seconds=until))
        ]
        assert seen == (expected if oldest_first else expected[::-1])
        assert list(self.wallet.statement(account, **filters)) == expected

    @rule(account=accounts, seconds=times)
    def read_balance_at(self, account, seconds):
        at = datetime.fromtimestamp(10**9 + seconds, timezone.utc)
        past = [one for one in self.books[account] if one.created_at <= at]
        assert self.wallet.balance_at(account, at) == (past[-1].balance if past else 0)

    @invariant()
    def balances_agree(self):
        for account in self.books:
            kept = self.wallet.account(account)
            assert (kept.balance, kept.available) == (
                self.balance(account),
                self.available(account),
            )
            assert kept.frozen == (account in self.frozen)
            mine = [hold for hold in self.holds.values() if hold.id[4:20] == account[4:]]
            expected = [
                dataclasses.replace(hold, status=self.status(hold)) for hold in reversed(mine)
            ]
            assert self.wallet.holds(account, limit=100).holds == expected


@pytest.mark.slow_on("memory", "postgres")
@pytest.mark.parametrize("examples", [8, torture(1000)])
def test_wallet_does_what_its_model_does(dsn, examples, monkeypatch):
    examples *= 5 if dsn == "sqlite://" and examples == 8 else 1  # There they are cheap.
    time_ns = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: Model.now_us * 1000 or time_ns())
    run_state_machine_as_test(
        type("ModelOnDsn", (Model,), {"dsn": dsn}),
        settings=hypothesis_settings(
            max_examples=examples, stateful_step_count=50, deadline=None, database=None
        ),
    )


class GreedyWallet(Wallet):
    """Takes one more than it is told to from whoever has it."""

    def charge(self, account_id, amount, *arguments, **options):
        more = self.account(account_id).available > amount
        return super().charge(account_id, amount + more, *arguments, **options)


def test_control_a_wallet_that_takes_too_much_differs_from_the_model(monkeypatch):
    monkeypatch.setattr(time, "time_ns", lambda: Model.now_us * 1000)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            type("GreedyModel", (Model,), {"kind": GreedyWallet}),
            settings=hypothesis_settings(
                max_examples=50,
                stateful_step_count=20,
                deadline=None,
                database=None,
                phases=[Phase.generate],
            ),
        )
