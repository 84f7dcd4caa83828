"""What a row samples, against a NumPy twin that sorts, for any mix of parameters in a batch."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve import sample as sm
from scheduler.types import SamplingParams
from tests.jaxserve import sample_twin as twin

VOCAB = 320
ROWS = 4
GREEDY = SamplingParams(temperature=0.0)

token_ids = st.integers(0, VOCAB - 1)
# Penalties that are exact in float32, so that ties stay ties.
quarters = st.integers(-8, 8).map(lambda quarter: quarter / 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A sequence that samples its next token."""

    params: SamplingParams
    seed: int
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    active: bool


params_strategy = st.builds(
    SamplingParams,
    min_tokens=st.integers(0, 8),
    temperature=st.one_of(st.just(0.0), st.just(1.0), st.floats(0.05, 2.0)),
    top_k=st.one_of(st.just(0), st.integers(1, VOCAB + 5)),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
    repetition_penalty=st.sampled_from([1.0, 0.5, 2.0]),
    presence_penalty=st.one_of(st.just(0.0), quarters),
    frequency_penalty=st.one_of(st.just(0.0), quarters),
    logit_bias=st.dictionaries(
        token_ids, st.one_of(quarters, st.sampled_from([-100.0, 100.0])), max_size=5
    ).map(lambda bias: tuple(bias.items())),
    logprobs=st.one_of(st.none(), st.integers(0, 20)),
)
row_strategy = st.builds(
    Row,
    params=params_strategy,
    seed=st.integers(-(2**63), 2**63 - 1),
    prompt=st.lists(token_ids, min_size=1, max_size=8).map(tuple),
    output=st.lists(token_ids, max_size=8).map(tuple),
    active=st.sampled_from([True, True, True, False]),
)


def random_logits(seed: int, rows: int = ROWS, vocab: int = VOCAB, grid: float = 0.0) -> np.ndarray:
    """Spread like a model's; on a coarse grid there are many ties."""
    logits = np.random.default_rng(seed).normal(size=(rows, vocab)) * 3
    return (np.round(logits / grid) * grid if grid else logits).astype(np.float32)


@settings(deadline=None, max_examples=150)
@given(
    rows=st.lists(row_strategy, min_size=ROWS, max_size=ROWS),
    seed=st.integers(0, 1000),
    grid=st.sampled_from([0, 0.25]),
)
def test_any_mix_of_rows_samples_what_the_twin_samples(rows: list[Row], seed: int, grid: float) -> None:
    logits = random_logits(seed, grid=grid)
    state = sm.init_slots(ROWS, VOCAB)
    for slot, row in enumerate(rows):
        state = twin.place(state, slot, row.params, row.seed, row.prompt, row.output)
    before = np.array(state.history)
    sampled, state = twin.run(
        logits, state, range(ROWS), [len(row.output) for row in rows], [row.active for row in rows]
    )
    after = np.array(state.history)
    wanted = any(row.active and row.params.logprobs is not None for row in rows)
    for index, row in enumerate(rows):
        if not row.active:
            assert (after[index] == before[index]).all()
            continue
        token = int(sampled.tokens[index])
        allowed = twin.tokens(logits[index], row.params, row.seed, row.prompt, row.output)
        assert token in allowed
        assert sampled.finite[index]
        before[index, token] += 1
        assert (after[index] == before[index]).all()
        if wanted:
            check_logprobs(sampled, index, logits[index], token)


def check_logprobs(sampled: sm.Sampled, index: int, logits: np.ndarray, token: int) -> None:
    """Of the raw logits, whatever the row's parameters are."""
    expected = twin.log_softmax(logits)
    assert sampled.tokens[index] == token
    assert np.isclose(sampled.logprobs[index], expected[token], atol=1e-4)
    assert sampled.ranks[index] == (logits >= logits[token]).sum()
    count = min(sm.MAX_LOGPROBS, len(logits))
    ids = sampled.top_ids[index, :count]
    assert len(set(ids.tolist())) == count
    assert (logits[ids] == np.sort(logits)[::-1][:count]).all()
    assert np.allclose(sampled.top_logprobs[index, :count], expected[ids], atol=1e-4)
    assert (sampled.top_logprobs[index, count:] == -np.inf).all()


@pytest.mark.parametrize("vocab", [5, 7, 321, 1024])
def test_any_width_of_vocabulary(vocab: int) -> None:
    logits = random_logits(vocab, rows=8, vocab=vocab)
    state = sm.init_slots(8, vocab)
    params = [GREEDY, SamplingParams(logprobs=3), SamplingParams(top_k=2), SamplingParams(top_p=0.5)] * 2
    for slot in range(8):
        state = twin.place(state, slot, params[slot], seed=slot)
    sampled, _ = twin.run(logits, state, range(8), [0] * 8)
    for slot in range(8):
        assert int(sampled.tokens[slot]) in twin.tokens(logits[slot], params[slot], slot)
        check_logprobs(sampled, slot, logits[slot], int(sampled.tokens[slot]))


def test_the_first_of_equal_tokens_is_greedy() -> None:
    logits = np.zeros((2, 1024), np.float32)
    logits[1, [600, 700, 513]] = 1.0
    state = sm.init_slots(2, 1024)
    sampled, _ = twin.run(logits, state, range(2), [0, 0])
    assert sampled.tokens.tolist() == [0, 513]


def test_a_temperature_too_small_to_matter_is_greedy() -> None:
    logits = random_logits(3)
    state = sm.init_slots(ROWS, VOCAB)
    for slot, temperature in enumerate((0.0, 9e-6, 1e-5, 1e-4)):
        state = twin.place(
            state, slot, SamplingParams(temperature=temperature, top_p=0.9, top_k=7), seed=slot
        )
    sampled, _ = twin.run(logits, state, range(ROWS), [0] * ROWS)
    assert sampled.tokens.tolist() == logits.argmax(1).tolist()


def test_stop_tokens_wait_for_min_tokens() -> None:
    logits = random_logits(4)
    logits[:, twin.STOPS[0]] = 50.0
    state = sm.init_slots(ROWS, VOCAB)
    for slot in range(ROWS):
        temperature = float(slot % 2)
        state = twin.place(state, slot, SamplingParams(temperature=temperature, min_tokens=3), seed=slot)
    for num_outputs in range(5):
        sampled, state = twin.run(logits, state, range(ROWS), [num_outputs] * ROWS)
        stopped = sampled.tokens == twin.STOPS[0]
        assert stopped.all() if num_outputs >= 3 else not np.isin(sampled.tokens, twin.STOPS).any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [100.0, 1e9, 1e38, 1e300, float("inf")])
def test_a_huge_bias_forces_and_forbids(temperature: float, value: float) -> None:
    logits = random_logits(5, rows=2)
    best = int(logits[1].argmax())
    state = sm.init_slots(2, VOCAB)
    forced = SamplingParams(temperature=temperature, logit_bias=((33, value),), top_p=0.9, logprobs=2)
    forbidden = SamplingParams(temperature=temperature, logit_bias=((best, -value),), top_p=0.9)
    state = twin.place(twin.place(state, 0, forced), 1, forbidden)
    sampled, _ = twin.run(logits, state, range(2), [0, 0])
    assert sampled.tokens[0] == 33
    assert sampled.tokens[1] != best
    assert sampled.finite.all()
    check_logprobs(sampled, 0, logits[0], 33)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(top_p=0.8, top_k=9, min_p=0.01, seed=1, logprobs=4),
        SamplingParams(repetition_penalty=2.0, min_tokens=9, logit_bias=((3, 1.0),), top_p=0.9),
    ],
)
def test_a_poisoned_row_is_flagged_and_hurts_no_other(
    poison: float, everywhere: bool, params: SamplingParams
) -> None:
    logits = random_logits(6)
    state = sm.init_slots(ROWS, VOCAB)
    for slot in range(ROWS):
        state = twin.place(state, slot, params, seed=slot, prompt=(3, 4), output=(5,))
    clean, state = twin.run(logits, state, range(ROWS), [1] * ROWS)
    logits[1, slice(None) if everywhere else 77] = poison
    for slot in range(ROWS):
        state = twin.place(state, slot, params, seed=slot, prompt=(3, 4), output=(5,))
    sampled, _ = twin.run(logits, state, range(ROWS), [1] * ROWS)
    others = [0, 2, 3]
    # One impossible token is no fault: models mask their padding ids so.
    assert sampled.finite[1] == (not everywhere and poison == -np.inf)
    assert 0 <= sampled.tokens[1] < VOCAB
    for got, expected in zip(sampled, clean, strict=True):
        assert (got[others] == expected[others]).all()


def test_prompt_logprobs() -> None:
    logits = random_logits(7, rows=6)
    targets = np.array([0, 319, 5, 5, 100, int(logits[5].argmax())], np.int32)
    logits[3, 9] = np.nan
    sampled = sm.unpack_sampled(np.asarray(sm.prompt_logprobs(logits, targets)))
    assert sampled.finite.tolist() == [True, True, True, False, True, True]
    assert sampled.ranks[5] == 1
    for index in (0, 1, 2, 4, 5):
        check_logprobs(sampled, index, logits[index], int(targets[index]))


def test_packing_keeps_every_bit() -> None:
    rng = np.random.default_rng(8)
    original = sm.Sampled(
        tokens=rng.integers(0, 1 << 31, 3, np.int32),
        logprobs=np.array([-0.0, -np.inf, -1e-40], np.float32),
        ranks=rng.integers(0, 1 << 31, 3, np.int32),
        top_ids=rng.integers(0, 1 << 31, (3, 20), np.int32),
        top_logprobs=rng.normal(size=(3, 20)).astype(np.float32),
        finite=np.array([True, False, True]),
    )
    packed = np.asarray(sm.pack_sampled(original))
    assert packed.shape == (3, 44)
    for got, expected in zip(sm.unpack_sampled(packed), original, strict=True):
        assert got.dtype == expected.dtype
        assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("params", "stops"),
    [
        (SamplingParams(), range(129)),
        (SamplingParams(logit_bias=tuple((token, 1.0) for token in range(1025))), ()),
        (SamplingParams(logit_bias=((5000, 1.0),)), ()),
        (SamplingParams(logit_bias=((-1, 1.0),)), ()),
        (SamplingParams(logit_bias=((0, float("nan")),)), ()),
        (SamplingParams(logprobs=21), ()),
    ],
)
def test_what_does_not_fit_a_slot_is_refused(params: SamplingParams, stops: range) -> None:
    with pytest.raises(ValueError, match=r"at most|logit biases must be"):
        sm.pack_slot(params, seed=0, stop_token_ids=tuple(stops), vocab_size=5000)


def test_a_slot_takes_all_that_it_may() -> None:
    params = SamplingParams(
        temperature=0.0, min_tokens=1, logit_bias=tuple((token, -99.0) for token in range(1024))
    )
    packed = sm.pack_slot(params, seed=0, stop_token_ids=(*range(1024, 1152), -1, 5000), vocab_size=2000)
    logits = np.arange(2000, 0, -1, np.float32)[None]
    logits[0, 1152:] -= 700
    state = sm.set_slot(
        sm.init_slots(1, 2000), np.int32(0), packed, np.zeros(1, np.int32), np.int32(0), np.int32(0)
    )
    first, state = twin.run(logits, state, [0], [0])
    assert first.tokens[0] == 0  # 2000 - 99 is still the most
    logits[0, :1024] -= 5000
    held_back, state = twin.run(logits, state, [0], [0])
    free, _ = twin.run(logits, state, [0], [1])
    assert (held_back.tokens[0], free.tokens[0]) == (1152, 1024)
