"""What becomes of one generation request: P computes the prompt, D generates, and what if one of them fails.

Only decides. `route` yields orders and is sent what came of them, as values; who executes them has the
clock, the connections and the client: `flow` on an event loop, the simulator by events.
"""

import logging
from collections.abc import Generator, Mapping
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


Way = Generator[Order, Outcome, None]
"""Its last order is an End, the only one of its kind."""


def route(fleet: Fleet, counts: Counts, *, direct: str | None = None) -> Way:
    """One request's way.

    Args:
        direct: why D is to answer alone; None: P computes the prompt first.

    Raises:
        ValueError: sent an outcome that does not come of the last order.
    """
    params = None
    if direct is not None:
        counts.direct(direct)
    else:
        prefilled = yield from _prefill(fleet, counts)
        if isinstance(prefilled, PassRefusal | GiveUp):
            yield prefilled
            return
        params = prefilled
    end = yield from _decode(fleet, counts, params)
    if end is None:
        logger.warning("a decode server does not take the parameters of a prefill server")
        counts.fallback("params_refused")
        end = yield from _decode(fleet, counts, None)
    if end is None:
        raise ValueError("parameters that were not sent were refused")
    yield end


def _prefill(fleet: Fleet, counts: Counts) -> Generator[Order, Outcome, Params | PassRefusal | GiveUp | None]:
    """P's parameters for D; None: D must compute the prompt.

    One retry: a second failure is more likely the request's than a server's.
    """
    backend, asked = fleet.pick("prefill"), 0
    if backend is None:
        counts.fallback("no_prefill_server")
        return None
    while backend is not None:
        outcome, asked = (yield AskPrefill(backend=backend)), asked + 1
        match outcome:
            case Answered(status=200, params=params):
                if not params:
                    counts.fallback("no_params")
                return params or None
            case Answered(status=status) if 400 <= status < 500:
                return PassRefusal()
            case Answered(status=status):
                why = f"status {status}"
            case Failed(failure=Failure.ENDING):
                return GiveUp(error=_ending())
            case Failed(failure=failure):
                why = outcome.why or failure.value
                if failure is Failure.BROKEN:
                    fleet.suspect(backend, f"failed ({why})")
            case _:
                raise ValueError(f"{outcome} does not come of asking P")
        logger.warning("prefill server %s: %s", backend.url, why)
        backend = (yield from _again(fleet, backend)) if asked == 1 else None
        if backend is not None:
            counts.retry("prefill")
    logger.warning("no prefill server could be used")
    counts.fallback("prefill_failed")
    return None


def _decode(fleet: Fleet, counts: Counts, params: Params | None) -> Generator[Order, Outcome, End | None]:
    """How the request ends; None: it may end better without the parameters.

    A second D gets the same parameters: P keeps the pages until they were read or their lease ends.
    """
    backend, asked, error = fleet.pick("decode"), 0, unavailable("No decode server can be reached.")
    while backend is not None:
        outcome = yield AskDecode(backend=backend, params=params, spares=not asked)
        asked += 1
        match outcome:
            case Passed():
                return Finish()
            case ParamsRefused() if params is not None:
                return None
            case LeftUnread(status=status):
                error = _bad_gateway(f"A decode server answered {status}.")
            case Failed():
                error = _error_of(outcome)
                if outcome.failure is Failure.BROKEN:
                    fleet.suspect(backend, f"failed ({outcome.why or outcome.failure.value})")
                if outcome.begun:
                    return BreakOff(error=error)
                if outcome.failure is Failure.ENDING:
                    return GiveUp(error=error)
            case _:
                raise ValueError(f"{outcome} does not come of asking D")
        backend = (yield from _again(fleet, backend)) if asked == 1 else None
        if backend is not None:
            counts.retry("decode")
    return GiveUp(error=error)


def _again(fleet: Fleet, failed: Backend) -> Generator[Order, Outcome, Backend | None]:
    """Whom to ask after `failed` has failed: another, or itself where it answers a health check."""
    other = fleet.pick(failed.role, other_than=failed)
    if other is not None:
        return other
    match (yield Probe(backend=failed)):
        case Probed(well=well):
            return failed if well else None
        case outcome:
            raise ValueError(f"{outcome} does not come of a health check")


def _error_of(failed: Failed) -> ApiError:
    """What the client is told of D's failure."""
    match failed.failure:
        case Failure.ENDING:
            return _ending()
        case Failure.SILENT:
            return _bad_gateway("The decode server has fallen silent.")
        case Failure.TOO_LARGE:
            return _bad_gateway("The decode server's refusal is too large.")
        case Failure.LATE:
            return ApiError(504, "The decode server did not answer in time.", code="backend_timeout")
        case Failure.BROKEN | Failure.NONSENSE:
            return _bad_gateway("The decode server failed.")


def _ending() -> ApiError:
    return unavailable("The router is shutting down.")


def _bad_gateway(message: str) -> ApiError:
    """A 502 for what a backend did."""
    return ApiError(502, message, code="bad_gateway")
