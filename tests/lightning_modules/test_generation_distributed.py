"""Modules that generate texts on two real processes: they learn, write and save what one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from evertune._lightning import pl
from evertune.lightning_modules import CausalLMModule, Seq2SeqModule
from tests.helpers.distributed import run_ranks
from tests.helpers.generation import records, tiny_llama, tiny_t5
from tests.helpers.lightning_modules import tiny_bert
from tests.helpers.quiet import QUIET

ROWS = [*records("colours"), *records("sizes")]
MODULES: dict[str, Any] = {
    "causal": lambda folder: CausalLMModule(folder, learning_rate=1e-3, dropout=0.0, packing=True),
    "adapters": lambda folder: CausalLMModule(
        folder, learning_rate=1e-2, peft={"method": "lora", "r": 2, "target_modules": ["down_proj"]}
    ),
    "seq2seq": lambda folder: Seq2SeqModule(
        folder, learning_rate=1e-3, dropout=0.0, max_target_length=8, generation={"max_new_tokens": 4}
    ),
}
PRETRAINED = {"causal": tiny_llama, "adapters": tiny_llama, "seq2seq": tiny_t5, "warm start": tiny_bert}
MODULES["warm start"] = MODULES["seq2seq"]


def learn(folder: str, out: str, kind: str, strategy: str, devices: int) -> dict[str, Any]:
    """Two epochs of one global batch each, a test, and the folder."""
    pl.seed_everything(3)
    module = MODULES[kind](folder)
    columns = {"text": "prompt", "label": "answer", "id_column": None, "max_length": 24}
    dataset = module.task.dataset(ROWS, module.tokenizer, **columns)
    loader: Any = DataLoader(
        dataset, batch_size=len(ROWS) // devices, collate_fn=module.task.collator(module.tokenizer)
    )
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", devices=devices, strategy=strategy, **QUIET)
    trainer.fit(module, loader)
    (found,) = trainer.test(module, loader, verbose=False)
    module.save_pretrained(out)
    prompts = [row["prompt"] for row in ROWS[:3]]
    return {"said": module.predict(prompts, max_new_tokens=4), **{name: float(value) for name, value in found.items()}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "strategy"),
    [(kind, "evertune_deepspeed_stage_3") for kind in MODULES]
    + [(kind, strategy) for kind in ("causal", "seq2seq") for strategy in ("ddp", "evertune_fsdp2")],
)
def test_two_ranks_give_what_one_process_gives(tmp_path: Path, kind: str, strategy: str) -> None:
    folder = PRETRAINED[kind](tmp_path / "model")
    one = learn(folder, str(tmp_path / "one"), kind, "auto", 1)
    ranks = run_ranks(
        f"{__name__}:learn",
        2,
        folder=folder,
        out=str(tmp_path / "two"),
        kind=kind,
        strategy=strategy,
        devices=2,
    )
    for rank in ranks:
        assert rank.pop("said") == one["said"]
        assert rank == pytest.approx({name: value for name, value in one.items() if name != "said"}, rel=1e-4)
    names = ("model.safetensors", "head.safetensors") if kind == "adapters" else ("model.safetensors",)
    for name in names:
        expected, found = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert torch.allclose(found[key], value, rtol=1e-4, atol=2e-5), key
