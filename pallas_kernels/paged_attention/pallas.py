"""Ragged paged attention as one Pallas kernel.

It is FlashAttention (Dao et al., 2022) over pages (PagedAttention, Kwon et al., 2023).

A program computes a tile of queries of one row for one KV head. All query heads of that KV head are
lanes of the same tile, so that K and V are read once for the whole group. Decodes and chunks are two
launches of one kernel, because they want tiles of different sizes; both fill the same output. The
grid of chunks has room for the worst case, `T // tile_queries + S` tiles, and finds its row by bisection over
`cu_q_lens` (as vLLM's unified attention does); programs without work leave at once.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels._pallas import Launch, launch
from pallas_kernels.paged_attention.call import Call
from pallas_kernels.paged_attention.tiles import PALLAS_CPU, PallasTiles, PhaseTiles, gpu_tiles
from pallas_kernels.pages import BITS

NO_SCORE = -1e30
"""Stands for minus infinity: the difference of two is 0, not NaN."""

Ref = Any
"""A reference to an array in the device's memory, inside a kernel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Static:
    """What a launch is compiled for. Letters as in `ragged_paged_attention`.

    Attributes:
        chunks: find tiles of rows that may have several; else each row is one tile of one query.
        shortest: tokens of the shortest rows that are handled.
        lanes: queries times heads of a tile, a power of two.
        padded_group: query heads per KV head (`group`), padded to a power of two.
        padded_dim: `head_dim`, padded to a power of two.
        tile_queries: queries of a tile.
        tile_pages: pages read in one turn.
        product: type of the operands of products.
    """

    chunks: bool
    shortest: int
    rows: int
    tokens: int
    columns: int
    group: int
    padded_group: int
    head_dim: int
    padded_dim: int
    page_size: int
    lanes: int
    tile_queries: int
    tile_pages: int
    product: str
    kv_dtype: str
    scale: float
    sliding_window: int | None
    soft_cap: float | None
    has_sinks: bool


def attend(call: Call) -> jax.Array:
    """See `pallas_kernels.paged_attention.ragged_paged_attention`."""
    if call.uniform:
        return _launch(call, jnp.zeros_like(call.q), chunks=True)
    out = _launch(call, jnp.zeros_like(call.q), chunks=False)
    return out if call.decodes_only else _launch(call, out, chunks=True)


def _launch(call: Call, out: jax.Array, *, chunks: bool) -> jax.Array:
    """`out` with the rows of one token, or those of several, filled in; uniformly all."""
    gpu = gpu_tiles(call.kv_dtype, call.q.shape[2])
    cpu_launch, gpu_launch = (
        _bind(call, _phase(call, phases, chunks), chunks) for phases in (PALLAS_CPU, gpu)
    )
    operands = [call.layer.reshape(1), call.cu_q_lens, call.kv_lens, call.page_table, call.q, call.kv_pages]
    if call.sinks is not None:
        operands.append(call.sinks.astype(jnp.float32))
    name = "paged_attention_chunks" if chunks else "paged_attention_decodes"
    return launch(cpu_launch, gpu_launch, [*operands, out], name)


def _phase(call: Call, tiles: PallasTiles, chunks: bool) -> PhaseTiles:
    if call.uniform:
        return tiles.uniform
    return tiles.chunk if chunks else tiles.decode


def _bind(call: Call, tiles: PhaseTiles, chunks: bool) -> Launch:
    tokens, _, head_dim = call.q.shape
    rows, columns = call.page_table.shape
    padded_group = pl.next_power_of_2(call.group)
    queries = min(tiles.queries, pl.next_power_of_2(tokens)) if chunks else 1
    one_type = call.q.dtype == jnp.dtype(call.kv_dtype)
    static = _Static(
        chunks=chunks,
        shortest=1 if call.uniform or not chunks else 2,
        rows=rows,
        tokens=tokens,
        columns=columns,
        group=call.group,
        padded_group=padded_group,
        head_dim=head_dim,
        padded_dim=pl.next_power_of_2(head_dim),
        page_size=call.page_size,
        lanes=max(tiles.min_lanes, queries * padded_group),
        tile_queries=queries,
        tile_pages=max(1, tiles.kv_tokens // call.page_size),
        product=call.kv_dtype if one_type else "float32",
        kv_dtype=call.kv_dtype,
        scale=call.scale,
        sliding_window=call.sliding_window,
        soft_cap=call.soft_cap,
        has_sinks=call.sinks is not None,
    )
    number = tokens // queries + rows if chunks else rows
    return Launch(
        kernel=partial(_kernel, static=static),
        grid=(number, call.kv_heads),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def _kernel(
    layer_ref: Ref,
    starts_ref: Ref,
    kv_lens_ref: Ref,
    table_ref: Ref,
    q_ref: Ref,
    kv_ref: Ref,
    *rest: Ref,
    static: _Static,
) -> None:
    """One program: a tile of queries of one row for one KV head."""
    sinks_ref = rest[0] if static.has_sinks else None
    out_ref = rest[-1]
    number, head = pl.program_id(0), pl.program_id(1)
    row, done = number, jnp.int32(0)
    if static.chunks:
        row = _row_of(starts_ref, number, static)
        done = (number - starts_ref[row] // static.tile_queries - row) * static.tile_queries
    start = starts_ref[row]
    q_len = starts_ref[row + 1] - start
    wanted = (q_len >= static.shortest) & (done < q_len) if static.chunks else q_len == 1

    @pl.when(wanted)
    def _() -> None:
        lane = jnp.arange(static.lanes, dtype=jnp.int32)
        query, member = lane // static.padded_group, lane % static.padded_group
        live = (query < static.tile_queries) & (done + query < q_len) & (member < static.group)
        # A masked lane must not name the address of a live one: interpreted stores write all lanes.
        token = jnp.where(live, start + done + query, static.tokens)
        query_head = head * static.group + member
        dim = jnp.arange(static.padded_dim, dtype=jnp.int32)
        place = (token[:, None], query_head[:, None], dim[None, :])
        mask = live[:, None] & (dim < static.head_dim)[None, :]
        q = triton.load(q_ref.at[place], mask=mask, other=0.0).astype(static.product)
        first = kv_lens_ref[row] - q_len + done
        high = jnp.minimum(first + static.tile_queries, kv_lens_ref[row])
        top = jnp.full((static.lanes,), NO_SCORE, jnp.float32)
        total = jnp.zeros((static.lanes,), jnp.float32)
        if sinks_ref is not None:
            # A sink is one more score, there from the start, with weight and without value.
            top = triton.load(sinks_ref.at[query_head], mask=live, other=NO_SCORE)
            total = jnp.ones((static.lanes,), jnp.float32)
        acc = jnp.zeros((static.lanes, static.padded_dim), jnp.float32)
        turn = partial(
            _turn, kv_ref, table_ref, row, layer_ref[0], head, q, first + query, first, high, static
        )
        tile_tokens = static.tile_pages * static.page_size
        low = _first_seen(first, static) // tile_tokens
        _, total, acc = lax.fori_loop(low, pl.cdiv(high, tile_tokens), turn, (top, total, acc))
        result = acc / jnp.where(total > 0.0, total, 1.0)[:, None]
        triton.store(out_ref.at[place], result.astype(out_ref.dtype), mask=mask)


def _turn(
    kv_ref: Ref,
    table_ref: Ref,
    row: jax.Array,
    layer: jax.Array,
    head: jax.Array,
    q: jax.Array,
    own: jax.Array,
    first: jax.Array,
    high: jax.Array,
    static: _Static,
    number: jax.Array,
    sums: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One turn of online softmax: the tile `number` of KV for the queries at positions `own`."""
    top, total, acc = sums
    column = number * static.tile_pages + jnp.arange(static.tile_pages, dtype=jnp.int32)
    pages = triton.load(table_ref.at[row, column], mask=column < static.columns, other=0)
    tile_tokens = static.tile_pages * static.page_size
    position = number * tile_tokens + jnp.arange(tile_tokens, dtype=jnp.int32)
    # What no query sees is never read: it may be NaN, which no weight of 0 silences.
    read = (position >= _first_seen(first, static)) & (position < high)
    keys, values = (_load(kv_ref, pages, layer, side, head, read, static) for side in (0, 1))
    scores = _product(q, keys, 1, static) * static.scale
    if static.soft_cap is not None:
        scores = static.soft_cap * jnp.tanh(scores / static.soft_cap)
    seen = (position[None, :] <= own[:, None]) & (position < high)[None, :]
    if static.sliding_window is not None:
        seen &= position[None, :] > own[:, None] - static.sliding_window
    scores = jnp.where(seen, scores, NO_SCORE)
    new_top = jnp.maximum(top, jnp.max(scores, axis=1))
    weights = jnp.where(seen, jnp.exp(scores - new_top[:, None]), 0.0)
    decay = jnp.exp(top - new_top)
    added = _product(weights.astype(static.product), values, 0, static)
    return new_top, total * decay + jnp.sum(weights, axis=1), acc * decay[:, None] + added


def _load(
    kv_ref: Ref,
    pages: jax.Array,
    layer: jax.Array,
    side: int,
    head: jax.Array,
    read: jax.Array,
    static: _Static,
) -> jax.Array:
    """`[tile tokens, padded_dim]`: K (side 0) or V (side 1) of a tile, 0 where it is not to be read."""
    shape = (static.tile_pages, static.page_size, static.padded_dim)
    slot = jnp.arange(static.page_size, dtype=jnp.int32)[None, :, None]
    dim = jnp.arange(static.padded_dim, dtype=jnp.int32)[None, None, :]
    place = (pages[:, None, None], layer, side, head, slot, dim)
    mask = read.reshape(shape[:2])[:, :, None] & (dim < static.head_dim)
    zero = jnp.zeros((), BITS[static.kv_dtype])
    bits = triton.load(kv_ref.at[place], mask=jnp.broadcast_to(mask, shape), other=zero)
    bits = bits.reshape(shape[0] * shape[1], shape[2])
    return lax.bitcast_convert_type(bits, jnp.dtype(static.kv_dtype)).astype(static.product)


def _product(a: jax.Array, b: jax.Array, contracted: int, static: _Static) -> jax.Array:
    """float32 `a @ b`, or `a @ b.T` where axis 1 of `b` is contracted; float32 is never cut to tf32."""
    return lax.dot_general(
        a,
        b,
        (((1,), (contracted,)), ((), ())),
        precision=lax.Precision.HIGHEST if static.product == "float32" else None,
        preferred_element_type=jnp.float32,
    )


def _first_seen(first: jax.Array, static: _Static) -> jax.Array:
    """The first position that a query at `first` sees."""
    if static.sliding_window is None:
        return jnp.zeros_like(first)
    return jnp.maximum(first - static.sliding_window + 1, 0)


def _row_of(starts_ref: Ref, number: jax.Array, static: _Static) -> jax.Array:
    """The last row whose tiles begin at or before this one: those of row `r` from `starts[r] // size + r`."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) // 2
        here = starts_ref[middle] // static.tile_queries + middle <= number
        return jnp.where(here, middle, low), jnp.where(here, high, middle)

    bounds = (jnp.int32(0), jnp.int32(static.rows))
    return lax.fori_loop(0, static.rows.bit_length(), halve, bounds)[0]
