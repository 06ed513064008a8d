"""What ``import evertune`` costs and gives."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import evertune

HEAVY = [
    "torch",
    "lightning",
    "pytorch_lightning",
    "torchmetrics",
    "transformers",
    "deepspeed",
    "datasets",
    "pandas",
    "pyarrow",
    "jinja2",
    "safetensors",
    "evertune.callbacks",
    "evertune.training.trainer",
]

LIST_MODULES = """
import sys, json
before = set(sys.modules)
import evertune
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_import_loads_nothing_heavy() -> None:
    output = subprocess.run([sys.executable, "-c", LIST_MODULES], capture_output=True, text=True, check=True).stdout
    new = set(json.loads(output))
    assert not new.intersection(HEAVY)
    assert {name.split(".")[0] for name in new} <= {"evertune"}


def test_names_that_are_loaded_when_asked_for() -> None:
    assert evertune.ContinualTrainer.__module__ == "evertune.training.trainer"
    assert evertune.History.__module__ == "evertune.metrics.history"
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        _ = evertune.Trainer
