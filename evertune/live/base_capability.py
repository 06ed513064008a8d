"""What a language model can do that no update trains: how likely it finds general texts, and which probes it solves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evertune.gate.checks.base import SKILLS, TEXTS
from evertune.gate.gate import Gate
from evertune.gate.predictions import Label, Predictions
from evertune.live.evaluation import evaluating
from evertune.sources.base import Row
from evertune.sources.values import text_value
from evertune.streams.tables import read_rows
from evertune.tasks.causal_lm import CausalLMTask

_TOGETHER = 16


@dataclass(frozen=True)
class Base:
    """General texts and probes, which are the same for every update.

    Args:
        texts: Records with the field ``text``.
        probes: Records with the fields ``prompt``, ``answer`` and ``choices``, a list that may be empty.
        max_length: Number of tokens after which a text is truncated.
    """

    texts: Sequence[Row]
    probes: Sequence[Row]
    max_length: int

    @classmethod
    def of(cls, gate: Gate, model: Any, max_length: int) -> Base | None:
        """Read the texts and probes that a gate names; None if it names none.

        Raises:
            ValueError: If the model is not a causal language model, a file cannot be read, or a text cannot be scored.
        """
        if gate.base_texts is None and gate.base_probes is None:
            return None
        if not isinstance(model.task, CausalLMTask):
            raise ValueError(
                "gate.base_texts and gate.base_probes guard a language model (CausalLMModule), and the model is a "
                f"{type(model).__name__}: leave them out"
            )
        base = cls(_texts(gate.base_texts, max_length), _probes(gate.base_probes, max_length), max_length)
        base.check(model.tokenizer)
        return base

    def check(self, tokenizer: Any) -> None:
        """Refuse what cannot be scored, before anything is trained.

        Raises:
            ValueError: If there is such a text, or such a probe.
        """
        for name, rows, columns in (
            ("base_texts", self.texts, {"text": "text", "label": None}),
            ("base_probes", _with_each_answer(self.probes), {"text": "prompt", "label": "answer"}),
        ):
            records: Any = [row["record"] for row in rows]
            try:
                CausalLMTask().dataset(records, tokenizer, id_column=None, max_length=self.max_length, **columns)
            except ValueError as error:
                raise ValueError(f"gate.{name}: {error}") from None

    def asked_of(self, module: Any) -> dict[str, Predictions]:
        """The likelihood of each text, and the answer to each probe, as :func:`~evertune.gate.checks.base.base_checks`
        compares them."""
        with evaluating(module):
            texts = {TEXTS: self._scores(module, self.texts)} if self.texts else {}
            return texts | ({SKILLS: self._skills(module)} if self.probes else {})

    def is_answered_by(self, said: Mapping[str, Predictions]) -> bool:
        """Whether predictions are those on these texts and probes."""
        asked = {name: [row["id"] for row in rows] for name, rows in self._asked.items()}
        return asked == {name: one.ids for name, one in said.items()}

    @property
    def _asked(self) -> dict[str, Sequence[Row]]:
        return {name: rows for name, rows in ((TEXTS, self.texts), (SKILLS, self.probes)) if rows}

    def _scores(self, module: Any, texts: Sequence[Row]) -> Predictions:
        reading: dict[str, Any] = {
            "text": "text",
            "label": None,
            "batch_size": _TOGETHER,
            "max_length": self.max_length,
        }
        return CausalLMTask("likelihood").predict(module, texts, **reading)

    def _skills(self, module: Any) -> Predictions:
        """The most likely choice of each probe; of one without choices, the answer if the model would write it."""
        reading: dict[str, Any] = {
            "text": "prompt",
            "label": "answer",
            "batch_size": _TOGETHER,
            "max_length": self.max_length,
        }
        rows = _with_each_answer(self.probes)
        likely = _by_id(CausalLMTask("likelihood").predict(module, rows, **reading))
        free = [row for row in rows if not row["record"]["choices"]]
        written = _by_id(CausalLMTask("exact_match").predict(module, free, **reading))
        answers: list[Label] = []
        predicted: list[Label] = []
        chances = []
        for row in self.probes:
            answer, choices, own = row["record"]["answer"], row["record"]["choices"], _id(row, row["record"]["answer"])
            best = max(choices, key=lambda choice: likely[_id(row, choice)], default=answer)
            answers.append(answer)
            predicted.append(best if choices or written[own] == 1 else "")
            chances.append(likely[own])
        ids, unknown = [row["id"] for row in self.probes], np.full(len(answers), np.nan)
        return Predictions(ids, answers, predicted, unknown, np.array(chances))


def _texts(source: Any, max_length: int) -> list[Row]:
    if source is None:
        return []
    texts = dict.fromkeys(read_rows(source, {"text": text_value}).values["text"])
    return [_row({"text": text}, max_length) for text in texts]


def _probes(source: Any, max_length: int) -> list[Row]:
    if source is None:
        return []
    found = read_rows(source, {"prompt": text_value, "answer": text_value})
    table, columns = found.dataset, found.values
    choices = table["choices"] if "choices" in table.column_names else [None] * len(table)
    rows = {}
    for number, (prompt, answer, others) in enumerate(zip(columns["prompt"], columns["answer"], choices, strict=True)):
        if others is not None and answer not in others:
            raise ValueError(
                f"gate.base_probes: the answer of probe {number}, {answer!r}, is not among its choices {list(others)}"
            )
        row = _row({"prompt": prompt, "answer": answer, "choices": list(others or [])}, max_length)
        rows[row["id"]] = row
    return list(rows.values())


def _row(record: dict[str, Any], max_length: int) -> Row:
    """A record whose id is a hash of what is scored: stored predictions on another text do not pass for it."""
    content = json.dumps([record, max_length], sort_keys=True).encode()
    return {"id": hashlib.sha256(content).hexdigest()[:16], "record": record}


def _with_each_answer(probes: Sequence[Row]) -> list[Row]:
    """One record for each choice of a probe, or for its answer if there are none."""
    return [
        {"id": _id(row, one), "record": {**row["record"], "answer": one}}
        for row in probes
        for one in row["record"]["choices"] or [row["record"]["answer"]]
    ]


def _id(probe: Row, answer: str) -> str:
    return f"{probe['id']}/{answer}"


def _by_id(said: Predictions) -> dict[str, float]:
    """The score of each record; 0 in place of NaN, which a training that diverged gives."""
    return dict(zip(said.ids, np.nan_to_num(said.score).tolist(), strict=True))
