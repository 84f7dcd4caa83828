import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from metrics.engine import EngineStats
from metrics.exposition import EngineSeries, Exposition, Family, Sample, families
from metrics.histogram import Histogram
from metrics.observe import (
    observe_finished,
    observe_first_token,
    observe_prefill,
    observe_rejection,
    observe_step,
)
from metrics.prometheus import make_registry, render
from metrics.records import FinishedRecord, Gauges, RequestTotals, SequenceTimes, StepRecord
from metrics.stats import PrefillStats

LATENCY = "0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"
TTFT = ".001 .005 .01 .02 .04 .06 .08 .1 .25 .5 .75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
ITL = ".01 .025 .05 .075 .1 .15 .2 .3 .4 .5 .75 1 2.5 5 7.5 10 20 40 80"
TOKENS = "1 2 5 10 20 50 100 200 500 1000 2000"
ITERATION = "1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384"
TIMES_LOST = "1 2 3 4 5 10 20"
ENGINE = ("model_name", "engine")


@dataclass(frozen=True)
class Expected:
    """A family as vLLM 0.33 registers it: type, labels, values of the last label, buckets."""

    kind: str
    labels: tuple[str, ...] = ENGINE
    values: tuple[str, ...] = ()
    buckets: str = ""


def labelled(kind: str, label: str, *values: str) -> Expected:
    return Expected(kind, (*ENGINE, label), values)


def histogram(buckets: str) -> Expected:
    return Expected("histogram", buckets=buckets)


GAUGE, COUNTER = Expected("gauge"), Expected("counter")
EXPECTED = {
    "num_requests_running": GAUGE,
    "num_requests_waiting": GAUGE,
    "num_requests_waiting_by_reason": labelled("gauge", "reason", "capacity", "deferred"),
    "kv_cache_usage_perc": GAUGE,
    "prefix_cache_queries": COUNTER,
    "prefix_cache_hits": COUNTER,
    "external_prefix_cache_queries": COUNTER,
    "external_prefix_cache_hits": COUNTER,
    "num_preemptions": COUNTER,
    "preempted_prefill_tokens": COUNTER,
    "corrupted_requests": COUNTER,
    "compile_misses": COUNTER,
    "dispatched_tokens": COUNTER,
    "padding_tokens": COUNTER,
    "padding_waste_ratio": GAUGE,
    "prompt_tokens": COUNTER,
    "prompt_tokens_by_source": labelled(
        "counter", "source", "local_compute", "local_cache_hit", "external_kv_transfer"
    ),
    "prompt_tokens_cached": COUNTER,
    "prompt_tokens_cached_by_source": labelled(
        "counter", "source", "device", "host", "p2p", "disk", "external_unspecified"
    ),
    "generation_tokens": COUNTER,
    "request_success": labelled(
        "counter", "finished_reason", "stop", "length", "abort", "error", "repetition"
    ),
    "admission_rejections": Expected(
        "counter", ("model_name", "reason"), ("max_num_queued_reqs", "max_num_queued_tokens")
    ),
    "request_prompt_tokens": histogram(TOKENS),
    "request_generation_tokens": histogram(TOKENS),
    "request_max_num_generation_tokens": histogram(TOKENS),
    "request_params_max_tokens": histogram(TOKENS),
    "request_prefill_kv_computed_tokens": histogram(TOKENS),
    "iteration_tokens_total": histogram(ITERATION),
    "request_params_n": histogram("1 2 5 10 20"),
    "request_num_preemptions": histogram(TIMES_LOST),
    "time_to_first_token_seconds": histogram(TTFT),
    "inter_token_latency_seconds": histogram(ITL),
    "request_time_per_output_token_seconds": histogram(ITL),
    "e2e_request_latency_seconds": histogram(LATENCY),
    "request_queue_time_seconds": histogram(LATENCY),
    "request_inference_time_seconds": histogram(LATENCY),
    "request_prefill_time_seconds": histogram(LATENCY),
    "request_decode_time_seconds": histogram(LATENCY),
}
# Names that vLLM's own server test looks for in the text of a scrape.
VLLM_TEXT = [
    *("num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason"),
    *("kv_cache_usage_perc", "prefix_cache_queries", "prefix_cache_hits", "num_preemptions_total"),
    *("prompt_tokens_total", "generation_tokens_total", "iteration_tokens_total", "cache_config_info"),
    "request_success_total",
    *(
        f"{name}_{part}"
        for name in (
            *("request_prompt_tokens", "request_generation_tokens", "request_params_n"),
            *("request_params_max_tokens", "time_to_first_token_seconds", "inter_token_latency_seconds"),
            *("e2e_request_latency_seconds", "request_queue_time_seconds", "request_num_preemptions"),
            *("request_inference_time_seconds", "request_prefill_time_seconds"),
            "request_decode_time_seconds",
        )
        for part in ("sum", "bucket", "count")
    ),
]
CACHE = {"block_size": 16, "num_gpu_blocks": 1000, "gpu_memory_utilization": None, "cache_dtype": "auto"}
EMPTY = EngineStats.empty(2048)


def busy_stats() -> EngineStats:
    """Something of everything, chosen so that a series read from the wrong field shows."""
    prefill = PrefillStats(
        num_prompt_tokens=100,
        local_cache_hit=32,
        external_kv_transfer=8,
        external_by_tier=(("host", 5), ("p2p", 3)),
    )
    times = SequenceTimes(
        arrival_s=0.0, queued_s=0.25, scheduled_s=1.0, first_token_s=2.5, last_token_s=8.5, finished_s=9.0
    )
    step = StepRecord(
        gauges=Gauges(running=2, waiting_capacity=3, waiting_deferred=4, pages_used=250, pages_total=1000),
        prompt_tokens=61,
        recomputed_tokens=17,
        generation_tokens=12,
        preemptions=14,
        prefix_queries=90,
        prefix_hits=33,
        external_queries=68,
        external_hits=(("host", 15), ("p2p", 10)),
        corrupted=16,
        dispatched_tokens=128,
        padding_tokens=32,
        compile_misses=3,
        inter_token_s=np.array([0.02, 0.5]),
    )
    ended = FinishedRecord(
        reason="length",
        num_generation_tokens=5,
        max_tokens=6,
        num_preemptions=7,
        times=times,
        request=RequestTotals(prefill=prefill, n=9, max_num_generation_tokens=11),
    )
    stats = observe_first_token(observe_prefill(observe_step(EMPTY, step), prefill), 0.75)
    stats = observe_finished(stats, replace(ended, reason="stop", num_generation_tokens=0, times=None))
    stats = observe_finished(stats, replace(ended, request=None))
    return observe_rejection(stats, "max_num_queued_tokens")


VALUES: dict[str, float | list[float]] = {
    "num_requests_running": 2,
    "num_requests_waiting": 7,
    "num_requests_waiting_by_reason": [3, 4],
    "kv_cache_usage_perc": 0.25,
    "prefix_cache_queries": 90,
    "prefix_cache_hits": 33,
    "external_prefix_cache_queries": 68,
    "external_prefix_cache_hits": 25,
    "num_preemptions": 14,
    "preempted_prefill_tokens": 17,
    "corrupted_requests": 16,
    "compile_misses": 3,
    "dispatched_tokens": 128,
    "padding_tokens": 32,
    "padding_waste_ratio": 0.25,
    "prompt_tokens": 100,
    "prompt_tokens_by_source": [60, 32, 8],
    "prompt_tokens_cached": 40,
    "prompt_tokens_cached_by_source": [32, 5, 3, 0, 0],
    "generation_tokens": 12,
    "request_success": [1, 1, 0, 0, 0],
    "admission_rejections": [0, 1],
    # Sums of the histograms:
    "request_prompt_tokens": 100,
    "request_generation_tokens": 5,
    "request_max_num_generation_tokens": 11,
    "request_params_max_tokens": 6,
    "request_prefill_kv_computed_tokens": 60,
    "iteration_tokens_total": 90,
    "request_params_n": 9,
    "request_num_preemptions": 7,
    "time_to_first_token_seconds": 0.75,
    "inter_token_latency_seconds": 0.52,
    "request_time_per_output_token_seconds": 1.5,
    "e2e_request_latency_seconds": 9.0,
    "request_queue_time_seconds": 0.75,
    "request_inference_time_seconds": 7.5,
    "request_prefill_time_seconds": 1.5,
    "request_decode_time_seconds": 6.0,
}


def shown(exposition: Exposition, prefix: str = "vllm:") -> dict[str, Metric]:
    body, _ = render(make_registry(lambda: exposition, prefix=prefix))
    return {family.name: family for family in text_string_to_metric_families(body.decode())}


def one_engine(stats: EngineStats, extra: tuple[Family, ...] = ()) -> Exposition:
    series = EngineSeries(stats=stats, cache_config=CACHE, extra=extra)
    return Exposition(model_name="some/model", engines=(series,))


def value(found: dict[str, Metric], name: str, sample: str = "", **labels: str) -> float:
    """The one sample of a family with these labels; `sample` is its name's ending."""
    hits = [
        each.value
        for each in found[name].samples
        if each.name == name + sample and labels.items() <= each.labels.items()
    ]
    assert len(hits) == 1, (name, sample, labels, hits)
    return hits[0]


def test_the_families_are_those_of_the_table_and_no_more() -> None:
    found = {name for name in shown(one_engine(EMPTY)) if name.startswith("vllm:")}
    assert found == {f"vllm:{name}" for name in (*EXPECTED, "cache_config_info")}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_family_has_its_type_labels_and_buckets_before_anything_happened(name: str) -> None:
    expected, family = EXPECTED[name], shown(one_engine(EMPTY))[f"vllm:{name}"]
    assert family.type == expected.kind
    assert family.documentation.endswith(".")
    suffix = {"counter": "_total", "gauge": "", "histogram": "_bucket"}[expected.kind]
    samples = [sample for sample in family.samples if sample.name == f"vllm:{name}{suffix}"]
    wanted = {*expected.labels, "le"} if expected.buckets else set(expected.labels)
    assert all(set(sample.labels) == wanted and sample.value == 0 for sample in samples)
    assert all(sample.labels["model_name"] == "some/model" for sample in samples)
    if "engine" in wanted:
        assert all(sample.labels["engine"] == "0" for sample in samples)
    if expected.buckets:
        bounds = [float(sample.labels["le"]) for sample in samples]
        assert bounds == [*map(float, expected.buckets.split()), math.inf]
        assert {sample.name for sample in family.samples} == {
            f"vllm:{name}{part}" for part in ("_bucket", "_count", "_sum")
        }
    else:
        values = tuple(sample.labels[expected.labels[-1]] for sample in samples)
        assert values == (expected.values or values)
        assert len(family.samples) == len(expected.values or (1,))


def test_vllms_own_server_test_finds_its_names() -> None:
    body, _ = render(make_registry(lambda: one_engine(EMPTY)))
    assert [name for name in VLLM_TEXT if f"vllm:{name}" not in body.decode()] == []


def test_no_name_speaks_of_recomputed_tokens() -> None:
    body, _ = render(make_registry(lambda: one_engine(busy_stats())))
    assert "vllm:preempted_prefill_tokens_total" in body.decode()
    assert "recomputed" not in body.decode().lower()


def test_the_values_are_the_snapshots() -> None:
    found = shown(one_engine(busy_stats()))
    scraped: dict[str, float | list[float]] = {}
    for name, expected in EXPECTED.items():
        samples = found[f"vllm:{name}"].samples
        if expected.kind == "histogram":
            samples = [sample for sample in samples if sample.name.endswith("_sum")]
        numbers = [sample.value for sample in samples]
        scraped[name] = numbers if expected.values else numbers[0]
    assert scraped == VALUES


def test_buckets_are_cumulative() -> None:
    found = shown(one_engine(busy_stats()))
    name = "vllm:inter_token_latency_seconds"
    assert value(found, name, "_bucket", le="0.01") == 0
    assert value(found, name, "_bucket", le="0.025") == 1
    assert value(found, name, "_bucket", le="0.4") == 1
    assert value(found, name, "_bucket", le="0.5") == 2
    assert value(found, name, "_bucket", le="+Inf") == value(found, name, "_count") == 2


def test_bounds_are_written_as_prometheus_client_writes_them() -> None:
    wide = EngineStats.empty(2_000_000)
    body, _ = render(make_registry(lambda: one_engine(wide)))
    for bound in ("1.0", "0.001", "1e+06", "+Inf"):
        assert f'le="{bound}"' in body.decode()


def test_the_cache_configuration_is_labels_of_a_one_without_a_model() -> None:
    (sample,) = shown(one_engine(EMPTY))["vllm:cache_config_info"].samples
    assert sample.value == 1
    assert sample.labels == {
        "engine": "0",
        "block_size": "16",
        "num_gpu_blocks": "1000",
        "gpu_memory_utilization": "None",
        "cache_dtype": "auto",
    }


def test_without_a_configuration_there_is_no_such_family() -> None:
    bare = Exposition(model_name="m", engines=(EngineSeries(stats=EMPTY),))
    assert "vllm:cache_config_info" not in shown(bare)


def test_engines_have_series_of_their_own_and_one_queue() -> None:
    stats = busy_stats()
    one, two = EngineSeries(stats=stats, cache_config=CACHE), EngineSeries(engine="1", stats=stats)
    found = shown(Exposition(model_name="m", engines=(one, two)))
    assert value(found, "vllm:prompt_tokens", "_total", engine="0") == 100
    assert value(found, "vllm:prompt_tokens", "_total", engine="1") == 100
    assert value(found, "vllm:admission_rejections", "_total", reason="max_num_queued_tokens") == 2
    assert len(found["vllm:cache_config_info"].samples) == 2
    with pytest.raises(ValueError, match="distinct"):
        Exposition(model_name="m", engines=(one, one))
    with pytest.raises(ValueError, match="distinct"):
        Exposition(model_name="m", engines=())


@pytest.mark.parametrize("prefix", ["vllm:", "jaxserve:", "jaxserve_", "", "a:b:"])
def test_the_prefix_is_put_before_every_name(prefix: str) -> None:
    found = shown(one_engine(EMPTY), prefix)
    assert {f"{prefix}{name}" for name in (*EXPECTED, "cache_config_info")} <= set(found)
    others = {name for name in found if not name.startswith(("python_", "process_"))}
    assert len(others) == len(EXPECTED) + 1


@pytest.mark.parametrize("prefix", ["1x", "a-b", "a b", "ä", "vllm:\n", '"'])
def test_a_prefix_that_no_name_can_have_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="metrics prefix"):
        make_registry(lambda: one_engine(EMPTY), prefix=prefix)


def test_the_process_and_python_series_are_there() -> None:
    found = shown(one_engine(EMPTY))
    assert {"python_info", "python_gc_collections", "process_resident_memory_bytes"} <= set(found)


def test_each_scrape_takes_one_snapshot_and_keeps_nothing() -> None:
    snapshots = [one_engine(EMPTY), one_engine(busy_stats()), one_engine(EMPTY)]
    taken = iter(snapshots)
    registry = make_registry(lambda: next(taken))
    bodies = [render(registry)[0].decode() for _ in snapshots]
    prompts = [line for body in bodies for line in body.splitlines() if "vllm:prompt_tokens_total{" in line]
    assert [float(line.split()[-1]) for line in prompts] == [0, 100, 0]
    assert next(taken, None) is None


EXTRA = (
    Family(name="draft_misses_total", kind="counter", help="Misses.", samples=(Sample(value=3),)),
    Family(
        name="draft_waste_ratio",
        kind="gauge",
        help="Waste.",
        label_names=("axis",),
        samples=(Sample(labels=("rows",), value=0.25), Sample(labels=("tokens",), value=0.5)),
    ),
    Family(
        name="host_gap_seconds",
        kind="histogram",
        help="Gap.",
        samples=(Sample(value=Histogram.empty((0.1, 1.0)).observe(0.5)),),
    ),
)


def test_extra_families_get_the_engine_s_labels() -> None:
    found = shown(one_engine(EMPTY, EXTRA), "jaxserve:")
    labels = {"model_name": "some/model", "engine": "0"}
    assert value(found, "jaxserve:draft_misses", "_total", **labels) == 3
    assert value(found, "jaxserve:draft_waste_ratio", axis="tokens", **labels) == 0.5
    assert value(found, "jaxserve:host_gap_seconds", "_bucket", le="1.0", **labels) == 1
    assert value(found, "jaxserve:host_gap_seconds", "_sum", **labels) == 0.5


def test_extra_families_of_several_engines_are_one_family() -> None:
    one = EngineSeries(stats=EMPTY, extra=EXTRA)
    two = EngineSeries(engine="1", stats=EMPTY, extra=EXTRA[:1])
    found = shown(Exposition(model_name="m", engines=(one, two)))
    assert [s.labels["engine"] for s in found["vllm:draft_misses"].samples] == ["0", "1"]
    body, _ = render(make_registry(lambda: Exposition(model_name="m", engines=(one, two))))
    assert body.decode().count("# TYPE vllm:draft_misses_total") == 1
    odd = replace(EXTRA[0], kind="gauge")
    three = EngineSeries(engine="2", stats=EMPTY, extra=(odd,))
    with pytest.raises(ValueError, match="disagree"):
        families(Exposition(model_name="m", engines=(one, three)))


@pytest.mark.parametrize("name", ["prompt_tokens", "prompt_tokens_total", "cache_config_info"])
def test_an_extra_family_cannot_take_a_name_of_the_table(name: str) -> None:
    family = Family(name=name, kind="counter", help="Mine.", samples=(Sample(value=1),))
    with pytest.raises(ValueError, match="name of the table"):
        families(one_engine(EMPTY, (family,)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Family(name="x", kind="gauge", help="", samples=(Sample(labels=("a",), value=1),)),
        lambda: Family(name="x", kind="histogram", help="", samples=(Sample(value=1),)),
        lambda: Family(name="x", kind="gauge", help="", samples=(Sample(value=Histogram.empty((1.0,))),)),
        lambda: Family(name="x", kind="gauge", help="", label_names=("a", "a")),
    ],
)
def test_a_family_that_contradicts_itself_is_refused(make: Callable[[], Family]) -> None:
    with pytest.raises(ValueError, match=r"^x: "):
        make()


@settings(deadline=None, max_examples=40)
@given(name=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_model_name_survives_the_text(name: str) -> None:
    # Splitting the text in lines is the parser's business; a carriage return it does not keep.
    name = name.replace("\r", "")
    series = EngineSeries(stats=EMPTY, cache_config={"path": name})
    found = shown(Exposition(model_name=name, engines=(series,)))
    assert found["vllm:prompt_tokens"].samples[0].labels["model_name"] == name
    assert found["vllm:cache_config_info"].samples[0].labels["path"] == name


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;q=0.1",
        "application/openmetrics-text; version=1.0.0; escaping=dots",
        "text/plain;q=0.5, Application/OpenMetrics-Text",
    ],
)
def test_openmetrics_is_given_where_it_is_asked_for(accept: str) -> None:
    body, content_type = render(make_registry(lambda: one_engine(busy_stats())), accept)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert body.endswith(b"# EOF\n")
    found = {family.name: family for family in openmetrics.text_string_to_metric_families(body.decode())}
    names = {name for name in found if not name.startswith(("python_", "process_"))}
    assert names == {f"vllm:{name}" for name in (*EXPECTED, "cache_config_info")}
    assert value(found, "vllm:prompt_tokens", "_total") == 100
    assert value(found, "vllm:iteration_tokens_total", "_sum") == 90


@pytest.mark.parametrize(
    "accept",
    [
        *(None, "", "*/*", "text/html", "text/plain;version=0.0.4", "text/plain;version=x.y", ";;,=,;="),
        *("text/plain;version=1.0.0;escaping=dots", "application/openmetrics-text;version=0.0.1"),
        *("application/openmetrics-text;version=x", "application/openmetrics-text;version=9.9.9"),
    ],
)
def test_any_other_header_gets_plain_text(accept: str | None) -> None:
    body, content_type = render(make_registry(lambda: one_engine(EMPTY)), accept)
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    assert b"\nvllm:num_requests_running{" in body
