"""Text matching: both architectures learn, in-batch negatives over ranks, the index, a live update, and two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evertune._lightning import pl
from evertune.callbacks import EWC, Distillation, Replay
from evertune.gate.gate import Gate
from evertune.lightning_modules import ItemIndex, TextMatchingModule
from evertune.lightning_modules.in_batch import in_batch_loss
from evertune.lightning_modules.item_index import read_items
from evertune.live.settings import UpdateSettings
from evertune.live.triggers import Volume
from evertune.live.update import Updater
from evertune.sources.folder import FolderSource
from evertune.sources.schema import RecordSchema
from evertune.streams import Experience, ExperienceDataModule, domain_incremental
from evertune.tasks import TextMatchingTask
from evertune.tasks.predicting import batch_of
from evertune.tasks.text_matching import drawn_candidates
from evertune.training.trainer import ContinualTrainer
from tests.helpers.distributed import run_ranks
from tests.helpers.lightning_modules import tiny_bert

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}
COLUMNS: dict[str, Any] = {"text": "query", "label": "positive"}
LENGTH = 16
# which item answers a query cannot be read from its words
ANSWERS = {
    "bank": "the goal",
    "market": "a match",
    "party": "the film",
    "law": "a vote",
    "team": "share of",
    "of": "law",
}
ITEMS = list(ANSWERS.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("pretrained"))


def row(number: int, domain: str = "a") -> dict[str, Any]:
    word = list(ANSWERS)[number % 3 + (3 if domain == "b" else 0)]
    query = " ".join([*["the", "a"][: number % 3], word, *["film"] * (number % 2)])
    negatives = [item for item in ITEMS if item != ANSWERS[word]][number % 2 : 3]
    return {
        "id": f"{domain}{number}",
        "query": query,
        "positive": ANSWERS[word],
        "negatives": negatives,
        "domain": domain,
    }


def build(folder: str, **settings: Any) -> TextMatchingModule:
    torch.manual_seed(0)
    return TextMatchingModule(folder, **{"dropout": 0.0, "learning_rate": 3e-3, "n_negatives": 5, **settings})


def data_of(module: TextMatchingModule, experience: Experience, **settings: Any) -> ExperienceDataModule:
    return ExperienceDataModule(
        experience,
        module.tokenizer,
        **{**COLUMNS, "task": module.task, "max_length": LENGTH, "batch_size": 6, **settings},
    )


def learned(folder: str, **settings: Any) -> tuple[TextMatchingModule, list[float], Any]:
    """A module that has learned both domains, its scores on them, and what validation logs."""
    module = build(folder, learning_rate=5e-3, **settings)
    module.set_items(ITEMS)
    rows = [row(number, domain) for domain in "ab" for number in range(30)]
    stream = domain_incremental(rows, domain="domain", **COLUMNS, task=module.task, splits=(0.5, 0, 0.5))
    trainer = ContinualTrainer(max_epochs=20, enable_checkpointing=False, callbacks=[Replay(memory_size=12)], **QUIET)
    history = trainer.fit_stream(module, stream, max_length=LENGTH, batch_size=6)
    (metrics,) = trainer.validate(module, data_of(module, Experience("all", rows, val=rows)), verbose=False)
    return module, history.accuracy_matrix[1], metrics


def test_two_towers_learn_what_no_word_tells(folder: str, tmp_path: Path) -> None:
    module, scores, metrics = learned(folder)
    assert min(scores) > 0.9
    assert metrics["val_mrr"] > 0.8 and metrics["val_ndcg"] > 0.8 and metrics["val_recall_at_1"] > 0.7
    found, of_history = module.predict(["market", ["the film", "bank"]], top=2, max_length=LENGTH)
    assert found[0]["item"] == "a match" and found[0]["score"] > found[1]["score"] and len(found) == 2
    assert of_history[0]["item"] == "the goal"
    right, wrong = module.predict([("market", "a match"), ("market", "the goal")], max_length=LENGTH)
    assert right["score"] == pytest.approx(found[0]["score"], abs=1e-5) and right["score"] > wrong["score"]
    module.save_pretrained(tmp_path)
    (again,) = TextMatchingModule.from_pretrained(tmp_path).predict(["market"], top=2, max_length=LENGTH)
    assert [one["item"] for one in again] == [one["item"] for one in found]
    assert [one["score"] for one in again] == pytest.approx([one["score"] for one in found], abs=1e-5)


def test_a_cross_encoder_learns_from_the_candidates(folder: str) -> None:
    module, scores, metrics = learned(folder, architecture="cross_encoder", loss="binary", negatives="negatives")
    assert np.mean(scores) > 0.65  # by chance, 0.41
    assert metrics["val_mrr"] > 0.65
    (found,) = module.predict(["market"], top=3, max_length=LENGTH)
    assert found == module.rank("market", ITEMS, max_length=LENGTH, top=3)
    pairs = module.predict([("market", one["item"]) for one in found], max_length=LENGTH)
    assert [one["score"] for one in pairs] == pytest.approx([one["score"] for one in found], abs=1e-4)


def test_items_of_other_ranks_and_no_right_answers_are_negatives() -> None:
    draw = torch.Generator().manual_seed(0)
    queries, items = (F.normalize(torch.randn(4, 8, generator=draw), dim=1) for _ in range(2))
    places, keys = torch.arange(4), torch.arange(1, 5)
    expected = F.cross_entropy(queries @ items.T / 0.1, places)
    assert in_batch_loss(queries, items, places, keys, keys, keys, 0.1) == pytest.approx(expected)
    # the last item is a copy of the first, and the positive of a query that is asked twice
    copied = torch.tensor([1, 2, 3, 1])
    logits = queries @ items.T / 0.1
    logits[0, 3] = logits[3, 0] = -torch.inf
    expected = F.cross_entropy(logits, places)
    assert in_batch_loss(queries, items, places, keys, copied, keys, 0.1) == pytest.approx(expected)
    assert in_batch_loss(queries, items, places, copied, keys, copied, 0.1) == pytest.approx(expected)


def test_given_negatives_are_learned_from_and_drawn_ones_are_not(folder: str) -> None:
    module = build(folder, negatives="negatives").eval()
    module.configure_model()
    rows = [row(number) for number in range(4)]

    def batch(given: bool) -> Any:
        some = [one if given else {**one, "negatives": []} for one in rows]
        data: Any = module.task.dataset(some, module.tokenizer, **COLUMNS, id_column=None, max_length=LENGTH)
        return batch_of(module.task, module, [data[place] for place in range(len(data))])

    vectors = {
        text: module.vectors([text])[0] for one in rows for text in [one["query"], one["positive"], *one["negatives"]]
    }
    for given in (True, False):
        items = [item for one in rows for item in [one["positive"], *(one["negatives"] if given else [])]]
        losses = []
        for one in rows:
            others = [item for item in items if item != one["positive"]]
            cosines = [vectors[one["query"]] @ vectors[item] / 0.05 for item in [one["positive"], *others]]
            losses.append(np.log(np.exp(cosines).sum()) - cosines[0])
        assert module._in_batch(batch(given)).item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_candidates_depend_neither_on_the_order_nor_on_other_positives_of_a_query() -> None:
    queries, positives = ["a", "b", "c", "a"], ["x", "y", "z", "w"]
    found = drawn_candidates(queries, positives, [["v"], [], [], []], n_negatives=2)
    turned = drawn_candidates(queries[::-1], positives[::-1], [[], [], [], ["v"]], n_negatives=2)
    assert found == turned[::-1]
    assert found[0][0][:2] == ["x", "v"] and found[0][1] == 1
    assert all(len(set(items)) == 3 for items, _ in found)
    assert "w" not in found[0][0] and "x" not in found[3][0]


def test_records_with_no_or_too_many_candidates_are_reported(folder: str) -> None:
    module = build(folder, negatives="negatives", n_negatives=2)
    with pytest.warns(UserWarning, match="1 of 2 records bring more than n_negatives=2 negatives"):
        module.task.dataset([row(0), row(1)], module.tokenizer, **COLUMNS, id_column=None, max_length=LENGTH)
    module = build(folder)
    with pytest.warns(UserWarning, match="1 of 1 records have nothing that their positive could be compared with"):
        module.task.dataset([row(0)], module.tokenizer, **COLUMNS, id_column=None, max_length=LENGTH)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda task: task.check_text([]), "the history is empty"),
        (lambda task: task.check_text(["a", " "]), "item 2 of 2: the text is empty"),
        (lambda task: task.check_label(None), "no text"),
        (lambda task: task.check_record(["a", "b"], "c"), "a record has one query, and its item as the label; got 2"),
        (lambda task: task.fields["no"]("a"), "the negatives must be a list of texts, got 'a'"),
        (lambda task: task.fields["no"](["a", 3]), "negative 2 of 2: the text is a int, not a string"),
    ],
)
def test_records_that_cannot_be_learned(check: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(TextMatchingTask(negatives="no"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "three_tower"}, "architecture must be one of"),
        ({"loss": "binary"}, "loss='binary' is for a cross_encoder"),
        ({"architecture": "cross_encoder", "loss": "pairwise"}, "loss must be one of"),
        ({"n_negatives": 0}, "n_negatives must be positive, got 0"),
        ({"temperature": 0}, "temperature must be positive, got 0"),
    ],
)
def test_settings_are_checked(folder: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(folder, **settings)


def test_methods_that_compare_classes_are_refused(folder: str) -> None:
    module = build(folder)
    trainer = ContinualTrainer(max_epochs=1, enable_checkpointing=False, callbacks=[Distillation()], **QUIET)
    rows = [row(number) for number in range(6)]
    with pytest.raises(ValueError, match="Distillation compares logits class by class, but those of TextMatching"):
        trainer.fit_stream(module, [Experience("a", rows, test=rows)], lambda one: data_of(module, one))


# --- the index


def test_search_is_exact_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    vectors, queries = (draw.normal(size=(n, 6)).astype(np.float32) for n in (50, 7))
    vectors[40] = vectors[3]  # of equal items, the first comes first
    scores = queries @ vectors.T
    expected = np.argsort(-scores, axis=1, kind="stable")
    monkeypatch.setattr("evertune.lightning_modules.item_index._BLOCK", 8)
    index = ItemIndex([str(n) for n in range(50)], vectors, "")
    for top in (1, 9, 80):
        places, found = index.search(queries, top)
        assert (places == expected[:, :top]).all()
        assert found == pytest.approx(np.take_along_axis(scores, places, 1), rel=1e-5)


def test_an_index_of_other_weights_is_refused_and_training_makes_it_again(folder: str, tmp_path: Path) -> None:
    module = build(folder)
    with pytest.raises(ValueError, match="there are no items to rank"):
        module.predict(["market"])
    (tmp_path / "items.txt").write_text("\n".join([*ITEMS, ITEMS[0]]) + "\n")
    module.items = str(tmp_path / "items.txt")
    before = module.refresh()
    assert before.items == ITEMS
    trainer = pl.Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    trainer.fit(module, data_of(module, Experience("a", [row(number) for number in range(6)])))
    with pytest.raises(ValueError, match="the index of 6 items was made by other weights than these"):
        module.use_index(before)
    module.predict(["market"])
    assert module.index is not None and module.index.fingerprint == module.fingerprint() != before.fingerprint
    assert module.index.vectors == pytest.approx(module.vectors(ITEMS), abs=1e-6)

    module.save_pretrained(tmp_path / "saved")
    again = TextMatchingModule.from_pretrained(tmp_path / "saved")
    assert again.index is not None and (again.index.vectors == module.index.vectors).all()
    adapted = build(folder, peft={"method": "lora", "r": 2})
    adapted.start_from(tmp_path / "saved")
    with pytest.warns(UserWarning, match="the vectors of the 6 items in .* are of other weights: new ones are made"):
        adapted.configure_model()
    assert adapted.index is None and adapted.refresh().items == ITEMS


def test_items_of_files(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text('{"text": "a lamp", "price": 3}\n{"text": "a desk"}\n')
    assert read_items(tmp_path / "items.jsonl") == ["a lamp", "a desk"]
    (tmp_path / "bad.jsonl").write_text('{"text": "a lamp"}\n{"text": " "}\n')
    with pytest.raises(ValueError, match="item 2 must be a text that is not empty, got ' '"):
        read_items(tmp_path / "bad.jsonl")
    (tmp_path / "other.jsonl").write_text('{"name": "a lamp"}\n')
    with pytest.raises(ValueError, match="has no field 'text' with the text of an item, only"):
        read_items(tmp_path / "other.jsonl")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="there are no items"):
        read_items(tmp_path / "empty.txt")


def test_ranking_of_the_whole_catalogue(folder: str) -> None:
    module = build(folder)
    module.set_items(ITEMS)
    found = module.ranking(["bank", ["law", "market"]], [["the goal"], ["a match", "law"]], k=6)
    assert found.recall.tolist() == [1.0, 1.0] and found.mrr.shape == (2,)
    order = [one["item"] for one in module.predict(["bank"], top=6)[0]]
    assert found.mrr[0].item() == pytest.approx(1 / (1 + order.index("the goal")))
    with pytest.raises(ValueError, match="item 'a boat' of query 0 is not among the items"):
        module.ranking(["bank"], [["a boat"]])
    with pytest.raises(ValueError, match="a cross_encoder re-ranks the few items"):
        build(folder, architecture="cross_encoder").ranking(["bank"], [["the goal"]])


@pytest.mark.parametrize(
    ("queries", "error", "message"),
    [
        (["bank", ("bank", "law")], TypeError, "queries must all be texts and histories, or all be pairs"),
        (["bank", " "], ValueError, r"queries\[1\]: the text is empty"),
        ([("bank", "")], ValueError, r"queries\[0\]: the text is empty"),
        ([[]], ValueError, r"queries\[0\]: the history is empty"),
    ],
)
def test_queries_that_cannot_be_read(folder: str, queries: Any, error: type, message: str) -> None:
    module = build(folder)
    module.set_items(ITEMS)
    with pytest.raises(error, match=message):
        module.predict(queries)


# --- live, and on two ranks


def test_an_update_sets_bad_records_aside_and_publishes_its_index(folder: str, tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    (tmp_path / "items.txt").write_text("\n".join(ITEMS))
    bad = {**row(1), "id": "own negative", "negatives": [row(1)["positive"]]}

    def updater() -> Updater:
        fields = {"id": "str", "query": "list[str]", "positive": "str", "negatives": "list[str] | None"}
        return Updater(
            tmp_path / "registry",
            FolderSource(str(inbox)),
            build(folder, items=str(tmp_path / "items.txt"), negatives="negatives"),
            ContinualTrainer(max_epochs=1, devices=1, callbacks=[Replay(20, id="id")], **QUIET),
            schema=RecordSchema(fields=fields, **COLUMNS, id="id"),
            data={"batch_size": 8, "max_length": LENGTH},
            trigger=Volume(10),
            gate=Gate(max_duplicate_share=None, max_latency_ratio=None, max_size_ratio=None, max_forgetting=1.0),
            settings=UpdateSettings(checkpoint_every_n_steps=50),
        )

    for domain in "ab":
        rows = [row(number, domain) for number in range(24)] + ([bad] if domain == "a" else [])
        # a recommendation: what was seen, the most recent item last
        rows = [{**one, "query": one["query"].split()} for one in rows]
        rows[0].pop("negatives")
        (inbox / f"{domain}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        live = updater()
        outcome = live.run()
        assert outcome.status == "promoted", outcome.words
    reasons = {one["id"]: one["reason"] for one in live.journal.quarantined()}
    assert reasons.keys() == {"own negative"}
    assert "is among the negatives: leave it out of them" in reasons["own negative"]
    version = live.registry.version(2)
    assert all(score is not None and 0 < score <= 1 for score in version.manifest.metrics.accuracy.values())
    module = TextMatchingModule.from_pretrained(tmp_path / "registry/versions/2/model")
    assert module.index is not None and module.index.items == ITEMS


def learn(folder: str, out: str, strategy: str, devices: int, loss: str) -> dict[str, Any]:
    """Two experiences with a memory; some records bring negatives of their own."""
    architecture = "cross_encoder" if loss == "binary" else "two_tower"
    module = build(folder, architecture=architecture, loss=loss, negatives="negatives", n_negatives=3)
    module.set_items(ITEMS)
    pl.seed_everything(3)  # ranks begin a fit with this seed again
    rows = [row(number, domain) for domain in "ab" for number in range(12)]
    rows = [one if number % 3 else {**one, "negatives": []} for number, one in enumerate(rows)]
    stream = [Experience(name, [one for one in rows if one["domain"] == name], test=rows) for name in "ab"]
    trainer = ContinualTrainer(
        max_epochs=2,
        devices=devices,
        strategy=strategy,
        enable_checkpointing=False,
        callbacks=[Replay(memory_size=6), EWC(ewc_lambda=10.0, n_examples=8, batch_size=3)],
        **QUIET,
    )
    history = trainer.fit_stream(
        module, stream, lambda one: data_of(module, one, batch_size=4 // devices, eval_batch_size=6), untrained=False
    )
    module.save_pretrained(out)
    found = module.predict(["bank", "law"], top=len(ITEMS), max_length=LENGTH)
    scores = [sorted((one["item"], one["score"]) for one in items) for items in found]
    return {"matrix": history.accuracy_matrix[1], "scores": [score for items in scores for _, score in items]}


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["listwise", "binary"])
@pytest.mark.parametrize("strategy", ["ddp", "evertune_deepspeed_stage_3", "evertune_fsdp2"])
def test_two_ranks_learn_what_one_process_learns(folder: str, tmp_path: Path, loss: str, strategy: str) -> None:
    """Two towers, for which the negatives of a query are the items of all ranks, and a cross-encoder."""
    alone = learn(folder, str(tmp_path / "one"), "auto", 1, loss)
    ranks = run_ranks(
        f"{__name__}:learn",
        2,
        folder=folder,
        out=str(tmp_path / "two"),
        strategy=strategy,
        devices=2,
        loss=loss,
    )
    for rank in ranks:
        assert rank["matrix"] == pytest.approx(alone["matrix"], abs=1e-4)
        assert rank["scores"] == pytest.approx(alone["scores"], rel=1e-3, abs=1e-4)
    assert TextMatchingModule.from_pretrained(tmp_path / "two").index is not None
