"""From vocabulary pieces to bytes.

A vocabulary stores each token as a string in one of two codes. GPT-2's byte-level code writes every byte as
one printable character (Radford et al., 2019). SentencePiece writes spaces as U+2581 and bytes that have no
piece of their own as `<0xNN>` (Kudo and Richardson, 2018). Once each token is bytes, decoding is a join and
streaming is an incremental UTF-8 decoder: nothing has to be decoded twice.
"""

import enum
import json
import re
from typing import Any

from tokenizers import decoders

SPACE_MARK = "\u2581"
"""SentencePiece's visible space."""

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Decoding(enum.Enum):
    """How pieces become text."""

    BYTE_LEVEL = "byte level"
    SENTENCEPIECE = "sentencepiece"
    SENTENCEPIECE_STRIP = "sentencepiece, one leading space dropped"


def _byte_of_character() -> dict[str, int]:
    """GPT-2's code: printable Latin-1 stands for itself, the other 68 bytes for U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


def piece_bytes(piece: str, decoding: Decoding) -> bytes:
    """The bytes that a vocabulary piece contributes to the text.

    A byte-level piece with a character outside the code (an added token with a space, say) is taken
    literally, as the `tokenizers` decoder does.
    """
    if decoding is Decoding.BYTE_LEVEL:
        codes = [BYTE_OF_CHARACTER.get(character) for character in piece]
        known = [code for code in codes if code is not None]
        return bytes(known) if len(known) == len(codes) else piece.encode()
    match = _BYTE_PIECE.fullmatch(piece)
    if match:
        return bytes([int(match[1], 16)])
    return piece.replace(SPACE_MARK, " ").encode()


def decoding_of(decoder: decoders.Decoder | None) -> Decoding:
    """Which code a tokenizer's decoder reads.

    Raises:
        ValueError: a decoder other than byte level or SentencePiece with byte fallback.
    """
    described: dict[str, Any] = (
        json.loads(decoder.__getstate__()) if decoder is not None else {"type": "none"}
    )
    steps: list[dict[str, Any]] = described["decoders"] if described["type"] == "Sequence" else [described]
    names = [step["type"] for step in steps if step["type"] != "Fuse"]
    if names == ["ByteLevel"]:
        return Decoding.BYTE_LEVEL
    spaces = [step for step in steps if step["type"] == "Replace"]
    plain = [step["pattern"] == {"String": SPACE_MARK} and step["content"] == " " for step in spaces]
    if plain == [True] and names == ["Replace", "ByteFallback"]:
        return Decoding.SENTENCEPIECE
    if plain == [True] and names == ["Replace", "ByteFallback", "Strip"]:
        strip = steps[-1]
        if (strip["content"], strip["start"], strip["stop"]) == (" ", 1, 0):
            return Decoding.SENTENCEPIECE_STRIP
    raise ValueError(
        f"tokenizer decoder {' + '.join(names)} is not supported: byte level or SentencePiece only"
    )
