"""Several sources read as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evertune.sources import CombinedSource, FolderSource, RequestLogSource, SourceError


def write(folder: Path, name: str, *ids: str) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / name).open("a") as file:
        file.writelines(json.dumps({"id": id}) + "\n" for id in ids)


def combined(folder: Path) -> CombinedSource:
    news, requests = folder / "news", folder / "requests"
    return CombinedSource({"news": FolderSource(str(news)), "requests": RequestLogSource(str(requests))})


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 100])
def test_every_record_is_read_once_whatever_the_limit(tmp_path: Path, limit: int) -> None:
    write(tmp_path / "news", "a.jsonl", "n1", "n2", "n3", "n4", "n5")
    write(tmp_path / "requests", "b.jsonl", "r1", "r2")
    offset, ids = None, []
    while chunk := combined(tmp_path).read(offset, limit):  # a new one each time: a restart
        assert len(chunk.records) <= limit
        assert chunk == combined(tmp_path).read(offset, limit), "the same offset gives the same records again"
        ids += [record.value["id"] for record in chunk.records if record.value]
        if not chunk.records:
            break
        offset = json.loads(json.dumps(chunk.offset))
    assert sorted(ids) == ["n1", "n2", "n3", "n4", "n5", "r1", "r2"]
    write(tmp_path / "requests", "b.jsonl", "r3")
    assert [record.value for record in combined(tmp_path).read(offset, limit).records] == [{"id": "r3"}]


def test_one_with_much_to_read_does_not_hold_up_the_others(tmp_path: Path) -> None:
    write(tmp_path / "news", "a.jsonl", *map(str, range(50)))
    write(tmp_path / "requests", "b.jsonl", "r")
    assert {"id": "r"} in [record.value for record in combined(tmp_path).read(None, 10).records]


def test_a_source_that_is_taken_out_keeps_its_place_and_a_new_one_begins_at_its_beginning(tmp_path: Path) -> None:
    write(tmp_path / "news", "a.jsonl", "n1")
    write(tmp_path / "requests", "b.jsonl", "r1")
    offset = CombinedSource({"news": FolderSource(str(tmp_path / "news"))}).read(None, 9).offset
    chunk = CombinedSource({"requests": RequestLogSource(str(tmp_path / "requests"))}).read(offset, 9)
    assert [record.value for record in chunk.records] == [{"id": "r1"}]
    assert not combined(tmp_path).read(chunk.offset, 9).records


def test_an_error_names_the_source(tmp_path: Path) -> None:
    write(tmp_path / "news", "a.jsonl", "n1")
    with pytest.raises(SourceError, match=r"^requests: "):
        combined(tmp_path).read(None, 9)
    with pytest.raises(ValueError, match="sources is empty"):
        CombinedSource({})
