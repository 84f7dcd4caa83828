"""What became of moves, and what a step has decided about them."""

from kv.ledger import Kind, held
from kv.moves import (
    Event,
    LeaseRead,
    LeaseTouched,
    Load,
    Loaded,
    MoveGauges,
    MoveNews,
    Safe,
    Store,
    Stored,
)
from scheduler.leases import end_lease, read, touch
from scheduler.loads import drop_fetch, loaded
from scheduler.state import News, SchedulerState, Sequence, Status, push_waiting, release_row


def settle_events(state: SchedulerState, events: tuple[Event, ...]) -> list[tuple[Sequence, str]]:
    """Applies the drivers' events in order. Those of moves that are over are ignored.

    Returns:
        Sequences whose load failed and that must end for it, with the reason.
    """
    failed = []
    for event in events:
        match event:
            case Loaded():
                row = state.ledger.get(event.move_id)
                if row is not None and isinstance(row.move, Load) and not row.quarantined:
                    failed += loaded(state, row, row.move, event)
            case Safe():
                row = state.ledger.get(event.move_id)
                if row is not None and row.quarantined:
                    state.ledger.close(row)
                    release_row(state, row)
            case Stored():
                row = state.ledger.get(event.move_id)
                if row is not None and isinstance(row.move, Store):
                    state.ledger.close(row)
                    release_row(state, row)
                    ok = event.error is None and not row.void
                    state.leaves[row.move.connector].stored(row.move.slots, ok)
            case LeaseTouched():
                touch(state, event)
            case LeaseRead():
                read(state, event.request_id)
            case _:
                pass
    return failed


def void_moves(state: SchedulerState) -> None:
    """The pool's place or content has changed: no peer may read it, and what is on its way means nothing."""
    for row in tuple(state.ledger):
        if row.kind is Kind.LEASE:
            end_lease(state, row)
        else:
            row.void = True


def pool_lost(state: SchedulerState) -> None:
    """The pool's content is gone, and with it what was fetched for sequences without a slot."""
    void_moves(state)
    for sequence in tuple(state.fetched):
        drop_fetch(state, sequence)
        push_waiting(state, sequence)
    for sequence in state.loading.values():  # their loads will end by themselves
        fetch = sequence.fetch
        if fetch is not None:
            for page in (*held(fetch.pages), *held(group for one in fetch.segments for group in one.pages)):
                state.pages.release(page)
            fetch.pages = [[] for _ in fetch.pages]
            fetch.segments.clear()
            fetch.hit = 0


def take_news(state: SchedulerState) -> MoveNews:
    """What this step has decided about moves; the next one begins with nothing."""
    news, state.news = state.news, News()
    connector, ledger = state.connector, state.ledger
    if connector is None:
        return MoveNews()
    waiting = sum(sequence.status is Status.WAITING for sequence in state.remotes.values())
    return MoveNews(
        commands=tuple(news.commands),
        promised=tuple(news.promised),
        expired=news.expired,
        late_reads=news.late_reads,
        outcomes=tuple(connector.take_outcomes()),
        next_deadline_s=ledger.next_deadline(),
        gauges=MoveGauges(
            loading_pages=ledger.count(Kind.LOAD),
            quarantined_pages=ledger.quarantined,
            leased_pages=ledger.count(Kind.LEASE),
            storing_pages=ledger.count(Kind.STORE),
            fetch_waiting=waiting,
            fetch_running=sum(request_id in state.loading for request_id in state.remotes),
            fetch_done=len(state.fetched),
            leases=ledger.num_leases,
            tiers=tuple(connector.tiers()),
        ),
    )
