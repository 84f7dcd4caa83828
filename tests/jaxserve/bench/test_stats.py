"""The arithmetic of benchmarks, on small examples by hand and on many drawn ones."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.bench.stats import (
    LATENCIES,
    RequestRecord,
    Slo,
    as_json,
    figures,
    ratios,
    spread,
    summarize,
)

GOOD = RequestRecord(
    start=1.0, end=2.0, arrivals=(1.2, 1.3, 1.7), prompt_tokens=10, output_tokens=6, cached_tokens=4
)
ONE_TOKEN = RequestRecord(start=0.0, end=0.5, arrivals=(0.4,), prompt_tokens=5, output_tokens=1)
FAILED = RequestRecord(start=0.0, end=9.0, arrivals=(0.1,), error="HTTP 500: x")


def test_one_record() -> None:
    assert GOOD.ttft == pytest.approx(0.2)
    assert GOOD.tpot == pytest.approx(0.1)  # 0.5 s for the 5 tokens after the first, in two arrivals
    assert GOOD.itl == pytest.approx((0.1, 0.4))
    assert GOOD.e2el == 1.0


def test_no_second_token_no_tpot() -> None:
    assert ONE_TOKEN.tpot is None and ONE_TOKEN.itl == ()
    assert RequestRecord(start=0.0, end=1.0).ttft is None


def test_a_summary_by_hand() -> None:
    summary = summarize([GOOD, ONE_TOKEN, FAILED, FAILED], duration=2.0, slo=Slo(ttft=0.3))
    assert (summary.completed, summary.failed) == (2, 2)
    assert (summary.prompt_tokens, summary.output_tokens, summary.cached_tokens) == (15, 7, 4)
    assert summary.request_throughput == 1.0
    assert summary.output_throughput == 3.5
    assert summary.total_throughput == 11.0
    assert summary.goodput == 0.5
    assert summary.ttft.mean == pytest.approx(0.3)
    assert summary.tpot.count == 1 and summary.itl.count == 2
    assert summary.errors == (("HTTP 500: x", 2),)


def test_nothing_succeeded() -> None:
    summary = summarize([FAILED], duration=1.0)
    assert summary.completed == 0 and summary.goodput is None and summary.cached_tokens is None
    assert all(math.isnan(getattr(summary, name).mean) for name in LATENCIES)
    with pytest.raises(ValueError, match="duration"):
        summarize([], duration=0.0)


@pytest.mark.parametrize(
    ("slo", "record", "kept"),
    [
        (Slo(), GOOD, True),
        (Slo(ttft=0.19), GOOD, False),
        (Slo(tpot=0.09), GOOD, False),
        (Slo(e2el=0.99), GOOD, False),
        (Slo(ttft=0.3, tpot=0.2, e2el=1.0), GOOD, True),
        (Slo(tpot=0.001), ONE_TOKEN, True),
        (Slo(), FAILED, False),
        (Slo(), RequestRecord(start=0.0, end=1.0), False),
    ],
)
def test_goodput_keeps_every_bound(slo: Slo, record: RequestRecord, kept: bool) -> None:
    assert slo.kept_by(record) is kept


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.randoms())
@settings(deadline=None, max_examples=50)
def test_a_spread_is_ordered_and_ignores_order(values: list[float], random: object) -> None:
    described = spread(values)
    at = [value for _, value in described.percentiles]
    slack = 1e-9 * described.max
    assert described.min <= at[0] + slack and at == sorted(at) and at[-1] <= described.max + slack
    assert described.min - slack <= described.mean <= described.max + slack
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert spread(shuffled).percentiles == described.percentiles


def test_percentiles_interpolate() -> None:
    described = spread([0.0, 10.0], percentiles=(50, 90))
    assert described.at(50) == 5.0 and described.at(90) == pytest.approx(9.0)
    with pytest.raises(KeyError):
        described.at(99)


def test_ratios_compare_whole_runs_and_rounds() -> None:
    slow = summarize([GOOD, ONE_TOKEN], duration=4.0)
    fast = summarize([GOOD, ONE_TOKEN], duration=2.0)
    ratio = ratios(slow, fast, [slow, slow], [fast, slow])["request_throughput"]
    assert ratio.value == 2.0 and ratio.rounds == (2.0, 1.0)
    assert "goodput" not in figures(slow)


def test_a_ratio_to_nothing_is_not_a_number() -> None:
    none, some = summarize([FAILED], duration=1.0), summarize([GOOD], duration=1.0)
    compared = ratios(none, some, [none], [some])
    assert math.isnan(compared["request_throughput"].value) and math.isnan(compared["mean_ttft"].value)


def test_json_has_no_nan_and_names_percentiles() -> None:
    summary = summarize([GOOD, FAILED], duration=2.0)
    text = json.dumps(as_json({"all": summary, "requests": [GOOD], "none": spread([])}), allow_nan=False)
    report = json.loads(text)
    assert report["all"]["ttft"]["p99"] == pytest.approx(0.2)
    assert report["all"]["errors"] == {"HTTP 500: x": 1}
    assert report["requests"][0]["arrivals"] == [1.2, 1.3, 1.7]
    assert report["none"]["mean"] is None and report["none"]["p50"] is None
