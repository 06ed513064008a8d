"""Versions that answer as exports to ONNX: followed, kept, and refused where they answer otherwise."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from evertune.lightning_modules import SequenceClassificationModule
from evertune.live.slices import save_slice
from evertune.registry.manifest import Manifest
from evertune.registry.registry import Registry, RegistryError
from evertune.serve import OnnxSettings, Service
from evertune.serve.exports import Exports
from tests.helpers.lightning_modules import tiny_bert
from tests.helpers.serving import PATIENCE, Running, ask

CLASSES = {1: ["business", "sport"], 2: ["film", "law"]}


@pytest.fixture(scope="module")
def needs_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f'{name} is not installed (pip install "evertune[export]")')


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Two versions with held-out records, and a third that has none."""
    folder = tmp_path_factory.mktemp("versions")
    registry, backbone = Registry(folder / "registry"), tiny_bert(folder / "bert")
    for number in (1, 2, 3):
        torch.manual_seed(number)
        module = SequenceClassificationModule(backbone, classes=CLASSES.get(number, ["a", "b"]))
        module.configure_model()
        module.save_pretrained(folder / f"staging-{number}" / "model")
        texts = ["the bank share", "goal match of the team", "vote"]
        rows: list[Any] = [
            {"id": str(place), "record": {"text": text, "label": module.classes[0]}} for place, text in enumerate(texts)
        ]
        manifest = Manifest(version=number, parent=number - 1 or None, module="SequenceClassificationModule")
        slices = [] if number == 3 else [save_slice(registry.store, f"slice {number}", rows)]
        registry.publish(folder / f"staging-{number}", manifest, slices)
    registry.promote(1)
    return registry


def of_torch(registry: Registry, number: int, text: str) -> dict[str, float]:
    module = SequenceClassificationModule.from_pretrained(registry.version(number).folder() / "model")
    return module.predict([text])[0]


@pytest.mark.slow
@pytest.mark.usefixtures("needs_onnx")
def test_a_promotion_is_followed_and_each_version_is_exported_once(registry: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "exports"
    server = Running(registry.store.root, tmp_path, "--onnx.precision", "fp32", "--onnx.folder", str(folder))
    done, found = threading.Event(), list[tuple[int, str, int]]()
    client = threading.Thread(target=ask, args=(server.url, done, found))
    client.start()
    try:
        for change, number in ((lambda: registry.promote(2), 2), (registry.rollback, 1)):
            change()
            end, start = time.monotonic() + PATIENCE, len(found)
            while number not in {version for _, _, version in found[start:]}:
                assert time.monotonic() < end, server.command.errors
                time.sleep(0.01)
        answer = httpx.post(f"{server.url}/predict", json={"text": "the bank share"}).json()
        explained = httpx.post(f"{server.url}/explain", json={"text": "the bank share"})
    finally:
        done.set()
        client.join()
        ended = server.end()
    assert ended.returncode == 0
    assert {status for status, _, _ in found} == {200}
    assert all(label in CLASSES[version] for _, label, version in found)
    expected = of_torch(registry, 1, "the bank share")
    assert answer["confidence"] == pytest.approx(expected[answer["label"]], abs=1e-4)
    assert "an export answers" in explained.json()["error"]
    assert sorted(path.name.split("-")[0] for path in folder.glob("*/*") if path.is_dir()) == ["1", "2"]
    assert ended.stderr.count("was exported to ONNX in fp32") == 2, ended.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("needs_onnx")
def test_what_cannot_be_checked_or_answers_otherwise_never_answers(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"version 3 is not served: .*no held-out records"):
        Exports(OnnxSettings(precision="fp32", folder=str(tmp_path)), registry.store.root).module(registry.version(3))
    assert [path.name for path in tmp_path.glob("*/*")] == [".lock"]


@pytest.mark.usefixtures("needs_onnx")
def test_an_export_that_is_there_is_taken_and_old_ones_are_deleted(registry: Registry, tmp_path: Path) -> None:
    exports = Exports(OnnxSettings(precision="int8", folder=str(tmp_path)), registry.store.root)
    made = exports.module(registry.version(1))
    assert list(made.predict(["vote"])[0]) == list(of_torch(registry, 1, "vote"))
    (kept,) = exports.folder.glob("1-int8-*")
    (tmp_path / "bert-int8-mine").mkdir()  # of somebody else
    written = (kept / "export.json").read_bytes()
    for number in range(5):  # of versions that were served since
        other = exports.folder / f"{number + 2}-int8-older"
        other.mkdir()
        os.utime(other, (number, number))
    exports.module(registry.version(1))
    assert (kept / "export.json").read_bytes() == written
    names = sorted(path.name for path in exports.folder.iterdir() if path.is_dir())
    assert (tmp_path / "bert-int8-mine").is_dir()
    assert names == [kept.name, "4-int8-older", "5-int8-older", "6-int8-older"]
    (kept / "model" / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(RegistryError, match=r"the export of version 1 is damaged: .*delete it"):
        exports.module(registry.version(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "bf16"}, "precision is a setting of torch"),
        ({"device": "cuda"}, "device is a setting of torch"),
        ({"module_class": SequenceClassificationModule}, "module_class is a setting of torch"),
    ],
)
def test_settings_of_torch_are_refused_beside_it(registry: Registry, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Service(registry, onnx=OnnxSettings(precision="int8"), **settings)


def test_a_folder_without_precision_and_versions_beside_an_export_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give precision, too"):
        OnnxSettings(folder=str(tmp_path))
    with pytest.raises(ValueError, match=r"onnx.precision is a setting of versions"):
        Service(model=tmp_path, onnx=OnnxSettings(precision="fp32"))
