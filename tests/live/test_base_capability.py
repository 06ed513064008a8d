"""What a language model can do beyond its records: an update that harms it is refused, one that does not is not."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evertune._lightning import pl
from evertune.cli import main as cli
from evertune.gate.checks.base import SKILLS, TEXTS, base_checks, figures
from evertune.gate.comparison import PairedTest
from evertune.gate.evaluation import Evaluation
from evertune.gate.gate import Gate
from evertune.gate.predictions import Predictions
from evertune.gate.verdict import Verdict
from evertune.lightning_modules import CausalLMModule, SequenceClassificationModule
from evertune.live.base_capability import Base
from evertune.registry.registry import Registry
from evertune.reports.registry import write_versions_report
from evertune.reports.versions import base_words
from evertune.streams import Experience, ExperienceDataModule
from evertune.utils.typed_json import decode
from tests.helpers.generation import PLACES, WORDS, tiny_llama
from tests.helpers.lightning_modules import tiny_bert
from tests.live.test_generation import feed, update

PROBES: list[dict[str, Any]] = [
    {"prompt": f"{start} {word}", "answer": PLACES[number % 4], "choices": PLACES}
    for start in ("what is", "is what")
    for number, word in enumerate(("the", "a", "and", "city", "river", "big", "small", "red", "blue", "old"))
]
GENERAL = [f"{probe['prompt']} {probe['answer']}" for probe in PROBES]
CONFIG = """
registry: registry
source: {class_path: evertune.sources.folder.FolderSource, init_args: {path: inbox}}
schema: {fields: {id: str, text: str}, id: id, text: text, label: null}
trigger: {class_path: evertune.live.triggers.Volume, init_args: {min_records: 8}}
model: {class_path: CausalLMModule, init_args: {model_name_or_path: MODEL, learning_rate: RATE, dropout: 0}}
data: {batch_size: 8, max_length: 24}
trainer: {max_epochs: 2, accelerator: cpu, logger: false, enable_progress_bar: false}
gate:
  base_texts: general.jsonl
  base_probes: probes.jsonl
  max_forgetting: null
  max_drop: null
  max_total_forgetting: null
  max_latency_ratio: null
  max_duplicate_share: null
"""


def write(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that knows the general texts, without a chat template."""
    torch.manual_seed(0)
    module = CausalLMModule(tiny_llama(tmp_path_factory.mktemp("random"), template=False), learning_rate=0.01)
    columns: dict[str, Any] = {"text": "text", "label": None, "id_column": None, "max_length": 24}
    data = module.task.dataset([{"text": text} for text in GENERAL], module.tokenizer, **columns)
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = pl.Trainer(max_epochs=30, accelerator="cpu", enable_model_summary=False, **quiet)
    collate = module.task.collator(module.tokenizer)
    trainer.fit(module, datamodule=ExperienceDataModule(Experience("one", data), batch_size=4, collate_fn=collate))
    folder = tmp_path_factory.mktemp("model")
    module.save_pretrained(folder)
    return str(folder)


def test_an_update_on_garbage_is_refused_for_what_it_harms_and_harmless_ones_pass(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write("general.jsonl", [{"text": text} for text in GENERAL])
    write("probes.jsonl", PROBES)
    drawn = random.Random(0)
    garbage = [{"text": " ".join(drawn.choices(WORDS, k=8))} for _ in range(80)]
    harmless = [{"text": text} for text in GENERAL * 3]
    updates = [("a", harmless, "1.0e-5", 0), ("b", garbage, "0.02", 4), ("c", harmless, "1.0e-5", 0)]
    for name, rows, rate, code in updates:
        Path("live.yaml").write_text(CONFIG.replace("RATE", rate).replace("MODEL", model))
        feed(name, rows)
        assert update(capsys) == code, name
    registry = Registry("registry")
    first, refused, last = (registry.version(number) for number in (1, 2, 3))
    verdicts = [Verdict.from_dict(decode(one.read("verdict.json"))) for one in (first, refused, last)]
    checks = [{check.name: check for check in verdict.checks} for verdict in verdicts]

    # The first version is compared with the pretrained model, the others with the one that they were trained from.
    assert [one[TEXTS].passed for one in checks] == [True, False, True]
    assert [one[SKILLS].passed for one in checks] == [True, False, True]
    known, harmed = first.manifest.metrics.base, refused.manifest.metrics.base
    assert known["loss"] is not None and harmed["loss"] is not None and harmed["loss"] > known["loss"] + 0.5
    assert known["skills"] == 1
    assert all(one[TEXTS].champion == pytest.approx(known["loss"], rel=1e-4) for one in checks[1:])
    reason = refused.manifest.summary
    assert "on 20 general texts the loss of the new version is" in reason
    assert "nats per token, before the update it was" in reason
    assert "of 20 probes, before the update 100.0 %" in reason
    assert registry.aliases["production"] == 3

    page = write_versions_report("registry", tmp_path / "page.html").read_text()
    assert base_words(last.manifest.metrics).startswith(f"general texts: {last.manifest.metrics.base['loss']:.3f} nats")
    assert base_words(last.manifest.metrics) in page.replace("<wbr>", "")
    assert "on 20 general texts the loss of the new version is" in page
    with pytest.raises(SystemExit):
        cli.main(["registry", "show", "registry", "2"])
    assert "beyond its records" in capsys.readouterr().out


def test_probes_are_scored_by_their_choices_or_by_what_the_model_would_write(model: str) -> None:
    probes = [
        PROBES[0],
        {**PROBES[1], "answer": "west"},
        {**PROBES[2], "choices": None},
        {**PROBES[3], "choices": None, "answer": "east"},
    ]
    gate = Gate(base_probes=probes)
    module = CausalLMModule(model)
    module.configure_model()
    base = Base.of(gate, module, 24)
    assert base is not None
    said = base.asked_of(module)
    assert said.keys() == {SKILLS}
    assert said[SKILLS].correct.tolist() == [True, False, True, False]
    assert said[SKILLS].predicted[:2] == ["north", "south"]
    assert base.is_answered_by(Evaluation.from_dict(Evaluation({}, {}, said).to_dict()).base)
    other = Base.of(Gate(base_probes=probes[:2]), module, 24)
    assert other is not None and not other.is_answered_by(said)


def test_what_cannot_be_scored_is_refused_before_training(model: str, tmp_path: Path) -> None:
    module = CausalLMModule(model)
    with pytest.raises(ValueError, match="the answer of probe 0, 'blue', is not among its choices"):
        Base.of(Gate(base_probes=[{**PROBES[0], "answer": "blue"}]), module, 24)
    with pytest.raises(ValueError, match=r"gate\.base_texts: record 0: of 2 tokens, none is left to be learned"):
        Base.of(Gate(base_texts=[{"text": "the"}, {"text": "river"}]), module, 1)
    with pytest.raises(ValueError, match="the model is a SequenceClassificationModule: leave them out"):
        Base.of(Gate(base_texts=[{"text": "a"}]), SequenceClassificationModule(tiny_bert(tmp_path)), 24)
    with pytest.raises(ValueError, match="max_base_loss_increase is a number of nats per token, or None; got -1"):
        Gate(max_base_loss_increase=-1)
    with pytest.raises(ValueError, match="max_base_drop is a share between 0 and 1"):
        Gate(max_base_drop=2)


def texts(*likelihoods: float) -> dict[str, Predictions]:
    ids = list(map(str, range(len(likelihoods))))
    return {TEXTS: Predictions.scored(ids, ids, np.array(likelihoods))}


def skills(*right: bool) -> dict[str, Predictions]:
    ids, unknown = list(map(str, range(len(right)))), np.full(len(right), np.nan)
    return {SKILLS: Predictions(ids, ["yes"] * len(right), ["yes" if one else "no" for one in right], unknown, unknown)}


@pytest.mark.parametrize(
    ("before", "now", "passed"),
    [
        (texts(*[0.5] * 8), texts(*[0.49] * 8), True),  # 0.02 nats
        (texts(*[0.5] * 8), texts(*[0.4] * 8), False),  # 0.22 nats
        (texts(*[0.4] * 8), texts(*[0.5] * 8), True),
        (texts(*[0.5] * 8), texts(*[0.6] * 5, *[0.2] * 3), True),  # 0.23 nats, by chance
        (texts(*[0.5] * 6), texts(*[0.1] * 6), None),  # too few to rule out chance
        (texts(*[0.5] * 8), texts(*[math.nan] * 8), False),
        (skills(*[True] * 8), skills(*[False] * 8), False),
        (skills(*[True] * 8), skills(*[True] * 4, *[False] * 4), True),  # p = 0.06
        (skills(*[True] * 6), skills(*[False] * 6), None),
    ],
)
def test_a_harm_counts_if_it_is_large_and_chance_is_ruled_out(
    before: dict[str, Predictions], now: dict[str, Predictions], passed: bool | None
) -> None:
    (check,) = base_checks(before, now, 0.05, 0.05, PairedTest(0.01))
    assert check.passed is passed
    assert ("cannot tell (fewer than 7)" in check.words) == (passed is None)
    assert base_checks(before, now, None, None, PairedTest(0.01)) == []


def test_figures_and_the_table_say_nats() -> None:
    assert figures({**texts(0.5, 0.25), **skills(True, False)}) == {
        "loss": pytest.approx(1.5 * math.log(2)),
        "skills": 0.5,
    }
    (check,) = base_checks(texts(*[0.5] * 8), texts(*[0.4] * 8), 0.05, None, PairedTest(0.01))
    assert check.figures[:3] == ("0.693 nats", "0.916 nats", "0.050 nats more")
