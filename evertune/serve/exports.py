"""Versions of a registry as exports: made when a server first needs one, and kept for the next server."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from evertune.export.exported import ExportedModel
from evertune.registry.registry import RegistryError
from evertune.registry.serving import MODEL
from evertune.registry.store import cache_folder
from evertune.registry.version import Version
from evertune.serve.settings import OnnxSettings
from evertune.utils.files import delete

KEPT = 4
"""Exports of a registry that stay: what a rollback needs, and what a canary or a shadow has."""

logger = logging.getLogger("evertune.serve")


class Exports:
    """The versions of a registry, exported to ONNX. Servers of one machine share the folder: each export is made once.

    An export is made by ``evertune export`` in a process of its own, so that a server keeps answering meanwhile, and is
    compared with its version on the registry's held-out records. Older exports than the newest four are deleted.

    Args:
        settings: See :class:`OnnxSettings`; its ``precision`` is set.
        registry: Folder or URL of the registry.
    """

    def __init__(self, settings: OnnxSettings, registry: str) -> None:
        assert settings.precision is not None
        self._precision, self._registry = settings.precision, registry
        # A folder of its own: old exports are deleted from it, and nothing of another registry or of somebody else.
        exports = cache_folder() / "exports" if settings.folder is None else Path(settings.folder)
        self.folder = exports / hashlib.sha256(registry.encode()).hexdigest()[:16]
        self._made: subprocess.Popen[str] | None = None
        self._closed = threading.Event()

    def module(self, version: Version) -> Any:
        """A module that answers as the version does, with the weights of its export.

        Raises:
            RegistryError: If the version is damaged or cannot be exported, or its export answers otherwise.
        """
        version.verified_folder(MODEL)
        # By its files: a registry that was deleted and made again counts from 1.
        files = hashlib.sha256(json.dumps(version.manifest.files, sort_keys=True).encode()).hexdigest()
        folder = self.folder / f"{version.number}-{self._precision}-{files[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not folder.is_dir():
                self._make(version, folder)
            os.utime(folder)
            self._delete_old()
            try:
                return ExportedModel.load(folder).module
            except ValueError as error:
                raise RegistryError(f"the export of version {version.number} is damaged: {error}; delete it") from error

    def close(self) -> None:
        """End an export that is being made."""
        self._closed.set()
        if (made := self._made) is not None:
            made.terminate()

    def _make(self, version: Version, folder: Path) -> None:
        start = time.monotonic()
        quantize = [] if self._precision == "fp32" else ["--quantize", self._precision]
        asked = ["export", self._registry, str(version.number), "--format", "onnx", *quantize, "--output", str(folder)]
        command = [sys.executable, "-m", "evertune", *asked]
        self._made = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if self._closed.is_set():  # since before there was a process to end
            self._made.terminate()
        _, errors = self._made.communicate()
        if self._made.returncode:
            reason = (errors.strip().splitlines() or [f"exit code {self._made.returncode}"])[-1]
            raise RegistryError(
                f"version {version.number} is not served: {reason.removeprefix('evertune export: ')} "
                f"(onnx.precision={self._precision}; without it, versions answer as they are)"
            )
        seconds = time.monotonic() - start
        words = f"version {version.number} was exported to ONNX in {self._precision} in {seconds:.0f} s"
        logger.info(words, extra={"event": "exported", "version": version.number})

    def _delete_old(self) -> None:
        found = sorted(self.folder.glob(f"*-{self._precision}-*"), key=lambda path: path.stat().st_mtime)
        for folder in found[:-KEPT]:
            delete(folder)
