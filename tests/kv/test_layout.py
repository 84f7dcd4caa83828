"""The host region's layout: every byte belongs to exactly one page, rank, layer, head and slot."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.layout import (
    KVCacheConfig,
    KVCacheTensor,
    cell_range,
    derive_cpu_config,
    describe_pool,
)
from kv.types import KvSpec, PageGroup


def spec_of(*, layers: int, heads: int, slots: int, dim: int, dtype: str = "bfloat16") -> KvSpec:
    group = PageGroup(name="all", layers=tuple(range(layers)), kv_heads=heads, head_dim=dim)
    return KvSpec(groups=(group,), page_size=slots, dtype=dtype)


def assert_tiles(ranges: list[tuple[int, int]], total: int) -> None:
    """In this order they follow one another without gap or overlap, from 0 to `total`."""
    at = 0
    for offset, length in ranges:
        assert offset == at and length > 0
        at += length
    assert at == total


@given(
    layers=st.integers(1, 3), heads_per_rank=st.integers(1, 3), ranks=st.integers(1, 3),
    pages=st.integers(1, 3), slots=st.sampled_from([1, 2, 4]), dim=st.integers(1, 5),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    rest=st.integers(0, 10**6),
)  # fmt: skip
def test_ranges_are_disjoint_and_cover_the_region(
    layers, heads_per_rank, ranks, pages, slots, dim, dtype, rest
):
    spec = spec_of(layers=layers, heads=heads_per_rank * ranks, slots=slots, dim=dim, dtype=dtype)
    pool = describe_pool(spec, 7, ranks=ranks)
    cpu = derive_cpu_config(pool, pages * spec.page_bytes + rest % spec.page_bytes)
    assert cpu.num_blocks == pages and cpu.page_bytes == spec.page_bytes
    total = pages * spec.page_bytes
    assert_tiles([cpu.page_range(page) for page in range(pages)], total)
    assert_tiles([cpu.rank_range(page, rank) for page, rank in product(range(pages), range(ranks))], total)
    places = product(range(pages), range(ranks), range(layers), range(2), range(heads_per_rank), range(slots))
    cells = [cell_range(spec, *place, ranks=ranks) for place in places]
    assert_tiles(cells, total)
    per_rank = len(cells) // (pages * ranks)
    for number, (page, rank) in enumerate(product(range(pages), range(ranks))):
        assert cells[number * per_rank][0] == cpu.rank_range(page, rank)[0]


def test_capacity_is_an_exact_division_without_rounding_to_powers_of_two():
    pool = describe_pool(spec_of(layers=30, heads=3, slots=16, dim=64, dtype="float32"), 100)
    page = 30 * 2 * 3 * 16 * 64 * 4
    assert derive_cpu_config(pool, 10**9).num_blocks == 10**9 // page
    assert derive_cpu_config(pool, 3 * page).num_blocks == 3
    assert derive_cpu_config(pool, 3 * page - 1).num_blocks == 2


def test_ranks_may_differ_in_bytes_and_come_in_any_order():
    tensors = (KVCacheTensor(size=30, rank=1), KVCacheTensor(size=50, rank=0))
    cpu = derive_cpu_config(KVCacheConfig(num_blocks=10, kv_cache_tensors=tensors, groups=()), 100)
    assert (cpu.num_blocks, cpu.rank_bytes) == (12, (5, 3))
    assert cpu.rank_range(2, 1) == (21, 3)


def test_less_than_one_page_is_refused_with_the_key_and_the_bytes_of_a_page():
    pool = describe_pool(spec_of(layers=1, heads=1, slots=1, dim=64), 4)
    with pytest.raises(ValueError, match=r"cpu_bytes_to_use is 255, .*one page .*256 bytes"):
        derive_cpu_config(pool, 255)


def test_a_pool_without_tensors_or_of_uneven_pages_is_refused():
    with pytest.raises(ValueError, match="kv_cache_tensors is empty"):
        derive_cpu_config(KVCacheConfig(num_blocks=4, kv_cache_tensors=(), groups=()), 1000)
    odd = KVCacheConfig(num_blocks=4, kv_cache_tensors=(KVCacheTensor(size=10),), groups=())
    with pytest.raises(ValueError, match="10 bytes cannot be cut into 4"):
        derive_cpu_config(odd, 1000)
    none = KVCacheConfig(num_blocks=0, kv_cache_tensors=(KVCacheTensor(size=10),), groups=())
    with pytest.raises(ValueError, match="0 pages"):
        derive_cpu_config(none, 1000)


def test_heads_that_ranks_cannot_share_and_cells_outside_a_page_are_refused():
    spec = spec_of(layers=1, heads=3, slots=1, dim=4)
    with pytest.raises(ValueError, match="3 KV heads"):
        describe_pool(spec, 4, ranks=2)
    with pytest.raises(IndexError, match="there are 3"):
        cell_range(spec, 0, 0, 0, 0, 3, 0)
