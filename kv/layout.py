"""How the host tier's region is laid out, and how many pages fit. Pure.

One region: `[page][rank][layer, k/v, head, slot]`. A host page is the concatenation of what each rank (a
shard of the KV heads) holds of a device page: one page of one rank is one contiguous range, a page one row.
"""

from dataclasses import dataclass

from kv.types import ITEM_BYTES, KvSpec, PageGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheTensor:
    """One rank's page buffer. Attributes: size: bytes over all pages. rank: whose."""

    size: int
    rank: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheConfig:
    """What the pool is made of, by vLLM's name.

    Attributes:
        num_blocks: pages, with the dummy page.
        kv_cache_tensors: page buffers, one per rank; a page is an equal part of each.
        groups: the page groups that share the pages.
    """

    num_blocks: int
    kv_cache_tensors: tuple[KVCacheTensor, ...]
    groups: tuple[PageGroup, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuConfig:
    """A host tier's capacity.

    Attributes:
        num_blocks: host pages.
        rank_bytes: bytes of one page per rank, in the order of ranks.
    """

    num_blocks: int
    rank_bytes: tuple[int, ...]

    @property
    def page_bytes(self) -> int:
        """Bytes of one host page over all ranks."""
        return sum(self.rank_bytes)

    def page_range(self, page: int) -> tuple[int, int]:
        """(offset, length) of a host page in the region."""
        return page * self.page_bytes, self.page_bytes

    def rank_range(self, page: int, rank: int) -> tuple[int, int]:
        """(offset, length) of one rank's part of a host page."""
        return page * self.page_bytes + sum(self.rank_bytes[:rank]), self.rank_bytes[rank]


def describe_pool(spec: KvSpec, num_pages: int, *, ranks: int = 1) -> KVCacheConfig:
    """The pool of `num_pages` pages (with the dummy page), its KV heads spread evenly over `ranks`."""
    _check_ranks(spec, ranks)
    size = num_pages * (spec.page_bytes // ranks)
    return KVCacheConfig(
        num_blocks=num_pages,
        kv_cache_tensors=tuple(KVCacheTensor(size=size, rank=rank) for rank in range(ranks)),
        groups=spec.groups,
    )


def derive_cpu_config(config: KVCacheConfig, cpu_bytes: int) -> CpuConfig:
    """How many pages of this pool fit into `cpu_bytes` of host memory, over all ranks: whole ones only.

    Raises:
        ValueError: the pool has no tensors, a tensor is not a whole number of bytes per page, or not one page
            fits.
    """
    if not config.kv_cache_tensors:
        raise ValueError(
            "the KV cache has no tensors (kv_cache_tensors is empty): nothing could be offloaded"
        )
    if config.num_blocks < 1:
        raise ValueError(f"the KV cache has {config.num_blocks} pages")
    for tensor in config.kv_cache_tensors:
        if tensor.size < 1 or tensor.size % config.num_blocks:
            raise ValueError(
                f"a KV cache tensor of {tensor.size} bytes cannot be cut into {config.num_blocks} equal pages"
            )
    tensors = sorted(config.kv_cache_tensors, key=lambda tensor: tensor.rank)
    rank_bytes = tuple(tensor.size // config.num_blocks for tensor in tensors)
    num_blocks = cpu_bytes // sum(rank_bytes)
    if num_blocks < 1:
        raise ValueError(
            f"cpu_bytes_to_use is {cpu_bytes}, less than one page of the KV cache ({sum(rank_bytes)} bytes)"
        )
    return CpuConfig(num_blocks=num_blocks, rank_bytes=rank_bytes)


def cell_range(
    spec: KvSpec, page: int, rank: int, layer: int, kv: int, head: int, slot: int, *, ranks: int = 1
) -> tuple[int, int]:
    """(offset, length) of one token's key or value of one head in the region, as the first group sees a page.

    Args:
        layer: of the group's layers. kv: 0 key, 1 value. head: of this rank's heads. slot: of the page.
    """
    _check_ranks(spec, ranks)
    layers, _, heads, slots, head_dim = spec.page_shape
    at, length = 0, head_dim * ITEM_BYTES[spec.dtype]
    for index, size in (
        (page, None),
        (rank, ranks),
        (layer, layers),
        (kv, 2),
        (head, heads // ranks),
        (slot, slots),
    ):
        if index < 0 or (size is not None and index >= size):
            raise IndexError(f"index {index} is out of range: there are {size}")
        at = at * (size or 1) + index
    return at * length, length


def _check_ranks(spec: KvSpec, ranks: int) -> None:
    heads = spec.page_shape[2]
    if ranks < 1 or heads % ranks:
        raise ValueError(f"{heads} KV heads cannot be spread evenly over {ranks} ranks")
