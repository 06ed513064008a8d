"""How near generated texts are to their references: ROUGE-L, chrF and BLEU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from evertune.utils.extras import library

SCORES = ("rouge_l", "chrf", "bleu")
"""The scores of generated texts."""

_WORD = re.compile(r"\w+")


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L of a text, in [0, 1]: the F1 of the longest common subsequence of words (Lin, 2004).

    Words are runs of letters and digits of any script, compared without case and without stemming. In languages that
    put no spaces between words, use :func:`chrf`.

    Example:
        >>> rouge_l("the cat sat", "The cat sat.")
        1.0
        >>> round(rouge_l("the cat sat on the mat", "a cat was on a mat"), 2)
        0.5
    """
    said, wanted = _WORD.findall(text.casefold()), _WORD.findall(reference.casefold())
    if not said or not wanted:
        return float(said == wanted)
    return 2 * _common(said, wanted) / (len(said) + len(wanted))


def chrf(text: str, reference: str) -> float:
    """chrF of a text, in [0, 1]: the F-score of character n-grams (Popović, 2015), by sacreBLEU.

    Raises:
        ModuleNotFoundError: If sacreBLEU is not installed; the message has the command that installs it.
    """
    score: float = check_scorer("chrf").sentence_chrf(text, [reference]).score
    return score / 100


def corpus_scores(
    texts: Sequence[str], references: Sequence[str], names: Sequence[str] = ("rouge_l",)
) -> dict[str, float]:
    """The scores of all texts together, each in [0, 1].

    Args:
        texts: Generated texts.
        references: The reference of each.
        names: ``rouge_l``, a mean over the texts; ``bleu`` (Papineni et al., 2002) and ``chrf`` by sacreBLEU over the
            corpus, as they are reported. Default: ``rouge_l``.

    Raises:
        ModuleNotFoundError: If sacreBLEU is needed and not installed.
        ValueError: If there are no texts.

    Example:
        >>> corpus_scores(["a cat sat", "so it goes"], ["a cat sat", "so be it"])
        {'rouge_l': 0.8333333333333333}
    """
    if not texts:
        raise ValueError("there are no texts to score")
    scores = {}
    for name in names:
        if name == "rouge_l":
            scores[name] = sum(map(rouge_l, texts, references)) / len(texts)
        else:
            score = getattr(check_scorer(name), f"corpus_{name}")(list(texts), [list(references)]).score
            scores[name] = score / 100
    return scores


def check_scorer(name: str) -> Any:
    """The library that computes a score of :data:`SCORES`; None for ROUGE-L, which needs none.

    Raises:
        ModuleNotFoundError: If it is not installed; the message has the command that installs it.
        ValueError: If there is no such score.
    """
    if name not in SCORES:
        raise ValueError(f"there is no score {name!r}; use {', '.join(SCORES)}")
    return None if name == "rouge_l" else library("sacrebleu", "generation")


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence, by bit-parallel steps (Hyyrö, 2004)."""
    places: dict[str, int] = {}
    for number, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << number
    everything = (1 << len(one)) - 1
    row = everything  # a bit that is 0 marks where the subsequence grows
    for word in other:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & everything
    return len(one) - row.bit_count()
