"""Checks of what a version costs: the time of a prediction, and the size of the weights."""

from __future__ import annotations

from evertune.gate.predictions import Cost
from evertune.gate.verdict import Check
from evertune.gate.words import Unit, figure


def costs(both: tuple[Cost, Cost], max_latency_ratio: float | None, max_size_ratio: float | None) -> list[Check]:
    """Whether the new version is too slow or too large, as a multiple of production's."""
    old, now = both
    compared: list[tuple[str, float, float, float | None, Unit]] = [
        ("latency of a text", old.latency_ms, now.latency_ms, max_latency_ratio, "ms"),
        ("latency of a batch", old.batch_ms, now.batch_ms, max_latency_ratio, "ms"),
        ("size", old.size_bytes, now.size_bytes, max_size_ratio, "bytes"),
    ]
    checks = []
    for name, before, after, ratio, unit in compared:
        if ratio is not None:
            limit = ratio * before
            words = (
                f"the {name} is {figure(after, unit)}, in production {figure(before, unit)} "
                f"(limit {ratio:g} times as much)"
            )
            checks.append(Check.of_version(name, "", before, after, limit, after <= limit, words, unit=unit))
    return checks
