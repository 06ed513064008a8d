"""Records from a Kafka topic."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from evertune.sources.base import Chunk, Incoming, Offset, Source, SourceError
from evertune.sources.formats import digest
from evertune.sources.json import json_object
from evertune.utils.extras import library
from evertune.utils.secrets import fill_in

_OURS = (
    "bootstrap.servers",
    "group.id",
    "enable.auto.commit",
    "enable.auto.offset.store",
    "enable.partition.eof",
    "session.timeout.ms",
    "auto.offset.reset",
)
_Last = tuple[int, str]  # the offset of the last message that was read in a partition, and its fingerprint
_PAUSE = 0.1
_CLOSE_WAIT_MS = 2_000  # session timeout: unused, as we never join the group, but bounds the commit when closing
_FETCH_WAIT_MS = 10  # a broker answers a connection's requests in turn: a long fetch would delay those after it


class KafkaSource(Source):
    """Reads a Kafka topic whose messages are JSON objects.

    The position is kept in the offset alone, which is stored with the version that was trained on what came before,
    never in the consumer group: a rollback of the registry is therefore a rollback of the reader, and nothing that
    other consumers or administrators do to the group loses a record. The group only shows how far the published
    versions have read, for tools that monitor its lag.

    :meth:`read` returns what the partitions held when it was called: all of the partition with the smallest number,
    then all of the next, each in the order of its offsets. The same offset and limit therefore give the same chunk
    while nothing arrives; new messages of an early partition come before the rest of a later one.

    A message that is not a JSON object becomes a record with an ``error``; so does one without a value (a tombstone),
    because only its producer knows what it meant. Offsets without a message (compacted ones, transaction markers) are
    skipped; aborted transactions are not read, and open ones are waited for (``isolation.level``).

    A topic that was deleted and created again is an error, even if it holds more messages by now: the offset has a
    fingerprint of the last message that was read in each partition. It is compared before new messages of the partition
    are read, for as long as the topic keeps that message.

    Args:
        topic: Name of the topic.
        bootstrap_servers: ``"host:port"``, or several separated by commas.
        group: Consumer group whose offsets :meth:`commit` moves.
        settings: Further settings of librdkafka, such as ``security.protocol`` or ``sasl.password``. ``${NAME}`` in a
            string is replaced by the environment variable.
        start: Where a reader without an offset begins: at the oldest record that is kept (``"earliest"``), or with
            what arrives from now on (``"latest"``: the first chunk is then empty, and its offset marks "now").
        timeout: Seconds to wait for the brokers, which may be restarting, before giving up.

    Raises:
        ValueError: If an argument or one of ``settings`` is invalid.
        ModuleNotFoundError: If ``confluent-kafka`` is not installed.

    Example:
        >>> source = KafkaSource("tickets", "localhost:9092", settings={"client.id": "evertune"})
        >>> source.close()
    """

    def __init__(
        self,
        topic: str,
        bootstrap_servers: str,
        group: str = "evertune",
        settings: Mapping[str, str | int | float | bool] | None = None,
        start: Literal["earliest", "latest"] = "earliest",
        timeout: float = 30.0,
    ) -> None:
        for name, value in (("topic", topic), ("bootstrap_servers", bootstrap_servers), ("group", group)):
            if not value:
                raise ValueError(f"{name} must not be empty")
        if start not in ("earliest", "latest"):
            raise ValueError(f'start must be "earliest" or "latest", got {start!r}')
        if timeout <= 0:
            raise ValueError(f"timeout must be positive, got {timeout}")
        settings = dict(settings or {})
        if ours := [name for name in _OURS if name in settings]:
            raise ValueError(f"settings must not contain {', '.join(ours)}, which the source sets itself")
        self.topic, self.bootstrap_servers, self.start, self.timeout = topic, bootstrap_servers, start, timeout
        self._kafka = library("confluent_kafka", "kafka")
        self._trouble = ""  # the last error that the library reported
        self._committed: str | None = None  # result of a commit: None while pending, "" on success, else the error
        self._position: tuple[int, int] | None = None  # the partition and offset that the consumer returns next
        filled = fill_in(settings)
        ours_now = {
            "bootstrap.servers": bootstrap_servers,
            "group.id": group,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "enable.partition.eof": True,
            "session.timeout.ms": _CLOSE_WAIT_MS,
            "auto.offset.reset": "error",
            "error_cb": self._note,
            "on_commit": self._note_commit,
        }
        try:
            self._consumer = self._kafka.Consumer(
                {"fetch.wait.max.ms": _FETCH_WAIT_MS, **filled, **ours_now}, logger=logging.getLogger(__name__)
            )
        except self._kafka.KafkaException as error:
            raise ValueError(f"a setting of the Kafka source is invalid: {error.args[0].str()}") from None

    def read(self, offset: Offset | None, limit: int) -> Chunk:
        self._trouble = ""
        bounds = self._bounds()
        following = self._following(offset, bounds)
        last = {} if offset is None else self._parse_last(offset)
        records: list[Incoming] = []
        try:
            for partition, span in sorted(bounds.items()):
                following[partition] = self._take(partition, following[partition], span, limit, records, last)
        except _RecreatedError as error:
            again = self._offset({partition: low for partition, (low, _) in bounds.items()})
            raise SourceError(
                f"{self} is not the one that was read: {error}. It was deleted and created again. Restore it, or read "
                f"all that it holds now from the offset {json.dumps(again)}"
            ) from None
        finally:
            if len(records) < limit:  # nothing is left to prefetch
                self._unassign()
        return Chunk(records, self._offset(following, last))

    def commit(self, offset: Offset) -> None:
        """Move the consumer group to ``offset``.

        Raises:
            SourceError: If the brokers refuse it. Only the monitoring of the group's lag depends on it.
        """
        positions = [
            self._kafka.TopicPartition(self.topic, partition, following)
            for partition, following in self._parse(offset).items()
        ]
        self._unassign()  # so that polling for the answer does not consume a message
        self._committed = None
        self._consumer.commit(offsets=positions, asynchronous=True)
        deadline = time.monotonic() + self.timeout
        while self._committed is None:
            if (left := deadline - time.monotonic()) <= 0:
                raise self._silence()
            self._consumer.poll(min(left, _PAUSE))
        if self._committed:
            raise SourceError(f"{self} rejected the commit of the offset {json.dumps(offset)}: {self._committed}")

    def close(self) -> None:
        self._consumer.close()

    def __str__(self) -> str:
        return f"the Kafka topic {self.topic} at {self.bootstrap_servers}"

    def _bounds(self) -> dict[int, tuple[int, int]]:
        """The offset of the oldest message that each partition keeps, and the one after its newest."""
        topic = self._ask(self._consumer.list_topics, self.topic).topics[self.topic]
        if topic.error is not None:
            raise SourceError(f"{self} cannot be read: {topic.error.str()}. Create it, or check its name and ACLs")
        bounds = {}
        for partition in topic.partitions:
            place = self._kafka.TopicPartition(self.topic, partition)
            bounds[partition] = self._ask(self._consumer.get_watermark_offsets, place)
        return bounds

    def _following(self, offset: Offset | None, bounds: dict[int, tuple[int, int]]) -> dict[int, int]:
        """The offset to read next in each partition.

        Raises:
            SourceError: If messages from there on are gone.
        """
        if offset is None:
            return {partition: low if self.start == "earliest" else end for partition, (low, end) in bounds.items()}
        known = self._parse(offset)
        following = {partition: known.get(partition, 0) for partition in bounds}  # a partition added since is unread
        trouble = [f"partition {partition} is gone" for partition in known if partition not in bounds]
        mended = dict(following)
        for partition, (low, end) in bounds.items():
            if following[partition] < low:
                lost = low - following[partition]
                trouble.append(f"up to {lost} records of partition {partition} (from {following[partition]}) are gone")
                mended[partition] = low
            elif following[partition] > end:
                trouble.append(f"partition {partition} was read up to {following[partition]} and now ends at {end}")
                mended[partition] = low
        if trouble:
            raise SourceError(
                f"{self} cannot be read further: {'; '.join(trouble)}. Its retention dropped records before they were "
                "read, or it was recreated. Restore them, or continue without them from the offset "
                f"{json.dumps(self._offset(mended))}; then set a retention longer than the time between two reads"
            )
        return following

    def _take(
        self,
        partition: int,
        following: int,
        span: tuple[int, int],
        limit: int,
        records: list[Incoming],
        last: dict[int, _Last],
    ) -> int:
        """Append a partition's records before its end, up to ``limit`` in all; returns the offset to read next."""
        low, end = span
        if following >= end or len(records) >= limit:
            return following
        known = last.get(partition)
        if self._position != (partition, following):
            # From the last message that was read, if it is still there: it is compared and passed over.
            start = known[0] if known is not None and low <= known[0] else following
            self._consumer.assign([self._kafka.TopicPartition(self.topic, partition, start)])
        self._position = None
        message = heard = None
        while following < end and len(records) < limit:
            heard = self._next()
            if heard.error() is not None:
                following = max(following, min(self._end(heard, partition, following), end))
            elif heard.offset() >= end:  # a gap up to the end; this message has arrived since
                following = end
            elif heard.offset() >= following:
                message = heard
                records.append(self._incoming(message))
                following = message.offset() + 1
            elif known is not None and heard.offset() == known[0] and _fingerprint(heard) != known[1]:
                raise _RecreatedError(f"message {known[0]} of partition {partition} is another one")
        if message is not None:
            last[partition] = message.offset(), _fingerprint(message)
        if heard is not None and heard.offset() < following:  # else it has consumed a message that is not taken
            self._position = partition, following
        return following

    def _end(self, heard: Any, partition: int, following: int) -> int:
        """The offset of the end of a partition, if this is what was heard: there is a gap, or the end has moved on."""
        code, errors = heard.error().code(), self._kafka.KafkaError
        if code == errors._PARTITION_EOF:
            return int(heard.offset())
        if code == errors._AUTO_OFFSET_RESET:
            raise SourceError(f"{self} dropped records of partition {partition} as they were read, at {following}")
        raise SourceError(f"{self} cannot be read at {partition}@{following}: {heard.error().str()}")

    def _incoming(self, message: Any) -> Incoming:
        origin = f"{self.topic}[{message.partition()}]@{message.offset()}"
        data = message.value()
        if data is None:
            return Incoming(origin, None, "no value (a tombstone)")
        try:
            return Incoming(origin, json_object(data))
        except ValueError as error:
            return Incoming(origin, None, str(error), data.decode(errors="replace"))

    def _next(self) -> Any:
        deadline = time.monotonic() + self.timeout
        while (left := deadline - time.monotonic()) > 0:
            message = self._consumer.poll(left)
            if message is not None:
                return message
        raise self._silence()

    def _ask(self, question: Callable[..., Any], about: Any) -> Any:
        """The answer of the brokers. Retried until ``timeout`` while they are away or elect a new leader."""
        deadline = time.monotonic() + self.timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                answer = question(about, timeout=left)
            except self._kafka.KafkaException as error:
                self._note(error.args[0])
                if error.args[0].code() > 0 and not error.args[0].retriable():  # a permanent error of a broker
                    raise SourceError(f"{self} cannot be read: {error.args[0].str()}") from error
                self._position = None
                self._consumer.poll(_PAUSE)  # waits, and lets the library report the cause to :meth:`_note`
            else:
                if answer is not None:
                    return answer
        raise self._silence()

    def _unassign(self) -> None:
        self._consumer.unassign()
        self._position = None

    def _silence(self) -> SourceError:
        reason = f": {self._trouble}" if self._trouble else ""
        return SourceError(
            f"{self} does not answer within {self.timeout:g} seconds{reason}. "
            "Once it does, reading resumes from the same offset"
        )

    def _note(self, error: Any) -> None:
        self._trouble = error.str()

    def _note_commit(self, error: Any, places: Sequence[Any]) -> None:
        errors = [error, *(place.error for place in places)]
        self._committed = next((error.str() for error in errors if error is not None), "")

    def _offset(self, following: Mapping[int, int], last: Mapping[int, _Last] | None = None) -> Offset:
        offset: Offset = {
            "topic": self.topic,
            "next": {str(partition): at for partition, at in sorted(following.items())},
        }
        if last:
            offset["last"] = {str(partition): list(mark) for partition, mark in sorted(last.items())}
        return offset

    def _parse(self, offset: Offset) -> dict[int, int]:
        try:
            topic, following = offset["topic"], {int(p): int(n) for p, n in offset["next"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise SourceError(f"{json.dumps(offset)} is not an offset of a Kafka topic") from None
        if topic != self.topic:
            raise SourceError(f"the offset belongs to the topic {topic}, but the source reads {self.topic}")
        return following

    def _parse_last(self, offset: Offset) -> dict[int, _Last]:
        try:
            return {
                int(partition): (int(place), str(mark)) for partition, (place, mark) in offset.get("last", {}).items()
            }
        except (TypeError, ValueError, AttributeError):
            raise SourceError(f"{json.dumps(offset)} is not an offset of a Kafka topic") from None


class _RecreatedError(Exception):
    """The topic is another one of the same name."""


def _fingerprint(message: Any) -> str:
    return digest(f"{message.timestamp()} ".encode() + (message.value() or b""), 8)
