"""The best predictions so far on each held-out slice: many small losses, one in each update, add up against them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evertune.gate import statistics
from evertune.gate.predictions import Predictions


@dataclass(frozen=True)
class Best:
    """The best predictions so far on one slice.

    Args:
        version: Number of the version that made them.
        predictions: Its predictions on the held-out records of the slice.
    """

    version: int
    predictions: Predictions

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {"version": self.version, **self.predictions.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Best:
        """What :meth:`to_dict` returned.

        Raises:
            ValueError: If the version is missing, or the rest is not a slice's predictions.
        """
        rest = dict(values)
        version = rest.pop("version", None)
        if type(version) is not int:
            raise ValueError(f"the best predictions of a slice name their version, got {version!r}")
        return cls(version, Predictions.from_dict(rest))


def still_best(best: Mapping[str, Best], now: Mapping[str, Predictions], alpha: float) -> dict[str, Best]:
    """The slices on which a new version is not better than the best one so far.

    A version replaces the best one only if it is better by a paired test at level ``alpha``. By chance alone, some of
    many equal versions is always a little better than the others: to follow each of these would raise the standard
    beyond what any version can reach.

    Args:
        best: The best predictions so far by slice.
        now: Predictions of the new version by slice.
        alpha: Level of the test.

    Example:
        >>> from numpy import ones
        >>> def version(n_right):
        ...     said = ["x"] * n_right + ["y"] * (100 - n_right)
        ...     return Predictions([str(n) for n in range(100)], ["x"] * 100, said, ones(100), ones(100))
        >>> best = {"a": Best(1, version(80)), "b": Best(1, version(80))}
        >>> sorted(still_best(best, {"a": version(83), "b": version(95)}, alpha=0.01))
        ['a']
    """
    return {
        name: one for name, one in best.items() if name not in now or not _better(one.predictions, now[name], alpha)
    }


def _better(old: Predictions, now: Predictions, alpha: float) -> bool:
    places = {one: place for place, one in enumerate(old.ids)}
    common = [place for place, one in enumerate(now.ids) if one in places]
    if not common:
        return True  # the records of which it was best are gone
    old, now = old.pick([places[now.ids[place]] for place in common]), now.pick(common)
    if not now.has_classes:
        return statistics.sign_flips(now.score - old.score) < alpha
    gains, losses = int((~old.correct & now.correct).sum()), int((old.correct & ~now.correct).sum())
    return statistics.mcnemar(losses=gains, gains=losses) < alpha
