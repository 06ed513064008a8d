"""What is held out of training."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from evertune.live.slices import hold_out, load_slice, save_slice, sent_again, thin
from evertune.registry.store import Store


def rows(sizes: dict[str, int]) -> list[dict[str, Any]]:
    return [
        {"id": f"{label}-{number}", "origin": f"f:{number}", "record": {"text": "t", "label": label}}
        for label, size in sizes.items()
        for number in range(size)
    ]


def test_share_of_every_class() -> None:
    train, held_out = hold_out(rows({"a": 100, "b": 50, "c": 10}), "label", share=0.2, at_most=500)
    assert Counter(row["record"]["label"] for row in held_out) == {"a": 20, "b": 10, "c": 2}
    assert len(train) == 128
    assert not {row["id"] for row in train} & {row["id"] for row in held_out}


def test_many_small_classes_together_make_the_share() -> None:
    train, held_out = hold_out(rows({f"c{i:02}": 3 for i in range(50)}), "label", share=0.2, at_most=500)
    assert len(held_out) == 30
    assert len({row["record"]["label"] for row in train}) == 50


def test_no_class_is_held_out_whole() -> None:
    train, held_out = hold_out(rows({"a": 1, "b": 1, "c": 2}), "label", share=0.9, at_most=500)
    assert {row["record"]["label"] for row in train} == {"a", "b", "c"}
    assert [row["record"]["label"] for row in held_out] == ["c"]


def test_at_most() -> None:
    _, held_out = hold_out(rows({"a": 1000, "b": 500}), "label", share=0.2, at_most=30)
    assert Counter(row["record"]["label"] for row in held_out) == {"a": 20, "b": 10}


def test_does_not_depend_on_the_order_of_arrival() -> None:
    some = rows({"a": 40, "b": 20})
    _, held_out = hold_out(some, "label", share=0.25, at_most=500)
    _, again = hold_out(some[::-1], "label", share=0.25, at_most=500)
    assert {row["id"] for row in held_out} == {row["id"] for row in again}


def test_several_labels() -> None:
    some = [{"id": str(i), "origin": "", "record": {"label": ["x", "y"] if i % 2 else ["x"]}} for i in range(40)]
    _, held_out = hold_out(some, "label", share=0.2, at_most=500)
    assert Counter(len(row["record"]["label"]) for row in held_out) == {1: 4, 2: 4}


def test_no_version_is_judged_on_labels_that_a_model_has_given() -> None:
    some = rows({"a": 40})
    for row in some[:30]:
        row["record"]["pseudo_label"] = True
    _, held_out = hold_out(some, "label", share=0.5, at_most=500)
    assert len(held_out) == 5 and not any("pseudo_label" in row["record"] for row in held_out)
    before = {"1": [{"id": "1", "record": {"id": "1", "text": "t", "label": "a"}}]}
    again = {"id": "1", "record": {"id": "1", "text": "t", "label": "b", "pseudo_label": True}}
    new, changed, put_aside = sent_again([again], before, "id")
    assert not new and not changed and [row["record"] for row in put_aside] == [again["record"]]


def test_what_was_held_out_is_recognised() -> None:
    def row(id: str, text: str, origin: str = "f:1") -> dict[str, Any]:
        return {"id": id, "origin": origin, "record": {"id": id, "text": text, "label": "a"}}

    before = {"update-1": [row("1", "one"), row("2", "two")], "update-2": [row("2", "two, changed")]}
    rows = [row("1", "one", "g:1"), row("2", "two", "g:2"), row("3", "three"), row("4", "one")]
    new, changed, same = sent_again(rows, before, id="id")
    assert ([one["id"] for one in new], [one["id"] for one in changed]) == (["3", "4"], ["2"])
    assert [(one["id"], one["reason"]) for one in same] == [("1", "sent again, and held out already (update-1)")]


@pytest.mark.parametrize("id", [None, "id"])
def test_without_an_id_the_content_is_recognised(id: str | None) -> None:
    def row(origin: str, **record: Any) -> dict[str, Any]:
        return {"id": origin, "origin": origin, "record": record if id is None else {**record, "id": None}}

    before = {"update-1": [row("f:1", text="one", label="a"), row("f:2", text="two", label="a")]}
    rows = [row("g:7", label="a", text="one"), row("f:2", text="another file of this name", label="a")]
    new, changed, same = sent_again(rows, before, id)
    assert (new, changed, [one["id"] for one in same]) == ([rows[1]], [], ["g:7"])


def test_thin_takes_from_the_longest_and_keeps_what_it_kept() -> None:
    slices = {"a": rows({"a": 100}), "b": rows({"b": 10}), "c": rows({"c": 50})}
    thinned = thin(slices, budget=60)
    assert {name: len(chosen) for name, chosen in thinned.items()} == {"a": 25, "b": 10, "c": 25}
    further = thin(slices, budget=30)
    for name, chosen in further.items():
        assert chosen == thinned[name][: len(chosen)]
    assert thin({}, budget=10) == {}


def test_saved_slices_are_verified(tmp_path: Path) -> None:
    store = Store(tmp_path / "registry")
    some = rows({"a": 3})
    some[0]["record"]["text"] = "line\u2028separator \r and \x85 next line"
    entry = save_slice(store, "update-1", some)
    assert load_slice(store, entry) == some
    assert save_slice(store, "update-1", some) == entry
    store.write(entry.file, b"{}")
    with pytest.raises(ValueError, match="is damaged or cut short"):
        load_slice(store, entry)
