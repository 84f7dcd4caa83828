"""How a simulated router reaches servers: over connections, or at once and with no fault on the way."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxserve.sim.asks import Ask, Hear
from jaxserve.sim.engine import SimEngine
from jaxserve.sim.http import Exchange, Servers, SimHttp, Unwell
from jaxserve.sim.router import Journey, Line
from jaxserve.sim.router_laws import RouterLaws


class Wired:
    """`jaxserve.sim.router.Network` of all servers. Attributes: laws: that hold of its router."""

    def __init__(self, http: SimHttp, laws: RouterLaws, patient: Callable[[], bool]) -> None:
        self.http, self.laws, self._patient = http, laws, patient

    @property
    def patient(self) -> bool:
        """See `Network`."""
        return self._patient()

    def post(self, journey: Journey, role: str, host: str, body: bytes, hear: Hear, *, stream: bool) -> Line:
        """See `Network`."""
        return self.http.post(journey.number, role, host, body, hear, stream=stream)

    def close(self, line: Line) -> None:
        """See `Network`."""
        if isinstance(line, Exchange):
            self.http.close(line)

    def check(self, role: str, host: str, within_s: float, told: Callable[[int | Unwell], None]) -> None:
        """See `Network`."""
        self.http.check(role, host, within_s, told)


@dataclass(slots=True, eq=False)
class _DirectLine:
    """`jaxserve.sim.router.Line`."""

    ask: Ask | None = None
    alive_at: float | None = None

    @property
    def forsaken(self) -> bool:
        """See `Line`."""
        return self.ask is not None and self.ask.aborted


class Direct:
    """`jaxserve.sim.router.Network` of two lives, whatever comes after them: requests are there at once."""

    patient = True

    def __init__(self, servers: Servers, lives: Mapping[str, SimEngine]) -> None:
        self._servers, self._lives = servers, lives

    def post(self, journey: Journey, role: str, host: str, body: bytes, hear: Hear, *, stream: bool) -> Line:
        """See `Network`."""
        engine, name = self._lives[host], journey.request_id
        return _DirectLine(
            self._servers.serve(engine, body, hear, stream=stream, request_id=name, read=False)
        )

    def close(self, line: Line) -> None:
        """See `Network`: nobody gives up here."""

    def check(self, role: str, host: str, within_s: float, told: Callable[[int | Unwell], None]) -> None:
        """See `Network`."""
        told(Unwell.REFUSED)
