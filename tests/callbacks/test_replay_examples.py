"""Examples that cannot be stored, or not be joined to those of a later experience."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from evertune._lightning import pl
from evertune.callbacks import Replay
from evertune.memory.codec import StorableCheck
from tests.helpers.quiet import QUIET


class Reads(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.steps = nn.Linear(1, 2), 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        values = batch["x"] if isinstance(batch, dict) else batch[0]
        return self.layer(values.float().mean().reshape(1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: Any, replay: Replay, module: Reads | None = None) -> Reads:
    module = module or Reads()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        callbacks=[replay],
        **QUIET,
    )
    trainer.fit(module, data)
    return module


class Opaque:
    """Cannot be stored."""


def first_column(batch: list[Any]) -> dict[str, Tensor]:
    return {"x": torch.stack([one["x"] for one in batch])}


UNSTORABLE: dict[str, Any] = {
    "object": Opaque,
    "set": lambda: {1, 2},
    "in a list": lambda: [1, Opaque()],
    "deep": lambda: {"a": (1, {"b": Opaque()})},
    "key": lambda: {(1, 2): 3},
    "sparse": lambda: torch.eye(2).to_sparse(),
}


@pytest.mark.parametrize(("name", "workers"), [("object", 2), *((name, 0) for name in UNSTORABLE)])
def test_an_example_that_cannot_be_stored_is_refused_when_it_comes(name: str, workers: int) -> None:
    examples = [{"x": torch.zeros(2), "more": UNSTORABLE[name]() if i == 9 else None} for i in range(32)]
    loader = DataLoader(examples, batch_size=4, collate_fn=first_column, num_workers=workers)
    module = Reads()
    with pytest.raises(
        TypeError, match=r"cannot store example 1 of batch 2: .*cannot store example\['more'\]"
    ) as caught:
        fit(loader, Replay(10), module)
    assert module.steps <= 2
    assert "it has index 9 in the training dataset" in caught.value.__notes__


def test_an_iterable_example_that_cannot_be_stored_is_refused_when_it_comes() -> None:
    class Some(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from ({"x": torch.zeros(2), "more": Opaque() if i == 9 else None} for i in range(32))

    module = Reads()
    with pytest.raises(TypeError, match="cannot store"):
        fit(DataLoader(Some(), batch_size=4, collate_fn=first_column), Replay(10), module)
    assert module.steps <= 2


def test_the_check_encodes_one_example_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    from evertune.memory import codec

    calls, encode = [], codec.encode
    monkeypatch.setattr(codec, "encode", lambda example: calls.append(1) or encode(example))
    check = StorableCheck()
    for i in range(50):
        check({"x": torch.zeros(i), "text": "a" * i, "ids": list(range(i)), "pair": (1, None), "y": i})
    assert len(calls) <= 3
    with pytest.raises(TypeError, match=r"example\['ids'\]\[2\]"):
        check({"x": torch.zeros(3), "text": "a", "ids": [1, 2, Opaque()], "pair": (1, None), "y": 1})


# --- examples of another shape


def dicts(n: int = 8, length: int = 3, **more: Any) -> list[dict[str, Any]]:
    return [{"x": torch.zeros(length), **more} for _ in range(n)]


CHANGES: dict[str, tuple[Any, Any, str]] = {
    "new key": (dicts(), dicts(length=3, mask=1), r"it has no 'mask', which they have"),
    "gone key": (dicts(mask=1), dicts(), r"it has 'mask', which they lack"),
    "longer": (dicts(), dicts(length=5), r"its item \['x'\] has the shape \[3\], theirs \[5\]"),
    "tuple": (
        [(torch.zeros(3), 1)] * 8,
        [(torch.zeros(4), 1)] * 8,
        r"its item \[0\] has the shape \[3\], theirs \[4\]",
    ),
    "parts": ([(torch.zeros(3), 1)] * 8, [(torch.zeros(3), 1, 2)] * 8, r"its value has 2 parts, theirs 3"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_replayed_example_that_does_not_fit_is_named(name: str) -> None:
    def strict(batch: list[Any]) -> Any:
        if isinstance(batch[0], dict):
            assert len({frozenset(one) for one in batch}) == 1, "keys"
        return torch.utils.data.default_collate(batch)

    old, new, words = CHANGES[name]
    replay = Replay(10)
    fit(DataLoader(old, batch_size=4, collate_fn=strict), replay)
    with pytest.raises(ValueError, match=rf"an example of experience '0' \(id '0:\d'\) to the new ones: {words}\. Let"):
        fit(DataLoader(new, batch_size=4, collate_fn=strict), replay)


def test_a_batch_that_fails_by_itself_keeps_its_error() -> None:
    replay = Replay(10)
    fit(DataLoader(dicts(), batch_size=4), replay)
    mixed = [{"x": torch.zeros(1 + i % 2)} for i in range(8)]
    with pytest.raises(RuntimeError, match="equal size"):
        fit(DataLoader(mixed, batch_size=4), replay)


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (lambda module, batch: batch["x"], r"one length for all examples, got \[3, 5\]"),
        (lambda module, batch: batch["x"][:, :, None], r"features must have the shape \[batch, d\]"),
    ],
)
def test_features_that_do_not_fit_are_refused_before_training(features: Any, words: str) -> None:
    def padded(batch: list[Any]) -> dict[str, Tensor]:
        return {"x": nn.utils.rnn.pad_sequence([one["x"] for one in batch], batch_first=True)}

    examples = [{"x": torch.ones(5 if i == 4 else 3), "label": 0} for i in range(8)]
    module = Reads()
    with pytest.raises((ValueError, TypeError), match=rf"(?s){words}.*pass features=|pass features=.*{words}"):
        fit(DataLoader(examples, batch_size=2, collate_fn=padded), Replay(4, "herding", features=features), module)
    assert module.steps == 0
