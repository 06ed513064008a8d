"""The manifest of an export, ``export.json``: what it was made from, how it was checked, and its files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from evertune.gate.predictions import Cost
from evertune.utils.files import sha256, write_atomically
from evertune.utils.typed_json import check_seal, decode, from_json, sealed, to_json

MANIFEST = "export.json"
MODEL = "model"
"""Folder of the files, beside the manifest."""
VERSION = 1

Format = Literal["safetensors", "torch_export", "onnx"]
Quantize = Literal["int8", "int4"]


@dataclass(frozen=True)
class Check:
    """An export against its source, on the same records.

    Args:
        records: Number of records.
        agreement: Share of the records with the same answer; of text matching, with the same best candidate.
        score: Mean score of the export's answers, as the gate scores them: for a classifier, the share of the records
            that it answers correctly. None if the records have no labels.
        source_score: The same of the source.
        largest_change: Largest difference in a probability: of a class, a candidate, or (its likelihood) a record's own
            answer; for a regression, in a number, as a multiple of ``scale``.
        cost: Time of the export's answers, tokenisation included, and size of its weights.
        source_cost: The same of the source in fp32, measured in turns with the export.
        threads: Number of threads of both.
    """

    records: int
    agreement: float
    score: float | None
    source_score: float | None
    largest_change: float
    cost: Cost
    source_cost: Cost
    threads: int


@dataclass(frozen=True)
class Origin:
    """What an export was made from.

    Args:
        sha256: SHA-256 of the ``evertune.json`` of the source, which lists that of each of its files.
        version: Number of the version; None for a module that is not of a registry.
        registry: Folder or URL of the registry.
    """

    sha256: str
    version: int | None = None
    registry: str | None = None


@dataclass(frozen=True, kw_only=True)
class ExportManifest:
    """The content of ``export.json``.

    Args:
        format: ``onnx``, ``torch_export`` or ``safetensors``.
        quantize: ``int8`` or ``int4``, or None for fp32.
        module: Name of the module's class.
        settings: Arguments of its constructor.
        classes: Names of the classes, in the order of the logits, where there is one for each; those of entities
            without the prefixes of their tags; none for other tasks.
        inputs: Names of the inputs, in their order; each is int64 ``[batch, tokens]``.
        max_length: Number of tokens after which texts are truncated.
        origin: What it was made from.
        libraries: Versions of the libraries that wrote it.
        check: How it compares with what it was made from; None only while it is being made.
        created: When it was made.
        files: SHA-256 of every other file, by its name.
        version: Version of the manifest's format.
    """

    format: Format
    quantize: Quantize | None
    module: str
    settings: dict[str, Any]
    classes: list[str]
    inputs: list[str]
    max_length: int
    origin: Origin
    libraries: dict[str, str]
    check: Check | None = None
    created: datetime = field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))
    files: dict[str, str] = field(default_factory=dict)
    version: int = VERSION

    @property
    def kind(self) -> str:
        """The format with its quantization: ``onnx-int8``."""
        return self.format if self.quantize is None else f"{self.format}-{self.quantize}"


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of an export except its manifest, by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def write_manifest(folder: Path, manifest: ExportManifest) -> None:
    """Write ``export.json``, with a digest of itself."""
    content = json.dumps(sealed(to_json(manifest)), indent=1, allow_nan=False)
    write_atomically(folder / MANIFEST, content.encode())


def read_manifest(folder: Path) -> ExportManifest:
    """Read ``export.json``, and compare every file with its SHA-256.

    Raises:
        FileNotFoundError: If the folder holds no export, or a file is missing.
        ValueError: If a file is damaged, was added, or is of another version of the format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {MANIFEST}: it was not written by `evertune export`")
    try:
        content = decode(path.read_bytes())
        check_seal(content, {entry.name for entry in fields(ExportManifest)})
        manifest = from_json(ExportManifest, content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if manifest.version != VERSION:
        raise ValueError(f"{path} is of version {manifest.version}, and this evertune reads version {VERSION}")
    found = hashes(folder)
    if absent := sorted(manifest.files.keys() - found.keys()):
        raise FileNotFoundError(f"{folder / absent[0]} is missing")
    if added := sorted(found.keys() - manifest.files.keys()):
        raise ValueError(f"{folder / added[0]} is not listed in {MANIFEST}: it was added later")
    if changed := sorted(name for name, digest in found.items() if manifest.files[name] != digest):
        raise ValueError(f"{folder / changed[0]} is damaged: it does not match its sha256 in {MANIFEST}")
    return manifest
