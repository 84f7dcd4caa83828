"""Deltas of several engine requests as one stream; what a slow client leaves is merged."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.types import Receive

from jaxserve.api.replies import merge
from jaxserve.outputs import Delta
from jaxserve.server.body import ClientGone
from jaxserve.server.surface import EngineSurface
from scheduler.types import Request

T = TypeVar("T")


class Mailbox:
    """Holds what the client has not taken: one merged delta per sequence.

    Merging is what bounds memory: however slow the client, a request never holds more than its own output.
    """

    def __init__(self, senders: int) -> None:
        self._waiting: dict[tuple[int, int], list[Delta]] = {}
        self._senders = senders
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    def put(self, prompt: int, delta: Delta) -> None:
        """Adds a delta of prompt number `prompt`."""
        self._waiting.setdefault((prompt, delta.index), []).append(delta)
        self._changed.set()

    def end(self, error: Exception | None) -> None:
        """One sender is done."""
        self._senders -= 1
        self._error = self._error or error
        self._changed.set()

    async def take(self) -> list[tuple[int, Delta]]:
        """Everything that waits, merged per sequence, in order of arrival; empty at the end.

        Raises:
            Exception: what a sender failed with.
        """
        while not self._waiting and self._senders and self._error is None:
            self._changed.clear()
            await self._changed.wait()
        if self._error is not None:
            raise self._error
        taken, self._waiting = self._waiting, {}
        return [(prompt, merge(deltas)) for (prompt, _), deltas in taken.items()]


@contextlib.asynccontextmanager
async def running(engine: EngineSurface, requests: Sequence[Request]) -> AsyncGenerator[Mailbox, None]:
    """Runs the requests; leaving the block aborts those that have not ended."""
    mailbox = Mailbox(len(requests))
    tasks = [
        asyncio.create_task(_pump(engine, prompt, request, mailbox))
        for prompt, request in enumerate(requests)
    ]
    try:
        yield mailbox
    finally:
        await _cancelled(tasks)


async def _pump(engine: EngineSurface, prompt: int, request: Request, mailbox: Mailbox) -> None:
    error: Exception | None = None
    try:
        async with contextlib.aclosing(engine.stream(request)) as deltas:
            async for delta in deltas:
                mailbox.put(prompt, delta)
    except Exception as failure:
        error = failure
    finally:
        mailbox.end(error)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Does the work, or cancels it when the client closes the connection.

    Args:
        receive: the ASGI channel, with the body read.
        work: cancelled also when the caller is.

    Raises:
        ClientGone: the client went first.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        await _cancelled([working, watching])


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
