"""From the scores of tokens to the answer: the best span over all windows of a context, or none."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Numbers = NDArray[np.int64]


class Span(NamedTuple):
    """The answer to a question.

    Args:
        start: Where the answer begins in the context, in characters; None for "there is no answer".
        end: Where it ends: the number of its last character, plus one.
        probability: Probability of this answer among all spans of the context and "no answer".
    """

    start: int | None
    end: int | None
    probability: float


class Window(NamedTuple):
    """The scores of one window.

    Args:
        start: Score of each token as the first one of the answer [tokens]; the first token stands for "no answer".
        end: Score of each token as the last one of the answer [tokens].
        char_start: Where each token begins in the context, in characters [tokens].
        char_end: Where it ends [tokens]; 0 for tokens outside the context.
    """

    start: Array
    end: Array
    char_start: Numbers
    char_end: Numbers


def best_span(windows: list[Window], max_answer_tokens: int, threshold: float = 0.0) -> Span:
    """The most probable answer over the windows of a context.

    In a window, the score of a span is the sum of the scores of its first and last token, and that of "no answer" the
    sum of the first token's two scores (Devlin et al. 2019). Their difference is the log-odds of the span against "no
    answer", which compares spans of different windows: a window without the answer finds all its spans less probable
    than none. A span that is in several windows counts once, with its best log-odds.

    Args:
        windows: The windows.
        max_answer_tokens: Longest span that is considered.
        threshold: Log-odds against "no answer" that an answer must exceed. Default: 0, the more probable of the two.

    Example:
        >>> start, end = np.array([0.0, 0.0, 5.0, 0.0]), np.array([0.0, 0.0, 0.0, 4.0])
        >>> window = Window(start, end, np.array([0, 0, 6, 11]), np.array([0, 5, 10, 16]))  # [CLS] and three words
        >>> answer = best_span([window], max_answer_tokens=3)
        >>> answer.start, answer.end, round(answer.probability, 2)
        (6, 16, 0.97)
        >>> best_span([window], max_answer_tokens=3, threshold=10).start is None
        True
    """
    found = [_candidates(window, max_answer_tokens) for window in windows]
    places, which = np.unique(np.concatenate([place for place, _ in found]), axis=0, return_inverse=True)
    if not len(places):
        return Span(None, None, 1.0)
    odds = np.full(len(places), -np.inf)
    np.maximum.at(odds, which.reshape(-1), np.concatenate([odds_here for _, odds_here in found]))
    best = int(odds.argmax())
    highest = max(float(odds[best]), 0.0)
    total = highest + np.log(np.exp(odds - highest).sum() + np.exp(-highest))
    if odds[best] > threshold:
        start, end = places[best].tolist()
        return Span(start, end, float(np.exp(odds[best] - total)))
    return Span(None, None, float(np.exp(-total)))


def _candidates(window: Window, max_answer_tokens: int) -> tuple[Numbers, Array]:
    """The spans of a window, [spans, 2] in characters, and their log-odds against "no answer" [spans]."""
    in_context = np.flatnonzero(window.char_end > 0)
    first, last = np.meshgrid(in_context, in_context, indexing="ij")
    fits = (first <= last) & (last < first + max_answer_tokens)
    first, last = first[fits], last[fits]
    odds = window.start[first] + window.end[last] - window.start[0] - window.end[0]
    return np.stack([window.char_start[first], window.char_end[last]], 1), odds
