"""The noise of the draw: a pure function of seed, output index and token id."""

import jax.numpy as jnp
from jax import Array, lax

_PARITY = 0x1BD11BDA
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def gumbel(key: Array, num_outputs: Array, vocab: int) -> Array:
    """Noise of each token, from key uint32 `[S, 2]` and output index int32 `[S]`: float32 `[S, V]`."""
    token = lax.broadcasted_iota(jnp.uint32, (key.shape[0], vocab), 1)
    word, _ = threefry(key[:, :1], key[:, 1:], num_outputs.astype(jnp.uint32)[:, None], token)
    # log1p keeps all 32 bits where they count: a uniform near 0 is a token that wins. Kept below 1, where the
    # noise would be -inf and a token that is the only one left would lose to the masked ones.
    uniform = jnp.minimum((word.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))


def threefry(key0: Array, key1: Array, counter0: Array, counter1: Array) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds: two key words and two counter words to two random words, all uint32.

    The shapes broadcast; the result has the counters' shape.
    """
    keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(_PARITY))
    word0, word1 = counter0 + keys[0], counter1 + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            word0 = word0 + word1
            word1 = word0 ^ ((word1 << rotation) | (word1 >> (32 - rotation)))
        word0 = word0 + keys[(group + 1) % 3]
        word1 = word1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return word0, word1
