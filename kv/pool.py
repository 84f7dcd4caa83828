"""The page buffer: one device array that holds every page, made by JAX and donated at every step."""

import ctypes

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from kv.driver import Region
from kv.types import ITEM_BYTES, KvSpec

BITS = {2: jnp.uint16, 4: jnp.uint32}


def create(spec: KvSpec, num_pages: int, sharding: Sharding | None = None) -> jax.Array:
    """Allocates the pool, zeroed: raw bits `[num_pages, layers, 2, kv_heads, page_size, head_dim]`.

    Args:
        sharding: over which devices, and how; None: the default one.

    Pages are stored as unsigned integers of the KV dtype's width and bitcast where they are used: a bfloat16
    scatter converts the whole pool on jaxlib 0.10's CPU, and raw bits export through DLPack in every dtype.
    """
    return jnp.zeros((num_pages, *spec.page_shape), BITS[ITEM_BYTES[spec.dtype]], device=sharding)


def pointer(pages: jax.Array) -> int:
    """Address of the first byte of a pool that is not sharded. Does not wait for a pending step and leaves no
    view behind."""
    return pages.unsafe_buffer_pointer()


def pointers(pages: jax.Array) -> tuple[int, ...]:
    """Addresses of the first bytes of all shards, in the order of `regions`. Does not wait for a pending step
    and leaves no view behind."""
    return tuple(pointer(shard) for shard in _shards(pages))


class ExportError(RuntimeError):
    """The page buffer does not lie as those who write into it from outside must assume."""


def regions(pages: jax.Array, page_bytes: int) -> tuple[Region, ...]:
    """Where the pool lies, one region per shard in the order of what they hold. Waits for a pending step.

    The address comes from a DLPack capsule that is gone on return: a view that stays would turn the next
    donation into a copy, at another address.

    Args:
        pages: `[P, ...]`, possibly sharded over any axis but the first.
        page_bytes: of one page over all shards.

    Raises:
        ExportError: a shard is not contiguous, not of whole pages, or not where JAX says; or all hold
            the same, so that what is written into one would be missing in the others.
    """
    num_pages = pages.shape[0]
    if pages.nbytes != num_pages * page_bytes:
        raise ExportError(f"{num_pages} pages of {page_bytes} bytes are not {pages.nbytes} bytes")
    shards = _shards(pages)
    if len(shards) > 1 and pages.is_fully_replicated:
        raise ExportError(f"each of {len(shards)} shards holds the whole pool")
    return tuple(_region(shard, num_pages) for shard in shards)


def _shards(pages: jax.Array) -> list[jax.Array]:
    """The shards by their place in the pool: whatever the devices' numbers, the first KV heads come first."""
    shards = list(pages.addressable_shards)
    if len(shards) > 1:
        shards.sort(key=lambda shard: [part.start or 0 for part in shard.index])
    return [data for shard in shards if (data := shard.data) is not None]


def _region(shard: jax.Array, num_pages: int) -> Region:
    capsule = shard.__dlpack__()
    tensor = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    address = (tensor.data or 0) + tensor.byte_offset
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    # Null strides mean row-major. An axis of length one may have any stride.
    strides = tuple(tensor.strides[axis] for axis in range(tensor.ndim)) if tensor.strides else None
    item_bytes = tensor.bits * tensor.lanes // 8
    device_type, device_id = tensor.device_type, tensor.device_id
    del tensor, capsule
    if shape != shard.shape or shape[0] != num_pages:
        raise ExportError(f"a shard of the pool has shape {shape}, expected whole pages {shard.shape}")
    if strides is not None and not _row_major(shape, strides):
        raise ExportError(f"a shard of the pool is not contiguous: shape {shape}, strides {strides}")
    if item_bytes != shard.dtype.itemsize:
        raise ExportError(f"a shard of the pool has items of {item_bytes} bytes, expected {shard.dtype}")
    if device_type not in _DEVICES:
        raise ExportError(f"a shard of the pool lies on a device of DLPack's kind {device_type}")
    if address != shard.unsafe_buffer_pointer():
        raise ExportError("DLPack and JAX name different addresses for a shard of the pool")
    return Region(
        address=address,
        page_bytes=shard.nbytes // num_pages,
        num_pages=num_pages,
        device=_DEVICES[device_type],
        device_id=device_id,
    )


def _row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


_DEVICES = {1: "cpu", 2: "cuda"}
"""DLPack's DLDeviceType."""


class _DLTensor(ctypes.Structure):
    """DLPack's DLTensor, the first member of the DLManagedTensor in a capsule named "dltensor"."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
