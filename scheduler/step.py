"""The decision: `step(state, inputs, limits) -> (state, plan)`.

Deterministic: the same state, inputs and limits give the same plan, byte for byte, in any process. Five
stages, one file each: settle what happened, take in what arrived, fill the budget with what runs (which
may preempt), admit what waits.
"""

from scheduler.admit import admit, enqueue
from scheduler.fill import Batch, fill_running, pack_rows
from scheduler.leases import expire
from scheduler.moves import take_news, void_moves
from scheduler.settle import abort, forget_prefixes, settle
from scheduler.state import InFlight, SchedulerState, num_loading, num_waiting
from scheduler.stores import offer_idle
from scheduler.types import Gauges, Inputs, Limits, Plan


def step(state: SchedulerState, inputs: Inputs, limits: Limits) -> tuple[SchedulerState, Plan]:
    """Decides the next step. Consumes `state` (it is updated in place and returned).

    Raises:
        ValueError: an outcome that does not belong to the last plan; the state is unchanged.
    """
    state.step_id += 1
    state.news.now_s = inputs.now_s
    ended = abort(state, inputs.aborts)
    if inputs.pool_moved:
        void_moves(state)
    settled = settle(state, inputs.outcome, inputs.stops, inputs.events)
    expire(state)
    if inputs.reset_prefix_cache:
        forget_prefixes(state)
    if inputs.reset_connectors and state.connector is not None:
        state.connector.reset()
    refused = enqueue(state, inputs.arrivals, limits)
    batch = Batch(budget=limits.max_num_batched_tokens)
    fill_running(state, batch)
    admitted = () if batch.preempted else admit(state, batch, limits)
    offer_idle(state)
    rows, prompt, recomputed = pack_rows(state, batch)
    state.in_flight = (
        InFlight(step_id=state.step_id, rows=rows, epochs=state.columns.epochs[rows.slots])
        if len(rows)
        else None
    )
    plan = Plan(
        step_id=state.step_id,
        rows=rows,
        accepted=settled.accepted,
        admitted=tuple(admitted),
        preempted=(*settled.preempted, *batch.preempted),
        prefilled=settled.prefilled,
        finished=(*ended, *settled.finished, *refused),
        prompt_tokens=prompt,
        recomputed_tokens=recomputed,
        gauges=_gauges(state),
        moves=take_news(state),
    )
    return state, plan


def _gauges(state: SchedulerState) -> Gauges:
    pages = state.pages
    return Gauges(
        running=len(state.running),
        waiting=num_waiting(state),
        loading=num_loading(state),
        pages_in_use=pages.in_use,
        pages_idle=pages.idle,
        pages_free=pages.free,
    )
