"""A version or an export that answers in a role, production for one: loaded, followed, and batched."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from evertune.registry.registry import Registry, RegistryError
from evertune.registry.serving import Answering, Precision, Predictor, Served, load
from evertune.registry.version import Version
from evertune.serve.batching import Batcher, Predicted, by_length
from evertune.serve.exported import ServedExport
from evertune.serve.exports import Exports
from evertune.serve.messages import length_of
from evertune.serve.metrics import ServeMetrics
from evertune.serve.settings import BatchSettings, OnnxSettings
from evertune.tasks.base import task_of
from evertune.tasks.predicting import are_probabilities

logger = logging.getLogger("evertune.serve")


class Deployment:
    """The version behind an alias, which answers requests and is replaced when the alias moves; or an export.

    Args:
        role: ``production``, ``canary`` or ``shadow``.
        registry: Registry of the versions; or the folder of an export, which is never replaced.
        alias: Alias to follow, or number of a version; the name of the export.
        batching: How requests are put together.
        metrics: What is reported.
        poll: Seconds between two looks at the alias.
        wait: Wait for the first version if there is none yet, rather than failing.
        module_class: Class of a module that is not a built-in one.
        device: Device of the module; None for the GPU if there is one.
        precision: ``32`` or ``bf16``, see :func:`evertune.load`.
        onnx: Whether the versions of a registry answer as exports to ONNX.
    """

    def __init__(
        self,
        role: str,
        registry: Registry | Path,
        alias: str | int,
        batching: BatchSettings,
        metrics: ServeMetrics,
        *,
        poll: float = 5.0,
        wait: bool = False,
        module_class: type[Predictor] | None = None,
        device: str | None = None,
        precision: Precision = "32",
        onnx: OnnxSettings | None = None,
    ) -> None:
        self.role, self.alias = role, alias
        self._registry, self._metrics, self._poll, self._wait = registry, metrics, poll, wait
        self._module_class, self._device, self._precision = module_class, device, precision
        self._exports: Exports | None = None
        if onnx is not None and onnx.precision is not None and isinstance(registry, Registry):
            self._exports = Exports(onnx, str(registry.store.root))
        self._served: Served | ServedExport | None = None
        self._waiting: asyncio.Task[None] | None = None
        self._reason = "the version is being loaded"
        self.classifies = True
        """Whether answers are probabilities of classes; known once a version is loaded."""
        metrics.queued(role, 0)
        self.batcher = Batcher(self._predict, batching, partial(metrics.batch, role), partial(metrics.queued, role))

    @property
    def version(self) -> int | None:
        """Number of the version that answers now; None before the first is loaded."""
        return None if self._served is None else self._served.version.number

    @property
    def problem(self) -> str | None:
        """Why the version that the alias names does not answer; None if it does."""
        return self._reason if self._served is None else self._served.problem

    @property
    def module(self) -> Any:
        """The module that answers now; None before the first is loaded."""
        return None if self._served is None else self._served.module

    @property
    def answering(self) -> Answering | None:
        """The version of a registry that answers now, with its module; None where an export answers.

        Raises:
            NotReadyError: If no version is loaded yet.
        """
        if self._served is None:
            raise NotReadyError(f"{self.role} is not ready: {self._reason}")
        return None if isinstance(self._served, ServedExport) or self._exports else self._served.answering

    async def start(self) -> None:
        """Load the version, follow its alias, and begin to answer.

        Raises:
            RegistryError: If there is no such version and ``wait`` is not set, or the version is damaged.
            TypeError: If the module cannot answer the example of its task.
        """
        self.batcher.start()
        try:
            await asyncio.to_thread(self._load)
        except RegistryError as error:
            if not self._wait:
                raise
            self._reason = str(error)
            logger.warning("%s: waiting for the first version: %s", self.role, error, extra={"event": "waiting"})
            self._waiting = asyncio.create_task(self._load_later())

    async def close(self) -> None:
        """Stop following and answering."""
        if self._waiting is not None:
            self._waiting.cancel()
            with suppress(asyncio.CancelledError):
                await self._waiting
        await self.batcher.close()
        if self._exports is not None:
            self._exports.close()
        if self._served is not None:
            await asyncio.to_thread(self._served.close)

    async def predict(self, texts: Sequence[Any]) -> Predicted:
        """Answer texts, all by one version.

        Raises:
            OverloadedError: If too many records wait.
            NotReadyError: If no version is loaded yet.
        """
        if self._served is None:
            raise NotReadyError(f"{self.role} is not ready: {self._reason}")
        return await self.batcher.submit(texts)

    def _predict(self, texts: list[Any]) -> Predicted:
        assert self._served is not None
        # Taken once: however often versions are swapped meanwhile, one of them answers the whole batch.
        answering = self._served.answering
        lengths = [length_of(text) for text in texts]
        answers: list[Any] = [None] * len(texts)
        for places in by_length(lengths, self.batcher.settings.max_batch, _start_of_pass(answering.module)):
            found = answering.predict([texts[place] for place in places])
            for place, one in zip(places, found, strict=True):
                answers[place] = one
        several = bool(getattr(answering.module, "multi_label", False)) if self.classifies else None
        return Predicted(answering.version.number, several, answers)

    def _open(self) -> Served | ServedExport:
        if isinstance(self._registry, Path):
            return ServedExport(self._registry)
        return load(
            self._registry,
            self.alias,
            None if isinstance(self.alias, int) or self.alias.isdecimal() else self._poll,
            module_class=self._module_class,
            device=self._device,
            precision=self._precision,
            on_change=self._swapped,
            make=None if self._exports is None else self._exports.module,
        )

    def _load(self) -> None:
        served = self._open()
        try:
            self.classifies = _gives_classes(served)
        except BaseException:
            served.close()
            raise
        self._served = served
        self._metrics.version(self.role, served.version.number)
        words = f"{self.role}: version {served.version.number} answers"
        logger.info(words, extra={"event": "serving", "role": self.role, "version": served.version.number})

    async def _load_later(self) -> None:
        while self._served is None:
            await asyncio.sleep(self._poll)
            try:
                await asyncio.to_thread(self._load)
            except Exception as error:  # the next version may do better
                reason = str(error) if isinstance(error, RegistryError) else f"{type(error).__name__}: {error}"
                if reason != self._reason:
                    logger.warning("%s is not loaded: %s", self.role, reason, extra={"event": "waiting"})
                self._reason = reason

    def _swapped(self, version: Version) -> None:
        self._metrics.version(self.role, version.number, swapped=True)


def _start_of_pass(module: Any) -> int:
    """What a forward pass costs however short its texts are, as the characters that take equally long.

    Measured on MiniLM: about 35 tokens on a processor core. A GPU waits for its next operation, not for a padded token.
    """
    device = getattr(module, "device", None)  # an export has none: it is for processors
    return 160 if device is None or device.type == "cpu" else 16_000


class NotReadyError(RuntimeError):
    """No version is loaded yet."""


def _gives_classes(served: Served | ServedExport) -> bool:
    """Let a module answer once, as the first forward pass is slower than others: whether it gives probabilities.

    Raises:
        TypeError: If it cannot answer, or gives something else than one answer for each text.
    """
    name, example = type(served.module).__name__, task_of(served.module).example
    try:
        found = served.predict([example])
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} cannot be served: its predict() fails for {example!r}: {error}") from error
    if not (isinstance(found, list) and len(found) == 1):
        raise TypeError(
            f"{name} cannot be served: its predict() must return a list with an answer for each text, but returned "
            f"{type(found).__name__}"
        )
    return are_probabilities(found[0])
