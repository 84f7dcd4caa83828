"""Whom a fault meets that strikes one page, one transfer or one row: who would use just that."""

from dataclasses import replace

from jaxserve.sim.engine import SimEngine
from jaxserve.sim.fake_nixl import XferHandle
from kv import prefix
from kv.moves import HostSource, Load
from kv.types import DUMMY_PAGE
from scheduler.loads import lookup
from scheduler.state import Sequence, Status

Whom = tuple[str, int]
"""(request, index of the sequence)."""


def rows_copied(engine: SimEngine, index: int, rank: int) -> dict[int, list[Whom]]:
    """Rows of a host tier's memory that a load will copy and has not copied yet, and who loads them.

    Args:
        index: of the leaf connector.
    """
    found: dict[int, list[Whom]] = {}
    for move in engine.hosts[index][rank]._queues[0]:
        for _, _, slot in move.parts[move.done :]:
            if isinstance(move.command, Load):
                found.setdefault(slot - 1, []).append((move.command.request_id, 0))
    return found


def rows_hit(engine: SimEngine, index: int) -> dict[int, list[Whom]]:
    """Rows of a host tier's memory that the next lookup of a waiting request hits, and whose."""
    state = engine.core.state
    found: dict[int, list[Whom]] = {}
    for whom, sequence in state.sequences.items():
        if sequence.status is not Status.WAITING or sequence.index:
            continue
        size = state.config.page_size
        known = _named(sequence, size)
        whole = (len(known.tokens) - 1) // size
        local = state.prefix.match(known.names[1 : whole + 1], state.config.windows, size)
        offers = lookup(state, known, len(local[0]) * size)
        for offer in offers if isinstance(offers, tuple) else ():
            if offer.connector == index and isinstance(offer.source, HostSource):
                for slot in sorted({slot for group in offer.source.slots for slot in group} - {DUMMY_PAGE}):
                    found.setdefault(slot - 1, []).append(whom)
    return found


def _named(sequence: Sequence, page_size: int) -> Sequence:
    """It, with the names of all its pages, which an engine works out when its turn comes."""
    done = len(sequence.names) - 1
    tail = sequence.tokens[done * page_size :]
    return replace(sequence, names=[*sequence.names, *prefix.extend(sequence.names[-1], tail, page_size)])


def samplers(engine: SimEngine) -> list[Whom]:
    """Whose the rows of the last plan are that sample, in their order."""
    if engine.plan is None:
        return []
    owners = {sequence.slot: whom for whom, sequence in engine.core.state.sequences.items()}
    rows = engine.plan.rows
    return [owners[slot] for slot, samples in zip(rows.slots.tolist(), rows.samples, strict=True) if samples]


def given_up(engine: SimEngine) -> list[XferHandle]:
    """Transfers that the engine waits for no more, and that may still write."""
    found = []
    for rounds in engine.rounds:
        for peer in rounds.transfers._peers.values():
            agent = peer._agent
            if agent is not None:
                numbers = [stuck.transfer for stuck in peer.stuck if stuck.transfer is not None]
                found += [agent._transfers[number] for number in numbers]
    return found
