"""Random texts of a few words, and a tokenizer for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(50)]


def make_tokenizer(**tokens: Any) -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **tokens
    )


TOKENIZER = make_tokenizer(pad_token="[PAD]")


def text_rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    generator = np.random.default_rng(seed)
    return [
        {"text": " ".join(generator.choice(WORDS, generator.integers(1, 30))), "label": "ab"[i % 2], "id": f"row {i}"}
        for i in range(n)
    ]
