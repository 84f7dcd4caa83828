"""What a client is told of an engine that did not take its request, or cannot go on with it. Pure."""

from jaxserve.api.errors import ApiError, invalid, printable, unavailable
from jaxserve.outputs import EngineError, QueueFull, RequestRefused

RETRY_AFTER_S = 1
"""A full queue moves on within a step or two; clients add their own back-off."""

MAX_REASON_CHARS = 300
"""Of an engine's reason, which may quote the request."""


def told(failure: Exception) -> ApiError | None:
    """The answer to a request that failed below; None: nobody foresaw this failure."""
    match failure:
        case ApiError():
            return failure
        case QueueFull():
            message = "Too many requests are waiting."
            return ApiError(429, message, code="queue_full", retry_after_s=RETRY_AFTER_S)
        case EngineError():
            return unavailable("The engine cannot serve now.")
        case RequestRefused():
            return refused(failure)
        case _:
            return None


def refused(why: RequestRefused) -> ApiError:
    """The answer to a request that can never run."""
    return invalid(why.param, f"is refused: {printable(str(why), MAX_REASON_CHARS)}")
