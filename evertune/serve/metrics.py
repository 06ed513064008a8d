"""The metrics of ``evertune serve``, in the format of Prometheus."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from evertune.serve.messages import Answer, TaskAnswer
from evertune.utils.extras import library

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_TENTHS = tuple(n / 10 for n in range(1, 11))
OF_ALL_PROCESSES = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable with the folder in which the processes of a server share their counts."""
_MOST_CLASSES = 200
"""Classes that get a time series of their own; the rest is ``other``, so that a large head does not fill Prometheus."""


class ServeMetrics:
    """What happens in the server: requests, batches and answers.

    Where several processes share a port, with :data:`OF_ALL_PROCESSES` set, the page of each has the counts of all:
    sums, and ``evertune_serve_version`` with the ``pid`` of each process.

    Raises:
        ModuleNotFoundError: If the extra ``serve`` is not installed.
    """

    def __init__(self) -> None:
        prometheus = library("prometheus_client", "serve")
        self.registry = prometheus.CollectorRegistry()
        self._exposition = library("prometheus_client.exposition", "serve")
        counter, gauge, histogram = prometheus.Counter, prometheus.Gauge, prometheus.Histogram
        own = {"registry": self.registry}

        self._requests = counter(
            "evertune_serve_requests_total", "Requests by endpoint and status", ("endpoint", "status"), **own
        )
        self._seconds = histogram(
            "evertune_serve_request_seconds", "Time from headers to answer", ("endpoint",), buckets=_SECONDS, **own
        )
        self._refused = counter(
            "evertune_serve_refused_total", "Requests that were refused, by the reason", ("reason",), **own
        )
        self._batch = histogram("evertune_serve_batch_size", "Records of a batch", ("role",), buckets=_SIZES, **own)
        self._forward = histogram(
            "evertune_serve_batch_seconds", "Time of a batch in the model", ("role",), buckets=_SECONDS, **own
        )
        self._confidence = histogram(
            "evertune_serve_confidence", "Confidence of answers", ("role",), buckets=_TENTHS, **own
        )
        self._answers = counter("evertune_serve_answers_total", "Answers by class", ("role", "label"), **own)
        text = "Number of the version that answers"
        self._version = gauge("evertune_serve_version", text, ("role",), multiprocess_mode="liveall", **own)
        self._swaps = counter("evertune_serve_swaps_total", "Versions swapped in while serving", ("role",), **own)
        self._compared = counter(
            "evertune_serve_shadow_total", "Answers of the shadow compared with those given", ("result",), **own
        )
        self._canary = counter(
            "evertune_serve_canary_failures_total",
            "Requests that production answered for the canary",
            ("error",),
            **own,
        )
        text = "1 once the answers of a version have changed since its first ones"
        self._drift = gauge("evertune_serve_drift", text, ("signal",), multiprocess_mode="livemax", **own)
        self._log = counter("evertune_serve_log_lines_total", "Lines of the request log", ("result",), **own)
        text = "Records that wait for their turn"
        self._queued = gauge("evertune_serve_queued_records", text, ("role",), multiprocess_mode="livesum", **own)
        self._classes: set[str] = set()

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """Count a request that was answered, well or not."""
        self._requests.labels(endpoint, status).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def refused(self, reason: str) -> None:
        """Count a request that was refused."""
        self._refused.labels(reason).inc()

    def batch(self, role: str, n_records: int, seconds: float) -> None:
        """Count a batch of a role's model."""
        self._batch.labels(role).observe(n_records)
        self._forward.labels(role).observe(seconds)

    def queued(self, role: str, n_records: int) -> None:
        """Report how many records wait for their turn."""
        self._queued.labels(role).set(n_records)

    def answered(self, role: str, answers: Sequence[Answer | TaskAnswer]) -> None:
        """Count the answers of a role's model by class and confidence; those of other tasks have neither."""
        confidence = self._confidence.labels(role)
        for answer in answers:
            if isinstance(answer, TaskAnswer):
                self._answers.labels(role, "").inc()
                continue
            confidence.observe(answer.confidence)
            for label in [answer.label] if isinstance(answer.label, str) else answer.label:
                self._answers.labels(role, self._shown(label)).inc()

    def _shown(self, label: str) -> str:
        if label not in self._classes:
            if len(self._classes) >= _MOST_CLASSES:
                return "other"
            self._classes.add(label)
        return label

    def version(self, role: str, number: int, swapped: bool = False) -> None:
        """Report the version that answers in a role."""
        self._version.labels(role).set(number)
        if swapped:
            self._swaps.labels(role).inc()

    def canary_failed(self, error: str) -> None:
        """Count a request that the canary did not answer, by the name of the error."""
        self._canary.labels(error).inc()

    def compared(self, result: str, answers: int = 1) -> None:
        """Count answers of the shadow: ``agrees``, ``differs``, ``dropped`` or ``failed``."""
        self._compared.labels(result).inc(answers)

    def drift(self, signal: str, changed: bool) -> None:
        """Report whether the ``confidence`` or the ``classes`` of the answers have changed."""
        self._drift.labels(signal).set(float(changed))

    def logged(self, result: str, lines: int = 1) -> None:
        """Count lines of the request log: ``written``, ``dropped`` or ``failed``."""
        self._log.labels(result).inc(lines)

    def page(self, accept: str) -> tuple[bytes, str]:
        """The page for Prometheus and its media type.

        Args:
            accept: The header of that name.
        """
        encode, kind = self._exposition.choose_encoder(accept)
        return encode(self._of_all_processes()), kind

    def _of_all_processes(self) -> Any:
        if OF_ALL_PROCESSES not in os.environ:
            return self.registry
        registry = library("prometheus_client", "serve").CollectorRegistry()
        library("prometheus_client.multiprocess", "serve").MultiProcessCollector(registry)
        return registry
