"""The request log: what was asked and answered, and the labels that came later, masked, in a folder as a source."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import re
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from evertune.serve.messages import Answer, Feedback, Record, TaskAnswer
from evertune.serve.metrics import ServeMetrics
from evertune.serve.settings import LogSettings
from evertune.sources.masking import Masker, PatternMasker

_MOST_WAITING = 20_000  # lines; beyond it, they are dropped and counted
_MOST_AT_ONCE = 1_000
_DAY = 86_400.0

logger = logging.getLogger("evertune.serve")


class RequestLog:
    """Appends masked lines to files of a folder, from a thread: no request waits for the disk.

    Each process writes files of its own, named by their time, so that several may share a folder. A line has ``kind``
    (``request``, ``feedback`` or ``shadow``), ``id`` and ``time``; :class:`~evertune.sources.RequestLogSource` reads
    them. A full disk stops no request: lines are dropped and counted in ``evertune_serve_log_lines_total``, and the
    failure is logged once.

    Args:
        settings: See :class:`LogSettings`.
        masker: Takes personal data out of texts, ids and labels. Default: :class:`PatternMasker`.

    Raises:
        OSError: If the folder cannot be made.
    """

    def __init__(self, settings: LogSettings, masker: Masker | None = None) -> None:
        assert settings.path is not None
        self.settings, self._masker = settings, masker or PatternMasker()
        self._folder = Path(settings.path)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(_MOST_WAITING)
        self._metrics: ServeMetrics | None = None
        self._thread: threading.Thread | None = None
        self._file: IO[bytes] | None = None
        self._begun = 0.0
        self._failed = False

    def start(self, metrics: ServeMetrics) -> None:
        """Begin to write."""
        self._metrics = metrics
        self._thread = threading.Thread(target=self._write_all, name="evertune-log")
        self._thread.start()

    def close(self) -> None:
        """Write what waits, and end."""
        if self._thread is not None:
            self._lines.put(None)
            self._thread.join()
            self._thread = None

    def takes(self, id: str) -> bool:
        """Whether a record is in the share that is logged: by a hash of its id, so that its label is treated alike."""
        return self.settings.share >= 1 or share_of(id, "log") < self.settings.share

    def requests(self, records: Sequence[Record], answers: Sequence[Answer | TaskAnswer], role: str) -> None:
        """Log records and their answers.

        Args:
            records: The records.
            answers: The answers, in the same order.
            role: Which version answered: ``production`` or ``canary``; ``shadow`` for answers that nobody got.
        """
        now = _now()
        for record, answer in zip(records, answers, strict=True):
            if self.takes(record.id):
                kind = "shadow" if role == "shadow" else "request"
                line: dict[str, Any] = {"kind": kind, "id": record.id, "time": now}
                if role != "shadow":
                    line["text"] = record.input
                self._put({**line, **_summary(answer), "role": role})

    def feedback(self, labels: Sequence[Feedback]) -> int:
        """Log labels that came later; returns how many are in the share that is logged."""
        now = _now()
        taken = [one for one in labels if self.takes(one.id)]
        for one in taken:
            self._put({"kind": "feedback", "id": one.id, "time": now, "label": one.label})
        return len(taken)

    # --- the thread

    def _put(self, line: dict[str, Any]) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._count("dropped")

    def _write_all(self) -> None:
        while True:
            lines = [self._lines.get()]
            with suppress(queue.Empty):
                while lines[-1] is not None and len(lines) < _MOST_AT_ONCE:
                    lines.append(self._lines.get_nowait())
            self._write([line for line in lines if line is not None])
            if lines[-1] is None:
                if self._file is not None:
                    self._file.close()
                return

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        encoded = [data for line in lines if (data := self._encoded(line)) is not None]
        if not encoded:
            return
        try:
            file = self._current()
            file.write(b"".join(encoded))
            file.flush()
        except OSError as error:
            self._file = None  # perhaps half a line was written: the next go to another file
            self._count("failed", len(encoded))
            if not self._failed:
                logger.error("the request log cannot be written: %s", error, extra={"event": "error"})
            self._failed = True
            return
        self._failed = False
        self._count("written", len(encoded))

    def _encoded(self, line: dict[str, Any]) -> bytes | None:
        masked = dict(line)
        try:
            masked["id"] = self._masker.mask_id(line["id"])
            for name in ("text", "label"):
                if name in line:
                    masked[name] = self._masker.mask_value(line[name])
            return json.dumps(masked, ensure_ascii=False).encode() + b"\n"
        except Exception as error:  # of a masker: what is not masked must not be written, nor stop the others
            logger.warning("a line of the request log could not be masked: %s", type(error).__name__)
            self._count("failed")
            return None

    def _current(self) -> IO[bytes]:
        """The file to append to: a new one each day, and when the last has become too large."""
        if self._file is not None and (self._file.tell() > self.settings.max_bytes or time.time() - self._begun > _DAY):
            self._file.close()
            self._file = None
        if self._file is None:
            self._delete_old()
            self._begun = time.time()
            name = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{_host()}-{os.getpid()}.jsonl"
            descriptor = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            self._file = os.fdopen(descriptor, "ab")
        return self._file

    def _delete_old(self) -> None:
        if self.settings.keep_days is None:
            return
        for path in self._folder.glob("*.jsonl"):
            with suppress(FileNotFoundError):  # another process deletes them, too
                if path.stat().st_mtime < time.time() - self.settings.keep_days * _DAY:
                    path.unlink()

    def _count(self, result: str, lines: int = 1) -> None:
        if self._metrics is not None:
            self._metrics.logged(result, lines)


def share_of(id: str, what: str) -> float:
    """A number in [0, 1) that depends on an id alone, evenly distributed over ids.

    Args:
        id: The id.
        what: What is decided by it, so that two decisions are independent.
    """
    digest = hashlib.sha256(f"{what} {id}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:7]) / (1 << 56)


def _summary(answer: Answer | TaskAnswer) -> dict[str, Any]:
    if isinstance(answer, TaskAnswer):
        return {"label": answer.prediction, "version": answer.version}
    return {"label": answer.label, "confidence": round(answer.confidence, 6), "version": answer.version}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname())[:40]
