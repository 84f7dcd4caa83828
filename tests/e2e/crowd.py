"""Many clients of one server in one light process, and what the machine had to spare for them and the server.

Requests are bytes and connections are kept: a client that shares two cores with the server must cost little.
"""

import asyncio
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

PATH = "/v1/completions"
IDLE_S = 10.0
"""A connection that was not used for so long is not used again: the server closes idle ones after 30 s."""
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One answer. Times on the monotonic clock: when the request was written, when the answer was whole."""

    status: int
    began_s: float
    ended_s: float
    retry_after: str
    body: bytes

    @property
    def seconds(self) -> float:
        """From the request to the whole answer."""
        return self.ended_s - self.began_s

    @property
    def num_tokens(self) -> int:
        """Generated."""
        return msgspec.json.decode(self.body)["usage"]["completion_tokens"]


class Crowd:
    """Clients of one server.

    Args:
        body: makes the n-th request's JSON.

    Attributes:
        replies: all that were ever answered.
        lags: of the open loop: how much later than due each request was written, in seconds.
    """

    def __init__(self, host: str, port: int, body: Callable[[int], bytes]) -> None:
        self._host, self._port, self._body = host, port, body
        self._idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._next = 0
        self.replies: list[Reply] = []
        self.lags: list[float] = []

    async def send(self, body: bytes) -> Reply:
        """Sends one request over an idle connection, or a new one."""
        reader, writer = await self._connection()
        head = f"POST {PATH} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        began_s = time.monotonic()
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        answer = await reader.readexactly(int(headers["content-length"]))
        reply = Reply(
            status=int(lines[0].split()[1]),
            began_s=began_s,
            ended_s=time.monotonic(),
            retry_after=headers.get("retry-after", ""),
            body=answer,
        )
        self.replies.append(reply)
        if headers.get("connection") == "close":
            writer.close()
        else:
            self._idle.append((reply.ended_s, reader, writer))
        return reply

    async def closed_loop(self, clients: int, seconds: float) -> list[Reply]:
        """So many clients, each with one request at a time, for so long; all that they were answered."""
        end_s = time.monotonic() + seconds
        replies: list[Reply] = []

        async def client() -> None:
            while time.monotonic() < end_s:
                replies.append(await self.send(self._take()))

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
        return replies

    async def open_loop(self, rate: float, seconds: float, *, seed: int) -> list[Reply]:
        """Requests at random times (Poisson), whatever becomes of earlier ones; all their answers."""
        self.lags = []
        began_s = time.monotonic()
        tasks: list[asyncio.Task[Reply]] = []
        async with asyncio.TaskGroup() as group:
            for due_s in _times(rate, seconds, seed):
                await asyncio.sleep(max(0.0, began_s + due_s - time.monotonic()))
                self.lags.append(time.monotonic() - began_s - due_s)
                tasks.append(group.create_task(self.send(self._take())))
        return [task.result() for task in tasks]

    def close(self) -> None:
        """Closes the idle connections."""
        for _, _, writer in self._idle:
            writer.close()
        self._idle.clear()

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The one used last; those that the server may be about to close are closed first."""
        while self._idle:
            idle_since_s, reader, writer = self._idle.pop()
            if time.monotonic() - idle_since_s < IDLE_S:
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._host, self._port)

    def _take(self) -> bytes:
        self._next += 1
        return self._body(self._next)


def _times(rate: float, seconds: float, seed: int) -> Iterator[float]:
    rng, due_s = random.Random(seed), 0.0
    while (due_s := due_s + rng.expovariate(rate)) < seconds:
        yield due_s


def quantile(values: Sequence[float], q: float) -> float:
    """The value that a share `q` of all is at most."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """CPU seconds so far: of all cores together, idle, of the servers, of their clients (this process and
    those of its own that have ended)."""

    total_s: float
    idle_s: float
    server_s: float
    clients_s: float

    @classmethod
    def now(cls, *pids: int) -> "Usage":
        """With the servers' processes."""
        with open("/proc/stat") as file:
            cores = [int(ticks) / _TICKS for ticks in file.readline().split()[1:9]]
        server_s = 0.0
        for pid in pids:
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            server_s += (int(fields[11]) + int(fields[12])) / _TICKS
        return cls(
            total_s=sum(cores),
            idle_s=cores[3] + cores[4],
            server_s=server_s,
            clients_s=sum(os.times()[:4]),
        )

    def spare_since(self, before: "Usage") -> float:
        """CPU seconds that were left to the servers since then, used or not."""
        return (self.idle_s - before.idle_s) + (self.server_s - before.server_s)

    def others_since(self, before: "Usage") -> float:
        """The share of the machine that neither the servers nor their clients had since then."""
        ours_s = self.spare_since(before) + self.clients_s - before.clients_s
        return 1 - ours_s / (self.total_s - before.total_s)


def memory_bytes(pid: int) -> int:
    """Resident memory of a process."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
