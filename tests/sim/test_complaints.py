"""A mistake of ours is found though it ends nothing but one move, and what NIXL says is none."""

from collections.abc import Callable
from typing import Any

import pytest

from jaxserve.sim.draw import draw
from jaxserve.sim.world import Failed, World
from kv import transfer_agent
from kv.connectors.nixl import NixlConnector
from kv.copies import PointerCopies
from kv.transfer_agent import PoolAgent, page_descs
from kv.transfer_peer import Peer

SEEDS = 12
EVENTS = 500


def _every(times: int, right: Callable[..., Any], wrong: Callable[[], object]) -> Callable[..., Any]:
    """A method that makes a mistake now and then."""
    count = 0

    def method(*args: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count % times == 0:
            wrong()
        return right(*args, **named)

    return method


def _said() -> list[str]:
    """What the first worlds say, up to one that names the mistake."""
    said = []
    for seed in range(SEEDS):
        try:
            World(seed, draw).run(EVENTS)
        except Failed as failed:
            said.append(str(failed))
            if "I13" in said[-1]:
                break
    return said


def _wrong_type() -> object:
    return len(3)  # pyright: ignore[reportArgumentType]


def _wrong_key() -> object:
    return {}["there is none"]


def _asserts() -> object:
    raise AssertionError("it cannot be")


@pytest.mark.parametrize("wrong", [_wrong_type, _wrong_key, _asserts])
def test_a_mistake_in_an_agent_is_found_although_only_a_load_ends(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[], object]
):
    """Where it is caught: an agent's call fails, its load is tried again or its prompt is computed."""
    monkeypatch.setattr(transfer_agent, "page_descs", _every(3, page_descs, wrong))
    assert any("I13" in one and "mistake of ours" in one for one in _said())


def test_a_mistake_in_a_copy_is_found_although_only_a_move_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(PointerCopies, "read", _every(10, PointerCopies.read, _wrong_type))
    assert any("I13" in one and "mistake of ours" in one for one in _said())


@pytest.mark.parametrize(
    ("where", "name"), [(NixlConnector, "lookup"), (Peer, "_confirmed"), (PoolAgent, "post")]
)
def test_a_mistake_in_what_decides_is_found(monkeypatch: pytest.MonkeyPatch, where: Any, name: str):
    monkeypatch.setattr(where, name, _every(10, getattr(where, name), _wrong_type))
    assert any("TypeError" in one for one in _said())
