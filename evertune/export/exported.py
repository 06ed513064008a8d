"""An exported model, loaded to answer texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from evertune.export.manifest import MODEL, ExportManifest, read_manifest
from evertune.tasks.sequence_classification import SequenceClassificationTask
from evertune.tasks.texts import checked_texts, padded_tokens, truncation_length
from evertune.utils.pretrained import load_tokenizer

Runner = Callable[[Mapping[str, np.ndarray]], np.ndarray]
"""Computes logits ``[batch, classes]`` from tokens ``[batch, tokens]`` by the name of the input."""


class ExportedModel:
    """An export, which answers texts as the module that it was made from does.

    Args:
        folder: Folder of the model.
        manifest: What is known about it.

    Example::

        model = ExportedModel.load("intents-int8")
        model.predict(["Shares fell after the merger."])  # [{"business": 0.98, "sport": 0.02}]
    """

    def __init__(self, folder: Path, manifest: ExportManifest) -> None:
        self.manifest = manifest
        self.tokenizer = load_tokenizer(str(folder))
        self.task = SequenceClassificationTask(manifest.multi_label)
        self._run = _runner(folder, manifest)

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
        """The names of the classes, in the order of the logits."""
        return list(self.manifest.classes)

    @property
    def multi_label(self) -> bool:
        """Whether a text has any number of labels."""
        return self.manifest.multi_label

    def predict(
        self, texts: Sequence[str] | Sequence[tuple[str, str]], batch_size: int = 32, max_length: int | None = None
    ) -> list[dict[str, float]]:
        """The probability of each class for each text, most probable first.

        Args:
            texts: Texts, or pairs of texts.
            batch_size: Number of texts per forward pass. Default: 32.
            max_length: Maximum number of tokens; longer texts are truncated. None (default) is the model's maximum.

        Raises:
            TypeError: If ``texts`` is a single string, or one of them is not a text or a pair of texts.
            ValueError: If ``max_length`` is more than the model takes, or a text has no tokens, or holds half of a
                surrogate pair.
        """
        texts = checked_texts(texts)
        length = truncation_length(max_length or self.manifest.max_length, self.tokenizer, self)
        predictions: list[dict[str, float]] = []
        for start in range(0, len(texts), batch_size):
            some = texts[start : start + batch_size]
            batch = padded_tokens(self.tokenizer, some, length, first=start, tensors="np")
            tokens = {name: batch[name].astype(np.int64) for name in self.manifest.inputs}
            predictions += self._answers(self._run(tokens).astype(np.float64))
        return predictions

    @property
    def max_tokens(self) -> int:
        """The maximum number of tokens of a text."""
        return self.manifest.max_length

    def _answers(self, logits: np.ndarray) -> list[dict[str, float]]:
        if self.multi_label:
            probabilities = 1 / (1 + np.exp(-logits))
        else:
            exponentials = np.exp(logits - logits.max(1, keepdims=True))
            probabilities = exponentials / exponentials.sum(1, keepdims=True)
        return [
            dict(sorted(zip(self.manifest.classes, row, strict=True), key=lambda item: -item[1]))
            for row in probabilities.tolist()
        ]


def _runner(folder: Path, manifest: ExportManifest) -> Runner:
    if manifest.format == "onnx":
        from evertune.export.onnx_runtime import OnnxRunner

        return OnnxRunner(folder)
    if manifest.format == "torch_export":
        from evertune.export.torch_program import ProgramRunner

        return ProgramRunner(folder, manifest.inputs)
    from evertune.export.formats import ModuleRunner

    return ModuleRunner(folder)
