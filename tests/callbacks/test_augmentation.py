"""Random changes of training texts: what they leave alone, what they depend on, and who does not see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from evertune._lightning import pl
from evertune.callbacks import Augmentation, DarkReplay, Distillation, Replay
from evertune.callbacks.augmentation import Draws, SpecialTokens, deleted, span, swapped, without
from evertune.callbacks.base import ContinualCallback
from evertune.lightning_modules import (
    CausalLMModule,
    QuestionAnsweringModule,
    Seq2SeqModule,
    SequenceClassificationModule,
    TokenClassificationModule,
)
from tests.helpers.function_space import Net, Points, SaveAt, fit, quiet
from tests.helpers.generation import records, tiny_llama, tiny_t5
from tests.helpers.lightning_modules import TEXTS, loader, tiny_bert

PAD, CLS, SEP, MASK = 0, 2, 3, 4
SPECIAL = SpecialTokens([PAD, CLS, SEP, MASK], MASK, PAD, left=False)
N = 30  # tokens of a text


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


def pairs(n: int = 200) -> dict[str, Tensor]:
    """Pairs of texts of other lengths, ``[CLS] a [SEP] b [SEP]``; all tokens of one differ."""
    rows = torch.stack([torch.randperm(90, generator=torch.Generator().manual_seed(i))[: N + 3] + 10 for i in range(n)])
    rows[:, 0], rows[:, 12] = CLS, SEP
    lengths = torch.arange(n) % 11 + 20
    places = torch.arange(N + 3)
    rows[torch.arange(n), lengths - 1] = SEP
    mask = (places < lengths[:, None]).long()
    return {
        "input_ids": rows.masked_fill(mask == 0, PAD),
        "attention_mask": mask,
        "token_type_ids": ((places > 12) & (mask == 1)).long(),
    }


def drawn(batch: dict[str, Tensor], key: int = 1) -> tuple[Tensor, Draws]:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return SPECIAL.others(ids, mask), Draws(ids, mask, key)


def words(row: Tensor) -> list[int]:
    return [token for token in row.tolist() if token >= 10]


# --- each change


def test_deletion_leaves_out_a_share_of_the_tokens_and_closes_up() -> None:
    batch = pairs()
    free, draws = drawn(batch)
    gone = deleted(free, 0.3, draws)
    assert not gone[~free].any()
    assert abs(float(gone.sum() / free.sum()) - 0.3) < 0.03
    changed = without(batch, gone, SPECIAL)
    for row in range(len(gone)):
        kept = (batch["attention_mask"][row] == 1) & ~gone[row]
        n = int(kept.sum())
        for name, values in changed.items():
            assert values[row, :n].tolist() == batch[name][row][kept].tolist()  # in their order, with their kinds
            assert not values[row, n:].any()  # padding
        assert changed["input_ids"][row].tolist().count(SEP) == 2 and changed["input_ids"][row, 0] == CLS
    # Padded on the left, the same tokens are left out.
    order = torch.argsort(batch["attention_mask"], dim=1, stable=True)
    flipped = {name: values.gather(1, order) for name, values in batch.items()}
    free, draws = drawn(flipped)
    left = without(flipped, deleted(free, 0.3, draws), SPECIAL._replace(left=True))
    for one, other in zip(left["input_ids"], changed["input_ids"], strict=True):
        assert one[one != PAD].tolist() == other[other != PAD].tolist()
    assert left["attention_mask"][:, -1].all()


def test_of_every_text_a_token_is_left() -> None:
    batch = pairs(50)
    free, draws = drawn(batch)
    gone = deleted(free, 0.999, draws)
    assert ((free & ~gone).sum(1) >= 1).all()
    hidden = span(free, 0.999, draws)
    assert ((free & ~hidden).sum(1) == 1).all()
    nothing = torch.zeros_like(free)
    assert not deleted(nothing, 0.9, draws).any() and not span(nothing, 0.9, draws).any()


def test_swaps_move_tokens_within_a_text_of_a_pair() -> None:
    batch = pairs()
    free, draws = drawn(batch)
    ids = batch["input_ids"]
    moved = swapped(ids, free, 0.4, draws)
    assert torch.equal(moved[~free], ids[~free])
    for before, after in zip(ids, moved, strict=True):
        for part in (slice(0, 13), slice(13, None)):
            assert sorted(words(before[part])) == sorted(words(after[part]))
    assert 0.25 < float((moved != ids)[free].float().mean()) < 0.4  # some draw their own place
    assert torch.equal(swapped(ids, free, 0.0, draws), ids)


def test_a_cutoff_hides_one_span() -> None:
    free, draws = drawn(pairs())
    hidden = span(free, 0.2, draws)
    assert not hidden[~free].any()
    assert abs(float(hidden.sum() / free.sum()) - 0.2) < 0.01
    starts = set()
    for row in range(len(hidden)):
        places = hidden[row][free[row]].nonzero().flatten().tolist()
        assert places == list(range(places[0], places[0] + len(places)))
        assert abs(len(places) - 0.2 * int(free[row].sum())) < 1
        starts.add(places[0])
    assert len(starts) > 10


# --- what they depend on


def test_a_text_is_changed_alike_in_any_batch_and_differently_with_another_key() -> None:
    batch = pairs(40)

    def result(rows: list[int], width: int, key: int) -> list[list[int]]:
        some = {name: values[rows, :width] for name, values in batch.items()}
        free, draws = drawn(some, key)
        ids = swapped(some["input_ids"].masked_fill(span(free, 0.2, draws), MASK), free, 0.3, draws)
        changed = without({**some, "input_ids": ids}, deleted(free, 0.3, draws), SPECIAL)
        return [
            row[mask == 1].tolist() for row, mask in zip(changed["input_ids"], changed["attention_mask"], strict=True)
        ]

    whole = result(list(range(40)), N + 3, 1)
    assert result([7, 3, 29], N + 3, 1) == [whole[7], whole[3], whole[29]]
    assert result([0], 20, 1) == whole[:1]  # without padding
    others = result(list(range(40)), N + 3, 2)
    assert all(one != other for one, other in zip(whole, others, strict=True))


class Seen(SequenceClassificationModule):
    """Notes the tokens that it is trained and validated on."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.seen: dict[str, list[list[int]]] = {"train": [], "val": []}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.note("train", batch)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.note("val", batch)
        super().validation_step(batch, batch_idx, dataloader_idx)

    def note(self, split: str, batch: Any) -> None:
        rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        self.seen[split] += [ids[mask == 1].tolist() for ids, mask in rows]


class Started(pl.Callback):
    """Notes the tokens of batches in ``on_train_batch_start``."""

    def __init__(self) -> None:
        self.tokens: list[list[int]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.tokens += [
            ids[mask == 1].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]


def classifier(bert: str) -> Seen:
    torch.manual_seed(0)
    return Seen(bert, classes=["business", "sport"], learning_rate=1e-3, dropout=0.0)


def data(bert: str, batch_size: int = 3, repeat: int = 4) -> DataLoader[Any]:
    return loader(bert, ["business", "sport"], batch_size, repeat)


def texts(bert: str, repeat: int) -> list[list[int]]:
    tokenizer = classifier(bert).tokenizer
    return [tokenizer(text)["input_ids"] for name in ("business", "sport") for text in TEXTS[name]] * repeat


def test_only_training_steps_see_the_changes(bert: str) -> None:
    module, seen = classifier(bert), Started()
    augmentation = Augmentation(0.3, 0.3, 0.2, share=1.0)
    quiet(augmentation, seen, num_sanity_val_steps=0).fit(module, data(bert), data(bert, repeat=1))
    clean = texts(bert, 4)
    assert seen.tokens == clean
    assert module.seen["val"] == texts(bert, 1)
    trained = module.seen["train"]
    assert len(trained) == len(clean) and sum(a != b for a, b in zip(trained, clean, strict=True)) > len(clean) / 2
    for one in trained:
        assert one[0] == CLS and one[-1] == SEP and PAD not in one
    again = classifier(bert)
    quiet(Augmentation(0.3, 0.3, 0.2, share=1.0), max_epochs=2).fit(again, data(bert, batch_size=8))
    assert again.seen["train"][:24] == trained  # in batches of another size
    assert again.seen["train"][24:] != trained  # another epoch
    module.seen["train"].clear()
    quiet().fit(module, data(bert))
    assert module.seen["train"] == clean  # without the callback


def test_a_share_of_the_examples_is_changed(bert: str) -> None:
    module = classifier(bert)
    quiet(Augmentation(0.0, 0.0, 0.5, share=0.5)).fit(module, data(bert, repeat=1))
    clean = texts(bert, 1)
    assert 0 < sum(MASK in one for one in module.seen["train"]) < len(clean)


def examples(bert: str) -> Any:
    """Batches of examples that a memory can hold."""
    tokenizer = classifier(bert).tokenizer

    def collate(some: list[Any]) -> Any:
        batch = tokenizer.pad({"input_ids": [one["input_ids"].tolist() for one in some]}, return_tensors="pt")
        return {**batch, "labels": ["business"] * len(some)}

    some: Any = [{"input_ids": torch.tensor(one), "labels": 0} for one in texts(bert, 4)]
    return DataLoader(some, batch_size=6, collate_fn=collate)


def test_the_memory_holds_clean_examples_and_replayed_ones_are_changed(bert: str) -> None:
    module, replay, augmentation = classifier(bert), Replay(24), Augmentation(0.0, 0.0, 0.4, share=1.0)
    for _ in range(2):
        fit(module, examples(bert), replay, augmentation)
    stored = [replay.memory[slot]["input_ids"].tolist() for slot in range(24)]
    assert all(one in texts(bert, 1) for one in stored)
    assert len(module.seen["train"]) == 24 + 48
    assert sum(MASK in one for one in module.seen["train"]) > 40


def noted(method: ContinualCallback) -> list[float]:
    """The terms that a method adds to the loss from here on."""
    inner, terms = method.loss_term, []

    def loss_term(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Tensor | None:
        term = inner(trainer, module, batch)
        assert term is not None
        terms.append(term.item())
        return term

    method.loss_term = loss_term  # type: ignore[method-assign]
    return terms


@pytest.mark.parametrize("method", [DarkReplay(24), Distillation(known=[0, 1])], ids=["DarkReplay", "Distillation"])
def test_a_changed_text_is_compared_with_the_answer_to_the_unchanged_one(bert: str, method: ContinualCallback) -> None:
    """The stored answers are those of the very weights that the first step has: only the changes make a distance."""
    module, clean = classifier(bert), Augmentation(0.0, 0.0, 0.4, share=1e-9)
    fit(module, examples(bert), method, clean)
    terms = noted(method)
    fit(module, examples(bert), method, clean, max_steps=1)
    fit(module, examples(bert), method, Augmentation(0.0, 0.0, 0.4, share=1.0), max_steps=1)
    first, second = terms
    assert abs(first) < 1e-9 and second > 1e-6


def test_a_resumed_epoch_changes_the_same(bert: str, tmp_path: Path) -> None:
    whole, part = classifier(bert), classifier(bert)
    quiet(Augmentation(share=1.0), SaveAt(tmp_path / "middle.ckpt"), max_epochs=2).fit(whole, data(bert, batch_size=12))
    trainer = quiet(Augmentation(share=1.0), max_epochs=2)
    trainer.fit(part, data(bert, batch_size=12), ckpt_path=tmp_path / "middle.ckpt")
    assert part.seen["train"] == whole.seen["train"][24:]


# --- what is refused


def test_changes_that_would_make_labels_wrong_are_refused(bert: str, tmp_path: Path) -> None:
    llama, t5 = tiny_llama(tmp_path / "llama"), tiny_t5(tmp_path / "t5")
    moving = r"Augmentation\(deletion=0.1\) would make the labels of {} wrong, .*; cutoff= is possible"
    for module in (TokenClassificationModule(bert), CausalLMModule(llama), Seq2SeqModule(t5)):
        with pytest.raises(ValueError, match=moving.format(type(module).__name__)):
            Augmentation().setup(quiet(), module, "fit")
        Augmentation(0, 0, 0.1).setup(quiet(), module, "fit")
    with pytest.raises(
        ValueError, match=r"Augmentation\(cutoff=0.1\) would make the labels of QuestionAnsweringModule"
    ):
        Augmentation(0, 0, 0.1).setup(quiet(), QuestionAnsweringModule(bert), "fit")
    with pytest.raises(ValueError, match=r"needs the special tokens of module\.tokenizer, which Net lacks"):
        fit(Net(), Points([0, 1]), Augmentation())
    with pytest.raises(ValueError, match="two Augmentation callbacks"):
        fit(classifier(bert), data(bert), Augmentation(), Augmentation(seed=1))


class Steps(CausalLMModule):
    """Notes the batches that it is trained on."""

    batches: tuple[Any, ...] = ()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.batches += (dict(batch),)
        return super().training_step(batch, batch_idx)


def test_language_models_learn_to_write_what_follows_a_hidden_span(tmp_path: Path) -> None:
    module = Steps(tiny_llama(tmp_path), learning_rate=1e-3)
    columns: dict[str, Any] = {"text": "prompt", "label": "answer", "id_column": None, "max_length": 24}
    examples = module.task.dataset(records("colours"), module.tokenizer, **columns)
    batches: Any = DataLoader(examples, batch_size=4, collate_fn=module.task.collator(module.tokenizer))
    fit(module, batches, Augmentation(0, 0, 0.3, share=1.0))
    (batch,) = module.batches
    expected = next(iter(batches))
    assert torch.equal(batch["labels"], expected["labels"])
    changed = batch["input_ids"] != expected["input_ids"]
    assert changed.any(1).all() and (batch["input_ids"][changed] == module.tokenizer.unk_token_id).all()


def test_batches_without_tokens_and_shares_out_of_range_are_refused(bert: str) -> None:
    augmentation = Augmentation()
    trainer = quiet(augmentation)
    module = classifier(bert)
    augmentation.setup(trainer, module, "fit")
    with pytest.raises(ValueError, match=r"input_ids and attention_mask \[batch, tokens\]; got a tuple"):
        augmentation.change(trainer, module, (torch.zeros(2, 3), torch.zeros(2)))
    with pytest.raises(ValueError, match="deletion must be at least 0 and below 1, got 1"):
        Augmentation(deletion=1)
    with pytest.raises(ValueError, match="share must be above 0 and at most 1, got 0"):
        Augmentation(share=0)
    with pytest.raises(ValueError, match="nothing would be changed"):
        Augmentation(0, 0, 0)
