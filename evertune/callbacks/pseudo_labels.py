"""Pseudo-labels: entities that the old model is sure of keep their tags in data that label only newer types."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evertune._lightning import pl
from evertune.callbacks.replay.callback import Replay
from evertune.callbacks.state import load_state, save_state
from evertune.callbacks.step_logits import LogitsMethod
from evertune.callbacks.teacher import rounds
from evertune.callbacks.training_data import TrainingData
from evertune.metrics.entities import Entity, entities_in, split_tag
from evertune.shards.opened import shards_of
from evertune.shards.support import check_strategy, is_deepspeed
from evertune.tasks.base import IGNORED, task_of
from evertune.utils.batches import targets_of
from evertune.utils.collectives import gather_bytes
from evertune.utils.evaluation import evaluation_mode, trial

_STATE = "pseudo_labels.json"


@dataclass
class _Saved:
    """The content of the file that :meth:`PseudoLabels.save` writes."""

    experience_index: int
    seen: list[str]


class PseudoLabels(LogitsMethod):
    """Entities of older types, which new data leave without a label, are learned as the old model tags them.

    An experience labels its own types. What older updates have learned is ``O`` in it, and a model that learns these
    ``O`` forgets. Before the first step, the model as it is then reads all examples of the update, and those of a
    :class:`Replay`. An entity that it finds takes the place of the ``O`` of its words if

    - its type was learned in an earlier update, and new examples do not label that type at all (in a replayed example:
      that example does not);
    - all of its words are ``O``;
    - the probability of each of its words' tags is at least ``confidence``.

    This is the confidence-based pseudo-labelling of Zhang et al. 2025, "Exploring Stability-Plasticity Trade-offs for
    Continual Named Entity Recognition" (SPT), with one threshold for all tags and whole entities. Only the labels of
    the batch change; the dataset and the memory keep theirs. The entities found are kept in memory for the update, on
    each rank, and in its checkpoints.

    Replayed examples have the same gap on the other side: entities of the types that this update brings are ``O`` in
    them, and the old model does not know these. The tags of these types are left out of the loss of replayed examples,
    so that they neither teach nor unteach them.

    Args:
        confidence: Least probability, in (0, 1], of the tags of an entity that takes the place of ``O``. Default: 0.7.
            A lower one keeps more of what is old, and more of the old model's mistakes.
        known: Types that the module knows before the first update. Default: none.
        head: Name of the submodule that returns the logits, ``[batch, tokens, tags]``. Found by itself by default.

    Raises:
        ValueError: If ``confidence`` is not in (0, 1]. In ``setup``, if the module has no ``tags``, as
            :class:`~evertune.lightning_modules.TokenClassificationModule` has. Before the first step, if the training
            data cannot be read by index.

    Example::

        callbacks = [Replay(memory_size=600), PseudoLabels()]
        module = TokenClassificationModule("bert-base-cased")
        ContinualTrainer(max_epochs=3, callbacks=callbacks).fit_stream(module, stream)
    """

    def __init__(self, confidence: float = 0.7, known: Sequence[str] = (), head: str | None = None) -> None:
        if not 0 < confidence <= 1:
            raise ValueError(f"confidence must be in (0, 1], got {confidence}")
        self.confidence, self.head = confidence, head
        self.seen: list[str] = list(known)
        """Types learned in earlier updates."""
        self._replay: Replay | None = None
        self._found: dict[str, list[Entity]] | None = None  # by the digest of an example's tokens; None: not asked yet

    @property
    def n_found(self) -> int:
        """Number of entities in the examples of the update that are learned as the old model tags them."""
        return sum(map(len, (self._found or {}).values()))

    # --- before the first step

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        check_strategy(trainer, type(self).__name__)
        if not hasattr(pl_module, "tags"):
            raise ValueError(
                f"PseudoLabels reads the names of tags from module.tags, which {type(pl_module).__name__} lacks; use "
                "it with a TokenClassificationModule"
            )
        self._found, self._replay = None, Replay.of(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the old model read the examples of the update."""
        data = TrainingData(trainer, type(self).__name__, "the old model's entities in the training data")
        if self._found is not None:  # of the checkpoint that this fit resumed from
            return
        self._found = {}
        if not self.seen:
            return
        new = self._read(trainer, pl_module, data, data.dataset)
        labelled = {entity.type for _, gold, _ in new for entity in gold}
        memory: Any = self._replay.memory.view if self._replay and len(self._replay.memory) else ()
        for key, gold, said in self._read(trainer, pl_module, data, memory):
            own = {entity.type for entity in gold}
            self._found[key] = [entity for entity in said if entity.type not in own]
        for key, _, said in new:
            self._found[key] = [entity for entity in said if entity.type not in labelled]

    def _read(
        self, trainer: pl.Trainer, module: pl.LightningModule, data: TrainingData, examples: Any
    ) -> list[tuple[str, list[Entity], list[Entity]]]:
        """For each example its digest, the entities that it labels, and those that the old model is sure of."""
        mine: list[Any] = []
        advice = "give the module a task whose outputs() returns logits [batch, tokens, tags] and their targets"
        with (
            trial(f"PseudoLabels cannot read the tags of {type(module).__name__}", advice),
            evaluation_mode(module),
            trainer.precision_plugin.val_step_context(),
        ):
            for indices, counts in rounds(range(len(examples)), trainer):
                found = list(self._read_batch(module, data.batch_of([examples[index] for index in indices])))
                mine += found if counts else []
        if is_deepspeed(trainer):
            shards_of(trainer).release()
        everyones = [one for part in gather_bytes(json.dumps(mine).encode(), trainer) for one in json.loads(part)]
        return [(key, *([Entity(*one) for one in entities] for entities in both)) for key, *both in everyones]

    def _read_batch(self, module: Any, batch: Any) -> Iterator[tuple[str, list[Entity], list[Entity]]]:
        outputs, tags = task_of(module).outputs(module, batch), module.tags
        assert outputs.targets is not None
        best, numbers = outputs.logits.float().softmax(-1).max(-1)
        for row, key in enumerate(_digests(batch)):
            counts = outputs.targets[row] != IGNORED
            gold = entities_in([tags[number] for number in outputs.targets[row][counts].tolist()])
            sure = best[row][counts] >= self.confidence
            said = [
                entity
                for entity in entities_in([tags[number] for number in numbers[row][counts].tolist()])
                if entity.type in self.seen and bool(sure[entity.start : entity.end].all())
            ]
            yield key, gold, said

    # --- in a step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put the entities in the place of ``O``, in the labels of the batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self.seen:
            return
        assert self._step is not None and self._found is not None
        tags: list[str] = pl_module.tags  # type: ignore[assignment]
        if self._replay is not None:
            new = torch.tensor([kind not in self.seen for _, kind in map(split_tag, tags)])
            excluded = torch.zeros(self._step.n_classes, dtype=torch.bool)
            excluded[1 : len(tags)] = new[1:]  # all but O
            self._step.exclude(self._replay.joined(trainer, batch).replayed, excluded.to(pl_module.device))
        targets: Tensor = targets_of(batch)
        numbers = {tag: number for number, tag in enumerate(tags)}
        for row, key in enumerate(_digests(batch)):
            entities = self._found.get(key)
            if not entities:
                continue
            places = (targets[row] != IGNORED).nonzero().flatten()
            for start, end, kind in entities:
                here = places[start:end]
                if bool((targets[row, here] == numbers["O"]).all()):
                    targets[row, here] = numbers[f"I-{kind}"]
                    targets[row, here[0]] = numbers[f"B-{kind}"]

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Check that the training step has used the logits."""
        if self.seen and self._step is not None:
            self._step.check()

    # --- the end

    def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The types of this update are old ones from here on."""
        self.seen = list(module.classes)  # type: ignore[arg-type]
        self._found = None

    # --- what is saved

    def state_dict(self) -> dict[str, Any]:
        """The types seen, and within an update the entities that the old model has found."""
        found = None if self._found is None else {key: [list(e) for e in es] for key, es in self._found.items()}
        return {"experience_index": self.experience_index, "seen": list(self.seen), "found": found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`, on any number of ranks."""
        self.experience_index, self.seen = state_dict["experience_index"], list(state_dict["seen"])
        found: Mapping[str, Any] | None = state_dict["found"]
        self._found = None if found is None else {key: [Entity(*one) for one in ones] for key, ones in found.items()}

    def save(self, directory: str | Path) -> None:
        """Write the types seen to a folder, as JSON. Call on every rank."""
        save_state(Path(directory) / _STATE, _Saved(self.experience_index, list(self.seen)))

    def load(self, directory: str | Path) -> None:
        """Read what :meth:`save` wrote, at any world size.

        Raises:
            FileNotFoundError: If the folder holds no such file.
            ValueError: If the file is corrupt.
        """
        state = load_state(_Saved, Path(directory) / _STATE)
        self.experience_index, self.seen = state.experience_index, state.seen


def _digests(batch: Any) -> Iterator[str]:
    """A name for each example of a batch: a hash of its tokens, without padding."""
    tokens, mask = batch["input_ids"].cpu(), batch["attention_mask"].cpu().bool()
    for row, there in zip(tokens, mask, strict=True):
        yield hashlib.blake2b(row[there].numpy().tobytes(), digest_size=16).hexdigest()
