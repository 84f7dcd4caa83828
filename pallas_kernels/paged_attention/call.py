"""One call of ragged paged attention, checked, as the backends receive it."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Call:
    """The arguments of `ragged_paged_attention`, in its words; `T` and `H * D` are at least 1.

    Attributes:
        q: `[T, H, D]`.
        kv_pages: raw bits `[P, L, 2, K, C, D]`.
        page_table: int32 `[S, M]`.
        cu_q_lens: int32 `[S + 1]`.
        kv_lens: int32 `[S]`.
        layer: int32 scalar.
        sinks: float32 `[H]` or None.
        kv_dtype: how to read the bits.
        scale: multiplies the scores.
        sliding_window: in tokens, or None.
        soft_cap: or None.
        uniform: all rows are computed as chunks.
    """

    q: jax.Array
    kv_pages: jax.Array
    page_table: jax.Array
    cu_q_lens: jax.Array
    kv_lens: jax.Array
    layer: jax.Array
    sinks: jax.Array | None
    kv_dtype: str
    scale: float
    sliding_window: int | None
    soft_cap: float | None
    uniform: bool

    @property
    def page_size(self) -> int:
        """Tokens per page (C)."""
        return self.kv_pages.shape[4]

    @property
    def kv_heads(self) -> int:
        """KV heads (K)."""
        return self.kv_pages.shape[3]

    @property
    def group(self) -> int:
        """Query heads per KV head (H // K)."""
        return self.q.shape[1] // self.kv_heads

    @property
    def decodes_only(self) -> bool:
        """The bucket has no room for a chunk."""
        return self.q.shape[0] == self.page_table.shape[0]
