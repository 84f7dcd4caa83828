"""What the router has done, as a frozen value, and its Prometheus exposition."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from jaxserve.router.calls import DIRECT_REASONS
from metrics.buckets import FIRST_TOKEN_S, REQUEST_LATENCY_S
from metrics.counts import LabelledCounts
from metrics.exposition import Family, Sample
from metrics.histogram import Histogram
from metrics.prometheus import to_metric

PREFIX = "jaxserve_router_"

OUTCOMES = ("ok", "client_error", "server_error", "aborted", "broken")
ROLES = ("prefill", "decode")
FALLBACK_REASONS = ("no_prefill_server", "prefill_failed", "no_params", "params_refused")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStats:
    """Counts since the start; times in seconds.

    Attributes:
        outcomes: ended generation requests: answered, the client's fault, ours or a backend's, left by the
            client, or ended by an error after the answer had begun.
        retries: calls that were made again, by the backend's role.
        fallbacks: requests whose prompt D computed because P did not, by reason.
        direct: requests that are D's alone by their nature, by reason.
        prefill: from asking P to its answer.
        first_byte: from asking D to its first byte.
        decode: from asking D to the end of its answer.
    """

    outcomes: LabelledCounts
    retries: LabelledCounts
    fallbacks: LabelledCounts
    direct: LabelledCounts
    prefill: Histogram
    first_byte: Histogram
    decode: Histogram

    @classmethod
    def empty(cls) -> "RouterStats":
        """Nothing has happened."""
        return cls(
            outcomes=LabelledCounts.empty(OUTCOMES),
            retries=LabelledCounts.empty(ROLES),
            fallbacks=LabelledCounts.empty(FALLBACK_REASONS),
            direct=LabelledCounts.empty(DIRECT_REASONS),
            prefill=Histogram.empty(FIRST_TOKEN_S),
            first_byte=Histogram.empty(FIRST_TOKEN_S),
            decode=Histogram.empty(REQUEST_LATENCY_S),
        )


class Tally:
    """Holds the one current RouterStats. Used on the event loop only."""

    def __init__(self) -> None:
        self.stats = RouterStats.empty()

    def outcome(self, outcome: str) -> None:
        """A generation request has ended."""
        self.stats = replace(self.stats, outcomes=self.stats.outcomes.add(outcome))

    def retry(self, role: str) -> None:
        """A call is made again."""
        self.stats = replace(self.stats, retries=self.stats.retries.add(role))

    def fallback(self, reason: str) -> None:
        """D computes a prompt that P should have computed."""
        self.stats = replace(self.stats, fallbacks=self.stats.fallbacks.add(reason))

    def direct(self, reason: str) -> None:
        """D answers alone."""
        self.stats = replace(self.stats, direct=self.stats.direct.add(reason))

    def prefilled(self, seconds: float) -> None:
        """P has answered."""
        self.stats = replace(self.stats, prefill=self.stats.prefill.observe(seconds))

    def first_byte(self, seconds: float) -> None:
        """D's answer has begun."""
        self.stats = replace(self.stats, first_byte=self.stats.first_byte.observe(seconds))

    def decoded(self, seconds: float) -> None:
        """D's answer is complete."""
        self.stats = replace(self.stats, decode=self.stats.decode.observe(seconds))


def families(stats: RouterStats, up: Iterable[tuple[str, str, bool]], in_flight: int) -> tuple[Family, ...]:
    """All that one scrape shows, names without prefix.

    Args:
        stats: the counts.
        up: per backend its role, its URL and whether it is asked.
        in_flight: generation requests in progress.
    """
    backends = tuple(Sample(labels=(role, url), value=int(healthy)) for role, url, healthy in up)
    return (
        _counter("requests", "Ended generation requests by outcome.", "outcome", stats.outcomes),
        _counter("retries", "Calls to a backend that were made again.", "role", stats.retries),
        _counter("fallbacks", "Prompts that D computed because P did not.", "reason", stats.fallbacks),
        _counter("direct", "Requests that D answers alone by their nature.", "reason", stats.direct),
        Family(
            name="backend_up",
            kind="gauge",
            help="Whether a backend is asked: 1, or 0 after a failure until it answers a health check.",
            label_names=("role", "url"),
            samples=backends,
        ),
        Family(
            name="requests_in_flight",
            kind="gauge",
            help="Generation requests in progress.",
            samples=(Sample(value=in_flight),),
        ),
        _histogram("prefill_seconds", "From asking P to its answer.", stats.prefill),
        _histogram("decode_first_byte_seconds", "From asking D to its first byte.", stats.first_byte),
        _histogram("decode_seconds", "From asking D to the end of its answer.", stats.decode),
    )


def _counter(name: str, text: str, label: str, counts: LabelledCounts) -> Family:
    samples = tuple(Sample(labels=(value,), value=count) for value, count in counts.items())
    return Family(name=name, kind="counter", help=text, label_names=(label,), samples=samples)


def _histogram(name: str, text: str, value: Histogram) -> Family:
    return Family(name=name, kind="histogram", help=text, samples=(Sample(value=value),))


class _Snapshot(Collector):
    def __init__(self, snapshot: Callable[[], tuple[Family, ...]]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        for family in self._snapshot():
            yield to_metric(family, PREFIX)


def make_registry(snapshot: Callable[[], tuple[Family, ...]]) -> CollectorRegistry:
    """The router's series and the usual `process_*` ones.

    Args:
        snapshot: called once per scrape.
    """
    registry = CollectorRegistry()
    registry.register(_Snapshot(snapshot))
    ProcessCollector(registry=registry)
    return registry
