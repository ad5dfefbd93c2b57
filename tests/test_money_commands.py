"""The commands that move and show money, for people and for programs, and those that are new."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
import unicodedata
from contextlib import closing

import pytest
import wcwidth
from hypothesis import given
from hypothesis import strategies as st

import wallet as wallet_module
import wallet_books
import wallet_cli
import wallet_commands
from tests.support import (
    MODULE,
    TABLES,
    check_books,
    command,
    contents,
    environment,
    fill_books,
    schema_of,
    send,
    served,
    standby_missing,
)
from wallet import AMOUNT_MAX, ConfigurationError, ValidationFailed, Wallet

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
pytestmark = pytest.mark.slow_on("postgres")  # CI runs these on both engines.


@pytest.fixture(params=["file", "postgres"])
def dsn(request):
    """A database with a wallet. That on Postgres is used by one test after another."""
    if request.param == "file":
        dsn = request.getfixturevalue("file_dsn")
        with Wallet(dsn) as wallet:
            yield dsn
            check_books(wallet)
        return
    wallet, tables = request.getfixturevalue("kept_wallet"), TABLES[:0:-1]
    wallet.database._pool.check()
    yield request.getfixturevalue("kept_schema")
    try:
        check_books(wallet)
    finally:
        wallet.database.write(lambda tx: [tx(f"DELETE FROM {table}") for table in tables])


@pytest.fixture
def run(dsn, capsys):
    """A function that runs a command here, and returns what it says: out, and err."""

    def run(*arguments, code=0):
        assert wallet_cli.main([*arguments, "--dsn", dsn]) == code
        return capsys.readouterr()

    return run


@pytest.fixture
def ask(run):
    """A function that runs a command with --json, and returns what its one line has."""

    def ask(*arguments):
        out, err = run(*arguments, "--json")
        (line,) = out.splitlines()
        assert err == ""
        return json.loads(line)

    return ask


def in_columns(out):
    """Return the cells of a table."""
    return [re.split("  +", line) for line in out.splitlines()]


# Money ############################################################################################


def test_session_of_all_money_commands_shows_tables(run):
    shown = dict(line.split(maxsplit=1) for line in run("register", " Ada ").out.splitlines())
    assert (shown["name"], shown["token"][4:20]) == ("Ada", shown["id"][4:])
    ada, own = shown["id"], shown["id"].removeprefix("acc_")
    bob = run("register", "Bob").out.split()[1]
    for arguments, kind, cells in [
        (["topup", ada, "12.50", "--description", "Order 17"], "txn", "topup 12.50 12.50 Order_17"),
        (["charge", ada, "2"], "txn", "charge 2.00 10.50"),
        (["refund", f"txn_{own}_2", "0.5"], "txn", f"refund 0.50 11.00 txn_{own}_2"),
        (["refund", f"txn_{own}_2"], "txn", f"refund 1.50 12.50 txn_{own}_2"),
        (["transfer", ada, bob, "250", "--minor"], "txn", f"transfer_out 2.50 10.00 {bob}"),
        (["hold", ada, "5"], "hld", "active 5.00 0.00"),
        (["capture", f"hld_{own}_6", "--description", "x", "1.5"], "txn",
         f"charge 1.50 8.50 x hld_{own}_6"),
        (["hold", ada, "5", "--expires-in-s", "60"], "hld", "active 5.00 0.00"),
        (["release", f"hld_{own}_8"], "hld", "released 5.00 0.00"),
    ]:
        header, row = in_columns(run(*arguments).out)
        assert header[0] == "id"
        assert f"{kind}_{own}_" in row[0]
        assert " ".join(cell.replace(" ", "_") for cell in row[1:] if not re.match(TIME, cell)) == cells
    header, *rows = in_columns(run("history", ada).out)
    assert header == ["id", "type", "amount (USD)", "balance (USD)", "created_at", "description",
                      "reference"]
    assert [row[0].rpartition("_")[2] for row in rows] == ["7", "5", "4", "3", "2", "1"]
    assert [row[1] for row in in_columns(run("holds", ada).out)] == ["status", "released", "captured"]
    assert [row[0] for row in in_columns(run("accounts").out)][1:] == [bob, ada]


def test_json_of_every_command_is_what_http_answers(dsn, ask, run):
    with served("--dsn", dsn) as server:  # Meanwhile the commands work on the same database.
        made = ask("register", "Ada")
        ada, own, token = made["id"], made["id"].removeprefix("acc_"), made.pop("token")

        def http(path):
            return send(server.url, "GET", path, token=token)[2]

        assert made == http("/api/account")
        bob = ask("register", "Bob")["id"]
        metadata = ["--metadata", "order=17", "--metadata", "a=b=c"]
        for number, arguments in enumerate([
            ["topup", ada, "12.50", "--description", "Ä 日本", *metadata],
            ["charge", ada, "2.50"],
            ["refund", f"txn_{own}_2"],
            ["transfer", ada, bob, "1"],
            ["hold", ada, "5"],
            ["hold", ada, "1"],
        ], 1):
            made = ask(*arguments)
            kind = "holds" if arguments[0] == "hold" else "transactions"
            assert made == http(f"/api/{kind}/{made['id']}")
            assert made["id"].endswith(f"_{number}")
        assert http("/api/transactions/" + f"txn_{own}_1")["metadata"] == {"order": "17", "a": "b=c"}
        captured = ask("capture", f"hld_{own}_5", "4")
        assert captured == http(f"/api/transactions/{captured['id']}") == ask("show", captured["id"])
        assert ask("release", f"hld_{own}_6") == http(f"/api/holds/hld_{own}_6")
        assert ask("show", f"hld_{own}_5") == http(f"/api/holds/hld_{own}_5")
        history = [json.loads(line) for line in run("history", ada, "--json").out.splitlines()]
        assert history == http("/api/transactions")["transactions"]
        whole = [json.loads(line) for line in run("statement", ada, "--json").out.splitlines()]
        assert whole == history[::-1]
        held = [json.loads(line) for line in run("holds", ada, "--json").out.splitlines()]
        assert held == http("/api/holds")["holds"]
        assert ask("freeze", ada) == http("/api/account") == ask("show", ada)
        assert http("/api/account")["frozen"]
        assert ask("unfreeze", ada) == ask("find", "ada") == http("/api/account")
        replaced = ask("token", ada)
        assert send(server.url, "GET", "/api/account", token=token)[0] == 401
        token = replaced.pop("token")
        assert replaced == http("/api/account")
        server.send_signal(signal.SIGTERM)


def test_show_has_a_line_for_each_member_and_a_balance_of_any_time(run, ask):
    ada = ask("register", "Ada")["id"]
    topup = ask("topup", ada, "12.50", "--metadata", "order=17", "--metadata", "shop=x")
    shown = dict(line.split(maxsplit=1) for line in run("show", ada).out.splitlines())
    assert (shown["balance"], shown["available"], shown["frozen"]) == ("12.50 USD", "12.50 USD", "no")
    shown = run("show", topup["id"]).out.splitlines()
    assert shown[:4] == [f"id           {topup['id']}", "type         topup",
                         "amount       12.50 USD", "balance      12.50 USD"]
    assert "metadata     order=17, shop=x" in shown
    assert "description" in shown  # It has none.
    assert f"created_at   {topup['created_at']}" in shown
    before = ask("show", ada, "--at", "2020-01-01")
    assert before == {"id": ada, "name": "Ada", "currency": "USD", "currency_digits": 2,
                      "balance": 0, "at": "2020-01-01T00:00:00.000000Z"}
    assert ask("show", ada, "--at", topup["created_at"])["balance"] == 1250
    assert "balance          12.50 USD\n" in run("show", ada, "--at", "9999-01-01").out
    for id, reason in [("Ada", "This is no id: those of accounts begin with acc_"),
                       ("acc_1", "There is no such account."),
                       ("txn_1", "This account has no such transaction."),
                       (topup["id"].replace("_1", "_2"), "This account has no such transaction.")]:
        assert run("show", id, code=2).err.startswith(f"wallet: {reason}")
    assert run("show", ada, "--at", "noon", code=2).err == (
        "wallet: at must be a day such as 2026-11-22, or a time such as 2026-11-22T09:30:00Z, and"
        " not 'noon'.\n")
    assert run("show", topup["id"], "--at", "2026-11-22", code=2).err == (
        f"wallet: at must come with the id of an account, and not '{topup['id']}'.\n")


def test_refused_command_says_why_with_amounts_as_people_write_them_and_changes_nothing(run, ask):
    made = ask("register", "Ada")
    ada, own = made["id"], made["id"].removeprefix("acc_")
    for arguments in (["topup", ada, "12.50"], ["charge", ada, "2"], ["hold", ada, "3"]):
        ask(*arguments)
    before = ask("show", ada)
    for arguments, reason in [
        (["charge", ada, "7.51"], "The balance is 10.50, 7.50 of it available, and this needs 7.51."),
        (["topup", ada, "90071992547409.91"],
         "The balance is 10.50, and may be 90071992547409.91 at most."),
        (["refund", f"txn_{own}_2", "2.01"], "Of this charge, 2.00 can still be refunded."),
        (["refund", f"txn_{own}_1"], "This is a topup, and only a charge can be refunded."),
        (["capture", f"hld_{own}_3", "3.01"], "amount must be at most 3.00, which is what is held."),
        (["capture", f"txn_{own}_3"], "This account has no such hold."),
        (["release", "x"], "This account has no such hold."),
        (["transfer", ada, ada, "1"], "to must be another account."),
        (["transfer", ada, "acc_0000000000000000", "1"], "There is no such account."),
        (["topup", "Ada", "1"], "There is no such account."),
        (["topup", ada, "1", "--description", "x" * 501],
         "description must have at most 500 characters."),
        (["topup", ada, "1", "--metadata", "order"],
         "metadata must be NAME=VALUE, with each name once, and not 'order'."),
        (["topup", ada, "1", "--metadata", "a=1", "--metadata", "a=2"],
         "metadata must be NAME=VALUE, with each name once, and not 'a=2'."),
        (["topup", ada, "1", "--key", "ä"],
         "Idempotency-Key must be 1 to 255 printable ASCII characters, with no space at its ends."),
        (["hold", ada, "1", "--expires-in-s", ""],
         "expires_in_s must be an integer from 1 to 999999999, and not ''."),
        (["hold", ada, "1", "--expires-in-s", "999999999"],
         "expires_in_s must be an integer from 1 to 2592000, in seconds."),
        (["register", " "], "name must have 1 to 100 characters."),
        (["history", ada, "--limit", "0"],
         "limit must be an integer from 1 to 999999999, and not '0'."),
        (["history", ada, "--csv", "--json"], "Take --csv or --json, but not both."),
        (["history", ada, "--since", "yesterday"], "since must be a day such as 2026-11-22, "),
        (["history", ada, "--type", "fee"], "--type invalid choice: 'fee' (choose from "),
        (["topup", ada], "the following arguments are required: AMOUNT; see --help"),
        (["topup", ada, "1", "2"], "unrecognized arguments: 2; see --help"),
        (["capture", f"hld_{own}_3", "--key", "k", "1", "2"], "unrecognized arguments: 1 2; see"),
    ]:
        out, err = run(*arguments, code=2)
        shown = json.loads(err)["detail"] if "--json" in arguments else err.removeprefix("wallet: ")
        assert (out, shown.startswith(reason), err.count("\n")) == ("", True, 1), err
    assert ask("show", ada) == before
    problem = json.loads(run("charge", ada, "7.51", "--json", code=2).err)
    assert problem == {
        "title": "The balance is too low.", "status": 402, "code": "insufficient_funds",
        "detail": "The balance is 1050, 750 of it available, and this needs 751.",
        "balance": 1050, "available": 750, "required": 751}
    problem = json.loads(run("topup", ada, "1,50", "--json", code=2).err)
    assert (problem["code"], problem["errors"][0]["pointer"]) == ("validation_failed", "#/amount")


ODD = ("", "x", "acc_", "txn_", "hld_\u0661_1", "txn_0000000000000000_1", "hld_" + "0" * 40,
       "acc_0000000000000000", "\x00", "\udcff", "-", "=", "\u202e")


@pytest.mark.slow
@pytest.mark.parametrize("value", ODD, ids=range(len(ODD)))
def test_nothing_that_is_given_is_a_fault(file_dsn, capsys, caplog, value):
    with Wallet(file_dsn) as wallet:
        ada, _ = wallet.register("Ada")
        money = ["--description", "--metadata", "--key"]
        lines = [["show", value], ["history", value], ["statement", value], ["holds", value],
                 ["freeze", value], ["token", value], ["refund", value], ["capture", value],
                 ["release", value], ["topup", value, "1"], ["transfer", ada.id, value, "1"],
                 ["transfer", value, ada.id, "1"], ["topup", ada.id, value],
                 ["hold", ada.id, "1", "--expires-in-s", value],
                 *[["charge", ada.id, "1", f"{option}={value}"] for option in money],
                 *[["history", ada.id, f"{option}={value}"]
                   for option in ("--type", "--since", "--until", "--limit")],
                 ["show", ada.id, f"--at={value}"], ["restore", value], ["backup", ""]]
        for arguments in lines:
            assert wallet_cli.main([*arguments, "--dsn", file_dsn]) == 2, arguments
            out, err = capsys.readouterr()
            assert (out, err.count("\n"), caplog.text) == ("", 1, ""), arguments
        assert wallet_cli.main(["find", value, "--dsn", file_dsn]) in (0, 2)
        assert wallet.account(ada.id) == ada


# Amounts ##########################################################################################


@pytest.mark.parametrize(
    ("text", "digits", "amount"),
    [("12.50", 2, 1250), ("12.5", 2, 1250), ("1250", 2, 125000), ("0.01", 2, 1), ("007", 2, 700),
     ("1250", 0, 1250), ("1.005", 3, 1005), ("90071992547409.91", 2, AMOUNT_MAX),
     ("9007199.254740991", 9, AMOUNT_MAX), ("0.29", 2, 29), ("4.35", 2, 435)],
)
def test_amount_is_read_exactly_as_people_write_it(text, digits, amount):
    assert wallet_commands.parse_amount(text, "USD", digits) == amount


@pytest.mark.parametrize("digits", [0, 2, 3])
@pytest.mark.parametrize(
    "text",
    ["", "-5", "+5", "1,50", "1,000.00", "1_000", "1e3", "NaN", "inf", "0", "0.0", "12.", ".5",
     "12.5000", "1 000", " 5", "5\n", "$5", "0x10", "٣", "\uff11", "½", "90071992547409.92",
     "9007199254740992", "9" * 5000, "1.5.0", "12.50 USD"],
)
def test_amount_in_any_other_form_is_refused_with_the_form_to_write(text, digits):
    with pytest.raises(ValidationFailed) as refused:
        wallet_commands.parse_amount(text, "EUR", digits)
    form, example = {0: ("digits only", "125"),
                     2: ("digits, a point and at most 2 decimals", "12.50"),
                     3: ("digits, a point and at most 3 decimals", "12.500")}[digits]
    assert f" EUR, written with {form}, such as {example}, and not " in str(refused.value)
    assert len(str(refused.value)) < 250
    wallet_commands.parse_amount(example, "EUR", digits)


@given(st.integers(1, AMOUNT_MAX), st.integers(0, 9))
def test_every_amount_is_read_as_it_is_written(amount, digits):
    text = wallet_commands.format_amount(amount, digits)
    assert wallet_commands.parse_amount(text, "USD", digits) == amount


def test_token_in_the_place_of_an_amount_is_not_shown(run, ask):
    made = ask("register", "Ada")
    for amount in (made["token"], f" {made['token']}"):
        assert made["token"][4:12] not in run("topup", made["id"], amount, code=2).err


def test_amounts_have_the_decimals_of_the_currency_and_minor_ones_have_none(tmp_path, capsys):
    for code, text, amount, shown in [("JPY", "125", 125, "125"), ("KWD", "1.25", 1250, "1.250")]:
        dsn = f"sqlite:///{tmp_path}/{code}.db"
        assert wallet_cli.main(["init", "--currency", code, "--dsn", dsn]) == 0
        with Wallet(dsn) as wallet:
            ada, _ = wallet.register("Ada")
            for arguments in ([text], ["--minor", str(amount)]):
                capsys.readouterr()
                assert wallet_cli.main(["topup", ada.id, *arguments, "--dsn", dsn]) == 0
                assert f"topup  {shown:>12}" in capsys.readouterr().out
            assert wallet.account(ada.id).balance == 2 * amount
            assert wallet_cli.main(["topup", ada.id, "--minor", "1.5", "--dsn", dsn]) == 2
            assert f"minor units of {code}, written with digits only" in capsys.readouterr().err


# Keys #############################################################################################


def test_key_has_its_effect_once_and_the_first_answer_comes_again(run, ask):
    ada = ask("register", "Ada")["id"]
    first = run("topup", ada, "5", "--key", "k")
    again = run("topup", ada, "5", "--key", "k")
    assert (first.err, again.out) == ("", first.out)
    assert again.err == "wallet: this key had its effect before, and this is that answer again\n"
    assert "another request" in run("topup", ada, "6", "--key", "k", code=2).err
    assert run("topup", ada, "5").out != run("topup", ada, "5").out  # Each has a key of its own.
    assert ask("show", ada)["balance"] == 1500


def test_command_whose_outcome_is_unknown_tells_the_key_that_decides(
    new_schema, postgres_server, monkeypatch, capsys
):
    dsn = new_schema(on=postgres_server)
    with Wallet(dsn) as wallet:
        ada, _ = wallet.register("Ada")
        arguments = ["topup", ada.id, "5", "--dsn", dsn]
        with monkeypatch.context() as patched, standby_missing(postgres_server):
            patched.setattr(wallet_module, "DATABASE_TIMEOUT_S", 0.5)
            assert wallet_cli.main(arguments) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        key = re.fullmatch(
            r"wallet: It is not known whether this was done. Run the same command again with --key"
            r" (\S+): it has its effect once.", told)[1]
        assert wallet_cli.main([*arguments, "--key", key]) == 0
        assert wallet_cli.main([*arguments, "--key", key]) == 0
        assert wallet.account(ada.id).balance == 500


def test_command_that_is_cut_off_tells_its_key(file_dsn, monkeypatch, capsys, caplog):
    with Wallet(file_dsn) as wallet:
        ada, _ = wallet.register("Ada")
        topup = Wallet.topup

        def interrupt(*arguments, **options):
            topup(*arguments, **options)
            signal.raise_signal(signal.SIGINT)

        def fail(*arguments, **options):
            topup(*arguments, **options)
            raise RuntimeError("a bug")

        for number, (broken, code) in enumerate([(interrupt, 130), (fail, 2)], 1):
            arguments = ["topup", ada.id, "5", "--dsn", file_dsn, "--json"]
            with monkeypatch.context() as patched:
                patched.setattr(Wallet, "topup", broken)
                assert wallet_cli.main(arguments) == code
            told = json.loads(capsys.readouterr().err.splitlines()[-1])
            assert (told["code"], told["status"]) == ("outcome_unknown", 503)
            assert wallet_cli.main([*arguments, "--key", told["key"]]) == 0
            assert wallet.account(ada.id).balance == 500 * number
    assert "a bug" in caplog.text
    with monkeypatch.context() as patched:
        patched.setattr(wallet_books, "verify", lambda *told: signal.raise_signal(signal.SIGINT))
        capsys.readouterr()
        assert wallet_cli.main(["verify", "--dsn", file_dsn, "--json"]) == 130
        assert json.loads(capsys.readouterr().err) == {"detail": "interrupted"}


def test_command_whose_output_cannot_be_written_tells_its_key(file_dsn):
    with Wallet(file_dsn) as wallet:
        ada, _ = wallet.register("Ada")
        program = [sys.executable, *MODULE, "topup", ada.id, "5", "--dsn", file_dsn]
        reader, writer = os.pipe()
        os.close(reader)
        with open("/dev/full", "w") as full, os.fdopen(writer, "w") as closed:
            for count, (output, code) in enumerate([(full, 2), (closed, 141)], 1):
                done = subprocess.run(program, stdout=output, stderr=subprocess.PIPE, text=True,
                                      env=environment(), timeout=60)
                assert done.returncode == code, done.stderr
                (key,) = re.findall(r"again with --key (\S+): it has", done.stderr)
                assert command(*program[3:], "--key", key).returncode == 0
                assert wallet.account(ada.id).balance == 500 * count


def test_lost_output_of_what_has_no_key_says_what_may_have_been_done(file_dsn):
    with Wallet(file_dsn) as wallet:
        ada, _ = wallet.register("Ada")
    for arguments, told in [
        (["token", ada.id], "the old token may be dead, so run this again"),
        (["register", "Bob"], "there may be an account whose token nobody has"),
    ]:
        program = [sys.executable, *MODULE, *arguments, "--dsn", file_dsn]
        with open("/dev/full", "w") as full:
            done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True,
                                  env=environment(), timeout=60)
        assert done.returncode == 2
        assert done.stderr.endswith(f"No space left on device: {told}\n")


def test_what_begins_with_a_dash_is_text_behind_two(file_dsn, capsys):
    Wallet(file_dsn).close()
    assert wallet_cli.main(["register", "--dsn", file_dsn, "--", "--Ada"]) == 0
    assert "name   --Ada\n" in capsys.readouterr().out
    assert wallet_cli.main(["find", "--dsn", file_dsn, "--", "--ada"]) == 0
    assert "  --Ada  " in capsys.readouterr().out


# Looking at it ####################################################################################


def test_accounts_are_filtered_by_name_and_time_and_holds_by_status(run, ask):
    made = [ask("register", name) for name in ("Ada", "Adam", "Bob")]
    ada, second = made[0]["id"], made[1]["created_at"]
    ask("topup", ada, "5")
    held = [ask("hold", ada, "1")["id"] for _ in range(3)]
    ask("release", held[1])
    assert ask("show", ada)["holds_active"] == 2

    def listed(*arguments):
        return [row[0] for row in in_columns(run(*arguments).out)[1:]]

    newest_first = [one["id"] for one in made[::-1]]
    assert listed("accounts") == newest_first
    assert listed("accounts", "--name", "Ada") == newest_first[1:]
    assert listed("accounts", "--since", second) == newest_first[:2]
    assert listed("accounts", "--until", second, "--name", "A") == [ada]
    assert listed("accounts", "--until", "2026-01-01") == []
    assert listed("holds", ada, "--status", "active") == [held[2], held[0]]
    assert listed("holds", ada, "--status", "released") == [held[1]]
    assert listed("holds", ada, "--status", "captured") == []


def test_history_is_filtered_and_says_when_there_is_more(run, ask):
    ada = ask("register", "Ada")["id"]
    for number in range(1, 4):
        ask("topup", ada, str(number))
        ask("charge", ada, "0.01")

    def ids(*arguments):
        out, err = run("history", ada, *arguments)
        return [int(row[0].rpartition("_")[2]) for row in in_columns(out)[1:]], err

    assert ids() == ([6, 5, 4, 3, 2, 1], "")
    assert ids("--type", "topup") == ([5, 3, 1], "")
    older = "wallet: there are older ones, which a higher --limit shows\n"
    assert ids("--limit", "2") == ([6, 5], older)
    assert run("holds", ada).err == run("history", ada, "--limit", "7", "--json").err == ""
    for form in ("--csv", "--json"):
        out, err = run("history", ada, "--limit", "2", form)
        assert "older ones" in err
        assert out.count(f"_{ada[4:]}_") == 2
    assert json.loads(err) == {"detail": older.removeprefix("wallet: ").strip()}
    assert ids("--limit", "6") == ([6, 5, 4, 3, 2, 1], "")
    assert ids("--since", "2020-01-01", "--until", "9000-01-01T00:00:00Z")[0][0] == 6
    assert ids("--until", "2020-01-01") == ([], "")
    assert ids("--since", "9000-01-01") == ([], "")


def test_history_reads_as_many_pages_as_it_takes(file_dsn, capsys):
    with Wallet(file_dsn) as wallet:
        ada, _ = wallet.register("Ada")
        wallet.batch([{"type": "topup", "amount": 1}] * 250, account_id=ada.id)
    assert wallet_cli.main(["history", ada.id, "--limit", "230", "--json", "--dsn", file_dsn]) == 0
    numbers = [int(json.loads(line)["id"].rpartition("_")[2])
               for line in capsys.readouterr().out.splitlines()]
    assert numbers == list(range(250, 20, -1))


def test_statement_is_the_csv_of_http_and_history_csv_has_its_lines_newest_first(
    dsn, run, ask
):
    made = ask("register", "Ada")
    ada, token = made["id"], made["token"]
    for amount in ("1", "2", "3"):
        ask("topup", ada, amount, "--description", '=1+1 "Ä"')
    with served("--dsn", dsn) as server:
        path = "/api/transactions.csv"
        answer = subprocess.run(
            ["curl", "-s", f"{server.url}{path}", "-H", f"Authorization: Bearer {token}"],
            capture_output=True, timeout=60, check=True)
    whole = subprocess.run([sys.executable, *MODULE, "statement", ada, "--dsn", dsn],
                           capture_output=True, env=environment(PYTHONIOENCODING="ascii"), timeout=60)
    assert (whole.stdout, whole.stderr, whole.returncode) == (answer.stdout, b"", 0)
    lines = whole.stdout.decode().splitlines()
    newest = run("history", ada, "--csv").out.splitlines()
    assert newest == [lines[0], *lines[3:0:-1], lines[4]]
    two = run("history", ada, "--csv", "--limit", "2").out.splitlines()
    assert two[:3] == newest[:3]
    assert two[3].startswith("transactions in this statement: 2,")
    assert run("statement", ada, "--since", "9000-01-01").out.count("\n") == 2


def test_find_knows_parts_of_names_in_any_case_and_ids(run, ask):
    # One letter, and two that look the same.
    names = ["Ada Lovelace", "Straße", unicodedata.normalize("NFD", "Zoë"), "Bob"]
    ids = {name: ask("register", name)["id"] for name in names}
    for text, name in [("love", "Ada Lovelace"), ("ADA", "Ada Lovelace"), ("STRASSE", "Straße"),
                       ("ZOË", names[2]), ("zoë", names[2]), (ids["Bob"], "Bob"),
                       (ids["Bob"][4:16], "Bob")]:
        assert ask("find", text)["id"] == ids[name], text
    assert len(in_columns(run("find", "a").out)) >= 3
    topup = ask("topup", ids["Bob"], "1", "--description", "unheard of")
    hold = ask("hold", ids["Bob"], "1")
    assert ask("find", topup["id"]) == topup
    assert ask("find", hold["id"]) == hold
    assert in_columns(run("find", hold["id"]).out)[0][1] == "status"
    nobody = run("find", "unheard of")
    assert (len(in_columns(nobody.out)), nobody.err) == (1, "")
    assert run("find", "unheard of", "--json") == ("", "")
    assert run("find", topup["id"][:-1] + "9", code=2).out == ""


HOSTILE = "\u202egnol \u2066x \u200e\u061c \U000e0041 \u00ad\ufeff 日本"


def test_no_text_sends_control_or_bidirectional_characters_to_the_terminal(file_dsn, capsys):
    with Wallet(file_dsn) as wallet:
        ada, _ = wallet.register(HOSTILE)
        made = wallet.topup(ada.id, 5, HOSTILE, metadata={HOSTILE[:20]: HOSTILE})
        hold = wallet.hold(ada.id, 1, HOSTILE)
    for arguments in (["accounts"], ["find", "gnol"], ["history", ada.id], ["holds", ada.id],
                      ["show", ada.id], ["show", made.id], ["show", hold.id],
                      ["register", HOSTILE], ["history", ada.id, "--limit", "\x1b[2J\u202e"]):
        wallet_cli.main([*arguments, "--dsn", file_dsn])
        out, err = capsys.readouterr()
        assert out + err
        assert [one for one in out + err if not one.isprintable() and one != "\n"] == []
        if "--limit" not in arguments:
            assert "\\u202egnol \\u2066x \\u200e\\u061c \\U000e0041 \\xad\\ufeff 日本" in out


@pytest.fixture
def crowd(file_dsn):
    with Wallet(file_dsn) as wallet:
        for name in ("Ada", "日本語" * 9, "e\u0301" * 40, "😀" * 30, "x" * 100, "한국"):
            account, _ = wallet.register(name)
            wallet.topup(account.id, 125000, description=name)
    return account.id


def on_a_terminal(columns, *arguments, stream="stdout"):
    """Return what a command shows on a terminal that is so wide."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    settings = environment(PYTHONIOENCODING="utf-8")
    settings.pop("COLUMNS", None)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: theirs}
    process = subprocess.Popen([sys.executable, *MODULE, *arguments], **streams, env=settings)
    os.close(theirs)
    shown = b""
    with os.fdopen(ours, "rb", buffering=0) as screen:
        while True:
            try:
                part = screen.read(65536)
            except OSError:  # The command has ended.
                break
            if not part:
                break
            shown += part
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, (out, err, shown)
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.slow
@pytest.mark.parametrize("columns", [20, 80, 100, 400])
def test_tables_are_aligned_by_width_and_cut_to_the_terminal(crowd, file_dsn, columns):
    for arguments in (["accounts"], ["history", crowd]):
        shown = on_a_terminal(columns, *arguments, "--dsn", file_dsn).splitlines()
        whole = command(*arguments, "--dsn", file_dsn, PYTHONIOENCODING="utf-8").stdout.splitlines()
        assert len(shown) == len(whole)
        assert "\x1b" not in "".join(shown)
        for line, full in zip(shown, whole, strict=True):
            assert wcwidth.width(line) <= columns
            assert line == full or wcwidth.width(full) > columns
            assert full.startswith(line.removesuffix("…").rstrip())
            # What is cut is text, and no amount or time is cut: those are left out, as a column.
            is_whole = full[len(line) :].startswith("  ") or line == full
            assert line.endswith("…") or is_whole
            cells = re.split("  +", line.removesuffix("…").rstrip())
            assert all(one in full.split() for one in cells if re.match(r"[0-9.]+(T|$)", one))


def test_columns_are_as_wide_as_what_is_in_them_whatever_its_width(file_dsn, capsys):
    output = wallet_commands.Output(False)
    output.currency = "USD"
    with Wallet(file_dsn) as wallet:
        for name in ("Ada", "日本語", "e\u0301e\u0301", "😀😀"):
            wallet.topup(wallet.register(name)[0].id, len(name))
        output.list(wallet.accounts(), ("name", "balance", "id"))
    header, *rows = capsys.readouterr().out.splitlines()
    assert header == "name    balance (USD)  id"
    assert {wcwidth.width(row[: row.index("acc_")]) for row in rows} == {23}
    assert all(re.match(r"\S+ +0\.0\d  acc_\w{16}$", row) for row in rows)


# Long work ########################################################################################


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.2, ", 0 s left"), (59, ", 59 s left"), (61.4, ", 1 min  1 s left"),
     (1e9, ", 99 min 59 s left"), (-5, ", 0 s left")])
def test_time_that_is_left_is_told_in_minutes_and_seconds(seconds, shown):
    assert wallet_commands.format_time_left(seconds) == shown
    assert len(shown) <= wallet_commands.LEFT_CHARACTERS


def test_bar_tells_what_the_rest_takes_and_begins_anew_with_the_next_work(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", screen)
    output = wallet_commands.Output(as_json=False)
    for done in (10, 20, 0, 5):
        output.report(done, 100)
    lines = screen.getvalue().split("\r")
    assert [" left" in one for one in lines] == [False, True, False, True, False]


def test_long_work_draws_a_bar_on_a_terminal_and_wipes_it_out(file_dsn, tmp_path, monkeypatch):
    fill_books(file_dsn, monkeypatch)
    for arguments in (["verify"], ["backup", f"{tmp_path}/backup.db"],
                      ["restore", f"{tmp_path}/backup.db", "--dsn", f"sqlite:///{tmp_path}/r.db"],
                      ["copy", "--from", file_dsn, "--to", f"sqlite:///{tmp_path}/copy.db"]):
        if "--dsn" not in arguments:
            arguments += ["--dsn", file_dsn]
        shown = on_a_terminal(80, *arguments, stream="stderr")
        *drawn, wiped, end = shown.split("\r")
        assert drawn
        form = r"\[#* *\] +\d+ %(, (\d+ min [ \d])?\d s left)? *"
        assert all(re.fullmatch(form, one) and len(one) == len(wiped) for one in drawn), drawn
        assert drawn[-1].startswith("[####################] 100 %")
        assert (wiped.strip(), end) == ("", "")


def test_long_work_draws_nothing_in_a_pipe_and_has_json(file_dsn, tmp_path, monkeypatch, capsys):
    fill_books(file_dsn, monkeypatch)
    location, backup = f"{tmp_path}/wallet.db", f"{tmp_path}/backup.db"
    restored, copied = f"{tmp_path}/restored.db", f"{tmp_path}/copied.db"
    books = {"accounts": 4, "entries": 14}
    size = {}
    for arguments, expected in [
        (["init"], {"database": location, "created": False, "currency": "USD",
                    "currency_digits": 2}),
        (["verify"], {"database": location, **books}),
        (["backup", backup], {"file": backup, "bytes": None, **books}),
        (["restore", backup, "--dsn", f"sqlite:///{restored}"],
         {"file": restored, "bytes": None, **books}),
        (["copy", "--from", file_dsn, "--to", f"sqlite:///{copied}"],
         {"source": location, "database": copied, "currency": "USD", "accounts": 4,
          "transactions": 14, "holds": None, "issuer_keys": 1}),
        (["migrate"], {"database": location, "from": 4, "to": 4}),
    ]:
        if "--dsn" not in arguments:
            arguments += ["--dsn", file_dsn]
        assert wallet_cli.main([*arguments, "--json"]) == 0
        out, err = capsys.readouterr()
        found = json.loads(out)
        size |= {name: found[name] for name in expected if expected[name] is None}
        assert (found, err) == (expected | {name: size[name] for name in expected
                                            if expected[name] is None}, "")
    assert size == {"bytes": os.path.getsize(backup), "holds": len(contents(file_dsn)[3])}
    with Wallet(file_dsn) as wallet:
        wallet.database.write(lambda tx: tx("UPDATE accounts SET balance = 57 WHERE id LIKE '%A'"))
    assert wallet_cli.main(["verify", "--dsn", file_dsn, "--json"]) == 1
    problem = json.loads(capsys.readouterr().err)
    assert (problem["code"], problem["detail"]) == (
        "wrong_books", f"accounts (acc_{'A' * 16}): the balance is 57, and should be 56")


# Restoring ########################################################################################


@pytest.fixture
def backup(file_dsn, tmp_path, monkeypatch):
    fill_books(file_dsn, monkeypatch)
    with Wallet(file_dsn) as wallet:
        wallet_books.back_up(wallet, f"{tmp_path}/backup.db")
    return f"{tmp_path}/backup.db"


def test_restore_puts_a_verified_backup_where_there_is_no_wallet(backup, file_dsn, tmp_path, capsys):
    dsn = f"sqlite:///{tmp_path}/new.db"
    assert wallet_cli.main(["restore", backup, "--dsn", dsn]) == 0
    size = os.path.getsize(backup)
    assert capsys.readouterr() == (
        f"verified: {tmp_path}/new.db has {size:,} bytes, with 4 accounts and 14 entries\n", "")
    assert oct(os.stat(tmp_path / "new.db").st_mode & 0o777) == "0o600"
    assert contents(dsn) == contents(file_dsn)
    with Wallet(dsn) as wallet:
        check_books(wallet)
        assert wallet.topup(f"acc_{'A' * 16}", 1).amount == 1
    assert wallet_books.restore(backup, f"sqlite:///{tmp_path}/other.db") == (4, 14)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".db", ".db-shm", ".db-wal"}


def test_restore_never_takes_the_place_of_a_wallet_or_gets_into_its_log(
    backup, file_dsn, tmp_path, capsys
):
    def told(file=backup, dsn=file_dsn, code=2):
        before = {path: path.read_bytes() for path in tmp_path.glob("*") if path.suffix != ".db-shm"}
        assert wallet_cli.main(["restore", str(file), "--dsn", dsn]) == code
        out, err = capsys.readouterr()
        after = {path: path.read_bytes() for path in tmp_path.glob("*") if path.suffix != ".db-shm"}
        assert (out, after) == ("", before)
        return err.removeprefix("wallet: ").removesuffix("\n")

    advice = "stop its wallet and move it away, or name another DSN"
    assert told() == f"{tmp_path}/wallet.db is there already: {advice}"
    (tmp_path / "new.db-wal").write_text("")
    new = f"sqlite:///{tmp_path}/new.db"
    assert told(dsn=new) == f"{tmp_path}/new.db-wal is there already: {advice}"
    (tmp_path / "new.db-wal").unlink()
    (tmp_path / "new.db-journal").write_text("")
    assert told(dsn=new) == f"{tmp_path}/new.db-journal is there already: {advice}"
    (tmp_path / "new.db-journal").unlink()
    assert told(dsn="sqlite://") == "what is in memory would be gone at once: name a file"
    form = "a backup is restored to a file of SQLite: name it as sqlite:///FILE"
    for dsn in ("sqlite:///new.db?mode=ro", "mysql://db", "new.db", "sqlite:///new/"):
        assert told(dsn=dsn) == form
    with pytest.raises(ConfigurationError, match="name it as sqlite:///FILE"):
        wallet_books.restore(backup, "sqlite:///:memory:")
    assert told(tmp_path / "none.db", new) == f"there is no file {tmp_path}/none.db: name a backup"
    (tmp_path / "pipes").mkdir()
    os.mkfifo(tmp_path / "pipes/one")  # Nobody writes to it: to read it would take for ever.
    with pytest.raises(ConfigurationError, match=r"there is no file .*: name a backup"):
        wallet_books.restore(f"{tmp_path}/pipes/one", new)
    shutil.rmtree(tmp_path / "pipes")
    (tmp_path / "text.db").write_text("no database at all, but a text" * 100)
    assert "file is not a database" in told(tmp_path / "text.db", new)
    nowhere = f"sqlite:///{tmp_path}/none/new.db"
    assert told(dsn=nowhere) == (
        f"cannot restore to {tmp_path}/none/new.db: No such file or directory")


def test_control_a_log_that_is_left_gets_into_what_is_put_beside_it(tmp_path):
    """For this reason restore refuses to put a wallet there."""
    def filled(path, word):
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE one (word)")
        connection.execute("INSERT INTO one VALUES (?)", (word,))
        connection.commit()
        return connection

    with closing(filled(tmp_path / "old.db", "old")):
        log = (tmp_path / "old.db-wal").read_bytes()
    filled(tmp_path / "new.db", "new").close()
    (tmp_path / "new.db-wal").write_bytes(log)
    with closing(sqlite3.connect(tmp_path / "new.db")) as restored:
        assert restored.execute("SELECT word FROM one").fetchall() == [("old",)]


def test_restore_of_wrong_books_or_of_an_older_version_leaves_nothing(backup, tmp_path, capsys):
    dsn = f"sqlite:///{tmp_path}/new.db"
    for sql, reason in [
        ("UPDATE accounts SET balance = balance + 1", r"accounts \(acc_\w+\): the balance is \d+, "),
        ("UPDATE wallet SET schema_version = 2",
         "the database has schema version 2, and this wallet has 4: bring it there by the command"
         " migrate, or use an older one"),
    ]:
        with closing(sqlite3.connect(backup)) as connection:
            connection.execute(sql)
            connection.commit()
        before = set(tmp_path.iterdir())
        assert wallet_cli.main(["restore", backup, "--dsn", dsn]) == 2
        assert re.match(f"wallet: {reason}", capsys.readouterr().err)
        assert {path for path in tmp_path.iterdir() if "-shm" not in path.name
                and "-wal" not in path.name} <= before


def test_restore_over_postgres_names_the_command_that_does_it(tmp_path, postgres_dsn, capsys):
    dsn = postgres_dsn.replace("postgres@", "postgres:pass%20word@")
    assert wallet_cli.main(["restore", f"{tmp_path}/dump", "--dsn", dsn]) == 2
    told = capsys.readouterr().err
    assert "\npg_restore --exit-on-error --single-transaction --dbname=" in told
    assert f" {tmp_path}/dump" in told
    assert "pass" not in told.replace("password", "").replace("pass(", "")
    assert wallet_cli.main(["restore", "dump", "--dsn", "postgresql://u:secret@[h"]) == 2
    assert capsys.readouterr().err == "wallet: the DSN is malformed\n"


def test_restore_of_a_backup_of_sqlite_to_postgres_names_the_way(backup, capsys):
    assert wallet_cli.main(["restore", backup, "--dsn", "postgresql://db/wallet"]) == 2
    assert capsys.readouterr().err == (
        f"wallet: {backup} is a backup of SQLite: copy --from sqlite:///{backup} --to ... puts it"
        " into Postgres\n")
    with open(backup, "wb") as file:
        file.write(b"PGDMP")  # As a dump begins.
    assert wallet_cli.main(["restore", backup, "--dsn", "postgresql://db/wallet"]) == 2
    assert f"pg_restore --exit-on-error --single-transaction --dbname='dbname=wallet host=db' {backup}" in (
        capsys.readouterr().err)


# Migrating ########################################################################################


@pytest.mark.parametrize("version", wallet_module.MIGRATIONS)
def test_migrate_brings_an_older_database_here_and_says_from_where(durable_dsn, version, capsys):
    database = wallet_module.open_database(durable_dsn, 1, True)
    location = database.location
    for statement in map(database.adapt, schema_of(version)):
        database.write(lambda tx, sql=statement: tx(sql))
    database.close()
    assert wallet_cli.main(["accounts", "--dsn", durable_dsn]) == 2
    assert "bring it there by the command migrate" in capsys.readouterr().err
    assert wallet_cli.main(["migrate", "--dsn", durable_dsn]) == 0
    assert capsys.readouterr() == (
        f"{location} was brought from version {version} of the tables to version 4\n", "")
    assert wallet_cli.main(["migrate", "--dsn", durable_dsn]) == 0
    assert capsys.readouterr() == (
        f"{location} has version 4 of the tables already, and nothing was to do\n", "")
    assert wallet_cli.main(["migrate", "--dsn", durable_dsn, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"database": location, "from": 4, "to": 4}


# The command line #################################################################################


def test_serve_serves_and_a_flag_needs_no_value(file_dsn):
    Wallet(file_dsn).close()
    with served("--must-exist", "serve", "--metrics", "--dsn", file_dsn) as server:
        status, _, _ = send(server.url, "GET", "/livez")
        assert status == 200
        shown = subprocess.run(["curl", "-s", f"{server.url}/metrics"], capture_output=True,
                               timeout=60, check=True)
        assert b"wallet_requests_total" in shown.stdout


def test_flag_takes_a_value_where_one_follows_and_the_next_command_is_none():
    def parsed(*arguments):
        given = wallet_cli._parse_arguments(arguments)
        return given["command"], given["metrics"], given["must-exist"]

    assert parsed("--metrics") == ("serve", 1, 0)
    assert parsed("--metrics", "1", "--must-exist", "0") == ("serve", 1, 0)
    assert parsed("--metrics", "--must-exist") == ("serve", 1, 1)
    assert parsed("--metrics", "verify", "--must-exist") == ("verify", 1, 1)
    assert parsed("--metrics", "0", "verify", "--must-exist=1") == ("verify", 0, 1)
    with pytest.raises(ConfigurationError, match="--metrics or WALLET_METRICS must be an integer"):
        parsed("--metrics", "yes")


@pytest.mark.parametrize(
    "one", [one for one in wallet_commands.COMMANDS if one.run], ids=lambda one: one.name)
def test_no_command_works_in_memory(refusal, one):
    example = one.example.replace("postgresql://db/wallet", "sqlite://").replace("--json", "")
    told = refusal(*shlex.split(example), "--dsn", "sqlite://")
    assert told == "wallet: what is in memory would be gone at once: name a file\n"


def test_completion_completes_commands_options_choices_and_files_in_bash(tmp_path):
    script = tmp_path / "wallet.bash"
    done = command("completion", "bash", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    script.write_text(done.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["wallet.bash"]
    (tmp_path / "backup.db").touch()
    complete = """
        source "$1"; shift
        function=$(complete -p wallet | grep -o -- '-F [a-z_]*' | cut -c4-)
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=${#COMP_LINE}
        $function wallet "${@: -1}" "${@: -2:1}"
        printf '%s\\n' "${COMPREPLY[@]}"
    """

    def completed(*words):
        done = subprocess.run(
            ["bash", "--norc", "-c", complete, "bash", str(script), "wallet", *words],
            capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert done.stderr == ""
        return {word.strip() for word in done.stdout.split()}

    names = {one.name for one in wallet_commands.COMMANDS}
    assert completed("") >= names
    assert completed("hi") == {"history"}
    assert completed("f") == {"find", "freeze"}
    assert {"--dsn", "--metrics", "--version"} <= completed("--")
    assert {"--csv", "--type", "--json", "--dsn"} <= completed("history", "--")
    assert completed("history", "acc", "--type", "ch") == {"charge"}
    assert completed("completion", "") >= {"bash", "zsh"}
    assert completed("backup", "ba") == {"backup.db"}


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_completion_knows_other_shells(shell, refusal):
    done = command("completion", shell)
    assert (done.returncode, "history" in done.stdout) == (0, True)
    assert "SHELL: invalid choice: 'ksh'" in refusal("completion", "ksh")


def test_libraries_of_the_commands_are_loaded_only_where_they_are_needed(file_dsn):
    program = """
import sys, wallet, wallet_cli
loaded = lambda: {'wcwidth', 'shtab'} & sys.modules.keys()
wallet.create_app(wallet.Wallet())
assert wallet_cli.main(['init', '--dsn', sys.argv[1]]) == 0
assert not loaded(), loaded()
assert wallet_cli.main(['accounts', '--dsn', sys.argv[1]]) == 0
assert loaded() == {'wcwidth'}
"""
    subprocess.run([sys.executable, "-c", program, file_dsn], check=True, env=environment(),
                   timeout=60, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("wcwidth", ["accounts"]), ("wcwidth", ["topup", "ACCOUNT", "5"]),
     ("shtab", ["completion", "zsh"])],
)
def test_library_that_is_not_installed_is_one_line_and_no_money_moves(
    file_dsn, name, arguments, monkeypatch, capsys
):
    with Wallet(file_dsn) as wallet:
        ada, _ = wallet.register("Ada")
        monkeypatch.setitem(sys.modules, name, None)
        arguments = [ada.id if one == "ACCOUNT" else one for one in arguments]
        assert wallet_cli.main([*arguments, "--dsn", file_dsn]) == 2
        assert capsys.readouterr() == (
            "", f"wallet: {name} is not installed: pip install {name}\n")
        assert wallet.account(ada.id).balance == 0


def test_main_may_be_called_by_a_program_that_reads_what_it_prints(file_dsn, monkeypatch):
    Wallet(file_dsn).close()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert wallet_cli.main(["register", "Ada", "--dsn", file_dsn, "--json"]) == 0
    assert json.loads(sys.stdout.getvalue())["name"] == "Ada"
