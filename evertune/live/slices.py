"""The records that are held out of training, and every later version is judged on."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from evertune.registry.manifest import SliceEntry
from evertune.registry.store import Store
from evertune.sources.base import Row

FOLDER = "slices"


def draw(row: Row) -> str:
    """A number in [0, 1) in hexadecimal that depends on the record's id alone: the lowest are held out."""
    return hashlib.blake2b(row["id"].encode(), digest_size=16, person=b"held out").hexdigest()


def hold_out(
    rows: Sequence[Row],
    label: str,
    share: float,
    at_most: int,
    names: Callable[[Any], Any] = lambda label: label,
) -> tuple[list[Row], list[Row]]:
    """Split records into those to train on and those to hold out, the same way at every attempt.

    The share is taken of each class; what rounding leaves over goes to the next classes, and of each class at least
    one record is trained on.

    Args:
        rows: all records of an update.
        label: the field with the label.
        share: of each class, between 0 and 1.
        at_most: how many are held out in all, all classes shortened alike.
        names: gives the classes of a label; those of a task without classes are all alike.

    Returns:
        The records to train on and those held out, each in the order of ``rows``.
    """
    classes: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        classes[json.dumps(names(row["record"].get(label)))].append(row)
    share = min(share, at_most / len(rows)) if rows else share
    held: set[str] = set()
    due = 0.0
    for _, members in sorted(classes.items()):
        due += share * len(members)
        chosen = sorted(members, key=draw)[: min(int(due + 1e-9) - len(held), len(members) - 1)]
        held.update(row["id"] for row in chosen)
    return [row for row in rows if row["id"] not in held], [row for row in rows if row["id"] in held]


def thin(slices: dict[str, list[Row]], budget: int) -> dict[str, list[Row]]:
    """Shorten slices, the longest first, to ``budget`` records in all; what is left is always a part of what was."""
    longest = max((len(rows) for rows in slices.values()), default=0)
    while longest > 1 and sum(min(len(rows), longest) for rows in slices.values()) > budget:
        longest -= 1
    return {name: sorted(rows, key=draw)[:longest] for name, rows in slices.items()}


def save_slice(store: Store, name: str, rows: Sequence[Row]) -> SliceEntry:
    """Write a slice under a name derived from its content; returns its entry for a manifest."""
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    digest = hashlib.sha256(content).hexdigest()
    file = f"{FOLDER}/{name}-{digest[:16]}.jsonl"
    if not store.exists(file):
        store.write(file, content)
    return SliceEntry(name, file, len(rows), digest)


def load_slice(store: Store, entry: SliceEntry) -> list[Row]:
    """Read a slice by its entry in a manifest.

    Raises:
        ValueError: when the file is damaged or cut short.
    """
    content = store.read(entry.file)
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise ValueError(f"{entry.file} is damaged or cut short: it does not match its sha256 in the manifest")
    return [json.loads(line) for line in content.splitlines()]
