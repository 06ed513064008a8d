"""Entities in sequences of tags: which there are, whether the tags are well formed, and precision, recall and F1.

An entity is right if its first word, its last word and its type are. Totals are over all entities of all sentences
(micro averages), as ``conlleval`` (Tjong Kim Sang & De Meulder 2003) and seqeval count them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

Scheme = Literal["IOB2", "BIOES"]
SCHEMES: tuple[str, ...] = get_args(Scheme)
_PREFIXES: dict[str, str] = {"IOB2": "BI", "BIOES": "BIES"}
OUTSIDE = "O"
"""The tag of a word outside all entities."""


class Entity(NamedTuple):
    """An entity of a sentence.

    Args:
        start: Number of its first word.
        end: Number of the word after its last one.
        type: Its type.
    """

    start: int
    end: int
    type: str


def entities_in(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sentence, from its tags in IOB2 or BIOES, in order.

    Tags that a model predicts need not be well formed: an entity begins wherever a tag does not continue the one before
    it, as in ``conlleval`` and in seqeval's default mode.

    Args:
        tags: ``O`` or a prefix and a type, such as ``B-PER``, of each word.

    Example:
        >>> entities_in(["B-PER", "I-PER", "O", "I-LOC"])
        [Entity(start=0, end=2, type='PER'), Entity(start=3, end=4, type='LOC')]
    """
    found: list[Entity] = []
    start, before = 0, ("", "")
    for place, tag in enumerate([*tags, OUTSIDE]):
        prefix, kind = split_tag(tag)
        if prefix in ("I", "E") and before in (("B", kind), ("I", kind)):
            before = prefix, kind
            continue
        if before[0]:
            found.append(Entity(start, place, before[1]))
        start, before = place, (prefix, kind)
    return found


def split_tag(tag: str) -> tuple[str, str]:
    """The prefix and the type of a tag; both are empty for ``O``.

    Example:
        >>> split_tag("B-PER"), split_tag("O")
        (('B', 'PER'), ('', ''))
    """
    prefix, _, kind = tag.partition("-")
    return ("", "") if tag == OUTSIDE else (prefix, kind)


def tags_of(entities: Iterable[Entity], n_words: int) -> list[str]:
    """The tags of a sentence in IOB2.

    Example:
        >>> tags_of([Entity(1, 3, "LOC")], 4)
        ['O', 'B-LOC', 'I-LOC', 'O']
    """
    tags = [OUTSIDE] * n_words
    for start, end, kind in entities:
        tags[start:end] = [f"B-{kind}"] + [f"I-{kind}"] * (end - start - 1)
    return tags


def check_tags(tags: Sequence[str], scheme: Scheme = "IOB2") -> None:
    """Check that the tags of a sentence are well formed.

    Args:
        tags: The tag of each word.
        scheme: ``IOB2`` (default): the first word of an entity has ``B-``, the others ``I-``. ``BIOES``: the last one
            has ``E-``, the only one ``S-``.

    Raises:
        ValueError: If a tag does not belong to the scheme, or cannot follow the one before it. The message names the
            first such word, counted from 1.

    Example:
        >>> check_tags(["O", "I-PER"])
        Traceback (most recent call last):
        ValueError: word 2 has the tag 'I-PER', which continues no PER: it follows 'O'
    """
    prefixes = _PREFIXES[scheme]
    before, prefix_before, kind_before = OUTSIDE, "", ""
    for number, tag in enumerate([*tags, OUTSIDE], 1):
        prefix, kind = split_tag(tag)
        if tag != OUTSIDE and (prefix not in [*prefixes] or not kind.strip()):
            known = ", ".join(f"{one}-TYPE" for one in prefixes)
            raise ValueError(f"word {number} has the tag {tag!r:.80}, which is not of {scheme}: O, {known}")
        continues = prefix in ("I", "E")
        if continues and not (prefix_before in ("B", "I") and kind == kind_before):
            raise ValueError(f"word {number} has the tag {tag!r:.80}, which continues no {kind}: it follows {before!r}")
        if scheme == "BIOES" and prefix_before in ("B", "I") and not continues:
            follows = f"{tag!r:.80} follows" if number <= len(tags) else "the sentence ends"
            raise ValueError(f"word {number - 1} has the tag {before!r:.80}, but {follows}: no E-{kind_before} ends it")
        before, prefix_before, kind_before = tag, prefix, kind


@dataclass(frozen=True)
class EntityScores:
    """Precision, recall and F1 of predicted entities, over all sentences.

    Args:
        n_right: Number of predicted entities that are right.
        n_predicted: Number of predicted entities.
        n_gold: Number of entities that there are.
        types: The same of the entities of each type.

    Example:
        >>> EntityScores(n_right=1, n_predicted=2, n_gold=4).f1
        0.3333333333333333
    """

    n_right: int
    n_predicted: int
    n_gold: int
    types: dict[str, EntityScores] | None = None

    @property
    def precision(self) -> float:
        """Share of the predicted entities that are right; 0 if none are predicted."""
        return self.n_right / self.n_predicted if self.n_predicted else 0.0

    @property
    def recall(self) -> float:
        """Share of the entities that are found; 0 if there are none."""
        return self.n_right / self.n_gold if self.n_gold else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 without entities."""
        total = self.n_predicted + self.n_gold
        return 2 * self.n_right / total if total else 0.0


def entity_scores(gold: Sequence[Collection[Entity]], predicted: Sequence[Collection[Entity]]) -> EntityScores:
    """Precision, recall and F1 of the predicted entities of sentences.

    Args:
        gold: The entities of each sentence.
        predicted: Those predicted for each sentence, in the same order.

    Raises:
        ValueError: If the numbers of sentences differ.

    Example:
        >>> found = entity_scores([{Entity(0, 2, "PER"), Entity(3, 4, "LOC")}], [{Entity(0, 2, "PER")}])
        >>> found.precision, found.recall, found.types["LOC"].recall
        (1.0, 0.5, 0.0)
    """
    if len(gold) != len(predicted):
        raise ValueError(
            f"each sentence needs its predictions: got {len(gold)} sentences, {len(predicted)} predictions"
        )
    counts: list[Counter[str]] = [Counter(), Counter(), Counter()]
    for a, b in zip(map(set, gold), map(set, predicted), strict=True):
        for count, entities in zip(counts, (a & b, b, a), strict=True):
            count.update(entity.type for entity in entities)
    kinds = sorted({kind for count in counts for kind in count})
    right, said, there = counts
    types = {kind: EntityScores(right[kind], said[kind], there[kind]) for kind in kinds}
    return EntityScores(right.total(), said.total(), there.total(), types)


def sentence_f1(gold: Collection[Entity], predicted: Collection[Entity]) -> float:
    """The F1 of the entities of one sentence, in [0, 1]; 1 if there are none and none are predicted.

    Example:
        >>> sentence_f1([], []), sentence_f1([], [Entity(0, 1, "PER")])
        (1.0, 0.0)
    """
    total = len(set(gold)) + len(set(predicted))
    return 2 * len(set(gold) & set(predicted)) / total if total else 1.0
