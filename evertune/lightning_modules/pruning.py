"""Structured pruning of feed-forward layers: the neurons that matter least for the loss are removed from each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from evertune.lightning_modules.backbone import encoder_layers
from evertune.tasks.base import losses
from evertune.utils.evaluation import evaluation_mode

_WIDTHS = ("intermediate_size", "hidden_dim")  # names that configurations give to the number of neurons


def prune_feed_forward(module: Any, share: float, batches: Iterable[Any]) -> None:
    """Remove the same share of neurons from every feed-forward layer of a transformer, in place.

    The importance of a neuron is how much the loss of an example would change without it, to the first order: the
    absolute sum, over the tokens, of its activation times the gradient (Molchanov et al. 2019, "Importance Estimation
    for Neural Network Pruning"), and then the sum over the examples. All layers keep equally many neurons, so that the
    transformer remains one that its configuration describes and every library reads. Attention heads are not removed: a
    configuration has no place for layers with fewer heads of the same size.

    Args:
        module: A module with a task and with its weights.
        share: Share of the neurons to remove, between 0 and 1.
        batches: Batches with labels, on the module's device; some hundred examples are enough.

    Raises:
        ValueError: If the share is out of range, or the transformer has no feed-forward layers of two linear ones, as
            BERT, RoBERTa, MPNet, ELECTRA and DistilBERT have.

    Example::

        prune_feed_forward(module, 0.5, batches)
        module.backbone.config.intermediate_size  # 1536, of 3072
    """
    if not 0 < share < 1:
        raise ValueError(f"the share of neurons to remove must be between 0 and 1, got {share}")
    config = module.backbone.config
    width = next((name for name in _WIDTHS if hasattr(config, name)), "")
    size = getattr(config, width, 0)
    _, layers = encoder_layers(module.backbone)
    pairs = [_feed_forward(layer, size) for layer in layers]
    n_kept = max(1, round(size * (1 - share)))
    for layer, (first, second), importance in zip(layers, pairs, _importance(module, pairs, batches), strict=True):
        kept = importance.topk(n_kept).indices.sort().values
        names = {linear: name for name, linear in layer.named_modules()}
        layer.set_submodule(names[first], _linear(first.weight[kept], None if first.bias is None else first.bias[kept]))
        layer.set_submodule(names[second], _linear(second.weight[:, kept], second.bias))
    setattr(config, width, n_kept)


def _feed_forward(layer: nn.Module, size: int) -> tuple[nn.Linear, nn.Linear]:
    """The linear layers from and to the features of a layer of the transformer, with ``size`` neurons between them."""
    linear = [one for one in layer.modules() if isinstance(one, nn.Linear)]
    first = [one for one in linear if one.out_features == size != one.in_features]
    second = [one for one in linear if one.in_features == size != one.out_features]
    if (len(first), len(second)) != (1, 1):
        raise ValueError(
            f"{type(layer).__name__} has no feed-forward layer of two linear ones, as those of BERT, RoBERTa, MPNet, "
            "ELECTRA and DistilBERT: its neurons cannot be removed"
        )
    return first[0], second[0]


def _importance(module: Any, pairs: list[tuple[nn.Linear, nn.Linear]], batches: Iterable[Any]) -> list[Tensor]:
    """The importance of each neuron, ``[neurons]`` for each layer."""
    found = [torch.zeros(second.in_features, device=second.weight.device) for _, second in pairs]
    activations: list[Tensor] = []

    def note(linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        activations.append(inputs[0] if inputs[0].requires_grad else inputs[0].requires_grad_())

    handles = [second.register_forward_pre_hook(note) for _, second in pairs]
    try:
        with evaluation_mode(module), torch.enable_grad():
            for batch in batches:
                activations.clear()
                loss = losses(module.task.outputs(module, batch)).sum()
                gradients = torch.autograd.grad(loss, activations)
                for number, (one, gradient) in enumerate(zip(activations, gradients, strict=True)):
                    found[number] += (one.detach() * gradient).sum(1).abs().sum(0)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype)
    made.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return made
