"""A run's history, and its file."""

from __future__ import annotations

import json
import math
import pickle

import pytest
import torch

from evertune.metrics import History, load_history, save_history


def example() -> History:
    return History(
        ["business + sport", "tech"],
        [[0.9], [0.7, 0.8]],
        seconds=12.5,
        drift=[{"step": 3, "score": 0.5, "alarm": True, "threshold": 0.25}],
        memory={"size": 2, "capacity": 4, "per_experience": {"tech": 2}, "per_class": {"tech": 2}},
        examples=100,
        breakdown={"other": 0.02, "training": 12.48},
    )


def test_the_file_has_the_promised_form(tmp_path):
    path = save_history(tmp_path / "new" / "history.json", {"naive": History(["a", "b"], [[0.5], [0.25, 1.0]], 3)})
    assert json.loads(path.read_text()) == {
        "runs": {
            "naive": {
                "experiences": ["a", "b"],
                "accuracy_matrix": [[0.5, None], [0.25, 1.0]],
                "average_accuracy": 0.625,
                "forgetting": 0.25,
                "backward_transfer": -0.25,
                "seconds": 3.0,
            }
        }
    }


def test_what_is_saved_is_loaded(tmp_path):
    runs = {"replay+ewc": example(), "joint": History(["a", "b"], torch.tensor([[1.0, 0.5]]), 1.0)}
    loaded = load_history(save_history(tmp_path / "history.json", runs))
    assert list(loaded) == ["replay+ewc", "joint"]
    assert loaded["replay+ewc"].to_dict() == example().to_dict()
    assert loaded["joint"].accuracy_matrix == [[1.0, 0.5]]
    assert math.isnan(loaded["replay+ewc"].accuracy_matrix[0][1])
    assert [file.name for file in tmp_path.iterdir()] == ["history.json"]


def test_in_words():
    assert str(example()) == "average accuracy 0.750, forgetting 0.200; 12.5 seconds (training 12.5)"
    assert str(History(["a"], [[None]], 3)) == "not evaluated; 3.0 seconds"


def test_a_metric_that_cannot_be_told_is_null():
    run = History(["a", "b"], [[None, None], [0.5, 0.5]], 1.0)
    assert run.to_dict()["forgetting"] is None
    assert run.to_dict()["average_accuracy"] == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experiences": []}, "at least one name"),
        ({"experiences": ["a", "a"]}, "different names, got 'a' twice"),
        ({"experiences": "ab"}, "must be a list of at least one name, got 'ab'"),
        ({"accuracy_matrix": [[0.5, 0.5, 0.5]]}, r"3 columns for 2 experiences \(business \+ sport, tech\)"),
        ({"accuracy_matrix": [[0.5], [55.0]]}, r"scores must be in \[0, 1\], got 55.0 after update 1 on 'business \+"),
        ({"accuracy_matrix": "0.5"}, "accuracy_matrix must be a list of rows, got a str"),
        ({"accuracy_matrix": []}, "both at least 1"),
        ({"accuracy_matrix": [["0.5"]]}, "row 0 of the accuracy matrix must hold numbers"),
        ({"seconds": -1}, "seconds must be a number of at least 0, got -1"),
        ({"seconds": "12"}, "seconds must be a number of at least 0, got '12'"),
        ({"examples": 1.5}, "examples must be a count or None, got 1.5"),
        ({"breakdown": {"fit": 1.0}}, "breakdown must give the seconds of training, .*, other, got 'fit'"),
        ({"breakdown": {"replay": -1.0}}, r"breakdown\['replay'\] must be a number of at least 0, got -1.0"),
        ({"drift": {}}, "drift must be a list, got a dict"),
        ({"drift": [{"step": 1}]}, r"drift\[0\] must have step, score, alarm and threshold"),
        ({"drift": [{"step": 1, "score": math.nan, "alarm": False, "threshold": 1.0}]}, "finite numbers as score"),
        ({"drift": [{"step": 1, "score": 1.0, "alarm": 1, "threshold": 1.0}]}, "true or false as alarm"),
        ({"memory": {"size": -1, "capacity": 4}}, r"memory\['size'\] must be a count, got -1"),
        ({"memory": {"size": 1, "capacity": 4, "per_class": [1]}}, r"memory\['per_class'\] must give a count"),
    ],
)
def test_what_has_another_form_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        History.from_dict(example().to_dict() | change)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (pickle.dumps({"runs": {}}), "is a pickle or a PyTorch archive"),
        (b"PK\x03\x04archive/data.pkl", "is a pickle or a PyTorch archive"),
        (b'{"runs": {"naive": {"experiences": ["a"', "truncated or corrupt"),
        (b'{"runs": {"naive": {"experiences": ["a"], "accuracy_matrix": [[NaN]], "seconds": 1}}}', "NaN is not a JSON"),
        (b"\xff\xfe\x00", "truncated or corrupt"),
        (b"[]", "is not a history"),
        (b'{"runs": {}}', "at least one run"),
        (b'{"runs": {"naive": []}}', "run 'naive': a run must be a mapping, got a list"),
        (b'{"runs": {"naive": {"experiences": ["a"]}}}', "run 'naive': a run must have accuracy_matrix, seconds"),
        (b'{"runs": {"naive": {"experiences": ["a"], "accuracy_matrix": [[2]], "seconds": 1}}}', "run 'naive': scores"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "history.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_history(path)
    assert str(path) in str(caught.value)


def test_a_truncated_file_is_refused_wherever_it_is_cut(tmp_path):
    path = save_history(tmp_path / "history.json", {"naive": example()})
    whole = path.read_bytes().strip()
    for cut in range(0, len(whole), 37):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"history\.json"):
            load_history(path)


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = save_history(tmp_path / "history.json", {"naive": example()})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="no runs to save"):
        save_history(path, {})
    assert path.read_bytes() == before


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        load_history(tmp_path / "nothing.json")


def test_what_no_training_would_give():
    untrained = {"method": "LDA", "accuracy_matrix": [[0.9], [0.5, 0.7]], "seconds": 2.0}
    history = History(["a", "b"], [[1.0], [0.5, 0.9]], 10.0, untrained=untrained)
    assert history.baseline.average_accuracy == pytest.approx(0.6)
    assert str(history).startswith("average accuracy 0.700, without training 0.600, forgetting 0.500")
    again = History.from_dict(json.loads(json.dumps(history.to_dict())))
    assert again.baseline.to_dict() == history.baseline.to_dict()
    assert History(["a"], [[1.0]], 1.0).baseline is None
    with pytest.raises(ValueError, match="untrained must have method, accuracy_matrix and seconds"):
        History(["a"], [[1.0]], 1.0, untrained={"method": "LDA"})
