"""The state of a callback as one file of JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from evertune.utils.ranks import barrier, is_writer
from evertune.utils.typed_json import read_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")


def save_state(path: Path, state: DataclassInstance) -> None:
    """Write a dataclass to a file; its folder is made. Call on every rank."""
    if is_writer():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(state)))
    barrier()


def load_state(kind: type[T], path: Path) -> T:
    """Read what :func:`save_state` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is corrupt.
    """
    try:
        return read_json(kind, path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is corrupt or truncated: {error}") from error
