"""Takes in the records that have arrived: they are masked, checked, joined with their labels, and written to the
journal."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evertune.registry.journal import Journal
from evertune.registry.reasons import Reason, Reasons
from evertune.registry.segments import Segment
from evertune.sources.base import Incoming, Offset, Row, Source, SourceError
from evertune.sources.labels import Half, LabelJoin
from evertune.sources.masking import Masker
from evertune.sources.schema import RecordSchema, id_value
from evertune.sources.size import MOST_CHARACTERS, check_size

_MAX_REASON = 500  # characters


@dataclass(frozen=True, kw_only=True)
class IntakeReport:
    """The counts of one intake.

    Args:
        read: Number of records read from the source.
        good: Number of records written to the journal, including those that had been waiting for their label.
        bad: Number of records that were unreadable or did not fit the schema.
        superseded: Number of records that a newer one with the same id has replaced.
        expired: Number of texts or labels whose other half did not arrive in time.
        waiting: Number of texts and labels that are waiting for their other half now.
        segments: Number of segments written.
        seconds: Duration of the intake in seconds.
        reasons: Why records went to quarantine, the commonest reason first.
        words: The same as a message: how many of how many, the commonest reasons with an example, and where they are.
            Empty if none did.
        labels: Names of the classes in the records written to the journal, in order of appearance.
    """

    read: int
    good: int
    bad: int
    superseded: int
    expired: int
    waiting: int
    segments: int
    seconds: float
    reasons: Sequence[Reason] = ()
    words: str = ""
    labels: Sequence[str] = ()

    @property
    def bad_share(self) -> float:
        """Share of bad records among those read; 0 if none were read."""
        return self.bad / self.read if self.read else 0.0


class Intake:
    """Moves the records that have arrived from a source into the journal.

    Each record is masked first, then checked, then joined with its label if labels arrive separately. One of more than
    4,194,304 characters is refused before it is masked, whatever its source. Afterwards a record is in exactly one
    place: in the journal, in quarantine with the reason, or among the halves that wait. Nothing reaches the disk
    unmasked. Of several records with the same id in a chunk, the newest counts; across chunks,
    :func:`~evertune.registry.rows.latest` decides.

    A chunk becomes a segment of the journal, whole or not at all, together with the offset at which the next one
    starts. An intake can therefore be killed at any moment: the next one reads the same records again, with the same
    result.

    Args:
        source: Source of the records.
        schema: What the records must look like.
        journal: Journal that the records are written to.
        masker: Removes personal data; None masks nothing. An id that contains personal data is replaced by a hash.
        label_join: Joins labels that arrive separately from their texts; None makes a record without a label bad.
        chunk_size: Number of records read at a time: the most that are held in memory, and that are read again after a
            crash. Default: 10,000.

    Raises:
        ValueError: If ``label_join`` joins by other fields than the id and label of the schema, or ``chunk_size`` is
            not positive.

    Example::

        intake = Intake(FolderSource("tickets/"), RecordSchema(id="id"), Journal(Store("registry")), PatternMasker())
        report = intake.run()
        print(f"{report.good} records, {report.bad_share:.1%} bad")
    """

    def __init__(
        self,
        source: Source,
        schema: RecordSchema,
        journal: Journal,
        masker: Masker | None = None,
        label_join: LabelJoin | None = None,
        chunk_size: int = 10_000,
    ) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be positive, got {chunk_size}")
        if label_join is not None and (label_join.id, label_join.label) != (schema.id, schema.label):
            raise ValueError(
                f"the labels are joined by id={label_join.id!r} as label={label_join.label!r}, but the schema has "
                f"id={schema.id!r} and label={schema.label!r}: name the same fields in both"
            )
        if label_join is not None:
            label_join.zone = schema.zone
        self.source, self.schema, self.journal = source, schema, journal
        self.masker, self.label_join, self.chunk_size = masker, label_join, chunk_size

    def run(self, limit: int | None = None, start: Offset | None = None) -> IntakeReport:
        """Read until there is nothing new.

        Args:
            limit: Maximum number of records to read; None for all.
            start: Offset to start from if the journal is empty; None for the beginning of the source.

        Raises:
            SourceError: If the source cannot be read further. The segments written before are kept.
            OSError: If the journal cannot be written. The segments written before are kept.
        """
        began = time.perf_counter()
        last, waiting = self._restored()
        offset = self.journal.offset(last) if last is not None else start
        reasons = Reasons()
        labels: dict[str, None] = {}
        read = good = segments = 0
        while limit is None or read < limit:
            size = self.chunk_size if limit is None else min(self.chunk_size, limit - read)
            chunk = self.source.read(offset, size)
            # A source that does not advance would be read again and again, without end.
            if chunk.records and chunk.offset == offset:
                raise SourceError(f"{type(self.source).__name__} gave records but did not move its offset {offset}")
            batch = self._batch(chunk.records, orphans=waiting)
            if not (chunk.records or batch.bad) and chunk.offset == offset:
                break
            # Written even without records: the offset has moved, or halves that waited were given up.
            self.journal.append(
                list(batch.rows.values()),
                batch.bad,
                waiting=self.label_join.waiting if self.label_join is not None else [],
                offset=chunk.offset,
                read=len(chunk.records),
                clock=self.label_join.clock if self.label_join is not None else None,
            )
            waiting = []
            offset = chunk.offset
            read += len(chunk.records)
            good += len(batch.rows)
            segments += 1
            reasons.add(batch.bad)
            if self.schema.label is not None:
                for row in batch.rows.values():
                    labels.update(dict.fromkeys(self.schema.label_names(row["record"][self.schema.label])))
            if not chunk.records:
                break
        kinds = Counter[str]()
        for reason in reasons.all:
            kinds[reason.kind] += reason.count
        return IntakeReport(
            read=read,
            good=good,
            bad=kinds["unreadable"] + kinds["refused"],
            superseded=kinds["superseded"],
            expired=kinds["expired"],
            waiting=len(self.label_join.waiting) if self.label_join is not None else 0,
            segments=segments,
            seconds=time.perf_counter() - began,
            reasons=reasons.all,
            words=reasons.report(read, self.journal.store.root),
            labels=list(labels),
        )

    def retry(self, quarantined: Mapping[str, Row]) -> tuple[list[str], dict[str, str]]:
        """Check records in quarantine again; those that are good now are pending in a new segment.

        They leave the quarantine in the same instant, and no longer count as bad. The others stay, with their old
        reason.

        Args:
            quarantined: Rows of the quarantine by their references, see
                :meth:`~evertune.registry.journal.Journal.references`.

        Returns:
            The references of those that have left the quarantine, and the reasons of the others by reference.

        Raises:
            OSError: If the journal cannot be written.
        """
        last, _ = self._restored()
        newest: dict[str, tuple[int, str]] = {}
        if self.schema.id is not None:
            for row in self.journal.records(self.journal.segments(), numbered=True):
                newest[row["id"]] = row["segment"], row["origin"]
        released: list[str] = []
        reasons: dict[str, str] = {}
        good = _Batch()
        for reference, row in quarantined.items():
            newer = newest.get(row.get("id", ""))
            value = _read_again(row)
            if value is None:
                reasons[reference] = "only the text that was read is there, and it is not a record"
            elif newer is not None and isinstance(row["segment"], int) and newer[0] >= row["segment"]:
                reasons[reference] = f"superseded by {newer[1]}"
            elif not reference.partition(":")[0].isdecimal():  # it was good once, and is kept in that form
                try:
                    record = self.schema.check_again(value)
                    good.add({"id": row["id"], "origin": row["origin"], "record": record})
                    released.append(reference)
                except ValueError as error:
                    reasons[reference] = str(error)
            else:
                part = self._batch([Incoming(row["origin"], value)], orphans=[])
                refused = [one["reason"] for one in part.bad if one["kind"] in ("refused", "unreadable")]
                good.bad += [one for one in part.bad if one["kind"] not in ("refused", "unreadable")]
                if refused:
                    reasons[reference] = refused[0]
                    continue
                released.append(reference)
                for one in part.rows.values():
                    good.add(one)
        if released:
            join = self.label_join
            self.journal.append(
                list(good.rows.values()),
                good.bad,
                waiting=join.waiting if join is not None else self.journal.waiting(),
                offset=self.journal.offset(last),
                read=0,
                clock=join.clock if join is not None else last.clock if last is not None else None,
                released=released,
            )
        return released, reasons

    def _restored(self) -> tuple[Segment | None, list[dict[str, Any]]]:
        """The last segment, and the halves that still wait although labels are no longer joined."""
        last, waiting = self.journal.last, self.journal.waiting()
        if self.label_join is None:
            return last, waiting
        self.label_join.restore(waiting, last.clock if last is not None else None)
        return last, []

    def _batch(self, records: Sequence[Incoming], orphans: Sequence[Mapping[str, Any]]) -> _Batch:
        """Sort the records of a chunk, and the halves that still wait although labels are no longer joined."""
        batch = _Batch()
        for half in orphans:
            missing = "label" if half["has_text"] else "text"
            reason = f"it waited for its {missing}, and labels are no longer joined"
            batch.put_aside("expired", reason, half["origin"], half["value"], id=half["id"])
        for incoming in records:
            origin = _printable(incoming.origin)
            if incoming.value is None:
                self._put_aside_unreadable(batch, origin, incoming)
                continue
            try:
                check_size(incoming.value)
            except ValueError as error:
                batch.put_aside("refused", f"{error}: it is left out here", origin, "")
                continue
            try:
                value = self._masked(incoming.value)
            except (ValueError, RecursionError) as error:
                # The value must not appear anywhere: it may contain personal data that was not recognised.
                reason = f"personal data in it could not be masked ({type(error).__name__}): it is left out here"
                batch.put_aside("refused", reason, origin, "")
                continue
            try:
                self._sort_in(batch, origin, value)
            except ValueError as error:
                batch.put_aside("refused", str(error), origin, value, id=self._id(value))
        if self.label_join is not None:
            for gone in self.label_join.given_up():
                kind = "superseded" if gone.superseded else "expired"
                batch.put_aside(kind, gone.reason, gone.half.origin, gone.half.value, id=gone.half.id)
        return batch

    def _put_aside_unreadable(self, batch: _Batch, origin: str, incoming: Incoming) -> None:
        reason, raw = incoming.error or "it cannot be read", incoming.raw
        if len(raw) > MOST_CHARACTERS:
            reason, raw = f"{reason} (its {len(raw):,} characters are left out here)", ""
        if self.masker is not None:
            try:
                reason, raw = self.masker.mask(reason), self.masker.mask(raw)
            except ValueError:
                reason, raw = "it cannot be read, and personal data in it could not be masked: it is left out here", ""
        batch.put_aside("unreadable", reason, origin, raw)

    def _masked(self, value: Mapping[str, Any]) -> Mapping[str, Any]:
        masker, schema = self.masker, self.schema
        if masker is None:
            return value
        # Names of declared fields are known to be harmless; any other key is data and may itself be personal.
        masked = {
            key if key in schema.known_keys else masker.mask(str(key)): masker.mask_value(part)
            for key, part in value.items()
        }
        if schema.id is not None:
            for key in schema.arrives_as[schema.id]:  # else two people with masked ids would become one record
                if key in masked and masked[key] != value[key] and isinstance(value[key], (str, int)):
                    masked[key] = masker.mask_id(str(value[key]))
        return masked

    def _sort_in(self, batch: _Batch, origin: str, value: Mapping[str, Any]) -> None:
        """Add a record to the batch, or let it wait for its label or text; raises ValueError if it is bad."""
        schema, join = self.schema, self.label_join
        if join is None or (schema.has_label(value) and schema.has_text(value)):
            record = schema.check(value)
            known_by = record[schema.id] if schema.id is not None else None
            id = origin if known_by is None else known_by
            if join is not None:
                join.passed(id, origin, value)
            batch.add({"id": id, "origin": origin, "record": record})
            return
        assert schema.id is not None
        if not (schema.has_text(value) or schema.has_label(value)):
            raise ValueError(f"it has neither text nor label{schema.instead(value)}")
        try:
            id = id_value(schema.get(value, schema.id))
        except ValueError as error:
            raise ValueError(f"field {schema.id!r}, by which text and label find each other: {error}") from None
        pair = join.add(Half(id, origin, schema.check_half(value), schema.has_text(value)))
        if pair is None:
            return
        text, label = pair
        # The text's fields win, except empty ones: a text may carry a null in the place of its label.
        whole = label.value | {key: part for key, part in text.value.items() if part is not None}
        origins = {"origin": text.origin, "label_origin": label.origin}
        try:
            batch.add({"id": id, **origins, "record": schema.check(whole)})
        except ValueError as error:
            batch.put_aside("refused", str(error), value=whole, id=id, **origins)

    def _id(self, value: Mapping[str, Any]) -> str | None:
        """The id of a bad record, if at least the id is good."""
        try:
            return None if self.schema.id is None else id_value(self.schema.get(value, self.schema.id))
        except ValueError:
            return None


class _Batch:
    """The good and bad records of one chunk."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.bad: list[Row] = []

    def add(self, row: Row) -> None:
        older = self.rows.pop(row["id"], None)
        if older is not None:
            self.bad.append({**older, "kind": "superseded", "reason": f"superseded by {row['origin']}"})
        self.rows[row["id"]] = row

    def put_aside(
        self,
        kind: str,
        reason: str,
        origin: str,
        value: Mapping[str, Any] | str,
        id: str | None = None,
        **more: str,
    ) -> None:
        row: Row = {} if id is None else {"id": id}
        row |= {"origin": origin, **more, "kind": kind, "reason": _short(reason)}
        self.bad.append({**row, **_content(value)})


def _content(value: Mapping[str, Any] | str) -> Row:
    """What was read, for the quarantine: as a record if it can be written as JSON, else as text."""
    if isinstance(value, str):
        return {"raw": value}
    try:
        json.dumps(value, allow_nan=False)
        return {"record": value}
    except (TypeError, ValueError, RecursionError):
        pass
    try:
        return {"raw": json.dumps(value, default=str, skipkeys=True, ensure_ascii=False)}
    except (ValueError, RecursionError):
        return {"raw": ""}


def _read_again(row: Row) -> dict[str, Any] | None:
    """The record in a row of the quarantine; None if it holds none."""
    value = row.get("record")
    if value is None:
        try:
            value = json.loads(row.get("raw", ""))
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def _short(text: str) -> str:
    return text if len(text) <= _MAX_REASON else text[: _MAX_REASON - 1] + "…"


def _printable(origin: str) -> str:
    """An origin that can be written as text, whatever bytes the name of a file contains."""
    return origin if origin.isascii() else origin.encode(errors="backslashreplace").decode()
