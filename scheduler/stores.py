"""Pages that connectors copy out of the pool."""

from collections import abc
from typing import overload

import numpy as np

from kv.connectors.base import FullPages, StoreOrder
from kv.ledger import Kind, Row
from kv.moves import Store
from scheduler.state import SchedulerState, Sequence

IDLE_OFFERED = 256
"""Cached pages, the next to be evicted first, that connectors are shown in a step."""

FREE_IS_PLENTY = 64
"""Free pages with which nothing is about to be evicted."""


class Names(abc.Sequence[bytes]):
    """Names of a sequence's leading pages, not copied: its list of names only grows, behind the root's."""

    __slots__ = ("_count", "_names")

    def __init__(self, names: list[bytes], count: int) -> None:
        self._names, self._count = names, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        places = range(1, self._count + 1)[index]
        return self._names[places] if isinstance(places, int) else [self._names[place] for place in places]


class Table(abc.Sequence[int]):
    """A row of a page table, not copied: what is read of it becomes plain integers."""

    __slots__ = ("_row",)

    def __init__(self, row: np.ndarray) -> None:
        self._row = row

    def __len__(self) -> int:
        return len(self._row)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._row[index].tolist()


def offer_pages(
    state: SchedulerState, sequence: Sequence, tables: abc.Sequence[abc.Sequence[int]], first: int, last: int
) -> None:
    """Offers pages that became full and computed to the connectors."""
    if state.connector is None or last <= first:
        return
    full = FullPages(
        request_id=sequence.request.request_id,
        names=Names(sequence.names, last),
        tables=tables,
        first=first,
        last=last,
        num_prompt_tokens=len(sequence.request.prompt_token_ids),
        page_size=state.config.page_size,
    )
    for order in state.connector.offer(full):
        _store(state, order)


def offer_idle(state: SchedulerState) -> None:
    """Shows the connectors which cached pages would be evicted next."""
    transfer, pages = state.config.transfer, state.pages
    if state.connector is None or transfer is None or not pages.idle or pages.free >= FREE_IS_PLENTY:
        return
    if not any(leaf.lazy_offload for leaf in transfer.leaves):
        return
    shown = []
    for page in state.pages.idle_pages():
        group, name = state.prefix.key_of(page)
        shown.append((page, group, name))
        if len(shown) == IDLE_OFFERED:
            break
    for order in state.connector.offer_idle(shown):
        _store(state, order)


def _store(state: SchedulerState, order: StoreOrder) -> None:
    """Holds the pages and orders the copy. The step that wrote them is over: it was settled just now."""
    store = Store(
        move_id=state.ledger.new_id(), connector=order.connector, pages=order.pages, slots=order.slots
    )
    for page in order.pages:
        state.pages.borrow(page)
    state.ledger.open(Row(move=store, pages=order.pages))
    state.news.commands.append(store)


def returning(state: SchedulerState) -> int:
    """Pages that only stores hold: they come back soon, so nobody need be preempted for them."""
    pages = {page for row in state.ledger if row.kind is Kind.STORE for page in row.pages}
    return int((state.pages.refs[list(pages)] == 1).sum()) if pages else 0
