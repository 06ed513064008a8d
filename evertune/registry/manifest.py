"""The manifest of a version: what is known of it, as a typed object and as the file ``manifest.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from evertune.utils.typed_json import from_json, to_json

FORMAT = 1

Kind = Literal["first", "update", "rebuild"]

_WRITTEN_ALWAYS = ("version", "created", "files")


@dataclass(frozen=True)
class SliceEntry:
    """A file with the records held out of one update.

    Args:
        name: The experience that they were held out of.
        file: The file's name in the registry.
        examples: The number of records in it.
        sha256: Of the file, in hexadecimal.
    """

    name: str
    file: str
    examples: int
    sha256: str


@dataclass(frozen=True)
class VerdictSummary:
    """What the gate decided. The whole verdict is in the version's ``verdict.json``.

    Args:
        passed: Whether the version may go into production.
        summary: Why, in words.
    """

    passed: bool
    summary: str = ""


@dataclass(frozen=True)
class Metrics:
    """What was measured on held-out records.

    Args:
        accuracy: The accuracy (for a task without classes: the mean score) on each slice, by its name.
        average_accuracy: The mean over the slices.
    """

    accuracy: dict[str, float | None] = field(default_factory=dict)
    average_accuracy: float | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is known of a version.

    Args:
        version: The version's number, counted from 1.
        parent: The version that it was trained from. None for the first.
        created: When it was made, with a time zone. By default now.
        kind: How it was made: ``"first"`` and ``"rebuild"`` start from the pretrained model, ``"update"`` from the
            parent.
        experience: The name of what it learned.
        reason: Why there was an update, in words.
        consumed: The last segment of the journal that it has learned. 0 for none.
        offset: Where the source stands after that segment.
        module: The name of the module's class.
        classes: The names of the classes that it knows. Empty for a task without classes.
        records: The number of records by what became of them: ``train``, ``held_out`` and ``quarantined``.
        slices: The held-out records of every update so far.
        verdict: What the gate decided. None for a version that was never judged.
        metrics: What was measured on held-out records.
        seconds: The duration of each stage of the update.
        config: The whole configuration of the update.
        config_digest: A hash of the configuration.
        code: The program that wrote it.
        files: The SHA-256 of every file by its name. :meth:`~evertune.registry.Registry.publish` fills it in.

    Raises:
        ValueError: when the number is not positive, or ``created`` has no time zone.

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
    slices: list[SliceEntry] = field(default_factory=list)
    verdict: VerdictSummary | None = None
    metrics: Metrics = field(default_factory=Metrics)
    seconds: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    config_digest: str | None = None
    code: str = ""
    files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.version < 1:
            raise ValueError(f"versions are counted from 1, got {self.version}")
        if self.created.tzinfo is None:
            raise ValueError(f"created must have a time zone, got {self.created.isoformat()}")

    @property
    def passed(self) -> bool:
        """Whether the gate let the version pass. True for one that was never judged."""
        return self.verdict is None or self.verdict.passed

    @property
    def summary(self) -> str:
        """Why the gate let the version pass or refused it. Empty for one that was never judged."""
        return "" if self.verdict is None else self.verdict.summary

    def to_dict(self) -> dict[str, Any]:
        """The content of the file: JSON values only, with null for a number that is not finite."""
        return {"format": FORMAT, **to_json(self)}

    def to_json(self) -> bytes:
        """The file itself."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Manifest:
        """Read the file.

        Fields that this version of evertune does not know are ignored.

        Raises:
            ValueError: when the file is not JSON, is of another format, or a field is missing or has the wrong type.
                The message names the field.
        """
        values = json.loads(content)
        if not isinstance(values, dict) or "format" not in values:
            raise ValueError("'format' is missing")
        if values["format"] != FORMAT:
            raise FormatError(values["format"])
        for name in _WRITTEN_ALWAYS:
            if name not in values:
                raise ValueError(f"{name!r} is missing")
        return from_json(cls, values)


class FormatError(ValueError):
    """The manifest was written by an evertune that has another format of manifests."""

    def __init__(self, found: Any) -> None:
        super().__init__(f"is of format {found!r}, and this evertune reads format {FORMAT}")
        self.found = found
