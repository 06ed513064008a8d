"""Exports a version or a module, checks the export, and publishes it as a whole or not at all."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from evertune.export.checking import check
from evertune.export.exported import ExportedModel
from evertune.export.formats import LIBRARIES, check_format, loaded, merged, weights_size, write
from evertune.export.kinds import check_graph, check_readable, input_names
from evertune.export.manifest import (
    MODEL,
    Check,
    ExportManifest,
    Format,
    Origin,
    Quantize,
    hashes,
    write_manifest,
)
from evertune.lightning_modules.generation import GenerationModule
from evertune.lightning_modules.saving import MANIFEST as SAVED
from evertune.lightning_modules.text_matching import TextMatchingModule
from evertune.lightning_modules.transformer import TransformerModule
from evertune.live.slices import load_slice, thin
from evertune.registry.serving import MODEL as SAVED_MODEL
from evertune.registry.version import Version
from evertune.sources.base import Row
from evertune.streams.tables import read_rows
from evertune.tasks.texts import longest_text
from evertune.utils.files import delete, sha256, sync_folder, sync_tree
from evertune.utils.secrets import without_secrets

_MOST_RECORDS = 1_000, 100  # to check an export on; the second if it generates texts


class RefusedExportError(RuntimeError):
    """An export that answers worse than its source, and was not published.

    Args:
        reason: Which bar it misses.
        check: How it compares with its source.
    """

    def __init__(self, reason: str, check: Check) -> None:
        super().__init__(reason)
        self.check = check


def export(
    source: Version | TransformerModule,
    output: str | Path,
    *,
    format: Format = "onnx",
    quantize: Quantize | None = None,
    data: Any = None,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    max_records: int | None = None,
    min_agreement: float = 0.95,
    max_score_drop: float = 0.005,
) -> ExportedModel:
    """Export a version or a module, and compare it with its source on held-out records.

    The folder gets ``export.json`` and a subfolder ``model`` with the tokenizer and the weights: ``model.onnx``,
    ``model.pt2``, or what ``save_pretrained`` writes, with adapters merged. It appears as a whole, after the check.

    Args:
        source: A version of a registry, or a module with its weights.
        output: Folder to write; it must not exist.
        format: ``onnx`` (default), for ONNX Runtime and other servers; ``torch_export``, a program of ``torch.export``;
            ``safetensors``, the transformer in transformers' own layout and the head beside it, the only one for
            modules that generate texts.
        quantize: With ``onnx``, ``int8`` for 8-bit weights and matrix products, or ``int4`` for 4-bit weights, which
            is smaller and no faster. Default: fp32.
        data: Records to check it on, whatever :func:`~evertune.streams.class_incremental` reads: a file, a list of
            dicts, ... Without labels, only the agreement is checked. Default: what the registry holds out.
        text: Field with the text, or the two fields of a pair. Default: that of the version, or ``text``.
        label: Field with the label. Default: that of the version, or ``label``.
        max_records: Maximum number of held-out records to check it on, alike from all updates. None (default): 1,000,
            and 100 of a module that generates texts, which takes longer.
        min_agreement: Share of the records that it must answer like its source. Default: 0.95.
        max_score_drop: Most of its score that it may lose; the score of a classifier is its accuracy. Default: 0.005,
            half a point.

    Returns:
        The export, loaded.

    Raises:
        FileExistsError: If the folder exists.
        ModuleNotFoundError: If the extra ``export`` is needed and not installed.
        RefusedExportError: If the export answers worse than allowed. Nothing is published.
        RegistryError: If the version is damaged.
        ValueError: If a setting is wrong, the module cannot be exported, or there are no records to check it on.

    Example::

        version = Registry("registry").version("production")
        model = export(version, "intents-int8", format="onnx", quantize="int8")
        model.manifest.check.agreement  # 0.987
    """
    check_format(format, quantize)
    for name, share in (("min_agreement", min_agreement), ("max_score_drop", max_score_drop)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {share}")
    if max_records is not None and max_records < 1:
        raise ValueError(f"max_records must be positive, got {max_records}")
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{output} exists already: name a new folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = _saved(source, Path(scratch))
        original = loaded(folder)
        (check_readable if format == "safetensors" else check_graph)(original)
        most = max_records or _MOST_RECORDS[isinstance(original, GenerationModule)]
        rows, text, labelled = _records(source, original, data, text, label, most)
        draft = output.with_name(f".{output.name}.{secrets.token_hex(8)}.tmp")
        try:
            module = merged(folder)
            write(module, draft / MODEL, format, quantize)
            manifest = _manifest(source, folder, module, format, quantize)
            made = ExportedModel(draft / MODEL, manifest).module
            _index_items(original, made, draft / MODEL)
            sizes = weights_size(draft / MODEL), weights_size(folder)
            found = check(made, original, rows, text, labelled, sizes)
            if reason := _shortcoming(found, min_agreement, max_score_drop):
                raise RefusedExportError(reason, found)
            write_manifest(draft, replace(manifest, check=found, files=hashes(draft)))
            sync_tree(draft)
            draft.rename(output)
        finally:
            delete(draft)
    sync_folder(output.parent)
    return ExportedModel.load(output, trusted=True)


def _saved(source: Version | TransformerModule, scratch: Path) -> Path:
    """The folder of a version's model, verified; or that to which a module was saved, which is not changed then."""
    if isinstance(source, Version):
        return source.verified_folder(SAVED_MODEL) / SAVED_MODEL
    source.save_pretrained(scratch)
    return scratch


def _index_items(source: TransformerModule, exported: Any, folder: Path) -> None:
    """Write the items of text matching, with the vectors that the export itself gives them."""
    if isinstance(source, TextMatchingModule) and source.index is not None and exported.index is None:
        exported.set_items(source.index.items)
        exported.refresh().save(folder)


def _records(
    source: Version | TransformerModule,
    module: TransformerModule,
    data: Any,
    text: str | Sequence[str] | None,
    label: str | None,
    max_records: int,
) -> tuple[list[Row], str | Sequence[str], str | None]:
    """The records to check an export on, the fields of their texts, and that of their labels if they have any."""
    schema = source.manifest.config.get("schema") if isinstance(source, Version) else None
    schema = schema if isinstance(schema, dict) else {}
    text, label = text or schema.get("text") or "text", label or schema.get("label") or "label"
    task: Any = module.task
    columns: dict[str, Any] = dict.fromkeys([text] if isinstance(text, str) else text, task.check_text) | task.fields
    if data is None:
        if not isinstance(source, Version):
            raise ValueError("a module has no held-out records to check its export on: pass data=")
        slices = {entry.name: load_slice(source.store, entry) for entry in source.slices()}
        kept = [row["record"] for rows in thin(slices, max_records).values() for row in rows]
        data = [{name: record.get(name) for name in (*columns, label)} for record in kept]
        if not data:
            raise ValueError(f"version {source.number} has no held-out records to check its export on: pass data")
    labelled = label in read_rows(data, columns).dataset.column_names
    values = read_rows(data, columns | {label: task.check_label} if labelled else columns).values
    records = [dict(zip(values, one, strict=True)) for one in zip(*values.values(), strict=True)]
    rows: list[Row] = [{"id": str(number), "record": record} for number, record in enumerate(records)]
    return rows, text, label if labelled else None


def _manifest(
    source: Version | TransformerModule,
    folder: Path,
    module: TransformerModule,
    format: Format,
    quantize: Quantize | None,
) -> ExportManifest:
    version = source if isinstance(source, Version) else None
    return ExportManifest(
        format=format,
        quantize=quantize,
        module=type(module).__name__,
        settings={name: value for name, value in module.hparams.items() if not name.startswith("_")},
        classes=list(getattr(module, "classes", ())),
        inputs=input_names(module),
        max_length=longest_text(module.tokenizer),
        origin=Origin(
            sha256(folder / SAVED),
            None if version is None else version.number,
            None if version is None else without_secrets(version.store.root),
        ),
        libraries={name: metadata.version(name) for name in LIBRARIES[format]},
    )


def _shortcoming(found: Check, min_agreement: float, max_score_drop: float) -> str:
    """Which bar an export misses; empty if it passes."""
    if found.agreement < min_agreement:
        return (
            f"it agrees with its source on {found.agreement:.1%} of {found.records} records, and must on "
            f"{min_agreement:.1%}"
        )
    if found.score is not None and found.source_score is not None:
        drop = found.source_score - found.score
        if drop > max_score_drop + 1e-9:
            return (
                f"its score on {found.records} records is {found.score:.1%}, and that of its source "
                f"{found.source_score:.1%}: it loses {100 * drop:.2f} points, and {100 * max_score_drop:.2f} are "
                f"allowed{_hint(found.records, max_score_drop)}"
            )
    return ""


def _hint(records: int, max_score_drop: float) -> str:
    """What to do if there are so few records that a single answer decides."""
    if records * max_score_drop >= 1:
        return ""
    return f"; one answer of {records} is {100 / records:.2f} points: check it on more records (data), or allow more"
