"""What becomes of one generation request: P computes the prompt, D generates, and what if one of them fails.

Only decides. A `Route` gives orders and takes what came of them, as values; who executes them has the clock,
the connections and the client: `flow` on an event loop, the simulator by events.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from jaxserve.api.errors import ApiError, unavailable
from jaxserve.router.fleet import Backend, Fleet

logger = logging.getLogger(__name__)

TRY_ANOTHER = frozenset({502, 503, 504})
"""D's statuses that speak of the server, not of the request."""

Params = Mapping[str, object]
"""P's `kv_transfer_params`."""


class Counts(Protocol):
    """What is counted of decisions; see `jaxserve.router.counts.Tally`."""

    def retry(self, role: str) -> None: ...

    def fallback(self, reason: str) -> None: ...

    def direct(self, reason: str) -> None: ...


# Orders. The last four end the request.


@dataclass(frozen=True, slots=True, kw_only=True)
class AskPrefill:
    """Ask P and read its answer whole. Comes of it: Answered or Failed."""

    backend: Backend


@dataclass(frozen=True, slots=True, kw_only=True)
class AskDecode:
    """Ask D; once its status is there, `judge` says what to do with the answer. Comes of it: Passed,
    LeftUnread, ParamsRefused or Failed.

    Attributes:
        params: what D is to get of P's; None: D computes the prompt.
        spares: another D may be asked after this one.
    """

    backend: Backend
    params: Params | None
    spares: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Check this backend's health now. Comes of it: Probed."""

    backend: Backend


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRefusal:
    """The client gets P's last answer as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """D's answer has been passed on and is whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """The client has got nothing yet, and gets this error."""

    error: ApiError


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakOff:
    """The client's answer has begun and cannot go on: it must not look whole."""

    error: ApiError


End = PassRefusal | Finish | GiveUp | BreakOff
Order = AskPrefill | AskDecode | Probe | End

# Outcomes.


class Failure(Enum):
    """How a call to a backend ends without an answer that is of use."""

    SILENT = "has fallen silent"
    LATE = "did not answer in time"
    BROKEN = "failed"
    TOO_LARGE = "its answer is too large"
    NONSENSE = "its answer makes no sense"
    ENDING = "the router is shutting down"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """P's answer. Attributes: params: it gave these, with status 200."""

    status: int
    params: Params | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """The client has D's answer but for its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftUnread:
    """D's answer was left, as `judge` said."""

    status: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamsRefused:
    """D does not take P's parameters: keys or models differ, or P's lease is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A call has failed.

    Attributes:
        why: for the log.
        begun: the client has got a part of the answer.
    """

    failure: Failure
    why: str = ""
    begun: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """A health check is over. Attributes: well: it was answered with 200."""

    well: bool


Outcome = Answered | Passed | LeftUnread | ParamsRefused | Failed | Probed


class Verdict(Enum):
    """What to do with D's answer, of which only the status is there."""

    PASS_ON = "the client gets it as it comes"
    READ = "read it whole: it may refuse P's parameters; if not, the client gets it"
    LEAVE = "another D is asked"


def judge(fleet: Fleet, asked: AskDecode, status: int) -> Verdict:
    """What to do with an answer of this HTTP status."""
    if asked.spares and status in TRY_ANOTHER and fleet.has_other(asked.backend):
        return Verdict.LEAVE
    if asked.params is not None and status == 400:
        return Verdict.READ
    return Verdict.PASS_ON


class Route:
    """One request's way. Its state is plain values, so that it can be copied between two events.

    Attributes:
        order: what is to be done now; the last one is an End.
    """

    def __init__(self, fleet: Fleet, counts: Counts, *, direct: str | None = None) -> None:
        """Args: direct: why D is to answer alone; None: P computes the prompt first."""
        self._fleet, self._counts = fleet, counts
        self._params: Params | None = None
        self._retried = False
        self._problem: Failed | LeftUnread | None = None
        self.order: Order
        if direct is not None:
            counts.direct(direct)
            self.order = self._to_decode(None)
            return
        backend = fleet.pick("prefill")
        if backend is not None:
            self.order = AskPrefill(backend=backend)
        else:
            counts.fallback("no_prefill_server")
            self.order = self._to_decode(None)

    def take(self, outcome: Outcome) -> Order:
        """What has come of the order; returns the next.

        Raises:
            ValueError: this cannot come of it.
        """
        match self.order:
            case AskPrefill(backend=backend):
                self.order = self._asked_prefill(backend, outcome)
            case AskDecode(backend=backend):
                self.order = self._asked_decode(backend, outcome)
            case Probe(backend=backend) if isinstance(outcome, Probed):
                self.order = self._retry(backend) if outcome.well else self._without(backend.role)
            case order:
                raise ValueError(f"{outcome} does not come of {order}")
        return self.order

    def _asked_prefill(self, backend: Backend, outcome: Outcome) -> Order:
        match outcome:
            case Answered(status=200, params=params):
                if not params:
                    self._counts.fallback("no_params")
                return self._to_decode(params or None)
            case Answered(status=status) if 400 <= status < 500:
                return PassRefusal()
            case Answered(status=status):
                why = f"status {status}"
            case Failed(failure=Failure.ENDING):
                return GiveUp(error=_error_of(outcome))
            case Failed(failure=failure):
                why = outcome.why or failure.value
                if failure is Failure.BROKEN:
                    self._fleet.suspect(backend, f"failed ({why})")
            case _:
                raise ValueError(f"{outcome} does not come of asking P")
        logger.warning("prefill server %s: %s", backend.url, why)
        return self._again(backend)

    def _asked_decode(self, backend: Backend, outcome: Outcome) -> Order:
        match outcome:
            case Passed():
                return Finish()
            case ParamsRefused() if self._params is not None:
                logger.warning("a decode server does not take the parameters of a prefill server")
                self._counts.fallback("params_refused")
                return self._to_decode(None)
            case Failed():
                if outcome.failure is Failure.BROKEN:
                    self._fleet.suspect(backend, f"failed ({outcome.why or outcome.failure.value})")
                if outcome.begun:
                    return BreakOff(error=_error_of(outcome))
                if outcome.failure is Failure.ENDING:
                    return GiveUp(error=_error_of(outcome))
            case LeftUnread():
                pass
            case _:
                raise ValueError(f"{outcome} does not come of asking D")
        self._problem = outcome
        return self._again(backend)

    def _again(self, failed: Backend) -> Order:
        """One retry: a second failure is more likely the request's than a server's. Another is asked, or the
        same where it answers a health check."""
        if self._retried:
            return self._without(failed.role)
        other = self._fleet.pick(failed.role, other_than=failed)
        return Probe(backend=failed) if other is None else self._retry(other)

    def _retry(self, backend: Backend) -> Order:
        """A second D gets the same parameters: P keeps the pages until they were read or their lease ends."""
        self._retried = True
        self._counts.retry(backend.role)
        if backend.role == "prefill":
            return AskPrefill(backend=backend)
        return AskDecode(backend=backend, params=self._params, spares=False)

    def _without(self, role: str) -> Order:
        """Nobody of this role can be asked any more."""
        if role == "prefill":
            logger.warning("no prefill server could be used")
            self._counts.fallback("prefill_failed")
            return self._to_decode(None)
        return GiveUp(error=_error_of(self._problem))

    def _to_decode(self, params: Params | None) -> Order:
        self._params, self._retried, self._problem = params, False, None
        backend = self._fleet.pick("decode")
        if backend is None:
            return self._without("decode")
        return AskDecode(backend=backend, params=params, spares=True)


def _error_of(problem: Failed | LeftUnread | None) -> ApiError:
    """What the client is told; None: there was nobody to ask."""
    match problem:
        case None:
            return unavailable("No decode server can be reached.")
        case LeftUnread(status=status):
            return _bad_gateway(f"A decode server answered {status}.")
        case Failed(failure=Failure.ENDING):
            return unavailable("The router is shutting down.")
        case Failed(failure=Failure.LATE):
            return ApiError(504, "The decode server did not answer in time.", code="backend_timeout")
        case Failed(failure=Failure.SILENT):
            return _bad_gateway("The decode server has fallen silent.")
        case Failed(failure=Failure.TOO_LARGE):
            return _bad_gateway("The decode server's refusal is too large.")
        case Failed():
            return _bad_gateway("The decode server failed.")


def _bad_gateway(message: str) -> ApiError:
    """A 502 for what a backend did."""
    return ApiError(502, message, code="bad_gateway")
