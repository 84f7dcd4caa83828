"""The one door to the backends: how a request is put to one of them."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from urllib.parse import quote

import httpx
from starlette.datastructures import Headers
from starlette.types import Receive

from jaxserve.router.exchange import patience
from jaxserve.router.fleet import Backend
from jaxserve.router.options import RouterOptions
from jaxserve.router.relay import read_whole
from jaxserve.server.body import read_body
from jaxserve.server.options import MIB

MAX_BODY_BYTES = 16 * MIB
"""The most that any of our servers takes."""

KEEP_ALIVE_S = 4.0
"""Shorter than a backend's (vLLM's: 5 s): a request must not meet a connection that is being closed."""

MAX_IDLE = 256

PASSED_HEADERS = (b"authorization", b"accept", b"traceparent", b"tracestate", b"x-request-id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request as a backend is to get it.

    Attributes:
        path: decoded.
        headers: the client's; some are passed on.
        body: JSON, for a POST; None: a GET.
    """

    path: str
    headers: Headers
    body: bytes | None


class Upstream:
    """Requests to backends, over connections that are kept."""

    def __init__(self, options: RouterOptions) -> None:
        self._options = options
        # As many as clients may open: each request has at most one call under way.
        limits = httpx.Limits(
            max_connections=options.server.max_connections,
            max_keepalive_connections=MAX_IDLE,
            keepalive_expiry=KEEP_ALIVE_S,
        )
        self._prefill, waits = patience("prefill", options), patience("decode", options)
        timeout = httpx.Timeout(waits.silence_s, connect=waits.connect_s)
        self._client = httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    @staticmethod
    def now_s() -> float:
        """The event loop's clock."""
        return asyncio.get_running_loop().time()

    async def read(self, headers: Headers, receive: Receive) -> bytes:
        """A client's whole body.

        Raises:
            ApiError: it is too large, too slow or no JSON by its own account.
            ClientGone: the connection was closed.
        """
        timeout_s = self._options.server.body_timeout_s
        return await read_body(headers, receive, limit=MAX_BODY_BYTES, timeout_s=timeout_s)

    @contextlib.asynccontextmanager
    async def asked(self, backend: Backend, ask: Ask) -> AsyncGenerator[httpx.Response, None]:
        """The response to a request, its body not yet read. Leaving the block closes what is not read.

        Raises:
            httpx.TransportError: no response came.
        """
        sent = [(name, value) for name, value in ask.headers.raw if name in PASSED_HEADERS]
        # Bytes are passed on as they come, and P's answer is read: neither may be compressed.
        sent.append((b"accept-encoding", b"identity"))
        if ask.body is not None:
            sent.append((b"content-type", b"application/json"))
        method = "GET" if ask.body is None else "POST"
        url = backend.url + quote(ask.path)
        async with self._client.stream(method, url, content=ask.body, headers=sent) as response:
            yield response

    async def ask_whole(self, backend: Backend, ask: Ask) -> tuple[httpx.Response, bytes]:
        """A response and its body, within the time for a prefill.

        Raises:
            TimeoutError: it took longer.
            TooLarge: the body is.
            httpx.TransportError: the backend failed.
        """
        async with asyncio.timeout(self._prefill.whole_s), self.asked(backend, ask) as response:
            return response, await read_whole(response)
