"""Token ids to text while they arrive."""

import codecs
from collections.abc import Iterable, Sequence

from jaxserve.text.tokenizer import Tokenizer

_LONGEST_CHARACTER_BYTES = 4


class Detokenizer:
    """The text of one growing sequence. Owned by one thread.

    `push` gives only text that later tokens cannot change: a character whose bytes are incomplete waits. The
    pushes and the final `flush`, joined, equal `decode` of all ids. Cost per token is that of its bytes.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, prompt: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        """Begin after `prompt` (all of it, or at least its last ids with text), whose text is not repeated.

        A character that the prompt leaves incomplete is given out with the token that completes it.
        """
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        tail = self._tail(prompt)
        self._utf8.decode(tail)
        self._at_start = tokenizer.strips_leading_space and not tail

    def push(self, ids: Iterable[int]) -> str:
        """Take the next tokens; return the text that is now certain, possibly empty."""
        data = b"".join(
            self._tokenizer.token_bytes(token_id) for token_id in ids if token_id not in self._skipped
        )
        if self._at_start and data:
            self._at_start = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """End the sequence; return what was held back (U+FFFD for an incomplete character)."""
        return self._utf8.decode(b"", final=True)

    def _tail(self, prompt: Sequence[int]) -> bytes:
        """The prompt's last bytes, from the start of a character."""
        tail = b""
        for token_id in reversed(prompt):
            if token_id not in self._skipped:
                tail = self._tokenizer.token_bytes(token_id) + tail
            if len(tail) >= _LONGEST_CHARACTER_BYTES:
                break
        return tail
