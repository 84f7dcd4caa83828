"""Every page of the pool by what it is for, and what holds them, at one moment."""

from dataclasses import asdict, dataclass

from metrics.moves import OFFLOADING, SIMPLE, MoveStats
from metrics.records import Gauges


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCensus:
    """What `/debug/pages` shows.

    Attributes:
        current: the numbers are of a step that was decided after the question; False: of the last step before
            it, since the engine does not answer.
        total: pages of the pool but the dummy, as configured: an account that is independent of the states.
        live_requests: requests that have not ended.
        gauges, moves: after the step.
    """

    current: bool
    total: int
    live_requests: int
    gauges: Gauges
    moves: MoveStats

    def body(self) -> dict[str, object]:
        """As JSON. Free, idle and in use sum to the total; what moves hold is part of what is in use, where a
        page that two moves hold counts for each."""
        gauges, moves = self.gauges, self.moves
        tiers = ((OFFLOADING, moves.offload), (SIMPLE, moves.simple))
        return {
            "current": self.current,
            "total": self.total,
            "pages": dict(moves.pages.by_state()),
            "in_moves": dict(moves.pages.in_moves()),
            "leases": 0 if moves.nixl is None else moves.nixl.leases,
            "requests": {
                "live": self.live_requests,
                "running": gauges.running,
                "waiting": gauges.waiting_capacity + gauges.waiting_deferred,
            },
            "host_tiers": {name: asdict(stats.tier) for name, stats in tiers if stats is not None},
        }
