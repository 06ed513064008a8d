"""Which examples of the past are kept when there is room for few.

A policy gives every example a priority once, when it arrives, and the memory keeps the smallest. Priorities depend on
the seed, the example's id, its class and its order of arrival, and on nothing else: not on batch size, number of
processes or number of workers.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


class Policy(ABC):
    """Subclass this for a policy of your own and pass an instance as ``policy=``.

    Attributes:
        name: stored with the memory; a memory is only loaded under the policy that filled it.
        needs_labels: whether every example must have a class.
        needs_features: whether :meth:`priorities` needs a feature vector for every example.
    """

    name: ClassVar[str]
    needs_labels: ClassVar[bool] = False
    needs_features: ClassVar[bool] = False

    @abstractmethod
    def priority(self, id: str, arrival: int, seed: int) -> float:
        """The priority of one example as it arrives; examples with the smallest stay.

        Args:
            id: names the example.
            arrival: how many examples the memory had been offered before this one.
            seed: the memory's seed.
        """

    def priorities(
        self,
        ids: Sequence[str],
        labels: Sequence[str | None],
        features: Floats | None,
        *,
        arrival: int,
        seed: int,
        size: int,
    ) -> Floats:
        """The priorities of the new examples of one update, shape ``[n]``.

        Args:
            ids: their ids.
            labels: their classes.
            features: their feature vectors, ``[n, d]``, when ``needs_features``.
            arrival: how many examples were offered before the first of them.
            seed: the memory's seed.
            size: how many examples the memory can hold: the order of those that come later does not matter.
        """
        return np.array([self.priority(id, arrival + i, seed) for i, id in enumerate(ids)], dtype=np.float64)

    def group(self, label: str | None) -> str:
        """Examples of one group compete with each other for room; by default all do."""
        return ""

    def select(self, priorities: Floats, ids: Sequence[str], labels: Sequence[str | None], size: int) -> Indices:
        """Which of the rows to keep: at most ``size``, in ascending order.

        The room is divided evenly over the groups; what a small group leaves free goes to the others.
        """
        order = np.lexsort((np.array(ids, dtype=object).astype(str), priorities))
        members: dict[str, list[int]] = {}
        for row in order.tolist():
            members.setdefault(self.group(labels[row]), []).append(row)
        quotas = _fair_shares({group: len(rows) for group, rows in members.items()}, size)
        return np.sort(np.array([row for group, rows in members.items() for row in rows[: quotas[group]]], np.int64))


class Reservoir(Policy):
    """A uniform random sample of everything seen, without replacement (Vitter 1985).

    Each example gets a random number from its id and the seed, and the smallest stay (bottom-k sampling, Cohen & Kaplan
    2007; the unweighted case of Efraimidis & Spirakis 2006), so that the sample does not depend on the order of
    arrival and samples of parts merge exactly.
    """

    name = "reservoir"

    def priority(self, id: str, arrival: int, seed: int) -> float:
        """A random number that only the id and the seed decide."""
        return uniform(id, seed)


class ClassBalanced(Reservoir):
    """As many examples of each class as room allows, each class a uniform sample of what was seen of it."""

    name = "class_balanced"
    needs_labels = True

    def group(self, label: str | None) -> str:
        """The class."""
        assert label is not None
        return label


class Ring(ClassBalanced):
    """The newest examples of each class (the ring buffer per class of Lopez-Paz & Ranzato 2017, GEM)."""

    name = "ring"

    def priority(self, id: str, arrival: int, seed: int) -> float:
        """The later, the smaller."""
        return float(-arrival)


class Herding(ClassBalanced):
    """The examples of each class whose mean feature stays nearest to the class mean (Rebuffi et al. 2017, iCaRL).

    Features are scaled to unit length. An example's priority is its rank in the greedy order of its class, so that a
    class shrinks by dropping the last chosen, as in the paper.
    """

    name = "herding"
    needs_features = True

    def priorities(
        self,
        ids: Sequence[str],
        labels: Sequence[str | None],
        features: Floats | None,
        *,
        arrival: int,
        seed: int,
        size: int,
    ) -> Floats:
        """The rank of each example in the greedy order of its class."""
        assert features is not None
        result = np.full(len(ids), float(size))
        members: dict[str | None, list[int]] = {}
        for row, label in enumerate(labels):
            members.setdefault(label, []).append(row)
        for rows in members.values():
            chosen = herding_order(features[rows], size)
            result[np.array(rows)[chosen]] = np.arange(len(chosen))
        return result


POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (Reservoir, ClassBalanced, Ring, Herding)}


def make_policy(policy: str | Policy) -> Policy:
    """The policy called ``policy``, or ``policy`` itself.

    Raises:
        ValueError: when there is none of that name.
    """
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {sorted(POLICIES)} or a Policy, got {policy!r}")
    return POLICIES[policy]()


def uniform(id: str, seed: int) -> float:
    """A number in [0, 1) that only the id and the seed decide.

    Example:
        >>> uniform("a", seed=0) == uniform("a", seed=0) != uniform("a", seed=1)
        True
    """
    digest = hashlib.blake2b(id.encode(), digest_size=8, key=str(seed).encode()).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def herding_order(features: NDArray[Any], size: int) -> Indices:
    """The rows of ``features`` ``[n, d]`` that herding chooses, first to last, at most ``size``.

    Example:
        >>> herding_order(np.array([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]]), size=1)
        array([1])
    """
    x = np.asarray(features, dtype=np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    to_mean, square, to_sum = x @ x.mean(0), (x * x).sum(1), np.zeros(len(x))
    left = np.ones(len(x), dtype=bool)
    order = []
    for count in range(1, min(len(x), size) + 1):
        # |mean - (sum + x) / count|^2 without the terms that are the same for every x
        distance = (square + 2 * to_sum) / count**2 - 2 * to_mean / count
        best = int(np.argmin(np.where(left, distance, np.inf)))
        left[best] = False
        to_sum += x @ x[best]
        order.append(best)
    return np.array(order, dtype=np.int64)


def _fair_shares(sizes: dict[str, int], room: int) -> dict[str, int]:
    """Divide ``room`` evenly; no group gets more than it has, and what is left over is divided again."""
    shares: dict[str, int] = {}
    for position, group in enumerate(sorted(sizes, key=lambda name: (sizes[name], name))):
        shares[group] = min(sizes[group], room // (len(sizes) - position))
        room -= shares[group]
    return shares
