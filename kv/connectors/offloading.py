"""OffloadingConnector: pages of prompts go to a host tier as they become full, in chunks of several pages."""

from collections.abc import Sequence

from kv.config import ConnectorConfig
from kv.connectors.base import FullPages, StoreOrder
from kv.connectors.host_tier import HostTierConnector


class OffloadingConnector(HostTierConnector):
    """Stores each chunk once it is full. Its hits may reach the last token (full attention only)."""

    def __init__(
        self, config: ConnectorConfig, *, index: int, windows: tuple[int | None, ...], page_size: int
    ) -> None:
        """Raises: ValueError: the tier has no room for one chunk."""
        super().__init__(
            config,
            index=index,
            windows=windows,
            page_size=page_size,
            pages_per_chunk=config.pages_per_chunk,
        )
        self._prompt_only = config.offload_prompt_only
        self._whole = all(window is None for window in windows)

    def offer(self, pages: FullPages) -> Sequence[StoreOrder]:
        """Stores the chunks that became whole; of prompts only, if so configured."""
        last = pages.last
        if self._prompt_only:
            last = min(last, pages.num_prompt_tokens // self._page_size)
        return self._store_full(pages, last)

    def _most_tokens(self, num_tokens: int) -> int:
        """The end of the longest hit: all tokens, unless a sliding window needs the one before the last."""
        return num_tokens if self._whole else num_tokens - 1
