"""Dynamic batching: requests that arrive while the model is busy are answered together by its next forward pass."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from evertune.serve.settings import BatchSettings

_MEMORY = 0.8  # weight of the past in the running mean of the time per record


class OverloadedError(RuntimeError):
    """Too many records wait already.

    Args:
        retry_after: Seconds after which those that wait now will have been answered.
    """

    def __init__(self, retry_after: float) -> None:
        self.retry_after = max(1, math.ceil(retry_after))
        super().__init__(f"too many requests are waiting; try again in {self.retry_after} s")


class Predicted(NamedTuple):
    """Answers of one version.

    Args:
        version: Number of the version.
        several: Whether a text may have any number of labels; None for a model that does not classify.
        answers: For each text the probability of each class, most probable first; or what else the task gives.
    """

    version: int
    several: bool | None
    answers: list[Any]


@dataclass(frozen=True, eq=False)
class _Request:
    texts: list[Any]
    answered: asyncio.Future[Predicted]


class Batcher:
    """Answers requests in batches, one batch at a time, in a thread of its own.

    Under load, a batch is whatever has arrived while the one before it was computed. A batch waits briefly for as many
    records as the one before it had (``max_delay``): clients that send their next request when they have got an answer
    then stay together. A request is never split, so that one version answers all of it. If a batch fails, its requests
    are tried one by one, and a bad one costs nobody else an answer.

    Args:
        predict: Answers texts. Called in the batcher's thread.
        settings: See :class:`BatchSettings`.
        on_batch: Called with the number of records and the seconds of each batch.
        on_queue: Called with the number of records that wait whenever it changes.
    """

    def __init__(
        self,
        predict: Callable[[list[Any]], Predicted],
        settings: BatchSettings,
        on_batch: Callable[[int, float], None] | None = None,
        on_queue: Callable[[int], None] | None = None,
    ) -> None:
        self.settings = settings
        self._predict, self._on_batch, self._on_queue = predict, on_batch, on_queue
        self._waiting: deque[_Request] = deque()
        self._arrived = asyncio.Event()
        self._last = 1  # records of the last batch
        self._per_record = 0.01  # seconds, a running mean
        self._busy_since: float | None = None
        self._thread = ThreadPoolExecutor(1, "evertune-predict")
        self._task: asyncio.Task[None] | None = None
        self.queued = 0
        """Records that wait for their turn."""

    @property
    def busy(self) -> float:
        """Seconds since the batch under way began; 0 if there is none."""
        return 0.0 if self._busy_since is None else time.monotonic() - self._busy_since

    def start(self) -> None:
        """Begin to answer. Requires a running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop after the batch under way; requests that still wait are cancelled."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        for request in self._waiting:
            request.answered.cancel()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    async def submit(self, texts: Sequence[Any]) -> Predicted:
        """Answer texts together with what others have sent.

        Raises:
            OverloadedError: If too many records wait.
            Exception: Whatever the model raises for these texts alone.
        """
        if self.queued and self.queued + len(texts) > self.settings.max_queue:
            raise OverloadedError(self.queued * self._per_record)
        request = _Request(list(texts), asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        self._count(len(texts))
        self._arrived.set()
        try:
            return await request.answered
        except asyncio.CancelledError:  # by a timeout, or because the client has gone
            self._withdraw(request)
            raise

    async def _run(self) -> None:
        while True:
            await self._gather()
            requests = self._take()
            if not requests:
                continue
            n_records, start = sum(len(request.texts) for request in requests), time.monotonic()
            self._busy_since = start
            try:
                await self._answer(requests)
            finally:
                self._busy_since = None
            seconds = time.monotonic() - start
            self._last = n_records
            self._per_record = _MEMORY * self._per_record + (1 - _MEMORY) * seconds / n_records
            if self._on_batch is not None:
                self._on_batch(n_records, seconds)

    async def _gather(self) -> None:
        """Wait for a request, and then a little for as many records as the last batch had."""
        self._arrived.clear()
        if not self._waiting:
            await self._arrived.wait()
        enough = min(self._last, self.settings.max_batch)
        with suppress(TimeoutError):
            async with asyncio.timeout(self.settings.max_delay):
                while self.queued < enough:
                    self._arrived.clear()
                    await self._arrived.wait()

    def _take(self) -> list[_Request]:
        """The requests of the next batch."""
        taken: list[_Request] = []
        size = 0
        while self._waiting and (not taken or size + len(self._waiting[0].texts) <= self.settings.max_batch):
            taken.append(self._waiting.popleft())
            size += len(taken[-1].texts)
        self._count(-size)
        return taken

    def _withdraw(self, request: _Request) -> None:
        """Make room for others at once, if the request has not become part of a batch yet."""
        with suppress(ValueError):
            self._waiting.remove(request)
            self._count(-len(request.texts))

    def _count(self, change: int) -> None:
        self.queued += change
        if self._on_queue is not None:
            self._on_queue(self.queued)

    async def _answer(self, requests: list[_Request]) -> None:
        loop = asyncio.get_running_loop()
        try:
            predicted = await loop.run_in_executor(self._thread, self._predict, [t for r in requests for t in r.texts])
        except Exception as error:
            if len(requests) == 1:
                _settle(requests[0], error)
                return
            for request in requests:
                await self._answer([request])
            return
        start = 0
        for request in requests:
            end = start + len(request.texts)
            _settle(request, predicted._replace(answers=predicted.answers[start:end]))
            start = end


def _settle(request: _Request, outcome: Predicted | Exception) -> None:
    if request.answered.done():
        return
    if isinstance(outcome, Exception):
        request.answered.set_exception(outcome)
    else:
        request.answered.set_result(outcome)


def by_length(lengths: Sequence[int], most: int, start: int) -> list[list[int]]:
    """Positions of texts in groups of similar length, shortest first, each of which is one forward pass.

    Shorter texts are padded to the longest one of their group, which costs as much as if they were as long. A group
    ends where that padding would cost more than another forward pass.

    Args:
        lengths: Length of each text in characters.
        most: Most texts of a group.
        start: What a forward pass costs however short its texts are, as the characters that take equally long.

    Example:
        >>> by_length([300, 20, 30, 290], most=32, start=100)
        [[1, 2], [3, 0]]
    """
    groups: list[list[int]] = []
    padding = 0
    for position in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups:
            group = groups[-1]
            padding += len(group) * (lengths[position] - lengths[group[-1]])
            if len(group) < most and padding <= start:
                group.append(position)
                continue
        groups.append([position])
        padding = 0
    return groups
