"""ContinualEvaluation: the accuracy matrix is right, the same at any world size, and training does not notice."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from evertune._lightning import pl
from evertune.callbacks.base import ContinualCallback
from evertune.callbacks.consolidation import end_experience
from evertune.tasks.base import Outputs, accuracies
from evertune.training.evaluation import ContinualEvaluation
from tests.helpers.distributed import run_ranks


class Classifier(pl.LightningModule):
    """A module that has never heard of evertune."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def dataset(seed, n=24):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return TensorDataset(x, (x[:, :3] + seed * 0.5 * x[:, 1:]).argmax(1))


def loader(seed, n=24, batch_size=8):
    return DataLoader(dataset(seed, n), batch_size=batch_size)


def trainer_with(*callbacks, epochs=1, **settings):
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(max_epochs=epochs, callbacks=list(callbacks), **defaults | settings)


def share_correct(module, data):
    module.eval()
    with torch.no_grad():
        x, y = data.tensors
        return (module(x).argmax(1) == y).float().mean().item()


def test_matrix_over_separate_fits():
    evaluation, module = ContinualEvaluation(), Classifier()
    expected = []
    for seed in range(3):
        trainer = trainer_with(evaluation, epochs=3)
        trainer.fit(module, loader(seed), loader(seed + 10, 23))
        expected.append([share_correct(module, dataset(k + 10, 23)) for k in range(seed + 1)])
        module.train()
        assert trainer.callback_metrics["average_accuracy"].item() == pytest.approx(sum(expected[-1]) / (seed + 1))
        assert trainer.callback_metrics[f"accuracy/experience_{seed}"].item() == pytest.approx(expected[-1][-1])
    assert evaluation.experiences == ["experience_0", "experience_1", "experience_2"]
    assert evaluation.experience_index == 3
    for t, row in enumerate(evaluation.accuracy_matrix):
        assert row[: t + 1] == pytest.approx(expected[t])
        assert all(math.isnan(x) for x in row[t + 1 :])


def test_explicit_experiences_and_unseen():
    def rows(evaluate_unseen):
        evaluation, module = ContinualEvaluation(evaluate_unseen=evaluate_unseen), Classifier()
        for name, seed in (("a", 10), ("b", 11), ("c", 12)):
            evaluation.add_experience(name, loader(seed))
        for seed in range(2):
            trainer_with(evaluation).fit(module, loader(seed))
        return evaluation.accuracy_matrix

    seen, everything = rows(False), rows(True)
    assert [[math.isnan(x) for x in row] for row in seen] == [[False, True, True], [False, False, True]]
    assert not any(math.isnan(x) for row in everything for x in row)
    assert seen[1][:2] == everything[1][:2]


def test_training_does_not_notice():
    class Recorder(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 2 and self.evaluation:
                before = {name: sub.training for name, sub in pl_module.named_modules()}
                end_experience([self.evaluation], trainer, pl_module)
                assert trainer.training
                assert before == {name: sub.training for name, sub in pl_module.named_modules()}

    weights = []
    for evaluation in (None, ContinualEvaluation()):
        recorder, module = Recorder(), Classifier()
        recorder.evaluation = evaluation
        module.net[1].eval()  # a submodule that the user holds in evaluation mode stays there
        torch.manual_seed(1)
        callbacks = [recorder, evaluation] if evaluation else [recorder]
        shuffled = DataLoader(dataset(0), batch_size=4, shuffle=True)
        trainer_with(*callbacks, epochs=2).fit(module, shuffled, loader(10))
        weights.append(torch.cat([value.flatten().float() for value in module.state_dict().values()]))
    assert torch.equal(*weights)
    assert len(evaluation.accuracy_matrix) == 2


def test_test_loader_of_the_datamodule():
    class Data(pl.LightningDataModule):
        def setup(self, stage):
            if stage == "test":
                self.test = dataset(10)

        def train_dataloader(self):
            return loader(0)

        def val_dataloader(self):
            return loader(11)

        def test_dataloader(self):
            return DataLoader(self.test, batch_size=5)

    for on, seed in (("test", 10), ("val", 11)):
        evaluation, module = ContinualEvaluation(split=on), Classifier()
        trainer_with(evaluation).fit(module, datamodule=Data())
        assert evaluation.accuracy_matrix == [[pytest.approx(share_correct(module, dataset(seed)))]]


def test_batch_hooks_of_the_module_are_applied():
    names = ["red", "green", "blue"]

    class Named(Classifier):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [batch[0], torch.tensor([names.index(name) for name in batch[1]])]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [torch.zeros_like(batch[0]), batch[1]] if self.trainer.training else batch

    x, y = dataset(0).tensors
    named = [(x, names[y]) for x, y in zip(x, y, strict=True)]
    evaluation, module = ContinualEvaluation(), Named()
    evaluation.add_experience("colours", DataLoader(named, batch_size=7))
    trainer_with(evaluation).fit(module, DataLoader(named, batch_size=8))
    assert evaluation.accuracy_matrix == [[pytest.approx(share_correct(module, dataset(0)))]]


def test_crash_adds_no_row():
    class Crash(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            raise RuntimeError("power cut")

    evaluation = ContinualEvaluation()
    with pytest.raises(RuntimeError, match="power cut"):
        trainer_with(evaluation, Crash()).fit(Classifier(), loader(0), loader(10))
    assert evaluation.accuracy_matrix == []
    assert evaluation.experiences == []


def test_drift_boundaries_inside_one_fit_keep_the_matrix_square():
    class Boundary(ContinualCallback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                end_experience([evaluation], trainer, pl_module)
                evaluation.on_experience_start(trainer, pl_module)

    evaluation = ContinualEvaluation()
    trainer_with(evaluation, Boundary()).fit(Classifier(), loader(0), loader(10))
    matrix = evaluation.accuracy_matrix
    assert len(matrix) == len(matrix[0]) == evaluation.experience_index == 2
    assert matrix[1][0] == matrix[1][1]  # one loader, scored once


def test_multi_label_and_shapes():
    logits = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    assert accuracies(Outputs.of(logits, torch.tensor([[1, 0], [1, 0]]))).tolist() == [1.0, 0.0]
    assert accuracies(Outputs.of(logits, torch.tensor([0, 1]))).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"targets of shape \[2, 3\] do not fit logits of shape \[2, 2\]"):
        Outputs.of(logits, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="cannot be scored without targets"):
        accuracies(Outputs.of(logits, ["a", "b"]))


def test_state_restores_matrix_and_loaders_come_back_by_name(tmp_path):
    first, module = ContinualEvaluation(), Classifier()
    trainer = trainer_with(first)
    trainer.fit(module, loader(0), loader(10))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    first.save(tmp_path)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    from_checkpoint, from_folder = ContinualEvaluation(), ContinualEvaluation()
    from_checkpoint.load_state_dict(checkpoint["callbacks"]["ContinualEvaluation"])
    from_folder.load(tmp_path)
    for restored in (from_checkpoint, from_folder):
        assert restored.accuracy_matrix == first.accuracy_matrix
        assert restored.experience_index == 1

    with pytest.warns(UserWarning, match=r"no data for \['experience_0'\]"):
        trainer_with(from_checkpoint).fit(module, loader(1), loader(11))
    assert math.isnan(from_checkpoint.accuracy_matrix[1][0])
    from_folder.add_experience("experience_0", loader(10))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no data for.*")
        trainer_with(from_folder).fit(module, loader(1), loader(11))
    assert from_folder.accuracy_matrix[1][0] == pytest.approx(share_correct(module, dataset(10)))


def test_corrupt_state_is_refused_by_name(tmp_path):
    (tmp_path / "evaluation.json").write_text('{"experiences": [')
    with pytest.raises(ValueError, match=r"evaluation\.json is not a saved ContinualEvaluation"):
        ContinualEvaluation().load(tmp_path)


class Stream(IterableDataset):
    def __iter__(self):
        yield from dataset(0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([1, 2], "must be a DataLoader, got list"),
        (DataLoader(Stream()), "needs a map-style dataset with a length, got Stream"),
        (DataLoader(dataset(0), batch_size=None), "got batch_size=None"),
        (DataLoader([]), "no examples to evaluate on"),
    ],
)
def test_loaders_that_cannot_be_evaluated(bad, message):
    with pytest.raises(ValueError, match=f"experience 'news': .*{message}"):
        ContinualEvaluation().add_experience("news", bad)


def test_refusals_at_fit_start():
    with pytest.raises(ValueError, match='split must be "test" or "val", got \'train\''):
        ContinualEvaluation(split="train")
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        trainer_with(ContinualEvaluation()).fit(Classifier(), loader(0))
    with pytest.raises(ValueError, match="found 2 validation loaders"):
        trainer_with(ContinualEvaluation()).fit(Classifier(), loader(0), [loader(1), loader(2)])
    with pytest.raises(ValueError, match=r"shape \[batch\], got \[2, 3\]"):
        trainer_with(ContinualEvaluation(score=lambda m, b: m(b[0]))).fit(Classifier(), loader(0), loader(1))
    with pytest.raises(ValueError, match=r"values in \[0, 1\], got 2 to 2"):
        score = lambda m, b: torch.full((len(b[0]),), 2.0)  # noqa: E731
        trainer_with(ContinualEvaluation(score=score)).fit(Classifier(), loader(0), loader(1))


def test_fast_dev_run_scores_one_batch():
    evaluation, module = ContinualEvaluation(), Classifier()
    trainer = trainer_with(evaluation, fast_dev_run=True)
    trainer.fit(module, loader(0), loader(10))
    x, y = dataset(10).tensors
    score = share_correct(module, TensorDataset(x[:8], y[:8]))
    assert trainer.callback_metrics["average_accuracy"] == pytest.approx(score)
    assert evaluation.accuracy_matrix == []


def evaluate_frozen(devices):
    """The matrix of a module that does not learn, so that every world size evaluates the same weights."""
    module = Classifier()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    module.net[1].eval()
    evaluation = ContinualEvaluation()
    for k, n in enumerate((1, 5, 24)):  # fewer than ranks, uneven, even
        evaluation.add_experience(f"e{k}", loader(10 + k, n, batch_size=4))
    for _ in range(3):
        settings = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
        trainer_with(evaluation, **settings).fit(module, loader(0))
    return [[None if math.isnan(x) else x for x in row] for row in evaluation.accuracy_matrix]


def test_two_ranks_give_the_single_process_matrix():
    single = evaluate_frozen(1)
    for ranks in run_ranks("tests.training.test_evaluation:evaluate_frozen", 2, devices=2):
        assert ranks == single
    assert single[2][2] is not None
