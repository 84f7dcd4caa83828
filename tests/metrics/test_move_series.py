import math
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from metrics.engine import EngineStats
from metrics.exposition import EngineSeries, Exposition
from metrics.move_records import LoadRecord, MoveStepRecord, StoreRecord
from metrics.move_series import MoveSeries, OffloadTier, SimpleTier, move_families
from metrics.moves import KINDS, NIXL, OFFLOADING, SIMPLE, FetchStages, MoveStats, PageStates, TierSlots
from metrics.observe_moves import (
    observe_load,
    observe_notification_failure,
    observe_step_moves,
    observe_store,
)
from metrics.prometheus import make_registry, render

ROOT = Path(__file__).resolve().parents[2]
READ_S = ".005 .01 .025 .05 .075 .1 .2 .3 .5 .75 1 5"
COPY_BYTES = "1e6 5e6 1e7 2e7 4e7 6e7 8e7 1e8 1.5e8 2e8"
BUCKETS = {
    "nixl_xfer_time_seconds": READ_S,
    "nixl_post_time_seconds": f".001 {READ_S}",
    "nixl_bytes_transferred": " ".join(str(2**power) for power in range(11, 34, 2)),
    "nixl_num_descriptors": "10 20 30 50 75 100 200 400 1000 2000 4000 10000 20000 50000",
    "kv_offload_load_size": COPY_BYTES,
    "kv_offload_store_size": COPY_BYTES,
    "kv_offload_size": COPY_BYTES,
}
OFFLOAD_TIER = OffloadTier(num_chunks=4, pages_per_chunk=2, num_bytes=4096, num_tokens=128)
SIMPLE_TIER = SimpleTier(lazy_offload=True, slots=32)
ALL = MoveSeries(
    stats=MoveStats.empty(KINDS), fetches=True, offload_tiers=(OFFLOAD_TIER,), simple_tiers=(SIMPLE_TIER,)
)


def exposition(*series: MoveSeries) -> Exposition:
    stats = EngineStats.empty(8)
    engines = tuple(
        EngineSeries(engine=str(index), stats=stats, extra=move_families(each))
        for index, each in enumerate(series)
    )
    return Exposition(model_name="m", engines=engines)


def shown(*series: MoveSeries) -> dict[str, Metric]:
    body, _ = render(make_registry(lambda: exposition(*series)))
    return {family.name: family for family in text_string_to_metric_families(body.decode())}


def scraped(*series: MoveSeries) -> dict[str, float]:
    """Our samples but those of buckets: names without prefix, with the values of their own labels by name."""
    return {
        ",".join(
            [
                sample.name.removeprefix("vllm:"),
                *(
                    text
                    for label, text in sorted(sample.labels.items())
                    if label not in ("model_name", "engine")
                ),
            ]
        ): sample.value
        for name, family in shown(*series).items()
        if name.startswith("vllm:")
        for sample in family.samples
        if "le" not in sample.labels
    }


def busy() -> MoveSeries:
    """Something of everything, chosen so that a series read from the wrong field shows."""
    stats = MoveStats.empty(KINDS)
    load = LoadRecord(num_bytes=5000, num_descriptors=7, seconds=0.25, post_seconds=0.125, retries=1)
    stats = observe_load(stats, NIXL, load)
    stats = observe_load(stats, NIXL, LoadRecord(failed=True, stage="handshake"))
    stats = observe_load(stats, NIXL, LoadRecord(failed=True, stage="verify"))
    stats = observe_load(stats, NIXL, LoadRecord(failed=True, stage="transfer", digest_failures=5))
    stats = observe_notification_failure(stats)
    stats = observe_load(stats, OFFLOADING, LoadRecord(num_bytes=100, seconds=0.5))
    stats = observe_store(stats, OFFLOADING, StoreRecord(num_bytes=200, seconds=0.75))
    stats = observe_store(stats, OFFLOADING, StoreRecord(failed=True))
    stats = observe_load(stats, SIMPLE, LoadRecord(num_bytes=300, num_pages=8, seconds=1.0))
    stats = observe_load(stats, SIMPLE, LoadRecord(failed=True))
    stats = observe_store(stats, SIMPLE, StoreRecord(num_bytes=400, seconds=1.0))
    step = MoveStepRecord(
        pages=PageStates(free=21, idle=22, in_use=23, loading=3, leased=4, storing=5, quarantined=6),
        fetch=FetchStages(waiting_to_start=31, in_progress=32, completed_waiting=33),
        leases=41,
        expired=42,
        late_reads=43,
        tiers=(
            (OFFLOADING, TierSlots(slots=8, used=7, pinned=4, storing=1)),
            (SIMPLE, TierSlots(slots=32, used=17, pinned=14, storing=11)),
        ),
        issued=((SIMPLE, 9),),
        outcomes=(
            (OFFLOADING, "dropped_cpu_full", 51),
            (SIMPLE, "stored", 52),
            (SIMPLE, "skipped_in_flight", 53),
        ),
    )
    return MoveSeries(
        stats=observe_step_moves(stats, step),
        fetches=True,
        offload_tiers=(OFFLOAD_TIER,),
        simple_tiers=(SIMPLE_TIER,),
    )


VALUES = {
    "kv_pages,free": 21,
    "kv_pages,idle": 22,
    "kv_pages,in_use": 23,
    "kv_pages_in_moves,loading": 3,
    "kv_pages_in_moves,storing": 5,
    "kv_pages_in_moves,leased": 4,
    "kv_pages_in_moves,quarantined": 6,
    "num_requests_kv_fetch_by_stage,waiting_to_start": 31,
    "num_requests_kv_fetch_by_stage,in_progress": 32,
    "num_requests_kv_fetch_by_stage,completed_waiting": 33,
    "nixl_xfer_time_seconds_sum": 0.25,
    "nixl_xfer_time_seconds_count": 1,
    "nixl_post_time_seconds_sum": 0.125,
    "nixl_bytes_transferred_sum": 5000,
    "nixl_num_descriptors_sum": 7,
    "nixl_num_failed_transfers_total": 3,
    "nixl_num_failed_notifications_total": 1,
    "nixl_num_kv_expired_reqs_total": 42,
    "nixl_num_notifications_after_expiry_total": 43,
    "kv_digest_failures_total": 5,
    "kv_stale_reads_total": 1,
    "kv_transfer_retries_total": 1,
    "kv_pages_quarantined": 6,
    "kv_leases": 41,
    "kv_offload_load_bytes_total": 100,
    "kv_offload_load_time_total": 0.5,
    "kv_offload_load_size_sum": 100,
    "kv_offload_store_bytes_total": 200,
    "kv_offload_store_time_total": 0.75,
    "kv_offload_store_size_sum": 200,
    "kv_offload_store_size_count": 1,
    "kv_offload_total_bytes_total,CPU_to_GPU": 100,
    "kv_offload_total_bytes_total,GPU_to_CPU": 200,
    "kv_offload_total_time_total,CPU_to_GPU": 0.5,
    "kv_offload_total_time_total,GPU_to_CPU": 0.75,
    "kv_offload_size_sum,CPU_to_GPU": 100,
    "kv_offload_size_sum,GPU_to_CPU": 200,
    "kv_offload_copy_failures_total,load": 0,
    "kv_offload_copy_failures_total,store": 1,
    "kv_offload_allocation_failure_total": 51,
    "kv_offload_cpu_cache_usage_perc": 0.5,
    "kv_offload_cpu_cache_write_usage_perc": 0.125,
    "kv_offload_cpu_cache_read_usage_perc": 0.375,
    "kv_offload_cpu_used_blocks": 7,
    "kv_offload_cpu_blocks": 8,
    "kv_offload_config_info,2,4096,128,4": 1,
    "simple_kv_offload_save_outcomes_total,stored": 52,
    "simple_kv_offload_save_outcomes_total,dropped_cpu_full": 0,
    "simple_kv_offload_save_outcomes_total,dropped_request_gone": 0,
    "simple_kv_offload_save_outcomes_total,dropped_null_block": 0,
    "simple_kv_offload_save_outcomes_total,dropped_not_hashed": 0,
    "simple_kv_offload_save_outcomes_total,skipped_already_cached": 0,
    "simple_kv_offload_save_outcomes_total,skipped_in_flight": 53,
    "simple_kv_offload_load_blocks_total,issued": 9,
    "simple_kv_offload_load_blocks_total,completed": 8,
    "simple_kv_offload_bytes_total,load": 300,
    "simple_kv_offload_bytes_total,store": 400,
    "simple_kv_offload_copy_failures_total,load": 1,
    "simple_kv_offload_copy_failures_total,store": 0,
    "simple_kv_offload_used_blocks": 14,
    "simple_kv_offload_pending_store_blocks": 11,
    "simple_kv_offload_cached_blocks": 17,
    "simple_kv_offload_info,cpu,32,true,false": 1,
}


def test_the_values_are_the_snapshot_s() -> None:
    found = scraped(busy())
    assert {name: found.get(name) for name in VALUES} == VALUES
    own = {family.name for family in move_families(busy())}
    seen = {
        name.split(",")[0].removesuffix("_total").removesuffix("_sum").removesuffix("_count")
        for name in VALUES
    }
    assert own == seen


def test_every_series_of_moves_is_there_at_zero_before_anything_happened() -> None:
    before = scraped(ALL)
    assert set(before) == set(scraped(busy()))
    constant = {name for name in VALUES if "_info," in name}
    assert {name for name in VALUES if before[name] != 0} == constant


@pytest.mark.parametrize("name", BUCKETS)
def test_buckets_are_vllms(name: str) -> None:
    samples = shown(ALL)[f"vllm:{name}"].samples
    bounds = dict.fromkeys(float(sample.labels["le"]) for sample in samples if "le" in sample.labels)
    assert list(bounds) == [*map(float, BUCKETS[name].split()), math.inf]


def test_only_histograms_have_buckets_and_all_are_checked() -> None:
    assert {each.name for each in move_families(ALL) if each.kind == "histogram"} == set(BUCKETS)


@pytest.mark.parametrize(
    ("kinds", "prefixes"),
    [
        ((), ()),
        ((NIXL,), ("nixl_", "kv_digest", "kv_stale", "kv_transfer", "kv_pages_quarantined", "kv_leases")),
        ((OFFLOADING,), ("kv_offload_",)),
        ((SIMPLE,), ("simple_kv_offload_",)),
    ],
)
def test_a_connector_s_series_are_there_where_it_is_configured(
    kinds: tuple[str, ...], prefixes: tuple[str, ...]
) -> None:
    names = [family.name for family in move_families(MoveSeries(stats=MoveStats.empty(kinds)))]
    assert names[:2] == ["kv_pages", "kv_pages_in_moves"]
    assert all(name.startswith(prefixes) for name in names[2:])
    everything = [family.name for family in move_families(ALL)]
    assert {name for name in everything if name.startswith(prefixes or ("none",))} == set(names[2:])


def test_a_producer_shows_no_fetches() -> None:
    assert "num_requests_kv_fetch_by_stage,in_progress" in scraped(ALL)
    producer = MoveSeries(stats=MoveStats.empty((NIXL,)))
    assert not [name for name in scraped(producer) if "kv_fetch" in name]


def test_tiers_that_are_alike_are_one_series() -> None:
    stats = MoveStats.empty((OFFLOADING, SIMPLE))
    twice = MoveSeries(stats=stats, offload_tiers=(OFFLOAD_TIER,) * 2, simple_tiers=(SIMPLE_TIER,) * 2)
    found = shown(twice)
    assert len(found["vllm:kv_offload_config_info"].samples) == 1
    assert len(found["vllm:simple_kv_offload_info"].samples) == 1
    other = SimpleTier(lazy_offload=False, slots=32)
    found = shown(MoveSeries(stats=stats, simple_tiers=(SIMPLE_TIER, other)))
    assert [sample.labels["lazy_offload"] for sample in found["vllm:simple_kv_offload_info"].samples] == [
        "true",
        "false",
    ]


def test_engines_with_other_connectors_are_shown_together() -> None:
    found = shown(busy(), MoveSeries(stats=MoveStats.empty((NIXL,))))
    assert [sample.labels["engine"] for sample in found["vllm:kv_leases"].samples] == ["0", "1"]
    assert [sample.labels["engine"] for sample in found["vllm:kv_offload_cpu_blocks"].samples] == ["0"]


def test_openmetrics_takes_every_name() -> None:
    body, _ = render(make_registry(lambda: exposition(busy())), "application/openmetrics-text")
    found = {family.name for family in openmetrics.text_string_to_metric_families(body.decode())}
    assert {f"vllm:{family.name}" for family in move_families(ALL)} <= found


def test_the_document_explains_every_series_and_no_other() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    section = text.partition("## Moves of pages")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    explained = {row[0].strip("`"): row[1] for row in rows}
    assert len(explained) == len(rows)
    assert explained == {family.name: family.kind for family in move_families(ALL)}
    meanings = {row[0].strip("`"): row[2] for row in rows}
    labels = {(family.name, label) for family in move_families(ALL) for label in family.label_names}
    silent = {name for name, label in labels if f"`{label}`" not in meanings[name]}
    assert all("likewise" in meanings[name] for name in silent)
