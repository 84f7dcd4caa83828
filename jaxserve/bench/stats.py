"""What a benchmark counts: one record per request in, a summary out. Pure; all times in seconds.

Words and meanings are those of `vllm bench serve`, so that figures can be compared: TTFT is the time to the
first token; ITL the gaps between the arrivals that follow it; TPOT (end - first) / (tokens - 1), per request;
E2EL the time from start to end. Goodput counts the requests per second that keep every bound of an SLO.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 99)
LATENCIES = ("ttft", "tpot", "itl", "e2el")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """What one request did, as its client saw it.

    Attributes:
        start: when it was due, on the clock of the run; a wait in the client counts against the server.
        arrivals: when text arrived, ascending; one entry may hold several tokens.
        end: when the answer was complete, or failed.
        prompt_tokens: as the server counts them; None where it does not say.
        output_tokens: as the server counts them, or else the number of arrivals.
        cached_tokens: prompt tokens that the server found in its cache; None where it does not say.
        error: why it failed; its times count in no latency.
    """

    start: float
    end: float
    arrivals: tuple[float, ...] = ()
    prompt_tokens: int | None = None
    output_tokens: int = 0
    cached_tokens: int | None = None
    error: str | None = None

    @property
    def ttft(self) -> float | None:
        """Time to the first token; None where there was none."""
        return self.arrivals[0] - self.start if self.arrivals else None

    @property
    def tpot(self) -> float | None:
        """Mean time of the tokens after the first; None where there was at most one."""
        if not self.arrivals or self.output_tokens < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output_tokens - 1)

    @property
    def itl(self) -> tuple[float, ...]:
        """Gaps between arrivals."""
        return tuple(after - before for before, after in pairwise(self.arrivals))

    @property
    def e2el(self) -> float:
        """From start to end."""
        return self.end - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Bounds in seconds that a good request keeps; None: no bound."""

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None

    def kept_by(self, record: RequestRecord) -> bool:
        """A failed request keeps nothing; one without a second token keeps any bound on TPOT."""
        if record.error is not None or record.ttft is None:
            return False
        parts = ((self.ttft, record.ttft), (self.tpot, record.tpot), (self.e2el, record.e2el))
        return all(bound is None or value is None or value <= bound for bound, value in parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How values are spread; NaN everywhere where there were none.

    Attributes:
        percentiles: (percentile, value) pairs, linearly interpolated.
    """

    count: int
    mean: float
    std: float
    min: float
    max: float
    percentiles: tuple[tuple[int, float], ...]

    def at(self, percentile: int) -> float:
        """Value of one of the percentiles.

        Raises:
            KeyError: not one of them.
        """
        return dict(self.percentiles)[percentile]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One endpoint over some requests.

    Attributes:
        duration: seconds in which they ran; where they ran in rounds, of all rounds together.
        goodput: requests per second that keep the SLO; None: no SLO was given.
        cached_tokens: None where no answer said.
        errors: (message, how often), the most frequent first.
    """

    completed: int
    failed: int
    duration: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None
    request_throughput: float
    output_throughput: float
    total_throughput: float
    goodput: float | None
    ttft: Spread
    tpot: Spread
    itl: Spread
    e2el: Spread
    errors: tuple[tuple[str, int], ...] = ()


def spread(values: Iterable[float], percentiles: Sequence[int] = PERCENTILES) -> Spread:
    """Describe values; order does not matter."""
    data = np.fromiter(values, dtype=np.float64)
    if not data.size:
        none = tuple((percentile, math.nan) for percentile in percentiles)
        return Spread(count=0, mean=math.nan, std=math.nan, min=math.nan, max=math.nan, percentiles=none)
    at = np.percentile(data, percentiles)
    return Spread(
        count=int(data.size),
        mean=float(data.mean()),
        std=float(data.std()),
        min=float(data.min()),
        max=float(data.max()),
        percentiles=tuple((p, float(value)) for p, value in zip(percentiles, at, strict=True)),
    )


def summarize(records: Sequence[RequestRecord], duration: float, slo: Slo | None = None) -> Summary:
    """Fold the records of one endpoint.

    Raises:
        ValueError: the duration is not positive.
    """
    if not duration > 0:
        raise ValueError(f"duration must be positive, got {duration}")
    done = [record for record in records if record.error is None]
    prompt_tokens = sum(record.prompt_tokens or 0 for record in done)
    output_tokens = sum(record.output_tokens for record in done)
    cached = [record.cached_tokens for record in done if record.cached_tokens is not None]
    return Summary(
        completed=len(done),
        failed=len(records) - len(done),
        duration=duration,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        cached_tokens=sum(cached) if cached else None,
        request_throughput=len(done) / duration,
        output_throughput=output_tokens / duration,
        total_throughput=(prompt_tokens + output_tokens) / duration,
        goodput=None if slo is None else sum(slo.kept_by(record) for record in done) / duration,
        ttft=spread(record.ttft for record in done if record.ttft is not None),
        tpot=spread(record.tpot for record in done if record.tpot is not None),
        itl=spread(gap for record in done for gap in record.itl),
        e2el=spread(record.e2el for record in done),
        errors=_errors(records),
    )


def _errors(records: Sequence[RequestRecord]) -> tuple[tuple[str, int], ...]:
    counts: dict[str, int] = {}
    for record in records:
        if record.error is not None:
            counts[record.error] = counts.get(record.error, 0) + 1
    return tuple(sorted(counts.items(), key=lambda item: -item[1]))


def figures(summary: Summary) -> dict[str, float]:
    """The figures in which two endpoints are compared, by name."""
    named = {
        "request_throughput": summary.request_throughput,
        "output_throughput": summary.output_throughput,
        "total_throughput": summary.total_throughput,
    }
    if summary.goodput is not None:
        named["goodput"] = summary.goodput
    for latency in LATENCIES:
        measured: Spread = getattr(summary, latency)
        named[f"mean_{latency}"] = measured.mean
        named |= {f"p{percentile}_{latency}": value for percentile, value in measured.percentiles}
    return named


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One figure of an endpoint over that of the first, NaN where it cannot be formed.

    Attributes:
        value: of all rounds together.
        rounds: of each round. Rounds are run in turn, so a slow spell of the machine touches both endpoints
            of a round; the spread of these says how far to trust `value`.
    """

    value: float
    rounds: tuple[float, ...]


def ratios(
    base: Summary, other: Summary, base_rounds: Sequence[Summary], other_rounds: Sequence[Summary]
) -> dict[str, Ratio]:
    """Figures of `other` over those of `base`, by name."""
    base_figures, other_figures = figures(base), figures(other)
    pairs = [(figures(a), figures(b)) for a, b in zip(base_rounds, other_rounds, strict=True)]
    return {
        name: Ratio(
            value=_over(other_figures[name], base_figures[name]),
            rounds=tuple(_over(b[name], a[name]) for a, b in pairs),
        )
        for name in base_figures
    }


def _over(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def as_json(value: Any) -> Any:
    """Plain JSON types of our frozen values: percentiles by name ("p99"), errors by message, NaN as null."""
    if isinstance(value, Spread):
        parts = {name: as_json(part) for name, part in asdict(value).items() if name != "percentiles"}
        return parts | {f"p{percentile}": as_json(at) for percentile, at in value.percentiles}
    if isinstance(value, Summary):
        parts = {name: as_json(getattr(value, name)) for name in Summary.__dataclass_fields__}
        return parts | {"errors": dict(value.errors)}
    if isinstance(value, Ratio | RequestRecord):
        return {name: as_json(part) for name, part in asdict(value).items()}
    if isinstance(value, Mapping):
        return {name: as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
