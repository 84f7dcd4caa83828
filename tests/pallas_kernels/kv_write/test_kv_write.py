"""What is written is there, and nothing else has changed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_write import kv_write
from pallas_kernels.pages import BITS
from tests.pallas_kernels.twin import to_bits

KV_HEADS, PAGE_SIZE, HEAD_DIM = 3, 8, 16
POOL = (7, 4, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM)


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_land_in_their_slots_and_nowhere_else(dtype: str, kv_dtype: str) -> None:
    rng = np.random.default_rng(3)
    before = to_bits(rng.standard_normal(POOL, np.float32), kv_dtype)
    slots = rng.permutation(np.arange(PAGE_SIZE, POOL[0] * PAGE_SIZE))[:11]
    page_ids, offsets = slots // PAGE_SIZE, slots % PAGE_SIZE
    k, v = (jnp.asarray(rng.standard_normal((11, KV_HEADS, HEAD_DIM)), dtype) for _ in range(2))
    write = jax.jit(kv_write, static_argnames="kv_dtype", donate_argnums=0)
    ids = [jnp.asarray(x, jnp.int32) for x in (page_ids, offsets)]
    after = write(jnp.asarray(before), k, v, *ids, jnp.int32(2), kv_dtype=kv_dtype)
    expected = before.copy()
    for token in range(11):
        for side, values in enumerate((k, v)):
            bits = to_bits(np.asarray(values[token]), kv_dtype)
            expected[page_ids[token], 2, side, :, offsets[token]] = bits
    np.testing.assert_array_equal(after, expected)


def test_padding_tokens_touch_the_dummy_page_alone() -> None:
    before = jnp.zeros(POOL, BITS["float32"])
    ones = jnp.ones((5, KV_HEADS, HEAD_DIM))
    zeros = jnp.zeros(5, jnp.int32)
    after = np.asarray(kv_write(before, ones, ones, zeros, zeros, 1, kv_dtype="float32"))
    assert after[0, 1, :, :, 0].all()
    assert not after[1:].any()


def test_a_donated_pool_is_given_up() -> None:
    pool = jnp.zeros(POOL, BITS["float32"])
    pointer = pool.unsafe_buffer_pointer()
    ones, zeros = jnp.ones((1, KV_HEADS, HEAD_DIM)), jnp.zeros(1, jnp.int32)
    write = jax.jit(kv_write, static_argnames="kv_dtype", donate_argnums=0)
    after = write(pool, ones, ones, zeros, zeros, 0, kv_dtype="float32")
    assert pool.is_deleted()
    assert after.unsafe_buffer_pointer() == pointer


@pytest.mark.parametrize("tokens", [4, 6])
def test_tokens_that_do_not_fit_are_refused(tokens: int) -> None:
    ones, zeros = jnp.ones((tokens, KV_HEADS, HEAD_DIM)), jnp.zeros(5, jnp.int32)
    with pytest.raises(ValueError, match="k and v must be"):
        kv_write(jnp.zeros(POOL, jnp.uint32), ones, ones, zeros, zeros, 0, kv_dtype="float32")


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_pages_of_other_bits_are_refused(kv_dtype: str) -> None:
    ones, zeros = jnp.ones((5, KV_HEADS, HEAD_DIM)), jnp.zeros(5, jnp.int32)
    with pytest.raises(ValueError, match="must be"):
        kv_write(jnp.zeros(POOL, jnp.uint32), ones, ones, zeros, zeros, 0, kv_dtype=kv_dtype)
