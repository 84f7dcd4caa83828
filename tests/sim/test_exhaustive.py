"""Every interleaving of 1 prefill and 1 decode engine, 3 pages each, 2 requests and one transfer."""

from collections.abc import Callable

import pytest

from jaxserve.sim.exhaustive import Found, explore
from jaxserve.sim.small_world import Variant
from kv.transfer_fetch import Fetch
from kv.transfer_peer import Peer


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Prints past pytest, so that the counts are seen in every log."""

    def say(*words: object) -> None:
        with capsys.disabled():
            print("\n ", *words)

    return say


def test_every_interleaving_without_a_fault_ends_with_two_right_answers(tell: Callable[..., None]):
    variant = Variant(outputs=1, faults=())
    explored = explore(variant)
    tell(f"no fault; {variant}: {explored}")
    assert explored.ends > 0 and explored.states > 500


@pytest.mark.parametrize(
    "fault",
    [
        "transfer cannot be posted",
        pytest.param("step fails", marks=pytest.mark.slow),
        pytest.param("kill", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_every_interleaving_with_one_fault_ends_rightly(fault: str, tell: Callable[..., None]):
    """At whatever moment it strikes, every answer is right or explained, and every page comes back."""
    explored = explore(Variant(outputs=1, faults=(fault,)))
    tell(f"{fault}: {explored}")
    without = explore(Variant(outputs=1, faults=()))
    assert explored.ends > without.ends and explored.states > without.states


@pytest.mark.slow
def test_leaving_out_one_order_of_what_commutes_leaves_out_no_state(tell: Callable[..., None]):
    variant = Variant(outputs=1, faults=())
    less, all_orders = explore(variant), explore(variant, commuting=False)
    tell(f"one order: {less}; both: {all_orders}")
    assert less.states == all_orders.states and less.runs < all_orders.runs


def test_pages_of_a_transfer_given_up_that_return_at_once_are_found(monkeypatch: pytest.MonkeyPatch):
    def give_up(self: Peer, fetch: Fetch, now: float, error: str) -> None:
        self._end(fetch, error, "transfer", safe=True)  # as if nobody could write them any more

    monkeypatch.setattr(Peer, "_give_up", give_up)
    with pytest.raises(Found, match="I5"):
        explore(Variant(outputs=1, faults=("transfer never ends",)))
