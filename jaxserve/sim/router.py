"""The router of a simulated cluster: it decides what `jaxserve.router` decides, and its calls are simulated.

A backend is probed while something is asked of it, or while it is not known to be well: the other probes
could change nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxserve.router.calls import Call, decode_body, prefill_body, refuses_params, transfer_params
from jaxserve.router.counts import Tally
from jaxserve.router.fleet import Backend, Fleet
from jaxserve.router.options import RouterOptions
from jaxserve.router.route import (
    Answered,
    AskDecode,
    AskPrefill,
    BreakOff,
    Failed,
    Failure,
    Finish,
    GiveUp,
    LeftUnread,
    Outcome,
    ParamsRefused,
    Passed,
    PassRefusal,
    Probe,
    Probed,
    Route,
    Verdict,
    judge,
)
from jaxserve.sim.asks import Ask, Hear
from jaxserve.sim.clockwork import Clockwork, Timer
from jaxserve.sim.laws import Broken
from jaxserve.sim.server import Reply

SCHEME = "http://"
TRAVEL_S = 0.001
"""Of a health check and its answer."""
CALMEST = 6
"""After so many good checks in a row the next one is 64 intervals later: events are dearer here than time."""


class Network(Protocol):
    """How a router reaches servers; in a simulation, `jaxserve.sim.clients.Clients`."""

    @property
    def patient(self) -> bool:
        """No time is too long: what was begun must come to its end by itself."""
        ...

    def post(self, host: str, body: bytes, hear: Hear, *, stream: bool, request_id: str | None) -> Ask | None:
        """A request to a server; None: it was not taken, and `hear` is told so."""
        ...

    def leave(self, ask: Ask) -> None:
        """Closes a connection without waiting for the answer."""
        ...

    def health(self, host: str) -> str:
        """What a health check meets: "well", "stopped" or "gone"."""
        ...


@dataclass(slots=True, eq=False)
class Journey:
    """One request of a client on its way.

    Attributes:
        then: told once whether the client has its answer.
        calls: to backends so far.
        backend: that is being asked; None: nobody is.
        ask: what it was asked, if it took it.
        begun, right: of the client's answer.
        timer: after which it is too late.
    """

    route: Route
    call: Call
    stream: bool
    request_id: str | None
    then: Callable[[bool], None]
    calls: int = 0
    backend: Backend | None = None
    ask: Ask | None = None
    asked_at: float = 0.0
    begun: bool = False
    right: bool = False
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
        self._watched: list[Backend] = []
        self.tally = Tally()
        self.journeys: list[Journey] = []

    def send(
        self, call: Call, then: Callable[[bool], None], *, stream: bool = False, request_id: str | None = None
    ) -> None:
        """A client's request. Args: request_id: at the engines; None: theirs."""
        route = Route(self._fleet, self.tally, direct=call.direct)
        journey = Journey(route, call, stream, request_id, then)
        self.journeys.append(journey)
        self._go_on(journey)

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
            case PassRefusal() | Finish() | GiveUp() | BreakOff():
                self.journeys.remove(journey)
                journey.then(journey.right)
        self._watch()

    def _ask(self, journey: Journey, backend: Backend, body: bytes, *, stream: bool) -> None:
        journey.calls += 1
        number, journey.backend, journey.asked_at = journey.calls, backend, self._clockwork.now

        def hear(reply: Reply | None) -> None:
            if journey.calls == number and journey.backend is backend:
                self._heard(journey, reply)

        host, name = backend.url.removeprefix(SCHEME), journey.request_id
        journey.ask = self._network.post(host, body, hear, stream=stream, request_id=name)
        if self._options is not None:
            decodes = backend.role == "decode"
            patience = self._options.silence_timeout_s if decodes else self._options.prefill_timeout_s
            self._arm(journey, patience, patience)

    def _heard(self, journey: Journey, reply: Reply | None) -> None:
        """Something has come over the connection."""
        if journey.ask is not None and journey.ask.aborted:  # by the client, who has gone
            self._end_call(journey)
            self.journeys.remove(journey)
            journey.then(False)
            return
        outcome = self._outcome(journey, reply)
        if outcome is not None:
            self._take(journey, outcome)

    def _outcome(self, journey: Journey, reply: Reply | None) -> Outcome | None:
        """What a reply comes to; None: more will come."""
        if reply is None:
            return Failed(failure=Failure.BROKEN, why="ReadError", begun=journey.begun)
        match journey.route.order:
            case AskPrefill(backend=backend):
                if reply.status != 200:
                    return Answered(status=reply.status)
                params = transfer_params(reply.body)
                if params is None:
                    raise Broken("I13", f"{backend.url}: a prompt was computed for a peer, nothing is leased")
                return Answered(status=200, params=params)
            case AskDecode() as order:
                if not reply.over:
                    journey.begun = True
                    return None
                verdict = judge(self._fleet, order, reply.status)
                if verdict is Verdict.LEAVE and not journey.begun:
                    return LeftUnread(status=reply.status)
                if verdict is Verdict.READ and refuses_params(reply.body):
                    return ParamsRefused()
                journey.right = reply.right
                return Passed()
            case order:
                raise Broken("I12", f"nobody was asked, and {reply} has come of {order}")

    def _take(self, journey: Journey, outcome: Outcome) -> None:
        self._end_call(journey)
        journey.route.take(outcome)
        self._go_on(journey)

    def _end_call(self, journey: Journey) -> None:
        if journey.timer is not None:
            journey.timer.cancelled = True
        journey.timer = journey.ask = journey.backend = None

    def _give_up(self, journey: Journey, failure: Failure) -> None:
        """The router closes the connection."""
        ask = journey.ask
        if ask is not None:
            gone = ask.aborted
            self._network.leave(ask)
            if gone:
                return self._heard(journey, None)
        self._take(journey, Failed(failure=failure, begun=journey.begun))

    def _arm(self, journey: Journey, patience: float, wait: float) -> None:
        """Time runs from the last byte where there was one."""

        def look() -> None:
            heard = journey.asked_at if journey.ask is None else max(journey.asked_at, journey.ask.heard_at)
            left = heard + patience - self._clockwork.now
            if left > 1e-6:
                self._arm(journey, patience, left)
            elif not self._network.patient:
                self._give_up(journey, Failure.LATE)

        journey.timer = self._clockwork.after(wait, "a router waits", look)

    # Health.

    def _watch(self) -> None:
        if self._options is None:
            return
        for backend in self._fleet.backends:
            if backend not in self._watched and self._matters(backend):
                self._watched.append(backend)
                self._probe_later(backend)

    def _matters(self, backend: Backend) -> bool:
        return not backend.healthy or any(journey.backend is backend for journey in self.journeys)

    def _probe_later(self, backend: Backend, well_so_far: int = 0) -> None:
        def probe() -> None:
            self._probe(backend, probed)

        def probed(well: bool) -> None:
            if self._matters(backend):
                self._probe_later(backend, well_so_far + 1 if well else 0)
            else:
                self._watched.remove(backend)

        if self._options is not None:
            wait = self._options.probe_interval_s * 2 ** min(well_so_far, CALMEST)
            self._clockwork.after(wait, f"router looks at {backend.url}", probe)

    def _probe(self, backend: Backend, told: Callable[[bool], None]) -> None:
        """One health check."""
        if self._options is None:
            told(False)
            return
        host, fleet, patience = backend.url.removeprefix(SCHEME), self._fleet, self._options.probe_timeout_s
        stopped = self._network.health(host) == "stopped"

        def end() -> None:
            well = False
            match self._network.health(host):
                case "well":
                    well = fleet.probe_answered(backend, 200)
                case "stopped":
                    fleet.probe_missed(backend)
                case _:
                    fleet.probe_refused(backend, "ConnectError")
            if backend.silent:
                for journey in [one for one in self.journeys if one.backend is backend]:
                    self._give_up(journey, Failure.SILENT)
            told(well)

        self._clockwork.after(patience if stopped else TRAVEL_S, f"router probes {backend.url}", end)
