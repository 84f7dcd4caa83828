"""I19 for counters: each only grows, and some are counted again from what steps have decided and run.

Counted again: tokens that were computed for the first time and those computed again after a preemption, by
position; preemptions; leases that have expired. What is compared is what the engine shows.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from jaxserve.sim.broken import Broken
from jaxserve.sim.engine import SimEngine
from kv.moves import LeaseRead, Unlease
from metrics.counts import LabelledCounts
from metrics.histogram import Histogram
from metrics.moves import FetchStages, PageStates, TierSlots
from metrics.records import Gauges
from scheduler.types import Inputs, Plan

Key = tuple[str, int]

GAUGES = (Gauges, PageStates, FetchStages, TierSlots)
"""Values of what is now; all else in statistics is counted, but for `GAUGE_FIELDS`."""
GAUGE_FIELDS = ("leases",)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One sequence's part of a step. Attributes: prompt: it has no output yet; again: of its tokens, those
    that had been computed before."""

    key: Key
    end: int
    tokens: int
    again: int
    prompt: bool


@dataclass(slots=True, eq=False)
class _Life:
    """What one life has done.

    Attributes:
        reach: tokens computed, of sequences with a slot. lost: the most that a preemption has cost each.
        rows: of the step under way.
        shown: what it showed last.
    """

    computed: int = 0
    recomputed: int = 0
    preemptions: int = 0
    expired: int = 0
    slots: dict[int, Key] = field(default_factory=dict)
    reach: dict[Key, int] = field(default_factory=dict)
    lost: dict[Key, int] = field(default_factory=dict)
    rows: list[_Row] = field(default_factory=list)
    shown: tuple[Any, ...] = ()


class Counters:
    """Looks at every step, and at what engines show."""

    def __init__(self) -> None:
        self._lives: dict[str, _Life] = {}

    def step(self, engine: SimEngine, inputs: Inputs, plan: Plan) -> None:
        """A step has been decided, and the one before it has ended."""
        life = self._lives.setdefault(engine.epoch, _Life())
        outcome = inputs.outcome
        failed = outcome is not None and outcome.error is not None
        if outcome is not None and not failed:
            for row in life.rows:
                life.computed += row.prompt * (row.tokens - row.again)
                life.recomputed += row.again
                life.reach[row.key] = row.end
        if not (failed or inputs.pool_moved):  # then leases are lost
            read = {event.request_id for event in inputs.events if isinstance(event, LeaseRead)}
            ended = [command for command in plan.moves.commands if isinstance(command, Unlease)]
            life.expired += sum(command.request_id not in read for command in ended)
        for entry in plan.preempted:
            key = life.slots.pop(entry.slot)
            life.lost[key] = max(life.lost.get(key, 0), life.reach.pop(key))
            life.preemptions += 1
        for entry in plan.finished:
            key = entry.request_id, entry.index
            life.lost.pop(key, None)
            life.reach.pop(key, None)
            if entry.slot is not None:
                life.slots.pop(entry.slot)
        for entry in plan.admitted:
            key = life.slots[entry.slot] = entry.request_id, entry.index
            life.reach[key] = int(engine.core.state.columns.num_computed[entry.slot])
        life.rows = list(self._rows(life, plan))

    def _rows(self, life: _Life, plan: Plan) -> list[_Row]:
        found = []
        rows = plan.rows
        for slot, start, tokens, outputs in zip(
            rows.slots.tolist(),
            rows.starts.tolist(),
            rows.lens.tolist(),
            rows.num_outputs.tolist(),
            strict=True,
        ):
            key, end = life.slots[slot], start + tokens
            again = max(0, min(life.lost.get(key, 0), end) - start)
            found.append(_Row(key=key, end=end, tokens=tokens, again=again, prompt=not outputs))
        return found

    def look(self, engine: SimEngine) -> None:
        """After a turn.

        Raises:
            Broken: a counter went down, or is not what was done.
        """
        life = self._lives.setdefault(engine.epoch, _Life())
        shown = engine.core.stats, engine.core.move_stats
        for then, now in zip(life.shown, shown, strict=False):
            what = fell(then, now)
            if what is not None:
                raise Broken("I19", f"{engine.host}: a counter went down: {what}")
        life.shown = shown
        steps, nixl = shown[0].steps, shown[1].nixl
        pairs = {
            "computed prompt tokens": (steps.computed_prompt_tokens, life.computed),
            "tokens computed again": (steps.preempted_prefill_tokens, life.recomputed),
            "preemptions": (steps.num_preemptions, life.preemptions),
            "expired leases": (life.expired if nixl is None else nixl.expired, life.expired),
        }
        for name, (told, true) in pairs.items():
            if told != true:
                raise Broken("I19", f"{engine.host}: {told} {name} are counted, and there were {true}")


def fell(then: Any, now: Any, name: str = "stats") -> str | None:
    """The first counter of a value of statistics that is smaller now; None: there is none.

    Raises:
        TypeError: it holds something of which nothing is known.
    """
    if then is now or isinstance(now, GAUGES):
        return None
    if isinstance(now, int):
        return _fell(name, (then,), (now,))
    if isinstance(now, LabelledCounts):
        return _fell(name, then.values, now.values)
    if isinstance(now, Histogram):
        return _fell(name, (*then.counts, then.sum_nano), (*now.counts, now.sum_nano))
    if not is_dataclass(now):
        raise TypeError(f"{name} is a {type(now).__name__}")
    for each in fields(now):
        if each.name not in GAUGE_FIELDS:
            what = fell(getattr(then, each.name), getattr(now, each.name), f"{name}.{each.name}")
            if what is not None:
                return what
    return None


def _fell(name: str, then: tuple[int, ...], now: tuple[int, ...]) -> str | None:
    return name if any(new < old for old, new in zip(then, now, strict=True)) else None
