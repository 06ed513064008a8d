"""One adapter per experience, and the model is the merge of all."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from evertune._lightning import pl
from evertune.callbacks.adapter_method import AdapterMethod, LoRALayer
from evertune.callbacks.averaging import AveragingMethod
from evertune.shards.shards import ParameterShards

Merge = Literal["average", "arithmetic", "ties", "magnitude"]
Start = Literal["last", "pretrained"]


class MergedAdapters(AdapterMethod):
    """Train an adapter per experience, and merge those of all experiences, on any strategy of evertune.

    Let ``theta_0`` be the adapted weights before the first experience, and ``tau_t`` the *task vector* of experience
    ``t``: how far training has moved them, ``theta_t - theta_0``. An experience ends on::

        theta_0 + scale * merge(tau_1, ..., tau_t)

    with, element by element,

    - ``average``: ``sum_i tau_i / t`` (Wortsman et al. 2022, "Model soups");
    - ``arithmetic``: ``sum_i tau_i`` (Ilharco et al. 2023, "Editing models with task arithmetic"); it needs a
      ``scale`` below 1, such as 0.3;
    - ``ties``: of each ``tau_i``, only the share ``density`` of the elements with the largest magnitudes is kept, layer
      by layer; the sign of their sum is elected; the mean is over the kept ones that have it (Yadav et al. 2023,
      "TIES-merging");
    - ``magnitude``: the ``tau_i`` of the largest magnitude (Marczak et al. 2024, "MagMax").

    Experience ``t`` starts from ``theta_{t-1}``, as it was before merging (``start="last"``, as in MagMax), or from
    ``theta_0`` (``start="pretrained"``, as in the other papers). The head is not merged: it is trained on from
    experience to experience. Buffers and weights without an adapter stay.

    Task vectors are kept as the factors of their adapters. They are multiplied out for one layer at a time, on every
    rank, which then changes the part of the weights that it holds. State: an adapter for each experience.

    Args:
        merge: ``"magnitude"`` (default), ``"average"``, ``"arithmetic"`` or ``"ties"``.
        start: ``"last"`` (default) or ``"pretrained"``.
        scale: Factor of the merged task vectors, positive. Default: 1.
        density: Share of the elements that ``ties`` keeps, in (0, 1]. Default: 0.2, as in the paper.
        seed: Seed of the initial weights of each adapter. Default: 0.

    Raises:
        ValueError: If an argument is out of range. In ``setup`` or before the first step, if another callback sets the
            final weights (``EMA``, ``VersionAveraging``, ``WiSEFT``), and as for
            :class:`~evertune.callbacks.OrthogonalLoRA`.

    Example::

        module = SequenceClassificationModule("bert-base-uncased", peft={"method": "lora", "r": 8})
        callbacks = [Replay(memory_size=600), MergedAdapters("ties", density=0.5)]
        ContinualTrainer(max_epochs=3, callbacks=callbacks).fit_stream(module, stream)
    """

    def __init__(
        self,
        merge: Merge = "magnitude",
        start: Start = "last",
        scale: float = 1.0,
        density: float = 0.2,
        seed: int = 0,
    ) -> None:
        if merge not in get_args(Merge):
            raise ValueError(f"merge must be one of {list(get_args(Merge))}, got {merge!r}")
        if start not in get_args(Start):
            raise ValueError(f"start must be 'last' or 'pretrained', got {start!r}")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}")
        if not 0 < density <= 1:
            raise ValueError(f"density must be above 0 and at most 1, got {density}")
        super().__init__(seed)
        self.merging, self.starting, self.scale, self.density = merge, start, scale, density

    @property
    def n_adapters(self) -> int:
        """Number of adapters that are merged."""
        return len({name.partition("|")[0] for name in self.kept})

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements."""
        super().setup(trainer, pl_module, stage)
        for other in trainer.callbacks if stage == "fit" else ():  # type: ignore[attr-defined]
            if isinstance(other, AveragingMethod):
                raise ValueError(
                    f"MergedAdapters and {type(other).__name__} in one Trainer: each sets the final weights; use one"
                )

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, shards: ParameterShards) -> None:
        """Undo the merge, as far as the new experience does not start from it."""
        n_learned = self.n_adapters
        if n_learned == 0:
            super().start(trainer, module, shards)
            return
        if absent := [layer.name for layer in self._layers if f"0|{layer.name}|down" not in self.kept]:
            raise ValueError(
                f"MergedAdapters has learned no adapter of {absent[0]!r}: keep the adapted layers from fit to fit, or "
                "start with a new MergedAdapters"
            )
        self.add_to_base(trainer, lambda layer: self._start_of(layer, n_learned) - self._merged(layer, n_learned))
        self.restart(shards, {})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Merge the adapters. As any method that sets the final weights, before anything is consolidated."""
        smoke_test = trainer.fast_dev_run and getattr(trainer, "experience", None) is None  # type: ignore[attr-defined]
        if self._shards is not None and not trainer.interrupted and not smoke_test:
            self._end(trainer, self._shards)
        super().on_train_end(trainer, pl_module)

    def _end(self, trainer: pl.Trainer, shards: ParameterShards) -> None:
        number = self.n_adapters
        weights = self.whole(shards, [name for layer in self._layers for name in (layer.down, layer.up)])
        for layer in self._layers:
            self.kept[f"{number}|{layer.name}|down"] = weights[layer.down].cpu()
            self.kept[f"{number}|{layer.name}|up"] = layer.scale * weights[layer.up].cpu()
        self.add_to_base(trainer, lambda layer: self._merged(layer, number + 1) - self._start_of(layer, number))
        self.restart(shards, {layer.name: weights[layer.down] for layer in self._layers})
        self._learning = False

    def _change(self, layer: LoRALayer, number: int) -> Tensor:
        """What the adapter of an experience has added to the weight of a layer."""
        return self.kept[f"{number}|{layer.name}|up"] @ self.kept[f"{number}|{layer.name}|down"]

    def _start_of(self, layer: LoRALayer, number: int) -> Tensor:
        """Where an experience starts, as seen from ``theta_0``: ``[outputs, inputs]``, or 0."""
        if self.starting == "pretrained" or number == 0:
            return torch.zeros(())
        return self._start_of(layer, number - 1) + self._change(layer, number - 1)

    def _merged(self, layer: LoRALayer, n_learned: int) -> Tensor:
        """The merge of the task vectors of a layer, ``[outputs, inputs]``."""
        vectors = [self._start_of(layer, number) + self._change(layer, number) for number in range(n_learned)]
        return self.scale * merged(torch.stack(vectors), self.merging, self.density)

    def __repr__(self) -> str:
        return f"<MergedAdapters: {self.n_adapters} adapters, merged by {self.merging}>"


def merged(vectors: Tensor, how: Merge, density: float) -> Tensor:
    """Merge task vectors ``[n, ...]`` element by element; see :class:`MergedAdapters`.

    >>> merged(torch.tensor([[1.0, -3.0], [2.0, 1.0]]), "magnitude", 1.0)
    tensor([ 2., -3.])
    >>> merged(torch.tensor([[1.0, -3.0], [2.0, 1.0]]), "ties", 1.0)
    tensor([ 1.5000, -3.0000])
    """
    if how == "average":
        return vectors.mean(0)
    if how == "arithmetic":
        return vectors.sum(0)
    if how == "magnitude":
        return vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).squeeze(0)
    sizes = vectors.abs().flatten(1)
    n_dropped = sizes.shape[1] - max(1, round(density * sizes.shape[1]))
    if n_dropped:
        limits = sizes.kthvalue(n_dropped, dim=1, keepdim=True).values
        vectors = torch.where((sizes > limits).view(vectors.shape), vectors, 0)
    agree = (vectors.sign() == vectors.sum(0).sign()) & (vectors != 0)
    return (vectors * agree).sum(0) / agree.sum(0).clamp(min=1)
