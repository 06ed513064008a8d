"""Mention replacement: entities of replayed texts change places with others of their type out of the memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from evertune._lightning import pl
from evertune.callbacks.adversarial_training import AdversarialTraining
from evertune.callbacks.augmentation import Augmentation, Draws, SpecialTokens
from evertune.callbacks.batch_change import BatchChange
from evertune.callbacks.replay.callback import Replay
from evertune.callbacks.step_logits import LogitsMethod
from evertune.callbacks.training_data import TrainingData
from evertune.tasks.base import IGNORED
from evertune.utils.batches import TARGET_KEYS

_WHETHER, _WHICH = range(2)
"""Numbers of the random sequences."""
_CHUNK = 256
_UNFIT = (AdversarialTraining, Augmentation, LogitsMethod)


class Mention(NamedTuple):
    """An entity in a row of a batch: the columns of its tokens, the last one excluded, and its type."""

    start: int
    stop: int
    type: str


class MentionReplacement(BatchChange):
    """Replaces entities of replayed texts by others of the same type, which the memory has in this or another text.

    Dai & Adel 2020, "An Analysis of Simple Data Augmentation for Named Entity Recognition". A small memory is seen many
    times, and its names are learned by heart. In other surroundings, they say what their type is, and the surroundings
    what belongs there. New texts stay as they are, since they are seen a few times only.

    The memory of :class:`Replay` holds the unchanged texts, and other callbacks see the unchanged batch in
    ``on_train_batch_start``. What happens to a text depends only on the memory, the seed, the epoch, and its tokens: it
    is the same on any number of ranks, at any batch size and after a resume, and another one in each epoch. A text that
    would have more tokens than the model takes stays as it is.

    It costs a pass over the memory without the model in each update, and its entities are held in the memory of the
    process.

    Args:
        share: Probability with which an entity is replaced, above 0. Default: 0.5.
        seed: Seed of all that is random. Default: 0.

    Raises:
        ValueError: If ``share`` or ``seed`` is out of range. In ``setup``, if there is no :class:`Replay`, the module
            finds no entities, or there is a callback that needs the tokens to stay where they are: those that compare
            or change outputs, such as :class:`Distillation`, :class:`AdversarialTraining` and :class:`Augmentation`.

    Example::

        callbacks = [Replay(memory_size=600), MentionReplacement()]
        ContinualTrainer(max_epochs=8, callbacks=callbacks).fit_stream(TokenClassificationModule("bert-base"), stream)
    """

    keeps_nothing = True

    def __init__(self, share: float = 0.5, seed: int = 0) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.share, self.seed = share, seed
        self._special: SpecialTokens | None = None
        self._pool: dict[str, list[tuple[Tensor, Tensor]]] = {}  # tokens and targets of the entities of each type
        self._generation = -1  # of the memory that they are from

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        others: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if Replay.of(trainer) is None:
            raise ValueError("MentionReplacement changes replayed texts, and there is no Replay: add one")
        if any(isinstance(one, MentionReplacement) and one is not self for one in others):
            raise ValueError("two MentionReplacement callbacks in one Trainer; use one")
        if unfit := next((one for one in others if isinstance(one, _UNFIT)), None):
            raise ValueError(
                f"MentionReplacement changes how many tokens a text has, and {type(unfit).__name__} needs them to stay "
                "where they are: leave one of them out"
            )
        if not hasattr(pl_module, "tags") or not hasattr(pl_module, "tokenizer"):
            raise ValueError(
                "MentionReplacement needs module.tags, the tag of each target, and module.tokenizer, which "
                f"{type(pl_module).__name__} lacks: use a TokenClassificationModule, or leave it out"
            )
        self._special, self._pool, self._generation = SpecialTokens.of(pl_module.tokenizer), {}, -1

    def change(self, trainer: pl.Trainer, module: Any, batch: Any) -> None:
        """Replace entities of the replayed texts of a batch, in its place."""
        replay = Replay.of(trainer)
        assert replay is not None and self._special is not None
        joined = replay.joined(trainer, batch)
        if not joined.slots:
            return
        if self._generation != replay.memory.generation:
            self._pool, self._generation = self._mentions_of(trainer, module, joined.view), replay.memory.generation
        mask = batch["attention_mask"]
        seeds = np.random.SeedSequence([self.seed, replay.experience_index, trainer.current_epoch])
        draws = Draws(batch["input_ids"], mask, int(seeds.generate_state(1, np.uint64).view(np.int64)[0]))
        chances, choices = draws.of_tokens(_WHETHER).cpu(), draws.of_tokens(_WHICH).cpu()
        rows = _rows(batch)
        for number in range(joined.replayed.start, joined.replayed.stop):
            here = mask[number].bool().cpu()
            rows[number] = self._replaced(*rows[number], chances[number, here], choices[number, here], module)
        self._pad(batch, rows)

    def _replaced(
        self, ids: Tensor, targets: Tensor, chances: Tensor, choices: Tensor, module: Any
    ) -> tuple[Tensor, Tensor]:
        """The tokens and targets of a text without padding, with other entities."""
        parts, end = [], 0
        for start, stop, name in self._mentions(ids, targets, module.tags):
            pool = self._pool.get(name, [])
            if pool and chances[start] < self.share:
                new = pool[min(int(choices[start] * len(pool)), len(pool) - 1)]
                parts += [(ids[end:start], targets[end:start]), new]
                end = stop
        parts.append((ids[end:], targets[end:]))
        changed = torch.cat([one for one, _ in parts]), torch.cat([one for _, one in parts])
        too_long = module.max_tokens is not None and len(changed[0]) > module.max_tokens
        return (ids, targets) if too_long else changed

    def _mentions(self, ids: Tensor, targets: Tensor, tags: Sequence[str]) -> list[Mention]:
        """The entities of a text without padding; the tokens within its words belong to them."""
        assert self._special is not None
        found, start, name = [], -1, ""
        numbers = targets.tolist()
        for place, text in enumerate(self._special.others(ids, torch.ones_like(ids)).tolist()):
            tag = tags[numbers[place]] if numbers[place] != IGNORED else ""
            if start >= 0 and not (text and tag in ("", f"I-{name}")):
                found.append(Mention(start, place, name))
                start = -1
            if text and tag.startswith("B-"):
                start, name = place, tag[2:]
        return [*found, Mention(start, len(numbers), name)] if start >= 0 else found

    def _mentions_of(self, trainer: pl.Trainer, module: Any, view: Any) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """The tokens and targets of the entities of each type in a memory."""
        data = TrainingData(trainer, type(self).__name__, "the collate function of the training data")
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for start in range(0, len(view), _CHUNK):
            batch = data.batch_of([view[slot] for slot in range(start, min(start + _CHUNK, len(view)))])
            for ids, targets in _rows(batch):
                for first, stop, name in self._mentions(ids, targets, module.tags):
                    found.setdefault(name, []).append((ids[first:stop], targets[first:stop]))
        return found

    def _pad(self, batch: Any, rows: list[tuple[Tensor, Tensor]]) -> None:
        """Put texts into a batch."""
        assert self._special is not None
        key = _target_key(batch)
        side = "left" if self._special.left else "right"
        fills = {"input_ids": self._special.padding, key: IGNORED, "attention_mask": 0}
        columns = {
            "input_ids": [ids for ids, _ in rows],
            key: [targets for _, targets in rows],
            "attention_mask": [torch.ones_like(ids) for ids, _ in rows],
        }
        shape = batch["input_ids"].shape
        for name, values in columns.items():
            batch[name] = pad_sequence(values, batch_first=True, padding_value=fills[name], padding_side=side)
        for name in ("token_type_ids", "special_tokens_mask"):  # of one text: 0 for all of its tokens
            if name in batch and batch[name].shape == shape:
                batch[name] = torch.zeros_like(batch["input_ids"])


def _rows(batch: Any) -> list[tuple[Tensor, Tensor]]:
    """The tokens and the targets of each text of a batch, without padding."""
    each = zip(batch["input_ids"], batch[_target_key(batch)], batch["attention_mask"].bool(), strict=True)
    return [(ids[there], targets[there]) for ids, targets, there in each]


def _target_key(batch: Mapping[str, Any]) -> str:
    return next(key for key in TARGET_KEYS if key in batch)
