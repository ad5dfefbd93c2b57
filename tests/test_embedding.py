"""A wallet inside another program."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import subprocess
import sys
import threading
import time

import pytest
from bottle import Bottle

import wallet as wallet_module
from tests.support import (
    POST,
    README,
    UNMEASURED,
    Client,
    environment,
    free_port,
    raw_exchange,
    send,
    together,
)
from wallet import Wallet, create_app, running

# Embedding ########################################################################################


def test_example_of_the_docstring_runs_as_it_stands(tmp_path):
    example = re.search(r"(?m)^    from wallet import.*?\.\.\.$", wallet_module.__doc__, re.DOTALL)[
        0
    ]
    program = (
        re.sub("(?m)^    ", "", example) + "\nwallet.close(); print(type(app).__name__, url, token)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        env=environment(),
    )
    assert re.fullmatch(r"App http://127\.0\.0\.1:\d+ wlt_[0-9A-Za-z]{54}\n", done.stdout), (
        done.stderr
    )
    assert example in README.replace("```python\n", "```python\n    ").replace(
        "\n", "\n    "
    ).replace("    \n", "\n")


def test_importing_has_no_side_effects(tmp_path):
    program = """
import logging, os, signal, sys, threading
def world():
    return (os.listdir(), threading.active_count(), logging.root.handlers, logging.root.level, sys.getswitchinterval(),
            os.umask(os.umask(0)), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), dict(os.environ),
            logging.getLogger("wallet").handlers, logging.getLogger("waitress").level, len(os.listdir("/dev/fd")))
before = world()
import wallet
assert world() == before, (before, world())
"""
    subprocess.run(
        [sys.executable, "-B", "-c", program],
        check=True,
        cwd=tmp_path,
        timeout=60,
        env=environment(**UNMEASURED),
    )


def test_running_serves_two_wallets_at_once_and_leaves_nothing_behind():
    threads = set(threading.enumerate())
    with Wallet() as mine, running(mine) as url, running() as other:
        assert url != other
        _, token = mine.register("Ada")
        assert send(url, "GET", "/api/account", token=token)[0] == 200
        assert send(other, "GET", "/api/account", token=token)[0] == 401
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - threads:
        assert time.monotonic() < deadline
    for address in (url, other):
        with pytest.raises(OSError, match="refused"):
            send(address, "GET", "/livez")


def test_running_cleans_up_when_its_block_fails_and_keeps_the_callers_wallet():
    with Wallet() as mine:
        with pytest.raises(RuntimeError, match="a failing test"), running(mine) as url:
            raise RuntimeError("a failing test")
        with pytest.raises(OSError, match="refused"):
            send(url, "GET", "/livez")
        assert mine.register("Ada")[0].balance == 0


def test_app_mounts_at_a_prefix_of_another(wallet):
    outer = Bottle()
    outer.mount("/wallet/", create_app(wallet))
    outer.get("/shop", callback=lambda: "shop")
    ada, token = wallet.register("Ada")
    for _ in range(3):
        wallet.topup(ada.id, 5)
    api = Client(outer, token)
    first = api.send("GET", "/wallet/api/transactions?limit=2", status=200)
    assert first.headers["Link"].startswith("<?limit=2&cursor=txn_")
    assert api.send("GET", "/wallet/nowhere", status=404).json["code"] == "not_found"
    assert (
        api.send("POST", "/wallet/api/transactions/charge", {"amount": 99}, status=402).json[
            "balance"
        ]
        == 15
    )
    assert api.app.get("/shop").text == "shop"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gunicorn does not run on Windows")
def test_app_runs_under_gunicorn(tmp_path, durable_dsn):
    port = free_port()
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "gunicorn",
            "--bind",
            f"127.0.0.1:{port}",
            "--workers",
            "2",
            "--threads",
            "4",
            "wallet:create_app()",
        ],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(WALLET_DSN=durable_dsn), "PYTHONWARNINGS": ""},
    )
    try:
        for line in server.stderr:
            if "Booting worker" in line:
                break
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError):
                if send(url, "GET", "/readyz")[0] == 200:
                    break
            assert time.monotonic() < deadline
        token = send(url, "POST", "/api/register", {"name": "Ada"})[2]["token"]
        answers = together(
            *[lambda: send(url, "POST", "/api/transactions/topup", {"amount": 1}, token)] * 16
        )
        assert {status for status, _, _ in answers} == {201}
        assert send(url, "GET", "/api/account", token=token)[2]["balance"] == 16
        assert send(url, "POST", "/api/transactions/charge", {"amount": 17}, token)[0] == 402
        chunked = b'Transfer-Encoding: chunked\r\nConnection: close\r\n\r\ne\r\n{"name":"Ada"}\r\n0\r\n\r\n'
        assert raw_exchange(url, POST + chunked).startswith(b"HTTP/1.1 201")
    finally:
        server.terminate()
        server.communicate(timeout=30)


def test_values_are_frozen(wallet, ada):
    with pytest.raises(dataclasses.FrozenInstanceError):
        ada.balance = 1_000_000
    with pytest.raises(dataclasses.FrozenInstanceError):
        wallet.topup(ada.id, 5).amount = 6
