"""evertune's penalties in a training loop of Avalanche."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from evertune._lightning import move_data_to_device, pl
from evertune.callbacks.consolidation import end_experience
from evertune.callbacks.examples import ExampleSampler
from evertune.callbacks.importance_method import ImportanceMethod
from evertune.callbacks.quadratic_method import QuadraticMethod
from evertune.importance.fisher import IndexedBatch
from evertune.utils.ranks import rank_and_world_size


class AvalanchePlugin:
    """Penalties of evertune (EWC, MAS, SynapticIntelligence, L2SP) as a plugin of a strategy of Avalanche.

    Avalanche keeps its loop, its optimizer and its model, any ``nn.Module``. At each event of the loop, the plugin
    calls the callback's own hooks, with a Lightning ``Trainer`` that trains nothing and only holds the model and the
    optimizer: the same code as under Lightning, so importance and penalty are the same, too. Where a method needs
    examples when an experience ends, they are those of ``strategy.experience.dataset``, without what Avalanche's replay
    plugins add, and in the order of the dataset. Avalanche itself is not imported.

    The penalty acts on the gradient, after the backward pass: what Avalanche reports as the loss does not include it.
    A callback keeps its state from experience to experience, and :meth:`~evertune.callbacks.EWC.save` writes it.

    Args:
        methods: The callbacks. The order does not matter.

    Raises:
        TypeError: If a callback is not a quadratic penalty.
        ValueError: If there is none. When training starts, on several processes, or if the model needs task labels:
            Avalanche leaves the gradients of its processes apart, and an importance needs logits of one head.

    Example::

        from avalanche.training import Naive
        from evertune.callbacks import EWC
        from evertune.callbacks.avalanche import AvalanchePlugin

        plugin = AvalanchePlugin(EWC())
        strategy = Naive(model=model, optimizer=optimizer, plugins=[plugin])
        for experience in benchmark.train_stream:
            strategy.train(experience)
    """

    supports_distributed = False

    def __init__(self, *methods: QuadraticMethod) -> None:
        if not methods:
            raise ValueError("AvalanchePlugin needs a penalty, such as EWC()")
        for method in methods:
            if not isinstance(method, QuadraticMethod):
                raise TypeError(
                    f"AvalanchePlugin takes penalties (EWC, MAS, SynapticIntelligence, L2SP), got "
                    f"{type(method).__name__}, which needs a Lightning Trainer"
                )
        self.methods = methods
        self._trainer: pl.Trainer | None = None  # within an experience
        self._samplers: dict[ImportanceMethod, ExampleSampler] = {}  # the methods' own, meanwhile
        self._step = 0

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Start a fit."""
        if rank_and_world_size()[1] > 1:
            raise ValueError(
                "AvalanchePlugin works on one process: Avalanche does not average the gradients of several; train with "
                "ContinualTrainer(strategy='ddp') and from_avalanche(benchmark)"
            )
        if hasattr(strategy.model, "forward_single_task"):
            raise ValueError(
                f"AvalanchePlugin does not support models with task labels, got {type(strategy.model).__name__}"
            )
        self._leave(strategy.model)
        self._trainer, self._step = _trainer_of(strategy, self.methods), 0
        for method in self.methods:
            if isinstance(method, ImportanceMethod):
                self._samplers[method] = method._examples
                method._examples = _DatasetSampler(strategy, method)
        self._call("setup", strategy.model, "fit")
        self._call("on_fit_start", strategy.model)
        self._call("on_train_start", strategy.model)

    def before_training_iteration(self, strategy: Any, **_: Any) -> None:
        """Start a step."""
        self._call("on_train_batch_start", strategy.model, (strategy.mb_x, strategy.mb_y), self._step)

    def before_update(self, strategy: Any, **_: Any) -> None:
        """Add to the gradient."""
        self._call("on_before_optimizer_step", strategy.model, strategy.optimizer)

    def after_update(self, strategy: Any, **_: Any) -> None:
        """End a step."""
        self._call("on_train_batch_end", strategy.model, None, (strategy.mb_x, strategy.mb_y), self._step)
        self._step += 1

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        """Consolidate, and end the fit."""
        assert self._trainer is not None
        end_experience(self.methods, self._trainer, strategy.model)
        self._leave(strategy.model)

    def _call(self, hook: str, *arguments: Any) -> None:
        for method in self.methods:
            getattr(method, hook)(self._trainer, *arguments)

    def _leave(self, model: nn.Module) -> None:
        """End the fit, also one that has failed."""
        if self._trainer is not None:
            self._call("teardown", model, "fit")
        for method, sampler in self._samplers.items():
            method._examples = sampler
        self._samplers, self._trainer = {}, None


def _trainer_of(strategy: Any, methods: tuple[QuadraticMethod, ...]) -> pl.Trainer:
    """A trainer that holds the model and the optimizer of a strategy of Avalanche, which moves and trains them."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(methods),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.strategy.connect(strategy.model)
    trainer.strategy.optimizers = [strategy.optimizer]
    return trainer


class _DatasetSampler(ExampleSampler):
    """Reads the examples from the dataset of the experience that a strategy of Avalanche trains on.

    Args:
        strategy: The strategy.
        method: The method that needs the examples.
    """

    def __init__(self, strategy: Any, method: ImportanceMethod) -> None:
        super().__init__(method.n_examples, method.batch_size, method.seed)
        self._dataset, self._device = strategy.experience.dataset, strategy.device
        self._n_trained = 0

    def setup(self, trainer: pl.Trainer) -> None:
        """Nothing to record: there is no loader."""

    def on_train_start(self, trainer: pl.Trainer) -> None:
        """Nothing to record: there is no loader."""

    def teardown(self, trainer: pl.Trainer) -> None:
        """Nothing to restore: there is no loader."""

    def see(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> None:
        """Count what is trained on."""
        self._n_trained += len(batch[0])

    def counts(self, trainer: pl.Trainer) -> tuple[int, int]:
        """The number of examples in the sample, and of those trained on."""
        return min(self._n_examples, len(self._dataset)), self._n_trained

    def batches(self, trainer: pl.Trainer, n_examples: int) -> Iterator[IndexedBatch]:
        """The sample as batches of inputs and targets, in the order of the dataset."""
        order = torch.randperm(len(self._dataset), generator=torch.Generator().manual_seed(self._seed))
        chosen: Any = Subset(self._dataset, sorted(order[:n_examples].tolist()))
        collate = getattr(self._dataset, "collate_fn", None)
        seen = 0
        for batch in DataLoader(chosen, batch_size=self._batch_size, collate_fn=collate):
            pair = move_data_to_device((batch[0], batch[1]), self._device)
            size = len(pair[0])
            yield IndexedBatch(pair, range(seen, seen + size))
            seen += size
