"""Serves the router until a signal."""

import socket

from starlette.applications import Starlette

from jaxserve.router.app import create_router
from jaxserve.router.ask import Upstream
from jaxserve.router.options import RouterOptions
from jaxserve.router.probes import Probes
from jaxserve.router.status import RouterStatus
from jaxserve.server.run import Server, reserve_port


class RouterServer(Server):
    """The server around a router: its health checks run from before the port opens until it is closed."""

    def __init__(self, options: RouterOptions) -> None:
        self._probes = Probes(options)
        self._upstream = Upstream(options)
        app: Starlette = create_router(options, self._probes, self._upstream)
        self._work: RouterStatus = app.state.status
        super().__init__(app, self._work, options.server)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Looks at every backend once, then begins to listen."""
        await self._probes.start()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Closes the port and then what is behind it."""
        await super().shutdown(sockets)
        await self._probes.close()
        await self._upstream.close()

    def stop(self, exit_code: int) -> None:
        """Ends the server at once; what runs gets an error. Call it from any thread."""
        self.exit_code = exit_code
        self.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._work.ending.set)


def run(options: RouterOptions, sock: socket.socket | None = None) -> int:
    """Opens the port and routes until SIGTERM or SIGINT. Call it in the main thread.

    Args:
        options: of the router.
        sock: from `reserve_port`; None: reserve it now. Closed at the end.

    Returns:
        The process's exit code: 0 after a drain, 128 + the signal when a second one cut it short.

    Raises:
        OSError: the address cannot be had.
    """
    server = RouterServer(options)
    with reserve_port(options.server) if sock is None else sock as listening:
        server.run(sockets=[listening])
    return server.exit_code
