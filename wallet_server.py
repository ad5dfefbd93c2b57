"""Serves the wallet's application with waitress, within limits.

wallet.py loads this module for `running` and `python wallet.py`. Under another server, such as
Gunicorn, nothing here is needed.
"""

from __future__ import annotations

import copy
import errno
import logging
import math
import re
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

# mypy: disable-error-code="import-untyped,import-not-found"
# mypy: allow-subclassing-any
from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.buffers import OverflowableBuffer
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import TcpWSGIServer
from waitress.task import ThreadedTaskDispatcher, WSGITask
from waitress.utilities import BadRequest

from wallet import (
    BATCH_BODY_BYTES_MAX,
    BATCH_PATH,
    BODY_BYTES_MAX,
    HEADER_BYTES_MAX,
    RECEIVED,
    REFUSAL,
    STATEMENT_END,
    STATEMENTS_MAX,
    App,
    BodyTooLarge,
    ConfigurationError,
    HeadersTooLarge,
    InternalError,
    MalformedRequest,
    NotReady,
    Unavailable,
    WalletError,
    _import_part,
    _loggable,
    count_running,
    logger,
)

CONNECTIONS_MAX = 2000  # At once. Each costs a file descriptor and a few kilobytes.
CONNECTIONS_MIN = 16  # However few files there may be. The server itself counts as two.
FILES_SPARE = 64  # Descriptors for all else.
FILES_THREAD = 3  # For each thread: the database and its log, or a long answer.
REQUEST_TIMEOUT_S = 10  # From a request's first byte to its last.
ANSWER_TIMEOUT_S = 30  # For a client to read an answer, or UNREAD_BYTES_MAX more of a long one.
UNREAD_BYTES_MAX = 256 * 1024
SOCKET_OPTIONS = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    # The kernel would keep megabytes for a slow reader, and what it has read would show late.
    (socket.SOL_SOCKET, socket.SO_SNDBUF, UNREAD_BYTES_MAX // 2)]
IDLE_TIMEOUT_S = 60  # Between two requests of a connection: longer than clients usually pool one.
CROWDED_IDLE_S = 1  # The same, while there is no room for another connection.
WARNING_PAUSE_S = 60  # Between two warnings that all connections are taken.
WATCH_INTERVAL_S = 1  # Between two looks for clients that are late.
STOP_TIMEOUT_S = 10  # To finish when the server is told to stop. Supervisors often kill after 30 s.
STOP_IDLE_S = 0.5  # A connection that was used so recently may be sending its next request.
RUNNING_MAX = 2  # Requests that could go on at once, of which Python runs one.
PATIENCE_S = 0.002  # Then one more begins: those may wait for a disk, which Python does not.
BUSY_PATIENCE_S = 0.02  # While no thread is free. Each look is at all connections.
QUEUE_TIMEOUT_S = 5  # For a request to wait for a thread: as long as those before it may take.
# Why a socket cannot be had yet, and what to do.
MAY_PASS = {errno.EADDRINUSE: "stop what has it, or choose another",
            errno.EADDRNOTAVAIL: "name an address of this machine, or wait for its network",
            socket.EAI_AGAIN: "name an address of this machine, or wait for its network"}
CHOOSE = "name an address of this machine, and a port from 1024 on"  # Those below are for root.

TLS = b"\x16"  # With which a handshake begins (RFC 8446, section 5.1), and no request does.
NO_TLS = "this port does not speak TLS: use http, or a proxy that has a certificate"
# What two servers in a row might read in two ways: that is how a request is smuggled past a proxy
# (RFC 9112, sections 5.2 and 6.1). And what waitress's own patterns would take seconds over.
# Most begin with a line's end, so that a search for them is short.
LENGTH = rb"\n(?:content-length|transfer-encoding)[ \t]*:"
KEY = rb"\nidempotency-key[ \t]*:"
MALFORMED = {re.compile(pattern, re.IGNORECASE | re.DOTALL): reason for pattern, reason in (
    (rb"\A(?![!-~]+ [^\x00-\x20\x7f]+ HTTP/1\.[01](?:\r\n|\Z))", "the request line is malformed"),
    (rb"\n[ \t]", "a header is folded, or has too much white space"),
    (rb"[ \t]{64}", "a header is folded, or has too much white space"),
    (LENGTH + rb"(?![ \t]*[^\s,]+[ \t\r]*(?:\n|\Z))", "the length of the body must be told once"),
    (LENGTH + b".*" + LENGTH, "the length of the body must be told once"),
    (rb"\A[^\n]*HTTP/1\.0\r.*\ntransfer-encoding[ \t]*:",
     "Transfer-Encoding goes with HTTP/1.1 only"),
    (KEY + b".*" + KEY, "Idempotency-Key came more than once"),
)}


class _Parser(HTTPRequestParser):
    """waitress's parser, which refuses what is MALFORMED too."""

    command = path = "-"  # A request that is refused before these are known is logged all the same.
    request_uri = query = url_scheme = ""
    received_at = 0.0  # Its last byte.

    def received(self, data: bytes) -> int:
        self.received_at = time.monotonic()
        if not self.headers_finished and (self.header_plus + data).lstrip()[:1] == TLS:
            self.error, self.completed = BadRequest(NO_TLS), True
            return len(data)
        return int(super().received(data))

    def parse_header(self, header_plus: bytes) -> None:
        for pattern, reason in MALFORMED.items():
            if pattern.search(header_plus):
                raise ParsingError(reason)
        try:
            super().parse_header(header_plus)
        except ValueError:  # urlsplit and int raise it.
            raise ParsingError("the target or the length is malformed") from None
        if self.path == BATCH_PATH:
            self.adj: Adjustments = copy.copy(self.adj)
            self.adj.max_request_body_size = BATCH_BODY_BYTES_MAX + 1


class _Task(WSGITask):
    """Lets the application answer even what the parser refused. That ends the connection."""

    wrote_header = False

    def start(self) -> None:
        super().start()
        self.channel.answered += 1
        is_last = self.channel.server.application.stopping and len(self.channel.requests) == 1
        # Who sends many requests and reads no answer gets no more of them kept. And of a body in
        # chunks waitress ignores trailers: a proxy may see its end elsewhere.
        if (is_last or self.channel.total_outbufs_len > UNREAD_BYTES_MAX or self.request.error
                or self.request.chunked):
            self.set_close_on_finish()
            self.request.headers.pop("CONNECTION", None)  # Else HTTP/1.0 is promised the contrary.

    def write(self, data: bytes) -> None:
        if not data or self.wrote_header or self.content_length != len(data):
            _keep_small(self.channel)
            super().write(data)
            self.chunked_response &= self.request.command != "HEAD"  # Which has no last chunk.
        else:
            _leave_to_loop(self.channel, self.build_response_header() + data)
            self.wrote_header, self.content_bytes_written = True, len(data)

    def get_environment(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environment()
        environ[RECEIVED], environ["PATH_INFO"] = self.request.received_at, self.request.path
        environ[REFUSAL] = _find_refusal(self.channel, self.request)
        return environ


class _Logger(logging.LoggerAdapter):  # type: ignore[type-arg]  # 3.10 takes no argument.
    """A logger for lines that clients have a say in."""

    def process(self, msg: Any, kwargs: Any) -> tuple[str, Any]:
        return _loggable(str(msg)), kwargs


class _Channel(HTTPChannel):
    """A connection. `step` is what its client has to do next, since `step_at`."""

    parser_class, task_class, error_task_class = _Parser, _Task, _Task
    logger = _Logger(logging.getLogger("waitress"), {})
    will_close, lingering, answered, queued_at, step, step_at = False, False, 0, 0.0, (-1, 0), 0.0

    def send_continue(self) -> None:
        if not self.request.completed:  # It may be refused, or have no body.
            super().send_continue()

    def received(self, data: bytes) -> bool:
        return self.lingering or bool(super().received(data))

    def handle_close(self) -> None:
        """Close, once the client has: one that still sends would lose our last answer."""
        if self.lingering or self.total_outbufs_len or not (self.connected and self.will_close):
            super().handle_close()
            return
        self.lingering, self.will_close = True, False
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def is_late(self, now: float, idle_s: float) -> bool:
        """Has the client taken too long to read on, to complete a request, or to begin one?"""
        unread = self.total_outbufs_len
        step = (self.answered, unread // UNREAD_BYTES_MAX + 1 if unread else -bool(self.request))
        if self.step != step or (self.requests and not unread):
            self.step, self.step_at = step, now
        idle_s = min(idle_s, REQUEST_TIMEOUT_S) if self.lingering else idle_s
        limit_s = ANSWER_TIMEOUT_S if unread else REQUEST_TIMEOUT_S if self.request else idle_s
        return now - self.step_at > limit_s


class _Turns:
    """Lets few requests run at once, besides those that wait for the database.

    Python runs one thread at a time: the more there are that could run, the longer each waits for
    its next turn, and the more of the processor the turns take.
    """

    def __init__(self, pool: ThreadedTaskDispatcher) -> None:
        self.ready, self._pool, self._lock = deque[_Channel](), pool, threading.Lock()
        self._running, self._begun_at = 0, 0.0
        pool.queue_logger = logging.Logger("waitress.queue", logging.ERROR)

    def add(self, channel: _Channel) -> None:
        if not self.ready:  # Nobody has had to wait so far.
            self._begun_at = channel.queued_at
        self.ready.append(channel)
        self.count(0)

    def count(self, change: int, running_max: float = RUNNING_MAX) -> None:
        """Count those that run. Let a thread begin if there is work, and they are few."""
        with self._lock:
            self._running += change
            if not self.ready or self._running >= running_max:
                return
            self._running += 1
        self._pool.add_task(self)

    def look(self, timeout_s: float) -> float:
        """Let one more run if none has begun for a while. Return when to look again."""
        pool, now = self._pool, time.monotonic()
        is_idle = pool.active_count + len(pool.queue) < len(pool.threads)
        if is_idle and self.ready and now - self._begun_at > PATIENCE_S:
            self._begun_at = now  # Else each turn of the loop lets one more run meanwhile.
            self.count(0, math.inf)
        pause_s = PATIENCE_S if is_idle else BUSY_PATIENCE_S
        return min(timeout_s, pause_s) if self.ready else timeout_s

    def service(self) -> None:
        """Serve one request after the other. A thread of the pool calls this."""
        count_running.set(self.count)
        try:
            while channel := self._take():
                channel.service()
                if self._running > RUNNING_MAX:  # Those that waited have gone on.
                    break
        finally:
            self.count(-1)

    def end(self) -> None:
        """Begin nothing more, and wait a second for what runs."""
        self.ready.clear()
        self._pool.shutdown(timeout=1)

    def cancel(self) -> None:
        """Do nothing: the pool has no thread left for it."""

    def _take(self) -> _Channel | None:
        with self._lock:
            self._begun_at = time.monotonic()
            return self.ready.popleft() if self.ready else None


class Server(TcpWSGIServer):
    channel_class, logger = _Channel, logging.Logger("waitress", logging.ERROR)
    serve_until = next_channel_cleanup = math.inf  # `turn` cleans up, by a clock nobody can set.
    looked_at, warned_until, is_draining, is_woken = 0.0, 0.0, False, False

    def __init__(self, app: App, bound: socket.socket, threads: int) -> None:
        self.url, self.ending, self.probes = url_of(bound), threading.RLock(), deque[_Channel]()
        settings = Adjustments(
            ident="", backlog=CONNECTIONS_MAX, threads=threads,
            connection_limit=connections_max(threads),
            max_request_header_size=HEADER_BYTES_MAX + 1, max_request_body_size=BODY_BYTES_MAX + 1,
            outbuf_high_watermark=sys.maxsize,  # What is not read yet is spooled, not waited for.
            log_socket_errors=False, clear_untrusted_proxy_headers=False)
        settings.socket_options, self.sockets = SOCKET_OPTIONS, dict[int, Any]()
        super().__init__(app, map=self.sockets, _sock=bound, bind_socket=False, adj=settings,
                         sockinfo=(bound.family, bound.type, bound.proto, bound.getsockname()))
        self.turns = _Turns(self.task_dispatcher)

    def add_task(self, task: _Channel) -> None:
        """Queue a request, but let the loop answer /livez, even while all threads are busy."""
        task.queued_at = time.monotonic()
        (self.probes.append if task.requests[0].path == "/livez" else self.turns.add)(task)

    def turn(self, timeout_s: float, idle_s: float) -> None:
        """Handle what happens next. Now and then, let go of clients that are late."""
        wasyncore.loop(self.turns.look(timeout_s), use_poll=True, map=self.sockets, count=1)
        self.is_woken = False
        while self.probes:
            self.probes.popleft().service()
        if (now := time.monotonic()) - self.looked_at >= timeout_s:
            self.looked_at = now
            _close_late(self, now, idle_s)

    def run(self) -> None:
        """Serve until `stop`; then answer what was received, for STOP_TIMEOUT_S at most."""
        while (left_s := self.serve_until - time.monotonic()) > 0:
            self.turn(min(left_s, WATCH_INTERVAL_S),
                      CROWDED_IDLE_S if self.in_connection_overflow else IDLE_TIMEOUT_S)
        for _ in range(CONNECTIONS_MAX):  # Take what the kernel has accepted for us.
            self.handle_accept()
        wasyncore.dispatcher.close(self)
        logger.info("stopping: %d connections are open", len(self.active_channels))
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while self.active_channels and time.monotonic() < deadline:
            self.turn(0.05, STOP_IDLE_S)
        self.turns.end()
        with self.ending:
            wasyncore.close_all(self.sockets)
        logger.info("stopped")

    def stop(self, drain_s: float = 0) -> None:
        """Make `run` return, so much later. Any thread may call it, and a signal handler."""
        self.application.stopping, self.serve_until = True, time.monotonic() + drain_s
        self.pull_trigger()

    def pull_trigger(self) -> None:
        if not self.is_woken:  # Else the loop looks at all connections soon.
            with self.ending:  # After the end, the number of its pipe may be another file's.
                if self.sockets:
                    self.is_woken = True
                    super().pull_trigger()


def _leave_to_loop(channel: _Channel, answer: bytes) -> None:
    """Let the loop send a whole answer. A thread that sends gives up its turn, and waits for it."""
    outbuf = OverflowableBuffer(channel.adj.outbuf_overflow)
    outbuf.append(answer)
    with channel.outbuf_lock:
        channel.outbufs.append(outbuf)
        channel.total_outbufs_len += len(answer)


def _keep_small(channel: _Channel) -> None:
    """Let waitress begin another buffer, so that it forgets what was sent of a long answer.

    One that spools to a file needs no memory, and goes on.
    """
    is_read = channel.total_outbufs_len < channel.adj.outbuf_overflow  # Else the last one spools.
    is_long = channel.current_outbuf_count > UNREAD_BYTES_MAX
    if is_read and is_long and not channel.outbufs[-1].overflowed:
        channel.current_outbuf_count = sys.maxsize


def _find_refusal(channel: _Channel, request: _Parser) -> WalletError | None:
    """Return the error with which to refuse a request, if there is a reason."""
    if error := request.error:
        reason = error.body.partition(' "')[0]  # The line itself follows; it may hold a token.
        refusals = {413: BodyTooLarge(), 431: HeadersTooLarge(), 500: InternalError()}
        malformed = MalformedRequest(f"The request is not valid HTTP: {reason}.")
        return refusals.get(error.code, malformed)
    if time.monotonic() - channel.queued_at > QUEUE_TIMEOUT_S:
        return Unavailable("Too many requests wait, and nothing was changed.", reason="queue")
    if request.path.endswith(STATEMENT_END) and is_spooling(channel.server):
        refusal: WalletError = _import_part("statements").too_many_statements()
        return refusal
    return None


def _close_late(server: Server, now: float, idle_s: float) -> None:
    """Close the connections of clients that are late. Say what an operator waits to hear."""
    left_s = server.serve_until - now
    if server.application.stopping and left_s > 0 and not server.is_draining:
        server.is_draining = True
        logger.info("draining for %.0f s: /readyz answers 503, and all else is served", left_s)
    if server.in_connection_overflow and now > server.warned_until:
        server.warned_until = now + WARNING_PAUSE_S
        logger.warning("all %d connections are taken: others wait", len(server.active_channels))
    for channel in list(server.active_channels.values()):
        if channel.is_late(now, idle_s):
            if channel.request or channel.total_outbufs_len:
                logger.info("closed a connection that was too slow")
                server.application.count_refusal("slow")
            channel.lingering = True
            channel.handle_close()


def is_spooling(server: Server) -> bool:
    """Are there as many long answers that clients have not read as there may be?"""
    unread: list[int] = [one.total_outbufs_len for one in list(server.active_channels.values())]
    return sum(length > UNREAD_BYTES_MAX for length in unread) >= STATEMENTS_MAX


def usage(server: Server) -> dict[str, int]:
    """Return how many requests wait and run, and how many connections are open."""
    return {"waiting": len(server.turns.ready), "running": server.task_dispatcher.active_count,
            "connections": len(server.active_channels)}


def connections_max(threads: int) -> int:
    """Return how many connections this process has descriptors for."""
    try:
        import resource
    except ImportError:  # Windows has no such limit.
        return CONNECTIONS_MAX
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)  # Below 0 there is none.
    spare = FILES_SPARE + FILES_THREAD * threads
    return CONNECTIONS_MAX if soft < 0 else max(CONNECTIONS_MIN, min(CONNECTIONS_MAX, soft - spare))


def raise_file_limit(threads: int) -> None:
    """Let this process open as many files as it may have connections, if that is allowed."""
    with suppress(ImportError, OSError, ValueError):  # Windows has no such limit.
        import resource

        wanted = CONNECTIONS_MAX + FILES_SPARE + FILES_THREAD * threads
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= soft < wanted:  # Below 0 there is no limit.
            wanted = wanted if hard < 0 else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def bind(host: str, port: int) -> socket.socket:
    """Return a socket with this address that does not listen yet. Raises ConfigurationError."""
    with ExitStack() as failed:
        try:
            bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            failed.callback(bound.close)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if ":" in host:
                # So :: is all addresses, of IPv4 too, as other servers have it.
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            bound.bind((host, port))
        except OSError as error:
            kind = NotReady if error.errno in MAY_PASS else ConfigurationError
            advice = MAY_PASS.get(error.errno or 0, CHOOSE)
            raise kind(f"cannot listen on {host} port {port}: {error.strerror}: {advice}"
                       ) from error
        failed.pop_all()
        return bound


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def serving(app: App) -> Iterator[str]:
    """Serve on a free port, beside the program that asks for it. Yield the URL."""
    server = Server(app, bind("127.0.0.1", 0), threads=4)
    thread = threading.Thread(target=server.run, name="wallet", daemon=True)
    thread.start()
    try:
        yield server.url
    finally:
        server.stop()
        thread.join()
