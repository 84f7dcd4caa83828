"""The page buffer: one device array that holds every page, made by JAX and donated at every step."""

import jax
import jax.numpy as jnp

from kv.types import ITEM_BYTES, KvSpec

BITS = {2: jnp.uint16, 4: jnp.uint32}


def create(spec: KvSpec, num_pages: int) -> jax.Array:
    """Allocates the pool, zeroed: raw bits `[num_pages, layers, 2, kv_heads, page_size, head_dim]`.

    Pages are stored as unsigned integers of the KV dtype's width and bitcast where they are used: a bfloat16
    scatter converts the whole pool on jaxlib 0.10's CPU, and raw bits export through DLPack in every dtype.
    """
    return jnp.zeros((num_pages, *spec.page_shape), BITS[ITEM_BYTES[spec.dtype]])


def pointer(pages: jax.Array) -> int:
    """Address of the pool's first byte. Does not wait for a pending step and leaves no view behind."""
    return pages.unsafe_buffer_pointer()
