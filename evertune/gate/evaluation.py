"""The predictions of a version that are stored with it: what later versions are compared with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from evertune.gate.best import Best
from evertune.gate.predictions import Predictions


@dataclass(frozen=True)
class Evaluation:
    """The content of a version's ``evaluation.json``.

    Args:
        slices: The predictions of the version on the records held out of each update, by the name of the slice.
        best: The best predictions so far, on the slices where they are not the version's own.
        base: The predictions on general texts and probes, which no update trains
            (:func:`~evertune.gate.checks.base.base_checks`).
    """

    slices: Mapping[str, Predictions]
    best: Mapping[str, Best] = field(default_factory=dict)
    base: Mapping[str, Predictions] = field(default_factory=dict)

    def without(self, ids: Collection[str]) -> Evaluation:
        """The same without the predictions on some records."""
        return Evaluation(
            {name: said.without(ids) for name, said in self.slices.items()},
            {name: Best(one.version, one.predictions.without(ids)) for name, one in self.best.items()},
            self.base,
        )

    def __len__(self) -> int:
        """The number of predictions, the best included."""
        return sum(map(len, self.slices.values())) + sum(len(one.predictions) for one in self.best.values())

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "slices": {name: self.slices[name].to_dict() for name in sorted(self.slices)},
            "best": {name: self.best[name].to_dict() for name in sorted(self.best)},
            "base": {name: self.base[name].to_dict() for name in sorted(self.base)},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """What :meth:`to_dict` returned.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: If it is something else.
        """
        slices = {name: Predictions.from_dict(one) for name, one in values["slices"].items()}
        best = {name: Best.from_dict(one) for name, one in values.get("best", {}).items()}
        base = {name: Predictions.from_dict(one) for name, one in values.get("base", {}).items()}
        return cls(slices, best, base)
