"""FSDP2 for consecutive fits on CPU and GPU, of any module."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from evertune._lightning import fsdp2_base, package_to_inherit, pl
from evertune.shards import portable
from evertune.shards.support import FSDP2, check_strategy
from evertune.utils import sharding
from evertune.utils.ranks import leave

if TYPE_CHECKING:
    from evertune._lightning import ModelParallelStrategy

    EvertuneFSDP2Strategy: type[EvertuneFSDP2]
else:
    ModelParallelStrategy = object  # strategy_class() adds that of the Lightning in use


_BUFFERS = "evertune.buffers"
"""Key in a checkpoint of the module's buffers."""
TIMEOUT = timedelta(minutes=30)


class EvertuneFSDP2(ModelParallelStrategy):
    """FSDP2 (``fully_shard``) for one update after another, on GPUs over NCCL and on CPUs over gloo.

    Each rank holds a part of the weights, of their gradients and of the optimizer's state, and trains on its own part
    of the data. Compared with Lightning's ``ModelParallelStrategy``, it

    - shards the module itself: every block of a transformer (the elements of its ``ModuleList``), and the module with
      all other weights. ``configure_model`` need not call ``fully_shard``; what it has sharded stays as it is;
    - trains all ranks on different data by default, also on one node;
    - lets ``training_step`` use the weights of the module directly, not only through ``forward``;
    - makes the module a plain one again after the fit, of whose weights each rank holds its part. The next fit, on a
      head that may have grown, shards it again;
    - saves checkpoints that any number of processes can read, without pickle.

    Weights and gradients are those of the module's precision; ``precision="bf16-mixed"`` computes in bf16 on fp32
    weights. It is registered as ``evertune_fsdp2``, with both ``lightning`` and ``pytorch_lightning``. Use the class
    ``EvertuneFSDP2Strategy``: this one, derived from the ``ModelParallelStrategy`` of the Lightning in use.

    Args:
        process_group_backend: ``"nccl"`` or ``"gloo"``. None (default) chooses by the device.
        timeout: How long a rank waits for the others. Default: 30 minutes, as torch has it.

    Example::

        trainer = pl.Trainer(devices=2, accelerator="cpu", strategy="evertune_fsdp2")
    """

    strategy_name = FSDP2

    def __init__(self, *, process_group_backend: str | None = None, timeout: timedelta = TIMEOUT) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)

    def setup_environment(self) -> None:
        """Join the process group."""
        super().setup_environment()
        atexit.unregister(leave)  # registered once, regardless of the number of fits
        atexit.register(leave)

    def setup(self, trainer: pl.Trainer) -> None:
        """Shard the module for this fit."""
        check_strategy(trainer, type(self).__name__)
        super().setup(trainer)

    def shard(self) -> None:
        """Shard the module."""
        assert self.model is not None
        sharding.shard(self.model, self.device_mesh["data_parallel"], self.root_device)

    def run(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a step of the module with its weights gathered."""
        assert self.model is not None
        result = sharding.run(self.model, method, *args, **kwargs)
        if not self.model.training:
            sharding.reshard(self.model)  # no backward pass will
        return result

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The buffers; :meth:`save_checkpoint` saves the weights as each rank holds them."""
        assert self.lightning_module is not None
        state: Mapping[str, Tensor] = self.lightning_module.state_dict(keep_vars=True)
        parameters = {id(parameter) for parameter in self.lightning_module.parameters()}
        return {name: value.detach() for name, value in state.items() if id(value) not in parameters}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing: :meth:`save_checkpoint` saves the state of the optimizer as each rank holds it."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint folder, each rank its part."""
        assert self.lightning_module is not None
        folder = Path(self.broadcast(filepath))
        if folder.is_file():
            folder.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint[_BUFFERS] = checkpoint.pop("state_dict")
        portable.save(self.lightning_module.trainer, checkpoint, folder)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint folder, each rank its part.

        Raises:
            ValueError: If it is not a checkpoint of this strategy.
        """
        assert self.lightning_module is not None
        folder = Path(self.broadcast(checkpoint_path))
        if not portable.is_portable(folder):
            raise ValueError(
                f"{folder} is not a checkpoint that strategy {FSDP2!r} can read: it must be one that this strategy or "
                "UpdateCheckpoint under 'evertune_deepspeed_stage_...' has written"
            )
        checkpoint = portable.load(self.lightning_module.trainer, folder, weights_only=weights_only is not False)
        saved = checkpoint.pop(_BUFFERS, {})
        for name, buffer in self.lightning_module.named_buffers():
            if name in saved:
                buffer.copy_(saved[name])
        return {**checkpoint, "state_dict": {}}

    def teardown(self) -> None:
        """Make the module a plain one, whose weights remain as this rank holds them."""
        if self.model is not None:
            sharding.release(self.model)
        super().teardown()


@cache
def strategy_class(package: str) -> type[EvertuneFSDP2]:
    """``EvertuneFSDP2Strategy``, derived from the ``ModelParallelStrategy`` of a Lightning package.

    Args:
        package: ``"lightning.pytorch"`` or ``"pytorch_lightning"``.
    """
    content = {"__module__": __name__, "__doc__": EvertuneFSDP2.__doc__}
    return type("EvertuneFSDP2Strategy", (EvertuneFSDP2, fsdp2_base(package)), content)


def __getattr__(name: str) -> Any:
    if name == "EvertuneFSDP2Strategy":
        return strategy_class(package_to_inherit())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
