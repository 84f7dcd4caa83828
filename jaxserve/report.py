"""What a step brought, told to clients and statistics, while the device works on the next one."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxserve.dispatch import Dispatch, Executed
from jaxserve.movers import Movers
from jaxserve.outputs import Delta, TokenLogprobs
from jaxserve.report_moves import observe_moves
from jaxserve.sample import Sampled
from jaxserve.sequence import LiveRequest, LiveSequence, error_end
from kv.moves import Event
from metrics.engine import EngineStats
from metrics.moves import MoveStats
from metrics.observe import observe_finished, observe_first_token, observe_prefill, observe_step
from metrics.records import Gauges, StepRecord
from scheduler.types import Finished, FinishReason, Plan

logger = logging.getLogger("jaxserve")

Owner = tuple[LiveRequest, LiveSequence]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class News:
    """One turn's events, owners resolved before slots change hands.

    Attributes:
        ran: the plan that was executed; None: nothing was, or it failed.
        executed: what came of it.
        span_owners: the requests of its prompt spans.
        plan: the plan made from it.
        accepted: owner and row in `ran` of each accepted token.
        prefilled: the requests of `plan.prefilled`.
        ended: each end with its request; None: the request is gone.
        events: of moves, since the last turn.
        now: monotonic seconds at which the outcome was there.
    """

    ran: Plan | None
    executed: Executed | None
    span_owners: tuple[LiveRequest, ...]
    plan: Plan
    accepted: tuple[tuple[Owner, int], ...]
    prefilled: tuple[LiveRequest | None, ...]
    ended: tuple[tuple[Finished, LiveRequest | None], ...]
    events: tuple[Event, ...]
    now: float


class Reporter:
    """Sends deltas and folds statistics. An error in one request ends that request and is logged.

    Attributes:
        stats: everything counted so far; replaced, never changed.
        moves: the same of moves.
    """

    def __init__(
        self,
        stats: EngineStats,
        movers: Movers,
        *,
        abort: Callable[[str], None],
        forget: Callable[[LiveRequest], None],
    ) -> None:
        self.stats = stats
        self.moves = MoveStats.empty(movers.kinds)
        self._movers = movers
        self._abort = abort
        self._forget = forget
        self._over: list[LiveRequest] = []

    def report(self, news: News) -> None:
        """Tells everybody; requests are forgotten last, so that whoever waits for one sees its numbers."""
        if news.executed is not None:
            _keep_prompt_logprobs(news.executed, news.span_owners)
        for entry, live in zip(news.plan.prefilled, news.prefilled, strict=True):
            if live is not None:
                live.prefill = entry.stats
            self.stats = observe_prefill(self.stats, entry.stats)
        sampled = None if news.executed is None else news.executed.sampled
        ends = {(entry.request_id, entry.index): entry for entry, _ in news.ended}
        gaps: list[float] = []
        for (live, sequence), row in news.accepted:
            if sampled is None:
                raise RuntimeError("tokens were accepted from a step that gave none")
            gaps += self._clock_in(live, sequence, int(sampled.tokens[row]), news.now)
            key = (live.request.request_id, sequence.index)
            if key in ends and ends[key].reason is FinishReason.ERROR:
                continue
            self._send_token(live, sequence, sampled, row, ends.pop(key, None), news.now)
        for entry, live in news.ended:
            if live is not None and (entry.request_id, entry.index) in ends:
                self._send_end(live, entry, news.now)
        self.stats = observe_step(self.stats, step_record(news, gaps))
        self.moves = observe_moves(self.moves, news.events, news.plan, self._movers)
        over, self._over = self._over, []
        for live in over:
            self._forget(live)

    def _clock_in(self, live: LiveRequest, sequence: LiveSequence, token: int, now: float) -> list[float]:
        """Keeps an accepted token and its time; returns the gap to the one before it, if there was one."""
        sequence.output.append(token)
        before, sequence.last_token_s = sequence.last_token_s, now
        if sequence.first_token_s is not None:
            return [now - before]
        sequence.first_token_s = now
        if sequence.index == 0:
            self.stats = observe_first_token(self.stats, now - live.arrival_s)
        return []

    def _send_token(
        self,
        live: LiveRequest,
        sequence: LiveSequence,
        sampled: Sampled,
        row: int,
        ended: Finished | None,
        now: float,
    ) -> None:
        """One accepted token's delta; with the sequence's end where it has ended."""
        if live.failed:
            if ended is not None:
                self._send_end(live, ended, now)
            return
        token = int(sampled.tokens[row])
        wanted = live.request.sampling.logprobs
        logprobs = None if wanted is None else (token_logprobs(sampled, row, token, wanted),)
        try:
            if not sequence.has_stops:
                sequence.read(token)
            text = sequence.take_text(final=ended is not None)
            terms = None if ended is None else ended.lease
            params = None if terms is None else self._movers.params(terms, live.request)
        except Exception:
            self._lose(live, sequence.index, ended, now)
            return
        self._deliver(
            live,
            live.delta(
                sequence.index,
                text=text,
                token_ids=(token,),
                logprobs=logprobs,
                ended=ended,
                kv_transfer_params=params,
            ),
        )
        if ended is not None:
            self._close(live, ended, now)

    def _lose(self, live: LiveRequest, index: int, ended: Finished | None, now: float) -> None:
        """A sequence's text could not be made: its request ends, nobody else's."""
        request_id = live.request.request_id
        logger.exception("request %s failed on the host; it is aborted", request_id)
        live.failed = True
        if ended is None or live.left > 1:
            self._abort(request_id)
        if ended is not None:
            self._send_end(live, ended, now)

    def _send_end(self, live: LiveRequest, ended: Finished, now: float) -> None:
        """The end of a sequence without a new token: an abort, an error."""
        sequence = live.sequences.get(ended.index)
        if live.failed:
            ended = error_end(ended.request_id, ended.index, "the request failed")
        text = "" if sequence is None or live.failed else sequence.take_text(final=True)
        self._deliver(live, live.delta(ended.index, text=text, ended=ended))
        self._close(live, ended, now)
        if ended.index == 0 and live.prefill is None:  # its forks were never made, but are waited for
            for index in range(1, live.request.sampling.n):
                unborn = Finished(
                    request_id=ended.request_id,
                    index=index,
                    slot=None,
                    reason=ended.reason,
                    message=ended.message,
                )
                self._deliver(live, live.delta(index, ended=unborn))
                self._close(live, unborn, now)

    def _close(self, live: LiveRequest, ended: Finished, now: float) -> None:
        live.left -= 1
        live.ended.add(ended.index)
        try:
            self.stats = observe_finished(self.stats, live.finished_record(ended, now))
        except ValueError:  # numbers that contradict each other cost one observation, not the loop
            logger.exception("request %s is not counted", ended.request_id)
        if live.left <= 0:
            self._over.append(live)

    def _deliver(self, live: LiveRequest, delta: Delta) -> None:
        """A sink that fails loses its request, nobody else's."""
        try:
            live.sink(delta)
        except Exception:
            logger.exception("delivering to request %s failed; it is aborted", live.request.request_id)
            self._abort(live.request.request_id)


def _keep_prompt_logprobs(executed: Executed, owners: tuple[LiveRequest, ...]) -> None:
    for (span, sampled), live in zip(executed.spans, owners, strict=False):
        known = live.prompt_logprobs
        if known is None:
            known = live.prompt_logprobs = [None for _ in live.request.prompt_token_ids]
        wanted = live.request.sampling.prompt_logprobs or 0
        for place, token in enumerate(span.targets):
            known[span.start + 1 + place] = token_logprobs(sampled, place, int(token), wanted)


def token_logprobs(sampled: Sampled, row: int, token: int, wanted: int) -> TokenLogprobs:
    """One row's log-probabilities as a value."""
    top = zip(sampled.top_ids[row][:wanted], sampled.top_logprobs[row][:wanted], strict=True)
    return TokenLogprobs(
        token_id=token,
        logprob=float(sampled.logprobs[row]),
        rank=int(sampled.ranks[row]),
        top=tuple((int(other), float(value)) for other, value in top),
    )


def step_record(news: News, gaps: list[float]) -> StepRecord:
    """The executed step's tokens with what the new plan decided about them."""
    plan, ran = news.plan, news.ran
    sampled = None if news.executed is None else news.executed.sampled
    looked_up = [entry for entry in plan.admitted if not entry.resumed and entry.index == 0]
    corrupted = 0 if ran is None or sampled is None else int((ran.rows.samples & ~sampled.finite).sum())
    gauges = plan.gauges
    dispatch = Dispatch() if news.executed is None else news.executed.dispatch
    return StepRecord(
        gauges=Gauges(
            running=gauges.running,
            waiting_capacity=gauges.waiting - gauges.loading,
            waiting_deferred=gauges.loading,
            pages_used=gauges.pages_in_use,
            pages_total=gauges.pages_in_use + gauges.pages_idle + gauges.pages_free,
        ),
        prompt_tokens=0 if ran is None else ran.prompt_tokens,
        recomputed_tokens=0 if ran is None else ran.recomputed_tokens,
        generation_tokens=len(plan.accepted.rows),
        preemptions=len(plan.preempted),
        prefix_queries=sum(entry.queried_tokens for entry in looked_up),
        prefix_hits=sum(entry.hit_tokens for entry in looked_up if entry.queried_tokens),
        external_queries=sum(entry.queried_tokens for entry in plan.moves.promised),
        external_hits=_by_tier(plan),
        corrupted=corrupted,
        dispatched_tokens=dispatch.tokens,
        padding_tokens=dispatch.padding_tokens,
        compile_misses=dispatch.compile_misses,
        inter_token_s=np.asarray(gaps, np.float64),
    )


def _by_tier(plan: Plan) -> tuple[tuple[str, int], ...]:
    """Tokens that connectors promised in a step, by tier."""
    tokens: dict[str, int] = {}
    for entry in plan.moves.promised:
        for tier, count in entry.promised:
            tokens[tier] = tokens.get(tier, 0) + count
    return tuple(tokens.items())
