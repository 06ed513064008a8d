"""Presets: settings that learn well together, for those who do not want to choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from evertune.utils.plugins import class_at

if TYPE_CHECKING:
    from evertune._lightning import Callback, pl
    from evertune.streams.experience import Experience

Name = Literal["text_classification"]

_STEP_SIZE = 32
"""Examples in a step, new and replayed together."""
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

    Without a memory, nothing is trained: an :class:`~evertune.lightning_modules.AnalyticClassificationModule` over the
    frozen encoder depends on no order of the updates.

    Args:
        name: The task: ``"text_classification"``.
        memory_size: Examples that may be kept, over all ranks; 0 if none may be kept.
        stream: The experiences to learn, or the first ones. From them follow the number of replayed examples, the kind
            of head without a memory and, together with ``model``, ``max_length``.
        model: Name of the transformer, whose tokenizer measures the texts of ``stream``.
        seed: Seed of the memory and the order of the examples. Default: 0.

    Raises:
        ValueError: If there is no such preset, or ``memory_size`` is negative.

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
    data: dict[str, Any] = {"max_length": _max_length(stream, model)} if stream is not None and model else {}
    if memory_size == 0:
        few = stream is None or _examples_per_class(stream) < _FEW_PER_CLASS
        return Preset(
            "evertune.lightning_modules.AnalyticClassificationModule",
            {"features": "identity", "solver": "lda"} if few else {"features": "relu", "solver": "ridge"},
            [],
            {"max_epochs": 1},
            {"batch_size": 64, **data},
        )
    update_size = memory_size if stream is None else sum(len(one.train) for one in stream) / len(stream)
    ratio = 1.0 if memory_size >= update_size / 2 else 0.5
    return Preset(
        "evertune.lightning_modules.SequenceClassificationModule",
        {"head": "cosine", "head_learning_rate": 1e-3, "dropout": 0.0, "freeze_word_embeddings": True},
        [
            _method("Replay", memory_size=memory_size, policy="class_balanced", replay_ratio=ratio, seed=seed),
            _method("Imprinting"),
            _method("LogitAdjustment"),
            _method("Distillation", strength=2.0, examples="all", unknown_only=True),
            _method("UpdateLength"),
        ],
        {"max_epochs": 3, "gradient_clip_val": 1.0, "precision": "auto"},
        {"batch_size": round(_STEP_SIZE / (1 + ratio)), **data},
    )


def _method(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"evertune.callbacks.{name}", "init_args": arguments}


def _examples_per_class(stream: Sequence[Experience]) -> float:
    n_classes = len({name for experience in stream for name in experience.classes})
    return sum(len(experience.train) for experience in stream) / max(1, n_classes)


def _max_length(stream: Sequence[Experience], model: str) -> int:
    """The number of tokens of all but one in a hundred texts, rounded up to a multiple of 8; at most 512."""
    import numpy as np

    from evertune.lightning_modules.backbone import skeleton
    from evertune.tasks.texts import max_tokens
    from evertune.utils.locate import locate
    from evertune.utils.pretrained import load_tokenizer

    model = locate(model)
    tokenizer = load_tokenizer(model)
    text = getattr(stream, "text", None) or "text"
    columns = [text] if isinstance(text, str) else list(text)
    # Evenly spaced examples of each experience: the first ones may be of one class.
    few = _SAMPLE // len(stream) + 1
    rows = [
        experience.train[index]
        for experience in stream
        for index in range(0, len(experience.train), max(1, len(experience.train) // few))
    ]
    tokens = tokenizer(*([row[column] for row in rows] for column in columns))["input_ids"]
    longest = int(np.quantile([len(one) for one in tokens], _LONGEST_SHARE, method="higher"))
    return min(-(-longest // 8) * 8, max_tokens(skeleton(model)) or _LONGEST, _LONGEST)
