"""The search space of ``evertune tune``: which settings of a configuration vary, and over what."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna import Trial

_KEYS = {"low", "high", "log", "step"}


@dataclass(frozen=True)
class Choice:
    """One of several values: anything that YAML can say."""

    values: list[Any]

    def suggest(self, trial: Trial, name: str) -> Any:
        """A value for a trial. Those that a study cannot store itself are stored as JSON."""
        return json.loads(trial.suggest_categorical(name, [json.dumps(value) for value in self.values]))

    def stored(self, value: Any) -> Any:
        """A value as the study stores it; None if it is not in the space."""
        return json.dumps(value) if value in self.values else None


@dataclass(frozen=True)
class Range:
    """A number between two others, both included; whole if both are, or a multiple of ``step`` above ``low``."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the numbers are whole."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def suggest(self, trial: Trial, name: str) -> Any:
        """A value for a trial."""
        if self.is_whole:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return trial.suggest_float(name, self.low, self.high, log=self.log, step=self.step)

    def stored(self, value: Any) -> Any:
        """A value as the study stores it; None if it is not in the space."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return (
            value if number and self.low <= value <= self.high and (not self.is_whole or value == int(value)) else None
        )


Space = dict[str, Choice | Range]
"""The settings that vary, by their place in the configuration: names joined by dots."""


def read_space(content: Any) -> Space:
    """The space that a YAML file describes.

    Args:
        content: A mapping of places to a list of values, or to ``low``, ``high`` and, if wanted, ``log: true`` and
            ``step``.

    Raises:
        ValueError: If it is anything else, or a range is empty.

    Example:
        >>> read_space({"trainer.max_epochs": {"low": 1, "high": 4}})
        {'trainer.max_epochs': Range(low=1, high=4, log=False, step=None)}
    """
    if not isinstance(content, Mapping) or not content:
        raise ValueError(
            "the space must map settings to what they may be, as in `trainer.max_epochs: {low: 1, high: 4}`; got "
            f"{type(content).__name__}"
        )
    return {str(place): _values(str(place), value) for place, value in content.items()}


def _values(place: str, value: Any) -> Choice | Range:
    if isinstance(value, list):
        if len(value) < 2:
            raise ValueError(f"{place}: a list of at least two values is needed, got {value}")
        return Choice(value)
    if not isinstance(value, Mapping) or not {"low", "high"} <= value.keys() <= _KEYS:
        raise ValueError(f"{place}: give a list of values, or low, high and, if wanted, log and step; got {value!r}")
    numbers = [value["low"], value["high"], *([value["step"]] if value.get("step") is not None else [])]
    if any(isinstance(one, bool) or not isinstance(one, int | float) or not math.isfinite(one) for one in numbers):
        hint = "; YAML reads 1e-5 as a text: write 1.0e-5" if any(isinstance(one, str) for one in numbers) else ""
        raise ValueError(f"{place}: low, high and step must be numbers, got {numbers}{hint}")
    made = Range(value["low"], value["high"], bool(value.get("log", False)), value.get("step"))
    if made.low >= made.high:
        raise ValueError(f"{place}: low must be below high, got {made.low} and {made.high}")
    if made.log and (made.low <= 0 or made.step is not None):
        raise ValueError(f"{place}: log needs a positive low and no step, got low={made.low}, step={made.step}")
    return made


def value_at(config: Any, place: str) -> Any:
    """The setting at a place; see :func:`with_values`.

    Raises:
        ValueError: If there is no such place.
    """
    for name in place.split("."):
        config = config[_key(config, name, place)] if not _is_class(config, name) else config["init_args"][name]
    return config


def with_values(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a configuration with other values at some places.

    A place is the name on the command line, such as ``trainer.max_epochs``. A callback is named by its class or its
    number, and ``init_args`` may be left out: ``trainer.callbacks.Replay.memory_size``.

    Raises:
        ValueError: If there is no such place.

    Example:
        >>> config = {"callbacks": [{"class_path": "evertune.callbacks.Replay", "init_args": {"memory_size": 5}}]}
        >>> with_values(config, {"callbacks.Replay.memory_size": 9})["callbacks"][0]["init_args"]
        {'memory_size': 9}
    """
    made: dict[str, Any] = copy.deepcopy(dict(config))
    for place, value in values.items():
        value_at(made, place)  # a setting that the configuration does not have is misspelt
        above, _, name = place.rpartition(".")
        parent = value_at(made, above) if above else made
        parent = parent["init_args"] if _is_class(parent, name) else parent
        parent[_key(parent, name, place)] = value
    return made


def _is_class(config: Any, name: str) -> bool:
    """Whether this is a class whose argument is meant."""
    return isinstance(config, Mapping) and "class_path" in config and name in (config.get("init_args") or {})


def _key(config: Any, name: str, place: str) -> Any:
    """The key of one part of a place."""
    if isinstance(config, Mapping) and name in config:
        return name
    if isinstance(config, list):
        names = [str(one["class_path"]).rpartition(".")[2] if isinstance(one, Mapping) else "" for one in config]
        if name.isdecimal() and int(name) < len(config):
            return int(name)
        if names.count(name) == 1:
            return names.index(name)
        known = names
    else:
        known = sorted({*config, *(config.get("init_args") or {})} if isinstance(config, Mapping) else [])
    raise ValueError(
        f"{place}: the configuration has no {name!r} there; it has {', '.join(map(str, known)) or 'nothing'}"
    )
