"""The proxies of docs/proxies.md, real ones, before wallets that restart.

What they run is what the pages say, but for ports, certificates and folders.
"""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import textwrap
import threading
import time
from functools import partial

import pytest

from tests.support import PAGES, check_books, free_port, send, served, together, torture
from wallet import BodyTooLarge, HeadersTooLarge, NotFound, OutcomeUnknown, Unavailable, Wallet

HOST = "wallet.example.com"
PROXIES = ("nginx", "caddy", "haproxy")
CLIENTS, CLIENT_RATE_PER_S = 8, 12  # Each has an address of its own, and stays below the limit.
DRAIN_S = 2

# What is around a snippet. It names folders, and leaves out the outside world.
NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/errors;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
{snippet}
}}
"""
CADDY = """
{{
    admin off
    https_port {port}
    default_bind 127.0.0.1
    auto_https disable_redirects
    local_certs
    skip_install_trust
}}
{snippet}
"""
HAPROXY = "global\n    maxconn 1000\n\n{snippet}"


def snippets_of(proxy):
    """Return what the page has for a proxy: in front of one wallet, and of several."""
    one, several = re.findall(rf"(?ms)^ *```{proxy}\n(.*?)^ *```", PAGES["proxies.md"])
    return textwrap.dedent(one), textwrap.dedent(several)


def block_of(text, begin):
    """Return the block of a snippet that begins with this line, to its end."""
    indent = re.search(rf"(?m)^( *){re.escape(begin)}", text)[1]
    return re.search(rf"(?ms)^{indent}{re.escape(begin)}.*?(?:^{indent}}}\n|\Z)", text)[0]


def several(proxy):
    """Return the snippet for one wallet, with that for several in its place, as the page says."""
    whole, part = snippets_of(proxy)
    begin = {"nginx": "upstream wallet", "caddy": "reverse_proxy", "haproxy": "backend wallet"}
    old = block_of(whole, begin[proxy])
    indent = re.match(" *", old)[0]
    return whole.replace(old, textwrap.indent(part, indent))


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A certificate of its own, and its key: two files, and both in one."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl: apt install openssl")
    folder = tmp_path_factory.mktemp("certificate")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "9", "-subj",
         f"/CN={HOST}", "-keyout", folder / "key.pem", "-out", folder / "chain.pem"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    both = (folder / "chain.pem").read_text() + (folder / "key.pem").read_text()
    (folder / "both.pem").write_text(both)
    return folder


class Client(http.client.HTTPConnection):
    """A connection to a proxy by TLS, from an address of its own."""

    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    def __init__(self, port, number=1):
        super().__init__(HOST, timeout=60)
        self.proxy_port, self.address = port, f"127.0.0.{number + 1}"

    def connect(self):
        plain = socket.create_connection(
            ("127.0.0.1", self.proxy_port), self.timeout, (self.address, 0)
        )
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = self.context.wrap_socket(plain, server_hostname=HOST)

    def ask(self, method, path, body=None, token=None, **headers):
        """Return the status, the headers and the text of an answer."""
        if token:
            headers["Authorization"] = f"Bearer {token}"
        if body is not None:
            headers["Content-Type"] = "application/json"
        self.request(method, path, body, headers)
        answer = self.getresponse()
        return answer.status, answer.headers, answer.read().decode()


@contextlib.contextmanager
def behind(proxy, snippet, wallets, certificate, folder):
    """Run a proxy before wallets, which are given by their ports. Yield its port."""
    if not shutil.which(proxy):
        pytest.skip(f"needs {proxy}: apt install {proxy.replace('nginx', 'nginx-light')}")
    port, folder = free_port(), folder / proxy
    folder.mkdir()
    for number, wallet_port in enumerate(wallets):
        snippet = snippet.replace(f"127.0.0.1:{4000 + number}", f"127.0.0.1:{wallet_port}")
    local = {
        "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
        f"/etc/letsencrypt/live/{HOST}/fullchain.pem": f"{certificate}/chain.pem",
        f"/etc/letsencrypt/live/{HOST}/privkey.pem": f"{certificate}/key.pem",
        f"/etc/haproxy/{HOST}.pem": f"{certificate}/both.pem",
        "bind :443": f"bind 127.0.0.1:{port}",
    }
    for named, here in local.items():
        snippet = snippet.replace(named, here)
    around, name, command = {
        "nginx": (NGINX, "nginx.conf", ["nginx", "-c"]),
        "caddy": (CADDY, "Caddyfile", ["caddy", "run", "--adapter", "caddyfile", "--config"]),
        "haproxy": (HAPROXY, "haproxy.cfg", ["haproxy", "-db", "-f"]),
    }[proxy]
    (folder / name).write_text(around.format(folder=folder, port=port, snippet=snippet))
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [*command, folder / name], stdout=output, stderr=output,
            env={**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder)},
        )  # fmt: skip
    try:
        wait_for(lambda: answers(port), process)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_for(done, process):
    """Wait until something is so, while a process runs."""
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)


def answers(port):
    with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(Client(port)) as client:
        return client.ask("GET", "/readyz")[0] == 200
    return False


@contextlib.contextmanager
def wallet_on(port, dsn, **settings):
    """Serve a wallet on a port, and stop it in the end as a supervisor does."""
    with served("--log-level", "warning", "--dsn", dsn, "--port", str(port), **settings) as server:
        yield server
        server.terminate()
        assert server.wait(timeout=30) == 0


class Clients:
    """Clients that keep their connections, top up again and again, and send nothing twice."""

    def __init__(self, port, tokens, posts):
        self.port, self.left, self.answers = port, posts, collections.Counter()
        self.others, self.lock = [], threading.Lock()
        self.threads = [
            threading.Thread(target=self.work, args=item) for item in enumerate(tokens, 1)
        ]
        for thread in self.threads:
            thread.start()

    def take(self):
        with self.lock:
            self.left -= 1
            return self.left >= 0

    def work(self, number, token):
        client, at = Client(self.port, number), time.monotonic()
        while self.take():
            try:
                status, _, text = client.ask(
                    "POST", "/api/transactions/topup", '{"amount": 1}', token
                )
            except (OSError, http.client.HTTPException) as error:
                client.close()
                status, text = repr(error), ""
            with self.lock:
                self.answers[status] += 1
                if status != 201:
                    self.others.append(text)
            at = max(at + 1 / CLIENT_RATE_PER_S, time.monotonic())
            time.sleep(at - time.monotonic() if at > time.monotonic() else 0)
        client.close()

    def wait(self):
        for thread in self.threads:
            thread.join(timeout=600)

    def is_done(self):
        return not any(thread.is_alive() for thread in self.threads)


def count_posts(port):
    """Return how many POSTs the wallet on this port has answered with 201 since it started."""
    text = send(f"http://127.0.0.1:{port}", "GET", "/metrics")[2].decode()
    counts = re.findall(r'(?m)^wallet_requests_total{method="POST".*status="201"} ([0-9.]+)$', text)
    return sum(map(float, counts))


def restart_under_load(
    proxy, snippet, dsn, ports, posts, certificate, folder, enough=50, **settings
):
    """Restart the wallets on these ports in turn behind a proxy, while clients send so many POSTs.

    Before the next one is restarted, the last one has got `enough` of them. Return the clients, how
    many restarts there were, and how many POSTs beyond the answered ones are in the books.
    """
    settings["WALLET_METRICS"] = "1"
    with Wallet(dsn) as wallet:
        tokens = [wallet.register(f"Client {number}")[1] for number in range(CLIENTS)]
    restarts = 0
    with contextlib.ExitStack() as running:
        wallets = [contextlib.ExitStack() for _ in ports]
        for one, port in zip(wallets, ports, strict=True):
            running.push(one)
            one.enter_context(wallet_on(port, dsn, **settings))
        port = running.enter_context(behind(proxy, snippet, ports, certificate, folder))
        clients = Clients(port, tokens, posts)
        running.callback(clients.wait)
        while not clients.is_done():
            number = restarts % len(ports)
            wallets[number].close()
            server = wallets[number].enter_context(wallet_on(ports[number], dsn, **settings))
            restarts += 1
            wait_for(lambda at=ports[number]: clients.is_done() or count_posts(at) >= enough, server)
    with Wallet(dsn) as wallet:
        check_books(wallet)
        kept = sum(wallet.authenticate(token).balance for token in tokens)
    assert sum(clients.answers.values()) == posts
    return clients, restarts, kept - clients.answers[201]


@pytest.mark.slow
@pytest.mark.parametrize("posts", [500, torture(10_000)])
@pytest.mark.parametrize("proxy", PROXIES)
def test_rolling_restart_behind_each_documented_proxy_loses_no_request(
    durable_dsn, proxy, posts, certificate, tmp_path, report
):
    """On SQLite the two wallets serve one file."""
    ports = free_port(), free_port()
    clients, restarts, surplus = restart_under_load(
        proxy, several(proxy), durable_dsn, ports, posts, certificate, tmp_path,
        WALLET_DRAIN_S=str(DRAIN_S),
    )  # fmt: skip
    report(f"{posts:,} POSTs, {restarts} restarts: {dict(clients.answers)}")
    assert clients.answers == {201: posts}, (clients.answers, clients.others)
    assert (surplus, restarts > 0) == (0, True)


@pytest.mark.parametrize(
    ("proxy", "decisive", "drain_s", "enough"),
    [
        ("nginx", (" max_fails=0", ""), DRAIN_S, 0),
        ("caddy", ("", ""), 0, 50),
        ("haproxy", ("retries 3", "retries 0"), 0, 50),
    ],
)
def test_control_rolling_restart_loses_requests_without_what_decides(
    postgres_dsn, proxy, decisive, drain_s, enough, certificate, tmp_path
):
    clients, restarts, surplus = restart_under_load(
        proxy, several(proxy).replace(*decisive), postgres_dsn, (free_port(), free_port()), 1000,
        certificate, tmp_path, enough, WALLET_DRAIN_S=str(drain_s),
    )  # fmt: skip
    assert any(status in (502, 503) for status in clients.answers), (clients.answers, restarts)
    assert 0 <= surplus <= 1000 - clients.answers[201]


@pytest.mark.slow
@pytest.mark.parametrize("posts", [500, torture(10_000)])
@pytest.mark.parametrize("proxy", PROXIES)
def test_restart_of_the_one_wallet_on_sqlite_is_waited_for_or_said_to_have_done_nothing(
    file_dsn, proxy, posts, certificate, tmp_path, report
):
    clients, restarts, surplus = restart_under_load(
        proxy, snippets_of(proxy)[0], file_dsn, (free_port(),), posts, certificate,
        tmp_path,
    )  # fmt: skip
    report(f"{posts:,} POSTs, {restarts} restarts: {dict(clients.answers)}")
    assert (surplus, restarts > 0) == (0, True)
    if proxy == "haproxy":
        assert clients.answers == {201: posts}, (clients.answers, clients.others)
    assert clients.answers.keys() <= {201, 502}, (clients.answers, clients.others)
    if proxy == "nginx":
        assert {json.loads(text)["code"] for text in clients.others} <= {"unavailable"}


@pytest.mark.parametrize("proxy", PROXIES)
def test_each_documented_proxy_tells_who_asks_names_the_request_and_keeps_metrics_inside(
    file_dsn, proxy, certificate, tmp_path
):
    port = free_port()
    arguments = "--dsn", file_dsn, "--port", str(port), "--metrics", "1"
    with served(*arguments, "--trusted-proxy", "127.0.0.1") as server:
        snippet = snippets_of(proxy)[0]
        with (
            behind(proxy, snippet, [port], certificate, tmp_path) as proxy_port,
            contextlib.closing(Client(proxy_port, number=7)) as client,
        ):
            forged = {"X-Forwarded-For": "203.0.113.9", "X-Request-Id": "mine"}
            status, headers, _ = client.ask("GET", "/api/account", **forged)
            assert (status, headers["Strict-Transport-Security"]) == (401, "max-age=31536000")
            (request_id,) = headers.get_all("X-Request-Id")
            for path in ("/metrics", "/%6detrics", "/metrics?a=1", "//metrics", "/x/../metrics"):
                assert client.ask("GET", path)[0] in (400, 404), path
                client.close()
        server.terminate()
        log = [json.loads(line) for line in server.communicate(timeout=30)[1].splitlines()]
    asked = [line for line in log if line.get("path") == "/api/account"]
    assert [(one["client"], one["request_id"]) for one in asked] == [("127.0.0.8", request_id)]
    assert request_id != "mine"
    assert ("/metrics", 200) not in {(line.get("path"), line.get("status")) for line in log}


# What nginx answers by itself ####################################################################


def check_problem(answer, status, error, retry_after=None):
    """Check that an answer is a problem of the wallet's own form."""
    found, headers, text = answer
    problem = json.loads(text)
    assert problem.keys() == {"title", "status", "detail", "code"}
    assert (found, problem["status"]) == (status, status), text
    assert (problem["code"], problem["title"]) == (error.code, error.title)
    assert headers["Content-Type"] == "application/problem+json"
    assert headers["Retry-After"] == retry_after
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Strict-Transport-Security"]
    assert re.fullmatch("[0-9a-f]{32}", headers["X-Request-Id"])


TOPUP = "POST", "/api/transactions/topup", '{"amount": 1}'


@pytest.mark.slow
def test_what_nginx_refuses_by_itself_is_a_problem_with_the_id_of_the_request(
    file_dsn, certificate, tmp_path
):
    snippet = snippets_of("nginx")[0]
    snippet = snippet.replace("proxy_read_timeout 30s", "proxy_read_timeout 1s")
    port = free_port()
    with Wallet(file_dsn) as wallet:
        _, token = wallet.register("Ada")
    with contextlib.ExitStack() as opened:
        server = opened.enter_context(wallet_on(port, file_dsn))
        proxy_port = opened.enter_context(behind("nginx", snippet, [port], certificate, tmp_path))
        ask = opened.enter_context(contextlib.closing(Client(proxy_port))).ask
        assert ask(*TOPUP, token)[0] == 201
        large = ask("POST", "/api/transactions/batch.csv", " " * (2**20 + 1), token)
        check_problem(large, 413, BodyTooLarge)
        check_problem(ask("GET", "/metrics"), 404, NotFound)
        check_problem(ask("GET", "/livez", X="x" * 17_000), 431, HeadersTooLarge)
        assert ask("GET", "/livez", X="x" * 15_000)[0] == 200
        status, headers, text = ask("GET", "/api/nothing")  # The wallet's own go through.
        assert (status, json.loads(text)["code"]) == (404, "not_found")
        assert "/openapi.yaml" in text
        assert len(headers.get_all("X-Request-Id")) == 1
        server.send_signal(signal.SIGSTOP)
        try:
            check_problem(ask(*TOPUP, token), 504, OutcomeUnknown, "1")
        finally:
            server.send_signal(signal.SIGCONT)
        refused = [one for some in together(*[partial(be_fast, proxy_port)] * 8) for one in some]
        assert refused
        for answer in refused:
            check_problem(answer, 429, Unavailable, "1")
        server.terminate()
        assert server.wait(timeout=30) == 0
        check_problem(ask(*TOPUP, token), 502, Unavailable, "1")
        # It takes the request, and breaks off.
        with socket.create_server(("127.0.0.1", port)) as listener:
            thread = threading.Thread(target=take_and_break_off, args=(listener,))
            thread.start()
            check_problem(ask(*TOPUP, token), 502, OutcomeUnknown, "1")
            thread.join(timeout=30)
    with Wallet(file_dsn) as wallet:
        assert wallet.authenticate(token).balance in (1, 2)  # What timed out was done, or not.


def be_fast(port):
    """Send more at once than one client may. Return what is not answered with 200."""
    with contextlib.closing(Client(port, number=3)) as client:
        return [one for one in (client.ask("GET", "/livez") for _ in range(60)) if one[0] != 200]


def take_and_break_off(listener):
    connection, _ = listener.accept()
    with connection:
        connection.recv(65536)
