"""What happened, as the reducers take it: plain numbers, complete when born; the clock is the caller's."""

from dataclasses import dataclass, field

import numpy as np

from metrics.stats import PrefillStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """The state after a step. Values of several engines add.

    Attributes:
        running: sequences that hold a slot.
        waiting_capacity: sequences that wait for pages, a slot or budget.
        waiting_deferred: sequences that wait for something else: a load, a grammar.
        pages_used: pages that some sequence holds; a page that is only cached can be had and is not used.
        pages_total: pages that a sequence could hold (the dummy page is not among them).

    Raises:
        ValueError: a number is negative, or more pages are used than there are.
    """

    running: int = 0
    waiting_capacity: int = 0
    waiting_deferred: int = 0
    pages_used: int = 0
    pages_total: int = 0

    def __post_init__(self) -> None:
        if self.running < 0 or self.waiting_capacity < 0 or self.waiting_deferred < 0:
            raise ValueError(f"negative gauge in {self}")
        if not 0 <= self.pages_used <= self.pages_total:
            raise ValueError(f"{self.pages_used} of {self.pages_total} pages used")

    @property
    def waiting(self) -> int:
        """All sequences that wait."""
        return self.waiting_capacity + self.waiting_deferred

    @property
    def kv_cache_usage(self) -> float:
        """Used fraction of the pages, 0 to 1."""
        return self.pages_used / self.pages_total if self.pages_total else 0.0


def _no_seconds() -> np.ndarray:
    return np.empty(0, np.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepRecord:
    """One step: what its plan decided, what its execution gave, and the state after it.

    The tokens computed and the tokens accepted must be those of the same executed step (with an overlapped
    loop: the plan of step N with the outcome of step N), else `iteration_tokens_total` counts a step twice.
    A step that ran nothing (an abort while idle) is recorded too, so that the gauges fall back to zero.

    Attributes:
        gauges: the state after it.
        prompt_tokens: prompt tokens whose KV it computed for the first time.
        recomputed_tokens: tokens whose KV it computed again because a preemption had dropped it.
        generation_tokens: sampled tokens that were accepted.
        preemptions: sequences that lost their pages.
        prefix_queries: tokens looked up in the prefix cache at admission, resumed sequences left out.
        prefix_hits: of these, found.
        external_queries: tokens that a connector was asked for at admission.
        external_hits: of these, promised, by tier: (label of `EXTERNAL_TIERS`, tokens).
        corrupted: sequences whose logits held a NaN.
        dispatched_tokens: tokens that the device was given to compute, padding among them.
        padding_tokens: of these, the padding.
        compile_misses: programs that had to be compiled for the step.
        inter_token_s: float `[N]`, for each accepted token but a sequence's first, the seconds since the one
            before it.

    Raises:
        ValueError: a number is negative, or there are more hits than queries or more padding than tokens.
    """

    gauges: Gauges
    prompt_tokens: int = 0
    recomputed_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    external_queries: int = 0
    external_hits: tuple[tuple[str, int], ...] = ()
    corrupted: int = 0
    dispatched_tokens: int = 0
    padding_tokens: int = 0
    compile_misses: int = 0
    inter_token_s: np.ndarray = field(default_factory=_no_seconds)

    def __post_init__(self) -> None:
        tokens = (self.prompt_tokens, self.recomputed_tokens, self.generation_tokens)
        if min(*tokens, self.preemptions, self.corrupted, self.prefix_hits) < 0:
            raise ValueError(f"negative number in {self}")
        if self.compile_misses < 0 or not 0 <= self.padding_tokens <= self.dispatched_tokens:
            raise ValueError(f"negative number, or more padding than tokens, in {self}")
        if any(hits < 0 for _, hits in self.external_hits):
            raise ValueError(f"negative number in {self}")
        if self.prefix_hits > self.prefix_queries:
            raise ValueError(f"{self.prefix_hits} hits of {self.prefix_queries} queried tokens")
        if sum(hits for _, hits in self.external_hits) > self.external_queries:
            raise ValueError(f"{self.external_hits} hits of {self.external_queries} queried tokens")

    @property
    def iteration_tokens(self) -> int:
        """Prompt tokens computed, first or again, and tokens generated."""
        return self.prompt_tokens + self.recomputed_tokens + self.generation_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTimes:
    """When things happened to one sequence that got its first token: seconds of one monotonic clock.

    The intervals are defined here and nowhere else.

    Attributes:
        arrival_s: the request was received.
        queued_s: the engine took it into its queue.
        scheduled_s: a step first ran tokens of it; a resume after preemption does not change it.
        first_token_s: its first token was accepted.
        last_token_s: its last token was accepted.
        finished_s: it ended.

    Raises:
        ValueError: the times are not in this order.
    """

    arrival_s: float
    queued_s: float
    scheduled_s: float
    first_token_s: float
    last_token_s: float
    finished_s: float

    def __post_init__(self) -> None:
        if not (
            self.arrival_s
            <= self.queued_s
            <= self.scheduled_s
            <= self.first_token_s
            <= self.last_token_s
            <= self.finished_s
        ):
            raise ValueError(f"times out of order: {self}")

    @property
    def e2e_s(self) -> float:
        """From arrival to the end."""
        return self.finished_s - self.arrival_s

    @property
    def queue_s(self) -> float:
        """In the queue, up to the first scheduled step."""
        return self.scheduled_s - self.queued_s

    @property
    def prefill_s(self) -> float:
        """From the first scheduled step to the first token."""
        return self.first_token_s - self.scheduled_s

    @property
    def decode_s(self) -> float:
        """From the first token to the last."""
        return self.last_token_s - self.first_token_s

    @property
    def inference_s(self) -> float:
        """Prefill and decode."""
        return self.last_token_s - self.scheduled_s


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTotals:
    """What is said once per client request, however many sequences serve it.

    Attributes:
        prefill: where its prompt came from, the value that `observe_prefill` took.
        n: sequences that it asked for.
        max_num_generation_tokens: tokens of its longest sequence.
    """

    prefill: PrefillStats
    n: int
    max_num_generation_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRecord:
    """One sequence ended.

    A sequence that ended before its first token has no times: its reason is counted and nothing else.

    Attributes:
        reason: a label of `FINISH_REASONS`.
        num_generation_tokens: tokens that it generated.
        max_tokens: its request's bound on them; None: not given.
        num_preemptions: how often it lost its pages.
        times: when things happened to it; None: it never got a token.
        request: given with the last sequence of a client request to end; None: siblings still run, or no
            sequence of the request ever got a token.

    Raises:
        ValueError: a number is negative, or tokens and times contradict each other.
    """

    reason: str
    num_generation_tokens: int = 0
    max_tokens: int | None = None
    num_preemptions: int = 0
    times: SequenceTimes | None = None
    request: RequestTotals | None = None

    def __post_init__(self) -> None:
        if self.num_generation_tokens < 0 or self.num_preemptions < 0 or (self.max_tokens or 0) < 0:
            raise ValueError(f"negative number in {self}")
        if (self.times is None) != (self.num_generation_tokens == 0):
            raise ValueError(f"a sequence has times just if it got a token: {self}")
