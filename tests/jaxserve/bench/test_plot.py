"""The charts of a benchmark hold what its records hold."""

import pytest

from jaxserve.bench.plot import RATE_POINTS, serve_charts
from jaxserve.bench.stats import RequestRecord


def record(start: float, arrivals: tuple[float, ...], tokens: int, error: str | None = None) -> RequestRecord:
    return RequestRecord(
        start=start, end=arrivals[-1] + 0.5, arrivals=arrivals, output_tokens=tokens, error=error
    )


RUNS = {
    "A": [[record(10, (11, 12), 4)], [record(100, (101, 102, 103), 3), record(100, (101,), 9, "broken")]],
    "B": [[], [record(0, (5,), 1)]],
}


def test_latencies_are_those_of_requests_that_succeeded():
    ttft, itl, whole, _ = serve_charts(RUNS)
    assert [[x for x, _ in line.points[1:]] for line in ttft.lines] == [[1000, 1000], [5000]]
    assert [[x for x, _ in line.points[1:]] for line in itl.lines] == [[1000, 1000, 1000], []]
    assert [[x for x, _ in line.points[1:]] for line in whole.lines] == [[2500, 3500], [5500]]


def test_the_area_under_the_output_is_the_tokens():
    output = serve_charts(RUNS)[3]
    lengths = (2.5 + 3.5, 5.5)
    for line, length, tokens in zip(output.lines, lengths, (7, 1), strict=True):
        assert sum(rate for _, rate in line.points) * length / RATE_POINTS == pytest.approx(tokens)
        assert line.points[0][0] > 0 and line.points[-1][0] < length


def test_a_server_that_answered_nothing_has_empty_curves():
    charts = serve_charts({"A": [[record(0, (1,), 1, "broken")]]})
    assert all(line.points == () for chart in charts for line in chart.lines)
