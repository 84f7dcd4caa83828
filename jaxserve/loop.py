"""The engine loop: one thread that gives an engine's core its turns, and the engine's only clock.

An idle loop sleeps on a condition until something arrives.
"""

import logging
import threading
import time
from collections.abc import Callable

from jaxserve.core import DeviceDriver, EngineCore, Recorder
from jaxserve.inbox import Inbox
from jaxserve.movers import Movers
from jaxserve.pulse import Pulse
from jaxserve.sequence import Sink
from jaxserve.text import Tokenizer
from metrics.engine import EngineStats
from metrics.log_line import format_log_line, was_busy
from metrics.moves import MoveStats
from scheduler.types import Limits, Request, SchedulerConfig

logger = logging.getLogger("jaxserve")

LOG_INTERVAL_S = 10.0


class EngineLoop:
    """Turns a core until it is closed."""

    def __init__(
        self,
        config: SchedulerConfig,
        limits: Limits,
        device: DeviceDriver,
        tokenizer: Tokenizer,
        *,
        max_num_queued_reqs: int,
        movers: Movers | None = None,
        recorder: Recorder | None = None,
        log_stats: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = EngineCore(
            config,
            limits,
            device,
            tokenizer,
            max_num_queued_reqs=max_num_queued_reqs,
            clock=clock,
            movers=movers,
            recorder=recorder,
        )
        self._clock = clock
        self._pulse = Pulse()
        self._logged = (clock(), self._core.stats)
        self._log_stats = log_stats
        self._thread = threading.Thread(target=self._run, name="jaxserve-engine", daemon=True)
        self._thread.start()

    @property
    def inbox(self) -> Inbox:
        """How other threads talk to it."""
        return self._core.inbox

    @property
    def alive(self) -> bool:
        """The loop's thread runs."""
        return self._thread.is_alive()

    @property
    def stats(self) -> EngineStats:
        """A snapshot of everything counted so far."""
        return self._core.stats

    def stalled(self, seconds: float) -> bool:
        """Work is at hand, but no step was completed for that long."""
        return self._pulse.stalled(self._clock(), seconds)

    @property
    def move_stats(self) -> MoveStats:
        """What was counted of moves."""
        return self._core.move_stats

    @property
    def num_leases(self) -> int:
        """Leases that peers have not read yet."""
        return self._core.num_leases

    def submit(self, request: Request, sink: Sink) -> None:
        """Takes a request in; its deltas go to `sink`, on the loop's thread.

        Raises:
            RequestRefused: it can never run.
            QueueFull: too many requests wait.
            EngineError: the loop has ended or is being closed.
        """
        self._core.submit(request, sink)

    def close(self, timeout_s: float = 10.0) -> None:
        """Ends what lives with an error, and the thread."""
        self.inbox.close()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        core = self._core
        try:
            while True:
                arrived = self.inbox.collect(block=core.idle, timeout_s=core.pause)
                if arrived.closing:
                    break
                self._pulse.woken(self._clock())
                core.turn(arrived)
                now = self._clock()
                self._pulse.turned(now, idle=core.idle)
                self._maybe_log(now)
        except BaseException:
            logger.exception("the engine loop has ended")
        finally:
            core.close()

    def _maybe_log(self, now: float) -> None:
        since, before = self._logged
        if now - since < LOG_INTERVAL_S:
            return
        stats = self.stats
        if self._log_stats and was_busy(before, stats):
            logger.info("%s", format_log_line(before, stats, now - since))
        self._logged = (now, stats)
