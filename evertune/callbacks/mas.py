"""Memory aware synapses: a penalty on weights that change what the model answers."""

from __future__ import annotations

from torch import Tensor

from evertune._lightning import pl
from evertune.callbacks.importance_method import ImportanceMethod
from evertune.callbacks.quadratic_method import Coupling
from evertune.importance.fisher import Logits, Targets
from evertune.importance.sensitivity import estimate_sensitivity
from evertune.shards.shards import ParameterShards


class MAS(ImportanceMethod):
    """Memory aware synapses, on one device, DDP, ZeRO-1, 2 and 3, and FSDP2.

    Adds to the loss of every later experience the penalty (Aljundi et al. 2018, "Memory aware synapses: learning what
    (not) to forget")::

        (strength / 2) * sum_i Omega_i * (theta_i - anchor_i)^2
        Omega_i = sum over experiences of  mean over examples x of  | d ||F(x)||^2 / d theta_i |

    ``F(x)`` are the logits, ``anchor`` the weights at the end of the last experience. (The paper writes ``lambda`` for
    ``strength / 2``.) No label is needed, so the importance says how much the answer depends on a weight, right or
    wrong. The magnitude is taken per example: the result depends neither on the batch size nor on the number of ranks.

    Args:
        strength: Strength of the penalty, finite and not negative. Default: 0.1, as for ``EWC``, whose importance has
            the same scale if both are normalized; it has not been tuned.
        n_examples: Number of training examples of an experience, over all ranks, on which the importance is estimated,
            with one backward pass for ``batch_size`` of them. Default: 500.
        batch_size: Examples per rank and pass in the estimation. Changes speed and memory, not the result. Default: 16.
        logits: Function ``(module, batch) -> tensor [batch, ..., classes]``. By default the module's task finds the
            logits. Any output will do, such as a feature.
        targets: Function ``batch -> tensor``, with -100 at positions that do not count. By default the module's task
            finds the targets.
        seed: Seed of the drawn examples. Default: 0.
        normalize: Whether the importance of each experience is divided by its mean over all weights where it is not 0
            (default), so that ``strength`` means the same on a model of any size. False is MAS as published.
        coupling: ``"coupled"`` (default): on the gradient. ``"decoupled"``: a proximal step after that of the
            optimizer, stable at any strength; see :class:`~evertune.callbacks.quadratic_method.QuadraticMethod`.

    Raises:
        ValueError: If an argument is out of range. In ``setup``, if the strategy is not supported. Before the first
            step, if there are several optimizers, or no importance can be estimated from the module or its batches.

    Example::

        trainer = pl.Trainer(max_epochs=3, callbacks=[MAS()])
        trainer.fit(module, first_data)

        trainer = pl.Trainer(max_epochs=3, callbacks=trainer.callbacks)
        trainer.fit(module, second_data)  # keeps the answers that it gave
    """

    def __init__(
        self,
        strength: float = 0.1,
        n_examples: int = 500,
        batch_size: int = 16,
        logits: Logits | None = None,
        targets: Targets | None = None,
        seed: int = 0,
        normalize: bool = True,
        coupling: Coupling = "coupled",
    ) -> None:
        super().__init__(strength, coupling, normalize, n_examples, batch_size, logits, targets, seed)

    def estimate(self, trainer: pl.Trainer, module: pl.LightningModule, shards: ParameterShards) -> list[Tensor]:
        """The sensitivity of the logits on a sample of the experience's examples."""
        n_sample, _ = self._examples.counts(trainer)
        return estimate_sensitivity(
            module,
            self._examples.batches(trainer, n_sample),
            shards,
            logits=self.logits,
            targets=self.targets,
            forward_context=trainer.precision_plugin.forward_context,
        )
