"""HTTP between a simulated router and the servers behind it: a connection for each call.

It is TCP's. What is sent comes whole and in its order, late where the link is cut for a while; or the
connection breaks, and both ends notice. A server whose process is stopped has a kernel that still takes
connections; one that has no file left takes them later.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from jaxserve.sim.asks import Ask, Hear
from jaxserve.sim.clockwork import Clockwork
from jaxserve.sim.engine import SimEngine
from jaxserve.sim.server import Reply

ROUTER = "router"
"""Its host's name."""
TRAVEL_S = 0.001
"""Of a request, a health check or its answer."""
AGAIN_S, AGAIN_MOST_S = 0.05, 2.0
"""TCP sends again what was lost: first after so long, then each time after twice as long, up to this."""
ACCEPT_S = 1.0
"""An event loop accepts again so long after there was no file for a connection."""


class Break(Enum):
    """Where a connection breaks."""

    UNSENT = "before the request is there"
    WAITING = "after a while"
    ANSWER = "in the answer, which is shorter than it says"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """What becomes of a connection, in seconds.

    Attributes:
        late_s: so much later does the request come.
        breaks: None: it does not.
        after_s: how long a while is.
    """

    late_s: float = 0.0
    breaks: Break | None = None
    after_s: float = 0.0


class Links:
    """The network between router and servers, when it is calm."""

    def exchange(self, host: str) -> Fate:
        """What becomes of a new connection between the router and a host."""
        return Fate()

    def blocked(self, here: str, there: str) -> bool:
        """Nothing gets from one host to another now."""
        return False

    def refuses(self, host: str) -> bool:
        """A host can open no file now."""
        return False


class Servers(Protocol):
    """What listens; in a simulation, `jaxserve.sim.clients.Clients`."""

    def life(self, host: str) -> SimEngine:
        """The current life of an engine, or its last one."""
        ...

    def serve(
        self, engine: SimEngine, body: bytes, hear: Hear, *, stream: bool, request_id: str | None
    ) -> Ask | None:
        """A request has come. None: it is refused, and `hear` is told so."""
        ...

    def cancel(self, ask: Ask) -> None:
        """A server sees that whoever asked has gone."""
        ...

    def health(self, engine: SimEngine) -> int:
        """The status of an answer to a health check."""
        ...


class Unwell(Enum):
    """How a health check ends without an answer."""

    REFUSED = "no connection, or it broke"
    UNANSWERED = "nothing came in time"


@dataclass(slots=True, eq=False)
class Exchange:
    """One call, as its caller sees it.

    Attributes:
        journey: the number of the client's request that it is made for.
        role: "prefill" or "decode".
        engine: the life that it is connected to.
        ask: what the engine was asked, once it has taken it.
        alive_at: when there was a connection or, if later, the last byte came; None: there is none yet.
        over: nothing more comes of it: it was answered, broken, or closed by its caller.
    """

    journey: int
    role: str
    host: str
    body: bytes
    hear: Hear
    stream: bool
    fate: Fate
    asked_at: float
    engine: SimEngine | None = None
    ask: Ask | None = None
    alive_at: float | None = None
    over: bool = False
    forsaken: bool = False
    _coming: deque[Reply | None] = field(default_factory=deque)
    _again: bool = False


class Watcher(Protocol):
    """Who looks at every call and every health check; `jaxserve.sim.router_laws.RouterLaws`."""

    def asked(self, call: Exchange) -> None:
        """A call begins."""
        ...

    def told(self, call: Exchange, reply: Reply | None) -> None:
        """A call's answer is there, or its connection has broken."""
        ...

    def closed(self, call: Exchange) -> None:
        """A call is given up by its caller."""
        ...

    def checked(self, role: str, host: str, found: int | Unwell) -> None:
        """A health check is over."""
        ...


class SimHttp:
    """All connections of one router. Attributes: open: calls that are not over."""

    def __init__(self, clockwork: Clockwork, servers: Servers, links: Links, watcher: Watcher) -> None:
        self.open: list[Exchange] = []
        self._clockwork, self._servers, self._links, self._watcher = clockwork, servers, links, watcher

    # Calls.

    def post(self, journey: int, role: str, host: str, body: bytes, hear: Hear, *, stream: bool) -> Exchange:
        """A request to a server. `hear` is told what comes of it, never before this returns."""
        fate, now = self._links.exchange(host), self._clockwork.now
        call = Exchange(journey, role, host, body, hear, stream, fate, now)
        self.open.append(call)
        self._watcher.asked(call)
        if self._links.refuses(ROUTER) or fate.breaks is Break.UNSENT:
            self._clockwork.after(TRAVEL_S, f"no connection to {host}", lambda: self._hand(call, None))
        else:
            label = f"a request comes to {host}"
            self._clockwork.after(TRAVEL_S + fate.late_s, label, lambda: self._connect(call, AGAIN_S))
        return call

    def close(self, call: Exchange) -> None:
        """The caller has gone; its server sees it once it can be told."""
        if not call.over:
            self._over(call)
            self._watcher.closed(call)
            self._end(call, AGAIN_S)

    def lost(self, engine: SimEngine) -> None:
        """An engine is gone: so are the connections that it has not yet looked at."""
        for call in self.open:
            if call.engine is engine and call.ask is None:
                label = f"{engine.host} connection lost"
                self._clockwork.after(TRAVEL_S, label, lambda call=call: self._said(call, None))

    def _connect(self, call: Exchange, wait: float) -> None:
        """A request reaches the kernel of its server's host, if it can."""
        if call.over:
            return
        if self._links.blocked(ROUTER, call.host) or self._links.blocked(call.host, ROUTER):
            again = min(2 * wait, AGAIN_MOST_S)
            label = f"connects again to {call.host}"
            self._clockwork.after(wait, label, lambda: self._connect(call, again))
            return
        engine = self._servers.life(call.host)
        if not engine.alive:
            self._hand(call, None)
            return
        call.engine, call.alive_at = engine, self._clockwork.now
        self._accept(call, engine)

    def _accept(self, call: Exchange, engine: SimEngine) -> None:
        if call.over:
            return
        if engine.paused or self._links.refuses(call.host):
            wait = 0.0 if engine.paused else ACCEPT_S
            label = f"{call.host} accepts"
            self._clockwork.after(wait, label, lambda: self._accept(call, engine), owner=engine)
            return
        call.ask = self._servers.serve(
            engine, call.body, lambda reply: self._said(call, reply), stream=call.stream, request_id=None
        )
        if call.fate.breaks is Break.WAITING:
            label = f"the connection to {call.host} breaks"
            self._clockwork.after(call.fate.after_s, label, lambda: self._break(call))

    def _break(self, call: Exchange) -> None:
        if not call.over:
            self._end(call, 0.0)
            self._hand(call, None)

    def _said(self, call: Exchange, reply: Reply | None) -> None:
        """A part of the answer is on its way; None: the server's end of the connection is gone."""
        if not call.over and not (call._coming and call._coming[-1] is reply):  # bits of a stream are alike
            call._coming.append(reply)
            if not call._again:
                self._flush(call, AGAIN_S)

    def _flush(self, call: Exchange, wait: float) -> None:
        call._again = bool(call._coming) and not call.over and self._links.blocked(call.host, ROUTER)
        if call._again:
            again = min(2 * wait, AGAIN_MOST_S)
            label = f"{call.host} sends again"
            self._clockwork.after(wait, label, lambda: self._flush(call, again))
            return
        while call._coming and not call.over:
            self._hand(call, call._coming.popleft())

    def _hand(self, call: Exchange, reply: Reply | None) -> None:
        if call.over:
            return
        if reply is not None and reply.over and call.fate.breaks is Break.ANSWER:
            reply = None
        if reply is None or reply.over:
            self._over(call)
            self._watcher.told(call, reply)
        if reply is not None:
            call.alive_at = self._clockwork.now
        call.hear(reply)

    def _over(self, call: Exchange) -> None:
        call.over = True
        self.open.remove(call)

    def _end(self, call: Exchange, wait: float) -> None:
        """The server learns that nobody waits any more."""
        ask = call.ask
        if ask is None:
            return
        ask.deaf = True
        if not ask.engine.alive or ask.over:
            return
        if wait and self._links.blocked(ROUTER, call.host):
            again = min(2 * wait, AGAIN_MOST_S)
            self._clockwork.after(wait, f"tells {call.host} again", lambda: self._end(call, again))
        else:
            self._servers.cancel(ask)

    # Health.

    def check(self, role: str, host: str, within_s: float, told: Callable[[int | Unwell], None]) -> None:
        """A health check, which takes at most so long. `told` gets the status, or why there is none."""
        fate, deadline = self._links.exchange(host), self._clockwork.now + within_s

        def end(found: int | Unwell) -> None:
            self._watcher.checked(role, host, found)
            told(found)

        def ask(wait: float) -> None:
            engine, left = self._servers.life(host), deadline - self._clockwork.now
            if left < 1e-6:
                end(Unwell.UNANSWERED)
            elif (
                self._links.blocked(ROUTER, host)
                or self._links.blocked(host, ROUTER)
                or (engine.alive and (engine.paused or self._links.refuses(host)))
            ):
                label = f"router still looks at {host}"
                self._clockwork.after(min(wait, left), label, lambda: ask(2 * wait))
            else:
                end(self._servers.health(engine) if engine.alive else Unwell.REFUSED)

        label = f"router probes {host}"
        if self._links.refuses(ROUTER) or fate.breaks is not None:
            self._clockwork.after(TRAVEL_S, label, lambda: end(Unwell.REFUSED))
        else:
            travel = min(TRAVEL_S + fate.late_s, within_s)
            self._clockwork.after(travel, label, lambda: ask(within_s / 4))
