"""Small registries whose versions answer without a real model: what the tests of the server run."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evertune.registry.manifest import Manifest
from evertune.registry.registry import Registry


class Echo:
    """Answers each text with a class named in its file. A text may ask for trouble: ``boom``, ``wait``."""

    multi_label = False
    gate = threading.Event()
    """What the text ``wait`` waits for."""
    batches: list[int]

    def __init__(self, label: str) -> None:
        self.label = label
        self.batches = []

    @classmethod
    def from_pretrained(cls, directory: str | Path, /) -> Echo:
        return cls(json.loads((Path(directory) / "answer.json").read_text()))

    def predict(self, texts: Sequence[Any], /) -> list[dict[str, float]]:
        self.batches.append(len(texts))
        if "wait" in texts:
            assert self.gate.wait(60)
        if "boom" in texts:
            raise RuntimeError(f"no answer to {texts!r}")
        if "empty" in texts:
            raise ValueError(f"texts[{texts.index('empty')}] has no tokens: leave empty texts out")
        return [{self.label: 0.9, "other": 0.1} for _ in texts]


def publish(registry: Registry, folder: Path, content: dict[str, bytes], module: str | None = None) -> int:
    """Publish a version whose model is these files; returns its number."""
    staging = folder / f"staging-{registry.next_number()}"
    (staging / "model").mkdir(parents=True)
    for name, data in content.items():
        (staging / "model" / name).write_bytes(data)
    number = registry.next_number()
    manifest = replace(Manifest(version=number, parent=number - 1 or None), module=module)
    return registry.publish(staging, manifest).number


def echoes(folder: Path, labels: Sequence[str]) -> Registry:
    """A registry with a version for each label, the first in production."""
    registry = Registry(folder / "registry")
    for label in labels:
        publish(registry, folder, {"answer.json": json.dumps(label).encode()})
    registry.promote(1)
    return registry
