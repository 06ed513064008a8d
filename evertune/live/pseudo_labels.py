"""Labels for records without one, where a module is surer than a threshold that was calibrated on labelled records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evertune.gate.predictions import Label, Predictions
from evertune.gate.statistics import binomial_tail
from evertune.live.evaluation import evaluate
from evertune.live.slices import PSEUDO, is_declared
from evertune.live.versions import Versions
from evertune.registry.registry import Registry
from evertune.registry.serving import load
from evertune.registry.version import Version
from evertune.sources.base import Row
from evertune.tasks.predicting import are_probabilities
from evertune.tasks.texts import truncation_length

_SHARES = 10


@dataclass(frozen=True)
class Threshold:
    """How sure a module must be, so that its answers are right often enough.

    Args:
        confidence: The least probability of an answer that becomes a label; None if no probability is enough.
        records: Number of labelled records that it was calibrated on.
        answered: How many of them have an answer that is at least that sure.
        right: How many of these answers are right.
    """

    confidence: float | None
    records: int
    answered: int
    right: int

    @property
    def words(self) -> str:
        """The same, as a message for people."""
        if self.confidence is None:
            return f"no answer is sure enough, judged by {self.records:,} labelled records: none becomes a label"
        return (
            f"answers of a probability of at least {self.confidence:.3f} become labels: of {self.records:,} labelled "
            f"records {self.answered:,} have one, of which {self.right:,} are right"
        )


def sure_enough(said: Predictions, precision: float = 0.95, alpha: float = 0.05) -> Threshold:
    """The lowest threshold above which answers are right with a given probability, by a test on labelled records.

    The surest tenth of the answers, the surest two tenths and so on are each tested: would so many of them be right if
    fewer than ``precision`` were right in truth? (Exact binomial test, ``alpha`` divided by the number of tests:
    Bonferroni.) The largest part that passes gives the threshold, so that with probability ``1 - alpha`` it keeps the
    promise (selective classification with guaranteed risk, Geifman & El-Yaniv 2017). The promise is about records like
    the labelled ones; at 0.95, it takes at least 104 answers without a mistake.

    Args:
        said: Predictions for records that the module was not trained on.
        precision: Share of the labels that must be right, in (0, 1). Default: 0.95.
        alpha: Probability with which the promise may be broken, in (0, 1). Default: 0.05.

    Raises:
        ValueError: If a number is out of range, there are no predictions, or they have no probabilities.

    Example:
        >>> sure, ids = np.linspace(1.0, 0.5, 400), [str(n) for n in range(400)]
        >>> answers = ["sport"] * 200 + ["sport", "law"] * 100
        >>> found = sure_enough(Predictions(ids, ["sport"] * 400, answers, sure, sure))
        >>> found.answered, found.right, found.confidence
        (200, 200, 0.750627)
    """
    for name, value in (("precision", precision), ("alpha", alpha)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")
    n = len(said)
    if not n:
        raise ValueError("a threshold is calibrated on labelled records, and there are none")
    if not said.has_classes or np.isnan(said.confidence).any():
        raise ValueError("only answers with the probability of a class can become labels")
    order = np.sort(said.confidence)[::-1]
    places = {max(n * tenth // _SHARES, 1) - 1 for tenth in range(1, _SHARES + 1)}
    for confidence in sorted({float(order[place]) for place in places}):
        chosen = said.confidence >= confidence
        answered, right = int(chosen.sum()), int(said.correct[chosen].sum())
        if binomial_tail(right, answered, precision) <= alpha / _SHARES:
            return Threshold(confidence, n, answered, right)
    return Threshold(None, n, 0, 0)


@dataclass(frozen=True)
class PseudoLabelled:
    """What a labeller made of some records.

    Args:
        records: The records that were labelled, each with its label and ``"pseudo_label": True``, which an update
            never holds out to judge a version on.
        abstained: Number of records that the module was not sure enough of.
    """

    records: list[dict[str, Any]]
    abstained: int


class PseudoLabeller:
    """A module that labels what it is sure enough of, and abstains from the rest (Lee 2013, "Pseudo-Label").

    Args:
        module: A module whose ``predict`` gives the probability of each class:
            :class:`~evertune.lightning_modules.SequenceClassificationModule` and those derived from it, trained or
            zero-shot.
        threshold: How sure it must be, see :func:`sure_enough` and :meth:`calibrated`.
        text: Field with the text, or the two fields of a pair.
        label: Field that the label is written to.
        max_length: Number of tokens after which a text is truncated. Default: 128, or what the module takes.

    Example::

        labeller = PseudoLabeller.calibrated(module, labelled, precision=0.95)
        print(labeller.threshold.words)
        found = labeller.label(unlabelled)
        len(found.records), found.abstained  # (1203, 3797)
    """

    def __init__(
        self,
        module: Any,
        threshold: Threshold,
        text: str | Sequence[str] = "text",
        label: str = "label",
        max_length: int | None = None,
    ) -> None:
        self.module, self.threshold = module, threshold
        self.max_length = truncation_length(max_length, module.tokenizer, module)
        self.texts = [text] if isinstance(text, str) else list(text)
        self.field = label

    @classmethod
    def calibrated(
        cls,
        module: Any,
        labelled: Sequence[Mapping[str, Any]],
        precision: float = 0.95,
        alpha: float = 0.05,
        text: str | Sequence[str] = "text",
        label: str = "label",
        max_length: int | None = None,
    ) -> PseudoLabeller:
        """A labeller whose labels are right with a given probability, by records that the module has not learned.

        Args:
            module: As for the class.
            labelled: Records with labels that the module was not trained on.
            precision: As for :func:`sure_enough`.
            alpha: As for :func:`sure_enough`.
            text: Field with the text, or the two fields of a pair.
            label: Field with the label.
            max_length: Number of tokens after which a text is truncated. Default: 128, or what the module takes.

        Raises:
            ValueError: If a record lacks a field, or as for :func:`sure_enough`.
        """
        rows: list[Row] = [{"id": str(number), "record": dict(record)} for number, record in enumerate(labelled)]
        length = truncation_length(max_length, module.tokenizer, module)
        said = evaluate(module, {"labelled": rows}, text, label, max_length=length)["labelled"]
        return cls(module, sure_enough(said, precision, alpha), text, label, length)

    def label(self, records: Sequence[Mapping[str, Any]], batch_size: int = 32) -> PseudoLabelled:
        """Label the records that the module is sure enough of.

        Args:
            records: Records with a text. A label that one already has is replaced.
            batch_size: Number of texts per forward pass. Default: 32.

        Raises:
            TypeError: If the module's answers have no probabilities.
            ValueError: If a text has no tokens.
        """
        if self.threshold.confidence is None or not records:
            return PseudoLabelled([], len(records))
        several = bool(getattr(self.module, "multi_label", False))
        inputs = [record[self.texts[0]] for record in records]
        if len(self.texts) > 1:
            inputs = [tuple(record[name] for name in self.texts) for record in records]
        answers = self.module.predict(inputs, batch_size=batch_size, max_length=self.max_length)
        chosen = []
        for record, answer in zip(records, answers, strict=True):
            label, confidence = _label_and_confidence(answer, several)
            if confidence >= self.threshold.confidence:
                chosen.append({**record, self.field: label, PSEUDO: True})
        return PseudoLabelled(chosen, len(records) - len(chosen))


def labeller_of(
    registry: Registry, version: Version, text: Sequence[str], label: str, precision: float = 0.95
) -> PseudoLabeller:
    """A version as a labeller, calibrated on what it said of the held-out records when it was judged.

    Args:
        registry: Registry of the version.
        version: The version.
        text: Field with the text, or the two fields of a pair.
        label: Field that the label is written to.
        precision: As for :func:`sure_enough`.

    Raises:
        RegistryError: If the version is damaged, or was never judged.
        ValueError: If its records have no field :data:`~evertune.live.slices.PSEUDO`, without which later versions
            would be judged on the labels of this one; or as for :func:`sure_enough`.
    """
    config = version.manifest.config
    if not is_declared(PSEUDO, config.get("schema") or {}):
        raise ValueError(
            f"later versions would be judged on labels of version {version.number}: declare {PSEUDO}: bool | None "
            "among the fields of the schema, so that an update never holds such records out, and update once"
        )
    slices = list(Versions(registry).evaluation(version).slices.values())
    said = Predictions(
        [f"{number} {one}" for number, part in enumerate(slices) for one in part.ids],
        [given for part in slices for given in part.labels],
        [answer for part in slices for answer in part.predicted],
        np.concatenate([np.empty(0), *(part.confidence for part in slices)]),
        np.concatenate([np.empty(0), *(part.label_probability for part in slices)]),
    )
    threshold = sure_enough(said, precision)
    module = load(registry, version.number).module
    length = truncation_length((config.get("data") or {}).get("max_length"), module.tokenizer, module)
    return PseudoLabeller(module, threshold, text, label, length)


def _label_and_confidence(answer: Any, several: bool) -> tuple[Label, float]:
    """The label of an answer and its probability, rounded like those of predictions."""
    if not are_probabilities(answer):
        raise TypeError("only answers with the probability of each class can become labels")
    if several:
        sure = np.prod([max(p, 1 - p) for p in answer.values()])
        return [name for name, p in answer.items() if p > 0.5], round(float(sure), 6)
    name = next(iter(answer))
    return name, round(answer[name], 6)
