"""Which topics have come, grown, shrunk or gone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from evertune.drift.explain.p_values import two_shares
from evertune.drift.explain.tokens import log_odds, words_of

_VOCABULARY = 2_000  # words in the features that are made here
_STARTS, _STEPS = 4, 30
_WORDS = 6  # that describe a topic


@dataclass(frozen=True)
class TopicChange:
    """A group of records that are alike, and how its share has changed.

    Attributes:
        words: that tell it from the other topics, the most telling first.
        before: its share of the records before the change.
        after: its share of those after it.
        z: the change in units of its standard deviation, were there none.
        example_before: position of the record before the change that is nearest to its centre; None without one.
        example_after: the same after it.
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
    """The topics of two lists of texts, by spherical k-means (Dhillon & Modha 2001), and the share of each.

    Both sides are clustered together and weigh the same, so that a new topic of a short list is found, and so is one
    that has gone.

    Args:
        before: texts before the change.
        after: texts after it.
        features: of both, ``[texts, n_features]`` each; their directions count. By default those of the words
            (tf-idf).
        n_topics: clusters; fewer where there are few texts.
        seed: of the starts.

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
                words=_telling_words(Counter(word for i in members_of for word in counted[i]), holding),
                before=counts[0] / n_before,
                after=counts[1] / (n - n_before),
                z=two_shares(counts[0], n_before, counts[1], n - n_before),
                example_before=nearest[0] if counts[0] else None,
                example_after=nearest[1] if counts[1] else None,
            )
        )
    return sorted(changes, key=lambda change: (-abs(change.z), change.words))


def _spherical_k_means(points: Tensor, weights: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centres ``[k, n_features]`` of unit length and the nearest of each point: the best of a few starts."""
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
    """k-means++ (Arthur & Vassilvitskii 2007): the farther a point is from those chosen, the likelier it is next."""
    chosen = [int(torch.multinomial(weights, 1, generator=generator))]
    farness = torch.full((len(points),), math.inf)
    while len(chosen) < k:
        farness = torch.minimum(farness, (1 - points @ points[chosen[-1]]).clamp(min=0))
        farness[farness < 1e-6] = 0.0  # the same point again
        if not farness.any():
            break
        chosen.append(int(torch.multinomial(weights * farness, 1, generator=generator)))
    return chosen


def _telling_words(members: Counter[str], all_records: Counter[str]) -> list[str]:
    """By their log-odds against the other topics; without others, by their frequency."""
    others = all_records - members
    if not others:
        return [word for word, _ in sorted(members.items(), key=lambda item: (-item[1], item[0]))][:_WORDS]
    found = [change for change in log_odds(others, members, min_records=2).values() if change.z > 0]
    return [change.token for change in sorted(found, key=lambda change: (-change.z, change.token))][:_WORDS]


def _tf_idf(counted: Sequence[Counter[str]], holding: Counter[str]) -> Tensor:
    """Of the words most texts hold (those in more than half of them left out): ``[texts, words]``."""
    common = [word for word, n in holding.items() if 2 <= n <= max(2, len(counted) / 2)]
    common = sorted(common, key=lambda word: (-holding[word], word))[:_VOCABULARY]
    places = {word: place for place, word in enumerate(common)}
    features = torch.zeros(len(counted), max(len(places), 1))
    for row, counts in enumerate(counted):
        for word, count in counts.items():
            if word in places:
                features[row, places[word]] = (1 + math.log(count)) * math.log(len(counted) / holding[word])
    return features
