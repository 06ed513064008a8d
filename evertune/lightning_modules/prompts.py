"""Prompts that are trained instead of the transformer: virtual tokens before each text, or before each layer's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from evertune.lightning_modules.adapters import PROMPTS, adapter_config
from evertune.lightning_modules.backbone import accepted_inputs, encoder_layers
from evertune.utils.extras import library
from evertune.utils.heads import head_size

_KINDS = {"prefix_tuning": "PrefixEncoder", "prompt_tuning": "PromptEmbedding", "p_tuning": "PromptEncoder"}
_CACHES = ("cache", "past_key_values")
"""Names of the argument by which a transformer takes keys and values, of which it has one, newest first."""


class Prompt(nn.Module):
    """Virtual tokens, trained while the transformer is frozen.

    - ``prompt_tuning`` (Lester et al. 2021): embeddings before those of each text, which start as those of tokens drawn
      at random;
    - ``p_tuning`` (Liu et al. 2021, "GPT Understands, Too"): the same, made by a small network;
    - ``prefix_tuning`` (Li & Liang 2021): keys and values before those of each text in every layer, for transformers
      that take them.

    Nothing of them can be added to the transformer's weights. What the transformer gives for the virtual tokens is left
    out. They are drawn with the seed of the process, the same on all ranks.

    Args:
        backbone: The transformer, which stays as it is.
        peft: Settings of PEFT: ``{"method": "prompt_tuning", "num_virtual_tokens": 20}``.

    Raises:
        ValueError: If the transformer takes no embeddings, or for ``prefix_tuning`` no keys and values.
    """

    def __init__(self, backbone: Any, peft: Mapping[str, Any]) -> None:
        super().__init__()
        accepted, self.method = accepted_inputs(backbone), peft["method"]
        assert self.method in PROMPTS
        self.is_prefix = self.method == "prefix_tuning"
        self._cache = next((name for name in _CACHES if name in accepted), None)
        if self.is_prefix and self._cache is None:
            raise ValueError(
                f"peft: prefix_tuning gives keys and values, which {type(backbone).__name__} does not take; use "
                "prompt_tuning or p_tuning"
            )
        if not self.is_prefix and "inputs_embeds" not in accepted:
            raise ValueError(f"peft: {type(backbone).__name__} does not take embeddings, which {self.method} gives")
        config, shape = adapter_config(peft), backbone.config
        self.n_tokens: int = config.num_virtual_tokens
        config.num_transformer_submodules = 1
        config.num_layers = len(encoder_layers(backbone)[1])
        config.num_attention_heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
        config.token_dim = backbone.get_input_embeddings().embedding_dim
        if self.is_prefix:
            self._n_layers, self._heads = config.num_layers, config.num_attention_heads
            config.token_dim = self._heads * head_size(shape)
        if hasattr(config, "encoder_hidden_size"):
            config.encoder_hidden_size = config.encoder_hidden_size or config.token_dim
        arguments = (config, backbone.get_input_embeddings()) if self.method == "prompt_tuning" else (config,)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed())
            self.encoder = getattr(library("peft", "peft"), _KINDS[self.method])(*arguments)

    def forward(self, backbone: Any, inputs: Mapping[str, Any]) -> Any:
        """The output of the transformer for a batch with ``input_ids [batch, tokens]``, without the virtual tokens."""
        tokens = inputs["input_ids"]
        size, device = len(tokens), tokens.device
        virtual = self.encoder(torch.arange(self.n_tokens, device=device).expand(1, -1))
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(tokens) if mask is None else mask
        changed: dict[str, Any] = {**inputs, "attention_mask": torch.cat([mask.new_ones(size, self.n_tokens), mask], 1)}
        if self.is_prefix:
            assert self._cache is not None
            return backbone(**changed, **{self._cache: self._keys_and_values(virtual, size)})
        embeddings = backbone.get_input_embeddings()(tokens)
        virtual = virtual.to(embeddings.dtype).expand(size, -1, -1)
        changed["inputs_embeds"] = torch.cat([virtual, embeddings], 1)
        del changed["input_ids"]
        if "token_type_ids" in inputs:
            kinds = inputs["token_type_ids"]
            changed["token_type_ids"] = torch.cat([kinds.new_zeros(size, self.n_tokens), kinds], 1)
        output = backbone(**changed)
        output.last_hidden_state = output.last_hidden_state[:, self.n_tokens :]
        return output

    def _keys_and_values(self, virtual: Tensor, size: int) -> Any:
        """A cache that holds the keys and values ``[batch, heads, virtual tokens, features]`` of each layer."""
        from transformers import DynamicCache

        cache = DynamicCache()
        # One set for all texts, or one for each where importance is estimated per example.
        parts = virtual.view(len(virtual), self.n_tokens, self._n_layers, 2, self._heads, -1)
        for layer, (key, value) in enumerate(parts.permute(2, 3, 0, 4, 1, 5)):
            cache.update(key.expand(size, -1, -1, -1), value.expand(size, -1, -1, -1), layer)
        return cache
