"""The reducers over moves: `observe_*(stats, what happened) -> stats`. Pure, like those of `observe.py`."""

from dataclasses import replace
from functools import reduce

from metrics.engine import merge_fields
from metrics.histogram import NANO
from metrics.move_records import LoadRecord, MoveStepRecord, StoreRecord
from metrics.moves import (
    NIXL,
    OFFLOADING,
    SIMPLE,
    STORE_OUTCOMES,
    HostCopies,
    MoveStats,
    NixlStats,
    TierSlots,
)


def observe_load(stats: MoveStats, kind: str, load: LoadRecord) -> MoveStats:
    """A load of a connector of class `kind` is over.

    Raises:
        ValueError: no such connector is configured.
    """
    if kind == NIXL and stats.nixl is not None:
        return replace(stats, nixl=_read(stats.nixl, load))
    if kind == OFFLOADING and stats.offload is not None:
        loads = _copy(stats.offload.loads, load.num_bytes, load.seconds, load.failed)
        return replace(stats, offload=replace(stats.offload, loads=loads))
    if kind == SIMPLE and stats.simple is not None:
        loads = _copy(stats.simple.loads, load.num_bytes, load.seconds, load.failed)
        loaded = stats.simple.loaded_pages + load.num_pages
        return replace(stats, simple=replace(stats.simple, loads=loads, loaded_pages=loaded))
    raise _unknown(kind)


def observe_store(stats: MoveStats, kind: str, store: StoreRecord) -> MoveStats:
    """A store of a connector of class `kind` is over.

    Raises:
        ValueError: no such host tier is configured.
    """
    if kind == OFFLOADING and stats.offload is not None:
        stores = _copy(stats.offload.stores, store.num_bytes, store.seconds, store.failed)
        return replace(stats, offload=replace(stats.offload, stores=stores))
    if kind == SIMPLE and stats.simple is not None:
        stores = _copy(stats.simple.stores, store.num_bytes, store.seconds, store.failed)
        return replace(stats, simple=replace(stats.simple, stores=stores))
    raise _unknown(kind)


def observe_notification_failure(stats: MoveStats) -> MoveStats:
    """A peer could not be told that its lease may end.

    Raises:
        ValueError: no NixlConnector is configured.
    """
    if stats.nixl is None:
        raise _unknown(NIXL)
    failed = stats.nixl.failed_notifications + 1
    return replace(stats, nixl=replace(stats.nixl, failed_notifications=failed))


def observe_step_moves(stats: MoveStats, step: MoveStepRecord) -> MoveStats:
    """One step; its gauges replace the last step's.

    Raises:
        ValueError: it speaks of what only a connector has that is not configured, or an outcome is unknown.
    """
    nixl, offload, simple = stats.nixl, stats.offload, stats.simple
    known = {NIXL: nixl, OFFLOADING: offload, SIMPLE: simple}
    named = (*(kind for kind, _ in (*step.tiers, *step.issued)), *(kind for kind, *_ in step.outcomes))
    leased = (NIXL,) if step.leases or step.expired or step.late_reads else ()
    for kind in (*leased, *named):
        if known.get(kind) is None:
            raise _unknown(kind)
    for _, outcome, _ in step.outcomes:
        if outcome not in STORE_OUTCOMES:
            raise ValueError(f"unknown outcome {outcome!r}, expected one of {STORE_OUTCOMES}")
    if nixl is not None:
        nixl = replace(
            nixl,
            leases=step.leases,
            expired=nixl.expired + step.expired,
            late_reads=nixl.late_reads + step.late_reads,
        )
    if offload is not None:
        refused = sum(
            n for kind, what, n in step.outcomes if (kind, what) == (OFFLOADING, "dropped_cpu_full")
        )
        offload = replace(offload, no_room=offload.no_room + refused, tier=_tier(step, OFFLOADING))
    if simple is not None:
        outcomes = simple.outcomes
        for kind, outcome, pages in step.outcomes:
            outcomes = outcomes.add(outcome, pages) if kind == SIMPLE else outcomes
        issued = simple.issued_pages + sum(pages for kind, pages in step.issued if kind == SIMPLE)
        simple = replace(simple, outcomes=outcomes, issued_pages=issued, tier=_tier(step, SIMPLE))
    return replace(stats, pages=step.pages, fetch=step.fetch, nixl=nixl, offload=offload, simple=simple)


def _read(old: NixlStats, load: LoadRecord) -> NixlStats:
    stats = replace(
        old,
        failed_reads=old.failed_reads + (load.stage in ("handshake", "transfer")),
        stale_reads=old.stale_reads + (load.stage == "verify" and not load.digest_failures),
        digest_failures=old.digest_failures + load.digest_failures,
        retries=old.retries + load.retries,
    )
    # What was read and then refused was read all the same; a read of nothing is no read.
    if load.stage in ("handshake", "transfer") or not load.num_descriptors:
        return stats
    return replace(
        stats,
        read_s=old.read_s.observe(load.seconds),
        post_s=old.post_s.observe(load.post_seconds),
        read_bytes=old.read_bytes.observe(load.num_bytes),
        descriptors=old.descriptors.observe(load.num_descriptors),
    )


def _copy(old: HostCopies, num_bytes: int, seconds: float, failed: bool) -> HostCopies:
    return HostCopies(
        size=old.size.observe(num_bytes) if num_bytes else old.size,
        nanoseconds=old.nanoseconds + round(seconds * NANO),
        failures=old.failures + failed,
    )


def _tier(step: MoveStepRecord, kind: str) -> TierSlots:
    return reduce(merge_fields, (slots for of, slots in step.tiers if of == kind), TierSlots())


def _unknown(kind: str) -> ValueError:
    return ValueError(f"no statistics are kept for {kind!r} here")
