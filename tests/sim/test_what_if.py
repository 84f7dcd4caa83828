"""Simulated traffic takes what the table says, no more and no less, and nothing of it is lost."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.bench.stats import Slo
from jaxserve.sim.costs import LATENESS_S, CostError, CostTable
from jaxserve.sim.report import report_json
from jaxserve.sim.traffic import Arrival, GivenPrompt, HashedPrompt, Trace
from jaxserve.sim.what_if import simulate
from tests.sim.tables import PAGE_BYTES, PAGE_SIZE, table


def arrival(at_s: float, tokens: int, output: int, *, first: int = 0, common: int = 0) -> Arrival:
    """A prompt whose first `common` tokens are those of every other."""
    ids = (*range(common), *range(10_000 + first, 10_000 + first + tokens - common))
    return Arrival(at_s=at_s, prompt=GivenPrompt(ids=ids), output_tokens=output)


def trace(*arrivals: Arrival) -> Trace:
    return Trace(source="made up", arrivals=arrivals)


def quiet(**engine: int) -> CostTable:
    """The table with nothing but its buckets: no attention, no host."""
    made = table(**engine)
    buckets = tuple(replace(bucket, by_context_s=0.0, by_pair_s=0.0) for bucket in made.buckets)
    return replace(made, buckets=buckets, host_s=0.0, host_row_s=0.0)


def test_one_request_alone_takes_its_steps():
    """100 tokens are a step of 64 and one of 36, both in buckets of 64; then decodes in buckets of 2."""
    report = simulate(trace(arrival(0, 100, 5)), quiet(), prefill=0, decode=1)
    (record,) = report.records
    assert record.ttft == pytest.approx(0.003 + LATENESS_S + 2 * 0.064)
    assert record.itl == pytest.approx((0.002,) * 4)
    (engine,) = report.engines
    assert engine.steps == 6 and engine.busy_s == pytest.approx(2 * 0.064 + 4 * 0.002)
    assert report.duration_s == pytest.approx(record.e2el)
    assert engine.sources.by_source()["local_compute"] == 100


def test_a_request_through_two_engines_takes_steps_messages_and_its_transfer():
    """112 tokens are 7 pages; the decode engine computes the last token again."""
    costs = quiet()
    report = simulate(trace(arrival(0, 112, 3)), costs, prefill=1, decode=1)
    (record,) = report.records
    known = 0.004 + 2 * 0.003 + 2 * 0.064 + 4 * 0.002 + 0.001 + 7 * PAGE_BYTES / 1e6 + 0.002
    hello = 2 * 0.002  # the first transfer between two engines is also their handshake
    assert known <= record.ttft <= known + hello + 20 * LATENESS_S
    assert record.itl == pytest.approx((0.002,) * 2)
    prefill, decode = report.engines
    assert prefill.sources.by_source() == {
        "local_compute": 112, "local_cache_hit": 0, "external_kv_transfer": 0
    }  # fmt: skip
    assert decode.sources.by_source() == {
        "local_compute": 0, "local_cache_hit": 0, "external_kv_transfer": 112
    }  # fmt: skip
    assert (prefill.steps, decode.steps) == (2, 3)


def test_a_slower_network_costs_its_seconds():
    one = trace(arrival(0, 112, 3))
    slow = quiet()
    assert slow.transfer is not None
    slow = replace(slow, transfer=replace(slow.transfer, fixed_s=1.001))
    fast, late = (simulate(one, costs, prefill=1, decode=1).records[0] for costs in (quiet(), slow))
    assert fast.ttft is not None and late.ttft is not None
    assert late.ttft - fast.ttft == pytest.approx(1.0, abs=0.05)


def test_an_engine_that_lends_is_slower_by_its_factor():
    costs = quiet()
    assert costs.transfer is not None
    lending = replace(costs, transfer=replace(costs.transfer, lending=1.5))
    one = trace(arrival(0, 100, 3))
    before, after = (simulate(one, table, prefill=1, decode=1).engines for table in (costs, lending))
    assert after[0].busy_s == pytest.approx(1.5 * before[0].busy_s)
    assert after[1].busy_s == pytest.approx(before[1].busy_s)
    assert simulate(one, lending, prefill=0, decode=1).engines[0].busy_s == pytest.approx(
        simulate(one, costs, prefill=0, decode=1).engines[0].busy_s
    )


def test_common_prefixes_are_computed_once():
    """Whole pages of the common part are found by the requests behind the first."""
    common, pages = 50, 50 // PAGE_SIZE * PAGE_SIZE
    made = trace(*(arrival(i * 5.0, 80, 2, first=100 * i, common=common) for i in range(4)))
    alone = simulate(made, table(), prefill=0, decode=1).sources("engine")
    assert alone.by_source() == {
        "local_compute": 80 + 3 * (80 - pages), "local_cache_hit": 3 * pages, "external_kv_transfer": 0
    }  # fmt: skip
    pair = simulate(made, table(), prefill=1, decode=1)
    assert pair.sources("prefill") == alone
    assert pair.sources("decode").by_source() == {
        "local_compute": 0, "local_cache_hit": 3 * pages, "external_kv_transfer": 80 + 3 * (80 - pages)
    }  # fmt: skip


def test_what_never_fits_is_refused_and_the_rest_is_served():
    made = trace(arrival(0, 512, 3), arrival(0, 20, 3))
    for prefill in (0, 1):
        refused, served = simulate(made, table(), prefill=prefill, decode=1).records
        assert refused.error == "too long for engines of 512 tokens a sequence and 129 pages"
        assert served.error is None and served.output_tokens == 3


def test_a_table_without_transfers_serves_engines_alone():
    costs = replace(table(), transfer=None, http=None)
    made = trace(arrival(0, 20, 3))
    assert simulate(made, costs, prefill=0, decode=1).records[0].error is None
    with pytest.raises(CostError, match="--prefill 0"):
        simulate(made, costs, prefill=1, decode=1)
    with pytest.raises(ValueError, match="must generate"):
        simulate(made, table(), prefill=1, decode=0)


def test_an_overloaded_engine_is_relieved_by_more():
    """Ten times what one can do: two do better, and four better still."""
    made = trace(*(arrival(i * 0.01, 60, 10, first=100 * i) for i in range(40)))
    slo = Slo(ttft=30.0)
    runs = [simulate(made, table(), prefill=0, decode=count, slo=slo) for count in (1, 2, 4)]
    medians = [run.summary.ttft.at(50) for run in runs]
    assert medians[0] > 1.5 * medians[1] > 2 * medians[2]
    goodput = [run.summary.goodput or 0.0 for run in runs]
    assert goodput[0] < goodput[1] < goodput[2]


def test_too_few_pages_preempt_and_all_is_served():
    made = trace(*(arrival(0, 30, 100, first=100 * i) for i in range(4)))
    report = simulate(made, quiet(num_pages=26, max_model_len=200), prefill=0, decode=1)
    assert report.engines[0].preempted > 0
    assert [record.output_tokens for record in report.records] == [100] * 4


@st.composite
def traces(draw) -> Trace:
    count = draw(st.integers(1, 6))
    arrivals = []
    for at_s in sorted(draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))):
        tokens = draw(st.integers(1, 200))
        blocks = -(-tokens // 64)
        ids = draw(st.lists(st.integers(0, 2), min_size=blocks, max_size=blocks))
        prompt = HashedPrompt(num_tokens=tokens, hash_ids=tuple(ids), block_tokens=64)
        arrivals.append(Arrival(at_s=at_s, prompt=prompt, output_tokens=draw(st.integers(1, 30))))
    return Trace(source="made up", arrivals=tuple(arrivals))


@settings(max_examples=20, deadline=None)
@given(traces(), st.integers(0, 2), st.integers(1, 2))
def test_nothing_is_lost_and_the_same_trace_gives_the_same_report(made, prefill, decode):
    report = simulate(made, quiet(), prefill=prefill, decode=decode)
    assert [record.output_tokens for record in report.records] == [a.output_tokens for a in made.arrivals]
    assert all(record.error is None for record in report.records)
    for role in report.roles:
        assert report.sources(role).total == made.prompt_tokens
        assert 0 < report.busy(role) <= 1
    for record, sent in zip(report.records, made.arrivals, strict=True):
        assert record.start == sent.at_s and (np.diff(record.arrivals) > 0).all()
        assert record.ttft is not None and record.ttft >= 0.003 + 0.002
    assert report_json(simulate(made, quiet(), prefill=prefill, decode=decode)) == report_json(report)
