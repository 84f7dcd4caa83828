"""The pure step in small and random worlds, with a full and a sliding-window page group side by side."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.state import initial_state, snapshot
from scheduler.step import step
from scheduler.types import FinishReason, Inputs, Limits, Outcome, SchedulerConfig, Stop
from tests.scheduler.world import World, expected_output, request

PAGE = 4


def world(pages=40, seqs=6, budget=16, windows=(None,), **config) -> World:
    settled = SchedulerConfig(
        windows=windows,
        page_size=PAGE,
        num_pages=pages,
        max_num_seqs=seqs,
        max_model_len=config.pop("max_model_len", 64),
        **config,
    )
    return World(settled, Limits(max_num_batched_tokens=budget, max_num_seqs=seqs))


def assert_as_alone(w: World, request_id: str, index: int = 0) -> None:
    wanted = expected_output(w.requests[request_id], w.config.max_model_len, index)
    assert w.output(request_id, index) == wanted


@pytest.mark.parametrize("windows", [(None,), (None, 6), (5,)])
@pytest.mark.parametrize("budget", [1, 3, 16, 64])
def test_a_request_alone_gives_its_tokens_in_chunks_of_any_size(windows, budget):
    w = world(windows=windows, budget=budget)
    w.step(arrivals=(request("a", range(23)),))
    w.run()
    assert_as_alone(w, "a")
    stats = w.prefilled["a"]
    assert (stats.local_compute, stats.local_cache_hit) == (23, 0)
    assert w.state.pages.in_use == 0


@pytest.mark.parametrize("prompt", [1, 3, 4, 5, 8, 9, 16])
def test_a_second_request_hits_whole_pages_short_of_its_last_token(prompt):
    w = world()
    w.step(arrivals=(request("a", range(prompt)),))
    w.run()
    w.step(arrivals=(request("b", range(prompt)),))
    w.run()
    hit = (prompt - 1) // PAGE * PAGE
    assert w.prefilled["b"].local_cache_hit == hit
    assert w.prefilled["b"].local_compute == prompt - hit
    assert w.output("a") == w.output("b")


def test_other_salts_keys_and_a_disabled_cache_never_hit():
    w = world()
    w.step(arrivals=(request("a", range(12)),))
    w.run()
    w.step(arrivals=(request("b", range(12), cache_salt="tenant"),))
    w.run()
    assert w.prefilled["b"].local_cache_hit == 0
    w = world(enable_prefix_caching=False)
    w.step(arrivals=(request("a", range(12)),))
    w.run()
    plan = w.step(arrivals=(request("b", range(12)),))
    assert plan.admitted[0].queried_tokens == 0
    w.run()
    assert w.prefilled["b"].local_cache_hit == 0


def test_output_pages_are_cached_too():
    w = world()
    w.step(arrivals=(request("a", range(6), max_tokens=10),))
    w.run()
    follow_up = (*range(6), *w.output("a"))
    w.step(arrivals=(request("b", follow_up),))
    w.run()
    assert w.prefilled["b"].local_cache_hit == 12
    assert_as_alone(w, "b")


def test_forks_share_the_prompt_and_count_it_once():
    for caching in (True, False):
        w = world(enable_prefix_caching=caching)
        plan = w.step(arrivals=(request("a", range(14), n=3),))
        assert len(plan.rows) == 1
        plan = w.step()
        assert [entry.index for entry in plan.admitted] == [1, 2]
        assert [entry.hit_tokens for entry in plan.admitted] == [12, 12]
        shared = plan.rows.page_tables[0][:, :3]
        assert (shared == shared[0]).all()
        w.run()
        for index in range(3):
            assert_as_alone(w, "a", index)
        assert list(w.prefilled) == ["a"]
        assert w.prefilled["a"].local_compute == 14


def test_prompt_logprobs_read_nothing_from_the_cache():
    w = world()
    w.step(arrivals=(request("a", range(12)),))
    w.run()
    plan = w.step(arrivals=(request("b", range(12), prompt_logprobs=1),))
    assert plan.admitted[0].queried_tokens == 0
    assert plan.rows.lens[0] == 12
    w.run()
    assert w.prefilled["b"].local_compute == 12


def test_abort_at_any_moment_gives_everything_back():
    for turns in range(12):
        w = world(budget=5)
        w.step(arrivals=(request("a", range(17), n=2), request("b", range(30, 40))))
        for _ in range(turns):
            w.step()
        w.step(aborts=("a", "a", "unknown"))
        w.run()
        assert_as_alone(w, "b")
        assert w.state.pages.in_use == 0 and not w.state.sequences
        if turns < 3:
            assert "a" not in w.prefilled, "aborted before its first token: counted nowhere"


def test_stop_tokens_ends_and_reasons():
    w = world()
    free = expected_output(request("x", range(5), ignore_eos=True, max_tokens=20), 64)
    stop = free[3]
    w.step(arrivals=(request("a", range(5), stop_token_ids=(stop,), ignore_eos=True, max_tokens=20),))
    w.run()
    ended = w.finished["a", 0]
    assert (ended.reason, ended.stop_reason) == (FinishReason.STOP, stop)
    assert w.output("a") == free[: free.index(stop) + 1]
    w.step(
        arrivals=(
            request("b", range(5), stop_token_ids=(stop,), ignore_eos=True, max_tokens=20, min_tokens=6),
        )
    )
    w.run()
    assert len(w.output("b")) >= 6
    w.step(arrivals=(request("c", range(5), ignore_eos=True, max_tokens=None),))
    w.run()
    assert w.finished["c", 0].reason is FinishReason.LENGTH
    assert len(w.tokens["c", 0]) == 64


def test_the_host_ends_a_sequence_with_a_stop_string():
    w = world()
    w.step(arrivals=(request("a", range(5), ignore_eos=True, max_tokens=2), request("b", range(9))))
    w.step()
    plan = w.step(stops=(Stop(request_id="a", index=0, reason=FinishReason.STOP, stop_reason="END"),))
    ended = [entry for entry in plan.finished if entry.request_id == "a"]
    assert [(entry.reason, entry.stop_reason, entry.num_output_tokens) for entry in ended] == [
        ("stop", "END", 2)
    ]
    w.run()
    assert_as_alone(w, "b")


def test_a_request_that_can_never_fit_is_refused_with_the_reason():
    w = world(pages=6, max_model_len=64)
    plan = w.step(
        arrivals=(request("a", range(30)), request("b", range(70)), request("c", range(8), max_tokens=4))
    )
    messages = {entry.request_id: entry.message for entry in plan.finished}
    assert "KV pages" in messages["a"] and "max_model_len" in messages["b"]
    w.run()
    assert_as_alone(w, "c")


def test_preempted_sequences_resume_with_the_same_output_and_the_first_split():
    w = world(pages=14, seqs=4, budget=12, max_model_len=40)
    prompts = {name: range(base, base + 9) for name, base in zip("abcd", (0, 20, 40, 60), strict=True)}
    w.step(
        arrivals=tuple(
            request(name, prompt, max_tokens=16, ignore_eos=True) for name, prompt in prompts.items()
        )
    )
    w.run()
    assert w.counts["preempted"] > 0
    for name in prompts:
        assert_as_alone(w, name)
        assert w.prefilled[name].local_compute == 9, "a resume never rewrites the split"


def test_priority_runs_first_and_is_preempted_last():
    w = world(policy="priority", seqs=1)
    w.step(arrivals=(request("low", range(5), priority=5), request("high", range(10, 15), priority=-1)))
    assert w.slot_owner == {0: ("high", 0)}
    w.run()


def test_a_failed_step_ends_its_rows_and_forgets_the_pool():
    w = world(seqs=2, budget=6)
    w.step(arrivals=(request("a", range(12)), request("b", range(20, 32))))
    w.run_one = w.step()
    w.pending = Outcome(step_id=w.plan.step_id, tokens=np.zeros(0, np.int32), error="device lost")
    rows = {w.slot_owner[int(slot)][0] for slot in w.plan.rows.slots}
    plan = w.step()
    assert {entry.request_id for entry in plan.finished} == rows
    assert all(
        entry.reason is FinishReason.ERROR and entry.message == "device lost" for entry in plan.finished
    )
    for cells in w.cells:
        cells.clear()
    w.pending = w._execute(plan) if len(plan.rows) else None
    w.run()
    for name in {"a", "b"} - rows:
        assert_as_alone(w, name)


def test_reset_forgets_prefixes_but_not_what_runs():
    w = world()
    w.step(arrivals=(request("a", range(12)),))
    w.run()
    w.step(reset_prefix_cache=True)
    assert w.state.pages.idle == 0
    w.step(arrivals=(request("b", range(12)),))
    w.step(reset_prefix_cache=True)
    w.run()
    assert w.prefilled["b"].local_cache_hit == 0
    assert_as_alone(w, "b")


def test_an_outcome_of_another_plan_is_refused():
    state = initial_state(SchedulerConfig(num_pages=8, max_num_seqs=1, max_model_len=8))
    with pytest.raises(ValueError, match="does not belong"):
        step(
            state,
            Inputs(outcome=Outcome(step_id=7, tokens=np.zeros(1, np.int32))),
            Limits(max_num_batched_tokens=4, max_num_seqs=1),
        )


def test_a_snapshot_steps_to_the_same_plan_and_stays_untouched():
    w = world(pages=14, seqs=4, budget=7, windows=(None, 6))
    w.step(arrivals=tuple(request(name, range(n)) for name, n in (("a", 9), ("b", 5), ("c", 13))))
    for _ in range(9):
        inputs = Inputs(outcome=w.pending)
        copy = snapshot(w.state)
        _, twin = step(copy, inputs, w.limits)
        plan = w.step()
        assert twin.rows.tokens.tobytes() == plan.rows.tokens.tobytes()
        assert [table.tobytes() for table in twin.rows.page_tables] == [
            t.tobytes() for t in plan.rows.page_tables
        ]
        assert twin.finished == plan.finished and twin.admitted == plan.admitted


requests = st.tuples(
    st.integers(0, 3),
    st.integers(1, 22),
    st.integers(1, 12),
    st.integers(1, 3),
    st.sampled_from(["", "", "salt"]),
    st.booleans(),
)
worlds = st.tuples(
    st.integers(9, 30),
    st.integers(1, 5),
    st.integers(1, 24),
    st.sampled_from([(None,), (None, 5), (6,), (None, 9)]),
)


@settings(max_examples=150, deadline=None)
@given(worlds, st.lists(st.tuples(requests, st.integers(0, 6), st.integers(0, 40)), min_size=1, max_size=9))
def test_random_worlds(shape, traffic):
    """Outputs as alone, laws after every step, accounting equal to an independent recount, nothing leaked."""
    pages, seqs, budget, windows = shape
    w = world(pages=pages, seqs=seqs, budget=budget, windows=windows, max_model_len=36)
    aborts: dict[int, list[str]] = {}
    turn = 0
    for number, ((family, prompt, output, n, salt, logprobs), gap, doom) in enumerate(traffic):
        tokens = [(family * 7 + place) % 90 for place in range(prompt)]
        name = f"r{number}"
        wanted = request(
            name, tokens, max_tokens=output, n=n, cache_salt=salt, prompt_logprobs=0 if logprobs else None
        )
        if doom < 12:
            aborts.setdefault(turn + doom, []).append(name)
        w.step(arrivals=(wanted,), aborts=tuple(aborts.pop(turn, ())))
        turn += 1
        for _ in range(gap):
            w.step(aborts=tuple(aborts.pop(turn, ())))
            turn += 1
    while aborts:
        w.step(aborts=tuple(aborts.pop(turn, ())))
        turn += 1
    w.run()
    for (name, index), ended in w.finished.items():
        if ended.reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert_as_alone(w, name, index)
    complete = {name for (name, _), ended in w.finished.items() if ended.reason in ("stop", "length")}
    assert complete <= set(w.prefilled)
    assert w.state.pages.in_use == 0 and not w.state.sequences and not w.slot_owner


def test_a_prompt_preempted_half_way_does_not_hit_what_it_computed_itself():
    """Its pages are cached when it resumes; those positions were settled as computed, and stay so."""
    w = world(pages=8, seqs=2, budget=3, max_model_len=28)
    decoding = request("a", range(4), max_tokens=16, ignore_eos=True)
    w.step(arrivals=(decoding, request("b", range(30, 50), max_tokens=2, ignore_eos=True)))
    w.run()
    assert w.counts["preempted"] > 0 and w.counts["hits"] > 0
    stats = w.prefilled["b"]
    assert (stats.local_compute, stats.local_cache_hit) == (20, 0)
    assert_as_alone(w, "a")
    assert_as_alone(w, "b")


def test_the_last_to_come_is_preempted_and_the_first_keeps_its_pages():
    w = world(pages=14, seqs=4, budget=12, max_model_len=40)
    w.step(
        arrivals=tuple(
            request(n, range(i, i + 9), max_tokens=16, ignore_eos=True) for i, n in enumerate("abcd")
        )
    )
    victims = []
    for _ in range(200):
        plan = w.step()
        running = {entry.request.request_id for entry in w.state.running}
        for entry in plan.preempted:
            assert all(entry.request_id > other for other in running), "somebody later still runs"
        victims += [entry.request_id for entry in plan.preempted]
    assert victims and "a" not in victims
