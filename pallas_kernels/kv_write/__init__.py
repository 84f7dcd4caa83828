"""Put the K and V of a step's tokens into their slots."""

import jax
import jax.numpy as jnp

from pallas_kernels.pages import BITS, check_pages


def kv_write(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    page_ids: jax.Array,
    offsets: jax.Array,
    layer: int | jax.Array,
    *,
    kv_dtype: str,
) -> jax.Array:
    """Writes K and V of `T` tokens; in place where `kv_pages` is donated.

    Args:
        kv_pages: `[P, L, 2, K, C, D]`, uint32 for float32, uint16 for bfloat16 and float16.
        k: `[T, K, D]`, any float dtype; rounded to `kv_dtype`.
        v: `[T, K, D]`.
        page_ids: int32 `[T]`, each token's page, below `P`. Tokens that pad the batch name the dummy page.
        offsets: int32 `[T]`, each token's slot in its page, below `C`. No two tokens share a slot outside
            the dummy page, whose content is then one of theirs.
        layer: index on axis 1 of `kv_pages`.
        kv_dtype: "float32", "bfloat16" or "float16".

    Returns:
        The pages with the tokens written.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    check_pages(kv_pages, kv_dtype)
    wanted = (page_ids.shape[0], kv_pages.shape[3], kv_pages.shape[5])
    if k.shape != wanted or v.shape != wanted or offsets.shape != page_ids.shape:
        raise ValueError(f"k and v must be {wanted}, got {k.shape}, {v.shape} (offsets {offsets.shape})")
    kv = jnp.stack([k, v], axis=1).astype(kv_dtype)
    bits = jax.lax.bitcast_convert_type(kv, BITS[kv_dtype])
    slots = kv_pages.at[page_ids, layer, :, :, offsets]
    return slots.set(bits, mode="promise_in_bounds")
