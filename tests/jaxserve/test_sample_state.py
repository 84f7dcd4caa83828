"""What the device keeps of a slot: history across preemption, and updates without a copy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import sample as sm
from scheduler.types import SamplingParams
from tests.jaxserve import sample_twin as twin

VOCAB = 512
PENALISED = SamplingParams(
    temperature=0.9, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.7, min_tokens=3
)


def test_resuming_after_preemption_continues_as_if_nothing_had_happened() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, 1, VOCAB)).astype(np.float32)
    prompt = rng.integers(0, VOCAB, 30).tolist()

    state = twin.place(sm.init_slots(3, VOCAB), 1, PENALISED, 77, prompt)
    whole, mirror = [], None
    for index in range(8):
        sampled, state = twin.run(logits[index], state, [1], [index])
        whole.append(int(sampled.tokens[0]))
        if index == 3:
            mirror = np.array(state.history[1])
    final = np.array(state.history[1])

    # Another sequence has used the new slot meanwhile.
    state = twin.place(sm.init_slots(3, VOCAB), 2, SamplingParams(logprobs=3), 5, prompt, prompt)
    state = twin.place(state, 2, PENALISED, 77, prompt, whole[:4])
    assert (np.array(state.history[2]) == mirror).all()
    resumed = []
    for index in range(4, 8):
        sampled, state = twin.run(logits[index], state, [2], [index])
        resumed.append(int(sampled.tokens[0]))
    assert resumed == whole[4:]
    assert (np.array(state.history[2]) == final).all()
    assert len(set(whole)) > 2


def test_history_holds_prompt_and_counts() -> None:
    prompt, output = [3, 3, 5, VOCAB - 1], [5, 7, 7, 0]
    state = twin.place(sm.init_slots(2, VOCAB), 0, PENALISED, 0, prompt, output)
    history = np.array(state.history)
    assert {int(token): int(history[0, token]) for token in np.flatnonzero(history[0])} == {
        0: 1,
        3: 0x8000,
        5: 0x8001,
        7: 2,
        VOCAB - 1: 0x8000,
    }
    assert not history[1:].any()


def test_counts_saturate() -> None:
    state = twin.place(sm.init_slots(1, VOCAB), 0, SamplingParams(temperature=0.0), 0, [9], [9] * 40000)
    assert int(state.history[0, 9]) == 0xFFFF
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 9] = 1
    sampled, state = twin.run(logits, state, [0], [40000])
    assert sampled.tokens[0] == 9
    assert int(state.history[0, 9]) == 0xFFFF


def test_a_slot_forgets_the_sequence_before() -> None:
    everything = SamplingParams(
        temperature=2.0,
        top_k=3,
        top_p=0.5,
        min_p=0.1,
        repetition_penalty=9.0,
        presence_penalty=1.0,
        frequency_penalty=1.0,
        logit_bias=((1, 5.0), (2, 5.0)),
        logprobs=7,
        min_tokens=100,
        max_tokens=200,
    )
    plain = SamplingParams(temperature=0.0)
    used = twin.place(sm.init_slots(2, VOCAB), 0, everything, -5, [1, 2, 3], [4, 4])
    used = twin.place(used, 0, plain)
    fresh = twin.place(sm.init_slots(2, VOCAB), 0, plain)
    for got, expected in zip(jax.tree.leaves(used), jax.tree.leaves(fresh), strict=True):
        assert (np.array(got) == np.array(expected)).all()


def test_rows_that_do_not_sample_change_nothing_and_ask_for_nothing() -> None:
    logits = np.random.default_rng(1).normal(size=(4, VOCAB)).astype(np.float32)
    state = twin.place(sm.init_slots(2, VOCAB), 0, SamplingParams(logprobs=20), 0, [1], [2])
    state = twin.place(state, 1, SamplingParams(temperature=0.0))
    before = np.array(state.history)
    sampled, state = twin.run(logits, state, [0, 1, 2, 2], [1, 0, 0, 0], [False, True, False, False])
    token = int(sampled.tokens[1])
    before[1, token] += 1
    assert (np.array(state.history) == before).all()
    assert not sampled.logprobs.any()
    assert not sampled.top_ids.any()


@pytest.mark.parametrize("rows", [1, 16])
def test_the_state_is_updated_in_place(rows: int) -> None:
    """No copy of the history anywhere in the program, not even inside a branch."""
    slots, vocab = 31, 1024
    state = sm.init_slots(slots, vocab)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    zeros = np.zeros(rows, np.int32)
    logits = np.zeros((rows, vocab), np.float32)
    compiled = twin.step.lower(logits, state, zeros, zeros, np.ones(rows, bool)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < 6 * rows * vocab * 4 + 200_000
    assert not copies(compiled.as_text(), f"u16[{slots + 1},{vocab}]")
    address = state.history.unsafe_buffer_pointer()
    _, state = compiled(logits, state, zeros, zeros, np.ones(rows, bool))
    assert state.history.unsafe_buffer_pointer() == address


def test_a_slot_is_set_in_place() -> None:
    slots, vocab = 31, 1024
    state = sm.init_slots(slots, vocab)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    packed = sm.pack_slot(PENALISED, seed=1, stop_token_ids=(1,), vocab_size=vocab)
    compiled = twin.set_slot.lower(
        state, np.int32(0), packed, np.zeros(64, np.int32), np.int32(0), np.int32(0)
    ).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == size
    assert not copies(compiled.as_text(), f"u16[{slots + 1},{vocab}]")


def copies(text: str, shape: str) -> list[str]:
    """Lines of a compiled program that copy an array of this shape."""
    return [line for line in text.splitlines() if " copy" in line and shape in line]


def test_the_whole_history_is_not_converted() -> None:
    """A step over 64 MB of history allocates nothing of that size, so that its time cannot grow with it."""
    state = jax.eval_shape(lambda: sm.init_slots(1023, 32768))
    zeros = jax.ShapeDtypeStruct((2,), jnp.int32)
    logits = jax.ShapeDtypeStruct((2, 32768), jnp.float32)
    compiled = twin.step.lower(logits, state, zeros, zeros, jax.ShapeDtypeStruct((2,), bool)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8_000_000
