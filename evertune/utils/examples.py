"""Datasets as evertune reads them: by index, or by column if they have columns."""

from __future__ import annotations

from typing import Any, Protocol


class Examples(Protocol):
    """A map-style dataset: anything with a length whose examples are read by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def column_of(data: Examples, column: str) -> list[Any]:
    """The values of all examples under one key, read by column if the dataset has columns."""
    if hasattr(data, "column_names"):
        return list(data[column])  # type: ignore[index]
    return [data[index][column] for index in range(len(data))]
