"""Pruning of neurons and heads: what does not matter goes first, and what is left is as exact as before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel

from evertune.lightning_modules import CausalLMModule, SequenceClassificationModule
from evertune.lightning_modules.backbone import encoder_layers, skeleton
from evertune.lightning_modules.pruning import prune
from evertune.lightning_modules.students import student_of
from evertune.tasks.predicting import batch_of
from evertune.utils.heads import HEAD_SIZE, KINDS, attentions, head_size
from tests.helpers.generation import tiny_llama
from tests.helpers.lightning_modules import TEXTS, tiny_bert
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


def classifier(folder: str) -> Any:
    return ready(SequenceClassificationModule(folder, classes=list(TEXTS)))


def ready(module: Any) -> Any:
    module.configure_model()
    with torch.no_grad():
        module.head.weight.normal_()
        module.head.bias.normal_()
    return module.eval()


def made(folder: Path, kind: str) -> Any:
    return classifier(deep(folder, kind))


def with_heads(folder: Path, kind: str, attention: str = "sdpa") -> Any:
    """A classifier over layers with six heads, pairs of which share keys and values where the kind has that."""
    tiny_bert(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 6, "num_hidden_layers": 3}
    if kind == "distilbert":
        sizes = {"dim": 24, "n_heads": 6, "n_layers": 3, "hidden_dim": 20}
    elif kind == "deberta-v2":
        sizes |= {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": False}
    elif KINDS[kind][1] == "head_dim":
        sizes |= {"num_key_value_heads": 3, "head_dim": 4}
    rest = {"vocab_size": 18, "max_position_embeddings": 34, "pad_token_id": 0, "eos_token_id": None}
    config = transformers.AutoConfig.for_model(kind, **({"intermediate_size": 20} | sizes | rest))
    AutoModel.from_config(config).save_pretrained(folder)
    module = SequenceClassificationModule(str(folder), classes=list(TEXTS), attention=attention)
    return ready(module)


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
    prune(module, batches(module), neurons=0.5)
    for number, linear in enumerate(second_layers(module, kind)):
        assert torch.equal(linear.weight, whole[number][:, 1 - number % 2 :: 2])
    for old, new in zip(before, module.predict(WORDS), strict=True):
        assert new == pytest.approx(old, abs=1e-6)
    module.save_pretrained(tmp_path / "pruned")
    assert SequenceClassificationModule.from_pretrained(tmp_path / "pruned").predict(WORDS) == module.predict(WORDS)
    loaded, info = AutoModel.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not info["mismatched_keys"] and len(encoder_layers(loaded)[1]) == 6


@pytest.mark.parametrize(("kind", "attention"), [*((kind, "auto") for kind in KINDS), ("bert", "eager")])
def test_without_heads_it_computes_what_it_computed_with_zeros_in_their_place(
    tmp_path: Path, kind: str, attention: str
) -> None:
    module = with_heads(tmp_path / "whole", kind, attention)
    whole = copy.deepcopy(module)
    n = 6 if KINDS[kind][1] == HEAD_SIZE else 3  # the others share keys and values by twos
    prune(module, batches(module), heads=0.5)
    with torch.no_grad():
        for old, new in zip(attentions(whole.backbone), attentions(module.backbone), strict=True):
            before, after = (one.linear[-1].weight.unflatten(1, (-1, 24 // n)) for one in (old, new))
            kept = [any(torch.equal(head, left) for left in after.unbind(1)) for head in before.unbind(1)]
            assert kept.count(True) == after.shape[1] == round(n / 2)
            before[:, ~torch.tensor(kept)] = 0
    n_heads = 3 if n == 6 else 4
    config = module.backbone.config
    assert (config.num_attention_heads, head_size(config)) == (n_heads, 4)
    for old, new in zip(whole.predict(WORDS), module.predict(WORDS), strict=True):
        assert new == pytest.approx(old, abs=1e-5)

    module.save_pretrained(tmp_path / "pruned")
    loaded: Any = SequenceClassificationModule.from_pretrained(tmp_path / "pruned")
    assert type(loaded.backbone) is type(module.backbone)
    assert loaded.predict(WORDS) == module.predict(WORDS)
    shapes = [
        {name: weight.shape for name, weight in one.state_dict().items()}
        for one in (skeleton(str(tmp_path / "pruned")), module.backbone)
    ]
    assert shapes[0] == shapes[1]
    if n == 6:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AutoModel.from_pretrained(tmp_path / "pruned")
    else:
        assert AutoModel.from_pretrained(tmp_path / "pruned").config.num_attention_heads == 4


def test_heads_can_be_removed_again_and_with_layers_and_neurons(tmp_path: Path) -> None:
    module = with_heads(tmp_path / "whole", "bert")
    prune(module, batches(module), heads=0.5, neurons=0.4)
    student = student_of(module, 2)
    assert student.predict(WORDS) != module.predict(WORDS)
    # As many neurons as a head has features, and heads as neurons: they are not taken for each other.
    prune(student, batches(student), heads=0.6, neurons=2 / 3)
    config = student.backbone.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.intermediate_size) == (2, 1, 4)
    prune(student, batches(student), neurons=0.5)
    assert config.intermediate_size == 2
    student.eval().save_pretrained(tmp_path / "student")
    loaded = SequenceClassificationModule.from_pretrained(tmp_path / "student")
    assert loaded.predict(WORDS) == student.predict(WORDS)


def test_heads_of_a_language_model_go_with_their_keys_and_values(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "llama")
    module = CausalLMModule(folder)
    module.configure_model()
    examples: Any = module.task.dataset(
        [{"text": "what is the north city", "label": "red"}, {"text": "what is the big river", "label": "old blue"}],
        module.tokenizer,
        text="text",
        label="label",
        id_column=None,
        max_length=24,
    )
    batch = batch_of(module.task, module, [examples[0], examples[1]])
    whole = copy.deepcopy(module)
    prune(module, [batch], heads=0.5)
    module.save_pretrained(tmp_path / "pruned")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(info.values())
    assert (loaded.config.num_attention_heads, loaded.config.num_key_value_heads, loaded.config.head_dim) == (1, 1, 16)
    assert student_of(module, 1).backbone.config.num_attention_heads == 1
    answers = module.predict(["what is the south city"])
    assert CausalLMModule.from_pretrained(tmp_path / "pruned").predict(["what is the south city"]) == answers
    assert whole.backbone.config.num_attention_heads == 2


def test_the_choice_does_not_depend_on_the_batches_and_goes_by_the_loss(tmp_path: Path) -> None:
    """Without a neuron or a head, the loss changes, to the first order, by its output times the gradient."""
    module = with_heads(tmp_path / "whole", "bert")
    chosen = []
    for size in (1, 4, 9):
        pruned = student_of(module)
        prune(pruned, batches(pruned, size), neurons=0.25, heads=0.5)
        second, last = second_layers(pruned, "bert"), [one.linear[-1] for one in attentions(pruned.backbone)]
        chosen.append([linear.weight for linear in (*second, *last)])
    assert all(torch.equal(a, b) for other in chosen[1:] for a, b in zip(chosen[0], other, strict=True))
    neurons, heads = second_layers(module, "bert")[1].weight, attentions(module.backbone)[1].linear[-1].weight
    effects = torch.zeros(20), torch.zeros(6)
    for batch in batches(module, 1):
        module.zero_grad()
        torch.nn.functional.cross_entropy(module(**batch).logits, batch["labels"]).backward()
        effects[0].add_((neurons * neurons.grad).sum(0).abs())
        effects[1].add_((heads * heads.grad).unflatten(1, (6, 4)).sum((0, 2)).abs())
    kept = effects[0].topk(15).indices.sort().values
    assert torch.equal(chosen[0][1], neurons[:, kept])
    kept = effects[1].topk(3).indices.sort().values
    assert torch.equal(chosen[0][4].unflatten(1, (3, 4)), heads.unflatten(1, (6, 4))[:, kept])


def test_what_cannot_be_pruned_is_refused(tmp_path: Path) -> None:
    llama = classifier(tiny_llama(tmp_path / "llama"))
    with pytest.raises(ValueError, match="LlamaDecoderLayer has no feed-forward layer of two linear ones"):
        prune(llama, [], neurons=0.5)
    module = classifier(tiny_bert(tmp_path / "bert"))
    for share in (1, 1.5, -0.1):
        for name in ("neurons", "heads"):
            with pytest.raises(ValueError, match=f"share of {name} to remove must be from 0 to below 1, got {share}"):
                prune(module, [], **{name: share})  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"heads=0.9 removes 2 of the 2 heads of a layer: it must .* leave one or more"
    ):
        prune(module, [], heads=0.9)
    with pytest.raises(ValueError, match=r"heads=0.1 removes 0 of the 2 heads of a layer: it must remove one or more"):
        prune(module, [], heads=0.1)
    qwen = with_heads(tmp_path / "qwen", "qwen2")
    qwen.backbone.config.update({"num_attention_heads": 7, "num_key_value_heads": 7})
    with pytest.raises(ValueError, match="heads of a qwen2 must divide its 24 features, and 5 do not"):
        prune(qwen, [], heads=0.3)
    mpnet = transformers.MPNetConfig(vocab_size=18, hidden_size=16, num_attention_heads=2, num_hidden_layers=2)
    AutoModel.from_config(mpnet).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"heads are removed from bert, .*, and not from a mpnet"):
        prune(classifier(str(tmp_path / "bert")), [], heads=0.5)
