"""Entities of replayed texts become others of their type: which, what it depends on, and who does not see it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from evertune._lightning import pl
from evertune.callbacks import AdversarialTraining, Augmentation, Distillation, MentionReplacement, Replay
from evertune.lightning_modules import SequenceClassificationModule, TokenClassificationModule
from evertune.lightning_modules.saving import whole
from evertune.streams import Experience, ExperienceDataModule
from evertune.tasks.base import IGNORED
from evertune.training.trainer import ContinualTrainer
from tests.helpers.distributed import run_ranks
from tests.helpers.function_space import SaveAt, quiet
from tests.helpers.lightning_modules import tiny_bert

ORGS = ["bank", "market share", "law"]
TEAMS = ["team", "party goal match"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


def sentence(org: str, team: str) -> dict[str, Any]:
    """``the ORG of a TEAM TEAM vote``: the second team comes right after the first."""
    parts = [("the", ""), (org, "ORG"), ("of", ""), ("a", ""), (team, "TEAM"), (TEAMS[0], "TEAM"), ("vote", "")]
    words, tags = [], []
    for text, kind in parts:
        for number, word in enumerate(text.split()):
            words.append(word)
            tags.append(f"{'I' if number else 'B'}-{kind}" if kind else "O")
    return {"text": words, "label": tags}


OLD = [sentence(ORGS[n % 3], TEAMS[n % 2]) for n in range(12)]
NEW = [{"text": ["film", ORGS[n % 3].split()[0], "vote"], "label": ["O", "B-ORG", "O"]} for n in range(12)]


class Seen(TokenClassificationModule):
    """Notes the texts that it is trained on: words and tags."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.seen: list[tuple[list[str], list[str]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
        self.seen += read(self, batch)
        return super().training_step(batch, batch_idx)


class Started(pl.Callback):
    """Notes the texts of batches in ``on_train_batch_start``."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[str], list[str]]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.seen += read(module, batch)


def read(module: Any, batch: Any) -> list[tuple[list[str], list[str]]]:
    found = []
    for ids, mask, targets in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        tokens, numbers = ids[mask == 1], targets[mask == 1]
        assert (targets[mask == 0] == IGNORED).all()
        assert numbers[0] == numbers[-1] == IGNORED  # the special tokens
        words = module.tokenizer.convert_ids_to_tokens(tokens[1:-1])
        found.append((words, [module.tags[n] for n in numbers[1:-1].tolist()]))
    return found


def module_of(bert: str, **settings: Any) -> Seen:
    torch.manual_seed(0)
    return Seen(bert, learning_rate=1e-3, dropout=0.0, classes=["ORG", "TEAM"], **settings)


def joined(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "text": " ".join(row["text"])} for row in rows]


def update(module: Any, rows: Any, *callbacks: Any, batch_size: int = 4, ckpt_path: Any = None, **settings: Any) -> Any:
    data = ExperienceDataModule(
        Experience("one", joined(rows), classes=["ORG", "TEAM"]),
        module.tokenizer,
        task=module.task,
        batch_size=batch_size,
        max_length=32,
    )
    trainer = quiet(*callbacks, **settings)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


def template(words: list[str], tags: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """A text with the types of its entities in their places, and the entities."""
    frame, entities = [], []
    for word, tag in zip(words, tags, strict=True):
        if tag.startswith("I-"):
            kind, name = entities[-1]
            assert kind == tag[2:]
            entities[-1] = kind, f"{name} {word}"
        elif tag == "O":
            frame.append(word)
        else:
            frame.append(tag[2:])
            entities.append((tag[2:], word))
    return frame, entities


def test_entities_of_replayed_texts_become_others_of_their_type(bert: str) -> None:
    module, replay, started = module_of(bert), Replay(12), Started()
    mentions = MentionReplacement(share=1.0)
    update(module, OLD, replay, mentions)
    assert sorted(module.seen) == sorted((row["text"], row["label"]) for row in OLD)  # nothing is replayed yet
    module.seen.clear()
    update(module, NEW, replay, mentions, started, max_epochs=20)
    new = sorted((row["text"], row["label"]) for row in NEW * 20)
    assert sorted(one for one in module.seen if one[0][0] == "film") == new
    assert sorted(one for one in started.seen if one[0][0] == "film") == new
    replayed = [template(*one) for one in module.seen if one[0][0] != "film"]
    assert len(replayed) == 240 and all(
        frame == ["the", "ORG", "of", "a", "TEAM", "TEAM", "vote"] for frame, _ in replayed
    )
    counts = Counter(entity for _, entities in replayed for entity in entities)
    shares = {entity: count / 240 for entity, count in counts.items()}
    # As often as in the memory, where each text also ends with a team of one word.
    for name in ORGS:
        assert shares["ORG", name] == pytest.approx(1 / 3, abs=0.12)
    assert shares["TEAM", "team"] == pytest.approx(1.5, abs=0.15)
    assert shares["TEAM", "party goal match"] == pytest.approx(0.5, abs=0.15)
    assert set(shares) == {*(("ORG", name) for name in ORGS), *(("TEAM", name) for name in TEAMS)}
    # Others see the unchanged batch, and the memory holds unchanged texts.
    known = [(row["text"], row["label"]) for row in OLD]
    assert all(one in known for one in started.seen if one[0][0] != "film")
    assert sum(one not in known for one in module.seen if one[0][0] != "film") > 30  # the second team is another
    module.seen.clear()
    update(module, NEW, replay)
    kept = {tuple(one[0]) for one in module.seen}
    assert kept <= {tuple(row["text"]) for row in OLD + NEW}  # without the callback


def test_a_share_of_the_entities_is_replaced(bert: str) -> None:
    rows = [sentence(ORGS[n % 3], TEAMS[1]) for n in range(3)]
    module, replay = module_of(bert), Replay(12)
    update(module, rows, replay)
    module.seen.clear()
    update(module, NEW, replay, MentionReplacement(share=0.3), max_epochs=20)
    replayed = [template(*one)[1] for one in module.seen if one[0][0] != "film"]
    teams = [name for entities in replayed for kind, name in entities[1:2]]
    # Half of the teams in the memory are the other one.
    assert sum(name != TEAMS[1] for name in teams) / len(teams) == pytest.approx(0.15, abs=0.07)


def test_words_of_several_pieces_move_as_a_whole_and_padding_may_be_on_the_left(bert: str) -> None:
    from transformers import BertTokenizer

    class Left(Seen):
        @property
        def tokenizer(self) -> Any:
            if self._tokenizer is None:
                vocab = BertTokenizer.from_pretrained(bert).get_vocab() | {"##s": 18, "##et": 19}
                self._tokenizer = BertTokenizer(vocab=vocab, model_max_length=32, padding_side="left")
            return self._tokenizer

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            for ids, mask, targets in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
                n = int(mask.sum())
                assert mask[-n:].all() and not mask[:-n].any()
                words = self.tokenizer.convert_ids_to_tokens(ids[-n:])
                self.texts.append((words, targets[-n:].tolist()))
            return TokenClassificationModule.training_step(self, batch, batch_idx)

    torch.manual_seed(0)
    module = Left(bert, dropout=0.0, classes=["ORG"])
    module.configure_model()
    module.backbone.resize_token_embeddings(20)
    module.texts = []
    rows = [{"text": [name, "vote"], "label": ["B-ORG", "O"]} for name in ("banks", "laws", "team")]
    replay = Replay(3)
    update(module, rows, replay)
    module.texts.clear()
    update(module, [{"text": ["film"], "label": ["O"]}] * 4, replay, MentionReplacement(share=1.0), max_epochs=10)
    replayed = {(tuple(words), tuple(numbers)) for words, numbers in module.texts if "film" not in words}
    no = IGNORED
    assert replayed == {
        (("[CLS]", "bank", "##s", "vote", "[SEP]"), (no, 1, no, 0, no)),
        (("[CLS]", "law", "##s", "vote", "[SEP]"), (no, 1, no, 0, no)),
        (("[CLS]", "team", "vote", "[SEP]"), (no, 1, 0, no)),
    }
    assert len(module.texts) == 80


def test_a_text_is_changed_alike_in_any_batch_and_after_a_resume(bert: str, tmp_path: Path) -> None:
    """The last text of each epoch's last batch as well, which a resume in the middle of an epoch begins with."""

    def changed(batch_size: int, **settings: Any) -> list[Any]:
        module, replay = module_of(bert), Replay(12)
        update(module, OLD, replay)
        module.seen.clear()
        callbacks = [replay, MentionReplacement(share=0.7, seed=3), *settings.pop("more", [])]
        update(module, NEW, *callbacks, batch_size=batch_size, max_epochs=2, **settings)
        return [one for one in module.seen if one[0][0] != "film"]

    whole_fit = changed(4, more=[SaveAt(tmp_path / "middle.ckpt")])
    assert sorted(changed(12)) == sorted(whole_fit) and len(whole_fit) == 24
    assert sorted(whole_fit[:12]) != sorted(whole_fit[12:])  # another epoch
    resumed = changed(4, ckpt_path=tmp_path / "middle.ckpt")
    assert 0 < len(resumed) < 24 and resumed == whole_fit[-len(resumed) :]


def test_a_text_that_would_be_too_long_stays_as_it_is(bert: str) -> None:
    long = " ".join(["market"] * 12)
    rows = [sentence(long, long), sentence("bank", "team")]
    module, replay = module_of(bert), Replay(2)
    update(module, rows, replay)
    module.seen.clear()
    update(module, NEW, replay, MentionReplacement(share=1.0), max_epochs=10)
    lengths = [len(one[0]) + 2 for one in module.seen]
    assert max(lengths) <= 32  # what the model takes


def test_what_cannot_be_combined_or_is_out_of_range(bert: str) -> None:
    module = module_of(bert)
    with pytest.raises(ValueError, match="there is no Replay"):
        update(module, NEW, MentionReplacement())
    for other in (Distillation(examples="replayed"), AdversarialTraining(), Augmentation(0, 0, 0.1)):
        with pytest.raises(ValueError, match=f"{type(other).__name__} needs them to stay where they are"):
            update(module, NEW, Replay(4), MentionReplacement(), other)
    with pytest.raises(ValueError, match="two MentionReplacement callbacks"):
        update(module, NEW, Replay(4), MentionReplacement(), MentionReplacement(seed=1))
    replay, mentions = Replay(4), MentionReplacement()
    with pytest.raises(ValueError, match=r"module\.tags, .* SequenceClassificationModule lacks"):
        mentions.setup(quiet(replay, mentions), SequenceClassificationModule(bert), "fit")
    with pytest.raises(ValueError, match="share must be above 0 and at most 1, got 0"):
        MentionReplacement(share=0)
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        MentionReplacement(seed=-1)


# --- on several ranks


def learn_two_experiences(folder: str, strategy: str = "auto", devices: int = 1) -> list[float]:
    """The weights after two updates, of which the second replays."""
    pl.seed_everything(3)
    module = TokenClassificationModule(folder, learning_rate=1e-3, dropout=0.0, text_features=True)
    callbacks = [Replay(memory_size=8), MentionReplacement()]
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = ContinualTrainer(
        max_epochs=2, strategy=strategy, callbacks=callbacks, accelerator="cpu", devices=devices, **off
    )
    stream = [
        Experience(name, joined(rows), test=joined(rows[:2]), classes=["ORG", "TEAM"])
        for name, rows in (("old", OLD), ("new", NEW))
    ]
    trainer.fit_stream(module, stream, batch_size=4 // devices, max_length=32, untrained=False)
    return torch.cat([whole(parameter).flatten() for parameter in module.parameters()]).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "evertune_deepspeed_stage_3"])
def test_two_ranks_learn_what_one_process_learns(bert: str, strategy: str) -> None:
    alone = learn_two_experiences(bert)
    for rank in run_ranks(f"{__name__}:learn_two_experiences", 2, folder=bert, strategy=strategy, devices=2):
        torch.testing.assert_close(torch.tensor(rank), torch.tensor(alone), rtol=1e-4, atol=2e-5)
