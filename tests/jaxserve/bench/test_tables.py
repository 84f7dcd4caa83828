"""Tables are for people: what they show, and how it lines up."""

import math

import pytest

from jaxserve.bench.stats import RequestRecord, ratios, summarize
from jaxserve.bench.tables import grid, number, ratio_table, summary_table


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1234.5, "1,234"),
        (123.4, "123"),
        (12.34, "12.3"),
        (1.234, "1.23"),
        (0.001234, "0.00123"),
        (-2.5, "-2.50"),
        (math.inf, "inf"),
        (math.nan, "-"),
        (None, "-"),
    ],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_a_grid_lines_up() -> None:
    assert grid([["name", "x"], ["a", "1.5"], ["long name", "10"]]).splitlines() == [
        "name         x",
        "--------------",
        "a          1.5",
        "long name   10",
    ]


def record(ttft: float, error: str | None = None) -> RequestRecord:
    arrivals = (ttft, ttft + 0.01)
    return RequestRecord(
        start=0.0, end=1.0, arrivals=arrivals, prompt_tokens=7, output_tokens=2, cached_tokens=3, error=error
    )


def test_a_summary_shows_what_was_measured() -> None:
    table = summary_table("A  http://a/v1  m", summarize([record(0.25)], duration=0.5))
    assert table.splitlines()[0] == "A  http://a/v1  m"
    assert "1 requests in 0.500 s" in table and "7 prompt tokens (3 cached), 2 output tokens" in table
    (ttft,) = [line for line in table.splitlines() if line.strip().startswith("TTFT")]
    assert ttft.split() == ["TTFT", *["250"] * 5]
    assert "FAILED" not in table and "goodput" not in table


def test_failures_are_shown() -> None:
    table = summary_table("A", summarize([record(0.1), record(0.1, error="HTTP 429: full")], duration=1.0))
    assert "1 FAILED" in table and "1 x HTTP 429: full" in table


def test_ratios_show_their_rounds() -> None:
    base, half = summarize([record(0.2)], duration=1.0), summarize([record(0.1)], duration=2.0)
    compared = {"B": ratios(base, half, [base, base], [half, base])}
    heading, _, *rows = ratio_table("A", compared).splitlines()
    cells = {
        title: row.split()[-2:]
        for row in rows
        for title in ("requests/s", "TTFT mean")
        if row.startswith(title)
    }
    assert heading.split() == ["over", "A", "B", "rounds"]
    assert cells == {"requests/s": ["0.500", "0.500..1.00"], "TTFT mean": ["0.500", "0.500..1.00"]}
