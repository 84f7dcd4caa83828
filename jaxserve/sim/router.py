"""The router of a simulated cluster: it decides what `jaxserve.router` decides, and its calls are simulated.

A backend is probed while something is asked of it, or while it is not known to be well: the other probes
could change nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxserve.router.calls import Call, decode_body, prefill_body
from jaxserve.router.counts import Tally
from jaxserve.router.exchange import Trouble, failed, outcome, patience, verdict
from jaxserve.router.fleet import Backend, Fleet
from jaxserve.router.options import RouterOptions
from jaxserve.router.route import (
    Answered,
    AskDecode,
    AskPrefill,
    BreakOff,
    End,
    Finish,
    GiveUp,
    Outcome,
    PassRefusal,
    Probe,
    Probed,
    Route,
)
from jaxserve.sim.asks import Ask, Hear
from jaxserve.sim.broken import Broken
from jaxserve.sim.clockwork import Clockwork, Timer
from jaxserve.sim.http import Unwell
from jaxserve.sim.server import Reply, error_reply

SCHEME = "http://"
SELDOM = 3
"""After so many good checks in a row the next one is 8 intervals later: events are dearer here than time."""


class Line(Protocol):
    """A call under way.

    Attributes:
        ask: what an engine was asked; None: none has taken it.
        alive_at: when there was a connection or, if later, the last byte came; None: there is none yet.
        forsaken: the client has gone, and its engine will say so.
    """

    @property
    def ask(self) -> Ask | None: ...

    @property
    def alive_at(self) -> float | None: ...

    @property
    def forsaken(self) -> bool: ...


class Network(Protocol):
    """How a router reaches servers."""

    @property
    def patient(self) -> bool:
        """No time is too long: what was begun must come to its end by itself."""
        ...

    def post(
        self, journey: "Journey", role: str, host: str, body: bytes, hear: Hear, *, stream: bool
    ) -> Line:
        """A request to a server. `hear` is told what comes of it, never before this returns."""
        ...

    def close(self, line: Line) -> None:
        """Closes a connection without waiting for the answer."""
        ...

    def check(self, role: str, host: str, within_s: float, told: Callable[[int | Unwell], None]) -> None:
        """A health check, which takes at most so long. `told` gets the status, or why there is none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a client gets.

    Attributes:
        end: how its request has ended; None: the client has gone.
        reply: whole, where there is one.
    """

    end: End | None
    reply: Reply | None = None

    @property
    def right(self) -> bool:
        """It is an answer, and no error."""
        return isinstance(self.end, Finish) and self.reply is not None and self.reply.right


@dataclass(slots=True, eq=False)
class Journey:
    """One request of a client on its way.

    Attributes:
        number: its own.
        then: told once what the client gets.
        calls: to backends so far.
        backend: that is being asked; None: nobody is.
        line: of the call under way.
        begun: the client has a part of its answer.
        reply: the last answer that was read or passed on.
        timer: after which it is too late.
    """

    number: int
    route: Route
    call: Call
    stream: bool
    request_id: str | None
    then: Callable[[Told], None]
    calls: int = 0
    backend: Backend | None = None
    line: Line | None = None
    asked_at: float = 0.0
    begun: bool = False
    reply: Reply | None = None
    timer: Timer | None = None


class SimRouter:
    """Attributes:
    tally: as a router's metrics show it.
    journeys: that have not ended.
    """

    def __init__(
        self,
        clockwork: Clockwork,
        network: Network,
        *,
        prefill: Sequence[str],
        decode: Sequence[str],
        options: RouterOptions | None,
    ) -> None:
        """All hosts are well at first. Args: options: None: it is patient, and checks nobody's health."""
        self._clockwork, self._network, self._options = clockwork, network, options
        missed = 1 if options is None else options.max_missed_probes
        self._fleet = Fleet(
            [SCHEME + host for host in prefill], [SCHEME + host for host in decode], max_missed_probes=missed
        )
        for backend in self._fleet.backends:
            self._fleet.probe_answered(backend, 200)
        self._looks: dict[Backend, Timer | None] = {}
        """Backends that are watched, and when the next check is; None: it is being made."""
        self.tally = Tally()
        self.journeys: list[Journey] = []

    def send(
        self,
        call: Call,
        then: Callable[[Told], None],
        *,
        number: int = 0,
        stream: bool = False,
        request_id: str | None = None,
    ) -> None:
        """A client's request. Args: number: of its own; request_id: at the engines; None: theirs."""
        route = Route(self._fleet, self.tally, direct=call.direct)
        journey = Journey(number, route, call, stream, request_id, then)
        self.journeys.append(journey)
        self._go_on(journey)

    def forsake(self, ask: Ask) -> bool:
        """The client that this ask is for closes its connection. False: it is of none of them."""
        for journey in self.journeys:
            line = journey.line
            if line is not None and line.ask is ask:
                self._network.close(line)
                self._end(journey, Told(end=None))
                return True
        return False

    # A journey.

    def _go_on(self, journey: Journey) -> None:
        """Executes the order."""
        match journey.route.order:
            case AskPrefill(backend=backend):
                self._ask(journey, backend, prefill_body(journey.call), stream=False)
            case AskDecode(backend=backend, params=params):
                self._ask(journey, backend, decode_body(journey.call, params), stream=journey.stream)
            case Probe(backend=backend):
                self._probe(backend, lambda well: self._take(journey, Probed(well=well)))
            case Finish() | PassRefusal() as end:
                self._end(journey, Told(end=end, reply=journey.reply))
            case GiveUp() | BreakOff() as end:
                self._end(journey, Told(end=end, reply=error_reply(end.error)))
        self._watch()

    def _ask(self, journey: Journey, backend: Backend, body: bytes, *, stream: bool) -> None:
        journey.calls += 1
        number, journey.backend, journey.asked_at = journey.calls, backend, self._clockwork.now

        def hear(reply: Reply | None) -> None:
            if journey.calls == number and journey.backend is backend:
                self._heard(journey, reply)

        host = backend.url.removeprefix(SCHEME)
        journey.line = self._network.post(journey, backend.role, host, body, hear, stream=stream)
        self._arm(journey, backend)

    def _heard(self, journey: Journey, reply: Reply | None) -> None:
        """Something has come over the connection."""
        if journey.line is not None and journey.line.forsaken:
            self._end(journey, Told(end=None))
            return
        came = self._outcome(journey, reply)
        if came is not None:
            self._take(journey, came)

    def _outcome(self, journey: Journey, reply: Reply | None) -> Outcome | None:
        """What a reply comes to; None: more will come."""
        order = journey.route.order
        if not isinstance(order, AskPrefill | AskDecode):
            raise Broken("I12", f"nobody was asked, and {reply} has come of {order}")
        if reply is None:
            return failed(order, Trouble.BROKEN, why="ReadError", begun=journey.begun)
        if not reply.over:
            journey.begun = True
            return None
        journey.reply = reply
        came = outcome(order, verdict(self._fleet, order, reply.status), reply.status, reply.body)
        if isinstance(came, Answered) and came.status == 200 and came.params is None:
            raise Broken("I13", f"{order.backend.url}: a prompt was computed for a peer, nothing is leased")
        return came

    def _take(self, journey: Journey, came: Outcome) -> None:
        if journey in self.journeys:  # else its client has gone
            self._end_call(journey)
            journey.route.take(came)
            self._go_on(journey)

    def _end_call(self, journey: Journey) -> None:
        if journey.timer is not None:
            journey.timer.cancelled = True
        journey.timer = journey.line = journey.backend = None

    def _end(self, journey: Journey, told: Told) -> None:
        self._end_call(journey)
        self.journeys.remove(journey)
        journey.then(told)

    def _give_up(self, journey: Journey, trouble: Trouble) -> None:
        """The router closes the connection."""
        order, line = journey.route.order, journey.line
        if line is not None and isinstance(order, AskPrefill | AskDecode):
            self._network.close(line)
            self._take(journey, failed(order, trouble, why="ConnectTimeout", begun=journey.begun))

    def _arm(self, journey: Journey, backend: Backend) -> None:
        """It is looked whether it is too late when it can be at the earliest."""
        if self._options is None or journey.line is None:
            return
        now, asked, alive = self._clockwork.now, journey.asked_at, journey.line.alive_at
        limits = patience(backend.role, self._options)
        until, trouble = limits.ends(asked_at=asked, alive_at=alive)
        soonest, _ = limits.ends(asked_at=asked, alive_at=asked)
        if alive is None and now < soonest < until:
            until = soonest  # by then there may be a connection

        def look() -> None:
            if not self._network.patient:
                self._arm(journey, backend)

        if until - now > 1e-6:
            journey.timer = self._clockwork.after(until - now, "a router waits", look)
        else:
            self._give_up(journey, trouble)

    # Health.

    def _watch(self) -> None:
        options = self._options
        if options is None:
            return
        for backend in self._fleet.backends:
            timer = self._looks.get(backend)
            soon = self._clockwork.now + options.probe_interval_s
            if timer is not None and not backend.healthy and timer.at > soon:
                timer.cancelled = True
                self._look_later(backend, options)
            elif backend not in self._looks and self._matters(backend):
                self._look_later(backend, options)

    def _matters(self, backend: Backend) -> bool:
        return not backend.healthy or any(journey.backend is backend for journey in self.journeys)

    def _look_later(self, backend: Backend, options: RouterOptions, well_so_far: int = 0) -> None:
        def look() -> None:
            self._looks[backend] = None
            self._probe(backend, looked)

        def looked(well: bool) -> None:
            if self._matters(backend):
                self._look_later(backend, options, well_so_far + 1 if well else 0)
            else:
                del self._looks[backend]

        wait = options.probe_interval_s * 2 ** min(well_so_far, SELDOM)
        self._looks[backend] = self._clockwork.after(wait, f"router looks at {backend.url}", look)

    def _probe(self, backend: Backend, told: Callable[[bool], None]) -> None:
        """One health check."""
        if self._options is None:
            told(False)
            return
        fleet = self._fleet

        def end(found: int | Unwell) -> None:
            well = False
            if found is Unwell.UNANSWERED:
                fleet.probe_missed(backend)
            elif found is Unwell.REFUSED:
                fleet.probe_refused(backend, "ConnectError")
            else:
                well = fleet.probe_answered(backend, found)
            if backend.silent:
                for journey in [one for one in self.journeys if one.backend is backend]:
                    self._give_up(journey, Trouble.SILENT)
            told(well)
            self._watch()

        host = backend.url.removeprefix(SCHEME)
        self._network.check(backend.role, host, self._options.probe_timeout_s, end)
