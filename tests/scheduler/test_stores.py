"""Stores hold pages; nobody is preempted for pages that come back by themselves."""

from dataclasses import replace

from kv.moves import Store, Stored
from scheduler.types import Limits
from tests.scheduler.test_loads import Hand, arrive
from tests.scheduler.test_moves import LAZY, LIMITS, SIMPLE, config
from tests.scheduler.world import expected_output, request


def test_a_sequence_that_needs_a_page_waits_for_a_store_and_nobody_is_preempted():
    world = Hand(config(SIMPLE, pages=6), Limits(max_num_batched_tokens=16, max_num_seqs=2))
    arrive(world, "old", range(12), remote=False, max_tokens=1)  # its stores pin three of five pages
    while ("old", 0) not in world.finished:
        world.step()
    arrive(world, "a", range(40, 47), remote=False, max_tokens=6, ignore_eos=True)
    held = 0
    for _ in range(6):
        plan = world.step()
        held += plan.gauges.running == 1 and not len(plan.rows)
    assert held > 1 and world.counts["preempted"] == 0
    plan = world.step(events=tuple(world.end_stores()))
    assert len(plan.rows) == 1
    world.settle()
    assert world.output("a") == expected_output(world.requests["a"], 64)
    assert world.counts["preempted"] == 0


def test_a_store_that_failed_gives_its_pages_back_and_is_tried_again():
    world = Hand(config(SIMPLE), LIMITS)
    arrive(world, "a", range(9), remote=False, max_tokens=1)
    while not world.under_way:
        world.step()
    world.faults.store_fails = 1.0
    plan = world.step(events=tuple(world.end_stores()))
    assert plan.gauges.pages_in_use == 0 and plan.moves.gauges.tiers[0][1] == 0
    world.faults.store_fails = 0.0
    world.step(reset_prefix_cache=True)
    arrive(world, "b", range(9), remote=False, max_tokens=1)
    world.settle()
    assert world.prefilled["b"].external_kv_transfer == 0
    world.step(reset_prefix_cache=True)
    arrive(world, "c", range(9), remote=False, max_tokens=1)
    world.settle()
    assert world.prefilled["c"].external_kv_transfer == 8


def test_an_answer_that_comes_twice_counts_once():
    world = Hand(config(SIMPLE), LIMITS)
    arrive(world, "a", range(9), remote=False, max_tokens=1)
    while not world.under_way:
        world.step()
    answers = world.end_stores()
    world.step(events=(*answers, *answers))
    plan = world.step(events=(*answers, Stored(move_id=12345)))
    assert plan.moves.gauges.tiers == ((0, 2, 0, 0, 24),) and plan.gauges.pages_in_use == 0


def test_a_lazy_store_leaves_the_order_of_eviction_as_it_was():
    """Pages that were shown, held for a copy and given back are still evicted oldest first."""
    orders = []
    for transfer in (None, replace(LAZY, host_slots=64)):
        world = Hand(config(transfer, pages=20), LIMITS)
        for name, base in (("a", 0), ("b", 30), ("c", 60)):
            arrive(world, name, range(base, base + 12), remote=False, max_tokens=1)
            world.settle()
        for _ in range(3):
            world.step(events=tuple(world.end_stores()))
        orders.append(list(world.state.pages.idle_pages()))
        keys = [world.state.prefix.key_of(page) for page in orders[-1]]
        orders[-1] = keys
    assert orders[0] == orders[1] and len(orders[0]) > 6


def test_a_lazy_tier_is_given_only_pages_that_nobody_holds():
    world = Hand(config(replace(LAZY, host_slots=64), pages=20), LIMITS)
    arrive(world, "a", range(12), remote=False, max_tokens=6, ignore_eos=True)
    for _ in range(3):
        assert not any(isinstance(command, Store) for command in world.step().moves.commands)
    world.settle()
    assert world.counts["stored"] > 0


def test_a_request_waits_while_its_pages_are_being_stored_and_others_overtake_it():
    world = Hand(config(SIMPLE), LIMITS)
    arrive(world, "a", range(9), remote=False, max_tokens=1)
    while not world.under_way:
        world.step()
    world.step(reset_prefix_cache=True)
    plan = world.step(arrivals=(request("b", range(9)), request("c", range(40, 49))))
    assert [entry.request_id for entry in plan.admitted] == ["c"]
    world.step(events=tuple(world.end_stores()))
    world.settle()
    assert dict(world.prefilled["b"].external_by_tier) == {"host": 8}
    assert world.output("b") == expected_output(world.requests["b"], 64)
