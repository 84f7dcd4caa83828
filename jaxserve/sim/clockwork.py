"""Virtual time, one queue of events, one source of chance: everything in a simulation happens through here.

The same seed gives the same events in the same order, in any process; the trace hash shows it.
"""

import hashlib
import heapq
import random
from collections import deque
from collections.abc import Callable
from typing import Protocol

LAST_EVENTS = 40


class Owner(Protocol):
    """Whose event it is: events of the dead never happen, those of the paused happen when they go on."""

    alive: bool
    paused: bool


class Timer:
    """An event to come. Attributes: cancelled: it will not happen."""

    __slots__ = ("action", "at", "cancelled", "label", "owner")

    def __init__(self, at: float, label: str, action: Callable[[], None], owner: Owner | None) -> None:
        self.at, self.label, self.action, self.owner = at, label, action, owner
        self.cancelled = False


class Clockwork:
    """Attributes:
    now: seconds of virtual time.
    chance: the only source of randomness.
    events: how many have happened.
    last: the labels of the last few, for whoever must explain a failure.
    """

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.chance = random.Random(seed)
        self.events = 0
        self.last: deque[str] = deque(maxlen=LAST_EVENTS)
        self._count = 0
        self._queue: list[tuple[float, int, Timer]] = []
        self._held: list[Timer] = []
        self._trace = hashlib.blake2b(digest_size=16)

    def after(
        self, delay: float, label: str, action: Callable[[], None], owner: Owner | None = None
    ) -> Timer:
        """Something will happen in `delay` seconds."""
        timer = Timer(self.now + max(0.0, delay), label, action, owner)
        self._push(timer)
        return timer

    def run_one(self) -> bool:
        """The next event. False: there is none."""
        while self._queue:
            at, _, timer = heapq.heappop(self._queue)
            owner = timer.owner
            if timer.cancelled or (owner is not None and not owner.alive):
                continue
            if owner is not None and owner.paused:
                self._held.append(timer)
                continue
            self.now = max(self.now, at)
            self.events += 1
            timer.cancelled = True
            self.note(timer.label)
            self.last.append(f"{self.now:12.6f} {timer.label}")
            timer.action()
            return True
        return False

    def resume(self, owner: Owner) -> None:
        """What was held back of an owner's events happens now, in its order."""
        held, self._held = self._held, []
        for timer in held:
            if timer.owner is owner:
                timer.at = self.now
                self._push(timer)
            else:
                self._held.append(timer)

    @property
    def coming_s(self) -> float:
        """Until the last event of a living owner that is known now."""
        coming = [
            at
            for at, _, timer in self._queue
            if timer.owner is not None and timer.owner.alive and not timer.cancelled
        ]
        return max(coming, default=self.now) - self.now

    def note(self, what: str) -> None:
        """Enters something in the trace."""
        self._trace.update(f"{self.now!r} {what}\n".encode())

    @property
    def trace(self) -> str:
        """Hash of everything that has happened, in hex."""
        return self._trace.hexdigest()

    def happens(self, rate: float) -> bool:
        """True with probability `rate`."""
        return rate > 0.0 and self.chance.random() < rate

    def _push(self, timer: Timer) -> None:
        self._count += 1
        heapq.heappush(self._queue, (timer.at, self._count, timer))
