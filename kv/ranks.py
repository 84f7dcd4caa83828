"""An engine of several ranks, each with a pool, agent and side channel of its own, as one driver.

A move counts when every rank has reported it, and then once: what the step and the statistics see are merged
events only. Rank `r` of an engine talks to rank `r` of its peer, whose side channel listens `r` ports above
the one that the request names, as in vLLM.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from kv.driver import Driver, Region
from kv.moves import (
    Command,
    Event,
    Lease,
    LeaseRead,
    LeaseTouched,
    Load,
    Loaded,
    NotificationFailed,
    RemoteSource,
    Safe,
    Store,
    Stored,
    Track,
    Unlease,
)

_T = TypeVar("_T")

NAMES_KEPT = 4096
"""Names of ended leases, and of requests with a failed notification, that are remembered so that no other
rank's word on them is passed on twice."""


@dataclass(slots=True, eq=False)
class _Load:
    """A load that is not over. Attributes: reports: by rank; unsafe: ranks whose targets may still be
    written; told: the merged `Loaded` is out."""

    reports: dict[int, Loaded] = field(default_factory=dict)
    unsafe: set[int] = field(default_factory=set)
    told: bool = False


class Ranks:
    """The drivers of all ranks; `kv.driver.Driver`.

    Whoever drives it treats it as one driver: where a rank's driver raises, this raises, and with `close` all
    of them end.

    Attributes:
        ignored: reports of moves that are over or unknown, and repeated ones.
    """

    def __init__(self, drivers: Sequence[Driver]) -> None:
        """Args: drivers: one per rank, in order.

        Raises:
            ValueError: there is none.
        """
        if not drivers:
            raise ValueError("an engine has at least one rank")
        self._drivers = tuple(drivers)
        self._loads: dict[int, _Load] = {}
        self._stores: dict[int, dict[int, Stored]] = {}
        self._leases: dict[str, dict[int, float]] = {}
        """When each rank's peer had read a lease."""
        self._ended: dict[str, dict[int, float]] = {}
        """The same of leases that are over, oldest first: a rank's peer may still say that it has read."""
        self._failed: dict[str, None] = {}
        """Requests whose failed notification has been told, oldest first."""
        self.ignored = 0

    def start(self, commands: Sequence[Command]) -> None:
        """Begins moves on every rank."""
        for command in commands:
            match command:
                case Load():
                    self._loads[command.move_id] = _Load()
                case Store():
                    self._stores[command.move_id] = {}
                case Lease():
                    self._leases[command.request_id] = {}
                case Unlease():
                    reads = self._leases.pop(command.request_id, None)
                    if reads is not None:
                        _remember(self._ended, command.request_id, reads)
                case Track():
                    self._failed.pop(command.request_id, None)
                case _:
                    pass
        for rank, driver in enumerate(self._drivers):
            driver.start([_of_rank(command, rank) for command in commands])

    def poll(self) -> list[Event]:
        """What has happened on all ranks since the last call."""
        merged: list[Event] = []
        for rank, driver in enumerate(self._drivers):
            for event in driver.poll():
                merged += self._merge(rank, event)
        return merged

    def pool_moved(self, regions: Sequence[Region]) -> None:
        """The page buffers lie elsewhere. Args: regions: one per rank.

        Raises:
            ValueError: they are not as many as the ranks.
        """
        for driver, region in zip(self._drivers, regions, strict=True):
            driver.pool_moved((region,))

    def close(self) -> None:
        """Ends all moves of all ranks.

        Raises:
            Exception: the first that a rank's driver has raised, after the others were closed too.
        """
        first: Exception | None = None
        for driver in self._drivers:
            try:
                driver.close()
            except Exception as error:
                first = first or error
        if first is not None:
            raise first

    def _merge(self, rank: int, event: Event) -> Sequence[Event]:
        """What a rank's event brings about; often nothing yet."""
        match event:
            case Loaded():
                return self._loaded(rank, event)
            case Stored():
                return self._stored(rank, event)
            case Safe():
                return self._safe(rank, event)
            case LeaseRead():
                return self._read(rank, event)
            case LeaseTouched():
                return (event,)  # a lease lives while any rank's peer wants it
            case NotificationFailed():
                return self._not_notified(event)

    def _loaded(self, rank: int, event: Loaded) -> Sequence[Event]:
        load = self._loads.get(event.move_id)
        if load is None or rank in load.reports:
            return self._ignore()
        load.reports[rank] = event
        if not event.safe:
            load.unsafe.add(rank)
        if len(load.reports) < len(self._drivers):
            return ()
        load.told = True
        if not load.unsafe:
            del self._loads[event.move_id]
        return (_merged_load([load.reports[r] for r in sorted(load.reports)], safe=not load.unsafe),)

    def _safe(self, rank: int, event: Safe) -> Sequence[Event]:
        """A rank is often safe again before another has answered: then the merged load was never unsafe."""
        load = self._loads.get(event.move_id)
        if load is None or rank not in load.unsafe:
            return self._ignore()
        load.unsafe.remove(rank)
        if load.unsafe or not load.told:
            return ()
        del self._loads[event.move_id]
        return (event,)

    def _stored(self, rank: int, event: Stored) -> Sequence[Event]:
        reports = self._stores.get(event.move_id)
        if reports is None or rank in reports:
            return self._ignore()
        reports[rank] = event
        if len(reports) < len(self._drivers):
            return ()
        del self._stores[event.move_id]
        merged = Stored(
            move_id=event.move_id,
            error=next((reports[r].error for r in sorted(reports) if reports[r].error is not None), None),
            num_bytes=sum(report.num_bytes for report in reports.values()),
            seconds=max(report.seconds for report in reports.values()),
        )
        return (merged,)

    def _read(self, rank: int, event: LeaseRead) -> Sequence[Event]:
        """Also of a lease that is over, since the step counts those who came too late."""
        reads = self._leases.get(event.request_id, self._ended.get(event.request_id))
        if reads is None:
            reads = {}
            _remember(self._ended, event.request_id, reads)
        if rank in reads:
            return self._ignore()
        reads[rank] = event.at_s
        if len(reads) < len(self._drivers):
            return ()
        return (LeaseRead(request_id=event.request_id, at_s=max(reads.values())),)

    def _not_notified(self, event: NotificationFailed) -> Sequence[Event]:
        if event.request_id in self._failed:
            return ()
        _remember(self._failed, event.request_id, None)
        return (event,)

    def _ignore(self) -> Sequence[Event]:
        self.ignored += 1
        return ()


def _remember(names: dict[str, _T], name: str, value: _T) -> None:
    """Enters a name and forgets the oldest beyond the bound."""
    names.pop(name, None)
    names[name] = value
    while len(names) > NAMES_KEPT:
        del names[next(iter(names))]


def _of_rank(command: Command, rank: int) -> Command:
    """A command as a rank gets it: its peer is the peer's rank of the same number."""
    if isinstance(command, Load | Track) and isinstance(command.source, RemoteSource):
        return replace(command, source=replace(command.source, port=command.source.port + rank))
    return command


def _merged_load(reports: Sequence[Loaded], *, safe: bool) -> Loaded:
    """One answer out of all ranks', in order of rank: the pages that every rank has."""
    failed = next((report for report in reports if report.error is not None), None)
    return Loaded(
        move_id=reports[0].move_id,
        num_pages=min(report.num_pages for report in reports),
        safe=safe,
        error=None if failed is None else failed.error,
        stage="" if failed is None else failed.stage,
        num_bytes=sum(report.num_bytes for report in reports),
        num_descriptors=sum(report.num_descriptors for report in reports),
        seconds=max(report.seconds for report in reports),
        post_seconds=max(report.post_seconds for report in reports),
        digest_failures=sum(report.digest_failures for report in reports),
        retries=max(report.retries for report in reports),
    )
