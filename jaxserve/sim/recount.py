"""An independent count of where prompt tokens came from: from executed plans alone, position by position.

A position belongs to whatever first made its KV usable: a hit at admission, or a row that computed it. The
scheduler keeps two integers per sequence instead; tests compare the two for every request.
"""

from dataclasses import dataclass, field

from kv.moves import HostSource, Load, Loaded
from metrics.stats import PrefillStats
from scheduler.types import Admitted, Inputs, Plan


@dataclass
class Book:
    """One request's prompt positions by source, and what loads have brought for it."""

    prompt: int
    hit: set[int] = field(default_factory=set)
    computed: set[int] = field(default_factory=set)
    host: set[int] = field(default_factory=set)
    p2p: set[int] = field(default_factory=set)
    arrived: list[tuple[range, bool, str]] = field(default_factory=list)

    @property
    def settled(self) -> set[int]:
        """Positions that have a source."""
        return self.hit | self.computed | self.host | self.p2p


class Recount:
    """Feed it every step's inputs and plan, in order; it checks each `Prefilled` as it comes."""

    def __init__(self, page_size: int = 16, *, windowed: bool = False) -> None:
        """`windowed`: some group has a sliding window, so part of what arrives may be of no use to it."""
        self._page_size, self._windowed = page_size, windowed
        self._loads: dict[int, Load] = {}
        self._void: set[int] = set()
        self.books: dict[str, Book] = {}
        self.prefilled: dict[str, PrefillStats] = {}
        self._slots: dict[int, tuple[str, int]] = {}
        self._rows: list[tuple[str, int, range]] = []

    def take(self, inputs: Inputs, plan: Plan) -> None:
        """One step: what the plan before it had run is now executed, unless the outcome is an error."""
        if inputs.outcome is not None and inputs.outcome.error is None:
            for request_id, index, positions in self._rows:
                self._credit(request_id, index, positions, "computed")
        if inputs.pool_moved or (inputs.outcome is not None and inputs.outcome.error is not None):
            self._void |= set(self._loads)
        if inputs.outcome is not None and inputs.outcome.error is not None:
            for book in self.books.values():
                book.arrived = []
        for event in inputs.events:
            if isinstance(event, Loaded) and event.move_id in self._loads:
                self._arrive(event)
        for request in inputs.arrivals:
            self.books[request.request_id] = Book(len(request.prompt_token_ids))
        for entry in plan.prefilled:
            assert entry.request_id not in self.prefilled, "prompt statistics came twice"
            book, stats = self.books[entry.request_id], entry.stats
            assert stats.num_prompt_tokens == book.prompt
            counted = (len(book.computed), len(book.hit), len(book.host) + len(book.p2p))
            assert (stats.local_compute, stats.local_cache_hit, stats.external_kv_transfer) == counted, entry
            by_tier = dict(stats.external_by_tier)
            assert (by_tier.get("host", 0), by_tier.get("p2p", 0)) == (len(book.host), len(book.p2p)), entry
            self.prefilled[entry.request_id] = stats
        for entry in (*plan.finished, *plan.preempted):
            if entry.slot is not None:
                assert self._slots.pop(entry.slot) == (entry.request_id, entry.index)
        for entry in plan.admitted:
            assert entry.slot not in self._slots
            self._slots[entry.slot] = (entry.request_id, entry.index)
            self._admit(entry)
        for command in plan.moves.commands:
            if isinstance(command, Load):
                if all(load.request_id != command.request_id for load in self._loads.values()):
                    self.books[command.request_id].arrived = []  # what failed before counts no more
                self._loads[command.move_id] = command
        rows = plan.rows
        self._rows = [
            (*self._slots[int(slot)], range(int(start), int(start + count)))
            for slot, start, count in zip(rows.slots, rows.starts, rows.lens, strict=True)
        ]

    def _credit(self, request_id: str, index: int, positions: range, source: str) -> None:
        if index or request_id in self.prefilled:
            return
        book = self.books[request_id]
        settled = book.settled
        getattr(book, source).update(
            position for position in positions if position < book.prompt and position not in settled
        )

    def _arrive(self, event: Loaded) -> None:
        """A load has ended: what it brought waits for the request's admission."""
        load = self._loads.pop(event.move_id)
        begin, asked = load.first_page * self._page_size, len(load.pages[0])
        pages = 0 if event.move_id in self._void or not event.safe else event.num_pages
        end = begin + (load.num_tokens if pages == asked else pages * self._page_size)
        tier = "host" if isinstance(load.source, HostSource) else "p2p"
        self.books[load.request_id].arrived.append((range(begin, end), pages == asked, tier))

    def _admit(self, entry: Admitted) -> None:
        """Credits the hit, then the run of loads behind it without a gap, as far as it can be used."""
        self._credit(entry.request_id, entry.index, range(entry.hit_tokens), "hit")
        book = self.books[entry.request_id]
        if entry.index:
            return
        arrived, book.arrived = sorted(book.arrived, key=lambda each: each[0].start), []
        run = entry.hit_tokens
        for positions, whole, _ in arrived:
            if positions.start != run:  # what lay before it was lost meanwhile
                break
            run = positions.stop
            if not whole:
                break
        assert entry.loaded_tokens <= run - entry.hit_tokens, "more was loaded than arrived"
        if not self._windowed:
            assert entry.loaded_tokens == run - entry.hit_tokens, "less was loaded than arrived"
        usable = entry.hit_tokens + entry.loaded_tokens
        for positions, whole, source in arrived:
            self._credit(entry.request_id, 0, range(positions.start, min(positions.stop, usable)), source)
            if not whole:
                break
