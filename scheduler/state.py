"""The scheduler's state: one linear value that `step` consumes and updates in place."""

import bisect
import copy
import enum
import heapq
from dataclasses import dataclass, field

import numpy as np

from kv.connectors.base import Connector
from kv.connectors.build import build
from kv.ledger import Kind, Ledger, Row
from kv.moves import Command, Promised, RemoteSource
from kv.pages import Pages
from kv.prefix import PrefixCache
from kv.types import DUMMY_PAGE
from scheduler.types import Request, Rows, SchedulerConfig

NO_TOKEN = -1
"""Fills the unused places of the stop-token table; no token has this id."""


class Status(enum.Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    LOADING = "loading"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One growing token list.

    Attributes:
        order: (priority, arrival, index); smaller runs first and is preempted last.
        names: chain hashes of its whole pages, as far as known; the root's name at the front.
        tokens: int32, all known tokens while it waits; while it runs they are in the state's columns.
        settled: positions whose KV has at some time become usable here; grows only.
        hit: of these, the prompt positions first made usable by the prefix cache.
        high_water: tokens that had been computed when it was last preempted.
        prefilled: its first token was accepted.
        remote: a peer that holds its prompt; None: no peer, or it is needed no more.
        fetch: the pages that are being or have been brought for it; None: there are none, or it runs.
        asked_again: a load brought nothing, so connectors were asked once more.
        external: tokens of the prompt first made usable by a load, by tier.
    """

    request: Request
    index: int
    order: tuple[int, int, int]
    names: list[bytes]
    tokens: np.ndarray
    status: Status = Status.WAITING
    slot: int | None = None
    settled: int = 0
    hit: int = 0
    high_water: int = 0
    preemptions: int = 0
    prefilled: bool = False
    remote: RemoteSource | None = None
    fetch: "Fetch | None" = None
    asked_again: bool = False
    external: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Pages that one load has brought and that were verified.

    Attributes:
        first: position of the first page.
        pages: per group, the sequence's own now.
        asked: positions that the load was for.
        end: tokens of the sequence that are known to be usable behind it.
    """

    tier: str
    first: int
    pages: tuple[tuple[int, ...], ...]
    asked: int
    end: int


@dataclass(slots=True, kw_only=True, eq=False)
class Fetch:
    """What a sequence without a slot holds, and what it waits for.

    Attributes:
        pages: per group, pages that it holds: the local hit, then what has arrived.
        hit: tokens of the local hit.
        queried: tokens that were looked up locally, for the statistics.
        moves: loads under way.
        segments: loads that have ended, those that brought nothing too.
        tokens: of the sequence, usable on `pages`; counts once no load is under way.
        sources: with `tokens`: (tier, where its tokens end), one after another; None: the prefix cache.
        error: of the first load that did not bring everything.
    """

    pages: list[list[int]]
    hit: int
    queried: int
    moves: set[int] = field(default_factory=set)
    segments: list[Segment] = field(default_factory=list)
    tokens: int = 0
    sources: list[tuple[str | None, int]] = field(default_factory=list)
    error: str | None = None


class Columns:
    """Per-slot numbers, one NumPy column each, so that a step over 256 sequences is a few array operations.

    Attributes:
        tokens: int32 `[N, max_model_len]`.
        num_tokens: int32 `[N]`, known tokens.
        num_prompt: int32 `[N]`.
        num_computed: int32 `[N]`, tokens whose KV is in the pool.
        high_water: int32 `[N]`, tokens computed before the last preemption.
        max_tokens: int32 `[N]`, known tokens at which the sequence ends.
        min_tokens: int32 `[N]`, known tokens before which stop tokens do not end it.
        stops: int32 `[N, W]`, token ids that end it, filled with NO_TOKEN.
        num_pages: int32 `[N]`, entries of the page tables in use.
        named_pages: int32 `[N]`, leading pages that have been offered to the prefix cache.
        first_page: per group int32 `[N]`, entries before it were left behind by the sliding window.
        page_tables: per group int32 `[N, M]`.
        epochs: int64 `[N]`, grows when the slot changes hands, so that a late outcome is recognised.
        running: int64 `[N]`, the slots of `SchedulerState.running` in its order; the rest means nothing.
    """

    __slots__ = (
        "epochs", "first_page", "high_water", "max_tokens", "min_tokens", "named_pages", "num_computed",
        "num_pages", "num_prompt", "num_tokens", "page_tables", "running", "stops", "tokens",
    )  # fmt: skip

    def __init__(self, config: SchedulerConfig) -> None:
        slots, pages = config.max_num_seqs, -(-config.max_model_len // config.page_size)
        for name in (
            "num_tokens", "num_prompt", "num_computed", "high_water", "max_tokens", "min_tokens",
            "num_pages", "named_pages",
        ):  # fmt: skip
            setattr(self, name, np.zeros(slots, np.int32))
        self.tokens = np.zeros((slots, config.max_model_len), np.int32)
        self.stops = np.full((slots, 1), NO_TOKEN, np.int32)
        self.first_page = tuple(np.zeros(slots, np.int32) for _ in config.windows)
        self.page_tables = tuple(np.full((slots, pages), DUMMY_PAGE, np.int32) for _ in config.windows)
        self.epochs = np.zeros(slots, np.int64)
        self.running = np.zeros(slots, np.intp)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InFlight:
    """The rows of the last plan, whose outcome is awaited.

    Attributes:
        epochs: int64 `[R]`, of the rows' slots when the plan was made.
    """

    step_id: int
    rows: Rows
    epochs: np.ndarray


@dataclass(slots=True, kw_only=True, eq=False)
class News:
    """What the step under way has decided about moves so far; becomes the plan's `MoveNews`."""

    now_s: float = 0.0
    commands: list[Command] = field(default_factory=list)
    promised: list[Promised] = field(default_factory=list)
    expired: int = 0
    late_reads: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class SchedulerState:
    """Everything that the step knows.

    Attributes:
        connector: where pages can be had beyond the pool; None: nowhere.
        leaves: its leaf connectors, by their index in commands.
        loading: sequences with loads under way, by request.
        fetched: sequences whose loads have ended and that wait for a slot, in the order of their ends.
        remotes: sequences with a peer, by request.
        expired: leases that expired lately, to recognise who read them all the same.
    """

    config: SchedulerConfig
    pages: Pages
    prefix: PrefixCache
    columns: Columns
    step_id: int = 0
    arrivals: int = 0
    sequences: dict[tuple[str, int], Sequence] = field(default_factory=dict)
    waiting: list[tuple[tuple[int, int, int], Sequence]] = field(default_factory=list)
    running: list[Sequence] = field(default_factory=list)
    by_slot: list[Sequence | None] = field(default_factory=list)
    free_slots: list[int] = field(default_factory=list)
    in_flight: InFlight | None = None
    connector: Connector | None = None
    leaves: tuple[Connector, ...] = ()
    ledger: Ledger = field(default_factory=Ledger)
    loading: dict[str, Sequence] = field(default_factory=dict)
    fetched: list[Sequence] = field(default_factory=list)
    remotes: dict[str, Sequence] = field(default_factory=dict)
    expired: dict[str, None] = field(default_factory=dict)
    news: News = field(default_factory=News)


def initial_state(config: SchedulerConfig) -> SchedulerState:
    """An empty scheduler.

    Raises:
        ValueError: a bound in the configuration makes no sense; the message names it.
    """
    if config.max_num_seqs < 1 or config.max_model_len < 1:
        raise ValueError("max_num_seqs and max_model_len must be at least 1")
    if config.policy not in ("fcfs", "priority"):
        raise ValueError(f"scheduling policy must be fcfs or priority, got {config.policy!r}")
    if any(window is not None and window < 1 for window in config.windows) or not config.windows:
        raise ValueError(f"sliding windows must be at least 1 token, got {config.windows}")
    connector, leaves = None, ()
    if config.transfer is not None:
        connector, leaves = build(config.transfer, windows=config.windows, page_size=config.page_size)
    return SchedulerState(
        config=config,
        connector=connector,
        leaves=leaves,
        pages=Pages(config.num_pages),
        prefix=PrefixCache(len(config.windows)),
        columns=Columns(config),
        by_slot=[None] * config.max_num_seqs,
        free_slots=list(range(config.max_num_seqs)),
    )


def snapshot(state: SchedulerState) -> SchedulerState:
    """An independent copy: `step` on either does not touch the other."""
    return copy.deepcopy(state)


def push_waiting(state: SchedulerState, sequence: Sequence) -> None:
    """Puts a sequence where its order says: the preempted and the forked come before later arrivals."""
    sequence.status = Status.WAITING
    heapq.heappush(state.waiting, (sequence.order, sequence))


def peek_waiting(state: SchedulerState) -> Sequence | None:
    """The next sequence to admit. Entries of sequences that ended while waiting are dropped here."""
    while state.waiting:
        sequence = state.waiting[0][1]
        if sequence.status is Status.WAITING:
            return sequence
        heapq.heappop(state.waiting)
    return None


def num_waiting(state: SchedulerState) -> int:
    """Sequences without a slot."""
    return len(state.sequences) - len(state.running)


def num_loading(state: SchedulerState) -> int:
    """Sequences that wait for their pages to arrive."""
    return len(state.loading)


def running_slots(state: SchedulerState) -> np.ndarray:
    """int64 `[running]`: the slots of running sequences, in their order. Of the state itself: copy it where
    sequences may leave meanwhile."""
    return state.columns.running[: len(state.running)]


def occupy(state: SchedulerState, sequence: Sequence, slot: int) -> None:
    """Gives a sequence a free slot, and its place in the running order."""
    running, slots = state.running, state.columns.running
    place = bisect.bisect_right(running, sequence.order, key=lambda other: other.order)
    slots[place + 1 : len(running) + 1] = slots[place : len(running)]
    slots[place] = slot
    running.insert(place, sequence)
    state.by_slot[slot] = sequence
    state.columns.epochs[slot] += 1
    sequence.slot, sequence.status = slot, Status.RUNNING


def vacate(state: SchedulerState, sequence: Sequence) -> None:
    """Takes slot and pages away from a running sequence; its pages' tails go first when pages are evicted."""
    slot = sequence.slot
    if slot is None:
        raise ValueError(f"sequence {sequence.request.request_id}/{sequence.index} has no slot")
    columns = state.columns
    for table, first in zip(columns.page_tables, columns.first_page, strict=True):
        for page in table[slot, first[slot] : columns.num_pages[slot]][::-1].tolist():
            state.pages.release(page)
        table[slot, : columns.num_pages[slot]] = DUMMY_PAGE
        first[slot] = 0
    columns.num_pages[slot] = 0
    columns.num_computed[slot] = 0
    columns.epochs[slot] += 1
    state.by_slot[slot] = None
    heapq.heappush(state.free_slots, slot)
    place, last = state.running.index(sequence), len(state.running) - 1
    del state.running[place]
    columns.running[place:last] = columns.running[place + 1 : last + 1]
    sequence.slot = None


def check(state: SchedulerState) -> None:
    """Recounts the conservation laws from scratch.

    Raises:
        AssertionError: a law is broken; the message says which.
    """
    state.pages.check()
    columns = state.columns
    holders = _holders_beside_slots(state)
    for sequence in state.running:
        slot = sequence.slot
        if slot is None or state.by_slot[slot] is not sequence or sequence.status is not Status.RUNNING:
            raise AssertionError(f"running sequence and slot {slot} disagree")
        for table, first in zip(columns.page_tables, columns.first_page, strict=True):
            held = table[slot, first[slot] : columns.num_pages[slot]]
            np.add.at(holders, held, 1)
            if (held == DUMMY_PAGE).any():
                raise AssertionError(f"slot {slot} holds the dummy page")
        if columns.num_computed[slot] > columns.num_pages[slot] * state.config.page_size:
            raise AssertionError(f"slot {slot} has computed more tokens than its pages hold")
    if running_slots(state).tolist() != [sequence.slot for sequence in state.running]:
        raise AssertionError("the column of running slots and the running sequences disagree")
    if (holders != state.pages.refs).any():
        raise AssertionError(
            f"reference counts differ from holders at {np.nonzero(holders != state.pages.refs)}"
        )
    if state.connector is not None:
        state.connector.check()
    if len(state.running) + len(state.free_slots) != state.config.max_num_seqs:
        raise AssertionError("slots in use and free slots do not add up")
    for page, _, _ in state.prefix.items():
        if state.pages.refs[page] == 0 and not state.pages.is_idle(page):
            raise AssertionError(f"cached page {page} is free")
    if len(state.prefix) < state.pages.idle:
        raise AssertionError("an idle page is not in the prefix cache")


def _holders_beside_slots(state: SchedulerState) -> np.ndarray:
    """Pages held by moves, and by sequences that load or have loaded."""
    state.ledger.check()
    holders = np.zeros(len(state.pages.refs), np.int32)
    for row in state.ledger:
        np.add.at(holders, list(row.pages), 1)
    waiting = {id(sequence) for sequence in state.fetched}
    for sequence in state.sequences.values():
        fetch = sequence.fetch
        if fetch is None:
            continue
        if sequence.status is not Status.LOADING:
            raise AssertionError(f"a sequence that is {sequence.status.value} holds fetched pages")
        if bool(fetch.moves) == (id(sequence) in waiting):
            raise AssertionError("a sequence waits for loads and for a slot at once, or for neither")
        for pages in (*fetch.pages, *(group for segment in fetch.segments for group in segment.pages)):
            np.add.at(holders, [page for page in pages if page != DUMMY_PAGE], 1)
    for row in state.ledger:
        if not row.quarantined and row.kind is Kind.LOAD and (state.pages.refs[list(row.pages)] != 1).any():
            raise AssertionError("a page that is being loaded has another holder")
    return holders


def release_row(state: SchedulerState, row: Row) -> None:
    """Gives a row's pages back; tails are evicted before heads."""
    for page in reversed(row.pages):
        state.pages.release(page)
