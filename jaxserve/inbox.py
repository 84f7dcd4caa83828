"""What other threads tell the engine loop, and what they may ask about it. The only lock of the engine."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from jaxserve.outputs import EngineError, QueueFull
from jaxserve.sequence import LiveRequest
from metrics.counts import LabelledCounts


@dataclass(slots=True, kw_only=True, eq=False)
class Arrived:
    """What came since the loop looked last."""

    requests: deque[LiveRequest] = field(default_factory=deque)
    aborts: deque[str] = field(default_factory=deque)
    resets: list[Callable[[], None]] = field(default_factory=list)
    looks: list[Callable[[], None]] = field(default_factory=list)
    reset_external: bool = False
    nudged: bool = False
    closing: bool = False

    def __bool__(self) -> bool:
        return bool(self.requests or self.aborts or self.resets or self.looks or self.nudged or self.closing)


class Inbox:
    """Usable from any thread; `collect`, `admit` and `forget` belong to the loop's."""

    def __init__(self, *, max_num_queued_reqs: int, rejections: LabelledCounts) -> None:
        self._max_queued = max_num_queued_reqs
        self._arrived = Arrived()
        self._changed = threading.Condition()
        self._live: dict[str, LiveRequest] = {}
        self._queued = 0
        self._open = True
        self.rejections = rejections

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        with self._changed:
            return len(self._live)

    @property
    def num_queued(self) -> int:
        """Requests that have never had a slot."""
        with self._changed:
            return self._queued

    @property
    def has_news(self) -> bool:
        """`collect` would return something."""
        with self._changed:
            return bool(self._arrived)

    def submit(self, live: LiveRequest) -> None:
        """Takes a request in.

        Raises:
            QueueFull: too many requests wait.
            EngineError: the loop has ended or takes nothing more.
        """
        request_id = live.request.request_id
        with self._changed:
            if not self._open:
                raise EngineError("the engine is not running")
            if request_id in self._live:
                raise EngineError(f"request id {request_id} is in use")
            self._check_room()
            self._queued += 1
            self._live[request_id] = live
            self._arrived.requests.append(live)
            self._changed.notify_all()

    def check_room(self) -> None:
        """Spares a request that could only be refused the work of getting as far as `submit`.

        Raises:
            QueueFull: too many requests wait.
        """
        with self._changed:
            self._check_room()

    def _check_room(self) -> None:
        """With the lock held."""
        if self._queued >= self._max_queued:
            self.rejections = self.rejections.add("max_num_queued_reqs")
            raise QueueFull(f"{self._queued} requests are waiting (--max-num-queued-reqs)")

    def abort(self, request_id: str) -> None:
        """Ends a request wherever it is. Unknown ids are ignored: it ended before."""
        with self._changed:
            self._arrived.aborts.append(request_id)
            self._changed.notify_all()

    def abort_all(self) -> None:
        """Ends every request."""
        with self._changed:
            self._arrived.aborts.extend(self._live)
            self._changed.notify_all()

    def reset_prefix_cache(self, done: Callable[[], None], *, external: bool = False) -> None:
        """Forgets cached prefixes before the next step, with `external` those of host tiers too; then `done`
        is called on the loop's thread.

        Raises:
            EngineError: the loop has ended.
        """
        with self._changed:
            if not self._open:
                raise EngineError("the engine is not running")
            self._arrived.resets.append(done)
            self._arrived.reset_external = self._arrived.reset_external or external
            self._changed.notify_all()

    def look(self, done: Callable[[], None]) -> None:
        """Asks for a step: after it `done` is called on the loop's thread; never, if the loop has ended."""
        with self._changed:
            self._arrived.looks.append(done)
            self._changed.notify_all()

    def shut(self) -> None:
        """Takes no more requests; what lives goes on."""
        with self._changed:
            self._open = False

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Waits until no request lives. False: some were left after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._live, timeout_s)

    def close(self) -> None:
        """Tells the loop to end."""
        with self._changed:
            self._open = False
            self._arrived.closing = True
            self._changed.notify_all()

    def nudge(self) -> None:
        """Something happened to a move: the loop should look."""
        with self._changed:
            if not self._arrived.nudged:
                self._arrived.nudged = True
                self._changed.notify_all()

    def collect(self, *, block: bool, timeout_s: float | None = None) -> Arrived:
        """What arrived since the last call; with `block`, waits until something has, at most `timeout_s`."""
        with self._changed:
            if block:
                self._changed.wait_for(lambda: bool(self._arrived), timeout_s)
            arrived, self._arrived = self._arrived, Arrived()
        return arrived

    def live(self, request_id: str) -> LiveRequest | None:
        """A request that has not ended."""
        return self._live.get(request_id)

    def leave_queue(self, live: LiveRequest) -> None:
        """The request got its first slot, or ended without one."""
        if not live.admitted:
            live.admitted = True
            with self._changed:
                self._queued -= 1

    def forget(self, live: LiveRequest) -> None:
        """The request has ended and been told so."""
        self.leave_queue(live)
        with self._changed:
            self._live.pop(live.request.request_id, None)
            self._changed.notify_all()

    def end(self) -> list[LiveRequest]:
        """The loop is over: takes nothing more; returns the requests that nobody has told."""
        with self._changed:
            self._open = False
            left = list(self._live.values())
            self._live.clear()
            self._arrived = Arrived()
            self._changed.notify_all()
        return left
