"""Replay next to several training loaders: it joins one and leaves the others alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from evertune._lightning import pl
from evertune.callbacks.replay.callback import Replay
from tests.callbacks.test_replay import Save, Vision, loader, module, trainer, weights

CombinedLoader = pl.utilities.CombinedLoader


class Two(Vision):
    """Learns from two loaders at once."""

    def __init__(self) -> None:
        super().__init__()
        self.other: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor | None:
        if batch["b"] is None:  # exhausted, with mode="max_size"
            return None
        images, classes = batch["b"]
        self.seen.append([round(value, 1) for value in images[:, 0, 0, 0].tolist()])
        self.other.append(batch["a"][0][:, 0, 0, 0].tolist())
        return nn.functional.cross_entropy(self(images), classes)


def two() -> Two:
    module()  # sets the seed
    return Two()


def after_a_past(**kwargs: Any) -> Replay:
    replay = Replay(memory_size=8, loader="b", **kwargs)
    trainer(replay).fit(two(), {"a": loader(500), "b": loader(0)})
    assert len(replay.memory) == 8
    return replay


def test_examples_join_the_named_loader_and_no_other() -> None:
    replay, model = after_a_past(), two()
    kept = {replay.memory[slot][0][0, 0, 0].item() for slot in range(8)}
    assert kept <= set(range(16))
    trainer(replay, max_epochs=2).fit(model, {"a": loader(900), "b": loader(100)})
    assert [batch[:4] for batch in model.seen] == [list(range(s, s + 4)) for s in (100, 104, 108, 112)] * 2
    assert model.other == [list(range(s, s + 4)) for s in (900, 904, 908, 912)] * 2
    past = [example for batch in model.seen for example in batch[4:]]
    for start in range(0, 32, 8):
        assert set(past[start : start + 8]) == kept
    now = {replay.memory[slot][0][0, 0, 0].item() for slot in range(8)}
    assert now <= {*range(16), *range(100, 116)}


def test_loaders_in_a_list_have_positions() -> None:
    class Listed(Two):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor | None:
            return super().training_step(dict(zip("ab", batch, strict=True)), batch_idx)

    replay, model = after_a_past(), Listed()
    replay.loader = 1
    trainer(replay).fit(model, [loader(900), loader(100)])
    assert [len(batch) for batch in model.seen] == [8] * 4 and [len(batch) for batch in model.other] == [4] * 4


@pytest.mark.parametrize("workers", [{}, {"num_workers": 2}])
@pytest.mark.parametrize(("mode", "steps"), [("max_size_cycle", 4), ("min_size", 2), ("max_size", 4)])
def test_modes_of_a_combined_loader(mode: Any, steps: int, workers: dict[str, Any]) -> None:
    """``b`` has 2 batches, ``a`` 4: when ``b`` starts again in mid-epoch, the draws go on."""
    replay, model = after_a_past(), two()
    kept = {replay.memory[slot][0][0, 0, 0].item() for slot in range(8)}
    data = CombinedLoader({"a": loader(900), "b": loader(100, 8, **workers)}, mode)
    trainer(replay, max_epochs=2).fit(model, data)
    per_epoch = 2 if mode == "max_size" else steps
    assert len(model.seen) == 2 * per_epoch
    assert [batch[:4] for batch in model.seen] == [[100, 101, 102, 103], [104, 105, 106, 107]] * per_epoch
    past = [example for batch in model.seen for example in batch[4:]]
    if mode != "max_size":  # there, steps without a batch of `b` take their draws along
        for start in range(0, len(past), 8):
            assert set(past[start : start + 8]) == kept
    assert set(past) <= kept
    model.seen.clear()  # the user's own object is as it was
    trainer(max_epochs=1).fit(model, data)
    assert all(len(batch) == 4 for batch in model.seen)


def test_only_what_was_trained_on_is_kept() -> None:
    """``b`` is longer than ``a``, and min_size leaves the rest of it out."""
    replay = Replay(memory_size=100, loader="b")
    trainer(replay).fit(two(), CombinedLoader({"a": loader(900, 8), "b": loader(0, num_workers=1)}, "min_size"))
    assert sorted(replay.memory[slot][0][0, 0, 0].item() for slot in range(len(replay.memory))) == list(range(8))


@pytest.mark.parametrize("step", [4, 8])
def test_resume_is_bit_exact(tmp_path: Any, step: int) -> None:
    """Saved at the end of an epoch of 4 steps, in which the shorter ``b`` was gone through twice."""

    def data() -> dict[str, Any]:
        return {"a": loader(900), "b": loader(100, 8, num_workers=1)}

    replay, model = after_a_past(), two()
    past = replay.state_dict()
    trainer(replay, Save(tmp_path / "a.ckpt", step), max_epochs=3).fit(model, data())
    resumed, twin = Replay(memory_size=8, loader="b"), two()
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["Replay"]["experience_index"] == 1
    trainer(resumed, max_epochs=3).fit(twin, data(), ckpt_path=tmp_path / "a.ckpt")
    assert twin.seen == model.seen[step:]
    assert torch.equal(weights(twin), weights(model))
    assert resumed.memory.ids == replay.memory.ids
    assert past["experience_index"] == 1 and resumed.experience_index == 2


def test_what_to_pass_is_said() -> None:
    both = {"a": loader(0), "b": loader(0)}
    with pytest.raises(ValueError, match="cannot choose among several training loaders: pass loader=, one of a, b"):
        trainer(Replay(1)).fit(two(), both)
    with pytest.raises(ValueError, match="loader='c' is not a training loader: pass loader=, one of a, b"):
        trainer(Replay(1, loader="c")).fit(two(), both)
    with pytest.raises(ValueError, match=r"loader='a' is not a training loader: .*there is one DataLoader"):
        trainer(Replay(1, loader="a")).fit(module(), loader(0))
    with pytest.raises(ValueError, match="mode='sequential'"):
        trainer(Replay(1, loader="a")).fit(two(), CombinedLoader(both, "sequential"))
