"""The reducers: `observe_*(stats, what happened) -> stats`. Pure; each raises before it changes anything."""

from dataclasses import replace

from metrics.engine import EngineStats, RequestHistograms, SequenceHistograms, StepTotals
from metrics.records import FinishedRecord, RequestTotals, SequenceTimes, StepRecord
from metrics.stats import PrefillStats


def observe_step(stats: EngineStats, step: StepRecord) -> EngineStats:
    """One step; see `StepRecord` for what belongs to it.

    Raises:
        ValueError: an inter-token time is negative or not finite, or a tier is unknown.
    """
    totals = stats.steps
    external_hits = stats.external_hits
    for tier, tokens in step.external_hits:
        external_hits = external_hits.add(tier, tokens)
    iteration_tokens = stats.iteration_tokens
    if step.iteration_tokens:
        iteration_tokens = iteration_tokens.observe(step.iteration_tokens)
    return replace(
        stats,
        gauges=step.gauges,
        steps=StepTotals(
            computed_prompt_tokens=totals.computed_prompt_tokens + step.prompt_tokens,
            preempted_prefill_tokens=totals.preempted_prefill_tokens + step.recomputed_tokens,
            generation_tokens=totals.generation_tokens + step.generation_tokens,
            num_preemptions=totals.num_preemptions + step.preemptions,
            prefix_queries=totals.prefix_queries + step.prefix_queries,
            prefix_hits=totals.prefix_hits + step.prefix_hits,
            external_queries=totals.external_queries + step.external_queries,
            corrupted_requests=totals.corrupted_requests + step.corrupted,
            dispatched_tokens=totals.dispatched_tokens + step.dispatched_tokens,
            padding_tokens=totals.padding_tokens + step.padding_tokens,
            compile_misses=totals.compile_misses + step.compile_misses,
        ),
        external_hits=external_hits,
        iteration_tokens=iteration_tokens,
        inter_token=stats.inter_token.observe_many(step.inter_token_s),
    )


def observe_prefill(stats: EngineStats, prefill: PrefillStats) -> EngineStats:
    """A request got its first token: its prompt's sources. Once per request, also when n > 1."""
    return replace(stats, prompts=stats.prompts.add(prefill))


def observe_first_token(stats: EngineStats, seconds: float) -> EngineStats:
    """A request got its first token this long after its arrival. Once per request.

    Raises:
        ValueError: the time is negative or not finite.
    """
    return replace(stats, first_token=stats.first_token.observe(seconds))


def observe_finished(stats: EngineStats, record: FinishedRecord) -> EngineStats:
    """A sequence ended.

    Raises:
        ValueError: the reason is unknown.
    """
    finished = stats.finished.add(record.reason)
    sequences, requests = stats.sequences, stats.requests
    if record.times is not None:
        sequences = _observe_sequence(sequences, record, record.times)
    if record.request is not None:
        requests = _observe_request(requests, record.request)
    return replace(stats, finished=finished, sequences=sequences, requests=requests)


def observe_rejection(stats: EngineStats, reason: str) -> EngineStats:
    """A request was refused because the queue was full.

    Raises:
        ValueError: the reason is unknown.
    """
    return replace(stats, rejections=stats.rejections.add(reason))


def _observe_sequence(
    old: SequenceHistograms, record: FinishedRecord, times: SequenceTimes
) -> SequenceHistograms:
    tokens = record.num_generation_tokens
    max_tokens, per_token = old.max_tokens, old.time_per_output_token
    if record.max_tokens is not None:
        max_tokens = max_tokens.observe(record.max_tokens)
    # The first token belongs to the prefill; a single token has no time between tokens.
    if tokens > 1:
        per_token = per_token.observe(times.decode_s / (tokens - 1))
    return SequenceHistograms(
        generation_tokens=old.generation_tokens.observe(tokens),
        max_tokens=max_tokens,
        preemptions=old.preemptions.observe(record.num_preemptions),
        e2e=old.e2e.observe(times.e2e_s),
        queue=old.queue.observe(times.queue_s),
        inference=old.inference.observe(times.inference_s),
        prefill=old.prefill.observe(times.prefill_s),
        decode=old.decode.observe(times.decode_s),
        time_per_output_token=per_token,
    )


def _observe_request(old: RequestHistograms, totals: RequestTotals) -> RequestHistograms:
    return RequestHistograms(
        prompt_tokens=old.prompt_tokens.observe(totals.prefill.num_prompt_tokens),
        prefill_computed_tokens=old.prefill_computed_tokens.observe(totals.prefill.local_compute),
        max_generation_tokens=old.max_generation_tokens.observe(totals.max_num_generation_tokens),
        n=old.n.observe(totals.n),
    )
