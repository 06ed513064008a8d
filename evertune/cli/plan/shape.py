"""The sizes of a model, from its configuration alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

MATCHING = "TextMatchingModule"

GENERATION = ("CausalLMModule", "Seq2SeqModule")
MODULES = (
    "SequenceClassificationModule",
    "OrdinalClassificationModule",
    "SequenceRegressionModule",
    "TokenClassificationModule",
    "RelationExtractionModule",
    "QuestionAnsweringModule",
    MATCHING,
    *GENERATION,
)
"""The modules of :mod:`evertune.lightning_modules` whose size is known without their weights."""

UNTRAINED = ("AnalyticClassificationModule", "ZeroShotClassificationModule")
"""The modules of :mod:`evertune.lightning_modules` that have nothing to train."""

_LOGIT_ROWS = {"QuestionAnsweringModule": 2, "TokenClassificationModule": 0, "CausalLMModule": 0, "Seq2SeqModule": 0}
"""Rows of logits of an example, where it is not one; 0 for one of each token."""
_WIDTHS = ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "d_ff", "n_inner", "hidden_dim")


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
        rows: Length of the first dimension of each parameter, in the order of ``sizes``: FSDP2 cuts along it.
        blocks: Number of all and of the trainable elements of each block, which FSDP2 gathers one at a time.
        protected: Numbers of rows and columns of the matrices of which OSFT protects directions.
        decoder_layers: Number of layers of a decoder that reads an encoder, as ``layers``.
        outputs: Number of logits of each token, of a model that generates texts.
        virtual_tokens: Number of tokens that are trained before those of each text.
        adapted: Whether adapters are trained instead of the transformer.
        logit_rows: Number of rows of logits of an example; 0 for one of each token.
        logit_width: Number of logits of a row; 0 for one of each token.
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
    rows: tuple[int, ...] = ()
    blocks: tuple[tuple[int, int], ...] = ()
    protected: tuple[tuple[int, int], ...] = ()
    decoder_layers: int = 0
    outputs: int = 0
    virtual_tokens: int = 0
    adapted: bool = False
    logit_rows: int = 1
    logit_width: int = 1

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

    def rows_by_group(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Of each group and of the frozen parameters: the numbers of elements, and of rows; by element if unknown."""
        rows, found = iter(self.rows or self.sizes), []
        for group in (*self.groups, self.frozen):
            found.append((group, tuple(next(rows) for _ in group)))
        return found

    @property
    def root(self) -> tuple[int, int]:
        """Number of all and of the trainable elements outside of all blocks."""
        return self.total - sum(size for size, _ in self.blocks), self.trainable - sum(size for _, size in self.blocks)

    @property
    def largest(self) -> int:
        """Number of elements of the largest parameter."""
        return max(self.sizes, default=0)


def shape_of(
    settings: Mapping[str, Any],
    n_classes: int,
    module_class: str = MODULES[0],
    protects: Callable[[Any], Collection[str]] | None = None,
) -> ModelShape:
    """Build a module from its configuration, without weights, on torch's meta device.

    Args:
        settings: Settings of the module.
        n_classes: Number of classes, on which the rows of the head depend, if the module has classes.
        module_class: Name of the module's class, one of :data:`MODULES`. Default: the classifier of texts.
        protects: Names the matrices of a module of which OSFT protects directions. Default: none.

    Returns:
        The sizes of the model.

    Raises:
        OSError: If the configuration cannot be found.
        ValueError: If a setting is invalid, or the configuration is not that of a transformer that evertune can train.
    """
    import torch
    from torch import nn

    from evertune.lightning_modules.backbone import quiet_transformers
    from evertune.utils.sharding import blocks

    classes = {"classes": [str(number) for number in range(n_classes)]} if has_classes(module_class) else {}
    module: Any = getattr(import_module("evertune.lightning_modules"), module_class)(**{**settings, **classes})
    with quiet_transformers():
        backbone = module.skeleton()
        with torch.device("meta"):
            module.build(backbone)
    named = dict(module.named_parameters())
    parameters = list(named.values())
    trained, frozen = ([p for p in parameters if p.requires_grad is wanted] for wanted in (True, False))
    # The module's optimizer has two groups: matrices, which decay, and vectors, which do not.
    groups = [group for group in ([p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]) if group]
    layers = _layers(backbone)[0]
    text, heads = _text_config(module.model_name_or_path, backbone.config)
    # Configurations name the width of the feed-forward part differently; some do not name it at all.
    widest = max(max(p.shape) for p in layers[0].parameters() if p.ndim > 1)
    intermediate = next((getattr(text, key) for key in _WIDTHS if getattr(text, key, None) is not None), widest)
    # With a gate, three matrices have this width, or two of them are fused into one of double width.
    sides = [max(p.shape) for p in layers[0].parameters() if p.ndim == 2]
    n_layers, n_decoding = _reached(module)
    return ModelShape(
        groups=tuple(tuple(p.numel() for p in group) for group in groups),
        frozen=tuple(p.numel() for p in frozen),
        rows=tuple(p.shape[0] for p in (*(p for group in groups for p in group), *frozen)),
        blocks=tuple(
            (sum(p.numel() for p in block.parameters()), sum(p.numel() for p in block.parameters() if p.requires_grad))
            for block in blocks(module)
        ),
        protected=tuple((named[name].shape[0], named[name].shape[1]) for name in protects(module)) if protects else (),
        layers=n_layers,
        decoder_layers=n_decoding,
        hidden=text.hidden_size,
        intermediate=intermediate,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        gated=sides.count(intermediate) > 2 or 2 * intermediate in sides,
        rms_norm=any("RMSNorm" in type(part).__name__ for part in layers.modules()),
        dropout=any(isinstance(part, nn.Dropout) and part.p > 0 for part in layers.modules()),
        eager_attention="eager" in (module.attention, getattr(text, "_attn_implementation", None)),
        outputs=text.vocab_size if module_class in GENERATION else 0,
        virtual_tokens=0 if module.prompt is None else module.prompt.n_tokens,
        adapted=module.peft is not None,
        logit_rows=_LOGIT_ROWS.get(module_class, 1),
        logit_width=_logit_width(module_class, module, text.vocab_size),
    )


def has_classes(module_class: str) -> bool:
    """Whether a module has classes, on whose number its size depends."""
    from evertune.lightning_modules.named_classes import NamedClassesModule

    return issubclass(getattr(import_module("evertune.lightning_modules"), module_class), NamedClassesModule)


def _logit_width(module_class: str, module: Any, vocabulary: int) -> int:
    """Number of logits of a row; 0 for one of each token."""
    if module_class == "QuestionAnsweringModule":  # which token is the first of the answer, and which the last
        return 0
    if module_class == MATCHING:
        return 1 + int(module.task.n_negatives)
    if module_class in GENERATION:
        return vocabulary
    return int(module.n_rows if has_classes(module_class) else module.n_targets)


def _text_config(name: str, config: Any) -> tuple[Any, int]:
    """The part of a configuration that reads text, and its number of attention heads."""
    text = getattr(config, "encoder", None) or config
    text = text.get_text_config()  # of a model of several modalities
    heads = getattr(text, "num_attention_heads", None)
    if heads is None or getattr(text, "hidden_size", None) is None:
        raise ValueError(f"the configuration of {name} ({config.model_type}) does not tell its hidden_size and heads")
    return text, heads


def _layers(backbone: Any) -> list[Any]:
    """The stack of layers of a transformer, or those of its encoder and of its decoder."""
    from evertune.lightning_modules.backbone import encoder_layers

    parts = [backbone]
    if backbone.config.is_encoder_decoder:
        parts = [backbone.get_encoder(), backbone.get_decoder()]
    return [encoder_layers(part)[1] for part in parts]


def _reached(module: Any) -> tuple[int, int]:
    """Numbers of layers that gradients go through, of the encoder or only stack, and of the decoder.

    They go through every layer above the lowest weight that is trained; virtual tokens and embeddings are below all.
    """
    from torch import nn

    below = module.prompt is not None or any(
        layer.weight.requires_grad for layer in module.backbone.modules() if isinstance(layer, nn.Embedding)
    )
    reached = []
    for stack in _layers(module.backbone):
        trained = [any(p.requires_grad for p in layer.parameters()) for layer in stack]
        lowest = 0 if below else next((number for number, any_of in enumerate(trained) if any_of), len(stack))
        reached.append(len(stack) - lowest)
        below = below or lowest < len(stack)  # the decoder reads the encoder
    return reached[0], sum(reached[1:])


def texts_of_example(module_class: str, settings: Mapping[str, Any]) -> tuple[int, int]:
    """How many texts the model reads of an example in training, and where its importance is estimated."""
    if module_class != MATCHING:
        return 1, 1
    n_negatives = int(settings.get("n_negatives", 7))
    if settings.get("architecture") == "cross_encoder":
        return 1 + n_negatives, 1 + n_negatives
    return 2 + n_negatives if settings.get("negatives") else 2, 2 + n_negatives
