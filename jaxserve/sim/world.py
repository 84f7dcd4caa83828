"""One simulated cluster from one seed: engines, network, clients, faults, and the laws that must hold.

A run has two phases (as in TigerBeetle's VOPR): first faults strike, then they stop, and everything that was
accepted must end and every page come back.
"""

import gc
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from jaxserve.sim.broken import Broken
from jaxserve.sim.calm import bound_s
from jaxserve.sim.clients import Clients
from jaxserve.sim.clockwork import Clockwork
from jaxserve.sim.complaints import Complaints
from jaxserve.sim.cover import Cover, Met, Spell
from jaxserve.sim.device import SimDevice
from jaxserve.sim.engine import SimEngine, Surroundings
from jaxserve.sim.excuses import Excuses
from jaxserve.sim.fake_nixl import FakeNixlNetwork
from jaxserve.sim.health import Health
from jaxserve.sim.holders import samplers
from jaxserve.sim.laws import Laws, Names, no_leak
from jaxserve.sim.loads import Loads
from jaxserve.sim.recount import Recount
from jaxserve.sim.setup import Setup
from jaxserve.sim.storm import Storm
from jaxserve.sim.strikes import Strikes
from jaxserve.sim.wire import SimWire
from scheduler.types import Inputs, Plan

SMALL_POOL = 64
"""Worlds with pools of up to so many pages are recounted after every event."""
LARGE_EVERY = 50
"""Larger ones after so many."""
CALM_EVENTS = 60_000
HEALS = 3
HEAL_S = 2.0
"""Attempts, and virtual seconds before each, after which a decode engine must have read from a prefill engine
again: one may still wait for the end of what a fault has begun."""
CALM_ASKING = 100
"""Events after the faults in which clients still ask."""


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
        self.engines: dict[str, SimEngine] = {}
        self.lives: list[SimEngine] = []
        self.nodes = {node.name: node for node in setup.nodes}
        self.cover = Cover(self.engines, lambda: self.clockwork.now)
        self.storm = Storm(self.clockwork, dict(setup.rates), self.cover, pace=setup.pace)
        self.nixl = FakeNixlNetwork(clock=lambda: self.clockwork.now, draw=self.storm.transfer)
        self.wire = SimWire(self.clockwork, self.storm.judge, self.storm.refuses)
        self.laws = Laws(Names(setup.model), self.nixl)
        self._health = Health(self.laws.endings)
        self.clients = Clients(
            self.clockwork, setup.model, self.laws.names, setup.habits, self._engines, self.storm
        )
        self.excuses = Excuses(self.clients.excuses)
        self.loads = Loads(self.cover.history, self.engines, self.laws.flipped)
        self.recounts: dict[str, Recount] = {}
        self._strikes = Strikes(self)
        self._full: dict[str, Spell] = {}
        self._small = all(node.scheduler.num_pages <= SMALL_POOL for node in setup.nodes)
        self._complaints = Complaints()
        for node in setup.nodes:
            self.start(node.name)
        for fault, hosts in setup.lasting:
            if fault != "X24":
                self.cover.begin(fault, hosts)

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
                    self._strikes.maybe()
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
            met=self.cover.met,
            counts=self.clients.counts,
            tokens=dict(tokens),
            lives=len(self.lives),
        )

    def start(self, name: str) -> SimEngine:
        """A new life of an engine."""
        node = self.nodes[name]
        chance = self.clockwork.chance
        device = SimDevice(
            model=self.setup.model,
            num_pages=node.scheduler.num_pages,
            page_size=node.scheduler.page_size,
            fill=chance.randbytes,
            fate=lambda: self.storm.step_fate(name, lambda: samplers(self.engines[name])),
        )
        epoch = f"{chance.getrandbits(128):032x}"
        self.storm.begins(name, epoch)
        around = Surroundings(
            clockwork=self.clockwork,
            wire=self.wire,
            nixl=self.nixl,
            weather=self.storm,
            tokenizer=self.excuses.tokenizer(epoch),
        )
        engine = SimEngine(
            node,
            around,
            device,
            epoch=epoch,
            offset=self.setup.offsets[name],
            rate=self.setup.drift[name],
            recorder=self._recorded,
        )
        self._full[name] = Spell("X24", (name,))
        self.engines[name] = engine
        self.lives.append(engine)
        windowed = any(window is not None for window in node.scheduler.windows)
        self.recounts[engine.epoch] = Recount(node.scheduler.page_size, windowed=windowed)
        return engine

    def around(self, host: str) -> tuple[str, ...]:
        """A host, and those that exchange pages with it."""
        prefill, decode = self.setup.prefill, self.setup.decode
        return (host, *(decode if host in prefill else prefill if host in decode else ()))

    # After each event.

    def _after_event(self) -> None:
        self.clients.look()
        for request_id in self._complaints.check(self.clients.excuses):
            self.cover.strike_text("X42", request_id)
        self._health.look(self.engines.values())
        if self.storm.posted:
            self._follow_transfers()
        if self._small or self.clockwork.events % LARGE_EVERY == 0:
            self.laws.look(self.engines.values())

    def _recorded(self, engine: SimEngine, inputs: Inputs, plan: Plan) -> None:
        """Every step of every engine."""
        host, storm = engine.host, self.storm
        note = (plan.step_id, len(plan.rows), plan.accepted.tokens.tolist(), len(plan.moves.commands))
        self.clockwork.note(f"{host} plan {note}")
        self.clients.strike(engine, inputs, plan, storm.failed_steps, storm.not_finite)
        self.excuses.step(engine)
        self._health.step(engine)
        self.loads.step(engine, inputs, plan, self.clockwork.now)
        try:
            self.recounts[engine.epoch].take(inputs, plan)
        except AssertionError as error:
            raise Broken("I11", f"{host}: {error or 'the recount says otherwise'}") from error
        self.laws.step(engine, inputs, plan)
        self._strikes.decided(engine, plan)
        self._follow_transfers()
        if self.cover.turned(engine):
            storm.rare.add(host)
        else:
            storm.rare.discard(host)
        tiers = [tier for leaf in engine.core.state.leaves for tier in leaf.tiers()]
        if ("X24", (host,)) in self.setup.lasting and any(used == slots for _, used, _, _, slots in tiers):
            self.cover.meet(self._full[host], host)

    def _follow_transfers(self) -> None:
        self.storm.under_way(self.nixl.under_way(), self._leased, self.nixl.has_written)

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

    # The end.

    def _calm(self) -> None:
        """Faults stop; whatever lives must end, and every page come back.

        Raises:
            Broken: it does not.
        """
        self.storm.calm()
        self.excuses.calm()
        for engine in tuple(self.engines.values()):
            if engine.paused:
                engine.resume()
            if not engine.alive:
                self._strikes.again(engine)
        if self.clockwork.chance.random() < 0.97:  # else hanging transfers hang until their agent is deleted
            self.nixl.deliver_late()
        hanging = any(fault.never_ends for _, _, fault, _ in self.nixl.under_way())
        began = self.clockwork.now
        bound = bound_s(
            self.setup.nodes,
            self.engines.values(),
            self.clients.asks.values(),
            pace=self.setup.pace,
            coming_s=self.clockwork.coming_s,
            hanging=hanging,
        )
        until, most = began + bound, self.clockwork.events + CALM_EVENTS
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
            self.laws.sums(engine, self.recounts[engine.epoch])

    def _healed(self, most: int) -> None:
        """I18: whatever has happened, each decode engine reads from each prefill engine again.

        Raises:
            Broken: one computes by itself.
        """
        for first, second in itertools.product(self.setup.prefill, self.setup.decode):
            if first == second:
                continue  # what it has computed it finds in its own cache
            if self.nodes[first].key != self.nodes[second].key:
                continue  # it takes nothing from this peer
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

    def _engines(self, kind: str) -> list[SimEngine]:
        names = {"prefill": self.setup.prefill, "decode": self.setup.decode}.get(kind)
        return [
            engine
            for name, engine in self.engines.items()
            if engine.alive and engine.draining_until is None and (names is None or name in names)
        ]
