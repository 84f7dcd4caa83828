"""How the page buffer holds numbers: as raw bits, read by bitcasting only what was loaded.

Raw bits because jaxlib 0.10.2 converts a whole bfloat16 array to float32 and back around a scatter on a
CPU, and because unsigned integers leave through DLPack in every version.
"""

import jax
import jax.numpy as jnp

BITS = {"float32": jnp.uint32, "bfloat16": jnp.uint16, "float16": jnp.uint16}
"""KV dtype to the dtype of the page buffer."""


def check_pages(kv_pages: jax.Array, kv_dtype: str) -> None:
    """Refuses a page buffer that is not `[P, L, 2, K, C, D]` in the bits of `kv_dtype`.

    Raises:
        ValueError: it is not, or `kv_dtype` is unknown.
    """
    if kv_dtype not in BITS:
        raise ValueError(f"kv_dtype must be one of {tuple(BITS)}, got {kv_dtype!r}")
    if kv_pages.ndim != 6 or kv_pages.shape[2] != 2 or kv_pages.dtype != BITS[kv_dtype]:
        wanted = jnp.dtype(BITS[kv_dtype]).name
        raise ValueError(f"kv_pages must be {wanted}[P, L, 2, K, C, D], got {kv_pages.dtype}{kv_pages.shape}")
