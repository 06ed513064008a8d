"""What evertune refuses, and what it says: each by message, before anything is lost."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from evertune._lightning import ModelCheckpoint, pl
from evertune.callbacks import EWC, ContinualEvaluation, DarkReplay, DriftTrigger, Replay
from evertune.shards.opened import shards_of
from evertune.strategies import EvertuneDeepSpeedStrategy
from tests.helpers.distributed import run_ranks

FSDPStrategy, ModelParallelStrategy = pl.strategies.FSDPStrategy, pl.strategies.ModelParallelStrategy

METHODS = {
    "Replay": lambda: Replay(memory_size=4),
    "DarkReplay": lambda: DarkReplay(memory_size=4),
    "EWC": EWC,
    "DriftTrigger": DriftTrigger,
    "ContinualEvaluation": ContinualEvaluation,
}


class Plain(pl.LightningModule):
    """Knows nothing of evertune."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    return pl.Trainer(
        **{"max_epochs": 1, "accelerator": "cpu", "devices": 1, "callbacks": list(callbacks)} | quiet | settings,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def loader(n: int = 8) -> DataLoader[Any]:
    return DataLoader([(torch.randn(4), i % 3) for i in range(n)], batch_size=4)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (
            FSDPStrategy,
            r"does not support strategy 'fsdp' \(FSDP of version 1, which flattens the weights: 'evertune_fsdp2' "
            r"shards each of them\); use one device, 'ddp', 'evertune_deepspeed_stage_1', '_2' or '_3', "
            r"or 'evertune_fsdp2'",
        ),
        (
            ModelParallelStrategy,
            "does not support strategy 'ModelParallelStrategy': 'evertune_fsdp2' shards the module itself, .*; use one",
        ),
        (
            "ddp_spawn",
            "does not support the 'spawn' launcher .* would be lost with the copied process; use strategy='ddp'",
        ),
        ("ddp_fork", "does not support the 'fork' launcher"),
        ("ddp_notebook", "does not support the 'fork' launcher"),
    ],
)
def test_strategies_that_are_not_supported(name: str, strategy: Any, message: str) -> None:
    method = METHODS[name]()
    if isinstance(strategy, str):
        one = trainer(method, strategy=strategy, devices=2)
    else:  # Lightning builds these on GPUs only
        one = trainer(method)
        one._accelerator_connector.strategy = strategy()
    with pytest.raises(ValueError, match=f"^{name} {message}"):
        method.setup(one, Plain(), "fit")
    if name == "EWC":
        with pytest.raises(ValueError, match=f"^shards_of {message}"):
            shards_of(one)


def test_ranks_that_would_train_on_the_same_data() -> None:
    method = Replay(memory_size=4)
    one = trainer(method, strategy=ModelParallelStrategy(), devices=2)
    message = "data_parallel_size=1 for 2 ranks: 2 of them would train on the same data; use .* 'evertune_fsdp2'$"
    with pytest.raises(ValueError, match=message):
        method.setup(one, Plain(), "fit")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 2, "round_robin_gradients": True}, "does not support round_robin_gradients=True: it reorders"),
        ({"stage": 0}, r"supports ZeRO stages 1, 2 and 3, got stage 0"),
        (None, r"supports ZeRO stages 1, 2 and 3, got stage 0"),
    ],
)
def test_deepspeed_settings_that_are_not_supported(name: str, zero: Any, message: str) -> None:
    method = METHODS[name]()
    config = {} if zero is None else {"zero_optimization": zero}
    one = trainer(method, strategy=EvertuneDeepSpeedStrategy(config=config))
    with pytest.raises(ValueError, match=f"^{name} {message}"):
        method.setup(one, Plain(), "fit")


def message_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def refused_under_zero(folder: str) -> dict[str, str]:
    """On one rank under ZeRO: what is said to settings and files that cannot work."""

    def fit(
        *callbacks: pl.Callback, n: int = 8, ckpt_path: Any = None, strategy: Any = None, **settings: Any
    ) -> pl.Trainer:
        one = trainer(*callbacks, strategy=strategy or "evertune_deepspeed_stage_2", **settings)
        one.fit(Plain(), loader(n), ckpt_path=ckpt_path)
        return one

    round_robin = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    said = {
        "accumulation": message_of(lambda: fit(n=20, accumulate_grad_batches=2)),
        "limited": message_of(lambda: fit(n=20, accumulate_grad_batches=2, limit_train_batches=4)),
        # the strategy itself says no, without a callback of evertune
        "round robin": message_of(lambda: fit(strategy=EvertuneDeepSpeedStrategy(config=round_robin))),
    }
    ewc = EWC(n_examples=4)
    fit(ewc)
    save = ModelCheckpoint(folder, filename="fit", every_n_train_steps=1, save_top_k=1)
    fit(ewc, save, enable_checkpointing=True)
    checkpoint = Path(save.best_model_path)
    said["whole"] = message_of(lambda: fit(EWC(n_examples=4), max_epochs=2, ckpt_path=checkpoint))
    (fragments,) = (checkpoint / "evertune" / "EWC").glob("*.safetensors")
    fragments.write_bytes(fragments.read_bytes()[:-4])
    said["sidecar"] = message_of(lambda: fit(EWC(n_examples=4), max_epochs=2, ckpt_path=checkpoint))
    return said


def test_refused_under_zero(tmp_path: Path) -> None:
    [said] = run_ranks("tests.callbacks.test_refusals:refused_under_zero", 1, folder=str(tmp_path))
    assert said["accumulation"] == (
        "ValueError: an epoch has 5 batches, which accumulate_grad_batches=2 does not divide: DeepSpeed would lose "
        "count of its steps; set limit_train_batches=4 or another accumulation"
    )
    assert said["limited"] == "no error"  # the way out that the message names
    assert said["round robin"].startswith(
        "ValueError: EvertuneDeepSpeedStrategy does not support round_robin_gradients=True"
    )
    assert said["whole"] == "no error"
    assert "evertune/EWC/fragments-00000-of-00001.safetensors is corrupt" in said["sidecar"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a fit with every method that works on any data."""
    path = tmp_path_factory.mktemp("checkpoint") / "fit.ckpt"
    one = trainer(Replay(memory_size=4), EWC(n_examples=4))
    one.fit(Plain(), loader())
    one.save_checkpoint(path)
    return path


def resume(path: Path, callbacks: list[pl.Callback]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(*callbacks, max_epochs=2).fit(Plain(), loader(), ckpt_path=path)


@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_a_truncated_checkpoint_restores_nothing(checkpoint: Path, tmp_path: Path, keep: float) -> None:
    """torch reads the file and says no in its own words; no method has taken up half of it."""
    whole = checkpoint.read_bytes()
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(whole[: int(keep * len(whole))])
    callbacks: list[Any] = [Replay(memory_size=4), EWC(n_examples=4)]
    with pytest.raises((RuntimeError, EOFError, OSError)):
        resume(cut, callbacks)
    assert [one.experience_index for one in callbacks] == [0, 0]
    assert len(callbacks[0].memory) == 0


def test_a_checkpoint_whose_memory_is_damaged(checkpoint: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    (replay,) = (value for name, value in state["callbacks"].items() if name.startswith("Replay"))
    whole = replay["memory"]["arrow"]
    for damaged in (whole[:-1], whole[:0], torch.cat([whole[:100], 255 - whole[100:101], whole[101:]])):
        replay["memory"]["arrow"] = damaged
        torch.save(state, tmp_path / "damaged.ckpt")
        with pytest.raises(ValueError, match="the memory in this checkpoint is corrupt or truncated"):
            resume(tmp_path / "damaged.ckpt", [Replay(memory_size=4), EWC(n_examples=4)])
    replay["memory"]["arrow"] = whole
    torch.save(state, tmp_path / "whole.ckpt")
    callbacks: list[Any] = [Replay(memory_size=4), EWC(n_examples=4)]
    resume(tmp_path / "whole.ckpt", callbacks)
    assert [one.experience_index for one in callbacks] == [2, 2]


def test_fragments_that_are_damaged_between_load_and_fit(tmp_path: Path) -> None:
    ewc = EWC(n_examples=4)
    trainer(ewc).fit(Plain(), loader())
    ewc.save(tmp_path)
    (fragments,) = tmp_path.glob("*.safetensors")
    whole = fragments.read_bytes()
    for keep in (0, 7, 60, len(whole) - 1):
        fragments.write_bytes(whole)
        other = EWC(n_examples=4)
        other.load(tmp_path)
        fragments.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=rf"{fragments.name} is not a safetensors file or is truncated"):
            trainer(other).fit(Plain(), loader())


@pytest.mark.parametrize(
    "content",
    ["[]", "null", "{}", '{"format": "evertune-fragments", "version": 2}', '{"format": "other", "version": 1}'],
)
def test_fragments_of_another_format(content: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json is not an index of format 'evertune-fragments' version 1"):
        EWC().load(tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_a_truncated_folder_of_a_method(name: str, tmp_path: Path) -> None:
    """Every JSON file that a method saves, cut anywhere, is refused by name and leaves the method as it was."""
    method = METHODS[name]()
    if name in ("EWC", "Replay"):
        trainer(method).fit(Plain(), loader())
    if name == "ContinualEvaluation":
        method.load_state_dict(
            {"experience_index": 2, "experiences": ["a", "b"], "accuracy_matrix": [[1.0], [0.5, 1.0]]}
        )
    method.save(tmp_path)
    files = list(tmp_path.glob("*.json"))
    assert files
    for path in files:
        whole = path.read_bytes().rstrip()
        for keep in range(0, len(whole), max(1, len(whole) // 8)):
            path.write_bytes(whole[:keep])
            other = METHODS[name]()
            with pytest.raises(ValueError, match=path.name.replace(".", r"\.")):
                other.load(tmp_path)
            assert other.experience_index == 0
        path.write_bytes(whole)
    METHODS[name]().load(tmp_path)


@pytest.mark.parametrize(
    ("name", "file"), [("ContinualEvaluation", "evaluation.json"), ("DriftTrigger", "drift_trigger.json")]
)
def test_a_folder_with_other_values(name: str, file: str, tmp_path: Path) -> None:
    for content in (
        [],
        {},
        {"experience_index": 1},
        {"experience_index": 1, "experiences": 3, "accuracy_matrix": 3, "history": 3},
    ):
        (tmp_path / file).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"{file} is not a saved {name}"):
            METHODS[name]().load(tmp_path)
    with pytest.raises(FileNotFoundError, match=file):
        METHODS[name]().load(tmp_path / "elsewhere")
