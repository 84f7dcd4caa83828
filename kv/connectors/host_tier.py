"""What the two connectors with a host tier have in common: lookups, pins, room for stores, and counts."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from kv.config import ConnectorConfig
from kv.connectors.base import LATER, Answer, FullPages, LeaseOrder, Offer, Query, StoreOrder
from kv.eviction import Key
from kv.moves import HOST, Command, HostSource, PageLists, RemoteSource
from kv.prefix import window_pages
from kv.tier import Tier
from kv.types import DUMMY_PAGE

RANKED_REQUESTS = 4096
"""Requests whose entries are ranked at their end; of more, the oldest are not."""


class HostTierConnector:
    """A connector whose pages lie in a host tier of this engine. Linear: methods change it in place.

    `lookup` changes nothing. Its answer holds until the next store is planned: `allocated` with the offers
    comes before that, and from then on the pages are pinned.
    """

    def __init__(
        self,
        config: ConnectorConfig,
        *,
        index: int,
        windows: tuple[int | None, ...],
        page_size: int,
        pages_per_chunk: int,
    ) -> None:
        """Args: index: of this leaf. windows: sliding window per page group, None: full attention.

        Raises:
            ValueError: the tier has no room for one chunk.
        """
        self._index = index
        self._windows = windows
        self._page_size = page_size
        self._tier = Tier(
            config.host_slots,
            num_groups=len(windows),
            pages_per_chunk=pages_per_chunk,
            policy=config.eviction_policy,
        )
        seen = [None if window is None else window_pages(window, page_size) for window in windows]
        self._tail = tuple(
            pages_per_chunk if pages is None else min(pages_per_chunk, pages) for pages in seen
        )
        """Per group, pages at a chunk's end without which no hit can use it."""
        self._offered: dict[str, tuple[Sequence[bytes], int]] = {}
        """Per live request, its pages' names and how many of them are in whole chunks that were offered."""
        self._outcomes: Counter[str] = Counter()

    @property
    def supports_hma(self) -> bool:
        """Entries are kept per page group, and a sliding-window group needs only what is seen."""
        return True

    def arrived(self, request_id: str, remote: RemoteSource | None) -> Sequence[Command]:
        """A host tier has no peer."""
        return ()

    def released(self, request_id: str, remote: RemoteSource | None) -> Sequence[Command]:
        """A host tier has no peer."""
        return ()

    def lookup(self, query: Query) -> Answer:
        """The longest run of pages here behind `query.num_computed`; later, while one of it is stored."""
        if query.num_computed % self._page_size:
            return ()
        start = query.num_computed // self._page_size
        limit = min(len(query.names), self._most_tokens(query.num_tokens) // self._page_size)
        if limit <= start:
            return ()
        slots = self._tier.match(query.names, start, limit, self._windows, self._page_size)
        if slots is None:
            return LATER
        if not slots[0]:
            return ()
        offer = Offer(
            connector=self._index,
            tier=HOST,
            num_tokens=len(slots[0]) * self._page_size,
            first_page=start,
            source=HostSource(slots=slots),
        )
        return (offer,)

    def allocated(self, request_id: str, pages: PageLists, offers: Sequence[Offer]) -> None:
        """Pins what will be loaded.

        Raises:
            ValueError: an offer is not from a lookup just now.
        """
        for offer in offers:
            self._tier.pin(_slots(offer.source))

    def load_ended(self, source: RemoteSource | HostSource, num_pages: int | None = None) -> None:
        """Unpins; a page that did not arrive good is forgotten, so that it can be stored again."""
        slots = _slots(source)
        self._tier.unpin(slots)
        if num_pages is not None:
            self._tier.forget(slot for group in slots for slot in group[num_pages : num_pages + 1])

    def ready_pages(self) -> Iterator[tuple[int, bytes, int, int]]:
        """(group, name, pages before the one of that name, slot) of all that a load may have, for checks."""
        for group, name, chunk in self._tier.ready():
            slots = self._tier.slots(chunk)
            for back in range(self._tail[group]):
                yield group, name, back, slots[-1 - back]

    def offer(self, pages: FullPages) -> Sequence[StoreOrder]:
        """Stores nothing."""
        return ()

    def offer_idle(self, idle: Sequence[tuple[int, int, bytes]]) -> Sequence[StoreOrder]:
        """Stores nothing."""
        return ()

    def stored(self, slots: Sequence[int], ok: bool) -> None:
        """Entries are ready, or forgotten."""
        self._tier.stored(slots, ok)
        if ok:
            self._outcomes["stored"] += len(slots)

    def finished(self, request_id: str, *, wants_lease: bool, completed: bool) -> LeaseOrder | None:
        """Ranks the request's entries: tails are evicted before heads, which more prompts share."""
        names, count = self._offered.pop(request_id, ((), 0))
        size = self._tier.pages_per_chunk
        for last in range(count - 1, -1, -size):
            for group in range(len(self._windows)):
                self._tier.refresh(group, names[last])
        return None

    def take_outcomes(self) -> Sequence[tuple[int, str, int]]:
        """(connector, outcome, pages) since the last call, by name of the outcome."""
        taken, self._outcomes = self._outcomes, Counter()
        return [(self._index, outcome, count) for outcome, count in sorted(taken.items()) if count]

    def tiers(self) -> Sequence[tuple[int, int, int, int, int]]:
        """(connector, used slots, pinned slots, slots that a store fills, slots)."""
        return [(self._index, self._tier.used, self._tier.pinned, self._tier.storing, self._tier.num_slots)]

    def reset(self) -> None:
        """Forgets everything cached; what a move uses goes when the move ends."""
        self._tier.reset()

    def check(self) -> None:
        """Recounts. Raises AssertionError."""
        self._tier.check()

    def _most_tokens(self, num_tokens: int) -> int:
        """The end of the longest hit: the last token is computed in any case."""
        return num_tokens - 1

    def _store_full(self, pages: FullPages, last: int) -> Sequence[StoreOrder]:
        """Stores the chunks that became whole in `[pages.first, last)`, heads first, as far as there is room.

        What a chunk position needs is stored in all groups or in none: no hit could use a part of it.
        """
        size = self._tier.pages_per_chunk
        ends = range(pages.first // size * size + size, last + 1, size)
        if not ends:
            return ()
        self._offered[pages.request_id] = (pages.names, ends[-1])
        if len(self._offered) > RANKED_REQUESTS:
            del self._offered[next(iter(self._offered))]
        wanted = [(end, keys) for end in ends if (keys := self._missing(pages, end))]
        count = sum(len(keys) for _, keys in wanted)
        keep = frozenset(pages.names[: ends[-1]]) if count > self._tier.free_chunks else frozenset[bytes]()
        room = self._tier.room(count, keep)
        fits: list[tuple[int, Key]] = []
        for end, keys in wanted:
            if len(fits) + len(keys) > room:
                left = [(at, key) for at, rest in wanted if at >= end for key in rest]
                self._outcomes["dropped_cpu_full"] += sum(_real(pages, key[0], at, size) for at, key in left)
                break
            fits += [(end, key) for key in keys]
        chunks = self._tier.reserve([key for _, key in fits], keep) or ()
        from_pages: list[int] = []
        to_slots: list[int] = []
        for (end, (group, _)), chunk in zip(fits, chunks, strict=True):
            slots = self._tier.slots(chunk)
            for page, slot in zip(pages.tables[group][end - size : end], slots, strict=True):
                if page != DUMMY_PAGE:
                    from_pages.append(page)
                    to_slots.append(slot)
        return self._order(from_pages, to_slots)

    def _missing(self, pages: FullPages, end: int) -> list[Key]:
        """The entries of the chunk that ends before position `end` which are to be stored."""
        size, name = self._tier.pages_per_chunk, pages.names[end - 1]
        keys: list[Key] = []
        for group, tail in enumerate(self._tail):
            if tail == 0:
                continue
            if self._tier.holds(group, name):
                storing = self._tier.is_storing(group, name)
                outcome = "skipped_in_flight" if storing else "skipped_already_cached"
                self._outcomes[outcome] += _real(pages, group, end, size)
                if not storing:
                    self._tier.touch(group, name)
            elif DUMMY_PAGE in pages.tables[group][end - tail : end]:
                self._outcomes["dropped_null_block"] += _real(pages, group, end, size)
            else:
                keys.append((group, name))
        return keys

    def _order(self, pages: Iterable[int], slots: Iterable[int]) -> Sequence[StoreOrder]:
        order = StoreOrder(connector=self._index, pages=tuple(pages), slots=tuple(slots))
        return (order,) if order.pages else ()


def _real(pages: FullPages, group: int, end: int, size: int) -> int:
    """How many pages of a chunk its group still has."""
    return size - pages.tables[group][end - size : end].count(DUMMY_PAGE)


def _slots(source: RemoteSource | HostSource) -> PageLists:
    """Raises: ValueError: the source is not of a host tier."""
    if not isinstance(source, HostSource):
        raise ValueError("a host tier has no pages of a peer")
    return source.slots
