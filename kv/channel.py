"""The side channel as those who use it see it. TCP in a server, queues in tests."""

from collections.abc import Sequence
from typing import Protocol

from kv.wire import Message


class ChannelError(RuntimeError):
    """A call that got no answer: nobody listens, the deadline passed, or the answer was not authentic."""


class Channel(Protocol):
    """Calls and answers. Nothing here waits; one thread uses it."""

    def call(self, host: str, port: int, message: Message, *, timeout_s: float) -> int:
        """Sends a message to a listener; returns a number that its answer will carry."""
        ...

    def answers(self) -> Sequence[tuple[int, Message | ChannelError]]:
        """Answers that came since the last call, each call's once."""
        ...

    def asked(self) -> Sequence[tuple[int, Message]]:
        """Messages that came for us since the last call, with a number to answer to."""
        ...

    def answer(self, number: int, message: Message) -> None:
        """Answers a message. One whose caller has gone is dropped."""
        ...

    def close(self) -> None:
        """Listens and calls no more."""
        ...
