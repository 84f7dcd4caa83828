"""What engines say to each other on the side channel, and what of it travels through clients and routers.

Messages are versioned MessagePack of typed structs; nothing else is ever decoded. Every frame is bounded and
carries a MAC (see `kv.frames`), so that a stranger's bytes are refused before they mean anything.
"""

import msgspec

PROTOCOL = 1
MAX_FRAME_BYTES = 1 << 20
MAX_MESSAGE_BYTES = MAX_FRAME_BYTES - 64
"""A frame also carries a number and a MAC."""


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The first message of a caller. Attributes: compat: see `CompatFacts`; epoch: the caller's."""

    protocol: int
    compat: str
    engine_id: str
    epoch: str


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer: who listens, and where its pages are.

    Attributes:
        agent_name, agent_metadata: of its NIXL agent.
        regions: per shard (address, page_bytes, num_pages, device_id).
        memory: NIXL's kind of the regions: "DRAM" or "VRAM".
        page_size: tokens per page.
        page_shape: `[layers, 2, kv_heads, page_size, head_dim]`.
        item_bytes: of one element.
        digest: name of the algorithm; "": pages have none.
        lease_s: how long a lease lives without a heartbeat.
    """

    protocol: int
    engine_id: str
    epoch: str
    agent_name: str
    agent_metadata: bytes
    regions: tuple[tuple[int, int, int, int], ...]
    memory: str
    page_size: int
    page_shape: tuple[int, ...]
    item_bytes: int
    digest: str
    lease_s: float


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """These leases are still wanted."""

    epoch: str
    request_ids: tuple[str, ...]


class HeartbeatAnswer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Attributes: gone: of the leases asked for, those that are over."""

    epoch: str
    gone: tuple[str, ...]


class Confirm(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The caller has read pages of a lease: did anything change under it?

    Attributes:
        epoch: of the listener, as the caller knows it.
        pages, generations: per group, what was read; `DUMMY_PAGE` where nothing was.
        digests: the pages' digests are wanted.
    """

    epoch: str
    request_id: str
    pages: tuple[tuple[int, ...], ...]
    generations: tuple[tuple[int, ...], ...]
    digests: bool


class Confirmed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Nothing changed. Attributes: digests: per group and page, 16 bytes; empty where not asked."""

    epoch: str
    digests: tuple[tuple[bytes, ...], ...]


class Done(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The caller needs these leases no more."""

    epoch: str
    request_ids: tuple[str, ...]


class DoneAnswer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """It was heard."""

    epoch: str


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An answer that means no.

    Attributes:
        code: "protocol", "compat", "epoch", "lease", "generation", "busy" or "malformed".
        reason: for people; one line.
    """

    code: str
    reason: str


Message = Hello | Welcome | Heartbeat | HeartbeatAnswer | Confirm | Confirmed | Done | DoneAnswer | Refused
_DECODER = msgspec.msgpack.Decoder(Message)
_ENCODER = msgspec.msgpack.Encoder()


class WireError(ValueError):
    """Bytes that are no message of ours."""


def encode(message: Message) -> bytes:
    """A message as bytes.

    Raises:
        WireError: longer than MAX_MESSAGE_BYTES.
    """
    data = _ENCODER.encode(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"a message of {len(data)} bytes; the limit is {MAX_MESSAGE_BYTES}")
    return data


def decode(data: bytes) -> Message:
    """The inverse of `encode`.

    Raises:
        WireError: not a message of ours.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"a message of {len(data)} bytes; the limit is {MAX_MESSAGE_BYTES}")
    try:
        return _DECODER.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"no message: {error}") from None
