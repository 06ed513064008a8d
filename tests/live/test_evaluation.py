"""What a module says about held-out records, on a tiny transformer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from evertune.lightning_modules import SequenceClassificationModule
from evertune.live.evaluation import (
    evaluate,
    evaluate_examples,
    measure,
    size_in_bytes,
    surely_slower,
    without_training,
)
from tests.helpers.lightning_modules import TEXTS, tiny_bert


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


def module_of(folder: str, **settings: Any) -> SequenceClassificationModule:
    torch.manual_seed(0)
    module = SequenceClassificationModule(folder, classes=list(TEXTS), **settings)
    module.configure_model()
    with torch.no_grad():
        module.head.weight.mul_(30)
    return module


def rows(repeat: int = 3) -> list[dict[str, Any]]:
    examples = [(text, name) for name, texts in TEXTS.items() for text in texts] * repeat
    return [
        {"id": f"r{n}", "origin": "x", "record": {"text": text, "label": name}}
        for n, (text, name) in enumerate(examples)
    ]


def test_predictions_equal_those_of_predict(folder: str) -> None:
    module, records = module_of(folder), rows()
    said = evaluate(module, {"a": records}, batch_size=4, max_length=32)["a"]
    assert said.ids == [row["id"] for row in records]
    assert said.labels == [row["record"]["label"] for row in records]
    expected = module.predict([row["record"]["text"] for row in records], max_length=32)
    for place, probabilities in enumerate(expected):
        name, probability = next(iter(probabilities.items()))
        assert said.predicted[place] == name
        assert said.confidence[place] == pytest.approx(probability, abs=2e-6)
        assert said.label_probability[place] == pytest.approx(probabilities[str(said.labels[place])], abs=2e-6)
    assert len(set(map(str, said.predicted))) > 1


def test_the_module_and_the_random_state_are_left_as_they_were(folder: str) -> None:
    module = module_of(folder)
    module.train()
    module.backbone.encoder.layer[0].eval()
    modes = [part.training for part in module.modules()]
    state = torch.get_rng_state()
    first = evaluate(module, {"a": rows()})
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert evaluate(module, {"a": rows()})["a"].to_dict() == first["a"].to_dict()  # no dropout


def test_modes_return_after_an_error(folder: str) -> None:
    module = module_of(folder)
    module.train()
    with pytest.raises(ValueError, match="slice 'a': record 'r1' has no field 'label'"):
        evaluate(module, {"a": [rows()[0], {"id": "r1", "record": {"text": "goal"}}]})
    assert module.training


def test_a_slice_is_predicted_the_same_whatever_else_there_is(folder: str) -> None:
    module = module_of(folder)
    together = evaluate(module, {"b": rows(1), "a": rows(5), "none": []})
    assert list(together) == ["b", "a", "none"] and len(together["none"]) == 0
    assert together["b"].to_dict() == evaluate(module, {"b": rows(1)})["b"].to_dict()


def test_an_unknown_class_counts_as_wrong(folder: str) -> None:
    record = {"id": "1", "record": {"text": "the team goal", "label": "chess"}}
    said = evaluate(module_of(folder), {"a": [record]})["a"]
    assert said.accuracy == 0 and said.label_probability.tolist() == [0.0]


def test_several_labels_are_right_all_together(folder: str) -> None:
    module = module_of(folder, multi_label=True)
    texts = [text for texts in TEXTS.values() for text in texts]
    expected = [{name for name, p in row.items() if p > 0.5} for row in module.predict(texts)]
    records = [{"id": str(n), "record": {"text": text, "label": sorted(expected[n])}} for n, text in enumerate(texts)]
    records[0]["record"]["label"] = sorted(set(TEXTS) - expected[0])
    records[1]["record"]["label"] = ["chess"]
    said = evaluate(module, {"a": records})["a"]
    assert said.correct.tolist() == [False, False] + [True] * (len(texts) - 2)
    probabilities = module.predict(texts[2:3])[0]
    assert said.confidence[2] == pytest.approx(np.prod([max(p, 1 - p) for p in probabilities.values()]), abs=2e-6)
    assert said.confidence[2] == said.label_probability[2] and said.label_probability[1] == 0


def test_pairs_of_texts(folder: str) -> None:
    module = module_of(folder)
    records = [{"id": "1", "record": {"a": "the team goal", "b": "a law", "label": "sport"}}]
    said = evaluate(module, {"a": records}, text=["a", "b"])["a"]
    assert said.confidence[0] == pytest.approx(max(module.predict([("the team goal", "a law")])[0].values()), abs=2e-6)


def test_a_module_that_diverged_gives_no_numbers(folder: str) -> None:
    module = module_of(folder)
    with torch.no_grad():
        module.head.bias.fill_(torch.nan)
    assert np.isnan(evaluate(module, {"a": rows(1)})["a"].confidence).all()


def test_any_module_of_the_protocol_will_do(folder: str) -> None:
    tokenizer = module_of(folder).tokenizer

    class Longest(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classes = ["short", "long"]
            self.tokenizer, self.weight = tokenizer, torch.nn.Parameter(torch.ones(1))

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> SimpleNamespace:
            length = attention_mask.sum(1).float()
            return SimpleNamespace(logits=torch.stack([6 - length, length - 6], 1) * self.weight)

    records = [
        {"id": "1", "record": {"text": "goal", "label": "short"}},
        {"id": "2", "record": {"text": "the share of a market of the bank", "label": "long"}},
    ]
    assert evaluate(Longest(), {"a": records})["a"].predicted == ["short", "long"]


def test_answers_without_training(folder: str) -> None:
    slices = {"a": rows(3), "b": rows(1), "none": []}
    said = without_training(module_of(folder), slices)
    assert said is not None and list(said) == ["a", "b", "none"]
    assert said["a"].ids == [row["id"] for row in slices["a"]] and said["a"].accuracy == 1.0  # copies of few texts
    other = module_of(folder)
    with torch.no_grad():
        other.head.weight.mul_(-1)
    again = without_training(other, slices, batch_size=2)  # features only: neither the head nor the batches matter
    assert again is not None and again["b"].predicted == said["b"].predicted
    assert (
        without_training(
            module_of(folder, multi_label=True), {"a": [{**rows()[0], "record": {"text": "a", "label": ["x"]}}]}
        )
        is None
    )
    assert without_training(torch.nn.Linear(1, 1), slices) is None


def test_features_that_do_not_fit_are_reported(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    module = module_of(folder)
    module.features = lambda pixels: pixels["pixel_values"]  # type: ignore[method-assign]
    assert without_training(module, {"a": rows()}) is None
    assert "the features of SequenceClassificationModule cannot be used: 'pixel_values'" in caplog.text


def test_tokenised_examples_are_right_or_wrong(folder: str) -> None:
    module, records = module_of(folder), rows(2)
    labels = [row["record"]["label"] for row in records]
    data = [dict(row["record"]) for row in records]
    examples = module.task.dataset(data, module.tokenizer, text="text", label="label", id_column=None, max_length=32)
    said = evaluate_examples(module, [examples[n] for n in range(len(data))], labels, batch_size=4)
    assert said.correct.tolist() == evaluate(module, {"a": records})["a"].correct.tolist()


@pytest.mark.parametrize("setting", ["batch_size", "max_length"])
def test_sizes_must_be_positive(folder: str, setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting} must be positive, got 0"):
        evaluate(module_of(folder), {}, **{setting: 0})  # type: ignore[arg-type]


def test_costs_are_measured_side_by_side(folder: str) -> None:
    champion, challenger = module_of(folder), module_of(folder, n_classes_ahead=100)
    champion.train()
    old, new = measure(champion, challenger, TEXTS["sport"] * 4, repeats=3)
    assert champion.training
    assert min(old.latency_ms, old.batch_ms, new.latency_ms, new.batch_ms) > 0
    assert new.size_bytes - old.size_bytes == (100 - 3) * (32 + 1) * 4
    assert old.size_bytes == size_in_bytes(champion)
    measure(champion, challenger, [("a goal", "a law")], repeats=1)
    with pytest.raises(ValueError, match="needs texts and at least one repeat, got 0 texts"):
        measure(champion, challenger, [])


def test_other_load_does_not_make_an_equal_module_look_slow() -> None:
    draw = np.random.default_rng(0)
    for _ in range(300):
        before, after = 1 + 2 * (draw.random((2, 15)) < 0.4)  # two turns in five take three times as long
        assert surely_slower(list(before), list(after)) <= 1.5
    quiet = [surely_slower([1.0] * 15, list(2 * draw.normal(1, 0.05, 15))) for _ in range(100)]
    assert min(quiet) > 1.5
