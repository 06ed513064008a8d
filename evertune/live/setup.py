"""What all updates of a registry have in common: its places, its settings, and how records are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evertune.gate.gate import Gate
from evertune.live.plan import Plan
from evertune.live.settings import UpdateSettings
from evertune.live.versions import Versions
from evertune.registry.journal import Journal
from evertune.registry.registry import Registry
from evertune.registry.segments import Segment
from evertune.sources.base import Row
from evertune.sources.schema import RecordSchema
from evertune.tasks.base import Task

if TYPE_CHECKING:
    from evertune.live.base_capability import Base


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all updates of a registry have in common.

    Args:
        registry: Registry of the versions.
        journal: Journal of the records.
        staging: Folder of the update in progress.
        schema: What the records look like; it must name the field with the label, unless the task needs none.
        task: Task of the module.
        model: Module that the first version starts from.
        data: Settings of :class:`~evertune.streams.ExperienceDataModule`.
        gate: Decides whether a new version may replace the one in production.
        settings: How records are held out and limited.
        config: The whole configuration, which is recorded with each version.
    """

    registry: Registry
    journal: Journal
    staging: Path
    schema: RecordSchema
    task: Task
    model: Any
    data: Mapping[str, Any]
    gate: Gate
    settings: UpdateSettings
    config: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.schema.label is None and self.task.needs_label:
            raise ValueError("an update is judged by labels: the schema needs the field that holds them")

    @property
    def label(self) -> str | None:
        """Name of the field with the label; None if the texts themselves are learned."""
        return self.schema.label

    @cached_property
    def config_digest(self) -> str:
        """Hash of the configuration: an update that was interrupted under another one is not resumed."""
        return hashlib.sha256(as_json(self.config)).hexdigest()[:16]

    @cached_property
    def versions(self) -> Versions:
        """The versions of the registry."""
        return Versions(self.registry)

    @property
    def reading(self) -> dict[str, Any]:
        """The settings by which a module reads records, as :func:`~evertune.live.evaluation.evaluate` takes them."""
        from evertune.tasks.texts import truncation_length

        length = truncation_length(self.data.get("max_length"), self.model.tokenizer, self.model)
        return {"text": self.schema.text, "label": self.label, "max_length": length}

    @cached_property
    def base(self) -> Base | None:
        """The general texts and probes that the gate names; None if it names none."""
        if self.gate.base_texts is None and self.gate.base_probes is None:
            return None
        from evertune.live.base_capability import Base

        return Base.of(self.gate, self.model, self.reading["max_length"])

    def text_of(self, row: Row) -> Any:
        """The text of a record, or its pair of texts."""
        field = self.schema.text
        return row["record"][field] if isinstance(field, str) else [row["record"][one] for one in field]

    def label_of(self, row: Row) -> Any:
        """The label of a record; None if it has none."""
        return None if self.label is None else row["record"][self.label]

    def segments(self, plan: Plan) -> list[Segment]:
        """The segments of the journal that an update learns."""
        return [segment for segment in self.journal.segments(after=plan.after) if segment.number <= plan.consumed]

    def is_published(self, plan: Plan) -> bool:
        """Whether the version of an update is in the registry already."""
        return plan.version < self.registry.next_number()

    def opened(self, folder: Path) -> Any:
        """The module in a folder, on the GPU if there is one."""
        return self.placed(type(self.model).from_pretrained(folder))

    def placed(self, module: Any) -> Any:
        """A module with its weights, on the GPU if there is one."""
        import torch

        if hasattr(module, "configure_model"):
            module.configure_model()
        return module.cuda() if torch.cuda.is_available() else module


def as_json(content: Any) -> bytes:
    """JSON in which equal contents are equal bytes."""
    return json.dumps(content, sort_keys=True, default=str).encode()
