"""The formulas behind ``evertune plan`` against real ranks: bytes that tensors hold, and bytes on the wire.

A BERT with random weights learns two experiences with Replay and EWC (the second has a past) on 1, 2 and 4 ranks over
gloo, under DDP, ZeRO-1, 2 and 3 and FSDP2, in fp32 and bf16, two micro-batches to a step, on 2 ranks also LoRA adapters
and OSFT. In the second experience each rank counts the storages of its weights, optimizer, gradients and methods, and
the first rank the bytes over the loopback device: all runs in a separate network namespace, where nothing else is sent.
Activations are counted by autograd's hooks on saved tensors. Then the formulas predict what 8, 64 and 1,024 GPUs would
need and send: predictions, which nobody has measured. Needs Linux, ``pip install evertune[deepspeed]`` and about 4 GB
of memory.

    python benchmarks/scaling.py            # about 10 minutes on 2 cores
    python benchmarks/scaling.py --quick    # about 1 minute
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from ranks import run_ranks
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import Dataset

from evertune.callbacks import EWC, OSFT, Replay
from evertune.cli.plan.gpus import GIB
from evertune.cli.plan.memory import activations, footprint
from evertune.cli.plan.shape import ModelShape, shape_of
from evertune.cli.plan.traffic import collectives, consolidation
from evertune.cli.plan.training import STRATEGIES, Training
from evertune.lightning_modules import SequenceClassificationModule
from evertune.shards.support import is_step_boundary
from evertune.strategies.masters import LiveMasters, masters_of
from evertune.streams import Experience, ExperienceDataModule
from evertune.tasks.texts import PadCollator
from evertune.utils.sharding import is_sharded

BATCH, TOKENS, ACCUMULATION, STEPS = 2, 16, 2, 4
CLASSES = ["a", "b"]
LORA = {"method": "lora", "r": 8, "target_modules": ["query", "value"]}
RATIO = 0.5  # of the directions that OSFT protects
PARTS = ("weights", "gradients", "optimizer", "methods")
LIMITS = {"memory_error": 0.1, "wire_error": 0.1, "activation_error": 0.1}
NAMESPACE = "EVERTUNE_BENCHMARK_NAMESPACE"

# assumptions of the predictions
FLOPS = 989e12  # an H100 in bf16, dense
UTILISATION = 0.4
INSIDE, BETWEEN = 450e9, 50e9  # bytes a second and direction: NVLink inside a node, one link of 400 Gb/s to the next
PER_NODE = 8
LLAMAS = (  # of one and seven billion parameters
    {"hidden_size": 2048, "num_hidden_layers": 22, "intermediate_size": 5632, "num_key_value_heads": 4},
    {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "num_key_value_heads": 32},
)


class Sentences(Dataset[dict[str, Any]]):
    """Random tokens of one length, with a label each."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {"input_ids": torch.randint(5, 1000, (TOKENS,), generator=generator), "labels": CLASSES[index % 2]}


# --- on each rank


def own(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def tensors_in(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield own(thing)
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from tensors_in(value)
    elif isinstance(thing, list | tuple | set):
        for value in thing:
            yield from tensors_in(value)


def loopback() -> int:
    """Bytes that the loopback device has carried."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


class Census(pl.Callback):
    """What this rank holds: the most of each part, between two micro-batches and right before a step."""

    def __init__(self, method: EWC | OSFT) -> None:
        self.method = method
        self.held: dict[str, int] = {}
        self.resident = 0
        self.carried: list[int] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 2:
            self.count(trainer, module)
        if (batch_idx + 1) % ACCUMULATION == 0:
            if trainer.world_size > 1:
                torch.distributed.barrier()
            self.carried.append(loopback())

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, *rest: Any) -> None:
        if trainer.global_step == 2 and is_step_boundary(trainer):
            self.count(trainer, module)

    def count(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        gc.collect()
        seen: set[int] = set()
        for part, tensors in self.parts(trainer, module).items():
            size = 0
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    size += storage.nbytes()
            self.held[part] = max(self.held.get(part, 0), size)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident = max(self.resident, pages * os.sysconf("SC_PAGE_SIZE"))

    def parts(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Iterable[Tensor]]:
        """Tensors of each part; a storage that two parts have counts for the first."""
        parameters = list(module.parameters())
        sharded = getattr(getattr(trainer.strategy.model, "optimizer", None), "optimizer", None) is not None
        optimizer: Any = trainer.strategy.model.optimizer if sharded else trainer.optimizers[0]
        masters = [
            *getattr(optimizer, "single_partition_of_fp32_groups", []),
            *getattr(optimizer, "fp32_partitioned_groups_flat", []),
        ]
        left = masters_of(module)
        matrices = getattr(getattr(self.method, "_subspaces", None), "_matrices", {})
        gradients = ["averaged_gradients", "all_grad_tensors", "grads_in_partition", "grad_partitions_flat_buffer"]
        return {
            "weights": [
                *(own(p.data) for p in parameters if not hasattr(p, "ds_id") or p.ds_persist),
                *(p.ds_tensor for p in parameters if hasattr(p, "ds_id")),
            ],
            "methods": [
                *(value for values in self.method.tensors.values() for value in values),
                *(basis for one in matrices.values() for basis in (one.left, one._right)),
            ],
            "optimizer": [
                *(master.data for master in masters),
                *tensors_in(dict(optimizer.state)),
                *(left.tensors if isinstance(left, LiveMasters) else ()),
            ],
            "gradients": [
                *(own(p.grad) for p in (*parameters, *masters) if p.grad is not None),
                *(tensor for name in gradients for tensor in tensors_in(getattr(optimizer, name, None))),
            ],
        }


def worker(job: dict[str, Any]) -> None:
    """Run every case of a job on this rank, and write what it held."""
    import logging

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    results = []
    for case in job["cases"]:
        pl.seed_everything(0, verbose=False)
        module = SequenceClassificationModule(
            job["folder"], classes=CLASSES, dropout=0.0, freeze_layers=case["freeze_layers"], peft=case.get("peft")
        )
        ewc: EWC | OSFT = OSFT(RATIO) if "osft" in case else EWC(ewc_lambda=1.0, n_examples=8, batch_size=4)
        replay = Replay(memory_size=20)
        for experience in ("first", "second"):
            census = Census(ewc)
            trainer = pl.Trainer(
                max_epochs=1,
                accelerator="cpu",
                devices=world_size,
                strategy=case["strategy"] if world_size > 1 or case["strategy"] != "ddp" else "auto",
                precision=case["precision"],
                accumulate_grad_batches=ACCUMULATION,
                callbacks=[replay, ewc, census],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            n_steps = STEPS if experience == "second" else 1
            data = Experience(experience, Sentences(BATCH * world_size * ACCUMULATION * n_steps), classes=CLASSES)
            trainer.fit(
                module,
                datamodule=ExperienceDataModule(
                    data, batch_size=BATCH, collate_fn=PadCollator(0), label="labels", bucketed=False
                ),
            )
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))  # Lightning removes them when a fit ends
            os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")
        steps = sorted(after - before for before, after in zip(census.carried, census.carried[1:], strict=False))
        results.append({"held": census.held, "resident": census.resident, "step": steps[len(steps) // 2]})
        del module, trainer, ewc, replay, census
        gc.collect()
    Path(job["out"], f"{rank}.json").write_text(json.dumps(results))


# --- here


def reports(world_size: int, folder: str, cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """For each case, the report of each rank."""
    told = run_ranks(__file__, world_size, {"folder": folder, "cases": cases}, 1800, GLOO_SOCKET_IFNAME="lo")
    return [list(per_rank) for per_rank in zip(*told, strict=True)]


def compare(world_size: int, folder: str, cases: list[dict[str, Any]], table: Table) -> tuple[float, float]:
    """Rows of measured bytes over formula; the largest errors of memory and of the wire."""
    memory_error = wire_error = 0.0
    for case, ranks in zip(cases, reports(world_size, folder, cases), strict=True):
        settings = {"model_name_or_path": folder, "freeze_layers": case["freeze_layers"], "peft": case.get("peft")}
        protects = OSFT(RATIO).matrices if "osft" in case else None
        shape = shape_of({**settings, "dropout": 0.0}, 2, protects=protects)
        training = Training(
            **STRATEGIES[case["strategy"]]._asdict(),
            world_size=world_size,
            precision=case["precision"],
            batch_size=BATCH,
            seq_length=TOKENS,
            accumulation=ACCUMULATION,
            method_bytes=0 if "osft" in case else EWC.bytes_per_weight(),
            rank_ratio=RATIO if "osft" in case else 0.0,
            estimation_batch_size=4,
            replay_ratio=1.0,
            memory_size=20,
            gpu=False,
        )
        costs = footprint(shape, training)
        cells = []
        for part in PARTS:
            measured, formula = max(rank["held"][part] for rank in ranks), getattr(costs, part)
            memory_error = max(memory_error, abs(measured / formula - 1))
            cells.append(f"{measured / 1e6:.2f} / {formula / 1e6:.2f}")
        wire = "nothing"
        if world_size > 1:
            sent = sum(move.sent(world_size, gloo=True) for move in collectives(shape, training))
            measured_sent = ranks[0]["step"] / world_size
            wire_error = max(wire_error, abs(measured_sent / sent - 1))
            wire = f"{measured_sent / 1e6:.2f} / {sent / 1e6:.2f}"
        resident = max(rank["resident"] for rank in ranks) / 1e6
        name = case["strategy"].replace("evertune_deepspeed_stage_", "ZeRO-").replace("evertune_fsdp2", "FSDP2")
        name = name.replace("ddp", "DDP")
        name = "one device" if world_size == 1 and name == "DDP" else name
        frozen = f", {case['freeze_layers']} frozen" if case["freeze_layers"] else ""
        frozen += ", LoRA" if "peft" in case else ", OSFT" if "osft" in case else ""
        table.add_row(str(world_size), name, f"{case['precision']}{frozen}", *cells, wire, f"{resident:.0f}")
    return memory_error, wire_error


def saved_bytes(model: torch.nn.Module, examples: int, tokens: int) -> int:
    """Storage that autograd keeps of a forward pass, the parameters and buffers not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.ones(examples, tokens, dtype=torch.long)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        assert hidden.requires_grad
    return sum(kept.values())


def compare_activations(table: Table) -> float:
    """What a layer keeps of a forward pass, over formula: the difference of three layers and one."""
    from transformers import AutoModel, BertConfig, LlamaConfig

    sizes = {"vocab_size": 100, "hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 64}
    error = 0.0
    for name, heads, config in (
        (
            "BERT",
            {},
            BertConfig(**sizes, intermediate_size=1024, attention_probs_dropout_prob=0, hidden_dropout_prob=0),
        ),
        ("Llama", {"num_key_value_heads": 2}, LlamaConfig(**sizes, intermediate_size=688, num_key_value_heads=2)),
    ):
        for dtype, precision in ((torch.float32, "32-true"), (torch.bfloat16, "bf16-true")):
            found = []
            for layers in (1, 3):
                config.num_hidden_layers = layers
                model = AutoModel.from_config(config).to(dtype).train()
                found.append(saved_bytes(model, 3, 40))
            measured = (found[1] - found[0]) / 2
            shape = ModelShape(
                groups=(),
                layers=1,
                hidden=256,
                intermediate=config.intermediate_size,
                heads=4,
                kv_heads=heads.get("num_key_value_heads", 4),
                gated=name == "Llama",
                rms_norm=name == "Llama",
                dropout=False,
            )
            formula = activations(shape, Training(stage=0, precision=precision, seq_length=40), 3)  # type: ignore[arg-type]
            error = max(error, abs(measured / formula - 1))
            table.add_row(name, precision, f"{measured / 1e6:.3f}", f"{formula / 1e6:.3f}")
    return error


def predict(table: Table) -> dict[str, float]:
    """Predictions of the formulas for clusters."""
    from transformers import LlamaConfig

    figures = {}
    for sizes in LLAMAS:
        with tempfile.TemporaryDirectory() as folder:
            LlamaConfig(vocab_size=32000, num_attention_heads=32, **sizes).save_pretrained(folder)
            shape = shape_of({"model_name_or_path": folder}, 10)
        name = f"{shape.total / 1e9:.1f}B"
        base = Training(
            stage=1,
            precision="bf16-mixed",
            batch_size=1,
            seq_length=2048,
            method_bytes=EWC.bytes_per_weight(),
            estimation_batch_size=1,
            replay_ratio=1.0,
            memory_size=10_000,
        )
        compute = 6 * shape.total * base.examples * base.seq_length / (FLOPS * UTILISATION)
        for stage in (1, 2, 3):
            for world_size in (8, 64, 1024):
                training = replace(base, stage=stage, world_size=world_size)
                costs = footprint(shape, training)
                sent = sum(move.sent(world_size) for move in collectives(shape, training))
                once = sum(move.sent(world_size) for move in consolidation(shape, training, n_classes=10))
                rate = INSIDE if world_size <= PER_NODE else BETWEEN
                states = costs.weights + costs.gradients + costs.optimizer
                parts = (states, costs.methods, costs.activations, costs.buffers, costs.total, sent)
                table.add_row(
                    name,
                    f"ZeRO-{stage}",
                    f"{world_size:,}",
                    *(f"{size / GIB:.2f}" for size in parts),
                    f"{max(compute, sent / rate):.2f} to {compute + sent / rate:.2f}",
                    f"{once / GIB:,.0f}",
                    f"{once / rate:.0f}",
                )
                figures[f"predicted_gib_{name}_zero{stage}_{world_size}"] = round(costs.total / GIB, 3)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller model, 2 ranks, fewer cases")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker))
        return
    enter_namespace()
    warnings.filterwarnings("ignore")
    from transformers import BertConfig, BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    console = Console(width=170)
    layers, vocabulary = (2, 4000) if options.quick else (6, 30522)
    columns = ("ranks", "", "precision", *PARTS, "sent in a step", "RSS")
    table = Table(*columns, title="MB of the rank that holds most: measured / formula")
    errors = {"memory_error": 0.0, "wire_error": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=384,
            num_hidden_layers=layers,
            num_attention_heads=6,
            intermediate_size=1536,
            max_position_embeddings=64,
        )
        BertModel(config).save_pretrained(folder)
        for world_size in (2,) if options.quick else (1, 2, 4):
            memory, wire = compare(world_size, folder, cases_of(world_size, options.quick), table)
            errors = {
                "memory_error": max(errors["memory_error"], memory),
                "wire_error": max(errors["wire_error"], wire),
            }
    console.print(table)
    kept = Table("model", "precision", "measured", "formula", title="MB that a layer keeps for its backward pass")
    errors["activation_error"] = compare_activations(kept)
    console.print(kept)
    columns = ("model", "", "GPUs", "model states", "EWC", "activations", "buffers", "peak", "sent", "seconds a step")
    foreseen = Table(*columns, "EWC once", "seconds", title="Predicted, not measured: GiB of each GPU")
    figures = predict(foreseen)
    console.print(foreseen)
    print(
        json.dumps(
            {
                "benchmark": "scaling",
                "size": {"layers": layers, "vocabulary": vocabulary, "quick": options.quick},
                "results": figures,
                "bars": {
                    name: {"value": round(value, 5), "limit": LIMITS[name], "ok": value <= LIMITS[name]}
                    for name, value in errors.items()
                },
            }
        )
    )


def cases_of(world_size: int, quick: bool) -> list[dict[str, Any]]:
    """What is run: each strategy in both precisions, and with frozen layers."""
    strategies = [name for name in STRATEGIES if not name.endswith("offload")]
    cases = [
        {"strategy": strategy, "precision": precision, "freeze_layers": 0}
        for precision in ("32-true", "bf16-mixed")
        for strategy in strategies
    ]
    if world_size == 2:
        for strategy in ("evertune_deepspeed_stage_2", "evertune_fsdp2"):
            cases += [
                {"strategy": strategy, "precision": "32-true", "freeze_layers": 0, **more}
                for more in ({"peft": LORA}, {"osft": True})
            ]
    if quick:
        return [
            case
            for case in cases
            if case["strategy"] != strategies[1]
            and (case["precision"] == "bf16-mixed" or case.keys() & {"peft", "osft"})
        ]
    if world_size == 2:
        cases += [{"strategy": name, "precision": "bf16-mixed", "freeze_layers": 3} for name in strategies[2:]]
    return cases


def enter_namespace() -> None:
    """Start again in a network namespace of our own, so that the loopback device carries nothing but our ranks'."""
    if os.environ.get(NAMESPACE):
        return
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        raise SystemExit("the bytes on the wire are counted in a network namespace: install util-linux and iproute2")
    inside = ["bash", "-c", 'ip link set lo up && exec "$@"', "-", sys.executable, *sys.argv]
    os.environ[NAMESPACE] = "1"
    os.execvp("unshare", ["unshare", "--net", "--map-root-user", *inside])


if __name__ == "__main__":
    main()
