"""GGUF files: metadata and tensors, read from a memory map.

The format is ggml's GGUF specification, versions 2 and 3, little endian. Every count and length is checked
against the file before anything is allocated for it. Dequantising is the `gguf` package's.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from jaxserve.weights.errors import WeightsError
from jaxserve.weights.files import map_file

_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "|b1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES = 1 << 20
_MAX_DIMS = 4
_MAX_NAME_BYTES = 1 << 16
_MAX_ALIGNMENT = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        shape: outermost dimension first, in elements.
        kind: ggml's type.
        offset: bytes from the start of the file.
        size_bytes: quantised size.
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GgufFile:
    """An open GGUF file.

    Attributes:
        path: for messages.
        metadata: key to value: int, float, bool, str, a tuple of str, or a NumPy array of numbers.
        tensors: name to place.
        data: the mapped file.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    data: mmap.mmap

    def read(self, name: str) -> np.ndarray:
        """The tensor's values as float32 (a view of the file where it holds float32).

        Raises:
            WeightsError: a type that cannot be dequantised.
        """
        tensor = self.tensors[name]
        rows = math.prod(tensor.shape[:-1])
        raw = np.frombuffer(self.data, np.uint8, tensor.size_bytes, tensor.offset).reshape(rows, -1)
        try:
            values = dequantize(raw, tensor.kind)
        except NotImplementedError as error:
            raise WeightsError(f"{self.path}: {name}: type {tensor.kind.name} is not supported") from error
        return values.reshape(tensor.shape)


class _Cursor:
    """Reads a mapped file front to back and never past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.at = 0

    def take(self, size: int, what: str) -> int:
        """Step over `size` bytes and return where they start."""
        start = self.at
        if size > len(self.data) - start:
            raise WeightsError(f"{self.path}: {what} reaches past the end of the file")
        self.at = start + size
        return start

    def number(self, form: str, what: str) -> Any:
        """One number in struct notation."""
        return struct.unpack_from(form, self.data, self.take(struct.calcsize(form), what))[0]

    def text(self, what: str, limit: int | None = None) -> str:
        """A string: its length in 8 bytes, then UTF-8."""
        size = self.number("<Q", what)
        if limit is not None and size > limit:
            raise WeightsError(f"{self.path}: {what} has {size} bytes, more than {limit}")
        start = self.take(size, what)
        try:
            return self.data[start : start + size].decode()
        except UnicodeDecodeError as error:
            raise WeightsError(f"{self.path}: {what} is no valid UTF-8") from error

    def count(self, what: str, limit: int) -> int:
        """A count of 8 bytes, at most `limit`."""
        value = self.number("<Q", what)
        if value > limit:
            raise WeightsError(f"{self.path}: {what} is {value}, more than {limit}")
        return value

    def value(self, key: str) -> Any:
        """One metadata value with its type before it."""
        kind = self.number("<I", key)
        if kind == _STRING:
            return self.text(key)
        if kind == _ARRAY:
            return self._array(key)
        return self._numbers(kind, 1, key)[0].item()

    def _array(self, key: str) -> Any:
        kind = self.number("<I", key)
        # The shortest element has one byte, the shortest string eight.
        count = self.count(f"length of {key}", len(self.data) - self.at)
        if kind == _STRING:
            if count > (len(self.data) - self.at) // 8:
                raise WeightsError(f"{self.path}: {key} reaches past the end of the file")
            return tuple(self.text(key) for _ in range(count))
        return self._numbers(kind, count, key).copy()

    def _numbers(self, kind: int, count: int, key: str) -> np.ndarray:
        if kind not in _SCALARS:
            raise WeightsError(f"{self.path}: {key} has a value of unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.data, dtype, count, self.take(count * dtype.itemsize, key))


def open_gguf(path: Path) -> GgufFile:
    """Map a GGUF file and read its metadata and tensor table.

    Raises:
        WeightsError: not a GGUF file that this code can read, or one that contradicts itself.
    """
    data = map_file(path)
    cursor = _Cursor(path, data)
    if bytes(data[:4]) != b"GGUF":
        raise WeightsError(f"{path}: not a GGUF file")
    cursor.take(4, "magic")
    version = cursor.number("<I", "version")
    if version not in (2, 3):
        raise WeightsError(f"{path}: GGUF version {version} is not supported (2 and 3, little endian, are)")
    tensor_count = cursor.count("tensor count", _MAX_ENTRIES)
    entry_count = cursor.count("metadata count", _MAX_ENTRIES)
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = cursor.text("a metadata key", _MAX_NAME_BYTES)
        if key in metadata:
            raise WeightsError(f"{path}: metadata key {key[:200]!r} appears twice")
        metadata[key] = cursor.value(key[:200])
    alignment = metadata.get("general.alignment", 32)
    if not _is_alignment(alignment):
        raise WeightsError(f"{path}: general.alignment must be a power of two up to {_MAX_ALIGNMENT}")
    table = [_tensor_entry(cursor) for _ in range(tensor_count)]
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in table:
        if name in tensors:
            raise WeightsError(f"{path}: tensor {name!r} appears twice")
        tensors[name] = _placed(path, len(data), name, shape, kind, start + offset)
    return GgufFile(path=path, metadata=metadata, tensors=tensors, data=data)


def _is_alignment(value: Any) -> bool:
    return type(value) is int and 0 < value <= _MAX_ALIGNMENT and value & (value - 1) == 0


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape (outermost first), ggml type and offset in the data section."""
    name = cursor.text("a tensor name", _MAX_NAME_BYTES)
    dims = cursor.number("<I", f"tensor {name[:200]}")
    if not 1 <= dims <= _MAX_DIMS:
        raise WeightsError(f"{cursor.path}: tensor {name[:200]} has {dims} dimensions, not 1 to {_MAX_DIMS}")
    shape = tuple(cursor.number("<Q", f"tensor {name[:200]}") for _ in range(dims))[::-1]
    kind = cursor.number("<I", f"tensor {name[:200]}")
    return name, shape, kind, cursor.number("<Q", f"tensor {name[:200]}")


def _placed(
    path: Path, file_bytes: int, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> GgufTensor:
    """Check that the tensor lies within the file."""
    try:
        known = GGMLQuantizationType(kind)
    except ValueError as error:
        raise WeightsError(f"{path}: tensor {name[:200]} has unknown type {kind}") from error
    group, group_bytes = GGML_QUANT_SIZES[known]
    if min(shape) < 1 or shape[-1] % group:
        raise WeightsError(f"{path}: tensor {name[:200]} has a shape {shape} that {known.name} cannot have")
    size_bytes = math.prod(shape) // group * group_bytes
    if offset + size_bytes > file_bytes:
        raise WeightsError(f"{path}: tensor {name[:200]} reaches past the end of the file")
    return GgufTensor(shape=shape, kind=known, offset=offset, size_bytes=size_bytes)
