"""HTTP on sockets: what is not HTTP, who is slow, and requests within others."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import random
import re
import resource
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from waitress.parser import HTTPRequestParser

import wallet as wallet_module
import wallet_server
import wallet_statements
from tests.support import (
    DAY_S,
    HERE,
    ISSUER_TOKEN,
    PAGE,
    PARSERS,
    POST,
    SMUGGLED,
    WRONG_TOKEN,
    check_books,
    check_common,
    check_parser,
    connect,
    environment,
    fill_with_topups,
    hold_the_writer,
    limited,
    raw_exchange,
    raw_requests,
    send,
    served,
    torture,
    wait_for_queue,
    workers_of,
)
from wallet import BODY_BYTES_MAX, Wallet, WalletError, running

# Refunds, transfers, holds and batches ############################################################


@pytest.mark.parametrize("careless", [False, True])
def test_who_is_slow_or_idle_is_told_by_a_clock_that_nobody_sets(monkeypatch, careless):
    """Else all connections are closed when the clock is set forward, and none for long once it is
    back.
    """
    offset_s, real = 0, time.time
    monkeypatch.setattr(time, "time", lambda: real() + offset_s)
    monkeypatch.setattr(wallet_server, "REQUEST_TIMEOUT_S", 1)
    if careless:
        monkeypatch.setattr(time, "monotonic", lambda: time.time())

    def is_served_after_a_jump(connection, url):
        nonlocal offset_s
        for jump_s in (2, DAY_S):  # The server looks at its connections once a second.
            offset_s += jump_s
            send(url, "GET", "/livez")
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            return connection.recv(65536).startswith(b"HTTP/1.1 200")

    with running() as url, connect(url) as idle, connect(url) as slow:
        assert all(is_served_after_a_jump(idle, url) for _ in range(50)) != careless
        if not careless:
            offset_s -= 100 * DAY_S
            assert send_slowly_until_closed(slow)


# Metadata and history #############################################################################


@pytest.fixture(scope="module")
def long_history():
    """A wallet on a file with an account whose statement has some 7 MB."""
    with tempfile.TemporaryDirectory() as folder, Wallet(f"sqlite:///{folder}/wallet.db") as wallet:
        ada, token = wallet.register("Ada")
        fill_with_topups(wallet, ada.id, 12_000)
        yield SimpleNamespace(wallet=wallet, id=ada.id, token=token)


def get_statement(url, token, receive_buffer_bytes=4096, path="/api/transactions.csv"):
    """Ask for a statement and read nothing of it but its first bytes. Return the connection."""
    connection = connect(url, receive_buffer_bytes)
    connection.sendall(
        f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
    )
    assert connection.recv(12) == b"HTTP/1.1 200"
    return connection


@pytest.mark.slow
@pytest.mark.parametrize("issuer", [None, ISSUER_TOKEN], ids=["account", "issuer"])
def test_readers_of_statements_never_take_all_threads(long_history, serving, caplog, issuer):
    statements, most = wallet_statements.statements, wallet_module.STATEMENTS_MAX
    below = f"/api/accounts/{long_history.id}" if issuer else "/api"
    token, path = issuer or long_history.token, f"{below}/transactions.csv"

    def is_refused(url):
        status, headers, problem = send(url, "GET", path, token=token)
        assert (status, headers["Retry-After"], problem["code"]) == (503, "1", "unavailable")
        assert send(url, "GET", "/api/account", token=long_history.token)[0] == 200

    with serving(long_history.wallet, issuer_token=issuer) as url, contextlib.ExitStack() as stack:
        for change in (statements.acquire, statements.release):
            for _ in range(most):
                change()
            if change == statements.acquire:  # As while so many are being made.
                is_refused(url)
        for _ in range(most):
            stack.enter_context(get_statement(url, token, path=path))
        for change in (statements.acquire, statements.release):
            for _ in range(most):
                change()
        is_refused(url)  # All are made by now, and wait for their readers.
        stack.close()  # Who goes away in the middle is no error of the service.
        deadline = time.monotonic() + 20
        while send(url, "GET", f"{path}?type=charge", token=token)[0] != 200:
            assert time.monotonic() < deadline
    assert [record for record in caplog.records if record.name == "waitress"] == []


FEW_FILES = """
import resource, sys, wallet, wallet_server
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
print(wallet_server.connections_max(8))
wallet_server.raise_file_limit(8)
print(wallet_server.connections_max(8), hard)
sys.modules["resource"] = None
wallet_server.raise_file_limit(8)
print(wallet_server.connections_max(8))
"""


def test_connections_are_as_many_as_there_are_descriptors_for_and_the_limit_is_raised():
    done = subprocess.run(
        [sys.executable, "-c", FEW_FILES], capture_output=True, text=True, env=environment()
    )
    few, raised, hard, unlimited = map(int, done.stdout.split())
    spare = wallet_server.FILES_SPARE + 8 * wallet_server.FILES_THREAD
    most = wallet_server.CONNECTIONS_MAX
    assert few == 256 - spare
    assert raised == (min(most, hard - spare) if hard >= 0 else most)
    assert unlimited == most


@pytest.mark.slow
def test_slow_readers_of_statements_leave_even_a_wallet_of_one_thread_to_the_others(long_history):
    dsn = f"sqlite:///{long_history.wallet.database.location}"
    patient = limited(QUEUE_TIMEOUT_S=60)
    with (
        served("--dsn", dsn, "--threads", "1", program=patient) as server,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(wallet_module.STATEMENTS_MAX):
            stack.enter_context(get_statement(server.url, long_history.token))
        assert send(server.url, "GET", "/api/account", token=long_history.token)[0] == 200
        assert send(server.url, "GET", "/api/transactions.csv", token=long_history.token)[0] == 503


BREAKING = """
import sys, wallet, wallet_cli, wallet_statements
breaks = iter({breaks})
def break_off(*given, chunks=wallet_statements.to_csv, **filters):
    last = next(breaks, 1)
    for number, chunk in enumerate(chunks(*given, **filters), 1):
        if number == last:
            raise wallet.Unavailable("broken")
        yield chunk
wallet_statements.to_csv = break_off
sys.exit(wallet_cli.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("careless", [False, True])
def test_statement_that_breaks_off_cannot_be_taken_for_a_whole_one(long_history, careless):
    breaks, dsn = (1, 5, 20), f"sqlite:///{long_history.wallet.database.location}"
    program = BREAKING.format(breaks=breaks)
    if careless:  # It ends the statement as if it were whole.
        program = program.replace('raise wallet.Unavailable("broken")', "return")
    with served("--dsn", dsn, program=("-c", program)) as server:
        for chunks in breaks:
            connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
            headers = {"Authorization": f"Bearer {long_history.token}"}
            connection.request("GET", "/api/transactions.csv", headers=headers)
            answer = connection.getresponse()
            if careless:
                assert answer.status == 200
                answer.read()
            elif answer.status == 200:
                with pytest.raises((http.client.IncompleteRead, ConnectionError)):
                    answer.read()
            else:
                assert (answer.status, chunks) == (500, 1)  # It has sent nothing yet.
                assert json.loads(answer.read())["code"] == "internal_error"
            connection.close()
        assert send(server.url, "HEAD", "/api/transactions.csv", token=long_history.token)[0] == 200
        server.send_signal(signal.SIGTERM)
        broken = server.communicate(timeout=30)[1].count("Unavailable: broken")
        assert broken == 0 if careless else broken >= len(breaks)


@pytest.mark.slow
def test_statement_may_take_longer_than_other_answers_while_it_is_read(long_history, serving):
    # With a buffer that grows, the kernel would tell the other side in large steps what a reader
    # has taken.
    with (
        serving(long_history.wallet, ANSWER_TIMEOUT_S=2) as url,
        get_statement(url, long_history.token, 2**18) as connection,
    ):
        started, received = time.monotonic(), b""
        while time.monotonic() - started < 3:
            received += connection.recv(65536)
            time.sleep(0.05)
        assert not received.endswith(b"\r\n0\r\n\r\n")
        while not received.endswith(b"\r\n0\r\n\r\n"):
            chunk = connection.recv(2**20)
            assert chunk
            received += chunk
    with (
        serving(long_history.wallet, ANSWER_TIMEOUT_S=1) as url,
        get_statement(url, long_history.token) as connection,
    ):
        assert send_slowly_until_closed(connection)  # Who reads nothing is let go.


@pytest.mark.slow
def test_reader_that_takes_a_little_now_and_then_is_let_go_too(long_history, serving, caplog):
    """Else one that takes a byte now and then would keep its thread and its place for as long as it
    likes.
    """
    caplog.set_level(logging.INFO, "wallet")
    with (
        serving(long_history.wallet, ANSWER_TIMEOUT_S=2) as url,
        get_statement(url, long_history.token, 2**15) as connection,
    ):
        received = 0
        while received < 3 * wallet_server.UNREAD_BYTES_MAX:  # At first it reads as it should.
            received += len(connection.recv(65536))
        assert "too slow" not in caplog.text
        deadline = time.monotonic() + 60
        while "too slow" not in caplog.text and time.monotonic() < deadline:
            connection.recv(8192)
            time.sleep(0.1)
        assert "too slow" in caplog.text


# Promise 4: no input crashes it ###################################################################


@pytest.mark.parametrize(
    ("name", "careless"),
    [
        ("time", lambda value: wallet_module._as_us(datetime.fromisoformat(value))),
        ("limit", int),
        ("key", lambda value: value),
    ],
)
def test_control_a_parser_that_lets_an_error_or_a_value_out_is_found(name, careless):
    strategy, _, holds = PARSERS[name]
    with pytest.raises((ValueError, TypeError, OverflowError, AssertionError)):
        check_parser(strategy, careless, holds, 100)


@pytest.fixture(scope="module")
def module_url():
    with running() as url:
        yield url


def read_answer(received, ended):
    """Return the status, headers and body of the first of the answers, and the rest.

    None while it is incomplete.
    """
    head, end, rest = received.partition(b"\r\n\r\n")
    if not end:
        return None
    line, *fields = head.decode("ascii").split("\r\n")
    status = int(re.fullmatch(r"HTTP/1\.[01] ([1-5][0-9][0-9])( [A-Za-z -]*)?", line)[1])
    headers = {name.title(): value for name, value in (field.split(": ", 1) for field in fields)}
    if status == 100:
        return read_answer(rest, ended)
    if rest.startswith(b"HTTP/1.") or (
        ended and not rest
    ):  # That is the next one: this one answers HEAD.
        return status, headers, b"", rest
    if "Transfer-Encoding" not in headers:
        length = int(headers["Content-Length"])
        return (status, headers, rest[:length], rest[length:]) if len(rest) >= length else None
    body = b""
    while chunk := re.match(rb"([0-9A-Fa-f]+)\r\n", rest):
        size, start = int(chunk[1], 16), chunk.end()
        if len(rest) < start + size + 2:
            return None
        body, rest = body + rest[start : start + size], rest[start + size + 2 :]
        if not size:
            return status, headers, body, rest
    return None


STATUS_BY_CODE = {
    one.code: one.status
    for one in vars(wallet_module).values()
    if isinstance(one, type) and issubclass(one, WalletError) and one is not WalletError
}


def check_answer(status, headers, body):
    """Assert what holds for whatever is sent:

    it is never a fault, and every error has the form of the contract.
    """
    assert status < 500 or (status == 503 and headers["Retry-After"]), body
    check_common(status, headers, body, head=not body)
    document = json.loads(body) if body and headers["Content-Type"].endswith("json") else {}
    assert status < 400 or not body or STATUS_BY_CODE[document["code"]] == status
    assert "html" not in headers["Content-Type"] or body in (b"", PAGE)


def exchange_all(serving, requests):
    """Send each request with SMUGGLED behind it, for an account of its own.

    Return of each the statuses of all answers and the amounts of what was then done.
    """

    def exchange(request):
        token = send(url, "POST", "/api/register", {"name": "Ada"})[2]["token"]
        received, statuses = (
            raw_exchange(url, (request + SMUGGLED).replace(WRONG_TOKEN.encode(), token.encode())),
            [],
        )
        assert b"waitress" not in received
        assert token.encode() not in received
        while received:
            status, headers, body, received = read_answer(received, True)
            check_answer(status, headers, body)
            if status in (413, 431) or (
                status == 400 and (not body or b"The request is not valid HTTP: " in body)
            ):
                assert (headers["Connection"].lower(), received) == ("close", b"")
            statuses.append(status)
        history = send(url, "GET", "/api/transactions", token=token)[2]["transactions"]
        return tuple(statuses), [one["amount"] for one in reversed(history)]

    with serving(REQUEST_TIMEOUT_S=1, IDLE_TIMEOUT_S=1) as url, ThreadPoolExecutor(8) as threads:
        return dict(zip(requests, threads.map(exchange, requests), strict=True))


def applied(statuses):
    """Return the amounts that are to be there after these answers to a topup, or something else,
    and to SMUGGLED.
    """
    return [amount for status, amount in zip(statuses, (5, 666), strict=False) if status == 201]


def test_no_request_is_smuggled_in_another_and_what_is_ambiguous_is_refused(serving):
    expected = dict(raw_requests())
    assert exchange_all(serving, expected) == {
        request: (statuses, applied(statuses)) for request, statuses in expected.items()
    }


def test_control_a_server_that_takes_the_length_before_the_chunks_makes_two_of_one(
    serving, monkeypatch
):
    def careless(parser, header):
        header = (
            re.sub(rb"\r\nTransfer-Encoding:[^\r]*", b"", header)
            if b"Content-Length" in header
            else header
        )
        HTTPRequestParser.parse_header(parser, header)

    monkeypatch.setattr(wallet_server._Parser, "parse_header", careless)
    ambiguous = [
        request
        for request, statuses in raw_requests()
        if statuses == (400,) and b"13\r\nTr" in request
    ]
    done = exchange_all(serving, ambiguous)
    assert ([5, 666] in [amounts for _, amounts in done.values()], len(ambiguous) > 20) == (
        True,
        True,
    )


HOSTILE = [
    b"\0",
    b"\r\n",
    b"\n",
    b"\r",
    b"\r\n\r\n",
    b"\r\n ",
    b"\t",
    b"\x0b",
    b"\x7f",
    b"\x1b[31m",
    b"\xff",
    b"\xc0\x80",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    "\u2028٣💰".encode(),
    b"%00",
    b"%0d%0a",
    b"%ff",
    b"%",
    b"+",
    b"&",
    b"=",
    b"?",
    b"#",
    b"../" * 20,
    b"//",
    b"'; DROP TABLE accounts --",
    b"%s%n{0}",
    b"<script>",
    b"\\u0000",
    b"\\ud800",
    b"\\",
    b'"',
    b"'",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b";",
    b"[" * 5000,
    b'{"a":' * 2000,
    b"NaN",
    b"-Infinity",
    b"null",
    b"true",
    b"0",
    b"-1",
    b"+1",
    b"1.0",
    b"1e999",
    b"0x2",
    b"1_000",
    b"9007199254740992",
    b"9" * 5000,
    b"x" * 300,
    b" " * 70,
    b"HEAD",
    b"OPTIONS",
    b"TRACE",
    b"HTTP/1.0",
    b"HTTP/2.0",
    b"0\r\n\r\n",
    b"X: y\r\n z",
    b"Host: y\r\n",
    b"Content-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: gzip\r\n",
    b"Expect: 100-continue\r\n",
    b"Connection: close\r\n",
    b"Connection: keep-alive\r\n",
    b"Authorization: Bearer x\r\n",
    b"Idempotency-Key: 1\r\n",
    b"Content-Type: text/plain\r\n",
]

MOVED = {"amount": 12, "description": "Order 17", "metadata": {"order": "17"}}

# Of each operation some valid requests. ME and OTHER are accounts, TOKEN is of ME, and N is of an
# entry.
CORPUS = [
    ("POST", "/api/register", {"name": "Ada Łovelace"}),
    ("POST", "/api/account/token", None),
    ("GET", "/api/account", None),
    ("GET", "/api/account/balance?at=2026-11-22T09:30:00.5%2B01:00", None),
    *[("POST", "/api/transactions/topup", MOVED)] * 3,
    ("POST", "/api/transactions/charge", MOVED),
    ("POST", "/api/transactions/transfer", {"to": "acc_OTHER", **MOVED}),
    (
        "POST",
        "/api/transactions/batch",
        {"transactions": [{"type": "topup", **MOVED}, {"type": "charge", **MOVED}]},
    ),
    ("POST", "/api/transactions/txn_ME_N/refund", {"amount": 5}),
    ("POST", "/api/transactions/txn_ME_N/refund", None),
    (
        "GET",
        "/api/transactions?limit=3&cursor=txn_ME_N&type=topup&since=2020-01-01T00:00:00Z",
        None,
    ),
    ("GET", "/api/transactions?after=0&until=2030-01-01T00:00:00Z", None),
    ("GET", "/api/transactions/txn_ME_N", None),
    ("GET", "/api/transactions.csv?type=charge", None),
    ("POST", "/api/holds", {"expires_in_s": 60, **MOVED}),
    ("GET", "/api/holds?limit=5", None),
    ("GET", "/api/holds/hld_ME_N", None),
    ("POST", "/api/holds/hld_ME_N/capture", {"amount": 5}),
    ("POST", "/api/holds/hld_ME_N/release", None),
    ("GET", "/livez", None),
    ("HEAD", "/readyz", None),
    ("HEAD", "/docs", None),
    ("GET", "/openapi.json", None),
    ("GET", "/openapi.yaml", None),
    ("GET", "/", None),
]

VALUES = [
    0,
    1,
    -1,
    1.5,
    10**15,
    2**53,
    10**40,
    float("inf"),
    True,
    None,
    "",
    "x",
    " ",
    "x" * 600,
    "\ud800",
    "\0\n",
    "acc_OTHER",
    [],
    [1],
    {},
    {"a": "b"},
    {"a": 1},
    {"\ud800": ""},
    {str(number): "x" for number in range(21)},
    {"a" * 41: ""},
    [{"type": "topup", "amount": 1}] * 1001,
    [{}] * 30,
    [None, 5, "x"],
    [{"type": "charge", "amount": 1, "account": "acc_OTHER"}],
]


class Mutants:
    """Requests of the corpus, changed by a seeded generator:

    as a whole, or in one part before that is framed.
    """

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.tokens = []  # Of the accounts that were made or got a new one, the latest last.

    def learn(self, body):
        """Note a token that an answer shows.

        Only few accounts are in use at a time, so that no history is long.
        """
        for token in re.findall(rb'"token": "(wlt_\w+)"', body):
            self.tokens = [*[one for one in self.tokens if one[:20] != token[:20]][-7:], token]

    def cut(self, data):
        """Return three parts of some bytes, cut anywhere."""
        first, second = sorted(self.random.choices(range(len(data) + 1), k=2))
        return data[:first], data[first:second], data[second:]

    def mutate(self, data):
        start, part, end = self.cut(data)
        kind = self.random.randrange(10)
        if kind < 3:
            return start + self.random.choice(HOSTILE) + (part + end if kind < 2 else end)
        if kind == 3:
            return start + bytes([self.random.randrange(256)]) + (part + end)[1:]
        if kind == 4:
            return start + end
        if kind == 5:
            return start + part * self.random.choice([2, 2, 3, 50]) + end
        if kind == 6:
            return data[: len(start)]
        if kind == 7:
            lines = data.split(b"\r\n")
            lines.insert(self.random.randrange(len(lines)), self.random.choice(lines))
            return b"\r\n".join(lines)
        if kind == 8:
            return re.sub(
                rb"\d+",
                lambda _: self.random.choice([b"0", b"2", b"13", b"-1", b"99999999999999999999"]),
                data,
                count=self.random.randrange(1, 4),
            )
        return start + self.cut(self.make(self.random.choice(["body", "target"])))[1] + end

    def make(self, mutated):
        method, target, document = self.random.choice(CORPUS)
        if document and mutated == "values":
            document = {
                **document,
                self.random.choice([*document, "metadata", "unknown"]): self.random.choice(VALUES),
            }
        text = (
            ""
            if document is None
            else json.dumps(document, ensure_ascii=self.random.random() < 0.5)
        )
        body = text.encode(errors="surrogatepass")
        target = target.encode()
        for _ in range(self.random.choice([1, 1, 2, 4])):
            body = self.mutate(body) if mutated == "body" and body else body
            target = self.mutate(target) if mutated == "target" else target
        fields = [
            b"Host: x",
            b"Authorization: Bearer TOKEN",
            b"Content-Type: application/json",
            b"X-Request-Id: r",
        ]
        if self.random.random() < 0.3:
            fields.append(b"Idempotency-Key: k%d" % self.random.randrange(50))
        if body and self.random.random() < 0.2:
            fields.append(b"Transfer-Encoding: chunked")
            at = self.random.randrange(len(body))
            chunks = [
                b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:at], body[at:]) if part
            ]
            body = b"".join(chunks) + b"0\r\n\r\n"
        elif body:
            fields.append(b"Content-Length: %d" % len(body))
        request = b"\r\n".join([method.encode() + b" " + target + b" HTTP/1.1", *fields, b"", body])
        for _ in range(self.random.choice([1, 1, 2, 4]) if mutated == "whole" else 0):
            request = self.mutate(request)
        return request

    def __next__(self):
        """Return what is sent next, with what makes it valid filled in:

        mostly one request, and sometimes several.
        """
        parts, count = (
            ["values", "body", "target", "whole", "nothing"],
            self.random.choice([1] * 9 + [3]),
        )
        data = b"".join(map(self.make, self.random.choices(parts, [3, 2, 2, 4, 2], k=count)))
        token, other = self.random.choices(self.tokens, k=2)
        for name, value in ((b"TOKEN", token), (b"ME", token[4:20]), (b"OTHER", other[4:20])):
            data = data.replace(name, value)
        return data.replace(b"_N", b"_%d" % self.random.randrange(1, 30))


class Connection:
    """A connection of an attack:

    what was sent on it last, and what came of that and is no whole answer yet.
    """

    def __init__(self, url, patient):
        self.socket, self.sent, self.received = connect(url), [], b""
        self.patient = patient  # It leaves it to the server to end what is incomplete.
        self.since = self.ended = 0.0

    def send(self, data):
        self.sent, self.since = [*self.sent[-2:], data], time.monotonic()
        with contextlib.suppress(OSError):  # The server may have closed it by now.
            self.socket.sendall(data)


class Attack:
    """Sends mutants over many connections at once, and checks whatever comes back."""

    CONNECTIONS, QUIET_S, HUNG_S = 24, 0.03, 20

    def __init__(self, url, seed, count):
        self.url, self.left, self.mutants = url, count, Mutants(seed)
        self.mutants.learn(
            json.dumps(send(url, "POST", "/api/register", {"name": "Ada"})[2]).encode()
        )
        self.statuses, self.open, self.selector = Counter(), set(), selectors.DefaultSelector()

    def run(self):
        swept = time.monotonic()
        try:
            while self.left > 0 or self.open:
                while self.left > 0 and len(self.open) < self.CONNECTIONS:
                    self.begin()
                for key, _ in self.selector.select(self.QUIET_S):
                    self.hear(key.data)
                if time.monotonic() > swept + self.QUIET_S:
                    swept = time.monotonic()
                    for connection in list(self.open):
                        self.wait_no_longer(connection)
        finally:
            for connection in list(self.open):
                self.close(connection)

    def begin(self):
        connection = Connection(self.url, patient=self.left % 50 == 0)
        self.open.add(connection)
        self.selector.register(connection.socket, selectors.EVENT_READ, connection)
        self.attack(connection)

    def attack(self, connection):
        self.left -= 1
        connection.send(next(self.mutants))

    def close(self, connection):
        self.open.remove(connection)
        self.selector.unregister(connection.socket)
        connection.socket.close()

    def hear(self, connection):
        """Take what has come, and go on once that is all of an answer."""
        chunk = b""
        with contextlib.suppress(ConnectionResetError):
            chunk = connection.socket.recv(2**18)
        received = connection.received = connection.received + chunk
        try:
            answered, last = self.check(connection, ended=not chunk)
        except Exception as error:
            raise AssertionError(connection.sent, received) from error
        if not chunk or (
            answered and len(connection.sent) == 3 and self.mutants.random.random() < 0.1
        ):
            self.close(connection)
        elif answered and not last and not connection.ended and self.left > 0:
            self.attack(connection)

    def check(self, connection, ended):
        """Check the answers that are there.

        Say whether the last one is whole, and whether none comes after it.
        """
        answered = last = False
        while connection.received and (answer := read_answer(connection.received, ended)):
            status, headers, body, connection.received = answer
            check_answer(status, headers, body)
            self.statuses[status] += 1
            self.mutants.learn(body)
            answered, last = (
                not connection.received,
                headers.get("Connection", "").lower() == "close",
            )
        return answered, last

    def wait_no_longer(self, connection):
        """End what is incomplete after a moment: then the server has to close the connection."""
        quiet_s = time.monotonic() - connection.since
        assert quiet_s < self.HUNG_S, ("hung", connection.sent, connection.received)
        if quiet_s > self.QUIET_S and not connection.ended and not connection.patient:
            connection.ended = True
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_WR)


def attack(dsn, count, careless=""):
    """Send so many mutants to a server that answers /livez all the while.

    Return the statuses that came, the mutants per second, and how many bytes its memory has grown
    by, after a tenth.
    """
    limits = limited(REQUEST_TIMEOUT_S=0.5, IDLE_TIMEOUT_S=0.5)
    program = limits[0], f"import wallet, wallet_cli\n{careless}\n{limits[1]}"
    arguments = "--dsn", dsn, "--log-level", "error"
    with served(*arguments, program=program) as process, ThreadPoolExecutor(2) as threads:
        log, done = threads.submit(process.stderr.read), threading.Event()

        def ask():
            while not done.wait(0.1):
                assert send(process.url, "GET", "/livez")[0] == 200

        def run(part, count):
            """Return the statuses that came, and the resident memory in bytes after it."""
            attack = Attack(process.url, part, count)
            attack.run()
            pages = [
                int(Path(f"/proc/{one}/statm").read_text().split()[1])
                for one in workers_of(process)
            ]
            return attack.statuses, sum(pages) * resource.getpagesize()

        asked, started = threads.submit(ask), time.monotonic()
        try:
            (first, bytes_before), (second, bytes_after) = (
                run(1, count // 10),
                run(2, count - count // 10),
            )
        finally:
            elapsed_s = time.monotonic() - started
            done.set()
            process.terminate()
            process.wait(30)
        asked.result()
        assert (process.returncode, "Traceback" in log.result()) == (0, False), log.result()
    with Wallet(dsn) as wallet:
        check_books(wallet)
    return first + second, count / elapsed_s, bytes_after - bytes_before


@pytest.mark.parametrize("count", [1000, torture(1_000_000)])
def test_mutated_requests_get_the_answers_of_the_contract_and_no_connection_hangs(
    file_dsn, count, report
):
    statuses, rate, grown_bytes = attack(file_dsn, count)
    assert statuses.total() > count / 2
    rare = {402, 405, 415} if count > 1000 else set()
    assert {200, 201, 400, 401, 404, 422} | rare <= statuses.keys()
    assert statuses[201] > count / 50
    assert grown_bytes < 64_000_000
    report(
        f"{count:,} mutants, {rate:,.0f} each second: {statuses.total():,} answers ({dict(statuses)}), 0 faults; "
        f"memory grew by {grown_bytes / 1e6:.0f} MB"
    )


@pytest.mark.parametrize(
    ("found", "careless"),
    [
        (
            "internal_error",
            "wallet._parse_query = lambda text, names: dict(pair.split('=') for pair in text.split('&') if pair)",
        ),
        (
            "text/html",
            "wallet._error_response = lambda error: wallet._Response("
            "error.status, b'<p>No</p>', {'Content-Type': 'text/html'})",
        ),
    ],
    ids=["fault", "HTML"],
)
def test_control_a_fault_and_an_error_in_html_are_found_by_mutated_requests(
    file_dsn, found, careless
):
    with pytest.raises(AssertionError, match=found):
        attack(file_dsn, 2000, careless)


def test_client_of_http_1_0_is_told_once_that_its_connection_is_closed(module_url):
    for request in (
        b"POST /api/register HTTP/1.0\r\nContent-Length: 99999\r\n",
        b"GET /livez HTTP/1.0\r\nBad\r\n",
    ):
        answer = raw_exchange(module_url, request + b"Connection: keep-alive\r\n\r\n")
        assert re.findall(rb"(?i)\r\nConnection: (\S+)", answer) == [b"close"]


def test_client_that_asks_before_it_sends_a_body_is_told_to_go_on_and_without_a_body_is_answered(
    module_url,
):
    with connect(module_url) as connection:
        connection.sendall(
            POST + b"Expect: 100-continue\r\nContent-Length: 14\r\nConnection: close\r\n\r\n"
        )
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b'{"name":"Ada"}')
        assert connection.recv(65536).startswith(b"HTTP/1.1 201")
    expecting = b"GET /livez HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nAuthorization: A\r\n\r\n"
    last = b"GET /api/account HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert re.findall(rb"HTTP/1.1 (\d+)", raw_exchange(module_url, expecting + last)) == [
        b"200",
        b"401",
    ]


def test_client_that_never_reads_is_let_go(serving):
    with serving(ANSWER_TIMEOUT_S=0.5) as url:
        with connect(url, receive_buffer_bytes=4096) as connection:
            request = b"GET /openapi.yaml HTTP/1.1\r\nHost: x\r\n\r\n"
            with contextlib.suppress(ConnectionError):
                connection.sendall(request * (8192 // len(request)))
            assert send_slowly_until_closed(connection)
        assert send(url, "GET", "/livez")[0] == 200


@pytest.mark.slow
def test_client_that_reads_slowly_but_reads_is_served(serving, monkeypatch):
    def bind(host, port):
        bound = plain_bind(host, port)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)  # Stands for a slow line.
        return bound

    plain_bind = wallet_server.bind
    monkeypatch.setattr(wallet_server, "bind", bind)
    request, body = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", (HERE / "wallet.html").read_bytes()
    with serving(ANSWER_TIMEOUT_S=1) as url, connect(url, receive_buffer_bytes=4096) as connection:
        sent, received, until = 0, 0, time.monotonic() + 2.5
        while time.monotonic() < until or received <= wallet_server.UNREAD_BYTES_MAX:
            while sent - received // len(body) < 3:
                connection.sendall(request)
                sent += 1
            chunk = connection.recv(5000)
            assert chunk
            received += len(chunk)
            time.sleep(0.04)


def test_client_that_still_sends_hears_why_it_is_refused(module_url, monkeypatch):
    body = b"x" * 5_000_000
    assert raw_exchange(module_url, POST + b"Content-Length: 5000000\r\n\r\n" + body).startswith(
        b"HTTP/1.1 413"
    )
    chunks = (
        b"Transfer-Encoding: chunked\r\n\r\n"
        + b"10000\r\n"
        + b"x" * 65536
        + b"\r\n"
        + b"1\r\nx\r\n" * 9
    )
    assert raw_exchange(module_url, POST + chunks + b"0\r\n\r\n").startswith(b"HTTP/1.1 413")
    monkeypatch.setattr(wallet_server, "REQUEST_TIMEOUT_S", 0.01)
    monkeypatch.setattr(wallet_server, "WATCH_INTERVAL_S", 0.1)
    with connect(module_url) as connection:
        connection.sendall(POST + b"Content-Length: 5000000\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")
        assert send_slowly_until_closed(connection)


def test_stop_does_not_wait_for_a_refused_client_that_goes_nowhere(monkeypatch):
    for name in ("REQUEST_TIMEOUT_S", "STOP_TIMEOUT_S"):
        monkeypatch.setattr(wallet_server, name, 60)
    with (
        contextlib.ExitStack() as server,
        ThreadPoolExecutor(1) as thread,
        connect(server.enter_context(running())) as connection,
    ):
        connection.sendall(POST + b"Content-Length: 5000000\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")
        thread.submit(server.close).result(timeout=30)


def test_chunked_body_is_taken(module_url):
    request = (
        POST
        + b'Transfer-Encoding: Chunked\r\nConnection: close\r\n\r\nd\r\n{"name":"Ada"\r\n1\r\n}\r\n0\r\n\r\n'
    )
    assert raw_exchange(module_url, request).startswith(b"HTTP/1.1 201")


def send_slowly_until_closed(connection):
    """Send a byte now and then, so as never to be idle, until the other side has closed.

    Say whether it has.
    """
    for _ in range(200):
        try:
            connection.sendall(b"n")
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    "part",
    [
        b"Content-Le",
        b"Content-Length: 9999\r\n\r\n",
        b"Expect: 100-continue\r\nContent-Length: 9999\r\n\r\n",
    ],
    ids=["headers", "body", "body that was asked for"],
)
def test_client_that_sends_one_request_for_too_long_is_let_go(serving, part):
    with serving(REQUEST_TIMEOUT_S=0.3) as url, connect(url) as slow:
        slow.sendall(POST + part)
        assert send_slowly_until_closed(slow)
        assert send(url, "GET", "/livez")[0] == 200


@pytest.mark.parametrize(
    "before", [b"", b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["first", "behind another"]
)
def test_client_that_sends_half_a_body_and_then_nothing_is_let_go(serving, before):
    with serving(REQUEST_TIMEOUT_S=0.3) as url, connect(url) as stuck:
        stuck.sendall(before + POST + b"Content-Length: 9\r\n\r\n{")
        while stuck.recv(65536):
            pass
        assert send(url, "GET", "/livez")[0] == 200


def ask_again_and_again(url):
    """Send requests from several clients at once, each as soon as its last one is answered."""
    asking = b"GET /api/account HTTP/1.1\r\nHost: x\r\n\r\n"  # It takes a thread, and is refused.

    def ask(_):
        with connect(url) as connection:
            connection.settimeout(5)
            for _ in range(100):
                connection.sendall(asking)
                assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(ask, range(8)))


def test_no_answer_waits_until_the_server_looks_by_itself(serving):
    with serving(WATCH_INTERVAL_S=60, PATIENCE_S=60) as url:
        ask_again_and_again(url)


def test_control_a_server_that_is_woken_only_once_forgets_answers(serving, monkeypatch):
    woken = property(lambda server: server.served, lambda server, _: setattr(server, "served", True))
    monkeypatch.setattr(wallet_server.Server, "served", False, raising=False)
    monkeypatch.setattr(wallet_server.Server, "is_woken", woken)
    with serving(WATCH_INTERVAL_S=8, PATIENCE_S=60) as url, pytest.raises(TimeoutError):
        ask_again_and_again(url)


def test_control_a_server_that_looks_at_nobody_keeps_a_slow_sender(serving, monkeypatch):
    """The negative control of the tests about slow clients."""
    monkeypatch.setattr(wallet_server._Channel, "is_late", lambda *_: False)
    with serving(REQUEST_TIMEOUT_S=0.3, IDLE_TIMEOUT_S=0.3) as url, connect(url) as slow:
        slow.sendall(POST + b"Content-Length: 9999\r\n\r\n")
        slow.settimeout(1.5)
        with pytest.raises(TimeoutError):
            slow.recv(1)


def test_connection_above_the_limit_waits_until_another_ends(serving):
    asking, limit = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", 4  # Of which waitress itself has two.
    with serving(CONNECTIONS_MAX=limit, CONNECTIONS_MIN=1, CROWDED_IDLE_S=60) as url, contextlib.ExitStack() as stack:
        first, second, third = (stack.enter_context(connect(url)) for _ in range(3))
        for served_at_once in (first, second):
            served_at_once.sendall(asking)
            assert served_at_once.recv(65536).startswith(b"HTTP/1.1 200")
        third.sendall(asking)
        third.settimeout(0.5)
        with pytest.raises(TimeoutError):
            third.recv(1)
        first.close()
        third.settimeout(30)
        assert third.recv(65536).startswith(b"HTTP/1.1 200")


def test_half_request_behind_one_that_takes_its_time_is_not_blamed_for_it(file_wallet, serving):
    _, token = file_wallet.register("Ada")
    head = (
        f"POST /api/transactions/topup HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        "Content-Type: application/json\r\nContent-Length: 13\r\n\r\n"
    )
    with (
        serving(file_wallet, REQUEST_TIMEOUT_S=0.5, DATABASE_TIMEOUT_S=30) as url,
        connect(url) as connection,
    ):
        release = hold_the_writer(file_wallet)
        connection.sendall(head.encode() + b'{"amount": 5}' + b"GET /livez HTTP/1.1\r\nHost: x\r\nConn")
        time.sleep(1)  # The server looks for slow clients ten times a second here.
        release()
        received = connection.recv(65536)
        connection.sendall(b"ection: close\r\n\r\n")
        while chunk := connection.recv(65536):
            received += chunk
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"201", b"200"]


def test_answer_is_not_kept_back_by_a_request_behind_it_that_takes_its_time(file_wallet, serving):
    _, token = file_wallet.register("Ada")
    with serving(file_wallet, DATABASE_TIMEOUT_S=30) as url, connect(url) as connection:
        release = hold_the_writer(file_wallet)
        try:
            connection.settimeout(10)
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" + topup_request(token))
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        finally:
            release()
        assert connection.recv(65536).startswith(b"HTTP/1.1 201")


def test_idle_connection_is_let_go(serving):
    with serving(IDLE_TIMEOUT_S=0.3) as url, connect(url) as idle, connect(url) as used:
        used.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert used.recv(65536).startswith(b"HTTP/1.1 200")
        assert (idle.recv(1), used.recv(1)) == (b"", b"")
        assert send(url, "GET", "/livez")[0] == 200


def topup_request(token):
    return (
        f"POST /api/transactions/topup HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        'Content-Type: application/json\r\nContent-Length: 13\r\n\r\n{"amount": 5}'
    ).encode()


SLOW = {
    "headers": POST + b"X: ",
    "body": POST + b"Content-Length: 9\r\n\r\n{",
    "read": b"GET /openapi.yaml HTTP/1.1\r\nHost: x\r\n\r\n" * 6,
}


@pytest.mark.torture
@pytest.mark.skipif(
    not shutil.which("slowhttptest"), reason="needs slowhttptest: apt install slowhttptest"
)
@pytest.mark.parametrize(
    ("mode", "path"), [("-H", "/livez"), ("-B", "/api/register"), ("-X", "/openapi.yaml")], ids=SLOW
)
def test_service_is_available_to_others_under_slowhttptest(file_dsn, report, mode, path):
    with served("--dsn", file_dsn, "--log-level", "warning") as server:
        for process in {server.pid, *workers_of(server)}:
            resource.prlimit(process, resource.RLIMIT_NOFILE, (1024, 1024))  # The usual limit.
        token = send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"]
        parts, ended, waits_s = urlsplit(server.url), threading.Event(), {"kept": [], "new": []}

        def work(kind):
            with contextlib.closing(
                http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
            ) as kept:
                while not ended.wait(0.02):
                    started = time.monotonic()
                    assert (
                        send(
                            server.url,
                            "POST",
                            "/api/transactions/topup",
                            {"amount": 1},
                            token,
                            kept if kind == "kept" else None,
                        )[0]
                        == 201
                    )
                    waits_s[kind].append(time.monotonic() - started)

        with ThreadPoolExecutor(2) as threads:
            futures = [threads.submit(work, kind) for kind in waits_s]
            options = (
                "-c",
                "1000",
                "-r",
                "200",
                "-l",
                "30",
                "-i",
                "5",
                "-k",
                "3",
                "-p",
                "2",
                "-v",
                "1",
            )
            try:
                said = subprocess.run(
                    ["slowhttptest", mode, *options, "-u", server.url + path],
                    capture_output=True,
                    text=True,
                    timeout=120,
                ).stdout
            finally:
                ended.set()
            for future in futures:
                future.result()
    said = re.sub(r"\x1b\[[0-9;]*m", "", said)
    available = re.findall(r"service available:\s+(\w+)", said)
    opened = sum(
        int(re.findall(rf"{state}:\s+(\d+)", said)[-1]) for state in ("connected", "closed")
    )
    p99_ms = {kind: sorted(waits)[len(waits) * 99 // 100] * 1000 for kind, waits in waits_s.items()}
    report(
        f"{opened} slow connections, available {available.count('YES')} of {len(available)} times, of others "
        + ", ".join(
            f"{len(waits)} requests on {kind} connections with a p99 of {p99_ms[kind]:.0f} ms"
            for kind, waits in waits_s.items()
        )
    )
    assert set(available) == {"YES"}
    assert max(p99_ms.values()) <= 250
    with Wallet(file_dsn) as wallet:
        assert wallet.authenticate(token).balance == sum(map(len, waits_s.values()))


def test_request_that_has_waited_too_long_for_a_thread_is_refused(file_wallet, monkeypatch):
    _, token = file_wallet.register("Ada")
    with running(file_wallet) as url, ThreadPoolExecutor(5) as threads:
        release = hold_the_writer(file_wallet)
        arguments = send, url, "POST", "/api/transactions/topup", {"amount": 5}, token
        working = [threads.submit(*arguments) for _ in range(4)]
        wait_for_queue(file_wallet, 4)
        late = threads.submit(*arguments)
        assert send(url, "GET", "/livez")[0] == 200
        monkeypatch.setattr(wallet_server, "QUEUE_TIMEOUT_S", 0)
        release()
        assert {answer.result()[0] for answer in working} == {201}
        assert (late.result()[0], late.result()[2]["code"]) == (503, "unavailable")
        monkeypatch.setattr(wallet_server, "QUEUE_TIMEOUT_S", 5)
        assert send(*arguments[1:])[0] == 201
    assert file_wallet.authenticate(token).balance == 25


def test_queue_of_requests_is_not_logged(file_wallet, caplog):
    _, token = file_wallet.register("Ada")
    release = hold_the_writer(file_wallet)
    with running(file_wallet) as url, ThreadPoolExecutor(16) as threads:
        path, body = "/api/transactions/topup", {"amount": 1}
        answers = [threads.submit(send, url, "POST", path, body, token) for _ in range(16)]
        wait_for_queue(file_wallet, 4)
        release()
        assert {answer.result()[0] for answer in answers} == {201}
    assert [record for record in caplog.records if record.name.startswith("waitress")] == []


def test_headers_may_have_16_kib_and_a_body_64_and_no_more_on_each_server(module_url):
    for more, statuses in ((0, [b"200", b"201"]), (1, [b"431", b"413"])):
        head = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX: "
        headers = head.ljust(wallet_module.HEADER_BYTES_MAX - 4 + more, b"x") + b"\r\n\r\n"
        body = b'{"name":"Ada"}'.ljust(BODY_BYTES_MAX + more)
        request = POST + f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        assert [raw_exchange(module_url, one)[9:12] for one in (headers, request)] == statuses


def test_pipelined_requests_are_answered_in_order(module_url):
    first = b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Request-Id: first\r\n\r\n"
    second = (
        b"GET /nowhere HTTP/1.1\r\nHost: x\r\nX-Request-Id: second\r\nConnection: close\r\n\r\n"
    )
    assert re.findall(rb"(?i)X-Request-Id: (\w+)", raw_exchange(module_url, first + second)) == [
        b"first",
        b"second",
    ]
