"""Servers of the tests of faults, which may not be shared with other tests."""

from collections.abc import Callable, Generator

import pytest

from tests.e2e.connectors.fleet import PAGES_16, Node, Plan, nixl, start_all, stop_all

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
