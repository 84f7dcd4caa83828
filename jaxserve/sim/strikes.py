"""Faults that strike whole engines, hosts and clients: one of them at most after each event."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol, TypeVar

from jaxserve.sim.asks import Ask
from jaxserve.sim.broken import Broken
from jaxserve.sim.clients import Clients
from jaxserve.sim.clockwork import Clockwork
from jaxserve.sim.cover import RARE, Cover, Spell
from jaxserve.sim.engine import Node, SimEngine
from jaxserve.sim.excuses import Excuses
from jaxserve.sim.fake_nixl import FakeNixlNetwork, LateWrite
from jaxserve.sim.faults import STRIKES
from jaxserve.sim.holders import Whom, given_up, rows_copied, rows_hit
from jaxserve.sim.http import ROUTER
from jaxserve.sim.laws import Laws
from jaxserve.sim.storm import Storm
from scheduler.types import Plan

Key = TypeVar("Key")

LATE = frozenset(("X4", "X40", "X43"))
"""Faults after which what an engine does comes late."""
STORM = 8
"""Times that a client repeats its request at once."""
WAITS = 0.5
"""Of the failures of a tokenizer, those that wait for the text of a fetched request."""
RESTART_S = 20.0
"""An engine that has ended begins its next life within so long."""


class Cluster(Protocol):
    """What can be struck.

    Attributes:
        engines: current lives by host.
        nodes: what each is from life to life; a fault may change it.
    """

    clockwork: Clockwork
    storm: Storm
    cover: Cover
    nixl: FakeNixlNetwork
    laws: Laws
    clients: Clients
    excuses: Excuses
    engines: dict[str, SimEngine]
    nodes: dict[str, Node]

    def start(self, name: str) -> SimEngine:
        """A new life of an engine."""
        ...

    def around(self, host: str) -> tuple[str, ...]:
        """A host, and those that exchange pages with it."""
        ...


class Strikes:
    """Strikes a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._clockwork, self._storm, self._cover = cluster.clockwork, cluster.storm, cluster.cover
        self._armed: set[str] = set()
        """Epochs of engines whose tokenizer will fail at the text of a fetched request."""
        self._flips: set[tuple[str, int, int, int, Whom]] = set()
        """(epoch, leaf, rank, row) of bits that have flipped, and whom it met."""

    def maybe(self) -> None:
        """One fault, or none; more often where a request is in a rare state."""
        clockwork = self._clockwork
        draw = clockwork.chance.random()
        for fault, rate in self._storm.rates.items():
            if fault in STRIKES:
                if fault == "X19" and not self._late_writes():
                    continue
                if self._storm.rare or (fault == "X27" and self._copied()):
                    rate *= STRIKES[fault].boost
                if draw < rate:
                    clockwork.note(f"fault {fault}")
                    clockwork.last.append(f"{clockwork.now:12.6f} FAULT {fault}")
                    _STRIKE[fault](self)
                    return
                draw -= rate

    def again(self, engine: SimEngine, spell: Spell | None = None) -> None:
        """The life after this one begins, if none has begun yet. `spell`: of the fault that ended it."""
        if self._cluster.engines[engine.host] is engine:
            self._cluster.start(engine.host)
        if spell is not None:
            self._cover.end(spell)

    # Engines and their hosts.

    def _some_engine(self, fits: Callable[[SimEngine], object] = lambda engine: True) -> SimEngine | None:
        engines = self._cluster.engines.values()
        running = [each for each in engines if each.alive and not each.paused and fits(each)]
        rare = [engine for engine in running if engine.host in self._storm.rare]
        if rare and self._clockwork.chance.random() < 0.8:
            running = rare
        return self._clockwork.chance.choice(running) if running else None

    def kill(self) -> None:
        """X1, X2."""
        engine = self._some_engine()
        if engine is not None:
            spell = self._cover.begin("X1", self._cluster.around(engine.host))
            engine.kill()
            self._over(engine, spell)

    def pause(self) -> None:
        """X3."""
        engine = self._some_engine()
        if engine is None:
            return
        spell = self._cover.begin("X3", self._cluster.around(engine.host))
        self._cluster.laws.endings.disturbed(engine)
        engine.pause()

        def resume() -> None:
            self._cover.end(spell)
            if engine.paused:
                engine.resume()

        longest = 600.0 if self._clockwork.chance.random() < 0.2 else 60.0
        self._later(self._duration(0.01, longest), resume)

    def slow(self) -> None:
        """X4."""
        self._for_a_while("X4", self._storm.slow, self._duration(0.1, 5.0))

    def upgrade(self) -> None:
        """X5."""
        engine = self._some_engine()
        if engine is not None:
            spell = self._cover.begin("X5", self._cluster.around(engine.host))
            node = self._cluster.nodes[engine.host]
            key = "model-b" if node.scheduler.cache_key == "model-a" else "model-a"
            self._cluster.nodes[engine.host] = replace(node, scheduler=replace(node.scheduler, cache_key=key))
            engine.kill()
            self._over(engine, spell)

    def cut(self) -> None:
        """X11: between engines, or between one and the router."""
        hosts = [*sorted(self._cluster.nodes), *self._router()]
        if len(hosts) > 1:
            here, there = self._clockwork.chance.sample(hosts, 2)
            seconds = self._duration(0.05, 20.0)
            self._lasts("X11", self._storm.cut, (here, there), (here, there), seconds)

    def mute(self) -> None:
        """X12."""
        self._for_a_while("X12", self._storm.mute, self._duration(0.05, 20.0), around=True)

    def jump_clock(self) -> None:
        """X38: a monotonic clock jumps forward only, as when a machine was asleep."""
        engine = self._some_engine()
        if engine is not None:
            self._cover.strike("X38", self._cluster.around(engine.host))
            self._cluster.laws.endings.disturbed(engine)
            engine.offset += 3600.0
            engine.wake()

    def ask_to_end(self) -> None:
        """X41."""
        engine = self._some_engine()
        if engine is not None and engine.draining_until is None:
            spell = self._cover.begin("X41", self._cluster.around(engine.host))
            asks = self._cluster.clients.asks.values()
            live = [ask.request.request_id for ask in asks if ask.engine is engine]
            self._cluster.laws.endings.asked(engine, live)
            asked = self._clockwork.now
            engine.drain(self._duration(0.5, 30.0), lambda ended: self._ended(ended, spell, asked))

    def stall(self) -> None:
        """X43; it is counted when the loop stalls."""
        engine = self._some_engine()
        if engine is not None:
            self._storm.stalled.add(engine.host)

    def no_files(self) -> None:
        """X45: of an engine, or of the router."""
        if self._clockwork.chance.random() < 0.2:
            for host in self._router():
                seconds = self._duration(0.1, 10.0)
                return self._lasts("X45", self._storm.no_files, host, (host,), seconds)
        self._for_a_while("X45", self._storm.no_files, self._duration(0.1, 10.0))

    def _router(self) -> tuple[str, ...]:
        return () if self._cluster.clients.router is None else (ROUTER,)

    # What an engine keeps.

    def write_late(self) -> None:
        """X19: one of the transfers that were given up; rather where a request is in a rare state."""
        found, chance = self._late_writes(), self._clockwork.chance
        rare = [late for late in found if not self._storm.rare.isdisjoint(self._ends(late))]
        if rare or chance.random() < 0.12:
            late = chance.choice(rare or found)
            late.deliver()
            self._cover.strike("X19", self._ends(late))

    def _late_writes(self) -> list[LateWrite]:
        alive = [engine for engine in self._cluster.engines.values() if engine.alive]
        return self._cluster.nixl.outlasting(handle for engine in alive for handle in given_up(engine))

    def _ends(self, late: LateWrite) -> tuple[str, str]:
        return self._storm.host_of(late.reader), self._storm.host_of(late.source)

    def flip_bit(self) -> None:
        """X27: in a page that is about to be loaded, or that a lookup would find; seldom in another."""
        chance, copied = self._clockwork.chance, self._copied()
        if copied and chance.random() < 0.7:
            engine, index, rank = chance.choice(copied)
            rows = rows_copied(engine, index, rank)
        else:
            engine = self._some_engine(_checked)
            if engine is None:
                return
            index = chance.choice(_checked(engine))
            rank = chance.randrange(len(engine.hosts[index]))
            rows = rows_hit(engine, index)
        place = (engine.epoch, index, rank)
        rows = {
            row: whose
            for row, whose in sorted(rows.items())
            if not any((*place, row, whom) in self._flips for whom in whose)
        }
        if not rows and chance.random() < 0.997:
            return
        memory = engine.hosts[index][rank].memory
        rare = [
            row
            for row, whose in rows.items()
            if any(self._rare((engine.host, request_id)) for request_id, _ in whose)
        ]
        row = chance.choice(rare or list(rows) or range(len(memory)))
        memory[row, chance.randrange(memory.shape[1])] ^= 1 << chance.randrange(8)
        self._cluster.laws.flipped.add((*place, row))
        self._flips |= {(*place, row, whom) for whom in rows.get(row, ())}
        self._cover.strike_sequences("X27", engine.host, rows.get(row, ()))

    def _copied(self) -> list[tuple[SimEngine, int, int]]:
        """(engine, leaf, rank) of host tiers from which a load is about to copy."""
        return [
            (engine, index, rank)
            for engine in self._cluster.engines.values()
            if engine.alive and not engine.paused
            for index in _checked(engine)
            for rank in range(len(engine.hosts[index]))
            if rows_copied(engine, index, rank)
        ]

    def break_tokenizer(self) -> None:
        """X42: soon, or where the text of a request begins whose pages were fetched."""
        engine = self._some_engine()
        if engine is not None and self._clockwork.chance.random() < WAITS:
            self._armed.add(engine.epoch)
        elif engine is not None:
            calls = self._clockwork.chance.randint(1, 16)  # a new text takes up to four, a token one
            self._cluster.excuses.break_tokenizer(engine, calls)

    def decided(self, engine: SimEngine, plan: Plan) -> None:
        """A step has been decided, and its sequences do not have their slots yet."""
        new = next((entry for entry in plan.admitted if not entry.resumed), None)
        if new is None or engine.epoch not in self._armed or not self._storm.rates:
            return
        if self._cover.state(engine.host, (new.request_id, new.index)) == "fetched":
            self._armed.discard(engine.epoch)
            self._cluster.excuses.break_tokenizer(engine, 1)

    def forget(self) -> None:
        """X46."""
        engine = self._some_engine()
        if engine is not None and engine.draining_until is None:
            self._cover.strike("X46", (engine.host,))
            external = self._clockwork.chance.random() < 0.15
            engine.core.inbox.reset_prefix_cache(lambda: None, external=external)
            engine.wake()

    # Clients.

    def disconnect(self) -> None:
        """X33."""
        self._abort("X33", 1)

    def abort_twice(self) -> None:
        """X36."""
        self._abort("X36", 2)

    def use_id_twice(self) -> None:
        """X35.

        Raises:
            Broken: the engine took it.
        """
        clients = self._cluster.clients
        ask = self._some_ask()
        if ask is not None:
            request, refused = ask.request, clients.counts["refused"]
            self._cover.strike_request("X35", self._places(ask))
            clients.ask(
                ask.engine, request.prompt_token_ids[::-1], request.sampling, "", 0,
                lambda params, ok: None, request_id=request.request_id,
            )  # fmt: skip
            if clients.counts["refused"] == refused and ask.request.request_id in clients.asks:
                raise Broken("I15", f"{ask.engine.host}: an id in use was taken again")

    def retry_storm(self) -> None:
        """X37."""
        clients, ask = self._cluster.clients, self._some_ask()
        if ask is not None:
            self._cover.strike_request("X37", self._places(ask))
            request = ask.request
            for _ in range(STORM):
                clients.ask(
                    ask.engine, request.prompt_token_ids, request.sampling, request.cache_salt,
                    request.priority, lambda params, ok: None,
                )  # fmt: skip

    def _abort(self, fault: str, times: int) -> None:
        ask = self._some_ask(aborted=False)
        if ask is not None:
            self._cover.strike_request(fault, self._places(ask))
            for _ in range(times):
                self._cluster.clients.abort(ask)

    def _some_ask(self, *, aborted: bool = True) -> Ask | None:
        """A request that has not ended; rather one that is in a rare state. `aborted`: it may be."""
        chance = self._clockwork.chance
        asks = [
            ask
            for ask in self._cluster.clients.asks.values()
            if ask.engine.alive and (aborted or not ask.aborted)
        ]
        rare = [ask for ask in asks if self._rare((ask.engine.host, ask.request.request_id))]
        if rare and chance.random() < 0.8:
            asks = rare
        return chance.choice(asks) if asks else None

    def _rare(self, place: tuple[str, str]) -> bool:
        return not self._cover.states(*place).isdisjoint(RARE)

    def _places(self, ask: Ask) -> list[tuple[str, str]]:
        """(host, id) of a request, and of what a peer has leased for it."""
        places, remote = [(ask.engine.host, ask.request.request_id)], ask.request.remote
        if remote is not None and self._cluster.engines[remote.host].epoch == remote.epoch:
            places.append((remote.host, remote.request_id))
        return places

    # How long they last.

    def _ended(self, engine: SimEngine, spell: Spell, asked: float) -> None:
        if not LATE.isdisjoint(self._cover.history.near(engine.host, asked)):
            self._cluster.laws.endings.disturbed(engine)
        self._cluster.laws.endings.ended(engine)
        self._over(engine, spell)

    def _over(self, engine: SimEngine, spell: Spell) -> None:
        """A life is over; another begins some time later."""
        self._cluster.clients.connection_lost(engine)
        self._later(self._duration(0.1, RESTART_S), lambda: self.again(engine, spell))

    def _for_a_while(
        self, fault: str, where: dict[str, Spell], seconds: float, *, around: bool = False
    ) -> None:
        engine = self._some_engine()
        if engine is not None:
            hosts = self._cluster.around(engine.host) if around else (engine.host,)
            self._lasts(fault, where, engine.host, hosts, seconds)

    def _lasts(
        self, fault: str, where: dict[Key, Spell], key: Key, hosts: Iterable[str], seconds: float
    ) -> None:
        if key in where:
            return
        where[key] = spell = self._cover.begin(fault, hosts)

        def end() -> None:
            self._cover.end(spell)
            if where.get(key) is spell:
                del where[key]

        self._later(seconds, end)

    def _duration(self, low: float, high: float) -> float:
        return low * (high / low) ** self._clockwork.chance.random()

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        self._clockwork.after(seconds, "a fault ends", action)


def _checked(engine: SimEngine) -> list[int]:
    """Its host tiers whose pages are compared with their digests."""
    transfer = engine.node.scheduler.transfer
    leaves = () if transfer is None else transfer.leaves
    return [index for index in sorted(engine.hosts) if leaves[index].digest]


_STRIKE: dict[str, Callable[[Strikes], None]] = {
    "X1": Strikes.kill,
    "X3": Strikes.pause,
    "X4": Strikes.slow,
    "X5": Strikes.upgrade,
    "X11": Strikes.cut,
    "X12": Strikes.mute,
    "X19": Strikes.write_late,
    "X27": Strikes.flip_bit,
    "X33": Strikes.disconnect,
    "X35": Strikes.use_id_twice,
    "X36": Strikes.abort_twice,
    "X37": Strikes.retry_storm,
    "X38": Strikes.jump_clock,
    "X41": Strikes.ask_to_end,
    "X42": Strikes.break_tokenizer,
    "X43": Strikes.stall,
    "X45": Strikes.no_files,
    "X46": Strikes.forget,
}
