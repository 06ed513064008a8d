"""Which column of some records is the text, the label, the id, the time: found by their values, then by their names."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from evertune.sources.structure import Structure, find_structure
from evertune.sources.values import label_value


def _words(hints: str) -> list[str]:
    return hints.split()


_TEXT = _words(
    "text texts content body message sentence review headline utterance query "
    "texto mensaje texte inhalt nachricht текст 文本 内容 正文 テキスト 本文 텍스트 문장 نص"
)
_LABEL = _words(
    "label labels class category intent topic target sentiment tag "
    "etiqueta clase categoría categoria tema sentimiento classe catégorie étiquette klasse kategorie thema "
    "метка класс категория 标签 类别 分类 ラベル カテゴリ 레이블 분류 تصنيف"
)
_NUMBER = _words("score rating stars grade price value y label target")
_ID = _words("id uid uuid guid key identifier")
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test"}
_CODE = re.compile(r"[!-~]*\d[!-~]*")
"""An id, as it usually looks: printable ASCII without spaces, with a digit."""


@dataclass
class Roles:
    """What the columns of some records are for.

    Args:
        text: Column with the text, or columns where a record has two.
        label: Column with the label, or None.
        id: Column that identifies a record, or None.
        time: Column with the time, or None.
        split: Column with the name of the split, or None.
        multi_label: Whether a label is a list of names.
        classes: Number of records of each class.
        numbers: The labels, if they are numbers and not classes.
        structure: What a record holds, if that is more than a text and a class or a number.
        others: The remaining columns.
    """

    text: str | list[str]
    label: str | None = None
    id: str | None = None
    time: str | None = None
    split: str | None = None
    multi_label: bool = False
    classes: Counter[str] = field(default_factory=Counter)
    numbers: list[float] = field(default_factory=list)
    structure: Structure | None = None
    others: list[str] = field(default_factory=list)


def find_roles(rows: Sequence[Mapping[str, Any]], text: str | None = None, label: str | None = None) -> Roles:
    """Guess what each column is for.

    Args:
        rows: Some records, in the order in which they came.
        text: Column with the text, if it is known.
        label: Column with the label, if it is known.

    Raises:
        ValueError: If a column that is named is missing, or none looks like a text.

    Example:
        >>> rows = [{"nr": f"a{i}", "texto": f"me cobraron {i} veces", "etiqueta": "ab"[i % 2]} for i in range(8)]
        >>> roles = find_roles(rows)
        >>> roles.text, roles.label, roles.id
        ('texto', 'etiqueta', 'nr')
    """
    every = {name: [other.get(name) for other in rows] for row in rows for name in row}
    columns = {name: [value for value in values if value is not None] for name, values in every.items()}
    for role, name in (("text", text), ("label", label)):
        if name is not None and name not in columns:
            raise ValueError(f"there is no column {name!r} for the {role}; there are {sorted(columns)}")
    left = {name: values for name, values in columns.items() if values and name not in (text, label)}

    def take(names: list[str], hints: Sequence[str] = ()) -> str | None:
        """The best of some columns: one whose name says so, else the first."""
        hinted = (name for hint in hints for name in names if name.lower() == hint)
        chosen = next(hinted, names[0] if names else None)
        left.pop(chosen or "", None)
        return chosen

    split = take([name for name, values in left.items() if _is_split(values)])
    time = take([name for name, values in left.items() if _share(values, _is_time) >= 0.95])

    def take_id() -> str | None:
        return take([name for name, values in left.items() if _is_id(values, len(rows))], _ID)

    structure = find_structure(every)
    if structure is not None and {text, label} - {None} <= structure.fields.keys():
        for name in structure.fields:
            left.pop(name, None)
        return Roles(structure.text, structure.label, take_id(), time, split, structure=structure, others=list(left))
    if text is None:
        texts = [name for name, values in left.items() if _is_text(values)]
        text = take(sorted(texts, key=lambda name: -_length(left[name])), _TEXT)
        if text is None:
            raise ValueError(f"none of the columns {sorted(columns)} looks like a text; pass --text COLUMN")
    id_ = take_id()
    if label is None:
        labels = [name for name, values in left.items() if _is_label(values)]
        numbered = [name for name in labels if isinstance(left[name][0], int)]
        label = take([name for name in labels if name not in numbered] + numbered, _LABEL)
    if label is None:
        label = take([name for name, values in left.items() if name.lower() in _NUMBER and _numbers(values)])
    roles = Roles(text, label, id_, time, split, others=list(left))
    if label is not None:
        roles.numbers = _numbers(columns[label])
    if label is not None and not roles.numbers:
        names = [label_value(value) for value in columns[label] if _names_a_class(value)]
        roles.multi_label = any(isinstance(one, list) for one in names)
        roles.classes = Counter(name for one in names for name in (one if isinstance(one, list) else [one]))
    return roles


def _is_split(values: Sequence[Any]) -> bool:
    found = {value.lower() for value in values if isinstance(value, str)}
    return len(found) > 1 and found <= _SPLITS and all(isinstance(value, str) for value in values)


def _is_time(value: Any) -> bool:
    if isinstance(value, datetime):
        return True
    if not isinstance(value, str) or "-" not in value:
        return False
    try:
        datetime.fromisoformat(value)
    except ValueError:
        return False
    return True


def _is_text(values: Sequence[Any]) -> bool:
    """Strings that are mostly different, and not codes."""
    words = [value for value in values if isinstance(value, str)]
    if len(words) < len(values) or len(set(words)) * 2 < len(words):
        return False
    return _share(words, lambda word: _CODE.fullmatch(word) is None) > 0.5


def _is_id(values: Sequence[Any], n_rows: int) -> bool:
    if len(values) < n_rows or not all(isinstance(value, str | int) and value is not True for value in values):
        return False
    return len(set(values)) == n_rows > 1 and all(len(str(value)) <= 64 for value in values)


def _is_label(values: Sequence[Any]) -> bool:
    """Names of which each comes twice on average, or lists of such names."""
    if not all(map(_names_a_class, values)):
        return False
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return 1 < len(set(map(str, names))) <= max(2, len(names) / 2)


def _numbers(values: Sequence[Any]) -> list[float]:
    """The values as numbers, also those of a CSV file; none if one is not, or if all are whole, as classes may be."""
    try:
        found = [float(value) for value in values]
    except (TypeError, ValueError):
        return []
    return found if all(map(math.isfinite, found)) and not all(one.is_integer() for one in found) else []


def _names_a_class(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(one, str) for one in value)
    return isinstance(value, str | int)


def _share(values: Sequence[Any], is_one: Any) -> float:
    return sum(map(bool, map(is_one, values))) / max(1, len(values))


def _length(values: Sequence[str]) -> float:
    return sum(map(len, values)) / max(1, len(values))
