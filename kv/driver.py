"""What the engine loop needs of whoever moves pages, and what drivers are given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kv.moves import Command, Event

Clock = Callable[[], float]
"""Monotonic seconds."""


class Driver(Protocol):
    """Carries out the commands of one connector (or of several). Called from the loop's thread only.

    A driver never raises for one move: a move that cannot be done is an event with an error. It calls the
    `wake` that it was made with, from any thread, whenever `poll` would return something.
    """

    def start(self, commands: Sequence[Command]) -> None:
        """Begins moves; does not wait for them."""
        ...

    def poll(self) -> Sequence[Event]:
        """What has happened since the last call; never waits."""
        ...

    def pool_moved(self, regions: "Sequence[Region]") -> None:
        """The page buffer lies elsewhere now and its old content is lost. When this returns, nobody writes to
        the old place any more; loads and stores under way are answered as failed."""
        ...

    def close(self) -> None:
        """Ends all moves. When this returns, nobody touches the pool."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """The page buffer of one shard, as others see it.

    Attributes:
        address: of page 0.
        page_bytes: page `i` is at `address + i * page_bytes`.
        num_pages: with the dummy page.
        device: "cpu" or "cuda".
        device_id: of a GPU.
    """

    address: int
    page_bytes: int
    num_pages: int
    device: str = "cpu"
    device_id: int = 0

    @property
    def num_bytes(self) -> int:
        """Size of the buffer."""
        return self.page_bytes * self.num_pages


class PageCopies(Protocol):
    """Reads and writes pages of the pool from outside the compiled step. Usable from a driver's thread.

    Rows are uint8 arrays `[n, page_bytes]`.
    """

    def read(self, pages: Sequence[int], out: np.ndarray) -> None:
        """Copies pages out, into the rows of `out`."""
        ...

    def write(self, pages: Sequence[int], rows: np.ndarray) -> None:
        """Copies rows into pages."""
        ...

    def pool_moved(self, regions: Sequence[Region]) -> None:
        """The pool lies elsewhere. No copy is under way: the driver has seen to it."""
        ...
