"""How far an update has come, as another process reads it while it runs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from evertune._lightning import pl
from evertune.live.plan import Plan
from evertune.live.progress import Progress, progress_of
from evertune.live.staging import STEPS, claim
from evertune.live.steps import Steps
from evertune.registry.lease import holder
from evertune.registry.registry import Registry
from tests.helpers.live_worker import feed, prepare, updater


class Line(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path) -> None:
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=[Steps(folder)], devices=1, **settings)
    trainer.fit(Line(), DataLoader(torch.ones(8, 1), batch_size=1))


def test_steps_are_noted_and_counted(tmp_path: Path) -> None:
    fit(tmp_path)
    assert json.loads((tmp_path / STEPS).read_text()) == {"step": 8, "steps": 8}
    fit(tmp_path / "none")  # where nothing can be written, training goes on
    assert [path.name for path in tmp_path.iterdir()] == [STEPS]


def test_an_update_is_seen_from_outside(tmp_path: Path) -> None:
    prepare(tmp_path)
    feed(tmp_path, "a", ["business", "sport"], n=30)
    live, seen = updater(tmp_path), list[tuple[Progress | None, str]]()

    class Looking(pl.Callback):
        across_experiences = True

        def on_train_end(self, *_: object) -> None:
            found = holder(live.registry.store)
            seen.append((progress_of(live.registry.store.local("staging")), "" if found is None else found.words))

    live.trainer = live.trainer.copy_with([Looking()])
    assert live.run().status == "promoted"
    ((progress, writer),) = seen
    assert progress is not None and progress.stage == "training" and progress.plan.version == 1
    assert progress.step is not None and progress.steps is not None and 0 <= progress.step <= progress.steps
    assert "(process " in writer
    assert progress_of(live.registry.store.local("staging")) is None
    assert holder(live.registry.store) is None


def test_steps_of_another_plan_are_not_shown(tmp_path: Path) -> None:
    plan = Plan(
        version=1, parent=None, kind="first", after=0, consumed=1, offset=None, reason="", created="", config=""
    )
    plan.save(tmp_path)
    (tmp_path / STEPS).write_text('{"step": 7, "steps": 8}')
    claim(tmp_path, plan)
    assert progress_of(tmp_path) == Progress(plan, "training")
    (tmp_path / STEPS).write_text("{")
    assert progress_of(tmp_path) == Progress(plan, "training")


def test_whoever_writes_is_named_until_it_has_ended(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    assert holder(registry.store) is None
    with registry.lease("a watch"):
        found = holder(registry.store)
        assert found is not None and found.words.startswith("a watch (process ") and found.since
    assert holder(registry.store) is None
    registry.store.write("lease/9.json", b"{")
    found = holder(registry.store)
    assert found is not None and "another process" in found.words
