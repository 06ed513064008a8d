"""Examples of about the same length are replayed beside the new ones, which are batched by length."""

from collections import Counter
from itertools import chain, permutations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from evertune._lightning import pl
from evertune.callbacks.replay.callback import Replay
from evertune.callbacks.replay.collate import ReplayCollate, Schedule
from evertune.callbacks.replay.lengths import StepLengths
from evertune.memory import ReplayMemory
from evertune.streams import BucketSampler, ResumableLoader
from evertune.tasks.texts import PadCollator
from tests.callbacks.test_replay import Save, trainer


class Texts(torch.utils.data.Dataset):
    """Tokenised texts whose first token names them; lengths as in mixed short texts, at most 128 tokens."""

    def __init__(self, first, n, seed):
        generator = np.random.default_rng(seed)
        short = generator.random(n) < 0.45
        self.lengths = np.where(short, generator.normal(11, 3.5, n), generator.lognormal(3.1, 0.5, n)).clip(3, 128)
        self.lengths, self.first = self.lengths.astype(int), first

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        return {"input_ids": torch.full((self.lengths[index],), self.first + index), "labels": f"{index % 7}"}


def memory_of(n=600, seed=1, policy="reservoir"):
    memory = ReplayMemory(n, policy)
    memory.update(Texts(10_000, 2 * n, seed), "past", labels=lambda example: example["labels"])
    return memory


def names(batch):
    return batch["input_ids"][:, 0].tolist()


def epochs_of(memory, data, *, n_epochs=1, batch_size=16, world=1, accumulated=1, limit=None, ratio=1.0, alike=True):
    """The batches of some epochs, ``[epoch][batch][rank]``."""
    schedules, loaders = [Schedule() for _ in range(world)], []
    for rank, schedule in enumerate(schedules):
        step_size = batch_size * world * accumulated
        sampler = BucketSampler(data, step_size, data.lengths, num_replicas=world, rank=rank)
        n_batches = limit or len(sampler) // batch_size
        first = lambda schedule=schedule: schedule.iterator()[1]  # noqa: E731
        collate = ReplayCollate(
            PadCollator(0),
            schedule=schedule,
            directory=memory.directory,
            batch_size=batch_size,
            ratio=ratio,
            rank=rank,
            world_size=world,
            capture=None,
            lengths=StepLengths(sampler, batch_size, n_batches, first) if alike else None,
        )
        loaders.append(DataLoader(data, batch_size, sampler=sampler, collate_fn=collate))
        schedule.start_update(0, update=1, generation=memory.generation)
    epochs = []
    for epoch in range(n_epochs):
        for schedule, loader in zip(schedules, loaders, strict=True):
            schedule.start_iterator(epoch * n_batches)
            loader.sampler.set_epoch(epoch)
        epochs.append([one for one, _ in zip(zip(*loaders, strict=True), range(n_batches), strict=False)])
    return epochs


def share_of_real_tokens(epochs):
    masks = [batch["attention_mask"] for epoch in epochs for ranks in epoch for batch in ranks]
    return sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)


def test_replay_keeps_the_batches_of_one_length():
    memory, data = memory_of(), Texts(0, 3000, seed=0)
    assert share_of_real_tokens(epochs_of(memory, data, alike=False)) < 0.55
    assert share_of_real_tokens(epochs_of(memory, data)) > 0.85


def test_every_example_is_replayed_equally_often_and_batches_differ():
    memory, data = memory_of(), Texts(0, 1500, seed=0)
    epochs = epochs_of(memory, data, n_epochs=3)
    draws = [name for epoch in epochs for (batch,) in epoch for name in names(batch)[16:]]
    kept = {memory[slot]["input_ids"][0].item() for slot in range(600)}
    for start in range(0, len(draws) - 600, 600):  # one pass
        assert set(draws[start : start + 600]) == kept
    # What an example meets changes from epoch to epoch: other new ones, and others of the past.
    together = [{pair for (batch,) in epoch for pair in permutations(names(batch), 2)} for epoch in epochs]
    assert len(together[0] & together[1]) < 0.25 * len(together[0])


def test_the_classes_of_the_memory_stay_balanced():
    memory, data = memory_of(140, policy="class_balanced"), Texts(0, 1600, seed=0)
    draws = [label for (batch,) in epochs_of(memory, data)[0] for label in batch["labels"][16:]]
    for start in range(0, 1400, 140):
        assert set(Counter(draws[start : start + 140]).values()) == {20}


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_the_same_on_any_number_of_ranks_and_at_any_accumulation(ratio):
    memory, data = memory_of(100), Texts(0, 400, seed=0)

    def steps(batch_size, world, accumulated):
        epochs = epochs_of(
            memory, data, n_epochs=2, batch_size=batch_size, world=world, accumulated=accumulated, ratio=ratio
        )
        batches = [sorted(name for batch in ranks for name in names(batch)) for epoch in epochs for ranks in epoch]
        return [sorted(chain(*batches[i : i + accumulated])) for i in range(0, len(batches), accumulated)]

    one = steps(16, 1, 1)
    assert one == steps(4, 4, 1) == steps(4, 2, 2) == steps(4, 1, 4)


def test_an_epoch_cut_short_leaves_no_example_out():
    memory, data = memory_of(100), Texts(0, 640, seed=0)
    epochs = epochs_of(memory, data, n_epochs=4, limit=7)
    draws = [name for epoch in epochs for (batch,) in epoch for name in names(batch)[16:]]
    assert [len(set(draws[start : start + 100])) for start in range(0, 400, 100)] == [100] * 4


def test_a_memory_knows_the_lengths_of_tokenised_texts_only():
    memory = ReplayMemory(40)
    memory.update([{"input_ids": torch.ones(3, dtype=torch.int64), "labels": "a"}] * 39 + [("no", "tokens")], "past")
    assert memory.view.lengths is None
    with pytest.raises(ValueError, match="without a length"):
        memory.view.draw_alike(0, np.ones(4, dtype=np.int64), update=1)
    memory.update([{"input_ids": [1, 2, 3], "labels": "a"}] * 40, "past")
    assert memory.view.lengths.tolist() == [3] * 40


# ---- under Lightning


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(20_000, 2)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, names(batch), list(batch["input_ids"].shape)))
        return self.embedding(batch["input_ids"]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(pl.LightningDataModule):
    def __init__(self, first, n=320, **settings):
        super().__init__()
        self.texts, self.settings = Texts(first, n, seed=first), settings

    def train_dataloader(self):
        sampler = BucketSampler(self.texts, 16, self.texts.lengths)
        return ResumableLoader(self.texts, sampler=sampler, batch_size=16, collate_fn=PadCollator(0), **self.settings)


def learned():
    pl.seed_everything(0, verbose=False)
    replay, model = Replay(memory_size=100), Model()
    trainer(replay).fit(model, datamodule=Data(0))
    model.seen.clear()
    return replay, model


@pytest.mark.parametrize(
    ("workers", "limit"), [({"num_workers": 2}, 7), ({"num_workers": 1, "persistent_workers": True}, 1.0)]
)
def test_worker_processes_replay_the_same(workers, limit):
    seen = []
    for settings in ({}, workers):
        replay, model = learned()
        data = Data(5000, **settings)
        trainer(replay, max_epochs=3, limit_train_batches=limit).fit(model, datamodule=data)
        seen.append(model.seen)
    assert seen[0] == seen[1]


@pytest.mark.parametrize(("step", "workers"), [(5, 2), (20, 0), (27, 0)])
def test_resume_is_bit_exact(tmp_path, step, workers):
    replay, model = learned()
    data = Data(5000, num_workers=workers)
    trainer(replay, Save(tmp_path / "a.ckpt", step), max_epochs=2).fit(model, datamodule=data)
    resumed, twin = Replay(memory_size=100), Model()
    trainer(resumed, max_epochs=2).fit(twin, datamodule=Data(5000, num_workers=workers), ckpt_path=tmp_path / "a.ckpt")
    assert twin.seen == model.seen[step:]
    assert torch.equal(twin.embedding.weight, model.embedding.weight)
    assert resumed.memory.ids == replay.memory.ids


def test_the_loader_is_as_it_was():
    replay, model = learned()
    data = Data(5000)
    loader = data.train_dataloader()
    trainer(replay).fit(model, loader)
    assert loader.sampler.on_pass is None
