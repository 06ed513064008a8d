"""What one update is going to do: written down before it starts, so that an interrupted one is finished as planned."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from evertune.utils.files import write_atomically

_FILE = "plan.json"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One update.

    Args:
        version: the number of the version that it makes.
        parent: the version in production, which it starts from; None for the first.
        kind: ``"first"`` and ``"rebuild"`` start from the pretrained model, ``"update"`` from production.
        after: the last segment of the journal that the parent has learned from.
        consumed: the last segment that this update learns from.
        offset: where the source stands after it.
        reason: why there is an update, in words.
        created: when it was planned (ISO 8601, UTC).
        config: a hash of the settings; an interrupted update under other settings is not gone on with.
    """

    version: int
    parent: int | None
    kind: Literal["first", "update", "rebuild"]
    after: int
    consumed: int
    offset: dict[str, Any] | None
    reason: str
    created: str
    config: str

    @property
    def experience(self) -> str:
        """What the records of this update are called in tables and plots."""
        return f"update-{self.version}"

    def save(self, folder: Path) -> None:
        """Write the plan to a folder: from then on the update is resumed until it is published or refused."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / _FILE, json.dumps(asdict(self), indent=2).encode())

    @classmethod
    def load(cls, folder: Path) -> Plan | None:
        """The plan of an interrupted update in this folder, if there is one.

        Raises:
            ValueError: when the file is not a plan.
        """
        path = folder / _FILE
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete {folder} to plan the update again") from error
