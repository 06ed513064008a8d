"""What has changed, in words: an alarm says only that something has."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from evertune.drift.explain.fields import FieldChange, changed_fields, corrected
from evertune.drift.explain.tokens import TokenChange, changed_tokens, tokens_of
from evertune.drift.explain.topics import TopicChange, changed_topics

_POINTS = 1_000  # records of a side that the witness function is made of


@dataclass(frozen=True)
class Attribution:
    """What :func:`attribute` found.

    Attributes:
        n_before: records before the change that were looked at.
        n_after: records after it.
        tokens: words and pairs of words that have become more or less frequent, the surest first; only those beyond
            chance.
        topics: groups of records that are alike with their shares, the largest change first; all of them.
        fields: all fields compared, the surest change first: ``p_corrected`` shows which are beyond chance.
        examples_before: positions (in the records given) of the records that are most typical of what has gone.
        examples_after: the same of what has come.
    """

    n_before: int
    n_after: int
    tokens: list[TokenChange] = field(default_factory=list)
    topics: list[TopicChange] = field(default_factory=list)
    fields: list[FieldChange] = field(default_factory=list)
    examples_before: list[int] = field(default_factory=list)
    examples_after: list[int] = field(default_factory=list)

    @property
    def schema(self) -> list[FieldChange]:
        """Fields that are new, gone, or of another type."""
        return [change for change in self.fields if change.kind == "schema"]


def attribute(
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    text_fields: str | Sequence[str] = "text",
    *,
    label: str | None = None,
    features: tuple[Tensor, Tensor] | None = None,
    topic_features: bool = True,
    ignore: Sequence[str] = (),
    n_tokens: int = 20,
    n_topics: int = 8,
    n_examples: int = 5,
    max_records: int = 5_000,
    seed: int = 0,
) -> Attribution:
    """Explain a change by the records before and after it.

    What it names has changed together with the data; that it is the cause, nobody can tell from records alone.

    Args:
        before: records before the change, in order.
        after: records after it, in order.
        text_fields: the fields that hold text, one or several; records may lack them.
        label: the field of the label: compared as a category, whatever its values.
        features: of the same records, ``[records, n_features]`` each, such as embeddings. Topics are found in them and
            examples chosen by them. Without features, by words.
        topic_features: find topics in ``features``, too: right for embeddings; hashed counts of words are a poorer
            view of topics than the words that are counted here.
        ignore: fields to leave out.
        n_tokens: tokens named at most.
        n_topics: topics looked for.
        n_examples: examples of each side.
        max_records: more records of a side are sampled, in order; it bounds time and memory.
        seed: of the samples and of the topics.

    Raises:
        ValueError: when a side is empty or has more or fewer features than records, or a size is not positive.

    Example:
        >>> before = [{"text": "the card was lost", "lang": "en"}] * 40
        >>> after = [{"text": "the card was cloned", "lang": "en"}] * 40
        >>> found = attribute(before, after)
        >>> [(token.token, token.before, token.after) for token in found.tokens][:2]
        [('cloned', 0, 40), ('lost', 40, 0)]
    """
    for name, value in (("n_tokens", n_tokens), ("n_topics", n_topics), ("max_records", max_records)):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    if not before or not after:
        side = "before" if not before else "after"
        raise ValueError(f"there are no records {side} the change: a change is explained by records of both sides")
    if features and (len(features[0]) != len(before) or len(features[1]) != len(after)):
        raise ValueError(
            f"features must have one row for each record, got {len(features[0])} and {len(features[1])} for "
            f"{len(before)} and {len(after)} records"
        )
    text_fields = [text_fields] if isinstance(text_fields, str) else list(text_fields)
    generator = random.Random(seed)
    places = [_sample(len(records), max_records, generator) for records in (before, after)]
    old, new = [
        [{name: value for name, value in records[i].items() if name not in ignore} for i in chosen]
        for records, chosen in zip((before, after), places, strict=True)
    ]
    texts = [[text_of(record, text_fields) for record in side] for side in (old, new)]
    rows = (features[0][places[0]], features[1][places[1]]) if features else None
    tokens = changed_tokens(texts[0], texts[1], n_tokens=max(n_tokens, 200))
    topics = (
        changed_topics(texts[0], texts[1], rows if topic_features else None, n_topics=n_topics, seed=seed)
        if any(map(any, texts))
        else []
    )
    weights = _witness(*rows) if rows else _by_tokens(texts, tokens)
    return Attribution(
        n_before=len(old),
        n_after=len(new),
        tokens=tokens[:n_tokens],
        topics=[_placed(topic, places) for topic in topics],
        fields=corrected(changed_fields(old, new, text_fields, labels=[label] if label else [])),
        examples_before=[places[0][i] for i in _different(-weights[0], old, text_fields, n_examples)],
        examples_after=[places[1][i] for i in _different(weights[1], new, text_fields, n_examples)],
    )


def text_of(record: Mapping[str, Any], text_fields: Sequence[str]) -> str:
    """The texts of a record as one; what is missing is left out."""
    values = (record.get(name) for name in text_fields)
    return " ".join(str(value) for value in values if value not in (None, ""))


def _sample(n: int, size: int, generator: random.Random) -> list[int]:
    return list(range(n)) if n <= size else sorted(generator.sample(range(n), size))


def _placed(topic: TopicChange, places: list[list[int]]) -> TopicChange:
    examples = (topic.example_before, topic.example_after)
    real = [None if i is None else side[i] for i, side in zip(examples, places, strict=True)]
    return replace(topic, example_before=real[0], example_after=real[1])


def _witness(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel's witness function at each record (Gretton et al. 2012): positive where there is more now."""
    sides = [side.double() for side in (before, after)]
    chosen = [torch.linspace(0, len(side) - 1, min(len(side), _POINTS)).long() for side in sides]
    distances = torch.pdist(torch.cat([side[:: max(1, len(side) // 250)] for side in sides]))
    distances = distances[distances > 0]
    width = distances.median().item() if len(distances) else 1.0

    def nearness(records: Tensor, side: int, own: bool) -> Tensor:
        kernel = (-(torch.cdist(records, sides[side][chosen[side]]) / width).square() / 2).exp()
        if own:  # a record says nothing about what is near itself
            kernel[chosen[side], torch.arange(len(chosen[side]))] = 0.0
        return kernel.sum(1) / max(len(chosen[side]) - own, 1)

    of_before, of_after = [
        nearness(records, 1, own=side == 1) - nearness(records, 0, own=side == 0) for side, records in enumerate(sides)
    ]
    return of_before, of_after


def _by_tokens(texts: Sequence[Sequence[str]], tokens: Sequence[TokenChange]) -> tuple[Tensor, Tensor]:
    """The z-scores of a record's tokens, added up; long records win by the root of their length only."""
    z = {change.token: change.z for change in tokens}
    of = []
    for side in texts:
        found = [tokens_of(text) for text in side]
        weights = [sum(z.get(token, 0.0) for token in here) / math.sqrt(max(len(here), 1)) for here in found]
        of.append(torch.tensor(weights, dtype=torch.float64))
    return of[0], of[1]


def _different(weights: Tensor, records: Sequence[Mapping[str, Any]], text_fields: Sequence[str], n: int) -> list[int]:
    """The heaviest records, of each text one."""
    chosen: dict[str, int] = {}
    for i in torch.argsort(weights, descending=True, stable=True).tolist():
        if len(chosen) == n:
            break
        chosen.setdefault(text_of(records[i], text_fields), i)
    return list(chosen.values())
