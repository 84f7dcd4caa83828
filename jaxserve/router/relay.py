"""One answer of a backend, passed to the client byte by byte."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import httpx
from starlette.types import Send

from jaxserve.api.errors import ApiError
from jaxserve.server.answers import LAST_EVENT, event

T = TypeVar("T")

MAX_ANSWER_BYTES = 64 << 20
"""Of an answer that is read whole."""

HOP_BY_HOP = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-connection", "te", "trailer"),
        *("transfer-encoding", "upgrade", "date", "server", "x-request-id"),
    }
)
"""Headers that speak of one connection, and those that the router sets itself."""


class Stopped(Exception):
    """One of the events that `unless` watched has happened."""


class TooLarge(Exception):
    """An answer that should be small is not."""


class Reply:
    """What the client has got of its answer.

    Args:
        send: the ASGI channel.
        count: gets the request's outcome, once: before the client can know the end of its answer, so that
            what it sees and what a scrape shows agree.

    Attributes:
        status: of the response; None: it has not begun.
    """

    def __init__(self, send: Send, count: Callable[[str], None]) -> None:
        self._send = send
        self._count = count
        self._counted = False
        self._events = False
        self._between_events = True
        self.status: int | None = None

    def settle(self, outcome: str) -> None:
        """The request has ended like this; only the first call counts."""
        if not self._counted:
            self._counted = True
            self._count(outcome)

    async def pass_on(self, response: httpx.Response, began: Callable[[], None] | None = None) -> None:
        """Sends the response as it comes, without its end; waits for a slow client.

        Nothing is sent before the first byte is there, so that until then another server can be asked.

        Args:
            response: its body not yet read.
            began: called with the first byte.

        Raises:
            httpx.TransportError: the backend failed.
        """
        chunks = response.aiter_raw()
        chunk = await anext(chunks, b"")
        if began is not None:
            began()
        self.status = response.status_code
        self._events = response.headers.get("content-type", "").startswith("text/event-stream")
        await self._send(
            {"type": "http.response.start", "status": response.status_code, "headers": passed(response)}
        )
        length, tail = response.headers.get("content-length"), b""
        left = int(length) if length is not None else None
        while chunk:
            self._between_events = chunk.endswith((b"\n\n", b"\r\n\r\n"))
            tail = (tail + chunk)[-len(LAST_EVENT) :]
            left = None if left is None else left - len(chunk)
            if left == 0 or (self._events and tail == LAST_EVENT):
                # The client knows that it has everything and may go before the backend's end is seen.
                self.settle(outcome_of(self.status))
            await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
            chunk = await anext(chunks, b"")

    async def end(self) -> None:
        """Ends an answer that is whole. The server may take the request for over while this waits."""
        self.settle(outcome_of(self.status))
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def whole(self, response: httpx.Response, body: bytes) -> None:
        """Sends an answer that was read already, without its end."""
        self.status = response.status_code
        head = {"type": "http.response.start", "status": response.status_code, "headers": passed(response)}
        await self._send(head)
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def break_off(self, error: ApiError) -> None:
        """Ends an answer that has begun, so that it cannot be taken for whole.

        Raises:
            ApiError: `error`, where the answer has no events: the connection is then cut.
        """
        self.settle("broken")
        if not self._events:
            raise error
        gap = b"" if self._between_events else b"\n\n"
        last = gap + event(error.body()) + LAST_EVENT
        await self._send({"type": "http.response.body", "body": last, "more_body": False})


def outcome_of(status: int | None) -> str:
    """How a request with this answer is counted; None: it got none."""
    if status is None or status >= 500:
        return "server_error"
    return "client_error" if status >= 400 else "ok"


def passed(response: httpx.Response) -> list[tuple[bytes, bytes]]:
    """The headers of a backend's response that the client gets, names in lower case."""
    named = [(name.lower(), value) for name, value in response.headers.raw]
    return [(name, value) for name, value in named if name.decode("latin-1") not in HOP_BY_HOP]


async def read_whole(response: httpx.Response) -> bytes:
    """The body of a response that is to be small.

    Raises:
        TooLarge: it exceeds MAX_ANSWER_BYTES.
        httpx.TransportError: the backend failed.
    """
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise TooLarge
    return bytes(body)


async def unless(stops: Sequence[asyncio.Event], work: Coroutine[Any, Any, T]) -> T:
    """Does the work, or cancels it as soon as one of the events is set.

    Raises:
        Stopped: an event was first.
    """
    working = asyncio.create_task(work)
    watching = [asyncio.create_task(stop.wait()) for stop in stops]
    tasks: list[asyncio.Task[Any]] = [working, *watching]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Stopped
        return working.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
