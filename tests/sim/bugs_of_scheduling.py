"""Historic bugs in what decides: pages, names, admission, accounting, ends."""

from dataclasses import replace
from typing import Any

import numpy as np

import kv.prefix
import scheduler.admit
import scheduler.fill
import scheduler.leases
import scheduler.loads
import scheduler.moves
import scheduler.settle
import scheduler.step
import scheduler.stores
from jaxserve.inbox import Inbox
from kv.ledger import Ledger, Row
from kv.moves import RemoteSource, Store
from kv.types import DUMMY_PAGE
from scheduler.settle import end
from scheduler.state import release_row
from scheduler.types import FinishReason
from tests.sim.planting import Planted, Swap


def _frees_aborted_load(right: Any) -> Any:
    def drop_fetch(state: Any, sequence: Any) -> None:
        moves = () if sequence.fetch is None else tuple(sequence.fetch.moves)
        right(state, sequence)
        for row in [state.ledger.get(move_id) for move_id in moves]:
            if row is not None and isinstance(row.move.source, RemoteSource):
                state.ledger.close(row)
                release_row(state, row)

    return drop_fetch


def _asserts_known_lease(right: Any) -> Any:
    def read(state: Any, request_id: str) -> None:
        assert state.ledger.lease(request_id) is not None, f"{request_id} is unknown"
        right(state, request_id)

    return read


def _counts_loads_against_hits(right: Any) -> Any:
    def attribute(sequence: Any, tier: str | None, upto: int) -> None:
        right(sequence, tier, upto)
        if not sequence.prefilled and sequence.index == 0:
            cached = min(upto, len(sequence.request.prompt_token_ids))
            sequence.hit = cached - sum(sequence.external.values())

    return attribute


def _counts_hits_as_loaded(right: Any) -> Any:
    def attribute(sequence: Any, tier: str | None, upto: int) -> None:
        if tier is not None:
            sequence.settled = 0
        right(sequence, tier, upto)

    return attribute


def _takes_any_id(right: Any) -> Any:
    def submit(self: Any, live: Any) -> None:
        self._live.pop(live.request.request_id, None)
        right(self, live)

    return submit


def _takes_any_arrival(right: Any) -> Any:
    def enqueue(state: Any, arrivals: Any, limits: Any) -> Any:
        for request in arrivals:
            state.sequences.pop((request.request_id, 0), None)
        return right(state, arrivals, limits)

    return enqueue


def _aborts_first_only(right: Any) -> Any:
    def abort(state: Any, request_ids: Any) -> Any:
        firsts = (state.sequences.get((request_id, 0)) for request_id in request_ids)
        return [end(state, first, FinishReason.ABORT) for first in firsts if first is not None]

    return abort


def _aborts_known_only(right: Any) -> Any:
    def abort(state: Any, request_ids: Any) -> Any:
        for request_id in request_ids:
            assert (request_id, 0) in state.sequences, f"{request_id} is unknown"
        return right(state, request_ids)

    return abort


def _applies_stale_tokens(right: Any) -> Any:
    def apply(state: Any, flight: Any, outcome: Any, stops: Any) -> Any:
        epochs = state.columns.epochs[flight.rows.slots]
        return right(state, replace(flight, epochs=epochs), outcome, stops)

    return apply


def _leases_nothing(right: Any) -> Any:
    return lambda pages: ()


def _stores_without_holding(right: Any) -> Any:
    def store(state: Any, order: Any) -> None:
        move = Store(
            move_id=state.ledger.new_id(), connector=order.connector, pages=order.pages, slots=order.slots
        )
        state.ledger.open(Row(move=move, pages=()))
        state.news.commands.append(move)

    return store


def _publishes_early(right: Any) -> Any:
    def start_loads(state: Any, sequence: Any, found: Any, offers: Any, queried: int) -> None:
        right(state, sequence, found, offers, queried)
        size, first = state.config.page_size, len(found[0])
        for row in [state.ledger.get(move_id) for move_id in sorted(sequence.fetch.moves)]:
            for group, pages in enumerate(row.move.pages):
                for entry, page in enumerate(pages[: row.move.num_tokens // size], row.move.first_page):
                    named = first <= entry < len(sequence.names) - 1 and page != DUMMY_PAGE
                    if named and state.prefix.insert(group, sequence.names[entry + 1], page):
                        state.pages.mark_cached(page)

    return start_loads


def _leaves_window_early(right: Any) -> Any:
    def leave_window(state: Any, slots: np.ndarray) -> None:
        state.columns.num_computed[slots] += 1
        right(state, slots)
        state.columns.num_computed[slots] -= 1

    return leave_window


def _names_without_prefix(right: Any) -> Any:
    def extend(parent: bytes, tokens: np.ndarray, page_size: int) -> list[bytes]:
        whole = range(0, len(tokens) // page_size * page_size, page_size)
        return [right(b"", tokens[start : start + page_size], page_size)[0] for start in whole]

    return extend


def _names_without_salt(right: Any) -> Any:
    return lambda cache_key, salt, *, private="": right(cache_key, "", private=private)


def _keeps_lost_prefixes(right: Any) -> Any:
    return lambda state: None


def _wraps_move_ids(right: Any) -> Any:
    return lambda self: right(self) % 8


def _overwrites_moves(right: Any) -> Any:
    def open_row(self: Any, row: Any) -> None:
        self._rows.pop(row.move.move_id, None)
        right(self, row)

    return open_row


def _keeps_place_in_queue(right: Any) -> Any:
    def forget(self: Any, live: Any) -> None:
        self._live.pop(live.request.request_id, None)

    return forget


def _computes_again(right: Any) -> Any:
    def place_fetched(state: Any, batch: Any, sequence: Any) -> Any:
        if all(window is None for window in state.config.windows):
            sequence.fetch.tokens = sequence.fetch.hit
        return right(state, batch, sequence)

    return place_fetched


SCHEDULING = (
    Planted(
        name="aborted load",
        comes_from="vLLM 32255",
        failure="F10",
        what="pages of an aborted load go back to the pool while they are still being written",
        laws=("I5",),
        swaps=(Swap(where=scheduler.settle, name="drop_fetch", wrong=_frees_aborted_load),),
    ),
    Planted(
        name="late end",
        comes_from="vLLM 43226",
        failure="F11",
        what="that a peer has read, told for a lease that is over, is an assertion",
        laws=("I17",),
        swaps=(Swap(where=scheduler.moves, name="read", wrong=_asserts_known_lease),),
    ),
    Planted(
        name="negative hit",
        comes_from="vLLM 36755",
        failure="F17",
        what="local hits are what is cached now less what was loaded, also before a preemption",
        laws=("I11", "I17"),
        swaps=(Swap(where=scheduler.admit, name="attribute", wrong=_counts_loads_against_hits),),
    ),
    Planted(
        name="counted twice",
        comes_from="LMCache 2912",
        failure="F17",
        what="what was found locally before a load counts as loaded too",
        laws=("I11", "I17"),
        swaps=(Swap(where=scheduler.admit, name="attribute", wrong=_counts_hits_as_loaded),),
    ),
    Planted(
        name="one id, two users",
        comes_from="vLLM 10583",
        failure="F18",
        what="a request id in use is accepted, and the new request takes the old one's place",
        laws=("I1-I3", "I7", "I12", "I14", "I15", "I17"),
        swaps=(
            Swap(where=Inbox, name="submit", wrong=_takes_any_id),
            Swap(where=scheduler.step, name="enqueue", wrong=_takes_any_arrival),
        ),
    ),
    Planted(
        name="stale tokens",
        comes_from="vLLM 49620",
        failure="F19",
        what="a step's tokens are applied to slots that have changed hands since",
        laws=("I14", "I16", "I17"),
        swaps=(Swap(where=scheduler.settle, name="_apply", wrong=_applies_stale_tokens),),
    ),
    Planted(
        name="prefill twice",
        comes_from="vLLM 26896",
        failure="F20",
        what="a prompt whose pages have been loaded is computed all the same",
        laws=("I11",),
        swaps=(Swap(where=scheduler.admit, name="_place_fetched", wrong=_computes_again),),
    ),
    Planted(
        name="abort of n",
        comes_from="vLLM 14326",
        failure="F21",
        what="an abort ends the first of a request's n sequences; the others go on for nobody",
        laws=("I2",),
        swaps=(Swap(where=scheduler.step, name="abort", wrong=_aborts_first_only),),
    ),
    Planted(
        name="abort kills",
        comes_from="LMCache 3688",
        failure="F36",
        what="the abort of a request that is over is an assertion",
        laws=("I17",),
        swaps=(Swap(where=scheduler.step, name="abort", wrong=_aborts_known_only),),
    ),
    Planted(
        name="lease without pages",
        comes_from="Mooncake 850",
        failure="F37",
        what="leased pages are not held: a slow reader reads what has taken their place",
        laws=("I7", "I9", "I10", "I14", "I17"),
        swaps=(Swap(where=scheduler.leases, name="held", wrong=_leases_nothing),),
    ),
    Planted(
        name="store race",
        comes_from="vLLM 45704",
        failure="F13",
        what="pages that are being copied to the host tier are not held meanwhile",
        laws=("I5", "I6", "I8"),
        swaps=(Swap(where=scheduler.stores, name="_store", wrong=_stores_without_holding),),
    ),
    Planted(
        name="found before it came",
        comes_from="vLLM 39146",
        failure="F4",
        what="pages enter the prefix cache when their load begins",
        laws=("I4", "I5", "I7", "I14"),
        swaps=(Swap(where=scheduler.admit, name="start_loads", wrong=_publishes_early),),
    ),
    Planted(
        name="short window",
        comes_from="vLLM 52627",
        failure="F2",
        what="a sliding window gives its last page back one token too early",
        laws=("I4", "I7", "I14"),
        swaps=(Swap(where=scheduler.fill, name="leave_window", wrong=_leaves_window_early),),
    ),
    Planted(
        name="wrong prefix",
        comes_from="Mooncake 4153",
        failure="F38",
        what="a page's name is made of its own tokens, without those before it",
        laws=("I7",),
        swaps=(Swap(where=kv.prefix, name="extend", wrong=_names_without_prefix),),
    ),
    Planted(
        name="salt left out",
        comes_from="CVE-2025-46570",
        failure="T14",
        what="the cache salt is not part of names, so tenants find each other's prefixes",
        laws=("I7", "I23"),
        swaps=(Swap(where=kv.prefix, name="root", wrong=_names_without_salt),),
    ),
    Planted(
        name="garbage after loss",
        comes_from="vLLM 17103",
        failure="F46",
        what="the prefix cache outlives the loss of the pool's content",
        laws=("I7",),
        swaps=(Swap(where=scheduler.settle, name="forget_prefixes", wrong=_keeps_lost_prefixes),),
    ),
    Planted(
        name="move ids collide",
        comes_from="CVE-2026-94627",
        failure="F47",
        what="the numbers of moves wrap, and a new move takes the place of one under way",
        laws=("I1-I3", "I2", "I5", "I12", "I17"),
        swaps=(
            Swap(where=Ledger, name="new_id", wrong=_wraps_move_ids),
            Swap(where=Ledger, name="open", wrong=_overwrites_moves),
        ),
    ),
    Planted(
        name="slot leak",
        comes_from="SGLang 9266",
        failure="F28",
        what="a request that ends before it ran keeps its place in the queue",
        laws=("I12", "I18"),
        swaps=(Swap(where=Inbox, name="forget", wrong=_keeps_place_in_queue),),
    ),
)
