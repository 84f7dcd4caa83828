from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import reduce
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics.move_records import LoadRecord, MoveStepRecord, StoreRecord
from metrics.moves import (
    KINDS,
    LOAD_STAGES,
    NIXL,
    OFFLOADING,
    SIMPLE,
    STORE_OUTCOMES,
    FetchStages,
    MoveStats,
    PageStates,
    TierSlots,
)
from metrics.observe_moves import (
    observe_load,
    observe_notification_failure,
    observe_step_moves,
    observe_store,
)

SMALL = settings(deadline=None, max_examples=50)
EMPTY = MoveStats.empty(KINDS)
few = st.integers(0, 40)
seconds = st.floats(0, 9)
sizes = st.integers(0, 2**34)

loads = st.builds(
    LoadRecord,
    failed=st.booleans(),
    stage=st.sampled_from(LOAD_STAGES),
    num_pages=few,
    num_bytes=sizes,
    num_descriptors=few,
    seconds=seconds,
    post_seconds=seconds,
    digest_failures=few,
    retries=st.integers(0, 1),
)
stores = st.builds(StoreRecord, failed=st.booleans(), num_bytes=sizes, seconds=seconds)
outcomes = st.tuples(st.sampled_from((OFFLOADING, SIMPLE)), st.sampled_from(STORE_OUTCOMES), few)


@st.composite
def tiers(draw: st.DrawFn) -> tuple[str, TierSlots]:
    slots = draw(few)
    pinned = draw(st.integers(0, slots))
    tier = TierSlots(
        slots=slots,
        used=draw(st.integers(0, slots)),
        pinned=pinned,
        storing=draw(st.integers(0, pinned)),
    )
    return draw(st.sampled_from((OFFLOADING, SIMPLE))), tier


steps = st.builds(
    MoveStepRecord,
    pages=st.builds(PageStates, **{item.name: few for item in fields(PageStates)}),
    fetch=st.builds(FetchStages, waiting_to_start=few, in_progress=few, completed_waiting=few),
    leases=few,
    tiers=st.lists(tiers(), max_size=3).map(tuple),
    issued=st.lists(st.tuples(st.sampled_from(KINDS), few), max_size=3).map(tuple),
    expired=few,
    late_reads=few,
    outcomes=st.lists(outcomes, max_size=4).map(tuple),
)


@dataclass(frozen=True)
class Event:
    """One thing that happened, to which class of connector, and the reducer that takes it."""

    observe: Callable[..., MoveStats]
    arguments: tuple[Any, ...]


events = st.one_of(
    st.tuples(st.sampled_from(KINDS), loads).map(lambda what: Event(observe_load, what)),
    st.tuples(st.sampled_from((OFFLOADING, SIMPLE)), stores).map(lambda what: Event(observe_store, what)),
    steps.map(lambda what: Event(observe_step_moves, (what,))),
    st.just(Event(observe_notification_failure, ())),
)
histories = st.lists(events, max_size=12)


def fold(history: list[Event]) -> MoveStats:
    return reduce(lambda stats, event: event.observe(stats, *event.arguments), history, EMPTY)


def without_gauges(stats: MoveStats) -> MoveStats:
    assert stats.nixl and stats.offload and stats.simple
    return replace(
        stats,
        pages=PageStates(),
        fetch=FetchStages(),
        nixl=replace(stats.nixl, leases=0),
        offload=replace(stats.offload, tier=TierSlots()),
        simple=replace(stats.simple, tier=TierSlots()),
    )


def numbers(stats: object) -> list[int]:
    """Every number in a tree of frozen values."""
    if isinstance(stats, int):
        return [stats]
    if isinstance(stats, tuple):
        return [number for part in stats for number in numbers(part)]
    if is_dataclass(stats):
        names = [item.name for item in fields(stats) if item.name not in ("bounds", "labels")]
        return [number for name in names for number in numbers(getattr(stats, name))]
    raise TypeError(type(stats))


@SMALL
@given(a=histories, b=histories, c=histories)
def test_merge_is_associative_and_commutative_with_an_identity(
    a: list[Event], b: list[Event], c: list[Event]
) -> None:
    x, y, z = fold(a), fold(b), fold(c)
    assert x.merge(y).merge(z) == x.merge(y.merge(z))
    assert x.merge(y) == y.merge(x)
    assert x.merge(EMPTY) == x == EMPTY.merge(x)


@SMALL
@given(history=st.lists(st.tuples(st.booleans(), events), max_size=16))
def test_two_merged_engines_saw_what_one_would_have_seen(history: list[tuple[bool, Event]]) -> None:
    left = fold([event for on_left, event in history if on_left])
    right = fold([event for on_left, event in history if not on_left])
    together = fold([event for _, event in history])
    assert without_gauges(left.merge(right)) == without_gauges(together)
    assert left.merge(right).pages.free == left.pages.free + right.pages.free


@SMALL
@given(history=histories, event=events)
def test_no_observation_lowers_a_counter(history: list[Event], event: Event) -> None:
    before = fold(history)
    after = event.observe(before, *event.arguments)
    old, new = numbers(without_gauges(before)), numbers(without_gauges(after))
    assert all(a <= b for a, b in zip(old, new, strict=True))


@SMALL
@given(history=histories)
def test_totals_agree_with_a_recount_of_the_history(history: list[Event]) -> None:
    stats = fold(history)
    assert stats.nixl and stats.offload and stats.simple
    loaded = [event.arguments for event in history if event.observe is observe_load]
    stored = [event.arguments for event in history if event.observe is observe_store]
    ran = [event.arguments[0] for event in history if event.observe is observe_step_moves]
    for kind, of in ((OFFLOADING, stats.offload), (SIMPLE, stats.simple)):
        assert of.loads.num_bytes == sum(load.num_bytes for where, load in loaded if where == kind)
        assert of.stores.num_bytes == sum(store.num_bytes for where, store in stored if where == kind)
        assert of.stores.size.count == sum(store.num_bytes > 0 for where, store in stored if where == kind)
        assert of.loads.failures == sum(load.failed for where, load in loaded if where == kind)
        assert of.stores.failures == sum(store.failed for where, store in stored if where == kind)
        took = sum(store.seconds for where, store in stored if where == kind)
        assert of.stores.seconds == pytest.approx(took, abs=1e-8)
    reads = [load for where, load in loaded if where == NIXL]
    broken = [load for load in reads if load.stage in ("handshake", "transfer")]
    complete = [load for load in reads if load not in broken and load.num_descriptors]
    assert stats.nixl.failed_reads == len(broken)
    assert stats.nixl.read_s.count == stats.nixl.post_s.count == len(complete)
    assert stats.nixl.read_bytes.sum == sum(load.num_bytes for load in complete)
    assert stats.nixl.descriptors.sum == sum(load.num_descriptors for load in complete)
    refused = [load for load in reads if load.stage == "verify"]
    assert stats.nixl.stale_reads == sum(load.digest_failures == 0 for load in refused)
    assert stats.nixl.digest_failures == sum(load.digest_failures for load in reads)
    assert stats.nixl.retries == sum(load.retries for load in reads)
    assert stats.nixl.failed_notifications == sum(not event.arguments for event in history)
    assert stats.nixl.expired == sum(step.expired for step in ran)
    assert stats.nixl.late_reads == sum(step.late_reads for step in ran)
    simple = [each for step in ran for each in step.outcomes if each[0] == SIMPLE]
    for label in STORE_OUTCOMES:
        assert stats.simple.outcomes.get(label) == sum(pages for _, what, pages in simple if what == label)
    offered = [each for step in ran for each in step.outcomes if each[0] == OFFLOADING]
    assert stats.offload.no_room == sum(pages for _, what, pages in offered if what == "dropped_cpu_full")
    asked = [each for step in ran for each in step.issued if each[0] == SIMPLE]
    assert stats.simple.issued_pages == sum(pages for _, pages in asked)
    assert stats.simple.loaded_pages == sum(load.num_pages for where, load in loaded if where == SIMPLE)


@SMALL
@given(history=histories, last=steps)
def test_gauges_are_the_last_step_s(history: list[Event], last: MoveStepRecord) -> None:
    stats = observe_step_moves(fold(history), last)
    assert stats.nixl and stats.offload and stats.simple
    assert (stats.pages, stats.fetch, stats.nixl.leases) == (last.pages, last.fetch, last.leases)
    for kind, tier in ((OFFLOADING, stats.offload.tier), (SIMPLE, stats.simple.tier)):
        mine = [slots for of, slots in last.tiers if of == kind]
        for name in ("slots", "used", "pinned", "storing"):
            assert getattr(tier, name) == sum(getattr(slots, name) for slots in mine)


def test_what_was_read_and_then_refused_was_read_all_the_same() -> None:
    load = LoadRecord(failed=True, stage="verify", num_bytes=4096, num_descriptors=2, seconds=0.01)
    nixl = observe_load(EMPTY, NIXL, load).nixl
    assert nixl is not None
    assert (nixl.read_bytes.sum, nixl.stale_reads, nixl.failed_reads) == (4096, 1, 0)


def test_a_wrong_digest_is_no_stale_read() -> None:
    nixl = observe_load(EMPTY, NIXL, LoadRecord(failed=True, stage="verify", digest_failures=3)).nixl
    assert nixl is not None
    assert (nixl.digest_failures, nixl.stale_reads) == (3, 0)


def test_a_transfer_that_broke_is_no_completed_read() -> None:
    load = LoadRecord(failed=True, stage="transfer", num_bytes=4096, num_descriptors=2, seconds=0.01)
    nixl = observe_load(EMPTY, NIXL, load).nixl
    assert nixl is not None
    assert (nixl.read_s.count, nixl.failed_reads) == (0, 1)


@pytest.mark.parametrize(
    "observe",
    [
        lambda stats: observe_load(stats, NIXL, LoadRecord()),
        lambda stats: observe_load(stats, OFFLOADING, LoadRecord()),
        lambda stats: observe_load(stats, SIMPLE, LoadRecord()),
        lambda stats: observe_store(stats, OFFLOADING, StoreRecord()),
        lambda stats: observe_store(stats, SIMPLE, StoreRecord()),
        observe_notification_failure,
        lambda stats: observe_step_moves(stats, MoveStepRecord(pages=PageStates(), leases=1)),
        lambda stats: observe_step_moves(stats, MoveStepRecord(pages=PageStates(), expired=1)),
        lambda stats: observe_step_moves(stats, MoveStepRecord(pages=PageStates(), late_reads=1)),
        lambda stats: observe_step_moves(stats, MoveStepRecord(pages=PageStates(), issued=((SIMPLE, 1),))),
        lambda stats: observe_step_moves(
            stats, MoveStepRecord(pages=PageStates(), tiers=((OFFLOADING, TierSlots()),))
        ),
        lambda stats: observe_step_moves(
            stats, MoveStepRecord(pages=PageStates(), outcomes=((SIMPLE, "stored", 1),))
        ),
    ],
)
def test_a_connector_that_is_not_configured_has_no_statistics(
    observe: Callable[[MoveStats], MoveStats],
) -> None:
    with pytest.raises(ValueError, match="no statistics are kept"):
        observe(MoveStats.empty())


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no statistics"):
        MoveStats.empty(("MultiConnector",))
    with pytest.raises(ValueError, match="no statistics"):
        observe_load(EMPTY, "MultiConnector", LoadRecord())
    with pytest.raises(ValueError, match="no statistics"):
        observe_store(EMPTY, NIXL, StoreRecord())
    with pytest.raises(ValueError, match="unknown outcome"):
        observe_step_moves(EMPTY, MoveStepRecord(pages=PageStates(), outcomes=((SIMPLE, "lost", 1),)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: LoadRecord(stage="lunch"),
        lambda: LoadRecord(num_bytes=-1),
        lambda: LoadRecord(seconds=-0.5),
        lambda: LoadRecord(post_seconds=float("nan")),
        lambda: LoadRecord(digest_failures=-1),
        lambda: StoreRecord(num_bytes=-1),
        lambda: StoreRecord(seconds=float("nan")),
        lambda: PageStates(free=-1),
        lambda: PageStates(quarantined=-1),
        lambda: FetchStages(in_progress=-1),
        lambda: TierSlots(slots=1, used=2),
        lambda: TierSlots(slots=2, pinned=1, storing=2),
        lambda: TierSlots(slots=1, pinned=2),
        lambda: TierSlots(slots=1, used=-1),
        lambda: MoveStepRecord(pages=PageStates(), leases=-1),
        lambda: MoveStepRecord(pages=PageStates(), outcomes=((SIMPLE, "stored", -1),)),
        lambda: MoveStepRecord(pages=PageStates(), issued=((SIMPLE, -1),)),
    ],
)
def test_what_cannot_have_been_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError):
        make()


def test_engines_with_other_connectors_do_not_merge() -> None:
    with pytest.raises(TypeError, match="different classes"):
        EMPTY.merge(MoveStats.empty((NIXL, SIMPLE)))


def test_two_children_of_one_class_share_their_statistics() -> None:
    assert MoveStats.empty((OFFLOADING, OFFLOADING)) == MoveStats.empty((OFFLOADING,))
    tier = TierSlots(slots=4, used=3, pinned=2, storing=1)
    step = MoveStepRecord(pages=PageStates(), tiers=((OFFLOADING, tier), (OFFLOADING, tier)))
    stats = observe_step_moves(MoveStats.empty((OFFLOADING,)), step)
    assert stats.offload is not None
    assert stats.offload.tier == TierSlots(slots=8, used=6, pinned=4, storing=2)
