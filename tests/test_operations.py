"""Metrics, logs, and the client's address behind a proxy."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import re
import signal
import sqlite3
import string
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone

import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

import wallet as wallet_module
import wallet_metrics
from tests.support import (
    BUGGY,
    ISSUER_TOKEN,
    POST,
    README,
    WRONG_TOKEN,
    Client,
    call,
    files_cannot_grow,
    hold_the_writer,
    limited,
    raw_exchange,
    readme_table,
    send,
    served,
    wait_for_queue,
    workers_of,
)
from wallet import ConfigurationError, InsufficientFunds, Unavailable, Wallet, create_app

# Metrics, logs and the client's address ###########################################################


BUSY = "waiting", "running", "connections"  # What a server tells of.


def parse_metrics(text):
    """Return the families of a scrape by name, as Prometheus's own parser reads them, and each
    sample's value.
    """
    families = {}
    for family in text_string_to_metric_families(text.decode()):
        is_counter = family.type == "counter"
        assert family.name not in families
        families[family.name + "_total" * is_counter] = family
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in families.values()
        for sample in family.samples
    }
    return families, samples


def scrape(app):
    return parse_metrics(Client(app).send("GET", "/metrics", status=200).body)


def select_samples(samples, *names):
    """Return what some of the families have that is not 0."""
    return {key: value for key, value in samples.items() if key[0] in names and value}


def send_known_requests(url, dsn):
    """Send requests of every kind. Return what no metric may have in it."""
    (ada, her_token), (bob, _) = [
        (answer["id"], answer["token"])
        for answer in (
            send(url, "POST", "/api/register", {"name": name})[2]
            for name in ("Ada in person", "Bob in person")
        )
    ]

    def ask(status, method, path, body=None, **headers):
        got, _, document = send(
            url, method, path, body, her_token, X_Request_Id="checkout-zebra", **headers
        )
        assert got == status, document
        return document

    def post(status, path, body=None, **headers):
        return ask(status, "POST", f"/api/{path}", {} if body is None else body, **headers)

    for _ in range(2):  # The second is the same movement.
        post(201, "transactions/topup", {"amount": 1000}, Idempotency_Key="order-zebra")
    charge = post(201, "transactions/charge", {"amount": 250, "description": "Shoes-zebra"})["id"]
    post(402, "transactions/charge", {"amount": 5000})
    post(422, "transactions/charge", {"amount": "wlt_zebra", "field-zebra": 1})
    post(201, f"transactions/{charge}/refund", {"amount": 50})
    post(201, "transactions/transfer", {"amount": 100, "to": bob})
    hold = post(201, "holds", {"amount": 200})["id"]
    post(201, f"holds/{hold}/capture", {"amount": 150})
    post(409, f"holds/{hold}/capture")
    hold = post(201, "holds", {"amount": 10})["id"]
    post(201, f"holds/{hold}/release")
    post(
        201,
        "transactions/batch",
        {
            "transactions": [
                {"type": "topup", "amount": 5},
                {"type": "charge", "amount": 3},
                {"type": "charge", "amount": 2},
            ]
        },
    )
    post(402, "transactions/batch", {"transactions": [{"type": "charge", "amount": 9999}]})
    ask(200, "GET", f"/api/transactions/{charge}")
    ask(404, "GET", f"/api/transactions/{charge}0")
    ask(404, "GET", "/path-zebra?query-zebra=1")
    ask(405, "DELETE", "/api/account")
    assert (
        raw_exchange(url, POST + b"Content-Length: 65537\r\n\r\n".ljust(65600))[9:12] == b"413"
    )  # By the server.
    with contextlib.ExitStack() as locked:
        if dsn.startswith("sqlite"):
            other = locked.enter_context(
                contextlib.closing(sqlite3.connect(dsn.removeprefix("sqlite:///")))
            )
            other.execute("BEGIN IMMEDIATE")
        else:
            locked.enter_context(psycopg.connect(dsn)).execute("LOCK TABLE accounts")
        post(503, "transactions/charge", {"amount": 1})
    ask(200, "GET", "/api/account")
    return [ada[4:], bob[4:], her_token[20:], "zebra", "person"]


KNOWN_ANSWERS = """
    /api/register POST 201 2, /api/transactions/topup POST 201 2, /api/transactions/charge POST 201 1,
    /api/transactions/charge POST 402 1, /api/transactions/charge POST 422 1, /api/transactions/{id}/refund POST 201 1,
    /api/transactions/transfer POST 201 1, /api/holds POST 201 2, /api/holds/{id}/capture POST 201 1,
    /api/holds/{id}/capture POST 409 1, /api/holds/{id}/release POST 201 1, /api/transactions/batch POST 201 1,
    /api/transactions/batch POST 402 1, /api/account GET 200 1, /api/transactions/{id} GET 200 1,
    /api/transactions/{id} GET 404 1, other GET 404 1, other other 405 1, other POST 413 1,
    /api/transactions/charge POST 503 1"""


@pytest.mark.slow_on("postgres")
def test_metrics_are_exact_and_tell_of_nobody(durable_dsn):
    arguments = "--dsn", durable_dsn, "--threads", "1"
    with served(*arguments, program=limited(DATABASE_TIMEOUT_S=1), WALLET_METRICS="1") as server:
        secrets = send_known_requests(server.url, durable_dsn)
        status, headers, text = send(server.url, "GET", "/metrics")
        assert (status, headers["Content-Type"]) == (
            200,
            "text/plain; version=0.0.4; charset=utf-8",
        )
        families, samples = parse_metrics(text)
        again = parse_metrics(send(server.url, "GET", "/metrics")[2])[1]
        (process,) = workers_of(server)
        assert samples[("process_start_time_seconds",)] == pytest.approx(time.time(), abs=60)
        assert samples[("process_open_fds",)] == pytest.approx(
            len(os.listdir(f"/proc/{process}/fd")), abs=8
        )
        server.terminate()
        assert server.wait(30) == 0
    requests = {
        ("wallet_requests_total", *sorted([route, method, status])): int(count)
        for route, method, status, count in map(str.split, KNOWN_ANSWERS.split(","))
    }
    assert select_samples(samples, "wallet_requests_total") == requests
    assert (
        again.items()
        >= {**requests, ("wallet_requests_total", "/metrics", "200", "GET"): 1}.items()
    )
    by_route = Counter()
    for (_, *labels), count in requests.items():
        by_route[next((one for one in labels if one.startswith("/")), "other")] += count
    counts = select_samples(samples, "wallet_request_duration_seconds_count")
    assert counts == {
        ("wallet_request_duration_seconds_count", route): count for route, count in by_route.items()
    }
    assert all(0 < samples["wallet_request_duration_seconds_sum", route] < 60 for route in by_route)
    assert samples["wallet_request_duration_seconds_bucket", "+Inf", "other"] == by_route["other"]
    assert (
        0.5 < samples["wallet_request_duration_seconds_sum", "/api/transactions/charge"] < 5
    )  # It waited for a lock.
    moved = {
        "topup": (2, 1005),
        "charge": (4, 405),
        "refund": (1, 50),
        "transfer_in": (1, 100),
        "transfer_out": (1, 100),
    }
    for number, name in enumerate(("wallet_movements_total", "wallet_movement_amount_total")):
        assert select_samples(samples, name) == {
            (name, type): both[number] for type, both in moved.items()
        }
    assert select_samples(samples, "wallet_refusals_total") == {
        ("wallet_refusals_total", *sorted(labels.split())): 1
        for labels in (
            "/api/transactions/charge insufficient_funds",
            "/api/transactions/charge validation_failed",
            "/api/transactions/charge unavailable",
            "/api/transactions/batch insufficient_funds",
            "/api/transactions/{id} not_found",
            "/api/holds/{id}/capture hold_not_active",
            "other not_found",
            "other method_not_allowed",
            "other body_too_large",
        )
    }
    waiting, running, connections = (samples[name,] for name in wallet_metrics.SERVER_GAUGES)
    assert (waiting, running, connections >= 1) == (0, 1, True)  # It is this request.
    assert samples["wallet_log_lines_dropped_total",] == 0
    ((_, version, engine),) = (key for key in samples if key[0] == "wallet_build_info")
    assert version == wallet_module.__version__
    assert re.fullmatch("SQLite" if "sqlite" in durable_dsn else "Postgres", engine.split()[0])
    assert select_samples(samples, "wallet_commit_writes_count", "wallet_commit_writes_sum") == {
        ("wallet_commit_writes_count",): 12,
        ("wallet_commit_writes_sum",): 12,
    }
    assert samples["wallet_commit_writes_bucket", "1.0"] == 12
    assert {
        key[1]: value for key, value in samples.items() if key[0] == "wallet_database_errors_total"
    } == {"unavailable": 1, "outcome_unknown": 0}
    assert {
        key[1]: value for key, value in samples.items() if key[0] == "wallet_pool_connections"
    } == {"idle": 1, "in_use": 0}
    assert samples[("wallet_pool_waiting",)] == 0
    assert {name for name in families if not name.startswith("process_")} == {
        row[0].strip("`") for row in readme_table("Metrics")
    }
    assert [secret for secret in secrets if secret in text.decode()] == []


def test_readme_lists_every_metric():
    with Wallet() as wallet:
        api = Client(create_app(wallet, metrics=True), wallet.register("Ada")[1])
        api.send("POST", "/api/transactions/charge", {"amount": 1}, status=402)
        api.app.app.metrics.watch(lambda: dict.fromkeys(BUSY, 0))  # As where the wallet serves itself.
        families, _ = scrape(api.app.app)
    known = [
        [
            f"`{name}`",
            family.type,
            ", ".join(f"`{label}`" for label in sorted(family.samples[0].labels.keys() - {"le"})),
            family.documentation,
        ]
        for name, family in families.items()
        if not name.startswith("process_")
    ]
    assert readme_table("Metrics") == known
    alerts = " ".join(re.findall(r"(?m)^ +expr: (.*)$", README))
    watched = {name.removesuffix("_bucket") for name in re.findall(r"wallet_\w+", alerts)}
    assert (
        {"wallet_requests_total", "wallet_request_duration_seconds"} == watched <= families.keys()
    )


class CarelessMetrics(wallet_metrics.Metrics):
    """Has any method that was asked for in a label."""

    def count(self, rule, method, answer, duration_s):
        super().count(f"{rule} {method}", method, answer, duration_s)


@pytest.mark.parametrize(("careless", "count"), [(False, 2000), (True, 200)])
def test_no_client_makes_a_new_time_series(sqlite_wallet, monkeypatch, careless, count):
    if careless:
        monkeypatch.setattr(wallet_metrics, "Metrics", CarelessMetrics)
    app, odd = create_app(sqlite_wallet, metrics=True), random.Random(1)

    def ask():
        """Send a request such as a stranger may make up. Return its status."""
        text = "".join(odd.choices(string.printable + "é\xff", k=odd.randrange(1, 30)))
        number = odd.randrange(10**9)
        path = odd.choice(
            [
                f"/{text}",
                f"/api/{number}",
                f"/api/holds/hld_{'0' * 16}_{number}",
                f"/metrics{number}",
                f"/api/transactions/charge{text}",
                "/api/transactions/charge",
                "/api/account",
                "/livez",
            ]
        )
        headers = {
            "HTTP_AUTHORIZATION": odd.choice(["", text, f"Bearer {WRONG_TOKEN}"]),
            "QUERY_STRING": text[25:],
            "HTTP_X_REQUEST_ID": text,
            "HTTP_IDEMPOTENCY_KEY": text,
        }
        return call(
            app, odd.choice([text, f"M{number}", "get", "GET", "HEAD", "POST"]), path, headers
        )

    assert {ask() for _ in range(count)} >= {200, 400, 401, 404, 405}
    first = scrape(app)[1].keys() | scrape(app)[1].keys()  # The second has what the first has made.
    for _ in range(count):
        ask()
    assert (scrape(app)[1].keys() == first) != careless


def test_without_metrics_there_is_no_such_route(api, wallet):
    unknown = api.send("GET", "/unknown", status=404)
    for method in ("GET", "HEAD", "POST", "DELETE"):
        answer = api.send(method, "/metrics", status=404)
        assert method == "HEAD" or answer.json == unknown.json
    with_metrics = Client(create_app(wallet, metrics=True))
    assert with_metrics.send("POST", "/metrics", status=405).headers["Allow"] == "GET, HEAD"
    assert with_metrics.send("HEAD", "/metrics", status=200).body == b""
    with_metrics.send("GET", "/metrics?name=x", status=400)
    api.send("GET", "/metrics", status=404)


def test_metrics_of_two_applications_are_their_own_and_the_environment_turns_them_on(
    monkeypatch, wallet
):
    monkeypatch.setenv("WALLET_METRICS", "1")
    monkeypatch.setenv("WALLET_DSN", "sqlite://")
    mine, other = create_app(wallet, metrics=True), create_app()
    call(mine, "GET", "/livez")
    key = ("wallet_requests_total", "/livez", "200", "GET")
    assert (scrape(mine)[1][key], key in scrape(other)[1]) == (1, False)
    other.wallet.close()


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_metrics_show_how_many_writes_share_a_commit_and_what_waits(file_wallet):
    app, ada = create_app(file_wallet, metrics=True), file_wallet.register("Ada")[0]
    release, reading = hold_the_writer(file_wallet), threading.Event()
    with ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(file_wallet.topup, ada.id, 1) for _ in range(3)]
        wait_for_queue(file_wallet, 3)

        def read(tx):
            reading.set()
            wait_for(lambda: not file_wallet.database.usage()["waiting"])

        futures.append(threads.submit(file_wallet.database.read, read))
        assert reading.wait(30)
        before = scrape(app)[1]
        release()
        assert all(future.result() for future in futures[:3])
        futures[3].result()
    after = scrape(app)[1]
    assert before[("wallet_pool_waiting",)] == 3
    assert (
        before["wallet_pool_connections", "in_use"],
        after["wallet_pool_connections", "in_use"],
    ) == (1, 0)
    commits = [before["wallet_commit_writes_bucket", le] for le in ("1.0", "2.0", "4.0", "+Inf")]
    assert commits == [1, 1, 1, 1]
    commits = [after["wallet_commit_writes_bucket", le] for le in ("1.0", "2.0", "4.0", "+Inf")]
    assert commits == [2, 2, 3, 3]


def test_metrics_show_what_waits_for_a_connection_to_postgres(postgres_dsn):
    with Wallet(postgres_dsn, connections=1) as wallet, ThreadPoolExecutor(3) as threads:
        app, go_on = create_app(wallet, metrics=True), threading.Event()
        for _ in range(3):
            threads.submit(wallet.database.read, lambda tx: go_on.wait(30))
        wait_for(lambda: wallet.database.usage()["waiting"] == 2)
        samples = scrape(app)[1]
        go_on.set()
    assert [samples["wallet_pool_connections", state] for state in ("idle", "in_use")] == [0, 1]
    assert samples[("wallet_pool_waiting",)] == 2


def test_metrics_count_what_the_database_could_not_do(wallet):
    app, ada = create_app(wallet, metrics=True), wallet.register("Ada")[0]
    for call_database, count in ((wallet.database.read, 1), (wallet.database.write, 2)):
        with pytest.raises(Unavailable):
            call_database(lambda tx: tx("SELECT * FROM nothing"))
        assert scrape(app)[1]["wallet_database_errors_total", "unavailable"] == count
    with pytest.raises(InsufficientFunds):
        wallet.charge(ada.id, 1)  # Which is the wallet's doing.
    assert scrape(app)[1]["wallet_database_errors_total", "unavailable"] == 2


def test_metrics_count_what_may_have_been_done(file_wallet):
    _, token = file_wallet.register("Ada")
    app = create_app(file_wallet, metrics=True)
    with files_cannot_grow():
        Client(app, token).send(
            "POST", "/api/transactions/topup", {"amount": 5}, Idempotency_Key="k", status=503
        )
    samples = scrape(app)[1]
    assert samples["wallet_database_errors_total", "outcome_unknown"] == 1
    assert samples[("wallet_commit_writes_count",)] == 0


def test_metrics_name_the_route_of_the_issuer_whole():
    with Wallet() as wallet:
        app, ada = create_app(wallet, ISSUER_TOKEN, metrics=True), wallet.register("Ada")[0].id
        wallet.topup(ada, 5)
        path = f"/api/accounts/{ada}/transactions/{wallet.charge(ada, 5).id}/refund"
        Client(app, ISSUER_TOKEN).send("POST", path, None, status=201)
        assert 'route="/api/accounts/{id}/transactions/{id}/refund"' in Client(app).send("GET", "/metrics").text


class BreakingWallet(Wallet):
    """Cannot say what a balance was, and has no room."""

    def balance_at(self, account_id, at):
        raise RuntimeError("a bug")

    def charge(self, account_id, amount, **options):
        raise Unavailable("full") if amount == 1 else RuntimeError("a bug")


def test_log_names_the_account_once_its_token_was_found_right(caplog):
    caplog.set_level(logging.INFO, "wallet.access")
    with BreakingWallet() as wallet:
        ada, token = wallet.register("Ada")
        wrong = wallet_module._make_token(
            ada.id
        )  # It claims to be hers, and its checksum is right.
        app, topup, charge = (
            create_app(wallet, ISSUER_TOKEN),
            f"/api/accounts/{ada.id}/transactions/topup",
            "/api/transactions/charge",
        )
        hold = {"amount": 1}
        for who, method, path, body, status, known in (
            (token, "GET", "/api/account", None, 200, True),
            (token, "GET", "/api/account?typo=1", None, 400, True),
            (token, "GET", "/api/account/balance?at=x", None, 500, True),
            (token, "POST", "/api/holds", hold, 402, True),
            (token, "POST", "/api/holds", {"typo": 1}, 422, True),
            (
                token,
                "POST",
                "/api/transactions/batch",
                {"transactions": [{"type": "topup"}]},
                403,
                True,
            ),
            (wrong, "GET", "/api/account", None, 401, False),
            (wrong, "POST", "/api/holds", hold, 401, False),
            (wrong, "POST", "/api/holds", {"typo": 1}, 401, False),
            (wrong, "POST", charge, {"amount": 1}, 503, False),  # Before anyone has looked at it.
            (wrong, "POST", charge, {"amount": 2}, 500, False),
            (token, "GET", "/nowhere", None, 404, False),
            (None, "GET", "/openapi.yaml", None, 200, False),
            (ISSUER_TOKEN, "POST", topup, {"amount": 5}, 201, False),
        ):
            caplog.clear()
            Client(app, who).send(method, path, body, status=status)
            (record,) = [record for record in caplog.records if record.name == "wallet.access"]
            assert (record.status, record.account_id) == (status, ada.id if known else None), (
                path,
                status,
            )
            assert record.getMessage().split()[-2] == (ada.id if known else "-")
            assert (record.method, record.path) == (method, path.partition("?")[0])
        told = logging.Formatter("%(status)s %(request_id)s %(duration_ms)s").format(record)
        assert re.fullmatch(r"201 [0-9a-f]{16} \d+\.\d", told)


@pytest.mark.parametrize(
    ("trusted", "peer", "forwarded", "client"),
    [
        (None, "203.0.113.9", "198.51.100.1", "203.0.113.9"),  # Nobody is trusted.
        ("10.0.0.1", "10.0.0.2", "198.51.100.1", "10.0.0.2"),  # Somebody else forges it.
        ("10.0.0.1", "10.0.0.1", "198.51.100.1", "198.51.100.1"),
        (
            "10.0.0.1",
            "10.0.0.1",
            "192.0.2.66, 198.51.100.1",
            "198.51.100.1",
        ),  # The client has forged the first.
        ("10.0.0.1", "10.0.0.1", "192.0.2.66,198.51.100.1", "198.51.100.1"),
        (
            "10.0.0.1",
            "10.0.0.1",
            "198.51.100.1, 10.0.0.3",
            "10.0.0.3",
        ),  # Another proxy, which is not trusted.
        ("10.0.0.1", "10.0.0.1", None, "10.0.0.1"),
        *[
            ("10.0.0.1", "10.0.0.1", garbage, "10.0.0.1")
            for garbage in (
                "",
                ",",
                "unknown",
                "198.51.100.1,",
                "_hidden",
                "198.51.100.1:",
                "198.51.100.1:80:80",
                "198.51.100.1:80 forged",
                "198.51.100.300",
                "198.51.100.300:80",
                "[2001:db8::1",
                "[2001:db8::1]80",
                "[2001:db8::g]:80",
                "2001:db8::1]:80",
                "1",
                "0x7f000001",
                "localhost",
                WRONG_TOKEN,
                "198.51.100.1 forged",
                "é",
            )
        ],
        ("10.0.0.1", "10.0.0.1", "::1%\xa0 forged\n", "::1"),
        ("10.0.0.1", "10.0.0.1", "203.0.113.7:4711", "203.0.113.7"),  # With the port.
        ("10.0.0.1", "10.0.0.1", "evil, 203.0.113.7:4711", "203.0.113.7"),
        ("10.0.0.1", "10.0.0.1", "[2001:db8::1]:4711", "2001:db8::1"),
        ("10.0.0.1", "10.0.0.1", "[2001:db8::1]", "2001:db8::1"),
        ("10.0.0.1", "10.0.0.1", "[::ffff:203.0.113.7]:4711", "203.0.113.7"),
        (None, "::ffff:203.0.113.9", "198.51.100.1", "203.0.113.9"),  # To `--host ::`.
        ("10.0.0.1", "::ffff:10.0.0.1", "2001:DB8:0::1", "2001:db8::1"),
        ("::1", "0:0:0:0:0:0:0:1", "evil, 2001:db8::1", "2001:db8::1"),
        ("fe80::1", "fe80::1%eth0", "::ffff:198.51.100.1", "198.51.100.1"),
        (" 10.0.0.1 ", "10.0.0.1", "198.51.100.1", "198.51.100.1"),
        ("10.0.0.1", "", "198.51.100.1", None),  # As on a Unix socket.
    ],
)
def test_log_has_the_address_that_the_trusted_proxy_tells_and_no_other(
    trusted, peer, forwarded, client, caplog
):
    caplog.set_level(logging.INFO, "wallet.access")
    headers = {} if forwarded is None else {"HTTP_X_FORWARDED_FOR": forwarded}
    with Wallet() as wallet:
        assert (
            call(
                create_app(wallet, trusted_proxy=trusted),
                "GET",
                "/openapi.yaml",
                {"REMOTE_ADDR": peer, **headers},
            )
            == 200
        )
    (record,) = caplog.records
    assert record.client == (client or "")
    assert record.getMessage().split()[-1] == (client or "-")


def test_proxy_that_is_not_one_address_is_refused():
    with Wallet() as wallet:
        for wrong in ("*", "10.0.0.0/8", "10.0.0.1,10.0.0.2", "localhost", "unix", " "):
            with pytest.raises(ConfigurationError, match="must be the IP address of one proxy"):
                create_app(wallet, trusted_proxy=wrong)


def test_log_that_is_no_terminals_is_json_with_the_address_that_the_trusted_proxy_tells():
    arguments = "--dsn", "sqlite://", "--host", "::1", "--trusted-proxy", "0:0:0:0:0:0:0:1"
    started = datetime.now(timezone.utc)
    program = "-c", f"{BUGGY}\nsys.exit(wallet_cli.main())"
    with served(*arguments, program=program) as server:
        ada = send(server.url, "POST", "/api/register", {"name": "Ada"}, X_Request_Id="req-1")[2]
        for forwarded in ("192.0.2.66, 198.51.100.1", "garbage"):
            send(server.url, "GET", "/api/account", token=ada["token"], X_Forwarded_For=forwarded)
        request = (
            POST
            + b"Connection: close\r\nX-Forwarded-For: 192.0.2.66\r\nX-Forwarded-For: 198.51.100.2\r\n"
        )
        raw_exchange(server.url, request + b"Content-Length: 99999\r\n\r\n" + b"x" * 99999)
        path = f"/api/account/balance?at={ada['token']}"
        assert send(server.url, "GET", path, token=ada["token"], X_Request_Id="req-2")[0] == 500
        server.send_signal(signal.SIGTERM)
        log = server.communicate(timeout=30)[1]
    lines = [json.loads(line) for line in log.splitlines()]
    (failed,) = [line for line in lines if line["level"] != "INFO"]
    assert (failed["level"], failed["logger"], failed["message"]) == (
        "ERROR",
        "wallet",
        "request req-2 failed",
    )
    first, *_, last = failed["exception"].split("\n")
    assert (first, last) == (
        "Traceback (most recent call last):",
        f"RuntimeError: ('a bug', ('{ada['id']}', '***'))",
    )
    times = [datetime.fromisoformat(line["time"].replace("Z", "+00:00")) for line in lines]
    assert started <= times[0] <= times[-1] <= datetime.now(timezone.utc)
    assert all(re.fullmatch(r"[\d-]{10}T[\d:]{8}\.\d{6}Z", line["time"]) for line in lines)
    first, *accesses = [line for line in lines if line["logger"] == "wallet.access"]
    assert 0 < first.pop("duration_ms") < 30_000
    assert re.fullmatch(r"POST /api/register 201 [\d.]+ ms req-1 - ::1", first.pop("message"))
    assert {**first, "time": ""} == {
        "time": "",
        "level": "INFO",
        "logger": "wallet.access",
        "method": "POST",
        "path": "/api/register",
        "status": 201,
        "request_id": "req-1",
        "account_id": None,
        "client": "::1",
    }
    assert [(line["status"], line["account_id"], line["client"]) for line in accesses] == [
        (200, ada["id"], "198.51.100.1"),
        (200, ada["id"], "::1"),
        (413, None, "198.51.100.2"),
        (500, ada["id"], "::1"),
    ]
    others = [line for line in lines if line["logger"] == "wallet" and line != failed]
    assert [line.keys() for line in others] == [{"time", "level", "logger", "message"}] * len(
        others
    )
    assert others[-1]["message"] == "stopped"


def test_log_on_a_terminal_is_for_people_and_its_tracebacks_have_no_token():
    master, terminal = os.openpty()
    program = "-c", f"{BUGGY}\nsys.exit(wallet_cli.main())"
    try:
        with served("--dsn", "sqlite://", program=program, stderr=terminal) as server:
            os.close(terminal)
            ada = send(server.url, "POST", "/api/register", {"name": "Ada"})[2]
            assert (
                send(server.url, "GET", f"/api/account/balance?at={ada['token']}", token=ada["token"])[0]
                == 500
            )
            server.send_signal(signal.SIGTERM)
            log = b""
            with contextlib.suppress(OSError):  # When nobody has it open any more.
                while chunk := os.read(master, 65536):
                    log += chunk
    finally:
        os.close(master)
    started, *lines = log.decode().replace("\r\n", "\n").splitlines()
    assert "INFO wallet: started: wallet " in started
    time_of_day = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}"
    access = rf"{time_of_day} INFO wallet\.access: POST /api/register 201 [\d.]+ ms [0-9a-f]{{16}} - 127\.0\.0\.1"
    assert re.fullmatch(access, lines[0])
    assert re.fullmatch(rf"{time_of_day} ERROR wallet: request [0-9a-f]{{16}} failed", lines[1])
    assert lines[2] == "Traceback (most recent call last):"
    assert f"RuntimeError: ('a bug', ('{ada['id']}', '***'))" in lines
    assert re.search(rf"500 [\d.]+ ms [0-9a-f]{{16}} {ada['id']} 127\.0\.0\.1$", lines[-3])
    assert ada["token"][20:52] not in log.decode()
