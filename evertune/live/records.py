"""The records of one update, read once: which are trained on, which are held out, and which are put aside."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

from evertune.gate.verdict import Check
from evertune.live.setup import Setup
from evertune.live.slices import hold_out, sent_again
from evertune.registry.rows import latest
from evertune.registry.segments import Segment
from evertune.registry.version import Version
from evertune.sources.base import Row


class Split(NamedTuple):
    """The records of an update to train on, those held out, and those put aside with their ``reason``: a newer one has
    superseded them, or they are held out already. ``n_again`` had been held out before."""

    train: list[Row]
    held_out: list[Row]
    put_aside: list[Row]
    n_again: int


class Records:
    """The records of one update, and those held out of the updates before it. Every file of them is read once.

    Args:
        setup: What all updates have in common.
        segments: The segments of the journal that the update learns.
        parent: The version in production; None for the first update.
        arrived: The rows of the segments with their numbers; by default they are read from the journal.

    Raises:
        ValueError: If a file is damaged or missing.
    """

    def __init__(
        self, setup: Setup, segments: Sequence[Segment], parent: Version | None, arrived: Sequence[Row] | None = None
    ) -> None:
        self.segments, self.parent = list(segments), parent
        self._setup = setup
        self._arrived = setup.journal.records(self.segments, numbered=True) if arrived is None else arrived
        self.numbered, self._superseded = latest(self._arrived)
        """The newest record of each id, with the number of its ``segment``."""

    def without(self, withdrawn: Collection[Row]) -> Records:
        """The same after some of the :attr:`numbered` rows have been withdrawn from the journal."""
        gone = {(row["segment"], row["id"]) for row in withdrawn}
        left = [row for row in self._arrived if (row["segment"], row["id"]) not in gone]
        return Records(self._setup, self.segments, self.parent, left)

    @cached_property
    def rows(self) -> list[Row]:
        """The newest record of each id, as the journal holds it."""
        return _unnumbered(self.numbered)

    @cached_property
    def slices(self) -> dict[str, list[Row]]:
        """The records held out of all updates before this one, by the name of their slice."""
        return self._setup.versions.held_out(self.parent)

    @cached_property
    def split(self) -> Split:
        """What each record is for, in the same way in every attempt.

        A record that was held out of an earlier update stays held out when it is sent again, changed or not: production
        is judged on it.
        """
        setup, settings = self._setup, self._setup.settings
        rows, changed, same = sent_again(self.rows, self.slices, setup.schema.id)
        train, held_out = hold_out(rows, setup.label, settings.holdout, settings.max_holdout, setup.task.label_names)
        put_aside = _unnumbered(self._superseded) + same
        return Split(train, held_out + changed, put_aside, len(changed) + len(same))

    def checks(self) -> list[Check]:
        """The gate's checks of the records, before anything is trained."""
        setup = self._setup
        counts = setup.journal.counts(self.segments)
        return setup.gate.judge_data(
            self.rows,
            text=setup.schema.text,
            label=setup.label,
            known_classes=self.parent.manifest.classes if self.parent is not None else [],
            n_bad=counts.bad,
            n_read=counts.read,
            names=setup.task.label_names,
        )


def _unnumbered(rows: Iterable[Row]) -> list[Row]:
    return [{key: value for key, value in row.items() if key != "segment"} for row in rows]
