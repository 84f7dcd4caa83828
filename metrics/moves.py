"""What moves of pages between tiers leave behind, as frozen values, and the records that they are made of.

Statistics are per class of connector, as vLLM registers them: two children of one class share one value.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TypeVar

from metrics import buckets
from metrics.counts import LabelledCounts
from metrics.engine import merge_fields
from metrics.histogram import NANO, Histogram

NIXL, OFFLOADING, SIMPLE = "NixlConnector", "OffloadingConnector", "SimpleCPUOffloadConnector"
KINDS = (NIXL, OFFLOADING, SIMPLE)
"""Classes of connectors that have statistics."""

STORE_OUTCOMES = (
    *("stored", "dropped_cpu_full", "dropped_request_gone", "dropped_null_block", "dropped_not_hashed"),
    *("skipped_already_cached", "skipped_in_flight"),
)
LOAD_STAGES = ("", "handshake", "transfer", "verify")


@dataclass(frozen=True, slots=True, kw_only=True)
class PageStates:
    """Pages of the pool. Free, idle and in use are all of them (but the dummy page), each once.

    Attributes:
        free: empty.
        idle: cached, held by nobody.
        in_use: held by sequences or moves.
        loading, storing: held by loads, which write them, and by stores, which read them.
        leased: held for peers.
        quarantined: held because a load that is over may still write them.

    What moves hold is part of `in_use`; a page that two moves hold counts for each.

    Raises:
        ValueError: a number is negative.
    """

    free: int = 0
    idle: int = 0
    in_use: int = 0
    loading: int = 0
    leased: int = 0
    storing: int = 0
    quarantined: int = 0

    def __post_init__(self) -> None:
        _check_not_negative(self.by_state(), self.in_moves())

    def by_state(self) -> tuple[tuple[str, int], ...]:
        """(state, pages) pairs that sum to the pool."""
        return (("free", self.free), ("idle", self.idle), ("in_use", self.in_use))

    def in_moves(self) -> tuple[tuple[str, int], ...]:
        """(what for, pages) pairs of what moves hold."""
        return (
            ("loading", self.loading),
            ("storing", self.storing),
            ("leased", self.leased),
            ("quarantined", self.quarantined),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchStages:
    """Requests whose prompt a peer holds. The fields are vLLM's stages.

    Attributes:
        waiting_to_start: their load has not begun.
        in_progress: it runs.
        completed_waiting: it has ended and they wait for a slot.

    Raises:
        ValueError: a number is negative.
    """

    waiting_to_start: int = 0
    in_progress: int = 0
    completed_waiting: int = 0

    def __post_init__(self) -> None:
        _check_not_negative(self.items())

    def items(self) -> tuple[tuple[str, int], ...]:
        """(stage, requests) pairs."""
        return tuple((item.name, getattr(self, item.name)) for item in fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSlots:
    """Slots (host pages) of one host tier, or of several added up.

    Attributes:
        slots: all.
        used: these hold a page, or one is on its way in.
        pinned: a load or a store works on them.
        storing: of the pinned, those that a store fills.

    Raises:
        ValueError: a number is negative, or a part exceeds its whole.
    """

    slots: int = 0
    used: int = 0
    pinned: int = 0
    storing: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.used <= self.slots and 0 <= self.storing <= self.pinned <= self.slots):
            raise ValueError(f"a part exceeds its whole in {self}")

    def fraction(self, part: int) -> float:
        """`part` of all slots, 0 to 1."""
        return part / self.slots if self.slots else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCopies:
    """Copies in one direction between the pool and a host tier.

    Attributes:
        size: bytes of each copy.
        nanoseconds: that they took; whole, so that merging is exact.
        failures: copies that did not do all that they should.
    """

    size: Histogram
    nanoseconds: int = 0
    failures: int = 0

    @classmethod
    def empty(cls) -> "HostCopies":
        """No copy."""
        return cls(size=Histogram.empty(buckets.HOST_COPY_BYTES))

    @property
    def num_bytes(self) -> int:
        """Bytes of all copies."""
        return self.size.sum_nano // NANO

    @property
    def seconds(self) -> float:
        """Seconds of all copies."""
        return self.nanoseconds / NANO


@dataclass(frozen=True, slots=True, kw_only=True)
class NixlStats:
    """NixlConnector. Reads are counted where they are made, leases where they are held.

    Attributes:
        read_s, post_s, read_bytes, descriptors: of each completed read.
        failed_reads: loads that failed in the handshake or the transfer.
        failed_notifications: peers that could not be told that their lease may end.
        expired: leases that nobody read in time.
        late_reads: peers that read a lease after it had ended.
        stale_reads: loads refused because the peer's pages had changed.
        digest_failures: pages that arrived but were not what the peer holds.
        retries: reads that were made again.
        leases: held now.
    """

    read_s: Histogram
    post_s: Histogram
    read_bytes: Histogram
    descriptors: Histogram
    failed_reads: int = 0
    failed_notifications: int = 0
    expired: int = 0
    late_reads: int = 0
    stale_reads: int = 0
    digest_failures: int = 0
    retries: int = 0
    leases: int = 0

    @classmethod
    def empty(cls) -> "NixlStats":
        """Nothing seen."""
        return cls(
            read_s=Histogram.empty(buckets.NIXL_READ_S),
            post_s=Histogram.empty(buckets.NIXL_POST_S),
            read_bytes=Histogram.empty(buckets.NIXL_BYTES),
            descriptors=Histogram.empty(buckets.NIXL_DESCRIPTORS),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadStats:
    """OffloadingConnector. Attributes: no_room: pages not stored because the tier had no room; tier: now."""

    loads: HostCopies
    stores: HostCopies
    no_room: int = 0
    tier: TierSlots

    @classmethod
    def empty(cls) -> "OffloadStats":
        """Nothing seen."""
        return cls(loads=HostCopies.empty(), stores=HostCopies.empty(), tier=TierSlots())


@dataclass(frozen=True, slots=True, kw_only=True)
class SimpleOffloadStats:
    """SimpleCPUOffloadConnector.

    Attributes:
        issued_pages, loaded_pages: pages of loads that were ordered; of these, those that came.
        outcomes: what became of pages offered for a store, in pages.
        tier: now.
    """

    loads: HostCopies
    stores: HostCopies
    issued_pages: int = 0
    loaded_pages: int = 0
    outcomes: LabelledCounts
    tier: TierSlots

    @classmethod
    def empty(cls) -> "SimpleOffloadStats":
        """Nothing seen."""
        return cls(
            loads=HostCopies.empty(),
            stores=HostCopies.empty(),
            outcomes=LabelledCounts.empty(STORE_OUTCOMES),
            tier=TierSlots(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveStats:
    """All moves of one engine (or, merged, several). A class of connector that is not configured is None.

    Attributes:
        pages, fetch: after the last step.
    """

    pages: PageStates
    fetch: FetchStages
    nixl: NixlStats | None = None
    offload: OffloadStats | None = None
    simple: SimpleOffloadStats | None = None

    @classmethod
    def empty(cls, kinds: Iterable[str] = ()) -> "MoveStats":
        """Nothing seen: the identity of `merge` among engines with these classes of connectors.

        Args:
            kinds: of KINDS; one may come twice.

        Raises:
            ValueError: a class is unknown.
        """
        chosen = set(kinds)
        if chosen - set(KINDS):
            raise ValueError(f"no statistics for {sorted(chosen - set(KINDS))}, only for {KINDS}")
        return cls(
            pages=PageStates(),
            fetch=FetchStages(),
            nixl=NixlStats.empty() if NIXL in chosen else None,
            offload=OffloadStats.empty() if OFFLOADING in chosen else None,
            simple=SimpleOffloadStats.empty() if SIMPLE in chosen else None,
        )

    def merge(self, other: "MoveStats") -> "MoveStats":
        """What both engines saw; gauges add. Associative and commutative.

        Raises:
            TypeError: they have different classes of connectors.
        """
        return MoveStats(
            pages=merge_fields(self.pages, other.pages),
            fetch=merge_fields(self.fetch, other.fetch),
            nixl=_merge_optional(self.nixl, other.nixl),
            offload=_merge_optional(self.offload, other.offload),
            simple=_merge_optional(self.simple, other.simple),
        )


Connector = TypeVar("Connector", NixlStats, OffloadStats, SimpleOffloadStats)


def _merge_optional(left: Connector | None, right: Connector | None) -> Connector | None:
    if left is None and right is None:
        return None
    if left is None or right is None:
        raise TypeError("cannot merge engines with different classes of connectors")
    return merge_fields(left, right)


def _check_not_negative(*gauges: tuple[tuple[str, int], ...]) -> None:
    if any(number < 0 for group in gauges for _, number in group):
        raise ValueError(f"negative number in {gauges}")
