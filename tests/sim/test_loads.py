"""A load that fails needs a fault of its own, whatever becomes of its request afterwards."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from jaxserve.sim.clockwork import Clockwork
from jaxserve.sim.draw import draw
from jaxserve.sim.history import History
from jaxserve.sim.loads import Loads
from jaxserve.sim.setup import Setup
from jaxserve.sim.world import Failed, World
from kv.config import ConnectorConfig
from kv.connectors.nixl import NixlConnector
from kv.host import HostDriver
from kv.moves import Lease, Loaded, RemoteSource, Track, Unlease, Untrack
from kv.transfer_fetch import Fetch
from kv.transfer_peer import Peer
from kv.transfers import Transfers
from tests.sim.test_excuses import broken

SEEDS = 40
EVENTS = 500
NO_FAULT = "no fault of its own explains it"


def _found(said: str) -> bool:
    return NO_FAULT in said


def _recomputes(clockwork: Clockwork) -> Setup:
    """A world in which no request ends with an error for a load: what fails is computed."""
    setup = draw(clockwork)
    nodes = []
    for node in setup.nodes:
        transfer = node.scheduler.transfer
        if transfer is not None:
            node = replace(node, scheduler=replace(node.scheduler, transfer=_mild(transfer)))
        nodes.append(node)
    return replace(setup, nodes=tuple(nodes))


def _mild(config: ConnectorConfig) -> ConnectorConfig:
    children = tuple(_mild(child) for child in config.children)
    return replace(config, failure_policy="recompute", children=children)


def _with_all_faults(seeds: int) -> bool:
    """Whether one of these worlds, under whatever faults they have, has found it."""
    for seed in range(seeds):
        try:
            World(seed, _recomputes).run(EVENTS)
        except Failed as failed:
            if _found(str(failed)):
                return True
    return False


def _fails_every(monkeypatch: pytest.MonkeyPatch, times: int, error: str) -> None:
    """Every so many loads from a peer, one says that it has failed, and has not."""
    count = 0
    right = Fetch.loaded

    def loaded(self: Fetch, said: str | None, stage: str, *, safe: bool) -> Loaded:
        nonlocal count
        count += 1
        if said is None and safe and count % times == 0:
            self._verified = 0
            return right(self, error, "transfer", safe=safe)
        return right(self, said, stage, safe=safe)

    monkeypatch.setattr(Fetch, "loaded", loaded)


@pytest.mark.parametrize(
    "error",
    [
        "it did not feel like it",
        "1 pages differ from what the peer holds",
        "no end within 5 s",
        "the peer did not confirm: no answer in time",
        "the peer's pages are stale: lease: no lease",
    ],
)
def test_a_load_that_fails_for_nothing_is_found_though_its_request_is_answered(
    monkeypatch: pytest.MonkeyPatch, error: str
):
    _fails_every(monkeypatch, 20, error)
    assert _with_all_faults(SEEDS)


def test_a_failed_load_of_one_peer_may_fail_none_of_another(monkeypatch: pytest.MonkeyPatch):
    right = Transfers.poll

    def poll(self: Transfers, now: float) -> Any:
        events = right(self, now)
        if any(isinstance(event, Loaded) and event.error is not None for event in events):
            for peer in self._peers.values():
                for fetch in list(peer._fetches):
                    peer._give_up(fetch, now, "the peer does not answer heartbeats")
        return events

    monkeypatch.setattr(Transfers, "poll", poll)
    assert _with_all_faults(SEEDS)


def test_a_deadline_that_comes_too_early_is_found(monkeypatch: pytest.MonkeyPatch):
    right = Peer.load

    def load(self: Peer, command: Any, source: Any, now: float) -> None:
        right(self, command, source, now)
        for fetch in self._fetches[-1:]:
            fetch.deadline = min(fetch.deadline, now + 0.01)

    monkeypatch.setattr(Peer, "load", load)
    assert any(_found(said) for said in broken(SEEDS, _found))


def test_a_client_that_goes_away_makes_no_load_fail(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Fetch, "settle", lambda self, digests: max(1, len(self.batch)))
    assert any(_found(said) for said in broken(SEEDS, _found, X33=0.01, X7=0.05, X46=0.01))


def test_a_host_tier_that_cannot_copy_by_itself_is_found(monkeypatch: pytest.MonkeyPatch):
    count = 0
    right = HostDriver._write

    def write(self: Any, *args: Any) -> None:
        nonlocal count
        count += 1
        if count % 5 == 0:
            raise MemoryError("no host memory")
        right(self, *args)

    monkeypatch.setattr(HostDriver, "_write", write)
    assert any(_found(said) for said in broken(SEEDS, _found, X27=0.01))


def test_a_lease_that_nobody_tries_to_read_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(NixlConnector, "lookup", lambda self, query: ())
    assert any("reads nothing" in said for said in broken(SEEDS, lambda said: "reads nothing" in said))


def test_a_lease_given_back_while_it_is_read_is_found(monkeypatch: pytest.MonkeyPatch):
    right = Peer.load

    def load(self: Peer, command: Any, source: Any, now: float) -> None:
        right(self, command, source, now)
        self.untrack(command.request_id, source)

    monkeypatch.setattr(Peer, "load", load)
    assert any(_found(said) for said in broken(SEEDS, _found))


def test_a_reader_that_never_says_that_it_has_read_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Peer, "untrack", lambda self, request_id, source: self.tracked.pop(request_id, None))
    assert any(
        "has given it back" in said for said in broken(SEEDS, lambda said: "given it back" in said, X9=0.01)
    )


@pytest.mark.parametrize("let_go", [True, False])
def test_a_lease_may_end_before_a_second_reader_comes_if_the_first_has_let_it_go(let_go: bool):
    """What it said of that is lost, and somebody asks once more."""
    names: dict[str, Any] = {"connector": 0, "request_id": "lent"}
    source = RemoteSource(
        engine_id="p", epoch="p", host="p", port=1, request_id="lent", pages=(), generations=(),
        num_tokens=9, page_size=4,
    )  # fmt: skip
    history = History()
    if let_go:
        history.strike("X7", ("d0", "p"), 0.5)
    loads = Loads(history, {}, set())
    ledger = SimpleNamespace(num_leases=0)

    def happens(host: str, now: float, command: Any) -> Any:
        node = SimpleNamespace(nixl=SimpleNamespace(lease_s=1.0))
        core = SimpleNamespace(state=SimpleNamespace(ledger=ledger))
        engine: Any = SimpleNamespace(epoch=host, host=host, failed=False, node=node, core=core)
        plan: Any = SimpleNamespace(finished=(), moves=SimpleNamespace(commands=(command,)))
        inputs: Any = SimpleNamespace(events=(), pool_moved=False, outcome=None)
        loads._follow(engine, inputs, plan, now)
        return engine

    happens("p", 0.0, Lease(**names, move_id=1, num_tokens=9, pages=(), generations=()))
    happens("d0", 0.1, Track(connector=0, request_id="first", source=source))
    if let_go:
        happens("d0", 0.5, Untrack(connector=0, request_id="first"))
    happens("p", 60.0, Unlease(**names))
    reader = happens("d1", 60.1, Track(connector=0, request_id="second", source=source))
    assert loads._lease_is_over(reader, source) == let_go
