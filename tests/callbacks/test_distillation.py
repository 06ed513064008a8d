"""Distillation: the formula of the paper, on which examples and classes, and what it composes with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from evertune._lightning import pl
from evertune.callbacks import DarkReplay, Distillation, LogitAdjustment, Replay
from evertune.callbacks.teacher_distillation import TeacherDistillation
from tests.helpers.function_space import Net, Points, SaveAt, assert_same, copy_of, fit, learn, logits_of, step

FIRST, SECOND, THIRD = Points([0, 1] * 6), Points([1, 2] * 8, 100), Points([2, 3, 3, 0] * 4, 200)


def stack(numbers: list[int]) -> tuple[Tensor, Tensor]:
    """Examples by their numbers, as all three experiences have them."""
    items = [
        data[n - data.start] for n in numbers for data in (FIRST, SECOND, THIRD) if 0 <= n - data.start < len(data)
    ]
    return torch.stack([item["x"] for item in items]), torch.tensor([item["labels"] for item in items])


def divergence(old: Tensor, new: Tensor, t: float) -> Tensor:
    """KL(old || new) at a temperature, summed over the examples."""
    p, q = (old / t).softmax(1), (new / t).softmax(1)
    return t * t * (p * (p.log() - q.log())).sum()


def paper(
    before: dict[str, Tensor],
    steps: list[list[int]],
    seen: list[int],
    strength: float,
    t: float,
    on: str,
    ratio: float = 0,
    unknown_only: bool = False,
    teacher: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Gradient descent on cross-entropy and distillation from the weights before; four new examples a step."""
    weights = before
    for numbers in steps:
        new = [one for one in numbers[:4] if not unknown_only or int(stack([one])[1]) not in seen]
        chosen = {"new": new, "replayed": numbers[4:], "all": [*new, *numbers[4:]]}[on]
        factor = strength / {"new": 4, "replayed": 4 * ratio, "all": 4 * (1 + ratio)}[on]

        def loss(at: Any, numbers: Any = numbers, chosen: Any = chosen, factor: float = factor) -> Tensor:
            x, y = stack(numbers)
            total = F.cross_entropy(logits_of(at, x), y)
            x = stack(chosen)[0]
            old, new = (logits_of(one, x)[:, seen] for one in (teacher or before, at))
            return total + factor * divergence(old, new, t)

        weights = step(weights, loss)
    return weights


@pytest.mark.parametrize("growing", [True, False])
@pytest.mark.parametrize("on", ["new", "replayed", "all"])
def test_the_weights_are_those_of_the_paper(on: Any, growing: bool) -> None:
    """After each of two more experiences; the head has all its rows, or grows."""
    replay, distil, module = Replay(5, replay_ratio=0.5), Distillation(1.5, 3.0, examples=on), Net(2 if growing else 4)
    fit(module, FIRST, replay, distil)
    for data, seen in ((SECOND, [0, 1]), (THIRD, [0, 1, 2])):
        if growing:
            module.grow(len(seen) + 1)
        before = copy_of(module)
        module.numbers.clear()
        fit(module, data, distil, replay)
        assert [len(numbers) for numbers in module.numbers] == [6] * 4
        assert_same(module, paper(before, module.numbers, seen, 1.5, 3.0, on, 0.5), rtol=1e-5)
    assert distil.seen == {0, 1, 2, 3}


class WithLengths(Subset[Any]):
    """The same examples, said to be longer and shorter in turns, so that they are read in another order."""

    def __init__(self, data: Any) -> None:
        super().__init__(data, range(len(data)))
        self.lengths = [index * 7 % 5 for index in range(len(data))]


@pytest.mark.parametrize("examples_of", [lambda data: data, WithLengths])
def test_a_class_that_returns_is_learned_from_its_labels(examples_of: Any) -> None:
    replay, distil, module = (
        Replay(5, replay_ratio=0.5),
        Distillation(1.5, 3.0, examples="all", unknown_only=True),
        Net(4),
    )
    fit(module, FIRST, replay, distil)
    for data, seen in ((SECOND, [0, 1]), (THIRD, [0, 1, 2]), (FIRST, [0, 1, 2, 3])):
        before = copy_of(module)
        module.numbers.clear()
        fit(module, DataLoader(examples_of(data), batch_size=4, shuffle=True), distil, replay)
        assert_same(module, paper(before, module.numbers, seen, 1.5, 3.0, "all", 0.5, unknown_only=True), rtol=1e-5)


def test_without_replay_and_in_any_order_of_the_data() -> None:
    distil, module = Distillation(), Net(4)
    fit(module, FIRST, distil)
    plain = Net(4)
    fit(plain, FIRST)
    assert_same(module, copy_of(plain), rtol=0)  # nothing to distil yet
    before = copy_of(module)
    module.numbers.clear()
    fit(module, DataLoader(SECOND, batch_size=4, shuffle=True, num_workers=1), distil, max_epochs=2)
    assert len(module.numbers) == 8
    assert module.numbers[:4] != module.numbers[4:]
    assert_same(module, paper(before, module.numbers, [0, 1], 1.0, 2.0, "new"), rtol=1e-5)


def test_the_first_update_of_a_model_that_knows_classes() -> None:
    module = Net(4)
    before = copy_of(module)
    fit(module, SECOND, Distillation(known=[0, 3]))
    assert_same(module, paper(before, module.numbers, [0, 3], 1.0, 2.0, "new"), rtol=1e-5)


def test_a_teacher_answers_for_all_its_classes() -> None:
    teacher, module = Net(4, seed=1), Net(4)
    teacher.classes = ["a", "b", "c", "d"]
    before = copy_of(module)
    fit(module, SECOND, TeacherDistillation(teacher, 1.5, 3.0))
    weights = paper(before, module.numbers, [0, 1, 2, 3], 1.5, 3.0, "new", teacher=copy_of(teacher))
    assert_same(module, weights, rtol=1e-5)


def test_features_keep_their_direction() -> None:
    distil, module = Distillation(0.7, of="features"), Net(4)
    fit(module, FIRST, distil)
    before = weights = copy_of(module)
    module.numbers.clear()
    fit(module, SECOND, distil)

    def features(at: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.normalize(torch.tanh(x @ at["body.weight"].T + at["body.bias"]))

    for numbers in module.numbers:
        x, y = stack(numbers)

        def loss(at: dict[str, Tensor], x: Tensor = x, y: Tensor = y) -> Tensor:
            away = 1 - (features(before, x) * features(at, x)).sum(1)
            return F.cross_entropy(logits_of(at, x), y) + 0.7 * away.mean()

        weights = step(weights, loss)
    assert_same(module, weights, rtol=1e-5)


class ManyLabels(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch["x"]), batch["labels"])


class Numbers(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch["x"]), batch["labels"])


class Rows(Points):
    """Several targets for each example."""

    def __getitem__(self, index: int) -> Any:
        return {**super().__getitem__(index), "labels": torch.tensor(self.targets[index], dtype=torch.float64)}


@pytest.mark.parametrize("kind", [ManyLabels, Numbers])
def test_several_labels_and_regressions(kind: type[Net]) -> None:
    labels = kind is ManyLabels
    first, second = ([[0.0, 1, 0]] * 4, [[0, 1, 1.0]] * 4) if labels else ([[0.3, -1, 2]] * 4, [[0.5, 0.1, -0.7]] * 4)
    distil, module = Distillation(), kind(3)
    fit(module, Rows(first), distil)
    before, data = copy_of(module), Rows(second, 50)
    fit(module, data, distil)
    x, y = torch.stack([one["x"] for one in data]), torch.tensor(second, dtype=torch.float64)

    def loss(at: dict[str, Tensor]) -> Tensor:
        old, new = logits_of(before, x), logits_of(at, x)
        if not labels:
            return F.mse_loss(new, y) + (new - old).square().mean()
        p, q = (old[:, [1]] / 2).sigmoid(), (new[:, [1]] / 2).sigmoid()
        away = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        return F.binary_cross_entropy_with_logits(new, y) + 4 * away.mean()

    assert_same(module, step(before, loss), rtol=1e-5)


def test_the_largest_logits_and_the_probability_of_the_others() -> None:
    distil, module = Distillation(top_k=2), Net(4)
    fit(module, Points([0, 1, 2, 3] * 2), distil)
    before = copy_of(module)
    fit(module, Points([3, 0, 1, 2], 100), distil)
    x, y = stack([100, 101, 102, 103])[0], torch.tensor([3, 0, 1, 2])

    def loss(at: dict[str, Tensor]) -> Tensor:
        p, q = (logits_of(before, x) / 2).softmax(1), (logits_of(at, x) / 2).softmax(1)
        best = p.topk(2).indices
        p, q = (torch.cat([one.gather(1, best), 1 - one.gather(1, best).sum(1, keepdim=True)], 1) for one in (p, q))
        return F.cross_entropy(logits_of(at, x), y) + 4 * (p * (p / q).log()).sum(1).mean()

    assert_same(module, step(before, loss), rtol=1e-5)


def test_the_order_of_the_callbacks_changes_nothing() -> None:
    found = []
    for shift in range(3):
        callbacks = [Replay(5), LogitAdjustment(), Distillation(examples="all")]
        callbacks, module = callbacks[shift:] + callbacks[:shift], Net(4)
        for data in (FIRST, SECOND):
            fit(module, data, *callbacks)
        found.append(copy_of(module))
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


def test_resumed_it_is_bit_identical_and_keeps_nothing_of_the_update(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [Replay(5), Distillation(examples="all")]

    module, these, resumed, those = Net(4), callbacks(), Net(4, seed=5), callbacks()
    fit(module, FIRST, *these)
    learn(module, SECOND, *these, SaveAt(tmp_path / "middle.ckpt"))
    learn(resumed, SECOND, *those, ckpt_path=tmp_path / "middle.ckpt")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in module.state_dict().items())
    these[1].save(tmp_path)
    those[1] = Distillation(examples="all")
    those[1].load(tmp_path)
    assert (those[1].seen, those[1].experience_index) == ({0, 1, 2}, 2)
    assert those[1].state_dict() == these[1].state_dict()
    assert those[1].state_dict()["tables"] == {}


def test_a_fit_that_fails_changes_neither_classes_nor_module() -> None:
    class Fails(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise RuntimeError("out of luck")

    distil, module = Distillation(known=[0]), Fails(4)
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(module, SECOND, distil)
    assert (distil.seen, distil.experience_index) == ({0}, 0)
    assert not any(part._forward_hooks for part in module.modules())


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(FIRST)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("callbacks", "data", "message"),
    [
        ([Distillation(examples="all")], FIRST, r"Distillation\(examples='all'\) needs a Replay"),
        ([Distillation(examples="replayed"), DarkReplay(5)], FIRST, "and DarkReplay both give logits for the replayed"),
        (
            [Distillation()],
            Endless(),
            "needs the old model's answers to the training data, and cannot read this Endless",
        ),
        ([Distillation(head="classifier")], FIRST, "it has no submodule 'classifier'"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(
    callbacks: list[pl.Callback], data: Any, message: str
) -> None:
    module = Net(4)
    with pytest.raises(ValueError, match=message):
        fit(module, DataLoader(data, batch_size=4), *callbacks)
    assert not module.numbers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 0}, "strength must be positive and finite, got 0"),
        ({"temperature": -1.0}, "temperature must be positive and finite, got -1.0"),
        ({"examples": "old"}, r"examples must be one of \['new', 'replayed', 'all'\], got 'old'"),
        ({"of": "weights"}, r"of must be one of \['logits', 'features'\], got 'weights'"),
        ({"top_k": 0}, "top_k must be positive, got 0"),
        ({"top_k": 2, "of": "features"}, "top_k chooses among logits"),
        ({"unknown_only": True, "of": "features"}, "unknown_only chooses among new examples for of='logits'"),
        ({"unknown_only": True, "examples": "replayed"}, "unknown_only chooses among new examples"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation(**settings)
