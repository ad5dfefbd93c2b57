"""The world around the books changes: clocks, disks, mounts, standbys, and second processes."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from urllib.parse import urlsplit

import psycopg
import pytest

import wallet as wallet_module
import wallet_books
import wallet_cli
from tests.support import (
    HERE,
    MODULE,
    PAGES,
    UNMEASURED,
    check_books,
    command,
    connect,
    contents,
    environment,
    files_cannot_grow,
    fill_books,
    free_port,
    log_lines,
    raw_exchange,
    send,
    served,
    strace,
    together,
    under_granian,
    unnamed,
    wait_for_answer,
)
from wallet import (
    AccountNotFound,
    ConfigurationError,
    Unavailable,
    Wallet,
    WrongBooks,
    create_app,
)

pytestmark = pytest.mark.slow_on("postgres")  # CI runs these on both engines.

# A clock that was ahead ###########################################################################


@contextlib.contextmanager
def clock_ahead(monkeypatch, years):
    """Let the wallets of this process live some years ahead for a while."""
    with monkeypatch.context() as patched:
        now_us = wallet_module._now_us
        ahead_us = years * 365 * 24 * 3600 * 10**6
        patched.setattr(wallet_module, "_now_us", lambda: now_us() + ahead_us)
        yield


def test_books_that_are_ahead_of_the_clock_are_told_at_the_start_and_by_verify(
    durable_dsn, monkeypatch
):
    with Wallet(durable_dsn) as wallet:
        ids = [wallet.register(name)[0].id for name in ("Ada", "Bob", "Cas")]
        location = wallet.database.location
        assert "clock" not in command("verify", "--dsn", durable_dsn).stderr
        with clock_ahead(monkeypatch, 21):
            for account_id in ids[:2]:
                ahead = wallet.topup(account_id, 5).created_at
    latest = wallet_module._format_time(ahead)
    told = (
        rf"WARNING wallet: it is \S+Z by this machine's clock, and {location} has accounts with later"
        rf' times: 2 of them, up to {latest}. See "A clock that was ahead" in docs/operating.md'
    )
    verified = command("verify", "--dsn", durable_dsn)
    assert verified.returncode == 0
    assert re.fullmatch(told, log_lines(verified.stderr)[0])
    assert command("accounts", "--dsn", durable_dsn).stderr == ""
    with served("--dsn", durable_dsn) as server:
        assert send(server.url, "GET", "/readyz")[0] == 200
        server.terminate()
        assert re.fullmatch(told, log_lines(server.communicate(timeout=30)[1])[0])
    # As Gunicorn starts it.
    program = "import logging, wallet; logging.basicConfig(); wallet.create_app().wallet.close()"
    started = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**environment(), "WALLET_DSN": durable_dsn},
        timeout=60,
    )
    assert started.stderr.count("by this machine's clock") == 1, started.stderr


@pytest.mark.parametrize("time_us", [2**63 - 1, 2**62, 253402300800000000, -1])
def test_time_that_no_clock_can_say_is_for_verify_and_keeps_nobody_from_starting(
    durable_dsn, caplog, time_us
):
    with Wallet(durable_dsn) as wallet:
        ada, _ = wallet.register("Ada")
        wallet.database.write(lambda tx: tx("UPDATE accounts SET updated_at = ?", time_us))
    with wallet_cli.open_served(wallet_cli.load_settings({"dsn": durable_dsn})) as wallet:
        assert wallet.account(ada.id) == ada
        assert caplog.text == ""
        with pytest.raises(WrongBooks, match=rf"accounts \({ada.id}\): its clock is out of its"):
            wallet_books.verify(wallet)


@pytest.mark.parametrize(("ahead_s", "warned"), [(50, False), (70, True)])
def test_clocks_may_differ_by_a_minute(file_dsn, caplog, ahead_s, warned):
    with Wallet(file_dsn) as wallet:
        wallet.register("Ada")
        sql = "UPDATE accounts SET updated_at = updated_at + ?"
        wallet.database.write(lambda tx: tx(sql, ahead_s * 1_000_000))
    with wallet_cli.open_served(wallet_cli.load_settings({"dsn": file_dsn})):
        assert ("by this machine's clock" in caplog.text) == warned


def test_start_does_not_wait_for_ever_to_look_at_the_clock(postgres_dsn, monkeypatch):
    Wallet(postgres_dsn).close()
    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0.5)
    with psycopg.connect(postgres_dsn) as other:
        other.execute("LOCK TABLE accounts IN ACCESS EXCLUSIVE MODE")  # As VACUUM FULL has it.
        wallet = wallet_cli.open_served(wallet_cli.load_settings({"dsn": postgres_dsn}))
        assert other.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS
    wallet.close()


def test_holds_expire_by_the_clock_of_the_wallet_even_where_the_account_is_ahead(
    durable_dsn, monkeypatch
):
    day = timedelta(days=1)
    with Wallet(durable_dsn) as wallet:
        ada, _ = wallet.register("Ada")
        with clock_ahead(monkeypatch, 21):
            wallet.topup(ada.id, 100)
            early = wallet.hold(ada.id, 10, expires_in_s=24 * 3600)
        assert early.expires_at == early.created_at + day  # In 21 years.
        late = wallet.hold(ada.id, 20, expires_in_s=24 * 3600)
        assert late.created_at >= early.created_at  # In their order.
        assert early.expires_at - late.expires_at > 20 * 365 * day  # In a day.
        assert wallet.account(ada.id).available == 70
        now_us = wallet_module._now_us
        with monkeypatch.context() as patched:
            patched.setattr(wallet_module, "_now_us", lambda: now_us() + 25 * 3600 * 10**6)
            assert wallet.account(ada.id).available == 90
            assert wallet.get_hold(ada.id, late.id).status == "expired"
            assert wallet.get_hold(ada.id, early.id).status == "active"
            assert wallet.charge(ada.id, 85).balance == 15
        assert wallet.release(ada.id, early.id).status == "released"
        assert wallet.account(ada.id).available == 15
        check_books(wallet)


# A disk that is not mounted #######################################################################


def test_wallet_that_must_exist_makes_none_where_its_disk_is_missing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    settings = {"WALLET_DSN": f"sqlite:///{disk}/wallet.db"}
    with served(**settings) as server:
        token = send(server.url, "POST", "/api/register", {"name": "Ada"})[2]["token"]
    disk.rename(tmp_path / "unmounted")
    disk.mkdir()
    refused = command("--port", "0", WALLET_MUST_EXIST="1", **settings)
    assert (refused.returncode, refused.stdout) == (75, "")
    assert refused.stderr == (
        f"wallet: cannot open {disk}/wallet.db: there is no such file: is its disk mounted? Name"
        " another DSN, or let the command init make a new one\n"
    )
    assert list(disk.iterdir()) == []
    with served(**settings) as server:  # The control: it is ready, and knows nobody.
        assert send(server.url, "GET", "/readyz")[0] == 200
        assert send(server.url, "GET", "/api/account", token=token)[0] == 401
    shutil.rmtree(disk)
    (tmp_path / "unmounted").rename(disk)
    with served("--must-exist", "1", **settings) as server:
        assert send(server.url, "GET", "/api/account", token=token)[0] == 200


def test_command_init_makes_the_database_once_whatever_must_exist(durable_dsn, monkeypatch):
    settings = {"WALLET_DSN": durable_dsn, "WALLET_MUST_EXIST": "1"}
    refused = command("--port", "0", **settings)
    assert (refused.returncode, refused.stdout) == (75, "")
    assert "there is no " in refused.stderr
    assert "the command init" in refused.stderr
    monkeypatch.setenv("WALLET_DSN", durable_dsn)
    monkeypatch.setenv("WALLET_MUST_EXIST", "1")
    with pytest.raises(ConfigurationError, match="there is no "):
        create_app()
    made = command("init", "--currency", "KWD", **settings)
    assert (made.returncode, made.stderr) == (0, "")
    assert re.fullmatch(r"\S+ is now a wallet in KWD with 3 decimals\n", made.stdout)
    before = contents(durable_dsn)
    again = command("init", **settings)
    told = made.stdout.replace("is now", "was already")
    assert (again.returncode, again.stdout) == (0, told)
    other = command("init", "--currency", "EUR", **settings)
    assert (other.returncode, other.stdout) == (2, "")
    assert "currency is KWD/3, and cannot be changed to EUR/2" in other.stderr
    assert contents(durable_dsn) == before
    with served(**settings) as server:
        assert send(server.url, "POST", "/api/register", {"name": "Ada"})[0] == 201
    with create_app().wallet as wallet:
        assert wallet.currency == "KWD"


def test_file_that_is_empty_is_no_wallet_and_stays_as_it_is(tmp_path, capsys):
    file = tmp_path / "wallet.db"
    file.touch()
    arguments = "--dsn", f"sqlite:///{file}", "--port", "0", "--must-exist", "1"
    assert wallet_cli.main(arguments) == 75
    assert capsys.readouterr().err.startswith(f"wallet: there is no wallet in {file}: is its disk")
    assert [(path.name, path.stat().st_size) for path in tmp_path.iterdir()] == [("wallet.db", 0)]


def test_wallet_in_memory_never_exists_before_it_starts(capsys):
    assert wallet_cli.main(["--dsn", "sqlite://", "--port", "0", "--must-exist", "1"]) == 75
    assert capsys.readouterr().err.startswith("wallet: there is no wallet in memory")


def test_settings_of_the_environment_need_the_command_line_and_say_so(tmp_path):
    for name in ("wallet.py", "schema.sql"):
        shutil.copy(HERE / name, tmp_path)
    program = (
        "import wallet\nwith wallet.Wallet() as one: wallet.create_app(one); wallet.create_app()"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(PYTHONPATH="", **UNMEASURED),
        timeout=60,
    )
    assert done.stderr.splitlines()[-1] == (
        "wallet.ConfigurationError: wallet_cli is not installed: put wallet_cli.py beside wallet.py"
    )


# Mounts that only read ############################################################################


def on_read_only_mount(folder, view, *arguments, program=(sys.executable, *MODULE)):
    """Run the command line where `view` shows the folder, but nothing can be written."""
    if not shutil.which("unshare"):
        pytest.skip("needs unshare, of Linux")
    script = f'mount --bind {folder} {view} && mount -o remount,bind,ro {view} && exec "$@"'
    unshare = ["unshare", *(["--map-root-user"] if os.geteuid() else []), "--mount"]

    def run(*program):
        return subprocess.run(
            [*unshare, "sh", "-c", script, "sh", *program],
            capture_output=True,
            text=True,
            env=environment(),
            timeout=60,
        )

    tried = run("true")
    if tried.returncode:
        pytest.skip(f"unshare may not mount here: {tried.stderr.strip()}")
    return run(*program, *arguments)


@pytest.fixture
def mounted(tmp_path):
    """A folder with a wallet that no process has open, and a folder that will show it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "view").mkdir()
    dsn = f"sqlite:///{tmp_path}/data/wallet.db"
    with Wallet(dsn) as wallet:
        ada, _ = wallet.register("Ada")
        wallet.topup(ada.id, 5)
    return tmp_path / "data", tmp_path / "view", dsn


def test_log_that_lies_elsewhere_is_never_left_out(mounted, tmp_path):
    """Without its log, SQLite would say that all is well in books of yesterday."""
    folder, view, dsn = mounted
    (folder / "current.db").symlink_to("wallet.db")
    with Wallet(dsn) as wallet:
        wallet.register("Bob")  # It is in the log, which is named after the file itself.
        shown = f"sqlite:///{view}/current.db"
        done = on_read_only_mount(folder, view, "verify", "--dsn", shown)
        assert (done.returncode, "has 2 accounts" in done.stdout) == (0, True), done.stderr
        # The file mounted alone, as into a container, where its log is not.
        alone = tmp_path / "alone"
        alone.mkdir()
        mount_it = (
            f"mount -t tmpfs none {alone} && touch {alone}/wallet.db && mount --bind"
            f" {folder}/wallet.db {alone}/wallet.db && mount -o remount,ro {alone} && exec"
            f" {sys.executable} -m wallet verify --dsn sqlite:///{alone}/wallet.db"
        )
        done = on_read_only_mount(folder, view, program=("sh", "-c", mount_it))
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
    # What a backup is, with the journal of a program that was killed while it wrote to it.
    with contextlib.closing(sqlite3.connect(folder / "wallet.db")) as plain:
        plain.execute("PRAGMA journal_mode = DELETE")
    (folder / "wallet.db-journal").write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + b"\0" * 600)
    done = on_read_only_mount(folder, view, "verify", "--dsn", f"sqlite:///{view}/wallet.db")
    assert (done.returncode, done.stdout) == (2, ""), done.stdout


def kill_while_open(folder, dsn):
    """Leave a log beside the file, as a killed wallet does."""
    program = f"import os, wallet; w = wallet.Wallet({dsn!r}); w.register('Bob'); os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", program], env=environment(), timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert {path.name for path in folder.iterdir()} == {
        "wallet.db",
        "wallet.db-wal",
        "wallet.db-shm",
    }


@pytest.mark.slow
@pytest.mark.parametrize("state", ["stopped", "served", "killed"])
def test_commands_that_read_work_on_a_mount_that_only_reads(mounted, tmp_path, state):
    folder, view, dsn = mounted
    shown = f"sqlite:///{view}/wallet.db"
    with contextlib.ExitStack() as opened:
        if state == "served":
            opened.enter_context(Wallet(dsn)).register("Bob")
        if state == "killed":
            kill_while_open(folder, dsn)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        count = 1 if state == "stopped" else 2
        done = on_read_only_mount(folder, view, "verify", "--dsn", shown)
        assert (done.returncode, done.stdout) == (
            0,
            f"verified: {view}/wallet.db has {count} {'account' if count == 1 else 'accounts'} and 1 entry that agree\n",
        ), done.stderr
        done = on_read_only_mount(folder, view, "accounts", "--json", "--dsn", shown)
        assert sum(json.loads(line)["balance"] for line in done.stdout.splitlines()) == 5
        backup = tmp_path / "backup.db"
        done = on_read_only_mount(folder, view, "backup", str(backup), "--dsn", shown)
        assert done.returncode == 0, done.stderr
        assert wallet_cli.main(["verify", "--dsn", f"sqlite:///{backup}"]) == 0
        served_there = on_read_only_mount(folder, view, "--port", "0", "--dsn", shown)
        assert (served_there.returncode, served_there.stdout) == (75, "")
        assert re.fullmatch(
            rf"wallet: cannot open {view}/wallet\.db: this user may not read it, or may not write to"
            r" it, or its disk is read-only\n",
            served_there.stderr,
        )
        after = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert {name: after[name] for name in before if not name.endswith("shm")} == {
            name: before[name] for name in before if not name.endswith("shm")
        }


def test_log_that_cannot_be_read_without_writing_is_said(mounted, tmp_path):
    folder, view, dsn = mounted
    kill_while_open(folder, dsn)
    (folder / "wallet.db-shm").unlink()  # As where only the two that matter were copied.
    done = on_read_only_mount(folder, view, "verify", "--dsn", f"sqlite:///{view}/wallet.db")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"wallet: cannot open {view}/wallet.db: unable to open database file: this user must be"
        " allowed to write to its folder too, or copy it and its -wal to another one\n"
    )
    for end in ("", "-wal"):  # As it says.
        shutil.copy(folder / f"wallet.db{end}", tmp_path)
    assert wallet_cli.main(["verify", "--dsn", f"sqlite:///{tmp_path}/wallet.db"]) == 0


def test_file_that_is_written_to_while_a_mount_shows_it_is_not_read_as_if_it_rested(
    mounted, monkeypatch
):
    """Without its log SQLite takes no lock, so that it would mix what was with what is."""
    _, _, dsn = mounted
    read_only = os.ST_RDONLY
    monkeypatch.setattr(os, "ST_RDONLY", os.statvfs(dsn[10:]).f_flag)  # As if this were such a mount.
    with Wallet(dsn, read_only=True) as shown:
        assert shown.database._immutable
        (account,) = shown.accounts()
        with Wallet(dsn) as wallet:
            wallet.topup(account.id, 5)
            with pytest.raises(Unavailable, match="was written to: open"):
                shown.account(account.id)
        with pytest.raises(Unavailable, match="was written to: open"):
            wallet_books.verify(shown)
        with pytest.raises(Unavailable, match="was written to: open it again"):
            wallet_books.back_up(shown, f"{dsn.removeprefix('sqlite:///')}.backup")
    with Wallet(dsn, read_only=True) as shown:

        def tear(tx):  # What is read of two states at once may look like anything.
            os.utime(dsn.removeprefix("sqlite:///"), ns=(1, 1))
            raise sqlite3.DatabaseError("database disk image is malformed")

        with pytest.raises(Unavailable, match="was written to: open"):
            shown.database.read(tear)
    with Wallet(dsn, read_only=True) as shown:
        os.rename(dsn.removeprefix("sqlite:///"), dsn.removeprefix("sqlite:///") + ".old")
        with pytest.raises(Unavailable, match="was written to: open"):
            list(shown.accounts())
        os.rename(dsn.removeprefix("sqlite:///") + ".old", dsn.removeprefix("sqlite:///"))
    monkeypatch.setattr(os, "ST_RDONLY", read_only)
    with Wallet(dsn, read_only=True) as shown:
        assert not shown.database._immutable
        assert shown.account(account.id).balance == 10


@pytest.mark.parametrize("readable", [True, False])
def test_folder_that_may_not_be_written_to_is_said_and_a_file_that_may_not_be_read(mounted, readable):
    folder, _, dsn = mounted
    (folder / "wallet.db").chmod(0o600 if readable else 0)
    folder.chmod(0o500)
    try:
        done = command("verify", "--dsn", dsn, without="-dac_override,-dac_read_search")
    finally:
        folder.chmod(0o700)
    assert (done.returncode, done.stdout) == (2, "")
    reason = "write to its folder too, or copy it" if readable else "this user may not read it"
    assert reason in done.stderr
    assert done.stderr.startswith(f"wallet: cannot open {folder}/wallet.db: ")


def test_wallet_that_only_reads_writes_nothing(durable_dsn):
    with Wallet(durable_dsn) as wallet:
        ada, _ = wallet.register("Ada")
    before = contents(durable_dsn)
    with Wallet(durable_dsn, read_only=True) as wallet:
        assert wallet.account(ada.id) == ada
        for write in (lambda: wallet.register("Bob"), lambda: wallet.topup(ada.id, 5)):
            with pytest.raises(Unavailable, match=r"readonly database|read-only transaction"):
                write()
    assert contents(durable_dsn) == before


# File systems without hard links ##################################################################


def test_backup_needs_no_hard_links_and_still_takes_no_other_files_place(mounted, tmp_path):
    """exFAT answers EPERM. So does strace here, in its place."""
    _, _, dsn = mounted
    exfat = strace("-o", "/dev/null", "-e", "trace=link,linkat", "-e", "inject=link,linkat:error=EPERM")

    def back_up(name, program=MODULE):
        return subprocess.run(
            [*exfat, sys.executable, *program, "backup", str(tmp_path / name), "--dsn", dsn],
            capture_output=True,
            text=True,
            env=environment(),
            timeout=60,
        )

    done = back_up("backup.db")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "backup.db").stat().st_mode & 0o777 == 0o600
    assert wallet_cli.main(["verify", "--dsn", f"sqlite:///{tmp_path}/backup.db"]) == 0
    # Another takes the name while the backup is made.
    race = f"""import pathlib, sys, wallet_books, wallet_cli
verify = wallet_books.verify
def lose(*arguments):
    pathlib.Path({str(tmp_path / "raced.db")!r}).write_text("mine")
    return verify(*arguments)
wallet_books.verify = lose
sys.exit(wallet_cli.main())"""
    lost = back_up("raced.db", ("-c", race))
    assert (lost.returncode, lost.stderr) == (
        2,
        f"wallet: cannot back up to {tmp_path}/raced.db: File exists\n",
    )
    assert (tmp_path / "raced.db").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"data", "view", "backup.db", "raced.db"}


def test_backup_that_cannot_get_its_name_leaves_nothing(mounted, tmp_path, monkeypatch, capsys):
    _, _, dsn = mounted

    def refuse(number, *arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", lambda *arguments: refuse(45))  # As macOS has it.
    monkeypatch.setattr(os, "replace", lambda *arguments: refuse(5))
    assert wallet_cli.main(["backup", str(tmp_path / "backup.db"), "--dsn", dsn]) == 2
    assert capsys.readouterr().err == (
        f"wallet: cannot back up to {tmp_path}/backup.db: Input/output error\n"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"data", "view"}


# A copy of a wallet that serves ###################################################################


@pytest.mark.slow
@pytest.mark.parametrize("role", ["source", "target"])
def test_copy_refuses_a_wallet_that_is_served(durable_dsn, tmp_path, role):
    other = f"sqlite:///{tmp_path}/other.db"
    Wallet(other).close()
    source, target = (durable_dsn, other) if role == "source" else (other, durable_dsn)
    with Wallet(durable_dsn) as wallet:
        location = wallet.database.location
    with served("--dsn", durable_dsn) as server:
        if role == "source":
            send(server.url, "POST", "/api/register", {"name": "Ada"})
        before = contents(durable_dsn), contents(other)
        done = command("copy", "--from", source, "--to", target)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(
            rf"wallet: cannot open {re.escape(location)}: another process has it open: stop that"
            r" first, or wait until it is done\n",
            done.stderr,
        )
        assert (contents(durable_dsn), contents(other)) == before
        assert send(server.url, "POST", "/api/register", {"name": "Bob"})[0] == 201
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 0
    if role == "source":
        done = command("copy", "--from", source, "--to", target)  # At once.
        assert done.returncode == 0, done.stderr
        assert contents(other) == contents(durable_dsn)


def test_no_wallet_can_be_opened_while_it_is_copied(file_dsn, monkeypatch):
    with Wallet(file_dsn) as wallet:
        wallet.register("Ada")
    monkeypatch.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0.2)
    with Wallet(file_dsn, alone=True) as source:
        assert len(list(source.accounts())) == 1
        with pytest.raises(ConfigurationError, match="another process has it open"):
            Wallet(file_dsn)
    Wallet(file_dsn).close()


def test_two_copies_at_once_are_not_in_each_others_way(postgres_dsn, new_schema, tmp_path):
    with Wallet(postgres_dsn) as wallet:
        wallet.register("Ada")
    targets = [new_schema(), f"sqlite:///{tmp_path}/copy.db"]
    copies = together(
        *(partial(command, "copy", "--from", postgres_dsn, "--to", target) for target in targets)
    )
    assert [done.returncode for done in copies] == [0, 0], copies
    assert contents(targets[0]) == contents(targets[1]) == contents(postgres_dsn)


@pytest.mark.parametrize("own", [False, True])
def test_copy_between_two_schemas_is_not_in_its_own_way(new_schema, own):
    source, target = (unnamed(new_schema("&application_name=shop" * own)) for _ in range(2))
    with Wallet(source) as wallet:
        wallet.register("Ada")
    done = command("copy", "--from", source, "--to", target)
    assert done.returncode == 0, done.stderr
    assert contents(target) == contents(source)


# Postgres's standby ###############################################################################


@pytest.fixture
def standby(postgres_server):
    """A hot standby of the server. Yield its port, and a function that waits for its replay."""
    bin_path, user = postgres_server.server.bin_path, postgres_server.server.system_user
    folder = postgres_server.server.pgdata.parent / "standby"
    port = free_port()
    folder.mkdir(mode=0o700)
    if user:
        shutil.chown(folder, user)
    options = f"-h 127.0.0.1 -p {port} -k {folder} -c hot_standby=on"

    def run(*arguments):
        subprocess.run(
            arguments, check=True, user=user, cwd="/", timeout=60, stdout=subprocess.DEVNULL
        )

    run(bin_path / "pg_basebackup", "--dbname", postgres_server.dsn, "-D", folder, "-R",
        "--checkpoint=fast")  # fmt: skip
    control = bin_path / "pg_ctl", "-w", "-D", folder
    run(*control, "start", "-o", options, "-l", folder / "log")

    def wait():
        """Wait until all that the primary has is here too."""
        ((end,),) = postgres_server.query("SELECT pg_current_wal_lsn()::text")
        deadline = time.monotonic() + 30
        sql = "SELECT count(*) FROM pg_stat_replication WHERE replay_lsn >= %s::pg_lsn"
        while postgres_server.query(sql, end) == [(0,)]:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    try:
        yield port, wait
    finally:
        run(*control, "stop", "-m", "immediate")
        shutil.rmtree(folder)


def test_commands_that_read_work_on_a_hot_standby_and_others_name_the_primary(
    new_schema, postgres_server, standby, monkeypatch
):
    dsn = new_schema(on=postgres_server)
    fill_books(dsn, monkeypatch)
    port, wait = standby
    there = dsn.replace(f":{postgres_server.port}/", f":{port}/")
    wait()
    verified = command("verify", "--dsn", there)
    assert verified.returncode == 0, verified.stderr
    assert "has 4 accounts and 14 entries that agree" in verified.stdout
    listed = command("accounts", "--json", "--dsn", there)
    assert listed.stdout == command("accounts", "--json", "--dsn", dsn).stdout
    assert listed.stdout.count("\n") == 4
    for arguments in (["freeze", "acc_" + "A" * 16], ["--port", "0"], ["init"]):
        refused = command(*arguments, "--dsn", there)
        # Served, it waits until this is the primary.
        assert (refused.returncode, refused.stdout) == (75 if "--port" in arguments else 2, "")
        assert refused.stderr.endswith("is read-only: name the primary server\n")
    with Wallet(dsn) as wallet:
        wallet.database.write(lambda tx: tx("UPDATE accounts SET balance = balance + 1"))
    wait()
    assert command("verify", "--dsn", there).returncode == 1


# A second process that writes #####################################################################

AFFECTED, FIXED = (3, 40, 1), (3, 51, 3)
WARNED = "from outside this wallet, and SQLite [0-9.]+ has a rare bug that can damage a file with two"


@pytest.mark.parametrize(
    ("version", "warned"),
    [
        ((3, 35, 0), True),
        (AFFECTED, True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 46, 1), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 2), True),
        (FIXED, False),
        ((3, 53, 0), False),
    ],
)
def test_second_process_that_writes_is_warned_of_now_and_then_where_sqlite_has_a_bug_then(
    file_dsn, monkeypatch, caplog, version, warned
):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", version)
    with Wallet(file_dsn) as wallet:
        ada, _ = wallet.register("Ada")
        wallet.topup(ada.id, 5)
        assert caplog.text == ""
        assert command("freeze", ada.id, "--dsn", file_dsn).returncode == 0
        assert caplog.text == ""
        for _ in range(3):
            wallet.freeze(ada.id, False)
        assert len(re.findall(WARNED, caplog.text)) == warned
        assert command("freeze", ada.id, "--dsn", file_dsn).returncode == 0
        wallet.freeze(ada.id, False)  # Within the hour.
        assert len(re.findall(WARNED, caplog.text)) == warned
        monkeypatch.setattr(wallet.database, "_warned_until", 0)
        wallet.freeze(ada.id, False)  # It is still the same one.
        assert command("freeze", ada.id, "--dsn", file_dsn).returncode == 0
        wallet.freeze(ada.id, False)
    assert len(re.findall(WARNED, caplog.text)) == 2 * warned


def test_one_process_alone_is_warned_of_nothing_whatever_it_does(file_dsn, monkeypatch, caplog):
    """Nor are those warned that only look, as verify, accounts and backup do."""
    monkeypatch.setattr(sqlite3, "sqlite_version_info", AFFECTED)
    with Wallet(file_dsn) as wallet:
        ada, _ = wallet.register("Ada")
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda _: wallet.topup(ada.id, 5), range(200)))
            list(threads.map(lambda _: wallet.account(ada.id), range(200)))
        with pytest.raises(AccountNotFound):
            wallet.topup("acc_" + "0" * 16, 5)
        for _ in range(2):
            with files_cannot_grow(), pytest.raises(Unavailable):
                wallet.topup(ada.id, 5)
            wallet.topup(ada.id, 5)
            # With more in hand than its cache holds, SQLite forgets it all.
            wallet.database._writer.execute("PRAGMA cache_size = 10")
            many = [{"type": "topup", "amount": 5}] * 1000
            with files_cannot_grow(), pytest.raises(Unavailable):
                wallet.batch(many, account_id=ada.id)
            wallet.batch(many, account_id=ada.id)
        wallet.database.write(lambda tx: tx("UPDATE accounts SET name = 'Bob'"))
        wallet.database._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        wallet.topup(ada.id, 5)
        for arguments in (["verify"], ["accounts"], ["backup", f"{file_dsn[10:]}.backup"]):
            done = command(*arguments, "--dsn", file_dsn)
            assert (done.returncode, done.stderr) == (0, "")
            wallet.topup(ada.id, 5)
        reading = f"w = wallet.Wallet({file_dsn!r}, read_only=True); list(w.accounts())"
        program = f"import os, wallet; {reading}; os.kill(os.getpid(), 9)"
        done = subprocess.run([sys.executable, "-c", program], env=environment(), timeout=60)
        assert done.returncode == -signal.SIGKILL
        wallet.topup(ada.id, 5)
        check_books(wallet)
    assert caplog.text == ""


@pytest.mark.slow
def test_workers_that_share_a_file_are_warned_of(tmp_path):
    port, log = free_port(), tmp_path / "log"
    with log.open("w") as written:
        server = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "--workers", "2", "--bind", f"127.0.0.1:{port}",
             "wallet:create_app()"],
            cwd=tmp_path,
            env=environment(WALLET_DSN="sqlite:///wallet.db"),
            stderr=written,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 30
        while "was written to from outside" not in log.read_text():
            assert time.monotonic() < deadline
            with contextlib.suppress(OSError):
                send(f"http://127.0.0.1:{port}", "POST", "/api/register", {"name": "Ada"})
    finally:
        server.terminate()
        server.wait(timeout=30)


# A statement that breaks off ######################################################################

BREAKS_OFF = """
import sys, wallet, wallet_cli, wallet_statements
make = wallet_statements.to_csv
def break_off(*given, **filters):
    for number, chunk in enumerate(make(*given, **filters), 1):
        if number == 3:
            raise wallet.Unavailable("broken")
        yield chunk
if {broken}:
    wallet_statements.to_csv = break_off
sys.exit(wallet_cli.main())
"""
NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/errors;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass {url}; }} }}
}}
"""


@contextlib.contextmanager
def behind_nginx(url, folder):
    """Put an nginx before a wallet, as it comes: it asks by HTTP/1.0. Yield its URL."""
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, port=port, url=url))
    proxy = subprocess.Popen(["nginx", "-c", config], stderr=subprocess.DEVNULL)
    try:
        wait_for_answer(f"http://127.0.0.1:{port}", proxy)
        yield f"http://127.0.0.1:{port}"
    finally:
        proxy.terminate()
        proxy.wait(timeout=30)


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("way", ["HTTP/1.0", "nginx"])
def test_statement_that_breaks_off_lacks_its_last_line_where_nothing_else_tells(
    file_dsn, tmp_path, way, broken
):
    if way == "nginx" and not shutil.which("nginx"):
        pytest.skip("needs nginx: apt install nginx-light")
    with Wallet(file_dsn) as wallet:
        ada, token = wallet.register("Ada")
        wallet.batch([{"type": "topup", "amount": 5}] * 1000, account_id=ada.id)
    program = "-c", BREAKS_OFF.format(broken=broken)
    with served("--dsn", file_dsn, program=program) as server, contextlib.ExitStack() as opened:
        if way == "nginx":
            netloc = urlsplit(opened.enter_context(behind_nginx(server.url, tmp_path))).netloc
            connection = opened.enter_context(contextlib.closing(http.client.HTTPConnection(netloc)))
            connection.request(
                "GET", "/api/transactions.csv", headers={"Authorization": f"Bearer {token}"}
            )
            answer = connection.getresponse()
            status, text = answer.status, answer.read().decode()
        else:
            ask = f"GET /api/transactions.csv HTTP/1.0\r\nAuthorization: Bearer {token}\r\n\r\n"
            head, _, text = raw_exchange(server.url, ask.encode()).decode().partition("\r\n\r\n")
            status = int(head.split()[1])
    assert status == 200  # Nothing but the last line says that lines are missing.
    lines = text.splitlines()
    told = re.fullmatch("transactions in this statement: ([0-9]+),{9}", lines[-1])
    if broken:
        assert told is None
        assert 100 < len(lines) < 1000
    else:
        assert int(told[1]) == len(lines) - 2 == 1000


# A client that shuts down its sending side ########################################################

DOCUMENTED = re.search("(?s)```nginx\n(.*?)```", PAGES["proxies.md"])[1]
HALF_CLOSED = 20  # Requests. One alone may be answered before its end is seen.


@contextlib.contextmanager
def behind_documented_nginx(url, folder, left_out=()):
    """Put an nginx before a wallet as docs/proxies.md does, but for TLS. Yield its URL."""
    if not shutil.which("nginx"):
        pytest.skip("needs nginx: apt install nginx-light")
    port = free_port()
    lines = [
        line
        for line in DOCUMENTED.splitlines()
        if not re.search("ssl_certificate" + "".join(f"|{one}" for one in left_out), line)
    ]
    text = "\n".join(lines).replace("listen 443 ssl", f"listen 127.0.0.1:{port}")
    assert text.count("127.0.0.1:4000") == text.count(f"127.0.0.1:{port}") == 1
    paths = "".join(
        f"{name}_temp_path {folder}/{name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/errors; events {{}}"
        f" http {{ access_log off; {paths}\n"
        + text.replace("127.0.0.1:4000", urlsplit(url).netloc)
        + "}"
    )
    command = ["nginx", "-c", folder / "nginx.conf"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as proxy:
        try:
            wait_for_answer(f"http://127.0.0.1:{port}", proxy)
            yield f"http://127.0.0.1:{port}"
        finally:
            proxy.terminate()


def half_close(url, request):
    """Send a whole request, shut down the sending side, and return all that comes back."""
    with connect(url) as connection:
        connection.sendall(request.encode())
        connection.shutdown(socket.SHUT_WR)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(65536):
                received += chunk
        return received


def requests_of(token, version="1.1"):
    """Return requests that read, that move money, and that have no length, each with its status."""
    head = f" HTTP/{version}\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
    body = "Content-Type: application/json\r\nContent-Length: 13\r\n\r\n" + '{"amount": 5}'
    requests = [
        (f"GET /api/account{head}\r\n", 200),
        (f"GET /api/account{head}Connection: close\r\n\r\n", 200),
        (f"GET /api/transactions.csv{head}\r\n", 200),
        (f"POST /api/transactions/topup{head}{body}", 201),
        (f"POST /api/transactions/charge{head}{body}", 201),
        (f"GET /nowhere{head}\r\n", 404),
    ]
    chunks = "Transfer-Encoding: chunked\r\n\r\nd\r\n" + '{"amount": 5}' + "\r\n0\r\n\r\n"
    chunked = f"POST /api/transactions/topup{head}Content-Type: application/json\r\n{chunks}"
    return [*requests, *([(chunked, 201)] if version == "1.1" else [])]


@contextlib.contextmanager
def served_by(server, dsn):
    """Serve a wallet with waitress or with Granian. Yield its URL."""
    with contextlib.ExitStack() as stack:
        if server == "Granian":
            yield stack.enter_context(under_granian(dsn))
        else:
            yield stack.enter_context(served("--dsn", dsn)).url


def assert_answered(url, token):
    for version in ("1.0", "1.1"):
        for request, status in requests_of(token, version) * 3:
            answer = half_close(url, request)
            assert answer.startswith(b"HTTP/1."), request
            assert int(answer[9:12]) == status, (request, answer)


def test_client_that_half_closes_after_its_request_is_answered(file_dsn):
    with served_by("waitress", file_dsn) as url:
        token = send(url, "POST", "/api/register", {"name": "Ada"})[2]["token"]
        assert_answered(url, token)


@pytest.mark.parametrize("server", ["waitress", "Granian"])
def test_client_that_half_closes_is_answered_alike_whatever_serves_behind_the_proxy(
    file_dsn, tmp_path, server
):
    with (
        served_by(server, file_dsn) as url,
        behind_documented_nginx(url, tmp_path) as proxied,
    ):
        token = send(url, "POST", "/api/register", {"name": "Ada"})[2]["token"]
        assert_answered(proxied, token)
    with Wallet(file_dsn) as wallet:
        # Three rounds in each version: a topup, a charge, and a topup in chunks, which 1.0 lacks.
        assert wallet.authenticate(token).balance == 3 * 5
        check_books(wallet)


@pytest.mark.parametrize("server", ["waitress", "Granian"])
def test_control_proxy_as_it_comes_answers_nobody_who_half_closes(file_dsn, tmp_path, server):
    with (
        served_by(server, file_dsn) as url,
        behind_documented_nginx(url, tmp_path, ["proxy_ignore_client_abort"]) as proxied,
    ):
        token = send(url, "POST", "/api/register", {"name": "Ada"})[2]["token"]
        answers = [half_close(proxied, requests_of(token)[3][0]) for _ in range(HALF_CLOSED)]
        assert b"" in answers


def test_granian_alone_may_answer_nobody_who_half_closes_and_one_key_has_one_effect(file_dsn):
    with under_granian(file_dsn) as url:
        token = send(url, "POST", "/api/register", {"name": "Ada"})[2]["token"]
        reads = [half_close(url, requests_of(token)[0][0]) for _ in range(HALF_CLOSED)]
        writes = []
        for key in range(HALF_CLOSED):
            request = requests_of(token)[3][0].replace("Host: x", f"Host: x\r\nIdempotency-Key: {key}")
            writes.append(half_close(url, request))
        assert b"" in reads
        assert b"" in writes
        for key in range(HALF_CLOSED):
            status, _, _ = send(
                url, "POST", "/api/transactions/topup", {"amount": 5}, token,
                **{"Idempotency-Key": str(key)},
            )  # fmt: skip
            assert status == 201
    with Wallet(file_dsn) as wallet:
        assert wallet.authenticate(token).balance == 5 * HALF_CLOSED
        check_books(wallet)
