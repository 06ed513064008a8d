"""Records that hold more than a text and a class, told by their values: entities, answers, conversations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Columns = Mapping[str, Sequence[Any]]

_TAG = re.compile(r"O|[BIES]-\S+")
_ONLY_BIOES = ("E-", "S-")
_QUESTION = ("question", "query", "pregunta", "frage", "问题", "質問", "질문")
_PROMPT = ("prompt", "instruction", "question")
_ANSWER = ("answer", "response", "completion", "output")


@dataclass(frozen=True)
class Structure:
    """How records of a task other than the classification of texts are laid out.

    Args:
        task: The task, by the name of its preset.
        text: Column, or columns, with what is read.
        label: Column with what is learned; None if that is in the text.
        what: What a label is, in words.
        fields: Type of each of these columns, as in a :class:`~evertune.sources.RecordSchema`.
        module: Arguments that the module needs to read them.
    """

    task: Literal["token_classification", "question_answering", "causal_lm"]
    text: str | list[str]
    label: str | None
    what: str
    fields: Mapping[str, str]
    module: Mapping[str, Any] = field(default_factory=dict)


def find_structure(columns: Columns) -> Structure | None:
    """The structure of records; None if they look like texts with classes or numbers.

    Args:
        columns: The values of each column, all of the same length; None where a record has no value.

    Example:
        >>> columns = {"tokens": [["in", "Paris"], ["hello"]], "ner": [["O", "B-LOC"], ["O"]]}
        >>> found = find_structure(columns)
        >>> found.task, found.text, found.label
        ('token_classification', 'tokens', 'ner')
    """
    kinds = (_tagged_words, _entities, _answers, _messages, _prompts)
    return next((found for kind in kinds if (found := kind(columns)) is not None), None)


def _tagged_words(columns: Columns) -> Structure | None:
    lists = [name for name in columns if _all(columns, name, _is_words)]
    for label in lists:
        tags = {tag for value in columns[label] for tag in value or ()}
        if not any(tag != "O" for tag in tags) or not all(map(_TAG.fullmatch, tags)):
            continue
        for text in lists:
            if text != label and _as_long(columns[text], columns[label]):
                bioes = any(tag.startswith(_ONLY_BIOES) for tag in tags)
                return Structure(
                    "token_classification",
                    text,
                    label,
                    "a tag for each word",
                    {text: "list[str]", label: "list[str]"},
                    {"scheme": "BIOES"} if bioes else {},
                )
    return None


def _entities(columns: Columns) -> Structure | None:
    for label in columns:
        if _all(columns, label, lambda value: _are_mappings(value, "start", "end", "label")):
            texts = _texts(columns)
            if texts:
                fields = {texts[0]: "str", label: "list[dict]"}
                return Structure("token_classification", texts[0], label, "entities", fields)
    return None


def _answers(columns: Columns) -> Structure | None:
    for label in columns:
        if _all(columns, label, _is_answers) and len(texts := _texts(columns)) > 1:
            question = next((name for name in texts if name.lower() in _QUESTION), texts[-1])
            context = next(name for name in texts if name != question)
            kind = "dict" if isinstance(_first(columns[label]), Mapping) else "list[dict]"
            fields = {question: "str", context: "str", label: kind}
            return Structure("question_answering", [question, context], label, "answers in the context", fields)
    return None


def _messages(columns: Columns) -> Structure | None:
    for text in columns:
        if _all(columns, text, lambda value: _are_mappings(value, "role", "content")):
            return Structure("causal_lm", text, None, "the assistant's turns", {text: "list[dict]"})
    return None


def _prompts(columns: Columns) -> Structure | None:
    """Prompts and answers of several words: only their names tell them from other texts."""
    texts = {name.lower(): name for name in _texts(columns)}
    prompt, answer = (next((texts[one] for one in names if one in texts), None) for names in (_PROMPT, _ANSWER))
    if prompt is None or answer is None or not any(" " in value for value in columns[answer] if value):
        return None
    return Structure("causal_lm", prompt, answer, "answers to learn", {prompt: "str", answer: "str"})


def _all(columns: Columns, name: str, holds: Any) -> bool:
    """Whether all values of a column are of a kind. An empty list may be of any, but not all values are."""
    values = [value for value in columns[name] if value is not None]
    return any(value != [] for value in values) and all(value == [] or holds(value) for value in values)


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _are_mappings(value: Any, *keys: str) -> bool:
    return isinstance(value, list) and all(isinstance(one, Mapping) and one.keys() >= set(keys) for one in value)


def _is_answers(value: Any) -> bool:
    """Either form of SQuAD."""
    return _are_mappings([value] if isinstance(value, Mapping) else value, "text", "answer_start")


def _as_long(values: Sequence[Any], others: Sequence[Any]) -> bool:
    return all(len(one or ()) == len(other or ()) for one, other in zip(values, others, strict=True))


def _texts(columns: Columns) -> list[str]:
    """The columns of texts, the one with the longest texts first."""
    texts = [name for name in columns if _all(columns, name, lambda value: isinstance(value, str))]
    return sorted(texts, key=lambda name: -sum(len(value or "") for value in columns[name]))


def _first(values: Sequence[Any]) -> Any:
    return next(value for value in values if value is not None)
