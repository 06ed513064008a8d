"""``preset`` in a configuration: the settings that it does not name are those of a preset."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from evertune._lightning import LightningArgumentParser

_MODEL = ("model_name_or_path", "init_args.model_name_or_path")


def add_preset_argument(parser: LightningArgumentParser) -> None:
    """Let a configuration name a preset; :func:`with_preset` has put its settings before the others by then."""
    parser.add_argument(
        "--preset",
        type=dict[str, Any] | None,
        default=None,
        help="settings to start from, as {name: text_classification, memory_size: 600}; all others override them",
    )


def parse_with_preset(parser: LightningArgumentParser, arguments: Sequence[str]) -> Any:
    """Parse arguments that may name a preset; what is wrong with it ends the program as any wrong setting does."""
    try:
        arguments = with_preset(arguments)
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(str(error))
    return parser.parse_args(list(arguments))


def with_preset(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command, with the settings of the preset that they name as their first configuration.

    Args:
        arguments: Arguments of the command, without its name. The preset is ``--preset.name`` and
            ``--preset.memory_size``, or the section ``preset`` of a file given with ``--config``; the transformer is
            that of the section ``model``.

    Raises:
        ValueError: If there is no such preset, or it lacks a setting.
    """
    known, _ = _parser().parse_known_args(list(arguments))
    section: dict[str, Any] = {}
    model = None
    for path in known.config:
        if not Path(path).is_file():
            continue  # the command's own parser says so
        content = yaml.safe_load(Path(path).read_text())
        if isinstance(content, dict):
            if isinstance(content.get("preset"), dict):
                section |= content["preset"]
            model = _model_of(content) or model
    given = {"name": known.name, "memory_size": known.memory_size}
    section |= {name: value for name, value in given.items() if value is not None}
    model = known.model or model
    if not section:
        return list(arguments)
    from evertune.presets import preset

    if unknown := section.keys() - {"name", "memory_size", "seed"}:
        raise ValueError(f"preset: there is no setting {min(unknown)!r}; there are name, memory_size and seed")
    if "memory_size" not in section:
        raise ValueError("preset: memory_size is missing: how many examples may be kept for replay, 0 for none")
    if model is None:
        raise ValueError("preset: model.init_args.model_name_or_path is missing: the transformer to start from")
    chosen = preset(section.get("name", "text_classification"), memory_size=section["memory_size"])
    return ["--config", yaml.safe_dump(chosen.config(model)), *arguments]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    parser.add_argument("--preset.name", dest="name")
    parser.add_argument("--preset.memory_size", dest="memory_size", type=int)
    parser.add_argument(*(f"--model.{name}" for name in _MODEL), dest="model")
    return parser


def _model_of(content: dict[str, Any]) -> str | None:
    section = content.get("model")
    arguments = section.get("init_args", section) if isinstance(section, dict) else {}
    name = arguments.get("model_name_or_path") if isinstance(arguments, dict) else None
    return name if isinstance(name, str) else None
