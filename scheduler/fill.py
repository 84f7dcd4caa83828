"""Spends the token budget on running sequences: decodes first, then prompt chunks."""

from dataclasses import dataclass, field

import numpy as np

from kv.types import DUMMY_PAGE
from scheduler.preempt import make_room
from scheduler.state import SchedulerState, Sequence, running_slots
from scheduler.stores import returning
from scheduler.types import Preempted, Rows


@dataclass(slots=True, kw_only=True, eq=False)
class Batch:
    """A batch in the making, local to one step.

    Attributes:
        budget: tokens that may still be spent.
        slots, lens: the rows so far: int32 arrays, concatenated at the end.
        preempted: sequences that lost their pages to others in this step.
        held_back: slots that wait for pages which stores give back soon.
    """

    budget: int
    slots: list[np.ndarray] = field(default_factory=list)
    lens: list[np.ndarray] = field(default_factory=list)
    preempted: list[Preempted] = field(default_factory=list)
    held_back: set[int] = field(default_factory=set)

    def add(self, slots: np.ndarray, lens: np.ndarray) -> None:
        """Adds rows and spends their tokens."""
        self.slots.append(slots)
        self.lens.append(lens)
        self.budget -= int(lens.sum())


def fill_running(state: SchedulerState, batch: Batch) -> None:
    """Gives every running sequence its next token or prompt chunk while the budget lasts."""
    columns, slots = state.columns, running_slots(state).copy()
    left = columns.num_tokens[slots] - columns.num_computed[slots]
    decodes = slots[left == 1][: batch.budget]
    epochs = columns.epochs[decodes]
    _grow_all(state, batch, decodes, columns.num_computed[decodes] + 1)
    if batch.preempted:
        decodes = decodes[columns.epochs[decodes] == epochs]
    if batch.held_back:
        decodes = decodes[[slot not in batch.held_back for slot in decodes]]
    batch.add(decodes, np.ones(len(decodes), np.int32))
    for sequence in [state.by_slot[slot] for slot in slots[left > 1]]:
        if batch.budget <= 0:
            break
        if sequence is not None and sequence.slot is not None:
            _fill_chunk(state, batch, sequence, sequence.slot)
    _drop_preempted(state, batch)


def _fill_chunk(state: SchedulerState, batch: Batch, sequence: Sequence, slot: int) -> None:
    columns = state.columns
    computed = int(columns.num_computed[slot])
    chunk = min(int(columns.num_tokens[slot]) - computed, batch.budget)
    epoch = columns.epochs[slot]
    _grow_all(state, batch, np.array([slot]), np.array([computed + chunk]))
    if columns.epochs[slot] == epoch and slot not in batch.held_back:
        batch.add(np.array([slot]), np.array([chunk], np.int32))


def _drop_preempted(state: SchedulerState, batch: Batch) -> None:
    """Rows whose sequence was preempted after they had been added."""
    if not batch.preempted:
        return
    lost = {entry.slot for entry in batch.preempted}
    for place, slots in enumerate(batch.slots):
        keep = np.array([slot not in lost for slot in slots], bool)
        batch.slots[place], batch.lens[place] = slots[keep], batch.lens[place][keep]


def _grow_all(state: SchedulerState, batch: Batch, slots: np.ndarray, lengths: np.ndarray) -> None:
    """Gives the slots pages for `lengths` tokens each. Most decodes have room and cost nothing here."""
    columns, size = state.columns, state.config.page_size
    leave_window(state, slots)
    full = (lengths > columns.num_pages[slots] * size).nonzero()[0]
    if not len(full):
        return
    slots = slots[full]
    missing = -(-lengths[full] // size) - columns.num_pages[slots]
    if int(missing.sum()) * len(columns.page_tables) <= state.pages.available and missing.max() == 1:
        _take_one_each(state, slots)
        return
    for slot, count in zip(slots.tolist(), missing.tolist(), strict=True):
        sequence = state.by_slot[slot]
        if sequence is None or sequence.slot is None:
            continue
        short = count * len(columns.page_tables) - state.pages.available
        if short > 0 and returning(state) >= short:
            batch.held_back.add(slot)
            continue
        batch.preempted += make_room(state, sequence, count * len(columns.page_tables))
        if sequence.slot is not None:
            take_pages(state, sequence.slot, count)


def take_pages(state: SchedulerState, slot: int, count: int) -> None:
    """Appends `count` fresh pages to each of the slot's page tables. The caller has made room."""
    columns = state.columns
    used = int(columns.num_pages[slot])
    for table in columns.page_tables:
        taken, evicted = state.pages.take(count)
        for page in evicted:
            state.prefix.evict(page)
        table[slot, used : used + count] = taken
    columns.num_pages[slot] = used + count


def _take_one_each(state: SchedulerState, slots: np.ndarray) -> None:
    """Appends one fresh page to each page table of each slot, as `take_pages` would one slot after another.
    There is room for all."""
    columns = state.columns
    taken, evicted = state.pages.take(len(slots) * len(columns.page_tables))
    for page in evicted:
        state.prefix.evict(page)
    fresh = np.array(taken, np.int32).reshape(len(slots), -1)
    used = columns.num_pages[slots]
    for group, table in enumerate(columns.page_tables):
        table[slots, used] = fresh[:, group]
    columns.num_pages[slots] = used + 1


def leave_window(state: SchedulerState, slots: np.ndarray) -> None:
    """Releases pages that no coming query can see through its group's sliding window."""
    columns, size = state.columns, state.config.page_size
    for window, table, first in zip(
        state.config.windows, columns.page_tables, columns.first_page, strict=True
    ):
        if window is None:
            continue
        seen = np.maximum(columns.num_computed[slots] - window + 1, 0) // size
        behind = seen > first[slots]
        for slot, entry in zip(slots[behind].tolist(), seen[behind].tolist(), strict=True):
            for left in range(int(first[slot]), entry):
                state.pages.release(int(table[slot, left]))
                table[slot, left] = DUMMY_PAGE
            first[slot] = entry


def pack_rows(state: SchedulerState, batch: Batch) -> tuple[Rows, int, int]:
    """Copies what the device needs out of the columns, decodes first.

    Returns:
        The rows; how many of their tokens are of prompts and computed for the first time; how many had been
        computed before a preemption.
    """
    columns = state.columns
    slots, lens = np.concatenate(batch.slots), np.concatenate(batch.lens)
    decodes = len(slots)
    if lens.max(initial=0) > 1:
        order = np.argsort(lens > 1, kind="stable")
        slots, lens = slots[order], lens[order]
        decodes = int((lens == 1).sum())
    starts = columns.num_computed[slots]
    known = columns.num_tokens[slots]
    used = int(columns.num_pages[slots].max(initial=0))
    tokens = [columns.tokens[slots[:decodes], starts[:decodes]]]
    for slot, start, count in zip(slots[decodes:], starts[decodes:], lens[decodes:], strict=True):
        tokens.append(columns.tokens[slot, start : start + count])
    rows = Rows(
        slots=slots.astype(np.int32),
        starts=starts,
        lens=lens,
        samples=starts + lens == known,
        num_outputs=known - columns.num_prompt[slots],
        tokens=np.concatenate(tokens),
        page_tables=tuple(table[slots, :used] for table in columns.page_tables),
    )
    first, high_water = rows.num_outputs == 0, columns.high_water[slots]
    if not np.count_nonzero(first) and not np.count_nonzero(high_water > starts):
        return rows, 0, 0
    again = np.clip(high_water - starts, 0, lens)
    return rows, int((lens - again)[first].sum()), int(again.sum())
