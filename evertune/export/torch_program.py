"""Programs of ``torch.export``: written without anything pickled, and run by torch."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from evertune.export.graph import example

FILE = "model.pt2"


def write_program(program: torch.export.ExportedProgram, folder: Path) -> None:
    """Write a program as ``model.pt2``, without its example.

    Raises:
        ValueError: If torch would pickle a part of it.
    """
    program.example_inputs = None  # which torch pickles
    torch.export.save(program, folder / FILE)
    check_program(folder / FILE)


def check_program(path: Path) -> None:
    """Make sure that nothing in a program is unpickled when it is loaded.

    Raises:
        ValueError: If a part of it is pickled, or the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist() if archive.getinfo(name).file_size]
            configs = [json.loads(archive.read(name)) for name in archive.namelist() if name.endswith("_config.json")]
            parts = [(name, part) for config in configs for name, part in config.get("config", {}).items()]
    except (zipfile.BadZipFile, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    pickled = [name for name, part in parts if part.get("use_pickle", True)]
    pickled += [name for name in names if name.endswith((".pt", ".pkl", "_opaque")) or "custom_obj" in name]
    if pickled:
        raise ValueError(f"{path} holds {pickled[0]} as a pickle, which can run code when it is loaded")


class ProgramRunner:
    """Runs ``model.pt2`` by torch, on the CPU.

    Args:
        folder: Folder of the file.
        names: Names of the inputs, in their order.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        check_program(folder / FILE)
        self._names = list(names)
        program = torch.export.load(folder / FILE)
        program.example_inputs = (example(names), {})  # without which torch makes no module of it
        self._program = program.module()

    def __call__(self, tokens: Mapping[str, np.ndarray]) -> np.ndarray:
        """The logits ``[batch, classes]`` of tokens ``[batch, tokens]`` by the name of the input."""
        with torch.inference_mode():
            logits: torch.Tensor = self._program(*(torch.from_numpy(tokens[name]) for name in self._names))
        return logits.numpy()
