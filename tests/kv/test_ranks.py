"""An engine of several ranks is one driver: every merged event once, nothing lost, whatever comes when."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.movers import Movers
from kv.config import NIXL
from kv.driver import Region
from kv.moves import (
    Command,
    Event,
    HostSource,
    Lease,
    LeaseRead,
    Load,
    Loaded,
    NotificationFailed,
    RemoteSource,
    Safe,
    Store,
    Stored,
    Track,
    Unlease,
    Untrack,
)
from kv.ranks import NAMES_KEPT, Ranks
from tests.kv.ranks_oracle import LEASED, LOADS, STORES, Due, History, polls, told, told_of_lease


class Broken(RuntimeError):
    pass


@dataclass(eq=False)
class FakeDriver:
    """One rank's driver. Attributes: raises: methods that raise; events: what the next poll tells."""

    raises: set[str] = field(default_factory=set)
    events: list[Event] = field(default_factory=list)
    started: list[Command] = field(default_factory=list)
    regions: Sequence[Region] = ()
    closed: int = 0

    def _enter(self, name: str) -> None:
        if name in self.raises:
            raise Broken(name)

    def start(self, commands: Sequence[Command]) -> None:
        self._enter("start")
        self.started += commands

    def poll(self) -> Sequence[Event]:
        self._enter("poll")
        events, self.events = self.events, []
        return events

    def pool_moved(self, regions: Sequence[Region]) -> None:
        self._enter("pool_moved")
        self.regions = regions

    def close(self) -> None:
        self.closed += 1
        self._enter("close")


def remote(port: int = 100) -> RemoteSource:
    return RemoteSource(
        engine_id="P", epoch="0" * 32, host="p", port=port, request_id="r", pages=((1,),),
        generations=((1,),), num_tokens=4, page_size=4,
    )  # fmt: skip


def load(move_id: int, source: RemoteSource | HostSource | None = None) -> Load:
    return Load(
        move_id=move_id, connector=0, request_id="d", first_page=0, pages=((1, 2),), num_tokens=8,
        source=source or remote(),
    )  # fmt: skip


def store(move_id: int) -> Store:
    return Store(move_id=move_id, connector=0, pages=(3,), slots=(3,))


def lease(name: str) -> Lease:
    return Lease(move_id=900, connector=0, request_id=name, pages=((1,),), generations=((1,),), num_tokens=4)


def unlease(name: str) -> Unlease:
    return Unlease(connector=0, request_id=name)


def read(name: str, at_s: float = 1.0) -> LeaseRead:
    return LeaseRead(request_id=name, at_s=at_s)


def made(count: int) -> tuple[Ranks, list[FakeDriver]]:
    drivers = [FakeDriver() for _ in range(count)]
    return Ranks(drivers), drivers


def tell(ranks: Ranks, driver: FakeDriver, *events: Event) -> list[Event]:
    """What comes out when one rank says this and the others nothing."""
    driver.events = list(events)
    return ranks.poll()


# Any interleaving.


@given(polls())
def test_any_interleaving_gives_each_merged_event_once_when_it_is_due(seen: list[list[list[Event]]]) -> None:
    count = len(seen[0])
    ranks, drivers = made(count)
    ranks.start([*map(load, LOADS), *map(store, STORES), lease(LEASED)])
    history: History = []
    merged: list[Event] = []
    for poll in seen:
        for driver, events in zip(drivers, poll, strict=True):
            driver.events = list(events)
        merged += ranks.poll()
        history += [(rank, event) for rank, events in enumerate(poll) for event in events]
        assert merged == told(history, count)
    assert ranks.poll() == []


@given(
    st.integers(1, 3),
    st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from(("lease", "unlease", 0, 1, 2)), st.integers(0, 5)),
        max_size=40,
    ),
)
def test_a_lease_is_read_once_all_ranks_have_read_it_and_a_new_one_of_the_name_begins_anew(
    count: int, said: list[tuple[str, str | int, int]]
) -> None:
    ranks, drivers = made(count)
    got: list[Event] = []
    for name, what, at_s in said:
        if what == "lease":
            ranks.start([lease(name)])
        elif what == "unlease":
            ranks.start([unlease(name)])
        else:
            got += tell(ranks, drivers[int(what) % count], read(name, at_s))
    due: Due = []
    for name in "ab":  # one stretch of history before the first lease of the name, and one from each on
        begins = [0, *(at for at, entry in enumerate(said) if entry[:2] == (name, "lease")), len(said)]
        for begin, end in itertools.pairwise(begins):
            stretch = [_of_lease(count, *entry) for entry in said[begin:end]]
            due += [(begin + at, event) for at, event in told_of_lease(stretch, count, name)]
    assert got == [event for _, event in sorted(due, key=lambda entry: entry[0])]


def _of_lease(count: int, name: str, what: str | int, at_s: int) -> tuple[int, Event]:
    """An entry of the history; what no rank has said is nobody's."""
    return (-1, read("")) if isinstance(what, str) else (what % count, read(name, at_s))


# What the ranks are told.


def test_every_rank_gets_every_command_and_talks_to_its_peer_of_the_same_number() -> None:
    ranks, drivers = made(3)
    track = Track(connector=0, request_id="d", source=remote(5000))
    host = load(2, HostSource(slots=((1, 2),)))
    others = [host, store(3), lease("a"), unlease("a"), Untrack(connector=0, request_id="d")]
    ranks.start([track, load(1, remote(5000)), *others])
    for rank, driver in enumerate(drivers):
        source = remote(5000 + rank)
        assert driver.started == [replace(track, source=source), load(1, source), *others]


def test_every_rank_is_told_of_its_own_region() -> None:
    ranks, drivers = made(2)
    regions = [Region(address=4096 * rank, page_bytes=64, num_pages=8) for rank in range(2)]
    ranks.pool_moved(regions)
    assert [driver.regions for driver in drivers] == [(regions[0],), (regions[1],)]
    with pytest.raises(ValueError):
        ranks.pool_moved(regions[:1])
    with pytest.raises(ValueError, match="at least one rank"):
        Ranks([])


# Safety.


def test_a_rank_safe_before_another_has_answered_leaves_no_quarantine() -> None:
    ranks, (one, two) = made(2)
    ranks.start([load(1)])
    assert tell(ranks, one, Loaded(move_id=1, num_pages=1, safe=False, error="late", stage="transfer")) == []
    assert tell(ranks, one, Safe(move_id=1)) == []
    (merged,) = tell(ranks, two, Loaded(move_id=1, num_pages=2))
    assert merged == Loaded(move_id=1, num_pages=1, safe=True, error="late", stage="transfer")
    assert tell(ranks, two, Safe(move_id=1)) == [] and ranks.ignored == 1


def test_a_load_is_safe_only_when_the_last_unsafe_rank_is() -> None:
    ranks, drivers = made(3)
    ranks.start([load(1)])
    for driver in drivers[:2]:
        assert tell(ranks, driver, Loaded(move_id=1, num_pages=0, safe=False, error="late")) == []
    (merged,) = tell(ranks, drivers[2], Loaded(move_id=1, num_pages=2))
    assert isinstance(merged, Loaded) and not merged.safe and merged.num_pages == 0
    assert tell(ranks, drivers[1], Safe(move_id=1), Safe(move_id=1)) == []
    assert tell(ranks, drivers[0], Safe(move_id=1)) == [Safe(move_id=1)]
    assert ranks.ignored == 1


# Names are remembered, but not for ever.


def test_a_lease_that_is_over_is_still_read_late_by_all_ranks() -> None:
    ranks, (one, two) = made(2)
    ranks.start([lease("a")])
    tell(ranks, one, read("a", 1.0))
    ranks.start([unlease("a")])
    assert tell(ranks, two, read("a", 7.0)) == [read("a", 7.0)]
    assert tell(ranks, two, read("a", 8.0)) == [] and tell(ranks, one, read("a", 9.0)) == []


def test_names_that_peers_send_do_not_pile_up() -> None:
    ranks, (one, two) = made(2)
    ranks.start([lease("kept")])
    tell(ranks, one, read("kept"), read("old"))
    tell(ranks, one, *(read(f"name {number}") for number in range(NAMES_KEPT)))
    assert tell(ranks, two, read("old")) == [], "forgotten: it counts anew"
    assert tell(ranks, two, read("kept")) == [read("kept")], "a lease is not forgotten while it stands"
    failed = [NotificationFailed(request_id=f"name {number}") for number in range(NAMES_KEPT + 1)]
    assert tell(ranks, one, *failed) == failed
    assert tell(ranks, two, *reversed(failed)) == failed[:1], "the oldest was forgotten, and is told again"


def test_a_name_leased_again_is_as_young_as_its_last_lease() -> None:
    ranks, (one, two) = made(2)
    ranks.start([lease("a"), unlease("a")])
    tell(ranks, one, *(read(f"name {number}") for number in range(NAMES_KEPT - 1)))
    ranks.start([lease("a")])
    tell(ranks, one, read("a"))
    ranks.start([unlease("a")])
    tell(ranks, one, read("one name more"))
    assert tell(ranks, two, read("a")) == [read("a")]


def test_a_request_that_comes_again_may_fail_to_notify_again() -> None:
    ranks, (one, two) = made(2)
    track = Track(connector=0, request_id="d", source=remote())
    failed = NotificationFailed(request_id="d")
    ranks.start([track])
    assert tell(ranks, one, failed) == [failed] and tell(ranks, two, failed) == []
    ranks.start([track])
    assert tell(ranks, two, failed) == [failed]


# A rank that breaks.


@pytest.mark.parametrize("where", ["start", "poll", "pool_moved"])
def test_a_rank_that_breaks_closes_all_and_every_move_fails_once(where: str) -> None:
    ranks, drivers = made(3)
    movers = Movers([NIXL])
    movers.add(0, ranks)
    movers.start([load(1), load(2)])
    unsafe = Loaded(move_id=1, num_pages=0, safe=False, error="late")
    for driver in drivers:
        driver.events = [unsafe]
    assert movers.poll() == [unsafe]
    drivers[0].events = [Loaded(move_id=2, num_pages=2), Safe(move_id=1)]
    drivers[1].raises.add(where)
    movers.start([load(3), store(4)])
    movers.pool_moved([Region(address=0, page_bytes=64, num_pages=8)] * 3)
    error = f"{NIXL} has failed"
    failed = [Loaded(move_id=number, num_pages=0, error=error) for number in (2, 3)]
    assert sorted(movers.poll(), key=str) == sorted(
        [*failed, Stored(move_id=4, error=error), Safe(move_id=1)], key=str
    )
    assert [driver.closed for driver in drivers] == [1, 1, 1] and movers.poll() == []


def test_a_rank_that_cannot_be_closed_leaves_the_others_closed_and_its_pages_in_quarantine() -> None:
    ranks, drivers = made(3)
    movers = Movers([NIXL])
    movers.add(0, ranks)
    movers.start([load(1)])
    drivers[0].raises |= {"poll", "close"}
    (event,) = movers.poll()
    assert isinstance(event, Loaded) and not event.safe and event.num_pages == 0
    assert [driver.closed for driver in drivers] == [1, 1, 1]
