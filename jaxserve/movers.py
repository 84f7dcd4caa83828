"""The drivers of all connectors, as one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kv.driver import Driver, Region
from kv.moves import Command, Event, LeaseTerms, Load, Store
from scheduler.types import Request

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
                self._under_way[command.move_id] = command
        for index, driver in self._drivers.items():
            mine = [command for command in commands if command.connector == index]
            if mine:
                driver.start(mine)

    def poll(self) -> list[Event]:
        """What happened since the last call."""
        return [event for driver in self._drivers.values() for event in driver.poll()]

    def ended(self, move_id: int) -> Load | Store | None:
        """The command of a move that has ended; asked once per move. None: it is unknown."""
        return self._under_way.pop(move_id, None)

    def pool_moved(self, regions: Sequence[Region]) -> None:
        """The page buffer lies elsewhere."""
        for driver in self._drivers.values():
            driver.pool_moved(regions)

    def params(self, terms: LeaseTerms, request: Request) -> Mapping[str, Any] | None:
        """A lease as its client is told of it."""
        return None if self._seal is None else self._seal(terms, request)

    def close(self) -> None:
        """Ends all moves."""
        for driver in self._drivers.values():
            driver.close()
