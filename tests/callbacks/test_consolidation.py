"""The end of an experience: one step for all callbacks, with the final weights, and of what was trained on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

from evertune import ContinualTrainer
from evertune._lightning import ModelCheckpoint, pl
from evertune.callbacks import EWC, ContinualCallback, ContinualEvaluation, DriftTrigger, Replay
from evertune.drift import MMD
from evertune.importance.fisher import IndexedBatch
from evertune.streams import Experience
from tests.helpers.distributed import run_ranks
from tests.helpers.quiet import QUIET

SETTINGS = {**QUIET, "accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0, "max_epochs": 1}


class Net(pl.LightningModule):
    """The first feature names the example and is not looked at."""

    def __init__(self, stop_at: int | None = None, skip_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.stop_at, self.skip_at = nn.Linear(8, 4), stop_at, skip_at
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], 1))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == self.skip_at else None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += batch[0][:, 0].int().tolist()
        if batch_idx == self.stop_at:
            self.trainer.should_stop = True
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def examples(tag: int, n: int = 16) -> TensorDataset:
    """Examples named ``1000 * tag`` and following."""
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(tag))
    x[:, 0] = tag * 1000 + torch.arange(n)
    return TensorDataset(x, torch.arange(n) % 2)


def loader(tag: int, n: int = 16, **settings: Any) -> DataLoader[Any]:
    return DataLoader(examples(tag, n), batch_size=4, **settings)


def fit(net: Net, data: Any, *callbacks: Any, ckpt: Path | None = None, val: Any = None, **settings: Any) -> pl.Trainer:
    trainer = pl.Trainer(callbacks=list(callbacks), **(SETTINGS | settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer.fit(net, data, val, ckpt_path=ckpt)
    return trainer


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def kept(replay: Replay) -> set[int]:
    """The names of the examples in the memory."""
    return {int(replay.memory[slot][0][0]) for slot in range(len(replay.memory))}


class Examined(EWC):
    """Notes the examples on which the importance is estimated."""

    def estimate(self, trainer: Any, module: Any, shards: Any) -> list[Tensor]:
        batches: list[IndexedBatch] = list(self._examples.batches(trainer, self.n_examples))
        self.names = {
            int(x[0]) for one in batches for x, index in zip(one.batch[0], one.indices, strict=True) if index >= 0
        }
        return super().estimate(trainer, module, shards)


# --- the final weights


def averaging(name: str) -> pl.Callback:
    if name == "StochasticWeightAveraging":
        return pl.callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    return getattr(pl.callbacks, name)()


AVERAGING = ["StochasticWeightAveraging", "WeightAveraging", "EMAWeightAveraging"]


@pytest.mark.parametrize("name", AVERAGING)
@pytest.mark.parametrize("first", [True, False])
def test_the_anchor_is_the_weights_with_which_the_fit_ends(name: str, first: bool, tmp_path: Path) -> None:
    ewc, net = EWC(1.0, n_examples=8), Net()
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    others = [averaging(name), checkpoint]
    fit(net, loader(1), *([ewc, *others] if first else [*others, ewc]), max_epochs=3, enable_checkpointing=True)
    assert torch.equal(torch.cat(ewc.tensors["anchor"]), weights(net))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["layer.weight"], net.layer.weight)
    assert torch.equal(saved["callbacks"]["EWC"]["tensors"]["anchor"]["layer.weight"], net.layer.weight.flatten())


class Moved(pl.Callback):
    """How far each fit moves the weights."""

    across_experiences = True

    def __init__(self) -> None:
        self.distances: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.before = weights(pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.distances.append(float((weights(pl_module) - self.before).norm()))


def stream(n: int = 3) -> list[Experience]:
    return [Experience(f"part {tag}", examples(tag), test=examples(tag)) for tag in range(1, n + 1)]


class Data(pl.LightningDataModule):
    def __init__(self, experience: Experience) -> None:
        super().__init__()
        self.experience = experience

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.experience.train, batch_size=4)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.experience.test, batch_size=4)


@pytest.mark.parametrize("name", AVERAGING)
def test_every_experience_of_a_stream_is_learned_beside_callbacks_that_average(name: str) -> None:
    moved = Moved()
    trainer = ContinualTrainer(callbacks=[averaging(name), moved], **(SETTINGS | {"max_epochs": 3}))
    trainer.fit_stream(Net(), stream(), Data)
    assert len(moved.distances) == 3
    assert min(moved.distances) > 0.5 * max(moved.distances)


class Counts(pl.Callback):
    """Collects over fits."""

    def __init__(self) -> None:
        self.fits = 0

    def on_fit_start(self, *_: Any) -> None:
        self.fits += 1


class Locked(pl.Callback):
    def __deepcopy__(self, memo: Any) -> Locked:
        raise TypeError("cannot pickle '_thread.lock' object")


def test_a_callback_is_copied_for_each_experience_unless_it_says_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    copied, one, mine = Counts(), Counts(), [Replay(8)]
    one.across_experiences = True  # type: ignore[attr-defined]
    given = [copied, one, *mine]
    ContinualTrainer(callbacks=given, **SETTINGS).fit_stream(Net(), stream(), Data)
    assert (copied.fits, one.fits, mine[0].experience_index) == (1, 3, 3)
    assert given == [copied, one, *mine]
    assert "its own copy of Counts; set across_experiences = True" in caplog.text
    with pytest.raises(TypeError, match=r"Locked cannot be copied for each experience .* across_experiences = True"):
        ContinualTrainer(callbacks=[Locked()], **SETTINGS)


# --- all or none


class Fails(ContinualCallback):
    """Fails at the end of the experience with this number, once."""

    def __init__(self, at: int) -> None:
        self.at, self.state = at, {"values": [0], "tensor": torch.zeros(1)}

    def on_experience_end(self, trainer: Any, module: Any) -> None:
        self.state["values"].append(1)
        self.state["tensor"] += 1
        if self.experience_index == self.at:
            self.at = -1
            Fails.failed = True
            raise RuntimeError("no space left on the device")

    keeps_nothing = True
    failed = False


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("at", [0, 1])
def test_if_one_cannot_consolidate_none_does(first: bool, at: int) -> None:
    replay, ewc, evaluation = methods = Replay(40), EWC(1.0, n_examples=8), ContinualEvaluation()
    net, fails = Net(), Fails(at)
    callbacks = [fails, *methods] if first else [*methods, fails]
    for tag in range(at):
        fit(net, loader(tag), *callbacks, val=loader(tag))
    before = [one.undo_point() for one in methods], replay.memory.ids, ewc.tensors, evaluation.accuracy_matrix
    with pytest.raises(RuntimeError, match="no space left"):
        fit(net, loader(7), *callbacks, val=loader(7))
    assert [one.experience_index for one in callbacks] == [at] * 4
    assert (replay.memory.ids, ewc.tensors, evaluation.accuracy_matrix) == before[1:]
    assert fails.state == {"values": [0] + [1] * at, "tensor": torch.tensor([float(at)])}
    fails.at = -1
    fit(net, loader(7), *callbacks, val=loader(7))  # the rerun counts its examples once
    assert [one.experience_index for one in callbacks] == [at + 1] * 4
    assert len(replay.memory) == 16 * (at + 1)
    assert len(evaluation.accuracy_matrix) == at + 1
    assert kept(replay) == {tag * 1000 + i for tag in (*range(at), 7) for i in range(16)}


# --- what is trained on


class Endless(IterableDataset[Any]):
    def __init__(self, tag: int) -> None:
        self.tag = tag

    def __iter__(self) -> Any:
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for name in range(self.tag * 1000 + first, self.tag * 1000 + 400, step):
            yield torch.cat([torch.tensor([float(name)]), torch.randn(7)]), name % 2


PARTIAL: dict[str, dict[str, Any]] = {
    "whole": {},
    "limit": {"limit_train_batches": 3},
    "share": {"limit_train_batches": 0.5, "max_epochs": 2},
    "steps": {"max_steps": 6, "max_epochs": -1},
    "accumulated": {"max_steps": 1, "max_epochs": -1, "accumulate_grad_batches": 3},
    "overfit": {"overfit_batches": 2, "max_epochs": 2},
}


WAYS = [(kind, name, 0) for kind in ("shuffled", "given") for name in (*PARTIAL, "stop", "skip")]
WAYS += [(kind, name, 0) for kind in ("drop_last", "sampled", "iterable") for name in ("whole", "limit", "stop")]
WAYS += [(kind, name, 2) for kind in ("shuffled", "given") for name in ("whole", "steps", "stop")]


@pytest.mark.parametrize(("kind", "name", "workers"), WAYS)
def test_what_is_consolidated_is_what_was_trained_on(kind: str, name: str, workers: int) -> None:
    settings = PARTIAL.get(name, {})
    net = Net(stop_at=2 if name == "stop" else None, skip_at=2 if name == "skip" else None)
    more: dict[str, Any] = {"num_workers": workers}
    if kind == "shuffled":
        more |= {"shuffle": True, "generator": torch.Generator().manual_seed(3)}
    elif kind == "drop_last":
        more |= {"shuffle": True, "drop_last": True}
    elif kind == "sampled":
        more["sampler"] = RandomSampler(range(18), replacement=True, num_samples=12)
    elif kind == "given":
        more["sampler"] = torch.utils.data.SubsetRandomSampler(range(10))
    data = DataLoader(Endless(1), batch_size=4) if kind == "iterable" else loader(1, 18, **more)
    if kind == "iterable" and not settings and name == "whole":
        settings = {"limit_train_batches": 10}
    replay, ewc = Replay(2000), Examined(1.0, n_examples=2000, batch_size=4)
    fit(net, data, replay, ewc, **settings)
    assert net.seen
    assert kept(replay) == ewc.names == set(net.seen)
    assert len(replay.memory) == len(set(net.seen))


class Chunks(pl.LightningDataModule):
    """Other data in every epoch."""

    def __init__(self, workers: int) -> None:
        super().__init__()
        self.n, self.workers = 0, workers

    def train_dataloader(self) -> DataLoader[Any]:
        self.n += 1
        return loader(self.n, num_workers=self.workers)


@pytest.mark.parametrize(
    ("settings", "workers"), [({}, 0), ({"limit_train_batches": 2}, 0), ({"max_steps": 10, "max_epochs": -1}, 1)]
)
def test_chunks_that_lightning_reloads_are_all_kept(settings: dict[str, Any], workers: int) -> None:
    net, replay, ewc = Net(), Replay(2000), Examined(1.0, n_examples=2000)
    settings = {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1} | settings
    fit(net, Chunks(workers), replay, ewc, **settings)
    assert {name // 1000 for name in net.seen} == {1, 2, 3}
    assert kept(replay) == ewc.names == set(net.seen)


def trained_on_ranks(**settings: Any) -> dict[str, list[int]]:
    net, replay, ewc = Net(), Replay(2000), Examined(1.0, n_examples=2000, batch_size=4)
    fit(net, loader(1, 40, shuffle=True, num_workers=1), replay, ewc, strategy="ddp", **({"devices": 2} | settings))
    return {"seen": net.seen, "kept": sorted(kept(replay)), "names": sorted(ewc.names)}


@pytest.mark.parametrize("settings", [{"limit_train_batches": 3}, {"max_steps": 3, "max_epochs": -1}])
def test_what_is_consolidated_is_what_any_rank_trained_on(settings: dict[str, Any]) -> None:
    first, second = run_ranks("tests.callbacks.test_consolidation:trained_on_ranks", 2, **settings)
    seen = {*first["seen"], *second["seen"]}
    assert 0 < len(seen) < 40
    assert set(first["kept"]) == set(second["kept"]) == seen
    assert {*first["names"], *second["names"]} == seen


def test_a_resumed_fit_knows_what_was_trained_on_before(tmp_path: Path) -> None:
    first, second, replays, ewcs = Net(), Net(), (Replay(99), Replay(99)), (Examined(1.0), Examined(1.0))
    data = [loader(1, 40, shuffle=True, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    fit(first, data[0], replays[0], ewcs[0], checkpoint, limit_train_batches=4, enable_checkpointing=True)
    fit(second, data[1], replays[1], ewcs[1], ckpt=tmp_path / "step=3.ckpt", limit_train_batches=4)
    seen = {*first.seen[:12], *second.seen}
    assert len(second.seen) == 4
    assert kept(replays[1]) == ewcs[1].names == seen


def test_fast_dev_run_leaves_no_trace() -> None:
    methods = Replay(40), EWC(1.0, n_examples=8), ContinualEvaluation(), DriftTrigger(MMD(), lambda b: b[0][:, 1:])
    replay, ewc, evaluation, trigger = methods
    trainer = fit(Net(), loader(1), *methods, val=loader(1), fast_dev_run=2)
    assert "average_accuracy" in trainer.callback_metrics  # the end of an experience is tried
    assert [one.experience_index for one in methods] == [0, 0, 0, 0]
    assert (len(replay.memory), ewc.has_state, evaluation.accuracy_matrix) == (0, False, [])
    assert (evaluation.experiences, trigger.history, trigger.schema_errors) == ([], [], {})
    net = Net()
    fit(net, loader(2), *methods, val=loader(2))
    fit(net, loader(3), *methods, val=loader(3))
    before = replay.memory.ids, ewc.tensors
    fit(net, loader(4), *methods, val=loader(4), fast_dev_run=True)
    assert (replay.memory.ids, ewc.tensors) == before
    assert kept(replay) == {tag * 1000 + i for tag in (2, 3) for i in range(16)}


def test_fast_dev_run_of_a_stream_tries_everything_and_leaves_no_trace(tmp_path: Path) -> None:
    replay, ewc, net = Replay(40), EWC(1.0, n_examples=8), Net()
    trainer = ContinualTrainer(callbacks=[replay, ewc], fast_dev_run=2, **SETTINGS)
    history = trainer.fit_stream(net, stream(), Data, run_dir=tmp_path / "run")
    assert len(history.accuracy_matrix) == 3
    assert net.seen[8:12] == [2000, 2001, 2002, 2003] and {name // 1000 for name in net.seen[12:16]} == {1}
    assert (len(replay.memory), replay.experience_index, ewc.has_state) == (0, 0, False)
    assert not (tmp_path / "run").exists()
    fit(Net(), loader(9), replay, ewc)
    assert kept(replay) == {9000 + i for i in range(16)}


# --- the checkpoints of ModelCheckpoint


@pytest.mark.parametrize(
    "how",
    [
        {"save_last": True},
        {"save_last": "link"},
        {"monitor": "loss", "save_last": True, "save_top_k": 2},
        {"every_n_train_steps": 1},
        {"monitor": "loss", "save_top_k": -1},
    ],
    ids=lambda how: "-".join(map(str, how)),
)
@pytest.mark.parametrize("iterable", [False, True])
def test_the_next_data_can_start_from_the_last_checkpoint_of_a_fit(
    how: dict[str, Any], iterable: bool, tmp_path: Path
) -> None:
    def data(tag: int) -> DataLoader[Any]:
        return DataLoader(list(examples(tag)), batch_size=4) if not iterable else DataLoader(Some(tag), batch_size=4)

    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}-{step}", **how)
    net, replay, ewc = Net(), Replay(100), EWC(1.0, n_examples=8)
    fit(net, data(1), replay, ewc, checkpoint, max_epochs=2, enable_checkpointing=True)
    paths = {checkpoint.last_model_path or checkpoint.best_model_path} | {str(p) for p in tmp_path.glob("*step=8.ckpt")}
    for path in paths:
        following, again, held = Net(), Replay(100), EWC(1.0, n_examples=8)
        fit(following, data(2), again, held, max_epochs=3, ckpt=Path(path))
        assert len(following.seen) == 32
        assert {name // 1000 for name in following.seen[4:8]} == {1}  # the first epoch is replayed
        assert (again.experience_index, held.experience_index) == (2, 2)
        assert kept(again) == {tag * 1000 + i for tag in (1, 2) for i in range(16)}
        alone = Net()
        alone.load_state_dict(net.state_dict())
        fit(alone, data(2), replay, ewc)
        assert torch.equal(weights(alone), weights(following))
        replay.load_state_dict(torch.load(path, weights_only=True)["callbacks"]["Replay"])
        ewc.load_state_dict(torch.load(path, weights_only=True)["callbacks"]["EWC"])


class Some(IterableDataset[Any]):
    def __init__(self, tag: int) -> None:
        self.tag = tag

    def __iter__(self) -> Any:
        yield from examples(self.tag)


def test_a_fit_that_resumes_a_complete_one_says_that_it_trains_nothing(tmp_path: Path) -> None:
    fit(Net(), loader(1), Replay(9), ModelCheckpoint(tmp_path, save_last=True), enable_checkpointing=True)
    trainer = pl.Trainer(callbacks=[Replay(9), EWC(1.0)], **SETTINGS)
    with pytest.warns(UserWarning, match=r"nothing was trained or consolidated: .*last.ckpt was complete") as caught:
        trainer.fit(Net(), loader(2), ckpt_path=tmp_path / "last.ckpt")
    assert len([one for one in caught if "nothing was trained" in str(one.message)]) == 1


def test_other_data_than_those_of_an_unfinished_fit_are_noticed(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(Net(), loader(1), Replay(99), EWC(1.0), checkpoint, max_epochs=2, enable_checkpointing=True)
    trainer = pl.Trainer(callbacks=[Replay(99), EWC(1.0)], **(SETTINGS | {"max_epochs": 3}))
    with pytest.warns(UserWarning, match=r"the middle of a fit, on other data .* had 16 examples, .* has 20"):
        trainer.fit(Net(), loader(2, 20), ckpt_path=tmp_path / "epoch=0.ckpt")


def test_a_checkpoint_that_cannot_be_written_again_consolidates_nothing(tmp_path: Path) -> None:
    class Full(pl.Callback):
        saved = False

        def on_save_checkpoint(self, *_: Any) -> None:
            if self.saved:
                raise OSError("no space left")
            self.saved = True

    replay, net = Replay(99), Net()
    with pytest.raises(OSError, match="no space left"):
        fit(net, loader(1), replay, Full(), ModelCheckpoint(tmp_path), enable_checkpointing=True)
    assert (replay.experience_index, len(replay.memory)) == (0, 0)
