"""What modules that generate texts have in common: their loss, their adapters, and decoding."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from evertune._lightning import rank_zero_info
from evertune.lightning_modules.adapters import adapter_config, mlp_layers
from evertune.lightning_modules.backbone import load_backbone, quiet_transformers, skeleton
from evertune.lightning_modules.saving import gathered
from evertune.lightning_modules.transformer import TransformerModule
from evertune.metrics.modules import Perplexity
from evertune.tasks.generation import GenerationTask, answer_sums
from evertune.utils.evaluation import evaluation_mode
from evertune.utils.sharding import is_sharded

Adapters = Mapping[str, Any] | Literal["auto"] | None
LARGE = 1_000_000_000
"""Weights from which ``peft="auto"`` trains adapters."""
_RANK, _FASTER = 16, 10.0
_NEW_TOKENS = 128
_LONGEST_UNLIMITED = 2048
"""Tokens of a prompt for models without a maximum."""


class Written(NamedTuple):
    """What a model has written after a prompt.

    Args:
        tokens: Its tokens, ``[tokens]``, on the CPU; the end token is the last one.
        text: The same without special tokens.
        ended: Whether there is an end token; if not, ``max_new_tokens`` cut the text off.
    """

    tokens: Tensor
    text: str
    ended: bool


class GenerationModule(TransformerModule):
    """A transformer that generates texts. A subclass sets its ``task`` and says how texts become its input.

    Args:
        model_name_or_path: Name on the Hugging Face hub, folder, or ``package:NAME/FOLDER``.
        peft: Adapters to train instead of the transformer; ``auto`` for LoRA of rank 16 on the MLPs of transformers of
            a billion weights and more, and none for smaller ones.
        generation: Settings of transformers' ``generate`` that differ from its defaults.
        settings: Further arguments of :class:`TransformerModule`.

    Raises:
        ValueError: If ``freeze_layers`` leaves nothing to train, or an argument of :class:`TransformerModule` is wrong.
    """

    task: GenerationTask
    takes_prompts = False
    _auto_class = "AutoModelForCausalLM"

    def __init__(
        self, model_name_or_path: str, *, peft: Adapters, generation: Mapping[str, Any] | None, **settings: Any
    ) -> None:
        if isinstance(peft, str) and peft != "auto":
            raise ValueError(f"peft must be a mapping, 'auto' or null, got {peft!r}")
        if settings.get("freeze_layers") == -1:
            raise ValueError("freeze_layers=-1 leaves nothing to train: there is no head on top of the transformer")
        super().__init__(model_name_or_path, peft=None if peft == "auto" else peft, **settings)
        self.hparams.pop("head_learning_rate", None)  # there is no head, and no such argument
        self._chooses_adapters = peft == "auto" and not self.freeze_layers
        self.generation = dict(generation or {})
        self.val_perplexity, self.test_perplexity = Perplexity(), Perplexity()

    # --- the model

    def load_backbone(self) -> Any:
        """The pretrained transformer with its output layer."""
        return load_backbone(self.model_name_or_path, self.dropout, self.attention, self._auto_class)

    def skeleton(self) -> Any:
        """The transformer of :meth:`load_backbone` without weights."""
        return skeleton(self.model_name_or_path, self._auto_class, self.dropout)

    def build(self, backbone: Any) -> None:
        """Build the module; with ``peft="auto"`` the size of the transformer decides about adapters.

        Among settings with as many weights, LoRA on the MLPs alone learns more and forgets less than LoRA on attention
        (Llama-3.2-3B on MetaMathQA: 49.4 against 47.8 % right, and a rise of the loss on Wikipedia of 0.032 against
        0.050, in PEFT's comparison of methods; Schulman et al. 2025, "LoRA Without Regret", agree).
        """
        n_weights = sum(getattr(weight, "ds_numel", weight.numel()) for weight in backbone.parameters())
        if self._chooses_adapters and n_weights >= LARGE:
            self.peft = {"method": "lora", "r": _RANK, "lora_alpha": 2 * _RANK, "target_modules": mlp_layers(backbone)}
            adapter_config(self.peft)
            rank_zero_info(
                f"{n_weights / 1e9:.1f} billion weights: LoRA adapters on the MLPs are trained; pass peft=None to "
                "train all weights"
            )
        super().build(backbone)

    def default_learning_rate(self) -> float:
        """The peak learning rate where none was given; ten times the usual one for adapters (Schulman et al. 2025)."""
        return super().default_learning_rate() * (_FASTER if self.peft else 1.0)

    # --- steps

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The mean over the texts of the mean loss of the tokens of each, logged as ``train_loss``.

        Each text counts alike, whatever its length: so the loss does not depend on which texts a rank, a micro-batch or
        a packed row got.
        """
        total, n_tokens = answer_sums(self.task.outputs(self, batch))
        loss = (total / n_tokens).mean()
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(total))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log ``val_loss`` and ``val_perplexity`` over all ranks."""
        self._evaluate(batch, "val", self.val_perplexity)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log ``test_loss`` and ``test_perplexity`` over all ranks."""
        self._evaluate(batch, "test", self.test_perplexity)

    def _evaluate(self, batch: Mapping[str, Any], stage: str, perplexity: Perplexity) -> None:
        total, n_tokens = answer_sums(self.task.outputs(self, batch))
        perplexity.update(total, n_tokens)
        self.log(
            f"{stage}_loss",
            (total / n_tokens).mean(),
            prog_bar=True,
            on_epoch=True,
            sync_dist=True,
            batch_size=len(total),
        )
        self.log(f"{stage}_perplexity", perplexity, prog_bar=True, on_epoch=True)

    # --- generation

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **settings: Any) -> list[str]:
        """The texts that the model writes, greedily by default, without special tokens. Call on every rank.

        Args:
            input_ids: Tokens ``[batch, tokens]``, for a causal model padded on the left.
            attention_mask: 1 for a token and 0 for padding.
            settings: Settings of transformers' ``generate``, which replace those of the module.
        """
        written = self._generated(input_ids, attention_mask, **settings)
        return [text.strip() for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)]

    def write(self, prompts: Sequence[Tensor], **settings: Any) -> list[Written]:
        """What the model writes after each prompt, all of them read as one batch. Call on every rank.

        Args:
            prompts: Tokens of each prompt, ``[tokens]``, at least one and at most :attr:`max_prompt_tokens`.
            settings: Settings of transformers' ``generate``, which replace those of the module.
        """
        ends = torch.tensor(self._end_tokens())
        is_pair = self.backbone.config.is_encoder_decoder
        written = self._generated(*self._padded(prompts, "right" if is_pair else "left"), **settings).cpu()
        answers = []
        for tokens in written[:, 1:] if is_pair else written:  # the decoder of a pair begins with a start token
            stops = torch.isin(tokens, ends).nonzero().flatten().tolist()
            kept = tokens[: stops[0] + 1] if stops else tokens
            answers.append(Written(kept, self.tokenizer.decode(kept, skip_special_tokens=True).strip(), bool(stops)))
        return answers

    @property
    def max_prompt_tokens(self) -> int:
        """The number of tokens of a prompt that leaves room for an answer."""
        return self._longest_prompt(None, {}, reserved=not self.backbone.config.is_encoder_decoder)

    def _generated(self, input_ids: Tensor, attention_mask: Tensor, **settings: Any) -> Tensor:
        """The tokens that the model writes, ``[batch, tokens]``; an encoder-decoder's begin with its start token."""
        chosen = self._defaults | settings
        # A rank whose texts have ended must keep taking part in the forward passes of the others.
        sharded = any(hasattr(weight, "ds_id") or is_sharded(weight) for weight in self.parameters())
        with quiet_transformers():
            written: Tensor = self.backbone.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self._end_tokens(),
                synced_gpus=sharded and dist.is_initialized() and dist.get_world_size() > 1,
                **chosen,
            )
        return written if self.backbone.config.is_encoder_decoder else written[:, input_ids.shape[1] :]

    def _padded(self, prompts: Sequence[Tensor], side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
        """Prompts of tokens as ``input_ids`` and ``attention_mask``, ``[batch, tokens]``, on the device."""
        rows = [prompt.to(self.device) for prompt in prompts]
        token = self.tokenizer.pad_token_id
        ids = pad_sequence(rows, batch_first=True, padding_value=token, padding_side=side)
        return ids, pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)

    @property
    def _defaults(self) -> dict[str, Any]:
        """The settings of ``generate`` where none are given: greedy, and at most half of what the model takes."""
        most = _NEW_TOKENS if self.max_tokens is None else max(1, min(_NEW_TOKENS, self.max_tokens // 2))
        return {"do_sample": False, "max_new_tokens": most, **self.generation}

    def _end_tokens(self) -> list[int]:
        """The tokens that end a text: those that the checkpoint names, and the tokenizer's."""
        named = self.backbone.generation_config.eos_token_id
        found = [*(named if isinstance(named, list) else [named]), self.tokenizer.eos_token_id]
        size = self.backbone.get_input_embeddings().num_embeddings
        return list(dict.fromkeys(token for token in found if token is not None and token < size))

    def _written(
        self, prompts: Sequence[Sequence[int]], batch_size: int, side: Literal["left", "right"], **settings: Any
    ) -> list[str]:
        """What the model writes for prompts of tokens, in their order; similar lengths are read together."""
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        texts = [""] * len(prompts)
        with evaluation_mode(self), gathered(self), torch.inference_mode():
            for start in range(0, len(order), batch_size):
                places = order[start : start + batch_size]
                batch = self._padded([torch.tensor(prompts[place]) for place in places], side)
                for place, text in zip(places, self.generate(*batch, **settings), strict=True):
                    texts[place] = text
        return texts

    def _longest_prompt(self, max_length: int | None, settings: Mapping[str, Any], reserved: bool) -> int:
        """The number of tokens of a prompt that are read; of a causal model, the rest is for the answer."""
        new = {**self._defaults, **settings}["max_new_tokens"] if reserved else 0
        limit = math.inf if self.max_tokens is None else self.max_tokens - new
        if limit < 1:
            raise ValueError(
                f"max_new_tokens must be less than {self.max_tokens}, the number of tokens that "
                f"{type(self.backbone).__name__} takes in all, got {new}"
            )
        if max_length is not None and not 1 <= max_length <= limit:
            raise ValueError(f"max_length must be between 1 and {limit}, got {max_length}")
        known = self.tokenizer.model_max_length
        usual = _LONGEST_UNLIMITED if known > sys.maxsize else known - new
        return max_length or int(min(limit, max(usual, 1)))
