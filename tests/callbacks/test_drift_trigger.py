"""DriftTrigger: boundaries inside one fit, at the same step at any world size, accumulation and after a resume."""

import os
from collections import Counter
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from evertune._lightning import pl
from evertune.callbacks.base import ContinualCallback
from evertune.callbacks.drift_trigger import DriftTrigger
from evertune.callbacks.features import Features, deal, gathered
from evertune.drift import LSDD, MMD, ClassifierTest, Detector, KernelCUSUM, LabelShift, MarginalKS, PageHinkley
from evertune.training.evaluation import ContinualEvaluation
from tests.helpers.distributed import run_ranks

CHANGES = (304, 608)  # the examples at which the data change


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(6, 3)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def forward(self, x):
        return self.net(x)

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Diary(ContinualCallback):
    keeps_nothing = True

    def __init__(self):
        self.entries = []

    def on_experience_start(self, trainer, module):
        self.entries.append(["start", trainer.global_step])

    def on_experience_end(self, trainer, module):
        self.entries.append(["end", trainer.global_step])


def changing_data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(912, 6, generator=generator)
    for change in CHANGES:
        x[change:] += 1.5
    return TensorDataset(x, torch.randint(3, (912,), generator=generator))


def inputs(batch):
    return batch[0]


def trigger(**settings):
    return DriftTrigger(MMD(arl=5_000, reference_size=128, window_size=16), inputs, **settings)


def trainer_with(*callbacks, **settings):
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **defaults | settings)


def fit(batch_size=16, devices=1, accumulate=1, others=()):
    """Diary and history of a fit over the changing data, unshuffled."""
    diary, drift = Diary(), trigger()
    settings = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
    trainer = trainer_with(diary, drift, *others, accumulate_grad_batches=accumulate, **settings)
    sampler = None
    if devices > 1:
        sampler = torch.utils.data.DistributedSampler(changing_data(), devices, int(trainer.global_rank), shuffle=False)
    trainer.fit(Classifier(), DataLoader(changing_data(), batch_size=batch_size, sampler=sampler))
    return [diary.entries, drift.history, drift.experience_index]


def test_every_change_ends_an_experience_and_starts_the_next():
    diary, history, experience_index = fit()
    # The change at example 304 = 16 * 19 is in step 19, and is acted on before step 20.
    assert diary == [["start", 0], ["end", 20], ["start", 20], ["end", 39], ["start", 39], ["end", 57]]
    assert [entry["step"] for entry in history if entry["alarm"]] == [20, 39]
    assert all(entry["alarm"] == (entry["score"] > entry["threshold"]) for entry in history)
    assert experience_index == 3


def near(history):
    """The tests in a history; sums are added up in another order where the batches are cut in another way."""
    tests = [entry for entry in history if "score" in entry]
    return [entry | {"score": pytest.approx(entry["score"], rel=1e-9)} for entry in tests]


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 4)])
def test_accumulation_changes_nothing(batch_size, accumulate):
    diary, history, experience_index = fit(batch_size, accumulate=accumulate)
    expected = fit()
    assert (diary, experience_index) == (expected[0], expected[2])
    assert history == near(expected[1])


class NeedsRecords(Detector):
    """Alarms at every 100th record, and keeps all of them: it has no sums that ranks could add up."""

    def _clear(self):
        self.records = []

    @property
    def armed(self):
        return True

    def _observe(self, records):
        self.threshold = 0.5
        for record in records:
            self.records.append(record.tolist())
            self.n_seen += 1
            self._test(float(self.n_seen % 100 == 0), float("nan"))

    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict):
        pass


def on_two_ranks():
    """What fits decide, and how features of unequal batches (3 on rank 0, 2 on rank 1) are put into one order."""

    class Gather(pl.Callback):
        def on_train_start(self, trainer, module):
            rank = trainer.global_rank
            values = torch.arange(3 - rank).float().unsqueeze(1) + 10 * rank
            good = torch.ones(len(values)).bool()
            dealt = deal(Features(values, good), None, False, trainer)
            self.all = gathered(values, dealt, trainer).flatten().tolist()
            values[1] = torch.nan  # on both ranks
            good[1] = False
            dealt = deal(Features(values, good, Counter({"NaN": 1})), 1, False, trainer)
            self.good = gathered(values, dealt, trainer).flatten().tolist()
            self.problems = dict(dealt.problems)

    gather = Gather()
    return fit(batch_size=8, devices=2, others=[gather]), gather.all, gather.good, gather.problems, unequal(2)


def unequal(devices):
    """Fits on batches of 10 (rank 0) and 6 (rank 1) examples; at step 5 rank 1 has a bad batch, at 9 a bad example.

    One process gets what the two would: batches of 16 examples, without the bad ones.
    """
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(16, 6, generator=generator) + (1.5 if step >= 20 else 0.0) for step in range(40)]
    rank = int(os.environ["RANK"]) if devices > 1 else 0

    def of_rank(step, x):
        dealt = [[0, 2, 4, 6, 8, 10, 12, 13, 14, 15], [1, 3, 5, 7, 9, 11]]
        if devices == 1:
            places = [one for one in range(16) if (step, one % 2) != (5, 1) or one > 11]
            return x[[one for one in places if (step, one) != (9, 3)]]
        mine = x[dealt[rank]].clone()
        if (step, rank) == (5, 1):
            return mine[:, :4]
        if (step, rank) == (9, 1):
            mine[1, 2] = torch.inf
        return mine

    class Wide(Classifier):
        def training_step(self, batch, batch_idx):
            x = nn.functional.pad(batch, (0, 6 - batch.shape[1])).nan_to_num(posinf=0.0)
            return nn.functional.cross_entropy(self.net(x), torch.zeros(len(x)).long())

    windows = {"arl": 5_000, "reference_size": 128, "window_size": 16}
    detectors = [MMD(**windows), LSDD(**windows), MarginalKS(**windows), ClassifierTest(**windows), NeedsRecords()]
    detectors.append(KernelCUSUM(arl=5_000, reference_size=128, window_sizes=[16, 32]))
    if find_spec("river"):
        detectors.append(PageHinkley(arl=5_000, reference_size=128))
    told = []
    for detector in detectors:
        one_number = isinstance(detector, PageHinkley)
        drift = DriftTrigger(detector, total if one_number else lambda batch: batch, refractory_period=21)
        settings = {"strategy": "ddp", "devices": devices, "use_distributed_sampler": False} if devices > 1 else {}
        loader = DataLoader([of_rank(step, x) for step, x in enumerate(steps)], batch_size=None)
        trainer_with(drift, **settings).fit(Wide(), loader)
        told.append([drift.history, drift.schema_errors])
    return told


def total(batch):
    """One number of an example, where it has the features that it should have."""
    return batch.sum(1, keepdim=True) if batch.shape[1] == 6 else batch


def test_two_ranks_decide_as_one_process():
    single, one = fit(), unequal(1)
    for decided, everyone, good, problems, two in run_ranks("tests.callbacks.test_drift_trigger:on_two_ranks", 2):
        assert [decided[0], decided[2]] == [single[0], single[2]]
        assert decided[1] == near(single[1])
        assert everyone == [0.0, 10.0, 1.0, 11.0, 2.0]
        assert (good, problems) == ([0.0, 10.0, 2.0], {"NaN": 2})
        for (history, errors), (expected, none) in zip(two, one, strict=True):
            assert [entry for entry in history if "score" in entry] == near(expected)
            assert (none, sum(entry["alarm"] for entry in history) > 0) == ({}, True)
            (changed,) = [words for words in errors if words.startswith("the number of features changed from")]
            assert errors == {changed: 6, "NaN or infinite features": 1}
            assert [(entry["step"], entry["records"]) for entry in history if "kind" in entry] == [(5, 6), (9, 1)]


class Reads(nn.Module):
    """Features of a batch that may be of another schema; trains on whatever comes."""

    def forward(self, batch):
        return batch["x"]


class Anything(Classifier):
    def training_step(self, batch, batch_idx):
        return self.net.weight.square().sum()


def dirty(change):
    """60 batches of 16, of which ``change(step, x)`` makes what it likes."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for step in range(60):
        x = torch.randn(16, 6, generator=generator) + (1.5 if step >= 40 else 0.0)
        batches.append(change(step, x))
    return DataLoader(batches, batch_size=None)


def test_bad_input_is_left_out_counted_and_told():
    bad = {
        20: lambda x: {"x": x.index_fill(0, torch.tensor([3]), torch.nan)},
        21: lambda x: {"x": x[:, :5]},
        22: lambda x: {"y": x},
        23: lambda x: {"x": x[:0]},
        24: lambda x: {"y": x},
        25: lambda x: {"x": x.index_fill(0, torch.tensor([3, 4]), -torch.inf)},
        26: lambda x: {"x": x.reshape(16, 2, 3)},
        27: lambda x: ["no", "tensor"],
    }
    drift = DriftTrigger(MMD(arl=5_000, reference_size=128, window_size=16), Reads())
    with pytest.warns(UserWarning) as warned:
        trainer_with(drift).fit(Anything(), dirty(lambda step, x: bad.get(step, lambda x: {"x": x})(x)))
    key = "KeyError: 'x'"
    assert drift.schema_errors == {
        "NaN or infinite features": 3,
        "the number of features changed from 6 to 5": 16,
        key: 32,
        "the batch is empty": 0,
        "ValueError: the featuriser must return a tensor [examples, n_features], got [16, 2, 3]": 16,
        "TypeError: list indices must be integers or slices, not str": 2,
    }
    told = [str(one.message) for one in warned if "DriftTrigger skipped" in str(one.message)]
    assert len(told) == 6
    assert told[0] == (
        "DriftTrigger skipped 1 unusable examples of the batch before step 20: NaN or infinite "
        "features. Further occurrences are only counted in schema_errors."
    )
    entries = [entry for entry in drift.history if entry.get("kind") == "schema"]
    assert [(entry["step"], entry["records"]) for entry in entries][:3] == [(20, 1), (21, 16), (22, 16)]
    assert entries[2] == {
        "step": 22, "last_step": 22, "kind": "schema", "records": 16, "errors": [key], "alarm": False,
    }  # fmt: skip
    assert [entry["step"] for entry in drift.history if entry["alarm"]] == [42]


def test_input_that_stays_bad_takes_one_entry_and_a_new_experience_accepts_it():
    drift = DriftTrigger(MMD(arl=5_000, reference_size=128, window_size=16), Reads(), history_size=40)
    narrow = dirty(lambda step, x: {"x": x if step < 30 else x[:, :4]})
    with pytest.warns(UserWarning, match="the number of features changed from 6 to 4"):
        trainer_with(drift).fit(Anything(), narrow)
    assert len(drift.history) == 30 - 8 + 1
    last = drift.history[-1]
    assert (last["step"], last["last_step"], last["records"]) == (30, 59, 30 * 16)
    trainer_with(drift).fit(Anything(), dirty(lambda step, x: {"x": x[:, :4]}))
    assert drift.history[-1]["score"] > 0  # the next experience accepts it
    assert sum(drift.schema_errors.values()) == 30 * 16


def test_a_first_batch_that_is_bad_does_not_set_the_number_of_features():
    drift = DriftTrigger(MMD(arl=5_000, reference_size=128, window_size=16), Reads())
    with pytest.warns(UserWarning, match="NaN"):
        loader = dirty(lambda step, x: {"x": x if step else torch.full((16, 3), torch.nan)})
        trainer_with(drift).fit(Anything(), loader)
    assert drift.schema_errors == {"NaN or infinite features": 16}
    assert [entry["step"] for entry in drift.history if entry["alarm"]] == [41]


def test_a_detector_that_refuses_later_examples_does_not_end_the_fit_but_a_wrong_one_does():
    def labels(bad):
        classes = [torch.arange(16).unsqueeze(1) % 3 for _ in range(60)]
        classes[bad][5] = -100
        return DataLoader([{"x": one} for one in classes], batch_size=None)

    drift = DriftTrigger(LabelShift(arl=1_000, reference_size=256), Reads())
    with pytest.warns(UserWarning, match="classes must be whole numbers from 0, got -100 at record 5"):
        trainer_with(drift).fit(Anything(), labels(30))
    assert list(drift.schema_errors.values()) == [16]
    with pytest.raises(ValueError, match="class numbers must have shape"):
        trainer_with(DriftTrigger(LabelShift(), Reads())).fit(Anything(), dirty(lambda step, x: {"x": x}))


def test_many_different_messages_are_bounded():
    def fails(batch):
        if batch["step"]:
            raise KeyError(batch["step"])
        return batch["x"]

    loader = DataLoader([{"x": torch.zeros(2, 2), "step": step} for step in range(130)], batch_size=None)
    drift = DriftTrigger(MMD(), fails)
    with pytest.warns(UserWarning):
        trainer_with(drift).fit(Anything(), loader)
    assert len(drift.schema_errors) == 101
    assert drift.schema_errors["other"] == 2 * 29


@pytest.mark.parametrize("period", [0, 5, 300])
def test_the_refractory_period_is_passed_over_before_a_reference(period):
    """So many examples of all are in no reference and no window, at the start and after an alarm."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1_600, 6, generator=generator)
    x[560:] += 3.0
    data = TensorDataset(x, torch.zeros(1_600).long())
    drift = DriftTrigger(MMD(arl=5_000, reference_size=128, window_size=16), inputs, refractory_period=period)
    trainer_with(drift).fit(Classifier(), DataLoader(data, batch_size=16))
    steps = [entry["step"] for entry in drift.history]
    alarm = next(entry["step"] for entry in drift.history if entry["alarm"])
    first = -(-(period + 128 + 16) // 16)  # examples passed over, the reference, the first window
    assert steps[0] == first
    assert steps[steps.index(alarm) + 1] == alarm + first
    assert alarm == 36


def test_no_alarm_without_a_change():
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(800, 6, generator=generator), torch.zeros(800).long())
    diary, drift = Diary(), trigger()
    trainer_with(diary, drift).fit(Classifier(), DataLoader(data, batch_size=16))
    assert diary.entries == [["start", 0], ["end", 50]]
    assert len(drift.history) == 41  # 49 steps are judged: 8 fill the reference


def test_resumed_fit_decides_as_an_undisturbed_one(tmp_path):
    class Kill(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 35:
                trainer.save_checkpoint(tmp_path / "killed.ckpt")
                raise RuntimeError("power cut")

    loader = DataLoader(changing_data(), batch_size=16)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer_with(trigger(), Kill()).fit(Classifier(), loader)
    resumed = trigger()

    class Skip(torch.utils.data.Sampler):
        def __iter__(self):  # a plain loader starts an epoch anew when resumed; this one goes on
            return iter(range(35 * 16, 912))

        def __len__(self):
            return 912

    rest = DataLoader(changing_data(), batch_size=16, sampler=Skip())
    trainer_with(resumed).fit(Classifier(), rest, ckpt_path=tmp_path / "killed.ckpt", weights_only=True)
    _, history, experience_index = fit()
    assert resumed.history == history
    assert resumed.experience_index == experience_index


@pytest.mark.parametrize("batch_size", [34])  # 912 examples: the last batch is short
def test_replayed_examples_are_not_looked_at(batch_size):
    def with_replay(examples):  # as many old examples after the new ones, as Replay adds them
        x, y = torch.utils.data.default_collate(examples)
        return [torch.cat([x, torch.full_like(x, 50.0)]), torch.cat([y, y])]

    histories = []
    for collate_fn in (None, with_replay):
        drift = trigger()
        loader = DataLoader(changing_data(), batch_size=batch_size, collate_fn=collate_fn)
        trainer_with(drift, max_epochs=2).fit(Classifier(), loader)
        histories.append(drift.history)
    assert histories[0] == histories[1]


def test_evaluation_follows_the_boundaries():
    evaluation = ContinualEvaluation()
    validation = DataLoader(changing_data(), batch_size=100)
    trainer_with(trigger(), evaluation).fit(Classifier(), DataLoader(changing_data(), batch_size=16), validation)
    assert len(evaluation.accuracy_matrix) == len(evaluation.experiences) == 3


def test_a_new_fit_takes_a_new_reference():
    drift, data = trigger(), changing_data()
    for start, stop in ((0, 304), (304, 608)):
        part = torch.utils.data.Subset(data, range(start, stop))
        trainer_with(drift).fit(Classifier(), DataLoader(part, batch_size=16))
    assert drift.experience_index == 2
    assert not any(entry["alarm"] for entry in drift.history)


def test_history_is_bounded_saved_and_loaded(tmp_path):
    drift = trigger(history_size=5)
    trainer_with(drift).fit(Classifier(), DataLoader(changing_data(), batch_size=16))
    assert len(drift.history) == 5
    drift.save(tmp_path)
    loaded = trigger()
    loaded.load(tmp_path)
    assert (loaded.history, loaded.experience_index) == (drift.history, 3)
    (tmp_path / "drift_trigger.json").write_text("[]")
    with pytest.raises(ValueError, match=r"drift_trigger\.json is not a saved DriftTrigger"):
        loaded.load(tmp_path)


def test_score_is_logged():
    trainer = trainer_with(trigger())
    trainer.fit(Classifier(), DataLoader(changing_data(), batch_size=16))
    assert trainer.logged_metrics["drift_score"] >= 0


def test_refusals():
    module, loader = Classifier(), DataLoader(changing_data(), batch_size=16)
    with pytest.raises(ValueError, match=r"weights that are being trained \(net.weight\)"):
        trainer_with(DriftTrigger(featuriser=lambda batch: module(batch[0]))).fit(module, loader)
    with pytest.raises(ValueError, match=r"must return a tensor \[examples, n_features\], got \[16, 2, 3\]"):
        trainer_with(DriftTrigger(featuriser=lambda batch: batch[0].reshape(-1, 2, 3))).fit(module, loader)
    with pytest.raises(TypeError, match="HashedNgrams needs token numbers"):
        trainer_with(DriftTrigger()).fit(module, loader)
    with pytest.raises(ValueError, match="history_size must be positive, got 0"):
        DriftTrigger(history_size=0)
    with pytest.raises(ValueError, match="refractory_period must not be negative, got -1"):
        DriftTrigger(refractory_period=-1)


def test_a_module_as_featuriser_is_frozen():
    class FirstInput(nn.Linear):
        def forward(self, batch):
            return super().forward(batch[0])

    encoder = FirstInput(6, 4)
    trainer_with(DriftTrigger(MMD(reference_size=128), encoder)).fit(
        Classifier(), DataLoader(changing_data(), batch_size=16)
    )
    assert not encoder.weight.requires_grad
    assert not encoder.training
