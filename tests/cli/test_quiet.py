"""What other libraries print is silenced by name; everything else comes through."""

from __future__ import annotations

import logging
import warnings

import pytest

from evertune._lightning import message_loggers
from evertune.cli.quiet import quiet, unset_output

MESSAGES = [
    "GPU available: False, used: False",
    "TPU available: False, using: 0 TPU cores",
    "💡 Tip: For seamless cloud logging and experiment tracking, try installing [litlogger](https://pypi.org)",
    "Loading `train_dataloader` to estimate number of stepping batches.",
    "`Trainer.fit` stopped: `max_epochs=2` reached.",
    "Seed set to 0",
]
WARNINGS = [
    "`isinstance(treespec, LeafSpec)` is deprecated, use `isinstance(treespec, TreeSpec)` instead.",
    "You have overridden `on_before_batch_transfer` in `LightningModule` but have passed in a `LightningDataModule`.",
    "No seed found, seed set to 0",
    "The `srun` command is available on your system but is not used.",
]


@pytest.mark.parametrize("logger", message_loggers())
def test_messages_are_silenced_by_name(logger: str, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger(logger)
    with caplog.at_level(logging.INFO, logger):
        caplog.handler.setFormatter(None)
        log.addHandler(caplog.handler)
        try:
            with quiet():
                for message in [*MESSAGES, "`Trainer.fit` stopped: No training batches.", "experience 1 of 2"]:
                    log.info(message)
        finally:
            log.removeHandler(caplog.handler)
    assert set(caplog.messages) == {"`Trainer.fit` stopped: No training batches.", "experience 1 of 2"}
    assert not log.filters


def test_warnings_are_silenced_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet():
        for message in [*WARNINGS, "the loss\nis NaN"]:
            warnings.warn(message, stacklevel=1)
    assert capsys.readouterr().err == "warning: the loss is NaN\n"


def test_only_what_is_not_set_is_quiet() -> None:
    given = {"logger": True, "enable_progress_bar": None, "max_epochs": 3}
    assert unset_output(given) == {"enable_model_summary": False, "enable_progress_bar": False}
