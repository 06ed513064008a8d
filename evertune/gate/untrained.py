"""What a model that was not trained says: the nearest class mean over features of the pretrained encoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NO_FEATURES = "there are no features of a pretrained encoder by which to compare the records"
"""Why a check that needs these answers cannot tell."""


def nearest_class_means(features: np.ndarray, labels: Sequence[str]) -> list[str]:
    """The class whose mean is nearest to each record, where the record itself does not count (leave one out).

    Features are centred, and distances are cosines. Nothing is trained, so the answers show whether the records of a
    class resemble each other, and not whether a model has learned the class yet.

    Args:
        features: Features of a frozen encoder ``[records, features]``.
        labels: The class of each record.

    Returns:
        A class for each record; ``""`` for one that is the only one of its class, which has nothing to resemble.

    Example:
        >>> features = np.array([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 0.8], [1, 0.1]])
        >>> nearest_class_means(features, ["a", "a", "b", "b", "b"])
        ['a', 'a', 'b', 'b', 'a']
    """
    names, numbers = np.unique(np.asarray(labels, dtype=object), return_inverse=True)
    if len(names) < 2:
        return [""] * len(labels)
    points = np.asarray(features, np.float64)
    points = _unit(points - points.mean(0))
    sums, counts = np.zeros((len(names), points.shape[1])), np.bincount(numbers, minlength=len(names))
    np.add.at(sums, numbers, points)
    similar = points @ _unit(sums).T
    similar[np.arange(len(points)), numbers] = (points * _unit(sums[numbers] - points)).sum(1)
    answers = [str(names[number]) for number in similar.argmax(1)]
    return [answer if counts[number] > 1 else "" for answer, number in zip(answers, numbers, strict=True)]


def _unit(vectors: np.ndarray) -> np.ndarray:
    unit: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return unit
