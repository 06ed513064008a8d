"""Tiny language models with their tokenizers, and records for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

SPECIALS = ["<pad>", "<unk>", "<end>", "<system>", "<user>", "<assistant>"]
PLACES = ["north", "south", "east", "west"]
WORDS = ["what", "is", "the", "a", "and", "city", "river", "big", "small", "red", "blue", "old", *PLACES]
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
QUESTIONS = {
    "colours": [(f"what is the {place} city", ("red", "blue")[n % 2]) for n, place in enumerate(PLACES)],
    "sizes": [(f"what is the {place} river", ("big", "small and old")[n % 2]) for n, place in enumerate(PLACES)],
}
"""Prompts and answers of two topics."""


def make_tokenizer(template: bool = True, **tokens: Any) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIALS + WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        additional_special_tokens=SPECIALS[3:],
        chat_template=TEMPLATE if template else None,
        **{"eos_token": "<end>", "pad_token": "<pad>", **tokens},
    )


def tiny_llama(folder: str | Path, template: bool = True, tied: bool = True) -> str:
    """Write a randomly initialised Llama (2 layers, 32 features) and its tokenizer to a folder."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(SPECIALS + WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(template).save_pretrained(folder)
    return str(folder)


def tiny_t5(folder: str | Path) -> str:
    """Write a randomly initialised T5 (1 layer, 32 features) and its tokenizer to a folder."""
    torch.manual_seed(7)
    config = T5Config(
        vocab_size=len(SPECIALS + WORDS),
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    make_tokenizer(template=False).save_pretrained(folder)
    return str(folder)


def records(topic: str, repeat: int = 1) -> list[dict[str, str]]:
    """Prompts and answers of a topic, each with an id."""
    rows = QUESTIONS[topic] * repeat
    return [{"id": f"{topic} {n}", "prompt": prompt, "answer": answer} for n, (prompt, answer) in enumerate(rows)]


def dialogue(*turns: str) -> list[dict[str, str]]:
    """A conversation in which user and assistant take turns."""
    return [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]
