"""Moves of pages between tiers, as values: what the step orders, and what the drivers answer.

A move is one planned copy: a load brings pages into the pool, a store copies pages out of it, a lease keeps
pages in place until a peer has read them. The step orders moves with commands; drivers answer with events.
Page lists are per page group, one entry per page position; the dummy page stands where a group needs none.
"""

from dataclasses import dataclass, field

import msgspec

HOST, P2P = "host", "p2p"
"""Tiers that pages are loaded from; the labels of `prompt_tokens_cached_by_source`."""

LOAD_FAILED = "the KV of its prompt could not be loaded, and kv_load_failure_policy is fail"
"""What a request says that ends on a failed load. Clients see it, so it names nothing of this machine."""

PageLists = tuple[tuple[int, ...], ...]
"""Per page group, a page (or host slot, or generation) per page position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteSource:
    """Pages of a prompt that a peer has computed and keeps leased for us (verified: it carried our MAC).

    Attributes:
        engine_id: the peer.
        epoch: which life of the peer; 32 hex digits.
        host, port: its side channel.
        request_id: its request, the name of the lease.
        pages: the peer's page ids from the prompt's first position on, whole and partial.
        generations: of these pages when the lease began; same shape.
        num_tokens: prompt tokens whose KV lies in them.
        page_size: tokens per page there; ours is a multiple of it.
        cached_tokens: of the prompt, found in a cache by the peer; None: not said.
    """

    engine_id: str
    epoch: str
    host: str
    port: int
    request_id: str
    pages: PageLists
    generations: PageLists
    num_tokens: int
    page_size: int
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSource:
    """Pages in a host tier. Attributes: slots: host pages, aligned with the load's target pages."""

    slots: PageLists


# Commands: what the step orders. `connector` is the index of a leaf connector, which has one driver.


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Fill `pages` from `source`, verify them, answer `Loaded`.

    Attributes:
        move_id: unique for ever in this engine.
        first_page: position in the prompt of the first entry of `pages`.
        pages: targets; `DUMMY_PAGE` entries are skipped. All groups have one length.
        num_tokens: tokens that the load brings; the last page may be partial.
    """

    move_id: int
    connector: int
    request_id: str
    first_page: int
    pages: PageLists
    num_tokens: int
    source: RemoteSource | HostSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """Copy pool pages to host slots, answer `Stored`. The pages do not change until then."""

    move_id: int
    connector: int
    pages: tuple[int, ...]
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Peers may read these pages from now until `Unlease`. They do not change meanwhile.

    Attributes:
        move_id: of the ledger's row.
        request_id: the lease's name.
        generations: of the pages, now.
        num_tokens: prompt tokens in them.
    """

    move_id: int
    connector: int
    request_id: str
    pages: PageLists
    generations: PageLists
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unlease:
    """The lease is over: read, expired or void. Whoever reads now must learn that the pages are not there."""

    connector: int
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """A request that will load from a peer has arrived: keep its lease alive with heartbeats."""

    connector: int
    request_id: str
    source: RemoteSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Untrack:
    """The request needs its peer no more: stop its heartbeats and tell the peer to end the lease."""

    connector: int
    request_id: str


Command = Load | Store | Lease | Unlease | Track | Untrack


# Events: what the drivers answer. Tagged, since they are written to records.


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A load is over. Once per load.

    Attributes:
        num_pages: leading page positions that arrived and were verified.
        safe: nobody can write the targets any more; False: they stay in quarantine until `Safe`.
        error: why positions are missing; None: all are there.
        stage: where it failed: "handshake", "transfer" (the peer's confirmation is part of it), "verify" (the
            peer, or the digest, said that the pages are others) or "".
        num_bytes, num_descriptors, seconds, post_seconds: of the transfer itself, for statistics.
        digest_failures: pages that arrived but were not what the source holds.
    """

    move_id: int
    num_pages: int
    safe: bool = True
    error: str | None = None
    stage: str = ""
    num_bytes: int = 0
    num_descriptors: int = 0
    seconds: float = 0.0
    post_seconds: float = 0.0
    digest_failures: int = 0
    retries: int = 0


class Stored(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A store is over. Once per store. Attributes: error: None: all pages are in their slots."""

    move_id: int
    error: str | None = None
    num_bytes: int = 0
    seconds: float = 0.0


class Safe(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Nobody can write the targets of this load any more, whose `Loaded` was not safe."""

    move_id: int


class LeaseTouched(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A peer still wants these leases. Attributes: at_s: when its heartbeat arrived, on the loop's clock."""

    request_ids: tuple[str, ...]
    at_s: float


class LeaseRead(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A peer has read this lease, or will not."""

    request_id: str
    at_s: float


class NotificationFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A peer could not be told that its lease may end; it will expire."""

    request_id: str


Event = Loaded | Stored | Safe | LeaseTouched | LeaseRead | NotificationFailed


@dataclass(frozen=True, slots=True, kw_only=True)
class Promised:
    """A connector was asked for a request's tokens beyond the local hit, and a load was started (or not).

    Attributes:
        queried_tokens: tokens asked for.
        promised: (tier, tokens) of what is being loaded.
    """

    request_id: str
    queried_tokens: int
    promised: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseTerms:
    """What a client is told of a lease, before it is sealed into `kv_transfer_params`."""

    request_id: str
    pages: PageLists
    generations: PageLists
    num_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveGauges:
    """Moves after the step.

    Attributes:
        loading_pages, quarantined_pages, leased_pages, storing_pages: of the pool, by row of the ledger.
        fetch_waiting: requests with a remote source whose load has not started.
        fetch_running: requests whose load is under way.
        fetch_done: requests whose load has ended and that wait for a slot.
        leases: leases held for peers.
        tiers: per host-tier connector (index, used slots, pinned slots, slots that a store fills, slots).
    """

    loading_pages: int = 0
    quarantined_pages: int = 0
    leased_pages: int = 0
    storing_pages: int = 0
    fetch_waiting: int = 0
    fetch_running: int = 0
    fetch_done: int = 0
    leases: int = 0
    tiers: tuple[tuple[int, int, int, int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveNews:
    """What one step decided about moves, for drivers and statistics.

    Attributes:
        commands: for the drivers, in order.
        promised: lookups at admission.
        expired: leases that nobody read in time.
        late_reads: peers that read a lease after it had ended.
        outcomes: (connector, outcome, pages) of what became of pages offered for a store: "stored",
            "dropped_cpu_full", "dropped_request_gone", "dropped_null_block", "dropped_not_hashed",
            "skipped_already_cached", "skipped_in_flight".
        next_deadline_s: when the step must run again even if nothing happens; None: never.
    """

    commands: tuple[Command, ...] = ()
    promised: tuple[Promised, ...] = ()
    expired: int = 0
    late_reads: int = 0
    outcomes: tuple[tuple[int, str, int], ...] = ()
    next_deadline_s: float | None = None
    gauges: MoveGauges = field(default_factory=MoveGauges)
