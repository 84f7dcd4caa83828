"""Whether the router accepts work, how much it has, and when the rest must end."""

import asyncio
import contextlib
from collections.abc import Generator

from jaxserve.api.errors import unavailable


class RouterStatus:
    """The router's state of life. Used on its event loop only.

    Attributes:
        draining: no new requests.
        in_flight: generation requests in progress.
        ending: set when what still runs must end.
    """

    def __init__(self) -> None:
        self.draining = False
        self.in_flight = 0
        self.ending = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def serving(self) -> Generator[None, None, None]:
        """Counts one generation request while it lasts."""
        self.in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()

    def check_accepting(self) -> None:
        """Raises ApiError 503 while the router drains."""
        if self.draining:
            raise unavailable("The router is shutting down.")

    async def drain(self, timeout_s: float) -> None:
        """Lets running requests finish within the time, then ends the rest."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        self.ending.set()
