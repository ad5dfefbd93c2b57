"""Reads times. wallet.py loads this for the first one that it is asked about."""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import datetime

from wallet import MalformedRequest, _as_time, _as_us

FIRST_US, LAST_US = -62_135_596_800_000_000, 253_402_300_799_999_999  # Of the years 1 to 9999.


def parse_time(value: str | datetime) -> int:
    """Return a time, of RFC 3339 or aware, in microseconds since 1970. Raises MalformedRequest.

    A leap second, which ends a month in UTC, counts as the second after it. What is before year 1
    or after 9999 counts as the nearest time in them.
    """
    hour_minute = r"(?:[01]\d|2[0-3]):[0-5]\d"
    pattern = (rf"(\d{{4}})(-\d\d-\d\d)[Tt ]({hour_minute}):([0-5]\d|60)(?:\.(\d+))?"
               rf"([Zz]|[-+ ]{hour_minute})")
    with suppress(ValueError, TypeError, OverflowError):
        if isinstance(value, datetime):
            return _as_us(value)
        if match := re.fullmatch(pattern, value, re.ASCII):
            year, day, minute, second, fraction, zone = match.groups("")
            # In a query, a bare plus means a space.
            zone = "+00:00" if zone in "Zz" else zone.replace(" ", "+")
            known_year = "0004" if year == "0000" else year  # Both are leap years.
            time_us = _as_us(datetime.fromisoformat(
                f"{known_year}{day}T{minute}:{min(second, '59')}.{fraction[:6]:0<6}{zone}"))
            if second == "60":
                time_us += 1_000_000
                if not re.match(r".{7}-01T00:00:00", _as_time(time_us).isoformat()):
                    raise ValueError
            return FIRST_US if year == "0000" else min(max(time_us, FIRST_US), LAST_US)
    raise MalformedRequest(
        "A time must be as in RFC 3339: 2026-11-22T09:30:00Z, or with an offset for the Z.")
