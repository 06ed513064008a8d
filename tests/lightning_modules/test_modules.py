import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from evertune._lightning import pl
from evertune.lightning_modules import SequenceClassificationModule, TransformerModule
from evertune.lightning_modules.backbone import freeze, pool, resolve_pooling
from evertune.utils.batches import logits_of
from tests.helpers.lightning_modules import TEXTS, loader, tiny_bert


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("model"))


def build(model, classes=("business", "sport"), **settings):
    torch.manual_seed(0)
    module = SequenceClassificationModule(model, classes=classes, **settings)
    module.configure_model()
    return module


def trainer(**settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    defaults = {"max_epochs": 1, "accelerator": "cpu", "enable_checkpointing": False}
    return pl.Trainer(**{**quiet, **defaults, **settings})


def batch_of(module, texts):
    return dict(module.tokenizer(texts, padding=True, return_tensors="pt"))


class Experience:
    def __init__(self, classes):
        self.classes = classes


class RecordRates(pl.Callback):
    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


# --- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0}, "learning_rate must be positive, got 0"),
        ({"head_learning_rate": -1}, "head_learning_rate must not be negative, got -1"),
        ({"layer_decay": 0}, r"layer_decay must be in \(0, 1\], got 0"),
        ({"unfreeze_ratio": 1.0}, r"unfreeze_ratio must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative, got -0.1"),
        ({"warmup_ratio": 1.0}, r"warmup_ratio must be in \[0, 1\), got 1.0"),
        ({"final_ratio": 1.0}, r"final_ratio must be in \[0, 1\), got 1.0"),
        (
            {"final_ratio": 0.1, "schedule": "constant"},
            "final_ratio=0.1 is where a decay ends, and schedule='constant'",
        ),
        ({"cooldown_ratio": 0.0}, r"cooldown_ratio must be in \(0, 1\], got 0.0"),
        (
            {"schedule": "infinite", "cooldown_ratio": 0.95},
            "warmup_ratio=0.1 and cooldown_ratio=0.95 are more than the",
        ),
        ({"schedule": "step"}, "schedule must be one of .*'linear', 'cosine', 'constant', 'infinite'.*, got 'step'"),
        ({"freeze_layers": -2}, "freeze_layers must be -1 .*, got -2"),
        ({"dropout": 1.5}, r"dropout must be in \[0, 1\), got 1.5"),
        ({"head": "mlp"}, "head must be one of .*'linear', 'cosine'.*, got 'mlp'"),
        ({"pooling": "max"}, "pooling must be one of .*got 'max'"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in .*, got 1.0"),
        ({"n_classes_ahead": 0}, "n_classes_ahead must be positive, got 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SequenceClassificationModule("model", **settings)


def test_class_names_are_strings():
    with pytest.raises(TypeError, match="must be a list of names, got the string 'sport'"):
        SequenceClassificationModule("model", classes="sport")
    with pytest.raises(TypeError, match=r"class names must be strings, got 3 \(int\)"):
        SequenceClassificationModule("model").add_classes([3])


def test_no_weights_before_configure_model(model):
    module = SequenceClassificationModule(model, classes=["a"])
    assert not list(module.parameters())
    with pytest.raises(RuntimeError, match=r"no weights yet: call configure_model\(\) first"):
        module(input_ids=torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(RuntimeError, match=r"no weights to save yet"):
        module.save_pretrained("nowhere")


def test_no_classes_yet(model):
    module = SequenceClassificationModule(model, n_classes_ahead=4)
    with pytest.raises(ValueError, match="no classes yet: pass classes"):
        module.configure_model()
    module.add_classes(["business"])
    module.configure_model()
    assert module.head.out_features == 4


def test_configure_model_loads_once(model):
    module = build(model)
    backbone, head = module.backbone, module.head
    module.configure_model()
    assert module.backbone is backbone
    assert module.head is head


def test_every_weight_is_used_and_trained(model):
    module = build(model)
    assert all(part.training for part in module.modules())
    module(**batch_of(module, ["the bank"])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_incomplete_weights_are_refused(model, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    weights = load_file(tmp_path / "copy/model.safetensors")
    weights.pop("encoder.layer.1.output.dense.bias")
    save_file(weights, tmp_path / "copy/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack \['encoder.layer.1.output.dense.bias'\], which BertModel needs"):
        build(str(tmp_path / "copy"))
    data = (tmp_path / "copy/model.safetensors").read_bytes()
    (tmp_path / "copy/model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"weights in .*copy are damaged or cut short"):
        build(str(tmp_path / "copy"))


def test_encoder_decoder_is_refused(tmp_path):
    from transformers import T5Config

    T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, vocab_size=9).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is an encoder-decoder \(t5\), which Seq2SeqModule trains"):
        build(str(tmp_path))


# --- dropout, freezing, the optimizer


def test_dropout_is_overridden_everywhere(model):
    kept, overridden = build(model), build(model, dropout=0.0)
    assert {part.p for part in kept.modules() if isinstance(part, torch.nn.Dropout)} == {0.1}
    assert {part.p for part in overridden.modules() if isinstance(part, torch.nn.Dropout)} == {0.0}
    inputs = batch_of(overridden, ["the bank share"])
    assert torch.equal(overridden(**inputs).logits, overridden(**inputs).logits)
    assert not torch.equal(kept(**inputs).logits, kept(**inputs).logits)


@pytest.mark.parametrize(
    ("n_layers", "trained"), [(0, {"embeddings", "layer.0", "layer.1"}), (1, {"layer.1"}), (2, set()), (-1, set())]
)
def test_freezing_by_depth(model, n_layers, trained):
    module = build(model, freeze_layers=n_layers)
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    parts = {"embeddings", "layer.0", "layer.1"}
    assert {part for part in parts if any(part in name for name in names)} == trained
    assert {"head.weight", "head.bias"} <= set(names)


def test_freezing_more_layers_than_there_are(model):
    with pytest.raises(ValueError, match="freeze_layers must be at most 2, the number of layers of BertModel, got 3"):
        build(model, freeze_layers=3)


def test_freezing_a_decoder_spares_its_last_norm():
    from transformers import GPT2Config, GPT2Model

    gpt = GPT2Model(GPT2Config(n_embd=8, n_layer=3, n_head=1, vocab_size=9, n_positions=8))
    freeze(gpt, 2)
    trained = {name.split(".")[0] + "." + name.split(".")[1] for name, p in gpt.named_parameters() if p.requires_grad}
    assert trained == {"h.2", "ln_f.weight", "ln_f.bias"}


def test_no_decay_on_biases_and_norms(model):
    module = build(model, weight_decay=0.3, schedule="constant")
    fit = trainer()
    fit.fit(module, loader(model, module.classes))
    decayed, spared = fit.optimizers[0].param_groups
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert decayed["weight_decay"] == 0.3
    assert spared["weight_decay"] == 0.0
    assert all("bias" not in names[id(p)] and "LayerNorm" not in names[id(p)] for p in decayed["params"])
    assert all("bias" in names[id(p)] or "LayerNorm" in names[id(p)] for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


@pytest.mark.parametrize(("head", "rate"), [("linear", 2e-4), ("cosine", 1e-4)])
def test_the_learning_rate_follows_the_size_and_the_head(model, head, rate):
    assert build(model, head=head).default_learning_rate() == rate
    assert build(model, head=head, learning_rate=3e-5).learning_rate == 3e-5


def test_the_head_has_a_learning_rate_of_its_own(model):
    module = build(model, head="cosine", learning_rate=1e-4, head_learning_rate=1e-3, freeze_word_embeddings=True)
    fit = trainer(limit_train_batches=1)
    fit.fit(module, loader(model, module.classes))
    initial = {
        (group["initial_lr"], group["weight_decay"]): group["params"] for group in fit.optimizers[0].param_groups
    }
    assert initial.keys() == {(1e-4, 0.01), (1e-4, 0.0), (1e-3, 0.0)}
    assert initial[1e-3, 0.0][0] is module.head.weight
    assert len(initial[1e-3, 0.0]) == 1
    words = module.backbone.get_input_embeddings().weight
    assert not words.requires_grad
    assert not any(words is one for group in initial.values() for one in group)


def test_lower_layers_have_smaller_learning_rates(model):
    module = build(model, learning_rate=1e-4, head_learning_rate=1e-3, layer_decay=0.5)
    fit = trainer(limit_train_batches=1)
    fit.fit(module, loader(model, module.classes))
    rates = {id(one): group["initial_lr"] for group in fit.optimizers[0].param_groups for one in group["params"]}
    for name, parameter in module.named_parameters():
        layer = next((n for n in (0, 1) if f"layer.{n}." in name), None)
        expected = 1e-3 if name.startswith("head") else 1e-4 * 0.5 ** (2 if layer is None else 1 - layer)
        assert rates[id(parameter)] == pytest.approx(expected), name
    assert len(set(rates.values())) == 4


class WhenChanged(pl.Callback):
    """Notes the step at which each weight first changes."""

    def __init__(self):
        self.step = {}

    def on_train_start(self, trainer, module):
        self.before = {name: value.clone() for name, value in module.state_dict().items()}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        for name, value in module.state_dict().items():
            if not torch.equal(value, self.before[name]):
                self.step.setdefault(name, trainer.global_step)


@pytest.mark.parametrize("update", [1, 2])
def test_layers_join_from_top_to_bottom(model, update):
    module = build(model, unfreeze_ratio=0.5, learning_rate=1e-3, layer_decay=0.9, schedule="constant")
    for _ in range(update):
        changes = WhenChanged()
        trainer(callbacks=[changes]).fit(module, loader(model, module.classes, batch_size=2, repeat=4))  # 12 steps
    for name, step in changes.step.items():
        part = next(part for part in ("head", "layer.1.", "layer.0.", "embeddings") if part in name)
        assert step == {"head": 1, "layer.1.": 3, "layer.0.": 5, "embeddings": 7}[part], name
    assert changes.step.keys() == {name for name, _ in module.named_parameters()}


def test_what_cannot_join_is_refused(model):
    with pytest.raises(ValueError, match=r"unfreeze_ratio=0.5 with freeze_layers=-1, which leaves no layers to join"):
        SequenceClassificationModule(model, unfreeze_ratio=0.5, freeze_layers=-1)
    module = build(model, unfreeze_ratio=0.5, schedule="constant", warmup_ratio=0.0)
    with pytest.raises(ValueError, match=r"unfreeze_ratio=0.5 needs to know how long fit lasts"):
        trainer(max_epochs=-1).fit(module, loader(model, module.classes))


def test_head_only_training_changes_the_head_only(model):
    module = build(model, freeze_layers=-1, learning_rate=0.1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer().fit(module, loader(model, module.classes))
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("linear", [1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1.0, 0.8536, 0.5, 0.1464]),
        ("constant", [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_each_fit_warms_up_anew(model, schedule, factors):
    module = build(model, schedule=schedule, warmup_ratio=0.34, learning_rate=1e-4)
    batches = loader(model, module.classes, batch_size=2, repeat=2)  # 6 batches
    for accumulation, epochs in ((1, 1), (2, 2)):
        rates = RecordRates()
        trainer(callbacks=[rates], max_epochs=epochs, accumulate_grad_batches=accumulation).fit(module, batches)
        assert rates.rates[::accumulation] == pytest.approx([1e-4 * factor for factor in factors], rel=1e-3)


def test_the_infinite_schedule_is_continuous_from_update_to_update(model):
    """One step of warm-up from a tenth of the peak, three constant ones, two of cool-down (1 - sqrt) to a tenth."""
    module = build(
        model, schedule="infinite", warmup_ratio=0.17, cooldown_ratio=0.33, final_ratio=0.1, learning_rate=1e-4
    )
    batches = loader(model, module.classes, batch_size=2, repeat=2)
    for _ in range(2):
        rates = RecordRates()
        trainer(callbacks=[rates]).fit(module, batches)
        expected = [0.55, 1.0, 1.0, 1.0, 1.0, 0.1 + 0.9 * (1 - 0.5**0.5)]
        assert rates.rates == pytest.approx([1e-4 * factor for factor in expected], rel=1e-3)


def test_a_second_fit_of_one_trainer_warms_up_anew(model):
    module = build(model, warmup_ratio=0.34, learning_rate=1e-4)
    rates = RecordRates()
    fit = trainer(callbacks=[rates])
    fit.fit(module, loader(model, module.classes, batch_size=3))
    fit.fit_loop.max_epochs = 2
    fit.fit(module, loader(model, module.classes, batch_size=2, repeat=2))
    expected = [1.0, 0.5, 1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25]
    assert rates.rates == pytest.approx([1e-4 * factor for factor in expected], rel=1e-3)


def test_a_fit_without_end_needs_a_constant_schedule(model):
    module = build(model)
    with pytest.raises(ValueError, match="schedule='linear' needs to know how long fit lasts: pass max_steps"):
        trainer(max_epochs=-1).fit(module, loader(model, module.classes))
    module, rates = build(model, schedule="constant"), RecordRates()

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.should_stop = True

    with pytest.warns(UserWarning, match=r"fit has no end, so warmup_ratio=0.1 is ignored"):
        trainer(max_epochs=-1, callbacks=[rates, Stop()]).fit(module, loader(model, module.classes))
    assert rates.rates[0] == 2e-4  # a small transformer


# --- heads and classes


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_head_growth_keeps_the_old_rows(model, head):
    module = build(model, head=head).eval()
    inputs = batch_of(module, ["the bank share", "a goal"])
    before, weight = module(**inputs).logits, module.head.weight.clone()
    module.add_classes(["politics", "business", "film"])
    assert module.classes == ["business", "sport", "politics", "film"]
    assert torch.equal(module.head.weight[:2], weight)
    after = module(**inputs).logits
    assert after.shape == (2, 4)
    assert torch.allclose(after[:, :2], before, rtol=0, atol=1e-6)


def test_rows_do_not_depend_on_when_they_are_added(model):
    grown = build(model, n_classes_ahead=None)
    torch.rand(100)
    grown.add_classes(["politics"])
    ahead = build(model, n_classes_ahead=3)
    assert torch.equal(grown.head.weight, ahead.head.weight)
    torch.manual_seed(1)
    reseeded = SequenceClassificationModule(model, classes=["a", "b", "c"])
    reseeded.configure_model()
    assert not torch.equal(grown.head.weight, reseeded.head.weight)


def test_head_allocated_ahead_keeps_its_shape_and_hides_unnamed_rows(model):
    module = build(model, n_classes_ahead=3).eval()
    inputs = batch_of(module, ["the bank share"])
    weight = module.head.weight
    assert module(**inputs).logits.shape == (1, 2)
    module.add_classes(["politics"])
    assert module.head.weight is weight
    assert module(**inputs).logits.shape == (1, 3)
    module.add_classes(["film"])
    assert module.head.weight.shape == (4, 32)


def test_cosine_head_formula(model):
    module = build(model, head="cosine").eval()
    output = module(**batch_of(module, ["the bank", "a goal of the team"]))
    for i, features in enumerate(output.features):
        for j, row in enumerate(module.head.weight):
            cosine = (features @ row) / (features.norm() * row.norm())
            assert output.logits[i, j].item() == pytest.approx(14.0 * cosine.item(), abs=1e-5)


def test_prepare_experience_names_its_classes(model):
    module = SequenceClassificationModule(model)
    module.prepare_experience(Experience(["business"]))
    module.prepare_experience(Experience(["sport", "business"]))
    assert module.classes == module.hparams["classes"] == ["business", "sport"]


def test_a_datamodule_with_an_experience_names_the_classes(model):
    class Data(pl.LightningDataModule):
        experience = Experience(["business", "politics"])

        def train_dataloader(self):
            return loader(model, self.experience.classes)

    module = SequenceClassificationModule(model)
    trainer().fit(module, Data())
    assert module.classes == ["business", "politics"]
    assert module.head.weight.shape == (2, 32)


def test_no_new_classes_during_fit(model):
    class Add(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            module.add_classes(["sport"])  # known: nothing to do
            with pytest.raises(RuntimeError, match=r"cannot add the classes \['film'\] during fit"):
                module.add_classes(["film"])
            self.ran = True

    add, module = Add(), build(model)
    trainer(callbacks=[add]).fit(module, loader(model, module.classes))
    assert add.ran
    module.add_classes(["film"])
    trainer().fit(module, loader(model, module.classes[:2]))
    assert module.head.weight.shape == (3, 32)


# --- labels and losses


def test_label_names_become_numbers_on_the_way_to_the_device(model):
    module = build(model)
    batch = {"input_ids": torch.ones(2, 3), "labels": ["sport", "business"]}
    moved = module.on_before_batch_transfer(batch, 0)
    assert torch.equal(moved["labels"], torch.tensor([1, 0]))
    assert batch["labels"] == ["sport", "business"]
    numbers = {"labels": torch.tensor([0, 1])}
    assert module.on_before_batch_transfer(numbers, 0)["labels"] is numbers["labels"]
    pair = (torch.ones(1), torch.ones(1))
    assert module.on_before_batch_transfer(pair, 0) is pair


def test_bad_labels_are_named(model):
    single, multi = build(model), build(model, multi_label=True)
    for module, labels in ((single, ["film"]), (multi, [["sport", "film"]])):
        with pytest.raises(ValueError, match=r"unknown label 'film': the classes are .*; call add_classes\(\['film'\]"):
            module.encode_labels(labels)
    with pytest.raises(ValueError, match="use multi_label=True"):
        single.encode_labels([["sport", "business"]])
    with pytest.raises(ValueError, match="expects a list of names for each example, got 'sport'"):
        multi.encode_labels(["sport"])


def test_loss_is_over_the_classes_seen(model):
    module = build(model, n_classes_ahead=10, label_smoothing=0.2, dropout=0.0)
    inputs = batch_of(module, ["the bank", "a goal"])
    targets = module.encode_labels(["business", "sport"])
    logits = F.linear(module(**inputs).features, module.head.weight[:2], module.head.bias[:2])
    expected = F.cross_entropy(logits, targets, label_smoothing=0.2)
    assert module.loss(module(**inputs).logits, targets).item() == pytest.approx(expected.item(), rel=1e-6)


def test_multi_label(model):
    module = build(model, multi_label=True, label_smoothing=0.1)
    targets = module.encode_labels([["sport", "business"], [], ["sport"]])
    assert targets.tolist() == [[1, 1], [0, 0], [0, 1]]
    logits = torch.tensor([[2.0, -1.0], [0.5, 0.0], [-3.0, 3.0]])
    smooth = targets * 0.9 + 0.05
    expected = -(smooth * logits.sigmoid().log() + (1 - smooth) * (1 - logits.sigmoid()).log()).mean()
    assert module.loss(logits, targets).item() == pytest.approx(expected.item(), rel=1e-5)
    prediction = module.predict(["the bank"])[0]
    scores = module.eval()(**batch_of(module, ["the bank"])).logits[0].sigmoid()
    assert [prediction[name] for name in module.classes] == pytest.approx(scores.tolist())


def test_logits_of_finds_the_logits(model):
    module = build(model).eval()
    batch = next(iter(loader(model, ["sport"])))
    assert torch.equal(logits_of(module, batch), module(**{k: v for k, v in batch.items() if k != "labels"}).logits)
    assert torch.equal(module.features(batch), module(**{k: v for k, v in batch.items() if k != "labels"}).features)


def test_columns_the_model_does_not_know_are_left_out(model):
    module = build(model).eval()
    inputs = batch_of(module, ["the bank"])
    assert torch.equal(module(**inputs, ids=["doc-1"]).logits, module(**inputs).logits)


# --- pooling


def test_padding_on_either_side_never_counts():
    hidden = torch.arange(12.0).reshape(1, 6, 2)
    for mask, tokens in (([1, 1, 1, 0, 0, 0], [0, 1, 2]), ([0, 0, 1, 1, 1, 1], [2, 3, 4, 5])):
        attention = torch.tensor([mask])
        assert torch.equal(pool(hidden, attention, "mean")[0], hidden[0, tokens].mean(0))
        assert torch.equal(pool(hidden, attention, "cls")[0], hidden[0, tokens[0]])
        assert torch.equal(pool(hidden, attention, "last")[0], hidden[0, tokens[-1]])
    assert torch.equal(pool(hidden, None, "mean")[0], hidden[0].mean(0))


def test_auto_pooling():
    from transformers import BertConfig, GPT2Config, LlamaConfig

    assert resolve_pooling("auto", BertConfig()) == "mean"
    assert resolve_pooling("auto", GPT2Config()) == "last"
    assert resolve_pooling("auto", LlamaConfig()) == "last"
    assert resolve_pooling("cls", GPT2Config()) == "cls"


def test_a_decoder_without_a_padding_token(model, tmp_path):
    from transformers import AutoTokenizer, GPT2Config, GPT2Model

    GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=18, n_positions=16)).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model, eos_token="[SEP]")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    module = build(str(tmp_path))
    together = module.predict(["the bank", "a goal of the team"])
    alone = [module.predict([text])[0] for text in ("the bank", "a goal of the team")]
    assert module.tokenizer.pad_token == "[SEP]"
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


# --- learning and predicting


def test_it_learns_and_reports(model):
    module = build(model, learning_rate=1e-2, dropout=0.0)
    batches = loader(model, module.classes, batch_size=6)
    fit = trainer(max_epochs=15)
    fit.fit(module, batches, batches)
    metrics = fit.callback_metrics
    assert {"train_loss", "val_loss", "val_accuracy"} <= set(metrics)
    assert metrics["val_accuracy"] == 1.0
    tested = fit.test(module, loader(model, module.classes, batch_size=4), verbose=False)[0]
    assert tested["test_accuracy"] == 1.0
    predictions = module.predict(TEXTS["sport"])
    assert [next(iter(prediction)) for prediction in predictions] == ["sport"] * 3
    by_trainer = trainer().predict(module, batches)[0][3:]
    assert [p["sport"] for p in by_trainer] == pytest.approx([p["sport"] for p in predictions], rel=1e-5)


def test_validation_accuracy_weighs_examples_not_batches(model):
    module = build(model, learning_rate=1e-2, dropout=0.0)
    batches = loader(model, ["business"], batch_size=2)
    with torch.no_grad():
        module.head.weight.zero_()
        module.head.bias.copy_(torch.tensor([1.0, 0.0]))
    result = trainer().validate(module, batches, verbose=False)[0]
    assert result["val_accuracy"] == 1.0
    assert result["val_loss"] == pytest.approx(-torch.tensor([1.0, 0.0]).log_softmax(0)[0].item(), rel=1e-5)


def test_predict_restores_modes_and_sorts(model):
    module = SequenceClassificationModule(model, classes=["business", "sport", "film"])
    assert module.predict([]) == []
    module(**batch_of(module, ["the bank"])).logits.sum().backward()  # weights that predict loaded can be trained
    module.backbone.encoder.eval()
    modes = [part.training for part in module.modules()]
    prediction = module.predict(["the bank share " * 40], max_length=8)[0]
    assert [part.training for part in module.modules()] == modes
    assert sum(prediction.values()) == pytest.approx(1.0)
    assert list(prediction.values()) == sorted(prediction.values(), reverse=True)
    with pytest.raises(TypeError, match="texts must be a list"):
        module.predict("the bank")


@pytest.mark.parametrize(
    ("texts", "error"),
    [
        ([None], r"texts\[0\] must be a text or a pair of texts, got None"),
        (["a", 3.5], r"texts\[1\] must be a text or a pair of texts, got 3.5"),
        ([{"text": "the bank"}], r"texts\[0\] must be .*; of a record, pass the field with its text"),
        ([["a", None]], r"texts\[0\] must be"),
        ([("a", "b", "c")], r"texts\[0\] must be"),
        (["a", ("a", "b")], r"texts\[1\] and texts\[0\] must both be texts"),
        (["a", "\ud800"], r"texts\[1\] holds half of a surrogate pair"),
        (["a", "\U0001f600\udc80"], r"texts\[1\] holds half of a surrogate pair"),
    ],
)
def test_what_cannot_be_predicted_is_named(model, texts, error):
    with pytest.raises((TypeError, ValueError), match=error):
        build(model).predict(texts)


def test_empty_texts_get_an_answer_or_are_named(model):
    module = build(model)
    assert sum(module.predict(["", "the bank"])[0].values()) == pytest.approx(1.0)
    assert module.predict(iter(["the bank"])) == module.predict(["the bank"])
    assert module.predict([["the bank", "a share"]]) == module.predict([("the bank", "a share")])

    class Bare:
        """Like GPT-2's tokenizer, which adds no tokens of its own."""

        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, *texts, **settings):
            return self.inner(*texts, **settings, add_special_tokens=False)

    module._tokenizer = Bare(module.tokenizer)
    with pytest.raises(ValueError, match=r"texts\[1\] has no tokens: leave empty texts out"):
        module.predict(["the bank", ""])


def test_bf16(model):
    module = build(model, learning_rate=1e-2)
    fit = trainer(precision="bf16-mixed", max_epochs=2)
    fit.fit(module, loader(model, module.classes))
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    assert fit.callback_metrics["train_loss"].isfinite()
    true = SequenceClassificationModule(model, classes=["business"])
    trainer(precision="bf16-true").fit(true, loader(model, ["business"]))
    assert {parameter.dtype for parameter in true.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_in_bf16(model, algorithm):
    """What the presets do where the CPU computes in bf16: Lightning refuses it before a fused optimizer."""
    module = build(model, learning_rate=1.0, schedule="constant", warmup_ratio=0.0)
    largest = []

    class Record(pl.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            gradients = [one.grad for one in module.parameters() if one.grad is not None]
            whole = torch.cat([one.flatten() for one in gradients]) if gradients else torch.zeros(1)
            largest.append(float(whole.norm() if algorithm == "norm" else whole.abs().max()))

    clipped = {"precision": "bf16-mixed", "gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm}
    trainer(max_steps=2, callbacks=[Record()], **clipped).fit(module, loader(model, module.classes))
    assert max(largest) == pytest.approx(1e-3, rel=1e-3)


# --- folders and checkpoints


@pytest.mark.parametrize("settings", [{}, {"head": "cosine", "n_classes_ahead": 5}, {"multi_label": True}])
def test_save_and_load_bit_exact(model, tmp_path, settings):
    module = build(model, learning_rate=1e-3, **settings)
    if "multi_label" not in settings:
        trainer().fit(module, loader(model, module.classes))
    module.add_classes(["politics"])
    module.save_pretrained(tmp_path / "saved")
    loaded = SequenceClassificationModule.from_pretrained(tmp_path / "saved", dropout=0.3)
    assert loaded.classes == ["business", "sport", "politics"]
    assert loaded.learning_rate == 1e-3
    assert loaded.dropout == 0.3
    state = loaded.state_dict()
    assert state.keys() == module.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
    assert loaded.predict(TEXTS["sport"]) == module.predict(TEXTS["sport"])
    assert {path.suffix for path in (tmp_path / "saved").iterdir()} <= {".json", ".safetensors", ".txt"}


def test_transformers_reads_the_folder(model, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    module = build(model)
    module.save_pretrained(tmp_path)
    encoder = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(encoder.embeddings.word_embeddings.weight, module.backbone.embeddings.word_embeddings.weight)
    assert AutoTokenizer.from_pretrained(tmp_path)("the bank")["input_ids"] == module.tokenizer("the bank")["input_ids"]


def test_lazy_loading(model, tmp_path):
    module = build(model)
    module.save_pretrained(tmp_path)
    lazy = SequenceClassificationModule.from_pretrained(tmp_path, lazy=True)
    assert not list(lazy.parameters())
    assert lazy.predict(["the bank"]) == module.predict(["the bank"])


def test_classes_named_before_a_lazy_module_is_read(model, tmp_path):
    module = build(model)
    module.save_pretrained(tmp_path)
    lazy = SequenceClassificationModule.from_pretrained(tmp_path, lazy=True)
    lazy.add_classes(["weather"])
    lazy.configure_model()
    n = len(module.classes)
    assert lazy.classes == [*module.classes, "weather"]
    assert lazy.head.out_features == n + 1
    assert torch.equal(lazy.head.weight[:n], module.head.weight)


def test_no_tokenizer_no_failure(model, tmp_path):
    shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    module = build(str(tmp_path / "bare"))
    with pytest.warns(UserWarning, match=r"no tokenizer is saved: .*bare has no tokenizer files"):
        module.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved/tokenizer.json").exists()


def test_damaged_folders_are_refused(model, tmp_path):
    module = build(model)
    load = SequenceClassificationModule.from_pretrained

    def fresh(name):
        module.save_pretrained(tmp_path / name)
        return tmp_path / name

    with pytest.raises(FileNotFoundError, match=r"holds no evertune.json"):
        load(model)
    for name in ("head.safetensors", "model.safetensors"):
        folder = fresh(f"cut-{name}")
        (folder / name).write_bytes((folder / name).read_bytes()[:-4])
        with pytest.raises(ValueError, match=f"{name} is damaged or cut short"):
            load(folder)
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
            load(folder)
    folder = fresh("manifest")
    text = (folder / "evertune.json").read_text()
    for content, message in (
        (text[:50], "evertune.json is damaged or cut short"),
        ("[]", "is not of format 1"),
        (text.replace('"format": 1', '"format": 9'), "is not of format 1"),
        ('{"format": 1, "sha256": {}}', "is damaged: 'module' is missing"),
        (text.replace("SequenceClassificationModule", "Other"), "holds a Other, not a SequenceClassificationModule"),
    ):
        (folder / "evertune.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load(folder)
    manifest = json.loads(text)
    manifest["hparams"]["head"] = "cosine"
    (folder / "evertune.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"holds the weights .*head.bias.*, but the module has"):
        load(folder)


def test_lightning_checkpoint_without_pickle(model, tmp_path):
    module = build(model)
    module.add_classes(["politics"])
    fit = trainer(enable_checkpointing=False)
    fit.fit(module, loader(model, module.classes))
    fit.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["hyper_parameters"]["classes"] == module.classes
    loaded = SequenceClassificationModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert loaded.predict(["the bank"]) == module.predict(["the bank"])
    resumed = SequenceClassificationModule(model, classes=["business"])
    resumed_fit = trainer(max_epochs=2)
    resumed_fit.fit(resumed, loader(model, module.classes), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert resumed.classes == module.classes
    assert resumed_fit.current_epoch == 2
    other = build(model, classes=["film"])
    with pytest.raises(ValueError, match=r"the checkpoint's classes are \['business'.*this module's are \['film'\]"):
        trainer(max_epochs=2).fit(other, loader(model, module.classes), ckpt_path=tmp_path / "last.ckpt")


def test_a_resumed_fit_keeps_its_schedule(model, tmp_path):
    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "first.ckpt")

    batches = loader(model, ["business", "sport"], batch_size=2)
    whole, rest = RecordRates(), RecordRates()
    trainer(max_epochs=3, callbacks=[whole, Save()]).fit(build(model), batches)
    trainer(max_epochs=3, callbacks=[rest]).fit(build(model), batches, ckpt_path=tmp_path / "first.ckpt")
    assert whole.rates[3:] == rest.rates
    assert len(rest.rates) == 6


def test_a_subclass_with_a_head_of_its_own(model, tmp_path):
    class Regressor(TransformerModule):
        def __init__(self, model_name_or_path, width=1, **settings):
            super().__init__(model_name_or_path, **settings)
            self.width = width

        def configure_head(self):
            self.register_buffer("mean", torch.arange(3.0))
            self.head = torch.nn.Linear(self.backbone.config.hidden_size, self.width)

    module = Regressor(model, width=3, learning_rate=1e-3)
    module.configure_model()
    module.mean += 1
    module.save_pretrained(tmp_path)
    loaded = Regressor.from_pretrained(tmp_path)
    assert loaded.mean.tolist() == [1.0, 2.0, 3.0]
    assert loaded.width == 3
    assert loaded.learning_rate == 1e-3
    assert torch.equal(loaded.head.weight, module.head.weight)
