"""An engine that ends too early, too late, or goes on taking requests is found out."""

from dataclasses import replace
from typing import Any

import pytest

from jaxserve.drain import Await, Close, Drain
from jaxserve.inbox import Inbox
from jaxserve.sim.draw import draw
from jaxserve.sim.world import Failed, World

SEEDS = 60
EVENTS = 500


def _early(right: Any) -> Any:
    """What is leased is not waited for."""
    return lambda self, now, *, live, leases: right(self, now, live=live, leases=0)


def _at_once(right: Any) -> Any:
    """Nor are requests: they are told that the engine has stopped."""
    return lambda self, now, *, live, leases: Close()


def _late(right: Any) -> Any:
    def look(self: Drain, now: float, *, live: int, leases: int) -> Any:
        step = right(self, now, live=live, leases=leases)
        return replace(step, seconds=step.seconds + 60.0) if isinstance(step, Await) else step

    return look


def _laws(**rates: float) -> set[str]:
    """Laws that worlds break, up to the first that is asked for. `rates`: of their only faults, if any."""
    laws = set()
    for seed in range(SEEDS):
        world = World(seed, draw)
        if rates:
            world.storm.rates.clear()
            world.storm.rates.update(rates)
        try:
            world.run(EVENTS)
        except Failed as failed:
            laws.add(failed.law)
            if failed.law == "I25":
                break
    return laws


@pytest.mark.parametrize("wrong", [_early, _at_once, _late])
def test_a_drain_that_does_not_wait_or_waits_too_long_is_noticed(monkeypatch: pytest.MonkeyPatch, wrong: Any):
    monkeypatch.setattr(Drain, "look", wrong(Drain.look))
    assert "I25" in _laws()


def test_requests_that_are_told_too_late_are_noticed(monkeypatch: pytest.MonkeyPatch):
    """While a step takes a minute nobody hears of his end: the engine closes all the same."""
    monkeypatch.setattr("jaxserve.drain.TELL_S", 3600.0)
    assert "I25" in _laws(X41=0.01, X31=0.02)


def test_taking_requests_while_it_ends_is_noticed(monkeypatch: pytest.MonkeyPatch):
    """By clients that repeat what they have asked for, without a server that would refuse it before."""
    monkeypatch.setattr(Inbox, "shut", lambda self: None)
    assert "I25" in _laws(X41=0.01, X37=0.02)
