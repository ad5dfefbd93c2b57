"""Tells the address of a client behind a trusted proxy. wallet.py loads this where there is one."""

from __future__ import annotations

import re
from contextlib import suppress
from ipaddress import ip_address

from wallet import ConfigurationError


class Proxy:
    """The one proxy whose word is taken for where a request comes from.

    Raises ConfigurationError for what is no IP address.
    """

    def __init__(self, address: str) -> None:
        try:
            self.address = _parse_address(address)
        except ValueError:
            raise ConfigurationError(
                "WALLET_TRUSTED_PROXY must be the IP address of one proxy: if any were trusted, as"
                " by *, whoever reaches the wallet could forge an address") from None

    def find_client(self, peer: str, forwarded_for: str) -> str:
        """Return the client's address: the peer's, or what the proxy says it is."""
        with suppress(ValueError):
            peer = _parse_address(peer)
            if peer == self.address:
                forwarded = forwarded_for.rpartition(",")[2].strip()
                # Some proxies add the port, and then an address of IPv6 is in brackets.
                with_port = re.fullmatch(r"\[(.+)\](?::[0-9]+)?|([0-9.]+):[0-9]+", forwarded)
                return _parse_address(with_port[1] or with_port[2] if with_port else forwarded)
        return peer


def _parse_address(text: str) -> str:
    """Return an IP address in its one form, so that equal ones compare equal. Raises ValueError."""
    address = ip_address(text.strip().partition("%")[0])  # What follows is a network interface.
    return str(getattr(address, "ipv4_mapped", None) or address)
