"""One TCP connection of the side channel, whose reads and writes have deadlines."""

import asyncio

from kv.frames import End

DEADLINE_S = 5.0
"""For a connection with its greeting, for a frame that has begun to come, and for one to be sent."""
CHUNK_BYTES = 1 << 16


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
