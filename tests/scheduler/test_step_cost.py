"""What a step of running sequences costs, in calls: counted, not timed, so that a busy machine says the same.

Calls are those of Python functions and of functions in C, a generator's turns among them. A loop over
sequences, pages or prompt tokens that returns to the step shows here.
"""

import sys
from collections.abc import Callable

import numpy as np
import pytest

from kv.config import ConnectorConfig
from scheduler.state import SchedulerState, initial_state
from scheduler.step import step
from scheduler.types import Inputs, Limits, Outcome, Plan, Request, SamplingParams, SchedulerConfig

PAGE = 16
NIXL = ConnectorConfig(kind="NixlConnector", role="kv_consumer")


class Decoding:
    """Sequences that have their prompts behind them; every page boundary is crossed by 1 in 16 per step."""

    def __init__(self, sequences: int, prompt: int = 32, **config) -> None:
        settled = SchedulerConfig(
            page_size=PAGE,
            num_pages=config.pop("num_pages", sequences * (prompt // PAGE + 6)),
            max_num_seqs=sequences,
            max_model_len=prompt + 100,
            **config,
        )
        prompts = np.random.default_rng(0).integers(0, 50_000, (sequences, prompt + PAGE))
        arrivals = tuple(
            Request(
                request_id=f"r{number}",
                prompt_token_ids=tuple(tokens[: prompt + number % PAGE].tolist()),
                sampling=SamplingParams(max_tokens=80),
                eos_token_ids=(50_001,),
            )
            for number, tokens in enumerate(prompts)
        )
        limits = Limits(max_num_batched_tokens=prompts.size, max_num_seqs=sequences)
        self.limits, self.sequences = limits, sequences
        self.state: SchedulerState
        self.state, self.plan = step(initial_state(settled), Inputs(arrivals=arrivals), limits)
        for _ in range(PAGE):
            self.turn()

    def turn(self) -> Plan:
        """Every sequence gets a token."""
        tokens = np.full(self.sequences, 7, np.int32)
        outcome = Outcome(step_id=self.plan.step_id, tokens=tokens)
        self.state, self.plan = step(self.state, Inputs(outcome=outcome), self.limits)
        assert len(self.plan.rows) == self.sequences == len(self.plan.accepted.rows)
        return self.plan

    def calls(self) -> int:
        """Of one step, on average over as many as a page has tokens."""
        return counted(lambda: [self.turn() for _ in range(PAGE)]) // PAGE


def counted(work: Callable[[], object]) -> int:
    """Calls that a piece of work makes."""
    calls = 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


def test_counting_sees_a_loop():
    assert counted(lambda: [len(()) for _ in range(1000)]) >= 1000
    assert counted(lambda: sum(number for number in range(1000))) >= 1000


@pytest.mark.parametrize("transfer", [None, NIXL], ids=["alone", "nixl"])
@pytest.mark.parametrize("windows", [(None,), (None, 32)], ids=["full", "window"])
def test_calls_grow_in_a_line_and_slowly_with_running_sequences(transfer, windows):
    """No loop over sequences is left but over those that fill a page, 1 in 16."""
    few, more, most = (
        Decoding(count, windows=windows, transfer=transfer, num_pages=8 * count * len(windows)).calls()
        for count in (64, 128, 256)
    )
    assert few <= 400
    assert most - few <= 1.5 * (256 - 64)
    assert abs((most - more) - 2 * (more - few)) <= 16


@pytest.mark.parametrize("transfer", [None, NIXL], ids=["alone", "nixl"])
def test_calls_depend_neither_on_the_pool_nor_on_the_prompts(transfer):
    usual = Decoding(64, transfer=transfer).calls()
    assert abs(Decoding(64, transfer=transfer, num_pages=100_000).calls() - usual) <= 2
    assert abs(Decoding(64, transfer=transfer, prompt=2048).calls() - usual) <= 2


def test_requests_that_wait_for_a_slot_cost_no_calls():
    decoding = Decoding(64)
    usual = decoding.calls()
    arrivals = tuple(
        Request(request_id=f"w{number}", prompt_token_ids=(number, 1), sampling=SamplingParams())
        for number in range(200)
    )
    decoding.state, decoding.plan = step(
        decoding.state,
        Inputs(
            arrivals=arrivals,
            outcome=Outcome(step_id=decoding.plan.step_id, tokens=np.full(64, 7, np.int32)),
        ),
        decoding.limits,
    )
    assert abs(decoding.calls() - usual) <= 4
