"""The host tier's driver: what is stored comes back, loads overtake stores, and failures are events."""

import threading
from collections.abc import Callable, Sequence

import jax
import numpy as np
import pytest

from kv import pool as pools
from kv.copies import PointerCopies, ProgramCopies
from kv.digest import digest_rows
from kv.driver import Driver, Region
from kv.host import PAGES_PER_PIECE, HostDriver
from kv.moves import Event, HostSource, Load, Loaded, RemoteSource, Store, Stored, Unlease
from kv.types import KvSpec, PageGroup

PAGE_BYTES = 64
NUM_PAGES = 200


class Pool:
    """Copies over an array; says what it did; can fail, or stop at a gate."""

    def __init__(self) -> None:
        self.pages = np.random.default_rng(1).integers(0, 256, (NUM_PAGES, PAGE_BYTES), np.uint8)
        self.log: list[tuple[str, list[int]]] = []
        self.fail_on = -1
        self.reached = threading.Event()
        self.gate: threading.Event | None = None
        self.regions: list[Sequence[Region]] = []

    def _enter(self, what: str, pages: Sequence[int]) -> None:
        if self.gate is not None:
            self.reached.set()
            assert self.gate.wait(30)
        if self.fail_on in pages:
            raise RuntimeError("the device is on fire")
        self.log.append((what, list(pages)))

    def read(self, pages: Sequence[int], out: np.ndarray) -> None:
        self._enter("read", pages)
        out[:] = self.pages[list(pages)]

    def write(self, pages: Sequence[int], rows: np.ndarray) -> None:
        self._enter("write", pages)
        self.pages[list(pages)] = rows

    def pool_moved(self, regions: Sequence[Region]) -> None:
        self.regions.append(regions)


class World:
    """A driver, what it copies, and a way to wait for its events without sleeping."""

    def __init__(
        self, *, slots: int = 100, digest: bool = False, queued: bool = False, threads: int = 1
    ) -> None:
        self.pool = Pool()
        self.woken = threading.Event()
        self.work: list[Callable[[], None]] = []
        self.now = 0.0
        executor = self.work.append if queued else None
        self.driver = HostDriver(
            slots, PAGE_BYTES, self.pool, wake=self.woken.set, clock=self.clock, threads=threads,
            executor=executor, digest=digest_rows if digest else None,
        )  # fmt: skip

    def clock(self) -> float:
        self.now += 0.5
        return self.now

    def run(self) -> None:
        while self.work:
            self.work.pop(0)()

    def wait(self, count: int) -> list[Event]:
        events: list[Event] = []
        while len(events) < count:
            assert self.woken.wait(30), f"only {events} came"
            self.woken.clear()
            events += self.driver.poll()
        return events

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.close()


def store(move_id: int, pages: Sequence[int], slots: Sequence[int]) -> Store:
    return Store(move_id=move_id, connector=0, pages=tuple(pages), slots=tuple(slots))


def load(move_id: int, pages: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]) -> Load:
    return Load(
        move_id=move_id, connector=0, request_id="r", first_page=0, pages=tuple(map(tuple, pages)),
        num_tokens=1, source=HostSource(slots=tuple(map(tuple, slots))),
    )  # fmt: skip


def loaded(event: Event) -> Loaded:
    assert isinstance(event, Loaded)
    return event


@pytest.mark.parametrize("digest", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_stored_comes_back(digest, threads):
    with World(digest=digest, threads=threads) as world:
        driver: Driver = world.driver
        before = world.pool.pages.copy()
        pages, slots = list(range(1, 91)), [*range(50, 95), *range(45, 0, -1)]
        driver.start([store(7, pages, slots)])
        (event,) = world.wait(1)
        assert isinstance(event, Stored)
        assert (event.move_id, event.error, event.num_bytes) == (7, None, 90 * PAGE_BYTES)
        assert event.seconds > 0
        world.pool.pages[:] = 0
        driver.start([load(8, [range(100, 190)], [slots])])
        (event,) = world.wait(1)
        assert loaded(event).error is None and loaded(event).num_pages == 90 and loaded(event).safe
        assert (loaded(event).num_bytes, loaded(event).num_descriptors) == (90 * PAGE_BYTES, 90)
        assert np.array_equal(world.pool.pages[100:190], before[1:91])
        assert not world.pool.pages[:100].any() and not world.pool.pages[190:].any()


def test_neighbouring_slots_are_one_copy_and_dummy_pages_none():
    with World(queued=True) as world:
        world.driver.start([store(1, [9, 0, 4, 5], [1, 99, 2, 3])])
        world.run()
        assert world.pool.log == [("read", [9, 4, 5])]
        world.driver.start([load(2, [[20, 21, 22], [0, 0, 30]], [[1, 2, 3], [0, 0, 1]])])
        world.run()
        assert loaded(world.driver.poll()[1]).num_pages == 3
        assert np.array_equal(world.pool.pages[[20, 21, 22, 30]], world.pool.pages[[9, 4, 5, 9]])
        assert not (world.pool.pages[0] == world.pool.pages[9]).all()


def test_loads_overtake_stores_even_inside_a_long_store():
    with World(queued=True) as world:
        world.driver.start([store(1, [1], [1])])
        world.run()
        long = range(10, 10 + PAGES_PER_PIECE * 2)
        first = world.work
        world.driver.start([store(2, long, range(2, 2 + len(long)))])
        world.driver.start([load(3, [[150]], [[1]]), load(4, [[151]], [[1]])])
        assert len(first) == 2
        world.run()
        assert [event.move_id for event in world.driver.poll() if isinstance(event, Loaded | Stored)] == [
            1, 3, 4, 2,
        ]  # fmt: skip
    with World() as world:
        world.pool.gate = threading.Event()
        world.driver.start([store(1, long, range(2, 2 + len(long)))])
        assert world.pool.reached.wait(30)
        world.driver.start([load(2, [[150]], [[1]])])
        world.pool.gate.set()
        assert [type(event) for event in world.wait(2)] == [Loaded, Stored]


def test_a_copy_that_raises_is_an_event_and_the_next_one_works():
    with World() as world:
        world.driver.start([store(1, [1, 2, 3], [1, 3, 5])])
        world.wait(1)
        world.pool.fail_on = 102
        world.driver.start([load(2, [[101, 102, 103]], [[1, 3, 5]])])
        event = loaded(world.wait(1)[0])
        assert event.error == "RuntimeError: the device is on fire"
        assert (event.num_pages, event.safe, event.stage) == (1, True, "transfer")
        world.driver.start([store(3, [102], [7])])
        assert world.wait(1) == [Stored(move_id=3, error="RuntimeError: the device is on fire", seconds=0.5)]
        world.driver.start([load(4, [[101, 103]], [[1, 3]])])
        assert loaded(world.wait(1)[0]).num_pages == 2


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (store(1, [1, 2], [1]), "not aligned"),
        (store(1, [1], [101]), "host slot 101 does not exist"),
        (store(1, [1], [0]), "host slot 0"),
        (store(1, [1], [-1]), "host slot -1"),
        (load(1, [[1]], [[0]]), "host slot 0"),
        (load(1, [[1], [2]], [[1]]), "not aligned"),
    ],
)
def test_a_command_that_makes_no_sense_is_answered_with_an_error(command, reason):
    with World() as world:
        world.driver.start([command])
        (event,) = world.wait(1)
        assert isinstance(event, Loaded | Stored) and event.error is not None
        assert reason in event.error and world.pool.log == []


def test_a_peers_pages_are_refused_and_other_commands_ignored():
    source = RemoteSource(
        engine_id="e", epoch="0" * 32, host="h", port=1, request_id="r", pages=((1,),), generations=((1,),),
        num_tokens=4, page_size=4,
    )  # fmt: skip
    with World() as world:
        world.driver.start([Unlease(connector=0, request_id="r")])
        world.driver.start(
            [
                Load(
                    move_id=1,
                    connector=0,
                    request_id="r",
                    first_page=0,
                    pages=((1,),),
                    num_tokens=4,
                    source=source,
                )
            ]
        )
        (event,) = world.wait(1)
        assert loaded(event).error == "a host tier cannot load from a peer"


@pytest.mark.parametrize("end", ["moved", "closed"])
def test_when_the_pool_moves_or_the_tier_closes_nobody_copies_any_more(end):
    with World() as world:
        gate = world.pool.gate = threading.Event()
        world.driver.start([store(1, [1], [1]), store(2, [2], [2]), store(3, [3], [3])])
        assert world.pool.reached.wait(30)
        regions = (Region(address=0, page_bytes=PAGE_BYTES, num_pages=NUM_PAGES),)
        copied_when_done: list[int] = []

        def finish() -> None:
            if end == "moved":
                world.driver.pool_moved(regions)
            else:
                world.driver.close()
            copied_when_done.append(len(world.pool.log))

        ending = threading.Thread(target=finish)
        ending.start()
        while not world.driver.poll():  # the queued ones are failed before the wait
            pass
        assert not copied_when_done, "it waits for the copy that is under way"
        gate.set()
        ending.join(30)
        assert copied_when_done == [1] and len(world.pool.log) == 1
        (event,) = world.driver.poll()
        assert isinstance(event, Stored) and event.move_id == 1 and event.error is not None
        assert world.pool.regions == ([regions] if end == "moved" else [])
        world.pool.gate = None
        world.driver.start([store(4, [4], [4])])
        (event,) = world.wait(1)
        assert isinstance(event, Stored)
        assert event.error == (None if end == "moved" else "the host tier is closed")


def test_a_load_that_was_under_way_when_the_pool_moved_brought_nothing():
    with World() as world:
        world.driver.start([store(1, range(1, 41), range(1, 41))])
        world.wait(1)
        gate = world.pool.gate = threading.Event()
        world.driver.start([load(2, [range(100, 140)], [range(1, 41)]), store(3, [1], [1])])
        assert world.pool.reached.wait(30)
        moving = threading.Thread(target=world.driver.pool_moved, args=((),))
        moving.start()
        while not world.driver.poll():  # the store is failed before the wait for the load
            pass
        gate.set()
        moving.join(30)
        event = loaded(world.wait(1)[0])
        assert (event.error, event.num_pages) == ("the page buffer has moved", 0)


@pytest.mark.parametrize("flipped", [1, 40, 90])
def test_a_flipped_bit_in_host_memory_is_found_and_the_pages_before_it_arrive(flipped):
    with World(digest=True) as world:
        before = world.pool.pages.copy()
        slots = list(range(1, 91))
        world.driver.start([store(1, range(1, 91), slots)])
        world.wait(1)
        world.driver.memory[flipped - 1, 17] ^= 4
        world.pool.pages[:] = 0
        world.driver.start([load(2, [range(100, 190), [0] * 90], [slots, [0] * 90])])
        event = loaded(world.wait(1)[0])
        assert (event.num_pages, event.digest_failures, event.stage) == (flipped - 1, 1, "verify")
        assert event.error == "a page in host memory is not what was stored there"
        good = flipped - 1
        assert np.array_equal(world.pool.pages[100 : 100 + good], before[1 : 1 + good])
        assert not world.pool.pages[100 + good :].any(), "the bad page was not even copied"


def test_a_bad_page_of_any_group_ends_what_arrived():
    with World(digest=True, queued=True) as world:
        world.driver.start([store(1, [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6])])
        world.run()
        world.driver.memory[4, 0] ^= 1
        world.driver.start([load(2, [[10, 11, 12], [0, 14, 15]], [[1, 2, 3], [0, 5, 6]])])
        world.run()
        assert loaded(world.driver.poll()[1]).num_pages == 1


def test_a_slot_whose_last_store_failed_is_not_loaded_with_digests():
    with World(digest=True, queued=True) as world:
        world.driver.start([store(1, [1], [1])])
        world.run()
        world.pool.fail_on = 2
        world.driver.start([store(2, [2], [1]), load(3, [[9]], [[1]])])
        world.run()
        world.driver.start([load(4, [[9]], [[1]])])
        world.run()
        last = loaded(world.driver.poll()[-1])
        assert (last.num_pages, last.stage) == (0, "verify")


def test_the_region_is_page_aligned_and_not_rounded_up():
    with World(slots=3, queued=True) as world:
        assert world.driver.memory.shape == (3, PAGE_BYTES)
        assert world.driver.memory.ctypes.data % 4096 == 0
        assert not world.driver.memory.any()


def test_memory_that_cannot_be_reserved_is_one_clear_line():
    with pytest.raises(ValueError, match=r"^\d+ host pages of 4096 bytes cannot be reserved: [^\n]*$"):
        HostDriver(1 << 60, 4096, Pool(), wake=lambda: None, clock=lambda: 0.0)


@pytest.mark.parametrize("by_address", [True, False])
def test_pages_of_a_real_pool_go_and_come_back_while_steps_donate_it(by_address):
    group = PageGroup(name="all", layers=(0, 1), kv_heads=2, head_dim=8)
    spec = KvSpec(groups=(group,), page_size=4, dtype="bfloat16")
    lock, pool = threading.Lock(), [pools.create(spec, 12)]
    step = jax.jit(lambda pages: pages.at[11].set(pages[11] + 1), donate_argnums=0)

    def run_step() -> None:
        with lock:
            pool[0] = step(pool[0])

    def put(pages: jax.Array) -> None:
        pool[0] = pages

    regions = pools.regions(pool[0], spec.page_bytes)
    direct = PointerCopies(regions)
    copies = direct if by_address else ProgramCopies(lambda: pool[0], put, lock=lock)
    content = np.random.default_rng(2).integers(0, 256, (8, spec.page_bytes), np.uint8)
    direct.write(range(1, 9), content)
    woken = threading.Event()
    driver = HostDriver(8, spec.page_bytes, copies, wake=woken.set, clock=lambda: 0.0, digest=digest_rows)
    commands = [
        store(1, [1, 2, 3, 4], [8, 1, 2, 3]),
        load(2, [[5, 6, 7, 8]], [[8, 1, 2, 3]]),
    ]
    for command in commands:
        driver.start([command])
        events: list[Event] = []
        while not events:
            run_step()
            events = driver.poll()
        assert isinstance(events[0], Loaded | Stored) and events[0].error is None
    driver.close()
    assert pools.regions(pool[0], spec.page_bytes) == regions, "nothing has copied the pool"
    out = np.zeros((8, spec.page_bytes), np.uint8)
    direct.read(range(1, 9), out)
    assert np.array_equal(out, np.concatenate([content[:4], content[:4]]))
