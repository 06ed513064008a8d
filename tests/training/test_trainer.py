"""A stream is one fit for each experience, by callbacks that live through all of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evertune import ContinualTrainer
from evertune._lightning import EarlyStopping, ModelCheckpoint, SingleDeviceStrategy, pl
from evertune.callbacks import EWC, ContinualEvaluation, Replay
from evertune.lightning_modules import SequenceClassificationModule
from evertune.streams import Experience, ExperienceDataModule, ExperienceStream, StreamDataModule
from tests.helpers.distributed import run_ranks
from tests.helpers.lightning_modules import TEXTS, tiny_bert
from tests.helpers.quiet import QUIET

SETTINGS = {**QUIET, "accelerator": "cpu"}


class Plain(pl.LightningModule):
    """Knows nothing of evertune: tuple batches, SGD."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))
        self.fail_at = fail_at
        self.steps: list[int] = []  # of each fit
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def on_fit_start(self) -> None:
        self.steps.append(0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if sum(self.steps) == self.fail_at:
            raise RuntimeError("power cut")
        self.steps[-1] += 1
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("constant", 1.0)
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


def points(classes: tuple[int, int], n: int, seed: int) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(6, 4, generator=torch.Generator().manual_seed(9))
    return [(centres[classes[i % 2]] + 0.3 * torch.randn(4, generator=generator), classes[i % 2]) for i in range(n)]


def plain_stream() -> list[Experience]:
    return [
        Experience(f"part {k}", points((2 * k, 2 * k + 1), 24, k), test=points((2 * k, 2 * k + 1), 10, 50 + k))
        for k in range(3)
    ]


def batches_of(experience: Experience) -> ExperienceDataModule:
    return ExperienceDataModule(experience, batch_size=8)


def texts_stream() -> ExperienceStream:
    rows = {name: [{"text": text, "label": name} for text in texts] for name, texts in TEXTS.items()}
    return ExperienceStream(
        [Experience(name, train=4 * row, val=row, test=row, classes=[name]) for name, row in rows.items()],
        label="label",
    )


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


def small_bert(folder: str, **settings: Any) -> SequenceClassificationModule:
    return SequenceClassificationModule(folder, dropout=0.0, learning_rate=1e-3, **settings)


def methods() -> list[pl.Callback]:
    return [Replay(memory_size=10), EWC(ewc_lambda=10.0, n_examples=12, batch_size=6), ContinualEvaluation()]


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    theirs = other.state_dict()
    assert one.state_dict().keys() == theirs.keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def check_history(history: Any, names: list[str]) -> None:
    """The lower triangle is scored, the upper one is not, and it is fit for JSON."""
    assert history.experiences == names
    for t, row in enumerate(history.accuracy_matrix):
        assert len(row) == len(names)
        assert all(0 <= score <= 1 for score in row[: t + 1])
        assert all(math.isnan(score) for score in row[t + 1 :])
    assert len(history.accuracy_matrix) == len(names)
    assert history.average_accuracy == pytest.approx(sum(history.accuracy_matrix[-1]) / len(names))
    assert history.seconds > 0
    json.dumps(history.to_dict(), allow_nan=False)


def test_a_head_grows_through_a_stream(bert: str) -> None:
    module = small_bert(bert)
    trainer = ContinualTrainer(max_epochs=5, callbacks=Replay(memory_size=6), **SETTINGS)
    history = trainer.fit_stream(module, texts_stream())
    check_history(history, ["business", "sport", "politics"])
    assert module.classes == ["business", "sport", "politics"]
    assert history.accuracy_matrix[0][0] == 1.0  # there is one class only
    assert history.examples == 36
    assert history.memory["size"] == history.memory["capacity"] == 6
    assert set(history.memory["per_experience"]) <= {"business", "sport", "politics"}
    assert sum(history.memory["per_class"].values()) == 6
    assert trainer.experience is None


def test_equals_separate_fits(bert: str) -> None:
    def stream_of(kind: str) -> tuple[pl.LightningModule, Any, Any]:
        if kind == "plain":
            return Plain(), plain_stream(), batches_of
        module = small_bert(bert)
        return module, texts_stream(), lambda one: ExperienceDataModule(one, module.tokenizer, batch_size=4)

    for kind in ("plain", "bert"):
        module, stream, make = stream_of(kind)
        pl.seed_everything(3, verbose=False)
        trainer = ContinualTrainer(max_epochs=2, callbacks=methods(), **SETTINGS)
        history = trainer.fit_stream(module, stream, make)

        alone, stream, make = stream_of(kind)
        callbacks = methods()
        pl.seed_everything(3, verbose=False)
        for experience in stream:
            pl.Trainer(max_epochs=2, callbacks=callbacks, **SETTINGS).fit(alone, datamodule=make(experience))
        assert_same_weights(module, alone)
        assert history.experiences == callbacks[2].experiences
        assert str(history.accuracy_matrix) == str(callbacks[2].accuracy_matrix)
        assert history.memory == callbacks[0].memory.summary()
        assert [one.experience_index for one in callbacks] == [3, 3, 3]
        assert list(history.breakdown) == ["training", "replay", "importance", "evaluation", "other"]
        assert min(history.breakdown.values()) > 0
        assert sum(history.breakdown.values()) == pytest.approx(history.seconds, abs=0.01)


@pytest.mark.parametrize(("limit", "steps"), [({"max_epochs": 2}, 6), ({"max_steps": 4}, 4)])
def test_limits_hold_for_each_update(limit: dict[str, int], steps: int) -> None:
    module = Plain()
    ContinualTrainer(**limit, **SETTINGS).fit_stream(module, plain_stream(), batches_of)
    assert module.steps == [steps, steps, steps]


def test_the_schedule_warms_up_again_at_each_update(bert: str) -> None:
    class Rates(pl.Callback):
        across_experiences = True

        def __init__(self) -> None:
            self.seen: list[list[float]] = []

        def on_fit_start(self, *_: Any) -> None:
            self.seen.append([])

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            self.seen[-1].append(optimizer.param_groups[0]["lr"])
            assert optimizer.state == {} or len(self.seen[-1]) > 1  # the optimizer starts anew, too

    rates = Rates()
    module = small_bert(bert, warmup_ratio=0.25)
    trainer = ContinualTrainer(max_epochs=4, callbacks=[rates], **SETTINGS)
    trainer.fit_stream(module, texts_stream(), batch_size=6, max_length=16)
    factors = [1 / 3, 2 / 3, *(1 - i / 6 for i in range(6))]
    assert rates.seen == [pytest.approx([1e-3 * factor for factor in factors])] * 3


def test_callbacks_that_judge_one_fit_start_anew(tmp_path: Path) -> None:
    module = Plain()
    stopping = EarlyStopping("constant", patience=2, check_on_train_epoch_end=True)
    checkpoint = ModelCheckpoint(tmp_path, monitor="loss", filename="{epoch}-{step}", save_on_train_epoch_end=True)
    trainer = ContinualTrainer(
        max_epochs=9, callbacks=[stopping, checkpoint], **(SETTINGS | {"enable_checkpointing": True})
    )
    trainer.fit_stream(module, plain_stream(), batches_of)
    assert module.steps == [9, 9, 9]  # three epochs: the best and two without an improvement
    last = trainer.checkpoint_callback
    assert isinstance(last, ModelCheckpoint)
    assert last is not checkpoint
    assert Path(last.best_model_path).is_file()
    assert last.best_model_score == pytest.approx(min(module.losses[20::3]))
    assert len(list(tmp_path.glob("*.ckpt"))) == 3  # the best of each update


def test_a_strategy_object_serves_all_updates() -> None:
    strategy = SingleDeviceStrategy(torch.device("cpu"))
    module, same = Plain(), Plain()
    history = ContinualTrainer(max_epochs=1, strategy=strategy, **SETTINGS).fit_stream(
        module, plain_stream(), batches_of
    )
    check_history(history, ["part 0", "part 1", "part 2"])
    ContinualTrainer(max_epochs=1, strategy="auto", **SETTINGS).fit_stream(same, plain_stream(), batches_of)
    assert_same_weights(module, same)


def learn_under_deepspeed() -> list[list[float]]:
    """On one rank: the weights after a stream under ZeRO, the strategy given as an object and by name."""
    from evertune.strategies import EvertuneDeepSpeedStrategy

    found = []
    for strategy in (EvertuneDeepSpeedStrategy(stage=2), "evertune_deepspeed_stage_2", "auto"):
        module = Plain()
        settings: dict[str, Any] = SETTINGS | {"strategy": strategy, "devices": 1}
        trainer = ContinualTrainer(max_epochs=1, callbacks=[Replay(memory_size=6), EWC(1.0)], **settings)
        trainer.fit_stream(module, plain_stream(), batches_of)
        found.append(torch.cat([p.detach().flatten() for p in module.parameters()]).tolist())
    return found


def test_a_deepspeed_strategy_serves_all_updates() -> None:
    [(given, named, without)] = run_ranks("tests.training.test_trainer:learn_under_deepspeed", 1)
    assert given == named
    assert named == pytest.approx(without, rel=1e-5, abs=1e-6)


def test_evaluate_on_scores_all_after_every_update() -> None:
    stream = plain_stream()
    history = ContinualTrainer(max_epochs=2, **SETTINGS).fit_stream(Plain(), stream[:2], batches_of, evaluate_on=stream)
    assert history.experiences == ["part 0", "part 1", "part 2"]
    assert len(history.accuracy_matrix) == 2
    assert all(0 <= score <= 1 for row in history.accuracy_matrix for score in row)


def test_evaluate_on_leaves_open_what_a_growing_head_has_no_class_for(bert: str) -> None:
    stream = texts_stream()
    history = ContinualTrainer(max_epochs=1, **SETTINGS).fit_stream(small_bert(bert), stream, evaluate_on=stream)
    check_history(history, ["business", "sport", "politics"])
    whole = small_bert(bert, classes=stream.classes)
    history = ContinualTrainer(max_epochs=1, **SETTINGS).fit_stream(whole, stream[:1], evaluate_on=stream)
    assert not any(math.isnan(score) for score in history.accuracy_matrix[0])


def test_a_stream_datamodule_makes_its_own_batches(bert: str, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    rows = [{"text": text, "label": name} for name, texts in TEXTS.items() for text in texts * 4]
    source.write_text("\n".join(map(json.dumps, rows)))
    data = StreamDataModule(str(source), "class_incremental", n_experiences=3, batch_size=4, max_length=16)
    history = ContinualTrainer(max_epochs=1, **SETTINGS).fit_stream(small_bert(bert), data)
    check_history(history, [experience.name for experience in data.stream])


def test_a_fit_that_fails_consolidates_nothing_and_the_rest_can_follow() -> None:
    module = Plain(fail_at=4)  # in the second experience of three steps each
    replay, _, evaluation = callbacks = methods()
    trainer = ContinualTrainer(max_epochs=1, callbacks=callbacks, **SETTINGS)
    stream = plain_stream()
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.fit_stream(module, stream, batches_of)
    assert module.steps == [3, 1]
    assert {id.split(":")[0] for id in replay.memory.ids} == {"0"}
    assert [one.experience_index for one in callbacks] == [1, 1, 1]
    assert len(evaluation.accuracy_matrix) == 1
    assert trainer.experience is None

    module.fail_at = None
    history = trainer.fit_stream(module, stream[1:], batches_of)
    assert module.steps == [3, 1, 3, 3]
    check_history(history, ["part 0", "part 1", "part 2"])


def test_a_second_stream_goes_on() -> None:
    one, two = Plain(), Plain()
    stream = plain_stream()
    at_once = ContinualTrainer(max_epochs=1, callbacks=methods(), **SETTINGS)
    at_once.fit_stream(one, stream, batches_of)
    in_parts = ContinualTrainer(max_epochs=1, callbacks=methods(), **SETTINGS)
    in_parts.fit_stream(two, stream[:1], batches_of)
    history = in_parts.fit_stream(two, stream[1:], batches_of)
    assert two.steps == [3, 3, 3]
    assert_same_weights(one, two)
    check_history(history, ["part 0", "part 1", "part 2"])


def test_streams_that_cannot_be_learnt_are_refused_before_training() -> None:
    module = Plain()
    trainer = ContinualTrainer(max_epochs=1, **SETTINGS)
    with pytest.raises(ValueError, match="the stream is empty: there is nothing to learn"):
        trainer.fit_stream(module, [])
    with pytest.raises(ValueError, match="batch_size would be ignored: the datamodule makes the batches"):
        trainer.fit_stream(module, plain_stream(), batches_of, batch_size=8)
    stream = [plain_stream()[0], Experience("blind", points((2, 3), 8, 1))]
    with pytest.raises(ValueError, match="experience 'blind' has neither test nor validation data to score it on"):
        trainer.fit_stream(module, stream, batches_of)
    assert module.steps == []
    with_val = [stream[0], Experience("seeing", points((2, 3), 8, 1), val=points((2, 3), 6, 2))]
    check_history(trainer.fit_stream(module, with_val, batches_of), ["part 0", "seeing"])
