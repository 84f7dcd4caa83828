"""What one TCP peer can cost: uvicorn's HTTP/1.1 protocol with deadlines, a cap and JSON errors."""

import asyncio
import sys

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from jaxserve.api.errors import ApiError, unavailable
from jaxserve.server.options import ServerOptions

MIN_PROGRESS_BYTES = 16 * 1024
"""A paused client must take at least this much within the write deadline."""


class BoundedConnection(H11Protocol):
    """uvicorn's protocol, bounded. `options` is set by `connection_class`.

    The deadlines are timers that exist only while they matter: none is armed for a connection that is idle
    between requests (uvicorn closes those), streams well, or waits for its answer.
    """

    options = ServerOptions()

    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Takes the connection, or turns it away where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.options.max_connections:
            self._refuse(unavailable("Too many connections are open."))
            return
        self._watch_head(opened=True)

    def data_received(self, data: bytes) -> None:
        """Feeds the parser; while the head of a request is incomplete its deadline runs."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the timers."""
        self._stop(self._head_timer)
        self._stop(self._write_timer)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client takes no more for now."""
        super().pause_writing()
        self._watch_write()

    def resume_writing(self) -> None:
        """The client has caught up."""
        super().resume_writing()
        self._stop(self._write_timer)
        self._write_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answers bytes that are no HTTP; the parser says whether they were only too many."""
        error = sys.exception()
        hint = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        if hint == 431:
            self._refuse(ApiError(431, "The request headers are too large.", code="headers_too_large"))
        else:
            self._refuse(ApiError(400, "This is no valid HTTP request.", code="invalid_http"))

    def _watch_head(self, *, opened: bool = False) -> None:
        if self.conn.their_state is not h11.IDLE or not (opened or self.conn.trailing_data[0]):
            self._stop(self._head_timer)
            self._head_timer = None
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.options.header_timeout_s, self._head_late)

    def _head_late(self) -> None:
        self._refuse(ApiError(408, "The request headers did not arrive in time.", code="request_timeout"))

    def _watch_write(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        self._stop(self._write_timer)
        self._write_timer = self.loop.call_later(self.options.write_timeout_s, self._write_late, waiting)

    def _write_late(self, waiting_before: int) -> None:
        if self.transport.get_write_buffer_size() > waiting_before - MIN_PROGRESS_BYTES:
            self.logger.warning("cut off a client that did not read its answer")
            # Not close(): that would wait for the client to take what it does not take.
            self.transport.abort()
        else:
            self._watch_write()

    def _refuse(self, error: ApiError) -> None:
        """Answers without the application and closes."""
        if self.transport.is_closing():
            return
        body = msgspec.json.encode(error.body())
        headers = [
            b"HTTP/1.1 %d %s" % (error.status, STATUS_PHRASES[error.status]),
            b"content-type: application/json",
            b"content-length: %d" % len(body),
            b"connection: close",
        ]
        if error.retry_after_s is not None:
            headers.append(b"retry-after: %d" % error.retry_after_s)
        # An answer that is already under way must not be mixed with this one.
        if self.conn.our_state is not h11.SEND_BODY:
            self.transport.write(b"\r\n".join(headers) + b"\r\n\r\n" + body)
        self.transport.close()

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


def connection_class(options: ServerOptions) -> type[BoundedConnection]:
    """The protocol with these bounds, as uvicorn wants it: a class."""
    return type("BoundedConnection", (BoundedConnection,), {"options": options})
