"""Rotary position embedding (Su et al. 2021), in Hugging Face's half-split order."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.model.config import FactorRope, LinearRope, Llama3Rope, ModelConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per token of each rotated pair, scaled as the config says: float32 `[head_dim / 2]`."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    base = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    match config.rope_scaling:
        case None:
            return base
        case LinearRope(factor=factor):
            return (base / np.float32(factor)).astype(np.float32)
        case FactorRope(factors=factors):
            return (base / np.asarray(factors, np.float32)).astype(np.float32)
        case Llama3Rope() as scaling:
            return _llama3(base, scaling)


def _llama3(base: np.ndarray, scaling: Llama3Rope) -> np.ndarray:
    """Llama 3.1's rule: divide the long wavelengths, keep the short, blend between."""
    length = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / base.astype(np.float64)
    blend = (length / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    kept = np.clip(blend, 0.0, 1.0)
    return ((1 - kept) * base / scaling.factor + kept * base).astype(np.float32)


def angles(frequencies: np.ndarray, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of each token's rotation, float32 `[T, head_dim / 2]` each, from positions int32 `[T]`.

    Always float32: in bfloat16 positions beyond 256 are no longer exact.
    """
    radians = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies)[None, :]
    return jnp.cos(radians), jnp.sin(radians)


def rotate(x: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """Rotate heads `x [T, heads, D]` by the tokens' angles; computed in float32, returned in x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosine, sine = cosine[:, None, :], sine[:, None, :]
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x.dtype)
