"""The model: tokens in, hidden states and logits out. It knows no pages, rows or requests.

graphdef, state = nnx.split(model)
step = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state).hidden(*inputs, attend))
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.model.config import ModelConfig
from jaxserve.model.layers import Attend, DecoderLayer, RMSNorm
from jaxserve.model.rope import angles, inverse_frequencies


class Transformer(nnx.Module):
    """A decoder of the Llama family (Touvron et al. 2023) with weights of one dtype.

    Parameters: `embedding [V, E]`, `head [V, E]` (None where tied), the layers' and the last norm's.
    Built concretely its weights are zeros; loaders build it abstractly and pour weights in.
    """

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype) -> None:
        table = (config.vocab_size, config.hidden_size)
        self.config = config
        self.embedding = nnx.Param(jnp.zeros(table, dtype))
        self.layers = nnx.List([DecoderLayer(config, dtype=dtype) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.head = None if config.tie_word_embeddings else nnx.Param(jnp.zeros(table, dtype))

    def hidden(
        self, tokens: jax.Array, positions: jax.Array, kv: Any, attend: Attend
    ) -> tuple[jax.Array, Any]:
        """Run all layers over the tokens of any number of sequences, laid end to end.

        Args:
            tokens: int32 `[T]`.
            positions: int32 `[T]`, each token's place in its sequence.
            kv: the caller's value, a pytree, handed from layer to layer and returned.
            attend: see Attend; traced once for layers that are equal.

        Returns:
            The residual stream `[T, E]` in the weights' dtype, before the last norm, and kv.
        """
        cosine, sine = angles(inverse_frequencies(self.config), positions)
        x = self.embedding[...][tokens]

        # Called and not unrolled by hand: equal layers are traced once. XLA inlines the calls, so the program
        # is that of a loop, whereas a scan over stacked weights copies each layer's weights on a CPU.
        @functools.partial(jax.jit, static_argnums=0)
        def run(
            layer: nnx.GraphDef[DecoderLayer], state: ModelState, x: jax.Array, kv: Any, index: jax.Array
        ) -> tuple[jax.Array, Any]:
            return nnx.merge(layer, state)(x, cosine, sine, kv, attend, index)

        for index, layer in enumerate(self.layers):
            x, kv = run(*nnx.split(layer), x, kv, jnp.int32(index))
        return x, kv

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Last norm and head: float32 `[S, V]` from any rows `[S, E]` of what `hidden` gave."""
        table = self.embedding[...] if self.head is None else self.head[...]
        return jnp.einsum("se,ve->sv", self.norm(hidden), table, preferred_element_type=jnp.float32)


ModelGraph = nnx.GraphDef[Transformer]
"""The model's structure without its parameters; hashable, equal for equal configs and dtypes."""
ModelState = nnx.State[Any, Any]
"""The model's parameters."""


def abstract_model(config: ModelConfig, *, dtype: str) -> tuple[ModelGraph, ModelState]:
    """The model's structure and the shapes and dtypes of its parameters; allocates nothing.

    Args:
        dtype: "float32" or "bfloat16".
    """
    build = functools.partial(Transformer, config, dtype=jnp.dtype(dtype))
    return nnx.split(nnx.eval_shape(build))


def random_model(config: ModelConfig, *, seed: int, dtype: str) -> tuple[ModelGraph, ModelState]:
    """A model with random weights, for tests and benchmarks. Same seed, same weights, on any machine.

    Matrices are normal with standard deviation 1 / sqrt(E); norms are ones, biases small.
    """
    graphdef, state = abstract_model(config, dtype=dtype)
    rng = np.random.default_rng(seed)

    def fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.endswith(("norm.scale", "norm.scale.value")):
            return jnp.ones(leaf.shape, leaf.dtype)
        values = rng.standard_normal(leaf.shape, np.float32) * np.float32(config.hidden_size**-0.5)
        return jnp.asarray(values, leaf.dtype)

    return graphdef, jax.tree_util.tree_map_with_path(fill, state)


def dense_attend(
    q: jax.Array, k: jax.Array, v: jax.Array, kv: Any, layer: jax.Array, *, sliding_window: int | None = None
) -> tuple[jax.Array, Any]:
    """Causal attention over one whole sequence, for tests and goldens; kv is passed through.

    Args:
        q: `[T, H, D]`.
        k: `[T, K, D]`.
        v: `[T, K, D]`.
        kv: anything.
        layer: not used.
        sliding_window: see ModelConfig; bind it with functools.partial.

    Returns:
        `[T, H, D]` in q's dtype, and kv. Scores and softmax are float32.
    """
    tokens, heads, size = q.shape
    grouped = q.reshape(tokens, k.shape[1], heads // k.shape[1], size)
    scores = jnp.einsum("tkgd,skd->kgts", grouped, k, preferred_element_type=jnp.float32) * size**-0.5
    distance = jnp.arange(tokens)[:, None] - jnp.arange(tokens)[None, :]
    seen = (distance >= 0) if sliding_window is None else (distance >= 0) & (distance < sliding_window)
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(q.dtype)
    out = jnp.einsum("kgts,skd->tkgd", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(tokens, heads, size).astype(q.dtype), kv
