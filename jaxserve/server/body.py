"""Reads a request body within bounds of kind, size and time."""

import asyncio

from starlette.datastructures import Headers
from starlette.types import Receive

from jaxserve.api.errors import ApiError

JSON = "application/json"


class ClientGone(Exception):
    """The client closed the connection."""


async def read_body(headers: Headers, receive: Receive, *, limit: int, timeout_s: float) -> bytes:
    """The whole body.

    Args:
        headers: of the request.
        receive: the ASGI channel.
        limit: bytes.
        timeout_s: for all of it.

    Raises:
        ApiError: 415 for a media type or encoding other than plain JSON in UTF-8, 413 over the limit (told
            from Content-Length before anything is read), 408 past the time.
        ClientGone: the connection was closed.
    """
    _check_kind(headers)
    declared = headers.get("content-length")
    if declared is not None and (not declared.isdecimal() or int(declared[:20]) > limit):
        raise _too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                if len(body) > limit:
                    raise _too_large(limit)
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        problem = f"The request body did not arrive within {timeout_s:g} s."
        raise ApiError(408, problem, code="request_timeout") from None


def _check_kind(headers: Headers) -> None:
    media_type, _, parameters = headers.get("content-type", "").partition(";")
    if media_type.strip().lower() != JSON:
        raise ApiError(415, f"The Content-Type must be {JSON}.", code="unsupported_media_type")
    for parameter in parameters.split(";"):
        key, _, value = parameter.partition("=")
        if key.strip().lower() == "charset" and value.strip().strip('"').lower() not in ("utf-8", "utf8"):
            raise ApiError(415, "The charset must be UTF-8.", code="unsupported_media_type")
    if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise ApiError(415, "An encoded body is not accepted.", code="unsupported_encoding")


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The request body exceeds {limit} bytes.", code="request_too_large")
