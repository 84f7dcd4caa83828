"""A request while it lives in the engine: its sequences' text, and when things happened to it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxserve.outputs import Delta, TokenLogprobs
from jaxserve.text import Detokenizer, StopStrings, Tokenizer
from metrics.records import FinishedRecord, RequestTotals, SequenceTimes
from metrics.stats import PrefillStats
from scheduler.types import Finished, FinishReason, Request

Sink = Callable[[Delta], None]
"""Takes a delta on the engine's thread; must not block."""


class LiveSequence:
    """One sequence's tokens and text. Owned by the engine's thread."""

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer, prompt: Iterable[int]) -> None:
        """Args: prompt: its tokens, or as many of the last as its text needs to begin with."""
        sampling = request.sampling
        self.index = index
        self.output: list[int] = []
        self.preemptions = 0
        self.scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self.last_token_s = 0.0
        self.hit: str | None = None
        self._sampling = sampling
        self._stop_ids = frozenset(sampling.stop_token_ids) | (
            frozenset() if sampling.ignore_eos else frozenset(request.eos_token_ids)
        )
        self._detokenizer = Detokenizer(
            tokenizer, prompt=tuple(prompt), skip_special_tokens=sampling.skip_special_tokens
        )
        self._stops = (
            StopStrings(sampling.stop, include=sampling.include_stop_str_in_output) if sampling.stop else None
        )
        self._text: list[str] = []
        self._tokens = 0

    @property
    def has_stops(self) -> bool:
        """Its text may end it: it must be read before the next step is decided."""
        return self._stops is not None

    def read(self, token: int) -> str | None:
        """Turns the next token into text; returns the stop string that it completes."""
        self._tokens += 1
        sampling = self._sampling
        ends = token in self._stop_ids and self._tokens >= sampling.min_tokens
        if ends and not sampling.include_stop_str_in_output:
            return None
        text = self._detokenizer.push((token,))
        if self._stops is None or self._tokens <= sampling.min_tokens:
            self._text.append(text)
            return None
        emitted, self.hit = self._stops.push(text)
        self._text.append(emitted)
        return self.hit

    def take_text(self, *, final: bool) -> str:
        """The text since the last call; with the held-back rest where the sequence has ended."""
        if final and self.hit is None:
            rest = self._detokenizer.flush()
            if self._stops is not None:
                emitted, self.hit = self._stops.push(rest)
                rest = emitted if self.hit is not None else emitted + self._stops.flush()
            self._text.append(rest)
        text = "".join(self._text)
        self._text.clear()
        return text


@dataclass(slots=True, kw_only=True, eq=False)
class LiveRequest:
    """One client request. Owned by the engine's thread once it is taken in.

    Attributes:
        arrival_s, queued_s: monotonic seconds.
        left: sequences that have not ended.
        ended: the indices of those that have, as its client was told.
        prompt_logprobs: one per prompt position, filled as chunks are computed.
        failed: its text could not be made; nothing more of it is told but its end.
    """

    request: Request
    tokenizer: Tokenizer
    sink: Sink
    arrival_s: float
    queued_s: float
    left: int
    sequences: dict[int, LiveSequence] = field(default_factory=dict)
    prefill: PrefillStats | None = None
    prefill_sent: bool = False
    longest: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    admitted: bool = False
    failed: bool = False
    ended: set[int] = field(default_factory=set)

    def sequence(self, index: int) -> LiveSequence:
        """The sequence, made on first use."""
        if index not in self.sequences:
            prompt = self.request.prompt_token_ids
            self.sequences[index] = LiveSequence(self.request, index, self.tokenizer, prompt)
        return self.sequences[index]

    def textless(self, index: int) -> LiveSequence:
        """The sequence of a request that has failed: it goes on until it is aborted, but has no text."""
        self.failed = True
        return self.sequences.setdefault(index, LiveSequence(self.request, index, self.tokenizer, ()))

    def delta(
        self,
        index: int,
        *,
        text: str = "",
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] | None = None,
        ended: Finished | None = None,
        kv_transfer_params: Mapping[str, Any] | None = None,
    ) -> Delta:
        """The next delta of a sequence; the request's first one carries what is said once."""
        first = self.prefill is not None and not self.prefill_sent
        self.prefill_sent = self.prefill_sent or first
        known = self.prompt_logprobs if first else None
        if first and known is None and self.request.sampling.prompt_logprobs is not None:
            known = [None] * len(self.request.prompt_token_ids)
        return Delta(
            request_id=self.request.request_id,
            index=index,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=None if ended is None else ended.reason,
            stop_reason=None if ended is None else ended.stop_reason,
            message=None if ended is None else ended.message,
            prefill=self.prefill if first else None,
            prompt_logprobs=None if known is None else tuple(known),
            kv_transfer_params=kv_transfer_params,
        )

    def finished_record(self, ended: Finished, now_s: float) -> FinishedRecord:
        """What the metrics keep of a sequence that ended."""
        sequence = self.sequences.get(ended.index)
        times = None
        if sequence is not None and sequence.first_token_s is not None and sequence.scheduled_s is not None:
            times = SequenceTimes(
                arrival_s=self.arrival_s,
                queued_s=self.queued_s,
                scheduled_s=sequence.scheduled_s,
                first_token_s=sequence.first_token_s,
                last_token_s=sequence.last_token_s,
                finished_s=now_s,
            )
        generated = len(sequence.output) if sequence is not None and times is not None else 0
        self.longest = max(self.longest, generated)
        totals = None
        if self.left == 0 and self.prefill is not None:
            sampling = self.request.sampling
            totals = RequestTotals(prefill=self.prefill, n=sampling.n, max_num_generation_tokens=self.longest)
        return FinishedRecord(
            reason=str(ended.reason),
            num_generation_tokens=generated,
            max_tokens=self.request.sampling.max_tokens,
            num_preemptions=sequence.preemptions if sequence is not None else 0,
            times=times,
            request=totals,
        )


def error_end(request_id: str, index: int, message: str) -> Finished:
    """The end of a sequence that failed on the host."""
    return Finished(request_id=request_id, index=index, slot=None, reason=FinishReason.ERROR, message=message)
