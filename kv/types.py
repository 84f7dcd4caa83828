"""What a page is.

A page holds the KV of `page_size` consecutive tokens over all layers of one group: the slice
`[layers, 2, kv_heads, page_size, head_dim]` of the page buffer, contiguous, so that one page is one
descriptor and one copy.
"""

from dataclasses import dataclass

DUMMY_PAGE = 0
"""A real page that nobody owns. Padding rows read it, padding tokens write it, and it stands in page
tables where a sliding window has left a page behind. Never taken, shared or cached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageGroup:
    """Layers with the same KV shape and lifetime. Each group has its own page table.

    Attributes:
        name: for messages and plots.
        layers: model layers whose KV a page of this group holds, in order.
        kv_heads: KV heads per layer.
        head_dim: elements per head.
        sliding_window: a query at position p attends to positions > p - sliding_window; None: to all.
    """

    name: str
    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    sliding_window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSpec:
    """The shape of all pages. All groups share one pool of pages of equal bytes.

    Attributes:
        groups: at least one.
        page_size: tokens per page.
        dtype: "float32", "bfloat16" or "float16"; pages store its raw bits.

    Raises:
        ValueError: no group, a page size that is no power of two, or groups whose pages differ in bytes.
    """

    groups: tuple[PageGroup, ...]
    page_size: int
    dtype: str

    def __post_init__(self) -> None:
        if not self.groups:
            raise ValueError("KvSpec needs at least one page group")
        if self.page_size < 1 or self.page_size & (self.page_size - 1):
            raise ValueError(f"page size must be a power of two, got {self.page_size}")
        if len({self._group_elements(group) for group in self.groups}) != 1:
            raise ValueError("all page groups must have pages of equal bytes")

    def _group_elements(self, group: PageGroup) -> int:
        return len(group.layers) * 2 * group.kv_heads * self.page_size * group.head_dim

    @property
    def page_shape(self) -> tuple[int, int, int, int, int]:
        """`[layers, 2, kv_heads, page_size, head_dim]` as the first group sees a page."""
        group = self.groups[0]
        return (len(group.layers), 2, group.kv_heads, self.page_size, group.head_dim)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self._group_elements(self.groups[0]) * ITEM_BYTES[self.dtype]


ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
