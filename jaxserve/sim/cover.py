"""Which faults met which requests: "sometimes" counters, added up over many worlds.

A fault that strikes a request (a client that goes away, an id that is used twice, a text that cannot be made)
meets that one, in the state in which it is then, and what is leased for it at a peer. One that strikes a host
or a link meets every request there. What lasts meets it once more in every state that it comes to before the
fault is over: once per fault, request and state, however long all three stay together.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from jaxserve.sim.engine import SimEngine
from jaxserve.sim.history import History, Struck
from kv.moves import Lease
from scheduler.state import Sequence, Status

STATES = ("waiting", "loading", "fetched", "prefilling", "decoding", "preempted", "leased")
"""Where a request is: waiting for its first slot; its pages on their way; there, and no slot yet; computing
its prompt; generating; preempted and waiting; over, its pages leased to a peer."""

RARE = ("fetched", "preempted")
"""States that are seldom reached: faults look for them."""

_LOOKED_UP = "its pages are in the pool: nothing of it is looked up in host memory"
_NO_ROW = "it has no row in a step"

IMPOSSIBLE = {
    **{("X27", state): _LOOKED_UP for state in ("fetched", "prefilling", "decoding", "leased")},
    **{("X30", state): _NO_ROW for state in ("waiting", "loading", "fetched", "preempted", "leased")},
    ("X42", "preempted"): "its text goes on where it was",
    ("X42", "leased"): "its text is complete",
}
"""Pairs of a fault and a state that cannot meet, and why."""

Met = Counter[tuple[str, str]]
"""(fault, state) -> how often."""

Found = tuple[str, str, int, str]
"""(epoch, request, index of the sequence, state); a lease has index -1."""


class Spell:
    """A fault that lasts. Attributes: hosts: whose requests it concerns; seen: those that it has met."""

    def __init__(self, fault: str, hosts: Iterable[str], struck: Struck | None = None) -> None:
        self.fault, self.hosts, self.struck = fault, tuple(dict.fromkeys(hosts)), struck
        self.seen: set[Found] = set()


class Cover:
    """Attributes: met: what has been counted; history: of the faults that have struck.

    It looks at an engine's requests when a step has been decided: they change their states at no other time.
    """

    def __init__(self, engines: Mapping[str, SimEngine], clock: Callable[[], float]) -> None:
        """Args: engines: the current lives by host; looked at, never changed."""
        self.met: Met = Counter()
        self.history = History()
        self._engines, self._clock = engines, clock
        self._present: dict[str, frozenset[Found]] = {}
        self._before: dict[str, frozenset[Found]] = {}
        """The same a step earlier."""
        self._lasting: dict[str, list[Spell]] = {}

    def strike(self, fault: str, hosts: Iterable[str]) -> None:
        """A fault strikes these hosts, now and no longer."""
        hosts = tuple(dict.fromkeys(hosts))
        if hosts:
            self.history.strike(fault, hosts, self._clock())
        for host in hosts:
            self.met.update((fault, found[-1]) for found in self._here(host))

    def strike_request(self, fault: str, places: Iterable[tuple[str, str]]) -> None:
        """A fault strikes a request, now and no longer. Args: places: (host, id) of it, and of its leases."""
        for host, request_id in dict.fromkeys(places):
            self.history.strike(fault, (host,), self._clock())
            self.met.update((fault, found[-1]) for found in self._here(host) if found[1] == request_id)

    def strike_sequences(self, fault: str, host: str, whom: Iterable[tuple[str, int]]) -> None:
        """A fault strikes sequences of a host, now and no longer. Args: whom: (id, index) of each."""
        struck = set(whom)
        if struck:
            self.history.strike(fault, (host,), self._clock())
        pairs = [(fault, found[-1]) for found in self._here(host) if found[1:3] in struck]
        self.met.update(pair for pair in pairs if pair not in IMPOSSIBLE)

    def strike_text(self, fault: str, request_id: str) -> None:
        """A fault strikes a request while a step is decided or told of, in the state that it had before."""
        for host, found in self._before.items():
            if any(each[1] == request_id for each in self._here(host)):
                states = {each[-1] for each in found if each[1] == request_id} or {"waiting"}
                pairs = [(fault, state) for state in sorted(states)]
                self.met.update(pair for pair in pairs if pair not in IMPOSSIBLE)  # of another sequence

    def states(self, host: str, request_id: str) -> set[str]:
        """Of a request's sequences, since the last step."""
        return {found[-1] for found in self._here(host) if found[1] == request_id}

    def state(self, host: str, whom: tuple[str, int]) -> str | None:
        """Of one sequence, (id, index), since the last step; None: it is not there."""
        return next((found[-1] for found in self._here(host) if found[1:3] == whom), None)

    def begin(self, fault: str, hosts: Iterable[str]) -> Spell:
        """A fault strikes these hosts, and stays."""
        hosts = tuple(dict.fromkeys(hosts))
        spell = Spell(fault, hosts, self.history.begin(fault, hosts))
        for host in spell.hosts:
            self._lasting.setdefault(host, []).append(spell)
            self.meet(spell, host)
        return spell

    def end(self, spell: Spell) -> None:
        """It is over; nothing if it was before."""
        for host in spell.hosts:
            if spell in self._lasting[host]:
                self._lasting[host].remove(spell)
        if spell.struck is not None:
            self.history.end(spell.struck, self._clock())

    def meet(self, spell: Spell, host: str) -> None:
        """Counts whom a lasting fault meets on a host and has not met before."""
        new = self._here(host) - spell.seen
        if new:
            spell.seen |= new
            self.met.update((spell.fault, found[-1]) for found in new)

    def turned(self, engine: SimEngine) -> bool:
        """A step of an engine has been decided. Returns whether one of its requests is in a rare state."""
        found = frozenset(requests(engine))
        self._before[engine.host] = self._present.get(engine.host, frozenset())
        self._present[engine.host] = found
        for spell in self._lasting.get(engine.host, ()):
            self.meet(spell, engine.host)
        return any(entry[-1] in RARE for entry in found)

    def forget(self, host: str) -> None:
        """A life of a host has begun: it has no requests."""
        self._present.pop(host, None)
        self._before.pop(host, None)

    def _here(self, host: str) -> frozenset[Found]:
        engine = self._engines.get(host)
        if engine is None or not engine.alive:
            return frozenset()
        return self._present.get(host, frozenset())


def requests(engine: SimEngine) -> Iterator[Found]:
    """Every request of an engine, with its state."""
    state, epoch = engine.core.state, engine.epoch
    for (request_id, index), sequence in state.sequences.items():
        yield epoch, request_id, index, _state(sequence)
    for row in state.ledger.leases():
        if isinstance(row.move, Lease):
            yield epoch, row.move.request_id, -1, "leased"


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
        counts = (
            f"{'-':>10}" if (fault, state) in IMPOSSIBLE else f"{met[fault, state]:10,}" for state in STATES
        )
        lines.append(" ".join((f"{fault:8}", *counts, f"  {names[fault]}")))
    return lines


def thin(met: Met, names: dict[str, str], least: int) -> list[tuple[str, str, int]]:
    """Pairs of fault and state that can meet, and met less than `least` times."""
    return [
        (fault, state, met[fault, state])
        for fault in names
        for state in STATES
        if (fault, state) not in IMPOSSIBLE and met[fault, state] < least
    ]
