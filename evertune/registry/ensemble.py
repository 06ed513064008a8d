"""Several versions that answer together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from evertune.registry.registry import Registry, RegistryError
from evertune.registry.serving import Served
from evertune.registry.version import Version
from evertune.tasks.predicting import are_probabilities


class Ensemble:
    """Versions of one registry whose answers are averaged: probabilities of classes, or numbers.

    The mean of models that were trained one after another is often right where one of them is not, and calmer from
    update to update (Lakshminarayanan et al. 2017, "Simple and Scalable Predictive Uncertainty Estimation using Deep
    Ensembles"). It takes the time and the memory of all of them. The probability of a class is the mean over the
    versions that know it, so that a new class is not held back by versions from before it; with one label per text,
    probabilities then sum to 1 again.

    Args:
        members: The versions, loaded; at least two.

    Raises:
        ValueError: If there are fewer, or they are of different tasks or read different fields.

    Example::

        together = Ensemble([evertune.load("registry", number) for number in (7, 8, 9)])
        together.predict(["Shares fell after the merger."])  # [{"business": 0.97, "sport": 0.03}]
    """

    def __init__(self, members: Sequence[Served]) -> None:
        if len(members) < 2:
            raise ValueError(f"an ensemble has at least two versions, got {len(members)}")
        self._members = [member.answering for member in members]
        self.numbers = [member.version.number for member in self._members]
        first = self._members[0]
        for other in self._members[1:]:
            kinds = [(_kind(one.module), one.version.text_fields) for one in (first, other)]
            if kinds[0] != kinds[1]:
                raise ValueError(
                    f"versions {first.version.number} and {other.version.number} do not answer the same: {kinds[0]} "
                    f"and {kinds[1]}"
                )
        self.version: Version = first.version
        self.module: Any = first.module

    def predict(self, texts: Sequence[Any], **settings: Any) -> list[Any]:
        """The mean of the versions' answers to each text.

        Raises:
            ValueError: If the answers are neither probabilities of classes nor numbers.
        """
        answers = [member.predict(texts, **settings) for member in self._members]
        one_label = not getattr(self.module, "multi_label", False)
        return [mean_answer(one, one_label) for one in zip(*answers, strict=True)]


def mean_answer(answers: Sequence[Any], one_label: bool = True) -> Any:
    """The mean of the answers of several versions to one text, in the form of one of them.

    Args:
        answers: The probability of each class by name, most probable first; or a number, or a list of numbers.
        one_label: Whether the probabilities sum to 1. Default: True.

    Raises:
        ValueError: If the answers are of another kind.

    Example:
        >>> mean_answer([{"law": 0.5, "sport": 0.5}, {"sport": 0.75, "law": 0.25}])
        {'sport': 0.625, 'law': 0.375}
        >>> mean_answer([1.0, 2.0]), mean_answer([[1.0, 5.0], [2.0, 6.0]])
        (1.5, [1.5, 5.5])
    """
    if all(map(are_probabilities, answers)):
        names = dict.fromkeys(name for answer in answers for name in answer)
        means = {name: _mean([answer[name] for answer in answers if name in answer]) for name in names}
        total = math.fsum(means.values()) if one_label else 1.0
        return {name: p / total for name, p in sorted(means.items(), key=lambda item: -item[1])}
    if all(isinstance(answer, float) for answer in answers):
        return _mean(answers)
    if all(isinstance(answer, list) and answer and all(isinstance(one, float) for one in answer) for answer in answers):
        return [_mean(numbers) for numbers in zip(*answers, strict=True)]
    raise ValueError(
        f"only probabilities of classes and numbers can be averaged, not answers such as {answers[0]!r:.80}; ask one "
        "version"
    )


def lineage(registry: Registry, number: int, n_versions: int) -> list[int]:
    """A version and those that it was trained from, newest first: ``n_versions`` numbers.

    Raises:
        ValueError: If ``n_versions`` is not positive.
        RegistryError: If there are fewer.
    """
    if n_versions < 1:
        raise ValueError(f"the number of versions must be positive, got {n_versions}")
    numbers = [number]
    while len(numbers) < n_versions:
        parent = registry.version(numbers[-1]).parent
        if parent is None:
            raise RegistryError(
                f"version {number} has {len(numbers) - 1} versions before it, not {n_versions - 1}: ask for "
                f"{len(numbers)}"
            )
        numbers.append(parent)
    return numbers


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _kind(module: Any) -> tuple[str, bool]:
    return type(module).__name__, bool(getattr(module, "multi_label", False))
