"""Log-probabilities in the shapes of the two OpenAI routes and of vLLM's prompt_logprobs."""

import codecs
from collections.abc import Iterable
from typing import Protocol

from jaxserve.outputs import TokenLogprobs

LOWEST = -9999.0
"""What OpenAI writes for minus infinity, which JSON cannot."""


class Vocabulary(Protocol):
    """What the log-probabilities need of a tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are control marks, not text."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the text."""
        ...


def shown(vocabulary: Vocabulary, token_id: int, *, as_id: bool) -> str:
    """A token's name: its text; `bytes:\\xe2\\x80` (as OpenAI writes it) where it is no whole text.

    Args:
        as_id: name it `token_id:N` instead (vLLM's return_tokens_as_token_ids).
    """
    if as_id:
        return f"token_id:{token_id}"
    data = vocabulary.token_bytes(token_id)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(logprob: float) -> float:
    """`logprob` as JSON can hold it; not-a-number counts as the lowest."""
    return logprob if logprob >= LOWEST else LOWEST


class TextOffsets:
    """Where each token of one choice begins in its text, in characters.

    A character that spans tokens counts for the one that completes it; special tokens that the text leaves
    out have no length.
    """

    def __init__(self, vocabulary: Vocabulary, *, skip_special_tokens: bool) -> None:
        self._vocabulary = vocabulary
        self._skipped = vocabulary.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def next(self, token_id: int) -> int:
        """The offset of the next token, which is `token_id`."""
        offset = self._offset
        if token_id not in self._skipped:
            self._offset += len(self._decoder.decode(self._vocabulary.token_bytes(token_id)))
        return offset


def completion_logprobs(
    entries: Iterable[tuple[int, TokenLogprobs | None]],
    vocabulary: Vocabulary,
    offsets: TextOffsets,
    *,
    top: int,
    as_ids: bool,
) -> dict[str, object]:
    """The `logprobs` object of /v1/completions.

    Args:
        entries: (token id, its log-probabilities) in order; None for the first token of a prompt.
        vocabulary: names the tokens.
        offsets: of this choice; advanced.
        top: how many of the most likely tokens to show.
        as_ids: name tokens by id.
    """
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []
    for token_id, entry in entries:
        tokens.append(shown(vocabulary, token_id, as_id=as_ids))
        text_offset.append(offsets.next(token_id))
        token_logprobs.append(None if entry is None else finite(entry.logprob))
        top_logprobs.append(None if entry is None else _top_by_name(entry, vocabulary, top, as_ids))
    return {
        "tokens": tokens,
        "token_logprobs": token_logprobs,
        "top_logprobs": top_logprobs,
        "text_offset": text_offset,
    }


def _top_by_name(entry: TokenLogprobs, vocabulary: Vocabulary, top: int, as_ids: bool) -> dict[str, float]:
    """The chosen token, then the most likely ones: up to `top` + 1, as OpenAI's reference says."""
    pairs = ((entry.token_id, entry.logprob), *entry.top[:top])
    return {shown(vocabulary, token_id, as_id=as_ids): finite(logprob) for token_id, logprob in pairs}


def chat_logprobs(
    entries: Iterable[TokenLogprobs], vocabulary: Vocabulary, *, as_ids: bool
) -> dict[str, object]:
    """The `logprobs` object of /v1/chat/completions."""
    content = [
        _chat_token(entry.token_id, entry.logprob, vocabulary, as_ids)
        | {"top_logprobs": [_chat_token(i, logprob, vocabulary, as_ids) for i, logprob in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _chat_token(token_id: int, logprob: float, vocabulary: Vocabulary, as_ids: bool) -> dict[str, object]:
    return {
        "token": shown(vocabulary, token_id, as_id=as_ids),
        "logprob": finite(logprob),
        "bytes": list(vocabulary.token_bytes(token_id)),
    }


def prompt_logprobs(
    entries: Iterable[TokenLogprobs | None], vocabulary: Vocabulary, *, top: int
) -> list[dict[str, object] | None]:
    """vLLM's `prompt_logprobs`: per prompt token {token id: {logprob, rank, decoded_token}}, null first."""
    return [None if entry is None else _prompt_token(entry, vocabulary, top) for entry in entries]


def _prompt_token(entry: TokenLogprobs, vocabulary: Vocabulary, top: int) -> dict[str, object]:
    """The prompt's token, then the most likely ones; a token that is both stands once."""
    ranked = [(entry.token_id, entry.logprob, entry.rank)]
    likely = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top[:top], 1)]
    ranked += [item for item in likely if item[0] != entry.token_id]
    return {
        str(token_id): {
            "logprob": finite(logprob),
            "rank": rank,
            "decoded_token": shown(vocabulary, token_id, as_id=False),
        }
        for token_id, logprob, rank in ranked
    }
