"""The one door to prometheus_client: a snapshot in, the text of a scrape out."""

import re
from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from metrics.exposition import Exposition, Family, families
from metrics.histogram import Histogram

DEFAULT_PREFIX = "vllm:"
TEXT_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=underscores"
_PREFIX = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)?")


class SnapshotCollector(Collector):
    """Shows what `snapshot()` returns at each scrape; holds no numbers of its own.

    Args:
        snapshot: called once per scrape, from the scraping thread; it returns an immutable value, so a scrape
            never sees half a step and takes no lock.
        prefix: put before every name.

    Raises:
        ValueError: the prefix could not begin a Prometheus name.
    """

    def __init__(self, snapshot: Callable[[], Exposition], *, prefix: str = DEFAULT_PREFIX) -> None:
        if not _PREFIX.fullmatch(prefix):
            raise ValueError(f"metrics prefix {prefix!r} must match {_PREFIX.pattern}")
        self._snapshot = snapshot
        self._prefix = prefix

    def collect(self) -> Iterator[Metric]:
        """One family after another; the names already carry the prefix."""
        for family in families(self._snapshot()):
            yield to_metric(family, self._prefix)


def to_metric(family: Family, prefix: str) -> Metric:
    """The family as prometheus_client has it.

    Raises:
        ValueError: the name is not a Prometheus name.
    """
    name = prefix + family.name
    if family.kind == "histogram":
        return _histogram(name, family)
    shape = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = shape(name, family.help, labels=family.label_names)
    for sample in family.samples:
        assert not isinstance(sample.value, Histogram), "Family holds to its kind"
        metric.add_metric(sample.labels, sample.value)
    return metric


def _histogram(name: str, family: Family) -> HistogramMetricFamily:
    metric = HistogramMetricFamily(name, family.help, labels=family.label_names)
    for sample in family.samples:
        assert isinstance(sample.value, Histogram), "Family holds to its kind"
        metric.add_metric(sample.labels, cumulative(sample.value), sum_value=sample.value.sum)
    return metric


def cumulative(histogram: Histogram) -> list[tuple[str, int]]:
    """(upper bound as text, observations up to it) pairs, the last bound being +Inf."""
    bounds = [floatToGoString(bound) for bound in (*histogram.bounds, float("inf"))]
    return list(zip(bounds, accumulate(histogram.counts), strict=True))


def make_registry(snapshot: Callable[[], Exposition], *, prefix: str = DEFAULT_PREFIX) -> CollectorRegistry:
    """A registry of our own with our series and the usual `process_*` and `python_*` ones.

    Nothing is read until the first scrape. Two registries in one process do not meet.

    Raises:
        ValueError: the prefix could not begin a Prometheus name.
    """
    registry = CollectorRegistry()
    registry.register(SnapshotCollector(snapshot, prefix=prefix))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


def render(registry: CollectorRegistry, accept_header: str | None = None) -> tuple[bytes, str]:
    """A scrape: body and content type.

    Args:
        registry: from `make_registry`.
        accept_header: the client's; OpenMetrics 1.0 where it asks for that, else (also for a header that
            makes no sense) text 0.0.4.
    """
    if any(_is_openmetrics(accepted) for accepted in (accept_header or "").split(",")):
        # Under its default escaping, prometheus_client writes vllm:x as vllm_x in samples but not in HELP
        # and TYPE. A colon is valid in every format, so nothing is to be escaped, whatever is asked for.
        body = openmetrics.generate_latest(registry, escaping=openmetrics.ALLOWUTF8)
        return body, OPENMETRICS_CONTENT_TYPE
    return generate_latest(registry), TEXT_CONTENT_TYPE


def _is_openmetrics(accepted: str) -> bool:
    """Whether one entry of an Accept header names OpenMetrics in the version that we write."""
    media_type, *parameters = (part.strip().lower() for part in accepted.split(";"))
    versions = [part for part in parameters if part.startswith("version=")]
    return media_type == "application/openmetrics-text" and versions in ([], ["version=1.0.0"])
