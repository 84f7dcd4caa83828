"""I22: nobody starves. What the scheduler promises to everyone whom it has taken in, checked step by step.

The order is that of priority, then arrival, then index (of a request's sequences), as they came. Steps that
failed are left out: everybody starts over after them.

- Who runs is computed: every running sequence that decodes gets its token in every step, and the first in the
  order gets at least one, also of a prompt; unless pages that it needs come back from a store.
- Who runs is preempted by those before it alone: the preempted are the last of the order.
- Who has been brought its pages gets the next slot, before all that wait.
- Nobody in the queue is overtaken, but by those behind a request that waits for a page which is being stored.

So whoever waits, waits for work that is known when it begins to: in every step the first of the running
computes at least one token, and only what is there already, what comes before it in the order, and what is
preempted and computed again can be first. The steps are counted, and compared with the tokens of those.
"""

from dataclasses import dataclass, field

from jaxserve.sim.broken import Broken
from jaxserve.sim.engine import SimEngine
from kv.moves import Load
from scheduler.admit import total_tokens
from scheduler.state import SchedulerState, Sequence, Status
from scheduler.stores import returning
from scheduler.types import Inputs, Plan

Key = tuple[str, int]

OVERTAKEN_MOST = 100
"""So many may pass a request while a page that it waits for is being stored."""


@dataclass(slots=True, eq=False)
class _Wait:
    """A sequence without a slot. Attributes: since: steps that had run; most: that it may wait for."""

    sequence: Sequence
    since: int
    most: int
    overtaken: int = 0


@dataclass(slots=True, eq=False)
class _Life:
    """What an engine was like after its last step.

    Attributes:
        ranks: (priority, arrival) of live requests.
        running: in the order. brought: those whose pages were on their way, or there.
        ran: steps in which the first advanced.
    """

    ranks: dict[str, tuple[int, int]] = field(default_factory=dict)
    arrivals: int = 0
    running: list[Sequence] = field(default_factory=list)
    brought: set[Key] = field(default_factory=set)
    known: set[Key] = field(default_factory=set)
    waits: dict[Key, _Wait] = field(default_factory=dict)
    ran: int = 0

    def order(self, sequence: Sequence) -> tuple[int, int, int]:
        """Its place; smaller comes first."""
        return (*self.ranks[sequence.request.request_id], sequence.index)


class Order:
    """Looks at every step of every engine."""

    def __init__(self) -> None:
        self._lives: dict[str, _Life] = {}

    def step(self, engine: SimEngine, inputs: Inputs, plan: Plan) -> None:
        """A step has been decided.

        Raises:
            Broken: a promise is.
        """
        state = engine.core.state
        life = self._lives.setdefault(engine.epoch, _Life())
        for request in inputs.arrivals:
            life.arrivals += 1
            priority = request.priority if engine.node.scheduler.policy == "priority" else 0
            life.ranks[request.request_id] = (priority, life.arrivals)
        failed = inputs.outcome is not None and inputs.outcome.error is not None
        if failed:
            life.waits.clear()
        else:
            taken = _taken(state, plan, life.brought)
            self._running(engine, state, plan, life)
            self._admission(engine, state, plan, life, taken)
            self._waits(state, plan, life, taken)
        self._look_ahead(engine, state, life)

    def _running(self, engine: SimEngine, state: SchedulerState, plan: Plan, life: _Life) -> None:
        """Who ran before this step, and has not ended."""
        lost = {(entry.request_id, entry.index) for entry in plan.preempted}
        still = [sequence for sequence in life.running if sequence.status is Status.RUNNING]
        if lost and still:
            last = life.order(still[-1])
            if any(life.order(sequence) < last for sequence in life.running if _key(sequence) in lost):
                raise Broken("I22", f"{engine.host}: one was preempted, and one behind it was not")
        slots = set(plan.rows.slots.tolist())
        columns = state.columns
        first = True
        for sequence in still:
            slot = sequence.slot
            if slot not in slots and not returning(state):
                if first:
                    raise Broken("I22", f"{engine.host}: the first in the order runs, and is not computed")
                if columns.num_tokens[slot] - columns.num_computed[slot] == 1:
                    raise Broken("I22", f"{engine.host}: one that decodes was left out")
            first = False
        life.ran += bool(slots) and (not still or still[0].slot in slots)

    def _admission(
        self, engine: SimEngine, state: SchedulerState, plan: Plan, life: _Life, taken: list[Sequence]
    ) -> None:
        """Who got a slot, and who was left waiting."""
        if plan.preempted:
            return
        if state.fetched and len(state.running) < engine.node.limits.max_num_seqs:
            raise Broken("I22", f"{engine.host}: one that has its pages waits, and a slot is free")
        if not taken:
            return
        last = max(life.order(sequence) for sequence in taken)
        stores = any(storing for leaf in state.leaves for *_, storing, _ in leaf.tiers())
        for sequence in state.sequences.values():
            passed = sequence.status is Status.WAITING and life.order(sequence) < last
            if passed and (sequence.index or not stores):
                raise Broken("I22", f"{engine.host}: {_key(sequence)} was overtaken in the queue")

    def _waits(self, state: SchedulerState, plan: Plan, life: _Life, taken: list[Sequence]) -> None:
        """What each of those that wait may have to wait for, and has."""
        config = state.config
        more = sum(_tokens(state, entry.request_id, entry.index) for entry in plan.preempted)
        new = [sequence for key, sequence in state.sequences.items() if key not in life.known]
        for key, wait in list(life.waits.items()):
            sequence = wait.sequence
            if not _waits(sequence):
                del life.waits[key]
                continue
            wait.most += more
            order = life.order(sequence)
            for other in new:
                if life.order(other) < order:
                    wait.most += total_tokens(config, other.request)
            for other in taken:
                if life.order(other) > order:
                    wait.overtaken += 1
                    wait.most += total_tokens(config, other.request)
            if life.ran - wait.since > wait.most:
                raise Broken("I22", f"{key} has waited for {life.ran - wait.since} steps of others")
            if wait.overtaken > OVERTAKEN_MOST:
                raise Broken("I22", f"{key} was overtaken by {wait.overtaken} that came later")

    def _look_ahead(self, engine: SimEngine, state: SchedulerState, life: _Life) -> None:
        life.ranks = {request_id: life.ranks[request_id] for request_id, _ in state.sequences}
        life.running = sorted(state.running, key=life.order)
        life.brought = {key for key, each in state.sequences.items() if each.status is Status.LOADING}
        life.known = set(state.sequences)
        everybody: int | None = None
        for key, sequence in state.sequences.items():
            if key not in life.waits and _waits(sequence):
                if everybody is None:
                    each = state.sequences.values()
                    everybody = sum(total_tokens(state.config, other.request) for other in each)
                life.waits[key] = _Wait(sequence, life.ran, everybody)


def _taken(state: SchedulerState, plan: Plan, brought: set[Key]) -> list[Sequence]:
    """Who left the queue in this step, for a slot or for a load."""
    keys = [(entry.request_id, entry.index) for entry in plan.admitted]
    keys += [(move.request_id, 0) for move in plan.moves.commands if isinstance(move, Load)]
    return [state.sequences[key] for key in keys if key not in brought]


def _waits(sequence: Sequence) -> bool:
    """It has no slot, and nothing of it is on its way."""
    if sequence.status is Status.LOADING:
        return sequence.fetch is not None and not sequence.fetch.moves
    return sequence.status is Status.WAITING


def _tokens(state: SchedulerState, request_id: str, index: int) -> int:
    sequence = state.sequences.get((request_id, index))
    return 0 if sequence is None else total_tokens(state.config, sequence.request)


def _key(sequence: Sequence) -> Key:
    return sequence.request.request_id, sequence.index
