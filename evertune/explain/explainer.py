"""Explains the answers of versions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from os import PathLike
from typing import Any, Literal, get_args

from evertune.explain.explanation import Explanation, Said
from evertune.explain.gradients import integrated_gradients
from evertune.explain.neighbours import Neighbour, Neighbours, memory_of
from evertune.explain.occlusion import occlusion
from evertune.explain.rollout import attention_rollout
from evertune.registry.registry import Registry, RegistryError
from evertune.registry.serving import load
from evertune.registry.version import Version
from evertune.tasks.predicting import are_probabilities

Method = Literal["occlusion", "integrated_gradients", "attention_rollout"]
METHODS: tuple[str, ...] = get_args(Method)
_UNREADABLE = (RegistryError, OSError, ValueError, TypeError, LookupError, AttributeError)
_TOP = 5  # classes whose probability is kept


class Explainer:
    """Why a version answers as it does; the features of its memory are computed once, for the first text.

    Args:
        version: The version.
        module: Its module.
        alone: A context in which nobody else uses the module; entered for one batch at a time. Default: nobody does.
    """

    def __init__(
        self, version: Version, module: Any, alone: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        self.version, self.module, self._alone = version, module, alone
        self._neighbours: Neighbours | None = None

    def explain(
        self, text: str, label: str | None = None, method: Method = "occlusion", n_neighbours: int = 5
    ) -> Explanation:
        """Explain the answer to a text; the arguments are those of :func:`evertune.explain.explain`.

        Raises:
            TypeError: If the module does not classify texts, or has no gradients.
            ValueError: If the text is empty, the version does not know the label, or a setting is out of range.
        """
        if not text.strip():
            raise ValueError("text is empty: there is nothing to explain")
        if n_neighbours < 0:
            raise ValueError(f"n_neighbours must not be negative, got {n_neighbours}")
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        number, probabilities = self.version.number, _probabilities(self, text)
        explained = label if label is not None else next(iter(probabilities))
        if explained not in probabilities:
            known = ", ".join(probabilities)
            raise ValueError(f"version {number} does not know the class {explained!r}; it knows {known}")
        if not hasattr(self.module, "tokenizer"):
            raise TypeError(f"{type(self.module).__name__} has no tokenizer, by whose tokens words can be hidden")
        if method == "occlusion":
            parts = occlusion(self, text, explained)
        else:
            with self._alone():
                parts = (
                    attention_rollout(self.module, text)
                    if method == "attention_rollout"
                    else integrated_gradients(self.module, text, explained)
                )
        near, pulling, why_none = self._nearest(text, n_neighbours, explained) if n_neighbours else ([], [], "")
        top = dict(list(probabilities.items())[:_TOP])
        said = _said(self.version, probabilities, explained)
        missing = [f"nearest examples: {why_none}"] if why_none else []
        return Explanation(text, number, explained, method, top, parts, near, [said], missing, pulling)

    def _nearest(self, text: str, n: int, label: str) -> tuple[list[Neighbour], list[Neighbour], str]:
        """The nearest examples and those that pull most, or why there are none."""
        number = self.version.number
        if not hasattr(self.module, "features"):
            return [], [], f"{type(self.module).__name__} has no features by which they could be found"
        try:
            with self._alone():
                if self._neighbours is None:
                    memory = memory_of(self.version)
                    if not memory:
                        return [], [], f"version {number} has no replay memory"
                    self._neighbours = Neighbours(self.module, memory)
                return *self._neighbours.nearest(text, n, label), ""
        except _UNREADABLE:  # whose words may name folders, which are not for the clients of a server
            why = (
                f"the replay memory of version {number} was deleted since it was loaded, is damaged, or holds examples "
            )
            return [], [], f"{why}that are not tokens; `evertune registry verify` names what is damaged"

    def predict(self, texts: list[str]) -> Any:
        """The answers of the module, while nobody else uses it."""
        with self._alone():
            return self.module.predict(texts)

    @property
    def tokenizer(self) -> Any:
        """The module's tokenizer."""
        return self.module.tokenizer


def explain(
    registry: Registry | str | PathLike[str],
    version: str | int = "production",
    *,
    text: str,
    label: str | None = None,
    method: Method = "occlusion",
    against: str | int | None = None,
    history: bool = False,
    n_neighbours: int = 5,
    progress: Callable[[str], None] | None = None,
) -> Explanation:
    """Why a version of a registry answers a text as it does.

    The effect of a word is what the probability loses when the word is hidden (occlusion: Zeiler & Fergus 2014, Li et
    al. 2016): one forward pass a word, for any model. By integrated gradients, it is the word's share of the logit
    (:func:`~evertune.explain.gradients.integrated_gradients`); by attention roll-out, its share of what the head reads,
    whatever the class (:func:`~evertune.explain.rollout.attention_rollout`). The neighbours are the examples of the
    memory with the most similar features; that they are near does not prove that they were the cause. Those that pull
    would move the answer most in one more step of training (:class:`~evertune.explain.neighbours.Neighbour`). What is
    asked for and not there, such as an earlier version or a memory, is named in ``missing`` with the reason.

    Args:
        registry: A registry, or its folder or URL.
        version: Number of the version, or an alias. Default: ``production``.
        text: The text.
        label: Class to explain. Default: the answer.
        method: ``occlusion`` (default), ``integrated_gradients`` or ``attention_rollout``.
        against: Another version whose answer is given as well. Default: none.
        history: Whether to ask all versions up to this one, to find the update that changed the answer. Each is loaded
            in turn. Default: False.
        n_neighbours: Number of nearest examples, and of those that pull most. Default: 5; 0 for none.
        progress: Called with what is being done.

    Raises:
        RegistryError: If there is no such registry or version to explain, or its weights are damaged.
        TypeError: If the version's module does not classify texts, or has no gradients at words or no attention.
        ValueError: If the text is empty, the version does not know the label, or a setting is out of range.

    Example::

        found = explain("registry", 8, text="The card was charged twice", history=True)
        print(found.label, max(found.parts, key=lambda part: part.effect).text)
    """
    registry = registry if isinstance(registry, Registry) else Registry(str(registry))
    say = progress or (lambda _: None)
    served = load(registry, registry.version(version).number)
    number = served.version.number
    say(f"version {number}")
    found = Explainer(served.version, served.module).explain(text, label, method, n_neighbours)
    others = [one.number for one in registry.versions() if one.number < number] if history else []
    missing = [f"history: {registry.store.root} has no version before {number}"] if history and not others else []
    said = list(found.history)
    del served
    for other in [*others, *([] if against is None else [against])]:
        say(f"version {other}")
        try:
            chosen = registry.version(other).number
            if chosen in (one.version for one in said):
                missing += [f"version {other}: it is the one that is explained"] if chosen == number else []
                continue
            asked = load(registry, chosen)
            said.append(_said(asked.version, _probabilities(asked, text), found.label))
        except (RegistryError, OSError, TypeError, ValueError) as error:
            missing.append(f"version {other}: {error}")
    return replace(found, history=sorted(said, key=lambda one: one.version), missing=[*found.missing, *missing])


def _probabilities(asked: Any, text: str) -> dict[str, float]:
    """The probability of each class, most probable first.

    Raises:
        TypeError: If the module does not classify.
    """
    [answer] = asked.predict([text])
    if not are_probabilities(answer):
        raise TypeError(
            f"{type(asked.module).__name__} does not classify texts, and only probabilities of classes can be explained"
        )
    return answer


def _said(version: Any, probabilities: dict[str, float], label: str) -> Said:
    best, probability = next(iter(probabilities.items()))
    return Said(version.number, best, probability, probabilities.get(label), version.experience)
