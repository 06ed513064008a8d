"""The parts of replay that run in loader processes."""

import pyarrow as pa
import pytest

from evertune.callbacks.replay.collate import Schedule
from evertune.callbacks.replay.spool import Capture, Spool, parse_records, prune_records, read_records
from evertune.memory.policies import make_policy


def label(example):
    return f"class{example % 2}"


def capture(tmp_path, policy="reservoir", limit=10):
    return Capture(tmp_path, make_policy(policy), seed=0, limit=limit, label=label, id=str)


@pytest.mark.parametrize(("policy", "groups"), [("reservoir", 1), ("class_balanced", 2), ("ring", 2)])
def test_a_spool_stays_small_and_loses_no_candidate(tmp_path, policy, groups):
    path, settings = tmp_path / "0-0.spool", capture(tmp_path, policy)
    spool = Spool(path, settings)
    for batch in range(1000):
        if batch == 500:
            spool = Spool(path, settings)  # another process takes over
        spool.offer(batch, range(4 * batch, 4 * batch + 4), [(4 * batch + i) % 3000 for i in range(4)])
    assert len(read_records([path], 0, 1000)) <= 4 * (10 * groups + 10)
    last = {str(i % 3000): i for i in range(4000)}
    priority = {id: settings.policy.priority(id, arrival, 0) for id, arrival in last.items()}
    for group in range(2):
        best = sorted((id for id in last if int(id) % 2 == group), key=priority.get)[:5]
        records = {record.id: record for record in read_records([path], 0, 1000)}
        if groups == 2:
            assert set(best) <= set(records)
            assert [records[id].arrival for id in best] == [last[id] for id in best]
            assert all(records[id].label == f"class{group}" for id in best)
    if groups == 1:
        assert set(sorted(last, key=priority.get)[:10]) <= set(records)


def test_a_record_cut_short_is_left_out(tmp_path):
    path = tmp_path / "0-0.spool"
    spool = Spool(path, capture(tmp_path))
    for batch, examples in enumerate([[0], [1], [2]]):
        spool.offer(batch, [batch], examples)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert [record.id for record in read_records([path], 0, 3)] == ["0", "1"]
    Spool(path, capture(tmp_path)).offer(3, [3], [3])
    assert [record.id for record in read_records([path], 0, 4)] == ["0", "1", "3"]
    prune_records(path, 3)
    assert [record.id for record in read_records([path], 0, 4)] == ["0", "1"]


def test_a_spool_may_be_cut_anywhere(tmp_path):
    path = tmp_path / "0-0.spool"
    spool, ends = Spool(path, capture(tmp_path, limit=100)), []
    for batch in range(3):
        spool.offer(batch, [2 * batch, 2 * batch + 1], [2 * batch, 2 * batch + 1])
        ends.append(path.stat().st_size)
    content = path.read_bytes()
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        whole = sum(end <= size for end in ends)
        assert [record.id for record in read_records([path], 0, 3)] == [str(i) for i in range(2 * whole)], size
        Spool(path, capture(tmp_path, limit=100)).offer(3, [6], [6])  # and goes on from there
        assert [record.id for record in read_records([path], 0, 4)] == [*(str(i) for i in range(2 * whole)), "6"]


def test_other_arrow_streams_are_not_taken_for_a_spool():
    batch = pa.record_batch({"id": ["a"]})
    with pytest.raises(ValueError, match="not the records of a spool"):
        list(parse_records(batch.schema.serialize().to_pybytes() + batch.serialize().to_pybytes()))


def test_a_schedule_switches_at_a_batch():
    schedule = Schedule()
    assert schedule.update_at(0) is None
    schedule.start_update(0, update=3, generation=7)
    schedule.start_update(10, update=4, generation=8)
    assert schedule.update_at(9) == (0, 3, 7)
    assert schedule.update_at(10) == (10, 4, 8)
    schedule.start_update(20, update=5, generation=9)
    assert schedule.update_at(19) == (10, 4, 8)
    assert schedule.update_at(20) == (20, 5, 9)
    schedule.start_iterator(12)
    schedule.start_iterator(15)
    assert schedule.iterator() == (2, 15)
