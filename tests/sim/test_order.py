"""A scheduler that keeps one of its promises to those that wait no more is found out."""

from collections.abc import Callable
from typing import Any

import pytest

import scheduler.fill
import scheduler.step
from jaxserve.sim.draw import draw
from jaxserve.sim.world import Failed, World
from kv.connectors.base import LATER
from kv.connectors.host_tier import HostTierConnector
from scheduler.preempt import preempt

SEEDS = 40
EVENTS = 500


def _preempts_the_first(right: Any) -> Any:
    def make_room(state: Any, sequence: Any, count: int) -> Any:
        preempted = []
        while state.pages.available < count:
            victim = state.running[0]
            preempted.append(preempt(state, victim))
            if victim is sequence:
                break
        return preempted

    return make_room


def _serves_the_newest(right: Any) -> Any:
    def enqueue(state: Any, arrivals: Any, limits: Any) -> Any:
        state.arrivals -= 2 * len(arrivals)  # smaller numbers come first
        return right(state, arrivals, limits)

    return enqueue


def _keeps_the_fetched_waiting(right: Any) -> Any:
    def admit(state: Any, batch: Any, limits: Any) -> Any:
        fetched, state.fetched = state.fetched, []
        try:
            return right(state, batch, limits)
        finally:
            state.fetched = fetched

    return admit


def _leaves_the_first_out(right: Any) -> Any:
    def fill_running(state: Any, batch: Any) -> None:
        first = state.running.pop(0) if len(state.running) > 1 else None
        right(state, batch)
        if first is not None:
            state.running.insert(0, first)

    return fill_running


def _always_later(right: Any) -> Any:
    def lookup(self: Any, query: Any) -> Any:
        return LATER if query.request_id.endswith("1") else right(self, query)

    return lookup


WRONGS = (
    (scheduler.fill, "make_room", _preempts_the_first),
    (scheduler.step, "enqueue", _serves_the_newest),
    (scheduler.step, "admit", _keeps_the_fetched_waiting),
    (scheduler.step, "fill_running", _leaves_the_first_out),
    (HostTierConnector, "lookup", _always_later),
)


@pytest.mark.parametrize(("where", "name", "wrong"), WRONGS, ids=[each[2].__name__[1:] for each in WRONGS])
def test_who_must_wait_longer_than_promised_is_noticed(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, wrong: Callable[[Any], Any]
):
    monkeypatch.setattr(where, name, wrong(getattr(where, name)))
    assert "I22" in _laws()


def _laws() -> list[str]:
    """The first few laws that worlds break."""
    broken = []
    for seed in range(SEEDS):
        try:
            World(seed, draw).run(EVENTS)
        except Failed as failed:
            broken.append(failed.law)
            if failed.law == "I22":
                break
    return broken
