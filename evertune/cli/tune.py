"""``evertune tune``: search the settings of ``evertune fit`` that learn a stream best, on its validation data."""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from evertune.cli.fit import read_fit
from evertune.cli.quiet import quiet
from evertune.cli.space import Space, read_space, value_at, with_values
from evertune.tasks.base import task_of
from evertune.utils.extras import library
from evertune.utils.files import write_atomically
from evertune.utils.terminal import complain, console, foreign

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial
    from rich.console import Console

_DESCRIPTION = """\
Search for the settings of `evertune fit` that learn a stream best. Each trial learns the whole stream; what counts is
the average accuracy at its end, over all experiences, on their validation data. Test data are not touched. Trials that
are behind the median of the others after an experience end there. The first trial is the configuration as it is.

The study is a file in the folder: started again, a search goes on; started several times, the searches share it.
Exit codes: 0 done, 1 no trial got to its end, 2 a wrong setting.
"""
_EPILOG = """\
example: evertune tune --config stream.yaml --space space.yaml --trials 20 --out tuned
         evertune fit --config tuned/best.yaml

space.yaml, with the names that evertune fit has on the command line:
  model.learning_rate: {low: 1.0e-5, high: 1.0e-3, log: true}
  trainer.max_epochs: {low: 1, high: 4}
  trainer.callbacks.Replay.replay_ratio: [0.5, 1.0]
"""
_STUDY = "evertune"
_SHOWN = 5


def tune(arguments: Sequence[str]) -> int:
    """Search, and write the best settings as ``best.yaml``.

    Args:
        arguments: Arguments of the command, without its name.

    Returns:
        The exit code: 0; 1 if no trial got to its end; 2 if a setting is wrong.
    """
    options, others = _parser().parse_known_args(arguments)
    screen = console()
    try:
        library("optuna", "tune")
        with quiet():
            return _tune(options, others, screen)
    except (OSError, ValueError, ImportError, yaml.YAMLError) as error:
        complain("evertune tune", error)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evertune tune",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-c", "--config", action="append", required=True, metavar="FILE", help="a configuration of `evertune fit`")
    add("--space", type=Path, required=True, metavar="FILE", help="what varies, and over what: see below")
    add(
        "--trials",
        type=int,
        default=20,
        metavar="N",
        help="trials of the study in all, over all searches (default: 20)",
    )
    add("--out", type=Path, default=Path("evertune-tune"), metavar="FOLDER", help="folder of the study and best.yaml")
    add("--seed", type=int, default=0, help="of the sampler (default: 0)")
    add("--no_pruning", action="store_true", help="let every trial learn the whole stream")
    return parser


def _tune(options: argparse.Namespace, others: Sequence[str], screen: Console) -> int:
    if options.trials < 1:
        raise ValueError(f"--trials must be positive, got {options.trials}")
    space = read_space(yaml.safe_load(options.space.read_text(encoding="utf-8")))
    first = read_fit([part for path in options.config for part in ("--config", path)] + list(others))
    config = json.loads(first.parser.dump(first.config, format="json", skip_none=False))
    config.pop("preset", None)  # its settings are among the others
    now = {place: value_at(config, place) for place in space}
    if first.trainer.world_size > 1:
        raise ValueError(
            f"each trial runs on one process, and trainer asks for {first.trainer.world_size}: leave devices and "
            "num_nodes at 1, and start the search several times with the same --out"
        )
    _validated(first.datamodule.stream_for(first.model))
    del first
    search = _Search(options, space, config, now, screen)
    search.run()
    return search.finish()


def _validated(stream: Any) -> Any:
    """The stream with its validation data in place of its test data."""
    if lacking := [one.name for one in stream if one.val is None or not len(one.val)]:
        raise ValueError(
            f"experience {lacking[0]!r} has no validation data, by which settings are chosen: give data.splits a share "
            "for validation, or the source a split 'val'"
        )
    from evertune.streams import ExperienceStream

    experiences = [replace(one, test=one.val, val=None) for one in stream]
    about = {"text": stream.text, "label": stream.label, "known_classes": stream.known_classes, "task": stream.task}
    return ExperienceStream(experiences, **about)


@contextmanager
def _logging_kept() -> Iterator[None]:
    """Put the logging of the process back: Optuna's migrations replace it and switch all other loggers off."""
    root = logging.getLogger()
    loggers = [one for one in root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    disabled, handlers, level = [one.disabled for one in loggers], list(root.handlers), root.level
    try:
        yield
    finally:
        for one, was in zip(loggers, disabled, strict=True):
            one.disabled = was
        root.handlers[:] = handlers
        root.setLevel(level)


class _Search:
    """One search: the study, and what is printed of it."""

    def __init__(
        self, options: argparse.Namespace, space: Space, config: dict[str, Any], now: dict[str, Any], screen: Console
    ) -> None:
        self.space, self.config, self.now, self.screen = space, config, now, screen
        self.out: Path = options.out
        self.n_trials, self.prunes = options.trials, not options.no_pruning
        self.seed: int = options.seed
        self.study = self._opened()

    def _opened(self) -> Study:
        """The study of the folder, a new one with the configuration as its first trial.

        Raises:
            ValueError: If it is about something else.
        """
        import optuna
        from optuna.storages import RDBStorage

        logging.getLogger("optuna").setLevel(logging.ERROR)
        self.out.mkdir(parents=True, exist_ok=True)
        described = json.dumps([self.config, {place: repr(one) for place, one in self.space.items()}], sort_keys=True)
        digest = hashlib.sha256(described.encode()).hexdigest()[:16]
        place = f"sqlite:///{self.out / 'study.db'}"
        with _logging_kept():
            storage = RDBStorage(place, engine_kwargs={"connect_args": {"timeout": 60}})  # seconds to wait for a lock
        study = optuna.create_study(
            storage=storage,
            study_name=_STUDY,
            direction="maximize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
        )
        if study.user_attrs.get("digest", digest) != digest:
            raise ValueError(f"{self.out} holds the study of another configuration or space: pass another --out")
        if "digest" not in study.user_attrs:
            study.set_user_attr("digest", digest)
            stored = {place: self.space[place].stored(value) for place, value in self.now.items()}
            study.enqueue_trial({place: value for place, value in stored.items() if value is not None})
        return study

    def run(self) -> None:
        """Run trials until the study has enough of them."""
        from optuna import TrialPruned
        from optuna.samplers import TPESampler
        from optuna.trial import TrialState

        from evertune.training.pruning import RunPruned

        ended = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        while len(self.study.get_trials(states=ended)) < self.n_trials:
            trial = self.study.ask()
            # Seeded by the trial: the same search again, but never the same settings in two searches at once.
            self.study.sampler = TPESampler(seed=self.seed + trial.number, constant_liar=True)
            try:
                self.study.tell(trial, self._learn(trial))
            except (RunPruned, TrialPruned) as words:
                trial.set_user_attr("reason", str(words))
                self.study.tell(trial, state=TrialState.PRUNED)
            except (Exception, SystemExit) as error:  # these settings do not work; others may
                trial.set_user_attr("reason", f"{type(error).__name__}: {error}")
                self.study.tell(trial, state=TrialState.FAIL)
            self._say(self.study.trials[trial.number])
            gc.collect()

    def _learn(self, trial: Trial) -> float:
        """The average accuracy on validation data after learning the stream with the settings of a trial."""
        from evertune.training.evaluation import ContinualEvaluation
        from evertune.training.pruning import Pruning
        from evertune.training.trainer import ContinualTrainer

        values = {place: one.suggest(trial, place) for place, one in self.space.items()}
        trial.set_user_attr("values", values)
        path = self.out / "trials" / f"{trial.number}.yaml"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, yaml.safe_dump(with_values(self.config, values), sort_keys=False).encode())
        cli = read_fit(["--config", str(path)])
        trainer, data, module = cli.trainer, cli.datamodule, cli.model
        assert isinstance(trainer, ContinualTrainer)

        def is_hopeless(learned: int, score: float) -> bool:
            trial.report(score, learned)
            return self.prunes and trial.should_prune()

        scored = any(isinstance(one, ContinualEvaluation) for one in trainer.callbacks)
        watched = trainer.copy_with([*([] if scored else [ContinualEvaluation()]), Pruning(is_hopeless)])
        tokenizer, task = getattr(module, "tokenizer", None), task_of(module)
        stream = _validated(data.stream_for(module))
        history = watched.fit_stream(
            module, stream, lambda experience: data.datamodule(experience, tokenizer, task), untrained=False
        )
        trial.set_user_attr("forgetting", history.forgetting)
        return float(history.average_accuracy)

    def _say(self, trial: FrozenTrial) -> None:
        """Print a line about a trial that has ended."""
        names = {place: place.rpartition(".")[2] for place in self.space}
        settings = ", ".join(f"{names[place]} {_short(value)}" for place, value in self._values(trial).items())
        how = {"PRUNED": "ended early: ", "FAIL": "failed: "}.get(trial.state.name, "")
        result = f"{how}{trial.user_attrs.get('reason', '')}" if how else f"{100 * (trial.value or 0):.1f} %"
        seconds = trial.duration.total_seconds() if trial.duration else 0.0
        words = f"trial {trial.number + 1}: {settings}: {result} ({seconds:.0f} s)"
        self.screen.print(foreign(words), soft_wrap=True)

    def _values(self, trial: FrozenTrial) -> dict[str, Any]:
        found: dict[str, Any] = trial.user_attrs.get("values", {})
        return found

    def finish(self) -> int:
        """Print the best trials and write ``best.yaml``; returns the exit code."""
        from rich.table import Table

        trials = sorted(
            (trial for trial in self.study.trials if trial.state.name == "COMPLETE"),
            key=lambda one: -(one.value or 0.0),
        )
        states = [trial.state.name for trial in self.study.trials]
        pruned, failed = states.count("PRUNED"), states.count("FAIL")
        if not trials:
            complain("evertune tune", f"no trial got to its end: {failed} failed, {pruned} ended early")
            return 1
        best = with_values(self.config, self._values(trials[0]))
        best.pop("out", None)
        write_atomically(self.out / "best.yaml", yaml.safe_dump(best, sort_keys=False, allow_unicode=True).encode())
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("trial", *self.space, "validation", "forgetting"):
            table.add_column(name, justify="right")
        for trial in trials[:_SHOWN]:
            values = [_short(value) for value in self._values(trial).values()]
            lost = trial.user_attrs.get("forgetting")
            forgotten = "" if lost is None or math.isnan(lost) else f"{100 * lost:.1f}"
            table.add_row(str(trial.number + 1), *values, f"{100 * (trial.value or 0):.1f} %", forgotten)
        self.screen.print(table)
        self.screen.print(f"{len(trials)} trials learned the whole stream, {pruned} ended early, {failed} failed")
        self.screen.print(f"best: evertune fit --config {self.out / 'best.yaml'}", soft_wrap=True)
        return 0


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
