"""An index of items: the nearest ones to a query, found exactly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ITEMS = "items.json"
VECTORS = "items.safetensors"
_BLOCK = 65_536
"""Number of items that are compared at a time: 100 MB of fp32 with 384 features."""


@dataclass(frozen=True, eq=False)
class ItemIndex:
    """The texts of items with their vectors; :meth:`search` compares a query with each of them.

    Exact search takes a few milliseconds for a hundred thousand items, and needs no tuning. The vectors belong to the
    weights that made them: ``fingerprint`` is a hash of these.

    Args:
        items: The texts.
        vectors: Their vectors, fp32 ``[items, features]``.
        fingerprint: Hash of the weights that made the vectors.

    Raises:
        ValueError: If there is not one vector for each item.

    Example:
        >>> index = ItemIndex(["a", "b", "c"], np.eye(3, dtype=np.float32), "")
        >>> places, scores = index.search(np.array([[0.0, 0.6, 0.8]], np.float32), top=2)
        >>> [index.items[place] for place in places[0]]
        ['c', 'b']
    """

    items: list[str]
    vectors: np.ndarray
    fingerprint: str

    def __post_init__(self) -> None:
        if len(self.items) != len(self.vectors):
            raise ValueError(
                f"an index needs a vector for each item, got {len(self.vectors)} for {len(self.items)} items"
            )

    def search(self, queries: np.ndarray, top: int = 10) -> tuple[np.ndarray, np.ndarray]:
        """The items with the largest dot products with each query; of equal ones, those that come first.

        Args:
            queries: Vectors ``[queries, features]``.
            top: Number of items for each query; all if there are fewer. Default: 10.

        Returns:
            Their places among the items, int64, and their scores, fp32, both ``[queries, top]``, best first.

        Raises:
            ValueError: If ``top`` is not positive.
        """
        if top < 1:
            raise ValueError(f"top must be positive, got {top}")
        places: np.ndarray = np.empty((len(queries), 0), np.int64)
        scores: np.ndarray = np.empty((len(queries), 0), np.float32)
        for start in range(0, len(self.items), _BLOCK):
            new = queries @ self.vectors[start : start + _BLOCK].T
            numbers = np.broadcast_to(np.arange(start, start + new.shape[1]), new.shape)
            scores, places = np.concatenate([scores, new], 1), np.concatenate([places, numbers], 1)
            best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
            scores, places = np.take_along_axis(scores, best, 1), np.take_along_axis(places, best, 1)
        return places, scores

    def save(self, folder: Path) -> None:
        """Write the index as ``items.json`` and ``items.safetensors``."""
        from safetensors.numpy import save_file

        (folder / ITEMS).write_text(json.dumps(self.items, ensure_ascii=False) + "\n", encoding="utf-8")
        save_file(
            {"vectors": np.ascontiguousarray(self.vectors)}, folder / VECTORS, metadata={"weights": self.fingerprint}
        )

    @classmethod
    def load(cls, folder: Path) -> ItemIndex | None:
        """The index in a folder; None if there is none.

        Raises:
            ValueError: If it is damaged.
        """
        from safetensors import SafetensorError, safe_open

        if not (folder / ITEMS).is_file():
            return None
        try:
            items = json.loads((folder / ITEMS).read_text(encoding="utf-8"))
            with safe_open(folder / VECTORS, framework="numpy") as file:
                return cls(items, file.get_tensor("vectors"), (file.metadata() or {})["weights"])
        except (OSError, KeyError, SafetensorError, ValueError) as error:
            raise ValueError(f"the index of items in {folder} is damaged: {error}") from None


def read_items(path: str | Path, field: str = "text") -> list[str]:
    """The items of a file: lines of text (``.txt``), or records with a field, in JSON Lines, CSV or Parquet.

    Each text is taken once, in the order of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there are no items, a record cannot be read or lacks the field, or a text is empty.
    """
    from evertune.drift.comparison.records import read_records

    if str(path).endswith(".txt"):
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        return checked_items([line for line in lines if line.strip()], str(path))
    items = []
    for record in read_records(path):
        if record.value is None:
            raise ValueError(f"{record.origin}: {record.error}")
        if field not in record.value:
            raise ValueError(f"{record.origin} has no field {field!r} with the text of an item, only {[*record.value]}")
        items.append(record.value[field])
    return checked_items(items, str(path))


def checked_items(items: Sequence[str], origin: str = "items") -> list[str]:
    """The texts of items, each once.

    Raises:
        ValueError: If there are none, or one is not a text or is empty.
    """
    for number, item in enumerate(items, 1):
        if not isinstance(item, str) or not item.strip():
            raise ValueError(f"{origin}: item {number} must be a text that is not empty, got {item!r:.80}")
    if not items:
        raise ValueError(f"{origin}: there are no items")
    return list(dict.fromkeys(items))
