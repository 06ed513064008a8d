"""Every method gives the same weights on one process, DDP, ZeRO-1, 2 and 3, and FSDP2."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertTokenizer

from tests.helpers.distributed import run_ranks
from tests.helpers.shard_worker import make_bert

STRATEGIES = (
    "ddp",
    "evertune_deepspeed_stage_1",
    "evertune_deepspeed_stage_2",
    "evertune_deepspeed_stage_3",
    "evertune_fsdp2",
)

METHODS = (
    "replay",
    "ewc",
    "replay+ewc",
    "l2sp+loss",
    "replay+imprint+adjust+unknown",
    "dark",
    "mir",
    "replay+distil",
    "replay+erace",
    "replay+wise",
    "pretrained",
    "mas",
    "si",
    "replay+agem",
    "replay+gem",
    "ema",
    "perturb",
    "osft",
    "replay+olora+adjust",
    "seq",
    "fgm",
    "replay+inflora",
    "replay+freelb",
    "lora-ties",
    "replay+lora-max",
    "replay+dora",
    "replay+ia3",
    "replay+augment",
    "replay+bottleneck",
)

WITHOUT = {("evertune_deepspeed_stage_3", "replay+dora")}
"""What is refused."""

RUNS = [
    {"method": method, "optimizer": optimizer, "accumulation": accumulation}
    for method, optimizer, accumulation in itertools.product(METHODS, ("sgd", "adamw"), (1, 3))
]


def quick(strategy: str) -> list[dict[str, Any]]:
    """One run of every fifth method, so that each meets one of the five strategies; the settings take turns."""
    turns = [number + STRATEGIES.index(strategy) for number in range(len(METHODS))]
    chosen = [RUNS[4 * number + turn // 5 % 4] for number, turn in enumerate(turns) if turn % 5 == 0]
    # Adapters under ZeRO-3 take half a minute a run: those are in the slow tests.
    slow = strategy == "evertune_deepspeed_stage_3"
    return [
        run for run in chosen if (strategy, run["method"]) not in WITHOUT and not (slow and "lora" in run["method"])
    ]


QUICK = [(strategy, run["method"]) for strategy in STRATEGIES for run in quick(strategy)]


OFFLOADED = {"method": "replay+ewc", "optimizer": "adamw", "accumulation": 3}
COMPARED = [run for run in RUNS if run == OFFLOADED or any(run in quick(one) for one in STRATEGIES)]
"""Those that the quick tests need of one process."""


def weights(folder: Path, run: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{run['method']}-{run['optimizer']}-{run['accumulation']}.safetensors")


def assert_same_weights(run: dict[str, Any], one_process: Path, folder: Path) -> None:
    expected, found = weights(one_process, run), weights(folder, run)
    atol = 1e-5 if "imprint" in run["method"] else 1e-6  # a cosine head has a scale, which multiplies rounding, too
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        where = f"{run} {name}"
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=atol, msg=lambda m, w=where: f"{w}: {m}")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = make_bert(tmp_path_factory.mktemp("bert"))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(35))]
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_process(bert: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("one_process")
    runs = RUNS if any(one.get_closest_marker("slow") for one in request.session.items) else COMPARED
    run_ranks("tests.helpers.shard_worker:learn_two", 1, folder=bert, out=str(folder), strategy="auto", runs=runs)
    return folder


@pytest.fixture(scope="module")
def two_processes(bert: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The runs under a strategy: one start of two processes for all of them."""

    @cache
    def learn(strategy: str) -> Path:
        folder = tmp_path_factory.mktemp("two_processes")
        learn_sharded(strategy, quick(strategy), bert, folder)
        return folder

    return learn


def learn_sharded(strategy: str, runs: list[dict[str, Any]], bert: str, folder: Path) -> None:
    run_ranks("tests.helpers.shard_worker:learn_two", 2, folder=bert, out=str(folder), strategy=strategy, runs=runs)


def check(strategy: str, runs: list[dict[str, Any]], bert: str, one_process: Path, folder: Path) -> None:
    learn_sharded(strategy, runs, bert, folder)
    for run in runs:
        assert_same_weights(run, one_process, folder)


@pytest.mark.parametrize(("strategy", "method"), QUICK)
def test_shard_exact(strategy: str, method: str, two_processes: Callable[[str], Path], one_process: Path) -> None:
    [run] = [run for run in quick(strategy) if run["method"] == method]
    assert_same_weights(run, one_process, two_processes(strategy))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_shard_exact_for_all_combinations(
    strategy: str, method: str, bert: str, one_process: Path, tmp_path: Path
) -> None:
    if (strategy, method) in WITHOUT:
        with pytest.raises(RuntimeError, match="use_dora needs whole weights"):
            learn_sharded(strategy, [{"method": method, "optimizer": "sgd", "accumulation": 1}], bert, tmp_path)
        return
    others = [run for run in RUNS if run["method"] == method and run not in quick(strategy)]
    check(strategy, others, bert, one_process, tmp_path)


@pytest.mark.parametrize("strategy", ["evertune_deepspeed_stage_2_offload", "evertune_deepspeed_stage_3_offload"])
def test_shard_exact_offloaded(strategy: str, bert: str, one_process: Path, tmp_path: Path) -> None:
    check(strategy, [OFFLOADED], bert, one_process, tmp_path)


def test_methods_change_the_weights(one_process: Path) -> None:
    """Equality above would say nothing if the methods did nothing."""
    alike: dict[tuple[str, int], list[dict[str, torch.Tensor]]] = {}  # what differs by the method alone
    for run in COMPARED:
        alike.setdefault((run["optimizer"], run["accumulation"]), []).append(weights(one_process, run))
    assert len({run["method"] for run in COMPARED}) == len(METHODS)
    for one, other in itertools.chain(*(itertools.combinations(group, 2) for group in alike.values())):
        assert any((one[name] - other[name]).abs().max() > 1e-4 for name in one.keys() & other.keys())
