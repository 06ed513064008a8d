"""DriftTrigger: boundaries inside one fit, at the same step at any world size, accumulation and after a resume."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from evertune.callbacks.base import ContinualCallback
from evertune.callbacks.drift_trigger import DriftTrigger, _of_all_ranks
from evertune.callbacks.evaluation import ContinualEvaluation
from evertune.drift import MMD
from tests.distributed import run_ranks

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


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 2), (4, 4)])
def test_accumulation_changes_nothing(batch_size, accumulate):
    assert fit(batch_size, accumulate=accumulate) == fit()


def on_two_ranks():
    """What a fit decides, and how features of unequal batches (3 on rank 0, 2 on rank 1) are put into one order."""

    class Gather(pl.Callback):
        def on_train_start(self, trainer, module):
            rank = trainer.global_rank
            features = torch.arange(3 - rank).float().unsqueeze(1) + 10 * rank
            self.gathered = _of_all_ranks(features, trainer).flatten().tolist()

    gather = Gather()
    return fit(batch_size=8, devices=2, others=[gather]), gather.gathered


def test_two_ranks_decide_as_one_process():
    single = fit()
    for decided, gathered in run_ranks("tests.test_drift_trigger:on_two_ranks", 2):
        assert decided == single
        assert gathered == [0.0, 10.0, 1.0, 11.0, 2.0]


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


@pytest.mark.parametrize("batch_size", [16, 34])  # 912 examples: the last batch of 34 is short
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
