"""The census of pages: of this moment, and bounded in time."""

import asyncio
import threading

import pytest

from jaxserve import Engine, SamplingParams
from jaxserve import engine as engine_file
from jaxserve.census import PageCensus
from metrics.moves import NIXL, OFFLOADING, SIMPLE, MoveStats
from metrics.records import Gauges
from tests.jaxserve.test_loop_moves import DEADLINE_S, Bench


def test_a_loop_that_has_done_nothing_yet_knows_its_pages_once_it_is_asked():
    bench = Bench("kv_consumer")
    try:
        assert bench.loop.move_stats.pages.free == 0, "no step has been decided"
        looked = threading.Event()
        bench.loop.inbox.look(looked.set)
        assert looked.wait(DEADLINE_S)
        pages = bench.loop.move_stats.pages
        assert (pages.free, pages.idle, pages.in_use) == (19, 0, 0)
    finally:
        bench.loop.close()


def test_the_census_of_an_engine_is_of_this_moment(engine: Engine):
    async def run() -> tuple[PageCensus, PageCensus]:
        stream = engine.generate_stream(list(range(40)), SamplingParams(max_tokens=30, ignore_eos=True))
        await anext(stream)
        during = await engine.page_census()
        await stream.aclose()
        while (after := await engine.page_census()).live_requests:
            assert after.current
        return during, after

    during, after = asyncio.run(run())
    assert during.current and during.live_requests == during.gauges.running == 1
    assert 3 <= during.moves.pages.in_use <= 5
    assert after.current and after.moves.pages.in_use == after.gauges.running == 0
    for census in (during, after):
        assert sum(pages for _, pages in census.moves.pages.by_state()) == census.total


def test_an_engine_that_does_not_answer_has_a_census_that_says_so(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    asyncio.run(engine.page_census())
    monkeypatch.setattr(engine._loop.inbox, "look", lambda done: None)
    monkeypatch.setattr(engine_file, "CENSUS_S", 0.01)
    census = asyncio.run(engine.page_census())
    assert not census.current
    assert sum(pages for _, pages in census.moves.pages.by_state()) == census.total


@pytest.mark.parametrize("kinds", [(), (NIXL,), (OFFLOADING,), (NIXL, SIMPLE)])
def test_only_tiers_that_there_are_show(kinds: tuple[str, ...]):
    census = PageCensus(current=True, total=0, live_requests=0, gauges=Gauges(), moves=MoveStats.empty(kinds))
    body = census.body()
    assert body["leases"] == 0
    empty = {"slots": 0, "used": 0, "pinned": 0, "storing": 0}
    assert body["host_tiers"] == {kind: empty for kind in kinds if kind != NIXL}
