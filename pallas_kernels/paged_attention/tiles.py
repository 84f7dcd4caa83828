"""Tile sizes by platform, as data: chosen by measurement, never by a rule in the code."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class XlaTiles:
    """Tile sizes of the XLA reference.

    Attributes:
        decode_kv_tokens: KV tokens that one turn of the decode loop reads, of every row at once.
        chunk_queries: queries of one row that are computed together.
        chunk_kv_tokens: KV tokens that such a group of queries reads in one turn.
        uniform_queries: in place of `chunk_queries` where rows of one token are computed as chunks: few,
            since most of such a tile is then padding.
    """

    decode_kv_tokens: int
    chunk_queries: int
    chunk_kv_tokens: int
    uniform_queries: int


XLA_TILES = {
    # On two AVX-512 cores, JAX 0.11.2, 9 heads over 3 of 64: of 64, 128, 256 and 512 KV tokens and 64, 128
    # and 256 queries these are best or within the noise from 1 row to 32 and from 64 tokens to 1,536;
    # larger tiles lose up to 4 times on short prompts, which see only the start of a tile.
    "cpu": XlaTiles(decode_kv_tokens=128, chunk_queries=128, chunk_kv_tokens=128, uniform_queries=8),
    # Not measured: here XLA is only what the kernel is compared with.
    "gpu": XlaTiles(decode_kv_tokens=256, chunk_queries=128, chunk_kv_tokens=256, uniform_queries=16),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTiles:
    """Tile sizes of the Pallas kernel for decodes or for chunks.

    Attributes:
        queries: queries of one row in a tile; 1 for decodes.
        kv_tokens: KV tokens read in one turn; at least a page.
        min_lanes: queries times heads are padded to this.
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
    """

    queries: int
    kv_tokens: int
    min_lanes: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PallasTiles:
    """Tile sizes of the Pallas kernel on one platform for one kind of KV.

    Attributes:
        uniform: of rows of one token and chunks alike.
    """

    decode: PhaseTiles
    chunk: PhaseTiles
    uniform: PhaseTiles


# Within 1.5 to 3 times of the XLA reference on the same machine.
PALLAS_CPU = PallasTiles(
    decode=PhaseTiles(queries=1, kv_tokens=128, min_lanes=1, num_warps=1, num_stages=1),
    chunk=PhaseTiles(queries=64, kv_tokens=128, min_lanes=1, num_warps=1, num_stages=1),
    uniform=PhaseTiles(queries=8, kv_tokens=128, min_lanes=1, num_warps=1, num_stages=1),
)

# A tensor core multiplies 16 lanes at least. Lowered, not yet timed on a GPU.
PALLAS_GPU = {
    (2, 128): PallasTiles(
        decode=PhaseTiles(queries=1, kv_tokens=64, min_lanes=16, num_warps=4, num_stages=2),
        chunk=PhaseTiles(queries=32, kv_tokens=64, min_lanes=16, num_warps=4, num_stages=2),
        uniform=PhaseTiles(queries=4, kv_tokens=64, min_lanes=16, num_warps=4, num_stages=2),
    ),
    (2, 256): PallasTiles(
        decode=PhaseTiles(queries=1, kv_tokens=32, min_lanes=16, num_warps=4, num_stages=2),
        chunk=PhaseTiles(queries=16, kv_tokens=32, min_lanes=16, num_warps=8, num_stages=2),
        uniform=PhaseTiles(queries=4, kv_tokens=32, min_lanes=16, num_warps=4, num_stages=2),
    ),
    (4, 128): PallasTiles(
        decode=PhaseTiles(queries=1, kv_tokens=32, min_lanes=16, num_warps=4, num_stages=2),
        chunk=PhaseTiles(queries=16, kv_tokens=32, min_lanes=16, num_warps=4, num_stages=2),
        uniform=PhaseTiles(queries=4, kv_tokens=32, min_lanes=16, num_warps=4, num_stages=2),
    ),
    (4, 256): PallasTiles(
        decode=PhaseTiles(queries=1, kv_tokens=16, min_lanes=16, num_warps=4, num_stages=2),
        chunk=PhaseTiles(queries=16, kv_tokens=16, min_lanes=16, num_warps=8, num_stages=2),
        uniform=PhaseTiles(queries=4, kv_tokens=16, min_lanes=16, num_warps=4, num_stages=2),
    ),
}
"""By bytes of a KV element and largest head dimension."""


def gpu_tiles(kv_dtype: str, head_dim: int) -> PallasTiles:
    """The tiles of a GPU for this kind of KV: the row of the next larger head dimension."""
    item_bytes = 4 if kv_dtype == "float32" else 2
    return PALLAS_GPU[item_bytes, 128 if head_dim <= 128 else 256]
