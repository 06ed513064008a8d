"""The plan of an update, written to disk before it starts, so that an interrupted update is finished as planned."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from evertune.utils.files import empty, write_atomically
from evertune.utils.typed_json import read_json

_FILE = "plan.json"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of one update.

    Args:
        version: Number of the version that the update produces.
        parent: Number of the version in production that the update starts from; None for the first.
        kind: ``"first"`` and ``"rebuild"`` start from the pretrained model, ``"update"`` from the version in
            production, ``"distillation"`` from some of its layers; ``"imprinting"`` adds rows of new classes to it.
        after: Number of the last segment of the journal that the parent has learned.
        consumed: Number of the last segment that this update learns.
        offset: Offset of the source after that segment.
        reason: Why there is an update, as a message.
        created: Time at which it was planned (ISO 8601, UTC).
        config: Hash of the settings. An update that was interrupted under other settings is not resumed.
        records: Number of records in its segments when it was planned. If some were withdrawn since, it is not resumed.
            None in a plan of an earlier release, which is resumed.
        teacher: Number of the version, in the registry of the teachers, that a student in a registry of its own learns
            from; None for other updates.
    """

    version: int
    parent: int | None
    kind: Literal["first", "update", "rebuild", "distillation", "imprinting"]
    after: int
    consumed: int
    offset: dict[str, Any] | None
    reason: str
    created: str
    config: str
    records: int | None = None
    teacher: int | None = None

    @property
    def experience(self) -> str:
        """Name of the records of this update in tables and plots."""
        return f"update-{self.version}" if self.teacher is None else f"student-of-{self.teacher}"

    @property
    def identity(self) -> str:
        """A hash of the plan, with which the results of an update are marked: those of another plan are never taken."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write the plan to a folder; from then on, the update is resumed until it is published or refused."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / _FILE, json.dumps(asdict(self), indent=2).encode())

    @classmethod
    def load(cls, folder: Path) -> Plan | None:
        """The plan of an interrupted update in this folder; None if there is none.

        Raises:
            ValueError: If the file is not a plan.
        """
        path = folder / _FILE
        if not path.is_file():
            return None
        try:
            return read_json(cls, path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); delete {folder} to plan the update again") from error


def clear(folder: Path) -> None:
    """Delete an update in progress."""
    (folder / _FILE).unlink(missing_ok=True)  # first, so that leftovers of a crash belong to no update
    empty(folder)
