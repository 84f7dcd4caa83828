"""The pool as others see it: where it lies, that it stays there, and that no step erases what they write."""

import ctypes
import os
import subprocess
import sys
import threading
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kv.driver import Region
from kv.pool import ExportError, create, pointer, regions
from kv.types import KvSpec, PageGroup
from pallas_kernels.kv_write import kv_write

LAYERS, HEADS, PAGE_SIZE, HEAD_DIM = 3, 2, 16, 8
NUM_PAGES = 512
OURS = 8
"""Pages `[1, OURS)` and the dummy page are the step's, the others belong to whoever writes from outside."""


def spec(dtype: str) -> KvSpec:
    group = PageGroup(name="all", layers=tuple(range(LAYERS)), kv_heads=HEADS, head_dim=HEAD_DIM)
    return KvSpec(groups=(group,), page_size=PAGE_SIZE, dtype=dtype)


@partial(jax.jit, donate_argnums=0, static_argnames="kv_dtype")
def step(pages: jax.Array, x: jax.Array, ids: jax.Array, offsets: jax.Array, *, kv_dtype: str) -> jax.Array:
    """Writes K = x and V = -x of a step's tokens in every layer, as the model's step does."""
    for layer in range(LAYERS):
        pages = kv_write(pages, x + layer, -x - layer, ids, offsets, layer, kv_dtype=kv_dtype)
    return pages


def tokens(number: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x, pages, offsets) of eight tokens, others in each step."""
    x = jnp.full((8, HEADS, HEAD_DIM), float(number % 100), jnp.float32)
    ids = 1 + (jnp.arange(8, dtype=jnp.int32) + number) % (OURS - 1)
    return x, ids, jnp.full(8, number % PAGE_SIZE, jnp.int32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_pool_is_one_region_where_jax_says(dtype: str) -> None:
    shape = spec(dtype)
    pages = create(shape, NUM_PAGES)
    (region,) = regions(pages, shape.page_bytes)
    assert region == Region(address=pointer(pages), page_bytes=shape.page_bytes, num_pages=NUM_PAGES)
    assert (region.device, region.num_bytes) == ("cpu", pages.nbytes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_after_an_export_donated_steps_stay_in_place(dtype: str) -> None:
    shape = spec(dtype)
    pages = create(shape, NUM_PAGES)
    before = regions(pages, shape.page_bytes)
    for number in range(20):
        old = pages
        pages = step(old, *tokens(number), kv_dtype=dtype)
        assert old.is_deleted(), "a view of the buffer was left behind: the step copied it"
        assert pointer(pages) == before[0].address
        if number % 5 == 0:
            assert regions(pages, shape.page_bytes) == before


def test_a_view_that_stays_is_what_the_export_must_not_leave() -> None:
    """The fault that the test above would find: with a view held, donation copies."""
    shape = spec("bfloat16")
    pages = create(shape, NUM_PAGES)
    address = pointer(pages)
    capsule = pages.__dlpack__()
    pages = step(pages, *tokens(1), kv_dtype="bfloat16")
    assert pointer(pages) != address
    del capsule


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_byte_that_is_written_from_outside_during_steps_is_found(dtype: str) -> None:
    shape = spec(dtype)
    pages = step(create(shape, NUM_PAGES), *tokens(0), kv_dtype=dtype)
    (region,) = regions(pages, shape.page_bytes)
    rows = np.random.default_rng(7).integers(0, 256, (NUM_PAGES, region.page_bytes), np.uint8)
    turns, written = threading.Semaphore(0), threading.Event()

    def write() -> None:
        for page in range(OURS, NUM_PAGES):
            if page % 2 == 0:
                turns.acquire()
            ctypes.memmove(
                region.address + page * region.page_bytes, rows[page].ctypes.data, region.page_bytes
            )
        written.set()

    writer = threading.Thread(target=write)
    writer.start()
    number = 0
    # Each step sets off the write of two pages and does not wait for it.
    while not written.is_set():
        number += 1
        old, ahead = pages, tokens(number)
        turns.release()
        pages = step(old, *ahead, kv_dtype=dtype)
        assert old.is_deleted() and pointer(pages) == region.address
    writer.join()
    pages = step(pages, *tokens(number + 1), kv_dtype=dtype)
    found = np.asarray(pages).view(np.uint8).reshape(NUM_PAGES, region.page_bytes)
    lost = np.flatnonzero((found[OURS:] != rows[OURS:]).any(axis=1))
    assert lost.size == 0, f"{lost.size} of {NUM_PAGES - OURS} pages lost what was written into them"

    # The step's own pages hold what the same steps write with nobody beside them.
    alone = create(shape, NUM_PAGES)
    for again in range(number + 2):
        alone = step(alone, *tokens(again), kv_dtype=dtype)
    assert np.array_equal(np.asarray(alone)[:OURS], np.asarray(pages)[:OURS])


SHARDED = """
import ctypes, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kv.pool import regions

mesh = Mesh(np.array(jax.devices()), ("heads",))
sharding = NamedSharding(mesh, PartitionSpec(None, None, None, "heads"))
pages = jax.device_put(jnp.zeros((32, 2, 2, 4, 16, 8), jnp.uint16), sharding)
page_bytes = pages.nbytes // 32
step = jax.jit(lambda pages, n: pages.at[0].set(n), donate_argnums=0, out_shardings=sharding)
pages = step(pages, jnp.uint16(1))
found = regions(pages, page_bytes)
assert len(found) == 4 == len({region.address for region in found})
assert all(region.page_bytes == page_bytes // 4 and region.num_pages == 32 for region in found)
for shard, region in enumerate(found):
    row = np.full(region.page_bytes // 2, 100 + shard, np.uint16)
    ctypes.memmove(region.address + 3 * region.page_bytes, row.ctypes.data, region.page_bytes)
for number in range(5):
    old, pages = pages, step(pages, jnp.uint16(number))
    assert old.is_deleted() and regions(pages, page_bytes) == found
whole = np.asarray(pages)
assert (whole[0] == 4).all() and not whole[4:].any()
for shard in range(4):
    assert (whole[3, :, :, shard] == 100 + shard).all()
print("four shards")
"""


def test_a_sharded_pool_has_a_region_per_device() -> None:
    # Only the CPU: a GPU's devices are not four.
    environment = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=4")
    command = [sys.executable, "-c", SHARDED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "four shards\n"


class Shard:
    """An array that looks like a shard and lies as a test wants."""

    def __init__(self, array: np.ndarray, *, shape: tuple[int, ...] | None = None, shift: int = 0) -> None:
        self._array = array
        self._shift = shift
        self.shape = shape or array.shape
        self.dtype = array.dtype
        self.nbytes = array.nbytes

    def __dlpack__(self) -> Any:
        return self._array.__dlpack__()

    def unsafe_buffer_pointer(self) -> int:
        return self._array.ctypes.data + self._shift


def pool_of(shard: Shard) -> Any:
    data = SimpleNamespace(data=shard, device=SimpleNamespace(id=0))
    return SimpleNamespace(shape=shard.shape, nbytes=shard.nbytes, addressable_shards=[data])


def test_a_pool_that_lies_otherwise_is_refused() -> None:
    whole = np.zeros((6, 4, 8), np.uint16)
    assert regions(pool_of(Shard(whole)), 64)[0].address == whole.ctypes.data
    assert regions(pool_of(Shard(whole[2:])), 64)[0].address == whole.ctypes.data + 128
    thin = np.zeros((6, 2, 4), np.uint16)[:, :1]
    for shard, page_bytes, reason in (
        (Shard(whole), 63, "6 pages of 63 bytes"),
        (Shard(whole[::2]), 64, "not contiguous"),
        (Shard(whole.transpose(0, 2, 1)), 64, "not contiguous"),
        (Shard(thin), 8, "not contiguous"),
        (Shard(whole, shape=(6, 8, 4)), 64, "has shape"),
        (Shard(whole, shift=64), 64, "different addresses"),
    ):
        with pytest.raises(ExportError, match=reason):
            regions(pool_of(shard), page_bytes)
