"""The page, in a real browser."""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
import wsgiref.simple_server
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from bottle import Bottle
from iso4217 import Currency

import wallet as wallet_module
from tests.support import (
    HERE,
    NARROW,
    NARROWEST,
    PAGE,
    STORED,
    Visit,
    check_books,
    in_both_browsers,
    in_browser,
)
from wallet import AMOUNT_MAX, Wallet, create_app, running

MINUS = "\N{MINUS SIGN}"


def wait_until(tab, is_so):
    """Wait until something is so that the page's events tell."""
    deadline = time.monotonic() + 30
    while not is_so():
        tab.page.evaluate("0")  # Each question lets what has come in be handled.
        assert time.monotonic() < deadline


def page_parts(tag):
    """Return what stands in each element of the page that is called so."""
    return re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", PAGE.decode(), re.DOTALL)


def test_page_may_run_what_is_in_it_and_ask_this_wallet_and_nothing_else(api):
    answer = api.send("GET", "/", status=200)
    assert (answer.headers["Content-Type"], answer.body) == ("text/html; charset=utf-8", PAGE)
    hashes = {}
    for tag in ("script", "style"):
        (text,) = page_parts(tag)
        hashes[tag] = (
            "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
        )
    policy = dict(
        part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; ")
    )
    assert policy == {
        **dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors"), "'none'"),
        "connect-src": "'self'",
        "img-src": "data:",
        "script-src": hashes["script"],
        "style-src": hashes["style"],
    }
    assert next(iter(policy)) == "default-src"
    markup = PAGE.decode().replace(page_parts("script")[0], "").replace(page_parts("style")[0], "")
    assert re.findall(r"<[^>]*\s(?:on\w+|style)\s*=", markup) == []
    elsewhere = r'(?:href|src|action)="(?!docs"|openapi\.yaml"|data:|#)[^"]*'
    assert re.findall(elsewhere, markup) == []
    assert (
        re.findall(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|localStorage|parseFloat|cookie",
            page_parts("script")[0],
        )
        == []
    )


@pytest.mark.slow_on("firefox")
@in_browser
@in_both_browsers
def test_user_of_the_page_registers_tops_up_is_refused_and_finds_all_again_after_a_reload(
    kiosk, visit
):
    tab = visit(kiosk.url, refusals=[402])
    name = "Ada <b>Bold</b> <script>alert(1)</script>"
    tab.field("Name").fill(name)
    tab.press("Register")
    tab.see("#balance", "$0.00")
    token = tab.see(".token").inner_text()
    account = kiosk.wallet.authenticate(token)
    assert (account.name, tab.page.evaluate(STORED)) == (name, token)
    tab.press("I have kept it")
    tab.see("#end", "Nothing has moved yet.")

    tab.move("Top up", amount="12.50", description="Salary <i>November</i> & more")
    tab.hear("Topped up $12.50. Balance after it: $12.50.")
    tab.see("#balance", "$12.50")
    tab.move("Charge", amount="20")
    tab.see(".error", "The balance is too low. $12.50 is available, and this needs $20.00.")
    assert tab.field("Amount").get_attribute("aria-invalid") == "true"
    assert tab.page.evaluate("document.activeElement.name") == "amount"
    tab.move("Charge", amount="2")
    tab.hear("Charged $2.00. Balance after it: $10.50.")
    tab.see("#entries > li:nth-child(2)")

    tab.page.reload()
    tab.see("#balance", "$10.50")
    tab.see("#entries > li:nth-child(2)")
    charge, topup = tab.rows()
    assert re.fullmatch(rf"Charge {MINUS}\$2\.00 .+ Details Refund balance \$10\.50", charge)
    assert re.fullmatch(
        r"Top up Salary <i>November</i> & more \+\$12\.50 .+ Details balance \$12\.50", topup
    )
    assert tab.page.locator("#entries i, #summary b, main script").count() == 0
    tab.see("#owner", name)
    assert token not in tab.page.content()
    assert [one.amount for one in kiosk.wallet.transactions(account.id).transactions] == [200, 1250]

    tab.press("Sign out")
    tab.see("#told", "You are signed out, and this page has forgotten the token.")
    assert tab.page.evaluate("JSON.stringify(sessionStorage)") == "{}"
    assert "12.50" not in tab.page.locator("body").inner_text()
    tab.field("Token").fill(f"  {token}\n")
    tab.press("Sign in")
    tab.see("#balance", "$10.50")


@in_browser
def test_page_shows_the_token_once_and_copies_it(kiosk, visit):
    tab = visit(kiosk.url)
    tab.field("Name").fill("Grace")
    tab.page.keyboard.press("Enter")
    token = tab.see(".token").inner_text()
    tab.press("Copy token")
    tab.see("#spoken", "Copied")
    assert tab.page.evaluate("navigator.clipboard.readText()") == token
    tab.press("I have kept it")
    assert token not in tab.page.content()
    assert tab.page.locator("#fresh").is_hidden()
    tab.page.evaluate(
        "Object.defineProperty(navigator, 'clipboard', { value: undefined })"
    )  # As it is without TLS.
    tab.press("Copy id")
    tab.see("#spoken", "Selected: press Ctrl+C")
    assert tab.page.evaluate("getSelection().toString()") == "acc_" + token[4:20]
    assert kiosk.wallet.authenticate(token).name == "Grace"


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize(
    ("kiosk", "typed", "shown", "nothing"),
    [
        ("USD", "90071992547409.91", "$90,071,992,547,409.91", "$0.00"),
        ("JPY", "9007199254740991", "¥9,007,199,254,740,991", "¥0"),
        (
            "BHD",
            "9007199254740.991",
            "BHD\N{NO-BREAK SPACE}9,007,199,254,740.991",
            "BHD\N{NO-BREAK SPACE}0.000",
        ),
        # Of these the browser has other decimals than ISO 4217, or knows nothing.
        (
            "HUF",
            "90071992547409.91",
            "HUF\N{NO-BREAK SPACE}90,071,992,547,409.91",
            "HUF\N{NO-BREAK SPACE}0.00",
        ),
        (
            "KWD",
            "9007199254740.991",
            "KWD\N{NO-BREAK SPACE}9,007,199,254,740.991",
            "KWD\N{NO-BREAK SPACE}0.000",
        ),
        (
            "CLF",
            "900719925474.0991",
            "CLF\N{NO-BREAK SPACE}900,719,925,474.0991",
            "CLF\N{NO-BREAK SPACE}0.0000",
        ),
        (
            "CRD/0",
            "9007199254740991",
            "CRD\N{NO-BREAK SPACE}9,007,199,254,740,991",
            "CRD\N{NO-BREAK SPACE}0",
        ),
    ],
    indirect=["kiosk"],
)
def test_page_is_exact_to_the_last_minor_unit_in_every_currency(
    kiosk, visit, typed, shown, nothing
):
    tab = visit(kiosk.url, kiosk.token, viewport=NARROWEST)
    tab.move("Top up", amount=typed)
    tab.see("#balance", shown)
    tab.see("#available", shown)
    tab.see("#plot .now", shown)
    assert kiosk.wallet.account(kiosk.ada.id).balance == AMOUNT_MAX
    assert f"+{shown}" in tab.rows()[0]
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 320
    tab.move("Charge", amount=typed)
    tab.see("#balance", nothing)
    assert kiosk.wallet.account(kiosk.ada.id).balance == 0


TWO_WAYS = "This can be read in two ways: choose one."
TOO_FINE = "USD has 2 decimals: type it as 12.50. Or choose what is meant."

PARSED = {  # What is typed, to minor units, or a part of what is said of it, with what is asked.
    "USD": {
        "12.50": 1250,
        "12.5": 1250,
        "12": 1200,
        " 0.01 ": 1,
        "007": 700,
        "90071992547409.91": AMOUNT_MAX,
        "90,071,992,547,409.91": AMOUNT_MAX,
        "1,250.00": 125000,
        "1.250,00": 125000,
        "1,250": 125000,
        "12,50": 1250,
        "12,5": 1250,
        ".5": 50,
        ",5": 50,
        "12.": 1200,
        "12,": 1200,
        "$12.50": 1250,
        "12.50 $": 1250,
        "USD 5": 500,
        "usd5": 500,
        "5 USD": 500,
        "1 250,00": 125000,
        "1\N{NO-BREAK SPACE}250,00": 125000,
        "1\N{NARROW NO-BREAK SPACE}250.00": 125000,
        "1 250 000": 125000000,
        "1'250": 125000,
        "1\N{RIGHT SINGLE QUOTATION MARK}250.50": 125050,
        "1,00,000.00": 10000000,
        "1.000.000": 100000000,
        "1.250": (TOO_FINE, 125000),
        "999.999": (TOO_FINE, 99999900),
        "": ("Type an amount.",),
        "$": ("Type an amount.",),
        "12.505": (TOO_FINE, 1250500),
        "1,250.005": ("USD has 2 decimals: type it as 12.50.",),
        "0.125": ("USD has 2 decimals",),
        "0": ("more than zero",),
        "0,00": ("more than zero",),
        "-5": ("Type it as 12.50.",),
        "\N{MINUS SIGN}5": ("12.50",),
        "+5": ("12.50",),
        "1e3": ("12.50",),
        "0x10": ("12.50",),
        "1,2,3": ("12.50",),
        "1.2.3": ("12.50",),
        "1,250,00": ("12.50",),
        "1.250.00": ("12.50",),
        "12 50": ("12.50",),
        "5 EUR": ("12.50",),
        "\N{EURO SIGN}5": ("12.50",),
        "5 5": ("12.50",),
        "1042 250": ("12.50",),  # Two numbers, or a digit too many.
        "0 250": ("12.50",),
        "1 000'000": ("12.50",),
        "1,234,56,789": ("12.50",),
        ".": ("12.50",),
        ",": ("12.50",),
        "NaN": ("12.50",),
        "Infinity": ("12.50",),
        "\N{ARABIC-INDIC DIGIT THREE}": ("12.50",),
        "\N{RIGHT-TO-LEFT OVERRIDE}05.21": ("12.50",),
        "90071992547409.92": ("$90,071,992,547,409.91 at most",),
        "9" * 40: ("at most",),
        "9" * 400 + ".99": ("at most",),
    },
    "EUR": {"12,50 \N{EURO SIGN}": 1250, "\N{EURO SIGN}1.250,00": 125000, "$5": ("12.50",)},
    "HUF": {"100": 10000, "0.01": 1, "0.001": ("HUF has 2 decimals: type it as 12.50.",)},
    "CLF": {
        "1.5": 15000,
        "1.0001": 10001,
        "0.00001": ("CLF has 4 decimals",),
        "1.2 500": ("12.5000",),
    },
    "JPY": {
        "1250": 1250,
        "1,250": 1250,
        "\N{YEN SIGN}1,250": 1250,
        "12.5": ("JPY has no decimals: type it as 12.",),
        "1.250": ("JPY has no decimals: type it as 12. Or choose what is meant.", 1250),
        "1.": 1,
    },
    "BHD": {
        "1.25": 1250,
        "0.250": 250,
        "1,250.000": 1250000,
        "1,250": (TWO_WAYS, 1250000, 1250),
        "1.250": (TWO_WAYS, 1250, 1250000),
        "1.2505": ("BHD has 3 decimals: type it as 12.500.",),
    },
}


@pytest.mark.slow
@in_browser
def test_page_shows_and_reads_every_currency_of_iso_4217_with_its_decimals(kiosk, visit):
    tab = visit(kiosk.url)
    for currency in Currency:
        digits = currency.exponent
        if digits is None:  # As of gold: its decimals are the wallet's to say.
            continue
        shown, read = tab.page.evaluate(
            """([code, digits]) => {
            const money = new Money(code, digits);
            return [money.show(123456789n), String(money.parse(money.decimal(123456789n)))];
        }""",
            [currency.code, digits],
        )
        decimals = re.search(r"\.(\d+)$", shown)
        assert (len(decimals[1]) if decimals else 0, read) == (digits, "123456789"), shown


@pytest.mark.slow
@in_browser
def test_page_sends_no_amount_that_is_wrong_or_has_two_meanings_and_says_what_to_type(kiosk, visit):
    tab = visit(kiosk.url, kiosk.token)
    tab.see("#balance")
    for currency, cases in PARSED.items():
        found = tab.page.evaluate(
            """([currency, texts]) => texts.map((text) => {
            try { return Number(new Money(...currency).parse(text)); }
            catch ({ fields, amounts }) { return [fields.amount, ...amounts.map(Number)]; }
        })""",
            [[currency, Currency(currency).exponent], list(cases)],
        )
        for (text, expected), result in zip(cases.items(), found, strict=True):
            case = (currency, text, result)
            if isinstance(expected, int):
                assert result == expected, case
            else:
                assert isinstance(result, list), case
                assert expected[0] in result[0], case
                assert list(expected[1:]) == result[1:], case
    for typed, message in (
        ("12;50", "Type it as 12.50."),
        ("1.250", TOO_FINE),
        ("0", "It must be more than zero."),
    ):
        tab.move("Top up", amount=typed)
        tab.see(".error", message)
    tab.move("Transfer", amount="5")
    tab.see(".error", "This is needed.")
    assert kiosk.wallet.transactions(kiosk.ada.id).transactions == []


@pytest.mark.slow
@in_browser
@in_both_browsers
def test_page_shows_what_it_understood_of_an_amount_while_it_is_typed(kiosk, visit):
    tab = visit(kiosk.url, kiosk.token)
    preview = tab.see("#forms form:not([hidden])").locator(".preview").filter(visible=True)
    for typed, shown in (
        ("1.250,00", "= $1,250.00"),
        ("12,5", "= $12.50"),
        (".5", "= $0.50"),
        ("1.250", "Is it$1,250.00"),
    ):
        tab.fill(amount=typed)
        tab.see(preview, shown)
        field = tab.field("Amount")
        (described,) = [
            text
            for name in field.get_attribute("aria-describedby").split()
            if (text := tab.page.locator(f"#{name}").text_content())
        ]
        assert described == shown
    tab.fill(amount="12,50")
    tab.press("Top up")
    tab.hear("Topped up $12.50. Balance after it: $12.50.")


FORGETS_NO_CHOICE = ("if (input.value !== known.text) known.text = null;", "")


@pytest.mark.slow
@in_browser
@in_both_browsers
@pytest.mark.parametrize(
    ("kiosk", "typed", "choices"),
    [
        ("USD", "1.250", {"$1,250.00": 125000}),
        ("BHD", "1,250", {"BHD 1,250.000": 1250000, "BHD 1.250": 1250}),
        ("BHD", "1.250", {"BHD 1.250": 1250, "BHD 1,250.000": 1250000}),
    ],
    indirect=["kiosk"],
)
def test_what_is_chosen_of_an_amount_with_two_meanings_is_sent_and_asked_again_the_next_time(
    kiosk, visit, typed, choices
):
    tab = visit(kiosk.url, kiosk.token)
    balance = 0
    for shown, amount in choices.items():
        tab.move("Top up", amount=typed)
        tab.see(".error")
        assert kiosk.wallet.account(kiosk.ada.id).balance == balance
        names = [name.replace(" ", "\N{NO-BREAK SPACE}") for name in choices]
        assert tab.page.locator(".preview button").filter(visible=True).all_text_contents() == names
        tab.press(shown)
        tab.see("#forms .preview", f"= {shown}")
        assert tab.page.evaluate("document.activeElement.name") == "amount"
        tab.press("Top up")
        tab.see("#toast")
        balance += amount
        assert kiosk.wallet.account(kiosk.ada.id).balance == balance


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("kiosk", ["BHD"], indirect=True)
def test_control_a_choice_that_is_not_forgotten_decides_what_is_typed_later(
    kiosk, visit, change_page
):
    change_page(*FORGETS_NO_CHOICE)
    tab = visit(kiosk.url, kiosk.token)
    tab.fill(amount="1.250")
    tab.press("BHD 1.250")
    tab.press("Top up")
    tab.see("#toast")
    tab.move("Top up", amount="1.250")  # Was a thousand times as much meant? Nobody asks.
    tab.see("#balance", "BHD 2.500")


def run_command(language, command, token=""):
    """Run what the page shows, as who copies it would. Return what it prints."""
    program = {"curl": ["bash", "-c"], "Python": [sys.executable, "-c"]}[language]
    done = subprocess.run(
        [*program, command],
        env={**os.environ, "TOKEN": token, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


NASTY = """it's "quoted" $HOME `id` \\n !! <b> ;&| é\N{GRINNING FACE} \N{LINE SEPARATOR}%s {0}"""


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("language", ["curl", "Python"])
def test_commands_that_the_page_shows_do_what_its_buttons_do(kiosk, visit, language):
    bob, _ = kiosk.wallet.register("Bob")
    kiosk.wallet.topup(kiosk.ada.id, 5000)
    tab = visit(kiosk.url, kiosk.token, refusals=[401, 409])
    tab.press(language)
    metadata = {"order": NASTY.replace("=", ""), "__proto__": "'; x"}

    def run():
        command = tab.command()
        assert kiosk.token not in command
        return run_command(language, command, kiosk.token)

    def newest():
        return kiosk.wallet.transactions(kiosk.ada.id).transactions[0]

    def press_too(action):
        tab.press(action)  # With the key that the command had: it was the same movement.
        tab.see(tab.page.locator("#toast", has_text="It was done before, with this key, and not"))

    lines = "\n".join(f"{name} = {value}" for name, value in metadata.items())
    for action, fields in {
        "Top up": {},
        "Charge": {},
        "Hold": {"expires_after": "15 minutes"},
        "Transfer": {"to": bob.id},
    }.items():
        tab.choose(action)
        tab.press(language)
        tab.fill(**fields, amount="1.25", description=NASTY, metadata=lines)
        run()
        made = kiosk.wallet.holds(kiosk.ada.id).holds[0] if action == "Hold" else newest()
        assert (made.amount, made.description, made.metadata) == (125, NASTY, metadata)
        if action == "Hold":
            assert made.expires_at - made.created_at == timedelta(minutes=15)
        if action == "Charge":
            charge = made
        press_too(action)
    tab.open("Refund $1.25")
    tab.fill(amount="0.25", metadata=lines)
    run()
    assert (newest().type, newest().amount, newest().reference) == ("refund", 25, charge.id)
    assert newest().metadata == metadata
    press_too("Refund")
    tab.open("Capture $1.25")
    tab.fill(amount="1", description=NASTY)
    run()
    assert (newest().type, newest().amount, newest().description) == ("charge", 100, NASTY)
    press_too("Capture")
    hold = kiosk.wallet.hold(kiosk.ada.id, 150)
    tab.open("Release $1.50")
    run()
    assert kiosk.wallet.get_hold(kiosk.ada.id, hold.id).status == "released"
    tab.see("#held", "Nothing is held.")
    press_too("Release")
    balance = 5000 + 125 - 125 - 125 + 25 - 100
    assert kiosk.wallet.account(kiosk.ada.id).balance == balance
    assert kiosk.wallet.account(bob.id).balance == 125

    tab.open("Make a new token")
    new = re.search(r"wlt_\w+", run())[0]
    assert kiosk.wallet.authenticate(new) == kiosk.wallet.account(kiosk.ada.id)
    tab.see("#told")  # Of this page the token is the one before.
    tab.press(language)
    tab.fill(name=NASTY)
    made = re.search(r"wlt_\w+", run())[0]
    assert kiosk.wallet.authenticate(made).name == NASTY


@pytest.mark.slow_on("firefox")
@in_browser
@in_both_browsers
def test_page_holds_captures_releases_transfers_and_refunds(kiosk, visit):
    bob, _ = kiosk.wallet.register("Bob")
    kiosk.wallet.topup(kiosk.ada.id, 10000)
    tab = visit(kiosk.url, kiosk.token, refusals=[404, 422])
    tab.move("Hold", amount="40", description="Room 12")
    tab.see("#available", "$60.00")
    tab.see("#reserved", "$40.00")
    tab.open("Capture $40.00")
    tab.field("Amount").fill("30")
    tab.press("Capture")
    tab.hear("Captured $30.00. Balance after it: $70.00.")
    tab.see("#held", "Nothing is held.")
    tab.move("Hold", amount="5")
    tab.open("Release $5.00")
    tab.press("Release")
    tab.see("#available", "$70.00")

    tab.move("Transfer", to="acc_" + "0" * 16, amount="20")
    tab.see(".error", "There is no such account.")
    tab.move("Transfer", to=bob.id, amount="20", description="x" * 501)
    tab.see(".error", "Description must have at most 500 characters.")
    tab.move("Transfer", to=f" {bob.id} ", amount="20", description="Rent")
    tab.see("#balance", "$50.00")
    assert tab.rows()[0].startswith(f"Transfer out Rent {MINUS}$20.00")

    tab.open("Refund $30.00")
    tab.field("Amount").fill("31")
    tab.press("Refund")
    tab.see("dialog .error", "It may be $30.00 at most.")
    tab.field("Amount").fill("10")
    tab.press("Refund")
    tab.see("#balance", "$60.00")
    tab.see(tab.page.get_by_text("$10.00 refunded"))
    tab.open("Refund $20.00")
    tab.press("Refund")
    tab.see("#balance", "$80.00")
    tab.see(tab.page.get_by_text("refunded", exact=True))
    assert tab.page.get_by_role("button", name=re.compile("^Refund")).count() == 0


@pytest.mark.slow
@in_browser
def test_hold_expires_after_what_is_chosen_and_has_its_description_and_metadata(kiosk, visit):
    kiosk.wallet.topup(kiosk.ada.id, 500)
    tab = visit(kiosk.url, kiosk.token)
    tab.choose("Hold")
    chosen = tab.form().get_by_label("Expires after")
    assert chosen.locator("option:checked").text_content() == "7 days"
    for text, length in {
        "15 minutes": timedelta(minutes=15),
        "1 hour": timedelta(hours=1),
        "1 day": timedelta(days=1),
        "7 days": timedelta(days=7),
        "30 days": timedelta(days=30),
    }.items():
        tab.move(
            "Hold", amount="1", expires_after=text, description=text, metadata=f"length = {text}"
        )
        tab.see(tab.page.locator("#held .about").first, text)
        hold = kiosk.wallet.holds(kiosk.ada.id).holds[0]
        assert hold.expires_at - hold.created_at == length
        assert (hold.description, hold.metadata) == (text, {"length": text})
        assert chosen.locator("option:checked").text_content() == "7 days"
    until = tab.page.locator("#held time").first
    assert until.get_attribute("datetime").startswith(f"{hold.expires_at:%Y-%m-%dT%H:%M:%S}")
    tab.see(tab.page.locator("#toast", has_text=f"Held $1.00 until {until.inner_text()}."))


# What is looked at, and when ######################################################################


def settle(tab):
    """Wait until the look that the page has begun, if any, is over."""
    tab.page.evaluate("view.turn.catch(() => {})")


def pass_time(tab, seconds):
    """Let time pass for the page, and each of its looks end before the next second begins."""
    for _ in range(seconds):
        tab.page.clock.run_for(1000)
        settle(tab)


@pytest.fixture
def still_visit(visit):
    """A function that visits the page of a kiosk while time stands still there."""

    def make(kiosk):
        tab = visit(kiosk.url, kiosk.token, context={}, has_clock=True)
        tab.see("#balance")
        tab.page.clock.pause_at(tab.page.evaluate("Date.now()") / 1000 + 1)
        tab.asked = []
        tab.page.on("request", lambda request: tab.asked.append(request.url))
        settle(tab)
        pass_time(tab, 6)  # A look during which the time leapt seems to have been a heavy one.
        return tab

    return make


@pytest.mark.slow
@in_browser
def test_what_is_done_elsewhere_is_shown_within_two_seconds_and_not_asked_for_while_hidden(
    kiosk, still_visit
):
    tab = still_visit(kiosk)
    kiosk.wallet.topup(kiosk.ada.id, 700, "From elsewhere")
    kiosk.wallet.hold(kiosk.ada.id, 300, "A hold")
    pass_time(tab, 2)
    assert tab.page.locator("#balance").inner_text() == "$7.00"
    assert tab.page.locator("#available").inner_text() == "$4.00"
    assert tab.page.locator("#held bdi").inner_text() == "A hold"
    assert tab.page.locator("#plot .now").text_content() == "$7.00"
    assert "From elsewhere" in tab.rows()[0]
    tab.hide(True)
    settle(tab)
    tab.asked.clear()
    kiosk.wallet.charge(kiosk.ada.id, 100)
    tab.page.mouse.move(50, 50)  # Over what is seen of it.
    pass_time(tab, 90)
    assert tab.asked == []
    tab.hide(False)  # Time stands still: it looks at once.
    tab.see("#balance", "$6.00")
    steps = tab.page.locator("#plot path").get_attribute("d")
    assert re.fullmatch(
        r"M0 [\d.]+(H[\d.]+V[\d.]+){2}H[\d.]+", steps
    )  # A stepped line, and each movement a step.


@pytest.mark.slow
@in_browser
def test_page_that_finds_no_wallet_asks_rarely_while_it_is_idle_and_not_while_it_is_hidden(
    kiosk, visit
):
    tab = visit(kiosk.url, context={}, has_clock=True, refusals=["ERR_FAILED"])
    tab.see("#ways")
    asked = []
    tab.page.route("**/api/**", lambda route: (asked.append(route), route.abort()))
    tab.page.reload()

    def count_asked():
        for _ in range(60):
            tab.page.clock.run_for(1000)
            tab.page.evaluate("0")
        return len(asked)

    count_asked()  # Then it is idle.
    asked.clear()
    assert 1 <= count_asked() <= 6
    tab.hide(True)
    count_asked()  # What it had begun has an end.
    asked.clear()
    assert count_asked() == 0
    tab.page.unroute("**/api/**")
    tab.hide(False)
    tab.see("#ways")


NEVER_IDLE = ("const IDLE_MS = 30000;", "const IDLE_MS = Infinity;")


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("careless", [False, True])
def test_idle_page_asks_at_most_six_times_a_minute_and_looks_at_once_when_it_is_used(
    kiosk, still_visit, change_page, careless
):
    if careless:
        change_page(*NEVER_IDLE)
    kiosk.wallet.topup(kiosk.ada.id, 500)
    kiosk.wallet.hold(kiosk.ada.id, 100)  # So a look asks for the holds too.
    tab = still_visit(kiosk)
    pass_time(tab, 20)
    assert len(tab.asked) > 20  # It is used, as far as it knows.
    pass_time(tab, 20)
    minutes = []
    for _ in range(3):
        tab.asked.clear()
        pass_time(tab, 60)
        minutes.append(len(tab.asked))
    if careless:
        assert min(minutes) > 60
        return
    assert all(3 <= asked <= 6 for asked in minutes), minutes
    for touch in (
        lambda: tab.page.mouse.move(40, 40),
        lambda: tab.page.keyboard.press("Shift"),
        lambda: tab.page.mouse.wheel(0, 10),
        lambda: tab.page.evaluate("dispatchEvent(new Event('focus'))"),
    ):
        balance = kiosk.wallet.topup(kiosk.ada.id, 100).balance
        assert tab.page.evaluate("isIdle()")
        touch()  # Time stands still: only this wakes it.
        tab.see("#balance", f"${balance / 100:.2f}")
        pass_time(tab, 40)


@pytest.mark.slow
@in_browser
def test_page_that_is_not_used_keeps_up_while_something_changes(kiosk, still_visit):
    tab = still_visit(kiosk)
    for number in range(1, 8):
        kiosk.wallet.topup(kiosk.ada.id, 100)
        pass_time(tab, 20)
        assert tab.page.locator("#balance").inner_text() == f"${number}.00"
    kiosk.wallet.topup(kiosk.ada.id, 100)
    pass_time(tab, 2)
    assert tab.page.locator("#balance").inner_text() == "$8.00"


# Note at every change of the page whether two of its figures disagree, as a reader might see them.
WATCH_FIGURES = """() => {
    const place = document.getElementById("place");
    const text = (where) => document.querySelector(where)?.textContent;
    const cents = (shown) => Number(shown.replace(/[^0-9]/g, ""));
    window.moments = 0;
    window.disagreements = [];
    new MutationObserver(() => {
        window.moments += 1;
        const [balance, available, held] = ["balance", "available", "reserved"].map((id) =>
            cents(text(`#${id}`)));
        const newest = cents(text("#entries > .entry .more").split("balance")[1]);
        const holds = [...document.querySelectorAll("#held .figure")].map((one) =>
            cents(one.textContent));
        const found = { balance, available, held, newest, drawn: cents(text("#plot .now")),
            holds: holds.reduce((sum, one) => sum + one, 0) };
        if (balance !== newest || balance !== found.drawn || balance !== available + held
            || held !== found.holds) window.disagreements.push(found);
    }).observe(place, { childList: true, characterData: true, subtree: true });
}"""
OF_TWO_MOMENTS = (
    "if (balance === account.balance && (listed === held || !isWhole)) return account;",
    "return account;",
)


@pytest.mark.slow
@in_browser
@in_both_browsers
@pytest.mark.parametrize("careless", [False, True])
def test_balance_available_held_and_history_agree_at_any_moment_while_money_moves_fast(
    kiosk, visit, change_page, caplog, careless
):
    if careless:  # Each figure is from an answer of its own.
        change_page(*OF_TWO_MOMENTS)
    kiosk.wallet.topup(kiosk.ada.id, 100000)
    tab = visit(kiosk.url, kiosk.token)
    tab.see("#entries > .entry")
    stopped, turns = threading.Event(), threading.Semaphore(0)

    def move_money():  # After each request that is answered, while the next ones are.
        while turns.acquire() and not stopped.is_set():
            kiosk.wallet.topup(kiosk.ada.id, 1100)
            held = [kiosk.wallet.hold(kiosk.ada.id, amount).id for amount in (300, 500)]
            kiosk.wallet.capture(kiosk.ada.id, held[0], 200)
            kiosk.wallet.charge(kiosk.ada.id, 850)
            kiosk.wallet.release(kiosk.ada.id, held[1])

    class Turns(logging.Handler):
        def emit(self, record):
            turns.release()

    caplog.set_level(logging.DEBUG, "wallet.access")
    log, handler = logging.getLogger("wallet.access"), Turns()
    log.addHandler(handler)
    tab.page.evaluate(WATCH_FIGURES)
    with ThreadPoolExecutor(1) as threads:
        moving = threads.submit(move_money)
        try:
            for _ in range(12):
                tab.page.evaluate("noteUse(); inTurn(view, view.look)")
                if careless and tab.page.evaluate("window.disagreements.length"):
                    break
        finally:
            log.removeHandler(handler)
            stopped.set()
            turns.release()
        moving.result()
    assert bool(tab.page.evaluate("window.disagreements.slice(0, 3)")) == careless
    assert tab.page.evaluate("window.moments") > (0 if careless else 10)
    balance = kiosk.wallet.account(kiosk.ada.id).balance
    tab.see("#balance", f"${balance / 100:,.2f}")
    tab.see("#held", "Nothing is held.")


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("careless", [False, True])
def test_balance_and_filtered_history_agree_at_any_moment(kiosk, visit, change_page, careless):
    if careless:
        change_page("  await loadLive(); // So that nothing in the list is newer.\n", "")
    kiosk.wallet.topup(kiosk.ada.id, 1000)
    kiosk.wallet.charge(kiosk.ada.id, 100)
    tab = visit(kiosk.url, kiosk.token)
    tab.see("#balance", "$9.00")
    tab.page.evaluate("""() => { window.seen = [];
        const text = (where) => document.querySelector(where)?.textContent.replace("balance ", "");
        new MutationObserver(() => seen.push([text("#balance"), text("#entries .more")]))
            .observe(find("place"), { childList: true, characterData: true, subtree: true }); }""")
    moved = []

    def move(route):  # While the page asks for what the filter finds.
        if not moved:
            moved.append(kiosk.wallet.charge(kiosk.ada.id, 100))
        route.continue_()

    tab.page.route("**/transactions?type=charge*", move)
    tab.page.get_by_label("Type").select_option("Charge")
    tab.see("#end", "2 movements found.")
    tab.see("#balance", "$8.00")
    disagree = [pair for pair in tab.page.evaluate("seen") if pair == ["$9.00", "$8.00"]]
    assert bool(disagree) == careless


@pytest.mark.slow
@in_browser
def test_page_that_stays_open_fills_no_log(kiosk, visit, caplog):
    caplog.set_level(logging.DEBUG, "wallet.access")
    tab = visit(kiosk.url, kiosk.token)
    tab.see("#balance", "$0.00")
    for _ in range(3):  # It looks each second.
        with tab.page.expect_response("**/api/account"):
            pass
    looks = [record for record in caplog.records if record.path == "/api/account"]
    assert [record.levelno for record in looks[:4]] == [logging.INFO, *[logging.DEBUG] * 3]
    shown = [record.path for record in caplog.records if record.levelno >= logging.INFO]
    assert shown.count("/api/account") == 1
    assert len(shown) <= 4


KEY_EACH_TIME = ("if (text) headers", "if (key) key = makeKey();\n  if (text) headers")


@pytest.mark.slow
@pytest.mark.slow_on("True")
@in_browser
@pytest.mark.parametrize("careless", [False, True])
def test_page_sends_again_with_the_same_key_until_there_is_an_answer(
    kiosk, visit, change_page, careless
):
    if careless:
        change_page(*KEY_EACH_TIME)
    tab = visit(kiosk.url, kiosk.token, refusals=[503, "ERR_FAILED"])
    tab.see("#balance", "$0.00")
    keys, fates = [], iter(["lost", 503, "lost", "answered"])

    def handle(route):
        keys.append(route.request.headers["idempotency-key"])
        fate = next(fates)
        if fate == 503:
            return route.fulfill(
                status=503,
                json={
                    "title": "The wallet cannot do this now.",
                    "status": 503,
                    "code": "unavailable",
                    "detail": "Try again.",
                },
            )
        if fate == "answered":
            return route.continue_()
        route.fetch()  # It is done, and the answer does not come.
        return route.abort()

    tab.page.route("**/topup", handle)
    tab.move("Top up", amount="5")
    tab.see(
        ".failure",
        "The wallet cannot do this now. This goes on by itself, with the same key:"
        " it is done once, or not at all.",
    )
    tab.page.reload()  # It goes on after that too.
    if careless:
        tab.hear("Topped up $5.00. Balance after it: $15.00.")
    else:
        tab.hear(
            "Topped up $5.00. Balance after it: $5.00. It was done before, with this key,"
            " and not again."
        )
    assert len(keys) == 4
    assert len(set(keys)) == (4 if careless else 1)
    assert kiosk.wallet.account(kiosk.ada.id).balance == (1500 if careless else 500)
    assert tab.page.evaluate("sessionStorage.getItem('wallet-pending')") is None


TAKES_ANY_ANSWER = (
    "if (answer.ok ? key && !contents.id : !contents.code) throw contents; // A proxy's.",
    "contents.code ??= 'unknown';",
)


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize(
    ("status", "contents", "careless"),
    [
        (500, '{"message": "An unexpected error occurred"}', False),
        (500, '{"message": "An unexpected error occurred"}', True),
        (403, '"no"', False),
        (503, "null", False),
        (401, '{"message": "Unauthorized"}', False),
        (201, "{}", False),
    ],
)
def test_answer_that_is_not_the_wallets_settles_no_movement(
    kiosk, visit, change_page, status, contents, careless
):
    if careless:
        change_page(*TAKES_ANY_ANSWER)
    tab = visit(kiosk.url, kiosk.token, refusals=[status])
    tab.see("#balance", "$0.00")
    keys = []

    def handle(route):
        keys.append(route.request.headers["idempotency-key"])
        if len(keys) > 1:
            return route.continue_()
        route.fetch()  # It is done, and what comes back is a proxy's.
        return route.fulfill(status=status, content_type="application/json", body=contents)

    tab.page.route("**/topup", handle)
    tab.move("Top up", amount="5")
    if careless:
        tab.see("#balance", "$5.00")
        assert tab.page.evaluate("sessionStorage.getItem('wallet-pending')") is None
        assert len(keys) == 1  # And nothing is said: who loads the page anew does it once more.
        return
    tab.hear(
        "Topped up $5.00. Balance after it: $5.00. It was done before, with this key, and not again."
    )
    assert len(keys) == 2
    assert len(set(keys)) == 1


@pytest.mark.slow
@in_browser
def test_who_signs_out_while_a_movement_waits_is_asked_first(kiosk, visit):
    tab = visit(kiosk.url, kiosk.token, refusals=["ERR_FAILED"])
    tab.see("#balance")
    waiting = []
    tab.page.route("**/topup", lambda route: waiting.append(route))
    tab.move("Top up", amount="5")
    wait_until(tab, lambda: waiting)
    tab.press("Sign out")
    tab.see("dialog h2", "A movement has no answer yet")
    tab.press("Close")
    waiting[0].continue_()
    tab.hear("Topped up $5.00. Balance after it: $5.00.")
    tab.press("Sign out")
    tab.see("#told", "You are signed out, and this page has forgotten the token.")


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("careless", [False, True])
def test_movement_without_an_answer_goes_on_with_its_key_under_a_new_token_and_a_reload(
    kiosk, visit, change_page, careless
):
    if careless:
        change_page('if (!from.signal.aborted) kept.removeItem("wallet-pending")',
                    'kept.removeItem("wallet-pending")')
    tab = visit(kiosk.url, kiosk.token, context={}, refusals=["ERR_FAILED"])
    tab.page.on("dialog", lambda dialog: dialog.accept())  # It warns of leaving.
    tab.see("#balance", "$0.00")
    keys = []

    def lose(route):  # It is done, and the answer does not come.
        keys.append(route.request.headers["idempotency-key"])
        route.fetch()
        route.abort()

    tab.page.route("**/topup", lose)
    tab.move("Top up", amount="5")
    tab.see("form .failure", re.compile("^The wallet does not answer."))
    tab.open("Make a new token")
    sent = len(keys)
    tab.place().locator("button.primary").click()
    tab.see(".token")
    wait_until(tab, lambda: len(keys) > sent)
    tab.see("#toast .failure", re.compile("^The wallet does not answer."))
    tab.hide(False)  # So nothing that was begun with the old token pauses any more.
    if careless:
        tab.page.wait_for_function("() => !kept.getItem('wallet-pending')")
        return
    tab.page.reload()
    tab.see("#toast .failure", re.compile("^The wallet does not answer."))
    tab.page.unroute("**/topup")
    tab.hear("Topped up $5.00. Balance after it: $5.00. It was done before, with this key,"
             " and not again.")
    assert len(set(keys)) == 1
    assert kiosk.wallet.account(kiosk.ada.id).balance == 500


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("careless", [False, True])
def test_movement_that_waits_when_one_signs_out_is_not_done_with_the_next_token(
    kiosk, visit, change_page, careless
):
    if careless:
        change_page('["token", "pending", "fresh"]', '["token", "fresh"]')
    bob, token = kiosk.wallet.register("Bob")
    tab = visit(kiosk.url, kiosk.token, refusals=["ERR_FAILED"])
    tab.page.route("**/topup", lambda route: route.abort())
    tab.move("Top up", amount="5")
    tab.see("form .failure", re.compile("^The wallet does not answer."))
    tab.press("Sign out")
    tab.press("Sign out all the same")
    tab.see("#told", "You are signed out, and this page has forgotten the token.")
    tab.page.unroute("**/topup")
    tab.sign_in(token)
    tab.see("#owner", "Bob")
    if careless:
        tab.see("#balance", "$5.00")
        return
    assert tab.page.evaluate("[kept.getItem('wallet-pending'), session.pending]") == [None, None]
    assert kiosk.wallet.account(bob.id).balance == 0
    assert kiosk.wallet.account(kiosk.ada.id).balance == 0


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("careless", [False, True])
def test_movement_is_not_begun_while_another_one_waits_and_leaving_warns(
    kiosk, visit, change_page, careless
):
    if careless:
        change_page("if (from.pending) throw", "if (false) throw")
    kiosk.wallet.topup(kiosk.ada.id, 1000)
    tab = visit(kiosk.url, kiosk.token, context={}, refusals=["ERR_FAILED"])
    warnings = []

    def answer(dialog):
        warnings.append(dialog.type)
        dialog.accept()

    tab.page.on("dialog", answer)
    tab.page.route("**/topup", lambda route: route.abort())
    tab.move("Top up", amount="5")
    tab.see("form .failure", re.compile("^The wallet does not answer."))
    tab.move("Charge", amount="2")
    if careless:  # Of the two, it would send only the second one after a reload.
        tab.hear("Charged $2.00. Balance after it: $8.00.")
        return
    tab.see("form .failure", "The movement before this one still waits for its answer.")
    assert kiosk.wallet.account(kiosk.ada.id).balance == 1000
    tab.page.reload()
    assert warnings == ["beforeunload"]
    tab.page.unroute("**/topup")
    tab.hear("Topped up $5.00. Balance after it: $15.00.")
    tab.move("Charge", amount="2")
    tab.hear("Charged $2.00. Balance after it: $13.00.")
    tab.page.reload()
    assert warnings == ["beforeunload"]


@pytest.mark.slow
@in_browser
def test_page_is_calm_while_the_wallet_is_away_and_goes_on_when_it_is_back(kiosk, visit):
    tab = visit(kiosk.url, kiosk.token, refusals=["ERR_FAILED"])
    tab.see("#balance", "$0.00")
    tab.page.route("**/api/**", lambda route: route.abort())
    tab.see(
        "#notice", "The wallet does not answer. What is shown may be old. This goes on by itself."
    )
    kiosk.wallet.topup(kiosk.ada.id, 5)
    tab.page.unroute("**/api/**")
    tab.see("#balance", "$0.05")
    assert tab.page.locator("#notice").inner_text() == ""


@pytest.mark.slow
@in_browser
def test_page_shows_no_hold_that_ended_while_it_looked(kiosk, visit):
    kiosk.wallet.topup(kiosk.ada.id, 500)
    hold = kiosk.wallet.hold(kiosk.ada.id, 125)
    tab = visit(kiosk.url)
    asked = threading.Event()

    def handle(route):  # It has read the account already, where 125 are held.
        if not asked.is_set():
            kiosk.wallet.release(kiosk.ada.id, hold.id)
        asked.set()
        route.continue_()

    tab.page.route("**/api/holds*", handle)
    tab.sign_in(kiosk.token)
    tab.see("#held", "Nothing is held.")
    tab.see("#available", "$5.00")
    assert asked.is_set()


@pytest.mark.slow
@in_browser
def test_page_says_what_is_in_holds_that_it_does_not_list(kiosk, visit):
    kiosk.wallet.topup(kiosk.ada.id, 5000)
    for amount in (25, *[1] * 10):
        kiosk.wallet.hold(kiosk.ada.id, amount)
    tab = visit(kiosk.url)

    def handle(route):  # It reads one page: of ten holds here, where it asks for a hundred.
        route.continue_(url=route.request.url.replace("limit=100", "limit=10"))

    tab.page.route("**/api/holds*", handle)
    tab.sign_in(kiosk.token)
    tab.see("#reserved", "$0.35")
    tab.see("#held > .empty", "$0.25 is in older holds.")
    assert tab.page.locator("#held > .entry").count() == 10


@pytest.mark.slow
@in_browser
@in_both_browsers
def test_page_begins_again_when_a_backup_is_restored_under_it(kiosk, visit):
    for amount in (100, 200, 300):
        kiosk.wallet.topup(kiosk.ada.id, amount)
    tab = visit(kiosk.url, kiosk.token, refusals=[409])
    tab.see("#balance", "$6.00")

    def restore(tx):
        tx("DELETE FROM transactions WHERE sequence > 1")
        tx("UPDATE accounts SET balance = 100, last_sequence = 1")

    kiosk.wallet.database.write(restore)
    tab.see("#balance", "$1.00")
    assert tab.page.locator("#entries > .entry").count() == 1
    kiosk.wallet.topup(kiosk.ada.id, 50)
    tab.see("#balance", "$1.50")
    assert tab.page.locator("#entries > .entry").count() == 2


TRUSTS_IDS = (
    ("if (next && list === from.live && balanceBefore(next) !== balance) break;", ""),
    ("&& balance !== account.balance) beginAnew(from);", "&& false) beginAnew(from);"),
)


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("amounts", [[10, 20], [10, 20, 30]])
@pytest.mark.parametrize("careless", [False, True])
def test_nothing_is_left_of_a_history_that_a_backup_replaced_where_ids_are_given_again(
    kiosk, visit, change_page, amounts, careless
):
    if careless:
        change_page(*TRUSTS_IDS[len(amounts) == 2])
    for amount in (100, 200, 300):
        kiosk.wallet.topup(kiosk.ada.id, amount)
    tab = visit(kiosk.url, kiosk.token)
    tab.see("#balance", "$6.00")

    def restore(tx):
        tx("DELETE FROM transactions WHERE sequence > 1")
        tx("UPDATE accounts SET balance = 100, last_sequence = 1")

    tab.hide(True)
    tab.page.evaluate("view.turn.catch(() => {})")
    kiosk.wallet.database.write(restore)
    for amount in amounts:
        kiosk.wallet.topup(kiosk.ada.id, amount)
    tab.page.evaluate("refresh(), view.turn")
    tab.hide(False)
    balances = [entry.balance for entry in kiosk.wallet.transactions(kiosk.ada.id).transactions]
    shown = [int(re.search(r"\d+\.\d\d$", row)[0].replace(".", "")) for row in tab.rows()]
    assert (shown == balances) is not careless
    if not careless:
        tab.see("#balance", f"${balances[0] / 100:.2f}")


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("careless", [False, True])
def test_refund_that_a_restored_backup_does_not_have_is_forgotten(
    kiosk, visit, change_page, careless
):
    if careless:
        change_page("  refunds.clear();\n", "")
    kiosk.wallet.topup(kiosk.ada.id, 600)
    charge = kiosk.wallet.charge(kiosk.ada.id, 100)
    kiosk.wallet.refund(kiosk.ada.id, charge.id)
    tab = visit(kiosk.url, kiosk.token, refusals=[409])
    tab.see("#balance", "$6.00")

    def restore(tx):
        tx("DELETE FROM transactions WHERE sequence > 2")
        tx("UPDATE accounts SET balance = 500, last_sequence = 2")

    kiosk.wallet.database.write(restore)
    tab.see("#balance", "$5.00")
    row = tab.rows()[0]
    assert row.startswith(f"Charge {MINUS}$1.00")
    assert ("refunded" in row, "Refund" in row) == (careless, not careless)


@pytest.mark.slow
@in_browser
def test_page_says_what_a_dead_token_and_a_frozen_account_mean(kiosk, visit):
    stale = visit(kiosk.url, kiosk.token, refusals=[401, 403])
    stale.see("#balance")
    token = kiosk.wallet.replace_token(kiosk.ada.id)
    stale.see(
        "#told",
        "This token is not valid any more: it was replaced. Paste another one.",
    )
    assert stale.page.evaluate(STORED) is None
    stale.field("Token").fill(kiosk.token)
    stale.press("Sign in")
    stale.see(".error", "This token is not valid: it was replaced, or mistyped.")
    stale.field("Token").fill("é")
    stale.press("Sign in")
    stale.see(".error", "Paste a token: that of an account begins with wlt_.")
    kiosk.wallet.freeze(kiosk.ada.id)
    stale.field("Token").fill(token)
    stale.press("Sign in")
    stale.see("#frozen")
    stale.move("Top up", amount="5")
    stale.see("form .failure", "The account is frozen. Whoever runs the wallet can unfreeze it.")


@pytest.mark.slow
@in_browser
def test_holder_is_offered_nothing_that_needs_the_issuer(kiosk, visit):
    kiosk.wallet.topup(kiosk.ada.id, 500)
    kiosk.wallet.charge(kiosk.ada.id, 200)
    kiosk.wallet.hold(kiosk.ada.id, 100)
    offered = []
    with running(kiosk.wallet, "issuer-" * 5) as url:
        for one in (url, kiosk.url):
            tab = visit(one, refusals=[401])
            tab.see("#ways")
            offered.append([tab.page.get_by_role("button", name="Register").count()])
            tab.field("Token").fill(kiosk.token)
            tab.press("Sign in")
            tab.see("#entries > .entry")
            assert tab.page.locator("nav").is_hidden()
            radios = tab.page.get_by_role("radio")
            offered[-1] += [radio.get_attribute("value") for radio in radios.all()]
            offered[-1] += [tab.page.get_by_role("button", name=re.compile("^Refund")).count()]
            tab.open(f"Details of Charge {MINUS}$2.00, balance $3.00")
            offered[-1] += [tab.place().get_by_role("button", name="Refund").count()]
            if one == url:
                tab.press("Close")
                tab.move("Hold", amount="0.50")  # What is offered works.
                tab.see(tab.page.locator("#toast", has_text="Held $0.50 until"))
            tab.close()
    assert offered == [
        [0, "charge", "hold", "transfer", 0, 0],
        [1, "topup", "charge", "hold", "transfer", 1, 1],
    ]


@pytest.mark.slow
@in_browser
def test_history_of_thousands_loads_as_one_scrolls_and_stays_smooth(kiosk, visit):
    for first in range(0, 2000, 1000):
        kiosk.wallet.batch(
            [{"type": "topup", "amount": 1 + number} for number in range(first, first + 1000)],
            account_id=kiosk.ada.id,
        )
    tab = visit(kiosk.url, kiosk.token)
    more = tab.page.get_by_role("button", name="Show older")
    more.focus()
    tab.page.keyboard.press("Enter")
    tab.see("#entries > li:nth-child(150)")
    tab.page.evaluate("""() => { window.longest = 0; let last = performance.now(); const tick = (now) => {
        window.longest = Math.max(window.longest, now - last); last = now; requestAnimationFrame(tick); };
        requestAnimationFrame(tick); }""")
    tab.page.wait_for_function(
        "() => { scrollTo(0, document.body.scrollHeight);"
        " return document.getElementById('entries').children.length === 2000; }"
    )
    tab.see("#end", "The history begins here.")
    assert (
        tab.page.evaluate(
            "new Set([...document.querySelectorAll('#entries .figure')].map((one) => one.textContent))"
            ".size"
        )
        == 2000
    )
    kiosk.wallet.charge(kiosk.ada.id, 1, "The newest")
    # Playwright's own expectations take a picture of all rows for the case of failure, which takes
    # them many seconds.
    tab.page.wait_for_function(
        "() => document.querySelector('#entries bdi').textContent === 'The newest'"
    )
    assert tab.page.evaluate("window.longest") < 1000
    tab.hide(True)  # For so long that it is better to begin anew than to load all that was missed.
    for _ in range(2):
        kiosk.wallet.batch([{"type": "topup", "amount": 1}] * 999, account_id=kiosk.ada.id)
    newest = kiosk.wallet.charge(kiosk.ada.id, 1, "The very newest")
    tab.page.evaluate("scrollTo(0, 0)")
    tab.hide(False)
    tab.page.wait_for_function(
        "() => document.querySelector('#entries bdi').textContent === 'The very newest'"
    )
    sequences = tab.page.evaluate("view.live.entries.map((entry) => Number(entry.id.split('_')[2]))")
    last = int(newest.id.split("_")[2])
    assert sequences == list(range(last, last - len(sequences), -1))
    assert (
        tab.page.evaluate("document.getElementById('entries').children.length")
        == len(sequences)
        < 1000
    )


def set_times(wallet, *times):
    """Let the entries of a wallet have been made at these times, of RFC 3339."""
    at = [wallet_module._parse_time(one) for one in times]

    def change(tx):
        for sequence, time_us in enumerate(at, 1):
            tx("UPDATE transactions SET created_at = ? WHERE sequence = ?", time_us, sequence)

    wallet.database.write(change)


@pytest.mark.slow
@in_browser
def test_plot_names_each_movement_under_the_pointer_and_has_a_scale_with_dates(kiosk, visit):
    for number in range(1, 6):
        kiosk.wallet.topup(kiosk.ada.id, 100 * number, f"Order <b>{number}</b>")
    kiosk.wallet.charge(kiosk.ada.id, 250)
    set_times(kiosk.wallet, *[f"2025-0{month}-03T09:30:00Z" for month in range(1, 7)])
    tab = visit(kiosk.url, kiosk.token, viewport=NARROW, context={"timezone_id": "Asia/Tokyo"})
    tab.see("#plot-title", "Balance since the beginning: 6 movements")
    plot, named = tab.see("#plot"), tab.page.locator("#named")
    texts = plot.locator("text").all_text_contents()
    assert {"$0.00", "$5.00", "$10.00", "$15.00", "Jan 3, 2025", "now"} <= set(texts)
    assert plot.locator(".now").text_content() == "$12.50"
    box = plot.bounding_box()
    plot.hover(position={"x": 2, "y": 50})
    text = named.inner_text()
    assert text == "Top up +$1.00 · balance $1.00 · Jan 3, 2025, 18:30:00 · Order <b>1</b>"
    assert plot.locator("#mark circle").count() == 1
    places = tab.page.evaluate("view.places.map((place) => place.x)")
    assert places == sorted(places)
    shown = []
    for x in places:
        plot.hover(position={"x": x + 1, "y": box["height"] / 2})
        shown.append(named.inner_text().split(" · ")[:2])
    assert shown == [
        *([f"Top up +${n}.00", f"balance ${n * (n + 1) // 2}.00"] for n in range(1, 6)),
        [f"Charge {MINUS}$2.50", "balance $12.50"],
    ]
    assert tab.page.locator("#course b").count() == 0
    tab.page.mouse.move(0, 0)
    assert named.inner_text() == ""
    assert plot.locator("#mark circle").count() == 0


@pytest.mark.slow
@in_browser
@in_both_browsers
def test_plot_says_what_it_covers_and_stands_as_a_table_with_the_same_figures(kiosk, visit):
    for number in range(60):
        kiosk.wallet.topup(kiosk.ada.id, 100 + number)
    kiosk.wallet.charge(kiosk.ada.id, 250)
    tab = visit(kiosk.url, kiosk.token)
    tab.see("#plot-title")
    assert tab.page.locator("#plot svg").get_attribute("aria-hidden") == "true"
    tab.page.evaluate("showOlder(document.getElementById('more'))")
    tab.see("#plot-title", "Balance since the beginning: 61 movements")
    tab.page.locator("#plot-table summary").focus()
    tab.page.keyboard.press("Enter")
    table = tab.see(tab.page.get_by_role("table"))
    assert table.get_by_role("columnheader").all_text_contents() == [
        "Time",
        "Movement",
        "Amount",
        "Balance",
    ]
    rows = [row.split("\t") for row in table.locator("tbody").inner_text().split("\n")]
    history = kiosk.wallet.transactions(kiosk.ada.id, limit=100).transactions
    names = {"topup": ("Top up", "+"), "charge": ("Charge", MINUS)}
    assert [row[1:] for row in rows] == [
        [
            names[one.type][0],
            f"{names[one.type][1]}${one.amount / 100:.2f}",
            f"${one.balance / 100:.2f}",
        ]
        for one in history
    ]
    kiosk.wallet.topup(kiosk.ada.id, 5)
    tab.see("#plot-title", "Balance since the beginning: 62 movements")
    assert "+$0.05" in table.locator("tbody tr").first.inner_text()


@pytest.mark.slow
@in_browser
def test_plot_of_what_is_loaded_does_not_claim_the_whole_history(kiosk, visit):
    kiosk.wallet.batch([{"type": "topup", "amount": 1}] * 1000, account_id=kiosk.ada.id)
    tab = visit(kiosk.url)
    tab.page.route("**/api/transactions?*cursor=*", lambda route: None)  # It stays on its way.
    tab.sign_in(kiosk.token)
    tab.see("#plot-title", "Balance over the last 50 movements")
    tab.see("#balance", "$10.00")
    assert "$10.00" in tab.page.locator("#plot").text_content()


# What is said, and where ##########################################################################

# Is the message seen: within the screen, and before all else?
IN_SIGHT = """() => {
    const box = document.getElementById("toast").getBoundingClientRect();
    const seen = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
    return box.width > 0 && box.x >= 0 && box.y >= 0 && box.right <= innerWidth
        && box.bottom <= innerHeight && Boolean(seen?.closest("#toast"));
}"""
PHONE = {"width": 360, "height": 640}


@pytest.mark.slow
@in_browser
@in_both_browsers
@pytest.mark.parametrize("careless", [False, True])
def test_what_was_done_is_said_where_the_eye_is_on_a_phone_also_after_a_dialog(
    kiosk, visit, change_page, careless
):
    if careless:  # It stands at the end of the page.
        change_page("#toast { position: fixed;", "#toast { position: static;")
    for _ in range(20):
        kiosk.wallet.topup(kiosk.ada.id, 500)
    tab = visit(kiosk.url, kiosk.token, viewport=PHONE)
    said = []
    tab.move("Charge", amount="20", description="Shoes")
    tab.hear("Charged $20.00. Balance after it: $80.00.")
    said.append(tab.page.evaluate(IN_SIGHT))
    tab.choose("Hold")
    assert tab.page.locator("#toast").is_hidden()  # What was charged is not said of a hold.
    tab.move("Hold", amount="4.50")
    tab.see(tab.page.locator("#toast", has_text="Held $4.50 until"))
    tab.open("Capture $4.50")
    tab.press("Capture")
    tab.hear("Captured $4.50. Balance after it: $75.50.")
    assert tab.page.locator("dialog").is_hidden()
    said.append(tab.page.evaluate(IN_SIGHT))
    tab.open("Refund $20.00")
    tab.fill(amount="5")
    tab.page.evaluate("scrollTo(0, document.body.scrollHeight)")
    tab.press("Refund")
    tab.hear("Refunded $5.00. Balance after it: $80.50.")
    said.append(tab.page.evaluate(IN_SIGHT))
    assert all(said) == (not careless)
    assert tab.page.locator("#toast").get_attribute("role") == "status"
    tab.press("Close the message")
    assert tab.page.locator("#toast").is_hidden()


@pytest.mark.slow
@in_browser
@in_both_browsers
def test_errors_speak_in_the_currency_beside_the_field_and_are_told_by_more_than_colour(
    kiosk, visit
):
    kiosk.wallet.topup(kiosk.ada.id, 1000)
    kiosk.wallet.hold(kiosk.ada.id, 450)
    charge = kiosk.wallet.charge(kiosk.ada.id, 300)
    tab = visit(kiosk.url, kiosk.token, refusals=[402, 409, 422])

    def see_error(text):
        error = tab.see(".error", text)
        field = tab.field("Amount")
        assert error.get_attribute("id") in field.get_attribute("aria-describedby").split()
        assert field.get_attribute("aria-invalid") == "true"
        assert field.evaluate("(one) => one === document.activeElement")
        assert error.evaluate("(one) => getComputedStyle(one, '::before').content") == '"! "'
        assert field.evaluate("(one) => getComputedStyle(one).borderTopWidth") == "2px"
        gap = error.bounding_box()["y"] - field.bounding_box()["y"]
        assert 0 < gap < 100

    tab.move("Charge", amount="2.51")
    see_error("The balance is too low. $2.50 is available, and this needs $2.51.")
    tab.move("Top up", amount="90071992547409.91")
    see_error(
        "The balance is too high. It is $7.00, and may be $90,071,992,547,409.91 at most."
    )
    tab.fill(amount="5")  # With another amount nothing is wrong with it any more.
    assert tab.field("Amount").get_attribute("aria-invalid") is None
    assert tab.page.locator(".error").filter(visible=True).count() == 0
    tab.open("Capture $4.50")
    tab.fill(amount="4.51")
    tab.press("Capture")
    see_error("It may be $4.50 at most.")
    tab.press("Close")
    tab.open("Refund $3.00")
    kiosk.wallet.refund(kiosk.ada.id, charge.id, 100)  # Elsewhere, meanwhile.
    tab.press("Refund")
    see_error("The refund is too high. $2.00 can still be refunded.")
    tab.press("Close")
    refund = tab.page.get_by_role("button", name=re.compile(r"^Refund \$2\.00"))
    tab.see(refund)
    kiosk.wallet.refund(kiosk.ada.id, charge.id, 200)
    refund.evaluate("(button) => button.click()")
    tab.see("#toast .failure", "All of this charge is refunded already.")
    assert tab.page.evaluate(IN_SIGHT)


# What is kept #####################################################################################


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("careless", [False, True])
def test_new_token_survives_a_reload_and_leaving_warns_until_it_is_kept(
    kiosk, visit, change_page, careless
):
    if careless:
        change_page('kept.setItem("wallet-fresh", encode(tokens))', "tokens")
    tab = visit(kiosk.url, context={})
    warnings = []

    def answer(dialog):
        warnings.append(dialog.type)
        dialog.accept()

    tab.page.on("dialog", answer)
    tab.field("Name").fill("Grace")
    tab.press("Register")
    tab.see("#balance", "$0.00")
    if careless:
        assert tab.page.locator(".token").is_hidden()
        return
    token = tab.see(".token").inner_text()
    tab.page.reload()
    tab.see(".token", token)
    tab.see(".panel bdi", "Grace")
    assert warnings == ["beforeunload"]
    tab.press("Sign out")
    tab.see("#dialog-title", "Have you kept the new token?")
    tab.press("Close")
    tab.see(".token", token)
    tab.see("#balance", "$0.00")
    tab.press("I have kept it")
    assert token not in tab.page.content()
    tab.page.reload()
    tab.see("#balance", "$0.00")
    assert tab.page.locator("#fresh").is_hidden()
    tab.open("Make a new token")
    tab.see("dialog", re.compile("The old token stops working at once."))
    tab.place().locator("button.primary").click()
    tab.see("#fresh")
    new = tab.see(".token").inner_text()
    assert kiosk.wallet.authenticate(new).name == "Grace"
    assert new != token
    tab.page.reload()
    tab.see(".token", new)
    tab.see("#balance", "$0.00")
    assert warnings == ["beforeunload"] * 2
    tab.press("Sign out")
    tab.press("Sign out all the same")
    tab.see("#told", "You are signed out, and this page has forgotten the token.")
    assert new not in tab.page.content()
    assert tab.page.evaluate("JSON.stringify(sessionStorage)") == "{}"
    tab.page.reload()
    assert warnings == ["beforeunload"] * 2


OUT_OF_TURN = ("inTurn(view ?? nobody,\n    () => ask(", "(\n    (work) => work())(() => ask(")


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("careless", [False, True])
def test_new_token_is_not_lost_to_a_look_with_the_old_one(
    kiosk, visit, change_page, careless
):
    if careless:
        change_page(*OUT_OF_TURN)
    tab = visit(kiosk.url, kiosk.token, context={}, has_clock=True, refusals=[401])
    tab.see("#balance")
    asked, answers = [], []
    tab.page.on("request", lambda request: asked.append(request.url))

    def handle(route):  # The token is new, and the answer is slow.
        answers.append((route, route.fetch()))

    tab.page.route("**/api/account/token", handle)
    tab.open("Make a new token")
    tab.place().locator("button.primary").click()
    wait_until(tab, lambda: answers)
    asked.clear()
    for _ in range(5):
        tab.page.clock.run_for(1000)
        tab.page.evaluate("0")
    if careless:
        tab.see("#told")
        assert tab.page.locator(".token").is_hidden()
        return
    assert asked == []
    route, answer = answers[0]
    route.fulfill(response=answer)
    new = tab.see(".token").inner_text()
    assert kiosk.wallet.authenticate(new) == kiosk.wallet.account(kiosk.ada.id)
    tab.see("#balance", "$0.00")


HASTY = ("if (session.isRenewed) throw", "if (false) throw")


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("careless", [False, True])
def test_new_token_is_not_lost_to_a_movement_that_is_sent_with_the_old_one_meanwhile(
    kiosk, visit, change_page, careless
):
    if careless:
        change_page(*HASTY)
    tab = visit(kiosk.url, kiosk.token, refusals=[401, "ERR_FAILED"])
    tab.see("#balance")
    renewals, answered = [], []

    def handle(route):  # The wallet is away until the token is new.
        if not renewals:
            return route.abort()
        answered.append(route.fetch())
        return route.fulfill(response=answered[-1])

    tab.page.route("**/topup", handle)
    tab.page.route("**/api/account/token", lambda route: renewals.append((route, route.fetch())))
    tab.move("Top up", amount="5")
    tab.see("form .failure")
    tab.open("Make a new token")
    tab.place().locator("button.primary").click()
    wait_until(tab, lambda: answered)
    assert answered[0].status == 401
    if careless:
        tab.see("#told")
        assert tab.page.locator(".token").is_hidden()
        return
    route, answer = renewals[0]
    route.fulfill(response=answer)
    new = tab.see(".token").inner_text()
    assert kiosk.wallet.authenticate(new) == kiosk.wallet.account(kiosk.ada.id)
    tab.hear("Topped up $5.00. Balance after it: $5.00.")  # With the new one.
    assert kiosk.wallet.account(kiosk.ada.id).balance == 500


@pytest.mark.slow
@in_browser
def test_account_that_was_registered_stays_on_screen_when_an_earlier_sign_in_is_answered(
    kiosk, visit
):
    tab = visit(kiosk.url)
    waiting = []
    tab.page.route(
        "**/api/account", lambda route: route.continue_() if waiting else waiting.append(route)
    )
    tab.field("Token").fill(kiosk.token)
    tab.press("Sign in")
    wait_until(tab, lambda: waiting)
    tab.field("Name").fill("Grace")
    tab.press("Register")
    tab.see("#owner", "Grace")
    with tab.page.expect_response("**/api/account"):
        waiting[0].continue_()
    tab.press("I have kept it")
    tab.move("Top up", amount="5")
    tab.hear("Topped up $5.00. Balance after it: $5.00.")
    tab.see("#owner", "Grace")
    assert kiosk.wallet.account(kiosk.ada.id).balance == 0


NO_SITE_DATA = """Object.defineProperty(window, "sessionStorage", {
    get() { throw new DOMException("Access is denied for this document.", "SecurityError"); } });"""


def check_works_in_memory(tab):
    """Assert that the page says that it keeps nothing, and works all the same."""
    sentence = (
        "This browser keeps no data of this site, so loading the page anew forgets the token."
    )
    tab.see("#forgetful", sentence)
    tab.field("Name").fill("Grace")
    tab.press("Register")
    token = tab.see(".token").inner_text()
    tab.press("I have kept it")
    tab.move("Top up", amount="5")
    tab.hear("Topped up $5.00. Balance after it: $5.00.")
    tab.see("#forgetful", sentence)
    tab.page.reload()
    tab.see("#forgetful", sentence)
    tab.field("Token").fill(token)
    tab.press("Sign in")
    tab.see("#balance", "$5.00")
    tab.press("Sign out")
    tab.see("#told", "You are signed out, and this page has forgotten the token.")


@pytest.mark.slow
@in_browser
def test_browser_that_keeps_no_site_data_is_told_so_and_the_page_works_in_memory(kiosk, visit):
    tab = visit(kiosk.url)
    tab.see("#ways")
    assert tab.page.locator("#forgetful").is_hidden()
    check_works_in_memory(visit(kiosk.url, context={}, script=NO_SITE_DATA))


# The history's search and file ####################################################################


@pytest.mark.slow
@in_browser
def test_hour_that_the_clock_shows_twice_is_told_apart_by_its_offset(kiosk, visit):
    for _ in range(5):
        kiosk.wallet.topup(kiosk.ada.id, 100)
    hours = ["25T23:59:59", "26T00:30:00", "26T01:30:00", "26T02:00:00", "26T03:30:00"]
    set_times(kiosk.wallet, *[f"2025-10-{hour}Z" for hour in hours])
    for zone, times in {
        "Europe/Berlin": [
            "Oct 26, 2025, 01:59:59",
            "Oct 26, 2025, 02:30:00 +02:00",
            "Oct 26, 2025, 02:30:00 +01:00",
            "Oct 26, 2025, 03:00:00",
            "Oct 26, 2025, 04:30:00",
        ],
        "America/St_Johns": [
            "Oct 25, 2025, 21:29:59",
            "Oct 25, 2025, 22:00:00",
            "Oct 25, 2025, 23:00:00",
            "Oct 25, 2025, 23:30:00",
            "Oct 26, 2025, 01:00:00",
        ],
    }.items():
        tab = visit(kiosk.url, kiosk.token, context={"timezone_id": zone})
        tab.see("#entries > :nth-child(5)")
        shown = tab.page.locator("#entries time").all_text_contents()
        assert shown == times[::-1]
    tab.page.get_by_role("button", name="Details of").first.click()
    full = tab.see("dialog time")
    assert full.text_content() == f"Oct 26, 2025, 01:00:00 {MINUS}02:30"
    assert full.get_attribute("datetime") == "2025-10-26T03:30:00.000000Z"


DAYS_OF_UTC = (
    "new Date(year, month - 1, day + days)",
    "new Date(Date.UTC(year, month - 1, day + days))",
)


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("careless", [False, True])
def test_movement_of_half_past_eleven_at_night_belongs_to_the_day_of_the_reader(
    kiosk, visit, change_page, careless
):
    if careless:
        change_page(*DAYS_OF_UTC)
    for number in range(1, 6):
        kiosk.wallet.topup(kiosk.ada.id, 100 * number)
    times = ["06-30T21:59:59", "06-30T22:00:00", "07-01T21:30:00", "07-01T21:59:59"]
    set_times(kiosk.wallet, *[f"2025-{time}Z" for time in (*times, "07-01T22:00:00")])
    tab = visit(kiosk.url, kiosk.token, context={"timezone_id": "Europe/Berlin"})
    tab.see("#entries > :nth-child(5)")
    tab.page.get_by_label("From").fill("2025-07-01")
    tab.page.get_by_label("To", exact=True).fill("2025-07-01")
    tab.see("#end", "3 movements found.")
    found = tab.page.locator("#entries .figure").all_text_contents()
    if careless:
        assert found == ["+$5.00", "+$4.00", "+$3.00"]
        return
    assert found == ["+$4.00", "+$3.00", "+$2.00"]
    tab.page.get_by_label("From").fill("")
    tab.see("#end", "4 movements found.")
    tab.page.get_by_label("To", exact=True).fill("2025-06-30")
    tab.see("#end", "1 movement found.")
    tab.page.get_by_label("To", exact=True).fill("")
    tab.see("#end", "The history begins here.")
    assert tab.page.locator("#entries > .entry").count() == 5


@pytest.mark.slow
@in_browser
@in_both_browsers
def test_history_is_filtered_by_type_and_stays_so_while_more_is_done(kiosk, visit):
    for _ in range(60):
        kiosk.wallet.topup(kiosk.ada.id, 500)
        kiosk.wallet.charge(kiosk.ada.id, 100)
    tab = visit(kiosk.url, kiosk.token)
    tab.see("#balance", "$240.00")
    tab.page.get_by_label("Type").select_option("Charge")
    tab.page.wait_for_function("() => find('entries').children.length >= 50")
    tab.page.evaluate("find('more').scrollIntoView()")
    tab.see("#end", "60 movements found.")
    assert {row.split()[0] for row in tab.rows()} == {"Charge"}
    kiosk.wallet.topup(kiosk.ada.id, 1)
    kiosk.wallet.charge(kiosk.ada.id, 2, "The newest")
    tab.see("#balance", "$239.99")
    tab.see("#end", "61 movements found.")
    assert tab.rows()[0].startswith(f"Charge The newest {MINUS}$0.02")
    tab.page.get_by_label("Type").select_option("Refund")
    tab.see("#end", "0 movements found.")
    tab.page.get_by_label("Type").select_option("All types")
    tab.see(tab.page.locator("#entries > .entry").nth(1).locator(".figure"), "+$0.01")


@pytest.mark.slow
@in_browser
def test_movement_or_hold_is_found_by_its_id_and_shown_with_all_that_is_known(kiosk, visit):
    bob, _ = kiosk.wallet.register("Bob")
    topup = kiosk.wallet.topup(kiosk.ada.id, 5000, "The first", metadata={"order": "1042", "a": ""})
    for _ in range(120):  # So it is not on the first pages.
        kiosk.wallet.topup(kiosk.ada.id, 1)
    charge = kiosk.wallet.charge(kiosk.ada.id, 300)
    refund = kiosk.wallet.refund(kiosk.ada.id, charge.id, 100)
    transfer = kiosk.wallet.transfer(kiosk.ada.id, bob.id, 200)
    hold = kiosk.wallet.hold(kiosk.ada.id, 400, "Room 12", metadata={"room": "12"})
    tab = visit(kiosk.url, kiosk.token, refusals=[404])
    tab.see("#balance")

    def find(id):
        tab.field("Id", exact=True).fill(id)
        tab.press("Find")

    def facts():
        tab.see("dialog[open] dl")
        names, values = (
            tab.page.locator(f"dialog {tag}").all_inner_texts() for tag in ("dt", "dd")
        )
        return dict(zip(names, (value.replace("\n", " ") for value in values), strict=True))

    find(f" {topup.id} ")
    tab.see("#dialog-title", "Top up")
    found = facts()
    full = rf"\w+ \d+, \d{{4}}, \d\d:\d\d:\d\d [+{MINUS}]\d\d:\d\d"
    assert re.fullmatch(full, found.pop("Time"))
    assert found == {
        "Amount": "+$50.00",
        "Balance after": "$50.00",
        "Id": f"{topup.id} Copy",
        "Description": "The first",
        "Metadata": "order = 1042 a = ",
    }
    tab.press("Copy")
    tab.see("#spoken", "Copied")
    assert tab.page.evaluate("navigator.clipboard.readText()") == topup.id
    tab.press("Close")
    find(refund.id)
    assert facts()["Of"] == f"{charge.id} Show"
    tab.press("Show")
    tab.see("#dialog-title", "Charge")
    tab.press("Refund")
    tab.see("#dialog-title", "Refund a charge of $2.00")
    tab.press("Close")
    find(transfer.id)
    assert facts()["Other account"] == bob.id
    tab.press("Close")
    find(hold.id)
    tab.see("#dialog-title", "Hold")
    found = facts()
    assert (found["Status"], found["Captured"]) == ("active", "$0.00")
    assert found["Metadata"] == "room = 12"
    tab.open("Release $4.00")
    tab.press("Release")
    tab.hear("Released $4.00.")
    find(hold.id)
    tab.see("dialog[open] dl")
    assert facts()["Status"] == "released"
    tab.press("Close")
    for id, message in (
        ("order 5", "An id begins with txn_ or hld_."),
        ("acc_" + "0" * 16, "An id begins with txn_ or hld_."),
        ("txn_../../account", re.compile("^There is no such route.")),
        ("txn_" + "0" * 16 + "_1", "This account has no such transaction."),
    ):
        find(id)
        tab.see("#history-search .failure", message)
    tab.field("Id", exact=True).fill("")
    tab.press("Find")
    assert tab.page.locator("#history-search .failure").is_hidden()


def read_csv(tab, delimiter=","):
    """Download what the history shows. Return the bytes' beginning and the rows."""
    with tab.page.expect_download() as downloading:
        tab.page.get_by_role("button", name=re.compile("Download (these )?as CSV")).click()
    path = downloading.value.path()
    name = downloading.value.suggested_filename
    contents = Path(path).read_bytes()
    text = contents.decode("utf-8-sig")
    return name, contents[:3], list(csv.DictReader(io.StringIO(text, ""), delimiter=delimiter))


@pytest.mark.slow
@in_browser
def test_csv_has_exactly_what_is_shown_and_spreadsheets_take_nothing_for_a_formula(kiosk, visit):
    for number in range(129):
        kiosk.wallet.topup(kiosk.ada.id, 1250 + number)
    formulas = ["=1+1", "+1", "-1", "@SUM(A1)", ' "=1', "1;=2", "\N{FULLWIDTH EQUALS SIGN}1"]
    for text in formulas:
        kiosk.wallet.charge(kiosk.ada.id, 5, text)
    nasty = {"__proto__": 'a "b"; c, d', "order": "<b>"}
    kiosk.wallet.charge(kiosk.ada.id, 7, 'Says "hi", é', metadata=nasty)
    history = [*kiosk.wallet.statement(kiosk.ada.id)][::-1]
    tab = visit(kiosk.url, kiosk.token)
    tab.see("#entries > .entry")
    name, mark, rows = read_csv(tab)
    tab.hear(f"137 movements saved as {name}.")
    assert (name, mark) == (f"wallet-{kiosk.ada.id}-all.csv", b"\xef\xbb\xbf")
    assert [row["id"] for row in rows] == [one.id for one in history]
    assert tab.page.locator("#entries > .entry").count() == len(rows)
    for row, one in zip(rows, history, strict=True):
        sign = "-" if one.type == "charge" else ""
        assert row["type"] == one.type
        assert (row["amount"], row["balance"], row["currency"]) == (
            f"{sign}{one.amount / 100:.2f}",
            f"{one.balance / 100:.2f}",
            "USD",
        )
    guarded = {row["description"] for row in rows[1:8]}
    assert guarded == {
        "'=1+1",
        "'+1",
        "'-1",
        "'@SUM(A1)",
        "' \"=1",
        "1;'=2",
        "'\N{FULLWIDTH EQUALS SIGN}1",
    }
    assert rows[0]["description"] == 'Says "hi", é'
    assert json.loads(rows[0]["metadata"]) == nasty
    tab.page.get_by_label("Type").select_option("Charge")
    tab.see("#end", "8 movements found.")
    _, _, rows = read_csv(tab)
    shown = tab.page.locator("#entries .figure").all_text_contents()
    assert [f"{MINUS}${row['amount'][1:]}" for row in rows] == shown
    assert len(rows) == 8


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("kiosk", ["JPY", "BHD"], indirect=True)
def test_csv_names_the_currency_with_its_decimals_and_what_a_refund_is_of(kiosk, visit):
    kiosk.wallet.topup(kiosk.ada.id, 1250)
    tab = visit(kiosk.url, kiosk.token)
    tab.see("#entries > .entry")
    _, _, (row,) = read_csv(tab)
    amount = {"JPY": "1250", "BHD": "1.250"}[kiosk.wallet.currency]
    assert (row["amount"], row["balance"]) == (amount, amount)
    assert row["currency"] == kiosk.wallet.currency
    charge = kiosk.wallet.charge(kiosk.ada.id, 250)
    refund = kiosk.wallet.refund(kiosk.ada.id, charge.id)
    tab.see("#entries > :nth-child(3)")
    _, _, rows = read_csv(tab)
    assert [(row["id"], row["reference"]) for row in rows[:2]] == [
        (refund.id, charge.id),
        (charge.id, ""),
    ]


@pytest.mark.slow
@in_browser
def test_csv_is_as_spreadsheets_of_the_reader_expect_it(kiosk, visit):
    kiosk.wallet.topup(kiosk.ada.id, 125050, "Hallo; Welt")
    kiosk.wallet.charge(kiosk.ada.id, 1, "Ende")
    set_times(kiosk.wallet, "2025-10-26T00:30:00Z", "2025-10-26T01:30:00Z")
    for locale, zone, delimiter, mark, times in (
        ("de-DE", "Europe/Berlin", ";", ",", [("02:30:00", "+02:00"), ("02:30:00", "+01:00")]),
        ("en-US", "America/St_Johns", ",", ".", [("22:00:00", "-02:30"), ("23:00:00", "-02:30")]),
        ("fr-CH", "UTC", ";", ",", [("00:30:00", "+00:00"), ("01:30:00", "+00:00")]),
    ):
        tab = visit(kiosk.url, kiosk.token, context={"locale": locale, "timezone_id": zone})
        tab.see("#entries > .entry")
        _, _, (charge, topup) = read_csv(tab, delimiter)
        day = "2025-10-25" if zone == "America/St_Johns" else "2025-10-26"
        for row, (time_of_day, offset) in zip((topup, charge), times, strict=True):
            assert (row["time"], row["utc_offset"]) == (f"{day} {time_of_day}", offset)
        assert (topup["amount"], topup["balance"]) == (f"1250{mark}50",) * 2
        assert (charge["amount"], charge["balance"]) == (f"-0{mark}01", f"1250{mark}49")
        assert (topup["description"], topup["id"][:4]) == ("Hallo; Welt", "txn_")
        tab.see("#balance", "$1,250.49")  # The page itself speaks English.


@pytest.mark.slow
@in_browser
@in_both_browsers
def test_what_is_typed_in_a_dialog_takes_the_place_of_the_amount_that_stood_there(kiosk, visit):
    kiosk.wallet.topup(kiosk.ada.id, 5000)
    kiosk.wallet.hold(kiosk.ada.id, 4000)
    tab = visit(kiosk.url, kiosk.token, viewport=PHONE)
    tab.open("Capture $40.00")
    tab.see("dialog .preview", "= $40.00 of $40.00")
    tab.page.keyboard.type("30")
    tab.see("dialog .preview", "= $30.00 of $40.00")
    tab.page.keyboard.type("00")
    tab.see("dialog .preview", "It may be $40.00 at most.")
    tab.page.keyboard.press("Backspace")
    tab.page.keyboard.press("Backspace")
    tab.page.keyboard.press("Enter")
    tab.hear("Captured $30.00. Balance after it: $20.00.")


@pytest.mark.slow
@in_browser
def test_dialog_that_is_worked_in_is_neither_replaced_nor_closed_by_what_was_begun_before(
    kiosk, visit
):
    kiosk.wallet.topup(kiosk.ada.id, 10000)
    slow, quick = (
        kiosk.wallet.charge(kiosk.ada.id, 1000, description=text) for text in ("Slow", "Quick")
    )
    tab = visit(kiosk.url, kiosk.token, refusals=["ERR_FAILED"])
    waiting = []
    tab.page.route(f"**/*after={slow.id}", lambda route: waiting.append(route))
    buttons = {
        text: tab.page.locator(".entry", has_text=text).get_by_role("button", name="Refund")
        for text in ("Slow", "Quick")
    }
    for end in ("continue_", "abort"):
        buttons["Slow"].click()
        wait_until(tab, lambda: waiting)
        buttons["Quick"].click()
        tab.see("dialog[open]")
        tab.fill(amount="1", description=end)
        getattr(waiting.pop(), end)()
        tab.see(buttons["Slow"].and_(tab.page.locator(":not([aria-busy])")))
        tab.place().locator("button.primary").click()
        tab.hear(f"Refunded $1.00. Balance after it: ${81 + (end == 'abort')}.00.")
    refunds = kiosk.wallet.transactions(kiosk.ada.id, type="refund").transactions
    assert {refund.reference for refund in refunds} == {quick.id}


@pytest.mark.slow
@in_browser
def test_charge_that_thousands_of_refunds_followed_says_what_is_refunded_of_it(kiosk, visit):
    kiosk.wallet.topup(kiosk.ada.id, 10000)
    old, other = (kiosk.wallet.charge(kiosk.ada.id, 5000) for _ in range(2))
    for _ in range(1001):
        kiosk.wallet.refund(kiosk.ada.id, other.id, 1)
    kiosk.wallet.refund(kiosk.ada.id, old.id, 5000)
    for _ in range(50):
        kiosk.wallet.topup(kiosk.ada.id, 1)
    tab = visit(kiosk.url, kiosk.token)
    tab.see("#balance")
    tab.page.get_by_label("Type").select_option("Charge")
    tab.see("#end", "2 movements found.")
    assert [re.search(r"(\$[\d.]+ )?refunded", row)[0] for row in tab.rows()] == [
        "$10.01 refunded",
        "refunded",
    ]


@pytest.mark.slow
@in_browser
def test_charge_says_what_is_refunded_of_it_however_the_history_is_filtered(kiosk, visit):
    kiosk.wallet.topup(kiosk.ada.id, 50000)
    whole = kiosk.wallet.charge(kiosk.ada.id, 300, "Whole")
    part = kiosk.wallet.charge(kiosk.ada.id, 300, "Part")
    kiosk.wallet.refund(kiosk.ada.id, whole.id)
    for _ in range(2):
        kiosk.wallet.refund(kiosk.ada.id, part.id, 50)
    kiosk.wallet.batch([{"type": "topup", "amount": 1}] * 120, account_id=kiosk.ada.id)
    tab = visit(kiosk.url, kiosk.token)
    tab.see("#balance")
    tab.page.get_by_label("Type").select_option("Charge")
    tab.see("#end", "2 movements found.")
    rows = tab.rows()
    assert re.search(r"Part .* \$1\.00 refunded Refund ", rows[0])
    assert re.search(r"Whole .* Details refunded balance", rows[1])
    kiosk.wallet.refund(kiosk.ada.id, part.id, 25)
    tab.see(tab.page.get_by_text("$1.25 refunded"))
    for charge, refunded in ((whole, "$3.00"), (part, "$1.25")):
        tab.page.get_by_label("Id", exact=True).fill(charge.id)
        tab.press("Find")
        found = tab.see("dialog dl").text_content()
        assert f"Refunded{refunded}" in found
        tab.press("Close")
    tab.page.get_by_label("Id", exact=True).fill(whole.id)
    tab.press("Find")
    tab.see("dialog dl")
    tab.press("Refund")
    tab.see("#toast > span", "All of this charge is refunded already.")
    assert tab.page.locator("dialog").is_hidden()


@pytest.mark.slow
@in_browser
def test_message_of_what_was_done_goes_after_a_while_and_one_of_a_failure_stays(kiosk, visit):
    kiosk.wallet.topup(kiosk.ada.id, 500)
    charge = kiosk.wallet.charge(kiosk.ada.id, 100)
    tab = visit(kiosk.url, kiosk.token, context={}, has_clock=True)
    tab.move("Top up", amount="1")
    tab.hear("Topped up $1.00. Balance after it: $5.00.")
    tab.page.clock.run_for(15_000)
    tab.hear("Topped up $1.00. Balance after it: $5.00.")
    tab.page.clock.run_for(10_000)
    tab.page.locator("#toast").wait_for(state="hidden")
    kiosk.wallet.refund(kiosk.ada.id, charge.id)
    tab.page.get_by_label("Id", exact=True).fill(charge.id)
    tab.press("Find")
    tab.see("dialog dl")
    tab.press("Refund")
    tab.see("#toast .failure")
    tab.page.clock.run_for(60_000)
    tab.see("#toast .failure", "All of this charge is refunded already.")


@pytest.mark.slow
@in_browser
def test_refusal_of_a_form_is_brought_into_sight_and_gone_with_the_next_action(kiosk, visit):
    kiosk.wallet.freeze(kiosk.ada.id)
    tab = visit(kiosk.url, kiosk.token, viewport=PHONE, refusals=[403])
    tab.see("#frozen")
    tab.fill(amount="5")
    tab.field("Amount").evaluate("it => scrollTo(0, it.offsetTop + it.offsetHeight - innerHeight)")
    tab.page.keyboard.press("Enter")
    box = tab.see("form .failure").bounding_box()
    assert 0 <= box["y"] <= PHONE["height"] - box["height"]
    kiosk.wallet.freeze(kiosk.ada.id, False)
    tab.choose("Hold")
    tab.fill(amount="5")
    kiosk.wallet.topup(kiosk.ada.id, 500)
    tab.press("Hold")
    tab.see("#reserved", "$5.00")
    tab.choose("Top up")
    assert tab.page.locator("form .failure").filter(visible=True).count() == 0


# What helps, and what must not harm ###############################################################


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("careless", [False, True])
@pytest.mark.parametrize("fate", ["continue_", "abort"])
def test_dialog_that_is_filled_in_stays_when_what_was_asked_for_before_comes_late(
    kiosk, visit, change_page, careless, fate
):
    if careless:
        change_page('find("dialog").matches("[open]:has(form)")', "false")
    kiosk.wallet.topup(kiosk.ada.id, 5000)
    kiosk.wallet.hold(kiosk.ada.id, 4000)
    kiosk.wallet.charge(kiosk.ada.id, 700)
    tab = visit(kiosk.url, kiosk.token, refusals=["ERR_FAILED"])
    late = []
    tab.page.route("**/transactions?type=refund*", lambda route: late.append(route))
    tab.page.get_by_role("button", name="Refund $7.00").click()
    wait_until(tab, lambda: late)
    tab.open("Capture $40.00")
    tab.fill(amount="3")
    getattr(late[0], fate)()
    tab.page.wait_for_function("() => !document.querySelector('#entries [aria-busy=true]')")
    title, fields = tab.page.evaluate("""() => [find("dialog-title").textContent,
        [...document.querySelectorAll("dialog[open] [name=amount]")].map((one) => one.value)]""")
    if careless:
        lost = {"continue_": ("Refund ", ["7.00"]), "abort": ("Capture", [])}
        assert (title[:7], fields) == lost[fate]
        return
    assert (title, fields) == ("Capture a hold of $40.00", ["3"])
    tab.press("Capture")
    tab.hear("Captured $3.00. Balance after it: $40.00.")


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("careless", [False, True])
def test_history_that_is_scrolled_and_saved_at_once_has_each_movement_once(
    kiosk, visit, change_page, careless
):
    if careless:
        change_page("if (list.isStarted && !list.cursor) return;", "")
    for _ in range(60):
        kiosk.wallet.topup(kiosk.ada.id, 500)
    tab = visit(kiosk.url, kiosk.token)
    tab.see("#balance", "$300.00")
    late = []
    tab.page.route("**/transactions?*cursor=*", lambda route: late.append(route))
    tab.page.evaluate("find('more').scrollIntoView()")
    wait_until(tab, lambda: late)
    with tab.page.expect_download() as downloading:
        tab.page.get_by_role("button", name="Download as CSV").click()
        tab.page.unroute_all()  # What waited goes on.
    rows = Path(downloading.value.path()).read_text().splitlines()[1:]
    assert (len(rows) == 60) != careless
    tab.see("#end", "The history begins here.")
    assert tab.page.locator("#entries > .entry").count() == 60


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("careless", [False, True])
def test_filter_that_has_no_answer_yet_is_waited_for_before_its_rows_are_saved(
    kiosk, visit, change_page, careless
):
    if careless:
        change_page("(!list.isStarted || list.cursor) && pages", "list.cursor && pages")
    kiosk.wallet.topup(kiosk.ada.id, 500)
    kiosk.wallet.charge(kiosk.ada.id, 200)
    tab = visit(kiosk.url, kiosk.token)
    tab.see("#balance", "$3.00")
    late = []
    tab.page.route("**/transactions?type=charge*", lambda route: late.append(route))
    tab.page.get_by_label("Type").select_option("Charge")
    wait_until(tab, lambda: late)
    with tab.page.expect_download() as downloading:
        tab.page.get_by_role("button", name="Download these as CSV").click()
        tab.page.unroute_all()  # What waited goes on.
    assert len(Path(downloading.value.path()).read_text().splitlines()) == (1 if careless else 2)
    tab.see("#end", "1 movement found.")


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("careless", [False, True])
def test_filtered_history_catches_up_after_a_look_that_failed(
    kiosk, visit, change_page, careless
):
    if careless:
        change_page("  list.newest = newest;\n", "")
        change_page("list.newest === newest", "live.entries[0] === before")
        begin = "  await loadLive();\n  const newest"
        change_page(begin, f"  const before = live.entries[0];\n{begin}")
    kiosk.wallet.topup(kiosk.ada.id, 500)
    kiosk.wallet.charge(kiosk.ada.id, 200)
    tab = visit(kiosk.url, kiosk.token, refusals=["ERR_FAILED"])
    tab.see("#balance", "$3.00")
    tab.page.get_by_label("Type").select_option("Charge")
    tab.see("#end", "1 movement found.")
    tab.page.route("**/transactions?type=charge*", lambda route: route.abort())
    kiosk.wallet.charge(kiosk.ada.id, 100)
    tab.see("#notice", re.compile("^The wallet does not answer."))
    tab.page.unroute_all()
    tab.see("#balance", "$2.00")
    found = "1 movement found." if careless else "2 movements found."
    assert tab.page.locator("#end").text_content() == found


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("careless", [False, True])
def test_what_is_done_elsewhere_is_shown_within_two_seconds_over_a_slow_line_too(
    kiosk, still_visit, change_page, careless
):
    if careless:
        change_page("const took = 3 *", "const took = 10 *")
    tab = still_visit(kiosk)
    late = []
    tab.page.route("**/api/**", lambda route: late.append(route))

    def answer():
        wait_until(tab, lambda: late)
        tab.page.clock.run_for(220)
        late.pop().continue_()

    tab.page.clock.run_for(1000)
    answer()
    answer()  # The account, and what is new in its history.
    settle(tab)
    kiosk.wallet.topup(kiosk.ada.id, 700)
    tab.page.clock.run_for(1500)
    if careless:
        tab.page.evaluate("0")
        assert late == []
        return
    answer()
    answer()
    tab.see("#balance", "$7.00")


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("careless", [False, True])
def test_message_that_goes_takes_no_focus_and_gives_back_what_it_had(
    kiosk, visit, change_page, careless
):
    if careless:
        change_page("if (hadFocus) keepFocus();", "keepFocus();")
    tab = visit(kiosk.url, kiosk.token, context={}, has_clock=True)
    tab.move("Top up", amount="1")
    tab.hear("Topped up $1.00. Balance after it: $1.00.")
    tab.page.evaluate("document.activeElement.blur()")
    tab.page.clock.run_for(25_000)
    tab.page.locator("#toast").wait_for(state="hidden")
    focused = "document.activeElement.id || document.activeElement.localName"
    assert tab.page.evaluate(focused) == ("title" if careless else "body")
    tab.move("Top up", amount="1")
    tab.page.get_by_role("button", name="Close the message").press("Enter")
    tab.page.locator("#toast").wait_for(state="hidden")
    assert tab.page.evaluate(focused) == "title"


@pytest.mark.slow
@in_browser
@in_both_browsers
def test_icon_of_the_page_is_in_it_and_can_be_drawn(kiosk, visit):
    tab = visit(kiosk.url)
    icon = tab.page.evaluate("""async () => {
        const image = new Image();
        image.src = document.querySelector("link[rel=icon]").href;
        await image.decode();
        return [image.src.slice(0, 19), image.width > 0];
    }""")
    assert icon == ["data:image/svg+xml,", True]


@pytest.mark.slow
@in_browser
def test_focus_is_where_one_types_first_and_no_keyboard_pops_up_on_a_phone(kiosk, visit):
    focused = "() => document.activeElement.name ?? document.activeElement.tagName"
    tab = visit(kiosk.url)
    tab.see("#ways")
    assert tab.page.evaluate(focused) == "name"
    tab.sign_in(kiosk.token)
    tab.see("#balance")
    assert tab.page.evaluate(focused) == "amount"
    kiosk.wallet.topup(kiosk.ada.id, 500)
    tab.move("Hold", amount="5")
    tab.open("Capture $5.00")
    assert tab.page.evaluate(focused) == "amount"
    tab.press("Close")
    tab.open("Release $5.00")
    assert tab.page.evaluate("document.activeElement.textContent") == "Release"
    tab.page.keyboard.press("Escape")
    assert tab.page.evaluate("document.activeElement.textContent") == "Release"
    tab = visit(
        kiosk.url, kiosk.token, viewport=PHONE, context={"has_touch": True, "is_mobile": True}
    )
    tab.see("#balance")
    assert tab.page.evaluate(focused) != "amount"


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("careless", [False, True])
def test_button_that_is_busy_says_so_and_does_not_begin_again(
    kiosk, visit, change_page, careless
):
    if careless:
        change_page('if (button.ariaBusy === "true") return;', "")
    tab = visit(kiosk.url)
    waiting = []
    tab.page.route("**/api/register", lambda route: waiting.append(route))
    tab.field("Name").fill("Grace")
    tab.page.get_by_role("button", name="Register").dblclick()
    if not careless:
        tab.field("Name").press("Enter")
        button = tab.see("button[aria-busy=true]", "Register")
        assert button.evaluate("(one) => getComputedStyle(one, '::after').content") == '" …"'
        assert tab.field("Name").evaluate("(one) => one.readOnly")
    wait_until(tab, lambda: waiting)
    tab.page.unroute("**/api/register")  # It goes on, and whatever else comes is done at once.
    tab.see(".token")
    if careless:
        wait_until(tab, lambda: len([*kiosk.wallet.accounts()]) == 3)
        return
    assert tab.page.locator("[aria-busy=true]").count() == 0
    assert [one.name for one in kiosk.wallet.accounts()] == ["Grace", "Ada"]


@pytest.mark.slow
@in_browser
def test_copy_buttons_copy_what_stands_beside_them(kiosk, visit):
    tab = visit(kiosk.url, kiosk.token)
    tab.see("#balance")
    tab.press("Copy id")
    tab.see("#spoken", "Copied")
    assert tab.page.evaluate("navigator.clipboard.readText()") == kiosk.ada.id
    for language in ("curl", "Python"):
        tab.press(language)
        assert tab.page.get_by_role("button", name="Copy", exact=True).is_disabled()
        tab.fill(amount="5")
        command = tab.command()
        tab.page.evaluate("find('spoken').textContent = ''")
        tab.press("Copy")
        tab.see("#spoken", "Copied")
        assert tab.page.evaluate("navigator.clipboard.readText()") == command
        tab.fill(amount="")


# Each figure of the page whose characters do not run from left to right.
TURNED_AROUND = r"""() => {
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const turned = [];
    while (walker.nextNode()) {
        const node = walker.currentNode;
        for (const { 0: { length }, index } of node.data.matchAll(/\$[\d,.]+\d/g)) {
            const edges = [index, index + length - 1].map((at) => {
                const range = document.createRange();
                range.setStart(node, at);
                range.setEnd(node, at + 1);
                return range.getBoundingClientRect().left;
            });
            if (edges[0] > edges[1]) turned.push(node.data);
        }
    }
    return turned;
}"""
EVIL = (
    "<img src=x onerror=alert(1)><script>alert(2)</script>"
    "\N{RIGHT-TO-LEFT ISOLATE}\N{POP DIRECTIONAL ISOLATE}\N{POP DIRECTIONAL ISOLATE}"
    "\N{RIGHT-TO-LEFT OVERRIDE}"
)


@pytest.mark.slow
@in_browser
@in_both_browsers
def test_names_descriptions_and_metadata_of_an_attacker_are_text_and_turn_nothing_around(
    kiosk, visit
):
    evil, token = kiosk.wallet.register(EVIL)
    metadata = {"__proto__": EVIL, "constructor": "x" * 500, EVIL[:40]: "W" * 500, "toString": ""}
    kiosk.wallet.topup(evil.id, 123456, EVIL, metadata=metadata)
    kiosk.wallet.hold(evil.id, 98765, EVIL, metadata=metadata)
    charge = kiosk.wallet.charge(evil.id, 1234, EVIL, metadata=metadata)
    tab = visit(kiosk.url, token, viewport=NARROWEST)

    def check():
        assert tab.page.evaluate(TURNED_AROUND) == []
        harm = tab.page.locator("img, iframe, object, body script:not(:last-child)").count()
        assert harm == 0
        assert tab.page.evaluate("document.documentElement.scrollWidth") == 320
        dialog = tab.page.locator("dialog")
        assert dialog.evaluate("(one) => one.scrollWidth <= one.clientWidth")

    tab.see("#owner", evil.name)
    tab.see("#held .entry")
    plot = tab.page.locator("#plot")
    plot.hover(position={"x": 5, "y": 50})
    assert EVIL in tab.page.locator("#named").text_content()
    check()
    for name in (
        f"Details of Charge {MINUS}$12.34, balance $1,222.22",
        "Details of the hold of $987.65",
    ):
        tab.open(name)
        shown = tab.page.locator("dialog pre").text_content().split("\n")
        assert shown == [f"{key} = {value}" for key, value in metadata.items()]
        check()
        tab.press("Close")
    tab.open("Refund")
    check()
    tab.press("Refund")
    tab.hear("Refunded $12.34. Balance after it: $1,234.56.")
    check()
    tab.page.locator("#plot-table summary").click()
    check()
    tab.move("Top up", amount="5", metadata="__proto__ = polluted\nconstructor = x")
    tab.hear("Topped up $5.00. Balance after it: $1,239.56.")
    made = kiosk.wallet.transactions(evil.id).transactions[0]
    assert made.metadata == {"__proto__": "polluted", "constructor": "x"}
    assert tab.page.evaluate("({}).polluted === undefined && Object.keys({}).length === 0")
    assert kiosk.wallet.transaction(evil.id, charge.id).metadata == metadata


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("careless", [False, True])
def test_name_of_an_attacker_turns_no_figure_around_that_the_issuer_is_told(
    kiosk, visit, change_page, careless
):
    if careless:
        change_page('bdi(owner), ": "', 'owner, ": "')
    evil, _ = kiosk.wallet.register(EVIL)
    with running(kiosk.wallet, "issuer-" * 5) as url:
        tab = visit(url)
        tab.page.evaluate("(id) => { location.hash = id; }", evil.id)
        tab.sign_in("issuer-" * 5)
        tab.move("Top up", amount="1234.56")
        tab.see(tab.page.locator("#toast", has_text="Topped up $1,234.56"))
        assert bool(tab.page.evaluate(TURNED_AROUND)) == careless
        tab.close()


@pytest.mark.slow
@in_browser
@in_both_browsers
def test_metadata_that_is_no_line_of_name_and_value_is_refused_beside_its_field(kiosk, visit):
    tab = visit(kiosk.url, kiosk.token, refusals=[422])
    for typed, message in (
        ("order", "Type a name and a value: order = 1042."),
        ("= 5", "Type a name and a value: order = 1042."),
        ("a = 1\na = 2", "a is there twice."),
        ("n" * 41 + " = 5", "Metadata has a name or a value that must have 1 to 40 characters."),
        (
            "\n".join(f"n{n} = 5" for n in range(21)),
            "Metadata must be an object of at most 20 strings.",
        ),
    ):
        tab.move("Top up", amount="5", metadata=typed)
        tab.see(".error", message)
        assert tab.field("Metadata").get_attribute("aria-invalid") == "true"
    assert kiosk.wallet.transactions(kiosk.ada.id).transactions == []
    tab.fill(metadata="\n  url = https://a/?b=c  \n\n empty =\norder 1042 b\nroom: 5\na b = c d")
    tab.press("Top up")
    tab.hear("Topped up $5.00. Balance after it: $5.00.")
    made = kiosk.wallet.transactions(kiosk.ada.id).transactions[0]
    assert made.metadata == {
        "url": "https://a/?b=c", "empty": "", "order": "1042 b", "room": "5", "a b": "c d"
    }  # fmt: skip


ONE_BY_ONE = (
    "path?.replace(/[A-Z]+/g, (word) => parts[word]);",
    'Object.entries(parts).reduce((text, part) => text?.replace(...part), path);',
)


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("careless", [False, True])
def test_account_whose_id_reads_like_a_part_of_a_path_works_as_any_other(
    monkeypatch, visit, change_page, careless
):
    if careless:
        change_page(*ONE_BY_ONE)
    with Wallet() as wallet, running(wallet, "issuer-" * 5) as url:
        with monkeypatch.context() as patches:
            made = wallet_module._random_base62
            patches.setattr(
                wallet_module,
                "_random_base62",
                lambda length: "ACCOUNTBASEIDIDs" if length == 16 else made(length),
            )
            account, _ = wallet.register("Ida")
        tab = visit(url, refusals=[404])
        tab.page.evaluate("(id) => { location.hash = id; }", account.id)
        tab.sign_in("issuer-" * 5)
        tab.move("Top up", amount="5")
        if careless:
            tab.see(".failure")
            tab.close()
            return
        tab.hear("Ida: Topped up $5.00. Balance after it: $5.00.")
        tab.move("Hold", amount="2")
        tab.open("Capture $2.00")
        tab.press("Capture")
        tab.hear("Ida: Captured $2.00. Balance after it: $3.00.")
        tab.open("Refund")
        tab.press("Refund")
        tab.hear("Ida: Refunded $2.00. Balance after it: $5.00.")
        # An address of the page leads to an account, or nowhere.
        for address in (f"{account.id}/../{account.id}", "acc_/../../livez", "acc_$&", "acc_?x#"):
            with tab.page.expect_response(lambda answer: answer.status == 404) as answer:
                tab.page.evaluate("(address) => { location.hash = address; }", address)
            assert "/api/accounts/acc_" in answer.value.url
            tab.see("#notice")
            assert tab.page.locator("#forms form").count() == 0
        tab.close()
        check_books(wallet)


FOCUSED = """() => {
    const one = document.activeElement;
    return one.getAttribute("aria-label") ?? one.labels?.[0]?.textContent ?? one.textContent;
}"""


@pytest.mark.slow
@in_browser
@in_both_browsers
def test_keyboard_alone_registers_tops_up_holds_captures_and_refunds_on_a_small_screen(
    kiosk, visit
):
    tab = visit(kiosk.url, viewport=PHONE)
    tab.see("#ways")
    keys = tab.page.keyboard

    def go_to(name):
        """Press Tab until it has the focus, which can be seen."""
        for _ in range(80):
            if tab.page.evaluate(FOCUSED).startswith(name):
                assert tab.page.evaluate("document.activeElement.matches(':focus-visible')")
                return
            keys.press("Tab")
        raise AssertionError(f"{name} is not reached.")

    go_to("Name")
    keys.type("Grace")
    keys.press("Enter")
    tab.see(".token")
    go_to("I have kept it")
    keys.press("Enter")
    go_to("Top up")
    go_to("Amount")
    keys.type("100")
    keys.press("Enter")
    tab.hear("Topped up $100.00. Balance after it: $100.00.")
    keys.press("Shift+Tab")
    keys.press("ArrowRight")
    keys.press("ArrowRight")
    go_to("Amount")
    keys.type("40")
    keys.press("Enter")
    tab.see(tab.page.locator("#toast", has_text="Held $40.00 until"))
    go_to("Capture $40.00")
    keys.press("Space")
    go_to("Amount")
    keys.press("Control+a")
    keys.type("30")
    keys.press("Enter")
    tab.hear("Captured $30.00. Balance after it: $70.00.")
    go_to("Refund $30.00")
    keys.press("Enter")
    tab.see("dialog")
    go_to("Amount")
    keys.press("Enter")
    tab.hear("Refunded $30.00. Balance after it: $100.00.")


@pytest.mark.slow
@in_browser
def test_page_works_below_a_path_of_another_site(kiosk, visit):
    outer = Bottle()
    outer.mount("/money/", create_app(kiosk.wallet))
    server = wsgiref.simple_server.make_server(
        "127.0.0.1", 0, outer, wsgiref.simple_server.WSGIServer, QuietHandler
    )
    with server, ThreadPoolExecutor(1) as threads:
        threads.submit(server.serve_forever, 0.05)
        try:
            tab = visit(f"http://127.0.0.1:{server.server_port}/money/", kiosk.token)
            tab.move("Top up", amount="5")
            tab.see("#balance", "$5.00")
            tab.field("Amount").fill("1")
            assert (
                f"'http://127.0.0.1:{server.server_port}/money/api/transactions/topup'"
                in tab.command()
            )
            for language in ("curl", "Python"):
                tab.press(language)
                tab.field("Amount").fill("1")
                run_command(language, tab.command(), kiosk.token)
            tab.see("#balance", "$7.00")
        finally:
            server.shutdown()


class QuietHandler(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, *_):
        pass


@in_browser
def test_control_what_goes_wrong_in_the_page_is_noted(kiosk, chromium):
    with contextlib.closing(Visit(chromium, kiosk.url)) as tab:
        for harm, found in (
            ("setTimeout(() => missing())", "missing is not defined"),
            ("console.error('wrong')", "wrong"),
            ("document.body.setAttribute('style', 'color: red')", "inline style"),
            ("fetch('nowhere')", "404"),
            ("fetch('http://127.0.0.1:9/').catch(() => {})", "http://127.0.0.1:9/"),
            ("addition('script', { textContent: 'window.harmed = true' })", "inline script"),
            ("addition('img', { src: 'openapi.yaml' })", "image"),
        ):
            tab.page.evaluate(
                "() => { const addition = (tag, all) => document.body.append("
                f"Object.assign(document.createElement(tag), all)); {harm}; }}"
            )
            deadline = time.monotonic() + 10
            while not any(
                found in fault for fault in tab.faults
            ):  # Each question lets what has come in be noted.
                assert not tab.page.evaluate("'harmed' in window")
                assert time.monotonic() < deadline, tab.faults
