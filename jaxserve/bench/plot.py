"""What a benchmark of servers looks like: latencies of every request, and tokens over time."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxserve.bench.stats import RequestRecord
from jaxserve.plot import Chart, Line, cumulative

RATE_POINTS = 60
"""Intervals into which a run's time is cut to show its throughput."""


def serve_charts(runs: Mapping[str, Sequence[Sequence[RequestRecord]]]) -> tuple[Chart, ...]:
    """Curves per server; its records come in rounds, whose times are laid one after another.

    Args:
        runs: label of each server -> its rounds.
    """
    done = {label: [r for own in rounds for r in own if r.error is None] for label, rounds in runs.items()}

    def latencies(title: str, values: Mapping[str, Sequence[float]]) -> Chart:
        lines = tuple(cumulative(label, own) for label, own in values.items())
        return Chart(title=title, x_label="milliseconds", y_label="%", lines=lines)

    return (
        latencies(
            "Time to first token",
            {label: [r.ttft * 1e3 for r in own if r.ttft is not None] for label, own in done.items()},
        ),
        latencies(
            "Between tokens",
            {label: [gap * 1e3 for r in own for gap in r.itl] for label, own in done.items()},
        ),
        latencies("Whole requests", {label: [r.e2el * 1e3 for r in own] for label, own in done.items()}),
        Chart(
            title="Output",
            x_label="seconds",
            y_label="tokens/s",
            lines=tuple(Line(label=label, points=_rate(rounds)) for label, rounds in runs.items()),
        ),
    )


def _rate(rounds: Sequence[Sequence[RequestRecord]]) -> tuple[tuple[float, float], ...]:
    """(seconds, output tokens per second) of rounds laid one after another.

    An arrival may hold several tokens: a request's tokens are spread evenly over its arrivals.
    """
    times: list[float] = []
    weights: list[float] = []
    end = 0.0
    for records in rounds:
        if not records:
            continue
        began, length = min(record.start for record in records), max(record.end for record in records)
        for record in records:
            for arrival in record.arrivals if record.error is None else ():
                times.append(end + arrival - began)
                weights.append(record.output_tokens / len(record.arrivals))
        end += length - began
    if not times:
        return ()
    counts, edges = np.histogram(times, bins=RATE_POINTS, range=(0, end), weights=weights)
    middles = (edges[1:] + edges[:-1]) / 2
    return tuple(zip(middles.tolist(), (counts / (end / RATE_POINTS)).tolist(), strict=True))
