"""What a host tier holds: which host pages hold the KV of which tokens, and who needs them now.

A tier is cut into chunks of `k` neighbouring slots (a slot is one host page). A chunk holds the `k` pages of
one page group whose last is named `name`: an entry. An entry is being stored, then ready. A load pins its
entries; what is pinned or being stored is never evicted. A forgotten entry that a move still uses keeps its
slots until that move ends.
"""

from collections.abc import Container, Iterable, Iterator, Sequence

from kv.eviction import Arc, Key, Lru, Policy
from kv.moves import PageLists
from kv.prefix import window_pages

NO_SLOT = 0
"""Stands in a host source where a group needs no page, as the dummy page stands in the load's targets. Real
slots count from 1."""


class Tier:
    """The index of a host tier. Linear: methods change it in place."""

    __slots__ = ("_chunk_of", "_free", "_held", "_key_of", "_pins", "_policy", "_storing", "pages_per_chunk")

    def __init__(
        self, num_slots: int, *, num_groups: int, pages_per_chunk: int = 1, policy: str = "lru"
    ) -> None:
        """Args: num_slots: host pages; what does not fill a chunk is not used. policy: "lru" or "arc".

        Raises:
            ValueError: not one chunk fits.
        """
        chunks = num_slots // pages_per_chunk
        if chunks < 1:
            raise ValueError(f"a host tier of {num_slots} pages holds no chunk of {pages_per_chunk} pages")
        self.pages_per_chunk = pages_per_chunk
        self._policy: Policy = Arc(chunks) if policy == "arc" else Lru()
        self._chunk_of: list[dict[bytes, int]] = [{} for _ in range(num_groups)]
        self._key_of: list[Key | None] = [None] * chunks
        self._pins = [0] * chunks
        self._storing = bytearray(chunks)
        self._free = list(range(chunks - 1, -1, -1))
        self._held = 0

    @property
    def num_slots(self) -> int:
        """Slots in whole chunks."""
        return len(self._key_of) * self.pages_per_chunk

    @property
    def used(self) -> int:
        """Slots of chunks that hold something or that a move still uses."""
        return (len(self._key_of) - len(self._free)) * self.pages_per_chunk

    @property
    def pinned(self) -> int:
        """Slots of chunks that a load or a store uses now."""
        return self._held * self.pages_per_chunk

    @property
    def storing(self) -> int:
        """Slots of chunks that a store fills now."""
        return self._storing.count(1) * self.pages_per_chunk

    @property
    def free_chunks(self) -> int:
        """Chunks that can be reserved without evicting anything."""
        return len(self._free)

    def slots(self, chunk: int) -> range:
        """The slots of a chunk."""
        return range(chunk * self.pages_per_chunk + 1, (chunk + 1) * self.pages_per_chunk + 1)

    def holds(self, group: int, name: bytes) -> bool:
        """An entry exists, ready or being stored."""
        return name in self._chunk_of[group]

    def is_storing(self, group: int, name: bytes) -> bool:
        """An entry exists and is not ready."""
        chunk = self._chunk_of[group].get(name)
        return chunk is not None and bool(self._storing[chunk])

    def ready(self) -> Iterator[tuple[int, bytes, int]]:
        """(group, name, chunk) of every entry that a load may have, for checks."""
        for group, chunks in enumerate(self._chunk_of):
            for name, chunk in chunks.items():
                if not self._storing[chunk]:
                    yield group, name, chunk

    def match(
        self, names: Sequence[bytes], start: int, limit: int, windows: Sequence[int | None], page_size: int
    ) -> PageLists | None:
        """Finds the longest run of pages from position `start` on that lets a request go on after it.

        A full-attention group needs every page of the run, a sliding-window group those that a query right
        after the run still sees. What lies before `start` is elsewhere already. Changes nothing.

        Args:
            names: of the request's pages from position 0 on.
            limit: the run ends at most before this position; it ends with a chunk.

        Returns:
            Per group, a slot for each position from `start` on, `NO_SLOT` where the group needs none; empty
            lists: nothing. None: a page of the run is still being stored.
        """
        size = self.pages_per_chunk
        sees = [None if window is None else window_pages(window, page_size) for window in windows]
        needed = [None if pages is None else -(-pages // size) for pages in sees]
        chunk_names = names[size - 1 : limit : size]
        end = match_length(self._chunk_of, chunk_names, start // size, needed) * size
        found: list[tuple[int, ...]] = []
        for known, pages in zip(self._chunk_of, sees, strict=True):
            first = start if pages is None else max(start, end - pages)
            slots = [NO_SLOT] * (min(first, end) - start)
            chunks = [known[name] for name in chunk_names[first // size : end // size]]
            if any(self._storing[chunk] for chunk in chunks):
                return None
            slots += [chunk * size + at for chunk in chunks for at in range(1, size + 1)][first % size :]
            found.append(tuple(slots))
        return tuple(found)

    def pin(self, source: PageLists) -> None:
        """A load of these slots begins: they keep their content, and count as used again.

        Raises:
            ValueError: a slot is not ready.
        """
        chunks = list(self._chunks(slot for slots in source for slot in reversed(slots)))
        for chunk in chunks:
            if self._key_of[chunk] is None or self._storing[chunk]:
                raise ValueError(f"host chunk {chunk} is pinned but holds nothing that is ready")
        for chunk in chunks:
            self._held += self._pins[chunk] == 0
            self._pins[chunk] += 1
            key = self._key_of[chunk]
            if key is not None:
                self._policy.touch(key)

    def unpin(self, source: PageLists) -> None:
        """A load of these slots is over.

        Raises:
            ValueError: a slot is not pinned.
        """
        for chunk in self._chunks(slot for slots in source for slot in slots):
            if self._pins[chunk] < 1:
                raise ValueError(f"host chunk {chunk} is unpinned but no load holds it")
            self._pins[chunk] -= 1
            if self._pins[chunk] == 0:
                self._held -= 1
                self._give_back(chunk)

    def room(self, most: int, keep: Container[bytes] = ()) -> int:
        """How many chunks, up to `most`, `reserve` could give without evicting the names in `keep`."""
        short = most - len(self._free)
        return most if short <= 0 else len(self._free) + len(self._victims(short, keep))

    def reserve(self, keys: Sequence[Key], keep: Container[bytes] = ()) -> list[int] | None:
        """Makes room for new entries, all or none, evicting what is needed. Their stores begin.

        Args:
            keys: none of them is held. The first becomes the most recent.
            keep: names that are not evicted for these.

        Returns:
            A chunk per key; None: there is no room, and nothing has changed.
        """
        short = len(keys) - len(self._free)
        if short > 0:
            victims = self._victims(short, keep)
            if len(victims) < short:
                return None
            for key in victims:
                self._policy.evict(key)
                self._free.append(self._drop(key))
        chunks = [self._free.pop() for _ in keys]
        for key, chunk in zip(keys, chunks, strict=True):
            self._chunk_of[key[0]][key[1]] = chunk
            self._key_of[chunk] = key
            self._storing[chunk] = 1
            self._held += 1
        for key in reversed(keys):
            self._policy.add(key)
        return chunks

    def stored(self, slots: Iterable[int], ok: bool) -> None:
        """The stores into these slots are over. What was not stored well is forgotten.

        Raises:
            ValueError: nothing is being stored there.
        """
        for chunk in self._chunks(slots):
            if not self._storing[chunk]:
                raise ValueError(f"a store into host chunk {chunk} has ended, but none had begun")
            self._storing[chunk] = 0
            self._held -= 1
            if not ok:
                self._forget(chunk)
            self._give_back(chunk)

    def touch(self, group: int, name: bytes) -> None:
        """An entry was used again; nothing if there is none."""
        if name in self._chunk_of[group]:
            self._policy.touch((group, name))

    def refresh(self, group: int, name: bytes) -> None:
        """An entry becomes recent without having been used again; nothing if there is none."""
        if name in self._chunk_of[group]:
            self._policy.refresh((group, name))

    def forget(self, slots: Iterable[int]) -> None:
        """The content of these slots is void: nobody finds it any more."""
        for chunk in self._chunks(slots):
            if self._key_of[chunk] is not None:
                self._forget(chunk)
                self._give_back(chunk)

    def reset(self) -> None:
        """Forgets everything; slots that a move uses are given back when it ends."""
        self._policy.clear()
        for known in self._chunk_of:
            for chunk in known.values():
                self._key_of[chunk] = None
                self._give_back(chunk)
            known.clear()

    def check(self) -> None:
        """Recounts.

        Raises:
            AssertionError: a chunk is free and held, an entry is lost, or a counter is wrong.
        """
        free = set(self._free)
        entries = {
            chunk: (group, name)
            for group, known in enumerate(self._chunk_of)
            for name, chunk in known.items()
        }
        held = 0
        for chunk, key in enumerate(self._key_of):
            busy = self._pins[chunk] > 0 or bool(self._storing[chunk])
            held += busy
            if (chunk in free) == (key is not None or busy):
                raise AssertionError(f"host chunk {chunk} is free and held, or neither")
            if entries.get(chunk) != key:
                raise AssertionError(f"host chunk {chunk} holds {key}, the index says {entries.get(chunk)}")
            if self._pins[chunk] < 0 or (self._pins[chunk] and self._storing[chunk]):
                raise AssertionError(f"host chunk {chunk} is loaded while it is stored")
        if len(free) != len(self._free) or held != self._held:
            raise AssertionError(f"{self._held} held host chunks counted, {held} found")
        if sorted(self._policy.order()) != sorted(entries.values()):
            raise AssertionError("the eviction order and the index differ")

    def _chunks(self, slots: Iterable[int]) -> Iterator[int]:
        """The chunks of these slots, each once, in order of first appearance."""
        size = self.pages_per_chunk
        return iter(dict.fromkeys((slot - 1) // size for slot in slots if slot != NO_SLOT))

    def _victims(self, count: int, keep: Container[bytes]) -> list[Key]:
        def may_go(key: Key) -> bool:
            chunk = self._chunk_of[key[0]][key[1]]
            return not (self._pins[chunk] or self._storing[chunk]) and key[1] not in keep

        return self._policy.victims(count, may_go)

    def _drop(self, key: Key) -> int:
        """Takes an entry out of the index; returns its chunk."""
        chunk = self._chunk_of[key[0]].pop(key[1])
        self._key_of[chunk] = None
        return chunk

    def _forget(self, chunk: int) -> None:
        key = self._key_of[chunk]
        if key is not None:
            self._policy.remove(key)
            self._drop(key)

    def _give_back(self, chunk: int) -> None:
        """A chunk that holds nothing and that no move uses any more is free."""
        if self._key_of[chunk] is None and self._pins[chunk] == 0 and not self._storing[chunk]:
            self._free.append(chunk)


def match_length(
    known: Sequence[Container[bytes]], names: Sequence[bytes], start: int, needed: Sequence[int | None]
) -> int:
    """Where the longest useful run of names from `start` on ends; at least `start`, if that many are named.

    Args:
        known: per group, the names that are there.
        needed: per group, how many names at the end of the run must be known; None: all. Those before
            `start` count as known.
    """
    end = len(names)
    for group, count in zip(known, needed, strict=True):
        if count is None:
            end = _leading(group, names, start, end)
    while True:
        shrunk = end
        for group, count in zip(known, needed, strict=True):
            if count is not None:
                shrunk = _ending(group, names, start, shrunk, count)
        if shrunk == end:
            return end
        end = shrunk


def _leading(known: Container[bytes], names: Sequence[bytes], start: int, end: int) -> int:
    """Where the run of known names from `start` on ends."""
    for at in range(start, end):
        if names[at] not in known:
            return at
    return end


def _ending(known: Container[bytes], names: Sequence[bytes], start: int, end: int, count: int) -> int:
    """Largest end whose last `count` names are known, or all from `start` on."""
    if count == 0:
        return end
    run = 0
    for at in range(end - 1, start - 1, -1):
        run = run + 1 if names[at] in known else 0
        if run == count:
            return at + run
    return min(start, end) + run
