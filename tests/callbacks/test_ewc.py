"""Elastic weight consolidation: its formula, its state, and what it refuses."""

from __future__ import annotations

import typing
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from evertune._lightning import pl
from evertune.callbacks import EWC
from evertune.importance import Estimator, estimate_fisher
from evertune.shards.replicated import ReplicatedShards


class Classifier(pl.LightningModule):
    """Knows nothing of evertune: tuple batches, SGD."""

    def __init__(self, classes: int = 3, n_optimizers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Linear(4, 6)
        self.head = nn.Linear(6, classes)
        self.n_optimizers = n_optimizers
        self.automatic_optimization = n_optimizers == 1
        self.penalty: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        return loss if self.penalty is None else loss + self.penalty(self)

    def configure_optimizers(self) -> Any:
        made = [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(self.n_optimizers)]
        return made[0] if self.n_optimizers == 1 else made


def loader(seed: int, n: int = 40, classes: int = 3) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, classes, (n,), generator=generator)), batch_size=8)


def fit(
    module: pl.LightningModule, data: Any, *callbacks: pl.Callback, ckpt: Any = None, **settings: Any
) -> pl.Trainer:
    settings = {"max_epochs": 1, "logger": False, "enable_checkpointing": False} | settings
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, data, ckpt_path=ckpt)
    return trainer


def importance_and_anchor(ewc: EWC) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    assert ewc._state is not None
    names = [f.name for f in ewc._state.fragments]
    importance, anchor = (ewc._state.tensors[kind] for kind in ("importance", "anchor"))
    return dict(zip(names, importance, strict=True)), dict(zip(names, anchor, strict=True))


def plain(**settings: Any) -> EWC:
    """EWC as published: the exact Fisher of all examples, as it is."""
    return EWC(**{"estimator": "exact", "normalize": False, "n_examples": 40} | settings)


def flat_weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("accumulation", [1, 5])
def test_acts_like_the_penalty_in_the_loss(accumulation: int) -> None:
    ewc = plain(ewc_lambda=30.0)
    module = Classifier()
    fit(module, loader(1), ewc)
    importance, anchor = ({k: v.clone() for k, v in part.items()} for part in importance_and_anchor(ewc))
    start = {name: value.clone() for name, value in module.state_dict().items()}

    fit(module, loader(2), ewc, accumulate_grad_batches=accumulation, max_epochs=3)

    def penalty(m: nn.Module) -> Tensor:
        terms = [(importance[n] * (p.flatten() - anchor[n]) ** 2).sum() for n, p in m.named_parameters()]
        return 30.0 / 2 * torch.stack(terms).sum()

    by_loss = Classifier()
    by_loss.load_state_dict(start)
    by_loss.penalty = penalty
    fit(by_loss, loader(2), accumulate_grad_batches=accumulation, max_epochs=3)
    torch.testing.assert_close(flat_weights(module), flat_weights(by_loss), rtol=1e-6, atol=1e-7)

    without = Classifier()
    without.load_state_dict(start)
    fit(without, loader(2), accumulate_grad_batches=accumulation, max_epochs=3)
    assert (flat_weights(without) - flat_weights(module)).abs().max() > 1e-3


def test_importance_is_the_fisher_of_the_data() -> None:
    ewc, module, data = plain(n_examples=1000, batch_size=7), Classifier(), loader(1)
    fit(module, data, ewc)
    importance, anchor = importance_and_anchor(ewc)
    expected = estimate_fisher(module, list(data), ReplicatedShards(module), estimator="exact")
    for (name, found), fisher, weight in zip(importance.items(), expected, module.parameters(), strict=True):
        torch.testing.assert_close(found, fisher, rtol=1e-4, atol=1e-9, msg=name)
        torch.testing.assert_close(anchor[name], weight.detach().flatten(), rtol=0, atol=0)


@pytest.mark.parametrize("batch_size", [8, 13])
@pytest.mark.parametrize(
    ("epochs", "estimator", "examples"), [(5, "sampled", 20), (19, "sampled", 40), (20, "exact", 40)]
)
def test_auto_takes_a_tenth_of_the_training_at_most(
    epochs: int, estimator: str, examples: int, batch_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    ewc, module = EWC(), Classifier()
    with caplog.at_level("INFO"):
        fit(module, DataLoader(loader(1).dataset, batch_size, shuffle=True), ewc, max_epochs=epochs)
    assert ewc.notes == {"estimator": estimator, "examples": examples, "trained": 40 * epochs, "normalize": True}
    words = "EWC bounds the Fisher to a tenth of the training (200 examples): sampled, on 20 of 40 examples; "
    assert [words in record.message for record in caplog.records].count(True) == (examples == 20)
    x, y = loader(1).dataset.tensors  # type: ignore[attr-defined]
    drawn = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:examples]
    shards, name = ReplicatedShards(module), typing.cast(Estimator, estimator)
    expected = torch.cat(estimate_fisher(module, [(x[drawn], y[drawn])], shards, name))
    found = torch.cat(list(importance_and_anchor(ewc)[0].values()))
    torch.testing.assert_close(found, expected / expected[expected > 0].mean(), rtol=1e-4, atol=1e-9)


def test_the_bound_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    ewc, module = EWC(), Classifier()
    with caplog.at_level("INFO"):
        fit(module, loader(1), ewc)
        fit(module, loader(2), ewc)
    assert sum("EWC bounds the Fisher" in record.message for record in caplog.records) == 1
    assert ewc.notes["examples"] == 16


def test_weights_without_any_importance_do_not_change_the_scale() -> None:
    def importance(n_unused: int) -> Tensor:
        ewc, module = EWC(estimator="exact"), Classifier()
        module.unused = nn.Linear(1, n_unused)
        fit(module, loader(1), ewc)
        return torch.cat([one for name, one in importance_and_anchor(ewc)[0].items() if "unused" not in name])

    torch.testing.assert_close(importance(1), importance(1_000))
    assert importance(1).mean() == pytest.approx(1.0)


def test_a_large_strength_does_not_diverge() -> None:
    ewc, module = EWC(1e9), Classifier()
    fit(module, loader(1), ewc)
    anchor = flat_weights(module)
    fit(module, loader(2), ewc, max_epochs=3)
    assert 0 < (flat_weights(module) - anchor).abs().max() < 0.1


def test_online_decays_and_moves_the_anchor() -> None:
    ewc, module = plain(gamma=0.5), Classifier()
    fit(module, loader(1), ewc)
    first = importance_and_anchor(ewc)[0]
    fit(module, loader(2), ewc)
    importance, anchor = importance_and_anchor(ewc)
    only_second = estimate_fisher(module, list(loader(2)), ReplicatedShards(module))
    for (name, found), second in zip(importance.items(), only_second, strict=True):
        torch.testing.assert_close(found, 0.5 * first[name] + second, rtol=1e-4, atol=1e-9)
    weights = {n: p.detach().flatten() for n, p in module.named_parameters()}
    assert all(torch.equal(anchor[n], weights[n]) for n in weights)


def test_separate_is_the_sum_of_one_penalty_per_experience() -> None:
    ewc, module = plain(mode="separate"), Classifier()
    parts = []
    for seed in (1, 2, 3):
        fit(module, loader(seed), ewc)
        fisher = estimate_fisher(module, list(loader(seed)), ReplicatedShards(module))
        parts.append((torch.cat(fisher), flat_weights(module)))
    importance, anchor = (torch.cat(list(part.values())) for part in importance_and_anchor(ewc))
    anywhere = torch.randn(len(anchor), generator=torch.Generator().manual_seed(0))
    expected = sum(f * (anywhere - a) for f, a in parts)
    torch.testing.assert_close(importance * (anywhere - anchor), expected, rtol=1e-4, atol=1e-6)


def test_penalty_is_the_loss_term() -> None:
    class Asks(pl.Callback):
        value = None

        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            importance, anchor = importance_and_anchor(ewc)
            self.expected = 15.0 * sum(
                (importance[n] * (p.detach().flatten() - anchor[n]) ** 2).sum() for n, p in pl_module.named_parameters()
            )
            self.value = ewc.penalty()

    ewc, module, asks = plain(ewc_lambda=30.0), Classifier(), Asks()
    fit(module, loader(1), ewc)
    fit(module, loader(2), asks, ewc)
    assert asks.value is not None and asks.value > 0
    torch.testing.assert_close(asks.value.float(), asks.expected)


def test_a_crash_consolidates_nothing() -> None:
    class Crash(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("power cut")

    ewc, module = EWC(n_examples=40), Classifier()
    fit(module, loader(1), ewc)
    before = torch.cat(list(importance_and_anchor(ewc)[0].values()))
    with pytest.raises(RuntimeError, match="power cut"):
        fit(module, loader(2), ewc, Crash())
    assert ewc.experience_index == 1
    assert torch.equal(torch.cat(list(importance_and_anchor(ewc)[0].values())), before)


def test_head_that_grows_keeps_the_old_rows_importance() -> None:
    ewc, module = EWC(ewc_lambda=1.0, n_examples=40), Classifier(classes=3)
    fit(module, loader(1), ewc)
    old = importance_and_anchor(ewc)[0]["head.weight"]
    grown = nn.Linear(6, 5)
    with torch.no_grad():
        grown.weight[:3], grown.bias[:3] = module.head.weight, module.head.bias
    module.head = grown

    class Looks(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.importance = importance_and_anchor(ewc)[0]["head.weight"].clone()

    looks = Looks()
    fit(module, loader(2, classes=5), ewc, looks)
    assert torch.equal(looks.importance[: len(old)], old)
    assert torch.equal(looks.importance[len(old) :], torch.zeros(2 * 6))
    assert importance_and_anchor(ewc)[0]["head.weight"].shape == (30,)


def test_iterable_data_and_a_dictionary_of_loaders() -> None:
    class Passing(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(loader(1).dataset)

    ewc, module = EWC(n_examples=40), Classifier()
    fit(module, DataLoader(Passing(), batch_size=8), ewc)
    importance = torch.cat(list(importance_and_anchor(ewc)[0].values()))
    assert importance.max() > 0
    assert ewc._examples._held == []
    assert ewc.notes == {"estimator": "sampled", "examples": 16, "trained": 40, "normalize": True}


@pytest.mark.parametrize("mode", ["online", "separate"])
def test_goes_on_from_a_checkpoint_in_the_middle_of_the_second_experience(mode: Any, tmp_path: Path) -> None:
    def first() -> tuple[Classifier, EWC]:
        module, ewc = Classifier(), plain(ewc_lambda=30.0, mode=mode)
        fit(module, loader(1), ewc)
        return module, ewc

    module, ewc = first()
    fit(module, loader(2), ewc, max_epochs=2)

    interrupted, other = first()
    trainer = fit(interrupted, loader(2), other, max_epochs=1)
    other.experience_index, other._state = 1, first()[1]._state  # as a checkpoint before the end would have it
    trainer.save_checkpoint(tmp_path / "middle.ckpt")
    assert torch.load(tmp_path / "middle.ckpt", weights_only=True)["callbacks"]

    resumed, fresh = Classifier(), plain(ewc_lambda=30.0, mode=mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(resumed, loader(2), fresh, max_epochs=2, ckpt=tmp_path / "middle.ckpt")
    assert fresh.experience_index == 2
    assert torch.equal(flat_weights(resumed), flat_weights(module))
    for found, expected in zip(importance_and_anchor(fresh), importance_and_anchor(ewc), strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_saved_to_a_folder_and_loaded_by_another(tmp_path: Path) -> None:
    module, ewc = Classifier(), plain(ewc_lambda=30.0)
    fit(module, loader(1), ewc)
    ewc.save(tmp_path / "ewc")
    state = {k: v.clone() for k, v in module.state_dict().items()}
    fit(module, loader(2), ewc)

    again, other = Classifier(), plain(ewc_lambda=30.0)
    again.load_state_dict(state)
    other.load(tmp_path / "ewc")
    assert other.experience_index == 1
    fit(again, loader(2), other)
    assert torch.equal(flat_weights(again), flat_weights(module))


def test_an_importance_of_another_scale_is_refused(tmp_path: Path) -> None:
    module, ewc = Classifier(), plain()
    trainer = fit(module, loader(1), ewc)
    ewc.save(tmp_path / "ewc")
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    message = "holds importance that was estimated with normalize=False, and this EWC has normalize=True: keep the"
    with pytest.raises(ValueError, match=f"ewc {message}"):
        EWC().load(tmp_path / "ewc")
    with pytest.raises(ValueError, match=f"the checkpoint {message}"):
        fit(module, loader(1), EWC(), ckpt=tmp_path / "end.ckpt", max_epochs=2)


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to save"):
        EWC().save(tmp_path)


def test_damaged_folders_are_refused_by_name(tmp_path: Path) -> None:
    module, ewc = Classifier(), EWC(n_examples=8)
    fit(module, loader(1), ewc)
    ewc.save(tmp_path)
    weights = tmp_path / "fragments-00000-of-00001.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"fragments-00000-of-00001.safetensors is corrupt"):
        EWC().load(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"fragments-00000-of-00001.safetensors is missing"):
        EWC().load(tmp_path)
    weights.write_bytes(whole)
    (tmp_path / "index.json").write_text('{"format": "evertune-fragments", "ver')
    with pytest.raises(ValueError, match=r"index.json is not valid JSON"):
        EWC().load(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        EWC().load(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ewc_lambda": -1.0}, "ewc_lambda must not be negative, got -1.0"),
        ({"mode": "offline"}, "mode must be 'online' or 'separate', got 'offline'"),
        ({"gamma": 1.5}, "gamma must be between 0 and 1, got 1.5"),
        ({"estimator": "exakt"}, "estimator must be one of auto, exact, .* got 'exakt'"),
        ({"n_examples": 0}, "n_examples must be positive, got 0"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
    ],
)
def test_arguments_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EWC(**settings)


def test_gamma_in_separate_mode_is_said_to_be_ignored() -> None:
    with pytest.warns(UserWarning, match=r"gamma=0.5 is ignored"):
        EWC(mode="separate", gamma=0.5)


def test_two_optimizers_are_refused() -> None:
    with pytest.raises(ValueError, match="EWC works with one optimizer, got 2"):
        fit(Classifier(n_optimizers=2), loader(1), EWC())


class WithAdam(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, betas=(0.9, 0.95))


def test_the_second_moment_of_the_optimizer_is_an_importance() -> None:
    ewc, module = EWC(estimator="optimizer", normalize=False), WithAdam()
    squares = torch.zeros_like(flat_weights(module))

    class Squares(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            gradient = torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.grad is not None])
            squares.mul_(0.95).add_(gradient.square(), alpha=0.05)

    fit(module, loader(1), ewc, Squares())
    found = torch.cat(list(importance_and_anchor(ewc)[0].values()))
    torch.testing.assert_close(found, squares / (1 - 0.95**5), rtol=1e-5, atol=1e-9)
    assert ewc.notes == {"estimator": "optimizer", "examples": 0, "trained": 40, "normalize": False}
    fit(module, loader(2), ewc)


def test_an_optimizer_without_a_second_moment_is_refused_after_the_first_step() -> None:
    with pytest.raises(ValueError, match="reads the second moment of Adam or AdamW; SGD keeps none"):
        fit(Classifier(), loader(1), EWC(estimator="optimizer"))
