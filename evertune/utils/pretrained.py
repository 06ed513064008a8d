"""Configurations, models and tokenizers of transformers, loaded without running any code that comes with them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evertune.utils.heads import model_class
from evertune.utils.typed_json import decode

_PICKLES = frozenset({".bin", ".ckpt", ".pt", ".pth"})
"""Endings of weights that are unpickled."""
_RUNS_CODE = _PICKLES | {".h5", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".py", ".pyc", ".pyd", ".so", ".zip"}
_OWN = re.compile(r"[\w|]+")
"""The name of an implementation that belongs to transformers; that of code on the hub has a ``/``."""


def check_folder(folder: str | Path, *, saved: bool = False) -> None:
    """Refuse a model's folder that would make transformers run code, before anything of it is loaded.

    Args:
        folder: Folder of a model.
        saved: Whether ``save_pretrained`` of an evertune module wrote it. It then may not hold any file that can run
            code; otherwise such files are left alone, except weights that would have to be unpickled.

    Raises:
        ValueError: If a configuration names code (``auto_map``) or an implementation of attention from the hub, or the
            weights are not safetensors. The message names the file and says what to do.
    """
    folder = Path(folder)
    for path in sorted(folder.glob("*config.json")):
        try:
            content = decode(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        for place, key, value in _entries(content):
            if key == "auto_map" and value:
                raise ValueError(
                    f"{path} names code to run ({place}: {str(value)[:80]}), and evertune never runs code that comes "
                    f"with a model: if transformers has this kind of model itself, delete {place} from the file; "
                    "otherwise use another model"
                )
            if key.endswith(("attn_implementation", "experts_implementation")) and not _is_own(value):
                raise ValueError(
                    f"{path} asks for {place}={str(value)[:80]!r}, which is code from the hub, and evertune never runs "
                    "code that comes with a model: delete it from the file, or name one of transformers' own, "
                    "such as sdpa"
                )
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    harmful = sorted(path for path in files if path.suffix.lower() in _RUNS_CODE)
    if saved and harmful:
        raise ValueError(
            f"{harmful[0]} can run code when it is loaded, and save_pretrained does not write such files: somebody has "
            "added it. Delete it, or use a copy that you trust"
        )
    pickled = [path for path in harmful if path.parent == folder and path.suffix.lower() in _PICKLES]
    if pickled and not any(path.parent == folder and path.suffix == ".safetensors" for path in files):
        raise ValueError(
            f"the weights in {pickled[0]} are a pickle, which can run code when it is loaded: convert them once, where "
            f"you trust them, with AutoModel.from_pretrained({str(folder)!r}).save_pretrained(...), which writes "
            "safetensors"
        )


def load_config(name_or_path: str) -> Any:
    """The configuration of a pretrained model.

    Args:
        name_or_path: Name on the Hugging Face hub, or folder.

    Raises:
        OSError: If there is no such model.
        ValueError: If it asks for code that comes with it; see :func:`check_folder`.
    """
    from transformers import AutoConfig

    _check(name_or_path)
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    # From here on, transformers' own class counts; a copy that is saved must not name the other one.
    for part in _parts(config):
        vars(part).pop("auto_map", None)
        asked = [getattr(part, f"_{what}_implementation", None) for what in ("attn", "experts")]
        if not all(map(_is_own, asked)):
            raise ValueError(f"{name_or_path} asks for the implementations {asked}, of which one is code from the hub")
    return config


def load_model(name_or_path: str, *, auto_class: str = "AutoModel", **settings: Any) -> Any:
    """A pretrained transformer, from safetensors.

    Args:
        name_or_path: Name on the Hugging Face hub, or folder.
        auto_class: Class of transformers that makes it. Default: ``AutoModel``, a transformer without a head.
        settings: Arguments of its ``from_pretrained``. ``config`` is loaded by :func:`load_config` if missing.

    Raises:
        OSError: If there is no such model, or it has no safetensors.
        ValueError: If it asks for code that comes with it; see :func:`check_folder`.
    """
    _check(name_or_path)
    config = settings.pop("config", None) or load_config(name_or_path)
    return model_class(auto_class, config).from_pretrained(
        name_or_path, config=config, trust_remote_code=False, use_safetensors=True, **settings
    )


def load_tokenizer(name_or_path: str) -> Any:
    """The tokenizer of a pretrained model.

    Args:
        name_or_path: Name on the Hugging Face hub, or folder.

    Raises:
        OSError: If there is no such model.
        ValueError: If it asks for code that comes with it; see :func:`check_folder`.
    """
    from transformers import AutoTokenizer

    _check(name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer


def _check(name_or_path: str) -> None:
    if Path(name_or_path).is_dir():
        check_folder(name_or_path)


def _entries(value: Any, place: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every entry of nested objects: where it is, its key and its value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            here = f"{place}.{key}" if place else key
            yield here, key, inner
            yield from _entries(inner, here)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _entries(inner, f"{place}[{number}]")


def _is_own(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_own, value.values()))
    return value is None or (isinstance(value, str) and _OWN.fullmatch(value) is not None)


def _parts(config: Any) -> Iterator[Any]:
    """A configuration and those inside it."""
    yield config
    for name in config.sub_configs:
        if (inner := getattr(config, name, None)) is not None:
            yield from _parts(inner)
