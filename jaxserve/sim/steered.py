"""What steers a small world: its variants, what can happen, and a clockwork that does not run by itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from jaxserve.sim.clockwork import Clockwork, Owner, Timer
from jaxserve.sim.device import StepFate
from jaxserve.sim.engine import RoundDriver, SimEngine, Weather
from jaxserve.sim.fake_nixl import Fault

GRID_S = 0.125
"""Delays are whole multiples of it, so that moments have no tails; one below its half takes no time, and what
is due at one moment happens in any order. It has no tails as a binary fraction either."""
POLL_S = 4.0
"""Between rounds that only look. Whatever ends a transfer may bring one at once."""
PAGE_SIZE, PAGES, MAX_LEN = 2, 3, 6
LEASE_S, TIMEOUT_S = 12.0, 7.0
MOST_WAITS = 200
"""So often may time pass before everything has ended."""
TRAVEL_S = 0.0005

HOSTS = ("prefill", "decode")
PARTS = frozenset(
    (
        *HOSTS,  # an engine: its core, its transfers, its pool
        "lent",  # what the decode engine's transfers need of the other: its pool, and that it lives
        *(f"{part}>{host}" for host in HOSTS for part in ("first", "last")),  # ends of a queue of messages
        *(f"client {client}" for client in range(2)),
    )
)
CLIENTS = (frozenset(("client 0",)), frozenset(("client 1",)))
"""What an event touches that concerns a client alone."""

Choose = Callable[[list[str]], int]
"""Which of these happens?"""

ENGINE_FAULTS = ("kill", "kill unheard", "stop", "clock")
MESSAGE_FAULTS = ("lose", "twice", "overtaken", "break")
TRANSFER_FAULTS = {
    "cannot be posted": Fault(post_fails=True, seconds=1.0),
    "never ends": Fault(never_ends=True, seconds=1.0),
    "fails half-way": Fault(errors=True, seconds=1.0),
    "flips a bit": Fault(flips_bit=True, seconds=1.0),
    "writes nothing": Fault(writes_nothing=True, seconds=1.0),
}
DIGEST_FINDS = ("flips a bit", "writes nothing")
STEP_FAULTS = {
    "fails": StepFate(error="RESOURCE_EXHAUSTED: out of memory"),
    "fails, its pool lost": StepFate(error="INTERNAL: the donated buffer is lost", moves=True),
    "moves the pool": StepFate(moves=True),
    "gives no numbers": StepFate(not_finite=True),
}
FAULTS = (
    *ENGINE_FAULTS,
    *MESSAGE_FAULTS,
    "leave",
    *(f"transfer {name}" for name in TRANSFER_FAULTS),
    *(f"step {name}" for name in STEP_FAULTS),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A small world before its first event.

    Attributes:
        second: where the request goes that is not split: "prefill" or "decode".
        shared: both requests begin with the same page.
        faults: those of FAULTS of which one may happen; none: nothing goes wrong.
        outputs: tokens that each request generates.
    """

    second: str = "decode"
    shared: bool = False
    digest: bool = True
    failure_policy: str = "recompute"
    outputs: int = 2
    faults: tuple[str, ...] = FAULTS

    def __str__(self) -> str:
        prompts = "shared prefix" if self.shared else "different prompts"
        digest = "digest" if self.digest else "no digest"
        return f"second on {self.second}, {prompts}, {digest}, {self.failure_policy}"


@dataclass(frozen=True, slots=True, eq=False)
class Option:
    """Something that can happen now.

    Attributes:
        label: names it, also in other states that are the same.
        touches: what it reads or changes, of PARTS. Two that touch nothing in common come to the same in
            either order, and neither makes the other impossible.
        fault: no other fault can happen after it.
    """

    label: str
    action: Callable[[], None]
    touches: frozenset[str]
    fault: bool = False

    def bare(self) -> "Option":
        """The same without its world."""
        return Option(self.label, _done, self.touches, self.fault)

    def apart(self, other: "Option") -> bool:
        """They commute."""
        return self.touches.isdisjoint(other.touches) and not (self.fault and other.fault)


def _done() -> None:
    """A bare option is only compared."""


class Scheduled(Timer):
    """Attributes:
    kind: "message", "round" or "event".
    to: of a message, the host that hears it.
    answers: of a message that is an answer, who waits for it, and the number of the question.
    """

    __slots__ = ("answers", "kind", "to")

    @property
    def idle(self) -> bool:
        """Nothing would come of it: an answer that nobody waits for any more."""
        if self.answers is None:
            return False
        caller, number = self.answers
        return number not in caller._waiting


class Steered(Clockwork):
    """A clockwork that does not run: whoever steers takes events from `pending`, in any order."""

    def __init__(self) -> None:
        super().__init__(0)
        self.pending: list[Scheduled] = []

    def after(
        self, delay: float, label: str, action: Callable[[], None], owner: Owner | None = None
    ) -> Timer:
        """See `Clockwork`."""
        steps = round(max(0.0, delay) / GRID_S)
        timer = Scheduled(self.now + steps * GRID_S, label, action, owner)
        words = label.split()
        timer.kind, timer.to, timer.answers = "event", "", None
        if words[0] == "message":
            timer.kind, timer.to = "message", words[2].split(">")[1].split(":")[0]
        elif words[0] == "answer":
            timer.kind, timer.to = "message", getattr(owner, "host", "")
            told = captured(action)
            timer.answers = (told["caller"], told["number"])
        elif words[1:2] == ["round"]:
            timer.kind = "round"
        self.pending.append(timer)
        return timer

    def sweep(self) -> None:
        """Forgets what will never happen."""
        self.pending = [
            timer
            for timer in self.pending
            if not (timer.cancelled or timer.idle) and (timer.owner is None or timer.owner.alive)
        ]

    def take(self, timer: Scheduled) -> None:
        """An event happens, now."""
        self.pending.remove(timer)
        timer.cancelled = True
        self.events += 1
        timer.action()

    def resume(self, owner: Owner) -> None:
        """See `Clockwork`: nothing was taken from the queue meanwhile."""


class Calm(Weather):
    """Rounds come at once while they have something to do, else seldom."""

    def poll_seconds(self, engine: SimEngine, idle: int) -> float:
        """See `Weather`."""
        return 0.0 if any(busy(rounds) for rounds in engine.rounds) else POLL_S


def busy(rounds: RoundDriver) -> bool:
    """Whether the next round would do something though nothing comes."""
    transfers = rounds.transfers
    fresh = any(fetch.fresh for peer in transfers._peers.values() for fetch in peer._fetches)
    return bool(fresh or transfers._events or transfers._leases._undigested)


def other(host: str) -> str:
    """The host of the other engine."""
    return HOSTS[1 - HOSTS.index(host)]


def captured(action: Callable[..., object]) -> Mapping[str, Any]:
    """What an event's closure holds."""
    if not isinstance(action, FunctionType):
        return {}
    code = action.__code__
    held = {
        name: cell.cell_contents
        for name, cell in zip(code.co_freevars, action.__closure__ or (), strict=True)
    }
    held.update(action.__kwdefaults__ or {})
    held.update(zip(code.co_varnames, action.__defaults__ or (), strict=False))
    return held
