"""The defects of a version: its files and its held-out slices, compared with its manifest."""

from __future__ import annotations

from dataclasses import dataclass

from evertune.registry.manifest import Manifest
from evertune.registry.slice_index import INDEX, SliceEntry, SliceIndex
from evertune.registry.store import MANIFEST, Store
from evertune.registry.version import Version, manifest_name, version_folder


@dataclass(frozen=True)
class Finding:
    """A defect of a registry.

    Args:
        version: Number of the version that has the defect; None for the registry itself.
        words: Description of the defect.
        usable: Whether the version can be loaded in spite of it.
        part: The part of the registry that has the defect, if it is not a version: ``"aliases"``, ``"slices"`` or
            ``"journal"``.
    """

    version: int | None
    words: str
    usable: bool
    part: str = "aliases"


class SliceCheck:
    """Checks the slices of versions, each file once."""

    def __init__(self, store: Store) -> None:
        self.index = SliceIndex.read(store)
        self._store = store
        self._found: dict[SliceEntry, str] = {}

    def problems(self, manifest: Manifest) -> list[str]:
        """What is wrong with the slices of a version."""
        try:
            entries = self.index.entries(manifest.slices_digest)
        except ValueError as error:
            return [str(error)]
        for entry in entries:
            if entry not in self._found:
                self._found[entry] = self._problem(entry)
        return [self._found[entry] for entry in entries if self._found[entry]]

    def _problem(self, entry: SliceEntry) -> str:
        try:
            return "" if self._store.sha256(entry.file) == entry.sha256 else f"{entry.file} is damaged or cut short"
        except FileNotFoundError:
            return f"{entry.file} is missing"
        except OSError as error:
            return f"{entry.file} cannot be read ({error})"
        except ValueError:
            return f"{INDEX} names the file {entry.file!r} as a slice"


def inspect_version(version: Version, hashes: bool = True, slices: SliceCheck | None = None) -> list[Finding]:
    """The defects of a version whose manifest can be read.

    Args:
        version: The version.
        hashes: Whether to read the files and slices. If False, only what shows without reading them is found.
        slices: Remembers which slices were checked, for several versions.
    """
    store, number, manifest = version.store, version.number, version.manifest
    folder, findings = version_folder(number), list[Finding]()

    def find(words: str, usable: bool = False) -> None:
        findings.append(Finding(number, words, usable))

    try:
        Manifest.check_seal(store.read(manifest_name(number)))
    except ValueError as error:
        find(f"{manifest_name(number)} is damaged: {error}")
    there = store.sizes(folder)
    for name, digest in manifest.files.items():
        if name not in there:
            find(f"{folder}/{name} is missing")
        elif hashes and store.sha256(f"{folder}/{name}") != digest:
            find(f"{folder}/{name} is damaged or cut short: its sha256 is not the manifest's")
    for name in sorted(there.keys() - manifest.files.keys() - {MANIFEST}):
        find(f"{folder}/{name} is not in the manifest: it was added later")
    if hashes:
        for words in (slices or SliceCheck(store)).problems(manifest):
            find(f"{words}: no update can start from this version", usable=True)
    return findings
