"""Requests put together: sizes, order, back-pressure, failures, cancellations."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from evertune.serve.batching import Batcher, OverloadedError, Predicted, by_length
from evertune.serve.settings import BatchSettings


class Model:
    """Answers each text with itself; ``gate`` holds back whoever says ``wait``."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.gate = threading.Event()

    def __call__(self, texts: list[str]) -> Predicted:
        self.batches.append(texts)
        if "wait" in texts:
            assert self.gate.wait(30)
        if "boom" in texts:
            raise RuntimeError("boom")
        return Predicted(len(self.batches), False, [{text: 1.0} for text in texts])


def with_batcher(test: Callable[[Batcher, Model], Awaitable[None]], **settings: Any) -> None:
    async def run() -> None:
        model = Model()
        batcher = Batcher(model, BatchSettings(**settings))
        batcher.start()
        try:
            await asyncio.wait_for(test(batcher, model), 30)
        finally:
            model.gate.set()
            await batcher.close()

    asyncio.run(run())


async def blocked(batcher: Batcher, model: Model) -> asyncio.Task[Predicted]:
    """Let the model be busy until its gate opens."""
    first = asyncio.create_task(batcher.submit(["wait"]))
    while not model.batches:
        await asyncio.sleep(0.001)
    return first


def test_what_arrives_while_the_model_is_busy_is_answered_together_and_in_order() -> None:
    async def test(batcher: Batcher, model: Model) -> None:
        first = await blocked(batcher, model)
        others = [asyncio.create_task(batcher.submit([f"{n}a", f"{n}b"])) for n in range(20)]
        await asyncio.sleep(0.01)
        assert batcher.queued == 40 and batcher.busy > 0
        model.gate.set()
        assert (await first).answers == [{"wait": 1.0}]
        for n, predicted in enumerate(await asyncio.gather(*others)):
            assert predicted.answers == [{f"{n}a": 1.0}, {f"{n}b": 1.0}]
        assert [len(batch) for batch in model.batches] == [1, 16, 16, 8]
        assert batcher.queued == 0 and batcher.busy == 0

    with_batcher(test, max_batch=17)  # a request of two is never split


def test_a_request_larger_than_a_batch_is_answered_whole() -> None:
    async def test(batcher: Batcher, model: Model) -> None:
        texts = [str(n) for n in range(50)]
        predicted = await batcher.submit(texts)
        assert predicted.answers == [{text: 1.0} for text in texts]
        assert [len(batch) for batch in model.batches] == [50]

    with_batcher(test, max_batch=8, max_queue=8)


def test_clients_in_step_stay_together() -> None:
    async def client(batcher: Batcher) -> None:
        for _ in range(10):
            await batcher.submit(["text"])

    async def test(batcher: Batcher, model: Model) -> None:
        await asyncio.gather(*(client(batcher) for _ in range(16)))
        assert len(model.batches) <= 14  # 10 full ones would do; at the beginning the clients are not yet in step

    with_batcher(test, max_delay=0.5)


def test_beyond_the_queue_requests_are_refused_until_there_is_room() -> None:
    async def test(batcher: Batcher, model: Model) -> None:
        first = await blocked(batcher, model)
        second = asyncio.create_task(batcher.submit(["a", "b"]))
        await asyncio.sleep(0.01)
        with pytest.raises(OverloadedError, match="too many requests are waiting") as caught:
            await batcher.submit(["c", "d"])
        assert caught.value.retry_after >= 1
        model.gate.set()
        await asyncio.gather(first, second)
        assert (await batcher.submit(["c", "d"])).answers == [{"c": 1.0}, {"d": 1.0}]

    with_batcher(test, max_queue=3)


def test_a_bad_request_costs_nobody_else_an_answer() -> None:
    async def test(batcher: Batcher, model: Model) -> None:
        first = await blocked(batcher, model)
        others = [asyncio.create_task(batcher.submit([text])) for text in ("a", "boom", "b")]
        await asyncio.sleep(0.01)
        model.gate.set()
        await first
        good, bad, also_good = await asyncio.gather(*others, return_exceptions=True)
        assert good.answers == [{"a": 1.0}] and also_good.answers == [{"b": 1.0}]
        assert isinstance(bad, RuntimeError)

    with_batcher(test)


def test_who_has_gone_is_not_computed() -> None:
    async def test(batcher: Batcher, model: Model) -> None:
        first = await blocked(batcher, model)
        gone = asyncio.create_task(batcher.submit(["gone"]))
        await asyncio.sleep(0.01)
        gone.cancel()
        model.gate.set()
        await first
        await batcher.submit(["here"])
        assert model.batches == [["wait"], ["here"]]

    with_batcher(test)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_batch": 0}, "max_batch must be positive, got 0"),
        ({"max_queue": -1}, "max_queue must be positive, got -1"),
        ({"max_delay": 2.0}, "max_delay must be between 0 and 1 second, got 2.0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchSettings(**settings)


@pytest.mark.parametrize("start", [0, 160, 16_000])
def test_no_group_is_padded_by_more_than_a_forward_pass_costs(start: int) -> None:
    draw = random.Random(0)
    lengths = [draw.choice([20, 40, 90, 300, 2_000]) + draw.randrange(50) for _ in range(100)]
    groups = by_length(lengths, 32, start)
    assert sorted(place for group in groups for place in group) == list(range(100))
    for group in groups:
        longest = lengths[group[-1]]
        assert sum(longest - lengths[place] for place in group) <= start
        assert 1 <= len(group) <= 32
    for group, after in itertools.pairwise(groups):  # and no two could have been one
        both = [*group, after[0]]
        assert len(group) == 32 or sum(lengths[after[0]] - lengths[place] for place in both) > start
