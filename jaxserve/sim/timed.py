"""Engines without a model, whose steps take what a table says: tokens mean nothing, pages are tiny."""

from collections.abc import Callable

import numpy as np

from jaxserve.dispatch import Executed, Pending, PromptSpan, SlotSetup
from jaxserve.sample import Sampled
from jaxserve.sim.clockwork import Timer
from jaxserve.sim.costs import LATENESS_S, CostTable, step_clock
from jaxserve.sim.engine import SimEngine, Weather
from jaxserve.sim.expect import vocabulary
from jaxserve.text import Tokenizer
from kv.driver import Region
from scheduler.types import Outcome, Plan

LOOK_S = 0.05
"""Between looks of a prefill engine at whether it is still being read."""

TOKEN = 1
"""What the missing model says, always."""

PAGE_SHAPE = (1, 2, 1, 1)
"""Layers, K and V, heads and head size of the pages here: they only have to be there."""

ITEM_BYTES = 2


class Wordless(Tokenizer):
    """A tokenizer whose tokens have no text."""

    def __init__(self) -> None:
        super().__init__(vocabulary())

    def token_bytes(self, token_id: int) -> bytes:
        """Nothing."""
        return b""


class NoModel:
    """`jaxserve.core.DeviceDriver` whose steps compute nothing. Its pool is real memory of small pages."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        layers, sides, heads, head_dim = PAGE_SHAPE
        self._pool = np.zeros((num_pages, layers * sides * heads * head_dim * page_size), np.uint16)

    def start(self, plan: Plan, setups: list[SlotSetup], spans: list[PromptSpan]) -> Pending:
        """Begins a step."""
        return Pending(step_id=plan.step_id, rows=len(plan.rows), sampled=None)

    def wait(self, pending: Pending) -> Executed:
        """Ends it."""
        tokens, nothing = np.full(pending.rows, TOKEN, np.int32), np.zeros((0, 0), np.float32)
        sampled = Sampled(
            tokens=tokens,
            logprobs=nothing,
            ranks=nothing,
            top_ids=nothing,
            top_logprobs=nothing,
            finite=np.ones(pending.rows, bool),
        )
        return Executed(outcome=Outcome(step_id=pending.step_id, tokens=tokens), sampled=sampled)

    def pool_changed(self) -> bool:
        """Never."""
        return False

    def regions(self) -> tuple[Region, ...]:
        """The pool."""
        page_bytes = self._pool.shape[1] * self._pool.itemsize
        return (Region(address=self._pool.ctypes.data, page_bytes=page_bytes, num_pages=len(self._pool)),)


class Lender(SimEngine):
    """A prefill engine that looks only now and then whether it is still being read: a real NIXL agent needs
    thousands of looks a second to get on, the simulated one needs none. Messages wake it as ever."""

    def after(self, delay: float, label: str, action: Callable[[], None]) -> Timer:
        """See `SimEngine`."""
        looks = label.startswith("round") and delay > LATENESS_S
        return super().after(max(delay, LOOK_S) if looks else delay, label, action)


class Measured(Weather):
    """Steps take what a table says. Attributes: steps, busy_s: per engine's name, of its steps so far."""

    def __init__(self, table: CostTable) -> None:
        self._seconds = step_clock(table)
        self._lending = 1.0 if table.transfer is None else table.transfer.lending
        self.steps: dict[str, int] = {}
        self.busy_s: dict[str, float] = {}

    def step_seconds(self, engine: SimEngine, plan: Plan) -> float:
        """See `Weather`."""
        seconds, name = self._seconds(plan.rows), engine.host
        seconds *= self._lending if isinstance(engine, Lender) else 1.0
        self.steps[name] = self.steps.get(name, 0) + 1
        self.busy_s[name] = self.busy_s.get(name, 0.0) + seconds
        return seconds

    def lateness(self, engine: SimEngine) -> float:
        """See `Weather`."""
        return LATENESS_S
