"""What a storm counts has happened: a message overtook another, a transfer ended before an earlier one."""

from types import SimpleNamespace
from typing import Any

import pytest

from jaxserve.sim import cover
from jaxserve.sim.clockwork import Clockwork
from jaxserve.sim.cover import Cover
from jaxserve.sim.fake_nixl import Fault, Posted
from jaxserve.sim.storm import Storm
from kv.wire import Heartbeat

BEAT = Heartbeat(epoch="e", request_ids=())
READ = Posted(
    reader="engine-d-dddddddd-read", source="engine-p-pppppppp-serve", num_bytes=1, num_descriptors=1
)


@pytest.fixture
def storm(monkeypatch: pytest.MonkeyPatch) -> Storm:
    """With one request that decodes on a host "d", and one whose pages are leased on "p"."""
    found = {"d": [("epoch", "request", 0, "decoding")], "p": [("epoch", "request", -1, "leased")]}
    monkeypatch.setattr(cover, "requests", lambda engine: found[engine.host])
    engines: dict[str, Any] = {host: SimpleNamespace(host=host, alive=True) for host in found}
    clockwork = Clockwork(1)
    storm = Storm(clockwork, {}, Cover(engines, lambda: clockwork.now))
    for host, engine in engines.items():
        storm.begins(host, host * 32)
        storm._cover.turned(engine)
    return storm


def test_a_message_meets_somebody_only_where_it_overtakes_another_of_the_same_direction(storm: Storm):
    storm.rates = {"X9": 1.0}
    (first,) = storm.judge("p", "d", BEAT).delays
    storm.judge("d", "p", BEAT)
    assert not storm._cover.met, "each is alone in its direction"
    (second,) = storm.judge("p", "d", BEAT).delays
    assert second < first and storm._cover.met == {("X9", "decoding"): 1, ("X9", "leased"): 1}
    storm._clockwork.now += 10.0
    storm.judge("p", "d", BEAT)
    assert storm._cover.met["X9", "decoding"] == 1, "all the others are there"


def test_a_transfer_is_late_only_where_one_that_began_later_has_ended_before_it(storm: Storm):
    storm.rates = {"X21": 1.0}
    first, second, third = (storm.transfer(READ) for _ in range(3))

    def look(going: list[Fault], written: list[Fault]) -> dict[tuple[str, str], int]:
        left = [(READ.reader, READ.source, fault, [0]) for fault in going]
        storm.under_way(
            left, lambda host, addresses: True, lambda fault: any(fault is one for one in written)
        )
        return dict(storm._cover.met)

    assert not look([first, second, third], [])
    assert not look([first, second], []), "the third has failed"
    assert look([first], [second]) == {("X21", "decoding"): 1, ("X21", "leased"): 1}
    assert look([], [second, first]) == {("X21", "decoding"): 1, ("X21", "leased"): 1}


def test_an_earlier_transfer_that_ends_first_overtakes_nobody(storm: Storm):
    storm.rates = {"X21": 1.0}
    first, second = storm.transfer(READ), storm.transfer(READ)
    going = [(READ.reader, READ.source, second, [0])]
    storm.under_way(going, lambda host, addresses: True, lambda fault: fault is first)
    assert not storm._cover.met
