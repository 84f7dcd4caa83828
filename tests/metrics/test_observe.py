import random
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics.engine import FINISH_REASONS, REJECTION_REASONS, EngineStats, merge_fields
from metrics.observe import (
    observe_finished,
    observe_first_token,
    observe_prefill,
    observe_rejection,
    observe_step,
)
from metrics.records import FinishedRecord, Gauges, RequestTotals, SequenceTimes, StepRecord
from metrics.stats import EXTERNAL_TIERS, PrefillStats, PromptTokenStats

SMALL = settings(deadline=None, max_examples=50)
MAX_MODEL_LEN = 2048
EMPTY = EngineStats.empty(MAX_MODEL_LEN)
seconds = st.floats(0, 30)
few = st.integers(0, 40)


@st.composite
def prefills(draw: st.DrawFn) -> PrefillStats:
    prompt = draw(st.integers(1, MAX_MODEL_LEN))
    hit = draw(st.integers(0, prompt))
    external = draw(st.integers(0, prompt - hit))
    tiers = draw(st.sampled_from([(), (("p2p", external),)]))
    return PrefillStats(
        num_prompt_tokens=prompt, local_cache_hit=hit, external_kv_transfer=external, external_by_tier=tiers
    )


@st.composite
def steps(draw: st.DrawFn) -> StepRecord:
    total, queries, dispatched = draw(few), draw(few), draw(few)
    hits = draw(st.lists(st.tuples(st.sampled_from(EXTERNAL_TIERS), few), max_size=3))
    return StepRecord(
        gauges=Gauges(
            running=draw(few),
            waiting_capacity=draw(few),
            waiting_deferred=draw(few),
            pages_used=draw(st.integers(0, total)),
            pages_total=total,
        ),
        prompt_tokens=draw(few),
        recomputed_tokens=draw(few),
        generation_tokens=draw(few),
        preemptions=draw(few),
        prefix_queries=queries,
        prefix_hits=draw(st.integers(0, queries)),
        external_queries=sum(tokens for _, tokens in hits) + draw(few),
        external_hits=tuple(hits),
        corrupted=draw(few),
        dispatched_tokens=dispatched,
        padding_tokens=draw(st.integers(0, dispatched)),
        compile_misses=draw(few),
        inter_token_s=np.array(draw(st.lists(seconds, max_size=6)), np.float64),
    )


@st.composite
def finished(draw: st.DrawFn) -> FinishedRecord:
    tokens = draw(st.integers(0, 5))
    at = np.cumsum(draw(st.lists(seconds, min_size=6, max_size=6))).tolist()
    names = [item.name for item in fields(SequenceTimes)]
    times = SequenceTimes(**dict(zip(names, at, strict=True)))
    totals = st.builds(
        RequestTotals, prefill=prefills(), n=st.integers(1, 9), max_num_generation_tokens=st.integers(1, 99)
    )
    return FinishedRecord(
        reason=draw(st.sampled_from(FINISH_REASONS)),
        num_generation_tokens=tokens,
        max_tokens=draw(st.none() | few),
        num_preemptions=draw(few),
        times=times if tokens else None,
        request=draw(st.none() | totals),
    )


@dataclass(frozen=True)
class Event:
    """One thing that happened and the reducer that takes it."""

    observe: Callable[[EngineStats, Any], EngineStats]
    what: Any


events = st.one_of(
    steps().map(lambda what: Event(observe_step, what)),
    prefills().map(lambda what: Event(observe_prefill, what)),
    seconds.map(lambda what: Event(observe_first_token, what)),
    finished().map(lambda what: Event(observe_finished, what)),
    st.sampled_from(REJECTION_REASONS).map(lambda what: Event(observe_rejection, what)),
)
histories = st.lists(events, max_size=12)


def fold(history: list[Event]) -> EngineStats:
    return reduce(lambda stats, event: event.observe(stats, event.what), history, EMPTY)


def without_gauges(stats: EngineStats) -> EngineStats:
    return replace(stats, gauges=Gauges())


def numbers(stats: object) -> list[int]:
    """Every number in a tree of frozen values."""
    if isinstance(stats, int):
        return [stats]
    if isinstance(stats, tuple):
        return [number for part in stats for number in numbers(part)]
    if is_dataclass(stats):
        names = [item.name for item in fields(stats) if item.name not in ("bounds", "labels")]
        return [number for name in names for number in numbers(getattr(stats, name))]
    raise TypeError(type(stats))


@SMALL
@given(a=histories, b=histories, c=histories)
def test_merge_is_associative_and_commutative_with_an_identity(
    a: list[Event], b: list[Event], c: list[Event]
) -> None:
    x, y, z = fold(a), fold(b), fold(c)
    assert x.merge(y).merge(z) == x.merge(y.merge(z))
    assert x.merge(y) == y.merge(x)
    assert x.merge(EMPTY) == x == EMPTY.merge(x)


@SMALL
@given(history=histories, seed=st.integers(0, 2**16))
def test_but_for_the_gauges_order_does_not_matter(history: list[Event], seed: int) -> None:
    shuffled = random.Random(seed).sample(history, len(history))
    assert without_gauges(fold(shuffled)) == without_gauges(fold(history))


@SMALL
@given(history=st.lists(st.tuples(st.booleans(), events), max_size=16))
def test_two_merged_engines_saw_what_one_would_have_seen(history: list[tuple[bool, Event]]) -> None:
    left = fold([event for on_left, event in history if on_left])
    right = fold([event for on_left, event in history if not on_left])
    together = fold([event for _, event in history])
    merged = left.merge(right)
    assert without_gauges(merged) == without_gauges(together)
    assert merged.gauges.waiting == left.gauges.waiting + right.gauges.waiting
    assert merged.gauges.pages_used == left.gauges.pages_used + right.gauges.pages_used
    assert merged.gauges.pages_total == left.gauges.pages_total + right.gauges.pages_total


@SMALL
@given(history=histories, event=events)
def test_no_observation_lowers_a_counter(history: list[Event], event: Event) -> None:
    before = fold(history)
    after = event.observe(before, event.what)
    old, new = numbers(without_gauges(before)), numbers(without_gauges(after))
    assert all(a <= b for a, b in zip(old, new, strict=True))


@SMALL
@given(history=histories)
def test_totals_agree_with_a_recount_of_the_history(history: list[Event]) -> None:
    stats = fold(history)
    ran = [event.what for event in history if isinstance(event.what, StepRecord)]
    prompts = [event.what for event in history if isinstance(event.what, PrefillStats)]
    ended = [event.what for event in history if isinstance(event.what, FinishedRecord)]
    assert stats.gauges == (ran[-1].gauges if ran else Gauges())
    assert stats.steps.generation_tokens == sum(step.generation_tokens for step in ran)
    assert stats.steps.preempted_prefill_tokens == sum(step.recomputed_tokens for step in ran)
    assert stats.inter_token.count == sum(len(step.inter_token_s) for step in ran)
    assert stats.iteration_tokens.count == sum(step.iteration_tokens > 0 for step in ran)
    assert stats.iteration_tokens.sum == sum(step.iteration_tokens for step in ran)
    assert stats.steps.corrupted_requests == sum(step.corrupted for step in ran)
    assert stats.steps.compile_misses == sum(step.compile_misses for step in ran)
    tokens, padding = stats.steps.dispatched_tokens, stats.steps.padding_tokens
    assert tokens == sum(step.dispatched_tokens for step in ran)
    assert stats.steps.padding_waste == (padding / tokens if tokens else 0.0)
    assert padding == sum(step.padding_tokens for step in ran)
    assert stats.first_token.count == sum(event.observe is observe_first_token for event in history)
    told = [record for record in ended if record.times and record.max_tokens is not None]
    assert stats.sequences.max_tokens.count == len(told)
    assert stats.prompts.total == sum(prefill.num_prompt_tokens for prefill in prompts)
    for reason in FINISH_REASONS:
        assert stats.finished.get(reason) == sum(record.reason == reason for record in ended)
    assert stats.sequences.e2e.count == sum(record.times is not None for record in ended)
    assert stats.requests.n.count == sum(record.request is not None for record in ended)
    with_gap = [record for record in ended if record.num_generation_tokens > 1]
    assert stats.sequences.time_per_output_token.count == len(with_gap)
    assert stats.external_hits.total == sum(tokens for step in ran for _, tokens in step.external_hits)


def times() -> SequenceTimes:
    return SequenceTimes(
        arrival_s=10.0,
        queued_s=10.5,
        scheduled_s=12.0,
        first_token_s=13.0,
        last_token_s=17.0,
        finished_s=17.5,
    )


def test_a_finished_sequence_is_seen_in_every_histogram_of_its_life() -> None:
    prefill = PrefillStats(num_prompt_tokens=100, local_cache_hit=32, external_kv_transfer=8)
    record = FinishedRecord(
        reason="length",
        num_generation_tokens=5,
        max_tokens=6,
        num_preemptions=2,
        times=times(),
        request=RequestTotals(prefill=prefill, n=3, max_num_generation_tokens=7),
    )
    stats = observe_finished(EMPTY, record)
    sizes, life = stats.requests, stats.sequences
    assert (sizes.prompt_tokens.sum, sizes.prefill_computed_tokens.sum) == (100, 60)
    assert (sizes.n.sum, sizes.max_generation_tokens.sum) == (3, 7)
    assert (life.generation_tokens.sum, life.max_tokens.sum, life.preemptions.sum) == (5, 6, 2)
    assert (life.e2e.sum, life.queue.sum, life.prefill.sum) == (7.5, 1.5, 1.0)
    assert (life.decode.sum, life.inference.sum, life.time_per_output_token.sum) == (4.0, 5.0, 1.0)
    assert stats.finished.get("length") == stats.finished.total == 1


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_sequence_that_never_got_a_token_only_leaves_its_reason(reason: str) -> None:
    stats = observe_finished(EMPTY, FinishedRecord(reason=reason, max_tokens=16))
    assert stats.finished.get(reason) == 1
    assert replace(stats, finished=EMPTY.finished) == EMPTY


def test_a_last_sequence_without_token_still_reports_its_request() -> None:
    prefill = PrefillStats(num_prompt_tokens=4, local_cache_hit=0, external_kv_transfer=0)
    totals = RequestTotals(prefill=prefill, n=2, max_num_generation_tokens=9)
    stats = observe_finished(EMPTY, FinishedRecord(reason="abort", request=totals))
    assert stats.requests.prompt_tokens.sum == 4
    assert stats.sequences == EMPTY.sequences


def test_a_single_token_has_no_time_per_output_token() -> None:
    stats = observe_finished(EMPTY, FinishedRecord(reason="stop", num_generation_tokens=1, times=times()))
    assert stats.sequences.time_per_output_token.count == 0
    assert stats.sequences.decode.count == 1


def test_a_step_without_tokens_moves_the_gauges_only() -> None:
    busy = observe_step(EMPTY, StepRecord(gauges=Gauges(running=3, pages_used=5, pages_total=8)))
    assert busy.gauges.kv_cache_usage == 5 / 8
    idle = observe_step(busy, StepRecord(gauges=Gauges(pages_total=8)))
    assert without_gauges(idle) == EMPTY
    assert idle.gauges.kv_cache_usage == 0.0


def test_prompts_are_not_counted_by_steps_nor_steps_by_prompts() -> None:
    step = StepRecord(gauges=Gauges(), prompt_tokens=50, generation_tokens=1)
    after_step = observe_step(EMPTY, step)
    assert after_step.prompts == PromptTokenStats.empty()
    assert after_step.iteration_tokens.sum == 51
    prefill = PrefillStats(num_prompt_tokens=50, local_cache_hit=0, external_kv_transfer=0)
    assert observe_prefill(after_step, prefill).steps == after_step.steps


def test_what_was_promised_and_did_not_come_is_no_cached_token() -> None:
    """vLLM counts the promise: after a refused handshake it shows the same tokens as computed and as p2p."""
    step = StepRecord(gauges=Gauges(), external_queries=50, external_hits=(("p2p", 50),))
    prefill = PrefillStats(num_prompt_tokens=50, local_cache_hit=0, external_kv_transfer=0)
    stats = observe_prefill(observe_step(EMPTY, step), prefill)
    assert stats.external_hits.total == 50
    assert sum(tokens for _, tokens in stats.prompts.cached_by_source()) == 0
    assert stats.prompts.get("local_compute") == 50


def test_unknown_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown label"):
        observe_finished(EMPTY, FinishedRecord(reason="bored"))
    with pytest.raises(ValueError, match="unknown label"):
        observe_rejection(EMPTY, "bored")
    step = StepRecord(gauges=Gauges(), external_queries=1, external_hits=(("tape", 1),))
    with pytest.raises(ValueError, match="unknown label"):
        observe_step(EMPTY, step)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt_tokens": -1},
        {"recomputed_tokens": -1},
        {"generation_tokens": -1},
        {"preemptions": -1},
        {"corrupted": -1},
        {"compile_misses": -1},
        {"dispatched_tokens": 4, "padding_tokens": 5},
        {"dispatched_tokens": 4, "padding_tokens": -1},
        {"prefix_queries": -1},
        {"prefix_queries": 1, "prefix_hits": 2},
        {"prefix_hits": -1},
        {"external_queries": 1, "external_hits": (("host", 2),)},
        {"external_queries": 5, "external_hits": (("host", 2), ("p2p", -1))},
    ],
)
def test_a_step_that_cannot_have_been_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        StepRecord(gauges=Gauges(), **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"running": -1},
        {"waiting_capacity": -1},
        {"waiting_deferred": -1},
        {"pages_used": -1},
        {"pages_used": 2, "pages_total": 1},
    ],
)
def test_gauges_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        Gauges(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_generation_tokens": 1},
        {"times": times()},
        {"num_generation_tokens": -1},
        {"num_preemptions": -1},
        {"max_tokens": -1},
    ],
)
def test_an_end_that_cannot_have_been_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        FinishedRecord(reason="stop", **wrong)


@pytest.mark.parametrize("name", [item.name for item in fields(SequenceTimes)][1:])
def test_a_clock_that_runs_backwards_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="out of order"):
        replace(times(), **{name: 9.0})


def test_engines_of_different_lengths_do_not_merge() -> None:
    with pytest.raises(ValueError, match="bounds differ"):
        EMPTY.merge(EngineStats.empty(MAX_MODEL_LEN * 8))
    with pytest.raises(TypeError, match="cannot merge"):
        merge_fields(EMPTY, EMPTY.gauges)


def test_a_step_of_256_rows_costs_little() -> None:
    """It runs on the engine's thread between steps. Measured 0.1 ms; the bound allows slow machines."""
    record = StepRecord(
        gauges=Gauges(running=256, pages_used=10, pages_total=20),
        generation_tokens=256,
        inter_token_s=np.linspace(0.001, 0.2, 256),
    )
    ended = FinishedRecord(reason="stop", num_generation_tokens=9, max_tokens=16, times=times())
    best = float("inf")
    for _ in range(50):
        start = time.perf_counter()
        observe_finished(observe_finished(observe_step(EMPTY, record), ended), ended)
        best = min(best, time.perf_counter() - start)
    assert best < 0.002
