"""I25: an engine that is asked to end serves what it took in, takes nothing more, and keeps its promises."""

from collections.abc import Iterable
from dataclasses import dataclass

from jaxserve.sim.broken import Broken
from jaxserve.sim.engine import SimEngine
from scheduler.types import Inputs

TOLD_WITHIN_S = 5.0
"""Requests that live when the time is over are told so within so long."""
LATE_S = 0.01
"""By how much an engine that nothing has disturbed may close later than its bound, on its own clock."""


@dataclass(slots=True, eq=False)
class _Ending:
    """Attributes: taken: requests that lived when it was asked. disturbed: it was stopped, or its clock has
    jumped, since."""

    taken: frozenset[str]
    disturbed: bool = False


class Endings:
    """Follows every engine from the moment at which it is asked to end."""

    def __init__(self) -> None:
        self._endings: dict[str, _Ending] = {}

    def asked(self, engine: SimEngine, taken: Iterable[str]) -> None:
        """It is asked to end now. `taken`: its live requests."""
        self._endings.setdefault(engine.epoch, _Ending(frozenset(taken)))

    def begun(self, engine: SimEngine) -> bool:
        """It was asked to end."""
        return engine.epoch in self._endings

    def disturbed(self, engine: SimEngine) -> None:
        """Its process is stopped, or its clock jumps: it may close late."""
        if engine.epoch in self._endings:
            self._endings[engine.epoch].disturbed = True

    def step(self, engine: SimEngine, inputs: Inputs) -> None:
        """Raises: Broken: it has taken a request."""
        ending = self._endings.get(engine.epoch)
        if ending is None:
            return
        for request in inputs.arrivals:
            if request.request_id not in ending.taken:
                raise Broken("I25", f"{engine.host} was asked to end, and takes {request.request_id}")

    def ended(self, engine: SimEngine) -> None:
        """It has closed.

        Raises:
            Broken: too late, or before what it took in and what it leased was served.
        """
        ending, drain, now = self._endings.pop(engine.epoch), engine.draining, engine.clock()
        if drain is None:
            raise Broken("I25", f"{engine.host} has closed, and nobody asked it to")
        state = engine.core.state
        if now < drain.until and (state.sequences or state.ledger.num_leases):
            left = f"{len(state.sequences)} sequences and {state.ledger.num_leases} leases"
            raise Broken("I25", f"{engine.host} closed {drain.until - now:g} s early, with {left}")
        late_s = now - drain.until - TOLD_WITHIN_S
        if late_s > LATE_S and not ending.disturbed:
            raise Broken("I25", f"{engine.host} closed {late_s:g} s late")
