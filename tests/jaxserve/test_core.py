"""The engine's turn by itself, over the simulated device: what one request's fault must not do to others."""

from dataclasses import replace

import numpy as np
import pytest

from jaxserve.core import EngineCore
from jaxserve.outputs import Delta, RequestRefused
from jaxserve.sim.clockwork import Clockwork
from jaxserve.sim.device import SimDevice, StepFate
from jaxserve.sim.engine import Node, SimEngine, Surroundings, Weather
from jaxserve.sim.expect import SimTokenizer, expected
from jaxserve.sim.fake_nixl import FakeNixlNetwork, Fault
from jaxserve.sim.hash_model import END, HEAD_DIM, HEADS, ITEM, LAYERS, HashModel
from jaxserve.sim.wire import Fate, SimWire
from kv.config import NIXL, PRODUCER, ConnectorConfig
from scheduler.types import FinishReason, Limits, Request, SamplingParams, SchedulerConfig

LIMITS = Limits(max_num_batched_tokens=16, max_num_seqs=4)
CONFIG = SchedulerConfig(page_size=4, num_pages=40, max_num_seqs=4, max_model_len=48)
MODEL = HashModel()


class Device(SimDevice):
    """Attributes: told: (slot, seed) of every slot as the device was told of it."""

    def start(self, plan, setups, spans):
        self.told = [*getattr(self, "told", []), *((setup.slot, setup.seed) for setup in setups)]
        return super().start(plan, setups, spans)


class Core:
    """A core, and what its clients got."""

    def __init__(self) -> None:
        self.tokenizer = SimTokenizer()
        self.device = Device(
            model=MODEL, num_pages=40, page_size=4, fill=lambda size: bytes(size), fate=StepFate
        )
        self.got: dict[str, list[Delta]] = {}
        self.core = EngineCore(
            CONFIG, LIMITS, self.device, self.tokenizer, max_num_queued_reqs=8, clock=lambda: 0.0
        )

    def ask(self, name: str, prompt: tuple[int, ...], **sampling: object) -> Request:
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 4, "seed": len(name), **sampling})
        request = Request(request_id=name, prompt_token_ids=prompt, sampling=params, eos_token_ids=(END,))
        self.got[name] = []
        self.core.submit(request, self.got[name].append)
        return request

    def turn(self) -> None:
        self.core.turn(self.core.inbox.collect(block=False))

    def run(self) -> None:
        for _ in range(60):
            self.turn()
            if self.core.idle and not self.core.inbox.has_news and not self.core.inbox.num_live:
                return
        raise AssertionError("it does not come to an end")

    def right(self, request: Request) -> bool:
        deltas = self.got[request.request_id]
        wanted = expected(MODEL, request, 0, max_model_len=48, tokenizer=SimTokenizer())
        tokens = tuple(token for delta in deltas for token in delta.token_ids)
        return tokens == wanted.tokens and "".join(delta.text for delta in deltas) == wanted.text


@pytest.mark.parametrize("calls", [1, 2, 5, 9])
def test_a_tokenizer_that_fails_costs_one_request_with_an_error_and_no_more_text(calls):
    """Whether it fails when the request gets its slot or at one of its tokens."""
    engine = Core()
    failing, other = engine.ask("failing", (1, 2, 3, 4, 5)), engine.ask("fine", (9, 8, 7))
    left = calls

    def token_bytes(token_id: int) -> bytes:
        nonlocal left
        left -= 1
        if left == 0:
            raise RuntimeError("the tokenizer has failed")
        return SimTokenizer.token_bytes(engine.tokenizer, token_id)

    engine.tokenizer.token_bytes = token_bytes
    engine.run()
    ends = {name: deltas[-1].finish_reason for name, deltas in engine.got.items()}
    assert sorted(ends.values()) == sorted([FinishReason.ERROR, FinishReason.LENGTH])
    lost = "failing" if ends["failing"] is FinishReason.ERROR else "fine"
    assert engine.right(other if lost == "failing" else failing)
    assert engine.got[lost][-1].message == "the request failed"
    wanted = expected(
        MODEL, failing if lost == "failing" else other, 0, max_model_len=48, tokenizer=SimTokenizer()
    )
    assert wanted.text.startswith("".join(delta.text for delta in engine.got[lost])), "no text with a hole"
    again = engine.ask("again", (4, 4, 4))
    engine.run()
    assert engine.right(again)


def test_a_sequence_placed_in_a_step_that_runs_nothing_keeps_its_sampling_parameters():
    """Its pages had been fetched, and its first chunk found no room: the device runs a step later."""
    engine = Core()
    earlier = engine.ask("earlier", (5, 6, 7), seed=11)
    engine.run()
    later = engine.ask("later", (7, 6, 5), seed=12)
    core = engine.core
    arrived = core.inbox.collect(block=False)
    decide = core._start

    def split(plan, now):
        """The same decision in two plans: the place first, the rows a step later."""
        if not plan.admitted:
            return decide(plan, now)
        empty = np.zeros(0, np.int32)
        tables = tuple(table[:0] for table in plan.rows.page_tables)
        nothing = replace(
            plan.rows, slots=empty, starts=empty, lens=empty, samples=empty.astype(bool),
            num_outputs=empty, tokens=empty, page_tables=tables,
        )  # fmt: skip
        assert decide(replace(plan, rows=nothing), now) is None
        return decide(replace(plan, admitted=(), finished=(), preempted=()), now)

    core._start = split  # the scheduler decides so only with a pool that is short of pages
    core.turn(arrived)
    engine.run()
    assert engine.right(earlier) and engine.right(later)
    assert engine.device.told == [(0, 11), (0, 12)]


def test_an_engine_that_ends_tells_only_those_sequences_that_have_not_ended():
    """Index 0 samples its end token first, the others go on."""
    engine = Core()
    request = engine.ask("several", (1, 2, 3), n=3, max_tokens=40, ignore_eos=False)
    lengths = [
        len(expected(MODEL, request, index, max_model_len=48, tokenizer=SimTokenizer()).tokens)
        for index in range(3)
    ]
    assert len(set(lengths)) > 1, "they end at different times"
    for _ in range(60):
        engine.turn()
        over = [delta.index for delta in engine.got["several"] if delta.finish_reason is not None]
        if over:
            break
    engine.core.close()
    ends = [delta.index for delta in engine.got["several"] if delta.finish_reason is not None]
    assert 0 < len(over) < 3 and sorted(ends) == [0, 1, 2]


def test_a_request_that_can_never_run_is_refused_at_the_door():
    engine = Core()
    with pytest.raises(RequestRefused, match="max_model_len") as refusal:
        engine.ask("too long", tuple(range(48)))
    assert refusal.value.param == "prompt"
    assert not engine.core.inbox.num_live and not engine.core.inbox.has_news


def test_whoever_sees_a_request_end_sees_what_it_has_leased():
    """A drain that saw the end before the lease would close what a peer was promised."""
    clockwork = Clockwork(0)
    node = Node(
        name="p",
        engine_id="p",
        scheduler=replace(CONFIG, transfer=ConnectorConfig(kind=NIXL, role=PRODUCER)),
        limits=LIMITS,
        page_shape=(LAYERS, 2, HEADS, 4, HEAD_DIM),
        item_bytes=ITEM,
    )
    around = Surroundings(
        clockwork=clockwork,
        wire=SimWire(clockwork, lambda here, there, message: Fate(delays=(0.0,)), lambda host: False),
        nixl=FakeNixlNetwork(clock=lambda: clockwork.now, draw=lambda posted: Fault(seconds=0.0)),
        weather=Weather(),
        tokenizer=SimTokenizer(),
    )
    device = SimDevice(model=MODEL, num_pages=40, page_size=4, fill=lambda size: bytes(size), fate=StepFate)
    engine = SimEngine(node, around, device, epoch=f"{1:032x}")
    request = Request(
        request_id="lent",
        prompt_token_ids=(1, 2, 3, 4, 5),
        sampling=SamplingParams(temperature=0.0, max_tokens=1, seed=1),
        lease=True,
    )
    leases: list[int] = []
    engine.submit(request, lambda delta: leases.append(engine.core.num_leases))
    while not leases:
        assert clockwork.run_one()
    assert leases == [1]
