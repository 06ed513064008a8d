"""Adapters in a transformer, most of them PEFT's: their settings, and how they are added."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from evertune.lightning_modules.bottleneck import Bottleneck, BottleneckConfig, add_bottlenecks, output_size
from evertune.utils.extras import library

_PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
SETTINGS = {
    "lora": (
        "r",
        "lora_alpha",
        "lora_dropout",
        *_PLACES,
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "init_lora_weights",
    ),
    "adalora": (
        "init_r",
        "target_r",
        "lora_alpha",
        "lora_dropout",
        *_PLACES,
        "tinit",
        "tfinal",
        "deltaT",
        "beta1",
        "beta2",
        "orth_reg_weight",
    ),
    "ia3": ("target_modules", "exclude_modules", "feedforward_modules"),
    "bottleneck": ("reduction_factor", "target_modules"),
    "prompt_tuning": ("num_virtual_tokens",),
    "p_tuning": (
        "num_virtual_tokens",
        "encoder_reparameterization_type",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_dropout",
    ),
    "prefix_tuning": ("num_virtual_tokens", "prefix_projection", "encoder_hidden_size"),
}
"""The settings that may be given, by method. Others of PEFT's train or replace weights beside the adapters."""
PROMPTS = ("prompt_tuning", "p_tuning", "prefix_tuning")
"""The methods that train virtual tokens, see :class:`~evertune.lightning_modules.prompts.Prompt`."""
_CONFIGS = {
    "lora": "LoraConfig",
    "adalora": "AdaLoraConfig",
    "ia3": "IA3Config",
    "prompt_tuning": "PromptTuningConfig",
    "p_tuning": "PromptEncoderConfig",
    "prefix_tuning": "PrefixTuningConfig",
}
_N_VIRTUAL = 20
_ENDLESS = 2**31


def adapter_config(peft: Mapping[str, Any], n_steps: int = _ENDLESS) -> Any:
    """The configuration of PEFT for ``{"method": "lora", "r": 8, ...}``.

    Methods are ``lora`` (Hu et al. 2022; with ``use_dora``, DoRA of Liu et al. 2024), ``adalora`` (Zhang et al. 2023),
    ``ia3`` (Liu et al. 2022), and those of :data:`PROMPTS`, with 20 virtual tokens by default. PEFT has no
    ``bottleneck`` adapters: these are :class:`~evertune.lightning_modules.bottleneck.Bottleneck`.

    Args:
        peft: The method and its settings.
        n_steps: Number of steps of an update, for ``adalora``. Default: more than any has.

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
    for name in ("r", "init_r", "target_r", "num_virtual_tokens", "deltaT"):
        if settings.get(name, 1) < 1:
            raise ValueError(f"peft: {name} must be positive, got {settings[name]}")
    if method == "bottleneck":
        return BottleneckConfig(**settings)
    if method in PROMPTS:
        settings = {"num_virtual_tokens": _N_VIRTUAL, **settings}
    if method == "adalora":
        settings["total_step"] = n_steps
        if settings.get("target_r", 8) >= settings.get("init_r", 12):
            raise ValueError(
                f"peft: target_r={settings.get('target_r', 8)} must be below init_r={settings.get('init_r', 12)}, or "
                "no rank is taken away"
            )
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
            are those of DoRA or AdaLoRA and ZeRO-3 has partitioned the weights.
    """
    config = adapter_config(peft)
    if isinstance(config, BottleneckConfig):
        _draw(add_bottlenecks(backbone, config, _ends_of_mlps(backbone) if config.target_modules is None else ()))
        return
    refused = "use_dora" if getattr(config, "use_dora", False) else "adalora" if peft["method"] == "adalora" else None
    if refused and any(hasattr(weight, "ds_id") for weight in backbone.parameters()):
        raise ValueError(
            f"peft: {refused} needs whole weights, which ZeRO-3 has partitioned; use plain LoRA, or "
            f"{'one device or ddp' if refused == 'adalora' else 'the strategy evertune_fsdp2'}"
        )
    library("peft", "peft").inject_adapter_in_model(config, backbone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        for layer in backbone.modules():
            for name in layer.lora_A if hasattr(layer, "reset_lora_parameters") else ():
                if refused == "adalora":
                    layer.reset_lora_parameters(name)
                    continue
                with _whole([layer.lora_A[name].weight, layer.lora_B[name].weight]):
                    layer.reset_lora_parameters(name, config.init_lora_weights)


def _ends_of_mlps(backbone: Any) -> list[str]:
    """The names of the layers at the ends of the MLPs: those that return what the transformer adds up."""
    width = backbone.config.get_text_config().hidden_size
    return [name for name in mlp_layers(backbone) if output_size(backbone.get_submodule(name)) == width]


def _draw(adapters: list[Bottleneck]) -> None:
    """Draw the first weights of bottleneck adapters, which start without changing the transformer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        for adapter in adapters:
            down, up = adapter.bottleneck_down, adapter.bottleneck_up
            with _whole([down.weight, down.bias, up.weight, up.bias]):
                down.reset_parameters()
                nn.init.zeros_(up.weight)
                nn.init.zeros_(up.bias)


def merge_adapters(backbone: Any) -> None:
    """Add what adapters have learned to the weights under them, and remove the adapters: the outputs stay the same.

    Raises:
        ValueError: If they are bottleneck adapters, which no weights can stand for.
    """
    if any(isinstance(layer, Bottleneck) for layer in backbone.modules()):
        raise ValueError(
            "bottleneck adapters are not linear, and cannot be merged into the weights; `evertune serve` answers with "
            "such a version as it is"
        )
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
