"""Servers of the tests of faults, which may not be shared with other tests."""

from collections.abc import Callable, Generator

import pytest

from tests.conftest import HAS_NIXL
from tests.e2e.connectors.chaos import Alone, Duo
from tests.e2e.connectors.fleet import (
    PAGES_16,
    Node,
    Pair,
    Plan,
    Prompts,
    ask,
    nixl,
    start_all,
    stop_all,
    text_of,
)

TIMEOUT_S = 5.0
"""Of a transfer to the decode servers of the tests of faults."""

RECOMPUTES = Plan(
    name="recomputes",
    config=nixl("kv_consumer", transfer_timeout=TIMEOUT_S),
    page_size=16,
    num_pages=PAGES_16,
)
FAILS = Plan(
    name="fails",
    config={**nixl("kv_consumer", transfer_timeout=TIMEOUT_S), "kv_load_failure_policy": "fail"},
    page_size=16,
    num_pages=PAGES_16,
)


@pytest.fixture(scope="module")
def decoders(
    free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Generator[tuple[Node, Node], None, None]:
    """Two decode servers with a short deadline: one computes what does not arrive, one fails."""
    nodes = start_all((RECOMPUTES, FAILS), free_port, tmp_path_factory.mktemp("decoders"))
    yield nodes[0], nodes[1]
    assert stop_all(nodes) == [0, 0]


@pytest.fixture(scope="module")
def running(
    free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Generator[Duo, None, None]:
    """Two servers for all scenes."""
    if not HAS_NIXL:
        pytest.skip("nixl is not installed")
    ports: set[int] = set()
    while len(ports) < 3:
        ports.add(free_port())
    duo = Duo.begin(sorted(ports), tmp_path_factory.mktemp("chaos"))
    yield duo
    assert duo.stop() == [0, 0]


@pytest.fixture
def duo(running: Duo) -> Generator[Duo, None, None]:
    """Both alive, also after a test that failed in the middle."""
    running.revive()
    yield running
    running.revive()


@pytest.fixture(scope="module")
def asked() -> Prompts:
    """The same prompts in every run: the servers are of this file alone."""
    return Prompts(b"chaos")


@pytest.fixture
def alone(pair16: Pair) -> Alone:
    """The text of a server that no fault meets and that reads no peer's page."""

    def text(prompt: list[int], **fields: int) -> str:
        return text_of(ask(pair16.prefill.url, prompt, **fields))

    return text
