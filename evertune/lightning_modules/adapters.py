"""Adapters of PEFT in a transformer: their settings, and how they are added."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from evertune.utils.extras import library

SETTINGS = {
    "lora": (
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "init_lora_weights",
    ),
    "ia3": ("target_modules", "exclude_modules", "feedforward_modules"),
}
"""The settings of PEFT's ``LoraConfig`` and ``IA3Config`` that may be given, by method; the others train or replace
weights beside the adapters."""
_CONFIGS = {"lora": "LoraConfig", "ia3": "IA3Config"}


def adapter_config(peft: Mapping[str, Any]) -> Any:
    """The configuration of PEFT for ``{"method": "lora", "r": 8, ...}``.

    Methods are ``lora`` (Hu et al. 2022; with ``use_dora``, DoRA of Liu et al. 2024) and ``ia3`` (Liu et al. 2022).

    Raises:
        ModuleNotFoundError: If PEFT is not installed.
        ValueError: If the method or a setting is not supported, or a value is out of range.
    """
    settings = dict(peft)
    method = settings.pop("method", None)
    if method not in SETTINGS:
        raise ValueError(f"peft: method must be one of {', '.join(SETTINGS)}, got {method!r}")
    if unknown := sorted(settings.keys() - set(SETTINGS[method])):
        raise ValueError(f"peft: {unknown[0]!r} is not supported; use {', '.join(SETTINGS[method])}")
    if settings.get("init_lora_weights", True) not in (True, "gaussian"):
        raise ValueError(
            f"peft: init_lora_weights must be True or 'gaussian', got {settings['init_lora_weights']!r}: adapters must "
            "start without changing the transformer"
        )
    if settings.get("r", 8) < 1:
        raise ValueError(f"peft: r must be positive, got {settings['r']}")
    return getattr(library("peft", "peft"), _CONFIGS[method])(**settings)


_MLP = re.compile(
    r"\.(mlp|ffn|feed_forward|DenseReluDense)\.|\.(fc1|fc2|c_fc)$|(?<!attention)\.(intermediate|output)\.dense$"
)
_ROUTERS = ("gate", "router")


def mlp_layers(backbone: nn.Module) -> list[str]:
    """The names of the linear layers in the MLPs of a transformer, without the routers of experts.

    Raises:
        ValueError: If there are none under a usual name.
    """
    found = [
        name
        for name, layer in backbone.named_modules()
        if (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D")
        and _MLP.search(f".{name}")
        and name.rpartition(".")[2] not in _ROUTERS
    ]
    if not found:
        raise ValueError(
            f"cannot find the MLPs of {type(backbone).__name__}: name the layers to adapt, as in "
            'peft={"method": "lora", "r": 16, "target_modules": [...]}, or pass peft=None to train all weights'
        )
    return found


def add_adapters(backbone: Any, peft: Mapping[str, Any]) -> None:
    """Add trainable adapters to a transformer, and freeze all its other weights.

    They are drawn with the seed of the process (``seed_everything``), so that they are the same on all ranks.

    Raises:
        ValueError: If PEFT knows no ``target_modules`` for the transformer, or it has none of the given ones; if they
            are DoRA's and ZeRO-3 has partitioned the weights.
    """
    config = adapter_config(peft)
    if getattr(config, "use_dora", False) and any(hasattr(weight, "ds_id") for weight in backbone.parameters()):
        raise ValueError(
            "peft: use_dora needs the norms of whole weights, which ZeRO-3 has partitioned; use plain LoRA, or the "
            "strategy 'evertune_fsdp2'"
        )
    library("peft", "peft").inject_adapter_in_model(config, backbone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        for layer in backbone.modules():
            for name in layer.lora_A if hasattr(layer, "reset_lora_parameters") else ():
                with _whole([layer.lora_A[name].weight, layer.lora_B[name].weight]):
                    layer.reset_lora_parameters(name, config.init_lora_weights)


def merge_adapters(backbone: Any) -> None:
    """Add what adapters have learned to the weights under them, and remove the adapters: the outputs stay the same."""
    tuners = library("peft.tuners", "peft")
    kinds = tuners.lora.LoraLayer, tuners.ia3.IA3Layer
    for name, layer in list(backbone.named_modules()):
        if isinstance(layer, kinds):
            layer.merge()
            backbone.set_submodule(name, layer.get_base_layer())


def _whole(weights: list[Any]) -> Any:
    """A context in which weights can be set, also if ZeRO-3 has partitioned them when they were made."""
    if not hasattr(weights[0], "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(weights, modifier_rank=0)
