"""How parameters and pages are laid over a mesh for tensor parallelism (Shoeybi et al. 2019).

One axis, "tensor": KV heads with their queries, query heads of the output projection, the MLP's width and
the vocabulary are split, norms are copied. A dimension that the axis does not divide is copied whole. Pages
are split by KV heads, so that a device's part of the attention needs nothing of another's.
"""

from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

AXIS = "tensor"

_SPLIT_DIMENSION = {
    "embedding": 0,
    "head": 0,
    "attention.wqkv": 1,
    "attention.bias": 0,
    "attention.wo": 0,
    "mlp.gate_up": 2,
    "mlp.down": 0,
}


def parameter_name(path: tuple[Any, ...]) -> str:
    """Dotted name of a leaf of the model's state, such as `layers.0.attention.wqkv`."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def parameter_sharding(name: str, shape: tuple[int, ...], mesh: Mesh | None) -> Sharding:
    """Where the parameter goes; without a mesh, to the first local device."""
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    kind = ".".join(name.split(".")[-2:]) if name.startswith("layers.") else name
    dimension = _SPLIT_DIMENSION.get(kind)
    if dimension is None or AXIS not in mesh.shape or shape[dimension] % mesh.shape[AXIS]:
        return NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec(*([None] * dimension), AXIS))


def placed(state: nnx.State[Any, Any], mesh: Mesh | None = None) -> nnx.State[Any, Any]:
    """A model's abstract parameters with the places that their arrays will have."""

    def put(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where = parameter_sharding(parameter_name(path), leaf.shape, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(put, state)


def lay_out(state: nnx.State[Any, Any], mesh: Mesh) -> nnx.State[Any, Any]:
    """A model's parameters over the mesh; those that lie there already stay."""

    def put(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return jax.device_put(leaf, parameter_sharding(parameter_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(put, state)


def split_heads(axis: int) -> PartitionSpec:
    """An array whose dimension `axis` counts heads is split there."""
    return PartitionSpec(*([None] * axis), AXIS)


def pool_sharding(mesh: Mesh, kv_heads: int) -> Sharding:
    """How pages `[P, L, 2, K, C, D]` lie: each device has its KV heads of every page.

    Raises:
        ValueError: the mesh has another axis than "tensor", or does not divide the KV heads.
    """
    if mesh.axis_names != (AXIS,):
        raise ValueError(f"pages are laid over one axis, {AXIS!r}; the mesh has {mesh.axis_names}")
    if kv_heads % mesh.size:
        raise ValueError(f"{mesh.size} devices do not divide {kv_heads} KV heads")
    return NamedSharding(mesh, split_heads(3))


def copied(mesh: Mesh | None) -> Sharding:
    """The whole array on every device of the mesh; without one, on the first local device."""
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, PartitionSpec())
