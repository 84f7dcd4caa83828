"""Where the loop hands in commands for transfers and takes their events, and the rounds in between.

The loop calls `start` and `poll`; whoever carries transfers calls `round` and `end`: a thread of a server,
or the simulator. The lock is an argument, since only the former needs one.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from kv.moves import Command, Event, Load, Loaded, Safe
from kv.transfers import Transfers


class Desk:
    """Commands in, events out; every load is answered, also when transfers come to an end.

    Attributes:
        ended: transfers carry nothing any more.
    """

    def __init__(self, transfers: Transfers, *, lock: AbstractContextManager[Any]) -> None:
        self._transfers = transfers
        self._lock = lock
        self._commands: list[Command] = []
        self._events: deque[Event] = deque()
        self._open: dict[int, bool] = {}  # loads not answered (True), or answered and not yet safe
        self.ended = False

    # The loop's side.

    def start(self, commands: Sequence[Command]) -> None:
        """Takes commands; does not wait for them."""
        with self._lock:
            self._commands += commands
            if self.ended:
                self._answer_all()

    def poll(self) -> list[Event]:
        """What has happened since the last call."""
        return [self._events.popleft() for _ in range(len(self._events))]

    # The side of whoever carries transfers.

    def round(self, now: Callable[[], float]) -> tuple[bool, bool]:
        """One round: hears peers, begins what was commanded, moves everything on.

        Peers are heard before the commands are taken: see `Transfers.hear`.

        Returns:
            whether something happened, and whether there are events to poll.
        """
        self._transfers.hear()
        with self._lock:
            commands, self._commands = self._commands, []
        self._note(commands, ())
        at = now()
        if commands:
            self._transfers.start(commands, at)
        events = self._transfers.poll(at)
        self._note((), events)
        self._events.extend(events)
        return bool(events or commands), bool(events)

    def end(self) -> None:
        """Closes transfers, and fails every load. Nothing can write any more: the agents are deleted."""
        self._transfers.close()
        with self._lock:
            self.ended = True
            self._answer_all()

    def _answer_all(self) -> None:
        self._note(self._commands, ())
        self._commands.clear()
        for move_id, unanswered in self._open.items():
            lost = Loaded(move_id=move_id, num_pages=0, error="transfers have ended", stage="transfer")
            self._events.append(lost if unanswered else Safe(move_id=move_id))
        self._open.clear()

    def _note(self, commands: Sequence[Command], events: Sequence[Event]) -> None:
        self._open.update({command.move_id: True for command in commands if isinstance(command, Load)})
        for event in events:
            if isinstance(event, Loaded | Safe):
                self._open.pop(event.move_id, None)
            if isinstance(event, Loaded) and not event.safe:
                self._open[event.move_id] = False
