"""Presets: settings that learn well together, for those who do not want to choose."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from evertune.utils.plugins import class_at

if TYPE_CHECKING:
    from evertune._lightning import Callback, pl
    from evertune.streams.experience import Experience

Name = Literal["text_classification", "token_classification", "question_answering", "causal_lm"]

_FEW_PER_CLASS = 50
"""Examples of a class below which one covariance for all classes beats random features without training."""
_LONGEST_SHARE = 0.99
_SAMPLE = 1000
_LONGEST = 512
"""Tokens of the longest texts, as attention takes time and memory that grow with the square of it."""


@dataclass(frozen=True)
class Preset:
    """The settings that :func:`preset` chose. Change what you like before you use them; all are plain values.

    Attributes:
        module_class: Class path of the module.
        module: Arguments of the module, but for the name of the transformer.
        methods: The callbacks, as class paths and arguments: ``[{"class_path": ..., "init_args": {...}}]``.
        trainer: Arguments of the trainer, but for the callbacks.
        data: Arguments of :meth:`~evertune.ContinualTrainer.fit_stream` and of ``ExperienceDataModule``.
    """

    module_class: str
    module: dict[str, Any]
    methods: list[dict[str, Any]]
    trainer: dict[str, Any]
    data: dict[str, Any]

    def make_module(self, model_name_or_path: str, **settings: Any) -> pl.LightningModule:
        """The module for a transformer; ``settings`` replace the preset's."""
        module: pl.LightningModule = class_at(self.module_class)(model_name_or_path, **{**self.module, **settings})
        return module

    def callbacks(self) -> list[Callback]:
        """The callbacks; each call makes new ones."""
        return [class_at(one["class_path"])(**one["init_args"]) for one in self.methods]

    def config(self, model_name_or_path: str) -> dict[str, Any]:
        """The sections ``model``, ``trainer`` and ``data`` of a YAML file for ``evertune fit`` or ``update``."""
        return {
            "model": {
                "class_path": self.module_class,
                "init_args": {"model_name_or_path": model_name_or_path, **self.module},
            },
            "trainer": {**self.trainer, "callbacks": self.methods},
            "data": self.data,
        }


def _method(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"evertune.callbacks.{name}", "init_args": arguments}


@dataclass(frozen=True)
class _Recipe:
    """What a preset trains with a memory.

    Args:
        module_class: Name of the module's class.
        module: Arguments of the module.
        policy: Which examples the memory keeps.
        methods: The callbacks beside ``Replay``.
        max_epochs: Epochs of a small update.
        step_size: Examples in a step, new and replayed together.
        windows: Whether long texts are read in windows, so that their length decides nothing.
    """

    module_class: str
    module: dict[str, Any]
    policy: str
    methods: list[dict[str, Any]]
    max_epochs: int = 3
    step_size: int = 32
    windows: bool = False


_RECIPES: dict[Name, _Recipe] = {
    "text_classification": _Recipe(
        "SequenceClassificationModule",
        {"head": "cosine", "head_learning_rate": 1e-3, "dropout": 0.0, "freeze_word_embeddings": True},
        "class_balanced",
        [
            _method("Imprinting"),
            _method("LogitAdjustment"),
            _method("Distillation", strength=2.0, examples="all", unknown_only=True),
            _method("UpdateLength"),
        ],
    ),
    "token_classification": _Recipe(
        "TokenClassificationModule",
        {"head_learning_rate": 1e-3, "dropout": 0.0, "freeze_word_embeddings": True, "text_features": True},
        "reservoir",
        [_method("UpdateLength", examples=1600, max_epochs=8), _method("MentionReplacement")],
        max_epochs=8,
        step_size=16,
    ),
    "question_answering": _Recipe(
        "QuestionAnsweringModule",
        {"head_learning_rate": 1e-3, "dropout": 0.0, "freeze_word_embeddings": True},
        "reservoir",
        [_method("UpdateLength")],
        windows=True,
    ),
    "causal_lm": _Recipe(
        "CausalLMModule",
        {},
        "reservoir",
        [_method("UpdateLength")],
        step_size=8,
    ),
}


def preset(
    name: Name,
    *,
    memory_size: int,
    stream: Sequence[Experience] | None = None,
    model: str | None = None,
    seed: int = 0,
) -> Preset:
    """Settings of the module, the callbacks and the trainer for a task.

    ``text_classification``:

    - a cosine head of fixed scale, whose new rows start as the class means (:class:`~evertune.callbacks.Imprinting`),
    - replay from a class-balanced memory, half of each step (a third where the memory is less than half of an update),
    - cross-entropy on adjusted logits (:class:`~evertune.callbacks.LogitAdjustment`),
    - distillation: replayed examples and those of new classes also teach what the model before the update says about
      them (:class:`~evertune.callbacks.Distillation`),
    - AdamW at half of the usual learning rate for the encoder, 1e-3 for the head, clipped at 1.0, without dropout, with
      frozen word embeddings,
    - as many epochs as an update needs (:class:`~evertune.callbacks.UpdateLength`),
    - the precision and the attention that are fastest on the machine (:class:`~evertune.callbacks.Fastest`).

    What each part is for stands in docs/methods.md; docs/results.md compares it with its peers, as far as measured.

    ``token_classification``, ``question_answering`` and ``causal_lm`` replay from a uniform memory, clip at 1.0, and
    choose epochs and precision as above. The first two have no dropout, frozen word embeddings, and 1e-3 for the head;
    ``token_classification`` sees a small update 8 times, its head also reads the mean of the text's tokens, and
    entities of replayed texts become others of their type (:class:`~evertune.callbacks.MentionReplacement`): together
    2.1 points of F1 on validation data. Distillation is left out there because it lost on such data (docs/results.md);
    the settings of the other two are not tuned. They need a memory.

    Without a memory, no text classifier is trained: an
    :class:`~evertune.lightning_modules.AnalyticClassificationModule` over the frozen encoder depends on no order of the
    updates.

    Args:
        name: The task: ``"text_classification"``, ``"token_classification"``, ``"question_answering"`` or
            ``"causal_lm"``.
        memory_size: Examples that may be kept, over all ranks; 0 if none may be kept.
        stream: The experiences to learn, or the first ones. From them follow the number of replayed examples, the kind
            of head without a memory and, together with ``model``, ``max_length``; that of questions keeps its default,
            since their contexts are read in windows.
        model: Name of the transformer, whose tokenizer measures the texts of ``stream``.
        seed: Seed of the memory and the order of the examples. Default: 0.

    Raises:
        ValueError: If there is no such preset, or ``memory_size`` is negative, or 0 for a task that needs a memory.

    Example:
        >>> chosen = preset("text_classification", memory_size=600)
        >>> chosen.module["head"], chosen.data["batch_size"]
        ('cosine', 16)

        The whole way::

            chosen = preset("text_classification", memory_size=600, stream=stream, model="bert-base-uncased")
            trainer = ContinualTrainer(callbacks=chosen.callbacks(), **chosen.trainer)
            history = trainer.fit_stream(chosen.make_module("bert-base-uncased"), stream, **chosen.data)
    """
    if name not in get_args(Name):
        raise ValueError(f"there is no preset {name!r}; there are {list(get_args(Name))}")
    if memory_size < 0:
        raise ValueError(f"memory_size must not be negative, got {memory_size}")
    chosen = _with_memory(name, memory_size, stream, seed) if memory_size else _without_memory(name, stream)
    if stream is not None and model and not _RECIPES[name].windows:
        chosen.data["max_length"] = _max_length(stream, chosen.make_module(model))
    return chosen


def _with_memory(name: Name, memory_size: int, stream: Sequence[Experience] | None, seed: int) -> Preset:
    recipe = _RECIPES[name]
    update_size = memory_size if stream is None else sum(len(one.train) for one in stream) / len(stream)
    ratio = 1.0 if memory_size >= update_size / 2 else 0.5
    replay = _method("Replay", memory_size=memory_size, policy=recipe.policy, replay_ratio=ratio, seed=seed)
    return Preset(
        f"evertune.lightning_modules.{recipe.module_class}",
        copy.deepcopy(recipe.module),
        [replay, *copy.deepcopy(recipe.methods)],
        {"max_epochs": recipe.max_epochs, "gradient_clip_val": 1.0, "precision": "auto"},
        {"batch_size": round(recipe.step_size / (1 + ratio))},
    )


def _without_memory(name: Name, stream: Sequence[Experience] | None) -> Preset:
    if name != "text_classification":
        raise ValueError(f"preset({name!r}) replays examples: memory_size must be positive, got 0")
    few = stream is None or _examples_per_class(stream) < _FEW_PER_CLASS
    return Preset(
        "evertune.lightning_modules.AnalyticClassificationModule",
        {"features": "identity", "solver": "lda"} if few else {"features": "relu", "solver": "ridge"},
        [],
        {"max_epochs": 1},
        {"batch_size": 64},
    )


def _examples_per_class(stream: Sequence[Experience]) -> float:
    n_classes = len({name for experience in stream for name in experience.classes})
    return sum(len(experience.train) for experience in stream) / max(1, n_classes)


def _max_length(stream: Sequence[Experience], module: Any) -> int:
    """The number of tokens of all but one in a hundred examples, rounded up to a multiple of 8; at most 512."""
    import numpy as np

    limit = min(module.max_tokens or _LONGEST, _LONGEST)
    # Evenly spaced examples of each experience: the first ones may be of one class.
    few = _SAMPLE // len(stream) + 1
    rows = [
        experience.train[index]
        for experience in stream
        for index in range(0, len(experience.train), max(1, len(experience.train) // few))
    ]
    data = module.task.dataset(
        rows,
        module.tokenizer,
        text=getattr(stream, "text", None) or "text",
        label=getattr(stream, "label", "label"),
        id_column=None,
        max_length=limit,
    )
    longest = int(np.quantile(data.lengths, _LONGEST_SHARE, method="higher"))
    return min(-(-longest // 8) * 8, limit)
