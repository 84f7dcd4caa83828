"""The scheduler's world with moves: host tiers and peers made of the same cells, under drawn faults.

Drivers are played here: a command is answered some steps later, in any order, well or not. What a failed or
unverified load leaves in its targets is garbage, so that a scheduler that lets anybody read it is found out;
a load that is not safe goes on writing garbage until it is.
"""

import random
from dataclasses import dataclass

import numpy as np

from kv.moves import (
    HostSource,
    Lease,
    LeaseRead,
    Load,
    Loaded,
    RemoteSource,
    Safe,
    Store,
    Stored,
    Track,
    Unlease,
    Untrack,
)
from kv.types import DUMMY_PAGE
from scheduler.types import Limits, Outcome, Plan, SchedulerConfig
from tests.scheduler.world import World, cell

GARBAGE = -1


@dataclass(kw_only=True)
class Faults:
    """Rates, 0 to 1, of what may go wrong with one move or step."""

    load_short: float = 0.0
    load_unsafe: float = 0.0
    store_fails: float = 0.0
    step_fails: float = 0.0
    pool_moves: float = 0.0


@dataclass(kw_only=True)
class Peer:
    """What P knows of a request that it has computed: enough to fill any page."""

    tokens: tuple[int, ...]
    tracked: bool = False
    released: int = 0
    loads: int = 0


class MovingWorld(World):
    """A world whose pages come and go."""

    def __init__(
        self, config: SchedulerConfig, limits: Limits, *, seed: int = 0, faults: Faults | None = None
    ) -> None:
        super().__init__(config, limits)
        self.random = random.Random(seed)
        self.faults = faults or Faults()
        leaves = 0 if config.transfer is None else len(config.transfer.leaves)
        self.host: list[dict[tuple[int, int], dict[int, int]]] = [{} for _ in range(leaves)]
        self.under_way: list[Load | Store] = []
        self.dirty: dict[int, tuple[int, ...]] = {}
        self.peers: dict[str, Peer] = {}
        self.leases: dict[str, Lease] = {}
        self.now = 0.0
        self.counts |= {"loaded": 0, "stored": 0, "short": 0, "unsafe": 0, "leases": 0}

    def remote(self, request_id: str, tokens, cached: int | None = None) -> RemoteSource:
        """P has computed these tokens for a request."""
        size = self.config.page_size
        count = -(-len(tokens) // size)
        self.peers[request_id] = Peer(tokens=tuple(tokens))
        pages = tuple(tuple(range(1, count + 1)) for _ in self.config.windows)
        return RemoteSource(
            engine_id="p", epoch="0" * 32, host="localhost", port=5600, request_id=request_id, pages=pages,
            generations=pages, num_tokens=len(tokens), page_size=size, cached_tokens=cached,
        )  # fmt: skip

    def step(self, **inputs) -> Plan:
        """One turn, with the answers of some moves."""
        self.now += 0.25
        events, moved = list(inputs.pop("events", ())), False
        if self.pending is not None and self.random.random() < self.faults.step_fails:
            self.pending = Outcome(
                step_id=self.pending.step_id, tokens=np.zeros(0, np.int32), error="the device is gone"
            )
            self._lose_pool()
            events += self._fail_all()
        elif self.random.random() < self.faults.pool_moves:
            moved = True
            events += self._fail_all()
        events += self._answers()
        plan = super().step(events=tuple(events), now_s=self.now, pool_moved=moved, **inputs)
        for command in plan.moves.commands:
            self._take(command)
        for pages in self.dirty.values():
            self._scribble(pages)
        for lease in self.leases.values():
            self.check_lease(lease)
        return plan

    def run(self, bound: int = 4000) -> None:
        """Steps until nothing is left to do, leases among it."""
        for _ in range(bound):
            plan = self.step()
            gauges = plan.gauges
            quiet = not len(plan.rows) and not gauges.waiting and not gauges.running
            if quiet and not self.under_way and not self.dirty and not plan.moves.gauges.leases:
                return
        raise AssertionError(f"requests or moves still live after {bound} steps: {plan.gauges} {plan.moves}")

    def _take(self, command) -> None:
        match command:
            case Load() | Store():
                self.under_way.append(command)
            case Lease():
                self.leases[command.request_id] = command
                self.counts["leases"] += 1
            case Unlease():
                del self.leases[command.request_id]
            case Track():
                self.peers[command.request_id].tracked = True
            case Untrack():
                peer = self.peers[command.request_id]
                assert peer.tracked, "a peer is let go that was never met"
                peer.released += 1

    def _answers(self) -> list:
        """Some of what is under way ends, in any order."""
        events: list = []
        for move in self.random.sample(self.under_way, len(self.under_way)):
            if self.random.random() < 0.6:
                self.under_way.remove(move)
                events.append(self._load(move) if isinstance(move, Load) else self._store(move))
        for move_id in list(self.dirty):
            if self.random.random() < 0.3:
                del self.dirty[move_id]
                events.append(Safe(move_id=move_id))
        for request_id in list(self.leases):
            if self.random.random() < 0.2:
                events.append(LeaseRead(request_id=request_id, at_s=self.now))
        return events

    def _load(self, load: Load) -> Loaded:
        asked, rates = len(load.pages[0]), self.faults
        flat = tuple(page for group in load.pages for page in group if page != DUMMY_PAGE)
        if self.random.random() < rates.load_unsafe:
            self.dirty[load.move_id] = flat
            self.counts["unsafe"] += 1
            return Loaded(move_id=load.move_id, num_pages=0, safe=False, error="no answer", stage="transfer")
        good = asked
        if self.random.random() < rates.load_short:
            good = self.random.randrange(asked)
            self.counts["short"] += 1
        self._scribble(flat)
        for group, pages in enumerate(load.pages):
            for place, page in enumerate(pages[:good]):
                if page != DUMMY_PAGE:
                    self._fill(load, group, place, page)
        self.counts["loaded"] += good
        if isinstance(load.source, RemoteSource):
            self.peers[load.request_id].loads += 1
        error = None if good == asked else "it broke"
        return Loaded(
            move_id=load.move_id, num_pages=good, error=error, stage="" if error is None else "verify"
        )

    def _fill(self, load: Load, group: int, place: int, page: int) -> None:
        size = self.config.page_size
        if isinstance(load.source, HostSource):
            held = self.host[load.connector][group, load.source.slots[group][place]]
        else:
            tokens = self.peers[load.request_id].tokens
            first = (load.first_page + place) * size
            held = {
                offset: cell(tokens, first + offset) for offset in range(size) if first + offset < len(tokens)
            }
        for cells in self.cells:
            for offset in range(size):
                cells.pop((page, offset), None)
        self.cells[group].update({(page, offset): value for offset, value in held.items()})

    def _store(self, store: Store) -> Stored:
        if self.random.random() < self.faults.store_fails:
            return Stored(move_id=store.move_id, error="no memory")
        for page, slot in zip(store.pages, store.slots, strict=True):
            for group, cells in enumerate(self.cells):
                held = {offset: value for (of, offset), value in cells.items() if of == page}
                self.host[store.connector][group, slot] = held
        self.counts["stored"] += len(store.pages)
        return Stored(move_id=store.move_id)

    def _scribble(self, pages) -> None:
        for page in pages:
            for cells in self.cells:
                cells.update({(page, offset): GARBAGE for offset in range(self.config.page_size)})

    def _lose_pool(self) -> None:
        for cells in self.cells:
            cells.clear()

    def _fail_all(self) -> list:
        """What drivers answer when the pool has moved: nothing of what was under way is good."""
        events: list = []
        for move in self.under_way:
            if isinstance(move, Load):
                events.append(Loaded(move_id=move.move_id, num_pages=0, error="the pool moved"))
            else:
                events.append(Stored(move_id=move.move_id, error="the pool moved"))
        self.under_way.clear()
        events += [Safe(move_id=move_id) for move_id in self.dirty]
        self.dirty.clear()
        return events

    def check_lease(self, lease: Lease) -> None:
        """What a peer would read now is what the lease promised, and its generations stand."""
        tokens, size = self.requests[lease.request_id].prompt_token_ids, self.config.page_size
        for group, pages in enumerate(lease.pages):
            for place, page in enumerate(pages):
                if page == DUMMY_PAGE:
                    continue
                assert int(self.state.pages.generation[page]) == lease.generations[group][place]
                for offset in range(size):
                    position = place * size + offset
                    if position < min(len(tokens), lease.num_tokens):
                        assert self.cells[group].get((page, offset)) == cell(tokens, position)
