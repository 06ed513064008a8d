"""The examples of a version's memory that are nearest to a text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from evertune.memory.view import MemoryView
from evertune.registry.version import Version
from evertune.tasks.base import task_of
from evertune.tasks.predicting import device_of


@dataclass(frozen=True)
class Neighbour:
    """An example of the memory.

    Args:
        id: Its id.
        text: Its text, read back from its tokens, as far as they were kept.
        label: Its label; None if it has none.
        experience: Experience that it was learned in.
        similarity: Cosine between the features of both texts, at most 1.
    """

    id: str
    text: str
    label: Any
    experience: str
    similarity: float


def memory_of(version: Version) -> MemoryView | None:
    """The replay memory of a version; None if it has none.

    Raises:
        RegistryError: If a file of its learning state is damaged.
    """
    if not any(name.startswith("learning/") and name.endswith("/memory.json") for name in version.manifest.files):
        return None
    manifest = next((version.verified_folder("learning") / "learning").glob("*/memory.json"))
    return MemoryView.open(manifest.parent / Path(json.loads(manifest.read_bytes())["file"]).name)


class Neighbours:
    """The examples of a memory by their features, which the module as it is now computes once.

    Args:
        module: Module with a ``tokenizer`` and ``features(batch)``, which returns a tensor ``[examples, features]``.
        memory: The memory.
        batch_size: Examples per forward pass. Default: 64.
    """

    def __init__(self, module: Any, memory: MemoryView, batch_size: int = 64) -> None:
        self._module, self._memory = module, memory
        collate, device = task_of(module).collator(module.tokenizer), device_of(module)
        found: list[torch.Tensor] = []
        with torch.inference_mode():
            for start in range(0, len(memory), batch_size):
                examples = [_tokens(memory[slot]) for slot in range(start, min(start + batch_size, len(memory)))]
                batch = {name: value.to(device) for name, value in collate(examples).items()}
                found.append(module.features(batch).float())
        self._features = torch.cat(found) if found else None

    def nearest(self, text: str, n: int = 5) -> list[Neighbour]:
        """The examples whose features are most similar to those of a text, the nearest first.

        Args:
            text: The text.
            n: Number of examples. Default: 5.
        """
        if self._features is None or n == 0:
            return []
        module, memory = self._module, self._memory
        with torch.inference_mode():
            query = module.tokenizer(text, truncation=True, return_tensors="pt").to(self._features.device)
            similar = F.cosine_similarity(self._features, module.features(query).float())
        nearest = similar.topk(min(n, len(memory)))
        return [
            Neighbour(
                memory.ids[slot],
                module.tokenizer.decode(memory[slot]["input_ids"], skip_special_tokens=True),
                memory.labels[slot],
                memory.experiences[slot],
                similarity,
            )
            for slot, similarity in zip(nearest.indices.tolist(), nearest.values.tolist(), strict=True)
        ]


def _tokens(example: Any) -> dict[str, Any]:
    """An example without its label and its id."""
    return {name: example[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in example}
