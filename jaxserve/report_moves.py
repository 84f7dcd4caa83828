"""What became of moves, folded into statistics."""

import logging
from collections.abc import Sequence

from jaxserve.movers import Movers
from kv.moves import Event, HostSource, Load, Loaded, NotificationFailed, Store, Stored
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


def observe_moves(stats: MoveStats, events: Sequence[Event], plan: Plan, movers: Movers) -> MoveStats:
    """The drivers' answers, then what the step decided. Numbers that contradict each other cost observations,
    not the loop."""
    try:
        return observe_plan(observe_events(stats, events, movers), plan, movers.kinds)
    except (ValueError, IndexError):
        logger.exception("moves of a step are not counted")
        return stats


def observe_events(stats: MoveStats, events: Sequence[Event], movers: Movers) -> MoveStats:
    """The drivers' answers."""
    for event in events:
        match event:
            case Loaded():
                if event.error is not None:
                    logger.warning("a load did not bring everything: %s", event.error)
                load = movers.ended(event.move_id)
                if isinstance(load, Load):
                    stats = observe_load(stats, movers.kinds[load.connector], _load(event, load))
            case Stored():
                if event.error is not None:
                    logger.warning("pages were not stored: %s", event.error)
                store = movers.ended(event.move_id)
                if isinstance(store, Store):
                    record = StoreRecord(
                        failed=event.error is not None, num_bytes=event.num_bytes, seconds=event.seconds
                    )
                    stats = observe_store(stats, movers.kinds[store.connector], record)
            case NotificationFailed():
                stats = observe_notification_failure(stats)
            case _:
                pass
    return stats


def _load(event: Loaded, load: Load) -> LoadRecord:
    return LoadRecord(
        failed=event.error is not None,
        stage=event.stage,
        num_pages=_pages(load, event.num_pages),
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


def _pages(load: Load, positions: int | None = None) -> int:
    """Pages of a load's leading positions; None: of all."""
    return sum(page != DUMMY_PAGE for group in load.pages for page in group[:positions])
