"""Lets Playwright drive Debian's Firefox 140, which is older than Playwright expects.

Playwright runs this in place of Firefox (support.py has the fixture). It starts Firefox, and passes
on what the two say to each other, which is WebDriver BiDi: JSON over a WebSocket. It changes two
things. Commands that Firefox does not know yet, and Playwright sends to every tab, are answered
here, since no test needs what they do. And Playwright's scripts call `eval` within the page, which
a Firefox this old does not let past the page's Content-Security-Policy: `'unsafe-eval'` is added to
it, and all else of it holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys

from websockets.asyncio.client import connect
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed

ABSENT = {
    "browser.setDownloadBehavior",
    "emulation.setLocaleOverride",
    "emulation.setMediaFeaturesOverride",
    "emulation.setScreenOrientationOverride",
    "emulation.setScreenSettingsOverride",
}

# What every test may ask of these: Firefox starts so, if PREFERENCES in support.py are not changed.
GIVEN = {"en", "light"}
REFUSAL = "This Firefox stays as it started: see started_firefox in tests/support.py."

# An answer can be as long as a screenshot, and neither side answers pings while it works.
SOCKET = {"max_size": None, "ping_interval": None, "compression": None}

# The ids of commands of our own. Playwright's begin with 1, and its last ones are above 2**53 - 9.
OWN_IDS = range(2**52, 2**53 - 9)


def with_eval(headers):
    """Return the headers of an answer with a policy that allows `eval` besides what it did."""
    return [
        {
            "name": header["name"],
            "value": header["value"]
            | {"value": header["value"]["value"].replace("script-src", "script-src 'unsafe-eval'")},
        }
        if header["name"].lower() == "content-security-policy"
        else header
        for header in headers
    ]


def wanted(parameters):
    """Return the scheme and the language that a test asks for: it must not take light for dark."""
    scheme = parameters.get("features", {}).get("prefers-color-scheme")
    return {scheme, parameters.get("locale")} - {None}


async def pass_commands(playwright, firefox):
    """Pass on what Playwright asks for, until it leaves."""
    async for text in playwright:
        command = json.loads(text)
        if command["method"] in ABSENT and wanted(command["params"]) - GIVEN:
            answer = {"type": "error", "error": "unsupported operation", "message": REFUSAL}
            await playwright.send(json.dumps({"id": command["id"], **answer}))
        elif command["method"] in ABSENT:
            answer = {"type": "success", "id": command["id"], "result": {}}
            await playwright.send(json.dumps(answer))
        elif command["method"] == "network.addDataCollector":  # Absent too. Asked once, at start.
            instead = {"method": "network.addIntercept", "params": {"phases": ["responseStarted"]}}
            await firefox.send(json.dumps(command | instead))
        else:
            await firefox.send(text)


async def pass_answers(firefox, playwright):
    """Pass on what Firefox answers and tells, until it ends."""
    ids = iter(OWN_IDS)
    async for text in firefox:
        message = json.loads(text)
        if message.get("id", 0) in OWN_IDS:
            continue
        if message.get("method") == "network.responseStarted" and message["params"]["isBlocked"]:
            event = message["params"]
            parameters = {
                "request": event["request"]["request"],
                "headers": with_eval(event["response"]["headers"]),
            }
            command = {"method": "network.continueResponse", "params": parameters}
            await firefox.send(json.dumps({"id": next(ids), **command}))
            event["isBlocked"] = False
            del event["intercepts"]
            text = json.dumps(message)
        await playwright.send(text)


async def relay(address, playwright):
    """Connect Playwright with Firefox, until one of them leaves."""
    async with connect(address + "/session", **SOCKET) as firefox:
        ways = [
            asyncio.create_task(way)
            for way in (pass_commands(playwright, firefox), pass_answers(firefox, playwright))
        ]
        done, going = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in going:
            way.cancel()
        for way in done:
            with contextlib.suppress(ConnectionClosed):
                way.result()


async def main(executable, *arguments):
    """Run Firefox until Playwright has left."""
    process = await asyncio.create_subprocess_exec(
        executable, *arguments, stderr=asyncio.subprocess.PIPE
    )
    left = asyncio.Event()

    async def meet(playwright):
        try:
            await relay(address, playwright)
        finally:
            left.set()

    try:
        async for line in process.stderr:
            if found := re.search(rb"WebDriver BiDi listening on (ws://\S+)", line):
                break
            sys.stderr.buffer.write(line)
        else:
            return  # It did not start, and has said why.
        address = found[1].decode()
        said = asyncio.create_task(process.stderr.read())  # A pipe that is full would stop it.
        async with serve(meet, "127.0.0.1", 0, **SOCKET) as server:
            host, port = server.sockets[0].getsockname()
            print(f"WebDriver BiDi listening on ws://{host}:{port}", file=sys.stderr, flush=True)
            await left.wait()
        said.cancel()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
