"""When requests are sent: as fast as `concurrency` allows, or at times drawn from a rate."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence

import numpy as np

from jaxserve.bench.datasets import Prompt
from jaxserve.bench.stats import RequestRecord

Send = Callable[[Prompt, float], Awaitable[RequestRecord]]
"""Sends a prompt that was due at a time."""


def send_times(count: int, rate: float, *, seed: int, burstiness: float = 1.0) -> tuple[float, ...]:
    """Seconds from the start at which `count` requests are due, ascending; the first is due at once.

    Gaps are gamma distributed with mean 1 / rate: burstiness 1 is a Poisson process, less comes in bursts,
    more is more regular (as in `vllm bench serve`). They are scaled so that the mean of this draw is exact.

    Raises:
        ValueError: rate or burstiness not positive.
    """
    if not rate > 0 or not burstiness > 0:
        raise ValueError(f"request rate and burstiness must be positive, got {rate} and {burstiness}")
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), size=max(count - 1, 0))
    times = np.concatenate([[0.0], np.cumsum(gaps)])[:count]
    if count > 1:
        times *= (count - 1) / (rate * times[-1])
    return tuple(times.tolist())


async def closed_loop(
    send: Send, prompts: Sequence[Prompt], *, concurrency: int, clock: Callable[[], float]
) -> list[RequestRecord]:
    """Keep `concurrency` requests under way until all prompts are answered. Records in the prompts' order."""
    records: list[RequestRecord | None] = [None] * len(prompts)
    waiting: Iterator[tuple[int, Prompt]] = iter(enumerate(prompts))

    async def client() -> None:
        for i, prompt in waiting:
            records[i] = await send(prompt, clock())

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(prompts))):
            group.create_task(client())
    return [record for record in records if record is not None]


async def open_loop(
    send: Send,
    prompts: Sequence[Prompt],
    *,
    times: Sequence[float],
    concurrency: int | None,
    clock: Callable[[], float],
) -> list[RequestRecord]:
    """Send each prompt when it is due, earlier ones answered or not. Records in the prompts' order.

    With a bound on concurrency a prompt may be sent later than it was due; its record starts when it was due,
    so that a slow server cannot hide the wait that it causes.
    """
    began = clock()
    places = asyncio.Semaphore(concurrency or len(prompts))

    async def client(prompt: Prompt, due: float) -> RequestRecord:
        await asyncio.sleep(max(0.0, due - clock()))
        async with places:
            return await send(prompt, due)

    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(client(prompt, began + at)) for prompt, at in zip(prompts, times, strict=True)
        ]
    return [task.result() for task in tasks]
