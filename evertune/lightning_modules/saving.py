"""Saved modules: a folder with the weights as safetensors, the rest as JSON, and a hash of every file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evertune.utils import sharding
from evertune.utils.files import sha256
from evertune.utils.pretrained import check_folder
from evertune.utils.ranks import is_writer
from evertune.utils.typed_json import decode, from_json

MANIFEST = "evertune.json"
BACKBONE = "backbone."
WEIGHTS = "model.safetensors"
REST = "head.safetensors"
PROMPT = "prompt."
_ADAPTERS = (".lora_", ".ia3_", ".ranknum.", ".bottleneck_")  # in the names of an adapter's weights
FORMAT = 1


def name_in_transformer(name: str) -> str | None:
    """The name that transformers gives to a weight of a module; None for what is not the transformer's own.

    >>> name_in_transformer("backbone.layer.0.query.base_layer.weight")
    'layer.0.query.weight'
    >>> name_in_transformer("backbone.layer.0.query.lora_A.default.weight"), name_in_transformer("head.weight")
    (None, None)
    """
    if not name.startswith(BACKBONE) or _is_of_adapter(name):
        return None
    return name.removeprefix(BACKBONE).replace(".base_layer.", ".")


def whole(tensor: Tensor) -> Tensor:
    """A copy of a parameter on the CPU, gathered if DeepSpeed or FSDP2 has sharded it. Call on every rank."""
    if not hasattr(tensor, "ds_id"):
        return sharding.whole(tensor).cpu().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().cpu().clone()


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Gather all weights of a module, which a fit under ZeRO-3 or FSDP2 leaves sharded. Call on every rank."""
    partitioned = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not partitioned:
        with sharding.gathered(module):
            yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module on the CPU, on the writing rank; the other ranks get an empty dict. Call on every rank.

    A weight that the module holds under several names, such as word embeddings that are its output layer as well, has
    the first of them.
    """
    state = {}
    for name, tensor in _first_names(module).items():
        # One weight at a time, and on every rank: gathering a partitioned weight is a collective.
        value = whole(tensor)
        if is_writer():
            state[name] = value
    return state


def save_weights(module: nn.Module, path: Path) -> None:
    """Write all weights of any module to a safetensors file, shared ones only once. Call on every rank."""
    state = whole_state(module)
    if is_writer():
        from safetensors.torch import save_file

        save_file(state, path)


def load_weights(module: nn.Module, path: Path) -> None:
    """Load the file of :func:`save_weights` into a module with the same shapes. Call on every rank.

    Raises:
        ValueError: If the names or shapes differ from the module's.
    """
    _copy_into(_first_names(module), path)


def _first_names(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module's state, each under the first of its names."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def load_rest(module: nn.Module, folder: Path) -> None:
    """Load the weights saved outside the transformer into a module, partitioned or not. Call on every rank.

    Raises:
        ValueError: If the names or shapes differ from the module's.
    """
    state = module.state_dict(keep_vars=True)
    rest = {name: value for name, value in state.items() if name_in_transformer(name) is None}
    _copy_into(rest, folder / REST)


def holds_adapters(folder: Path) -> bool:
    """Whether the module saved in a folder has adapters, or a prompt."""
    from safetensors import safe_open

    if not (folder / REST).is_file():
        return False
    with safe_open(folder / REST, framework="pt") as file:
        return any(map(_is_of_adapter, file.keys()))


def _is_of_adapter(name: str) -> bool:
    return name.startswith(PROMPT) or any(part in name for part in _ADAPTERS)


def _copy_into(own: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import load_file

    saved = load_file(path) if path.is_file() else {}
    shapes = {name: tuple(getattr(value, "ds_shape", value.shape)) for name, value in own.items()}
    found = {name: tuple(value.shape) for name, value in saved.items()}
    if shapes != found:
        raise ValueError(f"{path} holds the weights {found}, but the module has {shapes}")
    with torch.no_grad():
        for name, tensor in own.items():
            if hasattr(tensor, "ds_id"):
                import deepspeed

                # Rank 0's values are broadcast when the context exits; the other ranks' writes are dropped.
                with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
                    tensor.copy_(saved[name])
            else:
                sharding.set_whole(tensor, saved[name])


@dataclass(frozen=True)
class SavedModule:
    """The content of a module's ``evertune.json``.

    Args:
        module: Name of the module's class.
        hparams: Arguments of its constructor.
        sha256: SHA-256 of every other file, by its name.
        format: Version of the file's format.
    """

    module: str
    hparams: dict[str, Any]
    sha256: dict[str, str]
    format: int = FORMAT


def write_manifest(folder: Path, module: str, hparams: dict[str, Any]) -> None:
    """Write ``evertune.json`` last, with the SHA-256 of every other file: without it, a folder holds no module."""
    manifest = SavedModule(module, hparams, {path.name: sha256(path) for path in _hashed(folder)})
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")


def _hashed(folder: Path) -> list[Path]:
    """The files of a saved module that its manifest lists."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix in (".safetensors", ".json", ".jinja") and path.name != MANIFEST
    )


def read_manifest(folder: Path) -> SavedModule:
    """Read ``evertune.json`` and verify every file against it.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If a file is damaged, truncated, of another format, not listed or could run code.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {MANIFEST}: it was not written by save_pretrained")
    try:
        content = decode(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT}, the one that this version of evertune reads")
    try:
        manifest = from_json(SavedModule, content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    check_folder(folder, saved=True)
    if added := sorted(path.name for path in _hashed(folder) if path.name not in manifest.sha256):
        raise ValueError(f"{folder / added[0]} is not listed in {MANIFEST}: it was added later")
    for name, expected in manifest.sha256.items():
        if Path(name).name != name:
            raise ValueError(f"{path} names a file outside its folder: {name!r}")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing")
        if sha256(folder / name) != expected:
            raise ValueError(f"{folder / name} is damaged or cut short: it does not match the sha256 in {MANIFEST}")
    return manifest
