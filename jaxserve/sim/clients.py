"""Clients of a simulated cluster: what they ask, and whether what they get is right.

A client either asks one engine, or goes through the two-step flow of a router: a prefill engine computes the
prompt and leases its pages, then a decode engine reads them. Every answer is compared with the one that was
worked out without an engine.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxserve.outputs import Delta, EngineError, QueueFull, RequestRefused, Transfer
from jaxserve.sim.clockwork import Clockwork
from jaxserve.sim.engine import SimEngine
from jaxserve.sim.expect import Expected, SimTokenizer, expected
from jaxserve.sim.hash_model import END, VOCAB, HashModel
from jaxserve.sim.laws import Broken, Names
from kv.moves import LOAD_FAILED
from scheduler.types import FinishReason, Inputs, Plan, Request, SamplingParams

NAMES_OF_STOPS = ("ab", "Z", "€", "0a")
NOT_NUMBERS = "the model gave logits that are not numbers"
REFUSALS_S = 0.5
"""After a refusal a client waits about so long."""


@dataclass(slots=True, eq=False)
class Ask:
    """One request to one engine.

    Attributes:
        tokens, text: per sequence, what has come.
        ended: sequences that have ended, with their reasons.
        aborted: the client wants it no more.
        then: called once it is over, with the `kv_transfer_params` where there are any; None: it failed.
    """

    engine: SimEngine
    request: Request
    right: list[Expected]
    then: Callable[[Mapping[str, Any] | None, bool], None]
    tokens: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    ended: dict[int, FinishReason] = field(default_factory=dict)
    params: Mapping[str, Any] | None = None
    told_prefill: bool = False
    aborted: bool = False
    lost: bool = False

    @property
    def over(self) -> bool:
        """Nobody waits for it any more."""
        return self.lost or len(self.ended) == self.request.sampling.n


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """What clients of a world are like.

    Attributes:
        documents: what prompts begin with.
        split: share of requests that go through prefill and decode engines.
        think_s: mean pause between a client's requests.
    """

    documents: tuple[tuple[int, ...], ...]
    split: float
    think_s: float
    max_prompt: int
    max_tokens: int


class Clients:
    """Attributes:
    asks: live requests by id.
    counts: what became of requests.
    excuses: (epoch, why) of faults after which an engine may fail a request.
    struck: (request, message) of requests that a failed step, or a row without numbers, has ended.
    broken: the first law that an answer has broken; the engine would swallow it.
    """

    def __init__(
        self,
        clockwork: Clockwork,
        model: HashModel,
        names: Names,
        habits: Habits,
        engines: Callable[[str], list[SimEngine]],
    ) -> None:
        """Args: engines: those that take requests now, of a kind: "prefill", "decode" or "any"."""
        self._clockwork, self._model, self._names = clockwork, model, names
        self._habits, self._engines = habits, engines
        self._tokenizer = SimTokenizer()
        self.asks: dict[str, Ask] = {}
        self.counts: dict[str, int] = {
            "asked": 0, "right": 0, "aborted": 0, "failed": 0, "refused": 0, "lost": 0, "split": 0,
        }  # fmt: skip
        self.excuses: set[tuple[str, str]] = set()
        self.struck: set[tuple[str, str]] = set()
        self.broken: Broken | None = None
        self.asking = True
        self._number = 0

    def begin(self, many: int) -> None:
        """So many clients begin to ask."""
        for client in range(many):
            self._later(client)

    def connection_lost(self, engine: SimEngine) -> None:
        """An engine has died: its clients learn it."""
        for ask in [ask for ask in self.asks.values() if ask.engine is engine]:
            ask.lost = True
            self.counts["lost"] += 1
            del self.asks[ask.request.request_id]
            then = ask.then
            self._clockwork.after(0.001, "connection lost", lambda then=then: then(None, False))

    def _later(self, client: int) -> None:
        if self.asking:
            pause = self._clockwork.chance.expovariate(1.0 / self._habits.think_s)
            self._clockwork.after(pause, f"client {client}", lambda: self._ask(client))

    def _ask(self, client: int) -> None:
        if not self.asking:
            return
        prompt, sampling, salt, priority = self._draw()

        def again(params: Mapping[str, Any] | None, ok: bool) -> None:
            self._later(client)

        prefill, decode = self._engines("prefill"), self._engines("decode")
        chance = self._clockwork.chance
        if prefill and decode and chance.random() < self._habits.split:
            self.counts["split"] += 1
            first, second = chance.choice(prefill), chance.choice(decode)
            self.split(first, second, prompt, sampling, salt, priority, again)
        else:
            engines = self._engines("any")
            if not engines:
                self._later(client)
                return
            self.ask(chance.choice(engines), prompt, sampling, salt, priority, again)

    def split(
        self,
        first: SimEngine,
        second: SimEngine,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        salt: str,
        priority: int,
        then: Callable[[Mapping[str, Any] | None, bool], None],
        *,
        request_id: str | None = None,
    ) -> None:
        """A router's two steps. `request_id`: of both; None: they are numbered."""

        def leased(params: Mapping[str, Any] | None, ok: bool) -> None:
            if ok and params is None:
                raise Broken("I13", f"{first.host}: a prompt was computed for a peer, and nothing is leased")
            if not second.alive:
                then(None, False)
                return
            passed = None if params is None else json.loads(json.dumps(dict(params)))
            self.ask(second, prompt, sampling, salt, priority, then, params=passed, request_id=request_id)

        lone = replace(sampling, n=1, max_tokens=1, min_tokens=0, stop=())
        wants = {"do_remote_decode": True, "do_remote_prefill": False}
        self.ask(first, prompt, lone, salt, priority, leased, params=wants, request_id=request_id)

    def ask(
        self,
        engine: SimEngine,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        salt: str,
        priority: int,
        then: Callable[[Mapping[str, Any] | None, bool], None],
        *,
        params: Mapping[str, Any] | None = None,
        request_id: str | None = None,
    ) -> None:
        """One request. `then` is called once, with what an answer carries, and whether it is whole."""
        self._number += 1
        clockwork = self._clockwork
        try:
            if not engine.alive:
                raise EngineError("nobody listens")
            transfer = Transfer() if params is None else engine.door.open(params, prompt, salt)
            request = Request(
                request_id=request_id or f"{engine.host}-{engine.epoch[:4]}-{self._number}",
                prompt_token_ids=prompt,
                sampling=sampling,
                eos_token_ids=(END,),
                cache_salt=salt,
                priority=priority,
                lease=transfer.lease,
                remote=transfer.remote,
            )
            ask = Ask(engine=engine, request=request, right=self._right(engine, request), then=then)
            if request.request_id not in self.asks:
                self._learn(engine, ask)
            engine.submit(request, lambda delta: self._sink(ask, delta))
            self.asks[request.request_id] = ask
            self.counts["asked"] += 1
        except (QueueFull, EngineError, RequestRefused):
            self.counts["refused"] += 1
            delay = clockwork.chance.expovariate(1.0 / REFUSALS_S)
            clockwork.after(delay, "refused", lambda: then(None, False))

    def probe(self, first: SimEngine, second: SimEngine, length: int, over: list[bool]) -> None:
        """A prompt that nobody has seen goes through two engines; `over` gets whether it was answered."""
        prompt = tuple(self._clockwork.chance.randrange(END - 3) for _ in range(length))
        sampling = SamplingParams(temperature=0.0, max_tokens=2, seed=1, ignore_eos=True)
        self.split(first, second, prompt, sampling, "", 0, lambda params, ok: over.append(ok))

    def repeat(self, engine: SimEngine, times: int) -> None:
        """One client asks the same again and again, without waiting."""
        prompt, sampling, salt, priority = self._draw()
        for _ in range(times):
            self.ask(engine, prompt, sampling, salt, priority, lambda params, ok: None)

    def abort(self, ask: Ask) -> None:
        """The client has gone."""
        ask.aborted = True
        ask.engine.abort(ask.request.request_id)

    def strike(
        self,
        engine: SimEngine,
        inputs: Inputs,
        plan: Plan,
        failed_steps: set[str],
        not_finite: set[str],
    ) -> None:
        """Excuses requests that end in this step for a fault: a step made to fail ends those of its own
        rows, and nobody else's; a row without numbers ends its request.

        Args:
            failed_steps, not_finite: hosts whose step under way was made so; one whose step is over leaves.
        """
        before, engine.rows_of = engine.rows_of, frozenset(plan.rows.slots.tolist())
        errors = [entry for entry in plan.finished if entry.reason is FinishReason.ERROR]
        if engine.host in failed_steps and inputs.outcome is not None and inputs.outcome.error is not None:
            failed_steps.discard(engine.host)
            errors = [entry for entry in errors if entry.slot in before]
        elif engine.host in not_finite and inputs.stops:
            not_finite.discard(engine.host)
            errors = [entry for entry in errors if entry.message == NOT_NUMBERS][:1]
        else:
            return
        self.struck |= {(entry.request_id, entry.message or "") for entry in errors}

    def _draw(self) -> tuple[tuple[int, ...], SamplingParams, str, int]:
        chance, habits = self._clockwork.chance, self._habits
        document = chance.choice(habits.documents)
        kept = document[: chance.randint(0, min(len(document), habits.max_prompt - 1))]
        tail = chance.randint(1, max(1, min(12, habits.max_prompt - len(kept))))
        if chance.random() < 0.3:  # the same question again
            prompt = document[: max(1, min(len(document), habits.max_prompt))]
        else:
            prompt = (*kept, *(chance.randrange(END - 3) for _ in range(tail)))  # whole characters
        most = chance.randint(1, habits.max_tokens)
        fancy = chance.random() < 0.3
        sampling = SamplingParams(
            n=chance.choice((1, 1, 2, 3)) if fancy else 1,
            max_tokens=most,
            min_tokens=chance.randint(0, most) if fancy and chance.random() < 0.5 else 0,
            temperature=0.0,
            seed=chance.getrandbits(31),
            ignore_eos=chance.random() < 0.5,
            stop_token_ids=(chance.randrange(VOCAB),) if fancy else (),
        )
        if fancy and sampling.min_tokens == 0:
            stops = tuple(stop for stop in NAMES_OF_STOPS if chance.random() < 0.3)
            sampling = replace(sampling, stop=stops)
        return prompt, sampling, chance.choice(("", "", "tenant")), chance.randrange(3)

    def _right(self, engine: SimEngine, request: Request) -> list[Expected]:
        return [
            expected(
                self._model,
                request,
                index,
                max_model_len=engine.node.scheduler.max_model_len,
                tokenizer=self._tokenizer,
            )
            for index in range(request.sampling.n)
        ]

    def _learn(self, engine: SimEngine, ask: Ask) -> None:
        config, request = engine.node.scheduler, ask.request
        for right in ask.right:
            self._names.learn(
                (*request.prompt_token_ids, *right.tokens),
                cache_key=config.cache_key,
                salt=request.cache_salt,
                private="" if config.enable_prefix_caching else request.request_id,
                page_size=config.page_size,
            )

    # What comes back.

    def _sink(self, ask: Ask, delta: Delta) -> None:
        if ask.lost:
            return
        try:
            self._take(ask, delta)
        except Broken as broken:
            self.broken = self.broken or broken

    def _take(self, ask: Ask, delta: Delta) -> None:
        """A delta.

        Raises:
            Broken: it is not what must come.
        """
        where, index = f"{ask.engine.host}: request {delta.request_id}/{delta.index}", delta.index
        right = ask.right[index]
        if index in ask.ended:
            raise Broken("I12", f"{where} goes on after its end")
        got = ask.tokens.setdefault(index, [])
        got += delta.token_ids
        ask.text[index] = ask.text.get(index, "") + delta.text
        if tuple(got) != right.tokens[: len(got)]:
            raise Broken("I14", f"{where} gave {got}, expected {list(right.tokens)}")
        if not right.text.startswith(ask.text[index].removesuffix("\ufffd")):
            raise Broken("I24", f"{where} gave {ask.text[index]!r}, expected {right.text!r}")
        if delta.prefill is not None:
            if ask.told_prefill:
                raise Broken("I11", f"{where} tells its prompt's sources twice")
            ask.told_prefill = True
            stats = delta.prefill
            parts = (stats.local_compute, stats.local_cache_hit, stats.external_kv_transfer)
            if sum(parts) != len(ask.request.prompt_token_ids) or min(parts) < 0:
                raise Broken("I11", f"{where}: {parts} are not {len(ask.request.prompt_token_ids)} tokens")
        if delta.kv_transfer_params is not None:
            ask.params = delta.kv_transfer_params
        if delta.finish_reason is not None:
            self._end(ask, delta, where, right)

    def _end(self, ask: Ask, delta: Delta, where: str, right: Expected) -> None:
        reason = delta.finish_reason
        assert reason is not None
        ask.ended[delta.index] = reason
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            said = (tuple(ask.tokens[delta.index]), ask.text[delta.index], reason, delta.stop_reason)
            if said != (right.tokens, right.text, right.reason, right.stop_reason):
                raise Broken("I14", f"{where} ended with {said}, expected {right}")
        elif reason is FinishReason.ABORT:
            if not (ask.aborted or ask.engine.has_aborted):
                raise Broken("I17", f"{where} was aborted, and nobody wanted that")
        elif not self._excused(ask, delta.message or ""):
            raise Broken("I17", f"{where} failed without a fault: {delta.message}")
        if not ask.over:
            return
        del self.asks[delta.request_id]
        reasons = set(ask.ended.values())
        whole = reasons <= {FinishReason.STOP, FinishReason.LENGTH}
        gone = ask.aborted or FinishReason.ABORT in reasons
        self.counts["right" if whole else "aborted" if gone else "failed"] += 1
        params = ask.params if whole else None
        self._clockwork.after(0.001, "answered", lambda: ask.then(params, whole))

    def _excused(self, ask: Ask, message: str) -> bool:
        """Whether a fault explains an error."""
        epoch, transfer = ask.engine.epoch, ask.engine.node.scheduler.transfer
        if message == LOAD_FAILED:
            return transfer is not None and transfer.failure_policy == "fail"
        if message == "the engine has stopped":
            return (epoch, "closed") in self.excuses
        if message == "the request failed":
            return ("", "tokenizer") in self.excuses
        return (ask.request.request_id, message) in self.struck
