"""What a prefill engine tells a decode engine through clients and routers, and the seal that protects it.

`kv_transfer_params` has vLLM's keys. They pass through hands that we do not know, so D believes nothing in
them until a MAC over everything that it will use has been verified with the key that both engines hold. The
MAC, and what vLLM has no key for, travel in one opaque string: routers in other languages turn large integers
into floats.
"""

import base64
import binascii
import enum
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from kv.moves import LeaseTerms, PageLists, RemoteSource

VERSION = 1
MAX_ENTRIES = 1_000_000
MAX_GROUPS = 64
MAX_TEXT = 512
LEASE_KEY = "remote_lease"

_MAC_BYTES = 32
_MAX_LEASE_TEXT = 8 << 20
_PURPOSE = b"jaxserve kv_transfer_params"
_NAMES_A_SOURCE = (
    "remote_engine_id",
    "remote_block_ids",
    "remote_host",
    "remote_port",
    "remote_request_id",
    "remote_num_tokens",
    LEASE_KEY,
)


class SealError(ValueError):
    """Parameters that are not ours, not whole or not for this prompt. One line that names the key."""


class ParamsKind(enum.Enum):
    """What a client's `kv_transfer_params` ask for."""

    NOTHING = "nothing"
    LEASE = "lease"
    SOURCE = "source"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompatFacts:
    """What two engines must share before one may read the other's pages.

    Page size and the number of shards may differ, within limits that the transfer knows.

    Attributes:
        protocol: of the side channel.
        cache_key: names model and weight version.
        dtype: of the KV.
        page_shape: of a page without its page_size: `[layers, 2, kv_heads, head_dim]`.
        digest: name of the page digest's algorithm.
    """

    protocol: int
    cache_key: str
    dtype: str
    page_shape: tuple[int, ...]
    num_layers: int
    kv_heads: int
    head_dim: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The engine that seals.

    Attributes:
        epoch: one life of it, 32 hex digits.
        host, port: its side channel, as others reach it.
    """

    engine_id: str
    epoch: str
    host: str
    port: int
    tp_size: int
    page_size: int


class _Lease(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the opaque string holds behind its version and MAC."""

    epoch: str
    generations: tuple[tuple[int, ...], ...]
    page_size: int
    prompt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fields:
    """The open fields that the MAC covers."""

    engine_id: str
    request_id: str
    host: str
    port: int
    pages: PageLists
    num_tokens: int
    cached_tokens: int
    tp_size: int
    dcp_size: int
    pp_size: int
    registration: int
    mode: str


def compat_hash(facts: CompatFacts) -> str:
    """SHA-256 of the facts, in hex. Equal in all processes and versions of Python."""
    return hashlib.sha256(msgspec.msgpack.encode(("jaxserve compat", facts))).hexdigest()


def prompt_digest(token_ids: Sequence[int], cache_salt: str) -> str:
    """Names a prompt: BLAKE2b of its tokens and its cache salt, 64 hex digits."""
    data = msgspec.msgpack.encode(("jaxserve prompt", cache_salt, tuple(token_ids)))
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def seal(terms: LeaseTerms, *, who: Identity, prompt: str, key: bytes) -> dict[str, Any]:
    """The `kv_transfer_params` of a response: vLLM 0.33's keys and `remote_lease`.

    Args:
        terms: of the lease that was given.
        who: this engine.
        prompt: see `prompt_digest`.
        key: shared by P and D; see `kv.auth`.
    """
    fields = _Fields(
        engine_id=who.engine_id,
        request_id=terms.request_id,
        host=who.host,
        port=who.port,
        pages=terms.pages,
        num_tokens=terms.num_tokens,
        cached_tokens=terms.cached_tokens,
        tp_size=who.tp_size,
        dcp_size=1,
        pp_size=1,
        registration=0,
        mode="pull",
    )
    lease = _Lease(epoch=who.epoch, generations=terms.generations, page_size=who.page_size, prompt=prompt)
    body = msgspec.msgpack.encode(lease)
    blob = bytes((VERSION,)) + _mac(key, body, fields) + body
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [list(group) for group in terms.pages],
        "remote_engine_id": fields.engine_id,
        "remote_request_id": fields.request_id,
        "remote_host": fields.host,
        "remote_port": fields.port,
        "tp_size": fields.tp_size,
        "dcp_size": fields.dcp_size,
        "pp_size": fields.pp_size,
        "remote_num_tokens": fields.num_tokens,
        "remote_blocks_expiry_time": None,
        "remote_registration_generation": fields.registration,
        "transfer_mode": fields.mode,
        "remote_prefill_cached_tokens": fields.cached_tokens,
        LEASE_KEY: base64.b64encode(blob).decode("ascii"),
    }


def open_sealed(params: Mapping[str, Any], *, prompt: str, key: bytes) -> RemoteSource:
    """The inverse of `seal`: whole numbers may have become floats, and other keys may have joined.

    Args:
        params: what a client sent; `read_params` said SOURCE.
        prompt: digest of the prompt that came with it.
        key: shared by P and D.

    Raises:
        SealError: a key is missing or wrong, the MAC does not fit, or the prompt is another one.
    """
    fields = _Fields(
        engine_id=_text(params, "remote_engine_id"),
        request_id=_text(params, "remote_request_id"),
        host=_text(params, "remote_host"),
        port=_number(params, "remote_port", 1, 2**16 - 1),
        pages=_pages(params, "remote_block_ids"),
        num_tokens=_number(params, "remote_num_tokens", 0, 2**31 - 1),
        cached_tokens=_number(params, "remote_prefill_cached_tokens", 0, 2**31 - 1),
        tp_size=_number(params, "tp_size", 1, 2**16),
        dcp_size=_number(params, "dcp_size", 1, 2**16),
        pp_size=_number(params, "pp_size", 1, 2**16),
        registration=_number(params, "remote_registration_generation", 0, 2**53),
        mode=_text(params, "transfer_mode"),
    )
    blob = _blob(params)
    mac, body = blob[1 : 1 + _MAC_BYTES], blob[1 + _MAC_BYTES :]
    if not hmac.compare_digest(mac, _mac(key, body, fields)):
        raise SealError("remote_lease: the seal is not ours or something in it was changed")
    try:
        lease = msgspec.msgpack.decode(body, type=_Lease)
    except msgspec.MsgspecError as error:
        raise SealError(f"remote_lease cannot be read: {error}") from None
    if not hmac.compare_digest(lease.prompt.encode(), prompt.encode()):
        raise SealError("remote_lease: the prompt is not the one that was prefilled")
    if [len(group) for group in lease.generations] != [len(group) for group in fields.pages]:
        raise SealError("remote_lease: not one generation per page")
    if any(fields.num_tokens > len(group) * lease.page_size for group in fields.pages):
        raise SealError("remote_num_tokens: more tokens than the pages of remote_block_ids hold")
    return RemoteSource(
        engine_id=fields.engine_id,
        epoch=lease.epoch,
        host=fields.host,
        port=fields.port,
        request_id=fields.request_id,
        pages=fields.pages,
        generations=lease.generations,
        num_tokens=fields.num_tokens,
        page_size=lease.page_size,
        cached_tokens=fields.cached_tokens,
    )


def read_params(value: object) -> ParamsKind:
    """What a client's `kv_transfer_params` ask for; what SOURCE names is not verified yet.

    Raises:
        SealError: not an object, a flag is no flag, both are true, or a lease is wanted and a source named.
    """
    if value is None:
        return ParamsKind.NOTHING
    if not isinstance(value, dict):
        raise SealError("kv_transfer_params must be an object")
    prefill, decode = _flag(value, "do_remote_prefill"), _flag(value, "do_remote_decode")
    if prefill and decode:
        raise SealError("do_remote_prefill and do_remote_decode cannot both be true")
    if prefill:
        return ParamsKind.SOURCE
    if not decode:
        return ParamsKind.NOTHING
    for name in _NAMES_A_SOURCE:
        # Pages of D for P, vLLM's bidirectional_kv_xfer.
        if value.get(name):
            raise SealError(f"{name} must be null where do_remote_decode is true")
    return ParamsKind.LEASE


def _mac(key: bytes, body: bytes, fields: _Fields) -> bytes:
    data = msgspec.msgpack.encode((VERSION, body, fields))
    return hmac.digest(key, _PURPOSE + data, "sha256")


def _flag(params: Mapping[str, Any], name: str) -> bool:
    value = params.get(name)
    if value is not None and not isinstance(value, bool):
        raise SealError(f"{name} must be true or false")
    return bool(value)


def _present(params: Mapping[str, Any], name: str) -> Any:
    value = params.get(name)
    if value is None:
        raise SealError(f"{name} is missing")
    return value


def _text(params: Mapping[str, Any], name: str) -> str:
    value = _present(params, name)
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_TEXT:
        raise SealError(f"{name} must be a string of 1 to {MAX_TEXT} characters")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise SealError(f"{name} holds half a character")
    return value


def _whole(value: object, name: str, least: int, most: int) -> int:
    """A whole number; also as a float, as routers in other languages send it."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise SealError(f"{name} must be whole, from {least} to {most}")
    return value


def _number(params: Mapping[str, Any], name: str, least: int, most: int) -> int:
    return _whole(_present(params, name), name, least, most)


def _pages(params: Mapping[str, Any], name: str) -> PageLists:
    groups = _present(params, name)
    if not isinstance(groups, list) or not 1 <= len(groups) <= MAX_GROUPS:
        raise SealError(f"{name} must be a list of 1 to {MAX_GROUPS} lists")
    if not all(isinstance(group, list) for group in groups):
        raise SealError(f"{name} must be a list of lists")
    if sum(len(group) for group in groups) > MAX_ENTRIES:
        raise SealError(f"{name} has more than {MAX_ENTRIES} pages")
    return tuple(tuple(_whole(page, name, 0, 2**31 - 1) for page in group) for group in groups)


def _blob(params: Mapping[str, Any]) -> bytes:
    value = _present(params, LEASE_KEY)
    if not isinstance(value, str) or len(value) > _MAX_LEASE_TEXT:
        raise SealError(f"{LEASE_KEY} must be a string of at most {_MAX_LEASE_TEXT} characters")
    try:
        blob = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise SealError(f"{LEASE_KEY} is not base64") from None
    if len(blob) <= 1 + _MAC_BYTES:
        raise SealError(f"{LEASE_KEY} is too short")
    if blob[0] != VERSION:
        raise SealError(f"{LEASE_KEY} is of version {blob[0]}; this engine knows {VERSION}")
    return blob
