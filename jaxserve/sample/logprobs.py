"""What a step brings back: tokens, their log-probabilities, and how they travel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxserve.sample.slots import MAX_LOGPROBS


class Sampled(NamedTuple):
    """What one step sampled, of `S` rows; NumPy views after `unpack_sampled`.

    Attributes:
        tokens: int32 `[S]`, always a valid token id.
        logprobs: float32 `[S]`, of the chosen token; 0 where no row wanted logprobs.
        ranks: int32 `[S]`, how many tokens are at least as likely as the chosen one, itself included.
        top_ids: int32 `[S, MAX_LOGPROBS]`, most likely first.
        top_logprobs: float32 `[S, MAX_LOGPROBS]`.
        finite: bool `[S]`. False: the row's logits held NaN or +inf, or nothing but -inf, and its token means
            nothing.
    """

    tokens: Array | np.ndarray
    logprobs: Array | np.ndarray
    ranks: Array | np.ndarray
    top_ids: Array | np.ndarray
    top_logprobs: Array | np.ndarray
    finite: Array | np.ndarray


def pack_sampled(sampled: Sampled) -> Array:
    """One int32 array `[S, 4 + 2 * MAX_LOGPROBS]`, so that a step downloads once; float32 as their bits."""
    columns = (sampled.tokens, _bits(sampled.logprobs), sampled.ranks, sampled.finite.astype(jnp.int32))
    return jnp.concatenate([jnp.stack(columns, 1), sampled.top_ids, _bits(sampled.top_logprobs)], axis=1)


def unpack_sampled(packed: np.ndarray) -> Sampled:
    """The inverse of `pack_sampled`, on the host."""
    floats = packed.view(np.float32)
    top = 4 + MAX_LOGPROBS
    return Sampled(
        tokens=packed[:, 0],
        logprobs=floats[:, 1],
        ranks=packed[:, 2],
        top_ids=packed[:, 4:top],
        top_logprobs=floats[:, top:],
        finite=packed[:, 3] != 0,
    )


def prompt_logprobs(logits: Array, targets: Array) -> Array:
    """Log-probabilities of given tokens, packed as `pack_sampled` does.

    Args:
        logits: float32 `[N, V]`.
        targets: int32 `[N]`, the token that follows at each position.
    """
    finite = jnp.isfinite(jnp.max(logits, axis=1))
    return pack_sampled(Sampled(targets, *token_logprobs(logits, targets), finite))


def token_logprobs(logits: Array, tokens: Array) -> tuple[Array, Array, Array, Array]:
    """Log-probability and rank of the tokens, and the most likely ones: shapes as in `Sampled`."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)
    normaliser = jax.nn.logsumexp(logits, axis=1, keepdims=True)
    ranks = jnp.sum(logits >= chosen, axis=1, dtype=jnp.int32)
    count = min(MAX_LOGPROBS, logits.shape[1])
    top, top_ids = lax.top_k(logits, count)
    pad = ((0, 0), (0, MAX_LOGPROBS - count))
    top_logprobs = jnp.pad(top - normaliser, pad, constant_values=-jnp.inf)
    return (chosen - normaliser)[:, 0], ranks, jnp.pad(top_ids, pad), top_logprobs


def _bits(values: Array | np.ndarray) -> Array:
    return lax.bitcast_convert_type(values, jnp.int32)
