"""Smaller copies of a trained module, which it then teaches."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evertune.lightning_modules.adapters import merge_adapters
from evertune.lightning_modules.analytic_classification import AnalyticClassificationModule
from evertune.lightning_modules.backbone import encoder_layers, remove_pooler
from evertune.lightning_modules.causal_lm import CausalLMModule
from evertune.lightning_modules.ordinal_classification import OrdinalClassificationModule
from evertune.lightning_modules.question_answering import QuestionAnsweringModule
from evertune.lightning_modules.relation_extraction import RelationExtractionModule
from evertune.lightning_modules.saving import BACKBONE
from evertune.lightning_modules.seq2seq import Seq2SeqModule
from evertune.lightning_modules.sequence_classification import SequenceClassificationModule
from evertune.lightning_modules.sequence_regression import SequenceRegressionModule
from evertune.lightning_modules.text_matching import TextMatchingModule
from evertune.lightning_modules.token_classification import TokenClassificationModule
from evertune.utils.heads import model_class

_TEACHERS = (
    SequenceClassificationModule,
    OrdinalClassificationModule,
    SequenceRegressionModule,
    TokenClassificationModule,
    RelationExtractionModule,
    QuestionAnsweringModule,
    CausalLMModule,
)
_WHY_NOT: dict[type, str] = {
    TextMatchingModule: "it learns from comparisons of texts with each other, and a text has no logits of its own; "
    "start from a smaller pretrained encoder instead",
    Seq2SeqModule: "it has two stacks of layers, an encoder and a decoder, and students are made of one; start from a "
    "smaller pretrained model instead",
    AnalyticClassificationModule: "its transformer is not trained; start from a smaller pretrained encoder instead",
}


def check_teacher(module: Any) -> None:
    """Make sure that a module can teach a smaller one: it has a transformer that is trained, and logits for each text.

    Raises:
        ValueError: If it cannot.
    """
    name = type(module).__name__
    for cls, why in _WHY_NOT.items():
        if isinstance(module, cls):
            raise ValueError(f"{name} cannot be distilled: {why}")
    if not isinstance(module, _TEACHERS):
        known = ", ".join(cls.__name__ for cls in _TEACHERS)
        raise ValueError(
            f"{name} cannot be distilled: a student learns the logits of a head over a transformer that is trained, as "
            f"those of {known}"
        )
    if getattr(module, "packing", False):
        raise ValueError(
            f"{name}(packing=True) cannot be distilled: it puts several texts into a row; leave packing out"
        )
    if module.prompt is not None:
        raise ValueError(
            f"peft: {module.prompt.method} puts virtual tokens before a text, which cannot be merged into the weights: "
            "a version with them cannot be distilled"
        )


def student_of(teacher: Any, layers: int | None = None) -> Any:
    """A copy of a module with fewer layers: some of its own, at equal distances, the first and the last among them.

    A student that begins with layers of its teacher needs less training than one with random weights (Sanh et al. 2019,
    "DistilBERT"). Adapters are merged into the weights, and all weights of the student are trained.

    Args:
        teacher: A module with its weights, which is not changed.
        layers: Number of layers of the student. Default: as many as the teacher has, for a student that is made
            narrower (:func:`~evertune.lightning_modules.pruning.prune`).

    Raises:
        ValueError: If the teacher has no more layers, or is not one that can be distilled.

    Example::

        student = student_of(SequenceClassificationModule.from_pretrained("registry/versions/8/model"), layers=3)
    """
    check_teacher(teacher)
    whole = copy.deepcopy(teacher.backbone)
    if teacher.peft is not None:
        merge_adapters(whole)
    name, stack = encoder_layers(whole)
    if layers is not None and not 0 < layers < len(stack):
        raise ValueError(
            f"a student has at least one layer, and fewer than the {len(stack)} of its teacher, got layers={layers}"
        )
    kept = np.linspace(0, len(stack) - 1, layers or len(stack)).round().astype(int).tolist()
    backbone = _made(teacher, whole, kept)
    backbone.load_state_dict(_with_layers(whole.state_dict(), name, kept))
    settings = {name: value for name, value in teacher.hparams.items() if not name.startswith("_")}
    student: Any = type(teacher)(**settings | {"peft": None, "freeze_layers": 0})
    student.build(backbone)
    rest = {name: value for name, value in teacher.state_dict().items() if not name.startswith(BACKBONE)}
    student.load_state_dict(rest | {f"{BACKBONE}{name}": value for name, value in backbone.state_dict().items()})
    return student


def _made(teacher: Any, whole: Any, kept: list[int]) -> Any:
    """A transformer with some of the layers of another, whose weights are still to be loaded, in training mode."""
    config = copy.deepcopy(whole.config)
    config.num_hidden_layers = len(kept)
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = [kinds[number] for number in kept]
    auto_class = teacher._auto_class if isinstance(teacher, CausalLMModule) else "AutoModel"
    backbone = model_class(auto_class, config).from_config(config, dtype=torch.get_default_dtype())
    if auto_class != "AutoModel":
        backbone.generation_config = copy.deepcopy(whole.generation_config)
    remove_pooler(backbone)
    return backbone.train()


def _with_layers(state: dict[str, Tensor], stack: str, kept: list[int]) -> dict[str, Tensor]:
    """The weights of a transformer with some of its layers, which are counted from 0 again.

    >>> _with_layers({"layer.0.a": 1, "layer.1.a": 2, "layer.2.a": 3, "norm": 4}, "layer", [0, 2])
    {'layer.0.a': 1, 'layer.1.a': 3, 'norm': 4}
    """
    found = {}
    for name, value in state.items():
        match = re.fullmatch(rf"{re.escape(stack)}\.(\d+)\.(.+)", name)
        if match is None:
            found[name] = value
        elif int(match[1]) in kept:
            found[f"{stack}.{kept.index(int(match[1]))}.{match[2]}"] = value
    return found
