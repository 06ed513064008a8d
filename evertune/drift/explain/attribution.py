"""Explains what has changed, as an alarm says only that something has."""

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

_POINTS = 1_000  # maximum number of records per side in the witness function


@dataclass(frozen=True)
class Attribution:
    """The result of :func:`attribute`.

    Attributes:
        n_before: Number of records before the change that were compared.
        n_after: Number of records after the change that were compared.
        tokens: Words and pairs of words that have become more or less frequent beyond chance, the most certain first.
        topics: All groups of similar records with their shares, the largest change first.
        fields: All fields that were compared, the most certain change first; ``p_corrected`` shows which changes are
            beyond chance.
        examples_before: Positions, in the records given, of those that are most typical of what has disappeared.
        examples_after: Positions of the records that are most typical of what has appeared.
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

    Everything that is named has changed together with the data; whether it is the cause cannot be inferred from records
    alone.

    Args:
        before: Records before the change, in order.
        after: Records after the change, in order.
        text_fields: Name of the field with text, or several names; records may lack them.
        label: Name of the field with the label, which is compared as a category, whatever its values.
        features: Features of the same records, ``[records, n_features]`` for each side, such as embeddings, by which
            topics are found and examples are chosen. None uses the words instead.
        topic_features: Whether topics are also found in ``features``. This suits embeddings; hashed counts of words
            represent topics worse than the words that are counted here.
        ignore: Names of fields to leave out.
        n_tokens: Maximum number of tokens. Default: 20.
        n_topics: Number of topics to look for. Default: 8.
        n_examples: Number of examples of each side. Default: 5.
        max_records: Maximum number of records of each side; more are sampled, in order. It bounds time and memory.
            Default: 5,000.
        seed: Seed of the samples and of the topics.

    Raises:
        ValueError: If a side is empty, the numbers of its records and features differ, or a size is not positive.

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
    """All texts of a record as one; missing ones are left out."""
    values = (record.get(name) for name in text_fields)
    return " ".join(str(value) for value in values if value not in (None, ""))


def _sample(n: int, size: int, generator: random.Random) -> list[int]:
    return list(range(n)) if n <= size else sorted(generator.sample(range(n), size))


def _placed(topic: TopicChange, places: list[list[int]]) -> TopicChange:
    examples = (topic.example_before, topic.example_after)
    real = [None if i is None else side[i] for i, side in zip(examples, places, strict=True)]
    return replace(topic, example_before=real[0], example_after=real[1])


def _witness(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel's witness function at each record (Gretton et al. 2012): positive where the density has increased."""
    sides = [side.double() for side in (before, after)]
    chosen = [torch.linspace(0, len(side) - 1, min(len(side), _POINTS)).long() for side in sides]
    distances = torch.pdist(torch.cat([side[:: max(1, len(side) // 250)] for side in sides]))
    distances = distances[distances > 0]
    width = distances.median().item() if len(distances) else 1.0

    def nearness(records: Tensor, side: int, own: bool) -> Tensor:
        kernel = (-(torch.cdist(records, sides[side][chosen[side]]) / width).square() / 2).exp()
        if own:  # a record must not count as its own neighbour
            kernel[chosen[side], torch.arange(len(chosen[side]))] = 0.0
        return kernel.sum(1) / max(len(chosen[side]) - own, 1)

    of_before, of_after = [
        nearness(records, 1, own=side == 1) - nearness(records, 0, own=side == 0) for side, records in enumerate(sides)
    ]
    return of_before, of_after


def _by_tokens(texts: Sequence[Sequence[str]], tokens: Sequence[TokenChange]) -> tuple[Tensor, Tensor]:
    """The sum of the z-scores of a record's tokens, divided by the root of their number, which tempers long records."""
    z = {change.token: change.z for change in tokens}
    of = []
    for side in texts:
        found = [tokens_of(text) for text in side]
        weights = [sum(z.get(token, 0.0) for token in here) / math.sqrt(max(len(here), 1)) for here in found]
        of.append(torch.tensor(weights, dtype=torch.float64))
    return of[0], of[1]


def _different(weights: Tensor, records: Sequence[Mapping[str, Any]], text_fields: Sequence[str], n: int) -> list[int]:
    """The records with the largest weights, one for each distinct text."""
    chosen: dict[str, int] = {}
    for i in torch.argsort(weights, descending=True, stable=True).tolist():
        if len(chosen) == n:
            break
        chosen.setdefault(text_of(records[i], text_fields), i)
    return list(chosen.values())
