"""Erases records from everything that a registry keeps (the right to erasure), and proves it."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from evertune.gate.evaluation import Evaluation
from evertune.live.versions import EVALUATION
from evertune.memory.memory import forget_saved
from evertune.memory.view import MemoryView
from evertune.registry.journal import Journal
from evertune.registry.manifest import Manifest
from evertune.registry.quarantine import RELEASED, WITHDRAWN
from evertune.registry.registry import Registry
from evertune.registry.rows import decode_rows, decode_sealed, encode_rows, encode_sealed, sha256
from evertune.registry.segments import Segment, described, description_name
from evertune.registry.slice_index import INDEX, SliceIndex
from evertune.registry.store import MANIFEST, RegistryError, Store
from evertune.sources.masking import masked_id
from evertune.utils.typed_json import decode, foreign

_FOLDER = "erasing"
_TODO = f"{_FOLDER}/todo.json"
_MEMORY = "memory.json"
_COUNTED_BY = {"sha256": "records", "sha256_quarantined": "quarantined", "sha256_waiting": "waiting"}
"""The number of rows that a segment's description gives for each of its files."""


@dataclass(frozen=True)
class Erasure:
    """What was erased.

    Args:
        ids: The ids that were asked for.
        found: Number of erased copies by place: ``pending``, ``quarantine``, ``slices``, ``memory``, ``predictions``,
            and the number of ``damaged`` files that were deleted.
        versions: Numbers of the versions whose memory or predictions were rewritten.
    """

    ids: Sequence[str]
    found: Mapping[str, int]
    versions: Sequence[int]

    @property
    def words(self) -> str:
        """What was erased, as a message."""
        what = f"{len(self.ids)} {'id' if len(self.ids) == 1 else 'ids'}"
        if not self.found:
            return f"no file of the registry holds {what}"
        places = ", ".join(f"{count} in {place}" for place, count in sorted(self.found.items()))
        versions = f" (versions {', '.join(map(str, self.versions))} rewritten)" if self.versions else ""
        return (
            f"erased {what}: {places}{versions}; no file of the registry holds them now. Weights that were trained on "
            "them are not changed"
        )


def erase(registry: Registry, ids: Iterable[str], staging: Path | None = None) -> Erasure:
    """Erase all copies of records: pending and waiting ones, quarantine, held-out slices, and every version's replay
    memory and predictions.

    The new files are written first and take their places afterwards, so that a call that was killed is finished by the
    next one, or by the next update. An update in progress starts again without the records. An id that a masker has
    replaced by its hash is found, too. The registry's lease is taken.

    Args:
        registry: Registry to erase from. Copies elsewhere (caches, backups, a mirror, the source) are not reached.
        ids: Ids of the records.
        staging: Folder of the update in progress, if it is not inside the registry (``work_dir``).

    Raises:
        LeaseHeld: If another process is writing to the registry.
        RegistryError: If a file still holds one of the ids afterwards; the message names it.
        ValueError: If there is no id, or a file of the registry is damaged.

    Example::

        print(erase(Registry("registry"), ["customer-17"]).words)
    """
    asked = sorted(set(ids))
    if not asked or not all(asked):
        raise ValueError("erasing needs at least one id, and none that is empty")
    gone = {*asked, *map(masked_id, asked)}
    store = registry.store
    with registry.lease("evertune forget"):
        finish(registry)
        edits = _Edits(store, gone)
        edits.plan()
        edits.commit(registry.check_lease)
        finish(registry)
        if staging is None and store.is_local:
            staging = store.local("staging")
        if staging is not None and staging.exists():
            shutil.rmtree(staging)
        if left := sorted(_holding(store, gone)):
            raise RegistryError(f"{', '.join(store.address(name) for name in left)} still hold erased records")
    return Erasure(asked, dict(edits.found), sorted(edits.versions))


def finish(registry: Registry) -> None:
    """Finish an erasure that was interrupted, if there is one. The caller holds the registry's lease."""
    store = registry.store
    if store.exists(_TODO):
        for name, part in json.loads(store.read(_TODO)).items():
            with store.locked():
                registry.check_lease()
                if part is None:
                    store.delete(name)
                else:
                    store.write(name, store.read(f"{_FOLDER}/{part}"))
        store.delete(_TODO)  # first, so that half of the folder is never taken for a whole plan
    if store.exists(_FOLDER):
        store.delete(_FOLDER)


@dataclass
class _Edits:
    """The files of a registry as they will be without some records: planned in full before the first is replaced."""

    store: Store
    gone: set[str]
    files: dict[str, bytes | None] = field(default_factory=dict)
    found: Counter[str] = field(default_factory=Counter)
    versions: set[int] = field(default_factory=set)
    changed: dict[str, tuple[str, int]] = field(default_factory=dict)
    """The new SHA-256 and number of rows of each file of rows that changes, by its old SHA-256."""

    def plan(self) -> None:
        for place in ("pending", "quarantine", "slices"):
            for name in self.store.list(place):
                if name.endswith(".jsonl") and f"{place}/{name}" != INDEX:
                    self._rows(place, f"{place}/{name}")
        for segment in Journal(self.store).segments():
            self._description(segment)
        for name in self.store.list("damaged"):  # what a repair has set aside cannot be rewritten
            content = self.store.read(f"damaged/{name}")
            if any(_quoted(id) in content for id in self.gone):
                self.found["damaged"] += 1
                self.files[f"damaged/{name}"] = None
        index = SliceIndex.read(self.store)
        before = index.content
        for name in self.store.list("versions"):
            if self.store.exists(f"versions/{name}/{MANIFEST}"):
                self._version(f"versions/{name}", index)
        if index.content != before:  # first, as it has the lists of the old manifests and of the new ones
            self.files = {INDEX: index.content, **self.files}

    def commit(self, check_lease: Callable[[], None] = lambda: None) -> None:
        """Write the new files beside the old ones, and then the list that makes them count."""
        todo: dict[str, str | None] = {}
        for number, (name, content) in enumerate(self.files.items()):
            todo[name] = None if content is None else str(number)
            if content is not None:
                self.store.write(f"{_FOLDER}/{number}", content)
        if todo:
            with self.store.locked():
                check_lease()
                self.store.write(_TODO, json.dumps(todo).encode())

    def _rows(self, place: str, name: str) -> None:
        content, address = self.store.read(name), self.store.address(name)
        sealed = name in (WITHDRAWN, RELEASED)
        rows = decode_sealed(content, address) if sealed else decode_rows(content, address)
        kept = [row for row in rows if not _is_of(row, self.gone)]
        if len(kept) == len(rows):
            return
        self.found[place] += len(rows) - len(kept)
        self.files[name] = new = encode_sealed(kept) if sealed else encode_rows(kept)
        self.changed[sha256(content)] = sha256(new), len(kept)

    def _description(self, segment: Segment) -> None:
        """The description of a segment names the hashes of its files and how many rows they hold."""
        changes: dict[str, Any] = {}
        for key, count in _COUNTED_BY.items():
            if (digest := getattr(segment, key)) in self.changed:
                changes[key], changes[count] = self.changed[digest]
        if changes:
            new = replace(segment, **changes)
            self.files[description_name(segment.number)] = described(replace(new, bad=min(new.bad, new.quarantined)))

    def _version(self, folder: str, index: SliceIndex) -> None:
        manifest = Manifest.from_json(self.store.read(f"{folder}/{MANIFEST}"))
        files = dict(manifest.files)
        for name in manifest.files:
            if PurePosixPath(name).name == _MEMORY:
                self._memory(folder, name, files)
        if EVALUATION in files:
            self._predictions(folder, files)
        slices = index.entries(manifest.slices_digest)
        for place, entry in enumerate(slices):
            if entry.sha256 in self.changed:
                digest, examples = self.changed[entry.sha256]
                slices[place] = replace(entry, sha256=digest, examples=examples)
        new = replace(manifest, files=files, slices_digest=index.add(slices))
        if new != manifest:
            self.versions.add(manifest.version)
            self.files[f"{folder}/{MANIFEST}"] = new.to_json()

    def _memory(self, folder: str, name: str, hashes: dict[str, str]) -> None:
        inside = PurePosixPath(name).parent
        settings = json.loads(self.store.read(f"{folder}/{name}"))
        with tempfile.TemporaryDirectory() as temporary:
            for file in (_MEMORY, settings["file"]):
                (Path(temporary) / file).write_bytes(self.store.read(f"{folder}/{inside / file}"))
            if not (count := forget_saved(temporary, self.gone)):
                return
            self.found["memory"] += count
            old = str(inside / settings["file"])
            self.files[f"{folder}/{old}"] = None
            del hashes[old]
            for path in Path(temporary).iterdir():
                self.files[f"{folder}/{inside / path.name}"] = content = path.read_bytes()
                hashes[str(inside / path.name)] = sha256(content)

    def _predictions(self, folder: str, hashes: dict[str, str]) -> None:
        name = f"{folder}/{EVALUATION}"
        content = self.store.read(name)
        if not any(_quoted(id) in content for id in self.gone):
            return
        with foreign(self.store.address(name)):
            stored = Evaluation.from_dict(decode(content))
        left = stored.without(self.gone)
        self.found["predictions"] += len(stored) - len(left)
        self.files[name] = new = json.dumps(left.to_dict(), sort_keys=True).encode()
        hashes[EVALUATION] = sha256(new)


def _is_of(row: Mapping[str, Any], ids: set[str]) -> bool:
    """Whether a row is a copy of one of these records. A row that could not be read has no id, but may contain it."""
    if "id" in row:
        return row["id"] in ids
    if isinstance(raw := row.get("raw"), str):
        return any(re.search(rf"(?<!\w){re.escape(id)}(?!\w)", raw) for id in ids)
    record = row.get("record")
    return isinstance(record, Mapping) and any(
        isinstance(value, str | int) and str(value) in ids for value in record.values()
    )


def _holding(store: Store, ids: set[str]) -> Iterator[str]:
    """The files of a registry that hold one of these ids."""
    quoted = [_quoted(id) for id in ids]
    for top in store.list():
        for file in store.sizes(top):
            name = top if top.endswith(".json") else f"{top}/{file}"
            if file.endswith((".json", ".jsonl")):
                content = store.read(name)
                if any(id in content for id in quoted):
                    yield name
            elif file.endswith(".arrow") and ids.intersection(MemoryView.open(store.local(name)).ids):
                yield name


def _quoted(id: str) -> bytes:
    return json.dumps(id, ensure_ascii=False).encode(errors="backslashreplace")
