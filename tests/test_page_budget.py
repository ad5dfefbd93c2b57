"""What the page may weigh, and what it may ask for before a person sees something."""

from __future__ import annotations

import pytest

import wallet as wallet_module
from tests.support import PAGE, in_both_browsers, in_browser
from wallet import running

PAGE_BYTES_MAX = 80_000

FIRST_PAINT = """() => new Promise((seen, failed) => {
    new PerformanceObserver((list) => {
        if (list.getEntriesByName("first-contentful-paint").length) requestAnimationFrame(seen);
    }).observe({ type: "paint", buffered: true });
    setTimeout(() => failed("Nothing is to be seen after 20 s."), 20000);
})"""


def test_page_is_small():
    assert len(PAGE) < PAGE_BYTES_MAX


def asked_before_first_paint(page, url):
    """Load the page from a wallet that does not answer yet. Return what it had asked for when there
    was something to see.
    """
    held = []
    page.goto("about:blank")  # What was here before must not ask any more.
    page.route(lambda address: address != f"{url}/", lambda route: held.append(route))
    page.goto(url, wait_until="commit")
    page.evaluate(FIRST_PAINT)
    page.unroute_all()  # They go on now.
    return [route.request.url for route in held]


def check_first_paint(page, url, token):
    """Assert that a person sees something after one call at most, signed in or not."""
    try:
        page.goto(url)
        for kept in ("", token):
            page.evaluate("(token) => sessionStorage.setItem('wallet-token', token)", kept)
            asked = asked_before_first_paint(page, url)
            assert all(address.startswith(f"{url}/api/") for address in asked), asked
            assert len(asked) <= 1, asked
    finally:
        page.evaluate("sessionStorage.clear()")
        page.goto("about:blank")


@in_browser
@in_both_browsers
def test_page_is_seen_after_itself_and_one_call_at_most(kiosk, browser):
    check_first_paint(browser, kiosk.url, kiosk.token)


@in_browser
@in_both_browsers
@pytest.mark.parametrize("careless", ["fetch('api/holds'), fetch('api/holds')", "fetch('livez')"])
def test_control_page_that_asks_for_more_before_it_is_seen_is_found(
    kiosk, browser, careless, monkeypatch
):
    read, script = wallet_module._read_file, b"<script>"
    monkeypatch.setattr(
        wallet_module,
        "_read_file",
        lambda name: read(name).replace(script, script + careless.encode() + b";"),
    )
    with running(kiosk.wallet) as url, pytest.raises(AssertionError, match=r"api/holds|livez"):
        check_first_paint(browser, url, kiosk.token)
