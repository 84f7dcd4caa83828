"""Which pages of a peer fill which of ours, and whether two engines' pages fit. Pure."""

from dataclasses import dataclass

import numpy as np

from kv.digest import DIGEST_NAME
from kv.driver import Region
from kv.moves import Load, RemoteSource
from kv.types import DUMMY_PAGE
from kv.wire import PROTOCOL, Welcome


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What an engine says of itself to peers.

    Attributes:
        engine_id, epoch: who, and which life of it; the epoch is 32 hex digits.
        compat: hash of what must be equal on both sides.
        role: one of `kv.config.ROLES`.
        page_size: tokens per page.
        page_shape: `[layers, 2, kv_heads, page_size, head_dim]`.
        item_bytes: of one element.
    """

    engine_id: str
    epoch: str
    compat: str
    role: str
    page_size: int
    page_shape: tuple[int, ...]
    item_bytes: int


def memory(regions: tuple[Region, ...]) -> str:
    """NIXL's kind of the pool's memory."""
    return "VRAM" if regions[0].device == "cuda" else "DRAM"


def mismatch(
    facts: EngineFacts, regions: tuple[Region, ...], welcome: Welcome, *, digest: bool
) -> str | None:
    """Why pages of the peer that sent `welcome` cannot become ours; None: they can."""
    if welcome.protocol != PROTOCOL:
        return f"the peer speaks protocol {welcome.protocol}, we speak {PROTOCOL}"
    if welcome.page_size < 1 or facts.page_size % welcome.page_size:
        return f"our pages of {facts.page_size} tokens are no multiple of the peer's {welcome.page_size}"
    ratio = facts.page_size // welcome.page_size
    theirs = (*welcome.page_shape[:3], welcome.page_size * ratio, *welcome.page_shape[4:])
    if theirs != facts.page_shape or welcome.page_shape[3] != welcome.page_size:
        return f"the peer's pages are {list(welcome.page_shape)}, ours {list(facts.page_shape)}"
    if welcome.item_bytes != facts.item_bytes:
        return f"the peer's elements have {welcome.item_bytes} bytes, ours {facts.item_bytes}"
    if len(welcome.regions) != len(regions) or (ratio > 1 and len(regions) != 1):
        return f"the peer has {len(welcome.regions)} shards, we have {len(regions)}"
    for (_, page_bytes, num_pages, _), ours in zip(welcome.regions, regions, strict=True):
        if page_bytes * ratio != ours.page_bytes or num_pages != welcome.regions[0][2]:
            return f"the peer's pages have {page_bytes} bytes, ours {ours.page_bytes}"
    if digest and welcome.digest != DIGEST_NAME:
        return f"the peer's digests are {welcome.digest!r}, ours {DIGEST_NAME!r}"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One page of ours and what fills it.

    Attributes:
        position: index in the load's page lists.
        group: page group.
        target: our page.
        pages, generations: the peer's, in token order; one unless our pages are larger.
    """

    position: int
    group: int
    target: int
    pages: tuple[int, ...]
    generations: tuple[int, ...]


def pieces(load: Load, source: RemoteSource, page_size: int) -> tuple[tuple[Piece, ...], int]:
    """A load, page by page in the order of positions, as far as the source has every page.

    Returns:
        pieces, and the number of leading positions that they cover.
    """
    end = load.first_page * page_size + load.num_tokens
    found: list[Piece] = []
    num_positions = len(load.pages[0])
    for position in range(num_positions):
        start = (load.first_page + position) * page_size
        stop = min(start + page_size, end)
        first, last = start // source.page_size, -(-stop // source.page_size)
        here: list[Piece] = []
        for group, targets in enumerate(load.pages):
            if targets[position] == DUMMY_PAGE:
                continue
            pages = source.pages[group][first:last] if group < len(source.pages) else ()
            generations = source.generations[group][first:last] if group < len(source.generations) else ()
            if not len(pages) == len(generations) == last - first or DUMMY_PAGE in pages:
                return tuple(found), position
            here.append(
                Piece(
                    position=position,
                    group=group,
                    target=targets[position],
                    pages=tuple(pages),
                    generations=tuple(generations),
                )
            )
        if stop > source.num_tokens:
            return tuple(found), position
        found += here
    return tuple(found), num_positions


def regroup(rows: np.ndarray, ratio: int, page_shape: tuple[int, ...], item_bytes: int) -> np.ndarray:
    """Puts small pages, one after the other in tokens, into one large page.

    Args:
        rows: uint8 `[k, small_page_bytes]`, `k <= ratio`.
        ratio: small pages in a large one.
        page_shape: `[layers, 2, kv_heads, page_size, head_dim]` of the large page.
        item_bytes: of one element.

    Returns:
        uint8 `[page_bytes]`; zeros where no small page is.
    """
    layers, two, heads, page_size, head_dim = page_shape
    large = np.zeros((layers * two * heads, ratio, page_size // ratio * head_dim * item_bytes), np.uint8)
    large[:, : len(rows)] = rows.reshape(len(rows), layers * two * heads, -1).swapaxes(0, 1)
    return large.reshape(-1)
