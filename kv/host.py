"""The host tier's driver: copies pages between the pool and one region of host memory, beside the step.

Commands wait in two queues, loads before stores, each in the order of submission. Long moves are cut into
pieces, so that a load need not wait for a long store, and so that a pool that moves need not wait for either.
"""

import logging
import mmap
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from kv.copies import runs
from kv.driver import Clock, PageCopies, Region
from kv.moves import Command, Event, HostSource, Load, Loaded, Store, Stored
from kv.tier import NO_SLOT
from kv.types import DUMMY_PAGE
from kv.unexpected import MISTAKES

_log = logging.getLogger("jaxserve.transfers")

PAGES_PER_PIECE = 32
"""Pages copied before the queues are looked at again."""

NICE = 5
"""Added to the copying threads' niceness (Linux): decode steps come first where cores are short."""

Digest = Callable[[np.ndarray], Sequence[bytes]]
"""Digests of pages, uint8 `[n, page_bytes]`."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Move:
    """A command under way.

    Attributes:
        parts: (position, pool page, host slot) of each page to copy, by position.
        done: parts that have been copied.
        seconds: spent copying.
    """

    command: Load | Store
    parts: list[tuple[int, int, int]]
    done: int = 0
    seconds: float = 0.0


class _Rejected(Exception):
    """A page in host memory is not what was stored there. Attributes: part: index of the move's part."""

    def __init__(self, part: int) -> None:
        super().__init__("a page in host memory is not what was stored there")
        self.part = part


class HostDriver:
    """Carries out the stores and loads of one host tier.

    Attributes:
        memory: uint8 `[num_slots, page_bytes]`, page-aligned; slot `s` is row `s - 1`. Reserved at once,
            not rounded up, and touched only when a slot is first stored to, which then costs more.
    """

    def __init__(
        self,
        num_slots: int,
        page_bytes: int,
        copies: PageCopies,
        *,
        wake: Callable[[], None],
        clock: Clock,
        threads: int = 1,
        executor: Callable[[Callable[[], None]], None] | None = None,
        digest: Digest | None = None,
    ) -> None:
        """Starts the copying threads.

        Args:
            copies: this driver's own; it is told when the pool moves.
            wake: called from a copying thread.
            executor: takes a callable that carries out what waits, and calls it now or later; then there are
                no threads.
            digest: checked at each load against what was stored.

        Raises:
            ValueError: the memory cannot be reserved.
        """
        self.memory = _reserve(num_slots, page_bytes)
        self._copies = copies
        self._wake = wake
        self._clock = clock
        self._executor = executor
        self._digest = digest
        self._digests: list[bytes | None] = [None] * num_slots
        self._changed = threading.Condition()
        self._queues: tuple[deque[_Move], deque[_Move]] = (deque(), deque())
        self._events: deque[Event] = deque()
        self._copying = 0
        self._void: str | None = None
        self._life = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"host-tier-{number}", daemon=True)
            for number in range(threads if executor is None else 0)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, commands: Sequence[Command]) -> None:
        """Queues stores and loads. One that cannot be done is answered at once."""
        answered = False
        with self._changed:
            for command in commands:
                if not isinstance(command, Load | Store):
                    continue
                move = _Move(command=command, parts=[])
                error = self._void
                if error is None:
                    try:
                        move.parts = self._parts(command)
                    except ValueError as wrong:
                        error = str(wrong)
                if error is None:
                    self._queues[isinstance(command, Store)].append(move)
                else:
                    self._events.append(_failed(move, error))
                    answered = True
            self._changed.notify_all()
        if answered:
            self._wake()
        if self._executor is not None:
            self._executor(self._drain)

    def poll(self) -> list[Event]:
        """What has ended since the last call."""
        with self._changed:
            events = list(self._events)
            self._events.clear()
        return events

    def pool_moved(self, regions: Sequence[Region]) -> None:
        """Fails what is under way, waits until nobody copies, and goes on with the new region."""
        with self._changed:
            self._fail_all("the page buffer has moved")
            self._copies.pool_moved(regions)
        self._wake()

    def close(self) -> None:
        """Fails what is under way, waits until nobody copies, and ends the threads."""
        with self._changed:
            self._void = "the host tier is closed"
            self._fail_all(self._void)
        for thread in self._threads:
            thread.join()

    def _fail_all(self, error: str) -> None:
        """Answers what waits and, by its life, what is being copied. Called with the lock; waits."""
        self._life += 1
        for queue in self._queues:
            self._events.extend(_failed(move, error) for move in queue)
            queue.clear()
        self._changed.notify_all()
        self._changed.wait_for(lambda: self._copying == 0)

    def _parts(self, command: Load | Store) -> list[tuple[int, int, int]]:
        """Raises: ValueError: the command names slots that do not exist, or none where one is needed."""
        if isinstance(command, Store):
            pages, slots = (command.pages,), (command.slots,)
        elif isinstance(command.source, HostSource):
            pages, slots = command.pages, command.source.slots
        else:
            raise ValueError("a host tier cannot load from a peer")
        if len(pages) != len(slots) or len({len(group) for group in (*pages, *slots)}) > 1:
            raise ValueError("pages and host slots are not aligned")
        columns = [
            zip(range(len(group)), group, rows, strict=True) for group, rows in zip(pages, slots, strict=True)
        ]
        parts = [part for row in zip(*columns, strict=True) for part in row if part[1] != DUMMY_PAGE]
        wrong = next((slot for _, _, slot in parts if not NO_SLOT < slot <= len(self.memory)), None)
        if wrong is not None:
            raise ValueError(f"host slot {wrong} does not exist: there are {len(self.memory)}, from 1 on")
        return parts

    def _work(self) -> None:
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._void is not None or any(self._queues))
                if self._void is not None:
                    return
            self._copy_piece()

    def _drain(self) -> None:
        while self._copy_piece():
            pass

    def _copy_piece(self) -> bool:
        """Copies a piece of the move that is next. False: there is none."""
        with self._changed:
            queue = next((queue for queue in self._queues if queue), None)
            if queue is None:
                return False
            move, life = queue.popleft(), self._life
            self._copying += 1
        event = self._piece(move)
        with self._changed:
            self._copying -= 1
            if life != self._life:
                event = _failed(move, self._void or "the page buffer has moved")
            if event is None:
                queue.appendleft(move)
            else:
                self._events.append(event)
            self._changed.notify_all()
        if event is not None:
            self._wake()
        return True

    def _piece(self, move: _Move) -> Event | None:
        """Copies the next pages of a move. None: there is more to do."""
        began = self._clock()
        first = move.done
        parts = move.parts[first : first + PAGES_PER_PIECE]
        pages = [page for _, page, _ in parts]
        rows = [slot - 1 for _, _, slot in parts]
        error: Exception | None = None
        try:
            for low, high in runs(rows):
                memory = self.memory[rows[low] : rows[low] + high - low]
                if isinstance(move.command, Store):
                    self._read(pages[low:high], memory, rows[low])
                else:
                    self._write(pages[low:high], memory, rows[low], first + low)
                move.done = first + high
        except Exception as caught:  # whatever a device says, it is this move's end and nobody else's
            error = caught
        move.seconds += self._clock() - began
        if isinstance(error, _Rejected):
            move.done = error.part
            return _failed(move, str(error), arrived=move.done, stage="verify", digest_failures=1)
        if error is not None:
            if isinstance(error, MISTAKES):
                _log.error("a copy failed on a mistake of ours", exc_info=error)
            return _failed(move, f"{type(error).__name__}: {error}", arrived=move.done)
        return None if move.done < len(move.parts) else self._ended(move)

    def _read(self, pages: Sequence[int], memory: np.ndarray, row: int) -> None:
        self._digests[row : row + len(pages)] = [None] * len(pages)
        self._copies.read(pages, memory)
        if self._digest is not None:
            self._digests[row : row + len(pages)] = self._digest(memory)

    def _write(self, pages: Sequence[int], memory: np.ndarray, row: int, part: int) -> None:
        """Raises: _Rejected: after the pages before the one that is not good have been copied."""
        good = len(pages)
        if self._digest is not None:
            for index, digest in enumerate(self._digest(memory)):
                if digest != self._digests[row + index]:
                    good = index
                    break
        if good:
            self._copies.write(pages[:good], memory[:good])
        if good < len(pages):
            raise _Rejected(part + good)

    def _ended(self, move: _Move) -> Event:
        num_bytes = move.done * self.memory.shape[1]
        if isinstance(move.command, Store):
            return Stored(move_id=move.command.move_id, num_bytes=num_bytes, seconds=move.seconds)
        return Loaded(
            move_id=move.command.move_id,
            num_pages=len(move.command.pages[0]),
            num_bytes=num_bytes,
            num_descriptors=move.done,
            seconds=move.seconds,
        )


def _failed(
    move: _Move, error: str, *, arrived: int = 0, stage: str = "transfer", digest_failures: int = 0
) -> Event:
    """A move's end without success. Args: arrived: leading parts whose pages hold what they should."""
    if isinstance(move.command, Store):
        return Stored(move_id=move.command.move_id, error=error, seconds=move.seconds)
    return Loaded(
        move_id=move.command.move_id,
        num_pages=move.parts[arrived][0] if arrived else 0,
        error=error,
        stage=stage,
        seconds=move.seconds,
        digest_failures=digest_failures,
    )


def _reserve(num_slots: int, page_bytes: int) -> np.ndarray:
    """Page-aligned anonymous memory, uint8 `[num_slots, page_bytes]`; lives as long as the array."""
    try:
        if sys.platform == "linux":
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            region = mmap.mmap(-1, num_slots * page_bytes, flags=flags)
            with suppress(OSError):  # a kernel without huge pages
                region.madvise(mmap.MADV_HUGEPAGE)  # fewer faults at the first touch
        else:
            region = mmap.mmap(-1, num_slots * page_bytes)
    except (OSError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{num_slots} host pages of {page_bytes} bytes cannot be reserved: {error}"
        ) from None
    return np.frombuffer(region, np.uint8).reshape(num_slots, page_bytes)
