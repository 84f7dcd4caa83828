"""I12: how long a cluster may take until everything in it has ended, once faults have stopped.

The bound is worked out from the world as it is when they stop: what its clients have asked, how its engines
are configured, and what is still to come of the faults (a step that takes a minute, an engine that was asked
to end half a minute ago). It is the sum of what can come one after the other.
"""

from collections.abc import Collection, Iterable

from jaxserve.sim.asks import Ask
from jaxserve.sim.engine import Node, SimEngine
from jaxserve.sim.http import ACCEPT_S, AGAIN_MOST_S
from jaxserve.sim.strikes import RESTART_S
from kv.transfer_peer import CALL_S
from kv.transfers import AGENTS_AGAIN_S, QUARANTINE_S
from scheduler.admit import total_tokens

STEP_S, TOKEN_S = 0.004, 0.0005
"""Of a step when it is calm, its turn's lateness among them, and of each of its tokens."""
AGAIN = 2
"""What fails once, or waits behind what fails, may take as long again."""
POLL_S = 3.0
"""Between looks at a transfer that goes on for long."""


def bound_s(
    nodes: Collection[Node],
    engines: Iterable[SimEngine],
    asks: Collection[Ask],
    *,
    pace: float,
    coming_s: float,
    hanging: bool,
) -> float:
    """Virtual seconds.

    Args:
        asks: live requests.
        pace: of steps, see `Storm`.
        coming_s: until the last event of an engine that is known now.
        hanging: some transfers never end by themselves.
    """
    drains = [max(0.0, each.draining.ends_by - each.clock()) for each in engines if each.draining is not None]
    leaves = [leaf for node in nodes if (leaf := node.nixl) is not None]
    lease_s = max((leaf.lease_s for leaf in leaves), default=0.0)
    deadline_s = max((leaf.transfer_timeout_s for leaf in leaves), default=0.0)
    work_s = sum(
        ask.request.sampling.n * total_tokens(ask.engine.node.scheduler, ask.request) * (STEP_S + TOKEN_S)
        for ask in asks
    )
    ends_s = max(drains, default=-RESTART_S) + RESTART_S
    # A decode engine with another key refuses what is leased to it: each such lease lasts to its end.
    refused = len({node.key for node in nodes}) > 1
    unread_s = lease_s * len(asks) * refused
    loads_s = 2 * (deadline_s + CALL_S + POLL_S) + AGENTS_AGAIN_S
    # A router is patient by then: what it has asked comes as soon as its links are mended.
    links_s = AGAIN_MOST_S + ACCEPT_S
    hangs_s = hanging * (QUARANTINE_S + POLL_S)
    return AGAIN * (coming_s + ends_s + loads_s + lease_s + unread_s + 2 * pace * work_s + links_s + hangs_s)
