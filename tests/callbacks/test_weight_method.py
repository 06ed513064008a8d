"""The base class of methods on weights, by the example of the documents; and the hook for loss terms."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.amp import GradScaler

from evertune._lightning import pl
from evertune.callbacks import EWC, ContinualCallback, WeightMethod
from tests.callbacks.test_ewc import Classifier, fit, flat_weights, loader
from tests.helpers.distributed import run_ranks
from tests.helpers.l2sp import L2SP
from tests.helpers.shard_worker import make_bert

ROOT = Path(__file__).resolve().parents[2]


def anchor(method: WeightMethod) -> Tensor:
    return torch.cat(method.tensors["anchor"])


def test_the_documents_show_this_method() -> None:
    assert f"```python\n{(ROOT / 'tests/helpers/l2sp.py').read_text()}```" in (ROOT / "docs/strategies.md").read_text()


# --- tensors about the weights


def test_acts_like_the_penalty_in_the_loss() -> None:
    method, module = L2SP(strength=0.5), Classifier()
    fit(module, loader(1), method)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    there = flat_weights(module).clone()
    assert torch.equal(anchor(method), there)
    fit(module, loader(2), method, accumulate_grad_batches=5, max_epochs=3)

    by_loss = Classifier()
    by_loss.load_state_dict(start)
    by_loss.penalty = lambda m: 0.25 * (torch.cat([p.flatten() for p in m.parameters()]) - there).square().sum()
    fit(by_loss, loader(2), accumulate_grad_batches=5, max_epochs=3)
    torch.testing.assert_close(flat_weights(module), flat_weights(by_loss), rtol=1e-6, atol=1e-7)
    assert torch.equal(anchor(method), flat_weights(module))


def test_resumed_from_a_checkpoint_it_keeps_its_anchor(tmp_path: Path) -> None:
    class SaveAfterOneEpoch(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    module, method = Classifier(), L2SP(strength=0.5)
    fit(module, loader(1), method)
    fit(module, loader(2), method, SaveAfterOneEpoch(), max_epochs=2)

    resumed, fresh = Classifier(), L2SP(strength=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(resumed, loader(2), fresh, max_epochs=2, ckpt=tmp_path / "middle.ckpt")
    assert fresh.experience_index == 2
    assert torch.equal(flat_weights(resumed), flat_weights(module))


def test_saved_to_a_folder_and_loaded_by_another(tmp_path: Path) -> None:
    module, method = Classifier(), L2SP(strength=0.5)
    fit(module, loader(1), method)
    method.save(tmp_path)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    fit(module, loader(2), method)

    again, other = Classifier(), L2SP(strength=0.5)
    again.load_state_dict(state)
    other.load(tmp_path)
    assert other.experience_index == 1
    fit(again, loader(2), other)
    assert torch.equal(flat_weights(again), flat_weights(module))
    with pytest.raises(ValueError, match=r"holds the tensors \['anchor'\], but EWC keeps \['anchor', 'importance'\]"):
        EWC().load(tmp_path)


def test_a_head_that_grows_is_pulled_to_zero() -> None:
    method, module = L2SP(), Classifier(classes=3)
    fit(module, loader(1), method)
    old = dict(zip([f.name for f in method._state.fragments], method.tensors["anchor"], strict=True))  # type: ignore[union-attr]
    grown = nn.Linear(6, 5)
    with torch.no_grad():
        grown.weight[:3], grown.bias[:3] = module.head.weight, module.head.bias
    module.head = grown

    class Looks(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.anchor = method.tensors["anchor"][2].clone()

    looks = Looks()
    fit(module, loader(2, classes=5), looks, method)
    assert torch.equal(looks.anchor, torch.cat([old["head.weight"], torch.zeros(12)]))


@pytest.mark.parametrize("strategy", ["evertune_deepspeed_stage_2", "evertune_deepspeed_stage_3", "evertune_fsdp2"])
def test_where_weights_are_sharded_it_keeps_its_anchor(strategy: str, tmp_path: Path) -> None:
    """Two ranks learn, save and are resumed; the anchor they saved is that of one process, and loads there."""
    bert = make_bert(tmp_path / "bert")
    shared = {"folder": bert, "out": str(tmp_path)}
    whole, resumed = (
        run_ranks("tests.helpers.strategy_worker:l2sp", 2, strategy=strategy, resume=resume, **shared)
        for resume in (False, True)
    )
    assert [rank["weights"] for rank in resumed] == [rank["weights"] for rank in whole]
    assert resumed[0]["weights"]
    assert [rank["repr"] for rank in whole] == [rank["repr"] for rank in resumed]
    [alone] = run_ranks("tests.helpers.strategy_worker:l2sp_elsewhere", 1, **shared)
    assert alone["loaded"] == alone["expected"]


@pytest.mark.slow
def test_what_two_ranks_have_saved_gives_the_same_steps_anywhere(tmp_path: Path) -> None:
    shared = {"folder": make_bert(tmp_path / "bert"), "out": str(tmp_path)}
    run_ranks("tests.helpers.strategy_worker:learn_and_save", 2, strategy="evertune_deepspeed_stage_2", **shared)
    found = []
    for world_size, strategy in ((1, "auto"), (2, "ddp"), (2, "evertune_deepspeed_stage_3"), (2, "evertune_fsdp2")):
        run_ranks("tests.helpers.strategy_worker:load_and_learn", world_size, strategy=strategy, **shared)
        found.append(load_file(tmp_path / f"{strategy}.safetensors"))
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)


def test_consolidate_must_return_the_tensors_that_are_named() -> None:
    class Other(L2SP):
        tensor_names = ("anchor", "importance")

    with pytest.raises(ValueError, match=r"Other.consolidate returned \['anchor'\], but tensor_names is"):
        fit(Classifier(), loader(1), Other())


def test_a_method_that_names_nothing() -> None:
    class Nameless(L2SP):
        tensor_names = ()

    with pytest.raises(ValueError, match="Nameless names no tensors; set tensor_names on the class"):
        fit(Classifier(), loader(1), Nameless())


def test_what_it_holds(tmp_path: Path) -> None:
    ewc, module = EWC(n_examples=8), Classifier()
    assert repr(ewc) == "<EWC: nothing learned yet>"
    fit(module, loader(1), ewc)
    n = flat_weights(module).numel()
    assert repr(ewc) == (
        f"<EWC: experiences: 1 learned, importance and anchor of {n} weights, {8 * n} bytes on this rank>"
    )
    ewc.save(tmp_path)
    other = EWC()
    other.load(tmp_path)
    assert repr(other) == f"<EWC: experiences: 1 learned, to be read from {tmp_path} by the next fit>"
    assert EWC.bytes_per_weight() == 8


def test_16_bit_weights_have_fp32_tensors(tmp_path: Path) -> None:
    """What is added to an importance a hundred times must not be rounded to 8 bits each time; and files keep it."""
    method, module = L2SP(), Classifier()
    fit(module, loader(1), method, precision="bf16-true")
    method.save(tmp_path)
    other = L2SP()
    other.load(tmp_path)
    fit(module, loader(2), other, precision="bf16-true")
    for one in (method, other):
        assert {value.dtype for value in one.tensors["anchor"]} == {torch.float32}


def test_a_fused_optimizer_takes_the_loss_scale_off_itself() -> None:
    """Its gradients are still scaled when a method adds to them; the result is as without fusing."""

    class Adam(Classifier):
        fused = False

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01, fused=self.fused)

    found = []
    for fused in (False, True):
        module, method = Adam(), L2SP(strength=1.0)
        module.fused = fused
        for seed in (1, 2):
            fit(module, loader(seed), method, max_epochs=3, **scaled())
        found.append(flat_weights(module))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


# --- what is learned and not kept


def test_a_method_that_would_lose_what_it_learns_is_refused() -> None:
    class Forgets(ContinualCallback):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            """Does not call that of the base class."""

        def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            self.anchor = flat_weights(module).clone()

        def state_dict(self) -> dict[str, Any]:
            return {"anchor": self.anchor}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.anchor = state_dict["anchor"]

    class Looks(Forgets):
        keeps_nothing = True

    class Stateless(ContinualCallback):
        pass

    class Keeps(Forgets):
        def save(self, directory: str | Path) -> None:
            torch.save(self.anchor, directory)

        def load(self, directory: str | Path) -> None:
            self.anchor = torch.load(directory, weights_only=True)

    before = flat_weights(Classifier())
    module = Classifier()
    with pytest.raises(ValueError, match=r"Forgets overrides on_experience_end but not save, load: .*WeightMethod"):
        fit(module, loader(1), Forgets())
    assert torch.equal(flat_weights(module), before)
    for kept in (Looks(), Stateless(), Keeps()):
        fit(module, loader(1), kept)
        assert kept.experience_index == 1


# --- terms in the loss


def decay(module: Any, batch: Any) -> Tensor:
    return 5 * module(batch[0]).square().mean()


class Decay(ContinualCallback):
    def loss_term(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Tensor:
        return decay(module, batch)


class WithDecay(Classifier):
    """The same term in the module's own loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + decay(self, batch)


def scaled() -> dict[str, Any]:
    return {"plugins": [pl.plugins.MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=1024.0))]}


@pytest.mark.parametrize("accumulation", [1, 5])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_a_loss_term_is_as_if_the_module_had_it(precision: str, accumulation: int) -> None:
    found = []
    for module, callbacks in ((Classifier(), [Decay()]), (WithDecay(), []), (Classifier(), [])):
        settings = scaled() if precision == "16-mixed" else {"precision": precision}
        fit(module, loader(1), *callbacks, accumulate_grad_batches=accumulation, max_epochs=3, **settings)
        found.append(flat_weights(module).float())
    error, effect = ((found[0] - other).abs().max() for other in found[1:])
    assert effect > 0.05
    assert error < effect * {"32-true": 1e-5, "16-mixed": 1e-2}.get(precision, 0.1)


def test_none_adds_nothing_and_the_batch_is_let_go() -> None:
    class Sometimes(Decay):
        seen: list[Any] = []  # noqa: RUF012

        def loss_term(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Any:
            self.seen.append((module.training, torch.is_grad_enabled(), batch is self._batch))
            return None

    one, other, method = Classifier(), Classifier(), Sometimes()
    fit(one, loader(1), method)
    fit(other, loader(1))
    assert torch.equal(flat_weights(one), flat_weights(other))
    assert Sometimes.seen == [(True, True, True)] * 5
    assert method._batch is None


def test_loss_terms_that_cannot_work() -> None:
    class PerExample(Decay):
        def loss_term(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Tensor:
            return module(batch[0]).square().mean(1)

    class TakesTheBatch(Decay):
        def on_train_batch_start(self, *_: Any) -> None:
            """Does not call that of the base class."""

    with pytest.raises(ValueError, match=r"PerExample.loss_term returned a tensor of shape \[8\]; return a scalar"):
        fit(Classifier(), loader(1), PerExample())
    with pytest.raises(RuntimeError, match=r"TakesTheBatch has no batch .* call super\(\).on_train_batch_start"):
        fit(Classifier(), loader(1), TakesTheBatch())
    with pytest.raises(ValueError, match="Decay adds a term to the loss, which needs automatic optimization"):
        fit(Classifier(n_optimizers=2), loader(1), Decay())
