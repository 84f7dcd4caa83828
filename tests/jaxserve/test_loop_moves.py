"""The loop among moves, with a device and drivers made of nothing: when it sleeps, and what wakes it."""

import threading
from collections.abc import Callable

import numpy as np
import pytest

from jaxserve.dispatch import Executed
from jaxserve.loop import EngineLoop
from jaxserve.movers import Movers
from jaxserve.outputs import Delta
from kv.config import NIXL, ConnectorConfig
from kv.driver import Region
from kv.moves import Load, Loaded, RemoteSource
from scheduler.types import Limits, Outcome, Request, SamplingParams, SchedulerConfig

LIMITS = Limits(max_num_batched_tokens=16, max_num_seqs=4)
DEADLINE_S = 10.0


class NoTokenizer:
    """Requests here want no text."""

    special_ids = frozenset[int]()
    strips_leading_space = False

    def token_bytes(self, token_id: int) -> bytes:
        return b"x"

    def __getattr__(self, name: str):
        raise AssertionError(f"the tokenizer was asked for {name}")


class FakeDevice:
    """Fails every step, so that no text is needed, unless it is never asked to run one."""

    def __init__(self) -> None:
        self.moved = False
        self.calls: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def start(self, plan, setups, spans):
        self.calls.append("start")
        return plan

    def wait(self, pending):
        self.gate.wait(DEADLINE_S)
        self.moved = True
        outcome = Outcome(step_id=pending.step_id, tokens=np.zeros(0, np.int32), error="the device is gone")
        return Executed(outcome=outcome, sampled=None)

    def pool_changed(self) -> bool:
        moved, self.moved = self.moved, False
        return moved

    def regions(self):
        return (Region(address=4096, page_bytes=64, num_pages=20),)


class FakeDriver:
    """Notes what it is told; answers what a test puts into `events`."""

    def __init__(self, log: list[str], wake: Callable[[], None]) -> None:
        self.log, self.wake = log, wake
        self.events: list = []
        self.commands: list = []
        self.raises = ""
        self.changed = threading.Condition()

    def start(self, commands) -> None:
        if self.raises == "start":
            raise RuntimeError("broken")
        with self.changed:
            self.commands += commands
            self.log += [type(command).__name__ for command in commands]
            self.changed.notify_all()

    def poll(self):
        if self.raises == "poll":
            raise RuntimeError("broken")
        with self.changed:
            events, self.events = self.events, []
        return events

    def tell(self, *events) -> None:
        with self.changed:
            self.events += events
        self.wake()

    def until(self, kind: type):
        """The first command of a kind, once it has come."""
        with self.changed:
            found = self.changed.wait_for(
                lambda: next((command for command in self.commands if isinstance(command, kind)), None),
                DEADLINE_S,
            )
        assert found is not None, f"no {kind.__name__} came"
        return found

    def pool_moved(self, regions) -> None:
        self.log.append("pool_moved")

    def close(self) -> None:
        self.log.append("close")


class Bench:
    """A loop with one NIXL leaf, and all that it said."""

    def __init__(self, role: str, **fields) -> None:
        transfer = ConnectorConfig(kind=NIXL, role=role, **fields)
        made = SchedulerConfig(
            windows=(None,), page_size=4, num_pages=20, max_num_seqs=4, max_model_len=64, transfer=transfer
        )
        self.log: list[str] = []
        self.turns = 0
        self.device = FakeDevice()
        movers = Movers([NIXL])
        self.driver = FakeDriver(self.log, movers.wake)
        movers.add(0, self.driver)
        self.ended: dict[str, str] = {}
        self.changed = threading.Condition()
        self.loop = EngineLoop(
            made, LIMITS, self.device, NoTokenizer(), max_num_queued_reqs=8, movers=movers,
            recorder=self._turned, log_stats=False,
        )  # fmt: skip

    def _turned(self, inputs, plan) -> None:
        with self.changed:
            self.turns += 1
            self.changed.notify_all()

    def submit(self, name: str, tokens: int = 10, **fields) -> None:
        request = Request(
            request_id=name, prompt_token_ids=tuple(range(tokens)), sampling=SamplingParams(max_tokens=2),
            eos_token_ids=(), **fields,
        )  # fmt: skip

        def sink(delta: Delta) -> None:
            if delta.finish_reason is not None:
                with self.changed:
                    self.ended[name] = str(delta.message)
                    self.changed.notify_all()

        self.loop.submit(request, sink)

    def until(self, said: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(said, DEADLINE_S), "it did not come to that"


def remote(name: str) -> RemoteSource:
    pages = ((1, 2, 3),)
    return RemoteSource(
        engine_id="p", epoch="0" * 32, host="h", port=1, request_id=name, pages=pages, generations=pages,
        num_tokens=10, page_size=4,
    )  # fmt: skip


@pytest.fixture
def consumer():
    bench = Bench("kv_consumer")
    yield bench
    bench.loop.close()


def test_the_loop_sleeps_while_nothing_but_a_load_is_under_way_and_wakes_when_it_ends(consumer):
    consumer.submit("a", remote=remote("a"))
    load = consumer.driver.until(Load)
    consumer.until(lambda: consumer.turns >= 1)
    turns = consumer.turns
    woken = threading.Event()
    assert not woken.wait(0.1)  # time in which a loop that spins would have made thousands of turns
    assert consumer.turns - turns <= 1
    consumer.driver.tell(Loaded(move_id=load.move_id, num_pages=3))
    consumer.until(lambda: "a" in consumer.ended)
    assert "start" in consumer.device.calls


def test_a_nudge_without_news_is_one_turn(consumer):
    consumer.submit("a", remote=remote("a"))
    consumer.driver.until(Load)
    turns = consumer.turns
    consumer.driver.tell()
    consumer.until(lambda: consumer.turns > turns)
    assert consumer.turns <= turns + 2 and not consumer.device.calls


@pytest.mark.parametrize("method", ["start", "poll"])
def test_a_driver_that_raises_does_not_end_the_loop(consumer, method):
    if method == "poll":
        consumer.submit("a", remote=remote("a"))
        consumer.driver.until(Load)
    consumer.driver.raises = method
    if method == "start":
        consumer.submit("a", remote=remote("a"))
    consumer.driver.wake()
    consumer.until(lambda: "a" in consumer.ended)  # its prompt was computed, by a device that fails
    assert "device" in consumer.ended["a"] and consumer.loop.alive
    consumer.submit("b", remote=remote("b"))
    consumer.until(lambda: "b" in consumer.ended)
    assert consumer.loop.alive and consumer.log.count("close") == 1


def test_after_a_failed_step_the_pool_is_registered_once_and_before_new_commands(consumer):
    consumer.device.gate.clear()
    consumer.submit("a")
    consumer.until(lambda: consumer.turns >= 1)
    consumer.submit("b", remote=remote("b"))
    consumer.device.gate.set()
    consumer.until(lambda: "a" in consumer.ended)
    consumer.driver.until(Load)
    assert consumer.log.count("pool_moved") == 1
    assert consumer.log.index("pool_moved") < consumer.log.index("Load")


def test_closing_closes_the_drivers_once_and_tells_who_waits():
    bench = Bench("kv_consumer")
    bench.submit("a", remote=remote("a"))
    bench.driver.until(Load)
    bench.loop.close()
    assert bench.log.count("close") == 1 and not bench.loop.alive and "a" in bench.ended
