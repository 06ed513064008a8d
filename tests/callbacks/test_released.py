"""What a fit leaves in memory: nothing, or a process that updates again and again would grow by a model each time."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from evertune import ContinualTrainer
from evertune.callbacks import (
    AGEM,
    EMA,
    ERACE,
    EWC,
    OSFT,
    DarkReplay,
    Distillation,
    LogitAdjustment,
    RDrop,
    Replay,
    SourceLosses,
    WiSEFT,
)
from evertune.lightning_modules import SequenceClassificationModule
from evertune.presets import preset
from evertune.streams import class_incremental
from tests.helpers.lightning_modules import TEXTS, tiny_bert
from tests.helpers.quiet import QUIET

ROWS = [{"text": text, "label": name} for name, texts in TEXTS.items() for text in texts]
SETTINGS = {**QUIET, "accelerator": "cpu", "devices": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


COMBINED: dict[str, Any] = {
    "preset": lambda: preset("text_classification", memory_size=4).callbacks(),
    "logits": lambda: [Replay(4), Distillation(examples="all"), ERACE(), SourceLosses(), RDrop()],
    "stored logits": lambda: [DarkReplay(4)],
    "weights": lambda: [Replay(4), EWC(n_examples=4), EMA(), LogitAdjustment()],
    "gradients": lambda: [Replay(4), AGEM(), OSFT()],
    "shares": lambda: [Replay(4), WiSEFT()],
}


@pytest.mark.parametrize("name", COMBINED)
def test_a_trainer_and_its_module_are_freed(model: str, name: str) -> None:
    def learn() -> list[weakref.ref[Any]]:
        module = SequenceClassificationModule(model, head="cosine", learning_rate=1e-3)
        trainer = ContinualTrainer(max_epochs=1, callbacks=COMBINED[name](), **SETTINGS)
        trainer.fit_stream(module, class_incremental(ROWS, n_experiences=2), batch_size=4, max_length=8)
        return [weakref.ref(one) for one in (module, trainer, *trainer.callbacks)]

    left = learn()
    gc.collect()
    assert [one() for one in left if one() is not None] == []
