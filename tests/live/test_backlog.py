"""Which records wait for the next update, after promotions by hand and rollbacks."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from evertune.live.backlog import Backlog, pending_segments
from evertune.registry.journal import Journal
from evertune.registry.manifest import Manifest
from evertune.registry.registry import Registry
from evertune.sources.base import Row


class Line:
    """A registry whose versions learn one segment each, of two records that are named after it."""

    def __init__(self, folder: Path) -> None:
        self.registry, self.folder = Registry(f"memory://{uuid.uuid4().hex}/registry"), folder
        self.journal = Journal(self.registry.store)
        self.backlog = Backlog(self.registry, self.journal, folder / "staging", "settings")

    def arrive(self) -> None:
        last = self.journal.last
        number = 1 if last is None else last.number + 1
        rows: list[Row] = [
            {"id": f"{number}{letter}", "origin": f"a.jsonl:{number}{letter}", "record": {"text": letter}}
            for letter in "ab"
        ]
        self.journal.append(rows, [], [], None)

    def learn(self) -> int:
        """An update of all that is pending, which is promoted."""
        production, number = self.registry.production, self.registry.next_number()
        staging = self.folder / str(number)
        staging.mkdir()
        (staging / "weights").write_bytes(b"%d" % number)
        segments = self.backlog.pending(production)
        parent = production.number if production else None
        manifest = Manifest(version=number, parent=parent, consumed=segments[-1].number)
        return self.registry.promote(self.registry.publish(staging, manifest).number).number

    def pending(self) -> list[str]:
        rows = self.journal.records(self.backlog.pending(self.registry.production))
        assert rows == self.journal.records(pending_segments(self.registry))
        return [row["id"] for row in rows]

    def settle(self) -> None:
        """What an update does first."""
        self.backlog.withdraw_given_up()

    def quarantined(self) -> list[tuple[str, str]]:
        return [(row["id"], row["reason"]) for row in self.journal.quarantined()]


@pytest.fixture
def line(tmp_path: Path) -> Line:
    """Three versions; the third is in production."""
    line = Line(tmp_path)
    for _ in range(3):
        line.arrive()
        line.learn()
    return line


REASON = "learned by version 3, which was rolled back"


@pytest.mark.parametrize("settled", [False, True], ids=["before an intake", "after an intake"])
def test_given_up_records_stay_so_when_an_older_version_is_promoted(line: Line, settled: bool) -> None:
    line.registry.rollback(discard=True)
    if settled:
        line.settle()
    line.registry.promote(1)
    assert line.pending() == ["2a", "2b"]
    line.settle()
    assert line.pending() == ["2a", "2b"]
    assert line.quarantined() == [("3a", REASON), ("3b", REASON)]
    assert line.registry.given_up == []


@pytest.mark.parametrize("settled", [False, True], ids=["before an intake", "after an intake"])
def test_given_up_records_stay_so_after_a_second_rollback(line: Line, settled: bool) -> None:
    """And those of the second, which are not given up, are pending again."""
    line.registry.rollback(discard=True)
    if settled:
        line.settle()
    line.registry.rollback()
    line.arrive()
    assert line.pending() == ["2a", "2b", "4a", "4b"]
    line.settle()
    assert line.pending() == ["2a", "2b", "4a", "4b"]
    assert [id for id, _ in line.quarantined()] == ["3a", "3b"]


def test_given_up_records_stay_so_after_an_update_that_is_rolled_back(line: Line) -> None:
    line.registry.rollback(discard=True)
    line.arrive()
    line.settle()
    assert line.learn() == 4
    version = line.registry.rollback()
    assert line.pending() == ["4a", "4b"]
    assert line.registry.unlearned(version, 4) == 2


def test_given_up_records_stay_so_when_their_version_is_deleted_or_damaged(line: Line) -> None:
    line.registry.rollback(discard=True)
    line.registry.store.delete("versions/3")
    assert line.pending() == []
    line.registry.promote(1)
    assert line.pending() == ["2a", "2b"]


def test_a_version_that_cannot_be_read_gives_up_all_that_it_may_have_learned(line: Line) -> None:
    line.registry.store.write("versions/3/manifest.json", b"{")
    line.registry.rollback(discard=True)
    line.settle()
    line.arrive()
    assert line.pending() == ["4a", "4b"]
    assert [id for id, _ in line.quarantined()] == ["3a", "3b"]


def test_two_rollbacks_give_both_up(line: Line) -> None:
    for _ in range(2):
        line.registry.rollback(discard=True)
    assert [one.version for one in line.registry.given_up] == [3, 2]
    line.settle()
    assert line.pending() == []
    assert line.quarantined() == [
        ("3a", REASON),
        ("3b", REASON),
        *((id, "learned by version 2, which was rolled back") for id in ("2a", "2b")),
    ]


def test_a_rollback_that_is_undone_gives_nothing_up(line: Line) -> None:
    line.registry.rollback(discard=True)
    line.registry.promote(3)
    assert line.registry.given_up == []
    line.settle()
    assert line.quarantined() == []
    line.registry.rollback()
    assert line.pending() == ["3a", "3b"]


def test_undoing_two_rollbacks_at_once_gives_nothing_up(line: Line) -> None:
    for _ in range(2):
        line.registry.rollback(discard=True)
    line.registry.promote(2)
    assert [one.version for one in line.registry.given_up] == [3]
    line.registry.promote(3)
    assert line.registry.given_up == []


def test_records_that_were_withdrawn_do_not_fill_an_update(line: Line) -> None:
    """Those behind them would wait for ever."""
    line.registry.rollback(discard=True)
    line.settle()
    for _ in range(3):
        line.arrive()
    segments = line.backlog.pending(line.registry.production, at_most=4)
    assert [row["id"] for row in line.journal.records(segments)] == ["4a", "4b", "5a", "5b"]
