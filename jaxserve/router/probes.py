"""Health checks of the backends, again and again while the router runs."""

import asyncio

import httpx

from jaxserve.router.fleet import Backend, Fleet
from jaxserve.router.options import RouterOptions


class Probes:
    """Makes the checks and tells the fleet. Used on the event loop only.

    Attributes:
        fleet: what is known of the backends.
    """

    def __init__(self, options: RouterOptions) -> None:
        self.fleet = Fleet(options.prefill, options.decode, max_missed_probes=options.max_missed_probes)
        self._options = options
        self._silent = {backend: asyncio.Event() for backend in self.fleet.backends}
        self._watches: list[asyncio.Task[None]] = []
        # A client of its own: a health check must not wait for connections that requests hold.
        self._client = httpx.AsyncClient(trust_env=False, timeout=None)

    async def start(self) -> None:
        """Probes every backend once, then goes on in the background."""
        backends = self.fleet.backends
        await asyncio.gather(*(self.probe(backend) for backend in backends))
        self._watches = [asyncio.create_task(self._watch(backend)) for backend in backends]

    async def close(self) -> None:
        """Ends the probes."""
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        await self._client.aclose()

    def silent(self, backend: Backend) -> asyncio.Event:
        """Set while the backend is silent."""
        return self._silent[backend]

    async def probe(self, backend: Backend) -> bool:
        """One health check; whether it was answered with 200."""
        well = False
        try:
            async with asyncio.timeout(self._options.probe_timeout_s):
                response = await self._client.get(f"{backend.url}/health")
        except TimeoutError:
            self.fleet.probe_missed(backend)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            self.fleet.probe_refused(backend, type(error).__name__)
        else:
            well = self.fleet.probe_answered(backend, response.status_code)
        if backend.silent:
            self._silent[backend].set()
        else:
            self._silent[backend].clear()
        return well

    async def _watch(self, backend: Backend) -> None:
        while True:
            await asyncio.sleep(self._options.probe_interval_s)
            await self.probe(backend)
