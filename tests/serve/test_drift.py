"""Answers that change are noticed without labels, once for each version."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest

from evertune.serve.drift import AnswerWatch
from evertune.serve.messages import Answer
from evertune.serve.metrics import ServeMetrics
from evertune.serve.settings import DriftSettings


def answers(n: int, sure: float, classes: str, version: int = 1, seed: int = 0) -> list[Answer]:
    draw = random.Random(seed)
    return [
        Answer(
            id=str(number),
            label=draw.choice(classes),
            confidence=min(1.0, draw.gauss(sure, 0.05)),
            probabilities={},
            version=version,
        )
        for number in range(n)
    ]


def watched(*parts: list[Answer]) -> str:
    metrics = ServeMetrics()
    watch = AnswerWatch(DriftSettings(arl=20_000, reference_size=512), metrics)
    for part in parts:
        watch.add(part)
    watch._thread.shutdown()  # waits for all of them
    return metrics.page("")[0].decode()


def reading(page: str, signal: str) -> float:
    (value,) = [
        line.split()[-1] for line in page.splitlines() if line.startswith(f'evertune_serve_drift{{signal="{signal}"}}')
    ]
    return float(value)


def test_steady_answers_raise_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    page = watched(*[answers(256, 0.8, "abc", seed=seed) for seed in range(8)])
    assert reading(page, "confidence") == reading(page, "classes") == 0
    assert not caplog.records


@pytest.mark.parametrize(("signal", "changed"), [("confidence", (0.6, "abc")), ("classes", (0.8, "a"))])
def test_a_change_is_noticed_once(signal: str, changed: Any, caplog: pytest.LogCaptureFixture) -> None:
    steady = [answers(512, 0.8, "abc", seed=seed) for seed in range(2)]
    with caplog.at_level(logging.WARNING):
        page = watched(*steady, *[answers(128, *changed, seed=seed) for seed in range(3)])
    other = "classes" if signal == "confidence" else "confidence"
    assert (reading(page, signal), reading(page, other)) == (1, 0)
    (record,) = caplog.records
    assert record.message.startswith(f"the {signal} of version 1 changed after ")


def test_another_version_starts_with_a_reference_of_its_own() -> None:
    page = watched(
        *[answers(512, 0.8, "abc", seed=seed) for seed in range(2)],
        answers(128, 0.5, "a", seed=3),
        *[answers(512, 0.5, "a", version=2, seed=seed) for seed in range(2)],
    )
    assert reading(page, "confidence") == reading(page, "classes") == 0


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="arl must be positive, got 0"):
        DriftSettings(arl=0)
    with pytest.raises(ValueError, match="reference"):
        AnswerWatch(DriftSettings(arl=1_000, reference_size=10), ServeMetrics())
