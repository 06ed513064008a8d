"""Modules whose head has rows for named classes, which arrive over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evertune.lightning_modules.saving import read_manifest
from evertune.lightning_modules.transformer import TransformerModule

if TYPE_CHECKING:
    from evertune.streams.experience import Experience


class NamedClassesModule(TransformerModule):
    """Base class of modules whose ``head`` grows with named classes; the old rows stay bit-identical.

    A subclass has an argument ``classes``, which it passes to :meth:`_start_classes` at the end of its constructor, and
    builds a head of :attr:`n_rows` rows in ``configure_head``.
    """

    head: Any
    """Module that maps features to scores; None until ``configure_model``."""

    def _start_classes(self, classes: Sequence[str], n_classes_ahead: int | None = None) -> None:
        """Name the first classes.

        Args:
            classes: Their names.
            n_classes_ahead: Number of classes for which rows are allocated from the start. Default: None.

        Raises:
            TypeError: If a name is not a string.
            ValueError: If ``n_classes_ahead`` is not positive.
        """
        if n_classes_ahead is not None and n_classes_ahead < 1:
            raise ValueError(f"n_classes_ahead must be positive, got {n_classes_ahead}")
        self.n_classes_ahead = n_classes_ahead
        self.head = None
        self._classes: list[str] = []
        self._name_classes(checked_names(classes))
        self._n_constructed = len(self._classes)

    def _rows_of(self, n_classes: int) -> int:
        """The number of rows of the head for a number of classes. By default, one row per class."""
        return n_classes

    @property
    def n_rows(self) -> int:
        """Rows of a new head: those of the classes named so far, or of those ahead, whichever are more."""
        # The saved head must have its saved shape when its weights are loaded; it grows afterwards.
        n_named = len(self._classes) if self._saved is None else self._n_constructed
        return self._rows_of(max(n_named, self.n_classes_ahead or 0))

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the order in which they were added."""
        return list(self._classes)

    def add_classes(self, names: Sequence[str]) -> None:
        """Add classes: the head grows at its end, known names are skipped. Call on every rank, between fits.

        Raises:
            TypeError: If a name is not a string, or ``names`` is a single string.
            RuntimeError: During ``fit``, when the optimizer already holds the head.
        """
        new = [name for name in checked_names(names) if name not in self._classes]
        if not new:
            return
        trainer = self._trainer
        if trainer is not None and trainer.state.fn == "fit" and trainer.state.status == "running":
            raise RuntimeError(f"cannot add the classes {new} during fit: the optimizer already holds the head")
        self._name_classes(new)

    def prepare_experience(self, experience: Experience) -> None:
        """Add the classes of an experience before the fit that learns it. Call on every rank."""
        self.add_classes(experience.classes)

    def _name_classes(self, new: list[str]) -> None:
        self._classes.extend(new)
        # Lightning saves hparams with every checkpoint, from which the classes are read again.
        self.hparams["classes"] = self.classes
        self._grow()

    def _grow(self) -> None:
        n_rows = self._rows_of(len(self._classes))
        if self.head is not None and n_rows > self.head.out_features:
            self.head.grow(n_rows)

    def setup(self, stage: str) -> None:
        """Add the classes of the datamodule's experience, if it has one."""
        experience = getattr(getattr(self.trainer, "datamodule", None), "experience", None)
        if stage == "fit" and experience is not None:
            names = checked_names(experience.classes)
            self._name_classes([name for name in names if name not in self._classes])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the classes that the checkpoint has beyond this module's.

        Raises:
            ValueError: If this module's classes are not the first ones of the checkpoint's.
        """
        names = list(checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]["classes"])
        if names[: len(self._classes)] != self._classes:
            raise ValueError(
                f"the checkpoint's classes are {names}, this module's are {self._classes}: "
                "load the checkpoint with load_from_checkpoint, then call add_classes"
            )
        self._name_classes(names[len(self._classes) :])

    def configure_model(self) -> None:
        """Load the transformer and build the head. Later calls have no effect.

        Raises:
            ValueError: If there are no classes yet.
        """
        if not self._classes:
            raise ValueError("there are no classes yet: pass classes=[...] or call add_classes([...])")
        super().configure_model()
        self._grow()  # by classes that were added after the folder was opened, before it was read

    def start_from(self, directory: str | Path) -> None:
        """As in :class:`TransformerModule`; this module's classes must be those of the folder, or begin with them.

        Raises:
            ValueError: If they do not.
        """
        saved = list(read_manifest(Path(directory)).hparams["classes"])
        if self._classes[: len(saved)] != saved:
            raise ValueError(f"{directory} has the classes {saved}, this module {self._classes}")
        super().start_from(directory)
        self._n_constructed = len(saved)


def checked_names(names: Sequence[str]) -> list[str]:
    """The names of classes without duplicates, in order.

    Raises:
        TypeError: If a name is not a string, or ``names`` is a single string.
    """
    if isinstance(names, str):
        raise TypeError(f"classes must be a list of names, got the string {names!r}")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"class names must be strings, got {name!r} ({type(name).__name__})")
    return list(dict.fromkeys(names))
