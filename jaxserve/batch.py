"""A plan's rows as one packed integer array: a step uploads one array, whatever it runs."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kv.types import DUMMY_PAGE
from scheduler.types import Rows


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Bucket:
    """A compiled shape.

    Attributes:
        tokens: T. Where T == S the bucket holds decodes only, one token per row.
        rows: S.
    """

    tokens: int
    rows: int


class Batch(NamedTuple):
    """What the compiled step sees. T tokens, S rows, M pages per row.

    Attributes:
        tokens: int32 `[T]`.
        positions: int32 `[T]`, each token's place in its sequence.
        token_pages: int32 `[T]`, the page each token's KV goes to; the dummy page for padding.
        token_offsets: int32 `[T]`, the slot in that page.
        cu_q_lens: int32 `[S + 1]`.
        kv_lens: int32 `[S]`, after this step; 0 for padding rows.
        page_table: int32 `[S, M]`.
        last_tokens: int32 `[S]`, index of each row's last token.
        slots: int32 `[S]`; padding rows name the dummy slot.
        num_outputs: int32 `[S]`.
        samples: bool `[S]`.
    """

    tokens: jax.Array
    positions: jax.Array
    token_pages: jax.Array
    token_offsets: jax.Array
    cu_q_lens: jax.Array
    kv_lens: jax.Array
    page_table: jax.Array
    last_tokens: jax.Array
    slots: jax.Array
    num_outputs: jax.Array
    samples: jax.Array


def packed_size(bucket: Bucket, max_pages: int) -> int:
    """Length of the packed array: tokens, then per row its length, KV length, slot, output index, samples
    flag and page table."""
    return bucket.tokens + bucket.rows * (5 + max_pages)


def pack(rows: Rows, bucket: Bucket, *, max_pages: int, dummy_slot: int) -> np.ndarray:
    """Rows as int32 `[packed_size]`, padded to the bucket.

    Raises:
        ValueError: the rows do not fit the bucket.
    """
    count, total = len(rows), len(rows.tokens)
    if count > bucket.rows or total > bucket.tokens:
        raise ValueError(f"{count} rows of {total} tokens do not fit {bucket}")
    packed = np.zeros(packed_size(bucket, max_pages), np.int32)
    packed[:total] = rows.tokens
    columns = packed[bucket.tokens : bucket.tokens + 5 * bucket.rows].reshape(5, bucket.rows)
    columns[0, :count] = rows.lens
    columns[1, :count] = rows.starts + rows.lens
    columns[2] = dummy_slot
    columns[2, :count] = rows.slots
    columns[3, :count] = rows.num_outputs
    columns[4, :count] = rows.samples
    table = packed[bucket.tokens + 5 * bucket.rows :].reshape(bucket.rows, max_pages)
    pages = rows.page_tables[0]
    table[:count, : pages.shape[1]] = pages
    return packed


def unpack(packed: jax.Array, bucket: Bucket, *, max_pages: int, page_size: int) -> Batch:
    """The packed array as the step's inputs, inside the compiled program."""
    tokens_end, rows = bucket.tokens, bucket.rows
    columns = packed[tokens_end : tokens_end + 5 * rows].reshape(5, rows)
    lens, kv_lens, slots, num_outputs, samples = columns
    table = packed[tokens_end + 5 * rows :].reshape(rows, max_pages)
    ends = jnp.cumsum(lens, dtype=jnp.int32)
    cu_q_lens = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    places = jnp.arange(bucket.tokens, dtype=jnp.int32)
    real = places < ends[-1]
    owners = jnp.minimum(jnp.searchsorted(ends, places, side="right").astype(jnp.int32), rows - 1)
    positions = jnp.where(real, places - ends[owners] + kv_lens[owners], 0)
    return Batch(
        tokens=packed[:tokens_end],
        positions=positions,
        token_pages=jnp.where(real, table[owners, positions // page_size], DUMMY_PAGE),
        token_offsets=positions % page_size,
        cu_q_lens=cu_q_lens,
        kv_lens=kv_lens,
        page_table=table,
        last_tokens=jnp.maximum(ends - 1, 0),
        slots=slots,
        num_outputs=num_outputs,
        samples=samples > 0,
    )


def decode_buckets(max_rows: int) -> list[Bucket]:
    """Shapes of steps in which every row has one token. At least 2 rows: a CPU's bfloat16 product with one
    row converts the whole weight and is about 8 times slower than with two."""
    return [Bucket(tokens=rows, rows=rows) for rows in _doublings(2, max_rows)]


def mixed_buckets(max_tokens: int, max_rows: int) -> list[Bucket]:
    """Shapes of steps that hold prompt chunks: few rows or all of them, tokens in steps of 4."""
    largest = max(max_tokens, max_rows + 1)
    few = min(8, max_rows)
    sizes, tokens = [], 32
    while tokens < largest:
        sizes.append(tokens)
        tokens *= 4
    sizes.append(largest)
    rows = sorted({few, max_rows})
    return [Bucket(tokens=size, rows=count) for size in sizes for count in rows if size > count]


def choose(buckets: list[Bucket], rows: Rows) -> Bucket:
    """The smallest bucket that holds the rows. `buckets` hold decodes-only shapes and mixed ones.

    Raises:
        ValueError: none does.
    """
    decodes = len(rows.tokens) == len(rows)
    fitting = [
        bucket
        for bucket in buckets
        if bucket.tokens >= len(rows.tokens)
        and bucket.rows >= len(rows)
        and (decodes or bucket.tokens > bucket.rows)
    ]
    if not fitting:
        raise ValueError(f"no bucket holds {len(rows)} rows of {len(rows.tokens)} tokens")
    return min(fitting, key=lambda bucket: (bucket.tokens, bucket.rows))


def _doublings(first: int, largest: int) -> list[int]:
    sizes = []
    while first < largest:
        sizes.append(first)
        first *= 2
    return [*sizes, max(largest, 2)]
