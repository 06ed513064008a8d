"""Loads the version in production, ready to predict, in the process that serves it."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, get_args

from evertune.registry.aliases import ALIASES
from evertune.registry.registry import Registry, RegistryError
from evertune.registry.version import Version

if TYPE_CHECKING:
    import torch

MODEL = "model"
Precision = Literal["32", "bf16"]
PATIENCE = 10.0
"""Seconds that ``close``, or the exit of the process, waits for a version that is being loaded."""

logger = logging.getLogger(__name__)


class Predictor(Protocol):
    """The interface of a module class that can be served: it loads a module from a folder, which answers texts."""

    @classmethod
    def from_pretrained(cls, directory: str | Path, /) -> Any:
        """Load a module from a folder."""

    def predict(self, texts: Sequence[Any], /) -> Any:
        """Answer texts."""


def load(
    registry: Registry | str | Path,
    alias: str | int = "production",
    follow: float | None = None,
    *,
    module_class: type[Predictor] | None = None,
    device: str | torch.device | None = None,
    precision: Precision = "32",
    on_change: Callable[[Version], None] | None = None,
    make: Callable[[Version], Any] | None = None,
) -> Served:
    """Load the version behind an alias, verified and ready to ``predict``.

    With ``follow``, a thread polls the alias, loads a new version next to the old one (there must be memory for two)
    and swaps them; requests in progress finish on the old one. A rollback is followed in the same way. A version that
    is damaged or cannot be loaded never takes over: the old one stays, and a warning is logged.

    Args:
        registry: A registry, or its folder or URL.
        alias: ``production``, ``previous``, ``refused``, or the number of a version.
        follow: Seconds between two checks of the alias; None stays with the version found now. The thread does not
            survive a fork: call this in each worker process.
        module_class: Class of a module that is not a built-in one. Only built-in classes are ever chosen by a name in a
            file.
        device: Device of the module; None for the GPU if there is one, else the CPU.
        precision: ``32`` (default), in which versions are judged, or ``bf16``, which is faster where the processor
            computes in it (a GPU, a CPU with AMX) and changes probabilities in the third digit.
        on_change: Called with the new version after each swap.
        make: Function that returns the module that answers for a version, such as one with the weights of an export.
            Default: the module that the version holds.

    Raises:
        RegistryError: If the registry or the version does not exist, or the version is damaged.
        ValueError: If the alias is unknown, or ``follow`` is not positive or is combined with the number of a version.

    Example::

        with evertune.load("registry", follow=5) as served:
            served.predict(["Shares fell after the merger."])  # [{"business": 0.98, "sport": 0.02}]
            served.version.number  # 7
    """
    if not _is_number(alias) and alias not in ALIASES:
        raise ValueError(f"alias must be one of {', '.join(ALIASES)} or the number of a version, got {alias!r}")
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
    if follow is not None and follow <= 0:
        raise ValueError(f"follow must be a positive number of seconds, or None, got {follow}")
    if follow is not None and _is_number(alias):
        raise ValueError(f"version {alias} never changes, so there is nothing to follow: pass an alias, or follow=None")
    registry = registry if isinstance(registry, Registry) else Registry(registry)
    served = Served(
        registry,
        alias,
        module_class=module_class,
        device=device,
        precision=precision,
        on_change=on_change,
        make=make,
    )
    if follow is not None:
        served.follow(follow)
    return served


@dataclass(frozen=True, eq=False)
class Answering:
    """A version and its module, which belong together even if another version is swapped in meanwhile."""

    version: Version
    module: Any
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def alone(self) -> AbstractContextManager[Any]:
        """A context in which no other thread uses the module."""
        return self._turn

    def predict(self, texts: Sequence[Any], **settings: Any) -> Any:
        """The result of ``module.predict``. One thread at a time: a tokenizer holds the settings of a single call."""
        with self._turn:
            return self.module.predict(texts, **settings)


class Served:
    """The version behind an alias, as loaded by :func:`load`. Its methods may be called from any thread.

    Attributes:
        problem: Why the version that the alias names is not the one that answers; None if it is.
    """

    def __init__(
        self,
        registry: Registry,
        alias: str | int = "production",
        *,
        module_class: type[Predictor] | None = None,
        device: str | torch.device | None = None,
        precision: Precision = "32",
        on_change: Callable[[Version], None] | None = None,
        make: Callable[[Version], Any] | None = None,
    ) -> None:
        self.problem: str | None = None
        self._registry = registry
        self._alias = alias
        self._module_class = module_class
        self._device = device
        self._precision = precision
        self._on_change = on_change
        self._make = make
        self._loading = threading.Lock()
        self._failed: int | None = None
        self._warned: tuple[int | None, type[Exception]] | None = None
        self._end: Callable[[], None] | None = None
        self._answering = self._open(self._wanted())

    def __repr__(self) -> str:
        return f"Served(version {self.version.number} of {self._registry.store.root!r}, {self._alias!r})"

    @property
    def answering(self) -> Answering:
        """The version and its module together, for answers that must name the version that gave them.

        Example::

            answering = served.answering
            log(answering.version.number, answering.predict(texts))
        """
        return self._answering

    @property
    def version(self) -> Version:
        """The version that answers now."""
        return self._answering.version

    @property
    def module(self) -> Any:
        """The module that answers now, in evaluation mode and without gradients."""
        return self._answering.module

    def predict(self, texts: Sequence[Any], **settings: Any) -> Any:
        """The result of the module's ``predict``; all answers of one call come from the same version."""
        return self._answering.predict(texts, **settings)

    def refresh(self) -> bool:
        """Check the alias now, and load its version if it has changed; returns whether it has.

        Raises:
            RegistryError: If the version is damaged or does not exist; the old one keeps answering.
        """
        return self._take(self._wanted())

    def follow(self, seconds: float) -> None:
        """Start a thread that calls :meth:`refresh` every ``seconds``, until :meth:`close` or until this object is
        collected."""
        self.close()
        stop = threading.Event()
        # The thread holds only a weak reference: otherwise it would keep this object, and its model, alive for ever.
        thread = threading.Thread(
            target=_watch, args=(weakref.ref(self), stop, seconds), name="evertune-follow", daemon=True
        )
        self._end = weakref.finalize(self, _stop, stop, thread)
        thread.start()

    def close(self) -> None:
        """Stop following; the current version keeps answering."""
        if self._end is not None:
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wanted(self) -> int:
        """The number of the version that should answer."""
        if _is_number(self._alias):
            return int(self._alias)
        number = self._registry.aliases.get(str(self._alias))
        if number is None:
            raise RegistryError(_absent(self._registry, str(self._alias)))
        return number

    def _take(self, number: int) -> bool:
        """Make a version answer; returns whether it has changed."""
        with self._loading:
            changed = number != self.version.number
            if changed:
                # Swapped by one assignment: a request sees either version whole, with no lock on the way of predict().
                self._answering = self._open(number)
            self._failed = self._warned = self.problem = None
        if changed:
            logger.info("version %d of %s answers now", number, self._registry.store.root)
            self._announce()
        return changed

    def _announce(self) -> None:
        if self._on_change is not None:
            try:
                self._on_change(self.version)
            except Exception:
                logger.exception("on_change failed at version %d", self.version.number)

    def _look(self) -> None:
        """One round of the thread. A version that failed is not retried until the alias has moved.

        If the store is unreachable, it is retried in every round.
        """
        number: int | None = None
        try:
            number = self._wanted()
            if number != self._failed:
                self._take(number)
        except Exception as error:
            self.problem = f"{type(error).__name__}: {error}"
            self._failed = None if isinstance(error, OSError) else number
            if self._warned != (number, type(error)):
                self._warned = (number, type(error))
                what = self._alias if number is None else f"version {number}"
                logger.warning("%s is not loaded, version %d stays: %s", what, self.version.number, self.problem)

    def _open(self, number: int) -> Answering:
        version = self._registry.version(number)
        if self._make is not None:
            return Answering(version, self._make(version))
        folder = version.verified_folder(MODEL)
        module: Any = (self._module_class or _own_class(version)).from_pretrained(folder / MODEL)
        return Answering(version, _ready(module, self._device, self._precision))


def _watch(reference: weakref.ref[Served], stop: threading.Event, seconds: float) -> None:
    while not stop.wait(seconds):
        served = reference()
        if served is None:
            return
        served._look()
        # Not kept while waiting, so that the object can be collected.
        del served


def _stop(stop: threading.Event, thread: threading.Thread) -> None:
    """End the thread and wait for it: a library that is loading while the interpreter shuts down may crash."""
    stop.set()
    if thread is not threading.current_thread():
        thread.join(PATIENCE)


def _is_number(alias: str | int) -> bool:
    return isinstance(alias, int) or alias.isdecimal()


def _absent(registry: Registry, alias: str) -> str:
    """Why an alias names no version, and what to do."""
    root, numbers = registry.store.root, [version.number for version in registry.versions()]
    if not numbers:
        return f"{root} holds no versions: check the path, or make the first one with `evertune update --config ...`"
    return (
        f"{root} has no {alias} version yet: promote one of {numbers} with `evertune registry promote {root} N`, "
        "or load one by its number"
    )


def _own_class(version: Version) -> Any:
    """The class that the manifest names, if it is one of evertune's built-in modules."""
    from evertune import lightning_modules as own

    # Looked up among known classes and never imported by name: a manifest must not be able to run code.
    named = {name: getattr(own, name) for name in own.__all__}
    modules = {
        name: kind for name, kind in named.items() if isinstance(kind, type) and issubclass(kind, own.TransformerModule)
    }
    name = version.manifest.module
    if name not in modules:
        raise RegistryError(
            f"version {version.number} holds a {name}, which is not a built-in module {sorted(modules)}: "
            "pass its class as module_class="
        )
    return modules[name]


def _ready(module: Any, device: str | torch.device | None, precision: Precision) -> Any:
    """A module for inference that is entirely in memory, with nothing left to read from the registry."""
    import torch

    if isinstance(module, torch.nn.Module):
        module.requires_grad_(False).eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if precision == "bf16":
            module.to(torch.bfloat16)
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.device.type == "cpu":
                tensor.data = tensor.data.clone()  # may be mapped from the file, whose truncation would crash us
        getattr(module, "tokenizer", None)  # a transformer module loads it on first access
    return module
