"""The driver's thread over the real side channel, with the fake NIXL and with the real one."""

import importlib.util
import os
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from jaxserve.sim.fake_nixl import FakeNixlNetwork
from kv.config import CONSUMER, NIXL, PRODUCER, ConnectorConfig
from kv.moves import (
    Event,
    Lease,
    LeaseRead,
    LeaseTouched,
    Load,
    Loaded,
    RemoteSource,
    Track,
    Unlease,
    Untrack,
)
from kv.nixl import NixlDriver, load, make_agent
from kv.tcp_channel import TcpChannel
from kv.transfer_agent import Agent
from kv.transfer_plan import EngineFacts
from tests.kv.pair import ITEM, NUM_PAGES, Pool

MISSING = importlib.util.find_spec("nixl") is None
KEY = bytes(32)


class Side:
    """One engine: a pool, a driver, and its events as they come."""

    def __init__(self, name: str, make: Callable[[str], Agent], seed: int, role: str) -> None:
        self.pool = Pool(16, seed)
        self.events: list[Event] = []
        self.woken = threading.Event()
        channels: list[TcpChannel] = []

        def make_channel(wake: Callable[[], None]) -> TcpChannel:
            channels.append(TcpChannel("127.0.0.1", 0, key=KEY, wake=wake))
            return channels[0]

        self.facts = EngineFacts(
            engine_id=name,
            epoch=name * 32,
            compat="c",
            role=role,
            page_size=16,
            page_shape=self.pool.shape,
            item_bytes=ITEM,
        )
        self.driver = NixlDriver(
            facts=self.facts,
            config=ConnectorConfig(kind=NIXL, role=role, lease_s=0.6),
            regions=[self.pool.region],
            copies=self.pool,
            make_channel=make_channel,
            wake=self.woken.set,
            make_agent=make,
        )
        self.port = channels[0].port

    def until(self, kind: type, count: int = 1) -> list[Event]:
        """Waits for so many events of a kind."""
        deadline = time.monotonic() + 60
        while sum(isinstance(event, kind) for event in self.events) < count:
            assert self.woken.wait(deadline - time.monotonic()), f"no {kind.__name__} in {self.events}"
            self.woken.clear()
            self.events += self.driver.poll()
        return [event for event in self.events if isinstance(event, kind)]


def source_of(p: Side, pages: Sequence[int]) -> RemoteSource:
    return RemoteSource(
        engine_id=p.facts.engine_id,
        epoch=p.facts.epoch,
        host="127.0.0.1",
        port=p.port,
        request_id="r",
        pages=(tuple(pages),),
        generations=((3,) * len(pages),),
        num_tokens=16 * len(pages),
        page_size=16,
    )


def lease_of(source: RemoteSource) -> Lease:
    return Lease(
        move_id=1,
        connector=0,
        request_id="r",
        pages=source.pages,
        generations=source.generations,
        num_tokens=source.num_tokens,
    )


def load_of(source: RemoteSource, move_id: int, targets: Sequence[int]) -> Load:
    return Load(
        move_id=move_id,
        connector=0,
        request_id="d",
        first_page=0,
        pages=(tuple(targets),),
        num_tokens=source.num_tokens,
        source=source,
    )


@pytest.mark.parametrize(
    "real", [False, pytest.param(True, marks=pytest.mark.skipif(MISSING, reason="NIXL is not installed"))]
)
def test_a_lease_is_kept_alive_read_and_ended_between_two_threads(real: bool) -> None:
    make = make_agent if real else FakeNixlNetwork().agent
    p, d = Side("a", make, 1, PRODUCER), Side("b", make, 2, CONSUMER)
    try:
        source = source_of(p, [5, 9, 3])
        p.driver.start([lease_of(source)])
        d.driver.start([Track(connector=0, request_id="d", source=source)])
        d.driver.start([load_of(source, 1, [20, 10, 30])])
        (loaded,) = d.until(Loaded)
        assert isinstance(loaded, Loaded) and (loaded.num_pages, loaded.error) == (3, None)
        assert np.array_equal(d.pool.rows[[20, 10, 30]], p.pool.rows[[5, 9, 3]])
        p.until(LeaseTouched, 3)
        d.driver.start([Untrack(connector=0, request_id="d")])
        p.until(LeaseRead)
        p.driver.start([Unlease(connector=0, request_id="r")])
        d.driver.start([load_of(source, 2, [21, 11, 31])])
        failed = d.until(Loaded, 2)[1]
        assert isinstance(failed, Loaded) and (failed.num_pages, failed.stage) == (0, "verify")
        d.pool.rows = d.pool.rows.copy()
        d.driver.pool_moved([d.pool.region])
        p.driver.start([lease_of(source)])
        d.driver.start([load_of(source, 3, range(40, 43))])
        assert [load.num_pages for load in d.until(Loaded, 3) if isinstance(load, Loaded)] == [3, 0, 3]
        assert np.array_equal(d.pool.rows[40:43], p.pool.rows[[5, 9, 3]])
    finally:
        d.driver.close()
        p.driver.close()
    assert len(d.pool.rows) == NUM_PAGES


def test_a_fault_in_the_thread_fails_loads_and_not_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    sides = (("a", PRODUCER), ("b", CONSUMER))
    p, d = (Side(name, FakeNixlNetwork().agent, 1, role) for name, role in sides)
    try:

        def fail(pages: Sequence[int], out: np.ndarray) -> None:
            raise ZeroDivisionError

        p.pool.read = fail
        source = source_of(p, [5])
        p.driver.start([lease_of(source)])
        p.driver.start([load_of(source, 1, [7])])
        p.driver.start([load_of(source, 2, [8])])
        loads = p.until(Loaded, 2)
        assert [load.error for load in loads if isinstance(load, Loaded)] == ["transfers have ended"] * 2
        p.driver.start([load_of(source, 3, [9])])
        assert [type(event) for event in p.driver.poll()] == [Loaded]
        p.driver.pool_moved([p.pool.region])
        assert "ZeroDivisionError" in caplog.text
    finally:
        d.driver.close()
        p.driver.close()


@pytest.mark.skipif(MISSING, reason="nixl is not installed")
def test_ucx_probes_no_peers_unless_the_user_says_so(monkeypatch):
    """UCX 1.23 aborts the process when its probe finds a dead peer under a queued read."""
    monkeypatch.delenv("UCX_KEEPALIVE_INTERVAL", raising=False)
    load()
    assert os.environ["UCX_KEEPALIVE_INTERVAL"] == "inf"
    monkeypatch.setenv("UCX_KEEPALIVE_INTERVAL", "5s")
    load()
    assert os.environ["UCX_KEEPALIVE_INTERVAL"] == "5s"
