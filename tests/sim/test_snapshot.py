"""A world that is brought back is as it was, however it has gone on meanwhile."""

import gc
import random

from jaxserve.sim.fingerprint import fingerprint
from jaxserve.sim.small_events import option, options
from jaxserve.sim.small_world import SmallWorld
from jaxserve.sim.snapshot import Snapshot
from jaxserve.sim.steered import Variant
from jaxserve.sim.world import Complaints


def first(labels: list[str]) -> int:
    return 0


def test_a_world_brought_back_is_as_it_was_and_goes_on_as_it_did():
    for seed in range(3):
        chance = random.Random(seed)
        with Complaints() as complaints:
            world = SmallWorld(Variant(outputs=2, faults=("kill", "stop", "lose")), complaints)
            for _ in range(40):
                coming = options(world)
                if not coming:
                    break
                before, snapshot = fingerprint(world), Snapshot(world)
                label = chance.choice(coming).label
                world.happen(option(world, label), first)
                world.check()
                after = fingerprint(world)
                for _ in range(2):  # as often as one likes
                    world = snapshot.back()
                    assert fingerprint(world) == before
                    assert [each.label for each in options(world)] == [each.label for each in coming]
                    world.happen(option(world, label), first)
                    world.check()
                    assert fingerprint(world) == after


def test_an_agent_of_a_world_brought_back_is_deleted_with_its_last_reference():
    with Complaints() as complaints:
        world = SmallWorld(Variant(), complaints)
        snapshot = Snapshot(world)
        gc.disable()  # so that only references count
        try:
            world = snapshot.back()
            before = len(world.nixl.agents)
            for engine in world.engines.values():
                engine.close()
            assert before == 2 and world.nixl.agents == []
        finally:
            gc.enable()
        assert len(snapshot.back().nixl.agents) == 2


def test_what_closures_hold_is_brought_back_too():
    held = [1, 2]

    def add(more: int, into: list[int] = held) -> int:
        into.append(more)
        return sum(held)

    snapshot = Snapshot({"held": held, "add": add})
    assert add(3) == 6
    back = snapshot.back()
    assert back["held"] == [1, 2] and back["add"](10) == 13 and back["held"] == [1, 2, 10]
    assert held == [1, 2, 3]
