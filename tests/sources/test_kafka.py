"""KafkaSource against librdkafka's mock cluster; ``tests/helpers/servers.py`` says what that can and cannot do."""

from __future__ import annotations

import json
import logging
import threading

import pytest

from evertune.sources.base import SourceError
from evertune.sources.kafka import KafkaSource
from tests.helpers.servers import Kafka, check_contract, read_all


@pytest.fixture(scope="module")
def shared_broker():
    broker = Kafka()
    yield broker
    broker.kill()


@pytest.fixture
def broker():
    broker = Kafka()
    yield broker
    broker.kill()


@pytest.fixture
def topic(request, shared_broker):
    """A topic of two partitions that no other test uses."""
    name = request.node.name.replace("[", "-").replace("]", "")
    shared_broker.create(name, 2)
    return name


@pytest.fixture
def source(shared_broker, topic):
    source = KafkaSource(topic, shared_broker.address, timeout=20)
    yield source
    source.close()


def messages(start, stop):
    return [json.dumps({"text": f"text {i}"}).encode() for i in range(start, stop)]


def texts(records):
    return [record.value["text"] for record in records]


def test_contract(shared_broker, topic, source):
    def add(records):
        for record in records:
            shared_broker.produce(topic, [json.dumps(record).encode()], partition=int(record["id"]) % 2)

    check_contract(source, add)


def test_order_is_by_partition_and_then_by_offset(shared_broker, topic, source):
    shared_broker.produce(topic, messages(0, 3), partition=1)
    shared_broker.produce(topic, messages(3, 6), partition=0)
    chunk = source.read(None, 4)
    assert texts(chunk.records) == ["text 3", "text 4", "text 5", "text 0"]
    assert [record.origin for record in chunk.records] == [*(f"{topic}[0]@{i}" for i in range(3)), f"{topic}[1]@0"]
    assert {name: chunk.offset[name] for name in ("topic", "next")} == {"topic": topic, "next": {"0": 3, "1": 1}}


def test_bad_messages_carry_their_reason(shared_broker, topic, source):
    bad = [b"{", b"[1]", b"null", None, b"\xff", b'{"x": NaN}', b"[" * 100_000, b'{"text": "good"}', b""]
    bad += [b'{"x": 1e999}', b'{"x": "\\ud800"}', b'{"x": ' + b"[" * 200 + b"]" * 200 + b"}"]
    shared_broker.produce(topic, bad)
    records, _ = read_all(source)
    assert [record.value for record in records] == [*[None] * 7, {"text": "good"}, *[None] * 4]
    reasons = ["JSON (Exp", "but a list", "NoneType", "tombstone", "UTF-8", "NaN", "deeper", None, "JSON (Exp"]
    reasons += ["is too large", "surrogate", "deeper"]
    for record, reason in zip(records, reasons, strict=True):
        assert (record.error is None) if reason is None else reason in record.error, record
    assert records[0].raw == "{"
    assert records[4].raw == "�"


def test_markers_of_transactions_and_other_gaps_are_passed_over(shared_broker, topic, source):
    shared_broker.produce_marker(topic)
    shared_broker.produce(topic, messages(0, 2))
    shared_broker.produce_marker(topic)
    shared_broker.produce_marker(topic)
    records, offset = read_all(source)
    assert [record.origin for record in records] == [f"{topic}[0]@1", f"{topic}[0]@2"]
    assert offset["next"] == {"0": 5, "1": 0}
    for limit in (1, 2, 3):
        assert read_all(source, limit=limit) == (records, offset)
    shared_broker.produce_marker(topic)
    assert source.read(offset, 10).offset["next"]["0"] == 6
    shared_broker.produce(topic, messages(2, 4))
    assert texts(source.read(offset, 10).records) == ["text 2", "text 3"]


def test_start_latest_reads_what_arrives_from_now_on(shared_broker, topic):
    source = KafkaSource(topic, shared_broker.address, start="latest", timeout=20)
    shared_broker.produce(topic, messages(0, 3))
    chunk = source.read(None, 10)
    assert chunk.records == []
    shared_broker.produce(topic, messages(3, 5))
    assert texts(source.read(chunk.offset, 10).records) == ["text 3", "text 4"]
    source.close()


def test_a_partition_added_later_is_read_from_its_beginning(shared_broker, topic, source):
    shared_broker.produce(topic, messages(0, 2), partition=0)
    shared_broker.produce(topic, messages(2, 4), partition=1)
    offset = {"topic": topic, "next": {"0": 2}}  # of a time when there was but one partition
    assert texts(source.read(offset, 10).records) == ["text 2", "text 3"]
    latest = KafkaSource(topic, shared_broker.address, start="latest", timeout=20)
    assert texts(latest.read(offset, 10).records) == ["text 2", "text 3"]
    latest.close()


def test_records_dropped_before_they_were_read_are_an_error(shared_broker, topic, source):
    shared_broker.produce(topic, messages(0, 10), partition=0)
    shared_broker.produce(topic, messages(10, 20), partition=1)
    offset = source.read(None, 3).offset
    shared_broker.delete_before(topic, 0, 3)  # what has been read may go
    assert len(read_all(source, offset)[0]) == 17
    shared_broker.delete_before(topic, 0, 5)
    shared_broker.delete_before(topic, 1, 1)
    with pytest.raises(SourceError, match=r"up to 2 records of partition 0 \(from 3\).* 1 records of partition 1") as e:
        source.read(offset, 5)
    mended = {"topic": topic, "next": {"0": 5, "1": 1}}
    assert json.dumps(mended) in str(e.value)
    assert len(read_all(source, mended)[0]) == 5 + 9
    assert texts(source.read(None, 1).records) == ["text 5"]  # a new reader never had them


def test_a_topic_made_anew_is_an_error(shared_broker, topic, source):
    shared_broker.produce(topic, messages(0, 3))
    with pytest.raises(SourceError, match="partition 0 was read up to 30 and now ends at 3"):
        source.read({"topic": topic, "next": {"0": 30, "1": 0}}, 10)
    with pytest.raises(SourceError, match="partition 7 is gone"):
        source.read({"topic": topic, "next": {"0": 0, "7": 1}}, 10)


def test_foreign_offsets_and_missing_topics_are_errors(shared_broker, topic, source):
    with pytest.raises(SourceError, match="belongs to the topic other, but the source reads"):
        source.read({"topic": "other", "next": {}}, 10)
    with pytest.raises(SourceError, match="is not an offset of a Kafka topic"):
        source.read({"id": "1-0"}, 10)
    missing = KafkaSource("missing", shared_broker.address, timeout=20)
    with pytest.raises(SourceError, match=r"the Kafka topic missing at 127\.0\.0\.1.* Unknown topic"):
        missing.read(None, 10)
    missing.close()


def test_commit_moves_the_group_and_reading_does_not_look_at_it(shared_broker, topic, source):
    from confluent_kafka import Consumer, TopicPartition

    shared_broker.produce(topic, messages(0, 5))
    source.commit(source.read(None, 3).offset)
    group = Consumer({"bootstrap.servers": shared_broker.address, "group.id": "evertune"})
    assert [place.offset for place in group.committed([TopicPartition(topic, 0)], timeout=20)] == [3]
    group.close()
    assert len(source.read(None, 10).records) == 5


def test_broker_restarted_between_two_reads(broker):
    broker.create("t", 2)
    broker.produce("t", messages(0, 50))
    source = KafkaSource("t", broker.address, timeout=0.5)
    first = source.read(None, 20)
    broker.down()
    with pytest.raises(SourceError, match=r"does not answer within 0.5 seconds.* reading resumes from the same offset"):
        source.read(first.offset, 20)
    broker.up()
    source.timeout = 30
    rest, _ = read_all(source, first.offset, limit=7)
    assert texts([*first.records, *rest]) == [f"text {i}" for i in range(50)]
    source.close()


@pytest.mark.parametrize("patience", [30, 0.5], ids=["waits", "gives_up"])
def test_broker_restarted_in_mid_batch(broker, patience):
    """It goes down when the read has taken some messages, and more are still at the broker."""
    broker.create("t", 1)
    body = "x" * 1000
    for start in range(0, 600, 30):  # a broker hands out whole batches of what was produced together
        broker.produce("t", [json.dumps({"text": f"{i} {body}"}).encode() for i in range(start, start + 30)])
    small = {"fetch.message.max.bytes": 20_000, "queued.min.messages": 1, "queued.max.messages.kbytes": 20}
    small["fetch.queue.backoff.ms"] = 10
    source = KafkaSource("t", broker.address, settings=small, timeout=30)
    take, taken = source._next, []

    def counted():
        source.timeout = patience if len(taken) >= 100 else 30
        if len(taken) == 100:
            broker.down()
            if patience == 30:
                threading.Timer(0.5, broker.up).start()
        taken.append(take())
        return taken[-1]

    source._next = counted
    if patience == 30:
        chunk = source.read(None, 10_000)
    else:
        with pytest.raises(SourceError, match="does not answer"):
            source.read(None, 10_000)
        assert 100 <= len(taken) < 600
        broker.up()
        del source._next
        source.timeout = 30
        chunk = source.read(None, 10_000)
    assert [record.value["text"].split()[0] for record in chunk.records] == [str(i) for i in range(600)]
    assert chunk.offset["next"] == {"0": 600}
    source.close()


def test_broker_gone(broker, caplog):
    broker.create("t", 1)
    broker.produce("t", messages(0, 3))
    source = KafkaSource("t", broker.address, timeout=0.5)
    offset = source.read(None, 1).offset
    broker.kill()
    with caplog.at_level(logging.CRITICAL), pytest.raises(SourceError, match=r"the Kafka topic t at 127\.0\.0\.1"):
        source.read(offset, 1)
    with pytest.raises(SourceError, match="does not answer"):
        source.commit(offset)
    source.close()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"topic": ""}, "topic must not be empty"),
        ({"bootstrap_servers": ""}, "bootstrap_servers must not be empty"),
        ({"group": ""}, "group must not be empty"),
        ({"start": "beginning"}, 'must be "earliest" or "latest", got \'beginning\''),
        ({"timeout": 0}, "timeout must be positive, got 0"),
        ({"settings": {"group.id": "x", "enable.auto.commit": True}}, "must not contain group.id, enable.auto.commit"),
        ({"settings": {"sasl.pasword": "secret"}}, "sasl.pasword"),
        ({"settings": {"sasl.password": "${NOT_SET_ANYWHERE}"}}, "NOT_SET_ANYWHERE is not set"),
    ],
)
def test_bad_arguments(arguments, reason):
    with pytest.raises(ValueError, match=reason) as error:
        KafkaSource(**{"topic": "t", "bootstrap_servers": "localhost:1", **arguments})
    assert "secret" not in str(error.value)


def test_passwords_come_from_the_environment_and_stay_there(monkeypatch):
    monkeypatch.setenv("KAFKA_PASSWORD", "top-secret")
    settings = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "PLAIN", "sasl.username": "u"}
    source = KafkaSource("t", "localhost:1", settings={**settings, "sasl.password": "${KAFKA_PASSWORD}"}, timeout=0.3)
    with pytest.raises(SourceError) as error:
        source.read(None, 1)
    assert "top-secret" not in f"{error.value} {source} {source!r} {vars(source)}"
    source.close()


@pytest.mark.parametrize("limit", [1, 100])
def test_a_topic_created_again_that_has_grown_is_an_error(broker, limit):
    """Messages 0 to 2 of the new one would be lost."""
    other = Kafka()
    for one, first, n in ((broker, 0, 3), (other, 100, 5)):
        one.create("t", 2)
        one.produce("t", messages(first, first + n))
    source = KafkaSource("t", broker.address, timeout=20)
    _, offset = read_all(source, limit=limit)
    source.close()
    source = KafkaSource("t", other.address, timeout=20)
    try:
        assert source.read(json.loads(json.dumps({**offset, "next": {"0": 5, "1": 0}})), 10).records == []
        with pytest.raises(
            SourceError, match=r"message 2 of partition 0 is another one.* from the offset ({.*})$"
        ) as e:
            source.read(offset, limit)
        again = json.loads(str(e.value).partition("from the offset ")[2])
        assert texts(read_all(source, again, limit)[0]) == [f"text {i}" for i in range(100, 105)]
        offset.pop("last")  # as older versions wrote it
        assert texts(source.read(offset, 10).records) == ["text 103", "text 104"]
    finally:
        source.close()
        other.kill()


def test_the_last_message_that_was_read_may_go(shared_broker, topic, source):
    shared_broker.produce(topic, messages(0, 3))
    _, offset = read_all(source)
    assert offset["last"]["0"][0] == 2
    shared_broker.delete_before(topic, 0, 3)
    shared_broker.produce_marker(topic)
    shared_broker.produce(topic, messages(3, 5))
    records, later = read_all(source, offset)
    assert texts(records) == ["text 3", "text 4"] and later["last"]["0"][0] == 5
    shared_broker.produce(topic, messages(5, 6))
    assert texts(source.read(later, 10).records) == ["text 5"]
    for bad in ({"last": {"0": 1}}, {"last": {"x": [1, "a"]}}, {"last": [1]}):
        with pytest.raises(SourceError, match="not an offset of a Kafka topic"):
            source.read({**offset, **bad}, 10)
