"""What must hold of a router, seen from outside: what was on the wire, and how the servers really are.

Nothing here asks the router what it thinks. Numbers R1 to R5 are those of docs/testing.md.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxserve.router.calls import PARAMS, refuses_params
from jaxserve.router.options import RouterOptions
from jaxserve.router.route import TRY_ANOTHER, BreakOff, Finish, GiveUp, PassRefusal
from jaxserve.sim.broken import Broken
from jaxserve.sim.engine import SimEngine
from jaxserve.sim.http import ROUTER, TRAVEL_S, Exchange, Links, Unwell
from jaxserve.sim.router import SELDOM, Told
from jaxserve.sim.server import Reply

SLACK_S = 10 * TRAVEL_S
CALLS = 2
"""Of a role, in an attempt: one, and one more where it fails."""


@dataclass(slots=True, eq=False)
class _Call:
    """Attributes: how: "said", "broken" or "closed" once it is over; said: what the server answered;
    groundless: it was given up, and its server was neither silent nor late."""

    exchange: Exchange
    how: str = "open"
    groundless: bool = False
    ended_at: float = 0.0
    said: Reply | None = None


@dataclass(slots=True, eq=False)
class _Trip:
    """One client's request. Attributes: asked: its body."""

    asked: dict[str, Any]
    calls: list[_Call] = field(default_factory=list)

    def of(self, role: str) -> list[_Call]:
        return [call for call in self.calls if call.exchange.role == role]

    def attempt(self) -> list[_Call]:
        """Calls to decode servers since the last one that refused the parameters."""
        calls = self.of("decode")
        refused = [number for number, call in enumerate(calls) if _refuses(call.said)]
        return calls[refused[-1] + 1 :] if refused else calls


@dataclass(slots=True, eq=False)
class _Host:
    """How a server really is.

    Attributes:
        well_since: it serves, and both ways to it are open; None: it does not now.
        bad_at: when it last was not well.
        mute_since: it says nothing, alive as it is; None: it does not now.
    """

    epoch: str = ""
    well_since: float | None = None
    bad_at: float = -1.0
    mute_since: float | None = None


class RouterLaws:
    """Looks after every event, and at every call."""

    def __init__(
        self,
        clock: Callable[[], float],
        lives: Callable[[], Mapping[str, SimEngine]],
        links: Links,
        *,
        prefill: Sequence[str],
        decode: Sequence[str],
        options: RouterOptions,
        patient: Callable[[], bool],
    ) -> None:
        """
        Args:
            lives: of every host its current life, or its last one.
            patient: no answer is too late now.
        """
        self._clock, self._lives, self._links, self._patient = clock, lives, links, patient
        self._decode, self._options = tuple(decode), options
        self._hosts = {host: _Host() for host in (*prefill, *decode)}
        self._trips: dict[int, _Trip] = {}
        self._calls: dict[Exchange, _Call] = {}
        self._suspects: set[tuple[str, str]] = set()
        self._looked: dict[tuple[str, str], float] = {}
        self._missed: Counter[tuple[str, str]] = Counter()
        every, within = options.probe_interval_s, options.probe_timeout_s
        self._known_s = every + within + SLACK_S
        """After so long a server that is well again is known to be."""
        self._silent_s = (
            every * 2**SELDOM + within + (options.max_missed_probes - 1) * (every + within) + SLACK_S
        )
        """After so long a server that says nothing is known not to."""

    def begins(self, number: int, body: bytes) -> None:
        """A client asks the router."""
        self._trips[number] = _Trip(json.loads(body))

    # Events: see `jaxserve.sim.http.Watcher`.

    def asked(self, call: Exchange) -> None:
        """R2: nobody is asked whose connection broke, or who has missed too many health checks, until it has
        answered one with 200. R4: what is asked is what this client wants, with what a prefill server has
        answered to it. R5: how often."""
        trip, body = self._trips[call.journey], json.loads(call.body)
        if (call.role, call.host) in self._suspects:
            raise Broken("R2", f"{call.host} is asked again before it has answered a health check")
        if any(body.get(key) != trip.asked.get(key) for key in ("prompt", "cache_salt", "seed")):
            raise Broken("R4", f"{call.host} is asked for something else than the client has asked for")
        params = body.get(PARAMS)
        if call.role == "decode" and params != _params_of(trip):
            raise Broken("R4", f"{call.host} gets parameters that no prefill server gave to this request")
        same = trip.attempt() if call.role == "decode" else trip.of("prefill")
        late = call.role == "prefill" and trip.of("decode")
        if len(same) >= CALLS or late or len(trip.of("decode")) >= 2 * CALLS:
            raise Broken("R5", f"{call.host} is asked after {len(trip.calls)} calls for the same request")
        self._calls[call] = _Call(call)
        trip.calls.append(self._calls[call])

    def told(self, call: Exchange, reply: Reply | None) -> None:
        """R4: a decode server refuses parameters only where its key is not that of their maker."""
        known = self._over(call, "broken" if reply is None else "said")
        known.said = reply
        if reply is None:
            self._suspects.add((call.role, call.host))
            self._doubt(call.host)
        if call.role == "decode" and _refuses(reply):
            lenders = [one.exchange.engine for one in self._trips[call.journey].of("prefill") if one.said]
            reader = call.engine
            if reader is None or not lenders or lenders[-1] is None:
                raise Broken("R4", f"{call.host} refuses parameters that nobody gave")
            if reader.node.key == lenders[-1].node.key:
                raise Broken("R4", f"{call.host} refuses the parameters of {lenders[-1].host}")

    def closed(self, call: Exchange) -> None:
        """The router has given it up, or its client has gone."""
        known, (since, most) = self._over(call, "closed"), self._limit(call)
        missed = self._missed[call.role, call.host] >= self._options.max_missed_probes
        known.groundless = not missed and self._clock() < since + most - SLACK_S

    def checked(self, role: str, host: str, found: int | Unwell) -> None:
        """A health check is over."""
        if found == 200:
            self._suspects.discard((role, host))
        else:
            self._doubt(host)
        if found is not Unwell.UNANSWERED:
            self._looked[role, host] = self._clock()
            self._missed[role, host] = 0
            return
        self._missed[role, host] += 1
        if self._missed[role, host] >= self._options.max_missed_probes:
            self._suspects.add((role, host))

    def look(self) -> None:
        """After every event. R3: a call to a server that says nothing is given up as soon as it has missed as
        many health checks as it may, and these are made in time."""
        now = self._clock()
        lives, blocked, refuses = self._lives(), self._links.blocked, self._links.refuses
        lost = refuses(ROUTER)
        for host, seen in self._hosts.items():
            engine = lives[host]
            mute = engine.alive and (engine.paused or blocked(ROUTER, host) or blocked(host, ROUTER))
            seen.mute_since = (now if seen.mute_since is None else seen.mute_since) if mute else None
            if lost or mute or not engine.alive or engine.draining is not None or refuses(host):
                seen.well_since, seen.bad_at = None, now
            elif seen.well_since is None or seen.epoch != engine.epoch:
                seen.well_since, seen.epoch = now, engine.epoch
        for call in self._calls:
            missed = self._missed[call.role, call.host]
            if missed >= self._options.max_missed_probes:
                raise Broken("R3", f"{call.host} has missed {missed} health checks, and is waited for")
            mute_since = self._hosts[call.host].mute_since
            if mute_since is not None:
                since = max(mute_since, call.asked_at, self._looked.get((call.role, call.host), 0.0))
                if now > since + self._silent_s:
                    raise Broken("R3", f"{call.host} has said nothing for {now - since:.3f} s")
            since, most = self._limit(call)
            if now > since + most + SLACK_S and not self._patient():
                raise Broken(
                    "R3", f"{call.host} may take {most:g} s, and is waited for after {now - since:.3f} s"
                )

    def _limit(self, call: Exchange) -> tuple[float, float]:
        """Since when, and for how long, a call may be without news."""
        options, since = self._options, call.asked_at
        most = options.connect_timeout_s
        if call.alive_at is not None:
            since, most = call.alive_at, options.silence_timeout_s
        if call.role == "prefill" and call.asked_at + options.prefill_timeout_s < since + most:
            return call.asked_at, options.prefill_timeout_s
        return since, most

    # Ends.

    def ended(self, number: int, told: Told) -> None:
        """R4: a client's answer is that of the last server that was asked for it. R1: it gets an error of the
        router's own only where nobody could have answered. R3: nobody is given up who is neither silent nor
        late. R5: it has one end."""
        trip = self._trips.pop(number, None)
        if trip is None:
            raise Broken("R5", f"request {number} ends twice")
        for call in trip.calls:
            if call.groundless and told.end is not None:
                raise Broken("R3", f"{call.exchange.host} is given up, neither silent nor late")
        last = trip.calls[-1] if trip.calls else None
        match told.end:
            case Finish() | PassRefusal():
                role = "decode" if isinstance(told.end, Finish) else "prefill"
                if last is None or last.exchange.role != role or last.said is None or last.said != told.reply:
                    raise Broken("R4", f"a client gets {told.reply}, which no server has said to it")
                if role == "prefill" and not 400 <= last.said.status < 500:
                    raise Broken("R4", f"a client gets a prefill server's answer {last.said.status}")
                if role == "decode" and last.said.status in TRY_ANOTHER:
                    self._nobody_left(trip)
            case GiveUp():
                self._nobody_left(trip)
            case BreakOff():
                self._really_ended(last)
            case None:  # the client has gone
                pass

    def _nobody_left(self, trip: _Trip) -> None:
        """R1, before an answer has begun: each decode server that was well for so long that it must have been
        known when the first one failed was asked, unless two others were: there is one retry. One that has
        failed alone, and is well, was asked again."""
        calls, now = trip.attempt(), self._clock()
        at = calls[0].ended_at if calls else now
        hosts = {call.exchange.host for call in calls}
        if len(hosts) >= CALLS:
            return
        for host in self._decode:
            since = self._hosts[host].well_since
            if since is None:
                continue
            if host not in hosts and since + self._known_s <= at:
                raise Broken(
                    "R1", f"a client gets an error, and {host}, well since {since:.3f}, was not asked"
                )
            if host in hosts and len(calls) == 1 and calls[0].how != "said" and since <= at:
                raise Broken("R1", f"a client gets an error, and {host}, which is well, was asked only once")

    def _really_ended(self, last: _Call | None) -> None:
        """R1, after an answer has begun: the connection broke, or its server was not well, or late."""
        if last is None or last.exchange.role != "decode":
            raise Broken("R1", "an answer is broken off that no decode server has begun")
        call = last.exchange
        heard = call.asked_at if call.alive_at is None else call.alive_at
        late = self._clock() - heard >= self._options.silence_timeout_s - SLACK_S
        if last.how != "broken" and not late and self._hosts[call.host].bad_at < call.asked_at:
            raise Broken("R1", f"the answer of {call.host} is broken off, which was well all the time")

    def _over(self, call: Exchange, how: str) -> _Call:
        known = self._calls.pop(call)
        known.how, known.ended_at = how, self._clock()
        return known

    def _doubt(self, host: str) -> None:
        """The router has reason to think that it is not well; from now on it may learn better."""
        seen = self._hosts[host]
        seen.bad_at = self._clock()
        if seen.well_since is not None:
            seen.well_since = seen.bad_at


def _refuses(reply: Reply | None) -> bool:
    return reply is not None and reply.status == 400 and refuses_params(reply.body)


def _params_of(trip: _Trip) -> object:
    """What a decode server must get: what the last prefill server gave, until one has refused it."""
    calls = trip.of("prefill")
    said = calls[-1].said if calls else None
    if said is None or said.status != 200 or any(_refuses(call.said) for call in trip.of("decode")):
        return None
    return json.loads(said.body).get(PARAMS)
