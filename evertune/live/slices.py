"""The records that are held out of training, on which every later version is judged."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evertune.registry.slice_index import FOLDER, SliceEntry
from evertune.registry.store import Store
from evertune.sources.base import Row
from evertune.utils.typed_json import decode, foreign

PSEUDO = "pseudo_label"
"""The field that is true in a record whose label a model has given; no version is judged on it."""
REVIEWED = "reviewed"
"""The field that is true in a record whose label a person has given after a version was unsure of it; such labels are
not taken for wrong ones."""


def is_declared(mark: str, schema: Mapping[str, Any]) -> bool:
    """Whether records keep :data:`PSEUDO` or :data:`REVIEWED` under a schema, which drops fields it does not declare.

    Args:
        mark: Name of the field.
        schema: Settings of the schema, as they stand in the configuration of a version.
    """
    return "model" in schema or mark in schema.get("fields", {})


def draw(row: Row) -> str:
    """A number in [0, 1), in hexadecimal, that depends only on the record's id: the records with the lowest are held
    out."""
    return hashlib.blake2b(row["id"].encode(), digest_size=16, person=b"held out").hexdigest()


def hold_out(
    rows: Sequence[Row],
    label: str | None,
    share: float,
    at_most: int,
    names: Callable[[Any], Any] = lambda label: label,
) -> tuple[list[Row], list[Row]]:
    """Split records into those to train on and those to hold out, in the same way in every attempt.

    The share applies to each class. Fractions lost to rounding are carried over to the next classes, and at least one
    record of each class is trained on. Records whose label a model has given (:data:`PSEUDO`) are all trained on.

    Args:
        rows: All records of an update.
        label: Name of the field with the label; None without labels.
        share: Share of each class to hold out, between 0 and 1.
        at_most: Maximum number of records to hold out in all; the share of every class is reduced alike.
        names: Function that returns the classes of a label. Without classes, all labels are treated alike.

    Returns:
        The records to train on and those held out, each in the order of ``rows``.
    """
    classes: defaultdict[str, list[Row]] = defaultdict(list)
    for row in (row for row in rows if not row["record"].get(PSEUDO)):
        classes[json.dumps(names(None if label is None else row["record"].get(label)))].append(row)
    share = min(share, at_most / len(rows)) if rows else share
    held: set[str] = set()
    due = 0.0
    for _, members in sorted(classes.items()):
        # The running total carries fractions over, so that rounding does not starve small classes. The 1e-9 absorbs
        # rounding errors of the sum, such as 0.9999999999999999 for ten times 0.1.
        due += share * len(members)
        chosen = sorted(members, key=draw)[: min(int(due + 1e-9) - len(held), len(members) - 1)]
        held.update(row["id"] for row in chosen)
    return [row for row in rows if row["id"] not in held], [row for row in rows if row["id"] in held]


def sent_again(
    rows: Sequence[Row], before: Mapping[str, Sequence[Row]], id: str | None
) -> tuple[list[Row], list[Row], list[Row]]:
    """Find the records that an earlier update has held out, and that have been sent again.

    A record is recognised by its id; without one, by its content.

    Args:
        rows: All records of an update.
        before: The records held out of earlier updates, by the name of their slice.
        id: Name of the field with the id, as in the schema.

    Returns:
        The other records; those with an id that was held out, but another content; and those with the same content, or
        a label that a model has given, each with a ``reason``. Neither of the latter two may be trained on.
    """
    held = {_identity(row, id): (name, row) for name, slice in before.items() for row in slice}
    new: list[Row] = []
    changed: list[Row] = []
    same: list[Row] = []
    for row in rows:
        name, older = held.get(_identity(row, id), ("", None))
        if older is None:
            new.append(row)
        elif row["record"] != older["record"] and not row["record"].get(PSEUDO):
            changed.append(row)
        else:
            same.append({**row, "reason": f"sent again, and held out already ({name})"})
    return new, changed, same


def _identity(row: Row, id: str | None) -> str:
    if id is not None and row["record"].get(id) is not None:
        return f"id {row['id']}"
    return hashlib.sha256(json.dumps(row["record"], sort_keys=True).encode()).hexdigest()


def thin(slices: dict[str, list[Row]], budget: int) -> dict[str, list[Row]]:
    """Shorten slices, longest first, to ``budget`` records in all. A smaller budget keeps a subset of a larger one."""
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
        ValueError: If the file is damaged or truncated.
    """
    content = store.read(entry.file)
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise ValueError(f"{entry.file} is damaged or cut short: it does not match its sha256 in the manifest")
    with foreign(store.address(entry.file)):
        return [{**decode(line, surrogates=True)} for line in content.split(b"\n") if line]
