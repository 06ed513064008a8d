"""The request log of ``evertune serve`` as a source: requests, and the labels that came for them later."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from evertune.sources.base import Chunk, Incoming, Offset
from evertune.sources.folder import FolderSource


class RequestLogSource(FolderSource):
    """Reads the log that ``evertune serve --log.path FOLDER`` writes, so that a model learns from its own requests.

    A request becomes a record with its text and without a label; feedback becomes a record with a label and without a
    text. Both have the same ``id`` and a ``time``, by which :class:`~evertune.sources.LabelJoin` joins them. A request
    also has ``predicted``, ``confidence`` and ``version``, which a schema may declare. Answers of a shadow are left
    out. A line without ``kind`` is a record as it is: put a file of labelled records into the folder to begin with.

    Args:
        path: The folder, or a URL that fsspec supports.
        text: Name of the field that gets the text, or names of the two fields of a pair.
        label: Name of the field that gets the label.
        id: Name of the field that gets the id.
        time: Name of the field that gets the time.
        storage_options: Options of fsspec for the URL, see :class:`~evertune.sources.FolderSource`.

    Raises:
        ValueError: If fsspec does not support the URL, or two fields have the same name.

    Example::

        source:
          class_path: evertune.sources.RequestLogSource
          init_args: {path: requests}
        schema: {id: id, time: time, fields: {id: str, time: datetime, text: str, label: str}}
        label_join: {time: time, window: 30d}
    """

    def __init__(
        self,
        path: str,
        text: str | list[str] = "text",
        label: str = "label",
        id: str = "id",
        time: str = "time",
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(path, pattern="**/*.jsonl", storage_options=storage_options)
        self._texts = [text] if isinstance(text, str) else list(text)
        self._label, self._id, self._time = label, id, time
        names = [*self._texts, label, id, time]
        if len(set(names)) < len(names) or len(self._texts) not in (1, 2):
            raise ValueError(f"text (one field or two), label, id and time must be different fields, got {names}")

    def read(self, offset: Offset | None, limit: int) -> Chunk:
        """The next records, at most ``limit``; see :meth:`FolderSource.read`."""
        while True:
            chunk = super().read(offset, limit)
            records = [record for line in chunk.records if (record := self._record(line)) is not None]
            if records or not chunk.records:  # else all of them were left out: read on
                return Chunk(records, chunk.offset)
            offset = chunk.offset

    def _record(self, line: Incoming) -> Incoming | None:
        """The record of a line; None for one that is left out."""
        if line.value is None or "kind" not in line.value:
            return line
        kind = line.value["kind"]
        if kind == "shadow":
            return None
        try:
            return replace(line, value=self._fields(kind, line.value))
        except ValueError as error:
            return Incoming(line.origin, None, str(error), str(line.value))

    def _fields(self, kind: Any, line: dict[str, Any]) -> dict[str, Any]:
        """The fields of the record of a request or of feedback; raises ValueError with the reason if it is neither."""
        record = {self._id: line.get("id"), self._time: line.get("time")}
        if kind == "feedback":
            return {**record, self._label: line.get("label")}
        if kind != "request":
            raise ValueError(f"not a line of a request log: its kind is {str(kind)[:80]!r}")
        text = line.get("text")
        texts = text if isinstance(text, list) and not isinstance(text[0], dict) else [text]  # or a conversation
        if len(texts) != len(self._texts):
            names = ", ".join(self._texts)
            raise ValueError(f"the number of texts of the request is {len(texts)}, but the source names {names}")
        answer = {"predicted": line.get("label"), "confidence": line.get("confidence"), "version": line.get("version")}
        return {**answer, **record, **dict(zip(self._texts, texts, strict=True))}
