"""Settings, the command line, and how the service starts and stops."""

from __future__ import annotations

import contextlib
import http.client
import inspect
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import wallet as wallet_module
import wallet_cli
import wallet_server
from tests.support import (
    CONTRACT,
    HERE,
    ISSUER_TOKEN,
    MODULE,
    command,
    connect,
    free_port,
    limited,
    log_lines,
    send,
    served,
    torture,
    workers_of,
)
from wallet import ConfigurationError, Wallet, create_app, running

pytestmark = pytest.mark.slow_on("postgres")  # CI runs these on both engines.

# Settings and the command line ####################################################################


def test_help_names_every_setting_with_its_variable_and_default():
    shown = " ".join(command("--help").stdout.split())
    for setting in wallet_cli.SETTINGS:
        value = "[VALUE]" if setting.is_flag else "VALUE"
        meaning = f"{setting.meaning} [{setting.variable}={setting.default}]"
        assert f"--{setting.name} {value} {meaning}" in shown
    assert "Example: python wallet.py" in shown


def test_version_is_told():
    assert command("--version").stdout == f"wallet {wallet_module.__version__}\n"
    assert CONTRACT["info"]["version"] == wallet_module.__version__


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (
            ["--port", "x"],
            {},
            "wallet: --port or WALLET_PORT must be an integer from 0 to 65535, not 'x'",
        ),
        (["--port", "65536"], {}, "WALLET_PORT must be an integer from 0 to 65535"),
        (["--threads", "0"], {}, "WALLET_THREADS must be an integer from 1 to 64"),
        (["--drain-s", "-1"], {}, "WALLET_DRAIN_S must be an integer from 0 to 300, not '-1'"),
        (["--metrics", "yes"], {}, "WALLET_METRICS must be an integer from 0 to 1, not 'yes'"),
        (
            ["--trusted-proxy", "*"],
            {},
            "WALLET_TRUSTED_PROXY must be the IP address of one proxy: if any were trusted,",
        ),
        (
            [],
            {"WALLET_TRUSTED_PROXY": "10.0.0.0/8"},
            "WALLET_TRUSTED_PROXY must be the IP address of one proxy",
        ),
        (
            ["--cors-origin", "https://shop.example", "--cors-origin", "https://shop.example/"],
            {},
            "WALLET_CORS_ORIGIN must be * alone, or origins as browsers send them, in lower case,",
        ),
        (
            ["--log-level", "loud"],
            {},
            "WALLET_LOG_LEVEL must be one of debug, info, warning, error, not 'loud'",
        ),
        (["--port", "tcp://10.0.0.1:4000"], {}, "WALLET_PORT must be an integer"),
        ([], {"WALLET_CURRENCY": "Dollar"}, "three capital letters"),
        (["--por"], {}, "wallet: there is no option --por (is it --port?); see --help"),
        (["--frobnicate=1"], {}, "wallet: there is no option --frobnicate; see --help"),
        # Only what this command takes is proposed.
        (["topup", "x", "--amount", "5"], {}, "wallet: there is no option --amount; see --help"),
        (["verify", "--typ"], {}, "wallet: there is no option --typ; see --help"),
        (["history", "x", "--typ"], {}, "there is no option --typ (is it --type?); see --help"),
        (["seve"], {}, "wallet: there is no command 'seve' (is it serve?); see --help"),
        (["--issuer-tokn", "s" * 40], {}, "there is no option --issuer-tokn (is it --issuer-token?)"),
        (["s" * 40], {}, "there is no command '***'; see --help"),
        (
            ["--por", "4000"],
            {},
            "wallet: there is no option --por (is it --port?); see --help",
        ),
        (
            ["copy", "--from", "sqlite://"],
            {},
            "wallet: the following arguments are required: --to; see --help",
        ),
        (["--dsn", "mongodb://u:secret@x"], {}, "unknown kind of DSN, mongodb://"),
        (["--host", "no such host"], {}, "cannot listen on no such host port 0: "),
    ],
)
def test_bad_start_is_one_line_and_exit_code_2(refusal, arguments, settings, message):
    told = refusal(*arguments, **{"WALLET_PORT": "0", **settings})
    assert message in told
    assert "secret" not in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--dsn", "sqlite:////no/such/folder/wallet.db"],
            "cannot open /no/such/folder/wallet.db: No such file",
        ),
        (
            ["--host", "203.0.113.1"],
            "cannot listen on 203.0.113.1 port 0: Cannot assign requested address:"
            " name an address of this machine, or wait for its network",
        ),
        (["--dsn", "sqlite://", "--must-exist", "1"], "there is no wallet in memory"),
    ],
)
def test_start_that_may_succeed_later_is_one_line_and_exit_code_75(refusal, arguments, message):
    assert message in refusal(*arguments, code=75, WALLET_PORT="0")


@pytest.mark.parametrize("setting", wallet_cli.SETTINGS, ids=lambda setting: setting.name)
def test_setting_that_is_empty_or_has_a_control_character_is_refused_by_name(refusal, setting):
    for value, reason in [
        ("", "is empty"),
        ("\r", "has a control character"),
        (f"{setting.default or 'USD'}\r", "has a control character"),
        (f"{setting.default}\n", "has a control character"),
        (f"\x7f{setting.default}", "has a control character"),
    ]:
        named = f"wallet: --{setting.name} or {setting.variable} {reason}"
        assert refusal(f"--{setting.name}", value).startswith(named)
        assert refusal(**{setting.variable: value}).startswith(named)
        assert refusal("accounts", **{setting.variable: value}).startswith(named)


def test_embedder_and_copy_may_not_give_them_either(refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for dsn in ("sqlite:///wallet.db\r", "sqlite:///wal\x00let.db", "postgresql://h/\n"):
        with pytest.raises(ConfigurationError, match="the DSN has a control character"):
            Wallet(dsn)
    with Wallet() as wallet, pytest.raises(ConfigurationError, match="WALLET_ISSUER_TOKEN must"):
        create_app(wallet, "")
    told = refusal("copy", "--from", "sqlite:///wallet.db\r", "--to", "sqlite:///copy.db")
    assert "the DSN has a control character" in told


def test_unknown_variables_are_named_in_one_line_with_the_nearest_known_one(file_dsn):
    Wallet(file_dsn).close()
    unknown = {"WALLET_ISUER_TOKEN": ISSUER_TOKEN, "WALLET_DATABASE_X": "1", "WALLET_\n": ""}
    done = command("accounts", WALLET_DSN=file_dsn, **unknown)
    assert done.returncode == 0
    assert log_lines(done.stderr) == [
        "WARNING wallet: these variables are unknown, and do nothing: WALLET_?, WALLET_DATABASE_X,"
        " WALLET_ISUER_TOKEN (is it WALLET_ISSUER_TOKEN?)"
    ]


def test_port_in_use_is_one_line_and_exit_code_75(tmp_path):
    with served("--dsn", "sqlite://") as server:
        port = urlsplit(server.url).port
        done = command("--port", str(port), cwd=tmp_path)
    assert done.returncode == 75
    assert (
        done.stderr == f"wallet: cannot listen on 127.0.0.1 port {port}: Address already in use: stop what has it, or choose another\n"
    )


def test_port_that_is_for_root_is_one_line_and_exit_code_2():
    first = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    if not first.exists() or int(first.read_text()) <= 81:
        pytest.skip("needs a system that keeps port 81 for root")
    done = command("--dsn", "sqlite://", "--port", "81", without="-net_bind_service")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "wallet: cannot listen on 127.0.0.1 port 81: Permission denied:"
        " name an address of this machine, and a port from 1024 on\n"
    )


def test_every_setting_is_read_and_reaches_the_application_from_the_command_line_too():
    def read(source):
        return set(re.findall(r'settings\["([a-z-]+)"\]', source))

    by_command_line = read((HERE / "wallet_cli.py").read_text())
    assert read(inspect.getsource(wallet_module.create_app)) <= by_command_line
    assert read((HERE / "wallet.py").read_text()) | by_command_line >= {one.name for one in wallet_cli.SETTINGS}


def test_command_line_comes_before_the_environment(monkeypatch):
    monkeypatch.setenv("WALLET_THREADS", "3")
    assert wallet_cli.load_settings()["threads"] == 3
    assert wallet_cli._parse_arguments(["--threads", "4"])["threads"] == 4
    assert wallet_cli._parse_arguments([]) == {
        "dsn": "sqlite:///wallet.db",
        "must-exist": 0,
        "host": "127.0.0.1",
        "port": 4000,
        "threads": 3,
        "drain-s": 0,
        "currency": None,
        "issuer-token": None,
        "log-level": "info",
        "command": "serve",
        "metrics": 0,
        "trusted-proxy": None,
        "cors-origin": [],
    }


def test_it_serves_says_where_and_its_curls_can_be_pasted(tmp_path):
    with served(program=(HERE / "wallet.py",), cwd=tmp_path) as server:  # As users run it.
        first_line, _, pasted = server.banner.partition("\n")
        assert (
            first_line
            == f"wallet {wallet_module.__version__} listens on {server.url}, with its data in "
            f"{tmp_path}/wallet.db, in USD: an amount of 1250 is 12.50. Open the address in a browser, or try it from another terminal:"
        )
        assert pasted.count("curl ") == 3
        done = subprocess.run(["bash", "-c", pasted], capture_output=True, text=True, timeout=60)
        assert json.loads(done.stderr)["name"] == "Ada"
        assert [json.loads(line).get("code") for line in done.stdout.splitlines()] == [
            None,
            "insufficient_funds",
        ]
        server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=30)
    account = f"acc_{re.search('wlt_(.{16})', done.stderr)[1]} 127.0.0.1"
    started, *lines = log_lines(log)
    engine = f"SQLite {sqlite3.sqlite_version} at {tmp_path}/wallet.db"
    version = f"wallet {wallet_module.__version__} on {server.url}"
    assert started == f"INFO wallet: started: {version}, with {engine}"
    assert [re.sub(r"\d+\.\d ms [0-9a-f]{16}|\d+ connections", "_", line) for line in lines] == [
        "INFO wallet.access: POST /api/register 201 _ - 127.0.0.1",
        f"INFO wallet.access: POST /api/transactions/topup 201 _ {account}",
        f"INFO wallet.access: POST /api/transactions/charge 402 _ {account}",
        "INFO wallet: stopping: _ are open",
        "INFO wallet: stopped",
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_finishes_what_runs_closes_the_database_and_exits_0(tmp_path, number):
    with served("--log-level", "warning", cwd=tmp_path) as server:
        parts = urlsplit(server.url)
        token = send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"]
        idle = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
        assert send(server.url, "GET", "/livez", connection=idle)[0] == 200
        slow = socket.create_connection((parts.hostname, parts.port), timeout=30)
        head = (
            f"POST /api/transactions/topup HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
            "Content-Type: application/json\r\nContent-Length: 13\r\n\r\n"
        )
        slow.sendall(head.encode() + b'{"amount"')
        assert (
            send(server.url, "GET", "/livez")[0] == 200
        )  # By now the server has read the half request.
        server.send_signal(number)
        assert idle.sock.recv(1) == b""
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((parts.hostname, parts.port), timeout=30)
        slow.sendall(b": 5}")
        answer = b""
        while chunk := slow.recv(65536):
            answer += chunk
        slow.close()
        idle.close()
        assert answer.startswith(b"HTTP/1.1 201")
        assert b"connection: close" in answer.lower()
        assert server.wait(timeout=30) == 0
        assert server.stderr.read() == ""
    assert {path.name for path in tmp_path.iterdir()} == {
        "wallet.db"
    }  # Closed: the log is folded into the file.
    with Wallet(f"sqlite:///{tmp_path}/wallet.db") as wallet:
        assert wallet.authenticate(token).balance == 5


def stop_under_load(dsn, **limits):
    """Stop a server under load.

    Return how many requests were answered, what became of those that were dropped, and how many had
    an unknown effect.
    """
    # No client pauses here for as long as STOP_IDLE_S, however busy the machine is, so each hears
    # that it is the end.
    program = limited(STOP_IDLE_S=10, WATCH_INTERVAL_S=1, **limits)
    with served("--log-level", "warning", "--dsn", dsn, program=program) as server:
        parts = urlsplit(server.url)
        token = send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"]
        acknowledged, dropped, enough = [], [], threading.Event()

        def work(_):
            connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
            while True:
                taken = False
                try:
                    connection.connect()
                except OSError:
                    return
                try:
                    while True:
                        answer = send(
                            server.url,
                            "POST",
                            "/api/transactions/topup",
                            {"amount": 1},
                            token,
                            connection,
                        )
                        acknowledged.append(answer[0])
                        taken = True
                        enough.set() if len(acknowledged) >= 100 else None
                        if answer[1]["Connection"] == "close":
                            break
                except (OSError, http.client.HTTPException) as error:
                    # Else it is a connection that came as the listener closed, and no server had.
                    if taken:
                        dropped.append(error)
                finally:
                    connection.close()

        with ThreadPoolExecutor(8) as threads:
            futures = [threads.submit(work, number) for number in range(8)]
            assert enough.wait(timeout=60)
            server.send_signal(signal.SIGTERM)
            for future in futures:
                future.result()
        assert (
            server.wait(timeout=8) == 0
        )  # Who has no clients left waits no longer for any, as it would for them.
    assert set(acknowledged) == {201}
    with Wallet(dsn) as wallet:
        return len(acknowledged), dropped, wallet.authenticate(token).balance - len(acknowledged)


@pytest.mark.slow_on("postgres")
@pytest.mark.parametrize("stops", [1, torture(100)])
def test_stop_under_load_drops_no_request_that_was_taken(durable_dsn, stops, report):
    answered, dropped = 0, []
    for _ in range(stops):
        count, errors, unknown = stop_under_load(durable_dsn)
        answered, dropped = answered + count, dropped + errors
        assert unknown == 0
    report(
        f"{stops} times SIGTERM under load, {answered:,} requests answered, {len(dropped)} dropped"
    )
    assert dropped == []


def test_control_a_stop_that_waits_for_nobody_drops_requests(file_dsn):
    assert any(stop_under_load(file_dsn, STOP_TIMEOUT_S=0)[1] for _ in range(20))


def test_stop_answers_the_connections_that_only_the_kernel_has_taken(tmp_path):
    with served("--log-level", "warning", cwd=tmp_path) as server:
        (process,) = workers_of(server)
        os.kill(process, signal.SIGSTOP)
        waiting = [connect(server.url) for _ in range(5)]
        for connection in waiting:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        server.send_signal(signal.SIGTERM)
        os.kill(process, signal.SIGCONT)
        for connection in waiting:
            with connection:
                assert connection.recv(12) == b"HTTP/1.1 200"
        assert server.wait(timeout=30) == 0


def test_stop_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(wallet_server, "STOP_TIMEOUT_S", 0.1)
    with contextlib.ExitStack() as stack:
        with running() as url:
            half = stack.enter_context(connect(url))
            half.sendall(b"POST /api/register HTTP/1.1\r\nHost: x\r\n")
            assert send(url, "GET", "/livez")[0] == 200
        assert half.recv(1) == b""


@pytest.mark.slow
def test_wallet_that_drains_serves_everything_and_says_to_balancers_that_it_is_not_ready(tmp_path):
    with (
        served("--drain-s", "3", "--log-level", "warning", cwd=tmp_path) as server,
        contextlib.closing(http.client.HTTPConnection(server.url[7:], timeout=30)) as kept,
    ):
        token = send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"]
        status, headers, _ = send(server.url, "GET", "/readyz", connection=kept)
        assert (status, headers["Connection"]) == (200, None)
        sock, told_at = kept.sock, time.monotonic()
        server.send_signal(signal.SIGTERM)
        while (ready := send(server.url, "GET", "/readyz"))[0] == 200:
            pass
        assert ready[0] == 503
        assert ready[1]["Retry-After"] == "1"
        assert (ready[2]["code"], ready[2]["detail"]) == (
            "unavailable",
            "The wallet is about to stop: ask another one.",
        )
        # The connection that was kept is served once more, and told to move on.
        status, headers, _ = send(
            server.url, "POST", "/api/transactions/topup", {"amount": 5}, token, kept
        )
        assert (status, headers["Connection"]) == (201, "close")
        assert kept.sock is not sock
        for path in ("/livez", "/api/account"):  # So are new ones, until it stops.
            status, headers, _ = send(server.url, "GET", path, token=token)
            assert (status, headers["Connection"]) == (200, "close")
        while not is_refused(server.url):
            pass
        assert 3 <= time.monotonic() - told_at < 30
        assert server.wait(timeout=30) == 0
        assert server.stderr.read() == ""  # That it was not ready is no error.
    with Wallet(f"sqlite:///{tmp_path}/wallet.db") as wallet:
        assert wallet.authenticate(token).balance == 5


def test_second_signal_ends_a_wallet_that_drains_at_once(tmp_path):
    with served("--drain-s", "300", cwd=tmp_path) as server:
        server.send_signal(signal.SIGTERM)
        while send(server.url, "GET", "/readyz")[0] == 200:
            pass
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=5) == -signal.SIGTERM


def test_server_that_stopped_leaves_the_wallet_to_the_next_one(file_wallet):
    for _ in range(2):
        with running(file_wallet) as url:
            assert send(url, "GET", "/readyz")[0] == 200


def connect_while_it_starts(*arguments, program=MODULE):
    """Ask a server all the while it starts. Return what became of each connection."""
    port, outcomes, is_served = free_port(), [], threading.Event()

    def ask():
        while not is_served.is_set() or outcomes[-1] == "refused":
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                    connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
                    outcomes.append(connection.recv(12).decode())
            except ConnectionRefusedError:
                outcomes.append("refused")
            except OSError as error:
                outcomes.append(repr(error))

    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(ask)
        with served("--port", str(port), *arguments, program=program):
            is_served.set()
            future.result(timeout=60)
    return set(outcomes)


def test_connection_that_comes_while_it_starts_is_refused_or_answered(durable_dsn):
    for _ in range(3):
        outcomes = connect_while_it_starts("--dsn", durable_dsn)
        assert outcomes == {"refused", "HTTP/1.1 200"}


def test_control_port_that_is_opened_only_to_see_resets_whoever_came(file_dsn):
    opened = """
import select, socket, sys, wallet_cli
with socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("--port", 3) + 1]))) as seen:
    select.select([seen], [], [], 30)
sys.exit(wallet_cli.main())
"""
    outcomes = connect_while_it_starts("--dsn", file_dsn, program=("-c", opened))
    assert outcomes - {"refused", "HTTP/1.1 200"}


def is_refused(url):
    try:
        socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=30).close()
    except ConnectionRefusedError:
        return True
    except OSError:  # It had waited to be accepted when the listener was closed.
        pass
    return False


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_it_at_once(tmp_path, second):
    with served(cwd=tmp_path) as server:
        parts = urlsplit(server.url)
        with socket.create_connection((parts.hostname, parts.port), timeout=30) as half:
            half.sendall(b"POST /api/register HTTP/1.1\r\nHost: x\r\n")
            assert send(server.url, "GET", "/livez")[0] == 200
            server.send_signal(signal.SIGTERM)
            while not is_refused(server.url):
                pass
            server.send_signal(second)
            assert server.wait(timeout=5) == -second


def test_it_listens_on_every_address_and_on_ipv6_if_asked(tmp_path):
    for host, listens, url in (
        ("0.0.0.0", "0.0.0.0", "127.0.0.1"),
        ("::1", "[::1]", "[::1]"),
        ("::", "[::]", "[::1]"),
        ("localhost", "127.0.0.1", "127.0.0.1"),
    ):
        with served("--host", host, "--dsn", "sqlite://", cwd=tmp_path) as server:
            assert f"listens on http://{listens}:" in server.banner
            assert server.url.startswith(f"http://{url}:")
            assert "memory, gone when it stops" in server.banner
            with urllib.request.urlopen(f"{server.url}/readyz", timeout=30) as answer:
                assert json.load(answer) == {"status": "ok"}
    assert list(tmp_path.iterdir()) == []
