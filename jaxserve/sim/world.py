"""One simulated cluster from one seed: engines, network, clients, faults, and the laws that must hold.

A run has two phases (as in TigerBeetle's VOPR): first faults strike, then they stop, and everything that was
accepted must end and every page come back.
"""

import gc
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from jaxserve.sim.clients import Clients, Habits
from jaxserve.sim.clockwork import Clockwork
from jaxserve.sim.cover import RARE, Met, states
from jaxserve.sim.device import SimDevice
from jaxserve.sim.engine import Node, SimEngine, Surroundings
from jaxserve.sim.expect import SimTokenizer
from jaxserve.sim.fake_nixl import FakeNixlNetwork
from jaxserve.sim.faults import RARE_BOOST, STRIKES, Storm
from jaxserve.sim.hash_model import HashModel
from jaxserve.sim.laws import Broken, Laws, Names, no_leak
from jaxserve.sim.recount import Recount
from jaxserve.sim.wire import SimWire
from scheduler.types import Inputs, Plan

SMALL_POOL = 64
"""Worlds with pools of up to so many pages are recounted after every event."""
LARGE_EVERY = 50
"""Larger ones after so many."""
CALM_S = 1500.0
"""Virtual seconds in which everything must have ended once faults have stopped: beyond the longest lease,
transfer deadline, quarantine and compilation that a world can have."""
CALM_EVENTS = 60_000
HEALS = 3
HEAL_S = 2.0
"""Attempts, and virtual seconds before each, after which a decode engine must have read from a prefill engine
again: one may still wait for the end of what a fault has begun."""
CALM_ASKING = 100
"""Events after the faults in which clients still ask."""
LOOK_EVERY = 20
"""Events between looks at which requests the lasting faults are with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A world before its first event.

    Attributes:
        nodes: prefill engines, decode engines and others.
        prefill, decode: names of those that a split request can go to.
        rates: of faults.
        lasting: properties of this world that count as faults.
        offsets, drift: of engines' clocks, by name.
    """

    model: HashModel
    nodes: tuple[Node, ...]
    prefill: tuple[str, ...]
    decode: tuple[str, ...]
    rates: dict[str, float]
    lasting: tuple[str, ...]
    habits: Habits
    num_clients: int
    offsets: dict[str, float]
    drift: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A run that broke no law. Attributes: events: of both phases; met: which faults met which requests."""

    seed: int
    events: int
    virtual_s: float
    trace: str
    met: Met
    counts: dict[str, int]
    tokens: dict[str, int]
    lives: int


class Failed(AssertionError):
    """A run that broke a law. Attributes: seed, events: how far it came; law: which; last: events before."""

    def __init__(self, seed: int, events: int, trace: str, broken: BaseException, last: list[str]) -> None:
        what = f"{type(broken).__name__}: {broken}" if not isinstance(broken, Broken) else str(broken)
        super().__init__(f"seed {seed}, event {events}: {what}")
        self.seed, self.events, self.trace, self.last = seed, events, trace, last
        self.law = broken.law if isinstance(broken, Broken) else "I17"


class World:
    """A cluster that runs."""

    def __init__(self, seed: int, draw: Callable[[Clockwork], Setup]) -> None:
        self.seed = seed
        self.clockwork = Clockwork(seed)
        self.setup = setup = draw(self.clockwork)
        self.met: Met = Counter()
        self.storm = Storm(self.clockwork, dict(setup.rates), self.meet)
        self.nixl = FakeNixlNetwork(clock=lambda: self.clockwork.now, draw=self.storm.transfer)
        self.wire = SimWire(self.clockwork, self.storm.judge, self.storm.refuses)
        self.tokenizer = SimTokenizer()
        self.names = Names(setup.model)
        self.laws = Laws(self.names, self.nixl)
        self.clients = Clients(self.clockwork, setup.model, self.names, setup.habits, self._engines)
        self.engines: dict[str, SimEngine] = {}
        self.lives: list[SimEngine] = []
        self.recounts: dict[str, Recount] = {}
        self.accepted: Counter[str] = Counter()
        self._nodes = {node.name: node for node in setup.nodes}
        self._small = all(node.scheduler.num_pages <= SMALL_POOL for node in setup.nodes)
        self._complaints = Complaints()
        self._around = Surroundings(
            clockwork=self.clockwork,
            wire=self.wire,
            nixl=self.nixl,
            weather=self.storm,
            tokenizer=self.tokenizer,
        )
        for node in setup.nodes:
            self.start(node.name)

    # The run.

    def run(self, events: int) -> Ran:
        """Faults for so many events, then calm.

        Raises:
            Failed: a law is broken.
        """
        # An agent of the fake NIXL is deleted when nobody refers to it: never at the whim of the collector.
        collects = gc.isenabled()
        gc.disable()
        with self._complaints:
            try:
                self.clients.begin(self.setup.num_clients)
                while self.clockwork.events < events and self.clockwork.run_one():
                    self._after_event()
                    self._strike()
                self._calm()
            except Exception as error:
                raise Failed(
                    self.seed, self.clockwork.events, self.clockwork.trace, error, list(self.clockwork.last)
                ) from error
            finally:
                if collects:
                    gc.enable()
        tokens: Counter[str] = Counter()
        for engine in self.lives:
            tokens.update(engine.core.stats.prompts.by_source())
        return Ran(
            seed=self.seed,
            events=self.clockwork.events,
            virtual_s=self.clockwork.now,
            trace=self.clockwork.trace,
            met=self.met,
            counts=self.clients.counts,
            tokens=dict(tokens),
            lives=len(self.lives),
        )

    def meet(self, fault: str, hosts: Iterable[str]) -> None:
        """A fault strikes these hosts now."""
        for host in dict.fromkeys(hosts):
            engine = self.engines.get(host)
            if engine is not None and engine.alive:
                self.met.update((fault, state) for state in states(engine))

    def start(self, name: str) -> SimEngine:
        """A new life of an engine."""
        node = self._nodes[name]
        chance = self.clockwork.chance
        for lasting in (self.storm.no_files, self.storm.stalled):
            lasting.discard(name)  # a new process
        self.storm.rare.discard(name)
        device = SimDevice(
            model=self.setup.model,
            num_pages=node.scheduler.num_pages,
            page_size=node.scheduler.page_size,
            fill=chance.randbytes,
            fate=lambda: self.storm.step_fate(name),
        )
        engine = SimEngine(
            node,
            self._around,
            device,
            epoch=f"{chance.getrandbits(128):032x}",
            offset=self.setup.offsets[name],
            rate=self.setup.drift[name],
            recorder=self._recorded,
        )
        self.storm.knows(engine)
        self.engines[name] = engine
        self.lives.append(engine)
        windowed = any(window is not None for window in node.scheduler.windows)
        self.recounts[engine.epoch] = Recount(node.scheduler.page_size, windowed=windowed)
        return engine

    # After each event.

    def _after_event(self) -> None:
        if self.clients.broken is not None:
            raise self.clients.broken
        self._complaints.check(self.clients.excuses)
        count = self.clockwork.events
        if count % LOOK_EVERY == 0:
            self._look()
        if self._small or count % LARGE_EVERY == 0:
            alive = [engine for engine in self.engines.values() if engine.alive]
            self.laws.check_transfers(alive)
            for engine in alive:
                if engine.turned:
                    self.laws.check(engine)
                if engine.touched:
                    self.laws.check_content(engine)
                engine.touched = engine.turned = False

    def _look(self) -> None:
        """Counts what lasts."""
        storm, everywhere = self.storm, tuple(self.engines)
        for fault in self.setup.lasting:
            self.meet(fault, everywhere)
        for fault, hosts in (
            ("X3", [engine.host for engine in self.engines.values() if engine.paused]),
            ("X4", storm.slow),
            ("X11", [host for pair in storm.cut for host in pair]),
            ("X12", storm.mute and everywhere),
            ("X45", storm.no_files),
        ):
            self.meet(fault, sorted(hosts))
        storm.under_way(self.nixl.under_way(), self._leased)

    def _recorded(self, engine: SimEngine, inputs: Inputs, plan: Plan) -> None:
        """Every step of every engine."""
        host, storm = engine.host, self.storm
        note = (plan.step_id, len(plan.rows), plan.accepted.tokens.tolist(), len(plan.moves.commands))
        self.clockwork.note(f"{host} plan {note}")
        self.clients.strike(engine, inputs, plan, storm.failed_steps, storm.not_finite)
        self.accepted[engine.epoch] += len(plan.accepted.tokens)
        try:
            self.recounts[engine.epoch].take(inputs, plan)
        except AssertionError as error:
            raise Broken("I11", f"{host}: {error or 'the recount says otherwise'}") from error
        self.laws.step(engine, inputs, plan)
        if any(state in RARE for state in states(engine)):
            storm.rare.add(host)
        else:
            storm.rare.discard(host)
        if any(outcome == "dropped_cpu_full" for _, outcome, _ in plan.moves.outcomes):
            self.meet("X24", (host,))

    def _leased(self, host: str, addresses: list[int]) -> bool:
        """Whether all pages at these addresses are leased."""
        engine = self.engines[host]
        if not isinstance(engine.device, SimDevice):
            return True
        leased = {page for row in engine.core.state.ledger.leases() for page in row.pages}
        size = engine.device.page_bytes
        for pool in engine.device.pools:
            low = pool.ctypes.data
            if low <= addresses[0] < low + pool.nbytes:
                return all((address - low) // size in leased for address in addresses)
        return False

    # Faults.

    def _strike(self) -> None:
        clockwork = self.clockwork
        draw = clockwork.chance.random()
        if self.storm.rare:
            draw /= RARE_BOOST
        for fault, rate in self.storm.rates.items():
            if fault in STRIKES:
                if draw < rate:
                    clockwork.note(f"fault {fault}")
                    clockwork.last.append(f"{clockwork.now:12.6f} FAULT {fault}")
                    STRIKE[fault](self)
                    return
                draw -= rate

    def _some_engine(self) -> SimEngine | None:
        running = [engine for engine in self.engines.values() if engine.alive and not engine.paused]
        rare = [engine for engine in running if engine.host in self.storm.rare]
        if rare and self.clockwork.chance.random() < 0.8:
            running = rare
        return self.clockwork.chance.choice(running) if running else None

    def kill(self) -> None:
        """X1, X2."""
        engine = self._some_engine()
        if engine is not None:
            self.meet("X1", self._around_of(engine))
            self._end(engine, engine.kill)

    def pause(self) -> None:
        """X3."""
        engine = self._some_engine()
        if engine is not None:
            self.meet("X3", self._around_of(engine))
            engine.pause()
            self._later(self._duration(0.01, 60.0), lambda: engine.resume() if engine.paused else None)

    def slow(self) -> None:
        """X4."""
        self._for_a_while("X4", self.storm.slow, self._duration(0.1, 5.0))

    def upgrade(self) -> None:
        """X5."""
        engine = self._some_engine()
        if engine is not None:
            self.meet("X5", self._around_of(engine))
            node = self._nodes[engine.host]
            key = "model-b" if node.scheduler.cache_key == "model-a" else "model-a"
            self._nodes[engine.host] = replace(node, scheduler=replace(node.scheduler, cache_key=key))
            self._end(engine, engine.kill)

    def cut(self) -> None:
        """X11."""
        chance = self.clockwork.chance
        if len(self._nodes) > 1:
            here, there = chance.sample(sorted(self._nodes), 2)
            self.meet("X11", (here, there))
            self.storm.cut.add((here, there))
            self._later(self._duration(0.05, 20.0), lambda: self.storm.cut.discard((here, there)))

    def mute(self) -> None:
        """X12."""
        self._for_a_while("X12", self.storm.mute, self._duration(0.05, 20.0))

    def write_late(self) -> None:
        """X19."""
        if self.nixl.deliver_late():
            self.meet("X19", tuple(self.engines))

    def flip_bit(self) -> None:
        """X27."""
        engine, chance = self._some_engine(), self.clockwork.chance
        transfer = None if engine is None else engine.node.scheduler.transfer
        if engine is None or transfer is None:
            return
        checked = [index for index in sorted(engine.hosts) if transfer.leaves[index].digest]
        if not checked:
            return
        index = chance.choice(checked)
        rank = chance.randrange(len(engine.hosts[index]))
        memory = engine.hosts[index][rank].memory
        row = chance.randrange(len(memory))
        memory[row, chance.randrange(memory.shape[1])] ^= 1 << chance.randrange(8)
        self.laws.flipped.add((engine.epoch, index, rank, row))
        self.meet("X27", (engine.host,))

    def disconnect(self) -> None:
        """X33."""
        self._abort("X33", 1)

    def abort_twice(self) -> None:
        """X36."""
        self._abort("X36", 2)

    def use_id_twice(self) -> None:
        """X35."""
        asks = [ask for ask in self.clients.asks.values() if ask.engine.alive]
        if asks:
            ask = self.clockwork.chance.choice(asks)
            request, refused = ask.request, self.clients.counts["refused"]
            self.meet("X35", (ask.engine.host,))
            self.clients.ask(
                ask.engine, request.prompt_token_ids[::-1], request.sampling, "", 0,
                lambda params, ok: None, request_id=request.request_id,
            )  # fmt: skip
            if self.clients.counts["refused"] == refused and ask.request.request_id in self.clients.asks:
                raise Broken("I15", f"{ask.engine.host}: an id in use was taken again")

    def retry_storm(self) -> None:
        """X37."""
        engine = self._some_engine()
        if engine is not None:
            self.meet("X37", (engine.host,))
            self.clients.repeat(engine, 8)

    def jump_clock(self) -> None:
        """X38: a monotonic clock jumps forward only, as when a machine was asleep."""
        engine = self._some_engine()
        if engine is not None:
            self.meet("X38", self._around_of(engine))
            engine.offset += 3600.0
            engine.wake()

    def ask_to_end(self) -> None:
        """X41."""
        engine = self._some_engine()
        if engine is not None and engine.draining_until is None:
            self.meet("X41", self._around_of(engine))
            self.clients.excuses.add((engine.epoch, "closed"))
            engine.drain(self._duration(0.5, 30.0), lambda ended: self._end(ended, lambda: None))

    def break_tokenizer(self) -> None:
        """X42."""
        self.meet("X42", tuple(self.engines))
        self.tokenizer.failing = 1
        self.clients.excuses.add(("", "tokenizer"))

    def stall(self) -> None:
        """X43."""
        engine = self._some_engine()
        if engine is not None:
            self.storm.stalled.add(engine.host)

    def no_files(self) -> None:
        """X45."""
        self._for_a_while("X45", self.storm.no_files, self._duration(0.1, 10.0))

    def forget(self) -> None:
        """X46."""
        engine = self._some_engine()
        if engine is not None and engine.draining_until is None:
            self.meet("X46", (engine.host,))
            external = self.clockwork.chance.random() < 0.5
            engine.core.inbox.reset_prefix_cache(lambda: None, external=external)
            engine.wake()

    def _abort(self, fault: str, times: int) -> None:
        asks = [ask for ask in self.clients.asks.values() if ask.engine.alive and not ask.aborted]
        asks = [ask for ask in asks if ask.engine.host in self.storm.rare] or asks
        if asks:
            ask = self.clockwork.chance.choice(asks)
            self.meet(fault, (ask.engine.host,))
            for _ in range(times):
                self.clients.abort(ask)

    def _around_of(self, engine: SimEngine) -> tuple[str, ...]:
        """The hosts that notice when something happens to an engine."""
        return tuple(self.engines)

    def _for_a_while(self, fault: str, where: set[str], seconds: float) -> None:
        engine = self._some_engine()
        if engine is not None:
            self.meet(fault, (engine.host,))
            where.add(engine.host)
            self._later(seconds, lambda: where.discard(engine.host))

    def _duration(self, low: float, high: float) -> float:
        return low * (high / low) ** self.clockwork.chance.random()

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        self.clockwork.after(seconds, "a fault ends", action)

    def _end(self, engine: SimEngine, how: Callable[[], None]) -> None:
        """A life is over; another begins some time later."""
        how()
        self.clients.connection_lost(engine)
        self._later(self._duration(0.1, 20.0), lambda: self._again(engine))

    def _again(self, engine: SimEngine) -> None:
        if self.engines[engine.host] is engine:
            self.start(engine.host)

    # The end.

    def _calm(self) -> None:
        """Faults stop; whatever lives must end, and every page come back.

        Raises:
            Broken: it does not.
        """
        self.storm.calm()
        self.tokenizer.failing = 0
        if self.clockwork.chance.random() < 0.97:  # else hanging transfers hang until their agent is deleted
            self.nixl.deliver_late()
        for engine in tuple(self.engines.values()):
            if engine.paused:
                engine.resume()
            if not engine.alive:
                self._again(engine)
        until, most = self.clockwork.now + CALM_S, self.clockwork.events + CALM_EVENTS
        served = {engine.host: len(engine.core.state.sequences) for engine in self.engines.values()}
        asking_until = self.clockwork.events + CALM_ASKING
        while not self._quiet():
            if self.clockwork.events > asking_until:
                self.clients.asking = False
            if not self.clockwork.run_one():
                break
            self._after_event()
            if self.clockwork.now > until or self.clockwork.events > most:
                live = {name: len(engine.core.state.sequences) for name, engine in self.engines.items()}
                rows = {name: len(engine.core.state.ledger) for name, engine in self.engines.items()}
                raise Broken("I12", f"not all ends: sequences {live} of {served}, moves {rows}")
        if self.clients.asks:
            raise Broken("I12", f"requests {sorted(self.clients.asks)} were never answered")
        self._healed(most)
        for engine in self.engines.values():
            self.laws.check(engine)
            self.laws.check_content(engine)
            no_leak(engine)
            self._sums(engine)

    def _healed(self, most: int) -> None:
        """I18: whatever has happened, each decode engine reads from each prefill engine again.

        Raises:
            Broken: one computes by itself.
        """
        for first, second in itertools.product(self.setup.prefill, self.setup.decode):
            lender, reader = self.engines[first].node.scheduler, self.engines[second].node.scheduler
            windowed = any(window is not None for window in reader.windows)
            if lender.cache_key != reader.cache_key or (windowed and lender.page_size != reader.page_size):
                continue  # other pages, or larger ones of which the peer's window has left a part behind
            if not any(self._reads(first, second, most) for _ in range(HEALS)):
                raise Broken("I18", f"{second} reads nothing from {first} any more")

    def _reads(self, first: str, second: str, most: int) -> bool:
        """Whether a prompt that nobody has seen is read.

        Raises:
            Broken: its request does not end.
        """
        reader, over = self.engines[second], []
        before = reader.core.stats.prompts.external_kv_transfer
        length = min(2 * reader.node.scheduler.page_size + 1, self.setup.habits.max_prompt)
        self.clockwork.after(
            HEAL_S, "looks", lambda: self.clients.probe(self.engines[first], reader, length, over)
        )
        while not (over and self._quiet()):
            if not self.clockwork.run_one() or self.clockwork.events > most:
                raise Broken("I12", f"a last request through {first} and {second} does not end")
            self._after_event()
        return over[-1] and reader.core.stats.prompts.external_kv_transfer > before

    def _quiet(self) -> bool:
        return (
            not self.clients.asking
            and not self.clients.asks
            and all(
                engine.alive
                and engine.draining_until is None
                and not engine.core.state.sequences
                and not len(engine.core.state.ledger)
                and engine.core.idle
                for engine in self.engines.values()
            )
        )

    def _sums(self, engine: SimEngine) -> None:
        """I11: the sum over requests is what the counters say, and what the recount says."""
        stats, recount = engine.core.stats.prompts, self.recounts[engine.epoch]
        each = recount.prefilled.values()
        sums = (
            sum(one.local_compute for one in each),
            sum(one.local_cache_hit for one in each),
            sum(one.external_kv_transfer for one in each),
        )
        counted = (stats.computed, stats.local_cache_hit, stats.external_kv_transfer)
        generated = engine.core.stats.steps.generation_tokens
        if generated != self.accepted[engine.epoch]:
            raise Broken("I19", f"{engine.host}: {self.accepted[engine.epoch]} tokens, counted {generated}")
        if sums != counted:
            raise Broken("I11", f"{engine.host}: requests sum to {sums}, counters say {counted}")

    def _engines(self, kind: str) -> list[SimEngine]:
        names = {"prefill": self.setup.prefill, "decode": self.setup.decode}.get(kind)
        return [
            engine
            for name, engine in self.engines.items()
            if engine.alive and engine.draining_until is None and (names is None or name in names)
        ]


STRIKE: dict[str, Callable[[World], None]] = {
    "X1": World.kill,
    "X3": World.pause,
    "X4": World.slow,
    "X5": World.upgrade,
    "X11": World.cut,
    "X12": World.mute,
    "X19": World.write_late,
    "X27": World.flip_bit,
    "X33": World.disconnect,
    "X35": World.use_id_twice,
    "X36": World.abort_twice,
    "X37": World.retry_storm,
    "X38": World.jump_clock,
    "X41": World.ask_to_end,
    "X42": World.break_tokenizer,
    "X43": World.stall,
    "X45": World.no_files,
    "X46": World.forget,
}


class Complaints(logging.Handler):
    """I13: what the engine logs as an error is an exception that somebody swallowed."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._said: list[logging.LogRecord] = []
        self._logger = logging.getLogger("jaxserve")
        self._before = (self._logger.level, self._logger.propagate)

    def __enter__(self) -> "Complaints":
        self._before = (self._logger.level, self._logger.propagate)
        self._logger.addHandler(self)
        self._logger.setLevel(logging.ERROR)
        self._logger.propagate = False
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._before[0])
        self._logger.propagate = self._before[1]

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a record."""
        self._said.append(record)

    def check(self, excuses: set[tuple[str, str]]) -> None:
        """Raises: Broken: something was logged that no fault explains."""
        said, self._said = self._said, []
        tokenizer = ("", "tokenizer") in excuses
        for record in said:
            error = record.exc_info[1] if record.exc_info else None
            if tokenizer and "the tokenizer has failed" in str(error):
                continue
            raise Broken("I13", f"{record.getMessage()}: {error!r}")
