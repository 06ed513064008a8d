"""What a record must look like: checked once, when it arrives, with messages that name the fields."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import math
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, date, datetime, tzinfo
from typing import Annotated, Any, Literal, Protocol
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails, to_jsonable_python

from evertune.sources.values import label_value, text_value
from evertune.utils.plugins import class_at

Record = dict[str, Any]
"""The fields of a record by name: JSON values only."""

_SURROGATE = "it has a lone surrogate, which no encoding can write"


def _writable(text: str) -> str:
    if not _is_utf8(text):
        raise ValueError(_SURROGATE)
    return text


_Text = Annotated[str, AfterValidator(_writable)]
_Int = Annotated[int, Field(ge=-(2**63), lt=2**63)]

FIELD_TYPES: dict[str, Any] = {
    "str": _Text,
    "int": _Int,
    "float": float,
    "bool": bool,
    "date": date,
    "datetime": datetime,
    "list[str]": list[_Text],
    "list[int]": list[_Int],
    "list[float]": list[float],
}
"""The types that a field may be declared as; each also with ``| None``, for a field that may be absent."""

# The types that the text, label, id and time may be declared as; :class:`RecordSchema` checks these, not pydantic.
_ROLE_TYPES = {
    "text": ("str", "list[str]", "list[dict]"),
    "label": ("str", "int", "float", "bool", "dict", "list[str]", "list[int]", "list[float]", "list[dict]"),
    "id": ("str", "int"),
    "time": ("datetime", "str", "float", "int"),
}
_TEXTS_AS_LISTS: dict[str, list[Any]] = {
    "list[str]": ["word"],
    "list[dict]": [{"role": role, "content": "word"} for role in ("user", "assistant")],
}
"""A text of each type that only some tasks learn: words, and the messages of a conversation."""
_YEARS = range(1900, 2100)
_MILLISECONDS = 1e11  # numbers from here on are milliseconds: as seconds, this would be the year 5138
_EXPECTED = {
    "string": "a text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "date": "a date",
    "datetime": "a date and time",
    "list": "a list",
    "dict": "an object",
    "model": "an object",
}
_GOT: dict[type, str] = {
    type(None): "null",
    str: "a text",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}
_MAX_REASONS = 3
_MAX_DEPTH = 100
_MOST_LABEL = 1_000  # characters: each name is kept with every later version
_shortener = reprlib.Repr()
_shortener.maxstring = _shortener.maxother = 80
_NOT_JSON = "the record holds a value that JSON cannot say"


class Checks(Protocol):
    """The checks that depend on the task: those of :class:`evertune.tasks.Task`, where they are described."""

    def check_text(self, value: Any) -> str: ...

    def check_label(self, value: Any) -> Any: ...

    def check_record(self, texts: Sequence[str], label: Any) -> None: ...

    @property
    def fields(self) -> Mapping[str, Callable[[Any], Any]]: ...

    def check_fields(self, texts: Sequence[str], label: Any, fields: Mapping[str, Any]) -> None: ...

    def label_names(self, value: Any) -> list[str]: ...


class _AnyTask:
    """Checks for as long as no task is known: a text, and the name of a class or a list of them."""

    def check_text(self, value: Any) -> str:
        return text_value(value)

    def check_label(self, value: Any) -> Any:
        return label_value(value)

    def check_record(self, texts: Sequence[str], label: Any) -> None:
        pass

    fields: Mapping[str, Callable[[Any], Any]] = {}

    def check_fields(self, texts: Sequence[str], label: Any, fields: Mapping[str, Any]) -> None:
        pass

    def label_names(self, value: Any) -> list[str]:
        return [value] if isinstance(value, str) else list(value)


class RecordSchema:
    """What a record must look like.

    A pydantic model checks the type of every field: your own model, or one made from ``fields``. In addition, the text
    must be neither empty nor too long, the label must be a name or a list of names (whole numbers become names: ``3``
    is ``"3"``), a time must have a time zone, and no number may be NaN or infinite. Numbers and dates may arrive as
    text, as in CSV files; a number is never accepted as a text. Fields that are not declared are dropped; your own
    model decides that itself (pydantic's ``extra``).

    Args:
        model: A pydantic model, or its import path (``"my_package.records.Ticket"``).
        fields: Instead of a model, the type of each field by name, one of :data:`FIELD_TYPES`. By default only the
            fields named below are declared.
        text: Name of the field with the text, or of the two fields of a pair of texts.
        label: Name of the field with the label; None for records without labels.
        id: Name of the field that identifies a record, a text or a whole number. If None, a record is identified by its
            origin.
        time: Name of the field with the time of a record: ISO 8601 with a time zone, or seconds or milliseconds since
            1970. It is kept as ISO 8601 in UTC.
        time_zone: Time zone of times without one: a name (``"Europe/Berlin"``) or an offset (``"+02:00"``). An hour
            that the clock repeats is its first pass. Default: None, which refuses such times.
        max_text_length: Maximum length of a text in characters. The default of 100,000 is far more than a transformer
            reads, and keeps a runaway file out of memory.
        closed_classes: The only labels that are allowed; None allows any.

    Raises:
        ValueError: If the model cannot be imported, a type is unknown, or a field that is named here is not declared.

    Example:
        >>> schema = RecordSchema(fields={"text": "str", "label": "str", "score": "float | None"})
        >>> schema.check({"text": "The card was charged twice", "label": 3, "agent": "Ann"})
        {'text': 'The card was charged twice', 'label': '3', 'score': None}
        >>> schema.check({"text": 7, "label": "billing"})
        Traceback (most recent call last):
        ...
        ValueError: field 'text' must be a text, not a number
    """

    def __init__(
        self,
        model: type[BaseModel] | str | None = None,
        fields: dict[str, str] | None = None,
        text: str | list[str] = "text",
        label: str | None = "label",
        id: str | None = None,
        time: str | None = None,
        max_text_length: int = 100_000,
        closed_classes: list[str] | None = None,
        time_zone: str | None = None,
    ) -> None:
        self.text, self.label, self.id, self.time = text, label, id, time
        self.texts = [text] if isinstance(text, str) else list(text)
        if len(self.texts) not in (1, 2):
            raise ValueError(f"text is one field or a pair of fields, got {text!r}")
        if max_text_length < 1:
            raise ValueError(f"max_text_length must be positive, got {max_text_length}")
        if closed_classes is not None and (isinstance(closed_classes, str) or not closed_classes):
            raise ValueError(f"closed_classes must be a list of labels, got {closed_classes!r}")
        self.time_zone = time_zone
        self.zone = None if time_zone is None else _zone(time_zone)
        self.max_text_length = max_text_length
        self.closed_classes = None if closed_classes is None else list(dict.fromkeys(closed_classes))
        self._classes = frozenset(self.closed_classes or ())

        roles = dict.fromkeys(self.texts, "text") | {label: "label", id: "id", time: "time"}
        named = {name: role for name, role in roles.items() if name is not None}
        if len(named) < len(self.texts) + sum(name is not None for name in (label, id, time)):
            raise ValueError(f"text, label, id and time must be different fields, got {[*self.texts, label, id, time]}")
        if model is not None and fields is not None:
            raise ValueError("give a model or fields, not both")
        self._made = model is None
        self._label_is: type | None = None
        kinds = {name: (fields or {}).get(name, "").partition("|")[0].strip() for name in self.texts}
        self._lists = {name: kind for name, kind in kinds.items() if kind in _TEXTS_AS_LISTS}
        self._task: Checks = _AnyTask()
        if model is not None:
            self.model = _import_model(model)
            self.arrives_as = {name: _aliases(self.model, name) for name in self.model.model_fields}
        else:
            if fields and label in fields:
                kind = fields[label].strip().partition("[")[0].partition("|")[0].strip()
                self._label_is = {"list": list, "float": float, "dict": dict}.get(kind, str)
            self.model = _make_model(
                {name: _ROLE_TYPES[role][0] for name, role in named.items()} if fields is None else fields, named
            )
            self.arrives_as = {name: [name] for name in fields or named}
        for name, role in named.items():
            if name not in self.arrives_as:
                raise ValueError(
                    f"{role}={name!r} is not a field of the records: they have {', '.join(self.arrives_as)}; "
                    f"declare it, or name another field"
                )
        self.known_keys = frozenset(key for keys in self.arrives_as.values() for key in keys)
        self._validator = self.model.__pydantic_validator__
        self._serializer = self.model.__pydantic_serializer__

    def check(self, value: Mapping[str, Any]) -> Record:
        """Check a record, and return it in the form in which it is kept.

        Args:
            value: The fields of the record as they arrived. The mapping is not changed.

        Raises:
            ValueError: If the record does not fit the schema. The message gives the reasons and names the fields.
        """
        return self._kept(self._validated(value))

    def check_again(self, record: Record) -> Record:
        """Check a record that :meth:`check` has returned, perhaps that of another schema.

        Raises:
            ValueError: If it does not fit this schema.
        """
        if self._made:
            return self.check(record)
        return self._kept(self._validated(record, by_name=True))

    @property
    def digest(self) -> str:
        """Hash of what the schema accepts. The code of a model's own validators is not part of it."""
        accepted: dict[str, Any] = {
            name: value
            for name, value in vars(self).items()
            if name in ("texts", "label", "id", "time", "max_text_length", "closed_classes", "time_zone", "arrives_as")
        }
        accepted["fields"] = {name: repr(field) for name, field in self.model.model_fields.items()}
        accepted["label is"] = str(self._label_is)
        return hashlib.sha256(json.dumps(accepted, sort_keys=True).encode()).hexdigest()[:16]

    def _kept(self, checked: Any) -> Record:
        """The form in which a validated record is kept."""
        if not self._made:  # a model made from ``fields`` cannot hold such values
            _refuse_unwritable(self._as_json(checked, "python"))
        record = self._as_json(checked, "json")
        field = ""
        try:
            for field in self.texts:
                record[field] = self._check_text(record[field])
            if self.label is not None:
                field = self.label
                record[field] = self._check_label(record[field])
                self._checked(self._task.check_record, [record[name] for name in self.texts], record[field])
            for field, check in self._task.fields.items():
                record[field] = self._checked(check, record[field])
            if self._task.fields:
                values = {name: record[name] for name in self._task.fields}
                label = None if self.label is None else record[self.label]
                self._checked(self._task.check_fields, [record[name] for name in self.texts], label, values)
            if self.id is not None and record[self.id] is not None:
                field = self.id
                record[field] = id_value(record[field])
            if self.time is not None and record[self.time] is not None:
                field = self.time
                record[field] = time_value(record[field], self.zone)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"field {field!r}: {error}") from None
        return record

    def check_half(self, value: Mapping[str, Any]) -> Record:
        """Check a record without its label, or a label without its text; returns JSON values that can wait for the
        rest.

        The fields that are present are checked as far as possible; :meth:`check` checks the completed record.

        Raises:
            ValueError: If it can never become a good record. The message gives the reasons.
        """
        assert self.label is not None, "only a schema with a label has halves"
        check: Callable[[Any], Any]
        if self.has_text(value):
            self._validated(value, but=self.arrives_as[self.label])
            value = {key: part for key, part in value.items() if key not in self.arrives_as[self.label]}
            names, check = self.texts, self._check_text
        else:
            names, check = [self.label], self._check_label
        for name in names:
            try:
                check(self.get(value, name))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"field {name!r}: {error}") from None
        if self.model.model_config.get("extra") != "allow":
            value = {key: part for key, part in value.items() if key in self.known_keys}
        _refuse_unwritable(value)
        try:
            half: Record = to_jsonable_python(value)
        except (ValueError, RecursionError):
            raise ValueError(_NOT_JSON) from None
        return half

    def has_text(self, value: Mapping[str, Any]) -> bool:
        """Whether any text has arrived, valid or not."""
        return any(self.get(value, name) is not None for name in self.texts)

    def has_label(self, value: Mapping[str, Any]) -> bool:
        """Whether a label has arrived, valid or not; null, NaN and the empty text are not labels."""
        label = None if self.label is None else self.get(value, self.label)
        return not (label is None or label == "" or (isinstance(label, float) and math.isnan(label)))

    def get(self, value: Mapping[str, Any], name: str) -> Any:
        """The value of a field as it arrived, under its name or its alias; None if it is missing."""
        return next((value[key] for key in self.arrives_as[name] if value.get(key) is not None), None)

    def instead(self, value: Mapping[str, Any], missing: Sequence[str] = ()) -> str:
        """The end of a message about missing fields: the fields that did arrive although nothing declares them.

        Args:
            value: The fields of the record.
            missing: Names of the missing fields; by default those of the text and the label.
        """
        arrived = {str(key).casefold(): str(key) for key in value if key not in self.known_keys}
        if not arrived:
            return ""
        names = missing or [*self.texts, self.label or ""]
        close = [match for name in names for match in difflib.get_close_matches(name.casefold(), arrived, n=1)]
        if close:
            return f"; did you mean {' and '.join(_show(arrived[name]) for name in dict.fromkeys(close))}?"
        return f"; the record has {_some([_show(key) for key in arrived.values()])} instead"

    def _validated(self, value: Mapping[str, Any], but: Collection[str] = (), by_name: bool = False) -> Any:
        """The value as an instance of the model. Errors in the fields ``but`` are ignored, and None is returned for
        them."""
        try:
            if by_name:
                return self._validator.validate_python(value, by_alias=False, by_name=True)
            return self._validator.validate_python(value)
        except ValidationError as error:
            details = error.errors(include_url=False, include_context=False)
            details = [detail for detail in details if not detail["loc"] or detail["loc"][0] not in but]
            if details:
                missing = [str(detail["loc"][-1]) for detail in details if detail["type"] == "missing"]
                raise ValueError(_reasons(details) + (self.instead(value, missing) if missing else "")) from None
        except Exception as error:  # from a user's own validator: a fault in it costs one record, not the stream
            raise ValueError(f"the record could not be checked ({type(error).__name__}: {error})") from None
        return None

    def _as_json(self, checked: Any, mode: Literal["json", "python"]) -> Record:
        try:
            record: Record = self._serializer.to_python(checked, mode=mode, by_alias=self._made)
        except (ValueError, RecursionError):
            raise ValueError(_NOT_JSON) from None
        return record

    def label_names(self, label: Any) -> list[str]:
        """The names of the classes in a kept label."""
        return self._task.label_names(label)

    def _check_text(self, value: Any) -> str:
        """Check a text, and return it in the form in which it is kept."""
        text: str = self._checked(self._task.check_text, value)
        if len(text) > self.max_text_length:
            raise ValueError(f"the text has {len(text)} characters, more than {self.max_text_length} (max_text_length)")
        return text

    def for_task(self, task: Checks) -> RecordSchema:
        """A copy of the schema that leaves the checks of texts and labels to a task.

        Args:
            task: A :class:`~evertune.tasks.Task`.

        Raises:
            ValueError: If a text or the label is declared as a type that the task cannot learn, or a field that it
                reads is not declared.
        """
        if missing := [name for name in task.fields if name not in self.arrives_as]:
            raise ValueError(
                f"the records lack {', '.join(missing)}, which {type(task).__name__} reads: they have "
                f"{', '.join(self.arrives_as)}; declare all of them in fields, such as {missing[0]}: list[int]"
            )
        if self._label_is is float:
            try:
                task.check_label(0.5)
            except ValueError as error:
                raise ValueError(
                    f"field {self.label!r} is declared as numbers, which this task cannot learn: {error}"
                ) from None
        for name, kind in self._lists.items():
            try:
                task.check_text(_TEXTS_AS_LISTS[kind])
            except ValueError as error:
                raise ValueError(
                    f"field {name!r} is declared as {kind}, which this task cannot learn: {error}"
                ) from None
        schema = copy.copy(self)
        schema._task = task
        return schema

    def _check_label(self, value: Any) -> Any:
        """Check a label, and return it in the form in which it is kept."""
        label = self._checked(self._task.check_label, value)
        names = self._checked(self._task.label_names, label)
        if names or isinstance(label, list):
            if self._label_is is not None and not isinstance(label, self._label_is):
                raise ValueError("a list of labels is expected" if self._label_is is list else "one label is expected")
            for name in names:
                if not name.strip() or not _is_utf8(name):
                    raise ValueError(f"the label {name!r} is not a name")
                if len(name) > _MOST_LABEL:
                    raise ValueError(f"the label has {len(name)} characters, more than the {_MOST_LABEL} of a name")
                if self._classes and name not in self._classes:
                    raise ValueError(f"{name!r} is none of the closed classes {_some(self.closed_classes or [])}")
        _refuse_unwritable(label, "label")
        return to_jsonable_python(label)

    def _checked(self, check: Callable[..., Any], *values: Any) -> Any:
        """The result of a task's check; a fault in a user's own task costs one record, not the stream."""
        try:
            return check(*values)
        except (ValueError, RecursionError):
            raise
        except Exception as error:
            raise ValueError(f"it could not be checked ({type(error).__name__}: {error})") from None


def id_value(value: Any) -> str:
    """The id of a record: a text that is not empty, or a whole number as text."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip() or not _is_utf8(value):
        raise ValueError(f"{_show(value)} does not identify a record")
    return value


def time_value(value: Any, zone: tzinfo | None = None) -> str:
    """A time as ISO 8601 in UTC.

    Args:
        value: ISO 8601 with a time zone, a datetime with one, or seconds or milliseconds since 1970.
        zone: Time zone of a time without one; None refuses it.

    Raises:
        ValueError: If it is none of these, has no time zone, is not in the years 1900 to 2099, or is a number that
            reads as a date (``20240517``), which as seconds would be in August 1970.

    Example:
        >>> time_value("2024-05-17T12:00:00+02:00"), time_value(1715940000)
        ('2024-05-17T10:00:00+00:00', '2024-05-17T10:00:00+00:00')
    """
    if isinstance(value, str):
        value = _parsed(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if _is_calendar_date(value):
            raise ValueError(
                f"{value:.0f} may be a date or seconds since 1970; write it like 2024-05-17T10:00:00+00:00"
            )
        try:
            seconds = value / 1000 if abs(value) >= _MILLISECONDS else value
            value = datetime.fromtimestamp(seconds, UTC)
        except (ValueError, OverflowError, OSError):
            raise ValueError(f"{_show(value)} is not a time since 1970") from None
    if not isinstance(value, datetime):
        raise ValueError(f"{_show(value)} is not a time")
    if value.tzinfo is None and zone is None:
        raise ValueError(
            f"the time {value.isoformat()} has no time zone; write {value.isoformat()}+00:00 for UTC, or set "
            "time_zone in the schema"
        )
    if value.tzinfo is None:
        value = value.replace(tzinfo=zone)
    if value.year not in _YEARS:
        raise ValueError(f"the time {value.isoformat()} is not of the years {_YEARS[0]} to {_YEARS[-1]}")
    utc: str = value.astimezone(UTC).isoformat()
    return utc


def _zone(name: str) -> tzinfo:
    try:
        if name[:1] in ("+", "-"):
            return datetime.strptime(name, "%z").tzinfo or UTC
        return ZoneInfo(name)
    except (ValueError, OSError, KeyError, TypeError):
        raise ValueError(
            f"time_zone must be a name such as 'Europe/Berlin', or an offset such as '+02:00', got {name!r}"
        ) from None


def _is_calendar_date(number: float) -> bool:
    """Whether a number reads as the date of our time that its digits spell, as 20240517 does."""
    try:
        return 10**7 < number == int(number) and datetime.strptime(str(int(number)), "%Y%m%d").year in _YEARS
    except (ValueError, OverflowError):
        return False


def _parsed(text: str) -> datetime | float:
    for parse in (datetime.fromisoformat, float):
        try:
            return parse(text)
        except ValueError:
            continue
    raise ValueError(f"{_show(text)} is not a time; write it like 2024-05-17T10:00:00+00:00")


def _import_model(model: type[BaseModel] | str) -> type[BaseModel]:
    found: Any = model
    if isinstance(model, str):
        try:
            found = class_at(model)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f'cannot import the model {model!r} ({error}); give it as "package.module.Name"'
            ) from error
    if not (isinstance(found, type) and issubclass(found, BaseModel)):
        raise ValueError(f"the model {model!r} is not a pydantic BaseModel")
    return found


def _make_model(fields: Mapping[str, str], roles: Mapping[str, str]) -> type[BaseModel]:
    """A model of these fields, whatever their names: these are aliases, so that none collides with pydantic's own."""
    declared: dict[str, Any] = {}
    for number, (name, spelled) in enumerate(fields.items()):
        kind, _, rest = (part.strip() for part in spelled.partition("|"))
        allowed = _ROLE_TYPES[roles[name]] if name in roles else tuple(FIELD_TYPES)
        if kind not in allowed or rest not in ("", "None"):
            part = f", the {roles[name]}," if name in roles else ""
            raise ValueError(
                f"field {name!r}{part} cannot be of type {spelled!r}; use one of {', '.join(allowed)}, "
                f'or "{allowed[0]} | None" where it may be absent'
            )
        # Label, id, time and a text in words accept more forms than pydantic's types do; the schema itself checks them.
        checked_here = roles.get(name, "text") != "text" or (name in roles and kind != "str")
        absent = None if rest else ...
        annotation = Any if checked_here else FIELD_TYPES[kind] | None if rest else FIELD_TYPES[kind]
        declared[f"field_{number}"] = (annotation, Field(absent, alias=name))
    return create_model("Record", __config__=ConfigDict(allow_inf_nan=False, extra="ignore"), **declared)


def _aliases(model: type[BaseModel], name: str) -> list[str]:
    """The keys under which a field of a user's model may arrive."""
    alias = model.model_fields[name].validation_alias or model.model_fields[name].alias
    choices = alias.choices if isinstance(alias, AliasChoices) else [alias]
    return [*(choice for choice in choices if isinstance(choice, str)), name]


def _reasons(details: Sequence[ErrorDetails]) -> str:
    """The errors of pydantic as one message. Values are left out, as a record may be long."""
    reasons = [_reason(detail) for detail in details[:_MAX_REASONS]]
    more = len(details) - len(reasons)
    return "; ".join(reasons + ([f"and {more} more"] if more else []))


def _reason(detail: ErrorDetails) -> str:
    where = f"field {'.'.join(map(str, detail['loc']))!r}" if detail["loc"] else "the record"
    kind = detail["type"]
    if kind == "missing":
        return f"{where} is missing"
    if kind == "extra_forbidden":
        return f"{where} is not declared"
    if kind == "string_unicode":
        return f"{where}: {_SURROGATE}"
    expected = _EXPECTED.get(kind.partition("_")[0])
    got = _GOT.get(type(detail["input"]))
    if kind == "finite_number":
        return f"{where} must be a finite number"
    if expected and got and kind.endswith(("_type", "_parsing")):
        return f"{where} must be {expected}, not {got}"
    return f"{where}: {detail['msg'].removeprefix('Value error, ')}"


def _refuse_unwritable(value: Any, where: str = "", depth: int = 0) -> None:
    """Refuse values that JSON files and tables cannot hold, at any depth."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"the record is nested more than {_MAX_DEPTH} levels deep")
    problem = None
    if isinstance(value, str):
        problem = None if _is_utf8(value) else f": {_SURROGATE}"
    elif isinstance(value, float):
        problem = None if math.isfinite(value) else " must be a finite number"
    elif isinstance(value, int):
        problem = None if value.bit_length() < 64 else " must be a number of at most 64 bits"
    elif isinstance(value, Mapping):
        for key, part in value.items():
            _refuse_unwritable(str(key), where, depth)
            _refuse_unwritable(part, f"{where}.{key}" if where else str(key), depth + 1)
    elif isinstance(value, (list, tuple)):
        for number, part in enumerate(value):
            _refuse_unwritable(part, f"{where}.{number}", depth + 1)
    if problem:
        raise ValueError(f"field {where!r}{problem}" if where else f"a field's name{problem}")


def _show(value: Any) -> str:
    """A value for a message, shortened if it is long or deep."""
    return _shortener.repr(value)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
