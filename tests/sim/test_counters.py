"""Statistics that do not say what was done are found out."""

from dataclasses import replace
from typing import Any

import pytest

import jaxserve.report
import scheduler.preempt
import scheduler.step
from jaxserve.sim.counters import fell
from jaxserve.sim.draw import draw
from jaxserve.sim.world import Failed, World
from metrics.counts import LabelledCounts
from metrics.engine import EngineStats
from metrics.histogram import Histogram
from metrics.moves import KINDS, MoveStats
from metrics.records import Gauges

SEEDS = 40
EVENTS = 500


def _forgets_what_was_computed(right: Any) -> Any:
    """Tokens that are computed again after a preemption count as computed for the first time."""

    def preempt(state: Any, sequence: Any) -> Any:
        entry = right(state, sequence)
        sequence.high_water = 0
        return entry

    return preempt


def _expired_twice(right: Any) -> Any:
    def expire(state: Any) -> None:
        before = state.news.expired
        right(state)
        state.news.expired += state.news.expired - before

    return expire


def _swapped(right: Any) -> Any:
    def step_record(*args: Any) -> Any:
        record = right(*args)
        gauges = record.gauges
        swapped = replace(
            gauges, waiting_capacity=gauges.waiting_deferred, waiting_deferred=gauges.waiting_capacity
        )
        return replace(record, gauges=swapped)

    return step_record


def _starts_anew(right: Any) -> Any:
    """A histogram is empty again from time to time."""
    count = 0

    def observe_step(stats: EngineStats, record: Any) -> EngineStats:
        nonlocal count
        count += 1
        told = right(stats, record)
        return (
            replace(told, first_token=Histogram.empty(told.first_token.bounds)) if count % 50 == 0 else told
        )

    return observe_step


@pytest.mark.parametrize(
    ("where", "name", "wrong"),
    [
        (scheduler.preempt, "preempt", _forgets_what_was_computed),
        (scheduler.step, "expire", _expired_twice),
        (jaxserve.report, "step_record", _swapped),
        (jaxserve.report, "observe_step", _starts_anew),
    ],
)
def test_statistics_that_are_wrong_are_noticed(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, wrong: Any
):
    monkeypatch.setattr(where, name, wrong(getattr(where, name)))
    laws = set()
    for seed in range(SEEDS):
        try:
            World(seed, draw).run(EVENTS)
        except Failed as failed:
            laws.add(failed.law)
            if failed.law == "I19":
                break
    assert "I19" in laws


def test_every_counter_may_only_grow_and_a_gauge_may_fall():
    stats = EngineStats.empty(64)
    more = replace(
        stats,
        gauges=Gauges(running=3),
        steps=replace(stats.steps, padding_tokens=2),
        finished=stats.finished.add("stop"),
        first_token=stats.first_token.observe(0.5),
    )
    assert fell(stats, more) is None
    assert fell(more, stats) == "stats.steps.padding_tokens"
    assert fell(more, replace(more, gauges=Gauges())) is None
    assert fell(more, replace(more, finished=stats.finished)) == "stats.finished"
    assert fell(more, replace(more, first_token=stats.first_token)) == "stats.first_token"
    other = LabelledCounts(labels=("a", "b"), values=(1, 0))
    assert fell(other, LabelledCounts(labels=("a", "b"), values=(0, 5))) == "stats", "each by itself"


def test_counters_of_moves_only_grow_too():
    stats = MoveStats.empty(KINDS)
    assert stats.nixl is not None
    more = replace(stats, nixl=replace(stats.nixl, expired=1, leases=4))
    assert fell(stats, more) is None
    assert fell(more, replace(stats, nixl=replace(stats.nixl, expired=1))) is None, "leases are a gauge"
    assert fell(more, stats) == "stats.nixl.expired"


def test_what_nobody_knows_how_to_compare_is_refused():
    with pytest.raises(TypeError, match="stats is a list"):
        fell([1], [0])
