"""The methods of continual learning in a plan, and what they say about themselves."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from evertune.utils.plugins import class_at

if TYPE_CHECKING:
    from evertune.callbacks.osft import OSFT


def _callbacks() -> Any:
    """The package whose names are evertune's own callbacks. Imported on use, as it is slow to import."""
    return import_module("evertune.callbacks")


@dataclass(frozen=True)
class Method:
    """A method of continual learning.

    Args:
        cls: Class of the method, a ``ContinualCallback``.
        arguments: Arguments of its constructor by name: those given, else their defaults.
    """

    cls: type[Any]
    arguments: Mapping[str, Any]

    @classmethod
    def named(cls, name: str, arguments: Mapping[str, Any] | None = None) -> Method:
        """Find a method by name.

        Args:
            name: Import path of its class, or the name of the class in ``evertune.callbacks`` in upper or lower case.
            arguments: Arguments of the constructor; they override its defaults.

        Raises:
            ValueError: If there is no such class, or it is not a ``ContinualCallback``.
        """
        from evertune.callbacks.base import ContinualCallback

        callbacks = _callbacks()
        own = {one.lower(): one for one in callbacks.__all__}
        try:
            found = class_at(name) if "." in name else getattr(callbacks, own[name.lower()])
        except (ImportError, AttributeError, KeyError) as error:
            raise ValueError(
                f"unknown method {name!r} ({error}); give one of {', '.join(sorted(own))} or the path of a class"
            ) from None
        if not (isinstance(found, type) and issubclass(found, ContinualCallback)):
            raise ValueError(f"{name!r} is not a method: it does not derive from ContinualCallback")
        parameters = inspect.signature(found).parameters.items()
        defaults = {key: one.default for key, one in parameters if one.default is not inspect.Parameter.empty}
        return cls(found, {**defaults, **(arguments or {})})

    @property
    def bytes_per_weight(self) -> int | None:
        """Bytes for each weight that a rank updates, as its class declares; None if that depends on the arguments."""
        size: int | None = self.cls.bytes_per_weight()
        return size

    @property
    def protects(self) -> OSFT | None:
        """The method itself, if it is OSFT, whose state depends on the matrices of the module."""
        from evertune.callbacks.osft import OSFT

        return self.cls(**self.arguments) if issubclass(self.cls, OSFT) else None

    @property
    def counted(self) -> bool:
        """Whether what it needs is known."""
        return self.bytes_per_weight is not None or self.protects is not None

    @property
    def estimates(self) -> bool:
        """Whether it goes over a sample of the experience at the experience's end, as EWC does."""
        # There is no declaration for this: methods that do it have these two arguments in common.
        return bool(self.bytes_per_weight) and {"n_examples", "batch_size"} <= self.arguments.keys()


def methods_of(trainer: Mapping[str, Any], notes: list[str]) -> list[Method]:
    """The methods among the callbacks. Adds a note for each callback of others, whose memory is not counted."""
    callbacks_of_evertune = _callbacks().__all__
    methods = []
    callbacks = trainer.get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        settings = callback if isinstance(callback, dict) else {"class_path": callback}
        path = str(settings.get("class_path"))
        try:
            method = Method.named(path, settings.get("init_args") or {})
        except ValueError:
            method = None
        if method is not None:
            methods.append(method)
        elif not (path.startswith("evertune.") or path in callbacks_of_evertune):
            notes.append(f"what {path.rpartition('.')[2]} needs is not counted")
    return methods


def argument(methods: Sequence[Method], name: str, default: Any) -> Any:
    """The value of an argument in the first method that has it, or else the default."""
    return next((method.arguments[name] for method in methods if name in method.arguments), default)
