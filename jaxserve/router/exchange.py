"""What a backend's answer to a call comes to, and how long it is waited for. Pure.

Whoever executes a `Route`'s orders asks here: `flow` on an event loop, the simulator by events.
"""

from dataclasses import dataclass
from enum import Enum

from jaxserve.router.calls import refuses_params, transfer_params
from jaxserve.router.fleet import Fleet
from jaxserve.router.options import RouterOptions
from jaxserve.router.route import (
    Answered,
    AskDecode,
    AskPrefill,
    Failed,
    Failure,
    LeftUnread,
    Outcome,
    ParamsRefused,
    Passed,
    Verdict,
    judge,
)

Call = AskPrefill | AskDecode


def verdict(fleet: Fleet, order: Call, status: int) -> Verdict:
    """What to do with an answer of which only the status is there: P's is read whole."""
    return Verdict.READ if isinstance(order, AskPrefill) else judge(fleet, order, status)


def outcome(order: Call, how: Verdict, status: int, body: bytes = b"") -> Outcome:
    """What an answer comes to that has ended as it should.

    Args:
        how: its verdict.
        body: where it was read; one that was passed on stays out of this.
    """
    if isinstance(order, AskDecode):
        if how is Verdict.LEAVE:
            return LeftUnread(status=status)
        return ParamsRefused() if how is Verdict.READ and refuses_params(body) else Passed()
    if status != 200:
        return Answered(status=status)
    try:
        return Answered(status=200, params=transfer_params(body))
    except ValueError as error:
        return Failed(failure=Failure.NONSENSE, why=f"its answer makes no sense: {error}")


class Trouble(Enum):
    """How a call ends before its answer does."""

    UNSENT = "no connection in time, or it could not be sent in time"
    QUIET = "no further byte in time"
    OVERDUE = "not whole in time"
    BROKEN = "the connection failed: none was to be had, it was cut, or the answer is shorter than it says"
    TOO_LARGE = "more than is read"
    SILENT = "the backend answers no health check any more"
    ENDING = "the router is shutting down"


_FAILURES = {
    Trouble.QUIET: Failure.LATE,
    Trouble.OVERDUE: Failure.LATE,
    Trouble.BROKEN: Failure.BROKEN,
    Trouble.TOO_LARGE: Failure.TOO_LARGE,
    Trouble.SILENT: Failure.SILENT,
    Trouble.ENDING: Failure.ENDING,
}


def failed(order: Call, trouble: Trouble, *, why: str = "", begun: bool = False) -> Failed:
    """What a call comes to that ends before its answer does.

    Args:
        why: for the log.
        begun: the client has got a part of the answer.
    """
    if trouble is Trouble.UNSENT:
        failure = Failure.BROKEN if isinstance(order, AskPrefill) else Failure.LATE
    else:
        failure = _FAILURES[trouble]
    return Failed(failure=failure, why=why if failure is Failure.BROKEN else "", begun=begun)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a call may take, in seconds.

    Attributes:
        connect_s: until there is a connection.
        silence_s: until the first byte of the answer, and between its bytes.
        whole_s: for all of it; None: as long as it takes.
    """

    connect_s: float
    silence_s: float
    whole_s: float | None

    def ends(self, *, asked_at: float, alive_at: float | None) -> tuple[float, Trouble]:
        """Until when nothing new must have come, and what it is then.

        Args:
            asked_at: when the call began.
            alive_at: when there was a connection or, if later, the last byte came; None: there is none yet.
        """
        if alive_at is None:
            end = asked_at + self.connect_s, Trouble.UNSENT
        else:
            end = alive_at + self.silence_s, Trouble.QUIET
        if self.whole_s is not None and asked_at + self.whole_s <= end[0]:
            return asked_at + self.whole_s, Trouble.OVERDUE
        return end


def patience(role: str, options: RouterOptions) -> Patience:
    """How long a call to a backend of this role may take."""
    return Patience(
        connect_s=options.connect_timeout_s,
        silence_s=options.silence_timeout_s,
        whole_s=options.prefill_timeout_s if role == "prefill" else None,
    )
