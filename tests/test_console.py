"""The page for the issuer of a wallet, and whether everyone can use it, in a real browser."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.support import (
    HERE,
    ISSUER_TOKEN,
    NARROWEST,
    PHONE,
    STORED,
    WIDE,
    WRONG_TOKEN,
    check_accessible,
    check_books,
    in_both_browsers,
    in_browser,
)
from tests.test_page import pass_time
from wallet import AMOUNT_MAX, Unauthorized, Wallet, running

NAME = "Ada <b>Bold</b> \N{RIGHT-TO-LEFT OVERRIDE}<img src=x onerror=alert(1)>"
NOBODY = "acc_" + "0" * 16

# The issuer's console #############################################################################


@pytest.fixture
def shop():
    """A wallet that has an issuer and is served, and Ada's account in it."""
    with Wallet() as wallet, running(wallet, ISSUER_TOKEN) as url:
        ada, token = wallet.register("Ada")
        yield SimpleNamespace(wallet=wallet, url=url, ada=ada, token=token)
        check_books(wallet)


@pytest.fixture
def console(shop, visit):
    """A function that opens the issuer's console at an address."""

    def open_at(address, **options):
        tab = visit(shop.url, **options)
        set_address(tab, address)
        tab.sign_in(ISSUER_TOKEN)
        return tab

    return open_at


def set_address(tab, address):
    tab.page.evaluate("(address) => history.replaceState(null, '', `#${address}`)", address)


def go_to(tab, name):
    tab.page.get_by_role("navigation").get_by_role("link", name=name).click()


def wait_for_focus(tab, what):
    """Wait until what has the focus is so, in JavaScript, where `it` has it."""
    tab.page.wait_for_function(f"() => (it => {what})(document.activeElement)")


def hear_part(tab, text):
    """Wait until the page says this, among other things."""
    tab.see("#toast > span", re.compile(re.escape(text)))


def search(tab, text):
    tab.page.get_by_role("searchbox", name="Search").fill(text)


@pytest.mark.slow
@in_browser
@in_both_browsers
def test_issuer_finds_accounts_by_a_part_of_the_name_and_by_the_id(shop, console):
    for number in range(12):
        shop.wallet.register(f"Shop {number}")
    shop.wallet.topup(shop.ada.id, 12345)
    shop.wallet.hold(shop.ada.id, 45)
    tab = console("accounts")
    tab.see("#listed-end", "13 accounts.")
    assert tab.rows("#listed")[0].startswith("Shop 11 ")  # The newest stands on top.
    search(tab, "Shop 1")
    tab.see("#listed-end", "3 accounts.")
    assert [row.split(" $")[0] for row in tab.rows("#listed")] == ["Shop 11", "Shop 10", "Shop 1"]
    search(tab, "  Ad ")
    tab.see("#listed-end", "1 account.")
    assert tab.rows("#listed") == [f"Ada $123.45 {shop.ada.id} $0.45 held"]
    search(tab, "HOP 1")  # Any part of the name will do, in any case.
    tab.see("#listed-end", "3 accounts.")
    search(tab, "Nobody")
    tab.see("#listed-end", "There is no such account.")
    search(tab, "")
    tab.see("#listed-end", "13 accounts.")
    search(tab, shop.ada.id)
    tab.see("#owner", "Ada")
    tab.see("#balance", "$123.45")
    assert tab.page.evaluate("location.hash") == f"#{shop.ada.id}"


@pytest.mark.slow
@in_browser
def test_search_that_is_refused_says_why_and_the_list_goes_on_after_it(shop, console):
    tab = console("accounts", refusals=[400])
    search(tab, "x" * 101)
    tab.see("#notice", "name must have at most 100 characters.")
    search(tab, "")
    tab.see("#listed-end", "1 account.")
    tab.page.wait_for_function("() => !document.getElementById('notice').textContent")
    shop.wallet.register("Bob")
    tab.see("#listed-end", "2 accounts.")


@pytest.mark.slow
@in_browser
@in_both_browsers
def test_list_of_accounts_goes_on_beyond_each_page_and_all_that_is_shown_is_as_it_is_now(
    shop, console
):
    for number in range(259):
        shop.wallet.register(f"Shop {number}")
    tab = console("accounts", viewport=PHONE)
    tab.see("#listed > :nth-child(100)")
    more = tab.page.get_by_role("button", name="Show older")
    more.focus()
    tab.page.keyboard.press("Enter")
    tab.page.wait_for_function("() => document.getElementById('listed').childElementCount === 200")
    wait_for_focus(tab, "it.id === 'listed-more'")
    tab.page.keyboard.press("Enter")
    tab.see("#listed-end", "260 accounts.")
    wait_for_focus(tab, "it.id === 'listed-end'")
    ids = [re.search(r"acc_\w+", row)[0] for row in tab.rows("#listed")]
    assert ids == [account.id for account in shop.wallet.accounts()]

    shop.wallet.topup(shop.ada.id, 700)  # Hers is the oldest, on the third page.
    tab.page.wait_for_function(
        "() => document.querySelector('#listed > :last-child').textContent.includes('$7.00')"
    )
    shop.wallet.freeze(shop.ada.id)
    tab.page.wait_for_function(
        "() => document.querySelector('#listed > :last-child').textContent.includes('(frozen)')"
    )
    shop.wallet.register("The newest")
    tab.see("#listed-end", "261 accounts.")
    assert tab.rows("#listed")[0].startswith("The newest ")


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("careless", [False, True])
def test_idle_list_of_accounts_asks_at_most_six_times_a_minute_however_long_it_is(
    shop, console, change_page, careless
):
    if careless:
        change_page("if (isIdle() && from.wanted > 300) return;", "")
    for number in range(320):
        shop.wallet.register(f"Shop {number}")
    tab = console("accounts", context={}, has_clock=True)
    for shown in (100, 200, 300, 321):
        tab.page.wait_for_function(
            f"() => document.getElementById('listed').childElementCount === {shown}"
        )
        if shown < 321:
            tab.press("Show older")
    tab.page.clock.pause_at(tab.page.evaluate("Date.now()") / 1000 + 1)
    pass_time(tab, 60)
    asked = []
    tab.page.on("request", lambda request: asked.append(request.url))
    pass_time(tab, 60)
    assert (len(asked) > 6) == careless
    shop.wallet.register("The newest")
    tab.page.mouse.move(40, 40)
    tab.see("#listed-end", "322 accounts.")


@pytest.mark.slow
@in_browser
@in_both_browsers
def test_new_accounts_and_changed_balances_appear_while_one_looks_and_the_focus_stays(
    shop, console
):
    shop.wallet.register("Bob")
    tab = console("accounts")
    ada = tab.page.get_by_role("link", name="Ada")
    ada.focus()
    wait_for_focus(tab, f"it.hash === '#{shop.ada.id}'")
    shop.wallet.topup(shop.ada.id, 1250)
    tab.see("#listed .figure >> nth=1", "$12.50")
    wait_for_focus(tab, f"it.hash === '#{shop.ada.id}'")
    shop.wallet.register("Cas")
    tab.see("#listed-end", "3 accounts.")
    assert tab.rows("#listed")[0].startswith("Cas ")
    wait_for_focus(tab, f"it.hash === '#{shop.ada.id}'")
    tab.field("Name").fill("Dan, who is not regis")
    shop.wallet.register("Eve")
    tab.see("#listed-end", "4 accounts.")
    wait_for_focus(tab, "it.name === 'name' && it.value === 'Dan, who is not regis'")


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("careless", [False, True])
def test_search_that_is_typed_fast_shows_the_right_accounts_however_late_an_answer_comes(
    shop, console, change_page, careless
):
    for number in range(9):
        shop.wallet.register(f"Shop {number}")
    if careless:
        change_page("if (query !== from.query) return; // Something", "// Something")
    tab = console("accounts")
    tab.see("#listed-end", "10 accounts.")
    tab.page.evaluate("""() => { window.shown = [];
        const list = document.getElementById("listed");
        new MutationObserver(() => shown.push(list.querySelectorAll("a").length))
            .observe(list, { childList: true }); }""")
    late = []

    def is_first(url):
        return parse_qs(urlsplit(url).query).get("name") == ["S"]

    tab.page.route(is_first, lambda route: late.append(route))
    with tab.page.expect_request(lambda request: is_first(request.url)):
        tab.page.get_by_role("searchbox", name="Search").press_sequentially("S")
    tab.page.get_by_role("searchbox", name="Search").press_sequentially("hop 7")
    assert len(late) == 1
    late[0].continue_()  # Its answer comes after all was typed.
    tab.see("#listed-end", "1 account.")
    assert tab.see("#listed a").text_content() == "Shop 7"
    shown = tab.page.evaluate("shown")
    assert shown == ([9, 1] if careless else [1])


@pytest.mark.slow
@in_browser
@in_both_browsers
def test_issuer_registers_tops_up_holds_captures_refunds_and_transfers_and_is_told_for_whom(
    shop, console
):
    tab = console("accounts", viewport=PHONE)
    tab.fill(name=NAME)
    tab.press("Register")
    token = tab.see(".token").inner_text()
    account = shop.wallet.authenticate(token)
    assert account.name == tab.see(".panel bdi").text_content() == NAME
    tab.see("#owner", NAME)
    wait_for_focus(tab, "it.innerText.startsWith('Keep this token')")
    tab.page.once("dialog", lambda dialog: dialog.accept())  # It warns of leaving.
    tab.page.reload()
    assert tab.see(".token").inner_text() == token
    tab.press("I have kept it")
    assert token not in tab.page.content()
    wait_for_focus(tab, "it.id === 'title'")
    assert tab.page.evaluate(STORED) == ISSUER_TOKEN

    def hear(text):
        tab.hear(f"{NAME}: {text}")

    tab.move("Top up", amount="100", description="Opening", metadata="order = 17")
    hear("Topped up $100.00. Balance after it: $100.00.")
    tab.see("#balance", "$100.00")
    tab.move("Charge", amount="10")
    hear("Charged $10.00. Balance after it: $90.00.")
    tab.move("Transfer", to=shop.ada.id, amount="5")
    hear("Transferred $5.00. Balance after it: $85.00.")
    tab.move("Hold", amount="40", description="Room 12", expires_after="1 hour")
    tab.see("#available", "$45.00")
    assert f"{NAME}: Held $40.00 until " in tab.see("#toast > span").text_content()
    tab.press("Capture $40.00")
    tab.fill(amount="30")
    tab.press("Capture")
    hear("Captured $30.00. Balance after it: $55.00.")
    tab.see("#held", "Nothing is held.")
    tab.move("Hold", amount="5")
    tab.press("Release $5.00")
    tab.press("Release")
    hear("Released $5.00.")
    tab.page.get_by_role("button", name="Refund $30.00").click()
    tab.see("dialog .command")
    tab.fill(amount="31")
    tab.press("Refund")
    tab.see("dialog .error", "It may be $30.00 at most.")
    tab.fill(amount="12.50")
    tab.press("Refund")
    hear("Refunded $12.50. Balance after it: $67.50.")
    tab.see("#balance", "$67.50")
    tab.see(tab.page.get_by_text("$12.50 refunded"))
    (_, _, _, _, topup) = shop.wallet.transactions(account.id).transactions
    assert (topup.description, topup.metadata) == ("Opening", {"order": "17"})
    assert shop.wallet.account(shop.ada.id).balance == 500
    assert tab.page.locator("main b, main img").count() == 0


@pytest.mark.slow
@in_browser
@in_both_browsers
def test_issuer_freezes_and_unfreezes_an_account_and_makes_a_new_token_that_is_shown_once(
    shop, console
):
    tab = console(shop.ada.id, refusals=[403], viewport=PHONE)
    tab.see("#balance", "$0.00")
    tab.press("Freeze")
    tab.see("dialog", re.compile("A frozen account receives and spends nothing"))
    tab.press("Freeze")
    tab.hear("The account of Ada is frozen.")
    frozen = tab.see("#frozen").inner_text()
    assert frozen.strip() == "This account is frozen: it receives and spends nothing."
    assert shop.wallet.account(shop.ada.id).frozen
    tab.move("Top up", amount="5")
    tab.see("form .failure", "The account is frozen. Unfreeze it first.")
    tab.press("Unfreeze")
    tab.press("Unfreeze")
    tab.hear("The account of Ada is not frozen any more.")
    tab.page.locator("#frozen").wait_for(state="hidden")
    assert not shop.wallet.account(shop.ada.id).frozen

    tab.page.evaluate("scrollTo(0, 200)")
    tab.press("Make a new token")
    tab.press("Close")
    assert shop.wallet.authenticate(shop.token) == shop.wallet.account(shop.ada.id)
    tab.press("Make a new token")
    tab.press("Make a new token")
    token = tab.see(".token").inner_text()
    wait_for_focus(tab, "it.innerText.startsWith('Keep this token')")
    box = tab.page.locator(".token").bounding_box()
    assert 0 < box["y"] < PHONE["height"] - box["height"]  # It is where the eye is.
    assert shop.wallet.authenticate(token).id == shop.ada.id
    with pytest.raises(Unauthorized):
        shop.wallet.authenticate(shop.token)
    tab.page.once("dialog", lambda dialog: dialog.accept())
    tab.page.reload()
    tab.see(".token", token)
    tab.see("#owner", "Ada")
    tab.press("I have kept it")
    tab.page.reload()
    tab.see("#owner", "Ada")
    assert token not in tab.page.content()


@pytest.mark.slow
@in_browser
def test_token_that_is_not_kept_yet_is_not_lost_when_the_next_one_is_made(shop, console):
    tab = console("accounts", viewport=PHONE)
    tokens = []
    for name in ("Ben", "Zoe"):
        go_to(tab, "Accounts")
        tab.see("#register form")
        tab.fill(name=name)
        tab.press("Register")
        tab.see("#owner", name)
        tokens.insert(0, tab.see(".token").first.inner_text())
    assert [shop.wallet.authenticate(token).name for token in tokens] == ["Zoe", "Ben"]
    tab.page.once("dialog", lambda dialog: dialog.accept())
    tab.page.reload()
    tab.see("#owner", "Zoe")
    assert tab.page.locator(".token").all_inner_texts() == tokens
    tab.press("Make a new token")
    tab.press("Make a new token")
    tab.see(tab.page.locator(".token").first, re.compile(f"^(?!{tokens[0]})"))
    new, kept = tab.page.locator(".token").all_inner_texts()  # The one before is dead.
    assert (shop.wallet.authenticate(new).name, kept) == ("Zoe", tokens[1])
    tab.page.get_by_role("button", name="I have kept it").first.click()
    assert tab.page.locator(".token").all_inner_texts() == [tokens[1]]
    tab.press("I have kept it")
    assert tab.page.locator("#fresh").is_hidden()


@pytest.mark.slow
@in_browser
@in_both_browsers
def test_each_view_has_an_address_for_back_forward_reload_and_links(shop, console):
    bob, _ = shop.wallet.register("Bob")
    shop.wallet.topup(bob.id, 500)
    tab = console(bob.id)
    tab.see("#owner", "Bob")
    assert tab.page.title() == "Bob \N{EN DASH} Wallet"
    go_to(tab, "Accounts")
    tab.see("#listed-end", "2 accounts.")
    assert tab.page.title() == "Wallet"
    current = tab.page.locator("[aria-current=page]")
    assert current.inner_text() == "Accounts"
    tab.page.get_by_role("link", name="Ada").click()
    tab.see("#owner", "Ada")
    assert current.count() == 0
    tab.page.go_back()
    tab.see("#listed-end", "2 accounts.")
    tab.page.go_back()
    tab.see("#owner", "Bob")
    tab.page.go_forward()
    tab.see("#listed-end", "2 accounts.")
    tab.page.go_forward()
    tab.see("#owner", "Ada")
    tab.page.reload()
    tab.see("#owner", "Ada")
    tab.page.evaluate(f"location.hash = '{bob.id}'")  # As it is typed into the address bar.
    tab.see("#owner", "Bob")
    tab.see("#balance", "$5.00")


@pytest.mark.slow
@in_browser
def test_address_of_no_account_says_so_and_one_can_go_on_from_there(shop, console):
    tab = console(NOBODY, refusals=[404])
    tab.see("#notice", "There is no such account.")
    assert tab.page.locator("#place").is_hidden()
    go_to(tab, "Accounts")
    tab.see("#listed-end", "1 account.")
    assert tab.page.locator("#notice").inner_text() == ""
    tab.page.evaluate(f"location.hash = '{NOBODY}'")
    tab.see("#notice", "There is no such account.")
    assert "Ada" not in tab.page.content()
    tab.page.evaluate(f"location.hash = '{shop.ada.id}'")
    tab.see("#owner", "Ada")


@pytest.mark.slow
@in_browser
def test_wrong_token_of_the_issuer_opens_nothing_and_one_that_was_replaced_ends_the_session(
    shop, visit
):
    tab = visit(shop.url, refusals=[401])
    for wrong in (ISSUER_TOKEN[:-1] + "x", WRONG_TOKEN):
        tab.fill(token=wrong)
        tab.press("Sign in")
        tab.see(".error", "This token is not valid: it was replaced, or mistyped.")
        assert tab.page.evaluate(STORED) is None
    set_address(tab, "accounts")
    tab.fill(token=ISSUER_TOKEN)
    tab.press("Sign in")
    tab.see("#listed-end", "1 account.")
    with running(shop.wallet, "another-" * 5) as another:
        tab.page.route(
            "**/api/**",
            lambda route: route.continue_(url=route.request.url.replace(tab.url, f"{another}/")),
        )
        tab.see("#told", "This token is not valid any more: it was replaced. Paste"
                         " another one.")
        assert tab.page.evaluate(STORED) is None
        assert "Ada" not in tab.page.content()
        assert tab.page.locator("nav").is_hidden()
        assert tab.page.evaluate("location.hash") == ""
        tab.page.unroute_all()


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("careless", [False, True])
def test_holder_is_offered_nothing_that_needs_the_issuer(shop, visit, change_page, careless):
    if careless:
        change_page("const isAllowed = (action) =>", "const isAllowed = (action) => true ||")
    shop.wallet.topup(shop.ada.id, 1000)
    shop.wallet.charge(shop.ada.id, 100)
    tab = visit(shop.url)
    tab.see("#new", re.compile("This wallet has an issuer: ask whoever runs it for an account"))
    assert tab.page.get_by_role("button").all_inner_texts() == ["Sign in"]
    set_address(tab, "accounts")  # For a holder it means nothing.
    tab.sign_in(shop.token)
    tab.see("#owner", "Ada")
    tab.page.get_by_role("button", name="Details of Charge").click()
    buttons = tab.page.get_by_role("button").all_text_contents()
    actions = tab.page.get_by_role("radio").evaluate_all("all => all.map((one) => one.value)")
    assert ("Refund" in buttons, "topup" in actions) == (careless, careless)
    assert not {"Register", "Freeze", "Unfreeze"} & set(buttons)
    assert tab.page.locator("nav").is_hidden()
    if careless:
        return
    assert actions == ["charge", "hold", "transfer"]
    assert "Make a new token" in buttons
    tab.press("Close")
    tab.move("Charge", amount="2")
    tab.hear("Charged $2.00. Balance after it: $7.00.")
    shop.wallet.freeze(shop.ada.id)
    tab.see("#frozen", "This account is frozen: it receives and spends nothing.")
    shop.wallet.freeze(shop.ada.id, False)


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("careless", [False, True])
def test_nothing_of_an_account_is_left_in_the_page_when_another_one_or_the_door_is_shown(
    shop, console, change_page, careless
):
    if careless:
        change_page('for (const id of ["dialog", "notice", "spoken", "toast"])', 'for (const id of [])')
    bob, _ = shop.wallet.register("Bob")
    shop.wallet.topup(shop.ada.id, 123456)

    def look():
        tab.see("#owner", "Ada")
        tab.move("Charge", amount="11.11", description="Secret business")
        hear_part(tab, "Charged $11.11.")
        tab.press(tab.page.locator("[aria-label^='Details of Charge']").first.get_attribute("aria-label"))
        tab.see("dialog", re.compile("Secret business"))

    def left():
        words = ("Ada", shop.ada.id, "Secret business", "1,234", "11.11", "1,223")
        return [word for word in words if word in tab.page.content() + tab.page.title()]

    tab = console(shop.ada.id, refusals=[401])
    look()
    tab.page.evaluate(f"location.hash = '{bob.id}'")
    tab.see("#owner", "Bob")
    assert bool(left()) == careless, left()
    if careless:
        return
    tab.page.evaluate(f"location.hash = '{shop.ada.id}'")
    look()
    tab.press("Close")
    tab.press("Sign out")
    tab.see("#told", "You are signed out, and this page has forgotten the token.")
    assert left() == []
    assert tab.page.evaluate("JSON.stringify(sessionStorage)") == "{}"
    assert tab.page.evaluate("location.hash") == ""
    tab.sign_in(shop.token)
    look()
    shop.wallet.replace_token(shop.ada.id)
    tab.see("#told", re.compile("This token is not valid any more"))
    assert left() == []


@pytest.mark.slow
@in_browser
def test_two_tabs_have_each_their_own_session_and_see_what_the_other_one_does(shop, console):
    tab = console(shop.ada.id)
    tab.see("#balance", "$0.00")
    other = tab.page.context.new_page()
    try:
        other.goto(f"{shop.url}/#{shop.ada.id}")
        other.get_by_role("textbox", name="Token").fill(shop.token)
        other.get_by_role("button", name="Sign in").click()
        other.locator("#owner", has_text="Ada").wait_for()
        assert other.locator("nav").is_hidden()
        tab.page.bring_to_front()
        tab.move("Top up", amount="5")
        tab.hear("Ada: Topped up $5.00. Balance after it: $5.00.")
        other.bring_to_front()
        other.locator("#balance", has_text="$5.00").wait_for()
        other.get_by_role("radio", name="Charge").check()
        other.get_by_role("textbox", name="Amount").filter(visible=True).fill("2")
        other.get_by_role("button", name="Charge", exact=True).click()
        other.locator("#toast", has_text="Charged $2.00. Balance after it: $3.00.").wait_for()
        tab.page.bring_to_front()
        tab.see("#balance", "$3.00")
        other.bring_to_front()
        other.get_by_role("button", name="Sign out").click()
        other.locator("#door").wait_for()
        tab.page.bring_to_front()
        assert tab.page.evaluate(STORED) == ISSUER_TOKEN
        tab.page.reload()
        tab.see("#balance", "$3.00")
    finally:
        other.close()


@pytest.mark.slow
@in_browser
def test_names_are_shown_as_they_are_and_turn_nothing_around(shop, console):
    account, _ = shop.wallet.register(NAME)
    shop.wallet.topup(account.id, 500, NAME, metadata={"<i>k</i>": NAME})
    shop.wallet.hold(account.id, 100, NAME)
    tab = console("accounts")
    assert tab.see(f"#listed a[href='#{account.id}'] bdi").text_content() == NAME
    line = tab.page.locator(f"#listed a[href='#{account.id}'] bdi").evaluate(
        "(name) => getComputedStyle(name).textDecorationLine"
    )
    assert line == "underline"  # What leads on is told by more than colour.
    tab.page.locator(f"#listed a[href='#{account.id}']").click()
    for place in ("#owner", "#held bdi", "#entries bdi"):
        assert tab.see(place).text_content() == NAME
    tab.press("Freeze")
    tab.press("Freeze")
    assert tab.see("#toast bdi").text_content() == NAME
    tab.press("Unfreeze")
    tab.press("Unfreeze")
    tab.move("Charge", amount="1")
    assert tab.see("#toast bdi").text_content() == NAME
    tab.page.get_by_role("button", name="Details of Top up").click()
    tab.see("dialog dd bdi", NAME)
    assert NAME in tab.see("dialog dd pre").text_content()
    assert tab.page.locator("main b, main i, dialog i, dialog b, main img").count() == 0
    harmed = tab.page.evaluate("document.body.scrollWidth > innerWidth")
    assert not harmed


# The same in code #################################################################################


@pytest.mark.slow
@in_browser
def test_curl_and_python_of_each_action_of_the_issuer_do_what_its_button_does(shop, console):
    bob, _ = shop.wallet.register("Bob")
    nasty = """it's "quoted" $HOME `id` \\n !! <b> ;&| é😀"""
    tab = console(shop.ada.id)
    tab.see("#balance", "$0.00")

    def run(language):
        tab.place().get_by_role("button", name=language, exact=True).filter(visible=True).click()
        command = tab.command()
        assert not {ISSUER_TOKEN, shop.token} & set(re.findall(r"[\w-]+", command))
        interpreter = ["bash"] if language == "curl" else [sys.executable]
        done = subprocess.run(
            [*interpreter, "-c", command],
            env={**os.environ, "TOKEN": ISSUER_TOKEN},
            cwd=HERE,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if language == "curl" else done.stdout

    def run_both(button):
        """Run both commands, and press the button: all have one key, so it is done once."""
        made = run("curl")
        assert repr(made["id"]) in run("Python")
        tab.press(button)
        hear_part(tab, "It was done before, with this key, and not again.")
        return made

    made = {}
    for action, fields in {
        "Top up": {"amount": "50"},
        "Charge": {"amount": "1.25"},
        "Hold": {"amount": "2", "expires_after": "15 minutes"},
        "Transfer": {"amount": "3", "to": bob.id},
    }.items():
        tab.choose(action)
        tab.fill(**fields, description=nasty, metadata=f"order = {nasty}")
        made[action] = run_both(action)
        assert made[action]["description"] == nasty
        assert made[action]["metadata"] == {"order": nasty}
    tab.press("Capture $2.00")
    assert run_both("Capture")["amount"] == 200
    tab.page.get_by_role("button", name="Refund $1.25").click()
    tab.see("dialog .command")
    assert run_both("Refund")["reference"] == made["Charge"]["id"]
    tab.move("Hold", amount="4")
    tab.press("Release $4.00")
    assert run_both("Release")["status"] == "released"
    assert shop.wallet.account(shop.ada.id).balance == 5000 - 125 - 300 - 200 + 125
    assert len(shop.wallet.transactions(shop.ada.id).transactions) == 5

    tab.press("Freeze")
    assert run("curl")["frozen"] is True
    shop.wallet.freeze(shop.ada.id, False)
    assert "frozen=True" in run("Python")
    tab.press("Close")
    tab.press("Unfreeze")
    assert run("curl")["frozen"] is False
    shop.wallet.freeze(shop.ada.id)
    assert "frozen=False" in run("Python")
    assert not shop.wallet.account(shop.ada.id).frozen
    tab.press("Close")
    tab.press("Make a new token")
    assert shop.wallet.authenticate(run("curl")["token"]).id == shop.ada.id
    assert shop.wallet.authenticate(run("Python").strip()).id == shop.ada.id
    tab.press("Close")
    go_to(tab, "Accounts")
    tab.see("#listed-end")
    tab.fill(name=nasty)
    assert run("curl")["name"] == nasty
    assert repr(nasty) in run("Python")
    assert [account.name for account in shop.wallet.accounts()].count(nasty) == 2


# The overview #####################################################################################


def read_amount(text):
    """Return what is shown as dollars, in cents."""
    return int(re.sub(r"\D", "", text))


@pytest.mark.slow
@in_browser
@in_both_browsers
def test_overview_shows_all_accounts_at_one_moment_and_what_is_done_while_one_looks(shop, console):
    tab = console("overview")
    tab.see("#newest", "Nothing has moved yet.")
    bob, _ = shop.wallet.register("Bob")
    shop.wallet.topup(shop.ada.id, 10000, "Opening <b>")
    shop.wallet.transfer(shop.ada.id, bob.id, 2500, "Rent")
    shop.wallet.hold(shop.ada.id, 100)
    shop.wallet.freeze(bob.id)
    tab.see("#total-frozen", "1")
    tab.see("#total-accounts", "2")
    tab.see("#total-balance", "$100.00")
    tab.see("#total-held", "$1.00")
    rows = tab.rows("#newest")
    assert [row.partition(" Nov")[0] for row in rows][-1].startswith("Top up Ada Opening <b> +$100.00")
    assert sorted(row.split(" $")[0][:15] for row in rows[:2]) == ["Transfer in Bob", "Transfer out Ad"]
    bars = tab.page.get_by_role("img", name=re.compile("^3 movements in 24 hours, and [123] in one at"))
    tab.see(bars)
    assert bars.locator("rect").count() == 24

    def wait_for_counts(total):
        """Wait until the table has as many. An hour may have just ended."""
        tab.page.wait_for_function(
            """(total) => { const cells = [...document.querySelectorAll("#bars-table td:last-child")];
            return cells.length === 24
                && total === Number(cells[0].textContent) + Number(cells[1].textContent); }""",
            arg=total,
        )

    tab.page.get_by_text("As a table").click()
    wait_for_counts(3)
    shop.wallet.topup(shop.ada.id, 5)
    tab.see("#total-balance", "$100.05")
    wait_for_counts(4)
    assert tab.rows("#newest")[0].startswith("Top up Ada +$0.05")

    tab.page.locator("#newest").get_by_role("link", name="Bob").click()
    tab.see("#owner", "Bob")
    tab.page.go_back()
    tab.see("#total-balance", "$100.05")


@pytest.mark.slow
@in_browser
@in_both_browsers
def test_overview_shows_sums_beyond_what_a_number_holds_exactly(shop, console):
    for number in range(3):
        account, _ = shop.wallet.register(f"Rich {number}")
        shop.wallet.topup(account.id, AMOUNT_MAX)
        shop.wallet.hold(account.id, AMOUNT_MAX)
    tab = console("overview", viewport=NARROWEST)
    tab.see("#total-balance")
    shown = tab.page.locator("#total-balance").inner_text()
    assert shown == "$270,215,977,642,229.73"
    assert read_amount(shown) == 3 * AMOUNT_MAX != int(float(3 * AMOUNT_MAX))
    tab.see("#total-held", shown)
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 320


@pytest.mark.slow
@in_browser
def test_pages_of_the_issuer_that_stay_open_fill_no_log(shop, console, caplog):
    caplog.set_level(logging.DEBUG, "wallet.access")
    shop.wallet.topup(shop.ada.id, 500)
    shop.wallet.hold(shop.ada.id, 100)
    tab = console("overview")
    for address, path in (
        ("overview", "/api/overview"),
        ("accounts", "/api/accounts"),
        (shop.ada.id, f"/api/accounts/{shop.ada.id}/holds"),
    ):
        tab.page.evaluate("(address) => { location.hash = address; }", address)
        for _ in range(4):  # It looks each second.
            with tab.page.expect_response(lambda answer, path=path: urlsplit(answer.url).path == path):
                pass
    looks = [(record.path, record.levelno) for record in caplog.records if record.levelno > logging.DEBUG]
    paths = [path for path, _ in looks]
    assert {"/api/overview", "/api/accounts"} <= set(paths)
    assert [path for path in paths if "api/a" in path or "api/o" in path if paths.count(path) > 2] == []


# For everyone #####################################################################################


@pytest.mark.slow
@in_browser
@in_both_browsers
def test_keyboard_alone_leads_from_the_door_to_a_captured_hold_and_a_refund(shop, visit):
    tab = visit(shop.url)
    keyboard = tab.page.keyboard
    is_seen = """() => {
        const it = document.activeElement;
        const mark = it.closest(".choice label") ?? it;
        const box = mark.getBoundingClientRect();
        const isMarked = it.type === "date" // The browser marks its parts, each by itself.
            || it.matches(":focus-visible") && getComputedStyle(mark).outlineStyle !== "none";
        return isMarked && box.bottom > 0 && box.top < innerHeight; }"""

    def press(key):
        keyboard.press(key)
        wait_for_focus(tab, "it !== document.body")

    def tab_to(name, key="Tab"):
        """Press Tab until something of this name has the focus, which is seen at each step."""
        for _ in range(60):
            keyboard.press(key)
            assert tab.page.evaluate("document.activeElement !== document.body")
            tab.page.wait_for_function(is_seen)
            found = tab.page.evaluate(
                "(it => it.ariaLabel ?? it.labels?.[0]?.innerText ?? it.innerText)(document.activeElement)"
            )
            if found == name:
                return
        raise AssertionError(name)

    tab.see("#door")
    wait_for_focus(tab, "it.name === 'token'")
    keyboard.type(ISSUER_TOKEN)
    press("Enter")
    wait_for_focus(tab, "it.innerText === 'All accounts'")
    tab_to("Accounts", key="Shift+Tab")
    press("Enter")
    tab.see("#listed-end", "1 account.")
    tab_to("Name")
    keyboard.type("Grace")
    press("Enter")
    wait_for_focus(tab, "it.innerText.startsWith('Keep this token')")
    tab.see("#owner", "Grace")
    tab_to("I have kept it")
    press("Space")
    wait_for_focus(tab, "it.id === 'title'")
    tab_to("Top up")
    tab_to("Amount in USD")
    keyboard.type("50")
    press("Enter")
    tab.hear("Grace: Topped up $50.00. Balance after it: $50.00.")
    wait_for_focus(tab, "it.name === 'amount'")
    tab_to("Top up", key="Shift+Tab")
    press("ArrowRight")
    press("ArrowRight")
    tab.page.wait_for_function(is_seen)
    tab_to("Amount in USD")
    keyboard.type("20")
    tab_to("Expires after")
    press("ArrowUp")
    tab_to("Hold")
    press("Space")
    tab.see("#reserved", "$20.00")
    wait_for_focus(tab, "it.innerText === 'Hold'")
    tab_to("Capture $20.00")
    press("Enter")
    wait_for_focus(tab, "it.name === 'amount' && it.closest('dialog')")
    press("Escape")
    wait_for_focus(tab, "it.ariaLabel === 'Capture $20.00'")
    press("Enter")
    wait_for_focus(tab, "it.name === 'amount' && it.closest('dialog')")
    tab.page.wait_for_function(is_seen)
    tab_to("Capture")
    press("Enter")
    tab.hear("Grace: Captured $20.00. Balance after it: $30.00.")
    wait_for_focus(tab, "it.id === 'holds-title'")
    tab_to(tab.page.get_by_role("button", name="Refund $20.00").get_attribute("aria-label"))
    press("Enter")
    wait_for_focus(tab, "it.name === 'amount' && it.closest('dialog')")
    press("Enter")
    tab.hear("Grace: Refunded $20.00. Balance after it: $50.00.")
    wait_for_focus(tab, "it.ariaLabel?.startsWith('Details of Charge')")
    tab_to("Close the message")
    press("Enter")
    tab.page.wait_for_function("() => !document.getElementById('toast').textContent")
    wait_for_focus(tab, "it.id === 'title'")
    tab_to("Sign out", key="Shift+Tab")
    press("Enter")
    wait_for_focus(tab, "it.id === 'told'")


@pytest.mark.slow
@in_browser
@in_both_browsers
@pytest.mark.parametrize("careless", [False, True])
def test_focus_is_not_lost_when_what_a_dialog_was_opened_from_is_gone(
    shop, console, change_page, careless
):
    if careless:
        change_page('  find("dialog").onclose = keepFocus;\n', "")
    shop.wallet.topup(shop.ada.id, 500)
    hold = shop.wallet.hold(shop.ada.id, 100)
    tab = console(shop.ada.id)
    tab.press("Capture $1.00")
    tab.see("dialog .command")
    shop.wallet.release(shop.ada.id, hold.id)
    tab.page.locator("#held", has_text="Nothing is held.").wait_for()
    tab.page.keyboard.press("Escape")
    tab.page.locator("dialog").wait_for(state="hidden")
    wait_for_focus(tab, "it === document.body" if careless else "it.id === 'title'")


@pytest.mark.slow
@in_browser
def test_axe_finds_nothing_in_any_state_of_the_holders_page(shop, kiosk, visit, axe):
    tab = visit(kiosk.url, refusals=[401, 402])
    tab.see("#ways input")
    check_accessible(tab, axe)
    tab.press("Sign in")
    tab.see(".error")
    check_accessible(tab, axe)
    tab.fill(name="Ada")
    tab.press("Register")
    tab.see(".token")
    tab.see("#balance", "$0.00")
    check_accessible(tab, axe)
    tab.press("Sign out")
    tab.see("dialog[open]")
    check_accessible(tab, axe)
    tab.press("Sign out all the same")
    tab.see("#told")
    check_accessible(tab, axe)

    tab.sign_in(kiosk.token)
    kiosk.wallet.topup(kiosk.ada.id, AMOUNT_MAX, "x" * 500, metadata={"k" * 40: "v" * 500})
    kiosk.wallet.charge(kiosk.ada.id, 250, "A charge")
    kiosk.wallet.hold(kiosk.ada.id, AMOUNT_MAX // 2, "W" * 100)
    tab.see("#held bdi")
    tab.page.locator("#plot-table summary").click()
    tab.see("#plot-table tbody tr")
    for action in ("Top up", "Charge", "Hold", "Transfer"):
        tab.choose(action)
        check_accessible(tab, axe)
    tab.move("Charge", amount="1.250", metadata="wrong")
    tab.see(".preview button")  # It asks which of two amounts is meant.
    tab.see(".error")
    check_accessible(tab, axe)
    tab.fill(amount="1")
    tab.press("Charge")
    tab.see(".error", "Type a name and a value: order = 1042.")
    tab.fill(amount="90000000000000", metadata="")
    tab.press("Charge")
    tab.see(".error", re.compile("is available"))
    check_accessible(tab, axe)
    tab.page.locator("#plot").hover()
    check_accessible(tab, axe)
    tab.page.get_by_role("button", name="Refund").first.click()
    tab.see("dialog[open] .command")
    tab.fill(amount="3")
    tab.press("Refund")
    tab.see("dialog .error")
    check_accessible(tab, axe)
    tab.press("Close")
    tab.fill(amount="2")
    tab.form().locator("summary").click()  # It is folded on a small screen.
    for language in ("curl", "Python"):
        tab.place().get_by_role("button", name=language).filter(visible=True).click()
        check_accessible(tab, axe)
    tab.press("Charge")
    tab.see("#toast > span")
    check_accessible(tab, axe)

    for button in ("Details of Charge", "Details of the hold", "Refund", "Capture", "Release",
                   "Make a new token"):
        tab.page.get_by_role("button", name=button).first.click()
        tab.see("dialog[open]")
        check_accessible(tab, axe)
        tab.press("Close")
    tab.page.get_by_label("Type").select_option("Refund")
    tab.see("#end", "0 movements found.")
    check_accessible(tab, axe)
    tab.page.get_by_label("Id", exact=True).fill("nonsense")
    tab.press("Find")
    tab.see("#history-search .failure")
    check_accessible(tab, axe)
    kiosk.wallet.freeze(kiosk.ada.id)
    tab.see("#frozen")
    check_accessible(tab, axe)
    kiosk.wallet.replace_token(kiosk.ada.id)
    tab.see("#told")
    check_accessible(tab, axe)


@pytest.mark.slow
@in_browser
def test_axe_finds_nothing_in_any_state_of_the_issuers_console(shop, visit, axe):
    tab = visit(shop.url, refusals=[401, 403, 404])
    tab.see("#new", re.compile("This wallet has an issuer:"))
    check_accessible(tab, axe)
    tab.fill(token=WRONG_TOKEN)
    tab.press("Sign in")
    tab.see(".error")
    check_accessible(tab, axe)
    tab.sign_in(ISSUER_TOKEN)
    tab.see("#newest", "Nothing has moved yet.")
    check_accessible(tab, axe)
    account, _ = shop.wallet.register(NAME + "W" * 50)
    shop.wallet.topup(account.id, AMOUNT_MAX, "x" * 500)
    shop.wallet.charge(account.id, 250, "A charge")
    shop.wallet.hold(account.id, AMOUNT_MAX // 2, "W" * 100)
    tab.see("#newest > .entry:nth-child(2)")
    tab.page.get_by_text("As a table").click()
    tab.see("#bars-table tbody tr >> nth=23")
    check_accessible(tab, axe)
    go_to(tab, "Accounts")
    tab.see("#listed-end", "2 accounts.")
    check_accessible(tab, axe)
    search(tab, "Nobody")
    tab.see("#listed-end", "There is no such account.")
    tab.press("Register")
    tab.see(".error")
    check_accessible(tab, axe)
    shop.wallet.freeze(account.id)
    tab.page.evaluate("(id) => { location.hash = id; }", account.id)
    tab.see("#frozen")
    check_accessible(tab, axe)
    tab.move("Top up", amount="1")
    tab.see(".failure")
    check_accessible(tab, axe)
    for button in ("Refund $2.50", "Unfreeze", "Make a new token"):
        tab.page.get_by_role("button", name=button).first.click()
        tab.see("dialog[open] .command")
        check_accessible(tab, axe)
        tab.press("Close")
    tab.press("Make a new token")
    tab.press("Make a new token")
    tab.see(".token")
    check_accessible(tab, axe)
    tab.press("I have kept it")
    tab.page.evaluate("(id) => { location.hash = id; }", NOBODY)
    tab.see("#notice", "There is no such account.")
    check_accessible(tab, axe)


@pytest.mark.slow
@in_browser
def test_control_what_a_user_cannot_read_is_found(kiosk, visit, axe):
    tab = visit(kiosk.url)
    for harm, found in (
        ("document.querySelector('label').remove()", "label"),
        ("document.documentElement.style.setProperty('--quiet', '#aaaaaa')", "color-contrast"),
        ("document.querySelector('#new h2').style.width = '400px'", "== 320"),
    ):
        tab.page.set_viewport_size(WIDE)
        tab.page.reload()
        tab.see("#ways input")
        tab.page.evaluate(harm)
        with pytest.raises(AssertionError, match=found):
            check_accessible(tab, axe)


@pytest.mark.slow
@in_browser
@in_both_browsers
def test_screen_reader_is_told_of_headings_labels_figures_and_what_came_of_an_action(shop, visit):
    from playwright.sync_api import expect

    def hear(snapshot):
        expect(tab.page.locator("body")).to_match_aria_snapshot(snapshot)

    shop.wallet.topup(shop.ada.id, 5000, "Opening")
    tab = visit(shop.url, refusals=[402])
    hear("""
      - banner:
        - heading "Wallet" [level=1]
      - main:
        - region "Sign in":
          - heading "Register an account" [level=2]
          - heading "Sign in" [level=2]
          - textbox "Token"
          - button "Sign in"
    """)
    tab.press("Sign in")
    tab.see(".error")
    assert tab.field("Token").get_attribute("aria-invalid") == "true"
    expect(tab.field("Token")).to_have_accessible_description(
        re.compile("Paste a token: that of an account begins with wlt_|This is needed")
    )
    tab.sign_in(ISSUER_TOKEN)
    hear("""
      - banner:
        - navigation "Views":
          - link "Overview"
          - link "Accounts"
        - button "Sign out"
      - main:
        - heading "All accounts" [level=2]
        - term: Accounts
        - definition: "1"
        - term: Balance
        - definition: $50.00
        - term: Held
        - definition: $0.00
        - term: Frozen
        - definition: "0"
        - heading "Movements an hour, for a day" [level=2]
        - img "1 movement in 24 hours, and 1 in one at most"
        - heading "Newest movements" [level=2]
        - list:
          - listitem:
            - strong: Top up
            - link "Ada"
    """)
    go_to(tab, "Accounts")
    hear("""
      - main:
        - heading "Accounts" [level=2]
        - search:
          - searchbox "Search"
        - list:
          - listitem:
            - link "Ada"
        - paragraph: 1 account.
        - heading "Register an account" [level=2]
        - textbox "Name"
        - button "Register"
        - group:
          - text: The same in code
    """)
    tab.page.get_by_role("link", name="Ada").click()
    tab.see("#owner", "Ada")
    tab.move("Hold", amount="20", description="Room 12")
    tab.see("#toast > span")
    hear("""
      - main:
        - region "Ada":
          - heading "Ada" [level=2]
          - paragraph: Balance
          - paragraph: $50.00
          - term: Available
          - definition: $30.00
          - term: Held
          - definition: $20.00
        - region "Move money of Ada":
          - heading "Move money of Ada" [level=2]
          - group "What to do":
            - radio "Top up"
            - radio "Charge"
            - radio "Hold" [checked]
            - radio "Transfer"
          - textbox "Amount in USD"
          - combobox "Expires after"
          - button "Hold"
        - region "Held":
          - heading "Held" [level=2]
          - list:
            - listitem:
              - button "Capture $20.00"
              - button "Release $20.00"
              - button "Details of the hold of $20.00"
        - region /Balance since/:
          - heading /Balance since the beginning/ [level=2]
        - region "History":
          - heading "History" [level=2]
          - search:
            - combobox "Type"
            - textbox "From"
            - textbox "To"
            - textbox "Id"
          - list:
            - listitem:
              - strong: Top up
              - button /Details of Top up \\+\\$50\\.00, balance \\$50\\.00/
      - status:
        - text: /Ada.+Held .20.00 until/
        - button "Close the message"
    """)
    tab.press("Capture $20.00")
    hear("""
      - dialog "Capture a hold of $20.00":
        - heading "Capture a hold of $20.00" [level=2]
        - button "Close"
        - paragraph: Ada
        - paragraph: Room 12
        - paragraph: What you do not capture is available again at once.
        - textbox "Amount in USD": "20.00"
        - textbox "Description (optional)"
        - button "Capture"
    """)
    tab.press("Close")
    shop.wallet.freeze(shop.ada.id)
    hear("""
      - main:
        - region "Ada":
          - paragraph: /This account is frozen/
    """)
    shop.wallet.freeze(shop.ada.id, False)
    shop.wallet.topup(shop.ada.id, 5)
    tab.see("#balance", "$50.05")
    heard = tab.page.locator("#spoken")
    expect(heard).to_have_text("New: Top up +$0.05, balance $50.05")
    assert heard.get_attribute("role") == "status"
