"""How long a cluster may take to come to rest depends on what is in it."""

from jaxserve.sim.calm import AGAIN, bound_s
from jaxserve.sim.draw import draw
from jaxserve.sim.world import World
from kv.transfers import QUARANTINE_S


def test_the_bound_grows_with_what_is_to_come():
    for seed in range(6):
        world = World(seed, draw)
        nodes, engines = world.setup.nodes, world.engines.values()
        idle = bound_s(nodes, engines, (), pace=1.0, coming_s=0.0, hanging=False)
        longest = max(leaf.lease_s + leaf.transfer_timeout_s for node in nodes if (leaf := node.nixl))
        assert longest < idle < AGAIN * (longest + 120.0)
        assert bound_s(nodes, engines, (), pace=1.0, coming_s=60.0, hanging=False) == idle + AGAIN * 60.0
        assert bound_s(nodes, engines, (), pace=1.0, coming_s=0.0, hanging=True) > idle + QUARANTINE_S
        world.clients.begin(8)
        while not world.clients.asks:
            world.clockwork.run_one()
        asks = world.clients.asks.values()
        assert bound_s(nodes, engines, asks, pace=1.0, coming_s=0.0, hanging=False) > idle
