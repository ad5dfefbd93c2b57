"""Servers that treat HTTP badly on purpose: a proxy that cuts, delays and doubles, and one that
answers what a test has written down.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import threading
import time
from collections import Counter

from wallet_server import bind, url_of

# What may happen to a request. Where it says so, the wallet never hears of it.
FATES = {
    "cut before": 4,  # Not forwarded.
    "cut after": 4,
    "cut in the middle": 4,
    "answered late": 1,
    "sent late": 1,  # When its client has given up, and maybe has sent it again.
    "doubled": 4,
    "answered twice": 2,
    "answered with the one before": 2,  # And then with its own.
    "refused with 502": 2,  # Not forwarded.
    "refused with 503": 2,  # Not forwarded.
    "done and answered with 502": 2,
    "passed on": 72,
}


def read_message(stream):
    """Return the head and the body of the next request or answer, or None if there is none."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = stream.readline()
        if not line:
            return None
        head += line
    length = re.search(rb"(?i)\ncontent-length: *(\d+)", head)
    return head, stream.read(int(length[1])) if length else b""


class Listener:
    """Takes connections on a free port, each in a thread of its own, until it is closed."""

    def __init__(self):
        self.listener = bind("127.0.0.1", 0)
        self.listener.listen(128)
        self.url, self.open = url_of(self.listener), []
        self.threads = [threading.Thread(target=self.accept)]
        self.threads[0].start()

    def accept(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:  # Closed.
                return
            self.open.append(connection)
            self.threads.append(threading.Thread(target=self.serve, args=[connection]))
            self.threads[-1].start()

    def serve(self, connection):
        with connection, connection.makefile("rb") as stream, contextlib.suppress(OSError):
            while message := read_message(stream):
                if not self.answer(connection, *message):
                    return

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Stop, when all that was begun has ended."""
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.threads[0].join(timeout=60)
        for connection in self.open:
            with contextlib.suppress(OSError):  # It is closed already.
                connection.shutdown(socket.SHUT_RD)
        for thread in self.threads:
            thread.join(timeout=60)
            assert not thread.is_alive()


class CuttingProxy(Listener):
    """A proxy in front of a wallet that decides by a seed what happens to a request.

    `fates` may be a list instead, for one request after another.
    """

    def __init__(self, url, fates=1, late_s=0.5):
        self.upstream = re.fullmatch(r"http://([\d.]+):(\d+)", url).groups()
        self.fates, self.late_s, self.seen, self.told = fates, late_s, Counter(), Counter()
        self.keys, self.lock, self.before = [], threading.Lock(), {}
        super().__init__()

    def decide(self, head, body):
        key = re.search(rb"(?i)\nidempotency-key: *(\S+)", head)
        with self.lock:
            self.keys.append(key and key[1].decode())
            if isinstance(self.fates, list):
                fate = self.fates.pop(0) if self.fates else "passed on"
            else:
                self.seen[body] += 1
                chance = random.Random(f"{self.fates} {body} {self.seen[body]}")
                fate = chance.choices(list(FATES), list(FATES.values()))[0]
            self.told[fate] += 1
        return fate

    def forward(self, head, body):
        with socket.create_connection(self.upstream, timeout=30) as upstream:
            upstream.sendall(head + body)
            with upstream.makefile("rb") as stream:
                return b"".join(read_message(stream) or ())

    def answer(self, connection, head, body):
        fate = self.decide(head, body)
        if fate == "cut before":
            return False
        if fate.startswith("refused"):
            connection.sendall(html(int(fate[-3:])))
            return True
        if fate == "sent late":
            time.sleep(self.late_s)
        if fate == "answered with the one before":
            connection.sendall(self.before.get(connection, b""))
        answer = self.forward(head, body)
        if fate == "doubled":
            answer = self.forward(head, body)
        if fate == "answered late":
            time.sleep(self.late_s)
        if fate == "done and answered with 502":
            answer = html(502)
        self.before[connection] = answer
        if fate == "answered twice":
            connection.sendall(answer)
        if fate != "cut after":
            connection.sendall(answer[: len(answer) // 2] if "middle" in fate else answer)
        return not fate.startswith("cut") and bool(answer)


def http_answer(status, body, content_type="application/json", **headers):
    """Return an answer as bytes, for a list of those that a test has written down."""
    document = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": content_type, "Content-Length": len(document), **headers}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} Said\r\n{lines}\r\n".encode() + document


def html(status):
    return http_answer(status, b"<h1>Bad Gateway</h1>", "text/html")


def problem(status, code, sent_with=None, **members):
    document = {"title": "No.", "status": status, "detail": "no", "code": code, **members}
    return http_answer(status, document, "application/problem+json", **sent_with or {})


class Scripted(Listener):
    """A server that gives one answer after another, and the last one again and again.

    An answer is bytes; or a list of bytes with a pause before each but the first; or None, which
    closes the connection without any. It notes the requests, and when each came.
    """

    def __init__(self, *answers, pause_s=0.05):
        self.answers, self.pause_s = list(answers), pause_s
        self.requests, self.times, self.connections = [], [], 0
        super().__init__()

    def serve(self, connection):
        self.connections += 1
        super().serve(connection)

    def answer(self, connection, head, body):
        self.requests.append(head + body)
        self.times.append(time.monotonic())
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        for index, piece in enumerate([answer] if isinstance(answer, bytes) else answer or ()):
            time.sleep(self.pause_s if index else 0)
            connection.sendall(piece)
        return isinstance(answer, bytes)
