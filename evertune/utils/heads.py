"""Attention with fewer heads of the same size, which the configuration of a BERT has no place for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HEAD_SIZE = "evertune_head_size"
"""Key of a configuration whose ``num_attention_heads`` have this size, instead of ``hidden_size`` divided by them."""

_NATIVE = "head_dim"  # the same key of transformers itself
_BERT = ("self.query", "self.key", "self.value", "output.dense"), HEAD_SIZE
_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj"), _NATIVE
KINDS: dict[str, tuple[tuple[str, ...], str]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "distilbert": (("q_lin", "k_lin", "v_lin", "out_lin"), HEAD_SIZE),
    "deberta-v2": (("self.query_proj", "self.key_proj", "self.value_proj", "output.dense"), HEAD_SIZE),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
}
"""The linear layers of attention by the kind of a model, the last from the heads, and the key of the heads' size."""

_MORE = ("self.pos_key_proj", "self.pos_query_proj")  # of a DeBERTa whose positions have projections of their own
_COUNTS = ("num_attention_heads", "n_heads", "all_head_size")  # in attention modules, as far as they have them


@dataclass(frozen=True)
class Attention:
    """The attention of a layer.

    Args:
        block: The module that holds the linear layers.
        names: Their names; the last is that from the heads to the features, the others are those to the heads.
    """

    block: nn.Module
    names: tuple[str, ...]

    @property
    def linear(self) -> list[Any]:
        """The linear layers, in the order of their names."""
        return [self.block.get_submodule(name) for name in self.names]

    def keep(self, kept: Tensor, n: int) -> None:
        """Keep some of ``n`` heads, in place; those that share keys and values count as one."""
        before = self.linear
        self.narrow(n, len(kept))
        with torch.no_grad():
            for old, new in zip(before, self.linear, strict=True):
                dim = int(old is before[-1])
                size = old.weight.shape[dim] // n
                places = (kept.unsqueeze(1) * size + torch.arange(size, device=kept.device)).flatten()
                new.weight.copy_(old.weight.index_select(dim, places))
                if old.bias is not None:
                    new.bias.copy_(old.bias if dim else old.bias[places])

    def narrow(self, n: int, n_kept: int) -> None:
        """Give the attention new weights, for ``n_kept`` of ``n`` heads, in place."""
        for name, old in zip(self.names, self.linear, strict=True):
            n_in, n_out = old.in_features, old.out_features
            if name == self.names[-1]:
                n_in = n_in // n * n_kept
            else:
                n_out = n_out // n * n_kept
            made = nn.Linear(n_in, n_out, old.bias is not None, old.weight.device, old.weight.dtype)
            self.block.set_submodule(name, made)
        for part in self.block.modules():
            for name in _COUNTS:
                if isinstance(count := getattr(part, name, None), int):
                    setattr(part, name, count // n * n_kept)


def attentions(model: Any) -> list[Attention]:
    """The attention of each layer of a transformer; empty for kinds that are not among :data:`KINDS`."""
    if model.config.model_type not in KINDS:
        return []
    (*into, out), _ = KINDS[model.config.model_type]
    found = []
    for block in model.modules():
        linear = [name for name, part in block.named_modules() if isinstance(part, nn.Linear)]
        if {*into, out}.issubset(linear):
            found.append(Attention(block, (*into, *(name for name in _MORE if name in linear), out)))
    return found


def n_groups(config: Any) -> int:
    """Number of heads that can be removed alone: those that share keys and values count as one."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def head_size(config: Any) -> int:
    """Number of features of an attention head."""
    own = getattr(config, HEAD_SIZE, None) or getattr(config, _NATIVE, None)
    return int(own or config.hidden_size // config.num_attention_heads)


def described_heads(config: Any, n: int) -> dict[str, int]:
    """What the configuration of a model says if it has ``n`` heads of the same size, or groups of heads.

    Raises:
        ValueError: If transformers has no such configuration.
    """
    key, n_heads = KINDS[config.model_type][1], config.num_attention_heads // n_groups(config) * n
    if key == _NATIVE and config.hidden_size % n_heads:
        raise ValueError(
            f"the heads of a {config.model_type} must divide its {config.hidden_size} features, and {n_heads} do not: "
            f"remove another share of its {config.num_attention_heads} heads"
        )
    shared = {"num_key_value_heads": n} if getattr(config, "num_key_value_heads", None) else {}
    return {key: head_size(config), "num_attention_heads": n_heads, **shared}


def model_class(auto_class: str, config: Any) -> Any:
    """The class of transformers that makes a model with ``from_pretrained`` or ``from_config``.

    Of a model from which evertune has removed heads, it is one that makes layers with as many as are left: on the meta
    device, or partitioned by ZeRO-3 while they are made, as transformers makes them. The model is of transformers' own
    class.

    Args:
        auto_class: Name of a class of transformers, such as ``AutoModel``.
        config: Configuration of the model.
    """
    import transformers

    auto: Any = getattr(transformers, auto_class)
    size = getattr(config, HEAD_SIZE, None)
    if size is None:
        return auto
    base = auto._model_mapping[type(config)]

    def init(self: Any, config: Any, *args: Any, **settings: Any) -> None:
        kept, whole = config.num_attention_heads, config.hidden_size // size
        config.num_attention_heads = whole
        base.__init__(self, config, *args, **settings)
        config.num_attention_heads = kept
        for attention in attentions(self):
            attention.narrow(whole, kept)
        self.__class__ = base

    return type(base.__name__, (base,), {"__init__": init, "from_config": classmethod(base._from_config.__func__)})
