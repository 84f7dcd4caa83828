"""A server that says it is ready though its engine hangs, or the other way round, is found out."""

from typing import Any

import pytest

from jaxserve.pulse import Pulse
from jaxserve.server.status import Status
from jaxserve.sim.draw import draw
from jaxserve.sim.world import Failed, World

SEEDS = 40
EVENTS = 500


def _never(self: Pulse, now: float, seconds: float) -> bool:
    return False


def _late(self: Pulse, now: float, seconds: float) -> bool:
    return self.busy_since is not None and now - self.busy_since > 60.0


def _also_at_rest(self: Pulse, now: float, *, idle: bool) -> None:
    self.busy_since = now


def _draining_is_ready(self: Status) -> str | None:
    return "the engine hangs" if self._engine.stalled(10.0) else None


@pytest.mark.parametrize(
    ("where", "name", "wrong"),
    [
        (Pulse, "stalled", _never),
        (Pulse, "stalled", _late),
        (Pulse, "turned", _also_at_rest),
        (Status, "not_ready", _draining_is_ready),
    ],
)
def test_a_readiness_that_lies_is_noticed(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, wrong: Any):
    monkeypatch.setattr(where, name, wrong)
    laws = set()
    for seed in range(SEEDS):
        try:
            World(seed, draw).run(EVENTS)
        except Failed as failed:
            laws.add(failed.law)
            if failed.law == "I20":
                break
    assert "I20" in laws
