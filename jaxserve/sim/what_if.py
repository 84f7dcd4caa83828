"""Recorded traffic through engines that nobody has: how long would its requests wait?

The engines are the simulator's (`jaxserve/sim/engine.py`): the production scheduler, page pool, prefix cache,
connectors and protocol on a virtual clock, without faults. Steps, transfers, messages and HTTP take what a
measured table says. Only the model is missing: its tokens mean nothing, so pages are a few bytes each.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxserve.bench.stats import RequestRecord, Slo
from jaxserve.device import Executed, Pending, PromptSpan, SlotSetup
from jaxserve.outputs import Delta, EngineError
from jaxserve.sample import Sampled
from jaxserve.sim.clockwork import Clockwork, Timer
from jaxserve.sim.costs import LATENESS_S, CostError, CostTable, HttpCost, TransferCost, step_clock
from jaxserve.sim.engine import Node, SimEngine, Surroundings, Weather
from jaxserve.sim.expect import vocabulary
from jaxserve.sim.fake_nixl import FakeNixlNetwork, Fault, Posted
from jaxserve.sim.report import EngineUse, Report
from jaxserve.sim.traffic import Arrival, Trace
from jaxserve.sim.wire import Fate, SimWire
from jaxserve.text import Tokenizer
from kv.config import CONSUMER, NIXL, PRODUCER, ConnectorConfig
from kv.driver import Region
from kv.moves import RemoteSource
from metrics.stats import PromptTokenStats
from scheduler.admit import never_fits
from scheduler.types import FinishReason, Inputs, Limits, Outcome, Plan, Request, SamplingParams
from scheduler.types import SchedulerConfig as Config

QUEUED_REQUESTS = 1024
"""That may wait at an engine, as by default in `jaxserve serve`; beyond, they are refused."""

LOOK_S = 0.05
"""Between looks of a prefill engine at whether it is still being read."""

TOKEN = 1
"""What the missing model says, always."""

PAGE_SHAPE = (1, 2, 1, 1)
"""Layers, K and V, heads and head size of the pages here: they only have to be there."""


def simulate(
    trace: Trace,
    table: CostTable,
    *,
    prefill: int,
    decode: int,
    slo: Slo | None = None,
    done: Callable[[], object] = lambda: None,
) -> Report:
    """Replays a trace.

    Args:
        prefill: engines that compute prompts for the others; 0: every engine computes its own.
        decode: engines that generate.
        done: called at the end of every request.

    Raises:
        CostError: the table does not say what a transfer costs, and there is one to make.
    """
    cluster = _Cluster(trace, table, prefill=prefill, decode=decode, done=done)
    cluster.run()
    label = f"{prefill}P + {decode}D" if prefill else f"{decode} alone"
    return Report(
        label=label,
        records=cluster.records,
        duration_s=max(record.end for record in cluster.records),
        engines=tuple(cluster.uses),
        slo=slo,
    )


class Wordless(Tokenizer):
    """A tokenizer whose tokens have no text."""

    def __init__(self) -> None:
        super().__init__(vocabulary())

    def token_bytes(self, token_id: int) -> bytes:
        """Nothing."""
        return b""


class NoModel:
    """`jaxserve.core.DeviceDriver` whose steps compute nothing. Its pool is real memory of small pages."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        layers, sides, heads, head_dim = PAGE_SHAPE
        self._pool = np.zeros((num_pages, layers * sides * heads * head_dim * page_size), np.uint16)

    def start(self, plan: Plan, setups: list[SlotSetup], spans: list[PromptSpan]) -> Pending:
        """Begins a step."""
        return Pending(step_id=plan.step_id, rows=len(plan.rows), sampled=None)

    def wait(self, pending: Pending) -> Executed:
        """Ends it."""
        tokens, nothing = np.full(pending.rows, TOKEN, np.int32), np.zeros((0, 0), np.float32)
        sampled = Sampled(
            tokens=tokens,
            logprobs=nothing,
            ranks=nothing,
            top_ids=nothing,
            top_logprobs=nothing,
            finite=np.ones(pending.rows, bool),
        )
        return Executed(outcome=Outcome(step_id=pending.step_id, tokens=tokens), sampled=sampled)

    def pool_changed(self) -> bool:
        """Never."""
        return False

    def regions(self) -> tuple[Region, ...]:
        """The pool."""
        page_bytes = self._pool.shape[1] * self._pool.itemsize
        return (Region(address=self._pool.ctypes.data, page_bytes=page_bytes, num_pages=len(self._pool)),)


class Lender(SimEngine):
    """A prefill engine that looks only now and then whether it is still being read: a real NIXL agent needs
    thousands of looks a second to get on, the simulated one needs none. Messages wake it as ever."""

    def after(self, delay: float, label: str, action: Callable[[], None]) -> Timer:
        """See `SimEngine`."""
        looks = label.startswith("round") and delay > LATENESS_S
        return super().after(max(delay, LOOK_S) if looks else delay, label, action)


class Measured(Weather):
    """Steps take what a table says. Attributes: steps, busy_s: per engine's name, of its steps so far."""

    def __init__(self, table: CostTable) -> None:
        self._seconds = step_clock(table)
        self._lending = 1.0 if table.transfer is None else table.transfer.lending
        self.steps: dict[str, int] = {}
        self.busy_s: dict[str, float] = {}

    def step_seconds(self, engine: SimEngine, plan: Plan) -> float:
        """See `Weather`."""
        seconds, name = self._seconds(plan.rows), engine.host
        seconds *= self._lending if isinstance(engine, Lender) else 1.0
        self.steps[name] = self.steps.get(name, 0) + 1
        self.busy_s[name] = self.busy_s.get(name, 0.0) + seconds
        return seconds

    def lateness(self, engine: SimEngine) -> float:
        """See `Weather`."""
        return LATENESS_S


@dataclass(slots=True, eq=False)
class _Client:
    """One request of the trace. Attributes: params: the prefill engine's answer. times: of its tokens."""

    number: int
    arrival: Arrival
    ids: tuple[int, ...] = ()
    params: Mapping[str, Any] | None = None
    times: list[float] = field(default_factory=list)


class _Cluster:
    """Engines, and clients that send them a trace. Attributes: records: in the trace's order, at the end."""

    def __init__(
        self, trace: Trace, table: CostTable, *, prefill: int, decode: int, done: Callable[[], object]
    ) -> None:
        if decode < 1 or prefill < 0:
            raise ValueError(f"at least one engine must generate, got {prefill} prefill and {decode} decode")
        if prefill and table.transfer is None:
            raise CostError("the table does not say what a transfer costs; measure it, or use --prefill 0")
        self._table, self._done = table, done
        self._transfer = table.transfer or TransferCost(fixed_s=0.0, bytes_per_s=1.0, message_s=0.0)
        self._http = table.http or HttpCost(server_s=0.0, router_s=0.0)
        self._clockwork = Clockwork(0)
        self._weather = Measured(table)
        self._around = Surroundings(
            clockwork=self._clockwork,
            wire=SimWire(
                self._clockwork,
                lambda sender, receiver, message: Fate(delays=(self._transfer.message_s,)),
                lambda host: False,
            ),
            nixl=FakeNixlNetwork(clock=lambda: self._clockwork.now, draw=self._transfer_takes),
            weather=self._weather,
            tokenizer=Wordless(),
        )
        self._sources: dict[str, PromptTokenStats] = {}
        self._preempted: dict[str, int] = {}
        self._prefill = [self._engine("prefill", number) for number in range(prefill)]
        self._decode = [self._engine("decode" if prefill else "engine", number) for number in range(decode)]
        self._turns = {"prefill": 0, "decode": 0}
        self._records: list[RequestRecord | None] = [None] * len(trace.arrivals)
        self._left = len(trace.arrivals)
        for number, arrival in enumerate(trace.arrivals):
            client = _Client(number, arrival)
            self._clockwork.after(arrival.at_s, f"arrival {number}", lambda client=client: self._send(client))

    @property
    def records(self) -> tuple[RequestRecord, ...]:
        """Of the requests that have ended."""
        return tuple(record for record in self._records if record is not None)

    @property
    def uses(self) -> list[EngineUse]:
        """What the engines did."""
        return [
            EngineUse(
                role=engine.host.split("-")[0],
                steps=self._weather.steps.get(engine.host, 0),
                busy_s=self._weather.busy_s.get(engine.host, 0.0),
                sources=self._sources[engine.host],
                preempted=self._preempted[engine.host],
            )
            for engine in (*self._prefill, *self._decode)
        ]

    def run(self) -> None:
        """Until every request has ended."""
        while self._left:
            if not self._clockwork.run_one():
                raise RuntimeError(f"nothing happens any more, and {self._left} requests have not ended")

    # The engines.

    def _engine(self, role: str, number: int) -> SimEngine:
        shape, name = self._table.engine, f"{role}-{number}"
        transfer = None
        if role != "engine":
            transfer = ConnectorConfig(
                kind=NIXL, role=PRODUCER if role == "prefill" else CONSUMER, engine_id=name
            )
        layers, sides, heads, head_dim = PAGE_SHAPE
        node = Node(
            name=name,
            engine_id=name,
            scheduler=Config(
                page_size=shape.page_size,
                num_pages=shape.num_pages,
                max_num_seqs=shape.max_num_seqs,
                max_model_len=shape.max_model_len,
                transfer=transfer,
            ),
            limits=Limits(
                max_num_batched_tokens=shape.max_num_batched_tokens, max_num_seqs=shape.max_num_seqs
            ),
            max_num_queued_reqs=QUEUED_REQUESTS,
            page_shape=(layers, sides, heads, shape.page_size, head_dim),
            item_bytes=2,
        )
        self._sources[name], self._preempted[name] = PromptTokenStats.empty(), 0
        device = NoModel(shape.num_pages, shape.page_size)
        make = Lender if role == "prefill" else SimEngine
        return make(node, self._around, device, epoch=f"{number:032x}", recorder=self._look)

    def _look(self, engine: SimEngine, inputs: Inputs, plan: Plan) -> None:
        for entry in plan.prefilled:
            self._sources[engine.host] = self._sources[engine.host].add(entry.stats)
        self._preempted[engine.host] += len(plan.preempted)

    def _transfer_takes(self, posted: Posted) -> Fault:
        """A page is small here; the table knows how large it would be."""
        layers, sides, heads, head_dim = PAGE_SHAPE
        page_bytes = 2 * layers * sides * heads * head_dim * self._table.engine.page_size
        pages = posted.num_bytes // page_bytes
        return Fault(cycles=0, seconds=self._transfer.seconds(pages * self._table.engine.page_bytes))

    # The clients, and the router between.

    def _next(self, role: str) -> SimEngine:
        """The engines of a role take turns, as behind `jaxserve router`."""
        engines = self._prefill if role == "prefill" else self._decode
        self._turns[role] += 1
        return engines[(self._turns[role] - 1) % len(engines)]

    def _send(self, client: _Client) -> None:
        client.ids = client.arrival.prompt.token_ids()
        if self._prefill:
            self._later(self._http.router_s + self._http.server_s, client, self._ask_prefill)
        else:
            self._later(self._http.server_s, client, self._ask_decode)

    def _later(self, delay: float, client: _Client, action: Callable[[_Client], None]) -> None:
        self._clockwork.after(delay, f"http {client.number}", lambda: action(client))

    def _ask_prefill(self, client: _Client) -> None:
        def told(delta: Delta) -> None:
            if delta.finish_reason is not None:
                client.params = delta.kv_transfer_params
                self._later(self._http.server_s, client, self._ask_decode)

        request = _request(client, f"{client.number}-prefill", tokens=1, lease=True)
        self._submit(client, self._next("prefill"), request, told)

    def _ask_decode(self, client: _Client) -> None:
        def told(delta: Delta) -> None:
            client.times += [self._clockwork.now] * len(delta.token_ids)
            if delta.finish_reason is not None:
                failed = delta.finish_reason in (FinishReason.ERROR, FinishReason.ABORT)
                self._end(client, (delta.message or "the request was aborted") if failed else None)

        engine, remote = self._next("decode"), None
        if client.params is not None:
            remote = engine.door.open(client.params, client.ids, client.arrival.cache_salt).remote
        tokens = client.arrival.output_tokens
        request = _request(client, f"{client.number}-decode", tokens=tokens, remote=remote)
        self._submit(client, engine, request, told)

    def _submit(
        self, client: _Client, engine: SimEngine, request: Request, sink: Callable[[Delta], None]
    ) -> None:
        problem = never_fits(engine.node.scheduler, engine.node.limits, request)
        if problem is not None:
            return self._end(client, problem)
        try:
            engine.submit(request, sink)
        except EngineError as error:
            self._end(client, str(error))

    def _end(self, client: _Client, error: str | None = None) -> None:
        self._records[client.number] = RequestRecord(
            start=client.arrival.at_s,
            end=self._clockwork.now,
            arrivals=tuple(client.times),
            prompt_tokens=client.arrival.prompt.num_tokens,
            output_tokens=len(client.times),
            error=error,
        )
        self._left -= 1
        self._done()


def _request(
    client: _Client, name: str, *, tokens: int, lease: bool = False, remote: RemoteSource | None = None
) -> Request:
    """What an engine is asked for; the length of the answer is the trace's."""
    return Request(
        request_id=name,
        prompt_token_ids=client.ids,
        sampling=SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True),
        cache_salt=client.arrival.cache_salt,
        lease=lease,
        remote=remote,
    )
