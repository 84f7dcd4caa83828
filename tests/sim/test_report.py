"""Reports and their pictures say what the records say."""

import itertools
import json
import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.bench.stats import RequestRecord, Slo
from jaxserve.sim.plot import Bars, Chart, Line, cumulative, figure, report_figure, ticks
from jaxserve.sim.report import EngineUse, Report, comparison_text, report_json, report_text
from metrics.stats import PrefillStats, PromptTokenStats

SVG = "{http://www.w3.org/2000/svg}"


def sources(*splits: tuple[int, int, int]) -> PromptTokenStats:
    """Of requests with (computed, hit, external) tokens."""
    total = PromptTokenStats.empty()
    for computed, hit, external in splits:
        total = total.add(
            PrefillStats(
                num_prompt_tokens=computed + hit + external,
                local_cache_hit=hit,
                external_kv_transfer=external,
            )
        )
    return total


def record(start: float, first: float, gap: float, tokens: int) -> RequestRecord:
    arrivals = tuple(start + first + gap * index for index in range(tokens))
    return RequestRecord(
        start=start, end=arrivals[-1], arrivals=arrivals, prompt_tokens=100, output_tokens=tokens
    )


def report(label: str = "1P + 2D", slo: Slo | None = None) -> Report:
    return Report(
        label=label,
        records=(record(0, 0.5, 0.1, 5), record(1, 1.5, 0.2, 4), record(2, 0.1, 0.1, 2)),
        duration_s=4.0,
        engines=(
            EngineUse(role="prefill", steps=3, busy_s=3.0, sources=sources((100, 0, 0), (40, 60, 0))),
            EngineUse(role="decode", steps=5, busy_s=1.0, sources=sources((0, 0, 100)), preempted=2),
            EngineUse(role="decode", steps=7, busy_s=2.0, sources=sources((10, 30, 60))),
        ),
        slo=slo,
    )


def test_a_report_folds_its_engines_by_role():
    made = report(slo=Slo(ttft=0.6))
    assert made.roles == ("prefill", "decode")
    assert made.busy("prefill") == 0.75 and made.busy("decode") == 3 / 8
    assert made.sources("decode").by_source() == {
        "local_compute": 10,
        "local_cache_hit": 30,
        "external_kv_transfer": 160,
    }
    assert made.summary.goodput == 2 / 4.0
    assert made.summary.ttft.at(50) == pytest.approx(0.5)


def test_the_text_shows_every_part():
    text = report_text(report(slo=Slo(ttft=0.6)))
    assert "goodput 0.5" in text and "TTFT" in text and "ITL" in text
    prefill, decode = text.splitlines()[-2:]
    assert " ".join(prefill.split()) == "1 prefill 75% 3 0 200 140 (70%) 60 (30%) 0 (0%)"
    assert " ".join(decode.split()) == "2 decode 38% 12 2 200 10 (5%) 30 (15%) 160 (80%)"


def test_configurations_stand_side_by_side():
    lines = comparison_text([report("1P + 1D"), report("2P + 1D", Slo(ttft=0.6))]).splitlines()
    assert "goodput" in lines[0] and lines[2].startswith("1P + 1D") and lines[3].startswith("2P + 1D")
    assert "goodput" not in comparison_text([report()])


def test_json_holds_the_whole_report():
    plain = json.loads(json.dumps(report_json(report(slo=Slo(ttft=0.6, tpot=0.1))), allow_nan=False))
    assert plain["slo"] == {"ttft": 0.6, "tpot": 0.1} and len(plain["requests"]) == 3
    for role in plain["roles"].values():
        assert sum(role["by_source"].values()) == role["prompt_tokens"]
    assert plain["roles"]["decode"]["engines"] == 2


def test_a_run_in_which_nothing_was_served_can_be_told():
    failed = RequestRecord(start=0, end=1, error="never fits")
    made = Report(label="<1P & 1D>", records=(failed,), duration_s=1.0, engines=report().engines[:1])
    assert "1 FAILED" in report_text(made)
    assert "-" in comparison_text([made])
    json.dumps(report_json(made), allow_nan=False)
    ElementTree.fromstring(report_figure([made]))


def polylines(svg: str) -> list[list[tuple[float, float]]]:
    """Points of every curve, in pixels."""
    curves = ElementTree.fromstring(svg).iter(f"{SVG}polyline")
    return [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in curve.attrib["points"].split())]
        for curve in curves
    ]


@given(
    st.lists(
        st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), max_size=8),
        min_size=1,
        max_size=4,
    )
)
def test_curves_stay_in_their_chart_in_order(lines):
    chart = Chart(
        title="t",
        x_label="x",
        y_label="y",
        lines=tuple(Line(label=f"<{i}>", points=tuple(points)) for i, points in enumerate(lines)),
    )
    drawn = polylines(figure([chart]))
    assert [len(curve) for curve in drawn] == [len(points) for points in lines]
    for curve, points in zip(drawn, lines, strict=True):
        assert all(0 <= x <= 460 and 0 <= y <= 300 for x, y in curve)
        for (ax, ay), (bx, by), a, b in zip(curve, curve[1:], points, points[1:], strict=False):
            assert (ax <= bx + 0.1) or a[0] > b[0]
            assert (ay >= by - 0.1) or a[1] > b[1]


@given(st.floats(1e-6, 1e9))
def test_ticks_are_few_and_reach_the_top(top):
    marks = ticks(top)
    assert marks[0] == 0 and marks[-1] >= top * (1 - 1e-6) and 2 <= len(marks) <= 8
    assert marks[-2] < top


def test_what_is_no_number_is_not_drawn():
    line = Line(label="a", points=((0.0, 1.0), (math.nan, 2.0), (1.0, math.inf), (2.0, 3.0)))
    assert line.finite == ((0.0, 1.0), (2.0, 3.0))
    assert ticks(0) == ticks(1) == ticks(math.inf)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=500))
def test_a_cumulative_curve_rises_from_nothing_to_all(values):
    points = cumulative("a", values).points
    assert points[0] == (min(values), 0.0) and points[-1] == (max(values), 100.0)
    assert all(a[0] <= b[0] and a[1] < b[1] for a, b in itertools.pairwise(points))
    x, share = points[len(points) // 2]
    assert sum(value <= x for value in values) / len(values) * 100 >= share - 1e-9
    assert cumulative("a", []).points == ()


def test_bars_have_the_size_of_their_parts():
    bars = Bars(title="t", parts=("a", "b"), bars=(("one", (1.0, 3.0)), ("none", (0.0, 0.0))))
    boxes = ElementTree.fromstring(figure([bars])).iter(f"{SVG}rect")
    widths = [float(box.attrib["width"]) for box in boxes if box.attrib["height"] not in ("10", "300")]
    assert widths[1] == pytest.approx(3 * widths[0], rel=1e-3) and widths[2:] == [0, 0]


def test_the_figure_of_a_report_has_four_charts():
    svg = report_figure([report("1P + 1D"), report("2P + 1D")])
    texts = [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    for title in ("Time to first token", "Between tokens", "Requests under way", "Prompt tokens by source"):
        assert title in texts
    assert "1P + 1D: prefill" in texts and len(polylines(svg)) == 6
