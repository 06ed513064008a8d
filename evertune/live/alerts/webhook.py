"""Alerts to a URL."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http.client import HTTPException
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from evertune.live.alerts.base import QueuedAlert
from evertune.utils.secrets import fill_in

# Request timeout, too early, too many requests: the only client errors that may go away by themselves.
_WORTH_RETRYING = (408, 425, 429)


class Webhook(QueuedAlert):
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
        super().__init__(str(parts.hostname), events, timeout, retries, pause)

    def deliver(self, message: dict[str, Any]) -> tuple[str | None, bool]:
        """POST an event as JSON."""
        body = json.dumps(message, default=str).encode()
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
