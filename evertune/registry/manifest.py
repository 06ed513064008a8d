"""The manifest of a version, as a typed object and as the file ``manifest.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Literal

from evertune.utils.typed_json import check_seal, decode, from_json, sealed, to_json

FORMAT = 1

Kind = Literal["first", "update", "rebuild", "distillation", "imprinting"]

_CHECKED_ELSEWHERE = ("version", "parent")
"""Entries that the digest of a manifest leaves out, as the version's folder and its parent's existence show them."""
_WRITTEN_ALWAYS = ("version", "created", "files")


@dataclass(frozen=True)
class VerdictSummary:
    """The decision of the gate. The whole verdict is in the version's ``verdict.json``.

    Args:
        passed: Whether the version may go into production.
        summary: The reason, as a message.
    """

    passed: bool
    summary: str = ""


@dataclass(frozen=True)
class Metrics:
    """Measurements on held-out records.

    Args:
        accuracy: Accuracy on each slice by its name; for a task without classes, the mean score.
        average_accuracy: Mean over the slices.
        base: What a language model can do that no update trains: ``loss`` on general texts in nats per token, and
            ``skills``, the share of right probes, where the gate has been given any.
    """

    accuracy: dict[str, float | None] = field(default_factory=dict)
    average_accuracy: float | None = None
    base: dict[str, float | None] = field(default_factory=dict)

    def change_from(self, other: Metrics) -> float | None:
        """Mean difference to other measurements over the slices of both: like with like; None if there are none.

        The averages themselves cannot be compared if one of them covers a slice that the other does not.

        Example:
            >>> before, now = Metrics({"a": 0.75}, 0.75), Metrics({"a": 0.875, "b": 0.5}, 0.6875)
            >>> now.change_from(before)
            0.125
        """
        pairs = [(value, other.accuracy.get(name)) for name, value in self.accuracy.items()]
        changes = [now - before for now, before in pairs if now is not None and before is not None]
        return sum(changes) / len(changes) if changes else None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that is known about a version.

    Args:
        version: Number of the version, counted from 1.
        parent: Number of the version that it was trained from; None for the first.
        created: When it was made, with a time zone. Default: now.
        kind: How it was made: ``"first"`` and ``"rebuild"`` start from the pretrained model, ``"update"`` from the
            parent, ``"distillation"`` from some of the layers of its teacher (the parent, or ``teacher``),
            ``"imprinting"`` is the parent with rows of new classes.
        experience: Name of the experience that it learned.
        reason: Why there was an update, as a message.
        consumed: Number of the last segment of the journal that it has learned; 0 for none.
        offset: Offset of the source after that segment.
        module: Name of the module's class.
        classes: Names of the classes that it knows; empty for a task without classes.
        records: Numbers of records by their use: ``train``, ``held_out`` and ``quarantined``; ``sent_again`` of the
            latter two had been held out of an earlier update.
        slices_digest: Digest of the list of held-out records of every experience so far, filled in by
            :meth:`~evertune.registry.Registry.publish`; None if there are none. ``Version.slices`` returns the list.
        verdict: The decision of the gate; None for a version that was never judged.
        metrics: Measurements on held-out records.
        seconds: Duration of each stage of the update in seconds: ``plan``, ``train`` (with its ``fit``) and
            ``evaluate``; and the same time by what it was spent on: ``training``, ``replay``, ``importance``,
            ``evaluation`` and ``other``.
        config: The whole configuration of the update.
        config_digest: Hash of the configuration.
        teacher: Number of the version, in the registry of the teachers, of which this is a student in a registry of its
            own; None for others.
        code: Program that wrote it, with its version.
        files: SHA-256 of every file by its name, filled in by :meth:`~evertune.registry.Registry.publish`.

    Raises:
        ValueError: If the number is not positive, ``created`` has no time zone, or the parent is not an earlier
            version.

    Example:
        >>> manifest = Manifest(version=2, parent=1, verdict=VerdictSummary(False, "it forgets update-1"))
        >>> manifest.passed, manifest.summary
        (False, 'it forgets update-1')
        >>> Manifest.from_json(manifest.to_json()) == manifest
        True
    """

    version: int
    parent: int | None = None
    created: datetime = field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))
    kind: Kind | None = None
    experience: str = ""
    reason: str = ""
    consumed: int = 0
    offset: dict[str, Any] | None = None
    module: str | None = None
    classes: list[str] = field(default_factory=list)
    records: dict[str, int] = field(default_factory=dict)
    slices_digest: str | None = None
    verdict: VerdictSummary | None = None
    metrics: Metrics = field(default_factory=Metrics)
    seconds: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    config_digest: str | None = None
    teacher: int | None = None
    code: str = ""
    files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.version < 1:
            raise ValueError(f"versions are counted from 1, got {self.version}")
        if self.created.tzinfo is None:
            raise ValueError(f"created must have a time zone, got {self.created.isoformat()}")
        if self.parent is not None and not 0 < self.parent < self.version:
            raise ValueError(f"the parent of version {self.version} must be an earlier one, got {self.parent}")

    @property
    def passed(self) -> bool:
        """Whether the gate let the version pass; True for one that was never judged."""
        return self.verdict is None or self.verdict.passed

    @property
    def summary(self) -> str:
        """Why the gate let the version pass or refused it; empty for one that was never judged."""
        return "" if self.verdict is None else self.verdict.summary

    def to_dict(self) -> dict[str, Any]:
        """The content of the file: JSON values only, with null for numbers that are not finite, and a digest."""
        return sealed({"format": FORMAT, **to_json(self)}, _CHECKED_ELSEWHERE)

    def to_json(self) -> bytes:
        """The content of the file as bytes."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Manifest:
        """Parse the file.

        Fields that this version of evertune does not know are ignored.

        Raises:
            ValueError: If the file is not JSON, has another format, or a field is missing or has the wrong type. The
                message names the field.
        """
        values = decode(content)
        if not isinstance(values, dict) or "format" not in values:
            raise ValueError("'format' is missing")
        if values["format"] != FORMAT:
            raise FormatError(values["format"])
        for name in _WRITTEN_ALWAYS:
            if name not in values:
                raise ValueError(f"{name!r} is missing")
        return from_json(cls, values)

    @staticmethod
    def check_seal(content: bytes) -> None:
        """Make sure that a manifest was not changed after it was written, where it has the digest to tell.

        Raises:
            ValueError: If it was.
        """
        known = {entry.name for entry in fields(Manifest)} | {"format"}
        check_seal(decode(content), known, _CHECKED_ELSEWHERE)


class FormatError(ValueError):
    """The manifest was written by an evertune with another manifest format."""

    def __init__(self, found: Any) -> None:
        super().__init__(f"is of format {found!r}, and this evertune reads format {FORMAT}")
        self.found = found
