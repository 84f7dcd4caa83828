"""What enters and leaves the step. Every value is complete when born and never changes.

Words: a request is what a client asked; a sequence is one growing token list that serves it (n > 1 gives
several); a row is a sequence's place in one step's batch; a slot is its place in the per-sequence state,
held from admission to finish or preemption.
"""

import enum
import math
from dataclasses import dataclass, field

import numpy as np

from kv.config import ConnectorConfig
from kv.moves import Event, LeaseTerms, MoveNews, RemoteSource
from metrics.stats import PrefillStats


class FinishReason(enum.StrEnum):
    """Why a sequence ended; the values are OpenAI's `finish_reason` and vLLM's metric label."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt. Names, meanings and defaults are vLLM's.

    Attributes:
        n: sequences per prompt; they share the prompt's pages.
        max_tokens: bound on generated tokens; None: up to the model's length.
        min_tokens: stop tokens cannot be sampled before this many tokens.
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0: all.
        top_p: keep the smallest set of tokens with at least this probability.
        min_p: keep tokens with at least this fraction of the most likely one's probability.
        seed: same seed, same output, whatever else is in the batch; None: drawn by the engine.
        repetition_penalty: divides (multiplies negative) logits of tokens in prompt or output.
        presence_penalty: subtracted once for tokens in the output.
        frequency_penalty: subtracted per occurrence in the output.
        logit_bias: (token id, added value) pairs.
        stop: strings that end the text, also across token boundaries; not part of it unless
            include_stop_str_in_output.
        stop_token_ids: token ids that end the sequence, beside the model's own end tokens.
        ignore_eos: the model's own end tokens do not end the sequence.
        logprobs: None: none; N: the chosen token's log-probability and the N most likely.
        prompt_logprobs: None: none; N: the same for each prompt token but the first.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop string at the end of the text.

    Raises:
        ValueError: a value out of its range; the message names it.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        for name, holds, rule in (
            ("n", self.n >= 1, "at least 1"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1, or None"),
            (
                "min_tokens",
                0 <= self.min_tokens <= (self.max_tokens or self.min_tokens),
                "from 0 to max_tokens",
            ),
            ("temperature", 0 <= self.temperature < math.inf, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 1, or 0 for all"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a number"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "of 64 bits"),
            ("stop", "" not in self.stop, "without empty strings"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "at least 0, or None"),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or self.prompt_logprobs >= 0,
                "at least 0, or None",
            ),
        ):
            if not holds:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a client asked, in tokens.

    Attributes:
        request_id: ours, unique for ever; a client's id is only a label.
        prompt_token_ids: at least one.
        sampling: how to continue.
        eos_token_ids: the model's own end tokens.
        cache_salt: requests share cached pages only with those of the same salt.
        priority: lower runs first, where the policy is priority.
        lease: keep the pages for a peer after the end (vLLM's do_remote_decode).
        remote: a peer holds the prompt's pages (vLLM's do_remote_prefill).
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    cache_salt: str = ""
    priority: int = 0
    lease: bool = False
    remote: RemoteSource | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """The host ends a sequence: a stop string was found, or something of this sequence failed.

    Attributes:
        message: for people, where the reason is an error.
    """

    request_id: str
    index: int
    reason: FinishReason
    stop_reason: str | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What one executed step gave.

    Attributes:
        step_id: of the plan that was executed.
        tokens: int32 `[rows]`, the sampled token of each row; meaningless where the row does not sample.
        error: the step failed as a whole and its rows hold nothing.
    """

    step_id: int
    tokens: np.ndarray
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inputs:
    """Everything that happened since the last step.

    Attributes:
        reset_connectors: host tiers forget what they hold.
        events: of moves, in the order in which the drivers saw them.
        pool_moved: the page buffer lies elsewhere now, with its content.
        now_s: the loop's clock; the step has none of its own.
    """

    arrivals: tuple[Request, ...] = ()
    aborts: tuple[str, ...] = ()
    stops: tuple[Stop, ...] = ()
    outcome: Outcome | None = None
    reset_prefix_cache: bool = False
    reset_connectors: bool = False
    events: tuple[Event, ...] = ()
    pool_moved: bool = False
    now_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one step.

    Attributes:
        max_num_batched_tokens: the token budget.
        max_num_seqs: sequences that may hold a slot.
    """

    max_num_batched_tokens: int
    max_num_seqs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What never changes while the scheduler lives.

    Attributes:
        windows: per page group, the sliding window in tokens; None: full attention.
        page_size: tokens per page.
        num_pages: pages in the pool, the dummy page among them.
        max_num_seqs: slots.
        max_model_len: bound on prompt + output tokens of a sequence.
        cache_key: names model and weight version; pages of different keys never match.
        enable_prefix_caching: False: a request's pages match only that request's own.
        policy: "fcfs" or "priority".
        transfer: the connectors; None: pages never leave the pool.
    """

    windows: tuple[int | None, ...] = (None,)
    page_size: int = 16
    num_pages: int
    max_num_seqs: int
    max_model_len: int
    cache_key: str = ""
    enable_prefix_caching: bool = True
    policy: str = "fcfs"
    transfer: ConnectorConfig | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """The batch of one step, one entry per row; rows that compute one token come first.

    Attributes:
        slots: int32 `[R]`.
        starts: int32 `[R]`, tokens of the sequence computed before; the position of the row's first token.
        lens: int32 `[R]`, tokens to compute, at least 1.
        samples: bool `[R]`, the row reaches the end of its known tokens and samples the next.
        num_outputs: int32 `[R]`, index in its sequence's output of the token that the row would sample.
        tokens: int32 `[sum(lens)]`, the rows' input tokens one after another.
        page_tables: per page group int32 `[R, M]`, page ids, padded with the dummy page.
    """

    slots: np.ndarray
    starts: np.ndarray
    lens: np.ndarray
    samples: np.ndarray
    num_outputs: np.ndarray
    tokens: np.ndarray
    page_tables: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.slots)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Accepted:
    """Tokens of the last outcome that count; rows that ended meanwhile are not among them.

    Attributes:
        rows: int32 `[A]`, rows of the executed plan.
        slots: int32 `[A]`, their slots.
        tokens: int32 `[A]`.
    """

    rows: np.ndarray
    slots: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A sequence got a slot.

    Attributes:
        queried_tokens: tokens looked up in the prefix cache; 0 where the lookup is off.
        hit_tokens: of these, found.
        loaded_tokens: behind the hit, brought by connectors and usable.
        resumed: it had been preempted.
    """

    request_id: str
    index: int
    slot: int
    queried_tokens: int
    hit_tokens: int
    resumed: bool
    loaded_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Preempted:
    """A sequence lost its slot and pages and waits again."""

    request_id: str
    index: int
    slot: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilled:
    """A request's prompt is computed: its first token was accepted in this step. Once per request."""

    request_id: str
    stats: PrefillStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A sequence ended; its slot (None: it waited) and pages are given back.

    Attributes:
        stop_reason: the stop token id or stop string that ended it; None: the model's own end, or no stop.
        message: for people, where the reason is an error.
        lease: its pages are kept for a peer on these terms.
    """

    request_id: str
    index: int
    slot: int | None
    reason: FinishReason
    stop_reason: int | str | None = None
    num_output_tokens: int = 0
    message: str | None = None
    lease: LeaseTerms | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """State after the step: sequences and pages (in use + idle + free + the dummy page = all).

    Attributes:
        waiting: sequences without a slot, those that load among them.
        loading: sequences that wait for their pages to arrive.
    """

    running: int = 0
    waiting: int = 0
    loading: int = 0
    pages_in_use: int = 0
    pages_idle: int = 0
    pages_free: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """What to do next, and what was decided about what came in.

    Attributes:
        step_id: counts up from 1.
        rows: the batch; nothing is to be run where it is empty.
        prompt_tokens: prompt tokens in `rows`, those computed again after a preemption left out.
        recomputed_tokens: tokens in `rows` that this engine had computed before a preemption.
        moves: pages on their way, for the drivers.
    """

    step_id: int
    rows: Rows
    accepted: Accepted
    admitted: tuple[Admitted, ...] = ()
    preempted: tuple[Preempted, ...] = ()
    prefilled: tuple[Prefilled, ...] = ()
    finished: tuple[Finished, ...] = ()
    prompt_tokens: int = 0
    recomputed_tokens: int = 0
    gauges: Gauges = field(default_factory=Gauges)
    moves: MoveNews = field(default_factory=MoveNews)
