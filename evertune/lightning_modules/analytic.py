"""A classification head without training: closed-form solutions on sums over the examples."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Features = Literal["identity", "relu", "rff"]
Solver = Literal["mean", "lda", "ridge"]

_PENALTIES = 10.0 ** np.arange(-8, 3, 0.25)
"""Ridge penalties that are tried, as multiples of the mean eigenvalue of the scatter matrix."""
_PER_DISTANCE, _PER_ERROR = 0.9, 1.5
"""Factors of the logits that give about the right probabilities on intents, topics and sentiment with 2 to 800 examples
of a class: of margins in units of the distance of the classes, and of regressions in units of their error. Classes have
heavier tails than Gaussians with the same covariance, whose log-posteriors would be far too sure."""
_NEVER = -1e4
"""Logit of a class without examples; finite, so that losses are."""


@dataclass
class Statistics:
    """Sums over examples that determine every solution of :class:`AnalyticHead`: float64, on the CPU.

    They are sums, so examples can come in any order, in any number of parts and from any number of ranks.

    Args:
        n: Number of examples [1].
        counts: Number of examples of each class [classes].
        sums: Sum of the features of each class [classes, features].
        total: Sum of all features [features].
        moment: Sum of the outer products of all features [features, features].
    """

    n: Tensor
    counts: Tensor
    sums: Tensor
    total: Tensor
    moment: Tensor

    @classmethod
    def zeros(cls, n_classes: int, n_features: int, device: torch.device | str = "cpu") -> Statistics:
        """Sums over no examples."""
        shapes = ([1], [n_classes], [n_classes, n_features], [n_features], [n_features, n_features])
        # Not torch.zeros: DeepSpeed replaces it while a model is built under ZeRO-3, and converts to its own type.
        return cls(*(torch.from_numpy(np.zeros(shape)).to(device) for shape in shapes))

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Add examples.

        Args:
            features: Features [batch, features].
            targets: Class numbers [batch], or 0 and 1 for each class [batch, classes].
        """
        x = features.to(self.moment)
        if targets.ndim == 1:
            targets = F.one_hot(targets, len(self.counts))
        y = targets.to(self.moment)
        self.n += len(x)
        self.counts += y.sum(0)
        self.sums += y.T @ x
        self.total += x.sum(0)
        self.moment += x.T @ x

    def merge(self, other: Statistics) -> None:
        """Add the examples of other sums."""
        for mine, theirs in zip(self.tensors().values(), other.tensors().values(), strict=True):
            mine.add_(theirs.to(mine))

    def grow(self, n_classes: int) -> None:
        """Append classes without examples until there are ``n_classes``."""
        n_new = n_classes - len(self.counts)
        self.counts, self.sums = F.pad(self.counts, (0, n_new)), F.pad(self.sums, (0, 0, 0, n_new))

    def clone(self) -> Statistics:
        """A copy."""
        return Statistics(*(tensor.clone() for tensor in self.tensors().values()))


class AnalyticHead(nn.Module):
    """A linear classifier over frozen features, solved in closed form: nothing is trained.

    The solution is a function of sums over the examples, so it is the same for any order of the examples, any division
    into experiences and any number of ranks, and nothing is forgotten. Known methods are settings of it:

    ==================  ============  ==========  =====================================================================
    method              ``features``  ``solver``
    ==================  ============  ==========  =====================================================================
    nearest class mean  ``identity``  ``mean``    Mensink et al., 2013, "Distance-Based Image Classification"
    SLDA                ``identity``  ``lda``     Hayes & Kanan, 2020, "Lifelong Machine Learning with Deep Streaming
                                                  Linear Discriminant Analysis"
    RanPAC              ``relu``      ``ridge``   McDonnell et al., 2023, "RanPAC: Random Projections and Pre-trained
                                                  Models for Continual Learning"
    KLDA                ``rff``       ``lda``     Momeni et al., 2025, "Continual Learning Using a Kernel-Based Method
                                                  Over Foundation Models"
    ==================  ============  ==========  =====================================================================

    Features are scaled to unit length first, and logits so that their softmax is about as sure as it is right. The sums
    are kept in float64 on the CPU, whatever the device and the precision of the model, and are part of the
    ``state_dict``.

    Args:
        in_features: Size of the encoder's features.
        out_features: Number of classes.
        features: ``identity`` (default); ``relu``, a random projection to ``n_features`` followed by a ReLU; or
            ``rff``, random Fourier features of a Gaussian kernel (Rahimi & Recht, 2007).
        solver: ``mean``, the nearest class mean; ``lda`` (default), linear discriminant analysis with equal priors and
            one covariance matrix for all classes; or ``ridge``, ridge regression on the classes, with an intercept.
        n_features: Size of the random features. The sums take 8 n^2 bytes, the solution n^3 steps. Default: 2,000.
        shrinkage: Weight of a multiple of the identity in the covariance matrix of ``lda``, in [0, 1]. None (default)
            estimates it from the sums (OAS; Chen et al., 2010, "Shrinkage Algorithms for MMSE Covariance Estimation").
        penalty: Ridge penalty of ``ridge``, positive. None (default) minimises the generalised cross-validation error
            (Golub, Heath & Wahba, 1979), which the sums determine.
        bandwidth: Standard deviation of the kernel of ``rff``, in units of the unit-length features. Default: 1.
        multi_label: Whether an example has any number of classes; only with ``ridge``. Default: False.
        seed: Seed of the random features, which are drawn again rather than stored. Default: 0.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> head = AnalyticHead(2, 2, solver="mean")
        >>> features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.2, 0.8]])
        >>> head.update(features, torch.tensor([0, 0, 1, 1]))
        >>> head.solve()
        >>> head(features).argmax(1)
        tensor([0, 0, 1, 1])
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        features: Features = "identity",
        solver: Solver = "lda",
        n_features: int = 2_000,
        shrinkage: float | None = None,
        penalty: float | None = None,
        bandwidth: float = 1.0,
        multi_label: bool = False,
        seed: int = 0,
    ) -> None:
        check_settings(features, solver, n_features, shrinkage, penalty, bandwidth, multi_label)
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.features, self.solver = features, solver
        self.n_features = in_features if features == "identity" else n_features
        self.shrinkage, self.penalty, self.bandwidth = shrinkage, penalty, bandwidth
        self.multi_label, self.seed = multi_label, seed
        self.statistics = Statistics.zeros(out_features, self.n_features)
        self.register_buffer("weight", torch.zeros(out_features, self.n_features, dtype=torch.float32, device="cpu"))
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float32, device="cpu"))
        self._projection: tuple[Tensor, Tensor] | None = None

    def map(self, features: Tensor) -> Tensor:
        """The features that the solution is linear in, float32 ``[batch, n_features]``."""
        x = F.normalize(features.float(), dim=-1)
        if self.features == "identity":
            return x
        projection, phase = self._drawn(x.device)
        if self.features == "relu":
            return (x @ projection).relu()
        return math.sqrt(2 / self.n_features) * (x @ projection / self.bandwidth + phase).cos()

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``[batch, classes]`` of features ``[batch, in_features]``, in float32 also under autocast."""
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(self.map(features), self.weight, self.bias)

    def update(self, features: Tensor, targets: Tensor) -> None:
        """Add examples to the sums. They count after the next :meth:`solve`.

        Args:
            features: Features of the encoder [batch, in_features].
            targets: Class numbers [batch], or with ``multi_label`` 0 and 1 for each class [batch, classes].
        """
        with torch.no_grad():
            self.statistics.add(self.map(features), targets)

    def grow(self, n_rows: int) -> None:
        """Append classes without examples until there are ``n_rows``."""
        self.statistics.grow(n_rows)
        n_new = n_rows - self.out_features
        self.weight = F.pad(self.weight, (0, 0, 0, n_new))
        self.bias = F.pad(self.bias, (0, n_new), value=_NEVER if bool(self.statistics.n > 0) else 0.0)
        self.out_features = n_rows

    @torch.no_grad()
    def solve(self) -> None:
        """Compute the weights from the sums. A class without examples is never the most probable one."""
        sums = self.statistics
        if float(sums.n) == 0:
            self.weight.zero_()
            self.bias.zero_()
            return
        weight, bias = self._ridge(sums) if self.solver == "ridge" else self._discriminant(sums)
        self.weight.copy_(weight)
        self.bias.copy_(bias)

    def _discriminant(self, sums: Statistics) -> tuple[Tensor, Tensor]:
        """Log-posteriors of classes with one covariance matrix, scaled; for ``mean``, a multiple of the identity."""
        n, seen, d = float(sums.n), sums.counts > 0, len(sums.total)
        means = sums.sums / sums.counts.clamp(min=1)[:, None]
        freedom = n - int(seen.sum())
        covariance = (sums.moment - sums.sums.T @ means) / max(freedom, 1)
        variance = float(covariance.trace()) / d
        if freedom < 1 or variance <= 1e-12:  # one example of each class, or identical ones
            covariance, variance = torch.eye(d, dtype=torch.float64), 1.0
        shrinkage = 1.0 if self.solver == "mean" else self.shrinkage
        if shrinkage is None:
            shrinkage = _oracle_shrinkage(covariance, freedom)
        covariance = (1 - shrinkage) * covariance
        covariance.diagonal().add_(shrinkage * variance)
        weight = torch.linalg.solve(covariance, means.T).T
        bias = -0.5 * (weight * means).sum(1)
        scale = _scale_of_margins((means @ weight.T + bias)[seen][:, seen])
        return scale * weight, (scale * bias).where(seen, torch.tensor(_NEVER, dtype=torch.float64))

    def _ridge(self, sums: Statistics) -> tuple[Tensor, Tensor]:
        """Ridge regression on the classes, in units of its cross-validated error."""
        n, mean = float(sums.n), sums.total / sums.n
        share = sums.counts / n
        values, vectors = torch.linalg.eigh(sums.moment - n * mean.outer(mean))
        values, rotated = values.clamp(min=0), (sums.sums - sums.counts[:, None] * mean) @ vectors
        regression = _Regression(values, rotated.square().sum(0), float((sums.counts - n * share.square()).sum()), n)
        penalty = regression.best_penalty() if self.penalty is None else self.penalty
        weight = (rotated / (values + penalty)) @ vectors.T
        bias = share - weight @ mean - (0.5 if self.multi_label else 0.0)
        error = math.sqrt(regression.error(penalty) / len(share))
        scale = _PER_ERROR / error if math.isfinite(error) and error > 1e-6 else 1.0
        return scale * weight, scale * bias

    def _drawn(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The random projection [in_features, n_features] and the phases [n_features] of the random features."""
        if self._projection is None:
            # NumPy has frozen the sequence of RandomState, so every version draws the same projection.
            random = np.random.RandomState(self.seed)
            drawn = random.standard_normal((self.in_features, self.n_features)), random.uniform(size=self.n_features)
            self._projection = torch.from_numpy(drawn[0]).float(), torch.from_numpy(2 * np.pi * drawn[1]).float()
        if self._projection[0].device != device:
            self._projection = self._projection[0].to(device), self._projection[1].to(device)
        return self._projection

    # --- the sums keep their type and device; DDP and DeepSpeed neither broadcast nor convert them

    def _apply(self, fn: Any, recurse: bool = True) -> AnalyticHead:
        for name, buffer in list(self.named_buffers(recurse=False)):
            setattr(self, name, buffer.to(fn(buffer.new_empty(0)).device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.statistics.tensors().items():
            destination[f"{prefix}{name}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name, tensor in self.statistics.tensors().items():
            key = f"{prefix}{name}"
            if key in unexpected_keys:
                unexpected_keys.remove(key)
            if key not in state_dict:
                missing_keys.append(key)
            elif state_dict[key].shape != tensor.shape:
                shapes = f"{list(state_dict[key].shape)}, this head {list(tensor.shape)}"
                error_msgs.append(f"{key} has the shape {shapes}")
            else:
                tensor.copy_(state_dict[key])


def check_settings(
    features: str,
    solver: str,
    n_features: int,
    shrinkage: float | None,
    penalty: float | None,
    bandwidth: float,
    multi_label: bool,
) -> None:
    """Refuse settings of :class:`AnalyticHead` that are out of range, or that would have no effect.

    Raises:
        ValueError: If there is one; the message names it.
    """
    if features not in get_args(Features):
        raise ValueError(f"features must be one of {list(get_args(Features))}, got {features!r}")
    if solver not in get_args(Solver):
        raise ValueError(f"solver must be one of {list(get_args(Solver))}, got {solver!r}")
    if n_features < 1:
        raise ValueError(f"n_features must be positive, got {n_features}")
    if shrinkage is not None and solver != "lda":
        raise ValueError(
            f"shrinkage={shrinkage} has no effect with solver={solver!r}; use solver='lda' or leave it out"
        )
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage must be in [0, 1], got {shrinkage}")
    if penalty is not None and solver != "ridge":
        raise ValueError(f"penalty={penalty} has no effect with solver={solver!r}; use solver='ridge' or leave it out")
    if penalty is not None and not penalty > 0:
        raise ValueError(f"penalty must be positive, got {penalty}")
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be positive, got {bandwidth}")
    if multi_label and solver != "ridge":
        raise ValueError(f"multi_label=True needs solver='ridge', got {solver!r}: it takes one class for each example")


def _oracle_shrinkage(covariance: Tensor, n: float) -> float:
    """The weight of the identity that OAS estimates for the covariance of ``n`` independent examples."""
    d = len(covariance)
    square, mean = float(covariance.square().mean()), float(covariance.trace()) / d
    spread = (n + 1) * (square - mean**2 / d)
    return min((square + mean**2) / spread, 1.0) if spread > 0 else 1.0


def _scale_of_margins(logits: Tensor) -> float:
    """The factor that makes log-posteriors of Gaussian classes about as sure as they are right.

    Args:
        logits: Logits of the mean of each class [classes, classes].
    """
    margins = logits.diagonal()[:, None] - logits
    margins.fill_diagonal_(math.inf)
    # To the nearest other class; where two classes look the same, rounding may leave a bit less than nothing.
    squared_distance = max(0.0, 2 * float(margins.min(1).values.mean()))
    return 1.0 if math.isinf(squared_distance) else _PER_DISTANCE / max(_PER_DISTANCE, math.sqrt(squared_distance))


@dataclass
class _Regression:
    """Ridge regression as a function of its penalty.

    Args:
        values: Eigenvalues of the scatter matrix of the features.
        energy: Squared products of features and targets along its eigenvectors, summed over the targets.
        squares: Sum of the squared centred targets.
        n: Number of examples.
    """

    values: Tensor
    energy: Tensor
    squares: float
    n: float

    def error(self, penalty: float) -> float:
        """The mean squared error by generalised cross-validation, summed over the targets."""
        shrunk = 1 / (self.values + penalty)
        residual = self.squares - float((self.energy * shrunk * (2 - self.values * shrunk)).sum())
        freedom = self.n - 1 - float((self.values * shrunk).sum())
        # Close to interpolation, both the residual and the freedom are rounding errors.
        return self.n * max(residual, 0.0) / (freedom * freedom) if freedom > 0.02 * self.n else math.inf

    def best_penalty(self) -> float:
        """The penalty with the least error; the largest, if there are too few examples to tell."""
        scale = float(self.values.mean()) or 1.0
        penalties = [scale * float(factor) for factor in _PENALTIES[::-1]]
        return min(penalties, key=self.error)
