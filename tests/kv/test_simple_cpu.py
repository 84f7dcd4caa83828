"""What SimpleCPUOffloadConnector stores and finds, eager and lazy."""

from kv.config import SIMPLE_CPU, ConnectorConfig
from kv.connectors.base import Connector, FullPages, Later, Query, StoreOrder
from kv.connectors.simple_cpu import SimpleCpuOffloadConnector
from kv.moves import HostSource

SIZE = 4
NAMES = [bytes([number]) for number in range(20)]


def connector(
    *, slots: int = 16, lazy: bool = False, windows: tuple[int | None, ...] = (None,), target: int = 4
):
    config = ConnectorConfig(kind=SIMPLE_CPU, role="kv_both", host_slots=slots, lazy_offload=lazy)
    return SimpleCpuOffloadConnector(config, index=0, windows=windows, page_size=SIZE, target_pages=target)


def full(first: int, last: int, prompt_tokens: int = 6) -> FullPages:
    return FullPages(
        request_id="a", names=NAMES[:last], tables=(tuple(range(50, 50 + last)),), first=first, last=last,
        num_prompt_tokens=prompt_tokens, page_size=SIZE,
    )  # fmt: skip


def hit(tier: Connector, tokens: int, computed: int = 0) -> int:
    answer = tier.lookup(
        Query(request_id="b", names=NAMES[: tokens // SIZE], num_tokens=tokens, num_computed=computed,
              page_size=SIZE, windows=(None,), remote=None)
    )  # fmt: skip
    assert not isinstance(answer, Later)
    return sum(offer.num_tokens for offer in answer)


def done(tier: Connector, orders, ok: bool = True) -> list[int]:
    for order in orders:
        tier.stored(order.slots, ok)
    tier.check()
    return [page for order in orders for page in order.pages]


def idle(*pages: int) -> list[tuple[int, int, bytes]]:
    return [(page, 0, NAMES[page]) for page in pages]


def test_eager_stores_decode_pages_too_and_a_hit_leaves_the_last_token():
    tier = connector()
    assert tier.supports_hma
    assert done(tier, tier.offer(full(0, 4))) == [50, 51, 52, 53]
    assert hit(tier, 4 * SIZE) == 3 * SIZE
    assert hit(tier, 4 * SIZE + 1) == 4 * SIZE
    assert hit(tier, 4 * SIZE, computed=3 * SIZE) == 0
    assert hit(tier, 4 * SIZE + 1, computed=2 * SIZE) == 2 * SIZE
    assert tier.offer_idle(idle(1, 2)) == ()


def test_lazy_saves_what_is_evicted_next_up_to_the_target():
    tier = connector(lazy=True)
    assert tier.offer(full(0, 4)) == ()
    orders = tier.offer_idle(idle(3, 1, 2, 5, 7, 8))
    assert [order.pages for order in orders] == [(3, 1, 2, 5)]
    assert tier.offer_idle(idle(3, 1, 2, 5, 7, 8)) == (), "being saved counts"
    done(tier, orders)
    assert tier.offer_idle(idle(3, 1, 2, 5, 7, 8)) == (), "saved counts"
    assert done(tier, tier.offer_idle(idle(2, 5, 7, 8))) == [7, 8], "two were evicted: two more are saved"
    assert tier.take_outcomes() == [(0, "stored", 6)]
    assert hit(tier, 4 * SIZE) == 0, "page 0 was never idle"


def test_a_lazy_tier_smaller_than_the_target_does_not_copy_for_ever():
    tier = connector(lazy=True, slots=2)
    assert done(tier, tier.offer_idle(idle(1, 2, 3, 4))) == [1, 2]
    for _ in range(3):
        assert tier.offer_idle(idle(1, 2, 3, 4)) == ()
    assert tier.take_outcomes() == [(0, "dropped_cpu_full", 1), (0, "stored", 2)]
    assert done(tier, tier.offer_idle(idle(3, 4, 5, 6))) == [3, 4], "what left the walk makes room"


def test_a_failed_lazy_store_is_tried_again():
    tier = connector(lazy=True)
    assert done(tier, tier.offer_idle(idle(1)), ok=False) == [1]
    assert done(tier, tier.offer_idle(idle(1))) == [1]


def test_groups_are_saved_on_their_own_and_a_window_of_one_needs_no_page():
    tier = connector(lazy=True, windows=(None, SIZE + 1, 1))
    shown = [(7, 1, NAMES[0]), (8, 2, NAMES[0]), (9, 0, NAMES[0])]
    orders = tier.offer_idle(shown)
    assert orders == (StoreOrder(connector=0, pages=(7, 9), slots=(1, 2)),)
    done(tier, orders)
    answer = tier.lookup(
        Query(request_id="b", names=NAMES[:2], num_tokens=9, num_computed=0, page_size=SIZE,
              windows=(None, SIZE + 1, 1), remote=None)
    )  # fmt: skip
    assert not isinstance(answer, Later)
    assert [offer.source for offer in answer] == [HostSource(slots=((2,), (1,), (0,)))]
