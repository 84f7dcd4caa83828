"""Our own checkpoint folders: config.json beside Orbax's files in `weights/`.

Arrays are stored fused, as the model holds them, each under its dotted name, and are read straight into the
shards that want them.
"""

import json
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from orbax.checkpoint import StandardCheckpointer

from jaxserve.model.config import ModelConfig
from jaxserve.model.hf_config import config_to_hf
from jaxserve.model.sharding import parameter_name, parameter_sharding
from jaxserve.model.transformer import ModelGraph, ModelState, abstract_model
from jaxserve.weights.errors import WeightsError
from jaxserve.weights.files import read_json
from jaxserve.weights.hf_folder import one_line

_DRIVERS = ("file", "ocdbt", "zarr", "zarr3")


def save(config: ModelConfig, state: ModelState, folder: Path) -> None:
    """Write config and parameters into an existing folder, bit for bit."""
    named = {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    dtype = str(named["embedding"].dtype)
    with StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve() / "weights", named)
    text = json.dumps(config_to_hf(config, dtype=dtype), indent=2)
    (folder / "config.json").write_text(text + "\n")


def load(
    folder: Path, config: ModelConfig, *, dtype: str, mesh: Mesh | None
) -> tuple[ModelGraph, ModelState]:
    """Read the parameters onto the devices, each shard only what it holds.

    Raises:
        WeightsError: the folder is damaged, holds other parameters than the config needs, or refers to
            storage outside itself.
    """
    weights = folder.resolve() / "weights"
    check_local(weights)
    graphdef, abstract = abstract_model(config, dtype=dtype)

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = parameter_sharding(parameter_name(path), leaf.shape, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    wanted = {parameter_name(path): place(path, leaf) for path, leaf in leaves}
    with StandardCheckpointer() as checkpointer:
        # TensorStore and Orbax raise errors of many types for damaged files: the folder is bad in any case.
        try:
            _check_table(folder, checkpointer.metadata(weights).item_metadata.tree, wanted)
            named = checkpointer.restore(weights, wanted)
        except WeightsError:
            raise
        except Exception as error:
            raise WeightsError(f"{folder}: not a sound Orbax folder: {one_line(error)}") from error
    return graphdef, jax.tree_util.tree_unflatten(structure, [named[name] for name in wanted])


def check_local(weights: Path) -> None:
    """Refuse a folder that could make TensorStore look outside it.

    Raises:
        WeightsError: a symbolic link, an address, or a storage driver that is not local.
    """
    for path in sorted(weights.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise WeightsError(f"{path}: only plain files may be in an Orbax folder")
        if path.name in ("_METADATA", "_CHECKPOINT_METADATA", "_sharding", ".zarray", "zarr.json") or (
            path.is_file() and path.parent.name == "array_metadatas"
        ):
            _check_values(path, read_json(path))


def _check_values(path: Path, value: Any) -> None:
    if isinstance(value, dict):
        driver = value.get("driver", "file")
        if driver not in _DRIVERS:
            raise WeightsError(f"{path}: storage driver {str(driver)[:80]!r} is not allowed")
        for key, inner in value.items():
            _check_values(path, key)
            _check_values(path, inner)
    elif isinstance(value, list):
        for inner in value:
            _check_values(path, inner)
    elif isinstance(value, str) and "://" in value:
        raise WeightsError(f"{path}: names an address, {value[:80]!r}; only local files are read")
    elif isinstance(value, str) and value.startswith(("{", "[")):
        # Orbax keeps JSON within JSON strings.
        try:
            inner = json.loads(value)
        except (ValueError, RecursionError):
            return
        _check_values(path, inner)


def _check_table(folder: Path, found: Any, wanted: dict[str, jax.ShapeDtypeStruct]) -> None:
    """Compare names and shapes before anything is read."""
    if not isinstance(found, dict):
        raise WeightsError(f"{folder}: holds no table of parameters")
    for name, leaf in wanted.items():
        if name not in found:
            raise WeightsError(f"{folder}: parameter {name} is missing")
        shape = tuple(found[name].shape)
        if shape != leaf.shape:
            raise WeightsError(f"{folder}: parameter {name} has shape {shape}, the config needs {leaf.shape}")
        # A stored chunk is decoded as a whole, so that its size is memory that a file can ask for.
        chunk = found[name].storage.chunk_shape if found[name].storage else None
        if chunk is None or any(part > size for part, size in zip(chunk, shape, strict=True)):
            raise WeightsError(f"{folder}: parameter {name} has chunks {chunk} larger than itself")
    for name in found:
        if name not in wanted:
            raise WeightsError(f"{folder}: parameter {str(name)[:200]} is not part of this architecture")
