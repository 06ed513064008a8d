"""The index of slices: every slice once, and every version's list of them named by a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from evertune.registry.store import Store
from evertune.utils.typed_json import read_json

FOLDER = "slices"
INDEX = f"{FOLDER}/index.jsonl"


@dataclass(frozen=True)
class SliceEntry:
    """The file with the records held out of one update.

    Args:
        name: Name of the experience that they were held out of.
        file: Name of the file in the registry.
        examples: Number of records in the file.
        sha256: SHA-256 of the file, in hexadecimal.
    """

    name: str
    file: str
    examples: int
    sha256: str


@dataclass(frozen=True)
class _Line(SliceEntry):
    """A list of slices: the one that it extends, named by its digest, and one more slice."""

    after: str | None

    @property
    def entry(self) -> SliceEntry:
        return SliceEntry(self.name, self.file, self.examples, self.sha256)


class SliceIndex:
    """The lists of slices of all versions, which share their beginnings.

    Each line of the file holds a slice and, as ``after``, the digest of the list that it extends; its own SHA-256 is
    the digest of the extended list. A version's whole list therefore follows from one digest, which also proves it, and
    a new version adds one line. Lines are only added: 1,000 versions need 250 kB. A damaged line is found by its
    SHA-256, and harms only the lists that it is part of.

    Args:
        content: Content of the file.
        address: Address of the file, for messages.

    Example:
        >>> index = SliceIndex()
        >>> first, second = (SliceEntry(name, f"slices/{name}-0000.jsonl", 20, "0000") for name in ("a", "b"))
        >>> one, two = index.add([first]), index.add([first, second])
        >>> index.entries(two) == [first, second], len(index.content.splitlines())
        (True, 2)
    """

    def __init__(self, content: bytes = b"", address: str = INDEX) -> None:
        self.address = address
        self.content = content
        """Content of the file, with what was added."""
        self._lines = {_digest(line): line for line in content.split(b"\n") if line}
        self._parsed: dict[str, _Line] = {}

    @classmethod
    def read(cls, store: Store) -> SliceIndex:
        """The index of a registry; empty if there is none."""
        return cls(store.read_all([INDEX]).get(INDEX, b""), store.address(INDEX))

    def entries(self, digest: str | None) -> list[SliceEntry]:
        """The list of slices that a digest names, oldest first; None names the empty list.

        Raises:
            ValueError: If a line of it is missing or damaged.
        """
        entries: list[SliceEntry] = []
        while digest is not None:
            try:
                line = self._line(digest)
            except ValueError as error:
                raise ValueError(self._damaged(str(error))) from None
            entries.append(line.entry)
            digest = line.after
        return entries[::-1]

    def add(self, entries: Iterable[SliceEntry]) -> str | None:
        """Add a list of slices, where it is not there yet, and return the digest that names it; None if it is empty."""
        digest: str | None = None
        for entry in entries:
            line = _encoded(entry, digest)
            digest = _digest(line)
            if digest not in self._lines:
                self._append(line)
        return digest

    def has(self, digest: str | None) -> bool:
        """Whether the whole list that a digest names is there."""
        with suppress(ValueError):
            self.entries(digest)
            return True
        return False

    def problems(self) -> Iterator[str]:
        """What is wrong with the file, as messages; a list that a manifest names may be missing all the same."""
        if self.content and not self.content.endswith(b"\n"):
            yield self._damaged("it is cut short")
        for place, digest in enumerate(self._lines, start=1):
            try:
                after = self._line(digest).after
            except ValueError as error:
                yield self._damaged(f"line {place}: {error}")
            else:
                if after is not None and after not in self._lines:
                    yield self._damaged(f"line {place} extends a list that is missing")

    def restored(self, digests: Iterable[str | None], slices: Sequence[SliceEntry]) -> SliceIndex:
        """An index of the sound lines and of those that can be found again: by trying which of the slices, added to
        which list, gives a digest that is missing.

        Args:
            digests: Digests of lists that must be there.
            slices: The slices that the registry has.
        """
        sound = [digest for digest in self._lines if self._is_sound(digest)]
        index = SliceIndex(b"".join(self._lines[digest] + b"\n" for digest in sound))
        missing = {*digests, *(self._line(digest).after for digest in sound)} - {None, *sound}
        lists: list[str | None] = [None, *sound]
        while missing and lists:
            after = lists.pop()
            for entry in slices:
                line = _encoded(entry, after)
                if (digest := _digest(line)) in missing:
                    index._append(line)
                    missing.remove(digest)
                    lists.append(digest)
        return index

    def _damaged(self, words: str) -> str:
        return (
            f"{self.address} is damaged ({words}): `evertune registry repair` restores what follows from the slices, a "
            "backup the rest"
        )

    def _append(self, line: bytes) -> None:
        cut_short = bool(self.content) and not self.content.endswith(b"\n")
        self.content += b"\n" * cut_short + line + b"\n"
        self._lines[_digest(line)] = line

    def _line(self, digest: str) -> _Line:
        if digest not in self._parsed:
            if digest not in self._lines:
                raise ValueError(f"it lacks the list of slices {digest[:16]}")
            self._parsed[digest] = read_json(_Line, self._lines[digest])
        return self._parsed[digest]

    def _is_sound(self, digest: str) -> bool:
        with suppress(ValueError):
            return bool(self._line(digest))
        return False


def repair(store: Store, digests: Iterable[str | None], check_lease: Callable[[], None] = lambda: None) -> list[str]:
    """Set a damaged index aside and write a sound one, with the lost lines that the slices give again.

    Args:
        store: Store of the registry, whose lease the caller holds.
        digests: Digests of the lists of all versions.
        check_lease: Raises if this process has lost the lease.

    Returns:
        What was done, as messages; empty if nothing is damaged, or if nothing can be restored.
    """
    index, digests = SliceIndex.read(store), set(digests)
    if not any(index.problems()) and all(index.has(digest) for digest in digests):
        return []
    restored = index.restored(digests, list(_slices(store)))
    if restored.content == index.content:
        return []
    with store.locked():
        check_lease()
        if index.content:
            store.write(f"damaged/slices-index-{_digest(index.content)[:8]}.jsonl", index.content)
        store.write(INDEX, restored.content)
    lost = sum(not restored.has(digest) for digest in digests)
    return [f"{INDEX} is set aside and written again; {lost or 'no'} versions lack their list of slices"]


def _slices(store: Store) -> Iterator[SliceEntry]:
    """The slices of a registry as the index names them."""
    for name in store.list(FOLDER):
        if name != INDEX.rpartition("/")[2]:
            content = store.read(f"{FOLDER}/{name}")
            experience = name.removesuffix(".jsonl").rpartition("-")[0]
            yield SliceEntry(experience, f"{FOLDER}/{name}", content.count(b"\n"), _digest(content))


def _encoded(entry: SliceEntry, after: str | None) -> bytes:
    return json.dumps({**asdict(entry), "after": after}, separators=(",", ":")).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
