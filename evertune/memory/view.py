"""What a replay memory holds after one update."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from evertune.memory.arrow import SCHEMA, checked_table
from evertune.memory.codec import decode
from evertune.memory.draws import Draws
from evertune.memory.logits import StoredLogits
from evertune.memory.policies import Indices
from evertune.utils import typed_json

Label = str | None

_BLUR = 0.05
"""Lengths that differ by less than this share count as equal at random, so that companions in a batch change."""


class MemoryView:
    """A memory's content after one update: immutable rows, read from a memory-mapped file.

    Loader workers open their own view of the file, so nothing is copied between processes.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._data = table.column("data").chunk(0) if len(table) else []
        self.settings: dict[str, Any] = typed_json.decode((table.schema.metadata or {}).get(b"evertune", b"{}"))

    @classmethod
    def open(cls, path: str | Path) -> MemoryView:
        """Memory-map a file that a :class:`~evertune.memory.ReplayMemory` wrote.

        Raises:
            ValueError: If the file is not an Arrow file, or is truncated.
        """
        try:
            return cls(checked_table(mapped(Path(path))))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{path} is not the Arrow file of a memory, or is truncated: {error}") from None

    @classmethod
    def empty(cls) -> MemoryView:
        """A view without rows."""
        return cls(SCHEMA.empty_table())

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, slot: int) -> Any:
        """A fresh copy of the example in ``slot``."""
        return decode(self.encoded(slot))

    def encoded(self, slot: int) -> memoryview:
        """The bytes of the example in ``slot``, without a copy."""
        if not 0 <= slot < len(self):
            raise IndexError(f"slot {slot} of a memory that holds {len(self)} examples")
        return memoryview(self._data[slot].as_buffer())

    @property
    def table(self) -> pa.Table:
        """The rows: ``id``, ``label``, ``experience``, ``priority``, ``length``, encoded ``data``, ``logits``."""
        return self._table

    @property
    def ids(self) -> list[str]:
        """The id of every slot."""
        return self._table.column("id").to_pylist()  # type: ignore[no-any-return]

    @property
    def labels(self) -> list[Label]:
        """The class of every slot; None for an example without one."""
        return self._table.column("label").to_pylist()  # type: ignore[no-any-return]

    @property
    def experiences(self) -> list[str]:
        """The experience in which the example of every slot arrived."""
        return self._table.column("experience").to_pylist()  # type: ignore[no-any-return]

    @cached_property
    def lengths(self) -> NDArray[np.int64] | None:
        """The number of tokens of every slot; None if not all examples are tokenised texts."""
        column = self._table.column("length")
        return None if column.null_count or not len(self) else column.to_numpy().astype(np.int64)

    @cached_property
    def without_logits(self) -> Indices:
        """The slots without logits, ascending."""
        return np.flatnonzero(self._table.column("logits").is_null().to_numpy()).astype(np.int64)

    def logits(self, slots: Sequence[int]) -> StoredLogits:
        """The logits stored with some examples (:meth:`~evertune.memory.ReplayMemory.set_logits`).

        Raises:
            ValueError: If one of them has none, or they are damaged.
        """
        return StoredLogits.from_arrow(self._table.column("logits").chunk(0).take(pa.array(slots, pa.int64())))

    @cached_property
    def _draws(self) -> Draws:
        return Draws(len(self), self.settings.get("seed", 0))

    def draw(self, positions: NDArray[np.int64], update: int) -> Indices:
        """The slots at ``positions`` in the infinite sequence of draws of one update.

        It depends only on the memory's seed, the update and the position (:class:`~evertune.memory.draws.Draws`).
        """
        return self._draws.at(positions, update)

    def draw_alike(self, first: int, lengths: NDArray[np.int64], update: int) -> Indices:
        """The slots at the positions from ``first`` on, in another order: short examples where ``lengths`` are small.

        The positions must lie in one pass through the memory. Lengths are compared with a random error of 5%, so that
        an example meets other companions in every pass.

        Args:
            first: First position.
            lengths: The length that is wanted at each position.
            update: Number of the update.

        Raises:
            ValueError: If the lengths of the examples are not known.
        """
        if self.lengths is None:
            raise ValueError("the memory holds examples without a length")
        slots = self.draw(np.arange(first, first + len(lengths)), update)
        blur = self._draws.generator(update, first, 1).uniform(1 - _BLUR, 1 + _BLUR, len(slots))
        alike = np.empty_like(slots)
        alike[np.argsort(lengths, kind="stable")] = slots[np.argsort(self.lengths[slots] * blur, kind="stable")]
        return alike


def mapped(path: Path) -> pa.Buffer:
    """The content of a file, memory-mapped."""
    return pa.memory_map(str(path)).read_buffer()
