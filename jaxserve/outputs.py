"""What comes back from the engine, as values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kv.moves import RemoteSource
from metrics.stats import PrefillStats
from scheduler.types import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the raw logits (before penalties and temperature).

    Attributes:
        token_id: the token that stands there.
        logprob: its natural log-probability.
        rank: its place among all tokens, 1 is the most likely.
        top: (token id, log-probability) of the most likely tokens, as many as were asked for.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """What a request's `kv_transfer_params` ask for, checked.

    Attributes:
        lease: keep the prompt's pages for a peer (vLLM's do_remote_decode).
        remote: where a peer holds the prompt's pages (vLLM's do_remote_prefill).
    """

    lease: bool = False
    remote: RemoteSource | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one step brought to one sequence of a request.

    Attributes:
        index: which of the request's n sequences.
        text: new text that will not change; may be empty while a character or a stop string is incomplete.
        token_ids: new tokens.
        logprobs: one per new token, where the request asked for them.
        finish_reason: set on the sequence's last delta.
        stop_reason: the stop token id or stop string that ended it; None: the model's own end, or no stop.
        message: for people, where finish_reason is an error.
        prefill: on the request's first delta: where its prompt tokens came from.
        prompt_logprobs: on the request's first delta, where asked: one per prompt token, None for the first.
        kv_transfer_params: on the last delta of sequence 0, where the pages are leased: what the client gives
            to the engine that goes on, ready for JSON.
    """

    request_id: str
    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    message: str | None = None
    prefill: PrefillStats | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    kv_transfer_params: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One finished sequence."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason
    stop_reason: int | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """One finished request. `prefill` is None where it ended before its first token."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prefill: PrefillStats | None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


class EngineError(RuntimeError):
    """The engine cannot serve: its loop has ended, or it is draining."""


class QueueFull(EngineError):
    """More requests wait than `--max-num-queued-reqs` allows."""


class RequestRefused(ValueError):
    """A request that can never run. `param` names the field.

    Attributes:
        param: OpenAI field name.
    """

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.param = param
