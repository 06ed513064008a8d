"""Modules whose weights FSDP2 shards: into shards before a fit, whole for a while, and plain modules again after it.

During a fit every transformer block is a unit of its own, and the module itself is one with all other weights. Units
gather their weights for a pass through them, and release them. After the fit the weights remain as each rank holds
them, and nothing else of FSDP2 remains.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor, of which each rank holds a part."""
    loaded: Any = sys.modules.get("torch.distributed.tensor")  # heavy, and not needed where nothing is sharded
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def units(module: nn.Module) -> list[Any]:
    """The submodules that FSDP2 manages now, the module itself included; none outside of a fit under FSDP2."""
    loaded: Any = sys.modules.get("torch.distributed.fsdp")
    return [] if loaded is None else [one for one in module.modules() if isinstance(one, loaded.FSDPModule)]


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module as its author wrote it: FSDP2 replaces it during a fit."""
    loaded: Any = sys.modules.get("torch.distributed.fsdp")
    if loaded is None or not isinstance(module, loaded.FSDPModule):
        return type(module)
    return next(one for one in type(module).__mro__ if not issubclass(one, loaded.FSDPModule))


def blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model: the elements of its outermost ``ModuleList`` s that have sublayers and weights.

    Example:
        >>> layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3))
        >>> len(blocks(nn.ModuleDict({"embedding": nn.Embedding(5, 2), "layers": layers})))
        3
    """
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) and all(_is_block(one) for one in child):
            found += child
        else:
            found += blocks(child)
    return found


def _is_block(module: nn.Module) -> bool:
    return next(module.children(), None) is not None and next(module.parameters(), None) is not None


def shard(module: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Shard all weights of a module over the ranks of a mesh, one block at a time. Call on every rank.

    Args:
        module: Module with plain weights, or with those that :func:`release` left.
        mesh: One-dimensional mesh of all ranks.
        device: This rank's device, to which the weights are moved.

    Raises:
        ImportError: On a CPU, if torch is so old that it would add up the gradients of the ranks.
        ValueError: If a weight has no dimension along which it could be sharded.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if device.type == "cpu" and not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ImportError(
            f"FSDP2 of torch {torch.__version__} does not average gradients on a CPU, which torch 2.10 does: install "
            "it, or use another strategy"
        )
    if scalars := [name for name, p in module.named_parameters() if p.ndim == 0]:
        raise ValueError(
            f"FSDP2 cannot shard {scalars[0]!r}, which is a single number: give it the shape [1], or use another "
            "strategy"
        )
    for unit in [*blocks(module), module]:
        if unit not in units(module):  # else the user has sharded it
            _replace(unit, whole)  # what an earlier fit has left sharded
            unit.to(device)
            fully_shard(unit, mesh=mesh)
            type(unit).__name__ = kind_of(unit).__name__  # in messages and in what is saved
    if device.type == "cpu":  # gloo knows no average
        for unit in units(module):
            unit.set_force_sum_reduction_for_comms(True)
    # FSDP2 learns in the first forward pass which unit is the root. That must be the module, although callbacks may
    # call a part of it first.
    run(module, lambda: None)
    reshard(module)


def run(module: nn.Module, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a method of a module that FSDP2 manages as if it were ``forward``, so that its weights are whole.

    If the method calls the module, this is not another pass to FSDP2: after two, the weights outside of all blocks
    would be released, and gathered again for the backward pass.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        del module.forward  # the method may call the real one
        with _unnoticed(module):
            return method(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]
    try:
        return module(*args, **kwargs)
    finally:
        vars(module).pop("forward", None)


def reshard(module: nn.Module) -> None:
    """Release the weights that units have gathered, so that a module's parameters are its shards."""
    for unit in units(module):
        unit.reshard()


@contextmanager
def root_gathered(module: nn.Module) -> Iterator[None]:
    """Keep the weights outside of all blocks gathered, for passes through parts of a module. Call on every rank.

    Nothing happens to a module that FSDP2 does not manage.
    """
    if module not in units(module):
        yield
        return
    root: Any = module
    root.set_reshard_after_backward(False, recurse=False)
    root.unshard()
    try:
        yield
    except BaseException:
        if hasattr(root, "reset_iter_state"):  # of a pass that was not completed; newer versions of torch have it
            root.reset_iter_state()
        raise
    finally:
        root.set_reshard_after_backward(True, recurse=False)
        reshard(root)


def release(module: nn.Module) -> None:
    """Make a module that FSDP2 manages a plain one again, whose weights remain as this rank holds them."""
    reshard(module)
    for unit in units(module):
        _forget(unit)
    for part in module.modules():
        for name in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
            vars(part).pop(name, None)
        for hooks in vars(part).values():
            if isinstance(hooks, dict):
                for key in [key for key, hook in hooks.items() if _is_of_fsdp(hook)]:
                    del hooks[key]


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Hold all weights of a module whole that FSDP2 shards, or has sharded. Call on every rank.

    Changes of the weights inside the context are lost.
    """
    reshard(module)
    managed = units(module)
    undo = _replace(module, whole)
    for unit in managed:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in managed:
            unit.set_reshard_after_forward(unit is not module, recurse=False)
            unit.reshard()
        undo()


def whole(tensor: Tensor) -> Tensor:
    """A tensor itself, or what all ranks hold of it together. Call on every rank."""
    here: Any = tensor.detach()
    full: Tensor = here.full_tensor() if is_sharded(tensor) else here
    return full


@torch.no_grad()
def set_whole(tensor: Tensor, value: Tensor) -> None:
    """Overwrite a tensor, or this rank's part of it, by a value of its shape."""
    if not is_sharded(tensor):
        tensor.copy_(value)
        return
    own: Any = tensor.to_local()
    rows = -(-len(value) // tensor.device_mesh.size())
    start = rows * tensor.device_mesh.get_local_rank()
    own.copy_(value[start : start + len(own)])


def _replace(unit: nn.Module, make: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Replace the sharded parameters of a unit that FSDP2 does not manage; shared ones stay shared.

    Returns:
        A function that puts them back.
    """
    places: list[tuple[nn.Module, str, Any]] = [
        (part, name, parameter)
        for part in _parts(unit)
        for name, parameter in part._parameters.items()
        if parameter is not None and is_sharded(parameter)
    ]
    made: dict[int, nn.Parameter] = {}
    for part, name, parameter in places:
        if id(parameter) not in made:
            made[id(parameter)] = nn.Parameter(make(parameter), requires_grad=parameter.requires_grad)
        part._parameters[name] = made[id(parameter)]

    def put_back() -> None:
        for part, name, parameter in places:
            part._parameters[name] = parameter

    return put_back


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all submodules, without those that FSDP2 manages."""
    if kind_of(module) is type(module):
        yield module
        for child in module.children():
            yield from _parts(child)


# --- what is private to torch


def _forget(unit: nn.Module) -> None:
    """Give a unit its own class back, and remove FSDP2's notes about it."""
    from torch.distributed import _composable_state
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    unit.__class__ = kind_of(unit)
    for key in (STATE_KEY, REGISTRY_KEY):
        notes = vars(unit).get(key, {})
        for name in [name for name in notes if getattr(name, "__name__", name) == "fully_shard"]:
            del notes[name]
        if not notes:
            vars(unit).pop(key, None)
    _composable_state._module_state_mapping.pop(unit, None)


@contextmanager
def _unnoticed(module: nn.Module) -> Iterator[None]:
    """Calls of a module, in which FSDP2 does nothing for its own unit; its blocks do as ever."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    module._forward_pre_hooks, module._forward_hooks = (
        OrderedDict((key, hook) for key, hook in hooks.items() if not _is_of_fsdp(hook)) for hooks in (before, after)
    )
    try:
        yield
    finally:
        module._forward_pre_hooks, module._forward_hooks = before, after


def _is_of_fsdp(hook: Any) -> bool:
    """Whether FSDP2 has registered a hook."""
    hook = getattr(hook, "hook", hook)  # torch wraps some
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp._fully_shard")
