"""The diagonal Fisher information: how important each weight is to what the model has learned."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from evertune._lightning import pl, rank_zero_warn
from evertune.importance.per_example import PerExampleHooks, Use, add_powers, add_sums
from evertune.importance.rules import Power, raised
from evertune.shards.shards import ParameterShards
from evertune.tasks.base import IGNORED, Likelihood, Outputs, task_of
from evertune.utils.batches import batch_size_of, has_targets, logits_of, take, targets_of
from evertune.utils.evaluation import evaluation_mode
from evertune.utils.ranks import rank_and_world_size

Estimator = Literal["auto", "exact", "sampled", "empirical", "batched"]

EXACT_UP_TO = 32
"""Number of classes (times positions that count) of an example up to which ``"auto"`` uses the exact expectation.

The exact expectation costs one backward pass for each of them."""
EXACT_AT_MOST = 4096
"""Number of backward passes for one batch above which ``"exact"`` is rejected."""

Logits = Callable[[pl.LightningModule, Any], Tensor]
Targets = Callable[[Any], Any]


@dataclass(frozen=True)
class IndexedBatch:
    """A batch with the position of each example in the whole data, so that the Fisher is the same at any world size.

    Args:
        batch: The batch, on the module's device.
        indices: Index of each example in the data over all ranks; -1 for one that only pads the batch.
    """

    batch: Any
    indices: Sequence[int]


def estimate_fisher(
    module: pl.LightningModule,
    batches: Iterable[Any],
    shards: ParameterShards,
    estimator: Estimator = "auto",
    *,
    logits: Logits | None = None,
    targets: Targets | None = None,
    likelihood: Likelihood | None = None,
    seed: int = 0,
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[Tensor]:
    """The mean over examples of the squared gradient of each example's log-likelihood, for every trainable weight.

    The square is taken per example, so the result depends neither on the batch size nor on the number of ranks. The
    module runs in evaluation mode; afterwards its modes, the random states, ``requires_grad`` and ``grad`` are
    restored.

    Estimators (van de Ven, 2025, "On the computation of the Fisher information in continual learning"):

    - ``"exact"``: the expectation over the model's own labels. It takes one backward pass per position for each class
      but one.
    - ``"sampled"``: labels drawn from the model. The draw depends on ``seed``, the example's index and the position.
    - ``"empirical"``: the true labels. This is not the Fisher (Kunstner et al., 2019): it vanishes where the fit is
      perfect.
    - ``"batched"``: the square of the mean gradient of each batch, with true labels. It depends on the batch size; use
      it only to reproduce libraries that do this.
    - ``"auto"``: exact for each example with up to 32 classes (times positions that count), sampled for the others.

    **Many positions.** The log-likelihood of an example with logits ``[positions, classes]`` is the sum over its
    positions, given the true context of each. Positions with target -100 do not count, so padding has no effect.
    ``"sampled"`` draws a label for each position independently. This is unbiased: the gradient of the log-likelihood of
    a drawn label has mean 0 at each position, so the products of two positions in the square of the sum have mean 0,
    and the sum of the positions' Fisher information remains.

    **Likelihood.** The task defines what the logits are (:class:`~evertune.tasks.base.Outputs`): classes (a softmax),
    binary labels (one Bernoulli each), or the means of a regression (a Gaussian with variance 1).

    Args:
        module: The model, set up by its strategy.
        batches: Batches on the module's device, or :class:`IndexedBatch` if data are dealt to ranks or padded. Every
            rank must yield the same number. Plain batches are assumed to be dealt round-robin, and all their examples
            count.
        shards: The weights to estimate for, as this rank holds them.
        estimator: Name of the estimator, as above.
        logits: Function ``(module, batch) -> tensor [batch, ..., classes]``. By default the module's task finds the
            logits.
        targets: Function ``batch -> tensor`` that returns class numbers ``[batch, ...]`` or a tensor of the logits'
            shape. By default the module's task finds the targets.
        likelihood: What the logits parametrise. By default the task infers it from the first batch.
        seed: Seed of the labels that ``"sampled"`` draws.
        forward_context: Function that returns the context manager of a forward pass (autocast).

    Returns:
        One flat fp32 tensor per fragment of ``shards.fragments``, the same on all ranks that hold the same weights.

    Raises:
        TypeError: If no logits can be found.
        ValueError: If the estimator is unknown, there are no examples, the logits do not have the batch first, are not
            finite or depend on the other examples of the batch, the targets do not fit, or (with sharded weights) no
            per-example rule covers a parameter.

    Example:
        >>> class Model(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Linear(1, 2, bias=False)
        ...         torch.nn.init.zeros_(self.weight.weight)
        ...     def forward(self, x):
        ...         return self.weight(x)
        >>> from evertune.shards.replicated import ReplicatedShards
        >>> model = Model()
        >>> estimate_fisher(model, [(torch.ones(4, 1), torch.zeros(4).long())], ReplicatedShards(model))
        [tensor([0.2500, 0.2500])]
    """
    run = Estimation(module, shards, estimator, logits, targets, likelihood, forward_context)
    return run.mean(batches, lambda outputs, indices: run.steps(outputs, indices, seed))


class Checked(NamedTuple):
    """What :func:`check_fisher` finds.

    Args:
        likelihood: What the logits parametrise.
        exact_passes: Backward passes that ``"exact"`` takes for an example; None if they vary, because an example has
            several positions.
    """

    likelihood: Likelihood
    exact_passes: int | None


def check_fisher(
    module: pl.LightningModule,
    batch: Any,
    shards: ParameterShards,
    estimator: Estimator = "auto",
    *,
    logits: Logits | None = None,
    targets: Targets | None = None,
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Checked:
    """Raise now what :func:`estimate_fisher` would raise later, using forward passes only. Call on every rank.

    Args:
        module: The model, as for :func:`estimate_fisher`.
        batch: A batch of real data, on the module's device.
        shards: The weights. This and all further arguments are as for :func:`estimate_fisher`.

    Returns:
        What the logits parametrise, and the cost of the exact Fisher.

    Raises:
        TypeError: As for :func:`estimate_fisher`.
        ValueError: As for :func:`estimate_fisher`.
    """
    run = Estimation(module, shards, estimator, logits, targets, None, forward_context)
    size = batch_size_of(batch)
    with _evaluation(module), run.hooks.installed():
        alone = run.probe(batch, size)
        with run.hooks.recording(size):
            outputs = run.outputs(batch)
        run.check_apart(alone, outputs.logits)
        run.steps(outputs, range(size), 0)
        assert run.likelihood is not None
        width = outputs.logits.shape[-1]
        passes = width - (run.likelihood == "categorical")
        return Checked(run.likelihood, passes if outputs.logits.ndim == 2 else None)


class Estimation:
    """A single estimation: forward passes of the module, and the accumulator of the squares.

    Args:
        module: The model, as for :func:`estimate_fisher`. So are all further arguments but the last.
        power: Which power of the magnitude of an example's gradients is accumulated. Default: 2, the squares.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        shards: ParameterShards,
        estimator: Estimator,
        logits: Logits | None,
        targets: Targets | None,
        likelihood: Likelihood | None,
        forward_context: Callable[[], AbstractContextManager[Any]],
        power: Power = 2,
    ) -> None:
        if estimator not in get_args(Estimator):
            raise ValueError(f"unknown estimator {estimator!r}; expected one of {', '.join(get_args(Estimator))}")
        self.module, self.shards, self.estimator = module, shards, estimator
        self.logits, self.targets, self.likelihood = logits, targets, likelihood
        self.forward_context = forward_context
        self.fisher = _Accumulator(shards, power, batched=estimator == "batched")
        self.hooks = PerExampleHooks(module, shards.shapes, self.fisher.receive)

    def mean(self, batches: Iterable[Any], gradients: Callable[[Outputs, Sequence[int]], list[Tensor]]) -> list[Tensor]:
        """The mean over the examples of what the gradients of each give: one tensor per fragment.

        Args:
            batches: Batches, as for :func:`estimate_fisher`.
            gradients: Function ``(outputs, indices) -> list`` of the gradients of the logits to backpropagate, one
                tensor like the logits per pass.
        """
        module, shards, estimator, fisher, hooks = self.module, self.shards, self.estimator, self.fisher, self.hooks
        parameters = {name: p for name, p in module.named_parameters() if name in shards.shapes}
        replay = any(hasattr(p, "ds_id") for p in parameters.values())  # ZeRO-3: one backward pass per forward pass
        seen = 0
        with _evaluation(module), hooks.installed():
            for item in batches:
                batch = item.batch if isinstance(item, IndexedBatch) else item
                size = batch_size_of(batch)
                alone = self.probe(batch, size) if seen == 0 else None
                indices = _indices(item, size, seen)
                seen += size
                count = fisher.count(indices)
                with hooks.recording(size):
                    outputs = self.outputs(batch)
                if alone is not None:
                    self.check_apart(alone, outputs.logits)
                steps = gradients(outputs, indices)
                if estimator == "batched":
                    # The steps are squared later and then divided by the number of examples: scaled by sqrt(count)
                    # here, each batch contributes count times the square of its mean gradient.
                    steps = [step / max(count, 1) ** 0.5 for step in steps]
                for number, step in enumerate(steps):
                    if replay and number > 0:
                        with hooks.recording(size):
                            outputs = self.outputs(batch)
                    hooks.backward(outputs.logits, step, again=not replay and step is not steps[-1])
                if hooks.unreached and shards.sharded:
                    self.add_one_by_one(batch, size, steps)
                elif hooks.unreached:
                    watched = {name: p for name, p in parameters.items() if name in hooks.unreached}
                    groups = [list(range(size))] if estimator == "batched" else [[row] for row in range(size)]
                    # No rule covers these parameters: take their gradients by autograd, one example at a time.
                    with _in_the_graph(watched.values()):
                        for rows in groups:
                            part = self.outputs(take(batch, rows, size))
                            for step in steps:
                                fisher.add_gradients(watched, part.logits, step[rows])
        return fisher.mean()

    def outputs(self, batch: Any) -> Outputs:
        """Run a forward pass and check its shapes."""
        with self.forward_context():
            outputs = self._outputs(batch)
        size = batch_size_of(batch)
        if len(outputs.logits) != size:
            raise ValueError(
                f"the Fisher needs logits of shape [batch, ..., classes] for {size} examples, got "
                f"{list(outputs.logits.shape)}; pass logits=, a callable (module, batch) -> tensor"
            )
        if outputs.targets is None and self.estimator in ("empirical", "batched"):
            found = targets_of(batch) if self.targets is None else self.targets(batch)
            raise ValueError(
                f"targets must be class numbers, or shaped as the logits {list(outputs.logits.shape)}, got "
                f"{type(found).__name__}; pass targets=, a callable batch -> tensor"
            )
        return outputs

    def _outputs(self, batch: Any) -> Outputs:
        task = task_of(self.module)
        if self.logits is None and self.targets is None:
            return task.outputs(self.module, batch)
        logits = logits_of(self.module, batch) if self.logits is None else self.logits(self.module, batch)
        given = self.targets or (lambda batch: targets_of(batch) if has_targets(batch) else None)
        return Outputs.of(logits, given(batch), task.likelihood)

    def probe(self, batch: Any, size: int) -> Tensor:
        """Find the parameters that no rule reaches. Returns the logits of the first example, computed alone."""
        alone: list[Tensor] = []

        def forward(count: int) -> None:
            alone.append(self.outputs(take(batch, [0] * count, size)).logits.detach())

        with torch.no_grad():
            forward(1)
        self.hooks.probe(forward)
        beyond = self.hooks.unreached - (set() if self.estimator == "batched" else self.hooks.one_by_one)
        if beyond and self.shards.sharded:
            raise ValueError(
                f"no per-example rule reaches {', '.join(sorted(beyond))}, which sharded weights "
                "require: move these parameters to a layer without sublayers that is called with the batch first, or "
                "freeze them"
            )
        self._check_equal(alone[0][0], alone[-1][0])
        return alone[0][0]

    def check_apart(self, alone: Tensor, logits: Tensor) -> None:
        """Reject logits of an example that depend on the other examples of the batch."""
        self._check_equal(alone, logits.detach()[0])

    def _check_equal(self, alone: Tensor, beside: Tensor) -> None:
        with self.forward_context():
            kind = alone.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else alone.dtype
        # Kernels round differently at different batch sizes, by an amount that depends on the precision of autocast.
        tolerance = max(1e-3, 8 * torch.finfo(dtype).eps)
        scale = float(torch.nan_to_num(alone, 0, 0, 0).abs().max()) if alone.numel() else 0.0
        if alone.shape != beside.shape or not torch.allclose(
            alone.float(), beside.float(), rtol=tolerance, atol=tolerance * scale, equal_nan=True
        ):
            raise ValueError(
                f"the logits of {type(self.module).__name__} for an example depend on the other examples of the batch, "
                "or are random, so that an example has no Fisher information of its own; pass logits=, a callable "
                "(module, batch) -> tensor, whose rows do not"
            )

    def steps(self, outputs: Outputs, indices: Sequence[int], seed: int) -> list[Tensor]:
        """The gradients of the logits to backpropagate, one tensor like the logits per pass; the squares add up."""
        if self.likelihood is None:
            numbers = outputs.likelihood == "gaussian"
            if outputs.likelihood != "categorical":
                # A rank whose first targets happen to be all 0 or 1 must not use another likelihood than the others.
                numbers = self.fisher.over_ranks(int(numbers)) > 0
            self.likelihood = "gaussian" if numbers else outputs.likelihood
        elif self.likelihood == "bernoulli" and outputs.likelihood == "gaussian":
            rank_zero_warn(
                "the first targets were all 0 or 1, and later ones are not: the Fisher takes the logits for yes-or-no "
                'all the same; for a regression give the module task = Task(likelihood="gaussian")'
            )
        outputs = replace(outputs, likelihood=self.likelihood)
        columns = _columns(outputs, self.estimator, indices, seed, self._agree)
        real = torch.tensor([index >= 0 for index in indices], device=outputs.logits.device)
        return [(column * real[:, None, None]).reshape(outputs.logits.shape).to(outputs.logits) for column in columns]

    def add_one_by_one(self, batch: Any, size: int, steps: Sequence[Tensor]) -> None:
        """Add what only a forward pass of a single example reveals: one pass for each example and step."""
        for row in range(self._agree(size)):
            here = [min(row, size - 1)]  # a rank with fewer examples fills up with one that counts for nothing
            for step in steps:
                with self.hooks.recording(1, single=True):
                    outputs = self.outputs(take(batch, here, size))
                self.hooks.backward(outputs.logits, step[here] * (row < size))

    def _agree(self, passes: int) -> int:
        """The largest number of passes that any rank needs: ranks that share weights must run equally many."""
        if not self.shards.sharded or not dist.is_initialized():
            return passes
        most = torch.tensor(passes, device=self.fisher.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)


class _Accumulator:
    """Accumulates squares, or magnitudes, in this rank's fragments, over the examples of all ranks."""

    def __init__(self, shards: ParameterShards, power: Power, *, batched: bool) -> None:
        self._shards = shards
        self._power = power
        self._batched = batched
        self._examples = 0
        values = shards.values()
        self._totals = [torch.zeros_like(v, dtype=torch.promote_types(v.dtype, torch.float32)) for v in values]
        self._held = {f.name: (f, total) for f, total in zip(shards.fragments, self._totals, strict=True)}
        self.device = self._totals[0].device if self._totals else torch.device("cpu")

    def count(self, indices: Sequence[int]) -> int:
        """Count the examples of a batch; if the batch is to be averaged, return the count over all ranks."""
        real = sum(index >= 0 for index in indices)
        self._examples += real
        return self.over_ranks(real) if self._batched else real

    def receive(self, name: str, uses: list[Use]) -> None:
        """Accumulate the uses of a parameter in one backward pass."""
        self._add(name, partial(add_sums, uses) if self._batched else partial(add_powers, uses, power=self._power))

    def add_gradients(self, parameters: Mapping[str, Tensor], output: Tensor, gradient: Tensor) -> None:
        """Accumulate gradients computed by autograd: of one example, or of one batch for ``"batched"``."""
        if not output.requires_grad:  # none of them has a part in it
            return
        inputs = list(parameters.values())
        found = torch.autograd.grad(output, inputs, gradient, retain_graph=True, materialize_grads=True)
        for name, own in zip(parameters, found, strict=True):
            self._add(name, partial(_add, own if self._batched else raised(own, self._power)))

    def mean(self) -> list[Tensor]:
        """The sums over all ranks divided by the number of examples, in the order of the fragments."""
        examples = self.over_ranks(self._examples)
        if examples == 0:
            raise ValueError("the Fisher needs examples, got none; is the data loader empty?")
        if not self._shards.sharded and not self._batched:
            for total in self._totals:
                self._shards.sum_over_ranks(total)
        return [total.div_(examples).float() for total in self._totals]

    def _add(self, name: str, add_to: Callable[[Tensor], None]) -> None:
        shape = self._shards.shapes[name]
        if not self._shards.sharded and not self._batched:  # summed over the ranks once, at the end
            add_to(self._held[name][1].view(shape))
            return
        dtype = self._held[name][1].dtype if name in self._held else torch.float32
        # All ranks reach this all-reduce for the same parameters in the same order, whether they hold a fragment or
        # not.
        full = torch.zeros(shape, dtype=dtype, device=self.device)
        add_to(full)
        self._shards.sum_over_ranks(full)
        if name in self._held:
            fragment, total = self._held[name]
            own = fragment.slice(full)
            # "batched" squares the gradient summed over all ranks, so the square comes after the all-reduce.
            total += own.square_() if self._batched else own

    def over_ranks(self, number: int) -> int:
        """The sum of a number over the ranks."""
        return int(self._shards.sum_over_ranks(torch.tensor(number, device=self.device)))


def _add(gradient: Tensor, total: Tensor) -> None:
    total += gradient


@contextmanager
def _evaluation(module: pl.LightningModule) -> Iterator[None]:
    """Evaluation mode, with compiled layers run eagerly and all parameters out of the graph.

    Everything is restored afterwards.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fast path skips the layers' forward, and thus the hooks
    for p in trainable:
        p.requires_grad_(False)
    compiled = "torch._dynamo" in sys.modules  # compiled code skips the hooks
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    try:
        with evaluation_mode(module), eager, torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for p in trainable:
            p.requires_grad_(True)


@contextmanager
def _in_the_graph(parameters: Collection[Tensor]) -> Iterator[None]:
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(False)


def _indices(item: Any, size: int, seen: int) -> Sequence[int]:
    """The position of each example in the data over all ranks."""
    if not isinstance(item, IndexedBatch):
        rank, world_size = rank_and_world_size()
        return range(seen * world_size + rank, (seen + size) * world_size + rank, world_size)
    if len(item.indices) != size:
        raise ValueError(f"a batch of {size} examples needs as many indices, got {len(item.indices)}")
    return item.indices


def _columns(
    outputs: Outputs,
    estimator: Estimator,
    indices: Sequence[int],
    seed: int,
    agree: Callable[[int], int],
) -> list[Tensor]:
    """The gradients of the logits, ``[batch, positions, classes]`` in float64, one per backward pass.

    An example with an exact expectation uses one pass for each position that counts and each column of the Fisher
    information of the logits there; every other example uses a single pass.
    """
    width = outputs.logits.shape[-1]
    scores = outputs.logits.detach().double().reshape(len(outputs.logits), -1, width)
    categorical = outputs.likelihood == "categorical"
    p = scores.softmax(-1) if categorical else scores.sigmoid() if outputs.likelihood == "bernoulli" else scores
    if not p.isfinite().all():
        raise ValueError("the logits are not finite: the Fisher of a model that has diverged says nothing")
    counts = outputs.counts.reshape(*scores.shape[:2], -1)  # [batch, positions, 1 or classes]
    if estimator in ("empirical", "batched"):
        return [torch.where(counts, _observed(outputs, p) - p, 0)]
    at = counts.any(-1)  # [batch, positions]
    exact = torch.full_like(at[:, 0], estimator == "exact")
    if estimator == "auto":
        exact = at.sum(1) * width <= EXACT_UP_TO
    sampled = torch.where(counts & ~exact[:, None, None], _draw(p, at, indices, seed, outputs.likelihood) - p, 0)
    factor = _factor(p, outputs.likelihood)
    passes = agree(max(int((at.sum(1) * exact).max()) * len(factor), int(bool((~exact).any()))))
    if passes > EXACT_AT_MOST:
        raise ValueError(
            f'estimator="exact" would take {passes} backward passes for a batch, one for each position and class; use '
            '"sampled" or "auto"'
        )
    number = torch.where(at & exact[:, None], at.cumsum(1) - 1, -1)  # index among the positions that count
    columns = []
    for step in range(passes):
        position, column = divmod(step, len(factor))
        here = (number == position)[..., None] & counts
        columns.append(torch.where(here, factor[column], sampled if step == 0 else 0))
    return columns


def _factor(p: Tensor, likelihood: Likelihood) -> list[Tensor]:
    """The columns of ``L``, where ``L L^T`` is the Fisher information of the logits at one position."""
    if likelihood == "categorical":
        return _categorical_factor(p)
    deviation = (p * (1 - p)).sqrt() if likelihood == "bernoulli" else torch.ones_like(p)
    classes = range(p.shape[-1])
    return [F.one_hot(torch.tensor(c, device=p.device), len(classes)) * deviation for c in classes]


def _categorical_factor(p: Tensor) -> list[Tensor]:
    """The columns of ``L``, where ``L L^T = diag(p) - p p^T``: the Fisher of a softmax's logits.

    Its rank is ``classes - 1``, so it takes one backward pass fewer than the sum over labels (Tanabe & Sagae, 1992, "An
    exact Cholesky decomposition and the generalized inverse of the variance-covariance matrix of the multinomial
    distribution").
    """
    rest = p.flip(-1).cumsum(-1).flip(-1)  # probability of this class and all later ones
    columns = []
    for j in range(p.shape[-1] - 1):
        after = rest[..., j + 1]
        scale = torch.where(after > 0, p[..., j] / (rest[..., j] * after), 0).sqrt()
        column = torch.zeros_like(p)
        column[..., j] = after * scale
        column[..., j + 1 :] = -p[..., j + 1 :] * scale[..., None]
        columns.append(column)
    return columns


def _draw(p: Tensor, at: Tensor, indices: Sequence[int], seed: int, likelihood: Likelihood) -> Tensor:
    """Labels drawn from the model, shaped like ``p``, at the positions that count (``at``).

    They depend on the example's index and on the index among the positions that count, not on padding.
    """
    width = 1 if likelihood == "categorical" else p.shape[-1]
    draws = np.zeros((*p.shape[:2], width))
    for row, (index, here) in enumerate(zip(indices, at.cpu().numpy(), strict=True)):
        generator = np.random.default_rng([seed, max(index, 0)])
        draw = generator.standard_normal if likelihood == "gaussian" else generator.random
        draws[row, here] = draw(int(here.sum()) * width).reshape(-1, width)
    drawn = torch.from_numpy(draws).to(p)
    if likelihood == "gaussian":
        return p + drawn
    if likelihood == "bernoulli":
        return (drawn < p).to(p)
    # Inverse-CDF sampling. Scaled by the last sum, which rounding keeps from being exactly 1.
    ladder = p.cumsum(-1)
    classes = torch.searchsorted(ladder, drawn * ladder[..., -1:], right=True)
    return F.one_hot(classes[..., 0].clamp(max=p.shape[-1] - 1), p.shape[-1]).to(p)


def _observed(outputs: Outputs, p: Tensor) -> Tensor:
    """The true labels, shaped like ``p``."""
    labels, classes = outputs.targets, p.shape[-1]
    assert labels is not None
    if outputs.likelihood != "categorical":
        return labels.to(p).reshape(p.shape)
    if labels.is_floating_point():
        raise ValueError(
            f"targets must be class numbers, or shaped as the logits {list(outputs.logits.shape)}, "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    known = labels[labels != IGNORED]
    if known.numel() and (known.min() < 0 or known.max() >= classes):
        raise ValueError(f"labels must be in [0, {classes}), got {int(known.min())} to {int(known.max())}")
    return F.one_hot(labels.reshape(p.shape[:2]).long().clamp(min=0), classes).to(p)
