"""The examples of a version's memory that are nearest to a text, and those that pull its answer."""

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
        pull: How much a step on this example, as the version stands, would raise the logit of the label that is
            explained, by the head's row of the label alone and features of length 1: the error of the label's
            probability times ``similarity`` (TracIn at the last weights, Pruthi et al. 2020). Below 0 it speaks against
            the label. None where the module has no head that scores classes.
    """

    id: str
    text: str
    label: Any
    experience: str
    similarity: float
    pull: float | None = None


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
        logits: list[torch.Tensor] = []
        scores = hasattr(module, "head") and hasattr(module, "classes")
        with torch.inference_mode():
            for start in range(0, len(memory), batch_size):
                examples = [_tokens(memory[slot]) for slot in range(start, min(start + batch_size, len(memory)))]
                batch = {name: value.to(device) for name, value in collate(examples).items()}
                features = module.features(batch)
                found.append(features.float())
                if scores:
                    logits.append(module.head(features)[:, : len(module.classes)].float())
        self._features = torch.cat(found) if found else None
        self._errors = _errors(module, memory, torch.cat(logits)) if logits else None

    def nearest(self, text: str, n: int = 5, label: str | None = None) -> tuple[list[Neighbour], list[Neighbour]]:
        """The examples whose features are most similar to those of a text, and those with the strongest pull.

        Args:
            text: The text.
            n: Number of examples of each kind. Default: 5.
            label: Class whose logit is pulled. Default: none is, and there are no examples of the second kind.

        Returns:
            The nearest examples, the most similar first; and those that pull most, up or down, the strongest first.
        """
        if self._features is None or n == 0:
            return [], []
        module = self._module
        with torch.inference_mode():
            query = module.tokenizer(text, truncation=True, return_tensors="pt").to(self._features.device)
            similar = F.cosine_similarity(self._features, module.features(query).float())
        pulls = None
        if self._errors is not None and label is not None:
            pulls = similar * self._errors[:, module.classes.index(label)]
        n = min(n, len(self._memory))
        nearest = [self._example(slot, similar, pulls) for slot in similar.topk(n).indices.tolist()]
        strongest = [] if pulls is None else pulls.abs().topk(n).indices.tolist()
        return nearest, [self._example(slot, similar, pulls) for slot in strongest]

    def _example(self, slot: int, similar: torch.Tensor, pulls: torch.Tensor | None) -> Neighbour:
        memory = self._memory
        return Neighbour(
            memory.ids[slot],
            self._module.tokenizer.decode(memory[slot]["input_ids"], skip_special_tokens=True),
            memory.labels[slot],
            memory.experiences[slot],
            float(similar[slot]),
            None if pulls is None else float(pulls[slot]),
        )


def _errors(module: Any, memory: MemoryView, logits: torch.Tensor) -> torch.Tensor:
    """Label minus probability of each class, ``[examples, classes]``: what the loss pulls each logit by."""
    several = bool(getattr(module, "multi_label", False))
    probabilities = logits.sigmoid() if several else logits.softmax(-1)
    labels = [label if isinstance(label, list | tuple | set) else [label] for label in memory.labels]
    true = torch.tensor([[float(name in names) for name in module.classes] for names in labels])
    return true.to(probabilities) - probabilities


def _tokens(example: Any) -> dict[str, Any]:
    """An example without its label and its id."""
    return {name: example[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in example}
