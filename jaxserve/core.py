"""An engine's turn: settle what happened, decide the next step, start it, report the last one meanwhile.

    turn(arrived): wait for the step under way -> read stop strings -> decide the next -> start it
                   -> report the last one while the device works

No thread and no clock of its own: whoever owns the core calls it from one thread at a time, with a clock as
an argument. A server's engine loop does, and so does the simulator. An error in one request ends that
request; an error of a step ends the step's requests; the core goes on.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from jaxserve.dispatch import Executed, Pending, PromptSpan, SlotSetup, slot_setup
from jaxserve.inbox import Arrived, Inbox
from jaxserve.movers import Movers
from jaxserve.outputs import RequestRefused
from jaxserve.report import News, Owner, Reporter
from jaxserve.sequence import LiveRequest, LiveSequence, Sink, error_end
from jaxserve.text import Tokenizer
from kv.driver import Region
from kv.moves import Event
from metrics.engine import EngineStats
from metrics.moves import MoveStats
from scheduler.admit import never_fits
from scheduler.state import SchedulerState, initial_state
from scheduler.step import step
from scheduler.types import FinishReason, Inputs, Limits, Plan, Request, SchedulerConfig, Stop

logger = logging.getLogger("jaxserve")

HELD_BACK_S = 0.002
"""Between looks while every running sequence waits for pages that are being stored."""

CLOCK_GRAIN_S = 0.001
"""Added to a wait for a deadline, so that it has passed when the wait is over."""


class DeviceDriver(Protocol):
    """What the loop needs of a device; the simulator's satisfies it too."""

    def start(self, plan: Plan, setups: list[SlotSetup], spans: list[PromptSpan]) -> Pending: ...

    def wait(self, pending: Pending) -> Executed: ...

    def pool_changed(self) -> bool:
        """Whether the page buffer lies elsewhere than at the last call."""
        ...

    def regions(self) -> tuple[Region, ...]:
        """Where it lies, per shard."""
        ...


Recorder = Callable[[Inputs, Plan], None]
"""Takes what went into a step and what came out."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UnderWay:
    """A step that the device works on, the plan behind it, and whom its prompt spans belong to."""

    plan: Plan
    pending: Pending
    span_owners: tuple[LiveRequest, ...]


class EngineCore:
    """Owns the scheduler's state, and which sequence holds which slot.

    Attributes:
        inbox: how others talk to it, from any thread.
        pause: seconds in which nothing will happen by itself; None: until something arrives.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        limits: Limits,
        device: DeviceDriver,
        tokenizer: Tokenizer,
        *,
        max_num_queued_reqs: int,
        clock: Callable[[], float],
        movers: Movers | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        nothing = EngineStats.empty(config.max_model_len)
        self._movers = movers = movers or Movers()
        self._config, self._limits = config, limits
        self._device, self._tokenizer = device, tokenizer
        self._recorder, self._clock = recorder, clock
        self._state = initial_state(config)
        self._owners: dict[int, Owner] = {}
        self._setups: dict[int, SlotSetup] = {}
        """Of slots that changed hands since the device last ran: a step may place a sequence and run none."""
        self._under_way: UnderWay | None = None
        self.inbox = Inbox(max_num_queued_reqs=max_num_queued_reqs, rejections=nothing.rejections)
        self._reporter = Reporter(nothing, movers, abort=self.inbox.abort, forget=self.inbox.forget)
        self.pause: float | None = None
        self._leases = 0
        movers.begin(self.inbox.nudge)

    @property
    def working(self) -> bool:
        """A step is under way."""
        return self._under_way is not None

    @property
    def idle(self) -> bool:
        """No step is under way and the next one need not be decided at once."""
        return not self.working and self.pause != 0.0

    @property
    def stats(self) -> EngineStats:
        """A snapshot of everything counted so far."""
        return replace(self._reporter.stats, rejections=self.inbox.rejections)

    @property
    def move_stats(self) -> MoveStats:
        """What was counted of moves."""
        return self._reporter.moves

    @property
    def num_leases(self) -> int:
        """Leases that peers have not read yet."""
        return self._leases

    @property
    def state(self) -> SchedulerState:
        """For looking only: it is linear."""
        return self._state

    def submit(self, request: Request, sink: Sink) -> None:
        """Takes a request in; its deltas go to `sink`, on the thread that turns.

        Raises:
            RequestRefused: it can never run.
            QueueFull: too many requests wait.
            EngineError: the engine has ended or is being closed.
        """
        problem = never_fits(self._config, self._limits, request)
        if problem is not None:
            raise RequestRefused(problem, param="prompt")
        now = self._clock()
        self.inbox.submit(
            LiveRequest(
                request=request,
                tokenizer=self._tokenizer,
                sink=sink,
                arrival_s=now,
                queued_s=now,
                left=request.sampling.n,
            )
        )

    def close(self) -> None:
        """Ends all moves, and tells every request that the engine has ended."""
        self._movers.close()
        for live in self.inbox.end():
            for index in sorted(set(range(live.request.sampling.n)) - live.ended):
                ended = error_end(live.request.request_id, index, "the engine has stopped")
                try:
                    live.sink(live.delta(index, ended=ended))
                except Exception:
                    logger.exception("delivering to request %s failed", live.request.request_id)

    def turn(self, arrived: Arrived) -> None:
        """One step. Waits for the one under way."""
        under_way, self._under_way = self._under_way, None
        executed = None if under_way is None else self._device.wait(under_way.pending)
        failed = executed is not None and executed.outcome.error is not None
        moved = self._device.pool_changed()
        if moved:
            self._movers.pool_moved(self._device.regions())
        events = self._movers.poll()
        now = self._clock()
        inputs = Inputs(
            arrivals=tuple(live.request for live in arrived.requests),
            aborts=tuple(arrived.aborts),
            stops=() if executed is None or under_way is None else self._host_stops(under_way.plan, executed),
            outcome=None if executed is None else executed.outcome,
            reset_prefix_cache=bool(arrived.resets),
            reset_connectors=arrived.reset_external,
            events=tuple(events),
            pool_moved=moved and not failed,
            now_s=now,
        )
        self._state, plan = step(self._state, inputs, self._limits)
        if self._recorder is not None:
            self._recorder(inputs, plan)
        news = self._news(under_way, executed, plan, events, now)
        self._under_way = started = self._start(plan, now)
        self._movers.start(plan.moves.commands)
        # Before requests are told of their end: who sees the last one gone must see what it has leased.
        self._leases = plan.moves.gauges.leases
        self._reporter.report(news)
        for done in (*arrived.resets, *arrived.looks):
            done()
        # An abort that came together with its request found nothing to end.
        came = {request.request_id for request in inputs.arrivals}
        for request_id in inputs.aborts:
            if request_id in came:
                self.inbox.abort(request_id)
        self.pause = None if started is not None else self._how_long(plan, now)

    def _how_long(self, plan: Plan, now: float) -> float | None:
        """How long nothing will happen by itself after a step that ran nothing; None: for ever."""
        if plan.preempted or plan.finished:
            return 0.0
        if plan.gauges.running:  # they wait for pages that a store gives back
            return HELD_BACK_S
        deadline = plan.moves.next_deadline_s
        return None if deadline is None else max(0.0, deadline - now) + CLOCK_GRAIN_S

    def _news(
        self,
        under_way: UnderWay | None,
        executed: Executed | None,
        plan: Plan,
        events: Sequence[Event],
        now: float,
    ) -> News:
        """Who is concerned by what happened, while slots still belong to them."""
        ran = None
        if under_way is not None and executed is not None and executed.sampled is not None:
            ran = under_way.plan
        accepted = zip(plan.accepted.slots, plan.accepted.rows, strict=True)
        return News(
            ran=ran,
            executed=executed,
            span_owners=() if under_way is None else under_way.span_owners,
            plan=plan,
            accepted=tuple((self._owners[int(slot)], int(row)) for slot, row in accepted),
            prefilled=tuple(self.inbox.live(entry.request_id) for entry in plan.prefilled),
            ended=tuple((entry, self.inbox.live(entry.request_id)) for entry in plan.finished),
            events=tuple(events),
            now=now,
        )

    def _start(self, plan: Plan, now: float) -> UnderWay | None:
        """Follows slots changing hands, and dispatches the rows."""
        for entry in plan.finished:
            if entry.slot is not None:
                self._owners.pop(entry.slot, None)
                self._setups.pop(entry.slot, None)
        for entry in plan.preempted:
            _, sequence = self._owners.pop(entry.slot)
            self._setups.pop(entry.slot, None)
            sequence.preemptions += 1
        for entry in plan.admitted:
            live = self.inbox.live(entry.request_id)
            if live is None:
                raise RuntimeError(f"request {entry.request_id} was admitted but does not live")
            sequence = self._sequence(live, entry.index)
            self._owners[entry.slot] = (live, sequence)
            if sequence.scheduled_s is None:
                sequence.scheduled_s = max(now, live.queued_s)
            self.inbox.leave_queue(live)
            self._setups[entry.slot] = slot_setup(
                live.request, sequence.index, sequence.output, slot=entry.slot
            )
        if not len(plan.rows):
            return None
        setups = list(self._setups.values())
        self._setups.clear()
        spans = self._spans(plan)
        owners = tuple(self._owners[span.slot][0] for span in spans)
        return UnderWay(plan=plan, pending=self._device.start(plan, setups, spans), span_owners=owners)

    def _sequence(self, live: LiveRequest, index: int) -> LiveSequence:
        """The sequence that got a slot; a failure ends its request, nobody else's."""
        try:
            return live.sequence(index)
        except Exception:
            logger.exception("request %s failed on the host; it is aborted", live.request.request_id)
            self.inbox.abort(live.request.request_id)
            return live.textless(index)

    def _spans(self, plan: Plan) -> list[PromptSpan]:
        """Rows whose prompt positions want log-probabilities."""
        spans = []
        firsts = np.cumsum(plan.rows.lens) - plan.rows.lens
        for row, slot in enumerate(plan.rows.slots):
            live, sequence = self._owners[int(slot)]
            if live.request.sampling.prompt_logprobs is None or sequence.index or live.prefill is not None:
                continue
            prompt, start = live.request.prompt_token_ids, int(plan.rows.starts[row])
            targets = prompt[start + 1 : start + 1 + int(plan.rows.lens[row])]
            if targets:
                spans.append(
                    PromptSpan(
                        slot=int(slot),
                        first_token=int(firsts[row]),
                        start=start,
                        targets=np.asarray(targets, np.int32),
                    )
                )
        return spans

    def _host_stops(self, plan: Plan, executed: Executed) -> tuple[Stop, ...]:
        """Reads the new text of sequences with stop strings, and finds rows whose logits were no numbers."""
        sampled = executed.sampled
        if sampled is None:
            return ()
        stops = []
        for row in np.nonzero(plan.rows.samples)[0]:
            owner = self._owners.get(int(plan.rows.slots[row]))
            if owner is None:
                continue
            live, sequence = owner
            request_id = live.request.request_id
            if not sampled.finite[row]:
                stops.append(
                    Stop(
                        request_id=request_id,
                        index=sequence.index,
                        reason=FinishReason.ERROR,
                        message="the model gave logits that are not numbers",
                    )
                )
            elif sequence.has_stops:
                hit = self._read(live, sequence, int(sampled.tokens[row]))
                if hit is not None:
                    stops.append(
                        Stop(
                            request_id=request_id,
                            index=sequence.index,
                            reason=FinishReason.STOP,
                            stop_reason=hit,
                        )
                    )
        return tuple(stops)

    def _read(self, live: LiveRequest, sequence: LiveSequence, token: int) -> str | None:
        """Reads a token of a sequence with stop strings; a failure ends its request, nobody else's."""
        try:
            return sequence.read(token)
        except Exception:
            logger.exception("request %s failed on the host; it is aborted", live.request.request_id)
            live.failed = True
            self.inbox.abort(live.request.request_id)
            return None
