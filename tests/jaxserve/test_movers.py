"""A driver that breaks costs its own moves, never the engine or another driver's."""

from jaxserve.movers import Movers
from kv.config import NIXL, SIMPLE_CPU
from kv.moves import HostSource, Lease, Load, Loaded, Safe, Store, Stored


class Broken(RuntimeError):
    pass


class FakeDriver:
    """Raises from the named methods; else tells what it was given to tell."""

    def __init__(self, *raises: str) -> None:
        self.raises = set(raises)
        self.started: list = []
        self.events: list = []
        self.closed = 0

    def _enter(self, name: str) -> None:
        if name in self.raises:
            raise Broken(name)

    def start(self, commands) -> None:
        self._enter("start")
        self.started += commands

    def poll(self):
        self._enter("poll")
        events, self.events = self.events, []
        return events

    def pool_moved(self, regions) -> None:
        self._enter("pool_moved")

    def close(self) -> None:
        self.closed += 1
        self._enter("close")


def load(move_id: int, connector: int = 0) -> Load:
    return Load(
        move_id=move_id, connector=connector, request_id="a", first_page=0, pages=((1, 2),), num_tokens=8,
        source=HostSource(slots=((1, 2),)),
    )  # fmt: skip


def store(move_id: int, connector: int = 0) -> Store:
    return Store(move_id=move_id, connector=connector, pages=(3,), slots=(3,))


def lease(move_id: int, connector: int = 0) -> Lease:
    return Lease(
        move_id=move_id, connector=connector, request_id="a", pages=((1,),), generations=((1,),), num_tokens=4
    )


def movers(*drivers: FakeDriver) -> tuple[Movers, list[int]]:
    made, wakes = Movers((NIXL, SIMPLE_CPU)[: len(drivers)]), []
    for index, driver in enumerate(drivers):
        made.add(index, driver)
    made.begin(lambda: wakes.append(1))
    return made, wakes


def test_commands_go_to_their_drivers_in_order_and_answers_come_from_all():
    first, second = FakeDriver(), FakeDriver()
    made, wakes = movers(first, second)
    made.start([store(1, 1), load(2), store(3, 1), lease(4)])
    assert [command.move_id for command in first.started] == [2, 4]
    assert [command.move_id for command in second.started] == [1, 3]
    first.events, second.events = [Loaded(move_id=2, num_pages=2)], [Stored(move_id=1)]
    assert made.poll() == [Loaded(move_id=2, num_pages=2), Stored(move_id=1)]
    assert made.poll() == [] and not wakes
    assert made.ended(2) == load(2) and made.ended(2) is None and made.ended(99) is None


def test_a_driver_that_raises_in_start_is_closed_and_its_moves_fail():
    broken, sound = FakeDriver("start"), FakeDriver()
    made, wakes = movers(broken, sound)
    made.start([load(1), store(2), lease(3), store(4, 1)])
    assert wakes and broken.closed == 1 and [command.move_id for command in sound.started] == [4]
    events = {event.move_id: event for event in made.poll()}
    assert set(events) == {1, 2}
    assert events[1].num_pages == 0 and events[1].safe and "NixlConnector" in events[1].error
    assert events[2].error is not None
    assert made.ended(1) == load(1) and made.ended(2) == store(2)
    made.start([load(5), store(6, 1)])  # nobody is there for 5: it fails at once
    assert [(event.move_id, event.num_pages) for event in made.poll()] == [(5, 0)]
    assert [command.move_id for command in sound.started] == [4, 6] and broken.closed == 1


def test_a_driver_that_raises_in_poll_loses_no_answer_of_another():
    sound, broken = FakeDriver(), FakeDriver()
    made, _ = movers(sound, broken)
    made.start([load(1), load(2, 1), load(3, 1)])
    broken.events = [Loaded(move_id=3, num_pages=2)]
    made.poll()
    sound.events = [Loaded(move_id=1, num_pages=2)]
    broken.raises.add("poll")
    events = made.poll()
    assert [(event.move_id, event.num_pages) for event in events] == [(1, 2), (2, 0)]
    assert broken.closed == 1 and made.poll() == []


def test_moves_stay_in_quarantine_when_a_broken_driver_cannot_be_closed():
    broken = FakeDriver("poll", "close")
    made, _ = movers(broken)
    made.start([load(1), store(2)])
    events = {event.move_id: event for event in made.poll()}
    assert not events[1].safe and events[2].error is not None
    assert made.poll() == []
    made.close()
    assert broken.closed == 1


def test_what_was_in_quarantine_is_safe_once_the_broken_driver_is_closed():
    driver = FakeDriver()
    made, _ = movers(driver)
    made.start([load(1), load(2)])
    driver.events = [Loaded(move_id=number, num_pages=0, safe=False, error="no answer") for number in (1, 2)]
    made.poll()
    driver.events = [Safe(move_id=2)]
    made.poll()
    driver.raises.add("pool_moved")
    made.pool_moved(())
    assert made.poll() == [Safe(move_id=1)]


def test_closing_closes_every_driver_even_if_one_raises():
    broken, sound = FakeDriver("close"), FakeDriver()
    made, _ = movers(broken, sound)
    made.close()
    assert broken.closed == sound.closed == 1
