"""Attention as one would explain it: float64, one query at a time, no tiles. And batches to try it on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.pages import BITS


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Everything that a compiled program depends on, but for the rule of attention.

    Attributes are the letters of `ragged_paged_attention`: rows S, tokens T, columns M, pages P, layers L.
    """

    rows: int = 6
    tokens: int = 160
    columns: int = 64
    pages: int = 200
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    kv_dtype: str = "float32"
    q_dtype: str = "float32"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Arguments of `ragged_paged_attention`."""

    shape: Shape
    q: jax.Array
    kv_pages: jax.Array
    page_table: jax.Array
    cu_q_lens: jax.Array
    kv_lens: jax.Array
    layer: int

    @property
    def arguments(self) -> tuple[jax.Array | int, ...]:
        """The positional arguments, in order."""
        return self.q, self.kv_pages, self.page_table, self.cu_q_lens, self.kv_lens, self.layer


def to_bits(values: np.ndarray, kv_dtype: str) -> np.ndarray:
    """`values` rounded to `kv_dtype`, as the page buffer holds them."""
    return np.asarray(values).astype(jnp.dtype(kv_dtype)).view(np.dtype(BITS[kv_dtype]))


def to_float(bits: np.ndarray, kv_dtype: str) -> np.ndarray:
    """float64 of what the page buffer holds."""
    return np.asarray(bits).view(jnp.dtype(kv_dtype)).astype(np.float64)


def make_batch(shape: Shape, lens: Sequence[tuple[int, int]], seed: int = 0, share: bool = False) -> Batch:
    """A batch of `(q_len, kv_len)` rows over a shuffled page table, padded to `shape`.

    With `share`, the rows have the pages of the first row as far as all of them hold computed tokens.
    """
    rng = np.random.default_rng(seed)
    counts = [-(-kv_len // shape.page_size) for _, kv_len in lens]
    free = [int(page) for page in rng.permutation(np.arange(1, shape.pages))]
    table = np.zeros((shape.rows, shape.columns), np.int32)
    common = min(kv_len - q_len for q_len, kv_len in lens) // shape.page_size if share else 0
    for row, count in enumerate(counts):
        table[row, :count] = [free.pop() for _ in range(count)]
        table[row, :common] = table[0, :common]
    padding = [(0, 0)] * (shape.rows - len(lens))
    q_lens, kv_lens = np.array([*lens, *padding], np.int32).T
    page = (shape.layers, 2, shape.kv_heads, shape.page_size, shape.head_dim)
    values = rng.standard_normal((shape.pages, *page), np.float32)
    q = rng.standard_normal((shape.tokens, shape.heads, shape.head_dim), np.float32)
    return Batch(
        shape=shape,
        q=jnp.asarray(q).astype(shape.q_dtype),
        kv_pages=jnp.asarray(to_bits(values, shape.kv_dtype)),
        page_table=jnp.asarray(table),
        cu_q_lens=jnp.asarray(np.concatenate([[0], np.cumsum(q_lens)]), jnp.int32),
        kv_lens=jnp.asarray(kv_lens),
        layer=int(rng.integers(shape.layers)),
    )


def poison(batch: Batch, sliding_window: int | None = None) -> Batch:
    """NaN in every slot that no query sees, other layers' included, and in the queries of no row.

    Pages that the window has left behind are replaced by the dummy page, as a scheduler does.
    """
    shape = batch.shape
    table, starts, kv_lens = (np.array(x) for x in (batch.page_table, batch.cu_q_lens, batch.kv_lens))
    old = np.asarray(batch.kv_pages)
    nan = to_bits(np.array([np.nan]), shape.kv_dtype)[0]
    pages = np.full_like(old, nan)
    for row, kv_len in enumerate(kv_lens):
        low = 0
        if sliding_window is not None:
            low = max(0, kv_len - (starts[row + 1] - starts[row]) - sliding_window + 1)
        positions = np.arange(low, kv_len)
        ids, offsets = table[row, positions // shape.page_size], positions % shape.page_size
        pages[ids, batch.layer, :, :, offsets] = old[ids, batch.layer, :, :, offsets]
        table[row, : low // shape.page_size] = 0
    q = batch.q.at[int(starts[-1]) :].set(jnp.nan)
    return replace(batch, q=q, kv_pages=jnp.asarray(pages), page_table=jnp.asarray(table))


def twin(
    batch: Batch,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """float64 `[T, H, D]`, what `ragged_paged_attention` should return."""
    q = np.asarray(batch.q).astype(np.float64)
    kv = to_float(np.asarray(batch.kv_pages)[:, batch.layer], batch.shape.kv_dtype)
    table, starts, kv_lens = (np.asarray(x) for x in (batch.page_table, batch.cu_q_lens, batch.kv_lens))
    page_size = batch.shape.page_size
    group = batch.shape.heads // batch.shape.kv_heads
    out = np.zeros_like(q)
    for row, kv_len in enumerate(kv_lens):
        positions = np.arange(kv_len)
        ids, offsets = table[row, positions // page_size], positions % page_size
        keys, values = kv[ids, 0, :, offsets], kv[ids, 1, :, offsets]
        q_len = starts[row + 1] - starts[row]
        for i in range(q_len):
            own = kv_len - q_len + i
            low = 0 if sliding_window is None else max(0, own - sliding_window + 1)
            for head in range(q.shape[1]):
                scores = keys[low : own + 1, head // group] @ q[starts[row] + i, head] * scale
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                top = scores.max() if sinks is None else max(scores.max(), sinks[head])
                weights = np.exp(scores - top)
                total = weights.sum() + (0.0 if sinks is None else np.exp(sinks[head] - top))
                out[starts[row] + i, head] = weights @ values[low : own + 1, head // group] / total
    return out
