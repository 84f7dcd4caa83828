"""Pages that stay where they are until a peer has read them."""

from kv.ledger import Row, held
from kv.moves import Lease, LeaseTerms, LeaseTouched, Unlease
from kv.types import DUMMY_PAGE
from scheduler.state import SchedulerState, Sequence, release_row

HEARTBEAT_EXTENDS = 2 / 3
"""Of the lease's duration: what a heartbeat adds from its arrival on, as in vLLM."""

EXPIRED_KEPT = 4096
"""Names of expired leases that are remembered, to count who reads them late."""


def finish(state: SchedulerState, sequence: Sequence, *, completed: bool) -> LeaseTerms | None:
    """A sequence ends: keeps its pages for a peer, if its client asked for that. Call it before they go."""
    if state.connector is None or sequence.index != 0:
        return None
    request = sequence.request
    order = state.connector.finished(
        request.request_id, wants_lease=request.lease and sequence.slot is not None, completed=completed
    )
    if order is None or sequence.slot is None or state.ledger.lease(request.request_id) is not None:
        return None
    columns, slot, size = state.columns, sequence.slot, state.config.page_size
    prompt = len(request.prompt_token_ids)
    count = -(-prompt // size)
    pages = tuple(tuple(int(page) for page in table[slot, :count]) for table in columns.page_tables)
    generations = tuple(
        tuple(int(state.pages.generation[page]) if page != DUMMY_PAGE else 0 for page in group)
        for group in pages
    )
    row_pages = held(pages)
    for page in row_pages:
        state.pages.share(page)
    order_lease = Lease(
        move_id=state.ledger.new_id(),
        connector=order.connector,
        request_id=request.request_id,
        pages=pages,
        generations=generations,
        num_tokens=prompt,
    )
    duration = _lease_s(state, order.connector)
    state.ledger.open(Row(move=order_lease, pages=row_pages, deadline_s=state.news.now_s + duration))
    state.news.commands.append(order_lease)
    return LeaseTerms(
        request_id=request.request_id,
        pages=pages,
        generations=generations,
        num_tokens=prompt,
        cached_tokens=sequence.hit + sum(sequence.external.values()),
    )


def expire(state: SchedulerState) -> None:
    """Ends leases whose time is over. Heartbeats that arrived before have been settled before."""
    for row in state.ledger.leases():
        if row.deadline_s <= state.news.now_s:
            end_lease(state, row)
            state.news.expired += 1
            if isinstance(row.move, Lease):
                state.expired[row.move.request_id] = None
    while len(state.expired) > EXPIRED_KEPT:
        del state.expired[next(iter(state.expired))]


def touch(state: SchedulerState, event: LeaseTouched) -> None:
    for request_id in event.request_ids:
        row = state.ledger.lease(request_id)
        if row is not None and event.at_s <= row.deadline_s:
            extended = event.at_s + _lease_s(state, row.move.connector) * HEARTBEAT_EXTENDS
            row.deadline_s = max(row.deadline_s, extended)


def read(state: SchedulerState, request_id: str) -> None:
    row = state.ledger.lease(request_id)
    if row is not None:
        end_lease(state, row)
    elif request_id in state.expired:
        del state.expired[request_id]
        state.news.late_reads += 1


def end_lease(state: SchedulerState, row: Row) -> None:
    state.ledger.close(row)
    release_row(state, row)
    state.news.commands.append(Unlease(connector=row.move.connector, request_id=_name(row)))


def _name(row: Row) -> str:
    if not isinstance(row.move, Lease):
        raise ValueError(f"move {row.move.move_id} is no lease")
    return row.move.request_id


def _lease_s(state: SchedulerState, connector: int) -> float:
    transfer = state.config.transfer
    if transfer is None:
        raise ValueError("no connector is configured")
    return transfer.leaves[connector].lease_s
