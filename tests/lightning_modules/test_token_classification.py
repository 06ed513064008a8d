"""Entities: alignment, growth, scores and predictions of the module; and older types that new data leave unlabelled."""

from __future__ import annotations

import warnings
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from evertune._lightning import pl
from evertune.callbacks import EWC, Distillation, PseudoLabels, Replay
from evertune.lightning_modules import TokenClassificationModule
from evertune.lightning_modules.saving import whole
from evertune.live.evaluation import evaluate
from evertune.metrics import entities_in, entity_scores
from evertune.streams import Experience, ExperienceDataModule, ExperienceStream
from evertune.tasks import TokenClassificationTask
from evertune.training.trainer import ContinualTrainer
from tests.helpers.distributed import run_ranks
from tests.helpers.lightning_modules import tiny_bert

ORG, TEAM = ["bank", "market"], ["team", "party"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


def sentences(n: int, labelled: list[str]) -> list[dict[str, Any]]:
    """Each has a company and a team; the tags are of the labelled types only."""
    rows = []
    for number in range(n):
        org, team = ORG[number % 2], TEAM[number // 2 % 2]
        words = [["the", org, "of", "the", team], ["a", team, "goal", "the", org, "share"]][number // 4 % 2]
        types = dict.fromkeys(ORG, "ORG") | dict.fromkeys(TEAM, "TEAM")
        tags = ["O" if types.get(word) not in labelled else f"B-{types[word]}" for word in words]
        rows.append({"text": " ".join(words), "label": tags})
    return rows


def experience(name: str, labelled: list[str], test: list[str], n: int = 16) -> Experience:
    return Experience(name, sentences(n, labelled), test=sentences(8, test), classes=labelled)


def quiet(**settings: Any) -> dict[str, Any]:
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return {"accelerator": "cpu", "devices": 1, **off, **settings}


# --- the module


def test_new_types_append_rows_and_the_old_ones_stay(bert: str, tmp_path: Path) -> None:
    module = TokenClassificationModule(bert, classes=["ORG"], dropout=0.0)
    module.configure_model()
    before = module.head.weight.detach().clone()
    module.add_classes(["TEAM", "ORG"])
    assert module.tags == ["O", "B-ORG", "I-ORG", "B-TEAM", "I-TEAM"]
    assert torch.equal(module.head.weight[:3], before) and len(module.head.weight) == 5
    module.save_pretrained(tmp_path)
    again = TokenClassificationModule.from_pretrained(tmp_path, lazy=True)
    again.add_classes(["LOC"])
    again.configure_model()
    assert torch.equal(again.head.weight[:5], module.head.weight) and len(again.head.weight) == 7
    ahead = TokenClassificationModule(bert, classes=["ORG"], n_classes_ahead=4)
    ahead.configure_model()
    tokens = ahead.tokenizer(["the bank"], return_tensors="pt")
    assert len(ahead.head.weight) == 9 and ahead(**tokens).logits.shape == (1, 4, 3)


def test_the_head_reads_the_mean_of_the_text_beside_each_token(bert: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = TokenClassificationModule(bert, classes=["ORG"], text_features=True, dropout=0.0)
    module.configure_model()
    module.add_classes(["TEAM"])
    assert module.head.weight.shape == (5, 64)
    module.eval()
    texts = ["the bank of the team", "a goal"]
    batch = module.tokenizer(texts, padding=True, return_tensors="pt")
    found = module(**batch)
    for row, text in enumerate(texts):  # alone, without padding
        alone = module.tokenizer([text], return_tensors="pt")
        hidden = module.backbone(**alone).last_hidden_state[0]
        read = torch.cat([hidden, hidden.mean(0).expand_as(hidden)], 1)
        torch.testing.assert_close(found.features[row, : len(read)], read)
        torch.testing.assert_close(found.logits[row, : len(read)], module.head(read))
    module.save_pretrained(tmp_path)
    again = TokenClassificationModule.from_pretrained(tmp_path)
    assert torch.equal(again.eval()(**batch).logits, found.logits)


def test_only_the_first_piece_of_a_word_carries_its_tag(bert: str) -> None:
    module, task = TokenClassificationModule(bert, classes=["ORG"]), TokenClassificationTask()
    data: Any = task.dataset(
        [{"text": "bank's market", "label": ["B-ORG", "I-ORG"]}, {"text": "the bank's", "label": []}],
        module.tokenizer,
        text="text",
        label="label",
        id_column=None,
        max_length=16,
    )
    assert data[0]["labels"] == ["", "B-ORG", "", "", "I-ORG", ""]  # [CLS] bank ' s market [SEP]
    assert data[1]["labels"] == ["", "O", "O", "O", "O", ""]  # a running text: each mark is a word
    batch = module.on_before_batch_transfer(task.collator(module.tokenizer)([data[0], data[1]]), 0)
    assert batch["labels"].tolist() == [[-100, 1, -100, -100, 2, -100], [-100, 0, 0, 0, 0, -100]]
    module.tokenizer.padding_side = "left"
    short: Any = {key: value[:3] for key, value in data[0].items()}
    batch = module.on_before_batch_transfer(task.collator(module.tokenizer)([short, data[1]]), 0)
    assert batch["labels"][0].tolist() == [-100, -100, -100, -100, 1, -100]
    assert task.label(data[0]) == "ORG" and task.label(data[1]) == "O"
    with pytest.raises(ValueError, match=r"unknown tag 'B-X': the types are \['ORG'\]; call add_classes\(\['X'\]\)"):
        module.encode_labels([["B-X"]], torch.ones(1, 1))


def test_texts_that_are_cut_off_are_counted_with_their_entities(bert: str) -> None:
    module = TokenClassificationModule(bert, classes=["ORG"])
    rows = [{"text": "the bank of the market", "label": ["O", "B-ORG", "O", "O", "B-ORG"]}] * 2
    columns: dict[str, Any] = {"text": "text", "label": "label", "id_column": None}
    words = r"2 of 2 texts have more than 5 tokens and are cut off there, with 2 of 4 entities"
    with pytest.warns(UserWarning, match=words):
        data: Any = module.task.dataset(rows, module.tokenizer, **columns, max_length=5)
    assert data[0]["labels"] == ["", "O", "B-ORG", "O", ""]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.task.dataset(rows, module.tokenizer, **columns, max_length=7)
    with pytest.warns(UserWarning, match="1 of 2 texts have more than 5 tokens: no entity is found after them"):
        module.predict(["the bank of the market", "the bank of"], max_length=5)


def test_entities_are_found_by_their_characters(bert: str) -> None:
    """A head that tags by hand: "bank" begins an entity, and "share" continues it."""
    module = TokenClassificationModule(bert, classes=["ORG"])
    module.configure_model()

    def tag(part: Any, inputs: Any, output: Any) -> Any:
        rules = {module.tokenizer.convert_tokens_to_ids(word): tag for word, tag in (("bank", 1), ("share", 2))}
        numbers = torch.tensor([[rules.get(token, 0) for token in row] for row in seen[0].tolist()])
        return output._replace(logits=torch.nn.functional.one_hot(numbers, 3) * torch.tensor([18.0, 9.0, 9.0]))

    seen: list[Any] = []
    module.register_forward_pre_hook(
        lambda part, args, kwargs: seen.__setitem__(slice(None), [kwargs["input_ids"]]), with_kwargs=True
    )
    module.register_forward_hook(tag)
    found = module.predict(["A (bank share), the market share", ["bank", "bank"], "the law"])
    places = [[(one["start"], one["end"], one["label"], one["text"]) for one in entities] for entities in found]
    # "share" after "market" continues nothing, and is none
    assert places[0] == [(3, 13, "ORG", "bank share")]
    assert places[1:] == [[(0, 4, "ORG", "bank"), (5, 9, "ORG", "bank")], []]
    assert all(0.99 < one["score"] <= 1 for entities in found for one in entities)
    # a type that the module does not know: its entity is not found
    record = {"text": "the bank team", "label": ["O", "B-ORG", "B-TEAM"]}
    judged = evaluate(module, {"": [{"id": "1", "record": record}]})[""]
    assert judged.score.tolist() == pytest.approx([2 / 3], abs=1e-6)
    with pytest.raises(TypeError, match=r"for one text pass \[text\]"):
        module.predict("the bank")
    with pytest.raises(ValueError, match="the text is empty"):
        module.predict([" "])


def test_the_scores_of_an_epoch_are_over_all_its_entities(bert: str) -> None:
    torch.manual_seed(1)
    module = TokenClassificationModule(bert, learning_rate=3e-3)
    one = Experience("a", sentences(16, ["ORG", "TEAM"]), val=sentences(7, ["ORG", "TEAM"]), classes=["ORG", "TEAM"])
    data = ExperienceDataModule(one, module.tokenizer, batch_size=8, eval_batch_size=3, task=module.task)
    trainer = pl.Trainer(max_epochs=1, num_sanity_val_steps=0, **quiet())
    trainer.fit(module, datamodule=data)
    logged = {name: trainer.callback_metrics[f"val_{name}"].item() for name in ("precision", "recall", "f1")}
    said = module.predict([row["text"] for row in one.val or []])
    starts = [[text.index(word, 0) for word in text.split()] for text in (row["text"] for row in one.val or [])]
    gold = [
        {(starts[number][entity.start], entity.type) for entity in entities_in(row["label"])}
        for number, row in enumerate(one.val or [])
    ]
    # every entity is one word here, so its first character and its type say what it is
    n_right = sum(len({(e["start"], e["label"]) for e in s} & g) for s, g in zip(said, gold, strict=True))
    n_said, n_gold = sum(map(len, said)), sum(map(len, gold))
    expected = {
        "precision": n_right / max(n_said, 1),
        "recall": n_right / n_gold,
        "f1": 2 * n_right / (n_said + n_gold),
    }
    assert logged == pytest.approx(expected, abs=1e-6)
    assert entity_scores([], []).f1 == 0


def test_weights_and_focal_loss_are_those_of_each_word(bert: str) -> None:
    settings: dict[str, Any] = {"classes": ["ORG", "TEAM"], "dropout": 0.0}
    weighted = TokenClassificationModule(bert, loss="focal", class_weights={"O": 0.25, "TEAM": 3.0}, **settings)
    plain = TokenClassificationModule(bert, **settings)
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.tensor([[-100, 0, 3, 4], [0, 1, -100, -100]])
    by_hand = []
    for row in range(2):
        losses = []
        for place in range(4):
            if (target := int(targets[row, place])) != -100:
                p = logits[row, place].softmax(-1)[target]
                losses.append([0.25, 1.0, 1.0, 3.0, 3.0][target] * (1 - p) ** 2 * -p.log())
        by_hand.append(sum(losses) / len(losses))
    torch.testing.assert_close(weighted.training_loss(logits, targets), (by_hand[0] + by_hand[1]) / 2)
    torch.testing.assert_close(weighted.loss(logits, targets), plain.training_loss(logits, targets))
    weighted.training_loss(logits, torch.full((2, 4), -100)).backward()  # nothing counts: 0, not NaN
    assert float(logits.grad.abs().sum()) == 0


def test_balanced_weights_count_the_words_of_each_type_in_new_and_replayed_texts(bert: str) -> None:
    """By hand: each text has a share of its words of each type, and a third of a batch is replayed."""
    module, means = TokenClassificationModule(bert, class_weights="balanced"), []
    replay, weights = Replay(memory_size=100, replay_ratio=0.5), []
    for name in ("ORG", "TEAM"):
        one = experience(name, [name], [name])
        data = ExperienceDataModule(one, module.tokenizer, task=module.task, batch_size=8)
        pl.Trainer(callbacks=[replay], **quiet(max_epochs=1)).fit(module, data)
        weights.append(list(module._weights.values()))
        means.append(fmean(sum(tag != "O" for tag in row["label"]) / len(row["label"]) for row in one.train))
    assert weights[0] == pytest.approx([1 / (2 * (1 - means[0])), 1 / (2 * means[0])])
    org, team = means[0] / 3, means[1] * 2 / 3
    assert weights[1] == pytest.approx([1 / (3 * (1 - org - team)), 1 / (3 * org), 1 / (3 * team)])
    assert list(module._weights) == ["O", "ORG", "TEAM"]


def test_a_rare_type_is_learned_sooner_with_a_weight(bert: str) -> None:
    def loss_on_team(**settings: Any) -> float:
        torch.manual_seed(0)
        module = TokenClassificationModule(bert, dropout=0.0, learning_rate=1e-3, **settings)
        some = experience("one", ["ORG", "TEAM"], ["ORG", "TEAM"])
        data = ExperienceDataModule(some, module.tokenizer, task=module.task, batch_size=8)
        pl.Trainer(**quiet(max_steps=12)).fit(module, data)
        (batch,) = ExperienceDataModule(some, module.tokenizer, task=module.task).test_dataloader()
        batch = module.on_before_batch_transfer(batch, 0)
        targets = batch.pop("labels")
        with torch.no_grad():
            log_p = module.eval()(**batch).logits.log_softmax(-1)
        return -float(log_p[targets == module.tags.index("B-TEAM")][:, module.tags.index("B-TEAM")].mean())

    plain = loss_on_team()
    assert loss_on_team(class_weights={"TEAM": 10.0}) < 0.9 * plain
    assert loss_on_team(class_weights="balanced") < plain
    with pytest.warns(UserWarning, match=r"class_weights has \['PER'\], which are not among the types yet"):
        loss_on_team(class_weights={"PER": 2.0})


def test_settings_and_records_that_cannot_work(bert: str) -> None:
    with pytest.raises(ValueError, match=r"scheme must be one of \['IOB2', 'BIOES'\], got 'IOB1'"):
        TokenClassificationModule(bert, scheme="IOB1")  # type: ignore[arg-type]
    task = TokenClassificationTask()
    with pytest.raises(ValueError, match="reads one text, not a pair"):
        task.check_record(["a", "b"], [])
    with pytest.raises(ValueError, match="reads one text, not a pair"):
        task.dataset([], None, text=("a", "b"), label=None, id_column=None, max_length=8)
    with pytest.raises(ValueError, match="needs a fast tokenizer"):
        task.dataset([], object(), text="a", label=None, id_column=None, max_length=8)
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\], got 0"):
        PseudoLabels(confidence=0)
    with pytest.raises(ValueError, match=r"reads the names of tags from module\.tags, which LightningModule lacks"):
        PseudoLabels().setup(pl.Trainer(**quiet()), pl.LightningModule(), "fit")


# --- older types that new data leave unlabelled


def found_of(module: Any, kind: str) -> float:
    """Share of the entities of a type that are found in new sentences."""
    rows = sentences(8, [kind])
    said = module.predict([row["text"].split() for row in rows])
    gold = [entities_in(row["label"]) for row in rows]
    return sum(one["label"] == kind for entities in said for one in entities) / sum(map(len, gold))


def learn(bert: str, callbacks: list[Any]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    module = TokenClassificationModule(bert, learning_rate=2e-3, head_learning_rate=1e-2, dropout=0.0)
    stream = ExperienceStream(
        [experience("orgs", ["ORG"], ["ORG"]), experience("teams", ["TEAM"], ["ORG", "TEAM"])],
        label="label",
        task=module.task,
    )
    trainer = ContinualTrainer(max_epochs=8, callbacks=callbacks, gradient_clip_val=1.0, **quiet())
    return module, trainer.fit_stream(module, stream, batch_size=4, max_length=16, untrained=False)


def test_pseudo_labels_keep_the_types_that_new_data_do_not_label(bert: str) -> None:
    naive, _ = learn(bert, [])
    assert found_of(naive, "TEAM") == 1
    assert found_of(naive, "ORG") == 0  # every company of the second experience was O
    pseudo = PseudoLabels(confidence=0.5)
    kept, history = learn(bert, [pseudo])
    assert found_of(kept, "TEAM") == found_of(kept, "ORG") == 1
    assert history.accuracy_matrix[1][1] == 1
    assert pseudo.seen == ["ORG", "TEAM"] and pseudo.experience_index == 2


def test_replayed_examples_do_not_unteach_what_is_new(bert: str) -> None:
    """Alone, each half of a batch says that the other half's entities are none."""
    confused, _ = learn(bert, [Replay(memory_size=6)])
    assert max(found_of(confused, "TEAM"), found_of(confused, "ORG")) < 1
    kept, _ = learn(bert, [Replay(memory_size=6), PseudoLabels(confidence=0.5)])
    assert found_of(kept, "TEAM") == found_of(kept, "ORG") == 1


def test_pseudo_labels_with_replay_ewc_and_distillation(bert: str, tmp_path: Path) -> None:
    replay, pseudo = Replay(memory_size=6), PseudoLabels(confidence=0.5)
    others = [EWC(ewc_lambda=0.1, n_examples=4, batch_size=2), Distillation(strength=0.1)]
    kept, _ = learn(bert, [replay, pseudo, *others])
    assert found_of(kept, "TEAM") == found_of(kept, "ORG") == 1
    stored = [tag for slot in range(6) for tag in replay.memory[slot]["labels"]]
    assert set(stored) <= {"", "O", "B-ORG", "B-TEAM"}
    pseudo.save(tmp_path)
    again = PseudoLabels()
    again.load(tmp_path)
    assert (again.seen, again.experience_index) == (["ORG", "TEAM"], 2)


def test_what_becomes_an_entity(bert: str) -> None:
    """Not a type that the new data label; not a word that has a tag; and nothing that the old model is unsure of."""
    module = TokenClassificationModule(
        bert, classes=["ORG", "TEAM"], learning_rate=2e-3, head_learning_rate=1e-2, dropout=0.0
    )
    fit = {"max_epochs": 8, "num_sanity_val_steps": 0, **quiet()}

    def data(rows: list[dict[str, Any]], classes: list[str]) -> ExperienceDataModule:
        return ExperienceDataModule(
            Experience("x", rows, classes=classes), module.tokenizer, batch_size=4, max_length=16, task=module.task
        )

    class Labels(pl.Callback):
        def __init__(self) -> None:
            self.seen: dict[str, list[int]] = {}

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
                self.seen[module.tokenizer.decode(ids, skip_special_tokens=True)] = labels[labels != -100].tolist()

    torch.manual_seed(0)
    pl.Trainer(**fit).fit(module, datamodule=data(sentences(16, ["ORG", "TEAM"]), ["ORG", "TEAM"]))
    new = [
        {"text": "the bank of the team", "label": ["O", "O", "O", "O", "B-LOC"]},
        {"text": "a party goal the market share", "label": ["O", "O", "O", "O", "O", "B-LOC"]},
    ]
    for confidence, known, expected in (
        (0.5, ["ORG", "TEAM"], [[0, 1, 0, 0, 5], [0, 3, 0, 0, 1, 5]]),
        (0.5, ["ORG"], [[0, 1, 0, 0, 5], [0, 0, 0, 0, 1, 5]]),
        (1.0, ["ORG"], [[0, 0, 0, 0, 5], [0, 0, 0, 0, 0, 5]]),
        (0.5, [], [[0, 0, 0, 0, 5], [0, 0, 0, 0, 0, 5]]),
    ):
        labels = Labels()
        pseudo = PseudoLabels(confidence, known)
        # a rate of 0: the model stays the old one
        module.learning_rate = module.head_learning_rate = 1e-30
        trainer = pl.Trainer(callbacks=[pseudo, labels], **{**fit, "max_epochs": 1})
        trainer.fit(module, datamodule=data(new, ["LOC"]))
        assert [labels.seen[row["text"]] for row in new] == expected
        assert trainer.datamodule.dataset("train")[0]["labels"].count("B-ORG") == 0  # type: ignore[attr-defined]


# --- sharded


def learn_two_experiences(folder: str, strategy: str = "auto", devices: int = 1) -> dict[str, Any]:
    """With replay, pseudo-labels and EWC; what is predicted afterwards, and the weights."""
    pl.seed_everything(3)
    module = TokenClassificationModule(folder, learning_rate=1e-3, dropout=0.0)
    callbacks = [Replay(memory_size=8), PseudoLabels(confidence=0.3), EWC(ewc_lambda=0.1, n_examples=8, batch_size=2)]
    trainer = ContinualTrainer(max_epochs=2, strategy=strategy, callbacks=callbacks, **quiet(devices=devices))
    stream = [experience("orgs", ["ORG"], ["ORG"]), experience("teams", ["TEAM"], ["TEAM"])]
    history = trainer.fit_stream(module, stream, batch_size=8 // devices, max_length=16, untrained=False)
    said = [[[one["start"], one["label"]] for one in found] for found in module.predict(["the bank of the team"])]
    weights = torch.cat([whole(parameter).flatten() for parameter in module.parameters()])
    return {"said": said, "matrix": history.accuracy_matrix, "weights": weights.tolist()}


@pytest.mark.slow
def test_zero_3_learns_what_one_process_learns(bert: str) -> None:
    alone = learn_two_experiences(bert)
    ranks = run_ranks(
        f"{__name__}:learn_two_experiences", 2, folder=bert, strategy="evertune_deepspeed_stage_3", devices=2
    )
    for rank in ranks:
        assert rank["said"] == alone["said"]
        assert rank["matrix"][1] == pytest.approx(alone["matrix"][1], abs=1e-6)
        torch.testing.assert_close(torch.tensor(rank["weights"]), torch.tensor(alone["weights"]), rtol=1e-4, atol=2e-5)
