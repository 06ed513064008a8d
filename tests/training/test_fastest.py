"""Precision and attention chosen by measurement: by rank 0, once, and again the same when a run resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from evertune import ContinualTrainer
from evertune._lightning import pl
from evertune.callbacks import Fastest
from evertune.lightning_modules.backbone import load_backbone
from evertune.utils import hardware
from evertune.utils.hardware import Choice, fastest
from tests.helpers.distributed import run_ranks
from tests.helpers.generation import tiny_t5
from tests.helpers.lightning_modules import tiny_bert
from tests.training.test_trainer import QUIET, small_bert, texts_stream

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_bert(tmp_path_factory.mktemp("bert")))


def clock(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> list[float]:
    """Let the measurements have these results, one after the other: bf16 and fp32 alone, then each candidate."""
    left = list(seconds)

    def least_seconds(action: Any) -> float:
        action()
        return left.pop(0)

    monkeypatch.setattr(hardware, "_least_seconds", least_seconds)
    return left


def chosen(choice: Choice) -> tuple[str, str]:
    return choice.precision, choice.attention


def test_the_fastest_is_chosen_and_the_model_left_as_it_was(bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_backbone(bert)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    left = clock(monkeypatch, 1, 2, 0.9, 0.8, 0.5, 0.2)
    choice = fastest(model, CPU)
    assert chosen(choice) == ("bf16-mixed", "eager") and not left
    assert choice.reason == (
        "a step of 32 short texts: 32-true sdpa 900 ms, 32-true eager 800 ms, bf16-mixed sdpa 500 ms, "
        "bf16-mixed eager 200 ms"
    )
    assert model.config._attn_implementation == "sdpa" and model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_cpu_that_is_slow_in_bf16_is_not_asked_for_more(bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    left = clock(monkeypatch, 30, 1, 0.9, 0.7)
    choice = fastest(load_backbone(bert), CPU)
    assert chosen(choice) == ("32-true", "eager") and not left
    assert choice.reason.endswith("; a matrix product in bf16 takes 30.0 times as long as in fp32")


def test_noise_does_not_decide(bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, 2, 1, 0.9, 0.8)
    assert chosen(fastest(load_backbone(bert), CPU)) == ("32-true", "sdpa")


def test_frozen_models_are_timed_forwards_and_others_not_at_all(bert: str) -> None:
    model = load_backbone(bert).requires_grad_(False)
    assert "sdpa" in fastest(model, CPU, ["32-true"]).reason
    assert chosen(fastest(model, torch.device("meta"), ["bf16-mixed"], ["eager"])) == ("bf16-mixed", "sdpa")


def in_bf16(*_: Any) -> Choice:
    return Choice("bf16-mixed", "eager", "it was told so", "here")


def test_a_trainer_takes_what_is_fastest_for_the_whole_stream(
    bert: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []
    monkeypatch.setattr("evertune.training.fastest.place", lambda *_: "here")
    monkeypatch.setattr("evertune.training.fastest.fastest", lambda *rest: calls.append(rest) or in_bf16())
    module = small_bert(bert, classes=["a"])
    module.configure_model()
    seen = set()

    def note(model: Any, *_: Any) -> None:
        if model.training:
            seen.add((model.config._attn_implementation, torch.is_autocast_enabled("cpu")))

    module.backbone.register_forward_hook(note)
    trainer = ContinualTrainer(precision="auto", max_epochs=1, **QUIET)
    trainer.fit_stream(module, texts_stream(), run_dir=tmp_path)
    assert len(calls) == 1 and calls[0][2:] == (("32-true", "bf16-mixed"), ("sdpa", "eager"))
    assert trainer.precision == "bf16-mixed"
    assert seen == {("eager", True)}
    saved = json.loads(next(tmp_path.rglob("fastest.json")).read_text())
    assert saved["precision"] == "bf16-mixed" and saved["reason"] == "it was told so"
    again = Fastest()
    again.load(next(tmp_path.rglob("fastest.json")).parent)
    assert again.choice == in_bf16()


def test_a_resumed_fit_does_not_measure(bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even on a machine of another kind."""
    monkeypatch.setattr("evertune.training.fastest.fastest", lambda *_: pytest.fail("measured"))
    callback, trainer = Fastest(), pl.Trainer(max_epochs=1, **QUIET)
    trainer.strategy.connect(module := small_bert(bert, classes=["a"]))
    module.configure_model()
    callback.setup(trainer, module, "fit")
    callback.load_state_dict(in_bf16().__dict__)
    callback.on_fit_start(trainer, module)
    assert trainer.precision == "bf16-mixed" and module.backbone.config._attn_implementation == "eager"
    assert callback.state_dict() == in_bf16().__dict__


def test_attention_that_was_asked_for_stays(bert: str) -> None:
    module = small_bert(bert, attention="eager")
    trainer = ContinualTrainer(callbacks=[Fastest("32-true")], max_steps=1, **QUIET)
    trainer.fit_stream(module, texts_stream())
    assert module.backbone.config._attn_implementation == "eager"
    choice = next(one.choice for one in trainer.callbacks if isinstance(one, Fastest))
    assert chosen(choice) == ("32-true", "eager") and "sdpa" not in choice.reason


def test_refusals(bert: str) -> None:
    with pytest.raises(ValueError, match=r"attention must be one of .*, got 'flash'"):
        small_bert(bert, attention="flash")
    with pytest.raises(ValueError, match=r"precision must be one of .*, got '16-mixed'"):
        Fastest("16-mixed")
    with pytest.raises(ValueError, match="precision='bf16-mixed', and Fastest chooses one: leave one out"):
        ContinualTrainer(precision="bf16-mixed", callbacks=[Fastest()], **QUIET)


def learn_on_two_ranks(bert: str) -> list[str]:
    """The ranks find different things fastest."""
    import evertune.training.fastest as chooser

    def one_or_the_other(*_: Any) -> Choice:
        first = torch.distributed.get_rank() == 0
        return Choice(*(("bf16-mixed", "eager") if first else ("32-true", "sdpa")), "", "")

    chooser.fastest = one_or_the_other
    trainer = ContinualTrainer(precision="auto", devices=2, strategy="ddp", max_steps=1, **QUIET)
    module = small_bert(bert)
    trainer.fit_stream(module, texts_stream()[:1])
    return [str(trainer.precision), module.backbone.config._attn_implementation]


def test_all_ranks_take_the_choice_of_the_first(bert: str) -> None:
    ranks = run_ranks("tests.training.test_fastest:learn_on_two_ranks", 2, bert=bert)
    assert ranks == [["bf16-mixed", "eager"]] * 2


def test_an_encoder_decoder_is_measured(tmp_path: Path) -> None:
    model = load_backbone(tiny_t5(tmp_path), auto_class="AutoModelForSeq2SeqLM")
    assert "a step of 32 short texts: 32-true" in fastest(model, CPU, ("32-true",)).reason
