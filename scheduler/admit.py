"""Lets waiting sequences in: prefix match, pages, a slot and a first chunk."""

import bisect
import heapq

import numpy as np

from kv import prefix
from kv.types import DUMMY_PAGE
from scheduler.fill import Batch, take_pages
from scheduler.settle import end
from scheduler.state import NO_TOKEN, SchedulerState, Sequence, Status, peek_waiting, push_waiting
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
    """Admits waiting sequences in order while budget, slots and pages last. Nobody overtakes."""
    admitted = []
    reserved = _unfilled(state, limits)
    while batch.budget > 0 and state.free_slots and len(state.running) < limits.max_num_seqs:
        sequence = peek_waiting(state)
        if sequence is None:
            break
        queried, found = _lookup(state, sequence)
        hit = len(found[0]) * state.config.page_size
        idle = sum(state.pages.is_idle(page) for pages in found for page in pages)
        total = pages_of(state.config, limits, len(sequence.tokens))
        needed = max(0, total - sum(page != DUMMY_PAGE for pages in found for page in pages))
        growth = len(state.config.windows) if state.running else 0
        if needed + idle + reserved + growth > state.pages.available:
            break
        heapq.heappop(state.waiting)
        slot = _place(state, sequence, found, hit)
        chunk = min(len(sequence.tokens) - hit, batch.budget)
        before = state.pages.available
        pages = -(-(hit + chunk) // state.config.page_size) - int(state.columns.num_pages[slot])
        if pages > 0:
            take_pages(state, slot, pages)
        reserved += needed - (before - state.pages.available)
        batch.add(np.array([slot], np.int32), np.array([chunk], np.int32))
        request = sequence.request
        admitted.append(
            Admitted(
                request_id=request.request_id,
                index=sequence.index,
                slot=slot,
                queried_tokens=queried,
                hit_tokens=hit,
                resumed=sequence.preemptions > 0,
            )
        )
    return admitted


def _unfilled(state: SchedulerState, limits: Limits) -> int:
    """Pages that running prompts still need: kept for them, so that two never starve each other."""
    columns, groups = state.columns, len(state.config.windows)
    slots = np.fromiter((sequence.slot for sequence in state.running), np.int32, len(state.running))
    total = 0
    for slot in slots[columns.num_tokens[slots] - columns.num_computed[slots] > 1]:
        held = groups * int(columns.num_pages[slot]) - sum(int(first[slot]) for first in columns.first_page)
        total += max(0, pages_of(state.config, limits, int(columns.num_tokens[slot])) - held)
    return total


def _lookup(state: SchedulerState, sequence: Sequence) -> tuple[int, list[list[int]]]:
    """The cached prefix of a waiting sequence; its last token is always computed, to sample the next.

    Returns:
        Tokens looked up (0: reads are off), and per group the pages found.
    """
    config = state.config
    wants_logprobs = sequence.request.sampling.prompt_logprobs is not None
    if wants_logprobs and sequence.index == 0 and not sequence.prefilled:
        return 0, [[] for _ in config.windows]
    whole = (len(sequence.tokens) - 1) // config.page_size
    if len(sequence.names) <= whole:
        done = len(sequence.names) - 1
        tail = sequence.tokens[done * config.page_size : whole * config.page_size]
        sequence.names += prefix.extend(sequence.names[-1], tail, config.page_size)
    found = state.prefix.match(sequence.names[1 : whole + 1], config.windows, config.page_size)
    return len(sequence.tokens) if config.enable_prefix_caching else 0, found


def _place(state: SchedulerState, sequence: Sequence, found: list[list[int]], hit: int) -> int:
    """Gives the sequence a slot, its shared pages and its numbers. Returns the slot."""
    columns, config = state.columns, state.config
    slot = heapq.heappop(state.free_slots)
    request, sampling = sequence.request, sequence.request.sampling
    known, pages = len(sequence.tokens), len(found[0])
    for table, first, shared in zip(columns.page_tables, columns.first_page, found, strict=True):
        table[slot, :pages] = shared
        first[slot] = sum(page == DUMMY_PAGE for page in shared)
        for page in shared[int(first[slot]) :]:
            state.pages.share(page)
    prompt = len(request.prompt_token_ids)
    columns.tokens[slot, :known] = sequence.tokens
    columns.num_tokens[slot] = known
    columns.num_prompt[slot] = prompt
    columns.num_computed[slot] = hit
    columns.high_water[slot] = sequence.high_water
    columns.max_tokens[slot] = total_tokens(config, request)
    columns.min_tokens[slot] = prompt + sampling.min_tokens
    columns.num_pages[slot] = columns.named_pages[slot] = pages
    _set_stops(state, slot, sampling.stop_token_ids + (() if sampling.ignore_eos else request.eos_token_ids))
    columns.epochs[slot] += 1
    state.by_slot[slot] = sequence
    sequence.slot, sequence.status = slot, Status.RUNNING
    bisect.insort(state.running, sequence, key=lambda other: other.order)
    if not sequence.prefilled and sequence.index == 0:
        sequence.hit += max(0, min(hit, prompt) - sequence.settled)
        sequence.settled = max(sequence.settled, hit)
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
