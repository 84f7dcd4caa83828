"""Coverage counts a fault, a request and its state once, however long they stay together."""

from types import SimpleNamespace
from typing import Any

import pytest

from jaxserve.sim import cover
from jaxserve.sim.cover import Cover, Found


class _Cluster:
    """Engines of which only their requests are known."""

    def __init__(self, monkeypatch: Any, *hosts: str) -> None:
        self.engines: dict[str, Any] = {host: SimpleNamespace(host=host, alive=True) for host in hosts}
        self.requests: dict[str, list[Found]] = {host: [] for host in hosts}
        self.now = 0.0
        self.cover = Cover(self.engines, lambda: self.now)
        monkeypatch.setattr(cover, "requests", lambda engine: self.requests[engine.host])

    def turn(self, host: str, *states: str) -> bool:
        self.requests[host] = [("epoch", f"request-{place}", 0, state) for place, state in enumerate(states)]
        return self.cover.turned(self.engines[host])


def test_a_fault_that_lasts_meets_each_request_once_in_each_of_its_states(monkeypatch: pytest.MonkeyPatch):
    cluster = _Cluster(monkeypatch, "p", "d")
    cluster.turn("d", "waiting", "waiting")
    spell = cluster.cover.begin("X11", ("p", "d"))
    for _ in range(5):
        cluster.turn("d", "loading", "waiting")
    cluster.turn("d", "decoding", "waiting")
    cluster.cover.end(spell)
    cluster.turn("d", "decoding", "decoding")
    assert cluster.cover.met == {("X11", "waiting"): 2, ("X11", "loading"): 1, ("X11", "decoding"): 1}
    again = cluster.cover.begin("X11", ("d",))
    assert cluster.cover.met["X11", "decoding"] == 3, "another fault of its kind"
    cluster.cover.end(again)
    cluster.cover.end(again)


def test_a_fault_of_a_moment_meets_who_is_there_and_nobody_on_a_dead_engine(monkeypatch: pytest.MonkeyPatch):
    cluster = _Cluster(monkeypatch, "p", "d")
    cluster.turn("p", "leased", "prefilling")
    cluster.turn("d", "fetched")
    cluster.engines["d"].alive = False
    cluster.cover.strike("X7", ("p", "d", "p"))
    cluster.turn("p", "leased")
    assert cluster.cover.met == {("X7", "leased"): 1, ("X7", "prefilling"): 1}


def test_rare_states_are_told(monkeypatch: pytest.MonkeyPatch):
    cluster = _Cluster(monkeypatch, "d")
    assert not cluster.turn("d", "waiting", "decoding")
    assert cluster.turn("d", "waiting", "fetched")


def test_a_fault_of_one_sequence_meets_that_one_and_never_in_a_state_in_which_it_cannot(
    monkeypatch: pytest.MonkeyPatch,
):
    cluster = _Cluster(monkeypatch, "d")
    cluster.turn("d", "decoding", "prefilling", "waiting")
    assert cluster.cover.state("d", ("request-1", 0)) == "prefilling"
    assert cluster.cover.state("d", ("request-1", 1)) is None
    cluster.cover.strike_sequences("X30", "d", [("request-1", 0), ("request-2", 0)])
    cluster.cover.strike_sequences("X30", "d", [])
    assert cluster.cover.met == {("X30", "prefilling"): 1}
    assert not cluster.cover.history.of_host(("X30",), "p", 0.0)
