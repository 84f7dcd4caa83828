"""Loads, stores and leases inside the step: right tokens, exact counts, no lost page, under faults."""

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kv.config import ConnectorConfig
from scheduler.types import FinishReason, Limits, SchedulerConfig
from tests.scheduler.moving_world import Faults, MovingWorld
from tests.scheduler.world import expected_output, request

SIZE = 4
LIMITS = Limits(max_num_batched_tokens=16, max_num_seqs=4)

NIXL_D = ConnectorConfig(kind="NixlConnector", role="kv_consumer")
NIXL_P = ConnectorConfig(kind="NixlConnector", role="kv_producer", lease_s=5.0)
OFFLOAD = ConnectorConfig(kind="OffloadingConnector", role="kv_both", host_slots=64)
SIMPLE = ConnectorConfig(kind="SimpleCPUOffloadConnector", role="kv_both", host_slots=24)
LAZY = replace(SIMPLE, lazy_offload=True)


def multi(*children: ConnectorConfig, **fields) -> ConnectorConfig:
    return ConnectorConfig(kind="MultiConnector", role="kv_both", children=children, **fields)


def config(
    transfer: ConnectorConfig | None, *, pages: int = 40, windows=(None,), **fields
) -> SchedulerConfig:
    return SchedulerConfig(
        windows=windows, page_size=SIZE, num_pages=pages, max_num_seqs=4, max_model_len=64,
        transfer=transfer, **fields,
    )  # fmt: skip


def finished(world: MovingWorld, request_id: str):
    return world.finished[request_id, 0]


def stats(world: MovingWorld, request_id: str) -> tuple[int, int, int]:
    """(local compute, local hit, external)."""
    entry = world.prefilled[request_id]
    return entry.local_compute, entry.local_cache_hit, entry.external_kv_transfer


@pytest.mark.parametrize("prompt", [3, 4, 5, 8, 16, 17, 33])
def test_a_cold_decode_engine_computes_nothing_of_a_prompt_that_a_peer_holds(prompt):
    world = MovingWorld(config(NIXL_D), LIMITS)
    tokens = range(prompt)
    world.step(arrivals=(replace(request("a", tokens), remote=world.remote("a", tokens)),))
    world.run()
    assert world.output("a") == expected_output(world.requests["a"], 64)
    assert stats(world, "a") == (0, 0, prompt)
    assert world.prefilled["a"].external_by_tier == (("p2p", prompt),)
    assert world.peers["a"].released == 1


def test_a_local_hit_comes_first_and_the_peer_brings_the_rest():
    world = MovingWorld(config(NIXL_D), LIMITS)
    tokens = list(range(18))
    world.step(arrivals=(request("warm", tokens[:9], max_tokens=1),))
    world.run()
    world.step(arrivals=(replace(request("a", tokens), remote=world.remote("a", tokens)),))
    world.run()
    assert stats(world, "a") == (0, 8, 10)
    world.step(arrivals=(request("direct", [50 + token for token in tokens]),))
    world.run()
    assert stats(world, "direct") == (18, 0, 0)


def test_a_failed_load_is_computed_and_says_so():
    world = MovingWorld(config(NIXL_D), LIMITS, seed=3, faults=Faults(load_short=1.0))
    tokens = list(range(19))
    world.step(arrivals=(replace(request("a", tokens), remote=world.remote("a", tokens)),))
    world.run()
    computed, hit, external = stats(world, "a")
    assert computed > 0 and hit == 0 and computed + external == 19 and external % SIZE == 0
    assert world.output("a") == expected_output(world.requests["a"], 64)


def test_policy_fail_ends_the_request_and_counts_it_nowhere():
    world = MovingWorld(config(replace(NIXL_D, failure_policy="fail")), LIMITS, faults=Faults(load_short=1.0))
    tokens = list(range(19))
    world.step(arrivals=(replace(request("a", tokens), remote=world.remote("a", tokens)),))
    world.step(arrivals=(request("b", range(40, 50)),))
    world.run()
    assert finished(world, "a").reason is FinishReason.ERROR and "KV" in finished(world, "a").message
    assert "a" not in world.prefilled and world.peers["a"].released == 1
    assert world.output("b") == expected_output(world.requests["b"], 64)


def test_the_targets_of_a_load_that_may_still_write_stay_out_of_the_pool():
    world = MovingWorld(config(NIXL_D, pages=12), LIMITS, seed=1, faults=Faults(load_unsafe=1.0))
    tokens = list(range(16))
    world.step(arrivals=(replace(request("a", tokens), remote=world.remote("a", tokens)),))
    while not world.counts["unsafe"]:
        world.step()
    world.random.random = lambda: 1.0  # nothing else ends by itself from here on
    plan = world.step()
    assert plan.moves.gauges.quarantined_pages == 4
    world.step(aborts=("a",))
    plan = world.step()
    assert plan.moves.gauges.quarantined_pages == 4 and plan.gauges.pages_in_use == 4
    del world.random.random
    world.run()
    assert world.state.pages.in_use == 0


def test_an_abort_while_pages_arrive_keeps_the_targets_until_the_load_has_ended():
    world = MovingWorld(config(NIXL_D), LIMITS)
    tokens = list(range(16))
    world.random.random = lambda: 1.0
    world.step(arrivals=(replace(request("a", tokens), remote=world.remote("a", tokens)),))
    plan = world.step(aborts=("a",))
    assert plan.finished[0].reason is FinishReason.ABORT and plan.gauges.pages_in_use == 4
    assert world.peers["a"].released == 1
    del world.random.random
    world.run()
    assert world.state.pages.in_use == 0 and "a" not in world.prefilled


@pytest.mark.parametrize("transfer", [OFFLOAD, SIMPLE, LAZY], ids=["offload", "simple", "lazy"])
def test_an_evicted_prompt_comes_back_from_the_host_tier(transfer):
    world = MovingWorld(config(replace(transfer, host_slots=400), pages=20), LIMITS)
    first = list(range(18))
    world.step(arrivals=(request("first", first),))
    world.run()
    for other in range(20):
        world.step(arrivals=(request(f"other{other}", [other * 3 + token for token in range(20, 38)]),))
        world.run()
    world.step(arrivals=(request("again", first),))
    world.run()
    assert world.output("again") == world.output("first")
    computed, hit, external = stats(world, "again")
    assert (hit, external) == (0, 16) and computed == 2
    world.step(reset_prefix_cache=True, reset_connectors=True)
    world.step(arrivals=(request("forgotten", first),))
    world.run()
    assert stats(world, "forgotten") == (18, 0, 0)
    assert world.prefilled["again"].external_by_tier == (("host", 16),)


def test_generated_tokens_are_stored_only_where_that_was_asked_for():
    """A page half prompt, half output: OffloadingConnector keeps prompts only, unless told otherwise."""
    stored = {}
    for name, transfer in (
        ("prompt only", OFFLOAD),
        ("all", replace(OFFLOAD, offload_prompt_only=False)),
        ("simple", SIMPLE),
    ):
        world = MovingWorld(config(transfer), LIMITS)
        world.step(arrivals=(request("a", range(10), max_tokens=14, ignore_eos=True),))
        world.run()
        stored[name] = world.counts["stored"]
    assert stored == {"prompt only": 2, "all": 5, "simple": 5}


def test_a_lease_keeps_pages_through_eviction_pressure_and_expires():
    world = MovingWorld(config(NIXL_P, pages=14), LIMITS)
    world.random.random = lambda: 1.0  # no peer ever reads
    asked = replace(request("a", range(18), max_tokens=1), lease=True)
    world.step(arrivals=(asked,))
    while ("a", 0) not in world.finished:
        world.step()
    terms = finished(world, "a").lease
    assert terms is not None and terms.num_tokens == 18 and len(terms.pages[0]) == 5
    world.step(arrivals=tuple(request(f"o{i}", range(i, i + 12)) for i in range(20, 26)))
    expired = 0
    for _ in range(300):
        plan = world.step()
        expired += plan.moves.expired
    assert expired == 1 and not world.leases and world.state.pages.in_use == 0


def test_an_aborted_prefill_leaves_no_lease():
    world = MovingWorld(config(NIXL_P), LIMITS)
    world.step(arrivals=(replace(request("a", range(40), max_tokens=1), lease=True),))
    plan = world.step(aborts=("a",))
    assert plan.finished[0].lease is None and plan.gauges.pages_in_use == 0


def test_composition_takes_what_the_host_has_and_the_rest_from_the_peer():
    for children in ((NIXL_D, SIMPLE), (SIMPLE, NIXL_D)):
        for compose, want in ((True, {"host": 16, "p2p": 14}), (False, None)):
            world = MovingWorld(config(multi(*children, compose=compose), pages=20), LIMITS, seed=5)
            tokens = list(range(30))
            world.step(arrivals=(request("warm", tokens[:18], max_tokens=1),))
            world.run()
            world.step(reset_prefix_cache=True)
            world.step(arrivals=(replace(request("a", tokens), remote=world.remote("a", tokens)),))
            world.run()
            by_tier = dict(world.prefilled["a"].external_by_tier)
            if want is None:
                want = {"p2p": 30} if children[0] is NIXL_D else {"host": 16}
            assert by_tier == want, (children[0].kind, compose)
            assert world.output("a") == expected_output(world.requests["a"], 64)
            assert world.peers["a"].released == 1


TRANSFERS = {
    "nixl": NIXL_D,
    "offload": replace(OFFLOAD, block_size=8, pages_per_chunk=2, host_slots=20),
    "arc": replace(OFFLOAD, eviction_policy="arc", host_slots=12, offload_prompt_only=False),
    "simple": replace(SIMPLE, host_slots=12),
    "lazy": replace(LAZY, host_slots=12),
    "nixl, simple": multi(NIXL_D, replace(SIMPLE, host_slots=12)),
    "offload, nixl": multi(replace(OFFLOAD, host_slots=12), NIXL_D),
    "composed": multi(NIXL_D, replace(SIMPLE, host_slots=12), OFFLOAD, compose=True),
    "producer": multi(NIXL_P, replace(SIMPLE, host_slots=12)),
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(sorted(TRANSFERS)),
    st.sampled_from([(None,), (None, 6)]),
    st.integers(0, 2**32),
    st.sampled_from(["none", "some", "many"]),
)
def test_whatever_happens_outputs_are_right_and_nothing_is_lost(kind, windows, seed, faulty):
    rate = {"none": 0.0, "some": 0.1, "many": 0.4}[faulty]
    faults = Faults(
        load_short=rate, load_unsafe=rate, store_fails=rate, step_fails=rate / 8, pool_moves=rate / 8
    )
    world = MovingWorld(
        config(TRANSFERS[kind], pages=24 * len(windows), windows=windows), LIMITS, seed=seed, faults=faults
    )
    draw = random.Random(seed)
    producer = kind == "producer"
    for number in range(10):
        name, length = f"r{number}", draw.randrange(1, 40)
        start = draw.choice([0, 0, 0, 30, 60])
        tokens = [start + token for token in range(length)]
        asked = request(name, tokens, max_tokens=draw.randrange(1, 10))
        if producer and draw.random() < 0.6:
            asked = replace(asked, lease=True)
        elif not producer and "nixl" in kind + "composed" and draw.random() < 0.6:
            asked = replace(asked, remote=world.remote(name, tokens))
        aborts = (f"r{draw.randrange(number + 1)}",) if draw.random() < 0.1 else ()
        world.step(arrivals=(asked,), aborts=aborts)
        for _ in range(draw.randrange(4)):
            world.step()
    world.run()
    assert world.state.pages.in_use == 0
    for name, asked in world.requests.items():
        end = finished(world, name)
        if end.reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert world.output(name) == expected_output(asked, 64)
            entry = world.prefilled[name]
            assert sum(stats(world, name)) == entry.num_prompt_tokens == len(asked.prompt_token_ids)
        else:
            assert end.reason is FinishReason.ABORT or "device" in end.message
    for name, peer in world.peers.items():
        if peer.tracked:
            assert peer.released == 1, f"the peer of {name} was let go {peer.released} times"
