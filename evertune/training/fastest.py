"""The precision and the attention of a fit, chosen by measurement."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from evertune._lightning import either, pl, rank_zero_info, set_precision
from evertune.callbacks.base import ContinualCallback
from evertune.callbacks.state import load_state, save_state
from evertune.shards.support import is_deepspeed
from evertune.utils.hardware import ATTENTIONS, PRECISIONS, Choice, fastest, place

_FILE = "fastest.json"


class Fastest(ContinualCallback):
    """Trains in the precision and with the attention that are fastest on this machine, by measuring both.

    When a fit starts, rank 0 times a training step of a few short texts (:func:`evertune.utils.hardware.fastest`), and
    all ranks take its choice, which is logged with the reason. Nothing is measured again while model and machine stay
    the same, nor in a resumed run, which must be bit-identical: the choice is kept with the state of the callbacks.

    Attention is chosen only for a :class:`~evertune.lightning_modules.TransformerModule` with ``attention="auto"``; a
    model of your own keeps what it has. A model without a transformer, and sharded weights (DeepSpeed, FSDP), keep the
    precision of the Trainer. For texts much longer than a sentence, the fastest attention may be another: choose it
    yourself.

    ``ContinualTrainer(precision="auto")`` adds this callback.

    Args:
        precision: ``"auto"`` (default), or ``"32-true"`` or ``"bf16-mixed"`` if only the attention is to be chosen.

    Raises:
        ValueError: If the precision is another one.

    Example:
        >>> import pytorch_lightning as pl
        >>> from evertune.training.fastest import Fastest
        >>> trainer = pl.Trainer(callbacks=[Fastest()], logger=False, accelerator="cpu", enable_progress_bar=False)
        >>> trainer.callbacks[0].choice  # made by trainer.fit
    """

    def __init__(self, precision: Literal["auto", "32-true", "bf16-mixed"] = "auto") -> None:
        if precision not in ("auto", *PRECISIONS):
            raise ValueError(f"precision must be one of {['auto', *PRECISIONS]}, got {precision!r}")
        self.precision = precision
        self.choice: Choice | None = None
        """What was chosen, and why; None before the first fit."""
        self._resumed = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """A checkpoint may be read between this hook and the next."""
        super().setup(trainer, pl_module, stage)
        self._resumed = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose, and set the precision of the trainer and the attention of the module."""
        super().on_fit_start(trainer, pl_module)
        parts: Iterator[Any] = pl_module.modules()
        transformer = next((one for one in parts if hasattr(one, "set_attn_implementation")), None)
        whole = isinstance(trainer.strategy, either("SingleDeviceStrategy") + either("DDPStrategy"))
        if transformer is None or not whole or is_deepspeed(trainer):
            return
        free = getattr(pl_module, "attention", None) == "auto"
        choice = trainer.strategy.broadcast(self._choose(transformer, free, trainer))
        assert choice is not None
        set_precision(trainer, choice.precision)
        if free:
            transformer.set_attn_implementation(choice.attention)
        self.choice = choice

    def _choose(self, transformer: Any, free: bool, trainer: pl.Trainer) -> Choice | None:
        device = trainer.strategy.root_device
        kept = self.choice is not None and (self._resumed or self.choice.where == place(transformer, device))
        if kept or not trainer.is_global_zero:
            return self.choice
        precisions = PRECISIONS if self.precision == "auto" else (self.precision,)
        present = transformer.config._attn_implementation
        attentions = dict.fromkeys((present, *ATTENTIONS)) if free else (present,)
        choice = fastest(transformer, device, precisions, tuple(attentions))
        rank_zero_info(f"precision {choice.precision}, attention {choice.attention}: {choice.reason}")
        return choice

    def state_dict(self) -> dict[str, Any]:
        """The choice."""
        return {} if self.choice is None else asdict(self.choice)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume with the choice of the interrupted fit."""
        self.choice = Choice(**state_dict) if state_dict else None
        self._resumed = self.choice is not None

    def save(self, directory: str | Path) -> None:
        """Write the choice to ``fastest.json``. Call on every rank."""
        if self.choice is not None:
            save_state(Path(directory) / _FILE, self.choice)

    def load(self, directory: str | Path) -> None:
        """Read what :meth:`save` wrote. On another machine, the next fit chooses again.

        Raises:
            ValueError: If the file is damaged.
        """
        path = Path(directory) / _FILE
        if path.is_file():
            self.choice = load_state(Choice, path)
