"""OSFT: the share of an update in the protected space, the formula, and what is kept."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from evertune._lightning import pl
from evertune.callbacks import EWC, L2SP, OSFT
from evertune.callbacks.consolidation import end_experience
from evertune.shards import ReplicatedShards
from evertune.shards.subspaces import Subspaces
from tests.callbacks.test_ewc import Classifier, fit, flat_weights, loader
from tests.helpers.distributed import run_ranks
from tests.helpers.osft_worker import protected
from tests.helpers.shard_worker import make_bert

MATRICES = ("hidden.weight", "middle.weight")
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.5, momentum=0.9, weight_decay=0.1),
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=0.02, weight_decay=0.5),
}


class Deep(Classifier):
    """Two matrices, a tall and a wide one, and a head."""

    def __init__(self, optimizer: str = "adamw", **settings: Any) -> None:
        super().__init__(**settings)
        self.hidden, self.middle = nn.Linear(4, 10), nn.Linear(10, 6)
        self.optimizer = optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(torch.tanh(self.hidden(x)))))

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer](self.parameters())


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def leak(start: dict[str, Tensor], module: nn.Module, ratio: float = 0.5, sides: str = "either") -> float:
    """The largest share of the change of a matrix in its protected space."""
    end = weights(module)
    return max(protected(start[name], end[name], ratio, sides) for name in MATRICES)


# --- the protected space


class ProjectGradient(pl.Callback):
    """Projects gradients, as other libraries do: the same projection, before the step instead of after it."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        shards = ReplicatedShards(pl_module).only(MATRICES)
        ranks = {name: int(0.5 * min(shape)) for name, shape in shards.shapes.items()}
        self.subspaces = Subspaces(shards, shards.values(), ranks, "either")

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        gradients = ReplicatedShards(pl_module).only(MATRICES).gradients()
        self.subspaces.remove(MATRICES, dict(enumerate(gradients)))


@pytest.mark.parametrize("sides", ["either", "both"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_of_an_update_is_in_the_protected_space(optimizer: str, sides: Any) -> None:
    """With weight decay, momentum, clipping and accumulation, in each of two experiences."""
    module, osft = Deep(optimizer), OSFT((0.5, 0.75), sides)
    for seed, ratio in ((1, 0.5), (2, 0.75)):
        start = weights(module)
        fit(module, loader(seed), osft, max_epochs=3, gradient_clip_val=0.5, accumulate_grad_batches=2)
        assert leak(start, module, ratio, sides) < 1e-6
        for name, value in module.named_parameters():
            assert (value - start[name]).norm() > 1e-3


def test_where_only_the_gradient_is_projected_adamw_reaches_the_protected_space() -> None:
    found = {}
    for name, method in (("gradient", ProjectGradient()), ("update", OSFT(0.5))):
        module = Deep("adamw")
        start = weights(module)
        fit(module, loader(1), method, max_epochs=3)
        found[name] = leak(start, module)
    assert found["gradient"] > 0.1
    assert found["update"] < 1e-6


@pytest.mark.parametrize("sides", ["either", "both"])
def test_what_stays_of_a_matrix(sides: Any) -> None:
    """Every protected singular triplet; with "both", only its value."""
    module, osft = Deep(), OSFT(0.5, sides)
    start = weights(module)["middle.weight"].double()
    fit(module, loader(1), osft, max_epochs=3)
    left, values, right = torch.linalg.svd(start)
    u, s, v, now = left[:, :3], values[:3], right[:3].T, module.middle.weight.detach().double()
    torch.testing.assert_close(u.T @ now @ v, s.diag(), atol=1e-6, rtol=0)
    errors = ((now @ v - u * s).abs().max(), (u.T @ now - s[:, None] * v.T).abs().max())
    assert max(errors) < 1e-6 if sides == "either" else min(errors) > 1e-2


def test_another_method_that_moves_the_weights_after_the_step_is_projected_too() -> None:
    """Wherever it stands, and although its name comes later."""

    class ZMoves(L2SP):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            super().on_train_start(trainer, pl_module)
            for anchor in self.tensors["anchor"]:
                anchor.add_(1.0)

    found = []
    for turn in (1, -1):
        module = Deep()
        start = weights(module)
        fit(module, loader(1), *[ZMoves(5.0, coupling="decoupled"), OSFT(0.5)][::turn], max_epochs=2)
        assert leak(start, module) < 1e-6
        found.append(flat_weights(module))
    assert torch.equal(*found)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_in_mixed_precision_the_fp32_weights_are_projected(precision: Any) -> None:
    module = Deep()
    start = weights(module)
    fit(module, loader(1), OSFT(0.5), max_epochs=3, precision=precision)
    assert leak(start, module) < 1e-6


# --- the formula


def by_hand(module: Deep, seed: int, ratio: float, sides: str, steps: int) -> None:
    """An experience in float64, from the paper, with the projection on what each step has changed."""
    optimizer = OPTIMIZERS[module.optimizer](module.parameters())
    parameters = dict(module.named_parameters())
    projectors = {}
    for name in MATRICES:
        left, _, right = torch.linalg.svd(parameters[name].detach())
        r = int(ratio * min(parameters[name].shape))
        projectors[name] = left[:, :r] @ left[:, :r].T, right[:r].T @ right[:r]
    for x, y in list(loader(seed))[:steps]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x.double()), y).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        old = weights(module)
        optimizer.step()
        for name, (u, v) in projectors.items():
            with torch.no_grad():
                change = parameters[name] - old[name]
                change = change - u @ change @ v if sides == "both" else change - u @ change - (change - u @ change) @ v
                parameters[name].copy_(old[name] + change)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("sides", ["either", "both"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_as_in_the_paper(optimizer: str, sides: Any, steps: int) -> None:
    """After one step and after two experiences, of which the second protects more."""
    module, osft = Deep(optimizer), OSFT((0.5, 0.75), sides)
    double = copy.deepcopy(module).double()
    for seed, ratio in ((1, 0.5), (2, 0.75)):
        assert osft.ratio == ratio
        fit(module, loader(seed), osft, max_steps=steps, gradient_clip_val=0.5)
        by_hand(double, seed, ratio, sides, steps)
        torch.testing.assert_close(flat_weights(module).double(), flat_weights(double), rtol=1e-4, atol=1e-5)
    free = Deep(optimizer)
    for seed in (1, 2):
        fit(free, loader(seed), max_steps=steps, gradient_clip_val=0.5)
    assert (flat_weights(free) - flat_weights(module)).abs().max() > 1e-3


def test_the_share_of_the_last_experiences() -> None:
    osft = OSFT()
    found = []
    for osft.experience_index in range(5):
        found.append(osft.ratio)
    assert found == [0.3, 0.5, 0.7, 0.7, 0.7]
    assert repr(OSFT(0.25)) == "<OSFT: experiences: 0 learned, the next update protects 25%>"


def test_all_directions() -> None:
    """Then nothing of the matrices moves but by rounding, and all else does."""
    module = Deep()
    start = weights(module)
    fit(module, loader(1), OSFT(1.0))
    for name, value in module.named_parameters():
        moved = float((value - start[name]).abs().max())
        assert moved < 1e-6 if name in MATRICES else moved > 1e-3


def test_an_experience_that_ends_within_a_fit() -> None:
    """What is protected next are the directions of the weights at its end."""

    class Ends(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if trainer.global_step == 5:
                end_experience([osft], trainer, pl_module)
                self.middle = weights(pl_module)

    module, osft, ends = Deep(), OSFT((0.5, 0.75)), Ends()
    start = weights(module)
    fit(module, loader(1), osft, ends, max_epochs=2)
    for name in MATRICES:
        assert protected(start[name], ends.middle[name], 0.5) < 1e-6
    assert leak(ends.middle, module, 0.75) < 1e-6
    assert osft.experience_index == 2


# --- which matrices


class Words(Classifier):
    """An embedding that the output layer shares."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        bags = torch.softmax(nn.functional.linear(x, self.out.weight), -1) @ self.embed.weight
        return super().forward(bags)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["hidden.weight"]),
        ({"embeddings": True}, ["hidden.weight", "embed.weight"]),
        ({"exclude": ()}, ["hidden.weight", "head.weight"]),
        ({"exclude": ("hidden",)}, ["head.weight"]),
    ],
)
def test_which_matrices_are_protected(settings: dict[str, Any], expected: list[str]) -> None:
    module, osft, found = Words(), OSFT(0.5, **settings), []

    class Looks(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            assert osft._state is not None
            found[:] = osft._state.shapes

    start = weights(module)
    fit(module, loader(1), osft, Looks(), max_epochs=2)
    assert found == expected
    for name, value in module.named_parameters():
        if value.ndim == 2:
            assert (protected(start[name], value.detach(), 0.5) < 1e-4) == (name in expected)


def test_frozen_matrices_stay_and_a_head_that_grows_learns() -> None:
    module, osft = Deep(), OSFT(0.5)
    module.middle.requires_grad_(False)
    start = weights(module)
    fit(module, loader(1), osft)
    assert torch.equal(module.middle.weight, start["middle.weight"])
    module.middle.requires_grad_(True)
    module.head = nn.Linear(6, 5)
    start = weights(module)
    fit(module, loader(2, classes=5), osft, max_epochs=3)
    assert leak(start, module) < 1e-6


# --- what is kept


class Save(pl.Callback):
    """Writes a checkpoint after a step; or raises there."""

    def __init__(self, path: Path, step: int, crash: bool = False) -> None:
        self.path, self.step, self.crash = path, step, crash

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            if self.crash:
                raise RuntimeError("power cut")


def test_resumed_in_the_middle_of_an_update_it_ends_in_the_same_bits(tmp_path: Path) -> None:
    module, osft = Deep(), OSFT((0.5, 0.75))
    fit(module, loader(1), osft)
    before, second = copy.deepcopy(module), copy.deepcopy(osft)
    fit(module, loader(2), osft, Save(tmp_path / "middle.ckpt", 5), max_epochs=2)
    resumed = OSFT((0.5, 0.75))
    fit(before, loader(2), resumed, max_epochs=2, ckpt=tmp_path / "middle.ckpt")
    assert torch.equal(flat_weights(before), flat_weights(module))
    assert resumed.experience_index == osft.experience_index == 2
    assert second.experience_index == 1


def test_an_update_that_failed_is_forgotten(tmp_path: Path) -> None:
    module, osft = Deep(), OSFT(0.5)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(module, loader(1), osft, Save(tmp_path / "middle.ckpt", 3, crash=True))
    assert osft.experience_index == 0
    twin = copy.deepcopy(module)
    fit(module, loader(2), osft)
    fit(twin, loader(2), OSFT(0.5))
    assert torch.equal(flat_weights(module), flat_weights(twin))


def test_saved_between_two_updates_it_is_the_number_of_experiences(tmp_path: Path) -> None:
    module, osft, other = Deep(), OSFT((0.5, 0.75)), OSFT((0.5, 0.75))
    fit(module, loader(1), osft)
    osft.save(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1_000
    other.load(tmp_path)
    assert (other.experience_index, other.ratio) == (1, 0.75)
    twin = copy.deepcopy(module)
    fit(module, loader(2), osft)
    fit(twin, loader(2), other)
    assert torch.equal(flat_weights(module), flat_weights(twin))
    with pytest.raises(ValueError, match=r"holds the tensors \['start'\], but EWC keeps"):
        EWC().load(tmp_path)


# --- on several processes

TWO = ["ddp", *(f"evertune_deepspeed_stage_{stage}" for stage in (1, 2, 3)), "evertune_fsdp2"]
OTHERS = ["evertune_deepspeed_stage_2_offload", "evertune_deepspeed_stage_3_offload", "stage 3 in parts"]
RUNS = [{"optimizer": optimizer, "sides": sides} for optimizer in ("adamw", "sgd") for sides in ("either", "both")]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bert(tmp_path_factory.mktemp("bert"))


def check_leaks(bert: str, strategy: str, runs: list[dict[str, Any]]) -> None:
    for rank in run_ranks("tests.helpers.osft_worker:leaks", 2, folder=bert, strategy=strategy, runs=runs):
        for run, found in zip(runs, rank, strict=True):
            assert all(share < 1e-6 for share in found.values()), (strategy, run, found)


@pytest.mark.parametrize("strategy", TWO)
def test_on_two_ranks_nothing_of_an_update_is_in_the_protected_space(bert: str, strategy: str) -> None:
    """With AdamW, weight decay and clipping, in each of two experiences, on the fp32 masters."""
    check_leaks(bert, strategy, RUNS[:1])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [*TWO, *OTHERS])
def test_on_two_ranks_with_other_settings(bert: str, strategy: str) -> None:
    more = [{**RUNS[0], "precision": "bf16-mixed"}, {**RUNS[0], "accumulation": 3}]
    check_leaks(bert, strategy, RUNS[1:] + more)


@pytest.mark.parametrize(
    "strategy",
    [
        "evertune_deepspeed_stage_2",
        *(pytest.param(one, marks=pytest.mark.slow) for one in TWO if one != "evertune_deepspeed_stage_2"),
    ],
)
def test_on_two_ranks_a_resumed_update_ends_in_the_same_bits(bert: str, strategy: str, tmp_path: Path) -> None:
    target = "tests.helpers.osft_worker:resume"
    whole, resumed = (
        run_ranks(target, 2, folder=bert, out=str(tmp_path), strategy=strategy, part=part)
        for part in ("whole", "resumed")
    )
    assert whole[0]
    assert resumed == whole


def test_what_two_ranks_saved_within_an_update_gives_the_same_next_step_on_one_and_two(
    bert: str, tmp_path: Path
) -> None:
    start = functools.partial(run_ranks, folder=bert, out=str(tmp_path))
    start("tests.helpers.osft_worker:learn_and_save", 2)
    step = "tests.helpers.osft_worker:load_and_step"
    start(step, 1, strategy="auto")
    start(step, 1, strategy="auto", load=False)
    start(step, 2, strategy="evertune_deepspeed_stage_3")
    start(step, 2, strategy="evertune_fsdp2")
    one, fresh, *two = (
        load_file(tmp_path / f"{name}.safetensors")
        for name in ("auto", "fresh", "evertune_deepspeed_stage_3", "evertune_fsdp2")
    )
    for other in two:
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-7)
    assert max(float((fresh[name] - value).abs().max()) for name, value in one.items()) > 1e-4


# --- what cannot work


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_ratio": 0.0}, "rank_ratio must be above 0 and at most 1, got 0.0"),
        ({"rank_ratio": (0.5, 1.5)}, "rank_ratio must be above 0 and at most 1, got 1.5"),
        ({"rank_ratio": ()}, "rank_ratio must not be empty: give the share of the first update"),
        ({"sides": "left"}, "sides must be 'either' or 'both', got 'left'"),
        ({"exclude": "head"}, "exclude must be a collection of names, got the string 'head'"),
    ],
)
def test_arguments_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OSFT(**settings)


def test_what_cannot_work_is_refused_before_the_first_step() -> None:
    module = Deep()
    before = flat_weights(module)
    with pytest.raises(ValueError, match=r"OSFT finds no matrix to protect: no layer of Deep .* outside of \['head'"):
        fit(module, loader(1), OSFT(exclude=("head", "hidden", "middle")))
    with pytest.raises(ValueError, match=r"rank_ratio=0.1 protects nothing: the largest matrix has 6 directions"):
        fit(module, loader(1), OSFT(0.1))
    assert torch.equal(flat_weights(module), before)
    with pytest.raises(ValueError, match=r"OSFT needs weights .* in float32, but hidden.weight is torch.bfloat16"):
        fit(Deep(), loader(1), OSFT(), precision="bf16-true")
    with pytest.raises(ValueError, match="OSFT works with one optimizer, got 2"):
        fit(Classifier(n_optimizers=2), loader(1), OSFT())
