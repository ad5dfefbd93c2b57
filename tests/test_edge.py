"""The edge: requests as proxies and strangers send them, the wait in the queue, and the log."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import re
import resource
import select
import shutil
import signal
import sqlite3
import ssl
import string
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest
from waitress.adjustments import Adjustments
from waitress.server import TcpWSGIServer

import wallet as wallet_module
import wallet_cli
import wallet_server
import wallet_statements
from tests.support import (
    BUGGY,
    PAGES,
    Client,
    connect,
    environment,
    free_port,
    hold_the_line,
    hold_the_writer,
    limited,
    load_yaml,
    log_lines,
    raw_exchange,
    send,
    served,
    wait_for_answer,
)
from wallet import AMOUNT_MAX, ConfigurationError, Wallet, create_app, running

# What every server answers alike ##################################################################

SERVERS = {
    "waitress": ["-m", "wallet", "--port"],
    "gunicorn": ["-m", "gunicorn", "wallet:create_app()", "--threads", "2", "--bind"],
    "granian": [
        *("-m", "granian", "--interface", "wsgi", "--factory", "wallet:create_app"),
        # Its worker misses a SIGTERM that comes as it begins, and without this it waits for ever.
        *("--workers-kill-timeout", "5", "--port"),
    ],
}


@pytest.fixture(scope="module", params=SERVERS)
def any_url(request):
    """The address of a wallet in memory, behind each of the servers."""
    port = free_port()
    where = f"127.0.0.1:{port}" if request.param == "gunicorn" else str(port)
    server = subprocess.Popen(
        [sys.executable, *SERVERS[request.param], where],
        env=environment(WALLET_DSN="sqlite://", PYTHONWARNINGS="", WALLET_LOG_LEVEL="error"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for_answer(url, server)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=30)


def status_of(url, line, *fields):
    head = b"\r\n".join([line, *fields, b"Connection: close", b"", b""])
    return int(raw_exchange(url, head)[9:12])


def test_path_that_is_not_exactly_a_route_is_unknown_on_every_server(any_url):
    for path in (
        b"//",
        b"//livez",
        b"///api/account",
        b"//api/transactions.csv",
        b"//api/transactions/batch",
        b"/api//account",
        b"/livez/",
        b"/./livez",
        b"http://x//livez",
    ):
        assert status_of(any_url, b"GET " + path + b" HTTP/1.1", b"Host: x") == 404, path
    for path in (b"/livez", b"http://x/livez", b"http://x"):
        assert status_of(any_url, b"GET " + path + b" HTTP/1.1", b"Host: x") == 200, path


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ([], 400),
        ([b"Host:"], 400),
        ([b"Host: x", b"Host: y"], 400),
        ([b"Host: x", b"host: x"], 400),
        ([b"Host: x, y"], 400),
        ([b"Host: x y"], 400),
        ([b"Host: http://x"], 400),
        ([b"Host: user@x"], 400),
        ([b"Host: x"], 200),
        ([b"Host: wallet_1.internal:4000"], 200),
        ([b"Host: [2001:db8::1]:4000"], 200),
    ],
)
def test_request_has_one_host_on_every_server(any_url, fields, status):
    assert status_of(any_url, b"GET /livez HTTP/1.1", *fields) == status
    if not fields:  # Which came with HTTP/1.1.
        assert status_of(any_url, b"GET /livez HTTP/1.0") == 200


def test_wrong_host_is_told_what_is_wrong(api):
    wrong = api.send("GET", "/livez", status=400, Host="x, y").json
    assert (wrong["code"], "Host must be one name" in wrong["detail"]) == ("malformed_request", True)


# HTTP #############################################################################################


@pytest.mark.parametrize("path", ["/api/transactions.csv", "/api/account", "/", "/nowhere"])
def test_head_has_the_headers_of_get_and_not_one_byte_of_a_body(path):
    with Wallet() as wallet, running(wallet) as url:
        _, token = wallet.register("Ada")

        def ask(method):
            request = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
            head, _, body = raw_exchange(
                url, f"{request}X-Request-Id: a\r\nConnection: close\r\n\r\n".encode()
            ).partition(b"\r\n\r\n")
            return re.sub(rb"Date: .*", b"", head), body

        (head, body), (expected, full) = ask("HEAD"), ask("GET")
    assert (head, body) == (expected, b"")
    assert len(full) > 60


def test_compressed_body_is_refused_by_what_names_the_cause_and_changes_nothing(api):
    body = gzip.compress(b'{"amount": 5}')
    for coding in ("gzip", "GZIP", "br", "deflate", "gzip, identity"):
        refused = api.send(
            "POST", "/api/transactions/topup", raw=body, status=415, Content_Encoding=coding
        )
        assert refused.headers["Accept-Encoding"] == "identity"
        assert refused.json["code"] == "unsupported_media_type"
        assert "must not be compressed" in refused.json["detail"]
    assert api.send("GET", "/api/account", status=200).json["balance"] == 0
    for coding in ("identity", "Identity"):
        api.send(
            "POST",
            "/api/transactions/topup",
            {"amount": 5},
            status=201,
            Content_Encoding=coding,
        )


def test_byte_order_mark_is_refused_by_its_name(api):
    for body in (b'\xef\xbb\xbf{"name": "Ada"}', b"\xef\xbb\xbf"):
        refused = api.send("POST", "/api/register", raw=body, status=400).json
        assert (refused["code"], "byte order mark" in refused["detail"]) == (
            "malformed_request",
            True,
        )


def test_tls_is_refused_at_once_with_a_sentence():
    with running() as url:
        started = time.monotonic()
        with connect(url) as plain, pytest.raises(ssl.SSLError):
            ssl.create_default_context().wrap_socket(plain, server_hostname="wallet")
        hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)
        for sent in (hello, hello[:1]):
            answer = raw_exchange(url, sent)
            assert answer.startswith(b"HTTP/1.0 400 Bad Request\r\n")
            assert b"this port does not speak TLS" in answer
        assert time.monotonic() - started < wallet_server.REQUEST_TIMEOUT_S / 2
        with connect(url) as used:  # Where a request has been, it is no request either.
            used.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" + hello)
            received = b""
            while chunk := used.recv(65536):
                received += chunk
        assert [received.count(status) for status in (b" 200 OK\r\n", b" 400 Bad ")] == [1, 1]
        with connect(url) as blank:  # An empty line may come before a request.
            blank.sendall(b"\r\n" + hello)
            assert b" 400 Bad " in blank.recv(65536)


def test_byte_with_which_tls_begins_is_one_as_others_are_within_a_body():
    parser = wallet_server._Parser(Adjustments(max_request_body_size=100))
    head = b"POST /api/register HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n"
    for data in (head, b"a", b"\x16", b"b"):
        assert (parser.completed, parser.received(data)) == (False, len(data))
    assert (parser.completed, parser.error) == (True, None)
    assert parser.get_body_stream().read() == b"a\x16b"


@pytest.mark.parametrize("server", ["waitress", "granian"])
def test_host_of_all_addresses_listens_on_both_families(server, tmp_path):
    port, log = free_port(), tmp_path / "log"
    with log.open("w") as written:
        process = subprocess.Popen(
            [sys.executable, *SERVERS[server], str(port), "--host", "::"],
            env=environment(WALLET_DSN="sqlite://", PYTHONWARNINGS=""),
            stdout=subprocess.DEVNULL,
            stderr=written,
        )
    try:
        for host in ("127.0.0.1", "[::1]"):
            wait_for_answer(f"http://{host}:{port}", process)
            assert send(f"http://{host}:{port}", "GET", "/openapi.yaml")[0] == 200
    finally:
        process.terminate()
        process.wait(timeout=30)
    if server == "waitress":  # IPv4's addresses look as they do elsewhere.
        lines = map(json.loads, log.read_text().splitlines())
        assert [line["client"] for line in lines if "client" in line] == ["127.0.0.1", "::1"]


# The issuer's token in logs #######################################################################

ISSUER_TOKENS = (
    "correct horse battery%e9staple and more",
    "correct horse battery%C3%A9staple and more",
    "correct?horse battery staple and more",
    "correct horse#battery staple and more",
    "correct horse/battery+staple=and%41more",
    "".join(sorted(set(string.printable) - set(string.whitespace))),
    string.punctuation,
    "a" * 32,
    r"'\"\\" * 8,
)


@pytest.mark.parametrize("token", ISSUER_TOKENS)
def test_issuers_token_may_be_any_printable_text_and_no_log_shows_it(token):
    """Neither in a path, nor in a query or a traceback."""
    program = "-c", f"{BUGGY}\nsys.exit(wallet_cli.main())"
    settings = {"WALLET_ISSUER_TOKEN": token, "WALLET_LOG_LEVEL": "debug"}
    with served("--dsn", "sqlite://", program=program, **settings) as server:
        registered = send(server.url, "POST", "/api/register", {"name": "Ada"}, token)
        assert registered[0] == 201
        assert send(server.url, "POST", "/api/register", {"name": "Ada"}, token[:-1])[0] == 401
        # As a client would write it into an address, and as a careless one would.
        for form in (quote(token, safe=""), quote(token, safe=string.punctuation)):
            for path in (f"/{form}", f"/api/{form}/x", f"/api/account/balance?at={form}", f"/?x={form}"):
                got = send(
                    server.url,
                    "GET",
                    path,
                    token=registered[2]["token"],
                    X_Request_Id=f"id-{token}" if token.isalnum() else "id",
                )[0]
                assert got in (400, 404, 500), path
        server.send_signal(signal.SIGTERM)
        log = server.communicate(timeout=30)[1]
    lines = [json.loads(line) for line in log.splitlines()]
    shown = "\n".join(f"{line['message']} {line.get('exception', '')}" for line in lines)
    assert "RuntimeError: ('a bug'" in shown
    assert "GET /*** 404" in shown
    assert token not in shown
    assert repr(token)[1:-1] not in shown
    for part in re.split(r"[?#% ]", token):  # Nor what is left of it where it is cut.
        assert len(part) < 8 or part not in shown


@pytest.mark.parametrize("token", ["a" * 31, " " + "a" * 32, "a" * 32 + " ", "a" * 32 + "\n", "é" * 32])
def test_issuers_token_that_no_header_can_carry_is_refused(token):
    with Wallet() as wallet, pytest.raises(ConfigurationError, match="at least 32 characters"):
        create_app(wallet, issuer_token=token)


# Time that nobody sees ############################################################################


@contextlib.contextmanager
def watched_server(wallet, threads):
    """Serve a wallet with metrics in this process. Yield the URL, the app and the server."""
    app = create_app(wallet, metrics=True)
    server = wallet_server.Server(app, wallet_server.bind("127.0.0.1", 0), threads)
    app.metrics.watch(partial(wallet_server.usage, server))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server.url, app, server
    finally:
        server.stop()
        thread.join()


@pytest.mark.parametrize("careless", [False, True])
def test_stop_after_the_end_writes_into_no_file_that_was_opened_since(careless):
    with Wallet() as wallet, watched_server(wallet, 1) as (_, _, server):
        pass
    here, there = os.pipe()
    os.set_blocking(here, False)
    server.trigger.trigger = there  # A file that is opened next may have the number of its pipe.
    with open(here, "rb", 0) as reader, open(there, "wb", 0):
        (TcpWSGIServer.pull_trigger if careless else wallet_server.Server.stop)(server)
        assert reader.read() == (b"x" if careless else None)


def scrape(app):
    return Client(app).send("GET", "/metrics", status=200).body.decode()


def value_of(text, name):
    return float(re.search(rf"(?m)^{re.escape(name)} (\S+)$", text)[1])


def make_the_queue_long(wallet, url, server, token, clients=12):
    """Let requests wait for the only thread for a second. Return how long their clients waited."""
    release = hold_the_writer(wallet)
    durations_s = []

    def ask():
        started = time.monotonic()
        assert send(url, "POST", "/api/transactions/topup", {"amount": 1}, token)[0] == 201
        durations_s.append(time.monotonic() - started)

    with ThreadPoolExecutor(clients) as threads:
        asked = [threads.submit(ask) for _ in range(clients)]
        deadline = time.monotonic() + 30
        while len(server.turns.ready) < clients - 1:
            assert time.monotonic() < deadline
        busy = wallet_server.usage(server)
        until = time.monotonic() + 1
        while time.monotonic() < until:
            pass
        release()
        for one in asked:
            one.result()
    return durations_s, busy


def test_durations_have_the_wait_in_the_queue_and_gauges_show_it(file_wallet, caplog):
    caplog.set_level(logging.INFO, "wallet.access")
    _, token = file_wallet.register("Ada")
    with watched_server(file_wallet, threads=1) as (url, app, server):
        durations_s, busy = make_the_queue_long(file_wallet, url, server, token)
        text = scrape(app)
    assert busy == {"waiting": 11, "running": 1, "connections": 12}
    told_s = [record.duration_ms / 1000 for record in caplog.records if record.status == 201]
    assert min(told_s) >= 1  # Each has waited that long, and so its record says.
    assert 0.5 * max(durations_s) < max(told_s) <= max(durations_s)
    route = 'route="/api/transactions/topup"'
    total_s = value_of(text, f"wallet_request_duration_seconds_sum{{{route}}}")
    assert total_s == pytest.approx(sum(told_s), rel=0.01)
    assert value_of(text, f'wallet_request_duration_seconds_bucket{{le="0.5",{route}}}') == 0


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@contextlib.contextmanager
def served_while_reads_hang(wallet, monkeypatch, reads, threads=8):
    """Send so many reads, each of which hangs. Yield the server, and the list of those begun."""
    _, token = wallet.register("Ada")
    begun, go, read = [], threading.Event(), wallet.authenticate

    def hang(token):
        begun.append(token)
        assert go.wait(timeout=30)
        return read(token)

    with ThreadPoolExecutor(reads) as clients, watched_server(wallet, threads) as (url, _, server):
        monkeypatch.setattr(wallet, "authenticate", hang)
        asked = [clients.submit(send, url, "GET", "/api/account", None, token) for _ in range(reads)]
        try:
            yield server, begun
        finally:
            go.set()
        assert [one.result()[0] for one in asked] == [200] * reads


def test_few_requests_run_at_once_and_the_others_are_served_behind_them(file_wallet, monkeypatch):
    monkeypatch.setattr(wallet_server, "PATIENCE_S", 60)
    with served_while_reads_hang(file_wallet, monkeypatch, 8) as (server, begun):
        few = wallet_server.RUNNING_MAX
        wait_until(lambda: (len(begun), len(server.turns.ready)) == (few, 8 - few))


def test_requests_that_take_long_let_others_run_on_all_threads(file_wallet, monkeypatch):
    with served_while_reads_hang(file_wallet, monkeypatch, 10) as (server, begun):
        wait_until(lambda: len(begun) == 8)
        wait_until(lambda: len(server.turns.ready) == 2)


@pytest.mark.parametrize("careless", [False, True])
def test_requests_that_wait_for_the_database_are_not_in_the_way_of_others(
    wallet, monkeypatch, careless
):
    monkeypatch.setattr(wallet_server, "PATIENCE_S", 60)
    if careless:  # Nobody is told of who waits.
        unheard = ContextVar("unheard", default=lambda change: None)
        monkeypatch.setattr(wallet_server, "count_running", unheard)
    _, token = wallet.register("Ada")
    release = hold_the_line(wallet)
    line = wallet.database._line
    with ThreadPoolExecutor(9) as clients, watched_server(wallet, 10) as (url, _, server):
        try:
            post = partial(send, url, "POST", "/api/transactions/topup", {"amount": 1}, token)
            posted = [clients.submit(post) for _ in range(8)]
            few = wallet_server.RUNNING_MAX if careless else 8
            wait_until(lambda: (len(line.waiting), len(server.turns.ready)) == (few, 8 - few))
            if not careless:
                assert send(url, "GET", "/openapi.json")[0] == 200
        finally:
            release()
        assert [one.result()[0] for one in posted] == [201] * 8


def test_stop_leaves_what_no_thread_has_begun_when_its_time_is_over(file_wallet, monkeypatch):
    monkeypatch.setattr(wallet_server, "STOP_TIMEOUT_S", 0.1)
    account, token = file_wallet.register("Ada")
    release = hold_the_line(file_wallet)
    with ThreadPoolExecutor(4) as clients:
        with watched_server(file_wallet, 1) as (url, _, server):
            post = partial(send, url, "POST", "/api/transactions/topup", {"amount": 1}, token)
            posted = [clients.submit(post) for _ in range(4)]
            wait_until(lambda: len(server.turns.ready) == 3)
        release()
        assert all(isinstance(one.exception(), OSError) for one in posted)
    wait_until(lambda: file_wallet.account(account.id).balance == 1)


@pytest.mark.parametrize("careless", [False, True])
def test_long_answer_takes_no_memory_for_what_its_client_has_read(
    file_wallet, monkeypatch, careless
):
    if careless:
        monkeypatch.setattr(wallet_server, "_keep_small", lambda channel: None)
    chunk, chunks, sent, length = b"x" * 60_000, 400, 0, 0

    def keeps_up():
        return length >= sent

    def write(*_, **__):
        nonlocal sent
        for _ in range(chunks):
            yield chunk
            wait_until(keeps_up)
            sent += len(chunk)

    monkeypatch.setattr(wallet_statements, "to_csv", write)
    _, token = file_wallet.register("Ada")
    with watched_server(file_wallet, 2) as (url, _, _), connect(url) as connection:
        connection.sendall(
            f"GET /api/transactions.csv HTTP/1.0\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
        )
        buffer = bytearray(1 << 20)
        tracemalloc.start()
        try:
            while count := connection.recv_into(buffer):
                length += count
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert length > len(chunk) * chunks
    assert (peak < 8_000_000) is not careless


@pytest.mark.parametrize("careless", [False, True])
def test_long_answer_that_nobody_reads_is_in_a_file_and_not_in_memory(
    file_wallet, monkeypatch, careless
):
    if careless:  # However much is not read yet.
        def begin_another(channel):
            channel.current_outbuf_count = sys.maxsize

        monkeypatch.setattr(wallet_server, "_keep_small", begin_another)
    made = threading.Event()

    def write(*_, **__):
        for _ in range(400):
            yield b"x" * 60_000
        made.set()

    monkeypatch.setattr(wallet_statements, "to_csv", write)
    _, token = file_wallet.register("Ada")
    with watched_server(file_wallet, 2) as (url, _, _), connect(url) as connection:
        tracemalloc.start()
        try:
            connection.sendall(
                f"GET /api/transactions.csv HTTP/1.0\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
            )
            assert made.wait(timeout=30)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert (peak < 8_000_000) is not careless


def test_only_as_many_more_begin_as_there_are_idle_threads():
    pool = SimpleNamespace(threads={0, 1, 2}, active_count=0, queue=[])
    pool.add_task = pool.queue.append  # No thread wakes up yet.
    turns = wallet_server._Turns(pool)
    turns.ready.append(None)
    for _ in range(10):
        turns._begun_at = 0.0
        turns.look(1)
    assert pool.queue == [turns] * 3


def test_what_waits_for_the_database_within_a_wait_counts_once():
    counted = []
    token = wallet_module.count_running.set(counted.append)
    try:
        with wallet_module._waiting(), wallet_module._waiting():
            assert counted == [-1]
    finally:
        wallet_module.count_running.reset(token)
    assert counted == [-1, +1]


def test_request_behind_another_of_its_connection_counts_from_its_own_end(file_wallet, caplog):
    caplog.set_level(logging.INFO, "wallet.access")
    _, token = file_wallet.register("Ada")
    head = f"Host: x\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n"
    topup = f"POST /api/transactions/topup HTTP/1.1\r\n{head}Content-Length: 13\r\n\r\n"
    account = f"GET /api/account HTTP/1.1\r\n{head}Connection: close\r\n\r\n"
    with watched_server(file_wallet, threads=2) as (url, _, server), connect(url) as connection:
        release = hold_the_writer(file_wallet)
        connection.sendall(f'{topup}{{"amount": 5}}{account}'.encode())
        deadline = time.monotonic() + 30
        while [len(one.requests) for one in [*server.active_channels.values()]] != [2]:
            assert time.monotonic() < deadline
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            pass
        release()
        while connection.recv(65536):
            pass
    assert [record.duration_ms >= 500 for record in caplog.records] == [True, True]


def test_time_of_a_request_begins_with_its_last_byte(file_wallet, caplog):
    caplog.set_level(logging.INFO, "wallet.access")
    _, token = file_wallet.register("Ada")
    head = f"POST /api/transactions/topup HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 13\r\n\r\n"
    with watched_server(file_wallet, threads=1) as (url, _, server), connect(url) as connection:
        connection.sendall(f'{head}{{"amount"'.encode())
        deadline = time.monotonic() + 30
        while not any(one.request for one in [*server.active_channels.values()]):
            assert time.monotonic() < deadline
        until = time.monotonic() + 1
        while time.monotonic() < until:
            pass
        connection.sendall(b": 5}")
        assert connection.recv(65536).startswith(b"HTTP/1.1 201")
    (record,) = caplog.records
    assert record.duration_ms < 900


def test_requests_behind_others_of_their_connection_wait_for_these_and_are_answered(
    file_wallet, monkeypatch
):
    monkeypatch.setattr(wallet_server, "QUEUE_TIMEOUT_S", 0.3)
    _, token = file_wallet.register("Ada")
    slow, charge = threading.Event(), file_wallet.topup

    def topup(*arguments, **options):
        slow.wait(0.2)
        return charge(*arguments, **options)

    monkeypatch.setattr(file_wallet, "topup", topup)
    head = f"POST /api/transactions/topup HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 13\r\n"
    body = '\r\n{"amount": 5}'
    with watched_server(file_wallet, threads=8) as (url, _, _):
        sent = f"{head}{body}" * 4 + f"{head}Connection: close\r\n{body}"
        received = raw_exchange(url, sent.encode())
    assert received.count(b"HTTP/1.1 201 Created\r\n") == 5


def test_refusals_are_counted_by_their_reason(file_wallet, monkeypatch):
    monkeypatch.setattr(wallet_server, "WATCH_INTERVAL_S", 0.1)
    monkeypatch.setattr(wallet_server, "REQUEST_TIMEOUT_S", 0.3)
    _, token = file_wallet.register("Ada")
    with watched_server(file_wallet, threads=1) as (url, app, _):
        with connect(url) as slow:
            slow.sendall(b"GET /livez")
            assert slow.recv(1) == b""
        raw_exchange(url, b"nonsense\r\n\r\n")
        monkeypatch.setattr(wallet_server, "QUEUE_TIMEOUT_S", 0)
        assert send(url, "GET", "/api/account", token=token)[0] == 503
        monkeypatch.setattr(wallet_server, "QUEUE_TIMEOUT_S", 5)
        for _ in range(wallet_module.STATEMENTS_MAX):
            wallet_statements.statements.acquire()
        assert send(url, "GET", "/api/transactions.csv", token=token)[0] == 503
        for _ in range(wallet_module.STATEMENTS_MAX):
            wallet_statements.statements.release()
        assert send(url, "GET", "/api/account")[0] == 401
        text = scrape(app)
    counted = dict(re.findall(r"(?m)^wallet_refusals_total\{(.*)\} (\S+)$", text))
    assert counted == {
        'reason="slow",route="other"': "1.0",
        'reason="malformed_request",route="other"': "1.0",
        'reason="queue",route="other"': "1.0",
        'reason="statements",route="/api/transactions.csv"': "1.0",
        'reason="unauthorized",route="/api/account"': "1.0",
    }


def alerts():
    (rules,) = re.findall(r"```yaml\n(groups:.*?)```", PAGES["operating.md"], re.DOTALL)
    return rules, {rule["alert"]: rule for rule in load_yaml(rules)["groups"][0]["rules"]}


def is_firing(tmp_path, alert, before, after):
    """Would Prometheus fire this alert, if the scrapes were these for as long as it takes?"""
    rules, known = alerts()
    (tmp_path / "rules.yaml").write_text(rules)
    # What only grows: a gauge does not go on as it did.
    samples = re.compile(r"(?m)^(wallet_\w+_(?:total|bucket|count|sum))(?:\{(.*)\})? (\S+)$")
    earlier = {(name, labels): value for name, labels, value in samples.findall(before)}
    series = []
    for name, labels, value in samples.findall(after):
        # It goes on as it did between the two scrapes, a minute apart.
        first = float(earlier.get((name, labels), 0))
        labels = ",".join(filter(None, [labels, 'job="wallet",instance="one"']))
        step = float(value) - first
        series.append(f"  - series: '{name}{{{labels}}}'\n    values: '{first:f}+{step:f}x30'")
    series.append("  - series: 'up{job=\"wallet\",instance=\"one\"}'\n    values: '1x30'")
    (tmp_path / "test.yaml").write_text(
        "rule_files: [rules.yaml]\nevaluation_interval: 1m\ntests:\n- interval: 1m\n"
        "  input_series:\n"
        + "\n".join(series)
        + f"\n  alert_rule_test:\n  - {{eval_time: 25m, alertname: {alert},"
        " exp_alerts: [{exp_labels: {instance: one}}]}\n"
    )
    done = subprocess.run(
        ["promtool", "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert known[alert]
    assert "SUCCESS" in done.stdout or "got:[]" in done.stderr, done.stdout + done.stderr
    return done.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool: apt install prometheus")
def test_alert_fires_when_the_queue_is_long_and_not_when_the_same_load_has_no_queue(
    file_wallet, tmp_path
):
    _, token = file_wallet.register("Ada")
    with watched_server(file_wallet, threads=1) as (url, app, server):
        texts = [scrape(app)]
        for _ in range(12):
            send(url, "POST", "/api/transactions/topup", {"amount": 1}, token)
        texts.append(scrape(app))
        make_the_queue_long(file_wallet, url, server, token)
        texts.append(scrape(app))
    assert not is_firing(tmp_path, "WalletIsSlow", texts[0], texts[1])
    assert is_firing(tmp_path, "WalletIsSlow", texts[1], texts[2])


def test_metrics_of_money_are_exact_above_what_a_float_can_hold(wallet):
    app = create_app(wallet, metrics=True)
    for _ in range(3):
        token = wallet.register("Ada")[1]
        Client(app, token).send(
            "POST", "/api/transactions/topup", {"amount": AMOUNT_MAX}, status=201
        )
    text = scrape(app)
    assert float(3 * AMOUNT_MAX) != 3 * AMOUNT_MAX
    assert f'wallet_movement_amount_total{{type="topup"}} {3 * AMOUNT_MAX}\n' in text


# The log ##########################################################################################


def test_log_has_no_line_for_who_asks_all_day_but_at_debug():
    asked, topup = ["/livez", "/readyz", "/metrics"], "/api/transactions/topup"
    for level, count in (("info", 0), ("debug", 1)):
        with served("--dsn", "sqlite://", "--metrics", "1", WALLET_LOG_LEVEL=level) as server:
            token = send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"]
            for path in asked:
                send(server.url, "GET", path)
            for known in (token, None):
                send(server.url, "GET", "/api/account", token=known, X_Polling="1")
            send(server.url, "GET", "/api/transactions.csv", token=token, X_Polling="1")
            send(server.url, "GET", "/api/holds", token=token)
            send(server.url, "POST", topup, {"amount": 5}, token, X_Polling="1")
            server.send_signal(signal.SIGTERM)
            lines = log_lines(server.communicate(timeout=30)[1])
        shown = [line.split(": ")[1].partition(" 2")[0].partition(" 4")[0] for line in lines[1:-2]]
        quiet = [f"GET {path}" for path in [*asked, "/api/account"]] * count
        assert sorted(shown) == sorted(
            # What is refused, and what moves money, is always there.
            ["POST /api/register", "GET /api/account", "GET /api/holds", *quiet, f"POST {topup}",
             "GET /api/transactions.csv"]
        )


def test_probe_that_fails_is_in_the_log(file_dsn, caplog):
    caplog.set_level(logging.INFO, "wallet.access")
    with Wallet(file_dsn) as wallet:
        os.rename(wallet.database.path, f"{wallet.database.path}.old")
        os.close(os.open(wallet.database.path, os.O_CREAT))
        Client(create_app(wallet)).send("GET", "/readyz", status=503)
    assert [record.path for record in caplog.records if record.name == "wallet.access"] == [
        "/readyz"
    ]


def test_stdout_is_empty_unless_it_is_a_terminal_and_the_log_says_where_it_is(tmp_path):
    started = subprocess.Popen(
        [sys.executable, "-m", "wallet", "--port", "0", "--dsn", f"sqlite:///{tmp_path}/w.db"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    line = json.loads(started.stderr.readline())
    found = re.fullmatch(
        r"started: wallet (\S+) on (\S+), with SQLite (\S+) at (\S+)", line["message"]
    )
    version, url, engine, location = found.groups()
    assert (version, engine) == (wallet_module.__version__, sqlite3.sqlite_version)
    assert location == f"{tmp_path}/w.db"
    assert send(url, "GET", "/livez")[0] == 200
    started.send_signal(signal.SIGTERM)
    output, log = started.communicate(timeout=30)
    assert output == ""
    stopping, stopped = (json.loads(line)["message"] for line in log.splitlines())
    assert re.fullmatch(r"stopping: \d+ connections are open", stopping)
    assert stopped == "stopped"


BLOCKING = "import logging\nwallet_cli._LogHandler = logging.StreamHandler\n"


@pytest.mark.slow_on("True")
@pytest.mark.parametrize("careless", [False, True])
def test_log_that_nobody_reads_keeps_nobody_waiting_and_says_later_what_is_missing(careless):
    lines = 500  # Of which a pipe takes some 200, and the queue 100.
    head = "import sys, wallet, wallet_cli\nwallet_cli.LOG_LINES_MAX = 100\n"
    program = "-c", f"{head}{BLOCKING * careless}sys.exit(wallet_cli.main())"
    here, there = os.pipe()
    with (
        os.fdopen(here) as log,
        served("--dsn", "sqlite://", program=program, stderr=there, WALLET_METRICS="1") as server,
    ):
        os.close(there)
        try:
            with connect(server.url) as connection:
                connection.settimeout(2 if careless else 30)
                for _ in range(lines):
                    connection.sendall(b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")
                    connection.recv(65536)
        except TimeoutError:
            assert careless
            return
        assert not careless
        text = send(server.url, "GET", "/metrics")[2].decode()
        dropped = int(value_of(text, "wallet_log_lines_dropped_total"))
        assert 0 < dropped < lines
        read = [json.loads(log.readline())["message"] for _ in range(lines - dropped + 2)]
        assert sum(message.startswith(f"{dropped} lines of this log") for message in read) == 1
        assert sum(message.startswith("GET /nowhere 404") for message in read) == lines - dropped
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=15) == 0


def test_log_that_nobody_reads_does_not_outlive_a_stop():
    here, there = os.pipe()
    with contextlib.ExitStack() as closed:
        closed.callback(os.close, here)
        with served("--dsn", "sqlite://", stderr=there) as server:
            os.close(there)
            with connect(server.url) as connection:
                for _ in range(500):
                    connection.sendall(b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")
                    connection.recv(65536)
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=15) == 0


def test_log_whose_reader_is_gone_stops_nothing():
    here, there = os.pipe()
    with served("--dsn", "sqlite://", stderr=there) as server:
        os.close(there)
        os.close(here)
        for _ in range(3):
            assert send(server.url, "GET", "/nowhere")[0] == 404
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=15) == 0


def handle(handler, *messages):
    for message in messages:
        handler.handle(logging.makeLogRecord({"msg": message}))
    handler.flush()


def test_lines_that_could_not_be_written_are_counted_and_told_once_there_is_room(tmp_path):
    with open("/dev/full", "w") as disk, open(tmp_path / "log", "w") as other:
        handler, counted = wallet_cli._LogHandler(disk), []
        handler.count_dropped = lambda: counted.append(1)
        handle(handler, "one", "two")
        assert (handler.dropped, len(counted)) == (2, 2)
        os.dup2(other.fileno(), disk.fileno())  # Somebody has made room.
        handle(handler, "three", "four \udcff")
    written = (tmp_path / "log").read_text().splitlines()
    told = "2 lines of this log were dropped: nobody read it, or its disk was full"
    assert written == ["three", told, "four \\udcff"]


def test_log_waits_for_who_reads_a_pipe_that_does_not_wait(monkeypatch):
    is_full, select_really = threading.Event(), select.select

    def look(*files):
        is_full.set()
        return select_really(*files)

    monkeypatch.setattr(select, "select", look)
    here, there = os.pipe()
    os.set_blocking(there, False)
    lines = [f"{number:0900}" for number in range(200)]  # More than the pipe takes.
    with os.fdopen(here) as log, os.fdopen(there, "w") as stream:
        handler = wallet_cli._LogHandler(stream)
        with ThreadPoolExecutor(1) as thread:
            handled = thread.submit(handle, handler, *lines)
            assert is_full.wait(timeout=30)
            assert [log.readline() for _ in lines] == [f"{line}\n" for line in lines]
            handled.result()
    assert handler.dropped == 0


def test_log_goes_where_a_program_has_put_it():
    program = """
import io, sys, wallet_cli
sys.stderr = told = io.StringIO()
code = wallet_cli.main()
assert "started: wallet" in told.getvalue(), told.getvalue()
sys.exit(code)
"""
    with served("--dsn", "sqlite://", "--metrics", "1", program=("-c", program)) as server:
        assert send(server.url, "GET", "/metrics")[0] == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=15) == 0


# Few files ########################################################################################


def processor_time_s(process):
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_idle_clients_shut_nobody_out_where_few_files_may_be_open_and_nothing_spins():
    limits = limited(CROWDED_IDLE_S=0.2)
    few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))\n"
    program = limits[0], few + limits[1]
    with served("--dsn", "sqlite://", program=program) as server, contextlib.ExitStack() as stack:
        for _ in range(150):
            stack.enter_context(connect(server.url))
        before_s = processor_time_s(server)
        for _ in range(3):
            assert send(server.url, "GET", "/readyz")[0] == 200
        assert processor_time_s(server) - before_s < 1
        server.send_signal(signal.SIGTERM)
        log = server.communicate(timeout=30)[1]
    assert "ERROR" not in log
    assert "Too many open files" not in log


def test_connections_are_never_so_few_that_nobody_is_served():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        assert wallet_server.connections_max(64) == wallet_server.CONNECTIONS_MIN
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
