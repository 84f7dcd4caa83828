"""Every interleaving of 1 prefill and 1 decode engine, 3 pages each, 2 requests and one transfer."""

from collections.abc import Callable

import pytest

from jaxserve.sim.exhaustive import Explored, Found, explore, main
from jaxserve.sim.small_world import Variant
from jaxserve.sim.steered import FAULTS
from kv.transfer_fetch import Fetch
from kv.transfer_peer import Peer

QUICK = ("lose", "overtaken", "transfer cannot be posted", "step fails")
"""Of a few seconds each; the others run in the slow phase."""
LONG = ("stop",)
"""Longer: only by `python -m jaxserve.sim.exhaustive`."""


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Prints past pytest, so that the counts are seen in every log."""

    def say(*words: object) -> None:
        with capsys.disabled():
            print("\n ", *words)

    return say


@pytest.fixture(scope="module")
def calm() -> Explored:
    return explore(Variant(outputs=1, faults=()))


def test_every_interleaving_without_a_fault_ends_with_two_right_answers(
    calm: Explored, tell: Callable[..., None]
):
    tell(f"no fault: {calm}")
    assert calm.ends > 0 and calm.states > 300


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "fault",
    [
        fault if fault in QUICK else pytest.param(fault, marks=pytest.mark.slow)
        for fault in FAULTS
        if fault not in LONG
    ],
)
def test_every_interleaving_with_one_fault_ends_rightly(
    fault: str, calm: Explored, tell: Callable[..., None]
):
    """At whatever moment it strikes, every answer is right or explained, and every page comes back."""
    explored = explore(Variant(outputs=1, faults=(fault,)))
    tell(f"{fault}: {explored}")
    assert explored.last >= calm.last and explored.states > calm.states


@pytest.mark.parametrize("fault", [None, pytest.param("overtaken", marks=pytest.mark.slow)])
def test_leaving_out_one_order_of_what_commutes_leaves_out_no_state(fault: str | None):
    variant = Variant(outputs=1, faults=() if fault is None else (fault,))
    less = explore(variant, recovered=False, hasty=False)
    all_orders = explore(variant, commuting=False, recovered=False, hasty=False)
    assert less.states == all_orders.states and less.last == all_orders.last
    assert less.events < all_orders.events


@pytest.mark.parametrize("fault", ["overtaken", pytest.param("twice", marks=pytest.mark.slow)])
def test_a_world_that_has_got_over_its_fault_ends_as_one_without(fault: str):
    variant = Variant(outputs=1, faults=(fault,))
    less, followed = explore(variant), explore(variant, recovered=False)
    assert less.last == followed.last and less.states < followed.states


@pytest.mark.parametrize("fault", [None, pytest.param("step fails", marks=pytest.mark.slow)])
def test_clients_that_learn_of_their_ends_at_once_change_no_end(fault: str | None):
    variant = Variant(outputs=1, faults=() if fault is None else (fault,))
    less, later = explore(variant), explore(variant, hasty=False)
    assert less.last == later.last and less.states < later.states


def test_pages_of_a_transfer_given_up_that_return_at_once_are_found(monkeypatch: pytest.MonkeyPatch):
    def give_up(self: Peer, fetch: Fetch, now: float, error: str) -> None:
        self._end(fetch, error, "transfer", safe=True)  # as if nobody could write them any more

    monkeypatch.setattr(Peer, "_give_up", give_up)
    with pytest.raises(Found, match="I5"):
        explore(Variant(outputs=1, faults=("transfer never ends",)))


def test_the_command_prints_a_row_per_fault_and_fails_where_none_is_named(
    capsys: pytest.CaptureFixture[str],
):
    assert main(["--no-fault"]) == 0
    assert "| none | " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([])
