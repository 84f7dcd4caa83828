"""What a connector decides. Pure: values in, values out, inside the scheduler's step.

A connector owns no page of the pool. It answers where tokens can be had (`lookup`), is told what was
allocated for them (`allocated`), is offered pages that became full (`offer`), and says at a request's end
whether a peer needs its pages (`finished`). The ledger holds the pages of every move until the drivers say
that it is over, so that no connector can free a page that somebody still reads or writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kv.moves import Command, HostSource, PageLists, RemoteSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A waiting request, as a connector sees it.

    Attributes:
        names: of all whole pages of the known tokens, from the prompt's first page on.
        num_tokens: known tokens.
        num_computed: of these, on pages found locally or promised by a connector asked before; whole pages.
        remote: where a peer holds the prompt; None: nowhere, or it has been tried.
    """

    request_id: str
    names: Sequence[bytes]
    num_tokens: int
    num_computed: int
    page_size: int
    windows: tuple[int | None, ...]
    remote: RemoteSource | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Tokens that a connector can bring.

    Attributes:
        connector: index of the leaf.
        tier: HOST or P2P.
        num_tokens: beyond `Query.num_computed`; may end inside a page only at the end of the known tokens.
        first_page: position of the first page to load.
        source: aligned with the pages from `first_page` on, `ceil(num_tokens / page_size)` positions.
    """

    connector: int
    tier: str
    num_tokens: int
    first_page: int
    source: RemoteSource | HostSource


class Later:
    """A connector cannot say yet: ask again in a later step."""


LATER = Later()

Answer = tuple[Offer, ...] | Later
"""Offers one after another without a gap; empty: nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FullPages:
    """Pages of a sequence that became full and computed, or were found cached at admission (then not new).

    Attributes:
        names: of its whole pages from the first on, at least `last`. May be kept.
        tables: per group, page ids of its leading pages; `DUMMY_PAGE` where the window has left one behind.
            Not to be kept: they mean something only during the call.
        first, last: positions `[first, last)` of the newly full pages.
        num_prompt_tokens: of its request.
    """

    request_id: str
    names: Sequence[bytes]
    tables: Sequence[Sequence[int]]
    first: int
    last: int
    num_prompt_tokens: int
    page_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOrder:
    """Copy these pool pages to these host slots."""

    connector: int
    pages: tuple[int, ...]
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseOrder:
    """Keep a finished request's pages for a peer."""

    connector: int


class Connector(Protocol):
    """The scheduler's side of one connector. `lookup` changes nothing and may be asked often."""

    @property
    def supports_hma(self) -> bool:
        """It moves pages of several groups with lifetimes of their own (hybrid memory allocation)."""
        ...

    def arrived(self, request_id: str, remote: RemoteSource | None) -> Sequence[Command]:
        """A request came."""
        ...

    def lookup(self, query: Query) -> Answer:
        """Tokens beyond `query.num_computed` that can be brought."""
        ...

    def allocated(self, request_id: str, pages: PageLists, offers: Sequence[Offer]) -> None:
        """Pages were taken for a request; `offers` are this connector's that will be loaded, empty if others'
        (or none) were chosen: then it gets the real pages all the same."""
        ...

    def load_ended(self, source: RemoteSource | HostSource, num_pages: int | None = None) -> None:
        """A load of this connector is over, well or not: its source is needed no more.

        `num_pages`: leading positions that arrived good; a host tier forgets the page after them, whose bytes
        are not what was stored. None: all, or not known.
        """
        ...

    def offer(self, pages: FullPages) -> Sequence[StoreOrder]:
        """Pages became full. Returned stores have their slots reserved."""
        ...

    def offer_idle(self, idle: Sequence[tuple[int, int, bytes]]) -> Sequence[StoreOrder]:
        """Cached pages that nobody holds, (page, group, name), the next to be evicted first."""
        ...

    def stored(self, slots: Sequence[int], ok: bool) -> None:
        """A store of this connector is over."""
        ...

    def finished(self, request_id: str, *, wants_lease: bool, completed: bool) -> LeaseOrder | None:
        """A request ended. `completed`: by a stop or its length, not by an abort or an error."""
        ...

    def released(self, request_id: str, remote: RemoteSource | None) -> Sequence[Command]:
        """A request that came with `remote` needs its peer no more: loaded, failed, or ended. Once."""
        ...

    def take_outcomes(self) -> Sequence[tuple[int, str, int]]:
        """(connector, outcome, pages) of stores since the last call; see `MoveNews.outcomes`."""
        ...

    def tiers(self) -> Sequence[tuple[int, int, int, int, int]]:
        """Per host tier: (connector, used slots, pinned slots, slots that a store fills, slots)."""
        ...

    def reset(self) -> None:
        """Forget everything cached; what is pinned by a move goes when the move ends."""
        ...

    def check(self) -> None:
        """Recount. Raises AssertionError."""
        ...
