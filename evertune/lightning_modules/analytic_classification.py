"""Text classification without training: a closed-form head over a frozen transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from evertune._lightning import Callback, pl
from evertune.callbacks.base import ContinualCallback
from evertune.callbacks.gradient_method import GradientMethod
from evertune.lightning_modules.analytic import AnalyticHead, Features, Solver, Statistics, check_settings
from evertune.lightning_modules.backbone import Pooling
from evertune.lightning_modules.reading import batches_of, read_once
from evertune.lightning_modules.sequence_classification import SequenceClassificationModule
from evertune.shards.opened import shards_of
from evertune.shards.support import is_deepspeed
from evertune.utils.batches import targets_of, to_device
from evertune.utils.evaluation import evaluation_mode

_RESUME = "analytic_head"
_N_EXAMPLES_OF_A_BATCH = 64


class AnalyticClassificationModule(SequenceClassificationModule):
    """A pretrained transformer that classifies texts without being trained: only an :class:`AnalyticHead` is computed.

    A ``fit`` reads its training data once, whatever ``max_epochs`` is: each example is added once to the sums of the
    head, and the head is solved before the first batch. The loop then passes over the batches of one epoch, for the
    callbacks that look at them; a memory is filled as usual, and what it replays is not counted a second time. A fit
    that fails or is interrupted leaves the head as it was, and so does ``fast_dev_run``. The result does not depend on
    the order of the experiences or the number of ranks, and nothing is forgotten.

    This is the right model for a few examples, and what any training must beat: see :class:`AnalyticHead` for the
    methods (nearest class mean, SLDA, RanPAC, KLDA) and their papers.

    Names, batches, growth, predictions and folders are those of :class:`SequenceClassificationModule`. Logs
    ``val_loss``, ``val_accuracy``, ``test_loss`` and ``test_accuracy``.

    Args:
        model_name_or_path: Name on the Hugging Face hub, folder, or ``package:NAME/FOLDER`` (in an installed package).
        classes: Names of the classes known so far. Default: none.
        features: ``identity`` (default), ``relu`` or ``rff``, see :class:`AnalyticHead`.
        solver: ``mean``, ``lda`` (default) or ``ridge``.
        n_features: Size of the random features of ``relu`` and ``rff``. Default: 2,000.
        shrinkage: Shrinkage of ``lda``; None (default) estimates it.
        penalty: Penalty of ``ridge``; None (default) chooses it by cross-validation in closed form.
        bandwidth: Bandwidth of ``rff``. Default: 1.
        multi_label: Whether a text has any number of labels; only with ``solver="ridge"``. Default: False.
        pooling: ``auto`` (default), ``mean``, ``cls`` or ``last``, see :class:`SequenceClassificationModule`.
        seed: Seed of the random features. Default: 0.

    Raises:
        ValueError: If an argument is out of range. When ``fit`` starts, if a callback acts on the loss or the weights,
            of which there are none to train, or if the training data cannot be read by index.

    Example::

        module = AnalyticClassificationModule("sentence-transformers/all-MiniLM-L6-v2", classes=["billing", "login"])
        pl.Trainer(max_epochs=1).fit(module, datamodule)  # one forward pass over the training data
        module.predict(["I cannot sign in."])  # [{"login": 0.97, "billing": 0.03}]
    """

    head: AnalyticHead | None

    def __init__(
        self,
        model_name_or_path: str,
        *,
        classes: Sequence[str] = (),
        features: Features = "identity",
        solver: Solver = "lda",
        n_features: int = 2_000,
        shrinkage: float | None = None,
        penalty: float | None = None,
        bandwidth: float = 1.0,
        multi_label: bool = False,
        pooling: Pooling = "auto",
        seed: int = 0,
    ) -> None:
        check_settings(features, solver, n_features, shrinkage, penalty, bandwidth, multi_label)
        super().__init__(
            model_name_or_path,
            classes=classes,
            multi_label=multi_label,
            pooling=pooling,
            warmup_ratio=0.0,
            schedule="constant",
            freeze_layers=-1,
            dropout=0.0,
        )
        self.keep_hparams_of(AnalyticClassificationModule)
        self._settings: dict[str, Any] = {
            "features": features,
            "solver": solver,
            "n_features": n_features,
            "shrinkage": shrinkage,
            "penalty": penalty,
            "bandwidth": bandwidth,
            "multi_label": multi_label,
            "seed": seed,
        }
        self._before: dict[str, Tensor] | None = None  # the head before the fit that is running
        self._learned: Statistics | None = None  # the sums over the data of this fit
        self._resumed: dict[str, Any] | None = None  # what a checkpoint of this fit says

    def configure_head(self) -> None:
        """Build the head, with one row per class."""
        super().configure_head()
        size, n_rows = self.backbone.config.hidden_size, self.head.out_features  # type: ignore[union-attr]
        self.head = AnalyticHead(size, n_rows, **self._settings)
        self.idle = _Idle()

    # --- learning

    def configure_callbacks(self) -> list[Callback]:
        """A callback that puts the head back when a fit fails, of which a module is not notified."""
        return [_PutBack(self)]

    def setup(self, stage: str) -> None:
        """Add the classes of the datamodule's experience, and refuse callbacks that act on what is not trained.

        Raises:
            ValueError: If there is such a callback.
        """
        super().setup(stage)
        callbacks: list[Any] = self.trainer.callbacks if stage == "fit" else []  # type: ignore[attr-defined]
        for callback in callbacks:
            in_loss = isinstance(callback, ContinualCallback) and _has_loss_term(callback)
            if in_loss or isinstance(callback, GradientMethod):
                raise ValueError(
                    f"{type(callback).__name__} acts on a loss or on weights in training, and "
                    f"{type(self).__name__} trains none: remove it from the callbacks"
                )

    def on_train_start(self) -> None:
        """Add each training example to the sums once, over all ranks, and solve."""
        super().on_train_start()
        assert self.head is not None
        loader = self._training_loader()
        self._before = {name: value.clone() for name, value in self.head.state_dict().items()}
        self._learned = self._sums(loader)
        if self.trainer.ckpt_path is not None and self._resumed is not None:
            self._resume(self._resumed, self._learned)
        self._start = self.head.statistics.clone()
        self.head.statistics.merge(self._learned)
        self.head.solve()

    def _resume(self, saved: Mapping[str, Any], learned: Statistics) -> None:
        """Take the data of this fit out of the restored sums, if they are in them.

        Raises:
            ValueError: If the checkpoint was written in the middle of a fit of other data.
        """
        assert self.head is not None
        if _same(saved["learned"], learned):
            for name, tensor in self.head.statistics.tensors().items():
                tensor.copy_(saved["before"][name])
        elif self.trainer.current_epoch == 0:
            raise ValueError(
                f"{self.trainer.ckpt_path} was written in the middle of a fit of other data "
                f"({int(saved['learned']['n'])} examples, this fit has {int(learned.n)}): start a new fit, with the "
                "module of the checkpoint"
            )

    def _training_loader(self) -> DataLoader[Any]:
        """The only training loader, whose examples can be read by index."""
        loaders = tree_leaves(self.trainer.train_dataloader, is_leaf=lambda leaf: isinstance(leaf, DataLoader))
        who = type(self).__name__
        if len(loaders) != 1 or not isinstance(loaders[0], DataLoader):
            raise ValueError(f"{who} needs one torch DataLoader to learn from, got {loaders!r:.80}")
        loader: DataLoader[Any] = loaders[0]
        if isinstance(loader.dataset, IterableDataset) or (loader.batch_size is None and loader.batch_sampler is None):
            kind = type(loader.dataset).__name__
            raise ValueError(
                f"{who} reads every training example once, by index, and cannot do so with {kind} "
                "(iterable, or without batches): use a map-style dataset"
            )
        return loader

    @torch.no_grad()
    def _sums(self, loader: DataLoader[Any]) -> Statistics:
        """The sums over the training data of this fit, on the CPU, the same on all ranks."""
        assert self.head is not None
        trainer = self.trainer
        device = torch.device("cpu") if self.device.type == "mps" else self.device
        sums = Statistics.zeros(self.head.out_features, self.head.n_features, device)
        collate = getattr(loader.collate_fn, "collate_fn", loader.collate_fn)  # without the examples that are replayed
        data = read_once(trainer, loader.dataset, self._batches(loader), collate, loader.num_workers)
        with evaluation_mode(self), trainer.precision_plugin.val_step_context():
            for own, collated in data:
                batch = to_device(trainer, collated)
                features = self.features(batch)
                if own:
                    sums.add(self.head.map(features).to(device), targets_of(batch).to(device))
        if is_deepspeed(trainer):
            shards_of(trainer).release()
        if trainer.world_size > 1:
            for tensor in sums.tensors().values():
                tensor.copy_(trainer.strategy.reduce(tensor, reduce_op="sum"))
        return Statistics(*(tensor.cpu() for tensor in sums.tensors().values()))

    def _batches(self, loader: DataLoader[Any]) -> list[list[int]]:
        """The indices of the examples in batches; with limited batches or steps, evenly spread."""
        trainer = self.trainer
        n_examples = len(loader.dataset)  # type: ignore[arg-type]
        size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
        limits = [trainer.num_training_batches]
        if trainer.max_steps != -1:
            limits.append(trainer.max_steps * trainer.accumulate_grad_batches)
        n_read = n_examples
        if min(limits) < len(loader):
            n_read = min(n_examples, int(min(limits)) * size * trainer.world_size)
        size = getattr(getattr(trainer, "datamodule", None), "eval_batch_size", _N_EXAMPLES_OF_A_BATCH)
        return batches_of(loader.dataset, size, n_read)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """A loss of 0: the examples have been counted."""
        loss: Tensor = self.idle()
        return loss

    def on_train_epoch_end(self) -> None:
        """Stop after the first epoch: another one could learn nothing."""
        self.trainer.should_stop = True

    def on_fit_end(self) -> None:
        """Keep what was learned, unless the fit was interrupted or a test."""
        if self.trainer.interrupted or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.put_back()
        self._before = self._learned = self._resumed = None

    def put_back(self) -> None:
        """Make the head what it was before the fit that is running; no effect outside of one."""
        if self._before is not None:
            assert self.head is not None
            self.head.load_state_dict(self._before)
        self._before = self._learned = self._resumed = None

    # --- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a resumed fit needs in order to count no example twice."""
        super().on_save_checkpoint(checkpoint)
        if self._learned is not None:
            learned = {name: value for name, value in self._learned.tensors().items() if name in _COMPARED}
            checkpoint[_RESUME] = {"before": self._start.tensors(), "learned": learned}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the classes that the checkpoint has beyond this module's; see :class:`SequenceClassificationModule`."""
        super().on_load_checkpoint(checkpoint)
        self._resumed = checkpoint.get(_RESUME)


_COMPARED = ("n", "counts", "total")


def _same(saved: Mapping[str, Tensor], sums: Statistics) -> bool:
    """Whether two fits have the same data, up to the rounding of another machine."""
    here = sums.tensors()
    return all(
        saved[name].shape == here[name].shape
        and torch.allclose(saved[name], here[name], rtol=1e-5, atol=1e-5 * float(sums.n))
        for name in _COMPARED
    )


def _has_loss_term(callback: ContinualCallback) -> bool:
    return type(callback).loss_term is not ContinualCallback.loss_term


class _Idle(nn.Module):
    """A weight that no step changes, for trainers and strategies, which require one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self) -> Tensor:
        return 0.0 * self.weight.sum()


class _PutBack(Callback):
    """Puts a head back when a fit fails."""

    across_experiences = True

    def __init__(self, module: AnalyticClassificationModule) -> None:
        self._module = module

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._module.put_back()
