"""Recorded traffic through engines that nobody has: how long would its requests wait?

The engines are the simulator's (`jaxserve/sim/engine.py`): the production scheduler, page pool, prefix cache,
connectors and protocol on a virtual clock, without faults. Steps, transfers, messages and HTTP take what a
measured table says. Only the model is missing (`jaxserve/sim/timed.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from jaxserve.api.errors import ApiError, internal_error
from jaxserve.api.refusals import told
from jaxserve.api.replies import check_finish
from jaxserve.bench.stats import RequestRecord, Slo
from jaxserve.outputs import Delta, EngineError, RequestRefused
from jaxserve.router.calls import PARAMS
from jaxserve.router.counts import Tally
from jaxserve.router.exchange import outcome, verdict
from jaxserve.router.fleet import Fleet
from jaxserve.router.route import (
    AskDecode,
    AskPrefill,
    BreakOff,
    Finish,
    GiveUp,
    Outcome,
    PassRefusal,
    Probe,
    Probed,
    Route,
)
from jaxserve.sim.clockwork import Clockwork
from jaxserve.sim.costs import CostError, CostTable, HttpCost, TransferCost
from jaxserve.sim.engine import Node, SimEngine, Surroundings
from jaxserve.sim.fake_nixl import FakeNixlNetwork, Fault, Posted
from jaxserve.sim.report import EngineUse, Report
from jaxserve.sim.timed import ITEM_BYTES, PAGE_SHAPE, Lender, Measured, NoModel, Wordless
from jaxserve.sim.traffic import Arrival, Trace
from jaxserve.sim.wire import Fate, SimWire
from kv.config import CONSUMER, NIXL, PRODUCER, ConnectorConfig
from kv.moves import RemoteSource
from metrics.stats import PromptTokenStats
from scheduler.types import Inputs, Limits, Plan, Request, SamplingParams, SchedulerConfig

QUEUED_REQUESTS = 1024
"""That may wait at an engine, as by default in `jaxserve serve`; beyond, they are refused."""


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


@dataclass(slots=True, eq=False)
class _Client:
    """One request of the trace. Attributes: problem: why it has no answer. times: of its tokens."""

    number: int
    arrival: Arrival
    route: Route
    ids: tuple[int, ...] = ()
    problem: str | None = None
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
        urls = [f"http://{engine.host}" for engine in (*self._prefill, *self._decode)]
        self._engines = dict(zip(urls, (*self._prefill, *self._decode), strict=True))
        self._fleet, self._tally = Fleet(urls[:prefill], urls[prefill:], max_missed_probes=1), Tally()
        for backend in self._fleet.backends:
            self._fleet.probe_answered(backend, 200)
        self._records: list[RequestRecord | None] = [None] * len(trace.arrivals)
        self._left = len(trace.arrivals)
        for number, arrival in enumerate(trace.arrivals):
            client = _Client(number, arrival, Route(self._fleet, self._tally))
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
            scheduler=SchedulerConfig(
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
            item_bytes=ITEM_BYTES,
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
        page_bytes = ITEM_BYTES * layers * sides * heads * head_dim * self._table.engine.page_size
        pages = posted.num_bytes // page_bytes
        return Fault(cycles=0, seconds=self._transfer.seconds(pages * self._table.engine.page_bytes))

    # The clients, and the router between.

    def _send(self, client: _Client) -> None:
        client.ids = client.arrival.prompt.token_ids()
        self._go_on(client)

    def _take(self, client: _Client, came: Outcome) -> None:
        client.route.take(came)
        self._go_on(client)

    def _go_on(self, client: _Client) -> None:
        """Executes the router's order."""
        match client.route.order:
            case AskPrefill():
                self._later(self._http.router_s + self._http.server_s, client, self._ask_prefill)
            case AskDecode():
                self._later(self._http.server_s, client, self._ask_decode)
            case Probe():
                self._take(client, Probed(well=True))
            case Finish() | PassRefusal():
                self._end(client, client.problem)
            case GiveUp(error=error) | BreakOff(error=error):
                self._end(client, error.message)

    def _later(self, delay: float, client: _Client, action: Callable[[_Client], None]) -> None:
        self._clockwork.after(delay, f"http {client.number}", lambda: action(client))

    def _ask_prefill(self, client: _Client) -> None:
        order = client.route.order
        if not isinstance(order, AskPrefill):
            raise TypeError(f"no prefill engine is to be asked: {order}")

        def heard(delta: Delta) -> None:
            if delta.finish_reason is not None:
                body = {PARAMS: delta.kv_transfer_params}
                self._answered(client, order, self._status(client, delta), body)

        request = _request(client, f"{client.number}-prefill", tokens=1, lease=True)
        self._submit(client, order, request, heard)

    def _ask_decode(self, client: _Client) -> None:
        order = client.route.order
        if not isinstance(order, AskDecode):
            raise TypeError(f"no decode engine is to be asked: {order}")

        def heard(delta: Delta) -> None:
            client.times += [self._clockwork.now] * len(delta.token_ids)
            if delta.finish_reason is not None:
                status = self._status(client, delta)
                self._answered(client, order, 200 if len(client.times) else status, {})

        engine, remote = self._engines[order.backend.url], None
        if order.params is not None:
            remote = engine.door.open(order.params, client.ids, client.arrival.cache_salt).remote
        tokens = client.arrival.output_tokens
        request = _request(client, f"{client.number}-decode", tokens=tokens, remote=remote)
        self._submit(client, order, request, heard)

    def _submit(
        self, client: _Client, order: AskPrefill | AskDecode, request: Request, sink: Callable[[Delta], None]
    ) -> None:
        engine = self._engines[order.backend.url]
        config = engine.node.scheduler
        try:
            engine.submit(request, sink)
        except (EngineError, RequestRefused) as refusal:
            client.problem = str(refusal)
            if isinstance(refusal, RequestRefused):
                bound = f"{config.max_model_len} tokens a sequence and {config.num_pages} pages"
                client.problem = f"too long for engines of {bound}"
            error = told(refusal) or internal_error()
            self._answered(client, order, error.status, error.body())

    def _answered(
        self, client: _Client, order: AskPrefill | AskDecode, status: int, body: Mapping[str, object]
    ) -> None:
        """An answer is whole; of its body there is only what the router reads."""
        how = verdict(self._fleet, order, status)
        self._take(client, outcome(order, how, status, msgspec.json.encode(body)))

    def _status(self, client: _Client, delta: Delta) -> int:
        """The HTTP status of an answer that ends so."""
        try:
            check_finish(delta)
        except ApiError as error:
            client.problem = delta.message or "the request was aborted"
            return error.status
        client.problem = None
        return 200

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
