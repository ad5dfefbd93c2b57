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
    STORED,
    WITHOUT_SITE_DATA,
    Visit,
    check_accessible,
    in_both_browsers,
    in_browser,
    in_firefox,
    wait_until_gone,
)


@in_browser
@in_both_browsers
def test_user_of_either_browser_registers_tops_up_holds_captures_refunds_reloads_and_signs_out(
    kiosk, visit
):
    tab = visit(kiosk.url, viewport=NARROW, refusals=[402])
    tab.field("Name").fill("Grace")
    tab.press("Register")
    tab.see("#balance", "$0.00")
    token = tab.see(".token").inner_text()
    tab.press("I have kept it")
    tab.move("Top up", amount="100")
    tab.see("#balance", "$100.00")
    tab.move("Charge", amount="200")
    tab.see(".error", "The balance is too low. $100.00 is available, and this needs $200.00.")
    tab.move("Hold", amount="40", description="Room 12")
    tab.see("#available", "$60.00")
    tab.press("Capture $40.00")
    tab.see("dialog")
    tab.field("Amount").fill("30")
    tab.page.keyboard.press("Enter")
    tab.see("#held", "Nothing is held.")
    tab.see("#balance", "$70.00")
    tab.page.get_by_role("button", name="Refund $30.00").click()
    tab.see("dialog")
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


def show_an_account(tab, kiosk, axe):
    """Look at the page before and after a token is given."""
    tab.see("#ways input")
    check_accessible(tab, axe, [None])
    kiosk.wallet.topup(kiosk.ada.id, 100000, "A topup")
    kiosk.wallet.charge(kiosk.ada.id, 250, "A charge")
    kiosk.wallet.hold(kiosk.ada.id, 500, "A hold")
    tab.field("Token").fill(kiosk.token)
    tab.press("Sign in")
    tab.see("#held bdi")
    check_accessible(tab, axe, [None])


@pytest.mark.slow
@in_browser
@in_firefox
def test_axe_finds_nothing_in_firefox(kiosk, visit, axe):
    show_an_account(visit(kiosk.url), kiosk, axe)


@pytest.mark.slow
@in_browser
def test_axe_finds_nothing_in_a_dark_firefox(kiosk, started_firefox, axe):
    with (
        started_firefox(**DARK) as page,
        contextlib.closing(Visit(page, kiosk.url)) as tab,
    ):
        assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
        show_an_account(tab, kiosk, axe)
        assert tab.faults == []


@pytest.mark.slow
@in_browser
def test_control_what_a_user_of_firefox_cannot_read_is_found(kiosk, firefox, axe):
    with contextlib.closing(Visit(firefox, kiosk.url)) as tab:
        tab.see("#ways input")
        tab.page.evaluate("document.querySelector('label').remove()")
        with pytest.raises(AssertionError, match="label"):
            check_accessible(tab, axe, [None])


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
            while not any(found in fault for fault in tab.faults):
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
def test_page_works_in_a_firefox_without_site_data_and_says_that_it_forgets(kiosk, started_firefox):
    look = "() => { try { sessionStorage; } catch (error) { return error.name; } }"
    with (
        started_firefox(**WITHOUT_SITE_DATA) as page,
        contextlib.closing(Visit(page, kiosk.url)) as tab,
    ):
        assert page.evaluate(look) == "SecurityError"
        tab.see("#forgetful")
        tab.field("Token").fill(kiosk.token)
        tab.press("Sign in")
        tab.see("#balance", "$0.00")
        assert tab.faults == []


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
