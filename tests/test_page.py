"""The page, in a real browser."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import os
import re
import subprocess
import threading
import time
import wsgiref.simple_server
from concurrent.futures import ThreadPoolExecutor

import pytest
from bottle import Bottle
from iso4217 import Currency

import wallet as wallet_module
from tests.support import NARROW, NARROWEST, PAGE, STORED, WIDE, Visit, check_accessible, in_browser
from wallet import AMOUNT_MAX, create_app, running

# The page, in a browser ###########################################################################

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
        "script-src": hashes["script"],
        "style-src": hashes["style"],
    }
    assert next(iter(policy)) == "default-src"
    markup = PAGE.decode().replace(page_parts("script")[0], "").replace(page_parts("style")[0], "")
    assert re.findall(r"<[^>]*\s(?:on\w+|style)\s*=", markup) == []
    assert re.findall(r'(?:href|src|action)="(?!docs"|openapi\.yaml")[^"]*', markup) == []
    assert (
        re.findall(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|localStorage|parseFloat|cookie",
            page_parts("script")[0],
        )
        == []
    )


@in_browser
def test_user_of_the_page_registers_tops_up_is_refused_and_finds_all_again_after_a_reload(
    kiosk, visit
):
    tab = visit(kiosk.url, refusals=[402])
    name = "Ada <b>Bold</b> <script>alert(1)</script>"
    tab.field("Name").fill(name)
    tab.press("Register")
    tab.see("#balance", "$0.00")
    token = tab.see("#token").inner_text()
    account = kiosk.wallet.authenticate(token)
    assert (account.name, tab.page.evaluate(STORED)) == (name, token)
    tab.see("#end", "Nothing has moved yet. Top up, and the first entry stands here.")

    tab.move("Top up", amount="12.50", description="Salary <i>November</i> & more")
    tab.see("#said", "Topped up $12.50. The balance is $12.50.")
    tab.see("#balance", "$12.50")
    tab.move("Charge", amount="20")
    tab.see(".error", "The balance is too low. $12.50 is available, and this needs $20.00.")
    assert tab.field("Amount").get_attribute("aria-invalid") == "true"
    assert tab.page.evaluate("document.activeElement.name") == "amount"
    tab.move("Charge", amount="2")
    tab.see("#said", "Charged $2.00. The balance is $10.50.")
    tab.see("#entries > li:nth-child(2)")

    tab.page.reload()
    tab.see("#balance", "$10.50")
    tab.see("#entries > li:nth-child(2)")
    charge, topup = tab.rows()
    assert re.fullmatch(r"Charge \N{MINUS SIGN}\$2\.00 .+ Refund balance \$10\.50", charge)
    assert re.fullmatch(
        r"Top up Salary <i>November</i> & more \+\$12\.50 .+ balance \$12\.50", topup
    )
    assert tab.page.locator("#entries i, #overview b, main script").count() == 0
    tab.see("#owner", name)
    assert token not in tab.page.content()
    assert [one.amount for one in kiosk.wallet.transactions(account.id).transactions] == [200, 1250]

    tab.press("Sign out")
    tab.see("#told", "You are signed out, and this page has forgotten the token.")
    assert tab.page.evaluate("JSON.stringify(sessionStorage)") == "{}"
    assert "12.50" not in tab.page.locator("body").inner_text()
    tab.field("Token").fill(f"  {token}\n")
    tab.press("Open")
    tab.see("#balance", "$10.50")


@in_browser
def test_page_shows_the_token_once_and_copies_it(kiosk, visit):
    tab = visit(kiosk.url)
    tab.field("Name").fill("Grace")
    tab.page.keyboard.press("Enter")
    token = tab.see("#token").inner_text()
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
    assert "high " + shown in tab.see("#plot").text_content()
    assert kiosk.wallet.account(kiosk.ada.id).balance == AMOUNT_MAX
    assert f"+{shown}" in tab.rows()[0]
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 320
    tab.move("Charge", amount=typed)
    tab.see("#balance", nothing)
    assert kiosk.wallet.account(kiosk.ada.id).balance == 0


PARSED = {  # What is typed, to minor units, or a part of what is said of it.
    "USD": {
        "12.50": "1250",
        "12.5": "1250",
        "12": "1200",
        " 0.01 ": "1",
        "007": "700",
        "90071992547409.91": f"{AMOUNT_MAX}",
        "": "Type an amount.",
        "12.505": "USD has 2 decimals: type it as 12.50",
        "0": "more than zero",
        "-5": "12.50",
        "1e3": "12.50",
        "12,50": "12.50: digits and a point",
        "1,250.00": "12.50",
        ".5": "12.50",
        "12.": "12.50",
        "$5": "12.50",
        "NaN": "12.50",
        "٣": "12.50",
        "90071992547409.92": "$90,071,992,547,409.91 at most",
        "9" * 40: "at most",
    },
    "HUF": {"100": "10000", "0.01": "1", "0.001": "HUF has 2 decimals: type it as 12.50."},
    "CLF": {"1.5": "15000", "0.00001": "CLF has 4 decimals: type it as 12.5000."},
    "JPY": {"1250": "1250", "12.5": "JPY has no decimals: type it as 12.", "1.": "digits only"},
    "BHD": {"1.25": "1250", "1.2505": "BHD has 3 decimals: type it as 12.500."},
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
def test_page_sends_no_amount_that_is_wrong_and_says_what_to_type(kiosk, visit):
    tab = visit(kiosk.url, kiosk.token)
    tab.see("#balance")
    for currency, cases in PARSED.items():
        found = tab.page.evaluate(
            """([currency, texts]) => texts.map((text) => {
            try { return String(new Money(...currency).parse(text)); } catch (refusal) { return refusal.fields.amount; }
        })""",
            [[currency, Currency(currency).exponent], list(cases)],
        )
        for (text, expected), result in zip(cases.items(), found, strict=True):
            assert result == expected if expected.isdigit() else expected in result, (
                currency,
                text,
                result,
            )
    tab.move("Top up", amount="12,50")
    tab.see(".error", "Type it as 12.50: digits and a point.")
    tab.move("Transfer", amount="5")
    tab.see(".error", "This is needed.")
    assert kiosk.wallet.transactions(kiosk.ada.id).transactions == []


@pytest.mark.slow
@in_browser
def test_commands_that_the_page_shows_do_in_bash_what_its_buttons_do(kiosk, visit):
    bob, _ = kiosk.wallet.register("Bob")
    kiosk.wallet.topup(kiosk.ada.id, 5000)
    tab = visit(kiosk.url, kiosk.token, refusals=[409])

    def run():
        command = tab.command()
        assert kiosk.token not in command
        done = subprocess.run(
            ["bash", "-c", command],
            env={**os.environ, "TOKEN": kiosk.token},
            capture_output=True,
            text=True,
            timeout=30,
        )
        return json.loads(done.stdout)

    nasty = """it's "quoted" $HOME `id` \\n !! <b> ;&| é😀"""
    kept = {}
    for action, fields in {
        "Top up": {},
        "Charge": {},
        "Hold": {},
        "Transfer": {"to": bob.id},
    }.items():
        tab.choose(action)
        for name, value in {**fields, "amount": "1.25", "description": nasty}.items():
            tab.field({"to": "To account"}.get(name, name.capitalize())).fill(value)
        kept[action] = run()
        assert (kept[action]["amount"], kept[action]["description"]) == (125, nasty)
        tab.press(action)  # With the key that the command had: it was the same movement.
        assert "It was done before, with this key, and not again." in tab.see("#said").inner_text()
    tab.press(
        f"Refund $1.25 of {tab.page.locator('#entries li', has_text='Charge').locator('time').inner_text()}"
    )
    assert run()["reference"] == kept["Charge"]["id"]
    tab.press("Close")
    tab.press("Release $1.25")
    assert run()["status"] == "released"
    tab.see("#held", "Nothing is held.")
    tab.press("Release")
    tab.see("#said", "Released $1.25. It was done before, with this key, and not again.")
    tab.press("Sign out")
    tab.field("Name").fill(nasty)
    assert run()["name"] == nasty
    assert kiosk.wallet.account(kiosk.ada.id).balance == 5000 + 125 - 125 - 125 + 125


@in_browser
def test_page_holds_captures_releases_transfers_and_refunds(kiosk, visit):
    bob, _ = kiosk.wallet.register("Bob")
    kiosk.wallet.topup(kiosk.ada.id, 10000)
    tab = visit(kiosk.url, kiosk.token, refusals=[404, 422])
    tab.move("Hold", amount="40", description="Room 12")
    tab.see("#available", "$60.00")
    tab.see("#reserved", "$40.00")
    tab.press("Capture $40.00")
    tab.field("Amount").fill("30")
    tab.press("Capture")
    tab.see("#said", "Captured $30.00. The balance is $70.00.")
    tab.see("#held", "Nothing is held.")
    tab.move("Hold", amount="5")
    tab.press("Release $5.00")
    tab.press("Release")
    tab.see("#available", "$70.00")

    tab.move("Transfer", to="acc_" + "0" * 16, amount="20")
    tab.see(".error", "There is no such account.")
    tab.move("Transfer", to=bob.id, amount="20", description="x" * 501)
    tab.see(".error", "Description must have at most 500 characters.")
    tab.move("Transfer", to=bob.id, amount="20", description="Rent")
    tab.see("#balance", "$50.00")
    assert f"to {bob.id}" in tab.rows()[0]

    refund = tab.page.get_by_role("button", name="Refund $30.00")
    refund.click()
    tab.field("Amount").fill("31")
    tab.press("Refund")
    tab.see("dialog .error", "The refund is too high. $30.00 can still be refunded.")
    tab.field("Amount").fill("10")
    tab.press("Refund")
    tab.see("#balance", "$60.00")
    tab.see(tab.page.get_by_text("$10.00 refunded"))
    tab.page.get_by_role("button", name="Refund $20.00").click()
    tab.press("Refund")
    tab.see("#balance", "$80.00")
    tab.see(tab.page.get_by_text("refunded", exact=True))
    assert tab.page.get_by_role("button", name="Refund").count() == 0


@pytest.mark.slow
@in_browser
def test_what_is_done_elsewhere_is_shown_within_two_seconds_and_not_asked_for_while_hidden(
    kiosk, visit
):
    tab = visit(kiosk.url, kiosk.token)
    tab.see("#balance", "$0.00")
    started = time.monotonic()
    kiosk.wallet.topup(kiosk.ada.id, 700, "From elsewhere")
    kiosk.wallet.hold(kiosk.ada.id, 300, "A hold")
    tab.see("#available", "$4.00")
    tab.see("#balance", "$7.00")
    tab.see(tab.page.locator("#held bdi"), "A hold")
    tab.see("#plot path")
    assert "From elsewhere" in tab.rows()[0]
    assert time.monotonic() - started < 2
    tab.hide(True)
    with tab.page.expect_response("**/api/account") as last:  # One may be on its way.
        tab.page.evaluate(
            "fetch('api/account', { headers: { Authorization: `Bearer ${session.token}` } })"
        )
    assert last.value.ok
    asked = []
    tab.page.on("request", lambda request: asked.append(request.url))
    kiosk.wallet.charge(kiosk.ada.id, 100)
    tab.page.evaluate("new Promise((resolve) => setTimeout(resolve, 1500))")
    assert asked == []
    tab.hide(False)
    tab.see("#balance", "$6.00")
    steps = tab.page.locator("#plot path").get_attribute("d")
    assert re.fullmatch(
        r"M0 [\d.]+(H[\d.]+V[\d.]+){2}H[\d.]+", steps
    )  # A stepped line, and each movement a step.


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
    kiosk, visit, monkeypatch, careless
):
    if careless:
        read = wallet_module._read_file
        changed = map(str.encode, KEY_EACH_TIME)
        monkeypatch.setattr(
            wallet_module, "_read_file", lambda name, of=tuple(changed): read(name).replace(*of)
        )
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
        tab.see(tab.page.locator("#said"), "Topped up $5.00. The balance is $15.00.")
    else:
        tab.see(
            tab.page.locator("#said"),
            "Topped up $5.00. The balance is $5.00. It was done before, with this key,"
            " and not again.",
        )
    assert len(keys) == 4
    assert len(set(keys)) == (4 if careless else 1)
    assert kiosk.wallet.account(kiosk.ada.id).balance == (1500 if careless else 500)
    assert tab.page.evaluate("sessionStorage.getItem('wallet-pending')") is None


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
    tab.page.evaluate("(token) => signIn(token)", kiosk.token)
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
    tab.page.evaluate("(token) => signIn(token)", kiosk.token)
    tab.see("#reserved", "$0.35")
    tab.see("#held > .empty", "$0.25 is in older holds.")
    assert tab.page.locator("#held > .entry").count() == 10


@pytest.mark.slow
@in_browser
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


@pytest.mark.slow
@in_browser
def test_page_says_what_a_dead_token_a_frozen_account_and_an_issuer_mean(kiosk, visit):
    stale = visit(kiosk.url, kiosk.token, refusals=[401, 403])
    stale.see("#balance")
    token = kiosk.wallet.replace_token(kiosk.ada.id)
    stale.see(
        "#told",
        "This token does not open an account any more: it was replaced, or mistyped. Paste another one.",
    )
    assert stale.page.evaluate(STORED) is None
    stale.field("Token").fill(kiosk.token)
    stale.press("Open")
    stale.see(".error", "It opens no account: it was replaced, or mistyped.")
    stale.field("Token").fill("é")
    stale.press("Open")
    stale.see(".error", "Paste a token: it begins with wlt_.")
    kiosk.wallet.freeze(kiosk.ada.id)
    stale.field("Token").fill(token)
    stale.press("Open")
    stale.see("#frozen")
    stale.move("Top up", amount="5")
    stale.see(".failure", "The account is frozen. Whoever runs the wallet can unfreeze it.")
    with running(kiosk.wallet, "issuer-" * 5) as url:
        tab = visit(url, refusals=[401, 403])
        tab.field("Name").fill("Ada")
        tab.press("Register")
        assert tab.see(".failure").inner_text().startswith("This wallet has an issuer")
        tab.field("Token").fill("issuer-" * 5)
        tab.press("Open")
        tab.see(
            ".error",
            "This route needs the token of an account, and this is the issuer's, whose routes are"
            " /api/accounts/{id} and below.",
        )
        tab.field("Token").fill(token)
        tab.press("Open")
        tab.move("Top up", amount="5")
        tab.see(".failure", "This wallet has an issuer, and this route needs its token.")
        tab.close()


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
            "new Set([...document.querySelectorAll('#entries .amount')].map((one) => one.textContent))"
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
    sequences = tab.page.evaluate("session.entries.map((entry) => Number(entry.id.split('_')[2]))")
    last = int(newest.id.split("_")[2])
    assert sequences == list(range(last, last - len(sequences), -1))
    assert (
        tab.page.evaluate("document.getElementById('entries').children.length")
        == len(sequences)
        < 1000
    )


@pytest.mark.slow
@in_browser
def test_plot_names_each_movement_under_the_pointer_and_by_arrow_keys(kiosk, visit):
    for number in range(1, 6):
        kiosk.wallet.topup(kiosk.ada.id, 100 * number, f"Order <b>{number}</b>")
    kiosk.wallet.charge(kiosk.ada.id, 250)
    tab = visit(kiosk.url, kiosk.token, viewport=NARROW)
    plot = tab.page.get_by_role("slider", name="Movements, by time")
    plot.focus()
    named = tab.see("#named")
    assert named.inner_text().startswith("Charge \N{MINUS SIGN}$2.50 · balance $12.50 · ")
    tab.page.keyboard.press("ArrowLeft")
    assert re.fullmatch(
        r"Top up \+\$5\.00 · balance \$15\.00 · .* · Order <b>5</b>", named.inner_text()
    )
    assert re.fullmatch(
        r"Top up \+\$5\.00, balance \$15\.00, .*, Order <b>5</b>",
        plot.get_attribute("aria-valuetext"),
    )
    assert [plot.get_attribute(f"aria-value{name}") for name in ("min", "now", "max")] == [
        "1",
        "5",
        "6",
    ]
    tab.page.keyboard.press("Home")
    assert "Order <b>1</b>" in named.inner_text()
    plot.blur()
    assert named.inner_text() == ""
    box = plot.bounding_box()
    plot.hover(position={"x": box["width"] - 12, "y": 50})
    assert named.inner_text().startswith("Charge \N{MINUS SIGN}$2.50")
    assert "high $15.00" in plot.text_content()
    assert "low $0.00" in plot.text_content()
    tab.page.mouse.move(0, 0)
    assert named.inner_text() == ""


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
        finally:
            server.shutdown()


class QuietHandler(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, *_):
        pass


@pytest.mark.slow
@in_browser
def test_axe_finds_nothing_in_any_state_of_the_page(kiosk, visit, axe):
    tab = visit(kiosk.url, refusals=[401, 402])
    check_accessible(tab, axe)
    tab.field("Token").fill(kiosk.token)
    tab.press("Open")
    tab.see("#balance", "$0.00")
    check_accessible(tab, axe)
    kiosk.wallet.topup(kiosk.ada.id, AMOUNT_MAX, "x" * 500)
    kiosk.wallet.charge(kiosk.ada.id, 250, "A charge")
    kiosk.wallet.hold(kiosk.ada.id, AMOUNT_MAX // 2, "W" * 100)
    tab.see("#held bdi")
    tab.move("Charge", amount="90000000000000")
    tab.see(".error")
    check_accessible(tab, axe)
    tab.page.get_by_role("button", name="Refund $2.50").click()
    tab.see("dialog .command")
    check_accessible(tab, axe)
    tab.press("Close")
    kiosk.wallet.replace_token(kiosk.ada.id)
    tab.see("#told")
    check_accessible(tab, axe)


@pytest.mark.slow
@in_browser
def test_control_what_a_user_cannot_read_is_found(kiosk, visit, axe):
    tab = visit(kiosk.url)
    for harm, found in (
        ("document.querySelector('label').remove()", "label"),
        ("document.documentElement.style.setProperty('--quiet', '#aaaaaa')", "color-contrast"),
        ("document.getElementById('new-title').style.width = '400px'", "416 == 320"),
    ):
        tab.page.set_viewport_size(WIDE)
        tab.page.reload()
        tab.page.evaluate(harm)
        with pytest.raises(AssertionError, match=found):
            check_accessible(tab, axe)


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
