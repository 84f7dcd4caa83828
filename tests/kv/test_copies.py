"""Copies by address and by compiled programs do the same, and neither copies the pool."""

import ctypes
from contextlib import nullcontext
from itertools import pairwise
from threading import Lock

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv import pool as pools
from kv.copies import PointerCopies, ProgramCopies, gather, runs, scatter
from kv.driver import PageCopies, Region
from kv.types import KvSpec, PageGroup

PAGES = 9


def spec_of(dtype: str = "bfloat16", heads: int = 2) -> KvSpec:
    return KvSpec(
        groups=(PageGroup(name="all", layers=(0, 1, 2), kv_heads=heads, head_dim=8),),
        page_size=4,
        dtype=dtype,
    )


class World:
    """A JAX pool with known bytes, seen by both kinds of copies."""

    def __init__(self, dtype: str = "bfloat16", pages: int = PAGES) -> None:
        self.spec = spec_of(dtype)
        shape = pools.create(self.spec, pages).shape
        kind = {2: np.uint16, 4: np.uint32}[self.spec.page_bytes // int(np.prod(shape[1:]))]
        self.bits = np.random.default_rng(0).integers(0, 2**16, shape).astype(kind)
        self.pool = jax.block_until_ready(jax.numpy.array(self.bits, copy=True))
        self.programs = ProgramCopies(lambda: self.pool, self.put, lock=Lock())

    def put(self, pool: jax.Array) -> None:
        self.pool = pool

    def region(self) -> Region:
        jax.block_until_ready(self.pool)
        return Region(
            address=pools.pointer(self.pool), page_bytes=self.spec.page_bytes, num_pages=len(self.bits)
        )

    def pointers(self) -> PointerCopies:
        return PointerCopies((self.region(),))

    def rows(self) -> np.ndarray:
        """All pages as they are now."""
        jax.block_until_ready(self.pool)
        raw = ctypes.string_at(pools.pointer(self.pool), self.bits.nbytes)
        return np.frombuffer(raw, np.uint8).reshape(len(self.bits), -1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_both_read_and_write_the_same_pages(dtype, data):
    world = World(dtype)
    pages = data.draw(st.lists(st.integers(1, PAGES - 1), unique=True))
    expected = world.rows().copy()
    for copies in (world.pointers(), world.programs):
        out = np.zeros((len(pages), world.spec.page_bytes), np.uint8)
        copies.read(pages, out)
        assert np.array_equal(out, expected[pages])
    for number, copies in enumerate((world.programs, world.pointers())):
        rows = np.random.default_rng(number).integers(0, 256, (len(pages), world.spec.page_bytes), np.uint8)
        copies.write(pages, rows)
        expected[pages] = rows
        got = world.rows()
        assert np.array_equal(got[1:], expected[1:]), "these pages and no others"


def test_many_pages_go_in_several_calls():
    world = World(pages=150)
    pages = list(range(149, 10, -1))
    out = np.zeros((len(pages), world.spec.page_bytes), np.uint8)
    world.programs.read(pages, out)
    assert np.array_equal(out, world.rows()[pages])
    world.programs.write(pages[::-1], out)
    assert np.array_equal(world.rows()[11:], out)


def test_a_row_is_the_shards_one_after_another_for_both():
    world = World()
    halves = [np.ascontiguousarray(world.bits[:, :, :, head : head + 1]) for head in range(2)]
    pointers = PointerCopies(
        [
            Region(address=half.ctypes.data, page_bytes=half.nbytes // PAGES, num_pages=PAGES)
            for half in halves
        ]
    )
    programs = ProgramCopies(lambda: world.pool, world.put, lock=nullcontext(), ranks=2)
    pages = [5, 6, 2]
    outs = [np.zeros((3, world.spec.page_bytes), np.uint8) for _ in range(2)]
    pointers.read(pages, outs[0])
    programs.read(pages, outs[1])
    assert np.array_equal(outs[0], outs[1])
    assert outs[0][0].tobytes() == halves[0][5].tobytes() + halves[1][5].tobytes()
    pointers.write([1, 3, 4], outs[0])
    programs.write([1, 3, 4], outs[1])
    now = world.rows().view(np.uint16).reshape(world.bits.shape)
    for head in range(2):
        assert np.array_equal(now[1:, :, :, head], halves[head][1:, :, :, 0])


def test_no_program_holds_a_copy_of_the_pool():
    world = World(pages=200)
    indices = np.arange(4, dtype=np.int32)
    bits = np.zeros((4, world.spec.page_bytes // 2), np.uint16)
    write = scatter.lower(world.pool, indices, bits, ranks=1).compile().memory_analysis()
    read = gather.lower(world.pool, indices, ranks=1).compile().memory_analysis()
    assert write.alias_size_in_bytes == world.pool.nbytes
    assert write.temp_size_in_bytes + read.temp_size_in_bytes < 8 * 4 * world.spec.page_bytes
    address = pools.pointer(world.pool)
    world.programs.write([1, 2], bits.view(np.uint8)[:2])
    assert pools.pointer(world.pool) == address


def test_an_index_outside_the_pool_or_a_row_of_another_size_is_refused():
    world = World()
    row = np.zeros((1, world.spec.page_bytes), np.uint8)
    kinds: tuple[PageCopies, ...] = (world.pointers(), world.programs)
    for copies in kinds:
        for wrong in (-1, PAGES):
            with pytest.raises(ValueError, match=f"the pool has {PAGES}"):
                copies.read([wrong], row)
            with pytest.raises(ValueError, match=f"the pool has {PAGES}"):
                copies.write([wrong], row)
        for bad in (row[:, :-1], row.view(np.int8), row[:0]):
            with pytest.raises(ValueError, match="1 rows of"):
                copies.write([1], bad)


def test_a_pool_that_has_moved_is_copied_at_its_new_place():
    first, second = World(), World("float32")
    pointers = PointerCopies((first.region(),))
    pointers.pool_moved((second.region(),))
    out = np.zeros((2, second.spec.page_bytes), np.uint8)
    pointers.read([3, 4], out)
    assert np.array_equal(out, second.rows()[3:5])


def test_memory_of_another_device_has_no_address_here():
    for regions in ((), (Region(address=1, page_bytes=8, num_pages=2, device="cuda"),)):
        with pytest.raises(ValueError, match="host memory"):
            PointerCopies(regions)


@given(st.lists(st.integers(0, 6)))
def test_runs_are_the_longest_stretches_of_neighbours(numbers):
    found = list(runs(numbers))
    assert [index for low, high in found for index in range(low, high)] == list(range(len(numbers)))
    for low, high in found:
        assert numbers[low:high] == list(range(numbers[low], numbers[low] + high - low))
    for (_, end), (begin, _) in pairwise(found):
        assert end == begin and numbers[begin] != numbers[end - 1] + 1
