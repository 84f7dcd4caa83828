"""A model without arithmetic: its next token is a hash of every byte of KV that it attends to.

The KV cell of a token is a hash of the bytes of all cells that its position sees and of the token itself,
per page group and rank; the next token is a hash of all cells that the last position sees. So one wrong byte
in one page of one rank changes the output, and the right output of a prompt is known without any page.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

LAYERS, HEADS, HEAD_DIM, ITEM = 1, 1, 2, 2
CELL_BYTES = LAYERS * 2 * HEADS * HEAD_DIM * ITEM
"""Of one token in one group and rank: the first half is its K, the second its V."""

VOCAB = 64
END = VOCAB - 1
"""The model's own end token."""

Cells = tuple[bytes, ...]
"""Per rank and group (rank-major), the cells of a token list one after another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HashModel:
    """Attributes: windows: per page group, tokens that a position sees, itself included; None: all."""

    windows: tuple[int | None, ...] = (None,)
    ranks: int = 1

    def places(self) -> Iterator[tuple[int, int, int | None]]:
        """(rank, group, window) of every list of cells."""
        for rank in range(self.ranks):
            for group, window in enumerate(self.windows):
                yield rank, group, window

    def extend(
        self, rank: int, group: int, window: int | None, first: int, seen: bytes, tokens: Sequence[int]
    ) -> bytes:
        """The cells of `tokens`, which stand at positions `first`, `first + 1`, ...

        Args:
            seen: cells before them, up to position `first`; at least those that the window shows.
        """
        person = bytes((rank, group))
        if window is None:
            running = hashlib.blake2b(seen, digest_size=CELL_BYTES, person=person)
            cells = []
            for token in tokens:
                cell = running.copy()
                cell.update(token.to_bytes(4, "little"))
                cells.append(cell.digest())
                running.update(cells[-1])
            return b"".join(cells)
        have, begin = bytearray(seen), len(seen)
        for token in tokens:
            visible = bytes(have[max(0, len(have) - (window - 1) * CELL_BYTES) :]) if window > 1 else b""
            whole = visible + token.to_bytes(4, "little")
            have += hashlib.blake2b(whole, digest_size=CELL_BYTES, person=person).digest()
        return bytes(have[begin:])

    def choose(self, seen: Sequence[bytes], seed: int) -> int:
        """The next token.

        Args:
            seen: per rank and group, the cells that the last position sees, its own included.
            seed: of the sequence.
        """
        digest = hashlib.blake2b(seed.to_bytes(8, "little", signed=True), digest_size=8, person=b"choose")
        for cells in seen:
            digest.update(cells)
        return int.from_bytes(digest.digest(), "little") % VOCAB

    def first_seen(self, window: int | None, position: int) -> int:
        """The first position that `position` attends to."""
        return 0 if window is None else max(0, position - window + 1)

    def cells(self, tokens: tuple[int, ...]) -> Cells:
        """What the KV of these tokens must be, computed without pages."""
        return _cells(self, tokens)

    def next_token(self, tokens: tuple[int, ...], seed: int) -> int:
        """What must follow these tokens, computed without pages."""
        cells = self.cells(tokens)
        last = len(tokens) - 1
        return self.choose(
            [
                mine[self.first_seen(window, last) * CELL_BYTES :]
                for mine, (_, _, window) in zip(cells, self.places(), strict=True)
            ],
            seed,
        )


@lru_cache(maxsize=4096)
def _cells(model: HashModel, tokens: tuple[int, ...]) -> Cells:
    if not tokens:
        return tuple(b"" for _ in model.places())
    before = _cells(model, tokens[:-1])
    return tuple(
        mine + model.extend(rank, group, window, len(tokens) - 1, mine, tokens[-1:])
        for mine, (rank, group, window) in zip(before, model.places(), strict=True)
    )
