"""Where prompt tokens came from, for every way that a load can go; and that nothing is ever stuck or lost."""

import itertools
from dataclasses import replace

import pytest

from kv.moves import Load, Loaded, RemoteSource, Safe, Stored
from scheduler.state import check, initial_state
from scheduler.step import step
from scheduler.types import FinishReason, Inputs, Limits, Outcome, SchedulerConfig
from tests.scheduler.moving_world import Faults, MovingWorld
from tests.scheduler.test_moves import LIMITS, NIXL_D, OFFLOAD, SIMPLE, config, finished, multi, stats
from tests.scheduler.world import expected_output, request


class Hand(MovingWorld):
    """A world whose moves end only when a test says so."""

    def _answers(self) -> list:
        return []

    def end_loads(self, good: int | None = None, *, safe: bool = True) -> list:
        """The answers to all loads under way; `good`: leading pages that arrive, None: all."""
        events = []
        for move in [move for move in self.under_way if isinstance(move, Load)]:
            self.under_way.remove(move)
            if good is None and safe:
                events.append(self._load(move))
                continue
            arrived = 0 if good is None else good
            pages = tuple(group[:arrived] for group in move.pages)
            for group, targets in enumerate(pages):
                for place, page in enumerate(targets):
                    self._fill(move, group, place, page)
            self._scribble([page for group in move.pages for page in group[arrived:]])
            if not safe:
                self.dirty[move.move_id] = tuple(page for group in move.pages for page in group)
            events.append(Loaded(move_id=move.move_id, num_pages=arrived, safe=safe, error="it broke"))
        return events

    def end_stores(self) -> list:
        stores = [move for move in self.under_way if not isinstance(move, Load)]
        self.under_way = [move for move in self.under_way if isinstance(move, Load)]
        return [self._store(move) for move in stores]

    def settle(self, bound: int = 400) -> None:
        """Runs to the end with every answer good and at once."""
        for _ in range(bound):
            events = [*self.end_loads(), *self.end_stores(), *(Safe(move_id=move) for move in self.dirty)]
            self.dirty.clear()
            plan = self.step(events=tuple(events))
            quiet = not len(plan.rows) and not plan.gauges.running and not plan.gauges.waiting
            if quiet and not self.under_way and not self.dirty:
                return
        raise AssertionError(f"still live: {plan.gauges} {plan.moves.gauges}")


def arrive(world: MovingWorld, name: str, tokens, *, remote: bool = True, **sampling):
    asked = request(name, tokens, **sampling)
    if remote:
        asked = replace(asked, remote=world.remote(name, tokens))
    return world.step(arrivals=(asked,))


def right(world: MovingWorld, *names: str) -> None:
    for name in names:
        assert world.output(name) == expected_output(world.requests[name], 64)
        assert sum(stats(world, name)) == len(world.requests[name].prompt_token_ids)


def test_cold_then_a_full_local_hit_stops_before_the_last_token():
    for prompt in (8, 9, 11):
        world = Hand(config(NIXL_D), LIMITS)
        arrive(world, "cold", range(prompt), remote=False)
        world.settle()
        arrive(world, "again", range(prompt), remote=False)
        world.settle()
        hit = (prompt - 1) // 4 * 4
        assert stats(world, "cold") == (prompt, 0, 0)
        assert stats(world, "again") == (prompt - hit, hit, 0)


@pytest.mark.parametrize("prompt", [8, 9, 12])
def test_a_peer_brings_only_the_tail_of_a_prompt_that_is_here_already(prompt):
    world = Hand(config(NIXL_D), LIMITS)
    arrive(world, "warm", range(prompt), remote=False)
    world.settle()
    plan = arrive(world, "a", range(prompt))
    hit = (prompt - 1) // 4 * 4
    load = next(command for command in plan.moves.commands if isinstance(command, Load))
    assert load.first_page == hit // 4 and load.num_tokens == prompt - hit and len(load.pages[0]) == 1
    world.settle()
    assert stats(world, "a") == (0, hit, prompt - hit)
    right(world, "a")


@pytest.mark.parametrize(
    ("transfer", "prompt", "warm", "want"),
    [
        (OFFLOAD, 16, 0, (0, 0, 16)),
        (OFFLOAD, 16, 8, (0, 8, 8)),
        (OFFLOAD, 17, 8, (1, 8, 8)),
        (replace(OFFLOAD, block_size=8, pages_per_chunk=2), 16, 8, (0, 8, 8)),
        (replace(OFFLOAD, block_size=8, pages_per_chunk=2), 20, 0, (4, 0, 16)),
        (SIMPLE, 16, 0, (4, 0, 12)),
        (SIMPLE, 17, 8, (1, 8, 8)),
    ],
)
def test_a_host_tier_brings_what_the_table_says(transfer, prompt, warm, want):
    world = Hand(config(transfer), LIMITS)
    arrive(world, "first", range(prompt), remote=False, max_tokens=1)
    world.settle()
    world.step(reset_prefix_cache=True)
    if warm:  # only on the device: the tier holds all of the prompt already
        saved, world.state.connector = world.state.connector, None
        arrive(world, "warm", range(warm + 1), remote=False, max_tokens=1)
        for _ in range(4):
            world.step()
        world.state.connector = saved
    arrive(world, "a", range(prompt), remote=False)
    world.settle()
    assert stats(world, "a") == want
    assert dict(world.prefilled["a"].external_by_tier) == {"host": want[2]}
    right(world, "a")


@pytest.mark.parametrize("good", range(6))
def test_the_leading_verified_pages_of_a_load_count_and_the_rest_is_computed(good):
    world = Hand(config(NIXL_D), LIMITS)
    arrive(world, "a", range(19))
    plan = world.step(events=tuple(world.end_loads(good)))
    assert plan.moves.gauges.loading_pages == 0
    world.settle()
    external = 19 if good == 5 else 4 * good
    assert stats(world, "a") == (19 - external, 0, external)
    right(world, "a")


def test_what_was_promised_at_admission_is_not_changed_by_a_failure():
    world = Hand(config(NIXL_D), LIMITS)
    plan = arrive(world, "a", range(19))
    (promised,) = plan.moves.promised
    assert promised.queried_tokens == 19 and promised.promised == (("p2p", 19),)
    plan = world.step(events=tuple(world.end_loads(0)))
    assert plan.moves.promised == ()
    world.settle()
    assert stats(world, "a") == (19, 0, 0) and world.peers["a"].released == 1


def test_a_request_whose_load_brought_nothing_takes_what_the_host_tier_has():
    world = Hand(config(multi(NIXL_D, SIMPLE), pages=40), LIMITS)
    arrive(world, "warm", range(18), remote=False, max_tokens=1)
    world.settle()
    world.step(reset_prefix_cache=True)
    arrive(world, "a", range(18))
    world.step(events=tuple(world.end_loads(0)))
    world.settle()
    assert stats(world, "a") == (2, 0, 16)
    assert world.prefilled["a"].external_by_tier == (("host", 16),)
    right(world, "a")


@pytest.mark.parametrize("stage", ["waiting", "loading", "unsafe", "fetched", "running"])
def test_an_abort_before_the_first_token_counts_nowhere_and_gives_everything_back(stage):
    world = Hand(config(NIXL_D, pages=12), Limits(max_num_batched_tokens=4, max_num_seqs=1))
    if stage == "waiting":
        arrive(world, "busy", range(60, 64), remote=False, max_tokens=12, ignore_eos=True)
    plan = arrive(world, "a", range(20))
    assert plan.moves.gauges.fetch_waiting == (stage == "waiting")
    if stage == "fetched":
        arrive(world, "busy", range(60, 64), remote=False, max_tokens=12, ignore_eos=True)
    if stage == "unsafe":
        world.step(events=tuple(world.end_loads(safe=False)))
    if stage == "fetched":
        plan = world.step(events=tuple(world.end_loads()))
        assert plan.moves.gauges.fetch_done == 1
    if stage == "running":
        plan = world.step(events=tuple(world.end_loads(1)))
        assert plan.gauges.running == 1
    plan = world.step(aborts=("a",))
    ended = next(entry for entry in plan.finished if entry.request_id == "a")
    assert ended.reason is FinishReason.ABORT
    world.settle()
    assert "a" not in world.prefilled and world.peers["a"].released == 1
    assert world.state.pages.in_use == 0 and not world.state.remotes and not world.state.loading
    if stage == "waiting":
        right(world, "busy")


def test_forks_share_what_a_peer_brought_and_it_is_counted_once():
    world = Hand(config(NIXL_D), LIMITS)
    plan = arrive(world, "a", range(10), n=3)
    assert sum(isinstance(command, Load) for command in plan.moves.commands) == 1
    world.settle()
    assert stats(world, "a") == (0, 0, 10) and world.peers["a"].loads == 1
    for index in range(3):
        assert world.output("a", index) == expected_output(world.requests["a"], 64, index)


def test_prompt_log_probabilities_are_computed_whole_and_the_peer_is_let_go():
    world = Hand(config(NIXL_D), LIMITS)
    plan = arrive(world, "a", range(10), prompt_logprobs=1)
    assert not any(isinstance(command, Load) for command in plan.moves.commands)
    assert world.peers["a"].released == 1
    world.settle()
    assert stats(world, "a") == (10, 0, 0)


def test_a_preemption_before_the_first_token_leaves_what_was_loaded_attributed_to_its_source():
    """The rows of a prompt that arrived in part are taken away by an older sequence that grows."""
    world = Hand(config(NIXL_D, pages=9), Limits(max_num_batched_tokens=4, max_num_seqs=2))
    arrive(world, "old", range(60, 63), remote=False, max_tokens=24, ignore_eos=True)
    arrive(world, "a", range(20), max_tokens=2)
    world.step(events=tuple(world.end_loads(2)))
    world.settle()
    computed, hit, external = stats(world, "a")
    assert (computed, hit, external) == (12, 0, 8)
    right(world, "a", "old")


def test_preempted_after_its_first_token_a_request_keeps_its_split():
    world = Hand(config(NIXL_D, pages=12), LIMITS)
    for name, base in (("a", 0), ("b", 40)):
        arrive(world, name, range(base, base + 14), max_tokens=16, ignore_eos=True)
        world.step(events=tuple(world.end_loads()))
    world.settle()
    assert world.counts["preempted"] > 0
    assert stats(world, "a") == stats(world, "b") == (0, 0, 14)
    right(world, "a", "b")


def test_a_reset_of_the_prefix_cache_while_loading_loses_nothing():
    world = Hand(config(NIXL_D), LIMITS)
    arrive(world, "warm", range(8), remote=False)
    world.settle()
    arrive(world, "a", range(18))
    world.step(reset_prefix_cache=True)
    world.settle()
    assert stats(world, "a") == (0, 4, 14) or stats(world, "a") == (0, 8, 10)
    right(world, "a")


@pytest.mark.parametrize("stage", ["loading", "fetched"])
def test_a_failed_step_voids_what_was_loaded_and_what_is_on_its_way(stage):
    world = Hand(config(NIXL_D), Limits(max_num_batched_tokens=16, max_num_seqs=1))
    arrive(world, "a", range(18))
    arrive(world, "busy", range(60, 64), remote=False, max_tokens=20, ignore_eos=True)
    if stage == "fetched":
        assert world.step(events=tuple(world.end_loads())).moves.gauges.fetch_done == 1
    world.faults.step_fails = 1.0
    plan = world.step()  # its drivers answer that the pool moved
    world.faults.step_fails = 0.0
    assert [entry.request_id for entry in plan.finished] == ["busy"]
    world.settle()
    assert stats(world, "a") == (18, 0, 0)
    right(world, "a")


def test_a_pool_that_moved_voids_the_load_under_way_but_not_the_hit_before_it():
    world = Hand(config(NIXL_D), LIMITS)
    arrive(world, "warm", range(9), remote=False)
    world.settle()
    arrive(world, "a", range(18))
    world.faults.pool_moves = 1.0
    world.step()
    world.faults.pool_moves = 0.0
    world.settle()
    assert stats(world, "a") == (10, 8, 0)
    right(world, "a")


def test_two_requests_that_a_peer_computed_with_one_prefix_are_both_right():
    world = Hand(config(NIXL_D), LIMITS)
    tokens = list(range(16))
    first, second = (replace(request(name, tokens), remote=world.remote(name, tokens)) for name in ("a", "b"))
    plan = world.step(arrivals=(first, second))
    assert sum(isinstance(command, Load) for command in plan.moves.commands) == 2
    world.settle()
    right(world, "a", "b")
    names = [name for _, _, name in world.state.prefix.items()]
    assert len(names) == len(set(names)) and world.state.pages.in_use == 0


def test_answers_of_moves_that_are_over_or_never_were_change_nothing():
    world = Hand(config(NIXL_D), LIMITS)
    arrive(world, "a", range(10))
    (answer,) = world.end_loads()
    strange = (
        Loaded(move_id=99, num_pages=3), Stored(move_id=98), Safe(move_id=97), Safe(move_id=answer.move_id),
        Stored(move_id=answer.move_id),
    )  # fmt: skip
    plan = world.step(events=strange)
    assert plan.moves.gauges.loading_pages == 3 and plan.moves.gauges.fetch_running == 1
    world.step(events=(answer, answer, Safe(move_id=answer.move_id)))
    world.settle()
    assert stats(world, "a") == (0, 0, 10) and world.state.pages.in_use == 0
    right(world, "a")


def test_a_load_that_claims_more_pages_than_were_asked_for_brings_those_asked_for():
    world = Hand(config(NIXL_D), LIMITS)
    arrive(world, "a", range(10))
    (answer,) = world.end_loads()
    world.recount.take = lambda inputs, plan: None  # it takes drivers at their word
    plan = world.step(events=(Loaded(move_id=answer.move_id, num_pages=1000),))
    assert plan.admitted[0].loaded_tokens == 10 and len(plan.rows) == 1
    world.settle()
    assert world.output("a") == expected_output(world.requests["a"], 64)
    assert world.state.pages.in_use == 0


def test_under_the_policy_fail_a_load_of_which_a_part_arrived_ends_the_request():
    world = Hand(config(replace(NIXL_D, failure_policy="fail")), LIMITS)
    arrive(world, "a", range(18))
    plan = world.step(events=tuple(world.end_loads(3)))
    assert finished(world, "a").reason is FinishReason.ERROR and plan.gauges.pages_in_use == 0
    assert "a" not in world.prefilled and world.peers["a"].released == 1


# All short histories of a pool that is hardly big enough: all end, and every page is back.

ACTS = ("good", "half", "unsafe", "safe", "abort a", "abort b", "nothing")
DEPTH = 3


def _remote(name: str, tokens: int) -> RemoteSource:
    pages = (tuple(range(1, -(-tokens // 4) + 1)),)
    return RemoteSource(
        engine_id="p", epoch="0" * 32, host="h", port=1, request_id=name, pages=pages, generations=pages,
        num_tokens=tokens, page_size=4,
    )  # fmt: skip


def _play(pages: int, acts: tuple[str, ...], lengths: tuple[int, int], both: bool) -> None:
    made = SchedulerConfig(
        windows=(None,), page_size=4, num_pages=pages + 1, max_num_seqs=2, max_model_len=32, transfer=NIXL_D
    )
    limits = Limits(max_num_batched_tokens=4, max_num_seqs=2)
    state, pending, loads, unsafe, ended = initial_state(made), None, [], [], set()
    asked = []
    for name, length in zip("ab", lengths, strict=True):
        prompt = [ord(name) + token for token in range(length)]
        entry = request(name, prompt, max_tokens=3, ignore_eos=True)
        remote = _remote(name, length) if name == "a" or both else None
        asked.append(replace(entry, remote=remote))
    history = itertools.chain(acts, itertools.repeat("end"))
    arrivals = tuple(asked)
    for steps, act in enumerate(history):
        events: list = []
        if act in ("good", "half", "unsafe") and loads:
            move = loads.pop(0)
            whole = len(move.pages[0])
            good = {"good": whole, "half": whole // 2, "unsafe": 0}[act]
            error = None if good == whole else "it broke"
            events.append(Loaded(move_id=move.move_id, num_pages=good, safe=act != "unsafe", error=error))
            unsafe += [move.move_id] if act == "unsafe" else []
        elif act == "safe" and unsafe:
            events.append(Safe(move_id=unsafe.pop(0)))
        elif act == "end":
            events = [Loaded(move_id=move.move_id, num_pages=len(move.pages[0])) for move in loads]
            events += [Safe(move_id=move_id) for move_id in unsafe]
            loads, unsafe = [], []
        aborts = (act[-1],) if act.startswith("abort") else ()
        inputs = Inputs(
            arrivals=arrivals, aborts=aborts, outcome=pending, events=tuple(events), now_s=float(steps)
        )
        arrivals = ()
        state, plan = step(state, inputs, limits)
        check(state)
        ended |= {entry.request_id for entry in plan.finished}
        loads += [command for command in plan.moves.commands if isinstance(command, Load)]
        pending = None
        if len(plan.rows):
            pending = Outcome(step_id=plan.step_id, tokens=plan.rows.lens * 0 + 7)
        if ended == {"a", "b"} and not loads and not unsafe and pending is None:
            break
        assert steps < 60, f"stuck: {pages} pages, {acts}, {lengths}: {plan.gauges} {plan.moves.gauges}"
    assert state.pages.in_use == 0 and not state.loading and not state.fetched and not state.remotes
    assert len(state.ledger) == 0


@pytest.mark.parametrize("pages", [3, 4, 5, 6])
@pytest.mark.parametrize("both", [False, True])
def test_in_a_tiny_pool_every_order_of_events_comes_to_an_end(pages, both):
    for acts in itertools.product(ACTS, repeat=DEPTH):
        _play(pages, acts, (8, 7), both)


def test_faults_of_every_kind_at_once_in_a_tiny_pool():
    faults = Faults(load_short=0.4, load_unsafe=0.4, store_fails=0.4, step_fails=0.05, pool_moves=0.05)
    for seed in range(12):
        world = MovingWorld(config(multi(NIXL_D, SIMPLE), pages=8), LIMITS, seed=seed, faults=faults)
        for name, length in (("a", 9), ("b", 16), ("c", 5)):
            tokens = range(length)
            asked = replace(request(name, tokens, max_tokens=6), remote=world.remote(name, tokens))
            world.step(arrivals=(asked,))
        world.run()
        assert world.state.pages.in_use == 0
