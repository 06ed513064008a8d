"""Shrink and perturb: an update starts from smaller, noisier weights, which learn new data better."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evertune._lightning import pl
from evertune.callbacks.base import ContinualCallback
from evertune.callbacks.state import load_state, save_state
from evertune.shards.opened import shards_of
from evertune.shards.shards import ParameterShards
from evertune.shards.support import check_strategy
from evertune.strategies.deepspeed import warn_about_stock_deepspeed

_STATE = "shrink_perturb.json"


@dataclass
class _Saved:
    """The content of the file that :meth:`ShrinkPerturb.save` writes."""

    experience_index: int


class ShrinkPerturb(ContinualCallback):
    """Shrinks all trainable weights and adds noise to them when an experience starts, on any strategy of evertune.

    ::

        theta_i <- shrink * theta_i + noise * e_i,    e_i ~ N(0, 1)

    (Ash & Adams 2020, "On warm-starting neural network training".) A model that is trained on, again and again, learns
    new data less well than a fresh one; this keeps what it knows and restores some of its plasticity. It acts before
    every experience but the first. The noise depends on the seed, the experience and the position of the parameter, so
    it is the same on any number of processes.

    Args:
        shrink: Factor of the weights, in (0, 1]. Default: 0.9. Neither default has been tuned; the paper trains from
            scratch, so with a pretrained model start nearer to 1.
        noise: Standard deviation of what is added, not negative. Default: 0.01.
        seed: Seed of the noise. Default: 0.

    Raises:
        ValueError: If an argument is out of range. In ``setup``, if the strategy is not supported.

    Example::

        callbacks = [Replay(memory_size=2_000), ShrinkPerturb(shrink=0.99, noise=1e-3)]
        pl.Trainer(max_epochs=3, callbacks=callbacks).fit(module, first_data)
        pl.Trainer(max_epochs=3, callbacks=callbacks).fit(module, second_data)
    """

    def __init__(self, shrink: float = 0.9, noise: float = 0.01, seed: int = 0) -> None:
        if not 0 < shrink <= 1:
            raise ValueError(f"shrink must be above 0 and at most 1, got {shrink}")
        if not 0 <= noise < float("inf"):
            raise ValueError(f"noise must be finite and not negative, got {noise}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.shrink = shrink
        self.noise = noise
        self.seed = seed

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_strategy(trainer, type(self).__name__)
            warn_about_stock_deepspeed(trainer, type(self).__name__)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A fit that resumes has started before."""
        if trainer.ckpt_path is None:
            super().on_fit_start(trainer, pl_module)

    def on_experience_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Change the weights before the first step, unless it is the first experience."""
        if self.experience_index > 0:
            shards = shards_of(trainer)
            shards.set_values(list(self._changed(shards)))

    def _changed(self, shards: ParameterShards) -> Iterator[Tensor]:
        numbers = {name: number for number, name in enumerate(shards.shapes)}
        for fragment, value in zip(shards.fragments, shards.values(), strict=True):
            seed = np.random.SeedSequence([self.seed, self.experience_index, numbers[fragment.name]])
            generator = torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
            drawn = fragment.slice(torch.randn(fragment.shape.numel(), generator=generator)).to(value.device)
            yield (self.shrink * value.float()).add_(drawn, alpha=self.noise)

    # --- what is saved

    def state_dict(self) -> dict[str, Any]:
        """Numbers only."""
        return {"experience_index": self.experience_index}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`."""
        self.experience_index = state_dict["experience_index"]

    def save(self, directory: str | Path) -> None:
        """Write the number of experiences to a folder, as JSON. Call on every rank."""
        save_state(Path(directory) / _STATE, _Saved(self.experience_index))

    def load(self, directory: str | Path) -> None:
        """Read what :meth:`save` wrote, at any world size.

        Raises:
            FileNotFoundError: If the folder holds no such file.
            ValueError: If the file is corrupt.
        """
        self.experience_index = load_state(_Saved, Path(directory) / _STATE).experience_index
