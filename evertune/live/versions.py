"""What an update reads of the versions before it, each file compared with its SHA-256 first."""

from __future__ import annotations

from pathlib import Path

from evertune.gate.evaluation import Evaluation
from evertune.live.slices import load_slice
from evertune.registry.registry import Registry
from evertune.registry.version import Version
from evertune.sources.base import Row
from evertune.utils.typed_json import decode, foreign

EVALUATION = "evaluation.json"
VERDICT = "verdict.json"


class Versions:
    """The versions of a registry, as an update reads them.

    Args:
        registry: Registry of the versions.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._verified: dict[tuple[str, int], Path] = {}

    def begin(self) -> None:
        """Begin an update, in which the files of each version are verified once."""
        self._verified.clear()

    def numbered(self, number: int | None) -> Version | None:
        """The version with a number; None for None."""
        return None if number is None else self._registry.version(number)

    def folder(self, version: Version) -> Path:
        """The files of a version: its weights, memory and learning state are read here.

        Raises:
            RegistryError: If a file is missing or was changed.
        """
        key = version.store.root, version.number  # a teacher is in another registry than its students
        if key not in self._verified:
            self._verified[key] = version.verified_folder()
        return self._verified[key]

    def evaluation(self, version: Version | None) -> Evaluation:
        """The predictions stored with a version, from when the gate judged it; empty for None.

        Raises:
            RegistryError: If the file is missing or was changed.
            ValueError: If it cannot be read.
        """
        if version is None:
            return Evaluation({})
        with foreign(f"{EVALUATION} of version {version.number}"):
            return Evaluation.from_dict(decode(version.read(EVALUATION)))

    def held_out(self, version: Version | None) -> dict[str, list[Row]]:
        """The records held out of all updates up to a version, by the name of their slice; empty for None.

        Raises:
            ValueError: If a file is damaged.
        """
        return {} if version is None else {one.name: load_slice(version.store, one) for one in version.slices()}
