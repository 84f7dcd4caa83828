"""Two prefill and two decode engines behind the product's router, to which a test does what it likes."""

from collections.abc import Callable

from jaxserve.sim.asks import Ask
from jaxserve.sim.clients import Clients
from jaxserve.sim.clockwork import Clockwork
from jaxserve.sim.device import SimDevice, StepFate
from jaxserve.sim.engine import Node, SimEngine, Surroundings, Weather
from jaxserve.sim.expect import SimTokenizer
from jaxserve.sim.fake_nixl import FakeNixlNetwork, Fault
from jaxserve.sim.habits import Habits
from jaxserve.sim.hash_model import HEAD_DIM, HEADS, ITEM, LAYERS, HashModel
from jaxserve.sim.http import Links
from jaxserve.sim.laws import Names, no_leak
from jaxserve.sim.router import SimRouter, Told
from jaxserve.sim.server import body_of
from jaxserve.sim.wire import Fate, SimWire
from kv.config import CONSUMER, NIXL, PRODUCER, ConnectorConfig
from scheduler.types import Limits, SamplingParams, SchedulerConfig

MODEL = HashModel()
PREFILL, DECODE = ("p0", "p1"), ("d0", "d1")


class Cluster:
    """Attributes: told: what clients got, in the order of their ends."""

    def __init__(self, *, queued: int = 8, links: Links | None = None) -> None:
        self.clockwork = clockwork = Clockwork(0)
        self.around = Surroundings(
            clockwork=clockwork,
            wire=SimWire(clockwork, lambda here, there, message: Fate(delays=(0.001,)), lambda host: False),
            nixl=FakeNixlNetwork(clock=lambda: clockwork.now, draw=lambda posted: Fault(seconds=0.01)),
            weather=Weather(),
            tokenizer=SimTokenizer(),
        )
        self.engines = {name: self._engine(name, queued) for name in (*PREFILL, *DECODE)}
        habits = Habits(documents=(), split=1.0, think_s=1.0, max_prompt=24, max_tokens=16)
        self.clients = Clients(clockwork, MODEL, Names(MODEL), habits, self._of, links)
        self.clients.begin(0)
        assert self.clients.router is not None
        self.router: SimRouter = self.clients.router
        self.told: list[Told] = []

    def ask(self, *, stream: bool = False, tokens: int = 6) -> None:
        prompt = tuple(self.clockwork.chance.randrange(40) for _ in range(9))
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, seed=1, ignore_eos=True)
        body = body_of(prompt, sampling, "", 0, stream=stream)
        self.clients.ask_router(body, self.told.append)

    @property
    def over(self) -> list[bool]:
        """Whether each request was answered."""
        return [told.right for told in self.told]

    def asked(self, host: str) -> Ask:
        """Goes on until this engine is asked."""
        self.until(lambda: any(ask.engine.host == host for ask in self.clients.asks.values()))
        return next(ask for ask in self.clients.asks.values() if ask.engine.host == host)

    def until(self, there: Callable[[], bool]) -> None:
        while not there():
            assert self.clockwork.run_one(), "nothing happens any more"
            assert self.clockwork.events < 5000
            self.clients.look()

    def end(self) -> list[bool]:
        """Goes on until all is over; how requests ended."""
        self.until(lambda: not self.router.journeys and not self.clients.asks)
        alive = [engine for engine in self.engines.values() if engine.alive]
        self.until(
            lambda: all(
                engine.core.idle and not engine.core.state.sequences and not len(engine.core.state.ledger)
                for engine in alive
            )
        )
        for engine in alive:
            no_leak(engine)
        return self.over

    def kill(self, host: str) -> None:
        self.engines[host].kill()
        self.clients.connection_lost(self.engines[host])

    def counts(self) -> dict[str, int]:
        """What the router's metrics would show."""
        stats = self.router.tally.stats
        found = {f"{role} again": count for role, count in stats.retries.items()}
        found |= dict(stats.fallbacks.items())
        return {name: count for name, count in found.items() if count}

    def _of(self, kind: str) -> list[SimEngine]:
        names = {"prefill": PREFILL, "decode": DECODE}.get(kind, (*PREFILL, *DECODE))
        return [self.engines[name] for name in names if self.engines[name].alive]

    def _engine(self, name: str, queued: int) -> SimEngine:
        role = PRODUCER if name in PREFILL else CONSUMER
        node = Node(
            name=name,
            engine_id=name,
            scheduler=SchedulerConfig(
                page_size=4, num_pages=40, max_num_seqs=4, max_model_len=48,
                transfer=ConnectorConfig(kind=NIXL, role=role, lease_s=5.0),
            ),
            limits=Limits(max_num_batched_tokens=16, max_num_seqs=4),
            max_num_queued_reqs=queued,
            page_shape=(LAYERS, 2, HEADS, 4, HEAD_DIM),
            item_bytes=ITEM,
        )  # fmt: skip
        device = SimDevice(model=MODEL, num_pages=40, page_size=4, fill=bytes, fate=StepFate)
        return SimEngine(node, self.around, device, epoch=name.encode().hex().ljust(32, "0"))
