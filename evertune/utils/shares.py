"""Shares as people read them."""

from __future__ import annotations

import math

UNKNOWN = "\N{EN DASH}"


def percent(share: float | None) -> str:
    """A share as a percentage; an en dash for None and NaN.

    Example:
        >>> percent(0.956), percent(None), percent(float("nan"))
        ('95.6 %', '–', '–')
    """
    return UNKNOWN if share is None or math.isnan(share) else f"{100 * share:.1f} %"
