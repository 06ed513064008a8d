"""Finds the records that would end an update: those that cannot become a batch, or cannot be scored by the module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evertune.sources.base import Row
from evertune.sources.schema import RecordSchema
from evertune.tasks.base import Task
from evertune.tasks.texts import truncation_length

_TOGETHER = 64  # examples that are collated at a time


def unlearnable(
    rows: Sequence[Row],
    task: Task,
    module: Any,
    schema: RecordSchema,
    max_length: int | None = None,
    score: bool = False,
) -> list[Row]:
    """The records that fail alone, each with its ``reason`` and the ``kind`` ``"unlearnable"``.

    Tokenising and collating costs little beside training. A failure is narrowed down by halves.

    Args:
        rows: Records of the journal.
        task: Task that makes batches of them.
        module: Module with a ``tokenizer``.
        schema: Schema that names the fields with the text and the label.
        max_length: Maximum number of tokens; longer texts are truncated.
        score: Also let the module score every record. Slower: for finding the cause of an error in training.

    Raises:
        ValueError: If all of several records fail: the cause is then not a record.
    """
    tokenizer = module.tokenizer
    text = schema.text if isinstance(schema.text, str) else (schema.text[0], schema.text[1])
    length = truncation_length(max_length, tokenizer, module)
    collate = task.collator(tokenizer)

    def attempt(part: Sequence[Row]) -> None:
        examples = [{**row["record"], "id": row["id"]} for row in part]
        data: Any = task.dataset(examples, tokenizer, text=text, label=schema.label, id_column="id", max_length=length)
        for start in range(0, len(part), _TOGETHER):
            chosen = [data[place] for place in range(start, min(start + _TOGETHER, len(part)))]
            if any(isinstance(one, Mapping) and len(one.get("input_ids", "?")) == 0 for one in chosen):
                raise ValueError("the tokenizer finds nothing in the text")
            batch = collate(chosen)
            if score:
                batch = module.on_before_batch_transfer(batch, 0)
                batch = module.transfer_batch_to_device(batch, module.device, 0)
                task.score(module, module.on_after_batch_transfer(batch, 0))

    failed = _failing(rows, attempt)
    if len(failed) == len(rows) > 1:
        raise ValueError(f"none of {len(rows)} records can be learned: {_words(failed[0][1])}") from failed[0][1]
    return [{**row, "kind": "unlearnable", "reason": f"it cannot be learned: {_words(error)}"} for row, error in failed]


def _failing(rows: Sequence[Row], attempt: Callable[[Sequence[Row]], None]) -> list[tuple[Row, Exception]]:
    if not rows:
        return []
    try:
        attempt(rows)
    except Exception as error:
        if len(rows) == 1:
            return [(rows[0], error)]
        half = len(rows) // 2
        return _failing(rows[:half], attempt) + _failing(rows[half:], attempt)
    return []


def _words(error: Exception) -> str:
    words = " ".join(str(error).split())[:300]
    return words if isinstance(error, ValueError) and words else f"{type(error).__name__}: {words}"
