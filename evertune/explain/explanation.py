"""Why a version answers a text as it does, and since when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from evertune.explain.neighbours import Neighbour, memory_of, neighbours
from evertune.explain.occlusion import Part, occlusion
from evertune.registry.registry import Registry
from evertune.registry.serving import load
from evertune.tasks.predicting import are_probabilities

_TOP = 5  # classes whose probability is kept


@dataclass(frozen=True)
class Said:
    """The answer of one version.

    Args:
        version: Its number.
        label: The most probable class.
        probability: Its probability.
        of_label: Probability of the class that is explained; None if the version does not know it.
        experience: Experience that the version had learned last.
    """

    version: int
    label: str
    probability: float
    of_label: float | None
    experience: str | None


@dataclass(frozen=True)
class Explanation:
    """Why a version gives a text a label.

    Args:
        text: The text.
        version: Number of the version.
        label: The label that is explained: the answer, or one that was asked about.
        probabilities: Probabilities of the most probable classes.
        parts: The words of the text with their effects, in the order of the text.
        neighbours: The nearest examples of the version's memory; empty if it has none.
        history: The answers of other versions, in their order.
    """

    text: str
    version: int
    label: str
    probabilities: dict[str, float]
    parts: list[Part]
    neighbours: list[Neighbour]
    history: list[Said]

    @property
    def flips(self) -> list[tuple[Said, Said]]:
        """Pairs of consecutive versions of the history whose answers differ: which update changed the answer."""
        pairs = zip(self.history, self.history[1:], strict=False)
        return [(before, after) for before, after in pairs if before.label != after.label]

    def as_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        flips = [[before.version, after.version] for before, after in self.flips]
        return {**asdict(self), "flips": flips}


def explain(
    registry: Registry | str | PathLike[str],
    version: str | int = "production",
    *,
    text: str,
    label: str | None = None,
    against: str | int | None = None,
    history: bool = False,
    n_neighbours: int = 5,
    progress: Callable[[str], None] | None = None,
) -> Explanation:
    """Why a version of a registry answers a text as it does.

    The effect of a word is what the probability loses when the word is hidden (occlusion: Zeiler & Fergus 2014, Li et
    al. 2016): one forward pass a word, for any model. The neighbours are the examples of the memory with the most
    similar features; that they are near does not prove that they were the cause.

    Args:
        registry: A registry, or its folder or URL.
        version: Number of the version, or an alias. Default: ``production``.
        text: The text.
        label: Class to explain. Default: the answer.
        against: Another version whose answer is given as well. Default: none.
        history: Whether to ask all versions up to this one, to find the update that changed the answer. Each is loaded
            in turn. Default: False.
        n_neighbours: Number of nearest examples. Default: 5; 0 for none.
        progress: Called with what is being done.

    Raises:
        RegistryError: If there is no such registry or version, or a file is damaged.
        TypeError: If the version's module does not classify texts.
        ValueError: If the text is empty, or the version does not know the label.

    Example::

        found = explain("registry", 8, text="The card was charged twice", history=True)
        print(found.label, max(found.parts, key=lambda part: part.effect).text)
    """
    if not text.strip():
        raise ValueError("text is empty: there is nothing to explain")
    if n_neighbours < 0:
        raise ValueError(f"n_neighbours must not be negative, got {n_neighbours}")
    registry = registry if isinstance(registry, Registry) else Registry(str(registry))
    say = progress or (lambda _: None)
    served = load(registry, registry.version(version).number)
    number = served.version.number
    say(f"version {number}")
    probabilities = _probabilities(served.module, text)
    explained = label if label is not None else next(iter(probabilities))
    if explained not in probabilities:
        raise ValueError(f"version {number} does not know the class {explained!r}; it knows {', '.join(probabilities)}")
    parts = occlusion(served.module, text, explained)
    memory = memory_of(served.version) if n_neighbours and hasattr(served.module, "features") else None
    near = neighbours(served.module, text, memory, n_neighbours) if memory is not None and len(memory) else []
    others = [one.number for one in registry.versions() if one.number < number] if history else []
    if against is not None:
        others = sorted({*others, registry.version(against).number} - {number})
    said = [_said(served.version, probabilities, explained)]
    del served
    for other in others:
        say(f"version {other}")
        asked = load(registry, other)
        said.append(_said(asked.version, _probabilities(asked.module, text), explained))
    top = dict(list(probabilities.items())[:_TOP])
    return Explanation(text, number, explained, top, parts, near, sorted(said, key=lambda one: one.version))


def _probabilities(module: Any, text: str) -> dict[str, float]:
    """The probability of each class, most probable first.

    Raises:
        TypeError: If the module does not classify.
    """
    [answer] = module.predict([text])
    if not are_probabilities(answer):
        raise TypeError(
            f"{type(module).__name__} does not classify texts, and only probabilities of classes can be explained"
        )
    return answer


def _said(version: Any, probabilities: dict[str, float], label: str) -> Said:
    best, probability = next(iter(probabilities.items()))
    return Said(version.number, best, probability, probabilities.get(label), version.experience)
