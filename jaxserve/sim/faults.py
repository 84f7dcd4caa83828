"""The faults that a simulation injects, and the weather that injects them.

Numbers are those of the catalogue in docs/testing.md. A fault's rate is drawn from the seed: a probability
per event for what strikes an engine, per opportunity (a message, a transfer, a step, a copy) for the rest.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from jaxserve.sim.clockwork import Clockwork
from jaxserve.sim.device import StepFate
from jaxserve.sim.engine import SimEngine, Weather
from jaxserve.sim.fake_nixl import Fault, Posted
from jaxserve.sim.wire import Fate
from kv.wire import Confirm, Confirmed, Done, DoneAnswer, Hello, Message, Welcome
from scheduler.types import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of fault. Attributes: low, high: its rate is drawn between them, evenly in the logarithm."""

    name: str
    low: float
    high: float


STRIKES = {
    "X1": Kind(name="an engine is killed, and X2 comes back at its address", low=0.0015, high=0.01),
    "X3": Kind(name="an engine is stopped for a while", low=0.001, high=0.008),
    "X4": Kind(name="an engine is 100 times slower for a while", low=0.001, high=0.006),
    "X5": Kind(name="an engine comes back with another version of the model", low=0.001, high=0.006),
    "X11": Kind(name="one direction between two hosts is cut for a while", low=0.001, high=0.01),
    "X12": Kind(name="a host's answers are lost for a while", low=0.001, high=0.008),
    "X19": Kind(name="transfers given up write late", low=0.02, high=0.2),
    "X27": Kind(name="a bit flips in host memory", low=0.002, high=0.02),
    "X33": Kind(name="a client goes away", low=0.002, high=0.03),
    "X35": Kind(name="a request id is used twice", low=0.002, high=0.02),
    "X36": Kind(name="a request is aborted twice", low=0.002, high=0.02),
    "X37": Kind(name="a client repeats its request at once, many times", low=0.001, high=0.005),
    "X38": Kind(name="an engine's clock jumps by an hour", low=0.0006, high=0.004),
    "X41": Kind(name="an engine is asked to end", low=0.0015, high=0.01),
    "X42": Kind(name="the tokenizer fails", low=0.001, high=0.01),
    "X43": Kind(name="an engine's loop stalls for five seconds", low=0.002, high=0.012),
    "X45": Kind(name="an engine can open no file for a while", low=0.001, high=0.008),
    "X46": Kind(name="the prefix cache is emptied", low=0.002, high=0.02),
}
"""Whole engines, hosts and clients; a probability per event."""

CHANCES = {
    "X7": Kind(name="a message is lost", low=0.005, high=0.2),
    "X8": Kind(name="a message is 100 times slower", low=0.01, high=0.2),
    "X9": Kind(name="messages overtake each other", low=0.05, high=0.5),
    "X10": Kind(name="a message arrives twice", low=0.01, high=0.3),
    "X13": Kind(name="a handshake is cut short, or (more rarely) another message", low=0.1, high=0.6),
    "X14": Kind(name="a transfer cannot be posted", low=0.1, high=0.6),
    "X15": Kind(name="a transfer never ends", low=0.04, high=0.4),
    "X16": Kind(name="a transfer fails after it has written a part", low=0.05, high=0.5),
    "X17": Kind(name="a transfer is done, with a bit flipped", low=0.05, high=0.5),
    "X18": Kind(name="a transfer is done, and has written nothing", low=0.05, high=0.5),
    "X21": Kind(name="transfers end in another order", low=0.2, high=0.8),
    "X22": Kind(name="a confirmation or a release is lost, or comes twice", low=0.02, high=0.4),
    "X25": Kind(name="a copy to or from host memory fails", low=0.01, high=0.3),
    "X26": Kind(name="a step finds no memory", low=0.004, high=0.03),
    "X28": Kind(name="a step raises", low=0.004, high=0.03),
    "X29": Kind(name="a step takes 100 times longer", low=0.01, high=0.08),
    "X30": Kind(name="a step's logits are no numbers", low=0.004, high=0.04),
    "X31": Kind(name="a step takes a minute, to compile", low=0.006, high=0.04),
    "X32": Kind(name="a step fails and the donated pool is lost, or it moves", low=0.004, high=0.03),
    "X40": Kind(name="a timer fires late", low=0.01, high=0.2),
}
"""A probability per opportunity."""

LASTING = {
    "X6": "two engines have one name",
    "X20": "a lease ends while its pages are being read",
    "X23": "the pool is tiny",
    "X24": "a host tier is full",
    "X39": "clocks drift",
}
"""Properties of a world, or what follows from the others; they are met where they bite."""

NAMES = {**{key: kind.name for key, kind in (*STRIKES.items(), *CHANCES.items())}, **LASTING}

RARE_BOOST = 12.0
"""So many times more often do faults strike hosts that have a request in a state that is seldom reached."""

_VOUCHES = Confirm | Confirmed | Done | DoneAnswer

Meet = Callable[[str, Iterable[str]], None]
"""(fault, hosts that it strikes): counts which requests met it, in which state."""


class Storm(Weather):
    """Weather with faults.

    Attributes:
        rates: of each fault that this world has; emptied when it is calm.
        rare: hosts with a request in a state that is seldom reached.
    """

    def __init__(self, clockwork: Clockwork, rates: dict[str, float], meet: Meet) -> None:
        self.rates = rates
        self.cut: set[tuple[str, str]] = set()
        self.mute: set[str] = set()
        self.slow: set[str] = set()
        self.no_files: set[str] = set()
        self.stalled: set[str] = set()
        self.failed_steps: set[str] = set()
        self.not_finite: set[str] = set()
        self.rare: set[str] = set()
        self._clockwork, self._meet = clockwork, meet
        self._host_of: dict[str, str] = {}

    def calm(self) -> None:
        """All faults stop."""
        self.rates = {}
        for lasting in (self.cut, self.mute, self.slow, self.no_files, self.stalled):
            lasting.clear()

    def knows(self, engine: SimEngine) -> None:
        """A life has begun."""
        self._host_of[engine.epoch[:8]] = engine.host

    def under_way(
        self, transfers: Iterable[tuple[str, str, Fault, list[int]]], leased: Callable[[str, list[int]], bool]
    ) -> None:
        """Counts faults of transfers that have not ended.

        Args:
            transfers: (reader, source, fault, addresses that are read).
            leased: whether a host still has leases on what lies at these addresses.
        """
        for reader, source, fault, addresses in transfers:
            hosts = (self.host_of(reader), self.host_of(source))
            for name, has in (
                ("X20", not leased(hosts[1], addresses)),
                ("X15", fault.never_ends),
                ("X16", fault.errors),
                ("X17", fault.flips_bit),
                ("X18", fault.writes_nothing),
            ):
                if has:
                    self._meet(name, hosts)

    def host_of(self, agent: str) -> str:
        """The host of a NIXL agent."""
        return self._host_of[agent.split("-")[2]]

    def hits(self, fault: str, *hosts: str) -> bool:
        """Whether a fault strikes now."""
        rate = self.rates.get(fault, 0.0)
        if rate and not self.rare.isdisjoint(hosts):
            rate = min(0.8, rate * RARE_BOOST)
        if not self._clockwork.happens(rate):
            return False
        self._meet(fault, hosts)
        return True

    # What engines ask.

    def step_seconds(self, engine: SimEngine, plan: Plan) -> float:
        """See `Weather`."""
        seconds = 0.002 + 0.0005 * int(plan.rows.lens.sum())
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
            self._meet("X43", (engine.host,))
            return 5.0
        if self.hits("X40", engine.host):
            late += self._clockwork.chance.expovariate(2.0)
        return late * (100 if engine.host in self.slow else 1)

    def poll_seconds(self, engine: SimEngine, idle: int) -> float:
        """Long, so that few events are spent on looking: the protocol must not depend on it."""
        return min(0.005 * 1.5**idle, 2.0) * (0.5 + self._clockwork.chance.random())

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

    def step_fate(self, host: str) -> StepFate:
        """What becomes of a host's next step."""
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
        if self.hits("X30", host):
            self.not_finite.add(host)
            return StepFate(not_finite=True)
        return StepFate()

    def judge(self, here: str, there: str, message: Message) -> Fate:
        """What becomes of a message; see `SimWire`."""
        chance = self._clockwork.chance
        delay = 0.0002 + chance.expovariate(2000.0)
        if (here, there) in self.cut or here in self.mute:
            return Fate(delays=())
        if self.hits("X8", here, there):
            delay *= 100
        if self.hits("X9", here, there):
            delay += chance.expovariate(50.0)
        greeting = isinstance(message, Hello | Welcome)
        if (greeting or chance.random() < 0.2) and self.hits("X13", here, there):
            return Fate(delays=(), breaks=delay)
        if self.hits("X7", here, there):
            return Fate(delays=())
        if isinstance(message, _VOUCHES) and self.hits("X22", here, there):
            return Fate(delays=() if chance.random() < 0.5 else (delay, 2 * delay))
        if self.hits("X10", here, there):
            return Fate(delays=(delay, delay + chance.expovariate(100.0)))
        return Fate(delays=(delay,))

    def transfer(self, posted: Posted) -> Fault:
        """What becomes of a transfer; see `FakeNixlNetwork`."""
        chance = self._clockwork.chance
        hosts = (self.host_of(posted.reader), self.host_of(posted.source))
        seconds = chance.expovariate(500.0 if chance.random() < 0.7 else 20.0)
        if self.hits("X21", *hosts):
            seconds += chance.expovariate(10.0)
        fault = Fault(
            cycles=chance.randrange(3),
            seconds=seconds,
            post_fails=self.hits("X14", *hosts),
            never_ends=self.hits("X15", *hosts),
            errors=self.hits("X16", *hosts),
            flips_bit=self.hits("X17", *hosts),
            writes_nothing=self.hits("X18", *hosts),
        )
        if fault.errors or fault.flips_bit or fault.writes_nothing:
            fault = replace(fault, seconds=seconds + chance.expovariate(5.0))
        return fault


def draw_rates(clockwork: Clockwork, share: float, without: Iterable[str] = ()) -> dict[str, float]:
    """A rate for each fault that a world has: about `share` of all, so that worlds differ in kind."""
    chance = clockwork.chance
    rates = {}
    for fault, kind in (*STRIKES.items(), *CHANCES.items()):
        drawn = chance.random() < share
        rate = kind.low * (kind.high / kind.low) ** chance.random()
        if drawn and fault not in without:
            rates[fault] = rate
    return rates
