"""The dashboard asks for series that exist, leaves out none that is new, and Grafana can lay it out."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from metrics.engine import EngineStats
from metrics.exposition import EngineSeries, Exposition
from metrics.move_series import MoveSeries, OffloadTier, SimpleTier, move_families
from metrics.moves import KINDS, MoveStats
from metrics.prometheus import make_registry, render

DASHBOARD = json.loads(
    (Path(__file__).resolve().parents[2] / "docs" / "grafana" / "jaxserve.json").read_text("utf-8")
)
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
SELECTOR = re.compile(r"(vllm:\w+)(?:\{([^}]*)\})?")
FAMILIES = move_families(
    MoveSeries(
        stats=MoveStats.empty(KINDS),
        fetches=True,
        offload_tiers=(OffloadTier(num_chunks=1, pages_per_chunk=1, num_bytes=1, num_tokens=1),),
        simple_tiers=(SimpleTier(lazy_offload=False, slots=1),),
    )
)
# Panels of vLLM's own example dashboards.
USUAL = (
    *("inter_token_latency_seconds", "e2e_request_latency_seconds", "time_to_first_token_seconds"),
    *("request_time_per_output_token_seconds", "request_prompt_tokens", "request_generation_tokens"),
    *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
    *("iteration_tokens_total", "generation_tokens", "prompt_tokens", "request_success"),
    *("num_requests_running", "num_requests_waiting_by_reason", "kv_cache_usage_perc"),
    *("prompt_tokens_by_source", "prompt_tokens_cached_by_source"),
)


def samples() -> dict[str, tuple[str, set[str]]]:
    """Every sample's name with its family and labels, all connectors configured."""
    engine = EngineSeries(stats=EngineStats.empty(64), extra=FAMILIES)
    body, _ = render(make_registry(lambda: Exposition(model_name="m", engines=(engine,))))
    return {
        sample.name: (family.name.removeprefix("vllm:"), set(sample.labels))
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


SAMPLES = samples()


def expressions(panel: dict[str, Any]) -> list[str]:
    return [target["expr"] for target in panel["targets"]]


def asked_for() -> set[str]:
    """Families on any panel, without prefix."""
    names = [name for panel in PANELS for text in expressions(panel) for name, _ in SELECTOR.findall(text)]
    return {SAMPLES[name][0] for name in names if name in SAMPLES}


def title_of(panel: dict[str, Any]) -> str:
    return f"{panel['id']}-{panel['title']}"


@pytest.mark.parametrize("panel", PANELS, ids=title_of)
def test_a_panel_asks_for_series_that_exist_of_the_chosen_model(panel: dict[str, Any]) -> None:
    assert panel["targets"] and panel["description"]
    for target in panel["targets"]:
        text = target["expr"]
        found = SELECTOR.findall(text)
        assert found
        for name, labels in found:
            assert name in SAMPLES
            assert labels.startswith('model_name=~"$model_name",instance=~"$instance"')
        names = {label for name, _ in found for label in SAMPLES[name][1]} | {"instance"}
        grouped = re.findall(r"by \((\w+)\)", text)
        shown = re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
        assert {*grouped, *shown} <= names
        assert set(shown) <= set(grouped)
        assert text.count("(") == text.count(")")
        assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


@pytest.mark.parametrize("panel", PANELS, ids=title_of)
def test_counters_are_shown_as_rates_and_gauges_are_not(panel: dict[str, Any]) -> None:
    for text in expressions(panel):
        for name, _ in SELECTOR.findall(text):
            grows = name.endswith(("_total", "_bucket", "_sum", "_count"))
            assert (f"rate({name}{{" in text) == grows


def test_every_series_of_moves_that_is_not_deprecated_is_on_a_panel() -> None:
    wanted = {family.name for family in FAMILIES if not family.help.startswith("Deprecated")}
    assert not wanted - asked_for()


def test_the_usual_panels_are_there() -> None:
    assert not set(USUAL) - asked_for()


def test_grafana_can_import_it() -> None:
    assert DASHBOARD["schemaVersion"] >= 39 and DASHBOARD["title"] and DASHBOARD["uid"]
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "model_name", "instance"]
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    for name in ("model_name", "instance"):
        series = SELECTOR.findall(variables[name]["definition"])
        assert series and all(metric in SAMPLES for metric, _ in series)
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    for panel in PANELS:
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters)


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert all(at["x"] >= 0 and at["x"] + at["w"] <= 24 for at in places)
    for one, two in combinations(places, 2):
        apart_x = one["x"] + one["w"] <= two["x"] or two["x"] + two["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= two["y"] or two["y"] + two["h"] <= one["y"]
        assert apart_x or apart_y
