"""Scores of an answer to a question, by SQuAD's rules (Rajpurkar et al. 2016; 2018 for questions without an answer).

A question comes with any number of right answers, of which the nearest counts; without one, the right answer is none.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """An answer as it is compared: in lower case, without ASCII punctuation, articles and needless white space.

    Example:
        >>> normalise_answer("  The  U.S. President! ")
        'us president'
    """
    plain = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Whether an answer equals one of the right ones after normalisation: 1.0 or 0.0.

    Args:
        prediction: The answer, or ``""`` for "there is none".
        answers: The right answers; empty if there is none.

    Example:
        >>> exact_match("the Eiffel Tower", ["Eiffel tower.", "Paris"]), exact_match("", []), exact_match("Rome", [])
        (1.0, 1.0, 0.0)
    """
    said = normalise_answer(prediction)
    return float(any(said == right for right in _right(answers)))


def answer_f1(prediction: str, answers: Sequence[str]) -> float:
    """The F1 of an answer's words against those of the nearest right answer, in [0, 1].

    Words that occur several times count that many times. If either has no words after normalisation, the score is 1.0
    if both have none, and 0.0 otherwise.

    Args:
        prediction: The answer, or ``""`` for "there is none".
        answers: The right answers; empty if there is none.

    Example:
        >>> answer_f1("in the Eiffel Tower", ["Eiffel Tower"]), answer_f1("", ["Eiffel Tower"]), answer_f1("", [])
        (0.8, 0.0, 1.0)
    """
    said = normalise_answer(prediction).split()
    return max(_f1(said, right.split()) for right in _right(answers))


def _right(answers: Sequence[str]) -> list[str]:
    """The right answers, normalised; one without words stands for "there is none" where all are."""
    return [right for right in map(normalise_answer, answers) if right] or [""]


def _f1(said: list[str], right: list[str]) -> float:
    if not said or not right:
        return float(said == right)
    common = (Counter(said) & Counter(right)).total()
    return 2 * common / (len(said) + len(right))
