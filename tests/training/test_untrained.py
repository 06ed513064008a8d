"""What no training would give, beside what a stream of updates gives."""

from __future__ import annotations

import math

import pytest
import torch

from evertune import ContinualTrainer
from evertune.callbacks import Replay
from evertune.lightning_modules import AnalyticClassificationModule, SequenceClassificationModule
from evertune.streams import Experience, ExperienceStream
from evertune.training.untrained import _METHODS, UntrainedBaseline
from tests.helpers.distributed import run_ranks
from tests.helpers.lightning_modules import TEXTS, tiny_bert
from tests.helpers.quiet import QUIET

SETTINGS = {**QUIET, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("model"))


def stream():
    rows = {name: [{"text": text, "label": name} for text in texts] for name, texts in TEXTS.items()}
    return ExperienceStream(
        [
            Experience(name, data * 2, test=[*data, {"text": "the law of a match", "label": name}], classes=[name])
            for name, data in rows.items()
        ],
        label="label",
    )


def learn(folder, strategy="auto", devices=1, **settings):
    torch.manual_seed(0)
    module = SequenceClassificationModule(folder, learning_rate=1e-2, dropout=0.0)
    trainer = ContinualTrainer(
        max_epochs=1, strategy=strategy, devices=devices, callbacks=[Replay(memory_size=4)], **SETTINGS
    )
    return trainer.fit_stream(module, stream(), **settings)


def untrained(folder, strategy, devices):
    history = learn(folder, strategy, devices)
    return {**history.untrained, "seconds": 0.0}


def same(found, expected):
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), equal_nan=True)


def test_it_is_what_analytic_modules_give(model):
    history = learn(model)
    settings = _METHODS[history.untrained["method"]]
    module = AnalyticClassificationModule(model, **settings)
    expected = ContinualTrainer(max_epochs=1, **SETTINGS).fit_stream(module, stream())
    found = history.untrained["accuracy_matrix"]
    same(found, expected.accuracy_matrix)
    assert expected.untrained == {}  # it is not trained itself
    finals = [
        ContinualTrainer(max_epochs=1, **SETTINGS)
        .fit_stream(AnalyticClassificationModule(model, **other), stream())
        .average_accuracy
        for other in _METHODS.values()
        if other is not settings
    ]
    assert history.baseline.average_accuracy >= max(finals)


def test_training_is_not_affected(model):
    with_it, without = learn(model), learn(model, untrained=False)
    same(with_it.accuracy_matrix, without.accuracy_matrix)
    assert without.untrained == {}


def test_experiences_that_are_evaluated_before_they_are_learned(model):
    found = learn(model, evaluate_on=list(stream())[::-1]).untrained["accuracy_matrix"]
    assert [len(row) for row in found] == [3, 3, 3]
    assert found[0][2] == 1.0
    assert math.isnan(found[0][1])  # its class is not known yet
    assert not math.isnan(found[1][1])


def test_a_run_that_resumes_keeps_it(model, tmp_path, monkeypatch):
    expected = learn(model, run_dir=tmp_path / "whole").untrained
    commit = ContinualTrainer.fit_experience

    def fail_at_the_second(self, module, experience, *arguments):
        if experience.name == "sport":
            raise KeyError("power cut")
        commit(self, module, experience, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ContinualTrainer, "fit_experience", fail_at_the_second)
        with pytest.raises(KeyError, match="power cut"):
            learn(model, run_dir=tmp_path / "run")
    monkeypatch.setattr(UntrainedBaseline, "_measure", None)
    found = learn(model, run_dir=tmp_path / "run").untrained
    assert found["method"] == expected["method"]
    same(found["accuracy_matrix"], expected["accuracy_matrix"])


def test_what_cannot_be_measured_is_reported_and_does_not_stop_the_run(model, caplog):
    class Plain(SequenceClassificationModule):
        features = None

    module = Plain(model, dropout=0.0)
    with caplog.at_level("INFO"):
        history = ContinualTrainer(max_epochs=1, **SETTINGS).fit_stream(module, stream())
    assert "not measured: Plain has no method features(batch)" in caplog.text
    assert history.untrained == {}

    class Broken(SequenceClassificationModule):
        def features(self, batch):
            raise RuntimeError("no features today")

    with pytest.warns(UserWarning, match="not measured: RuntimeError: no features today"):
        history = ContinualTrainer(max_epochs=1, **SETTINGS).fit_stream(Broken(model, dropout=0.0), stream())
    assert history.untrained == {}
    assert len(history.accuracy_matrix) == 3


def test_two_ranks_measure_what_one_process_measures(model):
    one = untrained(model, "auto", 1)
    ranks = run_ranks(f"{__name__}:untrained", 2, folder=model, strategy="ddp", devices=2)
    for rank in ranks:
        assert rank["method"] == one["method"]
        same(rank["accuracy_matrix"], one["accuracy_matrix"])
