"""What other libraries print while a command runs and its user can do nothing about: silenced here, by name.

Everything else that a library has to say still comes through, evertune's own warnings as plain lines.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from evertune._lightning import message_loggers
from evertune.utils.terminal import complain

_LOGGED = (
    "GPU available: ",
    "TPU available: ",
    "HPU available: ",
    "💡 Tip: ",
    "Loading `train_dataloader` to estimate",
    "`Trainer.fit` stopped: `max_epochs=",
    "Seed set to ",
    "Setting accelerator to CPU",  # DeepSpeed's, which transformers imports
)
"""Beginnings of messages that are logged."""

_WARNED = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # between Lightning and torch
    r"You have overridden `on_before_batch_transfer` in `LightningModule`",  # that is where label names become tensors
    r"No seed found, seed set to 0",
    r"The `srun` command is available",  # on a machine that submits jobs
)
"""Regular expressions of the beginnings of warnings."""

_BARS = ("Writing model shards", "Loading weights")
"""Progress bars of transformers for what takes less than a second for most models. Downloads keep theirs."""


def unset_output(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a trainer that decide what it prints and writes beside its result, where they are not given.

    No logger, so that no folder ``lightning_logs`` appears; no summary of the model; a progress bar on a terminal only.
    """
    quiet_ones = {"logger": False, "enable_model_summary": False, "enable_progress_bar": sys.stdout.isatty()}
    return {name: value for name, value in quiet_ones.items() if trainer.get(name) is None}


@contextmanager
def quiet() -> Iterator[None]:
    """Run a command without the messages of this file, and with warnings as lines without a place in the code."""
    loggers = [logging.getLogger(name) for name in (*message_loggers(), "DeepSpeed")]
    with warnings.catch_warnings(), _no_bars():
        for message in _WARNED:
            warnings.filterwarnings("ignore", message)
        warnings.showwarning = _show
        for logger in loggers:
            logger.addFilter(_worth_it)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(_worth_it)


@contextmanager
def say_progress(as_json: bool) -> Iterator[None]:
    """Print what evertune logs: as plain lines, or as one JSON object per line.

    Args:
        as_json: Whether another process reads the lines.
    """
    from evertune.live.telemetry import JsonLines

    handler = logging.StreamHandler(sys.stdout if as_json else sys.stderr)
    handler.setFormatter(JsonLines() if as_json else logging.Formatter("%(message)s"))
    if not as_json:  # the outcome ends with what was set aside while reading
        handler.addFilter(lambda record: not (vars(record).get("event") == "set_aside" and "read" in vars(record)))
    logger = logging.getLogger("evertune")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _worth_it(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_LOGGED)


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    complain("warning", " ".join(str(message).split()))


@contextmanager
def _no_bars() -> Iterator[None]:
    from transformers.utils import logging as messages

    hook = getattr(messages, "set_tqdm_hook", None)
    if hook is None:  # an older transformers
        yield
        return
    empty = messages.EmptyTqdm
    before = hook(lambda factory, args, more: (empty if more.get("desc") in _BARS else factory)(*args, **more))
    try:
        yield
    finally:
        hook(before)
