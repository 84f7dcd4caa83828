"""The laws on the router find routers that are wrong, each in few worlds."""

from unittest.mock import patch

import pytest

from jaxserve.sim.draw import draw
from jaxserve.sim.world import Failed, World
from tests.sim.bugs_of_routing import ROUTING, Mutant

SEEDS, EVENTS = 60, 500


def first(mutant: Mutant) -> Failed | None:
    """The first run that breaks a law with this router; None: there is none."""
    swap = mutant.swap
    for seed in range(SEEDS):
        with patch.object(swap.where, swap.name, swap.wrong(getattr(swap.where, swap.name))):
            try:
                World(seed, draw).run(EVENTS)
            except Failed as failed:
                return failed
    return None


@pytest.mark.parametrize("mutant", [pytest.param(mutant, id=mutant.name) for mutant in ROUTING])
def test_a_wrong_router_is_found(mutant: Mutant):
    found = first(mutant)
    assert found is not None, f"no law is broken in {SEEDS} worlds"
    assert found.law == mutant.law, found
