"""The training of one update, resumable: from the version in production to new weights and learning state."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset

from evertune._lightning import pl
from evertune.callbacks.base import named_callbacks
from evertune.live.plan import Plan
from evertune.live.staging import CHECKPOINTS, VERSION, claim, finish
from evertune.live.steps import Steps
from evertune.memory.view import MemoryView
from evertune.registry.manifest import Manifest
from evertune.registry.store import MANIFEST
from evertune.sources.base import Row
from evertune.sources.schema import RecordSchema
from evertune.streams.datamodule import ExperienceDataModule
from evertune.streams.experience import Experience, class_names
from evertune.tasks.base import task_of
from evertune.tasks.texts import truncation_length
from evertune.training.checkpoint import UpdateCheckpoint, latest
from evertune.training.heartbeat import Heartbeat
from evertune.training.preemption import Preemption
from evertune.training.trainer import ContinualTrainer
from evertune.utils.files import delete
from evertune.utils.ranks import barrier, is_writer
from evertune.utils.typed_json import decode, foreign

MODEL = "model"
LEARNING = "learning"


class Interrupted(RuntimeError):  # noqa: N818
    """A fit that a signal has interrupted; it resumes from its last checkpoint."""


def train(
    plan: Plan,
    rows: Sequence[Row],
    staging: Path,
    production: Path | None,
    model: Any,
    trainer: ContinualTrainer,
    schema: RecordSchema,
    data: Mapping[str, Any],
    seed: int,
    checkpoint_every_n_steps: int,
) -> None:
    """Train a new version into ``staging/version``. Called again after a crash, it resumes from the last checkpoint.

    Call it on every rank.

    Args:
        plan: Plan of the update.
        rows: Records to train on.
        staging: Folder of the update in progress.
        production: Folder of the version in production; None for the first.
        model: Module that the first version and a rebuild start from.
        trainer: Trainer whose settings and callbacks (the methods) are used; it is not changed.
        schema: Schema that names the fields with the text and the label.
        data: Settings of :class:`~evertune.streams.ExperienceDataModule`.
        seed: Seed of everything random in this update.
        checkpoint_every_n_steps: Optimizer steps between two checkpoints: the most that is lost if the process dies.

    Raises:
        Interrupted: If the fit was interrupted.
    """
    start = time.perf_counter()
    if is_writer():
        claim(staging, plan)
    barrier()
    checkpoints = staging / CHECKPOINTS
    callbacks: list[pl.Callback] = [
        UpdateCheckpoint(checkpoints, every_n_steps=checkpoint_every_n_steps),
        Steps(staging),
    ]
    if "EVERTUNE_NODE_DIR" in os.environ:  # a launcher supervises this process
        callbacks += [Preemption(), Heartbeat()]
    learner = trainer.copy_with(
        callbacks,
        default_root_dir=str(staging),
        enable_checkpointing=True,
    )
    pl.seed_everything(seed, workers=True, verbose=False)
    # Seeded before the module is made, so that newly initialised weights are the same in every attempt, on all ranks.
    module = starting_module(model, production if plan.kind == "update" else None)
    if plan.kind == "update" and production is not None:
        for name, callback in named_callbacks(learner):
            if (production / LEARNING / name).is_dir():
                callback.load(production / LEARNING / name)
    experience, datamodule = _data(plan, rows, production, module, schema, {**data, "seed": seed})
    fit_start = time.perf_counter()
    learner.fit_experience(module, experience, datamodule, ckpt_path=latest(checkpoints))
    fit_seconds = time.perf_counter() - fit_start
    spent = {part: seconds for part, seconds in learner.clock.split.items() if part != "other"}
    if learner.interrupted:
        raise Interrupted(f"update {plan.version} was interrupted; run it again to resume from its last checkpoint")
    version = staging / VERSION
    # A run that died after the fit may have left part of the folder. The other ranks wait for the new one, as all of
    # them take part in saving.
    if is_writer():
        delete(version)
        version.mkdir(parents=True)
    barrier()
    module.save_pretrained(version / MODEL)
    for name, callback in named_callbacks(learner):
        callback.save(version / LEARNING / name)
    if is_writer():
        spent = {"fit": fit_seconds, "train": time.perf_counter() - start, **spent}
        finish(staging, plan, learner.global_step, list(getattr(module, "classes", [])), spent)


def untrained(
    plan: Plan, rows: Sequence[Row], production: Path | None, model: Any, schema: RecordSchema, data: Mapping[str, Any]
) -> Any:
    """The module of an update as it is before the fit, ready for the records of the update."""
    module = starting_module(model, production if plan.kind == "update" else None)
    experience, _ = _data(plan, rows, production, module, schema, data)
    prepare = getattr(module, "prepare_experience", None)
    if prepare is not None:
        prepare(experience)
    module.configure_model()
    return module


def starting_module(model: Any, production: Path | None) -> Any:
    """The module that an update starts from: ``model``, or production's weights with ``model``'s hyperparameters."""
    if production is None:
        return copy.deepcopy(model)
    settings = {
        name: value
        for name, value in model.hparams.items()
        # These belong to the saved version: it may have learned classes that the configured model does not know.
        if name not in ("model_name_or_path", "classes") and not name.startswith("_")
    }
    return type(model).from_pretrained(production / MODEL, lazy=True, **settings)


def _data(
    plan: Plan,
    rows: Sequence[Row],
    production: Path | None,
    module: Any,
    schema: RecordSchema,
    data: Mapping[str, Any],
) -> tuple[Experience, ExperienceDataModule]:
    """The records of an update as an experience and its batches; a rebuild also learns the replay memory."""
    text = schema.text if isinstance(schema.text, str) else tuple(schema.text)
    examples: list[dict[str, Any]] = [{**row["record"], "id": row["id"]} for row in rows]
    columns: dict[str, Any] = {"text": text, "label": schema.label, "id_column": "id"}
    task = task_of(module)
    classes = class_names(task.label_names(example[schema.label]) for example in examples) if schema.label else []
    memory = remembered(production) if production is not None and plan.kind in ("rebuild", "distillation") else None
    if production is None or memory is None:
        experience = Experience(plan.experience, examples, classes=classes)
        return experience, ExperienceDataModule(experience, module.tokenizer, task=task, **columns, **data)
    tokenizer = module.tokenizer
    length = truncation_length(data.get("max_length"), tokenizer, module)
    tokens = task.training_dataset(examples, tokenizer, **columns, max_length=length)
    everything: Any = ConcatDataset([memory, tokens])  # type: ignore[list-item]
    old = Manifest.from_json((production / MANIFEST).read_bytes()).classes
    experience = Experience(plan.experience, everything, classes=list(dict.fromkeys([*old, *classes])))
    return experience, ExperienceDataModule(experience, collate_fn=task.collator(tokenizer), **columns, **data)


def remembered(production: Path) -> MemoryView | None:
    """The replay memory of a version; None if it has none, or one of prompts without answers."""
    manifest = next((production / LEARNING).glob("*/memory.json"), None)  # of Replay, or of a method derived from it
    if manifest is None:
        return None
    with foreign(manifest):
        name = decode(manifest.read_bytes())["file"]
        if Path(name).name != name:
            raise ValueError(f"it names a file outside its folder: {name!r}")
    view = MemoryView.open(manifest.with_name(name))
    return None if view.settings.get("content") == "prompts" else view
