"""Whether an engine's loop gets on: the rule behind /ready. Pure: whoever turns the loop says when."""

from dataclasses import dataclass


@dataclass(slots=True)
class Pulse:
    """Attributes: busy_since: when the last turn ended, or work came to a loop at rest; None: it rests."""

    busy_since: float | None = None

    def woken(self, now: float) -> None:
        """A turn begins."""
        if self.busy_since is None:
            self.busy_since = now

    def turned(self, now: float, *, idle: bool) -> None:
        """A turn has ended. `idle`: nothing is at hand, and no step is under way."""
        self.busy_since = None if idle else now

    def stalled(self, now: float, seconds: float) -> bool:
        """Work is at hand, or a step under way, and nothing was completed for so many seconds."""
        return self.busy_since is not None and now - self.busy_since > seconds
