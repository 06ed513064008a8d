"""Figures as a verdict says them, in its messages and in its table."""

from __future__ import annotations

from typing import Literal

Unit = Literal["share", "records", "ms", "bytes", "agreement", "nats"]


def percent(share: float) -> str:
    """A share in percent.

    >>> percent(0.925)
    '92.5 %'
    """
    return f"{100 * share:.1f} %"


def probability(p_value: float) -> str:
    """A p-value.

    >>> probability(0.0123), probability(1e-9)
    ('p = 0.012', 'p < 0.0001')
    """
    return "p < 0.0001" if p_value < 0.0001 else f"p = {p_value:.2g}"


def figure(value: float | None, unit: Unit) -> str:
    """A value with its unit; empty for None.

    >>> figure(0.925, "share"), figure(12.345, "ms"), figure(91_000_000, "bytes"), figure(300, "records")
    ('92.5 %', '12.3 ms', '91.0 MB', '300')
    """
    if value is None:
        return ""
    return {
        "share": percent(value),
        "ms": f"{value:.1f} ms",
        "bytes": f"{value / 1e6:.1f} MB",
        "records": f"{value:.0f}",
        "agreement": f"{value:.2f}",
        "nats": f"{value:.3f} nats",
    }[unit]


def records(number: int) -> str:
    """A number of records.

    >>> records(1), records(20)
    ('1 record', '20 records')
    """
    return f"{number} {'record' if number == 1 else 'records'}"
