"""The backends: which are well, and whose turn it is."""

import asyncio
import logging
from dataclasses import dataclass, field

import httpx

from jaxserve.router.options import RouterOptions

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Backend:
    """One server behind the router, and what is known of it. Used on the event loop only.

    Attributes:
        role: "prefill" or "decode".
        url: without a slash at the end.
        healthy: it is asked; false from a failure until it answers a health check.
        missed: unanswered health checks in a row.
        silent: set while it answers no health check at all: whoever waits for it gives up. A process that is
            stopped, or a machine that is gone, keeps its connections open and says nothing.
    """

    role: str
    url: str
    healthy: bool = False
    missed: int = 0
    silent: asyncio.Event = field(default_factory=asyncio.Event)


class Fleet:
    """All backends, probed while the fleet runs."""

    def __init__(self, options: RouterOptions) -> None:
        self._options = options
        self.prefill = tuple(Backend("prefill", url.rstrip("/")) for url in options.prefill)
        self.decode = tuple(Backend("decode", url.rstrip("/")) for url in options.decode)
        self._turns = {"prefill": 0, "decode": 0}
        self._watches: list[asyncio.Task[None]] = []
        # A client of its own: a health check must not wait for connections that requests hold.
        self._client = httpx.AsyncClient(trust_env=False, timeout=None)

    @property
    def backends(self) -> tuple[Backend, ...]:
        """All of them."""
        return self.prefill + self.decode

    def of(self, role: str) -> tuple[Backend, ...]:
        """The backends of a role."""
        return self.prefill if role == "prefill" else self.decode

    async def start(self) -> None:
        """Probes every backend once, then goes on in the background."""
        await asyncio.gather(*(self.probe(backend) for backend in self.backends))
        self._watches = [asyncio.create_task(self._watch(backend)) for backend in self.backends]

    async def close(self) -> None:
        """Ends the probes."""
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        await self._client.aclose()

    def pick(self, role: str, *, other_than: Backend | None = None) -> Backend | None:
        """The next healthy backend in turn; None: there is none."""
        backends = self.of(role)
        start = self._turns[role]
        for step in range(len(backends)):
            backend = backends[(start + step) % len(backends)]
            if backend.healthy and backend is not other_than:
                self._turns[role] = (start + step + 1) % len(backends)
                return backend
        return None

    def has_other(self, backend: Backend) -> bool:
        """Whether another backend of the same role is well."""
        return any(other.healthy and other is not backend for other in self.of(backend.role))

    async def again(self, failed: Backend) -> Backend | None:
        """Whom to ask after `failed` has failed: another, or itself where it answers a health check."""
        other = self.pick(failed.role, other_than=failed)
        if other is not None:
            return other
        return failed if await self.probe(failed) else None

    def suspect(self, backend: Backend, why: str) -> None:
        """Asks it no more until it answers a health check."""
        if backend.healthy:
            logger.warning("%s server %s: %s", backend.role, backend.url, why)
        backend.healthy = False

    async def probe(self, backend: Backend) -> bool:
        """One health check; whether it was answered with 200."""
        try:
            async with asyncio.timeout(self._options.probe_timeout_s):
                response = await self._client.get(f"{backend.url}/health")
        except TimeoutError:
            backend.missed += 1
            if backend.missed >= self._options.max_missed_probes:
                self.suspect(backend, f"{backend.missed} health checks without an answer")
                backend.silent.set()
            return False
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            backend.missed = 0
            self.suspect(backend, f"cannot be reached ({type(error).__name__})")
            return False
        backend.missed = 0
        backend.silent.clear()
        if response.status_code != 200:
            self.suspect(backend, f"says {response.status_code} to a health check")
            return False
        if not backend.healthy:
            logger.info("%s server %s is well", backend.role, backend.url)
        backend.healthy = True
        return True

    async def _watch(self, backend: Backend) -> None:
        while True:
            await asyncio.sleep(self._options.probe_interval_s)
            await self.probe(backend)
