"""The line of statistics of a busy engine. Pure: two snapshots in, text out."""

from metrics.engine import EngineStats


def was_busy(before: EngineStats, after: EngineStats) -> bool:
    """Whether the interval between two snapshots is worth a line: tokens ran, or sequences run or wait."""
    return bool(
        after.steps.computed_prompt_tokens != before.steps.computed_prompt_tokens
        or after.steps.preempted_prefill_tokens != before.steps.preempted_prefill_tokens
        or after.steps.generation_tokens != before.steps.generation_tokens
        or after.gauges.running
        or after.gauges.waiting
    )


def format_log_line(before: EngineStats, after: EngineStats, elapsed_s: float, *, engine: int = 0) -> str:
    """The interval in vLLM's words, so that scripts which read its log read ours.

    Prompt throughput is of computed tokens only: cached and transferred ones cost nothing here. The hit rate
    is of this interval, 0 where nothing was looked up. Connector hits and preemptions appear
    when there are any.

    Args:
        before: the snapshot at the interval's start.
        after: the snapshot at its end, of the same engine.
        elapsed_s: seconds between them; not positive: throughputs show as 0.
        engine: the engine's number.
    """
    old, new = before.steps, after.steps
    parts = [
        f"Avg prompt throughput: "
        f"{_rate(new.computed_prompt_tokens - old.computed_prompt_tokens, elapsed_s):.1f} tokens/s",
        f"Avg generation throughput: "
        f"{_rate(new.generation_tokens - old.generation_tokens, elapsed_s):.1f} tokens/s",
        f"Running: {after.gauges.running} reqs",
        f"Waiting: {after.gauges.waiting} reqs",
    ]
    if new.num_preemptions != old.num_preemptions:
        parts.append(f"Preemptions: {new.num_preemptions - old.num_preemptions}")
    parts += [
        f"GPU KV cache usage: {after.gauges.kv_cache_usage:.1%}",
        f"Prefix cache hit rate: "
        f"{_rate(new.prefix_hits - old.prefix_hits, new.prefix_queries - old.prefix_queries):.1%}",
    ]
    external_queries = new.external_queries - old.external_queries
    if external_queries:
        external_hits = after.external_hits.total - before.external_hits.total
        parts.append(f"External prefix cache hit rate: {_rate(external_hits, external_queries):.1%}")
    return f"Engine {engine:03d}: " + ", ".join(parts)


def _rate(amount: float, per: float) -> float:
    return amount / per if per > 0 else 0.0
