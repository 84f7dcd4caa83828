"""The fast step against its slow twin: the same plans, byte for byte, and the same state."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import scheduler.step
import tests.scheduler.world
from kv.pages import Pages
from scheduler.fill import Batch
from scheduler.record import digest
from scheduler.state import SchedulerState, snapshot
from scheduler.types import FinishReason, Inputs, Limits, Plan, SchedulerConfig, Stop
from tests.scheduler import slow_twin
from tests.scheduler.moving_world import Faults, MovingWorld
from tests.scheduler.test_moves import LAZY, NIXL_D, NIXL_P, OFFLOAD, SIMPLE, multi
from tests.scheduler.world import World, request


class Twins:
    """Steps two states alike and compares."""

    def __init__(self) -> None:
        self.slow: SchedulerState | None = None

    def step(self, state: SchedulerState, inputs: Inputs, limits: Limits) -> tuple[SchedulerState, Plan]:
        self.slow, wanted = slow_twin.step(self.slow or snapshot(state), inputs, limits)
        state, plan = scheduler.step.step(state, inputs, limits)
        assert digest(b"", b"", plan) == digest(b"", b"", wanted)
        assert told(state) == told(self.slow)
        return state, plan


def told(state: SchedulerState) -> list[object]:
    """What later plans depend on."""
    columns, pages = state.columns, state.pages
    slots = sorted(sequence.slot for sequence in state.running if sequence.slot is not None)
    numbers = [
        getattr(columns, name)[slots].tolist()
        for name in ("num_tokens", "num_computed", "high_water", "num_pages", "named_pages")
    ]
    return [
        *numbers,
        [table[slots].tolist() for table in (*columns.page_tables, *columns.first_page)],
        [columns.tokens[slot, : columns.num_tokens[slot]].tolist() for slot in slots],
        [(sequence.slot, sequence.settled, sequence.hit, len(sequence.names)) for sequence in state.running],
        (pages._free, list(pages._idle), pages.refs.tolist(), pages.generation.tolist()),
        (bytes(pages._cached), state.prefix.items()),
    ]


def drive(world: World, chance: random.Random, turns: int) -> None:
    """Random requests, aborts, stops and resets; then the rest runs to its end."""
    names: list[str] = []
    for _ in range(turns):
        arrivals = []
        for _ in range(chance.choice((0, 0, 1, 2))):
            family, length = chance.randrange(3), chance.randint(1, world.config.max_model_len - 2)
            names.append(f"r{len(names)}")
            arrivals.append(
                request(
                    names[-1],
                    [(family * 7 + place) % 90 for place in range(length)],
                    max_tokens=chance.choice((1, 4, 20, None)),
                    n=chance.choice((1, 1, 3)),
                    min_tokens=chance.choice((0, 1)),
                    stop_token_ids=chance.choice(((), (5,), (5, 6, 7))),
                    prompt_logprobs=chance.choice((None, None, 0)),
                    priority=chance.randrange(2),
                )
            )
        stopped = (chance.choice(names),) if names and chance.random() < 0.1 else ()
        world.step(
            arrivals=tuple(arrivals),
            aborts=(chance.choice(names),) if names and chance.random() < 0.1 else (),
            stops=tuple(Stop(request_id=name, index=0, reason=FinishReason.STOP) for name in stopped),
            reset_prefix_cache=chance.random() < 0.03,
        )
    world.run()


SHAPES = st.tuples(
    st.integers(12, 40),
    st.integers(1, 8),
    st.integers(1, 30),
    st.sampled_from([(None,), (None, 5), (6,), (None, 9, 3)]),
    st.sampled_from(["fcfs", "priority"]),
    st.booleans(),
    st.integers(0, 2**32),
)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.sampled_from([None, OFFLOAD, SIMPLE, LAZY, NIXL_P, multi(NIXL_D, SIMPLE)]))
def test_fast_and_slow_steps_are_equal_in_random_worlds(shape, transfer):
    pages, seqs, budget, windows, policy, caching, seed = shape
    config = SchedulerConfig(
        windows=windows,
        page_size=4,
        num_pages=pages * len(windows),
        max_num_seqs=seqs,
        max_model_len=36,
        policy=policy,
        enable_prefix_caching=caching,
        transfer=transfer,
    )
    limits = Limits(max_num_batched_tokens=budget, max_num_seqs=seqs)
    faults = Faults(load_short=0.1, store_fails=0.1, step_fails=0.02, pool_moves=0.02)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tests.scheduler.world, "step", Twins().step)
        drive(MovingWorld(config, limits, seed=seed, faults=faults), random.Random(seed), 25)


def test_the_worlds_meet_what_the_fast_step_does_apart(monkeypatch):
    """Else the comparison would show nothing: preemptions, pages held back, ends, windows, several pages."""
    met = dict.fromkeys(("preempted", "held back", "finished", "evicted"), 0)
    fill, take = scheduler.step.fill_running, Pages.take

    def seen(state: SchedulerState, batch: Batch) -> None:
        fill(state, batch)
        met["preempted"] += len(batch.preempted)
        met["held back"] += len(batch.held_back)

    def taken(pages: Pages, count: int) -> tuple[list[int], list[int]]:
        answer = take(pages, count)
        met["evicted"] += len(answer[1])
        return answer

    monkeypatch.setattr(scheduler.step, "fill_running", seen)
    monkeypatch.setattr(Pages, "take", taken)
    config = SchedulerConfig(
        windows=(None, 9), page_size=4, num_pages=20, max_num_seqs=5, max_model_len=36, transfer=SIMPLE
    )
    world = MovingWorld(config, Limits(max_num_batched_tokens=12, max_num_seqs=5))
    drive(world, random.Random(0), 40)
    met["finished"] = len(world.finished)
    assert all(met.values()), met
