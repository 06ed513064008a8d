"""Logits that a model once gave for examples, stored with them: all of each row, or the largest and the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

LOGITS = pa.struct(
    [
        ("n_classes", pa.int32()),
        ("n_rows", pa.int32()),
        ("values", pa.large_list(pa.float32())),
        ("classes", pa.large_list(pa.int32())),  # of the values; empty if all classes are stored, in order
        ("rest", pa.large_list(pa.float32())),  # of each row; empty if all classes are stored
    ]
)
"""The logits of one example as they are stored: one row for each of its positions that count."""


@dataclass(frozen=True)
class StoredLogits:
    """The logits of some examples, as a batch. ``R`` rows, of which an example has one for each position that counts.

    Args:
        values: Logits, float32 ``[R, width]``.
        classes: The class of each value, int64 ``[R, width]``; -1 where a row has fewer values than others.
        rest: What the other classes had together, ``T * logsumexp(logits / T)``, float32 ``[R]``; -inf where all
            classes are stored.
        n_classes: Number of classes that the model had, int64 ``[R]``.
        n_rows: Number of rows of each example, int64 ``[examples]``.
    """

    values: Tensor
    classes: Tensor
    rest: Tensor
    n_classes: Tensor
    n_rows: Tensor

    @classmethod
    def of(cls, logits: Tensor, n_rows: Tensor, top_k: int | None = None, temperature: float = 1.0) -> StoredLogits:
        """What is stored of logits ``[R, classes]``: all, or of each row the ``top_k`` largest and the rest.

        Example:
            >>> stored = StoredLogits.of(torch.tensor([[0.0, 2.0, 0.0]]), torch.tensor([1]), top_k=1)
            >>> stored.values, stored.classes, stored.rest
            (tensor([[2.]]), tensor([[1]]), tensor([0.6931]))
        """
        logits = logits.detach().float().cpu()
        total, size = logits.shape
        if top_k is None or top_k >= size:
            values, classes = logits, torch.arange(size).expand(total, size)
            rest = torch.full((total,), -torch.inf)
        else:
            values, classes = logits.topk(top_k, dim=1)
            others = logits.scatter(1, classes, -torch.inf)
            rest = (temperature * (others / temperature).logsumexp(1)).clamp(min=torch.finfo(torch.float32).min)
        return cls(values, classes, rest, torch.full((total,), size), n_rows.cpu())

    def to(self, device: torch.device) -> StoredLogits:
        """The same on another device, but for ``n_rows``."""
        values, classes, rest, n_classes = (
            one.to(device) for one in (self.values, self.classes, self.rest, self.n_classes)
        )
        return StoredLogits(values, classes, rest, n_classes, self.n_rows)

    def matched(self, logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """The logits of another model for the same rows, beside the stored ones.

        A model that has more classes by now is compared on those that it had.

        Args:
            logits: ``[R, classes]``.
            temperature: As for :meth:`of`.

        Returns:
            The model's logits and the stored ones, float32 ``[R, width + 1]``, the last for the rest, and which of
            them there are, bool.

        Raises:
            ValueError: If there are fewer classes than there were, or another number of rows.
        """
        if len(logits) != len(self.values):
            raise ValueError(f"{len(logits)} rows of logits do not match the {len(self.values)} stored ones")
        if len(self.n_classes) and logits.shape[1] < int(self.n_classes.max()):
            raise ValueError(f"logits of {logits.shape[1]} classes, {int(self.n_classes.max())} were stored")
        z, present = logits.float(), self.classes >= 0
        chosen = z.gather(1, self.classes.clamp(min=0))
        has_rest = self.rest > -torch.inf
        if not bool(has_rest.any()):
            nothing = torch.zeros_like(self.rest).unsqueeze(1)
            none = torch.zeros_like(nothing, dtype=torch.bool)
            return (
                torch.cat([chosen, nothing], 1),
                torch.cat([self.values, nothing], 1),
                torch.cat([present, none], 1),
            )
        stored = torch.zeros_like(z, dtype=torch.bool).scatter(1, self.classes.clamp(min=0), True)
        known = torch.arange(z.shape[1], device=z.device) < self.n_classes.unsqueeze(1)
        # Rows that are stored whole get a finite number, so that no gradient is NaN.
        others = torch.where(known & ~stored & has_rest.unsqueeze(1), z, -torch.inf)
        others = torch.where(has_rest.unsqueeze(1), others, 0.0)
        rest = temperature * (others / temperature).logsumexp(1, keepdim=True)
        old_rest = torch.where(has_rest, self.rest, 0.0).unsqueeze(1)
        return (
            torch.cat([chosen, torch.where(has_rest.unsqueeze(1), rest, 0.0)], 1),
            torch.cat([self.values, old_rest], 1),
            torch.cat([present, has_rest.unsqueeze(1)], 1),
        )

    # --- in Arrow

    def to_arrow(self) -> pa.StructArray:
        """One element of type ``LOGITS`` per example."""
        counts = self.n_rows.numpy().astype(np.int64)
        ends = np.cumsum(counts)
        present = (self.classes >= 0).numpy()
        whole = torch.isneginf(self.rest).numpy()
        n_classes = np.zeros(len(counts), dtype=np.int32)
        n_classes[counts > 0] = self.n_classes.numpy()[(ends - counts)[counts > 0]]

        def lists(kept: Any, values: Tensor, kind: pa.DataType) -> pa.Array:
            per_row = kept.reshape(len(kept), -1).sum(1) if len(kept) else np.zeros(0, dtype=np.int64)
            offsets = np.concatenate([[0], np.concatenate([[0], np.cumsum(per_row)])[ends]])
            return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values.numpy()[kept], kind))

        columns = [
            pa.array(n_classes),
            pa.array(counts.astype(np.int32)),
            lists(present, self.values, pa.float32()),
            lists(present & ~whole[:, None], self.classes, pa.int32()),
            lists(~whole, self.rest, pa.float32()),
        ]
        return pa.StructArray.from_arrays(columns, fields=list(LOGITS))

    @classmethod
    def from_arrow(cls, column: pa.StructArray) -> StoredLogits:
        """Read what :meth:`to_arrow` gave, without a loop over the examples.

        Raises:
            ValueError: If an element is missing, or its parts do not fit together: somebody else may have written it.
        """
        if column.null_count:
            raise ValueError(f"{column.null_count} of {len(column)} examples have no logits")
        n_classes, n_rows, values, classes, rest = column.flatten()
        if any(part.null_count for part in (n_classes, n_rows, values, classes, rest)):
            raise ValueError("stored logits have parts without a value")
        counts, size = n_rows.to_numpy().astype(np.int64), n_classes.to_numpy().astype(np.int64)
        n_values, n_listed, n_rest = (part.value_lengths().to_numpy() for part in (values, classes, rest))
        width = n_values // np.maximum(counts, 1)
        whole = n_listed == 0
        fits = (n_values == width * counts) & np.where(
            whole, (n_rest == 0) & (n_values == size * counts), (n_listed == n_values) & (n_rest == counts)
        )
        if not fits.all() or (counts < 0).any() or (size < 0).any():
            raise ValueError("stored logits are damaged: their parts do not have the same length")
        width, whole, size = (np.repeat(one, counts) for one in (width, whole, size))
        places = np.arange(width.max(initial=0))
        there = places < width[:, None]
        all_values = np.zeros(there.shape, dtype=np.float32)
        all_values[there] = values.flatten().to_numpy(zero_copy_only=False)
        all_classes = np.where(there, places, -1)
        all_classes[there & ~whole[:, None]] = classes.flatten().to_numpy(zero_copy_only=False)
        if (all_classes >= size[:, None]).any() or (all_classes[there] < 0).any():
            raise ValueError("stored logits are damaged: they are of classes that there were not")
        all_rest = np.full(len(width), -np.inf, dtype=np.float32)
        all_rest[~whole] = rest.flatten().to_numpy(zero_copy_only=False)
        return cls(*map(torch.from_numpy, (all_values, all_classes, all_rest, size, counts)))


def to_bytes(column: pa.StructArray) -> bytes:
    """A column of stored logits as the bytes of an Arrow stream."""
    batch = pa.record_batch([column], names=["logits"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def from_bytes(data: bytes) -> pa.StructArray:
    """Read what :func:`to_bytes` gave.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        table = pa.ipc.open_stream(pa.py_buffer(data)).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"stored logits are damaged or truncated: {error}") from error
    if table.schema.names != ["logits"] or table.schema.types != [LOGITS]:
        raise ValueError(f"these are not stored logits: their schema is {table.schema.to_string()[:200]}")
    return pa.concat_arrays(table.column("logits").chunks) if len(table) else pa.array([], LOGITS)
