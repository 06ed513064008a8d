"""Encoder-decoders that learn to summarise, to translate, or to make any text from another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from evertune.lightning_modules.backbone import Attention, skeleton
from evertune.lightning_modules.generation import Adapters, GenerationModule
from evertune.lightning_modules.schedule import Schedule
from evertune.lightning_modules.warm_start import encoder_decoder, encoder_decoder_skeleton
from evertune.metrics.texts import check_scorer, corpus_scores
from evertune.tasks.base import IGNORED
from evertune.tasks.prompts import text_of
from evertune.tasks.seq2seq import Score, Seq2SeqTask, references
from evertune.tasks.texts import max_tokens
from evertune.utils.collectives import gather_bytes
from evertune.utils.pretrained import load_config


class Seq2SeqModule(GenerationModule):
    """An encoder-decoder that makes a text from a text: a summary, a translation, an answer.

    Any encoder-decoder of transformers works. A checkpoint of an encoder, such as BERT, is taken twice, as encoder and
    as decoder (Rothe et al., 2020, "Leveraging Pre-trained Checkpoints for Sequence Generation Tasks"), and the log
    says so.

    Logs ``train_loss``, ``val_loss``, ``val_perplexity``, ``test_loss`` and ``test_perplexity``; ``trainer.test``
    generates the texts as well, and logs ``test_rouge_l`` and whatever ``metrics`` names.

    Args:
        model_name_or_path: Name on the Hugging Face hub, folder, or ``package:NAME/FOLDER`` (in an installed package).
        score: Score of a record: ``rouge_l`` (default), ``chrf`` or ``likelihood``, see
            :class:`~evertune.tasks.Seq2SeqTask`.
        metrics: What ``trainer.test`` logs of the generated texts: ``rouge_l`` (default), and ``bleu`` and ``chrf`` of
            all texts together, as sacreBLEU reports them, between 0 and 1.
        max_target_length: Maximum number of tokens of a target; longer ones are truncated. Default: 128.
        generation: Settings of transformers' ``generate``, for scores and predictions: ``{"num_beams": 4}`` searches
            with beams, ``{"do_sample": True}`` samples. Default: greedy, at most ``max_target_length`` tokens.
        learning_rate: Peak learning rate of AdamW; None (default) chooses it by the size of the transformer, see
            :class:`TransformerModule`, and takes ten times as much for adapters.
        weight_decay: Weight decay of AdamW; biases and norms are exempt. Default: 0.01.
        warmup_ratio: Share of an update's steps used for the warm-up. Default: 0.1.
        schedule: ``linear`` (default), ``cosine``, ``infinite`` or ``constant``, see :class:`TransformerModule`.
        final_ratio: Share of the peak at which an update ends, and from which the next one warms up. Default: 0.
        cooldown_ratio: Share of an update's steps used for the cool-down of ``infinite``. Default: 0.2.
        layer_decay: Factor of the learning rate from each layer of the transformer to the one below it. Default: 1.
        freeze_layers: 0 (default) trains everything, n freezes the embeddings and the first n layers of the encoder.
        unfreeze_ratio: Share of an update's steps over which the layers of the encoder join from top to bottom, see
            :class:`TransformerModule`. Default: 0.
        freeze_word_embeddings: Whether to freeze the word embeddings. Default: False.
        dropout: Replaces every dropout probability; None (default) keeps them.
        attention: ``auto`` (default), ``sdpa`` or ``eager``, see :class:`TransformerModule`.
        peft: Adapters to train instead of the transformer, such as ``{"method": "lora", "r": 8}``, see
            :class:`TransformerModule`. ``auto`` (default) is LoRA on the MLPs for a billion weights and more, and None
            for fewer.

    Raises:
        ModuleNotFoundError: If adapters are trained and PEFT is not installed, or sacreBLEU is not.
        ValueError: If an argument is out of range; the message names the allowed values.

    Example::

        module = Seq2SeqModule("google-t5/t5-small", generation={"num_beams": 4})
        stream = time_incremental("reports.jsonl", date="day", period="month", text="report", label="summary",
                                  task=module.task)
        ContinualTrainer(max_epochs=2, callbacks=[Replay(memory_size=1_000)]).fit_stream(module, stream)
        module.predict(["The board met on Monday and ..."])  # ["The board ..."]
    """

    task: Seq2SeqTask
    _auto_class = "AutoModelForSeq2SeqLM"

    def __init__(
        self,
        model_name_or_path: str,
        *,
        score: Score = "rouge_l",
        metrics: Sequence[str] = ("rouge_l",),
        max_target_length: int = 128,
        generation: dict[str, Any] | None = None,
        learning_rate: float | None = None,
        weight_decay: float = 0.01,
        warmup_ratio: float = 0.1,
        schedule: Schedule = "linear",
        final_ratio: float = 0.0,
        cooldown_ratio: float = 0.2,
        freeze_layers: int = 0,
        unfreeze_ratio: float = 0.0,
        layer_decay: float = 1.0,
        freeze_word_embeddings: bool = False,
        dropout: float | None = None,
        attention: Attention = "auto",
        peft: Adapters = "auto",
    ) -> None:
        for name in [metrics] if isinstance(metrics, str) else metrics:
            check_scorer(name)
        super().__init__(
            model_name_or_path,
            generation=generation,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup_ratio=warmup_ratio,
            schedule=schedule,
            final_ratio=final_ratio,
            cooldown_ratio=cooldown_ratio,
            freeze_layers=freeze_layers,
            unfreeze_ratio=unfreeze_ratio,
            layer_decay=layer_decay,
            freeze_word_embeddings=freeze_word_embeddings,
            dropout=dropout,
            attention=attention,
            peft=peft,
        )
        self.metrics = [metrics] if isinstance(metrics, str) else list(metrics)
        self.task = Seq2SeqTask(score, max_target_length)
        self._said: list[tuple[str, str]] = []

    # --- the model

    def load_backbone(self) -> Any:
        """The encoder-decoder, or one made of an encoder."""
        if load_config(self.model_name_or_path).is_encoder_decoder:
            return super().load_backbone()
        return encoder_decoder(self.model_name_or_path, self.tokenizer, self.dropout, self.attention)

    def skeleton(self) -> Any:
        """The transformer of :meth:`load_backbone` without weights."""
        if load_config(self.model_name_or_path).is_encoder_decoder:
            return super().skeleton()
        return encoder_decoder_skeleton(self.model_name_or_path, self.dropout)

    def configure_model(self) -> None:
        """Load the transformer. Later calls have no effect.

        Raises:
            ValueError: If targets may have more tokens than the transformer takes.
        """
        super().configure_model()
        if self.max_tokens is not None and self.task.max_target_length > self.max_tokens:
            raise ValueError(
                f"max_target_length must be at most {self.max_tokens}, the number of tokens that "
                f"{type(self.backbone).__name__} takes, got {self.task.max_target_length}"
            )

    @cached_property
    def max_tokens(self) -> int | None:
        """The maximum number of tokens of a source, special tokens included; None if there is no maximum."""
        if self.backbone is not None:
            return max_tokens(self.backbone.get_encoder())
        if load_config(self.model_name_or_path).is_encoder_decoder:
            return max_tokens(skeleton(self.model_name_or_path, self._auto_class).get_encoder())
        return max_tokens(skeleton(self.model_name_or_path))

    @property
    def _defaults(self) -> dict[str, Any]:
        return {**super()._defaults, "max_new_tokens": self.task.max_target_length, **self.generation}

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> Any:
        """The model's output, with ``logits`` ``[batch, target tokens, vocabulary]``.

        ``module(input_ids=..., attention_mask=..., labels=...)``; without targets, the logits of the first token.
        """
        if "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = self._shifted(labels, inputs["input_ids"])
        return self.encode(use_cache=False, **inputs)

    def _shifted(self, labels: Tensor | None, input_ids: Tensor) -> Tensor:
        """What the decoder reads: the start token, and the target without its last token."""
        token = self.backbone.config.decoder_start_token_id
        start = input_ids.new_full((len(input_ids), 1), token)
        if labels is None:
            return start
        before = labels[:, :-1]
        return torch.cat([start, before.masked_fill(before == IGNORED, self.tokenizer.pad_token_id)], 1)

    # --- steps

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log loss and perplexity, and generate the texts for :meth:`on_test_epoch_end`."""
        super().test_step(batch, batch_idx, dataloader_idx)
        texts = self.generate(batch["input_ids"], batch["attention_mask"])
        self._said += zip(texts, references(batch["labels"], self.tokenizer), strict=True)

    def on_test_epoch_end(self) -> None:
        """Log the scores of all generated texts together, over all ranks."""
        parts = gather_bytes(json.dumps(self._said).encode(), self.trainer)
        pairs = [pair for part in parts for pair in json.loads(part)]
        self._said = []
        if pairs and self.metrics:
            scores = corpus_scores([pair[0] for pair in pairs], [pair[1] for pair in pairs], self.metrics)
            self.log_dict({f"test_{name}": score for name, score in scores.items()}, rank_zero_only=False)

    # --- predictions

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> list[str]:
        """What the model writes for each source of a batch."""
        return self.generate(batch["input_ids"], batch["attention_mask"])

    def predict(
        self,
        texts: Sequence[str] | Sequence[Sequence[str]],
        batch_size: int = 8,
        max_length: int | None = None,
        **generation: Any,
    ) -> list[str]:
        """What the model writes for each text; greedy by default.

        Loads the weights if necessary. After a ZeRO-3 fit, call it on every rank.

        Args:
            texts: Sources, each a text or several that are joined.
            batch_size: Number of sources that are read at a time. Default: 8.
            max_length: Maximum number of tokens of a source; longer ones are truncated. None (default) uses the
                tokenizer's and the model's maximum.
            generation: Settings of transformers' ``generate``, such as ``num_beams=4`` or ``do_sample=True``.

        Raises:
            TypeError: If ``texts`` is a single string, or one of them is not a text.
            ValueError: If a text has no tokens, or ``max_length`` is more than the model takes.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a list; for one text pass [text]")
        self.configure_model()
        longest = self._longest_prompt(max_length, generation, reserved=False)
        prompts = []
        for number, text in enumerate(text_of(text) for text in texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{number}] must be a text, got {text!r:.80}")
            tokens = self.tokenizer(text, truncation=True, max_length=longest)["input_ids"]
            if not tokens:
                raise ValueError(f"texts[{number}] has no tokens: leave empty texts out")
            prompts.append(tokens)
        return self._written(prompts, batch_size, "right", **generation)
