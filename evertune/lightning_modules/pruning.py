"""Structured pruning: the feed-forward neurons and attention heads that matter least for the loss are removed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from evertune.lightning_modules.backbone import encoder_layers
from evertune.tasks.base import losses
from evertune.utils.evaluation import evaluation_mode
from evertune.utils.heads import KINDS, attentions, described_heads, n_groups

_WIDTHS = ("intermediate_size", "hidden_dim")  # names that configurations give to the number of neurons


def prune(module: Any, batches: Iterable[Any], *, neurons: float = 0.0, heads: float = 0.0) -> None:
    """Remove the same share of neurons and heads from every layer of a transformer, in place.

    The importance of a neuron or a head is how much the loss of an example would change without it, to the first
    order: the absolute sum, over the tokens and the features of a head, of its output times the gradient (Molchanov et
    al. 2019, "Importance Estimation for Neural Network Pruning"; Michel et al. 2019, "Are Sixteen Heads Really Better
    than One?"), and then the sum over the examples. Both are found in one pass. All layers keep equally many.

    With fewer neurons the transformer remains one that its configuration describes and every library reads. So it does
    with fewer heads if that has a ``head_dim``, as those of Llama, Mistral and Qwen; heads that share keys and values
    are removed together. BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, DistilBERT and DeBERTa (versions 2 and 3) have
    none: their configurations then get a key of evertune (:data:`~evertune.utils.heads.HEAD_SIZE`), without which
    nothing reads the weights.

    Args:
        module: A module with a task and with its weights.
        batches: Batches with labels, on the module's device; some hundred examples are enough.
        neurons: Share of the neurons of the feed-forward layers to remove, from 0 to below 1. Default: 0.
        heads: Share of the attention heads to remove, from 0 to below 1. Default: 0.

    Raises:
        ValueError: If a share is out of range, or of so few heads that it removes none or all; or if the transformer
            has no feed-forward layers of two linear ones, as BERT, RoBERTa, MPNet, ELECTRA and DistilBERT have, or no
            heads that can be removed.

    Example::

        prune(module, batches, neurons=0.5, heads=0.5)
        module.backbone.config.intermediate_size, module.backbone.config.num_attention_heads  # 1536 of 3072, 6 of 12
    """
    for name, share in (("neurons", neurons), ("heads", heads)):
        if not 0 <= share < 1:
            raise ValueError(f"the share of {name} to remove must be from 0 to below 1, got {share}")
    config = module.backbone.config
    found = attentions(module.backbone)
    n_heads, n_kept = _numbers(config, heads) if heads else (0, 0)
    described = described_heads(config, n_kept) if heads else {}
    width = next((name for name in _WIDTHS if hasattr(config, name)), "")
    size = getattr(config, width, 0)
    of_attention = {linear for one in found for linear in one.linear}
    layers: Iterable[nn.Module] = encoder_layers(module.backbone)[1] if neurons else []
    pairs = [_feed_forward(layer, size, of_attention) for layer in layers]
    units = [(second, size) for _, second in pairs] + ([(one.linear[-1], n_heads) for one in found] if heads else [])
    importance = _importance(module, units, batches) if units else {}
    for layer, (first, second) in zip(layers, pairs, strict=True):
        kept = _largest(importance[second], max(1, round(size * (1 - neurons))))
        names = {linear: name for name, linear in layer.named_modules()}
        layer.set_submodule(names[first], _linear(first.weight[kept], None if first.bias is None else first.bias[kept]))
        layer.set_submodule(names[second], _linear(second.weight[:, kept], second.bias))
        setattr(config, width, len(kept))
    if heads:
        for one in found:
            one.keep(_largest(importance[one.linear[-1]], n_kept), n_heads)
        config.update(described)


def _numbers(config: Any, share: float) -> tuple[int, int]:
    """The numbers of heads of a layer, and of those that are left; heads with the same keys and values are one."""
    if config.model_type not in KINDS:
        raise ValueError(
            f"attention heads are removed from {', '.join(KINDS)}, and not from a {config.model_type}: remove neurons "
            "or layers"
        )
    n = n_groups(config)
    n_kept = round(n * (1 - share))
    if not 0 < n_kept < n:
        raise ValueError(
            f"heads={share} removes {n - n_kept} of the {n} heads of a layer: it must remove one or more, and leave "
            "one or more"
        )
    return n, n_kept


def _feed_forward(layer: nn.Module, size: int, others: set[nn.Module]) -> tuple[nn.Linear, nn.Linear]:
    """The linear layers from and to the features of a layer of the transformer, with ``size`` neurons between them."""
    linear = [one for one in layer.modules() if isinstance(one, nn.Linear) and one not in others]
    first = [one for one in linear if one.out_features == size != one.in_features]
    second = [one for one in linear if one.in_features == size != one.out_features]
    if (len(first), len(second)) != (1, 1):
        raise ValueError(
            f"{type(layer).__name__} has no feed-forward layer of two linear ones, as those of BERT, RoBERTa, MPNet, "
            "ELECTRA and DistilBERT: its neurons cannot be removed"
        )
    return first[0], second[0]


def _importance(module: Any, units: list[tuple[nn.Linear, int]], batches: Iterable[Any]) -> dict[nn.Linear, Tensor]:
    """The importance of each of the units whose output a linear layer reads, ``[units]`` by the layer."""
    found = {linear: torch.zeros(n, device=linear.weight.device) for linear, n in units}
    outputs: dict[nn.Module, Tensor] = {}

    def note(linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        outputs[linear] = inputs[0] if inputs[0].requires_grad else inputs[0].requires_grad_()

    handles = [linear.register_forward_pre_hook(note) for linear in found]
    try:
        with evaluation_mode(module), torch.enable_grad():
            for batch in batches:
                loss = losses(module.task.outputs(module, batch)).sum()
                read = [outputs[linear] for linear in found]
                for (linear, n), one, gradient in zip(units, read, torch.autograd.grad(loss, read), strict=True):
                    of_examples = (one.detach() * gradient).sum(1)
                    found[linear] += of_examples.unflatten(1, (n, -1)).sum(2).abs().sum(0)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _largest(importance: Tensor, n: int) -> Tensor:
    """The places of the ``n`` largest, in order."""
    return importance.topk(n).indices.sort().values


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype)
    made.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return made
