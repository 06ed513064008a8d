"""Stored logits: what is kept of them, how they are compared with later ones, and that damage is found."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
import torch

from evertune.memory import MemoryView, ReplayMemory
from evertune.memory.logits import LOGITS, StoredLogits, from_bytes, to_bytes

ONE = torch.tensor([1, 1])


def logits(n_rows: int, n_classes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_rows, n_classes, generator=torch.Generator().manual_seed(seed))


def assert_same(one: StoredLogits, other: StoredLogits) -> None:
    for name in vars(one):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("top_k", [None, 2])
def test_what_is_stored_is_read_again(top_k: int | None) -> None:
    """Examples of one row and of several, from models of 3 and of 5 classes, in any order and number."""
    old = StoredLogits.of(logits(4, 3), torch.tensor([1, 3]), top_k)
    new = StoredLogits.of(logits(2, 5, 1), ONE, None)
    column = pa.concat_arrays([old.to_arrow(), new.to_arrow()])
    assert column.type == LOGITS
    assert_same(StoredLogits.from_arrow(column.slice(0, 2)), old)
    assert_same(StoredLogits.from_arrow(column.slice(2)), new)
    both = StoredLogits.from_arrow(from_bytes(to_bytes(column)).take(pa.array([3, 1, 3])))
    assert both.n_rows.tolist() == [1, 3, 1]
    assert both.n_classes.tolist() == [5, 3, 3, 3, 5]
    width = top_k or 3
    assert torch.equal(both.values[[0, 4]], new.values[[1, 1]])
    assert torch.equal(both.values[1:4, :width], old.values[1:])
    assert (both.classes[1:4, width:] == -1).all()
    assert StoredLogits.from_arrow(column.slice(0, 0)).values.shape == (0, 0)


def test_a_model_that_has_grown_is_compared_on_the_classes_that_it_had() -> None:
    stored = StoredLogits.of(logits(2, 3), ONE)
    now = logits(2, 5, 1)
    new, old, present = stored.matched(now)
    assert torch.equal(new[:, :3], now[:, :3])
    assert torch.equal(old[:, :3], logits(2, 3))
    assert present.tolist() == [[True, True, True, False]] * 2


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_largest_and_the_rest_have_the_probabilities_of_all(temperature: float) -> None:
    """At the temperature, the softmax of k logits and the rest is that of all, with the others added up."""
    old, now = logits(2, 6), logits(2, 8, 1).requires_grad_()
    stored = StoredLogits.of(old, ONE, top_k=2, temperature=temperature)
    student, teacher, present = stored.matched(now, temperature)
    assert present.all()
    for given, whole in ((teacher, old), (student, now[:, :6])):
        shares = (whole / temperature).softmax(1)
        best = shares.gather(1, stored.classes)
        expected = torch.cat([best, 1 - best.sum(1, keepdim=True)], 1)
        torch.testing.assert_close((given / temperature).softmax(1), expected)
    student.sum().backward()
    assert now.grad is not None
    assert now.grad.isfinite().all()
    assert (now.grad[:, 6:] == 0).all()


def test_rows_with_and_without_a_rest_together() -> None:
    column = pa.concat_arrays(
        [StoredLogits.of(logits(1, 4), ONE[:1], top_k=2).to_arrow(), StoredLogits.of(logits(1, 2), ONE[:1]).to_arrow()]
    )
    now = logits(2, 5, 1).requires_grad_()
    new, old, present = StoredLogits.from_arrow(column).matched(now)
    assert present.tolist() == [[True, True, True], [True, True, False]]
    torch.where(present, new - old, 0.0).square().sum().backward()
    assert now.grad is not None
    assert now.grad.isfinite().all()


def test_fewer_classes_than_there_were_are_refused() -> None:
    with pytest.raises(ValueError, match="logits of 2 classes, 3 were stored"):
        StoredLogits.of(logits(2, 3), ONE).matched(logits(2, 2))
    with pytest.raises(ValueError, match="3 rows of logits do not match the 2 stored ones"):
        StoredLogits.of(logits(2, 3), ONE).matched(logits(3, 3))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"n_rows": 2}, "do not have the same length"),
        ({"n_rows": -1}, "do not have the same length"),
        ({"values": [1.0]}, "do not have the same length"),
        ({"classes": [0]}, "do not have the same length"),
        ({"rest": []}, "do not have the same length"),
        ({"classes": [0, 9]}, "classes that there were not"),
        ({"classes": [-3, 1]}, "classes that there were not"),
        ({"values": None}, "parts without a value"),
    ],
)
def test_damage_is_found(damage: dict[str, Any], message: str) -> None:
    row = {"n_classes": 4, "n_rows": 1, "values": [1.0, 2.0], "classes": [3, 1], "rest": [0.5]}
    assert StoredLogits.from_arrow(pa.array([row], LOGITS)).classes.tolist() == [[3, 1]]
    with pytest.raises(ValueError, match=message):
        StoredLogits.from_arrow(pa.array([row | damage], LOGITS))
    with pytest.raises(ValueError, match="1 of 2 examples have no logits"):
        StoredLogits.from_arrow(pa.array([row, None], LOGITS))
    with pytest.raises(ValueError, match="damaged or truncated"):
        from_bytes(to_bytes(pa.array([row], LOGITS))[:-60])


def test_logits_are_stored_with_the_examples(tmp_path: Any) -> None:
    memory, given = ReplayMemory(4), logits(4, 3)
    memory.update([{"x": i} for i in range(9)], "first")
    assert memory.view.without_logits.tolist() == [0, 1, 2, 3]
    before, undo = memory.view, memory.undo_point()
    memory.set_logits([1, 3], StoredLogits.of(given[:2], ONE).to_arrow())
    memory.set_logits([0, 2], StoredLogits.of(given[2:], ONE).to_arrow())
    assert before.without_logits.tolist() == [0, 1, 2, 3]
    assert torch.equal(memory.view.logits([3, 2, 0]).values, given[[1, 3, 2]])
    assert [memory[slot] for slot in range(4)] == [before[slot] for slot in range(4)]
    by_id = dict(zip(memory.ids, memory.view.logits(range(4)).values.tolist(), strict=True))

    memory.update([{"x": i} for i in range(4)], "second")  # what stays keeps its logits
    missing = set(memory.view.without_logits.tolist())
    assert {memory.ids[slot].startswith("second") for slot in missing} == {True}
    for slot in set(range(4)) - missing:
        assert memory.view.logits([slot]).values[0].tolist() == by_id[memory.ids[slot]]

    memory.save(tmp_path)
    copy, resumed = ReplayMemory(4), ReplayMemory(4)
    copy.load(tmp_path)
    resumed.load_state_dict(memory.state_dict())
    for one in (copy, resumed):
        assert one.view.table.column("logits").equals(memory.view.table.column("logits"))
    gone = next(memory.ids[slot] for slot in range(4) if slot not in missing)
    assert memory.forget([gone]) == 1
    assert len(MemoryView.open(memory.path(memory.generation)).table.column("logits")) == 3
    undo()
    assert memory.view is before
