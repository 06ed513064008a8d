"""The registry: numbered versions that never change, and a small file that names the one in production."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import EllipsisType
from typing import Any

from evertune.registry.aliases import ALIASES, AliasFile, GivenUp, event
from evertune.registry.differences import differences
from evertune.registry.garbage import Garbage, find_garbage
from evertune.registry.inspection import Finding, SliceCheck, inspect_version
from evertune.registry.journal import Journal
from evertune.registry.lease import Lease, LeaseHeld, LeaseLost
from evertune.registry.manifest import FormatError, Manifest
from evertune.registry.repair import damage, repair
from evertune.registry.slice_index import INDEX, SliceEntry, SliceIndex
from evertune.registry.slice_index import repair as repair_slices
from evertune.registry.store import MANIFEST, RegistryError, Store
from evertune.registry.version import VERSIONS, Version, manifest_name, version_folder
from evertune.utils.files import sha256, write_atomically
from evertune.utils.notebooks import MAX_ROWS, table
from evertune.utils.shares import percent

__all__ = ["LeaseHeld", "LeaseLost", "Manifest", "Registry", "RegistryError"]


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
        self._aliases = AliasFile(self.store, lambda: self.next_number() > 1, self.check_lease)

    def __repr__(self) -> str:
        return f"Registry({self.store.root!r})"

    def _repr_html_(self) -> str:
        """The newest versions, as a notebook shows them. What cannot be read has a line that says why."""
        versions, damaged = self.survey()
        try:
            aliases, title = self.aliases, self.store.root
        except RegistryError as error:
            aliases, title = {}, str(error)
        rows: list[list[object]] = [[number, *[None] * 5, words] for number, words in damaged.items()]
        for version in versions[-MAX_ROWS:]:
            manifest, number = version.manifest, version.number
            names = " ".join(alias for alias, behind in aliases.items() if behind == number)
            average = percent(manifest.metrics.average_accuracy)
            words = f"{'passed' if version.passed else 'refused'}: {manifest.summary}".rstrip(": ")
            cells = [number, names, f"{version.created:%Y-%m-%d %H:%M}", version.experience]
            rows.append([*cells, manifest.records.get("train"), average, words])
        columns = ["version", "alias", "created", "experience", "records", "accuracy", "verdict"]
        return table(title, columns, sorted(rows, key=lambda row: int(str(row[0]))))

    # --- reading

    def versions(self) -> list[Version]:
        """All versions, oldest first. A version whose manifest is damaged is left out, with a warning.

        Each manifest is read once in the lifetime of this object.
        """
        versions, damaged = self.survey()
        for words in damaged.values():
            warnings.warn(f"left out: {words}", stacklevel=2)
        return versions

    def damaged(self) -> dict[int, str]:
        """Why the manifests of versions cannot be read, by number; empty if all can."""
        return self.survey()[1]

    def survey(self) -> tuple[list[Version], dict[int, str]]:
        """What :meth:`versions` and :meth:`damaged` return, without a warning. Threads may share it."""
        numbers, damaged, before = self._numbers(), dict[int, str](), self._known
        # A version that was deleted is forgotten, since the number of one that was never whole is used again.
        known = {number: before[number] for number in numbers if number in before}
        new = [manifest_name(number) for number in numbers if number not in known]
        for name, content in self.store.read_all(new).items():
            number = int(name.split("/")[1])
            try:
                known[number] = self._parsed(number, content)
            except RegistryError as error:
                damaged[number] = str(error)
        self._known = known
        return [known[number] for number in sorted(known)], damaged

    def version(self, which: int | str) -> Version:
        """A version by its number or an alias.

        Raises:
            RegistryError: If there is no such version, or its manifest is damaged.
        """
        number = self._number(which)
        found = self.store.read_all([manifest_name(number)])
        if not found:
            raise RegistryError(f"{self.store.root} has no version {number}; it has {_listed(self._numbers())}")
        return self._parsed(number, found[manifest_name(number)])

    @property
    def aliases(self) -> dict[str, int]:
        """The number of the version behind each alias that is set.

        Raises:
            RegistryError: If ``aliases.json`` is damaged, or missing although there are versions.
        """
        return dict(self._aliases.read().aliases)

    @property
    def events(self) -> list[dict[str, Any]]:
        """The changes of the aliases, oldest first, at most 200.

        Each has ``time``, ``action`` (``"promote"``, ``"rollback"``, ``"refused"``), ``from``, ``to``, ``reason`` and
        ``by``; a rollback with ``discard`` also has ``discard``, the version whose records must not be learned again.
        """
        return list(self._aliases.read().events)

    @property
    def given_up(self) -> list[GivenUp]:
        """What rollbacks with ``discard`` have given up and no updater has set aside yet, oldest first."""
        return list(self._aliases.read().given_up)

    @property
    def production(self) -> Version | None:
        """The version in production; None until one is promoted."""
        number = self.aliases.get("production")
        return None if number is None else self.version(number)

    def next_number(self) -> int:
        """The number of the version that is published next."""
        numbers = self._numbers()
        while numbers and not self.store.exists(manifest_name(numbers[-1])):
            numbers.pop()  # left by an interrupted publication: the number is used again
        return numbers[-1] + 1 if numbers else 1

    # --- writing

    def lease(self, owner: str | None = None, ttl: float = 60.0, *, inherit: bool = True) -> Lease:
        """The exclusive right to write, as a context manager.

        While it is held, :meth:`publish` and all methods that change an alias check first that it was not lost.

        Args:
            owner: Name of the holder, for the messages that others get.
            ttl: Seconds without a heartbeat after which others may take over. Default: 60.
            inherit: Whether to work under the lease that ``EVERTUNE_LEASE`` names, if it is set. False for another
                registry than that of the parent process.

        Raises:
            LeaseHeld: On entering, if another process is writing.
        """
        lease = Lease(self.store, owner, ttl, inherit=inherit)
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
        if self.store.exists(manifest_name(number)):
            raise RegistryError(f"{self.store.root} has a version {number}, and versions never change")
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
        hashes = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
        content = replace(manifest, files=hashes, slices_digest=SliceIndex().add(slices)).to_json()
        version = self._parsed(number, content)
        write_atomically(folder / MANIFEST, content)
        self._share(folder, version)
        with self.store.locked():
            # Before the first version, so that a missing file later on means damage and not an empty registry.
            self._aliases.create()
            # Before the manifest that needs it; if the process dies in between, the line is there the next time.
            index = SliceIndex.read(self.store)
            before, _ = index.content, index.add(slices)
            if index.content != before:
                self.check_lease()
                self.store.write(INDEX, index.content)
        self.store.publish(folder, version_folder(number))
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

        If the version is in production already, nothing changes. To promote a version again undoes a rollback from it
        with ``discard``, unless an update has set its records aside meanwhile: they then stay in quarantine.

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
        with self._aliases.changing(repair=force) as state:
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
            line = set(self._line(version))
            state.given_up = [one for one in state.given_up if one.version not in line]
            state.events.append(event("promote", now, version.number, reason, by))
        return version

    def set_refused(self, which: int | str, reason: str = "", by: str | None = None) -> Version:
        """Set the alias ``refused`` to a version; the version in production stays.

        Raises:
            RegistryError: If there is no such version, or the lease is lost.
        """
        version = self.version(which)
        with self._aliases.changing() as state:
            self._check_exists(version.number)
            now = state.aliases.get("refused")
            if now != version.number:
                state.aliases["refused"] = version.number
                state.events.append(event("refused", now, version.number, reason, by))
        return version

    def rollback(
        self,
        reason: str = "",
        expected: int | EllipsisType = ...,
        *,
        discard: bool = False,
        by: str | None = None,
    ) -> Version:
        """Put ``previous`` back into production, at once: one small file changes, and nothing is copied or hashed.

        ``previous`` then becomes the version that the new production was trained from, so that a second rollback goes
        one step further back and never forward: to undo a rollback, promote the version by its number. If the parent
        no longer exists, ``previous`` is unset, and another rollback is refused.

        Args:
            reason: The reason, for the events.
            expected: Number of the version that must be in production now, so that a decision that was sent twice goes
                back once. By default not checked.
            discard: Give the records of the abandoned version up, which would be pending otherwise, whatever is
                promoted later. This is only recorded, and the updater moves them to quarantine; see :attr:`given_up`.
            by: Who rolls back, for the events. Default: ``user@host``.

        Returns:
            The version that is in production now.

        Raises:
            RegistryError: If there is no previous version, files of it are missing, or another version than
                ``expected`` is in production. Nothing has changed then.
        """
        with self._aliases.changing() as state:
            now, back = state.aliases.get("production"), state.aliases.get("previous")
            if expected is not ... and expected != now:
                raise RegistryError(f"nothing is rolled back: version {now} is in production by now, not {expected}")
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
            if version.parent is not None and self.store.exists(manifest_name(version.parent)):
                state.aliases["previous"] = version.parent
            if discard:
                state.given_up.append(GivenUp(now, version.manifest.consumed, self._consumed(now)))
            change = event("rollback", now, back, reason, by)
            state.events.append(change | ({"discard": now} if discard else {}))
        return version

    def clear_given_up(self, withdrawn: Sequence[GivenUp]) -> None:
        """Note that the updater has withdrawn what was given up from the journal.

        Raises:
            RegistryError: If the lease is lost.
        """
        if withdrawn:
            with self._aliases.changing() as state:
                state.given_up = [one for one in state.given_up if one not in withdrawn]

    def unlearned(self, version: Version, left: int) -> int:
        """The number of records that another version has learned and this one has not: after a rollback, they are
        pending again.

        Args:
            version: The version that is in production then.
            left: Number of the version that was rolled back from.

        Raises:
            ValueError: If the journal is damaged.
        """
        learned = self._consumed(left)
        if learned is None:  # it was rolled back from because it is damaged
            return 0
        journal = Journal(self.store)
        segments = journal.segments(after=version.manifest.consumed)
        return sum(journal.sizes(segment for segment in segments if segment.number <= learned))

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
        findings, slices = [], SliceCheck(self.store)
        try:
            for alias, number in self.aliases.items():
                if not self.store.exists(manifest_name(number)):
                    findings.append(Finding(None, f"{alias} names version {number}, which does not exist", False))
        except RegistryError as error:
            findings.append(Finding(None, str(error), False))
        for number in self._numbers():
            if self.store.exists(manifest_name(number)):
                findings += self._inspect(number, slices=slices)
        findings += [Finding(None, words, True, "slices") for words in slices.index.problems()]
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
            digests = {version.manifest.slices_digest for version in self.survey()[0]}
            return repair_slices(self.store, digests, self.check_lease) + repair(Journal(self.store, self.check_lease))

    def diff(self, a: int | str, b: int | str) -> dict[str, Any]:
        """The differences between two versions, see :func:`~evertune.registry.differences.differences`."""
        return differences(self.version(a), self.version(b))

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
        whole = list(self.store.read_all([manifest_name(number) for number in numbers]))
        published = [int(name.split("/")[1]) for name in whole]
        retained = sorted({*published[-keep:], *aliases.values()})
        manifests = [self.version(number).manifest for number in retained]

        return list(find_garbage(self.store, numbers, published, manifests, stale_days))

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

    def _numbers(self) -> list[int]:
        return sorted(int(name) for name in self.store.list(VERSIONS) if name.isdecimal() and str(int(name)) == name)

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
        if not self.store.exists(manifest_name(number)):
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

    def _consumed(self, number: int) -> int | None:
        """Number of the last segment that a version has learned; None if its manifest cannot be read."""
        try:
            return self.version(number).manifest.consumed
        except RegistryError:
            return None

    def _line(self, version: Version) -> Iterator[int]:
        """The number of a version and of those that it was trained from, as far as they can be read."""
        yield version.number
        with suppress(RegistryError):
            while version.parent is not None:
                version = self.version(version.parent)
                yield version.number

    def _parsed(self, number: int, content: bytes) -> Version:
        """The version that a manifest describes, if it is the manifest of this number."""
        address = self.store.address(manifest_name(number))
        try:
            manifest = Manifest.from_json(content)
            if manifest.version != number:
                raise ValueError(f"it is of version {manifest.version}, not {number}")
        except FormatError as error:
            raise RegistryError(f"{address} {error}: use the evertune that wrote it, or a newer one") from None
        except ValueError as error:
            raise RegistryError(f"{address} is damaged or cut short ({error}): restore it from a backup") from None
        return Version(manifest, self.store)

    def _inspect(self, number: int, hashes: bool = True, slices: SliceCheck | None = None) -> list[Finding]:
        try:
            return inspect_version(self.version(number), hashes, slices)
        except RegistryError as error:
            return [Finding(number, str(error), False)]


def _listed(numbers: Sequence[int]) -> str:
    """The newest version numbers, for a message."""
    if not numbers:
        return "none"
    shown = ", ".join(str(number) for number in numbers[-10:])
    return f"..., {shown}" if len(numbers) > 10 else shown


def _summary(version: Version) -> str:
    return (version.manifest.summary or "the gate gave no reason").rstrip(".")
