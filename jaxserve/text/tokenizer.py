"""Text to token ids and back."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from gguf import GGUFReader

from jaxserve.text.gguf_vocab import read_gguf_vocab
from jaxserve.text.hf_folder import read_hf_folder, write_hf_folder
from jaxserve.text.pieces import Decoding, decoding_of, piece_bytes
from jaxserve.text.vocab import Vocab


class Tokenizer:
    """A model's vocabulary. Never changes after construction; every method may be called from any thread.

    Decoding is a join of each token's bytes followed by lossy UTF-8 decoding. For byte-level vocabularies
    that is what the `tokenizers` library does; for SentencePiece it differs only where the bytes are not
    UTF-8: there the library replaces a whole run of byte tokens, valid characters included, while here only
    the bytes that are wrong become U+FFFD.
    """

    def __init__(self, vocab: Vocab) -> None:
        """Take over `vocab`, whose backend nobody else may change from now on.

        Raises:
            ValueError: the backend decodes in a way that is not supported.
        """
        decoding = decoding_of(vocab.backend.decoder)
        pieces = {i: piece for piece, i in vocab.backend.get_vocab(with_added_tokens=True).items()}
        added = vocab.backend.get_added_tokens_decoder()
        self._vocab = vocab
        self._bytes = tuple(
            piece_bytes(pieces.get(i, ""), decoding) for i in range(max(pieces, default=-1) + 1)
        )
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._special_tokens = MappingProxyType(dict(vocab.special_tokens))
        self._strips_space = decoding is Decoding.SENTENCEPIECE_STRIP

    @classmethod
    def from_gguf(cls, source: str | Path | GGUFReader) -> "Tokenizer":
        """The tokenizer inside a GGUF file, given its path or an open reader.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file has no vocabulary or one of an unknown kind.
        """
        return cls(read_gguf_vocab(source if isinstance(source, GGUFReader) else GGUFReader(source)))

    @classmethod
    def from_hf_folder(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer in a Hugging Face folder, or in one written by `save`.

        Raises:
            FileNotFoundError: no tokenizer.json there.
            ValueError: the files contradict each other or decode in a way that is not supported.
        """
        return cls(read_hf_folder(Path(folder)))

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, for `from_hf_folder` and transformers.

        Raises:
            OSError: the folder cannot be written.
        """
        write_hf_folder(self._vocab, Path(folder))

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return len(self._bytes)

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, whether or not `encode` adds it."""
        return self._vocab.bos_token_id

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens at which the model ends its answer; the first is the vocabulary's own."""
        return self._vocab.eos_token_ids

    @property
    def chat_template(self) -> str | None:
        """Jinja source; None for a model without one."""
        return self._vocab.chat_template

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are control marks, not text."""
        return self._special_ids

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Role (`bos_token`, `eos_token`, ...) to piece: the variables that a chat template may use."""
        return self._special_tokens

    @property
    def strips_leading_space(self) -> bool:
        """Whether a decoded text loses one leading space, which `encode` had put there (SentencePiece)."""
        return self._strips_space

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; control tokens spelled out in it are recognised.

        Args:
            text: lone surrogates become U+FFFD.
            add_special_tokens: put the begin and end tokens that the model wants around the text.
        """
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._vocab.backend.encode(clean, add_special_tokens=add_special_tokens).ids

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the text; empty for ids without a token (a padded vocabulary)."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def token(self, token_id: int) -> str:
        """The token as text; bytes that are no whole character show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        skipped = self._special_ids if skip_special_tokens else frozenset()
        data = b"".join(self.token_bytes(token_id) for token_id in ids if token_id not in skipped)
        if self._strips_space and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", "replace")
