"""Lets waiting sequences in: prefix match, pages, a slot and a first chunk."""

import heapq

import numpy as np

from kv import prefix
from kv.connectors.base import Later
from kv.types import DUMMY_PAGE
from scheduler.fill import Batch, take_pages
from scheduler.loads import (
    attribute,
    let_peer_go,
    lookup,
    meet_peer,
    not_loaded,
    pages_fetched,
    pages_to_load,
    start_loads,
)
from scheduler.settle import end
from scheduler.state import (
    NO_TOKEN,
    SchedulerState,
    Sequence,
    Status,
    occupy,
    peek_waiting,
    push_waiting,
    running_slots,
)
from scheduler.types import Admitted, Finished, FinishReason, Limits, Request, SchedulerConfig


def enqueue(state: SchedulerState, arrivals: tuple[Request, ...], limits: Limits) -> list[Finished]:
    """Takes in new requests; one that could never run, even alone, ends here with an error."""
    refused = []
    for request in arrivals:
        prompt = np.asarray(request.prompt_token_ids, np.int32)
        config = state.config
        private = "" if config.enable_prefix_caching else request.request_id
        origin = prefix.root(config.cache_key, request.cache_salt, private=private)
        state.arrivals += 1
        priority = request.priority if config.policy == "priority" else 0
        sequence = Sequence(
            request=request,
            index=0,
            order=(priority, state.arrivals, 0),
            names=[origin, *prefix.extend(origin, prompt, config.page_size)],
            tokens=prompt,
        )
        if (request.request_id, 0) in state.sequences:
            raise ValueError(f"request id {request.request_id} is in use")
        state.sequences[request.request_id, 0] = sequence
        problem = never_fits(config, limits, request)
        if problem is None:
            meet_peer(state, sequence)
            push_waiting(state, sequence)
        else:
            refused.append(end(state, sequence, FinishReason.ERROR, message=problem))
    return refused


def never_fits(config: SchedulerConfig, limits: Limits, request: Request) -> str | None:
    """Why the request can never run, even alone on an empty pool; None: it can."""
    prompt = len(request.prompt_token_ids)
    if prompt == 0:
        return "the prompt is empty"
    if prompt >= config.max_model_len:
        return (
            f"the prompt has {prompt} tokens; with one to generate, the limit is {config.max_model_len} "
            "(max_model_len)"
        )
    longest = total_tokens(config, request)
    needed, usable = pages_of(config, limits, longest - 1), config.num_pages - 1
    if needed > usable:
        return (
            f"prompt and output need {needed} KV pages of {config.page_size} tokens; the pool has {usable} "
            "(--kv-cache-memory-bytes)"
        )
    return None


def total_tokens(config: SchedulerConfig, request: Request) -> int:
    """Known tokens at which a sequence of this request ends at the latest."""
    asked = request.sampling.max_tokens
    prompt = len(request.prompt_token_ids)
    return config.max_model_len if asked is None else min(prompt + asked, config.max_model_len)


def pages_of(config: SchedulerConfig, limits: Limits, tokens: int) -> int:
    """Pages that a sequence of `tokens` computed tokens needs at most, over all groups.

    A sliding-window group never holds more than its window, the chunk being computed, and a page cut at
    either end.
    """
    whole = -(-tokens // config.page_size)
    total = 0
    for window in config.windows:
        span = (
            whole if window is None else -(-(window + limits.max_num_batched_tokens) // config.page_size) + 1
        )
        total += min(whole, span)
    return total


def admit(state: SchedulerState, batch: Batch, limits: Limits) -> list[Admitted]:
    """Admits sequences while budget, slots and pages last: first those whose pages have been brought, which
    hold them already, then those that wait, in order. Nobody overtakes but those who must be asked again."""
    admitted = [
        _place_fetched(state, batch, sequence)
        for sequence in tuple(state.fetched[: min(len(state.free_slots), _seats(state, limits))])
    ]
    reserved: int | None = None
    later: list[Sequence] = []
    while batch.budget > 0 and state.free_slots and _seats(state, limits) > 0:
        sequence = peek_waiting(state)
        if sequence is None:
            break
        if reserved is None:
            reserved = _unfilled(state, limits)
        queried, found = _lookup(state, sequence)
        hit = len(found[0]) * state.config.page_size
        reads = sequence.index == 0 and not _reads_off(sequence)
        offers = lookup(state, sequence, hit) if reads else ()
        if isinstance(offers, Later):
            heapq.heappop(state.waiting)
            later.append(sequence)
            continue
        idle = sum(state.pages.is_idle(page) for pages in found for page in pages)
        total = pages_of(state.config, limits, len(sequence.tokens))
        needed = max(0, total - sum(page != DUMMY_PAGE for pages in found for page in pages))
        needed = max(needed, pages_to_load(state, offers))
        growth = len(state.config.windows) if state.running else 0
        if needed + idle + reserved + growth > state.pages.available:
            _break_circle(state)
            break
        heapq.heappop(state.waiting)
        before = state.pages.available
        if offers:
            start_loads(state, sequence, found, offers, queried)
            reserved += needed - (before - idle - state.pages.available)
            continue
        not_loaded(state, sequence, hit)
        slot = _place(state, sequence, found, hit)
        chunk = min(len(sequence.tokens) - hit, batch.budget)
        before = state.pages.available
        pages = -(-(hit + chunk) // state.config.page_size) - int(state.columns.num_pages[slot])
        if pages > 0:
            take_pages(state, slot, pages)
        reserved += needed - (before - state.pages.available)
        batch.add(np.array([slot]), np.array([chunk], np.int32))
        admitted.append(_admitted(sequence, slot, queried, hit))
    for sequence in later:
        push_waiting(state, sequence)
    return admitted


def _break_circle(state: SchedulerState) -> None:
    """Pages are short, leases hold them, and nothing runs or loads that would give any back. Who is to read
    those leases may wait in this very queue, or at an engine whose own leases are to be read here: each keeps
    the other's alive. So the first that waits for a peer goes on without it, which ends a lease there."""
    if state.running or state.loading or state.fetched or not state.ledger.num_leases:
        return
    first = min(state.remotes.values(), key=lambda sequence: sequence.order, default=None)
    if first is not None:
        let_peer_go(state, first)


def _seats(state: SchedulerState, limits: Limits) -> int:
    """Sequences that may still get a slot."""
    return limits.max_num_seqs - len(state.running)


def _admitted(sequence: Sequence, slot: int, queried: int, hit: int, loaded: int = 0) -> Admitted:
    return Admitted(
        request_id=sequence.request.request_id,
        index=sequence.index,
        slot=slot,
        queried_tokens=queried,
        hit_tokens=hit,
        loaded_tokens=loaded,
        resumed=sequence.preemptions > 0,
    )


def _place_fetched(state: SchedulerState, batch: Batch, sequence: Sequence) -> Admitted:
    """Gives a slot to a sequence whose loads have ended. If its first chunk finds no room, it runs later."""
    fetch = sequence.fetch
    if fetch is None:
        raise ValueError(f"nothing was fetched for request {sequence.request.request_id}")
    state.fetched.remove(sequence)
    sequence.fetch = None
    for tier, last in fetch.sources:
        attribute(sequence, tier, last)
    slot = _place(state, sequence, fetch.pages, fetch.tokens)
    chunk = min(len(sequence.tokens) - fetch.tokens, batch.budget)
    pages = -(-(fetch.tokens + chunk) // state.config.page_size) - int(state.columns.num_pages[slot])
    if chunk > 0 and pages * len(state.config.windows) <= state.pages.available:
        if pages > 0:
            take_pages(state, slot, pages)
        batch.add(np.array([slot]), np.array([chunk], np.int32))
    loaded = fetch.sources[-1][1] - fetch.hit
    return _admitted(sequence, slot, fetch.queried, fetch.hit, loaded)


def _unfilled(state: SchedulerState, limits: Limits) -> int:
    """Pages that running prompts still need: kept for them, so that two never starve each other."""
    columns, groups, slots = state.columns, len(state.config.windows), running_slots(state)
    total = 0
    for slot in slots[columns.num_tokens[slots] - columns.num_computed[slots] > 1]:
        held = groups * int(columns.num_pages[slot]) - sum(int(first[slot]) for first in columns.first_page)
        total += max(0, pages_of(state.config, limits, int(columns.num_tokens[slot])) - held)
    for sequence in (*state.loading.values(), *state.fetched):
        total += max(0, pages_of(state.config, limits, len(sequence.tokens)) - pages_fetched(state, sequence))
    return total


def _lookup(state: SchedulerState, sequence: Sequence) -> tuple[int, list[list[int]]]:
    """The cached prefix of a waiting sequence; its last token is always computed, to sample the next.

    Returns:
        Tokens looked up (0: reads are off), and per group the pages found.
    """
    config = state.config
    if _reads_off(sequence):
        return 0, [[] for _ in config.windows]
    known, whole = len(sequence.tokens), (len(sequence.tokens) - 1) // config.page_size
    done = len(sequence.names) - 1
    if done < known // config.page_size:
        tail = sequence.tokens[done * config.page_size :]
        sequence.names += prefix.extend(sequence.names[-1], tail, config.page_size)
    found = state.prefix.match(sequence.names[1 : whole + 1], config.windows, config.page_size)
    return len(sequence.tokens) if config.enable_prefix_caching else 0, found


def _reads_off(sequence: Sequence) -> bool:
    """Every prompt position must be computed: their log-probabilities are wanted."""
    wants_logprobs = sequence.request.sampling.prompt_logprobs is not None
    return wants_logprobs and sequence.index == 0 and not sequence.prefilled


def _place(state: SchedulerState, sequence: Sequence, found: list[list[int]], computed: int) -> int:
    """Gives the sequence a slot, its pages and its numbers. Returns the slot.

    Args:
        found: per group, a local hit that is to be shared, or, for a sequence whose loads have ended, pages
            that are its own already.
        computed: tokens that are usable on them.
    """
    columns, config = state.columns, state.config
    slot = heapq.heappop(state.free_slots)
    request, sampling = sequence.request, sequence.request.sampling
    known, pages = len(sequence.tokens), len(found[0])
    for table, first, shared in zip(columns.page_tables, columns.first_page, found, strict=True):
        table[slot, :pages] = shared
        first[slot] = sum(page == DUMMY_PAGE for page in shared)
        if sequence.status is Status.WAITING:
            for page in shared[int(first[slot]) :]:
                state.pages.share(page)
    prompt = len(request.prompt_token_ids)
    columns.tokens[slot, :known] = sequence.tokens
    columns.num_tokens[slot] = known
    columns.num_prompt[slot] = prompt
    columns.num_computed[slot] = computed
    columns.high_water[slot] = sequence.high_water
    columns.max_tokens[slot] = total_tokens(config, request)
    columns.min_tokens[slot] = prompt + sampling.min_tokens
    columns.num_pages[slot] = pages
    columns.named_pages[slot] = computed // config.page_size
    _set_stops(state, slot, sampling.stop_token_ids + (() if sampling.ignore_eos else request.eos_token_ids))
    occupy(state, sequence, slot)
    attribute(sequence, None, computed)
    return slot


def _set_stops(state: SchedulerState, slot: int, stops: tuple[int, ...]) -> None:
    """Writes the slot's stop tokens; the column widens when a request brings more than any before."""
    columns = state.columns
    width = columns.stops.shape[1]
    if len(stops) > width:
        wider = np.full((columns.stops.shape[0], len(stops) - width), NO_TOKEN, np.int32)
        columns.stops = np.concatenate([columns.stops, wider], axis=1)
    columns.stops[slot] = NO_TOKEN
    columns.stops[slot, : len(stops)] = stops
