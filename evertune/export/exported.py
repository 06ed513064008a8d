"""An exported model, loaded to answer texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from evertune.export.manifest import MODEL, ExportManifest, read_manifest


class ExportedModel:
    """An export, which answers as the module that it was made from does.

    Args:
        folder: Folder of the model.
        manifest: What is known about it.

    Example::

        model = ExportedModel.load("intents-int8")
        model.predict(["Shares fell after the merger."])  # [{"business": 0.98, "sport": 0.02}]
    """

    def __init__(self, folder: Path, manifest: ExportManifest) -> None:
        self.manifest = manifest
        self.module = _module(folder, manifest)
        """A module of the same class, whose logits the export computes. It has no weights, and cannot be trained."""

    def __repr__(self) -> str:
        version = self.manifest.origin.version
        return f"ExportedModel({self.manifest.kind}, {f'version {version}' if version else self.manifest.module})"

    @classmethod
    def load(cls, folder: str | Path, *, trusted: bool = False) -> Self:
        """Load an export, after comparing every file with its SHA-256.

        Args:
            folder: Folder that :func:`evertune.export.export` wrote.
            trusted: Whether the folder comes from someone that you trust. It must be for ``torch_export``: torch
                evaluates expressions that stand in the file, so that one which was made to harm runs code.

        Raises:
            FileNotFoundError: If the folder holds no export, or a file is missing.
            ModuleNotFoundError: If the extra ``export`` is needed and not installed.
            ValueError: If a file is damaged or was added, or ``trusted`` is needed and not set.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest.format == "torch_export" and not trusted:
            raise ValueError(
                f"{folder} is a program of torch.export, which can run code when it is loaded: pass trusted=True if "
                "you trust whoever wrote it, or export to onnx or safetensors"
            )
        return cls(folder / MODEL, manifest)

    @property
    def classes(self) -> list[str]:
        """The names of the classes."""
        return list(self.manifest.classes)

    def predict(self, texts: Sequence[Any], batch_size: int = 32, max_length: int | None = None) -> list[Any]:
        """The answer to each text, as ``predict`` of the module gives it: for a classifier, probabilities by class.

        Args:
            texts: What the module's ``predict`` takes: texts, or pairs of texts.
            batch_size: Number of texts per forward pass. Default: 32.
            max_length: Maximum number of tokens; longer texts are truncated. None (default) is the module's default.

        Raises:
            TypeError: If ``texts`` is a single string, or one of them is not what the module takes.
            ValueError: If ``max_length`` is more than the model takes, or a text has no tokens.
        """
        found: list[Any] = self.module.predict(texts, batch_size, max_length)
        return found


def _module(folder: Path, manifest: ExportManifest) -> Any:
    if manifest.format == "safetensors":
        from evertune.export.formats import loaded

        return loaded(folder)
    from evertune.export.kinds import answering

    if manifest.format == "onnx":
        from evertune.export.onnx_runtime import OnnxRunner

        run: Any = OnnxRunner(folder)
    else:
        from evertune.export.torch_program import ProgramRunner

        run = ProgramRunner(folder, manifest.inputs)
    return answering(manifest.module, manifest.settings, folder, manifest.inputs, run)
