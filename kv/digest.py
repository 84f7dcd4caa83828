"""A digest per page, against accidents: stale, mixed, swapped or half-written pages, flipped bits.

Not meant against anybody who chooses the bytes: the weights are public and the sums are linear. Authenticity
is the side channel's, by its MAC.
"""

from functools import lru_cache

import numpy as np

DIGEST_NAME = "multilinear64+sum64"
"""Two 64-bit sums over a page, little-endian, one after the other. First: its 32-bit words, each times an odd
64-bit weight of its position (splitmix64 of the position). A changed word always shows; any other accident
passes with probability below 2^-32. Second: its 64-bit words, unweighted."""

DIGEST_BYTES = 16


@lru_cache(maxsize=8)
def _weights(num_words: int) -> np.ndarray:
    """Odd uint64 `[num_words]`, the same in every process (splitmix64; NumPy's own streams may change)."""
    with np.errstate(over="ignore"):
        state = np.arange(1, num_words + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    weights = (state ^ (state >> np.uint64(31))) | np.uint64(1)
    weights.flags.writeable = False
    return weights


def digest_rows(rows: np.ndarray) -> list[bytes]:
    """The digests of pages, `DIGEST_BYTES` each.

    Args:
        rows: uint8 `[n, page_bytes]`, C-contiguous, `page_bytes` a multiple of 8.

    Raises:
        ValueError: rows of another kind.
    """
    if rows.dtype != np.uint8 or rows.ndim != 2 or not rows.flags.c_contiguous or rows.shape[1] % 8:
        raise ValueError(f"pages must be uint8 rows of a multiple of 8 bytes, got {rows.dtype} {rows.shape}")
    weights = _weights(rows.shape[1] // 4)
    sums = np.empty((len(rows), 2), np.dtype("<u8"))
    for row, out in zip(rows, sums, strict=True):  # row by row: the second pass finds the page in the cache
        out[0] = np.einsum("i,i->", row.view(np.dtype("<u4")), weights)
        out[1] = row.view(np.dtype("<u8")).sum()
    return [digest.tobytes() for digest in sums]
