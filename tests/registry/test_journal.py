"""The journal: segments are whole or not there, whenever the process dies."""

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import time
import uuid

import pytest

from evertune.registry.journal import Journal
from evertune.registry.lease import LeaseLost
from evertune.registry.registry import Registry, RegistryError
from evertune.registry.repair import repair
from evertune.registry.rows import latest
from evertune.registry.slice_index import repair as repair_slices
from evertune.registry.store import Store


def row(id, text="x"):
    return {"id": id, "origin": f"file:{id}", "record": {"text": text, "label": "a"}}


def bad(origin, kind="refused"):
    return {"origin": origin, "kind": kind, "reason": "because", "raw": "{"}


def half(id):
    return {"id": id, "origin": f"texts:{id}", "value": {"id": id, "text": "x"}, "has_text": True, "since": 1}


@pytest.fixture(params=["folder", "bucket"])
def store(request, tmp_path):
    return Store(tmp_path / "registry" if request.param == "folder" else f"memory://{tmp_path.name}")


def files(store):
    """Everything in a store, by name."""
    return {
        f"{folder}/{name}": store.read(f"{folder}/{name}") for folder in store.list() for name in store.list(folder)
    }


def test_what_goes_in_comes_out(store):
    journal = Journal(store)
    assert journal.last is None
    assert journal.segments() == [] and journal.waiting() == [] and journal.quarantined() == []
    odd = row("b", "Ünïcode   \n \x00 \U0001f600")
    one = journal.append([row("a"), odd], [bad("f:3")], [half("w")], {"line": 3}, clock={"position": 3})
    two = journal.append([row("c")], [], [], {"line": 9}, read=6)
    assert (one.number, one.read, one.records, one.quarantined, one.bad, one.waiting) == (1, 3, 2, 1, 1, 1)
    assert (two.number, two.read, two.records, two.quarantined, two.bad, two.waiting) == (2, 6, 1, 0, 0, 0)
    again = Journal(store)
    assert again.segments() == [one, two]
    assert again.segments(after=1) == [two] and again.segments(after=2) == []
    assert again.last == two
    assert again.offset(again.last) == {"line": 9} and again.segments()[0].clock == {"position": 3}
    assert again.records([one, two]) == [row("a"), odd, row("c")]
    assert again.quarantined() == [bad("f:3") | {"segment": 1}]


def test_only_the_last_segment_says_what_waits(store):
    journal = Journal(store)
    journal.append([], [], [half("a")], {"n": 1}, read=1)
    assert journal.waiting() == [half("a")]
    journal.append([], [], [half("a"), half("b")], {"n": 2}, read=1)
    assert journal.waiting() == [half("a"), half("b")]
    assert [name for name in store.list("pending") if "waiting" in name] == ["000002.waiting.jsonl"]
    journal.append([row("a"), row("b")], [], [], {"n": 3})
    assert journal.waiting() == []
    assert [name for name in store.list("pending") if "waiting" in name] == []


def test_a_lone_surrogate_survives(store):
    journal = Journal(store)
    segment = journal.append([row("a", "half \ud83d")], [bad("f\udcff:1")], [], None)
    assert journal.records([segment])[0]["record"]["text"] == "half \ud83d"
    assert journal.quarantined()[0]["origin"] == "f\udcff:1"
    store.read("pending/000001.jsonl").decode()


def test_offsets_that_move_by_themselves_fill_no_disk(store):
    journal = Journal(store)
    for number in range(5):
        journal.append([], [], [], {"n": number})
    assert [journal.offset(segment) for segment in journal.segments()] == [{"n": 4}]
    journal.append([row("a")], [], [], {"n": 5})
    journal.append([], [], [half("b")], {"n": 6}, read=1)
    for number in range(7, 10):
        journal.append([], [], [half("b")], {"n": number})
    assert [journal.offset(segment)["n"] for segment in journal.segments()] == [4, 5, 6, 9]
    assert journal.waiting() == [half("b")]


def test_more_than_a_million_segments_stay_in_order(store):
    journal = Journal(store)
    journal.append([row("a")], [], [], {"n": 1})
    meta = json.loads(store.read("pending/000001.json"))
    for number in (999_999, 1_000_000):
        store.write(f"pending/{number}.json", json.dumps(meta | {"number": number}).encode())
    assert journal.append([row("b")], [], [], {"n": 2}).number == 1_000_001
    assert [segment.number for segment in journal.segments()] == [1, 999_999, 1_000_000, 1_000_001]


@pytest.mark.parametrize("name", ["pending/000001.jsonl", "quarantine/000001.jsonl", "pending/000001.waiting.jsonl"])
def test_damage_is_found_and_named(store, name):
    journal = Journal(store)
    journal.append([row("a")], [bad("f:1")], [half("w")], {"n": 1})
    content = store.read(name)
    for damaged in (content[:-5], content.replace(b"x", b"y").replace(b"because", b"becalse"), b""):
        store.write(name, damaged)
        with pytest.raises(ValueError, match=f"{name} is damaged or cut short"):
            everything(journal)
    store.write(name, content)
    everything(journal)


def everything(journal):
    return journal.records(journal.segments()), journal.quarantined(), journal.waiting()


def test_a_damaged_description_is_named(store):
    journal = Journal(store)
    journal.append([row("a")], [], [], {"n": 1})
    meta = json.loads(store.read("pending/000001.json"))
    for damaged in (b"", b"{}", b"[]", json.dumps(meta | {"format": 9}).encode(), json.dumps(meta | {"x": 1}).encode()):
        store.write("pending/000001.json", damaged)
        with pytest.raises(ValueError, match=r"pending/000001.json is damaged"):
            journal.segments()


def test_missing_records_are_named(store):
    journal = Journal(store)
    segment = journal.append([row("a")], [bad("f:1")], [], {"n": 1})
    store.delete("pending/000001.jsonl")
    with pytest.raises(ValueError, match=r"pending/000001.jsonl is missing, with 1 lines of the journal"):
        journal.records([segment])
    store.delete("quarantine/000001.jsonl")  # a person may do that
    assert journal.quarantined() == []


def test_withdrawn_records_are_in_quarantine_and_nowhere_else(store):
    journal = Journal(store)
    one = journal.append([row("a"), row("b")], [bad("f:1")], [], {"n": 1})
    two = journal.append([row("b"), row("c")], [], [], {"n": 2}, read=6)
    rows = journal.records([one, two], numbered=True)
    assert [(r["segment"], r["id"]) for r in rows] == [(1, "a"), (1, "b"), (2, "b"), (2, "c")]
    why = {"kind": "unlearnable", "reason": "because"}
    journal.withdraw([rows[1] | why])
    journal.withdraw([rows[1] | why, rows[3] | why])  # the first is known
    journal.withdraw([])
    again = Journal(store)
    assert again.records(again.segments()) == [row("a"), row("b")]
    assert again.records([two]) == [row("b")]
    first, second = again.quarantined()[1:]
    assert first == rows[1] | why | {"withdrawn": first["withdrawn"]}
    assert second == rows[3] | why | {"withdrawn": second["withdrawn"]}
    assert again.quarantined([two]) == [second]
    assert again.last_withdrawal([two]).isoformat() == second["withdrawn"]
    counts = again.counts([one, two])
    assert (counts.read, counts.pending, counts.bad) == (9, 2, 3)
    journal.discard(upto=1)
    assert len(again.quarantined()) == 3


def test_released_records_leave_the_quarantine_with_the_segment_that_holds_them(store):
    journal = Journal(store)
    one = journal.append([row("a")], [bad("f:1"), bad("f:2"), bad("f:3", "expired")], [], {"n": 1})
    first, second, third = journal.references()
    assert first.startswith("000001:")
    two = journal.append([row("b")], [], [], {"n": 1}, read=0, released=[second, third])
    three = journal.append([], [], [], {"n": 1}, read=0, released=[first])  # of waiting halves, say
    assert journal.append([], [], [], {"n": 2}).number == 4
    assert journal.quarantined() == journal.quarantined([one]) == []
    counts = journal.counts([one, two, three])
    assert (counts.read, counts.pending, counts.bad) == (4, 2, 0)
    journal.discard(upto=3)
    assert journal.quarantined() == [] and journal.references() == {}


def test_dropped_records_are_gone_for_good(store):
    journal = Journal(store)
    one = journal.append([row("a", "secret"), row("b")], [bad("f:1"), bad("f:2")], [], {"n": 1})
    pending = journal.records([one], numbered=True)[0]
    journal.withdraw([pending | {"kind": "dropped", "reason": "because"}])
    journal.quarantine("rolled back", [row("z")], "discarded-1")
    first, second, discarded, withdrawn = journal.references()
    assert [name.partition(":")[0] for name in (first, discarded, withdrawn)] == ["000001", "discarded-1", "withdrawn"]
    journal.drop([first, withdrawn, discarded])
    assert list(journal.references()) == [second]
    assert journal.counts([one]).bad == 1
    assert journal.records([one]) == [row("b")]
    assert not any(b"secret" in content for name, content in files(store).items() if "withdrawn" in name)
    journal.drop([second])
    assert store.list("quarantine") == []
    assert journal.counts([one]).bad == 0


def test_a_damaged_list_of_what_was_withdrawn_is_named(store):
    journal = Journal(store)
    journal.append([row("a"), row("b")], [], [], {"n": 1})
    journal.withdraw([journal.records(journal.segments(), numbered=True)[0] | {"kind": "refused", "reason": "because"}])
    content = store.read("pending/withdrawn.jsonl")
    for damaged in (content[:-5], content.replace(b"because", b"becalse"), b"", b"{}\n"):
        store.write("pending/withdrawn.jsonl", damaged)
        with pytest.raises(ValueError, match=r"pending/withdrawn.jsonl is damaged or cut short"):
            journal.records(journal.segments())


def test_discarded_segments_leave_their_quarantine(store):
    journal = Journal(store)
    for number in range(1, 5):
        journal.append([row(str(number))], [bad(f"f:{number}")], [], {"n": number})
    journal.discard(upto=2)
    assert [segment.number for segment in journal.segments()] == [3, 4]
    assert [line["origin"] for line in journal.quarantined()] == ["f:1", "f:2", "f:3", "f:4"]
    journal.discard(upto=99)
    assert [segment.number for segment in journal.segments()] == [4]
    assert sorted(files(store)) == ["pending/000004.json", "pending/000004.jsonl"] + [
        f"quarantine/00000{number}.jsonl" for number in range(1, 5)
    ]
    assert journal.append([], [], [], {"n": 5}).number == 5


def test_quarantine_at_a_later_stage_is_idempotent(store):
    journal = Journal(store)
    journal.append([row("a"), row("b")], [bad("f:1")], [], {"n": 1})
    for _ in range(2):
        journal.quarantine("rolled back", [row("a"), row("b") | {"reason": "of its own"}], "discarded-3")
        assert [(line.get("id"), line["reason"], line["segment"]) for line in journal.quarantined()] == [
            (None, "because", 1),
            ("a", "rolled back", "discarded-3"),
            ("b", "of its own", "discarded-3"),
        ]
    journal.quarantine("rolled back", [], "discarded-3")
    assert len(journal.quarantined()) == 1
    for name in ("000001", "1", "a/b", "../x", ""):
        with pytest.raises(ValueError, match="name must start with a letter"):
            journal.quarantine("x", [row("a")], name)


# --- offsets of many files


def many(changed=(), n=1_000):
    files = {f"inbox/2026/{number:06d}.jsonl": [100, number, "a1b2c3d4"] for number in range(n)}
    return {"files": files | {f"inbox/2026/{number:06d}.jsonl": [200, number, "e5f6"] for number in changed}}


def test_a_long_offset_is_not_repeated_in_each_segment(store):
    journal, whole = Journal(store), len(json.dumps(many()))
    offsets = [many(range(number)) for number in range(60)]
    for number, offset in enumerate(offsets):
        journal.append([row(f"{number}")], [], [], offset)
    size = sum(len(content) for content in files(store).values())
    assert size < 60 * 4_000 + 2 * whole < 60 * whole / 6
    again = Journal(store)
    assert [again.offset(segment) for segment in again.segments()] == offsets
    assert next(name for name in store.list("pending") if "offset" in name) == "000001.offset.json"


def test_a_long_offset_is_exact(store):
    journal = Journal(store)
    odd = [
        many() | {"n": 1},
        many([3]) | {"n": 1.0},
        many([3]) | {"n": True},
        many(n=999) | {"n": None},
        many([7]),
        {"files": {}},
        None,
        many(n=2_000),
        many(n=2_000) | {"files": [1]},
        many() | {"": {"a": {"\ud800é": []}}},
    ]
    for number, offset in enumerate(odd):
        journal.append([row(f"{number}")], [], [], offset)
    found = [Journal(store).offset(segment) for segment in journal.segments()]
    assert [json.dumps(offset, sort_keys=True) for offset in found] == [
        json.dumps(offset, sort_keys=True) for offset in odd
    ]


def test_a_long_offset_that_moves_by_itself_fills_no_disk(store):
    journal = Journal(store)
    journal.append([row("a")], [], [], many())
    sizes = []
    for number in range(1, 50):
        journal.append([], [], [], many([number]))
        assert Journal(store).offset(journal.last) == many([number])
        sizes.append(sum(len(content) for content in files(store).values()))
    assert max(sizes) - min(sizes) < 200
    assert journal.append([row("b")], [], [], many([50])).number == 3
    assert Journal(store).offset(journal.last) == many([50])


def test_discarding_keeps_the_offset_that_later_segments_need(store):
    journal = Journal(store)
    for number in range(1, 6):
        journal.append([row(str(number))], [], [], many([number]))
    journal.discard(upto=3)
    assert sorted(store.list("pending")) == ["000001.offset.json"] + [
        f"00000{number}.{kind}" for number in (4, 5) for kind in ("json", "jsonl")
    ]
    assert [Journal(store).offset(segment) for segment in journal.segments()] == [many([4]), many([5])]
    journal.append([row("6")], [], [], many(n=2_000))  # another base
    journal.discard(upto=5)
    assert sorted(store.list("pending")) == ["000006.json", "000006.jsonl", "000006.offset.json"]
    assert Journal(store).offset(journal.last) == many(n=2_000)


def test_killed_while_a_long_offset_is_written(tmp_path):
    offsets = [many([1]), many([2]), many(n=2_000), many(n=2_001)]
    for changes in itertools.count():
        root = tmp_path / str(changes)
        try:
            for number, offset in enumerate(offsets):
                Journal(Dies(root, changes)).append([row(str(number))], [], [], offset)
            break
        except KeyboardInterrupt:
            journal = Journal(Store(root))
            found = [journal.offset(segment) for segment in journal.segments()]
            assert found == offsets[: len(found)]
            for number, offset in enumerate(offsets[len(found) :], start=len(found)):
                journal.append([row(str(number))], [], [], offset)
            assert [Journal(Store(root)).offset(segment) for segment in journal.segments()] == offsets
    assert changes > 2


def test_latest():
    rows = [row("a", "1"), row("b", "1"), row("a", "2"), row("c", "1"), row("a", "3")]
    kept, superseded = latest(rows)
    assert kept == [rows[1], rows[3], rows[4]]
    assert superseded == [rows[0] | {"reason": "superseded by file:a"}, rows[2] | {"reason": "superseded by file:a"}]
    assert latest(kept) == (kept, [])
    assert latest([]) == ([], [])


class Dies(Store):
    """A store that stops after so many changes, as if the power went: what was done stays, and nothing more comes."""

    def __init__(self, root, changes):
        super().__init__(root)
        self.left = changes

    def write(self, name, data):
        self._spend()
        super().write(name, data)

    def delete(self, name):
        self._spend()
        super().delete(name)

    def _spend(self):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1


STEPS = [  # records, bad, waiting: with and without each
    ([row("a"), row("b")], [bad("f:1")], [half("w")]),
    ([row("c")], [], [half("w"), half("v")]),
    ([], [bad("f:2"), bad("f:3", "superseded")], []),
    ([row("d")], [], []),
]


def go_on(store):
    """Append what is not there yet, as an intake does: from the offset of the last segment."""
    journal = Journal(store)
    while (last := journal.last) is None or journal.offset(last)["step"] < len(STEPS):
        done = 0 if last is None else journal.offset(last)["step"]
        records, refused, waiting = STEPS[done]
        journal.append(records, refused, waiting, {"step": done + 1})
    return journal


@pytest.mark.parametrize("other", [[bad("f:9")], []])
def test_killed_between_any_two_writes(tmp_path, other):
    """The next one may find other records in that place, as more has arrived: nothing of the dead one counts."""
    expected = files(go_on(Store(tmp_path / "undisturbed")).store)
    for changes in range(100):
        root = tmp_path / f"{len(other)}-{changes}"
        try:
            go_on(Dies(root, changes))
            break
        except KeyboardInterrupt:
            everything(Journal(Store(root)))
        try:  # another one dies at its very end, with other bad records and other waiting halves
            journal = Journal(Dies(root, 3))
            journal.append([row("z")], other, [half("z")], {"step": 99})
        except KeyboardInterrupt:
            everything(Journal(Store(root)))
        assert files(go_on(Store(root)).store) == expected
    assert changes > 12


def test_killed_by_the_system_at_any_time(tmp_path):
    """A process that appends in a loop is killed with SIGKILL again and again; another always finds whole segments."""
    root, draw, seen, kills = tmp_path / "registry", random.Random(0), 0, 0
    while kills < 20 or seen < 5:
        kills += 1
        child = os.fork()
        if child == 0:
            journal = Journal(Store(root))
            while True:
                number = journal.last.number + 1 if journal.last else 1
                rows = [row(f"{number}-{place}", "x" * 1000) for place in range(50)]
                journal.append(rows, [bad(f"f:{number}")], [half(str(number))], {"n": number})
        time.sleep(draw.random() * 0.005 * kills)  # longer each time, so that a busy machine gets on too
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        journal = Journal(Store(root))
        segments = journal.segments()
        assert [segment.number for segment in segments] == list(range(1, len(segments) + 1))
        records, quarantined, waiting = everything(journal)
        assert [line["id"] for line in records] == [f"{s.number}-{place}" for s in segments for place in range(50)]
        assert [line["origin"] for line in quarantined] == [f"f:{segment.number}" for segment in segments]
        assert [line["id"] for line in waiting] == [str(len(segments))][: len(segments)]
        assert len(segments) >= seen
        seen = len(segments)


# --- writers that have lost the lease


@pytest.fixture(params=["disk", "bucket"])
def root(request, tmp_path):
    return str(tmp_path / "registry") if request.param == "disk" else f"memory://{uuid.uuid4().hex}/registry"


@pytest.fixture
def foreign_lease(monkeypatch):
    """No process looks like one of this machine: only heartbeats count."""
    hosts = itertools.count()
    monkeypatch.setattr("evertune.registry.lease._host", lambda: f"host-{next(hosts)}")


def stale(root):
    registry = Registry(root)
    lease = registry.lease(ttl=0.05)
    lease.__enter__()
    lease._stop.set()
    return Journal(registry.store, registry.check_lease)


def take_over(root, name):
    registry = Registry(root)
    with registry.lease(ttl=0.05):
        journal = Journal(registry.store, registry.check_lease)
        return journal.append([row(name)], [bad(name)], [half(name)], {"line": 2})


def untouched(root, name):
    journal = Journal(Registry(root).store)
    assert [one["id"] for one in journal.records(journal.segments())] == [name]
    assert [one["id"] for one in journal.waiting()] == [name]
    assert [one["origin"] for one in journal.quarantined()] == [name]
    return True


def test_a_writer_that_has_lost_the_lease_writes_nothing(root, foreign_lease):
    journal = stale(root)
    take_over(root, "b")
    with pytest.raises(LeaseLost, match="has lost its lease"):
        journal.append([row("a")], [bad("a")], [half("a")], {"line": 1})
    with pytest.raises(LeaseLost, match="has lost its lease"):
        journal.quarantine("withdrawn", [row("a")], "late")
    assert untouched(root, "b")


WRITES = {
    "append": lambda journal, line: journal.append([row("a")], [bad("a")], [half("a")], {"line": 1}),
    "quarantine": lambda journal, line: journal.quarantine("withdrawn", [row("a")], "late"),
    "withdraw": lambda journal, line: journal.withdraw([line | {"kind": "dropped", "reason": "because"}]),
    "drop": lambda journal, line: journal.drop(journal.references()),
    "schema": lambda journal, line: setattr(journal, "schema", "0123"),
    "discard": lambda journal, line: journal.discard(upto=1),
    "repair": lambda journal, line: repair(journal),
    "repair of slices": lambda journal, line: repair_slices(journal.store, [], journal.check_lease),
}


@pytest.mark.parametrize("write", WRITES)
def test_every_writer_checks_the_lease_while_it_has_the_lock(root, foreign_lease, monkeypatch, write):
    """A process that was stopped right before it writes, and whose lease another process has taken meanwhile."""
    journal = stale(root)
    journal.append([row("a")], [bad("a")], [half("a")], {"line": 1})
    journal.append([row("b")], [], [], {"line": 2})
    line = journal.records(journal.segments(), numbered=True)[0]
    if write.startswith("repair"):
        journal.store.write("pending/000001.jsonl", b"damaged")
        journal.store.write("slices/index.jsonl", b"damaged")
    before = files(journal.store)
    locked, taken = journal.store.locked, []

    @contextlib.contextmanager
    def late():
        if not taken:
            taken.append(True)
            with Registry(root).lease(ttl=0.05):
                pass
        with locked():
            yield

    monkeypatch.setattr(journal.store, "locked", late)
    with pytest.raises(LeaseLost, match="has lost its lease"):
        WRITES[write](journal, line)
    after = files(journal.store)
    assert {name: after[name] for name in after if not name.startswith("lease")} == {
        name: before[name] for name in before if not name.startswith("lease")
    }


@pytest.mark.parametrize("step", range(4))
def test_a_writer_of_a_bucket_that_loses_the_lease_while_it_writes_overwrites_nothing(foreign_lease, step):
    root = f"memory://{uuid.uuid4().hex}/registry"
    journal, seen = stale(root), itertools.count()
    create = journal.store.create

    def slow(name, data):
        if next(seen) == step:
            take_over(root, "b")
        create(name, data)

    journal.store.create = slow
    with pytest.raises(LeaseLost):
        journal.append([row("a")], [bad("a")], [half("a")], {"line": 1})
    assert untouched(root, "b")


def _stopped_while_it_writes(root):
    registry = Registry(root)
    with registry.lease(ttl=0.05):
        journal = Journal(registry.store, registry.check_lease)
        write = journal.store.write

        def stopping(name, data):
            if name == "pending/000001.jsonl":
                os.kill(os.getpid(), signal.SIGSTOP)
            write(name, data)

        journal.store.write = stopping
        journal.append([row("a")], [], [], {"line": 1})


def test_a_writer_that_is_stopped_while_it_writes_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("evertune.registry.store._PATIENCE", 0.2)
    root = str(tmp_path / "registry")
    process = multiprocessing.get_context("fork").Process(target=_stopped_while_it_writes, args=(root,))
    process.start()
    assert process.pid is not None
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    with pytest.raises(RegistryError, match=r"another process has held .*\.lock for"):
        take_over(root, "b")
    os.kill(process.pid, signal.SIGCONT)
    process.join()
    take_over(root, "b")
    journal = Journal(Registry(root).store)
    assert [one["id"] for one in journal.records(journal.segments())] == ["a", "b"]


def test_killed_while_records_move_between_pending_and_quarantine(tmp_path):
    moves = [
        lambda journal, first: journal.withdraw(
            [journal.records(journal.segments(), numbered=True)[0] | {"kind": "dropped", "reason": "because"}]
        ),
        lambda journal, first: journal.append([row("x")], [], [], {"n": 1}, read=0, released=[first]),
        lambda journal, first: journal.append([row("c")], [], [], {"n": 2}),
        lambda journal, first: journal.discard(upto=2),
    ]
    for changes in range(12):
        root = tmp_path / str(changes)
        journal = Journal(Store(root))
        journal.append([row("a"), row("b")], [bad("f:1") | {"id": "x"}, bad("f:2") | {"id": "y"}], [], {"n": 1})
        (first, _), done = journal.references(), 0
        try:
            for move in moves[:3]:
                move(Journal(Dies(root, changes)), first)
                done += 1
        except KeyboardInterrupt:
            pass
        found = [one["id"] for one in journal.records(journal.segments()) + journal.quarantined()]
        assert sorted(found) == ["a", "b", *(["c"] if done == 3 else []), "x", "y"]
    moves[3](Journal(Store(root)), first)
    assert sorted(one["id"] for one in journal.quarantined()) == ["a", "y"]
