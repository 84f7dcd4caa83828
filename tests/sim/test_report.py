"""Reports and their pictures say what the records say."""

import json

import pytest

from jaxserve.bench.stats import RequestRecord, Slo
from jaxserve.plot import Bars, Chart, picture
from jaxserve.sim.plot import report_charts
from jaxserve.sim.report import EngineUse, Report, comparison_text, report_json, report_text
from metrics.stats import PrefillStats, PromptTokenStats


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
    assert picture(report_charts([made]), kind="svg")


def test_the_charts_of_a_report_say_what_its_records_say():
    first, between, waiting, split = report_charts([report("1P + 1D"), report("2P + 1D")])
    assert isinstance(first, Chart) and [line.label for line in first.lines] == ["1P + 1D", "2P + 1D"]
    assert [x for x, _ in first.lines[0].points] == pytest.approx([0.1, 0.1, 0.5, 1.5])
    assert isinstance(between, Chart) and between.lines[0].points[-1][1] == 100.0
    assert isinstance(waiting, Chart) and max(count for _, count in waiting.lines[0].points) >= 1
    assert isinstance(split, Bars)
    assert split.bars[:2] == (
        ("1P + 1D: prefill", (140.0, 60.0, 0.0)),
        ("1P + 1D: decode", (10.0, 30.0, 160.0)),
    )
