"""The invariants of a simulated cluster, checked after every event. Numbers are those of docs/testing.md.

None of this decides anything: it looks at the production values from outside, and counts again.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from jaxserve.sim.broken import Broken
from jaxserve.sim.counters import Counters
from jaxserve.sim.device import SimDevice
from jaxserve.sim.endings import Endings
from jaxserve.sim.engine import SimEngine
from jaxserve.sim.fake_nixl import FakeNixlNetwork
from jaxserve.sim.hash_model import CELL_BYTES, HashModel
from jaxserve.sim.order import Order
from jaxserve.sim.recount import Recount
from kv import prefix
from kv.connectors.host_tier import HostTierConnector
from kv.ledger import Kind
from scheduler.state import check
from scheduler.types import Inputs, Plan


class Names:
    """What every named page must hold: built from the requests, without an engine."""

    def __init__(self, model: HashModel) -> None:
        self._model = model
        self._meaning: dict[tuple[int, bytes], tuple[str, tuple[int, ...]]] = {}
        self._pages: dict[tuple[int, bytes, int, int, int], bytes] = {}

    def learn(
        self, tokens: tuple[int, ...], *, cache_key: str, salt: str, private: str, page_size: int
    ) -> None:
        """A request with these tokens (prompt and output) has been made.

        Raises:
            Broken: a name means two prefixes.
        """
        root = prefix.root(cache_key, salt, private=private)
        names = prefix.extend(root, np.asarray(tokens, np.int32), page_size)
        for index, name in enumerate(names):
            meaning = (f"{cache_key}/{salt}/{private}", tokens[: (index + 1) * page_size])
            if self._meaning.setdefault((page_size, name), meaning) != meaning:
                raise Broken("I7", f"one name for {meaning} and {self._meaning[page_size, name]}")

    def page(self, device: SimDevice, name: bytes, rank: int, group: int, back: int = 0) -> bytes | None:
        """The bytes of the page with this name, or of one so many pages before it; None: nobody ever asked
        for such tokens."""
        size = device.page_size
        key = (size, name, rank, group, back)
        if key not in self._pages:
            meaning = self._meaning.get((size, name))
            if meaning is None:
                return None
            tokens = meaning[1][: len(meaning[1]) - back * size]
            cells = self._model.cells(tokens)[rank * len(self._model.windows) + group]
            self._pages[key] = device.expected_page(cells[len(cells) - size * CELL_BYTES :])
        return self._pages[key]


class Laws:
    """Attributes: flipped: (epoch, leaf, rank, row) of host memory that a fault has changed."""

    def __init__(self, names: Names, nixl: FakeNixlNetwork) -> None:
        self.names = names
        self.flipped: set[tuple[str, int, int, int]] = set()
        self.order = Order()
        self.endings = Endings()
        self._nixl = nixl
        self._accepted: Counter[str] = Counter()
        self._promises: dict[str, _Promised] = {}
        self._counters = Counters()

    def look(self, engines: Iterable[SimEngine]) -> None:
        """Everything about all engines of which something has happened since the last look.

        Raises:
            Broken: a law is.
        """
        alive = [engine for engine in engines if engine.alive]
        self.check_transfers(alive)
        for engine in alive:
            if engine.turned:
                self.check(engine)
            if engine.touched:
                self.check_content(engine)
            engine.touched = engine.turned = False

    def check(self, engine: SimEngine) -> None:
        """Everything about one engine.

        Raises:
            Broken: a law is.
        """
        try:
            check(engine.core.state)  # I1, I2, I3
        except AssertionError as error:
            raise Broken("I1-I3", f"{engine.host}: {error}") from error
        self._gauges(engine)
        if isinstance(engine.device, SimDevice):
            self._promises[engine.epoch] = self._promised(engine, engine.device)

    def check_content(self, engine: SimEngine) -> None:
        """I4, I7, I8, I9, I23: what the prefix cache and the host tiers would hand out holds what its name
        says, byte for byte.

        Raises:
            Broken: it does not.
        """
        promises = self._promises.get(engine.epoch)
        if promises is None or not isinstance(engine.device, SimDevice):
            return
        for pool, wanted in zip(engine.device.pools, promises.pages, strict=True):
            wrong = (pool[promises.cached] != wanted).any(axis=1)
            if wrong.any():
                page = promises.cached[int(wrong.argmax())]
                raise Broken("I7", f"{engine.host}: cached page {page} is not what its name says")
        for index, rank, rows, wanted in promises.host:
            wrong = (engine.hosts[index][rank].memory[rows] != wanted).any(axis=1)
            for place in np.nonzero(wrong)[0]:
                if (engine.epoch, index, rank, int(rows[place])) not in self.flipped:
                    raise Broken(
                        "I8", f"{engine.host}: host page {rows[place] + 1} is not what its name says"
                    )

    def check_transfers(self, engines: Iterable[SimEngine]) -> None:
        """I5: a page that somebody may still write is held by a move, and by nobody else.

        Raises:
            Broken: it is not.
        """
        targets = self._nixl.targets()
        if not targets:
            return
        for engine in engines:
            if not isinstance(engine.device, SimDevice):
                continue
            state, size = engine.core.state, engine.device.page_bytes
            held = {page for row in state.ledger if row.kind is Kind.LOAD for page in row.pages}
            for pool in (*engine.device.pools, *engine.device.left):
                low = pool.ctypes.data
                for address in targets:
                    if not low <= address < low + pool.nbytes:
                        continue
                    page = (address - low) // size
                    if not any(pool is current for current in engine.device.pools):
                        raise Broken("I5", f"{engine.host}: somebody may still write to a pool that was left")
                    if page not in held or state.pages.refs[page] != 1:
                        raise Broken("I5", f"{engine.host}: page {page} may be written, but is not held")

    def step(self, engine: SimEngine, inputs: Inputs, plan: Plan) -> None:
        """What one step's plan must be like.

        Raises:
            Broken: it is not.
        """
        rows = plan.rows
        node = engine.node
        self._accepted[engine.epoch] += len(plan.accepted.tokens)
        self.order.step(engine, inputs, plan)
        self.endings.step(engine, inputs)
        self._counters.step(engine, inputs, plan)
        if int(rows.lens.sum()) > node.limits.max_num_batched_tokens:
            raise Broken("I21", f"{engine.host}: a step computes more tokens than its budget")
        if len(rows) > node.limits.max_num_seqs or len(set(rows.slots.tolist())) != len(rows):
            raise Broken("I21", f"{engine.host}: a step has too many rows, or one slot twice")
        live = len(engine.core.state.sequences)
        if plan.gauges.running + plan.gauges.waiting != live:
            raise Broken("I19", f"{engine.host}: running and waiting are not what lives")
        starts = dict(zip(rows.slots.tolist(), rows.starts.tolist(), strict=True))
        for entry in plan.admitted:  # the last known token is computed in any case
            usable = entry.hit_tokens + entry.loaded_tokens
            if starts.get(entry.slot, usable) < usable - 1:
                raise Broken("I11", f"{engine.host}: what was found or loaded is computed once more")
        if inputs.aborts:
            gone = set(inputs.aborts).difference(request.request_id for request in inputs.arrivals)
            if any(request_id in gone for request_id, _ in engine.core.state.sequences):
                raise Broken("I2", f"{engine.host}: an aborted request lives on")

    def sums(self, engine: SimEngine, recount: Recount) -> None:
        """I11, I19: the sum over requests is what the counters say, and what the recount says.

        Raises:
            Broken: it is not.
        """
        stats, each = engine.core.stats.prompts, recount.prefilled.values()
        sums = (
            sum(one.local_compute for one in each),
            sum(one.local_cache_hit for one in each),
            sum(one.external_kv_transfer for one in each),
        )
        counted = (stats.computed, stats.local_cache_hit, stats.external_kv_transfer)
        generated, accepted = engine.core.stats.steps.generation_tokens, self._accepted[engine.epoch]
        if generated != accepted:
            raise Broken("I19", f"{engine.host}: {accepted} tokens, counted {generated}")
        if sums != counted:
            raise Broken("I11", f"{engine.host}: requests sum to {sums}, counters say {counted}")

    def _gauges(self, engine: SimEngine) -> None:
        """I19: gauges say what is; and counters. I21: the queue is bounded."""
        core, host = engine.core, engine.host
        stats, moves = core.stats, core.move_stats
        self._counters.look(engine)
        if engine.plan is not None:
            state, gauges = core.state, stats.gauges
            pool, shown = state.pages, moves.pages
            live = state.sequences.values()
            deferred = sum(each.fetch is not None and bool(each.fetch.moves) for each in live)
            told = (gauges.running, gauges.pages_used, gauges.waiting_capacity, gauges.waiting_deferred)
            true = (len(state.running), pool.in_use, len(live) - len(state.running) - deferred, deferred)
            if told != true or gauges.pages_total != pool.usable:
                raise Broken("I19", f"{host}: gauges say {gauges}, there are {true} of {pool.usable} pages")
            if (shown.free, shown.idle, shown.in_use) != (pool.free, pool.idle, pool.in_use):
                raise Broken("I19", f"{host}: pages in metrics are {shown}, in the pool {pool.in_use} in use")
        if core.inbox.num_queued > engine.node.max_num_queued_reqs:
            raise Broken("I21", f"{host}: more requests wait than may")

    def _promised(self, engine: SimEngine, device: SimDevice) -> "_Promised":
        """What cached pages must hold until the engine's next turn.

        Raises:
            Broken: a page is cached under a name that nobody's tokens have.
        """
        cached = engine.core.state.prefix.items()
        pages = [
            self._rows(engine, device, [(name, rank, group, 0) for _, group, name in cached])
            for rank in range(len(device.pools))
        ]
        host = []
        for index, leaf in enumerate(engine.core.state.leaves):
            if isinstance(leaf, HostTierConnector):
                ready = list(leaf.ready_pages())
                rows = np.array([slot - 1 for _, _, _, slot in ready], np.int64)
                for rank in range(len(engine.hosts[index])):
                    wanted = [(name, rank, group, back) for group, name, back, _ in ready]
                    host.append((index, rank, rows, self._rows(engine, device, wanted)))
        numbers = np.array([page for page, _, _ in cached], np.int64)
        return _Promised(cached=numbers, pages=tuple(pages), host=tuple(host))

    def _rows(
        self, engine: SimEngine, device: SimDevice, wanted: list[tuple[bytes, int, int, int]]
    ) -> np.ndarray:
        rows = []
        for name, rank, group, back in wanted:
            row = self.names.page(device, name, rank, group, back)
            if row is None:
                raise Broken("I7", f"{engine.host}: a page is cached under a name that nobody's tokens have")
            rows.append(row)
        return np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), device.page_bytes)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Promised:
    """Attributes: cached: pages; pages: per rank, their bytes; host: (leaf, rank, rows, their bytes)."""

    cached: np.ndarray
    pages: tuple[np.ndarray, ...]
    host: tuple[tuple[int, int, np.ndarray, np.ndarray], ...]


def no_leak(engine: SimEngine) -> None:
    """I2: with no request, lease or transfer left, every page is free or idle.

    Raises:
        Broken: one is not.
    """
    state = engine.core.state
    if state.sequences or len(state.ledger) or state.loading or state.fetched or state.remotes:
        left = [row.kind.value for row in state.ledger]
        raise Broken("I2", f"{engine.host}: {len(state.sequences)} sequences and moves {left} are left")
    if state.pages.in_use:
        raise Broken("I2", f"{engine.host}: {state.pages.in_use} pages are still in use")
    if engine.core.inbox.num_live or engine.core.inbox.num_queued:
        raise Broken("I12", f"{engine.host}: requests live on outside the scheduler")
    for leaf in state.leaves:
        for _, _, pinned, storing, _ in leaf.tiers():
            if pinned or storing:
                raise Broken("I2", f"{engine.host}: host pages stay pinned")
