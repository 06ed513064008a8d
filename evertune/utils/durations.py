"""Lengths of time as settings."""

from __future__ import annotations

import re
from datetime import timedelta

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def duration(name: str, period: str | float | timedelta) -> timedelta:
    """The length of a period.

    Args:
        name: Name of the setting, for the message of the error.
        period: A number and a unit, such as ``"90s"``, ``"30m"``, ``"12h"``, ``"1d"`` or ``"2w"``; or a number of
            seconds.

    Raises:
        ValueError: If the period cannot be parsed, is not positive, or is too long for a ``timedelta``.

    Example:
        >>> duration("window", "1.5 h").total_seconds()
        5400.0
    """
    try:
        if isinstance(period, str):
            match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", period.strip())
            length = timedelta(**{_UNITS[match[2]]: float(match[1])}) if match else timedelta(0)
        else:
            length = period if isinstance(period, timedelta) else timedelta(seconds=period)
    except (OverflowError, ValueError):  # too long, or NaN
        length = timedelta(0)
    if length <= timedelta(0):
        raise ValueError(f"{name} must be a number and a unit (s, m, h, d, w), such as '12h', got {period!r}")
    return length
