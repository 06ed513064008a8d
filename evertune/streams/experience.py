"""Experiences, the data that arrive between two updates, and streams, sequences of experiences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload
from warnings import warn

from evertune.sources.alike import alike, alike_words
from evertune.tasks.base import Task
from evertune.utils.examples import Examples, column_of


@dataclass(frozen=True, eq=False)
class Experience:
    """One chunk of a stream: the data of one update and their metadata.

    Args:
        name: Name in tables and plots.
        train: Training examples, a map-style dataset. For text, an example is a dict with a text and a label (the
            label's name, or a list of names for multi-label data); otherwise whatever the module accepts.
        val: Examples for validation during training, or None.
        test: Examples that score what was learned and, later, what was retained, or None.
        classes: Names of the classes in ``train``. A module with a growing head adds the new ones.
        domain: Origin of the data, if the stream is split by domain.
        time_range: First and last day of the data (ISO dates, both included), if the stream is split by time.

    Raises:
        ValueError: If ``train`` is empty or has no length, or a class is named twice.

    Example:
        >>> from evertune.streams import Experience
        >>> Experience("greetings", train=[{"text": "good morning", "label": "hello"}], classes=["hello"])
        Experience(greetings: 1 train, 0 val, 0 test, 1 classes)
    """

    name: str
    train: Examples
    val: Examples | None = None
    test: Examples | None = None
    classes: list[str] = field(default_factory=list)
    domain: str | None = None
    time_range: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.train, "__len__"):
            raise ValueError(
                f"experience {self.name!r}: train must be a map-style dataset with a length, "
                f"got {type(self.train).__name__}"
            )
        if len(self.train) == 0:
            raise ValueError(
                f"experience {self.name!r} has no training examples; leave it out of the stream, or check its source"
            )
        twice = {name for name in self.classes if self.classes.count(name) > 1}
        if twice:
            raise ValueError(f"experience {self.name!r} names these classes twice: {sorted(twice)}")

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(data or ())} {split}" for split, data in self.splits().items())
        return f"Experience({self.name}: {sizes}, {len(self.classes)} classes)"

    def splits(self) -> dict[str, Examples | None]:
        """``train``, ``val`` and ``test`` by name."""
        return {"train": self.train, "val": self.val, "test": self.test}


class ExperienceStream(Sequence[Experience]):
    """A finite sequence of experiences over the same kind of data.

    Args:
        experiences: Experiences in the order in which they are learned; their names must differ.
        label: Column with the labels. Every label of ``val`` and ``test`` must then occur in the ``train`` of the same
            or an earlier experience. With None, labels are not checked.
        text: Column with the text, or the pair of columns. None if the data are not text.
        known_classes: Classes learned before the stream starts.
        bad_rows: Rows left out when the source was read (see ``on_bad_row``).
        task: Task that defines which classes a label names. By default a string or a list of strings are their names.

    Raises:
        ValueError: If there are no experiences, two have the same name, or ``val`` or ``test`` have a label that no
            ``train`` had so far.

    Example:
        >>> from evertune.streams import Experience, ExperienceStream
        >>> row = {"text": "good morning", "label": "hello"}
        >>> stream = ExperienceStream([Experience("day 1", [row], classes=["hello"])], label="label")
        >>> len(stream), stream[0].name, stream.classes
        (1, 'day 1', ['hello'])
    """

    def __init__(
        self,
        experiences: Iterable[Experience],
        *,
        label: str | None = None,
        text: str | tuple[str, str] | None = "text",
        known_classes: Sequence[str] = (),
        bad_rows: Sequence[Any] = (),
        task: Task | None = None,
    ) -> None:
        self._experiences = list(experiences)
        self.label = label
        self.text = text
        self.known_classes = list(known_classes)
        self.bad_rows = list(bad_rows)
        self.task = task or Task()
        if not self._experiences:
            raise ValueError("a stream needs at least one experience")
        names = [experience.name for experience in self]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"experiences need different names, these appear twice: {sorted(twice)}")
        if label is not None:
            self._check_labels(label)
        if (groups := alike([*self.known_classes, *self.classes])) and not self.known_classes:
            warn(alike_words(groups), stacklevel=2)

    def _check_labels(self, label: str) -> None:
        seen = set(self.known_classes)
        for experience in self:
            seen.update(self._names(experience.train, label))
            for split in ("val", "test"):
                data = experience.splits()[split]
                unseen = [name for name in self._names(data or [], label) if name not in seen]
                if unseen:
                    raise ValueError(
                        f"experience {experience.name!r}: label {unseen[0]!r} is in {split}, but was in no train by "
                        "then, so nothing can have learned it; add training examples of it, or leave its examples out "
                        '(on_unseen_label="drop")'
                    )

    def _names(self, data: Examples, label: str) -> list[str]:
        return class_names(self.task.label_names(value) for value in column_of(data, label))

    @property
    def classes(self) -> list[str]:
        """The names of all classes, in order of appearance."""
        return list(dict.fromkeys(name for experience in self for name in experience.classes))

    def joint(self) -> Experience:
        """All experiences as one, to train a reference model on all data at once (the upper bound)."""
        return Experience(
            "joint",
            train=_concatenate([experience.train for experience in self]),
            val=_concatenate([experience.val for experience in self if experience.val is not None]),
            test=_concatenate([experience.test for experience in self if experience.test is not None]),
            classes=self.classes,
        )

    def __len__(self) -> int:
        return len(self._experiences)

    @overload
    def __getitem__(self, index: int) -> Experience: ...

    @overload
    def __getitem__(self, index: slice) -> ExperienceStream: ...

    def __getitem__(self, index: int | slice) -> Experience | ExperienceStream:
        if not isinstance(index, slice):
            return self._experiences[index]
        before = self._experiences[: index.indices(len(self))[0]]
        # The classes of the experiences cut off in front still count as seen.
        known = self.known_classes + [name for experience in before for name in experience.classes]
        return ExperienceStream(
            self._experiences[index], label=self.label, text=self.text, known_classes=known, task=self.task
        )

    def __repr__(self) -> str:
        return f"ExperienceStream({[experience.name for experience in self]})"


def class_names(labels: Iterable[Any]) -> list[str]:
    """The distinct names among labels (single names or lists of names), in order of appearance."""
    names: dict[str, None] = {}
    for label in labels:
        names.update(dict.fromkeys([label] if isinstance(label, str) else label))
    return list(names)


def _concatenate(parts: Sequence[Examples]) -> Any:
    """The concatenation of datasets; Hugging Face datasets stay Hugging Face datasets."""
    if not parts:
        return None
    if all(hasattr(part, "column_names") for part in parts):
        from datasets import concatenate_datasets

        return concatenate_datasets(list(parts))
    from torch.utils.data import ConcatDataset

    return ConcatDataset(parts)  # type: ignore[arg-type]
