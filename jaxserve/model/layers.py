"""The parts of a decoder layer. Weights are fused and laid out for one matrix product each.

Shapes: T tokens, E hidden size, F MLP width, H query heads, K KV heads, G = H / K queries per KV head,
D head size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.model.config import ModelConfig
from jaxserve.model.rope import rotate

Attend = Callable[[jax.Array, jax.Array, jax.Array, Any, jax.Array], tuple[jax.Array, Any]]
"""`attend(q [T, H, D], k [T, K, D], v [T, K, D], kv, layer) -> (out [T, H, D], kv)`.

The caller's attention: it stores k and v wherever it keeps KV (`kv` is its own value, passed through) and
attends with scale D ** -0.5; q is not scaled. Query head h reads KV head h // G. `out` is in q's dtype.
`layer` is an int32 scalar, and inside jit: equal layers are traced once.
"""


def project(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """Matrix product that adds up in float32 and rounds once, to x's dtype."""
    return jnp.einsum(equation, x, weight, preferred_element_type=jnp.float32).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale (Zhang and Sennrich 2019) over the last axis; the mean square is float32."""

    def __init__(self, size: int, *, eps: float, dtype: jnp.dtype) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((size,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return normal.astype(x.dtype) * self.scale[...]


class Attention(nnx.Module):
    """Grouped-query attention with one fused projection.

    Parameters: `wqkv [E, K, G + 2, D]`: for each KV head its G query heads, then key, then value, so that a
    shard of K is a shard of everything; `bias [K, G + 2, D]`; `wo [H, D, E]`; `out_bias [E]`.
    """

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype) -> None:
        width, heads, size = config.hidden_size, config.num_heads, config.head_dim
        fused = (config.num_kv_heads, config.queries_per_kv + 2, size)
        self.queries_per_kv = config.queries_per_kv
        self.wqkv = nnx.Param(jnp.zeros((width, *fused), dtype))
        self.bias = nnx.Param(jnp.zeros(fused, dtype)) if config.qkv_bias else None
        self.wo = nnx.Param(jnp.zeros((heads, size, width), dtype))
        self.out_bias = nnx.Param(jnp.zeros((width,), dtype)) if config.out_bias else None
        self.q_norm = RMSNorm(size, eps=config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(size, eps=config.rms_norm_eps, dtype=dtype) if config.qk_norm else None

    def __call__(
        self, x: jax.Array, cosine: jax.Array, sine: jax.Array, kv: Any, attend: Attend, layer: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Attend from tokens `x [T, E]` with rotation `cosine, sine [T, D / 2]`; gives `[T, E]` and kv."""
        fused = project("te,ekgd->tkgd", x, self.wqkv[...])
        if self.bias is not None:
            fused = fused + self.bias[...]
        tokens, kv_heads, _, size = fused.shape
        q = fused[:, :, : self.queries_per_kv].reshape(tokens, kv_heads * self.queries_per_kv, size)
        k, v = fused[:, :, -2], fused[:, :, -1]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out, kv = attend(rotate(q, cosine, sine), rotate(k, cosine, sine), v, kv, layer)
        # Flattened by hand: contracting two axes, XLA's CPU backend transposes the weight at every call.
        y = project("tf,fe->te", out.reshape(tokens, -1), self.wo[...].reshape(-1, x.shape[-1]))
        return (y if self.out_bias is None else y + self.out_bias[...]), kv


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020): silu(x gate) * (x up), then down. `gate_up [E, 2, F]`, `down [F, E]`."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype) -> None:
        self.gate_up = nnx.Param(jnp.zeros((config.hidden_size, 2, config.intermediate_size), dtype))
        self.down = nnx.Param(jnp.zeros((config.intermediate_size, config.hidden_size), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        fused = project("te,ecf->tcf", x, self.gate_up[...])
        return project("tf,fe->te", jax.nn.silu(fused[:, 0]) * fused[:, 1], self.down[...])


class DecoderLayer(nnx.Module):
    """Attention and MLP, each after a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype)

    def __call__(
        self, x: jax.Array, cosine: jax.Array, sine: jax.Array, kv: Any, attend: Attend, layer: jax.Array
    ) -> tuple[jax.Array, Any]:
        """One layer over tokens `x [T, E]`; see Attention."""
        y, kv = self.attention(self.attention_norm(x), cosine, sine, kv, attend, layer)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), kv
