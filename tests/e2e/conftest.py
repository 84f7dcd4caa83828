"""Real servers, each once for all end-to-end tests."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import HAS_NIXL
from tests.e2e.connectors.fleet import (
    PAGES_16,
    PAGES_128,
    Pair,
    Plan,
    Prompts,
    host,
    multi,
    nixl,
    start_all,
    start_router,
    stop_all,
)
from tests.e2e.servers import Server, start_server, stop_server

__all__ = ["Server", "start_server", "stop_server"]

SIMPLE, OFFLOADING = "SimpleCPUOffloadConnector", "OffloadingConnector"
PAIR_16 = (
    Plan(
        name="p16",
        config=multi("kv_producer", nixl("kv_producer"), host(SIMPLE, 192, 16)),
        page_size=16,
        num_pages=PAGES_16,
    ),
    Plan(
        name="d16",
        config=multi("kv_consumer", host(SIMPLE, 192, 16), nixl("kv_consumer")),
        page_size=16,
        num_pages=PAGES_16,
    ),
)
PAIR_128 = (
    Plan(
        name="p128",
        config=multi("kv_producer", host(OFFLOADING, 40, 128), nixl("kv_producer")),
        page_size=128,
        num_pages=PAGES_128,
    ),
    Plan(
        name="d128",
        config=multi("kv_consumer", nixl("kv_consumer"), host(OFFLOADING, 40, 128)),
        page_size=128,
        num_pages=PAGES_128,
    ),
)


@pytest.fixture(scope="session")
def server(free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server with the default model for the whole session."""
    running = start_server(free_port(), tmp_path_factory.mktemp("server") / "output.txt")
    yield running
    stop_server(running)


@pytest.fixture(scope="session")
def prompts() -> Prompts:
    """Prompts that share no page: within the session, and with whoever else used the servers."""
    return Prompts(os.urandom(4))


@pytest.fixture(scope="session")
def pair16(free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Pages of 16, SimpleCPUOffloadConnector after and before NIXL, and a router."""
    yield from _running(PAIR_16, free_port, tmp_path_factory.mktemp("pair16"))


@pytest.fixture(scope="session")
def pair128(free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Pages of 128, OffloadingConnector before and after NIXL, and a router."""
    yield from _running(PAIR_128, free_port, tmp_path_factory.mktemp("pair128"))


def _running(plans: tuple[Plan, Plan], free_port: Callable[[], int], folder: Path) -> Iterator[Pair]:
    if not HAS_NIXL:
        pytest.skip("nixl is not installed")
    nodes = start_all(plans, free_port, folder)
    try:
        router = start_router(nodes[0].url, nodes[1].url, free_port(), folder)
        yield Pair(prefill=nodes[0], decode=nodes[1], router_url=router.url)
        assert stop_server(router) == 0
    finally:
        codes = stop_all(nodes)
    assert codes == [0, 0]
