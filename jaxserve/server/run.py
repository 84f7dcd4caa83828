"""Serves the application until a signal: uvicorn, drained on the first and ended on the second."""

import asyncio
import logging
import signal
import socket
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.applications import Starlette

from jaxserve.server.app import create_app
from jaxserve.server.connection import connection_class
from jaxserve.server.options import ServerOptions
from jaxserve.server.surface import EngineSurface

logger = logging.getLogger(__name__)

CLOSE_S = 5
"""For answers that are complete but not yet taken, after the engine has drained."""

BACKLOG = 2048

SAME_SIGNAL_S = 0.2
"""Whoever signals a whole process group may reach us twice, as `timeout make serve` does."""


def reserve_port(options: ServerOptions) -> socket.socket:
    """Takes the address without listening: nobody can connect yet, and a port that serves shows at once.

    Raises:
        OSError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    # Named, since asyncio switches Nagle's algorithm off only where the protocol is known: 40 ms an answer.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((options.host, options.port))
    except OSError:
        sock.close()
        raise
    return sock


def run(engine: EngineSurface, options: ServerOptions, sock: socket.socket | None = None) -> int:
    """Opens the port and serves until SIGTERM or SIGINT. Call it in the main thread, with the engine running.

    Args:
        engine: ready to answer.
        options: of the server.
        sock: from `reserve_port`; None: reserve it now. Closed at the end.

    Returns:
        The process's exit code: 0 after a drain, 128 + the signal when a second one cut it short.

    Raises:
        OSError: the address cannot be had.
    """
    app = create_app(engine, options)
    server = Server(app, engine, options)
    with reserve_port(options) if sock is None else sock as listening:
        server.run(sockets=[listening])
    return server.exit_code


class Drains(Protocol):
    """What does the work behind a server."""

    async def drain(self, timeout_s: float) -> None:
        """Lets what runs finish within the time, then ends the rest."""
        ...


class Accepts(Protocol):
    """Whether a server takes new work; an application's `state.status`."""

    draining: bool


class Server(uvicorn.Server):
    """uvicorn's server with our way of ending."""

    def __init__(self, app: Starlette, engine: Drains, options: ServerOptions) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=connection_class(options),
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                h11_max_incomplete_event_size=options.max_header_bytes,
                timeout_keep_alive=options.keep_alive_s,  # type: ignore[arg-type]
                timeout_graceful_shutdown=CLOSE_S,
            )
        )
        self.exit_code = 0
        self._status: Accepts = app.state.status
        self._engine = engine
        self._options = options
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._first_signal_s = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for sock in sockets or []:
            logger.info("listening on %s", _address(sock))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Signal handler. uvicorn's would raise the signal again at the end, and the exit code be its own."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._signalled, sig)

    def _signalled(self, sig: int) -> None:
        if self._draining is None:
            name = signal.Signals(sig).name
            logger.info("%s: finishing what runs, at most %g s", name, self._options.shutdown_timeout_s)
            self._status.draining = True
            self._first_signal_s = asyncio.get_running_loop().time()
            self._draining = asyncio.create_task(self._drain())
        elif asyncio.get_running_loop().time() - self._first_signal_s < SAME_SIGNAL_S:
            logger.info("the same signal came twice")
        else:
            logger.warning("second signal: ending at once")
            self.exit_code = 128 + sig
            self.force_exit = True
            self.should_exit = True
            for connection in list(self.server_state.connections):
                connection.transport.abort()

    async def _drain(self) -> None:
        try:
            await self._engine.drain(self._options.shutdown_timeout_s)
        except Exception:
            logger.exception("the engine did not drain")
        finally:
            self.should_exit = True


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
