"""Explanations of answers, one at a time beside the answers themselves."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from evertune.explain.explainer import Explainer
from evertune.explain.explanation import Explanation
from evertune.explain.parts import parts_of
from evertune.registry.serving import Answering
from evertune.serve.batching import OverloadedError
from evertune.serve.messages import Explain

MOST_WAITING = 8
_SECONDS = 2.0  # that a client is asked to wait for each explanation before its own


class Explanations:
    """Explains answers in a thread of its own; the answers of others come between its forward passes.

    The features of a version's memory are computed for the first explanation, and kept until another version answers.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "evertune-explain")
        self._explainer: Explainer | None = None
        self._waiting = 0

    async def explain(self, answering: Answering, asked: Explain) -> Explanation:
        """Explain the answer of a version.

        Raises:
            OverloadedError: If too many explanations wait.
            TypeError: If the version does not classify texts, or has no gradients at words.
            ValueError: If the text or the label cannot be explained.
        """
        if self._waiting >= MOST_WAITING:
            raise OverloadedError(self._waiting * _SECONDS)
        self._waiting += 1
        done = asyncio.get_running_loop().run_in_executor(self._thread, partial(self._explain, answering, asked))
        done.add_done_callback(self._ended)  # also of one that nobody waits for any more
        return await asyncio.shield(done)

    def close(self) -> None:
        """End after the explanation under way."""
        self._thread.shutdown(cancel_futures=True)

    def _ended(self, done: asyncio.Future[Explanation]) -> None:
        self._waiting -= 1
        if not done.cancelled():
            done.exception()  # which was raised where it was awaited, or came too late

    def _explain(self, answering: Answering, asked: Explain) -> Explanation:
        if self._explainer is None or self._explainer.module is not answering.module:
            self._explainer = Explainer(answering.version, answering.module, lambda: answering.alone)
        return self._explainer.explain(asked.text, asked.label, asked.method, asked.neighbours)


def cost_of(asked: Explain) -> int:
    """The number of texts that are answered for an explanation, which count against the rate of its client.

    Example:
        >>> cost_of(Explain(text="a good day")), cost_of(Explain(text="a good day", method="integrated_gradients"))
        (4, 32)
    """
    return {"occlusion": 1 + len(parts_of(asked.text)), "integrated_gradients": 32, "attention_rollout": 2}[
        asked.method
    ]
