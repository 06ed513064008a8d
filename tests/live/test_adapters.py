"""A life with adapters: each update trains one, and publishes what it has trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import evertune
from evertune._lightning import pl
from evertune.callbacks import LogitAdjustment, OrthogonalLoRA, Replay
from tests.helpers.lightning_modules import TEXTS
from tests.helpers.live_worker import feed, prepare, updater

ASKED = [text for texts in TEXTS.values() for text in texts]
QUERY = "backbone.encoder.layer.0.attention.self.query"
RANK = 2


class Trained(pl.Callback):
    """The weights with which each fit starts and ends, and the answers then, also if it runs with a copy of this."""

    def __init__(self) -> None:
        self.starts: list[dict[str, torch.Tensor]] = []
        self.ends: list[dict[str, torch.Tensor]] = []
        self.answers: list[list[dict[str, float]]] = []

    def __deepcopy__(self, _: Any) -> Trained:
        return self

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0:
            self.starts.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.ends.append({name: value.clone() for name, value in pl_module.state_dict().items()})
        self.answers.append(pl_module.predict(ASKED))


def test_each_update_publishes_what_it_has_trained_and_starts_from_the_one_before(tmp_path: Path) -> None:
    prepare(tmp_path)
    trained, registry = Trained(), tmp_path / "registry"

    def update() -> None:
        """As a new process does it: with a new module and new methods."""
        methods = [Replay(memory_size=30, id="id"), LogitAdjustment(), OrthogonalLoRA(), trained]
        lora = {"method": "lora", "r": RANK, "target_modules": ["query", "value"]}
        live = updater(tmp_path, model={"peft": lora}, trainer={"callbacks": methods})
        assert live.run().status == "promoted"

    def learned(number: int) -> dict[str, torch.Tensor]:
        method = OrthogonalLoRA()
        method.load(registry / f"versions/{number}/learning/OrthogonalLoRA")
        assert method.experience_index == number
        return method.kept

    feed(tmp_path, "a", ["business", "sport"], n=40)
    update()
    with evertune.load(registry) as served:
        assert served.predict(ASKED) == trained.answers[0]
        first = {name: value.clone() for name, value in served.module.state_dict().items()}
    assert first.keys() == trained.ends[0].keys()
    assert all(torch.equal(value, trained.ends[0][name]) for name, value in first.items())
    down, up = first[f"{QUERY}.lora_A.default.weight"], first[f"{QUERY}.lora_B.default.weight"]
    assert up.abs().max() > 1e-3
    assert {len(rows) for rows in learned(1).values()} == {RANK}
    assert torch.equal(learned(1)[QUERY], down)

    feed(tmp_path, "b", ["politics", "sport"], n=40)
    update()
    start = trained.starts[1]
    scale = 8 / RANK  # PEFT's own lora_alpha is 8
    torch.testing.assert_close(
        start[f"{QUERY}.base_layer.weight"], first[f"{QUERY}.base_layer.weight"] + scale * up @ down
    )
    assert not start[f"{QUERY}.lora_B.default.weight"].any()
    with evertune.load(registry) as served:
        assert served.version.number == 2
        assert served.predict(ASKED) == trained.answers[1]
        assert served.predict(ASKED)[0].keys() == {"business", "sport", "politics"}
        rows = served.module.state_dict()[f"{QUERY}.lora_A.default.weight"]
        assert torch.equal(learned(2)[QUERY], torch.cat([down, rows]))
