"""The parts of a text, and how much each counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from evertune.drift.scripts import places_of
from evertune.tasks.texts import truncation_length

MOST_PARTS = 200
"""Most parts of a text; those of a longer text are of several words each."""


@dataclass(frozen=True)
class Part:
    """A part of a text.

    Args:
        start: First character.
        end: Character after the last.
        text: The part.
        effect: How much it speaks for the label, or if negative against it: by occlusion the probability minus that
            without the part, by integrated gradients its share of the logit. By attention roll-out: its share of what
            the head reads, whatever the label.
    """

    start: int
    end: int
    text: str
    effect: float


def parts_of(text: str) -> list[tuple[int, int]]:
    """Where the words of a text begin and end; of a long one, groups of words.

    Example:
        >>> parts_of("a good day"), len(parts_of("word " * 1_000))
        ([(0, 1), (2, 6), (7, 10)], 200)
    """
    words = places_of(text)
    size = max(1, -(-len(words) // MOST_PARTS))
    return [(words[i][0], words[i : i + size][-1][1]) for i in range(0, len(words), size)]


def tokens_of(module: Any, text: str) -> tuple[dict[str, Tensor], list[list[int]], Tensor]:
    """A text as the module reads it: a batch on its device, where each token is in the text, and which are special.

    Raises:
        TypeError: If the module has no classes, no transformer, or a tokenizer that does not say where tokens are.
    """
    if not all(hasattr(module, name) for name in ("classes", "backbone")) or not module.tokenizer.is_fast:
        raise TypeError(
            f"{type(module).__name__} shows nothing of the words of a text: that takes classes, a transformer as "
            "backbone, and a fast tokenizer; use occlusion"
        )
    encoded = module.tokenizer(
        text,
        truncation=True,
        max_length=truncation_length(None, module.tokenizer, module),
        return_tensors="pt",
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    places: list[list[int]] = encoded.pop("offset_mapping")[0].tolist()
    special: Tensor = encoded.pop("special_tokens_mask")[0].bool()
    return {name: value.to(module.device) for name, value in encoded.items()}, places, special


def by_part(text: str, places: Sequence[Sequence[int]], shares: Sequence[float]) -> list[Part]:
    """The shares of the tokens added up over the words that they are of; special tokens are of none."""
    spans = parts_of(text)
    effects = [0.0] * len(spans)
    for (start, end), share in zip(places, shares, strict=True):
        if end > start:
            word = next(number for number, span in enumerate(spans) if span[1] > start or number == len(spans) - 1)
            effects[word] += share
    return [Part(start, end, text[start:end], effect) for (start, end), effect in zip(spans, effects, strict=True)]
