"""How the router is to behave."""

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from jaxserve.config import ConfigError
from jaxserve.server.options import ServerOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterOptions:
    """Settings of the router; times in seconds.

    Attributes:
        prefill: base URLs of the servers that compute prompts; at least one.
        decode: base URLs of the servers that generate; at least one.
        server: of the router's own port.
        connect_timeout_s: for a connection to a backend.
        prefill_timeout_s: for the whole answer of a prefill server.
        silence_timeout_s: for a decode server's first byte, and between its bytes.
        probe_interval_s: between two health checks of a backend.
        probe_timeout_s: for one health check.
        max_missed_probes: so many unanswered checks in a row, and what the backend was doing is given up.

    Raises:
        ConfigError: no backend of a kind, a URL that is none, or one named twice.
    """

    prefill: tuple[str, ...]
    decode: tuple[str, ...]
    server: ServerOptions = field(default_factory=ServerOptions)
    connect_timeout_s: float = 5.0
    prefill_timeout_s: float = 600.0
    silence_timeout_s: float = 600.0
    probe_interval_s: float = 2.0
    probe_timeout_s: float = 3.0
    max_missed_probes: int = 2

    def __post_init__(self) -> None:
        for flag, urls in (("--prefill", self.prefill), ("--decode", self.decode)):
            if not urls:
                raise ConfigError(f"{flag} needs at least one URL")
            if len(set(urls)) != len(urls):
                raise ConfigError(f"{flag} names a URL twice")
            for url in urls:
                _check_url(flag, url)


def _check_url(flag: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    else:
        valid = valid and not (parts.query or parts.fragment or parts.username)
    if not valid:
        raise ConfigError(f"{flag}: {url!r} is no URL such as http://127.0.0.1:8100")
