"""One prefill engine, one decode engine, 3 pages each, 2 requests: a world whose every next event is chosen.

It is made of the same parts as a drawn world: `SimEngine` on the production core, connectors and protocol,
`SimWire`, `FakeNixlNetwork`, `SimDevice`, `Clients`, `Laws`. Only the clockwork differs: events do not come
by their time, an explorer chooses among all that can come now (`jaxserve.sim.small_events`).
"""

from collections.abc import Callable, Mapping
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
    HOSTS,
    LEASE_S,
    MAX_LEN,
    PAGE_SIZE,
    PAGES,
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
)
from jaxserve.sim.wire import Fate, SimWire
from jaxserve.sim.world import Complaints
from kv.config import CONSUMER, NIXL, PRODUCER, ConnectorConfig
from scheduler.types import Inputs, Limits, Plan, SamplingParams, SchedulerConfig


class _Still(Random):
    """Chance that always gives the same, so that no state hides in it."""

    def random(self) -> float:
        return 0.0

    def __reduce__(self) -> str:
        return "STILL"


STILL = _Still(0)


def _first(labels: list[str]) -> int:
    """What happens where nothing else is chosen."""
    return 0


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

    def __init__(self, variant: Variant, complaints: Complaints, *, hasty: bool = True) -> None:
        """`hasty`: that a client learns how its request has ended comes at once, since it commutes with all
        but that the client leaves; False: in any order, for tests."""
        self.variant = variant
        self.clockwork = Steered()
        self.clockwork.chance = STILL
        self.fault: str | None = None
        self.hasty = hasty and "leave" not in variant.faults
        self.failed_steps: set[str] = set()
        self.not_finite: set[str] = set()
        self.ended: list[str | None] = [None, None]
        self.open: dict[str, Callable[[], None]] = {}
        self.waits = 0
        self.choose: Choose = _first
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
        self.complaints = complaints
        self._model = model
        self._around = Surroundings(
            clockwork=self.clockwork,
            wire=self.wire,
            nixl=self.nixl,
            weather=Calm(),
            tokenizer=_tokenizer(),
        )
        for name in HOSTS:
            self.start(name)
        self._ask()

    # What can happen.

    @property
    def can_choose(self) -> bool:
        """An event may do one of several things."""
        return self.fault is None and any(
            name.startswith(("transfer", "step")) for name in self.variant.faults
        )

    def happen(self, option: Option, choose: Choose) -> None:
        """An event happens. `choose`: decides what it does where it can do several things."""
        self.choose = choose
        option.action()
        self.choose = _first

    def _draw_transfer(self, posted: Posted) -> Fault:
        names = [name for name in TRANSFER_FAULTS if f"transfer {name}" in self.variant.faults]
        if not self.variant.digest:
            names = [name for name in names if name not in DIGEST_FINDS]
        if self.fault is not None or not names:
            return Fault(seconds=1.0)
        chosen = self.choose(["the transfer is well", *(f"the transfer {name}" for name in names)])
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
        chosen = self.choose(["the step is well", *(f"{host}: the step {name}" for name in names)])
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

    def check(self) -> None:
        """Raises: Broken: a law is."""
        if self.clients.broken is not None:
            raise self.clients.broken
        self.complaints.check(self.clients.excuses)
        self.laws.look(self.engines.values())

    def finish(self) -> None:
        """Raises: Broken: something is left, or a request ended otherwise than it must."""
        for engine in self.engines.values():
            if engine.alive:
                self.laws.check(engine)
                self.laws.check_content(engine)
                no_leak(engine)
                self.laws.sums(engine, self.recounts[engine.epoch])
        for client, how in enumerate(self.ended):
            if how != "right" and not self.excused:
                raise Broken("I17", f"request {client} ended as {how!r}; the fault is {self.fault!r}")

    @property
    def excused(self) -> bool:
        """Whether a request may end without its answer."""
        if self.fault is None:
            return False
        if self.variant.failure_policy == "fail":
            return True
        return self.fault.startswith(("kill", "leave", "step fails", "step gives"))

    def quiet(self) -> bool:
        """It is over, and nothing is left."""
        if None in self.ended or any(timer.kind == "message" for timer in self.clockwork.pending):
            return False
        for engine in self.engines.values():
            if not engine.alive:
                continue
            state, core = engine.core.state, engine.core
            rounds = any(
                timer.owner is engine and timer.at <= self.clockwork.now for timer in self.clockwork.pending
            )
            if engine.paused or rounds or state.sequences or len(state.ledger) or not core.idle:
                return False
        return True

    # How it begins.

    def start(self, name: str) -> None:
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

    def tells(self, timer: Scheduled) -> bool:
        """By this event a client learns how its request has ended, and nothing more comes of it."""
        told = captured(timer.action)
        reply, ask = told.get("reply"), told.get("ask")
        if reply is None or ask is None:
            return False
        return reply.status == 200 and reply.over and ask.envelope is None

    def _judge(self, here: str, there: str, message: object) -> Fate:
        return Fate(delays=(TRAVEL_S,))

    def _record(self, engine: SimEngine, inputs: Inputs, plan: Plan) -> None:
        self.clients.strike(engine, inputs, plan, self.failed_steps, self.not_finite)
        self.recounts[engine.epoch].take(inputs, plan)
        self.laws.step(engine, inputs, plan)
