"""What a world is made of, before its first event."""

from dataclasses import dataclass

from jaxserve.sim.engine import Node
from jaxserve.sim.habits import Habits
from jaxserve.sim.hash_model import HashModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A world before its first event.

    Attributes:
        nodes: prefill engines, decode engines and others.
        prefill, decode: names of those that a split request can go to.
        rates: of faults.
        lasting: properties of this world that count as faults, and the hosts that they concern.
        pace: of steps, see `Storm`.
        offsets, drift: of engines' clocks, by name.
    """

    model: HashModel
    nodes: tuple[Node, ...]
    prefill: tuple[str, ...]
    decode: tuple[str, ...]
    rates: dict[str, float]
    lasting: tuple[tuple[str, tuple[str, ...]], ...]
    habits: Habits
    num_clients: int
    pace: float
    offsets: dict[str, float]
    drift: dict[str, float]
