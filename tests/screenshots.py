"""Makes the screenshots of the README, and of every state of the page for people to look at.

    python -m tests.screenshots                # Those of the README, into docs.
    python -m tests.screenshots --all FOLDER   # Each state on three screens, light and dark.
    python -m tests.screenshots --all FOLDER refund  # Only the states that are named.

Names and amounts are always the same. The times are of the hours before.
"""

from __future__ import annotations

import argparse
import itertools
import time
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from unittest import mock

from tests.support import HERE, opened_chromium
from wallet import Wallet, running

ISSUER_TOKEN = "a-token-of-the-issuer-for-screenshots"

# Hours ago, whose account, what is done, its amount and its description. A refund is of the last
# charge, and a transfer goes to the second account.
MOVEMENTS = (
    (70, "topup", 15000, "Salary, November"),
    (64, "charge", 1840, "Groceries"),
    (51, "charge", 4995, "Order 1041"),
    (49.5, "refund", 999, "Order 1041, one item"),
    (46, "topup", 2500, "Gift card"),
    (40, "transfer", 3000, "Dinner, my half"),
    (27, "charge", 620, "Coffee for two"),
    (22, "topup", 5000, None),
    (16, "charge", 2790, "Train to Lyon"),
    (9, "charge", 1299, "Order 1057"),
    (6, "hold", 3000, "Room 5"),
    (3, "charge", 450, "Lunch"),
    (1.5, "refund", 450, "Lunch was cold"),
    (0.5, "hold", 1200, "Bicycle, until tonight"),
)
FIRST_NAMES = (
    "Ada", "Grace", "Alan", "Edsger", "Barbara", "Donald", "Frances", "Ken", "Radia", "Tim",
)
LAST_NAMES = ("Lovelace", "Hopper", "Turing", "Dijkstra", "Liskov", "Knuth")


def fill(wallet):
    """Make sixty accounts and what moves in them. Return the token of the first."""
    now_ns, hour_ns = time.time_ns(), 3600 * 10**9
    accounts, charge = [], ""
    with mock.patch("time.time_ns") as clock:
        for number, names in enumerate(itertools.product(LAST_NAMES, FIRST_NAMES)):
            clock.return_value = now_ns - (100 - number // 3) * hour_ns
            accounts.append(wallet.register(" ".join(reversed(names))))
        (ada, token), *others = accounts
        for hours, action, amount, description in MOVEMENTS:
            clock.return_value = now_ns - int(hours * hour_ns)
            of = {"refund": [charge], "transfer": [others[0][0].id]}.get(action, [])
            made = getattr(wallet, action)(ada.id, *of, amount, description)
            charge = made.id if action == "charge" else charge
        for number, (account, _) in enumerate(others):
            clock.return_value = now_ns - (48 - number * 5 % 48) * hour_ns
            wallet.topup(account.id, 2000 + number * 1370 % 9000, f"Order {2000 + number}")
            clock.return_value += hour_ns // 2
            wallet.charge(account.id, 300 + number * 710 % 1600)
    return token


# The states of the page ###########################################################################


def sign_in(page, token):
    page.get_by_role("textbox", name="Token").fill(token)
    page.get_by_role("button", name="Sign in").click()


def signed_out(page, token):
    page.get_by_role("textbox", name="Name").wait_for()


def registered(page, token):
    """Show a new account, with the token that is told once."""
    page.get_by_role("textbox", name="Name").fill("Ada Lovelace")
    page.get_by_role("button", name="Register").click()
    page.locator(".token").wait_for()


def holder(page, token):
    """Show an account with holds and a history."""
    sign_in(page, token)
    page.get_by_text("Lunch was cold").wait_for()
    page.get_by_text("Room 5").first.wait_for()


def refused(page, token):
    """Show what is said of a charge that is too high."""
    holder(page, token)
    page.get_by_role("radio", name="Charge").check()
    page.get_by_role("textbox", name="Amount").fill("900")
    page.get_by_role("button", name="Charge", exact=True).click()
    page.locator(".error").filter(visible=True).wait_for()


def refund(page, token):
    """Show the dialog of a refund."""
    holder(page, token)
    page.get_by_role("button", name="Refund $12.99").click()
    page.get_by_role("dialog").wait_for()


def issuer(page, token):
    """Show what the issuer's token opens: all accounts in sum, and the newest movements."""
    sign_in(page, ISSUER_TOKEN)
    page.locator("#newest > li").first.wait_for()


def accounts(page, token):
    """Show the issuer's list of accounts."""
    sign_in(page, ISSUER_TOKEN)
    page.get_by_role("link", name="Accounts").click()
    page.locator("#listed > li").first.wait_for()


def managed(page, token):
    """Show an account as the issuer sees it."""
    accounts(page, token)
    page.get_by_role("searchbox", name="Search").fill("Ada Lovelace")
    page.get_by_role("link", name="Ada Lovelace").click()
    page.get_by_text("Lunch was cold").wait_for()


# By name: what leads to the state, and whether the wallet has an issuer.
STATES = {
    "signed-out": (signed_out, False),
    "registered": (registered, False),
    "holder": (holder, False),
    "refused": (refused, False),
    "refund": (refund, False),
    "issuer": (issuer, True),
    "accounts": (accounts, True),
    "managed": (managed, True),
}

IN_README = ("holder", "issuer")


# What is made of them #############################################################################

README_SCREEN = {"width": 1200, "height": 800}
SCREENS = tuple(
    {"width": width, "height": height} for width, height in ((360, 800), (768, 1024), (1440, 900))
)


DRAWN = "new Promise((drawn) => requestAnimationFrame(() => setTimeout(drawn)))"


@contextmanager
def in_state(name, browser, screen, scheme):
    """Show a state of the page on a screen of this size, in a new wallet."""
    reach, with_issuer = STATES[name]
    with ExitStack() as stack:
        wallet = stack.enter_context(Wallet())
        token = fill(wallet)
        url = stack.enter_context(running(wallet, ISSUER_TOKEN if with_issuer else None))
        page = stack.enter_context(
            closing(browser.new_page(viewport=screen, color_scheme=scheme, locale="en"))
        )
        page.goto(url)
        reach(page, token)
        page.evaluate(DRAWN)
        yield page


def stretch(page):
    """Make the screen as high as the page: rows that are out of sight are not drawn."""
    for _ in range(2):  # What is drawn then may have another height than was kept free for it.
        height = page.evaluate("document.documentElement.scrollHeight")
        page.set_viewport_size({**page.viewport_size, "height": height})
        page.evaluate(DRAWN)


def shoot(page, path):
    """Write a screenshot, and tell what it weighs, and whether it must be scrolled sideways."""
    path.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=path, animations="disabled", caret="hide")
    wide = page.evaluate("document.documentElement.scrollWidth > innerWidth")
    print(path, f"{path.stat().st_size / 1000:.0f} KB", "WIDER THAN THE SCREEN" if wide else "")


def main():
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--all", type=Path, metavar="FOLDER", help="where all screens go")
    parser.add_argument("states", nargs="*", metavar="STATE", help=", ".join(STATES))
    options = parser.parse_args()
    if wrong := set(options.states) - set(STATES):
        parser.error(f"there is no state {', '.join(sorted(wrong))}")
    with sync_playwright() as playwright, opened_chromium(playwright) as tab:
        browser = tab.context.browser
        if options.all:
            for name, screen, scheme in itertools.product(
                options.states or STATES, SCREENS, ("light", "dark")
            ):
                with in_state(name, browser, screen, scheme) as page:
                    path = options.all / f"{name}-{screen['width']}-{scheme}.png"
                    stretch(page)
                    shoot(page, path)
        else:
            for name in options.states or IN_README:
                with in_state(name, browser, README_SCREEN, "light") as page:
                    shoot(page, HERE / "docs" / f"{name}.png")


if __name__ == "__main__":
    main()
