"""Write a model in another container."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from jaxserve.weights import orbax_folder
from jaxserve.weights.errors import WeightsError
from jaxserve.weights.load import Loaded, load_model
from jaxserve.weights.source import ModelSource


def convert(
    source: ModelSource, folder: Path, *, to: str, dtype: str, extra: Callable[[Path], None]
) -> Loaded:
    """Write `source` as a folder that `resolve` and `load_model` read.

    The folder appears under its name when it is complete. The parameters are stored bit for bit as they are
    loaded with `dtype`.

    Args:
        source: from `resolve`.
        folder: must not exist, or be empty.
        to: "orbax".
        dtype: "float32" or "bfloat16".
        extra: writes what else belongs there, such as the tokenizer's files, into the folder it is given.

    Returns:
        The model that was written.

    Raises:
        WeightsError: the source is bad, or the folder is taken or cannot be written.
    """
    if to != "orbax":
        raise WeightsError(f"cannot convert to {to!r}; known: orbax")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{folder}: exists and is not an empty folder")
    loaded = load_model(source, dtype=dtype)
    parent = folder.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=parent, prefix=f"{folder.name}-"))
        try:
            orbax_folder.save(loaded.config, loaded.state, unfinished)
            extra(unfinished)
            unfinished.chmod(0o755)
            os.replace(unfinished, folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    except OSError as error:
        raise WeightsError(f"{folder}: cannot be written: {error}") from error
    return loaded
