"""Gradient episodic memory: no step may raise the loss on the memory of any past experience."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from evertune._lightning import pl
from evertune.callbacks.reference_method import ReferenceMethod
from evertune.shards.second_gradient import inner_products
from evertune.shards.shards import ParameterShards
from evertune.utils.extras import library


class GEM(ReferenceMethod):
    """Gradient episodic memory (GEM), on one device, DDP, ZeRO-1, 2 and 3, and FSDP2.

    Before every step, the gradient ``r_k`` of the loss on the memory of each past experience ``k`` is computed. The
    gradient ``g`` of the step is replaced by the nearest one that raises none of these losses (Lopez-Paz & Ranzato
    2017, "Gradient episodic memory for continual learning")::

        minimize |h - g|^2    such that  h . r_k >= 0  for all k

    The dual of this quadratic programme has one variable ``v_k >= 0`` per past experience and needs only the inner
    products of the gradients, over all weights and ranks::

        minimize  v' R R' v / 2 + v' R g    such that  v >= 0,      h = g + R' (v + margin)

    (``R`` has the rows ``r_k``.) It is solved as non-negative least squares by SciPy (``pip install
    "evertune[gem]"``). A step takes one more backward pass, and one more gradient in memory, for each past experience:
    with many of them, use :class:`~evertune.callbacks.AGEM`, which takes one.

    The memory is that of the trainer's ``Replay``, whose examples also join the batches; as published, they do not:
    ``Replay(replay_ratio=0)``. In the first experience, it is empty and nothing happens.

    Args:
        reference_size: Number of memory examples of each past experience in its reference batch, over all ranks; a
            multiple of the number of processes. An experience with fewer examples repeats some. Default: 64. (The paper
            takes the whole memory.)
        margin: The constant ``gamma`` that the paper adds to ``v``, not negative: the larger, the more a step also
            lowers the losses on the memory. Default: 0; the paper uses 0.5.

    Raises:
        ValueError: If an argument is out of range. In ``setup``, if ``reference_size`` cannot be shared among the
            processes, there is no ``Replay``, there is an ``AGEM``, the strategy is not supported, or optimization is
            manual. Before the first step, if there are several optimizers.
        ModuleNotFoundError: In ``setup``, if SciPy is not installed.

    Example::

        trainer = pl.Trainer(max_epochs=3, callbacks=[Replay(memory_size=2_000), GEM(reference_size=64)])
        trainer.fit(module, first_data)

        trainer = pl.Trainer(max_epochs=3, callbacks=trainer.callbacks)
        trainer.fit(module, second_data)
    """

    def __init__(self, reference_size: int = 64, margin: float = 0.0) -> None:
        super().__init__(reference_size)
        if not 0 <= margin < float("inf"):
            raise ValueError(f"margin must be finite and not negative, got {margin}")
        self.margin = margin

    @classmethod
    def bytes_per_weight(cls) -> None:
        """None: it depends on the number of past experiences."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements, and find the memory."""
        super().setup(trainer, pl_module, stage)
        library("scipy.optimize", "gem")

    def project_gradient(self, trainer: pl.Trainer, module: pl.LightningModule, shards: ParameterShards) -> None:
        """Replace the gradient by the nearest one that raises no loss on the memory."""
        references = [self.reference_gradient(trainer, module, shards, slots) for slots in self._slots(trainer)]
        gradients = shards.gradients()
        products = inner_products(shards, [gradients, *references])
        weights = solve_dual(products[1:, 1:], products[1:, 0]) + self.margin * shards.gradient_scale
        for weight, reference in zip(weights.tolist(), references, strict=True):
            for gradient, toward in zip(gradients, reference, strict=True):
                gradient.add_(toward, alpha=weight)
        shards.write_back()

    def _slots(self, trainer: pl.Trainer) -> Iterator[list[int]]:
        """For each past experience, the slots of its reference batch at this step; the same on all ranks."""
        assert self._replay is not None
        by_experience: defaultdict[str, list[int]] = defaultdict(list)
        for slot, experience in enumerate(self._replay.memory.view.experiences):
            by_experience[experience].append(slot)
        for number, (_, slots) in enumerate(sorted(by_experience.items())):
            seed = [self._replay.memory.seed, self._replay.experience_index, trainer.global_step, number]
            order = np.random.default_rng(seed).permutation(slots)
            yield np.resize(order, self.reference_size).tolist()


def solve_dual(products: Tensor, against: Tensor) -> Tensor:
    """The ``v >= 0`` that minimizes ``v' products v / 2 + against' v``, for inner products of vectors.

    Args:
        products: Inner products ``R R'`` of the constraints, float64 ``[k, k]``.
        against: Inner products ``R g`` of the constraints with the gradient, float64 ``[k]``.

    Returns:
        float64 ``[k]``; zero where the constraint holds anyway.

    Example:
        >>> solve_dual(torch.tensor([[2.0]]).double(), torch.tensor([-3.0]).double())
        tensor([1.5000], dtype=torch.float64)
    """
    if bool((against >= 0).all()):
        return torch.zeros_like(against)
    # With products = U diag(s) U' and b = against, the objective is |A v - y|^2 / 2 up to a constant, for
    # A = diag(sqrt s) U' and y = -diag(1 / sqrt s) U' b.
    values, vectors = torch.linalg.eigh(products)
    kept = values > values[-1] * 1e-12  # constraints that depend on each other leave directions without curvature
    root = values[kept].sqrt()
    left = root[:, None] * vectors[:, kept].T
    right = -(vectors[:, kept].T @ against) / root
    solution, _ = library("scipy.optimize", "gem").nnls(left.numpy(), right.numpy())
    return torch.from_numpy(solution)
