"""What only a mistake of ours raises is told to somebody; what NIXL or a device says is not."""

import logging
from typing import Any

import numpy as np
import pytest

from kv.driver import Region
from kv.host import HostDriver
from kv.moves import Store, Stored
from kv.transfer_agent import AgentError, PoolAgent

REGION = Region(address=4096, page_bytes=64, num_pages=4)


def _agent(error: Exception) -> Any:
    def make(name: str) -> Any:
        raise error

    return make


def test_an_agent_tells_of_a_mistake_and_ends_what_was_asked_for():
    told: list[Exception] = []
    mistake = KeyError("backend")
    with pytest.raises(AgentError, match="could not make an agent"):
        PoolAgent(_agent(mistake), "a", [REGION], "DRAM", told.append)
    assert told == [mistake]
    with pytest.raises(KeyError):
        PoolAgent(_agent(mistake), "a", [REGION], "DRAM")


def test_what_nixl_says_is_told_to_nobody():
    class Said(Exception):
        """As NIXL's: right below Exception."""

    with pytest.raises(AgentError, match="NIXL_ERR_BACKEND"):
        PoolAgent(_agent(Said("NIXL_ERR_BACKEND")), "a", [REGION], "DRAM")


@pytest.mark.parametrize(("error", "logged"), [(TypeError("no bytes"), 1), (MemoryError("full"), 0)])
def test_a_copy_that_fails_on_a_mistake_is_logged(
    caplog: pytest.LogCaptureFixture, error: Exception, logged: int
):
    class Copies:
        def read(self, pages: Any, out: np.ndarray) -> None:
            raise error

        def write(self, pages: Any, rows: np.ndarray) -> None: ...

        def pool_moved(self, regions: Any) -> None: ...

    driver = HostDriver(4, 64, Copies(), wake=lambda: None, clock=lambda: 0.0, executor=lambda drain: drain())
    with caplog.at_level(logging.ERROR):
        driver.start([Store(move_id=1, connector=0, pages=(1,), slots=(1,))])
    (event,) = driver.poll()
    assert isinstance(event, Stored) and event.error == f"{type(error).__name__}: {error}"
    assert sum(record.exc_info is not None for record in caplog.records) == logged
