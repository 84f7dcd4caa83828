"""Who holds a page.

Each page but the dummy is in exactly one state: free (nobody holds it, its content means nothing), idle
(nobody holds it, the prefix cache knows its content) or in use (held by one or more sequences). A page's
generation grows when it is taken for new content, before its first byte can change; sharing never
changes it.
"""

from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice

import numpy as np

from kv.types import DUMMY_PAGE


class Pages:
    """The pool's bookkeeping. Linear: every method changes it in place.

    Attributes:
        refs: int32 `[P]`, holders of each page.
        generation: uint32 `[P]`, grows at each take.
    """

    __slots__ = ("_borrowed", "_cached", "_free", "_idle", "generation", "refs")

    def __init__(self, num_pages: int) -> None:
        """Raises: ValueError: no page is left beside the dummy page."""
        if num_pages < 2:
            raise ValueError(f"a pool needs at least 2 pages, one of them the dummy page; got {num_pages}")
        self.refs = np.zeros(num_pages, np.int32)
        self.generation = np.zeros(num_pages, np.uint32)
        self._cached = bytearray(num_pages)
        self._free = list(range(num_pages - 1, DUMMY_PAGE, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._borrowed: set[int] = set()

    @property
    def usable(self) -> int:
        """Pages that can ever be held: all but the dummy."""
        return len(self.refs) - 1

    @property
    def available(self) -> int:
        """Pages that can be taken now."""
        return len(self._free) + self.idle

    @property
    def free(self) -> int:
        """Pages that nobody holds and the prefix cache does not know."""
        return len(self._free)

    @property
    def idle(self) -> int:
        """Pages that nobody holds and the prefix cache knows."""
        return len(self._idle) - len(self._borrowed)

    @property
    def in_use(self) -> int:
        """Pages that somebody holds."""
        return self.usable - self.available

    def is_idle(self, page: int) -> bool:
        """Nobody holds the page, and the prefix cache knows it."""
        return page in self._idle and page not in self._borrowed

    def idle_pages(self) -> Iterator[int]:
        """Idle pages, the next to be evicted first. The pool must not change while it runs."""
        return (page for page in self._idle if page not in self._borrowed)

    def take(self, count: int) -> tuple[list[int], list[int]]:
        """Takes pages for new content: free ones first, then the least recently used idle ones.

        Returns:
            The pages, and those among them that left the prefix cache (the caller forgets their keys).

        Raises:
            ValueError: fewer than `count` are available.
        """
        if count > self.available:
            raise ValueError(f"{count} pages asked, {self.available} available")
        kept = max(0, len(self._free) - count)
        taken = self._free[kept:]
        taken.reverse()
        del self._free[kept:]
        evicted: list[int] = []
        if len(taken) < count:
            evicted += islice(self.idle_pages(), count - len(taken))
            for page in evicted:
                del self._idle[page]
                self._cached[page] = 0
            taken += evicted
        index = np.array(taken, np.intp)
        self.refs[index] = 1
        self.generation[index] += 1
        return taken, evicted

    def share(self, page: int) -> None:
        """Adds a holder to a page that is in use or idle.

        Raises:
            ValueError: the page is free or the dummy: its content is nobody's.
        """
        if self.refs[page] == 0:
            if page not in self._idle:
                raise ValueError(f"page {page} is neither in use nor idle")
            del self._idle[page]
        elif page in self._borrowed:
            self._borrowed.discard(page)
            del self._idle[page]
        self.refs[page] += 1

    def borrow(self, page: int) -> None:
        """Adds a holder that only copies the page: an idle one keeps its place in the order of eviction.

        Raises:
            ValueError: the page is free or the dummy.
        """
        if self.refs[page] == 0:
            if page not in self._idle:
                raise ValueError(f"page {page} is neither in use nor idle")
            self._borrowed.add(page)
        self.refs[page] += 1

    def release(self, page: int) -> None:
        """Takes one holder away; the last one leaves the page idle if it is cached, else free.

        Raises:
            ValueError: nobody holds the page.
        """
        holders = self.refs.item(page)
        if holders <= 0:
            raise ValueError(f"page {page} is released but nobody holds it")
        self.refs[page] = holders - 1
        if holders == 1:
            if page in self._borrowed:
                self._borrowed.discard(page)
            elif self._cached[page]:
                self._idle[page] = None
            else:
                self._free.append(page)

    def mark_cached(self, page: int) -> None:
        """The prefix cache knows this page, which somebody holds."""
        if self.refs[page] <= 0:
            raise ValueError(f"page {page} enters the cache but nobody holds it")
        self._cached[page] = 1

    def unmark_cached(self, page: int) -> None:
        """The prefix cache has forgotten this page."""
        self._cached[page] = 0
        if page in self._idle:
            del self._idle[page]
            if page in self._borrowed:
                self._borrowed.discard(page)
            else:
                self._free.append(page)

    def check(self) -> None:
        """Recounts the laws of conservation.

        Raises:
            AssertionError: a page is in no state or in two.
        """
        free, idle = set(self._free), set(self.idle_pages())
        if not self._borrowed <= set(self._idle):
            raise AssertionError("a borrowed page has no place in the order of eviction")
        if len(free) != len(self._free):
            raise AssertionError("a page is free twice")
        for page in range(len(self.refs)):
            states = (page in free) + (page in idle) + bool(self.refs[page] > 0) + (page == DUMMY_PAGE)
            if states != 1 or self.refs[page] < 0:
                raise AssertionError(f"page {page} is in {states} states, refs {self.refs[page]}")
            if page in idle and not self._cached[page]:
                raise AssertionError(f"page {page} is idle but not cached")
            if page in free and self._cached[page]:
                raise AssertionError(f"page {page} is free but cached")
