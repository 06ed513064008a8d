"""What the server does, without HTTP: answers records with the version in production, and counts what it does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from evertune.explain.explanation import Explanation
from evertune.registry.registry import Registry
from evertune.registry.serving import Precision, Predictor
from evertune.serve.batching import OverloadedError
from evertune.serve.deployment import Deployment, NotReadyError
from evertune.serve.drift import AnswerWatch
from evertune.serve.explaining import Explanations
from evertune.serve.log import RequestLog, share_of
from evertune.serve.messages import Answer, Explain, Feedback, Many, One, Record, TaskAnswer, answer
from evertune.serve.metrics import ServeMetrics
from evertune.serve.settings import BatchSettings, DriftSettings, LimitSettings, OnnxSettings, TrafficSettings

STUCK = 10
"""Timeouts of a request after which a batch that has not ended means that the process must be restarted."""

logger = logging.getLogger("evertune.serve")


class Service:
    """Answers requests with the version behind an alias of a registry, and follows the alias; or with an export.

    Args:
        registry: A registry, or its folder or URL. None (default) if an export answers.
        alias: ``production``, another alias, or the number of a version.
        batching: How requests are put together.
        limits: What a single request may cost.
        traffic: Versions that are served beside it: a canary, a shadow.
        log: Where requests, answers and labels are logged. Default: nowhere.
        drift: Whether answers are watched for a change. Default: they are not.
        model: Folder of an export (:func:`evertune.export.export`), which answers instead of a version. Default: None.
        poll: Seconds between two looks at the alias. Default: 5.
        wait: Wait for the first version if there is none yet, rather than failing. Default: False.
        module_class: Class of a module that is not a built-in one.
        device: Device of the module; None (default) for the GPU if there is one.
        precision: ``32`` (default) or ``bf16``, see :func:`evertune.load`.
        onnx: Whether versions answer as exports to ONNX. Default: they answer as they are.

    Raises:
        ValueError: If a setting is out of range, or not one of ``registry`` and ``model`` is given, or a setting of
            versions together with ``model``, or one of torch together with ``onnx``.
        ModuleNotFoundError: If the extra ``serve`` is not installed.
    """

    def __init__(
        self,
        registry: Registry | str | None = None,
        alias: str | int = "production",
        *,
        model: str | Path | None = None,
        batching: BatchSettings | None = None,
        limits: LimitSettings | None = None,
        traffic: TrafficSettings | None = None,
        log: RequestLog | None = None,
        drift: DriftSettings | None = None,
        poll: float = 5.0,
        wait: bool = False,
        module_class: type[Predictor] | None = None,
        device: str | None = None,
        precision: Precision = "32",
        onnx: OnnxSettings | None = None,
    ) -> None:
        if poll <= 0:
            raise ValueError(f"poll must be a positive number of seconds, got {poll}")
        traffic = traffic or TrafficSettings()
        as_onnx = onnx is not None and onnx.precision is not None
        of_torch = {"precision": precision != "32", "device": device not in (None, "cpu"), "module_class": module_class}
        if as_onnx and (wrong := next((name for name, value in of_torch.items() if value), None)):
            raise ValueError(f"{wrong} is a setting of torch, and ONNX Runtime answers (onnx.precision): leave one out")
        place: Registry | Path
        if model is not None:
            of_versions: dict[str, Any] = {
                "registry": registry,
                "canary": traffic.canary,
                "shadow": traffic.shadow,
                "wait": wait,
            }
            of_versions |= of_torch | {"onnx.precision": as_onnx}
            if wrong := next((name for name, value in of_versions.items() if value), None):
                raise ValueError(f"{wrong} is a setting of versions, and an export answers (model={str(model)!r})")
            place, alias = Path(model), Path(model).name
        elif registry is None:
            raise ValueError("there is nothing to serve: give registry, or model for an export")
        else:
            place = registry if isinstance(registry, Registry) else Registry(registry)
        self.limits, self.log = limits or LimitSettings(), log
        self.metrics = ServeMetrics()
        self._drift = None if drift is None or drift.arl is None else AnswerWatch(drift, self.metrics)
        self.draining = False
        """Whether the server is about to end: it still answers, but is not ready for more."""
        self._traffic = traffic
        deployed = partial(
            Deployment,
            registry=place,
            batching=batching or BatchSettings(),
            metrics=self.metrics,
            poll=poll,
            module_class=module_class,
            device=device,
            precision=precision,
            onnx=onnx,
        )
        self.production = deployed("production", alias=alias, wait=wait)
        canary, shadow = self._traffic.canary, self._traffic.shadow
        # Beside production, a version may be missing: `refused` is, as long as none was.
        self._canary = None if canary is None else deployed("canary", alias=canary, wait=True)
        self._shadow = None if shadow is None else deployed("shadow", alias=shadow, wait=True)
        self._explanations = Explanations()
        self._comparisons: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Load the versions and begin to answer.

        Raises:
            RegistryError: If there is no version, and it does not wait for one; or the version is damaged.
            TypeError: If the module cannot answer, or does not classify and drift is to be watched.
        """
        for deployment in self.deployments:
            await deployment.start()
        if self._drift is not None and not self.production.classifies:
            raise TypeError(
                f"drift watches the classes and the confidence of answers, and {type(self.production.module).__name__} "
                "does not classify: leave drift.arl out, and watch the log of requests with `evertune drift`"
            )
        if self.log is not None:
            self.log.start(self.metrics)

    async def close(self) -> None:
        """Stop answering, and write what is still to be logged."""
        self.draining = True
        for task in self._comparisons:
            task.cancel()
        await asyncio.to_thread(self._explanations.close)
        for deployment in self.deployments:
            await deployment.close()
        if self._drift is not None:
            await asyncio.to_thread(self._drift.close)
        if self.log is not None:
            await asyncio.to_thread(self.log.close)

    async def predict(self, request: One | Many) -> Sequence[Answer | TaskAnswer]:
        """The answers to a request, all of one version.

        Raises:
            OverloadedError: If too many records wait.
            NotReadyError: If no version is loaded yet.
            TimeoutError: If there is no answer within ``limits.timeout``.
            ValueError: If the model cannot read a text.
        """
        records: Sequence[Record] = [request] if isinstance(request, One) else request.records
        async with asyncio.timeout(self.limits.timeout):
            role, answers = await self._answers(records, request.top)
        self.metrics.answered(role, answers)
        if self._drift is not None and role == "production":
            self._drift.add([one for one in answers if isinstance(one, Answer)])
        if self.log is not None:
            self.log.requests(records, answers, role)
        if self._shadow is not None and share_of(records[0].id, "shadow") < self._traffic.shadow_share:
            task = asyncio.create_task(self._compare(self._shadow, records, answers))
            self._comparisons.add(task)
            task.add_done_callback(self._comparisons.discard)
        return answers

    async def explain(self, asked: Explain) -> Explanation:
        """Why the version in production answers a text as it does.

        Raises:
            OverloadedError: If too many explanations wait.
            NotReadyError: If no version is loaded yet.
            TimeoutError: If there is no explanation within ``limits.timeout``.
            TypeError: If an export answers, or a version that does not classify texts.
            ValueError: If the text or the label cannot be explained.
        """
        answering = self.production.answering
        if answering is None:
            raise TypeError("an export answers, and only versions of a registry can be explained")
        async with asyncio.timeout(self.limits.timeout):
            return await self._explanations.explain(answering, asked)

    def feedback(self, labels: Sequence[Feedback]) -> int:
        """Log labels that came later; returns how many are in the share that is logged.

        Raises:
            ValueError: If one is not a label of the task, such as a list where a text has one label.
        """
        assert self.log is not None, "labels are logged, or not taken"
        check = getattr(getattr(self.production.module, "task", None), "check_label", None)
        if check is not None:
            for number, one in enumerate(labels):
                try:
                    check(one.label)
                except ValueError as error:
                    raise ValueError(f"label {number} does not fit: {error}") from None
        return self.log.feedback(labels)

    async def _answers(self, records: Sequence[Record], top: int) -> tuple[str, Sequence[Answer | TaskAnswer]]:
        """The answers, and the role of the version that gave them. Whoever the canary fails gets production's."""
        if self._canary is not None and share_of(records[0].id, "canary") < self._traffic.canary_share:
            try:
                return "canary", await _answers_of(self._canary, records, top)
            except Exception as error:
                self.metrics.canary_failed(type(error).__name__)
        return "production", await _answers_of(self.production, records, top)

    async def _compare(
        self, shadow: Deployment, records: Sequence[Record], given: Sequence[Answer | TaskAnswer]
    ) -> None:
        """Let the shadow answer too, and count how often it agrees."""
        try:
            answers = await _answers_of(shadow, records, 1)
        except (OverloadedError, NotReadyError):
            self.metrics.compared("dropped", len(records))
            return
        except Exception as error:
            self.metrics.compared("failed", len(records))
            logger.warning("the shadow failed: %s", type(error).__name__, extra={"event": "shadow"})
            return
        self.metrics.answered("shadow", answers)
        for one, other in zip(answers, given, strict=True):
            self.metrics.compared("agrees" if _said(one) == _said(other) else "differs")
        if self.log is not None:
            self.log.requests(records, answers, "shadow")

    @property
    def status(self) -> dict[str, Any]:
        """Which version answers in which role, and what is wrong with it, as JSON."""
        return {
            deployment.role: {
                "alias": str(deployment.alias),
                "version": deployment.version,
                "problem": deployment.problem,
            }
            for deployment in self.deployments
        }

    @property
    def deployments(self) -> list[Deployment]:
        """The versions that are served, production first."""
        return [one for one in (self.production, self._canary, self._shadow) if one is not None]

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


async def _answers_of(deployment: Deployment, records: Sequence[Record], top: int) -> Sequence[Answer | TaskAnswer]:
    predicted = await deployment.predict([record.input for record in records])
    pairs = zip(records, predicted.answers, strict=True)
    if predicted.several is None:
        return [
            TaskAnswer.model_construct(id=record.id, prediction=one, version=predicted.version) for record, one in pairs
        ]
    return [answer(record, one, predicted.several, predicted.version, top) for record, one in pairs]


def _said(answer: Answer | TaskAnswer) -> Any:
    """What two versions are compared by."""
    return answer.label if isinstance(answer, Answer) else answer.prediction
