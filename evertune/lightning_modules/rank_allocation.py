"""AdaLoRA: a budget of ranks goes to the layers that need them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from evertune._lightning import pl
from evertune.callbacks.base import ContinualCallback
from evertune.lightning_modules.adapters import adapter_config
from evertune.lightning_modules.schedule import remaining_steps
from evertune.shards.support import is_sharded
from evertune.utils.extras import library

_INITIAL, _FINAL = 0.1, 0.3
"""Shares of an update's steps before the first and after the last rank is taken away, where none are given."""
_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")


class RankAllocation(ContinualCallback):
    """Takes ranks away from the adapters of AdaLoRA that do least (Zhang et al. 2023, "Adaptive Budget Allocation").

    A module with ``peft={"method": "adalora", ...}`` brings it along. Each adapted matrix changes by ``B diag(e) A``.
    From step ``tinit`` of an update until ``tfinal`` steps before its end, the singular values ``e`` whose weights and
    gradients matter least in all layers together are set to 0, until ``target_r`` are left per layer on average; the
    last ``tfinal`` steps train these. A term of the loss keeps ``A`` and ``B`` near orthogonal. Every update starts
    with all ranks again.

    What is allocated follows from whole gradients, the same on all ranks of DDP. Strategies that divide gradients or
    weights are refused.

    Args:
        peft: Settings of the module's adapters.

    Raises:
        ValueError: In ``setup``, under DeepSpeed or FSDP2. When ``fit`` starts, if its length is unknown, or ``tinit``
            and ``tfinal`` leave no step between them.
    """

    keeps_nothing = True

    def __init__(self, peft: dict[str, Any]) -> None:
        self.peft = peft
        self._allocator: Any = None
        self._pattern: dict[str, list[bool]] | None = None  # which singular values are kept, by the name of the weight
        self._first = 0  # number of steps before this update
        self._total = 0  # number of steps of it
        self._seen = 0
        self._resumed: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and is_sharded(trainer):
            raise ValueError(
                f"peft: adalora compares whole gradients of all adapters in each step, which {trainer.strategy!r:.60} "
                "has divided among the ranks; use 'ddp' or one device, or plain LoRA"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start with all ranks, or continue where the checkpoint was."""
        resumed, self._resumed = self._resumed or {}, None
        self._first = resumed.get("first", trainer.global_step)
        self._total = resumed.get("total", 0) or remaining_steps(trainer) or 0
        self._pattern, self._seen = resumed.get("pattern"), trainer.global_step
        if not self._total:
            raise ValueError(
                "peft: adalora needs to know how long fit lasts, to end with target_r ranks: pass max_epochs or "
                "max_steps to the Trainer"
            )
        config = adapter_config(self._timed(), self._total)
        self._allocator = library("peft.tuners.adalora.layer", "peft").RankAllocator(
            pl_module.backbone, config, "default"
        )
        for name in _AVERAGES:
            setattr(self._allocator, name, dict(resumed.get(name, {})))
        self._allocator.ipt = dict.fromkeys(self._allocator.exp_avg_ipt)

    def _timed(self) -> dict[str, Any]:
        """The settings, with numbers of steps."""
        shares = {"tinit": math.floor(_INITIAL * self._total), "tfinal": math.floor(_FINAL * self._total)}
        settings = {**shares, **self.peft}
        if settings["tinit"] >= self._total - settings["tfinal"]:
            raise ValueError(
                f"peft: adalora with tinit={settings['tinit']} and tfinal={settings['tfinal']} has no step between "
                f"them in an update of {self._total} steps: leave them out (a tenth and three tenths of an update)"
            )
        return settings

    def loss_term(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Tensor | None:
        """How far the rows of ``A`` and the columns of ``B`` are from orthogonal, a mean over all of them."""
        far = [torch.linalg.matrix_norm(one @ one.T - torch.eye(len(one), device=one.device)) for one in _sides(module)]
        weight: float = self._allocator.peft_config.orth_reg_weight
        return weight * torch.stack(far).mean()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After each step of the optimizer, take ranks away."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        step, last = self._seen - self._first, self._total - self._allocator.peft_config.tfinal
        if step <= last:
            _, pattern = self._allocator.update_and_allocate(pl_module.backbone, step, force_mask=step == last)
            self._pattern = pattern or self._pattern
        else:
            self._allocator.mask_using_rank_pattern(pl_module.backbone, self._pattern)

    def state_dict(self) -> dict[str, Any]:
        """What has been found within an update."""
        if self._allocator is None:
            return {}
        averages = {name: dict(getattr(self._allocator, name)) for name in _AVERAGES}
        return {"first": self._first, "total": self._total, "pattern": self._pattern, **averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`."""
        self._resumed = state_dict


def _sides(module: nn.Module) -> Iterator[Tensor]:
    """The matrices whose rows should be orthogonal: of each adapter ``A [rank, inputs]``, ``B`` transposed."""
    for name, weight in module.named_parameters():
        if ".lora_A." in name:
            yield weight
        elif ".lora_B." in name:
            yield weight.T
