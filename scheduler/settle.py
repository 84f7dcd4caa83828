"""What happened: accept the sampled tokens, name and publish finished pages, end sequences."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kv import prefix
from kv.moves import Event
from kv.types import DUMMY_PAGE
from metrics.stats import PrefillStats
from scheduler.leases import finish
from scheduler.loads import drop_fetch, let_peer_go
from scheduler.moves import pool_lost, settle_events
from scheduler.preempt import preempt
from scheduler.state import InFlight, SchedulerState, Sequence, Status, push_waiting, vacate
from scheduler.stores import Table, offer_pages
from scheduler.types import Accepted, Finished, FinishReason, Outcome, Preempted, Prefilled, Stop

EMPTY = np.zeros(0, np.int32)
NOTHING_ACCEPTED = Accepted(rows=EMPTY, slots=EMPTY, tokens=EMPTY)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Settled:
    """What an outcome came to."""

    accepted: Accepted = NOTHING_ACCEPTED
    prefilled: tuple[Prefilled, ...] = ()
    finished: tuple[Finished, ...] = ()
    preempted: tuple[Preempted, ...] = ()


def abort(state: SchedulerState, request_ids: Iterable[str]) -> list[Finished]:
    """Ends all sequences of the requests, wherever they are. Unknown ones are ignored: they ended before."""
    ended = []
    for request_id in request_ids:
        first = state.sequences.get((request_id, 0))
        if first is None:  # the parent has ended; forks of it may live
            keys = [key for key in state.sequences if key[0] == request_id]
        else:
            keys = [(request_id, index) for index in range(first.request.sampling.n)]
        alive = [state.sequences[key] for key in keys if key in state.sequences]
        ended += [end(state, sequence, FinishReason.ABORT) for sequence in alive]
    return ended


def settle(
    state: SchedulerState, outcome: Outcome | None, stops: Iterable[Stop], events: tuple[Event, ...] = ()
) -> Settled:
    """Applies the outcome of the plan in flight, then the host's stops, then what became of moves.

    Raises:
        ValueError: the outcome belongs to another plan.
    """
    ordered = {(stop.request_id, stop.index): stop for stop in stops}
    flight, settled = state.in_flight, Settled()
    if outcome is not None:
        if flight is None or flight.step_id != outcome.step_id:
            raise ValueError(f"outcome of step {outcome.step_id} does not belong to the plan in flight")
        state.in_flight = None
        settled = (
            _fail(state, flight, outcome.error) if outcome.error else _apply(state, flight, outcome, ordered)
        )
    stopped = [
        end(state, sequence, stop.reason, stop_reason=stop.stop_reason, message=stop.message)
        for key, stop in ordered.items()
        if (sequence := state.sequences.get(key)) is not None
    ]
    failed = [
        end(state, sequence, FinishReason.ERROR, message=message)
        for sequence, message in settle_events(state, events)
    ]
    return Settled(
        accepted=settled.accepted,
        prefilled=settled.prefilled,
        finished=(*settled.finished, *stopped, *failed),
        preempted=settled.preempted,
    )


def end(
    state: SchedulerState,
    sequence: Sequence,
    reason: FinishReason,
    *,
    stop_reason: int | str | None = None,
    message: str | None = None,
) -> Finished:
    """Ends a sequence and gives back what it holds."""
    slot = sequence.slot
    known = len(sequence.tokens) if slot is None else int(state.columns.num_tokens[slot])
    terms = finish(state, sequence, completed=reason in (FinishReason.STOP, FinishReason.LENGTH))
    if slot is not None:
        vacate(state, sequence)
    drop_fetch(state, sequence)
    let_peer_go(state, sequence)
    sequence.status = Status.FINISHED
    request = sequence.request
    del state.sequences[request.request_id, sequence.index]
    return Finished(
        request_id=request.request_id,
        index=sequence.index,
        slot=slot,
        reason=reason,
        stop_reason=stop_reason,
        num_output_tokens=known - len(request.prompt_token_ids),
        message=message,
        lease=terms,
    )


def forget_prefixes(state: SchedulerState) -> None:
    """Empties the prefix cache. Sequences keep the pages they hold."""
    for page in state.prefix.clear():
        state.pages.unmark_cached(page)


def _fail(state: SchedulerState, flight: InFlight, message: str) -> Settled:
    """The step failed as a whole and the pool's content is lost: its rows end, other sequences start over."""
    forget_prefixes(state)
    owners = [
        state.by_slot[slot]
        for slot in flight.rows.slots[state.columns.epochs[flight.rows.slots] == flight.epochs]
    ]
    finished = [
        end(state, owner, FinishReason.ERROR, message=message) for owner in owners if owner is not None
    ]
    preempted = [preempt(state, sequence) for sequence in tuple(state.running)]
    pool_lost(state)
    return Settled(finished=tuple(finished), preempted=tuple(preempted))


def _apply(
    state: SchedulerState, flight: InFlight, outcome: Outcome, stops: dict[tuple[str, int], Stop]
) -> Settled:
    columns, rows = state.columns, flight.rows
    every = rows.slots.astype(np.intp)  # NumPy indexes five times faster with its own integers
    alive = (columns.epochs[every] == flight.epochs).nonzero()[0]
    slots = every[alive]
    columns.num_computed[slots] = rows.starts[alive] + rows.lens[alive]
    _publish(state, slots)
    _settle_prompts(state, slots)

    sampled = alive[rows.samples[alive]]
    slots = every[sampled]
    tokens = outcome.tokens[sampled].astype(np.int32)
    known = columns.num_tokens[slots]
    columns.tokens[slots, known] = tokens
    columns.num_tokens[slots] = known + 1

    prefilled = _first_tokens(state, slots[rows.num_outputs[sampled] == 0])
    accepted = Accepted(rows=sampled.astype(np.int32), slots=slots.astype(np.int32), tokens=tokens)
    return Settled(
        accepted=accepted, prefilled=tuple(prefilled), finished=tuple(_ends(state, slots, tokens, stops))
    )


def _publish(state: SchedulerState, slots: np.ndarray) -> None:
    """Names the pages that became full and enters them in the prefix cache."""
    columns, size = state.columns, state.config.page_size
    named = columns.named_pages[slots]
    full = (columns.num_computed[slots] >= (named + 1) * size).nonzero()[0]
    if not len(full):
        return
    slots, named = slots[full], named[full]
    whole = columns.num_computed[slots] // size
    columns.named_pages[slots] = whole
    for slot, done, now in zip(slots.tolist(), named.tolist(), whole.tolist(), strict=True):
        sequence = state.by_slot[slot]
        if sequence is None:
            raise ValueError(f"slot {slot} is in a plan but empty")
        names = sequence.names
        if len(names) <= now:
            start = (len(names) - 1) * size
            names += prefix.extend(names[-1], columns.tokens[slot, start : now * size], size)
        for group, table in enumerate(columns.page_tables):
            for page, name in zip(table[slot, done:now].tolist(), names[done + 1 : now + 1], strict=True):
                if page != DUMMY_PAGE and state.prefix.insert(group, name, page):
                    state.pages.mark_cached(page)
        if state.connector is not None:
            tables = [Table(table[slot, :now]) for table in columns.page_tables]
            offer_pages(state, sequence, tables, done, now)


def _settle_prompts(state: SchedulerState, slots: np.ndarray) -> None:
    """Write-once attribution: positions that compute first made usable. Only prompts are attributed."""
    columns = state.columns
    for slot in slots[columns.num_tokens[slots] == columns.num_prompt[slots]]:
        sequence = state.by_slot[slot]
        if sequence is not None:
            sequence.settled = max(sequence.settled, int(columns.num_computed[slot]))


def _first_tokens(state: SchedulerState, slots: np.ndarray) -> Iterable[Prefilled]:
    """Emits a request's prompt statistics once, with its first token, and lets its forks in."""
    prefilled = []
    for slot in slots:
        sequence = state.by_slot[slot]
        if sequence is None or sequence.prefilled:
            continue
        sequence.prefilled = True
        if sequence.index != 0:
            continue
        request = sequence.request
        stats = PrefillStats(
            num_prompt_tokens=len(request.prompt_token_ids),
            local_cache_hit=sequence.hit,
            external_kv_transfer=sum(sequence.external.values()),
            external_by_tier=tuple(sequence.external.items()),
        )
        prefilled.append(Prefilled(request_id=request.request_id, stats=stats))
        for index in range(1, request.sampling.n):
            _fork(state, sequence, index)
    return prefilled


def _fork(state: SchedulerState, parent: Sequence, index: int) -> None:
    """Adds one more sequence for a request whose prompt is computed.

    It finds its prompt's pages in the prefix cache, where its parent has just put them, so that n
    sequences share them without a second mechanism.
    """
    request = parent.request
    prompt = np.asarray(request.prompt_token_ids, np.int32)
    names = parent.names[: len(prompt) // state.config.page_size + 1]
    fork = Sequence(
        request=request, index=index, order=(*parent.order[:2], index), names=list(names), tokens=prompt
    )
    state.sequences[request.request_id, index] = fork
    push_waiting(state, fork)


def _ends(
    state: SchedulerState, slots: np.ndarray, tokens: np.ndarray, stops: dict[tuple[str, int], Stop]
) -> Iterable[Finished]:
    """Ends sequences that sampled a stop token or reached their length; a host's stop wins."""
    columns = state.columns
    known = columns.num_tokens[slots]
    matches = columns.stops.take(slots, axis=0) == tokens[:, None]
    full = known >= columns.max_tokens[slots]
    if not np.count_nonzero(matches) and not np.count_nonzero(full):
        return ()
    hit = matches.any(axis=1) & (known >= columns.min_tokens[slots])
    ended = []
    for place in (hit | full).nonzero()[0]:
        sequence = state.by_slot[slots[place]]
        if sequence is None or (sequence.request.request_id, sequence.index) in stops:
            continue
        token = int(tokens[place])
        reason = FinishReason.STOP if hit[place] else FinishReason.LENGTH
        asked = bool(hit[place]) and token in sequence.request.sampling.stop_token_ids
        ended.append(end(state, sequence, reason, stop_reason=token if asked else None))
    return ended
