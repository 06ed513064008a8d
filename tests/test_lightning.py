"""Both Lightnings: each alone, both in one process, and what of their private names is missing after an upgrade."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from evertune import _lightning
from tests.helpers.fresh import Fresh
from tests.helpers.lightning_worker import two_ranks
from tests.helpers.shard_worker import make_bert

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = [one for one in _lightning.PACKAGES if find_spec(one.partition(".")[0])]
BOTH = len(INSTALLED) == 2


@pytest.fixture(scope="module")
def fresh() -> Iterator[Fresh]:
    processes = Fresh(settings())
    yield processes
    processes.close()


def settings(**variables: str) -> dict[str, str]:
    """An environment in which no test has told which Lightning to use."""
    inherited = {name: value for name, value in os.environ.items() if name != "EVERTUNE_LIGHTNING"}
    return inherited | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | variables


def run(fresh: Fresh, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python in a fresh process."""
    return fresh.run(*arguments, environment=settings(**variables))


def worker(fresh: Fresh, function: str, *arguments: str, **variables: str) -> Any:
    """What a function of tests/helpers/lightning_worker.py returns, run in a fresh process."""
    done = run(fresh, "-m", "tests.helpers.lightning_worker", function, *arguments, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


WEIGHTS: dict[str, list[float]] = {}


@pytest.mark.parametrize("package", INSTALLED)
def test_one_package_alone(fresh: Fresh, package: str, tmp_path: Path) -> None:
    found = worker(fresh, "alone", package, str(tmp_path))
    assert found["status"] == "promoted"
    assert found["rows"] == 2
    assert found["foreign"] == [], "the other package was imported"
    WEIGHTS[package] = found["weights"]
    assert len(set(map(tuple, WEIGHTS.values()))) == 1, "the two packages end in different weights"


if BOTH:  # the environment of `make test-lightning` has one

    def test_callbacks_and_strategies_work_with_trainers_of_both_packages_in_one_process(
        fresh: Fresh, tmp_path: Path
    ) -> None:
        found = worker(fresh, "both", str(tmp_path))
        assert found["weights"][0] == found["weights"][1]
        assert "lightning.pytorch and pytorch_lightning are both imported" in found["refusal"]
        assert "EVERTUNE_LIGHTNING=lightning" in found["refusal"]

    @pytest.mark.parametrize("package", INSTALLED)
    def test_what_the_other_package_made_is_refused_by_name(fresh: Fresh, package: str) -> None:
        other = next(one for one in INSTALLED if one != package)
        messages = worker(fresh, "refused", package, EVERTUNE_LIGHTNING=package.partition(".")[0]).splitlines()
        assert [message.split()[0] for message in messages] == ["ContinualTrainer"] * 3
        for message, name in zip(messages, ("Classifier", "SingleDeviceStrategy", "ModelCheckpoint"), strict=True):
            assert f"made with {package}, but it was given a {name} made with {other}; use one of the two" in message
            assert "EVERTUNE_LIGHTNING=pytorch_lightning" in message

    @pytest.mark.slow
    def test_two_ranks_end_in_the_same_weights_with_both_packages(fresh: Fresh, tmp_path: Path) -> None:
        folder = make_bert(tmp_path / "bert")
        two_ranks(folder, str(tmp_path / "pytorch_lightning"))  # that of the tests, see conftest.py
        worker(fresh, "two_ranks", folder, str(tmp_path / "lightning"), EVERTUNE_LIGHTNING="lightning")
        one, other = tmp_path / "lightning", tmp_path / "pytorch_lightning"
        file = "replay+ewc-sgd-1.safetensors"
        assert (one / file).read_bytes() == (other / file).read_bytes()


PRINT_PACKAGE = "import evertune, sys; from evertune import _lightning; print(_lightning.package())"


@pytest.mark.parametrize(
    ("code", "environment", "expected"),
    [
        ("import pytorch_lightning", {}, "pytorch_lightning"),
        ("import lightning", {}, "lightning.pytorch"),
        ("", {}, INSTALLED[0]),
        *(
            pytest.param("", {"EVERTUNE_LIGHTNING": one.partition(".")[0]}, one, marks=pytest.mark.slow)
            for one in INSTALLED
        ),
        ("import lightning", {"EVERTUNE_LIGHTNING": "pytorch_lightning"}, "pytorch_lightning"),
    ],
)
def test_which_package_is_used(fresh: Fresh, code: str, environment: dict[str, str], expected: str) -> None:
    roots = {one.partition(".")[0] for one in INSTALLED}
    if not {*code.split()[1:], *environment.values()} <= roots:
        return  # a case of two packages
    done = run(fresh, "-c", f"{code or 'pass'}; {PRINT_PACKAGE}", **environment)
    assert done.stdout.strip() == expected, done.stderr


WITHOUT_LIGHTNING = """
import evertune
try:
    from evertune.callbacks import Replay
except ImportError as error:
    print(error)
from evertune.cli.main import main
main(["fit"])
"""


@pytest.mark.parametrize(
    ("hidden", "environment", "message"),
    [
        (["lightning", "pytorch_lightning"], {}, r"pip install 'evertune[lightning]'"),
        ([], {"EVERTUNE_LIGHTNING": "torch"}, "must be 'lightning' or 'pytorch_lightning', got 'torch'"),
        (["lightning"], {"EVERTUNE_LIGHTNING": "lightning"}, "is not installed: pip install 'evertune[lightning]'"),
    ],
)
def test_no_package_to_use(fresh: Fresh, hidden: list[str], environment: dict[str, str], message: str) -> None:
    hide = f"import sys; sys.modules.update(dict.fromkeys({hidden!r}))"
    done = run(fresh, "-c", f"{hide}\n{WITHOUT_LIGHTNING}", **environment)
    assert done.returncode == 2, done.stderr
    assert message in done.stdout.splitlines()[-1]
    assert done.stderr.startswith("evertune fit: ")
    assert message in done.stderr


ORDERS = ["import {0}; import evertune", "import evertune; import {0}.callbacks.timer"]
REGISTERED = """
import sys
for package in {packages!r}:
    assert "evertune_deepspeed_stage_3" in sys.modules[package + ".strategies"].StrategyRegistry, package
    module = sys.modules[package]
    loader = module.__spec__.loader
    assert module.__loader__ is loader and "exec_module" not in vars(loader), loader
assert ("_Finder" in str(sys.meta_path)) == {waits}
"""


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("package", INSTALLED[:1])
def test_strategies_are_registered_in_each_order_of_imports(fresh: Fresh, order: str, package: str) -> None:
    done = run(fresh, "-c", order.format(package) + REGISTERED.format(packages=[package], waits=True))
    assert done.returncode == 0, done.stderr


if BOTH:

    @pytest.mark.parametrize(
        "order",
        ["import evertune, lightning, pytorch_lightning", "import lightning, evertune; import pytorch_lightning as pl"],
    )
    def test_strategies_are_registered_with_both(fresh: Fresh, order: str) -> None:
        done = run(fresh, "-c", order + REGISTERED.format(packages=INSTALLED, waits=False))
        assert done.returncode == 0, done.stderr


PRIVATE = {
    "trainer.connectors.signal_connector:_SignalConnector": "register_signal_handlers _original_handlers",
    "trainer.trainer:Trainer": "_signal_connector _accelerator_connector",
    "trainer.connectors.accelerator_connector:_AcceleratorConnector": "cluster_environment",
    "strategies:DDPStrategy": "_start_method setup_environment",
    "strategies:DeepSpeedStrategy": "_setup_model_and_optimizer _initialize_deepspeed_inference "
    "_auto_select_batch_size _init_deepspeed_distributed " + " ".join(_lightning.REPLACED),
    "strategies:ModelParallelStrategy": "_data_parallel_size _tensor_parallel_size _device_mesh setup_environment "
    "setup setup_optimizers device_mesh lightning_module_state_dict optimizer_state",
    "strategies:Strategy": " ".join(_lightning.REPLACED),
    "loops.training_epoch_loop:_TrainingEpochLoop": "_is_training_done _should_check_val_fx val_loop",
    "loops.evaluation_loop:_EvaluationLoop": " ".join(_lightning.REPLACED_IN_LOOP),
    "loops.fit_loop:_FitLoop": "_data_fetcher _combined_loader _combined_loader_states_to_load "
    "_load_combined_loader_states _data_source is_resuming epoch_loop " + " ".join(_lightning.REPLACED_IN_LOOP),
    "loops.progress:_ProcessedTracker": "processed",
    "trainer.connectors.data_connector:_DataLoaderSource": " ".join(_lightning.REPLACED_IN_SOURCE),
    "core:LightningModule": "_on_before_batch_transfer",
}
"""All that evertune uses of Lightning although Lightning may change it in any release: classes and what they have."""


@pytest.mark.parametrize("package", INSTALLED)
def test_no_private_name_of_lightning_is_missing(package: str) -> None:
    missing = []
    for place, names in PRIVATE.items():
        home, _, owner = place.partition(":")
        cls = getattr(import_module(f"{package}.{home}"), owner, None)
        source = "" if cls is None else "".join(inspect.getsource(base) for base in cls.__mro__[:-1])
        missing += [f"{package}.{home}.{owner}.{name}" for name in names.split() if name not in source]
    assert not missing, "Lightning has changed: look at evertune/_lightning.py"


@pytest.mark.parametrize("package", INSTALLED)
def test_no_public_name_of_lightning_is_missing(package: str) -> None:
    names = [*_lightning._NAMES, *_lightning._FABRIC_NAMES]
    missing = []
    for name in names:
        try:
            _lightning._find(package, name)
        except (ImportError, AttributeError):
            missing.append(name)
    assert not missing
