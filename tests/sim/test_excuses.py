"""An error needs a fault at the engines concerned: a fault anywhere, at any time, is no excuse."""

from typing import Any

import pytest

from jaxserve.sim.draw import draw
from jaxserve.sim.expect import SimTokenizer
from jaxserve.sim.world import Failed, World
from kv.transfer_fetch import Fetch

SEEDS = 40
EVENTS = 400


def _broken(seeds: int, **rates: float) -> list[str]:
    """What worlds say that have these faults and no others."""
    said = []
    for seed in range(seeds):
        world = World(seed, draw)
        world.storm.rates.clear()
        world.storm.rates.update(rates)
        try:
            world.run(EVENTS)
        except Failed as failed:
            said.append(str(failed))
    return said


def test_without_faults_nothing_fails():
    assert not _broken(8)


def test_a_load_that_fails_by_itself_is_no_fault_of_a_client(monkeypatch: pytest.MonkeyPatch):
    """Whatever else strikes: a client that goes away makes no load fail."""
    monkeypatch.setattr(Fetch, "settle", lambda self, digests: max(1, len(self.batch)))
    said = _broken(SEEDS, X33=0.01)
    assert any("its load failed without a fault" in one for one in said)


def test_a_tokenizer_that_fails_by_itself_is_noticed(monkeypatch: pytest.MonkeyPatch):
    calls = 0
    right = SimTokenizer.token_bytes

    def token_bytes(self: Any, token_id: int) -> bytes:
        nonlocal calls
        calls += 1
        if calls % 1000 == 0:
            raise RuntimeError("the tokenizer has failed")
        return right(self, token_id)

    monkeypatch.setattr(SimTokenizer, "token_bytes", token_bytes)
    assert any("I13" in one or "I17" in one for one in _broken(SEEDS // 4))
