"""Two ways to copy pages out of the pool and into it, from outside the compiled step.

`PointerCopies` reads and writes through the pool's address: one plain memory copy per run of pages, for pools
in host memory. `ProgramCopies` runs two compiled programs and works on any device. Tests compare them.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import accumulate

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from kv.driver import Region
from kv.types import DUMMY_PAGE

PAGES_PER_CALL = 64
"""Most pages that one program takes: bounds what it needs of the device's memory beside the pool."""


class PointerCopies:
    """Copies between rows and pages of a pool in host memory, by address.

    JAX knows nothing of the views that are made here, so they never turn a donation into a copy. NumPy lets
    other threads run while it copies. Pages must not be under a step's hand meanwhile.
    """

    def __init__(self, regions: Sequence[Region]) -> None:
        """Args: regions: the shards, in the order of their ranks; a row is their parts one after another.

        Raises:
            ValueError: no region, or one in another device's memory.
        """
        self._views: list[tuple[slice, np.ndarray]] = []
        self._num_pages = self._page_bytes = 0
        self.pool_moved(regions)

    def pool_moved(self, regions: Sequence[Region]) -> None:
        """The pool lies elsewhere; copies that begin from now on go there.

        Raises:
            ValueError: no region, or one in another device's memory.
        """
        if not regions or any(region.device != "cpu" for region in regions):
            raise ValueError("pages can be copied by address only where the pool is in host memory")
        self._num_pages = min(region.num_pages for region in regions)
        ends = list(accumulate(region.page_bytes for region in regions))
        self._page_bytes = ends[-1]
        self._views = [
            (slice(end - region.page_bytes, end), _view(region))
            for end, region in zip(ends, regions, strict=True)
        ]

    def read(self, pages: Sequence[int], out: np.ndarray) -> None:
        """Copies pages into the rows of `out`, uint8 `[n, page_bytes]`."""
        _check(pages, out, self._num_pages, self._page_bytes)
        for first, last in runs(pages):
            page = pages[first]
            for columns, view in self._views:
                out[first:last, columns] = view[page : page + last - first]

    def write(self, pages: Sequence[int], rows: np.ndarray) -> None:
        """Copies rows, uint8 `[n, page_bytes]`, into pages."""
        _check(pages, rows, self._num_pages, self._page_bytes)
        for first, last in runs(pages):
            page = pages[first]
            for columns, view in self._views:
                view[page : page + last - first] = rows[first:last, columns]


class ProgramCopies:
    """Copies between rows and pages of a pool on any device, through two compiled programs.

    The read gathers pages and leaves the pool as it is; the write donates the pool and puts back what it got.
    `lock` keeps the step, which donates the pool too, from running between `get` and `put`.
    """

    def __init__(
        self,
        get: Callable[[], jax.Array],
        put: Callable[[jax.Array], None],
        *,
        lock: AbstractContextManager[object],
        ranks: int = 1,
    ) -> None:
        """Args: get, put: the pool, raw bits `[pages, layers, 2, kv_heads, page_size, head_dim]`. lock: held
        also by whoever else donates the pool. ranks: a row is this many shards of the KV heads in turn."""
        self._get = get
        self._put = put
        self._lock = lock
        self._ranks = ranks

    def pool_moved(self, regions: Sequence[Region]) -> None:
        """Nothing to do: the pool is asked for at each copy."""

    def read(self, pages: Sequence[int], out: np.ndarray) -> None:
        """Copies pages into the rows of `out`, uint8 `[n, page_bytes]`."""
        for first, last, indices in self._calls(pages, out):
            with self._lock:
                gathered = gather(self._get(), indices, ranks=self._ranks)
            parts = np.asarray(gathered)[: last - first]
            out[first:last] = parts.reshape(last - first, -1).view(np.uint8)

    def write(self, pages: Sequence[int], rows: np.ndarray) -> None:
        """Copies rows, uint8 `[n, page_bytes]`, into pages."""
        for first, last, indices in self._calls(pages, rows):
            padded = np.zeros((len(indices), rows.shape[1]), np.uint8)
            padded[: last - first] = rows[first:last]
            with self._lock:
                pool = self._get()
                bits = padded.view(np.dtype(f"u{pool.dtype.itemsize}"))
                sharding = pool.sharding if self._ranks > 1 else None
                self._put(scatter(pool, indices, bits, ranks=self._ranks, sharding=sharding))

    def _calls(self, pages: Sequence[int], rows: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """Cuts pages into calls of a power of two; the dummy page fills up the last one.

        Raises:
            ValueError: pages that the pool does not have, or rows of another size.
        """
        with self._lock:
            pool = self._get()
            num_pages, width = pool.shape[0], pool.nbytes // pool.shape[0]
        _check(pages, rows, num_pages, width)
        for first in range(0, len(pages), PAGES_PER_CALL):
            last = min(first + PAGES_PER_CALL, len(pages))
            indices = np.full(1 << (last - first - 1).bit_length(), DUMMY_PAGE, np.int32)
            indices[: last - first] = pages[first:last]
            yield first, last, indices


@partial(jax.jit, static_argnames="ranks")
def gather(pool: jax.Array, indices: jax.Array | np.ndarray, *, ranks: int) -> jax.Array:
    """Pages of the pool, `[n, ranks, layers, 2, kv_heads / ranks, page_size, head_dim]`."""
    rows = pool.at[indices].get(mode="promise_in_bounds")
    count, layers, two, heads, slots, head_dim = rows.shape
    parts = rows.reshape(count, layers, two, ranks, heads // ranks, slots, head_dim)
    return jnp.moveaxis(parts, 3, 1)


@partial(jax.jit, static_argnames=("ranks", "sharding"), donate_argnames="pool")
def scatter(
    pool: jax.Array,
    indices: jax.Array | np.ndarray,
    bits: jax.Array | np.ndarray,
    *,
    ranks: int,
    sharding: Sharding | None = None,
) -> jax.Array:
    """The pool with rows put into pages, in place. Args: bits: `[n, elements]`, the pool's unsigned type.
    sharding: the pool's, which it keeps; None: it is not sharded."""
    _, layers, two, heads, slots, head_dim = pool.shape
    parts = bits.reshape(len(bits), ranks, layers, two, heads // ranks, slots, head_dim)
    rows = jnp.moveaxis(parts, 1, 3).reshape(len(bits), *pool.shape[1:])
    pool = pool.at[indices].set(rows, mode="promise_in_bounds")
    return pool if sharding is None else jax.lax.with_sharding_constraint(pool, sharding)


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Index ranges `[first, last)` of neighbours: each number is one more than the one before."""
    first = 0
    for index in range(1, len(numbers) + 1):
        if index == len(numbers) or numbers[index] != numbers[index - 1] + 1:
            yield first, index
            first = index


def _check(pages: Sequence[int], rows: np.ndarray, num_pages: int, page_bytes: int) -> None:
    """A wrong index would read or write memory that is not the pool's.

    Raises:
        ValueError: pages that the pool does not have, or rows of another number or size.
    """
    if rows.dtype != np.uint8 or rows.shape != (len(pages), page_bytes):
        raise ValueError(f"{len(pages)} rows of {page_bytes} bytes are needed, got {rows.dtype} {rows.shape}")
    if pages and not 0 <= min(pages) <= max(pages) < num_pages:
        raise ValueError(f"pages {min(pages)} to {max(pages)} asked, the pool has {num_pages}")


def _view(region: Region) -> np.ndarray:
    """The region as uint8 `[pages, page_bytes]`, without JAX's knowledge."""
    buffer = (ctypes.c_uint8 * region.num_bytes).from_address(region.address)
    return np.frombuffer(memoryview(buffer), np.uint8).reshape(region.num_pages, region.page_bytes)
