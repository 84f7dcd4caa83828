"""What became of moves, folded into statistics."""

import logging
from collections.abc import Callable, Sequence

from kv.moves import Event, HostSource, Load, Loaded, NotificationFailed, Stored
from kv.types import DUMMY_PAGE
from metrics.move_records import LoadRecord, MoveStepRecord, StoreRecord
from metrics.moves import FetchStages, MoveStats, PageStates, TierSlots
from metrics.observe_moves import (
    observe_load,
    observe_notification_failure,
    observe_step_moves,
    observe_store,
)
from scheduler.types import Plan

logger = logging.getLogger("jaxserve")


def observe_events(
    stats: MoveStats, events: Sequence[Event], kind_of: Callable[[int], str | None]
) -> MoveStats:
    """The drivers' answers. `kind_of`: the class of connector of a move; None: it is unknown."""
    for event in events:
        match event:
            case Loaded():
                if event.error is not None:
                    logger.warning("a load did not bring everything: %s", event.error)
                kind = kind_of(event.move_id)
                if kind is not None:
                    stats = observe_load(stats, kind, _load(event))
            case Stored():
                if event.error is not None:
                    logger.warning("pages were not stored: %s", event.error)
                kind = kind_of(event.move_id)
                if kind is not None:
                    record = StoreRecord(
                        failed=event.error is not None, num_bytes=event.num_bytes, seconds=event.seconds
                    )
                    stats = observe_store(stats, kind, record)
            case NotificationFailed():
                stats = observe_notification_failure(stats)
            case _:
                pass
    return stats


def _load(event: Loaded) -> LoadRecord:
    return LoadRecord(
        failed=event.error is not None,
        stage=event.stage,
        num_pages=event.num_pages,
        num_bytes=event.num_bytes,
        num_descriptors=event.num_descriptors,
        seconds=event.seconds,
        post_seconds=event.post_seconds,
        digest_failures=event.digest_failures,
        retries=event.retries,
    )


def observe_plan(stats: MoveStats, plan: Plan, kinds: Sequence[str]) -> MoveStats:
    """What a step decided. `kinds`: the class of each leaf connector."""
    moves, gauges = plan.moves, plan.gauges
    issued = tuple(
        (kinds[command.connector], _pages(command))
        for command in moves.commands
        if isinstance(command, Load) and isinstance(command.source, HostSource)
    )
    record = MoveStepRecord(
        pages=PageStates(
            free=gauges.pages_free,
            idle=gauges.pages_idle,
            in_use=gauges.pages_in_use,
            loading=moves.gauges.loading_pages,
            leased=moves.gauges.leased_pages,
            storing=moves.gauges.storing_pages,
            quarantined=moves.gauges.quarantined_pages,
        ),
        fetch=FetchStages(
            waiting_to_start=moves.gauges.fetch_waiting,
            in_progress=moves.gauges.fetch_running,
            completed_waiting=moves.gauges.fetch_done,
        ),
        leases=moves.gauges.leases,
        tiers=tuple(
            (kinds[index], TierSlots(slots=slots, used=used, pinned=pinned, storing=storing))
            for index, used, pinned, storing, slots in moves.gauges.tiers
        ),
        issued=issued,
        expired=moves.expired,
        late_reads=moves.late_reads,
        outcomes=tuple((kinds[index], outcome, pages) for index, outcome, pages in moves.outcomes),
    )
    return observe_step_moves(stats, record)


def _pages(load: Load) -> int:
    return sum(page != DUMMY_PAGE for group in load.pages for page in group)
