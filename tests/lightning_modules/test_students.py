"""Smaller copies of modules: which layers they have, what they keep, and which modules have none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, DistilBertConfig, DistilBertModel

from evertune.callbacks.step_logits import counted_rows
from evertune.callbacks.teacher_distillation import TeacherDistillation
from evertune.lightning_modules import AnalyticClassificationModule, SequenceClassificationModule
from evertune.lightning_modules.backbone import encoder_layers
from evertune.lightning_modules.students import student_of
from evertune.streams import Experience, ExperienceDataModule
from evertune.tasks.predicting import batch_of
from evertune.utils.evaluation import evaluation_mode
from tests.helpers.function_space import quiet
from tests.helpers.lightning_modules import TEXTS, tiny_bert
from tests.tasks.table import ROWS

WORDS = [text for texts in TEXTS.values() for text in texts]
SIZE = {"vocab_size": 18, "max_position_embeddings": 32}
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 6}


def deep(folder: Path, kind: str = "bert") -> str:
    """A transformer of six layers with the tokenizer of the tiny one."""
    tiny_bert(folder)
    torch.manual_seed(0)
    bert = BertModel(BertConfig(**SIZE, **SMALL))
    distilbert = DistilBertModel(DistilBertConfig(**SIZE, dim=16, n_heads=2, hidden_dim=24, n_layers=6))
    (bert if kind == "bert" else distilbert).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_a_student_has_layers_at_equal_distances_and_all_else(tmp_path: Path, kind: str) -> None:
    teacher = SequenceClassificationModule(deep(tmp_path / "deep", kind), classes=list(TEXTS), freeze_layers=2)
    teacher.configure_model()
    student = student_of(teacher, 3)
    old, new = (encoder_layers(module.backbone)[1] for module in (teacher, student))
    assert len(old) == 6
    for place, kept in enumerate((0, 2, 5)):
        same = zip(new[place].parameters(), old[kept].parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in same)
    assert torch.equal(student.head.weight, teacher.head.weight)
    assert all(weight.requires_grad for weight in student.parameters())
    student.eval().save_pretrained(tmp_path / "student")
    loaded = SequenceClassificationModule.from_pretrained(tmp_path / "student")
    assert loaded.predict(WORDS) == student.predict(WORDS)
    assert AutoModel.from_pretrained(tmp_path / "student").config.num_hidden_layers == 3


TAUGHT = ("several labels", "an order of classes", "several numbers", "tags of words", "relation extraction")
TAUGHT += ("question answering", "answers to prompts")


@pytest.mark.parametrize("name", TAUGHT)
def test_a_student_comes_to_answer_like_its_teacher(tmp_path: Path, name: str) -> None:
    row = ROWS[name]
    row.pretrained(str(tmp_path / "model"))
    teacher: Any = row.module(str(tmp_path / "model"))
    schema, task = row.schema_for(teacher), teacher.task
    records = [schema.check(record) for record in row.records]
    names = sorted({one for record in records for one in task.label_names(record[schema.label])})
    experience = Experience("one", records, classes=names)
    if names:
        teacher.prepare_experience(experience)
    teacher.configure_model()
    student = student_of(teacher.eval(), 1)
    student.learning_rate = 1e-2
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    columns: Any = {"text": schema.text if isinstance(schema.text, str) else tuple(schema.text), "label": schema.label}
    examples = task.dataset(records, teacher.tokenizer, **columns, id_column=None, max_length=24)
    batches = ExperienceDataModule(experience, teacher.tokenizer, **columns, task=task, batch_size=4, max_length=24)
    before = distance(teacher, student, examples)
    quiet(TeacherDistillation(teacher, strength=30.0), max_epochs=8).fit(student, datamodule=batches)
    assert distance(teacher, student, examples) < before / 2


def distance(teacher: Any, student: Any, examples: Any) -> float:
    """Mean squared difference of the logits; of classes, of their logarithms of probabilities."""
    answers = []
    batch = batch_of(teacher.task, teacher, [examples[place] for place in range(len(examples))])
    for module in (teacher, student):
        with evaluation_mode(module):
            outputs = teacher.task.outputs(module, batch)
            logits = counted_rows(outputs)[0]
        answers.append(logits.log_softmax(1).clamp(min=-20) if outputs.likelihood == "categorical" else logits)
    return float((answers[0] - answers[1]).square().mean())


def test_adapters_are_merged_first(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason='peft is not installed (pip install "evertune[peft]")')
    settings = {"method": "lora", "r": 2, "target_modules": ["query"]}
    teacher = SequenceClassificationModule(tiny_bert(tmp_path / "bert"), classes=["a", "b"], peft=settings)
    teacher.configure_model()
    layer = teacher.backbone.encoder.layer[0].attention.self.query
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    student = student_of(teacher, 1)
    merged = student.backbone.encoder.layer[0].attention.self.query.weight
    assert torch.allclose(merged, layer.base_layer.weight + layer.get_delta_weight("default"))
    assert student.peft is None and "lora" in str(teacher.state_dict().keys())


@pytest.mark.parametrize("layers", [0, 2, 3])
def test_a_student_has_fewer_layers(tmp_path: Path, layers: int) -> None:
    teacher = SequenceClassificationModule(tiny_bert(tmp_path / "bert"), classes=["a", "b"])
    teacher.configure_model()
    with pytest.raises(ValueError, match=f"fewer than the 2 of its teacher, got layers={layers}"):
        student_of(teacher, layers)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("text matching", "TextMatchingModule cannot be distilled: it learns from comparisons of texts"),
        ("recommendation", "TextMatchingModule cannot be distilled: it learns from comparisons of texts"),
        ("sequence to sequence", "Seq2SeqModule cannot be distilled: it has two stacks of layers"),
        ("dialogues", r"CausalLMModule\(packing=True\) cannot be distilled: .*; leave packing out"),
    ],
)
def test_other_modules_have_no_students(tmp_path: Path, name: str, why: str) -> None:
    row = ROWS[name]
    row.pretrained(str(tmp_path / "model"))
    module: Any = row.module(str(tmp_path / "model"))
    with pytest.raises(ValueError, match=why):
        student_of(module, 1)


def test_a_frozen_transformer_has_no_student(tmp_path: Path) -> None:
    module = AnalyticClassificationModule(tiny_bert(tmp_path / "bert"), classes=["a", "b"])
    with pytest.raises(ValueError, match="AnalyticClassificationModule cannot be distilled"):
        student_of(module, 1)
