"""Tokens on disk: found again, never mistaken for others, shared by processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evertune.streams import Experience, ExperienceDataModule
from evertune.tasks.token_cache import TokenCache, key_of
from tests.helpers.distributed import run_ranks
from tests.helpers.texts import TOKENIZER, make_tokenizer, text_rows


def batches(folder: Path | None, tokenizer: Any = TOKENIZER, rows: Any = None, **settings: Any) -> list[Any]:
    experience = Experience("e", rows or text_rows(20))
    data = ExperienceDataModule(experience, tokenizer, batch_size=4, token_cache=folder, **settings)
    return [batch["input_ids"].tolist() for batch in data.train_dataloader()]


def stored(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


def test_batches_are_the_same_with_and_without_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = batches(None)
    assert batches(tmp_path / "cache") == plain
    assert len(stored(tmp_path / "cache")) == 1
    monkeypatch.setattr("evertune.tasks.texts._tokenised", lambda *_: pytest.fail("tokenised again"))
    assert batches(tmp_path / "cache") == plain


def test_whatever_the_tokens_depend_on_has_a_place_of_its_own(tmp_path: Path) -> None:
    pairs = [{**row, "other": "w1"} for row in text_rows(20)]
    for number, changes in enumerate(
        [
            {},
            {"rows": text_rows(20, seed=1)},
            {"max_length": 5},
            {"tokenizer": make_tokenizer(pad_token="[PAD]", truncation_side="left")},
            {"tokenizer": make_tokenizer(pad_token="[PAD]", additional_special_tokens=["w3"])},
            {"rows": pairs, "text": ("text", "other")},
        ],
        1,
    ):
        batches(tmp_path, **changes)
        assert len(stored(tmp_path)) == number, changes


def test_texts_do_not_run_into_each_other_and_calls_leave_no_trace() -> None:
    assert key_of([["ab", "c"]], TOKENIZER, 8) != key_of([["a", "bc"]], TOKENIZER, 8)
    assert key_of([["a"], ["b"]], TOKENIZER, 8) != key_of([["a", "b"]], TOKENIZER, 8)
    before = key_of([["a"]], TOKENIZER, 8)
    TOKENIZER(["w1 w2"], truncation=True, max_length=3, padding="max_length")
    assert key_of([["a"]], TOKENIZER, 8) == before
    assert key_of([["\ud800"]], TOKENIZER, 8)  # a lone surrogate is a text, too


@pytest.mark.parametrize("damage", ["cut", "gone", "names"])
def test_damaged_tokens_are_made_again(tmp_path: Path, damage: str) -> None:
    plain = batches(tmp_path)
    [place] = [path for path in tmp_path.iterdir() if path.is_dir()]
    file = place / ("names.json" if damage == "names" else "input_ids.npy")
    file.unlink() if damage == "gone" else file.write_bytes(file.read_bytes()[:-3])
    assert batches(tmp_path) == plain
    assert batches(tmp_path) == plain and len(stored(tmp_path)) == 1


def test_without_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    class Slow:
        pad_token_id, padding_side, model_max_length = 0, "right", 32

    with pytest.raises(ValueError, match="token_cache needs a fast tokenizer, got Slow"):
        batches(tmp_path, tokenizer=Slow())


def make_slowly(folder: str) -> None:
    def make() -> dict[str, np.ndarray]:
        with (Path(folder) / "made").open("a") as file:
            file.write("x")
        return {"input_ids": np.arange(5)}

    assert TokenCache(Path(folder) / "cache").get("key", make)["input_ids"].tolist() == [0, 1, 2, 3, 4]


def test_two_processes_tokenise_once(tmp_path: Path) -> None:
    run_ranks("tests.streams.test_token_cache:make_slowly", 2, folder=str(tmp_path))
    assert (tmp_path / "made").read_text() == "x"
