"""Composition: a prefix from one child and the rest from others, cheapest first, without a gap."""

from hypothesis import given
from hypothesis import strategies as st

from kv.config import NIXL, SIMPLE_CPU, ConnectorConfig
from kv.connectors.base import FullPages, Later, Query
from kv.connectors.multi import MultiConnector
from kv.connectors.nixl import NixlConnector
from kv.connectors.simple_cpu import SimpleCpuOffloadConnector
from kv.moves import HOST, P2P, RemoteSource

SIZE = 4
NAMES = [bytes([number]) * 16 for number in range(1, 33)]
ROLE = {"kind": NIXL, "role": "kv_consumer"}


def tier(index: int) -> SimpleCpuOffloadConnector:
    config = ConnectorConfig(kind=SIMPLE_CPU, role="kv_both", host_slots=40)
    return SimpleCpuOffloadConnector(config, index=index, windows=(None,), page_size=SIZE)


def fill(child: SimpleCpuOffloadConnector, pages: int) -> None:
    full = FullPages(
        request_id="w", names=NAMES[:pages], tables=(tuple(range(1, pages + 1)),), first=0, last=pages,
        num_prompt_tokens=pages * SIZE, page_size=SIZE,
    )  # fmt: skip
    for order in child.offer(full):
        child.stored(order.slots, True)


def query(tokens: int, computed: int, remote: bool) -> Query:
    pages = (tuple(range(1, -(-tokens // SIZE) + 1)),)
    source = RemoteSource(
        engine_id="p", epoch="0" * 32, host="h", port=1, request_id="a", pages=pages, generations=pages,
        num_tokens=tokens, page_size=SIZE,
    )  # fmt: skip
    return Query(
        request_id="a", names=NAMES[: tokens // SIZE], num_tokens=tokens, num_computed=computed,
        page_size=SIZE, windows=(None,), remote=source if remote else None,
    )  # fmt: skip


@given(
    st.integers(1, 60), st.integers(0, 14), st.integers(0, 14), st.integers(0, 14), st.booleans(),
    st.permutations(["nixl", "one", "two"]),
)  # fmt: skip
def test_offers_follow_each_other_without_a_gap_and_local_tiers_come_first(
    tokens, computed, one, two, remote, order
):
    children = []
    for place, kind in enumerate(order):
        if kind == "nixl":
            children.append(NixlConnector(ConnectorConfig(**ROLE), index=place))
        else:
            children.append(tier(place))
            fill(children[-1], {"one": one, "two": two}[kind])
    start = min(computed, (tokens - 1) // SIZE) * SIZE
    asked = query(tokens, start, remote)
    offers = MultiConnector(children, compose=True).lookup(asked)
    done = start
    for offer in offers:
        assert offer.first_page * SIZE == done and offer.num_tokens > 0
        done += offer.num_tokens
    host = max(start, min(max(one, two), (tokens - 1) // SIZE) * SIZE)
    assert done == (tokens if remote else host)
    tiers = [offer.tier for offer in offers]
    assert tiers == sorted(tiers) and set(tiers) <= {HOST, P2P}
    assert sum(offer.num_tokens for offer in offers if offer.tier == HOST) == host - start
    first = MultiConnector(children).lookup(asked)
    assert len(first) <= 1 and bool(first) == bool(offers)


def test_a_tier_that_stores_a_page_beyond_what_another_has_defers_the_composition():
    first, second = tier(0), tier(1)
    fill(first, 2)
    full = FullPages(
        request_id="w", names=NAMES[:4], tables=((1, 2, 3, 4),), first=0, last=4, num_prompt_tokens=16,
        page_size=SIZE,
    )  # fmt: skip
    (order,) = second.offer(full)
    both = MultiConnector([first, second], compose=True)
    assert isinstance(both.lookup(query(20, 0, False)), Later)
    second.stored(order.slots, True)
    assert [(offer.connector, offer.num_tokens) for offer in both.lookup(query(20, 0, False))] == [
        (0, 8),
        (1, 8),
    ]


def test_no_children_offer_nothing():
    for compose in (False, True):
        assert MultiConnector([], compose=compose).lookup(query(8, 0, True)) == ()
