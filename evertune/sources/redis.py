"""Records from a Redis stream."""

from __future__ import annotations

import json
from typing import Any

from evertune.sources.base import Chunk, Incoming, Offset, Source, SourceError
from evertune.sources.json import json_object
from evertune.utils.extras import library
from evertune.utils.secrets import fill_in, without_secrets

_RETRIES = 3
_FIRST = "0-0"


class RedisSource(Source):
    """Reads the entries of a Redis stream, in the order of their ids.

    The position is kept in the offset alone: the id of the last entry that was read, and the number of entries that
    had been added to the stream by then. From this number and the stream's counter, :meth:`read` detects whether
    unread entries were trimmed or deleted, or whether a server restarted without some of its data. Entries that have
    been read may be removed at any time. (An entry deleted between others is noticed when the reader reaches the end
    of the stream.)

    Args:
        stream: Key of the stream.
        url: ``redis://``, ``rediss://`` (TLS) or ``unix://``. ``${NAME}`` in it is replaced by the environment
            variable.
        field: Field of an entry that holds a record as a JSON object; None if the fields of an entry are the record,
            as strings.
        group: Consumer group whose position :meth:`commit` moves (and which it creates), for tools that monitor its
            lag; None for no group.
        timeout: Seconds to wait for an answer.

    Raises:
        ValueError: If an argument is invalid.
        ModuleNotFoundError: If ``redis`` is not installed.

    Example:
        >>> source = RedisSource("tickets", "redis://:secret@localhost:6379/0", field="json")
        >>> print(source)
        the Redis stream tickets at redis://:***@localhost:6379/0
        >>> source.close()
    """

    def __init__(
        self,
        stream: str,
        url: str = "redis://localhost:6379/0",
        field: str | None = None,
        group: str | None = None,
        timeout: float = 30.0,
    ) -> None:
        for name, value in (("stream", stream), ("field", field), ("group", group)):
            if value == "":
                raise ValueError(f"{name} must not be empty")
        if timeout <= 0:
            raise ValueError(f"timeout must be positive, got {timeout}")
        self.stream, self.field, self.group = stream, field, group
        self._redis = library("redis", "redis")
        retry = library("redis.retry", "redis").Retry(library("redis.backoff", "redis").ExponentialBackoff(), _RETRIES)
        url = fill_in(url)
        self._place = without_secrets(url)
        try:
            self._client: Any = self._redis.Redis.from_url(
                url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=retry
            )
        except (ValueError, TypeError):
            raise ValueError(
                f"not the URL of a Redis server: {self._place}; it must start with redis://, rediss:// or unix://, and "
                "special characters of its password must be percent-encoded"
            ) from None

    def read(self, offset: Offset | None, limit: int) -> Chunk:
        last, added = (_FIRST, None) if offset is None else self._parse(offset)
        try:
            with self._client.pipeline(transaction=True) as both:  # atomically: both answers describe the same state
                both.xinfo_stream(self.stream)
                both.xrange(self.stream, min=f"({last}", max="+", count=limit)
                facts, entries = both.execute(raise_on_error=False)
            for answer in (facts, entries):
                if isinstance(answer, Exception):
                    raise answer
        except self._redis.RedisError as error:
            raise self._error(error) from error
        if "entries-added" not in facts:
            raise SourceError(f"{self} needs Redis 7 or newer: older servers cannot detect lost entries")
        if added is None:
            added = facts["entries-added"] - facts["length"]
        self._check(facts, last, added, len(entries), limit)
        records = [self._incoming(entry.decode(), fields) for entry, fields in entries]
        return Chunk(records, self._offset(entries[-1][0].decode() if entries else last, added + len(entries)))

    def commit(self, offset: Offset) -> None:
        """Move the group to ``offset``, if there is a group.

        Raises:
            SourceError: If the server refuses it. Only the monitoring of the group's lag depends on it.
        """
        if self.group is None:
            return
        last, added = self._parse(offset)
        try:
            try:
                self._client.xgroup_setid(self.stream, self.group, last, entries_read=added)
            except self._redis.ResponseError as error:
                if not str(error).startswith("NOGROUP"):
                    raise
                self._client.xgroup_create(self.stream, self.group, last, entries_read=added)
        except self._redis.RedisError as error:
            raise self._error(error) from error

    def close(self) -> None:
        self._client.close()

    def __str__(self) -> str:
        return f"the Redis stream {self.stream} at {self._place}"

    def _check(self, facts: dict[str, Any], last: str, added: int, read: int, limit: int) -> None:
        """Check that none of the entries added since the offset is missing.

        Raises:
            SourceError: If one is.
        """
        expected = facts["entries-added"] - added
        first = facts["first-entry"]
        if first is None or _parts(first[0].decode()) > _parts(last):
            present = facts["length"]  # nothing that was read is left
        elif read < limit:
            present = read  # the chunk reaches the end
        else:
            present = max(expected, read)  # at least what was read; the rest is for a later chunk
        gone_back = expected < present or _parts(facts["last-generated-id"].decode()) < _parts(last)
        again = json.dumps(self._offset(last, facts["entries-added"] - present))
        if gone_back:
            raise SourceError(
                f"{self} has gone back: {added} entries had been added up to {last}, and now it counts "
                f"{facts['entries-added']} up to {facts['last-generated-id'].decode()}. It was recreated, or its "
                "server restarted without its latest data. Restore them, or read all that it holds now by starting "
                f"without an offset, or what comes after {last} from the offset {again}"
            )
        if expected > present:
            raise SourceError(
                f"{self} cannot be read further: {expected - present} entries after {last} were trimmed or deleted "
                f"before they were read. Restore them, or continue without them from the offset {again}; then let the "
                "stream keep its entries longer than the time between two reads"
            )

    def _incoming(self, entry: str, fields: dict[bytes, bytes]) -> Incoming:
        origin = f"{self.stream}@{entry}"
        try:
            if self.field is None:
                return Incoming(origin, {_text(name): _text(value) for name, value in fields.items()})
            data = fields.get(self.field.encode())
            if data is None:
                raise ValueError(f"no field {self.field!r}")
            return Incoming(origin, json_object(data))
        except ValueError as error:
            parts = (
                f"{name.decode(errors='replace')}={value.decode(errors='replace')}" for name, value in fields.items()
            )
            return Incoming(origin, None, str(error), " ".join(parts))

    def _error(self, error: Exception) -> SourceError:
        if isinstance(error, self._redis.ConnectionError | self._redis.TimeoutError):
            return SourceError(f"{self} does not answer: {error}. Once it does, reading resumes from the same offset")
        if "no such key" in str(error):
            return SourceError(
                f"{self} does not exist. Correct its name, or create it empty: "
                f"XGROUP CREATE {self.stream} evertune $ MKSTREAM"
            )
        return SourceError(f"{self} cannot be read: {error}")

    def _offset(self, last: str, added: int) -> Offset:
        return {"stream": self.stream, "id": last, "added": added}

    def _parse(self, offset: Offset) -> tuple[str, int]:
        try:
            stream, last, added = offset["stream"], str(offset["id"]), int(offset["added"])
            _parts(last)
        except (KeyError, TypeError, ValueError):
            raise SourceError(f"{json.dumps(offset)} is not an offset of a Redis stream") from None
        if stream != self.stream:
            raise SourceError(f"the offset belongs to the stream {stream}, but the source reads {self.stream}")
        return last, added


def _parts(entry: str) -> tuple[int, int]:
    milliseconds, number = entry.split("-")
    return int(milliseconds), int(number)


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ValueError("not valid UTF-8") from None
