"""Alerts for the people who run the service; sending one never blocks or stops the service."""

from __future__ import annotations

import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

EVENTS = ("drift", "refusal", "quarantine", "error", "recovery", "promotion")
"""The events that can be reported: drift was detected; an update was refused; too many records are bad; the source, the
disk or an update fails; what had failed works again; a new version is in production."""

_QUEUE = 100

logger = logging.getLogger("evertune.live")


class Alert(ABC):
    """One channel for alerts. A subclass implements :meth:`send`, which must neither block nor raise."""

    @abstractmethod
    def send(self, event: str, text: str, **facts: Any) -> None:
        """Report an event.

        Args:
            event: One of :data:`EVENTS`. Events that the channel was not asked to report are ignored.
            text: What happened, as a message for people.
            facts: The same for programs, as JSON values: ``registry``, ``version``, ...
        """

    def close(self, timeout: float = 2.0) -> None:  # noqa: B027
        """Send the queued events, for at most ``timeout`` seconds."""


class QueuedAlert(Alert):
    """A channel whose events a separate thread delivers, so that a slow or dead receiver delays nothing.

    An event that cannot be delivered is retried with exponential backoff (each pause is twice the one before), then
    logged and dropped. An event that arrives while 100 others are queued is logged and dropped at once. A subclass
    implements :meth:`deliver`.

    Args:
        host: Name of the receiver in the log, without secrets.
        events: The :data:`EVENTS` to report. None is all but ``"promotion"``.
        timeout: Seconds to wait for the receiver in each attempt.
        retries: Maximum number of retries after the first attempt.
        pause: Seconds before the first retry.

    Raises:
        ValueError: If an event is unknown, or a number is out of range.
    """

    def __init__(self, host: str, events: Sequence[str] | None, timeout: float, retries: int, pause: float) -> None:
        self.events = tuple(EVENTS[:-1] if events is None else events)
        unknown = sorted(set(self.events) - set(EVENTS))
        if unknown:
            raise ValueError(f"events must be among {', '.join(EVENTS)}, got {', '.join(unknown)}")
        if timeout <= 0 or retries < 0 or pause < 0:
            raise ValueError(f"timeout must be positive, retries and pause not negative, got {timeout, retries, pause}")
        self.host, self.timeout, self.retries, self.pause = host, timeout, retries, pause
        self._waiting: queue.Queue[dict[str, Any]] = queue.Queue(_QUEUE)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    @abstractmethod
    def deliver(self, message: dict[str, Any]) -> tuple[str | None, bool]:
        """Deliver an event, once.

        Args:
            message: ``event``, ``text``, ``time`` and the facts.

        Returns:
            The reason for a failure, without secrets, or None; and whether a retry may succeed.
        """

    def send(self, event: str, text: str, **facts: Any) -> None:
        if event not in self.events:
            return
        message = {"event": event, "text": text, "time": datetime.now(UTC).isoformat(timespec="seconds"), **facts}
        if self._thread is None:
            # Started with the first event: a channel that never sends needs no thread.
            self._thread = threading.Thread(target=self._work, name="evertune-alert", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait(message)
        except queue.Full:
            self._dropped(event, f"{_QUEUE} others are waiting")

    def close(self, timeout: float = 2.0) -> None:
        """Send the queued events, for at most ``timeout`` seconds; nothing is retried."""
        self._closing.set()
        deadline = time.monotonic() + timeout
        while self._waiting.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.01)

    def _work(self) -> None:
        while True:
            message = self._waiting.get()
            try:
                self._deliver(message)
            except Exception as error:  # whatever the error, the next event may be delivered
                self._dropped(message["event"], type(error).__name__)
            self._waiting.task_done()

    def _deliver(self, message: dict[str, Any]) -> None:
        for attempt in range(self.retries + 1):
            failure, may_pass = self.deliver(message)
            if failure is None:
                return
            # Waiting on the event rather than sleeping lets close() cut the backoff short.
            if not may_pass or attempt == self.retries or self._closing.wait(self.pause * 2**attempt):
                break
        self._dropped(message["event"], str(failure))

    def _dropped(self, event: str, why: str) -> None:
        logger.warning("alert to %s is dropped: %s", self.host, why, extra={"event": "alert dropped", "dropped": event})
