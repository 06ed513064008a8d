"""Alerts for the people who run the service; sending one never blocks or stops the service."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from base64 import b64encode
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from http.client import HTTPException
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from evertune.utils.secrets import fill_in

EVENTS = ("drift", "refusal", "quarantine", "error", "recovery", "promotion")
"""The events that can be reported: drift was detected; an update was refused; too many records are bad; the source, the
disk or an update fails; what had failed works again; a new version is in production."""

_QUEUE = 100
# Request timeout, too early, too many requests: the only client errors that may go away by themselves.
_WORTH_RETRYING = (408, 425, 429)

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


class Webhook(Alert):
    """POSTs each event as JSON to a URL: ``{"event", "text", "time", "registry", "version", ...}``.

    Slack, Mattermost and Teams' workflows show the ``text``. A separate thread sends, so that a slow or dead receiver
    delays nothing. An event that cannot be delivered is retried with exponential backoff (each pause is twice the one
    before), then logged and dropped. An event that arrives while 100 others are queued is logged and dropped at once.

    Example::

        Webhook("${SLACK_WEBHOOK}", events=["drift", "refusal", "error"])

    Args:
        url: Address of the receiver, with http or https. ``${SLACK_WEBHOOK}`` is taken from the environment, so that
            the secret is not stored in any configuration. Only the host is ever logged. A user and password in it
            (``https://user:password@host/...``, percent-encoded) are sent as basic authentication.
        events: The :data:`EVENTS` to report. Default: all but ``"promotion"``.
        timeout: Seconds to wait for the receiver in each attempt.
        headers: Further HTTP headers, such as ``{"Authorization": "Bearer ${TOKEN}"}``; names from the environment are
            filled in as in ``url``.
        retries: Maximum number of retries after the first attempt.
        pause: Seconds before the first retry.

    Raises:
        ValueError: If the URL is of another kind, it and ``headers`` both hold credentials, a name is not set in the
            environment, an event is unknown, or a number is out of range.
    """

    def __init__(
        self,
        url: str,
        events: Sequence[str] | None = None,
        timeout: float = 5.0,
        headers: Mapping[str, str] | None = None,
        retries: int = 4,
        pause: float = 1.0,
    ) -> None:
        parts = _parts(fill_in(url))
        self._headers = fill_in(dict(headers or {}))
        if "@" in parts.netloc:  # urllib would take the credentials for a part of the host
            if "authorization" in map(str.lower, self._headers):
                raise ValueError("pass the credentials either in url or in headers, which has an Authorization")
            credentials = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
            self._headers["Authorization"] = f"Basic {b64encode(credentials.encode()).decode()}"
        self._url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        self.events = tuple(EVENTS[:-1] if events is None else events)
        unknown = sorted(set(self.events) - set(EVENTS))
        if unknown:
            raise ValueError(f"events must be among {', '.join(EVENTS)}, got {', '.join(unknown)}")
        if timeout <= 0 or retries < 0 or pause < 0:
            raise ValueError(f"timeout must be positive, retries and pause not negative, got {timeout, retries, pause}")
        self.host, self.timeout, self.retries, self.pause = str(parts.hostname), timeout, retries, pause
        self._waiting: queue.Queue[dict[str, Any]] = queue.Queue(_QUEUE)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def send(self, event: str, text: str, **facts: Any) -> None:
        if event not in self.events:
            return
        message = {"event": event, "text": text, "time": datetime.now(UTC).isoformat(timespec="seconds"), **facts}
        if self._thread is None:
            # Started with the first event: a webhook that never sends needs no thread.
            self._thread = threading.Thread(target=self._work, name="evertune-webhook", daemon=True)
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
        body = json.dumps(message, default=str).encode()
        for attempt in range(self.retries + 1):
            failure, may_pass = self._post(body)
            if failure is None:
                return
            # Waiting on the event rather than sleeping lets close() cut the backoff short.
            if not may_pass or attempt == self.retries or self._closing.wait(self.pause * 2**attempt):
                break
        self._dropped(message["event"], str(failure))

    def _post(self, body: bytes) -> tuple[str | None, bool]:
        """The reason for a failure, or None, and whether a retry may succeed."""
        headers = {"Content-Type": "application/json", "User-Agent": "evertune", **self._headers}
        request = urllib.request.Request(self._url, body, headers, method="POST")
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout):
                return None, True
        except urllib.error.HTTPError as error:
            error.close()
            return f"HTTP {error.code}", error.code >= 500 or error.code in _WORTH_RETRYING
        except urllib.error.URLError as error:
            # Only the type: the text of an error may contain the URL, which is secret.
            return type(error.reason).__name__, True
        except (OSError, HTTPException) as error:
            return type(error).__name__, True

    def _dropped(self, event: str, why: str) -> None:
        logger.warning("alert to %s is dropped: %s", self.host, why, extra={"event": "alert dropped", "dropped": event})


def _parts(url: str) -> SplitResult:
    """The parts of the URL of a webhook; the error does not show it, as it may be secret."""
    usable = False
    with suppress(ValueError):
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    if not usable:
        raise ValueError(
            "url must start with http:// or https:// and a host, and special characters of its password must be "
            "percent-encoded (it is not shown: it may be secret)"
        )
    return parts


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: a POST that follows one arrives as an empty GET, so that it counts as not delivered."""

    def redirect_request(self, *_: Any) -> None:
        return None
