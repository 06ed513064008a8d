"""The Fisher of two ranks, under every strategy, is that of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from evertune._lightning import pl
from evertune.importance import IndexedBatch, estimate_fisher
from evertune.shards.opened import shards_of
from tests.helpers.distributed import run_ranks
from tests.helpers.quiet import QUIET
from tests.importance.test_fisher import EXAMPLES, Bert, assert_same, fisher

ESTIMATORS = ("exact", "sampled", "empirical")


class Untouched(Bert):
    """Trained with a learning rate of zero."""

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return self(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Consolidate(pl.Callback):
    """Estimates at the end of a fit, with the examples dealt to the ranks in turn and the last batch filled up."""

    def __init__(self) -> None:
        self.result: dict[str, list[list[float]]] = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        shards, size = shards_of(trainer), 4
        for estimator in (*ESTIMATORS, "batched"):
            own = estimate_fisher(pl_module, self.batches(trainer, pl_module, size), shards, estimator)  # type: ignore[arg-type]
            held = {f.name: (f, values) for f, values in zip(shards.fragments, own, strict=True)}
            self.result[estimator] = []
            for name, shape in shards.shapes.items():
                whole = torch.zeros(shape.numel())
                if name in held:
                    held[name][0].slice(whole).copy_(held[name][1])
                self.result[estimator].append((shards.sum_over_ranks(whole) if shards.sharded else whole).tolist())

    @staticmethod
    def batches(trainer: pl.Trainer, module: Any, size: int) -> Any:
        places = list(range(EXAMPLES)) + [-1] * (-EXAMPLES % (size * trainer.world_size))
        for at in range(0, len(places), size * trainer.world_size):
            own = places[at : at + size * trainer.world_size][trainer.global_rank :: trainer.world_size]
            rows = [module.batch(range(max(place, 0), max(place, 0) + 1)) for place in own]
            batch = {key: [row[key] for row in rows] for key in rows[0]}
            width = max(ids.shape[1] for ids in batch["input_ids"])
            padded = {
                key: torch.cat(
                    [torch.nn.functional.pad(v, (0, width - v.shape[1])) if v.ndim == 2 else v for v in values]
                )
                for key, values in batch.items()
            }
            yield IndexedBatch(padded, own)


def estimate(strategy: str) -> dict[str, list[list[float]]]:
    """One fit of one step that changes nothing, then the Fisher."""
    torch.manual_seed(0)
    module, consolidate = Untouched(), Consolidate()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=1,
        callbacks=[consolidate],
        **QUIET,
    )
    rows = [{key: value[0] for key, value in module.batch(range(2, 3)).items()}] * 4
    trainer.fit(module, DataLoader(rows, batch_size=2))
    return consolidate.result


@pytest.mark.parametrize(
    "strategy",
    [
        "ddp",
        pytest.param("evertune_deepspeed_stage_2", marks=pytest.mark.slow),
        "evertune_deepspeed_stage_3",
        "evertune_fsdp2",
    ],
)
def test_batch_free_importance_on_two_ranks(strategy: str) -> None:
    ranks = run_ranks("tests.importance.test_ranks:estimate", world_size=2, strategy=strategy)
    for result in ranks:
        for estimator in ESTIMATORS:
            assert_same([torch.tensor(values) for values in result[estimator]], fisher("bert", 64, estimator))
        assert_same([torch.tensor(values) for values in result["batched"]], fisher("bert", 8, "batched"))
