"""Exports of small models: the same answers in every format, refusals, damage, and what is left when it fails."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from evertune.cli.main import main
from evertune.export import ExportedModel, RefusedExportError, export
from evertune.export.graph import traced
from evertune.export.kinds import input_names, kind
from evertune.export.torch_program import check_program, write_program
from evertune.lightning_modules import AnalyticClassificationModule, CausalLMModule, SequenceClassificationModule
from evertune.lightning_modules.pruning import prune
from evertune.live.slices import save_slice
from evertune.registry.manifest import Manifest
from evertune.registry.registry import Registry
from tests.helpers.generation import records, tiny_llama
from tests.helpers.lightning_modules import TEXTS, tiny_bert
from tests.lightning_modules.test_pruning import with_heads
from tests.tasks.table import ROWS, TaskRow

WORDS = [text for texts in TEXTS.values() for text in texts]
RECORDS = [{"text": text, "label": "sport"} for text in WORDS]


def needs_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f'{name} is not installed (pip install "evertune[export]")')


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> SequenceClassificationModule:
    torch.manual_seed(0)
    made = SequenceClassificationModule(tiny_bert(tmp_path_factory.mktemp("bert")), classes=list(TEXTS))
    made.configure_model()
    with torch.no_grad():
        made.head.weight.normal_()
    return made.eval()


def close(one: list[dict[str, float]], other: list[dict[str, float]], tolerance: float = 1e-5) -> bool:
    return all(a[name] == pytest.approx(b[name], abs=tolerance) for a, b in zip(one, other, strict=True) for name in b)


@pytest.mark.parametrize("format", ["safetensors", "torch_export", "onnx"])
def test_an_export_answers_like_its_module(module: Any, tmp_path: Path, format: Any) -> None:
    if format == "onnx":
        needs_onnx()
    made = export(module, tmp_path / "out", format=format, data=RECORDS)
    for texts in (WORDS, WORDS[:1], ["goal"], [*WORDS, "a of " * 40]):
        assert close(made.predict(texts), module.predict(texts))
    check = made.manifest.check
    assert check is not None
    assert (check.records, check.agreement) == (len(WORDS), 1.0)
    assert check.score == check.source_score
    assert check.largest_change < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_module_without_some_heads_is_exported_as_a_graph(tmp_path: Path) -> None:
    needs_onnx()
    made = with_heads(tmp_path / "bert", "bert")
    prune(made, [], heads=0.5)
    for format in ("torch_export", "onnx"):
        exported = export(made, tmp_path / format, format=format, data=RECORDS)
        assert close(exported.predict(WORDS), made.predict(WORDS))
        assert close(ExportedModel.load(tmp_path / format, trusted=True).predict(WORDS[:2]), made.predict(WORDS[:2]))
    small = export(made, tmp_path / "int8", quantize="int8", data=RECORDS, min_agreement=0, max_score_drop=1)
    assert close(small.predict(WORDS), made.predict(WORDS), 0.1)
    with pytest.raises(ValueError, match=r"knows a bert from which attention heads were removed: .*'onnx' or 'torch_e"):
        export(made, tmp_path / "safetensors", format="safetensors", data=RECORDS)
    assert not (tmp_path / "safetensors").exists()


def made_of(row: TaskRow, folder: str) -> Any:
    """The module of a task, with the classes of its records."""
    row.pretrained(folder)
    module = row.module(folder)
    label = row.schema_for(module).label
    names = [module.task.label_names(module.task.check_label(one[label])) for one in row.records if label in one]
    if found := sorted({name for some in names for name in some}):
        module.add_classes(found)
    module.configure_model()
    return module.eval()


TRACED = ("several numbers", "question answering", "tags of words", "text matching")  # the others, slow: seconds each
CASES = [(name, "safetensors") for name in ROWS] + [
    pytest.param(name, "onnx", marks=[] if name in TRACED else pytest.mark.slow)
    for name, row in ROWS.items()
    if "onnx" in row.exported
]


@pytest.mark.parametrize(("name", "format"), CASES)
def test_every_task_of_the_table_is_exported(tmp_path: Path, name: str, format: Any) -> None:
    if format == "onnx":
        needs_onnx()
    module = made_of(ROWS[name], str(tmp_path / "model"))
    schema = ROWS[name].schema_for(module)
    records = list(ROWS[name].records)
    made = export(module, tmp_path / "out", format=format, data=records, text=schema.text, label=schema.label)
    check = made.manifest.check
    assert check is not None
    assert (check.records, check.agreement) == (len(records), 1.0)
    assert check.score == pytest.approx(check.source_score, abs=1e-6)
    assert check.largest_change < 1e-4


@pytest.mark.parametrize("name", ["answers to prompts", "sequence to sequence"])
def test_generation_is_not_exported_as_a_graph(tmp_path: Path, name: str) -> None:
    module = made_of(ROWS[name], str(tmp_path / "model"))
    with pytest.raises(ValueError, match=f"{type(module).__name__} generates texts, token after token: export it with"):
        export(module, tmp_path / "out", data=RECORDS)
    assert not (tmp_path / "out").exists()


def test_other_modules_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="ZeroShotClassificationModule cannot be exported: it must be one of Sequence"):
        kind("ZeroShotClassificationModule")


def test_a_language_model_is_a_plain_folder_with_adapters_merged(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason='peft is not installed (pip install "evertune[peft]")')
    settings = {"method": "lora", "r": 2, "target_modules": ["gate_proj", "down_proj"]}
    module = CausalLMModule(tiny_llama(tmp_path / "llama"), peft=settings, generation={"max_new_tokens": 4})
    module.configure_model()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if ".lora_B." in name:
                weight.normal_()
    asked = {"text": "prompt", "label": "answer", "data": records("colours")}
    made = export(module.eval(), tmp_path / "out", format="safetensors", **asked)
    check = made.manifest.check
    assert check is not None and (check.agreement, check.records) == (1.0, 4)
    assert check.largest_change < 1e-5
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    tokens = module.tokenizer(["what is the north city"], return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(plain(**tokens).logits, module(**tokens).logits, atol=1e-4)
    assert made.predict(["what is the west city"]) == module.predict(["what is the west city"])


def test_another_likelihood_shows_in_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = made_of(ROWS["answers to prompts"], str(tmp_path / "model"))
    monkeypatch.setattr("evertune.export.exporting.ExportedModel", Colder)
    asked = {"text": "prompt", "label": "answer", "data": ROWS["answers to prompts"].records}
    with pytest.raises(RefusedExportError, match="it loses") as refused:
        export(module, tmp_path / "out", format="safetensors", **asked)
    assert refused.value.check.agreement == 1.0  # the most probable token stays the same
    assert refused.value.check.largest_change > 0.01


@pytest.mark.parametrize("name", ["text matching", pytest.param("recommendation", marks=pytest.mark.slow)])
def test_a_ranking_is_exported_with_its_items(tmp_path: Path, name: str) -> None:
    needs_onnx()
    row = ROWS[name]
    module = made_of(row, str(tmp_path / "model"))
    schema = row.schema_for(module)
    asked = {"data": list(row.records), "text": schema.text, "label": schema.label}
    export(module, tmp_path / "out", format="onnx", **asked)
    made = ExportedModel.load(tmp_path / "out")
    for old, new in zip(module.predict(["the team"], top=3)[0], made.predict(["the team"])[0], strict=False):
        assert new["score"] == pytest.approx(old["score"], abs=1e-5)
        assert new["item"] == old["item"]
    pair = ("the team", "a goal")
    assert made.predict([pair])[0]["score"] == pytest.approx(module.predict([pair])[0]["score"], abs=1e-5)
    with pytest.raises(ValueError, match="name its field"):
        export(module, tmp_path / "other", format="safetensors", **asked | {"label": "none"})


@pytest.mark.parametrize(("pooling", "head"), [("cls", "linear"), ("last", "cosine")])
def test_every_pooling_and_head_is_exported(module: Any, tmp_path: Path, pooling: Any, head: Any) -> None:
    path = module.model_name_or_path
    other = SequenceClassificationModule(path, classes=["a", "b"], n_classes_ahead=4, pooling=pooling, head=head)
    other.configure_model()
    names = input_names(other)
    tokens = other.tokenizer(["a goal of the team", "vote"], padding=True, return_tensors="pt")
    for side in ("right", "left"):
        mask = tokens["attention_mask"] if side == "right" else tokens["attention_mask"].flip(1)
        inputs = {**tokens, "attention_mask": mask}
        with torch.no_grad():
            logits = traced(other.eval()).module()(*(inputs[name] for name in names))
            assert torch.allclose(logits, other(**inputs).logits, atol=1e-6)


def test_a_head_that_was_not_trained_is_exported(module: Any) -> None:
    analytic = AnalyticClassificationModule(module.model_name_or_path, classes=list(TEXTS), features="rff")
    analytic.configure_model()
    tokens = analytic.tokenizer(WORDS, padding=True, return_tensors="pt")
    with torch.no_grad():
        analytic.head.weight.normal_()
        logits = traced(analytic.eval()).module()(*(tokens[name] for name in input_names(analytic)))
        assert torch.allclose(logits, analytic(**tokens).logits, atol=1e-5)


def test_several_labels_are_sigmoids(module: Any, tmp_path: Path) -> None:
    several = SequenceClassificationModule(module.model_name_or_path, classes=["a", "b"], multi_label=True)
    several.configure_model()
    records = [{"text": text, "label": ["a"]} for text in WORDS]
    made = export(several, tmp_path / "out", format="safetensors", data=records)
    assert close(made.predict(WORDS), several.predict(WORDS))


def test_adapters_are_merged(module: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason='peft is not installed (pip install "evertune[peft]")')
    settings = {"method": "lora", "r": 2, "target_modules": ["query", "value"]}
    adapted = SequenceClassificationModule(module.model_name_or_path, classes=["a", "b"], peft=settings)
    adapted.configure_model()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if ".lora_B." in name:
                weight.normal_()
    made = export(adapted, tmp_path / "out", format="safetensors", data=[{"text": text} for text in WORDS])
    assert close(made.predict(WORDS), adapted.predict(WORDS))
    assert made.manifest.check is not None and made.manifest.check.score is None
    plain = SequenceClassificationModule.from_pretrained(tmp_path / "out" / "model")
    assert plain.peft is None
    assert not any("lora" in name for name in plain.state_dict())


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantized_weights_are_smaller_and_close(module: Any, tmp_path: Path, quantize: Any) -> None:
    needs_onnx()
    bars = {"data": RECORDS, "min_agreement": 0.5, "max_score_drop": 1.0}
    made = export(module, tmp_path / "out", quantize=quantize, **bars)
    check = made.manifest.check
    assert check is not None and 1e-7 < check.largest_change < 0.3
    assert made.manifest.kind == f"onnx-{quantize}"
    assert [path.name for path in (tmp_path / "out" / "model").glob("*.onnx*")] == ["model.onnx"]
    operators = Counter(node.op_type for node in onnx_graph(tmp_path / "out").node)
    assert operators["MatMulInteger" if quantize == "int8" else "MatMulNBits"] >= 12  # six of each of two layers
    assert operators["GatherBlockQuantized"] == (3 if quantize == "int4" else 0)


def onnx_graph(folder: Path) -> Any:
    import onnx

    return onnx.load(folder / "model" / "model.onnx").graph


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "coreml"}, "format must be one of safetensors, torch_export, onnx, got 'coreml'"),
        ({"format": "gguf"}, "`python convert_hf_to_gguf.py OUT/model --outfile model.gguf` in a checkout of llama"),
        ({"quantize": "int2"}, "quantize must be int8, int4 or None, got 'int2'"),
        ({"format": "safetensors", "quantize": "int8"}, "quantize='int8' goes with format='onnx'"),
        ({"min_agreement": 2.0}, "min_agreement must be between 0 and 1, got 2.0"),
        ({"max_records": 0}, "max_records must be positive"),
        ({"data": None}, "pass data="),
    ],
)
def test_wrong_settings_are_refused_by_name(module: Any, tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export(module, tmp_path / "out", **{"data": RECORDS, "format": "onnx", **settings})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_left_alone(module: Any, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="name a new folder"):
        export(module, tmp_path, format="safetensors", data=RECORDS)


class Colder(ExportedModel):
    """An export of a language model that is surer of everything."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.module.backbone.lm_head.register_forward_hook(lambda head, inputs, logits: 100 * logits)


class Wrong(ExportedModel):
    """An export whose answers are turned around."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.module.head.register_forward_hook(lambda head, inputs, logits: -logits)


def test_an_export_that_answers_worse_is_refused(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evertune.export.exporting.ExportedModel", Wrong)
    labelled = [{"text": text, "label": next(iter(module.predict([text])[0]))} for text in WORDS]
    few = "100.00 points, and 0.50 are allowed; one answer of 9 is 11.11 points"
    for bars, reason in (({}, "it agrees with its source on 0.0% of 9"), ({"min_agreement": 0.0}, few)):
        with pytest.raises(RefusedExportError, match=reason) as refused:
            export(module, tmp_path / "out", format="safetensors", data=labelled, **bars)
        assert refused.value.check.score == 0.0
        assert list(tmp_path.iterdir()) == []


def test_damage_is_found_when_it_is_loaded(module: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(module, out, format="safetensors", data=RECORDS)
    assert ExportedModel.load(out).classes == list(TEXTS)
    manifest = (out / "export.json").read_text()
    weights = out / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        ExportedModel.load(out)
    weights.write_bytes(whole)
    (out / "model" / "more.json").write_text("{}")
    with pytest.raises(ValueError, match=r"more.json is not listed in export.json"):
        ExportedModel.load(out)
    (out / "model" / "more.json").unlink()
    (out / "export.json").write_text(manifest.replace('"business"', '"sports"'))
    with pytest.raises(ValueError, match="it was changed after it was written"):
        ExportedModel.load(out)
    (out / "export.json").unlink()
    with pytest.raises(FileNotFoundError, match="it was not written by `evertune export`"):
        ExportedModel.load(out)


def test_a_program_is_loaded_only_if_it_is_trusted_and_never_if_it_is_pickled(tmp_path: Path) -> None:
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, tmp_path / "model.pt2")
    with pytest.raises(ValueError, match=r"as a pickle, which can run code"):  # its example is
        check_program(tmp_path / "model.pt2")
    write_program(program, tmp_path)
    check_program(tmp_path / "model.pt2")
    (tmp_path / "model.pt2").write_bytes(b"PK")
    with pytest.raises(ValueError, match="damaged"):
        check_program(tmp_path / "model.pt2")


def test_a_version_is_exported_on_its_held_out_records(
    module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(tmp_path / "registry")
    rows: list[Any] = [{"id": str(n), "record": {"body": text, "kind": "sport"}} for n, text in enumerate(WORDS)]
    entry = save_slice(registry.store, "first", rows)
    module.save_pretrained(tmp_path / "staging" / "model")
    manifest = Manifest(
        version=1, module="SequenceClassificationModule", config={"schema": {"text": "body", "label": "kind"}}
    )
    registry.publish(tmp_path / "staging", manifest, [entry])
    out = tmp_path / "exports" / "one"
    command = ["export", str(tmp_path / "registry"), "1", "--format", "safetensors", "--output", str(out)]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--json"])
    assert ended.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["check"]["records"], printed["check"]["agreement"]) == (len(WORDS), 1.0)
    origin = ExportedModel.load(out).manifest.origin
    assert (origin.version, origin.registry) == (1, str(tmp_path / "registry"))
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 1
    assert "exists already" in capsys.readouterr().err
    monkeypatch.setattr("evertune.export.exporting.ExportedModel", Wrong)
    with pytest.raises(SystemExit) as ended:
        main([*command[:-1], str(tmp_path / "other")])
    assert ended.value.code == 4
    assert "refused, and nothing is written: it agrees with its source on 0.0%" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_gguf_is_refused_with_the_command_that_writes_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", "registry", "1", "--format", "gguf", "--output", "out"])
    assert ended.value.code == 2
    assert "convert_hf_to_gguf.py OUT/model --outfile model.gguf" in capsys.readouterr().err


def test_the_server_answers_with_an_export(module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    starlette = pytest.importorskip(
        "starlette.testclient", reason='it is not installed (pip install "evertune[serve]")'
    )
    from evertune.serve import Service, TrafficSettings, application

    export(module, tmp_path / "out", format="safetensors", data=RECORDS)
    with starlette.TestClient(application(Service(model=tmp_path / "out")), "http://localhost") as client:
        answer = client.post("/predict", json={"text": "the team goal"}).json()
        expected = module.predict(["the team goal"])[0]
        assert (answer["label"], answer["version"]) == (next(iter(expected)), 0)
        assert answer["probabilities"] == pytest.approx(expected, abs=1e-5)
        assert client.get("/ready").json()["production"] == {"alias": "out", "version": 0, "problem": None}
        assert client.post("/predict", json={"records": [{"text": " "}]}).status_code == 200
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--model", str(tmp_path / "out"), "--check"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == "ok: version 0 answers\n"
    with pytest.raises(ValueError, match="canary is a setting of versions"):
        Service(model=tmp_path / "out", traffic=TrafficSettings(canary="2"))
    with pytest.raises(ValueError, match="registry is a setting of versions"):
        Service("registry", model=tmp_path / "out")
    with pytest.raises(ValueError, match="there is nothing to serve"):
        Service()
