"""Pruning of feed-forward layers: what does not matter goes first, and what is left is a plain transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from evertune.lightning_modules import SequenceClassificationModule
from evertune.lightning_modules.backbone import encoder_layers
from evertune.lightning_modules.pruning import prune_feed_forward
from evertune.lightning_modules.students import student_of
from tests.helpers.generation import tiny_llama
from tests.helpers.lightning_modules import TEXTS
from tests.lightning_modules.test_students import deep

ROWS = [(text, name) for name, texts in TEXTS.items() for text in texts]
WORDS = [text for text, _ in ROWS]


def batches(module: Any, size: int = 4) -> Any:
    for start in range(0, len(ROWS), size):
        texts, labels = zip(*ROWS[start : start + size], strict=True)
        yield {
            **module.tokenizer(list(texts), padding=True, return_tensors="pt"),
            "labels": module.encode_labels(list(labels)),
        }


def made(folder: Path, kind: str) -> Any:
    module = SequenceClassificationModule(deep(folder, kind), classes=list(TEXTS))
    module.configure_model()
    with torch.no_grad():
        module.head.weight.normal_()
        module.head.bias.normal_()
    return module.eval()


def second_layers(module: Any, kind: str) -> list[Any]:
    layers = encoder_layers(module.backbone)[1]
    return [layer.output.dense if kind == "bert" else layer.ffn.lin2 for layer in layers]


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_neurons_without_effect_are_removed_first(tmp_path: Path, kind: str) -> None:
    module = made(tmp_path / "deep", kind)
    with torch.no_grad():
        for number, linear in enumerate(second_layers(module, kind)):
            linear.weight[:, number % 2 :: 2] = 0
    before = module.predict(WORDS)
    whole = [linear.weight.clone() for linear in second_layers(module, kind)]
    prune_feed_forward(module, 0.5, batches(module))
    for number, linear in enumerate(second_layers(module, kind)):
        assert torch.equal(linear.weight, whole[number][:, 1 - number % 2 :: 2])
    for old, new in zip(before, module.predict(WORDS), strict=True):
        assert new == pytest.approx(old, abs=1e-6)
    module.save_pretrained(tmp_path / "pruned")
    assert SequenceClassificationModule.from_pretrained(tmp_path / "pruned").predict(WORDS) == module.predict(WORDS)
    loaded, info = AutoModel.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not info["mismatched_keys"] and len(encoder_layers(loaded)[1]) == 6


def test_the_choice_does_not_depend_on_the_batches_and_goes_by_the_loss(tmp_path: Path) -> None:
    """Removing a neuron changes the loss of an example, to the first order, by its activation times the gradient."""
    module = made(tmp_path / "deep", "bert")
    chosen = []
    for size in (1, 4, 9):
        pruned = student_of(module)
        prune_feed_forward(pruned, 0.25, batches(pruned, size))
        chosen.append([linear.weight for linear in second_layers(pruned, "bert")])
    assert all(torch.equal(a, b) for other in chosen[1:] for a, b in zip(chosen[0], other, strict=True))
    weight = second_layers(module, "bert")[2].weight
    effect = torch.zeros(weight.shape[1])
    for batch in batches(module, 1):
        module.zero_grad()
        torch.nn.functional.cross_entropy(module(**batch).logits, batch["labels"]).backward()
        effect += (weight * weight.grad).sum(0).abs()
    kept = effect.topk(18).indices.sort().values
    assert torch.equal(chosen[0][2], weight[:, kept])


def test_what_cannot_be_pruned_is_refused(tmp_path: Path) -> None:
    llama = SequenceClassificationModule(tiny_llama(tmp_path / "llama"), classes=list(TEXTS))
    llama.configure_model()
    with pytest.raises(ValueError, match="LlamaDecoderLayer has no feed-forward layer of two linear ones"):
        prune_feed_forward(llama, 0.5, [])
    with pytest.raises(ValueError, match="must be between 0 and 1, got 1"):
        prune_feed_forward(llama, 1, [])
