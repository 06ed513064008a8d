"""Relation extraction: the relation between two marked entities of a text, one of named classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from evertune.sources.base import Row
from evertune.sources.values import text_value
from evertune.tasks.base import Change
from evertune.tasks.sequence_classification import SequenceClassificationTask
from evertune.tasks.token_cache import TokenCache

if TYPE_CHECKING:
    from torch.utils.data import Dataset

Unit = Literal["characters", "words"]
MARKERS = ("[E1]", "[/E1]", "[E2]", "[/E2]")
"""Tokens before and after the head, and before and after the tail."""


class RelationExtractionTask(SequenceClassificationTask):
    """The relation between two entities of a text, the head and the tail, which are marked in it.

    The text becomes ``[E1] Ada Lovelace [/E1] was born in [E2] London [/E2].`` (Baldini Soares et al. 2019, "Matching
    the Blanks"). A text that is too long is shortened around both entities.

    A record has a text, the name of the relation for a label, and the spans of head and tail: ``[start, end]``, the end
    excluded.

    Args:
        entities: Fields with the spans of head and tail. Default: ``("head", "tail")``.
        unit: What the spans count: ``characters`` (default), or ``words``, of a text that is a list of them (or has one
            space between two words).

    Raises:
        ValueError: If ``entities`` are not two fields or ``unit`` is unknown.

    Example:
        >>> RelationExtractionTask().marked("Ada was born in London.", [0, 3], [16, 22])
        '[E1] Ada [/E1] was born in [E2] London [/E2].'
        >>> RelationExtractionTask(unit="words").marked("Ada was born in London .", [0, 1], [4, 5])
        '[E1] Ada [/E1] was born in [E2] London [/E2] .'
    """

    example = "[E1] Ann [/E1] found [E2] it [/E2]."
    tolerates: frozenset[Change] = frozenset({"hide"})

    def __init__(self, entities: Sequence[str] = ("head", "tail"), unit: Unit = "characters") -> None:
        super().__init__()
        if isinstance(entities, str) or len(set(entities)) != 2 or len(entities) != 2:
            raise ValueError(f"entities must be the two fields with the spans of head and tail, got {entities!r}")
        if unit not in get_args(Unit):
            raise ValueError(f"unit must be one of {list(get_args(Unit))}, got {unit!r}")
        self.entities = tuple(entities)
        self.unit = unit

    # --- records

    @property
    def fields(self) -> Mapping[str, Callable[[Any], Any]]:
        """The fields with the spans of head and tail."""
        return dict.fromkeys(self.entities, span_value)

    def check_text(self, value: Any) -> str:
        """The text; words of a list become a text with one space between two of them.

        Raises:
            ValueError: If it is empty, holds a marker, or is a list although spans count characters.
        """
        words = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(words, list | tuple):
            if self.unit != "words":
                raise ValueError('the text is a list of words; set unit="words", by which spans count them')
            for word in words:
                if not isinstance(word, str) or word.split() != [word]:
                    raise ValueError(f"a word must be a text without spaces, got {word!r:.80}")
            value = " ".join(words)
        text = text_value(value)
        if marker := next((one for one in MARKERS if one in text), None):
            raise ValueError(f"the text holds {marker!r}, which marks entities: remove it")
        return text

    def check_fields(self, texts: Sequence[str], label: Any, fields: Mapping[str, Any]) -> None:
        """Check that head and tail are in the text.

        Raises:
            ValueError: If one of them is not, is empty or blank, or the record has two texts.
        """
        if len(texts) != 1:
            raise ValueError(f"entities are marked in one text, got {len(texts)}; set text to one field")
        for name in self.entities:
            start, end = fields[name]
            size = len(texts[0]) if self.unit == "characters" else texts[0].count(" ") + 1
            if not start < end <= size:
                raise ValueError(f"{name}={[start, end]} is not in the text, which has {size} {self.unit}")
            if not texts[0][slice(*self._in_characters(texts[0], fields[name]))].strip():
                raise ValueError(f"{name}={[start, end]} is blank in the text")

    # --- texts

    def marked(self, text: str, head: Sequence[int], tail: Sequence[int]) -> str:
        """The text with markers around head and tail; one entity may lie within the other."""
        spans = [self._in_characters(text, span) for span in (head, tail)]
        marks = []
        for (start, end), opening, closing in zip(spans, MARKERS[::2], MARKERS[1::2], strict=True):
            # at one place, what ends comes before what begins, and the longer entity is outside
            marks += [(start, 1, start - end, f"{opening} "), (end, 0, end - start, f" {closing}")]
        parts, done = [], 0
        for place, _, _, mark in sorted(marks):
            parts += [text[done:place], mark]
            done = place
        return "".join([*parts, text[done:]])

    def texts(self, rows: Sequence[Row], text: str | Sequence[str], tokenizer: Any, max_length: int) -> list[list[str]]:
        """The marked texts of records, shortened around both entities where they are too long.

        Raises:
            ValueError: If the entities of a record are too far apart for ``max_length``.
        """
        field = text if isinstance(text, str) else text[0]
        head, tail = self.entities
        marked = [self.marked(row["record"][field], row["record"][head], row["record"][tail]) for row in rows]
        return [shortened(marked, tokenizer, max_length)]

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
        """The marked texts of a split, tokenised once.

        Raises:
            ValueError: As in :meth:`texts`.
        """
        field = text if isinstance(text, str) else text[0]
        kept = [name for name in (label, id_column) if name is not None]
        records = [data[place] for place in range(len(data))]
        (marked,) = self.texts([{"record": one} for one in records], field, tokenizer, max_length)
        rows = [{**{name: one[name] for name in kept}, field: mark} for one, mark in zip(records, marked, strict=True)]
        return super().dataset(
            rows, tokenizer, text=field, label=label, id_column=id_column, max_length=max_length, cache=cache
        )

    def _in_characters(self, text: str, span: Sequence[int]) -> tuple[int, int]:
        start, end = span
        if self.unit == "characters":
            return start, end
        words = text.split(" ")
        begin = sum(len(word) + 1 for word in words[:start])
        return begin, begin + len(" ".join(words[start:end]))


def span_value(value: Any) -> list[int]:
    """A span as ``[start, end]``.

    Raises:
        ValueError: If it is not two numbers.

    Example:
        >>> span_value((3, 7))
        [3, 7]
    """
    span = value.tolist() if hasattr(value, "tolist") else value
    numbers = isinstance(span, list | tuple) and all(isinstance(one, int) and not isinstance(one, bool) for one in span)
    if not numbers or len(span) != 2 or min(span) < 0:
        raise ValueError(f"a span must be [start, end], two numbers from 0, got {value!r:.80}")
    return list(span)


def shortened(texts: Sequence[str], tokenizer: Any, max_length: int) -> list[str]:
    """Texts of at most ``max_length`` tokens, cut around their markers where they were longer.

    Raises:
        ValueError: If the entities of a text are too far apart.
    """
    room = max_length - tokenizer.num_special_tokens_to_add()
    ids = set(tokenizer.convert_tokens_to_ids(list(MARKERS)))
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    found = []
    for text, tokens, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        marks = [place for place, token in enumerate(tokens) if token in ids]
        needed = marks[-1] - marks[0] + 1
        if needed > room:
            raise ValueError(
                f"head and tail of {text!r:.80} are {needed} tokens apart with their markers, and "
                f"max_length={max_length} leaves {room}: raise max_length, or leave the record out"
            )
        spare = min(room, len(tokens)) - needed
        while True:
            begin = min(max(marks[0] - spare // 2, 0), len(tokens) - needed - spare)
            cut = text[offsets[begin][0] : offsets[begin + needed + spare - 1][1]]
            # a word that was cut may have more tokens than before
            if spare == 0 or len(tokens) <= room or len(tokenizer.tokenize(cut)) <= room:
                break
            spare -= 1
        found.append(text if len(tokens) <= room else cut)
    return found
