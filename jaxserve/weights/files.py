"""Opening files that strangers wrote."""

import json
import mmap
import os
import stat
from pathlib import Path
from typing import Any

from jaxserve.weights.errors import WeightsError


def map_file(path: Path) -> mmap.mmap:
    """Map a regular file, read only; its pages are read when touched.

    Raises:
        WeightsError: the path is missing, empty, a folder or a device, or may not be read.
    """
    descriptor = _open_regular(path)
    try:
        if os.fstat(descriptor).st_size == 0:
            raise WeightsError(f"{path}: the file is empty")
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)


def read_json(path: Path, *, limit_bytes: int = 64 << 20) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        WeightsError: not a readable regular file of at most `limit_bytes`, or no JSON object.
    """
    with os.fdopen(_open_regular(path), "rb") as file:
        raw = file.read(limit_bytes + 1)
    if len(raw) > limit_bytes:
        raise WeightsError(f"{path}: larger than {limit_bytes} bytes")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: no valid JSON ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: must hold a JSON object")
    return value


def _open_regular(path: Path) -> int:
    """Open for reading. Non-blocking, since opening a named pipe would wait for its writer for ever."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise WeightsError(f"{path}: not a regular file")
    return descriptor
