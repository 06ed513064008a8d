"""A stream's run that is killed and started again ends in the same bits as an undisturbed one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from evertune._lightning import pl
from evertune.callbacks import Replay
from evertune.metrics import History
from evertune.streams import Experience
from evertune.training.trainer import ContinualTrainer
from tests.helpers.distributed import run_ranks
from tests.helpers.lightning_modules import tiny_bert
from tests.helpers.run_worker import learn

BATCHES = 30
BOUNDARY, MIDDLE = 11, 18  # the first batch of the second experience; after its checkpoint at the third of ten steps


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("text_bert"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_files(folder: Path, other: Path) -> None:
    mine, theirs = files_of(folder), files_of(other)
    assert {"model/model.safetensors", "model/head.safetensors", "EWC/index.json"} <= mine.keys()
    assert mine.keys() == theirs.keys()
    assert [name for name, content in mine.items() if theirs[name] != content] == []


def test_a_run_goes_on_in_the_same_bits(bert: str, tmp_path: Path) -> None:
    """An error in the first batch of an experience, then one in its middle; in one process, which is quick."""
    whole = learn(bert, None, "auto", str(tmp_path / "whole"))
    assert whole["batches"] == BATCHES
    run = str(tmp_path / "run")
    for end_at, after in ((BOUNDARY, ["state-1"]), (MIDDLE - 10, ["checkpoints-1", "state-1"])):
        with pytest.raises(ZeroDivisionError):
            learn(bert, run, "auto", str(tmp_path / "parts"), end_at, kill=False)
        left = {path.name for path in (tmp_path / "run").iterdir()} - {"run.json", "step.json"}
        assert left == set(after)
    last = learn(bert, run, "auto", str(tmp_path / "parts"))
    assert last["batches"] == BATCHES - 10 - 6  # one experience, and two checkpoints' worth of the second
    assert last["matrix"] == whole["matrix"]
    same_files(tmp_path / "whole", tmp_path / "parts")
    complete = learn(bert, run, "auto", str(tmp_path / "again"))
    assert complete == {"matrix": whole["matrix"], "batches": 0}
    assert files_of(tmp_path / "again" / "model") == files_of(tmp_path / "whole" / "model")


@pytest.mark.slow
@pytest.mark.parametrize("end_at", [BOUNDARY, MIDDLE])
@pytest.mark.parametrize(
    ("strategy", "precision"),
    [
        ("ddp", "32-true"),
        ("evertune_deepspeed_stage_2", "32-true"),
        ("evertune_deepspeed_stage_3", "32-true"),
        ("evertune_fsdp2", "32-true"),
        ("evertune_deepspeed_stage_2", "bf16-mixed"),
    ],
)
def test_two_processes_that_are_killed(bert: str, strategy: str, precision: str, end_at: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"bert": bert, "strategy": strategy, "precision": precision}
    target = "tests.helpers.run_worker:learn"
    whole = run_ranks(target, 2, **settings, run_dir=str(tmp_path / "undisturbed"), out=str(tmp_path / "whole"))
    settings["run_dir"] = str(tmp_path / "run")
    with pytest.raises(RuntimeError, match="ended with -9"):
        run_ranks(target, 2, **settings, out=str(tmp_path / "parts"), end_at=end_at)
    last = run_ranks(target, 2, **settings, out=str(tmp_path / "parts"))
    assert [rank["batches"] for rank in last] == [BATCHES - 10 - (6 if end_at == MIDDLE else 0)] * 2
    assert [rank["matrix"] for rank in last] == [rank["matrix"] for rank in whole]
    same_files(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_fewer_processes_take_the_same_steps(bert: str, tmp_path: Path) -> None:
    """Two processes, then one, which accumulates; it was killed in the middle of the second experience."""
    target = "tests.helpers.run_worker:learn"
    settings: dict[str, Any] = {"bert": bert, "strategy": "ddp", "dropout": 0.0, "processes": 2}
    whole = run_ranks(target, 2, **settings, run_dir=None, out=str(tmp_path / "whole"))
    settings["run_dir"] = str(tmp_path / "run")
    with pytest.raises(RuntimeError, match="ended with -9"):
        run_ranks(target, 2, **settings, out=str(tmp_path / "parts"), end_at=MIDDLE)
    (last,) = run_ranks(target, 1, **settings | {"strategy": "auto"}, out=str(tmp_path / "parts"))
    assert last["batches"] == 2 * (BATCHES - 10 - 6)
    assert last["matrix"] == whole[0]["matrix"]
    for file in ("model.safetensors", "head.safetensors"):
        mine, theirs = (load_file(tmp_path / name / "model" / file) for name in ("parts", "whole"))
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-6)


class Linear(pl.LightningModule):
    """A module that knows nothing of evertune, with a weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.drop = nn.Dropout(0.5)
        self.stop_at = -1

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.drop(self.first(x)))
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.stop_at == 0:
            raise ZeroDivisionError
        self.stop_at -= 1
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_any_module(tmp_path: Path) -> None:
    rows = [(torch.eye(3)[i % 3], i % 3) for i in range(12)]
    stream = [Experience(str(number), rows, test=rows) for number in range(3)]

    def run(folder: Path | None, stop_at: int = -1) -> tuple[Linear, History]:
        torch.manual_seed(0)
        module = Linear()
        module.stop_at = stop_at
        quiet: dict[str, Any] = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        trainer = ContinualTrainer(max_epochs=1, accelerator="cpu", callbacks=[Replay(memory_size=4)], **quiet)
        return module, trainer.fit_stream(module, stream, run_dir=folder, checkpoint_every_n_steps=1)

    from evertune.streams import ExperienceDataModule

    plain_fit = ExperienceDataModule.__init__.__kwdefaults__["batch_size"]
    assert plain_fit > len(rows)  # one step for each experience
    whole, _ = run(None)
    for stop_at in (1, 0):
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "run", stop_at)
    assert (tmp_path / "run" / "state-1" / "weights.safetensors").is_file()
    record = tmp_path / "run" / "state-1" / "run.json"
    spent = json.loads(record.read_text())["seconds"]
    assert min(spent["training"], spent["replay"], spent["evaluation"], spent["other"]) > spent["importance"] == 0
    record.write_text(json.dumps({"seconds": {**spent, "replay": 1_000.0}}))
    resumed, history = run(tmp_path / "run")
    assert history.breakdown["replay"] > 1_000
    assert history.seconds == pytest.approx(sum(history.breakdown.values()))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert resumed.first.weight is resumed.second.weight


def test_the_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    from evertune.training.stream_run import StreamRun

    rows = [(torch.zeros(2), 0)]
    StreamRun(tmp_path, [Experience("a", rows), Experience("b", rows)], 10)
    assert [one["name"] for one in json.loads((tmp_path / "run.json").read_bytes())["experiences"]] == ["a", "b"]
    with pytest.raises(ValueError, match="over other experiences: 1 now, 2 then"):
        StreamRun(tmp_path, [Experience("a", rows)], 10)
    with pytest.raises(ValueError, match=r"'name': 'c'.* now, .*'name': 'b'.* then"):
        StreamRun(tmp_path, [Experience("a", rows), Experience("c", rows)], 10)
