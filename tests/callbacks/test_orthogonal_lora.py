"""O-LoRA, and what all methods with an adapter per experience share."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from evertune._lightning import pl
from evertune.callbacks import EWC, OSFT, DriftTrigger, OrthogonalLoRA, ShrinkPerturb
from tests.callbacks.test_ewc import Classifier, fit
from tests.helpers.distributed import run_ranks
from tests.helpers.lora import LAYERS, Adapted, ByHand, Starts, assert_same, data, down, effective, up
from tests.helpers.shard_worker import make_bert


def orthogonal_term(earlier: list[Tensor], now: Tensor) -> Any:
    """The term of the paper, over the earlier experiences one by one."""
    return sum((0.7 * (one @ now.T).square().sum() for one in earlier), torch.zeros(()))


@pytest.mark.parametrize("steps", [1, 5])
def test_as_in_the_paper(steps: int) -> None:
    """After one step, and after two and three experiences."""
    module, method, starts = Adapted(), OrthogonalLoRA(strength=0.7), Starts()
    by_hand = ByHand(module, orthogonal_term)
    for seed in (1, 2, 3):
        fit(module, data(seed), method, starts, max_steps=steps)
        by_hand.learn(data(seed), starts.downs[-1], steps)
        assert_same(module, by_hand)
    for name in LAYERS:
        expected = torch.cat([a for a, _ in by_hand.adapters[name]])
        torch.testing.assert_close(method.kept[f"net.{name}"].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_term_that_is_told_is_the_one_that_acts() -> None:
    class Read(pl.Callback):
        penalty, found = -1.0, -1.0

        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 2:
                self.penalty = float(method.penalty())
                rows = {name: method.kept[f"net.{name}"] for name in LAYERS if method.kept}
                self.found = float(sum(0.7 * (rows[n] @ down(pl_module, n).T).square().sum() for n in rows))

    module, method, read = Adapted(), OrthogonalLoRA(strength=0.7), Read()
    for seed in (1, 2):
        fit(module, data(seed), method, read)
    assert read.found > 0.01
    assert read.penalty == pytest.approx(read.found, rel=1e-5)
    assert float(method.penalty()) == 0.0  # not during a fit


def test_a_strong_term_keeps_the_directions_apart_and_the_first_experience_is_plain_lora() -> None:
    overlaps, first = [], []
    for strength in (0.0, 1.0):
        module, method = Adapted(), OrthogonalLoRA(strength=strength)
        fit(module, data(1), method)
        first.append(effective(module))
        fit(module, data(2), method, max_epochs=40)
        one, other = method.kept["net.first"].split(2)
        overlaps.append(float((one @ other.T).norm()))
    assert all(torch.equal(first[0][name], first[1][name]) for name in first[0])
    assert overlaps[1] < 0.2 * overlaps[0]


def test_a_new_experience_starts_from_what_the_last_one_has_learned() -> None:
    class Before(pl.Callback):
        found: Any = None

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 0:
                self.found = effective(pl_module), [up(pl_module, name) for name in LAYERS]

    module, method, before = Adapted(), OrthogonalLoRA(), Before()
    fit(module, data(1), method)
    end = effective(module)
    assert any(up(module, name).abs().max() > 1e-3 for name in LAYERS)  # the adapter of the last one, until then
    fit(module, data(2), method, before)
    started, ups = before.found
    for name, value in end.items():
        torch.testing.assert_close(started[name], value, rtol=1e-6, atol=1e-7)
    assert all(not one.any() for one in ups)


def test_saved_and_loaded_it_takes_the_same_steps(tmp_path: Path) -> None:
    module, method = Adapted(), OrthogonalLoRA()
    fit(module, data(1), method)
    method.save(tmp_path)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    fit(module, data(2), method)
    other, loaded = Adapted(), OrthogonalLoRA()
    other.load_state_dict(state)
    loaded.load(tmp_path)
    fit(other, data(2), loaded)
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert loaded.experience_index == 2
    file = tmp_path / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"adapters\.safetensors is corrupt"):
        OrthogonalLoRA().load(tmp_path)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resumed_in_the_middle_it_ends_in_the_same_bits(optimizer: str, tmp_path: Path) -> None:
    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    module, method = Adapted(optimizer), OrthogonalLoRA()
    fit(module, data(1), method)
    fit(module, data(2), method, Save(), max_epochs=2)
    resumed, fresh = Adapted(optimizer), OrthogonalLoRA()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(resumed, data(2), fresh, max_epochs=2, ckpt=tmp_path / "middle.ckpt")
    for one, two in zip(module.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
    assert fresh.experience_index == method.experience_index == 2
    assert all(torch.equal(method.kept[name], fresh.kept[name]) for name in method.kept)


@pytest.mark.slow
def test_what_two_ranks_saved_gives_the_same_next_step_on_one_and_two(tmp_path: Path) -> None:
    """O-LoRA and InfLoRA, saved between two experiences and within one."""
    start = functools.partial(run_ranks, folder=make_bert(tmp_path / "bert"), out=str(tmp_path))
    start("tests.helpers.adapter_worker:learn_and_save", 2)
    step = "tests.helpers.adapter_worker:load_and_step"
    start(step, 1, strategy="auto")
    start(step, 1, strategy="auto", load=False)
    two = ("evertune_deepspeed_stage_3", "evertune_fsdp2")
    for strategy in two:
        start(step, 2, strategy=strategy)
    for folder in (tmp_path / method / place for method in ("olora", "inflora") for place in ("between", "within")):
        one, fresh, *others = (load_file(folder / f"{name}.safetensors") for name in ("auto", "fresh", *two))
        for other in others:
            for name, value in one.items():
                torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6, msg=f"{folder} {name}")
        assert max(float((fresh[name] - value).abs().max()) for name, value in one.items()) > 1e-4, folder


def test_a_fit_that_failed_is_no_experience() -> None:
    class Crash(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("power cut")

    module, method = Adapted(), OrthogonalLoRA()
    with pytest.raises(RuntimeError, match="power cut"):
        fit(module, data(1), method, Crash())
    assert method.kept == {}
    fit(module, data(1), method)
    assert {len(rows) for rows in method.kept.values()} == {2}


def test_weights_stored_the_other_way_round() -> None:
    """As those of GPT-2."""
    from transformers.pytorch_utils import Conv1D

    class Turned(Adapted):
        def __init__(self) -> None:
            super().__init__()
            from peft import LoraConfig, inject_adapter_in_model

            plain = self.net
            self.net = nn.ModuleDict()
            for name in LAYERS:
                layer = plain[name].base_layer
                self.net[name] = Conv1D(*layer.weight.shape)
                self.net[name].weight.data.copy_(layer.weight.T)
                self.net[name].bias.data.copy_(layer.bias)
            config = LoraConfig(r=2, lora_alpha=3, target_modules=list(LAYERS), fan_in_fan_out=True)
            inject_adapter_in_model(config, self.net)

    ends = []
    for module in (Adapted(), Turned()):
        method = OrthogonalLoRA()
        for seed in (1, 2, 3):
            fit(module, data(seed), method)
        ends.append(module(torch.eye(6)))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def bad_module(what: str) -> Any:
    if what == "embedding":
        module = Adapted()
        from peft import LoraConfig, inject_adapter_in_model

        module.words = nn.ModuleDict({"table": nn.Embedding(4, 6)})
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["table"]), module.words)
        return module
    module = Adapted(**({"use_dora": True} if what == "dora" else {}))
    if what == "trained":
        module.net["first"].base_layer.weight.requires_grad_(True)
    return module


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (Classifier(), []), "OrthogonalLoRA trains LoRA adapters, and Classifier has none: pass peft="),
        (lambda: (bad_module("dora"), []), "net.first has another kind of adapter"),
        (lambda: (bad_module("trained"), []), "net.first trains its weight, too"),
        (lambda: (bad_module("embedding"), []), "words.table is a Embedding on a Embedding"),
        (lambda: (Adapted(), [EWC()]), "OrthogonalLoRA and EWC in one Trainer: EWC acts on the weights of the last"),
        (lambda: (Adapted(), [OSFT()]), "OrthogonalLoRA and OSFT in one Trainer"),
        (lambda: (Adapted(), [ShrinkPerturb()]), "OrthogonalLoRA and ShrinkPerturb in one Trainer"),
        (lambda: (Adapted(), [DriftTrigger()]), "OrthogonalLoRA starts the adapters where a fit starts, and DriftTr"),
    ],
)
def test_what_cannot_work_is_refused(make: Any, message: str) -> None:
    module, others = make()
    with pytest.raises(ValueError, match=message):
        fit(module, data(1), OrthogonalLoRA(), *others)


def test_adapters_of_other_layers_are_refused() -> None:
    method = OrthogonalLoRA()
    fit(Adapted(target_modules=["first"]), data(1), method)
    with pytest.raises(ValueError, match=r"has learned adapters of 'net\.first' and not of 'net\.second'"):
        fit(Adapted(), data(2), method)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": -1.0}, "strength must be finite and not negative, got -1.0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_arguments_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OrthogonalLoRA(**settings)
