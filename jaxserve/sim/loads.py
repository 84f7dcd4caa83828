"""I17 for loads: one fails only for a reason that has to do with it, and that a fault has given.

Every load that ends with an error is looked at, whatever then becomes of its request, in every step of every
engine. What it says of why must be one of `REASONS`, and one of that reason's faults must have struck while
it was under way, or so shortly before that a question asked then was still open: the link between its engine
and the peer that it reads from (no other), one of these two, or the host tier that it reads. That a lease is
over is looked up in what the lender decided.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxserve.sim.broken import Broken
from jaxserve.sim.engine import SimEngine
from jaxserve.sim.history import History
from kv.moves import (
    HostSource,
    Lease,
    LeaseRead,
    Load,
    Loaded,
    RemoteSource,
    Track,
    Unlease,
    Untrack,
)
from kv.transfer_peer import CALL_S
from kv.transfers import QUARANTINE_S
from scheduler.types import Inputs, Plan, Request

LATE_S = 1.0
BEFORE_S = CALL_S + LATE_S
"""A question that was asked so long before a load began may fail it: nobody waits longer for an answer."""

DEATHS = ("X1", "X5", "X41")
"""What ends a life."""

STOPPED_S = 600.0
"""No process is stopped for longer."""

RELEASE_S = 0.5
"""A lease that is given back has ended so much later, unless a fault has struck meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why a load may fail.

    Attributes:
        says: what its error begins with.
        link: faults between the two engines that explain it.
        own, peer: faults of the engine that reads, and of the one that is read from.
        before_s: by how much they may have struck before the load began.
    """

    says: str
    link: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    peer: tuple[str, ...] = ()
    before_s: float = BEFORE_S


_LOST = ("X7", "X11")
_LATE = ("X8", "X9")
_SLOW = ("X3", "X4", "X12", "X40", "X43")
_BUSY = (*_SLOW, "X37")
"""Deadlines are of a second in some worlds: a queue that repeats have filled then takes all of it."""
_BROKE = Reason(says="the connection broke", link=("X13",))
_NOBODY = Reason(says="nobody listens", peer=DEATHS)
_NO_FILES = Reason(says="no connection can be opened", own=("X45",))
_SILENT = Reason(says="no answer in time", link=(*_LOST, *_LATE), own=_BUSY, peer=(*DEATHS, *_BUSY))
_CALLS = (_BROKE, _NOBODY, _NO_FILES, _SILENT)
_TRANSFERS = ("X14", "X15", "X16", "X17", "X18")


def _prefixed(prefix: str, reason: Reason, *more: str) -> Reason:
    """A reason of a call, as a load names it. Args: more: faults of the link that explain it as well."""
    return Reason(says=prefix + reason.says, link=(*reason.link, *more), own=reason.own, peer=reason.peer)


REASONS = (
    *(_prefixed("handshake: ", reason) for reason in _CALLS),
    *(_prefixed("the peer did not confirm: ", reason, "X22") for reason in _CALLS),
    Reason(
        says="the peer does not answer heartbeats",
        link=(*_LOST, *_LATE, "X13"),
        own=("X45", *_BUSY),
        peer=(*DEATHS, *_BUSY),
    ),
    Reason(
        says="no end within ",
        link=(*_LOST, *_LATE, *_TRANSFERS, "X13", "X22"),
        own=("X38", "X45", *_BUSY),
        peer=(*DEATHS, *_BUSY),
    ),
    Reason(says="handshake refused (lease): ", peer=("X45",)),
    Reason(says="NIXL could not make an agent", own=("X45",)),
    Reason(says="NIXL could not post: NIXL_ERR_BACKEND", link=("X14",)),
    Reason(says="NIXL could not post: NIXL_ERR_REMOTE_DISCONNECT", peer=(*DEATHS, "X32")),
    Reason(says="NIXL could not read: NIXL_ERR_REMOTE_DISCONNECT", link=("X16",), peer=(*DEATHS, "X32")),
    Reason(
        says="the peer's agent was deleted to end transfers that hang",
        link=(*_LOST, *_TRANSFERS),
        own=("X38", *_SLOW),
        peer=_SLOW,
        before_s=QUARANTINE_S + BEFORE_S,
    ),
    Reason(says="the peer's pool has moved", peer=("X32",)),
    Reason(says="the page buffer has moved", own=("X32",), before_s=0.0),
    Reason(says="pages differ from what the peer holds", link=("X17", "X18"), own=("X26", "X28", "X32")),
)
"""Whatever a remote load says that depends on neither lives nor leases nor versions."""

RESTARTED = ("the peer has been restarted", "the peer's pages are stale: epoch: ")
STALE = "the peer's pages are stale: lease: "
COMPAT = "handshake refused (compat): "
SHORT = "the peer's lease covers "

NO_MEMORY = "MemoryError: no host memory"
REJECTED = "a page in host memory is not what was stored there"
MOVED = "the page buffer has moved"


@dataclass(slots=True, eq=False)
class _Begun:
    """Attributes: at: when it was ordered."""

    load: Load
    at: float


@dataclass(slots=True, eq=False)
class _Lent:
    """A lease. Attributes: over: why it has ended, in a word; empty: it has not."""

    at: float
    lease_s: float
    over: str = ""
    readers: dict[str, tuple[str, float]] = field(default_factory=dict)
    """Host and begin of those lives that send heartbeats for it, until one lets it go or it is over."""
    given_back: list[tuple[str, float]] = field(default_factory=list)
    """(host, when) of readers that have let it go."""


class Loads:
    """Looks at every step, like a law."""

    def __init__(
        self,
        history: History,
        engines: Mapping[str, SimEngine],
        flipped: set[tuple[str, int, int, int]],
    ) -> None:
        """Args: engines: the current lives by host. flipped: see `Laws`."""
        self._history, self._engines, self._flipped = history, engines, flipped
        self._begun: dict[tuple[str, int], _Begun] = {}
        self._lent: dict[tuple[str, str], _Lent] = {}
        self._sources: dict[tuple[str, str], RemoteSource] = {}
        self._remote: dict[tuple[str, str], Request] = {}
        """Requests that have come with a lease and for which no load has been ordered yet."""

    def step(self, engine: SimEngine, inputs: Inputs, plan: Plan, now: float) -> None:
        """Looks at the loads that have ended, and follows what begins.

        Raises:
            Broken: one has failed, or was not tried, without a fault of its own.
        """
        epoch = engine.epoch
        for request in inputs.arrivals:
            if request.remote is not None:
                self._remote[epoch, request.request_id] = request
        for event in inputs.events:
            if isinstance(event, Loaded):
                begun = self._begun.pop((epoch, event.move_id), None)
                if (
                    begun is not None
                    and event.error is not None
                    and not self._explained(engine, begun, event)
                ):
                    load = begun.load
                    why = f"{event.error!r}, and no fault of its own explains it"
                    raise Broken("I17", f"{engine.host}: a load of {load.request_id} failed: {why}")
        self._follow(engine, inputs, plan, now)
        for entry in plan.admitted:
            untried = self._remote.pop((epoch, entry.request_id), None)
            if untried is not None and not entry.loaded_tokens:
                raise Broken(
                    "I17", f"{engine.host}: {entry.request_id} reads nothing of what was leased to it"
                )
        for entry in plan.finished:
            self._remote.pop((epoch, entry.request_id), None)

    def _follow(self, engine: SimEngine, inputs: Inputs, plan: Plan, now: float) -> None:
        epoch, ended = engine.epoch, {entry.request_id for entry in plan.finished}
        read = {event.request_id for event in inputs.events if isinstance(event, LeaseRead)}
        lost = inputs.pool_moved or (inputs.outcome is not None and inputs.outcome.error is not None)
        for command in plan.moves.commands:
            match command:
                case Load():
                    self._begun[epoch, command.move_id] = _Begun(command, now)
                    self._remote.pop((epoch, command.request_id), None)
                case Lease():
                    leaf = engine.node.nixl
                    assert leaf is not None
                    self._lent[epoch, command.request_id] = _Lent(now, leaf.lease_s)
                case Unlease():
                    lent = self._lent[epoch, command.request_id]
                    lent.over = "read" if command.request_id in read else "lost" if lost else "expired"
                    if lent.over == "expired":
                        self._expires(engine, command.request_id, lent, now)
                case Track():
                    source = self._sources[epoch, command.request_id] = command.source
                    lent = self._lent.get((source.epoch, source.request_id))
                    if lent is not None and not lent.over:
                        lent.readers.setdefault(epoch, (engine.host, now))
                case Untrack():
                    source = self._sources.pop((epoch, command.request_id))
                    lent = self._lent.get((source.epoch, source.request_id))
                    loading = command.request_id not in ended and any(
                        key[0] == epoch
                        and begun.load.request_id == command.request_id
                        and isinstance(begun.load.source, RemoteSource)
                        for key, begun in self._begun.items()
                    )
                    if lent is not None and not loading:
                        lent.given_back.append((engine.host, now))
                        whose = (epoch, source.epoch, source.request_id)
                        left = ((key[0], each.epoch, each.request_id) for key, each in self._sources.items())
                        if not lent.over and whose not in left:
                            lent.readers.pop(epoch, None)
                    if _circle(engine):
                        self._remote.pop((epoch, command.request_id), None)
                case _:
                    pass

    def _explained(self, engine: SimEngine, begun: _Begun, event: Loaded) -> bool:
        source, error = begun.load.source, event.error or ""
        if isinstance(source, HostSource):
            return self._host_explained(engine, begun, source, error)
        peer = self._engines[source.host]
        config = engine.node.scheduler
        if error.startswith(RESTARTED):
            return peer.epoch != source.epoch
        if error.startswith(COMPAT):
            return peer.node.scheduler.cache_key != config.cache_key or self._was_another(engine, begun)
        if error.startswith(SHORT):
            return source.page_size != config.page_size and any(config.windows)
        if error.startswith(STALE):
            return self._lease_is_over(engine, source)
        return any(
            self._history.of_pair(reason.link, engine.host, source.host, begun.at - reason.before_s)
            or self._history.of_host(reason.own, engine.host, begun.at - reason.before_s)
            or self._history.of_host(reason.peer, source.host, begun.at - reason.before_s)
            for reason in REASONS
            if reason.says in error
        )

    def _was_another(self, engine: SimEngine, begun: _Begun) -> bool:
        """Whether the peer has begun a life of another version since it may have been asked: who is stopped
        hears the answer of the life before."""
        since = begun.at - BEFORE_S
        if self._history.of_host(("X3",), engine.host, since):
            since -= STOPPED_S
        source = begun.load.source
        return isinstance(source, RemoteSource) and self._history.of_host(("X5",), source.host, since)

    def _expires(self, lender: SimEngine, name: str, lent: _Lent, now: float) -> None:
        """A lease expires.

        Raises:
            Broken: it was given back before, and no fault explains that the lender does not know.
        """
        faults = ("X45", *_SLOW, *DEATHS)
        for reader, at in lent.given_back:
            if now - at > RELEASE_S and not (
                self._history.of_pair((*_LOST, "X8", "X13", "X22"), reader, lender.host, at)
                or self._history.of_host(faults, reader, at)
                or self._history.of_host(faults, lender.host, at)
            ):
                late = f"{reader} has given it back {now - at:g} s before"
                raise Broken("I2", f"{lender.host}: the lease of {name} has expired, and {late}")

    def _host_explained(self, engine: SimEngine, begun: _Begun, source: HostSource, error: str) -> bool:
        if error == NO_MEMORY:
            return self._history.of_host(("X25",), engine.host, begun.at)
        if error == MOVED:
            return self._history.of_host(("X32",), engine.host, begun.at)
        if error == REJECTED:
            rows = {slot - 1 for group in source.slots for slot in group}
            return any(
                epoch == engine.epoch and leaf == begun.load.connector and row in rows
                for epoch, leaf, _, row in self._flipped
            )
        return False

    def _lease_is_over(self, engine: SimEngine, source: RemoteSource) -> bool:
        """Whether the lender has ended it, and was right to."""
        lent = self._lent.get((source.epoch, source.request_id))
        if lent is None:
            return False
        if lent.over == "read":
            return bool(lent.given_back)
        if lent.over == "expired":
            return all(
                begun - lent.at > lent.lease_s / 2  # it came too late to keep it
                or self._history.of_pair((*_LOST, "X13"), host, source.host, lent.at)
                or self._history.of_host(("X45", *_SLOW), host, lent.at - BEFORE_S)
                or (epoch != engine.epoch and self._history.of_host(DEATHS, host, lent.at))
                or self._history.of_host(("X38", *_SLOW), source.host, lent.at - BEFORE_S)
                for epoch, (host, begun) in lent.readers.items()
            )
        return lent.over == "lost"


def _circle(engine: SimEngine) -> bool:
    """Leases hold the pages, and nothing goes on that would give any back: a request may give up its peer."""
    state = engine.core.state
    return bool(state.ledger.num_leases) and not (state.running or state.loading or state.fetched)
