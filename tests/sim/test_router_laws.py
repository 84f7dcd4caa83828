"""The laws on the router find routers that are wrong, each in few worlds."""

import pytest

from tests.sim.bugs_of_routing import ROUTING
from tests.sim.planting import Mutant

SEEDS, EVENTS = 60, 500


@pytest.mark.parametrize("mutant", [pytest.param(mutant, id=mutant.name) for mutant in ROUTING])
def test_a_wrong_router_is_found(mutant: Mutant):
    found = mutant.first(SEEDS, EVENTS)
    assert found is not None, f"no law is broken in {SEEDS} worlds"
    assert (found.law,) == mutant.laws, found
