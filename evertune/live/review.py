"""The queue of records to be labelled: a file of JSON lines, each a record with what a version suggests for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evertune.sources.json import json_object
from evertune.utils.files import write_atomically

_ADDED = ("suggested", "sureness", "version")


def read_queue(path: Path) -> list[dict[str, Any]]:
    """The lines of a queue.

    Raises:
        OSError: If it cannot be read.
        ValueError: If a line is not a JSON object.
    """
    return [json_object(line) for line in path.read_bytes().splitlines() if line.strip()]


def write_queue(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Replace a queue, or write records in the same form; the folders of the file are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines).encode())


def is_labelled(line: Mapping[str, Any], label: str = "label") -> bool:
    """Whether somebody has filled in the label of a line."""
    return line.get(label) not in (None, "", [])


def without_suggestion(line: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a line."""
    return {name: value for name, value in line.items() if name not in _ADDED}


def name_of(line: Mapping[str, Any], label: str = "label") -> str:
    """A name for a line that does not change when it is labelled: a hash of the rest of it."""
    rest = {name: value for name, value in line.items() if name != label}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def fill_in(path: Path, name: str, decide: Callable[[Any], Any], label: str = "label") -> None:
    """Fill in the label of a line.

    Args:
        path: The queue.
        name: Name of the line; see :func:`name_of`.
        decide: Makes the label of what is suggested; None takes the label out again.
        label: The field of the label.

    Raises:
        OSError: If the queue cannot be read or written.
        ValueError: If it is damaged, or has no such line: it was taken meanwhile.
    """
    lines = read_queue(path)
    found = [line for line in lines if name_of(line, label) == name]
    if not found:
        raise ValueError(f"{path} has no such record any more: it was taken meanwhile")
    for line in found:
        line[label] = decide(line.get("suggested"))
    write_queue(path, lines)


def sureness_of(answer: Any, several: bool = False) -> tuple[Any, float]:
    """The label that an answer suggests, and how sure the model is of it, from 0 to 1.

    Of one class among others, the margin to the second (Scheffer et al. 2001); of several labels, the least distance
    from one half; of entities, the least score (1 if there are none); of ranked items, the lead of the first; otherwise
    the probability.

    Raises:
        TypeError: If the answer has no probability, as a text that was written.

    Example:
        >>> sureness_of({"sport": 0.625, "law": 0.25, "film": 0.125})
        ('sport', 0.375)
        >>> sureness_of({"sport": 0.75, "law": 0.375}, several=True)
        (['sport'], 0.25)
        >>> sureness_of([{"item": "a lamp", "score": 0.75}, {"item": "a desk", "score": 0.5}])
        ('a lamp', 0.25)
    """
    from evertune.tasks.predicting import are_probabilities

    if isinstance(answer, list) and answer and all(isinstance(one, dict) and "item" in one for one in answer):
        return answer[0]["item"], answer[0]["score"] - max((one["score"] for one in answer[1:]), default=-1.0)
    if isinstance(answer, list) and all(isinstance(one, dict) and "score" in one for one in answer):
        return answer, min((one["score"] for one in answer), default=1.0)
    if isinstance(answer, dict) and "probability" in answer:
        return {name: value for name, value in answer.items() if name != "probability"}, answer["probability"]
    if are_probabilities(answer):
        if several:
            return [name for name, p in answer.items() if p > 0.5], 2 * min(abs(p - 0.5) for p in answer.values())
        first, *others = answer.values()
        return next(iter(answer)), first - max(others, default=0.0)
    raise TypeError("only answers with probabilities can be reviewed: of classes, entities, relations or spans")
