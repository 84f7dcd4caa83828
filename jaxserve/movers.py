"""The drivers of all connectors, as one.

A driver never raises for one move. One that raises all the same is broken: it is closed, its moves are
answered as failed, and the engine goes on without it.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kv.driver import Driver, Region
from kv.moves import Command, Event, LeaseTerms, Load, Loaded, Safe, Store, Stored
from scheduler.types import Request

logger = logging.getLogger("jaxserve")

Seal = Callable[[LeaseTerms, Request], Mapping[str, Any]]


class Movers:
    """Hands each command to its connector's driver, and gathers what the drivers answer.

    Used by the engine loop's thread, but for `wake`, which any driver may call at any time.

    Attributes:
        kinds: class of each leaf connector, by its index in commands.
    """

    def __init__(self, kinds: Sequence[str] = ()) -> None:
        self.kinds = tuple(kinds)
        self._drivers: dict[int, Driver] = {}
        self._seal: Seal | None = None
        self._listener: Callable[[], None] | None = None
        self._under_way: dict[int, Load | Store] = {}
        self._unanswered: dict[int, Load | Store] = {}
        self._unsafe: dict[int, int] = {}
        """Connector of each load that has failed and whose targets may still be written."""
        self._answers: list[Event] = []
        """To moves of broken drivers."""

    def wake(self) -> None:
        """A driver has something to tell."""
        if self._listener is not None:
            self._listener()

    def add(self, index: int, driver: Driver) -> None:
        """One more driver; drivers are made with this object's `wake`."""
        self._drivers[index] = driver

    def sealed_by(self, seal: Seal) -> None:
        """How a lease's terms become the `kv_transfer_params` of an answer."""
        self._seal = seal

    def begin(self, listener: Callable[[], None]) -> None:
        """From now on `listener` is called whenever there is something to poll."""
        self._listener = listener

    def start(self, commands: Sequence[Command]) -> None:
        """Begins moves."""
        if not commands:
            return
        for command in commands:
            if isinstance(command, Load | Store):
                self._under_way[command.move_id] = self._unanswered[command.move_id] = command
        for index in dict.fromkeys(command.connector for command in commands):
            mine = [command for command in commands if command.connector == index]
            driver = self._drivers.get(index)
            if driver is None:
                self._answer_for(index, safe=True)
                continue
            try:
                driver.start(mine)
            except Exception:
                self._broken(index, driver)

    def poll(self) -> list[Event]:
        """What happened since the last call."""
        events, self._answers = self._answers, []
        for index, driver in tuple(self._drivers.items()):
            try:
                events += driver.poll()
            except Exception:
                self._broken(index, driver)
        answers, self._answers = self._answers, []
        for event in events:
            self._follow(event)
        return events + answers

    def ended(self, move_id: int) -> Load | Store | None:
        """The command of a move that has ended; asked once per move. None: it is unknown."""
        return self._under_way.pop(move_id, None)

    def pool_moved(self, regions: Sequence[Region]) -> None:
        """The page buffer lies elsewhere."""
        for index, driver in tuple(self._drivers.items()):
            try:
                driver.pool_moved(regions)
            except Exception:
                self._broken(index, driver)

    def params(self, terms: LeaseTerms, request: Request) -> Mapping[str, Any] | None:
        """A lease as its client is told of it."""
        return None if self._seal is None else self._seal(terms, request)

    def close(self) -> None:
        """Ends all moves."""
        for driver in self._drivers.values():
            try:
                driver.close()
            except Exception:
                logger.exception("a driver could not be closed")

    def _follow(self, event: Event) -> None:
        match event:
            case Loaded() | Stored():
                command = self._unanswered.pop(event.move_id, None)
                if isinstance(event, Loaded) and command is not None and not event.safe:
                    self._unsafe[event.move_id] = command.connector
            case Safe():
                self._unsafe.pop(event.move_id, None)
            case _:
                pass

    def _broken(self, index: int, driver: Driver) -> None:
        """A driver has raised: nothing more is asked of it. Once it is closed, it touches no page."""
        logger.exception("the driver of %s has failed; it is closed, and moves of it fail", self.kinds[index])
        del self._drivers[index]
        safe = True
        try:
            driver.close()
        except Exception:
            logger.exception("the broken driver could not be closed: its pages stay in quarantine")
            safe = False
        self._answer_for(index, safe=safe)

    def _answer_for(self, index: int, *, safe: bool) -> None:
        """Answers every move of a connector without a driver as failed."""
        error = f"{self.kinds[index]} has failed"
        for move_id, command in tuple(self._unanswered.items()):
            if command.connector != index:
                continue
            del self._unanswered[move_id]
            if isinstance(command, Store):
                self._answers.append(Stored(move_id=move_id, error=error))
                continue
            self._answers.append(Loaded(move_id=move_id, num_pages=0, safe=safe, error=error))
            if not safe:
                self._unsafe[move_id] = index
        if safe:
            over = [move_id for move_id, connector in self._unsafe.items() if connector == index]
            for move_id in over:
                del self._unsafe[move_id]
                self._answers.append(Safe(move_id=move_id))
        if self._answers:
            self.wake()
