"""The page on which a text is typed in, and an answer is explained."""

from __future__ import annotations

import threading

from starlette.requests import Request
from starlette.responses import Response

from evertune.explain.explainer import METHODS, Explainer
from evertune.explain.explanation import Explanation
from evertune.registry.registry import Registry, RegistryError
from evertune.registry.serving import load
from evertune.ui.guard import RefusedError
from evertune.ui.rendering import Templates

_LONGEST = 5_000  # characters of a text, which is a part of the address
_N_PARTS = 30
_UNITS = {
    "occlusion": "The probability, minus that of the text without the word.",
    "integrated_gradients": "The word's share of the logit; together they are its change from a text without words.",
    "attention_rollout": "How much of the word reaches the head by attention, whatever the label; all tokens make 1.",
}


class Explaining:
    """The page that explains answers. The version that was asked about last stays in memory.

    Args:
        registry: The registry of the versions.
        templates: The pages.
    """

    def __init__(self, registry: Registry, templates: Templates) -> None:
        self._registry, self._templates = registry, templates
        self._explainer: Explainer | None = None
        self._turn = threading.Lock()

    def page(self, request: Request) -> Response:
        """The form, and the explanation of what it asks for."""
        asked = dict(request.query_params)
        found, problem = None, ""
        if asked.get("text", "").strip():
            if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
                raise RefusedError(403, "Not from another site", "Open the page and type the text in.")
            try:
                found = self._explained(asked)
            except (RegistryError, TypeError, ValueError, OSError) as error:
                problem = str(error)
        return self._templates.page(
            "explain.html",
            "/explain",
            "Explain an answer",
            asked=asked,
            found=found,
            problem=problem,
            strongest=sorted(found.parts, key=lambda part: -abs(part.effect))[:_N_PARTS] if found else [],
            unit=_UNITS[found.method] if found else "",
            methods=METHODS,
            versions=["production", *(str(one.number) for one in reversed(self._registry.versions()))],
            longest=_LONGEST,
        )

    def _explained(self, asked: dict[str, str]) -> Explanation:
        if len(asked["text"]) > _LONGEST:
            raise ValueError(f"the text has more than {_LONGEST:,} characters: use `evertune explain`")
        if not self._turn.acquire(blocking=False):
            raise RefusedError(429, "One at a time", "Another answer is being explained: try again in a moment.")
        try:
            number = self._registry.version(asked.get("version") or "production").number
            if self._explainer is None or self._explainer.version.number != number:
                self._explainer = None  # before the next is loaded, so that memory holds one
                served = load(self._registry, number, device="cpu")
                self._explainer = Explainer(served.version, served.module)
            method = asked.get("method") or METHODS[0]
            return self._explainer.explain(asked["text"], asked.get("label") or None, method)  # type: ignore[arg-type]
        finally:
            self._turn.release()
