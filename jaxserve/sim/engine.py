"""One life of a simulated engine: the production core, connectors and transfer protocol on a virtual clock.

Nothing of the engine is written again here. What a server does with threads, this does with events: the
core's turn, each rank's round of transfers and each host tier's copying happen one after another, whenever
the clockwork says.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from jaxserve.core import DeviceDriver, EngineCore
from jaxserve.drain import AbortAll, Await, Close, Drain
from jaxserve.movers import Movers
from jaxserve.pulse import Pulse
from jaxserve.sequence import Sink
from jaxserve.sim.clockwork import Clockwork, Timer
from jaxserve.sim.fake_nixl import FakeNixlNetwork
from jaxserve.sim.wire import SimChannel, SimWire
from jaxserve.text import Tokenizer
from jaxserve.transfer import Door, facts_of
from kv.config import CONSUMER, NIXL, ConnectorConfig
from kv.copies import PointerCopies
from kv.digest import digest_rows
from kv.driver import Driver, PageCopies, Region
from kv.host import HostDriver
from kv.moves import Command, Event
from kv.ranks import Ranks
from kv.seal import Identity
from kv.transfer_agent import Agent, AgentError
from kv.transfer_desk import Desk
from kv.transfers import Transfers
from scheduler.types import Inputs, Limits, Plan, Request, SchedulerConfig

logger = logging.getLogger("jaxserve")

LOOKS_S = 0.2
"""A round that wants to come again sooner only looks whether something has moved."""

KEY = b"k" * 32
"""That simulated engines share."""


class Weather:
    """What surrounds an engine, when it is calm. Delays are in seconds of virtual time."""

    def step_seconds(self, engine: "SimEngine", plan: Plan) -> float:
        """How long the device works on a plan."""
        return 0.01

    def lateness(self, engine: "SimEngine") -> float:
        """How much later than it might something of this engine happens."""
        return 0.0002

    def poll_seconds(self, engine: "SimEngine", idle: int) -> float:
        """Between rounds of transfers while something is under way, after so many that brought nothing."""
        return min(0.0005 * 1.1**idle, 0.02)

    def copy_seconds(self, engine: "SimEngine") -> float:
        """How long a host tier takes before it has copied what waits."""
        return 0.001

    def copy_fails(self, engine: "SimEngine") -> bool:
        """Whether a host tier's copy fails."""
        return False

    def agent_fails(self, engine: "SimEngine") -> bool:
        """Whether no NIXL agent can be made."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What an engine is from its first life to its last.

    Attributes:
        name: of its host, as others reach it; with `engine_id` its identity.
        port: of its first rank's side channel.
        key: that what peers are promised is sealed with.
    """

    name: str
    engine_id: str
    scheduler: SchedulerConfig
    limits: Limits
    ranks: int = 1
    port: int = 5600
    max_num_queued_reqs: int = 64
    key: bytes = KEY
    page_shape: tuple[int, int, int, int, int]
    item_bytes: int

    @property
    def nixl(self) -> ConnectorConfig | None:
        """Its NixlConnector; None: it has none."""
        leaves = () if self.scheduler.transfer is None else self.scheduler.transfer.leaves
        return next((leaf for leaf in leaves if leaf.kind == NIXL), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What is simulated, behind the arguments that the engine takes anyway."""

    clockwork: Clockwork
    wire: SimWire
    nixl: FakeNixlNetwork
    weather: Weather
    tokenizer: Tokenizer


class SimEngine:
    """Attributes:
    alive: not killed, not closed.
    paused: its process is stopped.
    draining: it was asked to end.
    offset, rate: its clock shows `offset + rate * now`.
    hosts: per leaf connector that is a host tier, its drivers by rank.
    plan: the last one.
    touched, turned: something of it has happened, a turn among it; whoever looks takes it back.
    rows_of: slots of the step under way, for whoever looks.
    """

    def __init__(
        self,
        node: Node,
        surroundings: Surroundings,
        device: DeviceDriver,
        *,
        epoch: str,
        offset: float = 0.0,
        rate: float = 1.0,
        recorder: Callable[["SimEngine", Inputs, Plan], None] = lambda engine, inputs, plan: None,
    ) -> None:
        """Args: epoch: of this life, 32 hex digits."""
        self.node, self.host, self.epoch, self.device = node, node.name, epoch, device
        self.alive, self.paused = True, False
        self.offset, self.rate = offset, rate
        self.touched = self.turned = True
        self.rows_of: frozenset[int] = frozenset()
        self.draining: Drain | None = None
        self.hosts: dict[int, list[HostDriver]] = {}
        self.rounds: list[RoundDriver] = []
        self.plan: Plan | None = None
        self._pulse = Pulse()
        self._around = surroundings
        self._recorder = recorder
        self._timer: Timer | None = None
        self._computing = False
        self._ended: Callable[[SimEngine], None] = lambda engine: None
        self._awaited: Timer | None = None
        transfer = node.scheduler.transfer
        leaves = () if transfer is None else transfer.leaves
        self._movers = Movers([leaf.kind for leaf in leaves])
        identity = None
        for index, leaf in enumerate(leaves):
            drivers: list[Driver] = []
            for rank, region in enumerate(device.regions()):
                if leaf.kind == NIXL:
                    drivers.append(self._rounds(leaf, rank, region))
                else:
                    drivers.append(self._host(index, leaf, rank, region))
            self._movers.add(index, Ranks(drivers) if len(drivers) > 1 else drivers[0])
            if leaf.kind == NIXL:
                identity = Identity(
                    engine_id=node.engine_id,
                    epoch=epoch,
                    host=node.name,
                    port=node.port,
                    tp_size=node.ranks,
                    page_size=node.scheduler.page_size,
                )
        self.door = Door(config=transfer, key=node.key, identity=identity)
        self._movers.sealed_by(self.door.seal)
        self.core = EngineCore(
            node.scheduler,
            node.limits,
            device,
            surroundings.tokenizer,
            max_num_queued_reqs=node.max_num_queued_reqs,
            clock=self.clock,
            movers=self._movers,
            recorder=self._record,
        )

    @property
    def draining_until(self) -> float | None:
        """By its clock: when what it took in must have ended; None: it was not asked to end."""
        return None if self.draining is None else self.draining.until

    @property
    def has_aborted(self) -> bool:
        """It was asked to end, and its time was over before all had ended."""
        return self.draining is not None and self.draining.tell_until is not None

    def clock(self) -> float:
        """Seconds, as this engine sees them."""
        return self.offset + self.rate * self._around.clockwork.now

    def stalled(self, seconds: float) -> bool:
        """See `jaxserve.loop.EngineLoop`."""
        return self._pulse.stalled(self.clock(), seconds)

    # What clients do.

    def submit(self, request: Request, sink: Sink) -> None:
        """See `EngineCore.submit`."""
        self.core.submit(request, sink)
        self.wake()

    def abort(self, request_id: str) -> None:
        """Ends a request wherever it is."""
        self.core.inbox.abort(request_id)
        self.wake()

    # What happens to its process.

    def kill(self) -> None:
        """It is gone, and with it its agents and its side channel."""
        self.alive = False
        for name in self.agents():
            self._around.nixl.kill(name)
        for rounds in self.rounds:
            rounds.channel.close()

    def pause(self) -> None:
        """It is stopped: nothing of it happens any more, but its kernel goes on."""
        self.paused = True
        for name in self.agents():
            self._around.nixl.pause(name)

    def resume(self) -> None:
        """It goes on."""
        self.paused = False
        for name in self.agents():
            self._around.nixl.resume(name)
        self._around.clockwork.resume(self)

    def drain(self, timeout_s: float, ended: Callable[["SimEngine"], None]) -> None:
        """It is asked to end: takes nothing more, serves what lives and what it has leased, and closes."""
        if self.draining is None:
            self.draining = Drain(until=self.clock() + timeout_s)
            self._ended = ended
            self.core.inbox.shut()
            self._drain(self.draining)

    def close(self) -> None:
        """It ends in order."""
        self.core.inbox.shut()
        self.core.close()
        self.alive = False

    # How it goes on.

    def wake(self) -> None:
        """Something has arrived."""
        if not self._computing:
            self._turn_in(self._around.weather.lateness(self))

    def after(self, delay: float, label: str, action: Callable[[], None]) -> Timer:
        """An event of this life."""

        def happen() -> None:
            self.touched = True
            action()

        return self._around.clockwork.after(delay, f"{self.host} {label}", happen, owner=self)

    def nudge(self) -> None:
        """A driver has something to tell."""
        self._movers.wake()
        self.wake()

    def _turn_in(self, delay: float, label: str = "turn") -> None:
        clockwork = self._around.clockwork
        if self._timer is not None and not self._timer.cancelled:
            if self._timer.at <= clockwork.now + delay:
                return
            self._timer.cancelled = True
        self._timer = self.after(delay, label, self._turn)

    def _turn(self) -> None:
        core, weather = self.core, self._around.weather
        self.turned = True
        self._timer, self._computing = None, False
        self._pulse.woken(self.clock())
        core.turn(core.inbox.collect(block=False))
        self._pulse.turned(self.clock(), idle=core.idle)
        self._look_whether_drained()
        if core.working and self.plan is not None:
            self._computing = True
            self._turn_in(weather.step_seconds(self, self.plan), "step done")
        elif not core.idle or core.inbox.has_news:
            self._turn_in(weather.lateness(self))
        elif core.pause is not None:
            self._turn_in(core.pause / self.rate + weather.lateness(self), "timer")

    def _record(self, inputs: Inputs, plan: Plan) -> None:
        self.plan = plan
        self._recorder(self, inputs, plan)

    def _drain(self, drain: Drain) -> None:
        """What `Engine.drain` does on an event loop."""
        inbox, self._awaited = self.core.inbox, None
        match drain.look(self.clock(), live=inbox.num_live, leases=self.core.num_leases):
            case Await(seconds=seconds, requests=requests):
                timer = self.after(seconds / self.rate, "drains", lambda: self._drain(drain))
                self._awaited = timer if requests else None
            case AbortAll():
                inbox.abort_all()
                self.wake()
                self._drain(drain)
            case Close():
                self.close()
                self._ended(self)

    def _look_whether_drained(self) -> None:
        """The last request that a drain waits for may have ended."""
        drain, timer = self.draining, self._awaited
        if drain is not None and timer is not None and not self.core.inbox.num_live:
            timer.cancelled, self._awaited = True, None
            self.after(self._around.weather.lateness(self), "has served", lambda: self._drain(drain))

    # Its drivers.

    def agents(self) -> list[str]:
        """Names of its NIXL agents."""
        prefix = f"{self.node.engine_id}-{self.epoch[:8]}-"
        return [name for name in self._around.nixl.agents if name.startswith(prefix)]

    def _copies(self, region: Region) -> PageCopies:
        return _Copies(PointerCopies([region]), lambda: self._around.weather.copy_fails(self))

    def _host(self, index: int, leaf: ConnectorConfig, rank: int, region: Region) -> HostDriver:
        driver = HostDriver(
            leaf.host_slots,
            region.page_bytes,
            self._copies(region),
            wake=self.nudge,
            clock=self.clock,
            executor=lambda drain: self._copy_later(rank, drain),
            digest=digest_rows if leaf.digest else None,
        )
        self.hosts.setdefault(index, []).append(driver)
        return driver

    def _copy_later(self, rank: int, drain: Callable[[], None]) -> None:
        self.after(self._around.weather.copy_seconds(self), f"copies {rank}", drain)

    def _rounds(self, leaf: ConnectorConfig, rank: int, region: Region) -> "RoundDriver":
        node = self.node
        facts = facts_of(
            leaf,
            engine_id=node.engine_id,
            epoch=self.epoch,
            cache_key=node.scheduler.cache_key,
            dtype="uint16",
            page_shape=node.page_shape,
            item_bytes=node.item_bytes,
        )
        port = None if leaf.role == CONSUMER else node.port + rank
        rounds = RoundDriver(self, rank)
        channel = self._around.wire.channel(self, port, rounds.wake)
        transfers = Transfers(
            make_agent=self._make_agent(rank),
            channel=channel,
            copies=PointerCopies([region]),
            regions=[region],
            facts=facts,
            config=leaf,
            unexpected=_told,
        )
        rounds.begin(transfers, channel)
        self.rounds.append(rounds)
        return rounds

    def _make_agent(self, rank: int) -> Callable[[str], Agent]:
        def make(name: str) -> Agent:
            if self._around.weather.agent_fails(self):
                raise AgentError("NIXL_ERR_BACKEND: no file descriptor is left")
            return self._around.nixl.agent(f"{name}-rank{rank}")

        return make


class RoundDriver:
    """`kv.driver.Driver` of a NixlConnector: the rounds that a server's thread makes are events here."""

    def __init__(self, engine: SimEngine, rank: int) -> None:
        self._engine, self._rank = engine, rank
        self._timer: Timer | None = None
        self._idle = 0
        self.transfers: Transfers
        self.channel: SimChannel
        self._desk: Desk

    def begin(self, transfers: Transfers, channel: SimChannel) -> None:
        """Takes what it drives."""
        self.transfers, self.channel = transfers, channel
        self._desk = Desk(transfers, lock=nullcontext())

    def start(self, commands: Sequence[Command]) -> None:
        """See `kv.driver.Driver`."""
        self._desk.start(commands)
        if commands:
            self.wake()

    def poll(self) -> list[Event]:
        """See `kv.driver.Driver`."""
        return self._desk.poll()

    def pool_moved(self, regions: Sequence[Region]) -> None:
        """See `kv.driver.Driver`."""
        self.transfers.pool_moved(regions)
        self.wake()

    def close(self) -> None:
        """See `kv.driver.Driver`."""
        self._desk.end()

    def wake(self) -> None:
        """There is something to do."""
        self._round_in(self._engine._around.weather.lateness(self._engine))

    def _round_in(self, delay: float) -> None:
        if self._timer is not None and not self._timer.cancelled:
            if self._timer.at <= self._engine._around.clockwork.now + delay:
                return
            self._timer.cancelled = True
        self._timer = self._engine.after(delay, f"round {self._rank}", self._round)

    def _round(self) -> None:
        engine, weather = self._engine, self._engine._around.weather
        self._timer = None
        if self._desk.ended:
            return
        busy, told = self._desk.round(engine.clock)
        self._idle = 0 if busy else self._idle + 1
        if told:
            engine.nudge()
        now = engine.clock()
        at = self.transfers.next_wake(now)
        if at is not None:
            wait = (at - now) / engine.rate
            if wait < LOOKS_S:
                wait = weather.poll_seconds(engine, self._idle)
            self._round_in(wait + weather.lateness(engine))


def _told(error: Exception) -> None:
    """As a server's driver does: see `sim.complaints`."""
    logger.error("a transfer failed on a mistake of ours", exc_info=error)


class _Copies:
    """`kv.driver.PageCopies` that sometimes fail."""

    def __init__(self, copies: PointerCopies, fails: Callable[[], bool]) -> None:
        self._copies, self._fails = copies, fails

    def read(self, pages: Sequence[int], out: np.ndarray) -> None:
        """See `kv.driver.PageCopies`."""
        if self._fails():
            raise MemoryError("no host memory")
        self._copies.read(pages, out)

    def write(self, pages: Sequence[int], rows: np.ndarray) -> None:
        """See `kv.driver.PageCopies`."""
        if self._fails():
            raise MemoryError("no host memory")
        self._copies.write(pages, rows)

    def pool_moved(self, regions: Sequence[Region]) -> None:
        """See `kv.driver.PageCopies`."""
        self._copies.pool_moved(regions)
