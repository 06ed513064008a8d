"""The average of the weights before and after an experience whose share is chosen on the memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evertune._lightning import pl, rank_zero_info
from evertune.callbacks.averaging import AveragingMethod
from evertune.callbacks.replay.callback import Replay
from evertune.callbacks.teacher import rounds
from evertune.callbacks.trained import recorded_batches
from evertune.callbacks.training_data import TrainingData
from evertune.shards.shards import ParameterShards
from evertune.tasks.base import task_of
from evertune.utils.evaluation import evaluation_mode, trial

_NEEDS = "examples that it has trained on"
_DIGITS = 6  # of a score; what differs less is rounding, which depends on the number of ranks


class WiSEFT(AveragingMethod):
    """End an experience on the average of its weights and of those before it that knows most of all experiences.

    Wortsman et al. 2022, "Robust fine-tuning of zero-shot models"::

        theta_i <- previous * before_i + (1 - previous) * theta_i

    with the share ``previous`` that has the highest average score over experiences: of the earlier ones on the examples
    in the memory of a :class:`Replay`, of this one on as many of the examples trained on. The score is that of the
    module's task. Of equal shares, the smallest is taken. All of these examples have been trained on, so the choice
    favours the new weights where a model fits everything; it is not an estimate of the score on new data.

    The training is not changed, only where it ends. Without a memory, as in the first experience, nothing is averaged.
    At the end there is one forward pass over the examples for each share. State: one number per trainable weight.

    Args:
        shares: Shares of the weights before the experience to choose from, in [0, 1). Default: 0, 0.1, ..., 0.9.
        n_examples: Most examples of the memory, and of this experience, to choose on. Default: 512.
        seed: Seed of their choice. Default: 0.

    Raises:
        ValueError: If a share is out of range, or ``n_examples`` is not positive. In ``setup``, if there is no
            :class:`Replay`, the strategy is not supported, or another callback averages, too. Before training, if the
            training data cannot be read by index.

    Example::

        callbacks = [Replay(memory_size=600), WiSEFT()]
        ContinualTrainer(max_epochs=3, callbacks=callbacks).fit_stream(module, stream)
    """

    tensor_names = ("before",)

    def __init__(
        self,
        shares: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        n_examples: int = 512,
        seed: int = 0,
    ) -> None:
        if not shares or not all(0 <= share < 1 for share in shares):
            raise ValueError(f"shares must be numbers from 0 to below 1, got {list(shares)}")
        if n_examples < 1:
            raise ValueError(f"n_examples must be positive, got {n_examples}")
        self.shares, self.n_examples, self.seed = sorted(shares), n_examples, seed
        self.previous = 0.0
        """The share that the last experience has ended on."""
        self.scores: dict[float, float] = {}
        """The average score of each share at the end of the last experience."""
        self._replay: Replay | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._replay = Replay.of(trainer)
            if self._replay is None:
                raise ValueError("WiSEFT chooses on the memory of a Replay: add one, or use VersionAveraging")
            self._replay.check_whole("WiSEFT")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start with the weights of this fit, unless it resumes from a checkpoint."""
        TrainingData(trainer, type(self).__name__, _NEEDS)
        super().on_train_start(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the share, and set the weights to the average."""
        if not trainer.interrupted and self.has_state:
            self._choose(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def final(self, shards: ParameterShards) -> list[Tensor]:
        """The average of the weights before the experience and of those after it."""
        return self._average(shards.values(), self.previous)

    def _average(self, after: list[Tensor], share: float) -> list[Tensor]:
        pairs = zip(after, self.tensors["before"], strict=True)
        return [value if share == 0 else value.to(before.dtype).lerp(before, share) for value, before in pairs]

    def _choose(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert self._replay is not None
        self.previous, self.scores, view = 0.0, {}, self._replay.memory.view
        if not len(view):
            return
        shards, data = self._shards_now(trainer), TrainingData(trainer, type(self).__name__, _NEEDS)
        batches = recorded_batches(trainer.train_dataloader)
        assert batches is not None
        chance = np.random.default_rng((self.seed, self.experience_index))
        trained = batches.trained()
        slots = np.sort(chance.permutation(len(view))[: self.n_examples])
        new = np.sort(chance.permutation(trained)[: len(slots)])
        names = [view.experiences[slot] for slot in slots.tolist()]
        counts = Counter(names)
        weights = [1 / counts[name] for name in names] + [1 / len(new)] * len(new)
        examples = _Joined(view, slots.tolist(), data.dataset, new.tolist())

        after = [value.clone() for value in shards.values()]
        for share in self.shares:
            shards.set_values(self._average(after, share))
            total = self._score(trainer, module, data, examples, weights, shards)
            self.scores[share] = total / (len(counts) + 1)
        shards.set_values(after)
        self.previous = max(self.shares, key=lambda share: (round(self.scores[share], _DIGITS), -share))
        rank_zero_info(
            f"WiSEFT: {self.previous:g} of the weights before, average score {self.scores[self.previous]:.4f}"
        )

    def _score(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        data: TrainingData,
        examples: _Joined,
        weights: list[float],
        shards: ParameterShards,
    ) -> float:
        """The weighted sum of the scores of all examples, over all ranks."""
        total = torch.zeros(1, device=module.device)
        what = f"WiSEFT cannot score the examples of {type(module).__name__}"
        with (
            trial(what, "give the module a task, a Task whose score() returns their scores"),
            evaluation_mode(module),
            trainer.precision_plugin.val_step_context(),
        ):
            for chosen, counts in rounds(range(len(examples)), trainer):
                scores = task_of(module).score(module, data.batch_of([examples[index] for index in chosen]))
                if counts:
                    weight = torch.tensor([weights[index] for index in chosen], device=module.device)
                    total += (scores.float().nan_to_num() * weight).sum()
        shards.release()
        return float(shards.sum_over_ranks(total))


class _Joined:
    """Examples of a memory, then some of a dataset."""

    def __init__(self, view: Any, slots: list[int], dataset: Any, indices: list[int]) -> None:
        self._places = [*((view, slot) for slot in slots), *((dataset, index) for index in indices)]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Any:
        source, place = self._places[index]
        return source[place]
