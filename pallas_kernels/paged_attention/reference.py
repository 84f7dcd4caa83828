"""Ragged paged attention in plain JAX: the answer the kernel is held to, and the fast path on a CPU.

Softmax runs online over tiles of KV (FlashAttention, Dao et al., 2022), so that only the pages of one
tile are gathered at a time, and the loops run as often as there are tiles with visible tokens: a wide
page table costs nothing. Tiles have one size and lie at fixed positions of the sequence, and a tile that
a query cannot see leaves its sums bitwise unchanged; so the result of a row does not depend on how long
the other rows are.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_attention.call import Call
from pallas_kernels.paged_attention.tiles import XLA_TILES, XlaTiles
from pallas_kernels.pages import BITS

NO_SCORE = -1e30
"""Stands for minus infinity: the difference of two is 0, not NaN."""

Sums = tuple[jax.Array, jax.Array, jax.Array]
"""What online softmax carries, float32: the largest score so far and the sum of weights relative to it
`[B, K, R]`, and the weighted sum of values `[B, K, R, D]`; R are the queries that share a KV head."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Tile:
    """Where one tile of KV lies, for B rows at once.

    Attributes:
        pages: int32 `[B, n]`, page ids.
        read: bool `[B, n * C]`, slots that some query sees; the others may hold anything.
        seen: bool, broadcasts to `[B, K, R, n * C]`: what each query sees.
    """

    pages: jax.Array
    read: jax.Array
    seen: jax.Array


def attend(call: Call) -> jax.Array:
    """See `pallas_kernels.paged_attention.ragged_paged_attention`."""
    if call.uniform:
        return _chunk_rows(call, jnp.zeros_like(call.q))
    out = _decode_rows(call)
    return out if call.decodes_only else _chunk_rows(call, out)


def _decode_rows(call: Call) -> jax.Array:
    """`[T, H, D]`: the rows of one token, all at once, in as many turns as the longest needs; else zeros."""
    tokens, heads, head_dim = call.q.shape
    rows = call.page_table.shape[0]
    tile_pages = max(1, _tiles().decode_kv_tokens // call.page_size)
    tile_tokens = tile_pages * call.page_size
    is_decode = call.cu_q_lens[1:] - call.cu_q_lens[:-1] == 1
    ends = jnp.where(is_decode, call.kv_lens, 0)
    starts = jnp.zeros_like(ends)
    if call.sliding_window is not None:
        starts = jnp.maximum(ends - call.sliding_window, 0)
    first = starts // tile_tokens
    q = call.q.at[call.cu_q_lens[:-1]].get(mode="clip").astype(jnp.float32)
    q = q.reshape(rows, call.kv_heads, call.group, head_dim)

    def turn(number: jax.Array, sums: Sums) -> Sums:
        columns = (first + number)[:, None] * tile_pages + jnp.arange(tile_pages)
        positions = (first + number)[:, None] * tile_tokens + jnp.arange(tile_tokens)
        seen = (positions >= starts[:, None]) & (positions < ends[:, None])
        pages = call.page_table.at[jnp.arange(rows)[:, None], columns].get(mode="clip")
        return _add_tile(call, q, _Tile(pages=pages, read=seen, seen=seen[:, None, None]), sums)

    turns = jnp.max(-(-ends // tile_tokens) - first)
    result = _finish(lax.fori_loop(0, turns, turn, _empty_sums(call, rows, 1)))
    places = jnp.where(is_decode, call.cu_q_lens[:-1], tokens)
    result = result.reshape(rows, heads, head_dim).astype(call.q.dtype)
    return jnp.zeros_like(call.q).at[places].set(result, mode="drop")


def _chunk_rows(call: Call, out: jax.Array) -> jax.Array:
    """`out` with the rows of several tokens filled in, or with all; one tile of queries after another."""
    tokens, heads, head_dim = call.q.shape
    tiles = _tiles()
    size = min(tiles.uniform_queries if call.uniform else tiles.chunk_queries, 1 << (tokens - 1).bit_length())
    q_lens = call.cu_q_lens[1:] - call.cu_q_lens[:-1]
    counts = jnp.where(q_lens > (0 if call.uniform else 1), -(-q_lens // size), 0)
    ends = jnp.cumsum(counts)
    # Past the last token there must be room for a whole tile, or its slice would begin earlier.
    queries = jnp.pad(call.q, ((0, size), (0, 0), (0, 0)))
    out = jnp.pad(out, ((0, size), (0, 0), (0, 0)))

    def query_tile(number: jax.Array, out: jax.Array) -> jax.Array:
        row = jnp.sum(ends <= number)
        done = (number - ends[row] + counts[row]) * size
        start = call.cu_q_lens[row] + done
        q = lax.dynamic_slice_in_dim(queries, start, size)
        q = q.reshape(size, call.kv_heads, call.group, head_dim).transpose(1, 2, 0, 3)
        q = q.reshape(1, call.kv_heads, call.group * size, head_dim)
        sums = _chunk_sums(call, q, row, call.kv_lens[row] - q_lens[row] + done, size)
        result = _finish(sums).reshape(call.kv_heads, call.group, size, head_dim).transpose(2, 0, 1, 3)
        result = result.reshape(size, heads, head_dim).astype(out.dtype)
        mine = (done + jnp.arange(size) < q_lens[row])[:, None, None]
        old = lax.dynamic_slice_in_dim(out, start, size)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(mine, result, old), start, 0)

    return lax.fori_loop(0, ends[-1], query_tile, out)[:tokens]


def _chunk_sums(call: Call, q: jax.Array, row: jax.Array, position: jax.Array, size: int) -> Sums:
    """The sums of `size` queries of one row, the first at `position`; q is `[1, K, group * size, D]`."""
    tile_pages = max(1, _tiles().chunk_kv_tokens // call.page_size)
    tile_tokens = tile_pages * call.page_size
    own = jnp.tile(position + jnp.arange(size), call.group)[:, None]
    low = jnp.zeros_like(position)
    if call.sliding_window is not None:
        low = jnp.maximum(position - call.sliding_window + 1, 0)
    high = jnp.minimum(position + size, call.kv_lens[row])
    # In one type the products run at the speed of that type; a CPU has no fast float16.
    if not (call.q.dtype == jnp.bfloat16 and call.kv_dtype == "bfloat16"):
        q = q.astype(jnp.float32)

    def turn(number: jax.Array, sums: Sums) -> Sums:
        columns = number * tile_pages + jnp.arange(tile_pages)
        positions = number * tile_tokens + jnp.arange(tile_tokens)
        seen = (positions <= own) & (positions < high)
        if call.sliding_window is not None:
            seen &= positions > own - call.sliding_window
        pages = call.page_table.at[row, columns].get(mode="clip")
        read = (positions >= low) & (positions < high)
        return _add_tile(call, q, _Tile(pages=pages[None], read=read[None], seen=seen[None, None]), sums)

    return lax.fori_loop(low // tile_tokens, -(-high // tile_tokens), turn, _empty_sums(call, 1, size))


def _empty_sums(call: Call, rows: int, queries: int) -> Sums:
    """No tile added yet. A sink is one more score, there from the start, with weight and without value."""
    shape = (rows, call.kv_heads, call.group * queries)
    top = jnp.full(shape, NO_SCORE, jnp.float32)
    total = jnp.zeros(shape, jnp.float32)
    if call.sinks is not None:
        sinks = call.sinks.astype(jnp.float32).reshape(call.kv_heads, call.group)
        top = jnp.broadcast_to(jnp.repeat(sinks, queries, axis=1), shape)
        total = jnp.ones(shape, jnp.float32)
    return top, total, jnp.zeros((*shape, call.q.shape[2]), jnp.float32)


def _add_tile(call: Call, q: jax.Array, tile: _Tile, sums: Sums) -> Sums:
    """One turn of online softmax; q is `[B, K, R, D]` in the type of the products."""
    top, total, acc = sums
    keys = _load(call, tile, 0).astype(q.dtype)
    values = _load(call, tile, 1).astype(q.dtype)
    scores = _product("bkrd,bktd->bkrt", q, keys) * call.scale
    if call.soft_cap is not None:
        scores = call.soft_cap * jnp.tanh(scores / call.soft_cap)
    scores = jnp.where(tile.seen, scores, NO_SCORE)
    new_top = jnp.maximum(top, scores.max(-1))
    weights = jnp.where(tile.seen, jnp.exp(scores - new_top[..., None]), 0.0)
    decay = jnp.exp(top - new_top)
    added = jnp.einsum("bkrt,bktd->bkrd", weights.astype(q.dtype), values, preferred_element_type=jnp.float32)
    return new_top, total * decay + weights.sum(-1), acc * decay[..., None] + added


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A float32 product; float32 operands are never cut to tf32 on the way."""
    return jnp.einsum(subscripts, a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _load(call: Call, tile: _Tile, side: int) -> jax.Array:
    """`[B, K, n * C, D]` in KV dtype: K (side 0) or V (side 1) of a tile, 0 where nobody reads.

    A weight of 0 does not silence a NaN, so what is not read must become 0 itself. It does so as bits: a
    gather fused with `&` runs at memory speed on a CPU, where one fused with a select or alone does not.
    """
    unsigned = BITS[call.kv_dtype]
    rows, tile_pages = tile.pages.shape
    mask = -tile.read.astype(unsigned)
    bits = call.kv_pages.at[tile.pages, call.layer, side].get(mode="promise_in_bounds")
    bits = bits & mask.reshape(rows, tile_pages, 1, call.page_size, 1)
    bits = bits.swapaxes(1, 2).reshape(rows, call.kv_heads, tile_pages * call.page_size, -1)
    return lax.bitcast_convert_type(bits, jnp.dtype(call.kv_dtype))


def _finish(sums: Sums) -> jax.Array:
    """float32 `[B, K, R, D]`; zeros where a query saw nothing."""
    _, total, acc = sums
    return acc / jnp.where(total > 0, total, 1.0)[..., None]


def _tiles() -> XlaTiles:
    return XLA_TILES["cpu" if jax.default_backend() == "cpu" else "gpu"]
