"""What a module answers to records, in a form in which two modules are compared: words, and probabilities."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from evertune.lightning_modules.generation import GenerationModule
from evertune.lightning_modules.sequence_regression import SequenceRegressionModule
from evertune.lightning_modules.text_matching import TextMatchingModule
from evertune.sources.base import Row
from evertune.sources.conversations import ASSISTANT, conversation_in
from evertune.tasks.predicting import are_probabilities, batch_of
from evertune.utils.evaluation import evaluation_mode

_BATCH = 32
_CLOSE = 0.05  # difference of two numbers that count as the same answer, as a multiple of the scale of a regression


def questions(module: Any, rows: Sequence[Row], text: str | Sequence[str], label: str | None, length: int) -> list[Any]:
    """What ``module.predict`` takes for each record: a text or a pair of texts; a query with its item; a prompt."""
    columns = module.task.texts(rows, text, module.tokenizer, length)
    if isinstance(module, TextMatchingModule):
        if label is None:
            raise ValueError("a TextMatchingModule is checked by the item that fits each query: name its field (label)")
        columns.append([row["record"][label] for row in rows])
    texts = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
    return [_prompt(one) for one in texts] if isinstance(module, GenerationModule) else texts


def answers(
    module: Any, rows: Sequence[Row], asked: Sequence[Any], text: str | Sequence[str], label: str | None, length: int
) -> list[Any]:
    """The answer of a module to each record, with its probabilities.

    Of texts and queries, it is what ``predict`` gives. Of text matching, the place of the best candidate of the record,
    and the probability of each. Of generation, the text, and the likelihood of the record's own answer.

    Args:
        module: The module.
        rows: The records.
        asked: The :func:`questions`.
        text: Field with the text, or the two fields of a pair.
        label: Field with the label; None if the records have none.
        length: Maximum number of tokens of a text.
    """
    if isinstance(module, TextMatchingModule):
        return _best_candidates(module, rows, text, label, length)
    order = sorted(range(len(asked)), key=lambda place: len(str(asked[place])))  # similar lengths need little padding
    found: list[Any] = [None] * len(asked)
    for place, one in zip(order, module.predict([asked[place] for place in order]), strict=True):
        found[place] = one
    if isinstance(module, GenerationModule):
        task: Any = copy.copy(module.task)
        task.scored_by = "likelihood"
        with evaluation_mode(module):
            said = task.predict(module, rows, text=text, label=label, batch_size=_BATCH, max_length=length)
        return [{"text": one, "likelihood": float(score)} for one, score in zip(found, said.score, strict=True)]
    return found


def alike(module: Any, new: Any, old: Any) -> bool:
    """Whether two answers are the same: names, places and texts, or close numbers."""
    if isinstance(module, SequenceRegressionModule):
        return largest_change(module, new, old) <= _CLOSE
    return bool(_said(module, new) == _said(module, old))


def largest_change(module: Any, new: Any, old: Any) -> float:
    """The largest difference in a number of two answers: a probability, or a multiple of the scale of a regression."""
    if isinstance(module, SequenceRegressionModule):
        one, other = (module.encode_labels([answer]) for answer in (new, old))
        return float((one - other).abs().max())
    if isinstance(old, float):
        return float(abs(new - old))
    if isinstance(old, Mapping):
        pairs = [(new.get(name), value) for name, value in old.items()]
    else:
        pairs = list(zip(new, old, strict=False)) if isinstance(old, list) else []
    return max((largest_change(module, *pair) for pair in pairs), default=0.0)


def _said(module: Any, answer: Any) -> Any:
    """An answer without probabilities: the most probable class, with several labels all those above one half."""
    if are_probabilities(answer):
        several = {name for name, probability in answer.items() if probability > 0.5}
        return several if module.multi_label else next(iter(answer))
    if isinstance(answer, Mapping):
        return {name: _said(module, value) for name, value in answer.items() if not isinstance(value, float)}
    return [_said(module, value) for value in answer] if isinstance(answer, list) else answer


def _prompt(text: Any) -> Any:
    """What comes before the last answer of a conversation; any other text as it is."""
    messages = conversation_in(text)
    if messages is None:
        return text
    last = max(number for number, message in enumerate(messages) if message["role"] == ASSISTANT)
    return messages[:last]


def _best_candidates(
    module: TextMatchingModule, rows: Sequence[Row], text: str | Sequence[str], label: str | None, length: int
) -> list[dict[str, Any]]:
    """The place of the best candidate of each record, and the probability of each candidate."""
    records: Any = [dict(row["record"]) for row in rows]
    field = text if isinstance(text, str) else (text[0], text[1])
    examples: Any = module.task.dataset(
        records, module.tokenizer, text=field, label=label, id_column=None, max_length=length
    )
    found: list[dict[str, Any]] = []
    with evaluation_mode(module), torch.inference_mode():
        for start in range(0, len(rows), _BATCH):
            some = [examples[place] for place in range(start, min(start + _BATCH, len(rows)))]
            logits, _ = module.candidate_logits(batch_of(module.task, module, some))
            listwise = module.task.likelihood == "categorical"
            chances = logits.softmax(-1) if listwise else logits.sigmoid()
            for best, row in zip(logits.argmax(-1).tolist(), chances.tolist(), strict=True):
                found.append({"best": best} | {str(place): chance for place, chance in enumerate(row)})
    return found
