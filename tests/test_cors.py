"""Pages of other origins, that ask the wallet from a browser."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import itertools
import json
import logging
import threading
import wsgiref.simple_server
from functools import partial
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from webtest import TestApp

import wallet as wallet_module
import wallet_cli
import wallet_server
import wallet_statements
from tests.support import (
    ISSUER_TOKEN,
    ROUTES,
    WRONG_TOKEN,
    check_books,
    in_browser,
    path_of,
    raw_exchange,
    served,
    together,
    under_granian,
)
from wallet import ConfigurationError, create_app

SHOP, OTHER = "https://shop.example", "http://127.0.0.1:8000"
EXPOSED = "Link, X-Request-Id, Idempotent-Replayed, Retry-After"
SENDABLE = "Authorization, Content-Type, Idempotency-Key, X-Request-Id"


# Every answer #####################################################################################


def sharing(configured, origin, path="/"):
    """Return the headers that an answer must have, and no other of their kind."""
    if not configured or path == "/metrics":
        return {}
    if configured == ["*"]:
        return {"access-control-allow-origin": "*", "access-control-expose-headers": EXPOSED}
    if origin not in configured:
        return {"vary": "Origin"}
    return {
        "vary": "Origin",
        "access-control-allow-origin": origin,
        "access-control-expose-headers": EXPOSED,
    }


def sharing_of(headers):
    """Return those headers of an answer that are about other origins. None may come twice."""
    found = [
        (name.lower(), value)
        for name, value in headers
        if name.lower() == "vary" or name.lower().startswith("access-control-")
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


def ask_app(app):
    """Return a function that asks an application in this process. WebTest checks WSGI's rules."""
    client = TestApp(app, lint=True)

    def ask(method, path, body=None, **headers):
        sent = {} if body is None else {"body": body}
        answer = client.request(path, method=method, headers=headers, expect_errors=True, **sent)
        return answer.status_int, answer.headerlist, answer.body

    return ask


def ask_server(url):
    """Return a function that asks a server."""

    def ask(method, path, body=None, **headers):
        with contextlib.closing(http.client.HTTPConnection(urlsplit(url).netloc)) as connection:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    return ask


class Quiet(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def asking(app, way):
    """Ask an application itself, by waitress, or by the server of Python's own library."""
    if way == "application":
        yield ask_app(app)
    elif way == "waitress":
        with wallet_server.serving(app) as url:
            yield ask_server(url)
    else:
        make = wsgiref.simple_server.make_server
        with make("127.0.0.1", 0, app, handler_class=Quiet) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            yield ask_server(f"http://127.0.0.1:{server.server_port}")
            server.shutdown()
            thread.join()


def cases_of(token):
    """Return requests of every kind, with the status that each gets."""
    bearer = {"Authorization": f"Bearer {token}"}
    is_json = {**bearer, "Content-Type": "application/json"}
    topup = "/api/transactions/topup"
    return [
        ("GET", "/", None, {}, 200),
        ("GET", "/docs", None, {}, 200),
        ("GET", "/openapi.json", None, {}, 200),
        ("GET", "/openapi.yaml", None, {}, 200),
        ("GET", "/livez", None, {}, 200),
        ("HEAD", "/livez", None, {}, 200),
        ("GET", "/readyz", None, {}, 200),
        ("GET", "/metrics", None, {}, 200),
        ("POST", "/api/register", b'{"name": "Bob"}', is_json, 201),
        ("GET", "/api/account", None, bearer, 200),
        ("POST", topup, b'{"amount": 5}', {**is_json, "Idempotency-Key": "1"}, 201),
        ("GET", "/api/transactions?limit=1", None, bearer, 200),
        ("GET", "/api/transactions.csv", None, bearer, 200),
        ("POST", topup, b"{", is_json, 400),
        ("GET", "/api/account?x=1", None, bearer, 400),
        ("GET", "/api/account", None, {}, 401),
        ("GET", "/api/account", None, {"Authorization": f"Bearer {WRONG_TOKEN}"}, 401),
        ("POST", "/api/transactions/charge", b'{"amount": 99999}', is_json, 402),
        ("GET", "/nowhere", None, {}, 404),
        ("OPTIONS", "/nowhere", None, {"Access-Control-Request-Method": "POST"}, 404),
        ("OPTIONS", "*", None, {"Access-Control-Request-Method": "POST"}, 404),
        ("DELETE", "/api/account", None, bearer, 405),
        ("DELETE", "/api/account", None, {"Access-Control-Request-Method": "GET"}, 405),
        ("OPTIONS", "/api/account", None, {}, 405),
        ("OPTIONS", "/metrics", None, {"Access-Control-Request-Method": "GET"}, 405),
        ("POST", topup, b"x" * 65537, is_json, 413),
        ("POST", topup, b"{}", {**bearer, "Content-Type": "text/plain"}, 415),
        ("POST", topup, b'{"amount": -5}', is_json, 422),
    ]


ORIGINS = [None, SHOP, OTHER, "https://evil.example", "null", "*", "", f"{SHOP}, {OTHER}", SHOP.upper()]
CONFIGURED = [[], [SHOP], [SHOP, OTHER], ["*"]]


@pytest.mark.parametrize("way", ["application", "waitress", "wsgiref"])
@pytest.mark.parametrize("configured", CONFIGURED, ids=["off", "one", "two", "all"])
def test_every_answer_can_be_read_by_the_origins_that_are_allowed_and_by_no_other(
    sqlite_wallet, configured, way, monkeypatch
):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(sqlite_wallet, "balance_at", fail)
    ada, token = sqlite_wallet.register("Ada")
    for _ in range(2):
        sqlite_wallet.topup(ada.id, 5)
    app = create_app(sqlite_wallet, metrics=True, cors_origins=configured)
    with asking(app, way) as ask, contextlib.ExitStack() as stack:
        for case, origin in itertools.product(cases_of(token), ORIGINS):
            method, path, body, headers, expected = case
            if path == "*" and way == "application":
                continue  # Which WebTest cannot send.
            sent = {**headers, **({} if origin is None else {"Origin": origin})}
            status, answered, _ = ask(method, path, body, **sent)
            assert status == expected, (case, origin)
            assert sharing_of(answered) == sharing(configured, origin, path), (case, origin)
        for _ in range(wallet_module.STATEMENTS_MAX):
            stack.enter_context(wallet_statements.statements)
        for origin in ORIGINS:
            sent = {"Authorization": f"Bearer {token}"}
            sent |= {} if origin is None else {"Origin": origin}
            status, answered, _ = ask("GET", "/api/transactions.csv", **sent)
            assert (status, dict(answered)["Retry-After"]) == (503, "1")
            assert sharing_of(answered) == sharing(configured, origin)
            status, answered, _ = ask("GET", "/api/account/balance?at=2026-11-22T09:30:30Z", **sent)
            assert (status, sharing_of(answered)) == (500, sharing(configured, origin))


@pytest.mark.parametrize("way", ["application", "waitress", "wsgiref"])
@pytest.mark.parametrize("configured", CONFIGURED, ids=["off", "one", "two", "all"])
def test_preflight_of_an_allowed_origin_is_told_what_it_may_send_and_any_other_gets_405(
    sqlite_wallet, configured, way
):
    known = {name.partition(" ")[2] for name in ROUTES} - {"/metrics"}
    assert len(known) > 30
    app = create_app(sqlite_wallet, ISSUER_TOKEN, cors_origins=configured)
    with asking(app, way) as ask:
        for rule, origin in itertools.product(sorted(known), [o for o in ORIGINS if o is not None]):
            methods = [name.partition(" ")[0] for name in ROUTES if name.endswith(f" {rule}")]
            status, headers, body = ask(
                "OPTIONS",
                path_of(rule),
                **{
                    "Origin": origin,
                    "Access-Control-Request-Method": methods[0],
                    "Access-Control-Request-Headers": "authorization,content-type",
                },
            )
            names = {name.lower() for name, _ in headers}
            told, shared = sharing_of(headers), sharing(configured, origin)
            if "access-control-allow-origin" not in shared:
                assert (status, told) == (405, shared)
                assert "allow" in names
                continue
            allowed = told.pop("access-control-allow-methods").replace(" ", "").split(",")
            assert sorted(allowed) == sorted({*methods, *(["HEAD"] if "GET" in methods else [])})
            assert (status, body) == (200, b"")
            assert not names & {"transfer-encoding", "connection", "allow"}
            assert names > {"x-request-id", "cache-control", "x-content-type-options"}
            assert told == {
                **shared,
                "access-control-allow-headers": SENDABLE,
                "access-control-max-age": "600",
            }


def test_preflight_needs_no_token_has_no_effect_and_looks_at_none(file_wallet):
    ada, _ = file_wallet.register("Ada")
    asked = {"Origin": SHOP, "Access-Control-Request-Method": "POST"}
    with wallet_server.serving(create_app(file_wallet, cors_origins=[SHOP])) as url:
        ask = ask_server(url)
        answers = together(
            *[
                partial(ask, "OPTIONS", "/api/transactions/topup", body, **asked, **sent)
                for sent in ({}, {"Authorization": f"Bearer {WRONG_TOKEN}"}, {"Authorization": "x"})
                for body in (None, b'{"amount": 5}')
            ]
        )
        assert [answer[0] for answer in answers] == [200] * 6
        head = "".join(f"{name}: {value}\r\n" for name, value in asked.items())
        answer = raw_exchange(url, f"OPTIONS /api/holds HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{head}\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"\r\n\r\n")
    assert answer.count(b"\r\n\r\n") == 1
    assert file_wallet.account(ada.id) == ada
    assert list(file_wallet.accounts()) == [ada]


def test_what_waitress_refuses_can_be_read_too_unless_its_headers_were_not(sqlite_wallet):
    with wallet_server.serving(create_app(sqlite_wallet, cors_origins=[SHOP])) as url:
        ask = ask_server(url)
        for sent, expected, shared in (
            ({"Content-Length": "70000"}, 413, sharing([SHOP], SHOP)),
            ({"Cookie": "x" * 17000}, 431, {"vary": "Origin"}),
        ):
            headers = {"Origin": SHOP, "Content-Type": "application/json", **sent}
            status, answered, _ = ask("POST", "/api/register", b"{}", **headers)
            assert (status, sharing_of(answered)) == (expected, shared)


def test_metrics_and_log_have_a_preflight_and_no_page_reads_the_metrics(sqlite_wallet, caplog):
    caplog.set_level(logging.INFO, "wallet.access")
    ask = ask_app(create_app(sqlite_wallet, metrics=True, cors_origins=["*"]))
    asked = {"Origin": SHOP, "Access-Control-Request-Method": "POST"}
    assert ask("OPTIONS", "/api/transactions/charge", **asked)[0] == 200
    record = caplog.records[-1]
    assert (record.method, record.path, record.status) == (
        "OPTIONS", "/api/transactions/charge", 200)  # fmt: skip
    _, headers, lines = ask("GET", "/metrics", Origin=SHOP)
    assert sharing_of(headers) == {}
    assert b'wallet_requests_total{method="other",route="other",status="200"} 1.0' in lines


# The setting ######################################################################################


@pytest.mark.parametrize(
    "origin",
    [
        "*", "https://shop.example", "http://shop.example:8080", "http://localhost", "http://[::1]:1",
        "https://my_shop.example", "https://xn--lden-loa.example", "capacitor://localhost",
        "chrome-extension://abcdefghijklmnop", "http://127.0.0.1:443", "https://127.0.0.1:80",
        "http://shop.example:8000", "https://shop.example:4430",
    ],
)  # fmt: skip
def test_origin_as_a_browser_sends_it_is_taken(sqlite_wallet, origin):
    ask = ask_app(create_app(sqlite_wallet, cors_origins=[origin]))
    _, headers, _ = ask("GET", "/livez", Origin=origin)
    assert sharing_of(headers)["access-control-allow-origin"] == origin
    assert wallet_cli.load_settings({"cors-origin": [origin]})["cors-origin"] == [origin]


@pytest.mark.parametrize(
    "origins",
    [
        ["null"], [""], ["shop.example"], ["https://shop.example/"], ["https://shop.example/pay"],
        ["HTTPS://shop.example"], ["https://Shop.example"], ["https://shop.example:443"],
        ["http://shop.example:80"], ["https://shop.example:0"], ["https://shop.example:"],
        ["https://*.shop.example"], ["https://ada@shop.example"], ["https://läden.example"],
        ["https://shop.example\n"], ["https://shop.example?"], ["https://"], ["//shop.example"],
        ["https://shop.example", "*"], ["*", "*"], ["https://shop.example", "null"], ["**"],
        ["https://shop.example;http://a.example"], "https://shop.example",
    ],
)  # fmt: skip
def test_origin_that_no_browser_sends_is_refused_with_what_to_write(sqlite_wallet, origins):
    wrong = "must be [*] alone, or origins as browsers send them, .*such as https://shop.example or"
    with pytest.raises(ConfigurationError, match=f"WALLET_CORS_ORIGIN {wrong}"):
        create_app(sqlite_wallet, cors_origins=origins)
    if not isinstance(origins, str):
        with pytest.raises(ConfigurationError):
            wallet_cli.load_settings({"cors-origin": origins})


def test_origins_are_given_one_by_one_or_together_in_the_environment(monkeypatch, refusal):
    def parse(*arguments):
        return wallet_cli._parse_arguments(arguments)["cors-origin"]

    assert parse() == []
    assert parse("--cors-origin", SHOP) == [SHOP]
    assert parse("--cors-origin", SHOP, "--port", "0", "--cors-origin", OTHER) == [SHOP, OTHER]
    for between in (" ", ",", ", ", "  "):
        monkeypatch.setenv("WALLET_CORS_ORIGIN", f"{SHOP}{between}{OTHER}")
        assert parse() == [SHOP, OTHER]
    assert parse("--cors-origin", "*") == ["*"]  # The option wins.
    monkeypatch.setenv("WALLET_DSN", "sqlite://")
    for origins, told in ((None, OTHER), ([], None), (["*"], "*"), ([SHOP], None)):  # So do those in a program.
        app = create_app(cors_origins=origins)
        with app.wallet:
            _, headers, _ = ask_app(app)("GET", "/livez", Origin=OTHER)
        assert sharing_of(headers).get("access-control-allow-origin") == told
    monkeypatch.delenv("WALLET_CORS_ORIGIN")
    for arguments in (["null"], [f"{SHOP}/"], [SHOP, "--cors-origin", ""], ["*", "--cors-origin", SHOP]):
        assert "WALLET_CORS_ORIGIN must be * alone" in refusal("--cors-origin", *arguments)
    for value in (" ", f"{SHOP},", "null"):
        assert "WALLET_CORS_ORIGIN must be * alone" in refusal(WALLET_CORS_ORIGIN=value)


@pytest.mark.parametrize("way", ["option", "variable", "Granian"])
def test_setting_reaches_the_application_however_it_is_served(file_dsn, way):
    with contextlib.ExitStack() as stack:
        if way == "Granian":
            url = stack.enter_context(
                under_granian(file_dsn, WALLET_CORS_ORIGIN=f"{SHOP},{OTHER}", WALLET_METRICS="1")
            )
        else:
            options = [one for origin in (SHOP, OTHER) for one in ("--cors-origin", origin)]
            given = {"WALLET_CORS_ORIGIN": f"{SHOP} {OTHER}"} if way == "variable" else {}
            url = stack.enter_context(
                served("--dsn", file_dsn, "--metrics", "1", *([] if given else options), **given)
            ).url
        ask = ask_server(url)
        token = json.loads(
            ask("POST", "/api/register", b'{"name": "Ada"}', **{"Content-Type": "application/json"})[2]
        )["token"]
        for method, path, body, headers, expected in cases_of(token):
            if path != "*":
                status, answered, _ = ask(method, path, body, Origin=OTHER, **headers)
                assert (status, sharing_of(answered)) == (
                    expected,
                    sharing([SHOP, OTHER], OTHER, path),
                ), (method, path)
        asked = {"Origin": SHOP, "Access-Control-Request-Method": "POST"}
        status, answered, body = ask("OPTIONS", "/api/transactions/topup", **asked)
        assert (status, body) == (200, b"")
        names = {name.lower() for name, _ in answered}
        assert not names & {"transfer-encoding", "connection"}
        assert sharing_of(answered)["access-control-allow-methods"] == "POST"
        status, answered, _ = ask(
            "OPTIONS", "/api/transactions/topup", **{**asked, "Origin": "https://evil.example"}
        )
        assert (status, sharing_of(answered)) == (405, {"vary": "Origin"})


# A browser ########################################################################################


@contextlib.contextmanager
def page_server():
    """Serve an empty page, at another port and so of another origin. Yield the origin."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>Shop</title><link rel=icon href=data:,>")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


ASK = """async ([url, method, path, body, headers, mode]) => {
    try {
        const answer = await fetch(url + path, { method, headers, mode, body: body ?? undefined });
        return { status: answer.status, type: answer.type, text: await answer.text(),
                 headers: Object.fromEntries(answer.headers) };
    } catch (error) {
        return { failed: error.name };
    }
}"""
FAILED = {"failed": "TypeError"}  # All that a page is told of what it may not see.


@pytest.fixture
def shops(chromium, file_wallet, caplog):
    """A wallet to serve for given origins, and a browser that opens pages of two others."""
    caplog.set_level(logging.INFO, "wallet.access")

    def ask(method, path, body=None, mode="cors", **headers):
        if body is not None:
            headers.setdefault("Content-Type", "application/json")
            body = json.dumps(body)
        return chromium.evaluate(ASK, [shop.url, method, path, body, headers, mode])

    def asked():
        """Return the methods that reached the wallet, but for our own look at it."""
        return {record.method for record in caplog.records if record.name == "wallet.access"}

    @contextlib.contextmanager
    def serve(*origins):
        with wallet_server.serving(create_app(file_wallet, cors_origins=origins)) as shop.url:
            yield

    with page_server() as mine, page_server() as foreign:
        shop = SimpleNamespace(
            mine=mine, foreign=foreign, ask=ask, asked=asked, serve=serve, wallet=file_wallet,
            open=lambda origin: chromium.goto(origin),
        )  # fmt: skip
        yield shop
        chromium.goto("about:blank")


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("is_any", [False, True], ids=["named", "all"])
def test_page_of_an_allowed_origin_moves_money_and_reads_every_answer(shops, is_any):
    with shops.serve("*" if is_any else shops.mine):
        shops.open(shops.mine)
        registered = shops.ask("POST", "/api/register", {"name": "Ada"}, **{"X-Request-Id": "mine-1"})
        assert (registered["status"], registered["headers"]["x-request-id"]) == (201, "mine-1")
        token = {"Authorization": f"Bearer {json.loads(registered['text'])['token']}"}

        keyed = {**token, "Idempotency-Key": "order-17"}
        first, again = (
            shops.ask("POST", "/api/transactions/topup", {"amount": 1250}, **keyed) for _ in range(2)
        )
        assert (first["status"], again["status"], again["text"]) == (201, 201, first["text"])
        assert "idempotent-replayed" not in first["headers"]
        assert again["headers"]["idempotent-replayed"] == "true"

        refused = shops.ask("POST", "/api/transactions/charge", {"amount": 2000}, **token)
        problem = json.loads(refused["text"])
        assert (refused["status"], problem["code"]) == (402, "insufficient_funds")
        assert problem["balance"] == 1250

        assert shops.ask("POST", "/api/transactions/charge", {"amount": 250}, **token)["status"] == 201
        page = shops.ask("GET", "/api/transactions?limit=1", **token)
        assert page["headers"]["link"].endswith('; rel="next"')
        following = shops.ask(
            "GET", "/api/transactions" + page["headers"]["link"][1:].partition(">")[0], **token
        )
        assert json.loads(following["text"])["transactions"][0]["amount"] == 1250
        statement = shops.ask("GET", "/api/transactions.csv", **token)
        assert "transactions in this statement: 2," in statement["text"]
        with contextlib.ExitStack() as stack:
            for _ in range(wallet_module.STATEMENTS_MAX):
                stack.enter_context(wallet_statements.statements)
            busy = shops.ask("GET", "/api/transactions.csv", **token)
        assert (busy["status"], busy["headers"]["retry-after"]) == (503, "1")
        for method, path, status in (
            ("GET", "/api/account", 401),
            ("GET", "/nowhere", 404),
            ("POST", "/livez", 405),
        ):
            answer = shops.ask(method, path)
            assert (answer["status"], json.loads(answer["text"])["status"]) == (status, status)
        assert {account.balance for account in shops.wallet.accounts()} == {1000}
        check_books(shops.wallet)

        # What a page puts in without asking, as a picture, is kept out by another header.
        assert shops.ask("GET", "/livez", mode="no-cors") == FAILED

        shops.open(shops.foreign)
        assert (shops.ask("GET", "/livez") == FAILED) is not is_any


@in_browser
@pytest.mark.parametrize("is_on", [True, False], ids=["another", "off"])
def test_page_of_another_origin_reads_nothing_and_what_it_would_post_is_not_even_sent(
    shops, is_on
):
    ada, token = shops.wallet.register("Ada")
    shops.wallet.topup(ada.id, 500)
    before = shops.wallet.account(ada.id)
    with shops.serve(*[shops.mine] * is_on):
        shops.open(shops.foreign if is_on else shops.mine)
        bearer = {"Authorization": f"Bearer {token}"}
        for path, body in (
            ("/api/register", {"name": "Eve"}),
            ("/api/transactions/topup", {"amount": 5}),
            ("/api/transactions/charge", {"amount": 5}),
            ("/api/account/token", {}),
        ):
            assert shops.ask("POST", path, body, **bearer) == FAILED
        assert shops.ask("GET", "/api/account", **bearer) == FAILED
        assert shops.asked() == {"OPTIONS"}
        # These are sent, since a form could send them too. They change nothing, and stay unread.
        for path in ("/", "/livez", "/openapi.yaml", "/api/account"):
            for mode in ("cors", "no-cors"):
                assert shops.ask("GET", path, mode=mode) == FAILED
        plain = {"Content-Type": "text/plain"}
        for mode in ("cors", "no-cors"):
            assert shops.ask("POST", "/api/register", {"name": "Eve"}, mode, **plain) == FAILED
        assert shops.asked() == {"OPTIONS", "GET", "POST"}
    assert list(shops.wallet.accounts()) == [before]
    assert shops.wallet.authenticate(token) == before


@in_browser
def test_control_page_of_another_origin_would_post_where_it_is_allowed(shops):
    with shops.serve(shops.mine, shops.foreign):
        for origin in (shops.mine, shops.foreign):
            shops.open(origin)
            assert shops.ask("POST", "/api/register", {"name": "Eve"})["status"] == 201
    assert shops.asked() == {"OPTIONS", "POST"}
    assert len(list(shops.wallet.accounts())) == 2
