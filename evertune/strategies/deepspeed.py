"""DeepSpeed for consecutive fits on CPU and GPU: Lightning's strategy with several corrections."""

from __future__ import annotations

import argparse
import atexit
import copy
import os
import shutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from evertune._lightning import (
    deepspeed_base,
    join_deepspeed,
    package_to_inherit,
    pl,
    rank_zero_warn,
    remove_module_hooks,
    reset_seed,
)
from evertune.shards import portable
from evertune.shards.opened import shards_of
from evertune.shards.support import check_strategy, is_deepspeed
from evertune.strategies.extensions import load_extension
from evertune.strategies.masters import LiveMasters, leave_masters, masters_of
from evertune.utils.ranks import leave

if TYPE_CHECKING:
    from evertune._lightning import DeepSpeedStrategy

    EvertuneDeepSpeedStrategy: type[EvertuneDeepSpeed]
else:
    DeepSpeedStrategy = object  # strategy_class() adds that of the Lightning in use


class EvertuneDeepSpeed(DeepSpeedStrategy):
    """DeepSpeed ZeRO-1, 2 and 3 for one update after another, on GPUs over NCCL and on CPUs over gloo.

    Compared with Lightning's ``DeepSpeedStrategy``, it

    - runs on CPU;
    - divides the loss by ``accumulate_grad_batches`` only once;
    - rejects epochs that do not hold a whole number of accumulations (DeepSpeed's step counter would drift);
    - releases the engine at the end of a fit, so that its memory is free for the next one;
    - carries the fp32 master weights from one fit to the next in 16-bit training;
    - does not modify the configuration passed to it.

    It is registered as ``evertune_deepspeed_stage_1``, ``_2``, ``_3`` and, for offloading, ``_2_offload`` and
    ``_3_offload``, with both ``lightning`` and ``pytorch_lightning``. Use the class ``EvertuneDeepSpeedStrategy``: this
    one, derived from the ``DeepSpeedStrategy`` of the Lightning in use.

    Args:
        stage: ZeRO stage: 1 shards the optimizer, 2 also the gradients, 3 also the weights. Default: 2.
        config: DeepSpeed configuration or the path of one; it replaces all other settings.
        **settings: Arguments of Lightning's ``DeepSpeedStrategy``.

    Raises:
        ModuleNotFoundError: If DeepSpeed is not installed.

    Example::

        trainer = pl.Trainer(devices=2, accelerator="cpu", strategy="evertune_deepspeed_stage_2")
    """

    strategy_name = "evertune_deepspeed"
    portable = False
    """Whether checkpoints saved now must load on any number of processes and without pickle, like those of
    :class:`~evertune.callbacks.UpdateCheckpoint`. They only serve to resume inside a fit."""

    def __init__(self, stage: int = 2, config: str | Path | dict[str, Any] | None = None, **settings: Any) -> None:
        _prepare_environment()
        if not torch.cuda.is_available():  # the default buckets would take 800 MB per rank
            settings = {"overlap_comm": False, "reduce_bucket_size": 10_000_000, **settings}
            settings.setdefault("allgather_bucket_size", settings["reduce_bucket_size"])
        super().__init__(stage=stage, config=copy.deepcopy(config), **settings)
        if config is None and settings.get("offload_optimizer"):
            assert self.config is not None
            self.config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW has its own fused step on CPU

    def setup_distributed(self) -> None:
        """Join the process group; on CPU, without the check of CUDA device indices."""
        if self.root_device.type == "cuda":
            super().setup_distributed()
        else:
            reset_seed()
            self.set_world_ranks()
            load_extension()
            join_deepspeed(self)
        atexit.unregister(leave)  # registered once, regardless of the number of fits
        atexit.register(leave)

    def setup(self, trainer: pl.Trainer) -> None:
        """Build the engine for this fit, with the fp32 masters that the last fit left."""
        check_strategy(trainer, type(self).__name__)
        super().setup(trainer)
        masters = masters_of(trainer.lightning_module)
        engine: Any = self.model
        if masters is not None and trainer.training and _masters_differ(engine):
            masters.restore(shards_of(trainer), torch.bfloat16 if engine.bfloat16_enabled() else torch.float16)

    def on_train_start(self) -> None:
        """Reject an epoch whose last accumulation would be incomplete.

        Raises:
            ValueError: If ``accumulate_grad_batches`` does not divide the number of batches in an epoch.
        """
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        batches, accumulation = trainer.num_training_batches, trainer.accumulate_grad_batches
        if batches != float("inf") and batches % accumulation:
            raise ValueError(
                f"an epoch has {batches} batches, which accumulate_grad_batches={accumulation} does not divide: "
                f"DeepSpeed would lose count of its steps; set limit_train_batches={batches - batches % accumulation} "
                "or another accumulation"
            )

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Run the engine's backward pass on a loss that Lightning has already divided by the accumulation."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint folder, each rank its part: in DeepSpeed's format, or in evertune's if ``portable``.

        Raises:
            RuntimeError: If the engine has been released, after the fit.
        """
        if not hasattr(self.model, "save_checkpoint"):
            raise RuntimeError(
                "a DeepSpeed checkpoint can be saved only during fit, while its engine lives: use ModelCheckpoint, "
                "or save_pretrained of the module and save of the callbacks after fit"
            )
        if not self.portable:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        assert self.lightning_module is not None
        folder = Path(self.broadcast(filepath))
        folder.mkdir(parents=True, exist_ok=True)
        portable.save(self.lightning_module.trainer, checkpoint, folder, frozen=not self.exclude_frozen_parameters)

    @property
    def can_be_portable(self) -> bool:
        """Whether a checkpoint can be ``portable``: not if the optimizer is offloaded to NVMe or in part."""
        assert isinstance(self.config, dict)
        offload = self.config["zero_optimization"].get("offload_optimizer") or {}
        return offload.get("device") != "nvme" and offload.get("ratio", 1.0) == 1.0

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint folder of either format, each rank its part."""
        if not portable.is_portable(Path(checkpoint_path)):
            return super().load_checkpoint(checkpoint_path, weights_only)
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        return portable.load(trainer, Path(checkpoint_path), weights_only=weights_only is not False)

    def teardown(self) -> None:
        """Release the engine, its hooks and its buffers; the module keeps its weights as this rank holds them."""
        engine: Any = self.model
        module = self.lightning_module
        if module is not None and hasattr(engine, "destroy"):
            # Copied before the engine that owns them is destroyed.
            if module.trainer.training and _masters_differ(engine):
                leave_masters(module, LiveMasters(shards_of(module.trainer)))
            _release(engine)
            self.model = None
            self.optimizers = []
            self.lr_scheduler_configs = []
        super().teardown()

    def training_engine(self, model: Module, optimizer: Optimizer | None, lr_scheduler: Any = None) -> tuple[Any, Any]:
        """DeepSpeed's engine and its optimizer, on this rank's device, which on CPU has no index."""
        import deepspeed

        engine, deepspeed_optimizer, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self._device_rank),
            config=self.config,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        _fetch_once_a_step(engine)
        return engine, deepspeed_optimizer

    def inference_engine(self, model: Module) -> Any:
        """DeepSpeed's engine for evaluation outside of a fit."""
        import deepspeed

        assert isinstance(self.config, dict)
        kept = ["fp16", "bf16"]
        if self.zero_stage_3:
            kept += ["zero_allow_untested_optimizer", "zero_optimization"]
        config = {"train_micro_batch_size_per_gpu": 1} | {key: self.config[key] for key in kept if key in self.config}
        remove_module_hooks(model)
        engine, _, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self._device_rank),
            config=config,
            model=model,
            model_parameters=[],
            dist_init_required=False,
        )
        _fetch_once_a_step(engine)
        return engine

    @property
    def _device_rank(self) -> int:
        return self.root_device.index if self.root_device.index is not None else self.local_rank


@cache
def strategy_class(package: str) -> type[EvertuneDeepSpeed]:
    """``EvertuneDeepSpeedStrategy``, derived from the ``DeepSpeedStrategy`` of a Lightning package.

    Args:
        package: ``"lightning.pytorch"`` or ``"pytorch_lightning"``.
    """
    content = {"__module__": __name__, "__doc__": EvertuneDeepSpeed.__doc__}
    return type("EvertuneDeepSpeedStrategy", (EvertuneDeepSpeed, deepspeed_base(package)), content)


def __getattr__(name: str) -> Any:
    if name == "EvertuneDeepSpeedStrategy":
        return strategy_class(package_to_inherit())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _fetch_once_a_step(engine: Any) -> None:
    """Let ZeRO-3 count a step of Lightning as one forward pass.

    A ``training_step`` is a call of the module in which it calls itself. DeepSpeed starts a new forward pass at each of
    the two, and drops what it has fetched ahead in between: those weights would be gathered twice.
    """
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    if not hasattr(offload, "fwd_pre_hook"):
        return
    inside = 0

    def enter(module: Module, inputs: Any) -> None:
        nonlocal inside
        if inside == 0:
            offload.get_param_coordinator().reset_step()
        inside += 1

    def leave(module: Module, inputs: Any, output: Any) -> None:
        nonlocal inside
        inside -= 1

    offload.fwd_pre_hook.remove()
    offload.fwd_pre_hook = offload.module.register_forward_pre_hook(enter, prepend=True)
    offload.forward_hooks.append(offload.module.register_forward_hook(leave, always_call=True))  # removed with them


def _release(engine: Any) -> None:
    """Destroy an engine and remove all references that would keep it alive: its hooks, and those of the weights."""
    optimizer = engine.optimizer
    engine.destroy()
    for hook in ("module_forward_pre_hook", "module_forward_post_hook"):
        if hasattr(engine, hook):
            getattr(engine, hook).remove()
    for parameter in engine.module.parameters():
        vars(parameter).pop("_z3_optimizer", None)
    if hasattr(optimizer, "_backward_hook_state"):
        optimizer._backward_hook_state = None  # it refers to the engine
    engine.optimizer = None  # else destroyed again with the engine, and the next engine's fragments with it


def _masters_differ(engine: Any) -> bool:
    return bool(engine.bfloat16_enabled() or engine.fp16_enabled())


def _prepare_environment() -> None:
    """Let DeepSpeed run without a GPU, and put the installed ninja on the PATH for its one small C++ op."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if shutil.which("ninja") is None:
        try:
            import ninja
        except ModuleNotFoundError:
            return
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), ninja.BIN_DIR])


def warn_about_stock_deepspeed(trainer: pl.Trainer, who: str) -> None:
    """Warn about the defects of Lightning's own DeepSpeed strategy if it is in use."""
    if is_deepspeed(trainer) and not isinstance(trainer.strategy, EvertuneDeepSpeed):
        accumulation = trainer.accumulate_grad_batches
        divided = (
            f" With accumulate_grad_batches={accumulation} it divides the loss twice: every update is {accumulation} "
            "times too small."
            if accumulation > 1
            else " With accumulate_grad_batches above 1 it divides the loss twice."
        )
        rank_zero_warn(
            f"{who} runs under Lightning's own DeepSpeed strategy.{divided} It also keeps the engine of a finished "
            "fit in memory, drops the fp32 masters between fits, and needs CUDA. "
            "Use strategy='evertune_deepspeed_stage_...' instead."
        )
