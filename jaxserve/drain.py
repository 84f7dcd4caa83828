"""How an engine ends: it finishes what it took in, and keeps what peers were promised until it is read.

Pure: a moment and two counts in, what to do next out. Who drains an engine waits and acts: `Engine.drain` on
an event loop, the simulator by events.
"""

from dataclasses import dataclass

LEASE_LOOK_S = 0.05
"""Between looks at whether peers have read what they were promised."""

TELL_S = 5.0
"""For telling requests that they were aborted, once their time is over."""

GRAIN_S = 0.001
"""The shortest wait: it must not be lost in the rounding of a clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Await:
    """Look again later.

    Attributes:
        seconds: after so many at the latest.
        requests: requests are waited for: once the last one has ended, look at once.
    """

    seconds: float
    requests: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortAll:
    """End every request that lives, and look again at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """Nothing is waited for any more."""


Order = Await | AbortAll | Close


@dataclass(slots=True, kw_only=True)
class Drain:
    """An engine that was asked to end and takes no more requests.

    Attributes:
        until: by the engine's clock: requests may run and leases be read until then.
        tell_until: requests were aborted, and are told until then; None: none was.
    """

    until: float
    tell_until: float | None = None

    @property
    def ends_by(self) -> float:
        """By the engine's clock: it closes until then, or as soon afterwards as it is looked at."""
        return self.until + TELL_S if self.tell_until is None else self.tell_until

    def look(self, now: float, *, live: int, leases: int) -> Order:
        """What to do next.

        Args:
            now: by the engine's clock.
            live: requests that have not ended.
            leases: leases that peers have not read; count them after `live`, since a request that ends may
                leave one.
        """
        if live:
            until = self.until if self.tell_until is None else self.tell_until
            if now < until:
                return Await(seconds=max(until - now, GRAIN_S), requests=True)
            if self.tell_until is None:
                self.tell_until = now + TELL_S
                return AbortAll()
        elif leases and self.tell_until is None and now < self.until:
            return Await(seconds=max(min(LEASE_LOOK_S, self.until - now), GRAIN_S), requests=False)
        return Close()
