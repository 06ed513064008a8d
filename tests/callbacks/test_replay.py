"""Replay inside plain Lightning trainers: what is joined, what is kept, and that nothing else changes."""

import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SubsetRandomSampler, get_worker_info

from evertune._lightning import pl
from evertune.callbacks.base import ContinualCallback
from evertune.callbacks.consolidation import end_experience
from evertune.callbacks.replay.callback import Replay
from evertune.streams import Experience, ExperienceDataModule
from tests.helpers.distributed import run_ranks


class Vision(pl.LightningModule):
    """Knows nothing of evertune; batches are tuples (image, class)."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 6))
        self.seen = []  # the pixel that names the example, per batch

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        images, classes = batch
        assert isinstance(batch, list | tuple)
        self.seen.append([round(value, 1) for value in images[:, 0, 0, 0].tolist()])
        return nn.functional.cross_entropy(self(images), classes)

    def validation_step(self, batch, batch_idx):
        assert len(batch[0]) == 4

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def images(start, n=16):
    """Example ``i`` has the value ``i`` in its first pixel."""
    examples = []
    for number in range(start, start + n):
        image = torch.zeros(1, 4, 4)
        image[0, 0, 0] = number
        examples.append((image, number % 6))
    return examples


def loader(start, n=16, batch_size=4, **kwargs):
    return DataLoader(images(start, n), batch_size=batch_size, **kwargs)


def trainer(*callbacks, **kwargs):
    settings = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(callbacks=list(callbacks), **(settings | kwargs))


def module():
    pl.seed_everything(0, verbose=False)
    return Vision()


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_examples_of_the_past_join_every_batch():
    replay, model = Replay(memory_size=8), module()
    trainer(replay).fit(model, loader(0))
    assert model.seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    kept = {replay.memory[slot][0][0, 0, 0].item() for slot in range(8)}
    model.seen.clear()
    data = loader(100)
    trainer(replay, max_epochs=2).fit(model, data, loader(900, 8))
    assert [batch[:4] for batch in model.seen[:4]] == [list(range(s, s + 4)) for s in (100, 104, 108, 112)]
    assert [len(batch) for batch in model.seen] == [8] * 8
    past = [example for batch in model.seen for example in batch[4:]]
    for start in range(0, 32, 8):  # each example once in a pass
        assert set(past[start : start + 8]) == kept
    assert past[:8] != past[8:16]
    assert len(replay.memory) == 8
    assert not hasattr(data.collate_fn, "schedule")  # the loader is as it was
    assert set(replay.memory.summary()["per_experience"]) == {"0", "1"}


def test_without_a_past_training_is_as_before():
    plain = module()
    trainer(max_epochs=2).fit(plain, loader(0, shuffle=True))
    with_replay = module()
    trainer(Replay(8), max_epochs=2).fit(with_replay, loader(0, shuffle=True))
    assert plain.seen == with_replay.seen
    assert torch.equal(weights(plain), weights(with_replay))


@pytest.mark.parametrize("workers", [{"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
@pytest.mark.parametrize("limit", [1.0, 3])
def test_worker_processes_join_the_same_examples(workers, limit):
    seen = []
    for kwargs in ({}, workers):
        replay, model = Replay(memory_size=6), module()
        for start in (0, 100):
            trainer(replay, max_epochs=3, limit_train_batches=limit).fit(model, loader(start, **kwargs))
        seen.append(model.seen)
    assert seen[0] == seen[1]


def test_spawned_worker_processes_join_the_same_examples():
    seen = []
    for kwargs in ({}, {"num_workers": 1, "multiprocessing_context": "spawn"}):
        replay, model = Replay(memory_size=6), module()
        trainer(replay).fit(model, loader(0))
        trainer(replay).fit(model, loader(100, 8, **kwargs))
        seen.append(model.seen)
    assert seen[0] == seen[1]


@pytest.mark.parametrize(("ratio", "expected"), [(0.25, [1, 1, 1, 1]), (0.1, [0, 0, 1, 0]), (2.5, [10, 10, 10, 10])])
def test_replay_ratio(ratio, expected):
    replay, model = Replay(memory_size=8, replay_ratio=ratio), module()
    trainer(replay).fit(model, loader(0))
    model.seen.clear()
    trainer(replay).fit(model, loader(100))
    assert [len(batch) - 4 for batch in model.seen] == expected


class TextModule(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.embedding = nn.EmbeddingBag(50, 4)
        self.seen = []

    def training_step(self, batch, batch_idx):
        assert isinstance(batch, Padded)
        self.seen.append(batch.names)
        return self.embedding(batch.ids).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Padded:
    """A batch type of the user's own."""

    def __init__(self, examples):
        self.ids = nn.utils.rnn.pad_sequence([torch.tensor(e["input_ids"]) for e in examples], batch_first=True)
        self.names = [e["labels"] for e in examples]


class TextData(pl.LightningDataModule):
    def __init__(self, label, n=8):
        super().__init__()
        self.examples = [{"input_ids": list(range(1 + i % 5)), "labels": f"{label}{i}"} for i in range(n)]

    def train_dataloader(self):
        return DataLoader(self.examples, batch_size=4, collate_fn=Padded)


def test_padding_custom_batches_and_datamodules():
    replay, model = Replay(memory_size=5, policy="class_balanced"), TextModule()
    trainer(replay).fit(model, datamodule=TextData("a"))
    model.seen.clear()
    trainer(replay).fit(model, datamodule=TextData("b"))
    assert model.seen[0][:4] == ["b0", "b1", "b2", "b3"]
    assert len(model.seen[0]) == 8
    assert all(name.startswith("a") for name in model.seen[0][4:])
    assert len(set(replay.memory.labels)) == 5


def test_reloaded_loaders_replay_too():
    replay, model = Replay(memory_size=5), TextModule()
    trainer(replay).fit(model, datamodule=TextData("a"))
    model.seen.clear()
    trainer(replay, max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(model, datamodule=TextData("b"))
    past = [name for batch in model.seen for name in batch[4:]]
    assert len(past) == 24
    assert [len(set(past[start : start + 5])) for start in range(0, 20, 5)] == [5] * 4


def test_a_second_fit_of_one_trainer():
    replay, model = Replay(memory_size=8), module()
    one = trainer(replay)
    one.fit(model, loader(0, num_workers=1, persistent_workers=True))
    one.fit_loop.max_epochs = 3
    model.seen.clear()
    one.fit(model, loader(100, num_workers=1, persistent_workers=True))
    again, other = Replay(memory_size=8), module()
    trainer(again).fit(other, loader(0))
    other.seen.clear()
    trainer(again, max_epochs=2).fit(other, loader(100))
    assert model.seen == other.seen


class Numbers(IterableDataset):
    def __init__(self, start, n):
        self.start, self.n = start, n

    def __iter__(self):
        worker = get_worker_info()
        number, step = (worker.id, worker.num_workers) if worker else (0, 1)
        # unequal shares: the first worker stops early
        stop = self.n - 12 if worker and worker.id == 0 else self.n
        return iter(images(self.start, self.n)[number:stop:step])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("policy", ["reservoir", "ring"])
def test_iterable_data_is_kept_as_it_passes(workers, policy):
    replay, model = Replay(memory_size=6, policy=policy), module()
    for start in (0, 100):
        data = DataLoader(Numbers(start, 40), batch_size=4, num_workers=workers)
        trainer(replay, max_epochs=2).fit(model, data)
        passed = {v for batch in model.seen for v in batch[:4]}
        kept = {round(replay.memory[slot][0][0, 0, 0].item()) for slot in range(6)}
        assert len(kept) == 6
        assert kept <= passed
        if policy == "ring" and not workers:
            assert kept == set(range(start + 34, start + 40))
        if start == 100:
            assert {v for batch in model.seen[-3:] for v in batch[4:]} <= set(range(40))
    assert list(replay.memory.directory.glob("*.spool")) == []
    again = Replay(memory_size=6)
    again.memory.add(images(0, 40), "0")
    if policy == "reservoir" and not workers:
        first = Replay(memory_size=6)
        trainer(first).fit(module(), DataLoader(Numbers(0, 40), batch_size=4))
        assert set(first.memory.ids) == set(again.memory.ids)


@pytest.mark.parametrize("workers", [0, 2])
def test_only_what_was_trained_on_is_kept(workers):
    replay, model = Replay(memory_size=30), module()
    data = DataLoader(Numbers(0, 80), batch_size=4, num_workers=workers)
    trainer(replay, max_steps=5).fit(model, data)
    kept = {round(replay.memory[slot][0][0, 0, 0].item()) for slot in range(len(replay.memory))}
    assert kept == {v for batch in model.seen for v in batch}
    assert len(kept) == 20
    replay = Replay(memory_size=30)
    trainer(replay, limit_train_batches=3, max_epochs=2).fit(module(), data)
    assert len(replay.memory) == 12


def test_a_sampler_that_holds_examples_back_is_respected():
    replay = Replay(memory_size=30)
    trainer(replay).fit(module(), loader(0, sampler=SubsetRandomSampler(range(8))))
    assert {round(replay.memory[slot][0][0, 0, 0].item()) for slot in range(len(replay.memory))} == set(range(8))


class SplitAt(ContinualCallback):
    """Ends an experience before a batch, as a drift detector does."""

    splits_fit = True

    def __init__(self, batch, replay):
        self.batch, self.replay = batch, replay

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            end_experience([self.replay], trainer, pl_module)
            self.replay.on_experience_start(trainer, pl_module)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_experience_may_end_inside_a_fit(workers):
    replay, model = Replay(memory_size=8), module()
    trainer(replay, SplitAt(6, replay)).fit(model, loader(0, 80, num_workers=workers))
    ahead = 1 + workers * 2
    assert all(len(batch) == 4 for batch in model.seen[: 6 + ahead])
    assert all(len(batch) == 8 for batch in model.seen[6 + ahead :])
    assert all(v < 24 for batch in model.seen[6 + ahead :] for v in batch[4:])
    experiences = {round(replay.memory[s][0][0, 0, 0].item()): e for s, e in enumerate(replay.memory.view.experiences)}
    assert experiences == {v: "0" if v < 24 else "1" for v in experiences}
    assert set(experiences.values()) == {"0", "1"}
    assert replay.experience_index == 2


def test_herding_by_the_features_of_the_module():
    replay = Replay(memory_size=4, policy="herding", features=lambda module, batch: batch[0].flatten(1))
    model = module()
    trainer(replay).fit(model, DataLoader([(torch.full((1, 4, 4), float(i)), 0) for i in range(9)], batch_size=4))
    assert model.training
    assert len(replay.memory) == 4
    default = Replay(memory_size=4, policy="herding")
    trainer(default).fit(module(), loader(0))
    assert len(default.memory) == 4


def test_a_crash_consolidates_nothing():
    class Crash(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("power cut")

    replay, model = Replay(memory_size=8), module()
    trainer(replay).fit(model, loader(0))
    before = replay.memory.ids
    with pytest.raises(RuntimeError, match="power cut"):
        trainer(replay, Crash()).fit(model, loader(100))
    assert replay.memory.ids == before
    assert replay.experience_index == 1
    trainer(replay).fit(model, loader(100))
    assert len({id.split(":")[0] for id in replay.memory.ids}) == 2


class Save(pl.Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("iterable", [False, True])
def test_resume_is_bit_exact(tmp_path, iterable):
    """Killed after step 6 of 8 (in the second epoch) of the second experience."""

    def data(start):
        return DataLoader(Numbers(start, 16), batch_size=4) if iterable else loader(start, num_workers=1)

    replay, model = Replay(memory_size=6), module()
    trainer(replay).fit(model, data(0))
    model.seen.clear()
    trainer(replay, Save(tmp_path / "a.ckpt", 6), max_epochs=2).fit(model, data(100))

    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert checkpoint["callbacks"]["Replay"]["experience_index"] == 1
    resumed, twin = Replay(memory_size=6), module()
    if iterable:  # such data starts anew: hand it the rest, as a resumable loader would
        rest = DataLoader(Rest(images(108, 8)), batch_size=4)
        trainer(resumed, max_epochs=2).fit(twin, rest, ckpt_path=tmp_path / "a.ckpt")
        assert [b[4:] for b in twin.seen] == [b[4:] for b in model.seen[6:]]
    else:
        skipping = Skip(images(100), batch_size=4, shuffle=False)
        trainer(resumed, max_epochs=2).fit(twin, skipping, ckpt_path=tmp_path / "a.ckpt")
        assert twin.seen == model.seen[6:]
        assert torch.equal(weights(twin), weights(model))
    assert sorted(resumed.memory.ids) == sorted(replay.memory.ids)
    assert resumed.experience_index == replay.experience_index == 2


@pytest.mark.parametrize("step", [4, 8, 15, 22])
def test_resume_around_an_experience_that_ends_inside_the_fit_is_bit_exact(tmp_path, step):
    def data():
        return ExperienceDataModule(Experience("endless", images(100, 60)), batch_size=4, num_workers=2)

    replay, model = Replay(memory_size=6), module()
    trainer(replay).fit(model, loader(0))
    model.seen.clear()
    trainer(replay, SplitAt(6, replay), Save(tmp_path / "a.ckpt", step), max_epochs=2).fit(model, datamodule=data())
    resumed, twin = Replay(memory_size=6), module()
    split = SplitAt(6, resumed)
    trainer(resumed, split, max_epochs=2).fit(twin, datamodule=data(), ckpt_path=tmp_path / "a.ckpt")
    assert twin.seen == model.seen[step:]
    assert torch.equal(weights(twin), weights(model))
    assert resumed.memory.ids == replay.memory.ids
    assert resumed.experience_index == replay.experience_index


class Rest(IterableDataset):
    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        return iter(self.examples)


class Skip(DataLoader):
    """Resumable: starts its first pass at batch 2."""

    passed = False

    def __iter__(self):
        batches = super().__iter__()
        if self.passed:
            return batches
        # do not load what is skipped
        self.passed = True
        rest = DataLoader(self.dataset[8:], batch_size=4, collate_fn=self.collate_fn)
        return iter(rest)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_across_processes_through_a_checkpoint_and_a_folder(tmp_path):
    replay, model = Replay(memory_size=8), module()
    first = trainer(replay)
    first.fit(model, loader(0))
    first.save_checkpoint(tmp_path / "a.ckpt")
    replay.save(tmp_path / "kept")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["Replay"]
    runs = []
    for restore in ("object", "state", "folder"):
        each = Replay(memory_size=8)
        if restore == "state":
            each.load_state_dict(state)
        elif restore == "folder":
            each.load(tmp_path / "kept")
        else:
            each = replay
        model = module()
        trainer(each).fit(model, loader(100))
        runs.append((model.seen, each.memory.ids))
    assert runs[0] == runs[1] == runs[2]


def test_no_pickle(tmp_path):
    replay = Replay(memory_size=8)
    trainer(replay).fit(module(), loader(0))
    replay.save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".arrow"}
    (tmp_path / "memory.json").write_bytes(pickle.dumps(print))
    with pytest.raises(ValueError, match=r"memory.json is a pickle"):
        Replay(memory_size=8).load(tmp_path)
    (tmp_path / "replay.json").write_bytes(b"{")
    with pytest.raises(ValueError, match=r"replay.json is corrupt or truncated"):
        Replay(memory_size=8).load(tmp_path)


def test_forget_by_the_ids_of_the_data():
    replay = Replay(memory_size=50, id=lambda example: f"person {example[1]}-{example[0][0, 0, 0]:.0f}")
    trainer(replay).fit(module(), loader(0))
    assert replay.forget(["person 3-3", "person 3-9", "nobody"]) == 2
    assert len(replay.memory) == 14
    assert 3.0 not in [replay.memory[slot][0][0, 0, 0].item() for slot in range(14)]

    class Forget(pl.Callback):
        def on_train_batch_start(self, *_):
            replay.forget(["person 4-4"])

    with pytest.raises(RuntimeError, match="before or after fit"):
        trainer(replay, Forget()).fit(module(), loader(0))


def test_refuses_by_name_what_it_cannot_do():
    with pytest.raises(ValueError, match="memory_size must be positive, got 0"):
        Replay(memory_size=0)
    for ratio in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=f"replay_ratio must be finite and not negative, got {ratio}"):
            Replay(memory_size=1, replay_ratio=ratio)
    with pytest.raises(ValueError, match="two Replay callbacks in one Trainer"):
        trainer(Replay(1), _Second(1)).fit(module(), loader(0))
    with pytest.raises(TypeError, match="batch_size=None, which does not collate"):
        trainer(Replay(1)).fit(module(), DataLoader(images(0), batch_size=None))
    with pytest.raises(TypeError, match="needs a torch DataLoader to train on, got range"):
        trainer(Replay(1)).fit(module(), range(4))
    with pytest.raises(ValueError, match="several training loaders"):
        trainer(Replay(1)).fit(module(), {"a": loader(0), "b": loader(0)})
    with pytest.raises(ValueError, match="'class_balanced' needs the class of every example, and Replay finds none"):
        trainer(Replay(1, "class_balanced")).fit(module(), DataLoader([torch.zeros(1, 4, 4)] * 4))
    with pytest.raises(ValueError, match=r"label='topic' is not in an example, a dict with the keys \['text'\]"):
        trainer(Replay(1, label="topic")).fit(module(), DataLoader([{"text": "a"}] * 4))


class _Second(Replay):
    pass


@pytest.mark.parametrize("strategy", ["fsdp", "ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_refuses_strategies_by_name(strategy):
    replay = Replay(memory_size=1)
    if strategy == "fsdp":  # Lightning itself refuses to build this one without a GPU
        one = trainer(replay)
        one._accelerator_connector.strategy = pl.strategies.FSDPStrategy()
    else:
        one = trainer(replay, strategy=strategy, devices=2)
    with pytest.raises(ValueError, match=f"Replay does not support .*{strategy if strategy == 'fsdp' else 'launcher'}"):
        replay.setup(one, module(), "fit")


@pytest.mark.parametrize("workers", [0, 1])
def test_refuses_examples_it_cannot_join(workers):
    class Graph:
        pass

    message = r"cannot store example\[0\], a .*Graph; replay stores tensors"
    with pytest.raises(TypeError, match=message):
        trainer(Replay(1)).fit(module(), DataLoader([(Graph(), 0)] * 4, collate_fn=list, num_workers=workers))

    class Whole(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return torch.zeros(1, 4, 4), 0

        def __getitems__(self, indices):
            return {"images": torch.zeros(len(indices), 1, 4, 4)}

    with pytest.raises(TypeError, match="Replay cannot join examples to a dict: the dataset gave whole batches"):
        trainer(Replay(1)).fit(module(), DataLoader(Whole(), batch_size=4, num_workers=workers))


def test_examples_that_do_not_collate_together_are_explained():
    replay = Replay(memory_size=4)
    trainer(replay).fit(module(), loader(0))
    with pytest.raises(ValueError, match=r"its item \[0\] has the shape \[1, 4, 4\], theirs \[1, 5, 5\]"):
        trainer(replay).fit(module(), DataLoader([(torch.zeros(1, 5, 5), 0)] * 4, batch_size=4))

    def refuses(examples):
        assert len(examples) == 4, "only four"
        return torch.utils.data.default_collate(examples)

    with pytest.raises(AssertionError, match="only four") as caught:
        trainer(replay).fit(module(), loader(0, collate_fn=refuses))
    assert "Replay had joined 4 examples of the past to 4 new ones" in caught.value.__notes__[0]


# --- several processes


def stream(devices, batch_size, accumulate=1, policy="reservoir", iterable=False, workers=0):
    """Three experiences; what the memory holds and what this rank saw."""
    replay, model = Replay(memory_size=10, policy=policy), module()
    for start in (0, 100, 200):
        one = trainer(
            replay,
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            accumulate_grad_batches=accumulate,
            max_epochs=2,
        )
        data = images(start, 32)
        order = DistributedSampler(data, devices, one.global_rank, shuffle=False)
        if iterable:
            data, order = Rest(data[one.global_rank :: devices]), None
        one.fit(model, DataLoader(data, sampler=order, batch_size=batch_size, num_workers=workers))
    told = {
        "ids": replay.memory.ids,
        "seen": model.seen,
        "weights": weights(model).tolist(),
        "file": str(replay.memory.path(replay.memory.generation)),
        "erased": replay.forget(replay.memory.ids[:2]),
        "left": len(replay.memory),
    }
    if devices > 1:
        dist.barrier()  # the folder of the memory ends with rank 0's
    return told


CASES = {
    "reservoir": {},
    "workers": {"workers": 1},
    "class_balanced": {"policy": "class_balanced"},
    "herding": {"policy": "herding"},
    "iterable": {"iterable": True},
}


def streams(devices, batch_size):
    return {name: stream(devices, batch_size, **settings) for name, settings in CASES.items()}


@pytest.fixture(scope="module")
def one_rank():
    return streams(devices=1, batch_size=8)


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks("tests.callbacks.test_replay:streams", 2, devices=2, batch_size=4)


def past_per_step(ranks, n_new, accumulate=1):
    """The replayed examples of each optimizer step, over all ranks, in any order."""
    steps = range(0, len(ranks[0]["seen"]), accumulate)
    return [
        sorted(v for rank in ranks for batch in rank["seen"][step : step + accumulate] for v in batch[n_new:])
        for step in steps
    ]


@pytest.mark.parametrize("case", CASES)
def test_one_budget(one_rank, two_ranks, case):
    one, two = one_rank[case], [rank[case] for rank in two_ranks]
    assert len(set(one["ids"])) == 10
    assert two[0]["ids"] == two[1]["ids"]
    assert len(set(two[0]["ids"])) == 10
    assert two[0]["file"] == two[1]["file"]
    assert [(rank["erased"], rank["left"]) for rank in two] == [(2, 8), (2, 8)]
    assert two[0]["weights"] == two[1]["weights"]
    if case != "herding":  # features differ in the last digits
        assert sorted(one["ids"]) == sorted(two[0]["ids"])
        assert past_per_step([one], 8) == past_per_step(two, 4)
        assert torch.allclose(torch.tensor(one["weights"]), torch.tensor(two[0]["weights"]), rtol=1e-5, atol=1e-6)


def test_accumulated_batches_draw_what_one_large_batch_draws(one_rank):
    accumulated = stream(devices=1, batch_size=2, accumulate=4)
    assert past_per_step([accumulated], 2, accumulate=4) == past_per_step([one_rank["reservoir"]], 8)
    assert accumulated["ids"] == one_rank["reservoir"]["ids"]
