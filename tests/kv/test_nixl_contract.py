"""The fake NIXL and the real one answer the same script alike."""

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxserve.sim.fake_nixl import FakeNixlNetwork
from kv.nixl import make_agent

PAGE, NUM_PAGES = 4096, 8
MISSING = importlib.util.find_spec("nixl") is None


def descs(buffer: np.ndarray) -> np.ndarray:
    rows = np.zeros((NUM_PAGES, 3), np.uint64)
    rows[:, 0] = buffer.ctypes.data + np.arange(NUM_PAGES, dtype=np.uint64) * PAGE
    rows[:, 1] = PAGE
    return rows


def refused(call: Callable[[], object]) -> str:
    """NIXL's name for why a call fails."""
    with pytest.raises(Exception, match="NIXL_ERR") as caught:
        call()
    return str(caught.value).split()[0]


def script(make: Callable[[str], Any]) -> list[object]:
    """Everything the driver does with agents, on two of them. Returns what they said."""
    said: list[object] = []
    target = np.zeros(PAGE * NUM_PAGES, np.uint8)
    source = np.random.default_rng(0).integers(0, 256, PAGE * NUM_PAGES, dtype=np.uint8)
    reader, server = make("reader"), make("server")
    ours = reader.register_memory(descs(target), "DRAM")
    theirs = server.register_memory([(source.ctypes.data, len(source), 0, "")], "DRAM")
    said.append(reader.get_reg_descs(descs(target), "DRAM") is not None)
    metadata = server.get_agent_metadata()
    said += [type(metadata), reader.add_remote_agent(metadata), reader.add_remote_agent(metadata)]
    here = reader.prep_xfer_dlist("NIXL_INIT_AGENT", reader.get_xfer_descs(descs(target), "DRAM"))
    there = reader.prep_xfer_dlist("server", reader.get_xfer_descs(descs(source), "DRAM"))
    said.append(refused(lambda: reader.prep_xfer_dlist("server", descs(target), "DRAM")))
    said.append(refused(lambda: reader.prep_xfer_dlist("nobody", descs(source), "DRAM")))
    two, far = np.array([0, 2], np.int32), np.array([0, NUM_PAGES], np.int32)
    said.append(refused(lambda: reader.make_prepped_xfer("READ", here, two[:1], there, two)))
    said.append(refused(lambda: reader.make_prepped_xfer("READ", here, far, there, two)))
    handle = reader.make_prepped_xfer("READ", here, two, there, np.array([5, 3], np.int32), b"read")
    said.append(refused(lambda: reader.check_xfer_state(handle)))
    state = reader.transfer(handle)
    polls = 0
    while state == "PROC" and polls < 1_000_000:
        server.get_new_notifs()
        state, polls = reader.check_xfer_state(handle), polls + 1
    pages, expected = target.reshape(NUM_PAGES, PAGE), source.reshape(NUM_PAGES, PAGE)
    said += [state, reader.check_xfer_state(handle)]
    said += [np.array_equal(pages[[0, 2]], expected[[5, 3]]), pages[[1, 3, 4, 5, 6, 7]].any()]
    told = reader.get_xfer_telemetry(handle)
    said += [told.totalBytes, told.descCount, told.postDuration >= 0, told.xferDuration > 0]
    said.append(notifs(reader, server))
    said.append(reader.send_notif("server", b"hello"))
    said.append(notifs(reader, server))
    said.append(refused(lambda: reader.send_notif("nobody", b"hello")))
    said.append(reader.release_xfer_handle(handle))
    said += [reader.release_dlist_handle(here), reader.release_dlist_handle(there)]
    said += [reader.remove_remote_agent("server"), refused(lambda: reader.add_remote_agent(b"junk"))]
    said += [reader.deregister_memory(ours), server.deregister_memory(theirs)]
    said.append(refused(lambda: reader.deregister_memory(ours)))
    return said


def notifs(reader: Any, server: Any) -> dict[str, list[bytes]]:
    for _ in range(1_000_000):
        if found := server.get_new_notifs():
            return found
        reader.get_new_notifs()
    raise AssertionError("no notification came")


EXPECTED = [
    True,
    bytes,
    b"server",
    b"server",
    "NIXL_ERR_NOT_FOUND",
    "NIXL_ERR_NOT_FOUND",
    "NIXL_ERR_INVALID_PARAM",
    "NIXL_ERR_INVALID_PARAM",
    "NIXL_ERR_NOT_POSTED",
    "DONE",
    "DONE",
    True,
    False,
    2 * PAGE,
    2,
    True,
    True,
    {"reader": [b"read"]},
    None,
    {"reader": [b"hello"]},
    "NIXL_ERR_NOT_FOUND",
    None,
    None,
    None,
    None,
    "NIXL_ERR_MISMATCH",
    None,
    None,
    "NIXL_ERR_NOT_FOUND",
]


def test_the_fake_follows_the_script() -> None:
    assert script(FakeNixlNetwork().agent) == EXPECTED


@pytest.mark.skipif(MISSING, reason="NIXL is not installed")
def test_the_real_agents_follow_the_script() -> None:
    assert script(make_agent) == EXPECTED


def test_the_fake_delays_done_for_exactly_so_many_polls() -> None:
    for cycles in (0, 1, 5):
        network = FakeNixlNetwork()
        reader, server = network.agent("reader"), network.agent("server")
        reader.set_cycles_before_xfer_done(cycles)
        target, source = np.zeros(PAGE * NUM_PAGES, np.uint8), np.ones(PAGE * NUM_PAGES, np.uint8)
        reader.register_memory(descs(target), "DRAM")
        server.register_memory(descs(source), "DRAM")
        reader.add_remote_agent(server.get_agent_metadata())
        here = reader.prep_xfer_dlist("", descs(target), "DRAM")
        there = reader.prep_xfer_dlist("server", descs(source), "DRAM")
        all_pages = np.arange(NUM_PAGES, dtype=np.int32)
        handle = reader.make_prepped_xfer("READ", here, all_pages, there, all_pages)
        states = [reader.transfer(handle)] + [reader.check_xfer_state(handle) for _ in range(cycles + 1)]
        assert states == ["PROC"] * (cycles + (cycles > 0)) + ["DONE"] * (1 if cycles else 2)
        assert target.all()


def test_the_fake_loses_and_doubles_notifications_on_order() -> None:
    network = FakeNixlNetwork()
    reader, server = network.agent("reader"), network.agent("server")
    reader.add_remote_agent(server.get_agent_metadata())
    network.lose_notifs, network.double_notifs = 1, 1
    for message in (b"a", b"b", b"c"):
        reader.send_notif("server", message)
    assert server.get_new_notifs() == {"reader": [b"b", b"b", b"c"]}
    assert server.get_new_notifs() == {}
