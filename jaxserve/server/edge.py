"""The first and the last code that sees a request: ids, header bounds, keys, and errors nobody caught."""

import asyncio
import hashlib
import hmac
import logging
import uuid
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.api.errors import ApiError, internal_error, printable
from jaxserve.server.answers import error_response
from jaxserve.server.options import ServerOptions

logger = logging.getLogger(__name__)

PUBLIC_PATHS = frozenset({"/health", "/ready", "/ping", "/version", "/metrics"})
"""Open without a key, as in vLLM: probes and scrapers have none. Everything else needs one."""

ADMIN_PREFIX = "/debug/"
"""Of the routes that look inside. Clients' keys do not open them, and without an admin key nobody does."""

NO_ADMIN = "This server has no admin key: start it with --admin-api-key to see this."
MAX_REQUEST_ID_CHARS = 128
LINGER_BYTES = 64 << 20
LINGER_S = 2.0


class Edge:
    """ASGI middleware around the whole application.

    An error that goes out before the body was read ends the connection, after a bounded time in which the
    rest of the body is read and dropped: closing at once would reset the connection, and most clients would
    then never see the answer.

    Args:
        app: what is inside.
        options: of the server.
        admin_prefix: of paths that only the admin key opens; None: the application has none.
    """

    def __init__(self, app: ASGIApp, options: ServerOptions, admin_prefix: str | None = None) -> None:
        self._app = app
        self._options = options
        self._keys = tuple(_digest(key) for key in options.api_keys)
        self._admin_prefix = admin_prefix
        self._admin_keys = () if options.admin_key is None else (_digest(options.admin_key),)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection's request; nothing but HTTP is known here."""
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        request_id = request_id_of(headers)
        exchange = _Exchange(receive, send, request_id, expects_body=_has_body(headers))
        try:
            self._check(scope, headers)
            await self._app(scope, exchange.receive, exchange.send)
        except ApiError as error:
            await self._fail(exchange, scope, error)
        except Exception:
            logger.exception("request %s failed", request_id)
            await self._fail(exchange, scope, internal_error())

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Bounds the headers, and asks for a key unless the path is public.

        The path is the one that the router matches, decoded, and compared whole.
        """
        size = sum(len(name) + len(value) for name, value in headers.raw)
        if len(headers.raw) > self._options.max_headers or size > self._options.max_header_bytes:
            closing = (("Connection", "close"),)
            raise ApiError(
                431, "The request headers are too large.", code="headers_too_large", headers=closing
            )
        if self._admin_prefix is not None and scope["path"].startswith(self._admin_prefix):
            if not self._admin_keys:
                raise ApiError(403, NO_ADMIN, code="no_admin_key")
            _check_key(headers.getlist("authorization"), self._admin_keys, "admin key")
        elif self._keys and scope["path"] not in PUBLIC_PATHS:
            _check_key(headers.getlist("authorization"), self._keys, "API key")

    async def _fail(self, exchange: "_Exchange", scope: Scope, error: ApiError) -> None:
        if exchange.started:
            # Too late for a status: an answer that ends early must not look whole.
            raise ConnectionAbortedError("the response had begun when the request failed")
        await error_response(error)(scope, exchange.receive, exchange.send)


class _Exchange:
    """The ASGI channels of one request, watched."""

    def __init__(self, receive: Receive, send: Send, request_id: str, *, expects_body: bool) -> None:
        self._receive = receive
        self._send = send
        self._request_id = request_id
        self._unread_body = expects_body
        self.started = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self._unread_body = False
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            extra = [(b"x-request-id", self._request_id.encode("latin-1"))]
            if self._unread_body:
                extra.append((b"connection", b"close"))
            message = {**message, "headers": [*message.get("headers", ()), *extra]}
        elif self._unread_body and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._drop_body()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    async def _drop_body(self) -> None:
        dropped = 0
        try:
            async with asyncio.timeout(LINGER_S):
                while self._unread_body and dropped < LINGER_BYTES:
                    dropped += len((await self.receive()).get("body", b""))
        except TimeoutError:
            logger.debug("gave up on the rest of a refused body")


def request_id_of(headers: Headers) -> str:
    """The client's X-Request-Id where it is short and printable ASCII, else a new one."""
    given = headers.get("x-request-id", "")
    if given and given.isascii():
        return printable(given[:MAX_REQUEST_ID_CHARS], MAX_REQUEST_ID_CHARS)
    return uuid.uuid4().hex


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8")).digest()


def _check_key(given: list[str], keys: Iterable[bytes], what: str) -> None:
    """Compares hashes, so that time tells nothing about the keys; every refusal looks the same."""
    scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    digest = _digest(token)
    matches = [hmac.compare_digest(digest, key) for key in keys]
    if not (any(matches) and scheme.lower() == "bearer"):
        headers = (("WWW-Authenticate", "Bearer"),)
        raise ApiError(401, f"The {what} is missing or wrong.", code="invalid_api_key", headers=headers)
