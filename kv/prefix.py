"""Which page holds the KV of which tokens.

A page is named by a chain hash: its tokens, hashed together with the name of the page before it, up to a
root that holds the cache key (model, weight version) and the salt. Equal names therefore mean equal
prefixes, and different models, weights or salts never meet (vLLM's automatic prefix caching; 256-bit
keyed names against collisions made on purpose, CVE-2025-25183).
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from kv.types import DUMMY_PAGE

DIGEST_BYTES = 32


def root(cache_key: str, salt: str, *, private: str = "") -> bytes:
    """Names the empty prefix.

    Args:
        cache_key: model and weight version.
        salt: requests of other salts never match.
        private: when not empty, only requests with the same value match.
    """
    parts = [part.encode() for part in (cache_key, salt, private)]
    framed = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return hashlib.blake2b(framed, digest_size=DIGEST_BYTES, person=b"jaxserve root").digest()


def extend(parent: bytes, tokens: np.ndarray, page_size: int) -> list[bytes]:
    """Names the whole pages of `tokens` (int32 `[N]`) that follow the page named `parent`."""
    names = []
    data = np.ascontiguousarray(tokens, np.int32).tobytes()
    size = page_size * 4
    for start in range(0, len(data) - size + 1, size):
        parent = hashlib.blake2b(parent + data[start : start + size], digest_size=DIGEST_BYTES).digest()
        names.append(parent)
    return names


def window_pages(window: int, page_size: int) -> int:
    """Pages that a query after whole pages still sees through a sliding window."""
    return -((1 - window) // page_size)


class PrefixCache:
    """Pages by name, per page group. Linear: methods change it in place."""

    __slots__ = ("_key_of", "_page_of")

    def __init__(self, num_groups: int) -> None:
        self._page_of: list[dict[bytes, int]] = [{} for _ in range(num_groups)]
        self._key_of: dict[int, tuple[int, bytes]] = {}

    def __len__(self) -> int:
        return len(self._key_of)

    def insert(self, group: int, name: bytes, page: int) -> bool:
        """Enters a full, computed page. False: another page has this name already, and stays."""
        if name in self._page_of[group] or page in self._key_of:
            return False
        self._page_of[group][name] = page
        self._key_of[page] = (group, name)
        return True

    def evict(self, page: int) -> None:
        """Forgets a page.

        Raises:
            KeyError: the page is not in the cache.
        """
        group, name = self._key_of.pop(page)
        del self._page_of[group][name]

    def key_of(self, page: int) -> tuple[int, bytes]:
        """Group and name of a page that is here.

        Raises:
            KeyError: the page is not in the cache.
        """
        return self._key_of[page]

    def clear(self) -> list[int]:
        """Forgets everything; returns the pages that were known."""
        pages = list(self._key_of)
        self._key_of.clear()
        for known in self._page_of:
            known.clear()
        return pages

    def match(self, names: Sequence[bytes], windows: Sequence[int | None], page_size: int) -> list[list[int]]:
        """Finds the longest prefix whose pages are all here, in every group.

        A full-attention group needs every page from the start. A sliding-window group needs only those
        that a query right after the prefix still sees; the dummy page stands for the others.

        Returns:
            Per group, the page ids of the prefix; all of one length.
        """
        length = len(names)
        for known, window in zip(self._page_of, windows, strict=True):
            if window is None:
                length = self._leading(known, names, length)
        while True:
            shrunk = length
            for known, window in zip(self._page_of, windows, strict=True):
                if window is not None:
                    shrunk = self._ending(known, names, shrunk, window_pages(window, page_size))
            if shrunk == length:
                break
            length = shrunk
        found = []
        for known, window in zip(self._page_of, windows, strict=True):
            first = 0 if window is None else max(0, length - window_pages(window, page_size))
            found.append([DUMMY_PAGE] * first + [known[name] for name in names[first:length]])
        return found

    @staticmethod
    def _leading(known: dict[bytes, int], names: Sequence[bytes], limit: int) -> int:
        """Length of the longest known run from the start, at most `limit`."""
        for length in range(limit):
            if names[length] not in known:
                return length
        return limit

    @staticmethod
    def _ending(known: dict[bytes, int], names: Sequence[bytes], limit: int, needed: int) -> int:
        """Largest length up to `limit` whose last `needed` pages (or all, if fewer) are known."""
        if needed == 0:
            return limit
        run = 0
        for index in range(limit - 1, -1, -1):
            run = run + 1 if names[index] in known else 0
            if run == needed:
                return index + run
        return run

    def items(self) -> list[tuple[int, int, bytes]]:
        """(page, group, name) of all pages, for checks."""
        return [(page, group, name) for page, (group, name) in self._key_of.items()]
