"""Faults that wait for their moment strike what they are said to strike."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from jaxserve.sim.clockwork import Clockwork
from jaxserve.sim.draw import draw
from jaxserve.sim.fake_nixl import LateWrite
from jaxserve.sim.setup import Setup
from jaxserve.sim.world import World
from kv.host import HostDriver
from kv.moves import Loaded
from kv.transfer_fetch import Stage


def _under(**rates: float) -> Callable[[Clockwork], Setup]:
    """A world drawn as ever, with these faults and no others."""
    return lambda clockwork: replace(draw(clockwork), rates=dict(rates))


def test_what_writes_late_is_what_nobody_waits_for(monkeypatch: pytest.MonkeyPatch):
    late: list[LateWrite] = []
    worlds: list[World] = []
    deliver = LateWrite.deliver

    def delivered(write: LateWrite) -> None:
        waited = {
            id(peer._agent._transfers[fetch.transfer].transfer)
            for engine in worlds[-1].engines.values()
            for rounds in engine.rounds
            for peer in rounds.transfers._peers.values()
            for fetch in peer._fetches
            if fetch.stage is Stage.TRANSFER and peer._agent is not None
        }
        assert id(write.transfer) not in waited and not write.transfer.ended
        deliver(write)
        assert write.transfer.ended
        late.append(write)

    monkeypatch.setattr(LateWrite, "deliver", delivered)
    for seed in range(6):
        worlds.append(World(seed, _under(X14=0.1, X15=0.3, X19=0.2)))
        worlds[-1].run(600)
    assert {write.transfer.fault.post_fails for write in late} >= {False}
    assert (
        sum(
            sum(world.cover.met[fault, state] for fault, state in world.cover.met if fault == "X19")
            for world in worlds
        )
        > 0
    )


def test_bits_flip_in_pages_that_are_loaded(monkeypatch: pytest.MonkeyPatch):
    found: Counter[str] = Counter()
    poll = HostDriver.poll

    def polled(driver: HostDriver):
        events = poll(driver)
        found["rejected"] += sum(
            isinstance(event, Loaded) and bool(event.digest_failures) for event in events
        )
        return events

    monkeypatch.setattr(HostDriver, "poll", polled)
    for seed in range(8):
        world = World(seed, _under(X27=0.1))
        ran = world.run(600)
        found["flipped"] += len(world.laws.flipped)
        found.update(state for (fault, state), count in ran.met.items() if fault == "X27" and count)
    assert found["rejected"] > found["flipped"] / 4 > 0
    assert found.keys() - {"rejected", "flipped"} <= {"waiting", "loading", "preempted"}
    assert found["loading"] and found["waiting"]
