"""The gate: a new version goes into production only if it is not worse than the one that is there."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from evertune.gate import statistics
from evertune.gate.best import Best
from evertune.gate.label_noise import UNSURE_LEARNT, Noise, label_noise, learned_classes, unlike_their_class
from evertune.gate.predictions import Cost, Label, Predictions
from evertune.sources.base import Row
from evertune.utils.terminal import foreign

if TYPE_CHECKING:
    from rich.table import Table

Test = Literal["mcnemar", "bootstrap"]
Unit = Literal["share", "records", "ms", "bytes", "agreement"]
Limit = Literal["value", "less", "more"]
State = Literal["passed", "refused", "cannot tell", "not applicable"]

POOLED = "all past slices"
FEW = 20
"""Number of records below which a share is too noisy: checks that rest on a share alone are skipped, and a class is
also judged on records that were trained on."""
MANY = 10
"""Number of passed checks of one kind above which a table shows them in one line."""
_DIGITS = 6
_NO_FEATURES = "there are no features of a pretrained encoder by which to compare the records"
_STYLES: Mapping[State, str] = {
    "passed": "green",
    "refused": "bold red",
    "cannot tell": "yellow",
    "not applicable": "dim",
}


@dataclass(frozen=True)
class Check:
    """The result of one check of the gate.

    Args:
        name: Name of the check.
        slice: Slice that was checked; empty if the check is not about a slice.
        champion: Value of the version in production; None if it has none.
        challenger: Value of the new version, or of the data.
        limit: Limit of the gate; see ``limit_on``.
        p_value: Probability of such a result by chance; None if chance plays no part.
        passed: Whether the value is within the limit; None if there is too little evidence to tell, which refuses
            nothing and is reported.
        words: The facts, as a message.
        stage: ``"data"`` for a check of the records before training, ``"model"`` for one of the new version.
        unit: Unit of the values.
        applicable: False if the limit is set but the task has no classes to check it on; the check then counts as
            passed.
        limit_on: What the limit is on: the new version's ``"value"``, or how much ``"less"`` or ``"more"`` it is than
            production's.
    """

    name: str
    slice: str
    champion: float | None
    challenger: float | None
    limit: float | None
    p_value: float | None
    passed: bool | None
    words: str
    stage: Literal["data", "model"] = "model"
    unit: Unit = "share"
    applicable: bool = True
    limit_on: Limit = "value"

    @property
    def state(self) -> State:
        """The result in one word, as the table shows it."""
        if not self.applicable:
            return "not applicable"
        return "cannot tell" if self.passed is None else "passed" if self.passed else "refused"


@dataclass(frozen=True)
class Verdict:
    """The decision of the gate, with its reasons.

    The same predictions give the same verdict, and :meth:`to_dict` the same JSON, byte for byte.

    Args:
        passed: Whether no check has refused. Those that cannot tell refuse nothing.
        checks: All checks that were made.
    """

    passed: bool
    checks: list[Check]

    @classmethod
    def of(cls, checks: Iterable[Check]) -> Verdict:
        """The verdict that follows from a list of checks.

        >>> Verdict.of([]).words()
        'passed: nothing was checked'
        """
        made = list(checks)
        return cls(all(check.passed is not False for check in made), made)

    @property
    def failed(self) -> list[Check]:
        """The checks that refused."""
        return [check for check in self.checks if check.passed is False]

    @property
    def undecided(self) -> list[Check]:
        """The checks that had too little evidence to pass or to refuse."""
        return [check for check in self.checks if check.passed is None]

    def words(self) -> str:
        """The decision as a message: why the new version was refused, or how it compares."""
        if not self.passed:
            return "refused: " + "; ".join(check.words for check in self.failed)
        told = [check.words for check in self.checks if check.name in ("new records", "forgetting", "accuracy")][-2:]
        n_checks = f"{len(self.checks)} checks" if self.checks else "nothing was checked"
        open_ = [f"{check.name} {check.slice!r} {check.words.partition(':')[0]}" for check in self.undecided]
        more = [f"and {len(open_) - 3} more cannot tell"] if len(open_) > 3 else []
        return "passed: " + "; ".join([n_checks, *told, *open_[:3], *more])

    def table(self) -> Table:
        """All checks as a table for the terminal: ``rich.print(verdict.table())``.

        More than 10 passed checks of one kind, such as those of many classes, are one line.
        """
        from rich.table import Table

        table = Table(box=None, header_style="bold", pad_edge=False)
        for header in ("check", "slice"):
            # These two share the room that the figures leave; the longest word in them is "calibration".
            table.add_column(header, overflow="fold", min_width=11)
        for header in ("production", "new version", "limit", "p"):
            table.add_column(header, justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        passed = Counter(check.name for check in self.checks if check.state == "passed")
        for check in self.checks:
            verdict = foreign(check.state, _STYLES[check.state])
            if check.state == "passed" and (n := passed[check.name]) > MANY:
                passed[check.name] = -1
                table.add_row(foreign(check.name), f"{n} of them", "", "", "", "", verdict)
            elif check.state != "passed" or passed[check.name] >= 0:
                values = (_shown(check.champion, check.unit), _shown(check.challenger, check.unit), _limit(check))
                p_value = "" if check.p_value is None else _p(check.p_value).removeprefix("p ").removeprefix("= ")
                table.add_row(foreign(check.name), foreign(check.slice), *values, p_value, verdict)
        return table

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON values."""
        return {"passed": self.passed, "checks": [asdict(check) for check in self.checks]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Verdict:
        """The verdict that :meth:`to_dict` returned.

        Raises:
            ValueError: If a key is missing or unknown.
        """
        try:
            return cls(values["passed"], [Check(**check) for check in values["checks"]])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a saved verdict: {type(error).__name__}: {error}") from error


class Gate:
    """Compares a new version (the challenger) with the one in production (the champion), and decides.

    Before training, :meth:`judge_data` checks the records. Afterwards, :meth:`judge` compares the predictions of both
    versions on held-out records: the past ones, slice by slice, class by class and pooled, and the new ones.

    Many losses below the limit, one in each update, would add up. The new version is therefore also compared with the
    best version so far on each past slice (:mod:`evertune.gate.best`).

    A check that could not have refused whatever the records showed, because there are too few, says "cannot tell". It
    refuses nothing.

    A limit on a difference of accuracy is exceeded if the measured difference is larger **and** chance is ruled out at
    level ``alpha`` by a test that compares the two versions on the same examples. A small slice therefore cannot refuse
    a good version by bad luck, and a large one cannot refuse it for a loss that nobody would notice. The family-wise
    error rate over all past slices together is ``alpha`` (Holm 1979), and so is that of each other kind of check.

    Labels that are wrong at random do little harm to a pretrained model at first, so that its accuracy does not reveal
    them; :func:`~evertune.gate.label_noise.label_noise` does. Its power depends on the number of new records: in
    simulations, 10 % of wrong labels are detected in 99 % of the updates with 300 or more records, if the records
    trained on are checked too (``trained`` in :meth:`judge`) and production is right on 85 % or more (in 93 % of the
    updates at 75 %). Of updates without wrong labels, 1 % are refused, and 4 % of those with 300 records from a domain
    where production is right on only 65 %.

    Labels of classes that production has not learned are judged by how much their records resemble each other over the
    pretrained encoder without training: the new version may contradict right labels only because it has not learned
    them yet.

    A module that cannot do its task yet, such as a random one in a test, is refused by ``min_new_agreement`` only if it
    can do the task on past records.

    Every limit may be None, which skips the check.

    Args:
        max_forgetting: Maximum loss of accuracy on a past slice, on all past slices together, and on the new records.
            Default: 0.02, two points.
        max_drop: Maximum loss of accuracy on a past slice of 50 records or more, whatever the test says. Default: 0.15.
        max_total_forgetting: Maximum loss of accuracy on a past slice, and on all past slices together, since the best
            version so far, over all updates. Default: 0.05.
        accepted: Numbers of versions by slice, which make a loss on a slice the new normal: versions before that number
            are no longer among the best so far. ``{"update-1": 12}`` accepts what version 12 lost on ``update-1``,
            ``{"all past slices": 12}`` what it lost anywhere. Each use is reported. Default: None, nothing.
        max_class_drop: Maximum loss of accuracy on the records of one class that production knows. Classes of fewer
            than 20 held-out records are also judged on records that were trained on. Default: 0.3, which finds a class
            that collapses among 8 records.
        max_negative_flips: Maximum share of past records that production has right and the new version wrong (Yan et
            al. 2021): users notice them as regressions even if the accuracy is the same. Default: 0.1.
        max_calibration_error_increase: Maximum increase of the expected calibration error on past records (Guo et al.
            2017). Default: 0.1.
        max_label_noise: Maximum share of wrong labels among the new records in excess of that among the past ones.
            Default: 0.04.
        min_new_agreement: Minimum agreement of predictions and labels on new records, corrected for chance (Cohen's
            kappa, 1960), relative to that on past records. If it is far lower, the labels cannot be predicted from the
            texts (garbage). Default: 0.3.
        max_below_untrained: Maximum loss of accuracy of a first version against the nearest class mean over the
            pretrained encoder, which needs no training. A first version must also be right more often than one answer
            for everything. None skips both. Default: 0.02.
        min_accuracy: Minimum accuracy on all held-out records together, of a first version too. Set it to what the
            service must not fall below. Default: None, as it depends on the task.
        min_new_accuracy: Minimum accuracy on the held-out records of the update.
        max_latency_ratio: Maximum time of a prediction, as a multiple of production's. Default: 1.5.
        max_size_ratio: Maximum size of the weights in bytes, as a multiple of production's. Default: 1.5.
        max_bad_share: Maximum share of records that did not fit the schema. Default: 0.1.
        max_duplicate_share: Maximum share of records that repeat a text of the same update. Default: 0.5.
        max_class_share: Maximum share of one known class among the records; beyond it, the model would learn to predict
            nothing else. A new class may come alone. Raise the limit for streams that are naturally one-sided. Default:
            0.9.
        min_records: Minimum number of records to train on. Default: 20.
        slice_by: Name of a field of the records; the versions are also compared on each of its values. Classes need
            none: they are always compared.
        alpha: Probability with which chance alone may exceed a limit. Default: 0.01.
        test: ``"mcnemar"`` (exact) or ``"bootstrap"`` (paired, with 10,000 resamples).
        seed: Seed of the random resampling.

    Raises:
        ValueError: If a setting is out of range. The message names the setting and what is allowed.

    Example:
        >>> ids, labels = [str(i) for i in range(200)], ["sport"] * 200
        >>> def version(n_right):
        ...     said = ["sport"] * n_right + ["law"] * (200 - n_right)
        ...     return {"update-1": Predictions(ids, labels, said, np.full(200, 0.9), np.full(200, 0.9))}
        >>> Gate().judge(version(185), version(162), new="update-2").words()
        Traceback (most recent call last):
        ValueError: there are no predictions for the new slice 'update-2'; there are ['update-1']
        >>> verdict = Gate(min_new_agreement=None).judge(version(185), version(162), new="update-1")
        >>> verdict.words()[:100]
        "refused: on 'update-1' the new version is right on 81.0 % of 200 held-out records, the one in produc"
    """

    def __init__(
        self,
        *,
        max_forgetting: float | None = 0.02,
        max_drop: float | None = 0.15,
        max_total_forgetting: float | None = 0.05,
        accepted: dict[str, int] | None = None,
        max_class_drop: float | None = 0.3,
        max_negative_flips: float | None = 0.1,
        max_calibration_error_increase: float | None = 0.1,
        max_label_noise: float | None = 0.04,
        min_new_agreement: float | None = 0.3,
        max_below_untrained: float | None = 0.02,
        min_accuracy: float | None = None,
        min_new_accuracy: float | None = None,
        max_latency_ratio: float | None = 1.5,
        max_size_ratio: float | None = 1.5,
        max_bad_share: float | None = 0.1,
        max_duplicate_share: float | None = 0.5,
        max_class_share: float | None = 0.9,
        min_records: int | None = 20,
        slice_by: str | None = None,
        alpha: float = 0.01,
        test: Test = "mcnemar",
        seed: int = 0,
    ) -> None:
        shares = {
            "max_forgetting": max_forgetting,
            "max_drop": max_drop,
            "max_total_forgetting": max_total_forgetting,
            "max_class_drop": max_class_drop,
            "max_negative_flips": max_negative_flips,
            "max_calibration_error_increase": max_calibration_error_increase,
            "max_label_noise": max_label_noise,
            "min_new_agreement": min_new_agreement,
            "max_below_untrained": max_below_untrained,
            "min_accuracy": min_accuracy,
            "min_new_accuracy": min_new_accuracy,
            "max_bad_share": max_bad_share,
            "max_duplicate_share": max_duplicate_share,
            "max_class_share": max_class_share,
        }
        for name, share in shares.items():
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name} is a share between 0 and 1 (0.02 is 2 %), or None; got {share}")
        for name, ratio in (("max_latency_ratio", max_latency_ratio), ("max_size_ratio", max_size_ratio)):
            if ratio is not None and not 1 <= ratio < math.inf:
                raise ValueError(f"{name} is a multiple of production's and at least 1, or None; got {ratio}")
        for name, number in (accepted or {}).items():
            if number < 1:
                raise ValueError(
                    f"accepted gives a slice the number of a version, counted from 1; got {name}: {number}"
                )
        if min_records is not None and min_records < 1:
            raise ValueError(f"min_records must be positive, or None; got {min_records}")
        if not 0 < alpha < 0.5:
            raise ValueError(f"alpha must be between 0 and 0.5, got {alpha}")
        if test not in get_args(Test):
            raise ValueError(f"test must be one of {list(get_args(Test))}, got {test!r}")
        self.max_forgetting = max_forgetting
        self.max_drop = max_drop
        self.max_total_forgetting = max_total_forgetting
        self.accepted = dict(accepted or {})
        self.max_class_drop = max_class_drop
        self.max_negative_flips = max_negative_flips
        self.max_calibration_error_increase = max_calibration_error_increase
        self.max_label_noise = max_label_noise
        self.min_new_agreement = min_new_agreement
        self.max_below_untrained = max_below_untrained
        self.min_accuracy = min_accuracy
        self.min_new_accuracy = min_new_accuracy
        self.max_latency_ratio = max_latency_ratio
        self.max_size_ratio = max_size_ratio
        self.max_bad_share = max_bad_share
        self.max_duplicate_share = max_duplicate_share
        self.max_class_share = max_class_share
        self.min_records = min_records
        self.slice_by = slice_by
        self.alpha = alpha
        self.test = test
        self.seed = seed

    # --- the data, before training

    def judge_data(
        self,
        records: Sequence[Row],
        text: str | Sequence[str] = "text",
        label: str = "label",
        known_classes: Sequence[str] = (),
        n_bad: int = 0,
        n_read: int = 0,
        names: Callable[[Any], list[str]] = lambda label: [label] if isinstance(label, str) else list(label),
    ) -> list[Check]:
        """Check the records of an update before anything is trained; this needs no model.

        Args:
            records: The records that fit the schema.
            text: Name of the field with the text, or of the two fields of a pair.
            label: Name of the field with the label: a name, or a list of names.
            known_classes: Classes of the version in production; empty for the first version, which needs two classes.
            n_bad: Number of records that went to quarantine.
            n_read: Number of records that were read in all.
            names: Function that returns the names of the classes in a label; none if labels are not classes. By default
                a label is a name or a list of names. See :meth:`evertune.tasks.Task.label_names`.
        """
        checks = []
        rows = [row["record"] for row in records]
        if self.max_bad_share is not None and n_read:
            share = n_bad / n_read
            checks.append(
                _at_most("bad records", share, self.max_bad_share, f"{n_bad} of {n_read} records do not fit the schema")
            )
        if self.min_records is not None:
            words = f"there are {len(rows)} records (at least {self.min_records} are needed)"
            enough = len(rows) >= self.min_records
            checks.append(
                Check("records", "", None, len(rows), self.min_records, None, enough, words, "data", "records")
            )
        if self.max_duplicate_share is not None and rows:
            fields = [text] if isinstance(text, str) else list(text)
            copies = len(rows) - len({tuple(_normalised(str(row[field])) for field in fields) for row in rows})
            words = f"{copies} of {len(rows)} records repeat the text of another"
            checks.append(_at_most("duplicates", copies / len(rows), self.max_duplicate_share, words))
        if self.max_class_share is not None and rows:
            classes = Counter(tuple(sorted(names(row[label]))) for row in rows)
            # The largest class, and the first by name among equals, so that the verdict is deterministic.
            name, count = min(classes.items(), key=lambda item: (-item[1], item[0]))
            if classes.keys() == {()} and not all(isinstance(row[label], list) for row in rows):
                return [*checks, _not_applicable("one class", "data")]
            is_new = bool(known_classes) and not set(name) <= set(known_classes)
            words = (
                f"{count} of {len(rows)} records are of one {'new class' if is_new else 'class'}, {', '.join(name)!r}"
            )
            limit = 1.0 if is_new else self.max_class_share
            checks.append(_at_most("one class", count / len(rows), limit, words))
        return checks

    def groups(self, rows: Iterable[Row]) -> dict[str, str]:
        """The value of ``slice_by`` by the id of each record that has the field; empty without ``slice_by``."""
        if self.slice_by is None:
            return {}
        field = self.slice_by
        return {row["id"]: str(row["record"][field]) for row in rows if row["record"].get(field) is not None}

    # --- the model, after training

    def judge(
        self,
        champion: Mapping[str, Predictions] | None,
        challenger: Mapping[str, Predictions],
        new: str,
        costs: tuple[Cost, Cost] | None = None,
        data_checks: Iterable[Check] = (),
        trained: str | None = None,
        groups: Mapping[str, str] | None = None,
        best: Mapping[str, Best] | None = None,
        remembered: tuple[Predictions, Predictions] | None = None,
        untrained: Mapping[str, Predictions] | None = None,
    ) -> Verdict:
        """Compare two versions.

        Args:
            champion: Predictions of the version in production by slice; None if there is no such version yet. If it was
                asked about other records of a slice, the records that both versions were asked about count.
            challenger: Predictions of the new version on the same slices.
            new: Name of the slice with the held-out records of this update; all other slices are the past.
            costs: Costs of the champion and of the challenger; None skips their comparison.
            data_checks: Results of :meth:`judge_data`, to be part of the verdict.
            trained: Name of the slice, if there is one, with records of this update that the challenger was trained on.
                They count only for the label noise; enough to make 500 together with the held-out ones suffice.
            groups: Result of :meth:`groups`.
            best: The best predictions so far on the past slices, where they are not production's.
            remembered: Predictions of the champion and of the challenger on records of the past that were trained on.
                They count only for classes of which few records were held out.
            untrained: Answers of :func:`~evertune.gate.untrained.nearest_class_means` by slice, for the new slice,
                ``trained``, and some past records. Needed for a first version and for classes that the champion has
                not learned; None if the module has no features of a pretrained encoder.

        Raises:
            ValueError: If a slice is missing on one side, or no record of it was predicted by both versions.
        """
        if new not in challenger:
            raise ValueError(f"there are no predictions for the new slice {new!r}; there are {list(challenger)}")
        checks = [*data_checks, _finite(challenger)]
        held_out = {name: said for name, said in challenger.items() if name != trained}
        if self.min_accuracy is not None:
            checks.append(_at_least("accuracy", "all slices", pool(held_out.values()), self.min_accuracy))
        if champion is None:
            return Verdict.of([*checks, *self._better_than_nothing(new, challenger[new], untrained)])
        pairs = {name: aligned(name, champion, challenger) for name in dict.fromkeys([*challenger, *champion])}
        fresh = pairs.pop(new)
        shown = pairs.pop(trained) if trained is not None else None
        past = {name: pair for name, pair in pairs.items() if len(pair[0])}
        pooled = (pool(old for old, _ in past.values()), pool(now for _, now in past.values()))
        checks += self._compared("forgetting", past, self.max_forgetting)
        if len(past) > 1:
            checks += self._compared("forgetting", {POOLED: pooled}, self.max_forgetting)
        since, accepted = self._since_best(best or {}, past)
        checks += accepted
        if since:
            checks += self._compared("forgetting in all", since, self.max_total_forgetting, best or {})
        if since and len(past) > 1:
            whole = [since.get(name, pair) for name, pair in past.items()]
            everything = {POOLED: (pool(old for old, _ in whole), pool(now for _, now in whole))}
            checks += self._compared("forgetting in all", everything, self.max_total_forgetting, best or {})
        if groups:
            grouped = _grouped([*past.values(), fresh], groups, self.slice_by or "group")
            checks += self._compared("group", grouped, self.max_forgetting)
        trained_on = [pair for pair in (shown, remembered) if pair is not None]
        checks += self._classes([*past.values(), fresh], list(since.values()), trained_on)
        if past:
            checks += self._negative_flips(*pooled)
            checks += self._calibration(*pooled)
        if len(fresh[1]):
            checks += self._compared("new records", {new: fresh}, self.max_forgetting)
            if self.min_new_accuracy is not None:
                checks.append(_at_least("new accuracy", new, fresh[1], self.min_new_accuracy))
            answers = [old for old, _ in (fresh, *past.values(), *([] if shown is None else [shown]))]
            known = learned_classes(answers, [old for old, _ in past.values()])
            checks += self._agreement(new, fresh[1], pooled[1], known, untrained)
            checks += self._label_noise(new, fresh, shown, list(past.values()), known)
            parts = {new: fresh} if trained is None or shown is None else {new: fresh, trained: shown}
            checks += self._new_classes(new, parts, pooled, known, untrained)
        if costs is not None:
            checks += self._costs(*costs)
        return Verdict.of(checks)

    def standing(self, best: Mapping[str, Best]) -> dict[str, Best]:
        """The best predictions so far that no setting of ``accepted`` has overruled."""
        return {
            name: one
            for name, one in best.items()
            if one.version >= max(self.accepted.get(name, 0), self.accepted.get(POOLED, 0))
        }

    def _since_best(
        self, best: Mapping[str, Best], past: Mapping[str, tuple[Predictions, Predictions]]
    ) -> tuple[dict[str, tuple[Predictions, Predictions]], list[Check]]:
        """The best predictions so far beside the new ones, and a report on those that no longer count."""
        if self.max_total_forgetting is None:
            return {}, []
        pairs = {
            name: aligned(name, {name: one.predictions}, {name: past[name][1]})
            for name, one in best.items()
            if name in past and not set(one.predictions.ids).isdisjoint(past[name][1].ids)
        }
        counted = self.standing(best)
        reports = []
        for name, (old, now) in pairs.items():
            if name not in counted:
                words = (
                    f"on {name!r} version {best[name].version}, which was right on {_percent(old.accuracy)}, is no "
                    f"longer the standard (gate.accepted); the new version is right on {_percent(now.accuracy)}"
                )
                reports.append(_check("accepted", name, old.accuracy, now.accuracy, None, True, words))
        return {name: pair for name, pair in pairs.items() if name in counted}, reports

    def _compared(
        self,
        name: str,
        pairs: Mapping[str, tuple[Predictions, Predictions]],
        limit: float | None,
        best: Mapping[str, Best] | None = None,
    ) -> list[Check]:
        """Paired tests on some slices, with the family-wise error rate ``alpha`` over all of them together.

        With ``best``, the old predictions are the best so far instead of production's.
        """
        if limit is None:
            return []
        p_values = statistics.holm([self._p_value(old, now) for old, now in pairs.values()])
        checks = []
        for (slice_name, (old, now)), p_value in zip(pairs.items(), p_values, strict=True):
            drop = round(old.accuracy - now.accuracy, 9)  # 0.9 - 0.88 must not exceed a limit of 0.02
            broken = drop > limit and p_value < self.alpha
            collapsed = best is None and self.max_drop is not None and drop > self.max_drop and len(now) >= 50
            broken_limit = self.max_drop if collapsed and not broken and self.max_drop is not None else limit
            how, on = ("is right on", "on ") if now.has_classes else ("scores", "")
            of = "of" if now.has_classes else "on"
            whose = "the one in production"
            if best is not None:
                one = best.get(slice_name)
                whose = "the best so far" + (f", version {one.version}," if one else " of each slice")
            words = (
                f"on {slice_name!r} the new version {how} {_percent(now.accuracy)} {of} {len(now)} held-out "
                f"records, {whose} {on}{_percent(old.accuracy)} "
                f"({_p(p_value)}, limit {100 * broken_limit:.1f} points"
            )
            words += ")" if best is None else " over all updates; gate.accepted makes it the new normal)"
            passed = not (broken or collapsed)
            checks.append(
                _check(name, slice_name, old.accuracy, now.accuracy, broken_limit, passed, words, p_value, on="less")
            )
        return checks

    def _classes(
        self,
        held_out: Sequence[tuple[Predictions, Predictions]],
        since_best: Sequence[tuple[Predictions, Predictions]],
        trained_on: Sequence[tuple[Predictions, Predictions]],
    ) -> list[Check]:
        """Whether a class has collapsed, by an exact test of the records that were right and are wrong now.

        The test asks how probable that many losses are if the class lost no more than the limit. It does not ask for
        proof of *any* loss, as that of a slice does, so that a few records are enough to find a class that is gone.
        """
        limit = self.max_class_drop
        if limit is not None and not all(now.has_classes for _, now in held_out):
            return [_not_applicable("class")]
        if limit is None:
            return []
        found = {name: _Class.of(name, held_out) for name in _names_in(held_out)}
        for name, one in found.items():
            if one.right < FEW:
                found[name] = _Class.of(name, [*held_out, *trained_on], n_held_out=one.records)
            then = _Class.of(name, since_best)
            if then.right and then.drop > found[name].drop:
                found[name] = then
        known = {name: one for name, one in found.items() if one.right}
        p_values = statistics.holm([statistics.binomial_tail(one.lost, one.right, limit) for one in known.values()])
        checks = []
        for (name, one), p_value in zip(known.items(), p_values, strict=True):
            beyond = one.drop > limit
            # With all of its records lost, could the test have refused?
            blind = len(known) * limit**one.right >= self.alpha
            passed = False if beyond and p_value < self.alpha else None if beyond or blind else True
            words = (
                f"of class {name!r} the new version is right on {_percent(one.after)} of {one.records} records"
                f"{one.origin}, the one before on {_percent(one.before)} "
                f"({_p(p_value)}, limit {100 * limit:.0f} points)"
            )
            if passed is None:
                words = f"cannot tell ({one.right} {'record' if one.right == 1 else 'records'}): {words}"
            checks.append(_check("class", name, one.before, one.after, limit, passed, words, p_value, on="less"))
        return checks

    def _p_value(self, old: Predictions, now: Predictions) -> float:
        if not now.has_classes:
            return statistics.sign_flips(old.score - now.score, self.seed)
        before, after = old.correct, now.correct
        losses, gains = int((before & ~after).sum()), int((~before & after).sum())
        if self.test == "mcnemar":
            return statistics.mcnemar(losses, gains)
        return statistics.bootstrap(losses, gains, len(before), self.seed)

    def _negative_flips(self, old: Predictions, now: Predictions) -> list[Check]:
        limit = self.max_negative_flips
        if limit is None:
            return []
        if not now.has_classes:
            return [_not_applicable("negative flips")]
        flips = int((old.correct & ~now.correct).sum())
        share, p_value = flips / len(now), statistics.binomial_tail(flips, len(now), limit)
        words = (
            f"{flips} of {len(now)} past records that production has right are wrong now "
            f"({_percent(share)}, {_p(p_value)}, limit {_percent(limit)})"
        )
        passed = not (share > limit and p_value < self.alpha)
        return [_check("negative flips", POOLED, None, share, limit, passed, words, p_value)]

    def _calibration(self, old: Predictions, now: Predictions) -> list[Check]:
        limit = self.max_calibration_error_increase
        if limit is not None and not now.has_classes:
            return [_not_applicable("calibration error")]
        if limit is None or not (np.isfinite(old.confidence).all() and np.isfinite(now.confidence).all()):
            return []
        before, after = (statistics.calibration_error(one.confidence, one.correct) for one in (old, now))
        p_value = None
        if after - before > limit:  # the bootstrap is slow, and is needed only if the limit is exceeded
            p_value = statistics.calibration_test(
                (old.confidence, now.confidence), (old.correct, now.correct), self.seed
            )
        words = (
            f"on past records the confidence of the new version is off by {100 * after:.1f} points, that of the one in "
            f"production by {100 * before:.1f} (limit {100 * limit:.1f} points more)"
        )
        passed = p_value is None or p_value >= self.alpha
        return [_check("calibration error", POOLED, before, after, limit, passed, words, p_value, on="more")]

    def _better_than_nothing(
        self, new: str, fresh: Predictions, untrained: Mapping[str, Predictions] | None
    ) -> list[Check]:
        """Whether a first version is better than one answer for everything, and than the encoder without training."""
        limit = self.max_below_untrained
        if limit is None or not len(fresh):
            return []
        if not fresh.has_classes:
            return [_not_applicable("largest class"), _not_applicable("without training")]
        classes = Counter(tuple(sorted(_as_list(label))) for label in fresh.labels)
        largest, count = min(classes.items(), key=lambda item: (-item[1], item[0]))
        share, checks = count / len(fresh), []
        if len(classes) > 1:
            words = (
                f"on {new!r} the new version is right on {_percent(fresh.accuracy)} of {len(fresh)} held-out records; "
                f"to answer {', '.join(largest)!r} each time would be right on {_percent(share)}"
            )
            better = True if fresh.accuracy > share else False if len(fresh) >= FEW else None
            if better is None:
                words = f"cannot tell ({len(fresh)} records): {words}"
            checks.append(_check("largest class", new, None, fresh.accuracy, share, better, words))
        heard = _heard(untrained, new, fresh)
        if heard is None:
            words = f"cannot tell ({len(fresh)} records): {_NO_FEATURES}"
            return [*checks, _check("without training", new, None, fresh.accuracy, limit, None, words, on="less")]
        without, now = heard
        drop, p_value = round(without.accuracy - now.accuracy, 9), self._p_value(without, now)
        words = (
            f"on {new!r} the new version is right on {_percent(now.accuracy)} of {len(now)} held-out records, the "
            f"nearest class mean over the pretrained encoder, without training, on {_percent(without.accuracy)} "
            f"({_p(p_value)}, limit {100 * limit:.1f} points)"
        )
        passed = not (drop > limit and p_value < self.alpha)
        words += "" if passed else ": train longer, or with another learning rate"
        return [
            *checks,
            _check("without training", new, without.accuracy, now.accuracy, limit, passed, words, p_value, on="less"),
        ]

    def _agreement(
        self,
        new: str,
        fresh: Predictions,
        past: Predictions,
        known: Collection[str],
        untrained: Mapping[str, Predictions] | None,
    ) -> list[Check]:
        if self.min_new_agreement is not None and not fresh.has_classes:
            return [_not_applicable("agreement")]
        if self.min_new_agreement is None or min(len(fresh), len(past)) < FEW:
            return []
        now, then = statistics.kappa(fresh.labels, fresh.predicted), statistics.kappa(past.labels, past.predicted)
        if now is None or then is None:  # all records of one class
            return []
        limit = self.min_new_agreement * then
        if now < limit and (excuse := self._not_learned_yet(new, fresh, known, untrained)) is not None:
            passed, why = excuse
            words = f"on {new!r} predictions and labels agree little beyond chance (kappa {now:.2f}); {why}"
            words = words if passed else f"cannot tell ({len(fresh)} records): {words}"
            return [_check("agreement", new, None, now, limit, passed, words, unit="agreement")]
        words = (
            f"on {new!r} predictions and labels agree little beyond chance (kappa {now:.2f}, {then:.2f} on past "
            f"records, limit {limit:.2f}): the texts do not tell the labels"
            if now < limit
            else f"on {new!r} predictions and labels agree beyond chance (kappa {now:.2f}, limit {limit:.2f})"
        )
        return [_check("agreement", new, None, now, limit, now >= limit, words, unit="agreement")]

    def _not_learned_yet(
        self, new: str, fresh: Predictions, known: Collection[str], untrained: Mapping[str, Predictions] | None
    ) -> tuple[bool | None, str] | None:
        """Whether the texts predict the labels, although the new version does not: then it has to train longer."""
        unlearned = sum(not set(_as_list(label)) <= set(known) for label in fresh.labels)
        heard = _heard(untrained, new, fresh)
        if heard is not None:
            agreement = statistics.kappa(heard[0].labels, heard[0].predicted) or 0.0
            if agreement >= (self.min_new_agreement or 0.0):
                return True, (
                    f"but records of one class resemble each other (kappa {agreement:.2f} without training): they are "
                    "not learned yet, train longer"
                )
            return None
        if 2 * unlearned < len(fresh):
            return None
        return None, f"their classes are not learned yet, or the labels are wrong: {_NO_FEATURES}"

    def _new_classes(
        self,
        new: str,
        parts: Mapping[str, tuple[Predictions, Predictions]],
        past: tuple[Predictions, Predictions],
        known: Collection[str],
        untrained: Mapping[str, Predictions] | None,
    ) -> list[Check]:
        """Whether records of classes that production has not learned resemble each other: label noise, without the
        versions as witnesses."""
        limit = self.max_label_noise
        if limit is None or not parts[new][1].has_classes:
            return []
        is_right = [
            right
            for _, now in parts.values()
            for label, right in zip(now.labels, now.correct.tolist(), strict=True)
            if not set(_as_list(label)) <= set(known)
        ]
        if not (n := len(is_right)):
            return []
        name, right, without = f"{new}, new classes", sum(is_right) / n, untrained or {}
        now = sum(
            (unlike_their_class(*pair, without[part], known, past) for part, pair in parts.items() if part in without),
            Noise(0, 0),
        )
        then = sum((_mistakes(one, known) for part, one in without.items() if part not in parts), Noise(0, 0))
        p_value = _noise_p_value(now, then)
        if now.sure < FEW or then.sure < FEW:
            why = _NO_FEATURES if not now.sure else "too few records to compare with each other"
            words = f"cannot tell ({n} {'record' if n == 1 else 'records'} of new classes): {why}"
            return [_check("label noise", name, None, None, limit, None, words, on="more")]
        passed = not (now.share - then.share > limit and p_value < self.alpha)
        words = (
            f"{now.contradicted} of {now.sure} records of classes that production has not learned resemble another "
            f"class, and a version agrees ({_percent(now.share)}; of past records {_percent(then.share)} resemble "
            f"another class; {_p(p_value)}, limit {100 * limit:.1f} points more)"
        )
        if not passed:
            words += ": either their labels are wrong, or the classes are so alike that they need longer training"
        elif right < 0.5:
            words += f"; the new version is right on {_percent(right)} of them: they are not learned yet, train longer"
        return [_check("label noise", name, then.share, now.share, limit, passed, words, p_value, on="more")]

    def _label_noise(
        self,
        new: str,
        fresh: tuple[Predictions, Predictions],
        shown: tuple[Predictions, Predictions] | None,
        past: list[tuple[Predictions, Predictions]],
        known: Collection[str],
    ) -> list[Check]:
        """Tests of the held-out records, and of all records that were given.

        If the challenger predicts most of the held-out labels that the champion contradicts, the data has changed: a
        label then counts as wrong only if the challenger contradicts it although it was trained on it. Otherwise the
        champion alone decides, so that labels which the challenger has memorised are not hidden.
        """
        limit = self.max_label_noise
        if limit is None:
            return []
        if not fresh[1].has_classes:
            return [_not_applicable("label noise")]
        labels = [label for _, now in filter(None, (fresh, shown)) for label in now.labels]
        if labels and not any(set(_as_list(label)) <= set(known) for label in labels):
            return []  # all are of new classes
        before_all = pool(old for old, _ in past), pool(now for _, now in past)
        then = sum((label_noise(*pair, known) for pair in past), Noise(0, 0))
        held_out = label_noise(*fresh, known, past=before_all)
        found = {new: (held_out, then)}
        if shown is not None and held_out.drifted:
            found[f"{new}, trained on"] = label_noise(*shown, known, UNSURE_LEARNT, before_all), then
        elif shown is not None:
            now, before = (
                sum((label_noise(*one, known, second=None, past=before_all) for one in part), Noise(0, 0))
                for part in ([fresh, shown], past)
            )
            found[f"{new}, all records"] = now, before
        p_values = statistics.holm([_noise_p_value(*pair) for pair in found.values()])
        checks = []
        for (name, (now, then)), p_value in zip(found.items(), p_values, strict=True):
            words = (
                f"about {_percent(now.share)} of the labels of {name!r} look wrong: {now.contradicted} of {now.sure} "
                f"are contradicted with confidence, of past ones {then.contradicted} of {then.sure} "
                f"({_p(p_value)}, limit {100 * limit:.1f} points more than in the past)"
            )
            excused = now is held_out and held_out.drifted
            if excused:
                words += f"; {now.resolved} labels that production contradicts could be learned: the world has changed"
            refused = not excused and now.share - then.share > limit and p_value < self.alpha
            # Had all labels been contradicted, would chance have been ruled out?
            blind = len(found) * _noise_p_value(replace(now, contradicted=now.sure), then) >= self.alpha
            passed = False if refused else None if blind and not excused else True
            if passed is None:
                words = f"cannot tell ({now.sure} {'record' if now.sure == 1 else 'records'}): {words}"
            words += ": either labels are wrong, or these records are unlike those of the past" if refused else ""
            checks.append(_check("label noise", name, then.share, now.share, limit, passed, words, p_value, on="more"))
        return checks

    def _costs(self, old: Cost, now: Cost) -> list[Check]:
        compared: list[tuple[str, float, float, float | None, Unit]] = [
            ("latency of a text", old.latency_ms, now.latency_ms, self.max_latency_ratio, "ms"),
            ("latency of a batch", old.batch_ms, now.batch_ms, self.max_latency_ratio, "ms"),
            ("size", old.size_bytes, now.size_bytes, self.max_size_ratio, "bytes"),
        ]
        checks = []
        for name, before, after, ratio, unit in compared:
            if ratio is None:
                continue
            words = (
                f"the {name} is {_shown(after, unit)}, in production {_shown(before, unit)} "
                f"(limit {ratio:g} times as much)"
            )
            checks.append(_check(name, "", before, after, ratio * before, after <= ratio * before, words, unit=unit))
        return checks


def aligned(
    name: str, champion: Mapping[str, Predictions], challenger: Mapping[str, Predictions]
) -> tuple[Predictions, Predictions]:
    """The predictions of two versions on the records of a slice that both were asked about, in the same order.

    Raises:
        ValueError: If a version has no predictions for the slice, there is no common record, or a label differs.
    """
    for who, said in (("the version in production", champion), ("the new version", challenger)):
        if name not in said:
            raise ValueError(f"{who} has no predictions for the slice {name!r}; evaluate both on the same slices")
    old, now = champion[name], challenger[name]
    if old.ids == now.ids:
        pair = old, now
    else:
        places = {one: place for place, one in enumerate(old.ids)}
        common = [place for place, one in enumerate(now.ids) if one in places]
        if not common:
            raise ValueError(
                f"slice {name!r}: the versions were asked about different records ({len(old)} and {len(now)}, none in "
                "common); evaluate the version in production on this slice again"
            )
        pair = old.pick([places[now.ids[place]] for place in common]), now.pick(common)
    if pair[0].has_classes != pair[1].has_classes:
        raise ValueError(f"slice {name!r}: one version predicts classes and the other gives scores; compare one task")
    differ = [one for one, a, b in zip(pair[0].ids, pair[0].labels, pair[1].labels, strict=True) if a != b]
    if differ:
        raise ValueError(f"slice {name!r}: the label of record {differ[0]!r} is not the same for both versions")
    return pair


def pool(parts: Iterable[Predictions]) -> Predictions:
    """Several slices as one; a record that is in two of them counts twice."""
    slices = list(parts)
    # Numbered, as ids must be unique: the same record may be in several slices.
    ids = [f"{number}/{one}" for number, part in enumerate(slices) for one in part.ids]
    return Predictions(
        ids,
        [label for part in slices for label in part.labels],
        [said for part in slices for said in part.predicted],
        np.concatenate([np.empty(0), *(part.confidence for part in slices)]),
        np.concatenate([np.empty(0), *(part.label_probability for part in slices)]),
        None
        if all(part.has_classes for part in slices)
        else np.concatenate([np.empty(0), *(part.score for part in slices)]),
    )


@dataclass(frozen=True)
class _Class:
    """The records of one class: how many there are, how many each version has right, and how many were lost."""

    records: int
    right: int
    right_now: int
    lost: int
    n_held_out: int

    @classmethod
    def of(cls, name: str, pairs: Iterable[tuple[Predictions, Predictions]], n_held_out: int | None = None) -> _Class:
        """Count the records with this label. With several labels, the other labels of a record do not matter."""
        old, now = [], []
        for before, after in pairs:
            for label, said, says in zip(after.labels, before.predicted, after.predicted, strict=True):
                if name in _as_list(label):
                    old.append(name in _as_list(said))
                    now.append(name in _as_list(says))
        lost = sum(was and not still for was, still in zip(old, now, strict=True))
        return cls(len(old), sum(old), sum(now), lost, len(old) if n_held_out is None else n_held_out)

    @property
    def before(self) -> float:
        return self.right / max(self.records, 1)

    @property
    def after(self) -> float:
        return self.right_now / max(self.records, 1)

    @property
    def drop(self) -> float:
        return round(self.before - self.after, 9)

    @property
    def origin(self) -> str:
        return "" if self.n_held_out == self.records else f" ({self.records - self.n_held_out} of them trained on)"


def _names_in(pairs: Iterable[tuple[Predictions, Predictions]]) -> list[str]:
    return sorted({name for _, now in pairs for label in now.labels for name in _as_list(label)})


def _as_list(label: Label) -> list[str]:
    return [label] if isinstance(label, str) else label


def _heard(
    untrained: Mapping[str, Predictions] | None, name: str, said: Predictions
) -> tuple[Predictions, Predictions] | None:
    """The answers without training beside those of a version, where there are any."""
    if untrained is None or name not in untrained:
        return None
    rows = [row for row, answer in enumerate(untrained[name].predicted) if answer]
    return aligned(name, {name: untrained[name].pick(rows)}, {name: said}) if rows else None


def _mistakes(untrained: Predictions, known: Collection[str]) -> Noise:
    """How often the answers without training are wrong on records of classes that production has learned."""
    rows = [
        row
        for row, (label, answer) in enumerate(zip(untrained.labels, untrained.predicted, strict=True))
        if answer and set(_as_list(label)) <= set(known)
    ]
    return Noise(len(rows), int((~untrained.correct[rows]).sum()))


def _noise_p_value(now: Noise, then: Noise) -> float:
    """The probability of at least as many contradictions at the past rate, smoothed by Laplace's rule: a few past
    records without a contradiction do not prove that there are none."""
    return statistics.binomial_tail(now.contradicted, now.sure, (then.contradicted + 1) / (then.sure + 2))


def _grouped(
    pairs: Sequence[tuple[Predictions, Predictions]], groups: Mapping[str, str], field: str
) -> dict[str, tuple[Predictions, Predictions]]:
    """The predictions on the records of each group, from all slices."""
    made = {}
    for value in sorted(set(groups.values())):
        chosen = [[place for place, one in enumerate(old.ids) if groups.get(one) == value] for old, _ in pairs]
        old = pool(pair[0].pick(places) for pair, places in zip(pairs, chosen, strict=True))
        now = pool(pair[1].pick(places) for pair, places in zip(pairs, chosen, strict=True))
        if len(now):
            made[f"{field} = {value}"] = (old, now)
    return made


def _finite(challenger: Mapping[str, Predictions]) -> Check:
    total = sum(len(said) for said in challenger.values())
    numbers = [said.confidence if said.scores is None else said.scores for said in challenger.values()]
    bad = sum(int((~np.isfinite(one)).sum()) for one in numbers)
    words = f"the new version gives no number for {bad} of {total} records" + (": its training diverged" if bad else "")
    return _check("without a number", "all slices", None, bad, 0, bad == 0, words, unit="records")


def _at_least(name: str, slice_name: str, said: Predictions, limit: float) -> Check:
    how, of = ("is right on", "of") if said.has_classes else ("scores", "on")
    words = (
        f"on {slice_name!r} the new version {how} {_percent(said.accuracy)} {of} {len(said)} held-out records "
        f"(at least {_percent(limit)} is asked for)"
    )
    return _check(name, slice_name, None, said.accuracy, limit, said.accuracy >= limit, words)


def _not_applicable(name: str, stage: Literal["data", "model"] = "model") -> Check:
    """The result for a limit that is set although the labels of the task are not classes."""
    words = f"{name}: not applicable, because the labels of this task are not classes"
    return Check(name, "", None, None, None, None, True, words, stage, applicable=False)


def _at_most(name: str, share: float, limit: float, words: str) -> Check:
    """A check of the data: a share and its upper limit."""
    words = f"{words} ({_percent(share)}, limit {_percent(limit)})"
    return Check(name, "", None, _rounded(share), _rounded(limit), None, share <= limit, words, "data")


def _check(
    name: str,
    slice_name: str,
    champion: float | None,
    challenger: float | None,
    limit: float | None,
    passed: bool | None,
    words: str,
    p_value: float | None = None,
    unit: Unit = "share",
    on: Limit = "value",
) -> Check:
    before, after, allowed, chance = (_rounded(value) for value in (champion, challenger, limit, p_value))
    passed = None if passed is None else bool(passed)
    return Check(name, slice_name, before, after, allowed, chance, passed, words, "model", unit, limit_on=on)


def _rounded(value: float | None) -> float | None:
    """Six significant digits, so that a verdict does not depend on a machine's rounding errors; None for NaN."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{_DIGITS}g}")


def _normalised(text: str) -> str:
    """A text without differences in case, punctuation and spacing."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _p(p_value: float) -> str:
    return "p < 0.0001" if p_value < 0.0001 else f"p = {p_value:.2g}"


def _limit(check: Check) -> str:
    """The limit as the table shows it: how much less or more than production's value, if it is not on the value."""
    if check.limit is None or check.limit_on == "value":
        return _shown(check.limit, check.unit)
    return f"{100 * check.limit:.1f} points {check.limit_on}"


def _shown(value: float | None, unit: Unit) -> str:
    """A value as text, for people.

    >>> _shown(0.925, "share"), _shown(12.345, "ms"), _shown(91_000_000, "bytes"), _shown(300, "records")
    ('92.5 %', '12.3 ms', '91.0 MB', '300')
    """
    if value is None:
        return ""
    return {
        "share": f"{100 * value:.1f} %",
        "ms": f"{value:.1f} ms",
        "bytes": f"{value / 1e6:.1f} MB",
        "records": f"{value:.0f}",
        "agreement": f"{value:.2f}",
    }[unit]
