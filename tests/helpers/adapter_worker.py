"""What every rank runs in the tests of methods with an adapter per experience."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evertune.callbacks import InfLoRA, OrthogonalLoRA
from evertune.lightning_modules.saving import load_weights, save_weights
from tests.helpers.osft_worker import SaveMethod
from tests.helpers.shard_worker import CLASSES, LORA, SmallBert, experience, fit


def cases() -> dict[str, Any]:
    """New methods by name."""
    return {"olora": OrthogonalLoRA(strength=5.0), "inflora": InfLoRA(energy=0.8)}


def learn_and_save(folder: str, out: str) -> None:
    """Under ZeRO-2, learn an experience and three steps of another; write what there is after each."""
    strategy = "evertune_deepspeed_stage_2"
    for name, method in cases().items():
        between, within = Path(out) / name / "between", Path(out) / name / "within"
        module = SmallBert(folder, CLASSES, "sgd", peft=LORA)
        fit(module, experience("first", 3, ["a", "b"], 1), strategy, 1, [method])
        method.save(between / "method")
        save_weights(module, between / "middle.safetensors")
        second = experience("second", 5, ["b", "c"], 2)
        fit(module, second, strategy, 1, [method, SaveMethod(method, str(within), 3)])


def load_and_step(folder: str, out: str, strategy: str, load: bool = True) -> None:
    """Take the next step from each place, and write the weights."""
    for name in cases():
        for place in ("between", "within"):
            where, method = Path(out) / name / place, cases()[name]
            module = SmallBert(folder, CLASSES, "sgd", peft=LORA)
            module.configure_model()
            load_weights(module, where / "middle.safetensors")
            if load:
                method.load(where / "method")
                assert method.experience_index == 1
            fit(module, experience("third", 1, ["a", "c"], 3), strategy, 1, [method])
            save_weights(module, where / f"{strategy if load else 'fresh'}.safetensors")
