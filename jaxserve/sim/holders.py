"""Which requests have a page in host memory: those that load it, and those whose tokens it holds."""

from jaxserve.sim.engine import SimEngine
from kv.connectors.host_tier import HostTierConnector
from kv.moves import HostSource, Lease, Load
from kv.types import DUMMY_PAGE


def rows_held(engine: SimEngine, index: int) -> dict[int, list[tuple[str, str]]]:
    """Rows of a host tier's memory that concern a request, with (host, id) of these.

    Args:
        index: of the leaf connector.
    """
    state, leaf = engine.core.state, engine.core.state.leaves[index]
    if not isinstance(leaf, HostTierConnector):
        return {}
    named: dict[tuple[int, bytes], list[str]] = {}
    groups = range(len(state.config.windows))
    for (request_id, _), sequence in state.sequences.items():
        for name in sequence.names[1:]:
            for group in groups:
                named.setdefault((group, name), []).append(request_id)
    names = {page: (group, name) for page, group, name in state.prefix.items()}
    held: dict[int, list[tuple[str, str]]] = {}
    for row in state.ledger:
        if isinstance(row.move, Lease):
            for page in row.pages:
                if page in names:
                    named.setdefault(names[page], []).append(row.move.request_id)
        elif isinstance(row.move, Load) and row.move.connector == index:
            source = row.move.source
            for slot in (slot for group in _slots(source) for slot in group if slot != DUMMY_PAGE):
                held.setdefault(slot - 1, []).append((engine.host, row.move.request_id))
    for group, name, _, slot in leaf.ready_pages():
        held.setdefault(slot - 1, []).extend((engine.host, who) for who in named.get((group, name), ()))
    return {row: list(dict.fromkeys(places)) for row, places in held.items() if places}


def _slots(source: object) -> tuple[tuple[int, ...], ...]:
    return source.slots if isinstance(source, HostSource) else ()
