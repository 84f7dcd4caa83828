"""From logits to tokens, on the device.

What is constant for a sequence lives on the device by slot and is written once, when the sequence gets its
slot; a step uploads only slot ids and output indices. Optional features are data: one compiled program per
batch size serves every mix of requests, and work that no row asks for is skipped at run time.

Semantics are vLLM's (V1). Log-probabilities are those of the raw logits. Then, in order: logit bias and the
min_tokens mask, penalties (repetition over prompt and output; presence and frequency over the output),
temperature, min-p, top-k, top-p, draw. Temperature 0 takes the most likely token after bias and penalties.

No sort over the vocabulary. Each filter is a bound on a token's distance from the most likely one, found by
bisection over the distance's bit pattern, which orders non-negative floats. The bound is exact for top-k, and
for top-p up to the rounding of a float32 sum; tokens that tie at it are all kept.

The draw is Gumbel-max (Gumbel 1954). A token's noise is a function of the request's seed, the output index
and the token id alone, through Threefry-2x32-20 (Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", 2011), written out here: neither a setting or release of JAX nor the batch can change what a seed gives.
When logits differ by rounding, Gumbel-max changes its token about as rarely as any method can, unlike a
cumulative sum over the vocabulary, where one early difference moves every later boundary.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxserve.sample.draw import most_likely, pick
from jaxserve.sample.edit import edit_logits, edited_rows
from jaxserve.sample.logprobs import Sampled, pack_sampled, prompt_logprobs, token_logprobs, unpack_sampled
from jaxserve.sample.noise import threefry
from jaxserve.sample.slots import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    SlotParams,
    SlotState,
    count_tokens,
    init_slots,
    pack_slot,
    set_slot,
)

__all__ = [
    "MAX_LOGIT_BIAS",
    "MAX_LOGPROBS",
    "MAX_STOP_TOKEN_IDS",
    "Sampled",
    "SlotParams",
    "SlotState",
    "init_slots",
    "pack_sampled",
    "pack_slot",
    "prompt_logprobs",
    "sample",
    "set_slot",
    "threefry",
    "unpack_sampled",
]


def sample(
    logits: Array, state: SlotState, slots: Array, num_outputs: Array, active: Array
) -> tuple[Sampled, SlotState]:
    """Sample one token per row. Rows depend on nothing but their own logits, slot and output index.

    Args:
        logits: float32 `[S, V]`.
        state: of all slots; donate it, it is updated in place.
        slots: int32 `[S]`, each real slot at most once; padding rows name the dummy.
        num_outputs: int32 `[S]`, the index in its sequence's output of the token to sample.
        active: bool `[S]`, the row really samples; the others change no history and cause no work.
    """
    params = state.params
    drawn = params.temperature[slots] > 0
    edited = edited_rows(params, slots, num_outputs, logits.shape[1])
    tokens, finite = lax.cond(
        jnp.any(active & (drawn | edited)),
        lambda: pick(edit_logits(logits, state, slots, num_outputs), params, slots, num_outputs, active),
        lambda: most_likely(logits),
    )
    logprobs, ranks, top_ids, top_logprobs = lax.cond(
        jnp.any(active & (params.logprobs[slots] >= 0)),
        lambda: token_logprobs(logits, tokens),
        lambda: jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(token_logprobs, logits, tokens)
        ),
    )
    sampled = Sampled(tokens, logprobs, ranks, top_ids, top_logprobs, finite)
    return sampled, count_tokens(state, slots, tokens, active)
