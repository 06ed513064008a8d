"""``evertune predict``: the answers of a version to the records of a file, in a file."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evertune.cli.actions import REGISTRY, opened
from evertune.cli.inputs import input_of, missing_in
from evertune.registry.aliases import ALIASES
from evertune.utils.terminal import complain, console

if TYPE_CHECKING:
    from evertune.registry.ensemble import Ensemble
    from evertune.registry.serving import Served
    from evertune.sources.base import Incoming

_DESCRIPTION = """\
Write the answers of a version to the records of a file: each record with its fields, `prediction` and `version`, as a
line of JSON. What an answer is depends on the task: the label with its probability, the entities with their places, the
text that was written. A record that cannot be answered gets `"prediction": null` and an `error`. With `--versions` or
`--last`, several versions answer together: the mean of their probabilities or numbers, with all their numbers under
`version`.

Stopped and started again, it goes on where it was. Exit codes: 0 all answered, 1 some records could not be answered,
2 a wrong setting, or a file that cannot be used.
"""
_EPILOG = """\
example:
  evertune predict news --input today.jsonl --output answers.jsonl
  evertune predict news --last 3 --input today.jsonl --output answers.jsonl
"""
_ADDED = ("prediction", "version", "error")


def predict(arguments: Sequence[str]) -> int:
    """Answer the records of a file.

    Args:
        arguments: Arguments of the command, without its name.

    Returns:
        The exit code: 0; 1 if some records could not be answered; 2 if nothing could be.
    """
    from evertune.registry.ensemble import Ensemble, lineage
    from evertune.registry.registry import RegistryError
    from evertune.registry.serving import load
    from evertune.sources.base import SourceError

    options = _parser().parse_args(arguments)
    try:
        if options.output.suffix != ".jsonl":
            raise ValueError(f"--output must end in .jsonl, got {options.output}")
        for name in ("batch_size", "top", "last"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name} must be positive, got {getattr(options, name)}")
        registry = opened(options.registry)
        newest = load(registry, options.versions[0] if options.versions else options.version)
        numbers = options.versions or lineage(registry, newest.version.number, options.last)
        if twice := next((one for one in numbers if numbers.count(one) > 1), None):
            raise ValueError(f"--versions has {twice} twice")
        others = [load(registry, number) for number in numbers[1:]]
        return _answer_all(Ensemble([newest, *others]) if others else newest, options)
    except (OSError, ValueError, TypeError, ImportError, RegistryError, SourceError) as error:
        complain("evertune predict", error)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evertune predict",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("registry", metavar="REGISTRY", help=REGISTRY)
    add("--input", required=True, metavar="PATH", help="records: JSON Lines, CSV (also .gz) or Parquet, or a folder")
    add("--output", required=True, type=Path, metavar="FILE", help="where the answers go, .jsonl")
    add("--version", default="production", help=f"its number, or {', '.join(ALIASES)} (default: production)")
    several = parser.add_mutually_exclusive_group()
    several.add_argument(
        "--versions", nargs="+", type=int, metavar="N", help="numbers of versions that answer together"
    )
    several.add_argument(
        "--last", type=int, default=1, metavar="N", help="--version and those that it was trained from, N in all"
    )
    add("--text", nargs="+", metavar="FIELD", help="fields that the task reads (default: those that it was trained on)")
    add("--batch_size", type=int, default=32, metavar="N", help="records per forward pass (default: 32)")
    add("--top", type=int, default=1, metavar="N", help="classes whose probability is written (default: 1)")
    return parser


def _answer_all(served: Served | Ensemble, options: argparse.Namespace) -> int:
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from evertune.drift.comparison.records import read_records

    fields = options.text or served.version.text_fields
    records = read_records(options.input)
    done, last, refused = _resume(options.output, _said_by(served))
    for place in range(done):
        before = next(records, None)
        if place == done - 1 and (before is None or (before.value or {}) != _own(last)):
            raise ValueError(
                f"{options.output} has the answers to other records than {options.input}: pass another --output, or "
                "delete it"
            )
    written, screen = done, console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("records"), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        options.output.open("ab") as out,
        Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar,
    ):
        task = bar.add_task("", total=None, completed=done)
        while chunk := list(islice(records, options.batch_size)):
            lines = list(_lines(served, chunk, fields, options.top))
            out.write(b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines))
            out.flush()
            written += len(lines)
            refused += sum("error" in line for line in lines)
            bar.update(task, completed=written)
    by = _in_words(_said_by(served))
    words = f"{written:,} records, {written - refused:,} answered by {by}: {options.output}"
    if done:
        words += f" ({done:,} of them by an earlier start)"
    console().print(words, soft_wrap=True)
    if refused:
        complain("evertune predict", f"{refused:,} records could not be answered; `error` in their lines says why")
    return int(bool(refused))


def _said_by(served: Served | Ensemble) -> int | list[int]:
    """What stands under ``version``: the number of the version, or those of several."""
    return getattr(served, "numbers", served.version.number)


def _in_words(said_by: int | list[int]) -> str:
    if isinstance(said_by, int):
        return f"version {said_by}"
    return f"versions {', '.join(map(str, said_by))}"


def _resume(path: Path, version: int | list[int]) -> tuple[int, dict[str, Any], int]:
    """Lines that are written already, the last of them, and how many have no answer; half a line is cut off.

    Raises:
        ValueError: If the lines are of another version, or something else.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return 0, {}, 0
    lines, refused, end, last = 0, 0, 0, dict[str, Any]()
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                last = json.loads(line)
                known = last["version"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {lines + 1} is no answer: pass another --output") from error
            if known != version:
                raise ValueError(
                    f"{path} was begun with {_in_words(known)}, now it is {_in_words(version)}: ask the same, pass "
                    "another --output, or delete it"
                )
            lines, end, refused = lines + 1, end + len(line), refused + ("error" in last)
    os.truncate(path, end)
    return lines, last, refused


def _own(line: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the record that a line answers."""
    return {name: value for name, value in line.items() if name not in _ADDED}


def _lines(
    served: Served | Ensemble, chunk: Sequence[Incoming], fields: Sequence[str], top: int
) -> Iterator[dict[str, Any]]:
    """The answers to some records, in their order."""
    inputs, problems = [], []
    for record in chunk:
        value, problem = _input_of(record, fields)
        inputs.append(value)
        problems.append(problem)
    good = [place for place, problem in enumerate(problems) if problem is None]
    answers = dict(zip(good, _answers(served, [inputs[place] for place in good]), strict=True))
    for place, record in enumerate(chunk):
        answer = answers.get(place, problems[place])
        line = {**(record.value or {}), "prediction": None, "version": _said_by(served)}
        if isinstance(answer, _Problem):
            yield {**line, "error": str(answer)}
        else:
            yield {**line, "prediction": _shown(answer, getattr(served.module, "multi_label", None), top)}


class _Problem(str):
    """Why a record has no answer."""


def _input_of(record: Incoming, fields: Sequence[str]) -> tuple[Any, _Problem | None]:
    """What the module reads of a record, or why it cannot."""
    if record.value is None:
        return None, _Problem(f"{record.origin}: {record.error}")
    if taken := [name for name in _ADDED if name in record.value]:
        raise ValueError(f"{record.origin} has a field {taken[0]!r}, which is where the answers go: rename it")
    if (missing := missing_in(record.value, fields)) is not None:
        return None, _Problem(f"{record.origin}: it has no {missing!r}")
    return input_of(record.value, fields), None


def _answers(served: Served | Ensemble, inputs: list[Any]) -> list[Any]:
    """The module's answers; where one record spoils a batch, each is asked alone."""
    if not inputs:
        return []
    try:
        return list(served.predict(inputs, batch_size=len(inputs)))
    except (ValueError, TypeError) as error:
        if len(inputs) == 1:
            return [_Problem(str(error))]
        return [answer for one in inputs for answer in _answers(served, [one])]


def _shown(answer: Any, multi_label: bool | None, top: int) -> Any:
    """An answer as it is written: of a classifier, the label and the probabilities of the likeliest classes."""
    if multi_label is None or not isinstance(answer, Mapping):
        return answer
    label = [name for name, p in answer.items() if p > 0.5] if multi_label else next(iter(answer))
    return {"label": label, "probabilities": {name: round(p, 6) for name, p in islice(answer.items(), top)}}
