"""Tells browsers what pages may do: those of other origins with a wallet (CORS), and its own.

wallet.py loads this module where origins are set, or for the first page. What browsers do with
these headers is in two standards: https://fetch.spec.whatwg.org/#http-cors-protocol and
https://www.w3.org/TR/CSP3/.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from wallet import SECURITY_HEADERS, ConfigurationError, _Response

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

PAGE_BYTES_MAX = 2**20  # A longer one is compressed.
PREFLIGHT_S = 600  # A browser keeps so long what it was told about an origin.
# What pages of allowed origins may read, and send.
EXPOSED = {"Access-Control-Expose-Headers": "Link, X-Request-Id, Idempotent-Replayed, Retry-After"}
PREFLIGHT = {
    "Access-Control-Allow-Headers": "Authorization, Content-Type, Idempotency-Key, X-Request-Id",
    "Access-Control-Max-Age": str(PREFLIGHT_S)}


class Cors:
    """The origins whose pages may use the wallet. Raises ConfigurationError for what is none."""

    def __init__(self, origins: Sequence[str]) -> None:
        # A browser leaves out the port that a scheme has anyway.
        form = (r"(?!http:.*:80$|https:.*:443$)[a-z][a-z0-9+.-]*://"
                r"([a-z0-9_.-]+|\[[0-9a-f:]+\])(:[1-9][0-9]{0,4})?")
        self.origins = frozenset(origins)
        if list(origins) != ["*"] and not all(re.fullmatch(form, one) for one in origins):
            raise ConfigurationError(
                "--cors-origin or WALLET_CORS_ORIGIN must be * alone, or origins as browsers send"
                " them, in lower case, without a path or a slash behind, and without :443 or :80:"
                " such as https://shop.example or http://127.0.0.1:8000, and not"
                f" {' '.join(origins)!r}")

    def headers(self, environ: WSGIEnvironment) -> dict[str, str]:
        """Return what lets a page of another origin read the answer, if its origin is allowed.

        /metrics is left out: it has no token, and a page could ask from its visitor's network.
        """
        if environ["PATH_INFO"] == "/metrics":
            return {}
        if "*" in self.origins:
            return {"Access-Control-Allow-Origin": "*", **EXPOSED}
        if (origin := environ.get("HTTP_ORIGIN", "")) not in self.origins:
            return {"Vary": "Origin"}
        return {"Access-Control-Allow-Origin": origin, "Vary": "Origin", **EXPOSED}

    def preflight(self, environ: WSGIEnvironment, allow: str) -> _Response | None:
        """Return the answer to a browser's question before a request, if this is an allowed one."""
        is_asked = "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ
        if (environ["REQUEST_METHOD"] == "OPTIONS" and is_asked
                and "Access-Control-Allow-Origin" in self.headers(environ)):
            return _Response(200, b"", {"Access-Control-Allow-Methods": allow, **PREFLIGHT})
        return None


@lru_cache(2)
def make_page(page: bytes) -> _Response:
    """Return a page. It may run its own script and style, known by their hashes, and ask us."""
    policy = SECURITY_HEADERS["Content-Security-Policy"] + "; connect-src 'self'; img-src data:"
    for tag in ("script", "style"):
        source = page.partition(f"<{tag}>".encode())[2].partition(f"</{tag}>".encode())[0]
        digest = base64.b64encode(hashlib.sha256(source).digest()).decode()
        policy += f"; {tag}-src 'sha256-{digest}'"
    headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": policy}
    if len(page) > PAGE_BYTES_MAX:
        page, headers["Content-Encoding"] = gzip.compress(page), "gzip"
    return _Response(200, page, headers)
