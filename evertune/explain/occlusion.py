"""Occlusion: how much the probability of an answer falls when a part of the text is hidden."""

from __future__ import annotations

from typing import Any

from evertune.explain.parts import Part, parts_of


def occlusion(module: Any, text: str, label: str, batch_size: int = 32) -> list[Part]:
    """The effect of each word on the probability of a class, with one forward pass for each (Li et al. 2016).

    A word is replaced by the mask token of the tokenizer, or left out if it has none. In scripts without spaces between
    words, each character is a part.

    Args:
        module: Module with a ``tokenizer`` whose ``predict`` returns the probability of each class by name.
        text: The text.
        label: The class.
        batch_size: Texts per forward pass. Default: 32.

    Example::

        for part in occlusion(module, "Shares fell after the merger", "business"):
            print(part.text, part.effect)
    """
    spans = parts_of(text)
    mask = module.tokenizer.mask_token or ""
    hidden = [f"{text[:start]}{mask}{text[end:]}" for start, end in spans]
    blank = [not one.strip() for one in hidden]  # the only word of a text cannot be left out
    asked = [text, *(one for one in hidden if one.strip())]
    # One batch a call, so that a server may answer others in between.
    batches = [asked[first : first + batch_size] for first in range(0, len(asked), batch_size)]
    answers = iter([answer for batch in batches for answer in module.predict(batch)])
    whole = next(answers)[label]
    return [
        Part(start, end, text[start:end], 0.0 if is_blank else whole - next(answers)[label])
        for (start, end), is_blank in zip(spans, blank, strict=True)
    ]
