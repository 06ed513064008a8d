"""The sizes of a model, from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from evertune.utils.pretrained import load_config

MATCHING = "TextMatchingModule"

MODULES = ("SequenceClassificationModule", "OrdinalClassificationModule", "TokenClassificationModule", MATCHING)
"""The modules of :mod:`evertune.lightning_modules` whose size is known without their weights."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a model that determine its cost.

    Args:
        groups: Number of elements of each trainable parameter, by parameter group of the optimizer.
        frozen: Number of elements of each parameter that is not trained.
        layers: Number of transformer layers that the backward pass goes through.
        hidden: Number of features of a token between layers.
        intermediate: Number of features inside the feed-forward part of a layer.
        heads: Number of attention heads.
        kv_heads: Number of heads of the attention's keys and values.
        gated: Whether the feed-forward part has a gate (SwiGLU), and so three matrices instead of two.
        rms_norm: Whether the norms are RMSNorm, which transformers computes in fp32.
        dropout: Whether any layer uses dropout.
        eager_attention: Whether attention keeps the scores of all pairs of tokens, which fused kernels do not.
    """

    groups: tuple[tuple[int, ...], ...]
    frozen: tuple[int, ...] = ()
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    gated: bool = False
    rms_norm: bool = False
    dropout: bool = True
    eager_attention: bool = False

    @property
    def trainable(self) -> int:
        """Number of elements that are trained."""
        return sum(map(sum, self.groups))

    @property
    def total(self) -> int:
        """Number of all elements, the frozen ones included."""
        return self.trainable + sum(self.frozen)

    @property
    def trainable_sizes(self) -> list[int]:
        """Number of elements of each trainable parameter."""
        return [size for group in self.groups for size in group]

    @property
    def sizes(self) -> list[int]:
        """Number of elements of each parameter, the frozen ones last."""
        return [*self.trainable_sizes, *self.frozen]

    @property
    def largest(self) -> int:
        """Number of elements of the largest parameter."""
        return max(self.sizes, default=0)


def shape_of(settings: Mapping[str, Any], n_classes: int, module_class: str = MODULES[0]) -> ModelShape:
    """Build a model from its configuration, with its head but without weights, on torch's meta device.

    Args:
        settings: Settings of the module.
        n_classes: Number of classes, on which the rows of the head depend.
        module_class: Name of the module's class, one of :data:`MODULES`. Default: the classifier of texts.

    Returns:
        The sizes of the model.

    Raises:
        OSError: If the configuration cannot be found.
        ValueError: If a setting is invalid, or the configuration is not that of a transformer that evertune can train.
    """
    import torch
    from torch import nn
    from transformers import AutoModel

    from evertune.lightning_modules.backbone import encoder_layers, freeze, override_dropout, quiet_transformers

    classes = {} if module_class == MATCHING else {"classes": [str(number) for number in range(n_classes)]}
    module: Any = getattr(import_module("evertune.lightning_modules"), module_class)(**{**settings, **classes})
    name = module.model_name_or_path
    with quiet_transformers():
        config = load_config(name)
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder ({config.model_type}), which is not supported")
    if module.dropout is not None:
        override_dropout(config, module.dropout)
    with quiet_transformers(), torch.device("meta"):
        module.backbone = AutoModel.from_config(config)
        # Drop the pooler as the module itself does, since nothing would train it.
        if isinstance(getattr(module.backbone, "pooler", None), nn.Module):
            module.backbone.pooler = None
        freeze(module.backbone, module.freeze_layers)
        module.configure_head()
        module.configure_adapters()
    parameters = list(module.parameters())
    trained = [p for p in parameters if p.requires_grad]
    # The module's optimizer has two groups: matrices, which decay, and vectors, which do not.
    groups = ([p.numel() for p in trained if p.ndim > 1], [p.numel() for p in trained if p.ndim <= 1])
    layers = encoder_layers(module.backbone)[1]
    text = config.get_text_config()  # of a model of several modalities, the part that reads text
    heads = getattr(text, "num_attention_heads", None)
    if heads is None or getattr(text, "hidden_size", None) is None:
        raise ValueError(f"the configuration of {name} ({config.model_type}) does not tell its hidden_size and heads")
    # Configurations name the width of the feed-forward part differently; some do not name it at all.
    widest = max(max(p.shape) for p in layers[0].parameters() if p.ndim > 1)
    given = (getattr(text, key, None) for key in ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim"))
    intermediate = next((size for size in given if size is not None), widest)
    # With a gate, three matrices have this width, or two of them are fused into one of double width.
    sides = [max(p.shape) for p in layers[0].parameters() if p.ndim == 2]
    return ModelShape(
        groups=tuple(tuple(group) for group in groups if group),
        frozen=tuple(p.numel() for p in parameters if not p.requires_grad),
        layers=sum(any(p.requires_grad for p in layer.parameters()) for layer in layers),
        hidden=text.hidden_size,
        intermediate=intermediate,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        gated=sides.count(intermediate) > 2 or 2 * intermediate in sides,
        rms_norm=any("RMSNorm" in type(part).__name__ for part in layers.modules()),
        dropout=any(isinstance(part, nn.Dropout) and part.p > 0 for part in layers.modules()),
        eager_attention=getattr(text, "_attn_implementation", None) == "eager",
    )


def texts_of_example(module_class: str, settings: Mapping[str, Any]) -> tuple[int, int]:
    """How many texts the model reads of an example in training, and where its importance is estimated."""
    if module_class != MATCHING:
        return 1, 1
    n_negatives = int(settings.get("n_negatives", 7))
    if settings.get("architecture") == "cross_encoder":
        return 1 + n_negatives, 1 + n_negatives
    return 2 + n_negatives if settings.get("negatives") else 2, 2 + n_negatives
