"""How an update treats its records, and how a smaller version is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class UpdateSettings:
    """How an update treats its records.

    Args:
        holdout: Share of the new records that is held out of training, to judge this and every later version. Default:
            0.2.
        max_holdout: Maximum number of records held out of one update. Default: 500.
        max_records: Maximum number of records in one update; the rest wait for the next. Default: 50,000.
        max_evaluation: Maximum number of records of all slices on which a version is judged; the longest slices are
            shortened first. Default: 5,000.
        rebuild_after: Number of refusals in a row after which a new model is trained from the pretrained one, on the
            replay memory and the pending records. Default: 3; None never rebuilds.
        checkpoint_every_n_steps: Optimizer steps between two checkpoints: the most that a crash loses. Default: 200.
        seed: Seed of everything random; the number of the version is added to it.
        imprint_after: Number of pending records of a class that production does not know after which it is taught to
            name it, without training, until the next update trains on them. Needs a cosine head. Default: None, only
            by training. Refused for ``multi_label``, where a mean does not tell whether a class applies.
        untrained: Whether to measure what no training would give: one forward pass of the pretrained encoder over the
            new records and 500 held-out ones. Default: True.

    Raises:
        ValueError: If a number is out of range.
    """

    holdout: float = 0.2
    max_holdout: int = 500
    max_records: int = 50_000
    max_evaluation: int = 5_000
    rebuild_after: int | None = 3
    checkpoint_every_n_steps: int = 200
    seed: int = 0
    imprint_after: int | None = None
    untrained: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout must be between 0 and 1, got {self.holdout}")
        for name in ("max_holdout", "max_records", "max_evaluation", "checkpoint_every_n_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("rebuild_after", "imprint_after"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive or None, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class StudentSettings:
    """How a smaller version is made of the one in production.

    Args:
        layers: Number of its layers, fewer than those of production. Default: None, as many.
        prune: Share of the neurons that are removed from each feed-forward layer, from 0 to below 1, those first that
            matter least for the loss (:func:`~evertune.lightning_modules.pruning.prune`). Default: 0.
        prune_heads: Share of the attention heads that are removed from each layer, in the same way. Default: 0.
        strength: Factor of the loss on production's logits, beside that on the labels. Default: 1.
        temperature: Divisor of the logits; above 1, small probabilities count for more. Default: 2.
        epochs: Epochs of its training. Default: None, those of the trainer; a student needs more than an update.
        gate: Limits of the gate that differ for students, such as ``{"max_forgetting": 0.03}``. Default: none.
        registry: Registry of the students, a folder or URL, in which each version that goes into production is followed
            by a student (:class:`~evertune.live.students.Students`). Default: None; the student takes production's
            place.

    Raises:
        ValueError: If a number is out of range, or the student would be as large as production.
    """

    layers: int | None = None
    prune: float = 0.0
    prune_heads: float = 0.0
    strength: float = 1.0
    temperature: float = 2.0
    epochs: int | None = None
    gate: dict[str, Any] = field(default_factory=dict)
    registry: str | None = None

    def __post_init__(self) -> None:
        if self.layers is None and self.prune == self.prune_heads == 0:
            raise ValueError(
                "a student is smaller than its teacher: set layers, prune, prune_heads, or several of them"
            )
        for name in ("prune", "prune_heads"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {getattr(self, name)}")
        for name in ("layers", "strength", "temperature", "epochs"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    @property
    def recorded(self) -> dict[str, Any]:
        """The settings that determine a student, as its manifest records them: not those of where it is kept."""
        return {name: value for name, value in asdict(self).items() if name != "registry"}
