"""Attention roll-out: how much of each word reaches the vector that the head reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evertune.explain.parts import Part, by_part, tokens_of
from evertune.lightning_modules.backbone import pool, resolve_pooling


def attention_rollout(module: Any, text: str) -> list[Part]:
    """The share of each word in what the head reads, as attention passes it on (Abnar & Zuidema 2020, "Quantifying
    Attention Flow in Transformers").

    In each layer a token is taken to consist to one half of itself, and to the other of the tokens that it attends to,
    by the mean of the heads. The shares of the layers are multiplied, and those of the tokens that the head reads are
    averaged. They are the same for every class, are not negative, and add up to 1 with those of special tokens. One
    forward pass; attention is not an explanation by itself, so compare the result with another method.

    Args:
        module: Module that classifies texts, with a ``tokenizer`` that gives offsets, and a ``backbone`` whose pooled
            outputs the head reads.
        text: The text.

    Raises:
        TypeError: If the module has none of these, or its transformer has no attention that can be read.

    Example::

        for part in attention_rollout(module, "Shares fell after the merger"):
            print(part.text, part.effect)
    """
    if not hasattr(module, "pooling"):
        raise TypeError(f"{type(module).__name__} pools no tokens whose attention could be followed; use occlusion")
    batch, places, _ = tokens_of(module, text)
    layers = _attentions(module.backbone, batch)
    shares = torch.eye(len(places), dtype=torch.float64, device=module.device)
    for layer in layers:
        attention = layer[0].double().mean(0)
        shares = (attention / attention.sum(-1, keepdim=True) + torch.eye(len(places)).to(attention)) / 2 @ shares
    pooling = resolve_pooling(module.pooling, module.backbone.config)
    read = pool(shares[None], batch.get("attention_mask"), pooling)[0]
    return by_part(text, places, read.tolist())


def _attentions(backbone: Any, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The attention of each layer, ``[texts, heads, tokens, tokens]``, which only one implementation gives."""
    usual = backbone.config._attn_implementation
    if usual != "eager":
        backbone.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            found = getattr(backbone(**batch, output_attentions=True), "attentions", None)
    finally:
        if usual != "eager":
            backbone.set_attn_implementation(usual)
    if not found or any(layer is None for layer in found):
        raise TypeError(f"{type(backbone).__name__} has no attention that can be followed; use occlusion")
    return tuple(found)
