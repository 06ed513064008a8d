"""``evertune plan``: what training a model takes on each GPU under each strategy, without any GPU at hand."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from evertune.cli.footprint import (
    PRECISIONS,
    Collective,
    Footprint,
    ModelShape,
    Training,
    collectives,
    consolidation,
    footprint,
)
from evertune.utils.pretrained import load_config
from evertune.utils.terminal import complain, console

GIB = 2**30

GPUS: dict[str, float] = {
    "a10": 22,
    "a100": 79,
    "a100-40": 39,
    "b200": 178,
    "h100": 79,
    "h200": 139,
    "l4": 22,
    "l40s": 44,
    "mi300x": 191,
    "rtx3090": 24,
    "rtx4090": 24,
    "t4": 14.5,
    "v100": 31.5,
    "v100-16": 15.5,
}
"""GPUs by name, with the memory in GiB that a process can use."""

STRATEGIES: dict[str, tuple[int, bool]] = {
    "ddp": (0, False),
    "evertune_deepspeed_stage_1": (1, False),
    "evertune_deepspeed_stage_2": (2, False),
    "evertune_deepspeed_stage_3": (3, False),
    "evertune_deepspeed_stage_2_offload": (2, True),
    "evertune_deepspeed_stage_3_offload": (3, True),
}
"""ZeRO stage and offloading of each strategy, fastest first: those that communicate least."""

_MATCHING = "TextMatchingModule"
MODULES = ("SequenceClassificationModule", "OrdinalClassificationModule", "TokenClassificationModule", _MATCHING)
"""The modules of :mod:`evertune.lightning_modules` whose size is known without their weights."""

RESERVE = 0.1
"""Share of a GPU's memory that is left for CUDA, NCCL and fragmentation."""

_PREFIX = "evertune_deepspeed_"

_PRECISION_NAMES = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "None": "32-true", "auto": "bf16-mixed"}
_MOST_GPUS = 4096  # in all, up to which more nodes are tried


def _callbacks() -> Any:
    """The package whose names are evertune's own callbacks. Imported on use, as it is slow to import."""
    return import_module("evertune.callbacks")


@dataclass(frozen=True)
class Method:
    """A method of continual learning.

    Args:
        cls: Class of the method, a ``ContinualCallback``.
        arguments: Arguments of its constructor by name: those given, else their defaults.
    """

    cls: type[Any]
    arguments: Mapping[str, Any]

    @classmethod
    def named(cls, name: str, arguments: Mapping[str, Any] | None = None) -> Method:
        """Find a method by name.

        Args:
            name: Import path of its class, or the name of the class in ``evertune.callbacks`` in upper or lower case.
            arguments: Arguments of the constructor; they override its defaults.

        Raises:
            ValueError: If there is no such class, or it is not a ``ContinualCallback``.
        """
        from evertune.callbacks.base import ContinualCallback

        callbacks = _callbacks()
        module, _, attribute = name.rpartition(".")
        own = {one.lower(): one for one in callbacks.__all__}
        try:
            found: Any = getattr(import_module(module), attribute) if module else getattr(callbacks, own[name.lower()])
        except (ImportError, AttributeError, KeyError) as error:
            raise ValueError(
                f"unknown method {name!r} ({error}); give one of {', '.join(sorted(own))} or the path of a class"
            ) from None
        if not (isinstance(found, type) and issubclass(found, ContinualCallback)):
            raise ValueError(f"{name!r} is not a method: it does not derive from ContinualCallback")
        parameters = inspect.signature(found).parameters.items()
        defaults = {key: one.default for key, one in parameters if one.default is not inspect.Parameter.empty}
        return cls(found, {**defaults, **(arguments or {})})

    @property
    def bytes_per_weight(self) -> int | None:
        """Bytes for each weight that a rank updates, as its class declares; None if that depends on the arguments."""
        size: int | None = self.cls.bytes_per_weight()
        return size

    @property
    def estimates(self) -> bool:
        """Whether it goes over a sample of the experience at the experience's end, as EWC does."""
        # There is no declaration for this: methods that do it have these two arguments in common.
        return bool(self.bytes_per_weight) and {"n_examples", "batch_size"} <= self.arguments.keys()


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

    @property
    def world_size(self) -> int:
        """Number of GPUs in all, each with one process."""
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Row:
    """One strategy of the plan.

    Args:
        strategy: Name of the strategy.
        footprint: Memory of the rank that holds most.
        moves: Collectives of an optimizer step.
        sent: Bytes that each rank sends in an optimizer step.
        fits: Whether the peak leaves :data:`RESERVE` of the GPU's memory free.
    """

    strategy: str
    footprint: Footprint
    moves: list[Collective]
    sent: float
    fits: bool


def plan(arguments: Sequence[str]) -> int:
    """Print what a model needs on each GPU under each strategy. Its weights are never read.

    Args:
        arguments: Arguments of the command, without its name.

    Returns:
        The exit code: 0 if the model fits (under the strategy that the configuration names, or else under any), 1 if
        it does not, 2 if the question cannot be answered.
    """
    options = _parser().parse_args(arguments)
    try:
        request = read_request(options)
        shape = shape_of(request.model, request.n_classes, request.module)
        rows = rows_of(shape, request)
    except (OSError, ValueError, TypeError) as error:
        complain("evertune plan", error)
        return 2
    choice = choose(rows, request.strategy)
    advice = [] if choice is not None else what_would_fit(shape, request)
    if options.json:
        print(json.dumps(as_json(shape, request, rows, choice, advice), indent=1))
    else:
        _print(shape, request, rows, choice, advice)
    return 0 if choice is not None else 1


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
    methods = _methods_of(trainer, notes)
    if options.method is not None:
        # A method named on the command line keeps the arguments that the configuration gives it.
        configured = {method.cls: method for method in methods}
        named = [Method.named(name) for name in options.method]
        methods = [configured.get(method.cls, method) for method in named]
    estimating = [method for method in methods if method.estimates]
    replaying = [method for method in methods if "replay_ratio" in method.arguments]
    n_classes = options.classes or max(len(model.get("classes") or ()), model.get("n_classes_ahead") or 0)
    if not n_classes and module != _MATCHING:
        n_classes = 10
        notes.append("the number of classes is not known: 10 are assumed (--classes)")
    n_texts, n_estimated = _texts_of_example(module, model)
    if n_texts > 1:
        notes.append(f"an example has {n_texts} texts in training, and batch sizes below count texts")
    gpus = _first(options.gpus, launch.get("processes_per_node"), trainer.get("devices"), 1)
    training = Training(
        stage=0,
        precision=_precision(_first(options.precision, trainer.get("precision"), "32-true")),
        batch_size=_first(options.batch_size, data.get("batch_size"), 32) * n_texts,
        seq_length=_first(options.seq_length, data.get("max_length"), 128),
        accumulation=_first(options.accumulate_grad_batches, trainer.get("accumulate_grad_batches"), 1),
        method_bytes=sum(method.bytes_per_weight or 0 for method in methods),
        estimation_batch_size=n_estimated
        * _first(options.estimation_batch_size, _argument(estimating, "batch_size", None), 0)
        if estimating
        else 0,
        replay_ratio=_first(options.replay_ratio, _argument(replaying, "replay_ratio", 0.0)) if replaying else 0.0,
        memory_size=_first(options.memory_size, _argument(replaying, "memory_size", 0)) if replaying else 0,
        preemption="launch" in config,  # launched runs have the callback Preemption
        later_fit="registry" not in config,  # each update of a registry is the first fit of its process
    )
    return Request(
        model=model,
        n_classes=n_classes,
        nodes=_positive("nodes", _first(options.nodes, launch.get("nodes"), trainer.get("num_nodes"), 1)),
        gpus=_devices(gpus),
        memory=_memory(options.gpu_memory),
        training=training,
        n_examples=_argument(estimating, "n_examples", 500),
        strategy=_strategy(trainer.get("strategy")),
        notes=tuple(notes),
        module=module,
    )


def shape_of(settings: Mapping[str, Any], n_classes: int, module_class: str = MODULES[0]) -> ModelShape:
    """Build a model from its configuration, with its head but without weights, on torch's meta device.

    Args:
        settings: Settings of the module.
        n_classes: Number of classes, on which the rows of the head depend.
        module_class: Name of the module's class, one of :data:`MODULES`. Default: the classifier of texts.

    Returns:
        The sizes of the model.

    Raises:
        OSError: If the configuration cannot be found.
        ValueError: If a setting is invalid, or the configuration is not that of a transformer that evertune can train.
    """
    import torch
    from torch import nn
    from transformers import AutoModel

    from evertune.lightning_modules.backbone import encoder_layers, freeze, override_dropout, quiet_transformers

    classes = {} if module_class == _MATCHING else {"classes": [str(number) for number in range(n_classes)]}
    module: Any = getattr(import_module("evertune.lightning_modules"), module_class)(**{**settings, **classes})
    name = module.model_name_or_path
    with quiet_transformers():
        config = load_config(name)
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder ({config.model_type}), which is not supported")
    if module.dropout is not None:
        override_dropout(config, module.dropout)
    with quiet_transformers(), torch.device("meta"):
        module.backbone = AutoModel.from_config(config)
        # Drop the pooler as the module itself does, since nothing would train it.
        if isinstance(getattr(module.backbone, "pooler", None), nn.Module):
            module.backbone.pooler = None
        freeze(module.backbone, module.freeze_layers)
        module.configure_head()
        module.configure_adapters()
    parameters = list(module.parameters())
    trained = [p for p in parameters if p.requires_grad]
    # The module's optimizer has two groups: matrices, which decay, and vectors, which do not.
    groups = ([p.numel() for p in trained if p.ndim > 1], [p.numel() for p in trained if p.ndim <= 1])
    layers = encoder_layers(module.backbone)[1]
    text = config.get_text_config()  # of a model of several modalities, the part that reads text
    heads = getattr(text, "num_attention_heads", None)
    if heads is None or getattr(text, "hidden_size", None) is None:
        raise ValueError(f"the configuration of {name} ({config.model_type}) does not tell its hidden_size and heads")
    # Configurations name the width of the feed-forward part differently; some do not name it at all.
    widest = max(max(p.shape) for p in layers[0].parameters() if p.ndim > 1)
    given = (getattr(text, key, None) for key in ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim"))
    intermediate = next((size for size in given if size is not None), widest)
    # With a gate, three matrices have this width, or two of them are fused into one of double width.
    sides = [max(p.shape) for p in layers[0].parameters() if p.ndim == 2]
    return ModelShape(
        groups=tuple(tuple(group) for group in groups if group),
        frozen=tuple(p.numel() for p in parameters if not p.requires_grad),
        layers=sum(any(p.requires_grad for p in layer.parameters()) for layer in layers),
        hidden=text.hidden_size,
        intermediate=intermediate,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        gated=sides.count(intermediate) > 2 or 2 * intermediate in sides,
        rms_norm=any("RMSNorm" in type(part).__name__ for part in layers.modules()),
        dropout=any(isinstance(part, nn.Dropout) and part.p > 0 for part in layers.modules()),
        eager_attention=getattr(text, "_attn_implementation", None) == "eager",
    )


def _texts_of_example(module_class: str, settings: Mapping[str, Any]) -> tuple[int, int]:
    """How many texts the model reads of an example in training, and where its importance is estimated."""
    if module_class != _MATCHING:
        return 1, 1
    n_negatives = int(settings.get("n_negatives", 7))
    if settings.get("architecture") == "cross_encoder":
        return 1 + n_negatives, 1 + n_negatives
    return 2 + n_negatives if settings.get("negatives") else 2, 2 + n_negatives


def rows_of(shape: ModelShape, request: Request) -> list[Row]:
    """The cost of each strategy, in the order of :data:`STRATEGIES`."""
    rows = []
    for name, (stage, offload) in STRATEGIES.items():
        training = replace(request.training, stage=stage, offload=offload, world_size=request.world_size)
        costs, moves = footprint(shape, training), collectives(shape, training)
        sent = sum(move.sent(request.world_size) for move in moves)
        rows.append(Row(name, costs, moves, sent, costs.total <= request.memory * (1 - RESERVE)))
    return rows


def choose(rows: Sequence[Row], strategy: str | None = None) -> Row | None:
    """The fastest strategy that fits, or the one that is asked for if it fits; None if there is none."""
    return next((row for row in rows if row.fits and strategy in (None, row.strategy)), None)


def what_would_fit(shape: ModelShape, request: Request) -> list[str]:
    """Changes that make the model fit, each on its own, as lines of text."""
    found = []
    others = choose(rows_of(shape, request))
    if others is not None:  # so the configuration names a strategy that does not fit
        found.append(f"strategy {others.strategy}: {_gib(others.footprint.total)}")
    nodes = request.nodes
    while (nodes := 2 * nodes) * request.gpus <= _MOST_GPUS:
        more = choose(rows_of(shape, replace(request, nodes=nodes)), request.strategy)
        if more is not None:
            found.append(f"{nodes} nodes of {request.gpus}, {more.strategy}: {_gib(more.footprint.total)}")
            break
    batch = request.training.batch_size
    while batch > 1:
        batch //= 2
        # More accumulation, so that a step still has as many examples and the result stays comparable.
        times = request.training.accumulation * request.training.batch_size // batch
        smaller = replace(request.training, batch_size=batch, accumulation=times)
        row = choose(rows_of(shape, replace(request, training=smaller)), request.strategy)
        if row is not None:
            words = f"batch size {batch} with accumulate_grad_batches={times}"
            found.append(f"{words}, {row.strategy}: {_gib(row.footprint.total)}")
            break
    if request.training.estimation_batch_size > 1:
        one = replace(request, training=replace(request.training, estimation_batch_size=1))
        row = choose(rows_of(shape, one), request.strategy)
        if row is not None:
            found.append(f"batch_size 1 when the importance is estimated, {row.strategy}: {_gib(row.footprint.total)}")
    for name, frozen in (("half of the layers frozen", shape.layers // 2), ("only the head trained", -1)):
        if frozen and not request.model.get("freeze_layers"):
            fewer = shape_of({**request.model, "freeze_layers": frozen}, request.n_classes, request.module)
            row = choose(rows_of(fewer, request), request.strategy)
            if row is not None:
                found.append(f"{name} (--freeze_layers {frozen}), {row.strategy}: {_gib(row.footprint.total)}")
                break
    return found


def as_json(
    shape: ModelShape, request: Request, rows: Sequence[Row], choice: Row | None, advice: Sequence[str]
) -> dict[str, Any]:
    """The content of the table for programs; all sizes are in bytes."""
    return {
        "model": request.model["model_name_or_path"],
        "parameters": shape.total,
        "trainable": shape.trainable,
        "nodes": request.nodes,
        "gpus": request.gpus,
        "gpu_memory": round(request.memory),
        "training": {
            name: value for name, value in asdict(request.training).items() if name not in ("stage", "world_size")
        },
        "strategies": [
            {
                "strategy": row.strategy,
                **asdict(row.footprint),
                "sent_per_step": round(row.sent),
                "fits": row.fits,
            }
            for row in rows
        ],
        "choice": None if choice is None else choice.strategy,
        "would_fit": list(advice),
        "notes": list(request.notes),
    }


def _print(shape: ModelShape, request: Request, rows: Sequence[Row], choice: Row | None, advice: Sequence[str]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    training, screen = request.training, console()
    screen = screen if screen.is_terminal else console(width=100)  # the table needs more than the 80 of a pipe
    trained = f", {shape.trainable / shape.total:.0%} of them trained" if shape.frozen else ""
    screen.print(
        f"{request.model['model_name_or_path']}: {shape.total / 1e6:,.1f} million parameters{trained}; "
        f"{request.nodes} x {request.gpus} GPUs of {_gib(request.memory)}; {training.precision}; "
        f"{training.examples} examples of {training.seq_length} tokens on each GPU"
        + (f", {training.examples - training.batch_size} of them replayed" if training.replay_ratio else "")
        + (f"; accumulated {training.accumulation} times" if training.accumulation > 1 else ""),
        soft_wrap=True,
    )
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("strategy", no_wrap=True)
    for column in ("weights", "grads", "optim.", "methods", "activ.", "buffers", "peak", "host", "sent"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for row in rows:
        costs = row.footprint
        parts = (costs.weights, costs.gradients, costs.optimizer, costs.methods)
        sizes = (*parts, costs.activations, costs.buffers, costs.total, costs.host, row.sent)
        style = "bold" if row is choice else None
        gib = (f"{size / GIB:.{2 if size < 100 * GIB else 0}f}" for size in sizes)
        table.add_row(row.strategy.removeprefix(_PREFIX), *gib, "yes" if row.fits else "no", style=style)
    screen.print(table)
    screen.print(
        f"In GiB. stage_N: strategy={_PREFIX}stage_N. peak: the fullest moment of a GPU, not all parts at once; a "
        "tenth of the GPU must stay free. host: of each process. sent: by each GPU in an optimizer step, which gets as "
        "much.",
        soft_wrap=True,
    )
    # Without a choice, the last strategy stands in: the note should not disappear where nothing fits.
    if training.estimation_batch_size and request.world_size > 1:
        stage, offload = STRATEGIES[(choice or rows[-1]).strategy]
        own = replace(training, stage=stage, offload=offload, world_size=request.world_size)
        moves = consolidation(shape, own, n_classes=request.n_classes, n_examples=request.n_examples)
        once = sum(move.sent(request.world_size) for move in moves)
        screen.print(f"Estimating the importance sends {_gib(once)} more at the end of each experience.")
    if training.memory_size:
        disk = f"{rows[0].footprint.disk / 2**20:,.1f} MiB"
        screen.print(f"The replay memory takes up to {disk} on the disk of each node, which its processes map.")
    for note in request.notes:
        screen.print(f"Note: {note}.", soft_wrap=True)
    if choice is not None:
        screen.print(f"It fits: {choice.strategy}.")
        return
    asked = f"{request.strategy} does not fit." if request.strategy else "Nothing fits."
    screen.print(asked + (" What would:" if advice else " Nor would more GPUs, smaller batches or frozen layers."))
    for line in advice:
        screen.print(f"- {line}", soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evertune plan",
        description="What a model needs of each GPU under each strategy. Only its configuration is read, never its "
        "weights. Exit codes: 0 it fits, 1 it does not, 2 the question cannot be answered.",
        epilog="Example: evertune plan --model bert-base-uncased --nodes 2 --gpus 8 --gpu_memory a100",
    )
    parser.add_argument("--config", type=Path, help="the YAML file of `evertune fit` or `evertune update`")
    parser.add_argument(
        "--model", dest="model_name_or_path", metavar="NAME", help="on the hub, a folder, or package:NAME/FOLDER"
    )
    parser.add_argument("--nodes", type=int, help="machines (1)")
    parser.add_argument("--gpus", type=int, help="GPUs of each (1)")
    parser.add_argument("--gpu_memory", metavar="GIB|NAME", help=f"of a GPU: GiB, or one of {', '.join(GPUS)}")
    parser.add_argument(
        "--method", nargs="*", metavar="NAME", help="what is learned with: ewc, replay, or the path of a class"
    )
    parser.add_argument("--precision", help="of the Trainer (32-true)")
    parser.add_argument("--batch_size", type=int, help="new examples at a time on each GPU (32)")
    parser.add_argument("--seq_length", type=int, help="tokens of an example (128)")
    parser.add_argument("--accumulate_grad_batches", type=int, help="of the Trainer (1)")
    parser.add_argument("--freeze_layers", type=int, help="of the module: 0 trains all, -1 the head only")
    parser.add_argument("--classes", type=int, help="rows of the head")
    parser.add_argument("--memory_size", type=int, help="examples in the replay memory")
    parser.add_argument("--replay_ratio", type=float, help="old examples per new one, with replay (1)")
    parser.add_argument(
        "--estimation_batch_size", type=int, help="examples at a time when the importance is estimated (16 for ewc)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    return parser


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
    if name not in MODULES:
        raise ValueError(
            f"the model is a {path}, of which only its own code knows the size; plan knows {', '.join(MODULES)} of "
            "evertune.lightning_modules: name the transformer in it with --model"
        )
    return name, dict(model.get("init_args") or {})


def _methods_of(trainer: Mapping[str, Any], notes: list[str]) -> list[Method]:
    """The methods among the callbacks. Adds a note for each callback whose memory is not counted."""
    callbacks_of_evertune = _callbacks().__all__
    methods = []
    callbacks = trainer.get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        settings = callback if isinstance(callback, dict) else {"class_path": callback}
        path = str(settings.get("class_path"))
        try:
            method = Method.named(path, settings.get("init_args") or {})
        except ValueError:
            method = None
        if method is not None and method.bytes_per_weight is not None:
            methods.append(method)
        elif method is not None or not (path.startswith("evertune.") or path in callbacks_of_evertune):
            notes.append(f"what {path.rpartition('.')[2]} needs is not counted")
    return methods


def _argument(methods: Sequence[Method], name: str, default: Any) -> Any:
    """The value of an argument in the first method that has it, or else the default."""
    return next((method.arguments[name] for method in methods if name in method.arguments), default)


def _precision(value: Any) -> Any:
    name = _PRECISION_NAMES.get(str(value), str(value))
    if name not in PRECISIONS:
        raise ValueError(f"precision must be one of {list(PRECISIONS)}, got {value!r}")
    return name


def _strategy(value: Any) -> str | None:
    """The name in :data:`STRATEGIES` of a configured strategy: a name or a class with arguments; None for "auto"."""
    if value in (None, "auto"):
        return None
    if isinstance(value, dict) and "DeepSpeedStrategy" in str(value.get("class_path")):
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


def _devices(value: Any) -> int:
    """The number of GPUs of a node, from ``devices``: a number, a list of indices, or a string of either."""
    if isinstance(value, list):
        return len(value)
    if isinstance(value, str) and "," in value:
        return len([part for part in value.split(",") if part.strip()])
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if number == -1:
        raise ValueError(f"devices={value!r} does not say how many GPUs a node has; give --gpus")
    return int(_positive("gpus", number))


def _memory(value: str | None) -> float:
    """The memory of a GPU in bytes: given in GiB, by the GPU's name, or else that of the GPU of this machine."""
    if value is None:
        import torch

        if not torch.cuda.is_available():
            raise ValueError(f"there is no GPU here to ask: give --gpu_memory, GiB or one of {', '.join(GPUS)}")
        return float(torch.cuda.get_device_properties(0).total_memory)
    if value.lower() in GPUS:
        return GPUS[value.lower()] * GIB
    try:
        size = float(value)
    except ValueError:
        raise ValueError(f"gpu_memory must be GiB or one of {', '.join(GPUS)}, got {value!r}") from None
    return float(_positive("gpu_memory", size) * GIB)


def _positive(name: str, value: Any) -> Any:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return value


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next(value for value in values if value is not None)


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB"
