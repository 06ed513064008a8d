"""Classification by names and descriptions: equal to transformers' own forward passes, text by text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM

from evertune._lightning import pl
from evertune.lightning_modules import ZeroShotClassificationModule
from evertune.live.evaluation import evaluate
from tests.helpers.generation import tiny_llama
from tests.helpers.lightning_modules import TEXTS, loader, tiny_bert

SENTENCES = [text for texts in TEXTS.values() for text in texts]
WORDS = {"business": "bank", "sport": ["team", "goal"], "politics": "party"}
PROMPTS = ["what is the big city", "red", "is a river in the south"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tiny_bert(tmp_path_factory.mktemp("masked"))
    torch.manual_seed(1)
    BertForMaskedLM(BertConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_llama(tmp_path_factory.mktemp("causal"), template=False)


def logits_of(module: Any, texts: list[str]) -> torch.Tensor:
    """The logits of texts of several lengths in one batch, so that some are padded."""
    module.configure_model()
    tokens = module.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return module.eval()(**tokens).logits


def test_similarity_is_the_cosine_with_the_mean_of_the_descriptions(bert: str) -> None:
    module = ZeroShotClassificationModule(bert, classes=list(WORDS), descriptions=WORDS, template="the {label}")
    model, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)

    def vector(text: str) -> torch.Tensor:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        return F.normalize(hidden.mean(0), dim=0)

    described = [["the bank"], ["the team", "the goal"], ["the party"]]
    expected = [
        [sum(float(vector(text) @ vector(one)) for one in some) / len(some) / 0.05 for some in described]
        for text in SENTENCES
    ]
    torch.testing.assert_close(logits_of(module, SENTENCES), torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("template", ["{text} of the {label}", "a {label} : {text}"])
def test_cloze_is_what_the_model_fills_in(masked: str, template: str) -> None:
    settings: dict[str, Any] = {"classes": list(WORDS), "descriptions": WORDS, "method": "cloze"}
    plain = ZeroShotClassificationModule(masked, template=template, calibrate=False, **settings)
    model, tokenizer = BertForMaskedLM.from_pretrained(masked).eval(), AutoTokenizer.from_pretrained(masked)

    def filled(text: str) -> torch.Tensor:
        tokens = tokenizer(template.replace("{text}", text).replace("{label}", "[MASK]"), return_tensors="pt")
        with torch.no_grad():
            logits = model(**tokens).logits[0, tokens["input_ids"][0] == tokenizer.mask_token_id][0]
        log_p = {word: logits.log_softmax(-1)[tokenizer.convert_tokens_to_ids(word)] for word in tokenizer.get_vocab()}
        return torch.stack([log_p["bank"], (log_p["team"] + log_p["goal"]) / 2, log_p["party"]])

    expected = torch.stack([filled(text) for text in SENTENCES])
    torch.testing.assert_close(logits_of(plain, SENTENCES), expected, rtol=1e-4, atol=1e-4)
    calibrated = ZeroShotClassificationModule(masked, template=template, **settings)
    torch.testing.assert_close(logits_of(calibrated, SENTENCES), expected - filled("N/A"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("examples", [(), [("what is a river", "size"), ("a red city", "colour")]])
def test_likelihood_is_that_of_the_whole_text(causal: str, examples: Any) -> None:
    descriptions = {"size": ["big", "small and old"], "colour": "red", "place": "south city"}
    module = ZeroShotClassificationModule(
        causal,
        classes=list(descriptions),
        descriptions=descriptions,
        method="likelihood",
        template="{text} is {label}",
        examples=examples,
        calibrate=False,
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(causal).eval(), AutoTokenizer.from_pretrained(causal)
    shown = "".join(f"{text} is {'big' if label == 'size' else 'red'}\n\n" for text, label in examples)

    def likelihood(text: str, answer: str) -> float:
        start = tokenizer(f"{shown}{text} is", return_tensors="pt")["input_ids"]
        ids = tokenizer(f"{shown}{text} is {answer}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return float(log_p[start.shape[1] - 1 :].sum())

    answers = [["big", "small and old"], ["red"], ["south city"]]
    expected = [[sum(likelihood(text, one) for one in some) / len(some) for some in answers] for text in PROMPTS]
    torch.testing.assert_close(logits_of(module, PROMPTS), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_it_is_judged_like_any_module_and_grows_by_names(bert: str, tmp_path: Path) -> None:
    module = ZeroShotClassificationModule(bert, classes=["business"], descriptions=WORDS)
    assert set(module.predict(["goal match"])[0]) == {"business"}
    module.add_classes(["sport", "politics"])
    rows = [{"id": text, "record": {"text": text, "label": name}} for name, texts in TEXTS.items() for text in texts]
    said = evaluate(module, {"all": rows})["all"]
    answers = module.predict([row["record"]["text"] for row in rows])
    assert said.predicted == [next(iter(answer)) for answer in answers]
    assert said.confidence == pytest.approx([max(answer.values()) for answer in answers], abs=1e-5)
    (scores,) = pl.Trainer(logger=False, enable_progress_bar=False).test(module, loader(bert, list(TEXTS)))
    assert scores["test_accuracy"] == pytest.approx(said.accuracy)
    at_once = ZeroShotClassificationModule(bert, classes=list(WORDS), descriptions=WORDS)
    assert at_once.predict(SENTENCES) == module.predict(SENTENCES)
    module.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "evertune.json").read_text())["hparams"]["descriptions"] == WORDS
    assert ZeroShotClassificationModule.from_pretrained(tmp_path).predict(SENTENCES) == module.predict(SENTENCES)


def test_a_long_text_makes_room_for_the_template(masked: str) -> None:
    module = ZeroShotClassificationModule(
        masked, classes=["bank", "team"], method="cloze", template="{text} of the {label}"
    )
    long = " ".join(["goal"] * 60)
    shorter = " ".join(["goal"] * (32 - 5))  # 32 positions less two special tokens and three of the template
    assert module.predict([long]) == module.predict([shorter]) != module.predict(["goal"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "nearest"}, "method must be one of"),
        ({"temperature": 0}, "temperature must be positive, got 0"),
        ({"template": "{text} is {label}"}, "template must have {label} once, and no {text}"),
        ({"method": "cloze", "template": "{label}"}, "template must have {text} and {label} once each"),
        ({"method": "likelihood", "template": "{label}: {text}"}, "at the end, got '{label}: {text}'"),
        ({"examples": [("a goal", "team")]}, "method='similarity' takes none"),
        ({"method": "likelihood", "examples": [("a law", "law")]}, "class 'law', which is none of"),
        ({"descriptions": {"team": []}}, "the descriptions of 'team' must not be empty"),
    ],
)
def test_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        ZeroShotClassificationModule("any", classes=["bank", "team"], **settings)


def test_refused_with_the_model(bert: str, masked: str, causal: str) -> None:
    with pytest.raises(ValueError, match="'market share' is not one: describe the class by another"):
        ZeroShotClassificationModule(masked, classes=["market share"], method="cloze").configure_model()
    with pytest.raises(ValueError, match=r"the weights in .* lack"):
        ZeroShotClassificationModule(bert, classes=["bank"], method="cloze").configure_model()
    with pytest.raises(ValueError, match=r"LlamaConfig.* for this kind of AutoModel: AutoModelForMaskedLM"):
        ZeroShotClassificationModule(causal, classes=["red"], method="cloze").configure_model()
    examples = [("what is the big city", "red")] * 5
    with pytest.raises(ValueError, match="leaves no room for a text: LlamaForCausalLM takes 32"):
        ZeroShotClassificationModule(causal, classes=["red"], method="likelihood", examples=examples).configure_model()
    with pytest.raises(ValueError, match="ZeroShotClassificationModule is not trained: fit a Sequence"):
        pl.Trainer(max_epochs=1, logger=False, enable_checkpointing=False).fit(
            ZeroShotClassificationModule(bert, classes=list(TEXTS)), loader(bert, list(TEXTS))
        )
