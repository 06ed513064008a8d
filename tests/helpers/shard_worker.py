"""What every rank runs in the tests of sharded training: a small BERT learns, then tells its weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils.data import Dataset

from evertune import callbacks
from evertune._lightning import pl
from evertune.callbacks import (
    ERACE,
    EWC,
    ContinualCallback,
    DarkReplay,
    Distillation,
    Imprinting,
    LogitAdjustment,
    Replay,
    WiSEFT,
)
from evertune.lightning_modules import SequenceClassificationModule
from evertune.lightning_modules.heads import HeadKind
from evertune.lightning_modules.saving import whole_state
from evertune.streams import Experience, ExperienceDataModule
from evertune.tasks.texts import PadCollator
from evertune.utils.batches import logits_of
from tests.helpers.l2sp import L2SP
from tests.helpers.quiet import QUIET

CLASSES = ["a", "b", "c"]
GLOBAL_BATCH = 12
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))  # read at once: Lightning removes it when a fit ends
DEVICES = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def make_bert(folder: str | Path) -> str:
    """Write a small BERT with random weights to a folder."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


class Sentences(Dataset[dict[str, Any]]):
    """Random token sequences with a label each, as a tokenised dataset gives them."""

    def __init__(self, n: int, classes: list[str], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 9, (n,), generator=generator).tolist()
        self.examples = [
            {"input_ids": torch.randint(1, 40, (length,), generator=generator), "labels": classes[i % len(classes)]}
            for i, length in enumerate(lengths)
        ]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.examples[index]


class SmallBert(SequenceClassificationModule):
    """Without dropout, with the optimizer asked for."""

    def __init__(
        self, folder: str, classes: list[str], optimizer: str, head: HeadKind = "linear", peft: Any = None
    ) -> None:
        super().__init__(folder, classes=classes, dropout=0.0, head=head, peft=peft)
        self.optimizer_name = optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.optimizer_name == "sgd":
            return torch.optim.SGD(trained, lr=0.05, momentum=0.9)
        # some gradients (of the key biases) are zero but for rounding, which a smaller eps would blow up to full steps
        return torch.optim.AdamW(trained, lr=1e-3, eps=1e-5)


def experience(name: str, n_steps: int, classes: list[str], seed: int) -> Experience:
    return Experience(name, Sentences(n_steps * GLOBAL_BATCH, classes, seed), classes=classes)


def fit(
    module: pl.LightningModule,
    data: Experience,
    strategy: str,
    accumulation: int,
    callbacks: list[pl.Callback],
    ckpt_path: str | Path | None = None,
    precision: Any = "32-true",
    **settings: Any,
) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=DEVICES,
        num_nodes=WORLD_SIZE // DEVICES,
        strategy=strategy,
        precision=precision,
        accumulate_grad_batches=accumulation,
        callbacks=callbacks,
        **QUIET,
        **settings,
    )
    batches = ExperienceDataModule(
        data, batch_size=GLOBAL_BATCH // WORLD_SIZE // accumulation, collate_fn=PadCollator(0), label="labels"
    )
    trainer.fit(module, datamodule=batches, ckpt_path=ckpt_path)
    return trainer


class LogitDecay(ContinualCallback):
    """Adds the mean square of the logits to the loss."""

    def loss_term(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> torch.Tensor:
        return logits_of(module, batch).square().mean()


LORA = {"method": "lora", "r": 2, "target_modules": ["query", "dense"]}
ADAPTERS = {
    "dora": {**LORA, "use_dora": True},
    "ia3": {"method": "ia3", "target_modules": ["query", "dense"], "feedforward_modules": ["dense"]},
    "lora": LORA,
    "bottleneck": {"method": "bottleneck", "reduction_factor": 8},
}
"""By a part of the method's name."""


def methods(name: str) -> list[pl.Callback]:
    made: dict[str, Any] = {
        "replay": lambda: [Replay(memory_size=30, replay_ratio=1.0)],
        "ewc": lambda: [EWC(ewc_lambda=50.0, n_examples=30, batch_size=4)],
        "l2sp": lambda: [L2SP(strength=0.01)],
        "pretrained": lambda: [callbacks.L2SP(strength=2.0, coupling="decoupled")],
        "mas": lambda: [callbacks.MAS(strength=20.0, n_examples=30, batch_size=4)],
        "si": lambda: [callbacks.SynapticIntelligence(strength=20.0, coupling="decoupled")],
        "osft": lambda: [callbacks.OSFT((0.3, 0.6))],
        "agem": lambda: [callbacks.AGEM(reference_size=12)],
        "gem": lambda: [callbacks.GEM(reference_size=12, margin=0.1)],
        "ema": lambda: [callbacks.EMA(decay=0.8)],
        "perturb": lambda: [callbacks.ShrinkPerturb(shrink=0.9, noise=0.02)],
        "loss": lambda: [LogitDecay()],
        "imprint": lambda: [Imprinting(examples_per_class=20)],
        "distil": lambda: [Distillation(examples="all")],
        "unknown": lambda: [Distillation(2.0, examples="all", unknown_only=True)],
        "wise": lambda: [WiSEFT((0.25, 0.5))],
        "erace": lambda: [ERACE("batch")],
        "dark": lambda: [DarkReplay(memory_size=30, alpha=0.5, beta=0.5)],
        "mir": lambda: [callbacks.MIR(memory_size=30, candidates=3, step_size=0.2)],
        "seq": lambda: [callbacks.SEQ()],
        "fgm": lambda: [callbacks.AdversarialTraining(epsilon=0.5)],
        "augment": lambda: [callbacks.Augmentation(deletion=0.2, swap=0.3, cutoff=0.2, share=0.8)],
        "freelb": lambda: [callbacks.AdversarialTraining("freelb", epsilon=0.5, steps=2)],
        "adjust": lambda: [LogitAdjustment()],
        "inflora": lambda: [callbacks.InfLoRA(energy=0.8)],
        "lora-ties": lambda: [callbacks.MergedAdapters("ties", "pretrained", density=0.5)],
        "lora-max": lambda: [callbacks.MergedAdapters("magnitude")],
        "dora": list,
        "ia3": list,
        "bottleneck": list,
        "olora": lambda: [callbacks.OrthogonalLoRA(strength=5.0)],
    }
    return [callback for part in name.split("+") for callback in made[part]()]


def learn_two(folder: str, out: str, strategy: str, runs: list[dict[str, Any]]) -> None:
    """Learn two experiences (the second in 20 steps) with each method and write the weights after each run."""
    for run in runs:
        head: HeadKind = "cosine" if "imprint" in run["method"] else "linear"
        peft = next((settings for name, settings in ADAPTERS.items() if name in run["method"]), None)
        module = SmallBert(folder, CLASSES, run["optimizer"], head, peft)
        used = methods(run["method"])
        pl.seed_everything(1, verbose=False)
        fit(module, experience("first", 6, ["a", "b"], 1), strategy, run["accumulation"], list(used))
        fit(module, experience("second", 20, ["b", "c"], 2), strategy, run["accumulation"], list(used))
        state = whole_state(module)
        if state:
            save_file(state, Path(out) / f"{run['method']}-{run['optimizer']}-{run['accumulation']}.safetensors")
