"""Token classification: entities of any type, as tags of words or as spans of characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from evertune._lightning import rank_zero_warn
from evertune.gate.predictions import Predictions
from evertune.metrics.entities import (
    OUTSIDE,
    SCHEMES,
    Entity,
    Scheme,
    check_tags,
    entities_in,
    sentence_f1,
    split_tag,
)
from evertune.sources.base import Row
from evertune.sources.values import absent, text_value
from evertune.tasks.base import IGNORED, Change, Task
from evertune.tasks.predicting import batch_of, batches_by_length, columns_of
from evertune.tasks.texts import TokenizedDataset
from evertune.tasks.token_cache import TokenCache
from evertune.tasks.well_formed import best_tags
from evertune.tasks.words import NO_TAG, first_pieces, tagged_words, tags_of_pieces, words_between_spaces, words_in
from evertune.utils.examples import column_of

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from evertune._lightning import pl

_AT_A_TIME = 1000


class TokenClassificationTask(Task):
    """Entities in texts: their words and their types.

    A record has words with a tag each, or a running text with the entities in it::

        {"text": ["EU", "rejects", "it"], "label": ["B-ORG", "O", "O"]}
        {"text": "EU rejects it.", "label": [{"start": 0, "end": 2, "label": "ORG"}]}

    Words are joined by spaces. ``start`` and ``end`` (excluded) count characters; a word of a running text is a run of
    letters and digits, or one other character, and an entity begins and ends with a word. Entities do not overlap.

    The score of a record is the F1 of its entities, each right if its words and its type are; without entities, it is 1
    if none are predicted, and otherwise 0.

    Args:
        scheme: What the tags are: ``IOB2`` (default) or ``BIOES``.

    Raises:
        ValueError: If the scheme is unknown.

    Example:
        >>> task = TokenClassificationTask()
        >>> task.check_text(["EU", "rejects", "it"]), task.check_label(["B-ORG", "O", "O"])
        ('EU rejects it', ['B-ORG', 'O', 'O'])
        >>> task.check_record(["EU rejects it"], ["B-ORG", "O"])
        Traceback (most recent call last):
        ValueError: there must be a tag for each word, got 2 for 3 words
    """

    tolerates: frozenset[Change] = frozenset({"hide"})

    def __init__(self, scheme: Scheme = "IOB2") -> None:
        if scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {list(SCHEMES)}, got {scheme!r}")
        super().__init__("categorical")
        self.scheme = scheme

    # --- records

    def check_text(self, value: Any) -> str:
        """A text, or a list of words, which are joined by spaces.

        Raises:
            ValueError: If there are no words, or one of them is not a text, is empty or holds a space.
        """
        words = _listed(value)
        if words is None:
            return text_value(value)
        if not words:
            raise ValueError("there are no words")
        for number, word in enumerate(words, 1):
            if not isinstance(word, str) or word.split() != [word]:
                raise ValueError(f"word {number} of {len(words)} must be a text without spaces, got {word!r:.80}")
        return text_value(" ".join(words))

    def check_label(self, value: Any) -> list[Any]:
        """Tags, or entities as ``{"start": ..., "end": ..., "label": ...}`` in the order of the text.

        Raises:
            ValueError: If it is neither; if the tags are not well formed (:func:`evertune.metrics.check_tags`); or if
                an entity has no type, or no characters, or overlaps another one.
        """
        label = _listed(value)
        if label is None or absent(value):
            got = "no label" if absent(value) else f"got {value!r:.80}"
            raise ValueError(f"a list of tags or of entities is expected, {got}")
        if all(isinstance(tag, str) for tag in label):
            check_tags(label, self.scheme)
            return label
        entities = sorted((_entity(one) for one in label), key=lambda one: (one["start"], one["end"]))
        for first, second in pairwise(entities):
            if second["start"] < first["end"]:
                raise ValueError(f"the entities {_where(first)} and {_where(second)} overlap: keep one of them")
        return entities

    def check_record(self, texts: Sequence[str], label: Any) -> None:
        """Check that there is a tag for each word, or that each entity begins and ends with a word of the text.

        Raises:
            ValueError: If not, or if there are two texts.
        """
        if len(texts) != 1:
            raise ValueError("token classification reads one text, not a pair")
        text = texts[0]
        if label and isinstance(label[0], str):
            n_words = len(words_between_spaces(text))
            if len(label) != n_words:
                raise ValueError(f"there must be a tag for each word, got {len(label)} for {n_words} words")
            return
        words = words_in(text)
        starts, ends = {start for start, _ in words}, {end for _, end in words}
        for entity in label:
            start, end = entity["start"], entity["end"]
            if end > len(text):
                raise ValueError(f"the entity {_where(entity)} ends after the text of {len(text)} characters")
            if start not in starts or end not in ends:
                begins = "begin" if start not in starts else "end"
                raise ValueError(
                    f"the entity {_where(entity)}, {text[start:end]!r:.80}, does not {begins} with a word of its text"
                )

    def label_names(self, value: Any) -> list[str]:
        """The types of the entities, each once, in order of appearance.

        Example:
            >>> TokenClassificationTask().label_names(["B-PER", "I-PER", "O", "B-LOC"])
            ['PER', 'LOC']
        """
        if not isinstance(value, list):
            return []
        names = (split_tag(one)[1] if isinstance(one, str) else one["label"] for one in value)
        return list(dict.fromkeys(name for name in names if name))

    # --- examples and batches

    def label(self, example: Any) -> str:
        """The types of the entities of an example, by which a memory is balanced; ``O`` without any."""
        labels = example.get("labels") or []
        return ", ".join(sorted({split_tag(tag)[1] for tag in labels} - {""})) or "O"

    def dataset(
        self,
        data: Any,
        tokenizer: Any,
        *,
        text: str | tuple[str, str],
        label: str | None,
        id_column: str | None,
        max_length: int,
        cache: TokenCache | None = None,
    ) -> Dataset[dict[str, Any]]:
        """The examples of a split, tokenised once; ``labels`` are the tags of the tokens in IOB2, empty for most.

        Warns how many entities are in the part of texts that is cut off.

        Raises:
            ValueError: If ``text`` is a pair of columns, or the tokenizer does not say where its tokens are.
        """
        if not isinstance(text, str):
            raise ValueError(f"token classification reads one text, not a pair; got text={list(text)}")
        return TaggedDataset(data, tokenizer, text, label, id_column, max_length, cache)

    def score(self, module: pl.LightningModule, batch: Any) -> Tensor:
        """The F1 of each example's entities, float32 ``[batch]``; 1 where there are none and none are predicted."""
        outputs = self.outputs(module, batch)
        assert outputs.targets is not None
        found = zip(*entities_of_batch(module, outputs.logits, outputs.targets), strict=True)
        return torch.tensor([sentence_f1(gold, said) for gold, said in found], device=outputs.logits.device)

    def predict(
        self,
        module: Any,
        rows: Sequence[Row],
        *,
        text: str | Sequence[str],
        label: str | None,
        batch_size: int,
        max_length: int,
    ) -> Predictions:
        """The :meth:`score` of each record. Entities beyond ``max_length`` do not count.

        An entity of a type that the module does not know counts as one that is not found.
        """
        assert label is not None, "entities are learned from labels"
        scores, known = np.empty(len(rows)), {*module.tags, NO_TAG}
        if rows:
            data: Any = self.dataset(
                [dict(row["record"]) for row in rows],
                module.tokenizer,
                text=text if isinstance(text, str) else (text[0], text[1]),
                label=label,
                id_column=None,
                max_length=max_length,
            )
            for places in batches_by_length(columns_of(rows, text), batch_size):
                examples = [data[place] for place in places]
                seen = [{**one, "labels": [t if t in known else OUTSIDE for t in one["labels"]]} for one in examples]
                outputs = self.outputs(module, batch_of(self, module, seen))
                assert outputs.targets is not None
                said = entities_of_batch(module, outputs.logits, outputs.targets)[1]
                gold = [entities_in([tag for tag in one["labels"] if tag]) for one in examples]
                scores[places] = [sentence_f1(*both) for both in zip(gold, said, strict=True)]
        return Predictions.scored([row["id"] for row in rows], [row["record"][label] for row in rows], scores)


def entities_of_batch(module: Any, logits: Tensor, targets: Tensor) -> tuple[list[list[Entity]], list[list[Entity]]]:
    """The entities that there are in each example of a batch, and those predicted, by the numbers of tagged tokens.

    Predicted are the most probable well-formed tags (:func:`~evertune.tasks.well_formed.best_tags`).

    Args:
        module: Module with ``tags``, the tag of each logit.
        logits: Logits ``[batch, tokens, tags]``.
        targets: Numbers of the tags ``[batch, tokens]``; -100 for a token without a tag.
    """
    tags, counts = module.tags, targets != IGNORED
    gold = [[tags[n] for n in row[keep].tolist()] for row, keep in zip(targets, counts, strict=True)]
    said = best_tags([row[keep] for row, keep in zip(logits, counts, strict=True)], tags)
    return [entities_in(row) for row in gold], [entities_in(row) for row in said]


class TaggedDataset(TokenizedDataset):
    """Tokenised texts with the tags of their tokens; the arguments are those of :class:`TokenizedDataset`."""

    def __init__(
        self,
        data: Any,
        tokenizer: Any,
        text: str,
        label: str | None,
        id_column: str | None,
        max_length: int,
        cache: TokenCache | None = None,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"token classification needs a fast tokenizer, which says where its tokens are in the text; "
                f"got {type(tokenizer).__name__}"
            )
        super().__init__(
            data, tokenizer, text=text, label=None, id_column=id_column, max_length=max_length, cache=cache
        )
        if label is not None:
            texts = column_of(data, text)
            self.names["labels"] = _tagged(texts, column_of(data, label), tokenizer, max_length)


def _tagged(texts: list[str], labels: list[Any], tokenizer: Any, max_length: int) -> list[list[str]]:
    """The tag of each token of each text. Warns of entities that are cut off."""
    found: list[list[str]] = []
    n_cut = n_lost = n_all = 0
    for start in range(0, len(texts), _AT_A_TIME):
        some = texts[start : start + _AT_A_TIME]
        encoded = tokenizer(some, truncation=True, max_length=max_length, return_offsets_mapping=True)
        pieces = encoded["offset_mapping"]
        for text, label, places in zip(some, labels[start : start + _AT_A_TIME], pieces, strict=True):
            words, tags = tagged_words(text, label)
            tagged = tags_of_pieces(tags, first_pieces(text, words, places), len(places))
            n_there, n_kept = len(entities_in(tags)), len(entities_in([tag for tag in tagged if tag]))
            n_cut += max((end for _, end in places), default=0) < (words[-1][0] if words else 0)
            n_all, n_lost = n_all + n_there, n_lost + n_there - n_kept
            found.append(tagged)
    if n_cut:
        rank_zero_warn(
            f"{n_cut} of {len(texts)} texts have more than {max_length} tokens and are cut off there, with {n_lost} of "
            f"{n_all} entities: raise max_length, or divide the texts"
        )
    return found


def _listed(value: Any) -> list[Any] | None:
    """A list, also from a tuple or an array; None for anything else."""
    return value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, list | tuple) else None


def _entity(value: Any) -> dict[str, Any]:
    """An entity as it is kept."""
    if not isinstance(value, Mapping) or not {"start", "end", "label"} <= value.keys():
        raise ValueError(f'an entity must be {{"start": ..., "end": ..., "label": ...}}, got {value!r:.80}')
    start, end, name = value["start"], value["end"], value["label"]
    for number in (start, end):
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"the start and end of an entity must be whole numbers, got {number!r:.80}")
    if not 0 <= start < end:
        raise ValueError(f"an entity must begin before it ends, got start={start}, end={end}")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"the label of an entity must be the name of its type, got {name!r:.80}")
    return {"start": start, "end": end, "label": name}


def _where(entity: Mapping[str, Any]) -> str:
    return f"{entity['label']} at {entity['start']}-{entity['end']}"
