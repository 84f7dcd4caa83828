"""Ten times what the server can do, for two minutes, and then calm."""

import asyncio
import os
import random
import statistics
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import httpx
import msgspec
import pytest

from tests.e2e.connectors.fleet import Series, ask, at_rest, scrape, text_of, until
from tests.e2e.crowd import Crowd, Reply, Usage, memory_bytes, quantile
from tests.e2e.servers import Server, start_server, stop_server

# The load that one machine bears is known only by measuring it, so all of this is one test.
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

SEQS, QUEUED = 8, 16
CLIENTS = 16
"""At the peak: all rows run, more wait, and nobody is refused."""
WORDS, NUM_TOKENS = 24, 24
WARM_S, PEAK_S, OVERLOAD_S, WINDOW_S = 8.0, 40.0, 120.0, 5.0
TIMES = 10
GOODPUT, REFUSAL_S = 0.9, 0.1
ATTEMPTS = 2
"""0.9 is to be reached in one of these: any one can fall into somebody else's work."""
BUSY, GOODPUT_BUSY = 0.1, 0.6
"""Where others took more than such a share of the machine in every attempt, caches were theirs as well,
and CPU seconds no longer tell what was left to us: the same load measured twice differs by a fifth. There
only a collapse counts."""
GROWTH_BYTES = 32 << 20
"""Of the server's memory in the second half of the overload, with some 2,500 requests: a hundredth of what it
holds. In the first half its allocators grow to what so many connections at once need."""
VOCABULARY = ("sea", "wide", "old", "men", "go", "down", "ships", "with", "nets", "rope", "fish", "gold")
CALM_FACTOR, CALM_S = 3.0, 2.0
"""Of a request before the load, and more than that where the machine is busy: calm is no queue's wait."""


@pytest.fixture
def small(free_port: Callable[[], int], tmp_path: Path) -> Iterator[Server]:
    """A server with few rows and a short queue, all shapes compiled."""
    server = start_server(
        free_port(),
        tmp_path / "output.txt",
        *("--max-num-seqs", str(SEQS), "--max-num-queued-reqs", str(QUEUED), "--dtype", "float32"),
        *("--max-num-batched-tokens", "128", "--max-model-len", "256", "--num-gpu-blocks-override", "257"),
        "--disable-log-stats",
    )
    yield server
    assert stop_server(server) == 0


def body(number: int) -> bytes:
    """A request that shares no page with another's."""
    words = " ".join(random.Random(number).choices(VOCABULARY, k=WORDS))
    fields = {"model": "smollm2", "temperature": 0, "ignore_eos": True, "max_tokens": NUM_TOKENS}
    return msgspec.json.encode({**fields, "prompt": f"{10**7 + number} {words}"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """How far the server was at one moment.

    Attributes:
        tokens: generated in its life.
        memory_bytes: that it holds.
    """

    tokens: float
    usage: Usage
    memory_bytes: int

    @classmethod
    def now(cls, server: Server) -> "Mark":
        """At this moment."""
        tokens = scrape(server.url)["vllm:generation_tokens_total"]
        pid = server.process.pid
        return cls(tokens=tokens, usage=Usage.now(pid), memory_bytes=memory_bytes(pid))

    def goodput_since(self, before: "Mark") -> float:
        """Generated tokens per CPU second that the machine had for the server.

        On a machine of our own that is tokens per second over the number of cores. Where others work beside
        us, it compares what was made of what was left, which seconds would not. Clients are others here: what
        it costs to ask is not the server's doing.
        """
        return (self.tokens - before.tokens) / self.usage.spare_since(before.usage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What was answered in a while, and marks in it, WINDOW_S apart, while all rows were taken."""

    replies: list[Reply]
    marks: list[Mark]

    @property
    def windows(self) -> list[float]:
        """Goodput between one mark and the next."""
        return [mark.goodput_since(before) for before, mark in pairwise(self.marks)]

    @property
    def goodput(self) -> float:
        """Of the middle one of all windows: a burst of somebody else's work spoils some of them."""
        return statistics.median(self.windows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One measurement: the peak, the overload, and the peak again."""

    first: Phase
    overload: Phase
    last: Phase

    @property
    def ratio(self) -> float:
        """Of the goodput in the overload to that of both peaks; or that of the second peak to the first's,
        where it is less: an overload leaves nothing behind."""
        peak = (self.first.goodput + self.last.goodput) / 2
        return min(self.overload.goodput / peak, self.last.goodput / self.first.goodput)

    @property
    def others(self) -> float:
        """The share of the machine that neither the server nor its clients had."""
        return self.last.marks[-1].usage.others_since(self.first.marks[0].usage)

    @property
    def shown(self) -> str:
        """The figures."""
        phases = (self.first, self.overload, self.last)
        goodputs = ", ".join(
            f"{phase.goodput:.1f} ({min(phase.windows):.1f} to {max(phase.windows):.1f})" for phase in phases
        )
        return (
            f"{self.ratio:.2f} of the peak; goodput before, in and after the overload {goodputs} tokens per "
            f"CPU second, {self.others:.0%} of the machine taken by others; memory "
            f"{[mark.memory_bytes >> 20 for mark in self.overload.marks]} MiB"
        )


async def marked(server: Server, load: Coroutine[None, None, list[Reply]]) -> Phase:
    """A load, with marks while all of it is there: not as it comes, and not as it goes."""
    marks: list[Mark] = []
    task = asyncio.create_task(load)
    while not (await asyncio.wait({task}, timeout=WINDOW_S))[0]:
        marks.append(await asyncio.to_thread(Mark.now, server))
    return Phase(replies=task.result(), marks=marks[:-1])


async def measure(crowd: Crowd, server: Server) -> Attempt:
    """All three phases."""
    await crowd.closed_loop(CLIENTS, WARM_S)
    first = await marked(server, crowd.closed_loop(CLIENTS, PEAK_S))
    seconds = max(reply.ended_s for reply in first.replies) - min(reply.began_s for reply in first.replies)
    rate = TIMES * len(first.replies) / seconds
    overload = await marked(server, crowd.open_loop(rate, OVERLOAD_S, seed=1))
    last = await marked(server, crowd.closed_loop(CLIENTS, PEAK_S))
    for peak in (first, last):
        assert {reply.status for reply in peak.replies} == {200}
    crowd.close()
    return Attempt(first=first, overload=overload, last=last)


def num_open_files(pid: int) -> int:
    """Connections among them."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_ten_times_the_load_costs_little_and_leaves_nothing(small: Server) -> None:
    pid = small.process.pid
    expected, alone_s = canary(small.url)
    files_before = num_open_files(pid)
    attempts: list[Attempt] = []
    while len(attempts) < ATTEMPTS and not any(attempt.ratio >= GOODPUT for attempt in attempts):
        before = at_rest(small.url)
        crowd = Crowd("127.0.0.1", int(small.url.rpartition(":")[2]), body)
        attempts.append(asyncio.run(measure(crowd, small)))
        print(f"attempt {len(attempts)}: {attempts[-1].shown}")
        assert_answered(crowd, attempts[-1].overload)
        assert_counters_agree(at_rest(small.url) - before, crowd.replies)

    quiet = [attempt for attempt in attempts if attempt.others <= BUSY]
    best = max(attempt.ratio for attempt in quiet or attempts)
    assert best >= (GOODPUT if quiet else GOODPUT_BUSY), [attempt.shown for attempt in attempts]
    assert httpx.get(f"{small.url}/load").json() == {"server_load": 0}
    until(lambda: num_open_files(pid) <= files_before + 2, "connections are closed on both sides")
    text, calm_s = canary(small.url)
    assert text == expected
    assert calm_s < CALM_FACTOR * alone_s + CALM_S


def assert_answered(crowd: Crowd, overload: Phase) -> None:
    """Everything is: served whole, or refused at once; and the server holds no more than before."""
    replies = overload.replies
    served = [reply for reply in replies if reply.status == 200]
    refused = [reply for reply in replies if reply.status == 429]
    waits = [reply.seconds for reply in refused]
    shown = (
        f"{len(served)} served, {len(refused)} refused in {quantile(waits, 0.5) * 1e3:.1f} (median) and "
        f"{quantile(waits, 0.95) * 1e3:.1f} ms (95%), clients late by {quantile(crowd.lags, 0.5) * 1e3:.1f} "
        f"and {quantile(crowd.lags, 0.95) * 1e3:.1f} ms"
    )
    print(shown)
    assert len(served) + len(refused) == len(replies) == len(crowd.lags)
    assert len(refused) > len(served), "it was an overload"
    assert all(reply.num_tokens == NUM_TOKENS for reply in served)
    assert all(int(reply.retry_after) >= 1 for reply in refused)
    # A client that the machine lets wait sees its answers as late as that; its timers say how late.
    for q in (0.5, 0.95):
        assert quantile(waits, q) < REFUSAL_S + quantile(crowd.lags, q), shown
    memory = [mark.memory_bytes for mark in overload.marks]
    half = len(memory) // 2
    assert max(memory[half:]) - max(memory[:half]) < GROWTH_BYTES, [size >> 20 for size in memory]


def canary(url: str) -> tuple[str, float]:
    """One request on a server at rest: what it says, and how long that takes."""
    began = time.monotonic()
    text = text_of(ask(url, "Once upon a time there was", max_tokens=NUM_TOKENS))
    return text, time.monotonic() - began


def assert_counters_agree(change: Series, replies: list[Reply]) -> None:
    """Submitted is served and refused."""
    served = sum(reply.status == 200 for reply in replies)
    assert change['vllm:request_success_total{finished_reason="length"}'] == served
    assert change["vllm:request_success_total"] == served
    assert change["vllm:admission_rejections_total"] == len(replies) - served
    assert change["vllm:generation_tokens_total"] == served * NUM_TOKENS
