"""What a plan is about, read from a configuration and the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evertune.cli.plan.gpus import memory_of, n_devices, positive
from evertune.cli.plan.methods import Method, argument, methods_of
from evertune.cli.plan.shape import MODULES, UNTRAINED, ModelShape, has_classes, shape_of, texts_of_example
from evertune.cli.plan.training import ALL, PRECISIONS, STRATEGIES, Training

_PRECISION_NAMES = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "None": "32-true", "auto": "bf16-mixed"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the plan is about: a model, how it is trained, and on which machines.

    Args:
        model: Settings of the module.
        n_classes: Number of classes, on which the rows of the head depend.
        nodes: Number of machines.
        gpus: Number of GPUs of each machine.
        memory: Memory of a GPU, in bytes.
        training: How the model is trained. Its stage, offloading and world size are replaced for each strategy.
        n_examples: Number of examples that the importance of the weights is estimated on.
        strategy: Strategy that the configuration names; None if it leaves the choice open.
        notes: What the user should know about how the configuration was read, one sentence each.
        module: Name of the module's class, one of :data:`MODULES`.
        protects: Names the matrices of a module of which OSFT protects directions; None without OSFT.
    """

    model: Mapping[str, Any]
    n_classes: int
    nodes: int
    gpus: int
    memory: float
    training: Training
    n_examples: int = 500
    strategy: str | None = None
    notes: tuple[str, ...] = ()
    module: str = MODULES[0]
    protects: Callable[[Any], Collection[str]] | None = None

    def shape(self, **settings: Any) -> ModelShape:
        """The sizes of the model, with some of its settings replaced."""
        return shape_of({**self.model, **settings}, self.n_classes, self.module, self.protects)

    @property
    def world_size(self) -> int:
        """Number of GPUs in all, each with one process."""
        return self.nodes * self.gpus


def read_request(options: argparse.Namespace) -> Request:
    """Read the configuration, and override it with the options of the command line.

    Args:
        options: Options of the command, as its parser returns them; None where an option is not given.

    Raises:
        OSError: If the configuration cannot be read.
        ValueError: If a setting is missing, unknown or out of range; the message says what to do.
    """
    config = _read_config(options.config) if options.config else {}
    trainer, data, launch = (_section(config, name) for name in ("trainer", "data", "launch"))
    notes: list[str] = []
    module, model = _model_settings(config)
    for name in ("model_name_or_path", "freeze_layers"):
        if getattr(options, name) is not None:
            model[name] = getattr(options, name)
    if "model_name_or_path" not in model:
        raise ValueError("which model? Give --model NAME, a folder or package:NAME/FOLDER, or a --config that names it")
    methods = methods_of(trainer, notes)
    if options.method is not None:
        # A method named on the command line keeps the arguments that the configuration gives it.
        configured = {method.cls: method for method in methods}
        named = [Method.named(name) for name in options.method]
        methods = [configured.get(method.cls, method) for method in named]
    notes += [f"what {method.cls.__name__} needs is not counted" for method in methods if not method.counted]
    estimating = [method for method in methods if method.estimates]
    replaying = [method for method in methods if "replay_ratio" in method.arguments]
    n_classes = options.classes or max(len(model.get("classes") or ()), model.get("n_classes_ahead") or 0)
    if not n_classes and has_classes(module):
        n_classes = 10
        notes.append("the number of classes is not known: 10 are assumed (--classes)")
    n_texts, n_estimated = texts_of_example(module, model)
    if n_texts > 1:
        notes.append(f"an example has {n_texts} texts in training, and batch sizes below count texts")
    protecting = next((found for method in methods if (found := method.protects) is not None), None)
    gpus = _first(options.gpus, launch.get("processes_per_node"), trainer.get("devices"), 1)
    memory_size = _first(options.memory_size, argument(replaying, "memory_size", 0)) if replaying else 0
    training = Training(
        stage=0,
        precision=_precision(_first(options.precision, trainer.get("precision"), "32-true")),
        batch_size=_first(options.batch_size, data.get("batch_size"), 32) * n_texts,
        seq_length=_first(options.seq_length, data.get("max_length"), 128),
        accumulation=_first(options.accumulate_grad_batches, trainer.get("accumulate_grad_batches"), 1),
        method_bytes=sum(method.bytes_per_weight or 0 for method in methods),
        rank_ratio=0.0 if protecting is None else max(protecting.rank_ratio),
        estimation_batch_size=n_estimated
        * _first(options.estimation_batch_size, argument(estimating, "batch_size", None), 0)
        if estimating
        else 0,
        replay_ratio=_first(options.replay_ratio, argument(replaying, "replay_ratio", 0.0)) if replaying else 0.0,
        memory_size=memory_size,
        **_logits_of(methods, options.examples, memory_size, notes),
        preemption="launch" in config,  # launched runs have the callback Preemption
        later_fit="registry" not in config,  # each update of a registry is the first fit of its process
    )
    return Request(
        model=model,
        n_classes=n_classes,
        nodes=positive("nodes", _first(options.nodes, launch.get("nodes"), trainer.get("num_nodes"), 1)),
        gpus=n_devices(gpus),
        memory=memory_of(options.gpu_memory),
        training=training,
        n_examples=argument(estimating, "n_examples", 500),
        strategy=_strategy(trainer.get("strategy")),
        notes=tuple(notes),
        module=module,
        protects=None if protecting is None else protecting.matrices,
    )


def _logits_of(methods: Sequence[Method], n_new: int | None, memory_size: int, notes: list[str]) -> dict[str, Any]:
    """How many logits methods store, and of how many examples. Adds a note for what is not counted."""
    from evertune.callbacks.dark_replay import DarkReplay
    from evertune.callbacks.distillation import Distillation

    settings: dict[str, Any] = {}
    for method in methods:
        kept = _first(method.arguments.get("top_k"), ALL)
        if issubclass(method.cls, DarkReplay):
            settings["stored_logits"] = kept
        if not issubclass(method.cls, Distillation):
            continue
        examples = method.arguments["examples"]
        if method.arguments["of"] == "features" or (examples != "replayed" and n_new is None):
            notes.append(
                "the answers that Distillation keeps are not counted: they depend on the number of new examples of an "
                "update (--examples) and, with of='features', on the module"
            )
            continue
        n_taught = (0 if examples == "replayed" else n_new or 0) + (0 if examples == "new" else memory_size)
        settings |= {"taught_logits": kept, "n_taught": n_taught}
    return settings


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no settings")
    return config


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name) or {}
    if not isinstance(section, dict):
        raise ValueError(f"the section {name!r} must hold settings, got {section!r}")
    return section


def _model_settings(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The class of the model and its settings."""
    model = _section(config, "model")
    path = str(model.get("class_path") or MODULES[0])
    name = path.rpartition(".")[2]
    if name in UNTRAINED:
        raise ValueError(
            f"{name} is not trained: a GPU holds its transformer's weights, 4 bytes each in fp32, and a forward pass, "
            "without gradients or an optimizer; plan compares ways to train. To plan the training of its transformer, "
            "name a class that is trained, such as SequenceClassificationModule"
        )
    if name not in MODULES:
        raise ValueError(
            f"the model is a {path}, of which only its own code knows the size; plan knows {', '.join(MODULES)} of "
            "evertune.lightning_modules: name the transformer in it with --model, without a --config"
        )
    return name, dict(model.get("init_args") or {})


def _precision(value: Any) -> Any:
    name = _PRECISION_NAMES.get(str(value), str(value))
    if name not in PRECISIONS:
        raise ValueError(f"precision must be one of {list(PRECISIONS)}, got {value!r}")
    return name


def _strategy(value: Any) -> str | None:
    """The name in :data:`STRATEGIES` of a configured strategy: a name or a class with arguments; None for "auto"."""
    if value in (None, "auto"):
        return None
    if isinstance(value, dict) and "FSDP2Strategy" in str(value.get("class_path")):
        value = "evertune_fsdp2"
    elif isinstance(value, dict) and "DeepSpeedStrategy" in str(value.get("class_path")):
        settings = value.get("init_args") or {}
        offload = "_offload" if settings.get("offload_optimizer") else ""
        value = f"evertune_deepspeed_stage_{settings.get('stage', 2)}{offload}"
    elif isinstance(value, dict) and str(value.get("class_path")).endswith("DDPStrategy"):
        value = "ddp"
    name = str(value)
    name = f"evertune_{name}" if name.startswith("deepspeed_stage_") else name
    if name not in STRATEGIES:
        raise ValueError(f"strategy must be one of {list(STRATEGIES)}, got {value!r}")
    return name


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next(value for value in values if value is not None)
