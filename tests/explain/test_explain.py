"""Explanations: words that count, neighbours in the memory, and the update that changed an answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evertune.cli.main import main
from evertune.explain import explain
from evertune.explain.gradients import integrated_gradients
from evertune.explain.occlusion import occlusion
from evertune.explain.parts import MOST_PARTS
from evertune.explain.rollout import attention_rollout
from evertune.lightning_modules import SequenceClassificationModule
from evertune.registry.manifest import Manifest
from evertune.registry.registry import Registry
from tests.helpers.lightning_modules import tiny_bert
from tests.helpers.live_worker import feed, prepare, updater


class Keywords:
    """Probability of "sport": 0.1, with "goal" 0.5 more, with "vote" 0.05 less."""

    def __init__(self, mask: str | None = None) -> None:
        self.tokenizer = SimpleNamespace(mask_token=mask)
        self.asked: list[str] = []

    def predict(self, texts: Sequence[str], batch_size: int = 32) -> list[dict[str, float]]:
        self.asked += texts
        found = [0.1 + 0.5 * ("goal" in text) - 0.05 * ("vote" in text) for text in texts]
        return [{"sport": p, "law": 1 - p} for p in found]


@pytest.mark.parametrize("mask", [None, "[MASK]"])
def test_the_effect_of_a_word_is_what_is_lost_without_it(mask: str | None) -> None:
    module = Keywords(mask)
    parts = occlusion(module, "a goal, no vote", "sport")
    assert [(part.text, part.effect) for part in parts] == [
        ("a", 0),
        ("goal,", pytest.approx(0.5)),
        ("no", 0),
        ("vote", pytest.approx(-0.05)),
    ]
    assert [(part.start, part.end) for part in parts] == [(0, 1), (2, 7), (8, 10), (11, 15)]
    assert module.asked[2] == f"a {mask or ''} no vote"
    assert [part.effect for part in occlusion(module, "a goal, no vote", "law")][1] == pytest.approx(-0.5)


def test_a_word_alone_and_a_long_text() -> None:
    assert [part.effect for part in occlusion(Keywords(), "goal", "sport")] == [0.0]
    module = Keywords()
    parts = occlusion(module, "word " * 999 + "goal", "sport")
    assert len(parts) <= MOST_PARTS and len(module.asked) == len(parts) + 1
    assert [part.effect > 0.4 for part in parts] == [False] * (len(parts) - 1) + [True]
    assert "".join(part.text for part in occlusion(Keywords(), "足球goal", "sport")) == "足球goal"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Two versions, learned by two real updates, with a memory."""
    folder = tmp_path_factory.mktemp("explain")
    prepare(folder)
    for name, classes in (("a", ["business", "sport"]), ("b", ["business", "sport", "politics"])):
        feed(folder, name, classes, n=40)
        assert updater(folder).run().status == "promoted"
    return Registry(folder / "registry")


def test_words_neighbours_and_versions(registry: Registry) -> None:
    found = explain(registry, text="the party vote", label="politics", against=1, n_neighbours=3)
    assert found.version == 2 and found.label == "politics"
    module = SequenceClassificationModule.from_pretrained(registry.version(2).folder() / "model")
    said = module.predict(["the party vote", module.tokenizer.mask_token + " party vote"])
    assert found.parts[0].effect == pytest.approx(said[0]["politics"] - said[1]["politics"], abs=1e-5)
    assert len(found.neighbours) == 3
    similar = [one.similarity for one in found.neighbours]
    assert similar == sorted(similar, reverse=True) and similar[0] <= 1 + 1e-5
    assert all(one.text and one.label in {"business", "sport", "politics"} for one in found.neighbours)
    assert [one.version for one in found.history] == [1, 2]
    assert found.history[0].of_label is None and found.history[1].of_label == pytest.approx(
        said[0]["politics"], abs=1e-5
    )
    assert json.loads(json.dumps(found.as_json()))["flips"] in ([], [[1, 2]])


def test_an_example_of_the_memory_is_nearest_to_itself(registry: Registry) -> None:
    from evertune.explain.neighbours import Neighbours, memory_of

    version = registry.version(2)
    memory = memory_of(version)
    assert memory is not None
    module = SequenceClassificationModule.from_pretrained(version.folder() / "model").eval()
    text = module.tokenizer.decode(memory[0]["input_ids"], skip_special_tokens=True)
    [first], none = Neighbours(module, memory).nearest(text, 1)
    assert first.similarity == pytest.approx(1, abs=1e-4) and first.text == text
    assert first.pull is None and none == []


def test_the_pull_of_an_example_is_what_a_step_on_it_does(registry: Registry) -> None:
    """A step of SGD on the head's row of the label, seen in the logit of the text."""
    import torch
    from torch.nn.functional import cross_entropy

    text = "the party vote"
    found = explain(registry, 2, text=text, label="politics", n_neighbours=3)
    pulls = [abs(one.pull or 0) for one in found.pulling]
    assert len(pulls) == 3 and pulls == sorted(pulls, reverse=True) and pulls[0] > 0
    assert all(abs(one.pull or 0) <= pulls[0] for one in found.neighbours)
    module = SequenceClassificationModule.from_pretrained(registry.version(2).folder() / "model").eval()
    number, rate = module.classes.index("politics"), 1e-3
    for one in [*found.pulling, *found.neighbours]:
        example = module(**module.tokenizer(one.text, return_tensors="pt"))
        query = module(**module.tokenizer(text, return_tensors="pt"))
        loss = cross_entropy(example.logits, torch.tensor([module.classes.index(one.label)]))
        [gradient] = torch.autograd.grad(loss, module.head.weight)
        moved = -rate * gradient[number] @ query.features[0]
        length = example.features.norm() * query.features.norm()
        assert (moved / (rate * length)).item() == pytest.approx(one.pull, abs=1e-4)


@pytest.mark.parametrize("text", ["the party vote, a law", "goal", "the team " * 200])
def test_integrated_gradients_add_up_to_the_change_of_the_logit(registry: Registry, text: str) -> None:
    """Completeness: the logit of the text minus that of the text whose words are masked."""
    import torch

    module = SequenceClassificationModule.from_pretrained(registry.version(2).folder() / "model").eval()
    found = integrated_gradients(module, text, "politics")
    assert [part.text for part in found] == [part.text for part in occlusion(module, text, "politics")]
    tokenizer, logits = module.tokenizer, []
    settings = {"truncation": True, "max_length": module.max_tokens, "return_special_tokens_mask": True}
    encoded = tokenizer(text, return_tensors="pt", **settings)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"].bool()
    for tokens in (ids, ids.masked_fill(~special, tokenizer.mask_token_id)):
        with torch.no_grad():
            logits.append(module(input_ids=tokens).logits[0, module.classes.index("politics")].item())
    assert abs(logits[0] - logits[1]) > 1e-3
    assert sum(part.effect for part in found) == pytest.approx(logits[0] - logits[1], rel=0.01, abs=1e-5)
    shown = explain(registry, 2, text=text, label="politics", method="integrated_gradients", n_neighbours=0)
    assert shown.method == "integrated_gradients"
    assert [part.effect for part in shown.parts] == pytest.approx([part.effect for part in found], abs=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_attention_rollout_multiplies_the_attention_of_the_layers(pooling: Any, tmp_path: Path) -> None:
    import numpy as np
    import torch

    torch.manual_seed(0)
    folder = tiny_bert(tmp_path / "bert")
    module = SequenceClassificationModule(folder, classes=["a", "b"], pooling=pooling, attention="sdpa")
    module.configure_model()
    module.eval()
    text = "the bank, the team"
    found = attention_rollout(module, text)
    assert module.backbone.config._attn_implementation == "sdpa"  # as before
    eager = SequenceClassificationModule(folder, classes=["a", "b"], attention="eager")
    eager.configure_model()
    eager.backbone.load_state_dict(module.backbone.state_dict())
    with torch.no_grad():
        attentions = eager.eval().backbone(**module.tokenizer(text, return_tensors="pt"), output_attentions=True)
    flow = np.eye(7)  # [CLS] the bank , the team [SEP]
    for layer in attentions.attentions:
        flow = (layer[0].double().numpy().mean(0) + np.eye(7)) / 2 @ flow
    read = flow.mean(0) if pooling == "mean" else flow[0]
    assert [part.text for part in found] == ["the", "bank,", "the", "team"]
    assert [part.effect for part in found] == pytest.approx([read[1], read[2] + read[3], read[4], read[5]], abs=1e-6)


def test_attention_rollout_of_a_version(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["explain", registry.store.root, "2", "--text", "the party vote, a law", "--method", "attention_rollout"])
    assert ended.value.code == 0
    assert "% of what is read" in capsys.readouterr().out


def test_the_update_that_changed_an_answer_is_named(registry: Registry, tmp_path: Path, capsys: Any) -> None:
    import torch

    flipped, backbone = Registry(tmp_path / "flipped"), tiny_bert(tmp_path / "bert")
    for number, favourite in enumerate([0, 0, 1], 1):
        module = SequenceClassificationModule(backbone, classes=["business", "sport"])
        module.configure_model()
        head = list(module.modules())[-1]
        with torch.no_grad():
            head.weight.zero_()  # type: ignore[union-attr, operator]
            head.bias.copy_(torch.eye(2)[favourite])  # type: ignore[union-attr, operator]
        module.save_pretrained(tmp_path / "staging" / "model")
        about = {"module": "SequenceClassificationModule", "parent": number - 1 or None, "experience": f"week {number}"}
        flipped.publish(tmp_path / "staging", Manifest(version=number, **about))
    found = explain(flipped, 3, text="a goal", history=True)
    assert [(before.version, after.version) for before, after in found.flips] == [(2, 3)]
    assert found.neighbours == []
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "explain",
                flipped.store.root,
                "3",
                "--text",
                "a \x1b[31mgoal",
                "--history",
                "--json",
                str(tmp_path / "f.json"),
            ]
        )
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert "version 3, which learned 'week 3', changed the answer from 'business' to 'sport'" in printed
    assert "\x1b[31mgoal" not in printed
    assert json.loads((tmp_path / "f.json").read_text())["flips"] == [[2, 3]]


def test_what_is_not_there_is_named_and_the_rest_is_shown(registry: Registry, tmp_path: Path, capsys: Any) -> None:
    first = explain(registry, 1, text="the team", history=True, against="previous", n_neighbours=1)
    assert first.missing == [
        f"history: {registry.store.root} has no version before 1",
        "version previous: it is the one that is explained",
    ]
    assert [one.version for one in first.history] == [1] and len(first.neighbours) == 1
    only = Registry(tmp_path / "only")
    module = SequenceClassificationModule(tiny_bert(tmp_path / "bert"), classes=["business", "sport"])
    module.configure_model()
    module.save_pretrained(tmp_path / "staging" / "model")
    only.promote(only.publish(tmp_path / "staging", Manifest(version=1, module="SequenceClassificationModule")).number)
    arguments = ["--text", "the team", "--history", "--against", "previous", "--json", str(tmp_path / "f.json")]
    with pytest.raises(SystemExit) as ended:
        main(["explain", only.store.root, *arguments])
    assert not ended.value.code
    printed = capsys.readouterr().out
    missing = [
        "nearest examples: version 1 has no replay memory",
        f"history: {only.store.root} has no version before 1",
        f"version previous: {only.store.root} has no previous version: name one by its number, of 1",
    ]
    assert json.loads((tmp_path / "f.json").read_text())["missing"] == missing
    assert all(words in printed for words in missing)


def test_a_version_that_cannot_be_read_is_left_out(registry: Registry, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(registry.store.root, tmp_path / "copy"))
    (copy / "versions/1/model/model.safetensors").write_bytes(b"")
    for memory in copy.glob("versions/2/learning/*/*.arrow"):
        memory.write_bytes(b"")
    found = explain(copy, 2, text="the team", history=True)
    assert found.neighbours == [] and [one.version for one in found.history] == [2]
    assert [words.partition(": ")[0] for words in found.missing] == ["nearest examples", "version 1"]
    assert "`evertune registry verify` names what is damaged" in found.missing[0]
    assert "model.safetensors does not match its sha256" in found.missing[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", "  "], "text is empty"),
        (["--text", "a", "--label", "film"], "does not know the class 'film'; it knows"),
        (["9", "--text", "a"], "9"),
        (["--text", "a", "--neighbours", "-1"], "n_neighbours must not be negative, got -1"),
    ],
)
def test_refused(registry: Registry, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["explain", registry.store.root, *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("evertune explain: ") and words in error
