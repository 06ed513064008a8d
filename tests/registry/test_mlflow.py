"""The mirror in MLflow, against MLflow's own store in a file."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evertune.registry.manifest import Manifest, Metrics, VerdictSummary
from evertune.registry.mlflow import MLflowMirror, digest
from evertune.registry.registry import Registry, RegistryError
from evertune.registry.version import Version


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    """The file of an empty MLflow, which takes seconds to make."""
    mlflow = pytest.importorskip("mlflow", reason='MLflow is not installed (pip install "evertune[mlflow]")')
    pytest.importorskip("alembic", reason="alembic is not installed (pip install alembic)")
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def client(empty, tmp_path, monkeypatch):
    """A client of an empty MLflow."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)  # where MLflow keeps the files it is given
    shutil.copy(empty, tmp_path / "mlflow.db")
    return mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")


def publish(registry: Registry, tmp_path: Path, weights: bytes = b"weights", **extra: Any) -> Version:
    folder = tmp_path / "staging"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(weights)
    manifest = Manifest(
        version=registry.next_number(),
        parent=registry.next_number() - 1 or None,
        kind="update",
        experience="sport",
        reason="200 records are pending",
        consumed=4,
        offset={"line": 7},
        module="SequenceClassificationModule",
        records={"train": 180, "held_out": 20, "quarantined": 0},
        verdict=VerdictSummary(True, "passed: 9 checks"),
        metrics=Metrics({"sport: 'a' [b]": 0.9, "tech": None}, 0.9),
        seconds={"train": 12.5},
        code="evertune 0.1.0",
    )
    return registry.publish(folder, replace(manifest, **extra))


def test_a_version_is_shown_with_all_that_is_known_of_it(client, tmp_path):
    registry = Registry(tmp_path / "news")
    publish(registry, tmp_path)
    version = publish(registry, tmp_path, weights=b"other")
    number = MLflowMirror(client.tracking_uri, name="it's news").mirror(version, production=True)
    assert number == "1"
    shown = client.get_model_version_by_alias("it's news", "production")
    assert str(shown.version) == "1"
    assert shown.description == "passed: 9 checks"
    assert shown.source == f"{registry.store.root}/versions/2/model"
    assert (Path(shown.source) / "model.safetensors").read_bytes() == b"other"
    assert shown.tags == {
        "evertune.version": "2",
        "evertune.parent": "1",
        "evertune.digest": digest(version),
        "evertune.verdict": "passed",
        "evertune.registry": registry.store.root,
        "evertune.experience": "sport",
        "evertune.created": version.manifest.created.isoformat(),
        "evertune.kind": "update",
        "evertune.reason": "200 records are pending",
        "evertune.consumed": "4",
        "evertune.offset": '{"line": 7}',
        "evertune.module": "SequenceClassificationModule",
        "evertune.code": "evertune 0.1.0",
    }
    run = client.get_run(shown.run_id)
    assert run.data.metrics == {
        "accuracy/sport_ _a_ _b_": 0.9,
        "average_accuracy": 0.9,
        "records/train": 180,
        "records/held_out": 20,
        "records/quarantined": 0,
        "seconds/train": 12.5,
    }
    assert run.data.tags["mlflow.runName"] == "version 2"
    assert run.info.status == "FINISHED"


def test_mirroring_again_changes_nothing_but_the_alias(client, tmp_path):
    registry, mirror = Registry(tmp_path / "news"), MLflowMirror(client.tracking_uri)
    versions = [publish(registry, tmp_path, weights=bytes([n])) for n in range(3)]
    for version in versions:
        mirror.mirror(version, production=version.number < 3)
    assert mirror.mirror(versions[2], production=False) == "3"
    assert str(client.get_model_version_by_alias("evertune", "production").version) == "2"
    assert mirror.mirror(versions[0], production=True) == "1"  # a rollback
    assert str(client.get_model_version_by_alias("evertune", "production").version) == "1"
    assert len(client.search_model_versions("name = 'evertune'")) == 3
    experiment = client.get_experiment_by_name("evertune").experiment_id
    assert len(client.search_runs([experiment])) == 3


def test_an_interrupted_attempt_is_gone_on_with(client, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    version = publish(Registry(tmp_path / "news"), tmp_path)
    mirror = MLflowMirror(client.tracking_uri)

    def fail(*args, **kwargs):
        raise ConnectionError("the cable was pulled")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "create_model_version", fail)
        with pytest.raises(RegistryError, match=r"version 1 is not mirrored as 'evertune' in MLflow at sqlite:.*cable"):
            mirror.mirror(version, production=True)
    assert mirror.mirror(version, production=True) == "1"
    assert len(client.search_runs([client.get_experiment_by_name("evertune").experiment_id])) == 1


def test_the_model_can_be_copied(client, tmp_path):
    version = publish(Registry(tmp_path / "news"), tmp_path)
    number = MLflowMirror(client.tracking_uri, upload=True).mirror(version, production=False)
    shown = client.get_model_version("evertune", number)
    copied = Path(client.download_artifacts(shown.run_id, "model"))
    assert (copied / "model.safetensors").read_bytes() == b"weights"
    assert shown.source.endswith("/artifacts/model")
    assert not client.get_registered_model("evertune").aliases


def test_a_registry_in_a_bucket_is_pointed_to(client, tmp_path):
    registry = Registry(f"memory://mlflow/{tmp_path.name}", cache=tmp_path / "cache")
    number = MLflowMirror(client.tracking_uri).mirror(publish(registry, tmp_path), production=False)
    assert client.get_model_version("evertune", number).source == f"{registry.store.root}/versions/1/model"


def test_two_registries_need_two_names(client, tmp_path):
    mirror = MLflowMirror(client.tracking_uri)
    one = publish(Registry(tmp_path / "one"), tmp_path)
    other = publish(Registry(tmp_path / "other"), tmp_path, weights=b"other")
    mirror.mirror(one, production=True)
    with pytest.raises(
        RegistryError, match=r"another version 1 under the name 'evertune', of the registry .*/one: give"
    ):
        mirror.mirror(other, production=True)


def test_a_server_that_is_away_is_said(client, tmp_path):
    version = publish(Registry(tmp_path / "news"), tmp_path)
    with pytest.raises(
        RegistryError, match=r"version 1 is not mirrored as 'evertune' in MLflow at http://127\.0\.0\.1:1"
    ):
        MLflowMirror("http://127.0.0.1:1").mirror(version, production=True)


@pytest.mark.parametrize("name", ["", "a/b", "a:b"])
def test_names_that_mlflow_cannot_take_are_refused(name):
    with pytest.raises(ValueError, match="name must not be empty and have no / or :"):
        MLflowMirror(name=name)


def test_without_mlflow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    version = publish(Registry(tmp_path / "news"), tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "evertune\[mlflow\]"'):
        MLflowMirror().mirror(version, production=True)
