"""A version of the registry: what its manifest says, and its files, checked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from evertune.registry.manifest import Manifest
from evertune.registry.slice_index import SliceEntry, SliceIndex
from evertune.registry.store import MANIFEST, RegistryError, Store
from evertune.utils.files import sha256
from evertune.utils.notebooks import table
from evertune.utils.shares import percent

VERSIONS = "versions"


@dataclass(frozen=True)
class Version:
    """One attempt to update the model that reached the gate, whether promoted or refused.

    Args:
        manifest: Manifest of the version.
        store: Store of the registry that holds it.
    """

    manifest: Manifest
    store: Store = field(repr=False, compare=False)

    def _repr_html_(self) -> str:
        """What it is and how accurate, as a notebook shows it."""
        manifest = self.manifest
        words = f"version {self.number}, {'passed' if self.passed else 'refused'}: {manifest.summary}".rstrip(": ")
        facts = {
            "created": f"{self.created:%Y-%m-%d %H:%M}",
            "parent": self.parent,
            "because": manifest.reason,
            "module": manifest.module,
            "classes": ", ".join(manifest.classes),
            **{f"{kind} records".replace("_", " "): n for kind, n in manifest.records.items()},
            "average accuracy": percent(manifest.metrics.average_accuracy),
            **{f"accuracy on {name}": percent(value) for name, value in manifest.metrics.accuracy.items()},
        }
        return table(words, ["", ""], [[name, value] for name, value in facts.items() if value not in (None, "")])

    @property
    def number(self) -> int:
        """Number of the version in the registry, counted from 1."""
        return self.manifest.version

    @property
    def parent(self) -> int | None:
        """Number of the version that it was trained from; None for the first."""
        return self.manifest.parent

    @property
    def created(self) -> datetime:
        """When it was made."""
        return self.manifest.created

    @property
    def passed(self) -> bool:
        """Whether the gate let it pass; True for a version that was never judged."""
        return self.manifest.passed

    @property
    def experience(self) -> str:
        """Name of the experience that it learned."""
        return self.manifest.experience

    @property
    def text_fields(self) -> list[str]:
        """Names of the fields with the text, or the two texts, that it was trained on."""
        schema = self.manifest.config.get("schema")
        field = schema.get("text", "text") if isinstance(schema, dict) else "text"
        return [field] if isinstance(field, str) else list(field)

    def folder(self) -> Path:
        """Its files on this machine: the folder itself, or a verified copy if the registry is remote.

        Raises:
            RegistryError: If the files of a remote registry are damaged.
        """
        return self.store.local(version_folder(self.number))

    def verified_folder(self, part: str = "") -> Path:
        """Like :meth:`folder`, with every file compared with its SHA-256 in the manifest.

        Use it wherever weights or learning state are loaded, or a decision rests on what the files say.

        Args:
            part: Subfolder to compare, such as ``"model"``. By default all files.

        Raises:
            RegistryError: If a file is missing, was changed or was added, or the manifest names none.
        """
        folder = self.folder()
        expected = {name for name in self.manifest.files if not part or name.startswith(f"{part}/")}
        paths = (folder / part).rglob("*")
        found = {path.relative_to(folder).as_posix() for path in paths if path.is_file()} - {MANIFEST}
        problems = [f"{name} is missing" for name in sorted(expected - found)]
        problems += [f"{name} is not in its manifest" for name in sorted(found - expected)]
        problems += [
            f"{name} does not match its sha256"
            for name in sorted(expected & found)
            if sha256(folder / name) != self.manifest.files[name]
        ]
        if problems or not expected:
            raise self._damaged(*problems or [f"it holds no {part or 'files'}"])
        return folder

    def read(self, name: str) -> bytes:
        """The content of one of its files, compared with its SHA-256 in the manifest.

        Raises:
            RegistryError: If the file is missing or was changed.
        """
        file = f"{version_folder(self.number)}/{name}"
        content = self.store.read_all([file]).get(file)
        if content is None:
            raise self._damaged(f"{name} is missing")
        if hashlib.sha256(content).hexdigest() != self.manifest.files.get(name):
            raise self._damaged(f"{name} does not match its sha256")
        return content

    def slices(self) -> list[SliceEntry]:
        """The files with the records held out of every update so far, oldest first.

        Raises:
            RegistryError: If the index of slices is damaged. The version can be served, but no update can start from
                it.
        """
        try:
            return SliceIndex.read(self.store).entries(self.manifest.slices_digest)
        except ValueError as error:
            raise RegistryError(str(error)) from None

    def _damaged(self, *problems: str) -> RegistryError:
        root = self.store.root
        return RegistryError(
            f"version {self.number} of {root} is damaged: {'; '.join(problems)}. "
            f"If it is in production, go back with `evertune registry rollback {root}`"
        )


def version_folder(number: int) -> str:
    """Name of the folder of a version."""
    return f"{VERSIONS}/{number}"


def manifest_name(number: int) -> str:
    """Name of the manifest of a version."""
    return f"{VERSIONS}/{number}/{MANIFEST}"
