"""The page in Debian's Firefox, and what tests there can rely on."""

from __future__ import annotations

import contextlib
import os
import re
import time

import pytest

from tests.support import (
    DARK,
    NARROW,
    NARROWEST,
    STORED,
    WIDE,
    WITHOUT_SITE_DATA,
    Visit,
    in_both_browsers,
    in_browser,
    wait_until_gone,
)


def faults(tab):
    """Return what went wrong. Firefox asks for an icon, which the page does not have."""
    return [fault for fault in tab.faults if "/favicon.ico" not in fault]


@pytest.fixture
def visit(browser):
    """A function that visits a page once. At the end nothing may have gone wrong there."""
    with contextlib.ExitStack() as stack:

        def make(*arguments, **options):
            tab = stack.enter_context(contextlib.closing(Visit(browser, *arguments, **options)))
            stack.callback(check, tab)
            return tab

        def check(tab):
            assert faults(tab) == []

        yield make


@in_browser
@in_both_browsers
def test_user_of_either_browser_registers_tops_up_holds_captures_refunds_reloads_and_signs_out(
    kiosk, visit
):
    tab = visit(kiosk.url, viewport=NARROW, refusals=[402])
    tab.field("Name").fill("Grace")
    tab.press("Register")
    tab.see("#balance", "$0.00")
    token = tab.see("#token").inner_text()
    tab.move("Top up", amount="100")
    tab.see("#balance", "$100.00")
    tab.move("Charge", amount="200")
    tab.see(".error", "The balance is too low. $100.00 is available, and this needs $200.00.")
    tab.move("Hold", amount="40", description="Room 12")
    tab.see("#available", "$60.00")
    tab.open("Capture $40.00")
    tab.field("Amount").fill("30")
    tab.page.keyboard.press("Enter")
    tab.see("#held", "Nothing is held.")
    tab.see("#balance", "$70.00")
    tab.open("Refund $30.00")
    tab.field("Amount").fill("10")
    tab.press("Refund")
    tab.see("#balance", "$80.00")

    tab.page.reload()
    tab.see("#balance", "$80.00")
    tab.see(tab.page.get_by_text("$10.00 refunded"))
    types = [re.match(r"[A-Z]\w+(?: up)?", row)[0] for row in tab.rows()]
    assert types == ["Refund", "Charge", "Top up"]
    account = kiosk.wallet.authenticate(token)
    assert (account.name, account.balance) == ("Grace", 8000)
    tab.press("Sign out")
    tab.see("#told", "You are signed out, and this page has forgotten the token.")
    assert tab.page.evaluate(STORED) is None


def check_accessible(tab, axe):
    """Assert that axe-core finds nothing at both sizes, and that nothing is scrolled sideways."""
    if not tab.page.evaluate("'axe' in window"):
        tab.page.evaluate(axe)
    for size in (WIDE, NARROW):
        tab.page.set_viewport_size(size)
        found = tab.page.evaluate(
            "axe.run({ resultTypes: ['violations'] }).then((found) => found.violations)"
        )
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []
    tab.page.set_viewport_size(NARROWEST)
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 320


def show_an_account(tab, kiosk, axe):
    """Look at the page before and after a token is given."""
    check_accessible(tab, axe)
    kiosk.wallet.topup(kiosk.ada.id, 100000, "A topup")
    kiosk.wallet.charge(kiosk.ada.id, 250, "A charge")
    kiosk.wallet.hold(kiosk.ada.id, 500, "A hold")
    tab.field("Token").fill(kiosk.token)
    tab.press("Open")
    tab.see("#held bdi")
    check_accessible(tab, axe)


@pytest.mark.slow
@in_browser
def test_axe_finds_nothing_in_firefox(kiosk, firefox, axe):
    with contextlib.closing(Visit(firefox, kiosk.url)) as tab:
        show_an_account(tab, kiosk, axe)


@pytest.mark.slow
@in_browser
def test_axe_finds_nothing_in_a_dark_firefox(kiosk, started_firefox, axe):
    with (
        started_firefox(**DARK) as page,
        contextlib.closing(Visit(page, kiosk.url)) as tab,
    ):
        assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
        show_an_account(tab, kiosk, axe)


@pytest.mark.slow
@in_browser
def test_control_what_a_user_of_firefox_cannot_read_is_found(kiosk, firefox, axe):
    with contextlib.closing(Visit(firefox, kiosk.url)) as tab:
        tab.page.evaluate("document.querySelector('label').remove()")
        with pytest.raises(AssertionError, match="label"):
            check_accessible(tab, axe)


# What tests there rely on #########################################################################


@in_browser
def test_control_what_goes_wrong_in_firefox_is_noted_and_the_policy_of_the_page_holds(
    kiosk, firefox
):
    with contextlib.closing(Visit(firefox, kiosk.url)) as tab:
        for harm, found in (
            ("setTimeout(() => missing())", "missing is not defined"),
            ("console.error('wrong')", "wrong"),
            ("document.body.setAttribute('style', 'color: red')", "style-src-attr"),
            ("fetch('http://127.0.0.1:9/').catch(() => {})", "connect-src"),
            ("addition('script', { textContent: 'window.harmed = true' })", "script-src-elem"),
            ("addition('img', { src: 'openapi.yaml' })", "img-src"),
        ):
            tab.faults.clear()
            tab.page.evaluate(
                "() => { const addition = (tag, all) => document.body.append("
                f"Object.assign(document.createElement(tag), all)); {harm}; }}"
            )
            deadline = time.monotonic() + 10
            while not any(found in fault for fault in faults(tab)):
                assert not tab.page.evaluate("'harmed' in window")  # What came in is noted then.
                assert time.monotonic() < deadline, tab.faults


@in_browser
def test_firefox_that_is_light_does_not_pretend_to_be_dark(firefox):
    from playwright.sync_api import Error

    with pytest.raises(Error, match="stays as it started"):
        firefox.emulate_media(color_scheme="dark")
    assert not firefox.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")


@pytest.mark.slow
@in_browser
def test_firefox_without_site_data_has_no_session_storage(kiosk, started_firefox):
    look = "() => { try { sessionStorage; } catch (error) { return error.name; } }"
    with started_firefox(**WITHOUT_SITE_DATA) as page:
        page.goto(kiosk.url)
        assert page.evaluate(look) == "SecurityError"


def processes_of(group):
    """Return the processes of a process group."""
    found = []
    for process in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        with contextlib.suppress(ProcessLookupError):  # It has ended since.
            if os.getpgid(process) == group:
                found.append(process)
    return found


@pytest.mark.slow
@in_browser
def test_nothing_is_left_of_a_firefox_that_was_closed(started_firefox, tmp_path_factory):
    with started_firefox() as page:
        page.goto("data:text/html,<title>here</title>")
        folders = tmp_path_factory.getbasetemp().glob("firefox*")
        group = max(folders, key=os.path.getmtime) / "pid"
        processes = processes_of(int(group.read_text()))
        assert len(processes) > 2  # The relay, Firefox, and those in which it shows pages.
    wait_until_gone(processes)
