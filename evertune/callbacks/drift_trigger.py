"""Ends one experience and starts the next when the data change in the middle of a ``fit``."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only
from torch import Tensor, nn

from evertune._lightning import pl, rank_zero_warn
from evertune.callbacks.base import ContinualCallback
from evertune.callbacks.consolidation import end_experience
from evertune.callbacks.features import Dealt, deal, features_of, gathered
from evertune.drift import MMD, Detector, Featuriser, HashedNgrams, check_frozen
from evertune.drift.sums import SumDetector
from evertune.shards.support import check_strategy
from evertune.utils.typed_json import read_json

_FILE = "drift_trigger.json"
_MAX_MESSAGES = 100


@dataclass
class _Saved:
    """The content of the file that :meth:`DriftTrigger.save` writes."""

    experience_index: int
    history: list[dict[str, Any]]


class DriftTrigger(ContinualCallback):
    """Detects the boundaries between experiences inside one long ``fit``.

    Watches the new examples of every batch, not the replayed ones. When the detector raises an alarm, every
    :class:`ContinualCallback` of the trainer ends its experience and starts the next: replay refills its memory, EWC
    consolidates, and the detector takes a new reference. The trigger acts between two optimizer steps, on the examples
    of the completed steps.

    All ranks decide the same at the same step, as a single process would that sees the examples of all ranks, taken
    from the ranks in turn. For detectors that only keep sums (:class:`~evertune.drift.sums.SumDetector`) the ranks
    all-reduce sums; for others, and until the reference is complete, they gather the features.

    **Bad input does not end the training.** Examples with NaN or infinite features, empty batches, batches with another
    number of features, and batches that the featuriser or the detector cannot read are skipped, on that rank alone.
    They are counted in :attr:`schema_errors`, recorded in :attr:`history`, and reported in one warning per message.
    They raise no alarm. Another number of features is accepted when an experience starts. Two failures do end the
    ``fit``, because the configuration does not suit the data: a featuriser that fails on the very first batch on every
    rank, and a detector that rejects the first examples.

    The score of every test is kept in :attr:`history` and logged as ``drift_score``.

    Example::

        trigger = DriftTrigger(MMD(arl=50_000, reference_size=512), HashedNgrams(), refractory_period=1_000)
        trainer = pl.Trainer(max_epochs=1, callbacks=[Replay(memory_size=2_000), EWC(), trigger])
        trainer.fit(module, endless_loader)

    Args:
        detector: Drift detector that raises the alarm. Reset at the start of each experience. Default: ``MMD()``.
        featuriser: Frozen function ``batch -> tensor [examples, n_features]``, with the examples in the order of the
            batch. A module is switched to evaluation mode and its gradients are disabled. Default: ``HashedNgrams()``,
            for batches with ``input_ids``. For images, use for example ``lambda batch: batch[0].flatten(1)``.
        history_size: Number of most recent entries kept in :attr:`history`. Default: 5,000.
        refractory_period: Number of examples, over all ranks, skipped at the start of an experience before the new
            reference is taken. In a gradual change the alarm comes in the middle of the transition: without a pause,
            the reference is a mixture, and the rest of the same change raises another alarm. Default: 0, for sharp
            changes.

    Attributes:
        schema_errors: Number of skipped examples by error message; at most 100 messages, all others are counted under
            ``"other"``.

    Raises:
        ValueError: When ``fit`` starts, if the featuriser reads weights that are being trained. At the first batch, if
            the detector cannot watch the features.
    """

    splits_fit = True
    """Signals to other callbacks that experiences may end in the middle of a ``fit``."""

    def __init__(
        self,
        detector: Detector | None = None,
        featuriser: Featuriser | None = None,
        history_size: int = 5_000,
        refractory_period: int = 0,
    ) -> None:
        if history_size < 1:
            raise ValueError(f"history_size must be positive, got {history_size}")
        if refractory_period < 0:
            raise ValueError(f"refractory_period must not be negative, got {refractory_period}")
        self.detector = detector or MMD()
        self.featuriser = featuriser or HashedNgrams()
        self.refractory_period = refractory_period
        self.schema_errors: dict[str, int] = {}
        self._history: deque[dict[str, Any]] = deque(maxlen=history_size)
        self._test: dict[str, Any] | None = None  # in the current optimizer step: the latest, or an alarm
        self._to_skip = 0  # examples still to skip before the reference begins
        self._width: int | None = None  # number of features in this experience
        self._has_worked = False  # whether the featuriser has succeeded once
        self._has_watched = False  # whether the detector has accepted examples once
        self._ended = False  # whether the experience has ended and no other has started
        self._undo: Callable[[], None] | None = None  # at the end of a smoke test

    @property
    def history(self) -> list[dict[str, Any]]:
        """Test results and skipped examples, oldest first.

        A test is ``{"step": int, "score": float, "threshold": float, "alarm": bool}``. Examples skipped in one step, or
        in several with no other entry in between, are ``{"step": int, "last_step": int, "kind": "schema", "records":
        int, "errors": [str], "alarm": False}``.
        """
        return list(self._history)

    @classmethod
    def bytes_per_weight(cls) -> None:
        """Unknown, because a featuriser may hold a model."""
        return None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reject, by name, a strategy that this callback does not support."""
        super().setup(trainer, pl_module, stage)
        check_strategy(trainer, "DriftTrigger")
        self._undo = self.undo_point() if trainer.fast_dev_run else None  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reject a featuriser that is being trained, then start an experience or resume that of the checkpoint."""
        check_frozen(self.featuriser, pl_module)
        if isinstance(self.featuriser, nn.Module):
            self.featuriser.requires_grad_(False).eval().to(pl_module.device)
        if trainer.ckpt_path is None:
            super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start an experience if the checkpoint is of the end of one."""
        if self._ended:
            self.on_experience_start(trainer, pl_module)

    def on_experience_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take a new reference from the data that follow the refractory period."""
        self.detector.reset()
        self._test = self._width = None
        self._to_skip = self.refractory_period
        self._ended = False

    def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Note it: a fit that resumes from here starts an experience."""
        self._ended = True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """After ``fast_dev_run``, forget what was seen."""
        if self._undo is not None:
            self._undo()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Act, between two optimizer steps, on the tests of the completed steps; then examine this batch."""
        if self._test is not None and batch_idx % trainer.accumulate_grad_batches == 0:
            self._act(self._test, trainer, pl_module)
        if self._test is not None and self._test["alarm"]:  # the experience ends after this step in any case
            return
        mine = features_of(self.featuriser, batch, trainer, batch_idx)
        if self._has_watched and mine.values.shape[1] == (self._width or mine.values.shape[1]) and mine.good.any():
            try:
                self.detector.validated(mine.values[mine.good.to(mine.values.device)])
            except ValueError as error:
                # Refused before any collective: an error raised inside one would leave the other ranks waiting.
                mine.refuse(str(error))
        # From here on all ranks hold the same `dealt`, so they take the same branches and reach the same collectives.
        dealt = deal(mine, self._width, not self._has_worked, trainer)
        self._has_worked = self._has_worked or dealt.width > 0
        n_good = int(dealt.good.sum())
        if n_good:
            self._width = dealt.width
        if dealt.problems:
            self._tell(dealt.problems, trainer.global_step)
        if self._to_skip:
            dealt.good &= dealt.places >= self._to_skip
            self._to_skip = max(self._to_skip - n_good, 0)
        if dealt.good.any():
            n_tests = self.detector.n_tests
            self._update(mine.values, dealt, trainer)
            self._has_watched = True
            if self.detector.n_tests > n_tests:
                score, threshold, alarm = self.detector.score, self.detector.threshold, self.detector.drift_detected
                self._test = {"score": score, "threshold": threshold, "alarm": alarm}

    def _update(self, values: Tensor, dealt: Dealt, trainer: pl.Trainer) -> None:
        """Pass the usable examples of all ranks to the detector."""
        if trainer.world_size > 1 and isinstance(self.detector, SumDetector):
            count, rank = int(dealt.good.sum()), trainer.global_rank
            chosen = dealt.good[: len(values), rank]
            # The position among the examples of all ranks, so that the sums are those of a single process.
            positions = dealt.places[: len(values), rank][chosen]
            sums = self.detector.sums(values.cpu()[chosen], positions, count)
            if sums is not None:
                total = sums.to(trainer.strategy.root_device)
                dist.all_reduce(total)
                self.detector.update_sums(total.cpu(), count)
                return
        self.detector.update(gathered(values, dealt, trainer))

    def _act(self, test: dict[str, Any], trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._test = None
        self._history.append({"step": trainer.global_step, **test})
        module.log("drift_score", test["score"])
        if test["alarm"]:
            rank_zero_info(
                f"DriftTrigger: the data changed before step {trainer.global_step} (score {test['score']:.3g} above "
                f"{test['threshold']:.3g}): a new experience starts"
            )
            methods = [callback for callback in trainer.callbacks if isinstance(callback, ContinualCallback)]  # type: ignore[attr-defined]
            end_experience(methods, trainer, module)
            for method in methods:
                method.on_experience_start(trainer, module)

    def _tell(self, problems: Mapping[str, int], step: int) -> None:
        """Count and report skipped examples; the same on all ranks."""
        for words, n in problems.items():
            name = words if words in self.schema_errors or len(self.schema_errors) < _MAX_MESSAGES else "other"
            if name not in self.schema_errors:
                rank_zero_warn(
                    f"DriftTrigger skipped {n} unusable examples of the batch before step {step}: "
                    f"{words}. Further occurrences are only counted in schema_errors."
                )
            self.schema_errors[name] = self.schema_errors.get(name, 0) + n
        entry: dict[str, Any] = {"step": step, "last_step": step, "kind": "schema"}
        entry |= {"records": sum(problems.values()), "errors": sorted(problems), "alarm": False}
        last = self._history[-1] if self._history else {}
        if last.get("errors") == entry["errors"]:  # merged, so that a long fault does not displace the tests
            entry["step"], entry["records"] = last["step"], last["records"] + entry["records"]
            self._history.pop()
        self._history.append(entry)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed ``fit`` needs to decide as if uninterrupted; the same on all ranks."""
        return {
            "experience_index": self.experience_index,
            "ended": self._ended,
            "history": self.history,
            "detector": self.detector.state_dict(),
            "test": self._test,
            "to_skip": self._to_skip,
            "width": self._width,
            "has_worked": self._has_worked,
            "has_watched": self._has_watched,
            "schema_errors": dict(self.schema_errors),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`."""
        self.experience_index, self._ended = state_dict["experience_index"], state_dict["ended"]
        self._history = deque(state_dict["history"], maxlen=self._history.maxlen)
        self.detector.load_state_dict(state_dict["detector"])
        self._test, self._to_skip = state_dict["test"], state_dict["to_skip"]
        self._width = state_dict["width"]
        self._has_worked, self._has_watched = state_dict["has_worked"], state_dict["has_watched"]
        self.schema_errors = dict(state_dict["schema_errors"])

    def save(self, directory: str | Path) -> None:
        """Write the history to ``drift_trigger.json``. The next experience takes a new reference. Call on all ranks."""
        if getattr(rank_zero_only, "rank", 0) == 0:
            Path(directory).mkdir(parents=True, exist_ok=True)
            state = {"experience_index": self.experience_index, "history": self.history}
            (Path(directory) / _FILE).write_text(json.dumps(state, indent=1, allow_nan=False))

    def load(self, directory: str | Path) -> None:
        """Read what :meth:`save` wrote. Call on every rank.

        Raises:
            ValueError: If the file is not a JSON file that :meth:`save` wrote.
        """
        path = Path(directory) / _FILE
        try:
            state = read_json(_Saved, path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is not a saved DriftTrigger: {error}") from error
        self.experience_index = state.experience_index
        self._history = deque(state.history, maxlen=self._history.maxlen)
