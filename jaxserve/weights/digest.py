"""A short name for the weights themselves, the same from whatever file they came."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp

from jaxserve.model.config import ModelConfig
from jaxserve.model.sharding import parameter_name
from jaxserve.model.transformer import ModelState

_ANY = ModelConfig.ARCHITECTURES[0]
_UNSIGNED = {2: jnp.uint16, 4: jnp.uint32}


def weights_digest(config: ModelConfig, state: ModelState) -> str:
    """32 hexadecimal digits over what changes the result: numbers of the config, bits of the parameters.

    Parameters are read once, on the devices, at memory speed. Two checkpoints with the same digest hold the
    same weights in the same dtype, whether they came from GGUF, safetensors or Orbax, on any host. It is a
    checksum against mix-ups, not a signature: it does not withstand somebody who looks for two models of one
    digest.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    sums = jax.device_get([_bit_sums(leaf) for _, leaf in leaves])
    numbers = dataclasses.replace(
        config, architecture=_ANY, max_position_embeddings=1, bos_token_id=None, eos_token_ids=()
    )
    digest = hashlib.sha256(repr(numbers).encode())
    for (path, leaf), pair in zip(leaves, sums, strict=True):
        shape = f"{parameter_name(path)} {leaf.dtype} {leaf.shape}"
        digest.update(f"{shape} {pair[0]:08x}{pair[1]:08x}\n".encode())
    return digest.hexdigest()[:32]


@jax.jit
def _bit_sums(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two sums of the elements' bits modulo 2**32, weighted by their places."""
    bits = jax.lax.bitcast_convert_type(leaf, _UNSIGNED[leaf.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    mixed = (bits + jnp.uint32(0x9E3779B9)) * (place * jnp.uint32(0x85EBCA6B) + jnp.uint32(0xC2B2AE35))
    mixed = mixed ^ (mixed >> 15)
    return jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(mixed * jnp.uint32(0x27D4EB2F) ^ place, dtype=jnp.uint32)
