"""What simulated runs look like: who waited how long, how requests queued, where prompt tokens came from."""

from collections.abc import Sequence

import numpy as np

from jaxserve.plot import CURVE_POINTS, Bars, Chart, Line, cumulative
from jaxserve.sim.report import SOURCES, Report


def report_charts(reports: Sequence[Report]) -> tuple[Chart | Bars, ...]:
    """Of one run, or of several side by side."""
    ttft = [
        cumulative(report.label, [r.ttft for r in report.records if r.ttft is not None]) for report in reports
    ]
    itl = [cumulative(report.label, [gap for r in report.records for gap in r.itl]) for report in reports]
    waiting = [Line(label=report.label, points=_in_flight(report)) for report in reports]
    return (
        Chart(title="Time to first token", x_label="seconds", y_label="% of requests", lines=tuple(ttft)),
        Chart(title="Between tokens", x_label="seconds", y_label="% of gaps", lines=tuple(itl)),
        Chart(
            title="Requests under way", x_label="seconds of traffic", y_label="requests", lines=tuple(waiting)
        ),
        _sources(reports),
    )


def _in_flight(report: Report) -> tuple[tuple[float, float], ...]:
    """(seconds, requests under way) at even times."""
    starts = np.sort([record.start for record in report.records])
    ends = np.sort([record.end for record in report.records])
    times = np.linspace(0, report.duration_s, CURVE_POINTS)
    counts = np.searchsorted(starts, times, side="right") - np.searchsorted(ends, times, side="right")
    return tuple(zip(times.tolist(), counts.astype(float).tolist(), strict=True))


def _sources(reports: Sequence[Report]) -> Bars:
    """Per run and role, the sources of prompt tokens."""
    bars = []
    for report in reports:
        for role in report.roles:
            sources = report.sources(role)
            bars.append((f"{report.label}: {role}", tuple(float(sources.get(name)) for name in SOURCES)))
    return Bars(title="Prompt tokens by source", parts=tuple(SOURCES.values()), bars=tuple(bars))
