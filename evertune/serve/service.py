"""What the server does, without HTTP: answers records with the version in production, and counts what it does."""

from __future__ import annotations

import asyncio
from typing import Any

from evertune.registry.registry import Registry
from evertune.registry.serving import Predictor
from evertune.serve.batching import Predicted
from evertune.serve.deployment import Deployment
from evertune.serve.messages import Answer, Many, One, answer
from evertune.serve.metrics import ServeMetrics
from evertune.serve.settings import BatchSettings, LimitSettings

STUCK = 10
"""Timeouts of a request after which a batch that has not ended means that the process must be restarted."""


class Service:
    """Answers requests with the version behind an alias of a registry, and follows the alias.

    Args:
        registry: A registry, or its folder or URL.
        alias: ``production``, another alias, or the number of a version.
        batching: How requests are put together.
        limits: What a single request may cost.
        poll: Seconds between two looks at the alias. Default: 5.
        wait: Wait for the first version if there is none yet, rather than failing. Default: False.
        module_class: Class of a module that is not a built-in one.
        device: Device of the module; None (default) for the GPU if there is one.

    Raises:
        ValueError: If a setting is out of range.
        ModuleNotFoundError: If the extra ``serve`` is not installed.
    """

    def __init__(
        self,
        registry: Registry | str,
        alias: str | int = "production",
        *,
        batching: BatchSettings | None = None,
        limits: LimitSettings | None = None,
        poll: float = 5.0,
        wait: bool = False,
        module_class: type[Predictor] | None = None,
        device: str | None = None,
    ) -> None:
        if poll <= 0:
            raise ValueError(f"poll must be a positive number of seconds, got {poll}")
        registry = registry if isinstance(registry, Registry) else Registry(registry)
        self.limits = limits or LimitSettings()
        self.metrics = ServeMetrics()
        self.draining = False
        """Whether the server is about to end: it still answers, but is not ready for more."""
        self.production = Deployment(
            "production",
            registry,
            alias,
            batching or BatchSettings(),
            self.metrics,
            poll=poll,
            wait=wait,
            module_class=module_class,
            device=device,
        )

    async def start(self) -> None:
        """Load the version and begin to answer.

        Raises:
            RegistryError: If there is no version, and it does not wait for one; or the version is damaged.
            TypeError: If the module does not classify.
        """
        await self.production.start()

    async def close(self) -> None:
        """Stop answering."""
        self.draining = True
        await self.production.close()

    async def predict(self, request: One | Many) -> list[Answer]:
        """The answers to a request, all of one version.

        Raises:
            OverloadedError: If too many records wait.
            NotReadyError: If no version is loaded yet.
            TimeoutError: If there is no answer within ``limits.timeout``.
            ValueError: If the model cannot read a text.
        """
        records = [request] if isinstance(request, One) else request.records
        async with asyncio.timeout(self.limits.timeout):
            predicted: Predicted = await self.production.predict([record.input for record in records])
        answers = [
            answer(record, probabilities, predicted.several, predicted.version, request.top)
            for record, probabilities in zip(records, predicted.answers, strict=True)
        ]
        self.metrics.answered("production", answers)
        return answers

    @property
    def status(self) -> dict[str, Any]:
        """Which version answers in which role, and what is wrong with it, as JSON."""
        return {
            deployment.role: {
                "alias": str(deployment.alias),
                "version": None if deployment.version is None else deployment.version.number,
                "problem": deployment.problem,
            }
            for deployment in self.deployments
        }

    @property
    def deployments(self) -> list[Deployment]:
        """The versions that are served, production first."""
        return [self.production]

    @property
    def is_ready(self) -> bool:
        """Whether requests can be answered, and more are welcome."""
        return not self.draining and self.production.version is not None

    @property
    def why_unhealthy(self) -> str | None:
        """Why the process must be restarted; None if it need not be."""
        stuck = self.production.batcher.busy
        if stuck > STUCK * self.limits.timeout:
            return f"a batch has not ended for {stuck:.0f} s"
        return None
