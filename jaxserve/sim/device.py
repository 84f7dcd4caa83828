"""A device whose memory is a NumPy array and whose model is a hash. It runs plans as the real one does.

Rows are computed in two halves, the first when the step begins and the second when it ends, so that whoever
touches the pool in between is found out.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from jaxserve.dispatch import Executed, Pending, PromptSpan, SlotSetup
from jaxserve.sample import Sampled
from jaxserve.sim.hash_model import CELL_BYTES, HEAD_DIM, HEADS, LAYERS, HashModel
from kv.driver import Region
from scheduler.types import Outcome, Plan

NO_LOGPROBS = np.zeros((0, 0), np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFate:
    """What goes wrong with one step.

    Attributes:
        error: the step fails as a whole, and the pool's content with it.
        moves: the pool lies elsewhere after it; without an error, with its content.
        not_finite: a row that samples gives logits that are no numbers.
        sampler: which of those that sample, counted from 0.
    """

    error: str | None = None
    moves: bool = False
    not_finite: bool = False
    sampler: int = 0


@dataclass(slots=True, eq=False)
class _Step:
    plan: Plan
    fate: StepFate
    tokens: np.ndarray
    firsts: np.ndarray
    half: int


@dataclass(slots=True, eq=False)
class SimDevice:
    """`jaxserve.core.DeviceDriver` of one engine with `model.ranks` ranks.

    Attributes:
        fate: called once per step.
        fill: makes so many bytes: what a fresh pool holds.
        pools: per rank, uint8 `[num_pages, page_bytes]`.
        left: pools of earlier; they stay, since somebody might still write to them by address.
    """

    model: HashModel
    num_pages: int
    page_size: int
    fill: Callable[[int], bytes]
    fate: Callable[[], StepFate]
    pools: list[np.ndarray] = field(default_factory=list)
    left: list[np.ndarray] = field(default_factory=list)
    _seeds: dict[int, int] = field(default_factory=dict)
    _step: _Step | None = None
    _moved: bool = False

    def __post_init__(self) -> None:
        self._allocate()

    @property
    def page_shape(self) -> tuple[int, int, int, int, int]:
        """`[layers, 2, kv_heads, page_size, head_dim]` of one rank's part of a page."""
        return (LAYERS, 2, HEADS, self.page_size, HEAD_DIM)

    @property
    def page_bytes(self) -> int:
        """Of one rank's part of a page."""
        return self.page_size * CELL_BYTES

    def start(self, plan: Plan, setups: list[SlotSetup], spans: list[PromptSpan]) -> Pending:
        """Begins a step."""
        if self._step is not None:
            raise RuntimeError("a step was begun while another was under way")
        if spans:
            raise RuntimeError("the simulated model has no log-probabilities")
        for setup in setups:
            self._seeds[setup.slot] = setup.seed
        count = len(plan.rows)
        step = _Step(
            plan,
            self.fate(),
            np.zeros(count, np.int32),
            np.cumsum(plan.rows.lens) - plan.rows.lens,
            count // 2,
        )
        self._step = step
        for row in range(step.half):
            self._run(step, row)
        return Pending(step_id=plan.step_id, rows=count, sampled=None)

    def wait(self, pending: Pending) -> Executed:
        """Ends the step."""
        step, self._step = self._step, None
        if step is None or step.plan.step_id != pending.step_id:
            raise RuntimeError("a step was awaited that is not under way")
        if step.fate.error is not None:
            self._lose(step.fate.moves)
            outcome = Outcome(step_id=pending.step_id, tokens=np.zeros(0, np.int32), error=step.fate.error)
            return Executed(outcome=outcome, sampled=None)
        for row in range(step.half, pending.rows):
            self._run(step, row)
        if step.fate.moves:
            self._move()
        finite = np.ones(pending.rows, bool)
        samples = np.nonzero(step.plan.rows.samples)[0]
        if step.fate.not_finite and len(samples):
            finite[samples[step.fate.sampler]] = False
        sampled = Sampled(
            tokens=step.tokens,
            logprobs=NO_LOGPROBS,
            ranks=NO_LOGPROBS,
            top_ids=NO_LOGPROBS,
            top_logprobs=NO_LOGPROBS,
            finite=finite,
        )
        return Executed(outcome=Outcome(step_id=pending.step_id, tokens=step.tokens), sampled=sampled)

    def pool_changed(self) -> bool:
        """Whether the pool lies elsewhere than at the last call."""
        moved, self._moved = self._moved, False
        return moved

    def regions(self) -> tuple[Region, ...]:
        """Where the pool lies, per rank."""
        return tuple(
            Region(address=pool.ctypes.data, page_bytes=self.page_bytes, num_pages=self.num_pages)
            for pool in self.pools
        )

    def expected_page(self, cells: bytes) -> bytes:
        """The bytes of a page whose tokens have these cells (all of its tokens)."""
        both = np.frombuffer(cells, np.uint8).reshape(self.page_size, 2, CELL_BYTES // 2)
        return both.transpose(1, 0, 2).tobytes()

    def _run(self, step: _Step, row: int) -> None:
        """Reads what the row's tokens see, writes their cells, and samples where the row does."""
        rows, model = step.plan.rows, self.model
        start, count, first = int(rows.starts[row]), int(rows.lens[row]), int(step.firsts[row])
        tokens = rows.tokens[first : first + count].tolist()
        seen = []
        for rank, group, window in model.places():
            table = rows.page_tables[group][row]
            begin = model.first_seen(window, start)
            before = self._read(rank, table, begin, start)
            cells = model.extend(rank, group, window, start, before, tokens)
            self._write(rank, table, start, cells)
            if rows.samples[row]:
                visible = model.first_seen(window, start + count - 1)
                seen.append((before + cells)[(visible - begin) * CELL_BYTES :])
        if rows.samples[row]:
            step.tokens[row] = model.choose(seen, self._seeds[int(rows.slots[row])])

    def _read(self, rank: int, table: np.ndarray, begin: int, end: int) -> bytes:
        if begin == end:
            return b""
        size = self.page_size
        low = begin // size
        pages = self.pools[rank][table[low : -(-end // size)]]
        both = pages.reshape(len(pages), 2, size, CELL_BYTES // 2).transpose(0, 2, 1, 3)
        return both.tobytes()[(begin - low * size) * CELL_BYTES : (end - low * size) * CELL_BYTES]

    def _write(self, rank: int, table: np.ndarray, start: int, cells: bytes) -> None:
        size, half = self.page_size, CELL_BYTES // 2
        positions = np.arange(start, start + len(cells) // CELL_BYTES)
        both = np.frombuffer(cells, np.uint8).reshape(-1, 2, half)
        view = self.pools[rank].reshape(self.num_pages, 2, size, half)
        view[table[positions // size], :, positions % size] = both

    def _allocate(self) -> None:
        size = self.num_pages * self.page_bytes
        self.left += self.pools
        self.pools = [
            np.frombuffer(bytearray(self.fill(size)), np.uint8).reshape(self.num_pages, self.page_bytes)
            for _ in range(self.model.ranks)
        ]

    def _lose(self, moves: bool) -> None:
        """The content is gone; where the pool was donated to the failed step, it lies elsewhere now."""
        if moves:
            self._allocate()
            self._moved = True
            return
        for pool in self.pools:
            pool[:] = np.frombuffer(self.fill(pool.size), np.uint8).reshape(pool.shape)

    def _move(self) -> None:
        self.left += self.pools
        self.pools = [pool.copy() for pool in self.pools]
        self._moved = True
