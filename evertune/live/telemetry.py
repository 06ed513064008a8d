"""How a service is monitored: metrics, a health endpoint, and structured logs."""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TextIO

from evertune.utils.extras import library
from evertune.utils.secrets import without_secrets

logger = logging.getLogger("evertune.live")

_SECONDS = (10, 30, 60, 120, 300, 600, 1_800, 3_600, 7_200, 14_400, 43_200, 86_400)
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class Telemetry:
    """The metrics of ``evertune watch`` in the format of Prometheus, and whether the service is healthy.

    The service is unhealthy if its loop has made no progress for ``stale_after`` seconds, or if its last ``max_errors``
    updates have all failed. An unreachable source does not make it unhealthy, as a restart would not help; it is
    reported by ``evertune_source_up`` and, as a message, by the health endpoint.

    Args:
        stale_after: Seconds without a :meth:`beat` after which the service is unhealthy.
        max_errors: Number of failed updates in a row after which the service is unhealthy. Default: 3.

    Raises:
        ModuleNotFoundError: If the extra ``live`` is not installed.
    """

    def __init__(self, stale_after: float, max_errors: int = 3) -> None:
        prometheus = library("prometheus_client", "live")
        self.stale_after, self.max_errors = stale_after, max_errors
        self.registry = prometheus.CollectorRegistry()
        self._gauge = prometheus.Gauge
        self._readings: dict[str, Any] = {}
        self._last_beat = time.monotonic()
        self._errors = 0  # updates that failed in a row
        self._facts: dict[str, Any] = {
            "production": None,
            "pending": 0,
            "updating": False,
            "source": "ok",
            "readings": {},
        }
        self._server: ThreadingHTTPServer | None = None

        def gauge(name: str, text: str) -> Any:
            return prometheus.Gauge(f"evertune_{name}", text, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Any:
            return prometheus.Counter(f"evertune_{name}", text, labels, registry=self.registry)

        gauge("healthy", "1 when /healthz answers 200").set_function(lambda: float(not self._why_unhealthy()))
        self._source_up = gauge("source_up", "0 while the source cannot be read")
        self._source_up.set(1)
        self._production = gauge("production_version", "Number of the version in production, 0 before the first")
        self._accuracy = gauge(
            "production_accuracy", "Average accuracy of the version in production on held-out records"
        )
        self._accuracy.set(math.nan)  # unknown
        text = "Values of the last verdict: of production, of the new version, and the gate's limit"
        self._gate = prometheus.Gauge("evertune_gate_value", text, ("check", "slice", "of"), registry=self.registry)
        text = "1 for each check of the last verdict that passed, 0 if it refused, NaN if it cannot tell"
        self._gate_passed = prometheus.Gauge("evertune_gate_passed", text, ("check", "slice"), registry=self.registry)
        self._pending = gauge("pending_records", "Records that production has not learned")
        self._new = gauge("new_records", "Pending records that no update was tried on")
        self._last_update = gauge("last_update_timestamp", "When the last update was tried, in Unix seconds")
        self._updating = gauge("updating", "1 while an update is under way")
        self._read = counter("read_records_total", "Records read from the source")
        self._quarantined = counter("quarantined_records_total", "Records put into quarantine when they were read")
        self._updates = counter("updates_total", "Updates by what became of them", "outcome")
        self._failures = counter("errors_total", "Failures of the service by where they happened", "where")
        self._seconds = prometheus.Histogram(
            "evertune_update_seconds", "How long updates took", buckets=_SECONDS, registry=self.registry
        )

    # --- events

    def beat(self) -> None:
        """Note that the loop is alive."""
        self._last_beat = time.monotonic()

    def took_in(self, read: int, quarantined: int) -> None:
        """Count records as they are read."""
        self._read.inc(read)
        self._quarantined.inc(quarantined)

    def stands(self, production: int | None, pending: int, new: int, last_update: datetime | None) -> None:
        """Report which version is in production, and how many records are pending."""
        self._facts |= {"production": production, "pending": pending}
        self._production.set(production or 0)
        self._pending.set(pending)
        self._new.set(new)
        if last_update is not None:
            self._last_update.set(last_update.timestamp())

    def serves(self, accuracy: float | None) -> None:
        """Report the average accuracy of the version in production; None if it was not measured."""
        self._accuracy.set(math.nan if accuracy is None else accuracy)

    def judged(self, checks: Any) -> None:
        """Report the checks of a verdict, as :meth:`~evertune.gate.verdict.Verdict.to_dict` lists them.

        They come from another process: what is not a list of checks is left out.
        """
        self._gate.clear()
        self._gate_passed.clear()
        for check in checks if isinstance(checks, list) else []:
            if not isinstance(check, dict):
                continue
            place = (str(check.get("name")), str(check.get("slice")))
            passed = check.get("passed")
            self._gate_passed.labels(*place).set(math.nan if passed is None else bool(passed))
            values = {"production": "champion", "new": "challenger", "limit": "limit"}
            for name, key in values.items():
                if isinstance(check.get(key), int | float):
                    self._gate.labels(*place, name).set(check[key])

    def measured(self, readings: Mapping[str, float]) -> None:
        """Report the readings of a trigger: ``drift_score`` becomes the metric ``evertune_drift_score``."""
        for name, value in readings.items():
            if name not in self._readings:
                text = "As the trigger has last measured it"
                self._readings[name] = self._gauge(f"evertune_{name}", text, registry=self.registry)
            self._readings[name].set(value)
        self._facts["readings"] = {name: value for name, value in readings.items() if math.isfinite(value)}

    def updating(self, under_way: bool) -> None:
        """Report whether an update is in progress."""
        self._facts["updating"] = under_way
        self._updating.set(under_way)

    def updated(self, outcome: str, seconds: float) -> None:
        """Count an update. ``"error"`` counts towards ``max_errors``; ``"interrupted"`` neither adds to nor resets that
        count."""
        self._updates.labels(outcome).inc()
        self._seconds.observe(seconds)
        if outcome != "interrupted":
            self._errors = self._errors + 1 if outcome == "error" else 0

    def failed(self, where: str, words: str) -> None:
        """Count a failure; a failure of the ``source`` is shown until it has :meth:`recovered`."""
        self._failures.labels(where).inc()
        if where == "source":
            self._source_up.set(0)
            self._facts["source"] = words

    def recovered(self, where: str) -> None:
        """Report that something that had failed works again."""
        if where == "source":
            self._source_up.set(1)
            self._facts["source"] = "ok"

    # --- state and endpoints

    @property
    def health(self) -> dict[str, Any]:
        """The state as JSON: ``healthy``, ``why`` not (messages), ``production``, ``pending``, ``updating``,
        ``source``, and the ``readings`` of the trigger."""
        why = self._why_unhealthy()
        return {"healthy": not why, "why": why, **self._facts}

    def _why_unhealthy(self) -> list[str]:
        why = []
        silent = time.monotonic() - self._last_beat
        if silent > self.stale_after:
            why.append(f"the loop has stood still for {silent:.0f} s")
        if self._errors >= self.max_errors:
            why.append(f"the last {self._errors} updates failed")
        return why

    def serve(self, port: int, host: str = "127.0.0.1") -> int:
        """Serve ``/metrics`` and ``/healthz`` from a thread; 200, or 503 if unhealthy, with :attr:`health` as JSON.

        Args:
            port: Port to listen on; 0 for any free port.
            host: Address to listen on. Default: this machine only, as there is no password.

        Returns:
            The port that is listened on.

        Raises:
            OSError: If the port is taken.
        """
        try:
            self._server = _Server((host, port), _handler(self))
        except OSError as error:
            raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror or error}") from error
        threading.Thread(target=self._server.serve_forever, name="evertune-telemetry", daemon=True).start()
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log at debug level only: a client that hangs up is not an error of the service."""
        logger.debug("a request for metrics failed", exc_info=True)


def _handler(telemetry: Telemetry) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # seconds for a client that connects and sends nothing

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/metrics":
                choose = library("prometheus_client.exposition", "live").choose_encoder
                encode, kind = choose(self.headers.get("Accept", ""))
                self._answer(200, kind, encode(telemetry.registry))
            elif path == "/healthz":
                health = telemetry.health
                self._answer(200 if health["healthy"] else 503, "application/json", json.dumps(health).encode())
            else:
                self._answer(404, "text/plain", b"there are /metrics and /healthz\n")

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Do not log each request."""

    return Handler


class JsonLines(logging.Formatter):
    """One JSON object per line: ``time``, ``level``, ``event``, ``message``, and the fields that were passed as
    ``extra``.

    Secrets are masked: see :func:`~evertune.utils.secrets.without_secrets`.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", record.name),
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD and name != "event"}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(without_secrets(line), default=lambda value: without_secrets(str(value)))


class Words(logging.Formatter):
    """Time, level and message as plain text."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        # Further lines are indented: a label with a line break cannot look like an entry of its own.
        return without_secrets(super().format(record)).replace("\n", "\n    ")


def log_to(stream: TextIO | None = None, as_json: bool | None = None) -> logging.Handler:
    """Send the logs of this process to a stream: evertune's from level INFO, those of other libraries from WARNING.

    Args:
        stream: Stream to write to. Default: standard error.
        as_json: True for one JSON object per line (see :class:`JsonLines`), False for plain text. Default: plain text
            on a terminal, else JSON.

    Returns:
        The handler, now the only one of all loggers.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    as_json = not handler.stream.isatty() if as_json is None else as_json
    handler.setFormatter(JsonLines() if as_json else Words())
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.startswith("evertune"))
    # Libraries that install handlers of their own would print their messages twice, and not as JSON.
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger) and logger.handlers:  # Lightning's, for one
            # A handler that prints nothing stays: without it, a logger without a parent prints to standard error.
            logger.handlers[:] = [one for one in logger.handlers if isinstance(one, logging.NullHandler)]
            logger.propagate = True
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("evertune").setLevel(logging.INFO)
    logging.captureWarnings(True)
    return handler
