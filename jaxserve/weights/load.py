"""From a source to a model on the devices, one parameter at a time."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.model.config import ModelConfig
from jaxserve.model.sharding import parameter_name, parameter_sharding
from jaxserve.model.transformer import ModelGraph, ModelState, abstract_model
from jaxserve.weights import orbax_folder
from jaxserve.weights.digest import weights_digest
from jaxserve.weights.errors import WeightsError
from jaxserve.weights.gguf_checkpoint import gguf_checkpoint
from jaxserve.weights.gguf_file import open_gguf
from jaxserve.weights.hf_folder import hf_checkpoint, read_config
from jaxserve.weights.parts import Checkpoint, check_names, parts
from jaxserve.weights.source import ModelSource


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Loaded:
    """A model ready to run: `nnx.merge(graphdef, state)` inside jit.

    Attributes:
        config: the model's numbers.
        graphdef: its structure, hashable.
        state: its parameters, on the devices.
        weights_digest: see digest.weights_digest.
    """

    config: ModelConfig
    graphdef: ModelGraph
    state: ModelState
    weights_digest: str


def model_config(source: ModelSource) -> ModelConfig:
    """A model's numbers; reads no weights.

    Raises:
        WeightsError: its configuration cannot be read.
    """
    return (
        gguf_checkpoint(open_gguf(source.path)).config if source.kind == "gguf" else read_config(source.path)
    )


def load_model(source: ModelSource, *, dtype: str, mesh: Mesh | None = None) -> Loaded:
    """Read a model's weights onto the devices.

    Args:
        source: from `resolve`.
        dtype: "float32" or "bfloat16"; other dtypes in the file are cast.
        mesh: devices with an axis "tensor"; None: the first local device.

    Raises:
        WeightsError: anything wrong with the model's files; one line.
    """
    if dtype not in ("float32", "bfloat16"):
        raise WeightsError(f"dtype must be float32 or bfloat16, got {dtype!r}")
    match source.kind:
        case "gguf":
            gguf = gguf_checkpoint(open_gguf(source.path))
            config = gguf.config
            graphdef, state = pour(gguf, config, dtype=dtype, mesh=mesh)
        case "hf":
            config = read_config(source.path)
            graphdef, state = pour(hf_checkpoint(source.path), config, dtype=dtype, mesh=mesh)
        case "orbax":
            config = read_config(source.path)
            graphdef, state = orbax_folder.load(source.path, config, dtype=dtype, mesh=mesh)
    return Loaded(config=config, graphdef=graphdef, state=state, weights_digest=weights_digest(config, state))


def pour(
    checkpoint: Checkpoint, config: ModelConfig, *, dtype: str, mesh: Mesh | None
) -> tuple[ModelGraph, ModelState]:
    """Build the model abstractly and fill each parameter from the checkpoint.

    At any time the host holds one parameter's tensors beside what is already on the devices.

    Raises:
        WeightsError: the checkpoint does not hold what the config needs.
    """
    graphdef, abstract = abstract_model(config, dtype=dtype)
    wanted = parts(config)
    check_names(checkpoint, wanted, tied=config.tie_word_embeddings)

    def make(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = parameter_name(path)
        out = np.empty(leaf.shape, leaf.dtype)
        wanted[name].fill(out, [checkpoint.read(source) for source, _ in wanted[name].sources])
        return jax.device_put(out, parameter_sharding(name, leaf.shape, mesh))

    return graphdef, jax.tree_util.tree_map_with_path(make, abstract)
