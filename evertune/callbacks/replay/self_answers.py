"""Replay without stored answers: the model that is about to be updated answers the prompts of the memory itself."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evertune._lightning import pl, rank_zero_info, rank_zero_warn
from evertune.callbacks.replay.collate import Extra
from evertune.callbacks.teacher import by_length, rounds
from evertune.memory.codec import decode, encode
from evertune.memory.draws import Draws
from evertune.memory.memory import ReplayMemory
from evertune.shards.opened import shards_of
from evertune.shards.support import is_deepspeed
from evertune.tasks.base import task_of
from evertune.utils.collectives import gather_bytes
from evertune.utils.evaluation import evaluation_mode, trial

_TOGETHER = 16
"""Prompts that are answered in a batch. Fixed, so that an answer does not depend on the number of ranks."""
_LONGEST_PERIOD, _REPEATS, _SHORTEST_LOOP = 32, 4, 16
"""A loop: a sequence of at most so many tokens, so often in a row, and at least so many tokens in all."""


class SelfAnswers:
    """What the model that is about to be updated answers to prompts, for one update.

    Args:
        memory_size: Number of prompts in the memory at most.
        seed: Seed of sampled answers.
        directory: Folder of the working file, as for :class:`~evertune.memory.ReplayMemory`.
    """

    def __init__(self, memory_size: int, seed: int, directory: str | Path | None) -> None:
        self.memory = ReplayMemory(memory_size, seed=seed, directory=directory)
        self.extra: list[Any] = []
        """The answered prompts of the extra dataset."""
        self.counts: dict[str, int] = {}
        """How many prompts were ``asked`` and ``kept`` last, and how many were dropped, by reason."""
        self.is_complete = False
        """Whether the prompts of the current update have been answered."""

    def write(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        prompts: ReplayMemory,
        slots: Sequence[int],
        extra: Extra | None,
        update: int,
        *,
        is_writer: bool,
    ) -> None:
        """Let the model answer the prompts in some slots of a memory, and those of a dataset. Call on every rank."""
        task: Any = task_of(module)
        more = [] if extra is None else [task.prompt_of(extra.dataset[index]) for index in range(len(extra.dataset))]
        asked = [*(prompts[slot] for slot in slots), *more]
        answers, dropped = answers_of(trainer, module, asked, [self.memory.seed, update])
        made = {number: task.answered(asked[number], answer) for number, answer in answers.items()}
        kept = [number for number in made if number < len(slots)]
        places, examples = [slots[number] for number in kept], [made[number] for number in kept]
        self.memory.fill(prompts.view, places, examples, is_writer=is_writer)
        self.extra = [example for number, example in made.items() if number >= len(slots)]
        self.counts = {"asked": len(asked), "kept": len(made), **dropped}
        self.is_complete = True
        trainer.strategy.barrier("self-answers")
        if asked:
            _report(len(asked), len(made), dropped)

    def drawn_from(self, extra: Extra | None) -> Extra | None:
        """The extra examples with the model's answers; None if there are none."""
        if extra is None or not self.extra:
            return None
        return Extra(self.extra, extra.ratio, Draws(len(self.extra), extra.draws.seed, extra.draws.name))

    def state_dict(self) -> dict[str, Any]:
        """The answers as tensors and strings, for a checkpoint in the middle of an update."""
        extra = torch.frombuffer(bytearray(encode(self.extra)), dtype=torch.uint8)
        return {"memory": self.memory.state_dict(), "extra": extra, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any], *, is_writer: bool) -> None:
        """Go on with the answers of :meth:`state_dict`."""
        self.memory.load_state_dict(state["memory"], is_writer=is_writer)
        self.extra, self.counts = decode(state["extra"].numpy().tobytes()), dict(state["counts"])
        self.is_complete = True


def slots_to_draw(trainer: pl.Trainer, memory: ReplayMemory, per_step: float, update: int) -> list[int]:
    """The slots that the batches of a fit can draw: all of them, if it is not known how many batches there are.

    Args:
        trainer: Trainer in the fit.
        memory: Memory that is drawn from.
        per_step: Number of draws in an optimizer step of a rank.
        update: Number of the update, which names its draws.
    """
    steps = trainer.estimated_stepping_batches
    n_draws = steps * per_step * trainer.world_size if steps >= 0 else math.inf
    positions = np.arange(math.ceil(min(n_draws, len(memory))))
    return sorted(memory.draw(positions, update).tolist())


def check_writes(module: pl.LightningModule) -> None:
    """Refuse a module that does not write answers.

    Raises:
        ValueError: If it does not.
    """
    lacking = [name for name in ("write", "max_prompt_tokens") if not hasattr(type(module), name)]
    lacking += [f"task.{name}" for name in ("prompt_of", "answered") if not hasattr(task_of(module), name)]
    if lacking:
        raise ValueError(
            f"Replay(source='self') replays answers that the model writes itself, and {type(module).__name__} writes "
            f"none (it has no {', '.join(lacking)}): use a CausalLMModule or a Seq2SeqModule, or source='data'"
        )


def check_prompt(module: pl.LightningModule, example: Any) -> None:
    """Refuse training data without prompts.

    Raises:
        ValueError: If an example is learned from its first token on.
    """
    task: Any = task_of(module)
    if not len(task.prompt_of(example)["input_ids"]):
        raise ValueError(
            "Replay(source='self') keeps what precedes an answer, and the first example is learned from its first "
            "token on, as a plain text: give the records a prompt (text) and an answer (label), or use source='data'"
        )


def answers_of(
    trainer: pl.Trainer, module: Any, prompts: Sequence[Any], seed: Sequence[int]
) -> tuple[dict[int, Tensor], dict[str, int]]:
    """What the module answers to prompts, the same on any number of ranks. Call on every rank.

    Args:
        trainer: Trainer in a fit.
        module: A module with ``write``, such as :class:`~evertune.lightning_modules.CausalLMModule`.
        prompts: Examples without answers, with ``input_ids``.
        seed: Numbers that seed sampled answers.

    Returns:
        The tokens of each answer that is kept, by the number of its prompt, and how many were dropped, by reason.
    """
    lengths, longest = [len(prompt["input_ids"]) for prompt in prompts], module.max_prompt_tokens
    faults = {
        number: "without a prompt" if not n else "too long" for number, n in enumerate(lengths) if not 0 < n <= longest
    }
    readable = by_length([number for number in range(len(prompts)) if number not in faults], lengths)
    mine: list[tuple[int, str, list[int]]] = []
    what = f"Replay(source='self') cannot let {type(module).__name__} answer the prompts of its memory"
    with (
        trial(what, "use source='data'"),
        evaluation_mode(module),
        trainer.precision_plugin.val_step_context(),
    ):
        for turn, (chosen, counts) in enumerate(rounds(readable, trainer, _TOGETHER)):
            number = turn * trainer.world_size + trainer.global_rank
            torch.manual_seed(int(np.random.SeedSequence([*seed, number]).generate_state(1)[0]))
            written = module.write([prompts[one]["input_ids"] for one in chosen])
            judged = [
                (one, fault_of(answer.tokens.tolist(), answer.text, answer.ended), answer.tokens.tolist())
                for one, answer in zip(chosen, written, strict=True)
            ]
            mine += judged if counts else []
    if is_deepspeed(trainer):
        shards_of(trainer).release()
    answers: dict[int, Tensor] = {}
    for part in gather_bytes(json.dumps(mine).encode(), trainer):
        for one, fault, tokens in json.loads(part):
            if fault:
                faults[one] = fault
            else:
                answers[one] = torch.tensor(tokens)
    return dict(sorted(answers.items())), dict(sorted(Counter(faults.values()).items()))


def fault_of(tokens: Sequence[int], text: str, ended: bool) -> str:
    """Why an answer is dropped; an empty string if it is kept.

    Example:
        >>> fault_of([5, 6, 2], "red and blue", True), fault_of([2], "", True), fault_of([5, 6], "red and", False)
        ('', 'empty', 'unfinished')
        >>> fault_of([5, 6] * 8 + [2], "red and red and ...", True)
        'repetitive'
    """
    if not text:
        return "empty"
    if not ended:
        return "unfinished"
    return "repetitive" if _has_loop(np.asarray(tokens)) else ""


def _has_loop(tokens: np.ndarray) -> bool:
    """Whether a sequence of at most 32 tokens comes at least four times in a row, and makes 16 tokens in all."""
    for period in range(1, min(_LONGEST_PERIOD, len(tokens) // _REPEATS) + 1):
        breaks = np.flatnonzero(tokens[period:] != tokens[:-period])
        longest = np.diff(breaks, prepend=-1, append=len(tokens) - period).max() - 1 + period
        if longest >= max(_REPEATS * period, _SHORTEST_LOOP):
            return True
    return False


def _report(asked: int, kept: int, dropped: dict[str, int]) -> None:
    words = f"Replay: the model has answered {kept} of {asked} prompts, which are replayed"
    if not dropped:
        rank_zero_info(words)
        return
    faults = ", ".join(f"{count} {fault}" for fault, count in dropped.items())
    advice = "" if kept else "; nothing is replayed in this update: raise max_new_tokens in the module's generation"
    rank_zero_warn(f"{words}; {asked - kept} were dropped ({faults}){advice}")
