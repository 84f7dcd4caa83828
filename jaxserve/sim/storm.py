"""Weather with faults: what becomes of messages, transfers, steps, copies and timers while they strike."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from jaxserve.sim.clockwork import Clockwork
from jaxserve.sim.cover import Cover, Spell
from jaxserve.sim.device import StepFate
from jaxserve.sim.engine import SimEngine, Weather
from jaxserve.sim.fake_nixl import Fault, Posted
from jaxserve.sim.faults import CHANCES
from jaxserve.sim.http import Break, Links
from jaxserve.sim.http import Fate as HttpFate
from jaxserve.sim.wire import Fate
from kv.wire import Confirm, Confirmed, Done, DoneAnswer, Hello, Message, Welcome
from scheduler.types import Plan

_VOUCHES = Confirm | Confirmed | Done | DoneAnswer


@dataclass(slots=True, eq=False)
class _Hit:
    """A transfer of which a fault is known, or will be. Attributes: of: numbers of the faults; begun: its
    number in the order of their posts."""

    fault: Fault
    of: set[str]
    hosts: tuple[str, str]
    begun: int
    spells: dict[str, Spell] = field(default_factory=dict)


class Storm(Weather, Links):
    """Weather and links with faults.

    Attributes:
        rates: of each fault that this world has; emptied when it is calm.
        cut, mute, slow, no_files: what lasts, by whom it concerns: (from, to) of a direction, else a host.
        rare: hosts with a request in a state that is seldom reached.
        posted: a transfer has been posted since somebody looked.
    """

    def __init__(
        self, clockwork: Clockwork, rates: dict[str, float], cover: Cover, *, pace: float = 1.0
    ) -> None:
        """Args: pace: steps take so many times as long as the fastest."""
        self.rates = rates
        self._pace = pace
        self.cut: dict[tuple[str, str], Spell] = {}
        self.mute: dict[str, Spell] = {}
        self.slow: dict[str, Spell] = {}
        self.no_files: dict[str, Spell] = {}
        self.stalled: set[str] = set()
        self.failed_steps: set[str] = set()
        self.not_finite: set[str] = set()
        self.rare: set[str] = set()
        self.posted = False
        self._clockwork, self._cover = clockwork, cover
        self._host_of: dict[str, str] = {}
        self._transfers: dict[int, _Hit] = {}
        """By the identity of their fault, which the network passes on."""
        self._posts = 0
        self._travelling: dict[tuple[str, str], list[tuple[float, bool]]] = {}
        """Per direction between two hosts, when the messages on their way arrive, and whether X9 made one
        late."""

    def calm(self) -> None:
        """All faults stop."""
        self.rates = {}
        self.stalled.clear()
        for lasting in (self.cut, self.mute, self.slow, self.no_files):
            for spell in lasting.values():
                self._cover.end(spell)
            lasting.clear()

    def begins(self, host: str, epoch: str) -> None:
        """A life begins: a new process, that opens files again and whose loop runs."""
        self._host_of[epoch[:8]] = host
        self.stalled.discard(host)
        self.rare.discard(host)
        self._cover.forget(host)
        spell = self.no_files.pop(host, None)
        if spell is not None:
            self._cover.end(spell)

    def under_way(
        self,
        transfers: Iterable[tuple[str, str, Fault, list[int]]],
        leased: Callable[[str, list[int]], bool],
        has_written: Callable[[Fault], bool],
    ) -> None:
        """Follows faults of transfers from their post to their end.

        Args:
            transfers: (reader, source, fault, addresses that are read) of those that have not ended.
            leased: whether a host still has leases on what lies at these addresses.
            has_written: whether the transfer with this fault has ended well.
        """
        self.posted = False
        left: dict[int, _Hit] = {}
        for reader, source, fault, addresses in transfers:
            hosts = (self.host_of(reader), self.host_of(source))
            known = self._transfers.pop(id(fault), None)
            hit = left[id(fault)] = known or _Hit(fault, set(), hosts, self._posts)
            if "X20" not in hit.spells and not leased(hosts[1], addresses):
                hit.of.add("X20")
            for name in sorted(hit.of.difference(hit.spells, ("X21",))):
                hit.spells[name] = self._cover.begin(name, hosts)
        self._overtaken(left, [hit for hit in self._transfers.values() if has_written(hit.fault)])
        for hit in self._transfers.values():
            for spell in hit.spells.values():
                self._cover.end(spell)
        self._transfers = left

    def _overtaken(self, left: dict[int, _Hit], ended: list[_Hit]) -> None:
        """X21 meets somebody where a transfer has ended before one of the same host that began earlier."""
        for hit in left.values():
            late = "X21" in hit.of and "X21" not in hit.spells and not hit.fault.never_ends
            if late and any(
                other.begun > hit.begun and not set(other.hosts).isdisjoint(hit.hosts) for other in ended
            ):
                hit.spells["X21"] = self._cover.begin("X21", hit.hosts)

    def host_of(self, agent: str) -> str:
        """The host of a NIXL agent."""
        return self._host_of[agent.split("-")[2]]

    def strikes(self, fault: str, *hosts: str) -> bool:
        """Whether a fault strikes now; more often where a request is in a rare state."""
        rate = self.rates.get(fault, 0.0)
        if rate and not self.rare.isdisjoint(hosts):
            rate = min(0.8, rate * CHANCES[fault].boost)
        return self._clockwork.happens(rate)

    def hits(self, fault: str, *hosts: str) -> bool:
        """Whether a fault strikes now; then it is counted."""
        if not self.strikes(fault, *hosts):
            return False
        self._cover.strike(fault, hosts)
        return True

    # What engines ask.

    def step_seconds(self, engine: SimEngine, plan: Plan) -> float:
        """See `Weather`."""
        seconds = self._pace * (0.002 + 0.0005 * int(plan.rows.lens.sum()))
        if self.hits("X31", engine.host):
            return 60.0
        if self.hits("X29", engine.host):
            seconds *= 100
        return seconds * (100 if engine.host in self.slow else 1)

    def lateness(self, engine: SimEngine) -> float:
        """See `Weather`."""
        late = 0.001 * self._clockwork.chance.random()
        if engine.host in self.stalled:
            self.stalled.discard(engine.host)
            self._cover.strike("X43", (engine.host,))
            return 5.0
        if self.hits("X40", engine.host):
            late += self._clockwork.chance.expovariate(2.0)
        return late * (100 if engine.host in self.slow else 1)

    def poll_seconds(self, engine: SimEngine, idle: int) -> float:
        """Long, so that few events are spent on looking: the protocol must not depend on it. But a thread of
        a server is never so late that the heartbeats which it sends come too late for a lease."""
        leaf = engine.node.nixl
        most = 2.0 if leaf is None else min(2.0, leaf.lease_s / 6)
        return min(0.005 * 1.5 ** min(idle, 40), most) * (0.5 + self._clockwork.chance.random())

    def copy_seconds(self, engine: SimEngine) -> float:
        """See `Weather`."""
        return self._clockwork.chance.expovariate(200.0) * (100 if engine.host in self.slow else 1)

    def copy_fails(self, engine: SimEngine) -> bool:
        """See `Weather`."""
        return self.hits("X25", engine.host)

    def agent_fails(self, engine: SimEngine) -> bool:
        """See `Weather`."""
        return engine.host in self.no_files

    def refuses(self, host: str) -> bool:
        """Whether a host can open no connection."""
        return host in self.no_files

    def blocked(self, here: str, there: str) -> bool:
        """See `Links`."""
        return (here, there) in self.cut or here in self.mute

    def exchange(self, host: str) -> HttpFate:
        """See `Links`. What is lost comes a little later; nothing overtakes or comes twice: it is TCP's."""
        chance, late = self._clockwork.chance, 0.0
        if self.hits("X8", host):
            late += 0.1
        if self.hits("X7", host):
            late += 0.2 * 2 ** chance.randrange(4)
        if chance.random() < 0.2 and self.hits("X13", host):
            return HttpFate(
                late_s=late, breaks=chance.choice(tuple(Break)), after_s=chance.expovariate(10.0 / self._pace)
            )
        return HttpFate(late_s=late)

    def step_fate(self, host: str, samplers: Callable[[], list[tuple[str, int]]]) -> StepFate:
        """What becomes of a host's next step. Args: samplers: (request, index) of its rows that sample."""
        if self.hits("X26", host):
            self.failed_steps.add(host)
            return StepFate(error="RESOURCE_EXHAUSTED: out of memory")
        if self.hits("X28", host):
            self.failed_steps.add(host)
            return StepFate(error="INTERNAL: the step failed")
        if self.hits("X32", host):
            if self._clockwork.happens(0.5):
                return StepFate(moves=True)
            self.failed_steps.add(host)
            return StepFate(error="INTERNAL: the donated buffer is lost", moves=True)
        if self.strikes("X30", host) and (whose := samplers()):
            new = [place for place, whom in enumerate(whose) if self._cover.state(host, whom) == "prefilling"]
            place = self._clockwork.chance.choice(new or range(len(whose)))
            self._cover.strike_sequences("X30", host, whose[place : place + 1])
            self.not_finite.add(host)
            return StepFate(not_finite=True, sampler=place)
        return StepFate()

    def judge(self, here: str, there: str, message: Message) -> Fate:
        """What becomes of a message; see `SimWire`."""
        chance = self._clockwork.chance
        delay = 0.0002 + chance.expovariate(2000.0)
        if self.blocked(here, there):
            return Fate(delays=())
        if self.hits("X8", here, there):
            delay *= 100
        greeting = isinstance(message, Hello | Welcome)
        if (greeting or chance.random() < 0.2) and self.hits("X13", here, there):
            return Fate(delays=(), breaks=delay)
        if self.hits("X7", here, there):
            return Fate(delays=())
        vouches = isinstance(message, _VOUCHES) and self.hits("X22", here, there)
        if vouches and chance.random() < 0.5:
            return Fate(delays=())
        delay = self._on_its_way(here, there, delay)
        if vouches:
            return Fate(delays=(delay, 2 * delay))
        if self.hits("X10", here, there):
            return Fate(delays=(delay, delay + chance.expovariate(100.0)))
        return Fate(delays=(delay,))

    def _on_its_way(self, here: str, there: str, delay: float) -> float:
        """X9: a message overtakes those that are on their way, or is so late that others may overtake it. It
        is counted where one does. Returns its delay."""
        if "X9" not in self.rates:
            return delay
        now, chance = self._clockwork.now, self._clockwork.chance
        ahead = [entry for entry in self._travelling.get((here, there), ()) if entry[0] > now]
        struck = self.strikes("X9", here, there)
        if struck and ahead:
            delay = min(delay, (max(ahead)[0] - now) * chance.random())
        elif struck:
            delay += chance.expovariate(50.0)
        if any(at > now + delay and (struck or late) for at, late in ahead):
            self._cover.strike("X9", (here, there))
        self._travelling[here, there] = [*ahead, (now + delay, struck)]
        return delay

    def transfer(self, posted: Posted) -> Fault:
        """What becomes of a transfer; see `FakeNixlNetwork`."""
        chance = self._clockwork.chance
        hosts = (self.host_of(posted.reader), self.host_of(posted.source))
        if self.hits("X14", *hosts):
            return Fault(post_fails=True)
        seconds = chance.expovariate(500.0 if chance.random() < 0.7 else 20.0)
        of = {name for name in ("X15", "X16", "X17", "X18", "X21") if self.strikes(name, *hosts)}
        if "X21" in of:
            seconds += chance.expovariate(10.0)
        if not of.isdisjoint(("X16", "X17", "X18")):
            seconds += chance.expovariate(5.0)
        fault = Fault(
            cycles=chance.randrange(3),
            seconds=seconds,
            never_ends="X15" in of,
            errors="X16" in of,
            flips_bit="X17" in of,
            writes_nothing="X18" in of,
        )
        self._posts += 1
        self._transfers[id(fault)] = _Hit(fault, of, hosts, self._posts)
        self.posted = True
        return fault
