"""A side channel in memory: messages travel as bytes, arrive at once, and get lost on order."""

from collections.abc import Callable

from kv.channel import ChannelError
from kv.wire import Message, decode, encode


class FakeWire:
    """Connects the channels made with it.

    Attributes:
        now: seconds, set by the test; calls without an answer fail when their deadline passes.
        silent: ports whose listeners get nothing and say nothing.
        lose: says of a question whether it gets lost.
        sent: every question, by port.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.silent: set[int] = set()
        self.lose: Callable[[Message], bool] = lambda message: False
        self.sent: list[tuple[int, Message]] = []
        self.listeners: dict[int, FakeChannel] = {}

    def channel(self, port: int) -> "FakeChannel":
        """A channel that listens; it takes the place of one that listened there before."""
        self.listeners[port] = FakeChannel(self)
        return self.listeners[port]


class FakeChannel:
    """`kv.channel.Channel` in memory."""

    def __init__(self, wire: FakeWire) -> None:
        self.wire = wire
        self.inbox: list[tuple[int, Message]] = []
        self.outbox: list[tuple[int, Message | ChannelError]] = []
        self.callers: dict[int, tuple[FakeChannel, int]] = {}
        self.waiting: dict[int, float] = {}
        self.count = 0
        self.closed = False

    def call(self, host: str, port: int, message: Message, *, timeout_s: float) -> int:
        assert timeout_s > 0
        self.count += 1
        self.wire.sent.append((port, message))
        listener = self.wire.listeners.get(port)
        if listener is None or listener.closed:
            self.outbox.append((self.count, ChannelError("nobody listens")))
            return self.count
        self.waiting[self.count] = self.wire.now + timeout_s
        if port not in self.wire.silent and not self.wire.lose(message):
            listener.count += 1
            listener.callers[listener.count] = (self, self.count)
            listener.inbox.append((listener.count, decode(encode(message))))
        return self.count

    def answers(self) -> list[tuple[int, Message | ChannelError]]:
        for number, deadline in list(self.waiting.items()):
            if self.wire.now >= deadline:
                del self.waiting[number]
                self.outbox.append((number, ChannelError("no answer in time")))
        found, self.outbox = self.outbox, []
        return found

    def asked(self) -> list[tuple[int, Message]]:
        found, self.inbox = self.inbox, []
        return found

    def answer(self, number: int, message: Message) -> None:
        caller, its_number = self.callers.pop(number)
        if caller.waiting.pop(its_number, None) is not None:
            caller.outbox.append((its_number, decode(encode(message))))

    def close(self) -> None:
        self.closed = True
