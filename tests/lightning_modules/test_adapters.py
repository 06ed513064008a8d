"""Modules that train adapters of PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from evertune._lightning import pl
from evertune.callbacks import LogitAdjustment, OrthogonalLoRA, Replay
from evertune.cli.main import main
from evertune.lightning_modules import SequenceClassificationModule
from evertune.lightning_modules.adapters import merge_adapters
from evertune.lightning_modules.bottleneck import Bottleneck
from evertune.streams import Experience
from evertune.training.trainer import ContinualTrainer
from tests.helpers.lightning_modules import TEXTS, loader, tiny_bert
from tests.lightning_modules.test_modules import batch_of, build, trainer

LORA = {"method": "lora", "r": 2, "target_modules": ["query", "value"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("model"))


def trained(model: str, **settings: Any) -> Any:
    module = build(model, peft=LORA, learning_rate=0.01, **settings)
    trainer().fit(module, loader(model, ["business", "sport"]))
    return module


def test_adapters_and_head_are_trained_and_nothing_else(model: str) -> None:
    module = build(model, peft=LORA, learning_rate=0.01)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    plain = build(model)
    batch = batch_of(module.eval(), TEXTS["sport"])
    assert torch.equal(module(**batch).logits, plain.eval()(**batch).logits)  # adapters start without an effect
    trainer().fit(module, loader(model, ["business", "sport"]))
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, value in module.named_parameters() if value.requires_grad}
    assert all(".lora_" in name or name.startswith("head") for name in changed)
    assert len(changed) == 2 * 2 * 2 + 2  # two layers, query and value, A and B; the head


def test_the_seed_of_the_process_draws_them(model: str) -> None:
    first, again, other = build(model, peft=LORA), build(model, peft=LORA), None
    torch.manual_seed(1)
    other = SequenceClassificationModule(model, classes=["a"], peft=LORA)
    other.configure_model()
    name = "encoder.layer.0.attention.self.query.lora_A.default.weight"
    drawn = [one.backbone.get_parameter(name) for one in (first, again, other)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_saved_and_loaded_they_are_bit_identical(model: str, tmp_path: Path) -> None:
    module = trained(model).eval()
    module.save_pretrained(tmp_path)
    loaded = SequenceClassificationModule.from_pretrained(tmp_path)
    assert loaded.peft == LORA
    state = loaded.state_dict()
    assert state.keys() == module.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    started = build(model, peft=LORA)
    fresh = SequenceClassificationModule(model, classes=["business", "sport"], peft=LORA)
    fresh.start_from(tmp_path)
    fresh.configure_model()
    batch = batch_of(module, TEXTS["sport"])
    assert torch.equal(fresh.eval()(**batch).logits, module(**batch).logits)
    assert not torch.equal(started.eval()(**batch).logits, module(**batch).logits)
    base = AutoModel.from_pretrained(tmp_path).state_dict()  # what transformers reads: the frozen transformer
    for name, value in AutoModel.from_pretrained(model).state_dict().items():
        assert name.startswith("pooler.") or torch.equal(base[name], value)


OTHERS = [
    {**LORA, "use_dora": True},
    {"method": "ia3", "target_modules": ["query", "output.dense"], "feedforward_modules": ["output.dense"]},
]


@pytest.mark.parametrize("peft", OTHERS, ids=["dora", "ia3"])
def test_other_adapters_are_learned_saved_loaded_and_merged(model: str, peft: dict[str, Any], tmp_path: Path) -> None:
    module = build(model, peft=peft, learning_rate=0.01)
    batch = batch_of(module.eval(), TEXTS["sport"])
    torch.testing.assert_close(
        module(**batch).logits, build(model).eval()(**batch).logits
    )  # they start without an effect
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer().fit(module, loader(model, ["business", "sport"]))
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, value in module.named_parameters() if value.requires_grad}
    assert all(".lora_" in name or ".ia3_" in name or name.startswith("head") for name in changed)
    module.eval().save_pretrained(tmp_path)
    loaded = SequenceClassificationModule.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, module(**batch).logits)
    base = AutoModel.from_pretrained(tmp_path).state_dict()
    assert torch.equal(base["encoder.layer.0.output.dense.weight"], before["backbone." + _base(peft)])
    merge_adapters(loaded.backbone)
    torch.testing.assert_close(loaded(**batch).logits, module(**batch).logits)
    assert not any("base_layer" in name for name in loaded.state_dict())


def _base(peft: dict[str, Any]) -> str:
    return "encoder.layer.0.output.dense." + ("base_layer.weight" if peft["method"] == "ia3" else "weight")


def test_adapters_on_a_module_that_was_trained_in_full(model: str, tmp_path: Path) -> None:
    full = build(model)
    full.save_pretrained(tmp_path)
    module = SequenceClassificationModule.from_pretrained(tmp_path, peft=LORA)
    batch = batch_of(full.eval(), TEXTS["sport"])
    assert torch.equal(module.eval()(**batch).logits, full(**batch).logits)
    adapted = trained(model)
    adapted.save_pretrained(tmp_path / "adapted")
    with pytest.raises(ValueError, match=r"lora_A\.default\.weight.*but the module has"):
        SequenceClassificationModule.from_pretrained(tmp_path / "adapted", peft=None)


class CrashAt(pl.Callback):
    """A power cut, at a batch counted over all fits."""

    across_experiences = True

    def __init__(self, batch: int) -> None:
        self.left = batch

    def on_train_batch_end(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise ZeroDivisionError


def test_a_stream_with_an_adapter_for_each_experience_resumes_with_the_same_bits(model: str, tmp_path: Path) -> None:
    stream = [
        Experience(str(number), rows, test=rows, classes=names)
        for number, names in enumerate([["business", "sport"], ["politics"]])
        for rows in [[{"text": text, "label": name} for name in names for text in TEXTS[name] * 4]]
    ]

    def run(folder: Path, *more: pl.Callback) -> Any:
        torch.manual_seed(0)
        module, method = SequenceClassificationModule(model, peft=LORA, learning_rate=0.01), OrthogonalLoRA()
        quiet: dict[str, Any] = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        methods = [Replay(memory_size=6), LogitAdjustment(), method, *more]
        learner = ContinualTrainer(max_epochs=2, accelerator="cpu", callbacks=methods, **quiet)
        learner.fit_stream(module, stream, batch_size=4, run_dir=folder, checkpoint_every_n_steps=1, untrained=False)
        return module, method

    whole, method = run(tmp_path / "whole")
    assert {len(rows) for rows in method.kept.values()} == {4}
    assert whole.head.out_features == 3
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "parts", CrashAt(14 + 2))  # two batches into the second experience
    resumed, again = run(tmp_path / "parts")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert all(torch.equal(rows, again.kept[name]) for name, rows in method.kept.items())


def test_by_configuration(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``evertune fit`` with adapters, on texts of two classes."""
    monkeypatch.chdir(tmp_path)
    rows = [{"text": text, "label": name} for name in ("business", "sport") for text in TEXTS[name] * 4]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("stream.yaml").write_text(f"""
seed_everything: 0
out: run
model:
  class_path: SequenceClassificationModule
  init_args:
    model_name_or_path: {model}
    peft: {{method: lora, r: 2, target_modules: [query, value]}}
data: {{source: rows.jsonl, scenario: class_incremental, n_experiences: 2, batch_size: 8}}
trainer:
  max_epochs: 1
  accelerator: cpu
  callbacks: [OrthogonalLoRA, LogitAdjustment, {{class_path: Replay, init_args: {{memory_size: 4}}}}]
""")
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", "stream.yaml"])
    assert not caught.value.code
    module = SequenceClassificationModule.from_pretrained(tmp_path / "run" / "model")
    assert module.peft == LORA
    assert any(".lora_A." in name for name, _ in module.named_parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft": {"r": 2}}, "peft: method must be one of lora, adalora, ia3, bottleneck, prompt_tuning, .*, got None"),
        ({"peft": {"method": "houlsby"}}, "peft: method must be one of lora, .*, got 'houlsby'"),
        ({"peft": {"method": "bottleneck", "r": 2}}, "peft: 'r' is not supported; use reduction_factor"),
        ({"peft": {"method": "bottleneck", "reduction_factor": 0.5}}, "reduction_factor must be at least 1, got 0.5"),
        ({"peft": {"method": "lora", "rank": 2}}, "peft: 'rank' is not supported; use r, lora_alpha"),
        ({"peft": {"method": "ia3", "r": 2}}, "peft: 'r' is not supported; use target_modules"),
        ({"peft": {"method": "lora", "r": 0}}, "peft: r must be positive, got 0"),
        ({"peft": {"method": "lora", "init_lora_weights": "pissa"}}, "init_lora_weights must be True or 'gaussian'"),
        ({"peft": LORA, "freeze_layers": 1}, "freeze_layers=1 with peft, which freezes the whole transformer"),
    ],
)
def test_settings_that_cannot_work(model: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceClassificationModule(model, **settings)


def test_bottleneck_adapters_are_learned_saved_and_loaded(model: str, tmp_path: Path) -> None:
    peft = {"method": "bottleneck", "reduction_factor": 8}
    module = build(model, peft=peft, learning_rate=0.01)
    batch = batch_of(module.eval(), TEXTS["sport"])
    torch.testing.assert_close(module(**batch).logits, build(model).eval()(**batch).logits)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer().fit(module, loader(model, ["business", "sport"]))
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, value in module.named_parameters() if value.requires_grad}
    behind = {name.partition(".bottleneck_")[0] for name in changed if ".bottleneck_" in name}
    assert behind == {f"backbone.encoder.layer.{number}.output.dense" for number in (0, 1)}
    module.eval().save_pretrained(tmp_path)
    loaded = SequenceClassificationModule.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, module(**batch).logits)
    base = AutoModel.from_pretrained(tmp_path).state_dict()
    name = "encoder.layer.0.output.dense"
    assert torch.equal(base[f"{name}.weight"], before[f"backbone.{name}.base_layer.weight"])
    with pytest.raises(ValueError, match="bottleneck adapters are not linear, and cannot be merged into the weights"):
        merge_adapters(loaded.backbone)


@pytest.mark.parametrize(
    ("targets", "n_adapters"),
    [(["attention.output.dense", "output.dense"], 4), (r"encoder\.layer\.1\..*\.query", 1), (None, 2)],
)
def test_bottleneck_adapters_behind_chosen_layers(model: str, targets: Any, n_adapters: int) -> None:
    module = build(model, peft={"method": "bottleneck", "target_modules": targets})
    assert sum(isinstance(layer, Bottleneck) for layer in module.modules()) == n_adapters


def test_layers_that_are_not_there(model: str) -> None:
    module = SequenceClassificationModule(model, classes=["a"], peft={**LORA, "target_modules": ["nowhere"]})
    with pytest.raises(ValueError, match="nowhere"):
        module.configure_model()
    for targets, words in ((["nowhere"], "names no layer of BertModel"), (["LayerNorm"], "is a LayerNorm")):
        bottleneck = {"method": "bottleneck", "target_modules": targets}
        module = SequenceClassificationModule(model, classes=["a"], peft=bottleneck)
        with pytest.raises(ValueError, match=words):
            module.configure_model()
