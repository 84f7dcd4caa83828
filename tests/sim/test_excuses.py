"""A tokenizer that fails excuses the requests that it has struck, and nobody else's failure."""

from collections.abc import Callable

import pytest

from jaxserve.sim.draw import draw
from jaxserve.sim.excuses import Excuses
from jaxserve.sim.expect import SimTokenizer, TokenizerFailed
from jaxserve.sim.world import Failed, World

EVENTS = 400


def broken(seeds: int, found: Callable[[str], bool], **rates: float) -> list[str]:
    """What worlds say that have these faults and no others, up to the first in which it is found."""
    said = []
    for seed in range(seeds):
        world = World(seed, draw)
        world.storm.rates.clear()
        world.storm.rates.update(rates)
        try:
            world.run(EVENTS)
        except Failed as failed:
            said.append(str(failed))
            if found(said[-1]):
                break
    return said


class _Failing(SimTokenizer):
    calls = 0

    def token_bytes(self, token_id: int) -> bytes:
        self.calls += 1
        if self.calls % 20 == 0:
            raise TokenizerFailed
        return super().token_bytes(token_id)


def _noticed(said: str) -> bool:
    return "I13" in said or "I17" in said


def test_without_faults_nothing_fails():
    assert not broken(8, lambda said: True)


def test_a_tokenizer_that_fails_by_itself_is_noticed(monkeypatch: pytest.MonkeyPatch):
    """It raises what a fault of the tokenizer raises, but no fault has struck."""
    monkeypatch.setattr(Excuses, "tokenizer", lambda self, epoch: _Failing())
    assert any(map(_noticed, broken(10, _noticed)))
