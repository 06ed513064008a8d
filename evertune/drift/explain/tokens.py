"""The words that have become more or less frequent."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from evertune.drift.scripts import without_space, words_of

_PRIOR = 0.1  # weight of the prior relative to the smaller side
_NOTABLE = 1.0  # z-scores below it are not tested


@dataclass(frozen=True)
class TokenChange:
    """A word, or a pair of consecutive words, that has become more or less frequent.

    In scripts without spaces, characters take the place of words.

    Attributes:
        token: The word in lower case, or two words separated by a space (two characters: by nothing).
        before: Number of records before the change that contain it.
        after: Number of records after the change that contain it.
        log_odds: Logarithm of the ratio of the odds, after to before; positive if it has become more frequent.
        z: The same in units of its standard deviation, for ranking; the prior shrinks it most if a token is new.
        p_corrected: P-value of an exact test, times the number of tokens (Bonferroni), by :func:`changed_tokens`.
    """

    token: str
    before: int
    after: int
    log_odds: float
    z: float
    p_corrected: float = math.nan


def changed_tokens(
    before: Sequence[str], after: Sequence[str], *, n_tokens: int = 20, min_records: int = 5, level: float = 0.05
) -> list[TokenChange]:
    """The words and pairs of words whose frequency has changed beyond chance.

    Tokens are ranked by the log-odds ratio with an informative Dirichlet prior (Monroe, Colaresi & Quinn 2008), whose
    z-scores favour neither rare nor frequent words. The prior is the distribution over both sides together, with the
    weight of a tenth of the smaller side. A token counts once per record, so that one long record that repeats a word
    is not a change.

    Args:
        before: Texts before the change.
        after: Texts after the change.
        n_tokens: Maximum number of tokens. Default: 20.
        min_records: Minimum number of records of both sides together that contain a token. Default: 5.
        level: Probability that any token is named if nothing has changed, by an exact binomial test of the records that
            contain a token, corrected for the number of tokens (Bonferroni). Default: 0.05.

    Returns:
        The tokens with the largest absolute z-scores first. Pairs are included only if they stand out more than both of
        their words.

    Example:
        >>> before, after = ["the cat sat here"] * 50, ["the cat sat here"] * 30 + ["the dog sat here"] * 20
        >>> [(change.token, change.before, change.after) for change in changed_tokens(before, after)]
        [('dog', 0, 20)]
    """
    changes = log_odds(_count(before), _count(after), min_records=min_records)
    share = len(after) / max(len(before) + len(after), 1)
    found = [change for change in changes.values() if _stands_out(change, changes)]
    found = [replace(change, p_corrected=min(_p_value(change, share) * len(changes), 1.0)) for change in found]
    found = [change for change in found if change.p_corrected <= level]
    return sorted(found, key=lambda change: (-abs(change.z), change.token))[:n_tokens]


def log_odds(before: Counter[str], after: Counter[str], *, min_records: int = 1) -> dict[str, TokenChange]:
    """Compares all tokens as in :func:`changed_tokens`, given the number of records on each side that contain them.

    Example:
        >>> changes = log_odds(Counter(cat=50, here=50), Counter(dog=50, here=50))
        >>> [(token, round(change.z, 1)) for token, change in sorted(changes.items())]
        [('cat', -5.7), ('dog', 5.7), ('here', 0.0)]
    """
    totals = [before.total(), after.total()]
    if not all(totals):
        return {}
    weight = max(_PRIOR * min(totals), 1.0)
    changes = {}
    for token, both in (before + after).items():
        if both < min_records:
            continue
        prior = weight * both / sum(totals)
        more = [before[token] + prior, after[token] + prior]
        # The lower bound keeps the logarithm finite for a token that every record contains.
        odds = [math.log(m / max(total + weight - m, 0.5)) for m, total in zip(more, totals, strict=True)]
        z = (odds[1] - odds[0]) / math.sqrt(1 / more[0] + 1 / more[1])
        changes[token] = TokenChange(token, before[token], after[token], odds[1] - odds[0], z)
    return changes


def tokens_of(text: str) -> set[str]:
    """The distinct words of a text, and its pairs of consecutive words."""
    words = words_of(text)
    return {*words, *(_pair(first, second) for first, second in pairwise(words))}


def _pair(first: str, second: str) -> str:
    return first + second if without_space(first) and without_space(second) else f"{first} {second}"


def _count(texts: Iterable[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(tokens_of(text))
    return counts


def _p_value(change: TokenChange, share: float) -> float:
    """Exact and two-sided: if nothing has changed, a record that contains the token is from after with that ``share``.

    The z-score is not suitable for this: if a token is new, its prior, which limits the effect of chance, hides the
    most certain changes.
    """
    from evertune.gate.statistics import binomial_tail

    if abs(change.z) < _NOTABLE:
        return 1.0
    total = change.before + change.after
    more, share = (change.after, share) if change.z > 0 else (change.before, 1 - share)
    return min(2 * binomial_tail(more, total, share), 1.0)


def _stands_out(change: TokenChange, changes: dict[str, TokenChange]) -> bool:
    words = words_of(change.token)
    return len(words) == 1 or all(abs(change.z) > abs(changes[word].z) for word in words)
