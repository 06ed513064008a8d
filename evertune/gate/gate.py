"""The gate: a new version goes into production only if it is not worse than the one that is there."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, get_args

from evertune.gate.best import Best
from evertune.gate.checks.agreement import agreement
from evertune.gate.checks.base import base_checks
from evertune.gate.checks.classes import classes
from evertune.gate.checks.costs import costs as cost_checks
from evertune.gate.checks.first import better_than_nothing
from evertune.gate.checks.forgetting import accepted as accepted_losses
from evertune.gate.checks.forgetting import compared, forgetting, forgetting_in_all, since_best
from evertune.gate.checks.levels import accurate, finite
from evertune.gate.checks.noise import wrong_labels, wrong_new_classes
from evertune.gate.checks.records import bad_records, duplicates, enough, one_class
from evertune.gate.checks.regressions import calibration, negative_flips
from evertune.gate.comparison import POOLED, Pair, PairedTest, Test, aligned, grouped, pool, pooled
from evertune.gate.label_noise import learned_classes
from evertune.gate.predictions import Cost, Predictions
from evertune.gate.verdict import Check, Verdict
from evertune.sources.base import Row


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
        base_texts: General texts that no update trains, to guard what a language model can do beyond its records: a
            file, list of dicts, ``Dataset`` or name on the hub with the column ``text``, as
            :mod:`evertune.streams.tables` reads it. Each version's loss on them is compared with that of the version
            it was trained from; of a first version, with that of the pretrained model. Default: None.
        max_base_loss_increase: Maximum increase of the mean loss on ``base_texts``, in nats per token. Default: 0.05,
            which is 5 % more perplexity.
        base_probes: Probes of skills that no update trains, read like ``base_texts``, with the columns ``prompt``,
            ``answer`` and perhaps ``choices``, a list. A probe is right if its answer is the most likely choice per
            token; without choices, if greedy decoding gives the answer exactly. Default: None.
        max_base_drop: Maximum decrease of the share of right probes. Default: 0.05.
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
        >>> import numpy as np
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
        base_texts: str | list[dict[str, Any]] | None = None,
        max_base_loss_increase: float | None = 0.05,
        base_probes: str | list[dict[str, Any]] | None = None,
        max_base_drop: float | None = 0.05,
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
            "max_base_drop": max_base_drop,
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
        if max_base_loss_increase is not None and not 0 <= max_base_loss_increase < math.inf:
            raise ValueError(
                f"max_base_loss_increase is a number of nats per token, or None; got {max_base_loss_increase}"
            )
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
        self.base_texts = base_texts
        self.max_base_loss_increase = max_base_loss_increase
        self.base_probes = base_probes
        self.max_base_drop = max_base_drop
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

    def changed(self, limits: Mapping[str, Any]) -> Gate:
        """A gate with other values of some settings.

        Raises:
            ValueError: If there is no such setting, or a value is out of range.

        >>> Gate(alpha=0.05).changed({"max_forgetting": 0.03}).max_forgetting
        0.03
        """
        if unknown := sorted(limits.keys() - vars(self).keys()):
            raise ValueError(f"the gate has no setting {', '.join(unknown)}; it has {', '.join(vars(self))}")
        return Gate(**{**vars(self), **limits})

    def judge_data(
        self,
        records: Sequence[Row],
        text: str | Sequence[str] = "text",
        label: str | None = "label",
        known_classes: Sequence[str] = (),
        n_bad: int = 0,
        n_read: int = 0,
        names: Callable[[Any], list[str]] = lambda label: [label] if isinstance(label, str) else list(label),
    ) -> list[Check]:
        """Check the records of an update before anything is trained; this needs no model.

        Args:
            records: The records that fit the schema.
            text: Name of the field with the text, or of the two fields of a pair.
            label: Name of the field with the label: a name, or a list of names. None without labels.
            known_classes: Classes of the version in production; empty for the first version, which needs two classes.
            n_bad: Number of records that went to quarantine.
            n_read: Number of records that were read in all.
            names: Function that returns the names of the classes in a label; none if labels are not classes. By default
                a label is a name or a list of names. See :meth:`evertune.tasks.Task.label_names`.
        """
        rows, texts = [row["record"] for row in records], [text] if isinstance(text, str) else list(text)
        return [
            *bad_records(n_bad, n_read, self.max_bad_share),
            *enough(len(rows), self.min_records),
            *duplicates(rows, texts, self.max_duplicate_share),
            *one_class(rows, label, known_classes, names, self.max_class_share),
        ]

    def groups(self, rows: Iterable[Row]) -> dict[str, str]:
        """The value of ``slice_by`` by the id of each record that has the field; empty without ``slice_by``."""
        if self.slice_by is None:
            return {}
        field = self.slice_by
        return {row["id"]: str(row["record"][field]) for row in rows if row["record"].get(field) is not None}

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
        remembered: Pair | None = None,
        untrained: Mapping[str, Predictions] | None = None,
        base: tuple[Mapping[str, Predictions], Mapping[str, Predictions]] = ({}, {}),
        reviewed: Mapping[str, Collection[str]] | None = None,
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
            base: Predictions on ``base_texts`` and ``base_probes``, of the version that the update starts from and of
                the challenger (:func:`~evertune.gate.checks.base.base_checks`).
            reviewed: Ids by slice of the records whose labels a person has given. Whether labels are wrong is judged by
                the others alone: such records are chosen because production is unsure of them, so that it contradicts
                more of their labels than of any others.

        Raises:
            ValueError: If a slice is missing on one side, or no record of it was predicted by both versions.
        """
        if new not in challenger:
            raise ValueError(f"there are no predictions for the new slice {new!r}; there are {list(challenger)}")
        held_out = pool(said for name, said in challenger.items() if name != trained)
        checks = [*data_checks, finite(challenger), *accurate("accuracy", "all slices", held_out, self.min_accuracy)]
        checks += base_checks(*base, self.max_base_loss_increase, self.max_base_drop, self._test)
        if champion is None:
            checks += better_than_nothing(new, challenger[new], untrained, self.max_below_untrained, self._test)
            return Verdict.of(checks)
        pairs = {name: aligned(name, champion, challenger) for name in dict.fromkeys([*challenger, *champion])}
        fresh, shown = pairs.pop(new), pairs.pop(trained) if trained is not None else None
        past = {name: pair for name, pair in pairs.items() if len(pair[0])}
        checks += self._judge_past(past, fresh, shown, best or {}, remembered, groups or {})
        if len(fresh[1]):
            checks += compared("new records", {new: fresh}, self.max_forgetting, self.max_drop, self._test)
            checks += accurate("new accuracy", new, fresh[1], self.min_new_accuracy)
            parts = {new: fresh} if trained is None or shown is None else {new: fresh, trained: shown}
            checks += self._judge_labels(new, parts, past, untrained, reviewed or {})
        if costs is not None:
            checks += cost_checks(costs, self.max_latency_ratio, self.max_size_ratio)
        return Verdict.of(checks)

    def standing(self, best: Mapping[str, Best]) -> dict[str, Best]:
        """The best predictions so far that no setting of ``accepted`` has overruled."""
        return {
            name: one
            for name, one in best.items()
            if one.version >= max(self.accepted.get(name, 0), self.accepted.get(POOLED, 0))
        }

    def _judge_past(
        self,
        past: Mapping[str, Pair],
        fresh: Pair,
        shown: Pair | None,
        best: Mapping[str, Best],
        remembered: Pair | None,
        groups: Mapping[str, str],
    ) -> list[Check]:
        """What the new version has lost: of slices, over all updates, of groups and classes, and on single records."""
        test, standing = self._test, self.standing(best)
        since = since_best(best, past) if self.max_total_forgetting is not None else {}
        overruled = {name: pair for name, pair in since.items() if name not in standing}
        since = {name: pair for name, pair in since.items() if name in standing}
        everything = [*past.values(), fresh]
        trained_on = [pair for pair in (shown, remembered) if pair is not None]
        groups_ = grouped(everything, groups, self.slice_by or "group")
        checks = [
            *forgetting(past, self.max_forgetting, self.max_drop, test),
            *accepted_losses(best, overruled),
            *forgetting_in_all(since, past, best, self.max_total_forgetting, test),
            *compared("group", groups_, self.max_forgetting, self.max_drop, test),
            *classes(everything, list(since.values()), trained_on, self.max_class_drop, self.alpha),
        ]
        if past:
            checks += negative_flips(pooled(past.values()), self.max_negative_flips, self.alpha)
            checks += calibration(pooled(past.values()), self.max_calibration_error_increase, test)
        return checks

    def _judge_labels(
        self,
        new: str,
        parts: Mapping[str, Pair],
        past: Mapping[str, Pair],
        untrained: Mapping[str, Predictions] | None,
        reviewed: Mapping[str, Collection[str]],
    ) -> list[Check]:
        """Whether the labels of an update are right: of its held-out records, and of those trained on if there are
        such ``parts``."""
        known = learned_classes(
            [old for old, _ in (*parts.values(), *past.values())], [old for old, _ in past.values()]
        )
        now, then = (
            {name: _without(pair, reviewed.get(name, ())) for name, pair in of.items()} for of in (parts, past)
        )
        if not any(len(pair[1]) for pair in now.values()):
            return []  # all of them were given by a person
        fresh, shown = now[new], next((pair for name, pair in now.items() if name != new), None)
        before, limit, alpha = pooled(then.values()), self.max_label_noise, self.alpha
        return [
            *agreement(new, fresh[1], before[1], known, untrained, self.min_new_agreement),
            *wrong_labels(new, fresh, shown, then.values(), known, limit, alpha),
            *wrong_new_classes(new, now, before, known, untrained, limit, alpha),
        ]

    @property
    def _test(self) -> PairedTest:
        return PairedTest(self.alpha, self.test, self.seed)


def _without(pair: Pair, ids: Collection[str]) -> Pair:
    """The predictions of both versions without those on some records."""
    return (pair[0].without(ids), pair[1].without(ids)) if ids else pair
