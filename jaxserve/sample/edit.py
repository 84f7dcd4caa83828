"""What changes logits before temperature: bias, the min_tokens mask, penalties."""

import jax.numpy as jnp
from jax import Array, lax

from jaxserve.sample.slots import MAX_COUNT, SlotParams, SlotState


def edited_rows(params: SlotParams, slots: Array, num_outputs: Array, vocab: int) -> Array:
    """Which rows change their logits before temperature: bool `[S]`."""
    return (
        (params.bias_ids[slots, 0] < vocab)
        | (num_outputs < params.min_tokens[slots])
        | _penalised(params, slots)
    )


def _penalised(params: SlotParams, slots: Array) -> Array:
    return (
        (params.repetition[slots] != 1.0) | (params.presence[slots] != 0.0) | (params.frequency[slots] != 0.0)
    )


def edit_logits(logits: Array, state: SlotState, slots: Array, num_outputs: Array) -> Array:
    """Apply bias, the min_tokens mask and penalties, each only where some row has it: float32 `[S, V]`."""
    params, vocab = state.params, logits.shape[1]
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    held_back = num_outputs < params.min_tokens[slots]

    def bias(logits: Array) -> Array:
        return logits.at[rows, params.bias_ids[slots]].add(params.bias_values[slots], mode="drop")

    def hold_back(logits: Array) -> Array:
        stops = jnp.where(held_back[:, None], params.stop_ids[slots], vocab)
        return logits.at[rows, stops].set(-jnp.inf, mode="drop")

    def penalise(logits: Array) -> Array:
        history = state.history[slots]
        counts = (history & MAX_COUNT).astype(jnp.float32)
        repetition = jnp.where(history > 0, params.repetition[slots][:, None], 1.0)
        logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
        logits = logits - params.frequency[slots][:, None] * counts
        return logits - params.presence[slots][:, None] * (counts > 0).astype(jnp.float32)

    logits = lax.cond(jnp.any(params.bias_ids[slots, 0] < vocab), bias, lambda logits: logits, logits)
    logits = lax.cond(jnp.any(held_back), hold_back, lambda logits: logits, logits)
    return lax.cond(jnp.any(_penalised(params, slots)), penalise, lambda logits: logits, logits)
