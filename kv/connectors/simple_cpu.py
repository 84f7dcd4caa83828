"""SimpleCPUOffloadConnector: a host tier that mirrors the device's prefix cache, page by page."""

from collections.abc import Sequence
from dataclasses import replace

from kv.config import ConnectorConfig
from kv.connectors.base import FullPages, StoreOrder
from kv.connectors.host_tier import HostTierConnector
from kv.eviction import Key

TARGET_PAGES = 64
"""Of the lazy mode: twice what a step of 512 tokens in pages of 16 takes."""


class SimpleCpuOffloadConnector(HostTierConnector):
    """Stores full pages of prompts and answers: at once, or, when lazy, those that are evicted next."""

    def __init__(
        self,
        config: ConnectorConfig,
        *,
        index: int,
        windows: tuple[int | None, ...],
        page_size: int,
        target_pages: int = TARGET_PAGES,
    ) -> None:
        """Args: target_pages: idle pages that the lazy mode keeps saved, about twice what one step takes.

        Raises:
            ValueError: the tier has no room for one page.
        """
        super().__init__(
            replace(config, eviction_policy="lru"),
            index=index,
            windows=windows,
            page_size=page_size,
            pages_per_chunk=1,
        )
        self._lazy = config.lazy_offload
        self._target_pages = target_pages
        self._refused: Key | None = None
        """The idle page for which there was no room last time: it is counted once, not in every step."""

    def offer(self, pages: FullPages) -> Sequence[StoreOrder]:
        """Stores the pages that became full, unless it is lazy."""
        return () if self._lazy else self._store_full(pages, pages.last)

    def offer_idle(self, idle: Sequence[tuple[int, int, bytes]]) -> Sequence[StoreOrder]:
        """When lazy: saves the pages that are evicted next, so that `target_pages` of them are saved.

        A page that is saved here is not evicted here for another page of the walk, else a tier smaller than
        the target would copy the same pages in turns for ever.
        """
        if not self._lazy:
            return ()
        walk = idle[: self._target_pages]
        keep = frozenset(name for _, _, name in walk)
        pages: list[int] = []
        slots: list[int] = []
        refused: Key | None = None
        for page, group, name in walk:
            if self._tail[group] == 0 or self._tier.holds(group, name):
                continue
            chunks = self._tier.reserve([(group, name)], keep)
            if chunks is None:
                refused = (group, name)
                self._outcomes["dropped_cpu_full"] += refused != self._refused
                break
            pages.append(page)
            slots += self._tier.slots(chunks[0])
        self._refused = refused
        return self._order(pages, slots)
