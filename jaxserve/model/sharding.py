"""How parameters are laid over a mesh for tensor parallelism (Shoeybi et al. 2019).

One axis, "tensor": KV heads with their queries, query heads of the output projection, the MLP's width and
the vocabulary are split, norms are copied. A dimension that the axis does not divide is copied whole.
"""

from typing import Any

import jax
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
