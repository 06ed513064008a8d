"""An exported model in the place of a version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from evertune.export.exported import ExportedModel


@dataclass(frozen=True)
class ExportedVersion:
    """What an export was made from.

    Args:
        number: Number of the version; 0 for a module that was not of a registry.
    """

    number: int


class ServedExport:
    """An export that answers, with the interface of :class:`evertune.registry.serving.Served`. It is never replaced.

    Args:
        folder: Folder of the export.

    Raises:
        FileNotFoundError: If the folder holds no export.
        ModuleNotFoundError: If the extra ``export`` is not installed.
        ValueError: If a file is damaged, or is a program of ``torch.export``, which is not served.
    """

    problem = None

    def __init__(self, folder: Path) -> None:
        model = ExportedModel.load(folder)
        self.module = model.module
        self.version = ExportedVersion(model.manifest.origin.version or 0)
        self._turn = Lock()

    @property
    def answering(self) -> ServedExport:
        """The model with its version: itself."""
        return self

    def predict(self, texts: Sequence[Any]) -> list[Any]:
        """The answer to each text. One thread at a time, as the tokenizer requires."""
        with self._turn:
            answers: list[Any] = self.module.predict(texts)
            return answers

    def close(self) -> None:
        """Nothing is followed, so that there is nothing to end."""
