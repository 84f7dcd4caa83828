"""Which faults met which requests: "sometimes" counters, added up over many worlds."""

from collections import Counter
from collections.abc import Iterator

from jaxserve.sim.engine import SimEngine
from scheduler.state import Sequence, Status

STATES = ("waiting", "loading", "fetched", "prefilling", "decoding", "preempted", "leased")
"""Where a request is: waiting for its first slot; its pages on their way; there, and no slot yet; computing
its prompt; generating; preempted and waiting; over, its pages leased to a peer."""

RARE = ("fetched", "preempted")
"""States that are seldom reached: faults look for them."""

Met = Counter[tuple[str, str]]
"""(fault, state) -> how often."""


def states(engine: SimEngine) -> Iterator[str]:
    """The state of every request of an engine."""
    state = engine.core.state
    for sequence in state.sequences.values():
        yield _state(sequence)
    for _ in range(state.ledger.num_leases):
        yield "leased"


def _state(sequence: Sequence) -> str:
    if sequence.status is Status.RUNNING:
        return "decoding" if sequence.prefilled else "prefilling"
    if sequence.status is Status.LOADING:
        return "loading" if sequence.fetch is not None and sequence.fetch.moves else "fetched"
    return "preempted" if sequence.preemptions else "waiting"


def table(met: Met, names: dict[str, str]) -> list[str]:
    """Lines of a table: a row per fault, a column per state."""
    lines = [" ".join((f"{'fault':8}", *(f"{state:>10}" for state in STATES), "  what happens"))]
    for fault in sorted(names, key=lambda fault: int(fault[1:])):
        counts = (f"{met[fault, state]:10,}" for state in STATES)
        lines.append(" ".join((f"{fault:8}", *counts, f"  {names[fault]}")))
    return lines


def thin(met: Met, names: dict[str, str], least: int) -> list[tuple[str, str, int]]:
    """Pairs of fault and state that met less than `least` times."""
    return [
        (fault, state, met[fault, state]) for fault in names for state in STATES if met[fault, state] < least
    ]
