"""The side channel between simulated engines: messages travel as bytes, late, twice, broken or never."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from jaxserve.sim.clockwork import Clockwork, Timer
from kv.channel import ChannelError
from kv.wire import Message, WireError, decode, encode


class End(Protocol):
    """One who speaks: an engine. Attributes: host: its address."""

    host: str
    alive: bool
    paused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """What becomes of one message.

    Attributes:
        delays: seconds after which it arrives, one per copy; empty: it never does.
        breaks: seconds after which the connection breaks instead, as its caller sees.
    """

    delays: tuple[float, ...]
    breaks: float | None = None


Judge = Callable[[str, str, Message], Fate]
"""(from host, to host, message)."""


class SimWire:
    """Connects the channels made with it. Attributes: listeners: (host, port) -> who listens there."""

    def __init__(self, clockwork: Clockwork, judge: Judge, refuses: Callable[[str], bool]) -> None:
        """Args: refuses: whether a host can open no connection now (no file descriptor is left)."""
        self.clockwork = clockwork
        self.listeners: dict[tuple[str, int], SimChannel] = {}
        self._judge = judge
        self._refuses = refuses

    def channel(self, end: End, port: int | None, wake: Callable[[], None]) -> "SimChannel":
        """A channel; with a port it listens there, in place of whoever did before."""
        channel = SimChannel(self, end, wake)
        if port is not None:
            self.listeners[end.host, port] = channel
        return channel

    def ask(self, caller: "SimChannel", number: int, host: str, port: int, message: Message) -> None:
        """Carries a question."""
        here = caller.end.host
        if self._refuses(here):
            caller.settle(number, ChannelError("no connection can be opened: too many open files"))
            return
        data = encode(message)
        fate = self._judge(here, host, message)
        if fate.breaks is not None:
            self._tell(caller, number, fate.breaks, ChannelError("the connection broke"))
        for delay in fate.delays:

            def arrive() -> None:
                listener = self.listeners.get((host, port))
                if listener is None or listener.closed or not listener.end.alive:
                    self._tell(caller, number, 0.001, ChannelError("nobody listens"))
                    return
                self._hand(listener, caller, number, data)

            self.clockwork.after(delay, f"message {type(message).__name__} {here}>{host}:{port}", arrive)

    def reply(self, listener: "SimChannel", caller: "SimChannel", number: int, message: Message) -> None:
        """Carries an answer."""
        here, host = listener.end.host, caller.end.host
        data = encode(message)
        fate = self._judge(here, host, message)
        if fate.breaks is not None:
            self._tell(caller, number, fate.breaks, ChannelError("the connection broke"))
        for delay in fate.delays:
            self._tell(caller, number, delay, decode(data), f"{type(message).__name__} {here}>{host}")

    def _hand(self, listener: "SimChannel", caller: "SimChannel", number: int, data: bytes) -> None:
        """Into the listener's inbox: the kernel takes it, also while the process is stopped."""
        try:
            message = decode(data)
        except WireError as error:
            self._tell(caller, number, 0.001, ChannelError(str(error)))
            return
        listener.take(message, caller, number)

    def _tell(
        self,
        caller: "SimChannel",
        number: int,
        delay: float,
        answer: Message | ChannelError,
        label: str = "no connection",
    ) -> None:
        self.clockwork.after(
            delay, f"answer {label}", lambda: caller.settle(number, answer), owner=caller.end
        )


@dataclass(slots=True, eq=False)
class SimChannel:
    """`kv.channel.Channel` of one rank of one life of an engine.

    Attributes:
        wake: called when something has come.
        late: answers that came after their deadline, or twice.
    """

    wire: SimWire
    end: End
    wake: Callable[[], None]
    closed: bool = False
    late: int = 0
    _inbox: list[tuple[int, Message]] = field(default_factory=list)
    _outbox: list[tuple[int, Message | ChannelError]] = field(default_factory=list)
    _callers: dict[int, tuple["SimChannel", int]] = field(default_factory=dict)
    _waiting: dict[int, Timer] = field(default_factory=dict)
    _count: int = 0

    def call(self, host: str, port: int, message: Message, *, timeout_s: float) -> int:
        """See `kv.channel.Channel`."""
        self._count += 1
        number = self._count
        self._waiting[number] = self.wire.clockwork.after(
            timeout_s,
            "no answer in time",
            lambda: self.settle(number, ChannelError("no answer in time")),
            owner=self.end,
        )
        self.wire.ask(self, number, host, port, message)
        return number

    def answers(self) -> list[tuple[int, Message | ChannelError]]:
        """See `kv.channel.Channel`."""
        found, self._outbox = self._outbox, []
        return found

    def asked(self) -> list[tuple[int, Message]]:
        """See `kv.channel.Channel`."""
        found, self._inbox = self._inbox, []
        return found

    def answer(self, number: int, message: Message) -> None:
        """See `kv.channel.Channel`."""
        caller, its_number = self._callers.pop(number)
        self.wire.reply(self, caller, its_number, message)

    def close(self) -> None:
        """See `kv.channel.Channel`."""
        self.closed = True
        for timer in self._waiting.values():
            timer.cancelled = True
        self._waiting.clear()

    def take(self, message: Message, caller: "SimChannel", number: int) -> None:
        """A question has come."""
        self._count += 1
        self._callers[self._count] = (caller, number)
        self._inbox.append((self._count, message))
        self.wake()

    def settle(self, number: int, answer: Message | ChannelError) -> None:
        """A call's answer has come, or its end without one."""
        timer = self._waiting.pop(number, None)
        if timer is None:
            self.late += 1
            return
        timer.cancelled = True
        self._outbox.append((number, answer))
        self.wake()
