"""Averaged gradient episodic memory: no step may raise the loss on the memory."""

from __future__ import annotations

import numpy as np

from evertune._lightning import pl
from evertune.callbacks.reference_method import ReferenceMethod
from evertune.shards.second_gradient import inner_products
from evertune.shards.shards import ParameterShards

_STREAM = 1 << 40
"""Added to the number of an update, so that the draws are independent of those of ``Replay``."""


class AGEM(ReferenceMethod):
    """Averaged gradient episodic memory (A-GEM), on one device, DDP, ZeRO-1, 2 and 3, and FSDP2.

    Before every step, the gradient ``r`` of the loss on a random batch of the memory is computed. If the gradient ``g``
    of the step points against it, so that the step would raise the loss on the memory, that part is removed (Chaudhry,
    Ranzato, Rohrbach & Elhoseiny 2019, "Efficient lifelong learning with A-GEM")::

        g <- g - (g . r) / (r . r) * r    if g . r < 0

    ``g`` is complete: accumulated, averaged over the ranks, with what all other methods have added, not yet clipped.
    The products are over all weights, on all ranks. What is guaranteed is the direction of the gradient; momentum and
    Adam also move along past ones.

    The memory is that of the trainer's ``Replay``, whose examples also join the batches; as published, they do not:
    ``Replay(replay_ratio=0)``. In the first experience, it is empty and nothing happens.

    Args:
        reference_size: Number of memory examples in the reference batch, over all ranks; a multiple of the number of
            processes. Default: 64. Together they must fit in one pass, also with ``accumulate_grad_batches``.

    Raises:
        ValueError: If ``reference_size`` is not positive. In ``setup``, if it cannot be shared among the processes,
            there is no ``Replay``, there is a ``GEM``, the strategy is not supported, or optimization is manual. Before
            the first step, if there are several optimizers.

    Example::

        trainer = pl.Trainer(max_epochs=3, callbacks=[Replay(memory_size=2_000), AGEM(reference_size=64)])
        trainer.fit(module, first_data)

        trainer = pl.Trainer(max_epochs=3, callbacks=trainer.callbacks)
        trainer.fit(module, second_data)
    """

    def __init__(self, reference_size: int = 64) -> None:
        super().__init__(reference_size)

    def project_gradient(self, trainer: pl.Trainer, module: pl.LightningModule, shards: ParameterShards) -> None:
        """Remove from the gradient what would raise the loss on the memory."""
        assert self._replay is not None
        positions = np.arange(self.reference_size) + trainer.global_step * self.reference_size
        slots = self._replay.memory.draw(positions, _STREAM + self._replay.experience_index).tolist()
        reference = self.reference_gradient(trainer, module, shards, slots)
        gradients = shards.gradients()
        products = inner_products(shards, [gradients, reference])
        against, size = float(products[0, 1]), float(products[1, 1])
        if against < 0:
            for gradient, toward in zip(gradients, reference, strict=True):
                gradient.add_(toward, alpha=-against / size)
            shards.write_back()
