"""The recipes of docs/operating.md, in a real shell, each twice in a row.

Docker, systemd and other users are not here: small programs of their names stand in for them, which
start and stop real wallets and have real folders.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import HERE, PAGES, UNMEASURED, environment, free_port, send
from wallet import Wallet

RECIPES = re.findall(r"(?ms)^ *```sh\n(.*?)^ *```", PAGES["operating.md"])
UNITS = re.findall(r"(?ms)^ *```ini\n(.*?)^ *```", PAGES["operating.md"])

# What each stand-in shares: it keeps a wallet, by its process id, in a file of the same folder.
COMMON = """#!{python}
import os, pathlib, re, shutil, signal, subprocess, sys, time, urllib.request
folder, arguments = pathlib.Path({folder!r}), sys.argv[1:]
process, made = folder / "process", folder / "made"

def fail(message):
    print(message, file=sys.stderr)
    sys.exit(1)

def is_running():
    return process.exists()

def start(settings, cwd):
    with (folder / "log").open("a") as log:
        server = subprocess.Popen(
            [sys.executable, "wallet.py", "--port", "{port}"], cwd=cwd, stdout=log, stderr=log,
            env=os.environ | settings, start_new_session=True)
    process.write_text(str(server.pid))
    deadline = time.monotonic() + 30
    while True:
        try:
            urllib.request.urlopen("http://127.0.0.1:{port}/readyz")
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                process.unlink()
                fail("it does not start: " + (folder / "log").read_text())
        time.sleep(0.01)

def stop():
    number = int(process.read_text())
    os.kill(number, signal.SIGTERM)
    while True:  # Of its parent only the pid 1 is left, or whoever adopts here.
        try:
            state = pathlib.Path(f"/proc/{{number}}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            break
        if state == "Z":
            break
        time.sleep(0.01)
    process.unlink()
"""
SYSTEMCTL = """
assert arguments[-1] == "wallet"
if arguments[0] in ("stop", "restart") and is_running():
    stop()
if arguments[0] in ("start", "restart") or arguments[:2] == ["enable", "--now"]:
    if not is_running():
        start(dict(one.split("=", 1) for one in {settings!r}), {cwd!r})
"""
DOCKER = """
DATA, IMAGE = {data!r}, {image!r}

def inside(command, settings, **options):
    command = [one.replace("/data", DATA) for one in command]
    settings = {{"WALLET_DSN": f"sqlite:///{{DATA}}/wallet.db"}} | settings
    return subprocess.run(command, cwd=IMAGE, env=os.environ | settings, **options).returncode

verb, rest = arguments[0], arguments[1:]
if verb == "run":
    options, settings = {{}}, {{}}
    while rest[0].startswith("-"):
        name = rest.pop(0)
        value = rest.pop(0) if name not in ("-d", "-i", "--rm", "--read-only") else True
        if name == "-e":
            settings |= dict([value.split("=", 1)])
        options[name] = value
    assert (rest.pop(0), options["-v"]) == ("wallet", "wallet:/data")
    if "-d" in options:
        if made.exists():
            fail('Error: Conflict. The container name "/wallet" is already in use')
        made.write_text("\\n".join(f"{{key}}={{value}}" for key, value in settings.items()))
        start({{"WALLET_DSN": f"sqlite:///{{DATA}}/wallet.db"}} | settings, IMAGE)
    else:
        sys.exit(inside(rest, settings, stdin=None if "-i" in options else subprocess.DEVNULL))
elif verb in ("exec", "stop", "start", "rm", "cp"):
    if not made.exists():
        fail("Error response from daemon: No such container: wallet")
    settings = dict(line.split("=", 1) for line in made.read_text().splitlines())
    if verb == "exec":
        if not is_running():
            fail("Error response from daemon: container is not running")
        sys.exit(inside(rest[1:], settings))
    if verb == "stop" and is_running():
        assert rest[:2] == ["-t", "20"]
        stop()
    if verb == "start" and not is_running():
        start({{"WALLET_DSN": f"sqlite:///{{DATA}}/wallet.db"}} | settings, IMAGE)
    if verb == "rm":
        if is_running():
            fail("Error response from daemon: cannot remove a running container")
        made.unlink()
    if verb == "cp":
        shutil.copy(rest[0].removeprefix("wallet:").replace("/data", DATA, 1), rest[1])
elif verb == "compose":
    print("compose", *rest)
else:
    assert arguments == ["build", "-t", "wallet", "."]
"""
RUNUSER = '#!/bin/sh\n[ "$1 $2 $3" = "-u wallet --" ] && shift 3 && exec "$@"\n'


class Machine:
    """A folder that stands for a machine, with programs that stand for Docker and systemd."""

    def __init__(self, folder):
        self.port = free_port()
        self.folder, self.url = folder, f"http://127.0.0.1:{self.port}"
        self.opt, self.var = folder / "opt", folder / "var"
        self.bin, self.volume = folder / "bin", folder / "volume"
        for one in (self.opt / ".venv" / "bin", self.bin, self.volume):
            one.mkdir(parents=True)
        for name in ("wallet.py", "wallet_books.py", "wallet_cli.py", "wallet_commands.py",
                     "wallet_overview.py", "wallet_server.py", "wallet_times.py", "schema.sql",
                     "checks.sql"):
            shutil.copy(HERE / name, self.opt)
        for python in (self.opt / ".venv" / "bin" / "python", self.bin / "python"):
            self.write(python, f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        settings = re.search("(?m)^Environment=(.*)$", UNITS[0])[1]
        filled = {
            "python": sys.executable, "folder": str(folder), "port": self.port,
            "settings": self.localize(settings).split(), "cwd": str(self.opt),
            "data": str(self.volume), "image": str(self.opt), "install": shutil.which("install"),
        }  # fmt: skip
        self.write(self.bin / "systemctl", (COMMON + SYSTEMCTL).format(**filled))
        self.write(self.bin / "docker", (COMMON + DOCKER).format(**filled))
        self.write(self.bin / "runuser", RUNUSER)
        self.write(self.bin / "install", self.install(filled))

    @staticmethod
    def install(filled):
        """Return the program `install`, without a user, which only root may name."""
        return (
            f"#!{sys.executable}\nimport os, sys\nnames = sys.argv[1:]\n"
            'at = names.index("-o")\nassert names[at : at + 4] == ["-o", "wallet", "-g", "wallet"]\n'
            f'del names[at : at + 4]\nos.execv("{filled["install"]}", ["install", *names])\n'
        )

    @staticmethod
    def write(path, text):
        path.write_text(text)
        path.chmod(0o755)

    def localize(self, text):
        return text.replace("/opt/wallet", str(self.opt)).replace("/var/lib/wallet", str(self.var))

    def run(self, recipe):
        """Run a recipe in bash, as it stands but for its folders. Return what it prints."""
        path = f"{self.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", self.localize(recipe)],
            cwd=self.folder,
            env={**environment(PATH=path, PYTHONPATH=""), **UNMEASURED},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def ask(self, method, path, body=None, token=None):
        status, _, document = send(self.url, method, path, body, token)
        assert status in (200, 201), document
        return document

    def topup(self, amount, token):
        return self.ask("POST", "/api/transactions/topup", {"amount": amount}, token)["balance"]

    def balance(self, token):
        return self.ask("GET", "/api/account", token=token)["balance"]


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    yield machine
    process = tmp_path / "process"
    if process.exists():
        os.kill(int(process.read_text()), signal.SIGTERM)


def balances_in(folders):
    """Return the balance of the one account in the wallet of each folder."""
    found = []
    for folder in folders:
        with Wallet(f"sqlite:///{folder}/wallet.db", create=False) as wallet:
            found.append(*(account.balance for account in wallet.accounts()))
    return sorted(found)


def test_every_recipe_is_run_here():
    begins = [recipe.split("\n")[0].strip() for recipe in RECIPES]
    assert begins == [
        "docker build -t wallet . && docker run --rm -v wallet:/data wallet python wallet.py init",
        "docker build -t wallet . && docker stop -t 20 wallet && docker rm wallet",
        "cd /opt/wallet && install -d -o wallet -g wallet -m 0700 /var/lib/wallet &&",
        "cd /opt/wallet && backup=/var/lib/wallet/backups/20261122T140000Z.db &&",
        "docker exec wallet rm -f /data/backup.db &&",
        "docker run --rm -i -v wallet:/data wallet sh -c 'umask 077; cat > /data/new.db' < backup.db &&",
        "pip install granian",
    ]


def test_recipes_for_systemd_start_back_up_and_restore_twice_in_a_row(machine):
    init, restore, start = RECIPES[2], RECIPES[3], "systemctl enable --now wallet"
    assert f"Then `{start}` starts" in PAGES["operating.md"].replace("\n", " ")
    assert "is now a wallet in USD" in machine.run(init)
    machine.run(start)
    token = machine.ask("POST", "/api/register", {"name": "Ada"})["token"]
    assert machine.topup(5, token) == 5
    assert "was already a wallet in USD with 2 decimals" in machine.run(init)
    machine.run(start)
    assert machine.balance(token) == 5
    (machine.var / "backups" / "kept").mkdir(parents=True)
    service = dict(re.findall("(?m)^ *(ExecStart(?:Pre|Post)?)=(.*)$", UNITS[1]))
    for _ in range(2):
        second = int(time.time())
        while int(time.time()) == second:  # It is run each hour; a name has seconds.
            time.sleep(0.01)
        settings = re.search("(?m)^ *Environment=(.*)$", UNITS[1])[1]
        for step in ("ExecStartPre", "ExecStart", "ExecStartPost"):
            machine.run(f"cd /opt/wallet && export {settings} && {service[step]}".replace("%%", "%"))
    backups = sorted(machine.var.glob("backups/*.db"))
    assert len(backups) == 2
    restore = restore.replace("20261122T140000Z.db", backups[0].name)
    for amount in (10, 7):
        assert machine.topup(amount, token) == 5 + amount
        machine.run(restore)
        assert machine.balance(token) == 5
    assert balances_in(machine.var.glob("old-*")) == [12, 15]
    machine.run("systemctl stop wallet")


@pytest.mark.slow
def test_recipes_for_containers_start_back_up_and_restore_twice_in_a_row(machine):
    init, start, back_up, restore = RECIPES[0], RECIPES[1], RECIPES[4], RECIPES[5]
    for told in ("is now a wallet in USD", "was already a wallet in USD"):
        assert told in machine.run(init)
    assert "No such container" in machine.run(start)
    token = machine.ask("POST", "/api/register", {"name": "Ada"})["token"]
    assert machine.topup(5, token) == 5
    machine.run(start)
    assert machine.balance(token) == 5
    for _ in range(2):
        assert "verified" in machine.run(back_up)
    shutil.copy(machine.folder / "backup.db", machine.volume)  # As if an earlier one broke off.
    machine.run(back_up)
    for amount in (10, 7):
        assert machine.topup(amount, token) == 5 + amount
        assert "verified" in machine.run(restore)
        assert machine.balance(token) == 5
    assert balances_in(machine.volume.glob("old-*")) == [12, 15]
    assert "wallet" not in machine.run("docker stop -t 20 wallet")


@pytest.mark.slow
def test_recipe_for_granian_serves_twice_in_a_row(machine):
    machine.var.mkdir()
    machine.write(machine.bin / "pip", "#!/bin/sh\n")
    recipe = machine.localize(RECIPES[6]).replace("--port 4000", f"--port {machine.port}")
    path = f"{machine.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    for _ in range(2):
        server = subprocess.Popen(
            ["bash", "-c", f"{recipe.rstrip()} & trap 'kill $!; wait' TERM; wait"],
            cwd=machine.opt, env=environment(PATH=path, **UNMEASURED), stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError):
                machine.ask("GET", "/readyz")
                break
            assert time.monotonic() < deadline
            time.sleep(0.01)
        server.terminate()
        server.wait(timeout=30)


def test_recipe_for_compose_keeps_its_password(machine):
    told = re.findall("(?m)^#     (.*)$", (HERE / "compose.yaml").read_text())
    page = re.findall(r"(?ms)^```sh\n(.*?)^```", PAGES["scaling.md"])[0]
    assert told[:3] == [*page.splitlines(), "docker compose up"]
    said = ["compose run --rm wallet python wallet.py init"]
    assert machine.run(page).splitlines() == said
    password = (machine.folder / ".env").read_text()
    assert (machine.folder / ".env").stat().st_mode & 0o777 == 0o600
    assert re.fullmatch(r"POSTGRES_PASSWORD=[0-9a-f]{48}\n", password)
    assert machine.run(page).splitlines() == said
    assert (machine.folder / ".env").read_text() == password
