"""The intake: every record ends in exactly one place, masked, whatever it is and whenever the process dies."""

import json
import math
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from datetime import datetime
from decimal import Decimal

import pytest

from evertune.live.intake import Intake
from evertune.registry.journal import Journal
from evertune.registry.store import Store
from evertune.sources.base import Chunk, Incoming, Source, SourceError
from evertune.sources.folder import FolderSource
from evertune.sources.labels import LabelJoin
from evertune.sources.masking import Masker, PatternMasker
from evertune.sources.schema import RecordSchema
from evertune.sources.size import MOST_CHARACTERS
from evertune.sources.sql import SQLSource
from tests.registry.test_journal import Dies, files


class ListSource(Source):
    """Records in memory; a value that is a string cannot be read."""

    def __init__(self, values, fails_at=None, sealed=False):
        self.records = [
            Incoming(f"list:{place}", None, "not valid JSON", value)
            if isinstance(value, str)
            else Incoming(f"list:{place}", value)
            for place, value in enumerate(values)
        ]
        self.fails_at, self.sealed = fails_at, sealed

    def read(self, offset, limit):
        start = offset["at"] if offset else 0
        if self.fails_at is not None and start >= self.fails_at:
            raise SourceError("the broker is gone")
        records = self.records[start : start + limit]
        at = {"at": start + len(records)}
        if self.sealed and not records:
            at["sealed"] = True
        return Chunk(records, at if records or self.sealed else offset or at)


def ticket(id, text="Charged twice", label="billing"):
    return {"id": id, "text": text, "label": label}


def intake(source, root, schema=None, **settings):
    source = source if isinstance(source, Source) else ListSource(source)
    return Intake(source, schema or RecordSchema(id="id"), Journal(Store(root)), **settings)


def contents(root):
    """ids in the journal, origins in quarantine by kind, ids that wait."""
    journal = Journal(Store(root))
    quarantined = {}
    for line in journal.quarantined():
        quarantined.setdefault(line["kind"], []).append(line["origin"])
    return [row["id"] for row in journal.records(journal.segments())], quarantined, [w["id"] for w in journal.waiting()]


def test_good_and_bad_part(tmp_path):
    values = [ticket("a"), '{"id": "b"', ticket("c", text=""), ticket("d", label=7), {"id": "e"}]
    report = intake(values, tmp_path / "r").run()
    assert (report.read, report.good, report.bad, report.segments, report.waiting) == (5, 2, 3, 1, 0)
    assert report.bad_share == 0.6
    journal = Journal(Store(tmp_path / "r"))
    assert journal.records(journal.segments()) == [
        {"id": "a", "origin": "list:0", "record": ticket("a")},
        {"id": "d", "origin": "list:3", "record": ticket("d", label="7")},
    ]
    assert journal.quarantined() == [
        {"origin": "list:1", "kind": "unreadable", "reason": "not valid JSON", "raw": '{"id": "b"', "segment": 1},
        {"id": "c", "origin": "list:2", "kind": "refused", "reason": "field 'text': the text is empty",
         "record": ticket("c", text=""), "segment": 1},
        {"id": "e", "origin": "list:4", "kind": "refused", "record": {"id": "e"}, "segment": 1,
         "reason": "field 'text' is missing; field 'label' is missing"},
    ]  # fmt: skip
    assert (journal.last.read, journal.last.bad, journal.last.quarantined) == (5, 3, 3)


def test_it_goes_on_where_it_stopped(tmp_path):
    values = [ticket(str(number)) for number in range(10)]
    one = intake(values[:7], tmp_path / "r", chunk_size=3)
    assert (one.run().segments, one.run().segments) == (3, 0)
    report = intake(values, tmp_path / "r", chunk_size=3).run()
    assert (report.read, report.segments) == (3, 1)
    assert contents(tmp_path / "r") == ([str(number) for number in range(10)], {}, [])


def test_a_limit_and_a_start(tmp_path):
    values = [ticket(str(number)) for number in range(10)]
    report = intake(values, tmp_path / "r", chunk_size=3).run(limit=4, start={"at": 2})
    assert (report.read, report.segments) == (4, 2)
    assert contents(tmp_path / "r")[0] == ["2", "3", "4", "5"]
    assert intake(values, tmp_path / "r").run(limit=1, start={"at": 0}).read == 1
    assert contents(tmp_path / "r")[0] == ["2", "3", "4", "5", "6"]
    assert intake(values, tmp_path / "r").run(limit=0).read == 0


def test_without_an_id_the_origin_identifies(tmp_path):
    report = intake([ticket("a"), ticket("a")], tmp_path / "r", schema=RecordSchema()).run()
    assert (report.good, report.superseded) == (2, 0)
    assert contents(tmp_path / "r")[0] == ["list:0", "list:1"]


def test_an_origin_that_no_encoding_can_write(tmp_path):
    source = ListSource([ticket("a")])
    source.records = [
        Incoming("caf\udce9.jsonl:1", ticket("a"), None),
        Incoming("café.jsonl:1", None, "bad", "x\udce9"),
    ]
    intake(source, tmp_path / "r", schema=RecordSchema()).run()
    assert contents(tmp_path / "r")[:2] == (["caf\\udce9.jsonl:1"], {"unreadable": ["café.jsonl:1"]})


def test_the_newer_of_one_id_counts(tmp_path):
    values = [ticket("a", "old"), ticket("b"), ticket("a", "new"), ticket("a", text=""), ticket("c")]
    report = intake(values, tmp_path / "r").run()
    assert (report.good, report.bad, report.superseded) == (3, 1, 1)
    journal = Journal(Store(tmp_path / "r"))
    rows = journal.records(journal.segments())
    assert [(row["id"], row["record"]["text"]) for row in rows] == [
        ("b", "Charged twice"), ("a", "new"), ("c", "Charged twice"),
    ]  # fmt: skip
    old = next(line for line in journal.quarantined() if line["kind"] == "superseded")
    assert (old["id"], old["origin"], old["reason"]) == ("a", "list:0", "superseded by list:2")
    assert journal.last.bad == 1 and journal.last.quarantined == 2


def test_a_source_that_fails_keeps_what_it_gave(tmp_path):
    values = [ticket(str(number)) for number in range(10)]
    with pytest.raises(SourceError, match="the broker is gone"):
        intake(ListSource(values, fails_at=6), tmp_path / "r", chunk_size=3).run()
    assert len(contents(tmp_path / "r")[0]) == 6
    intake(values, tmp_path / "r", chunk_size=3).run()
    assert contents(tmp_path / "r")[0] == [str(number) for number in range(10)]


def test_a_source_that_stands_still_is_found_out(tmp_path):
    class Stuck(ListSource):
        def read(self, offset, limit):
            return Chunk(self.records, {"at": 0})

    with pytest.raises(SourceError, match="Stuck gave records but did not move its offset"):
        intake(Stuck([ticket("a")]), tmp_path / "r").run()


def test_an_offset_that_moves_alone_is_kept(tmp_path):
    for _ in range(3):
        report = intake(ListSource([ticket("a")], sealed=True), tmp_path / "r").run()
    assert (report.read, report.segments) == (0, 0)
    journal = Journal(Store(tmp_path / "r"))
    assert [journal.offset(segment) for segment in journal.segments()] == [
        {"at": 1}, {"at": 1, "sealed": True},
    ]  # fmt: skip


SECRETS = ["ann@example.com", "+4915112345678", "4111111111111111", "DE89370400440532013000", "203.0.113.77"]


class Hard(dict):
    """Cannot be written as JSON."""


def personal():
    deep = "ann@example.com"
    for _ in range(100_000):
        deep = [deep]
    mail, phone, card, iban, ip = SECRETS
    return [
        ticket("1", f"Write to {mail}, call {phone}"),
        ticket(mail, f"I am {ip}"),
        ticket("+49 151 12345678"),
        ticket(4111111111111111, f"Pay {iban}"),
        {"id": "2", "text": "x", "label": mail},
        {"id": "3", "text": "x", "label": "a", mail: ip, "nested": {phone: [card, {"deep": iban}]}},
        {"id": "4", "text": 4111111111111111, "label": "a"},
        {"id": "5", "text": [mail], "label": mail},
        {"id": "6", "text": "x", "label": {mail: phone}},
        {"id": [mail], "text": "x", "label": "a"},
        {"id": "7", "text": "x", "label": "a", "at": f"{mail} at noon"},
        {"id": "8", "label": "a", "seen": deep},
        {
            "id": "9",
            "text": "",
            "label": "a",
            "when": datetime(2024, 5, 17),
            "n": math.nan,
            mail: Decimal("4111111111111111"),
        },
        {"id": "10", ("a", mail): mail, 4111111111111111: phone},
        f'{{"id": "11", "text": "{mail} {card} {phone}',
        {"id": "12", "text": f"{mail} waits"},
        {"id": "13", "label": mail},
    ]


@pytest.mark.parametrize("label_join", [None, LabelJoin(window=10)])
def test_nothing_unmasked_reaches_the_disk(tmp_path, label_join):
    values = personal()
    schema = RecordSchema(
        fields={"id": "str", "text": "str", "label": "str", "at": "datetime | None"}, id="id", time="at"
    )
    source = ListSource(values)
    source.records.append(
        Incoming("list:99", None, f"cannot parse {SECRETS[0]} in {SECRETS[2]}", "\udcff" + SECRETS[1])
    )
    report = intake(source, tmp_path / "r", schema, masker=PatternMasker(), label_join=label_join).run()
    assert report.read == len(values) + 1
    journal = Journal(Store(tmp_path / "r"))
    kept = journal.records(journal.segments())
    assert len(kept) + len(journal.quarantined()) + len(journal.waiting()) == len(values) + 1
    for name, content in files(journal.store).items():
        for secret in (*SECRETS, "151 12345678"):
            assert secret.encode() not in content, (name, secret)
    texts = {row["id"]: row["record"]["text"] for row in kept}
    assert texts["1"] == "Write to <EMAIL>, call <PHONE>"
    hashed = [id for id in texts if id.startswith("masked-")]
    assert len(hashed) == 3
    everything = b"".join(files(journal.store).values())
    for masked in (b"<EMAIL>", b"<PHONE>", b"<CREDIT_CARD>", b"<IBAN>", b"<IP>"):
        assert masked in everything


def test_masked_ids_still_find_their_labels(tmp_path):
    values = [{"id": "ann@example.com", "text": "x"}, {"id": "bob@example.com", "text": "y"}]
    values += [{"id": "bob@example.com", "label": "b"}, {"id": "ann@example.com", "label": "a"}]
    intake(values, tmp_path / "r", masker=PatternMasker(), label_join=LabelJoin(window=9)).run()
    journal = Journal(Store(tmp_path / "r"))
    records = [row["record"] for row in journal.records(journal.segments())]
    assert [(record["text"], record["label"]) for record in records] == [("y", "b"), ("x", "a")]


def test_what_cannot_be_masked_is_not_kept(tmp_path):
    class Fragile(Masker):
        def mask(self, text):
            if "secret" in text:
                raise ValueError(f"cannot mask {text}")
            return text

    values = [ticket("a", "a secret"), 'unreadable secret"', ticket("b")]
    report = intake(values, tmp_path / "r", masker=Fragile()).run()
    assert (report.good, report.bad) == (1, 2)
    assert [line["origin"] for line in Journal(Store(tmp_path / "r")).quarantined()] == ["list:0", "list:1"]
    assert not any(b"secret" in content for content in files(Store(tmp_path / "r")).values())


def containing_itself(times):
    part = []
    part.extend([part] * times)
    return part


def nested(value, levels):
    for _ in range(levels):
        value = {"inner": [value]}
    return value


MILLION = "x" * 1_000_000
TOO_LARGE = {
    "a text": {"text": MILLION * 5},
    "bytes, as a database gives them": {"text": MILLION.encode() * 5},
    "a name, as of a field of Redis": {MILLION * 5: "x"},
    "many fields": {f"field {number}": MILLION for number in range(5)},
    "a list of texts": {"text": [MILLION] * 5},
    "nested objects": {"after": nested({"text": [MILLION] * 5}, 20)},
    "a wide list": {"more": [0] * MOST_CHARACTERS},
    "a wide object": {"more": dict.fromkeys(range(MOST_CHARACTERS), 0)},
    "lists of lists": {"more": [[[]] * 3_000] * 3_000},
    "a list that contains itself often": {"more": containing_itself(1_000)},
}
TOO_DEEP = {
    "a list that contains itself": {"more": containing_itself(1)},
    "many levels": {"more": nested("x", 100_000)},
}


@pytest.mark.parametrize("value", [*TOO_LARGE.values(), *TOO_DEEP.values()], ids=[*TOO_LARGE, *TOO_DEEP])
def test_a_record_that_is_too_large_is_refused_before_it_is_masked(tmp_path, value):
    class Counting(Masker):
        seen = 0

        def mask(self, text):
            self.seen += len(text)
            return text

    masker = Counting()
    report = intake([ticket("a"), {"id": "b", "label": "billing"} | value], tmp_path / "r", masker=masker).run()
    assert (report.good, report.bad, masker.seen < 1_000) == (1, 1, True)
    (line,) = Journal(Store(tmp_path / "r")).quarantined()
    why = "nested more than 100 levels deep" if value in TOO_DEEP.values() else "has more than 4,194,304 characters"
    assert line["kind"] == "refused" and why in line["reason"] and line["reason"].endswith(": it is left out here")
    assert line["raw"] == ""


def test_a_table_with_a_text_that_is_too_large(tmp_path):
    database = sqlite3.connect(tmp_path / "tickets.db")
    database.execute("create table tickets (id integer primary key, text text, label text)")
    database.executemany("insert into tickets values (?, ?, 'billing')", [(1, MILLION * 5), (2, "Charged twice")])
    database.commit()
    database.close()
    source = SQLSource(f"sqlite:///{tmp_path / 'tickets.db'}", "tickets", cursor="id")
    report = intake(source, tmp_path / "r", masker=PatternMasker()).run()
    assert (report.good, report.bad) == (1, 1)
    assert "has more than 4,194,304 characters" in report.words


def test_what_cannot_be_read_is_kept_only_if_it_is_not_too_large(tmp_path):
    report = intake(["{" * (MOST_CHARACTERS + 1), "{"], tmp_path / "r", masker=PatternMasker()).run()
    assert report.bad == 2
    large, small = Journal(Store(tmp_path / "r")).quarantined()
    assert (large["raw"], large["reason"]) == ("", "not valid JSON (its 4,194,305 characters are left out here)")
    assert (small["raw"], small["reason"]) == ("{", "not valid JSON")


def test_the_largest_record_that_is_taken(tmp_path):
    note = {"id": "a", "text": "Charged twice", "label": "billing", "note": ""}
    note["note"] = "x" * (MOST_CHARACTERS - sum(len(name) + 1 + len(value) for name, value in note.items()))
    assert intake([note, note | {"note": note["note"] + "x"}], tmp_path / "r").run().good == 1


def test_labels_that_come_later(tmp_path):
    values = [
        {"id": "1", "text": "one"},
        {"id": "2", "text": "two"},
        ticket("3"),
        {"id": "1", "label": "a"},
        {"id": "4", "label": "b"},
        {"id": "2", "label": ["not", None]},
        {"id": "5"},
        {"text": "no id"},
        {"id": "6", "text": ""},
        {"id": "4", "text": "four"},
    ]
    root = tmp_path / "r"
    for read in range(len(values)):
        intake(values[: read + 1], root, label_join=LabelJoin(window=7)).run()
    assert contents(root) == (["3", "1", "4"], {"refused": ["list:5", "list:6", "list:7", "list:8"]}, ["2"])
    journal = Journal(Store(root))
    rows = {row["id"]: row for row in journal.records(journal.segments())}
    assert rows["1"] == {
        "id": "1", "origin": "list:0", "label_origin": "list:3", "record": {"id": "1", "text": "one", "label": "a"},
    }  # fmt: skip
    assert (rows["4"]["origin"], rows["4"]["label_origin"]) == ("list:9", "list:4")
    more = [ticket(str(number)) for number in range(10, 20)]
    report = intake(values + more, root, label_join=LabelJoin(window=7)).run()
    assert (report.expired, report.bad, report.waiting) == (1, 0, 0)
    assert contents(root)[1]["expired"] == ["list:1"]
    assert journal.last.bad == 0 and journal.last.quarantined == 1


def test_a_record_dated_in_the_future_goes_to_quarantine_alone(tmp_path):
    times = {"t": "2026-11-01T00:00:00Z", "l": "2026-11-02T00:00:00Z"}
    values = [{"id": f"{number}", "text": "goal", "at": times["t"]} for number in range(20)]
    values.append({"id": "far", "text": "goal", "label": "sport", "at": "2099-12-31T00:00:00Z"})
    values.append({"id": "early", "text": "goal", "at": 20261101})
    values += [{"id": f"{number}", "label": "sport", "at": times["l"]} for number in range(20)]
    schema = RecordSchema(id="id", time="at")
    report = intake(values, tmp_path / "r", schema, label_join=LabelJoin(window="7d", time="at")).run()
    assert (report.read, report.good, report.bad, report.expired, report.waiting) == (42, 20, 2, 0, 0)
    far, early = Journal(Store(tmp_path / "r")).quarantined()
    assert (far["kind"], far["id"]) == ("refused", "far")
    assert "more than 1 day, 0:00:00 (max_time_jump)" in far["reason"]
    assert "20261101 may be a date or seconds since 1970" in early["reason"]


def test_a_joined_record_is_checked_whole(tmp_path):
    schema = RecordSchema(fields={"id": "str", "text": "str", "label": "str", "by": "str | None"}, id="id")
    values = [
        {"id": "1", "text": "one", "by": None}, {"id": "1", "label": "a", "by": "Ann"},
        {"id": "2", "text": "two"}, {"id": "2", "label": ["a", "b"]}, {"id": "2", "label": "c", "by": 7},
    ]  # fmt: skip
    report = intake(values, tmp_path / "r", schema, label_join=LabelJoin(window=7)).run()
    assert (report.good, report.bad, report.waiting) == (1, 2, 0)
    journal = Journal(Store(tmp_path / "r"))
    assert journal.records(journal.segments())[0]["record"] == {"id": "1", "text": "one", "label": "a", "by": "Ann"}
    assert [(line["origin"], line.get("label_origin")) for line in journal.quarantined()] == [
        ("list:3", None), ("list:2", "list:4"),
    ]  # fmt: skip


def test_what_waits_when_labels_are_no_longer_joined(tmp_path):
    values = [{"id": "1", "text": "one"}]
    intake(values, tmp_path / "r", label_join=LabelJoin(window=7)).run()
    report = intake(values, tmp_path / "r").run()
    assert (report.read, report.expired, report.segments) == (0, 1, 1)
    assert contents(tmp_path / "r") == ([], {"expired": ["list:0"]}, [])
    assert intake(values, tmp_path / "r").run().segments == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"chunk_size": 0}, "chunk_size must be positive, got 0"),
        ({"label_join": LabelJoin(id="key", window=5)}, "joined by id='key'"),
        ({"label_join": LabelJoin(window=5), "schema": RecordSchema()}, "the schema has id=None and label='label'"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        intake([], tmp_path / "r", **settings)


def test_files_in_a_folder(tmp_path):
    inbox = tmp_path / "in"
    inbox.mkdir()
    lines = [json.dumps(ticket(str(number))) for number in range(50)]
    lines[20] = "not json"
    (inbox / "a.jsonl").write_text("\n".join(lines[:30]) + "\n")
    run = intake(FolderSource(str(inbox)), tmp_path / "r", chunk_size=7).run
    assert (run().good, run().read) == (29, 0)
    with (inbox / "a.jsonl").open("a") as file:
        file.write("\n".join(lines[30:]) + "\n")
    assert run().good == 20
    journal = Journal(Store(tmp_path / "r"))
    assert [row["id"] for row in journal.records(journal.segments())] == [str(n) for n in range(50) if n != 20]
    assert [line["raw"] for line in journal.quarantined()] == ["not json"]


def arriving(n, seed=0):
    """Texts and labels together, apart, twice, and bad."""
    draw = random.Random(seed)
    values = []
    for number in range(n):
        id = f"t-{draw.randrange(n // 2)}"
        values.append(
            draw.choice(
                [
                    ticket(id, f"text {number}"),
                    {"id": id, "text": f"text {number}"},
                    {"id": id, "label": "billing"},
                    ticket(id, ""),
                    f"broken {number}",
                ]
            )
        )
    return values


def current(store):
    """The files that count: what waited before the last segment may be left by a process that was killed."""
    last = f"{Journal(store).last.number:06d}"
    return {name: content for name, content in files(store).items() if ".waiting." not in name or last in name}


def test_killed_between_any_two_writes(tmp_path):
    values = arriving(60)
    intake(values, tmp_path / "undisturbed", chunk_size=20, label_join=LabelJoin(window=30)).run()
    expected = current(Store(tmp_path / "undisturbed"))
    assert len(expected) > 6
    for changes in range(100):
        root = tmp_path / str(changes)
        dying = Journal(Dies(root, changes))
        settings = {"chunk_size": 20, "label_join": LabelJoin(window=30)}
        try:
            Intake(ListSource(values), RecordSchema(id="id"), dying, **settings).run()
            break
        except KeyboardInterrupt:
            intake(values, root, **settings).run()
            assert current(Store(root)) == expected
    assert changes > 9


def test_killed_by_the_system_at_any_time(tmp_path):
    """SIGKILL again and again, until a process comes to the end: the same files as of one that nobody disturbed."""
    values = arriving(1_200)
    settings = {"chunk_size": 50, "label_join": LabelJoin(window=300), "masker": PatternMasker()}
    intake(values, tmp_path / "undisturbed", **settings).run()
    root, draw, kills = tmp_path / "r", random.Random(1), 0
    while True:
        child = os.fork()
        if child == 0:
            intake(values, root, **settings).run()
            os._exit(0)
        time.sleep(0.02 * draw.random() * (1 + kills))  # longer each time, so that a busy machine gets there too
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        kills += 1
    assert kills > 3
    assert current(Store(root)) == current(Store(tmp_path / "undisturbed"))


JUNK = [
    None, True, False, 0, -1, 3, 2**70, 10**5000, 0.5, 1e308, math.nan, math.inf, "", " ", "a", "billing", "\x00",
    "\ud800", "x" * 2_000, "2024-05-17", "2024-05-17T10:00:00Z", "ann@example.com", "4111111111111111", [],
    ["a", "b"], [None], {}, {"a": {"b": [1, {"c": None}]}}, b"bytes", b"\xff", {1, 2}, (1, 2), object(), Decimal("NaN"),
    datetime(2024, 5, 17), Hard(a=1), float, 1j, {("a",): 1}, {1: 2}, {"\ud800": "\udfff"}, "\U0001f600" * 10, "٣" * 20,
]  # fmt: skip


def fuzzed(n):
    draw = random.Random(0)
    deep = []
    for _ in range(2_000):
        deep = [deep]
    loop = {}
    loop["loop"] = loop
    junk = [*JUNK, deep, loop]
    for number in range(n):
        if draw.random() < 0.1:
            yield Incoming(
                f"fuzz:{number}", None, draw.choice([None, "bad", "\ud800"]), draw.choice(["", "{", "\udcff" * 9])
            )
            continue
        value = {
            "id": f"f-{draw.randrange(n)}",
            "text": f"text {number}",
            "label": draw.choice("abc"),
            "at": 1715940000 + number,
        }
        for field in ("id", "text", "label", "at", "score", "extra", draw.choice(["x", "", "\ud800", 7, None, ("t",)])):
            fate = draw.random()
            if fate < 0.12:
                value[field] = draw.choice(junk)
            elif fate < 0.2:
                value.pop(field, None)
        yield Incoming(f"fuzz:{number}", value)


FIELDS = {"id": "str", "text": "str", "label": "str", "at": "datetime | None", "score": "float | None"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"masker": PatternMasker()},
        {"masker": PatternMasker(), "label_join": LabelJoin(window="1h", time="at", max_waiting=200)},
    ],
    ids=["plain", "masked", "joined"],
)
def test_ten_thousand_fuzzed_records(tmp_path, settings):
    source = ListSource([])
    source.records = list(fuzzed(10_000))
    schema = RecordSchema(fields=FIELDS, id="id", time="at", max_text_length=1_000)
    report = intake(source, tmp_path / "r", schema, chunk_size=1_500, **settings).run()
    journal = Journal(Store(tmp_path / "r"))
    rows, quarantined, waiting = journal.records(journal.segments()), journal.quarantined(), journal.waiting()
    places = Counter(row["origin"] for row in rows + quarantined + waiting)
    places.update(row["label_origin"] for row in rows + quarantined if "label_origin" in row)
    assert places == Counter(f"fuzz:{number}" for number in range(10_000))
    assert report.read == 10_000
    assert (report.good, report.waiting) == (len(rows), len(waiting))
    assert report.bad + report.superseded + report.expired == len(quarantined)
    assert report.good > 3_000 and report.bad > 2_000
    if "label_join" in settings:
        assert report.expired > 100 and report.waiting > 10
    for row in rows:
        assert isinstance(row["record"]["text"], str) and row["record"]["text"].strip()
        assert row["id"].encode() and row["record"]["label"]
    for line in quarantined:
        assert line["reason"] and len(line["reason"]) <= 500
        assert ("raw" in line) != ("record" in line)
    for name, content in files(journal.store).items():
        for line in content.decode().split("\n") if name.endswith(".jsonl") else []:
            json.loads(line or "{}", parse_constant=pytest.fail)  # NaN is no JSON
        if "masker" in settings:
            assert b"ann@example.com" not in content


@pytest.mark.parametrize(
    ("schema", "reason", "origin"),
    [
        ({"time": "time"}, "field 'time': the time 2026-03-01T00:00:00 has no time zone", "list:0"),
        ({"label": "lable"}, "field 'lable' is missing; did you mean 'label'?", "list:0"),
        ({"text": "Txt"}, "field 'Txt' is missing; did you mean 'text'?", "list:0"),
        ({"id": "ID"}, "field 'ID' is missing; did you mean 'id'?", "list:0"),
        ({"text": "body"}, "field 'body' is missing; the record has 'text', 'time' instead", "list:0"),
        ({"closed_classes": ["tax"]}, "field 'label': 'billing' is none of the closed classes tax", "list:0"),
    ],
)
def test_what_is_set_aside_is_reported_with_its_reason(tmp_path, schema, reason, origin):
    values = [ticket(str(number)) | {"time": f"2026-03-01T00:00:{number:02}"} for number in range(30)]
    report = intake(values, tmp_path / "r", schema=RecordSchema(**{"id": "id"} | schema)).run()
    assert (report.read, report.bad) == (30, 30)
    (found,) = report.reasons
    assert (found.kind, found.count, found.origin) == ("refused", 30, origin)
    assert found.words.startswith(reason)
    assert report.words.startswith(f"30 of 30 records went to quarantine: {reason}")
    assert f"evertune quarantine list --registry {tmp_path / 'r'}" in report.words


def test_the_commonest_reasons_come_first(tmp_path):
    values = [ticket("a"), ticket("b", text=""), *("{" * 5), ticket("c", label=None), ticket("d", text=7), ticket("a")]
    report = intake(values, tmp_path / "r").run()
    assert (report.reasons[0].kind, report.reasons[0].count) == ("unreadable", 5)
    assert report.words.startswith("9 of 10 records went to quarantine: not valid JSON (5 records, such as list:2); ")
    assert "2 for other reasons" in report.words
    assert intake([ticket("a")], tmp_path / "s").run().words == ""


@pytest.mark.parametrize("join", [None, LabelJoin(window="1d", time="time")])
def test_times_without_a_zone_are_of_the_schemas(tmp_path, join):
    value = ticket("a") | {"time": "2026-07-01T12:00:00"}
    schema = RecordSchema(id="id", time="time", time_zone="Europe/Berlin")
    parts = [value] if join is None else [{**value, "label": None}, {"id": "a", "label": "x", "time": value["time"]}]
    report = intake(parts, tmp_path / "r", schema=schema, label_join=join).run()
    assert (report.good, report.bad) == (1, 0)
    journal = Journal(Store(tmp_path / "r"))
    assert journal.records(journal.segments())[0]["record"]["time"] == "2026-07-01T10:00:00+00:00"


def retried(root, schema=None, **settings):
    again = intake([], root, schema=schema, **settings)
    return again.retry(again.journal.references())


def test_what_was_read_can_be_checked_again(tmp_path):
    root = tmp_path / "r"
    values = [
        ticket("a"),
        ticket("b", label=None),
        ticket("c") | {"score": math.nan},
        '{"id": "d"',
        ticket("e", text=""),
    ]
    intake(values, root, schema=RecordSchema(id="id", closed_classes=["tax"], fields={
        "id": "str", "text": "str", "label": "str | None", "score": "float | None"})).run()  # fmt: skip
    assert contents(root)[0] == []
    released, reasons = retried(root)
    assert (len(released), sorted(contents(root)[0])) == (2, ["a", "c"])
    assert len(reasons) == 3
    assert "only the text that was read is there, and it is not a record" in reasons.values()
    assert Journal(Store(root)).last.bad == 0
    assert retried(root)[0] == []
    assert intake([], root).run().segments == 0


def test_a_text_whose_label_never_came_waits_again(tmp_path):
    root, window = tmp_path / "r", {"label_join": LabelJoin(id="id", window=2)}
    texts = [{"id": name, "text": "Charged twice"} for name in "abcde"]
    intake(texts, root, **window).run()
    assert contents(root)[1] == {"expired": ["list:0", "list:1"]}
    again = intake([*texts, {"id": "a", "label": "billing"}], root, label_join=LabelJoin(id="id", window=100))
    released, reasons = again.retry(again.journal.references())
    assert (len(released), reasons, contents(root)[2]) == (2, {}, ["c", "d", "e", "a", "b"])
    again.run()
    assert contents(root) == (["a"], {}, ["c", "d", "e", "b"])


def test_a_record_is_masked_again_when_it_comes_back(tmp_path):
    root = tmp_path / "r"
    closed = RecordSchema(id="id", closed_classes=["tax"])
    intake([ticket("a", text="mail anna@example.org")], root, schema=closed).run()
    assert len(retried(root, masker=PatternMasker())[0]) == 1
    journal = Journal(Store(root))
    assert journal.records(journal.segments())[0]["record"]["text"] == "mail <EMAIL>"
