"""Relation extraction: markers, shortening around them, relations that arrive over time, and two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from evertune._lightning import pl
from evertune.callbacks import EWC, Replay
from evertune.gate.gate import Gate
from evertune.lightning_modules import RelationExtractionModule
from evertune.live.settings import UpdateSettings
from evertune.live.triggers import Volume
from evertune.live.update import Updater
from evertune.sources.folder import FolderSource
from evertune.sources.schema import RecordSchema
from evertune.streams import Experience, ExperienceDataModule, class_incremental
from evertune.tasks.relation_extraction import MARKERS, RelationExtractionTask, shortened
from evertune.training.trainer import ContinualTrainer
from tests.helpers.distributed import run_ranks
from tests.helpers.lightning_modules import tiny_bert

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}
# the relation depends on which word is the head: the texts are the same
PAIRS = {"owns": ("bank", "share"), "owned by": ("share", "bank"), "no_relation": ("film", "goal")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("pretrained"))


def row(number: int, relation: str) -> dict[str, Any]:
    words = ["the", "of", "a", "film", "goal"]
    text = " ".join([*words[: number % 5], "bank share market", *words[number % 3 :]])
    spans = [[text.index(name), text.index(name) + len(name)] for name in PAIRS[relation]]
    return {"id": f"{relation} {number}", "text": text, "head": spans[0], "tail": spans[1], "relation": relation}


ROWS = [row(number, relation) for relation in PAIRS for number in range(30)]


def build(folder: str, **settings: Any) -> RelationExtractionModule:
    torch.manual_seed(0)
    return RelationExtractionModule(folder, dropout=0.0, learning_rate=3e-3, **settings)


@pytest.mark.parametrize(
    ("head", "tail", "marked"),
    [
        ([4, 8], [9, 14], "the [E1] bank [/E1] [E2] share [/E2]"),
        ([9, 14], [4, 8], "the [E2] bank [/E2] [E1] share [/E1]"),
        ([0, 14], [4, 8], "[E1] the [E2] bank [/E2] share [/E1]"),
        ([4, 8], [4, 14], "the [E2] [E1] bank [/E1] share [/E2]"),
    ],
)
def test_markers(head: list[int], tail: list[int], marked: str) -> None:
    assert RelationExtractionTask().marked("the bank share", head, tail) == marked


def test_long_texts_are_shortened_around_both_entities(folder: str) -> None:
    tokenizer = build(folder).tokenizer
    text = RelationExtractionTask().marked("the " * 20 + "bank of share" + " a" * 20, [80, 84], [88, 93])
    for max_length in (9, 12, 13, 30):
        (short,) = shortened([text], tokenizer, max_length)
        tokens = tokenizer(short)["input_ids"]
        assert len(tokens) == max_length
        assert all(tokenizer.convert_tokens_to_ids(marker) in tokens for marker in MARKERS)
    assert short.startswith("the the") and short.endswith("a a")
    assert shortened([text], tokenizer, 100) == [text]
    with pytest.raises(ValueError, match="are 7 tokens apart with their markers, and max_length=8 leaves 6: raise max"):
        shortened([text], tokenizer, 8)


def test_relations_arrive_over_time_and_the_direction_counts(folder: str, tmp_path: Path) -> None:
    module = build(folder)
    columns: dict[str, Any] = {"label": "relation", "task": module.task}
    order = ["owns", "owned by", "no_relation"]
    stream = class_incremental(ROWS, classes_per_experience=[2, 1], class_order=order, **columns)
    callbacks: list[Any] = [Replay(memory_size=60), EWC(n_examples=6)]
    trainer = ContinualTrainer(max_epochs=14, enable_checkpointing=False, callbacks=callbacks, **QUIET)
    history = trainer.fit_stream(module, stream, max_length=24, batch_size=6)
    assert module.classes == order
    assert module.head.weight.shape == (3, 64)
    assert min(history.accuracy_matrix[1]) > 0.6
    asked = [{key: one[key] for key in ("text", "head", "tail")} for one in (row(3, "owns"), row(3, "owned by"))]
    assert asked[0]["text"] == asked[1]["text"]
    said = module.predict(asked)
    assert [one["relation"] for one in said] == ["owns", "owned by"]
    assert said == module.predict([module.task.marked(one["text"], one["head"], one["tail"]) for one in asked])
    assert all(0.5 < one["probability"] <= 1 for one in said)

    (scores,) = trainer.validate(module, ExperienceDataModule(stream[0], module.tokenizer, **columns), verbose=False)
    assert 0.8 < scores["val_accuracy"] <= scores["val_f1"] <= 1  # what is taken for no relation costs recall alone
    module.save_pretrained(tmp_path)
    again = RelationExtractionModule.from_pretrained(tmp_path)
    assert again.backbone.get_input_embeddings().num_embeddings == len(again.tokenizer) == 22
    assert again.predict(asked) == said


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        (7, TypeError, r"records\[0\] must be a record with text, head and tail, got 7"),
        ("the [E1] bank [/E1]", ValueError, r"records\[0\] must have each marker once, but not so \[E2\], \[/E2\]"),
        ({"text": "the bank", "head": [0, 3]}, ValueError, r"records\[0\]: it has no tail"),
        (
            {"text": "the bank", "head": [0, 3], "tail": [4, 9]},
            ValueError,
            r"tail=\[4, 9\] is not in the text, which has",
        ),
        ({"text": "the bank", "head": [3, 4], "tail": [4, 8]}, ValueError, r"head=\[3, 4\] is blank in the text"),
        ({"text": ["the"], "head": [0, 1], "tail": [0, 1]}, ValueError, 'a list of words; set unit="words"'),
    ],
)
def test_records_that_cannot_be_read(folder: str, record: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        build(folder, classes=["owns"]).predict([record])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"multi_label": True}, "multi_label=True is not for relations"),
        ({"pooling": "cls"}, "pooling='cls' is not for relations"),
        ({"entities": ["head"]}, "entities must be the two fields"),
        ({"unit": "tokens"}, "unit must be one of"),
    ],
)
def test_settings_are_checked(folder: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(folder, **settings)


def test_an_update_sets_bad_records_aside(folder: str, tmp_path: Path) -> None:
    (tmp_path / "inbox").mkdir()
    bad = {**row(0, "owns"), "id": "outside", "tail": [90, 95]}
    far = {**row(0, "owns"), "id": "far", "text": "bank" + " the" * 30 + " share", "head": [0, 4], "tail": [125, 130]}
    lines = "".join(json.dumps(one) + "\n" for one in [*ROWS, bad, far])
    (tmp_path / "inbox" / "a.jsonl").write_text(lines)

    def updater(**schema: Any) -> Updater:
        return Updater(
            tmp_path / "registry",
            FolderSource(str(tmp_path / "inbox")),
            build(folder),
            ContinualTrainer(max_epochs=1, devices=1, callbacks=[Replay(20, id="id")], **QUIET),
            schema=RecordSchema(label="relation", id="id", **schema),
            data={"batch_size": 8, "max_length": 24},
            trigger=Volume(10),
            gate=Gate(max_duplicate_share=None, min_new_agreement=None),
            settings=UpdateSettings(checkpoint_every_n_steps=50),
        )

    with pytest.raises(ValueError, match="the records lack head, tail, which RelationExtractionTask reads"):
        updater()
    fields = {"id": "str", "text": "str", "relation": "str", "head": "list[int]", "tail": "list[int]"}
    live = updater(fields=fields)
    outcome = live.run()
    assert outcome.status == "promoted", outcome.words
    assert set(live.registry.version(1).manifest.classes) == set(PAIRS)
    reasons = {one["id"]: one["reason"] for one in live.journal.quarantined()}
    assert reasons.keys() == {"outside", "far"}
    assert "tail=[90, 95] is not in the text" in reasons["outside"]
    assert "tokens apart with their markers, and max_length=24 leaves 22" in reasons["far"]


def learn(folder: str, strategy: str, devices: int) -> dict[str, Any]:
    module = build(folder)
    pl.seed_everything(3)  # ranks begin a fit with this seed again
    columns: dict[str, Any] = {"label": "relation", "task": module.task}
    rows = [one for number, one in enumerate(ROWS) if number % 30 < 8]
    names = [["owns", "owned by"], ["no_relation"]]
    stream = [
        Experience("+".join(some), [one for one in rows if one["relation"] in some], test=rows, classes=some)
        for some in names
    ]
    trainer = ContinualTrainer(
        max_epochs=2,
        devices=devices,
        strategy=strategy,
        enable_checkpointing=False,
        callbacks=[Replay(memory_size=6)],
        **QUIET,
    )

    def data(experience: Experience) -> ExperienceDataModule:
        tested = [one for one in rows if one["relation"] in module.classes + experience.classes]
        return ExperienceDataModule(
            Experience(experience.name, experience.train, test=tested, classes=experience.classes),
            module.tokenizer,
            **columns,
            batch_size=4 // devices,
            max_length=24,
        )

    history = trainer.fit_stream(module, stream, data, untrained=False)
    said = module.predict(rows[:8])
    return {"matrix": history.accuracy_matrix[1], "probabilities": [one["probability"] for one in said]}


@pytest.mark.slow
def test_two_ranks_with_sharded_weights_learn_what_one_process_learns(folder: str) -> None:
    alone = learn(folder, "auto", 1)
    for rank in run_ranks(f"{__name__}:learn", 2, folder=folder, strategy="evertune_deepspeed_stage_3", devices=2):
        assert rank["matrix"] == pytest.approx(alone["matrix"], abs=1e-4)
        assert rank["probabilities"] == pytest.approx(alone["probabilities"], rel=1e-2)
