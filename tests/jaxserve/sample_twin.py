"""Sampling as one would write it in NumPy, a row at a time, with sorts; and the plumbing that tests share."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jaxserve import sample as sm
from scheduler.types import SamplingParams

# Where float32 and float64 may disagree about a filter's edge or about two nearly equal scores.
EDGE = 2e-5
STOPS = (1, 2)

Ids = Sequence[int]

set_slot = jax.jit(sm.set_slot, donate_argnums=0)


@functools.partial(jax.jit, donate_argnums=1)
def step(logits: Any, state: Any, slots: Any, num_outputs: Any, active: Any) -> tuple[Any, sm.SlotState]:
    sampled, state = sm.sample(logits, state, slots, num_outputs, active)
    return sm.pack_sampled(sampled), state


def run(
    logits: np.ndarray,
    state: sm.SlotState,
    slots: Iterable[int],
    num_outputs: Iterable[int],
    active: Iterable[bool] | None = None,
) -> tuple[sm.Sampled, sm.SlotState]:
    """One step on the device, brought back; `state` is consumed."""
    slots = np.array(list(slots), np.int32)
    flags = np.ones(len(slots), bool) if active is None else np.array(list(active), bool)
    packed, state = step(logits, state, slots, np.array(list(num_outputs), np.int32), flags)
    return sm.unpack_sampled(np.asarray(packed)), state


def place(
    state: sm.SlotState, slot: int, params: SamplingParams, seed: int = 0, prompt: Ids = (), output: Ids = ()
) -> sm.SlotState:
    """Give a slot to a sequence, tokens padded to a power of two as the engine does; `state` is consumed."""
    vocab = state.history.shape[1]
    tokens = [*prompt, *output]
    padded = np.full(max(16, 1 << (len(tokens) - 1).bit_length()) if tokens else 1, vocab - 1, np.int32)
    padded[: len(tokens)] = tokens
    packed = sm.pack_slot(params, seed=seed, stop_token_ids=STOPS, vocab_size=vocab)
    return set_slot(state, np.int32(slot), packed, padded, np.int32(len(prompt)), np.int32(len(tokens)))


def threefry(key: tuple[int, int], counter: tuple[int, np.ndarray]) -> np.ndarray:
    """The first output word of Threefry-2x32-20, in 64-bit integers with explicit wrap-around."""
    mask = 0xFFFFFFFF
    keys = [*key, key[0] ^ key[1] ^ 0x1BD11BDA]
    x0 = (counter[1].astype(np.int64) * 0 + counter[0] + keys[0]) & mask
    x1 = (counter[1].astype(np.int64) + keys[1]) & mask
    rotations = [13, 15, 26, 6, 17, 29, 16, 24]
    for index in range(20):
        turn = rotations[index % 8]
        x0 = (x0 + x1) & mask
        x1 = ((x1 << turn) | (x1 >> (32 - turn))) & mask ^ x0
        if index % 4 == 3:
            group = index // 4 + 1
            x0 = (x0 + keys[group % 3]) & mask
            x1 = (x1 + keys[(group + 1) % 3] + group) & mask
    return x0


def edit(logits: np.ndarray, params: SamplingParams, prompt: Ids, output: Ids) -> np.ndarray:
    """Bias, min_tokens and penalties on one row: float32 `[V]`."""
    logits = logits.astype(np.float32)
    for token, value in params.logit_bias:
        logits[token] += np.float32(value)
    if len(output) < params.min_tokens:
        logits[list(STOPS)] = -np.inf
    for token in {*prompt, *output}:
        if logits[token] > 0:
            logits[token] /= np.float32(params.repetition_penalty)
        else:
            logits[token] *= np.float32(params.repetition_penalty)
    for token in set(output):
        count = np.float32(list(output).count(token))
        logits[token] -= np.float32(params.frequency_penalty) * count
        logits[token] -= np.float32(params.presence_penalty)
    return logits


def kept(logits: np.ndarray, params: SamplingParams, slack: float) -> np.ndarray:
    """Which tokens the filters leave: bool `[V]`. Min-p and top-p are widened by the slack."""
    scaled = (logits.astype(np.float64) - logits.max()) / np.float32(params.temperature)
    mask = np.exp(scaled) >= min(np.float64(np.float32(params.min_p)) * (1 - slack), 1.0)
    if params.top_k:
        mask &= logits >= np.sort(np.where(mask, logits, -np.inf))[::-1][: params.top_k].min()
    if params.top_p < 1:
        order = np.argsort(-logits, kind="stable")
        mass = np.where(mask, np.exp(scaled), 0.0)[order]
        reached = np.cumsum(mass) / mass.sum() >= np.float64(np.float32(params.top_p)) + slack
        last = order[np.argmax(reached)] if reached.any() else order[-1]
        mask &= logits >= logits[last]
    return mask


def tokens(
    logits: np.ndarray, params: SamplingParams, seed: int, prompt: Ids = (), output: Ids = ()
) -> set[int]:
    """The tokens that a row may sample: one, or more where rounding decides."""
    edited = edit(logits, params, prompt, output)
    if params.temperature < 1e-5:
        return {int(np.argmax(edited))}
    key = ((seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF)
    words = threefry(key, (len(output), np.arange(len(edited))))
    uniform = np.minimum((words + 0.5) / 2**32, 1 - 2.0**-24)
    scores = -np.log(-np.log1p(-uniform)) + (edited.astype(np.float64) - edited.max()) / np.float32(
        params.temperature
    )
    allowed = set()
    for slack in (-EDGE, 0.0, EDGE):
        left = np.where(kept(edited, params, slack), scores, -np.inf)
        allowed |= {int(token) for token in np.flatnonzero(left >= left.max() - EDGE * (1 + abs(left.max())))}
    return allowed


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of one row, in float64."""
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
