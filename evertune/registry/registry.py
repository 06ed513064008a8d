"""The registry: numbered versions that never change, and a small file that names the one in production."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import socket
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from types import EllipsisType
from typing import Any

from evertune.registry.journal import Journal
from evertune.registry.lease import Lease, LeaseHeld, LeaseLost
from evertune.registry.manifest import FormatError, Manifest
from evertune.registry.repair import damage, repair
from evertune.registry.slice_index import FOLDER as SLICES
from evertune.registry.slice_index import INDEX, SliceEntry, SliceIndex
from evertune.registry.slice_index import repair as repair_slices
from evertune.registry.store import MANIFEST, RegistryError, Store
from evertune.utils.files import sha256, write_atomically
from evertune.utils.typed_json import SEAL, check_seal, decode, read_json, sealed

__all__ = [
    "ALIASES",
    "Finding",
    "Garbage",
    "LeaseHeld",
    "LeaseLost",
    "Manifest",
    "Registry",
    "RegistryError",
    "Version",
]

ALIASES = ("production", "previous", "refused")

_ALIASES = "aliases.json"
_VERSIONS = "versions"
_STAGING = "staging"
_EVENTS = 200
_DAY = 86_400


@dataclass(frozen=True)
class Version:
    """One attempt to update the model that reached the gate, whether promoted or refused.

    Args:
        manifest: Manifest of the version.
        store: Store of the registry that holds it.
    """

    manifest: Manifest
    store: Store = field(repr=False, compare=False)

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

    def folder(self) -> Path:
        """Its files on this machine: the folder itself, or a verified copy if the registry is remote.

        Raises:
            RegistryError: If the files of a remote registry are damaged.
        """
        return self.store.local(_folder(self.number))

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
        file = f"{_folder(self.number)}/{name}"
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


@dataclass
class _State:
    """The content of ``aliases.json``."""

    aliases: dict[str, int] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    given_up: list[int] = field(default_factory=list)

    def encoded(self) -> bytes:
        values = {**self.aliases, "given_up": self.given_up, "events": self.events[-_EVENTS:]}
        return json.dumps(sealed(values), indent=1).encode()

    @classmethod
    def parse(cls, content: bytes) -> _State:
        values = decode(content)
        checked = read_json(_Aliases, content)
        check_seal(values, {entry.name for entry in fields(_Aliases)})
        aliases = {name: number for name in ALIASES if (number := getattr(checked, name)) is not None}
        given_up = checked.given_up
        if given_up is None:  # written before the field existed: the events say it
            given_up = []
            for event in checked.events:
                if event.action == "promote":
                    given_up = []
                elif event.discard is not None:
                    given_up.append(event.discard)
        return cls(aliases, values["events"], given_up)


@dataclass
class _Event:
    """The entries of an event that others rely on."""

    time: str
    action: str
    to: int | None
    reason: str = ""
    by: str = ""
    discard: int | None = None


@dataclass
class _Aliases:
    """The entries of ``aliases.json``."""

    events: list[_Event]
    production: int | None = None
    previous: int | None = None
    refused: int | None = None
    given_up: list[int] | None = None


class Registry:
    """Versions of a model with their manifests, and the aliases ``production``, ``previous`` and ``refused``.

    ``aliases.json`` holds the aliases and the last 200 events. A version goes into production by an atomic replacement
    of this file, whatever process is killed or disk is full. The manifest of a version names the records that it has
    learned (``consumed``, ``offset``): the same replacement therefore commits them, and a rollback makes them pending
    again. Aliases are changed under the store's lock, for which no lease is needed: a rollback must be possible while
    :class:`~evertune.live.watch.Watch` holds the lease.

    Args:
        root: A local folder, or the URL of a folder in an object store (``s3://bucket/registry``). It is created by the
            first write.
        cache: Local folder for copies of remote files; see :class:`~evertune.registry.store.Store`.

    Example:
        >>> import tempfile
        >>> from evertune.registry.manifest import Manifest, Metrics
        >>> registry = Registry("memory://doc/versions")
        >>> for accuracy in (0.8, 0.9):
        ...     folder = Path(tempfile.mkdtemp())
        ...     _ = (folder / "weights").write_bytes(b"123")
        ...     manifest = Manifest(version=registry.next_number(), metrics=Metrics(average_accuracy=accuracy))
        ...     _ = registry.promote(registry.publish(folder, manifest).number, reason="volume")
        >>> registry.aliases
        {'production': 2, 'previous': 1}
        >>> registry.rollback("answers are too long").number, registry.verify()
        (1, [])
    """

    def __init__(self, root: str | Path, cache: str | Path | None = None) -> None:
        self.store = Store(root, cache)
        self._known: dict[int, Version] = {}
        """Versions whose manifests were read by :meth:`versions`: they never change."""
        self._lease: Lease | None = None

    def __repr__(self) -> str:
        return f"Registry({self.store.root!r})"

    # --- reading

    def versions(self) -> list[Version]:
        """All versions, oldest first. A version whose manifest is damaged is left out, with a warning.

        Each manifest is read once in the lifetime of this object.
        """
        versions, damaged = self._survey()
        for words in damaged.values():
            warnings.warn(f"left out: {words}", stacklevel=2)
        return versions

    def damaged(self) -> dict[int, str]:
        """Why the manifests of versions cannot be read, by number; empty if all can."""
        return self._survey()[1]

    def _survey(self) -> tuple[list[Version], dict[int, str]]:
        numbers, damaged = self._numbers(), dict[int, str]()
        # A version that was deleted is forgotten, since the number of one that was never whole is used again.
        self._known = {number: self._known[number] for number in numbers if number in self._known}
        new = [_manifest(number) for number in numbers if number not in self._known]
        for name, content in self.store.read_all(new).items():
            number = int(name.split("/")[1])
            try:
                self._known[number] = self._parsed(number, content)
            except RegistryError as error:
                damaged[number] = str(error)
        return [self._known[number] for number in sorted(self._known)], damaged

    def version(self, which: int | str) -> Version:
        """A version by its number or an alias.

        Raises:
            RegistryError: If there is no such version, or its manifest is damaged.
        """
        number = self._number(which)
        found = self.store.read_all([_manifest(number)])
        if not found:
            raise RegistryError(f"{self.store.root} has no version {number}; it has {_listed(self._numbers())}")
        return self._parsed(number, found[_manifest(number)])

    @property
    def aliases(self) -> dict[str, int]:
        """The number of the version behind each alias that is set.

        Raises:
            RegistryError: If ``aliases.json`` is damaged, or missing although there are versions.
        """
        return dict(self._state().aliases)

    @property
    def events(self) -> list[dict[str, Any]]:
        """The changes of the aliases, oldest first, at most 200.

        Each has ``time``, ``action`` (``"promote"``, ``"rollback"``, ``"refused"``), ``from``, ``to``, ``reason`` and
        ``by``; a rollback with ``discard`` also has ``discard``, the version whose records must not be learned again.
        """
        return list(self._state().events)

    @property
    def given_up(self) -> list[int]:
        """Numbers of the versions rolled back from with ``discard`` since the last promotion, oldest first."""
        return list(self._state().given_up)

    @property
    def production(self) -> Version | None:
        """The version in production; None until one is promoted."""
        number = self.aliases.get("production")
        return None if number is None else self.version(number)

    def next_number(self) -> int:
        """The number of the version that is published next."""
        numbers = self._numbers()
        while numbers and not self.store.exists(_manifest(numbers[-1])):
            numbers.pop()  # left by an interrupted publication: the number is used again
        return numbers[-1] + 1 if numbers else 1

    # --- writing

    def lease(self, owner: str | None = None, ttl: float = 60.0) -> Lease:
        """The exclusive right to write, as a context manager.

        While it is held, :meth:`publish` and all methods that change an alias check first that it was not lost.

        Args:
            owner: Name of the holder, for the messages that others get.
            ttl: Seconds without a heartbeat after which others may take over. Default: 60.

        Raises:
            LeaseHeld: On entering, if another process is writing.
        """
        lease = Lease(self.store, owner, ttl)
        if self._lease is None or not self._lease.held:
            self._lease = lease
        return lease

    def check_lease(self) -> None:
        """Make sure that this process has not lost the lease that it has taken; without one, nothing is checked.

        Raises:
            LeaseLost: If another process has taken over.
        """
        if self._lease is not None and self._lease.held:
            self._lease.check()

    def publish(self, folder: Path, manifest: Manifest, slices: Sequence[SliceEntry] = ()) -> Version:
        """Make a local folder the version ``manifest.version``, as a whole or not at all. The folder is moved.

        The manifest is completed with ``files`` (SHA-256 by name) and ``slices_digest``. In a local registry, files
        that are equal to the parent's become hard links to them. No alias changes.

        Args:
            folder: The files of the version.
            manifest: What is known about it.
            slices: The files with the records held out of every update so far, oldest first, which the registry has.

        Raises:
            RegistryError: If the version exists already, or the lease is lost.
            OSError: If it cannot be written; the folder stays where it is.
        """
        number = manifest.version
        self.check_lease()
        if self.store.exists(_manifest(number)):
            raise RegistryError(f"{self.store.root} has a version {number}, and versions never change")
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
        hashes = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
        content = replace(manifest, files=hashes, slices_digest=SliceIndex().add(slices)).to_json()
        version = self._parsed(number, content)
        write_atomically(folder / MANIFEST, content)
        self._share(folder, version)
        with self.store.locked():
            # Before the first version, so that a missing file later on means damage and not an empty registry.
            if not self.store.exists(_ALIASES) and self.next_number() == 1:
                self.store.write(_ALIASES, _State().encoded())
            # Before the manifest that needs it; if the process dies in between, the line is there the next time.
            index = SliceIndex.read(self.store)
            before, _ = index.content, index.add(slices)
            if index.content != before:
                self.check_lease()
                self.store.write(INDEX, index.content)
        self.store.publish(folder, _folder(number))
        return version

    def promote(
        self,
        which: int | str,
        reason: str = "",
        expected: int | EllipsisType | None = ...,
        *,
        verify: bool = True,
        force: bool = False,
        by: str | None = None,
    ) -> Version:
        """Put a version into production. The version that was there becomes ``previous``, and ``refused`` is unset.

        If the version is in production already, nothing changes.

        Args:
            which: Number or alias of the version.
            reason: The reason, for the events.
            expected: Number of the version that must be in production now, None if there must be none. A decision that
                is based on a comparison with that version then does not overrule somebody else's. By default not
                checked.
            verify: Whether to check all files against their SHA-256 first.
            force: Promote a version that the gate has refused. Also replaces an ``aliases.json`` that is damaged or
                lost; a damaged one is kept as ``aliases.json.damaged``.
            by: Who promotes it, for the events. Default: ``user@host``.

        Raises:
            RegistryError: If there is no such version, it is damaged, the gate has refused it, another version than
                ``expected`` is in production, or the lease is lost. Nothing has changed then.
        """
        version = self.version(which)
        if not version.passed and not force:
            raise RegistryError(
                f"version {version.number} was refused: {_summary(version)}. To promote it all the same: force=True, "
                "or --force"
            )
        problems = [finding.words for finding in self._inspect(version.number, verify) if not finding.usable]
        if problems:
            raise RegistryError(f"version {version.number} is damaged and not promoted: {'; '.join(problems)}")
        with self._changing(repair=force) as state:
            self._check_exists(version.number)
            now = state.aliases.get("production")
            if now == version.number:
                return version
            if expected is not ... and expected != now:
                raise RegistryError(
                    f"version {version.number} is not promoted: it was compared with version {expected}, but version "
                    f"{now} is in production by now"
                )
            state.aliases = {"production": version.number} | ({} if now is None else {"previous": now})
            state.given_up = []
            state.events.append(_event("promote", now, version.number, reason, by))
        return version

    def set_refused(self, which: int | str, reason: str = "", by: str | None = None) -> Version:
        """Set the alias ``refused`` to a version; the version in production stays.

        Raises:
            RegistryError: If there is no such version, or the lease is lost.
        """
        version = self.version(which)
        with self._changing() as state:
            self._check_exists(version.number)
            now = state.aliases.get("refused")
            if now != version.number:
                state.aliases["refused"] = version.number
                state.events.append(_event("refused", now, version.number, reason, by))
        return version

    def rollback(self, reason: str = "", *, discard: bool = False, by: str | None = None) -> Version:
        """Put ``previous`` back into production, at once: one small file changes, and nothing is copied or hashed.

        ``previous`` then becomes the version that the new production was trained from, so that a second rollback goes
        one step further back and never forward: to undo a rollback, promote the version by its number. If the parent
        no longer exists, ``previous`` is unset, and another rollback is refused.

        Args:
            reason: The reason, for the events.
            discard: Ask the next update not to learn the records of the abandoned version again, which would be pending
                otherwise. This is only recorded, for the updater; see :attr:`given_up`.
            by: Who rolls back, for the events. Default: ``user@host``.

        Returns:
            The version that is in production now.

        Raises:
            RegistryError: If there is no previous version, or files of it are missing.
        """
        with self._changing() as state:
            now, back = state.aliases.get("production"), state.aliases.get("previous")
            if now is None or back is None:
                raise RegistryError(
                    f"there is no previous version of {self.store.root} to go back to: promote one by its number, "
                    f"of {_listed(self._numbers())}"
                )
            version = self.version(back)
            problems = [finding.words for finding in self._inspect(back, hashes=False) if not finding.usable]
            if problems:
                raise RegistryError(
                    f"version {back} is damaged: {'; '.join(problems)}. Promote another one by its number, of "
                    f"{_listed(self._numbers())}"
                )
            state.aliases["production"] = back
            del state.aliases["previous"]
            if version.parent is not None and self.store.exists(_manifest(version.parent)):
                state.aliases["previous"] = version.parent
            state.given_up += [now] * discard
            event = _event("rollback", now, back, reason, by)
            state.events.append(event | ({"discard": now} if discard else {}))
        return version

    # --- checking and comparing

    def verify(self, which: int | str | None = None) -> list[str]:
        """The defects of a version, or of all versions and the aliases, as messages; see :meth:`inspect`.

        Example:
            >>> Registry("memory://doc/empty").verify()
            []
        """
        return [finding.words for finding in self.inspect(which)]

    def inspect(self, which: int | str | None = None) -> list[Finding]:
        """Check everything against the manifests.

        For a version: files that are missing, damaged, truncated or not listed in the manifest; a manifest of another
        format; held-out slices that are missing or damaged, without which the version can be served, but no update can
        start from it. For the registry: the aliases, and the index of slices and the journal of records, which
        :meth:`repair` mends.

        Args:
            which: Number or alias of a version; None for the whole registry.

        Raises:
            RegistryError: If there is no such version.
        """
        if which is not None:
            number = self._number(which)
            if number not in self._numbers():
                raise RegistryError(f"{self.store.root} has no version {number}; it has {_listed(self._numbers())}")
            return self._inspect(number)
        findings, check = [], _SliceCheck(self.store)
        try:
            for alias, number in self.aliases.items():
                if not self.store.exists(_manifest(number)):
                    findings.append(Finding(None, f"{alias} names version {number}, which does not exist", False))
        except RegistryError as error:
            findings.append(Finding(None, str(error), False))
        for number in self._numbers():
            if self.store.exists(_manifest(number)):
                findings += self._inspect(number, check=check)
        findings += [Finding(None, words, True, "slices") for words in check.index.problems()]
        findings += [Finding(None, found.words, True, "journal") for found in damage(Journal(self.store))]
        return findings

    def repair(self) -> list[str]:
        """Set damaged files of the journal aside with what can be read of them, and restore a damaged index of slices,
        so that updates go on.

        See :func:`evertune.registry.repair.repair` and :func:`evertune.registry.slice_index.repair`. The lease is
        taken, unless this object or the parent process holds it.

        Returns:
            What was done, as messages; empty if nothing is damaged.

        Raises:
            LeaseHeld: If another process is writing.
        """
        with self._leased("evertune registry repair"):
            digests = {version.manifest.slices_digest for version in self._survey()[0]}
            return repair_slices(self.store, digests, self.check_lease) + repair(Journal(self.store, self.check_lease))

    def diff(self, a: int | str, b: int | str) -> dict[str, Any]:
        """The differences between two versions.

        Returns:
            ``a`` and ``b``: the numbers. ``manifest``, ``records``, ``metrics``, ``seconds`` and ``config``: the pairs
            of values that differ, by name (nested names joined by dots), with None for a missing value; ``records`` and
            ``metrics`` list all values. ``classes``: the names ``added`` and ``removed``. ``files``: the pairs of sizes
            of files ``added``, ``removed`` and ``changed``, by name, and the number ``unchanged``. ``size``: the pair
            of total sizes in bytes.
        """
        one, two = self.version(a), self.version(b)
        first, second = one.manifest.to_dict(), two.manifest.to_dict()
        sizes = self.store.sizes(_folder(one.number)), self.store.sizes(_folder(two.number))
        plain = [
            name
            for name in first
            if name not in ("version", SEAL)
            and not any(isinstance(side[name], dict | list) for side in (first, second))
        ]
        files: dict[str, Any] = {"added": {}, "removed": {}, "changed": {}, "unchanged": 0}
        for name in sorted({**first["files"], **second["files"]}):
            hashes = first["files"].get(name), second["files"].get(name)
            if hashes[0] == hashes[1]:
                files["unchanged"] += 1
                continue
            kind = "added" if hashes[0] is None else "removed" if hashes[1] is None else "changed"
            files[kind][name] = [size.get(name) for size in sizes]
        classes = first["classes"], second["classes"]
        return {
            "a": one.number,
            "b": two.number,
            "manifest": _changes({name: first[name] for name in plain}, {name: second[name] for name in plain}),
            "records": _changes(first["records"], second["records"], all_of_them=True),
            "metrics": _changes(first["metrics"], second["metrics"], all_of_them=True),
            "seconds": _changes(first["seconds"], second["seconds"]),
            "config": _changes(first["config"], second["config"]),
            "classes": {
                "added": [name for name in classes[1] if name not in classes[0]],
                "removed": [name for name in classes[0] if name not in classes[1]],
            },
            "files": files,
            "size": [sum(size.values()) for size in sizes],
        }

    # --- garbage collection

    def garbage(self, keep: int = 5, stale_days: float = 7.0) -> list[Garbage]:
        """The files and folders that :meth:`gc` would delete, in that order.

        Raises:
            RegistryError: If the aliases, or a manifest that is needed to decide, are damaged.
        """
        return self._garbage(keep, stale_days)

    def _garbage(self, keep: int, stale_days: float) -> list[Garbage]:
        if keep < 1:
            raise ValueError(f"keep must be positive, got {keep}: the newest version is never deleted")
        numbers, aliases = self._numbers(), self.aliases
        whole = list(self.store.read_all([_manifest(number) for number in numbers]))
        published = [int(name.split("/")[1]) for name in whole]
        retained = sorted({*published[-keep:], *aliases.values()})
        manifests = [self.version(number).manifest for number in retained]

        garbage = []
        for number in numbers:
            if number not in retained:
                why = "old" if number in published else "never published whole"
                garbage.append(self._entry(_folder(number), why))
        needed = {INDEX, *self._slice_files(manifests)}
        for name in self.store.list(SLICES) if retained else []:
            if f"{SLICES}/{name}" not in needed:
                garbage.append(self._entry(f"{SLICES}/{name}", "no version needs it"))
        garbage += self._learned_segments(manifests)
        old = [name for name in self.store.leftovers() if self.store.age(name) > stale_days * _DAY]
        garbage += [self._entry(name, "left by a process that was killed") for name in old]
        if self.store.exists(_STAGING) and self.store.age(_STAGING) > stale_days * _DAY:
            garbage.append(self._entry(_STAGING, "an update that nobody went on with"))
        return garbage

    def gc(self, keep: int = 5, dry_run: bool = False, *, stale_days: float = 7.0) -> list[str]:
        """Delete old versions, and the files that only they needed.

        Kept are the versions behind the aliases, the newest ``keep`` versions, their held-out slices, the records after
        the smallest ``consumed`` among them, the newest segment of records, and all quarantined records. The lease is
        taken, unless this object or the parent process holds it. Aliases may be changed meanwhile: what is deleted is
        then decided again.

        Args:
            keep: Number of newest versions to keep, promoted or refused. Default: 5.
            dry_run: Delete nothing, but return the names.
            stale_days: Days without a change after which an unfinished update, and files that killed processes have
                left half-written, are deleted. Default: 7.

        Returns:
            The names of what was, or would be, deleted.

        Raises:
            LeaseHeld: If another process is writing.
        """
        found = self.garbage(keep, stale_days) if dry_run else self.collect(keep, stale_days)
        return [entry.name for entry in found]

    def collect(self, keep: int = 5, stale_days: float = 7.0) -> list[Garbage]:
        """Like :meth:`gc`, and returns what was deleted with its size and why it was not needed."""
        deleted = []
        with self._leased("evertune registry gc"):
            decided, garbage = self.aliases, self.garbage(keep, stale_days)
            while garbage:
                # Before each deletion: they may take longer than the lease lives, and somebody may have put an old
                # version into production. Under the lock, nobody can until it is deleted, and then it is refused.
                with self.store.locked():
                    self.check_lease()
                    if self.aliases == decided:
                        self.store.delete(garbage[0].name)
                        deleted.append(garbage.pop(0))
                        continue
                decided, garbage = self.aliases, self._garbage(keep, stale_days)
        return deleted

    # --- internals

    def _slice_files(self, manifests: Iterable[Manifest]) -> set[str]:
        index = SliceIndex.read(self.store)
        try:
            return {entry.file for manifest in manifests for entry in index.entries(manifest.slices_digest)}
        except ValueError as error:
            raise RegistryError(str(error)) from None

    def _learned_segments(self, manifests: Sequence[Manifest]) -> Iterator[Garbage]:
        """The segments of records that every retained version has learned, but never the newest."""
        learned = min((manifest.consumed for manifest in manifests), default=0)
        for name in Journal(self.store).files(learned):
            yield self._entry(name, "every version that is kept has learned it")

    def _entry(self, name: str, why: str) -> Garbage:
        sizes = self.store.sizes(name)
        return Garbage(name, sum(sizes.values()), why)

    def _numbers(self) -> list[int]:
        return sorted(int(name) for name in self.store.list(_VERSIONS) if name.isdecimal() and str(int(name)) == name)

    def _share(self, folder: Path, version: Version) -> None:
        """Replace the files of a new version that are equal to its parent's by links to those."""
        if not self.store.is_local or version.parent is None:
            return
        try:
            parent = self.version(version.parent)
        except RegistryError:
            return
        draft = folder.with_name(f".{folder.name}.link")  # outside the folder, which is published as it is
        for name, digest in version.manifest.files.items():
            old = parent.folder() / name
            # Compared again, as the parent's file may have been damaged since.
            if parent.manifest.files.get(name) == digest and old.is_file() and sha256(old) == digest:
                with suppress(OSError):  # on another disk, or links are not supported: it stays a copy
                    draft.unlink(missing_ok=True)
                    os.link(old, draft)
                    draft.replace(folder / name)

    def _leased(self, owner: str) -> AbstractContextManager[object]:
        """The lease, unless this object holds it already."""
        return nullcontext() if self._lease is not None and self._lease.held else self.lease(owner)

    def _check_exists(self, number: int) -> None:
        if not self.store.exists(_manifest(number)):
            numbers = _listed(self._numbers())
            raise RegistryError(f"version {number} was deleted meanwhile; {self.store.root} has {numbers}")

    def _number(self, which: int | str) -> int:
        if isinstance(which, int) or which.isdecimal():
            return int(which)
        if which not in ALIASES:
            raise RegistryError(f"a version is named by its number or one of {', '.join(ALIASES)}, got {which!r}")
        aliases = self.aliases
        if which not in aliases:
            raise RegistryError(
                f"{self.store.root} has no {which} version: name one by its number, of {_listed(self._numbers())}"
            )
        return aliases[which]

    def _parsed(self, number: int, content: bytes) -> Version:
        """The version that a manifest describes, if it is the manifest of this number."""
        address = self.store.address(_manifest(number))
        try:
            manifest = Manifest.from_json(content)
            if manifest.version != number:
                raise ValueError(f"it is of version {manifest.version}, not {number}")
        except FormatError as error:
            raise RegistryError(f"{address} {error}: use the evertune that wrote it, or a newer one") from None
        except ValueError as error:
            raise RegistryError(f"{address} is damaged or cut short ({error}): restore it from a backup") from None
        return Version(manifest, self.store)

    def _state(self) -> _State:
        """The content of ``aliases.json``."""
        address = self.store.address(_ALIASES)
        repair = (
            f"Restore it from a backup, or make a new one with `evertune registry promote {self.store.root} N --force`"
        )
        content = self.store.read_all([_ALIASES]).get(_ALIASES)
        if content is None:
            if self.next_number() > 1:
                raise RegistryError(f"{address} is missing, though there are versions. {repair}")
            return _State()
        try:
            return _State.parse(content)
        except ValueError as error:
            raise RegistryError(f"{address} is damaged or cut short ({error}). {repair}") from None

    @contextmanager
    def _changing(self, repair: bool = False) -> Iterator[_State]:
        """The aliases, to be changed: read, compared and replaced while no other process does the same."""
        with self.store.locked():
            self.check_lease()
            try:
                state = self._state()
            except RegistryError:
                if not repair:
                    raise
                for damaged in self.store.read_all([_ALIASES]).values():
                    self.store.write(f"{_ALIASES}.damaged", damaged)
                state = _State()
            before = state.encoded()
            yield state
            if state.encoded() != before:
                self.store.write(_ALIASES, state.encoded())

    def _inspect(self, number: int, hashes: bool = True, check: _SliceCheck | None = None) -> list[Finding]:
        """The defects of one version; without ``hashes``, only those that show without reading its files."""
        folder, findings = _folder(number), []

        def find(words: str, usable: bool = False) -> None:
            findings.append(Finding(number, words, usable))

        try:
            manifest = self.version(number).manifest
            Manifest.check_seal(self.store.read(_manifest(number)))
        except RegistryError as error:
            return [Finding(number, str(error), False)]
        except ValueError as error:
            find(f"{_manifest(number)} is damaged: {error}")
        there = self.store.sizes(folder)
        for name, digest in manifest.files.items():
            if name not in there:
                find(f"{folder}/{name} is missing")
            elif hashes and self.store.sha256(f"{folder}/{name}") != digest:
                find(f"{folder}/{name} is damaged or cut short: its sha256 is not the manifest's")
        for name in sorted(there.keys() - manifest.files.keys() - {MANIFEST}):
            find(f"{folder}/{name} is not in the manifest: it was added later")
        if hashes:
            for words in (check or _SliceCheck(self.store)).problems(manifest):
                find(f"{words}: no update can start from this version", usable=True)
        return findings


class _SliceCheck:
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


def _folder(number: int) -> str:
    return f"{_VERSIONS}/{number}"


def _manifest(number: int) -> str:
    return f"{_VERSIONS}/{number}/{MANIFEST}"


def _listed(numbers: Sequence[int]) -> str:
    """The newest version numbers, for a message."""
    if not numbers:
        return "none"
    shown = ", ".join(str(number) for number in numbers[-10:])
    return f"..., {shown}" if len(numbers) > 10 else shown


def _summary(version: Version) -> str:
    return (version.manifest.summary or "the gate gave no reason").rstrip(".")


def _event(action: str, old: int | None, new: int, reason: str, by: str | None) -> dict[str, Any]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "action": action,
        "from": old,
        "to": new,
        "reason": reason,
        "by": by or _who(),
    }


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no entry in /etc/passwd
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names.

    Example:
        >>> _flat({"trainer": {"devices": 2}, "seed": 0})
        {'trainer.devices': 2, 'seed': 0}
    """
    if not isinstance(value, Mapping):
        return {prefix: value} if prefix else {}
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    return flat


def _changes(a: Any, b: Any, all_of_them: bool = False) -> dict[str, list[Any]]:
    """The pairs of values that differ, by name."""
    first, second = _flat(a), _flat(b)
    pairs = {name: [first.get(name), second.get(name)] for name in dict.fromkeys((*first, *second))}
    return {name: pair for name, pair in pairs.items() if all_of_them or pair[0] != pair[1]}
