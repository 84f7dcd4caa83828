"""Copy pages inside the pool: what a sequence does before it appends to a page that others share."""

import jax


def copy_pages(kv_pages: jax.Array, src: jax.Array, dst: jax.Array) -> jax.Array:
    """Copies page `src[i]` over page `dst[i]`; in place where `kv_pages` is donated.

    All pages are read before the first is written, so a page may be read and overwritten in one call. The
    temporary holds `N` pages, never the pool.

    Args:
        kv_pages: `[P, ...]`, the page buffer in any view that has pages first.
        src: int32 `[N]`, below `P`; padded with the dummy page.
        dst: int32 `[N]`, below `P`, each at most once; padded with the dummy page where `src` is.

    Returns:
        The pages with the copies made.

    Raises:
        ValueError: `src` and `dst` are not of one shape `[N]`.
    """
    if src.ndim != 1 or src.shape != dst.shape:
        raise ValueError(f"src and dst must be [N], got {src.shape} and {dst.shape}")
    taken = kv_pages.at[src].get(mode="promise_in_bounds")
    return kv_pages.at[dst].set(taken, mode="promise_in_bounds")
