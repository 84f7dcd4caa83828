"""What happened to moves, as the reducers take it: plain numbers, complete when born."""

from dataclasses import dataclass, field

from metrics.moves import LOAD_STAGES, FetchStages, PageStates, TierSlots


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRecord:
    """A load is over.

    Attributes:
        failed: not all of its pages are there.
        stage: where it failed, one of LOAD_STAGES; "": it did not, or elsewhere.
        num_pages: pages that arrived and are good, over all page groups.
        num_bytes, num_descriptors, seconds, post_seconds: of the completed read or copy; 0: none completed.
        digest_failures: pages that arrived but were not what the source holds.
        retries: reads that were made again.

    Raises:
        ValueError: a number is negative, or the stage is unknown.
    """

    failed: bool = False
    stage: str = ""
    num_pages: int = 0
    num_bytes: int = 0
    num_descriptors: int = 0
    seconds: float = 0.0
    post_seconds: float = 0.0
    digest_failures: int = 0
    retries: int = 0

    def __post_init__(self) -> None:
        counts = (self.num_pages, self.num_bytes, self.num_descriptors, self.digest_failures, self.retries)
        if not (min(counts) >= 0 and self.seconds >= 0 and self.post_seconds >= 0):
            raise ValueError(f"negative number in {self}")
        if self.stage not in LOAD_STAGES:
            raise ValueError(f"unknown stage {self.stage!r}, expected one of {LOAD_STAGES}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreRecord:
    """A store is over.

    Attributes:
        failed: not all of its pages are in their slots.
        num_bytes, seconds: of the copy; 0: none was made.

    Raises:
        ValueError: a number is negative.
    """

    failed: bool = False
    num_bytes: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if not (self.num_bytes >= 0 and self.seconds >= 0):
            raise ValueError(f"negative number in {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveStepRecord:
    """What one step decided about moves, and the state after it.

    Attributes:
        pages: of the pool.
        fetch: requests whose prompt a peer holds.
        leases: held for peers.
        tiers: (class of connector, slots) of every host tier; those of one class are added up.
        issued: (class of connector, pages) of loads that it ordered.
        expired: leases that nobody read in time.
        late_reads: peers that read a lease after it had ended.
        outcomes: (class of connector, one of STORE_OUTCOMES, pages) of pages offered for a store.

    Raises:
        ValueError: a number is negative.
    """

    pages: PageStates
    fetch: FetchStages = field(default_factory=FetchStages)
    leases: int = 0
    tiers: tuple[tuple[str, TierSlots], ...] = ()
    issued: tuple[tuple[str, int], ...] = ()
    expired: int = 0
    late_reads: int = 0
    outcomes: tuple[tuple[str, str, int], ...] = ()

    def __post_init__(self) -> None:
        pages = (*(pages for _, pages in self.issued), *(pages for *_, pages in self.outcomes))
        if min(self.leases, self.expired, self.late_reads, *pages) < 0:
            raise ValueError(f"negative number in {self}")
