"""Dark experience replay: the formula of the paper, what it stores, and what it composes with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from evertune._lightning import pl
from evertune.callbacks import DarkReplay, LogitAdjustment, Replay
from tests.helpers.function_space import Net, Points, SaveAt, assert_same, copy_of, fit, learn, logits_of, step

FIRST, SECOND, THIRD = Points([0, 1] * 6), Points([1, 2] * 8, 100), Points([2, 3, 3, 0] * 4, 200)


def example(number: int) -> tuple[Tensor, int]:
    """An example by its number, as all three experiences have it."""
    data = next(one for one in (FIRST, SECOND, THIRD) if one.start <= number < one.start + len(one))
    item = data[number - data.start]
    return item["x"], item["labels"]


def stack(numbers: list[int]) -> tuple[Tensor, Tensor]:
    xs, ys = zip(*map(example, numbers), strict=True)
    return torch.stack(xs), torch.tensor(ys)


def kept(replay: Replay) -> list[int]:
    return [replay.memory[slot]["number"] for slot in range(len(replay.memory))]


def paper(
    weights: dict[str, Tensor], steps: list[list[int]], stored: dict[int, Tensor], alpha: float, beta: float
) -> dict[str, Tensor]:
    """Gradient descent on the loss of DER++; four new examples a step, then the replayed ones."""
    for numbers in steps:
        new, old = numbers[:4], numbers[4:]

        def loss(at: dict[str, Tensor], new: list[int] = new, old: list[int] = old) -> Tensor:
            x, y = stack(new)
            total = F.cross_entropy(logits_of(at, x), y)
            for number in old:
                x, y = stack([number])
                z, h = stored[number].double(), logits_of(at, x)
                total = total + alpha * (h[0, : len(z)] - z).square().mean() / len(old)
                total = total + beta * F.cross_entropy(h, y) / len(old)
            return total

        weights = step(weights, loss)
    return weights


@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.5), (0.3, 0.0), (2.0, 1.0)])
@pytest.mark.parametrize("growing", [True, False])
def test_the_weights_are_those_of_the_paper(alpha: float, beta: float, growing: bool) -> None:
    """After each of two more experiences; the head has all its rows, or grows."""
    replay, module = DarkReplay(5, alpha=alpha, beta=beta), Net(2 if growing else 4)
    fit(module, FIRST, replay)
    stored: dict[int, Tensor] = {}
    for data, n_classes in ((SECOND, 3), (THIRD, 4)):
        now = copy_of(module)
        stored = {n: stored[n] if n in stored else logits_of(now, stack([n])[0])[0].float() for n in kept(replay)}
        for slot, number in enumerate(kept(replay)):
            torch.testing.assert_close(replay.memory.view.logits([slot]).values[0], stored[number])
        if growing:
            module.grow(n_classes)
        before = copy_of(module)
        module.numbers.clear()
        fit(module, data, replay)
        assert [len(numbers) for numbers in module.numbers] == [8] * 4
        assert_same(module, paper(before, module.numbers, stored, alpha, beta))


@pytest.mark.parametrize("ratio", [0.5, 0.4])
def test_the_means_are_those_of_the_expected_number_of_replayed_examples(ratio: float) -> None:
    """Where a step has one more or less, on a rank or by chance, all still weigh alike."""
    replay, module = DarkReplay(5, alpha=0.3, beta=0.7, replay_ratio=ratio), Net(4)
    fit(module, FIRST, replay)
    weights, numbers = copy_of(module), kept(replay)
    stored = {n: logits_of(weights, stack([n])[0])[0].float() for n in numbers}
    module.numbers.clear()
    fit(module, SECOND, replay)
    for step_numbers in module.numbers:
        n_old = len(step_numbers) - 4
        share = n_old / (4 * ratio)  # of what is expected
        weights = paper(weights, [step_numbers], stored, 0.3 * share, 0.7 * share)
    assert {len(one) for one in module.numbers} == ({6} if ratio == 0.5 else {5, 6})
    assert_same(module, weights)


def weights_after(*callbacks: pl.Callback, workers: int = 0) -> dict[str, Tensor]:
    module = Net(4)
    for data in (FIRST, SECOND):
        fit(module, DataLoader(data, batch_size=4, num_workers=workers), *callbacks)
    return copy_of(module)


def test_the_order_of_the_callbacks_and_worker_processes_change_nothing() -> None:
    """Stored logits are compared with the model's own, not with those that a loss adjusts."""
    one = weights_after(DarkReplay(5), LogitAdjustment())
    other = weights_after(LogitAdjustment(), DarkReplay(5), workers=1)
    alone = weights_after(DarkReplay(5))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], alone[name]) for name in one)


def test_a_memory_of_plain_replay_gets_its_logits_before_the_first_step(tmp_path: Path) -> None:
    plain, dark, module = Replay(5), DarkReplay(5), Net(4)
    fit(module, FIRST, plain)
    plain.save(tmp_path)
    dark.load(tmp_path)
    before = copy_of(module)
    module.numbers.clear()
    stored = {n: logits_of(before, stack([n])[0])[0].float() for n in kept(dark)}
    fit(module, SECOND, dark)
    assert_same(module, paper(before, module.numbers, stored, 0.2, 0.5))


def test_a_fit_that_fails_changes_neither_memory_nor_module() -> None:
    class Fails(Net):
        fails = False

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.fails and batch_idx == 1:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    replay, module = DarkReplay(5), Fails(4)
    fit(module, FIRST, replay)
    table, module.fails = replay.memory.view.table, True
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(module, SECOND, replay)
    assert replay.memory.view.table.equals(table)
    assert not any(part._forward_hooks for part in module.modules())


def test_resumed_it_is_bit_identical(tmp_path: Path) -> None:
    replay, module, again, resumed = DarkReplay(5), Net(4), DarkReplay(5), Net(4, seed=5)
    fit(module, FIRST, replay)
    learn(module, SECOND, replay, SaveAt(tmp_path / "middle.ckpt"))
    learn(resumed, SECOND, again, ckpt_path=tmp_path / "middle.ckpt")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in module.state_dict().items())
    assert again.memory.view.table.equals(replay.memory.view.table)


# --- modules that know nothing of evertune


class Tagged(pl.LightningModule):
    """A class for each position of a sequence, -100 where there is none; the loss is computed in the model."""

    def __init__(self, n_classes: int = 7) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(20, 6), nn.Linear(6, n_classes)
        self.batches: list[Any] = []

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.out(self.embed(ids))
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches.append(batch)
        return self(batch["ids"], batch["labels"])["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def sentences(seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, (8, 5), generator=generator)
    labels = torch.where(torch.arange(5) < torch.randint(2, 6, (8, 1), generator=generator), ids % 7, -100)
    return [{"ids": one, "labels": tags} for one, tags in zip(ids, labels, strict=True)]


@pytest.mark.parametrize("top_k", [None, 3])
def test_sequences_are_compared_at_the_positions_that_count(top_k: int | None) -> None:
    replay, module = DarkReplay(8, alpha=0.3, top_k=top_k), Tagged()
    fit(module, sentences(0), replay)
    before = copy_of(module)
    rows = {len(replay.memory.view.logits([slot]).values) for slot in range(8)}
    assert rows <= {2, 3, 4, 5}
    assert len(rows) > 1
    module.batches.clear()
    fit(module, sentences(1), replay, max_steps=1)
    [batch] = module.batches

    def loss(weights: dict[str, Tensor]) -> Tensor:
        def logits(ids: Tensor, at: dict[str, Tensor]) -> Tensor:
            return F.embedding(ids, at["embed.weight"]) @ at["out.weight"].T + at["out.bias"]

        ids, labels = batch["ids"], batch["labels"]
        given = logits(ids, weights)
        each = F.cross_entropy(given.transpose(1, 2), labels, reduction="none") / (labels != -100).sum()
        total = 8 / 4 * each[:4].sum() + 0.5 * 8 / 4 * each[4:].sum()
        for row in range(4, 8):
            counts = labels[row] != -100
            z, h = logits(ids[row][counts], before), given[row][counts]
            if top_k:
                best = z.topk(top_k).indices
                others = torch.ones_like(z, dtype=torch.bool).scatter(1, best, False)
                z, h = (
                    torch.cat([x.gather(1, best), x[others].view(len(x), -1).logsumexp(1, keepdim=True)], 1)
                    for x in (z, h)
                )
            total = total + 0.3 * (h - z).square().mean() / 4
        return total

    assert_same(module, step(before, loss), rtol=1e-4)


def test_a_causal_language_model_of_transformers() -> None:
    """GPT-2's output layer is found, and its logits belong to the next token."""
    from transformers import GPT2Config, GPT2LMHeadModel

    class Writer(Tagged):
        def __init__(self) -> None:
            super().__init__()
            size = {"vocab_size": 24, "n_positions": 12, "n_embd": 8, "n_layer": 1, "n_head": 2}
            self.model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **size))

        def forward(self, input_ids: Tensor) -> Any:
            return self.model(input_ids=input_ids)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(**batch).loss

    def texts(seed: int) -> list[dict[str, Tensor]]:
        ids = torch.randint(24, (8, 6), generator=torch.Generator().manual_seed(seed))
        return [{"input_ids": one, "labels": one} for one in ids]

    replay, module, plain = DarkReplay(8, top_k=4), Writer(), Writer()
    for model in (module, plain):
        fit(model, texts(0), replay if model is module else Replay(8))
    stored = replay.memory.view.logits([0])
    ids = replay.memory[0]["input_ids"]
    best = module(ids[None]).logits[0, :-1].topk(4)
    assert torch.equal(stored.classes, best.indices)
    torch.testing.assert_close(stored.values, best.values)
    fit(module, texts(1), replay)
    assert any(not torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))


class Hidden(Net):
    """Its training step does not use what ``forward`` returns."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = F.linear(torch.tanh(self.body(batch["x"])), self.head.weight, self.head.bias)
        return F.cross_entropy(logits, batch["labels"])


class Twice(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch["x"]) + self(-batch["x"]), batch["labels"])


class NoForward(Net):
    forward = pl.LightningModule.forward

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.body(batch["x"])), batch["labels"])


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (Hidden, {}, "training_step of Hidden called its output layer 'head' never, not once; let forward"),
        (Twice, {}, "training_step of Twice called its output layer 'head' 2 times, not once"),
        (NoForward, {}, "DarkReplay cannot find the logits of NoForward"),
        (Net, {"head": "classifier"}, "it has no submodule 'classifier'"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(module: Any, settings: Any, message: str) -> None:
    model = module(4)
    before = copy_of(model)
    with pytest.raises(ValueError, match=message):
        fit(model, FIRST, DarkReplay(5, **settings))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert not any(part._forward_hooks for part in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
        ({"beta": -1.0}, "beta must be 0 or positive, and finite, got -1.0"),
        ({"top_k": 0}, "top_k must be positive, got 0"),
        ({"replay_ratio": 0}, "replay_ratio must be positive, got 0: without replayed examples"),
        ({"memory_size": 0}, "memory_size must be positive"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DarkReplay(**{"memory_size": 5, **settings})
