"""When requests are sent; on a clock that the tests own where it can be done."""

import asyncio
import time

import numpy as np
import pytest

from jaxserve.bench.datasets import Prompt
from jaxserve.bench.load import closed_loop, open_loop, send_times
from jaxserve.bench.stats import RequestRecord

PROMPTS = [Prompt(text=str(i)) for i in range(12)]


class Server:
    """Answers after a while, and notes how many requests were under way at once."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.running = self.most = 0
        self.sent: list[float] = []

    async def send(self, prompt: Prompt, due: float) -> RequestRecord:
        self.sent.append(time.perf_counter())
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self.seconds)
        self.running -= 1
        return RequestRecord(start=due, end=time.perf_counter(), output_tokens=int(prompt.text or 0))


def test_a_poisson_process_has_its_rate() -> None:
    times = np.array(send_times(1001, 50.0, seed=0))
    gaps = np.diff(times)
    assert times[0] == 0 and (gaps >= 0).all()
    assert times[-1] == pytest.approx(1000 / 50)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)
    assert np.diff(send_times(1001, 50.0, seed=0, burstiness=100)).std() < 0.15 * gaps.std()


def test_times_of_few_requests() -> None:
    assert send_times(0, 1.0, seed=0) == ()
    assert send_times(1, 1.0, seed=0) == (0.0,)
    assert send_times(2, 4.0, seed=0) == pytest.approx((0.0, 0.25))
    with pytest.raises(ValueError, match="positive"):
        send_times(2, 0.0, seed=0)


@pytest.mark.parametrize("concurrency", [1, 5, 100])
def test_a_closed_loop_keeps_its_concurrency(concurrency: int) -> None:
    server = Server(0.002)
    records = asyncio.run(closed_loop(server.send, PROMPTS, concurrency=concurrency, clock=time.perf_counter))
    assert [record.output_tokens for record in records] == list(range(12))
    assert server.most == min(concurrency, 12)


def test_an_open_loop_does_not_wait_for_answers() -> None:
    server = Server(0.2)
    times = tuple(i * 0.001 for i in range(12))
    records = asyncio.run(
        open_loop(server.send, PROMPTS, times=times, concurrency=None, clock=time.perf_counter)
    )
    assert [record.output_tokens for record in records] == list(range(12))
    assert server.most == 12
    assert [record.start - records[0].start for record in records] == pytest.approx(times)


def test_a_wait_in_the_client_counts() -> None:
    server = Server(0.02)
    records = asyncio.run(
        open_loop(server.send, PROMPTS[:4], times=(0.0,) * 4, concurrency=1, clock=time.perf_counter)
    )
    assert server.most == 1
    assert max(record.e2el for record in records) >= 4 * 0.02
