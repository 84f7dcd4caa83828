"""The step's array operations once more, one sequence and one page at a time.

Slow and plain: what the fast ones must equal, byte for byte. `step` here runs the scheduler with these in
their places.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

import scheduler.fill
import scheduler.settle
import scheduler.step
from kv import prefix
from kv.pages import Pages
from kv.types import DUMMY_PAGE
from scheduler.fill import Batch
from scheduler.preempt import make_room
from scheduler.settle import Settled, end
from scheduler.state import InFlight, SchedulerState
from scheduler.stores import offer_pages, returning
from scheduler.types import Accepted, Finished, FinishReason, Inputs, Limits, Outcome, Plan, Rows


def step(state: SchedulerState, inputs: Inputs, limits: Limits) -> tuple[SchedulerState, Plan]:
    """`scheduler.step.step`, slowly."""
    with _slowly():
        return scheduler.step.step(state, inputs, limits)


@contextmanager
def _slowly() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler.settle, "_apply", apply)
        patch.setattr(scheduler.fill, "_grow_all", grow_all)
        patch.setattr(scheduler.step, "pack_rows", pack_rows)
        patch.setattr(Pages, "take", take)
        yield


def apply(state: SchedulerState, flight: InFlight, outcome: Outcome, stops: dict) -> Settled:
    columns, rows = state.columns, flight.rows
    alive = [
        (row, slot)
        for row, slot in enumerate(rows.slots.tolist())
        if columns.epochs[slot] == flight.epochs[row]
    ]
    for row, slot in alive:
        columns.num_computed[slot] = rows.starts[row] + rows.lens[row]
    for _, slot in alive:
        publish(state, slot)
    for _, slot in alive:
        sequence = state.by_slot[slot]
        assert sequence is not None
        if columns.num_tokens[slot] == columns.num_prompt[slot]:
            sequence.settled = max(sequence.settled, int(columns.num_computed[slot]))
    sampled = [(row, slot, int(outcome.tokens[row])) for row, slot in alive if rows.samples[row]]
    for _, slot, token in sampled:
        columns.tokens[slot, columns.num_tokens[slot]] = token
        columns.num_tokens[slot] += 1
    first = [slot for row, slot, _ in sampled if rows.num_outputs[row] == 0]
    prefilled = tuple(scheduler.settle._first_tokens(state, np.array(first, int)))
    ended = [finished for _, slot, token in sampled for finished in ends(state, slot, token, stops)]
    return Settled(
        accepted=Accepted(
            rows=np.array([row for row, _, _ in sampled], np.int32),
            slots=np.array([slot for _, slot, _ in sampled], np.int32),
            tokens=np.array([token for _, _, token in sampled], np.int32),
        ),
        prefilled=prefilled,
        finished=tuple(ended),
    )


def publish(state: SchedulerState, slot: int) -> None:
    columns, size, sequence = state.columns, state.config.page_size, state.by_slot[slot]
    assert sequence is not None
    done, now = int(columns.named_pages[slot]), int(columns.num_computed[slot]) // size
    for entry in range(len(sequence.names) - 1, now):
        tokens = columns.tokens[slot, entry * size : (entry + 1) * size]
        sequence.names += prefix.extend(sequence.names[-1], tokens, size)
    for group, table in enumerate(columns.page_tables):
        for entry in range(max(done, int(columns.first_page[group][slot])), now):
            page = int(table[slot, entry])
            if state.prefix.insert(group, sequence.names[entry + 1], page):
                state.pages.mark_cached(page)
    if now > done:
        columns.named_pages[slot] = now
        offer_pages(state, sequence, [table[slot, :now].tolist() for table in columns.page_tables], done, now)


def ends(state: SchedulerState, slot: int, token: int, stops: dict) -> Iterator[Finished]:
    columns, sequence = state.columns, state.by_slot[slot]
    assert sequence is not None
    known, sampling = int(columns.num_tokens[slot]), sequence.request.sampling
    if (sequence.request.request_id, sequence.index) in stops:
        return
    mine = sampling.stop_token_ids + (() if sampling.ignore_eos else sequence.request.eos_token_ids)
    if token in mine and known >= len(sequence.request.prompt_token_ids) + sampling.min_tokens:
        asked = token if token in sampling.stop_token_ids else None
        yield end(state, sequence, FinishReason.STOP, stop_reason=asked)
    elif known >= columns.max_tokens[slot]:
        yield end(state, sequence, FinishReason.LENGTH)


def grow_all(state: SchedulerState, batch: Batch, slots: np.ndarray, lengths: np.ndarray) -> None:
    columns, size = state.columns, state.config.page_size
    leave_window(state, slots)
    for slot, length in zip(slots.tolist(), lengths.tolist(), strict=True):
        sequence = state.by_slot[slot]
        count = -(-length // size) - int(columns.num_pages[slot])
        if sequence is None or count <= 0:
            continue
        needed = count * len(columns.page_tables)
        short = needed - state.pages.available
        if short > 0 and returning(state) >= short:
            batch.held_back.add(slot)
            continue
        batch.preempted += make_room(state, sequence, needed)
        if sequence.slot is None:
            continue
        for table in columns.page_tables:
            for entry in range(int(columns.num_pages[slot]), int(columns.num_pages[slot]) + count):
                (page,), evicted = state.pages.take(1)
                for old in evicted:
                    state.prefix.evict(old)
                table[slot, entry] = page
        columns.num_pages[slot] += count


def leave_window(state: SchedulerState, slots: np.ndarray) -> None:
    columns = state.columns
    for group, window in enumerate(state.config.windows):
        if window is None:
            continue
        table, first = columns.page_tables[group], columns.first_page[group]
        for slot in slots.tolist():
            seen = max(0, int(columns.num_computed[slot]) - window + 1)
            while (int(first[slot]) + 1) * state.config.page_size <= seen:
                state.pages.release(int(table[slot, first[slot]]))
                table[slot, first[slot]] = DUMMY_PAGE
                first[slot] += 1


def take(pages: Pages, count: int) -> tuple[list[int], list[int]]:
    if count > pages.available:
        raise ValueError(f"{count} pages asked, {pages.available} available")
    taken, evicted = [], []
    for _ in range(count):
        if pages._free:
            page = pages._free.pop()
        else:
            page = next(pages.idle_pages())
            del pages._idle[page]
            pages._cached[page] = 0
            evicted.append(page)
        pages.refs[page] = 1
        pages.generation[page] += 1
        taken.append(page)
    return taken, evicted


def pack_rows(state: SchedulerState, batch: Batch) -> tuple[Rows, int, int]:
    columns = state.columns
    rows = [
        (int(slot), int(count))
        for slots, lens in zip(batch.slots, batch.lens, strict=True)
        for slot, count in zip(slots, lens, strict=True)
    ]
    rows = [row for row in rows if row[1] == 1] + [row for row in rows if row[1] > 1]
    used = max((int(columns.num_pages[slot]) for slot, _ in rows), default=0)
    starts, samples, outputs, tokens, prompt, again = [], [], [], [], 0, 0
    for slot, count in rows:
        start, known = int(columns.num_computed[slot]), int(columns.num_tokens[slot])
        starts.append(start)
        samples.append(start + count == known)
        outputs.append(known - int(columns.num_prompt[slot]))
        for position in range(start, start + count):
            tokens.append(int(columns.tokens[slot, position]))
            lost = position < columns.high_water[slot]
            again += lost
            prompt += not lost and not outputs[-1]
    slots = [slot for slot, _ in rows]
    packed = Rows(
        slots=np.array(slots, np.int32),
        starts=np.array(starts, np.int32),
        lens=np.array([count for _, count in rows], np.int32),
        samples=np.array(samples, bool),
        num_outputs=np.array(outputs, np.int32),
        tokens=np.array(tokens, np.int32),
        page_tables=tuple(
            np.array([table[slot, :used] for slot in slots], np.int32).reshape(len(slots), used)
            for table in columns.page_tables
        ),
    )
    return packed, prompt, int(again)
