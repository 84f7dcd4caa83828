"""Attention of ragged query rows over pages: one signature for the XLA reference and the Pallas kernel.

Ragged rows over a page table are the form of "Ragged Paged Attention" (JAX/TPU) and of vLLM's unified
attention; the pages themselves come from PagedAttention (Kwon et al., 2023) and the softmax that never
sees a whole row from FlashAttention (Dao et al., 2022).
"""

from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import pallas, reference
from pallas_kernels.paged_attention.call import Call
from pallas_kernels.pages import check_pages

Backend = Literal["xla", "pallas"]
BACKENDS: tuple[Backend, ...] = ("xla", "pallas")


def ragged_paged_attention(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    layer: int | jax.Array,
    *,
    kv_dtype: str,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    uniform: bool = False,
    backend: Backend = "xla",
) -> jax.Array:
    """Causal attention of every row's queries over the row's own pages.

    Decodes (rows of one token) and prompt chunks are mixed in one call. Query `i` of row `r` sits at
    position `kv_lens[r] - q_len[r] + i` of its sequence and sees the positions up to its own. Query head
    `h` reads KV head `h // (H // K)`. Scores and sums are float32.

    What lies in pages that no row owns, and in slots at positions from `kv_lens[r]` on, never changes
    the result, not even where it is NaN. The cost depends on the tokens that are there, not on `M`.

    Where `T == S` every row must have at most one token: such a bucket holds decodes only, and the work
    for chunks is not compiled.

    Args:
        q: float32, bfloat16 or float16 `[T, H, D]`, the rows' queries one after another.
        kv_pages: `[P, L, 2, K, C, D]`, the raw bits of K (0) and V (1) in pages of `C` tokens: uint32 for
            float32, uint16 for bfloat16 and float16. Never sliced by layer and never converted whole:
            either would copy the pool.
        page_table: int32 `[S, M]`, page ids in order of position, padded with the dummy page.
        cu_q_lens: int32 `[S + 1]`; row `r` owns the tokens `cu_q_lens[r]:cu_q_lens[r + 1]`. Rows that pad
            the batch are empty: they repeat the last value.
        kv_lens: int32 `[S]`, tokens of the row's sequence up to and including this chunk, whose K and V
            are in the pages already; 0 for padding rows.
        layer: index on axis 1 of `kv_pages`.
        kv_dtype: "float32", "bfloat16" or "float16", how to read the bits.
        scale: multiplies the scores.
        sliding_window: a query at position `p` sees the positions `> p - sliding_window`; None: all.
        soft_cap: scores become `soft_cap * tanh(score / soft_cap)` (Gemma 2); None: unchanged.
        sinks: float32 `[H]`, per head one more score that takes part in the softmax and has no value
            (attention sinks as in gpt-oss); None: none.
        uniform: rows of one token are computed in the very tiles that chunks are. Then a token's result is
            bitwise the same whatever comes with it: more tokens of its row or fewer, and any other rows.
        backend: "xla" (plain JAX) or "pallas" (the kernel; interpreted on a CPU).

    Returns:
        `[T, H, D]` in `q.dtype`; zeros for tokens of no row.

    Raises:
        ValueError: shapes or dtypes do not fit together, or an unknown `kv_dtype` or `backend`.
    """
    _check(q, kv_pages, page_table, cu_q_lens, kv_lens, kv_dtype, sinks)
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, got {sliding_window}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if q.size == 0:
        return q
    call = Call(
        q=q,
        kv_pages=kv_pages,
        page_table=page_table,
        cu_q_lens=cu_q_lens,
        kv_lens=kv_lens,
        layer=jnp.asarray(layer, jnp.int32),
        sinks=sinks,
        kv_dtype=kv_dtype,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        uniform=uniform,
    )
    return reference.attend(call) if backend == "xla" else pallas.attend(call)


def _check(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    kv_dtype: str,
    sinks: jax.Array | None,
) -> None:
    check_pages(kv_pages, kv_dtype)
    if q.ndim != 3 or q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"q must be float32, bfloat16 or float16 [T, H, D], got {q.dtype}{q.shape}")
    kv_heads, head_dim = kv_pages.shape[3], kv_pages.shape[5]
    if q.shape[1] % kv_heads or q.shape[2] != head_dim:
        raise ValueError(f"q heads {q.shape[1:]} do not fit {kv_heads} KV heads of {head_dim}")
    rows = page_table.shape[0]
    if page_table.ndim != 2 or cu_q_lens.shape != (rows + 1,) or kv_lens.shape != (rows,):
        shapes = (page_table.shape, cu_q_lens.shape, kv_lens.shape)
        raise ValueError(f"page_table, cu_q_lens and kv_lens must be [S, M], [S + 1] and [S], got {shapes}")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks must be [{q.shape[1]}], got {sinks.shape}")
