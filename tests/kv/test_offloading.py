"""What OffloadingConnector stores and finds."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv.config import OFFLOADING, ConnectorConfig
from kv.connectors import host_tier
from kv.connectors.base import LATER, Answer, Connector, FullPages, Later, Offer, Query, StoreOrder
from kv.connectors.offloading import OffloadingConnector
from kv.moves import HOST, HostSource, RemoteSource
from kv.types import DUMMY_PAGE

SIZE = 4


def connector(
    *, slots: int = 64, chunk: int = 1, windows: tuple[int | None, ...] = (None,), **options: object
) -> OffloadingConnector:
    config = ConnectorConfig(
        kind=OFFLOADING, role="kv_both", host_slots=slots, pages_per_chunk=chunk, **options
    )
    return OffloadingConnector(config, index=3, windows=windows, page_size=SIZE)


def names_of(prompt: str, count: int) -> list[bytes]:
    return [f"{prompt}{number}".encode() for number in range(count)]


def full(
    prompt: str,
    first: int,
    last: int,
    *,
    prompt_tokens: int = 1000,
    tables: Sequence[Sequence[int]] | None = None,
) -> FullPages:
    pages = [tuple(range(100, 100 + last))] if tables is None else [tuple(table) for table in tables]
    return FullPages(
        request_id=prompt, names=names_of(prompt, last), tables=tuple(pages), first=first, last=last,
        num_prompt_tokens=prompt_tokens, page_size=SIZE,
    )  # fmt: skip


def query(prompt: str, tokens: int, computed: int = 0, windows: tuple[int | None, ...] = (None,)) -> Query:
    return Query(
        request_id="later", names=names_of(prompt, tokens // SIZE), num_tokens=tokens, num_computed=computed,
        page_size=SIZE, windows=windows, remote=None,
    )  # fmt: skip


def done(to: Connector, orders: Sequence[StoreOrder], ok: bool = True) -> list[int]:
    for order in orders:
        assert order.connector == 3 and len(order.pages) == len(order.slots)
        to.stored(order.slots, ok)
    to.check()
    return [page for order in orders for page in order.pages]


def tokens(answer: Answer) -> int:
    assert not isinstance(answer, Later)
    return sum(offer.num_tokens for offer in answer)


def only(answer: Answer) -> Offer:
    assert not isinstance(answer, Later) and len(answer) == 1
    return answer[0]


def test_it_is_a_connector_of_several_page_groups_without_peers():
    tier: Connector = connector()
    assert tier.supports_hma
    assert (*tier.arrived("a", None), *tier.released("a", None)) == ()
    assert tier.finished("a", wants_lease=True, completed=True) is None
    assert (*tier.offer_idle([(1, 0, b"x")]),) == ()


@pytest.mark.parametrize("prompt_only", [True, False])
def test_a_page_half_prompt_half_output_is_stored_only_with_decode_pages(prompt_only):
    tier = connector(offload_prompt_only=prompt_only)
    assert done(tier, tier.offer(full("a", 0, 2, prompt_tokens=10))) == [100, 101]
    assert done(tier, tier.offer(full("a", 2, 4, prompt_tokens=10))) == ([] if prompt_only else [102, 103])
    assert tokens(tier.lookup(query("a", 100))) == SIZE * (2 if prompt_only else 4)


def test_only_whole_chunks_are_stored_also_across_steps():
    tier = connector(chunk=3)
    assert done(tier, tier.offer(full("a", 0, 2))) == []
    assert done(tier, tier.offer(full("a", 2, 4))) == [100, 101, 102]
    assert done(tier, tier.offer(full("a", 4, 9))) == [103, 104, 105, 106, 107, 108]
    assert tier.take_outcomes() == [(3, "stored", 9)]
    assert tier.take_outcomes() == []
    assert tier.tiers() == [(3, 9, 0, 0, 63)], "64 slots are 21 chunks"
    assert tokens(tier.lookup(query("a", 9 * SIZE + 1))) == 9 * SIZE
    assert tokens(tier.lookup(query("a", 8 * SIZE))) == 6 * SIZE
    offer = only(tier.lookup(query("a", 8 * SIZE, computed=SIZE)))
    assert (offer.tier, offer.connector, offer.first_page, offer.num_tokens) == (HOST, 3, 1, 5 * SIZE)
    assert offer.source == HostSource(slots=((2, 3, 4, 5, 6),))


def test_a_hit_may_reach_the_last_token_with_full_attention_only():
    tier, window = connector(chunk=2), connector(chunk=2, windows=(None, 2 * SIZE + 1))
    done(tier, tier.offer(full("a", 0, 4)))
    done(window, window.offer(full("a", 0, 4, tables=[range(1, 5), range(11, 15)])))
    assert tokens(tier.lookup(query("a", 4 * SIZE))) == 4 * SIZE
    assert tokens(window.lookup(query("a", 4 * SIZE, windows=(None, 9)))) == 2 * SIZE
    assert tokens(window.lookup(query("a", 4 * SIZE + 1, windows=(None, 9)))) == 4 * SIZE
    assert tier.lookup(query("a", 4 * SIZE, computed=4 * SIZE)) == ()
    assert tier.lookup(query("b", 4 * SIZE)) == ()
    assert tier.lookup(query("a", 4 * SIZE, computed=3)) == (), (
        "a promise that ends inside a page ends the run"
    )


def test_a_sliding_window_group_stores_a_chunk_whose_end_it_still_has():
    tier = connector(chunk=2, windows=(None, SIZE + 1))
    tables = [[1, 2, 3, 4], [DUMMY_PAGE, DUMMY_PAGE, DUMMY_PAGE, 14]]
    assert done(tier, tier.offer(full("a", 0, 4, tables=tables))) == [1, 2, 3, 4, 14]
    assert tier.take_outcomes() == [(3, "stored", 5)]
    offer = only(tier.lookup(query("a", 100, windows=(None, 5))))
    assert offer.source == HostSource(slots=((1, 2, 3, 4), (0, 0, 0, 6)))
    assert tier.lookup(query("a", 2 * SIZE + 1)) == (), "nothing is known of the window group's first chunk"
    many = connector(chunk=2, windows=(None, 100))
    done(many, many.offer(full("a", 0, 2, tables=[[1, 2], [DUMMY_PAGE, 12]])))
    assert many.take_outcomes() == [(3, "dropped_null_block", 1), (3, "stored", 2)]


def test_a_store_in_flight_defers_the_lookup_and_is_not_stored_twice():
    tier = connector()
    orders = tier.offer(full("a", 0, 2))
    assert tier.lookup(query("a", 2 * SIZE)) is LATER
    assert tier.offer(full("a", 0, 2)) == ()
    assert tier.take_outcomes() == [(3, "skipped_in_flight", 2)]
    done(tier, orders)
    assert tokens(tier.lookup(query("a", 2 * SIZE))) == 2 * SIZE
    assert tier.offer(full("a", 0, 2)) == ()
    assert tier.take_outcomes() == [(3, "skipped_already_cached", 2), (3, "stored", 2)]


def test_a_failed_store_is_forgotten_and_may_be_tried_again():
    tier = connector()
    done(tier, tier.offer(full("a", 0, 2)), ok=False)
    assert tier.take_outcomes() == [] and tier.tiers() == [(3, 0, 0, 0, 64)]
    assert tier.lookup(query("a", 2 * SIZE)) == ()
    assert done(tier, tier.offer(full("a", 0, 2))) == [100, 101]


def test_a_full_tier_drops_tails_and_never_a_prompts_own_head():
    tier = connector(slots=3)
    assert done(tier, tier.offer(full("a", 0, 2))) == [100, 101]
    assert done(tier, tier.offer(full("a", 2, 6))) == [102]
    assert tier.take_outcomes() == [(3, "dropped_cpu_full", 3), (3, "stored", 3)]
    assert tokens(tier.lookup(query("a", 100))) == 3 * SIZE
    assert done(tier, tier.offer(full("b", 0, 1))) == [100], "another prompt evicts"


def test_heads_survive_tails_once_a_request_has_ended():
    tier = connector(slots=4)
    for step in range(4):
        done(tier, tier.offer(full("a", step, step + 1)))
    tier.finished("a", wants_lease=False, completed=False)
    done(tier, tier.offer(full("b", 0, 2)))
    assert tokens(tier.lookup(query("a", 100))) == 2 * SIZE


def test_what_is_loaded_is_pinned_until_the_load_has_ended():
    tier = connector(slots=2)
    done(tier, tier.offer(full("a", 0, 2)))
    answer = tier.lookup(query("a", 2 * SIZE))
    assert tier.tiers() == [(3, 2, 0, 0, 2)], "a lookup pins nothing"
    tier.allocated("x", ((1, 2),), ())
    assert tier.tiers() == [(3, 2, 0, 0, 2)], "another connector was chosen"
    tier.allocated("x", ((1, 2),), [only(answer)])
    tier.allocated("y", ((3, 4),), [only(answer)])
    assert tier.tiers() == [(3, 2, 2, 0, 2)]
    assert tier.offer(full("b", 0, 1)) == ()
    tier.load_ended(only(answer).source)
    assert tier.offer(full("b", 0, 1)) == ()
    tier.load_ended(only(answer).source)
    assert tier.take_outcomes() == [(3, "dropped_cpu_full", 2), (3, "stored", 2)]
    assert done(tier, tier.offer(full("b", 0, 1))) == [100]
    with pytest.raises(ValueError, match="no load holds it"):
        tier.load_ended(only(answer).source)


def test_a_page_that_did_not_arrive_good_is_forgotten():
    tier = connector()
    done(tier, tier.offer(full("a", 0, 3)))
    offer = only(tier.lookup(query("a", 3 * SIZE)))
    tier.allocated("x", ((1, 2, 3),), [offer])
    tier.load_ended(offer.source, 1)
    tier.check()
    assert tokens(tier.lookup(query("a", 3 * SIZE))) == SIZE
    assert done(tier, tier.offer(full("a", 0, 3))) == [101], "and is stored again"
    assert tokens(tier.lookup(query("a", 3 * SIZE))) == 3 * SIZE


def test_a_reset_forgets_all_and_frees_what_moves_use_when_they_end():
    tier = connector(slots=4)
    done(tier, tier.offer(full("a", 0, 2)))
    offer = only(tier.lookup(query("a", 2 * SIZE)))
    tier.allocated("x", ((1, 2),), [offer])
    orders = tier.offer(full("b", 0, 1))
    tier.reset()
    tier.check()
    assert tier.lookup(query("a", 2 * SIZE)) == () and tier.tiers() == [(3, 3, 3, 1, 4)]
    done(tier, orders)
    assert tier.lookup(query("b", SIZE)) == ()
    tier.load_ended(offer.source)
    tier.check()
    assert tier.tiers() == [(3, 0, 0, 0, 4)]


def test_the_source_of_a_peer_is_refused():
    peer = RemoteSource(
        engine_id="e", epoch="0" * 32, host="h", port=1, request_id="r", pages=((1,),), generations=((1,),),
        num_tokens=4, page_size=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match="peer"):
        connector().load_ended(peer)


STEPS = st.tuples(st.sampled_from("abc"), st.integers(1, 6), st.sampled_from(["ok", "bad", "end"]))


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(STEPS, max_size=25),
    chunk=st.integers(1, 3), policy=st.sampled_from(["lru", "arc"]),
)  # fmt: skip
def test_what_is_offered_is_what_was_stored_under_that_name(steps, chunk, policy):
    """A twin keeps, per host slot, the page position and prompt that was last copied there."""
    runs = []
    for _ in range(2):
        tier = connector(slots=7, chunk=chunk, eviction_policy=policy)
        content: dict[int, tuple[str, int]] = {}
        length = dict.fromkeys("abc", 0)
        log: list[object] = []
        for prompt, count, what in steps:
            offered = tier.lookup(query(prompt, 60))
            assert offered == tier.lookup(query(prompt, 60)), "asking changes nothing"
            assert not isinstance(offered, Later)
            for offer in offered:
                assert isinstance(offer.source, HostSource)
                assert [content[slot] for slot in offer.source.slots[0]] == [
                    (prompt, position) for position in range(offer.num_tokens // SIZE)
                ]
            first = 0 if length[prompt] >= 12 else length[prompt]
            orders = tier.offer(full(prompt, first, first + count))
            length[prompt] = first + count
            for order in orders:
                content |= {
                    slot: (prompt, page - 100) for page, slot in zip(order.pages, order.slots, strict=True)
                }
            done(tier, orders, ok=what != "bad")
            if what == "end":
                tier.finished(prompt, wants_lease=False, completed=True)
            log += [offered, orders, tier.take_outcomes(), tier.tiers()]
        runs.append(log)
    assert runs[0] == runs[1]


def test_what_is_kept_of_live_requests_is_bounded(monkeypatch):
    monkeypatch.setattr(host_tier, "RANKED_REQUESTS", 2)
    tier = connector(slots=6)
    for prompt in "abc":
        for step in range(2):
            done(tier, tier.offer(full(prompt, step, step + 1)))
    for prompt in "cba":
        tier.finished(prompt, wants_lease=False, completed=True)
    done(tier, tier.offer(full("d", 0, 2)))
    kept = [tokens(tier.lookup(query(prompt, 100))) // SIZE for prompt in "abc"]
    assert kept == [0, 2, 2], "a was not ranked when it ended, so its entries are the oldest"
