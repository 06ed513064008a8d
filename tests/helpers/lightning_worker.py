"""What runs in a process that has one Lightning only, or both: each way of using evertune, once."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.helpers.quiet import QUIET

ROOTS = {"lightning.pytorch": ["lightning"], "pytorch_lightning": ["pytorch_lightning", "lightning_fabric"]}


def hide(package: str) -> None:
    """Let this process believe that one of the packages is not installed."""
    for root in ROOTS[package]:
        sys.modules[root] = None  # type: ignore[assignment]


def classifier(pl: ModuleType) -> Any:
    """A module as an existing project has it, of one of the packages."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    class Classifier(pl.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(6, 3)

        def forward(self, x: Any) -> Any:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def data(self) -> DataLoader[Any]:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(48, 6, generator=generator)
            return DataLoader(TensorDataset(x, torch.randint(3, (48,), generator=generator)), batch_size=8)

        train_dataloader = val_dataloader = data

    return Classifier()


def fit_with_callbacks(pl: ModuleType, folder: str) -> list[float]:
    """Two fits with every kind of callback, and a checkpoint; returns the weights."""
    from evertune.callbacks import EWC, ContinualEvaluation, DriftTrigger, Replay, UpdateCheckpoint
    from evertune.drift import MMD

    drift = DriftTrigger(MMD(arl=5_000, reference_size=16, window_size=4), lambda batch: batch[0])
    evaluation = ContinualEvaluation(split="val")
    replay = Replay(memory_size=20)
    callbacks = [UpdateCheckpoint(Path(folder) / "steps", 2), replay, EWC(ewc_lambda=1.0), evaluation, drift]
    module = classifier(pl)
    settings = QUIET | {"enable_checkpointing": True, "default_root_dir": folder}
    for _ in range(2):
        trainer = pl.Trainer(max_epochs=1, accelerator="cpu", devices=1, callbacks=[*callbacks], **settings)
        trainer.fit(module)
        assert trainer.callbacks[-1] is callbacks[0], "checkpoint callbacks come last"
    assert len(replay.memory) == 20
    assert len(evaluation.accuracy_matrix) == 2
    assert drift.detector.state_dict()
    return [round(x, 6) for x in module.net.weight.flatten().tolist()]


def fit_under_deepspeed(pl: ModuleType) -> None:
    """A strategy by its name."""
    from evertune.callbacks import EWC

    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        strategy="evertune_deepspeed_stage_2",
        callbacks=[EWC(ewc_lambda=1.0, n_examples=8)],
        **QUIET,
    )
    trainer.fit(classifier(pl))
    assert isinstance(trainer.strategy, pl.strategies.DeepSpeedStrategy)


def alone(package: str, folder: str) -> dict[str, Any]:
    """Callbacks, strategy, stream and live update with one package, the other not installed."""
    other = next(one for one in ROOTS if one != package)
    hide(other)
    import evertune

    pl = import_module(package)
    weights = fit_with_callbacks(pl, folder)
    fit_under_deepspeed(pl)
    from evertune.streams import Experience
    from tests.helpers import live_worker
    from tests.helpers.shard_worker import CLASSES, Sentences, SmallBert, make_bert

    trainer = evertune.ContinualTrainer(max_epochs=1, accelerator="cpu", devices=1, **QUIET)
    assert isinstance(trainer, pl.Trainer)
    sentences = [Sentences(12, CLASSES, seed) for seed in (1, 2)]
    stream = [Experience(str(n), data, test=data, classes=CLASSES) for n, data in enumerate(sentences)]
    history = trainer.fit_stream(SmallBert(make_bert(f"{folder}/small"), CLASSES, "sgd"), stream, _batches)
    fit_by_command(Path(folder))
    live = Path(folder) / "live"
    live_worker.prepare(live)
    live_worker.feed(live, "first", ["business", "sport"], 40)
    outcome = live_worker.run(str(live))
    return {
        "weights": weights,
        "rows": len(history.accuracy_matrix),
        "status": outcome["status"],
        "foreign": sorted(name for name in sys.modules if name.split(".")[0] in ROOTS[other] and sys.modules[name]),
    }


def fit_by_command(folder: Path) -> None:
    """``evertune fit``, whose command line checks the callbacks by their class."""
    from evertune.cli.main import main
    from tests.cli.test_main import CONFIG
    from tests.helpers.lightning_modules import TEXTS, tiny_bert

    here = Path.cwd()
    os.chdir(folder)
    tiny_bert("bert")
    rows = [{"text": text, "label": name} for name, texts in TEXTS.items() for text in texts * 4]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("stream.yaml").write_text(CONFIG)
    try:
        main(["fit", "--config", "stream.yaml", "--trainer.max_epochs", "1"])
    except SystemExit as end:
        assert end.code == 0, end.code
    assert Path("run/history.json").is_file()
    os.chdir(here)


def _batches(experience: Any) -> Any:
    from evertune.streams import ExperienceDataModule
    from evertune.tasks.texts import PadCollator

    return ExperienceDataModule(experience, batch_size=6, collate_fn=PadCollator(0), label="labels")


def both(folder: str) -> dict[str, Any]:
    """Both packages in one process, evertune between them; what cannot be decided is refused."""
    from evertune.callbacks import EWC, Heartbeat

    callback = EWC(ewc_lambda=1.0)  # made with whichever is found first
    packages = [import_module(package) for package in reversed(ROOTS)]
    assert all(isinstance(callback, pl.Callback) and isinstance(Heartbeat(), pl.Callback) for pl in packages)
    weights = [fit_with_callbacks(pl, f"{folder}/{pl.__name__}") for pl in packages]
    for pl in packages:
        fit_under_deepspeed(pl)
    try:
        from evertune import ContinualTrainer  # noqa: F401

        refusal = ""
    except ImportError as error:
        refusal = str(error)
    return {"weights": weights, "refusal": refusal}


def refused(package: str) -> str:
    """What a ContinualTrainer of one package says to a module of the other."""
    import evertune

    pl, other = (import_module(one) for one in (package, next(one for one in ROOTS if one != package)))
    trainer = evertune.ContinualTrainer(max_epochs=1, accelerator="cpu", devices=1, **QUIET)
    assert isinstance(trainer, pl.Trainer)
    messages = []
    for attempt in (
        lambda: trainer.fit_stream(classifier(other), [1]),
        lambda: evertune.ContinualTrainer(strategy=other.strategies.SingleDeviceStrategy("cpu")),
        lambda: evertune.ContinualTrainer(callbacks=other.callbacks.ModelCheckpoint()),
    ):
        try:
            attempt()
        except TypeError as error:
            messages.append(str(error))
    return "\n".join(messages)


def two_ranks(folder: str, out: str) -> None:
    """Two ranks that learn with the package of this process; their weights are written to ``out``."""
    from tests.helpers.distributed import run_ranks

    runs = [{"method": "replay+ewc", "optimizer": "sgd", "accumulation": 1}]
    Path(out).mkdir(parents=True)
    settings = {"folder": folder, "out": out, "strategy": "evertune_deepspeed_stage_3", "runs": runs}
    run_ranks("tests.helpers.shard_worker:learn_two", 2, **settings)


if __name__ == "__main__":
    function, *arguments = sys.argv[1:]
    print(json.dumps(globals()[function](*arguments)))
