"""One prefill engine, one decode engine, 3 pages each, 2 requests: a world whose every next event is chosen.

It is made of the same parts as a drawn world: `SimEngine` on the production core, connectors and protocol,
`SimWire`, `FakeNixlNetwork`, `SimDevice`, `Clients`, `Laws`. Only the clockwork differs: events do not come
by their time, an explorer chooses among all that can come now. What can come:

- an engine's turn, the end of its step, a client's next action: whatever is due within SOON_S;
- an engine's round of transfers, with the first k of the messages on their way to it, and with or without
  its transfer being over by then. A message does nothing but wait for the round that hears it, and a
  finished transfer for the round that polls it: that they come at any time before is the same as that they
  come with the round. Messages of one direction arrive in their order, unless a fault lets one be overtaken;
- time passes, to the next timer; only when nothing else is left, or as a fault of one engine's clock;
- what a fault has left open: a dead engine begins a new life, a stopped one goes on, a transfer that nobody
  waits for writes late. Each of them at any time later, or never;
- one fault.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from random import Random
from typing import Any

from jaxserve.sim.clients import Clients, Habits
from jaxserve.sim.device import SimDevice, StepFate
from jaxserve.sim.engine import Node, SimEngine, Surroundings
from jaxserve.sim.expect import SimTokenizer
from jaxserve.sim.fake_nixl import FakeNixlNetwork, Fault, Posted
from jaxserve.sim.hash_model import HEAD_DIM, HEADS, ITEM, LAYERS, HashModel
from jaxserve.sim.laws import Broken, Laws, Names, no_leak
from jaxserve.sim.recount import Recount
from jaxserve.sim.steered import (
    DIGEST_FINDS,
    ENGINE_FAULTS,
    HOSTS,
    LEASE_S,
    MAX_LEN,
    MESSAGE_FAULTS,
    MOST_WAITS,
    PAGE_SIZE,
    PAGES,
    PARTS,
    SOON_S,
    STEP_FAULTS,
    TIMEOUT_S,
    TRANSFER_FAULTS,
    TRAVEL_S,
    Calm,
    Choose,
    Option,
    Scheduled,
    Steered,
    Variant,
    captured,
    other,
)
from jaxserve.sim.wire import Fate, SimWire
from jaxserve.sim.world import Complaints
from kv.channel import ChannelError
from kv.config import CONSUMER, NIXL, PRODUCER, ConnectorConfig
from scheduler.types import Inputs, Limits, Plan, SamplingParams, SchedulerConfig


class _Still(Random):
    """Chance that always gives the same, so that no state hides in it."""

    def random(self) -> float:
        return 0.0


@cache
def _tokenizer() -> SimTokenizer:
    """One for all worlds: it never fails here, and so has no state."""
    return SimTokenizer()


class SmallWorld:
    """A world that runs by choices.

    Attributes:
        fault: the one that has happened; None: none so far.
        client_ended: per client, how its request ended; None: not yet.
    """

    def __init__(self, variant: Variant, choose: Choose) -> None:
        self.variant = variant
        self.clockwork = Steered()
        self.clockwork.chance = _Still(0)
        self.fault: str | None = None
        self.failed_steps: set[str] = set()
        self.not_finite: set[str] = set()
        self.ended: list[str | None] = [None, None]
        self.open: dict[str, Callable[[], None]] = {}
        self.waits = 0
        self._choose = choose
        self.transfer_time = 0.0
        self._lives = 0
        model = HashModel()
        self.nixl = FakeNixlNetwork(clock=lambda: self.transfer_time, draw=self._draw_transfer)
        self.wire = SimWire(self.clockwork, self._judge, lambda host: False)
        names = Names(model)
        self.laws = Laws(names, self.nixl)
        habits = Habits(documents=(), split=1.0, think_s=1.0, max_prompt=MAX_LEN - 1, max_tokens=2)
        self.clients = Clients(self.clockwork, model, names, habits, lambda kind: [])
        self.engines: dict[str, SimEngine] = {}
        self.recounts: dict[str, Recount] = {}
        self.complaints = Complaints()
        self._model = model
        self._around = Surroundings(
            clockwork=self.clockwork,
            wire=self.wire,
            nixl=self.nixl,
            weather=Calm(),
            tokenizer=_tokenizer(),
        )
        for name in HOSTS:
            self._start(name)
        self._ask()

    # What can happen.

    def options(self) -> list[Option]:
        """All that can happen now; empty: it is over, and nothing is left.

        Raises:
            Broken: it does not end.
        """
        self.clockwork.sweep()
        if self._quiet():
            return []
        found = [*self._due()]
        opened = [Option(label, self._once(label), PARTS) for label in self.open]
        if not found:
            found += self._time_passes()
        found += opened
        if not found:
            raise Broken("I12", f"nothing can happen any more, and requests ended as {self.ended}")
        # A fault comes first: what commutes with it need not be followed by it again.
        return [*self._faults(), *found] if self.fault is None else found

    def _due(self) -> Iterator[Option]:
        clockwork, named = self.clockwork, Counter[str]()
        for timer in clockwork.pending:
            paused = timer.owner is not None and timer.owner.paused
            if timer.kind == "event" and timer.at <= clockwork.now + SOON_S and not paused:
                client = self.whose(timer)
                label = timer.label if client is None else f"{timer.label}, client {client}"
                named[label] += 1
                yield Option(
                    f"{label} ({named[label]})",
                    lambda timer=timer: clockwork.take(timer),
                    self._touched(timer, client),
                )
        for engine in self.engines.values():
            coming = [timer for timer in clockwork.pending if timer.to == engine.host]
            if not engine.alive:
                for timer in coming[:1]:
                    label = f"{timer.label} finds nobody"
                    yield Option(label, lambda timer=timer: clockwork.take(timer), PARTS)
            elif not engine.paused:
                yield from self._rounds(engine, coming)

    def _touched(self, timer: Scheduled, client: int | None) -> frozenset[str]:
        """What a due event touches."""
        host = getattr(timer.owner, "host", None)
        if host is not None:
            return frozenset((host, "lent")) if host == "prefill" else frozenset((host,))
        if client is None:
            return PARTS
        asks = {"client 0 asks": "prefill", "client 1 asks": self.variant.second}
        return frozenset((asks.get(timer.label, "decode"), f"client {client}"))

    def _rounds(self, engine: SimEngine, coming: list[Scheduled]) -> Iterator[Option]:
        now = self.clockwork.now
        due = any(
            timer.kind == "round" and timer.owner is engine and timer.at <= now + SOON_S
            for timer in self.clockwork.pending
        )
        polls = self._readable(engine)
        here, there = engine.host, other(engine.host)
        touches = frozenset((here, f"last>{there}", *(("lent",) if here == "decode" else ())))
        for heard in range(len(coming) + 1):
            label = f"{here} round, {heard} heard"
            parts = touches | {f"first>{here}"} if heard else touches
            if heard or due:
                yield Option(label, lambda n=heard: self._round(engine, coming[:n], ends=False), parts)
            if polls:
                over = f"{label}, its transfer over"
                yield Option(over, lambda n=heard: self._round(engine, coming[:n], ends=True), parts)

    def _round(self, engine: SimEngine, heard: list[Scheduled], *, ends: bool) -> None:
        for timer in heard:
            self.clockwork.take(timer)
        if ends:
            self.transfer_time += 2.0
        rounds = engine.rounds[0]
        rounds.wake()
        timer = rounds._timer
        if not isinstance(timer, Scheduled):
            raise TypeError("a round that was asked for has no timer")
        self.clockwork.take(timer)

    def _readable(self, engine: SimEngine) -> bool:
        """A poll of one of this engine's transfers would bring something."""
        lives, peers = self.nixl._lives, engine.rounds[0].transfers._peers.values()
        if not any(peer.stuck or peer._reading for peer in peers):
            return False
        for transfer in self.nixl._transfers:
            if lives[transfer.reader].name in engine.agents():
                source = lives[transfer.source].state
                over = source in ("dead", "deleted")
                if over or (source == "alive" and not transfer.fault.never_ends and not transfer.ended):
                    return True
        return False

    def _time_passes(self) -> Iterator[Option]:
        times = [
            timer.at
            for timer in self.clockwork.pending
            if timer.kind != "message" and (timer.owner is None or not timer.owner.paused)
        ]
        if times:
            yield Option("time passes", lambda: self._pass(min(times)), PARTS)

    def _pass(self, until: float) -> None:
        self.clockwork.now = max(self.clockwork.now, until)
        self.waits += 1
        if self.waits > MOST_WAITS:
            raise Broken("I12", f"it does not end; requests ended as {self.ended}")

    def _once(self, label: str) -> Callable[[], None]:
        return lambda: self.open.pop(label)()

    # Faults.

    def _faults(self) -> Iterator[Option]:
        allowed = self.variant.faults
        for engine in self.engines.values():
            host = engine.host
            for fault in ENGINE_FAULTS:
                if fault not in allowed:
                    continue
                if fault == "kill unheard" and not any(t.to == host for t in self.clockwork.pending):
                    continue
                if fault == "clock" and not self._has_deadlines(engine):
                    continue
                parts = {host} if fault == "clock" else {host, "lent"}
                if fault.startswith("kill"):
                    parts |= {"client 0", "client 1", f"first>{host}", f"last>{host}"}
                yield self._fault(f"{fault} {host}", parts, lambda e=engine, f=fault: self._strike(f, e))
        for client in range(2):
            if "leave" in allowed and self.ended[client] is None:
                ask = self.clients.asks.get(f"request-{client}")
                parts = {f"client {client}", *(() if ask is None else (ask.engine.host,))}
                yield self._fault(f"leave {client}", parts, lambda c=client: self._leave(c))
        for host in HOSTS:
            yield from self._message_faults([timer for timer in self.clockwork.pending if timer.to == host])

    def _message_faults(self, queue: list[Scheduled]) -> Iterator[Option]:
        named = Counter[str]()
        for timer in queue:
            named[timer.label] += 1
            for fault in MESSAGE_FAULTS:
                if fault not in self.variant.faults:
                    continue
                if fault == "overtaken" and timer is queue[-1]:
                    continue
                if fault == "break" and not timer.label.startswith("message"):
                    continue
                parts = {f"first>{timer.to}"}
                if fault != "lose":
                    parts.add(f"last>{other(timer.to) if fault == 'break' else timer.to}")
                label = f"{fault} {timer.label} ({named[timer.label]})"
                yield self._fault(label, parts, lambda t=timer, f=fault: self._spoil(f, t))

    def _fault(self, label: str, parts: set[str], action: Callable[[], None]) -> Option:
        def strike() -> None:
            self.fault = label
            action()

        return Option(label, strike, frozenset(parts), fault=True)

    def _has_deadlines(self, engine: SimEngine) -> bool:
        peers = engine.rounds[0].transfers._peers.values()
        return bool(len(engine.core.state.ledger) or any(not peer.idle for peer in peers))

    def _strike(self, fault: str, engine: SimEngine) -> None:
        host = engine.host
        if fault == "clock":
            engine.offset += max(LEASE_S, TIMEOUT_S) + 1.0
            engine.wake()
            engine.rounds[0].wake()
        elif fault == "stop":
            engine.pause()
            self.open[f"{host} goes on"] = engine.resume
        else:
            if fault == "kill unheard":
                for timer in self.clockwork.pending:
                    timer.cancelled = timer.cancelled or timer.to == host
            engine.kill()
            self.clients.connection_lost(engine)
            self.open[f"{host} begins a new life"] = lambda: self._start(host)

    def _leave(self, client: int) -> None:
        ask = self.clients.asks.get(f"request-{client}")
        if ask is not None:
            self.clients.abort(ask)
            return
        for timer in self.clockwork.pending:  # between the two steps, or before the first
            if timer.kind == "event" and timer.owner is None:
                timer.cancelled = timer.cancelled or self.whose(timer) == client
        self.ended[client] = "left"

    def _spoil(self, fault: str, timer: Scheduled) -> None:
        pending = self.clockwork.pending
        if fault == "twice":
            self.clockwork.after(TRAVEL_S, timer.label, timer.action, timer.owner)
            return
        pending.remove(timer)
        if fault == "overtaken":
            pending.append(timer)
        elif fault == "break":
            told = captured(timer.action)
            self.wire._tell(told["caller"], told["number"], TRAVEL_S, ChannelError("the connection broke"))

    def _draw_transfer(self, posted: Posted) -> Fault:
        names = [name for name in TRANSFER_FAULTS if f"transfer {name}" in self.variant.faults]
        if not self.variant.digest:
            names = [name for name in names if name not in DIGEST_FINDS]
        if self.fault is not None or not names:
            return Fault(seconds=1.0)
        chosen = self._choose(["the transfer is well", *(f"the transfer {name}" for name in names)])
        if chosen == 0:
            return Fault(seconds=1.0)
        self.fault = f"transfer {names[chosen - 1]}"
        if names[chosen - 1] == "never ends":
            self.open["the transfer writes late"] = self._write_late
        return TRANSFER_FAULTS[names[chosen - 1]]

    def _write_late(self) -> None:
        if self.nixl.deliver_late():
            self.engines["decode"].rounds[0].wake()

    def _draw_step(self, host: str) -> StepFate:
        names = [name for name in STEP_FAULTS if f"step {name}" in self.variant.faults]
        if self.fault is not None or not names:
            return StepFate()
        chosen = self._choose(["the step is well", *(f"{host}: the step {name}" for name in names)])
        if chosen == 0:
            return StepFate()
        self.fault = f"step {names[chosen - 1]}"
        fate = STEP_FAULTS[names[chosen - 1]]
        if fate.error is not None:
            self.failed_steps.add(host)
        if fate.not_finite:
            self.not_finite.add(host)
        return fate

    # What is checked.

    def begin_checks(self) -> None:
        """Laws look at an engine after each of its turns, and remember: after a replay they look again."""
        for engine in self.engines.values():
            engine.turned = engine.touched = True

    def check(self) -> None:
        """Raises: Broken: a law is."""
        if self.clients.broken is not None:
            raise self.clients.broken
        self.complaints.check(self.clients.excuses)
        alive = [engine for engine in self.engines.values() if engine.alive]
        self.laws.check_transfers(alive)
        for engine in alive:
            if engine.turned:
                self.laws.check(engine)
            if engine.touched:
                self.laws.check_content(engine)
            engine.turned = engine.touched = False

    def finish(self) -> None:
        """Raises: Broken: something is left, or a request ended otherwise than it must."""
        for engine in self.engines.values():
            if engine.alive:
                self.laws.check(engine)
                self.laws.check_content(engine)
                no_leak(engine)
                self._sums(engine)
        for client, how in enumerate(self.ended):
            if how != "right" and not self._excused():
                raise Broken("I17", f"request {client} ended as {how!r}; the fault is {self.fault!r}")

    def _excused(self) -> bool:
        """Whether a request may end without its answer."""
        if self.fault is None:
            return False
        if self.variant.failure_policy == "fail":
            return True
        return self.fault.startswith(("kill", "leave", "step fails", "step gives"))

    def _sums(self, engine: SimEngine) -> None:
        """I11: requests sum to what the counters say."""
        stats, each = engine.core.stats.prompts, self.recounts[engine.epoch].prefilled.values()
        counted = (stats.computed, stats.local_cache_hit, stats.external_kv_transfer)
        sums = (
            sum(one.local_compute for one in each),
            sum(one.local_cache_hit for one in each),
            sum(one.external_kv_transfer for one in each),
        )
        if sums != counted:
            raise Broken("I11", f"{engine.host}: requests sum to {sums}, counters say {counted}")

    def _quiet(self) -> bool:
        if None in self.ended or any(timer.kind == "message" for timer in self.clockwork.pending):
            return False
        for engine in self.engines.values():
            if not engine.alive:
                continue
            state, core = engine.core.state, engine.core
            rounds = any(
                timer.owner is engine and timer.at <= self.clockwork.now + SOON_S
                for timer in self.clockwork.pending
            )
            if engine.paused or rounds or state.sequences or len(state.ledger) or not core.idle:
                return False
        return True

    # How it begins.

    def _start(self, name: str) -> None:
        transfer = ConnectorConfig(
            kind=NIXL,
            role=PRODUCER if name == "prefill" else CONSUMER,
            failure_policy=self.variant.failure_policy,
            lease_s=LEASE_S,
            transfer_timeout_s=TIMEOUT_S,
            digest=self.variant.digest,
        )
        node = Node(
            name=name,
            engine_id=f"engine-{name}",
            scheduler=SchedulerConfig(
                page_size=PAGE_SIZE,
                num_pages=PAGES + 1,
                max_num_seqs=2,
                max_model_len=MAX_LEN,
                cache_key="model",
                transfer=transfer,
            ),
            limits=Limits(max_num_batched_tokens=MAX_LEN, max_num_seqs=2),
            page_shape=(LAYERS, 2, HEADS, PAGE_SIZE, HEAD_DIM),
            item_bytes=ITEM,
            max_num_queued_reqs=4,
        )
        device = SimDevice(
            model=self._model,
            num_pages=PAGES + 1,
            page_size=PAGE_SIZE,
            fill=lambda count: b"\xaa" * count,
            fate=lambda: self._draw_step(name),
        )
        self._lives += 1
        epoch = f"{self._lives:08x}{0:024x}"
        self.recounts[epoch] = Recount(PAGE_SIZE)
        self.engines[name] = SimEngine(node, self._around, device, epoch=epoch, recorder=self._record)

    def _ask(self) -> None:
        """Both clients may ask at once."""
        first = (1, 2, 3)
        second = (1, 2, 4) if self.variant.shared else (5, 6, 7)
        sampling = SamplingParams(max_tokens=self.variant.outputs, temperature=0.0, seed=1, ignore_eos=True)

        def ask_split() -> None:
            here, there = self.engines["prefill"], self.engines["decode"]
            self.clients.split(here, there, first, sampling, "", 0, self._over(0), request_id="request-0")

        def ask_alone() -> None:
            engine = self.engines[self.variant.second]
            self.clients.ask(engine, second, sampling, "", 0, self._over(1), request_id="request-1")

        self.clockwork.after(0.0, "client 0 asks", ask_split)
        self.clockwork.after(0.0, "client 1 asks", ask_alone)

    def _over(self, client: int) -> Callable[[Mapping[str, Any] | None, bool], None]:
        def over(params: Mapping[str, Any] | None, ok: bool) -> None:
            self.ended[client] = "right" if ok else "not answered"

        return over

    def whose(self, timer: Scheduled) -> int | None:
        """The client that a client's event belongs to."""
        if timer.label.startswith("client"):
            return int(timer.label.split()[1])
        told = captured(timer.action)
        ask = told.get("ask")
        return None if ask is None else int(ask.request.request_id.split("-")[1])

    def _judge(self, here: str, there: str, message: object) -> Fate:
        return Fate(delays=(TRAVEL_S,))

    def _record(self, engine: SimEngine, inputs: Inputs, plan: Plan) -> None:
        self.clients.strike(engine, inputs, plan, self.failed_steps, self.not_finite)
        self.recounts[engine.epoch].take(inputs, plan)
        self.laws.step(engine, inputs, plan)
