"""RedisSource against a real ``redis-server``."""

from __future__ import annotations

import json
import os
import signal
import threading

import pytest

from evertune.sources.base import SourceError
from evertune.sources.redis import RedisSource
from tests.helpers.servers import Redis, check_contract, read_all


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory):
    server = Redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def server(tmp_path):
    server = Redis(tmp_path)
    yield server
    server.kill()


@pytest.fixture
def stream(request, shared_server):
    """An empty stream that no other test uses."""
    name = request.node.name
    shared_server.client.xgroup_create(name, "any", mkstream=True)
    return name


@pytest.fixture
def source(shared_server, stream):
    source = RedisSource(stream, shared_server.url)
    yield source
    source.close()


def add(server, stream, start, stop):
    for i in range(start, stop):
        server.client.xadd(stream, {"text": f"text {i}"}, id=f"{i}-1")


def texts(records):
    return [record.value["text"] for record in records]


def expected(start, stop):
    return [f"text {i}" for i in range(start, stop)]


def test_contract(shared_server, stream, source):
    check_contract(source, lambda records: [shared_server.client.xadd(stream, record) for record in records])


def test_contract_with_json_in_a_field(shared_server, stream):
    source = RedisSource(stream, shared_server.url, field="data")
    check_contract(
        source, lambda records: [shared_server.client.xadd(stream, {"data": json.dumps(record)}) for record in records]
    )


def test_entries_are_records_with_origins(shared_server, stream, source):
    shared_server.client.xadd(stream, {"text": "é", "label": "a"}, id="5-3")
    chunk = source.read(None, 10)
    assert [(record.origin, record.value) for record in chunk.records] == [
        (f"{stream}@5-3", {"text": "é", "label": "a"})
    ]
    assert chunk.offset == {"stream": stream, "id": "5-3", "added": 1}


def test_bad_entries_carry_their_reason(shared_server, stream, source):
    shared_server.client.xadd(stream, {"text": b"\xff"})
    shared_server.client.xadd(stream, {"data": "[1]"})
    shared_server.client.xadd(stream, {"data": '{"text": "good"}'})
    first, *_ = read_all(source)[0]
    assert (first.value, first.error, first.raw) == (None, "not valid UTF-8", "text=�")
    in_field = RedisSource(stream, shared_server.url, field="data")
    records, _ = read_all(in_field)
    assert [record.error for record in records] == ["no field 'data'", "not a JSON object but a list", None]
    assert records[2].value == {"text": "good"}


def test_read_entries_may_be_trimmed_or_deleted(shared_server, stream, source):
    add(shared_server, stream, 0, 10)
    offset = source.read(None, 6).offset
    shared_server.client.xdel(stream, "3-1", "5-1")
    assert texts(source.read(offset, 2).records) == expected(6, 8)
    shared_server.client.xtrim(stream, minid="6-1", approximate=False)
    assert texts(read_all(source, offset, 3)[0]) == expected(6, 10)
    _, end = read_all(source, offset)
    shared_server.client.xtrim(stream, maxlen=0, approximate=False)
    assert source.read(end, 5).records == []
    add(shared_server, stream, 10, 12)
    assert texts(source.read(end, 5).records) == expected(10, 12)


def test_a_new_reader_begins_with_what_is_kept(shared_server, stream, source):
    add(shared_server, stream, 0, 10)
    shared_server.client.xtrim(stream, maxlen=8, approximate=False)
    shared_server.client.xdel(stream, "4-1", "8-1")
    left = [text for text in expected(2, 10) if text not in ("text 4", "text 8")]
    for limit in (1, 2, 3, 6, 7):
        records, end = read_all(source, limit=limit)
        assert texts(records) == left
    shared_server.client.xtrim(stream, maxlen=0, approximate=False)
    assert source.read(end, 5).records == []


@pytest.mark.parametrize("limit", [1, 4, 100])
def test_entries_trimmed_before_they_were_read_are_an_error(shared_server, stream, source, limit):
    add(shared_server, stream, 0, 10)
    offset = source.read(None, 3).offset
    shared_server.client.xtrim(stream, minid="5-1", approximate=False)
    with pytest.raises(SourceError, match="2 entries after 2-1 were trimmed or deleted before they were read") as error:
        source.read(offset, limit)
    mended = {"stream": stream, "id": "2-1", "added": 5}
    assert json.dumps(mended) in str(error.value)
    assert texts(read_all(source, mended, limit)[0]) == expected(5, 10)
    shared_server.client.xtrim(stream, maxlen=0, approximate=False)
    with pytest.raises(SourceError, match="7 entries after 2-1"):
        source.read(offset, limit)


def test_an_entry_deleted_before_it_was_read_is_an_error_at_the_end(shared_server, stream, source):
    add(shared_server, stream, 0, 10)
    offset = source.read(None, 3).offset
    shared_server.client.xdel(stream, "6-1")
    chunk = source.read(offset, 5)
    assert texts(chunk.records) == [*expected(3, 6), *expected(7, 9)]
    with pytest.raises(SourceError, match="1 entries after 8-1 were trimmed or deleted") as error:
        source.read(chunk.offset, 5)
    mended = {"stream": stream, "id": "8-1", "added": 9}
    assert json.dumps(mended) in str(error.value)
    assert texts(read_all(source, mended)[0]) == expected(9, 10)


def test_a_stream_made_anew_is_an_error(shared_server, stream, source):
    add(shared_server, stream, 0, 10)
    offset = source.read(None, 5).offset
    shared_server.client.delete(stream)
    with pytest.raises(SourceError, match="does not exist"):
        source.read(offset, 5)
    add(shared_server, stream, 20, 23)
    with pytest.raises(SourceError, match="5 entries had been added up to 4-1, and now it counts 3") as error:
        source.read(offset, 5)
    mended = {"stream": stream, "id": "4-1", "added": 0}
    assert json.dumps(mended) in str(error.value)
    assert texts(read_all(source, mended)[0]) == expected(20, 23)
    add(shared_server, stream, 23, 40)
    with pytest.raises(SourceError, match="It was recreated"):
        source.read(offset, 100)
    assert texts(read_all(source)[0]) == expected(20, 40)


def test_ids_that_went_back_are_an_error(shared_server, stream, source):
    """A server that lost its latest entries, and whose clock is behind: new ids are below the one that was read."""
    add(shared_server, stream, 10, 15)
    _, offset = read_all(source)
    shared_server.client.delete(stream)
    add(shared_server, stream, 0, 6)
    with pytest.raises(SourceError, match="now it counts 6 up to 5-1"):
        source.read(offset, 5)


def test_wrong_keys_and_foreign_offsets_are_errors(shared_server, stream, source):
    with pytest.raises(SourceError, match=r"the Redis stream missing at unix:.* does not exist. Correct its name"):
        RedisSource("missing", shared_server.url).read(None, 5)
    shared_server.client.set("number", 1)
    with pytest.raises(SourceError, match="WRONGTYPE"):
        RedisSource("number", shared_server.url).read(None, 5)
    with pytest.raises(SourceError, match="belongs to the stream other, but the source reads"):
        source.read({"stream": "other", "id": "1-0", "added": 1}, 5)
    for bad in ({"next": {}}, {"stream": stream, "id": "x", "added": 1}):
        with pytest.raises(SourceError, match="is not an offset of a Redis stream"):
            source.read(bad, 5)


def test_commit_shows_the_lag(shared_server, stream):
    source = RedisSource(stream, shared_server.url, group="evertune")
    add(shared_server, stream, 0, 10)
    for limit in (4, 7):
        source.commit(source.read(None, limit).offset)
        group = next(g for g in shared_server.client.xinfo_groups(stream) if g["name"] == b"evertune")
        assert (group["last-delivered-id"], group["lag"]) == (f"{limit - 1}-1".encode(), 10 - limit)
    RedisSource(stream, shared_server.url).commit(source.read(None, 1).offset)
    assert len(shared_server.client.xinfo_groups(stream)) == 2


def test_server_killed_and_restarted_in_mid_read(server):
    add(server, "s", 0, 50)
    source = RedisSource("s", server.url, timeout=20)
    records = list(source.read(None, 20).records)
    offset = source.read(None, 20).offset
    os.kill(server.process.pid, signal.SIGSTOP)  # the next read hangs in the middle of its question
    killer = threading.Timer(0.3, server.kill)
    killer.start()
    with pytest.raises(SourceError, match=r"does not answer.* reading resumes from the same offset"):
        source.read(offset, 20)
    killer.join()
    server.start()
    add(server, "s", 50, 60)
    rest, _ = read_all(source, offset, limit=7)
    assert texts([*records, *rest]) == expected(0, 60)
    source.close()


def test_a_server_restarted_within_the_read_is_not_noticed(server):
    add(server, "s", 0, 50)
    source = RedisSource("s", server.url)
    chunk = source.read(None, 20)
    server.kill()
    server.start()
    assert texts(source.read(chunk.offset, 30).records) == expected(20, 50)
    source.close()


def test_a_server_that_came_back_without_its_data(tmp_path):
    server = Redis(tmp_path, durable=False)
    add(server, "s", 0, 10)
    source = RedisSource("s", server.url)
    offset = source.read(None, 5).offset
    server.kill()
    server.start()
    with pytest.raises(SourceError, match="does not exist"):
        source.read(offset, 5)
    add(server, "s", 10, 12)
    with pytest.raises(SourceError, match="server restarted without its latest data"):
        source.read(offset, 5)
    server.kill()


def test_passwords_stay_hidden(tmp_path, monkeypatch):
    server = Redis(tmp_path, password="top-secret")
    server.client.xadd("s", {"text": "a"})
    monkeypatch.setenv("REDIS_PASSWORD", "top-secret")
    source = RedisSource("s", server.url.replace("top-secret", "${REDIS_PASSWORD}"))
    assert texts(source.read(None, 1).records) == ["a"]
    wrong = RedisSource("s", server.url.replace("top-secret", "wr0ng"))
    with pytest.raises(SourceError, match=r"does not answer.*invalid username-password") as error:
        wrong.read(None, 1)
    assert "wr0ng" not in f"{error.value} {wrong} {wrong!r}"
    server.kill()
    with pytest.raises(SourceError) as error:
        source.read(None, 1)
    assert "top-secret" not in f"{error.value} {source} {source!r}"
    with pytest.raises(ValueError, match="special characters of its password") as error:
        RedisSource("s", "redis://:top/secret@localhost:6379")
    assert "top" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"stream": ""}, "stream must not be empty"),
        ({"field": ""}, "field must not be empty"),
        ({"group": ""}, "group must not be empty"),
        ({"timeout": 0}, "timeout must be positive, got 0"),
        ({"url": "http://localhost"}, "not the URL of a Redis server: http://localhost"),
        ({"url": "redis://${NOT_SET_ANYWHERE}@localhost"}, "NOT_SET_ANYWHERE is not set"),
    ],
)
def test_bad_arguments(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        RedisSource(**{"stream": "s", **arguments})
