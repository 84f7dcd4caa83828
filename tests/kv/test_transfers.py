"""Loads between engines: what arrives is what was leased, or it does not count."""

import itertools

import numpy as np
import pytest

from jaxserve.sim.fake_nixl import Fault
from kv.config import CONSUMER
from kv.moves import LeaseRead, LeaseTouched, Loaded, NotificationFailed, Safe, Track, Unlease, Untrack
from kv.transfers import QUARANTINE_LEAST_S, QUARANTINE_S
from kv.wire import Confirm, Done, Heartbeat, Hello
from tests.kv.pair import PORT_D, PORT_P, Engine, Pair, only_loaded


def test_pages_arrive_and_count_for_what_they_are() -> None:
    pair = Pair()
    before = pair.d.pool.rows.copy()
    source = pair.p.lease("r", [5, 9, 3], 11)
    pair.load(source, [20, 10, 30])
    loaded = only_loaded(pair.run())
    page_bytes = pair.p.pool.rows.shape[1]
    assert (loaded.num_pages, loaded.error, loaded.safe, loaded.retries) == (3, None, True, 0)
    assert (loaded.num_bytes, loaded.num_descriptors) == (3 * page_bytes, 3)
    assert loaded.seconds > 0 and loaded.post_seconds > 0
    before[[20, 10, 30]] = pair.p.pool.rows[[5, 9, 3]]
    assert np.array_equal(pair.d.pool.rows, before), "and no other page has changed"


def test_only_the_positions_from_first_page_on_move_and_the_dummy_page_is_skipped() -> None:
    pair = Pair()
    before = pair.d.pool.rows.copy()
    pair.load(pair.p.lease("r", [5, 9, 3, 8], 16), [0, 10, 30], first=1)
    loaded = only_loaded(pair.run())
    assert (loaded.num_pages, loaded.num_descriptors) == (3, 2)
    before[[10, 30]] = pair.p.pool.rows[[3, 8]]
    assert np.array_equal(pair.d.pool.rows, before)


@pytest.mark.parametrize("ratio", [2, 4, 8])
@pytest.mark.parametrize("num_tokens", [32, 29, 9, 33])
def test_small_pages_are_regrouped_and_the_rest_of_a_partial_page_is_zero(
    ratio: int, num_tokens: int
) -> None:
    pair = Pair(p_page=4, d_page=4 * ratio)
    small = list(range(3, 3 + -(-num_tokens // 4)))[::-1]
    large = list(range(40, 40 + -(-num_tokens // (4 * ratio))))
    pair.load(pair.p.lease("r", small, num_tokens), large)
    assert only_loaded(pair.run()).num_pages == len(large)
    arrived, sent = pair.d.pool.tokens(large), pair.p.pool.tokens(small)
    assert np.array_equal(arrived[..., : 4 * len(small), :], sent)
    assert not arrived[..., 4 * len(small) :, :].any()


def test_staging_smaller_than_a_load_moves_it_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kv.transfer_peer.STAGING_BYTES", 1)
    pair = Pair(p_page=4, d_page=8)
    for move_id, first in ((1, 3), (2, 13)):
        pages = list(range(first, first + 9))
        source = pair.p.lease(f"r{move_id}", pages, 36)
        pair.load(source, range(30 + 5 * move_id, 35 + 5 * move_id), move_id=move_id)
    loads = [event for event in pair.run(100) if isinstance(event, Loaded)]
    assert [(load.num_pages, load.error) for load in loads] == [(5, None)] * 2
    assert np.array_equal(pair.d.pool.tokens(range(40, 45))[..., :36, :], pair.p.pool.tokens(range(13, 22)))


def test_a_page_size_that_is_no_multiple_is_refused_with_the_reason() -> None:
    pair = Pair(p_page=8, d_page=4)
    pair.load(pair.p.lease("r", [1], 8), [2])
    loaded = only_loaded(pair.run())
    assert (loaded.num_pages, loaded.stage) == (0, "handshake") and "no multiple" in str(loaded.error)


def test_a_lease_shorter_than_the_load_fills_the_leading_pages() -> None:
    pair = Pair()
    pair.load(pair.p.lease("r", [5, 9], 8), [20, 21, 22], tokens=12)
    loaded = only_loaded(pair.run())
    assert loaded.num_pages == 2 and "covers 2 of 3" in str(loaded.error)


def test_one_handshake_serves_all_loads_of_a_peer() -> None:
    pair = Pair()
    for move_id in (1, 2, 3):
        pair.load(pair.p.lease(f"r{move_id}", [move_id], 4), [20 + move_id], move_id=move_id)
    assert sum(isinstance(event, Loaded) for event in pair.run()) == 3
    assert sum(isinstance(message, Hello) for _, message in pair.wire.sent) == 1


# Refusals.


def test_another_model_is_refused_and_the_reason_is_kept() -> None:
    pair = Pair(d_compat="other")
    pair.load(pair.p.lease("r", [1], 4), [2])
    loaded = only_loaded(pair.run())
    assert (loaded.num_pages, loaded.stage, loaded.retries) == (0, "handshake", 0)
    assert "compat" in str(loaded.error) and "model" in str(loaded.error)


def test_a_consumer_lends_no_pages() -> None:
    pair = Pair(p_role=CONSUMER)
    pair.load(pair.p.lease("r", [1], 4), [2])
    assert "consumer" in str(only_loaded(pair.run()).error)


def test_nobody_listening_is_tried_twice_and_then_an_error() -> None:
    pair = Pair()
    source = pair.p.lease("r", [1], 4)
    pair.p.transfers.close()
    pair.load(source, [2])
    for _ in range(9):
        pair.d.events += pair.d.transfers.poll(pair.wire.now)
    loaded = only_loaded(pair.d.events)
    assert (loaded.stage, loaded.retries) == ("handshake", 1)
    assert sum(isinstance(message, Hello) for _, message in pair.wire.sent) == 2


# Stale pages.


@pytest.mark.parametrize("digest", [True, False])
def test_pages_of_an_ended_lease_never_count(digest: bool) -> None:
    pair = Pair(digest=digest)
    source = pair.p.lease("r", [5, 9], 8)
    pair.tick()
    pair.p.transfers.start([Unlease(connector=0, request_id="r")], 0.0)
    pair.p.pool.rows[[5, 9]] = 1  # another prompt has them now
    pair.load(source, [20, 21])
    loaded = only_loaded(pair.run())
    assert (loaded.num_pages, loaded.stage, loaded.retries) == (0, "verify", 0)
    assert "lease" in str(loaded.error)


@pytest.mark.parametrize("digest", [True, False])
def test_pages_leased_again_under_another_generation_never_count(digest: bool) -> None:
    pair = Pair(digest=digest)
    source = pair.p.lease("r", [5, 9], 8, generation=7)
    pair.p.transfers.start([Unlease(connector=0, request_id="r")], 0.0)
    pair.p.pool.rows[[5, 9]] = 1
    pair.p.lease("r", [5, 9], 8, generation=8)
    pair.load(source, [20, 21])
    loaded = only_loaded(pair.run())
    assert (loaded.num_pages, loaded.stage) == (0, "verify") and "generation" in str(loaded.error)


def test_a_lease_that_ends_while_its_pages_are_read_never_counts() -> None:
    pair = Pair()
    pair.network.set_cycles_before_xfer_done(5)
    pair.load(pair.p.lease("r", [5, 9, 3, 4], 16), [20, 21, 22, 23])
    pair.until_read()
    pair.p.transfers.start([Unlease(connector=0, request_id="r")], 0.0)
    pair.p.pool.rows[[5, 9, 3, 4]] = 1
    assert only_loaded(pair.run()).num_pages == 0


def test_a_source_overwritten_under_a_live_lease_shows_in_the_digests() -> None:
    """It must not happen; if it does, the pages before the first wrong one count."""
    pair = Pair()
    pair.network.set_cycles_before_xfer_done(5)
    pair.load(pair.p.lease("r", [5, 9, 3, 4], 16), [20, 21, 22, 23])
    pair.until_read()
    pair.p.pool.rows[3] = 1
    loaded = only_loaded(pair.run(80))
    assert (loaded.num_pages, loaded.stage, loaded.retries, loaded.digest_failures) == (2, "verify", 1, 2)
    assert np.array_equal(pair.d.pool.rows[[20, 21]], pair.p.pool.rows[[5, 9]])


@pytest.mark.parametrize("fault", [Fault(flips_bit=True), Fault(writes_nothing=True)])
def test_wrong_bytes_after_done_are_read_again_once(fault: Fault) -> None:
    pair = Pair()
    pair.network.faults = [fault]
    pair.load(pair.p.lease("r", [5, 9], 8), [20, 21])
    loaded = only_loaded(pair.run())
    assert (loaded.num_pages, loaded.error, loaded.retries) == (2, None, 1)
    assert loaded.digest_failures in (1, 2)
    assert np.array_equal(pair.d.pool.rows[[20, 21]], pair.p.pool.rows[[5, 9]])
    pair.network.faults = [fault, fault]
    pair.load(pair.p.lease("r2", [6, 7], 8), [22, 23], move_id=2)
    again = only_loaded(pair.run())
    assert (again.retries, again.stage) == (1, "verify") and again.num_pages < 2


def test_wrong_bytes_in_staging_never_reach_the_pool() -> None:
    pair = Pair(p_page=4, d_page=8)
    before = pair.d.pool.rows.copy()
    pair.network.faults = [Fault(writes_nothing=True)] * 2
    pair.load(pair.p.lease("r", [5, 9], 8), [20])
    assert only_loaded(pair.run()).num_pages == 0
    assert np.array_equal(pair.d.pool.rows, before)


# Failing transfers.


@pytest.mark.parametrize("fault", [Fault(post_fails=True), Fault(errors=True)])
def test_a_failed_transfer_is_tried_again_once_with_a_new_agent(fault: Fault) -> None:
    pair = Pair()
    pair.network.faults = [fault]
    pair.load(pair.p.lease("r", [5, 9], 8), [20, 21])
    loaded = only_loaded(pair.run())
    assert (loaded.num_pages, loaded.retries, loaded.error) == (2, 1, None)
    assert len(pair.reading) == 1 and pair.reading[0].endswith("-2"), "the first agent is gone"
    pair.network.faults = [fault, fault]
    pair.load(pair.p.lease("r2", [5, 9], 8), [22, 23], move_id=2)
    again = only_loaded(pair.run())
    assert (again.num_pages, again.retries, again.stage, again.safe) == (0, 1, "transfer", True)
    assert "NIXL could not" in str(again.error)


def test_a_hanging_transfer_is_given_up_and_its_pages_are_safe_when_it_ends() -> None:
    pair = Pair()
    pair.network.pause(pair.serving)
    before = pair.d.pool.rows.copy()
    pair.wire.lose = lambda message: isinstance(message, Heartbeat)
    pair.load(pair.p.lease("r", [5, 9], 8), [20, 21])
    pair.until_read()
    assert not pair.tick(4.9)
    loaded = only_loaded(pair.tick(25.2))
    assert (loaded.num_pages, loaded.safe, loaded.stage, loaded.retries) == (0, False, "transfer", 0)
    assert pair.d.transfers.quarantined_pages == 2
    assert not [event for event in pair.run() if isinstance(event, Safe)]
    assert np.array_equal(pair.d.pool.rows, before)
    pair.network.resume(pair.serving)
    assert not np.array_equal(pair.d.pool.rows, before), "it writes late, as NIXL does"
    assert pair.run() == [Safe(move_id=1)]
    assert pair.d.transfers.quarantined_pages == 0


def test_pages_that_nobody_vouches_for_are_a_failed_transfer_not_stale() -> None:
    """A stopped process can still be read from (the kernel does it), but it confirms nothing."""
    pair = Pair()
    pair.wire.lose = lambda message: isinstance(message, Confirm | Heartbeat)
    pair.load(pair.p.lease("r", [5, 9], 8), [20, 21])
    loaded = only_loaded(pair.run(400, 0.1))
    assert (loaded.num_pages, loaded.safe, loaded.stage) == (0, True, "transfer")


def test_a_peer_that_leaves_two_heartbeats_unanswered_is_held_to_be_stopped() -> None:
    pair = Pair()
    pair.network.pause(pair.serving)
    source = pair.p.lease("r", [5], 4)
    pair.d.transfers.start([Track(connector=0, request_id="d1", source=source)], 0.0)
    pair.load(source, [20])
    pair.until_read()
    pair.wire.silent = {PORT_P}
    loaded = only_loaded(pair.run(150, 0.1))
    assert not loaded.safe and "heartbeats" in str(loaded.error)


def test_nothing_more_is_read_from_a_peer_that_leaves_heartbeats_unanswered_until_it_answers() -> None:
    """Each such read would only add to the quarantine."""
    pair = Pair()
    pair.network.pause(pair.serving)
    source = pair.p.lease("r", [5], 4)
    pair.d.transfers.start([Track(connector=0, request_id="d1", source=source)], 0.0)
    pair.load(source, [20])
    pair.until_read()
    pair.wire.silent = {PORT_P}
    assert not only_loaded(pair.run(150, 0.1)).safe
    pair.load(pair.p.lease("r2", [6], 4), [21], move_id=2)
    second = only_loaded(pair.run(60, 0.1))
    assert second.safe and (second.num_pages, second.stage) == (0, "transfer")
    assert pair.d.transfers.quarantined_pages == 1, "the second was never posted"
    pair.wire.silent = set()
    pair.network.resume(pair.serving)
    pair.load(pair.p.lease("r3", [7], 4), [22], move_id=3)
    third = only_loaded(pair.run())
    assert (third.num_pages, third.error, third.retries) == (1, None, 0), "it is asked first, and then read"
    assert np.array_equal(pair.d.pool.rows[22], pair.p.pool.rows[7])


@pytest.mark.parametrize(("budget", "wait_s"), [(1, QUARANTINE_LEAST_S - 0.1), (2, QUARANTINE_S - 0.1)])
def test_a_full_or_old_quarantine_ends_with_the_agents_deletion(budget: int, wait_s: float) -> None:
    pair = Pair(quarantine_pages_max=budget)
    pair.network.pause(pair.serving)
    pair.load(pair.p.lease("r", [5, 9], 8), [20, 21])
    pair.until_read()
    (agent,) = pair.reading
    events = [event for event in pair.tick(30.0)]
    loaded = only_loaded(events)
    assert events == [loaded] and not pair.tick(wait_s)
    events += pair.tick(0.2)
    assert events == [loaded, Safe(move_id=1)] and not loaded.safe
    assert agent not in pair.network.agents and pair.d.transfers.recycled == 1
    pair.d.pool.rows[[20, 21]] = 3  # the pages have another owner now
    pair.network.resume(pair.serving)
    assert pair.network.deliver_late() == 0
    assert (pair.d.pool.rows[[20, 21]] == 3).all()
    pair.load(pair.p.lease("r2", [5, 9], 8), [30, 31], move_id=2)
    assert only_loaded(pair.run()).num_pages == 2, "the next load makes a new agent"


def test_other_loads_of_a_peer_whose_agent_is_deleted_fail_safely_and_those_of_others_go_on() -> None:
    pair = Pair(quarantine_pages_max=1)
    third = Engine(pair.network, pair.wire, name="Q", port=9)
    pair.network.set_cycles_before_xfer_done(3)
    pair.network.pause(pair.serving)
    pair.load(pair.p.lease("r", [5, 9], 8), [20, 21])
    pair.until_read()
    pair.tick(30.0)
    pair.tick(QUARANTINE_LEAST_S - 10.0)
    pair.load(pair.p.lease("r2", [6], 4), [22], move_id=2)
    pair.tick()
    pair.tick(9.999)
    pair.load(third.lease("r3", [7], 4), [23], move_id=3)
    for _ in range(3):
        third.transfers.poll(pair.wire.now)
        pair.tick()
    pair.tick(0.01)
    for _ in range(9):
        third.transfers.poll(pair.wire.now)
        pair.tick(0.001)
    loads = {event.move_id: event for event in pair.d.events if isinstance(event, Loaded)}
    assert (loads[1].safe, loads[2].safe, loads[2].num_pages) == (False, True, 0)
    assert "deleted" in str(loads[2].error)
    assert (loads[3].num_pages, loads[3].error) == (1, None)


def test_a_hanging_read_into_staging_leaves_the_pool_safe() -> None:
    pair = Pair(p_page=4, d_page=8)
    pair.network.pause(pair.serving)
    before = pair.d.pool.rows.copy()
    pair.load(pair.p.lease("r", [5, 9], 8), [20])
    pair.until_read()
    loaded = only_loaded(pair.tick(31.0))
    assert loaded.safe and pair.d.transfers.quarantined_pages == 0
    pair.network.resume(pair.serving)
    assert not [event for event in pair.run() if isinstance(event, Safe)]
    assert np.array_equal(pair.d.pool.rows, before)


def test_a_lost_confirmation_is_asked_for_again_and_a_late_one_is_ignored() -> None:
    pair = Pair()
    lost: list[object] = []
    pair.wire.lose = lambda message: isinstance(message, Confirm) and not lost and not lost.append(message)
    pair.load(pair.p.lease("r", [5], 4), [20])
    pair.run()
    loaded = only_loaded(pair.run(40, 0.2))
    assert lost and (loaded.num_pages, loaded.retries) == (1, 1)


# Lives of a peer.


def test_a_peer_restarted_at_its_address_voids_its_old_leases_only() -> None:
    pair = Pair()
    old = pair.p.lease("r", [5], 4)
    pair.load(old, [20])
    assert only_loaded(pair.run()).num_pages == 1
    pair.restart_p()
    pair.load(old, [21], move_id=2)
    failed = only_loaded(pair.run())
    assert (failed.num_pages, failed.safe) == (0, True)
    pair.load(pair.p.lease("r", [5], 4), [22], move_id=3)
    assert only_loaded(pair.run()).num_pages == 1
    assert np.array_equal(pair.d.pool.rows[22], pair.p.pool.rows[5])
    pair.load(old, [23], move_id=4)
    failed = only_loaded(pair.run())
    assert failed.num_pages == 0 and "restarted" in str(failed.error)


def test_a_peer_that_dies_and_comes_back_in_a_read_fails_it_safely() -> None:
    pair = Pair()
    pair.network.set_cycles_before_xfer_done(5)
    pair.load(pair.p.lease("r", [5, 9], 8), [20, 21])
    pair.until_read()
    pair.restart_p()
    loaded = only_loaded(pair.run())
    assert (loaded.num_pages, loaded.safe, loaded.retries) == (0, True, 1)


def test_another_engine_at_a_peers_address_is_not_taken_for_it() -> None:
    pair = Pair()
    source = pair.p.lease("r", [5], 4)
    pair.p = Engine(pair.network, pair.wire, name="other", port=PORT_P)
    pair.load(source, [20])
    assert "other listens" in str(only_loaded(pair.run()).error)


# Leases.


def test_tracked_leases_get_heartbeats_until_they_are_untracked() -> None:
    pair = Pair()
    source = pair.p.lease("r", [5], 4)
    pair.d.transfers.start([Track(connector=0, request_id="d1", source=source)], 0.0)
    pair.run(26, 1.0)
    touched = [event for event in pair.p.events if isinstance(event, LeaseTouched)]
    assert [event.request_ids for event in touched] == [("r",)] * 5
    assert [round(event.at_s) for event in touched] == [6, 11, 16, 21, 26]
    pair.d.transfers.start([Untrack(connector=0, request_id="d1")], 26.0)
    pair.run(30, 1.0)
    assert [event for event in pair.p.events if isinstance(event, LeaseRead)] == [
        LeaseRead(request_id="r", at_s=27.0)
    ]
    assert sum(isinstance(message, Heartbeat) for _, message in pair.wire.sent) == 5


def test_heartbeats_keep_pace_with_the_peers_lease_where_it_is_shorter() -> None:
    pair = Pair(p_lease_s=6.0)
    source = pair.p.lease("r", [5], 4)
    pair.d.transfers.start([Track(connector=0, request_id="d1", source=source)], 0.0)
    pair.run(20, 0.5)
    touched = [event.at_s for event in pair.p.events if isinstance(event, LeaseTouched)]
    assert len(touched) >= 7 and max(b - a for a, b in itertools.pairwise(touched)) <= 2.0


def test_done_twice_is_told_once_and_too_late_is_told_too() -> None:
    pair = Pair()
    source = pair.p.lease("r", [5], 4)
    caller = pair.wire.listeners[PORT_D]
    done = Done(epoch=source.epoch, request_ids=("r",))
    for _ in range(2):
        caller.call("p", PORT_P, done, timeout_s=5)
        pair.tick()
    assert [type(event) for event in pair.p.events] == [LeaseRead] and pair.p.transfers.ignored == 1
    pair.p.transfers.start([Unlease(connector=0, request_id="r")], 0.0)
    caller.call("p", PORT_P, done, timeout_s=5)
    pair.tick()
    assert [type(event) for event in pair.p.events] == [LeaseRead] * 2, "the step counts it as late"


def test_a_lost_done_is_an_event() -> None:
    pair = Pair()
    source = pair.p.lease("r", [5], 4)
    pair.d.transfers.start([Track(connector=0, request_id="d1", source=source)], 0.0)
    pair.run()
    pair.wire.lose = lambda message: isinstance(message, Done)
    pair.d.transfers.start([Untrack(connector=0, request_id="d1")], pair.wire.now)
    assert NotificationFailed(request_id="d1") in pair.run(60, 0.1)
    assert not [event for event in pair.p.events if isinstance(event, LeaseRead)]


def test_unknown_leases_are_answered_and_stray_messages_are_counted() -> None:
    pair = Pair()
    caller = pair.wire.listeners[PORT_D]
    for message in (
        Heartbeat(epoch="f" * 32, request_ids=("x",)),
        Confirm(epoch="0" * 32, request_id="x", pages=((1,),), generations=((1,),), digests=True),
        Confirm(epoch="f" * 32, request_id="x", pages=(), generations=(), digests=True),
        Done(epoch="f" * 32, request_ids=("x",)),
    ):
        caller.call("p", PORT_P, message, timeout_s=5)
    pair.tick()
    assert not pair.p.events and pair.d.transfers.ignored == 4
    pair.d.transfers.start([Untrack(connector=0, request_id="nobody")], 0.0)
    assert pair.d.transfers.ignored == 5


def test_digests_are_ready_before_anybody_asks_and_few_per_poll() -> None:
    pair = Pair()
    pair.p.lease("r", range(1, 31), 120)
    for _ in range(4):
        assert pair.p.transfers.next_wake(0.0) == 0.0
        pair.tick()
    assert pair.p.transfers.next_wake(0.0) != 0.0


def test_an_engine_without_leases_or_loads_sleeps() -> None:
    pair = Pair()
    assert pair.p.transfers.next_wake(0.0) is None and pair.d.transfers.next_wake(0.0) is None
    source = pair.p.lease("r", [5], 4)
    pair.load(source, [20])
    pair.run()
    pair.p.transfers.start([Unlease(connector=0, request_id="r")], 0.0)
    pair.run(10, 1.0)
    assert pair.p.transfers.next_wake(50.0) is None and pair.d.transfers.next_wake(50.0) is None


# The pool.


def test_a_pool_that_moves_fails_what_is_under_way_and_is_registered_anew() -> None:
    pair = Pair()
    pair.network.set_cycles_before_xfer_done(5)
    pair.load(pair.p.lease("r", [5, 9], 8), [20, 21])
    pair.until_read()
    old = pair.d.pool.rows
    pair.d.pool.rows = old.copy()
    pair.d.transfers.pool_moved([pair.d.pool.region])
    old[:] = 3
    assert pair.network.deliver_late() == 0 and (old == 3).all()
    loaded = only_loaded(pair.run())
    assert (loaded.num_pages, loaded.safe) == (0, True) and "moved" in str(loaded.error)
    pair.load(pair.p.lease("r2", [6], 4), [22], move_id=2)
    assert only_loaded(pair.run()).num_pages == 1
    assert np.array_equal(pair.d.pool.rows[22], pair.p.pool.rows[6])


def test_a_pool_that_moves_goes_on_keeping_alive_what_is_to_be_read() -> None:
    pair = Pair()
    source = pair.p.lease("r", [5], 4)
    pair.d.transfers.start([Track(connector=0, request_id="d1", source=source)], 0.0)
    pair.run(6, 1.0)
    pair.d.transfers.pool_moved([pair.d.pool.region])
    pair.run(20, 1.0)
    touched = [event for event in pair.p.events if isinstance(event, LeaseTouched)]
    assert len(touched) >= 4 and all(event.request_ids == ("r",) for event in touched)


def test_a_peer_whose_pool_moved_is_met_anew() -> None:
    pair = Pair()
    pair.load(pair.p.lease("r", [5], 4), [20])
    pair.run()
    pair.p.pool.rows = pair.p.pool.rows.copy()
    pair.p.transfers.pool_moved([pair.p.pool.region])
    pair.load(pair.p.lease("r2", [6], 4), [21], move_id=2)
    loaded = only_loaded(pair.run())
    assert (loaded.num_pages, loaded.retries) == (1, 1)


def test_closing_deletes_every_agent() -> None:
    pair = Pair()
    pair.network.pause(pair.serving)
    pair.load(pair.p.lease("r", [5, 9], 8), [20, 21])
    pair.until_read()
    pair.d.transfers.close()
    pair.p.transfers.close()
    assert pair.network.agents == []
