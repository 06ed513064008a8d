"""Bottleneck adapters: small residual networks behind layers of a frozen transformer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig:
    """The settings of bottleneck adapters.

    Args:
        reduction_factor: Size of the transformer divided by that of the bottleneck. Default: 16.
        target_modules: The layers behind which there is an adapter: ends of their names, or a regular expression for
            whole names. Default: the last layer of each MLP (Pfeiffer et al. 2021, "AdapterFusion"). With the output
            layers of attention as well, these are the adapters of Houlsby et al. (2019).

    Raises:
        ValueError: If ``reduction_factor`` is below 1.
    """

    reduction_factor: float = 16
    target_modules: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not self.reduction_factor >= 1:
            raise ValueError(f"peft: reduction_factor must be at least 1, got {self.reduction_factor}")


class Bottleneck(nn.Module):
    """A layer, and behind it ``h + up(gelu(down(h)))`` of its output ``h`` (Houlsby et al. 2019, "Parameter-Efficient
    Transfer Learning for NLP").

    Args:
        base_layer: The layer, which is frozen.
        width: Size of its output.
        size: Size of the bottleneck.

    Example:
        >>> import torch
        >>> layer = nn.Linear(8, 4)
        >>> x = torch.ones(2, 8)
        >>> adapted = Bottleneck(layer, width=4, size=2)
        >>> for weight in adapted.bottleneck_up.parameters():
        ...     _ = nn.init.zeros_(weight)  # without an effect, as adapters start
        >>> torch.equal(adapted(x), layer(x))
        True
    """

    def __init__(self, base_layer: nn.Module, width: int, size: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        dtype = next(base_layer.parameters()).dtype
        self.bottleneck_down = nn.Linear(width, size, dtype=dtype)
        self.bottleneck_up = nn.Linear(size, width, dtype=dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer says, and what the adapter adds to it."""
        hidden: Tensor = self.base_layer(*args, **kwargs)
        change: Tensor = self.bottleneck_up(F.gelu(self.bottleneck_down(hidden)))
        return hidden + change


def add_bottlenecks(backbone: nn.Module, config: BottleneckConfig, default: Sequence[str]) -> list[Bottleneck]:
    """Put an adapter behind layers of a transformer, whose weights are frozen.

    Args:
        backbone: The transformer.
        config: The settings.
        default: Names of the layers if the settings name none.

    Returns:
        The adapters; their weights are still to be drawn.

    Raises:
        ValueError: If there are no such layers, or one is not linear.
    """
    wanted = default if config.target_modules is None else config.target_modules
    names = [name for name, _ in backbone.named_modules() if _is_one_of(name, wanted)]
    if not names:
        raise ValueError(f"peft: target_modules={config.target_modules!r} names no layer of {type(backbone).__name__}")
    backbone.requires_grad_(False)
    added = []
    for name in names:
        layer = backbone.get_submodule(name)
        width = output_size(layer)
        if width is None:
            raise ValueError(f"peft: {name!r} is a {type(layer).__name__}; bottleneck adapters go behind linear layers")
        added.append(Bottleneck(layer, width, max(1, round(width / config.reduction_factor))))
        backbone.set_submodule(name, added[-1])
    return added


def output_size(layer: nn.Module) -> int | None:
    """Size of what a linear layer returns, also one of GPT-2's ``Conv1D``; None for other layers."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return int(layer.nf) if type(layer).__name__ == "Conv1D" else None  # type: ignore[arg-type]


def _is_one_of(name: str, wanted: str | Sequence[str]) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(f".{name}".endswith(f".{end}") for end in wanted)
