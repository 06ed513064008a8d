"""Records from a Kafka topic."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from evertune.sources.base import Chunk, Incoming, Offset, Source, SourceError
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
_PAUSE = 0.1
_CLOSE_WAIT_MS = 2_000  # we never join the group; the library also waits so long for a commit when it is closed
_FETCH_WAIT_MS = 10  # a broker answers a connection's requests in turn: do not let one wait for new messages


class KafkaSource(Source):
    """Reads a Kafka topic whose messages are JSON objects.

    Where to read on is told by the offset alone, which is kept with the version that learnt what came before it, and
    never by the consumer group: so a rollback of the registry is a rollback of the reader, and nothing that other
    consumers or administrators do to the group loses a record. The group only shows how far the published versions
    have come, for the tools that watch its lag.

    :meth:`read` gives what the partitions held when it was called: all of the partition with the smallest number,
    then all of the next, each in the order of its offsets. The same offset and limit therefore give the same chunk
    while nothing arrives; what arrives for an early partition comes before what was left of a later one.

    A message that is no JSON object becomes a record with its ``error``; so does one without a value (a tombstone),
    because only its producer knows what it meant. Offsets without a message (compacted ones, the markers of
    transactions) are passed over; transactions that were aborted are not read, and open ones wait
    (``isolation.level``).

    Args:
        topic: its name.
        bootstrap_servers: ``"host:port"``, or several with commas.
        group: the consumer group whose offsets :meth:`commit` moves.
        settings: more settings of librdkafka, such as ``security.protocol`` or ``sasl.password``. ``${NAME}`` in a
            string stands for an environment variable.
        start: where a reader without an offset begins: ``"earliest"``, the oldest record that is kept, or
            ``"latest"``, only what arrives from now on (the first chunk is then empty; its offset says where "now"
            was).
        timeout: how many seconds to wait for the brokers, which may restart meanwhile, before giving up.

    Raises:
        ValueError: when an argument or one of ``settings`` is bad.
        ModuleNotFoundError: when ``confluent-kafka`` is not installed.

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
            raise ValueError(f"settings must not hold {', '.join(ours)}: the source sets it")
        self.topic, self.bootstrap_servers, self.start, self.timeout = topic, bootstrap_servers, start, timeout
        self._kafka = library("confluent_kafka", "kafka")
        self._trouble = ""  # what the library last said went wrong
        self._committed: str | None = None  # the answer to a commit: the reason why it failed, or nothing
        self._position: tuple[int, int] | None = None  # the partition and offset that the consumer gives next
        filled = {name: fill_in(value) if isinstance(value, str) else value for name, value in settings.items()}
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
            raise ValueError(f"a setting of the Kafka source is bad: {error.args[0].str()}") from None

    def read(self, offset: Offset | None, limit: int) -> Chunk:
        self._trouble = ""
        bounds = self._bounds()
        following = self._following(offset, bounds)
        records: list[Incoming] = []
        try:
            for partition, (_, end) in sorted(bounds.items()):
                following[partition] = self._take(partition, following[partition], end, limit, records)
        finally:
            if len(records) < limit:  # nothing is left to fetch ahead
                self._unassign()
        return Chunk(records, self._offset(following))

    def commit(self, offset: Offset) -> None:
        """Move the consumer group to ``offset``.

        Raises:
            SourceError: when the brokers refuse it. Nothing but the group's lag depends on it.
        """
        positions = [
            self._kafka.TopicPartition(self.topic, partition, following)
            for partition, following in self._parse(offset).items()
        ]
        self._unassign()  # so that polling for the answer takes no message
        self._committed = None
        self._consumer.commit(offsets=positions, asynchronous=True)
        deadline = time.monotonic() + self.timeout
        while self._committed is None:
            if (left := deadline - time.monotonic()) <= 0:
                raise self._silence()
            self._consumer.poll(min(left, _PAUSE))
        if self._committed:
            raise SourceError(f"{self} does not take the offset {json.dumps(offset)}: {self._committed}")

    def close(self) -> None:
        self._consumer.close()

    def __str__(self) -> str:
        return f"the Kafka topic {self.topic} at {self.bootstrap_servers}"

    def _bounds(self) -> dict[int, tuple[int, int]]:
        """The offset of the oldest message that each partition keeps, and the one after its newest."""
        topic = self._ask(self._consumer.list_topics, self.topic).topics[self.topic]
        if topic.error is not None:
            raise SourceError(f"{self} cannot be read: {topic.error.str()}. Create it, or correct its name or rights")
        bounds = {}
        for partition in topic.partitions:
            place = self._kafka.TopicPartition(self.topic, partition)
            bounds[partition] = self._ask(self._consumer.get_watermark_offsets, place)
        return bounds

    def _following(self, offset: Offset | None, bounds: dict[int, tuple[int, int]]) -> dict[int, int]:
        """The offset to read next in each partition.

        Raises:
            SourceError: when messages from there on are gone.
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
                f"{self} cannot be read on: {'; '.join(trouble)}. Its retention dropped records before they were read, "
                "or it was made anew. Bring them back, or read on without them from the offset "
                f"{json.dumps(self._offset(mended))}; then let the topic keep its records longer than the time "
                "between two reads"
            )
        return following

    def _take(self, partition: int, following: int, end: int, limit: int, records: list[Incoming]) -> int:
        """Append what a partition holds before ``end``, up to ``limit`` records in all; where it goes on."""
        if following >= end or len(records) >= limit:
            return following
        if self._position != (partition, following):
            self._consumer.assign([self._kafka.TopicPartition(self.topic, partition, following)])
        self._position = None
        while following < end and len(records) < limit:
            message = self._next()
            if message.error() is None:
                if message.offset() >= end:  # a gap up to the end; this message has arrived since
                    return end
                records.append(self._incoming(message))
                following = message.offset() + 1
            elif message.error().code() == self._kafka.KafkaError._PARTITION_EOF:
                following = max(following, min(message.offset(), end))  # a gap, or an end that has moved on since
            elif message.error().code() == self._kafka.KafkaError._AUTO_OFFSET_RESET:
                raise SourceError(f"{self} dropped records of partition {partition} as they were read, at {following}")
            else:
                raise SourceError(f"{self} cannot be read at {partition}@{following}: {message.error().str()}")
        self._position = partition, following
        return following

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
        """What the brokers answer, asked again until ``timeout`` when they are away or change their leader."""
        deadline = time.monotonic() + self.timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                answer = question(about, timeout=left)
            except self._kafka.KafkaException as error:
                self._note(error.args[0])
                if error.args[0].code() > 0 and not error.args[0].retriable():  # what a broker says, and means
                    raise SourceError(f"{self} cannot be read: {error.args[0].str()}") from error
                self._position = None
                self._consumer.poll(_PAUSE)  # a pause in which the library tells :meth:`_note` why
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
            "When it is back, reading goes on from the same offset"
        )

    def _note(self, error: Any) -> None:
        self._trouble = error.str()

    def _note_commit(self, error: Any, places: Sequence[Any]) -> None:
        errors = [error, *(place.error for place in places)]
        self._committed = next((error.str() for error in errors if error is not None), "")

    def _offset(self, following: Mapping[int, int]) -> Offset:
        return {"topic": self.topic, "next": {str(partition): following[partition] for partition in sorted(following)}}

    def _parse(self, offset: Offset) -> dict[int, int]:
        try:
            topic, following = offset["topic"], {int(p): int(n) for p, n in offset["next"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise SourceError(f"{json.dumps(offset)} is not an offset of a Kafka topic") from None
        if topic != self.topic:
            raise SourceError(f"the offset is one of the topic {topic}, but the source reads {self.topic}")
        return following
