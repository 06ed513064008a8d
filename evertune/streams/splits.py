"""Ways to split a source into a stream: by class, by domain, by time, or into random parts.

The names are those of van de Ven and Tolias (2019), "Three scenarios for continual learning".
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from datetime import date as Date
from functools import partial
from itertools import pairwise
from numbers import Number
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import numpy as np

from evertune.sources.values import absent
from evertune.streams.experience import Experience, ExperienceStream, class_names
from evertune.streams.tables import BadRow, Normaliser, name_value, read_rows
from evertune.tasks.base import Task
from evertune.utils.durations import duration

Period = Literal["year", "quarter", "month", "week", "day", "YE", "Y", "QE", "Q", "ME", "M", "W", "D"]


class SourceOptions(TypedDict, total=False):
    """Options for reading a source and splitting it into training, validation and test data, for every kind of stream.

    Args:
        label: Column with the labels: a name, or for multi-label data a list of names. Whole numbers become names;
            those of a Hugging Face ``ClassLabel`` become the names they stand for. None if the data have no labels.
            Default: "label".
        text: Column with the text, or a pair of columns. None if the data are not text. Default: "text".
        splits: Shares of train, validation and test, stratified by label, if the source has no splits of its own.
            Default: (0.6, 0.2, 0.2).
        split_column: Column with "train", "val" (or "valid", "validation", "dev") or "test", if there is one. Not
            needed for a ``DatasetDict`` or a dict of paths by split.
        seed: Seed of the split and of the order of the classes. Default: 0.
        on_bad_row: What to do with a row that cannot be used (undecodable, no text, no label, ...). "raise" (default)
            reports it; "skip" leaves it out, counts it in a warning and in ``stream.bad_rows``, and stores rows of a
            file in ``<path>.bad.jsonl`` with row number and reason.
        on_unseen_label: What to do with a validation or test example whose label no training example had so far:
            "raise" (default) or "drop".
        bad_rows_file: Another path for the side file of skipped rows.
        task: Task that defines which labels are valid and which classes they name (:class:`~evertune.tasks.Task`). By
            default a label is one class or several. A label that names no class, as in a regression, is not used for
            stratification and always counts as seen.
    """

    label: str | None
    text: str | tuple[str, str] | None
    splits: tuple[float, float, float]
    split_column: str | None
    seed: int
    on_bad_row: Literal["raise", "skip"]
    on_unseen_label: Literal["raise", "drop"]
    bad_rows_file: str | Path | None
    task: Task | None


def class_incremental(
    source: Any,
    *,
    n_experiences: int | None = None,
    classes_per_experience: Sequence[int] | None = None,
    class_order: Sequence[str] | None = None,
    **options: Unpack[SourceOptions],
) -> ExperienceStream:
    """Each experience brings classes that no other has.

    Args:
        source: A dataset, a DataFrame, paths, a folder or a hub name; see :mod:`evertune.streams.tables`.
        n_experiences: Number of experiences. If it does not divide the number of classes, the first ones get one more.
        classes_per_experience: Number of classes of each experience, instead of ``n_experiences``, e.g. ``[2, 2, 1]``.
        class_order: Order in which classes arrive. By default shuffled with ``seed``, since results depend on it.
        **options: See :class:`SourceOptions`.

    Raises:
        ValueError: If the numbers do not match the classes found, or the source cannot be read (see ``SourceOptions``).

    Example:
        >>> from evertune.streams import class_incremental
        >>> rows = [{"text": f"a {label} {i}", "label": label} for label in "cat dog cow".split() for i in range(10)]
        >>> stream = class_incremental(rows, n_experiences=2, class_order=["cow", "cat", "dog"])
        >>> stream
        ExperienceStream(['cow+cat', 'dog'])
        >>> stream[0]
        Experience(cow+cat: 12 train, 4 val, 4 test, 2 classes)
    """
    data = _Data.read(source, {}, options, label_of=name_value)
    if data.labels is None:
        raise ValueError("class_incremental needs the column of the labels, got label=None")
    found = class_names(data.labels[i] for i in range(len(data)) if data.split is None or data.split[i] == "train")
    order = _class_order(found, class_order, data.seed)
    counts = _class_counts(len(order), n_experiences, classes_per_experience)
    bounds = np.cumsum([0, *counts])
    groups = [order[start:stop] for start, stop in pairwise(bounds)]
    home = {name: index for index, group in enumerate(groups) for name in group}
    assigned = [home.get(name, -1) for name in data.labels]
    names = [
        "+".join(group) if len(group) <= 3 else f"classes {start + 1}-{start + len(group)}"
        for group, start in zip(groups, bounds, strict=False)
    ]
    facts = [{"name": name, "classes": group} for name, group in zip(_distinct(names), groups, strict=True)]
    return data.stream(assigned, facts)


def _distinct(names: Iterable[str]) -> list[str]:
    """The names, with a number behind each that occurred before: a class may be called what others are joined to.

    Example:
        >>> _distinct(["a+b", "c", "a+b"])
        ['a+b', 'c', 'a+b (2)']
    """
    distinct: list[str] = []
    for name in names:
        candidate, number = name, 1
        while candidate in distinct:
            number += 1
            candidate = f"{name} ({number})"
        distinct.append(candidate)
    return distinct


def domain_incremental(
    source: Any,
    *,
    domain: str = "domain",
    domain_order: Sequence[str] | None = None,
    **options: Unpack[SourceOptions],
) -> ExperienceStream:
    """Each experience comes from another domain: the same task with different inputs.

    Args:
        source: A dataset, a DataFrame, paths, a folder or a hub name; see :mod:`evertune.streams.tables`.
        domain: Column with the name of the domain. Default: "domain".
        domain_order: Order in which domains arrive. By default the order of their first rows.
        **options: See :class:`SourceOptions`.

    Raises:
        ValueError: If ``domain_order`` does not name exactly the domains found, or the source cannot be read.

    Example:
        >>> from evertune.streams import domain_incremental
        >>> rows = [{"text": f"{i}", "label": "ab"[i % 2], "shop": shop} for shop in ("X", "Y") for i in range(10)]
        >>> [(e.name, e.domain, e.classes) for e in domain_incremental(rows, domain="shop")]
        [('X', 'X', ['a', 'b']), ('Y', 'Y', ['a', 'b'])]
    """
    data = _Data.read(source, {domain: name_value}, options)
    order = _ordered(class_names(data.values[domain]), domain_order, "domain")
    home = {name: index for index, name in enumerate(order)}
    return data.stream([home[name] for name in data.values[domain]], [{"name": name, "domain": name} for name in order])


def time_incremental(
    source: Any,
    *,
    date: str = "date",
    period: Period = "year",
    max_time_jump: str | float | timedelta = "1d",
    **options: Unpack[SourceOptions],
) -> ExperienceStream:
    """Each experience holds the data of one period of time, in chronological order; periods without data are left out.

    Args:
        source: A dataset, a DataFrame, paths, a folder or a hub name; see :mod:`evertune.streams.tables`.
        date: Column with the date: ISO 8601 text ("2024-05-17", "2024-05-17T08:00:00+02:00"), or dates; never numbers,
            which may be seconds or 20240517. Default: "date".
        period: "year" (default), "quarter", "month", "week" (ISO, from Monday) or "day"; also pandas' "YE", "QE", "ME",
            "W", "D".
        max_time_jump: How far a date may be in the future: a duration such as "12h" or "30d", or seconds. A row beyond
            it is bad. Default: a day, since what is dated later is a mistake, or stands for "no date" (9999-12-31).
        **options: See :class:`SourceOptions`.

    Raises:
        ValueError: If the period is unknown, ``max_time_jump`` is not valid, or the source cannot be read.

    Example:
        >>> from evertune.streams import time_incremental
        >>> rows = [{"text": f"news {i}", "label": "x", "date": f"2024-{i:02}-01"} for i in range(1, 13)]
        >>> stream = time_incremental(rows, period="quarter")
        >>> stream[1].name, stream[1].time_range
        ('2024-Q2', ('2024-04-01', '2024-06-30'))
    """
    unit = _PERIOD_ALIASES.get(period, period)
    if unit not in _PERIODS:
        raise ValueError(f"period must be one of {[*_PERIODS, *_PERIOD_ALIASES]}, got {period!r}")
    latest = datetime.now(UTC) + min(duration("max_time_jump", max_time_jump), timedelta(days=365 * 7_000))
    data = _Data.read(source, {date: partial(_date_value, latest=latest)}, options)
    starts = [_PERIODS[unit][0](datetime.fromisoformat(value).date()) for value in data.values[date]]
    order = sorted(set(starts))
    home = {start: index for index, start in enumerate(order)}
    about = [{"name": _PERIODS[unit][2](start), "time_range": _time_range(unit, start)} for start in order]
    return data.stream([home[start] for start in starts], about)


def data_incremental(source: Any, *, n_experiences: int, **options: Unpack[SourceOptions]) -> ExperienceStream:
    """The same task and the same inputs in parts, as when data keep arriving.

    The parts are drawn at random and stratified by label. If the number of parts does not divide a label's examples,
    the first parts get one more.

    Args:
        source: A dataset, a DataFrame, paths, a folder or a hub name; see :mod:`evertune.streams.tables`.
        n_experiences: Number of parts.
        **options: See :class:`SourceOptions`.

    Raises:
        ValueError: If there are fewer examples than parts, or the source cannot be read.

    Example:
        >>> from evertune.streams import data_incremental
        >>> rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(40)]
        >>> data_incremental(rows, n_experiences=2)[0]
        Experience(part 1: 12 train, 4 val, 4 test, 2 classes)
    """
    if n_experiences < 1:
        raise ValueError(f"n_experiences must be positive, got {n_experiences}")
    data = _Data.read(source, {}, options)
    split = data.split or _stratified_split(data.strata(), data.shares, data.seed)
    data.split = split
    assigned = np.empty(len(data), dtype=int)
    for rows in _shuffled_groups(list(zip(split, data.strata(), strict=True)), data.seed + 1):
        assigned[rows] = np.arange(len(rows)) % n_experiences
    return data.stream(assigned.tolist(), [{"name": f"part {part + 1}"} for part in range(n_experiences)])


class _Data:
    """The rows of a source with the options that they were read with."""

    def __init__(
        self,
        dataset: Any,
        values: dict[str, list[Any]],
        split: list[str] | None,
        bad_rows: list[BadRow],
        options: SourceOptions,
    ) -> None:
        self.dataset = dataset
        self.values = values
        self.split = split
        self.bad_rows = bad_rows
        self.label = options.get("label", "label")
        self.text = options.get("text", "text")
        self.seed = options.get("seed", 0)
        self.shares = options.get("splits", (0.6, 0.2, 0.2))
        self.drop_unseen = options.get("on_unseen_label", "raise") == "drop"
        self.task = options.get("task") or Task()
        self.labels: list[Any] | None = values[self.label] if self.label is not None else None

    @classmethod
    def read(
        cls,
        source: Any,
        columns: dict[str, Normaliser],
        options: SourceOptions,
        label_of: Normaliser | None = None,
    ) -> _Data:
        """Check the options, read the source and check its rows; by default the task checks the labels."""
        unknown = set(options) - set(SourceOptions.__annotations__)
        if unknown:
            raise TypeError(f"unknown option {sorted(unknown)[0]!r}; there are {sorted(SourceOptions.__annotations__)}")
        shares = options.get("splits", (0.6, 0.2, 0.2))
        if len(shares) != 3 or min(shares) < 0 or shares[0] <= 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(
                f"splits must be three shares (train, val, test) that add up to 1, train not 0, got {shares}"
            )
        unseen = options.get("on_unseen_label", "raise")
        if unseen not in ("raise", "drop"):
            raise ValueError(f'on_unseen_label must be "raise" or "drop", got {unseen!r}')
        label, text = options.get("label", "label"), options.get("text", "text")
        task, columns = options.get("task") or Task(), dict(columns)
        texts = () if text is None else (text,) if isinstance(text, str) else tuple(text)
        columns |= {**dict.fromkeys(texts, task.check_text), **task.fields}
        if label is not None:
            columns[label] = label_of or task.check_label

        def fits(row: Mapping[str, Any]) -> None:
            if label is not None and texts:
                task.check_record([row[column] for column in texts], row[label])
            if task.fields:
                found = {name: row[name] for name in task.fields}
                task.check_fields([row[column] for column in texts], row[label] if label else None, found)

        rows = read_rows(
            source,
            columns,
            split_column=options.get("split_column"),
            on_bad_row=options.get("on_bad_row", "raise"),
            bad_rows_file=options.get("bad_rows_file"),
            fits=fits,
        )
        return cls(rows.dataset, rows.values, rows.split, rows.bad_rows, options)

    def __len__(self) -> int:
        return len(self.dataset)

    def strata(self) -> list[Hashable]:
        """The stratum of each row: the classes that its label names."""
        if self.labels is None:
            return [()] * len(self)
        return [tuple(sorted(self.task.label_names(label))) for label in self.labels]

    def stream(self, assigned: Sequence[int], about: Sequence[dict[str, Any]]) -> ExperienceStream:
        """A stream in which experience ``i`` has the rows assigned to ``i``; -1 marks labels never trained on."""
        split = self.split or _stratified_split(list(zip(assigned, self.strata(), strict=True)), self.shares, self.seed)
        rows: list[dict[str, list[int]]] = [{"train": [], "val": [], "test": []} for _ in about]
        for row, (experience, part) in enumerate(zip(assigned, split, strict=True)):
            if experience >= 0:
                rows[experience][part].append(row)
            elif not self.drop_unseen:
                assert self.labels is not None
                raise ValueError(
                    f"label {self.labels[row]!r} is in {part}, but in no train, so nothing can learn it; add training "
                    'examples of it, or leave its examples out (on_unseen_label="drop")'
                )
        if self.drop_unseen:
            self._drop_unseen(rows)
        experiences = []
        for parts, facts in zip(rows, about, strict=True):
            classes = self._classes(parts["train"])
            data = {part: self.dataset.select(indices) for part, indices in parts.items() if indices or part == "train"}
            experiences.append(Experience(**{"classes": classes, **facts, **data}))
        return ExperienceStream(experiences, label=self.label, text=self.text, bad_rows=self.bad_rows, task=self.task)

    def _classes(self, rows: Iterable[int]) -> list[str]:
        """The classes that the labels of these rows name, in order of appearance."""
        return class_names(self.task.label_names(self.labels[row]) for row in rows) if self.labels is not None else []

    def _drop_unseen(self, rows: list[dict[str, list[int]]]) -> None:
        seen: set[str] = set()
        for parts in rows:
            seen.update(self._classes(parts["train"]))
            for part in ("val", "test"):
                parts[part] = [row for row in parts[part] if seen.issuperset(self._classes([row]))]


def _shuffled_groups(keys: Sequence[Hashable], seed: int) -> Iterable[np.ndarray]:
    """The positions of each distinct key, shuffled, in order of appearance of the keys."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for position, key in enumerate(keys):
        groups[key].append(position)
    generator = np.random.default_rng(seed)
    for group in groups.values():
        yield generator.permutation(group)


def _stratified_split(keys: Sequence[Hashable], shares: Sequence[float], seed: int) -> list[str]:
    """ "train", "val" or "test" for each row: the shares hold for each key, and for all rows together.

    Rounding errors of one key are compensated by the next ones, and the first example of a key is always for training.
    """
    split = ["train"] * len(keys)
    owed = {"val": 1e-9, "test": 0.5}  # offset by a half, so that a small key does not give to both
    for rows in _shuffled_groups(keys, seed):
        left = list(rows[1:])
        for part, share in (("test", shares[2]), ("val", shares[1])):
            owed[part] += share * len(rows)
            take = min(int(owed[part]), math.ceil(share * len(rows)), len(left))
            owed[part] -= take
            for row in left[:take]:
                split[row] = part
            left = left[take:]
    return split


def _ordered(found: list[str], order: Sequence[str] | None, kind: str) -> list[str]:
    """The given order, if it contains each name found exactly once."""
    if order is None:
        return found
    missing, extra = set(found) - set(order), set(order) - set(found)
    if missing or extra or len(order) != len(found):
        problem = f"misses {sorted(missing)}" if missing else f"names {sorted(extra)}, which is not in the data"
        raise ValueError(
            f"{kind}_order must name each {kind} once; it {problem if missing or extra else 'repeats one'}"
        )
    return list(order)


def _class_order(found: list[str], order: Sequence[str] | None, seed: int) -> list[str]:
    if order is not None:
        return _ordered(found, order, "class")
    return [str(name) for name in np.random.default_rng(seed).permutation(sorted(found))]


def _class_counts(n_classes: int, n_experiences: int | None, given: Sequence[int] | None) -> list[int]:
    if given is not None:
        if n_experiences not in (None, len(given)):
            raise ValueError(f"classes_per_experience has {len(given)} numbers, but n_experiences is {n_experiences}")
        if sum(given) != n_classes or min(given) < 1:
            raise ValueError(
                f"classes_per_experience must be positive and add up to the {n_classes} classes found, "
                f"got {list(given)}"
            )
        return list(given)
    if n_experiences is None:
        raise ValueError("say into how many experiences the classes go: n_experiences or classes_per_experience")
    if not 1 <= n_experiences <= n_classes:
        raise ValueError(f"n_experiences must be from 1 to the {n_classes} classes found, got {n_experiences}")
    whole, more = divmod(n_classes, n_experiences)
    return [whole + (index < more) for index in range(n_experiences)]


def _date_value(value: Any, latest: datetime) -> str:
    """An ISO date or time as text; not later than ``latest``."""
    if absent(value):
        raise ValueError("no date")
    if isinstance(value, Number):
        raise ValueError(f"{value!r} is a number, not a date; write dates as text like 2024-05-17")
    text = value.isoformat() if isinstance(value, Date) else str(value).strip()
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{value!r} is not an ISO date (such as 2024-05-17)") from None
    if (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) > latest:
        raise ValueError(f"the date {text} is in the future, beyond {latest:%Y-%m-%d} (max_time_jump)")
    return text


def _quarter(day: Date) -> int:
    return (day.month - 1) // 3 + 1


_PERIODS: dict[str, tuple[Callable[[Date], Date], int, Callable[[Date], str]]] = {
    # first day of a day's period; number of days that leads from there into the next period; name of the period
    "year": (lambda day: day.replace(month=1, day=1), 370, lambda start: f"{start:%Y}"),
    "quarter": (
        lambda day: day.replace(month=3 * _quarter(day) - 2, day=1),
        95,
        lambda start: f"{start:%Y}-Q{_quarter(start)}",
    ),
    "month": (lambda day: day.replace(day=1), 35, lambda start: f"{start:%Y-%m}"),
    "week": (lambda day: day - timedelta(days=day.weekday()), 7, lambda start: f"{start:%G-W%V}"),
    "day": (lambda day: day, 1, lambda start: start.isoformat()),
}


_PERIOD_ALIASES = {
    **dict.fromkeys(("YE", "Y"), "year"),
    **dict.fromkeys(("QE", "Q"), "quarter"),
    **dict.fromkeys(("ME", "M"), "month"),
    "W": "week",
    "D": "day",
}


def _time_range(unit: str, start: Date) -> tuple[str, str]:
    first_day, reach, _ = _PERIODS[unit]
    last = first_day(start + timedelta(days=reach)) - timedelta(days=1)
    return start.isoformat(), last.isoformat()
