"""The computation that is exported: the tokens of texts in, logits out, for any number of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evertune.export.kinds import input_names

_TOKENS = 7  # of the example; neither 0, 1 nor the number of texts, which torch.export would take for constants


class _Graph(nn.Module):
    """A module as a function of tensors in a fixed order."""

    def __init__(self, module: Any, names: list[str]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *tokens: Tensor) -> Tensor:
        logits: Tensor = self.module(**dict(zip(self.names, tokens, strict=True))).logits
        return logits


def example(names: Sequence[str], max_tokens: int | None = None) -> tuple[Tensor, ...]:
    """The tokens of two texts, by which a module is traced."""
    shape = 2, min(_TOKENS, max_tokens or _TOKENS)
    # A tensor for each input: torch.export would take one and the same for a single input.
    return tuple(torch.full(shape, int(name != "token_type_ids"), dtype=torch.long) for name in names)


def traced(module: Any) -> torch.export.ExportedProgram:
    """A module as a program of ``torch.export``, with any number of texts and tokens.

    Args:
        module: A module with its weights, in evaluation mode.

    Raises:
        ValueError: If its computation cannot be exported; the reason of torch follows.
    """
    names = input_names(module)
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with torch.no_grad():
            inputs = example(names, module.max_tokens)
            return torch.export.export(
                _Graph(module, names), inputs, dynamic_shapes=(tuple(any_size for _ in names),), strict=False
            )
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{type(module.backbone).__name__} cannot be exported by torch.export: {type(error).__name__}: {reason}; "
            "export it as safetensors"
        ) from error
