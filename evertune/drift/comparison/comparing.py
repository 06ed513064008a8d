"""Compares two sets of records: whether they differ, since when, and in what."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evertune.drift.comparison.comparison import Comparison, Example, SetAside
from evertune.drift.comparison.records import Records, Sorter, Usable, number_of
from evertune.drift.comparison.watching import OF_NUMBERS, Watch, label_of, make_detector, watch_labels
from evertune.drift.detector import Detector
from evertune.drift.explain.attribution import attribute, text_of
from evertune.drift.featurisers import Featuriser, HashedNgrams
from evertune.sources.base import Incoming

MAX_REFERENCE = 2_000
"""Default maximum number of reference records: the cost of the detector grows with their number."""

_MAX_AFTER = 2_000  # maximum number of records after the alarm that the explanation uses
_BATCH = 128  # texts featurised at once
_SHOWN_POINTS = 400  # maximum number of points of each side in the projection
_SHOWN_TEXT = 600  # maximum length of an example in characters


def compare(
    reference: Records,
    current: Records,
    *,
    text: str | Sequence[str] = "text",
    label: str | None = None,
    value: str | None = None,
    detector: str | Detector = "mmd",
    featuriser: Featuriser | None = None,
    arl: float = 10_000,
    window_size: int | None = None,
    reference_size: int | None = None,
    block_size: int = 1,
    ignore: Sequence[str] = (),
    seed: int = 0,
    progress: Callable[[str, int], None] | None = None,
) -> Comparison:
    """Arm a detector with reference records, scan the current ones in order, and explain what has changed.

    A reference of more than ``reference_size`` records is reduced. With ``block_size=1``, records are assumed to be
    independent, and a random sample is taken; with larger blocks, order matters, and the last records are taken.
    Current records always stay in order. After an alarm, the scan continues with the same reference; the decision is
    the first alarm. The explanation compares the reference with the records from the window of the first alarm on, or
    with all current records if there was no alarm.

    Args:
        reference: The records that represent the normal state.
        current: The records that may differ. They are read once, in order, with bounded memory.
        text: Name of the field with the text, or several names. A record that has none of them, or a value in them that
            is not a text, is set aside; an empty text is valid.
        label: Name of the field with the label, whose shares are watched by a separate detector; None for no labels.
        value: Name of a numeric field (a loss, a confidence) that a detector of numbers watches instead of the text.
        detector: A name of :data:`~evertune.drift.comparison.watching.DETECTORS`, or a new detector, whose own settings
            are then used.
        featuriser: Function from texts to features, ``texts -> tensor [texts, n_features]``. Default:
            :class:`~evertune.drift.HashedNgrams`.
        arl: Average run length of each detector: the mean number of records up to a false alarm. Default: 10,000.
        window_size: Number of records in a test; None for the detector's own default.
        reference_size: Number of records to arm the detector with; by default all, up to 2,000.
        block_size: Number of consecutive records that may be similar because they arrived together. Default: 1.
        ignore: Names of fields that the explanation leaves out.
        seed: Seed of samples, detectors and topics.
        progress: Called with ``("reference", n)`` and ``("current", n)`` as records are read.

    Raises:
        ValueError: If there are no usable records, or too few for the detector or for one test, or a setting is
            invalid.
        FileNotFoundError: If a file or folder does not exist.

    Example:
        >>> words = ["rain wind sun", "wind and storm", "sun and heat", "storm rain heat"]
        >>> reference = [{"text": words[i % 4]} for i in range(512)]
        >>> found = compare(reference, [{"text": "shares and bonds"}] * 64)
        >>> found.drift_detected, found.scans[0].alarms[0].record, found.attribution.tokens[0].token
        (True, 32, 'bonds')
    """
    fields = [text] if isinstance(text, str) else list(text)
    by_number = isinstance(detector, str) and detector in OF_NUMBERS
    if by_number and value is None:
        raise ValueError(f"{detector} watches one number of each record: name its field with value=")
    if value is not None and isinstance(detector, str) and not by_number:
        raise ValueError(f"{detector} watches texts, {', '.join(OF_NUMBERS)} a number: value={value!r} has no use")
    if block_size < 1:
        raise ValueError(f"block_size must be positive, got {block_size}")
    if reference_size is not None and reference_size < 1:
        raise ValueError(f"reference_size must be positive, got {reference_size}")
    use = Usable(fields, value)
    featuriser = featuriser or HashedNgrams()
    features_of = _numbers_of(value) if value is not None else _text_features(featuriser, fields)
    told = progress or (lambda side, n: None)

    own_size = detector.reference_size if hasattr(detector, "reference_size") else MAX_REFERENCE
    old, n_reference, aside_reference = _reference(reference, use, reference_size or own_size, block_size, seed, told)
    if isinstance(detector, str):
        settings = {"window_size": window_size, "block_size": block_size if block_size > 1 else None}
        detector = make_detector(detector, arl=arl, reference_size=len(old), seed=seed, **settings)
    old_features = torch.cat([features_of([one.value or {} for one in part]) for part in _batches(old)])
    watch = Watch(detector, value or "text", old_features)
    watches = [watch] if label is None else [watch, watch_labels(label, old, arl=arl, block_size=block_size, seed=seed)]

    sorter = Sorter(current, use)
    after, recent = _Sample(_MAX_AFTER, seed), deque[_Seen](maxlen=watch.look_back)
    n_current = 0
    rows = _featurised(sorter, features_of, lambda n: told("current", n))
    while step := list(islice(rows, watch.step)):
        quiet = not any(one.alarms for one in watches)
        seen = [_Seen(n_current + i, record, row) for i, (record, row) in enumerate(step)]
        n_current += len(seen)
        for one in watches:
            one.look([record.record for record in seen], torch.stack([record.features for record in seen]))
        recent.extend(seen)
        if quiet and any(one.alarms for one in watches):  # the explanation starts with the window of the first alarm
            after, seen = _Sample(_MAX_AFTER, seed), list(recent)
        for record in seen:
            after.add(record)
    if not n_current:
        raise ValueError(f"{_name(current, 'current')} has no usable record{sorter.why()}")
    if not detector.n_tests:
        raise ValueError(
            f"no test was made: {_name(current, 'current')} has {n_current} usable records, fewer than a window of "
            f"{watch.step}"
        )

    new = after.in_order()
    new_features = torch.stack([seen.features for seen in new])
    found = attribute(
        [record.value or {} for record in old],
        [seen.record.value or {} for seen in new],
        fields,
        label=label,
        features=None if value is not None else (old_features, new_features),
        topic_features=value is None and not isinstance(featuriser, HashedNgrams),
        ignore=ignore,
        seed=seed,
    )
    show = _Shown(fields, label, old, [seen.record for seen in new])
    return Comparison(
        reference=_name(reference, "reference"),
        current=_name(current, "current"),
        features=f"the number {value}" if value is not None else _described(featuriser),
        block_size=block_size,
        n_reference=n_reference,
        n_current=n_current,
        set_aside_reference=aside_reference,
        set_aside_current=sorter.set_aside(),
        scans=[one.scan() for one in watches],
        attribution=found,
        examples_before=[show.before(i) for i in found.examples_before],
        examples_after=[show.after(i) for i in found.examples_after],
        topic_examples=[
            (
                None if topic.example_before is None else show.before(topic.example_before),
                None if topic.example_after is None else show.after(topic.example_after),
            )
            for topic in found.topics
        ],
        projection=([], []) if value is not None else _projected(old_features, new_features),
    )


class _Seen(NamedTuple):
    """A usable record of ``current``, with its position and its features."""

    place: int
    record: Incoming
    features: Tensor


class _Sample:
    """A uniform random sample of fixed maximum size from everything that is added (reservoir sampling)."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._generator = size, random.Random(seed)
        self._kept: list[_Seen] = []
        self._n = 0

    def add(self, seen: _Seen) -> None:
        self._n += 1
        if len(self._kept) < self._size:
            self._kept.append(seen)
        elif (place := self._generator.randrange(self._n)) < self._size:
            self._kept[place] = seen

    def in_order(self) -> list[_Seen]:
        return sorted(self._kept, key=lambda seen: seen.place)


class _Shown:
    """Returns records of both sides as examples."""

    def __init__(
        self, text_fields: Sequence[str], label: str | None, before: Sequence[Incoming], after: Sequence[Incoming]
    ) -> None:
        self._text_fields, self._label, self._before, self._after = text_fields, label, before, after

    def before(self, place: int) -> Example:
        return self._example(self._before[place])

    def after(self, place: int) -> Example:
        return self._example(self._after[place])

    def _example(self, record: Incoming) -> Example:
        text = text_of(record.value or {}, self._text_fields)
        cut = text if len(text) <= _SHOWN_TEXT else text[:_SHOWN_TEXT].rstrip() + " …"
        return Example(record.origin, cut, label_of(record, self._label) if self._label else None)


_FeaturesOf = Callable[[Sequence[Mapping[str, Any]]], Tensor]


def _text_features(featuriser: Featuriser, text_fields: Sequence[str]) -> _FeaturesOf:
    def features_of(records: Sequence[Mapping[str, Any]]) -> Tensor:
        features = featuriser([text_of(record, text_fields) for record in records])
        return torch.as_tensor(features).detach().float().cpu()

    return features_of


def _numbers_of(field: str) -> _FeaturesOf:
    return lambda records: torch.tensor([[number_of(record.get(field))] for record in records], dtype=torch.float32)


def _reference(
    records: Records, use: Usable, size: int, block_size: int, seed: int, told: Callable[[str, int], None]
) -> tuple[list[Incoming], int, SetAside]:
    """The records to arm the detector with, in order; the number of usable records; and those that were set aside."""
    sorter = Sorter(records, use)
    sample, last = _Sample(size, seed), deque[Incoming](maxlen=size)
    n = 0
    for n, record in enumerate(sorter, 1):
        if block_size > 1:
            last.append(record)
        else:
            sample.add(_Seen(n, record, torch.empty(0)))
        told("reference", n)
    if not n:
        raise ValueError(f"{_name(records, 'reference')} has no usable record{sorter.why()}")
    kept = list(last) if block_size > 1 else [seen.record for seen in sample.in_order()]
    # The detector needs a whole number of blocks: the oldest records are dropped.
    return kept[len(kept) % block_size :], n, sorter.set_aside()


def _featurised(
    records: Iterable[Incoming], features_of: _FeaturesOf, told: Callable[[int], None]
) -> Iterator[tuple[Incoming, Tensor]]:
    n = 0
    for part in _batches(records):
        n += len(part)
        yield from zip(part, features_of([one.value or {} for one in part]), strict=True)
        told(n)


def _batches(records: Iterable[Incoming]) -> Iterator[list[Incoming]]:
    source = iter(records)
    return iter(lambda: list(islice(source, _BATCH)), [])


def _name(records: Records, otherwise: str) -> str:
    return str(records) if isinstance(records, str | Path) else otherwise


def _described(featuriser: Featuriser) -> str:
    if isinstance(featuriser, HashedNgrams):
        return f"hashed words, or characters, and their pairs ({featuriser.n_features} features)"
    name = getattr(getattr(getattr(featuriser, "model", None), "config", None), "_name_or_path", "")
    kind = getattr(featuriser, "__name__", type(featuriser).__name__)
    return f"{kind} {name}".strip()


def _projected(before: Tensor, after: Tensor) -> tuple[list[list[float]], list[list[float]]]:
    """The projection on the first two principal components of both sides together, with equal weight."""
    centre = (before.mean(0) + after.mean(0)) / 2
    sides = [(side - centre).double() for side in (before, after)]
    covariance = sum(side.T @ side / len(side) for side in sides)
    axes = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :2]
    axes = torch.where(axes.sum(0) < 0, -axes, axes)  # the sign of an eigenvector is arbitrary: make it reproducible
    shown = [side[torch.linspace(0, len(side) - 1, min(len(side), _SHOWN_POINTS)).long()] for side in sides]
    of_before, of_after = [(side @ axes).tolist() for side in shown]
    return of_before, of_after
