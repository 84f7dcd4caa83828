"""What NixlConnector decides, by its role."""

import pytest

from kv.config import BOTH, CONSUMER, NIXL, PRODUCER, ConnectorConfig
from kv.connectors.base import LeaseOrder, Query
from kv.connectors.nixl import NixlConnector
from kv.moves import RemoteSource, Track, Untrack

SIZE = 4


def connector(role: str) -> NixlConnector:
    return NixlConnector(ConnectorConfig(kind=NIXL, role=role), index=2)


def source(num_tokens: int) -> RemoteSource:
    pages = (tuple(range(1, -(-num_tokens // SIZE) + 1)),)
    return RemoteSource(
        engine_id="p", epoch="0" * 32, host="h", port=1, request_id="a", pages=pages, generations=pages,
        num_tokens=num_tokens, page_size=SIZE,
    )  # fmt: skip


def query(remote: RemoteSource | None, known: int, computed: int = 0) -> Query:
    return Query(
        request_id="a", names=[b"x"] * (known // SIZE), num_tokens=known, num_computed=computed,
        page_size=SIZE, windows=(None,), remote=remote,
    )  # fmt: skip


@pytest.mark.parametrize("role", [CONSUMER, BOTH])
@pytest.mark.parametrize(("prompt", "computed"), [(1, 0), (8, 0), (9, 8), (8, 4), (17, 12)])
def test_all_of_the_prompt_beyond_the_local_hit_is_offered(role, prompt, computed):
    (offer,) = connector(role).lookup(query(source(prompt), prompt, computed))
    assert (offer.connector, offer.first_page) == (2, computed // SIZE)
    assert offer.num_tokens == prompt - computed


@pytest.mark.parametrize(
    ("remote", "known", "computed"),
    [(None, 8, 0), (source(8), 8, 8), (source(8), 12, 8), (source(9), 8, 0)],
    ids=["no peer", "all is here", "all of the prompt is here", "the peer knows more than we do"],
)
def test_nothing_is_offered_where_there_is_nothing_to_read(remote, known, computed):
    assert connector(CONSUMER).lookup(query(remote, known, computed)) == ()


def test_a_producer_reads_from_nobody():
    ours, remote = connector(PRODUCER), source(8)
    assert ours.lookup(query(remote, 8)) == ()
    assert ours.arrived("a", remote) == ours.released("a", remote) == ()


@pytest.mark.parametrize("role", [CONSUMER, BOTH])
def test_a_peer_is_met_and_let_go_by_name(role):
    ours, remote = connector(role), source(8)
    assert ours.arrived("a", remote) == (Track(connector=2, request_id="a", source=remote),)
    assert ours.released("a", remote) == (Untrack(connector=2, request_id="a"),)
    assert ours.arrived("a", None) == ours.released("a", None) == ()


@pytest.mark.parametrize("role", [PRODUCER, CONSUMER, BOTH])
@pytest.mark.parametrize("wants", [False, True])
@pytest.mark.parametrize("completed", [False, True])
def test_pages_are_kept_for_completed_requests_that_ask_for_it_by_engines_that_serve_peers(
    role, wants, completed
):
    kept = connector(role).finished("a", wants_lease=wants, completed=completed)
    wanted = wants and completed and role != CONSUMER
    assert kept == (LeaseOrder(connector=2) if wanted else None)


def test_a_store_that_it_never_ordered_is_an_error():
    with pytest.raises(ValueError, match="no store"):
        connector(BOTH).stored((1,), True)
