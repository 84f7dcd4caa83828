"""I20: what a server says of itself at /ready is so: its own rule (`jaxserve.server.status`), from outside.

Ten seconds after its last turn, an engine that has work at hand or a step under way is not ready; nor is one
that was asked to end, or has ended. Every other is. One that is stopped answers nobody.
"""

from collections.abc import Iterable

from jaxserve.server.options import ServerOptions
from jaxserve.server.status import Status
from jaxserve.sim.broken import Broken
from jaxserve.sim.endings import Endings
from jaxserve.sim.engine import SimEngine

WEDGED_S = 10.0


class Health:
    """Looks at all engines after every event."""

    def __init__(self, endings: Endings) -> None:
        """Args: endings: knows who was asked to end."""
        self._endings = endings
        self._statuses: dict[str, Status] = {}
        self._turned: dict[str, float] = {}

    def step(self, engine: SimEngine) -> None:
        """A step has been decided: the one before it has ended."""
        self._turned[engine.epoch] = engine.clock()

    def look(self, engines: Iterable[SimEngine]) -> None:
        """Raises: Broken: a server says of itself what is not so."""
        for engine in engines:
            if engine.paused:
                continue
            says, core = self._says(engine), engine.core
            over = not engine.alive or self._endings.begun(engine)
            silent_s = 0.0 if core.idle else engine.clock() - self._turned.get(engine.epoch, engine.clock())
            if says is None and (over or silent_s > WEDGED_S):
                last = f"its last turn was {silent_s:g} s ago" if not over else "it was asked to end"
                raise Broken("I20", f"{engine.host} says that it is ready, and {last}")
            if says is not None and not over and silent_s <= WEDGED_S:
                raise Broken("I20", f"{engine.host} says that it is not ready: {says}")

    def _says(self, engine: SimEngine) -> str | None:
        """Why it is not ready; None: it is."""
        status = self._statuses.get(engine.epoch)
        if status is None:
            status = self._statuses[engine.epoch] = Status(engine, ServerOptions().stall_s)
        status.draining = engine.draining is not None
        return status.not_ready()
