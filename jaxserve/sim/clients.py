"""Clients of a simulated cluster: what they ask, and whether what they get is right.

A client either asks one engine, or goes through a router: a prefill engine computes the prompt and leases its
pages, then a decode engine reads them, and other engines are asked where these fail. Every answer of every
engine is compared with the one that was worked out without an engine, from what was asked. What a server
makes of it is never the measure, neither of answers nor of the names that pages may have.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from jaxserve.api.choices import Envelope
from jaxserve.api.errors import ApiError
from jaxserve.api.replies import ChunkWriter
from jaxserve.outputs import Delta, EngineError, RequestRefused
from jaxserve.router.calls import read_call
from jaxserve.router.route import BreakOff, Finish, GiveUp
from jaxserve.sim.answers import check_answer
from jaxserve.sim.asks import Ask, Hear
from jaxserve.sim.clockwork import Clockwork
from jaxserve.sim.engine import SimEngine
from jaxserve.sim.expect import Expected, SimTokenizer, Wish, expected
from jaxserve.sim.habits import Habits, draw_router
from jaxserve.sim.hash_model import END, HashModel
from jaxserve.sim.http import TRAVEL_S, Links, SimHttp
from jaxserve.sim.laws import Broken, Names
from jaxserve.sim.networks import Direct, Wired
from jaxserve.sim.router import SimRouter, Told
from jaxserve.sim.router_laws import RouterLaws
from jaxserve.sim.server import Reply, SimServer, body_of, refusal, wish_of
from kv.moves import LOAD_FAILED
from scheduler.types import FinishReason, Inputs, Plan, Request, SamplingParams

NOT_NUMBERS = "the model gave logits that are not numbers"
REFUSALS_S = 3.0
"""After a refusal a client waits about so long."""
OUTAGES_S = 2.0
"""After an error of the router, which has tried what there is."""
BEGUN = Reply(status=200, over=False)

Then = Callable[[Mapping[str, Any] | None, bool], None]
"""Called once a request is over; true: it was answered."""


class Clients:
    """Attributes:
    asks: live requests by id.
    counts: what became of requests; from "split" on, of those that went through the router.
    excuses: (epoch, why) of faults that may fail a request of an engine now.
    struck: (request, message) of requests that a failed step, or a row without numbers, has ended.
    router: that some of the requests go through; None: none does.
    network: through which it reaches the servers, and the laws on it.
    broken: the first law that an answer has broken; the engine would swallow it.
    """

    def __init__(
        self,
        clockwork: Clockwork,
        model: HashModel,
        names: Names,
        habits: Habits,
        engines: Callable[[str], list[SimEngine]],
        links: Links | None = None,
    ) -> None:
        """
        Args:
            engines: those that take requests now, of a kind: "prefill", "decode" or "any".
            links: between the router and them; None: calm ones.
        """
        self._links = Links() if links is None else links
        self._clockwork, self._model, self._names = clockwork, model, names
        self._habits, self._engines = habits, engines
        self._tokenizer = SimTokenizer()
        self.asks: dict[str, Ask] = {}
        self.counts: dict[str, int] = {
            "asked": 0, "right": 0, "aborted": 0, "failed": 0, "refused": 0, "lost": 0, "split": 0,
            "not served": 0, "broken off": 0, "parameters refused": 0,
        }  # fmt: skip
        self.excuses: set[tuple[str, str]] = set()
        self.struck: set[tuple[str, str]] = set()
        self.broken: Broken | None = None
        self._asks = True
        self.router: SimRouter | None = None
        self.network: Wired | None = None
        self._servers: dict[str, SimServer] = {}
        self._lives: dict[str, SimEngine] = {}
        self._number = 0

    def begin(self, many: int) -> None:
        """So many clients begin to ask. All engines live."""
        prefill, decode = self._engines("prefill"), self._engines("decode")
        if prefill and decode:
            self._lives = {engine.host: engine for engine in (*prefill, *decode)}
            hosts = [engine.host for engine in prefill], [engine.host for engine in decode]
            options = draw_router(self._clockwork, *hosts)
            laws = RouterLaws(
                lambda: self._clockwork.now,
                self.lives,
                self._links,
                prefill=hosts[0],
                decode=hosts[1],
                options=options,
                patient=lambda: not self._asks,
            )
            http = SimHttp(self._clockwork, self, self._links, laws)
            self.network = Wired(http, laws, lambda: not self._asks)
            self.router = SimRouter(
                self._clockwork, self.network, prefill=hosts[0], decode=hosts[1], options=options
            )
        for client in range(many):
            self._later(client)

    @property
    def asking(self) -> bool:
        """Somebody still wants something: clients go on asking, or wait for the router."""
        return self._asks or (self.router is not None and bool(self.router.journeys))

    @asking.setter
    def asking(self, asks: bool) -> None:
        self._asks = asks

    def look(self) -> None:
        """After every event.

        Raises:
            Broken: a law on answers, or on the router, is.
        """
        if self.broken is not None:
            raise self.broken
        if self.network is not None:
            self.network.laws.look()

    def connection_lost(self, engine: SimEngine) -> None:
        """An engine has died: its clients learn it."""
        if self.network is not None:
            self.network.http.lost(engine)
        for ask in [ask for ask in self.asks.values() if ask.engine is engine]:
            ask.lost = True
            self.counts["lost"] += 1
            del self.asks[ask.request.request_id]
            if not ask.deaf:
                label = f"{engine.host} connection lost"
                self._clockwork.after(TRAVEL_S, label, lambda ask=ask: ask.hear(None))

    def _later(self, client: int) -> None:
        if self._asks:
            pause = self._clockwork.chance.expovariate(1.0 / self._habits.think_s)
            self._clockwork.after(pause, f"client {client}", lambda: self._ask(client))

    def _ask(self, client: int) -> None:
        if not self._asks:
            return
        prompt, sampling, salt, priority = self._habits.draw(self._clockwork)

        def again(params: Mapping[str, Any] | None, ok: bool) -> None:
            self._later(client)

        chance = self._clockwork.chance
        if self.router is not None and chance.random() < self._habits.split:
            self.counts["split"] += 1
            seed = sampling.seed or 0
            body = body_of(
                prompt,
                sampling,
                salt,
                priority,
                stream=chance.random() < 0.5,
                usage=seed % 2 == 0,
                usage_often=seed % 4 == 0,
            )
            self.ask_router(body, lambda told: self._answered(client, told))
        else:
            engines = self._engines("any")
            if not engines:
                self._later(client)
                return
            self.ask(chance.choice(engines), prompt, sampling, salt, priority, again)

    def _answered(self, client: int, told: Told) -> None:
        pause = 0.0 if told.right else self._clockwork.chance.expovariate(1.0 / OUTAGES_S)
        self._clockwork.after(pause, f"client {client} is told", lambda: self._later(client))

    def ask_router(self, body: bytes, then: Callable[[Told], None]) -> None:
        """A request through the router. `then` is told once what its client gets."""
        if self.router is None or self.network is None:
            raise RuntimeError("there is no router")
        laws, wish = self.network.laws, wish_of(body)
        self._number += 1
        number = self._number

        def told(what: Told) -> None:
            laws.ended(number, what)
            self._count(what)
            if isinstance(what.end, Finish) and what.reply is not None and what.reply.status == 200:
                check_answer(what.reply, wish, self._right(next(iter(self._lives.values())), wish), law="R4")
            then(what)

        laws.begins(number, body)
        self.router.send(read_call(body), told, number=number, stream=wish.stream)

    def _count(self, told: Told) -> None:
        self.counts["not served"] += isinstance(told.end, GiveUp)
        self.counts["broken off"] += isinstance(told.end, BreakOff)
        if self.router is not None:
            self.counts["parameters refused"] = self.router.tally.stats.fallbacks.get("params_refused")

    def split(
        self,
        first: SimEngine,
        second: SimEngine,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        salt: str,
        priority: int,
        then: Then,
        *,
        request_id: str | None = None,
    ) -> None:
        """Through a router that has these two lives behind it, waits as long as they take and checks nobody's
        health, so that nobody is asked twice. `request_id`: at both; None: they are numbered."""
        here = Direct(self, {engine.host: engine for engine in (first, second)})
        router = SimRouter(self._clockwork, here, prefill=(first.host,), decode=(second.host,), options=None)
        call = read_call(body_of(prompt, sampling, salt, priority))
        router.send(call, lambda told: then(None, told.right), request_id=request_id)

    def ask(
        self,
        engine: SimEngine,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        salt: str,
        priority: int,
        then: Then,
        *,
        request_id: str | None = None,
    ) -> None:
        """One request to one engine, without a server before it. `then` is called once."""
        self._number += 1
        clockwork = self._clockwork
        wish = Wish(prompt_token_ids=prompt, sampling=sampling, salt=salt, priority=priority)
        request = Request(
            request_id=request_id or f"{engine.host}-{engine.epoch[:4]}-{self._number}",
            prompt_token_ids=prompt,
            sampling=sampling,
            eos_token_ids=(END,),
            cache_salt=salt,
            priority=priority,
        )
        try:
            self._submit(engine, wish, request, lambda reply: then(None, reply is not None and reply.right))
        except (EngineError, RequestRefused):
            self.counts["refused"] += 1
            delay = clockwork.chance.expovariate(1.0 / REFUSALS_S)
            clockwork.after(delay, f"{engine.host} has refused", lambda: then(None, False))

    def _submit(
        self,
        engine: SimEngine,
        wish: Wish,
        request: Request,
        hear: Hear,
        *,
        stream: bool = False,
        envelope: Envelope | None = None,
    ) -> Ask:
        """Raises: EngineError, RequestRefused: the engine does not take it."""
        if not engine.alive:
            raise EngineError("nobody listens")
        right = self._right(engine, wish)
        writer = ChunkWriter(envelope, self._tokenizer) if stream and envelope is not None else None
        ask = Ask(engine, wish, request, right, hear, stream, envelope, writer)
        engine.submit(request, lambda delta: self._sink(ask, delta))
        if request.request_id not in self.asks:
            self._learn(engine, ask)
        self.asks[request.request_id] = ask
        self.counts["asked"] += 1
        return ask

    # Servers, as a router meets them: see `jaxserve.sim.http.Servers`.

    def lives(self) -> Mapping[str, SimEngine]:
        """Of every host its current life, or its last one."""
        for engine in self._engines("any"):
            self._lives[engine.host] = engine
        return self._lives

    def life(self, host: str) -> SimEngine:
        """See `Servers`."""
        return self.lives()[host]

    def health(self, engine: SimEngine) -> int:
        """See `Servers`."""
        return self._server(engine).health()

    def serve(
        self,
        engine: SimEngine,
        body: bytes,
        hear: Hear,
        *,
        stream: bool,
        request_id: str | None,
        read: bool = True,
    ) -> Ask | None:
        """See `Servers`."""
        host, clockwork = engine.host, self._clockwork
        if not engine.alive:
            clockwork.after(TRAVEL_S, f"{host} does not listen", lambda: hear(None))
            return None
        try:
            prepared = self._server(engine).read(body)
            wish, (request,) = wish_of(body), prepared.requests
            if request.priority != wish.priority:  # all else shows in pages and answers
                raise Broken("I22", f"{host}: priority {wish.priority} was asked for, not {request.priority}")
            if request_id is not None:
                request = replace(request, request_id=request_id)
            envelope = prepared.envelope if read or request.lease else None
            return self._submit(engine, wish, request, hear, stream=stream, envelope=envelope)
        except (ApiError, EngineError, RequestRefused) as failure:
            self.counts["refused"] += 1
            reply = refusal(failure)
            clockwork.after(TRAVEL_S, f"{host} refuses with {reply.status}", lambda: hear(reply))
            return None

    def cancel(self, ask: Ask) -> None:
        """See `Servers`."""
        ask.aborted = True
        ask.engine.abort(ask.request.request_id)

    def _server(self, engine: SimEngine) -> SimServer:
        server = self._servers.get(engine.epoch)
        if server is None:
            server = self._servers[engine.epoch] = SimServer(engine, self._tokenizer)
        return server

    def probe(self, first: SimEngine, second: SimEngine, length: int, over: list[bool]) -> None:
        """A prompt that nobody has seen goes through two engines; `over` gets whether it was answered."""
        prompt = tuple(self._clockwork.chance.randrange(END - 3) for _ in range(length))
        sampling = SamplingParams(temperature=0.0, max_tokens=2, seed=1, ignore_eos=True)
        self.split(first, second, prompt, sampling, "", 0, lambda params, ok: over.append(ok))

    def abort(self, ask: Ask) -> None:
        """The client has gone: from its router, which lets go of the engine, or from the engine."""
        if self.router is None or not self.router.forsake(ask):
            self.cancel(ask)

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

    def _right(self, engine: SimEngine, wish: Wish) -> list[Expected]:
        return [
            expected(
                self._model,
                wish,
                index,
                max_model_len=engine.node.scheduler.max_model_len,
                tokenizer=self._tokenizer,
            )
            for index in range(wish.sampling.n)
        ]

    def _learn(self, engine: SimEngine, ask: Ask) -> None:
        config, wish = engine.node.scheduler, ask.wish
        for right in ask.right:
            self._names.learn(
                (*wish.prompt_token_ids, *right.tokens),
                cache_key=config.cache_key,
                salt=wish.salt,
                private="" if config.enable_prefix_caching else ask.request.request_id,
                page_size=config.page_size,
            )

    # What comes back.

    def _sink(self, ask: Ask, delta: Delta) -> None:
        if ask.lost:
            return
        try:
            ask.take(delta, self._excused)
            self._tell(ask)
        except Broken as broken:
            self.broken = self.broken or broken

    def _tell(self, ask: Ask) -> None:
        """What has come goes to whoever asked."""
        host = ask.engine.host
        if ask.stream and not ask.over and ask.failure is None and not ask.deaf:
            if ask.begun:
                ask.hear(BEGUN)
            else:
                ask.begun = True
                self._clockwork.after(TRAVEL_S, f"{host} begins to answer", lambda: ask.hear(BEGUN))
        if not ask.over:
            return
        del self.asks[ask.request.request_id]
        gone = ask.aborted or FinishReason.ABORT in ask.ended.values()
        self.counts["right" if ask.whole else "aborted" if gone else "failed"] += 1
        if not ask.deaf:
            reply = ask.reply(self._tokenizer)
            if reply.status == 200 and reply.body:
                check_answer(reply, ask.wish, ask.right, law="I24")
            self._clockwork.after(TRAVEL_S, f"{host} answers {reply.status}", lambda: ask.hear(reply))

    def _excused(self, ask: Ask, message: str) -> bool:
        """Whether a fault explains an error."""
        epoch, transfer = ask.engine.epoch, ask.engine.node.scheduler.transfer
        if message == LOAD_FAILED:
            return transfer is not None and transfer.failure_policy == "fail"
        if message == "the engine has stopped":
            return ask.engine.has_aborted
        if message == "the request failed":
            return (epoch, "tokenizer") in self.excuses
        return (ask.request.request_id, message) in self.struck
