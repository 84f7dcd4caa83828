"""An independent count of where prompt tokens came from: from executed plans alone, position by position.

A position belongs to whatever first made its KV usable: a hit at admission, or a row that computed it. The
scheduler keeps two integers per sequence instead; tests compare the two for every request.
"""

from dataclasses import dataclass, field

from metrics.stats import PrefillStats
from scheduler.types import Inputs, Plan


@dataclass
class Book:
    """One request's prompt positions by source."""

    prompt: int
    hit: set[int] = field(default_factory=set)
    computed: set[int] = field(default_factory=set)


class Recount:
    """Feed it every step's inputs and plan, in order; it checks each `Prefilled` as it comes."""

    def __init__(self) -> None:
        self.books: dict[str, Book] = {}
        self.prefilled: dict[str, PrefillStats] = {}
        self._slots: dict[int, tuple[str, int]] = {}
        self._rows: list[tuple[str, int, range]] = []

    def take(self, inputs: Inputs, plan: Plan) -> None:
        """One step: what the plan before it had run is now executed, unless the outcome is an error."""
        if inputs.outcome is not None and inputs.outcome.error is None:
            for request_id, index, positions in self._rows:
                self._credit(request_id, index, positions, "computed")
        for request in inputs.arrivals:
            self.books[request.request_id] = Book(len(request.prompt_token_ids))
        for entry in plan.prefilled:
            assert entry.request_id not in self.prefilled, "prompt statistics came twice"
            book, stats = self.books[entry.request_id], entry.stats
            assert stats.num_prompt_tokens == book.prompt
            assert stats.external_kv_transfer == 0
            assert (stats.local_compute, stats.local_cache_hit) == (len(book.computed), len(book.hit)), entry
            self.prefilled[entry.request_id] = stats
        for entry in (*plan.finished, *plan.preempted):
            if entry.slot is not None:
                assert self._slots.pop(entry.slot) == (entry.request_id, entry.index)
        for entry in plan.admitted:
            assert entry.slot not in self._slots
            self._slots[entry.slot] = (entry.request_id, entry.index)
            self._credit(entry.request_id, entry.index, range(entry.hit_tokens), "hit")
        rows = plan.rows
        self._rows = [
            (*self._slots[int(slot)], range(int(start), int(start + count)))
            for slot, start, count in zip(rows.slots, rows.starts, rows.lens, strict=True)
        ]

    def _credit(self, request_id: str, index: int, positions: range, source: str) -> None:
        if index or request_id in self.prefilled:
            return
        book = self.books[request_id]
        for position in positions:
            if position < book.prompt and position not in book.hit and position not in book.computed:
                getattr(book, source).add(position)
