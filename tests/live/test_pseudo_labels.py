"""Labels that a module gives: only where it is right often enough on labelled records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from evertune.gate.predictions import Predictions
from evertune.gate.statistics import binomial_tail
from evertune.lightning_modules import SequenceClassificationModule
from evertune.live.pseudo_labels import PseudoLabeller, sure_enough
from tests.helpers.lightning_modules import TEXTS, tiny_bert

N = 1_000


def predictions(sure: np.ndarray, right: np.ndarray) -> Predictions:
    answers = ["sport" if one else "law" for one in right]
    return Predictions([str(n) for n in range(len(sure))], ["sport"] * len(sure), list(answers), sure, sure)


def test_the_promise_is_kept_and_much_is_labelled() -> None:
    draws, broken, shares = np.random.default_rng(0), 0, []
    for _ in range(200):
        sure = draws.uniform(0.5, 1.0, N)
        found = sure_enough(predictions(sure, draws.uniform(size=N) < sure), precision=0.9)
        if found.confidence is not None:
            broken += (1 + found.confidence) / 2 < 0.9  # the true share of right answers above it
            shares.append(found.answered / N)
    assert broken <= 10  # alpha is 0.05
    assert len(shares) > 100 and np.mean(shares) > 0.1  # at best 0.4


def test_too_few_or_too_bad_records_give_no_threshold() -> None:
    sure = np.linspace(1, 0.5, 200)
    assert sure_enough(predictions(sure[:103], np.ones(103, bool))).confidence is None
    assert sure_enough(predictions(sure[:104], np.ones(104, bool))).answered == 104
    assert binomial_tail(104, 104, 0.95) <= 0.005 < binomial_tail(103, 103, 0.95)
    nothing = sure_enough(predictions(sure, np.arange(200) % 2 == 0))
    assert nothing.confidence is None and "none becomes a label" in nothing.words
    for settings, words in (({"precision": 1.0}, "precision must be between 0 and 1"), ({"alpha": 0}, "alpha must be")):
        with pytest.raises(ValueError, match=words):
            sure_enough(predictions(sure, sure > 0), **settings)
    with pytest.raises(ValueError, match="there are none"):
        sure_enough(predictions(sure[:0], sure[:0]))
    with pytest.raises(ValueError, match="only answers with the probability of a class"):
        sure_enough(Predictions.scored(["1"], [0.3], np.array([0.9])))


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_labeller_labels_what_it_is_sure_of_and_counts_the_rest(tmp_path: Path, multi_label: bool) -> None:
    torch.manual_seed(0)
    module = SequenceClassificationModule(tiny_bert(tmp_path), classes=list(TEXTS), multi_label=multi_label)
    module.configure_model()
    texts = [text for some in TEXTS.values() for text in some]
    # Labels that the module has right where it is surest: on the upper half of the texts.
    answers = module.predict(texts)
    sure = [np.prod([max(p, 1 - p) for p in one.values()]) if multi_label else max(one.values()) for one in answers]
    limit = float(np.median(sure))
    said = [[name for name, p in one.items() if p > 0.5] if multi_label else next(iter(one)) for one in answers]
    wrong: list[str] | str = ["?"] if multi_label else "?"
    labels = [one if sureness >= limit else wrong for one, sureness in zip(said, sure, strict=True)]
    labelled = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)] * 40
    labeller = PseudoLabeller.calibrated(module, labelled)
    assert labeller.threshold.right == labeller.threshold.answered > 100
    found = labeller.label([{"text": text, "id": str(n)} for n, text in enumerate(texts)])
    assert found.records and found.abstained and len(found.records) + found.abstained == len(texts)
    for record in found.records:
        number = int(record["id"])
        expected = {"text": texts[number], "id": str(number), "label": said[number], "pseudo_label": True}
        assert record == expected and sure[number] >= limit - 1e-5
