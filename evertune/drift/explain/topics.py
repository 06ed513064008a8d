"""The topics that have appeared, grown, shrunk or disappeared."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from evertune.drift.explain.p_values import two_shares
from evertune.drift.explain.tokens import log_odds
from evertune.drift.scripts import words_of

_VOCABULARY = 2_000  # number of words in the tf-idf features
_STARTS, _STEPS = 4, 30  # of k-means: random starts, and maximum iterations of each
_COMMON = 0.2  # share of the other topics' records above which a word says nothing about a topic
_WORDS = 6  # number of words that describe a topic


@dataclass(frozen=True)
class TopicChange:
    """A group of similar records, and how its share has changed.

    Attributes:
        words: Words that distinguish it from the other topics, the most distinctive first.
        before: Share of the records before the change that belong to it.
        after: Share of the records after the change that belong to it.
        z: Change of the share in units of its standard deviation if there were no change.
        example_before: Position of the record before the change that is nearest to the topic's centre; None if there is
            none.
        example_after: Position of the record after the change that is nearest to the topic's centre; None if there is
            none.
    """

    words: list[str]
    before: float
    after: float
    z: float
    example_before: int | None
    example_after: int | None


def changed_topics(
    before: Sequence[str],
    after: Sequence[str],
    features: tuple[Tensor, Tensor] | None = None,
    *,
    n_topics: int = 8,
    seed: int = 0,
) -> list[TopicChange]:
    """The topics of two lists of texts, found by spherical k-means (Dhillon & Modha 2001), and the share of each.

    Both sides are clustered together with equal total weight, so that a topic is also found if it is only in the
    shorter list.

    Args:
        before: Texts before the change.
        after: Texts after the change.
        features: Features of the texts, ``[texts, n_features]`` for each side, of which only the directions count.
            Default: tf-idf features of the words.
        n_topics: Number of clusters; fewer are used if there are few texts. Default: 8.
        seed: Seed of the random starts.

    Returns:
        All topics, the largest change first.

    Example:
        >>> before, after = ["rain and wind", "shares and bonds"] * 20, ["rain and wind", "goals and fouls"] * 20
        >>> topics = changed_topics(before, after, n_topics=3)
        >>> [(topic.words[0], topic.before, topic.after) for topic in topics[:2]]
        [('bonds', 0.5, 0.0), ('fouls', 0.0, 0.5)]
    """
    if not before or not after:
        return []
    n, n_before = len(before) + len(after), len(before)
    counted = [Counter(words_of(text)) for text in (*before, *after)]
    holding = Counter(word for counts in counted for word in counts)
    points = normalize(torch.cat(features).float() if features else _tf_idf(counted, holding))
    is_after = torch.arange(n) >= n_before
    weights = torch.where(is_after, 1 / (n - n_before), 1 / n_before)
    n_topics = max(1, min(n_topics, n // 10))
    centres, members = _spherical_k_means(points, weights, n_topics, torch.Generator().manual_seed(seed))
    changes = []
    for topic in range(len(centres)):
        inside = members == topic
        counts = [int((inside & side).sum()) for side in (~is_after, is_after)]
        if not sum(counts):
            continue
        members_of = inside.nonzero().flatten().tolist()
        nearness = torch.where(inside, points @ centres[topic], -math.inf)
        nearest = [int(nearness[:n_before].argmax()), int(nearness[n_before:].argmax())]
        changes.append(
            TopicChange(
                words=_telling_words(
                    Counter(word for i in members_of for word in counted[i]), holding, n - sum(counts)
                ),
                before=counts[0] / n_before,
                after=counts[1] / (n - n_before),
                z=two_shares(counts[0], n_before, counts[1], n - n_before),
                example_before=nearest[0] if counts[0] else None,
                example_after=nearest[1] if counts[1] else None,
            )
        )
    return sorted(changes, key=lambda change: (-abs(change.z), change.words))


def _spherical_k_means(points: Tensor, weights: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centres of unit length, ``[k, n_features]``, and the index of the nearest for each point; the best of several
    starts."""
    best, best_fit = (points[:1], torch.zeros(len(points), dtype=torch.long)), -math.inf
    for _ in range(_STARTS):
        centres = points[_first_centres(points, weights, k, generator)]
        members = (points @ centres.T).argmax(1)
        for _ in range(_STEPS):
            sums = torch.zeros_like(centres).index_add_(0, members, points * weights.unsqueeze(1))
            centres = normalize(sums)
            nearness, now = (points @ centres.T).max(1)
            if torch.equal(now, members):
                break
            members = now
        fit = float((nearness * weights).sum())
        if fit > best_fit + 1e-6:
            best, best_fit = (centres, members), fit
    return best


def _first_centres(points: Tensor, weights: Tensor, k: int, generator: torch.Generator) -> list[int]:
    """k-means++ (Arthur & Vassilvitskii 2007): a point far from the chosen centres is more likely to be the next."""
    chosen = [int(torch.multinomial(weights, 1, generator=generator))]
    farness = torch.full((len(points),), math.inf)
    while len(chosen) < k:
        farness = torch.minimum(farness, (1 - points @ points[chosen[-1]]).clamp(min=0))
        farness[farness < 1e-6] = 0.0  # the same point, up to rounding
        if not farness.any():
            break
        chosen.append(int(torch.multinomial(weights * farness, 1, generator=generator)))
    return chosen


def _telling_words(members: Counter[str], all_records: Counter[str], n_others: int) -> list[str]:
    """The words with the largest log-odds against the other topics, or the most frequent ones if there is only one
    topic.

    Args:
        members: Number of records of the topic that have each word.
        all_records: Number of all records that have each word.
        n_others: Number of records of the other topics.
    """
    others = all_records - members
    if not others:
        return [word for word, _ in sorted(members.items(), key=lambda item: (-item[1], item[0]))][:_WORDS]
    found = [change for change in log_odds(others, members, min_records=2).values() if change.z > 0]
    # Words of the language rather than of a topic, such as "the", are frequent elsewhere too, whatever the language.
    common = {word for word, n in others.items() if n > _COMMON * n_others}
    telling = [change for change in found if not common.issuperset(change.token.split())]
    return [change.token for change in sorted(telling or found, key=lambda change: (-change.z, change.token))][:_WORDS]


def _tf_idf(counted: Sequence[Counter[str]], holding: Counter[str]) -> Tensor:
    """Tf-idf features, ``[texts, words]``, of the most frequent words, without those in more than half of the texts."""
    common = [word for word, n in holding.items() if 2 <= n <= max(2, len(counted) / 2)]
    common = sorted(common, key=lambda word: (-holding[word], word))[:_VOCABULARY]
    places = {word: place for place, word in enumerate(common)}
    features = torch.zeros(len(counted), max(len(places), 1))
    for row, counts in enumerate(counted):
        for word, count in counts.items():
            if word in places:
                features[row, places[word]] = (1 + math.log(count)) * math.log(len(counted) / holding[word])
    return features
