"""Control tokens spelled out in a chat message are text.

A tokenizer reads `<|im_end|>` as the end of a turn wherever it stands, so a user could close the turn and
speak as the system. Here a mark breaks each such spelling before the template sees it; the rendered text is
cut at the marks and its pieces are tokenised apart, so that no piece holds a whole control token but those
that the template wrote. Prompts of /v1/completions are the client's own and stay as they are.
"""

import re
from collections.abc import Iterable
from dataclasses import replace

from jaxserve.api.chat import Conversation

PRIVATE_USE = range(0xE000, 0xF900)
"""Characters that no text needs; the first one that the messages do not hold is the mark."""


class ControlTokens:
    """The control tokens of one vocabulary.

    Args:
        spellings: as they stand in text; empty ones are left out.
    """

    def __init__(self, spellings: Iterable[str]) -> None:
        escaped = sorted(re.escape(spelling) for spelling in spellings if spelling)
        # One character at each place where a spelling begins, so that spellings inside others are found too.
        self._starts = re.compile(f"(?=(?:{'|'.join(escaped)}))(.)", re.DOTALL) if escaped else None

    def broken(self, conversation: Conversation) -> tuple[Conversation, str | None]:
        """The conversation with a mark inside each spelling, and the mark; None: nothing was to be broken."""
        text = "".join(message["content"] + message.get("name", "") for message in conversation.messages)
        if self._starts is None or not self._starts.search(text):
            return conversation, None
        mark = next(chr(code) for code in PRIVATE_USE if chr(code) not in text)
        messages = tuple(
            {key: self._starts.sub(rf"\1{mark}", value) for key, value in message.items()}
            for message in conversation.messages
        )
        return replace(conversation, messages=messages), mark
