"""The backends: which are well, and whose turn it is. Pure: health checks are made elsewhere (`probes`)."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Backend:
    """One server behind the router, and what is known of it.

    Attributes:
        role: "prefill" or "decode".
        url: without a slash at the end.
        healthy: it is asked; false from a failure until it answers a health check.
        missed: unanswered health checks in a row.
        silent: it answers no health check at all: whoever waits for it gives up. A process that is stopped,
            or a machine that is gone, keeps its connections open and says nothing.
    """

    role: str
    url: str
    healthy: bool = False
    missed: int = 0
    silent: bool = False


class Fleet:
    """All backends. Used by one thread only."""

    def __init__(self, prefill: Sequence[str], decode: Sequence[str], *, max_missed_probes: int) -> None:
        """Args: prefill, decode: URLs; max_missed_probes: unanswered ones after which a backend is silent."""
        self.prefill = tuple(Backend("prefill", url.rstrip("/")) for url in prefill)
        self.decode = tuple(Backend("decode", url.rstrip("/")) for url in decode)
        self._max_missed = max_missed_probes
        self._turns = {"prefill": 0, "decode": 0}

    @property
    def backends(self) -> tuple[Backend, ...]:
        """All of them."""
        return self.prefill + self.decode

    def of(self, role: str) -> tuple[Backend, ...]:
        """The backends of a role."""
        return self.prefill if role == "prefill" else self.decode

    # Whose turn it is.

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

    # What has been seen of them.

    def suspect(self, backend: Backend, why: str) -> None:
        """Asks it no more until it answers a health check."""
        if backend.healthy:
            logger.warning("%s server %s: %s", backend.role, backend.url, why)
        backend.healthy = False

    def probe_answered(self, backend: Backend, status: int) -> bool:
        """A health check was answered with this HTTP status; whether all is well."""
        backend.missed = 0
        backend.silent = False
        if status != 200:
            self.suspect(backend, f"says {status} to a health check")
            return False
        if not backend.healthy:
            logger.info("%s server %s is well", backend.role, backend.url)
        backend.healthy = True
        return True

    def probe_refused(self, backend: Backend, why: str) -> None:
        """A health check could not be made: nobody listens, or the connection broke."""
        backend.missed = 0
        self.suspect(backend, f"cannot be reached ({why})")

    def probe_missed(self, backend: Backend) -> None:
        """A health check was not answered in time."""
        backend.missed += 1
        if backend.missed >= self._max_missed:
            self.suspect(backend, f"{backend.missed} health checks without an answer")
            backend.silent = True
