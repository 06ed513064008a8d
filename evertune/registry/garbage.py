"""What a registry no longer needs: old versions, and the files that only they needed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from evertune.registry.journal import Journal
from evertune.registry.manifest import Manifest
from evertune.registry.slice_index import FOLDER as SLICES
from evertune.registry.slice_index import INDEX, SliceIndex
from evertune.registry.store import RegistryError, Store
from evertune.registry.version import version_folder

_STAGING = "staging"
_DAY = 86_400


@dataclass(frozen=True)
class Garbage:
    """A file or folder of a registry that is no longer needed.

    Args:
        name: Name of the file or folder.
        size: Size of all its files in bytes.
        why: Why it is not needed.
    """

    name: str
    size: int
    why: str


def find_garbage(
    store: Store, numbers: Sequence[int], published: Collection[int], retained: Sequence[Manifest], stale_days: float
) -> Iterator[Garbage]:
    """The files and folders that are not needed, in the order in which they can be deleted.

    Args:
        store: Store of the registry.
        numbers: Numbers of all folders of versions.
        published: Numbers of the versions that are whole.
        retained: Manifests of the versions to keep.
        stale_days: Days without a change after which what was left unfinished is not needed.

    Raises:
        RegistryError: If the index of slices is damaged.
    """

    def entry(name: str, why: str) -> Garbage:
        return Garbage(name, sum(store.sizes(name).values()), why)

    kept = {manifest.version for manifest in retained}
    for number in numbers:
        if number not in kept:
            yield entry(version_folder(number), "old" if number in published else "never published whole")
    needed = {INDEX, *_slice_files(store, retained)}
    for name in store.list(SLICES) if retained else []:
        if f"{SLICES}/{name}" not in needed:
            yield entry(f"{SLICES}/{name}", "no version needs it")
    learned = min((manifest.consumed for manifest in retained), default=0)
    for name in Journal(store).files(learned):
        yield entry(name, "every version that is kept has learned it")
    for name in store.leftovers():
        if store.age(name) > stale_days * _DAY:
            yield entry(name, "left by a process that was killed")
    if store.exists(_STAGING) and store.age(_STAGING) > stale_days * _DAY:
        yield entry(_STAGING, "an update that nobody went on with")


def _slice_files(store: Store, manifests: Iterable[Manifest]) -> set[str]:
    index = SliceIndex.read(store)
    try:
        return {entry.file for manifest in manifests for entry in index.entries(manifest.slices_digest)}
    except ValueError as error:
        raise RegistryError(str(error)) from None
