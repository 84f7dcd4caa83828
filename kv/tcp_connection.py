"""One TCP connection of the side channel, whose reads and writes have deadlines."""

import asyncio
import socket

from kv.channel import ChannelError
from kv.frames import End

DEADLINE_S = 5.0
"""For a connection with its greeting, for a frame that has begun to come, and for one to be sent."""
CHUNK_BYTES = 1 << 16
FAILURES = (OSError, ValueError, OverflowError)
"""What a connection may die of: the network, deadlines, frames that are not ours, names that are no hosts."""


class Connection:
    """A connection that is read by one task and written by one task.

    Attributes:
        end: judges what comes.
        heard_s: when something came last, on the loop's clock.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, end: End) -> None:
        self.end = end
        self.heard_s = asyncio.get_running_loop().time()
        self._reader = reader
        self._writer = writer
        self._frame_began_s = self.heard_s
        # `drain` then waits until the kernel has taken everything, so that its deadline means something.
        writer.transport.set_write_buffer_limits(high=0)

    async def greet(self) -> list[bytes]:
        """Returns payloads that came with the end of the greeting."""
        async with asyncio.timeout(DEADLINE_S):
            self._writer.write(self.end.opening())
            payloads: list[bytes] = []
            while not self.end.ready:
                payloads = await self.read(DEADLINE_S)
            return payloads

    async def read(self, patience_s: float) -> list[bytes]:
        """Payloads, perhaps none. Raises TimeoutError: silence, or a frame took too long."""
        loop = asyncio.get_running_loop()
        began = self.end.partial
        until_s = self._frame_began_s + DEADLINE_S if began else loop.time() + patience_s
        async with asyncio.timeout_at(until_s):
            data = await self._reader.read(CHUNK_BYTES)
        if not data:
            raise ConnectionResetError("the other end closed the connection")
        self.heard_s = loop.time()
        reply, payloads = self.end.feed(data)
        if payloads or not began:
            self._frame_began_s = self.heard_s
        self._writer.write(reply)
        return payloads

    async def send(self, payload: bytes) -> None:
        """Raises TimeoutError: the other end does not read."""
        async with asyncio.timeout(DEADLINE_S):
            self._writer.write(self.end.wrap(payload))
            await self._writer.drain()

    def cut(self) -> None:
        """Closes at once; what was not sent is lost."""
        self._writer.transport.abort()


def listen(host: str, port: int, *, backlog: int) -> socket.socket:
    """A socket that listens; port 0: on any port.

    Raises:
        ChannelError: the address cannot be listened on.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # IPv4 first: callers of a name try all its addresses, callers of 127.0.0.1 only that one.
        family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        listener = socket.socket(family, kind, protocol)  # Not inherited by children, as all of Python's.
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(backlog)
        except OSError:
            listener.close()
            raise
        return listener
    except FAILURES as error:
        raise ChannelError(f"the side channel cannot listen on {host}:{port}: {error}") from None
