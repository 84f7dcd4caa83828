"""Randomness: what a seed gives is fixed for ever, fair, and the same in any company."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import sample as sm
from scheduler.types import SamplingParams
from tests.jaxserve import sample_twin as twin

# From this code, and the twin in float64 agrees. If these change, every stored seed gives another text.
GOLDEN = [
    [100, 990, 99, 692, 478, 719, 16, 261],
    [599, 592, 889, 779, 376, 868, 911, 460],
    [353, 597, 40, 886, 282, 272, 863, 806],
]
SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 123456789012345678, 42, -42)


def fixed_logits(rows: int, vocab: int) -> np.ndarray:
    """Without any library's random numbers: multiples of 1/64 from -8 to 8."""
    index = np.arange(rows * vocab, dtype=np.uint64).reshape(rows, vocab)
    return ((index * np.uint64(2654435761) >> np.uint64(7)) % np.uint64(1025)).astype(np.float32) / 64 - 8


def draw(logits: np.ndarray, params: SamplingParams, seeds: range, num_outputs: int) -> np.ndarray:
    """One draw per seed from the same distribution: int32 `[seeds]`."""
    state = seeded_slots(params, seeds, len(logits))
    rows = np.broadcast_to(logits, (len(seeds), len(logits)))
    sampled, _ = twin.run(rows, state, range(len(seeds)), [num_outputs] * len(seeds))
    return sampled.tokens


def seeded_slots(params: SamplingParams, seeds: range, vocab: int) -> sm.SlotState:
    """Slots that differ in their seeds alone, set at once."""
    packed = sm.pack_slot(params, seed=0, stop_token_ids=(), vocab_size=vocab)
    stacked = jax.tree.map(lambda value: jnp.repeat(jnp.asarray(value)[None], len(seeds) + 1, axis=0), packed)
    words = [[(seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF] for seed in (*seeds, 0)]
    state = sm.init_slots(len(seeds), vocab)
    return state._replace(params=stacked._replace(key=jnp.array(words, jnp.uint32)))


def chi_square_bound(freedom: int) -> float:
    """Five standard deviations: the seeds are fixed, so a test passes always or never."""
    return freedom + 5 * (2 * freedom) ** 0.5


def test_threefry_known_answers() -> None:
    """The vectors published with the Random123 library; and the twin agrees."""
    ones = 0xFFFFFFFF
    for key, counter, expected in (
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((ones, ones), (ones, ones), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ):
        words = sm.threefry(*(jnp.full((1,), word, jnp.uint32) for word in (*key, *counter)))
        assert tuple(int(word[0]) for word in words) == expected
        assert twin.threefry(key, (counter[0], np.array([counter[1]])))[0] == expected[0]


@pytest.mark.parametrize("partitionable", [True, False])
@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_golden_draws(partitionable: bool, implementation: str) -> None:
    """The same on every release of JAX, under every PRNG setting."""
    with jax.threefry_partitionable(partitionable), jax.default_prng_impl(implementation):
        logits = fixed_logits(len(SEEDS), 1000)
        state = sm.init_slots(len(SEEDS), 1000)
        for slot, seed in enumerate(SEEDS):
            params = SamplingParams(temperature=1.5, top_p=0.95 if slot % 2 else 1.0)
            state = twin.place(state, slot, params, seed=seed)
        drawn = []
        for num_outputs in (0, 1, 70000):
            sampled, state = twin.run(logits, state, range(len(SEEDS)), [num_outputs] * len(SEEDS))
            drawn.append(sampled.tokens.tolist())
    assert drawn == GOLDEN


@pytest.mark.parametrize("vocab", [1000, 1024])
def test_a_row_draws_the_same_in_any_company(vocab: int) -> None:
    rng = np.random.default_rng(0)
    requests = [
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, **edits)
        for temperature in (0.0, 0.7, 1.0)
        for top_k, top_p, min_p in ((0, 1.0, 0.0), (20, 1.0, 0.0), (0, 0.9, 0.0), (40, 0.8, 0.02))
        for edits in ({}, {"frequency_penalty": 0.3, "min_tokens": 9, "logprobs": 2})
    ]
    logits = (rng.normal(size=(len(requests), vocab)) * 3).astype(np.float32)
    history = [rng.integers(0, vocab, 12).tolist() for _ in requests]

    def company(order: list[int], rows: int) -> dict[int, tuple[int, int]]:
        """Sample these requests in this order, in slots of their own, the rest of the rows padding."""
        slots = rng.permutation(rows)
        state = sm.init_slots(rows, vocab)
        for place, request in enumerate(order):
            prompt, output = history[request][:6], history[request][6:]
            state = twin.place(
                state, int(slots[place]), requests[request], request * 7919 - 3, prompt, output
            )
        padding = rows - len(order)
        batch = np.concatenate(
            [logits[order], rng.normal(size=(padding, vocab)).astype(np.float32) * 99], axis=0
        )
        at = [*slots[: len(order)].tolist(), *[rows] * padding]
        sampled, _ = twin.run(batch, state, at, [6] * rows, [True] * len(order) + [False] * padding)
        return {request: int(sampled.tokens[place]) for place, request in enumerate(order)}

    alone = {request: company([request], 1)[request] for request in range(len(requests))}
    everyone = list(range(len(requests)))
    assert company(everyone, 24) == alone
    assert company(everyone[::-1], 64) == alone
    assert company(rng.permutation(len(requests)).tolist(), 32) == alone
    assert company(everyone[:3], 4) == {request: alone[request] for request in everyone[:3]}
    assert len(set(alone.values())) > 6


def test_the_draw_follows_the_distribution() -> None:
    logits = np.linspace(-3, 3, 40).astype(np.float32)
    params = SamplingParams(temperature=1.3)
    drawn = np.concatenate([draw(logits, params, range(4000), index) for index in range(10)])
    expected = np.exp(twin.log_softmax(logits / 1.3)) * len(drawn)
    counts = np.bincount(drawn, minlength=40)
    assert ((counts - expected) ** 2 / expected).sum() < chi_square_bound(39)


@pytest.mark.parametrize(
    "params", [SamplingParams(top_k=5), SamplingParams(top_p=0.7), SamplingParams(min_p=0.2, top_p=0.9)]
)
def test_the_filtered_draw_follows_what_is_left(params: SamplingParams) -> None:
    logits = np.random.default_rng(1).normal(size=40).astype(np.float32) * 2
    left = np.flatnonzero(twin.kept(logits, params, 0.0))
    drawn = np.concatenate([draw(logits, params, range(4000), index) for index in range(3)])
    expected = np.exp(twin.log_softmax(logits[left])) * len(drawn)
    counts = np.bincount(drawn, minlength=40)
    assert counts.sum() == counts[left].sum()
    assert ((counts[left] - expected) ** 2 / expected).sum() < chi_square_bound(len(left) - 1)


@pytest.mark.parametrize("neighbour", ["next output", "next seed", "seed's high word"])
def test_neighbouring_draws_are_independent(neighbour: str) -> None:
    logits, params, count = np.zeros(8, np.float32), SamplingParams(), 6400
    first = draw(logits, params, range(count), 5)
    second = {
        "next output": lambda: draw(logits, params, range(count), 6),
        "next seed": lambda: draw(logits, params, range(1, count + 1), 5),
        "seed's high word": lambda: draw(logits, params, range(1 << 32, (1 << 32) + count), 5),
    }[neighbour]()
    pairs = np.bincount(first * 8 + second, minlength=64)
    expected = count / 64
    assert ((pairs - expected) ** 2 / expected).sum() < chi_square_bound(63)


def test_rare_tokens_are_drawn_as_often_as_they_should() -> None:
    logits = np.array([0.0, *[-9.0] * 199], np.float32)
    drawn = np.concatenate([draw(logits, SamplingParams(), range(4000), index) for index in range(10)])
    mass = 199 * np.exp(-9.0) / (1 + 199 * np.exp(-9.0))
    expected = mass * len(drawn)
    assert abs((drawn > 0).sum() - expected) < 5 * expected**0.5


def test_the_only_token_left_is_drawn_even_with_the_worst_noise() -> None:
    """For this seed the token's random word is 0xFFFFFFEC, which float32 rounds up to 2**32."""
    seed, token = 85324, 466
    assert twin.threefry((0, seed), (0, np.array([token])))[0] == 0xFFFFFFEC
    logits = np.zeros(512, np.float32)
    logits[token] = 1.0
    assert draw(logits, SamplingParams(top_k=1), range(seed, seed + 1), 0).tolist() == [token]
