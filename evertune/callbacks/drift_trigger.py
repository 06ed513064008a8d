"""When the data change in the middle of a fit, end one experience and start the next."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only
from torch import Tensor, nn

from evertune.callbacks.base import ContinualCallback, end_experience
from evertune.callbacks.examples import count_new
from evertune.drift import MMD, Detector, Featuriser, HashedNgrams, check_frozen
from evertune.strategies.support import check_strategy

_FILE = "drift_trigger.json"


class DriftTrigger(ContinualCallback):
    """Finds the boundaries between experiences by itself, inside one long ``fit``.

    Watches the new examples of every batch (not the replayed ones). When the detector raises the alarm, every
    :class:`ContinualCallback` of the trainer ends its experience and starts the next: replay refills its memory, EWC
    consolidates, and the detector takes a new reference. It acts between two optimizer steps, on the examples of the
    steps completed. The examples of all ranks are put back into one order, so that every rank decides the same, at the
    same step, as one process would.

    The score of every test is kept in :attr:`history`, and logged as ``drift_score``.

    Example::

        trigger = DriftTrigger(MMD(arl=50_000, reference_size=512), HashedNgrams())
        trainer = pl.Trainer(max_epochs=1, callbacks=[Replay(memory_size=2_000), EWC(), trigger])
        trainer.fit(module, endless_loader)

    Args:
        detector: decides; reset at the start of each experience. Default: ``MMD()``.
        featuriser: ``batch -> tensor [examples, n_features]``, a frozen view of the examples, in the order of the
            batch. Default: ``HashedNgrams()``, for batches with ``input_ids``. For images, say
            ``lambda batch: batch[0].flatten(1)``. A module is switched to evaluation mode and its gradients off.
        history_size: tests kept in :attr:`history`, the latest.

    Raises:
        ValueError: when ``fit`` starts and the featuriser reads weights that are being trained; in training, for
            features that the detector refuses.
    """

    splits_fit = True
    """Tells other callbacks that experiences may end in the middle of a ``fit``."""

    def __init__(
        self, detector: Detector | None = None, featuriser: Featuriser | None = None, history_size: int = 5_000
    ) -> None:
        if history_size < 1:
            raise ValueError(f"history_size must be positive, got {history_size}")
        self.detector = detector or MMD()
        self.featuriser = featuriser or HashedNgrams()
        self._history: deque[dict[str, Any]] = deque(maxlen=history_size)
        self._pending: list[Tensor] = []  # features of the optimizer step under way, of all ranks

    @property
    def history(self) -> list[dict[str, Any]]:
        """The tests made: ``{"step": int, "score": float, "threshold": float, "alarm": bool}``, oldest first."""
        return list(self._history)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse, by name, a strategy that this callback cannot work with."""
        check_strategy(trainer, "DriftTrigger")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a featuriser that learns, then start an experience, or go on with that of the checkpoint."""
        check_frozen(self.featuriser, pl_module)
        if isinstance(self.featuriser, nn.Module):
            self.featuriser.requires_grad_(False).eval().to(pl_module.device)
        if trainer.ckpt_path is None:
            super().on_fit_start(trainer, pl_module)

    def on_experience_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take a new reference: what comes now is the new normal."""
        self.detector.reset()
        self._pending.clear()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decide, between two optimizer steps, on the examples of the steps completed; then look at this batch."""
        if self._pending and batch_idx % trainer.accumulate_grad_batches == 0:
            self._decide(trainer, pl_module)
        with torch.no_grad():
            features = self.featuriser(batch)
        if not isinstance(features, Tensor) or features.ndim != 2:
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"the featuriser must return a tensor [examples, n_features], got {got}")
        self._pending.append(_of_all_ranks(features[: count_new(trainer, len(features), batch_idx)], trainer))

    def _decide(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        n_tests = self.detector.n_tests
        self.detector.update(torch.cat(self._pending))
        self._pending.clear()
        if self.detector.n_tests == n_tests:
            return
        score, threshold, alarm = self.detector.score, self.detector.threshold, self.detector.drift_detected
        self._history.append({"step": trainer.global_step, "score": score, "threshold": threshold, "alarm": alarm})
        module.log("drift_score", score)
        if alarm:
            rank_zero_info(
                f"DriftTrigger: the data changed before step {trainer.global_step} (score {score:.3g} above "
                f"{threshold:.3g}): a new experience starts"
            )
            methods = [callback for callback in trainer.callbacks if isinstance(callback, ContinualCallback)]  # type: ignore[attr-defined]
            for method in methods:
                end_experience(method, trainer, module)
            for method in methods:
                method.on_experience_start(trainer, module)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed ``fit`` needs to decide as if undisturbed."""
        return {
            "experience_index": self.experience_index,
            "history": self.history,
            "detector": self.detector.state_dict(),
            "pending": [features.clone() for features in self._pending],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.experience_index = state_dict["experience_index"]
        self._history = deque(state_dict["history"], maxlen=self._history.maxlen)
        self.detector.load_state_dict(state_dict["detector"])
        self._pending = list(state_dict["pending"])

    def save(self, directory: str | Path) -> None:
        """Write the history to ``drift_trigger.json``: the next experience takes a new reference. On every rank."""
        if getattr(rank_zero_only, "rank", 0) == 0:
            Path(directory).mkdir(parents=True, exist_ok=True)
            state = {"experience_index": self.experience_index, "history": self.history}
            (Path(directory) / _FILE).write_text(json.dumps(state, indent=1, allow_nan=False))

    def load(self, directory: str | Path) -> None:
        """Read what :meth:`save` wrote. Call on every rank.

        Raises:
            ValueError: when the file is not such a JSON file.
        """
        path = Path(directory) / _FILE
        try:
            state = json.loads(path.read_text())
            self.experience_index = int(state["experience_index"])
            self._history = deque(state["history"], maxlen=self._history.maxlen)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a saved DriftTrigger: {type(error).__name__}: {error}") from error


def _of_all_ranks(features: Tensor, trainer: pl.Trainer) -> Tensor:
    """The features of all ranks on the CPU, in the order in which the examples were dealt: one to each rank in turn."""
    if trainer.world_size == 1:
        return features.float().cpu()
    features = features.float().to(trainer.strategy.root_device)
    counts = trainer.strategy.all_gather(torch.tensor([len(features)], device=features.device)).flatten()
    longest = int(counts.max())
    padded = nn.functional.pad(features, (0, 0, 0, longest - len(features)))
    dealt = trainer.strategy.all_gather(padded).transpose(0, 1)  # [longest, ranks, n_features]
    real = torch.arange(longest, device=features.device).unsqueeze(1) < counts
    return dealt[real].cpu()
