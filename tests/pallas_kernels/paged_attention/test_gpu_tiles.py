"""What a GPU will run, on a machine without one: every row of the table lowers to CUDA and computes right."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import pallas, ragged_paged_attention
from pallas_kernels.paged_attention.tiles import PALLAS_GPU, gpu_tiles
from pallas_kernels.pages import BITS
from tests.pallas_kernels.twin import Shape, make_batch, twin

H200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
RULES = {
    "full": {},
    "all": {"sliding_window": 70, "soft_cap": 5.0, "sinks": np.zeros(8, np.float32)},
}


def lower(
    kv_dtype: str, head_dim: int, page_size: int, tokens: int, rule: dict, kv_heads: int = 2
) -> jax.stages.Lowered:
    """A donating program with attention in it, lowered for a GPU that is not here."""
    struct, rows = jax.ShapeDtypeStruct, 8
    arguments = (
        struct((tokens, 8, head_dim), kv_dtype),
        struct((3000, 30, 2, kv_heads, page_size, head_dim), BITS[kv_dtype]),
        *(struct(shape, jnp.int32) for shape in ((rows, 64), (rows + 1,), (rows,), ())),
    )
    attend = functools.partial(ragged_paged_attention, kv_dtype=kv_dtype, scale=0.1, backend="pallas", **rule)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=H200)):
        return jax.jit(attend).trace(*arguments).lower(lowering_platforms=("cuda",))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("tokens", "uniform", "launches"), [(8, False, 1), (256, False, 2), (256, True, 1)])
@pytest.mark.parametrize(
    ("kv_dtype", "head_dim", "page_size", "rule"),
    [
        ("bfloat16", 64, 16, "full"),
        ("float16", 80, 8, "all"),
        ("bfloat16", 128, 128, "all"),
        ("bfloat16", 256, 64, "all"),
        ("float32", 96, 16, "all"),
        ("float32", 256, 8, "full"),
    ],
)
def test_every_row_of_the_table_lowers_to_cuda(
    kv_dtype: str, head_dim: int, page_size: int, tokens: int, uniform: bool, launches: int, rule: str
) -> None:
    text = lower(kv_dtype, head_dim, page_size, tokens, {**RULES[rule], "uniform": uniform}).as_text()
    assert text.count("custom_call") == launches


@pytest.mark.parametrize(("item_bytes", "head_dim"), PALLAS_GPU)
def test_the_table_has_a_test_here(item_bytes: int, head_dim: int) -> None:
    kv_dtype = "float32" if item_bytes == 4 else "bfloat16"
    assert gpu_tiles(kv_dtype, head_dim) is PALLAS_GPU[item_bytes, head_dim]


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [80, 256])
def test_gpu_tiles_compute_the_same_when_interpreted(
    head_dim: int, kv_dtype: str, uniform: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pallas, "PALLAS_CPU", gpu_tiles(kv_dtype, head_dim))
    shape = Shape(heads=6, kv_heads=2, head_dim=head_dim, kv_dtype=kv_dtype, q_dtype=kv_dtype)
    batch = make_batch(shape, [(1, 200), (40, 40), (2, 33), (90, 250), (1, 16)])
    attend = functools.partial(
        ragged_paged_attention, kv_dtype=kv_dtype, scale=0.1, uniform=uniform, backend="pallas"
    )
    tolerance = 1e-5 if kv_dtype == "float32" else 1e-2
    result = np.asarray(jax.jit(attend)(*batch.arguments)).astype(np.float64)
    np.testing.assert_allclose(result, twin(batch, scale=0.1), rtol=tolerance, atol=tolerance)


def test_the_trace_does_not_choose_the_platform() -> None:
    """Traced on a CPU, lowered for CUDA: compiled; run here: interpreted."""
    batch = make_batch(replace(Shape(), kv_heads=2), [(1, 5)])
    attend = functools.partial(ragged_paged_attention, kv_dtype="float32", scale=0.1, backend="pallas")
    assert "custom_call" not in jax.jit(attend).lower(*batch.arguments).as_text()
