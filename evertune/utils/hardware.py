"""Which precision and which implementation of attention train a transformer fastest on this machine."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from evertune._lightning import isolate_rng
from evertune.utils.gpus import computes_in_bf16

_TEXTS, _TOKENS = 32, 16  # a usual batch: in bf16 a small one would mostly wait for its weights to be cast
_REPEATS, _ENOUGH = 3, 0.5  # measurements of a candidate; seconds after which no other follows
_WORTH = 0.85
"""A candidate needs less than this share of the time of the first: noise must not decide, and two runs should agree."""

PRECISIONS = ("32-true", "bf16-mixed")
ATTENTIONS = ("sdpa", "eager")


@dataclass(frozen=True)
class Choice:
    """A precision and an implementation of attention for a transformer on a machine.

    Args:
        precision: Precision of the Trainer.
        attention: Implementation of attention, one of transformers' own.
        reason: Why they were chosen, in words.
        where: The transformer and the machine.
    """

    precision: str
    attention: str
    reason: str
    where: str


def fastest(
    transformer: Any,
    device: torch.device,
    precisions: Sequence[str] = PRECISIONS,
    attentions: Sequence[str] = ATTENTIONS,
) -> Choice:
    """The precision and the attention with which a training step on short texts takes the least time.

    On a GPU nothing is measured: bf16 if it computes in that, and the attention that the model has. On a CPU, the
    forward and backward pass of 32 texts of 16 tokens are timed with each combination. Some CPUs compute in bf16
    several times as fast as in fp32, others a tenth as fast: if a matrix product is slower in bf16, only fp32 is timed.
    The first of each list is preferred unless another saves 15%. MiniLM takes three or four seconds.

    The model is left as it was: its weights, gradients and mode, and the random state.

    Args:
        transformer: Model of transformers, with whole weights. One that does not read ``input_ids``, or does not let
            its attention be chosen, gets what it has and the first precision.
        device: Device on which it will train.
        precisions: Precisions to choose from. By default ``"32-true"`` and ``"bf16-mixed"``.
        attentions: Implementations of attention to choose from. By default ``"sdpa"`` and ``"eager"``.
    """
    config, where, present = transformer.config, place(transformer, device), transformer.config._attn_implementation
    if device.type == "cuda":
        bf16 = computes_in_bf16()
        precision = "bf16-mixed" if bf16 and "bf16-mixed" in precisions else precisions[0]
        return Choice(precision, present, f"the GPU {'computes' if bf16 else 'does not compute'} in bf16", where)
    reads_texts = "input_ids" in inspect.signature(transformer.forward).parameters
    if device.type != "cpu" or not reads_texts or getattr(config, "vocab_size", None) is None:
        return Choice(precisions[0], present, "not measured: it takes a CPU and a model that reads texts", where)
    tried, reasons = list(precisions), []
    if len(tried) > 1 and "bf16-mixed" in tried and (ratio := _bf16_ratio(config)) > 1:
        tried.remove("bf16-mixed")
        reasons.append(f"a matrix product in bf16 takes {ratio:.1f} times as long as in fp32")
    seconds = _seconds(transformer, [(one, other) for one in tried for other in attentions])
    first = next(iter(seconds), (tried[0], present))
    best = min(seconds, key=seconds.__getitem__, default=first)
    if best != first and seconds[best] > _WORTH * seconds[first]:
        best = first
    measured = (f"{one} {other} {1000 * value:.0f} ms" for (one, other), value in seconds.items())
    reasons.insert(0, f"a step of {_TEXTS} short texts: {', '.join(measured)}")
    precision, attention = best
    return Choice(precision, attention, "; ".join(reasons), where)


def place(transformer: Any, device: torch.device) -> str:
    """What a choice holds for: the model and what of it is trained, and the kind of processor."""
    sizes = [(one.numel(), one.requires_grad) for one in transformer.parameters()]
    trained, total = sum(size for size, grad in sizes if grad), sum(size for size, _ in sizes)
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    else:
        capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()  # not in the oldest torch allowed
        name = capabilities.get("cpu_name", "")
        kind = f"{torch.backends.cpu.get_cpu_capability()} {name}".strip()
    return f"{type(transformer).__name__} with {trained:,} of {total:,} weights trained, on {device.type} ({kind})"


def _bf16_ratio(config: Any) -> float:
    """The time of a matrix product in bf16 relative to fp32, of the size of a layer for a few texts."""
    size = getattr(config, "hidden_size", 512)
    times = []
    for dtype in (torch.bfloat16, torch.float32):
        left, right = torch.ones(_TEXTS * _TOKENS, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
        times.append(_least_seconds(partial(torch.matmul, left, right)))
    return times[0] / times[1]


def _seconds(transformer: Any, candidates: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """The seconds of a training step with each candidate; without those that the model does not have."""
    inputs = {
        "input_ids": torch.arange(_TEXTS * _TOKENS).reshape(_TEXTS, _TOKENS) % transformer.config.vocab_size,
        # Some padding, as in real batches: without any, attention takes another way.
        "attention_mask": (torch.arange(_TOKENS) < _TOKENS - torch.arange(_TEXTS)[:, None] % 3).long(),
    }
    if transformer.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    trained = [one for one in transformer.parameters() if one.requires_grad]
    present, seconds = transformer.config._attn_implementation, {}

    def step(precision: str) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            output = transformer(**inputs)[0]
        if trained:  # grad() leaves the gradients of the parameters alone
            torch.autograd.grad(output.float().mean(), trained, allow_unused=True)

    try:
        with isolate_rng(), torch.set_grad_enabled(bool(trained)):
            for precision, attention in candidates:
                try:
                    transformer.set_attn_implementation(attention)
                except ValueError:
                    continue
                step(precision)  # a warm-up, which takes memory and builds kernels
                seconds[precision, attention] = _least_seconds(partial(step, precision))
    finally:
        transformer.set_attn_implementation(present)
    return seconds


def _least_seconds(action: Callable[[], Any]) -> float:
    """The seconds of this thread, the least of several times: other work on the machine hardly counts."""
    times: list[float] = []
    while len(times) < _REPEATS and sum(times) < _ENOUGH:
        start = time.thread_time()
        action()
        times.append(time.thread_time() - start)
    return min(times)
