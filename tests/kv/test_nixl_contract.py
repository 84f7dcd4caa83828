"""The fake NIXL and the real one say the same in every case of the contract."""

import importlib.util
import json
import os
import select
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from jaxserve.sim.fake_nixl import FakeNixlError, FakeNixlNetwork, Fault
from tests.kv.nixl_cases import CASES
from tests.kv.nixl_play import NUM_PAGES, PAGE, Play, said, values
from tests.kv.nixl_real import start

ANSWER_S = 100.0
MISSING = importlib.util.find_spec("nixl") is None
FAKE = [pytest.param(name, id=f"{name} {case.measured}".strip()) for name, case in CASES.items()]
REAL = [
    pytest.param(name, transport, id=f"{transport} {name} {case.measured}".strip())
    for transport in ("tcp", "all")
    for name, case in CASES.items()
    if transport in case.transports
]


class FakeSource:
    """See `tests.kv.nixl_play.Source`."""

    def __init__(self, network: FakeNixlNetwork, value: int) -> None:
        self._network = network
        self._continued = False
        self._pages = np.full((NUM_PAGES, PAGE), value, np.uint8)
        self._agent: Any = network.agent("source")
        self.address = self._pages.ctypes.data
        self._registered = self._agent.register_memory([(self.address, self._pages.size, 0, "")], "DRAM")
        self.metadata = self._agent.get_agent_metadata()

    def fill(self, value: int) -> None:
        self._pages[:] = value

    def values(self) -> list[int]:
        return values(self._pages)

    def serve(self) -> None:
        if self._continued:
            self._continued = False
            self._network.resume("source")

    def stop(self) -> None:
        self._network.pause("source")

    def go_on(self) -> None:
        self._continued = True  # it answers when it next serves

    def kill(self) -> None:
        self._network.kill("source")

    def deregister(self) -> None:
        self._agent.deregister_memory(self._registered)

    def delete(self) -> None:
        self._agent = None

    def ports(self) -> list[int]:
        return []

    def lose(self, page: int) -> None:
        self._network.faults = [Fault(writes_nothing=True)]


class FakeStage:
    """See `tests.kv.nixl_play.Stage`."""

    def __init__(self) -> None:
        self.network = FakeNixlNetwork()

    def agent(self, name: str) -> Any:
        return self.network.agent(name)

    def source(self, *, value: int = 1) -> FakeSource:
        return FakeSource(self.network, value)

    def starve(self, post: Callable[[], object]) -> None:
        self.network.faults = [Fault(post_fails=True)]
        with pytest.raises(FakeNixlError, match="NIXL_ERR_BACKEND"):
            post()


class Reader:
    """The process with the real reader, for one transport: cases go in, what they said comes out."""

    def __init__(self, transport: str) -> None:
        self._environ = {"UCX_TLS": transport}
        self._process: subprocess.Popen[str] | None = None

    def play(self, name: str) -> list[object]:
        """What a case says. A process that dies of it fails this case only."""
        process = self._process = self._process or start("reader", self._environ)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(name + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], ANSWER_S)
        line = process.stdout.readline() if ready else ""
        if not line:
            self.end()
            pytest.fail(f"the reader {'died' if ready else 'did not answer'}")
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer["said"]

    def end(self) -> None:
        """Kills it and its sources, also those that are stopped."""
        if self._process is not None:
            with self._process as process:
                os.killpg(process.pid, signal.SIGKILL)
            self._process = None


@pytest.fixture(scope="module")
def readers() -> Iterator[dict[str, Reader]]:
    """A reader for each transport."""
    made = {transport: Reader(transport) for transport in ("tcp", "all")}
    yield made
    for reader in made.values():
        reader.end()


@pytest.mark.parametrize("name", FAKE)
def test_the_fake_keeps_the_contract(name: str) -> None:
    assert CASES[name].script(FakeStage()) == CASES[name].says


@pytest.mark.skipif(MISSING, reason="NIXL is not installed")
@pytest.mark.parametrize(("name", "transport"), REAL)
def test_the_real_agents_keep_the_contract(name: str, transport: str, readers: dict[str, Reader]) -> None:
    assert readers[transport].play(name) == CASES[name].says


# What cannot be had of the real agents when it is wanted.


def play(fault: Fault | None = None) -> tuple[FakeNixlNetwork, Play]:
    """A reader and a source of the fake."""
    stage = FakeStage()
    played = Play(stage, stage.source())
    stage.network.faults = [] if fault is None else [fault]
    return stage.network, played


@pytest.mark.parametrize("cycles", [0, 1, 5])
def test_done_comes_after_exactly_so_many_polls(cycles: int) -> None:
    network, played = play()
    network.set_cycles_before_xfer_done(cycles)
    handle = played.make()
    states = [said(played.agent.transfer, handle)] + [played.state(handle) for _ in range(cycles + 1)]
    assert states == ["PROC"] * (cycles + (cycles > 0)) + ["DONE"] * (1 if cycles else 2)
    assert played.target.all()


@pytest.mark.parametrize("pages", [1, 2, 3])
@pytest.mark.parametrize("cut_late", [False, True])
def test_a_transfer_that_fails_half_way_has_written_half_and_never_writes_more(
    pages: int, cut_late: bool
) -> None:
    """A connection that is cut while its peer lives on (tests/e2e cuts one), at one moment of many."""
    network, played = play(Fault(errors=True))
    handle = played.make(range(pages), range(pages))
    played.agent.transfer(handle)
    written = int(played.target.sum())
    assert written == pages * PAGE // 2
    if cut_late:
        assert network.deliver_late() == 1
    lost = "NIXL_ERR_REMOTE_DISCONNECT"
    assert [played.end(handle), played.state(handle), said(played.agent.transfer, handle)] == [lost] * 3
    assert network.deliver_late() == 0 and not network.targets() and int(played.target.sum()) == written


def test_a_transfer_that_never_ends_writes_when_it_is_told_to() -> None:
    """A stopped source without a process to stop."""
    network, played = play(Fault(never_ends=True))
    handle = played.make()
    played.agent.transfer(handle)
    assert played.states(handle) == ["PROC"] and not played.target.all()
    assert network.deliver_late() == 1 and played.target.all()
    assert played.state(handle) == "DONE"


def test_a_flipped_bit_and_bytes_that_never_came_are_done() -> None:
    """Nothing between two real processes on one machine flips bits."""
    for fault, differ in ((Fault(flips_bit=True), 1), (Fault(writes_nothing=True), NUM_PAGES * PAGE)):
        _, played = play(fault)
        assert played.run() == "DONE"
        assert int((played.target != 1).sum()) == differ


@pytest.mark.parametrize("pages", [1, 2, 5])
def test_a_post_that_fails_may_write_the_pages_before_the_one_that_was_refused(pages: int) -> None:
    """The real one fails so where memory runs out; how far it has come by then differs."""
    network, played = play(Fault(post_fails=True))
    handle = played.make(range(pages), range(pages))
    assert said(played.agent.transfer, handle) == "NIXL_ERR_BACKEND"
    assert not played.target.any() and len(network.targets()) == pages // 2
    network.deliver_late()
    assert played.target.all(axis=1).sum() == pages // 2
