"""Answers /v1/completions and /v1/chat/completions, whole or as a stream of events."""

import asyncio
import logging
from concurrent.futures import Executor

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from jaxserve.api.errors import ApiError, internal_error
from jaxserve.api.refusals import told
from jaxserve.api.replies import ChunkWriter, full_reply, merge
from jaxserve.outputs import Delta, QueueFull
from jaxserve.server.answers import EVENT_STREAM_HEADERS, LAST_EVENT, event, json_response
from jaxserve.server.body import ClientGone, read_body
from jaxserve.server.options import ServerOptions, body_limit
from jaxserve.server.prepare import Prepare, Prepared
from jaxserve.server.status import Status
from jaxserve.server.streams import Mailbox, running, unless_gone
from jaxserve.server.surface import EngineSurface

logger = logging.getLogger(__name__)


class GenerationRoute:
    """The ASGI application of one generation route."""

    def __init__(
        self,
        engine: EngineSurface,
        options: ServerOptions,
        status: Status,
        prepare: Prepare,
        threads: Executor,
    ) -> None:
        self._engine = engine
        self._options = options
        self._status = status
        self._prepare = prepare
        self._threads = threads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request; raises ApiError before the response has begun, never after."""
        self._status.check_accepting()
        try:
            with self._status.serving():
                body = await read_body(
                    Headers(scope=scope),
                    receive,
                    limit=body_limit(self._engine.max_model_len),
                    timeout_s=self._options.body_timeout_s,
                )
                self._check_room()
                await unless_gone(receive, self._answer(body, scope, receive, send))
        except ClientGone:
            logger.debug("the client closed the connection")

    def _check_room(self) -> None:
        """Under overload most requests end here. What they cost is taken from those that are served, so
        nothing is parsed, rendered or tokenized for them; the body is read, since the connection lives on."""
        try:
            self._engine.check_room()
        except QueueFull as failure:
            raise self._told(failure) from failure

    async def _answer(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        prepared = await asyncio.get_running_loop().run_in_executor(self._threads, self._prepare, body)
        self._status.check_accepting()
        async with running(self._engine, prepared.requests) as mailbox:
            if prepared.envelope.generation.stream:
                await self._stream(prepared, mailbox, send)
                return
            try:
                reply = full_reply(prepared.envelope, await _all(mailbox), self._engine.tokenizer)
            except Exception as failure:
                raise self._told(failure) from failure
        await json_response(reply)(scope, receive, send)

    async def _stream(self, prepared: Prepared, mailbox: Mailbox, send: Send) -> None:
        """Sends chunks until the sequences end.

        A failure before the first delta has its own status; a later one becomes an error event.
        """
        writer = ChunkWriter(prepared.envelope, self._engine.tokenizer)
        started = False
        try:
            while deltas := await mailbox.take():
                chunks = [chunk for prompt, delta in deltas for chunk in writer.chunks(prompt, delta)]
                if not started:
                    await _start(send)
                    started = True
                if chunks:
                    await _send(send, b"".join(map(event, chunks)))
            last = b"".join(map(event, writer.last()))
        except Exception as failure:
            error = self._told(failure)
            if not started:
                raise error from failure
            last = event(error.body())
        await send({"type": "http.response.body", "body": last + LAST_EVENT, "more_body": False})

    def _told(self, failure: Exception) -> ApiError:
        """What the client is told of a failure below."""
        error = told(failure)
        if error is None:
            logger.error("a request failed", exc_info=failure)
            return internal_error()
        return error


async def _all(mailbox: Mailbox) -> list[tuple[int, Delta]]:
    """All deltas, merged to one per sequence."""
    parts: dict[tuple[int, int], list[Delta]] = {}
    while taken := await mailbox.take():
        for prompt, delta in taken:
            parts.setdefault((prompt, delta.index), []).append(delta)
    return [(prompt, merge(deltas)) for (prompt, _), deltas in parts.items()]


async def _start(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": list(EVENT_STREAM_HEADERS)})


async def _send(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
