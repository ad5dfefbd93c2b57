"""What only a database server can do: restart, freeze, refuse and lose connections."""

from __future__ import annotations

import ast
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import string
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import urlsplit

import psycopg
import pytest

import wallet as wallet_module
import wallet_cli
import wallet_postgres
from tests.support import (
    HERE,
    MODULES,
    SERIALIZABLE,
    Client,
    Load,
    Waiting,
    check_books,
    command,
    environment,
    hold_the_writer,
    limited,
    load_yaml,
    log_lines,
    send,
    served,
    standby_missing,
    together,
    torture,
    unnamed,
    watch_statements,
)
from wallet import (
    AMOUNT_MAX,
    BalanceLimitExceeded,
    ConfigurationError,
    InsufficientFunds,
    OutcomeUnknown,
    Unauthorized,
    Unavailable,
    Wallet,
    create_app,
)

# Postgres #########################################################################################


@pytest.mark.slow
@pytest.mark.parametrize("careless", [False, True], ids=["wallet", "control"])
def test_16_threads_on_one_hot_account_at_serializable_never_see_a_serialization_failure(
    new_schema, monkeypatch, careless
):
    """They are of four processes, as it were: those of one stand in line."""
    if careless:
        monkeypatch.setattr(wallet_postgres, "LOST_A_RACE", ())
    dsn = new_schema(SERIALIZABLE)
    with contextlib.ExitStack() as stack:
        wallets = [stack.enter_context(Wallet(dsn, connections=4)) for _ in range(4)]
        wallet, (ada, _) = wallets[0], wallets[0].register("Ada")

        def work(wallet):
            return [wallet.topup(ada.id, 1) for _ in range(20)]

        outcomes = together(*[partial(work, one) for one in wallets * 4])
        failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        check_books(wallet)
        if careless:
            assert any("could not serialize" in str(failure) for failure in failures)
            return
        assert failures == []
        assert wallet.account(ada.id).balance == 16 * 20


@pytest.mark.parametrize(
    ("options", "opposing", "expected"),
    [
        (SERIALIZABLE, False, "40001"),
        ("%20-cdeadlock_timeout%3D20ms", True, "40P01"),
    ],
    ids=["race", "deadlock"],
)
def test_transaction_that_lost_a_race_or_a_deadlock_is_run_again_whole(
    new_schema, options, opposing, expected
):
    barrier, runs, errors = threading.Barrier(2), [], []
    with Wallet(new_schema(options)) as wallet:
        ids = [wallet.register(name)[0].id for name in ("Ada", "Grace")]

        def rename(me, first, second):
            def function(tx):
                runs.append(me)
                try:
                    tx(
                        "SELECT name FROM accounts"
                    )  # At serializable, all that follows must be as if it were now.
                    if not opposing and runs.count(me) == 1:
                        barrier.wait(timeout=30)
                    tx("UPDATE accounts SET name = name || '1' WHERE id = ?", first)
                    if opposing and runs.count(me) == 1:
                        barrier.wait(timeout=30)
                    tx("UPDATE accounts SET name = name || '2' WHERE id = ?", second)
                except psycopg.Error as error:
                    errors.append(error.sqlstate)
                    raise

            wallet.database.write(function)

        order = ids[::-1] if opposing else ids
        assert together(lambda: rename("one", *ids), lambda: rename("other", *order)) == [
            None,
            None,
        ]
        names = [wallet.account(account_id).name for account_id in ids]
    expected_suffixes = ("12", "12") if opposing else ("11", "22")
    assert ["".join(sorted(name[-2:])) for name in names] == list(expected_suffixes)
    assert [len(name) for name in names] == [len("Ada12"), len("Grace12")]
    assert set(errors) == {expected}
    assert len(runs) == 2 + len(errors)


def raising(state, times):
    """Return a statement that fails so often with an SQLSTATE, and then no more.

    No ROLLBACK undoes the counting.
    """
    return f"""DO $$ BEGIN IF nextval('tries') <= {times} THEN RAISE EXCEPTION SQLSTATE '{state}'; END IF; END $$"""


@pytest.mark.parametrize("state", ["40001", "40P01", "23505", "42P07", "42710", "25006"])
def test_state_that_another_run_may_mend_gets_another_run_and_not_for_ever(postgres_wallet, state):
    run = postgres_wallet.database.write
    run(lambda tx: tx("CREATE SEQUENCE tries"))
    ada, _ = postgres_wallet.register("Ada")

    def rename(times):
        def function(tx):
            tx("UPDATE accounts SET name = name || '1' WHERE id = ?", ada.id)
            tx(raising(state, times))

        run(function)

    rename(3)
    assert postgres_wallet.account(ada.id).name == "Ada1"
    if (
        state not in wallet_postgres.LOST_A_RACE
    ):  # They end by themselves, and what is left is a fault.
        run(lambda tx: tx("ALTER SEQUENCE tries RESTART"))
        with pytest.raises((Unavailable, psycopg.IntegrityError)):
            rename(1000)
        assert run(lambda tx: tx("SELECT last_value FROM tries")) == [(4,)]
    assert postgres_wallet.account(ada.id).name == "Ada1"


@pytest.mark.parametrize(
    ("state", "times", "expected"),
    [
        ("40003", 1, None),
        ("40003", 10**9, OutcomeUnknown),
        ("53100", 10**9, OutcomeUnknown),
        ("40001", 1, None),
        ("40001", 10**9, Unavailable),
    ],
)
@pytest.mark.parametrize("operation", ["topup", "together", "hold", "transfer", "batch"])
def test_commit_that_answers_an_error_is_unknown_unless_it_says_rolled_back(
    new_schema, monkeypatch, state, times, expected, operation
):
    with Wallet(new_schema()) as wallet:
        (ada, _), (bob, _) = wallet.register("Ada"), wallet.register("Bob")
        wallet.topup(ada.id, 10)
        calls = {
            "topup": [partial(wallet.topup, ada.id, 5)],
            "together": [partial(wallet.topup, one.id, 5) for one in (ada, bob)],
            "hold": [partial(wallet.hold, ada.id, 5)],
            "transfer": [partial(wallet.transfer, ada.id, bob.id, 5)],
            "batch": [partial(wallet.batch, [{"type": "topup", "amount": 5}], account_id=ada.id)],
        }[operation]
        body = (
            raising(state, times)
            .replace("DO $$ BEGIN", "BEGIN")
            .replace("END $$", "RETURN NULL; END")
        )
        for sql in (
            "CREATE SEQUENCE tries",
            f"CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $${body}$$",
            "CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON transactions DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION fail()",
        ):
            wallet.database.write(lambda tx, sql=sql: tx(sql))
        if expected:
            monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0.8)
        waits = operation in ("topup", "together")
        outcomes = Waiting(wallet, *calls).outcomes() if waits else together(*calls)
        if expected:
            assert {type(one) for one in outcomes} == {expected}
        else:
            assert not any(isinstance(one, Exception) for one in outcomes)
        check_books(wallet)


def test_session_is_left_as_it_was_so_that_a_pooler_may_hand_it_on(postgres_dsn):
    with Wallet(postgres_dsn, connections=1) as wallet:
        ada, _ = wallet.register("Ada")
        before = wallet.database.read(lambda tx: tx("SHOW statement_timeout"))
        for _ in range(10):
            wallet.topup(ada.id, 5)
        for name in ("statement_timeout", "idle_in_transaction_session_timeout"):
            assert (
                wallet.database.read(lambda tx, name=name: tx(f"SHOW {name}")) == before == [("0",)]
            )
        assert wallet.database.read(lambda tx: tx("SELECT * FROM pg_prepared_statements")) == []


def test_options_come_from_the_dsn_else_from_the_environment_else_from_here(
    postgres_dsn, monkeypatch
):
    postgres_dsn = unnamed(postgres_dsn)

    def name(dsn, **options):
        with Wallet(dsn, **options) as wallet:
            assert wallet.database._pool.max_size == options.get("connections", 8)
            return wallet.database.read(lambda tx: tx("SHOW application_name"))[0][0]

    assert (
        name(postgres_dsn)
        == name(postgres_dsn.replace("postgresql:", "postgres:"), connections=3)
        == "wallet"
    )
    monkeypatch.setenv("PGAPPNAME", "shop")
    assert name(postgres_dsn) == "shop"
    assert name(postgres_dsn + "&application_name=till") == "till"
    with Wallet(postgres_dsn + "&keepalives_idle=7") as wallet:
        assert wallet.database._pool.kwargs["keepalives_idle"] == "7"
    seen = []

    def refuse(dsn, **options):
        seen.append(options)
        raise ConfigurationError("seen")

    with monkeypatch.context() as patched:
        patched.setattr(wallet_cli, "Wallet", refuse)
        assert wallet_cli.main(["--port", "0", "--threads", "4", "--dsn", postgres_dsn]) == 2
    assert seen == [{"currency": None, "connections": 1, "create": True}]
    monkeypatch.setenv("WALLET_DSN", postgres_dsn)
    monkeypatch.setenv("WALLET_THREADS", "5")
    with create_app().wallet as wallet:
        assert wallet.database._pool.max_size == 2


def test_text_is_utf_8_whatever_the_environment_says(postgres_dsn, monkeypatch):
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    with Wallet(postgres_dsn) as wallet:
        account, _ = wallet.register("Łucja 李")
        assert wallet.account(account.id).name == "Łucja 李"


@pytest.mark.slow
def test_silent_server_is_one_line_and_exit_code_75():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        done = command(
            "--port", "0", WALLET_DSN=f"postgresql://u@127.0.0.1:{silent.getsockname()[1]}/x"
        )
    assert done.returncode == 75
    assert re.fullmatch(
        r"wallet: cannot open postgresql://127\.0\.0\.1:\d+/x: [^\n]*timeout expired\n", done.stderr
    )


@pytest.mark.slow
def test_call_waits_out_an_outage_that_is_shorter_than_its_deadline(new_schema, postgres_server):
    with Wallet(new_schema(on=postgres_server)) as wallet, ThreadPoolExecutor(1) as thread:
        ada, _ = wallet.register("Ada")
        postgres_server.control("stop", "-m", "fast")
        waiting = thread.submit(wallet.topup, ada.id, 5)
        try:
            time.sleep(3.3)  # Longer than a pool's usual second, and third, try to connect is away.
        finally:
            postgres_server.restart()
        assert waiting.result(timeout=30).balance == 5


@pytest.mark.slow
def test_connections_that_went_dead_in_silence_cost_one_call_and_not_one_each(
    new_schema, postgres_server, monkeypatch
):
    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 1)
    monkeypatch.setattr(wallet_postgres, "POSTGRES_AWAY_S", 0)
    with Wallet(new_schema(on=postgres_server), connections=4) as wallet:
        ada, _ = wallet.register("Ada")
        ask = "SELECT pg_backend_pid(), pg_sleep(0.1)"
        backends = {
            rows[0][0] for rows in together(*[lambda: wallet.database.read(lambda tx: tx(ask))] * 4)
        }
        assert len(backends) > 1
        for backend in backends:
            os.kill(backend, signal.SIGSTOP)
        try:
            with pytest.raises(Unavailable):
                wallet.topup(ada.id, 5)
            assert wallet.topup(ada.id, 5).balance == 5
        finally:
            for backend in backends:
                os.kill(backend, signal.SIGCONT)


def test_race_that_shows_only_at_commit_is_run_again_too(new_schema):
    barrier, runs = threading.Barrier(2), []
    with Wallet(new_schema(SERIALIZABLE)) as wallet:
        ids = [wallet.register("on call")[0].id for _ in range(2)]

        def go_off_call(me):
            def function(tx):
                runs.append(me)
                if len(tx("SELECT id FROM accounts WHERE name = 'on call'")) == 2:
                    tx("UPDATE accounts SET name = 'off' WHERE id = ?", me)
                if runs.count(me) == 1:
                    barrier.wait(
                        timeout=30
                    )  # Both have done all but COMMIT, and neither stands in the other's way.

            wallet.database.write(function)

        assert together(*[lambda me=me: go_off_call(me) for me in ids]) == [None, None]
        assert sorted(wallet.account(account_id).name for account_id in ids) == ["off", "on call"]
        assert len(runs) >= 3


def test_deadline_ends_the_repeating_and_says_that_nothing_was_changed(
    postgres_wallet, monkeypatch
):
    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0.3)
    ada, _ = postgres_wallet.register("Ada")
    runs = []

    def lose(tx):
        runs.append(tx("UPDATE accounts SET balance = 5 WHERE id = ?", ada.id))
        tx(
            "DO $$ BEGIN RAISE EXCEPTION SQLSTATE '40001' USING MESSAGE = 'restart transaction'; END $$"
        )

    with pytest.raises(
        Unavailable, match=r"Nothing was changed, so try again\. \(restart transaction\)"
    ):
        postgres_wallet.database.write(lose)
    assert len(runs) > 3
    assert postgres_wallet.account(ada.id).balance == 0


def test_account_that_another_session_has_locked_is_unavailable_and_all_others_are_served(
    postgres_dsn, monkeypatch
):
    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0.5)
    with Wallet(postgres_dsn) as wallet, psycopg.connect(postgres_dsn) as other:
        ada, grace = (wallet.register(name)[0] for name in ("Ada", "Grace"))
        other.execute("SELECT * FROM accounts WHERE id = %s FOR UPDATE", [ada.id])
        with pytest.raises(Unavailable, match="canceling statement due to statement timeout"):
            wallet.topup(ada.id, 5)
        assert wallet.topup(grace.id, 5).balance == 5
        other.rollback()
        assert wallet.topup(ada.id, 5).balance == 5


def test_movements_of_an_account_that_another_process_is_at_wait_together(postgres_dsn):
    with Wallet(postgres_dsn) as wallet, psycopg.connect(postgres_dsn) as other:
        ada, grace = (wallet.register(name)[0] for name in ("Ada", "Grace"))
        other.execute("SELECT * FROM accounts WHERE id = %s FOR UPDATE", [ada.id])
        with ThreadPoolExecutor(17) as pool:
            made = [pool.submit(wallet.topup, ada.id, 1) for _ in range(16)]
            deadline = time.monotonic() + 30
            busy = wallet.database._busy
            # The first has left the line when it waits for the lock.
            while ada.id not in busy or len(busy[ada.id].waiting) < 15:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            assert wallet.database.usage()["in_use"] == 1
            assert wallet.topup(grace.id, 5).balance == 5  # Nobody else waits.
            other.rollback()
            assert sorted(one.result(timeout=30).balance for one in made) == [*range(1, 17)]
        (transactions,) = other.execute(
            "SELECT count(DISTINCT xmin::text) FROM transactions WHERE account_id = %s", [ada.id]
        ).fetchone()
        assert transactions == 2
        assert not busy
        check_books(wallet)


@pytest.mark.slow
def test_client_that_vanishes_in_a_transaction_gives_its_locks_back(
    new_schema, postgres_server, monkeypatch
):
    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 2)
    dsn = new_schema(on=postgres_server)
    with Wallet(dsn) as wallet:
        ada, _ = wallet.register("Ada")
        program = f"""
import time, wallet
wallet.DATABASE_TIMEOUT_S = 1
def hang(tx):
    tx("UPDATE accounts SET balance = 1000 WHERE id = ?", {ada.id!r})
    print("locked", flush=True)
    time.sleep(60)
wallet.Wallet({dsn!r}).database.write(hang)
"""
        other = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment()
        )
        try:
            assert other.stdout.readline() == b"locked\n"
            other.send_signal(signal.SIGSTOP)
            assert wallet.topup(ada.id, 5).balance == 5
        finally:
            other.kill()
            other.communicate()


@pytest.mark.parametrize(
    ("balance", "theirs", "mine"),
    [
        (0, ("topup", 5), ("charge", 3)),
        (0, ("topup", 3), ("charge", 3)),
        (AMOUNT_MAX, ("charge", 5), ("topup", 3)),
        (AMOUNT_MAX, ("charge", 3), ("topup", 3)),
    ],
)
@pytest.mark.parametrize("look", [1, 2], ids=["at once", "before the lock"])
def test_refusal_never_contradicts_itself_when_the_balance_changes_meanwhile(
    postgres_dsn, monkeypatch, balance, theirs, mine, look
):
    with Wallet(postgres_dsn) as wallet, Wallet(postgres_dsn) as other:
        ada, _ = wallet.register("Ada")
        if balance:
            wallet.topup(ada.id, balance)
        looks = []

        def move_after_the_look(sql, rows):
            looks.append((sql, rows))
            if len(looks) == look:
                getattr(other, theirs[0])(ada.id, theirs[1])

        def sign(movement):
            return movement[1] if movement[0] == "topup" else -movement[1]

        watch_statements(monkeypatch, move_after_the_look)
        assert getattr(wallet, mine[0])(ada.id, mine[1]).balance == balance + sign(theirs) + sign(
            mine
        )
        assert looks[0] == (wallet_module.POST_AT_ONCE, [])
        with pytest.raises((InsufficientFunds, BalanceLimitExceeded)):
            getattr(wallet, mine[0])(ada.id, mine[1])


@pytest.mark.slow_on("serializable")
@pytest.mark.parametrize("isolation", ["", SERIALIZABLE], ids=["read committed", "serializable"])
def test_three_processes_on_one_database_keep_every_promise(new_schema, isolation):
    """Also where movements that wait share a transaction, and meet those of other processes."""
    postgres_dsn = new_schema(isolation)
    with contextlib.ExitStack() as stack:
        urls = [
            stack.enter_context(served("--dsn", postgres_dsn, "--log-level", "error")).url
            for _ in range(3)
        ]
        tokens = [
            send(urls[0], "POST", "/api/register", {"name": "Ada"})[2]["token"] for _ in range(4)
        ]
        keys = [f"key-{number}" for number in range(6)]

        def work(number):
            url, token = urls[number % 3], tokens[number % 4]
            connection = stack.enter_context(
                contextlib.closing(http.client.HTTPConnection(urlsplit(url).netloc))
            )
            answers = []
            for key in keys:
                answers.append(
                    send(
                        url,
                        "POST",
                        "/api/transactions/topup",
                        {"amount": 7},
                        token,
                        connection,
                        Idempotency_Key=key,
                    )
                )
                answers.append(
                    send(url, "POST", "/api/transactions/charge", {"amount": 3}, token, connection)
                )
                answers.append(send(url, "GET", "/api/account", None, token, connection))
            return answers

        outcomes = together(*[lambda number=number: work(number) for number in range(12)])
    topups, charges, last = {}, {}, {}
    for number, answers in enumerate(outcomes):
        for status, _, document in answers:
            assert status in (200, 201, 402)
            if document.get("type") == "topup":
                topups.setdefault(number % 4, set()).add(json.dumps(document))
            elif status == 201:
                charges.setdefault(number % 4, []).append(document["id"])
        last.setdefault(number % 4, []).append(answers[-1][2]["balance"])
    with Wallet(postgres_dsn) as wallet:
        check_books(wallet)
        sql = "SELECT count(*), count(DISTINCT CAST(xmin AS TEXT)) FROM transactions"
        ((entries, commits),) = wallet.database.read(lambda tx: tx(sql))
        assert commits < entries
        for number, token in enumerate(tokens):
            assert len(topups[number]) == len(
                keys
            )  # Three processes sent each key, and all got one answer.
            assert len(set(charges[number])) == len(charges[number])
            assert wallet.authenticate(token).balance == 7 * len(keys) - 3 * len(charges[number])
            assert wallet.authenticate(token).balance in last[number]


def test_no_process_keeps_what_another_may_change(postgres_dsn):
    with Wallet(postgres_dsn) as one, Wallet(postgres_dsn) as other:
        ada, token = one.register("Ada")
        assert other.authenticate(token) == ada
        one.topup(ada.id, 5)
        assert other.authenticate(token).balance == other.account(ada.id).balance == 5
        new = wallet_module._make_token(ada.id)
        sql = "UPDATE accounts SET token_hash = ? WHERE id = ?"
        one.database.write(lambda tx: tx(sql, wallet_module._hash_token(new), ada.id))
        assert other.authenticate(new).balance == 5
        with pytest.raises(Unauthorized):
            other.authenticate(token)


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [10, torture(50)])
def test_restarts_of_postgres_under_load_lose_nothing_and_double_nothing(
    new_schema, postgres_server, restarts, report
):
    dsn, waits = new_schema(on=postgres_server), []
    with served("--dsn", dsn, "--log-level", "error") as server:
        load = Load(
            server.url,
            [
                send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"]
                for _ in range(4)
            ],
        )
        for number in range(restarts):
            load.wait_for_more()
            postgres_server.restart("immediate" if number % 2 else "fast")
            waits.append(load.wait_for_more(count=1))
        load.stop()
    assert load.check(dsn) == 0
    report(
        f"{restarts} restarts, {len(load.kept)} answered, {len(load.open)} refused {load.statuses},"
        f" serving again after {max(waits):.2f} s at most"
    )
    assert max(waits) < 2


HASTY = ("-c", "import sys, wallet, wallet_cli; wallet.DATABASE_TIMEOUT_S = 0.3; sys.exit(wallet_cli.main())")


@pytest.mark.slow
def test_control_a_server_that_commits_before_it_writes_loses_what_was_answered(
    new_schema, postgres_server, caplog
):
    with postgres_server.configured(wal_writer_delay="10s"):
        dsn = new_schema("%20-csynchronous_commit%3Doff", on=postgres_server)
        with served("--dsn", dsn, "--log-level", "error", program=HASTY) as server:
            load = Load(
                server.url, [send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"]]
            )
            load.wait_for_more()
            try:
                postgres_server.control("stop", "-m", "immediate")
                load.stop()
            finally:
                postgres_server.restart()
    with Wallet(dsn) as wallet:
        assert (
            len(load.kept)
            > wallet.database.read(lambda tx: tx("SELECT count(*) FROM transactions"))[0][0]
        )


class BlindWallet(Wallet):
    """Runs a movement again without knowing it by its key:

    how money is paid out twice elsewhere.
    """

    def _move(self, type, account_id, amount, description, **options):
        def move(tx):
            moved = "UPDATE accounts SET balance = balance + ?, last_sequence = last_sequence + 1 WHERE id = ?"
            tx(moved, amount, account_id)
            tx(
                "INSERT INTO transactions SELECT id, last_sequence, 'topup', ?, balance, NULL, NULL, NULL, ?,"
                " token_hash, 0 FROM accounts WHERE id = ?",
                amount,
                uuid.uuid4().hex,
                account_id,
            )

        return self.database.write(move)


@pytest.mark.parametrize(
    ("kind", "key"),
    [(Wallet, "order-17"), (Wallet, None), (BlindWallet, "order-17")],
    ids=["own key", "made key", "control"],
)
def test_commit_that_was_cut_off_but_happened_is_answered_with_the_truth(
    new_schema, postgres_server, kind, key
):
    with kind(new_schema(on=postgres_server)) as wallet, ThreadPoolExecutor(1) as thread:
        ada, token = wallet.register("Ada")
        api = Client(create_app(wallet), token)
        headers = {"Idempotency_Key": key} if key else {}
        with standby_missing(postgres_server) as waiting:
            if kind is BlindWallet:
                thread.submit(wallet.topup, ada.id, 5)
                (backend,) = waiting()
                postgres_server.query("SELECT pg_terminate_backend(%s, 5000)", backend)
                waiting()  # It is being done again.
            else:
                future = thread.submit(
                    api.send, "POST", "/api/transactions/topup", {"amount": 5}, **headers
                )
                (backend,) = waiting()
                postgres_server.query("SELECT pg_terminate_backend(%s)", backend)
                answer = future.result(timeout=30)
                assert answer.status_int == 201
                assert (answer.json["balance"], answer.json["id"]) == (5, f"txn_{ada.id[4:]}_1")
        thread.shutdown()
        assert wallet.account(ada.id).balance == (10 if kind is BlindWallet else 5)
        check_books(wallet)
        if key and kind is Wallet:
            assert (
                api.send(
                    "POST", "/api/transactions/topup", {"amount": 5}, status=201, **headers
                ).json
                == answer.json
            )


def test_registration_whose_commit_was_cut_off_is_one_account_with_the_token_that_is_shown(
    new_schema, postgres_server
):
    with Wallet(new_schema(on=postgres_server)) as wallet, ThreadPoolExecutor(1) as thread:
        with standby_missing(postgres_server) as waiting:
            future = thread.submit(wallet.register, "Ada")
            postgres_server.query("SELECT pg_terminate_backend(%s)", *waiting())
            ada, token = future.result(timeout=30)
        assert wallet.authenticate(token) == ada
        assert wallet.database.read(lambda tx: tx("SELECT count(*) FROM accounts")) == [(1,)]


def test_commit_that_was_cut_off_and_did_not_happen_is_done_again(new_schema, postgres_server):
    with Wallet(new_schema(on=postgres_server)) as wallet:
        ada, _ = wallet.register("Ada")
        runs = []

        def topup_and_lose_the_connection(tx):
            runs.append(tx("SELECT pg_backend_pid()")[0][0])
            tx("UPDATE accounts SET name = name || '1' WHERE id = ?", ada.id)
            if len(runs) == 1:  # The server ends this session before it reads our COMMIT.
                postgres_server.query("SELECT pg_terminate_backend(%s, 5000)", runs[0])

        wallet.database.write(topup_and_lose_the_connection)
        assert len(runs) == 2
        assert wallet.account(ada.id).name == "Ada1"


@pytest.mark.slow
def test_commit_that_was_cut_off_stays_unknown_where_it_cannot_be_looked_up(
    new_schema, postgres_server, monkeypatch
):
    dsn = new_schema(on=postgres_server)
    with Wallet(dsn) as wallet, psycopg.connect(dsn) as other, ThreadPoolExecutor(2) as threads:
        ada, _ = wallet.register("Ada")
        with standby_missing(postgres_server) as waiting:
            monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 2)
            topup = threads.submit(wallet.topup, ada.id, 5, key="k")
            (backend,) = waiting()
            lock = threads.submit(other.execute, "LOCK TABLE accounts IN ACCESS EXCLUSIVE MODE")
            while not postgres_server.query("SELECT 1 FROM pg_locks WHERE NOT granted"):
                assert not lock.done()
            postgres_server.query("SELECT pg_terminate_backend(%s)", backend)
            assert type(topup.exception(timeout=30)) is OutcomeUnknown
            lock.result(timeout=30)
            other.rollback()
        assert wallet.topup(ada.id, 5, key="k").replayed
        assert wallet.account(ada.id).balance == 5


def test_statement_may_take_as_long_as_a_call(postgres_wallet):
    assert postgres_wallet.database.read(lambda tx: tx("SELECT 1, pg_sleep(1)"))[0][0] == 1


@pytest.mark.slow
def test_commit_that_never_ends_is_unknown_and_its_key_tells_later(
    new_schema, postgres_server, monkeypatch
):
    with Wallet(new_schema(on=postgres_server)) as wallet:
        ada, token = wallet.register("Ada")
        api = Client(create_app(wallet), token)
        monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0.5)
        path, body = "/api/transactions/topup", {"amount": 5}
        with standby_missing(postgres_server):
            answer = api.send("POST", path, body, Idempotency_Key="k", status=503)
            assert answer.json["code"] == "outcome_unknown"
            assert answer.headers["Retry-After"] == "1"
        monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 5)
        time.sleep(wallet_postgres.POSTGRES_AWAY_S)
        again = api.send("POST", path, body, Idempotency_Key="k", status=201)
        assert again.json["balance"] == wallet.account(ada.id).balance == 5
        check_books(wallet)


def test_frozen_server_is_503_in_time_livez_never_waits_and_all_is_well_soon_after(
    new_schema, postgres_server, report
):
    arguments = "--dsn", new_schema(on=postgres_server), "--log-level", "error"
    with served(*arguments, program=limited(DATABASE_TIMEOUT_S=2)) as server:
        token = send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"]

        def topup(number):
            started = time.monotonic()
            status, headers, problem = send(
                server.url,
                "POST",
                "/api/transactions/topup",
                {"amount": 1},
                token,
                Idempotency_Key=f"key-{number}",
            )
            return status, headers["Retry-After"], problem.get("code"), time.monotonic() - started

        assert {topup(number)[0] for number in range(8)} == {201}
        with postgres_server.frozen(), ThreadPoolExecutor(24) as threads:
            futures = [threads.submit(topup, number) for number in range(8, 32)]
            livez = []
            while not all(future.done() for future in futures):
                started = time.monotonic()
                assert send(server.url, "GET", "/livez")[0] == 200
                livez.append(time.monotonic() - started)
                time.sleep(0.05)
            answers = [future.result() for future in futures]
        started = time.monotonic()
        while send(server.url, "GET", "/readyz")[0] != 200 or topup(0)[0] != 201:
            assert time.monotonic() - started < 30
            time.sleep(0.02)
        recovered_s = time.monotonic() - started
        assert {answer[:3] for answer in answers} <= {
            (503, "1", "unavailable"),
            (503, "1", "outcome_unknown"),
        }
        assert {topup(number)[0] for number in range(32)} == {201}
        assert send(server.url, "GET", "/api/account", None, token)[2]["balance"] == 32
        server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=30)
        assert "psycopg" not in log  # It would tell of each try to connect.
        told = "\n".join(log_lines(log))
        assert re.search(
            r"(?m)^ERROR wallet: postgresql://127\.0\.0\.1:\d+/postgres does not answer: ", told
        )
    slowest_s = max(answer[3] for answer in answers)
    report(
        f"503 after {slowest_s:.2f} s at most, {len(livez)} /livez of {max(livez):.3f} s at most,"
        f" well {recovered_s:.2f} s after"
    )
    assert slowest_s < 3
    assert max(livez) < 0.5
    assert recovered_s < 2


@pytest.mark.slow
def test_exhausted_pool_is_503_and_the_queue_for_it_is_bounded(postgres_dsn, monkeypatch):
    monkeypatch.setattr(wallet_postgres, "POSTGRES_WAITING_MAX", 3)
    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 2)
    with Wallet(postgres_dsn, connections=2) as wallet, ThreadPoolExecutor(3) as threads:
        ada, token = wallet.register("Ada")
        api = Client(create_app(wallet), token)
        releases = [hold_the_writer(wallet) for _ in range(2)]
        waiting = [threads.submit(wallet.account, ada.id) for _ in range(3)]
        deadline = time.monotonic() + 30
        while wallet.database._pool.get_stats()["requests_waiting"] < 3:
            assert time.monotonic() < deadline
        answer = api.send("GET", "/api/account", status=503)
        assert "requests waiting" in answer.json["detail"]
        assert not any(future.done() for future in waiting)
        assert {type(future.exception()) for future in waiting} == {Unavailable}
        assert "has stopped answering" in api.send("GET", "/api/account", status=503).json["detail"]
        api.send("GET", "/readyz", status=503)
        for release in releases:
            release()
        while api.send("GET", "/readyz").status_int != 200:
            assert time.monotonic() < deadline
        api.send("POST", "/api/transactions/topup", {"amount": 5}, status=201)


def test_server_that_becomes_a_standby_is_left_for_the_one_that_takes_writes(postgres_dsn):
    with Wallet(postgres_dsn, connections=1) as wallet:
        ada, _ = wallet.register("Ada")
        wallet.database.read(lambda tx: tx("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"))
        assert wallet.topup(ada.id, 5).balance == 5


def test_server_that_only_reads_is_read_from_and_writes_are_unavailable(
    new_schema, postgres_server
):
    with Wallet(new_schema(on=postgres_server)) as wallet:
        ada, _ = wallet.register("Ada")
        with postgres_server.configured(default_transaction_read_only="on"):
            wallet.database._pool.drain()
            refused = "Nothing was changed.*cannot execute .* in a read-only transaction"
            with pytest.raises(Unavailable, match=refused) as failure:
                wallet.topup(ada.id, 5)
            assert type(failure.value) is Unavailable
            assert wallet.account(ada.id) == ada
        assert wallet.topup(ada.id, 5).balance == 5


def test_server_that_may_lose_commits_is_warned_of(new_schema, caplog):
    Wallet(new_schema()).close()
    assert caplog.text == ""
    Wallet(new_schema("%20-csynchronous_commit%3Doff")).close()
    assert re.search(
        "postgresql://.* has synchronous_commit off: in a crash it may lose", caplog.text
    )


BAD_POSTGRES = {
    "no server": ("postgresql://postgres@127.0.0.1:1/wallet", "Connection refused"),
    "no host": ("postgresql://postgres@no.such.host.invalid/wallet", "no.such.host.invalid"),
    "no database": (
        "postgresql://postgres@127.0.0.1:{port}/nothing",
        'database "nothing" does not exist',
    ),
    "no user": ("postgresql://nobody@127.0.0.1:{port}/postgres", 'role "nobody" does not exist'),
    "wrong password": (
        "postgresql://wallet_ada:secret@127.0.0.1:{port}/postgres",
        "password authentication failed",
    ),
    "no password": ("postgresql://wallet_ada@127.0.0.1:{port}/postgres", "no password supplied"),
    "read-only": (
        "{dsn}%20-cdefault_transaction_read_only%3Don",
        "is read-only: name the primary server",
    ),
    "not UTF-8": (
        "postgresql://postgres@127.0.0.1:{port}/sql_ascii",
        "is in SQL_ASCII: make a database with ENCODING",
    ),
    "no rights": (
        "postgresql://wallet_ada:right@127.0.0.1:{port}/postgres",
        "permission denied for schema public",
    ),
    "raw password": ("postgresql://u:se@secret@127.0.0.1/x", "the DSN is malformed: it looks like"),
    "slash behind digits": ("postgresql://u:123/secret@127.0.0.1/x", "the DSN is malformed"),
    "slash in it": ("postgresql://u:se/secret@127.0.0.1/x", "the DSN is malformed"),
    "line break behind it": ("postgresql://u:secret\n@127.0.0.1/x", "has a control character"),
    "password elsewhere": (
        "postgresql://127.0.0.1:1/x?user=u&password=p//a@secret",
        "cannot open postgresql://127.0.0.1:1/x",
    ),
    "no URI": ("password=secret host=x://y", "unknown kind of DSN, ...://; known are"),
    "not UTF-8 in it": ("postgresql://u:%FFsecret@127.0.0.1/x", "the DSN is malformed"),
    "impossible host": ("postgresql://u:secret@a..b/x", "cannot open postgresql://a..b/x: "),
    "percent in it": ("postgresql://u:%zzsecret@127.0.0.1/x", "the DSN is malformed"),
    "unknown option": (
        "postgresql://127.0.0.1/x?user=u&password=secret&pool=5",
        "the DSN is malformed",
    ),
    "bad option": (
        "postgres://u:secret@127.0.0.1/x?sslmode=perhaps",
        'invalid sslmode value: "perhaps"',
    ),
}


# Where waiting cannot help. What is wrong behind a connection that failed, libpq does not tell.
STAYS = {
    "not UTF-8", "raw password", "slash behind digits", "slash in it", "line break behind it",
    "no URI", "not UTF-8 in it", "impossible host", "percent in it", "unknown option",
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_POSTGRES)
def test_postgres_that_cannot_be_used_is_one_line_and_an_exit_code_that_says_whether_to_wait(
    new_schema, postgres_server, refusal, case
):
    bad_dsn, message = BAD_POSTGRES[case]
    postgres_server.query("DROP ROLE IF EXISTS wallet_ada")
    postgres_server.query("CREATE ROLE wallet_ada LOGIN PASSWORD 'right'")
    if not postgres_server.query("SELECT 1 FROM pg_database WHERE datname = 'sql_ascii'"):
        postgres_server.query(
            "CREATE DATABASE sql_ascii ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0"
        )
    bad_dsn = bad_dsn.format(port=postgres_server.port, dsn=new_schema(on=postgres_server))
    told = refusal("--port", "0", code=2 if case in STAYS else 75, WALLET_DSN=bad_dsn)
    assert message in told
    assert "secret" not in told


def test_missing_prometheus_client_is_one_line_with_the_command_that_installs_it(tmp_path):
    program = "import sys, wallet, wallet_cli; sys.modules['prometheus_client'] = None; sys.exit(wallet_cli.main())"
    done = subprocess.run(
        [sys.executable, "-c", program, "--metrics", "1"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert (
        done.stderr == "wallet: prometheus_client is not installed: pip install prometheus-client\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["psycopg", "psycopg_pool"])
def test_missing_driver_is_one_line_with_the_command_that_installs_it(missing):
    program = f"import sys, wallet, wallet_cli; sys.modules[{missing!r}] = None; sys.exit(wallet_cli.main())"
    done = subprocess.run(
        [sys.executable, "-c", program, "--port", "0", "--dsn", "postgresql://x/y"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == f"wallet: {missing} is not installed: pip install 'psycopg[binary]' psycopg-pool\n"
    )


def test_driver_is_imported_for_a_dsn_of_postgres_only_and_the_client_of_prometheus_for_metrics():
    program = (
        "import sys, wallet, wallet_cli; wallet.create_app(wallet.Wallet()); "
        "assert not any('psycopg' in name or 'prometheus' in name for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=environment(), timeout=60)


def test_same_requests_get_the_same_answers_on_each_engine_to_the_byte(
    file_dsn, postgres_dsn, sharded_dsn, monkeypatch
):
    def session(dsn):
        random, answers = iter(string.ascii_letters), []
        monkeypatch.setattr(wallet_module, "_random_base62", lambda length: next(random) * length)
        # Each request takes its time, however often the engine looks at the clock in it.
        monkeypatch.setattr(time, "time_ns", lambda: 10**18 + len(answers) * 1_234_567_000)
        with Wallet(dsn) as wallet:
            api = Client(create_app(wallet))

            def send(*arguments, **options):
                answers.append(api.send(*arguments, X_Request_Id=f"r{len(answers)}", **options))

            send("POST", "/api/register", {"name": "Ädä 👩‍🚀"})
            api.token = answers[0].json["token"]
            topup, charge, history = (
                f"/api/transactions{path}" for path in ("/topup", "/charge", "")
            )
            send("GET", "/api/account")
            for body in (
                {"amount": AMOUNT_MAX - 7, "description": "día\u2028'\"\\"},
                {"amount": 8},
                {"amount": 7},
                {},
            ):
                send("POST", topup, body, Idempotency_Key=f"k{len(body)}")
            send("POST", topup, {"amount": 7}, Idempotency_Key="k1")
            send("POST", topup, {"amount": 1}, Idempotency_Key="k1")
            for amount in (3, AMOUNT_MAX, AMOUNT_MAX - 3, 1):
                send("POST", charge, {"amount": amount, "description": ""})
            for query in ("", "?limit=1", "?type=charge", "?cursor=x"):
                send("GET", history + query)
            send("POST", "/api/register", {"name": "Bob"})
            bob = answers[-1].json["id"]
            charged = next(one.json["id"] for one in answers if one.json.get("type") == "charge")
            for path, body in (
                ("/transfer", {"to": bob, "amount": 2, "metadata": {"b": "ü", "a": ""}}),
                ("/transfer", {"to": bob, "amount": AMOUNT_MAX}),
                (f"/{charged}/refund", {"amount": 2}),
                (f"/{charged}/refund", {}),
                (f"/{charged}/refund", {}),
                (
                    "/batch",
                    {
                        "transactions": [
                            {"type": "charge", "amount": 1},
                            {"type": "topup", "amount": 1},
                        ]
                    },
                ),
            ):
                send(
                    "POST",
                    history + path,
                    body,
                    Idempotency_Key="k9" if path == "/batch" else "k" + path,
                )
            send("POST", topup, {"amount": 1000})
            for seconds in (1, None):
                send(
                    "POST",
                    "/api/holds",
                    {"amount": 100, "expires_in_s": seconds, "description": "ü"},
                )
            first, second = (f"/api/holds/{one.json['id']}" for one in answers[-2:])
            for path in (f"{first}/capture", f"{second}/capture", f"{second}/release"):
                send("POST", path, {"amount": 40} if "capture" in path else {})
            for path in (
                "/api/holds",
                first,
                "/api/account",
                "/api/transactions.csv",
                f"{history}?after=0&limit=3",
                f"{history}?since=2001-09-09T01:46:55Z",
                "/api/account/balance?at=2001-09-09T01:46:55Z",
            ):
                send("GET", path)
            send("GET", f"{history}/{answers[2].json['id']}")
            send("GET", f"{history}/txn_{'a' * 16}_9")
            send("GET", "/readyz")
            return [
                (answer.status, sorted(answer.headers.items()), answer.body) for answer in answers
            ]

    on_sqlite, on_postgres = session(file_dsn), session(postgres_dsn)
    assert on_sqlite == on_postgres
    assert on_sqlite == session(sharded_dsn)
    assert {status[:3] for status, _, _ in on_sqlite} == {
        "200",
        "201",
        "400",
        "402",
        "404",
        "409",
        "422",
    }


@pytest.mark.slow
def test_connections_that_were_cut_are_replaced_and_no_call_notices(new_schema, postgres_server):
    with Wallet(new_schema(on=postgres_server), connections=4) as wallet:
        ada, _ = wallet.register("Ada")
        for _ in range(3):
            ask = "SELECT pg_backend_pid(), pg_sleep(0.1)"
            backends = together(*[lambda: wallet.database.read(lambda tx: tx(ask))] * 4)  # noqa: B023
            for backend in {rows[0][0] for rows in backends}:
                postgres_server.query("SELECT pg_terminate_backend(%s, 5000)", backend)
            outcomes = together(*[lambda: wallet.topup(ada.id, 1)] * 8)
            assert [outcome for outcome in outcomes if isinstance(outcome, Exception)] == []
        assert wallet.account(ada.id).balance == 24


def test_read_that_a_lock_holds_up_ends_at_the_server_too_and_others_go_on(
    new_schema, postgres_server, monkeypatch
):
    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0.5)
    dsn = new_schema(on=postgres_server)
    with Wallet(dsn) as wallet, psycopg.connect(dsn) as other, ThreadPoolExecutor(1) as thread:
        ada, _ = wallet.register("Ada")
        other.execute("LOCK TABLE transactions IN ACCESS EXCLUSIVE MODE")
        held_up = thread.submit(wallet.transactions, ada.id)
        while not held_up.done():
            assert wallet.account(ada.id) == ada
        assert isinstance(held_up.exception(), Unavailable)
        assert wallet.account(ada.id) == ada
        waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE %s"
        deadline = time.monotonic() + 30
        while postgres_server.query(waiting, "%account_id%"):
            assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("table", "columns"),
    [
        ("wallet", "id INTEGER"),
        ("accounts", "id TEXT PRIMARY KEY, email TEXT"),
        ("transactions", "account_id TEXT"),
    ],
)
def test_schema_of_another_program_is_refused_and_left_as_it_was(postgres_dsn, table, columns):
    with psycopg.connect(postgres_dsn, autocommit=True) as other:
        other.execute(f"CREATE TABLE {table} ({columns})")
        with pytest.raises(
            ConfigurationError, match=f"the table {table} in .* is another program's: name another"
        ):
            Wallet(postgres_dsn)
        left = (
            "SELECT table_name FROM information_schema.tables WHERE table_schema = current_schema"
        )
        assert other.execute(left).fetchall() == [(table,)]


WANTING = [
    "SERIAL",
    "BIGSERIAL",
    "IDENTITY",
    "CREATE SEQUENCE",
    "nextval",
    "TRIGGER",
    "FUNCTION",
    "PROCEDURE",
    "EXTENSION",
    "pg_advisory",
    "LISTEN",
    "NOTIFY",
    "SKIP LOCKED",
    "NOWAIT",
    "FOR UPDATE",
    "SAVEPOINT",
    "DEFERRABLE",
    "LOCK TABLE",
    "xmin",
    "ctid",
    "txid",
    "MERGE",
    "TRUNCATE",
    "EXCLUDE",
    "INHERITS",
    "TABLESPACE",
]

# What SQL is put together from, apart from constants: parts of it that are, each, one of a few
# constants.
SQL_PARTS = {
    "cache_kb",
    "cases",  # Of _FileChecks: these and index, primary, same and other are names in the file.
    "check",
    "columns",
    "condition",
    "end_sql",
    "index",
    "into",
    "key",
    "marks",
    "of_each",
    "of_type",
    "one",
    "order",
    "other",
    "primary",
    "same",
    "start_sql",
    "table",
    "values",
    "' DESC, '.join(columns)",
    "ENTRY_COLUMNS.replace(', ', ', t.')",
}


def foreign_parts(source):
    """Return what is put into SQL as text, and is neither a constant nor one of SQL_PARTS."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            text = "".join(part.value for part in node.values if isinstance(part, ast.Constant))
            if re.search(
                r"\b(SELECT|INSERT INTO|UPDATE \w+ SET|DELETE FROM|WHERE|ORDER BY|VALUES|PRAGMA)\b",
                text,
            ):
                found |= {
                    ast.unparse(part.value)
                    for part in node.values
                    if isinstance(part, ast.FormattedValue)
                }
        elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mod)):
            assert not re.search(
                r"'[^']*\b(SELECT|INSERT INTO|DELETE FROM|WHERE)\b", ast.unparse(node)
            )
    return {part for part in found if not part.isupper()} - SQL_PARTS


FUTURE = "from __future__ import annotations\n"


def test_no_value_is_ever_put_into_sql_as_text():
    """The linter that looks for this cannot tell a constant from a value, so it leaves that to this
    test.
    """
    source = "".join((HERE / name).read_text() for name in MODULES).replace(FUTURE, "")
    assert foreign_parts(source) == set()
    assert foreign_parts(source + "\ntx(f\"SELECT 1 FROM accounts WHERE name = '{name}'\")") == {
        "name"
    }


def sql_statements():
    """Return every SQL text of the modules that either engine may get, and of the files of SQL."""
    tree = ast.parse("".join((HERE / name).read_text() for name in MODULES).replace(FUTURE, ""))
    skipped = next(
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "SQLiteDatabase"
    )
    texts = [
        ast.unparse(node)
        for part in tree.body
        if part is not skipped
        for node in ast.walk(part)
        if isinstance(node, ast.JoinedStr)
        or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    ]
    words = (
        r"\b(SELECT .* FROM|INSERT INTO|UPDATE \w+\s+SET|DELETE FROM|BEGIN|COMMIT|SET LOCAL|CASE)\b"
    )
    found = [text for text in texts if re.search(words, text, re.DOTALL)]
    files = re.sub("--.*", "", "".join(path.read_text() for path in HERE.glob("*.sql")))
    return [*found, *files.split(";")]


def test_sql_keeps_to_what_distributed_databases_have():
    def lacking(statements):
        return {
            word
            for word in WANTING
            for sql in statements
            if re.search(rf"\b{word}\b", sql, re.IGNORECASE)
        }

    assert lacking(
        ["CREATE TABLE t (id BIGSERIAL)", "SELECT 1 FOR UPDATE skip locked", "LISTEN a"]
    ) == {"BIGSERIAL", "FOR UPDATE", "SKIP LOCKED", "LISTEN"}
    statements = sql_statements()
    assert len(statements) > 15
    # The one that Postgres alone gets (see the tests of a sharded engine).
    at_once = {sql for sql in statements if "WITH free AS (SELECT id FROM accounts" in sql}
    assert lacking(at_once) == {"FOR UPDATE", "SKIP LOCKED"}
    assert lacking(set(statements) - at_once) == set()


def test_every_key_begins_with_the_account_id(postgres_wallet):
    keys = postgres_wallet.database.read(
        lambda tx: tx("""
        SELECT relname, attname, indisunique FROM pg_index JOIN pg_class ON pg_class.oid = indrelid
        JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
        WHERE relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema()) ORDER BY 1, 2, 3""")
    )
    account_id = {"accounts": "id", "transactions": "account_id", "holds": "account_id"}
    assert [(table, column) for table, column, _ in keys if table in account_id] == [
        ("accounts", "created_at"),  # By which they are listed. It is no key.
        ("accounts", "id"),
        *[("holds", "account_id")] * 2,
        *[("transactions", "account_id")] * 4,
        ("transactions", "created_at"),  # Nor is that by which the newest of all are found.
    ]
    assert {unique for _, column, unique in keys if column == "created_at"} == {False}
    # The one has one row. The other is for keys that no account has, and looked at for no account's.
    assert {table for table, _, _ in keys} - account_id.keys() == {"wallet", "issuer_keys"}
    assert postgres_wallet.database.read(lambda tx: tx("SELECT id FROM wallet")) == [(1,)]


def test_compose_file_runs_a_wallet_over_postgres_and_holds_no_secret(postgres_server):
    compose = load_yaml((HERE / "compose.yaml").read_text())
    service, database = compose["services"]["wallet"], compose["services"]["postgres"]
    assert database["image"] == "postgres:17-trixie"
    assert service["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert "--host=127.0.0.1" in database["healthcheck"]["test"]
    assert [volume.partition(":")[0] for volume in database["volumes"]] == list(compose["volumes"])
    assert service["ports"] == ["127.0.0.1:${WALLET_PORTS:-4000}:4000"]
    secrets = [
        value
        for one in (service, database)
        for name, value in one["environment"].items()
        if "PASSWORD" in name
    ]
    assert len(secrets) == 2
    assert all(
        value.startswith("${POSTGRES_PASSWORD:?") for value in secrets
    )  # Without it, compose stops.

    def filled(values):
        pattern = r"\$\{POSTGRES_PASSWORD:\?[^}]*\}"
        return {
            name: re.sub(pattern, "p@ss/w%rd?", text)
            for name, text in values.items()
            if text is not None  # Compose passes such a name on only where it is set.
        }

    given, wanted = filled(service["environment"]), filled(database["environment"])
    in_image = dict(re.findall(r"(WALLET_\w+)=(\S+)", (HERE / "Dockerfile").read_text()))
    user, password = wanted["POSTGRES_USER"], wanted["POSTGRES_PASSWORD"]
    postgres_server.query(f"CREATE ROLE {user} LOGIN PASSWORD '{password}'")
    postgres_server.query(f"CREATE DATABASE {wanted['POSTGRES_DB']} OWNER {user}")
    # What the network of compose does: the name of the service leads to the server.
    network = {"PGHOSTADDR": "127.0.0.1", "PGPORT": str(postgres_server.port)}
    settings = in_image | given | network
    refused = command("--port", "0", **settings)  # The tables are not there.
    assert (refused.returncode, "let the command init make" in refused.stderr) == (75, True)
    assert command("init", **settings).returncode == 0
    with served(**settings) as server:
        assert "with its data in postgresql://postgres/wallet, in USD:" in server.banner
        token = send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"]
        assert (
            send(server.url, "POST", "/api/transactions/topup", {"amount": 5}, token)[2]["balance"]
            == 5
        )
    wrong = command("--port", "0", **in_image | given | network | {"PGPASSWORD": "wrong"})
    assert (wrong.returncode, "password authentication failed" in wrong.stderr) == (75, True)
