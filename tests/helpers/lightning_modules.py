"""A tiny BERT with its tokenizer, and batches for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

WORDS = ["bank", "share", "market", "goal", "match", "team", "vote", "party", "law", "film", "the", "a", "of"]
TEXTS = {
    "business": ["the bank share of a market", "market share", "a share of the bank"],
    "sport": ["the team goal", "a match of the team", "goal match"],
    "politics": ["vote of the party", "a law", "the party law vote"],
}


def tiny_bert(folder: str | Path) -> str:
    """Write a randomly initialised BERT (2 layers, 32 features) and its tokenizer to a folder."""
    from transformers import BertConfig, BertModel, BertTokenizer

    torch.manual_seed(7)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(specials + WORDS)}, model_max_length=32)
    config = BertConfig(
        vocab_size=len(specials + WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def loader(folder: str, classes: list[str], batch_size: int = 3, repeat: int = 1) -> DataLoader[Any]:
    """Ordered batches of the texts of some classes, with the class names under ``labels``."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def collate(examples: list[tuple[str, str]]) -> dict[str, Any]:
        texts, labels = zip(*examples, strict=True)
        return {**tokenizer(list(texts), padding=True, return_tensors="pt"), "labels": list(labels)}

    examples = [(text, name) for name in classes for text in TEXTS[name]] * repeat
    return DataLoader(examples, batch_size=batch_size, collate_fn=collate)
