"""Where an error arose, for logs that must not quote what it was about."""

from __future__ import annotations

import traceback


def trace(error: Exception) -> str:
    """Where an error arose, the innermost place first, without its message, which may quote a text.

    Example:
        >>> trace(ValueError("a text"))
        'ValueError at '
    """
    places = traceback.extract_tb(error.__traceback__)[-5:]
    return f"{type(error).__name__} at " + " < ".join(f"{p.name} ({p.filename}:{p.lineno})" for p in reversed(places))
