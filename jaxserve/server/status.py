"""Whether the server accepts work, and how much it has."""

import contextlib
from collections.abc import Generator
from typing import Protocol

from jaxserve.api.errors import unavailable


class Liveness(Protocol):
    """What is asked of an engine; see `jaxserve.server.surface.EngineSurface`."""

    @property
    def alive(self) -> bool: ...

    def stalled(self, seconds: float) -> bool: ...


class Status:
    """One server's state of life. Used on the event loop only."""

    def __init__(self, engine: Liveness, stall_s: float) -> None:
        self._engine = engine
        self._stall_s = stall_s
        self.draining = False
        self.in_flight = 0

    @contextlib.contextmanager
    def serving(self) -> Generator[None, None, None]:
        """Counts one generation request while it lasts."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def check_accepting(self) -> None:
        """Raises ApiError 503 while the server drains, or once the engine's loop has ended."""
        if self.draining:
            raise unavailable("The server is shutting down.")
        self.check_alive()

    def check_alive(self) -> None:
        """What a health check asks: raises ApiError 503 once the engine's loop has ended. A server that
        drains is well, since it answers what it took in."""
        if not self._engine.alive:
            raise unavailable("The engine has stopped.")

    def not_ready(self) -> str | None:
        """Why new requests would not be served well now; None: they would."""
        if not self._engine.alive:
            return "the engine has stopped"
        if self.draining:
            return "the server is shutting down"
        if self._engine.stalled(self._stall_s):
            return f"work waits and no step has completed for {self._stall_s:g} s"
        return None
