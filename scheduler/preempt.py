"""Takes pages from running sequences when they run out."""

from scheduler.state import SchedulerState, Sequence, push_waiting, vacate
from scheduler.types import Preempted


def preempt(state: SchedulerState, sequence: Sequence) -> Preempted:
    """Takes slot and pages from a running sequence; it waits in its old place and keeps its tokens.

    Its cached pages stay in the prefix cache until they are evicted, so it often resumes where it was.
    """
    slot = sequence.slot
    if slot is None:
        raise ValueError("only a running sequence can be preempted")
    columns = state.columns
    sequence.tokens = columns.tokens[slot, : columns.num_tokens[slot]].copy()
    sequence.high_water = max(int(columns.high_water[slot]), int(columns.num_computed[slot]))
    sequence.preemptions += 1
    vacate(state, sequence)
    push_waiting(state, sequence)
    return Preempted(request_id=sequence.request.request_id, index=sequence.index, slot=slot)


def make_room(state: SchedulerState, sequence: Sequence, count: int) -> list[Preempted]:
    """Preempts from the back of the running order until `count` pages are available for `sequence`.

    The sequence itself may be the last in that order: then it is preempted too and has no slot any more.
    """
    preempted = []
    while state.pages.available < count:
        victim = state.running[-1]
        preempted.append(preempt(state, victim))
        if victim is sequence:
            break
    return preempted
