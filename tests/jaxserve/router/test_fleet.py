"""Whose turn it is."""

import asyncio

from jaxserve.router import RouterOptions
from jaxserve.router.fleet import Backend, Fleet


def fleet_of(*healthy: bool) -> Fleet:
    """A fleet with these prefill servers, which nobody probes."""
    urls = tuple(f"http://127.0.0.1:{port}" for port in range(1, len(healthy) + 1))
    fleet = Fleet(RouterOptions(prefill=urls, decode=urls, probe_timeout_s=0.5))
    for backend, well in zip(fleet.prefill, healthy, strict=True):
        backend.healthy = well
    return fleet


def picked(fleet: Fleet, times: int) -> list[int]:
    found = [fleet.pick("prefill") for _ in range(times)]
    return [fleet.prefill.index(backend) for backend in found if backend is not None]


def test_turns_go_round_the_healthy_ones() -> None:
    assert picked(fleet_of(True, True, True), 5) == [0, 1, 2, 0, 1]
    assert picked(fleet_of(False, True, True), 4) == [1, 2, 1, 2]
    assert picked(fleet_of(True, False, False), 3) == [0, 0, 0]
    assert picked(fleet_of(False, False), 1) == []


def test_the_next_to_be_asked_is_never_the_one_that_failed() -> None:
    fleet = fleet_of(True, True)
    first, second = fleet.pick("prefill"), fleet.pick("prefill")
    assert isinstance(first, Backend)
    # It is the first one's turn again.
    assert asyncio.run(fleet.again(first)) is second


def test_one_that_failed_is_asked_again_only_if_it_answers() -> None:
    """Nobody listens on these ports."""

    async def ask() -> tuple[Backend | None, bool]:
        fleet = fleet_of(True)
        try:
            return await fleet.again(fleet.prefill[0]), fleet.prefill[0].healthy
        finally:
            await fleet.close()

    assert asyncio.run(ask()) == (None, False)
