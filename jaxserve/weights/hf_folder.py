"""A Hugging Face folder: config.json and safetensors files, in one or many parts."""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxserve.model.config import ModelConfig
from jaxserve.model.hf_config import config_from_hf
from jaxserve.weights.errors import WeightsError
from jaxserve.weights.files import read_json

_INDEX = "model.safetensors.index.json"
_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HfCheckpoint:
    """See parts.Checkpoint. Files are mapped, and a tensor is copied out when it is read.

    Attributes:
        folder: for messages.
        shapes: tensor name to shape.
        files: tensor name to the open file that holds it.
    """

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    files: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The folder's path."""
        return str(self.folder)

    def read(self, name: str) -> np.ndarray:
        """One tensor in the file's dtype."""
        try:
            return self.files[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{self.folder}: tensor {name} cannot be read: {one_line(error)}") from error


def read_config(folder: Path) -> ModelConfig:
    """The config of a folder's config.json.

    Raises:
        WeightsError: it is missing, bad or not supported.
    """
    path = folder / "config.json"
    values = read_json(path)
    try:
        return config_from_hf(values)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error


def hf_checkpoint(folder: Path) -> HfCheckpoint:
    """Open a folder's safetensors files and read their tables.

    Raises:
        WeightsError: a file is missing, no regular file or damaged, a tensor appears twice or has a dtype
            that is not supported.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, Any] = {}
    for path in weight_files(folder):
        file = _open(path)
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            if name in files:
                raise WeightsError(f"{path}: tensor {name[:200]} is in another file too")
            table = file.get_slice(name)
            if table.get_dtype() not in _DTYPES:
                raise WeightsError(f"{path}: tensor {name[:200]} has unsupported dtype {table.get_dtype()}")
            shapes[name] = tuple(table.get_shape())
            files[name] = file
    return HfCheckpoint(folder=folder, shapes=shapes, files=files)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: those of the index, else all `model*.safetensors`, else all.

    Raises:
        WeightsError: the index is bad or names anything but plain file names.
    """
    index = folder / _INDEX
    if index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise WeightsError(f"{index}: weight_map must map tensor names to file names")
        names = sorted(set(places.values()))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise WeightsError(f"{index}: {name[:200]!r} is no plain .safetensors file name")
        return [folder / name for name in names]
    # Some folders hold the same weights once more as consolidated.safetensors.
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))


def one_line(error: Exception) -> str:
    """An error's message, fit for one line."""
    return " ".join(str(error).split())[:300]


def _open(path: Path) -> Any:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise WeightsError(f"{path}: not a regular file")
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a sound safetensors file: {one_line(error)}") from error
