"""How the server is to behave."""

from dataclasses import dataclass, field

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Settings of the HTTP server; times in seconds.

    Attributes:
        host: address to listen on.
        port: 0 takes a free one.
        api_keys: with any, every route but the public ones needs one of them as bearer token.
        admin_key: the bearer token of routes that look inside; None: nobody gets these.
        shutdown_timeout_s: how long running requests may go on after SIGTERM.
        stall_s: /ready answers 503 when work waits and no step has completed for this long.
        header_timeout_s: for the head of a request, from its first byte or from the connection's opening.
        body_timeout_s: for the whole body.
        write_timeout_s: a client that takes (almost) nothing of a waiting answer for this long is cut off.
        keep_alive_s: an idle connection is closed after this long.
        max_connections: open at once; further ones are told 503 and closed.
        max_header_bytes: of all header names and values together.
        max_headers: per request.
        version: shown by /version.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_key: str | None = field(default=None, repr=False)
    shutdown_timeout_s: float = 30.0
    stall_s: float = 10.0
    header_timeout_s: float = 5.0
    body_timeout_s: float = 10.0
    write_timeout_s: float = 30.0
    keep_alive_s: float = 30.0
    max_connections: int = 2048
    max_header_bytes: int = 32 * 1024
    max_headers: int = 100
    version: str = "0.1.0"


def body_limit(max_model_len: int) -> int:
    """Bytes of the largest body: 8 per token of context, at least 1 MiB, at most 16 MiB."""
    return min(max(8 * max_model_len, MIB), 16 * MIB)
