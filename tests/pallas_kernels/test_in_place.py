"""A step writes and reads the pool where it is: a program with a copy of it would undo what others write."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_write import kv_write
from pallas_kernels.page_copy import copy_pages
from pallas_kernels.paged_attention import BACKENDS, ragged_paged_attention
from pallas_kernels.pages import BITS

POOL = (1500, 3, 2, 3, 16, 64)


def step(
    pages: jax.Array,
    x: jax.Array,
    table: jax.Array,
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    page_ids: jax.Array,
    offsets: jax.Array,
    *,
    backend: str,
    kv_dtype: str,
) -> tuple[jax.Array, jax.Array]:
    """What a model does with the pool: every layer writes, then attends, and the next depends on it."""
    for layer in range(POOL[1]):
        pages = kv_write(pages, x[:, :3] * 2, x[:, 3:6], page_ids, offsets, layer, kv_dtype=kv_dtype)
        x += ragged_paged_attention(
            x, pages, table, cu_q_lens, kv_lens, layer, kv_dtype=kv_dtype, scale=0.1, backend=backend
        )
    return pages, x


def assert_in_place(compiled: jax.stages.Compiled, pool: jax.ShapeDtypeStruct, bound: int) -> None:
    pool_bytes = int(np.prod(pool.shape)) * pool.dtype.itemsize
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == pool_bytes
    assert memory.temp_size_in_bytes < bound
    shape = ",".join(map(str, pool.shape))
    assert f"[{shape}]" in compiled.as_text()
    assert not re.findall(rf"\[{shape}\]\S* copy\(", compiled.as_text())
    # The same pool in another type would be a copy as well.
    types = set(re.findall(rf"(\w+)\[{shape}\]", compiled.as_text()))
    assert types == {"u32" if pool.dtype == jnp.uint32 else "u16"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kv_dtype", "tokens"), [("bfloat16", 8), ("bfloat16", 64), ("float32", 64)])
def test_a_step_over_layers_is_in_place(kv_dtype: str, tokens: int, backend: str) -> None:
    rows = 8
    struct = jax.ShapeDtypeStruct
    pool = struct(POOL, BITS[kv_dtype])
    ints = [struct(shape, jnp.int32) for shape in ((rows, 512), (rows + 1,), (rows,), (tokens,), (tokens,))]
    program = jax.jit(functools.partial(step, backend=backend, kv_dtype=kv_dtype), donate_argnums=0)
    compiled = program.lower(pool, struct((tokens, 9, 64), kv_dtype), *ints).compile()
    assert_in_place(compiled, pool, 6_000_000)


def test_copying_pages_holds_only_those_pages() -> None:
    pool = jax.ShapeDtypeStruct(POOL, jnp.uint16)
    ids = jax.ShapeDtypeStruct((8,), jnp.int32)
    page_bytes = int(np.prod(POOL[1:])) * 2
    compiled = jax.jit(copy_pages, donate_argnums=0).lower(pool, ids, ids).compile()
    assert_in_place(compiled, pool, 9 * page_bytes)
