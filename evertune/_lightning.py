"""Which Lightning is in use, and every name of it that evertune needs; nothing else imports it.

Projects import Lightning as ``lightning`` or as ``pytorch_lightning``: the same code in two packages, whose classes
are not each other's. The package that the process has imported decides; of two, ``EVERTUNE_LIGHTNING``.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytorch_lightning as pl  # noqa: F401
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment as SLURMEnvironment
    from lightning_fabric.utilities import move_data_to_device as move_data_to_device
    from lightning_fabric.utilities.seed import reset_seed as reset_seed
    from pytorch_lightning.callbacks import Checkpoint as Checkpoint
    from pytorch_lightning.callbacks import EarlyStopping as EarlyStopping
    from pytorch_lightning.callbacks import ModelCheckpoint as ModelCheckpoint
    from pytorch_lightning.callbacks import Timer as Timer
    from pytorch_lightning.cli import ActionConfigFile as ActionConfigFile  # type: ignore[attr-defined]
    from pytorch_lightning.cli import LightningArgumentParser as LightningArgumentParser
    from pytorch_lightning.cli import LightningCLI as LightningCLI
    from pytorch_lightning.core import LightningModule as LightningModule
    from pytorch_lightning.loops.progress import _ProcessedTracker as _ProcessedTracker
    from pytorch_lightning.strategies import DDPStrategy as DDPStrategy
    from pytorch_lightning.strategies import DeepSpeedStrategy as DeepSpeedStrategy
    from pytorch_lightning.strategies import SingleDeviceStrategy as SingleDeviceStrategy
    from pytorch_lightning.strategies import Strategy as Strategy
    from pytorch_lightning.strategies import StrategyRegistry as StrategyRegistry
    from pytorch_lightning.strategies.deepspeed import remove_module_hooks as remove_module_hooks
    from pytorch_lightning.trainer.states import RunningStage as RunningStage
    from pytorch_lightning.utilities import rank_zero_info as rank_zero_info
    from pytorch_lightning.utilities import rank_zero_warn as rank_zero_warn
    from pytorch_lightning.utilities.model_helpers import is_overridden as is_overridden
    from pytorch_lightning.utilities.seed import isolate_rng as isolate_rng

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
"""The two packages that Lightning's Trainer comes in."""

_FABRIC = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}
_FABRIC_NAMES = {
    "SLURMEnvironment": "plugins.environments.slurm",
    "move_data_to_device": "utilities",
    "reset_seed": "utilities.seed",
}
_NAMES = {
    "ActionConfigFile": "cli",
    "Checkpoint": "callbacks",
    "DDPStrategy": "strategies",
    "DeepSpeedStrategy": "strategies",
    "EarlyStopping": "callbacks",
    "LightningArgumentParser": "cli",
    "LightningCLI": "cli",
    "LightningModule": "core",
    "ModelCheckpoint": "callbacks",
    "RunningStage": "trainer.states",
    "SingleDeviceStrategy": "strategies",
    "Strategy": "strategies",
    "StrategyRegistry": "strategies",
    "Timer": "callbacks",
    "_ProcessedTracker": "loops.progress",
    "is_overridden": "utilities.model_helpers",
    "isolate_rng": "utilities.seed",
    "rank_zero_info": "utilities",
    "rank_zero_warn": "utilities",
    "remove_module_hooks": "strategies.deepspeed",
}


def package() -> str:
    """The package in use: ``lightning.pytorch`` or ``pytorch_lightning``."""
    asked = os.environ.get("EVERTUNE_LIGHTNING")
    if asked:
        return {"lightning": "lightning.pytorch"}.get(asked, asked)
    imported = [name for name in PACKAGES if name in sys.modules]
    if imported:
        return imported[-1]
    return "pytorch_lightning" if find_spec("pytorch_lightning") else "lightning.pytorch"


def __getattr__(name: str) -> Any:
    if name == "pl":
        value = import_module(package())
    elif name in _FABRIC_NAMES:
        value = getattr(import_module(f"{_FABRIC[package()]}.{_FABRIC_NAMES[name]}"), name)
    elif name in _NAMES:
        value = getattr(import_module(f"{package()}.{_NAMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value
