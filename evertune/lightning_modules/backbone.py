"""The pretrained transformer under a head: loading it, freezing its lower part, and pooling its output."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from evertune.utils.heads import model_class
from evertune.utils.pretrained import load_config, load_model

Pooling = Literal["auto", "mean", "cls", "last"]
Attention = Literal["auto", "sdpa", "eager"]
POOLINGS: tuple[str, ...] = get_args(Pooling)


def load_backbone(
    model_name_or_path: str,
    dropout: float | None = None,
    attention: Attention = "auto",
    auto_class: str = "AutoModel",
) -> Any:
    """Load a pretrained transformer in torch's default dtype and in training mode.

    A pooler is removed, because nothing would train it.

    Args:
        model_name_or_path: Name on the Hugging Face hub, or folder.
        dropout: Replaces every dropout probability of the configuration; None (default) keeps them.
        attention: Implementation of attention. ``auto`` (default) is the model's own.
        auto_class: Class of transformers that makes it. Default: ``AutoModel``, a transformer without a head.

    Raises:
        OSError: If there is no such model.
        ValueError: If it has no such attention, its weights are damaged, incomplete or a pickle, it asks for code that
            comes with it, or it is an encoder-decoder and the class is not one for those.
    """
    from safetensors import SafetensorError

    config = _config(model_name_or_path, dropout, auto_class)
    try:
        with quiet_transformers():
            backbone, info = load_model(
                model_name_or_path,
                auto_class=auto_class,
                config=config,
                dtype=torch.get_default_dtype(),
                output_loading_info=True,
                **({} if attention == "auto" else {"attn_implementation": attention}),
            )
    except SafetensorError as error:
        raise ValueError(f"the weights in {model_name_or_path} are damaged or cut short: {error}") from None
    if absent := sorted(name for name in info["missing_keys"] if ".pooler." not in f".{name}"):
        raise ValueError(f"the weights in {model_name_or_path} lack {absent}, which {type(backbone).__name__} needs")
    remove_pooler(backbone)
    return backbone.train()  # transformers returns eval mode, which Lightning keeps


def remove_pooler(backbone: Any) -> None:
    """Remove the pooler of a transformer, and that of the encoder in it, because nothing would train them."""
    parts: list[Any] = [backbone, getattr(backbone, "encoder", None)]
    for part in parts:
        if isinstance(getattr(part, "pooler", None), nn.Module):
            part.pooler = None


def skeleton(model_name_or_path: str, auto_class: str = "AutoModel", dropout: float | None = None) -> Any:
    """The transformer of :func:`load_backbone` without weights, on torch's meta device."""
    config = _config(model_name_or_path, dropout, auto_class)
    with torch.device("meta"):
        backbone = model_class(auto_class, config).from_config(config)
    remove_pooler(backbone)
    return backbone.train()


def _config(model_name_or_path: str, dropout: float | None, auto_class: str) -> Any:
    config = load_config(model_name_or_path)
    if config.is_encoder_decoder and auto_class != "AutoModelForSeq2SeqLM":
        raise ValueError(
            f"{model_name_or_path} is an encoder-decoder ({config.model_type}), which Seq2SeqModule trains and this "
            "module does not"
        )
    if dropout is not None:
        override_dropout(config, dropout)
    return config


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the log messages and progress bars of transformers; errors are still raised."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def override_dropout(config: Any, dropout: float) -> None:
    """Set every dropout probability of a transformers configuration; layer dropout is only ever set to 0."""
    for name, value in vars(config).items():
        is_probability = isinstance(value, int | float) and not isinstance(value, bool)
        if "drop" in name and is_probability and not ("layerdrop" in name and dropout > 0):
            setattr(config, name, dropout)


def encoder_layers(backbone: nn.Module) -> tuple[str, nn.ModuleList]:
    """The layer stack of a transformer with its name: the longest ``ModuleList``, the outermost if several are."""
    stacks = [(name, module) for name, module in backbone.named_modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise ValueError(f"cannot find the layers of {type(backbone).__name__}; use freeze_layers=0 or -1")
    return max(stacks, key=lambda item: (len(item[1]), -item[0].count(".")))


def freeze(backbone: nn.Module, n_layers: int) -> None:
    """Freeze the embeddings and the first ``n_layers`` layers; 0 freezes nothing, -1 the whole backbone.

    Raises:
        ValueError: If the transformer has fewer layers.
    """
    if n_layers == 0:
        return
    if n_layers == -1:
        backbone.requires_grad_(False)
        return
    stack_name, stack = encoder_layers(backbone)
    if n_layers > len(stack):
        raise ValueError(
            f"freeze_layers must be at most {len(stack)}, the number of layers of {type(backbone).__name__}, "
            f"got {n_layers}; use -1 to freeze the whole backbone"
        )
    for name, module in backbone.named_modules():
        outside = not f"{name}.".startswith(f"{stack_name}.")
        if outside and (isinstance(module, nn.Embedding) or "embed" in name):
            module.requires_grad_(False)
    for layer in stack[:n_layers]:
        layer.requires_grad_(False)


def depths(backbone: nn.Module) -> dict[str, int]:
    """How many layers are above each weight of a transformer: 0 for the last layer and for what is above it.

    Raises:
        ValueError: If the transformer has no stack of layers.

    Example:
        >>> layers = nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)])
        >>> depths(nn.ModuleDict({"embeddings": nn.Embedding(2, 1), "layers": layers, "norm": nn.LayerNorm(1)}))
        {'embeddings.weight': 2, 'layers.0.weight': 1, 'layers.1.weight': 0, 'norm.weight': 0, 'norm.bias': 0}
    """
    stack_name, stack = encoder_layers(backbone)
    found = {}
    for name, _ in backbone.named_parameters():
        if name.startswith(f"{stack_name}."):
            layer = int(name.removeprefix(f"{stack_name}.").partition(".")[0])
            found[name] = len(stack) - 1 - layer
        else:
            found[name] = len(stack) if "embed" in name else 0
    return found


def accepted_inputs(backbone: nn.Module) -> frozenset[str]:
    """The names of the arguments of ``backbone(...)``."""
    return frozenset(inspect.signature(backbone.forward).parameters)


def resolve_pooling(pooling: Pooling, config: Any) -> Pooling:
    """Resolve ``auto`` for a model: ``last`` if its attention is causal only, else ``mean``."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if pooling != "auto":
        return pooling
    kind = config.model_type
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "last" if causal else "mean"


def pool(hidden: Tensor, attention_mask: Tensor | None, pooling: Pooling) -> Tensor:
    """One vector per text: the mean of its tokens, its first or its last token; padding is ignored.

    Args:
        hidden: Hidden states [batch, tokens, features].
        attention_mask: Mask [batch, tokens], 1 for a token and 0 for padding, on either side; None if nothing is
            padded.
        pooling: ``mean``, ``cls`` (first token) or ``last``.

    Returns:
        Pooled vectors [batch, features].

    >>> hidden = torch.tensor([[[1.0], [3.0], [100.0]]])
    >>> mask = torch.tensor([[1, 1, 0]])
    >>> [pool(hidden, mask, how).item() for how in ("mean", "cls", "last")]
    [2.0, 1.0, 3.0]
    """
    if attention_mask is None:
        attention_mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    if pooling == "mean":
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
    if pooling == "cls":
        # argmax returns the first maximum: the first token that is not padding, also with padding on the left.
        token = attention_mask.argmax(1)
    else:
        token = attention_mask.shape[1] - 1 - attention_mask.flip(1).argmax(1)
    # Not len(), which would make the batch size a constant of an exported program.
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), token]
