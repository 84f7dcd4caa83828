"""What a client is told when something is wrong."""

from kv.moves import LOAD_FAILED

MAX_MESSAGE_CHARS = 1000
"""Keeps an error body under 4 KiB whatever the request held."""

MAX_PARAM_CHARS = 128


class ApiError(Exception):
    """A problem as OpenAI's error object describes it.

    Attributes:
        status: HTTP status.
        message: for people; never holds an exception's text, a path or an address of this machine.
        param: the field at fault; None: no single one.
        code: for programs.
        kind: OpenAI's `type`; derived from the status.
        retry_after_s: seconds after which another try makes sense; None: say nothing.
        headers: further response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = shorten(message, MAX_MESSAGE_CHARS)
        self.param = None if param is None else printable(param, MAX_PARAM_CHARS)
        self.code = code
        self.kind = ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.retry_after_s = retry_after_s
        self.headers = headers

    def body(self) -> dict[str, object]:
        """OpenAI's error object, ready for JSON."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def invalid(param: str, problem: str, *, code: str = "invalid_value") -> ApiError:
    """A 400 that names the field: "`param` problem"."""
    return ApiError(400, f"`{printable(param, MAX_PARAM_CHARS)}` {problem}", param=param, code=code)


def unsupported(param: str, why: str = "is not supported by this server") -> ApiError:
    """A 400 for a field that this server knows and cannot honour."""
    return invalid(param, why, code="unsupported_parameter")


def context_length_exceeded(param: str, message: str) -> ApiError:
    """A 400 for a request that cannot fit the model's context."""
    return ApiError(400, message, param=param, code="context_length_exceeded")


def unavailable(message: str) -> ApiError:
    """A 503 that asks the client to come again."""
    return ApiError(503, message, code="server_is_overloaded", retry_after_s=5)


def internal_error() -> ApiError:
    """The one text that any fault of ours shows; the log has the rest, under the request's id."""
    return ApiError(500, "The server failed on this request. Its log names the X-Request-Id of this answer.")


def load_failed() -> ApiError:
    """The one fault with a text of its own: its cause is a peer or a tier, and another try makes sense."""
    message = f"The request failed: {LOAD_FAILED}."
    return ApiError(500, message, code="kv_load_failed")


def shorten(text: str, limit: int) -> str:
    """`text`, or its start and an ellipsis: at most `limit` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def printable(text: str, limit: int) -> str:
    """`text` made safe to show: unprintable characters become question marks; at most `limit` characters."""
    return "".join(c if c.isprintable() else "?" for c in shorten(text, limit))
