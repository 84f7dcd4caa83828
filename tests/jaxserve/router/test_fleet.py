"""Whose turn it is, and who is well."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.router import RouterOptions
from jaxserve.router.fleet import Fleet
from jaxserve.router.probes import Probes


def fleet_of(*healthy: bool) -> Fleet:
    """A fleet with these prefill servers."""
    urls = tuple(f"http://127.0.0.1:{port}" for port in range(1, len(healthy) + 1))
    fleet = Fleet(urls, urls, max_missed_probes=2)
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
    # It is the first one's turn again.
    assert fleet.pick("prefill", other_than=first) is second


def test_one_that_nobody_listens_for_is_not_well() -> None:
    async def ask() -> tuple[bool, bool]:
        probes = Probes(RouterOptions(prefill=("http://127.0.0.1:1",), decode=("http://127.0.0.1:2",)))
        (backend,) = probes.fleet.prefill
        backend.healthy = True
        try:
            return await probes.probe(backend), backend.healthy
        finally:
            await probes.close()

    assert asyncio.run(ask()) == (False, False)


@given(st.lists(st.sampled_from(["well", "503", "refused", "missed", "suspect"]), max_size=12))
def test_it_is_asked_after_a_good_check_only_and_silent_after_missed_ones_only(seen: list[str]) -> None:
    fleet = fleet_of(False)
    (backend,) = fleet.prefill
    for what in seen:
        match what:
            case "well":
                assert fleet.probe_answered(backend, 200)
            case "503":
                assert not fleet.probe_answered(backend, 503)
            case "refused":
                fleet.probe_refused(backend, "ConnectError")
            case "missed":
                fleet.probe_missed(backend)
            case _:
                fleet.suspect(backend, "failed")
    checks = [what for what in seen if what != "suspect"]
    if seen and seen[-1] == "well":
        assert backend.healthy and fleet.pick("prefill") is backend
    if "well" not in seen or (seen and seen[-1] in ("503", "refused", "suspect")):
        assert not backend.healthy and fleet.pick("prefill") is None
    if checks[-2:] == ["missed", "missed"]:
        assert backend.silent and not backend.healthy
    if not checks or checks[-1] in ("well", "503") or "missed" not in checks:
        assert not backend.silent
