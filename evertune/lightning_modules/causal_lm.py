"""Causal language models that learn instructions, dialogues and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from evertune.lightning_modules.backbone import Attention
from evertune.lightning_modules.generation import Adapters, GenerationModule
from evertune.lightning_modules.packing import check_packing, packed_logits
from evertune.lightning_modules.schedule import Schedule
from evertune.shards.opened import shards_of
from evertune.shards.support import is_deepspeed
from evertune.sources.conversations import Message
from evertune.tasks.base import IGNORED
from evertune.tasks.causal_lm import CausalLMTask, Score, TooLong
from evertune.tasks.prompts import asked, text_of
from evertune.utils.evaluation import evaluation_mode


class PackedOutput(NamedTuple):
    """The output for a batch that was packed.

    Args:
        logits: Logits [batch, tokens, vocabulary], as without packing; 0 at padding.
    """

    logits: Tensor


class CausalLMModule(GenerationModule):
    """A causal language model that learns the answers to prompts, the turns of dialogues, or whole texts.

    :class:`~evertune.tasks.CausalLMTask` describes the records. Only answers count in the loss; of texts without an
    answer, every token counts. Logs ``train_loss``, ``val_loss``, ``val_perplexity``, ``test_loss`` and
    ``test_perplexity``.

    Args:
        model_name_or_path: Name on the Hugging Face hub, folder, or ``package:NAME/FOLDER`` (in an installed package).
        packing: Whether short texts of a batch share rows in training, which saves the padding. Each keeps exactly the
            logits that it has alone, which is checked before the first step. Default: False.
        score: Score of a record: ``likelihood`` (default) of its answer, or ``exact_match``.
        too_long: ``truncate`` (default) or ``refuse`` texts with more tokens than the maximum.
        generation: Settings of transformers' ``generate`` for all predictions, such as ``{"max_new_tokens": 64}``.
            Default: greedy, 128 tokens.
        learning_rate: Peak learning rate of AdamW; None (default) chooses it by the size of the transformer, see
            :class:`TransformerModule`, and takes ten times as much for adapters.
        weight_decay: Weight decay of AdamW; biases and norms are exempt. Default: 0.01.
        warmup_ratio: Share of an update's steps used for the warm-up. Default: 0.1.
        schedule: ``linear`` (default), ``cosine``, ``infinite`` or ``constant``, see :class:`TransformerModule`.
        final_ratio: Share of the peak at which an update ends, and from which the next one warms up. Default: 0.
        cooldown_ratio: Share of an update's steps used for the cool-down of ``infinite``. Default: 0.2.
        layer_decay: Factor of the learning rate from each layer of the transformer to the one below it. Default: 1.
        freeze_layers: 0 (default) trains everything, n freezes the embeddings and the first n layers.
        unfreeze_ratio: Share of an update's steps over which the layers join the training from top to bottom, see
            :class:`TransformerModule`. Default: 0.
        freeze_word_embeddings: Whether to freeze the word embeddings. Default: False.
        dropout: Replaces every dropout probability; None (default) keeps them.
        attention: ``auto`` (default), ``sdpa`` or ``eager``, see :class:`TransformerModule`.
        peft: Adapters to train instead of the transformer, such as ``{"method": "lora", "r": 8}``, see
            :class:`TransformerModule`. ``auto`` (default) is LoRA on the MLPs for a billion weights and more, and None
            for fewer.

    Raises:
        ModuleNotFoundError: If adapters are trained and PEFT is not installed.
        ValueError: If an argument is out of range; the message names the allowed values. Before the first step, if
            packing changes the model's logits.

    Example::

        module = CausalLMModule("HuggingFaceTB/SmolLM2-135M-Instruct", peft={"method": "lora", "r": 8})
        stream = domain_incremental("tickets.jsonl", domain="product", text="question", label="answer",
                                    task=module.task)
        ContinualTrainer(max_epochs=1, callbacks=[Replay(memory_size=1_000)]).fit_stream(module, stream)
        module.predict(["How do I reset the router?"])  # ["Hold the button ..."]
    """

    def __init__(
        self,
        model_name_or_path: str,
        *,
        packing: bool = False,
        score: Score = "likelihood",
        too_long: TooLong = "truncate",
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
        self.packing = packing
        self.task = CausalLMTask(score, too_long)

    def on_train_start(self) -> None:
        """Check that packed texts do not see one another, and resume as any :class:`TransformerModule` does."""
        super().on_train_start()
        if self.packing:
            with evaluation_mode(self):
                check_packing(self.encode, self.device)
            if is_deepspeed(self.trainer):
                shards_of(self.trainer).release()

    def forward(self, **inputs: Any) -> Any:
        """The model's output, with ``logits`` ``[batch, tokens, vocabulary]``, for tokenised texts.

        ``module(input_ids=..., attention_mask=...)``, padded on the right.
        """
        mask = inputs.get("attention_mask")
        if self.packing and self.training and mask is not None:
            return PackedOutput(packed_logits(self.encode, inputs["input_ids"], mask))
        return self.encode(use_cache=False, **inputs)

    # --- predictions

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> list[str]:
        """What the model writes after the prompt of each text of a batch: after all of it if it has no answer."""
        return self._written(_prompts_in(batch), len(batch["input_ids"]), "left")

    def predict(
        self,
        texts: Sequence[str] | Sequence[Sequence[str]] | Sequence[Sequence[Message]],
        batch_size: int = 8,
        max_length: int | None = None,
        continue_texts: bool = False,
        **generation: Any,
    ) -> list[str]:
        """The answer to each prompt, as the chat template puts it; greedy by default.

        Loads the weights if necessary. After a ZeRO-3 fit, call it on every rank.

        Args:
            texts: Prompts, each a text or several that are joined, or conversations as lists of messages, of which the
                next turn is written.
            batch_size: Number of prompts that are read at a time. Default: 8.
            max_length: Maximum number of tokens of a prompt; of a longer one, the end is read. None (default) leaves
                room for the answer in what the model takes.
            continue_texts: Whether to continue the texts as they are, instead of answering them. Default: False.
            generation: Settings of transformers' ``generate``, such as ``max_new_tokens=64`` or ``do_sample=True``.

        Raises:
            TypeError: If ``texts`` is a single string, or one of them is neither a text nor a list of messages.
            ValueError: If a prompt has no tokens, the chat template refuses it or there is none for messages, or
                ``max_length`` is more than the model takes.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a list; for one text pass [text]")
        self.configure_model()
        longest = self._longest_prompt(max_length, generation, reserved=True)
        prompts = []
        given: Sequence[Any] = [text_of(text) for text in texts]
        for number, text in enumerate(given):
            if not isinstance(text, str) and not (isinstance(text, Sequence) and text and not continue_texts):
                raise TypeError(f"texts[{number}] must be a text or a list of messages, got {text!r:.80}")
            try:
                written, templated = (text, False) if continue_texts else asked(text, self.tokenizer)
            except ValueError as error:
                raise ValueError(f"texts[{number}]: {error}") from None
            tokens = self.tokenizer(written, add_special_tokens=not templated, verbose=False)["input_ids"]
            if tokens and tokens[-1] == self.tokenizer.eos_token_id and not templated:
                tokens = tokens[:-1]  # which some tokenizers add: there is more to come
            if not tokens:
                raise ValueError(f"texts[{number}] has no tokens: leave empty texts out")
            prompts.append(tokens[-longest:])
        return self._written(prompts, batch_size, "left", **generation)


def _prompts_in(batch: Mapping[str, Any]) -> list[list[int]]:
    """The tokens of each text before its first answer; at least one."""
    prompts = []
    for number, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        end = int(mask.sum())
        if "labels" in batch:
            counts: Tensor = batch["labels"][number] != IGNORED
            end = max(int(counts.int().argmax()), 1) if counts.any() else end
        prompts.append(ids[:end].tolist())
    return prompts
