"""A Llama-2 style vocabulary of a few hundred tokens, as a GGUF file."""

from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFWriter, TokenType

# Best first: SentencePiece scores fall with the order in which pieces were found.
_FOUND = (
    "\u2581t", "he", "in", "\u2581a", "\u2581the", "\u2581\u2581", "ll", "er", "on", "\u2581w", "hell",
    "hello", "\u2581hello", "or", "ld", "\u2581wor", "\u2581world", "\u2581\u2581\u2581\u2581", "an", "and",
    "\u2581and", "aa", "aaaa", "\u4f60\u597d", "\u0301e",
)  # fmt: skip
_LETTERS = "\u2581etaoinshrdlucmfwypvbgkjqxz0123456789.,!?'-\nHW\u4f60\u597d\u0301"


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyVocab:
    """The pieces in order of id, with one score and one type each."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[TokenType, ...]


def tiny_vocab() -> TinyVocab:
    """Three control tokens, 256 bytes, merged pieces, single characters, and one user-defined token."""
    special = ("<unk>", "<s>", "</s>")
    byte_pieces = tuple(f"<0x{byte:02X}>" for byte in range(256))
    found = (*_FOUND, *_LETTERS)
    pieces = (*special, *byte_pieces, *found, "<tool>")
    scores = (*[0.0] * 259, *(-float(rank) for rank in range(len(found))), 0.0)
    types = (
        TokenType.UNKNOWN,
        TokenType.CONTROL,
        TokenType.CONTROL,
        *[TokenType.BYTE] * 256,
        *[TokenType.NORMAL] * len(found),
        TokenType.USER_DEFINED,
    )
    return TinyVocab(pieces=pieces, scores=scores, types=types)


def write_tiny_spm(
    path: Path, *, add_space_prefix: bool = True, add_bos: bool = True, add_eos: bool = False
) -> Path:
    """Write the vocabulary to a GGUF file without tensors."""
    vocab = tiny_vocab()
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(vocab.pieces)
    writer.add_token_scores(vocab.scores)
    writer.add_token_types(vocab.types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(add_bos)
    writer.add_add_eos_token(add_eos)
    writer.add_add_space_prefix(add_space_prefix)
    writer.add_chat_template("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
