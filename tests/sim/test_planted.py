"""Bugs that other servers had, planted one by one: the simulator finds each, as the table says."""

import functools

import pytest

from jaxserve.sim.draw import draw
from jaxserve.sim.world import World
from tests.sim.planted import BUGS, EVENTS, MOST, RENEW, look, recorded
from tests.sim.planting import Planted

BY_NAME = pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
STALE = f"the table in docs/testing.md is of another version of the simulator or of what it runs: {RENEW}"


@functools.cache
def run(seed: int) -> int:
    """Events of a run without any bug. Raises where it breaks a law."""
    return World(seed, draw).run(EVENTS).events


@BY_NAME
def test_the_recorded_seed_finds_the_bug_and_nothing_without_it(bug: Planted):
    found = recorded().get(bug.name)
    assert found is not None, STALE
    assert look(bug, found.seed) == found, STALE
    assert found.law in bug.laws, "it is found, but not for what is wrong with it"
    assert run(found.seed) >= EVENTS


@pytest.mark.slow
@BY_NAME
def test_no_seed_before_the_recorded_one_finds_the_bug(bug: Planted):
    found = recorded().get(bug.name)
    assert found is not None, STALE
    earlier = [look(bug, seed) for seed in range(found.seed)]
    assert all(one is None or one.events > MOST for one in earlier), STALE


def test_bugs_are_many_and_of_many_kinds():
    names = [bug.name for bug in BUGS]
    assert len(set(names)) == len(names) >= 20
    assert set(recorded()) == set(names), STALE
    assert len({bug.failure for bug in BUGS}) >= 20
    assert len({found.law for found in recorded().values()}) >= 6


def test_a_planted_bug_is_gone_afterwards():
    for bug in BUGS:
        right = [getattr(swap.where, swap.name) for swap in bug.swaps]
        with bug.planted():
            wrong = [getattr(swap.where, swap.name) for swap in bug.swaps]
        assert all(one is not other for one, other in zip(right, wrong, strict=True))
        assert [getattr(swap.where, swap.name) for swap in bug.swaps] == right
