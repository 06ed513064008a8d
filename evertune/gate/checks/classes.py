"""The check of each class: whether it has collapsed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from evertune.gate import statistics
from evertune.gate.comparison import FEW, Pair, names_in
from evertune.gate.predictions import names_of
from evertune.gate.verdict import Check
from evertune.gate.words import percent, probability, records


def classes(
    held_out: Sequence[Pair], since_best: Sequence[Pair], trained_on: Sequence[Pair], limit: float | None, alpha: float
) -> list[Check]:
    """Whether a class has collapsed, by an exact test of the records that were right and are wrong now.

    The test asks how probable that many losses are if the class lost no more than the limit. It does not ask for proof
    of *any* loss, as that of a slice does, so that a few records are enough to find a class that is gone.

    Args:
        held_out: The predictions of production and of the new version on held-out records.
        since_best: Those of the best version so far and of the new version, where they differ.
        trained_on: Those of production and of the new version on records that were trained on, for classes of which few
            were held out.
        limit: Maximum loss of accuracy on a class.
        alpha: The family-wise error rate over all classes.
    """
    if limit is None:
        return []
    if not all(now.has_classes for _, now in held_out):
        return [Check.not_applicable("class")]
    found = {name: _Class.of(name, held_out) for name in names_in(held_out)}
    for name, one in found.items():
        if one.right < FEW:
            found[name] = _Class.of(name, [*held_out, *trained_on], n_held_out=one.records)
        then = _Class.of(name, since_best)
        if then.right and then.drop > found[name].drop:
            found[name] = then
    known = {name: one for name, one in found.items() if one.right}
    p_values = statistics.holm([statistics.binomial_tail(one.lost, one.right, limit) for one in known.values()])
    checks = []
    for (name, one), p_value in zip(known.items(), p_values, strict=True):
        beyond = one.drop > limit
        # With all of its records lost, could the test have refused?
        blind = len(known) * limit**one.right >= alpha
        passed = False if beyond and p_value < alpha else None if beyond or blind else True
        words = (
            f"of class {name!r} the new version is right on {percent(one.after)} of {one.records} records"
            f"{one.origin}, the one before on {percent(one.before)} "
            f"({probability(p_value)}, limit {100 * limit:.0f} points)"
        )
        if passed is None:
            words = f"cannot tell ({records(one.right)}): {words}"
        checks.append(Check.of_version("class", name, one.before, one.after, limit, passed, words, p_value, on="less"))
    return checks


@dataclass(frozen=True)
class _Class:
    """The records of one class: how many there are, how many each version has right, and how many were lost."""

    records: int
    right: int
    right_now: int
    lost: int
    n_held_out: int

    @classmethod
    def of(cls, name: str, pairs: Iterable[Pair], n_held_out: int | None = None) -> _Class:
        """Count the records with this label. With several labels, the other labels of a record do not matter."""
        old, now = [], []
        for before, after in pairs:
            for label, said, says in zip(after.labels, before.predicted, after.predicted, strict=True):
                if name in names_of(label):
                    old.append(name in names_of(said))
                    now.append(name in names_of(says))
        lost = sum(was and not still for was, still in zip(old, now, strict=True))
        return cls(len(old), sum(old), sum(now), lost, len(old) if n_held_out is None else n_held_out)

    @property
    def before(self) -> float:
        return self.right / max(self.records, 1)

    @property
    def after(self) -> float:
        return self.right_now / max(self.records, 1)

    @property
    def drop(self) -> float:
        return round(self.before - self.after, 9)

    @property
    def origin(self) -> str:
        return "" if self.n_held_out == self.records else f" ({self.records - self.n_held_out} of them trained on)"
