"""Chooses the Lightning package to use, and provides all that evertune needs of it; no other module imports Lightning.

Projects import Lightning as ``lightning`` or as ``pytorch_lightning``: the same code in two packages, so that each
class exists twice. evertune uses one of them, chosen when it is first needed (:func:`package`). With both imported:

- callbacks work with both: they derive from :class:`Callback` and :class:`Checkpoint` of this module;
- ``isinstance(value, either("DDPStrategy"))`` checks for a class of either package;
- what inherits from one of them (trainer, modules, datamodules, command line) is refused unless the user has chosen.

Whatever uses Lightning's private names is at the end of this file, in functions with plain names.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

TYPE_CHECKING = False  # `typing` takes longer to import than all of this
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

    import pytorch_lightning as pl
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment as SLURMEnvironment
    from lightning_fabric.utilities import move_data_to_device as move_data_to_device
    from lightning_fabric.utilities.seed import reset_seed as reset_seed
    from pytorch_lightning import LightningDataModule as LightningDataModule
    from pytorch_lightning import LightningModule as LightningModule
    from pytorch_lightning import Trainer as Trainer
    from pytorch_lightning.callbacks import Callback as Callback
    from pytorch_lightning.callbacks import Checkpoint as Checkpoint
    from pytorch_lightning.callbacks import EarlyStopping as EarlyStopping
    from pytorch_lightning.callbacks import ModelCheckpoint as ModelCheckpoint
    from pytorch_lightning.callbacks import Timer as Timer
    from pytorch_lightning.cli import ActionConfigFile as ActionConfigFile  # type: ignore[attr-defined]
    from pytorch_lightning.cli import LightningArgumentParser as LightningArgumentParser
    from pytorch_lightning.cli import LightningCLI as LightningCLI
    from pytorch_lightning.strategies import DDPStrategy as DDPStrategy
    from pytorch_lightning.strategies import DeepSpeedStrategy as DeepSpeedStrategy
    from pytorch_lightning.strategies import FSDPStrategy as FSDPStrategy
    from pytorch_lightning.strategies import ModelParallelStrategy as ModelParallelStrategy
    from pytorch_lightning.strategies import SingleDeviceStrategy as SingleDeviceStrategy
    from pytorch_lightning.strategies import Strategy as Strategy
    from pytorch_lightning.strategies.deepspeed import remove_module_hooks as remove_module_hooks
    from pytorch_lightning.trainer.states import RunningStage as RunningStage
    from pytorch_lightning.utilities import rank_zero_info as rank_zero_info
    from pytorch_lightning.utilities import rank_zero_warn as rank_zero_warn
    from pytorch_lightning.utilities.seed import isolate_rng as isolate_rng

    __all__ = ["pl"]  # handed on, as are the names above

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
"""The packages that contain Lightning's Trainer. ``lightning`` comes first: installing it also installs the other."""

_FABRIC = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}
_FABRIC_NAMES = {
    "SLURMEnvironment": "plugins.environments.slurm",
    "move_data_to_device": "utilities",
    "reset_seed": "utilities.seed",
}
# Each name with the submodule that holds it, in either package.
_NAMES = {
    "ActionConfigFile": "cli",
    "Callback": "callbacks",
    "Checkpoint": "callbacks",
    "DDPStrategy": "strategies",
    "DeepSpeedStrategy": "strategies",
    "EarlyStopping": "callbacks",
    "FSDPStrategy": "strategies",
    "LightningArgumentParser": "cli",
    "LightningCLI": "cli",
    "LightningDataModule": "core",
    "LightningModule": "core",
    "ModelCheckpoint": "callbacks",
    "ModelParallelStrategy": "strategies",
    "RunningStage": "trainer.states",
    "SingleDeviceStrategy": "strategies",
    "Strategy": "strategies",
    "Timer": "callbacks",
    "Trainer": "trainer",
    "isolate_rng": "utilities.seed",
    "rank_zero_info": "utilities",
    "rank_zero_warn": "utilities",
    "remove_module_hooks": "strategies.deepspeed",
}
_OF_ONE = ("LightningCLI", "LightningArgumentParser", "LightningDataModule", "LightningModule", "Trainer")
"""Base classes of evertune's own classes, from one package only."""

_OF_BOTH = ("Callback", "Checkpoint")
"""Base classes of evertune's own classes, from every package that is imported."""

# --- which package


class LightningError(ImportError):
    """Lightning is missing, or evertune cannot tell which of the two packages to use."""


_chosen: str | None = None
_by_user = False  # whether the user has chosen, by an import, an installation or the environment


def package() -> str:
    """The package in use: ``"lightning.pytorch"`` or ``"pytorch_lightning"``.

    It is chosen at the first call, for the rest of the process: the one that ``EVERTUNE_LIGHTNING`` names, else the
    only one imported, else the only one installed, else ``lightning`` (installing it also installs
    ``pytorch_lightning``, so whoever has both has asked for ``lightning``).

    Raises:
        LightningError: If neither is installed, or ``EVERTUNE_LIGHTNING`` names another package or one that is missing.
    """
    global _chosen, _by_user
    if _chosen is None:
        asked = os.environ.get("EVERTUNE_LIGHTNING")
        found = [_package_named(asked)] if asked else imported() or [one for one in PACKAGES if _is_installed(one)]
        if not found:
            raise LightningError(
                "evertune needs Lightning, which is not installed: pip install 'evertune[lightning]', or "
                "'evertune[pytorch-lightning]' for projects that import pytorch_lightning"
            )
        _chosen, _by_user = found[0], len(found) == 1
    return _chosen


def package_to_inherit() -> str:
    """The package in use, for classes that can inherit from one package only.

    Raises:
        LightningError: As for :func:`package`, and if both are imported and the user has not chosen.
    """
    one = package()
    if not _by_user and len(imported()) > 1:
        raise LightningError(
            f"{' and '.join(PACKAGES)} are both imported, and evertune cannot tell which of them its trainer, modules, "
            f"datamodules and command line shall be made with; {_HOW_TO_CHOOSE}"
        )
    return one


def imported() -> list[str]:
    """The packages that this process has imported."""
    return [one for one in PACKAGES if sys.modules.get(one) is not None]


def either(name: str) -> tuple[type[Any], ...]:
    """A class of Lightning in each package that is imported, for ``isinstance``.

    Example:
        >>> from evertune._lightning import either, pl
        >>> isinstance(pl.strategies.SingleDeviceStrategy("cpu"), either("SingleDeviceStrategy"))
        True
    """
    return tuple(_find(one, name) for one in imported())


def package_of(value: object) -> str | None:
    """The package whose classes a value's class inherits from; None if it is neither or both.

    The classes of Fabric, which each package comes with, count as well.
    """
    roots = {base.__module__.partition(".")[0] for base in type(value).__mro__}
    found = [one for one in PACKAGES if roots & {one.partition(".")[0], _FABRIC[one].partition(".")[0]}]
    return found[0] if len(found) == 1 else None


def refuse_other_package(owner: object, values: Sequence[object]) -> None:
    """Refuse values of the other package than their owner's, whose ``isinstance`` checks would not recognise them.

    Args:
        owner: Trainer, module or datamodule that the values are given to.
        values: Objects to check; those of neither package pass.

    Raises:
        TypeError: If a value is of the other package. The message names both packages, and how to choose.
    """
    own = package_of(owner)
    for value in values:
        other = package_of(value)
        if own is not None and other not in (None, own):
            raise TypeError(
                f"{type(owner).__name__} is made with {own}, but it was given a {type(value).__name__} made with "
                f"{other}; {_HOW_TO_CHOOSE}"
            )


def is_overridden(method: str, value: object) -> bool:
    """Whether a module or datamodule of either package defines a method that Lightning only declares."""
    from lightning_utilities.core.overrides import is_overridden as is_overridden_over

    parents = [one for one in either("LightningModule") + either("LightningDataModule") if isinstance(value, one)]
    return all(is_overridden_over(method, value, parent) for parent in parents) and hasattr(value, method)


_HOW_TO_CHOOSE = (
    "use one of the two throughout: import it, and not the other, before evertune, or set the environment variable "
    "EVERTUNE_LIGHTNING=lightning or EVERTUNE_LIGHTNING=pytorch_lightning"
)


def _package_named(name: str) -> str:
    named = {one.partition(".")[0]: one for one in PACKAGES}
    if name not in named:
        raise LightningError(f"EVERTUNE_LIGHTNING must be 'lightning' or 'pytorch_lightning', got {name!r}")
    if not _is_installed(named[name]):
        extra = name.replace("_", "-")
        raise LightningError(f"EVERTUNE_LIGHTNING={name}, but {name} is not installed: pip install 'evertune[{extra}]'")
    return named[name]


def _is_installed(one: str) -> bool:
    from importlib.util import find_spec

    return find_spec(one.partition(".")[0]) is not None


# --- its names


def __getattr__(name: str) -> Any:
    # Resolved here, so that the package is chosen when a name is first needed, not when this module is imported.
    if name == "pl":
        return import_module(package())
    if name not in _NAMES and name not in _FABRIC_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    one = package()
    if name in _OF_BOTH:
        return _of_both(name)
    return _find(package_to_inherit() if name in _OF_ONE else one, name)


def _find(one: str, name: str) -> Any:
    """What a name stands for in one of the packages."""
    home = f"{_FABRIC[one]}.{_FABRIC_NAMES[name]}" if name in _FABRIC_NAMES else f"{one}.{_NAMES[name]}"
    return getattr(import_module(home), name)


_made: dict[str, type[Any]] = {}


def _of_both(name: str) -> type[Any]:
    """A class that derives from Lightning's class of that name in every package that is imported, now or later."""
    if name not in _made:
        import_module(package())
        words = f"Lightning's {name}, of every package that is imported."
        _made[name] = type(name, either(name), {"__module__": __name__, "__doc__": words})
    return _made[name]


# --- when it is imported


def when_imported(act: Callable[[str], None]) -> None:
    """Call ``act(package)`` for each package: now if it has been imported, else right after its import."""
    _actions.append(act)
    for one in imported():
        act(one)
    if _awaited and _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


def _has_been_imported(one: str) -> None:
    _awaited.remove(one)
    if not _awaited:
        sys.meta_path.remove(_Finder)
    # Callbacks that were defined with one package become callbacks of the other as well.
    for name, made in _made.items():
        made.__bases__ = (*made.__bases__, _find(one, name))
    for act in _actions:
        act(one)


_actions: list[Callable[[str], None]] = []
_awaited = [one for one in PACKAGES if sys.modules.get(one) is None]


class _Finder:
    """An import hook that leaves the finding to the other finders, and notices when Lightning has been imported."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _awaited:
            return None
        others = (finder for finder in sys.meta_path if finder is not _Finder)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            loader, execute = spec.loader, spec.loader.exec_module

            def execute_and_tell(module: ModuleType) -> None:
                vars(loader).pop("exec_module", None)  # the loader is as it was again
                execute(module)
                _has_been_imported(name)

            loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec


# --- what is private to Lightning


def message_loggers() -> list[str]:
    """The loggers to which Lightning writes messages for the user, in either package."""
    fabric = [f"{one}.utilities.{name}" for one in _FABRIC.values() for name in ("rank_zero", "seed")]
    return [f"{one}.utilities.rank_zero" for one in PACKAGES] + fabric


def deepspeed_base(one: str) -> type[Any]:
    """Lightning's ``DeepSpeedStrategy`` for every device, with public methods that make its engines.

    A subclass defines ``training_engine(model, optimizer, lr_scheduler)``, which returns an engine and an optimizer,
    and ``inference_engine(model)``, which returns an engine.

    Args:
        one: The package to inherit from.
    """
    ddp = _find(one, "DDPStrategy")

    class DeepSpeedBase(_find(one, "DeepSpeedStrategy")):  # type: ignore[misc]
        def setup_environment(self) -> None:
            ddp.setup_environment(self)  # Lightning's own refuses every device but CUDA

        def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
            return self.training_engine(model, optimizer, lr_scheduler)  # type: ignore[no-any-return]

        def _initialize_deepspeed_inference(self, model: Any) -> None:
            self.model = self.inference_engine(model)

        def _auto_select_batch_size(self) -> int:
            return 1  # DeepSpeed uses it for its throughput log only, and not every loader has one

    return DeepSpeedBase


def join_deepspeed(strategy: Any) -> None:
    """Make a DeepSpeed strategy join the process group."""
    strategy._init_deepspeed_distributed()


def data_parallel_size(strategy: Any) -> int:
    """The number of ranks among which a ``ModelParallelStrategy`` divides the data."""
    size = strategy._data_parallel_size
    return int(strategy.num_nodes if size == "auto" else size)


def fsdp2_base(one: str) -> type[Any]:
    """Lightning's ``ModelParallelStrategy`` for data-parallel training, without what its ``setup`` asks of a module.

    A subclass defines ``shard()``, which shards ``self.model``, and ``run(method, *args)``, which calls a method of the
    module.

    Args:
        one: The package to inherit from.
    """
    parallel = _find(one, "ModelParallelStrategy")
    to_device = import_module(f"{_FABRIC[one]}.utilities.optimizer")._optimizers_to_device

    class FSDP2Base(parallel):  # type: ignore[misc, valid-type]
        model: Any

        def setup_environment(self) -> None:
            # Lightning's own default are as many data-parallel ranks as nodes: those of a node train on the same data.
            self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
            super().setup_environment()

        def setup(self, trainer: Any) -> None:
            fitting = trainer.state.fn == "fit"
            self.accelerator.setup(trainer)
            self.model = self.precision_plugin.convert_module(self.model)
            self.shard()
            self.barrier()
            if fitting:
                self.setup_optimizers(trainer)
            self.setup_precision_plugin()
            if fitting:
                to_device(self.optimizers, self.root_device)

        def teardown(self) -> None:
            if self.lightning_module is not None:
                self.lightning_module._device_mesh = None  # set for configure_model
            super().teardown()

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            with self.precision_plugin.train_step_context():
                return self.run(self.lightning_module.training_step, *args, **kwargs)

        def validation_step(self, *args: Any, **kwargs: Any) -> Any:
            with self.precision_plugin.val_step_context():
                return self.run(self.lightning_module.validation_step, *args, **kwargs)

        def test_step(self, *args: Any, **kwargs: Any) -> Any:
            with self.precision_plugin.test_step_context():
                return self.run(self.lightning_module.test_step, *args, **kwargs)

        def predict_step(self, *args: Any, **kwargs: Any) -> Any:
            with self.precision_plugin.predict_step_context():
                return self.run(self.lightning_module.predict_step, *args, **kwargs)

    return FSDP2Base


def keep_signals(trainer: Any) -> None:
    """Keep Lightning from handling any signal in this fit, until :func:`return_signals`."""
    trainer._signal_connector.register_signal_handlers = lambda: None


def return_signals(trainer: Any) -> None:
    """Undo :func:`keep_signals`."""
    vars(trainer._signal_connector).pop("register_signal_handlers", None)


def restore_later(trainer: Any, number: int, handler: Any) -> None:
    """Make Lightning install this handler of a signal at the end of the fit, instead of the one that it found."""
    trainer._signal_connector._original_handlers[number] = handler


def restore_nothing(trainer: Any, number: int) -> None:
    """Make Lightning leave a signal alone at the end of the fit."""
    trainer._signal_connector._original_handlers.pop(number, None)


def cluster_environment(trainer: Any) -> Any:
    """A trainer's view of the other processes."""
    return trainer._accelerator_connector.cluster_environment


def start_method(strategy: Any) -> str | None:
    """How a strategy copies this process: ``"spawn"``, ``"fork"`` or ``"forkserver"``; None if it starts new ones."""
    return getattr(strategy, "_start_method", None)


def is_training_done(trainer: Any) -> bool:
    """Whether the batch that ends now is the last of its epoch, or of the fit."""
    return bool(trainer.fit_loop.epoch_loop._is_training_done)


def validates_next(trainer: Any) -> bool:
    """Whether validation follows the training batch that ends now."""
    return bool(trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher))


def n_processed(counts: Any) -> int:
    """The number of batches that a training step has processed, from the counters of an epoch's loop."""
    return int(counts.processed)


def n_started(trainer: Any) -> int:
    """The number of batches, over all epochs, that a fit has trained on or is about to."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.started)


def reset_loaders(trainer: Any) -> None:
    """End the iterators over the training loaders, and with them their worker processes."""
    trainer.fit_loop._combined_loader.reset()


def train_data_source(trainer: Any) -> Any:
    """The object whose method ``dataloader`` gives a fit its training loaders."""
    return trainer.fit_loop._data_source


def combined_loader(trainer: Any) -> Any:
    """Lightning's ``CombinedLoader`` over the training loaders; None before they are set up."""
    return trainer.fit_loop._combined_loader


def combined_mode(loaders: Any) -> str | None:
    """The mode of a ``CombinedLoader``; None for other loaders."""
    return getattr(loaders, "_mode", None)


def has_loader_states(trainer: Any) -> bool:
    """Whether a checkpoint's state of the training loaders has not been restored yet."""
    return bool(trainer.fit_loop._combined_loader_states_to_load)


def give_loader_states(trainer: Any) -> None:
    """Restore the training loaders' state from a checkpoint, if there is one, and start to read from them."""
    trainer.fit_loop._load_combined_loader_states()
    iter(trainer.fit_loop._data_fetcher)


def set_precision(trainer: Any, precision: str) -> None:
    """Set the precision of a trainer that has none of DeepSpeed's or FSDP's: ``"32-true"`` or ``"bf16-mixed"``."""
    plugins, strategy = import_module(f"{package_of(trainer) or package()}.plugins"), trainer.strategy
    mixed = precision == "bf16-mixed"
    plugin = plugins.MixedPrecision(precision, strategy.root_device.type) if mixed else plugins.Precision()
    if strategy.precision_plugin.precision != plugin.precision:
        strategy.precision_plugin = plugin


def clip_in_bf16(trainer: Any) -> Callable[[Any, float | None, str | None], None] | None:
    """A function that clips gradients in torch's automatic mixed precision with bf16; None in every other precision.

    Lightning's own refuses optimizers with ``fused=True`` in any mixed precision.
    """
    plugins, plugin = import_module(f"{package_of(trainer) or package()}.plugins"), trainer.precision_plugin
    if not isinstance(plugin, plugins.MixedPrecision) or plugin.scaler is not None:
        return None

    def clip(optimizer: Any, value: float | None, algorithm: str | None) -> None:
        by = plugin.clip_grad_by_value if algorithm == "value" else plugin.clip_grad_by_norm
        if value:
            by(optimizer, value)

    return clip


def before_transfer(module: Any, batch: Any) -> Any:
    """A batch after the module's hook ``on_before_batch_transfer``, which runs before the move to the device."""
    return module._on_before_batch_transfer(batch, dataloader_idx=0)


def replace_method(owner: Any, name: str, method: Any) -> None:
    """Replace a method by a function, on this object alone, until :func:`return_method`.

    Args:
        owner: The strategy of a trainer, its :func:`train_data_source` or one of its loops.
        name: One of ``REPLACED``, of ``REPLACED_IN_SOURCE`` or of ``REPLACED_IN_LOOP``.
        method: A function with the method's arguments, without ``self``.
    """
    assert name in REPLACED + REPLACED_IN_SOURCE + REPLACED_IN_LOOP
    setattr(owner, name, method)


def return_method(owner: Any, name: str) -> None:
    """Undo :func:`replace_method`."""
    vars(owner).pop(name, None)


REPLACED = (
    *("process_dataloader", "batch_to_device", "save_checkpoint", "load_checkpoint", "on_train_end"),
    "on_train_batch_start",
)
"""Methods of a strategy that evertune wraps during a fit."""

REPLACED_IN_SOURCE = ("dataloader",)
"""Methods of a :func:`train_data_source` that evertune wraps during a fit."""

REPLACED_IN_LOOP = ("run",)
"""Methods of the loops of training and validation that evertune wraps during a fit."""
