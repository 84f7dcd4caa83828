"""Everything one engine counts, as one frozen value. Fields are grouped by what happens together.

Grouping keeps an observation cheap: it replaces the groups it touches and shares the others.
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, TypeVar

from metrics import buckets
from metrics.counts import LabelledCounts
from metrics.histogram import Histogram
from metrics.records import Gauges
from metrics.stats import EXTERNAL_TIERS, PromptTokenStats

FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")
REJECTION_REASONS = ("max_num_queued_reqs", "max_num_queued_tokens")


class _Fields(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


Group = TypeVar("Group", bound=_Fields)


def merge_fields(left: Group, right: Group) -> Group:
    """Merge two values of one dataclass field by field: numbers add, values merge.

    Raises:
        ValueError: two histograms or counts have different shapes.
        TypeError: the values are not of the same dataclass.
    """
    if type(left) is not type(right):
        raise TypeError(f"cannot merge {type(left).__name__} with {type(right).__name__}")
    merged: dict[str, Any] = {}
    for item in fields(left):
        a, b = getattr(left, item.name), getattr(right, item.name)
        if isinstance(a, int):
            merged[item.name] = a + b
        elif isinstance(a, Histogram | LabelledCounts | PromptTokenStats):
            merged[item.name] = a.merge(b)
        else:
            merged[item.name] = merge_fields(a, b)
    return type(left)(**merged)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTotals:
    """Sums over steps, in tokens unless the name says otherwise. For meanings see `StepRecord`."""

    computed_prompt_tokens: int = 0
    preempted_prefill_tokens: int = 0
    generation_tokens: int = 0
    num_preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    external_queries: int = 0
    corrupted_requests: int = 0
    dispatched_tokens: int = 0
    padding_tokens: int = 0
    compile_misses: int = 0

    @property
    def padding_waste(self) -> float:
        """Fraction of the dispatched tokens that were padding, 0 to 1."""
        return self.padding_tokens / self.dispatched_tokens if self.dispatched_tokens else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestHistograms:
    """Sizes of client requests, one observation each with the last sequence to end."""

    prompt_tokens: Histogram
    prefill_computed_tokens: Histogram
    max_generation_tokens: Histogram
    n: Histogram

    @classmethod
    def empty(cls, max_model_len: int) -> "RequestHistograms":
        """No request."""
        tokens = Histogram.empty(buckets.request_tokens(max_model_len))
        return cls(
            prompt_tokens=tokens,
            prefill_computed_tokens=tokens,
            max_generation_tokens=tokens,
            n=Histogram.empty(buckets.REQUEST_N),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceHistograms:
    """Sizes and intervals (seconds) of sequences that got a token, one observation each when they end."""

    generation_tokens: Histogram
    max_tokens: Histogram
    preemptions: Histogram
    e2e: Histogram
    queue: Histogram
    inference: Histogram
    prefill: Histogram
    decode: Histogram
    time_per_output_token: Histogram

    @classmethod
    def empty(cls, max_model_len: int) -> "SequenceHistograms":
        """No sequence."""
        tokens = Histogram.empty(buckets.request_tokens(max_model_len))
        latency = Histogram.empty(buckets.REQUEST_LATENCY_S)
        return cls(
            generation_tokens=tokens,
            max_tokens=tokens,
            preemptions=Histogram.empty(buckets.PREEMPTIONS),
            e2e=latency,
            queue=latency,
            inference=latency,
            prefill=latency,
            decode=latency,
            time_per_output_token=Histogram.empty(buckets.INTER_TOKEN_S),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What one engine (or, merged, several) has seen since it started.

    Attributes:
        gauges: the state after the last step.
        steps: sums over steps.
        prompts: prompt tokens by source, once per request at its first token.
        external_hits: tokens that connectors promised at admission, by tier.
        finished: ended sequences by reason.
        rejections: refused requests by reason.
        iteration_tokens: tokens per step that had any.
        inter_token: seconds between tokens of a sequence.
        first_token: seconds from arrival to first token, once per request.
        requests: sizes of client requests.
        sequences: sizes and intervals of sequences.
    """

    gauges: Gauges
    steps: StepTotals
    prompts: PromptTokenStats
    external_hits: LabelledCounts
    finished: LabelledCounts
    rejections: LabelledCounts
    iteration_tokens: Histogram
    inter_token: Histogram
    first_token: Histogram
    requests: RequestHistograms
    sequences: SequenceHistograms

    @classmethod
    def empty(cls, max_model_len: int) -> "EngineStats":
        """Nothing seen: the identity of `merge` among engines with this bound on a sequence's tokens.

        Raises:
            ValueError: the bound is below 1.
        """
        return cls(
            gauges=Gauges(),
            steps=StepTotals(),
            prompts=PromptTokenStats.empty(),
            external_hits=LabelledCounts.empty(EXTERNAL_TIERS),
            finished=LabelledCounts.empty(FINISH_REASONS),
            rejections=LabelledCounts.empty(REJECTION_REASONS),
            iteration_tokens=Histogram.empty(buckets.ITERATION_TOKENS),
            inter_token=Histogram.empty(buckets.INTER_TOKEN_S),
            first_token=Histogram.empty(buckets.FIRST_TOKEN_S),
            requests=RequestHistograms.empty(max_model_len),
            sequences=SequenceHistograms.empty(max_model_len),
        )

    def merge(self, other: "EngineStats") -> "EngineStats":
        """What both engines saw; gauges add. Associative and commutative.

        Raises:
            ValueError: the engines differ in the bound on a sequence's tokens.
        """
        return merge_fields(self, other)
