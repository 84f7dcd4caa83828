"""Pages kept for a peer: how long, and who ends it."""

from dataclasses import replace

import pytest

from kv.moves import Lease, LeaseRead, LeaseTouched, Unlease, Untrack
from scheduler.types import FinishReason, Stop
from tests.scheduler.test_loads import Hand
from tests.scheduler.test_moves import LIMITS, NIXL_D, NIXL_P, OFFLOAD, SIMPLE, config, finished, multi
from tests.scheduler.world import request

LEASE_S = 6.0
PRODUCER = replace(NIXL_P, lease_s=LEASE_S)


def leased(transfer=PRODUCER, *, prompt: int = 10, pages: int = 20, **sampling) -> tuple[Hand, float]:
    """A world in which request "a" has just ended with a lease; when it began."""
    world = Hand(config(transfer, pages=pages), LIMITS)
    asked = replace(request("a", range(prompt), **{"max_tokens": 1, **sampling}), lease=True)
    world.step(arrivals=(asked,))
    while ("a", 0) not in world.finished:
        world.step()
    return world, world.now


def until(world: Hand, moment: float) -> int:
    """Steps up to a moment on the world's clock; how many leases have expired."""
    expired = 0
    while world.now < moment:
        expired += world.step().moves.expired
    return expired


def test_a_lease_ends_at_its_deadline_and_not_before():
    world, began = leased()
    assert world.step().moves.next_deadline_s == began + LEASE_S
    assert until(world, began + LEASE_S - 0.25) == 0 and "a" in world.leases
    plan = world.step()
    assert world.now == began + LEASE_S and plan.moves.expired == 1 and not world.leases
    assert plan.moves.commands == (Unlease(connector=0, request_id="a"),)
    assert plan.moves.next_deadline_s is None and plan.gauges.pages_in_use == 0


@pytest.mark.parametrize(("late", "counts"), [(-0.1, True), (0.0, True), (0.1, False)])
def test_a_heartbeat_counts_by_when_it_arrived_not_by_when_it_was_settled(late, counts):
    world, began = leased()
    until(world, began + LEASE_S - 0.25)
    world.now += 1.0  # the loop was busy: the deadline has passed when it looks again
    arrived = began + LEASE_S + late
    plan = world.step(events=(LeaseTouched(request_ids=("a",), at_s=arrived),))
    assert plan.moves.expired == (0 if counts else 1) and ("a" in world.leases) == counts
    if counts:
        assert plan.moves.next_deadline_s == pytest.approx(arrived + LEASE_S * 2 / 3)


def test_an_old_heartbeat_does_not_shorten_a_lease_and_one_of_nobody_changes_nothing():
    world, began = leased()
    late = LeaseTouched(request_ids=("a", "nobody"), at_s=began + 4.0)
    early = LeaseTouched(request_ids=("a",), at_s=began + 0.5)
    until(world, began + 4.0)
    plan = world.step(events=(late, early))
    assert plan.moves.next_deadline_s == pytest.approx(began + 4.0 + LEASE_S * 2 / 3)


def test_heartbeats_keep_a_lease_alive_for_as_long_as_they_come():
    world, _ = leased()
    for _ in range(80):
        world.step(events=(LeaseTouched(request_ids=("a",), at_s=world.now),))
        assert "a" in world.leases
    assert until(world, world.now + LEASE_S) == 1


def test_a_read_ends_a_lease_once_and_a_second_one_is_no_late_read():
    world, _ = leased()
    twice = (LeaseRead(request_id="a", at_s=world.now), LeaseRead(request_id="a", at_s=world.now))
    plan = world.step(events=twice)
    assert plan.moves.commands == (Unlease(connector=0, request_id="a"),)
    assert plan.moves.late_reads == plan.moves.expired == 0 and plan.gauges.pages_in_use == 0
    plan = world.step(events=twice)
    assert plan.moves.late_reads == 0 and plan.moves.commands == ()


def test_a_read_after_the_end_is_counted_late_once():
    world, began = leased()
    assert until(world, began + LEASE_S) == 1
    assert world.step(events=(LeaseRead(request_id="a", at_s=world.now),)).moves.late_reads == 1
    assert world.step(events=(LeaseRead(request_id="a", at_s=world.now),)).moves.late_reads == 0
    assert world.step(events=(LeaseRead(request_id="b", at_s=world.now),)).moves.late_reads == 0


def test_a_read_and_the_deadline_in_one_step_is_a_read():
    world, began = leased()
    until(world, began + LEASE_S - 0.25)
    plan = world.step(events=(LeaseRead(request_id="a", at_s=world.now),))
    assert plan.moves.expired == plan.moves.late_reads == 0 and not world.leases


@pytest.mark.parametrize("how", ["step", "pool"])
def test_a_pool_whose_content_is_gone_is_read_by_nobody(how):
    world, _ = leased()
    if how == "pool":
        world.faults.pool_moves = 1.0
        plan = world.step()
    else:
        world.step(arrivals=(request("b", range(40, 45)),))
        world.faults.step_fails = 1.0
        plan = world.step()
    assert Unlease(connector=0, request_id="a") in plan.moves.commands and not world.leases
    assert plan.moves.gauges.leases == 0 and plan.moves.expired == 0


def test_the_terms_name_the_prompt_alone_with_its_partial_page():
    world, _ = leased(prompt=10, max_tokens=6, ignore_eos=True)
    terms, lease = finished(world, "a").lease, world.leases["a"]
    assert terms.num_tokens == 10 and len(terms.pages[0]) == 3
    assert (terms.pages, terms.generations) == (lease.pages, lease.generations)
    assert world.state.pages.in_use == 3, "pages of the answer are not kept"


def test_a_prompt_of_which_some_was_cached_says_so_to_its_client():
    world, _ = leased(prompt=12)
    asked = replace(request("b", range(12), max_tokens=1), lease=True)
    world.step(arrivals=(asked,))
    world.settle()
    assert finished(world, "a").lease.cached_tokens == 0
    assert finished(world, "b").lease.cached_tokens == 8
    shared = set(finished(world, "a").lease.pages[0]) & set(finished(world, "b").lease.pages[0])
    assert len(shared) == 2
    world.step(events=(LeaseRead(request_id="a", at_s=world.now),))
    assert "b" in world.leases  # and its content is checked at every step
    world.step(arrivals=tuple(request(f"o{base}", range(base, base + 12)) for base in (20, 40, 60)))
    world.settle()


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR])
def test_a_request_that_did_not_complete_leaves_no_lease(reason):
    world = Hand(config(PRODUCER), LIMITS)
    world.step(arrivals=(replace(request("a", range(10), ignore_eos=True), lease=True),))
    world.step()
    if reason is FinishReason.ABORT:
        world.step(aborts=("a",))
    else:
        world.step(stops=(Stop(request_id="a", index=0, reason=reason, message="no numbers"),))
    assert finished(world, "a").reason is reason and finished(world, "a").lease is None
    world.settle()
    assert not world.leases and world.state.pages.in_use == 0


def test_only_the_first_of_n_sequences_leaves_a_lease():
    world = Hand(config(PRODUCER), LIMITS)
    world.step(arrivals=(replace(request("a", range(10), n=3), lease=True),))
    world.settle()
    assert list(world.leases) == ["a"] and world.counts["leases"] == 1
    assert [world.finished["a", index].lease is not None for index in range(3)] == [True, False, False]


@pytest.mark.parametrize("transfer", [None, NIXL_D, SIMPLE, OFFLOAD, multi(NIXL_D, SIMPLE)])
def test_an_engine_that_serves_no_peers_keeps_nothing_for_them(transfer):
    world, _ = leased(transfer)
    assert finished(world, "a").lease is None and not world.leases
    world.settle()
    assert world.state.pages.in_use == 0


def test_a_lease_and_a_store_of_the_same_pages_both_hold_them():
    world, began = leased(multi(PRODUCER, SIMPLE))
    world.step()
    assert world.leases and world.under_way
    until(world, began + LEASE_S)
    assert world.state.pages.in_use == 2, "the store still reads the two whole pages"
    world.settle()
    assert world.state.pages.in_use == 0


def test_a_lease_command_comes_before_its_end():
    world = Hand(config(PRODUCER), LIMITS)
    commands = []
    world.step(arrivals=(replace(request("a", range(10), max_tokens=1), lease=True),))
    for _ in range(60):
        commands += world.step().moves.commands
    assert [type(command) for command in commands] == [Lease, Unlease]


def test_leases_and_those_who_wait_for_a_peer_do_not_keep_each_other_for_ever():
    """An engine of both roles: what it has leased leaves no room for what it is to read, and whoever reads
    the lease may wait for just that."""
    world, _ = leased(replace(PRODUCER, role="kv_both"), prompt=20, pages=9)
    tokens = range(40, 60)
    asked = replace(request("b", tokens, max_tokens=2), remote=world.remote("b", tokens))
    plans = [world.step(arrivals=(asked,), events=(LeaseTouched(request_ids=("a",), at_s=world.now),))]
    while not any(isinstance(command, Untrack) for command in plans[-1].moves.commands):
        assert len(plans) < 4, "it waits for its peer"
        plans.append(world.step(events=(LeaseTouched(request_ids=("a",), at_s=world.now),)))
    assert ("b", 0) not in world.finished and "a" in world.leases
    world.step(events=(LeaseRead(request_id="a", at_s=world.now),))
    world.settle()
    assert finished(world, "b").reason is FinishReason.LENGTH and world.counts["loaded"] == 0
    assert world.prefilled["b"].external_kv_transfer == 0


def test_a_peer_is_kept_while_something_runs_that_will_give_pages_back():
    world, _ = leased(replace(PRODUCER, role="kv_both"), prompt=12, pages=9)
    tokens = range(40, 56)
    running = request("c", range(70, 78), max_tokens=6, ignore_eos=True)
    asked = replace(request("b", tokens, max_tokens=2), remote=world.remote("b", tokens))
    plan = world.step(arrivals=(running, asked), events=(LeaseTouched(request_ids=("a",), at_s=world.now),))
    while ("c", 0) not in world.finished:
        assert not any(isinstance(command, Untrack) for command in plan.moves.commands)
        plan = world.step(events=(LeaseTouched(request_ids=("a",), at_s=world.now),))
