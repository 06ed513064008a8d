"""Distillation: on the examples of an update, the model keeps the answers that it gave before the update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from evertune._lightning import pl, return_method
from evertune.callbacks.dark_replay import DarkReplay
from evertune.callbacks.replay.callback import Replay
from evertune.callbacks.replay.collate import Joined
from evertune.callbacks.state import load_state, save_state
from evertune.callbacks.step_logits import EXCLUDED, LogitsMethod, counted_rows
from evertune.callbacks.teacher import logits_of_examples, outputs_of, sum_over_examples
from evertune.callbacks.trained import record_batches, recorded_batches
from evertune.callbacks.training_data import TrainingData, class_counts
from evertune.memory.logits import StoredLogits, from_bytes, to_bytes
from evertune.memory.view import MemoryView
from evertune.shards.support import check_strategy
from evertune.tasks.base import Likelihood, Outputs, task_of

Examples = Literal["new", "replayed", "all"]
Of = Literal["logits", "features"]
_STATE = "distillation.json"


@dataclass
class _Saved:
    """The content of the file that :meth:`Distillation.save` writes."""

    experience_index: int
    seen: list[int]


class Distillation(LogitsMethod):
    """Learning without forgetting: new examples also teach what the old model says about them (LwF).

    Li & Hoiem 2016, "Learning without Forgetting", with the factor of Hinton et al. 2015. The loss of an update gets::

        strength * T^2 * mean over x of  KL( softmax(z / T) || softmax(h(x) / T) )

    with ``h(x)`` the logits and ``z`` those of the model before the update, both of the classes of earlier experiences
    alone, and ``T`` the temperature. With several labels per example, it is the mean over the classes of the divergence
    of each label's probability; for a regression, the mean squared difference. For a sequence of predictions, it is
    averaged over the positions that count, whose target is not -100; then, and for a regression, all outputs that the
    old model had are compared. In the first update there is nothing to distil.

    The old model's logits are computed before the first step, by one forward pass in evaluation mode over the examples
    of the update, shared by the ranks; no second model is kept. The others come from the forward pass of the training
    step. The logits are kept in memory for the update, on each rank, and in its checkpoints.

    Args:
        strength: Factor of the term. Default: 1.
        temperature: ``T``; above 1, small probabilities count for more. Default: 2.
        examples: Which of a batch: ``"new"`` (default, as in the paper), ``"replayed"``, or ``"all"``, which are both.
            The last two need a :class:`Replay`.
        unknown_only: Whether to leave out new examples of a class that the old model knows: where classes return, such
            as in another domain, their labels say more than its answers. It takes logits, and one label per example.
            Default: False, as in the paper.
        of: ``"logits"`` (default), or ``"features"``, what comes into the output layer: the term is then
            ``strength * mean over x of (1 - cos(f_old, f))``, without a temperature (Hou et al. 2019).
        top_k: Number of logits to store for each row, for models of many classes: the largest, and the probability of
            the others together as one more. Default: all.
        known: Numbers of classes that the module knows before the first update. Default: none.
        head: Name of the submodule that returns the logits, ``[batch, ..., classes]``. Found by itself by default.

    Raises:
        ValueError: If ``strength``, ``temperature`` or ``top_k`` is not positive, or ``examples`` or ``of`` is unknown.
            In ``setup``, if there is no :class:`Replay` that it needs, or a :class:`DarkReplay` already has logits for
            the replayed examples. Before the first step, if the training data cannot be read by index, or the logits
            cannot be found.

    Example::

        callbacks = [Replay(memory_size=600), Distillation(examples="all")]
        ContinualTrainer(max_epochs=3, callbacks=callbacks).fit_stream(module, stream)
    """

    def __init__(
        self,
        strength: float = 1.0,
        temperature: float = 2.0,
        examples: Examples = "new",
        of: Of = "logits",
        top_k: int | None = None,
        known: Sequence[int] = (),
        head: str | None = None,
        unknown_only: bool = False,
    ) -> None:
        for name, value in (("strength", strength), ("temperature", temperature)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be positive, got {top_k}")
        if top_k is not None and of == "features":
            raise ValueError("top_k chooses among logits; leave it out with of='features'")
        if unknown_only and (of == "features" or examples == "replayed"):
            raise ValueError(
                f"unknown_only chooses among new examples for of='logits'; leave it out with of={of!r}, "
                f"examples={examples!r}"
            )
        if examples not in get_args(Examples):
            raise ValueError(f"examples must be one of {list(get_args(Examples))}, got {examples!r}")
        if of not in get_args(Of):
            raise ValueError(f"of must be one of {list(get_args(Of))}, got {of!r}")
        self.strength, self.temperature, self.examples, self.of = strength, temperature, examples, of
        self.top_k, self.head, self.unknown_only = top_k, head, unknown_only
        self.seen: set[int] = set(known)
        """Numbers of the classes of earlier experiences."""
        self._new: set[int] = set()  # those of this fit
        self._tables: dict[str, pa.StructArray] = {}  # what the old model says, for "new" and "replayed" examples
        self._places: Tensor | None = None  # of each new example in its table, -1 if it is left out; None: in order
        self._replay: Replay | None = None
        self._now: Joined | None = None  # the examples of the current batch
        self._likelihood: Likelihood | None = None
        self._columns: list[int] | None = None  # the classes that are compared; None for all of the old model's

    # --- before the first step

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        check_strategy(trainer, type(self).__name__)
        self._replay = Replay.of(trainer)
        if self.examples != "new":
            if self._replay is None:
                raise ValueError(
                    f"Distillation(examples={self.examples!r}) needs a Replay; add one, or distil on examples='new'"
                )
            self._replay.check_whole(f"Distillation(examples={self.examples!r})")
            if isinstance(self._replay, DarkReplay) and self.of == "logits":
                raise ValueError(
                    f"Distillation(examples={self.examples!r}) and DarkReplay both give logits for the replayed "
                    "examples; use Replay, or examples='new'"
                )
        self._tables, self._new, self._likelihood = {}, set(), None
        record_batches(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ask the old model about the examples of the update."""
        data = TrainingData(trainer, type(self).__name__, "the old model's answers to the training data")
        batches = recorded_batches(trainer.train_dataloader)
        assert batches is not None
        batches.start_here()
        first = data.batch(range(min(2, len(data.dataset))))
        self._start_step(trainer, pl_module, first)
        resumed = self._likelihood is not None
        if not resumed:
            self._likelihood, self._columns = self._compared(trainer, pl_module, data, first)
        self._places = self._places_of(data)
        if not resumed and self._has_answers:
            self._ask(trainer, pl_module, data)

    @property
    def _has_answers(self) -> bool:
        """Whether there is a model that has learned something to keep."""
        return bool(self.seen if self._columns is not None else self.experience_index)

    def _compared(
        self, trainer: pl.Trainer, module: pl.LightningModule, data: TrainingData, batch: Any
    ) -> tuple[Likelihood, list[int] | None]:
        """What the logits parametrise, and which of them are compared."""
        outputs = outputs_of(trainer, module, batch, type(self).__name__)
        if self.of == "features" or outputs.likelihood == "gaussian" or outputs.logits.ndim > 2:
            return outputs.likelihood, None
        self._new = set(class_counts(data.targets()).nonzero().flatten().tolist())
        return outputs.likelihood, sorted(self.seen)

    def _places_of(self, data: TrainingData) -> Tensor | None:
        """The place of each new example in the table of answers, ``[examples]``, -1 if it is left out."""
        if not self.unknown_only or self._columns is None or (targets := data.targets()).ndim == 2:
            return None
        asked = ~torch.isin(targets, torch.tensor(sorted(self.seen), dtype=targets.dtype))
        return torch.where(asked, asked.cumsum(0) - 1, -1)

    def _ask(self, trainer: pl.Trainer, module: pl.LightningModule, data: TrainingData) -> None:
        step = self._step
        assert step is not None

        def rows(module: pl.LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
            if self.of == "features":
                return self._rows(features=step.features_of(module, batch))
            return self._rows(task_of(module).outputs(module, batch))

        def ask(examples: Any, indices: Sequence[int]) -> pa.StructArray:
            return logits_of_examples(
                trainer,
                module,
                indices,
                lambda some: data.batch_of([examples[index] for index in some]),
                type(self).__name__,
                lengths=getattr(examples, "lengths", None),
                top_k=self.top_k,
                temperature=self.temperature,
                rows=rows,
            )

        if self.examples != "replayed":
            places = torch.arange(len(data.dataset)) if self._places is None else self._places
            self._tables["new"] = ask(data.dataset, (places >= 0).nonzero().flatten().tolist())
        if self.examples != "new":
            assert self._replay is not None
            view: MemoryView = self._replay.memory.view
            self._tables["replayed"] = ask(view, range(len(view)))

    def _rows(
        self, outputs: Outputs | None = None, features: Tensor | None = None, chosen: Any = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """What is compared of some examples of a batch: rows, and their number for each example."""
        if features is not None:
            return features[chosen], torch.ones(len(features[chosen]), dtype=torch.int64, device=features.device)
        assert outputs is not None
        logits, n_rows = counted_rows(outputs, chosen)
        return (logits if self._columns is None else logits[:, self._columns]), n_rows

    # --- in a step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note which examples of the batch are replayed."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._now = None if self._replay is None else self._replay.joined(trainer, batch)

    def loss_term(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Tensor | None:
        """The distance of this step's answers from those of the old model."""
        assert self._step is not None
        outputs = self._step.logits(batch)
        features = self._step.features() if self.of == "features" else None
        if not self._tables:
            return None
        n_new = len(outputs.logits) if self._now is None else self._now.n_new
        ratio = self._replay.replay_ratio if self._replay is not None and len(self._replay.memory) else 0.0
        expected, total = 0.0, outputs.logits.new_zeros((), dtype=torch.float32)
        if "new" in self._tables:
            batches = recorded_batches(trainer.train_dataloader)
            assert batches is not None
            indices = batches.current()
            if len(indices) != n_new:
                raise ValueError(
                    f"a batch has {n_new} new examples, and {len(indices)} were given to the collate_fn: it must make "
                    "a row of each"
                )
            expected += n_new
            chosen: Any = slice(n_new)
            if self._places is not None:
                places = self._places[list(indices)]
                chosen = (places >= 0).nonzero().flatten().to(outputs.logits.device)
                indices = places[places >= 0].tolist()
            if len(indices):
                total = total + self._sum(*self._rows(outputs, features, chosen), self._tables["new"], indices)
        if "replayed" in self._tables and ratio:
            assert self._now is not None
            expected += n_new * ratio  # on each rank there may be one more or less
            if slots := self._now.slots:
                answers = self._rows(outputs, features, self._now.replayed)
                total = total + self._sum(*answers, self._tables["replayed"], slots)
        return self.strength * total / expected if expected else None

    def _sum(self, rows: Tensor, n_rows: Tensor, table: pa.StructArray, places: Sequence[int]) -> Tensor:
        """The sum over examples of their distance."""
        stored = StoredLogits.from_arrow(table.take(pa.array(places, pa.int64())))
        if n_rows.tolist() != stored.n_rows.tolist():
            raise ValueError(
                f"examples have {n_rows.tolist()} positions that count, and had {stored.n_rows.tolist()} before the "
                "update; the dataset must give the same example for the same index"
            )
        if self._over_tokens:  # of a batch with less padding, rows are shorter
            width = int(stored.n_classes.max()) if len(stored.n_classes) else 0
            rows = F.pad(rows, (0, max(width - rows.shape[1], 0)), value=EXCLUDED)
        new, old, present = stored.to(rows.device).matched(rows, self.temperature)
        return sum_over_examples(self._distance(new, old, present), n_rows)

    def _distance(self, new: Tensor, old: Tensor, present: Tensor) -> Tensor:
        """The distance of each row, ``[R]``."""
        if self.of == "features":
            return 1 - F.cosine_similarity(new[:, :-1], old[:, :-1])
        if self._likelihood == "gaussian":
            return torch.where(present, new - old, 0.0).square().sum(1) / present.sum(1)
        t = self.temperature
        if self._likelihood == "bernoulli":
            new, old, present = new[:, :-1] / t, old[:, :-1] / t, present[:, :-1]  # the last is of all others together
            each = F.binary_cross_entropy_with_logits(new, old.sigmoid(), reduction="none")
            each = each - F.binary_cross_entropy_with_logits(old, old.sigmoid(), reduction="none")
            return t * t * torch.where(present, each, 0.0).sum(1) / present.sum(1)
        new = torch.where(present, new / t, -torch.inf).log_softmax(1)
        old = torch.where(present, old / t, -torch.inf).log_softmax(1)
        return t * t * torch.where(present, old.exp() * (old - new), 0.0).sum(1)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Release the batch."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._now = None

    # --- the end

    def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Add the classes of this fit to those seen, and forget what the old model said."""
        self.seen = self.seen | self._new
        self._tables, self._new, self._likelihood, self._columns = {}, set(), None, None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the strategy, and forget what the old model said."""
        if stage == "fit":
            return_method(trainer.strategy, "process_dataloader")
            self._tables, self._replay = {}, None

    def _release(self) -> None:
        self._now = None
        super()._release()

    # --- what is saved

    def state_dict(self) -> dict[str, Any]:
        """The classes, and within an update what the old model said, as tensors."""
        return {
            "experience_index": self.experience_index,
            "seen": sorted(self.seen),
            "new": sorted(self._new),
            "likelihood": self._likelihood,
            "columns": self._columns,
            "tables": {
                name: torch.frombuffer(bytearray(to_bytes(one)), dtype=torch.uint8)
                for name, one in self._tables.items()
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`, on any number of ranks."""
        self.experience_index, self.seen = state_dict["experience_index"], set(state_dict["seen"])
        self._new, self._likelihood = set(state_dict["new"]), state_dict["likelihood"]
        self._columns = state_dict["columns"]
        self._tables = {name: from_bytes(one.numpy().tobytes()) for name, one in state_dict["tables"].items()}

    def save(self, directory: str | Path) -> None:
        """Write the numbers of the classes seen to a folder, as JSON. Call on every rank."""
        save_state(Path(directory) / _STATE, _Saved(self.experience_index, sorted(self.seen)))

    def load(self, directory: str | Path) -> None:
        """Read what :meth:`save` wrote, at any world size.

        Raises:
            FileNotFoundError: If the folder holds no such file.
            ValueError: If the file is corrupt.
        """
        state = load_state(_Saved, Path(directory) / _STATE)
        self.experience_index, self.seen = state.experience_index, set(state.seen)
