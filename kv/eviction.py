"""Which entry of a host tier goes first when room is needed.

An entry is named by its page group and page name. Two policies with one interface: least recently used, and
the adaptive replacement cache (Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache",
FAST 2003), which keeps what was used twice apart from what was used once, so that a scan of prompts that
never return cannot flush prefixes that do. Both are linear: methods change them in place.
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import islice
from typing import Protocol

Key = tuple[int, bytes]
"""(page group, page name)"""


class Policy(Protocol):
    """An order of entries. Each entry is added once and leaves by `evict` or `remove`."""

    def add(self, key: Key) -> None:
        """A new entry, now the most recent."""
        ...

    def touch(self, key: Key) -> None:
        """An entry was used again."""
        ...

    def refresh(self, key: Key) -> None:
        """An entry becomes the most recent of its kind, without having been used again."""
        ...

    def victims(self, count: int, may_go: Callable[[Key], bool]) -> list[Key]:
        """The entries that go first among those that may, at most `count`."""
        ...

    def evict(self, key: Key) -> None:
        """An entry goes to make room."""
        ...

    def remove(self, key: Key) -> None:
        """An entry goes since its content is void."""
        ...

    def clear(self) -> None:
        """Forgets everything."""
        ...

    def order(self) -> list[Key]:
        """All entries, for checks."""
        ...


class Lru:
    """The least recently used entry goes first."""

    __slots__ = ("_order",)

    def __init__(self) -> None:
        self._order: OrderedDict[Key, None] = OrderedDict()

    def add(self, key: Key) -> None:
        """A new entry, now the most recent."""
        self._order[key] = None

    def touch(self, key: Key) -> None:
        """An entry was used again."""
        self._order.move_to_end(key)

    def refresh(self, key: Key) -> None:
        """An entry becomes the most recent."""
        self._order.move_to_end(key)

    def victims(self, count: int, may_go: Callable[[Key], bool]) -> list[Key]:
        """The oldest entries among those that may go, at most `count`."""
        return list(islice((key for key in self._order if may_go(key)), count))

    def evict(self, key: Key) -> None:
        """An entry goes to make room."""
        del self._order[key]

    def remove(self, key: Key) -> None:
        """An entry goes since its content is void."""
        del self._order[key]

    def clear(self) -> None:
        """Forgets everything."""
        self._order.clear()

    def order(self) -> list[Key]:
        """All entries, the oldest first."""
        return list(self._order)


class Arc:
    """Entries used once (`recent`, T1) and more often (`frequent`, T2), and ghosts: names of those that went.

    A new entry whose ghost is known shows that its list was too short: the target size of `recent` moves
    towards that list, and the entry is a frequent one.

    Attributes:
        target: entries that `recent` should hold, 0 to the capacity.
    """

    __slots__ = ("_capacity", "_frequent", "_frequent_ghosts", "_recent", "_recent_ghosts", "target")

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._recent: OrderedDict[Key, None] = OrderedDict()
        self._frequent: OrderedDict[Key, None] = OrderedDict()
        self._recent_ghosts: OrderedDict[Key, None] = OrderedDict()
        self._frequent_ghosts: OrderedDict[Key, None] = OrderedDict()
        self.target = 0.0

    def add(self, key: Key) -> None:
        """A new entry. A ghost of it moves the target, once, since it is a ghost no longer."""
        recent, frequent = len(self._recent_ghosts), len(self._frequent_ghosts)
        if key in self._recent_ghosts:
            self.target = min(float(self._capacity), self.target + max(1.0, frequent / recent))
            del self._recent_ghosts[key]
            self._frequent[key] = None
        elif key in self._frequent_ghosts:
            self.target = max(0.0, self.target - max(1.0, recent / frequent))
            del self._frequent_ghosts[key]
            self._frequent[key] = None
        else:
            self._recent[key] = None

    def touch(self, key: Key) -> None:
        """An entry was used again: it is a frequent one."""
        self._recent.pop(key, None)
        self._frequent[key] = None
        self._frequent.move_to_end(key)

    def refresh(self, key: Key) -> None:
        """An entry becomes the most recent of its list."""
        (self._recent if key in self._recent else self._frequent).move_to_end(key)

    def victims(self, count: int, may_go: Callable[[Key], bool]) -> list[Key]:
        """At most `count` entries, the oldest of `recent` while it reaches its target, else of `frequent`."""
        recent = (key for key in self._recent if may_go(key))
        frequent = (key for key in self._frequent if may_go(key))
        left = len(self._recent)
        chosen: list[Key] = []
        while len(chosen) < count:
            first, second = (recent, frequent) if left >= int(self.target) else (frequent, recent)
            key = next(first, None) or next(second, None)
            if key is None:
                break
            left -= key in self._recent
            chosen.append(key)
        return chosen

    def evict(self, key: Key) -> None:
        """An entry goes to make room and leaves its ghost."""
        entries, ghosts = (
            (self._recent, self._recent_ghosts)
            if key in self._recent
            else (self._frequent, self._frequent_ghosts)
        )
        del entries[key]
        ghosts[key] = None
        if len(ghosts) > self._capacity:
            ghosts.popitem(last=False)

    def remove(self, key: Key) -> None:
        """An entry goes since its content is void; it leaves no ghost."""
        del (self._recent if key in self._recent else self._frequent)[key]

    def clear(self) -> None:
        """Forgets everything, ghosts and target too."""
        for entries in (self._recent, self._frequent, self._recent_ghosts, self._frequent_ghosts):
            entries.clear()
        self.target = 0.0

    def order(self) -> list[Key]:
        """All entries: recent ones first, the oldest first."""
        return [*self._recent, *self._frequent]
