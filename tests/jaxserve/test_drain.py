"""An engine that ends: what it took in is served, what it promised is kept, and all of it in bounded time."""

import asyncio
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve import Engine
from jaxserve.drain import GRAIN_S, LEASE_LOOK_S, TELL_S, AbortAll, Await, Close, Drain
from jaxserve.loop import EngineLoop
from jaxserve.outputs import Delta, EngineError
from jaxserve.sim.device import SimDevice, StepFate
from jaxserve.sim.expect import SimTokenizer
from jaxserve.sim.hash_model import HashModel
from scheduler.types import FinishReason, Limits, Request, SamplingParams, SchedulerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Attributes: at: when it was closed; aborted: when requests were; live, leases: what was left."""

    at: float
    aborted: float | None
    live: int
    leases: int


def run(until: float, requests: list[float], leases: list[float], *, tells: float | None) -> Ended:
    """An engine whose requests end and whose leases are read at these moments, unless it aborts them first:
    then they end `tells` seconds later, or never."""
    drain, now, aborted = Drain(until=until), 0.0, None
    for _ in range(10_000):
        ends = [
            end if aborted is None or end < aborted else float("inf") if tells is None else aborted + tells
            for end in requests
        ]
        live, left = sum(end > now for end in ends), sum(end > now for end in leases)
        match drain.look(now, live=live, leases=left):
            case Await(seconds=seconds, requests=True):
                assert live and seconds >= GRAIN_S
                now = min(now + seconds, max(ends))
            case Await(seconds=seconds):
                assert left and not live and GRAIN_S <= seconds <= LEASE_LOOK_S
                now += seconds
            case AbortAll():
                assert live and aborted is None
                aborted = now
            case Close():
                assert now <= max(drain.ends_by, until) + 2 * GRAIN_S
                return Ended(at=now, aborted=aborted, live=live, leases=left)
    raise AssertionError("it never ends")


moments = st.lists(st.floats(0.0, 20.0), max_size=5)


@given(st.floats(0.0, 10.0), moments, moments, st.none() | st.floats(0.0, 10.0))
def test_it_serves_and_keeps_what_fits_into_its_time_and_then_ends(until, requests, leases, tells):
    ended = run(until, requests, leases, tells=tells)
    served = all(end <= until for end in requests)
    if served:
        assert ended.aborted is None and not ended.live
        last = max((*requests, *leases), default=0.0)
        assert ended.at >= min(max(requests, default=0.0), until)
        if last <= until:
            assert not ended.leases and ended.at <= last + LEASE_LOOK_S + 2 * GRAIN_S
        else:
            assert ended.leases and until <= ended.at <= until + 2 * GRAIN_S
    else:
        assert ended.aborted is None or until <= ended.aborted <= until + GRAIN_S
        if ended.aborted is not None:
            told = TELL_S if tells is None else min(tells, TELL_S)
            assert ended.at <= ended.aborted + told + 2 * GRAIN_S


def test_an_engine_with_nothing_to_do_closes_at_once():
    assert Drain(until=5.0).look(0.0, live=0, leases=0) == Close()
    assert Drain(until=5.0).look(9.0, live=0, leases=3) == Close(), "a lease is kept no longer than its time"


def test_leases_are_not_waited_for_once_requests_had_to_be_aborted():
    drain = Drain(until=5.0)
    assert drain.look(5.0, live=1, leases=1) == AbortAll()
    assert drain.look(5.0, live=1, leases=1) == Await(seconds=TELL_S, requests=True)
    assert drain.look(5.1, live=0, leases=1) == Close()


def test_what_cannot_even_be_told_ends_too():
    drain = Drain(until=5.0)
    assert drain.look(7.0, live=1, leases=0) == AbortAll()
    assert drain.ends_by == 7.0 + TELL_S
    assert drain.look(drain.ends_by, live=1, leases=0) == Close()


class Gated(SimDevice):
    """A device whose steps end when they may."""

    def __init__(self, may_end: Callable[[], bool]) -> None:
        super().__init__(model=HashModel(), num_pages=40, page_size=4, fill=bytes, fate=StepFate)
        self._may_end = may_end

    def wait(self, pending):
        while not self._may_end():
            time.sleep(0.001)
        return super().wait(pending)


@pytest.fixture
def draining() -> Generator[Callable[[Callable[[EngineLoop], bool]], tuple[Engine, list[Delta]]]]:
    """Starts an engine's loop over a simulated device, and a request in it."""
    loops: list[EngineLoop] = []

    def start(may_end: Callable[[EngineLoop], bool]) -> tuple[Engine, list[Delta]]:
        config = SchedulerConfig(page_size=4, num_pages=40, max_num_seqs=4, max_model_len=48)
        limits = Limits(max_num_batched_tokens=16, max_num_seqs=4)
        device = Gated(lambda: may_end(loops[0]))
        loops.append(EngineLoop(config, limits, device, SimTokenizer(), max_num_queued_reqs=4))
        engine, deltas = Engine.__new__(Engine), list[Delta]()
        engine._loop = loops[0]
        engine._loop.submit(request(), deltas.append)
        return engine, deltas

    yield start
    loops[0].close()


def request() -> Request:
    sampling = SamplingParams(max_tokens=30, temperature=0.0, seed=1, ignore_eos=True)
    return Request(request_id="one", prompt_token_ids=(1, 2, 3), sampling=sampling)


def test_an_engine_finishes_what_it_took_in_and_takes_nothing_more(draining):
    shut = threading.Event()
    engine, deltas = draining(lambda loop: shut.is_set())

    async def drain() -> None:
        ending = asyncio.create_task(engine.drain(120.0))
        while True:
            try:
                engine._loop.submit(request(), deltas.append)
            except EngineError as refusal:
                if "not running" in str(refusal):
                    break
            await asyncio.sleep(0)
        shut.set()
        await ending

    asyncio.run(drain())
    assert deltas[-1].finish_reason is FinishReason.LENGTH
    assert sum(len(delta.token_ids) for delta in deltas) == 30


def test_an_engine_whose_time_is_over_aborts_and_tells(draining):
    """Its first step ends only once something has arrived, which is the abort."""
    arrived = threading.Event()

    def may_end(loop: EngineLoop) -> bool:
        if loop.inbox.has_news:
            arrived.set()
        return arrived.is_set()

    engine, deltas = draining(may_end)
    asyncio.run(engine.drain(0.05))
    assert deltas[-1].finish_reason is FinishReason.ABORT
    assert not engine._loop.inbox.num_live
