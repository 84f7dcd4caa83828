"""The side channel over TCP: one thread of its own that sleeps until bytes come, a call is made or a deadline
passes. What a connection says is judged by `kv.frames`; here are sockets, deadlines and limits."""

import asyncio
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence

from kv.channel import ChannelError
from kv.frames import NONCE_BYTES, End, FrameError
from kv.tcp_connection import CHUNK_BYTES, DEADLINE_S, FAILURES, Connection, listen
from kv.wire import Message, Refused, WireError, decode, encode

IDLE_S = 60.0
"""After that a caller drops a connection that it does not use. The listener gives it half as much again."""
MAX_STRANGERS = 24
MAX_PEERS = 40
"""Connections of others: those that have not proven yet that they hold our key, and those that have."""
MAX_LINKS = 64
"""Connections of ours."""
MAX_UNANSWERED = 64
"""Messages of one connection; no more are read until some are answered."""
MAX_IN_FLIGHT = 32
"""Calls on one connection that wait for their answers; others wait to be sent."""
_NUMBER_BYTES = 8


class _Guest:
    """Somebody who connected to our listener. Attributes: unanswered: messages that wait for our answer."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.unanswered: set[int] = set()
        self.room = asyncio.Semaphore(MAX_UNANSWERED)
        self.outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None


class _Link:
    """Our connection to one listener.

    Attributes:
        calls: their bytes, until they are answered or late.
        in_flight: when they were sent, until they are answered, be it late.
    """

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self.connection: Connection | None = None
        self.calls: dict[int, bytes] = {}
        self.in_flight: dict[int, float] = {}
        self.room = asyncio.Semaphore(MAX_IN_FLIGHT)
        self.outgoing: asyncio.Queue[int] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None


class TcpChannel:
    """`kv.channel.Channel` over TCP. Listens from its making until `close`.

    Attributes:
        port: on which it listens; 0: it only calls.
    """

    def __init__(
        self, host: str, port: int | None, *, key: bytes, wake: Callable[[], None], engine_id: str = ""
    ) -> None:
        """Args:
            host, port: to listen on; port 0: any; None: it only calls.
            key: of all engines that may talk with this one.
            wake: called, mostly from another thread, whenever `asked` or `answers` would return something.
            engine_id: names the thread.

        Raises:
            ChannelError: the address cannot be listened on.
        """
        self._key = key
        self._wake = wake
        self._numbers = itertools.count(1)
        self._answers: deque[tuple[int, Message | ChannelError]] = deque()
        self._asked: deque[tuple[int, Message]] = deque()
        # What follows belongs to the thread.
        self._guests: list[_Guest] = []
        self._asked_by: dict[int, tuple[_Guest, bytes]] = {}
        self._links: dict[tuple[str, int], _Link] = {}
        self._called: dict[int, _Link] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._listener = None if port is None else listen(host, port, backlog=MAX_STRANGERS + MAX_PEERS)
        self.port: int = 0 if self._listener is None else self._listener.getsockname()[1]
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=f"side-channel {engine_id}", daemon=True)
        self._thread.start()

    def call(self, host: str, port: int, message: Message, *, timeout_s: float) -> int:
        """Sends a message to a listener; returns a number that its answer will carry."""
        number = next(self._numbers)
        if self._closed:
            self._deliver(number, ChannelError("the side channel is closed"))
            return number
        try:
            data = encode(message)
        except WireError as error:
            self._deliver(number, ChannelError(str(error)))
            return number
        self._loop.call_soon_threadsafe(self._begin, number, (host, port), data, timeout_s)
        return number

    def answers(self) -> Sequence[tuple[int, Message | ChannelError]]:
        """Answers that came since the last call, each call's once."""
        return [self._answers.popleft() for _ in range(len(self._answers))]

    def asked(self) -> Sequence[tuple[int, Message]]:
        """Messages that came for us since the last call, with a number to answer to."""
        return [self._asked.popleft() for _ in range(len(self._asked))]

    def answer(self, number: int, message: Message) -> None:
        """Answers a message. One whose caller has gone is dropped."""
        if self._closed:
            return
        try:
            data = encode(message)
        except WireError as error:
            data = encode(Refused(code="malformed", reason=str(error)))
        self._loop.call_soon_threadsafe(self._reply, number, data)

    def close(self) -> None:
        """Listens and calls no more. Calls under way end with an error; `wake` is not called afterwards."""
        if not self._closed:
            self._closed = True
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    # From here on: in the thread.

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
        finally:
            self._loop.close()

    async def _main(self) -> None:
        server = (
            None
            if self._listener is None
            else await asyncio.start_server(self._come_in, sock=self._listener, limit=CHUNK_BYTES)
        )
        try:
            await self._stop.wait()
        finally:
            if server is not None:
                server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0)  # Sockets that were cut close in the loop's next round.

    def _deliver(self, number: int, answer: Message | ChannelError) -> None:
        self._answers.append((number, answer))
        self._wake()

    # Calls of ours.

    def _begin(self, number: int, address: tuple[str, int], data: bytes, timeout_s: float) -> None:
        self._timers[number] = self._loop.call_later(timeout_s, self._expire, number, timeout_s)
        self._submit(number, address, data)

    def _submit(self, number: int, address: tuple[str, int], data: bytes) -> None:
        link = self._links.get(address)
        if link is None:
            if len(self._links) >= MAX_LINKS and not self._drop_unused_link():
                self._end(number, ChannelError(f"{MAX_LINKS} connections are in use"))
                return
            link = self._links[address] = _Link(*address)
            link.task = self._loop.create_task(self._keep(link))
        self._called[number] = link
        link.calls[number] = data
        link.outgoing.put_nowait(number)

    def _end(self, number: int, answer: Message | ChannelError) -> None:
        self._timers.pop(number).cancel()
        link = self._called.pop(number, None)
        if link is not None:
            del link.calls[number]
        self._deliver(number, answer)

    def _drop_unused_link(self) -> bool:
        for address, link in self._links.items():
            if not link.calls and link.task is not None:
                del self._links[address]
                link.task.cancel()
                return True
        return False

    async def _keep(self, link: _Link) -> None:
        """The life of a link. However it ends, its calls end with it."""
        reason = "the side channel is closed"
        sender = None
        try:
            async with asyncio.timeout(DEADLINE_S):
                reader, writer = await asyncio.open_connection(link.host, link.port, limit=CHUNK_BYTES)
            end = End(key=self._key, nonce=os.urandom(NONCE_BYTES), caller=True)
            connection = link.connection = Connection(reader, writer, end)
            payloads = await connection.greet()
            sender = self._loop.create_task(self._send_calls(link, connection))
            while True:
                for payload in payloads:
                    self._answered(link, payload)
                try:
                    payloads = await connection.read(IDLE_S)
                except TimeoutError:
                    if connection.end.partial or not link.calls:
                        raise
                    payloads = []
        except TimeoutError:
            reason = "no sign of life before the deadline"
        except FAILURES as error:
            reason = str(error)
        finally:
            self._forget(link)
            if sender is not None:
                sender.cancel()
            if link.connection is not None:
                link.connection.cut()
            for number, data in list(link.calls.items()):
                if sender is None or number in link.in_flight or self._closed:
                    self._end(number, ChannelError(f"{link.host}:{link.port}: {reason}"))
                else:  # The connection was old and its end crossed the call: nobody has seen it.
                    self._submit(number, (link.host, link.port), data)

    def _forget(self, link: _Link) -> None:
        """The next call makes a new connection."""
        if self._links.get((link.host, link.port)) is link:
            del self._links[link.host, link.port]

    async def _send_calls(self, link: _Link, connection: Connection) -> None:
        try:
            while True:
                number = await link.outgoing.get()
                await link.room.acquire()
                if number not in link.calls:
                    link.room.release()
                    continue
                link.in_flight[number] = self._loop.time()
                await connection.send(number.to_bytes(_NUMBER_BYTES) + link.calls[number])
        except FAILURES:
            connection.cut()

    def _answered(self, link: _Link, payload: bytes) -> None:
        number = int.from_bytes(payload[:_NUMBER_BYTES])
        if link.in_flight.pop(number, None) is None:
            raise FrameError("an answer to nothing that was asked")
        link.room.release()
        if number not in link.calls:
            return  # Its time was over; the caller has been told.
        try:
            answer: Message | ChannelError = decode(payload[_NUMBER_BYTES:])
        except WireError as error:
            answer = ChannelError(f"{link.host}:{link.port}: {error}")
        self._end(number, answer)

    def _expire(self, number: int, timeout_s: float) -> None:
        link = self._called[number]
        self._end(number, ChannelError(f"{link.host}:{link.port}: no answer within {timeout_s:g} s"))
        sent_s = link.in_flight.get(number)
        if sent_s is not None and link.connection is not None and link.connection.heard_s < sent_s:
            self._forget(link)  # Nothing came since: a dead machine closes nothing.
            link.connection.cut()

    # Calls of others.

    def _come_in(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        end = End(key=self._key, nonce=os.urandom(NONCE_BYTES), caller=False)
        guest = _Guest(Connection(reader, writer, end))
        self._admit(guest)
        guest.task = self._loop.create_task(self._serve(guest))

    async def _serve(self, guest: _Guest) -> None:
        """The life of a guest."""
        answering = None
        try:
            payloads = await guest.connection.greet()
            self._promote(guest)
            answering = self._loop.create_task(self._send_answers(guest))
            while True:
                for payload in payloads:
                    await guest.room.acquire()
                    self._hear(guest, payload)
                payloads = await guest.connection.read(1.5 * IDLE_S)
        except FAILURES:
            pass  # A stranger, or a peer that went away: the one who called learns of it, not we.
        finally:
            guest.connection.cut()
            if guest in self._guests:
                self._guests.remove(guest)
            if answering is not None:
                answering.cancel()
            for number in guest.unanswered:
                del self._asked_by[number]

    def _admit(self, guest: _Guest) -> None:
        """Makes room for a stranger: another stranger goes, never a peer."""
        strangers = [other for other in self._guests if not other.connection.end.ready]
        if len(strangers) >= MAX_STRANGERS:
            self._dismiss(strangers)
        self._guests.append(guest)

    def _promote(self, guest: _Guest) -> None:
        """Makes room for a peer.

        Raises:
            ConnectionRefusedError: all others wait for an answer.
        """
        peers = [other for other in self._guests if other.connection.end.ready and other is not guest]
        if len(peers) >= MAX_PEERS:
            idle = [peer for peer in peers if not peer.unanswered]
            if not idle:
                raise ConnectionRefusedError("too many peers")
            self._dismiss(idle)

    def _dismiss(self, guests: Sequence[_Guest]) -> None:
        """The longest silent one goes."""
        gone = min(guests, key=lambda guest: guest.connection.heard_s)
        self._guests.remove(gone)
        gone.connection.cut()

    def _hear(self, guest: _Guest, payload: bytes) -> None:
        theirs = payload[:_NUMBER_BYTES]
        if len(theirs) < _NUMBER_BYTES:
            raise FrameError("a message without a number")
        number = next(self._numbers)
        guest.unanswered.add(number)
        self._asked_by[number] = (guest, theirs)
        try:
            message = decode(payload[_NUMBER_BYTES:])
        except WireError as error:
            self._reply(number, encode(Refused(code="malformed", reason=str(error))))
            return
        self._asked.append((number, message))
        self._wake()

    def _reply(self, number: int, data: bytes) -> None:
        if number in self._asked_by:
            guest, theirs = self._asked_by.pop(number)
            guest.unanswered.remove(number)
            guest.room.release()
            guest.outgoing.put_nowait(theirs + data)

    async def _send_answers(self, guest: _Guest) -> None:
        try:
            while True:
                await guest.connection.send(await guest.outgoing.get())
        except FAILURES:
            guest.connection.cut()
