"""What ``import evertune`` costs and gives."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import evertune

HEAVY = {
    *("torch", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "transformers", "pyarrow"),
    *("deepspeed", "datasets", "pandas", "numpy", "jinja2", "safetensors"),
}

LIST_MODULES = """
import json, sys
before = set(sys.modules)
try:
    {code}
except SystemExit as end:
    assert not end.code, end.code
finally:
    print("\\n" + json.dumps(sorted(set(sys.modules) - before)))
"""


def modules_after(code: str, folder: Path) -> set[str]:
    """What a fresh interpreter has loaded after some code."""
    command = [sys.executable, "-c", LIST_MODULES.format(code=code)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_loads_nothing_but_evertune(tmp_path: Path) -> None:
    assert {name.split(".")[0] for name in modules_after("import evertune", tmp_path)} <= {"evertune", "__future__"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["registry", "list", "registry"],
        ["launch", "slurm", "--dry_run", "--", "fit", "--config", "fit.yaml"],
    ],
)
def test_commands_that_load_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "registry" / "versions").mkdir(parents=True)
    (tmp_path / "registry" / "versions" / ".keep").touch()
    (tmp_path / "fit.yaml").write_text("launch: {nodes: 2}")
    loaded = modules_after(f"from evertune.cli.main import main; main({arguments!r})", tmp_path)
    assert "evertune.cli.main" in loaded
    assert not loaded & HEAVY


def test_names_that_are_loaded_when_asked_for() -> None:
    assert evertune.ContinualTrainer.__module__ == "evertune.training.trainer"
    assert evertune.History.__module__ == "evertune.metrics.history"
    assert evertune.__version__ == version("evertune")
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        _ = evertune.Trainer


@pytest.mark.parametrize(
    "room", ["callbacks", "drift", "lightning_modules", "live.triggers", "memory", "sources", "streams"]
)
def test_no_argument_is_a_boolean_in_yaml(room: str) -> None:
    """An unquoted ``on:`` in a configuration is the key True, and nothing takes it."""
    module = import_module(f"evertune.{room}")
    classes = [getattr(module, name) for name in dir(module) if name[0].isupper()]
    assert classes
    for one in classes:
        if "__init__" in getattr(one, "__dict__", {}) and inspect.isfunction(one.__init__):
            assert not {"on", "off", "yes", "no", "y", "n"} & set(inspect.signature(one.__init__).parameters), one
