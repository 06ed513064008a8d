"""From an experience to batches: the order, the ranks, the resume, the padding."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from evertune._lightning import Callback, LightningArgumentParser, ModelCheckpoint, pl
from evertune.streams import BucketSampler, Experience, ExperienceDataModule, ResumableLoader, StreamDataModule
from evertune.tasks.texts import PadCollator
from tests.helpers.distributed import run_ranks
from tests.helpers.texts import TOKENIZER, make_tokenizer, text_rows

# ---- the order of the examples


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 200),
    step=st.sampled_from([4, 8, 24]),
    epoch=st.integers(0, 3),
    bucketed=st.booleans(),
    drop_last=st.booleans(),
)
def test_a_step_holds_the_same_examples_on_any_number_of_ranks(n, step, epoch, bucketed, drop_last):
    if drop_last and n < step:
        return
    lengths = np.random.default_rng(0).integers(1, 100, n) if bucketed else None

    def steps(world):
        ranks = []
        for rank in range(world):
            sampler = BucketSampler(range(n), step, lengths, num_replicas=world, rank=rank, seed=5, drop_last=drop_last)
            sampler.set_epoch(epoch)
            ranks.append(list(sampler))
            assert len(ranks[-1]) == len(sampler)
        share = step // world
        return [
            sorted(i for rank in ranks for i in rank[start : start + share]) for start in range(0, len(ranks[0]), share)
        ]

    one = steps(1)
    assert one == steps(2) == steps(4)
    assert {len(examples) for examples in one} == {step}
    seen = [i for examples in one for i in examples]
    if drop_last:
        assert len(set(seen)) == len(seen) == n - n % step
    else:
        assert set(seen) == set(range(n)) and len(seen) - n < step


@pytest.mark.parametrize("bucketed", [False, True])
def test_balanced_epochs_have_all_classes_equally_often_on_any_number_of_ranks(bucketed):
    classes = ["often"] * 90 + ["some"] * 20 + ["rare"] * 5
    lengths = np.random.default_rng(0).integers(1, 100, len(classes)) if bucketed else None

    def epoch_of(world, epoch):
        ranks = [
            BucketSampler(classes, 8, lengths, num_replicas=world, rank=rank, seed=3, classes=classes)
            for rank in range(world)
        ]
        for sampler in ranks:
            sampler.set_epoch(epoch)
        return np.stack([list(sampler) for sampler in ranks], 1).ravel()

    first = epoch_of(1, 0)
    assert (first == epoch_of(2, 0)).all() and (first == epoch_of(4, 0)).all()
    drawn = np.bincount(first, minlength=len(classes))
    assert [int(part.sum()) for part in np.split(drawn, [90, 110])] == [40, 40, 40]
    assert set(drawn[:90]) == {0, 1} and set(drawn[90:110]) == {2} and set(drawn[110:]) == {8}
    often = [set(epoch_of(1, epoch)[epoch_of(1, epoch) < 90]) for epoch in range(12)]
    assert often[0] != often[1] and set.union(*often) == set(range(90))  # what one epoch leaves out comes in another
    if bucketed:
        steps = lengths[first].reshape(-1, 8)
        assert np.ptp(steps, axis=1).mean() < np.ptp(lengths) / 4


def test_a_datamodule_balances_by_the_labels_of_its_task():
    rows = [{**row, "label": "rare" if number < 4 else "often"} for number, row in enumerate(text_rows(28))]
    experience = Experience("one", rows, classes=["often", "rare"])
    batches = ExperienceDataModule(experience, TOKENIZER, batch_size=7, balanced=True).train_dataloader()
    labels = [label for batch in batches for label in batch["labels"]]
    assert labels.count("often") == labels.count("rare") == 14
    plain = ExperienceDataModule(Experience("one", [torch.ones(2)] * 4, classes=[]), balanced=True)
    with pytest.raises(ValueError, match="example 0 of 'one' has none: leave it out"):
        plain.train_dataloader()


def test_epochs_differ_and_seeds_differ():
    def order(seed, epoch):
        sampler = BucketSampler(range(40), 4, list(range(40)), seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(one != other for i, one in enumerate(orders) for other in orders[:i])
    assert order(1, 1) == orders[3]


def test_bucketing_saves_padding():
    lengths = np.random.default_rng(0).integers(1, 128, 4000)

    def padded(sampler):
        batches = lengths[np.array(list(sampler)).reshape(-1, 32)]
        return (batches.max(axis=1) * 32).sum() / batches.sum()

    assert padded(BucketSampler(lengths, 32)) > 1.8
    assert padded(BucketSampler(lengths, 32, lengths)) < 1.05


def test_the_order_of_lengths_is_random():
    lengths = np.arange(3200)
    first = np.array(list(BucketSampler(lengths, 32, lengths))).reshape(-1, 32).mean(axis=1)
    rises = sum(one < other for one, other in pairwise(first))
    assert 30 < rises < 70


def test_sampler_refuses():
    with pytest.raises(ValueError, match="a positive multiple of the 2 ranks, got 5"):
        BucketSampler(range(10), 5, num_replicas=2)
    with pytest.raises(ValueError, match="10 examples do not fill one step of 32; lower the batch size"):
        BucketSampler(range(10), 32, drop_last=True)


def test_fewer_examples_than_a_step_are_repeated_evenly():
    assert sorted(BucketSampler(range(3), 8)) == sorted([0, 1, 2] * 2 + list(BucketSampler(range(3), 8).sequence()[6:]))


# ---- the loader, by itself


def loader_of(n=20, batch_size=4, **kwargs):
    return ResumableLoader(range(n), sampler=BucketSampler(range(n), batch_size), batch_size=batch_size, **kwargs)


def as_lists(loader):
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_resumes_with_the_next_batch(num_workers):
    whole = as_lists(loader_of())
    loader = loader_of(num_workers=num_workers)
    batches = iter(loader)
    assert [next(batches).tolist() for _ in range(2)] == whole[:2]
    state = loader.state_dict()
    assert state == {"epoch": 0, "batch": 2}
    other = loader_of(num_workers=num_workers)
    other.load_state_dict(state)
    assert as_lists(other) == whole[2:]
    assert as_lists(other) == whole  # the next pass is a whole one
    assert len(other) == 5


def test_a_finished_epoch_resumes_with_the_next():
    loader = loader_of()
    as_lists(loader)
    assert loader.state_dict() == {"epoch": 1, "batch": 0}
    other = loader_of()
    other.load_state_dict(loader.state_dict())
    loader.sampler.set_epoch(1)
    assert as_lists(other) == as_lists(loader)


def test_state_of_another_epoch_starts_a_whole_pass():
    loader = loader_of()
    loader.load_state_dict({"epoch": 0, "batch": 3})
    loader.sampler.set_epoch(1)
    assert len(as_lists(loader)) == 5


def test_loading_leaves_the_global_random_state_alone():
    datamodule = ExperienceDataModule(Experience("x", range(20), test=range(20)), batch_size=4)
    before = torch.get_rng_state()
    list(datamodule.train_dataloader()), list(datamodule.test_dataloader())
    assert torch.equal(before, torch.get_rng_state())


# ---- under Lightning


class Recorder(pl.LightningModule):
    """Knows nothing of evertune; writes down what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch.tolist()))
        return self.weight * batch.float().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(module, datamodule, ckpt_path=None, **settings):
    settings = {"logger": False, "enable_checkpointing": False, **settings}
    trainer = pl.Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
    return trainer


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("step", "limit"), [(2, 1.0), (5, 1.0), (7, 1.0), (6, 3)])
def test_a_fit_resumes_with_the_next_batch(step, limit, num_workers, tmp_path):
    def datamodule():
        return ExperienceDataModule(Experience("x", range(20)), batch_size=4, num_workers=num_workers)

    settings = {"max_epochs": 3, "limit_train_batches": limit, "devices": 1}
    undisturbed = Recorder()
    fit(undisturbed, datamodule(), **settings)
    killed, resumed = Recorder(), Recorder()
    save = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    with pytest.raises(SystemExit):
        fit(killed, datamodule(), callbacks=[save, StopAt(step)], enable_checkpointing=True, **settings)
    path = tmp_path / f"step={step}.ckpt"
    assert path.exists()
    fit(resumed, datamodule(), ckpt_path=path, **settings)
    assert [batch for _, _, batch in killed.seen] == [batch for _, _, batch in undisturbed.seen[:step]]
    assert resumed.seen == undisturbed.seen[step:]


def record_fit(batch_size, accumulate, devices, epochs=2):
    """What each training step of this rank was given, and that Lightning left the loader as it is."""
    module = Recorder()
    data = Experience("x", range(37), val=range(5))
    datamodule = ExperienceDataModule(data, batch_size=batch_size, seed=3)
    strategy = "ddp" if devices > 1 else "auto"
    trainer = fit(
        module, datamodule, max_epochs=epochs, accumulate_grad_batches=accumulate, devices=devices, strategy=strategy
    )
    loader = trainer.train_dataloader
    assert isinstance(loader, ResumableLoader) and isinstance(loader.sampler, BucketSampler)
    assert loader.sampler.num_replicas == devices and loader.batch_size == batch_size
    return [batch for _, _, batch in module.seen]


def steps_of(ranks, per_step):
    """The examples of each optimizer step, over all ranks and accumulated batches."""
    n_batches = len(ranks[0])
    assert {len(rank) for rank in ranks} == {n_batches} and n_batches % per_step == 0
    return [
        sorted(i for rank in ranks for batch in rank[start : start + per_step] for i in batch)
        for start in range(0, n_batches, per_step)
    ]


def test_ranks_share_the_steps_of_one_process():
    one = steps_of([record_fit(12, 1, 1)], 1)
    assert len(one) == 2 * 4 and {i for step in one[:4] for i in step} == set(range(37))
    assert steps_of([record_fit(4, 3, 1)], 3) == one
    ranks = run_ranks("tests.streams.test_batches:record_fit", 2, batch_size=2, accumulate=3, devices=2)
    assert steps_of(ranks, 3) == one


def test_overfit_batches_is_left_to_lightning():
    module = Recorder()
    fit(module, ExperienceDataModule(Experience("x", range(20)), batch_size=4), overfit_batches=2, max_epochs=2)
    assert [batch for _, _, batch in module.seen] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2


# ---- text


def test_text_becomes_padded_batches_with_the_names_of_labels():
    rows = text_rows(21)
    datamodule = ExperienceDataModule(Experience("x", rows, test=rows), TOKENIZER, batch_size=4, max_length=16)
    batches = list(datamodule.test_dataloader())
    assert [len(batch["labels"]) for batch in batches] == [21]
    assert batches[0]["labels"] == [row["label"] for row in rows]
    for batch in [*batches, *datamodule.train_dataloader()]:
        assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.dtype == mask.dtype == torch.int64 and ids.shape == mask.shape
        assert mask.sum(1).max() == ids.shape[1] <= 16
        assert torch.equal(mask, (ids != TOKENIZER.pad_token_id).long())
    expected = TOKENIZER([row["text"] for row in rows], truncation=True, max_length=16, padding=True)
    assert torch.equal(batches[0]["input_ids"], torch.tensor(expected["input_ids"]))


def test_evaluation_of_all_data_is_batched_by_length():
    class Lengths(Recorder):
        def validation_step(self, batch, batch_idx):
            self.seen += batch["attention_mask"].sum(1).tolist()

    rows = text_rows(40)
    data = ExperienceDataModule(Experience("x", rows, val=rows), TOKENIZER, eval_batch_size=8)
    in_order = [len(data.dataset("val")[i]["input_ids"]) for i in range(40)]
    seen = []
    for limit in (1.0, 2):
        module = Lengths()
        settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "limit_val_batches": limit}
        pl.Trainer(**settings).validate(module, datamodule=data, verbose=False)
        seen.append(module.seen)
    assert seen == [sorted(in_order, reverse=True), in_order[:16]]
    assert [n for batch in data.val_dataloader() for n in batch["attention_mask"].sum(1).tolist()] == in_order


def test_pairs_of_texts():
    rows = [{"q": "w1 w2", "a": "w3", "label": "yes"}]
    datamodule = ExperienceDataModule(Experience("x", rows), TOKENIZER, text=("q", "a"), batch_size=1)
    batch = next(iter(datamodule.train_dataloader()))
    assert batch["input_ids"].tolist() == [TOKENIZER("w1 w2", "w3")["input_ids"]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1]]


def test_multi_label_and_no_label():
    rows = [{"text": "w1", "label": ["a", "b"]}, {"text": "w2 w3", "label": []}]
    test = Experience("x", rows, test=rows)
    assert next(iter(ExperienceDataModule(test, TOKENIZER).test_dataloader()))["labels"] == [["a", "b"], []]
    assert "labels" not in next(iter(ExperienceDataModule(test, TOKENIZER, label=None).test_dataloader()))


def test_examples_are_tokens_with_names():
    datamodule = ExperienceDataModule(Experience("x", text_rows(3)), TOKENIZER, id_column="id")
    example = datamodule.dataset("train")[1]
    assert (example["labels"], example["id"]) == ("b", "row 1")
    assert set(example) == {"input_ids", "token_type_ids", "labels", "id"}
    assert example["input_ids"].ndim == 1 and example["input_ids"].dtype == torch.int64
    assert torch.equal(datamodule.dataset("train")[-1]["input_ids"], datamodule.dataset("train")[2]["input_ids"])
    with pytest.raises(IndexError):
        datamodule.dataset("train")[3]


def test_texts_are_tokenised_once():
    calls = []

    class Counting:
        pad_token_id, padding_side = 0, "right"

        def __call__(self, texts, **kwargs):
            calls.append(len(texts))
            return TOKENIZER(texts, **kwargs)

    datamodule = ExperienceDataModule(Experience("x", text_rows(1500), val=text_rows(10)), Counting())
    for _ in range(2):
        next(iter(datamodule.train_dataloader()))
        next(iter(datamodule.val_dataloader()))
    assert calls == [1000, 500, 10]


def test_padding_side_and_missing_padding_token():
    rows = [{"input_ids": torch.tensor([5, 6])}, {"input_ids": torch.tensor([7])}]
    batch = PadCollator(9, "left")(rows)
    assert batch["input_ids"].tolist() == [[5, 6], [9, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]
    experience = Experience("x", text_rows(2))
    assert ExperienceDataModule(experience, make_tokenizer(eos_token="[SEP]")).collate_fn.pad_token_id == 3
    with pytest.raises(ValueError, match="neither a padding nor an end token"):
        ExperienceDataModule(experience, make_tokenizer())


@pytest.mark.parametrize("name", ["batch_size", "eval_batch_size", "max_length"])
def test_sizes_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        ExperienceDataModule(Experience("x", text_rows(2)), **{name: 0})


def test_a_missing_column_is_named():
    datamodule = ExperienceDataModule(Experience("monday", text_rows(2)), TOKENIZER, label="intent")
    with pytest.raises(
        ValueError, match=r"experience 'monday': train has no column 'intent'; it has \['text', 'label'"
    ):
        datamodule.train_dataloader()


def test_splits_that_are_absent():
    datamodule = ExperienceDataModule(Experience("x", range(8)), batch_size=4)
    assert datamodule.val_dataloader() == [] and datamodule.test_dataloader() == []
    module = Recorder()
    fit(module, datamodule, max_epochs=1)
    assert len(module.seen) == 2


def test_own_collate_fn():
    datamodule = ExperienceDataModule(Experience("x", range(8), test=range(3)), batch_size=4, collate_fn=tuple)
    assert next(iter(datamodule.test_dataloader())) == (0, 1, 2)
    assert isinstance(datamodule.test_dataloader(), DataLoader)


# ---- the stream as a command line says it


def stream_file(path):
    rows = [{"text": f"w{i} w1", "label": f"class {i % 4}"} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_stream_datamodule(tmp_path):
    data = StreamDataModule(
        stream_file(tmp_path / "rows.jsonl"), "class_incremental", n_experiences=2, batch_size=4, max_length=3
    )
    assert data.stream is data.stream
    assert [len(experience.classes) for experience in data.stream] == [2, 2]
    batches = data.datamodule(data.stream[0], TOKENIZER)
    assert batches is data.datamodule(data.stream[0], TOKENIZER)
    assert batches is not data.datamodule(data.stream[1], TOKENIZER)
    batch = next(iter(batches.train_dataloader()))
    assert batch["input_ids"].shape == (4, 3) and set(batch["labels"]) <= set(data.stream[0].classes)


def test_stream_datamodule_refuses_settings_of_another_scenario():
    with pytest.raises(ValueError, match=r"period does not belong to data_incremental, which has \['n_experiences'\]"):
        StreamDataModule("x.csv", "data_incremental", n_experiences=2, period="year")
    with pytest.raises(ValueError, match=r"scenario must be one of .*got 'task_incremental'"):
        StreamDataModule("x.csv", "task_incremental")


def test_stream_datamodule_on_a_command_line(tmp_path):
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(StreamDataModule, "data")
    config = parser.parse_args(
        [
            f"--data.source={stream_file(tmp_path / 'rows.jsonl')}",
            "--data.scenario=class_incremental",
            "--data.classes_per_experience=[3,1]",
            "--data.splits=[0.5,0.25,0.25]",
            "--data.class_order=[class 3,class 2,class 1,class 0]",
        ]
    )
    stream = parser.instantiate_classes(config).data.stream
    assert [experience.name for experience in stream] == ["class 3+class 2+class 1", "class 0"]
    assert [len(data) for data in stream.joint().splits().values()] == [20, 10, 10]
