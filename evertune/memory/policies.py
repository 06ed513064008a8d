"""Selection policies: which past examples are kept when the memory is full.

A policy assigns every example a priority once, when it arrives, and the memory keeps the examples with the smallest.
Priorities depend only on the seed, the example's id, its class and its order of arrival, not on batch size, number of
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
    """Base class of selection policies. Subclass it for a custom policy and pass an instance as ``policy=``.

    Attributes:
        name: Name stored with the memory; a memory can only be loaded under the policy that filled it.
        needs_labels: Whether every example must have a class.
        needs_features: Whether :meth:`priorities` needs a feature vector for every example.
        needs_losses: Whether the feature of an example is its loss, a vector of length 1.
    """

    name: ClassVar[str]
    needs_labels: ClassVar[bool] = False
    needs_features: ClassVar[bool] = False
    needs_losses: ClassVar[bool] = False

    @abstractmethod
    def priority(self, id: str, arrival: int, seed: int) -> float:
        """The priority of one example when it arrives; the examples with the smallest are kept.

        Args:
            id: Id of the example.
            arrival: Number of examples offered to the memory before this one.
            seed: Seed of the memory.
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
            ids: Ids of the examples.
            labels: Classes of the examples.
            features: Feature vectors ``[n, d]``, if ``needs_features``.
            arrival: Number of examples offered to the memory before the first of these.
            seed: Seed of the memory.
            size: Capacity of the memory: the order of examples beyond it does not matter.
        """
        return np.array([self.priority(id, arrival + i, seed) for i, id in enumerate(ids)], dtype=np.float64)

    def group(self, label: str | None) -> str:
        """The group in which an example competes for room; by default all examples are in one."""
        return ""

    def select(self, priorities: Floats, ids: Sequence[str], labels: Sequence[str | None], size: int) -> Indices:
        """The rows to keep: at most ``size``, in ascending order.

        The room is divided evenly among the groups; what a small group does not use goes to the others.
        """
        # Ties are broken by id, so that the result does not depend on the order of the rows.
        order = np.lexsort((np.array(ids, dtype=object).astype(str), priorities))
        members: dict[str, list[int]] = {}
        for row in order.tolist():
            members.setdefault(self.group(labels[row]), []).append(row)
        quotas = _fair_shares({group: len(rows) for group, rows in members.items()}, size)
        return np.sort(np.array([row for group, rows in members.items() for row in rows[: quotas[group]]], np.int64))


class Reservoir(Policy):
    """A uniform random sample of everything seen, without replacement (Vitter 1985).

    Each example gets a random number from its id and the seed, and the smallest are kept (bottom-k sampling, Cohen &
    Kaplan 2007; the unweighted case of Efraimidis & Spirakis 2006). The sample therefore does not depend on the order
    of arrival, and samples of parts merge exactly.
    """

    name = "reservoir"

    def priority(self, id: str, arrival: int, seed: int) -> float:
        """A random number that depends only on the id and the seed."""
        return uniform(id, seed)


class ClassBalanced(Reservoir):
    """An equal number of examples per class as far as possible, each class a uniform sample of its examples."""

    name = "class_balanced"
    needs_labels = True

    def group(self, label: str | None) -> str:
        """One group per class."""
        assert label is not None
        return label


class Ring(ClassBalanced):
    """The newest examples of each class (the ring buffer per class of Lopez-Paz & Ranzato 2017, GEM)."""

    name = "ring"

    def priority(self, id: str, arrival: int, seed: int) -> float:
        """Decreases with the order of arrival."""
        return float(-arrival)


class Herding(ClassBalanced):
    """The examples of each class whose mean feature stays nearest to the class mean (Rebuffi et al. 2017, iCaRL).

    Features are scaled to unit length. An example's priority is its rank in the greedy order of its class, so a class
    shrinks by dropping the examples chosen last, as in the paper.
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


class LossAware(ClassBalanced):
    """Of each class, examples with a large loss more often: each is kept with a weight proportional to its loss.

    The sample is drawn without replacement (Efraimidis & Spirakis 2006). After loss-aware reservoir sampling (Buzzega
    et al. 2021, "Rethinking Experience Replay"), where examples that are learned well make room first. The loss is that
    at the end of the example's experience. Mislabelled examples have a large loss, too.
    """

    name = "loss_aware"
    needs_features = True
    needs_losses = True

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
        """``-log(u) / loss`` with ``u`` the random number of :class:`Reservoir`."""
        assert features is not None
        losses = np.asarray(features, dtype=np.float64).reshape(len(ids), -1)
        if losses.shape[1] != 1 or bool((losses < 0).any()):
            raise ValueError(f"policy 'loss_aware' needs one loss of at least 0 for each example, got {losses.shape}")
        weights = np.maximum(np.nan_to_num(losses[:, 0]), _LEAST_LOSS)
        return -np.log(1 - super().priorities(ids, labels, None, arrival=arrival, seed=seed, size=size)) / weights


_LEAST_LOSS = 1e-6
"""Also examples without a loss can be drawn."""

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (Reservoir, ClassBalanced, Ring, Herding, LossAware)
}


def make_policy(policy: str | Policy) -> Policy:
    """The policy named ``policy``, or ``policy`` itself.

    Raises:
        ValueError: If the policy is unknown.
    """
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {sorted(POLICIES)} or a Policy, got {policy!r}")
    return POLICIES[policy]()


def uniform(id: str, seed: int) -> float:
    """A number in [0, 1) that depends only on the id and the seed.

    Example:
        >>> uniform("a", seed=0) == uniform("a", seed=0) != uniform("a", seed=1)
        True
    """
    digest = hashlib.blake2b(id.encode(), digest_size=8, key=str(seed).encode()).digest()
    # The upper 53 bits fit a double exactly, so the result is below 1 and the same on every machine.
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def herding_order(features: NDArray[Any], size: int) -> Indices:
    """The rows of ``features`` ``[n, d]`` that herding chooses, in order, at most ``size``.

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
        # |mean - (sum + x) / count|^2 without the terms that do not depend on x
        distance = (square + 2 * to_sum) / count**2 - 2 * to_mean / count
        best = int(np.argmin(np.where(left, distance, np.inf)))
        left[best] = False
        to_sum += x @ x[best]
        order.append(best)
    return np.array(order, dtype=np.int64)


def _fair_shares(sizes: dict[str, int], room: int) -> dict[str, int]:
    """Divide ``room`` evenly; no group gets more than it has, and the remainder is divided among the others."""
    shares: dict[str, int] = {}
    # Smallest groups first: what they do not use raises the share of the larger ones.
    for position, group in enumerate(sorted(sizes, key=lambda name: (sizes[name], name))):
        shares[group] = min(sizes[group], room // (len(sizes) - position))
        room -= shares[group]
    return shares
