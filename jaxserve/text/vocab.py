"""A tokenizer's parts, as read from a GGUF file or a Hugging Face folder."""

from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocab:
    """What makes a tokenizer.

    Attributes:
        backend: encodes; nobody changes it after it is here.
        bos_token_id: the token that begins a text; None where the model has none.
        eos_token_ids: the vocabulary's own end token first, then the model's other ends of an answer.
        chat_template: Jinja source; None where the model has none.
        special_tokens: role (`bos_token`, `eos_token`, `unk_token`, `pad_token`, ...) to piece.
    """

    backend: Tokenizer
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    chat_template: str | None
    special_tokens: Mapping[str, str]
