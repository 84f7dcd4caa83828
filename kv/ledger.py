"""One row per move, and with it the pages that the move holds.

A row is a holder of pages like a running sequence is: as long as it stands, its pages cannot be taken for
anything else. So a page that a copy still reads or writes never returns to the pool, whatever has become of
the request that the move was for.
"""

import enum
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kv.moves import Lease, Load, Store
from kv.types import DUMMY_PAGE


class Kind(enum.Enum):
    """What a row's pages are held for."""

    LOAD = "load"
    STORE = "store"
    LEASE = "lease"


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """One move that is not over.

    Attributes:
        move: as it was ordered.
        pages: pool pages that the row holds, without dummy pages.
        deadline_s: of a lease.
        quarantined: a load that has failed while its targets may still be written.
        void: the pool's content was lost meanwhile; whatever arrives or was copied means nothing.
    """

    move: Load | Store | Lease
    pages: tuple[int, ...]
    deadline_s: float = 0.0
    quarantined: bool = False
    void: bool = False

    @property
    def kind(self) -> Kind:
        """What the pages are held for."""
        match self.move:
            case Load():
                return Kind.LOAD
            case Store():
                return Kind.STORE
            case Lease():
                return Kind.LEASE


class Ledger:
    """All moves under way. Linear: methods change it in place."""

    __slots__ = ("_leases", "_next_id", "_pages", "_quarantined", "_rows")

    def __init__(self) -> None:
        self._rows: dict[int, Row] = {}
        self._leases: dict[str, int] = {}
        self._next_id = 1
        self._pages: Counter[Kind] = Counter()
        self._quarantined = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def new_id(self) -> int:
        """The number of the next move."""
        self._next_id += 1
        return self._next_id - 1

    def open(self, row: Row) -> None:
        """Enters a row.

        Raises:
            ValueError: its number, or its lease's name, is in use.
        """
        move = row.move
        if move.move_id in self._rows:
            raise ValueError(f"move {move.move_id} is under way already")
        if isinstance(move, Lease):
            if move.request_id in self._leases:
                raise ValueError(f"request {move.request_id} has a lease already")
            self._leases[move.request_id] = move.move_id
        self._rows[move.move_id] = row
        self._pages[row.kind] += len(row.pages)

    def get(self, move_id: int) -> Row | None:
        """A row; None: the move is over, or never was."""
        return self._rows.get(move_id)

    def lease(self, request_id: str) -> Row | None:
        """The lease of this name; None: it is over, or never was."""
        move_id = self._leases.get(request_id)
        return None if move_id is None else self._rows[move_id]

    def leases(self) -> list[Row]:
        """All leases, oldest first."""
        return [self._rows[move_id] for move_id in self._leases.values()]

    def quarantine(self, row: Row) -> None:
        """A load has failed and its targets may still be written."""
        if not row.quarantined:
            row.quarantined = True
            self._quarantined += len(row.pages)
            self._pages[Kind.LOAD] -= len(row.pages)

    def close(self, row: Row) -> None:
        """The move is over. The caller releases the pages, or takes them over."""
        move = self._rows.pop(row.move.move_id).move
        if isinstance(move, Lease):
            del self._leases[move.request_id]
        if row.quarantined:
            self._quarantined -= len(row.pages)
        else:
            self._pages[row.kind] -= len(row.pages)

    def count(self, kind: Kind) -> int:
        """Pages held by rows of a kind, those in quarantine left out."""
        return self._pages[kind]

    @property
    def num_leases(self) -> int:
        """Leases held for peers."""
        return len(self._leases)

    @property
    def quarantined(self) -> int:
        """Pages in quarantine."""
        return self._quarantined

    def next_deadline(self) -> float | None:
        """When the first lease ends; None: there is none."""
        return min((row.deadline_s for row in self.leases()), default=None)

    def check(self) -> None:
        """Recounts.

        Raises:
            AssertionError: the counts are wrong.
        """
        counted: Counter[Kind] = Counter()
        for row in self:
            if not row.quarantined:
                counted[row.kind] += len(row.pages)
        if any(counted[kind] != self._pages[kind] for kind in Kind):
            raise AssertionError(f"the ledger counts {self._pages}, its rows hold {counted}")
        if sum(len(row.pages) for row in self if row.quarantined) != self._quarantined:
            raise AssertionError("the ledger miscounts its quarantine")
        if {row.move.move_id for row in self if row.kind is Kind.LEASE} != set(self._leases.values()):
            raise AssertionError("the ledger has lost a lease")


def held(pages: Iterable[Iterable[int]]) -> tuple[int, ...]:
    """The real pages of page lists, flat."""
    return tuple(page for group in pages for page in group if page != DUMMY_PAGE)
