"""The table of series: what each is called and how it is read from EngineStats.

Names, label names and label values are vLLM's, so that its dashboards and gateways work on us. Ours are
`preempted_prefill_tokens` and those of compiled shapes. The series of moves are in `move_series.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from metrics.engine import EngineStats
from metrics.histogram import Histogram

Kind = Literal["counter", "gauge", "histogram"]
Value = int | float | Histogram
Read = Callable[[EngineStats], Value | tuple[tuple[str, Value], ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """How one family is read from EngineStats.

    Attributes:
        name: without prefix; a counter's without `_total`, which the exposition appends.
        kind: what its values mean.
        help: one sentence for people.
        read: its value, or with a label (label value, value) pairs.
        label: a label beside model_name and engine.
    """

    name: str
    kind: Kind
    help: str
    read: Read
    label: str | None = None


def _gauge(name: str, help_text: str, read: Read, label: str | None = None) -> Series:
    return Series(name=name, kind="gauge", help=help_text, read=read, label=label)


def _counter(name: str, help_text: str, read: Read, label: str | None = None) -> Series:
    return Series(name=name, kind="counter", help=help_text, read=read, label=label)


def _histogram(name: str, help_text: str, read: Callable[[EngineStats], Histogram]) -> Series:
    return Series(name=name, kind="histogram", help=help_text, read=read)


SERIES: tuple[Series, ...] = (
    _gauge("num_requests_running", "Sequences that hold a slot.", lambda s: s.gauges.running),
    _gauge("num_requests_waiting", "Sequences that wait, for any reason.", lambda s: s.gauges.waiting),
    _gauge(
        "num_requests_waiting_by_reason",
        "Waiting sequences: for pages, a slot or budget (capacity), or for something else (deferred).",
        lambda s: (("capacity", s.gauges.waiting_capacity), ("deferred", s.gauges.waiting_deferred)),
        label="reason",
    ),
    _gauge(
        "kv_cache_usage_perc",
        "Fraction of KV pages held by sequences, 0 to 1; pages that are only cached do not count.",
        lambda s: s.gauges.kv_cache_usage,
    ),
    _counter(
        "prefix_cache_queries",
        "Tokens looked up in the prefix cache at admission.",
        lambda s: s.steps.prefix_queries,
    ),
    _counter(
        "prefix_cache_hits", "Tokens found in the prefix cache at admission.", lambda s: s.steps.prefix_hits
    ),
    _counter(
        "external_prefix_cache_queries",
        "Tokens that a KV connector was asked for at admission.",
        lambda s: s.steps.external_queries,
    ),
    _counter(
        "external_prefix_cache_hits",
        "Tokens that a KV connector promised at admission.",
        lambda s: s.external_hits.total,
    ),
    _counter("num_preemptions", "Times that a sequence lost its pages.", lambda s: s.steps.num_preemptions),
    _counter(
        "preempted_prefill_tokens",
        "Tokens computed again because a preemption had dropped their KV.",
        lambda s: s.steps.preempted_prefill_tokens,
    ),
    _counter(
        "corrupted_requests",
        "Sequences whose logits held a NaN.",
        lambda s: s.steps.corrupted_requests,
    ),
    _counter(
        "compile_misses",
        "Device programs that were compiled while serving, since no shape compiled ahead would do.",
        lambda s: s.steps.compile_misses,
    ),
    _counter(
        "dispatched_tokens",
        "Tokens that the device was given to compute, padding to a compiled shape among them.",
        lambda s: s.steps.dispatched_tokens,
    ),
    _counter("padding_tokens", "Of the dispatched tokens, the padding.", lambda s: s.steps.padding_tokens),
    _gauge(
        "padding_waste_ratio",
        "Padding tokens over dispatched tokens since the start, 0 to 1.",
        lambda s: s.steps.padding_waste,
    ),
    _counter(
        "prompt_tokens",
        "Prompt tokens from all sources, counted with the request's first token.",
        lambda s: s.prompts.total,
    ),
    _counter(
        "prompt_tokens_by_source",
        "Prompt tokens by where their KV came from.",
        lambda s: tuple(s.prompts.by_source().items()),
        label="source",
    ),
    _counter(
        "prompt_tokens_cached",
        "Prompt tokens that were not computed here: found locally or brought by a connector.",
        lambda s: s.prompts.cached,
    ),
    _counter(
        "prompt_tokens_cached_by_source",
        "Prompt tokens that were not computed here, by where they lay.",
        lambda s: s.prompts.cached_by_source(),
        label="source",
    ),
    _counter("generation_tokens", "Tokens generated.", lambda s: s.steps.generation_tokens),
    _counter(
        "request_success", "Ended sequences by reason.", lambda s: s.finished.items(), label="finished_reason"
    ),
    _histogram("request_prompt_tokens", "Prompt tokens of a request.", lambda s: s.requests.prompt_tokens),
    _histogram(
        "request_prefill_kv_computed_tokens",
        "Prompt tokens of a request that were computed here.",
        lambda s: s.requests.prefill_computed_tokens,
    ),
    _histogram(
        "request_max_num_generation_tokens",
        "Tokens of a request's longest sequence.",
        lambda s: s.requests.max_generation_tokens,
    ),
    _histogram("request_params_n", "The parameter n of a request.", lambda s: s.requests.n),
    _histogram(
        "request_generation_tokens",
        "Tokens generated by a sequence.",
        lambda s: s.sequences.generation_tokens,
    ),
    _histogram(
        "request_params_max_tokens",
        "The parameter max_tokens of a sequence's request.",
        lambda s: s.sequences.max_tokens,
    ),
    _histogram(
        "request_num_preemptions",
        "Times that a sequence lost its pages.",
        lambda s: s.sequences.preemptions,
    ),
    _histogram(
        "iteration_tokens_total",
        "Tokens per step: prompt tokens computed and tokens generated.",
        lambda s: s.iteration_tokens,
    ),
    _histogram("time_to_first_token_seconds", "From arrival to the first token.", lambda s: s.first_token),
    _histogram(
        "inter_token_latency_seconds", "From one token of a sequence to the next.", lambda s: s.inter_token
    ),
    _histogram(
        "request_time_per_output_token_seconds",
        "A sequence's mean time per token after the first.",
        lambda s: s.sequences.time_per_output_token,
    ),
    _histogram("e2e_request_latency_seconds", "From arrival to the end.", lambda s: s.sequences.e2e),
    _histogram(
        "request_queue_time_seconds",
        "In the queue, up to the first scheduled step.",
        lambda s: s.sequences.queue,
    ),
    _histogram(
        "request_inference_time_seconds",
        "From the first scheduled step to the last token.",
        lambda s: s.sequences.inference,
    ),
    _histogram(
        "request_prefill_time_seconds",
        "From the first scheduled step to the first token.",
        lambda s: s.sequences.prefill,
    ),
    _histogram(
        "request_decode_time_seconds", "From the first token to the last.", lambda s: s.sequences.decode
    ),
)
