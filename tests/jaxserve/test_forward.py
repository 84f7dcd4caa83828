"""The device programs with a tiny model: chunks, foreign pages, in-place updates, failures."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxserve import sample as sampling
from jaxserve.batch import Bucket, pack
from jaxserve.device import Device, PoolMovedError
from jaxserve.dispatch import Dispatch, PromptSpan, SlotSetup
from jaxserve.forward import Geometry, Programs
from jaxserve.model.config import ModelConfig
from jaxserve.model.transformer import random_model
from jaxserve.weights.load import Loaded
from kv import pool
from kv.types import ITEM_BYTES, KvSpec, PageGroup
from scheduler.types import Accepted, Plan, Rows, SamplingParams

PAGE, MAX_PAGES, SLOTS, VOCAB = 4, 16, 4, 128
PROMPT = np.random.default_rng(0).integers(1, VOCAB, 41).astype(np.int32)


def config(window: int | None = None) -> ModelConfig:
    return ModelConfig(
        architecture="MistralForCausalLM" if window else "LlamaForCausalLM",
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=64,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        sliding_window=window,
        max_position_embeddings=64,
    )


class World:
    """Programs of a tiny model, with pages and slots of their own."""

    def __init__(self, dtype: str = "float32", window: int | None = None, num_pages: int = 40) -> None:
        model = config(window)
        graphdef, self.weights = random_model(model, seed=1, dtype=dtype)
        group = PageGroup(name="full", layers=(0, 1, 2), kv_heads=2, head_dim=16, sliding_window=window)
        self.spec = KvSpec(groups=(group,), page_size=PAGE, dtype=dtype)
        self.pages = pool.create(self.spec, num_pages)
        geometry = Geometry(config=model, page_size=PAGE, max_pages=MAX_PAGES, kv_dtype=dtype, backend="xla")
        self.programs = Programs(graphdef, geometry)
        self.slots = sampling.init_slots(SLOTS, VOCAB)

    def hidden(self, rows: Rows, bucket: Bucket) -> np.ndarray:
        packed = pack(rows, bucket, max_pages=MAX_PAGES, dummy_slot=SLOTS)
        self.pages, hidden = self.programs.forward(self.weights, self.pages, packed, bucket=bucket)
        return np.asarray(hidden.astype("float32"))

    def fill(self, bits: int, *, keep: np.ndarray | None = None) -> None:
        """Writes `bits` into every cell but the `keep` mask's `[pages, page_size]`."""
        held = np.array(self.pages)
        mask = np.zeros((held.shape[0], PAGE), bool) if keep is None else keep
        wide = np.broadcast_to(mask[:, None, None, None, :, None], held.shape)
        self.pages = jax.device_put(np.where(wide, held, held.dtype.type(bits)))


def one_row(tokens: np.ndarray, start: int, count: int, pages: list[int]) -> Rows:
    return Rows(
        slots=np.zeros(1, np.int32),
        starts=np.array([start], np.int32),
        lens=np.array([count], np.int32),
        samples=np.array([True]),
        num_outputs=np.zeros(1, np.int32),
        tokens=tokens[start : start + count],
        page_tables=(np.array([pages], np.int32),),
    )


NAN_BITS = {"float32": 0x7FC00000, "bfloat16": 0x7FC0}


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("sizes", [[41], [1] * 41, [16, 16, 9], [3, 7, 31], [40, 1]])
def test_chunks_of_any_size_give_the_same_last_hidden_state(sizes, window):
    """float32: equal to 1e-5; the order of sums differs between shapes, so equality is not bitwise."""
    pages = list(range(1, 12))
    whole = World(window=window).hidden(one_row(PROMPT, 0, 41, pages), Bucket(tokens=48, rows=2))[40]
    chunked, start, last = World(window=window), 0, None
    for size in sizes:
        bucket = Bucket(tokens=2, rows=2) if size == 1 else Bucket(tokens=48, rows=2)
        last = chunked.hidden(one_row(PROMPT, start, size, pages), bucket)[size - 1]
        start += size
    np.testing.assert_allclose(last, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("count", [1, 6])
def test_pages_of_others_and_unused_slots_never_matter(dtype, window, count):
    """Bitwise: NaN in every page that the batch does not own, and in its last page's unused tail."""
    pages = [5, 3, 9, 12, 7, 2, 30, 31, 6, 22, 11]
    bucket = Bucket(tokens=2, rows=2) if count == 1 else Bucket(tokens=16, rows=2)
    results = []
    for bits in (0, NAN_BITS[dtype]):
        world = World(dtype=dtype, window=window)
        world.hidden(one_row(PROMPT, 0, 30, pages), Bucket(tokens=48, rows=2))
        keep = np.zeros((40, PAGE), bool)
        for position in range(30):
            keep[pages[position // PAGE], position % PAGE] = True
        world.fill(bits, keep=keep)
        results.append(world.hidden(one_row(PROMPT, 30, count, pages), bucket)[:count])
    assert np.isfinite(results[0]).all()
    assert results[0].tobytes() == results[1].tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bucket", [Bucket(tokens=4, rows=4), Bucket(tokens=16, rows=4)])
def test_pages_and_slots_are_updated_in_place(dtype, bucket):
    """No program may hold a pool-shaped temporary: a copy written back would erase what a peer wrote."""
    world = World(dtype=dtype, num_pages=4000)
    packed = pack(one_row(PROMPT, 0, 1, [1]), bucket, max_pages=MAX_PAGES, dummy_slot=SLOTS)
    lowered = world.programs.step.lower(world.weights, world.pages, world.slots, packed, bucket=bucket)
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    pool_bytes = world.pages.size * ITEM_BYTES[dtype]
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(world.slots))
    assert memory.alias_size_in_bytes == pool_bytes + state_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 8
    shape = ",".join(str(size) for size in world.pages.shape)
    assert not [line for line in compiled.as_text().splitlines() if "copy(" in line and f"[{shape}]" in line]
    address = pool.pointer(world.pages)
    for _ in range(3):
        old = world.pages
        world.pages, world.slots, _, _ = world.programs.step(
            world.weights, world.pages, world.slots, packed, bucket=bucket
        )
        assert old.is_deleted() and pool.pointer(world.pages) == address


def test_fused_and_separate_programs_sample_the_same():
    bucket, rows = Bucket(tokens=48, rows=2), one_row(PROMPT, 0, 41, list(range(1, 12)))
    fused, apart = World(), World()
    packed = pack(rows, bucket, max_pages=MAX_PAGES, dummy_slot=SLOTS)
    _, _, together, states = fused.programs.step(
        fused.weights, fused.pages, fused.slots, packed, bucket=bucket
    )
    _, hidden = apart.programs.forward(apart.weights, apart.pages, packed, bucket=bucket)
    _, sampled = apart.programs.sample(apart.weights, hidden, apart.slots, packed, bucket=bucket)
    assert np.asarray(together)[:1, 0] == np.asarray(sampled)[:1, 0]
    np.testing.assert_allclose(np.asarray(states)[:41], np.asarray(hidden)[:41], rtol=1e-5, atol=1e-5)


def device(**changes) -> Device:
    model = config()
    graphdef, weights = random_model(model, seed=1, dtype="float32")
    group = PageGroup(name="full", layers=(0, 1, 2), kv_heads=2, head_dim=16)
    return Device(
        Loaded(config=model, graphdef=graphdef, state=changes.get("weights", weights), weights_digest="tiny"),
        KvSpec(groups=(group,), page_size=PAGE, dtype="float32"),
        num_pages=40,
        max_num_seqs=changes.get("max_num_seqs", SLOTS),
        max_num_batched_tokens=changes.get("max_num_batched_tokens", 48),
        max_model_len=64,
        backend="xla",
        pool_must_stay=changes.get("pool_must_stay", False),
    )


def plan_of(rows: Rows) -> Plan:
    empty = np.zeros(0, np.int32)
    return Plan(step_id=7, rows=rows, accepted=Accepted(rows=empty, slots=empty, tokens=empty))


SETUP = SlotSetup(
    slot=0, sampling=SamplingParams(temperature=0.0), seed=0, stop_token_ids=(), tokens=PROMPT, num_prompt=41
)


def test_a_step_that_fails_is_an_outcome_and_the_next_one_works():
    running = device()
    rows = one_row(PROMPT, 0, 41, list(range(1, 12)))
    good = running.wait(running.start(plan_of(rows), [SETUP], []))
    assert good.outcome.error is None and good.sampled is not None

    real = running._program

    def program(shape):
        def lost(*arguments):
            real(shape)(*arguments)
            raise RuntimeError("the device fell over")

        return lost

    running._program = program
    bad = running.wait(running.start(plan_of(rows), [], []))
    assert bad.outcome.error is not None and "RuntimeError" in bad.outcome.error and bad.sampled is None
    assert "fell over" not in bad.outcome.error, "an exception's text is not for clients"
    running._program = real
    again = running.wait(running.start(plan_of(rows), [SETUP], []))
    assert again.outcome.tokens.tolist() == good.outcome.tokens.tolist()


def test_logits_that_are_no_numbers_are_flagged():
    _, weights = random_model(config(), seed=1, dtype="float32")
    broken = jax.tree.map(lambda leaf: leaf * np.float32("nan"), weights)
    running = device(weights=broken)
    done = running.wait(running.start(plan_of(one_row(PROMPT, 0, 5, [1, 2])), [SETUP], []))
    assert done.sampled is not None and not done.sampled.finite[0]
    assert 0 <= done.outcome.tokens[0] < VOCAB


def compilations() -> list[str]:
    """Fills up with what JAX compiles, or reads from its cache, from now on; JAX tells of every one."""
    names: list[str] = []

    def heard(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(kwargs.get("fun_name", event)))

    jax.monitoring.register_event_duration_secs_listener(heard)
    return names


HELD = list(range(1, 12))
PENALISED = SamplingParams(temperature=0.0, repetition_penalty=1.3)


def test_compiling_ahead_leaves_nothing_to_compile():
    """By the device's count, and by JAX's own, which sees programs that are in no plan too."""
    running, shown = device(), []

    def show(done, total):
        for shape in done:
            shown.append((shape, total))
            yield shape

    built = running.compile(show)
    assert {shape for shape, _ in shown} == set(running.plan) and {total for _, total in shown} == {
        len(built)
    }
    assert all(each.in_place for each in built)
    compiled = compilations()
    penalised = replace(SETUP, sampling=PENALISED)
    span = PromptSpan(slot=0, first_token=0, start=0, targets=PROMPT[1:])
    first = running.wait(running.start(plan_of(one_row(PROMPT, 0, 41, HELD)), [SETUP], []))
    running.wait(running.start(plan_of(one_row(PROMPT, 0, 41, HELD)), [penalised], [span]))
    last = running.wait(running.start(plan_of(one_row(PROMPT, 40, 1, HELD)), [SETUP], []))
    running.wait(running.start(plan_of(one_row(PROMPT, 0, 7, HELD)), [], [span]))
    assert compiled == [] and running.compile_misses == 0 and running.pool_moves == 0
    assert last.dispatch == Dispatch(tokens=2, padding_tokens=1)
    assert first.dispatch == Dispatch(tokens=48, padding_tokens=7)


def test_what_was_not_compiled_ahead_is_compiled_and_counted():
    ahead, lazy = device(), device()
    ahead.compile()
    rows = one_row(PROMPT, 0, 41, HELD)
    span = PromptSpan(slot=0, first_token=0, start=0, targets=PROMPT[1:])
    done = lazy.wait(lazy.start(plan_of(rows), [SETUP], [span]))
    assert done.dispatch.compile_misses == 4 == lazy.compile_misses, "slot, step, rows and log-probabilities"
    again = lazy.wait(lazy.start(plan_of(rows), [SETUP], [span]))
    assert again.dispatch.compile_misses == 0 and lazy.compile_misses == 4
    known = ahead.wait(ahead.start(plan_of(rows), [SETUP], []))
    assert known.outcome.tokens == done.outcome.tokens

    removed = next(shape for shape in ahead.plan if shape.kind == "decode")
    del ahead._built[removed]
    one = one_row(PROMPT, 40, 1, HELD)
    assert ahead.wait(ahead.start(plan_of(one), [], [])).dispatch.compile_misses == 1


def test_a_program_that_copies_the_pages_is_refused_where_peers_write_into_them():
    """Donation is taken away: such a step gives pages at another address."""
    running = device(pool_must_stay=True, max_num_seqs=2, max_num_batched_tokens=4)
    programs = running.blueprint.programs
    programs.step = jax.jit(programs._step, static_argnames="bucket")
    with pytest.raises(PoolMovedError, match="copies the whole page buffer"):
        running.compile()
    assert running.pool_moves == len(running.buckets) == 2
    running._pool_must_stay = False
    built = running.compile()
    assert {each.in_place for each in built if each.shape.bucket} == {False}
