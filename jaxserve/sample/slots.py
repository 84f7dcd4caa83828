"""What the device keeps of every sequence, by slot: its parameters in fixed width, and its tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from scheduler.types import SamplingParams

MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024

# vLLM's bound: a temperature under it is greedy.
MIN_TEMPERATURE = 1e-5
# Large enough to force or forbid any token, small enough that no sum with a logit overflows float32.
MAX_ABS_BIAS = 1e30

# The two parts of a history entry.
IN_PROMPT = 0x8000
MAX_COUNT = 0x7FFF


class SlotParams(NamedTuple):
    """A sequence's sampling parameters in fixed width: NumPy values of one slot, or device arrays of all.

    Ids that fill up a list equal the vocabulary's size, where scatters drop them.
    """

    key: Array | np.ndarray  # uint32 [2], the seed's high and low word
    temperature: Array | np.ndarray  # float32, 0: greedy
    top_k: Array | np.ndarray  # int32, the vocabulary's size: all
    top_p: Array | np.ndarray  # float32
    min_p: Array | np.ndarray  # float32
    repetition: Array | np.ndarray  # float32
    presence: Array | np.ndarray  # float32
    frequency: Array | np.ndarray  # float32
    min_tokens: Array | np.ndarray  # int32
    logprobs: Array | np.ndarray  # int32, -1: none wanted
    stop_ids: Array | np.ndarray  # int32 [MAX_STOP_TOKEN_IDS]
    bias_ids: Array | np.ndarray  # int32 [MAX_LOGIT_BIAS]
    bias_values: Array | np.ndarray  # float32 [MAX_LOGIT_BIAS]


class SlotState(NamedTuple):
    """What the device knows of every slot; the last slot is the dummy of padding rows.

    Attributes:
        params: each field with a leading axis of `num_slots + 1`.
        history: uint16 `[num_slots + 1, vocab]`. Top bit: the token is in the prompt. Rest: how often it is
            in the output, saturating.
    """

    params: SlotParams
    history: Array


def init_slots(num_slots: int, vocab_size: int) -> SlotState:
    """Slots without a sequence: greedy, nothing else asked for."""
    neutral = pack_slot(SamplingParams(temperature=0.0), seed=0, stop_token_ids=(), vocab_size=vocab_size)
    params = jax.tree.map(lambda value: jnp.repeat(jnp.asarray(value)[None], num_slots + 1, axis=0), neutral)
    return SlotState(params, jnp.zeros((num_slots + 1, vocab_size), jnp.uint16))


def pack_slot(
    params: SamplingParams, *, seed: int, stop_token_ids: Sequence[int], vocab_size: int
) -> SlotParams:
    """Bring a sequence's parameters into fixed width, on the host.

    Args:
        params: `n`, `seed` and what the host does (stop strings, max_tokens) are not read.
        seed: of this sequence; any int64, negative ones too.
        stop_token_ids: ids that min_tokens keeps back, the model's end tokens among them. Ids that the model
            does not have are left out.
        vocab_size: the width of the logits.

    Raises:
        ValueError: too many stop ids, biases or logprobs, or a bias that is NaN or for no token of the model.
    """
    stops = sorted({token for token in stop_token_ids if 0 <= token < vocab_size})
    bias = dict(params.logit_bias)
    wanted = -1 if params.logprobs is None else params.logprobs
    if len(stops) > MAX_STOP_TOKEN_IDS:
        raise ValueError(f"at most {MAX_STOP_TOKEN_IDS} stop token ids, got {len(stops)}")
    if len(bias) > MAX_LOGIT_BIAS:
        raise ValueError(f"at most {MAX_LOGIT_BIAS} logit biases, got {len(bias)}")
    if not -1 <= wanted <= MAX_LOGPROBS:
        raise ValueError(f"at most {MAX_LOGPROBS} logprobs, got {wanted}")
    if any(not 0 <= token < vocab_size or value != value for token, value in bias.items()):
        raise ValueError(f"logit biases must be numbers for token ids from 0 to {vocab_size - 1}")
    stop_ids = np.full(MAX_STOP_TOKEN_IDS, vocab_size, np.int32)
    stop_ids[: len(stops)] = stops
    bias_ids = np.full(MAX_LOGIT_BIAS, vocab_size, np.int32)
    bias_ids[: len(bias)] = list(bias)
    bias_values = np.zeros(MAX_LOGIT_BIAS, np.float32)
    bias_values[: len(bias)] = np.clip(list(bias.values()), -MAX_ABS_BIAS, MAX_ABS_BIAS)
    greedy = params.temperature < MIN_TEMPERATURE
    return SlotParams(
        key=np.array([(seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32),
        temperature=np.array(0.0 if greedy else params.temperature, np.float32),
        top_k=np.array(params.top_k if 0 < params.top_k < vocab_size else vocab_size, np.int32),
        top_p=np.array(params.top_p, np.float32),
        min_p=np.array(params.min_p, np.float32),
        repetition=np.array(params.repetition_penalty, np.float32),
        presence=np.array(params.presence_penalty, np.float32),
        frequency=np.array(params.frequency_penalty, np.float32),
        min_tokens=np.array(params.min_tokens, np.int32),
        logprobs=np.array(wanted, np.int32),
        stop_ids=stop_ids,
        bias_ids=bias_ids,
        bias_values=bias_values,
    )


def set_slot(
    state: SlotState,
    slot: Array,
    slot_params: SlotParams,
    tokens: Array,
    num_prompt: Array,
    num_tokens: Array,
) -> SlotState:
    """Give a slot to a sequence. To be jitted with `state` donated.

    Args:
        state: of all slots.
        slot: int32.
        slot_params: from `pack_slot`.
        tokens: int32 `[N]`, prompt, then the output so far, then padding. Read for penalties only: a single
            padding token does where the sequence has none.
        num_prompt: int32, how many of `tokens` are prompt.
        num_tokens: int32, how many are prompt or output.
    """
    vocab = state.history.shape[1]
    place = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    prompt = jnp.where(place < num_prompt, tokens, vocab)
    output = jnp.where((place >= num_prompt) & (place < num_tokens), tokens, vocab)
    counts = jnp.zeros((vocab,), jnp.int32).at[output].add(1, mode="drop")
    seen = jnp.zeros((vocab,), jnp.int32).at[prompt].set(IN_PROMPT, mode="drop")
    row = (jnp.minimum(counts, MAX_COUNT) | seen).astype(jnp.uint16)
    params = jax.tree.map(lambda all_slots, one: all_slots.at[slot].set(one), state.params, slot_params)
    return SlotState(params, state.history.at[slot].set(row))


def count_tokens(state: SlotState, slots: Array, tokens: Array, active: Array) -> SlotState:
    """Count the tokens, int32 `[S]`, that the active rows of these slots sampled."""
    # Rows that do not sample may share the dummy slot: out of bounds, no two of them write one place.
    written = jnp.where(active, slots, state.history.shape[0])
    old = state.history.at[written, tokens].get(mode="fill", fill_value=0)
    new = jnp.where((old & MAX_COUNT) < MAX_COUNT, old + jnp.uint16(1), old)
    return state._replace(history=state.history.at[written, tokens].set(new, mode="drop"))
