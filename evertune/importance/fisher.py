"""The diagonal of the Fisher information: how much each weight matters to what the model has learned."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evertune._lightning import pl
from evertune.importance.per_example import PerExampleHooks, Use, add_squares, add_sums
from evertune.importance.rules import take
from evertune.shards.shards import ParameterShards
from evertune.utils.batches import batch_size_of, logits_of, targets_of
from evertune.utils.ranks import rank_and_world_size

Estimator = Literal["auto", "exact", "sampled", "empirical", "batched"]

EXACT_UP_TO = 32
"""The number of classes up to which ``"auto"`` takes the exact expectation: it costs a backward pass per class."""


@dataclass(frozen=True)
class IndexedBatch:
    """A batch whose examples are known by their place in the whole data, so that any world size gives the same Fisher.

    Args:
        batch: the batch, on the module's device.
        indices: for each example its index in the data over all ranks; -1 for one that only fills up the batch.
    """

    batch: Any
    indices: Sequence[int]


def estimate_fisher(
    module: pl.LightningModule,
    batches: Iterable[Any],
    shards: ParameterShards,
    estimator: Estimator = "auto",
    *,
    logits: Callable[[pl.LightningModule, Any], Tensor] = logits_of,
    targets: Callable[[Any], Any] = targets_of,
    seed: int = 0,
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[Tensor]:
    """The mean over examples of the squared gradient of each example's log-likelihood, for every trainable weight.

    The square is taken per example, so the result depends neither on the batch size nor on the number of ranks. The
    module is in evaluation mode meanwhile; afterwards modes, ``requires_grad`` and ``grad`` are as they were.

    Estimators (van de Ven, 2025, "On the computation of the Fisher information in continual learning"):

    - ``"exact"``: the expectation over the model's own labels. One backward pass for each class but one.
    - ``"sampled"``: one label per example drawn from the model; the draw depends on ``seed`` and the example's index.
    - ``"empirical"``: the true labels. Not the Fisher (Kunstner et al., 2019): it vanishes where the fit is perfect.
    - ``"batched"``: the square of the mean gradient of each batch, true labels. Depends on the batch size; only to
      reproduce libraries that do this.
    - ``"auto"``: exact up to 32 classes, sampled above.

    Targets of the shape of the logits (one 0 or 1 per class) are read as multi-label, with a Bernoulli likelihood each.

    Args:
        module: the model, set up by its strategy.
        batches: batches on the module's device, or :class:`IndexedBatch` where data are dealt to ranks or padded. Every
            rank must give equally many. Plain batches are taken to be dealt in turn, and all their examples count.
        shards: the weights to estimate for, as this rank holds them.
        estimator: see above.
        logits: ``(module, batch) -> [batch, classes]``.
        targets: ``batch -> targets``, ``[batch]`` class numbers or ``[batch, classes]``.
        seed: of the labels drawn by ``"sampled"``.
        forward_context: makes the context for a forward pass (autocast).

    Returns:
        One flat fp32 tensor for each of ``shards.fragments``, equal on all ranks where they hold the same weights.

    Raises:
        ValueError: for an unknown estimator, no examples, logits that are not ``[batch, classes]`` or not finite,
            labels outside the classes, and on sharded weights for a parameter that no per-example rule covers.

    Example:
        >>> class Model(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Linear(1, 2, bias=False)
        ...         torch.nn.init.zeros_(self.weight.weight)
        ...     def forward(self, x):
        ...         return self.weight(x)
        >>> from evertune.shards.shards import ReplicatedShards
        >>> model = Model()
        >>> estimate_fisher(model, [(torch.ones(4, 1), torch.zeros(4).long())], ReplicatedShards(model))
        [tensor([0.2500, 0.2500])]
    """
    if estimator not in get_args(Estimator):
        raise ValueError(f"unknown estimator {estimator!r}; expected one of {', '.join(get_args(Estimator))}")
    fisher = _Accumulator(shards, batched=estimator == "batched")
    hooks = PerExampleHooks(module, shards.shapes, fisher.receive)
    parameters = {name: p for name, p in module.named_parameters() if name in shards.shapes}
    replay = any(hasattr(p, "ds_id") for p in parameters.values())  # ZeRO-3 fetches weights for one backward a forward

    def forward(batch: Any) -> Tensor:
        with forward_context():
            return logits(module, batch)

    seen = 0
    with _evaluation(module), hooks.installed():
        for item in batches:
            batch = item.batch if isinstance(item, IndexedBatch) else item
            size = batch_size_of(batch)
            if seen == 0:
                hooks.probe(lambda count: forward(take(batch, [0] * count, size)))  # noqa: B023  (called at once)
                _check_reached(hooks.unreached, shards)
            indices = _indices(item, size, seen)
            seen += size
            count = fisher.count(indices)
            with hooks.recording(size):
                output = forward(batch)
            steps = _output_gradients(output, size, estimator, partial(targets, batch), indices, seed)
            if estimator == "batched":
                steps = [step / max(count, 1) ** 0.5 for step in steps]
            for number, step in enumerate(steps):
                if replay and number > 0:
                    with hooks.recording(size):
                        output = forward(batch)
                hooks.backward(output, step, again=not replay and step is not steps[-1])
            if hooks.unreached:
                watched = {name: p for name, p in parameters.items() if name in hooks.unreached}
                groups = [list(range(size))] if estimator == "batched" else [[row] for row in range(size)]
                with _in_the_graph(watched.values()):
                    for rows in groups:
                        output = forward(take(batch, rows, size))
                        for step in steps:
                            fisher.add_gradients(watched, output, step[rows])
    return fisher.mean()


class _Accumulator:
    """Sums squares into this rank's fragments, over the examples of all ranks."""

    def __init__(self, shards: ParameterShards, *, batched: bool) -> None:
        self._shards = shards
        self._batched = batched
        self._examples = 0
        values = shards.values()
        self._totals = [torch.zeros_like(v, dtype=torch.promote_types(v.dtype, torch.float32)) for v in values]
        self._held = {f.name: (f, total) for f, total in zip(shards.fragments, self._totals, strict=True)}
        self._device = self._totals[0].device if self._totals else torch.device("cpu")

    def count(self, indices: Sequence[int]) -> int:
        """Count the examples of a batch; those of all ranks' batches together, where the batch is to be averaged."""
        real = sum(index >= 0 for index in indices)
        self._examples += real
        return self._over_ranks(real) if self._batched else real

    def receive(self, name: str, uses: list[Use]) -> None:
        """Take the uses of a parameter in one backward pass."""
        self._add(name, partial(add_sums if self._batched else add_squares, uses))

    def add_gradients(self, parameters: Mapping[str, Tensor], output: Tensor, gradient: Tensor) -> None:
        """Take the gradients of one example, or of one batch where batches are squared, by autograd."""
        inputs = list(parameters.values())
        found = torch.autograd.grad(output, inputs, gradient, retain_graph=True, materialize_grads=True)
        for name, own in zip(parameters, found, strict=True):
            self._add(name, partial(_add, own if self._batched else own.square()))

    def mean(self) -> list[Tensor]:
        """The sums of all ranks over the number of examples, in the order of the fragments."""
        examples = self._over_ranks(self._examples)
        if examples == 0:
            raise ValueError("the Fisher needs examples, got none; is the data loader empty?")
        if not self._shards.sharded and not self._batched:
            for total in self._totals:
                self._shards.sum_over_ranks(total)
        return [total.div_(examples).float() for total in self._totals]

    def _add(self, name: str, add_to: Callable[[Tensor], None]) -> None:
        shape = self._shards.shapes[name]
        if not self._shards.sharded and not self._batched:  # this rank's own sum; the ranks' are added at the end
            add_to(self._held[name][1].view(shape))
            return
        dtype = self._held[name][1].dtype if name in self._held else torch.float32
        full = torch.zeros(shape, dtype=dtype, device=self._device)
        add_to(full)
        self._shards.sum_over_ranks(full)
        if name in self._held:
            fragment, total = self._held[name]
            own = fragment.slice(full)
            total += own.square_() if self._batched else own

    def _over_ranks(self, number: int) -> int:
        return int(self._shards.sum_over_ranks(torch.tensor(number, device=self._device)))


def _add(gradient: Tensor, total: Tensor) -> None:
    total += gradient


@contextmanager
def _evaluation(module: pl.LightningModule) -> Iterator[None]:
    """Evaluation mode, layers that are compiled run as they are written, and no parameter is in the graph.

    All is as before afterwards.
    """
    training = [(layer, layer.training) for layer in module.modules()]
    trainable = [p for p in module.parameters() if p.requires_grad]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it skips the layers' own forward, and so the hooks
    module.eval()
    for p in trainable:
        p.requires_grad_(False)
    compiled = "torch._dynamo" in sys.modules  # compiled code skips the hooks
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext(), torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for p in trainable:
            p.requires_grad_(True)
        for layer, mode in training:
            layer.training = mode


@contextmanager
def _in_the_graph(parameters: Collection[Tensor]) -> Iterator[None]:
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(False)


def _check_reached(unreached: set[str], shards: ParameterShards) -> None:
    if unreached and shards.sharded:
        raise ValueError(
            f"no per-example rule reaches {', '.join(sorted(unreached))}, and sharded weights allow no other way: move "
            "these parameters to a layer without sublayers that is called with the batch first, or freeze them"
        )


def _indices(item: Any, size: int, seen: int) -> Sequence[int]:
    """The place of each example in the data over all ranks."""
    if not isinstance(item, IndexedBatch):
        rank, world_size = rank_and_world_size()
        return range(seen * world_size + rank, (seen + size) * world_size + rank, world_size)
    if len(item.indices) != size:
        raise ValueError(f"a batch of {size} examples needs as many indices, got {len(item.indices)}")
    return item.indices


def _output_gradients(
    output: Tensor,
    size: int,
    estimator: Estimator,
    targets: Callable[[], Any],
    indices: Sequence[int],
    seed: int,
) -> list[Tensor]:
    """What to send backwards from the logits, one tensor like them for each pass; the squares of the passes add up."""
    if output.ndim != 2 or len(output) != size:
        raise ValueError(
            f"the Fisher needs logits of shape [batch, classes] for {size} examples, got {list(output.shape)}; "
            "pass logits=, a callable (module, batch) -> tensor"
        )
    scores = output.detach().double()
    labels = _labels(targets, required=estimator in ("empirical", "batched"))
    multi_label = isinstance(labels, Tensor) and labels.shape == scores.shape
    p = scores.sigmoid() if multi_label else scores.softmax(-1)
    if not p.isfinite().all():
        raise ValueError("the logits are not finite: the Fisher of a model that has diverged says nothing")
    if estimator == "auto":
        estimator = "exact" if scores.shape[1] <= EXACT_UP_TO else "sampled"

    if estimator == "exact":
        columns = _bernoulli_factor(p) if multi_label else _categorical_factor(p)
    elif estimator == "sampled":
        columns = [_draw(p, indices, seed, multi_label=multi_label) - p]
    elif multi_label:
        columns = [labels.to(p) - p]
    else:
        columns = [_one_hot(labels, p) - p]
    real = torch.tensor([[index >= 0] for index in indices], device=p.device)
    return [(column * real).to(output.dtype) for column in columns]


def _labels(targets: Callable[[], Any], *, required: bool) -> Any:
    try:
        return targets()
    except TypeError:
        if required:
            raise
        return None


def _categorical_factor(p: Tensor) -> list[Tensor]:
    """The columns of ``L``, where ``L L^T = diag(p) - p p^T``: the Fisher of a softmax's logits.

    It has rank ``classes - 1``, so one backward pass fewer than the sum over labels (Tanabe & Sagae, 1992, "An exact
    Cholesky decomposition and the generalized inverse of the variance-covariance matrix of the multinomial
    distribution").
    """
    rest = p.flip(-1).cumsum(-1).flip(-1)  # of this class and those after it
    columns = []
    for j in range(p.shape[-1] - 1):
        after = rest[:, j + 1]
        scale = torch.where(after > 0, p[:, j] / (rest[:, j] * after), 0).sqrt()
        column = torch.zeros_like(p)
        column[:, j] = after * scale
        column[:, j + 1 :] = -p[:, j + 1 :] * scale[:, None]
        columns.append(column)
    return columns


def _bernoulli_factor(p: Tensor) -> list[Tensor]:
    deviation = (p * (1 - p)).sqrt()
    return [F.one_hot(torch.tensor(c, device=p.device), p.shape[-1]) * deviation for c in range(p.shape[-1])]


def _draw(p: Tensor, indices: Sequence[int], seed: int, *, multi_label: bool) -> Tensor:
    """Labels drawn from the model, zeros and ones shaped like ``p``; each row depends on its index alone."""
    width = p.shape[-1] if multi_label else 1
    draws = [np.random.default_rng([seed, max(index, 0)]).random(width) for index in indices]
    uniform = torch.from_numpy(np.stack(draws)).to(p)
    if multi_label:
        return (uniform < p).to(p)
    ladder = p.cumsum(-1)
    drawn = torch.searchsorted(ladder, uniform * ladder[:, -1:], right=True)
    return F.one_hot(drawn[:, 0], p.shape[-1]).to(p)


def _one_hot(labels: Any, p: Tensor) -> Tensor:
    classes = p.shape[-1]
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.numel() != len(p):
        got = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"targets must be {len(p)} class numbers, or shaped as the logits {list(p.shape)}, got {got}")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must be in [0, {classes}), got {int(labels.min())} to {int(labels.max())}")
    return F.one_hot(labels.reshape(-1).long(), classes).to(p)
